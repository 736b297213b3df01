import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoint import AtomicCheckpointIO, Preempted, ResumableCheckpoint
from tests.callbacks.boring import BoringGAN, boring_trainer, loader


class Saved(Callback):
    """Notes after how many batches a checkpoint was written."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.batches.append(checkpoint["global_step"])


def fit(directory: Path, *callbacks: Callback, **options: Any) -> None:
    trainer = boring_trainer(
        directory,
        callbacks=[*callbacks],
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    trainer.fit(BoringGAN(), loader())


def test_an_interrupted_write_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_never_at_the_last_batch_but_at_its_epoch_end(tmp_path: Path) -> None:
    """Four batches an epoch: batches 2 and 6 within, 4 and 8 once, at the epoch ends."""
    saved = Saved()
    fit(tmp_path, ResumableCheckpoint(every_n_batches=2), saved)
    assert saved.batches == [2, 4, 6, 8]
    checkpoint = torch.load(ResumableCheckpoint.path_in(tmp_path), weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2


def test_minutes_and_epochs(tmp_path: Path) -> None:
    saved = Saved()
    fit(tmp_path / "a", ResumableCheckpoint(every_minutes=1e-9), saved, max_epochs=1)
    assert saved.batches == [1, 2, 3, 4]
    saved = Saved()
    fit(tmp_path / "b", ResumableCheckpoint(every_n_epochs=2), saved, max_epochs=3)
    assert saved.batches == [8, 12], "every second epoch, and the last"
    fit(tmp_path / "c", ResumableCheckpoint(keep_epochs=2), max_epochs=3)
    kept = {path.name for path in (tmp_path / "c" / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "epoch-002.ckpt"}


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    fit(tmp_path, ResumableCheckpoint())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize(("at", "saved_at"), [(1, 2), (3, 4), (7, 8)], ids=["in", "last", "end"])
def test_a_signal_ends_the_run_at_a_batch_boundary(at: int, saved_at: int, tmp_path: Path) -> None:
    class Send(Callback):
        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == at:
                signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(Preempted, match="SIGUSR1"):
        fit(tmp_path, ResumableCheckpoint(), Send())
    path = ResumableCheckpoint.path_in(tmp_path)
    assert torch.load(path, weights_only=True)["global_step"] == saved_at


def test_impossible_intervals_are_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every_n_batches must be positive, not 0"):
        ResumableCheckpoint(every_n_batches=0)
