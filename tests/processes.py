"""Processes of their own, forked from a server that has imported what all of them need."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 180.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def _child(
    log: str,
    environment: Mapping[str, str | None],
    folder: str,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path.insert(0, str(ROOT))
    os.chdir(folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        function(*arguments)


def begin(
    function: Callable[..., None],
    *arguments: Any,
    log: Path,
    environment: Mapping[str, str | None] | None = None,
    folder: Path = ROOT,
) -> BaseProcess:
    """Starts ``function(*arguments)`` in ``folder``; what it prints goes to ``log``.

    A variable of the environment that is None is taken out.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _context.Process(
        target=_child, args=(str(log), environment or {}, str(folder), function, arguments)
    )
    process.start()
    return process


def finish(process: BaseProcess, log: Path, expect: int = 0) -> str:
    """Waits for the end of a process and returns what it printed; fails unless it ends with the expected code."""
    process.join(TIME_LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
    text = log.read_text()
    assert process.exitcode == expect, (
        f"exit code {process.exitcode} instead of {expect}:\n{text[-3000:]}"
    )
    return text


def _script(code: str, arguments: tuple[str, ...]) -> None:
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def run_fresh(code: str, *arguments: str, **environment: str) -> str:
    """Runs ``code``, which may fork, at the root of the repository; returns what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = begin(_script, code, arguments, log=log, environment=environment)
        return finish(process, log)


def _rank(rank: int, function: Callable[[Path], None], folder: Path, number: int) -> None:
    store = f"file://{folder}/store-{number}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=number)
    function(folder)
    dist.destroy_process_group()


def run_ranks(function: Callable[[Path], None], folder: Path, number: int = 2) -> None:
    """Runs ``function(folder)`` in so many processes of one gloo group."""
    start_processes(_rank, (function, folder, number), number, start_method="forkserver")


def rank_file(folder: Path) -> Path:
    """For the results of this process."""
    return folder / f"{dist.get_world_size()}-{dist.get_rank()}.pt"


def from_ranks(folder: Path, number: int = 2) -> list[Any]:
    """What the processes have put into their files."""
    files = [folder / f"{number}-{rank}.pt" for rank in range(number)]
    return [torch.load(file, weights_only=True) for file in files]
