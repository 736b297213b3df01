"""Several runs of one recipe: one after the other, or each as a task of a cluster's job array."""

import argparse
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from callbacks.checkpoint import EXIT_PREEMPTED, SIGNALS, Preempted
from callbacks.summary import REPEATED, format_summary, summarize, write_summary

RUN_SCRIPT = Path(__file__).parent.parent / "train.py"
LONGEST_NAME = 100
# What a finished run must share with the one that is asked for.
_COMPARED = ("seed_everything", "model", "data")

Rehearsal = Callable[[list[str], bool], dict[str, Any]]
"""Parses a command of ``train.py`` and returns its whole configuration; with True also builds what it names."""


@dataclass(frozen=True)
class Task:
    """One run of a sweep.

    Args:
        number: its place, from 0.
        name: of the run.
        values: what it sets, key to value as on the command line.
    """

    number: int
    name: str
    values: dict[str, str]

    @property
    def options(self) -> list[str]:
        """The values as arguments of ``train.py``."""
        return [text for key, value in self.values.items() for text in (f"--{key}", value)]


class Sweep:
    """The runs of a sweep, where they lie and how each is started.

    Args:
        tasks: its runs.
        recipe: arguments that all of them share.
        rehearse: see :data:`Rehearsal`.
    """

    def __init__(self, tasks: list[Task], recipe: list[str], rehearse: Rehearsal) -> None:
        self.tasks = tasks
        self.recipe = recipe
        self._rehearse = rehearse
        # Parsed only: tells an analysis, which cannot be trained, from the rest.
        config = rehearse(["fit", *recipe, *tasks[0].options], False)
        self.command = "fit" if _trains(config["model"]["class_path"]) else "test"
        self.folder = Path(config["run"]["root"]) / config["run"]["experiment"]
        self.tested: bool = config["run"]["test"]

    def arguments(self, task: Task) -> list[str]:
        """The command of a run; it begins it, or continues it where it was interrupted."""
        named = ["--run.name", task.name, "--run.resume", "true"]
        return [self.command, *self.recipe, *task.options, *named]

    def check(self, task: Task) -> None:
        """Parses the command of a run and builds its model, data and callbacks, which check their arguments.

        Raises:
            ArgumentError: for an unknown key or a value of another type.
            ValueError: what the classes raise.
        """
        self._rehearse(self.arguments(task), True)

    def directory(self, task: Task) -> Path:
        """Of a run."""
        return self.folder / (task.name if self.command == "fit" else f"test-{task.name}")

    def results(self, task: Task) -> dict[str, Any] | None:
        """What ``results.json`` of a finished run says, None for one that has not finished.

        Raises:
            ValueError: the run of that name has another configuration.
        """
        path = self.directory(task) / "results.json"
        if not path.exists():
            return None
        results = json.loads(path.read_text())
        if self.tested and not any(key.startswith("test/") for key in results["metrics"]):
            return None
        kept = path.with_name("config.yaml")
        if kept.exists():
            wanted = self._rehearse(self.arguments(task), False)
            found = yaml.safe_load(kept.read_text())
            different = [
                text for key in _COMPARED for text in _differences(found.get(key), wanted[key], key)
            ]
            if different:
                raise ValueError(
                    f"run {path.parent} has finished with another configuration ({'; '.join(different[:3])}); "
                    "choose another --name for this sweep"
                )
        return results


