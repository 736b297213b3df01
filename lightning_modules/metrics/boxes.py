"""From localization maps to boxes, and what boxes share.

The rules are those of Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020
(released code), without OpenCV: the boxes equal those of ``cv2.findContours`` and ``cv2.contourArea``. Boxes are
``x0, y0, x1, y1`` in pixels; :func:`cam_dt_boxes` gives ``x, y, width, height``.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from lightning_modules.metrics.level_sets import Components, level_sets

Select = Literal["largest", "all", "largest_pixels"]


class BoxSweep(NamedTuple):
    """Boxes of one map at many thresholds. Thresholds that give the same mask share a level.

    Attributes:
        boxes: [M, 4], int64, in the order of their levels.
        level: the level of each box [M]; every level has at least one box.
        level_of_threshold: the level of each threshold [T].
    """

    boxes: NDArray[np.int64]
    level: NDArray[np.int64]
    level_of_threshold: NDArray[np.int64]


def box_sweep(
    map: ArrayLike | Tensor,
    thresholds: ArrayLike | Tensor,
    select: Select = "largest",
    quantize: bool = True,
) -> BoxSweep:
    """The boxes of :func:`boxes_from_map` at many thresholds, at hardly more than the price of one.

    Args:
        map: [H, W], values in [0, 1].
        thresholds: [T], in [0, 1], in any order.
        select: see :func:`boxes_from_map`.
        quantize: see :func:`boxes_from_map`.

    Raises:
        ValueError: see :func:`boxes_from_map`.
    """
    values, cutoffs = _cut(map, thresholds, quantize)
    if select not in ("largest", "all", "largest_pixels"):
        raise ValueError(f"select={select!r} must be 'largest', 'all' or 'largest_pixels'")
    levels, level_of_threshold = np.unique(cutoffs, return_inverse=True)
    if quantize:
        counts = np.searchsorted(levels, np.arange(256), side="left")[values]
    else:
        counts = np.searchsorted(levels, values, side="left")
    found, holes = level_sets(counts, len(levels), holes=select == "all", areas=select == "largest")
    if select == "all":
        level = np.concatenate([found.level, holes.level])
        boxes = np.concatenate([found.boxes, holes.boxes])
    else:
        chosen = _largest(found, found.area if select == "largest" else found.pixels)
        level, boxes = found.level[chosen], found.boxes[chosen]
    height, width = values.shape
    boxes = np.minimum(boxes + np.array([0, 0, 1, 1]), [width, height, width - 1, height - 1])
    empty = np.setdiff1d(np.arange(len(levels)), level)
    level = np.concatenate([level, empty])
    boxes = np.concatenate([boxes, np.zeros((len(empty), 4), dtype=np.int64)])
    order = np.lexsort([*boxes.T[::-1], level])
    return BoxSweep(boxes[order], level[order], level_of_threshold)


def _cut(
    map: ArrayLike | Tensor, thresholds: ArrayLike | Tensor, quantize: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The map as it is compared, and what it must exceed at each threshold."""
    if isinstance(map, Tensor):
        map = map.detach().cpu()
        map = (map if map.dtype == torch.float64 else map.float()).numpy()
    values = np.asarray(map)
    levels = np.asarray(thresholds, dtype=np.float64).ravel()
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map must be [H, W], got shape {values.shape}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"the values of a map must be in [0, 1], got {low} to {high}; apply normalize_map first"
        )
    if not len(levels) or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"thresholds must be one or more numbers in [0, 1], got {levels.tolist()}")
    if quantize:
        values = (values * 255).astype(np.uint8)
        return values, np.trunc(levels * values.max()).astype(np.int64)
    return values.astype(np.float64), levels * float(high)


def _largest(found: Components, size: NDArray[Any]) -> NDArray[np.int64]:
    """The row of the largest component of each level; of equal ones, that whose first pixel is last."""
    order = np.lexsort([found.first, size, found.level])
    return order[np.flatnonzero(np.diff(found.level[order], append=-1))]


