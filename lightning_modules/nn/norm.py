"""Normalisation layers by name."""

import math
from typing import Literal, get_args

from torch import nn

Norm = Literal["batch", "group", "instance", "none"]


def norm_layer(norm: Norm, channels: int) -> list[nn.Module]:
    """The layer, or none.

    ``group`` and ``instance`` keep the samples of a batch independent of each other. ``instance`` normalises every
    channel of every sample, has neither parameters nor running statistics, and needs more than one pixel.

    Raises:
        ValueError: unknown name.
    """
    match norm:
        case "batch":
            return [nn.BatchNorm2d(channels)]
        case "group":
            return [nn.GroupNorm(math.gcd(8, channels), channels)]
        case "instance":
            return [nn.InstanceNorm2d(channels)]
        case "none":
            return []
    raise ValueError(f"unknown norm={norm!r}; choose one of {', '.join(get_args(Norm))}")
