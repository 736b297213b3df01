"""Runs ``train.py`` in a process of its own, which may be killed, without importing torch anew each time."""

import os
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tests.processes import ROOT, begin, finish


def train_here(arguments: list[str]) -> None:
    """Runs ``train.py`` in this process, which must be a fresh one."""
    # Lightning looks at the environment when it is imported, which has happened before.
    rank_zero_only.rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
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
    return begin(train_here, arguments, log=log, environment=environment, folder=folder)


def run(
    arguments: list[str],
    log: Path,
    expect: int = 0,
    environment: Mapping[str, str | None] | None = None,
) -> str:
    """Runs ``train.py`` to its end and returns what it printed; fails unless it ends with the expected code."""
    return finish(start(arguments, log, environment), log, expect)
