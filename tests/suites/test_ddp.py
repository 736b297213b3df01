"""Two processes with half the batch each follow one process with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suites.launch import run
from tests.suites.members import IDS, MEMBERS, Member

TWO = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 2,
    "trainer.strategy": "ddp_fork_find_unused_parameters_true",
}
DOUBLE = {"trainer.precision": "64-true"}


def train(
    member: Member, folder: Path, *overrides: dict[str, Any], trap: str = ""
) -> list[dict[str, Any]]:
    """Trains all phases and returns what each rank ended with."""
    arguments = ["fit", *member.arguments(member.parity, *overrides)]
    arguments += ["--run.root", str(folder), "--run.name", "run", "--run.test", "false"]
    arguments += ["--trainer.callbacks+", "tests.suites.probes.StateDump"]
    arguments += ["--trainer.callbacks.folder", str(folder / "dump")]
    if trap:
        arguments += ["--trainer.callbacks+", "tests.suites.probes.Trap"]
        arguments += ["--trainer.callbacks.name", trap]
    run(arguments, folder / "log.txt")
    return [torch.load(path, weights_only=True) for path in sorted((folder / "dump").glob("*.pt"))]


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Over all parameters and buffers, relative to the larger magnitude in the tensor."""
    assert first["state"].keys() == second["state"].keys()
    worst = 0.0
    for key, value in first["state"].items():
        other = second["state"][key]
        assert value.shape == other.shape, key
        if value.numel():
            scale = max(float(value.double().nan_to_num().abs().max()), 1e-12)
            gap = (value.double() - other.double()).nan_to_num().abs().max()
            worst = max(worst, float(gap) / scale)
    return worst


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_two_processes_follow_one(member: Member, tmp_path: Path) -> None:
    (one,) = train(member, tmp_path / "one", DOUBLE)
    first, second = train(member, tmp_path / "two", DOUBLE, TWO)
    assert one["global_step"] == first["global_step"] >= 10
    assert largest_difference(first, second) == 0
    assert largest_difference(one, first) < 1e-9


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_ranks_are_equal_with_batch_norm(member: Member, tmp_path: Path) -> None:
    first, second = train(member, tmp_path, TWO, {key: value for key, value in DEFAULTS.items()})
    assert largest_difference(first, second) == 0


DEFAULTS = {"model.norm": "batch", "model.dropout": 0.2, "model.gather_minibatch_feature": "false"}


@pytest.mark.parametrize("trap", ["plain_backward", "unkeyed_noise", "drifting_buffers"])
def test_the_suite_notices(trap: str, tmp_path: Path) -> None:
    """Each trap that the base class avoids makes one of the two tests above fail."""
    member = MEMBERS[0]
    if trap == "unkeyed_noise":
        (one,) = train(member, tmp_path / "one", DOUBLE, trap=trap)
        first, second = train(member, tmp_path / "two", DOUBLE, TWO, trap=trap)
        assert largest_difference(one, first) > 1e-6
        return
    first, second = train(member, tmp_path, TWO, DEFAULTS, trap=trap)
    assert largest_difference(first, second) > 1e-6
