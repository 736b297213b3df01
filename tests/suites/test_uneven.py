"""Sets that do not divide evenly: every image counts once, whatever the number of processes and of their batches."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.suites.launch import run
from tests.suites.members import MEMBERS, Member

WORLDS = (1, 2, 4)
# Odd numbers of images where the recipe allows it; with these batches some ranks have one batch more than others.
SIZES: dict[str, dict[str, object]] = {
    "digits": {"data.test_limit": 5, "data.eval_batch_size": 12},
    "shapes": {"data.shapes_test": 13, "data.shapes_val": 9, "data.eval_batch_size": 3},
}


def metrics(folder: Path, directory: str) -> dict[str, float]:
    (path,) = folder.glob(f"*/{directory}/results.json")
    return json.loads(path.read_text())["metrics"]


def spread(processes: int) -> list[str]:
    strategy = "ddp_fork_find_unused_parameters_true" if processes > 1 else "auto"
    return ["--trainer.devices", str(processes), "--trainer.strategy", strategy]


def sized(member: Member) -> dict[str, object]:
    sizes = SIZES["shapes" if "shapes" in member.config else "digits"]
    return {"trainer.accelerator": "cpu", **sizes}


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(member, marks=[] if member.name == "supervised" else [pytest.mark.slow])
        for member in MEMBERS
    ],
    ids=lambda member: member.name,
)
def test_a_checkpoint_scores_the_same_on_any_number_of_processes(
    member: Member, tmp_path: Path
) -> None:
    common = member.arguments(sized(member), {"trainer.precision": "64-true"})
    where = ["--run.root", str(tmp_path), "--run.name"]
    run(["fit", *common, *where, "run", "--run.test", "false"], tmp_path / "fit.txt")
    (checkpoint,) = tmp_path.glob("*/run/checkpoints/last.ckpt")
    commands = ["test", "validate"] if member.name == "supervised" else ["test"]
    for command in commands:
        results: dict[int, dict[str, Any]] = {}
        for processes in WORLDS:
            arguments = [command, *common, "--ckpt_path", str(checkpoint), *spread(processes)]
            log = tmp_path / f"{command}-{processes}.txt"
            run([*arguments, *where, str(processes)], log)
            results[processes] = metrics(tmp_path, f"{command}-{processes}")
        assert len(results[1]) > 0
        for processes in WORLDS[1:]:
            assert results[processes] == pytest.approx(results[1], rel=1e-9, abs=1e-12)