def boxes_from_map(
    map: ArrayLike | Tensor,
    threshold: float | Sequence[float] | Tensor,
    select: Select = "largest",
    quantize: bool = True,
) -> Any:
    """Boxes around what exceeds a share of the maximum of a localization map.

    The mask is ``u > int(t * max u)`` with ``u = uint8(255 * map)``; its parts are 8-connected. A box is
    ``(x0, y0, min(x0 + w, W - 1), min(y0 + h, H - 1))``: one pixel too wide and high, except at the border, as in the
    released code. An empty mask gives ``(0, 0, 0, 0)``. Equal to OpenCV's contours.

    Args:
        map: [H, W], values in [0, 1], see :func:`~lightning_modules.nn.maps.normalize_map`.
        threshold: t in [0, 1], or several.
        select: ``largest``: the part with the largest contour area (the polygon through the centres of its outermost
            pixels, so that a line has none; of equal ones, that whose first pixel in raster order is last).
            ``all``: every part, and every hole with the pixels around it (MaxBoxAccV2). ``largest_pixels``: the part
            with the most pixels.
        quantize: whether to use 8-bit values as above; otherwise the mask is ``map > t * max map``.

    Returns:
        Boxes [N, 4], int64, in lexicographic order; a list of these for several thresholds.

    Raises:
        ValueError: not one map, values or thresholds outside [0, 1] (nan too), or another ``select``.
    """
    single = np.ndim(threshold) == 0
    sweep = box_sweep(map, np.atleast_1d(np.asarray(threshold)), select, quantize)
    bounds = np.searchsorted(sweep.level, np.arange(sweep.level[-1] + 2))
    boxes = [
        torch.from_numpy(sweep.boxes[bounds[level] : bounds[level + 1]])
        for level in sweep.level_of_threshold
    ]
    return boxes[0] if single else boxes


