"""What an offline run leaves for wandb, read with wandb's own messages."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.suites.launch import probe, run
from tests.suites.members import QUICK, cases
from tests.suites.recorded import CHECKPOINTS, Recorded, parts, record
from tests.suites.test_ddp import TWO
from tests.suites.test_resume import PREEMPTED, SIGKILL
from tests.wandb_file import WandbFile, scalars

ROOT = Path(__file__).parents[2]
AXIS = "trainer/global_step"
MANUAL, AUTOMATIC = QUICK
both = pytest.mark.parametrize("recorded", cases(QUICK, only=[MANUAL]), indirect=True)
Row = tuple[int, dict[str, str]]


def metric_rows(files: list[WandbFile]) -> list[Row]:
    """Step and metrics of all rows that have any, numbers as text."""
    rows = [row for file in files for row in file.history]
    found = [
        (row[AXIS], {key: number(value) for key, value in scalars(row).items() if key != AXIS})
        for row in rows
    ]
    return [(step, metrics) for step, metrics in found if metrics]


def number(value: Any) -> str:
    return repr(float(value))


def test_config_is_complete(recorded: Recorded) -> None:
    config = dict(recorded.file.config)
    for key in ("git_revision", "versions", "hardware"):
        assert config.pop(key) == recorded.results[key]
    assert config == yaml.safe_load((recorded.directory / "config.yaml").read_text())
    assert config["seed_everything"] == recorded.results["seed"]


def test_run_is_named_and_grouped(recorded: Recorded) -> None:
    shown = recorded.file.run
    experiment = recorded.directory.parent.name
    assert shown.run_id == (recorded.directory / "wandb-id.txt").read_text().strip()
    assert shown.project == "adversaria"
    assert shown.display_name == f"{experiment}/{recorded.directory.name}"
    assert shown.run_group == experiment
    assert shown.job_type == ("fit" if recorded.member.trains else "test")
    assert next(iter(shown.tags)) == recorded.member.name
    assert recorded.file.finished


def test_history_is_the_metrics_file_on_the_batch_axis(recorded: Recorded) -> None:
    history = recorded.file.history
    assert recorded.file.step_metrics == {AXIS: "", "*": AXIS}
    assert [row["_step"] for row in history] == list(range(len(history)))
    steps = [row[AXIS] for row in history]
    assert steps == sorted(steps)
    if recorded.member.trains:
        checkpoint = recorded.directory / "checkpoints" / "last.ckpt"
        assert steps[-1] == torch.load(checkpoint, weights_only=True)["global_step"]
    with (recorded.directory / "metrics.csv").open(newline="") as file:
        expected = [
            (int(row.pop("step")), {k: number(v) for k, v in row.items() if v != ""})
            for row in csv.DictReader(file)
        ]
    assert metric_rows([recorded.file]) == expected
    assert expected


def test_summary_has_the_results(recorded: Recorded) -> None:
    summary = {key: recorded.file.summary[key] for key in recorded.results["metrics"]}
    assert {k: number(v) for k, v in summary.items()} == {
        k: number(v) for k, v in recorded.results["metrics"].items()
    }
    assert summary


def test_every_picture_and_table_is_there(recorded: Recorded) -> None:
    pictures = {caption: (key, file.read_bytes()) for key, caption, file in recorded.file.images()}
    drawn = {path.name: path.read_bytes() for path in recorded.directory.rglob("*.png")}
    drawn = {name: content for name, content in drawn.items() if name in _outside_wandb(recorded)}
    assert {caption: content for caption, (_, content) in pictures.items()} == drawn
    history = recorded.file.history
    kinds = {(key, _kind(value)) for row in history for key, value in row.items()}
    assert len(kinds) == len({key for key, _ in kinds}), "a panel shows one kind of thing"
    for caption, (key, _) in pictures.items():
        assert caption.startswith(key.removeprefix("images/").replace("/", "-"))

    sent = [
        [[_cell(value) for value in row] for row in (content["columns"], *content["data"])]
        for _, content in recorded.file.tables()
    ]
    written = []
    for path in recorded.directory.glob("tables/*.csv"):
        with path.open(newline="") as file:
            written.append([[_cell(value) for value in row] for row in csv.reader(file)])
    assert sorted(sent) == sorted(written)


def _kind(value: Any) -> str:
    """1.0 comes back as 1."""
    return "number" if isinstance(value, int | float) else value["_type"]


def _outside_wandb(recorded: Recorded) -> set[str]:
    paths = recorded.directory.rglob("*.png")
    return {
        path.name for path in paths if "wandb" not in path.relative_to(recorded.directory).parts
    }


def _cell(value: Any) -> str:
    """None and an empty field are the same in a CSV file, and so are 1 and 1.0 in wandb."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value)
    try:
        found = float(value)
    except (TypeError, ValueError):
        return str(value)
    return "nan" if math.isnan(found) else repr(found)


