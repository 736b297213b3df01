"""What several runs of one recipe say together: a table, files and a plot."""

import csv
import fnmatch
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

REPEATED = ("seed_everything", "data.split")
"""Keys whose values repeat a measurement; the others change what is measured."""

# Metrics that are shares in [0, 1], and those that are percentages already. The rest is shown as it is.
_SHARES = re.compile(
    r"auroc|aupr_\w+|fpr95|openauc|macro_f1|auc|eer|f1_\w+|false_alarm_rate|detection_rate|(\w+_)?accuracy|W\d+A\d+"
    r"|map|ap_\w+|miou|certified|beam_suboptimal|(\w+_)?edit_success"
)
_PERCENTAGES = re.compile(
    r"(max_)?box_acc(_v2)?(@\d+)?|pxap|gt_known_error|top\d_(cls|loc)_error|object_miou|taken_for_target"
    r"|target(_\w+)?|kept|gan_test|gan_train"
)
PANELS = 4
SERIES = 8


def scale_of(key: str) -> tuple[float, str]:
    """By what the metric of a key ``stage/score/metric`` is multiplied to be shown, and its unit: ``%`` or nothing."""
    metric = key.rpartition("/")[2]
    if _SHARES.fullmatch(metric):
        return 100.0, "%"
    return 1.0, "%" if _PERCENTAGES.fullmatch(metric) else ""


def formatted(key: str, mean: float, std: float | None = None, decimals: int | None = None) -> str:
    """``96.0 ± 2.2`` for a percentage, ``0.2341 ± 0.0061`` for another number; no ± where there is no spread."""
    scale, unit = scale_of(key)
    if decimals is None and unit:
        decimals = 1
    if decimals is None and std is None:
        return f"{mean:.4g}"
    if decimals is None:
        assert std is not None
        decimals = min(max(0, 1 - math.floor(math.log10(std))), 6) if std > 0 else 4
    text = f"{scale * mean:.{decimals}f}"
    return text if std is None else f"{text} ± {scale * std:.{decimals}f}"


