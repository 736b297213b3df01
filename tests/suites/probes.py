"""Callbacks that look into a run of another process, or end it."""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.open_set import OpenSetDataModule


class StateDump(Callback):
    """Writes everything a rank ends its training with to ``folder/rankN.pt``."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "state": pl_module.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "global_step": trainer.global_step,
                "metrics": dict(trainer.callback_metrics),
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


class SignalAt(Callback):
    """Sends a signal to a rank at a certain batch, or at a certain call of a method of the module.

    ``wait`` seconds pass before.
    """

    def __init__(
        self,
        name: str,
        batch: int = -1,
        method: str = "",
        call: int = 1,
        rank: int = 0,
        wait: float = 0.0,
    ) -> None:
        self.number = signal.Signals[name]
        self.batch = batch
        self.method = method
        self.call = call
        self.rank = rank
        self.wait = wait

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        here = trainer.global_rank == self.rank
        if here and trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            time.sleep(self.wait)
            os.kill(os.getpid(), self.number)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.method:
            return
        original, calls = getattr(pl_module, self.method), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                os.kill(os.getpid(), self.number)
            return original(*args, **kwargs)

        setattr(pl_module, self.method, counted)


class FullDisk(Callback):
    """No file comes to the disk from the start of one batch to the start of another, both counted from 0."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.fsync = os.fsync

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        at = trainer.fit_loop.epoch_loop.total_batch_idx
        os.fsync = self._full if self.first <= at < self.last else self.fsync

    def _full(self, number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Poison(Callback):
    """Makes the first sample of a batch not a number; with ``draws`` the latents, where no data are looked at."""

    def __init__(self, batch: int, draws: bool = False) -> None:
        self.batch, self.draws = batch, draws

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx != self.batch:
            return
        for value in _tensors(batch):
            if value.is_floating_point():
                value[0] = torch.nan
        module: Any = pl_module
        draw = module.draw

        def poisoned(purpose: str, kind: Any, *shape: int) -> torch.Tensor:
            drawn = draw(purpose, kind, *shape)
            return drawn.fill_(torch.nan) if kind == "normal" else drawn

        if self.draws:
            module.draw = poisoned


def _tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch
    return (
        [t for part in parts for t in _tensors(part)]
        if isinstance(batch, dict | list | tuple)
        else []
    )


class PauseAt(Callback):
    """Lets a scheduler act at a certain moment: makes ``file`` and waits until that is taken away."""

    def __init__(self, file: str, batch: int = -1, test: bool = False) -> None:
        self.file = Path(file)
        self.batch = batch
        self.test = test

    def _pause(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self.file.touch()
            limit = time.monotonic() + 60
            while self.file.exists() and time.monotonic() < limit:
                time.sleep(0.01)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            self._pause(trainer)

    def on_test_batch_start(self, trainer: Trainer, *args: Any) -> None:
        done = self.file.with_suffix(".done")
        if self.test and trainer.is_global_zero and not done.exists():
            done.touch()
            self._pause(trainer)


class FailAt(Callback):
    """Lets rank 1 alone fail at a certain batch: by an exception, or by hanging."""

    def __init__(self, batch: int, how: str) -> None:
        self.batch = batch
        self.how = how

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            if self.how == "raise":
                raise KeyError("a bug of one rank")
            time.sleep(600)


class SleepIn(Callback):
    """Makes one rank slow: before its forward pass, after its last backward pass, or in its loader."""

    def __init__(self, rank: int, where: str, seconds: float) -> None:
        self.rank = rank
        self.where = where
        self.seconds = seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank != self.rank:
            return
        module: Any = pl_module
        if self.where == "data":
            data: Any = trainer.train_dataloader
            self._slow_down(data.dataset, "__getitems__", before=True)
        elif self.where == "forward":
            self._slow_down(module, "training_step", before=True)
        else:
            self._slow_down(module, "on_train_batch_end", before=True)

    def _slow_down(self, owner: Any, method: str, before: bool) -> None:
        original = getattr(owner, method)

        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(self.seconds)
            return original(*args, **kwargs)

        setattr(owner, method, slow)


class DataOnDisk(OpenSetDataModule):
    """Digits that pretend to lie in ``data.root``."""

    def prepare_data(self) -> None:
        if not Path(self.root).is_dir():
            raise FileNotFoundError(f"no digits at data.root={self.root}")


class BrokenLoss(Callback):
    """Makes a loss of rank 1 not a number, once."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            module: Any = pl_module
            name = next(iter(module.losses))
            module.losses[name] = torch.tensor(torch.nan)


class Trap(Callback):
    """Re-introduces a trap that the base class avoids, to show that the suites would notice."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module: Any = pl_module
        if self.name == "plain_backward":
            module.manual_backward = lambda loss: loss.backward()
        elif self.name == "drifting_buffers":
            module._average_batch_norm_statistics = lambda: None
        elif self.name == "unkeyed_noise":
            module.draw = lambda purpose, kind, *shape: (
                torch.randn if kind == "normal" else torch.rand
            )(*shape, dtype=module.dtype)
        else:
            raise ValueError(f"unknown trap {self.name!r}")
