"""What the pages say of measured results is what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from docs import gallery, results
from docs.generate import ROOT, filled_in
from docs.results import circumstances, collect, conditions, load, recipe_of, rows, value_text

PAPERS = {path.parent.name for path in (ROOT / "lightning_modules").glob("*/module.py")}
RECIPE = {
    "run": {"experiment": "osrci-digits"},
    "seed_everything": 0,
    "model": {"class_path": "OSRCI", "init_args": {"lr": 0.001, "widths": ["a", "b"]}},
    "data": {"class_path": "Digits", "init_args": {"split": 0, "normal": None}},
}


def rehearse(arguments: list[str], build: bool) -> dict[str, Any]:
    """The recipe; the class ``Other`` has another rate."""
    assert arguments[:3] == ["fit", "-c", "configs/osrci/digits.yaml"]
    assert not build
    if not arguments[3:]:
        return RECIPE
    assert arguments[3:] == ["--model.class_path", "Other"]
    return {**RECIPE, "model": {"class_path": "Other", "init_args": {"lr": 0.5, "widths": ["a"]}}}


def add_run(
    folder: Path, name: str, value: float, experiment: str = "osrci-digits", **changed: Any
) -> None:
    config = json.loads(json.dumps(RECIPE))
    for key, given in changed.items():
        part, _, option = key.partition("__")
        if option:
            config[part]["init_args"][option] = given
        else:
            config[part] = given
    directory = folder / experiment / name
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    found = {
        "metrics": {"test/margin/auroc": value, "test/margin/auroc_se": 0.01, "val/loss": 1.0},
        "experiment": experiment,
        "command": "fit",
        "data": {"dataset": "digits", "known": [value]},
        "seed": config["seed_everything"],
        "processes": 1,
        "wall_time_s": 60.0,
        "git_revision": "0123456789",
        "versions": {"torch": "2.15.0"},
        "hardware": {"cpu_cores": 2, "torch_threads": 1, "gpus": []},
    }
    (directory / "results.json").write_text(json.dumps(found))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs; what is collected goes beside it."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "runs"


def test_every_paper_has_a_row() -> None:
    listed = [folder for row in rows() for folder in row.folders]
    assert sorted(listed) == sorted(PAPERS)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.folders[0])
def test_a_row_names_what_exists(row: results.Row) -> None:
    assert (ROOT / row.page).is_file()
    for recipe in row.recipes:
        path = ROOT / recipe
        assert (
            yaml.safe_load(path.read_text())["run"]["experiment"]
            == f"{path.parent.name}-{path.stem}"
        )
    for experiment in {
        row.experiment,
        *(m["experiment"] for m in results._PLACE.finditer(row.measured)),
    }:
        assert experiment is None or recipe_of(experiment).is_file()
    assert "\n" not in row.caption
    assert list(results._PLACE.finditer(row.measured)), "numbers come from results"


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_committed_is_complete(path: Path) -> None:
    record = load(path.stem)
    assert recipe_of(record["experiment"]).is_file()
    assert record["command"].startswith("python train.py ")
    for key in ("seeds", "hardware", "versions", "git_revision", "wall_time_s"):
        assert record[key]
    assert all(len(found["values"]) == record["runs"] for found in record["metrics"].values())
    assert path.stat().st_size < 100_000


def test_runs_are_collected_with_what_was_swept(folder: Path) -> None:
    for split, value in ((10, 0.9), (2, 0.8), (0, 0.7)):
        add_run(folder, f"s{split}", value, data__split=split, model__lr=0.01)
    (folder / "osrci-digits" / "unfinished").mkdir()
    (path,) = collect(folder, rehearse)
    record = load(path.stem)
    assert record["command"] == (
        "python train.py sweep -c configs/osrci/digits.yaml --model.lr 0.01 --over data.split=0,2,10"
    )
    found = record["metrics"]["test/margin/auroc"]
    assert found["values"] == [0.7, 0.8, 0.9]
    assert (found["mean"], found["std"], found["n"]) == (0.8, pytest.approx(0.1), 3)
    assert "val/loss" not in record["metrics"]
    assert circumstances(record) == "3 runs (split 0, 2, 10; seed 0), one thread of 2 CPU cores"
    assert "revision 0123456" in conditions("osrci-digits")
    before = path.read_text()
    collect(folder, rehearse)
    assert path.read_text() == before, "it can be done again"


def test_a_single_run_and_a_variant(folder: Path) -> None:
    add_run(folder, "a", 0.5, "osrci-digits-small", model__widths=["c"])
    collect(folder, rehearse)
    record = load("osrci-digits-small")
    expected = """python train.py fit -c configs/osrci/digits.yaml --model.widths '["c"]' """
    assert record["command"] == expected + "--run.experiment osrci-digits-small"
    assert circumstances(record) == "seed 0, one thread of 2 CPU cores"
    assert value_text(record, "test/margin/auroc") == "50.0"
    assert value_text(record, "test/margin/auroc", "se") == "50.0 ± 1.0"


def test_another_class_has_its_own_defaults(folder: Path) -> None:
    """What is the recipe's value is said all the same where the class would have another one."""
    other = {"class_path": "Other", "init_args": {"lr": 0.001, "widths": ["a"]}}
    add_run(folder, "a", 0.5, model=other)
    collect(folder, rehearse)
    assert load("osrci-digits")["command"] == (
        "python train.py fit -c configs/osrci/digits.yaml --model.class_path Other --model.lr 0.001"
    )


