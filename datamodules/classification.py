"""Classification: all classes of an image set."""

from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.base import AdversariaDataModule
from datamodules.datasets import (
    ImageArrayDataset,
    read_pictures_to_predict,
)
from datamodules.sources import class_names_of, draw_per_class, open_source, prepare_source
from lightning_modules.arguments import demand_at_least


class ClassificationDataModule(AdversariaDataModule):
    """An image set with all of its classes.

    - Training: training images without a held-out part.
    - Validation: that held-out part, drawn in the same way in every run, whatever its seed.
    - Test: all test images.

    Args:
        dataset: a name of :mod:`datamodules.sources`.
        root: folder of the data. ``digits`` needs none.
        image_size: side of the images in pixels.
        batch_size: training batch over all processes together.
        eval_batch_size: batch of one process in validation, test and prediction.
        num_workers: loader processes.
        val_fraction: share of each class held out for validation.
        training_images: read the training half. Without it there is no validation, and no image in any batch of a
            training: all that is needed is a test set, in ``ROOT/test/CLASS`` of an ``image_folder``.
        horizontal_flip: mirror training images with probability 1/2.
        crop_padding: cut training images out of ones that were padded by so many black pixels on each side.
        download: fetch what is missing into ``root``.
        train_limit: use at most so many training images per class.
        test_limit: use at most so many test images per class.
        predict_folder: ``predict`` runs on the pictures below this folder; null: on the test images.

    Raises:
        ValueError: arguments that cannot be met, or a module that needs images where none are read.
        FileNotFoundError: data are missing.
        RuntimeError: damaged data.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str = "data",
        image_size: int = 32,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        training_images: bool = True,
        horizontal_flip: bool = False,
        crop_padding: int = 0,
        download: bool = False,
        train_limit: int | None = None,
        test_limit: int | None = None,
        predict_folder: str | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size,
            num_workers,
            horizontal_flip,
            image_size if crop_padding else None,
        )
        demand_at_least(1, image_size=image_size, train_limit=train_limit, test_limit=test_limit)
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction} is a fraction between 0 and 1; use e.g. 0.1"
            )
        if crop_padding < 0:
            raise ValueError(f"crop_padding={crop_padding} must not be negative")
        self.save_hyperparameters()
        self.dataset = dataset
        self.root = root
        self.image_size = image_size
        self.val_fraction = val_fraction
        self.training_images = training_images
        self.crop_padding = crop_padding
        self.download = download
        self.train_limit = train_limit
        self.test_limit = test_limit
        self.predict_folder = predict_folder
        # Raises for a name that is none.
        self.class_names: list[str] = class_names_of(dataset) or []
        self._counts: dict[str, int] = {}

    @property
    def split_info(self) -> dict[str, Any]:
        """What was evaluated, in plain values for results and checkpoints."""
        return {"dataset": self.dataset, "protocol": "all classes", "counts": dict(self._counts)}

    def check_files(self, stage: TrainerFn | None) -> None:
        """Downloads if asked to, and makes sure that all files are there before anything starts."""
        if self.training_images and stage not in (TrainerFn.TESTING, TrainerFn.PREDICTING):
            prepare_source(self.dataset, self.root, train=True, download=self.download)
        if stage != TrainerFn.VALIDATING:
            prepare_source(self.dataset, self.root, train=False, download=self.download)

    def open_folder(self, folder: str) -> Any:
        """The pictures of a folder, squeezed to the size of the images."""
        return read_pictures_to_predict(folder, self.image_size, self.class_names)

    def open_parts(self, stage: str | None) -> None:
        """Reads what the stage needs; what was read before is kept."""
        fits = stage in ("fit", "validate", None)
        if fits and self.training_images and self.train is None:
            self._read_training_half()
        needs_test = stage in ("test", "predict", None) or not self.training_images
        if needs_test and self.test is None:
            self.test = self._read(train=False, limit=self.test_limit)[0]
            self._counts["test"] = len(self.test)

    def _read_training_half(self) -> None:
        whole, labels = self._read(train=True, limit=None)
        rest, held_out = draw_per_class(labels, self.val_fraction, f"{self.dataset} holdout")
        if self.train_limit is not None:
            _, kept = draw_per_class(labels[rest], self.train_limit, f"{self.dataset} train limit")
            rest = rest[kept]
        images = whole.images[rest]
        if self.crop_padding:
            images = torch.nn.functional.pad(images, [self.crop_padding] * 4)
        self.train = ImageArrayDataset(images, labels[rest], self.class_names)
        self.val = ImageArrayDataset(whole.images[held_out], labels[held_out], self.class_names)
        self._counts |= {"train": len(self.train), "val": len(self.val)}

    def _read(self, train: bool, limit: int | None) -> tuple[ImageArrayDataset, torch.Tensor]:
        source = open_source(self.dataset, self.root, train)
        self.class_names = list(source.class_names)
        chosen = torch.arange(len(source.labels))
        if limit is not None:
            _, chosen = draw_per_class(source.labels, limit, "test limit")
        labels = source.labels[chosen]
        images = source.read(chosen, self.image_size)
        return ImageArrayDataset(images, labels, self.class_names), labels
