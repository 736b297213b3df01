import csv
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoint import AtomicCheckpointIO, ResumableCheckpoint
from callbacks.loggers import MetricsFile, ResumableCSVLogger, RunWandbLogger
from tests.callbacks.boring import BoringGAN, boring_trainer, loader
from tests.processes import run_fresh
from tests.wandb_file import WandbFile


class KilledError(RuntimeError):
    pass


class SaveThenDie(Callback):
    """Saves after one number of batches and dies after another."""

    def __init__(self, save_at: int, die_at: int) -> None:
        self.save_at, self.die_at = save_at, die_at

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx
        if done == self.die_at:
            raise KilledError

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.save_at:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == -self.save_at:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


def _fit(path: Path, *callbacks: Callback, ckpt: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    module = BoringGAN()
    logger = ResumableCSVLogger(str(path))
    trainer = boring_trainer(
        path, max_epochs=3, logger=logger, callbacks=list(callbacks), **options
    )
    trainer.fit(module, Replayed(), loader(), ckpt_path=ckpt)
    return trainer, module


class Replayed:
    """One batch over and over, so that a resumed run sees the right data without a sampler of ours."""

    def __iter__(self) -> Any:
        batch = {"image": torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))}
        return iter([batch] * 4)

    def __len__(self) -> int:
        return 4


def test_table_lies_in_the_run_directory(tmp_path: Path) -> None:
    trainer, _ = _fit(tmp_path)
    assert trainer.log_dir == str(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "hparams.yaml"}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    training = [row for row in rows if row["train/generator"]]
    assert [int(row["step"]) for row in training] == list(range(12))
    assert sum(bool(row["val/score/mean"]) for row in rows) == 3


@pytest.mark.parametrize("save_at", [-1, -2, 2, 6], ids=lambda at: f"saved at {at}")
def test_interrupted_table_equals_the_uninterrupted_one(tmp_path: Path, save_at: int) -> None:
    _fit(tmp_path / "whole")
    part = tmp_path / "part"
    with pytest.raises(KilledError):
        _fit(part, SaveThenDie(save_at, die_at=10))
    table = part / "metrics.csv"
    assert table.read_text().count("\n") > 8
    _fit(part, ckpt=part / "saved.ckpt")
    assert table.read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_restart_from_scratch_replaces_the_rows(tmp_path: Path) -> None:
    _fit(tmp_path / "whole")
    with pytest.raises(KilledError):
        _fit(tmp_path / "part", SaveThenDie(100, die_at=5))
    _fit(tmp_path / "part")
    whole, part = (tmp_path / name / "metrics.csv" for name in ("whole", "part"))
    assert part.read_text() == whole.read_text()


def test_later_test_and_validation_only_append(tmp_path: Path) -> None:
    _, module = _fit(tmp_path)
    before = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    for stage in ("test", "validate"):
        trainer = boring_trainer(tmp_path, logger=ResumableCSVLogger(str(tmp_path)))
        getattr(trainer, stage)(module, loader())
    after = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [{key: row[key] for key in before[0]} for row in after[: len(before)]] == before
    assert len(after) == len(before) + 2
    assert after[-2]["test/score/mean"]
    assert after[-1]["val/score/mean"]


def test_new_columns_keep_the_old_rows(tmp_path: Path) -> None:
    table = MetricsFile(tmp_path)
    table.log_metrics({"b": 1.5}, 0)
    table.save()
    table.log_metrics({"a": torch.tensor(2.0)}, 1)
    table.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["a,b,step", ",1.5,0", "2.0,,1"]


def test_another_logging_interval_still_drops_what_comes_after(tmp_path: Path) -> None:
    table = MetricsFile(tmp_path)
    for step in range(4):
        table.log_metrics({"a": step}, step)
    table.save()
    resumed = MetricsFile(tmp_path)
    resumed.log_metrics({"b": 7}, 2)
    resumed.save()
    assert (tmp_path / "metrics.csv").read_text().split() == [
        *("a,b,step", "0,,0", "1,,1", "2,,2", ",7,2"),
    ]


def test_half_a_row_at_the_end_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,step\n0.5,0\n0.25,1\n0.1")
    table = MetricsFile(tmp_path)
    table.log_metrics({"a": 0.125}, 2)
    table.save()
    assert (tmp_path / "metrics.csv").read_text().split() == [
        *("a,step", "0.5,0", "0.25,1", "0.125,2"),
    ]


def test_foreign_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="no column 'step'"):
        MetricsFile(tmp_path)