def sweep(arguments: list[str], rehearse: Rehearsal) -> list[str] | None:
    """``train.py sweep -c RECIPE --over KEY=V1,V2,... [--over ...] [--name NAME] [arguments of fit]``.

    Runs every combination of the values, but for runs that have finished before, and writes mean and standard
    deviation of every metric to NAME-summary files beside the runs. A value is written as on the command line; lists
    and text with commas as in YAML: --over 'data.normal=["0"],["1"]'. Nothing starts before all combinations have been
    checked.

    Args:
        arguments: the command line after ``sweep``.
        rehearse: see :data:`Rehearsal`.

    Returns:
        The command of the one run that ``--task`` asks for, None when there is nothing to run any more.

    Raises:
        ValueError: for a missing or malformed ``--over``, or runs that must not share a table.
        ArgumentError: for an unknown key or a bad value.
        RuntimeError: if runs failed; those that finished are kept and summarized.
        Preempted: on a scheduler's signal, when the run that it met has saved everything.
    """
    options, recipe = _parser().parse_known_args(arguments)
    runs = Sweep(combinations(options.over, options.name), recipe, rehearse)
    if options.list:
        for task in runs.tasks:
            state = "finished" if runs.results(task) is not None else "missing"
            print(f"{task.number}  {task.name}  {state}")
        print(f"tasks: {len(runs.tasks)} (--array=0-{len(runs.tasks) - 1})")
        return None
    if options.collect:
        collect(runs, options.name, options.by, options.metric)
        return None
    if (chosen := _chosen_task(options.task, len(runs.tasks))) is not None:
        task = runs.tasks[chosen]
        if runs.results(task) is None:
            return runs.arguments(task)
        rank_zero_info(f"sweep: task {chosen}, {task.name}, has finished before")
        return None
    failed = _run_all(runs)
    if len(failed) < len(runs.tasks):
        collect(runs, options.name, options.by, options.metric)
    if failed:
        names = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(runs.tasks)} runs failed: {names}; finished runs are kept: mend the cause and "
            "repeat the command"
        )
    return None


def _parser() -> argparse.ArgumentParser:
    about = (sweep.__doc__ or "").split("Args:")[0].replace("``", "")
    parser = argparse.ArgumentParser(
        prog="train.py sweep",
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--over", action="append", default=[], metavar="KEY=V1,V2,...", help="may be repeated"
    )
    parser.add_argument("--name", default="sweep", help="prefix of the names of the runs")
    parser.add_argument(
        "--by",
        action="append",
        metavar="KEY",
        help="a swept key whose values get a mean of their own; by default all but "
        f"{' and '.join(REPEATED)} where these are swept too",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a metric of the plot, e.g. auroc or 'test/margin/*'; may be repeated",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--task",
        type=int,
        metavar="K",
        help="the K-th combination alone, from 0; by default $SLURM_ARRAY_TASK_ID where that is set",
    )
    which.add_argument(
        "--list", action="store_true", help="print the combinations and their number, run nothing"
    )
    which.add_argument(
        "--collect",
        action="store_true",
        help="run nothing: summarize what has finished, name what is missing",
    )
    return parser


