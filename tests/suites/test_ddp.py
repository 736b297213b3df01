"""Two processes with half the batch each follow one process with the whole batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suites.launch import probe, run
from tests.suites.members import ANALYSES, CASES, IN_PHASES, MEMBERS, QUICK, Member, cases
from tests.suites.recorded import Recorded
from tests.suites.scheduler import two_nodes

ROOT = Path(__file__).parents[2]
TWO = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 2,
    "trainer.strategy": "ddp_fork_find_unused_parameters_true",
}
DOUBLE = {"trainer.precision": "64-true"}


def run_options(folder: Path) -> list[str]:
    return ["--run.root", str(folder), "--run.name", "run", "--run.test", "false"]


def train(
    member: Member, folder: Path, *overrides: dict[str, Any], trap: str = "", parity: bool = True
) -> list[dict[str, Any]]:
    """Trains all phases and returns what each rank ended with."""
    base = member.parity if parity else {}
    arguments = ["fit", *member.arguments(base, *overrides), *run_options(folder)]
    arguments += probe("StateDump", folder=folder / "dump")
    if trap:
        arguments += probe("Trap", name=trap)
    run(arguments, folder / "log.txt")
    return [torch.load(path, weights_only=True) for path in sorted((folder / "dump").glob("*.pt"))]


def largest_difference(
    first: dict[str, Any], second: dict[str, Any], floor: float = 1e-12
) -> float:
    """Over all parameters and buffers, relative to the larger magnitude in the tensor, but at least to ``floor``."""
    assert first["state"].keys() == second["state"].keys()
    worst = 0.0
    for key, value in first["state"].items():
        other = second["state"][key]
        assert value.shape == other.shape, key
        if value.numel():
            scale = max(float(value.double().nan_to_num().abs().max()), floor)
            gap = (value.double() - other.double()).nan_to_num().abs().max()
            worst = max(worst, float(gap) / scale)
    return worst


@pytest.mark.parametrize("member", CASES)
def test_two_processes_follow_one(member: Member, tmp_path: Path) -> None:
    (one,) = train(member, tmp_path / "one", DOUBLE)
    first, second = train(member, tmp_path / "two", DOUBLE, TWO)
    assert one["global_step"] == first["global_step"] >= 10
    assert largest_difference(first, second) == 0
    tolerance, floor = member.rounding
    assert largest_difference(one, first, floor) < tolerance


CONTINUED = [member for member in MEMBERS if member in IN_PHASES or member in QUICK]


@pytest.mark.parametrize("member", cases([m for m in MEMBERS if m not in CONTINUED]))
def test_ranks_are_equal_with_what_depends_on_the_local_batch(
    member: Member, tmp_path: Path
) -> None:
    """As users run it, batch norm and dropout included."""
    first, second = train(member, tmp_path, TWO, parity=False)
    assert largest_difference(first, second) == 0


@pytest.mark.parametrize("member", cases(MEMBERS, only=CONTINUED))
def test_a_preempted_run_of_two_processes_continues_exactly(member: Member, tmp_path: Path) -> None:
    """The same, and it ends as one that was not preempted."""
    first, second = train(member, tmp_path / "whole", TWO, parity=False)
    assert largest_difference(first, second) == 0

    stopped = tmp_path / "stopped"
    # Processes of their own, as on a cluster; only rank 0 gets the signal.
    stop = probe("SignalAt", name="SIGTERM", batch=member.batches[0] - 1)
    codes, texts, _ = two_nodes(member, stopped, "--run.test", "false", *stop)
    assert codes == [75, 75], texts
    resumed, other = train(member, stopped, TWO, {"run.resume": "true"}, parity=False)
    assert largest_difference(resumed, other) == 0
    assert largest_difference(first, resumed) == 0


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recorded", ANALYSES, indirect=True, ids=lambda member: member.label)
def test_an_analysis_is_the_same_on_any_number_of_processes(
    recorded: Recorded, processes: int, tmp_path: Path
) -> None:
    arguments = ["test", *recorded.member.arguments({**TWO, "trainer.devices": processes})]
    run([*arguments, "--run.root", str(tmp_path), "--run.name", "run"], tmp_path / "log.txt")
    (path,) = tmp_path.glob("*/test-run/results.json")
    results = json.loads(path.read_text())
    assert (recorded.results["processes"], results["processes"]) == (1, processes)
    assert recorded.results["metrics"] == results["metrics"]


@pytest.mark.parametrize("member", cases(MEMBERS, only=QUICK))
def test_one_broken_rank_stops_all(member: Member, tmp_path: Path) -> None:
    probe = ["--trainer.callbacks+", "tests.suites.probes.BrokenLoss"]
    arguments = ["fit", *member.arguments(TWO), *run_options(tmp_path), *probe]
    text = run(arguments, tmp_path / "log.txt", expect=1)
    assert "NonFiniteLossError" in text
    assert "epoch 0, batch 1" in text


@pytest.mark.parametrize(
    "trap",
    [
        "plain_backward",
        pytest.param("unkeyed_noise", marks=pytest.mark.slow),
        pytest.param("drifting_buffers", marks=pytest.mark.slow),
    ],
)
def test_the_suite_notices(trap: str, tmp_path: Path) -> None:
    """Each trap that the base class avoids makes one of the two tests above fail."""
    member = MEMBERS[0]
    if trap == "unkeyed_noise":
        (one,) = train(member, tmp_path / "one", DOUBLE, trap=trap)
        first, second = train(member, tmp_path / "two", DOUBLE, TWO, trap=trap)
        assert largest_difference(one, first) > 1e-6
        return
    first, second = train(member, tmp_path, TWO, trap=trap, parity=False)
    assert largest_difference(first, second) > 1e-6
