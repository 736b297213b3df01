"""Operations on class maps [..., H, W]: normalise over space, resize, fuse."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def normalize_map(maps: Tensor, method: Literal["minmax", "max"] = "minmax") -> Tensor:
    """Maps scaled to [0, 1] over space, each on its own.

    ``minmax``: ``(m - min m) / (max m - min m)``, no epsilon (ACoL, Zhang et al. 2018, released code). ``max``:
    negative values become 0, then ``m / max m`` (as CAM's box generator takes them). A map with nothing to scale
    (constant, or with nan or infinity; for ``max`` also nowhere positive) becomes zeros, where the released training
    code gives nan.

    Args:
        maps: [..., H, W], any real type; computed in float32 at least, also under autocast.
        method: ``minmax`` or ``max``.

    Returns:
        Same shape, float32 or float64.

    Raises:
        ValueError: fewer than two dimensions, or another method.
    """
    if maps.ndim < 2:
        raise ValueError(f"maps of shape {tuple(maps.shape)} must end in [H, W]")
    maps = maps if maps.dtype == torch.float64 else maps.float()
    if method == "minmax":
        shifted = maps - maps.amin((-2, -1), keepdim=True)
    elif method == "max":
        shifted = maps.clamp_min(0)
    else:
        raise ValueError(f"method={method!r} of normalize_map must be 'minmax' or 'max'")
    highest = shifted.amax((-2, -1), keepdim=True)
    usable = (highest > 0) & highest.isfinite()
    # Both places are filled before dividing, so that no nan reaches a gradient either.
    scaled = shifted.where(usable, 0) / highest.where(usable, 1)
    return scaled


def upsample_map(
    maps: Tensor,
    size: int | Sequence[int],
    mode: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
) -> Tensor:
    """Maps resized to ``size``; half-pixel centres, no antialiasing.

    Bicubic has a = -0.75, as OpenCV's INTER_CUBIC, which the evaluation of Choe et al. (CVPR 2020) uses; it
    overshoots, so that the result leaves the range of the map: normalise *after* resizing.

    Args:
        maps: [..., H, W], any real type; computed in float32 at least.
        size: (height, width), or one number for both.
        mode: ``bicubic``, ``bilinear`` or ``nearest``.

    Returns:
        [..., *size], float32 or float64.

    Raises:
        ValueError: fewer than two dimensions, or another mode.
    """
    if maps.ndim < 2:
        raise ValueError(f"maps of shape {tuple(maps.shape)} must end in [H, W]")
    if mode not in ("bicubic", "bilinear", "nearest"):
        raise ValueError(f"mode={mode!r} of upsample_map must be bicubic, bilinear or nearest")
    height, width = (size, size) if isinstance(size, int) else size
    maps = maps if maps.dtype == torch.float64 else maps.float()
    planes = maps.reshape(1, -1, *maps.shape[-2:])
    if mode == "nearest":
        resized = F.interpolate(planes, (height, width), mode="nearest-exact")
    else:
        resized = F.interpolate(planes, (height, width), mode=mode, align_corners=False)
    return resized.reshape(*maps.shape[:-2], height, width)


def fuse_maps(maps: Sequence[Tensor], method: Literal["max", "mean"] = "max") -> Tensor:
    """One map of several normalised ones.

    Args:
        maps: tensors of one shape [..., H, W], each normalised by :func:`normalize_map`.
        method: ``max``, elementwise (ACoL, Zhang et al. 2018, sec. 3.2), or ``mean``.

    Returns:
        The shape of one map.

    Raises:
        ValueError: no map, different shapes, or another method.
    """
    shapes = {tuple(single.shape) for single in maps}
    if len(shapes) != 1:
        raise ValueError(f"fuse_maps needs one or more maps of one shape, got {sorted(shapes)}")
    stack = torch.stack(list(maps))
    if method == "max":
        return stack.amax(0)
    if method == "mean":
        return stack.mean(0)
    raise ValueError(f"method={method!r} of fuse_maps must be 'max' or 'mean'")