def test_nothing_else_is_left_or_printed(recorded: Recorded) -> None:
    said = [line for line in recorded.printed.splitlines() if "wandb" in line]
    folder = recorded.directory / "wandb"
    assert said == [
        f"wandb: run {recorded.file.run.run_id} is recorded offline; upload it with "
        f"`wandb sync {folder}`"
    ]
    assert not list(ROOT.glob(f"wandb/*{recorded.file.run.run_id}*"))
    found = [path for path in recorded.root.rglob("*wandb*") if folder not in path.parents]
    beside = {path for path in found if recorded.root / "home" / ".cache" not in path.parents}
    names = ("wandb", "wandb-id.txt")
    assert beside == {recorded.directory / name for name in names}


@both
def test_interrupted_run_goes_on(recorded: Recorded, tmp_path: Path) -> None:
    """Preempted, continued, killed in the last phase, continued: the parts together are the run, but for a second."""
    member, again = recorded.member, ["--run.resume", "true", *CHECKPOINTS]
    for name, batch, code in (
        ("SIGTERM", member.batches[0] - 1, PREEMPTED),
        ("SIGKILL", member.batches[1], SIGKILL),
    ):
        # wandb writes at least every second.
        stop = probe("SignalAt", name=name, batch=batch, wait=2)
        record(member, tmp_path, *again, *stop, log=f"{name}.txt", expect=code)
    record(member, tmp_path, *again)

    files = parts(tmp_path)
    assert len(files) == 3
    assert len({(file.run.run_id, file.run.display_name) for file in files}) == 1
    history = [row for file in files for row in file.history]
    assert [row["_step"] for row in history] == list(range(len(history)))
    assert [row[AXIS] for row in history] == sorted(row[AXIS] for row in history)
    rows, expected = metric_rows(files), metric_rows([recorded.file])
    assert rows == [row for row in expected if row in rows], "nothing twice, nothing else"
    # A kill loses what wandb had not written yet, on a slow machine all of the part that was killed.
    start, end = files[0].history[-1][AXIS], files[2].history[0][AXIS]
    assert all(start <= step <= end for step, row in expected if (step, row) not in rows)
    captions = [caption for file in files for _, caption, _ in file.images()]
    assert len(set(captions)) == len(captions)


@both
def test_only_rank_zero_of_two_has_a_run(recorded: Recorded, tmp_path: Path) -> None:
    record(recorded.member, tmp_path, "--run.test", "false", overrides=TWO)
    (file,) = parts(tmp_path)
    (directory,) = tmp_path.glob("*/run")
    with (directory / "metrics.csv").open(newline="") as table:
        assert len(metric_rows([file])) == len(list(csv.DictReader(table)))
    rows = [(row[AXIS], *sorted(row)) for row in file.history]
    assert len(set(rows)) == len(rows)
    assert str(file.config["trainer"]["devices"]) == "2"


@pytest.mark.parametrize("recorded", cases([AUTOMATIC]), indirect=True)
def test_predictions_are_a_table(recorded: Recorded, tmp_path: Path) -> None:
    checkpoint = recorded.directory / "checkpoints" / "last.ckpt"
    arguments = ["predict", "--ckpt_path", str(checkpoint), "-c", "configs/trainer/wandb.yaml"]
    run([*arguments, "--run.root", str(tmp_path)], tmp_path / "predict.txt")
    (directory,) = tmp_path.glob("*/predict-000")
    (folder,) = directory.glob("wandb/offline-run-*")
    file = WandbFile(folder)
    assert file.run.job_type == "predict"
    ((key, content),) = file.tables()
    with (directory / "predictions.csv").open(newline="") as table:
        header, *rows = list(csv.reader(table))
    assert key == "tables/predictions"
    assert content["columns"] == header
    assert [[_cell(v) for v in row] for row in content["data"]] == [
        [_cell(v) for v in row] for row in rows
    ]
