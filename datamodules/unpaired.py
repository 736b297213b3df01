"""Unpaired translation: pictures of two domains, none of which is the translation of another."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import PARTS, AdversariaDataModule, parts_of
from datamodules.datasets import BatchDataset, PictureFileDataset, pictures_to_predict
from datamodules.pictures import picture_sizes
from datamodules.sampler import ShardedSampler
from datamodules.shapes_options import SceneOptions
from datamodules.sources import unknown_name
from datamodules.unpaired_sizes import PREPROCESS, PictureReader, Sizing
from datamodules.unpaired_sources import (
    OTHER_DIGITS,
    SIDES,
    CamVidDomains,
    DigitDomains,
    DomainDataset,
    Domains,
    FolderDomains,
    SceneDomains,
    common_size,
)
from lightning_modules.arguments import demand_at_least
from lightning_modules.randomness import keyed_generator

DATASETS = ("shapes", "folder", "camvid", "digits", "mnist")
PAIRINGS = ("random", "permute", "serial")
LOAD_SIZE, CROP_SIZE = 286, 256
DIGIT_SIZE = 32
VAL_FRACTION = 0.1
DUSK = ("0001TP",)
SCENES = SceneOptions()


class UnpairedDataModule(AdversariaDataModule):
    """Two sets of pictures, domain A and domain B, to learn a translation between them.

    A training batch is ``{"a": {...}, "b": {...}}``, either with ``image`` [B, C, H, W] in [0, 1] (no
    normalisation: that is the module's business) and ``index`` int64 [B], the place in ``train_a`` or
    ``train_b``. An epoch has as many items as the larger domain has pictures: item i is picture
    i mod \\|A\\| of A with a picture of B that ``pairing`` chooses. Items are shuffled. Crops and flips
    are drawn for the two sides independently. All of it is a function of (seed, epoch, place in the
    epoch) alone.

    Validation, test and prediction without a folder go over the whole pictures: A with the first
    loader, B with the second. Their batches have ``image``, ``index``, ``domain`` (``a`` or ``b``, a plain
    str), ``path`` where there are files, and as far as known ``mask`` uint8 [B, H, W] (places in
    ``mask_classes``, 255 for void) and ``counterpart`` [B, C, H, W] in [0, 1], the true translation.

    How pictures of files are brought to size, as in the released code of CycleGAN (bicubic):

    ========================  ====================================  ==========================
    ``preprocess``            training                              evaluation
    ========================  ====================================  ==========================
    ``resize_and_crop``       square of ``load_size``, crop         square of ``crop_size``
    ``crop``                  crop                                  multiple of 4
    ``scale_width``           width ``load_size``                   width ``load_size``
    ``scale_width_and_crop``  width ``load_size``, crop             width ``load_size``
    ``none``                  multiple of 4                         multiple of 4
    ========================  ====================================  ==========================

    Data sets:

    - ``shapes``: procedural scenes, ``shapes`` for A and ``shapes_b`` for B. Masks are known, and where
      the two differ in ``domain``, counterparts: the same scene drawn in the other domain. What else
      differs is content, which a translation should keep.
    - ``folder``: pictures below ``ROOT/trainA``, ``trainB``, ``testA``, ``testB``; perhaps ``valA``, ``valB``.
    - ``camvid``: drives against each other, by default 0001TP (dusk) against the others (day), with
      masks (:mod:`datamodules.camvid`). Tested on the published test frames; those of 0001TP are the
      second half of the drive, all others of A and B, ``val`` included, are trained on. The split of
      the OP-GAN paper is not known.
    - ``digits``, ``mnist``: digits against what ``mnist_b`` makes of others, with counterparts.

    Args:
        dataset: see above.
        root: folder of the data.
        preprocess: see above; of ``folder`` and ``camvid``.
        load_size: null for 286; of digits 32.
        crop_size: null for 256; of digits ``load_size``.
        horizontal_flip: mirror training images with probability 1/2; null: pictures of files only.
        channels: 1 or 3, to which all pictures are converted. null: as many as the pictures of ``folder``
            have, 3 for the others.
        pairing: ``random`` draws the picture of B uniformly for each item, as the released code does;
            ``permute`` draws without replacement, so that no picture of B comes again before all others
            have; ``serial`` takes picture i mod \\|B\\|, for sets whose pictures correspond.
        swap_domains: A is B and B is A (``direction=BtoA`` of the released code).
        val_fraction: of the training pictures held out for validation, where there are no others; 0 to
            train on all and validate on the same. In ``camvid`` the last frames of each drive.
        batch_size: training batch over all processes together.
        eval_batch_size: batch of one process in validation, test and prediction; pictures of various
            sizes come one by one.
        num_workers: loader processes; use some where pictures are decoded batch by batch.
        cache_limit: a part of a domain that takes at most so many GiB stays decoded in memory (of every
            process); a larger one is decoded batch by batch.
        download: fetch what is missing of ``mnist`` into ``root``.
        shapes: what scenes of A show.
        shapes_b: options that scenes of B have instead, e.g. ``{domain: sketch}``; null for ``{domain:
            night}``.
        shapes_train: number of scenes of each domain to train on.
        shapes_val: number of scenes of each domain to validate on.
        shapes_test: number of scenes of each domain to test on.
        shapes_seed: of the scenes; the run's seed plays no part.
        mnist_b: what domain B is of ``digits`` and ``mnist``: ``inverted`` or ``edges``.
        domain_a: sequences of ``camvid``.
        domain_b: sequences of ``camvid``; null: all but those of ``domain_a``.
        predict_folder: ``predict`` runs on the pictures below this folder, in their own size; batches
            then have ``path``. null: on the test pictures.
        predict_domain: ``a`` or ``b``, the domain of the pictures to predict.

    Attributes:
        train_a: the pictures to train on as they would be evaluated, after ``setup``; also ``train_b``,
            ``val_a``, ``val_b``, ``test_a``, ``test_b``.
        domain_names: of the domains, by ``a`` and ``b``.
        mask_classes: names of the class ids in masks; None without masks.
        image_channels: of all images; None until it is known, for ``folder`` in ``setup``.

    Raises:
        ValueError: arguments that cannot be met or contradict the data.
        FileNotFoundError: data are missing.
        RuntimeError: damaged data, or more than 8 bits per channel.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        root: str = "data",
        preprocess: str = "resize_and_crop",
        load_size: int | None = None,
        crop_size: int | None = None,
        horizontal_flip: bool | None = None,
        channels: int | None = None,
        pairing: str = "random",
        swap_domains: bool = False,
        val_fraction: float = VAL_FRACTION,
        batch_size: int = 1,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        cache_limit: float = 2.0,
        download: bool = False,
        shapes: SceneOptions = SCENES,
        shapes_b: dict[str, Any] | None = None,
        shapes_train: int = 1000,
        shapes_val: int = 100,
        shapes_test: int = 200,
        shapes_seed: int = 0,
        mnist_b: str = "inverted",
        domain_a: list[str] = list(DUSK),  # noqa: B006 (never changed; jsonargparse shows it)
        domain_b: list[str] | None = None,
        predict_folder: str | None = None,
        predict_domain: str = "a",
    ) -> None:
        for name, choice, choices in (
            ("dataset", dataset, DATASETS),
            ("preprocess", preprocess, PREPROCESS),
            ("pairing", pairing, PAIRINGS),
            ("mnist_b", mnist_b, tuple(OTHER_DIGITS)),
            ("predict_domain", predict_domain, SIDES),
        ):
            if choice not in choices:
                raise unknown_name(name, choice, choices)
        files, digits = dataset in ("folder", "camvid"), dataset in ("digits", "mnist")
        if isinstance(shapes, dict):  # out of a checkpoint
            shapes = SceneOptions(**shapes)
        for name, value, default, applies in (
            ("preprocess", preprocess, "resize_and_crop", files),
            ("load_size", load_size, None, files or digits),
            ("crop_size", crop_size, None, files or digits),
            ("channels", channels, None, files or digits),
            ("val_fraction", val_fraction, VAL_FRACTION, files or digits),
            ("download", download, False, digits),
            ("shapes_b", shapes_b, None, dataset == "shapes"),
            ("mnist_b", mnist_b, "inverted", digits),
            ("domain_a", list(domain_a), list(DUSK), dataset == "camvid"),
            ("domain_b", domain_b, None, dataset == "camvid"),
        ):
            if value != default and not applies:
                raise ValueError(
                    f"{name}={value} does not apply to {dataset}; leave out --data.{name}"
                )
        if channels not in (None, 1, 3):
            raise ValueError(f"channels={channels} must be 1 (grey), 3 (RGB) or null")
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction} is a fraction below 1; use e.g. 0.1, or 0 to train on all"
            )
        demand_at_least(0, cache_limit=cache_limit)
        loaded = load_size or (DIGIT_SIZE if digits else LOAD_SIZE)
        sizing = Sizing(preprocess, loaded, crop_size or (loaded if digits else CROP_SIZE))
        demand_at_least(1, most=10**9, load_size=load_size, crop_size=crop_size)
        demand_at_least(
            1,
            most=10**9,
            shapes_train=shapes_train,
            shapes_val=shapes_val,
            shapes_test=shapes_test,
        )
        if preprocess.endswith("_and_crop") and sizing.crop_size > sizing.load_size:
            raise ValueError(
                f"crop_size={sizing.crop_size} is larger than load_size={sizing.load_size}, out of "
                f"which it is cut; use --data.load_size {sizing.crop_size} or more"
            )
        resized_to_crop = preprocess == "resize_and_crop" and sizing.load_size == sizing.crop_size
        super().__init__(
            batch_size,
            eval_batch_size,
            num_workers,
            horizontal_flip=files if horizontal_flip is None else horizontal_flip,
            random_crop=None if dataset == "shapes" or resized_to_crop else sizing.crop,
        )
        # As a dict, since a checkpoint with an object of ours would not load with weights_only.
        self.save_hyperparameters(ignore=["shapes"])
        self.save_hyperparameters({"shapes": asdict(shapes)})
        self.dataset = dataset
        self.root = root
        self.pairing = pairing
        self.swap_domains = swap_domains
        self.val_fraction = val_fraction
        self.predict_folder = predict_folder
        self.predict_domain = predict_domain
        self.sizing = sizing
        path, limit = Path(root).expanduser(), cache_limit * 2**30
        self._domains: Domains
        if dataset == "shapes":
            counts = dict(zip(PARTS, (shapes_train, shapes_val, shapes_test), strict=True))
            options = {"a": shapes, "b": _other_scenes(shapes, shapes_b)}
            self._domains = SceneDomains(options, counts, shapes_seed, limit)
        elif digits:
            self._domains = DigitDomains(
                dataset, path, mnist_b, sizing, channels, val_fraction, download
            )
        elif dataset == "camvid":
            # A sequence such as 0001 in YAML would be a number.
            first = [str(name) for name in domain_a]
            second = None if domain_b is None else [str(name) for name in domain_b]
            self._domains = CamVidDomains(
                path, sizing, channels, val_fraction, limit, first, second
            )
        else:
            self._domains = FolderDomains(path, sizing, channels, val_fraction, limit)
        self.image_channels = self._domains.channels
        self.train: UnpairedImageDataset | None = None
        self.train_a: DomainDataset | None = None
        self.train_b: DomainDataset | None = None
        self.val_a: DomainDataset | None = None
        self.val_b: DomainDataset | None = None
        self.test_a: DomainDataset | None = None
        self.test_b: DomainDataset | None = None
        self.pictures: DomainDataset | None = None

    @property
    def domain_names(self) -> dict[str, str]:
        """The names of domain ``a`` and ``b``; of ``camvid`` known once the files have been seen."""
        return {side: self._domains.names[self._source_side(side)] for side in SIDES}

    @property
    def mask_classes(self) -> list[str] | None:
        """Names of the class ids in masks, id 0 first; None without masks."""
        return self._domains.mask_classes

    @property
    def split_info(self) -> dict[str, Any]:
        """What was trained and evaluated on, in plain values for results and checkpoints."""
        of_set: dict[str, Any] = {**asdict(self.sizing), "val_fraction": self.val_fraction}
        if isinstance(self._domains, SceneDomains):
            of_set = {
                name: self._domains.options[self._source_side(side)].plain()
                for name, side in (("shapes_a", "a"), ("shapes_b", "b"))
            }
            of_set["shapes_seed"] = self._domains.seed
        sets = {
            f"{part}_{side}": getattr(self, f"{part}_{side}") for part in PARTS for side in SIDES
        }
        return {
            "dataset": self.dataset,
            "domains": self.domain_names,
            "channels": self.image_channels,
            "pairing": self.pairing,
            **of_set,
            "counts": {name: len(images) for name, images in sets.items() if images is not None},
        }

    def check_files(self, stage: TrainerFn | None) -> None:
        """Downloads if asked to, and makes sure that the files are there before anything starts."""
        self._domains.check(parts_of(stage))

    def open_parts(self, stage: str | None) -> None:
        """Opens what the stage needs; what was opened before is kept."""
        parts = [part for part in parts_of(stage) if getattr(self, f"{part}_a") is None]
        if not parts:
            return
        self._domains.check(parts)
        opened = self._domains.open(parts)
        self.image_channels = self._domains.channels
        training: dict[str, BatchDataset] = {}
        for part in parts:
            for side in SIDES:
                of_side = opened[self._source_side(side), part]
                of_side.evaluation.domain = side
                setattr(self, f"{part}_{side}", of_side.evaluation)
                training |= {side: of_side.training} if part == "train" else {}
        if training:
            self._demand_batches(training)
            self.train = UnpairedImageDataset(training["a"], training["b"])

    def train_sampler(
        self, dataset: BatchDataset, world: int, rank: int, batches: int | None
    ) -> ShardedSampler:
        """Gives out pairs of places, one in each domain."""
        assert isinstance(dataset, UnpairedImageDataset)
        return PairSampler(dataset, self.pairing, self.batch_size, world, rank, batches)

    def val_dataloader(self) -> list[DataLoader]:
        """[A, B]."""
        assert self.val_a is not None, "setup('fit') comes first"
        assert self.val_b is not None
        return [self._evaluation(part) for part in (self.val_a, self.val_b)]

    def test_dataloader(self) -> list[DataLoader]:
        """[A, B]."""
        assert self.test_a is not None, "setup('test') comes first"
        assert self.test_b is not None
        return [self._evaluation(part) for part in (self.test_a, self.test_b)]

    def predict_dataloader(self) -> DataLoader:
        """The pictures of ``predict_folder``, or the test pictures of ``predict_domain`` without one."""
        pictures = self.pictures
        if self.predict_folder is None:
            pictures = self.test_a if self.predict_domain == "a" else self.test_b
        assert pictures is not None, "setup('predict') comes first"
        return self._evaluation(pictures)

    def state_dict(self) -> dict[str, Any]:
        """What a and b are, for the checkpoint."""
        return {
            "dataset": self.dataset,
            "swap_domains": self.swap_domains,
            "image_channels": self.image_channels,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint of other channels or directions; a predicted folder takes its channels.

        Raises:
            ValueError: images of another number of channels, or the same data with A and B swapped.
        """
        if not state_dict:
            return
        then = state_dict["image_channels"]
        if self.predicts_folder:
            if then != self.image_channels:
                self.image_channels = then
                self.pictures = None
                self.setup("predict")
            return
        if then != self.image_channels:
            raise ValueError(
                f"the checkpoint was trained on images of {then} channels, but the data have "
                f"{self.image_channels}; use --data.channels {then}"
            )
        swapped = state_dict["swap_domains"]
        if state_dict["dataset"] == self.dataset and swapped != self.swap_domains:
            raise ValueError(
                f"the checkpoint was trained with swap_domains={swapped}, so its A is B here; use "
                f"--data.swap_domains {str(swapped).lower()}"
            )

    def _source_side(self, side: str) -> str:
        return {"a": "b", "b": "a"}[side] if self.swap_domains else side

    def _evaluation(self, pictures: DomainDataset) -> DataLoader:
        various = -1 in pictures.sample_shape
        return self.eval_loader(pictures, 1 if various else None)

    def _demand_batches(self, training: dict[str, BatchDataset]) -> None:
        """Raises ValueError if a process would have to batch pictures of various sizes."""
        world, _ = self._processes()
        for side, pictures in training.items():
            if (
                -1 in pictures.sample_shape
                and self.random_crop is None
                and self.batch_size // world > 1
            ):
                raise ValueError(
                    f"the pictures of domain {self.domain_names[side]} differ in size with preprocess="
                    f"{self.sizing.preprocess}, so that {self.batch_size // world} cannot be a batch; "
                    f"use --data.batch_size {world}, or --data.preprocess resize_and_crop"
                )

    def open_folder(self, folder: str) -> DomainDataset:
        """The pictures of a folder, of ``predict_domain``."""
        files = pictures_to_predict(folder)
        reader = PictureReader(self.image_channels or 3)
        size = common_size(picture_sizes(files, folder, "checking pictures"), reader)
        pictures = PictureFileDataset(files, size, decode=reader.picture, channels=reader.channels)
        return DomainDataset(pictures, self.predict_domain)


class UnpairedImageDataset(BatchDataset):
    """The training pictures of two domains, taken by pairs of places.

    Args:
        a: of domain A.
        b: of domain B.
    """

    def __init__(self, a: BatchDataset, b: BatchDataset) -> None:
        self.sides = {"a": a, "b": b}
        self.sample_shape = a.sample_shape

    def __len__(self) -> int:
        return max(len(side) for side in self.sides.values())

    def __getitems__(self, indices: Any) -> dict[str, Any]:
        """The batch of these pairs, [B, 2] places in A and in B: of each side ``image`` and ``index``.

        Pictures of various sizes are padded, and ``size`` is the list of their (height, width).
        """
        places = torch.as_tensor(indices, dtype=torch.int64)
        batch = {}
        for column, (name, side) in enumerate(self.sides.items()):
            found = side.__getitems__(places[:, column])
            batch[name] = {k: found[k] for k in ("image", "index", "size") if k in found}
        return batch


class PairSampler(ShardedSampler):
    """Gives out pairs (place in A, place in B), the same ones for any number of processes.

    Args:
        dataset: the two sets.
        pairing: ``random``, ``permute`` or ``serial``; see :class:`UnpairedDataModule`.
        batch_size: the global batch, over all processes.
        num_replicas: number of processes.
        rank: this process.
        batches: as in :class:`ShardedSampler`.
    """

    def __init__(
        self,
        dataset: UnpairedImageDataset,
        pairing: str,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        batches: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, rank, batches=batches)
        self.sizes = tuple(len(side) for side in dataset.sides.values())
        self.pairing = pairing

    def order(self) -> Tensor:
        """The pairs of an epoch, int64 [N, 2]."""
        items = super().order()
        n_a, n_b = self.sizes
        if self.pairing == "serial":
            return torch.tensor(serial_indices(n_a, n_b))[items]
        generator = keyed_generator("partner", self.epoch)
        if self.pairing == "random":
            partners = torch.randint(n_b, (len(items),), generator=generator)
        else:
            rounds = -(-len(items) // n_b)
            drawn = [torch.randperm(n_b, generator=generator) for _ in range(rounds)]
            partners = torch.cat(drawn)[: len(items)]
        return torch.stack([items % n_a, partners], dim=1)


def serial_indices(n_a: int, n_b: int) -> list[tuple[int, int]]:
    """The places in A and in B of every item in the order of the files, with serial pairing.

    Args:
        n_a: number of pictures of domain A.
        n_b: number of pictures of domain B.

    Returns:
        as many pairs as the larger domain has pictures.
    """
    return [(item % n_a, item % n_b) for item in range(max(n_a, n_b))]


def _other_scenes(options: SceneOptions, changed: dict[str, Any] | None) -> SceneOptions:
    changed = {"domain": "night"} if changed is None else changed
    names = [field.name for field in fields(SceneOptions)]
    for name in changed:
        if name not in names:
            raise unknown_name("option in --data.shapes_b", name, names)
    other = replace(options, **changed)
    if other == options:
        raise ValueError(
            f"shapes_b={changed} changes nothing, so both domains are the same; use e.g. "
            "--data.shapes_b '{domain: sketch}'"
        )
    return other
