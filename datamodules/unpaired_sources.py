"""Where the two domains of a translation come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules import camvid
from datamodules.datasets import BatchDataset, ImageArrayDataset, PictureFileDataset
from datamodules.pictures import image_files, picture_sizes, visit_files
from datamodules.shapes import DRAWN_AT_ONCE, Scenes
from datamodules.shapes_options import SceneOptions
from datamodules.sources import draw_per_class, open_source, prepare_source
from datamodules.unpaired_sizes import PictureReader, Sizing

SIDES = ("a", "b")
GREY_MODES = ("1", "L", "LA", "La")
# So far apart that the number of scenes of one part changes no other part.
FIRST_SCENE = {
    ("a", "train"): 0,
    ("a", "val"): 10**9,
    ("a", "test"): 2 * 10**9,
    ("b", "train"): 3 * 10**9,
    ("b", "val"): 4 * 10**9,
    ("b", "test"): 5 * 10**9,
}


# ------------------------------------------------------------------------------- sets
class DomainDataset(BatchDataset):
    """The pictures of one domain as they are evaluated, with the truth where it is known.

    Args:
        images: gives ``image``, ``index`` and perhaps ``path`` and ``size``.
        domain: ``a`` or ``b``.
        masks: places int64 [B] -> class ids uint8 [B, H, W], 255 for void.
        counterparts: places int64 [B] -> the same pictures in the other domain, uint8 [B, C, H, W].
    """

    def __init__(
        self,
        images: BatchDataset,
        domain: str,
        masks: Callable[[Tensor], Tensor] | None = None,
        counterparts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images = images
        self.domain = domain
        self.masks = masks
        self.counterparts = counterparts
        self.sample_shape = images.sample_shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """``image`` uint8 [B, C, H, W], ``index`` int64 [B], ``domain`` (a plain str) and what is known.

        That is ``mask`` uint8 [B, H, W], ``counterpart`` uint8 [B, C, H, W], ``path`` (list of str)
        and, where sizes differ, ``size`` (list of (height, width), in a padded batch).
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        found = self.images.__getitems__(index)
        kept = ("image", "index", "path", "size")
        batch = {name: found[name] for name in kept if name in found}
        batch["domain"] = self.domain
        if self.masks is not None:
            batch["mask"] = self.masks(index)
        if self.counterparts is not None:
            batch["counterpart"] = self.counterparts(index)
        return batch


@dataclass(frozen=True)
class DomainPart:
    """One part (training, validation or test) of one domain.

    Attributes:
        evaluation: the pictures as they are evaluated.
        training: the same pictures, in the same order, as they are before the random crop.
    """

    evaluation: DomainDataset
    training: BatchDataset


