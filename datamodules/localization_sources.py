"""Picture sets with image-level labels for training and boxes for evaluation: files, labels, boxes.

================  ==================================================================================
``image_folder``  ``ROOT/train/CLASS/*.jpg``, ``ROOT/validation/CLASS/*`` (or ``val``), ``ROOT/test/CLASS/*``
                  (without it the validation pictures are also the test set); boxes in a file of lines
                  ``PICTURE,x0,y0,x1,y1``
``cub200``        ``ROOT/CUB_200_2011/``; validation boxes in ``ROOT/CUBV2/`` or taken out of the
                  training half
``imagenet``      ``ROOT/train/WNID/*.JPEG``; ``ROOT/metadata/val`` and ``test`` (optionally ``train``)
================  ==================================================================================

A metadata folder has the layout of wsolevaluation (Choe et al., CVPR 2020): ``image_ids.txt`` (paths
below ROOT), ``class_labels.txt`` (id,label), ``image_sizes.txt`` (id,width,height) and
``localization.txt`` (id,x0,y0,x1,y1; an id may have several). ``ROOT/CUBV2`` is one itself, with its
pictures at ``ROOT/CUBV2/ID`` or ``ROOT/CUBV2/images/ID``.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.boxes import Box, BoxLine, demand_inside, read_boxes
from datamodules.pictures import image_files, picture_sizes
from datamodules.sources import draw_per_class

PARTS = ("train", "val", "test")
# As many of each class as CUBV2 has.
CARVED_PER_CLASS = 5
PART_FILES = ("image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt")


@dataclass(frozen=True)
class LabelledPictures:
    """One part of a set: files read not yet.

    Attributes:
        paths: of the files; plain text, since there may be more than a million.
        labels: int64 [N].
        boxes: of each picture, in pixels of its file; None where the part has none at all.
        sizes: (height, width) of each file that has a box, (0, 0) of others; None without boxes.
        origin: where the part comes from, for the results.
    """

    paths: list[str]
    labels: Tensor
    boxes: list[list[Box]] | None
    sizes: list[tuple[int, int]] | None
    origin: str


class PictureSource(Protocol):
    """A picture set on disk; ``part`` is ``train``, ``val`` or ``test``."""

    def check(self, root: Path, part: str) -> None:
        """Raises FileNotFoundError if a file or folder that the part needs is missing."""

    def class_names(self, root: Path) -> list[str]:
        """The name of each label."""

    def open(self, root: Path, part: str) -> LabelledPictures:
        """Lists the pictures of a part and reads their boxes."""


class ClassFolders:
    """``image_folder``: a folder of pictures for each class.

    A line of the boxes file names a picture by its path below ROOT or any end of that path, with or
    without the suffix, as long as this is one picture only. Boxes of training pictures are not used.

    Args:
        boxes: the boxes file; None for classification alone.
    """

    def __init__(self, boxes: Path | None = None) -> None:
        self.boxes = boxes

    def check(self, root: Path, part: str) -> None:
        """Raises FileNotFoundError without the folder of the part, or the boxes file."""
        folder = self._folder(root, part)
        if not folder.is_dir():
            wanted = {"val": "validation/CLASS (or val/CLASS)"}.get(part, f"{part}/CLASS")
            raise _missing(root, folder, f"pictures in {wanted}")
        if self.boxes is not None and part != "train" and not self.boxes.is_file():
            raise FileNotFoundError(
                f"the boxes file {self.boxes} does not exist; give one with --data.boxes FILE"
            )

    def class_names(self, root: Path) -> list[str]:
        """The folders in ``train``; without it, as on another machine, those to evaluate on.

        Raises:
            ValueError: there are fewer than two.
        """
        folder = root / "train"
        if not folder.is_dir():
            folder = self._folder(root, "test")
        names = _folders(folder)
        if len(names) < 2:
            raise ValueError(
                f"{folder} has {len(names)} class folder{'s' * (len(names) != 1)}"
                f"{': ' * bool(names)}{', '.join(names)}; a classifier needs pictures of at least "
                f"two classes, each in {folder}/CLASS"
            )
        return names

    def open(self, root: Path, part: str) -> LabelledPictures:
        """Lists the pictures, sorted by class and path.

        Raises:
            ValueError: a class without training pictures, or one that training does not know; a
                line of the boxes file that names no picture or several, or whose box is not
                inside of its picture.
            RuntimeError: a picture with a box is damaged.
        """
        names, folder = self.class_names(root), self._folder(root, part)
        strange = [name for name in _folders(folder) if name not in names]
        if strange:
            raise ValueError(
                f"{folder} has pictures of {', '.join(strange[:5])}, which {root / 'train'} has not; "
                "every class needs training pictures"
            )
        paths, labels = [], []
        for label, name in enumerate(names):
            files = image_files(folder / name) if (folder / name).is_dir() else []
            if part == "train" and not files:
                raise ValueError(
                    f"{folder / name} holds no pictures (looked for {', '.join(IMG_EXTENSIONS)}); "
                    "every class needs some"
                )
            paths += [str(file) for file in files]
            labels += [label] * len(files)
        if not paths:
            raise FileNotFoundError(
                f"{folder} holds no pictures (looked for {', '.join(IMG_EXTENSIONS)})"
            )
        origin = folder.name
        if self.boxes is None or part == "train":
            return LabelledPictures(paths, torch.tensor(labels), None, None, origin)
        lines = self._lines(root)
        boxes = [[line.box for line in lines[path]] for path in paths]
        boxed = [i for i, found in enumerate(boxes) if found]
        sizes = [(0, 0)] * len(paths)
        found = picture_sizes([Path(paths[i]) for i in boxed], str(folder))
        for i, size in zip(boxed, found, strict=True):
            sizes[i] = size
            for line in lines[paths[i]]:
                demand_inside(line, size)
        return LabelledPictures(paths, torch.tensor(labels), boxes, sizes, origin)

    def test_is_validation(self, root: Path) -> bool:
        """Whether there is no test folder."""
        return not (root / "test").is_dir()

    def _folder(self, root: Path, part: str) -> Path:
        if part == "test" and not self.test_is_validation(root):
            return root / "test"
        if part == "train":
            return root / "train"
        short = root / "val"
        return (
            root / "validation" if (root / "validation").is_dir() or not short.is_dir() else short
        )

    def _lines(self, root: Path) -> dict[str, list[BoxLine]]:
        """The lines of the boxes file for each path."""
        assert self.boxes is not None
        named: dict[str, set[str]] = defaultdict(set)
        for part in PARTS:
            folder = self._folder(root, part)
            for path in image_files(folder) if folder.is_dir() else []:
                parts = path.relative_to(root).parts
                for start in range(len(parts)):
                    end = Path(*parts[start:])
                    named[str(end)].add(str(path))
                    named[str(end.with_suffix(""))].add(str(path))
        lines: dict[str, list[BoxLine]] = defaultdict(list)
        unknown: list[str] = []
        unclear: list[str] = []
        for line in read_boxes(self.boxes):
            name = line.picture.removeprefix(f"{root}/").removeprefix("./")
            found = named.get(name, set())
            if len(found) == 1:
                lines[next(iter(found))].append(line)
            else:
                (unclear if found else unknown).append(line.picture)
        if unknown:
            raise ValueError(
                f"{self.boxes} names {len(unknown)} picture{'s' * (len(unknown) != 1)} that "
                f"{root} does not have: {_some(unknown)}; a line begins with a path below {root}"
            )
        if unclear:
            matches = sorted(named[unclear[0].removeprefix("./")])[:2]
            raise ValueError(
                f"{self.boxes}: {_some(unclear)} may be any of several pictures "
                f"({' or '.join(matches)}); write the path below {root}, with its suffix"
            )
        return lines


class Birds:
    """``cub200``: CUB-200-2011, 200 kinds of birds, one box each.

    Training and test half are the published ones. Validation pictures are those of ``ROOT/CUBV2`` if
    that is there; if not, 5 of each class, drawn once with a fixed seed, are taken out of training.
    """

    tables = ("images", "image_class_labels", "train_test_split", "bounding_boxes")

    def check(self, root: Path, part: str) -> None:
        """Raises FileNotFoundError unless the tables and the pictures are there."""
        base = self._base(root)
        for name in (*(f"{table}.txt" for table in self.tables), "images"):
            if not (base / name).exists():
                raise _missing(root, base / name, "the unpacked CUB_200_2011.tgz")
        if part == "val" and _has_own_validation(root):
            _check_metadata(root, root / "CUBV2", _own_validation_pictures(root), PART_FILES)

    def class_names(self, root: Path) -> list[str]:
        """The names without their numbers, in the published order."""
        paths, labels, _, _ = self._read(root)
        folders = {label: path.partition("/")[0] for path, label in zip(paths, labels, strict=True)}
        if sorted(folders) != list(range(len(folders))):
            raise RuntimeError(
                f"{self._base(root)} has pictures of {len(folders)} classes, which are not numbered "
                f"1 to {len(folders)}; unpack CUB_200_2011.tgz anew"
            )
        return [folders[label].partition(".")[2] for label in range(len(folders))]

    def open(self, root: Path, part: str) -> LabelledPictures:
        """Reads the tables.

        Raises:
            RuntimeError: a table or a picture is damaged.
            ValueError: a box is not inside of its picture, or no training picture is left.
        """
        if part == "val" and _has_own_validation(root):
            count = len(self.class_names(root))
            folder, pictures = root / "CUBV2", _own_validation_pictures(root)
            return _read_metadata(folder, pictures, count, True, "CUBV2")
        base = self._base(root)
        names, labels, train, boxes = self._read(root)
        positions = (torch.tensor(train) == (part != "test")).nonzero().flatten()
        classes, origin = torch.tensor(labels), "published half"
        if part != "test" and not _has_own_validation(root):
            halves = draw_per_class(classes[positions], CARVED_PER_CLASS, "cub200 box validation")
            if len(set(labels)) > len(set(classes[positions[halves[0]]].tolist())):
                raise ValueError(
                    f"taking {CARVED_PER_CLASS} pictures of each class out of training to validate on "
                    f"leaves none of some class of {base}; put CUBV2 into {root / 'CUBV2'}"
                )
            positions = positions[halves[part == "val"]]
            origin = (
                f"training half {'of' if part == 'val' else 'without'} {CARVED_PER_CLASS} per class"
            )
        chosen = positions.tolist()
        paths = [str(base / "images" / names[i]) for i in chosen]
        if part == "train":
            return LabelledPictures(paths, classes[positions], None, None, origin)
        sizes = picture_sizes([Path(path) for path in paths], "cub200", "checking pictures")
        for i, size in zip(chosen, sizes, strict=True):
            place = f"{base / 'bounding_boxes.txt'}, picture {i + 1}"
            demand_inside(BoxLine(place, names[i], boxes[i]), size)
        kept = [[boxes[i]] for i in chosen]
        return LabelledPictures(paths, classes[positions], kept, sizes, origin)

    def _read(self, root: Path) -> tuple[list[str], list[int], list[bool], list[Box]]:
        """Of every picture: its path below ``images``, label, whether it is for training, box."""
        rows: list[dict[str, list[str]]] = []
        for table in self.tables:
            path = self._base(root) / f"{table}.txt"
            rows.append({row[0]: row[1:] for line in _lines(path) if (row := line.split())})
            if rows[-1].keys() != rows[0].keys():
                raise RuntimeError(
                    f"{path} is about {len(rows[-1])} pictures, {self.tables[0]}.txt about "
                    f"{len(rows[0])}, or others; unpack CUB_200_2011.tgz anew"
                )
        paths, labels, train, boxes = [], [], [], []
        for number, (path_text, *_) in rows[0].items():
            try:
                x, y, width, height = map(float, rows[3][number])
                labels.append(int(rows[1][number][0]) - 1)
                train.append({"0": False, "1": True}[rows[2][number][0]])
            except (ValueError, KeyError, IndexError) as error:
                raise RuntimeError(
                    f"the tables in {self._base(root)} are damaged at picture {number} ({error}); "
                    "unpack CUB_200_2011.tgz anew"
                ) from error
            paths.append(path_text)
            boxes.append((int(x), int(y), int(x + width), int(y + height)))
        return paths, labels, train, boxes

    def _base(self, root: Path) -> Path:
        return root if (root / "images.txt").is_file() else root / "CUB_200_2011"


class ImageNet:
    """``imagenet``: ILSVRC 2012, or any set in the same layout.

    Validation and test follow their metadata folders: 10,000 pictures of ImageNetV2 in ``ROOT/val2``
    and the 50,000 of ``ROOT/val``, where they come from wsolevaluation. Training pictures are those
    of ``ROOT/metadata/train`` if that is there, or all in ``ROOT/train/WNID``.
    """

    def check(self, root: Path, part: str) -> None:
        """Raises FileNotFoundError unless the folders, the tables and the first picture are there."""
        if not (root / "train").is_dir():
            raise _missing(root, root / "train", "pictures in train/WNID, which name the classes")
        folder = root / "metadata" / part
        if part != "train":
            _check_metadata(root, folder, root, PART_FILES)
        elif folder.is_dir():
            _check_metadata(root, folder, root, PART_FILES[:2])

    def class_names(self, root: Path) -> list[str]:
        """The WordNet ids, sorted: the folders in ``train``, which may be empty for a mere test."""
        return _folders(root / "train")

    def open(self, root: Path, part: str) -> LabelledPictures:
        """Reads the tables, or lists the training pictures.

        Raises:
            RuntimeError: a table is damaged.
            ValueError: a box is not inside of its picture.
            FileNotFoundError: there is no training picture.
        """
        names, folder = self.class_names(root), root / "metadata" / part
        if part != "train" or folder.is_dir():
            origin = f"metadata/{part}"
            return _read_metadata(folder, root, len(names), part != "train", origin)
        paths, labels = [], []
        for label, name in enumerate(names):
            # By suffix alone: looking at a million files takes minutes.
            files = sorted(
                str(path)
                for path in (root / "train" / name).iterdir()
                if path.suffix.lower() in IMG_EXTENSIONS
            )
            paths += files
            labels += [label] * len(files)
        if not paths:
            raise FileNotFoundError(f"{root / 'train'} has no pictures in its {len(names)} folders")
        return LabelledPictures(paths, torch.tensor(labels), None, None, "train")


def _check_metadata(root: Path, folder: Path, pictures: Path, files: Sequence[str]) -> None:
    for name in files:
        if not (folder / name).is_file():
            raise _missing(root, folder / name, "the metadata files of wsolevaluation")
    first = next(iter(_lines(folder / files[0])), "")
    if not first or not (pictures / first).is_file():
        raise _missing(root, pictures / first, f"the first picture of {folder / files[0]}")


def _read_metadata(
    folder: Path, pictures: Path, num_classes: int, localized: bool, origin: str
) -> LabelledPictures:
    ids = _lines(folder / "image_ids.txt")
    path = folder / "class_labels.txt"
    label_of = {name: label for name, (label,) in _numbers(path, 1)}
    _demand_all(path, ids, label_of)
    labels = torch.tensor([label_of[name] for name in ids])
    if labels.min() < 0 or labels.max() >= num_classes:
        raise RuntimeError(
            f"{path} has labels {labels.min()} to {labels.max()}, but there are {num_classes} classes; "
            f"expected 0 to {num_classes - 1}"
        )
    paths = [f"{pictures}/{name}" for name in ids]
    if not localized:
        return LabelledPictures(paths, labels, None, None, origin)
    path = folder / "image_sizes.txt"
    size_of = {name: (height, width) for name, (width, height) in _numbers(path, 2)}
    _demand_all(path, ids, size_of)
    boxes: dict[str, list[Box]] = {name: [] for name in ids}
    unknown = []
    for line in read_boxes(folder / "localization.txt"):
        if line.picture not in boxes:
            unknown.append(line.picture)
            continue
        demand_inside(line, size_of[line.picture])
        boxes[line.picture].append(line.box)
    if unknown:
        raise RuntimeError(
            f"{folder / 'localization.txt'} has boxes of {len(unknown)} pictures that are not in "
            f"image_ids.txt: {_some(unknown)}"
        )
    return LabelledPictures(
        paths, labels, [boxes[name] for name in ids], [size_of[name] for name in ids], origin
    )


def _numbers(path: Path, count: int) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The rows ``id,number,...`` of a table."""
    for row, line in enumerate(_lines(path), 1):
        name, *fields = line.rsplit(",", count)
        try:
            values = tuple(int(field) for field in fields)
        except ValueError:
            values = ()
        if len(values) != count:
            raise RuntimeError(
                f"{path}, line {row}: expected an id and {count} numbers, got {line!r}"
            )
        yield name, values


def _demand_all(path: Path, ids: list[str], table: dict) -> None:
    lacking = [name for name in ids if name not in table]
    if lacking or not ids:
        raise RuntimeError(
            f"{path} lacks {len(lacking)} of the {len(ids)} pictures of image_ids.txt: {_some(lacking)}"
        )


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()]


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _some(names: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:5]) + (", ..." if len(distinct) > 5 else "")


def _has_own_validation(root: Path) -> bool:
    return (root / "CUBV2").is_dir()


def _own_validation_pictures(root: Path) -> Path:
    images = root / "CUBV2" / "images"
    return images if images.is_dir() else root / "CUBV2"


def _missing(root: Path, path: Path, expected: str) -> FileNotFoundError:
    what = f"{root} does not exist" if not root.exists() else f"{path} is missing"
    return FileNotFoundError(
        f"{what}: expected {expected} at {path}; give the folder with --data.root DIR"
    )
