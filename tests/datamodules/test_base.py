from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from datamodules.base import AdversariaDataModule
from datamodules.datasets import ImageArrayDataset


class SmallData(AdversariaDataModule):
    """43 random images: 4 batches of 10 and a rest."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (43, 3, 4, 4), dtype=torch.uint8, generator=generator)
        self.data = ImageArrayDataset(images, torch.zeros(43).long(), ["only"])

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.data)

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(self.data)


class Recorder(LightningModule):
    """Remembers the training batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[int]]] = []
        self.images: list[Tensor] = []
        self.validation: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch["index"].tolist()))
        self.images.append(batch["image"])
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(Callback):
    """Saves after one batch, and stops there."""

    def __init__(self, epoch: int, batch: int, path: str) -> None:
        self.when, self.path = (epoch, batch), path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == self.when:
            trainer.save_checkpoint(self.path)
            raise KilledError


class KilledError(Exception):
    pass


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(*callbacks: Callback, **kwargs: Any) -> Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "default_root_dir": tmp_path,
            "max_epochs": 3,
            "callbacks": list(callbacks),
        }
        return Trainer(**{**settings, **kwargs})

    return make


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (1, 1), (1, 2)])
def test_a_run_killed_within_an_epoch_continues_with_the_next_batch(
    epoch: int, batch: int, workers: int, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    whole = Recorder()
    make_trainer().fit(whole, datamodule=SmallData(10, horizontal_flip=True))
    path = str(tmp_path / "killed.ckpt")
    first = Recorder()
    with pytest.raises(KilledError):
        make_trainer(SaveAt(epoch, batch, path)).fit(
            first, datamodule=SmallData(10, num_workers=workers, horizontal_flip=True)
        )
    second = Recorder()
    make_trainer().fit(
        second,
        datamodule=SmallData(10, num_workers=workers, horizontal_flip=True),
        ckpt_path=path,
    )
    assert len(whole.seen) == 12
    assert first.seen + second.seen == whole.seen
    for resumed, expected in zip(first.images + second.images, whole.images, strict=True):
        assert torch.equal(resumed, expected)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("at_train_end", [True, False])
def test_a_run_resumed_at_the_end_of_an_epoch_continues_with_the_next(
    at_train_end: bool, workers: int, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    whole = Recorder()
    make_trainer().fit(whole, datamodule=SmallData(10))
    first, second = Recorder(), Recorder()
    save = ModelCheckpoint(
        tmp_path, filename="end", save_top_k=-1, save_on_train_epoch_end=at_train_end
    )
    make_trainer(save, max_epochs=2).fit(first, datamodule=SmallData(10, num_workers=workers))
    make_trainer().fit(
        second,
        datamodule=SmallData(10, num_workers=workers),
        ckpt_path=save.best_model_path or str(save.last_model_path),
    )
    assert first.seen + second.seen == whole.seen


def test_a_second_fit_starts_its_epoch_anew(make_trainer: Callable[..., Trainer]) -> None:
    """After a stop within an epoch that was no kill, Lightning begins the epoch again; so do we."""
    module, data = Recorder(), SmallData(10)
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(module, datamodule=data)
    assert [len(indices) for _, _, indices in module.seen] == [10] * 6
    assert [batch for _, batch, _ in module.seen] == [0, 1, 0, 1, 2, 3]


def test_batches_reach_the_module_as_floats_of_its_precision(
    make_trainer: Callable[..., Trainer],
) -> None:
    for precision, dtype in (("32-true", torch.float32), ("64-true", torch.float64)):
        module, data = Recorder(), SmallData(10)
        make_trainer(max_epochs=1, precision=precision).fit(module, datamodule=data)
        expected = data.data.batch(module.seen[0][2], dtype=dtype)["image"]
        assert module.images[0].dtype == dtype
        assert torch.equal(module.images[0], expected)
        assert module.validation[0]["image"].dtype == dtype


def test_flips_concern_half_of_the_training_images_and_no_other(
    make_trainer: Callable[..., Trainer],
) -> None:
    module, data = Recorder(), SmallData(10, horizontal_flip=True)
    make_trainer().fit(module, datamodule=data)
    flipped = 0
    by_epoch: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for (epoch, _, indices), images in zip(module.seen, module.images, strict=True):
        plain = data.data.batch(indices)["image"]
        for image, original in zip(images, plain, strict=True):
            mirrored = torch.equal(image, original.flip(-1))
            assert mirrored or torch.equal(image, original)
            by_epoch[epoch].append(mirrored)
            flipped += mirrored
    assert 40 <= flipped <= 80
    assert by_epoch[0] != by_epoch[1]
    for batch in module.validation:
        assert torch.equal(batch["image"], data.data.batch(batch["index"])["image"])


class TwoRanks:
    """As much of a trainer as the loaders and the flip read, for one of two processes."""

    def __init__(self, trainer: Trainer, rank: int) -> None:
        self.fit_loop, self.strategy = trainer.fit_loop, trainer.strategy
        self.lightning_module, self.training, self.current_epoch = Recorder(), True, 0
        self.world_size, self.global_rank = 2, rank


def test_two_processes_see_the_halves_of_what_one_sees(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer(max_epochs=1)
    one = Recorder()
    trainer.fit(one, datamodule=SmallData(10, horizontal_flip=True))
    trainer = make_trainer()  # at the start of its first epoch
    halves = []
    for rank in range(2):
        data = SmallData(10, horizontal_flip=True)
        data.trainer = TwoRanks(trainer, rank)  # type: ignore[assignment]
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        halves.append(data.on_after_batch_transfer(batch, 0))
        assert len(data.train_dataloader()) == 4
        assert isinstance(data.train_dataloader().sampler, DistributedSampler)
    assert torch.cat([half["index"] for half in halves]).tolist() == one.seen[0][2]
    assert torch.equal(torch.cat([half["image"] for half in halves]), one.images[0])


def test_loaders_work_without_a_trainer() -> None:
    data = SmallData(10, eval_batch_size=20)
    data.setup("fit")
    assert [len(batch["index"]) for batch in data.train_dataloader()] == [10] * 4
    evaluated = [batch["index"] for batch in data.val_dataloader()]
    assert [len(index) for index in evaluated] == [20, 20, 3]
    assert torch.cat(evaluated).tolist() == list(range(43))


def test_making_an_iterator_leaves_the_global_stream_alone() -> None:
    data = SmallData(10)
    data.setup("fit")
    loader = data.train_dataloader()
    before = torch.random.get_rng_state()
    list(loader)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_warning_about_workers_or_resuming(
    make_trainer: Callable[..., Trainer], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = str(tmp_path / "killed.ckpt")
    with pytest.raises(KilledError):
        make_trainer(SaveAt(1, 1, path)).fit(Recorder(), datamodule=SmallData(10))
    make_trainer().fit(Recorder(), datamodule=SmallData(10), ckpt_path=path)
    messages = [str(warning.message) for warning in recwarn]
    assert not [m for m in messages if "many workers" in m or "not resumable" in m]


def test_sizes_that_cannot_work() -> None:
    refused: list[dict[str, Any]] = [
        {"batch_size": 0},
        {"eval_batch_size": -1},
        {"num_workers": -1},
    ]
    for arguments in refused:
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.* must be at least"):
            SmallData(**arguments)
    data = SmallData(44)
    data.setup("fit")
    with pytest.raises(ValueError, match="batch_size=44 exceeds the 43 training images"):
        data.train_dataloader()


def test_sizes_that_do_not_fit_the_processes(make_trainer: Callable[..., Trainer]) -> None:
    data = SmallData(9)
    data.setup("fit")
    data.trainer = TwoRanks(make_trainer(), 1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"cannot be divided over 2 processes.* 8 or 10"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="1 images cannot be spread over 2 processes"):
        data.eval_loader(data.data.subset([3]))
