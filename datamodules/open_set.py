"""Open-set data: training on known classes, testing on known and unknown ones."""

from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.base import AdversariaDataModule
from datamodules.datasets import (
    ImageArrayDataset,
    read_pictures_to_predict,
)
from datamodules.open_set_splits import (
    MIXED_SOURCES,
    PROTOCOLS,
    OSRSplit,
    duplicate_splits,
    osr_split,
    read_protocol_entry,
)
from datamodules.sources import (
    OpenSource,
    class_names_of,
    draw_per_class,
    open_source,
    prepare_source,
)
from lightning_modules.arguments import demand_at_least

MNIST_HOLDOUT = 5000


class OpenSetDataModule(AdversariaDataModule):
    """Known and unknown classes of an image set, by published or own class lists.

    - Training: training images of the known classes, without a held-out part, in the order of the
      source.
    - Validation: that held-out part, known classes only; thresholds may be chosen on it. Of MNIST,
      the last 5,000 training images (before the restriction to known classes), as in the paper;
      elsewhere a tenth of each known class, drawn in the same way in every run, whatever its seed.
    - Test: all test images. ``label`` is the rank of the class among the known ones, -1 if it is
      unknown. Known images come first. ``test_known`` and ``test_unknown`` are its two parts as
      datasets of their own.

    No image of an unknown class is in any part but the test. For ``cifar+10`` and ``cifar+50`` the
    known classes are CIFAR-10's and the unknown test images CIFAR-100's.

    Args:
        dataset: ``digits``, ``mnist``, ``fashion_mnist``, ``svhn``, ``cifar10``, ``cifar100``,
            ``cifar+10``, ``cifar+50``, ``tiny_imagenet``, ``caltech256`` or ``image_folder``.
        root: folder of the data; :mod:`datamodules.sources` says what it holds for each dataset.
            ``digits`` needs none.
        protocol: class lists: ``neal``, ``arpl`` (never compare results of the two), or a YAML or
            JSON file ``{splits: [{known: [...], unknown: [...]}]}`` of class names or indices.
        split: number of the split.
        image_size: side of the images in pixels.
        batch_size: training batch over all processes together.
        eval_batch_size: batch of one process in validation, test and prediction.
        num_workers: loader processes.
        val_fraction: fraction of each known class held out for validation; null takes the rule above.
        horizontal_flip: mirror training images with probability 1/2.
        download: fetch what is missing into ``root``.
        train_limit: use at most so many training images per known class (drawn like the held-out
            part).
        test_limit: use at most so many test images per class.
        predict_folder: ``predict`` runs on the pictures below this folder; null: on the test
            images.

    Attributes:
        split_info: dataset, protocol, index, known, unknown, provenance, and after ``setup`` the
            number of images of each part.
        num_classes: number of known classes.
        class_names: their names, in label order. Where only the files tell names: the class indices
            until ``setup``.

    Raises:
        ValueError: arguments that cannot be met, or contradict the data.
        FileNotFoundError: data or the protocol file are missing.
        RuntimeError: damaged data.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str = "data",
        protocol: str = "neal",
        split: int = 0,
        image_size: int = 32,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        val_fraction: float | None = None,
        horizontal_flip: bool = False,
        download: bool = False,
        train_limit: int | None = None,
        test_limit: int | None = None,
        predict_folder: str | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, horizontal_flip)
        demand_at_least(1, image_size=image_size, train_limit=train_limit, test_limit=test_limit)
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction} is a fraction between 0 and 1; use e.g. 0.1"
            )
        self.save_hyperparameters()
        self.dataset = dataset
        self.root = root
        self.protocol = protocol
        self.image_size = image_size
        self.val_fraction = val_fraction
        self.download = download
        self.train_limit = train_limit
        self.test_limit = test_limit
        self.predict_folder = predict_folder

        self._known_source, self._unknown_source = MIXED_SOURCES.get(dataset, (dataset, dataset))
        self._index = split
        self._split: OSRSplit | None = None
        self._names: list[str] | None = None
        self._counts: dict[str, int] = {}
        self.train: ImageArrayDataset | None = None
        self.val: ImageArrayDataset | None = None
        self.test: ImageArrayDataset | None = None
        self.test_known: ImageArrayDataset | None = None
        self.test_unknown: ImageArrayDataset | None = None
        self.pictures: ImageArrayDataset | None = None
        if protocol in PROTOCOLS:
            self._choose_split(class_names=None)
        else:
            read_protocol_entry(dataset, split, protocol)
            if class_names_of(self._known_source) is not None:
                self._choose_split(class_names=None)

    @property
    def split_info(self) -> dict[str, Any]:
        """What was evaluated, in plain values for results and checkpoints."""
        return {**asdict(self._known_split()), "counts": dict(self._counts)}

    @property
    def num_classes(self) -> int:
        """Number of known classes."""
        return len(self.class_names)

    @property
    def class_names(self) -> list[str]:
        """Names of the known classes, in label order."""
        if self._split is None:
            return [
                str(c)
                for c in read_protocol_entry(self.dataset, self._index, self.protocol)["known"]
            ]
        names = self._names or class_names_of(self._known_source)
        return [str(c) if names is None else names[c] for c in self._split.known]

    def check_files(self, stage: TrainerFn | None) -> None:
        """Downloads if asked to, and makes sure that all files are there before anything starts."""
        if stage not in (TrainerFn.TESTING, TrainerFn.PREDICTING):
            prepare_source(self._known_source, self.root, train=True, download=self.download)
        if stage != TrainerFn.VALIDATING:
            for source in dict.fromkeys((self._known_source, self._unknown_source)):
                prepare_source(source, self.root, train=False, download=self.download)

    def open_folder(self, folder: str) -> Any:
        """The pictures of a folder, squeezed to the size of the images."""
        return read_pictures_to_predict(folder, self.image_size, self.class_names)

    def open_parts(self, stage: str | None) -> None:
        """Reads what the stage needs; what was read before is kept."""
        if stage in ("fit", "validate", None) and self.train is None:
            self._read_training_half()
        if stage in ("test", "predict", None) and self.test is None:
            self._read_test_half()

    def state_dict(self) -> dict[str, Any]:
        """The split, for the checkpoint."""
        if self._split is None:
            return {}
        return {"source": self._known_source, **asdict(self._split)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint that was trained on other known classes.

        Raises:
            ValueError: some class was known then and is not now, or the other way round.
        """
        if not state_dict or self.predicts_folder:
            return
        split = self._known_split()
        if (state_dict["source"], state_dict["known"]) != (self._known_source, split.known):
            raise ValueError(
                f"the checkpoint was trained on {state_dict['dataset']}, protocol "
                f"{state_dict['protocol']!r}, split {state_dict['index']} (known classes "
                f"{state_dict['known']}), but the data are {split.dataset}, protocol "
                f"{split.protocol!r}, split {split.index} (known classes {split.known}); set "
                "--data.dataset, --data.protocol and --data.split to the checkpoint's"
            )

    def _choose_split(self, class_names: list[str] | None) -> None:
        self._split = osr_split(self.dataset, self._index, self.protocol, class_names)
        twins = [
            b if a == self._index else a
            for a, b in duplicate_splits(self.dataset, self.protocol, class_names)
            if self._index in (a, b)
        ]
        if twins:
            rank_zero_warn(
                f"split {self._index} of {self.dataset} with protocol {self.protocol!r} has the "
                f"same known classes as split {', '.join(map(str, twins))}; a mean over all splits "
                "is not one over independent problems"
            )

    def _known_split(self) -> OSRSplit:
        if self._split is None:
            raise RuntimeError(f"the classes of {self.dataset} are known after setup() only")
        return self._split

    def _open(self, source: str, train: bool) -> OpenSource:
        opened = open_source(source, self.root, train)
        if source == self._known_source:
            self._names = opened.class_names
            if self._split is None:
                self._choose_split(opened.class_names)
        split = self._known_split()
        wanted = split.known if source == self._known_source else []
        wanted = wanted + (split.unknown if source == self._unknown_source else [])
        if max(wanted) >= len(opened.class_names):
            raise ValueError(
                f"{self.dataset} with protocol {self.protocol!r} uses class {max(wanted)}, but "
                f"{self.root} has only {len(opened.class_names)} classes; give the whole set with "
                "--data.root DIR, or other class lists with --data.protocol FILE"
            )
        return opened

    def _network_labels(self, source: OpenSource) -> Tensor:
        """Rank among the known classes, -1 for any other class."""
        known = self._known_split().known
        label_of = torch.full((len(source.class_names),), -1)
        label_of[known] = torch.arange(len(known))
        return label_of[source.labels]

    def _read_training_half(self) -> None:
        source = self._open(self._known_source, train=True)
        labels = self._network_labels(source)
        known = (labels >= 0).nonzero().flatten()
        if self.dataset == "mnist" and self.val_fraction is None:
            first_held_out = len(labels) - MNIST_HOLDOUT
            if first_held_out <= 0:
                raise ValueError(
                    f"{self.root} has {len(labels)} MNIST training images, of which the last "
                    f"{MNIST_HOLDOUT} would be held out; use --data.val_fraction 0.1"
                )
            train, val = known[known < first_held_out], known[known >= first_held_out]
        else:
            rest, drawn = draw_per_class(
                source.labels[known], self.val_fraction or 0.1, f"{self._known_source} holdout"
            )
            train, val = known[rest], known[drawn]
        if self.train_limit is not None:
            _, drawn = draw_per_class(
                source.labels[train], self.train_limit, f"{self._known_source} train limit"
            )
            train = train[drawn]
        self._demand_every_class(labels[train], "training")
        # Together, so that one error names every damaged file.
        images = source.read(torch.cat([train, val]), self.image_size)
        parts = images.split([len(train), len(val)])
        self.train, self.val = (
            ImageArrayDataset(part, labels[chosen], self.class_names, source.labels[chosen])
            for part, chosen in zip(parts, (train, val), strict=True)
        )
        self._counts |= {"train": len(train), "val": len(val)}

    def _read_test_half(self) -> None:
        source = self._open(self._known_source, train=False)
        split = self._known_split()
        known = self._test_positions(source, split.known)
        labels = self._network_labels(source)[known]
        self._demand_every_class(labels, "test")
        if self._unknown_source == self._known_source:
            unknown = self._test_positions(source, split.unknown)
            images = source.read(torch.cat([known, unknown]), self.image_size)
            unknown_ids = source.labels[unknown]
        else:
            other = self._open(self._unknown_source, train=False)
            unknown = self._test_positions(other, split.unknown)
            images = torch.cat(
                [source.read(known, self.image_size), other.read(unknown, self.image_size)]
            )
            # Behind the classes of the known source, so that an id names one class.
            unknown_ids = other.labels[unknown] + len(source.class_names)
        if not len(unknown):
            raise ValueError(
                f"{self.root} has no test image of the unknown classes {split.unknown} of "
                f"{self.dataset}; open-set scores need some"
            )
        labels = torch.cat([labels, torch.full((len(unknown),), -1)])
        class_ids = torch.cat([source.labels[known], unknown_ids])
        self.test, self.test_known, self.test_unknown = (
            ImageArrayDataset(images[part], labels[part], self.class_names, class_ids[part])
            for part in (slice(None), slice(len(known)), slice(len(known), None))
        )
        self._counts |= {"test_known": len(known), "test_unknown": len(unknown)}

    def _test_positions(self, source: OpenSource, classes: list[int]) -> Tensor:
        positions = torch.isin(source.labels, torch.tensor(classes)).nonzero().flatten()
        if self.test_limit is None:
            return positions
        _, drawn = draw_per_class(source.labels[positions], self.test_limit, "test limit")
        return positions[drawn]

    def _demand_every_class(self, labels: Tensor, half: str) -> None:
        counts = torch.bincount(labels, minlength=self.num_classes).tolist()
        empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        if empty:
            raise ValueError(
                f"no {half} images are left for the known class {', '.join(empty[:5])} of "
                f"{self.dataset} in {self.root}; every known class needs some"
            )
