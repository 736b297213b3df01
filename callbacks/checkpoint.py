"""Checkpoints that a run can be continued from exactly, written whole or not at all, also on a scheduler's signal."""

import os
import re
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
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_modules.files import NotWrittenError, UnreadableError, read_tensors, whole_file
from lightning_modules.nn.statistics import gather_over_ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the job script requeues on it


class Preempted(Exception):
    """The scheduler asked for the machine; everything is saved. ``train.py`` turns it into exit code 75."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place and renames it, so that a kill never leaves half a file.

    Lightning's own writer prepares the file in the temporary directory; moving it from there is a copy
    when that is another file system. Reading checks every byte, see :func:`read_tensors`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves ``checkpoint`` to the local file ``path``.

        Args:
            checkpoint: what to save.
            path: of the file.
            storage_options: perhaps ``{"keep": PATH}``, where the file that is replaced goes. If there is not room for
                three files, the one at ``PATH`` gives way; the one that is replaced stays until the new one is whole.

        Raises:
            NotWrittenError: there is not room for it, or the folder cannot be written; what was there is as it was.
        """
        final, keep = Path(path), (storage_options or {}).get("keep")
        try:
            self._write(checkpoint, final, keep)
        except NotWrittenError:
            if keep is None or not (keep.exists() and final.exists()):
                raise
            keep.unlink()
            self._write(checkpoint, final, keep)
            rank_zero_warn(
                f"not enough space for three checkpoints beside each other: {keep} was removed to write {final}"
            )

    def _write(self, checkpoint: dict[str, Any], path: Path, keep: Path | None) -> None:
        try:
            with whole_file(path, keep) as file:
                torch.save(checkpoint, file)
        except NotWrittenError as error:
            raise NotWrittenError(f"{error}, {_size_of(checkpoint):,} are needed") from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Reads the local file ``path`` to the CPU; nothing in it is run, whatever ``weights_only`` says."""
        return load_checkpoint(Path(path))


class _Counter:
    """A file that keeps nothing but its length."""

    length = 0

    def write(self, data: Any) -> int:
        self.length += len(data)
        return len(data)

    def flush(self) -> None: ...


def _size_of(checkpoint: dict[str, Any]) -> int:
    counter = _Counter()
    torch.save(checkpoint, counter)  # type: ignore[arg-type]
    return counter.length


class ResumableCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` in the run directory up to date, and saves and stops when the scheduler signals.

    The one before stays beside it as ``previous.ckpt``, to continue from when the newest cannot be read. Checkpoints
    are written at epoch ends and, if asked for, within epochs, but never at the last batch of an epoch: a run resumed
    from there would miss its epoch-end hooks. After SIGTERM or SIGUSR1 on any rank the current batch is finished, a
    checkpoint is written, and all ranks raise :class:`Preempted` together.

    When a checkpoint cannot be written, as on a full disk, the training goes on with a warning: the next one makes up
    for it, the last good one stays, and a job that ends here would lose what one that goes on may still save. Where
    there is no next one, at the end of the training and on a signal, that is an error: what is not saved must not be
    reported as saved, nor the job be requeued to do the same work again and again.

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
        self.tried_at = 0.0
        self.newest_is_good = False
        self.signalled: str | None = None
        self._stopping = False
        self._handlers: dict[signal.Signals, Any] = {}

    @staticmethod
    def path_in(run_directory: str | Path) -> Path:
        """Where the newest checkpoint of a run is."""
        return Path(run_directory) / "checkpoints" / "last.ckpt"

    @staticmethod
    def previous_in(run_directory: str | Path) -> Path:
        """Where the one before is."""
        return Path(run_directory) / "checkpoints" / "previous.ckpt"

    def last_good(self, trainer: Trainer) -> str:
        """Which checkpoint the run could be continued from, in words."""
        find = self.path_in if self.newest_is_good else self.previous_in
        path = find(trainer.default_root_dir)
        return (
            f"the last good checkpoint is {path}"
            if path.exists()
            else "no checkpoint was written yet"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that all ranks continue from the same checkpoint, which each has chosen for itself.

        Raises:
            RuntimeError: they do not.
        """
        chosen = gather_over_ranks(trainer, str(trainer.ckpt_path))
        if len(set(chosen)) > 1:
            raise RuntimeError(
                f"the processes continue from different checkpoints ({', '.join(sorted(set(chosen)))}), so some of "
                "them cannot read the newest; see that all machines see the same files"
            )
        newest = self.path_in(trainer.default_root_dir)
        self.newest_is_good = trainer.ckpt_path is not None and Path(trainer.ckpt_path) == newest

    # ------------------------------------------------------------------ signals
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the handlers, after Lightning's own, which would save in the middle of a batch."""
        self.tried_at = time.monotonic()
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
            late = time.monotonic() - self.tried_at > 60 * self.every_minutes
            due |= trainer.strategy.broadcast(late)
        self._stopping = self.stop_requested(trainer)
        if due or self._stopping:
            self._save(trainer, final=self._stopping)

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
            self._save(trainer, final=last or self._stopping)
        if (
            self.keep_epochs is not None
            and epoch % self.keep_epochs == 0
            and not is_debug_run(trainer)
        ):
            newest = self.path_in(trainer.default_root_dir)
            self._write(trainer, newest.with_name(f"epoch-{epoch:03d}.ckpt"), final=False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops between epochs."""
        if self._stopping:
            self.raise_preempted()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the previous handlers back; stops before the test when the signal came in the last epoch."""
        self._restore_handlers()
        if self._stopping:
            self.raise_preempted()

    def _save(self, trainer: Trainer, final: bool) -> None:
        if is_debug_run(trainer):
            return
        path = self.path_in(trainer.default_root_dir)
        # A newest one that could not be read is replaced; keeping it would cost the one before, which could.
        keep = self.previous_in(trainer.default_root_dir) if self.newest_is_good else None
        written = self._write(trainer, path, final, keep)
        self.newest_is_good |= written
        self.tried_at = time.monotonic()
        if self._stopping:
            rank_zero_info(f"{self.signalled or 'signal'}: saved {path}, stopping")

    def _write(self, trainer: Trainer, path: Path, final: bool, keep: Path | None = None) -> bool:
        """Writes a checkpoint; False on all ranks if it could not be written."""
        failure: str | None = None
        try:
            trainer.save_checkpoint(path, weights_only=False, storage_options={"keep": keep})
        except NotWrittenError as error:
            # Rank 0 alone writes, and the others wait for it in there.
            trainer.strategy.barrier()
            failure = str(error)
        failure = trainer.strategy.broadcast(failure)
        if failure is None:
            return True
        kept = self.last_good(trainer)
        if not final:
            rank_zero_warn(
                f"{failure}; {kept}. The training goes on and saves when the next is due"
            )
            return False
        reason = f"stopping on {self.signalled or 'a signal'}" if self._stopping else "at its end"
        raise NotWrittenError(
            f"{reason}, the run could not be saved: {failure}; {kept}, what was done since then is lost. "
            "Free some space, then continue with --run.resume true"
        )


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
        UnreadableError: if it is damaged or something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; --ckpt_path takes the path of a .ckpt file"
        )
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict):
        raise UnreadableError(
            f"{path} is not a readable checkpoint: it holds a {type(checkpoint).__name__}"
        )
    return checkpoint


