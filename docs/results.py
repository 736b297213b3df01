"""Measured results: collected from run directories into ``docs/results/``, and shown in the pages.

A file ``docs/results/EXPERIMENT.json`` holds the summary of all finished runs of an experiment in a folder of runs, and
what is needed to repeat and judge them. ``docs/papers.yaml`` says what the README tells of a paper.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from callbacks.summary import formatted, scale_of, summarize

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAPERS = ROOT / "docs" / "papers.yaml"
DIGITS = 6
_COMPARED = ("model", "data", "seed_everything")
_PLACE = re.compile(r"{(?:(?P<experiment>[\w-]+):)?(?P<key>[^{}|]+)(?:\|(?P<form>\w+))?}")
_FORM = re.compile(r"(?P<what>mean|range|se|)(?P<decimals>\d?)")


# ------------------------------------------------------------------ from run directories
def collect(runs: Path, rehearse: Callable[[list[str], bool], dict[str, Any]]) -> list[Path]:
    """Writes ``docs/results/EXPERIMENT.json`` for every experiment that has finished runs.

    What differs between the configurations of an experiment's runs is what was swept; what differs from the recipe is
    in the command.

    Args:
        runs: folder of ``EXPERIMENT/NAME/results.json``.
        rehearse: parses a command of ``train.py`` and returns its configuration.

    Returns:
        The files.

    Raises:
        ValueError: there is no finished run, an experiment has no recipe, or runs must not share a table.
    """
    written = []
    for folder in sorted(path for path in runs.iterdir() if path.is_dir()):
        found = [
            (
                json.loads(path.read_text()),
                yaml.safe_load(path.with_name("config.yaml").read_text()),
            )
            for path in sorted(folder.glob("*/results.json"))
        ]
        found = [(r, c) for r, c in found if any(key.startswith("test/") for key in r["metrics"])]
        if found:
            path = RESULTS / f"{folder.name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(_compact(_record(found, rehearse)) + "\n")
            written.append(path)
    if not written:
        raise ValueError(f"{runs} has no EXPERIMENT/NAME/results.json of a tested run")
    return written


def _record(
    found: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    rehearse: Callable[[list[str], bool], dict[str, Any]],
) -> dict[str, Any]:
    results = [r for r, _ in found]
    configs = [_flat({key: config[key] for key in _COMPARED}) for _, config in found]
    swept = [
        key
        for key in dict.fromkeys(key for config in configs for key in config)
        if len({json.dumps(config.get(key)) for config in configs}) > 1
    ]
    if not swept and len(found) > 1:
        raise ValueError(
            f"{len(found)} runs of {results[0]['experiment']} have one configuration; keep one of them"
        )
    values = [{key: _written(config.get(key)) for key in swept} for config in configs]
    order = sorted(range(len(found)), key=lambda i: [_sorted_by(v) for v in values[i].values()])
    results, values = [results[i] for i in order], [values[i] for i in order]
    summary = summarize(results, values)
    experiment = summary["experiment"]
    recipe = recipe_of(experiment)
    kind = "fit" if results[0]["command"] == "fit" else "test"
    asked = [kind, "-c", str(recipe.relative_to(ROOT))]
    plain = rehearse(asked, False)
    # Another class has defaults of its own.
    given = {k: v for k, v in _given(configs[order[0]], plain, swept).items() if "class_path" in k}
    if given:
        plain = rehearse([*asked, *_options(given)], False)
    given |= _given(configs[order[0]], plain, swept)
    if plain["run"]["experiment"] != experiment:
        given["run.experiment"] = experiment
    command = [
        "python",
        "train.py",
        "sweep" if swept else kind,
        "-c",
        str(recipe.relative_to(ROOT)),
    ]
    command += _options(given)
    for key in swept:
        command += ["--over", f"{key}={','.join(dict.fromkeys(v[key] for v in values))}"]
    record = {
        "experiment": experiment,
        "command": shlex.join(command),
        "runs": len(results),
        "values": values,
        "seeds": summary["seeds"],
        "hardware": _common(results, "hardware"),
        "versions": _common(results, "versions"),
        "git_revision": _common(results, "git_revision"),
        "processes": _common(results, "processes"),
        "wall_time_s": [r["wall_time_s"] for r in results],
        "metrics": _tested(summary["metrics"]),
    }
    if summary["by"]:
        record["by"] = summary["by"]
        record["groups"] = [{**g, "metrics": _tested(g["metrics"])} for g in summary["groups"]]
    return record


def _given(config: dict[str, Any], plain: dict[str, Any], swept: Sequence[str]) -> dict[str, str]:
    """What a run has otherwise than a configuration."""
    expected = _flat({key: plain[key] for key in _COMPARED})
    return {
        key: _written(value)
        for key, value in config.items()
        if key in expected and expected[key] != value and key not in swept
    }


def _options(given: dict[str, str]) -> list[str]:
    return [text for key, value in given.items() for text in (f"--{key}", value)]


def recipe_of(experiment: str) -> Path:
    """``PAPER-DATASET`` or ``PAPER-DATASET-VARIANT`` -> ``configs/PAPER/DATASET.yaml``.

    Raises:
        ValueError: there is no such recipe.
    """
    names = {f"{p.parent.name}-{p.stem}": p for p in sorted((ROOT / "configs").glob("*/*.yaml"))}
    fitting = [name for name in names if f"{experiment}-".startswith(f"{name}-")]
    if not fitting:
        raise ValueError(
            f"experiment {experiment} has no recipe: expected configs/PAPER/DATASET.yaml for PAPER-DATASET[-VARIANT]"
        )
    return names[max(fitting, key=len)]


def _flat(config: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys as on the command line -> values; None for what is empty."""
    if not isinstance(config, dict):
        return {key: config}
    return {
        name: value
        for part, inner in config.items()
        for name, value in _flat(
            inner, key if part == "init_args" else f"{key}.{part}".removeprefix(".")
        ).items()
    }


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sorted_by(value: str) -> tuple[float, str]:
    try:
        return float(value.removesuffix("%")), value
    except ValueError:
        return float("inf"), value


