"""Several runs of one recipe, one after the other, and the table of their means."""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.files import demand_file_name, file_name, whole_file

RUN_SCRIPT = Path(__file__).parent.parent / "train.py"


def sweep(arguments: list[str]) -> None:
    """``train.py sweep -c RECIPE --over KEY=V1,V2,... [--over ...] [--name NAME] [fit arguments]``.

    Runs ``fit`` for every combination (a run that has finished before is not repeated), then writes ``summary.json``
    beside the runs and prints mean and standard deviation of every metric.

    Raises:
        ValueError: for a missing or malformed ``--over``, or runs that must not share a table.
        RuntimeError: if a run failed.
    """
    parser = argparse.ArgumentParser(
        prog="train.py sweep", description=(sweep.__doc__ or "").split("Raises")[0]
    )
    parser.add_argument("--over", action="append", default=[], metavar="KEY=V1,V2,...")
    parser.add_argument("--name", default="sweep", help="prefix of the run names")
    known, rest = parser.parse_known_args(arguments)
    demand_file_name(known.name, "--name")
    axes = []
    for axis in known.over:
        key, _, choices = axis.partition("=")
        if not key or not choices:
            raise ValueError(f"--over {axis!r} must look like data.split=0,1,2")
        axes.append([(key, choice) for choice in choices.split(",")])
    if not axes:
        raise ValueError(
            "sweep needs at least one --over KEY=V1,V2,..., e.g. --over data.split=0,1,2,3,4"
        )
    root, experiment = _run_folder(rest)
    finished = []
    for combination in itertools.product(*axes):
        suffix = "-".join(f"{key.split('.')[-1]}{value}" for key, value in combination)
        name = file_name(f"{known.name}-{suffix}")
        results = root / experiment / name / "results.json"
        if not (results.exists() and _is_complete(results)):
            options = [text for key, value in combination for text in (f"--{key}", value)]
            options += ["--run.name", name, "--run.resume", "true"]
            rank_zero_info(f"sweep: {name}")
            code = subprocess.run(
                [sys.executable, str(RUN_SCRIPT), "fit", *rest, *options]
            ).returncode
            if code:
                raise RuntimeError(
                    f"run {name} ended with exit code {code}; mend it and repeat the sweep, finished runs are kept"
                )
        finished.append(json.loads(results.read_text()))
    summary = summarize(finished)
    path = root / experiment / f"{known.name}-summary.json"
    with whole_file(path) as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    print(format_summary(summary))
    print(f"wrote {path}")


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over runs of one recipe.

    Args:
        results: contents of ``results.json`` files.

    Returns:
        ``metrics`` (key to mean, std, n), the seeds and the data of the runs, and, where splits repeat the
        same known classes, ``metrics_without_duplicates``.

    Raises:
        ValueError: if the runs differ in experiment, data set or protocol.
    """
    for what in ("dataset", "protocol"):
        different = {str(r["data"].get(what)) for r in results}
        if len(different) > 1:
            raise ValueError(
                f"runs of different {what}s ({', '.join(sorted(different))}) never share a table; sweep them apart"
            )
    unique = list({(str(r["data"].get("known")), r["seed"]): r for r in results}.values())
    summary: dict[str, Any] = {
        "experiment": results[0]["experiment"],
        "runs": len(results),
        "data": [r["data"] for r in results],
        "seeds": [r["seed"] for r in results],
        "metrics": _aggregate(results),
    }
    if len(unique) < len(results):
        summary["metrics_without_duplicates"] = _aggregate(unique)
    return summary


def _aggregate(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    keys = set.intersection(*(set(r["metrics"]) for r in results))
    values = {key: [r["metrics"][key] for r in results] for key in sorted(keys)}
    return {
        key: {
            "mean": statistics.fmean(v),
            "std": statistics.stdev(v) if len(v) > 1 else 0.0,
            "n": len(v),
        }
        for key, v in values.items()
    }


def format_summary(summary: dict[str, Any]) -> str:
    """The ``test/ROW/METRIC`` means as a text table, one line per row, x100."""
    cells: dict[str, dict[str, str]] = {}
    for key, value in summary["metrics"].items():
        stage, *middle, metric = key.split("/")
        if stage == "test" and middle:
            text = f"{100 * value['mean']:.1f}±{100 * value['std']:.1f}"
            cells.setdefault("/".join(middle), {})[metric] = text
    columns = list(dict.fromkeys(metric for row in cells.values() for metric in row))
    lines = [["row", *columns]]
    lines += [[row, *(found.get(column, "") for column in columns)] for row, found in cells.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    body = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    title = f"{summary['experiment']}: mean±std over {summary['runs']} runs, x100"
    return "\n".join([title, *body])


def _run_folder(arguments: list[str]) -> tuple[Path, str]:
    """``run.root`` and ``run.experiment`` as ``fit`` will see them."""
    printed = subprocess.run(
        [sys.executable, str(RUN_SCRIPT), "fit", *arguments, "--print_config"],
        capture_output=True,
        text=True,
    )
    if printed.returncode:
        raise ValueError(printed.stderr.strip())
    run = yaml.safe_load(printed.stdout)["run"]
    return Path(run["root"]), run["experiment"]


def _is_complete(results: Path) -> bool:
    return any(key.startswith("test/") for key in json.loads(results.read_text())["metrics"])
