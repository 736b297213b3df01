"""Image sets by name: where their files lie, what is missing, and their pixels as bytes in memory.

==================  ==================================================================
``digits``          bundled with scikit-learn, nothing to provide
``mnist``           ``ROOT/MNIST/raw/*-ubyte`` or the same files as ``.gz``
``fashion_mnist``   ``ROOT/FashionMNIST/raw/*-ubyte`` or the same files as ``.gz``
``svhn``            ``ROOT/train_32x32.mat``, ``ROOT/test_32x32.mat``
``cifar10``         ``ROOT/cifar-10-batches-py/``, or a tree like ``image_folder``
``cifar100``        ``ROOT/cifar-100-python/``, or a tree like ``image_folder``
``tiny_imagenet``   ``ROOT/tiny-imagenet-200/``; its ``val`` images are the test set
``caltech256``      ``ROOT/256_ObjectCategories/NNN.CLASS/*.jpg``, or the same in ``ROOT/caltech256/``
``image_folder``    ``ROOT/train/CLASS/*.jpg``, ``ROOT/test/CLASS/*.jpg`` (or png, webp, ...)
==================  ==================================================================

Labels number the classes in the source's own order; for folders that is the sorted order of their
names. Nothing is ever written into ROOT except by a download.
"""

import gzip
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, Caltech256, FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import download_and_extract_archive

from datamodules.pictures import decode_images, image_files, rgb_squares
from datamodules.pictures import visit_files as visit_files
from lightning_modules.randomness import mix

# Of the sets that come as one, the share of each class that is the test half.
DRAWN_TEST_FRACTION = 0.3

DIGIT_NAMES = [str(digit) for digit in range(10)]

FASHION_MNIST_NAMES = list(FashionMNIST.classes)

CIFAR10_NAMES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]

_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_NAMES = _CIFAR100_NAMES.split()


