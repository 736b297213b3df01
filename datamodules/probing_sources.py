"""Probing sets: images, and which concepts are where in them.

A concept is a number from 1 on with a name and a category. Where the concepts of an image are is said by layers of
numbers, one layer for concepts that exclude each other, 0 where there is none; one of the whole image fills a layer.
"""

import csv
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.camvid import CLASS_NAMES, VOID, Frame, list_frames, read_mask
from datamodules.colour_names import COLOUR_TERMS, name_colours
from datamodules.datasets import BatchDataset
from datamodules.pictures import decode_picture, visit_files
from datamodules.shapes import Scenes

NO_CLASS = -1
CATEGORIES = ("object", "part", "scene", "texture", "color")
"""Of Broden, those of Compositional Explanations, which leaves material out."""


@dataclass(frozen=True)
class Concept:
    """What a number in a layer means."""

    name: str
    category: str


class ProbingDataset(BatchDataset):
    """Images with their concepts. Batches have ``layers`` if asked for, see :meth:`without_layers`.

    Attributes:
        concepts: number -> concept, ascending.
        class_names: name of each label; empty without labels.
        mask_size: (height, width) of the layers.
    """

    concepts: dict[int, Concept]
    class_names: list[str]
    mask_size: tuple[int, int]

    def images(self, index: Tensor) -> dict[str, Any]:
        """``image`` uint8 [B, 3, H, W] and ``label`` int64 [B] (-1: of none of the classes) of these places."""
        raise NotImplementedError

    def layers(self, index: Tensor, images: Tensor) -> Tensor:
        """Numbers of concepts, int64 [B, K, *mask_size], of these places, whose images are given."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes with anything that changes a batch."""
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """``image`` uint8 [B, 3, H, W], ``label`` and ``index`` int64 [B], ``layers`` int64 [B, K, *mask_size]."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        found = self.images(index)
        return {**found, "index": index, "layers": self.layers(index, found["image"])}

    def without_layers(self) -> "ImagesAlone":
        """The same without concepts, which may cost more than the images."""
        return ImagesAlone(self)


class ImagesAlone(BatchDataset):
    """The images of a probing set."""

    def __init__(self, probing: ProbingDataset) -> None:
        self.probing = probing
        self.sample_shape = probing.sample_shape

    def __len__(self) -> int:
        return len(self.probing)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """``image`` uint8 [B, 3, H, W], ``label`` and ``index`` int64 [B]."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return {**self.probing.images(index), "index": index}