def test_what_cannot_be_collected(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(ValueError, match=r"has no EXPERIMENT/NAME/results\.json of a t"):
        collect(folder, rehearse)
    add_run(folder, "a", 0.5)
    add_run(folder, "b", 0.5)
    with pytest.raises(ValueError, match="2 runs of osrci-digits have one configuration"):
        collect(folder, rehearse)
    with pytest.raises(ValueError, match="nothing-here has no recipe"):
        recipe_of("nothing-here")
    with pytest.raises(ValueError, match=r"no .*/missing\.json; collect it with"):
        load("missing")


def test_tables_of_a_page(folder: Path) -> None:
    for seed, value in ((0, 0.7), (1, 0.9)):
        add_run(folder, f"s{seed}", value, seed_everything=seed)
    collect(folder, rehearse)
    part = "<!-- begin {} -->\n<!-- end -->\n"
    made = filled_in(
        part.format("result osrci-digits auroc:AUROC margin:OSRCI_margin"), Path("p.md")
    )
    assert made.splitlines()[1:4] == [
        "|  | AUROC, % |",
        "|---|---|",
        "| OSRCI margin | 80.0 ± 14.1 |",
    ]
    made = filled_in(part.format("result osrci-digits auroc|mean2:mean margin"), Path("p.md"))
    assert made.splitlines()[1:4:2] == ["|  | mean, % |", "| margin | 80.00 |"]
    made = filled_in(part.format("runs osrci-digits auroc:AUROC margin"), Path("p.md"))
    assert made.splitlines()[1] == "| AUROC by seed, % | 0 | 1 | mean ± std |"
    assert made.splitlines()[3] == "| margin | 70.0 | 90.0 | 80.0 ± 14.1 |"
    with pytest.raises(
        ValueError, match=r"p\.md: runs osrci-digits auc margin: .* no metric test/m"
    ):
        filled_in(part.format("runs osrci-digits auc margin"), Path("p.md"))
    assert value_text(load("osrci-digits"), "test/margin/auroc", "mean0") == "80"
    with pytest.raises(ValueError, match="unknown form 'median'"):
        value_text(load("osrci-digits"), "test/margin/auroc", "median")
    text = "{test/margin/auroc|range}; {osrci-digits:test/margin/auroc|mean}"
    assert results.filled_in(text, "osrci-digits") == "70.0 to 90.0; 80.0"


def test_a_changed_number_changes_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "README.md").read_text()
    kept = results.RESULTS
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for path in kept.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    assert filled_in(text, ROOT / "README.md") == text
    record = json.loads((tmp_path / "prdc-digits.json").read_text())
    record["metrics"]["test/density"]["mean"] += 0.1
    (tmp_path / "prdc-digits.json").write_text(json.dumps(record))
    assert filled_in(text, ROOT / "README.md") != text


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.folders[0])
def test_pictures_of_the_gallery(row: results.Row) -> None:
    path = gallery.picture_of(row)
    if not path.exists():
        assert not (results.RESULTS / f"{row.experiment}.json").exists(), (
            "collected without a picture"
        )
        return
    with Image.open(path) as picture:
        assert picture.width == gallery.WIDTH
        assert picture.height <= gallery.HEIGHT
    assert path.stat().st_size < gallery.LARGEST


def test_a_picture_is_framed(tmp_path: Path) -> None:
    for size, height in (
        ((100, 50), 400),
        ((1600, 400), 200),
        ((300, 900), 480),
        ((700, 100), 114),
    ):
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / "source.png")
        framed = gallery.framed(tmp_path / "source.png", tmp_path / "made" / "picture.png")
        with Image.open(framed) as picture:
            assert picture.size == (800, height)
            assert picture.convert("RGB").getpixel((400, height // 2)) == (200, 0, 0)


def test_a_row_waits_for_all_of_its_runs(folder: Path) -> None:
    folder.parent.joinpath("results").mkdir()
    row = next(row for row in rows() if row.folders == ["opgan"])
    assert row.measured_text == "not collected: opgan-shapes, opgan-shapes-cyclegan"
    (results.RESULTS / "opgan-shapes.json").write_text("{}")
    assert row.measured_text.endswith("not collected: opgan-shapes-cyclegan")