def newest_readable(run_directory: str | Path) -> Path | None:
    """The checkpoint to continue a run from: the newest, or where that cannot be read the one before, and so on.

    Returns:
        Its path; None if the run has none yet.

    Raises:
        UnreadableError: there are some, but none can be read; all are left as they are.
    """
    newest = ResumableCheckpoint.path_in(run_directory)
    kept = {
        int(name[1]): path
        for path in newest.parent.glob("epoch-*.ckpt")
        if (name := re.fullmatch(r"epoch-(\d+)\.ckpt", path.name))
    }
    problems = []
    for path in (
        newest,
        ResumableCheckpoint.previous_in(run_directory),
        *(kept[epoch] for epoch in sorted(kept, reverse=True)),
    ):
        try:
            load_checkpoint(path)
        except FileNotFoundError:
            continue
        except UnreadableError as error:
            problems.append(str(error))
            continue
        if path != newest:
            reason = "; ".join(problems) or f"there is no {newest} any more"
            rank_zero_warn(f"{reason}. The run continues from the one before, {path}")
        return path
    if problems:
        raise UnreadableError(
            f"no checkpoint of this run can be read: {'; '.join(problems)}. Nothing was changed; bring one back from "
            "a copy, or begin anew under another --run.name"
        )
    return None


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