@dataclass(frozen=True)
class OpenSource:
    """One half (training or test) of an image set: labels read, pixels not yet.

    Attributes:
        labels: int64 [N].
        class_names: name of each label.
        read: ``read(indices, image_size)`` gives those images as uint8 RGB [n, 3, image_size,
            image_size].
    """

    labels: Tensor
    class_names: list[str]
    read: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class ImageSource:
    """Images in memory.

    Attributes:
        images: uint8 RGB [N, 3, S, S]; grey images have three equal channels.
        labels: int64 [N].
        class_names: name of each label.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]


class Source(Protocol):
    """An image set on disk. ``train`` chooses between its training and its test half everywhere.

    ``class_names`` is None where only the files tell the classes.
    """

    class_names: list[str] | None

    def check(self, root: Path, train: bool) -> None:
        """Raises FileNotFoundError if a file that :meth:`open` needs is missing."""

    def download(self, root: Path) -> None:
        """Fetches both halves into ``root``."""

    def open(self, root: Path, train: bool) -> OpenSource:
        """Reads the labels."""


def load_source(
    name: str, root: str | Path, train: bool, image_size: int, download: bool = False
) -> ImageSource:
    """Reads one half of an image set completely.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the root or a file in it is missing.
        RuntimeError: a file is damaged.
    """
    prepare_source(name, root, train, download)
    source = open_source(name, root, train)
    images = source.read(torch.arange(len(source.labels)), image_size)
    return ImageSource(images, source.labels, source.class_names)


def prepare_source(name: str, root: str | Path, train: bool, download: bool = False) -> None:
    """Makes sure that the files are there, after a download if asked for. Reads no pixels.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the root or a file in it is missing.
        RuntimeError: the download failed.
    """
    source, root = _source(name), Path(root).expanduser()
    try:
        source.check(root, train)
    except FileNotFoundError:
        if not download:
            raise
        try:
            root.mkdir(parents=True, exist_ok=True)
            source.download(root)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"could not download {name} into {root}: {error}; check the network, or give an "
                "existing copy with --data.root DIR"
            ) from error
        source.check(root, train)


def open_source(name: str, root: str | Path, train: bool) -> OpenSource:
    """Reads the labels of one half of an image set; the caller then chooses which pixels to read.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the root or a file in it is missing.
        RuntimeError: a file is damaged.
    """
    source, root = _source(name), Path(root).expanduser()
    source.check(root, train)
    return source.open(root, train)


def open_whole_source(name: str, root: str | Path) -> OpenSource:
    """Both halves of an image set as one, the training half first.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the root or a file in it is missing.
        RuntimeError: a file is damaged.
    """
    first, second = (open_source(name, root, train) for train in (True, False))
    count = len(first.labels)

    def read(indices: Tensor, image_size: int) -> Tensor:
        images = torch.empty(len(indices), 3, image_size, image_size, dtype=torch.uint8)
        for half, chosen, offset in (
            (first, indices < count, 0),
            (second, indices >= count, count),
        ):
            if chosen.any():
                images[chosen] = half.read(indices[chosen] - offset, image_size)
        return images

    return OpenSource(torch.cat([first.labels, second.labels]), first.class_names, read)


def class_names_of(name: str) -> list[str] | None:
    """The class names of an image set; None if only its files tell them.

    Raises:
        ValueError: unknown name.
    """
    return _source(name).class_names


class Digits:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels with 17 grey levels.

    They come as one set. 30 % of each class, drawn once with a fixed seed that does not depend on
    the run's, are the test half.
    """

    class_names: list[str] | None = DIGIT_NAMES

    def check(self, root: Path, train: bool) -> None:
        """Nothing to check: the images come with scikit-learn."""

    def download(self, root: Path) -> None:
        """Nothing to download: the images come with scikit-learn."""

    def open(self, root: Path, train: bool) -> OpenSource:
        """Reads everything."""
        digits = load_digits()
        images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target).long()
        halves = draw_per_class(labels, DRAWN_TEST_FRACTION, "digits test")
        chosen = halves[0] if train else halves[1]
        # Without antialiasing: it would only matter below 8 pixels, where nothing can be
        # recognised.
        return OpenSource(
            labels[chosen],
            DIGIT_NAMES,
            lambda indices, size: rgb_squares(images[chosen[indices]], size, antialias=False),
        )


class IdxFiles:
    """MNIST and sets in its format, also as mere ``.gz`` files in a folder that is read-only."""

    def __init__(self, dataset: type[MNIST], class_names: list[str]) -> None:
        self.dataset = dataset
        self.class_names: list[str] | None = class_names

    def check(self, root: Path, train: bool) -> None:
        """Raises FileNotFoundError unless images and labels are there, unpacked or not."""
        for path in self._files(root, train):
            packed = path.with_name(path.name + ".gz")
            if not path.is_file() and not packed.is_file():
                raise _missing(root, path, f"{self.dataset.__name__} (that file, or {packed.name})")

    def download(self, root: Path) -> None:
        """Lets torchvision fetch and unpack the files."""
        self.dataset(str(root), download=True)

    def open(self, root: Path, train: bool) -> OpenSource:
        """Reads both files."""
        image_file, label_file = self._files(root, train)
        with _plain(image_file) as path, _naming(image_file):
            images = read_image_file(str(path))[:, None]
        with _plain(label_file) as path, _naming(label_file):
            labels = read_label_file(str(path))
        if len(images) != len(labels):
            raise RuntimeError(
                f"{image_file} has {len(images)} images but {label_file.name} has {len(labels)} "
                "labels"
            )
        assert self.class_names is not None
        return OpenSource(
            labels, self.class_names, lambda indices, size: rgb_squares(images[indices], size)
        )

    def _files(self, root: Path, train: bool) -> tuple[Path, Path]:
        raw, half = root / self.dataset.__name__ / "raw", "train" if train else "t10k"
        return raw / f"{half}-images-idx3-ubyte", raw / f"{half}-labels-idx1-ubyte"