class SceneProbing(ProbingDataset):
    """Procedural scenes, whose concepts are known exactly: shape, colour and texture of objects, kind of background."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self.sample_shape = scenes.sample_shape
        self.class_names = scenes.class_names
        self.mask_size = (scenes.options.image_size,) * 2
        options = scenes.options
        third = "part" if options.mode == "parts" else "texture"
        sizes = {"shape": len(options.shapes), "colour": len(options.colours)}
        sizes[third] = 2 if third == "part" else len(options.textures)
        sizes["background"] = len(options.backgrounds)
        self._sizes = list(sizes.values())
        categories = [category for category, size in sizes.items() for _ in range(size)]
        pairs = zip(scenes.concept_names, categories, strict=True)
        self.concepts = {number: Concept(*pair) for number, pair in enumerate(pairs, 1)}

    def __len__(self) -> int:
        return len(self.scenes)

    def images(self, index: Tensor) -> dict[str, Any]:
        """The scenes, drawn."""
        return {"image": self.scenes.render(index), "label": self.scenes.labels[index]}

    def layers(self, index: Tensor, images: Tensor) -> Tensor:
        """A layer for each category; a position has at most one concept of each."""
        masks = self.scenes.truth(index)["concept_masks"]
        numbers = masks * torch.arange(1, masks.shape[1] + 1)[:, None, None]
        return torch.stack([part.amax(1) for part in numbers.split(self._sizes, 1)], 1)

    def fingerprint(self) -> str:
        """Of everything a scene is a function of."""
        scenes = self.scenes
        return f"shapes {asdict(scenes.options)} {scenes.seed} {scenes.start} {scenes.count}"


class PatchProbing(ProbingDataset):
    """Patches of labelled frames: the classes and the colours of the pixels are the concepts.

    The label of a patch is the class of most of its labelled pixels.

    Args:
        images: uint8 [N, 3, S, S].
        masks: uint8 [N, S, S], places in ``class_names``, 255 for void.
        class_names: names of the classes.
    """

    def __init__(self, images: Tensor, masks: Tensor, class_names: Sequence[str]) -> None:
        self.pixels, self.masks = images, masks
        self.class_names = list(class_names)
        self.sample_shape = tuple(images.shape[1:])
        self.mask_size = (masks.shape[1], masks.shape[2])
        concepts = [Concept(name, "object") for name in class_names]
        concepts += [Concept(name, "colour") for name in COLOUR_TERMS]
        self.concepts = dict(enumerate(concepts, 1))
        counts = [(masks == k).flatten(1).sum(1) for k in range(len(self.class_names))]
        self.labels = torch.stack(counts, 1).argmax(1)

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: Tensor) -> dict[str, Any]:
        """The patches."""
        return {
            "image": self.pixels.index_select(0, index),
            "label": self.labels.index_select(0, index),
        }

    def layers(self, index: Tensor, images: Tensor) -> Tensor:
        """Classes, then colours."""
        masks = self.masks.index_select(0, index).long()
        classes = torch.where(masks == VOID, 0, masks + 1)
        return torch.stack([classes, name_colours(images) + 1 + len(self.class_names)], 1)

    def fingerprint(self) -> str:
        """Of all pixels."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.pixels, self.masks):
            digest.update(part.contiguous().numpy().tobytes())
        return f"patches {self.class_names} {digest.hexdigest()}"


