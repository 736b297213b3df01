"""How the procedural scenes look in each domain: backgrounds, and layers painted over them.

Planes are float32 [N, S, S], pixels float32 [B, 3, S, S] in about [0, 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.shapes_drawing import (
    Floats,
    Ints,
    Plane,
    coverage,
    ellipse,
    smooth_noise,
    turned,
    uniform,
)
from datamodules.shapes_options import SceneOptions

# (factor, offset) of each colour channel.
NIGHT_BACKGROUND = np.array([(0.20, 0.00), (0.24, 0.01), (0.42, 0.05)])
NIGHT_OBJECT = np.array([(0.62, 0.0), (0.66, 0.01), (0.84, 0.05)])
PAPER = np.array([0.96, 0.94, 0.89])
PENCIL = np.array([0.35, 0.35, 0.38])


@dataclass
class Layer:
    """Something to draw in the scenes ``rows`` [n]. Planes are [n, S, S]."""

    rows: Ints
    distance: Plane
    pattern: Plane
    strength: float
    level: float  # the part of the pattern that leaves the colour as it is
    colour: Floats
    bordered: NDArray[np.bool_]


def background(options: SceneOptions, seed: int, index: Ints, domain: str) -> Plane:
    """The scenes without objects and noise, [B, 3, S, S]."""
    size = options.image_size
    if domain == "sketch":
        canvas = np.empty((len(index), 3, size, size), dtype=np.float32)
        canvas[:] = PAPER[:, None, None]
    else:
        first = _main_tone(seed, index)
        second = first + _away_from(first, 0.22)
        canvas = _mixture(
            _in_domain(first, domain),
            _in_domain(second, domain),
            _blend(options, seed, index),
        )
    for blob in range(options.clutter):
        _paint_blob(canvas, options, seed, index, blob, domain)
    if domain == "photo":
        middle = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32) ** 2
        canvas *= np.float32(1.08) - np.float32(0.75) * (middle + middle[:, None])
    return canvas


def background_kinds(options: SceneOptions, seed: int, index: Ints) -> Ints:
    """Which of ``options.backgrounds`` each scene has, [B]."""
    kinds = len(options.backgrounds)
    return (uniform(seed, "background", index)[:, 0] * kinds).astype(np.int64)


def _blend(options: SceneOptions, seed: int, index: Ints) -> Plane:
    """Share of the background's second tone, [B, S, S]."""
    size = options.image_size
    share = np.zeros((len(index), size, size), dtype=np.float32)
    for some, kind in groups(background_kinds(options, seed, index), options.backgrounds):
        if kind == "gradient":
            degrees = (uniform(seed, "gradient", index[some])[:, 0] * 360).astype(np.int64)
            middle = np.full(len(some), size / 2)
            u, _ = turned(middle, middle, degrees, size)
            share[some] = u * np.float32(0.7 / size) + np.float32(0.5)
        if kind == "mottled":
            grid = uniform(seed, "mottled", index[some], 64).reshape(-1, 8, 8)
            share[some] = smooth_noise(grid, size)
    return share


def _main_tone(seed: int, index: Ints) -> Floats:
    """The muted colour of each background, [B, 3]."""
    draws = uniform(seed, "tones", index, 4)
    return 0.42 + 0.33 * draws[:, :1] + 0.14 * (draws[:, 1:] - 0.5)


def _paint_blob(
    canvas: Plane,
    options: SceneOptions,
    seed: int,
    index: Ints,
    blob: int,
    domain: str,
) -> None:
    size = options.image_size
    draws = uniform(seed, f"blob {blob}", index, 8)
    degrees = (draws[:, 2] * 180).astype(np.int64)
    u, v = turned(draws[:, 0] * size, draws[:, 1] * size, degrees, size)
    half = planes((0.05 + 0.11 * draws[:, 3:5].T) * size)
    distance = ellipse(u, v, half[0], half[1])
    contrast = options.clutter_contrast
    if domain == "sketch":
        share = _line(distance, np.float32(_line_width(size))) * np.float32(0.6 * contrast)
        tone = np.broadcast_to(PENCIL, (len(index), 3))
    else:
        share = coverage(distance)
        tone = _main_tone(seed, index) + contrast * 1.1 * (draws[:, 5:] - 0.5)
        tone = _in_domain(tone, domain)
    for c in range(3):
        canvas[:, c] += share * (planes(tone[:, c]) - canvas[:, c])


