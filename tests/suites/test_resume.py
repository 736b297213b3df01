"""A run that was killed or preempted and continued ends as one that was not, to the last bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suites.launch import run
from tests.suites.members import CASES, Member

SIGKILL = -9
PREEMPTED = 75


def train(member: Member, root: Path, *probe: str, expect: int = 0, log: str = "log.txt") -> str:
    """The run ``root/EXPERIMENT/run``, continued where there is one."""
    arguments = ["fit", *member.arguments(), "--run.root", str(root), "--run.name", "run"]
    arguments += ["--run.resume", "true", "--checkpoint.every_n_batches", "3"]
    arguments += ["--trainer.callbacks+", "tests.suites.probes.StateDump"]
    arguments += ["--trainer.callbacks.folder", str(root / "dump")]
    if probe:
        arguments += ["--trainer.callbacks+", "tests.suites.probes.SignalAt"]
        arguments += [f"--trainer.callbacks.{option}" for option in probe]
    return run(arguments, root / log, expect)


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


@pytest.fixture(scope="module", params=CASES)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("uninterrupted")
    train(request.param, root)
    return request.param, outcome(root)


@pytest.mark.parametrize("where", ["first phase", "between phases", "last phase"])
def test_sigkill(uninterrupted: Any, where: str, tmp_path: Path) -> None:
    member, expected = uninterrupted
    if where == "between phases":
        if member.boundary is None:
            pytest.skip(f"{member.name} does nothing between phases")
        probe = [f"method={member.boundary}", "call=2"]
    else:
        probe = [f"batch={member.batches[where == 'last phase']}"]
    train(member, tmp_path, "name=SIGKILL", *probe, expect=SIGKILL, log="killed.txt")
    train(member, tmp_path)
    assert_equal(outcome(tmp_path), expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_preemption_loses_nothing(uninterrupted: Any, name: str, tmp_path: Path) -> None:
    member, expected = uninterrupted
    batch = member.batches[0] - 1
    text = train(
        member, tmp_path, f"name={name}", f"batch={batch}", expect=PREEMPTED, log="preempted.txt"
    )
    assert name in text
    assert "--run.resume true" in text
    (checkpoint,) = tmp_path.glob("*/run/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == batch + 1
    train(member, tmp_path)
    assert_equal(outcome(tmp_path), expected)


def test_preemption_between_phases(uninterrupted: Any, tmp_path: Path) -> None:
    member, expected = uninterrupted
    if member.boundary is None:
        pytest.skip(f"{member.name} does nothing between phases")
    probe = ["name=SIGTERM", f"method={member.boundary}", "call=1"]
    train(member, tmp_path, *probe, expect=PREEMPTED, log="preempted.txt")
    train(member, tmp_path)
    assert_equal(outcome(tmp_path), expected)
