"""Where pictures with attributes come from, which of them are for training, and how they are cut to size."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import CelebA
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from datamodules.attribute_splits import identity_label_split, reference_celeba_split
from datamodules.datasets import (
    BatchDataset,
    PictureFileDataset,
    unit_interval,
)
from datamodules.pictures import image_files, picture_sizes
from datamodules.shapes import FIRST_SCENE, Scenes
from datamodules.shapes_options import FACTORS, SceneOptions
from datamodules.sources import draw_per_class, unknown_name
from lightning_modules.attributes import HAIR_COLOURS, LabelKind, exclusive_indices

PARTS = ("train", "val", "test")
CELEBA_ATTRIBUTES = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young")
CELEBA_SPLITS = ("reference", "official")
EMOTIONS = (
    "angry",
    "contemptuous",
    "disgusted",
    "fearful",
    "happy",
    "neutral",
    "sad",
    "surprised",
)
RAFD_NAME = re.compile(r"Rafd(\d+)_(\d+)_[^_]+_[^_]+_([^_]+)_[^_]+", re.IGNORECASE)
# Of the originals, (width, height), and the square of the face in them (released code of MatchGAN).
RAFD_SIZE, RAFD_BOX = (681, 1024), (40, 170, 640, 770)
RAFD_TEST_PERCENT = 10


class AttributeDataset(BatchDataset):
    """Images with binary attributes.

    Args:
        images: gives ``image``, ``index`` and perhaps ``path``.
        attributes: float32 [N, c] of zeros and ones.
        labels: int64 [N], the classes of which ``attributes`` are the one-hot vectors; batches then have ``label``.
        people: who is in each picture, where that is known.

    Attributes:
        class_ids: int64 [N], row of the label space or -1; batches then have ``class_id``. None until a data module
            needs them.
    """

    def __init__(
        self,
        images: BatchDataset,
        attributes: Tensor,
        labels: Tensor | None = None,
        people: Sequence[str] | None = None,
    ) -> None:
        self.images = images
        self.attributes = attributes
        self.labels = labels
        self.people = people
        self.class_ids: Tensor | None = None
        self.sample_shape = images.sample_shape

    def __len__(self) -> int:
        return len(self.images)

    def keep(self, limit: float, name: str) -> None:
        """Keeps the images in memory if they take at most ``limit`` bytes; ``name`` is for the progress bar.

        Raises:
            RuntimeError: some files cannot be read; names up to five of them.
        """
        if isinstance(self.images, PictureFileDataset) and self._bytes <= limit:
            self.images.keep(name)

    @property
    def _bytes(self) -> int:
        return len(self) * math.prod(self.sample_shape)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """``image`` uint8 [B, 3, S, S], ``attributes`` float32 [B, c], ``index`` int64 [B] and what else is known.

        That is ``label`` and ``class_id`` int64 [B], and ``path`` (list of str).
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        found = self.images.__getitems__(index)
        kept = ("image", "index", "path")
        batch = {name: found[name] for name in kept if name in found}
        for name, values in (
            ("attributes", self.attributes),
            ("label", self.labels),
            ("class_id", self.class_ids),
        ):
            if values is not None:
                batch[name] = values.index_select(0, index)
        return batch


class AttributeSource(Protocol):
    """Images with attributes; ``part`` is ``train``, ``val`` or ``test``.

    Attributes:
        names: of the attributes; empty until ``check`` where only the files tell.
        complete: of every exclusive group exactly one attribute holds, not just at most one.
        kind: of the labels.
    """

    names: list[str]
    complete: bool
    kind: LabelKind

    @property
    def groups(self) -> list[list[str]]:
        """Mutually exclusive ones of the names."""

    def check(self, parts: Sequence[str]) -> None:
        """Raises unless what these parts need is there; reads no pixels."""

    def open(self, part: str) -> AttributeDataset:
        """Opens a part, after ``check``."""


