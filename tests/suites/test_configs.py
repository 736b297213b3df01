"""Every recipe parses, and every one that needs no download trains and tests."""

import json
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import (
    create_sweep_command,
    create_sweep_command_args,
    load_sweep_config,
)

from tests.suites.launch import run
from tests.suites.members import ALL, ANALYSES, CASES, MEMBERS, QUICK, Member, cases
from tests.suites.recorded import Recorded
from train import rehearse

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    p.relative_to(ROOT)
    for p in (ROOT / "configs").glob("*/*.yaml")
    if p.parent.name not in ("trainer", "sweeps")
)
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
OVERLAYS = sorted(p.relative_to(ROOT) for p in (ROOT / "configs" / "trainer").glob("*.yaml"))


@pytest.mark.parametrize("member", cases(MEMBERS, only=QUICK))
def test_a_recipe_fits_two_batches(member: Member, tmp_path: Path) -> None:
    run(
        [
            "fit",
            *member.arguments(),
            "-c",
            "configs/trainer/debug.yaml",
            "--run.root",
            str(tmp_path),
        ],
        tmp_path / "log.txt",
    )
    assert not [path for path in tmp_path.glob("*/*/*")], "a debug run leaves nothing behind"


@pytest.mark.parametrize("recorded", CASES, indirect=True)
def test_checkpoint_alone(recorded: Recorded, tmp_path: Path) -> None:
    """fit, then test and predict on the checkpoint without a configuration; the numbers are the same."""
    root, trained = ["--run.root", str(tmp_path)], recorded.directory
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    run(["test", "--ckpt_path", checkpoint, *root], tmp_path / "test.txt")
    (tested,) = tmp_path.glob("*/test-000")
    results = recorded.results, json.loads((tested / "results.json").read_text())
    first, second = (
        {key: value for key, value in result["metrics"].items() if key.startswith("test/")}
        for result in results
    )
    assert first
    assert first == second
    recipes = [yaml.safe_load((d / "config.yaml").read_text()) for d in (trained, tested)]
    assert recipes[0]["trainer"]["callbacks"] == recipes[1]["trainer"]["callbacks"]
    assert recipes[0]["model"] == recipes[1]["model"]
    run(["predict", "--ckpt_path", checkpoint, *root], tmp_path / "predict.txt")
    assert (tested.parent / "predict-000" / "predictions.csv").exists()


@pytest.mark.parametrize("recorded", ANALYSES, indirect=True, ids=lambda member: member.label)
def test_an_analysis_runs(recorded: Recorded) -> None:
    assert recorded.directory.name == "test-run"
    assert recorded.results["metrics"]
    assert recorded.results["data"]


def test_members_have_their_recipe() -> None:
    papers = {recipe.parent.name for recipe in RECIPES}
    assert papers == {member.name for member in ALL}, "every paper is in every suite"


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_parses(recipe: Path) -> None:
    analyses = {member.name for member in ANALYSES}
    command = "test" if recipe.parent.name in analyses else "fit"
    parsed = rehearse([command, "-c", str(ROOT / recipe)], build=False)
    assert parsed["run"]["experiment"] == f"{recipe.parent.name}-{recipe.stem}"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=str)
def test_overlay_merges_with_a_recipe(overlay: Path) -> None:
    member = MEMBERS[0]
    recipe = ROOT / member.config
    parsed = rehearse(["fit", "-c", str(recipe), "-c", str(ROOT / overlay)], build=False)
    kept = [callback["class_path"].split(".")[-1] for callback in parsed["trainer"]["callbacks"]]
    for callback in yaml.safe_load(recipe.read_text())["trainer"]["callbacks"]:
        assert callback["class_path"] in kept, "an overlay must not drop a recipe's callbacks"


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_a_wandb_sweep_makes_commands_that_parse(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command as wandb's agent fills it in, with the first value of every parameter."""
    config = load_sweep_config(str(sweep))
    assert config is not None
    assert config["method"] in ("grid", "random", "bayes")
    assert config["metric"]["goal"] in ("minimize", "maximize")
    chosen = {}
    for key, parameter in config["parameters"].items():
        grid = parameter.keys() == {"values"}
        assert grid or parameter.keys() == {"distribution", "min", "max"}
        assert grid or config["method"] != "grid"
        chosen[key] = parameter["values"][0] if grid else parameter["min"]
    filled: dict[str, list[str]] = create_sweep_command_args(
        {"args": {key: {"value": value} for key, value in chosen.items()}}
    )
    filled |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [config["program"]]}
    command = [
        text
        for part in create_sweep_command(config["command"])
        for text in filled.get(part.removeprefix("${").removesuffix("}"), [part])
    ]
    assert command[:4] == ["/usr/bin/env", "python", "train.py", "fit"]
    monkeypatch.chdir(ROOT)
    parsed = rehearse(command[3:], build=False)
    assert parsed["trainer"]["logger"][1]["class_path"] == "callbacks.loggers.RunWandbLogger"
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        found = parsed[section]["init_args"][name] if name else parsed[section]
        assert found == value