def summarize(
    results: Sequence[dict[str, Any]],
    values: Sequence[dict[str, str]] | None = None,
    by: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Mean and standard deviation over runs of one recipe.

    Args:
        results: contents of ``results.json`` files.
        values: what each run set, key to value; nothing by default.
        by: keys whose values get a mean of their own. By default those that do not merely repeat (:data:`REPEATED`),
            where there is a key that repeats.

    Returns:
        ``metrics`` (key to mean, std, n and the ``values`` of the runs), the seeds, data and values of the runs, with
        ``by`` also ``groups`` of such metrics, and, where splits repeat the same known classes,
        ``metrics_without_duplicates``. Metrics over groups of different data are left out.

    Raises:
        ValueError: for runs that must not share a table, or an unknown key in ``by``.
    """
    values = values if values is not None else [{} for _ in results]
    swept = list(values[0])
    if by is None:
        others = [key for key in swept if key not in REPEATED]
        by = others if len(others) < len(swept) else []
    for key in by:
        if key not in swept:
            raise ValueError(f"--by {key} is not swept; swept are {', '.join(swept)}")
    summary: dict[str, Any] = {
        "experiment": results[0]["experiment"],
        "runs": len(results),
        "by": list(by),
        "values": list(values),
        "data": [r["data"] for r in results],
        "seeds": [r["seed"] for r in results],
        "metrics": {},
    }
    if by:
        chosen = [tuple(v[key] for key in by) for v in values]
        members = {
            group: [r for r, of in zip(results, chosen, strict=True) if of == group]
            for group in dict.fromkeys(chosen)
        }
        for group in members.values():
            _demand_one_protocol(group)
        summary["groups"] = [
            {"values": dict(zip(by, group, strict=True)), "runs": len(r), "metrics": _aggregate(r)}
            for group, r in members.items()
        ]
    if by and _different(results):
        return summary
    _demand_one_protocol(results)
    summary["metrics"] = _aggregate(results)
    if all(r["data"].get("known") is not None for r in results):
        unique = {}
        for r, v in zip(results, values, strict=True):
            rest = {key: value for key, value in v.items() if key != "data.split"}
            unique[(str(r["data"]["known"]), r["seed"], str(rest))] = r
        if len(unique) < len(results):
            summary["metrics_without_duplicates"] = _aggregate(list(unique.values()))
    return summary


def _different(results: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    found = {
        what: sorted({str(r["data"].get(what)) for r in results})
        for what in ("dataset", "protocol")
    }
    return {what: names for what, names in found.items() if len(names) > 1}


def _demand_one_protocol(results: Sequence[dict[str, Any]]) -> None:
    for what, names in _different(results).items():
        raise ValueError(
            f"runs of different {what}s ({', '.join(names)}) never share a table; sweep them apart"
        )


def _aggregate(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = sorted({key for r in results for key in r["metrics"]})
    found = {}
    for key in keys:
        each = [r["metrics"].get(key) for r in results]
        known = [value for value in each if value is not None and math.isfinite(value)]
        if not known:
            continue
        found[key] = {
            "mean": statistics.fmean(known),
            "std": statistics.stdev(known) if len(known) > 1 else None,
            "n": len(known),
            "values": each,
        }
    return found


def format_summary(summary: dict[str, Any]) -> str:
    """The metrics of the test, or of the validation where there was none, as text tables: a line for each score."""
    groups = [*summary.get("groups", [])]
    if summary["metrics"]:
        groups.append({"values": {}, "runs": summary["runs"], "metrics": summary["metrics"]})
    tables = []
    for group in groups:
        named = ", ".join(f"{key} {value}" for key, value in group["values"].items())
        title = f"{summary['experiment']}: {named or 'all'}, mean ± std of {group['runs']} runs"
        tables.append("\n".join([title, *_table(group["metrics"], group["runs"])]))
    return "\n\n".join(tables)


def tested(metrics: dict[str, Any]) -> list[str]:
    """The keys of the test, or of the validation where there was no test; standard errors are left out."""
    keys = [key for key in metrics if key.startswith("test/")] or list(metrics)
    return [key for key in keys if not key.endswith("_se")]


def _table(metrics: dict[str, dict[str, Any]], runs: int) -> list[str]:
    rows: dict[str, dict[str, str]] = {}
    for key in tested(metrics):
        row, metric = split_key(key)
        value = metrics[key]
        text = formatted(key, value["mean"], value["std"])
        text += f" (n={value['n']})" if value["n"] < runs else ""
        rows.setdefault(row, {})[f"{metric} {scale_of(key)[1]}".rstrip()] = text
    # Scores without a common metric go into tables of their own.
    tables: list[dict[str, dict[str, str]]] = []
    for row, cells in rows.items():
        alike = [table for table in tables if any(cells.keys() & of for of in table.values())]
        joined = {name: of for table in alike for name, of in table.items()} | {row: cells}
        tables = [table for table in tables if table not in alike] + [joined]
    return [line for table in tables for line in ["", *_aligned(table)]]


def _aligned(rows: dict[str, dict[str, str]]) -> list[str]:
    columns = list(dict.fromkeys(metric for cells in rows.values() for metric in cells))
    lines = [["", *columns]]
    lines += [[row, *(cells.get(column, "") for column in columns)] for row, cells in rows.items()]
    if len(rows) == 1:  # a column of names and one of numbers reads better
        lines = [list(pair) for pair in zip(*lines, strict=True) if any(pair)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def split_key(key: str) -> tuple[str, str]:
    """``test/a/b/auc`` -> ``a/b``, ``auc``."""
    middle, _, metric = key.partition("/")[2].rpartition("/")
    return middle, metric


def write_summary(summary: dict[str, Any], start: Path, wanted: Sequence[str] = ()) -> list[Path]:
    """Writes ``START-summary.json``, ``.txt``, ``.csv`` and ``.png``.

    Args:
        summary: of :func:`summarize`.
        start: folder and beginning of the names.
        wanted: metrics of the plot, see :func:`plot`.

    Returns:
        The paths.

    Raises:
        ValueError: a wanted metric that no run has.
    """
    paths = [
        start.with_name(f"{start.name}-summary.{end}") for end in ("json", "txt", "csv", "png")
    ]
    plot(summary, paths[3], wanted)
    paths[0].write_text(json.dumps(summary, indent=2) + "\n")
    paths[1].write_text(format_summary(summary) + "\n")
    with paths[2].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*summary["by"], "metric", "mean", "std", "n"])
        for group in [*summary.get("groups", []), {"values": {}, "metrics": summary["metrics"]}]:
            of = [group["values"].get(key, "all") for key in summary["by"]]
            for key, value in group["metrics"].items():
                writer.writerow([*of, key, value["mean"], value["std"], value["n"]])
    return paths


def plot(summary: dict[str, Any], path: Path, wanted: Sequence[str] = ()) -> None:
    """A panel for each metric: the single runs as points, their mean and standard deviation, a colour for each score.

    The horizontal axis is the swept value: a number where it is one, a category otherwise, or where it only repeats;
    mean and deviation of all runs then stand at its right end.

    Args:
        summary: of :func:`summarize`.
        path: of the picture.
        wanted: names of metrics (``auroc``) or whole keys (``test/margin/auroc``), ``*`` for any text. By default the
            metrics that most scores have, at most four.

    Raises:
        ValueError: a wanted metric that no run has.
    """
    panels = _panels(summary, wanted)
    swept = summary["by"] or (list(summary["values"][0])[:1])
    places = [_place(v, swept) or str(i) for i, v in enumerate(summary["values"])]
    numbers = None
    if len(swept) == 1 and swept[0] not in REPEATED:
        numbers = _numbers([v[swept[0]] for v in summary["values"]])
    order = list(dict.fromkeys(places))
    x_of = (
        dict(zip(places, numbers, strict=True)) if numbers else {p: i for i, p in enumerate(order)}
    )
    with_mean = not summary["by"] and numbers is None and len(places) > 1
    colours: dict[str, str] = {}
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(max(4.2, 0.45 * len(order) + 2.5) * len(panels), 3.8),
        squeeze=False,
    )
    for axis, (metric, keys) in zip(axes[0], panels.items(), strict=True):
        for number, key in enumerate(keys):
            # Categories leave room beside each other, numbers do not.
            shift = 0.0 if numbers else 0.5 * ((number + 0.5) / len(keys) - 0.5)
            scale, unit = scale_of(key)
            row = split_key(key)[0]
            colour = colours.setdefault(row, f"C{len(colours)}")
            runs = [
                (place, scale * value)
                for place, value in zip(places, _values(summary, key), strict=True)
                if value is not None and math.isfinite(value)
            ]
            axis.scatter(
                [x_of[place] + shift for place, _ in runs],
                [value for _, value in runs],
                s=14,
                color=colour,
                alpha=0.6 if summary["by"] or with_mean else 1.0,
                label=row,
            )
            at: list[float] = []
            means: list[tuple[float, float]] = []
            if summary["by"]:
                for group in summary["groups"]:
                    if found := group["metrics"].get(key):
                        at.append(x_of[_place(group["values"], swept)] + shift)
                        means.append((scale * found["mean"], scale * (found["std"] or 0.0)))
            elif with_mean:
                found = summary["metrics"][key]
                at.append(len(order) + shift)
                means.append((scale * found["mean"], scale * (found["std"] or 0.0)))
            line = "-" if numbers else ""
            if means:
                centres, spreads = zip(*means, strict=True)
                axis.errorbar(
                    at, centres, spreads, color=colour, fmt="_", ls=line, lw=1, ms=9, capsize=3
                )
            elif numbers:
                axis.plot(
                    [x_of[place] for place, _ in runs], [v for _, v in runs], color=colour, lw=1
                )
        if numbers:
            if min(numbers) > 0 and max(numbers) >= 20 * min(numbers):
                axis.set_xscale("log")
            axis.set_xticks(list(dict.fromkeys(numbers)), order)
            axis.minorticks_off()
        else:
            ticks = [*order, "mean"] if with_mean else order
            slanted = {"rotation": 45, "ha": "right"} if max(map(len, ticks)) > 8 else {}
            axis.set_xticks(range(len(ticks)), ticks, **slanted)
            if with_mean:
                axis.axvline(len(order) - 0.5, color="grey", lw=0.5)
        axis.set(title=f"{metric}, {unit}" if unit else metric, xlabel=", ".join(swept))
        axis.grid(axis="y", lw=0.3)
    drawn: dict[str, Any] = {}
    for axis in axes[0]:
        handles, rows = axis.get_legend_handles_labels()
        drawn |= dict(zip(rows, handles, strict=True))
    if len(drawn) > 1:
        figure.legend(
            drawn.values(), drawn, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8
        )
    figure.suptitle(f"{summary['experiment']}, {summary['runs']} runs")
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _place(values: dict[str, str], keys: Sequence[str]) -> str:
    """A tick of the axis: values without the brackets and quotes of YAML."""
    return ", ".join(re.sub(r"[\[\]\"']", "", values[key]) for key in keys)


def _values(summary: dict[str, Any], key: str) -> list[float | None]:
    """Of every run, in their order."""
    if summary["metrics"]:
        return summary["metrics"][key]["values"]
    each = {
        tuple(group["values"].values()): iter(
            group["metrics"].get(key, {}).get("values", [None] * group["runs"])
        )
        for group in summary["groups"]
    }
    return [next(each[tuple(v[k] for k in summary["by"])]) for v in summary["values"]]


def _panels(summary: dict[str, Any], wanted: Sequence[str]) -> dict[str, list[str]]:
    """Metric -> its keys, one for each score."""
    every = summary["metrics"] or {
        key: value for group in summary["groups"] for key, value in group["metrics"].items()
    }
    by_name: dict[str, list[str]] = {}
    for key in tested(every):
        by_name.setdefault(split_key(key)[1], []).append(key)
    if not wanted:
        common = sorted(by_name, key=lambda name: -len(by_name[name]))[:PANELS]
        return {name: by_name[name][:SERIES] for name in common}
    panels: dict[str, list[str]] = {}
    for pattern in wanted:
        found = [
            key
            for key in every
            if fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(split_key(key)[1], pattern)
        ]
        if not found:
            raise ValueError(
                f"--metric {pattern} is in no run; the metrics are {', '.join(by_name)}, e.g. {next(iter(every))}"
            )
        for key in found:
            panel = panels.setdefault(split_key(key)[1], [])
            if key not in panel:
                panel.append(key)
    return panels


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value.removesuffix("%")) for value in values]
    except ValueError:
        return None
