"""A real and a fake set side by side, for metrics that compare two sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.base import EvaluationDataModule
from datamodules.datasets import (
    BatchDataset,
    FeatureDataset,
    ImageArrayDataset,
    PictureFileDataset,
)
from datamodules.pictures import image_files, picture_sizes
from datamodules.sources import SOURCES, class_names_of, open_source, prepare_source, unknown_name
from lightning_modules.arguments import demand_at_least
from lightning_modules.files import UnreadableError, read_array, read_tensors
from lightning_modules.randomness import mix

FEATURE_SUFFIXES = (".npy", ".pt", ".pth")
NUMBERS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.uint16),
    *(torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64),
)
SOURCE_IMAGE_SIZE = 32

EXPECTED = (
    "expected a folder of pictures, features in a .npy, .pt or .pth file, or SOURCE:train or "
    f"SOURCE:test (optionally :CLASS,CLASS or :-CLASS,CLASS) with SOURCE one of {', '.join(SOURCES)}"
)


@dataclass(frozen=True)
class NamedSet:
    """One half of an image source, perhaps some classes of it only.

    Attributes:
        source: its name in :mod:`datamodules.sources`.
        train: the training half, else the test half.
        classes: class names, None for all.
        without: whether ``classes`` are those left out.
    """

    source: str
    train: bool
    classes: tuple[str, ...] | None = None
    without: bool = False


class RealFakeDataModule(EvaluationDataModule):
    """The two sets that a generative metric compares; for ``train.py test`` only.

    Each set is one of

    - a folder: all pictures below it, decoded a batch at a time, so that it need not fit into
      memory (``num_workers`` decode ahead);
    - a ``.npy`` file, or a ``.pt`` or ``.pth`` file with a tensor (or a dict with one as
      ``features``): features [N, D], floating point or integers;
    - ``SOURCE:train`` or ``SOURCE:test`` of :mod:`datamodules.sources`, in memory. With a further
      ``:3,5`` only the classes of these names, with ``:-3,5`` all but these.

    Both are features of one dimension, or both pictures of one size. The test loaders are
    [real, fake], or [real] without ``fake``. Batches have ``image`` [B, 3, H, W] in [0, 1] or
    ``features`` [B, D] (float32; float64 if the file has that), ``index`` (the place in the set),
    ``path`` where there are picture files, and ``label`` where there is a source. Each sample
    comes exactly once, whatever the number of processes.

    Args:
        real: the real set.
        fake: the fake set; null where the module generates it.
        root: folder of the data of sources; :mod:`datamodules.sources` says what it holds.
        image_size: squeeze all pictures to squares of this side. null: the pictures of folders
            keep their size, which must be one and the same; those of sources get 32.
        limit: use at most so many samples of each set. Which ones depends on the set alone, not on
            the run's seed.
        eval_batch_size: batch of one process; it does not change any result.
        num_workers: loader processes.
        download: fetch what is missing of a source into ``root``.

    Attributes:
        real_set: the real samples, after ``setup``.
        fake_set: the fake samples, after ``setup``; None without ``fake``.

    Raises:
        ValueError: arguments that cannot be met; sets that cannot be compared; features that are no
            finite [N, D].
        FileNotFoundError: a folder, a file or the data of a source are missing.
        RuntimeError: a file cannot be read.
    """

    holds = "two sets to compare"

    def __init__(
        self,
        real: str,
        fake: str | None = None,
        root: str = "data",
        image_size: int | None = None,
        limit: int | None = None,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__(eval_batch_size=eval_batch_size, num_workers=num_workers)
        demand_at_least(1, image_size=image_size, limit=limit)
        # Not to the loggers: Lightning refuses to merge them with a module's own image_size or limit.
        self.save_hyperparameters(logger=False)
        self.real = real
        self.fake = fake
        self.root = root
        self.image_size = image_size
        self.limit = limit
        self.download = download
        self.real_set: BatchDataset | None = None
        self.fake_set: BatchDataset | None = None
        self._texts = {"real": real} if fake is None else {"real": real, "fake": fake}
        self._given = {role: _parse(role, text) for role, text in self._texts.items()}

    @property
    def split_info(self) -> dict[str, Any]:
        """What was compared, in plain values for the results; counts and sizes after ``setup``."""
        sets = {"real": self.real_set, "fake": self.fake_set}
        shape = () if self.real_set is None else self.real_set.sample_shape
        size = list(shape[1:])
        return {
            "real": self.real,
            "fake": self.fake,
            "counts": {role: len(part) for role, part in sets.items() if part is not None},
            "image_size": size[0] if len(set(size)) == 1 else size or None,
            "dimensions": shape[0] if len(shape) == 1 else None,
        }

    def prepare_data(self) -> None:
        """Downloads if asked to, and checks the header of every picture before anything starts."""
        if self.trainer is not None and self.trainer.state.fn not in (TrainerFn.TESTING, None):
            self._refuse()
        for given in self._given.values():
            if isinstance(given, NamedSet):
                prepare_source(given.source, self.root, given.train, self.download)
        self._demand_one_kind()
        shapes: list[tuple[str, tuple[int, ...]]] = []
        files: list[Path] = []
        for role, given in self._given.items():
            if isinstance(given, NamedSet):
                side = self.image_size or SOURCE_IMAGE_SIZE
                shapes.append((self._texts[role], (3, side, side)))
            elif _has_features(role, given):
                shapes.append((self._texts[role], self._features(role, given).sample_shape))
            else:
                files += self._pictures(role, given)
        if files:
            # Those of both folders together, so that one error names every damaged file.
            sizes = picture_sizes(files, " and ".join(self._texts.values()), "checking pictures")
            if self.image_size is not None:
                sizes = [(self.image_size, self.image_size)] * len(files)
            shapes += [(str(file), (3, *size)) for file, size in zip(files, sizes, strict=True)]
        for shape in shapes[1:]:
            _demand_one_shape(shapes[0], shape)

    def setup(self, stage: str | None = None) -> None:
        """Opens the sets: lists the pictures of folders, reads features and sources."""
        if stage not in ("test", None):
            self._refuse()
        if self.real_set is None:
            self._demand_one_kind()
            sets = {role: self._open(role) for role in self._given}
            shapes = [(self._texts[role], part.sample_shape) for role, part in sets.items()]
            _demand_one_shape(shapes[0], shapes[-1])
            self.real_set, self.fake_set = sets["real"], sets.get("fake")

    def test_dataloader(self) -> list[DataLoader]:
        """[real, fake], or [real] where the module generates the fakes."""
        assert self.real_set is not None, "setup('test') comes first"
        sets = [self.real_set] if self.fake_set is None else [self.real_set, self.fake_set]
        return [self.eval_loader(part) for part in sets]

    def _demand_one_kind(self) -> None:
        """Before anything is read: a mistake here must not cost a pass over all pictures."""
        kinds = {
            role: "features" if _has_features(role, given) else "pictures"
            for role, given in self._given.items()
        }
        if len(set(kinds.values())) > 1:
            raise ValueError(
                f"--data.real {self.real} holds {kinds['real']} but --data.fake {self.fake} holds "
                f"{kinds['fake']}; give two sets of pictures, or two of features"
            )

    def _open(self, role: str) -> BatchDataset:
        given = self._given[role]
        if isinstance(given, NamedSet):
            return self._read_source(role, given)
        if _has_features(role, given):
            return self._features(role, given)
        files = self._pictures(role, given)
        size = self.image_size or picture_sizes(files[:1], self._texts[role])[0]
        return PictureFileDataset(files, size)

    def _read_source(self, role: str, given: NamedSet) -> ImageArrayDataset:
        opened = open_source(given.source, self.root, given.train)
        positions = torch.arange(len(opened.labels))
        if given.classes is not None:
            _demand_known(given.classes, opened.class_names, given.source)
            named = torch.tensor([opened.class_names.index(name) for name in given.classes])
            positions = (torch.isin(opened.labels, named) != given.without).nonzero().flatten()
        if not len(positions):
            raise ValueError(
                f"--data.{role} {self._texts[role]} leaves no picture of {given.source}; name "
                f"other classes of {', '.join(opened.class_names[:20])}"
            )
        positions = positions[self._drawn(len(positions))]
        images = opened.read(positions, self.image_size or SOURCE_IMAGE_SIZE)
        return ImageArrayDataset(images, opened.labels[positions], opened.class_names)

    def _pictures(self, role: str, folder: Path) -> list[Path]:
        files = image_files(folder)
        if not files:
            raise FileNotFoundError(
                f"--data.{role} {folder} holds no pictures (looked for "
                f"{', '.join(IMG_EXTENSIONS)}, recursively)"
            )
        return [files[i] for i in self._drawn(len(files)).tolist()]

    def _features(self, role: str, path: Path) -> FeatureDataset:
        features = read_features(path, f"--data.{role}")
        if self.limit is not None and self.limit < len(features):
            features = features[self._drawn(len(features))]
        return FeatureDataset(features)

    def _drawn(self, count: int) -> Tensor:
        """Positions of at most ``limit`` of so many samples, ascending."""
        if self.limit is None or self.limit >= count:
            return torch.arange(count)
        generator = torch.Generator().manual_seed(mix("real or fake limit"))
        return torch.randperm(count, generator=generator)[: self.limit].sort().values


def read_features(path: Path, option: str) -> Tensor:
    """Reads a matrix of features that was saved by numpy or torch.

    Args:
        path: ``.npy``, or ``.pt``/``.pth`` with a tensor or a dict with one as ``features``. Nothing
            in it is ever executed.
        option: what the command line calls it, for errors.

    Returns:
        [N, D] of the dtype in the file. A ``.npy`` file stays on disk until rows are taken.

    Raises:
        RuntimeError: the file cannot be read.
        ValueError: it holds no finite, real-valued [N, D] with N, D >= 1.
    """
    name = f"{option} {path}"
    mend = "save one array or tensor [N, D]"
    read: Any = read_array if path.suffix.lower() == ".npy" else read_tensors
    try:
        found = read(path, "file of features")
    except UnreadableError as error:
        raise UnreadableError(f"{option} {error}; {mend}") from error
    if isinstance(found, dict):
        if "features" not in found:
            raise ValueError(f"{name} is a dict without 'features'; it has {list(found)[:10]}")
        found = found["features"]
    if isinstance(found, np.ndarray) and found.dtype.kind in "fiu" and found.dtype.itemsize <= 8:
        found = torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))
    dtype = getattr(found, "dtype", type(found).__name__)
    if not isinstance(found, Tensor) or found.layout != torch.strided or dtype not in NUMBERS:
        raise ValueError(f"{name} holds {dtype}, expected floating point or integers; {mend}")
    if found.ndim != 2 or not found.numel():
        raise ValueError(f"{name} has shape {list(found.shape)}, expected [N, D]; {mend}")
    bad = torch.cat([~block.isfinite().all(dim=1) for block in found.split(4096)])
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} rows of {name} hold NaN or infinity, the first is row "
            f"{bad.nonzero()[0].item()}; mend the network that computed them, or leave them out"
        )
    return found.detach()


def _parse(role: str, text: str) -> NamedSet | Path:
    """What the text names; whether a path exists is not looked at where it cannot be a source."""
    source, colon, rest = text.partition(":")
    path = Path(text).expanduser()
    if not text.strip():
        raise ValueError(f"--data.{role} is empty; {EXPECTED}")
    if source in SOURCES and not colon and not path.exists():
        raise ValueError(f"--data.{role} {text}: which half? use {source}:train or {source}:test")
    if source not in SOURCES and colon and "/" not in source and not path.exists():
        raise ValueError(f"--data.{role} {text}: {unknown_name('source', source, list(SOURCES))}")
    if source not in SOURCES or not colon:
        return path
    half, colon, classes = rest.partition(":")
    if half not in ("train", "test"):
        raise ValueError(
            f"--data.{role} {text}: {half!r} is no half of {source}; use {source}:train or "
            f"{source}:test"
        )
    if not colon:
        return NamedSet(source, half == "train")
    without = classes.startswith("-")
    names = tuple(name.strip() for name in classes.removeprefix("-").split(","))
    if not all(names):
        raise ValueError(
            f"--data.{role} {text}: a class name is missing; use {source}:{half}:CLASS,CLASS, or "
            f"{source}:{half}:-CLASS,CLASS for all but these"
        )
    known = class_names_of(source)
    if known is not None:
        _demand_known(names, known, source)
    return NamedSet(source, half == "train", names, without)


def _demand_known(names: tuple[str, ...], known: list[str], source: str) -> None:
    for name in names:
        if name not in known:
            raise unknown_name(f"class of {source}", name, known)


def _has_features(role: str, given: NamedSet | Path) -> bool:
    """Whether it is a file of features; if not, it is a source or a folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file with another suffix.
    """
    if isinstance(given, NamedSet) or given.is_dir():
        return False
    if not given.is_file():
        raise FileNotFoundError(f"--data.{role} {given} does not exist; {EXPECTED}")
    if given.suffix.lower() not in FEATURE_SUFFIXES:
        hint = "give the folder of a picture; " if given.suffix.lower() in IMG_EXTENSIONS else ""
        raise ValueError(f"--data.{role} {given} has the suffix {given.suffix!r}; {hint}{EXPECTED}")
    return True


def _demand_one_shape(
    first: tuple[str, tuple[int, ...]], second: tuple[str, tuple[int, ...]]
) -> None:
    """Raises ValueError if two samples or sets, each with its name, differ in shape."""
    (name, shape), (other_name, other) = first, second
    if shape == other:
        return
    if len(shape) == 1:
        raise ValueError(
            f"the features of --data.real {name} have {shape[0]} dimensions, those of "
            f"--data.fake {other_name} {other[0]}; both must come from the same network"
        )
    raise ValueError(
        f"pictures must have one size to be compared, but {name} is {shape[2]}x{shape[1]} "
        f"and {other_name} is {other[2]}x{other[1]} (width x height); use --data.image_size N to squeeze "
        "all to NxN"
    )
