"""Images with binary attributes or classes, of which only some may be labelled: data for attribute translation."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.attribute_pools import (
    GroupedPool,
    Pool,
    PoolDataset,
    PoolSampler,
    ShuffledPool,
)
from datamodules.attribute_sources import (
    CELEBA_SPLITS,
    PARTS,
    AttributeDataset,
    AttributeSource,
    CelebAPictures,
    CenterCrop,
    CsvPictures,
    FolderPictures,
    RafdPictures,
    SceneAttributes,
)
from datamodules.attribute_splits import balanced_label_split, identity_label_split
from datamodules.base import AdversariaDataModule, parts_of
from datamodules.datasets import BatchDataset, PictureFileDataset, pictures_to_predict
from datamodules.pictures import picture_sizes
from datamodules.sampler import ShardedSampler
from datamodules.shapes_options import SceneOptions, scenes_and_side
from datamodules.sources import unknown_name
from lightning_modules.arguments import demand_at_least
from lightning_modules.attributes import (
    LabelKind,
    enumerate_label_space,
    exclusive_indices,
    label_ids,
    observed_label_space,
)
from lightning_modules.randomness import mix

DATASETS = ("shapes", "celeba", "rafd", "image_folder", "csv")
LABEL_SOURCES = ("enumerated", "observed")
IMAGE_SIZE = 128
CELEBA_CROP = 178
VAL_FRACTION = 0.05
FEWEST_GROUPS = 3
BATCH_KINDS = {
    "labelled": {"labelled"},
    "unlabelled": {"unlabelled"},
    "both": {"labelled", "unlabelled"},
}
SCENES = SceneOptions()


class AttributeDataModule(AdversariaDataModule):
    """Images with attributes by name, all labelled or only a few.

    A batch has ``image`` [B, 3, S, S] in [0, 1] (no normalisation: that is the module's business), ``attributes``
    float32 [B, c] of zeros and ones, ``index`` int64 [B] (the place in ``train``, ``val`` or ``test``), ``path`` where
    there are files, and ``label`` int64 [B] where labels are classes; ``attributes`` then are one-hot.

    What a training batch is:

    ============  ==============  ==========================================================================
    ``balanced``  ``unlabelled``  batch
    ============  ==============  ==========================================================================
    false         false           labelled images in a random order
    true          false           blocks of labelled images (below)
    false         true            ``{"labelled": {...}, "unlabelled": {...}}``, each in a random order
    true          true            the same, the labelled images in blocks
    ============  ==============  ==========================================================================

    A block is ``n_groups`` distinct classes with ``group_size`` images each, class by class. ``batch_size`` is the
    global batch of each pool: a multiple of ``n_groups * group_size``, so that every process gets whole blocks (two
    processes with one block each: ``batch_size=32`` with the default groups). Classes differ within a block, not
    between blocks, so pairs of images belong to one block. Blocks share images only where a class has too few for all
    of them.

    Classes are the rows of ``label_space``; labelled batches have the row as ``class_id`` int64 [B]. Images with a
    label that is no row (two hair colours at once) are then in neither pool. An unlabelled batch has nothing but
    ``image`` and ``index``. If all images are labelled there is no unlabelled pool (``has_unlabelled``), and batches
    are ``{"labelled": {...}}``.

    A module may offer ``batch_kind(number) -> "labelled" | "unlabelled" | "both"``; a batch then has only these pools
    and nothing is read of the other, which does not move on either. Batches are numbered from 0 over all epochs, which
    must have equally many.

    An epoch has as many images as the pools together, unless the module says otherwise (``batches_in_epoch``); pools
    are gone through as often as needed. Everything is a function of (global seed, epoch, place in the epoch): resuming
    in the middle of an epoch is exact, and the number of processes changes no global batch. Which images are labelled
    and which are held out does not depend on the seed.

    Data sets:

    - ``shapes``: procedural scenes of one object. ``attributes`` names factors (``colour``, ``shape``, ``texture``,
      ``size``, ``border``); a factor of two values is one attribute, the second value (``bordered``), one of more
      values an exclusive group. If that is all, labels are classes. ``val`` and ``test`` know the true translations:
      :meth:`datamodules.attribute_sources.AttributeScenes.counterparts`.
    - ``celeba``: by default hair colours, Male and Young. ``split`` is ``reference``, StarGAN's random one with 1,999
      test images (identities are on both sides), or ``official``.
    - ``rafd``: eight emotions, from the names of the files; parts share no person, nor do the pools.
    - ``image_folder``: one folder per domain, ``ROOT/train/DOMAIN``, ``ROOT/test/DOMAIN`` and perhaps
      ``ROOT/val/DOMAIN``.
    - ``csv``: your own pictures with several attributes each, listed in ``ROOT/attributes.csv``
      (:class:`datamodules.attribute_sources.CsvPictures`).

    Pictures of files are converted to RGB, whether grey, CMYK or with transparency, which is dropped.

    Args:
        dataset: see above.
        root: folder of the data; :mod:`datamodules.attribute_sources` says what it holds.
        attributes: the attributes, classes or factors, in the order of the label; null: the default of the data set.
        exclusive: mutually exclusive groups of ``celeba`` and ``csv``; null: the hair colours of ``celeba``, none of
            ``csv``. ``[]`` for none.
        image_size: side of the images of files; null for 128. Scenes have ``shapes.image_size``.
        crop_size: side of the square cut out of the middle of a picture before resizing; null: 178 of ``celeba``, else
            the whole picture is squeezed. 0: the whole picture of ``celeba`` too. Originals of ``rafd`` (681x1024) are
            first cut to the face.
        split: of ``celeba``, see above.
        val_fraction: of the training images (of ``rafd``: people) held out for validation where there are no others; 0
            to train on all, as the released code does, and validate on the same.
        labelled: how many training images keep their label: a number of images (``200``), a percentage (``5%``), null
            for all. Equally many of each class as far as there are; of ``rafd`` a percentage of people. The
            labelled images of a smaller number are among those of a larger one.
        unlabelled: train on the other images too, without labels.
        balanced: draw labelled images in blocks.
        n_groups: classes in a block, at least 3.
        group_size: images of each.
        label_source: ``enumerated``: the label space is all labels that contradict no exclusive group; ``observed``:
            those of training images.
        horizontal_flip: mirror training images with probability 1/2; null: all but ``shapes``.
        batch_size: training batch of each pool over all processes together.
        eval_batch_size: batch of one process in validation, test and prediction.
        num_workers: loader processes; use some where pictures are decoded batch by batch.
        cache_limit: a part that takes at most so many GiB stays decoded in memory (of every process).
        download: fetch what is missing of ``celeba`` into ``root``.
        shapes: what scenes show.
        shapes_train: number of scenes to train on.
        shapes_val: number of scenes to validate on.
        shapes_test: number of scenes to test on.
        shapes_seed: of the scenes; the run's seed plays no part.
        predict_folder: ``predict`` runs on the pictures below this folder, squeezed to squares; batches then have
            ``path`` and ``original_size`` (int64 [B, 2], height and width). null: on the test images.

    Attributes:
        train: all training images with their true labels, after ``setup``, for evaluation; also ``val`` and ``test``.
        labelled_places: int64 [L], places in ``train`` of the images whose labels are used, after ``setup``.
        unlabelled_places: int64 [U], those of the other pool; empty without ``unlabelled``.
        image_channels: 3.

    Raises:
        ValueError: arguments that cannot be met or contradict the data.
        FileNotFoundError: data are missing.
        RuntimeError: damaged data.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        root: str = "data",
        attributes: list[str] | None = None,
        exclusive: list[list[str]] | None = None,
        image_size: int | None = None,
        crop_size: int | None = None,
        split: str = "reference",
        val_fraction: float = VAL_FRACTION,
        labelled: int | str | None = None,
        unlabelled: bool = False,
        balanced: bool = False,
        n_groups: int = 4,
        group_size: int = 4,
        label_source: str = "enumerated",
        horizontal_flip: bool | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        cache_limit: float = 2.0,
        download: bool = False,
        shapes: SceneOptions = SCENES,
        shapes_train: int = 4000,
        shapes_val: int = 300,
        shapes_test: int = 600,
        shapes_seed: int = 0,
        predict_folder: str | None = None,
    ) -> None:
        for name, choice, choices in (
            ("dataset", dataset, DATASETS),
            ("split", split, CELEBA_SPLITS),
            ("label_source", label_source, LABEL_SOURCES),
        ):
            if choice not in choices:
                raise unknown_name(name, choice, choices)
        drawn, faces, table = dataset == "shapes", dataset == "celeba", dataset == "csv"
        shapes, side = scenes_and_side(drawn, shapes, image_size, IMAGE_SIZE)
        for name, value, default, applies in (
            ("exclusive", exclusive, None, faces or table),
            ("crop_size", crop_size, None, not drawn),
            ("split", split, "reference", faces),
            ("val_fraction", val_fraction, VAL_FRACTION, not drawn and split != "official"),
            ("download", download, False, faces),
            ("label_source", label_source, "enumerated", drawn or faces or table),
        ):
            if value != default and not applies:
                raise ValueError(
                    f"{name}={value} does not apply to {dataset}"
                    f"{' with split=official' * (faces and split == 'official')}; leave out --data.{name}"
                )
        if attributes is not None and not attributes:
            raise ValueError("attributes=[] leaves nothing to translate; give at least one name")
        demand_at_least(FEWEST_GROUPS if balanced else 1, most=10**9, n_groups=n_groups)
        demand_at_least(0, most=10**9, crop_size=crop_size)
        demand_at_least(1, most=10**9, image_size=side, group_size=group_size)
        demand_at_least(
            1,
            most=10**9,
            shapes_train=shapes_train,
            shapes_val=shapes_val,
            shapes_test=shapes_test,
        )
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction} is a fraction below 1; use e.g. 0.05, or 0 to train on all"
            )
        demand_at_least(0, cache_limit=cache_limit)
        self._amount = _amount(labelled, dataset)
        block = n_groups * group_size
        if balanced and batch_size % block:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of n_groups * group_size = {n_groups} * {group_size} = "
                f"{block}, once per process; use --data.batch_size {max(batch_size // block, 1) * block}"
            )
        super().__init__(
            batch_size,
            eval_batch_size,
            num_workers,
            horizontal_flip=not drawn if horizontal_flip is None else horizontal_flip,
        )
        # As a dict, since a checkpoint with an object of ours would not load with weights_only.
        # Not for the logger, which has the module's arguments of the same names.
        self.save_hyperparameters(ignore=["shapes"], logger=False)
        self.save_hyperparameters({"shapes": asdict(shapes)}, logger=False)
        self.dataset = dataset
        self.split = split
        self.val_fraction = val_fraction
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.balanced = balanced
        self.n_groups = n_groups
        self.group_size = group_size
        self.label_source = label_source
        self.cache_limit = cache_limit
        self.image_size = side
        self.image_channels = 3
        self.predict_folder = predict_folder
        path = Path(root).expanduser()
        if crop_size is None and faces:
            crop_size = CELEBA_CROP
        crop = CenterCrop(side, crop_size or None, rafd=dataset == "rafd")
        self.source: AttributeSource
        if drawn:
            counts = dict(zip(PARTS, (shapes_train, shapes_val, shapes_test), strict=True))
            self.source = SceneAttributes(shapes, attributes, counts, shapes_seed)
            if not self.source.names:
                raise ValueError("no factor of the scenes has several values; see --data.shapes")
        elif faces:
            self.source = CelebAPictures(
                path, crop, attributes, exclusive, split, val_fraction, download
            )
        elif table:
            self.source = CsvPictures(path, crop, attributes, exclusive, val_fraction)
        else:
            pictures = RafdPictures if dataset == "rafd" else FolderPictures
            self.source = pictures(path, crop, attributes, val_fraction)
        self.attribute_kind: LabelKind = self.source.kind
        self.train: AttributeDataset | None = None
        self.val: AttributeDataset | None = None
        self.test: AttributeDataset | None = None
        self.pictures: PictureFileDataset | None = None
        self.labelled_places: Tensor | None = None
        self.unlabelled_places: Tensor | None = None
        self._space: Tensor | None = None
        self._names: list[str] | None = None
        self._groups: list[list[str]] | None = None

    @property
    def attribute_names(self) -> list[str]:
        """The c attributes, in the order of the label; empty where only files tell, until ``setup``.

        When a folder is predicted, the checkpoint's.
        """
        return self.source.names if self._names is None else self._names

    @property
    def exclusive_groups(self) -> list[list[str]]:
        """Of each group at most one attribute holds, or exactly one if ``exclusive_complete``.

        When a folder is predicted, the checkpoint's.
        """
        return self.source.groups if self._groups is None else self._groups

    @property
    def exclusive_complete(self) -> bool:
        """Whether exactly one attribute of every exclusive group holds, as of classes and of the factors of scenes."""
        return self.source.complete

    @property
    def has_unlabelled(self) -> bool:
        """Whether there is an unlabelled pool, after ``setup``."""
        return self.unlabelled_places is not None and len(self.unlabelled_places) > 0

    @property
    def label_space(self) -> Tensor:
        """The sensible labels, float32 [K, c], last attribute fastest; the unit vectors where labels are classes.

        Raises:
            ValueError: more than 65,536 labels, or ``label_source=observed`` before ``setup``.
        """
        if self._space is None:
            self._space = self._make_space()
        return self._space

    @property
    def split_info(self) -> dict[str, Any]:
        """What was trained and evaluated on, in plain values for results and checkpoints."""
        sets = {part: getattr(self, part) for part in PARTS}
        counts = {part: len(images) for part, images in sets.items() if images is not None}
        digest = None
        if self.labelled_places is not None and self.unlabelled_places is not None:
            counts["labelled"] = len(self.labelled_places)
            counts["unlabelled"] = len(self.unlabelled_places)
            digest = f"{mix('labelled', *self.labelled_places.sort().values.tolist()):016x}"
        of_set: dict[str, Any] = {}
        if isinstance(self.source, SceneAttributes):
            of_set["shapes"] = self.source.options.plain()
            of_set["shapes_seed"] = self.source.seed
        elif self.dataset == "celeba":
            of_set["split"] = self.split
        people = {
            part: sorted(set(images.people))
            for part, images in sets.items()
            if images is not None and images.people is not None
        }
        return {
            "dataset": self.dataset,
            "attributes": list(self.attribute_names),
            "kind": self.attribute_kind,
            "image_size": self.image_size,
            **of_set,
            **({"people": people} if people else {}),
            "val_fraction": self.val_fraction,
            "labelled": self.labelled,
            "unlabelled": self.unlabelled,
            "balanced": self.balanced,
            "label_source": self.label_source,
            "labelled_digest": digest,
            "counts": counts,
        }

    def check_files(self, stage: TrainerFn | None) -> None:
        """Downloads if asked to, and makes sure that the files are there before anything starts."""
        self.source.check(parts_of(stage))

    def open_folder(self, folder: str) -> PictureFileDataset:
        """The pictures of a folder, squeezed to squares."""
        return open_pictures(folder, self.image_size)

    def open_parts(self, stage: str | None) -> None:
        """Opens what the stage needs; what was opened before is kept."""
        parts = [part for part in parts_of(stage) if getattr(self, part) is None]
        self.source.check(parts)
        opened = {part: self.source.open(part) for part in parts}
        if "train" in opened:
            self._make_pools(opened["train"])
        # Only now, as decoding may take long and what is wrong with the labels is known before.
        for part, images in opened.items():
            images.keep(self.cache_limit * 2**30, f"{self.dataset} {part}")
            setattr(self, part, images)

    def train_dataloader(self) -> DataLoader:
        """The pools, as the class says."""
        return self.train_loader(self.training_pools())

    def training_pools(self) -> PoolDataset:
        """What a training batch is made of, after ``setup``."""
        assert self.train is not None, "setup('fit') comes first"
        assert self.labelled_places is not None
        assert self.unlabelled_places is not None
        pool: Pool = ShuffledPool(self.train, self.labelled_places)
        if self.balanced:
            assert self.train.class_ids is not None
            classes = self.train.class_ids[self.labelled_places]
            pool = GroupedPool(
                self.train, self.labelled_places, classes, self.n_groups, self.group_size
            )
        if not self.unlabelled:
            return PoolDataset({"": pool}, len(self.labelled_places))
        pools = {"labelled": pool}
        if self.has_unlabelled:
            pools["unlabelled"] = ShuffledPool(self.train, self.unlabelled_places)
        length = len(self.labelled_places) + len(self.unlabelled_places)
        return PoolDataset(pools, length, ("unlabelled",))

    def train_sampler(
        self, dataset: BatchDataset, world: int, rank: int, batches: int | None
    ) -> ShardedSampler:
        """Gives out places in each pool.

        Raises:
            ValueError: a process would not get whole blocks.
        """
        assert isinstance(dataset, PoolDataset)
        wanted = self._wanted_pools(len(dataset)) if self.has_unlabelled else None
        sampler = PoolSampler(dataset, self.batch_size, world, rank, batches, wanted)
        block = self.n_groups * self.group_size
        if self.balanced and self.batch_size // world % block:
            raise ValueError(
                f"batch_size={self.batch_size} over {world} processes leaves {self.batch_size // world} images for "
                f"each, which is no multiple of n_groups * group_size = {block}; use --data.batch_size "
                f"{world * block}"
            )
        return sampler

    def state_dict(self) -> dict[str, Any]:
        """What a label means, for the checkpoint."""
        return {
            "attribute_names": list(self.attribute_names),
            "attribute_kind": self.attribute_kind,
            "exclusive_groups": [list(group) for group in self.exclusive_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint of other attributes; takes its attributes when a folder is predicted.

        Raises:
            ValueError: other attributes, or in another order.
        """
        if not state_dict:
            return
        if self.predicts_folder:
            self._names = list(state_dict["attribute_names"])
            self._groups = [list(group) for group in state_dict["exclusive_groups"]]
            self.attribute_kind = state_dict["attribute_kind"]
            return
        _demand_same(state_dict["attribute_names"], self.attribute_names)

    def _make_space(self) -> Tensor:
        names = self.attribute_names
        if self.attribute_kind == "single_label":
            return torch.eye(len(names))
        if self.label_source == "observed":
            if self.train is None:
                raise ValueError(
                    "label_source=observed: the label space is known after setup('fit')"
                )
            return self._observed(self.train)
        space = enumerate_label_space(names, self.exclusive_groups)
        return space[self._sensible(space)]

    def _observed(self, train: AttributeDataset) -> Tensor:
        return observed_label_space(train.attributes[self._sensible(train.attributes)])

    def _sensible(self, labels: Tensor) -> Tensor:
        """Which labels [N, c] contradict no exclusive group, bool [N]."""
        least = 1 if self.exclusive_complete else 0
        fine = torch.ones(len(labels), dtype=torch.bool)
        for group in exclusive_indices(self.attribute_names, self.exclusive_groups):
            held = labels[:, group].sum(1)
            fine &= (held <= 1) & (held >= least)
        return fine

    def _make_pools(self, train: AttributeDataset) -> None:
        """Decides which images are labelled, and checks that one can train on them."""
        labelled, unlabelled = torch.arange(len(train)), torch.empty(0, dtype=torch.int64)
        if self.labelled is not None or self.balanced or self.unlabelled:
            observed = self.label_source == "observed"
            self._space = self._observed(train) if observed else self._make_space()
            train.class_ids = label_ids(train.attributes, self._space)
            labelled, unlabelled = self._divide(train, self._amount)
        if self.balanced:
            self._demand_groups(train, labelled)
        self._demand_variety(train.attributes[labelled])
        self.labelled_places = labelled
        self.unlabelled_places = unlabelled if self.unlabelled else unlabelled[:0]

    def _divide(self, train: AttributeDataset, amount: int | float | None) -> tuple[Tensor, Tensor]:
        """Places of the labelled and of the other images, without those whose label is no class."""
        classes = train.class_ids
        assert classes is not None
        usable = (classes >= 0).nonzero().flatten()
        if not len(usable):
            raise ValueError(
                f"no training image has a label of the label space of {', '.join(self.attribute_names)}; choose "
                "other --data.attributes or --data.exclusive"
            )
        if amount is None:
            return usable, usable[:0]
        if isinstance(amount, int) and amount > len(usable):
            raise ValueError(
                f"labelled={amount} exceeds the {len(usable)} training images; use a smaller number, or null for all"
            )
        if train.people is not None:
            with_labels = set(identity_label_split(train.people, amount)[0])
            chosen = torch.tensor([person in with_labels for person in train.people])
            return usable[chosen[usable]], usable[~chosen[usable]]
        assert self._space is not None
        wanted = amount if isinstance(amount, int) else len(usable) * amount / 100
        found = balanced_label_split(
            train.attributes, torch.zeros(len(train), dtype=torch.int64), wanted, self._space
        )
        return found.labelled_ids - 1, found.unlabelled_ids - 1

    def _demand_groups(self, train: AttributeDataset, labelled: Tensor) -> None:
        """Raises ValueError unless every class has the images of a group, and there are enough classes."""
        assert self._space is not None
        if len(self._space) < self.n_groups:
            raise ValueError(
                f"{', '.join(self.attribute_names)} make {len(self._space)} different labels, but a block takes "
                f"n_groups={self.n_groups} of them; use --data.n_groups {len(self._space)} if that is at least "
                f"{FEWEST_GROUPS}, or more --data.attributes"
            )
        counts = self._counts(train, labelled)
        if min(counts) >= self.group_size:
            return
        names = [self._class_name(row) for row in self._space]
        short = [f"{n} ({c})" for n, c in zip(names, counts, strict=True) if c < self.group_size]
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        raise ValueError(
            f"labelled={self.labelled} leaves {len(short)} of {len(counts)} groups with fewer than group_size="
            f"{self.group_size} images: {', '.join(short[:5])}{more}; {self._enough_labels(train)}"
        )

    def _enough_labels(self, train: AttributeDataset) -> str:
        """How to get the images of a group for every class."""
        everything = self._counts(train, self._divide(train, None)[0])
        if min(everything) < self.group_size:
            missing = sum(count < self.group_size for count in everything)
            observed = ""
            if self.label_source == "enumerated" and not all(everything):
                observed = ", --data.label_source observed to leave out labels that never occur"
            return (
                f"of {missing} there are not enough even with all labels; use fewer --data.attributes, a smaller "
                f"--data.group_size{observed}"
            )
        if train.people is not None:
            people = len(set(train.people))
            for count in range(1, people + 1):
                # People are rounded up, so that a little more than one less is enough.
                percent = math.floor(1e4 * (count - 1) / people + 1) / 100
                if min(self._counts(train, self._divide(train, percent)[0])) >= self.group_size:
                    return f"the smallest percentage that works is --data.labelled {percent}%"
        fewest = sum(min(count, self.group_size - 1) for count in everything) + 1
        percent = math.ceil(1e4 * fewest / sum(everything)) / 100
        return f"the fewest that work are {fewest} images (--data.labelled {fewest}), or --data.labelled {percent}%"

    def _counts(self, train: AttributeDataset, places: Tensor) -> list[int]:
        assert train.class_ids is not None
        assert self._space is not None
        return torch.bincount(train.class_ids[places], minlength=len(self._space)).tolist()

    def _class_name(self, row: Tensor) -> str:
        held = [name for name, value in zip(self.attribute_names, row, strict=True) if value]
        return "+".join(held) or "none"

    def _demand_variety(self, attributes: Tensor) -> None:
        """Raises ValueError if an attribute is the same in all labelled images."""
        for name, values in zip(self.attribute_names, attributes.unbind(1), strict=True):
            if (values == values[0]).all():
                raise ValueError(
                    f"attribute {name} is {int(values[0])} in all {len(values)} labelled training images, so it "
                    "cannot be learnt; leave it out of --data.attributes, or label more (--data.labelled)"
                )

    def _wanted_pools(self, images: int) -> Callable[[int, int], set[str]]:
        """Says which pools a batch has, as the module asks."""
        trainer = self.trainer
        ask = None if trainer is None else getattr(trainer.lightning_module, "batch_kind", None)

        def wanted(epoch: int, batch: int) -> set[str]:
            if trainer is None or ask is None:
                return BATCH_KINDS["both"]
            # Lightning has set it before it iterates, with its limit on training batches.
            batches = trainer.fit_loop.max_batches
            known = int(batches) if math.isfinite(batches) else images // self.batch_size
            kind = ask(epoch * known + batch)
            if kind not in BATCH_KINDS:
                raise unknown_name("batch_kind of the module", kind, list(BATCH_KINDS))
            return BATCH_KINDS[kind]

        return wanted


class JointAttributeDataModule(AdversariaDataModule):
    """Several data sets with attributes of their own, to train on jointly.

    A training batch is ``{"0": {...}, "1": {...}, ...}``, for each data set a batch of ``batch_size`` images like one
    of :class:`AttributeDataModule`, in a random order of its own. An epoch goes once through the largest; smaller ones
    come again. Validation and test have one loader for each, in this order.

    Args:
        sources: for each data set the arguments of :class:`AttributeDataModule` that concern it, e.g. ``[{dataset:
            celeba, root: data}, {dataset: rafd, root: data/rafd}]``.
        image_size: side of all images.
        horizontal_flip: mirror training images with probability 1/2; null: unless there are ``shapes``.
        batch_size: training batch of each data set over all processes together.
        eval_batch_size: batch of one process in validation, test and prediction.
        num_workers: loader processes.
        predict_folder: as in :class:`AttributeDataModule`.

    Attributes:
        members: the data sets, each an :class:`AttributeDataModule`.
        image_channels: 3.

    Raises:
        ValueError: fewer than two sources, an unknown argument, or what the data sets raise.
        FileNotFoundError: data are missing.
        RuntimeError: damaged data.
    """

    def __init__(
        self,
        sources: list[dict[str, Any]],
        image_size: int = IMAGE_SIZE,
        horizontal_flip: bool | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        predict_folder: str | None = None,
    ) -> None:
        if len(sources) < 2:
            raise ValueError(
                f"sources has {len(sources)} data sets; joint training needs two or more (--data.sources)"
            )
        drawn = any(source.get("dataset", "shapes") == "shapes" for source in sources)
        super().__init__(
            batch_size,
            eval_batch_size,
            num_workers,
            horizontal_flip=not drawn if horizontal_flip is None else horizontal_flip,
        )
        self.save_hyperparameters(logger=False)
        self.image_size = image_size
        self.image_channels = 3
        self.predict_folder = predict_folder
        self.members = [_member(source, image_size) for source in sources]
        self.train: PoolDataset | None = None
        self.val: list[AttributeDataset] | None = None
        self.test: list[AttributeDataset] | None = None
        self.pictures: PictureFileDataset | None = None
        self._names: list[list[str]] | None = None
        self._groups: list[list[list[str]]] | None = None

    @property
    def attribute_names(self) -> list[list[str]]:
        """The attributes of each data set, as in :class:`AttributeDataModule`."""
        return [m.attribute_names for m in self.members] if self._names is None else self._names

    @property
    def exclusive_groups(self) -> list[list[list[str]]]:
        """The exclusive groups of each data set."""
        if self._groups is not None:
            return self._groups
        return [member.exclusive_groups for member in self.members]

    @property
    def kinds(self) -> list[LabelKind]:
        """Kind of the labels of each data set."""
        return [member.attribute_kind for member in self.members]

    @property
    def dims(self) -> list[int]:
        """Number of attributes of each data set; 0 where only files tell, until ``setup``."""
        return [len(names) for names in self.attribute_names]

    @property
    def split_info(self) -> dict[str, Any]:
        """What was trained and evaluated on, in plain values for results and checkpoints."""
        return {str(i): member.split_info for i, member in enumerate(self.members)}

    def check_files(self, stage: TrainerFn | None) -> None:
        """Makes sure that the files of all data sets are there before anything starts."""
        for member in self.members:
            member.source.check(parts_of(stage))

    def open_folder(self, folder: str) -> PictureFileDataset:
        """The pictures of a folder, squeezed to squares."""
        return open_pictures(folder, self.image_size)

    def open_parts(self, stage: str | None) -> None:
        """Opens what the stage needs of every data set; what was opened before is kept."""
        for member in self.members:
            member.setup(stage)
        parts = parts_of(stage)
        if "train" in parts and self.train is None:
            pools = [member.training_pools() for member in self.members]
            named = {str(i): pool.pools[""] for i, pool in enumerate(pools)}
            self.train = PoolDataset(named, max(map(len, pools)))
        if "val" in parts:
            self.val = [m.val for m in self.members if m.val is not None]
        if "test" in parts:
            self.test = [m.test for m in self.members if m.test is not None]

    def train_sampler(
        self, dataset: BatchDataset, world: int, rank: int, batches: int | None
    ) -> ShardedSampler:
        """Gives out a place in each data set."""
        assert isinstance(dataset, PoolDataset)
        return PoolSampler(dataset, self.batch_size, world, rank, batches)

    def val_dataloader(self) -> list[DataLoader]:
        """The validation images of each data set, in order."""
        assert self.val is not None, "setup('fit') comes first"
        return [self.eval_loader(images) for images in self.val]

    def test_dataloader(self) -> list[DataLoader]:
        """The test images of each data set, in order."""
        assert self.test is not None, "setup('test') comes first"
        return [self.eval_loader(images) for images in self.test]

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """The pictures of ``predict_folder``, or the test images of each data set without one."""
        if self.predict_folder is None:
            return self.test_dataloader()
        assert self.pictures is not None, "setup('predict') comes first"
        return self.eval_loader(self.pictures)

    def state_dict(self) -> dict[str, Any]:
        """What the labels mean, for the checkpoint."""
        return {
            "attribute_names": [list(names) for names in self.attribute_names],
            "exclusive_groups": [[list(g) for g in groups] for groups in self.exclusive_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint of other attributes; takes its attributes when a folder is predicted.

        Raises:
            ValueError: other attributes, or in another order.
        """
        if not state_dict:
            return
        then = [list(names) for names in state_dict["attribute_names"]]
        if self.predicts_folder:
            self._names, self._groups = then, state_dict["exclusive_groups"]
        elif len(then) != len(self.members):
            raise ValueError(
                f"the checkpoint was trained on {len(then)} data sets, but --data.sources has {len(self.members)}"
            )
        else:
            for names, now in zip(then, self.attribute_names, strict=True):
                _demand_same(names, now)


def open_pictures(folder: str, image_size: int) -> PictureFileDataset:
    """The pictures below ``--data.predict_folder`` squeezed to squares, with ``path`` and ``original_size``.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        RuntimeError: some pictures cannot be read; names up to five of them.
    """
    files = pictures_to_predict(folder)
    sizes = torch.tensor(picture_sizes(files, folder, "checking pictures"))
    decode = CenterCrop(image_size).decode
    return PictureFileDataset(files, image_size, original_sizes=sizes, decode=decode)


def _member(source: dict[str, Any], image_size: int) -> AttributeDataModule:
    of_run = {
        "self",
        "image_size",
        "unlabelled",
        "balanced",
        "n_groups",
        "group_size",
        "horizontal_flip",
        "batch_size",
        "eval_batch_size",
        "num_workers",
        "predict_folder",
    }
    known = [
        n for n in inspect.signature(AttributeDataModule.__init__).parameters if n not in of_run
    ]
    for name in source:
        if name not in known:
            raise unknown_name("option in --data.sources", name, known)
    if source.get("dataset", "shapes") != "shapes":
        return AttributeDataModule(**source, image_size=image_size)
    options = dict(source.get("shapes", {}))
    for name in options:
        names = [field.name for field in fields(SceneOptions)]
        if name not in names:
            raise unknown_name("option of shapes in --data.sources", name, names)
    scenes = SceneOptions(**{"image_size": image_size, **options})
    if scenes.image_size != image_size:
        raise ValueError(
            f"shapes.image_size={scenes.image_size} in --data.sources differs from --data.image_size {image_size}"
        )
    return AttributeDataModule(**{**source, "shapes": scenes})


def _amount(labelled: int | str | None, dataset: str) -> int | float | None:
    """A number of images as an integer, a percentage as a float."""
    wrong = ValueError(
        f"labelled={labelled} must be a number of images, such as 200, or a percentage above 0 and at most 100, such "
        "as 5%, or null for all"
    )
    if labelled is None:
        return None
    text = str(labelled)
    try:
        amount = float(text[:-1]) if text.endswith("%") else int(text)
    except ValueError:
        raise wrong from None
    if amount <= 0 or (isinstance(amount, float) and not amount <= 100):
        raise wrong
    if isinstance(amount, int) and dataset == "rafd":
        raise ValueError(
            f"labelled={labelled} is a number of images, but the pools of rafd are people; give a percentage of "
            f"them, such as --data.labelled {min(amount, 100)}%"
        )
    return amount


def _demand_same(then: Sequence[str], now: Sequence[str]) -> None:
    if now and list(then) != list(now):
        raise ValueError(
            f"the checkpoint was trained on the attributes {', '.join(then)}, but the data have "
            f"{', '.join(now)}; use the same --data.attributes in the same order"
        )
