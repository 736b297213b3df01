"""Normalisation layers by name."""

import math
from typing import Literal, get_args

from torch import nn

Norm = Literal["batch", "group", "none"]


def norm_layer(norm: Norm, channels: int) -> list[nn.Module]:
    """The layer, or none; ``group`` keeps the samples of a batch independent of each other.

    Raises:
        ValueError: unknown name.
    """
    match norm:
        case "batch":
            return [nn.BatchNorm2d(channels)]
        case "group":
            return [nn.GroupNorm(math.gcd(8, channels), channels)]
        case "none":
            return []
    raise ValueError(f"unknown norm={norm!r}; choose one of {', '.join(get_args(Norm))}")