def _common(results: Sequence[dict[str, Any]], key: str) -> Any:
    """The value that all runs have, else the list of theirs."""
    each = [r[key] for r in results]
    return each[0] if all(value == each[0] for value in each) else each


def _tested(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(one) for one in value]
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

    return {
        key: {name: short(value) for name, value in found.items()}
        for key, found in metrics.items()
        if key.startswith("test/")
    }


def _compact(record: dict[str, Any]) -> str:
    """JSON with a line for every metric."""
    text = json.dumps(record, indent=1)
    for opening, closing in ("[]", "{}"):
        innermost = re.compile(
            rf"\{opening}[^][{{}}]*\{closing}" if opening == "[" else r"{[^{}]*}"
        )
        text = innermost.sub(lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)
    return text


# ------------------------------------------------------------------ into the pages
def load(experiment: str) -> dict[str, Any]:
    """What was collected of an experiment.

    Raises:
        ValueError: nothing.
    """
    path = RESULTS / f"{experiment}.json"
    if not path.exists():
        raise ValueError(
            f"no docs/results/{path.name}; collect it with docs/generate.py --runs RUNS"
        )
    return json.loads(path.read_text())


def _metric(record: dict[str, Any], key: str) -> dict[str, Any]:
    if key not in record["metrics"]:
        raise ValueError(f"{record['experiment']} has no metric {key}")
    return record["metrics"][key]


def value_text(record: dict[str, Any], key: str, form: str = "") -> str:
    """A metric in words.

    Args:
        record: of :func:`load`.
        key: of the metric.
        form: empty for mean ± std over the runs, ``mean``, ``range`` for smallest to largest, ``se`` for the value ±
            the standard error that the run itself recorded (``KEY_se``); then the number of decimals, if one is
            wanted.

    Raises:
        ValueError: an unknown metric or form.
    """
    match = _FORM.fullmatch(form)
    if match is None:
        raise ValueError(
            f"unknown form {form!r}; known are mean, range, se, and a digit for the decimals"
        )
    decimals = int(match["decimals"]) if match["decimals"] else None
    found = _metric(record, key)
    if match["what"] == "range":
        ends = [formatted(key, end(found["values"]), None, decimals) for end in (min, max)]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)
    spread = {"": found["std"], "mean": None}
    if match["what"] == "se":
        spread["se"] = _metric(record, f"{key}_se")["mean"]
    return formatted(key, found["mean"], spread[match["what"]], decimals)


def filled_in(template: str, experiment: str) -> str:
    """A sentence with its numbers: ``{KEY}``, ``{KEY|FORM}`` or ``{EXPERIMENT:KEY}``, see :func:`value_text`."""
    return _PLACE.sub(
        lambda m: value_text(load(m["experiment"] or experiment), m["key"], m["form"] or ""),
        template,
    )


def circumstances(record: dict[str, Any]) -> str:
    """Seeds and machine: ``5 runs (split 0, 1, 2, 3, 4; seed 0), one thread of 2 CPU cores``."""
    swept = list(record["values"][0])
    parts = []
    for key in swept:
        chosen = dict.fromkeys(_plain(v[key]) for v in record["values"])
        parts.append(f"{_short(key)} {', '.join(chosen)}")
    if "seed_everything" not in swept:
        parts.append(f"seed {record['seeds'][0]}")
    hardware = record["hardware"]
    hardware = hardware if isinstance(hardware, list) else [hardware]
    machines = []
    for machine in hardware:
        threads = machine["torch_threads"]
        machines.append(
            f"{len(machine['gpus'])} x {machine['gpus'][0]}"
            if machine["gpus"]
            else f"{'one thread' if threads == 1 else f'{threads} threads'} of {machine['cpu_cores']} CPU cores"
        )
    runs = f"{record['runs']} runs ({'; '.join(parts)})" if record["runs"] > 1 else parts[0]
    return f"{runs}, {' and '.join(dict.fromkeys(machines))}"


