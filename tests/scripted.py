"""Modules trained on exactly the batches of a golden case."""

import logging
import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    """The batches of a case, row by row; also the training bank a module asks for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {"image": self.images[index], "label": self.labels[index], "index": index}


class Pairs(Dataset):
    """Unpaired batches of a case, as two domains with images in [0, 1]."""

    def __init__(self, images_a: Tensor, images_b: Tensor) -> None:
        self.images = {"a": images_a, "b": images_b}

    def __len__(self) -> int:
        return len(self.images["a"])

    def __getitem__(self, index: int) -> dict[str, dict[str, Tensor | int]]:
        return {
            side: {"image": images[index], "index": index} for side, images in self.images.items()
        }


def fit_one_epoch(module: LightningModule, rows: Any, batch_size: int | None) -> None:
    """One epoch over the rows in their order, without a word; without a batch size every row is a batch."""
    level = logging.getLogger("lightning.pytorch").level
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, DataLoader(rows, batch_size))
    finally:
        logging.getLogger("lightning.pytorch").setLevel(level)