def _line_width(image_size: int) -> float:
    return max(1.3, image_size / 36)


def paint(canvas: Plane, layer: Layer, domain: str) -> None:
    """Draws a layer over the canvas [B, 3, S, S], in place."""
    width = _line_width(canvas.shape[-1])
    share = coverage(layer.distance)
    everywhere = len(layer.rows) == len(canvas)
    if domain == "sketch":
        line = np.clip(layer.colour * 0.62, 0, 1)
        amount = layer.pattern * np.float32(0.7 * layer.strength)
        drawn = _line(layer.distance, np.float32(width) * planes(1 + 0.8 * layer.bordered))
        amount += drawn * (1 - amount)
        low, high = np.broadcast_to(PAPER, line.shape), line - PAPER
    else:
        amount = layer.pattern * np.float32(-layer.strength)
        amount += np.float32(1 + layer.strength * layer.level)
        if layer.bordered.any():
            edge = _line(layer.distance, np.float32(width))
            edge *= planes(layer.bordered * 0.8)
            amount *= 1 - edge
        if domain == "photo":
            amount *= _light(layer.distance)
        palette = NIGHT_OBJECT if domain == "night" else np.array([(1.0, 0.0)] * 3)
        high = layer.colour * palette[:, 0]
        low = np.broadcast_to(palette[:, 1], high.shape)
    for c in range(3):
        colour = amount * planes(high[:, c])
        colour += planes(low[:, c])
        under = canvas[:, c] if everywhere else canvas[layer.rows, c]
        colour -= under
        colour *= share
        colour += under
        canvas[layer.rows, c] = colour


def _light(distance: Plane) -> Plane:
    """Light from the upper left and shade towards the edge, as a factor."""
    size = distance.shape[-1]
    ramp = (np.arange(size) / size).astype(np.float32)
    depth = np.minimum(distance * np.float32(-8 / size), np.float32(1))
    light = np.maximum(depth, np.float32(0)) * np.float32(0.40) + np.float32(0.68)
    return light - (ramp + ramp[:, None] - 1) * np.float32(0.18)


def planes(values: NDArray) -> Plane:
    """Numbers [...] as float32 [..., 1, 1]."""
    return values.astype(np.float32)[..., None, None]


def groups(numbers: Ints, names: Sequence[str]) -> Iterator[tuple[Ints, str]]:
    """The places at which each name is chosen, if there are any."""
    for number, name in enumerate(names):
        some = np.flatnonzero(numbers == number)
        if some.size:
            yield some, name


def _away_from(tone: Floats, step: float) -> Floats:
    """``step`` towards black for light tones and towards white for dark ones."""
    return np.where(tone.mean(1, keepdims=True) > 0.55, -step, step)


def _in_domain(colour: Floats, domain: str) -> Floats:
    """A background colour as the domain shows it."""
    if domain != "night":
        return colour
    return colour * NIGHT_BACKGROUND[:, 0] + NIGHT_BACKGROUND[:, 1]


def _mixture(first: Floats, second: Floats, share: Plane) -> Plane:
    return share[:, None] * planes(second - first) + planes(first)


def _line(distance: Plane, width: Plane | np.float32) -> Plane:
    """Coverage of a line of some width (one, or [N, 1, 1]) along the inner side of the edge."""
    half = width * np.float32(0.5)
    return coverage(np.abs(distance + half) - half)