def conditions(experiment: str) -> str:
    """Command, seeds, machine, versions and revision of an experiment."""
    record = load(experiment)
    revisions = record["git_revision"]
    revisions = revisions if isinstance(revisions, list) else [revisions]
    versions = record["versions"]
    versions = versions if isinstance(versions, dict) else versions[0]
    return (
        f"`{record['command']}`: {circumstances(record)}, torch {versions['torch']}, revision "
        f"{', '.join(dict.fromkeys(str(revision)[:7] for revision in revisions))}."
    )


def result(experiment: str, columns: str, rows: str) -> str:
    """Mean ± standard deviation over the runs of an experiment.

    Args:
        experiment: its name.
        columns: ``METRIC[|FORM][:TITLE],...``, a form being one of :func:`value_text`; underscores in titles become
            spaces.
        rows: ``SCORE[:TITLE],...``, the part of ``test/SCORE/METRIC`` between the slashes.

    Returns:
        A Markdown table.
    """
    record = load(experiment)
    named = {tuple(name.split("|", 1)): title for name, title in _titled(columns).items()}
    lines = [["", *(_heading(metric, title) for (metric, *_), title in named.items())]]
    for row, title in _titled(rows).items():
        cells = (value_text(record, f"test/{row}/{metric}", *form) for metric, *form in named)
        lines.append([title, *cells])
    return _markdown(lines)


def runs(experiment: str, metric: str, rows: str) -> str:
    """Every single run of an experiment, and mean ± standard deviation.

    Args:
        experiment: its name.
        metric: ``METRIC[:TITLE]``.
        rows: as for :func:`result`.

    Returns:
        A Markdown table.
    """
    record = load(experiment)
    ((name, title),) = _titled(metric).items()
    swept = list(record["values"][0])
    columns = [_plain(", ".join(values.values())) for values in record["values"]]
    by = ", ".join(_short(key) for key in swept)
    lines = [[_heading(name, f"{title} by {by}" if by else title), *columns, "mean ± std"]]
    for row, title in _titled(rows).items():
        key = f"test/{row}/{name}"
        found = _metric(record, key)
        each = ["" if value is None else formatted(key, value) for value in found["values"]]
        lines.append([title, *each, value_text(record, key)])
    return _markdown(lines)


def _short(key: str) -> str:
    """``data.split`` -> ``split``."""
    return "seed" if key == "seed_everything" else key.rpartition(".")[2]


def _plain(value: str) -> str:
    """Without the brackets and quotes of a list."""
    return re.sub(r"[\[\]\"]", "", value)


def _titled(words: str) -> dict[str, str]:
    pairs = [word.partition(":") for word in words.split(",")]
    return {name: title.replace("_", " ") or name for name, _, title in pairs}


def _heading(metric: str, title: str) -> str:
    unit = scale_of(f"test/{metric}")[1]
    return f"{title}, {unit}" if unit else title


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


# ------------------------------------------------------------------ the table of the collection
@dataclass(frozen=True)
class Row:
    """What the README says of a paper.

    Args:
        folders: of ``lightning_modules/``.
        paper: name, authors, where it appeared.
        what: the task and what is implemented.
        recipes: that need no download, the first one is that of the measured sentence.
        measured: a sentence with places for numbers, see :func:`filled_in`.
        published: the paper's number, where it can be compared.
        page: in ``docs/``.
        picture: of the gallery, a pattern in the directory of a run of the first recipe.
        caption: of the picture, one line.
        crop: pixels of the picture that are kept from its top, None for all.
    """

    folders: list[str]
    paper: str
    what: str
    recipes: list[str]
    measured: str
    published: str
    page: str
    picture: str
    caption: str
    crop: int | None = None

    @property
    def experiment(self) -> str:
        """Name of the first recipe's runs."""
        recipe = Path(self.recipes[0])
        return f"{recipe.parent.name}-{recipe.stem}"

    @property
    def measured_text(self) -> str:
        """The sentence with the numbers collected; without them, what is missing."""
        named = [self.experiment, *(m["experiment"] for m in _PLACE.finditer(self.measured))]
        missing = [e for e in dict.fromkeys(named) if e and not (RESULTS / f"{e}.json").exists()]
        if missing:
            return f"not collected: {', '.join(missing)}"
        sentence = filled_in(self.measured, self.experiment)
        return f"{sentence}. {_capital(circumstances(load(self.experiment)))}"


def rows() -> list[Row]:
    """The rows of the table."""
    return [Row(**row) for row in yaml.safe_load(PAPERS.read_text())]


def table() -> str:
    """The table of the collection for the README."""
    lines = [
        ["paper", "what", "recipe without download", "measured there", "paper's number", "page"]
    ]
    for row in rows():
        recipes = ", ".join(f"`{recipe}`" for recipe in row.recipes)
        page = f"[{row.page}]({row.page})"
        lines.append([row.paper, row.what, recipes, row.measured_text, row.published, page])
    return _markdown(lines)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
