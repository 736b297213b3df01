"""The size at which the pictures of a translation are read."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from datamodules import camvid

PREPROCESS = ("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none")


def scale_width_size(width: int, height: int, load_size: int, crop_size: int) -> tuple[int, int]:
    """(width, height) of a picture scaled to the width ``load_size``, no lower than ``crop_size``.

    Fractions of a pixel are cut off. As in the released code.
    """
    return load_size, max(load_size * height // width, crop_size)


def multiple_of_four(width: int, height: int) -> tuple[int, int]:
    """(width, height), each rounded to a multiple of 4; halves go to the even multiple.

    As in the released code: 30 becomes 32, 34 becomes 32, and 1 and 2 become 0.
    """
    return 4 * round(width / 4), 4 * round(height / 4)


@dataclass(frozen=True)
class Sizing:
    """The rules by which pictures of any size are brought to that of training and of evaluation.

    Args:
        preprocess: one of ``PREPROCESS``.
        load_size: side, or width, to which training pictures are resized.
        crop_size: side of the square that is cut out of them.
    """

    preprocess: str
    load_size: int
    crop_size: int

    @property
    def crop(self) -> int | None:
        """Side of the random crop of training, None without one."""
        return self.crop_size if self.preprocess.endswith("crop") else None

    def training(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a training picture before the crop."""
        if self.preprocess == "resize_and_crop":
            return self.load_size, self.load_size
        if self.preprocess == "crop":
            return width, height
        return self.evaluation(width, height)

    def evaluation(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a picture to evaluate, which is always the whole picture."""
        if self.preprocess == "resize_and_crop":
            return self.crop_size, self.crop_size
        if self.preprocess in ("scale_width", "scale_width_and_crop"):
            return scale_width_size(width, height, self.load_size, self.crop_size)
        return multiple_of_four(width, height)

    def demand_possible(self, path: Path, width: int, height: int, training: bool) -> None:
        """Raises ValueError if a picture of this size cannot be resized, or cropped for training."""
        if training and self.preprocess == "crop" and min(width, height) < self.crop_size:
            raise ValueError(
                f"{path} is {width}x{height} (width x height), smaller than the crop; use "
                f"--data.crop_size {min(width, height)} or less, or --data.preprocess "
                "resize_and_crop"
            )
        if min(self.evaluation(width, height)) < 1:
            raise ValueError(
                f"{path} is {width}x{height} (width x height), which rounds to no multiple of 4 "
                "above 0; leave it out, or use --data.preprocess resize_and_crop"
            )


@dataclass(frozen=True)
class PictureReader:
    """Decodes a file at the size of training or evaluation, by bicubic interpolation.

    Args:
        channels: 1 or 3, to which pictures are converted; transparency is dropped.
        sizing: the rules; None: pictures keep their size.
        training: the size of training instead of that of evaluation.
    """

    channels: int
    sizing: Sizing | None = None
    training: bool = False

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of what a picture of this size becomes."""
        if self.sizing is None:
            return width, height
        rule = self.sizing.training if self.training else self.sizing.evaluation
        return rule(width, height)

    def picture(self, path: Path) -> Tensor:
        """The pixels, uint8 [channels, H, W]."""
        with Image.open(path) as picture:
            pixels = picture.convert("RGB" if self.channels == 3 else "L")
        return pil_to_tensor(pixels.resize(self.size(*pixels.size), Image.Resampling.BICUBIC))

    def mask(self, path: Path) -> Tensor:
        """The class ids of the same pixels, uint8 [1, H, W]."""
        with Image.open(path) as picture:
            size = picture.size
        return camvid.read_mask(path, self.size(*size))
