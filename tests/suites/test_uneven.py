"""Sets that do not divide evenly: every image counts once, whatever the number of processes and of their batches."""

import json
from pathlib import Path

import pytest

from tests.suites.launch import run
from tests.suites.members import MEMBERS, QUICK, Member, cases

# Odd numbers of images where the recipe allows it; with these batches some ranks have one batch more than others.
SIZES: dict[str, dict[str, object]] = {
    "digits": {"data.test_limit": 5, "data.eval_batch_size": 12},
    "shapes": {"data.shapes_test": 13, "data.shapes_val": 9, "data.eval_batch_size": 3},
}


def spread(processes: int) -> list[str]:
    strategy = "ddp_fork_find_unused_parameters_true"
    return ["--trainer.devices", str(processes), "--trainer.strategy", strategy]


def sized(member: Member) -> dict[str, object]:
    sizes = SIZES["shapes" if "shapes" in member.config else "digits"]
    return {"trainer.accelerator": "cpu", **sizes}


@pytest.mark.parametrize("member", cases(MEMBERS, only=QUICK[1:]))
def test_a_checkpoint_scores_the_same_on_any_number_of_processes(
    member: Member, tmp_path: Path
) -> None:
    common = member.arguments(sized(member), {"trainer.precision": "64-true"})
    where = ["--run.root", str(tmp_path), "--run.name"]
    run(["fit", *common, *where, "run"], tmp_path / "fit.txt")
    (directory,) = tmp_path.glob("*/run")
    whole = json.loads((directory / "results.json").read_text())["metrics"]
    expected = {key: value for key, value in whole.items() if key.startswith("test/")}
    assert expected
    checkpoint = ["--ckpt_path", str(directory / "checkpoints" / "last.ckpt")]
    # Four alone where time counts: they are the more uneven.
    for processes in (4,) if member.name == "supervised" else (2, 4):
        options = [*spread(processes), *where, str(processes)]
        run(["test", *common, *checkpoint, *options], tmp_path / f"{processes}.txt")
        found = directory.with_name(f"test-{processes}") / "results.json"
        metrics = json.loads(found.read_text())["metrics"]
        assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-12)
