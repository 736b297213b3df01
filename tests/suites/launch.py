"""Runs ``train.py`` in a process of its own, which may be killed, without importing torch anew each time."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 180.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.suites.preload"])


def _child(
    arguments: list[str], log: str, environment: Mapping[str, str | None], folder: str
) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path.insert(0, str(ROOT))
    os.chdir(folder)
    # Lightning looks at the environment when it is imported, which has happened before.
    rank_zero_only.rank = int(environment.get("RANK") or environment.get("SLURM_PROCID") or 0)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        import train

        train.main(arguments)


def probe(kind: str, **options: object) -> list[str]:
    """Arguments that add a callback of :mod:`tests.suites.probes`."""
    arguments = ["--trainer.callbacks+", f"tests.suites.probes.{kind}"]
    for key, value in options.items():
        arguments += [f"--trainer.callbacks.{key}", str(value)]
    return arguments


def start(
    arguments: list[str],
    log: Path,
    environment: Mapping[str, str | None] | None = None,
    folder: Path = ROOT,
) -> BaseProcess:
    """Starts ``train.py`` with these arguments in ``folder``; what it prints goes to ``log``.

    A variable of the environment that is None is taken out.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _context.Process(
        target=_child, args=(arguments, str(log), environment or {}, str(folder))
    )
    process.start()
    return process


def run(
    arguments: list[str],
    log: Path,
    expect: int = 0,
    environment: Mapping[str, str | None] | None = None,
) -> str:
    """Runs ``train.py`` to its end and returns what it printed; fails unless it ends with the expected code."""
    process = start(arguments, log, environment)
    process.join(TIME_LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
    text = log.read_text()
    assert process.exitcode == expect, (
        f"exit code {process.exitcode} instead of {expect}:\n{text[-3000:]}"
    )
    return text
