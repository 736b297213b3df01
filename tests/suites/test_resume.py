"""A run that was killed or preempted and continued ends as one that was not, to the last bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suites.launch import probe, run
from tests.suites.members import IN_PHASES, MEMBERS, QUICK, Member, cases
from tests.suites.recorded import CHECKPOINTS, Recorded

SIGKILL = -9
PREEMPTED = 75


def arguments(member: Member, root: Path, *more: str) -> list[str]:
    """Of the run ``root/EXPERIMENT/run``, continued where there is one."""
    found = ["fit", *member.arguments(), "--run.root", str(root), "--run.name", "run"]
    found += ["--run.resume", "true", *CHECKPOINTS]
    # As configs/trainer/wandb.yaml adds it: it logs metrics.
    found += ["--trainer.callbacks+", "LearningRates"]
    return [*found, *probe("StateDump", folder=root / "dump"), *more]


def train(member: Member, root: Path, *more: str, expect: int = 0, log: str = "log.txt") -> str:
    return run(arguments(member, root, *more), root / log, expect)


def outcome(root: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on interruptions."""
    (directory,) = root.glob("*/run")
    dump = torch.load(root / "dump" / "rank0.pt", weights_only=True)
    files = sorted([directory / "metrics.csv", *directory.glob("images/*")])
    return {
        "state": dump["state"],
        "optimizers": dump["optimizers"],
        "global_step": dump["global_step"],
        "results": json.loads((directory / "results.json").read_text())["metrics"],
        "files": {file.name: file.read_bytes() for file in files},
    }


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for position, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{position}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), where
    else:
        assert a == b, where


WITH_WORK_BETWEEN = [member for member in MEMBERS if member.boundary]


@pytest.mark.parametrize(
    ("recorded", "where"),
    [
        *cases(MEMBERS, "first phase", only=IN_PHASES),
        *cases(WITH_WORK_BETWEEN, "between phases"),
        *cases(MEMBERS, "last phase"),
    ],
    indirect=["recorded"],
)
def test_sigkill(recorded: Recorded, where: str, tmp_path: Path) -> None:
    member, expected = recorded.member, outcome(recorded.root)
    strike: dict[str, object] = {"batch": member.batches[where == "last phase"]}
    if where == "between phases":
        strike = {"method": member.boundary, "call": 2}
    kill = probe("SignalAt", name="SIGKILL", **strike)
    train(member, tmp_path, *kill, expect=SIGKILL, log="killed.txt")
    train(member, tmp_path)
    assert_equal(outcome(tmp_path), expected)


@pytest.mark.parametrize("recorded", cases(QUICK), indirect=True)
def test_a_nan_in_the_data_and_then_a_damaged_checkpoint(
    recorded: Recorded, tmp_path: Path
) -> None:
    """Manual and automatic optimisation; a byte of a tensor is changed, which torch would not notice."""
    member, expected = recorded.member, outcome(recorded.root)
    poison = probe("Poison", batch=member.batches[1])
    text = train(member, tmp_path, *poison, expect=1, log="poisoned.txt")
    (newest,) = tmp_path.glob("*/run/checkpoints/last.ckpt")
    error = text[text.index("error: ") :]
    for part in ("= nan", "epoch ", "batch ", f"the last good checkpoint is {newest}"):
        assert part in error, error
    content = bytearray(newest.read_bytes())
    parameter = max(torch.load(newest, weights_only=True)["state_dict"].values(), key=torch.numel)
    content[content.index(parameter.numpy().tobytes()) + 2] ^= 16
    newest.write_bytes(content)
    text = train(member, tmp_path)
    assert f"{newest} is not a readable checkpoint: it is damaged" in text
    assert text.count("is not a readable checkpoint") == 1
    assert_equal(outcome(tmp_path), expected)


@pytest.mark.parametrize("recorded", cases(MEMBERS, only=QUICK), indirect=True)
def test_preemption_loses_nothing(recorded: Recorded, tmp_path: Path) -> None:
    """SIGUSR1; what SIGTERM does to two processes is in tests/suites/test_ddp.py."""
    member, expected = recorded.member, outcome(recorded.root)
    name, batch = "SIGUSR1", member.batches[0] - 1
    stop = probe("SignalAt", name=name, batch=batch)
    text = train(member, tmp_path, *stop, expect=PREEMPTED, log="preempted.txt")
    assert name in text
    assert "--run.resume true" in text
    (checkpoint,) = tmp_path.glob("*/run/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == batch + 1
    train(member, tmp_path)
    assert_equal(outcome(tmp_path), expected)


@pytest.mark.parametrize("recorded", cases(WITH_WORK_BETWEEN), indirect=True)
def test_preemption_between_phases(recorded: Recorded, tmp_path: Path) -> None:
    member, expected = recorded.member, outcome(recorded.root)
    stop = probe("SignalAt", name="SIGTERM", method=member.boundary, call=1)
    train(member, tmp_path, *stop, expect=PREEMPTED, log="preempted.txt")
    train(member, tmp_path)
    assert_equal(outcome(tmp_path), expected)