class StreetViewDigits:
    """SVHN, cropped 32x32 digits without the ``extra`` images. The files' digit 10 is label 0."""

    class_names: list[str] | None = DIGIT_NAMES

    def check(self, root: Path, train: bool) -> None:
        """Raises FileNotFoundError unless the ``.mat`` file is there."""
        path = root / SVHN.split_list["train" if train else "test"][1]
        if not path.is_file():
            raise _missing(root, path, "SVHN")

    def download(self, root: Path) -> None:
        """Lets torchvision fetch both files."""
        for split in ("train", "test"):
            SVHN(str(root), split, download=True)

    def open(self, root: Path, train: bool) -> OpenSource:
        """Reads the ``.mat`` file, whose checksum torchvision verifies."""
        split = "train" if train else "test"
        with _naming(root / SVHN.split_list[split][1]):
            data = SVHN(str(root), split)
        return OpenSource(
            torch.from_numpy(data.labels).long(),
            DIGIT_NAMES,
            lambda indices, size: rgb_squares(torch.from_numpy(data.data[indices.numpy()]), size),
        )


class Cifar:
    """CIFAR-10 or CIFAR-100 (fine labels), as published or as a tree ``train|test/CLASS/*``."""

    def __init__(self, dataset: type[CIFAR10], class_names: list[str]) -> None:
        self.dataset = dataset
        self.class_names: list[str] | None = class_names

    def check(self, root: Path, train: bool) -> None:
        """Raises FileNotFoundError unless all batches or the folder tree are there."""
        if self._is_tree(root):
            return ImageFolder().check(root, train)
        batches = self.dataset.train_list + self.dataset.test_list
        for filename in [str(self.dataset.meta["filename"]), *(batch[0] for batch in batches)]:
            path = root / self.dataset.base_folder / filename
            if not path.is_file():
                raise _missing(
                    root, path, f"{self.dataset.__name__} (that folder, or train/CLASS/*.jpg)"
                )

    def download(self, root: Path) -> None:
        """Lets torchvision fetch and unpack the archive."""
        self.dataset(str(root), download=True)

    def open(self, root: Path, train: bool) -> OpenSource:
        """Reads the batches, whose checksums torchvision verifies, or lists the tree."""
        assert self.class_names is not None
        if self._is_tree(root):
            tree = ImageFolder().open(root, train)
            if tree.class_names != self.class_names:
                wrong = sorted(set(tree.class_names) ^ set(self.class_names))
                raise RuntimeError(
                    f"{root} is no {self.dataset.__name__} tree: {', '.join(wrong[:5])} should or "
                    "should not be there; use --data.dataset image_folder for other classes"
                )
            return tree
        with _naming(root / self.dataset.base_folder):
            data = self.dataset(str(root), train)
        pixels: Any = data.data
        return OpenSource(
            torch.tensor(data.targets),
            self.class_names,
            lambda indices, size: rgb_squares(
                torch.from_numpy(pixels[indices.numpy()]).permute(0, 3, 1, 2), size
            ),
        )

    def _is_tree(self, root: Path) -> bool:
        assert self.class_names is not None
        return any((root / "train" / name).is_dir() for name in self.class_names)