def component_polygon_area(mask: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Contour areas of the 8-connected parts of a mask, holes filled, as ``cv2.contourArea``.

    That is the number of 2 x 2 windows with four pixels and half the number of those with three.

    Args:
        mask: [H, W], zero = background.

    Returns:
        ``(area [N] float64, pixels [N] int64)`` in raster order of the first pixels; ``pixels`` leaves holes out.

    Raises:
        ValueError: not a mask [H, W].
    """
    values = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a mask must be [H, W], got shape {values.shape}")
    found, _ = level_sets((values != 0).astype(np.int64), 1, areas=True)
    order = np.argsort(found.first)
    return torch.from_numpy(found.area[order] / 2), torch.from_numpy(found.pixels[order])


def box_iou_inclusive(a: ArrayLike | Tensor, b: ArrayLike | Tensor) -> Tensor:
    """Intersection over union of boxes whose last pixels count: widths are ``x1 - x0 + 1``.

    The ILSVRC toolkit, CAM and Choe et al. 2020 use it; ``torchvision.ops.box_iou`` has no ``+ 1``.

    Args:
        a: [N, 4], ``x0, y0, x1, y1``.
        b: [M, 4].

    Returns:
        [N, M], float64 in [0, 1].

    Raises:
        ValueError: another shape, or boxes with ``x1 < x0`` or ``y1 < y0``.
    """
    return torch.from_numpy(_iou(_boxes(a), _boxes(b)))


def best_iou(boxes: ArrayLike | Tensor, truth: ArrayLike | Tensor) -> NDArray[np.float64]:
    """The largest :func:`box_iou_inclusive` of every box [N] with a ground-truth box [G, 4].

    Raises:
        ValueError: no ground-truth box, or bad boxes.
    """
    true = _boxes(truth)
    if not len(true):
        raise ValueError("an image has no ground-truth box; leave it out of the metric")
    return _iou(_boxes(boxes), true).max(1)


def _boxes(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    boxes = np.asarray(values, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4] with x0, y0, x1, y1, got shape {boxes.shape}")
    if not (boxes[:, 2:] >= boxes[:, :2]).all():
        wrong = boxes[~(boxes[:, 2:] >= boxes[:, :2]).all(1)][0]
        raise ValueError(f"box {wrong.tolist()} is not x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")
    return boxes


def _iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    sizes = [np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1) for boxes in (a, b)]
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.prod(np.maximum(high - low + 1, 0), axis=2)
    return overlap / (sizes[0][:, None] + sizes[1][None] - overlap)


def resize_box(
    boxes: ArrayLike | Tensor,
    image_size: ArrayLike | Tensor,
    new_size: ArrayLike | Tensor,
) -> Tensor:
    """Boxes of pictures in pixels of the resized pictures, truncated to whole pixels.

    Args:
        boxes: [N, 4] or [4], ``x0, y0, x1, y1``, not negative.
        image_size: (width, height) of the pictures, [2] or one per box [N, 2].
        new_size: (width, height) after resizing, likewise.

    Returns:
        Same shape as ``boxes``, int64.

    Raises:
        ValueError: negative coordinates or sizes that are not positive.
    """
    corners, old, new = (
        np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
        for value in (boxes, image_size, new_size)
    )
    if (corners < 0).any() or (old <= 0).any() or (new <= 0).any():
        raise ValueError(
            f"cannot resize boxes {corners.tolist()} of pictures of width and height "
            f"{old.tolist()} to {new.tolist()}"
        )
    twice = (np.concatenate([size, size], axis=-1) for size in (old, new))
    old, new = twice
    return torch.from_numpy((corners * new / old).astype(np.int64))


def cam_dt_boxes(heatmap: ArrayLike | Tensor, thresholds: Sequence[int] = (20, 100, 110)) -> Tensor:
    """The boxes of CAM's released generator (zhoubolei/CAM), largest first.

    For each threshold: the distance of every pixel above it to the nearest pixel that is not, scaled to 0..255, is cut
    at 10; every contour gives a box, holes too. Boxes are pushed away from the right and lower border by five pixels.
    From the largest down, a box that overlaps a larger one by more than half the larger area is dropped, but never two
    neighbours in the list at once (the generator's loop skips one after each removal; kept for the sake of its
    numbers). The order of equally large boxes, which the generator leaves open, is that of thresholds and coordinates.

    Args:
        heatmap: [H, W], whole numbers in 0..255, maximum 255.
        thresholds: in 0..254.

    Returns:
        [N, 4], ``x, y, width, height``, int64. Evaluations use the first; the combined top-5 also the second. Sizes
        may be 0 or negative for contours at the border.

    Raises:
        ValueError: not a heat map [H, W] with values in 0..255.
    """
    values = np.asarray(heatmap.detach().cpu() if isinstance(heatmap, Tensor) else heatmap)
    if values.ndim != 2 or not values.size or values.min() < 0 or values.max() > 255:
        raise ValueError(f"a heat map must be [H, W] with values in 0..255, got {values.shape}")
    height, width = values.shape
    boxes: list[tuple[int, ...]] = []
    for threshold in thresholds:
        mask = values > threshold
        if not mask.all():
            distance = ndimage.distance_transform_edt(mask)
            mask = distance * 255 / max(distance.max(), 1) + 0.5 >= 11
        if not mask.any():
            continue
        found = level_sets(mask.astype(np.int64), 1, holes=True)
        corners = np.concatenate([part.boxes for part in found])
        corners = corners[np.lexsort(corners.T[::-1])]
        size = corners[:, 2:] - corners[:, :2] + 1
        limit = np.array([width - 5, height - 5])
        start = np.minimum(corners[:, :2], limit)
        size = np.minimum(size, limit - corners[:, :2])
        boxes += map(tuple, np.concatenate([start, size], axis=1).tolist())
    boxes.sort(key=lambda box: -box[2] * box[3])
    i = 0
    while i < len(boxes):
        j = i + 1
        while j < len(boxes):
            if _big_overlap(boxes[i], boxes[j]):
                del boxes[j]
            j += 1
        i += 1
    return torch.tensor(boxes, dtype=torch.long).reshape(-1, 4)


def _big_overlap(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    across, down = (max(0, min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    return across * down > int(max(a[2] * a[3], b[2] * b[3]) * 0.5)
