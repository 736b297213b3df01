"""What every DataModule here shares: loaders that resume exactly, and floats made on the device."""

import warnings
from typing import Any, ClassVar, NoReturn

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.datasets import BatchDataset, Positions, pictures_to_predict, unit_interval
from datamodules.sampler import ShardedSampler
from lightning_modules.arguments import demand_at_least
from lightning_modules.randomness import keyed_generator


def _whole_batch(batch: Any) -> Any:
    """Collate function for datasets whose ``__getitems__`` already returns a batch."""
    return batch


PARTS = ("train", "val", "test")


def parts_of(stage: TrainerFn | str | None) -> tuple[str, ...]:
    """The parts of a data set that a stage needs; all of them for no stage in particular."""
    return {
        "fit": ("train", "val"),
        "validate": ("val",),
        "test": ("test",),
        "predict": ("test",),
    }.get(str(getattr(stage, "value", stage)), PARTS)


class AdversariaDataModule(LightningDataModule):
    """Loaders over images in memory, with the same batches for any number of processes.

    Subclasses build ``train``, ``val`` and ``test`` in :meth:`open_parts` and, of ``predict_folder``, ``pictures``
    in :meth:`open_folder`; or they wrap other datasets with :meth:`train_loader` and :meth:`eval_loader`. The
    order of the training images and their augmentation are functions of (global seed, epoch,
    batch), so a run that resumes in the middle of an epoch sees what it would have seen.

    A batch reaches the module as a dict of ``image`` (floating point [B, C, H, W] in [0, 1], in the
    module's dtype), ``label`` and ``index`` (int64 [B]). A batch may also hold several such dicts by
    name, as ``a`` and ``b``; each is then cropped and mirrored by draws of its own.

    A module may offer ``needs_images(epoch) -> bool``; in epochs for which it is false its batches hold ``index``
    alone, so that it cannot see an image however it is written.

    Args:
        batch_size: training batch over all processes together; it must be divisible by their
            number.
        eval_batch_size: batch of one process in validation, test and prediction; it does not change
            any result.
        num_workers: loader processes; images in memory rarely need any.
        horizontal_flip: mirror training images with probability 1/2.
        random_crop: side of the square that is cut out of each training image at a random place.
            Where a batch has ``size`` (a list of (height, width)), the image fills that much of its
            padded upper left corner.

    Raises:
        ValueError: a size below 1 or a negative number of workers.
    """

    train: Any = None
    val: Any = None
    test: Any = None
    pictures: Any = None
    predict_folder: str | None = None
    training_images: bool = True
    """Without them there is nothing to train on or to validate on, and every batch of a training holds ``index``."""

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        horizontal_flip: bool = False,
        random_crop: int | None = None,
    ) -> None:
        super().__init__()
        demand_at_least(
            1, batch_size=batch_size, eval_batch_size=eval_batch_size, random_crop=random_crop
        )
        demand_at_least(0, num_workers=num_workers)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.horizontal_flip = horizontal_flip
        self.random_crop = random_crop

    @property
    def predicts_folder(self) -> bool:
        """Whether the trainer is predicting the pictures of ``predict_folder``."""
        predicts = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        return predicts and self.predict_folder is not None

    def prepare_data(self) -> None:
        """Makes sure that all files are there before anything starts, those of ``predict_folder`` for its prediction.

        Raises:
            FileNotFoundError: data are missing.
        """
        if self.predicts_folder:
            assert self.predict_folder is not None
            pictures_to_predict(self.predict_folder)
        else:
            self.check_files(None if self.trainer is None else self.trainer.state.fn)

    def setup(self, stage: str | None = None) -> None:
        """Opens what the stage needs; what was opened before is kept."""
        if stage != "predict" or self.predict_folder is None:
            self.open_parts(stage)
        elif self.pictures is None:
            self.pictures = self.open_folder(self.predict_folder)

    def check_files(self, stage: TrainerFn | None) -> None:
        """Makes sure that the files of the data set are there, downloads them if asked to."""

    def open_parts(self, stage: str | None) -> None:
        """Opens ``train``, ``val`` and ``test`` as far as the stage needs them and they are not open."""

    def open_folder(self, folder: str) -> BatchDataset:
        """The pictures of a folder, to be predicted."""
        raise NotImplementedError

    def train_dataloader(self) -> Any:
        """Shuffled ``train``, or batches without images.

        Raises:
            ValueError: the module needs images and ``training_images`` is false.
        """
        needs = None
        if self.trainer is not None:
            needs = getattr(self.trainer.lightning_module, "needs_images", None)
        epoch = self._epoch_to_come()
        if needs is not None and not needs(epoch):
            return self.train_loader(Positions(self.batch_size))
        if not self.training_images:
            raise ValueError(
                f"epoch {epoch} learns from training images, and --data.training_images is false"
            )
        assert self.train is not None, "setup('fit') comes first"
        return self.train_loader(self.train)

    def val_dataloader(self) -> Any:
        """``val``, in order; nothing without training images."""
        if not self.training_images:
            return []
        assert self.val is not None, "setup('fit') comes first"
        return self.eval_loader(self.val)

    def test_dataloader(self) -> Any:
        """``test``, in order."""
        assert self.test is not None, "setup('test') comes first"
        return self.eval_loader(self.test)

    def predict_dataloader(self) -> Any:
        """The pictures of ``predict_folder``, or ``test`` without one."""
        pictures = self.test if self.predict_folder is None else self.pictures
        assert pictures is not None, "setup('predict') comes first"
        return self.eval_loader(pictures)

    def train_loader(self, dataset: BatchDataset) -> DataLoader:
        """Shuffled global batches, from where the trainer stands.

        A module may offer ``batches_in_epoch(epoch) -> int | None`` to have an epoch of so many batches, whatever the
        size of the set; the trainer then makes loaders anew for every epoch (``reload_dataloaders_every_n_epochs``).

        Raises:
            ValueError: the global batch cannot be divided over the processes, or exceeds the set.
        """
        epoch, batches = self._epoch_to_come(), None
        if self.trainer is not None:
            wanted = getattr(self.trainer.lightning_module, "batches_in_epoch", None)
            batches = None if wanted is None else wanted(epoch)
        if batches is None and len(dataset) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} exceeds the {len(dataset)} training images, so "
                f"there is no complete batch; use --data.batch_size {len(dataset)} or less"
            )
        world, rank = self._processes()
        sampler = self.train_sampler(dataset, world, rank, batches)
        sampler.set_epoch(epoch)
        local_batch = self.batch_size // world
        if self.trainer is not None:
            # Lightning restarts every epoch at its first sample.
            fit_loop = self.trainer.fit_loop
            progress = fit_loop.epoch_loop.batch_progress
            if fit_loop.restarting and progress.current.ready and not progress.is_last_batch:
                done = progress.current.ready % (len(sampler) // local_batch)
                sampler.skip = done * local_batch
                warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
        return self._loader(dataset, local_batch, sampler)

    def train_sampler(
        self, dataset: BatchDataset, world: int, rank: int, batches: int | None
    ) -> ShardedSampler:
        """Says which rows of ``dataset`` this process sees, and in which order."""
        return ShardedSampler(dataset, self.batch_size, world, rank, batches=batches)

    def eval_loader(self, dataset: BatchDataset, batch_size: int | None = None) -> DataLoader:
        """Each image once, in order, spread over the processes.

        Args:
            dataset: the images.
            batch_size: of one process; None for ``eval_batch_size``.

        Raises:
            ValueError: there are fewer images than processes.
        """
        world, rank = self._processes()
        if len(dataset) < world:
            raise ValueError(
                f"{len(dataset)} images cannot be spread over {world} processes; use "
                f"--trainer.devices {max(len(dataset), 1)} or fewer"
            )
        batch_size = self.eval_batch_size if batch_size is None else batch_size
        sampler = ShardedSampler(dataset, batch_size, world, rank, shuffle=False, drop_last=False)
        return self._loader(dataset, batch_size, sampler)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turns bytes to floats in [0, 1] of the module's dtype; augments training batches."""
        if not isinstance(batch, dict):
            return batch
        if "image" in batch:
            return self._floats(batch, "")
        return {
            name: self._floats(part, f" {name}") if isinstance(part, dict) else part
            for name, part in batch.items()
        }

    def _floats(self, batch: dict[str, Any], key: str) -> dict[str, Any]:
        """A batch whose augmentation draws are those of ``key``."""
        if "image" not in batch or batch["image"].dtype != torch.uint8:
            return batch
        trainer = self.trainer
        dtype = torch.float32 if trainer is None else trainer.lightning_module.dtype
        assert isinstance(dtype, torch.dtype)
        batch, images = dict(batch), batch["image"]
        training = trainer is not None and trainer.training
        sizes = batch.pop("size", None) if training else None
        if self.random_crop is not None and training:
            images = self._crop(images, self.random_crop, sizes, key)
        images = unit_interval(images, dtype)
        if self.horizontal_flip and training:
            images = self._flip(images, key)
        if "counterpart" in batch:
            batch["counterpart"] = unit_interval(batch["counterpart"], dtype)
        return {**batch, "image": images}

    def _crop(
        self, images: Tensor, side: int, sizes: list[tuple[int, int]] | None, key: str
    ) -> Tensor:
        height, width = images.shape[-2:]
        sizes = sizes or [(height, width)] * len(images)
        drawn = self._uniform(f"random crop{key}", len(images), 2).tolist()
        pieces = []
        for image, (height, width), (down, right) in zip(images, sizes, drawn, strict=True):
            top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
            pieces.append(image[:, top : top + side, left : left + side])
        return torch.stack(pieces)

    def _flip(self, images: Tensor, key: str) -> Tensor:
        chosen = self._uniform(f"horizontal flip{key}", len(images))
        mirrored = (chosen < 0.5).to(images.device, non_blocking=True)
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)

    def _uniform(self, purpose: str, local: int, *shape: int) -> Tensor:
        """This process's rows [local, *shape] of what is drawn in [0, 1) for the global batch."""
        trainer = self.trainer
        assert trainer is not None
        world, rank = self._processes()
        # The counter moves on after the transfer, so it still is the number of this batch.
        batch_idx = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        generator = keyed_generator(purpose, trainer.current_epoch, batch_idx)
        drawn = torch.rand(world * local, *shape, generator=generator)
        return drawn[rank * local : (rank + 1) * local]

    def _epoch_to_come(self) -> int:
        if self.trainer is None:
            return 0
        # Lightning sets the epoch only after the workers have begun to prefetch.
        return self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]

    def _processes(self) -> tuple[int, int]:
        """Number of processes and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(
        self, dataset: BatchDataset, batch_size: int, sampler: ShardedSampler
    ) -> DataLoader:
        if self.num_workers == 0:
            # Taking rows of an array in memory is faster than any worker could hand them over.
            warnings.filterwarnings(
                "ignore", ".*does not have many workers", category=PossibleUserWarning
            )
        if self.trainer is not None:
            on_gpu = self.trainer.strategy.root_device.type == "cuda"
        else:
            on_gpu = torch.cuda.is_available()
        return DataLoader(
            dataset,
            # By name: Lightning makes the loader anew for prediction from what it was given.
            batch_size=batch_size,
            sampler=sampler,
            drop_last=sampler.drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=on_gpu,
            collate_fn=_whole_batch,
            # An own generator, or every new iterator would take a number out of the global stream.
            generator=keyed_generator("loader"),
        )


class EvaluationDataModule(AdversariaDataModule):
    """Data for ``train.py test`` alone."""

    holds: ClassVar[str]
    """What there is, for the message."""

    def train_dataloader(self) -> NoReturn:
        """Raises ValueError: there is nothing to train on."""
        self._refuse()

    def val_dataloader(self) -> NoReturn:
        """Raises ValueError: there is nothing to validate on."""
        self._refuse()

    def predict_dataloader(self) -> NoReturn:
        """Raises ValueError: there is nothing to predict."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} holds {self.holds}, none to train, validate or predict on; use train.py test"
        )
