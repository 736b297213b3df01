"""Checkpoints that a run can be continued from exactly, written whole or not at all, also on a scheduler's signal."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the job script requeues on it


class Preempted(Exception):
    """The scheduler asked for the machine; everything is saved. ``train.py`` turns it into exit code 75."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place and renames it, so that a kill never leaves half a file.

    Lightning's own writer prepares the file in the temporary directory; moving it from there is a copy
    when that is another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves ``checkpoint`` to the local file ``path``."""
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(final.name + ".partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)


class ResumableCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` in the run directory up to date, and saves and stops when the scheduler signals.

    Checkpoints are written at epoch ends and, if asked for, within epochs, but never at the last batch of an epoch: a
    run resumed from there would miss its epoch-end hooks. After SIGTERM or SIGUSR1 on any rank the current batch is
    finished, a checkpoint is written, and all ranks raise :class:`Preempted` together.

    Args:
        every_n_epochs: epochs between checkpoints; the last epoch is always saved.
        every_n_batches: also save every n batches, None for epoch ends alone.
        every_minutes: also save after so many minutes since the last one (rank 0's clock), None for not.
        keep_epochs: also keep ``epoch-NNN.ckpt`` for every n-th epoch, None for ``last.ckpt`` alone.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        every_n_batches: int | None = None,
        every_minutes: float | None = None,
        keep_epochs: int | None = None,
    ) -> None:
        for name, value in (
            ("every_n_epochs", every_n_epochs),
            ("every_n_batches", every_n_batches),
            ("every_minutes", every_minutes),
            ("keep_epochs", keep_epochs),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"checkpoint.{name} must be positive, not {value}")
        self.every_n_epochs = every_n_epochs
        self.every_n_batches = every_n_batches
        self.every_minutes = every_minutes
        self.keep_epochs = keep_epochs
        self.saved_at = 0.0
        self.signalled: str | None = None
        self._stopping = False
        self._handlers: dict[signal.Signals, Any] = {}

    @staticmethod
    def path_in(run_directory: str | Path) -> Path:
        """Where the newest checkpoint of a run is."""
        return Path(run_directory) / "checkpoints" / "last.ckpt"

    # ------------------------------------------------------------------ signals
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the handlers, after Lightning's own, which would save in the middle of a batch."""
        self.saved_at = time.monotonic()
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = signal.Signals(number).name

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Puts the previous handlers back."""
        self._restore_handlers()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's own handler would talk to the other processes from within the signal."""
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, _stop_at_once)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the previous handlers back."""
        self._restore_handlers()

    def stop_requested(self, trainer: Trainer) -> bool:
        """True on all ranks if any rank was signalled; a collective call."""
        return trainer.strategy.reduce_boolean_decision(self.signalled is not None, all=False)

    def raise_preempted(self) -> None:
        """Ends the run; to be called on all ranks together.

        Raises:
            Preempted: always.
        """
        raise Preempted(
            f"stopped on {self.signalled or 'a signal to another rank'}; "
            "everything is saved, continue with --run.resume true"
        )

    # ------------------------------------------------------------------ saving
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within an epoch when it is time or a signal came."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        due = self.every_n_batches is not None and done % self.every_n_batches == 0
        if self.every_minutes is not None:
            late = time.monotonic() - self.saved_at > 60 * self.every_minutes
            due |= trainer.strategy.broadcast(late)
        self._stopping = self.stop_requested(trainer)
        if due or self._stopping:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops here rather than at the end of the last batch, whose metrics are logged only after that."""
        if self._stopping:
            self.raise_preempted()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves at the end of an epoch; runs after the module's own epoch end."""
        epoch = trainer.current_epoch + 1
        self._stopping = self.stop_requested(trainer)
        last = epoch == trainer.max_epochs
        if epoch % self.every_n_epochs == 0 or last or self._stopping:
            self._save(trainer)
        if (
            self.keep_epochs is not None
            and epoch % self.keep_epochs == 0
            and not is_debug_run(trainer)
        ):
            last_path = self.path_in(trainer.default_root_dir)
            trainer.save_checkpoint(
                last_path.with_name(f"epoch-{epoch:03d}.ckpt"), weights_only=False
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops between epochs."""
        if self._stopping:
            self.raise_preempted()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the previous handlers back; stops before the test when the signal came in the last epoch."""
        self._restore_handlers()
        if self._stopping:
            self.raise_preempted()

    def _save(self, trainer: Trainer) -> None:
        if is_debug_run(trainer):
            return
        path = self.path_in(trainer.default_root_dir)
        trainer.save_checkpoint(path, weights_only=False)
        self.saved_at = time.monotonic()
        if self._stopping:
            rank_zero_info(f"{self.signalled or 'signal'}: saved {path}, stopping")


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise Preempted(
        f"stopped on {signal.Signals(number).name} outside the training, which needs no new checkpoint; "
        "continue with --run.resume true"
    )


@contextmanager
def signals_stop_at_once() -> Iterator[None]:
    """Where nothing is being trained, before it or in the test, SIGTERM and SIGUSR1 raise :class:`Preempted`."""
    before = {number: signal.signal(number, _stop_at_once) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def is_debug_run(trainer: Trainer) -> bool:
    """True for ``fast_dev_run``, which leaves nothing behind."""
    return bool(getattr(trainer, "fast_dev_run", False))


def find_checkpoint_callback(trainer: Trainer) -> ResumableCheckpoint | None:
    """The trainer's :class:`ResumableCheckpoint`, None without one."""
    found = (c for c in trainer.callbacks if isinstance(c, ResumableCheckpoint))  # type: ignore[attr-defined]
    return next(found, None)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint file to the CPU.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; --ckpt_path takes the path of a .ckpt file"
        )
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error


def refuse_other_hyperparameters(path: str | Path, hparams: dict[str, Any]) -> None:
    """Refuses to continue a checkpoint under other hyper-parameters than it was trained with.

    Raises:
        ValueError: naming each argument with both values.
    """
    remembered = load_checkpoint(path).get("hyper_parameters", {})
    differing = [
        f"{key}: configuration {value!r}, checkpoint {remembered[key]!r}"
        for key, value in hparams.items()
        if key in remembered and not _same(remembered[key], value)
    ]
    if differing:
        raise ValueError(
            f"cannot continue {path} with other hyper-parameters ({'; '.join(differing)}); "
            "give the checkpoint's values, or start a new run under another --run.name"
        )


def _same(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, tuple | list) else a == b