class Domains(Protocol):
    """Two domains. ``side`` is ``a`` or ``b``, ``part`` is ``train``, ``val`` or ``test``.

    Attributes:
        names: of the domains, by side; known after ``check``.
        mask_classes: names of the class ids in masks; None without masks.
        channels: of the images; None until ``open`` has seen them.
    """

    names: dict[str, str]
    mask_classes: list[str] | None
    channels: int | None

    def check(self, parts: Sequence[str]) -> None:
        """Raises unless what these parts need is there; reads no pixels."""

    def open(self, parts: Sequence[str]) -> dict[tuple[str, str], DomainPart]:
        """Opens these parts of both domains, by (side, part)."""


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor, as :class:`DomainDataset` asks for masks and counterparts."""

    tensor: Tensor

    def __call__(self, index: Tensor) -> Tensor:
        """[B, ...] of these places."""
        return self.tensor.index_select(0, index)


@dataclass(frozen=True)
class MaskFiles:
    """Masks in files, as :class:`DomainDataset` asks for them."""

    files: PictureFileDataset

    def __call__(self, index: Tensor) -> Tensor:
        """Class ids uint8 [B, H, W] of these places."""
        return self.files.__getitems__(index)["image"][:, 0]


# ------------------------------------------------------------------------------- files
@dataclass(frozen=True)
class DomainFiles:
    """The picture files of one part of one domain, and their masks if there are any."""

    pictures: list[Path]
    masks: list[Path] | None = None


class FileDomains:
    """Domains of picture files; subclasses list them.

    Pictures of a folder are read with as many channels as they have, and must then agree.

    Args:
        root: folder of the files.
        sizing: how pictures are resized.
        channels: to which pictures are converted; None: what they have.
        val_fraction: of the training pictures held out for validation, where there are no others; 0:
            those that are trained on are validated on.
        cache_limit: a set that takes at most so many bytes stays decoded in memory.
    """

    def __init__(
        self,
        root: Path,
        sizing: Sizing,
        channels: int | None,
        val_fraction: float,
        cache_limit: float,
    ) -> None:
        self.root = root
        self.sizing = sizing
        self.channels = channels
        self.val_fraction = val_fraction
        self.cache_limit = cache_limit
        self.names = {side: side.upper() for side in SIDES}
        self.mask_classes: list[str] | None = None
        self._converted = channels is not None
        self._first: tuple[Path, bool] | None = None

    def check(self, parts: Sequence[str]) -> None:
        """Raises FileNotFoundError unless there are files for these parts."""
        for part in parts:
            for side in SIDES:
                self.files(side, part)

    def files(self, side: str, part: str) -> DomainFiles:
        """Lists the files.

        Raises:
            FileNotFoundError: there are none.
            ValueError: the training pictures are too few to hold some out.
        """
        raise NotImplementedError

    def open(self, parts: Sequence[str]) -> dict[tuple[str, str], DomainPart]:
        """Looks at the headers of all files, then decodes what fits into memory.

        Raises:
            RuntimeError: damaged files or masks; names up to five of them.
            ValueError: a picture too small, grey beside colour pictures, or a mask of another size.
        """
        found = {(side, part): self.files(side, part) for side in SIDES for part in parts}
        sizes = {key: self._sizes(*key, files) for key, files in found.items()}
        if self.channels is None:
            assert self._first is not None
            self.channels = 1 if self._first[1] else 3
        return {key: self._open(*key, files, sizes[key]) for key, files in found.items()}

    def _sizes(self, side: str, part: str, files: DomainFiles) -> list[tuple[int, int]]:
        """Height and width of every picture; checks all that can be known without decoding."""
        name = f"domain {self.names[side]}, {part}"
        sizes = picture_sizes(files.pictures, name, "checking pictures")
        for path, (height, width) in zip(files.pictures, sizes, strict=True):
            self.sizing.demand_possible(path, width, height, part == "train")
        if files.masks is not None:
            of_masks = picture_sizes(files.masks, f"masks of {name}")
            for picture, mask, size, other in zip(
                files.pictures, files.masks, sizes, of_masks, strict=True
            ):
                if size != other:
                    raise ValueError(
                        f"{mask} is {other[1]}x{other[0]} but {picture} is {size[1]}x{size[0]} "
                        "(width x height); a mask has the size of its picture"
                    )
        if not self._converted:
            self._demand_one_kind(files.pictures, name)
        return sizes

    def _demand_one_kind(self, paths: list[Path], name: str) -> None:
        grey = [False] * len(paths)

        def look(position: int) -> None:
            with Image.open(paths[position]) as picture:
                grey[position] = picture.mode in GREY_MODES

        visit_files(look, paths, name)
        for path, is_grey in zip(paths, grey, strict=True):
            self._first = self._first or (path, is_grey)
            if is_grey != self._first[1]:
                colour, other = (self._first[0], path) if is_grey else (path, self._first[0])
                raise ValueError(
                    f"{other} is grey but {colour} has colours; use --data.channels 1 or 3 to convert "
                    "all pictures"
                )

    def _open(
        self, side: str, part: str, files: DomainFiles, sizes: list[tuple[int, int]]
    ) -> DomainPart:
        assert self.channels is not None
        name = f"domain {self.names[side]}, {part}"
        reader = PictureReader(self.channels, self.sizing)
        used = PictureReader(self.channels, self.sizing, training=part == "train")
        training = PictureFileDataset(
            files.pictures, common_size(sizes, used), decode=used.picture, channels=self.channels
        )
        if self._fits(sizes, used):
            training.keep(name)
        evaluation = training
        if any(used.size(w, h) != reader.size(w, h) for h, w in sizes):
            evaluation = PictureFileDataset(
                files.pictures,
                common_size(sizes, reader),
                decode=reader.picture,
                channels=self.channels,
            )
            # Perhaps nobody ever evaluates training pictures.
            if self._fits(sizes, reader):
                evaluation.keep_read()
        masks = None
        if files.masks is not None:
            masks = PictureFileDataset(
                files.masks,
                common_size(sizes, reader),
                decode=reader.mask,
                channels=1,
                padding=camvid.VOID,
            )
            # Whatever their number: it takes reading all to know that every id is a class.
            masks.keep(f"masks of {name}")
        truth = None if masks is None else MaskFiles(masks)
        return DomainPart(DomainDataset(evaluation, side, truth), training)

    def _fits(self, sizes: list[tuple[int, int]], reader: PictureReader) -> bool:
        read = (reader.size(width, height) for height, width in sizes)
        return sum(w * h for w, h in read) * reader.channels <= self.cache_limit


def common_size(sizes: list[tuple[int, int]], reader: PictureReader) -> tuple[int, int] | None:
    """The one (height, width) that all pictures have when read; None if they differ."""
    read = {reader.size(width, height) for height, width in sizes}
    if len(read) > 1:
        return None
    width, height = read.pop()
    return height, width


class FolderDomains(FileDomains):
    """``folder``: pictures below ``ROOT/trainA``, ``trainB``, ``testA`` and ``testB``.

    Validation pictures are those of ``valA`` and ``valB`` if these are there.
    """

    def files(self, side: str, part: str) -> DomainFiles:
        """Lists the files, sorted by path; a held-out part is drawn once with a fixed seed."""
        if part == "test" or self._has_validation():
            return DomainFiles(self._list(f"{part}{side.upper()}"))
        pictures = self._list(f"train{side.upper()}")
        if not self.val_fraction:
            return DomainFiles(pictures)
        rest, held_out = draw_per_class(
            torch.zeros(len(pictures)), self.val_fraction, f"unpaired validation {side}"
        )
        if not len(rest):
            raise ValueError(
                f"{self.root}/train{side.upper()} has {len(pictures)} picture, which leaves none to "
                f"train on beside the val_fraction={self.val_fraction}; use --data.val_fraction 0, or "
                "give validation pictures in valA and valB"
            )
        chosen = rest if part == "train" else held_out
        return DomainFiles([pictures[i] for i in chosen.tolist()])

    def _has_validation(self) -> bool:
        return any((self.root / f"val{side.upper()}").is_dir() for side in SIDES)

    def _list(self, name: str) -> list[Path]:
        folder = self.root / name
        expected = "folders trainA, trainB, testA and testB with the pictures of the two domains"
        mend = "give the folder that holds them with --data.root DIR"
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} does not exist: expected {expected}; {mend}")
        if not folder.is_dir():
            there = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
            listed = ", ".join(there[:10]) + ", ..." * (len(there) > 10)
            raise FileNotFoundError(
                f"{folder} is missing: expected {expected}, but {self.root} has "
                f"{listed or 'no folders'}; {mend}"
            )
        files = image_files(folder)
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no pictures, so domain {name[-1]} is empty (looked for "
                f"{', '.join(IMG_EXTENSIONS)}, recursively)"
            )
        return files


class CamVidDomains(FileDomains):
    """``camvid``: drives of :mod:`datamodules.camvid` against each other, with masks for evaluation.

    The last frames of each drive are held out of training for validation.
    """

    def __init__(
        self,
        root: Path,
        sizing: Sizing,
        channels: int | None,
        val_fraction: float,
        cache_limit: float,
        domain_a: list[str],
        domain_b: list[str] | None,
    ) -> None:
        super().__init__(
            root, sizing, 3 if channels is None else channels, val_fraction, cache_limit
        )
        self.mask_classes = list(camvid.CLASS_NAMES)
        self._wanted = domain_a, domain_b
        self._frames: dict[str, tuple[list[camvid.Frame], list[camvid.Frame]]] = {}

    def files(self, side: str, part: str) -> DomainFiles:
        """Lists frames and masks, drive by drive in the order of time."""
        if not self._frames:
            frames = camvid.list_frames(self.root)
            chosen = camvid.choose_sequences(frames, *self._wanted)
            for name, sequences in zip(SIDES, chosen, strict=True):
                self._frames[name] = camvid.halves(frames, sequences)
            self.names = {s: "+".join(names) for s, names in zip(SIDES, chosen, strict=True)}
        train, test = self._frames[side]
        if part != "test" and self.val_fraction:
            rest, held_out = camvid.last_share(train, self.val_fraction)
            train = rest if part == "train" else held_out
        frames = test if part == "test" else train
        if not frames:
            raise ValueError(
                f"domain {self.names[side]} of {self.root} has no frame to {part} on; use more of its "
                "sequences, or --data.val_fraction 0"
            )
        return DomainFiles([f.picture for f in frames], [f.mask for f in frames])


# ------------------------------------------------------------------------------- made here
class SceneDomains:
    """``shapes``: procedural scenes, drawn with two sets of options.

    No two parts share a scene, so no training scene has a pair. A mask numbers the objects' values of
    ``options.label``, from 1; 0 is the background. Where the options differ in ``domain``, each scene has
    its counterpart, the same scene drawn in the other domain; whatever else differs, as the sizes of
    objects, is content, which a translation should keep.

    Args:
        options: by side.
        counts: number of scenes of each domain by part.
        seed: of the scenes.
        cache_limit: a set that takes at most so many bytes stays in memory once drawn.
    """

    def __init__(
        self,
        options: Mapping[str, SceneOptions],
        counts: Mapping[str, int],
        seed: int,
        cache_limit: float,
    ) -> None:
        self.options = options
        self.channels: int | None = 3
        self.counts = counts
        self.seed = seed
        self.cache_limit = cache_limit
        first, second = options["a"], options["b"]
        self.paired = first.domain != second.domain
        self.names = {s: o.domain if self.paired else s.upper() for s, o in options.items()}
        values = [*first.values(first.label), *second.values(second.label)]
        self.mask_classes: list[str] | None = ["background", *dict.fromkeys(values)]

    def check(self, parts: Sequence[str]) -> None:
        """Nothing to check: the scenes are drawn here."""

    def open(self, parts: Sequence[str]) -> dict[tuple[str, str], DomainPart]:
        """Draws the scenes, or as many as are asked for where they would take too much memory."""
        return {(side, part): self._open(side, part) for side in SIDES for part in parts}

    def _open(self, side: str, part: str) -> DomainPart:
        options, classes = self.options[side], self.mask_classes
        assert classes is not None
        scenes = Scenes(options, self.seed, self.counts[part], FIRST_SCENE[side, part])
        numbers = torch.tensor([classes.index(v) for v in options.values(options.label)])
        masks: Callable[[Tensor], Tensor] = SceneMasks(scenes, numbers)
        other = self.options["b" if side == "a" else "a"].domain
        counterparts: Callable[[Tensor], Tensor] | None = None
        if self.paired:
            counterparts = SceneCounterparts(scenes, other)
        images: BatchDataset = scenes
        if len(scenes) * 3 * options.image_size**2 <= self.cache_limit:
            images, pieces = scenes.drawn(), scenes.pieces()
            if part != "train":  # every epoch asks for them
                masks = Rows(torch.cat([masks(piece) for piece in pieces]))
                if counterparts is not None:
                    counterparts = Rows(torch.cat([counterparts(piece) for piece in pieces]))
        return DomainPart(DomainDataset(images, side, masks, counterparts), images)


@dataclass(frozen=True)
class SceneMasks:
    """Class ids of the visible objects of scenes, of which ``numbers`` gives one per label."""

    scenes: Scenes
    numbers: Tensor

    def __call__(self, index: Tensor) -> Tensor:
        """Class ids uint8 [B, S, S] of these places."""
        truth = self.scenes.truth(index)
        # Where there is no object, its label is -1 and its mask empty.
        numbers = self.numbers[truth["object_labels"].clamp(min=0)].byte()
        return (truth["object_masks"] * numbers[..., None, None]).amax(1)


@dataclass(frozen=True)
class SceneCounterparts:
    """Scenes in another domain."""

    scenes: Scenes
    domain: str

    def __call__(self, index: Tensor) -> Tensor:
        """Uint8 [B, 3, S, S] of these places."""
        return self.scenes.render(index, domain=self.domain)


class DigitDomains:
    """``digits`` and ``mnist``: digits against inverted digits or their edges, a known translation.

    Half of each class is domain A, the other half domain B, in the training and in the test images, so
    that no digit is in both. Each image has its counterpart, as it would look in the other domain.

    Args:
        dataset: ``digits`` or ``mnist`` of :mod:`datamodules.sources`.
        root: folder of the data.
        kind: of domain B, one of ``OTHER_DIGITS``.
        sizing: the sides to which images are resized.
        channels: 1, or 3 equal ones.
        val_fraction: of the training images of each class held out for validation; 0: those that are
            trained on are validated on.
        download: fetch what is missing.
    """

    def __init__(
        self,
        dataset: str,
        root: Path,
        kind: str,
        sizing: Sizing,
        channels: int | None,
        val_fraction: float,
        download: bool,
    ) -> None:
        self.dataset = dataset
        self.root = root
        self.kind = kind
        self.sizing = sizing
        self.channels: int | None = 3 if channels is None else channels
        self.val_fraction = val_fraction
        self.download = download
        self.names = {"a": dataset, "b": f"{kind} {dataset}"}
        self.mask_classes: list[str] | None = None

    def check(self, parts: Sequence[str]) -> None:
        """Downloads if asked to, and raises unless the files are there."""
        for train in {part != "test" for part in parts}:
            prepare_source(self.dataset, self.root, train, self.download)

    def open(self, parts: Sequence[str]) -> dict[tuple[str, str], DomainPart]:
        """Reads the images."""
        return {(side, part): self._open(side, part) for side in SIDES for part in parts}

    def _open(self, side: str, part: str) -> DomainPart:
        source = open_source(self.dataset, self.root, part != "test")
        half = "test" if part == "test" else "train"
        halves = draw_per_class(source.labels, 0.5, f"unpaired {half} domains")
        places = halves[SIDES.index(side)]
        if part != "test" and self.val_fraction:
            labels = source.labels[places]
            kept = draw_per_class(labels, self.val_fraction, f"unpaired validation {side}")
            places = places[kept[part == "val"]]

        def read(size: int) -> dict[str, Tensor]:
            images = source.read(places, size)[:, : self.channels]
            return {"a": images, "b": OTHER_DIGITS[self.kind](images)}

        def dataset(images: Tensor) -> BatchDataset:
            return ImageArrayDataset(images, source.labels[places], source.class_names)

        both = read(self.sizing.crop_size)
        evaluation = training = dataset(both[side])
        if part == "train" and self.sizing.load_size != self.sizing.crop_size:
            training = dataset(read(self.sizing.load_size)[side])
        counterparts = Rows(both["b" if side == "a" else "a"])
        return DomainPart(DomainDataset(evaluation, side, counterparts=counterparts), training)


def inverted(images: Tensor) -> Tensor:
    """White for black, uint8 of any shape."""
    return 255 - images


def edges(images: Tensor) -> Tensor:
    """The length of the gradient by central differences, uint8 [N, C, H, W], at most 255."""
    pieces = []
    for piece in images.split(DRAWN_AT_ONCE):
        grown = torch.nn.functional.pad(piece.float(), (1, 1, 1, 1), mode="replicate")
        across = grown[..., 1:-1, 2:] - grown[..., 1:-1, :-2]
        down = grown[..., 2:, 1:-1] - grown[..., :-2, 1:-1]
        pieces.append(torch.hypot(across, down).clamp(max=255).round().byte())
    return torch.cat(pieces)


OTHER_DIGITS = {"inverted": inverted, "edges": edges}
