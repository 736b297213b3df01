"""Several processes as a scheduler starts them: what they check, how they miss one that dies, how jobs are requeued."""

import json
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import ROOT, TIME_LIMIT
from tests.suites.launch import probe, run
from tests.suites.members import MEMBERS
from tests.suites.scheduler import TWO_NODES, Scheduler, free_port, two_nodes
from tests.suites.test_resume import assert_equal

MEMBER = next(member for member in MEMBERS if member.name == "supervised")
HERE = socket.gethostname()
two_tasks = partial(two_nodes, MEMBER)


def errors(texts: list[str]) -> list[list[str]]:
    """What each process gives as its error; a progress bar may stand before it."""
    return [re.findall(r"error: .*$", text, re.M) for text in texts]


# ---------------------------------------------------------------------- the check at the start
def test_processes_that_differ_are_refused_in_one_message(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    codes, texts, _ = two_tasks(
        tmp_path,
        second=("--seed_everything", "5", "--run.root", str(elsewhere)),
        elsewhere=elsewhere,
    )
    assert codes == [1, 1]
    said, unsaid = errors(texts)
    assert unsaid == []
    (message,) = said
    assert f"the seed of rank 1 on {HERE} differs from rank 0's (0 and 5)" in message
    assert "give --seed_everything NUMBER" in message
    assert f"the configuration of rank 1 on {HERE} differs from rank 0's (run.root" in message
    assert f"rank 1 on {HERE} does not see the run directory {tmp_path}" in message
    assert "give --run.root DIR" in message
    assert "Epoch 0" not in texts[0]


def test_data_that_one_node_lacks(tmp_path: Path) -> None:
    """The files are looked for where a process runs; rank 1 runs elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    module = ("--data", "tests.suites.probes.DataOnDisk", "--data.root", "docs")
    codes, texts, _ = two_tasks(tmp_path, *module, elsewhere=elsewhere)
    assert codes == [1, 1]
    assert "2 processes on 2 nodes, gloo: same code" in texts[0]
    said, unsaid = errors(texts)
    assert unsaid == []
    (message,) = said
    assert message.startswith(f"error: rank 1 on {HERE} stopped: no digits at data.root=docs")
    assert "Epoch 0" not in texts[0]


# ---------------------------------------------------------------------- a rank that ends
def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    """Fifth batch: the first epoch's checkpoint is there."""
    lost = probe("SignalAt", name="SIGKILL", batch=5, rank=1)
    codes, texts, took = two_tasks(tmp_path, *lost)
    assert codes == [69, -signal.SIGKILL]
    assert took < 20
    ((message,), _) = errors(texts)
    assert message.startswith(f"error: rank 1 on {HERE} died without a word")
    (checkpoint,) = tmp_path.glob("*/run/checkpoints/last.ckpt")
    assert message.endswith(f"continue from {checkpoint} with --run.resume true")


@pytest.mark.slow
def test_a_bug_of_one_rank(tmp_path: Path) -> None:
    codes, texts, took = two_tasks(tmp_path, *probe("FailAt", batch=1, how="raise"))
    assert codes == [1, 1]
    assert took < 20
    ((message,), unsaid) = errors(texts)
    assert message.startswith(f"error: rank 1 on {HERE} stopped: KeyError: 'a bug of one rank'")
    assert message.endswith("no checkpoint was written yet")
    assert unsaid == []
    assert "KeyError" in texts[1]


@pytest.mark.slow
def test_a_rank_that_hangs(tmp_path: Path) -> None:
    strategy = ROOT / "configs" / "trainer" / "ddp.yaml"
    overlay = ["-c", str(strategy), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    overlay += ["--trainer.num_nodes", "2", "--trainer.strategy.timeout", "00:00:05"]
    hang = probe("FailAt", batch=1, how="hang")
    codes, texts, took = two_tasks(tmp_path, *overlay, *hang)
    assert codes == [69, 69]
    assert took < 60
    ((message,), _) = errors(texts)
    assert f"while all processes were alive; rank 1 on {HERE} did not take part" in message


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_of_other_launchers(launcher: str, victim: int, tmp_path: Path) -> None:
    arguments = MEMBER.arguments({**TWO_NODES, "trainer.devices": 2, "trainer.num_nodes": 1})
    arguments += ["--run.root", str(tmp_path), "--run.name", "run"]
    arguments += probe("SignalAt", name="SIGKILL", batch=5, rank=victim)
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", str(free_port())]
    command += ["train.py", "fit", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
    expected = {"torchrun": 1, "lightning": 69 if victim else -signal.SIGKILL}
    assert done.returncode == expected[launcher], done.stderr[-3000:]
    (said,) = errors([done.stderr])
    if launcher == "torchrun" and victim == 0:
        # It ends the other process, often before that one has noticed, and says itself which was the first.
        cause = done.stderr[done.stderr.index("Root Cause") :]
        assert re.search(r"rank +: 0 ", cause), done.stderr[-3000:]
        assert "Signal 9 (SIGKILL)" in cause
        return
    assert len(said) == 1, done.stderr[-3000:]
    assert f"rank {victim} on {HERE} died without a word" in said[0]


# ---------------------------------------------------------------------- requeue
SCRIPT = ROOT / "configs" / "trainer" / "slurm.sbatch"
ARRAY_SCRIPT = ROOT / "configs" / "trainer" / "slurm_array.sbatch"


def job_arguments(folder: Path) -> list[str]:
    """The recipe and what the machine here needs otherwise than the overlay says."""
    return [*MEMBER.arguments({"trainer.accelerator": "cpu"}), "--run.root", str(folder)]


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    (directory,) = folder.glob("*/job-*")
    ranks = [torch.load(folder / "dump" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return {
        "ranks": [{key: rank[key] for key in ("state", "optimizers")} for rank in ranks],
        "results": json.loads((directory / "results.json").read_text())["metrics"],
    }


@pytest.mark.parametrize(
    ("also_in_the_test", "codes"),
    [(False, [75, 0]), pytest.param(True, [75, 75, 0], marks=pytest.mark.slow)],
    ids=["training", "training and test"],
)
def test_a_job_is_requeued_until_it_has_finished(
    also_in_the_test: bool, codes: list[int], tmp_path: Path
) -> None:
    """A preempted job ends as the one that was not, to the last bit."""
    results = []
    for name, expected in {"whole": [0], "preempted": codes}.items():
        folder = tmp_path / name
        pause = folder / "pause"
        scheduler = Scheduler(folder, moment=pause)
        arguments = [*job_arguments(folder), *probe("StateDump", folder=folder / "dump")]
        if name == "preempted":
            arguments += probe("PauseAt", file=pause, batch=4, test=also_in_the_test)
        scheduler.sbatch(SCRIPT, *arguments)
        text = sorted(folder.glob("job-*-rank-0.txt"))[-1].read_text()
        assert scheduler.codes == expected, text[-3000:]
        assert scheduler.requeued == ["4711"] * (len(expected) - 1)
        assert "2 processes on 2 nodes, gloo" in text
        results.append(outcome(folder))
    assert_equal(*results)


@pytest.mark.slow
def test_a_failed_job_is_not_requeued(tmp_path: Path) -> None:
    scheduler = Scheduler(tmp_path)
    arguments = [*job_arguments(tmp_path), *probe("SignalAt", name="SIGKILL", batch=5, rank=1)]
    assert scheduler.sbatch(SCRIPT, *arguments) == 128 + signal.SIGKILL
    assert scheduler.requeued == []


@pytest.mark.slow
def test_the_tasks_of_an_array_are_one_sweep(tmp_path: Path) -> None:
    """Task 1 is preempted and requeued; the table has both."""
    over = ["--over", "seed_everything=3,4"]
    recipe = job_arguments(tmp_path / "runs")
    for task in (0, 1):
        pause = tmp_path / f"pause-{task}"
        folder = tmp_path / f"task-{task}"
        scheduler = Scheduler(folder, 1, 1, array=(815, task), moment=pause)
        stop = probe("PauseAt", file=pause, batch=4) if task else []
        code = scheduler.sbatch(ARRAY_SCRIPT, *recipe, *stop, *over, job=820 + task)
        text = sorted(folder.glob("job-*-rank-0.txt"))[-1].read_text()
        assert code == 0, text[-3000:]
        assert scheduler.requeued == ["815_1"] * task
    log = tmp_path / "collect.txt"
    run(["sweep", *recipe, *over, "--name", "array-815", "--collect"], log)
    (path,) = (tmp_path / "runs").glob("*/array-815-summary.json")
    assert json.loads(path.read_text())["runs"] == 2
