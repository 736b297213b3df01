"""A module under the Trainer, step by step."""

import itertools
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks.finite import FiniteGuard


class Clock(Callback):
    """Notes when each batch ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        synchronize(self.device)
        self.stamps.append(time.perf_counter())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def between(stamps: list[float]) -> list[float]:
    """Seconds from each stamp to the next: those of all batches but the first one, which warms up."""
    return [second - first for first, second in itertools.pairwise(stamps)]


def seconds_under_trainer(
    module: LightningModule, batches: list[Any], device: torch.device
) -> list[float]:
    """Seconds of every batch but the first one, in one epoch."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            callbacks=[FiniteGuard(), clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return between(clock.stamps)
