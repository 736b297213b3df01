import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoint import (
    AtomicCheckpointIO,
    Preempted,
    ResumableCheckpoint,
    newest_readable,
)
from callbacks.finite import FiniteGuard, NonFiniteLossError
from lightning_modules.files import NotWrittenError, UnreadableError
from tests.callbacks.boring import BoringGAN, boring_trainer, loader


class Saved(Callback):
    """Notes after how many batches a checkpoint was written."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.batches.append(checkpoint["global_step"])


def fit(
    directory: Path, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any
) -> None:
    trainer = boring_trainer(
        directory,
        callbacks=[*callbacks],
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    trainer.fit(BoringGAN(), loader(), ckpt_path=ckpt_path)


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


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
    assert kept == {"last.ckpt", "previous.ckpt", "epoch-002.ckpt"}


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


def test_the_one_before_is_kept_and_taken_where_the_newest_is_damaged(tmp_path: Path) -> None:
    assert newest_readable(tmp_path) is None
    fit(tmp_path, ResumableCheckpoint(every_n_batches=3, keep_epochs=1))
    newest, previous = (
        find(tmp_path) for find in (ResumableCheckpoint.path_in, ResumableCheckpoint.previous_in)
    )
    assert (step_of(newest), step_of(previous)) == (8, 6)
    assert newest_readable(tmp_path) == newest
    whole = newest.read_bytes()
    for damaged in (b"", whole[:2000], bytes(len(whole)), None):
        newest.unlink() if damaged is None else newest.write_bytes(damaged)
        with pytest.warns(
            UserWarning, match=r"last\.ckpt.*continues from the one before, .*previous\.ckpt"
        ):
            assert newest_readable(tmp_path) == previous
    previous.write_bytes(whole[:2000])
    with pytest.warns(UserWarning, match=r"the one before, .*epoch-002\.ckpt"):
        assert newest_readable(tmp_path) == newest.with_name("epoch-002.ckpt")
    for path in newest.parent.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(
        UnreadableError, match=r"no checkpoint of this run can be read: .*another --run\.name"
    ):
        newest_readable(tmp_path)
    assert {path.read_bytes() for path in newest.parent.iterdir()} == {b"x"}


def test_a_damaged_one_never_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    """From previous.ckpt, of batch 6, training saves at batch 8 and 9; batch 8's may not push 6's out."""
    fit(tmp_path, ResumableCheckpoint(every_n_batches=3))
    newest, previous = (
        find(tmp_path) for find in (ResumableCheckpoint.path_in, ResumableCheckpoint.previous_in)
    )
    newest.write_bytes(b"damaged")
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            seen.append((step_of(previous), newest.read_bytes() == b"damaged"))

    fit(tmp_path, ResumableCheckpoint(every_n_batches=3), Look(), ckpt_path=previous, max_epochs=3)
    assert seen[:4] == [(6, True), (6, True), (6, False), (8, False)]
    assert (step_of(newest), step_of(previous)) == (12, 9)


class FullDisk(Callback):
    """No file may grow beyond a few bytes at certain batches."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        full = trainer.fit_loop.epoch_loop.total_batch_idx in self.batches
        limit = 100 if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def on_exception(self, *args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def test_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    saved = Saved()
    with pytest.warns(UserWarning, match=r"goes on") as caught:
        fit(tmp_path, ResumableCheckpoint(every_n_batches=2), FullDisk(3, 4, 5), saved)
    text = next(str(w.message) for w in caught if "goes on" in str(w.message))
    newest = ResumableCheckpoint.path_in(tmp_path)
    assert f"{newest} could not be written (File too large), " in text
    assert "bytes are free there" in text
    assert " are needed" in text
    assert f"the last good checkpoint is {newest}" in text
    assert saved.batches == [2, 4, 6, 8]
    assert (step_of(newest), step_of(ResumableCheckpoint.previous_in(tmp_path))) == (8, 2)
    assert {path.name for path in newest.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_what_cannot_be_saved_is_not_reported_as_saved(tmp_path: Path) -> None:
    class Send(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == 5:
                signal.raise_signal(signal.SIGTERM)

    for name, part, callbacks in (
        ("signal", "stopping on SIGTERM, the run could not be saved", [Send(), FullDisk(5)]),
        ("end", "at its end, the run could not be saved", [FullDisk(7)]),
    ):
        with pytest.raises(NotWrittenError) as caught:
            fit(tmp_path / name, ResumableCheckpoint(), *callbacks)
        newest = ResumableCheckpoint.path_in(tmp_path / name)
        for expected in (part, f"the last good checkpoint is {newest}", "--run.resume true"):
            assert expected in str(caught.value)
        assert step_of(newest) == 4
        assert [path.name for path in newest.parent.iterdir()] == ["last.ckpt"]


def test_the_one_before_gives_way_where_there_is_room_for_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, keep = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    save = torch.save

    def limited(checkpoint: Any, file: Any) -> None:
        if keep.exists():
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"step": step}, path, {"keep": keep})
    monkeypatch.setattr(torch, "save", limited)
    monkeypatch.setattr("callbacks.checkpoint._size_of", lambda checkpoint: 1)
    with pytest.warns(UserWarning, match=r"previous\.ckpt was removed to write .*last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"step": 3}, path, {"keep": keep})
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert torch.load(keep, weights_only=True) == {"step": 2}


def test_broken_weights_are_never_saved(tmp_path: Path) -> None:
    """The loss of batch 5 is finite, its gradients are not; a checkpoint is due before the next loss."""

    class Break(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == 5:
                module.generator[0].weight.data[0, 0] = torch.inf

    with pytest.raises(
        NonFiniteLossError, match=r"generator\.0\.weight.*epoch 1, batch 1; the last good"
    ):
        fit(tmp_path, Break(), FiniteGuard(), ResumableCheckpoint(every_n_batches=2))
    assert step_of(ResumableCheckpoint.path_in(tmp_path)) == 4
