from pathlib import Path
from typing import Any

import pytest

import callbacks.environment
from callbacks.environment import (
    ClusterError,
    _differences,
    _sees,
    refuse_wrong_process_count,
)
from tests.callbacks.boring import boring_trainer
from tests.suites.scheduler import task_environment


def facts(**others: dict[int, Any]) -> list[dict[str, Any]]:
    """Four processes on two machines that agree, but for what is given by name and rank."""
    same = {
        "code": "1a2b",
        "packages": {"torch": "2.12", "lightning": "2.6.6"},
        "configuration": "x",
        "text": "model: {lr: 0.1, width: 4}",
        "seed": 0,
    }
    return [
        {
            **same,
            "host": "ab"[rank // 2],
            **{key: of[rank] for key, of in others.items() if rank in of},
        }
        for rank in range(4)
    ]


def test_equal_processes_differ_in_nothing() -> None:
    assert _differences(facts()) == []


def test_packages_are_named_with_both_versions() -> None:
    older = {"torch": "2.11", "lightning": "2.6.6"}
    (problem,) = _differences(facts(packages={2: older, 3: older}))
    assert problem.startswith(
        "the packages of ranks 2, 3 on b differs from rank 0's (torch 2.12 and 2.11): install"
    )


def test_configurations_are_named_key_by_key() -> None:
    (problem,) = _differences(
        facts(configuration={1: "y"}, text={1: "model: {lr: 0.2, width: 4}\nextra: 1"})
    )
    assert "rank 1 on a" in problem
    assert "model.lr 0.1 and 0.2, extra None and 1" in problem
    assert "width" not in problem


def test_another_seed_is_said_once_although_it_is_part_of_the_configuration() -> None:
    text = {rank: f"seed_everything: {7 * (rank == 3)}" for rank in range(4)}
    (problem,) = _differences(facts(seed={3: 7}, configuration={3: "y"}, text=text))
    assert "the seed of rank 3 on b differs from rank 0's (0 and 7)" in problem


def test_code_is_compared_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks.environment, "ROOT", tmp_path)
    for package in ("callbacks", "datamodules", "lightning_modules"):
        (tmp_path / package).mkdir()
    (tmp_path / "train.py").write_text("a = 1\n")
    before = callbacks.environment._fingerprint()
    assert before == callbacks.environment._fingerprint()
    (tmp_path / "train.py").write_text("a = 2\n")
    assert before != callbacks.environment._fingerprint()


def test_a_file_that_appears_late_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks.environment.time, "sleep", lambda _: (tmp_path / "token").touch())
    assert _sees(tmp_path, "token")
    monkeypatch.setattr(callbacks.environment, "SHARED_WITHIN", 0.0)
    assert not _sees(tmp_path / "missing", "token")


@pytest.mark.parametrize(
    ("devices", "variables", "message"),
    [
        (
            1,
            {},
            "srun started 4 processes, but --trainer.devices 1 x --trainer.num_nodes 2 makes 2; they are "
            "--ntasks-per-node and --nodes of the job: give --trainer.devices 2 --trainer.num_nodes 2, or start 2",
        ),
        (
            4,
            {},
            "srun started 4 processes, but --trainer.devices 4 x --trainer.num_nodes 2 makes 8",
        ),
        (2, {"SLURM_STEP_ID": ""}, "the job has 4 tasks, but this process was not started by srun"),
        (
            2,
            {"SLURM_JOB_NAME": "bash", "SLURM_PROCID": "3"},
            "this is process 3 of its launcher, but it takes itself for the first",
        ),
        (2, {}, None),
    ],
    ids=["fewer meant", "more meant", "no srun", "every task the first", "right"],
)
def test_the_number_of_processes_under_slurm(
    devices: int,
    variables: dict[str, str],
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in {**task_environment(0, 2, 2, 12345, 4711), **variables}.items():
        monkeypatch.setenv(key, value)
    trainer = boring_trainer(tmp_path, devices=devices, num_nodes=2, strategy="ddp")
    if message is None:
        refuse_wrong_process_count(trainer)
        return
    with pytest.raises((ClusterError, ValueError)) as caught:
        refuse_wrong_process_count(trainer)
    assert message in str(caught.value)


def test_the_number_of_processes_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}
    for key, value in {**found, "LOCAL_RANK": "0", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    trainer = boring_trainer(tmp_path, devices=2, strategy="ddp")
    with pytest.raises(ClusterError, match=r"torchrun started 1 process, but --trainer\.devices 2"):
        refuse_wrong_process_count(trainer)


def test_one_process_alone_has_nothing_to_compare(tmp_path: Path) -> None:
    trainer = boring_trainer(tmp_path)
    refuse_wrong_process_count(trainer)
    connect = trainer.strategy.setup_environment
    callbacks.environment.ClusterGuard().attach(trainer)
    assert trainer.strategy.setup_environment == connect
