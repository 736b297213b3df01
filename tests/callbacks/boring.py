"""The smallest module with two hand-stepped networks, and data for it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_modules.adversarial import AdversarialModule

LATENT = 4


class BoringGAN(AdversarialModule):
    """Batch norm and dropout in the generator, so that buffers and random numbers matter."""

    def __init__(self, lr: float = 1e-2, sleep_rank: int = -1, sleep: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.sleep_rank, self.sleep = lr, sleep_rank, sleep
        self.generator = nn.Sequential(
            nn.Linear(LATENT, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 64)
        )
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))

    def build_optimizers(self) -> dict[str, Optimizer]:
        return {
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), lr=self.lr),
            "generator": torch.optim.Adam(self.generator.parameters(), lr=self.lr),
        }

    def decode(self, latent: Tensor) -> Tensor:
        return torch.sigmoid(self.generator(latent)).view(-1, 1, 8, 8)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.global_rank == self.sleep_rank:
            time.sleep(self.sleep)
        fake = self.decode(self.draw("latent", "normal", len(batch["image"]), LATENT))
        with self.update("discriminator") as minimize:
            real_loss = -self.discriminator(batch["image"]).mean()
            minimize(real=real_loss, fake=self.discriminator(fake.detach()).mean())
        with self.update("generator") as minimize:
            minimize(generator=-self.discriminator(fake).mean())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        score = self.discriminator(batch["image"]).mean()
        self.log("val/score/mean", score, batch_size=len(batch["image"]), sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/score/mean", self.discriminator(batch["image"]).mean(), batch_size=4)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        return {
            "decision": ["unknown" if i % 4 == 0 else "known" for i in batch["index"].tolist()],
            "score": batch["image"].flatten(1).mean(1),
            "rank": torch.full((len(batch["index"]),), self.global_rank),
        }

    def image_grid(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        latent = torch.randn(len(batch["image"]), LATENT)
        return {"input": batch["image"], "generated": self.decode(latent)}


class BoringImages(Dataset):
    """Constant 8x8 images of value index / length."""

    def __init__(self, length: int = 16, sleep: float = 0.0) -> None:
        self.length, self.sleep = length, sleep

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.sleep)
        image = torch.full((1, 8, 8), index / self.length)
        return {"image": image, "label": index % 2, "index": index}


def loader(length: int = 16, batch_size: int = 4) -> DataLoader:
    return DataLoader(BoringImages(length), batch_size)


def boring_trainer(directory: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": directory,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**defaults, **options})


def assert_one_and_two_agree(folder: Path, table: str, rows: int) -> None:
    """Compares the table that one process wrote below ``one`` with that of two processes below ``two``."""
    one, two = (
        (folder / name / "tables" / table).read_text().splitlines() for name in ("one", "two")
    )
    assert len(one) == 1 + rows
    for mine, theirs in zip(one[1:], two[1:], strict=True):
        for a, b in zip(mine.split(","), theirs.split(","), strict=True):
            assert a == b or float(a) == pytest.approx(float(b), abs=1e-6)
