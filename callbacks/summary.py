"""What several runs of one recipe say together."""

import statistics
from typing import Any


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