def combinations(over: list[str], prefix: str) -> list[Task]:
    """The runs that ``--over`` asks for, the last key varying fastest.

    Args:
        over: ``KEY=V1,V2,...`` each; a value may be a YAML list, mapping or quoted text.
        prefix: of the names.

    Raises:
        ValueError: for a key without values, values that are no YAML, a value or key given twice, or a prefix that
            is no file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", prefix):
        raise ValueError(
            f"--name {prefix!r} begins the names of directories: letters, digits and . _ + - only"
        )
    if not over:
        raise ValueError(
            "sweep needs at least one --over KEY=V1,V2,..., e.g. --over data.split=0,1,2,3,4"
        )
    axes: dict[str, list[str]] = {}
    for axis in over:
        key, _, choices = axis.partition("=")
        if not key or not choices:
            raise ValueError(f"--over {axis!r} must look like data.split=0,1,2")
        if key in axes:
            raise ValueError(f"--over {key} is given twice; write all of its values into one")
        axes[key] = _values(axis, choices)
    chosen = [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]
    names = [_suffix(values) for values in chosen]
    ambiguous = {name for name, count in Counter(names).items() if count > 1}
    for i, (name, values) in enumerate(zip(names, chosen, strict=True)):
        if name in ambiguous or len(name) > LONGEST_NAME:
            checksum = zlib.crc32(json.dumps(values).encode())
            names[i] = f"{name[:LONGEST_NAME]}-{checksum:08x}"
    return [
        Task(number, f"{prefix}-{name}", values)
        for number, (name, values) in enumerate(zip(names, chosen, strict=True))
    ]


def _values(axis: str, choices: str) -> list[str]:
    """The single values as they are written, quotes around a whole value taken off."""
    try:
        list_of_all = yaml.compose(f"[{choices}]")
    except yaml.YAMLError as error:
        raise ValueError(
            f"--over {axis!r}: the values must be separated by commas, lists written as in YAML ({_first_line(error)})"
        ) from error
    assert list_of_all is not None
    values = [
        node.value
        if isinstance(node, yaml.ScalarNode)
        else f"[{choices}]"[node.start_mark.index : node.end_mark.index]
        for node in list_of_all.value
    ]
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice or "" in values:
        what = f"{twice[0]!r} is given twice" if twice else "a value is empty"
        raise ValueError(f"--over {axis!r}: {what}")
    return values


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _suffix(values: dict[str, str]) -> str:
    """``data.split`` 3, ``data.labelled`` 5% -> ``split3-labelled5pct``."""
    parts = []
    for key, value in values.items():
        words = re.findall(r"[A-Za-z0-9._+-]+", value.replace("%", "pct"))
        parts.append(f"{re.sub(r'[^A-Za-z0-9_]', '_', key.split('.')[-1])}{'_'.join(words)}")
    return "-".join(parts)


def _chosen_task(asked: int | None, count: int) -> int | None:
    source = "--task"
    if asked is None:
        given = os.environ.get("SLURM_ARRAY_TASK_ID")
        if not given:
            return None
        source, asked = "SLURM_ARRAY_TASK_ID", int(given)
    if not 0 <= asked < count:
        raise ValueError(
            f"{source} {asked}: the sweep has {count} combinations, 0 to {count - 1} (sbatch --array=0-{count - 1})"
        )
    return asked


def _run_all(runs: Sweep) -> dict[str, int]:
    """Checks all runs, then starts one after the other; the exit codes of those that failed."""
    waiting = [task for task in runs.tasks if runs.results(task) is None]
    for task in waiting:
        runs.check(task)
    failed = {}
    for task in waiting:
        rank_zero_info(f"sweep: {task.name} ({task.number + 1} of {len(runs.tasks)})")
        code, signalled = start_run(runs.arguments(task))
        if signalled or code == EXIT_PREEMPTED:
            raise Preempted(
                f"sweep stopped on a signal in {task.name}; repeat the command to go on from there"
            )
        if code:
            rank_zero_info(f"sweep: {task.name} ended with exit code {code}")
            failed[task.name] = code
    return failed


def start_run(arguments: list[str]) -> tuple[int, bool]:
    """Runs ``train.py`` in a process of its own and passes a scheduler's signals on to it.

    Returns:
        Its exit code, and whether there was a signal.
    """
    signalled = False
    with subprocess.Popen([sys.executable, str(RUN_SCRIPT), *arguments]) as process:

        def forward(number: int, frame: Any) -> None:
            nonlocal signalled
            signalled = True
            process.send_signal(number)

        handlers = {number: signal.signal(number, forward) for number in SIGNALS}
        try:
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, signalled


def collect(
    runs: Sweep, name: str, by: list[str] | None = None, metrics: Sequence[str] = ()
) -> None:
    """Summarizes the runs that have finished and names the others.

    Args:
        runs: of the sweep.
        name: prefix of the files that are written.
        by: see :func:`callbacks.summary.summarize`.
        metrics: of the plot.

    Raises:
        RuntimeError: if none has finished.
        ValueError: for runs that must not share a table, or a metric that none has.
    """
    found = [(task, runs.results(task)) for task in runs.tasks]
    finished = [(task, results) for task, results in found if results is not None]
    missing = [f"{task.number} ({task.name})" for task, results in found if results is None]
    if not finished:
        raise RuntimeError(
            f"none of the {len(found)} runs has finished in {runs.folder}; run the sweep without --collect"
        )
    summary = summarize(
        [results for _, results in finished], [task.values for task, _ in finished], by
    )
    paths = write_summary(summary, runs.folder / name, metrics)
    print(format_summary(summary))
    for path in paths:
        print(f"wrote {path}")
    if missing:
        print(f"missing: {len(missing)} of {len(found)} runs: {', '.join(missing)}")


def _trains(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    return model.training_step is not LightningModule.training_step


def _differences(found: Any, wanted: Any, key: str) -> list[str]:
    """Where two configurations differ; an option that came later than the run is no difference."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        both = [name for name in found if name in wanted]
        return [
            text
            for name in both
            for text in _differences(found[name], wanted[name], f"{key}.{name}")
        ]
    return [] if found == wanted else [f"{key}: {found!r} there, {wanted!r} asked for"]
