"""A pretended SLURM: runs a batch script as sbatch would, with ``srun`` and ``scontrol`` of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Listener, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.processes import ROOT, TIME_LIMIT
from tests.suites.launch import start
from tests.suites.members import Member

# What lies on PATH only carries the command here, so that torch is not imported anew for every task.
CARRIER = """#!{python} -SE
import sys
from multiprocessing.connection import Client
with Client({address!r}, "AF_UNIX") as scheduler:
    scheduler.send(sys.argv)
    sys.exit(scheduler.recv())
"""


TWO_NODES: dict[str, object] = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.num_nodes": 2,
    "trainer.strategy": "ddp_find_unused_parameters_true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def task_environment(rank: int, nodes: int, per_node: int, port: int, job: int) -> dict[str, str]:
    """What srun sets for one of its tasks; the machines are all this one."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NAME": "adversaria",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node),
        "MASTER_ADDR": "127.0.0.1",  # a cluster's own resolution of node names is not pretended
        "MASTER_PORT": str(port),
    }


def two_nodes(
    member: Member,
    folder: Path,
    *arguments: str,
    second: tuple[str, ...] = (),
    overrides: dict[str, object] = TWO_NODES,
    elsewhere: Path = ROOT,
    limit: float = TIME_LIMIT,
) -> tuple[list[int | None], list[str], float]:
    """Two tasks of a pretended srun on two nodes.

    Args:
        member: what they train.
        folder: for the run and the logs.
        arguments: of both tasks.
        second: further ones of rank 1.
        overrides: of the recipe.
        elsewhere: where rank 1 runs.
        limit: seconds.

    Returns:
        Exit codes, None for one that had to be killed; what was printed; the seconds from one's end to the other's.
    """
    port, tasks = free_port(), []
    recipe = member.arguments(overrides)
    recipe[1] = str(ROOT / recipe[1])
    for rank in (0, 1):
        command = ["fit", *recipe, "--run.root", str(folder), "--run.name", "run", *arguments]
        command += second if rank else ()
        variables = task_environment(rank, 2, 1, port, 4711)
        log = folder / f"rank-{rank}.txt"
        tasks.append(start(command, log, variables, elsewhere if rank else ROOT))
    wait([task.sentinel for task in tasks], limit)
    first = time.monotonic()
    for task in tasks:
        task.join(limit)
    codes = [task.exitcode for task in tasks]
    took = time.monotonic() - first
    for task in tasks:
        task.kill()
        task.join()
    return codes, [(folder / f"rank-{rank}.txt").read_text() for rank in (0, 1)], took


@dataclass
class Scheduler:
    """One machine that pretends to be several nodes.

    Args:
        folder: for logs and the pretended commands.
        nodes: nodes of a job.
        per_node: tasks on each.
        array: (job id of the array, number of the task) for a task of a job array.
        moment: a file; when it is made, the scheduler sends every task the signal that the script asks for with
            ``--signal``, and takes the file away.
    """

    folder: Path
    nodes: int = 2
    per_node: int = 1
    array: tuple[int, int] | None = None
    moment: Path | None = None
    codes: list[int] = field(default_factory=list)
    requeued: list[str] = field(default_factory=list)

    def sbatch(self, script: Path, *arguments: str, job: int = 4711) -> int:
        """Runs the job, again as often as it is requeued, and returns the exit code of its last start."""
        found = re.search(r"^#SBATCH --signal=(SIG\w+)@\d+$", script.read_text(), re.M)
        assert found is not None, "the script asks for no signal"
        self.signal = signal.Signals[found.group(1)]
        commands = self.folder / "bin"
        commands.mkdir(parents=True, exist_ok=True)
        address = str(self.folder / "slurm")
        for name in ("srun", "scontrol"):
            path = commands / name
            path.write_text(CARRIER.format(python=sys.executable, address=address))
            path.chmod(0o755)
        environment = {
            **os.environ,
            **self._environment(0, job),
            "PATH": f"{commands}:{os.environ['PATH']}",
        }
        del environment["SLURM_STEP_ID"]
        if not (ROOT / ".venv").exists():
            environment["PYTHON"] = sys.executable
        with Listener(address, "AF_UNIX") as listener:
            while True:
                batch = subprocess.Popen(
                    ["bash", str(script), *arguments], cwd=ROOT, env=environment
                )
                requeues = len(self.requeued)
                self._serve(listener, batch, job)
                self.codes.append(batch.returncode)
                if len(self.requeued) == requeues:
                    return batch.returncode

    def _environment(self, rank: int, job: int) -> dict[str, str]:
        found = task_environment(rank, self.nodes, self.per_node, free_port(), job)
        if self.array is not None:
            found["SLURM_ARRAY_JOB_ID"], found["SLURM_ARRAY_TASK_ID"] = map(str, self.array)
        return found

    def _serve(self, listener: Listener, batch: subprocess.Popen[bytes], job: int) -> None:
        """Answers what the batch script calls, until it ends."""
        server = listener._listener._socket  # type: ignore[attr-defined]
        server.settimeout(0.1)
        while batch.poll() is None:
            try:
                connection = listener.accept()
            except TimeoutError:
                continue
            with connection:
                name, *arguments = connection.recv()
                if Path(name).name == "scontrol":
                    assert arguments[0] == "requeue"
                    self.requeued.append(arguments[1])
                    connection.send(0)
                else:
                    connection.send(self._srun(arguments, job))

    def _srun(self, arguments: list[str], job: int) -> int:
        """Starts the tasks of a step and returns the largest of their exit codes, as srun does."""
        command = arguments[next(i for i, a in enumerate(arguments) if not a.startswith("--")) :]
        assert command[1] == "train.py"
        port = free_port()
        tasks = []
        for rank in range(self.nodes * self.per_node):
            environment = {**self._environment(rank, job), "MASTER_PORT": str(port)}
            log = self.folder / f"job-{len(self.codes)}-rank-{rank}.txt"
            tasks.append(start(command[2:], log, environment))
        return self._wait(tasks)

    def _wait(self, tasks: list[BaseProcess]) -> int:
        limit = time.monotonic() + TIME_LIMIT
        while any(task.is_alive() for task in tasks) and time.monotonic() < limit:
            if self.moment is not None and self.moment.exists():
                for task in tasks:
                    assert task.pid is not None
                    os.kill(task.pid, self.signal)
                self.moment.unlink()
            time.sleep(0.02)
        for task in tasks:
            if task.is_alive():
                task.kill()
            task.join()
        # The shell's way to write an end by a signal.
        return max(
            code if code >= 0 else 128 - code for code in (task.exitcode or 0 for task in tasks)
        )