class TinyImageNet:
    """TinyImageNet: 200 classes, 64x64. The official validation images are the test half."""

    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5 = "90528d7ca1a48142e341f4ef8d21d0de"
    class_names: list[str] | None = None

    def check(self, root: Path, train: bool) -> None:
        """Raises FileNotFoundError unless the half is there."""
        base = self._base(root)
        needed = [base / "train"] if train else [base / "val" / "val_annotations.txt"]
        for path in [*needed, base / "wnids.txt"]:
            if not path.exists():
                raise _missing(root, path, "TinyImageNet (the unpacked tiny-imagenet-200.zip)")

    def download(self, root: Path) -> None:
        """Fetches and unpacks the archive of 237 MB."""
        download_and_extract_archive(self.url, str(root), md5=self.md5)

    def open(self, root: Path, train: bool) -> OpenSource:
        """Lists the files; the index of a class is its place among the sorted WordNet ids."""
        base = self._base(root)
        names = sorted((base / "wnids.txt").read_text().split())
        if train:
            found = [(path, name) for name in names for path in image_files(base / "train" / name)]
        else:
            annotations = base / "val" / "val_annotations.txt"
            rows = [line.split("\t") for line in annotations.read_text().splitlines() if line]
            known = set(names)
            bad = [row for row in rows if len(row) < 2 or row[1] not in known]
            if bad:
                raise RuntimeError(f"{annotations} has a line that names no class: {bad[0]}")
            found = [(base / "val" / "images" / row[0], row[1]) for row in rows]
        return _open_files(found, names, "tiny_imagenet", base)

    def _base(self, root: Path) -> Path:
        return root if (root / "wnids.txt").is_file() else root / "tiny-imagenet-200"


class CaltechObjects:
    """Caltech-256: 256 categories of objects and ``clutter``, pictures of any size.

    They come as one set. 30 % of each category, drawn once with a fixed seed that does not depend
    on the run's, are the test half.
    """

    class_names: list[str] | None = None

    def check(self, root: Path, train: bool) -> None:
        """Raises FileNotFoundError unless there are category folders."""
        base = self._base(root)
        if not base.is_dir():
            raise _missing(root, base, "Caltech-256 (the unpacked 256_ObjectCategories.tar)")
        if not self._categories(base):
            raise FileNotFoundError(
                f"{base} has no category folders; expected {base}/001.ak47 to {base}/257.clutter"
            )

    def download(self, root: Path) -> None:
        """Lets torchvision fetch and unpack the archive of 1.2 GB into ``ROOT/caltech256``."""
        Caltech256(str(root), download=True)

    def open(self, root: Path, train: bool) -> OpenSource:
        """Lists the files; a class is named without its number, and counted from 0."""
        base = self._base(root)
        folders = self._categories(base)
        # Not those deeper down: two categories of the archive hold folders that are no part of it.
        found = [
            (path, folder)
            for folder in folders
            for path in image_files(base / folder)
            if path.parent == base / folder
        ]
        whole = _open_files(found, folders, "caltech256", base)
        halves = draw_per_class(whole.labels, DRAWN_TEST_FRACTION, "caltech256 test")
        chosen = halves[0] if train else halves[1]
        return OpenSource(
            whole.labels[chosen],
            [folder.partition(".")[2] for folder in folders],
            lambda indices, size: whole.read(chosen[indices], size),
        )

    def _base(self, root: Path) -> Path:
        nested = root / "caltech256" / "256_ObjectCategories"
        return nested if nested.is_dir() else root / "256_ObjectCategories"

    def _categories(self, base: Path) -> list[str]:
        return sorted(
            entry.name
            for entry in base.iterdir()
            if entry.is_dir() and re.fullmatch(r"\d{3}\..+", entry.name)
        )


class ImageFolder:
    """Pictures in ``train/CLASS`` and ``test/CLASS``; a class may occur in one of the two only."""

    class_names: list[str] | None = None

    def check(self, root: Path, train: bool) -> None:
        """Raises FileNotFoundError unless the half has at least one class folder."""
        folder = root / ("train" if train else "test")
        if not folder.is_dir():
            expected = "class folders with images (train/CLASS, test/CLASS)"
            raise _missing(root, folder, expected, downloadable=False)
        if not self._classes(folder):
            raise FileNotFoundError(
                f"{folder} has no class folders; expected {folder}/CLASS with images"
            )

    def download(self, root: Path) -> None:
        """Raises: there is nowhere to download from."""
        raise RuntimeError("image_folder is your own data")

    def open(self, root: Path, train: bool) -> OpenSource:
        """Lists the files; a class has the index of its name among those of both halves."""
        names = sorted({*self._classes(root / "train"), *self._classes(root / "test")})
        folder = root / ("train" if train else "test")
        found = [(path, name) for name in names for path in image_files(folder / name)]
        return _open_files(found, names, "image_folder", folder)

    def _classes(self, folder: Path) -> list[str]:
        if not folder.is_dir():
            return []
        return [entry.name for entry in folder.iterdir() if entry.is_dir()]


