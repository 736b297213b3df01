"""Images as numbers and as bytes, and how much two of them differ."""

from typing import Literal

import torch
from torch import Tensor


def to_uint8(x: Tensor, rounding: Literal["truncate", "round"] = "round") -> Tensor:
    """Bytes of images in [-1, 1].

    Args:
        x: of any shape; values outside [-1, 1] count as the nearest end.
        rounding: ``round`` to the nearest byte, or ``truncate`` as the released code of CycleGAN, which makes images
            darker by half a grey level on average.

    Returns:
        uint8, of the same shape.

    Raises:
        ValueError: another rounding.
    """
    levels = (x.float().clamp(-1, 1) + 1) / 2 * 255
    if rounding == "round":
        levels = levels.round()
    elif rounding != "truncate":
        raise ValueError(f"rounding={rounding!r} of to_uint8 must be 'truncate' or 'round'")
    return levels.to(torch.uint8)


def in_8_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] as any file would hold them: float32, rounded to the 256 levels."""
    return images.float().mul(255).round().clamp(0, 255).div(255)


def mean_difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference of each pair of images [B, C, H, W], [B]."""
    return (first - second).abs().flatten(1).mean(1)
