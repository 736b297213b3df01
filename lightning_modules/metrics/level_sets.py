"""Connected components of all level sets of an image at once, and the holes between them.

Thresholding a map at 256 levels and labelling every mask repeats nearly all of the work. Here each pixel is assigned
to the local maximum that steepest ascent leads to; two maxima are connected at the levels below the highest pass
between them. A component at a level is thus a set of maxima, and its box and area add up from those of its maxima.
The background is treated in the same way, upside down. Only NumPy is needed.

Foreground is 8-connected, background 4-connected, and all around the image is background, as in OpenCV's contours.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.integer]

# Half of the neighbours as (row, column) steps; the other half are their opposites.
FOUR = ((0, 1), (1, 0))
EIGHT = (*FOUR, (1, 1), (1, -1))
MAX_CELLS = 1 << 21  # (maximum, level) pairs that are held at once


class Components(NamedTuple):
    """Components of level sets, one row each.

    Attributes:
        level: the level [M].
        boxes: first and last column and row, ``x0, y0, x1, y1``, last included [M, 4]. Of a hole: of the pixels
            around it, the box of OpenCV's inner contour.
        first: position of the first pixel in raster order [M].
        pixels: number of pixels [M].
        area: twice the area of the polygon through the centres of the outermost pixels, holes filled [M]
            (``cv2.contourArea`` of the outer contour). Only for foreground; zeros if it was not asked for.
    """

    level: Array
    boxes: Array
    first: Array
    pixels: Array
    area: Array


class _Forest:
    """The maxima of an image and the levels at which they are connected.

    Attributes:
        basin: the maximum that each pixel belongs to [pixels], at levels below its value.
        saddle: level below which a maximum is part of the higher one ``elder`` [maxima]; 0 = never.
        order: the maxima with an elder, from the highest saddle down.
        maximum: which maximum stands for each component [components].
        level: the level of each component [components].
        row: the component that a maximum stands for at a level [maxima, levels], -1 = none.
    """

    def __init__(
        self, values: Array, num_levels: int, neighbours: tuple[tuple[int, int], ...]
    ) -> None:
        self.values = values
        self.num_levels = num_levels
        shift = int(values.size - 1).bit_length()
        keys = (values.astype(np.int64) << shift) + np.arange(values.size).reshape(values.shape)
        highest = keys.copy()
        pairs = [_shifted(values.shape, step) for step in neighbours]
        for here, there in pairs:
            np.maximum(highest[here], keys[there], out=highest[here])
            np.maximum(highest[there], keys[here], out=highest[there])
        parent = (highest & ((1 << shift) - 1)).ravel()
        while True:
            grandparent = parent[parent]
            if np.array_equal(grandparent, parent):
                break
            parent = grandparent
        peaks = np.flatnonzero(parent == np.arange(values.size))
        peaks = peaks[np.argsort(keys.ravel()[peaks])[::-1]]  # the highest is number 0
        number = np.empty(values.size, dtype=np.int64)
        number[peaks] = np.arange(len(peaks))
        basin = number[parent]
        order = self._connect(basin.reshape(values.shape), pairs, len(peaks))
        self._drop_plateaus(basin, values.ravel()[peaks], order)

    def _connect(self, basin: Array, pairs: list, count: int) -> list[int]:
        """Finds ``saddle`` and ``elder``; returns the maxima in the order in which they lose to their elders."""
        codes = []
        for here, there in pairs:
            height = np.minimum(self.values[here], self.values[there])
            a, b = basin[here], basin[there]
            crossing = (a != b) & (height > 0)
            a, b, height = a[crossing], b[crossing], height[crossing]
            pair = np.minimum(a, b) * count + np.maximum(a, b)
            codes.append(pair * (self.num_levels + 1) + (self.num_levels - height))
        edges = np.unique(np.concatenate(codes))
        pair, depth = np.divmod(edges, self.num_levels + 1)
        best = np.flatnonzero(np.diff(pair, prepend=-1))  # the highest pass of each pair of basins
        best = best[np.argsort(depth[best], kind="stable")]
        elder, saddle, link = list(range(count)), [0] * count, list(range(count))
        order = []
        heights = (self.num_levels - depth[best]).tolist()
        first, second = (part.tolist() for part in np.divmod(pair[best], count))
        for height, a, b in zip(heights, first, second, strict=True):
            while link[a] != a:
                link[a] = a = link[link[a]]
            while link[b] != b:
                link[b] = b = link[link[b]]
            if a != b:
                a, b = min(a, b), max(a, b)
                link[b] = elder[b] = a
                saddle[b] = height
                order.append(b)
        self.elder, self.saddle = np.array(elder), np.array(saddle)
        return order

    def _drop_plateaus(self, basin: Array, peak: Array, order: list[int]) -> None:
        """Gives the pixels of maxima that no level separates from their elders to the elders."""
        keep = self.saddle < peak
        target = np.where(keep, np.arange(len(keep)), self.elder)
        while True:
            further = target[target]
            if np.array_equal(further, target):
                break
            target = further
        number = np.maximum(np.cumsum(keep) - 1, 0)
        self.basin = number[target[basin]]
        self.elder = number[self.elder[keep]]
        self.saddle = self.saddle[keep]
        levels = np.arange(self.num_levels)
        alive = (self.saddle[:, None] <= levels) & (levels < peak[keep][:, None])
        self.maximum, self.level = np.nonzero(alive)
        self.row = np.full(alive.shape, -1)
        self.row[self.maximum, self.level] = np.arange(len(self.level))
        self.order = [int(number[child]) for child in order if keep[child]]

    def measure(self, corners: Array) -> Components:
        """The components of all levels; the area counts the ``corners`` (pixels, repeatedly) in them."""
        bins = self.num_levels + 1
        values = self.values.ravel()
        cell = self.basin * bins + values
        raster = np.arange(values.size, dtype=np.int32)
        column = raster % np.int32(self.values.shape[1])
        extents = np.full((4, max(len(self.row), 1) * bins), values.size, dtype=np.int32)
        for extent, position in zip(extents, (raster, -raster, column, -column), strict=True):
            np.minimum.at(extent, cell, position)
        counts = np.stack(
            [np.bincount(where, minlength=extents.shape[1]) for where in (cell, cell[corners])]
        )
        # A pixel of value v is in the sets of the levels 0 .. v - 1: accumulate from the top.
        extents = extents.reshape(4, -1, bins)[:, :, :0:-1]
        extents = np.ascontiguousarray(np.minimum.accumulate(extents, axis=2)[:, :, ::-1])
        counts = counts.reshape(2, -1, bins)[:, :, :0:-1]
        counts = np.ascontiguousarray(counts.cumsum(2)[:, :, ::-1])
        for child in self.order:
            elder, saddle = self.elder[child], self.saddle[child]
            below = extents[:, elder, :saddle]
            np.minimum(below, extents[:, child, :saddle], out=below)
            counts[:, elder, :saddle] += counts[:, child, :saddle]
        first, last, left, right = extents[:, self.maximum, self.level]
        pixels, area = counts[:, self.maximum, self.level]
        width = self.values.shape[1]
        boxes = np.stack([left, first // width, -right, -last // width], axis=1)
        return Components(self.level, boxes, first, pixels, area)

    def rows_at(self, pixels: Array, levels: Array) -> Array:
        """The row in :meth:`measure` of the component that each pixel is in at each level, all [M]."""
        found = self.basin[pixels]
        while True:
            lost = self.saddle[found] > levels
            if not lost.any():
                return self.row[found, levels]
            found = np.where(lost, self.elder[found], found)


def level_sets(
    values: Array, num_levels: int, holes: bool = False, areas: bool = False
) -> tuple[Components, Components]:
    """Components and holes of the sets ``values > level`` for the levels 0 .. num_levels - 1.

    Args:
        values: [H, W], integers from 0 to num_levels.
        num_levels: L, at least 1.
        holes: whether holes are wanted; otherwise there are none.
        areas: whether polygon areas of components are wanted.

    Returns:
        ``(components, holes)``, in no particular order.
    """
    padded = np.pad(values, 1).astype(np.int64)
    forests = [_Forest(padded, num_levels, EIGHT)]
    if holes or areas:
        forests.append(_Forest(num_levels - padded, num_levels, FOUR))
    if num_levels > 1 and max(forest.row.size for forest in forests) > MAX_CELLS:
        half = num_levels // 2
        low = level_sets(np.minimum(values, half), half, holes, areas)
        high = level_sets(np.maximum(values - half, 0), num_levels - half, holes, areas)
        return _joined(low[0], high[0], half), _joined(low[1], high[1], half)
    corners = _window_corners(padded) if areas else np.empty(0, dtype=np.int64)
    components = forests[0].measure(corners)
    gaps = _none(components)
    if len(forests) > 1:
        gaps = forests[1].measure(corners)
        gaps = gaps._replace(level=num_levels - 1 - gaps.level)
        enclosed = gaps.first > 0  # the first pixel is padding: the background around everything
        if areas and enclosed.any():
            area = _filled_areas(forests, components, gaps, enclosed, padded.shape[1])
            components = components._replace(area=area)
        gaps = Components(*(column[enclosed] for column in gaps))
    return (
        components._replace(boxes=components.boxes - 1),
        gaps._replace(boxes=gaps.boxes + np.array([-2, -2, 0, 0])),
    )


def _filled_areas(
    forests: list[_Forest],
    components: Components,
    gaps: Components,
    enclosed: NDArray[np.bool_],
    width: int,
) -> Array:
    """Areas of the components with all that lies inside of them, holes and islands.

    Windows divide the area of what lies inside between them without rest: the area of a filled component is the sum
    over everything nested in it. What a component or hole lies in is above its first pixel.
    """
    foreground, background = forests
    top = foreground.num_levels - 1
    number = len(components.level)
    outermost = number + len(gaps.level)
    parent = np.full(outermost + 1, outermost)
    around = background.rows_at(components.first - width, top - components.level)
    parent[:number] = number + around
    holes = np.flatnonzero(enclosed)
    parent[number + holes] = foreground.rows_at(gaps.first[holes] - width, gaps.level[holes])
    inside = np.concatenate([components.area, np.where(enclosed, gaps.area, 0), [0]])
    total = inside.copy()
    while inside.any():
        inside = np.bincount(parent, inside, outermost + 1).astype(np.int64)
        inside[outermost] = 0
        total += inside
    return total[:number]


def _shifted(
    shape: tuple[int, ...], step: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Places of the pixels that have a neighbour at ``step``, and of these neighbours."""
    down, right = step
    height, width = shape
    here = (slice(0, height - down), slice(max(0, -right), width - max(0, right)))
    there = (slice(down, height), slice(max(0, right), width + min(0, right)))
    return here, there


def _window_corners(values: Array) -> Array:
    """Positions of the third and the fourth highest pixel of every window of 2 x 2.

    A window has half a pixel of area once three of its pixels are in, a whole one with four; a hole half a pixel with
    one of its pixels and a whole one with two: both are counted by these two pixels.
    """
    shift = int(values.size - 1).bit_length()
    keys = (values << shift) + np.arange(values.size).reshape(values.shape)
    a, b, c, d = keys[:-1, :-1], keys[:-1, 1:], keys[1:, :-1], keys[1:, 1:]
    low, high = (np.minimum(a, b), np.minimum(c, d)), (np.maximum(a, b), np.maximum(c, d))
    fourth = np.minimum(*low)
    third = np.minimum(np.maximum(*low), np.minimum(*high))
    return np.concatenate([third.ravel(), fourth.ravel()]) & ((1 << shift) - 1)


def _none(like: Components) -> Components:
    return Components(*(column[:0] for column in like))


def _joined(low: Components, high: Components, levels: int) -> Components:
    high = high._replace(level=high.level + levels)
    return Components(*map(np.concatenate, zip(low, high, strict=True)))