SOURCES: dict[str, Source] = {
    "digits": Digits(),
    "mnist": IdxFiles(MNIST, DIGIT_NAMES),
    "fashion_mnist": IdxFiles(FashionMNIST, FASHION_MNIST_NAMES),
    "svhn": StreetViewDigits(),
    "cifar10": Cifar(CIFAR10, CIFAR10_NAMES),
    "cifar100": Cifar(CIFAR100, CIFAR100_NAMES),
    "tiny_imagenet": TinyImageNet(),
    "caltech256": CaltechObjects(),
    "image_folder": ImageFolder(),
}

# Sources that come as one set, of which open() draws the test half.
WITHOUT_TEST_HALF = ("digits", "caltech256")


def draw_per_class(labels: Tensor, amount: float | int, purpose: str) -> tuple[Tensor, Tensor]:
    """Splits positions in two, class by class, the same way in every run.

    The draw is seeded by ``purpose`` and the class alone, so it depends neither on the run's seed
    nor on which other classes are present.

    Args:
        labels: int64 [N].
        amount: how much of each class to draw: a fraction (float; rounded, but at least one image)
            or a number of images (int; all of a smaller class).
        purpose: names the draw.

    Returns:
        (rest, drawn): int64 positions, ascending.
    """
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        count = amount if isinstance(amount, int) else max(1, round(amount * len(members)))
        generator = torch.Generator().manual_seed(mix(purpose, label))
        drawn[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~drawn).nonzero().flatten(), drawn.nonzero().flatten()


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise unknown_name("dataset", name, list(SOURCES))
    return SOURCES[name]


def unknown_name(kind: str, name: str, choices: Sequence[str]) -> ValueError:
    """The error for a name that is none of the choices; points at the nearest."""
    near = get_close_matches(name, choices, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    listed = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return ValueError(f"unknown {kind} {name!r}: {hint}choices: {listed}")


def _missing(root: Path, path: Path, expected: str, downloadable: bool = True) -> FileNotFoundError:
    what = f"{root} does not exist" if not root.exists() else f"{path} is missing"
    fetch = ", or fetch it with --data.download true" if downloadable else ""
    return FileNotFoundError(
        f"{what}: expected {expected} at {path}; give the folder with --data.root DIR{fetch}"
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Any failure inside is about this file."""
    try:
        yield
    except Exception as error:  # a damaged file fails in the reader's own way
        raise RuntimeError(
            f"{path} is damaged ({error}); delete it and use --data.download true, or replace it"
        ) from error


@contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The file itself, or its ``.gz`` unpacked outside of the data folder."""
    if path.is_file():
        yield path
        return
    packed = path.with_name(path.name + ".gz")
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / path.name
        with _naming(packed):
            unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
        yield unpacked


def _open_files(
    found: Sequence[tuple[Path, str]], names: list[str], source: str, folder: Path
) -> OpenSource:
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no images (looked for {', '.join(IMG_EXTENSIONS)}); give the folder "
            "with --data.root DIR"
        )
    number = {name: i for i, name in enumerate(names)}
    paths = [path for path, _ in found]
    return OpenSource(
        torch.tensor([number[name] for _, name in found]),
        names,
        lambda indices, size: decode_images([paths[i] for i in indices.tolist()], size, source),
    )
