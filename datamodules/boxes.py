"""Boxes of objects in pictures: files of them, and where they lie once the picture is resized.

A box is (x0, y0, x1, y1) in pixels, the upper left and the lower right corner.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from datamodules.pictures import decode_picture

Box = tuple[int, int, int, int]

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


@dataclass(frozen=True)
class BoxLine:
    """A line of a boxes file.

    Attributes:
        place: ``FILE, line N``, for errors.
        picture: what the line calls the picture.
        box: in pixels of the file.
    """

    place: str
    picture: str
    box: Box


def read_boxes(path: Path) -> list[BoxLine]:
    """Reads lines ``PICTURE,x0,y0,x1,y1``; several lines with one picture are several boxes.

    A first line without a number is a header. Fractions of a pixel are cut off. The
    ``localization.txt`` of wsolevaluation is such a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has other fields, or its box is inverted; or there is no box at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the boxes file {path} does not exist")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        place = f"{path}, line {number}"
        fields = [field.strip() for field in line.rsplit(",", 4)]
        if not line.strip() or (number == 1 and not any(map(NUMBER.fullmatch, fields[1:]))):
            continue
        if len(fields) != 5 or not all(map(NUMBER.fullmatch, fields[1:])):
            raise ValueError(f"{place}: expected PICTURE,x0,y0,x1,y1 in pixels, got {line!r}")
        x0, y0, x1, y1 = (int(float(field)) for field in fields[1:])
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"{place}: the box {(x0, y0, x1, y1)} is inverted; the order is x0,y0,x1,y1 with "
                "x0 <= x1 and y0 <= y1"
            )
        found.append(BoxLine(place, fields[0], (x0, y0, x1, y1)))
    if not found:
        raise ValueError(f"the boxes file {path} has no line PICTURE,x0,y0,x1,y1")
    return found


def demand_inside(line: BoxLine, size: tuple[int, int]) -> None:
    """Raises ValueError if a box leaves its picture of this (height, width)."""
    x0, y0, x1, y1 = line.box
    height, width = size
    if min(x0, y0) < 0 or x1 > width or y1 > height:
        raise ValueError(
            f"{line.place}: the box {line.box} is not inside {line.picture}, which is "
            f"{width}x{height} (width x height); boxes are in pixels of the original file"
        )


@dataclass(frozen=True)
class Framing:
    """How a picture file becomes the image that a network sees; its boxes follow.

    Attributes:
        resize: side of the square to which the picture is squeezed, or the length of its short side.
        keep_aspect: the latter.
        crop: side of the square that is then cut out of the middle; None for no cut.
    """

    resize: int
    keep_aspect: bool = False
    crop: int | None = None

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        if not self.keep_aspect:
            return self.resize, self.resize
        short = min(height, width)
        return self.resize * height // short, self.resize * width // short

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the cut in a resized picture of this size."""
        if self.crop is None:
            return 0, 0
        return (height - self.crop) // 2, (width - self.crop) // 2

    def decode(self, path: Path) -> Tensor:
        """The image of a file: uint8 RGB [3, H, W]."""
        pixels = decode_picture(path)
        height, width = self.resized(*pixels.shape[1:])
        pixels = resize(pixels, [height, width], InterpolationMode.BILINEAR, antialias=True)
        top, left = self.corner(height, width)
        side = self.crop
        return pixels if side is None else pixels[:, top : top + side, left : left + side].clone()

    def box(self, box: Box, size: tuple[int, int]) -> Box:
        """Where a box of a picture of this (height, width) lies in its image.

        Coordinates are scaled and truncated to whole pixels, the rule of wsolevaluation. A cut
        moves them and clips them to [0, crop]; a box outside of the cut is a line on its border,
        so that its picture still counts.
        """
        height, width = self.resized(*size)
        top, left = self.corner(height, width)
        # Of whole numbers, which is exact.
        x0, x1 = (x * width // size[1] - left for x in box[::2])
        y0, y1 = (y * height // size[0] - top for y in box[1::2])
        if self.crop is None:
            return x0, y0, x1, y1
        x0, y0, x1, y1 = (min(max(value, 0), self.crop) for value in (x0, y0, x1, y1))
        return x0, y0, x1, y1


def framed_boxes(
    boxes: Sequence[Sequence[Box]], sizes: Sequence[tuple[int, int]], framing: Framing
) -> Tensor:
    """The boxes of each picture in its image.

    Args:
        boxes: of each picture, in pixels of the file.
        sizes: (height, width) of each file.
        framing: how a file becomes an image.

    Returns:
        int64 [N, M, 4] with M the largest number of boxes; rows that are no box are -1.
    """
    framed = torch.full((len(boxes), max(map(len, boxes), default=0), 4), -1)
    for row, (of_picture, size) in enumerate(zip(boxes, sizes, strict=True)):
        if of_picture:
            framed[row, : len(of_picture)] = torch.tensor(
                [framing.box(box, size) for box in of_picture]
            )
    return framed