# ------------------------------------------------------------------ wandb
def _stub_wandb(monkeypatch: pytest.MonkeyPatch, logged_in: bool, mode: str = "online") -> None:
    import wandb

    def login(prompt: bool = True, verify: bool = True) -> bool:
        assert not prompt
        return logged_in

    monkeypatch.setattr(wandb, "login", login)
    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    monkeypatch.setattr(wandb, "setup", lambda: settings)


@pytest.mark.parametrize(
    ("offline", "environment", "settings", "logged_in", "expected"),
    [
        (None, None, "online", True, None),
        (None, None, "online", False, "offline"),
        (None, None, "offline", False, None),
        (None, "online", "online", False, None),
        (True, "online", "online", True, "offline"),
        (False, "offline", "offline", False, "online"),
    ],
)
def test_offline_is_what_was_asked_for_or_the_lack_of_a_login(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offline: bool | None,
    environment: str | None,
    settings: str,
    logged_in: bool,
    expected: str | None,
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    _stub_wandb(monkeypatch, logged_in, settings)
    assert RunWandbLogger(save_dir=str(tmp_path), offline=offline)._mode() == expected


WANDB_RUNS = """
import os, sys
import wandb
from tests.callbacks.boring import *
from callbacks.image_grid import ImageGrid
from callbacks.loggers import RunWandbLogger
from callbacks.media import log_table

for mode in ("offline", None):
    os.environ.pop("WANDB_MODE", None)
    if mode:
        os.environ["WANDB_MODE"] = mode
    logger = RunWandbLogger("a-project", name="a-name", save_dir=sys.argv[1], tags=["t"], group="g")
    trainer = boring_trainer(sys.argv[1], logger=logger, callbacks=[ImageGrid()])
    trainer.fit(BoringGAN(lr=0.03125), loader(), loader())
    log_table(trainer, "a/table", ["x"], [[1]])
    print("id", logger.version)
    wandb.finish()
    wandb.teardown()
"""


def test_real_offline_wandb_run_is_complete_and_continued(tmp_path: Path) -> None:
    login = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    login["WANDB_CONFIG_DIR"] = str(tmp_path / "config")
    directory = tmp_path / "run"
    printed = run_fresh(WANDB_RUNS, str(directory), **login)
    kept = (directory / "wandb-id.txt").read_text().strip()
    assert [line for line in printed.splitlines() if line.startswith("id")] == [f"id {kept}"] * 2
    assert printed.count("wandb: run") == 2

    folders = sorted((directory / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    parts = [WandbFile(folder) for folder in folders]
    for part in parts:
        run = part.run
        assert (run.run_id, run.project, run.display_name) == (kept, "a-project", "a-name")
        assert (list(run.tags), run.run_group) == (["t"], "g")
        assert part.config["lr"] == 0.03125
    # The second run does the same batches over again, so that all of it is there already.
    history = parts[0].history
    assert not parts[1].history
    losses = [row for row in history if "train/generator" in row]
    assert [row["trainer/global_step"] for row in losses] == list(range(8))
    assert [row["trainer/global_step"] for row in history if "images/grid" in row] == [3, 7]
    pictures = list(parts[0].images())
    assert [caption for _, caption, _ in pictures] == ["grid-0.png", "grid-1.png"]
    assert all(file.stat().st_size > 100 for _, _, file in pictures)
    assert list(parts[0].tables()) == [("tables/a/table", {"columns": ["x"], "data": [[1]]})]


def test_rows_wait_for_a_full_disk(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(3):
        file.log_metrics({"a": 0.125 * step}, step)
        try:
            if step == 1:
                size = file.path.stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3, limit[1]))
                with pytest.warns(
                    UserWarning, match=r"metrics\.csv cannot be written .*rows are kept"
                ):
                    file.save()
                assert file.path.stat().st_size == size, "no half row"
            else:
                file.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.path.read_text().split() == ["a,step", "0.0,0", "0.125,1", "0.25,2"]


def test_a_test_that_is_repeated_on_resume_is_not_doubled(tmp_path: Path) -> None:
    """Killed in its test, the run has nothing left to train, and its first row is that of the test."""
    for ckpt_path in (None, tmp_path / "checkpoints" / "last.ckpt"):
        trainer = boring_trainer(
            tmp_path,
            callbacks=[ResumableCheckpoint()],
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
            logger=ResumableCSVLogger(str(tmp_path)),
        )
        trainer.fit(BoringGAN(), loader(), ckpt_path=ckpt_path)
        trainer.test(trainer.lightning_module, loader(), verbose=False)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["test/score/mean"] != "" for row in rows) == 1
    assert len(rows) == 9