# ------------------------------------------------------------------------------- files
@dataclass(frozen=True)
class CenterCrop:
    """Cuts a square out of the middle of a picture and resizes it, bilinear with antialiasing.

    Args:
        image_size: side of the result.
        crop_size: side of the square in pixels of the file; None: the whole picture is squeezed to a square.
        rafd: originals of RaFD are first cut to the square of the face.
    """

    image_size: int
    crop_size: int | None = None
    rafd: bool = False

    def cut(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what is kept of a picture.

        Raises:
            ValueError: the picture is smaller than the crop.
        """
        box = RAFD_BOX if self.rafd and (width, height) == RAFD_SIZE else (0, 0, width, height)
        if self.crop_size is None:
            return box
        wide, high = box[2] - box[0], box[3] - box[1]
        if min(wide, high) < self.crop_size:
            raise ValueError(
                f"{wide}x{high} (width x height) is smaller than the crop of {self.crop_size}; use "
                f"--data.crop_size {min(wide, high)} or less, or null to squeeze whole pictures"
            )
        left = box[0] + round((wide - self.crop_size) / 2)
        top = box[1] + round((high - self.crop_size) / 2)
        return left, top, left + self.crop_size, top + self.crop_size

    def decode(self, path: Path) -> Tensor:
        """The pixels of a file as uint8 RGB [3, image_size, image_size].

        Grey and CMYK pictures are converted; transparency is dropped.
        """
        with Image.open(path) as picture:
            pixels = picture.convert("RGB").crop(self.cut(*picture.size))
        side = (self.image_size, self.image_size)
        return pil_to_tensor(pixels.resize(side, Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class AttributeFiles:
    """The pictures of one part.

    Attributes:
        paths: of the files.
        attributes: float32 [N, c].
        labels: int64 [N] where labels are classes.
        people: who is in each picture, where known.
    """

    paths: list[Path]
    attributes: Tensor
    labels: Tensor | None = None
    people: list[str] | None = None


class PictureAttributes:
    """Attributes of picture files; subclasses list them.

    Args:
        root: folder of the files.
        crop: how pictures are cut.
        attributes: the wanted ones, in their order; None for the default.
        val_fraction: of the training pictures held out for validation, where there are no others; 0: those that
            are trained on are validated on.
    """

    dataset: str
    complete = True
    kind: LabelKind = "single_label"

    def __init__(
        self,
        root: Path,
        crop: CenterCrop,
        attributes: Sequence[str] | None,
        val_fraction: float,
    ) -> None:
        self.root = root
        self.crop = crop
        self.val_fraction = val_fraction
        self.names: list[str] = list(attributes or ())
        self._files: dict[str, AttributeFiles] = {}
        exclusive_indices(self.names, [])

    @property
    def groups(self) -> list[list[str]]:
        """All classes exclude each other."""
        return [self.names]

    def check(self, parts: Sequence[str]) -> None:
        """Lists the files and looks at their sizes.

        Raises:
            FileNotFoundError: files are missing.
            RuntimeError: damaged files; names up to five of them.
            ValueError: unknown attributes, one class only, or a picture smaller than the crop.
        """
        for part in parts:
            if part not in self._files:
                files = self.files(part)
                if not files.paths:
                    raise ValueError(
                        f"{self.root} has no picture to {part} on; use more pictures, or --data.val_fraction 0"
                    )
                self._check_sizes(files.paths, part)
                self._files[part] = files

    def files(self, part: str) -> AttributeFiles:
        """Lists the files of a part in the order of their names."""
        raise NotImplementedError

    def open(self, part: str) -> AttributeDataset:
        """Pictures that are decoded when a batch asks for them."""
        self.check([part])
        files = self._files[part]
        images = PictureFileDataset(files.paths, self.crop.image_size, decode=self.crop.decode)
        return AttributeDataset(images, files.attributes, files.labels, files.people)

    def _check_sizes(self, paths: list[Path], part: str) -> None:
        sizes = picture_sizes(paths, f"{self.dataset} {part}", "checking pictures")
        for path, (height, width) in zip(paths, sizes, strict=True):
            try:
                self.crop.cut(width, height)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None

    def _choose_classes(self, there: Sequence[str]) -> None:
        """Settles the classes, which are all of them unless some were asked for."""
        if not self.names:
            self.names = sorted(there)
        for name in self.names:
            if name not in there:
                raise unknown_name(f"class in --data.attributes of {self.root}", name, there)
        if len(self.names) < 2:
            raise ValueError(
                f"{self.names} is one class, but a translation needs at least two; name more of "
                f"{', '.join(sorted(there))} with --data.attributes"
            )

    def _listed(
        self, found: Sequence[tuple[Path, str]], people: list[str] | None = None
    ) -> AttributeFiles:
        labels = torch.tensor([self.names.index(name) for _, name in found], dtype=torch.int64)
        one_hot = F.one_hot(labels, len(self.names)).float()
        return AttributeFiles([path for path, _ in found], one_hot, labels, people)


class TablePictures(PictureAttributes):
    """Pictures with several attributes each, which a table lists; subclasses read it.

    Args:
        root: folder of the files.
        crop: how pictures are cut.
        attributes: the wanted ones, in their order; None for the default.
        exclusive: mutually exclusive groups.
        val_fraction: of the training pictures held out for validation, where there are no others.
    """

    complete = False
    kind: LabelKind = "multi_label"

    def __init__(
        self,
        root: Path,
        crop: CenterCrop,
        attributes: Sequence[str] | None,
        exclusive: Sequence[Sequence[str]] | None,
        val_fraction: float,
    ) -> None:
        super().__init__(root, crop, attributes, val_fraction)
        self.exclusive = [list(group) for group in exclusive or ()]

    @property
    def groups(self) -> list[list[str]]:
        """The selected names of every exclusive group."""
        found = exclusive_indices(self.names, self.exclusive)
        return [[self.names[i] for i in group] for group in found]

    def _columns(self, path: Path, there: Sequence[str]) -> list[int]:
        """Places of the selected attributes among those that the table has."""
        for name in [*self.names, *(name for group in self.exclusive for name in group)]:
            if name not in there:
                raise unknown_name(f"attribute of {path}", name, there)
        return [there.index(name) for name in self.names]

    def _hold_out(self, places: Tensor, part: str) -> Tensor:
        """Those of the training places that are for training or for validation."""
        if not self.val_fraction or not len(places):
            return places
        of_all = torch.zeros(len(places), dtype=torch.int64)
        rest, held_out = draw_per_class(of_all, self.val_fraction, "attribute validation")
        return places[rest if part == "train" else held_out]


class CelebAPictures(TablePictures):
    """``celeba``: 40 attributes of 202,599 aligned faces, in the files and the layout of torchvision's class.

    ``ROOT/celeba/`` (or ``ROOT/``) has ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt`` and, for the official
    split, ``list_eval_partition.txt``.
    """

    dataset = "celeba"

    def __init__(
        self,
        root: Path,
        crop: CenterCrop,
        attributes: Sequence[str] | None,
        exclusive: Sequence[Sequence[str]] | None,
        split: str,
        val_fraction: float,
        download: bool,
    ) -> None:
        names = CELEBA_ATTRIBUTES if attributes is None else attributes
        groups = [HAIR_COLOURS] if exclusive is None else exclusive
        super().__init__(root, crop, names, groups, val_fraction)
        self.split = split
        self.download = download
        self._table: tuple[list[str], Tensor] | None = None

    def check(self, parts: Sequence[str]) -> None:
        """Downloads if asked to, and looks for the files.

        Raises:
            FileNotFoundError: files are missing.
            RuntimeError: a damaged list, or the download failed.
            ValueError: unknown attributes, or pictures smaller than the crop.
        """
        if self.download and not (self._base / "list_attr_celeba.txt").is_file():
            try:
                CelebA(str(self.root), download=True)
            except (OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"could not download CelebA into {self.root}: {error}; give an existing copy with "
                    "--data.root DIR"
                ) from error
        super().check(parts)

    def files(self, part: str) -> AttributeFiles:
        """The pictures of a part in the order of the attribute list."""
        names, attributes = self._read_table()
        places = self._places(part, names)
        folder = self._base / "img_align_celeba"
        if not folder.is_dir():
            raise self._missing(folder)
        there = {entry.name for entry in folder.iterdir()}
        paths = [folder / names[i] for i in places.tolist()]
        missing = [path for path in paths if path.name not in there]
        if missing:
            listed = ", ".join(path.name for path in missing[:5])
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(paths)} {part} pictures that the attribute list "
                f"names: {listed}; unpack img_align_celeba.zip completely"
            )
        return AttributeFiles(paths, attributes[places])

    def _check_sizes(self, paths: list[Path], part: str) -> None:
        # All are of one size; opening 200,000 files to see it would take minutes.
        super()._check_sizes(paths[:1], part)

    def _places(self, part: str, names: list[str]) -> Tensor:
        if self.split == "official":
            partition = self._read_partition(names)
            return (partition == PARTS.index(part)).nonzero().flatten()
        train, test = (
            torch.tensor(ids, dtype=torch.int64) - 1 for ids in reference_celeba_split(len(names))
        )
        if part == "test":
            return test.sort().values
        return self._hold_out(train.sort().values, part)

    def _read_table(self) -> tuple[list[str], Tensor]:
        """File names, and the selected attributes float32 [N, c]."""
        if self._table is not None:
            return self._table
        path = self._base / "list_attr_celeba.txt"
        if not path.is_file():
            raise self._missing(path)
        with path.open(encoding="utf-8") as file:
            count, there = file.readline().strip(), file.readline().split()
            columns = [place + 1 for place in self._columns(path, there)]
            names: list[str] = []
            values: list[list[bool]] = []
            for line in file:
                fields = line.split()
                if fields and len(fields) != len(there) + 1:
                    raise RuntimeError(f"{path}: {line.strip()!r} has not {len(there)} values")
                if fields:
                    names.append(fields[0])
                    values.append([fields[column] == "1" for column in columns])
        if count != str(len(names)):
            raise RuntimeError(
                f"{path} announces {count} pictures but lists {len(names)}; fetch it again"
            )
        self._table = names, torch.tensor(values).float()
        return self._table

    def _read_partition(self, names: list[str]) -> Tensor:
        path = self._base / "list_eval_partition.txt"
        if not path.is_file():
            raise self._missing(path)
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line]
        partition = {line[0]: int(line[1]) for line in lines}
        if partition.keys() != set(names):
            raise RuntimeError(f"{path} and list_attr_celeba.txt do not list the same pictures")
        return torch.tensor([partition[name] for name in names])

    def _missing(self, path: Path) -> FileNotFoundError:
        return FileNotFoundError(
            f"{path} is missing: expected img_align_celeba/, list_attr_celeba.txt and list_eval_partition.txt "
            f"in {self.root}/celeba; give that folder's parent with --data.root DIR, or fetch them with "
            "--data.download true"
        )

    @property
    def _base(self) -> Path:
        return self.root if (self.root / "list_attr_celeba.txt").is_file() else self.root / "celeba"


class CsvPictures(TablePictures):
    """``csv``: pictures that ``ROOT/attributes.csv`` lists.

    Its header is ``picture,part,NAME,NAME,...``; a line has the path of a picture below ``ROOT``, ``train``, ``val`` or
    ``test``, and 1 or 0 (or -1) for every attribute. ``val`` may be missing.
    """

    dataset = "csv"

    def files(self, part: str) -> AttributeFiles:
        """The pictures of a part in the order of the lines.

        Raises:
            FileNotFoundError: there is no such table, or a picture is missing.
            ValueError: unknown attributes, or a line that is not as above.
        """
        path = self.root / "attributes.csv"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: expected lines PICTURE,PART,1,0,... below a header picture,part,NAME,NAME,"
                "...; give its folder with --data.root DIR"
            )
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *lines = [line for line in csv.reader(file) if line] or [[]]
        if header[:2] != ["picture", "part"] or len(header) < 3:
            raise ValueError(
                f"{path} begins with {','.join(header)!r}; expected picture,part,NAME,NAME,..."
            )
        self.names = self.names or header[2:]
        columns = [place + 2 for place in self._columns(path, header[2:])]
        for line in lines:
            known = len(line) == len(header) and set(line[2:]) <= {"1", "0", "-1"}
            if not known or line[1] not in PARTS:
                raise ValueError(
                    f"{path}: {','.join(line)!r} must be a picture, one of {', '.join(PARTS)} and "
                    f"{len(header) - 2} times 1 or 0 (or -1)"
                )
        own = part == "val" and any(line[1] == "val" for line in lines)
        wanted = part if own or part == "test" else "train"
        places = torch.tensor([i for i, line in enumerate(lines) if line[1] == wanted]).long()
        if wanted == "train" and not any(line[1] == "val" for line in lines):
            places = self._hold_out(places, part)
        kept = [lines[i] for i in places.tolist()]
        paths = [self.root / line[0] for line in kept]
        missing = [str(picture) for picture in paths if not picture.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} names {len(missing)} pictures that are not there: {', '.join(missing[:5])}"
            )
        values = torch.tensor([[line[c] == "1" for c in columns] for line in kept])
        return AttributeFiles(paths, values.float())


class RafdPictures(PictureAttributes):
    """``rafd``: eight emotions; pictures anywhere below ``ROOT``, by the names under which they are distributed.

    ``Rafd090_01_Caucasian_female_angry_frontal.jpg`` is person 01, angry; folders play no part. Parts share no person:
    a tenth of the people, rounded up (7 of 67 as in the released code of MatchGAN, though not the same ones, which
    depend on the order of a file system), is for testing.
    """

    dataset = "rafd"

    def files(self, part: str) -> AttributeFiles:
        """The pictures of the people of a part, sorted by name."""
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.root} does not exist; give the pictures of RaFD with --data.root DIR"
            )
        found = [
            (path, match)
            for path in image_files(self.root)
            if (match := RAFD_NAME.fullmatch(path.stem)) is not None
        ]
        if not found:
            raise FileNotFoundError(
                f"{self.root} has no picture with a name of RaFD, such as "
                "Rafd090_01_Caucasian_female_angry_frontal.jpg; give their folder with --data.root DIR, or use "
                "--data.dataset image_folder for folders train/EMOTION and test/EMOTION"
            )
        found.sort(key=lambda item: item[0].name)
        for path, match in found:
            if match[3].lower() not in EMOTIONS:
                raise unknown_name(f"emotion in the name {path.name}", match[3], EMOTIONS)
        self._choose_classes(EMOTIONS)
        chosen = self._people(sorted({match[2] for _, match in found}))[part]
        kept = [
            (path, match)
            for path, match in found
            if match[2] in chosen and match[3].lower() in self.names
        ]
        listed = [(path, match[3].lower()) for path, match in kept]
        return self._listed(listed, [match[2] for _, match in kept])

    def _people(self, people: list[str]) -> dict[str, set[str]]:
        test, train = identity_label_split(people, RAFD_TEST_PERCENT)
        if not self.val_fraction or not train:
            return {"train": set(train), "val": set(train), "test": set(test)}
        val, train = identity_label_split(train, 100 * self.val_fraction)
        return {"train": set(train), "val": set(val), "test": set(test)}


class FolderPictures(PictureAttributes):
    """``image_folder``: ``ROOT/train/DOMAIN``, ``ROOT/test/DOMAIN`` and perhaps ``ROOT/val/DOMAIN``."""

    dataset = "image_folder"

    def files(self, part: str) -> AttributeFiles:
        """The pictures of a part, domain by domain, sorted by path; a held-out part is drawn per domain."""
        there = self._domains("train")
        if len(there) < 2:
            raise self._one_domain(there)
        self._choose_classes(there)
        own = part != "val" or (self.root / "val").is_dir()
        found = []
        for name in self.names:
            folder = self.root / (part if own else "train") / name
            pictures = image_files(folder) if folder.is_dir() else []
            if not pictures and part != "val":
                raise FileNotFoundError(
                    f"{folder} holds no pictures (looked for {', '.join(IMG_EXTENSIONS)}, recursively), but "
                    f"every domain of {self.root}/train needs some for {part}"
                )
            found += [(path, name) for path in pictures]
        if part == "test" or (self.root / "val").is_dir() or not self.val_fraction:
            return self._listed(found)
        labels = torch.tensor([self.names.index(name) for _, name in found])
        rest, held_out = draw_per_class(labels, self.val_fraction, "attribute validation")
        return self._listed([found[i] for i in (rest if part == "train" else held_out).tolist()])

    def _domains(self, part: str) -> list[str]:
        folder = self.root / part
        if not folder.is_dir():
            there = "nothing"
            if self.root.is_dir():
                there = ", ".join(sorted(e.name for e in self.root.iterdir())[:10]) or there
            raise FileNotFoundError(
                f"{folder} is missing: expected train/DOMAIN and test/DOMAIN with pictures, but {self.root} has "
                f"{there}; give the folder that holds train and test with --data.root DIR"
            )
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())

    def _one_domain(self, there: list[str]) -> ValueError:
        folder = self.root / "train"
        if not there:
            return ValueError(
                f"{folder} has no folders; expected one folder of pictures per domain, at least two"
            )
        below = sorted(entry.name for entry in (folder / there[0]).iterdir() if entry.is_dir())
        hint = "; a translation needs at least two"
        if below:
            hint = (
                f", which holds {', '.join(below[:10])}: the domains are one level deeper, so put these folders "
                f"into {folder} itself"
            )
        return ValueError(f"{folder} has one domain, {there[0]}{hint} (--data.root)")


# ------------------------------------------------------------------------------- made here
class AttributeScenes(AttributeDataset):
    """Scenes with the factors of their first object as attributes, and the truth about changing them.

    Args:
        scenes: drawn when a batch asks for them, unless kept.
        values: of every factor that is an attribute.
        kind: of the labels.
    """

    def __init__(
        self, scenes: Scenes, values: Mapping[str, Sequence[str]], kind: LabelKind
    ) -> None:
        columns = []
        for factor, names in values.items():
            number = scenes.factor(factor)
            columns.append(number[:, None] if len(names) == 2 else F.one_hot(number, len(names)))
        labels = scenes.factor(next(iter(values))) if kind == "single_label" else None
        super().__init__(scenes, torch.cat(columns, 1).float(), labels)
        self.scenes = scenes
        self.values = values

    def keep(self, limit: float, name: str) -> None:
        """Draws all scenes and keeps them in memory if they take at most ``limit`` bytes."""
        if self._bytes <= limit:
            self.images = self.scenes.drawn()

    def counterparts(self, indices: Sequence[int] | Tensor, attributes: Tensor) -> Tensor:
        """The true images with other attributes: the same scenes, of which only the first object is changed.

        For evaluation only. Where the target is the scene's own label, it is the very image of the set.

        Args:
            indices: places in this set [B].
            attributes: the wanted ones [B, c], zeros and ones.

        Returns:
            float32 [B, 3, S, S] in [0, 1].

        Raises:
            ValueError: not exactly one value of a factor is 1, or other sizes.
        """
        drawn = self.scenes.render(indices, change=self._change(indices, attributes))
        return unit_interval(drawn, torch.float32)

    def object_masks(
        self, indices: Sequence[int] | Tensor, attributes: Tensor | None = None
    ) -> Tensor:
        """Where the object is, as it stands or with other attributes: bool [B, S, S].

        What is outside of both should stay in a translation. Pixels belong to the object if at least half covered, so
        its smooth edge reaches one pixel further.

        Args:
            indices: places in this set [B].
            attributes: as in :meth:`counterparts`; None: as it stands.

        Raises:
            ValueError: as in :meth:`counterparts`.
        """
        change = None if attributes is None else self._change(indices, attributes)
        return self.scenes.truth(indices, change)["object_masks"][:, 0]

    def _change(self, indices: Sequence[int] | Tensor, attributes: Tensor) -> dict[str, list[str]]:
        wanted = attributes.cpu()
        if wanted.shape != (len(indices), self.attributes.shape[1]):
            raise ValueError(
                f"attributes {list(wanted.shape)} must be [{len(indices)}, {self.attributes.shape[1]}]"
            )
        change, start = {}, 0
        for factor, names in self.values.items():
            width = 1 if len(names) == 2 else len(names)
            part = wanted[:, start : start + width]
            start += width
            if not ((part == 0) | (part == 1)).all() or (width > 1 and (part.sum(1) != 1).any()):
                raise ValueError(f"{factor}: a scene has exactly one of {', '.join(names)}")
            numbers = part[:, 0] if width == 1 else part.argmax(1)
            change[factor] = [names[int(number)] for number in numbers]
        return change


class SceneAttributes:
    """``shapes``: procedural scenes with one object; attributes are the values of chosen factors.

    A factor of two values is one attribute, the second value; one of more values is an exclusive group. A single such
    group makes labels classes.

    Args:
        options: what scenes show.
        factors: of the object; None for all that have several values.
        counts: number of scenes by part.
        seed: of the scenes.

    Raises:
        ValueError: an unknown factor, one with a single value, or several objects.
    """

    complete = True

    def __init__(
        self,
        options: SceneOptions,
        factors: Sequence[str] | None,
        counts: Mapping[str, int],
        seed: int,
    ) -> None:
        known = FACTORS[options.mode]
        if options.max_objects > 1:
            raise ValueError(
                f"max_objects={options.max_objects}: attributes are those of one object; use "
                "--data.shapes.max_objects 1"
            )
        if factors is None:
            factors = [factor for factor in known if len(options.values(factor)) > 1]
        for factor in factors:
            if factor not in known:
                raise unknown_name("factor in --data.attributes of shapes", factor, known)
            values = options.values(factor)
            if len(values) < 2:
                raise ValueError(
                    f"attribute {factor} is {values[0]} in all scenes; give it more values with "
                    f"--data.shapes.{factor}s, or leave it out of --data.attributes"
                )
        exclusive_indices(factors, [])
        self.options = options
        self.counts = counts
        self.seed = seed
        self.values = {factor: options.values(factor) for factor in factors}
        self.groups = [list(values) for values in self.values.values() if len(values) > 2]
        pieces = [v[1:] if len(v) == 2 else v for v in self.values.values()]
        self.names = [name for piece in pieces for name in piece]
        one_group = len(self.values) == len(self.groups) == 1
        self.kind: LabelKind = "single_label" if one_group else "multi_label"

    def check(self, parts: Sequence[str]) -> None:
        """Nothing to check: the scenes are drawn here."""

    def open(self, part: str) -> AttributeScenes:
        """Scenes that are drawn when a batch asks for them."""
        scenes = Scenes(self.options, self.seed, self.counts[part], FIRST_SCENE[part])
        return AttributeScenes(scenes, self.values, self.kind)