def read_camvid_patches(
    root: Path, parts: Sequence[str], side: int, scale: float, limit: int | None
) -> PatchProbing:
    """Patches of CamVid's frames, side by side from the upper left corner.

    Args:
        root: see :mod:`datamodules.camvid`.
        parts: published parts.
        side: of the square patches.
        scale: by which frames are resized before.
        limit: at most so many frames, evenly spaced.

    Raises:
        FileNotFoundError: data are missing.
        RuntimeError: damaged files, or masks of another size than their frames.
        ValueError: no patch fits into a frame, or every patch is mostly void.
    """
    frames = [frame for frame in list_frames(root) if frame.part in parts]
    if limit is not None and limit < len(frames):
        frames = [frames[i * len(frames) // limit] for i in range(limit)]
    found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(frames)

    def cut(position: int) -> None:
        found[position] = _cut_frame(frames[position], side, scale)

    pictures = [frame.picture for frame in frames]
    visit_files(cut, pictures, "CamVid", progress=f"cutting CamVid {'+'.join(parts)}")
    images, masks = (torch.cat([pair[k] for pair in found]) for k in (0, 1))
    if not len(images):
        raise ValueError(
            f"no patch of {side}x{side} pixels in frames resized by {scale} has half of its pixels labelled; use a "
            "smaller --data.image_size or a larger --data.frame_scale"
        )
    return PatchProbing(images, masks, CLASS_NAMES)


def _cut_frame(frame: Frame, side: int, scale: float) -> tuple[Tensor, Tensor]:
    with Image.open(frame.picture) as picture:
        size = picture.size
        pixels = picture.convert("RGB")
    with Image.open(frame.mask) as mask:
        if mask.size != size:
            raise ValueError(
                f"its mask {frame.mask} is {mask.size[0]}x{mask.size[1]}, the frame {size[0]}x{size[1]} (width x "
                "height)"
            )
    width, height = (round(length * scale) for length in size)
    pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    classes = read_mask(frame.mask, (width, height))
    both = [
        part.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
        if min(width, height) >= side
        else part.new_empty(0, len(part), side, side)
        for part in (image, classes)
    ]
    labelled = (both[1] != VOID).flatten(1).float().mean(1) >= 0.5
    return both[0][labelled], both[1][labelled][:, 0]


class BrodenProbing(ProbingDataset):
    """A folder in the layout of Broden, as its ADE20k subset is too.

    ``ROOT/index.csv`` has a row for each image: ``image``, ``split``, its size ``ih``, ``iw``, that of its masks
    ``sh``, ``sw``, and a column for each category with label maps and labels of the whole image, separated by
    semicolons. Files lie in ``ROOT/images``; the label of a pixel is ``R + 256 G``. ``ROOT/label.csv`` names the
    labels: ``number``, ``name``, ``category`` as ``object(12);part(3)``, where the number (taken for its coverage;
    inferred, not verified) decides among several. Label 0 is none, also of a whole image.

    The classes are the scenes, without the ``-s`` at the end of their names.

    Args:
        root: the folder.
        split: rows of this split; None for all.
        categories: those to use; a label of others is left out.
        limit: at most so many images, evenly spaced.

    Raises:
        FileNotFoundError: the folder or a table is missing.
        RuntimeError: a table lacks a column.
        ValueError: no such split or category, or images of several sizes.
    """

    def __init__(
        self, root: Path, split: str | None, categories: Sequence[str], limit: int | None
    ) -> None:
        self.root = root
        self.rows = list(_table(root / "index.csv", ("image", "ih", "iw", "sh", "sw")))
        known = [name for name in self.rows[0] if name in _category_columns(self.rows[0])]
        self.categories = [name for name in categories if name in known]
        if not self.categories:
            raise ValueError(
                f"categories={list(categories)} are no columns of {root / 'index.csv'}, which has {', '.join(known)}; "
                "set --data.categories"
            )
        if split is not None:
            splits = sorted({row.get("split", "") for row in self.rows})
            self.rows = [row for row in self.rows if row.get("split") == split]
            if not self.rows:
                raise ValueError(
                    f"split={split!r} is none of {root / 'index.csv'}: {', '.join(splits)}; set --data.split"
                )
        if limit is not None and limit < len(self.rows):
            self.rows = [self.rows[i * len(self.rows) // limit] for i in range(limit)]
        sizes = {tuple(int(row[name]) for name in ("ih", "iw", "sh", "sw")) for row in self.rows}
        if len(sizes) > 1:
            raise ValueError(
                f"the images of {root / 'index.csv'} have the sizes (ih, iw, sh, sw) {sorted(sizes)[:4]}; they must "
                "have one, so that they fit into a batch"
            )
        ((height, width, *mask_size),) = sizes
        self.sample_shape = (3, height, width)
        self.mask_size = (mask_size[0], mask_size[1])
        labels = _read_labels(root / "label.csv")
        self._all_labels = set(labels)
        self.concepts = {k: v for k, v in sorted(labels.items()) if v.category in self.categories}
        scenes = {k: v.name.removesuffix("-s") for k, v in labels.items() if v.category == "scene"}
        self.class_names = sorted(set(scenes.values()))
        self._class_of = {k: self.class_names.index(name) for k, name in scenes.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, index: Tensor) -> dict[str, Any]:
        """The pictures, and their scenes as labels."""
        rows = [self.rows[i] for i in index.tolist()]
        paths = [self.root / "images" / row["image"] for row in rows]
        return {
            "image": torch.stack(self._decoded(paths, decode_picture, self.sample_shape, "images")),
            "label": torch.tensor([self._scene(row) for row in rows]),
            "path": [str(path) for path in paths],
        }

    def _scene(self, row: dict[str, str]) -> int:
        whole = [int(v) for v in row.get("scene", "").split(";") if v.isdigit()]
        return next((self._class_of[k] for k in whole if k in self._class_of), NO_CLASS)

    def layers(self, index: Tensor, images: Tensor) -> Tensor:
        """All channels of all categories; an image with fewer has layers of zeros."""
        rows = [self.rows[i] for i in index.tolist()]
        values = [self._values(row) for row in rows]
        paths = [self.root / "images" / v for found in values for v in found if not v.isdigit()]
        maps = iter(self._decoded(paths, _label_map, (1, *self.mask_size), "masks"))
        layers = torch.zeros(
            len(rows), max(1, *map(len, values)), *self.mask_size, dtype=torch.int64
        )
        for layer, found in zip(layers, values, strict=True):
            for channel, value in enumerate(found):
                layer[channel] = int(value) if value.isdigit() else next(maps)[0]
        seen = layers.unique().tolist()
        strange = sorted(set(seen) - self._all_labels - {0})
        if strange:
            holds = (layers == strange[0]).flatten(1).any(1)
            raise ValueError(
                f"{rows[int(holds.nonzero()[0])]['image']} has the label {strange[0]}, which "
                f"{self.root / 'label.csv'} does not name: add it there or correct the maps"
            )
        # A map of one category may show a concept that counts for another, which is left out.
        used = torch.tensor([0, *self.concepts])
        return torch.where(torch.isin(layers, used), layers, 0)

    def _values(self, row: dict[str, str]) -> list[str]:
        """Files of label maps and labels of the whole image."""
        return [v.strip() for name in self.categories for v in row[name].split(";") if v.strip()]

    def _decoded(
        self,
        paths: Sequence[Path],
        decode: Callable[[Path], Tensor],
        shape: tuple[int, ...],
        what: str,
    ) -> list[Tensor]:
        found = [torch.empty(0)] * len(paths)

        def read(position: int) -> None:
            pixels = decode(paths[position])
            if tuple(pixels.shape) != shape:
                size, wanted = (f"{s[2]}x{s[1]}" for s in (pixels.shape, shape))
                raise ValueError(f"{size} pixels, index.csv says {wanted} (width x height)")
            found[position] = pixels

        visit_files(read, paths, f"{self.root}, {what},")
        return found

    def fingerprint(self) -> str:
        """Of the tables, and of names, sizes and times of the files."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("index.csv", "label.csv"):
            digest.update((self.root / name).read_bytes())
        for row in self.rows:
            for value in (row["image"], *self._values(row)):
                path = self.root / "images" / value
                if not value.isdigit() and path.exists():
                    digest.update(
                        f"{value} {path.stat().st_size} {path.stat().st_mtime_ns}".encode()
                    )
        return f"broden {self.categories} {len(self.rows)} {digest.hexdigest()}"


def _category_columns(row: dict[str, str]) -> list[str]:
    return [name for name in row if name not in ("image", "split", "ih", "iw", "sh", "sw")]


def _label_map(path: Path) -> Tensor:
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("RGB")).astype(np.int64)
    return torch.from_numpy(pixels[..., 0] + 256 * pixels[..., 1])[None]


def _read_labels(path: Path) -> dict[int, Concept]:
    labels = {}
    for row in _table(path, ("number", "name", "category")):
        best, most = "", -1.0
        for category, share in re.findall(r"([\w-]+)(?:\(([\d.]+)\))?", row["category"]):
            if category and float(share or 0) >= most:  # of equal ones the later
                best, most = category, float(share or 0)
        labels[int(row["number"])] = Concept(row["name"], best)
    labels.pop(0, None)
    return labels


def _table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    if not path.is_file():
        what = f"{path.parent} does not exist" if not path.parent.exists() else f"{path} is missing"
        raise FileNotFoundError(
            f"{what}: expected Broden's layout (index.csv, label.csv, images/); give the folder with --data.root DIR"
        )
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in columns if name not in (reader.fieldnames or [])]
        if lacking:
            raise RuntimeError(
                f"{path} lacks the columns {', '.join(lacking)}; it has {', '.join(reader.fieldnames or [])}"
            )
        rows = [{k: v or "" for k, v in row.items() if k is not None} for row in reader]
    if not rows:
        raise RuntimeError(f"{path} has no rows")
    return iter(rows)
