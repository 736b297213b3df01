"""Outlines, textures and random numbers of the procedural scenes, vectorised over objects.

Planes are float32 [N, S, S], coordinates and lengths are in pixels. On pixels only operations that
IEEE 754 rounds exactly are used (no sine, no matrix product), so that a scene does not depend on
the batch in which it is drawn.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_modules.randomness import mix

Plane = NDArray[np.float32]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEGREES = np.arange(360)
COS, SIN = np.cos(np.deg2rad(DEGREES)), np.sin(np.deg2rad(DEGREES))

CROSS_WIDTH = 0.36
RING_MIDDLE, RING_WIDTH = 0.76, 0.24
STAR_CORE = float(COS[72])

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
TEXTURES = ("plain", "stripes", "dots", "checker")


def _corners(shape: str) -> Floats:
    """Corners [n, 2] of the unit shape, y downwards."""
    around = {
        "square": [(1, 1), (1, -1), (-1, 1), (-1, -1)],
        "triangle": [(SIN[a], -COS[a]) for a in (0, 120, 240)],
        "cross": [
            (a * x, b * y)
            for x, y in ((1, CROSS_WIDTH), (CROSS_WIDTH, 1))
            for a in (1, -1)
            for b in (1, -1)
        ],
        "star": [(SIN[a], -COS[a]) for a in range(0, 360, 72)],
    }
    return np.array(around[shape], dtype=np.float64)


def _extent(shape: str) -> Floats:
    if shape in ("circle", "ring"):
        return np.tile(np.array([-1.0, 1.0, -1.0, 1.0]), (360, 1))
    x, y = _corners(shape).T[:, :, None]
    turned_x, turned_y = x * COS - y * SIN, x * SIN + y * COS
    return np.stack([turned_x.min(0), turned_x.max(0), turned_y.min(0), turned_y.max(0)], 1)


# [shape, degrees, (left, right, top, bottom)] of the unit shape.
EXTENTS: Floats = np.stack([_extent(shape) for shape in SHAPES])


def uniform(seed: int, key: str, index: Ints, columns: int = 1) -> Floats:
    """Uniform numbers in [0, 1), [B, columns]: a hash of (seed, key, index, column)."""
    step = np.uint64(0x9E3779B97F4A7C15)
    rows = _scramble(index.astype(np.uint64) * step + np.uint64(mix("shapes", seed, key)))
    cells = _scramble(rows[:, None] + np.arange(1, columns + 1, dtype=np.uint64) * step)
    return (cells >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scramble(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def noise(seed: int, index: Ints, size: int) -> Plane:
    """Nearly normal noise with mean 0 and standard deviation 1, [B, S, S], independent pixels."""
    start = (uniform(seed, "noise", index) * 2**32).astype(np.uint32)
    # 32 bits: numpy vectorises their products. The constants are those of MurmurHash3's last step.
    z = start ^ (np.arange(1, size * size + 1, dtype=np.uint32) * np.uint32(0x9E3779B9))
    z ^= z >> np.uint32(16)
    z *= np.uint32(0x85EBCA6B)
    z ^= z >> np.uint32(13)
    z *= np.uint32(0xC2B2AE35)
    z ^= z >> np.uint32(16)
    # The bytes of each number are added in pairs, then the pairs.
    pairs = (z & np.uint32(0x00FF00FF)) + ((z >> np.uint32(8)) & np.uint32(0x00FF00FF))
    total = (pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))
    values = total.astype(np.float32).reshape(len(index), size, size)
    values -= np.float32(510)
    values *= np.float32(1 / np.sqrt(4 * (256**2 - 1) / 12))
    return values


def smooth_noise(grid: Floats, size: int) -> Plane:
    """Values [B, G, G] spread over the image by bilinear interpolation, [B, S, S]."""
    place = (np.arange(size) + 0.5) / size * (grid.shape[1] - 1)
    low = place.astype(np.int64)
    high_part = (place - low).astype(np.float32)
    low_part = np.float32(1) - high_part
    values = grid.astype(np.float32)
    rows = values[:, :, low] * low_part + values[:, :, low + 1] * high_part
    return rows[:, low] * low_part[:, None] + rows[:, low + 1] * high_part[:, None]


def turned(x: Floats, y: Floats, degrees: Ints, size: int) -> tuple[Plane, Plane]:
    """Coordinates of all pixels in frames with origin (x, y), turned by ``degrees``; each [N]."""
    middle = np.arange(size) + 0.5
    cos, sin = COS[degrees][:, None], SIN[degrees][:, None]
    dx, dy = middle - x[:, None], middle - y[:, None]
    across = (dx * cos).astype(np.float32)[:, None, :] + (dy * sin).astype(np.float32)[:, :, None]
    down = (dy * cos).astype(np.float32)[:, :, None] - (dx * sin).astype(np.float32)[:, None, :]
    return across, down


def outline(shape: str, u: Plane, v: Plane, radius: Plane) -> Plane:
    """Signed distance to the edge (to its nearest line, at corners): negative inside.

    Args:
        shape: one of ``SHAPES``.
        u: coordinate to the right in the object's frame [N, S, S]; ``v``: downwards.
        radius: size of the unit shape [N, 1, 1].
    """
    if shape == "circle":
        return np.sqrt(u * u + v * v) - radius
    if shape == "ring":
        middle = np.sqrt(u * u + v * v) - np.float32(RING_MIDDLE) * radius
        return np.abs(middle) - np.float32(RING_WIDTH) * radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - radius
    if shape == "triangle":
        side = np.abs(u) * np.float32(SIN[60]) - v * np.float32(0.5)
        return _blunt(np.maximum(side, v) - np.float32(0.5) * radius, u, v, radius)
    if shape == "cross":
        a, b, width = np.abs(u), np.abs(v), np.float32(CROSS_WIDTH) * radius
        return np.minimum(np.maximum(a - radius, b - width), np.maximum(a - width, b - radius))
    # A pentagram is what lies on the inner side of at least four of its five lines.
    largest = -v
    second = np.full_like(u, -np.inf)
    for degrees in (72, 144, 216, 288):
        line = u * np.float32(SIN[degrees]) - v * np.float32(COS[degrees])
        np.maximum(second, np.minimum(largest, line), out=second)
        np.maximum(largest, line, out=largest)
    return _blunt(second - np.float32(STAR_CORE) * radius, u, v, radius)


def _blunt(distance: Plane, u: Plane, v: Plane, radius: Plane) -> Plane:
    """Ends sharp corners at their circle: the lines half a pixel outside meet far beyond it."""
    return np.maximum(distance, np.sqrt(u * u + v * v) - radius)


def capsule(u: Plane, v: Plane, half_width: Plane, half_height: Plane, roundness: float) -> Plane:
    """Signed distance to a rectangle with round corners; ``half_*`` are [N, 1, 1]."""
    corner = np.float32(roundness) * np.minimum(half_width, half_height)
    a, b = np.abs(u) - (half_width - corner), np.abs(v) - (half_height - corner)
    outside_a, outside_b = np.maximum(a, np.float32(0)), np.maximum(b, np.float32(0))
    inside = np.minimum(np.maximum(a, b), np.float32(0))
    return np.sqrt(outside_a * outside_a + outside_b * outside_b) + inside - corner


def ellipse(u: Plane, v: Plane, half_width: Plane, half_height: Plane) -> Plane:
    """About the signed distance to an ellipse; ``half_*`` are [N, 1, 1]."""
    a, b = u * (1 / half_width), v * (1 / half_height)
    return (np.sqrt(a * a + b * b) - 1) * np.minimum(half_width, half_height)


def texture(kind: str, u: Plane, v: Plane, period: float) -> Plane:
    """How much of a pixel is in the dark part of the pattern, in [0, 1] [N, S, S]."""
    if kind == "plain":
        return np.zeros_like(u)
    if kind == "stripes":
        return coverage(_wave(v, period))
    if kind == "checker":
        a, b = _clip(2 * _wave(u, 2 * period), 1), _clip(2 * _wave(v, 2 * period), 1)
        return (a * b + 1) * np.float32(0.5)
    a, b = _from_cell_middle(u, period), _from_cell_middle(v, period)
    return coverage(np.sqrt(a * a + b * b) - np.float32(0.34 * period))


def _from_cell_middle(w: Plane, period: float) -> Plane:
    place = w * np.float32(1 / period)
    place -= np.floor(place)
    place -= np.float32(0.5)
    place *= np.float32(period)
    return place


def _wave(w: Plane, period: float) -> Plane:
    """Signed distance to the nearest of the edges that lie half a period apart."""
    return np.abs(_from_cell_middle(w, period)) - np.float32(period / 4)


def _clip(w: Plane, limit: float) -> Plane:
    return np.minimum(np.maximum(w, np.float32(-limit)), np.float32(limit))


def coverage(distance: Plane) -> Plane:
    """How much of a pixel lies inside: 1/2 on the edge, falling over one pixel."""
    inside = np.float32(0.5) - distance
    np.maximum(inside, np.float32(0), out=inside)
    return np.minimum(inside, np.float32(1), out=inside)
