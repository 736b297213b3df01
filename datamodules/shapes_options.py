"""What the procedural scenes may show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from datamodules.shapes_drawing import SHAPES, TEXTURES

COLOURS = {
    "red": (0.88, 0.17, 0.16),
    "green": (0.16, 0.68, 0.24),
    "blue": (0.17, 0.33, 0.90),
    "yellow": (0.96, 0.85, 0.16),
    "magenta": (0.86, 0.22, 0.78),
    "cyan": (0.18, 0.80, 0.86),
}
# Shares of the image that the box of a lone object takes.
SIZES = {"small": (0.15, 0.24), "medium": (0.26, 0.38), "large": (0.42, 0.60)}
BORDERS = ("borderless", "bordered")
BACKGROUNDS = ("flat", "gradient", "mottled")
DOMAINS = ("day", "night", "photo", "sketch")
MODES = ("objects", "parts")
PARTS = ("head", "body")
FACTORS = {
    "objects": ("shape", "colour", "texture", "size", "border"),
    "parts": ("shape", "colour", "size"),
}

SMALLEST_OBJECT = 6
SMALLEST_HEAD = 4


def check_name(option: str, value: str, known: Sequence[str]) -> None:
    """Refuses a name that is not known, with a guess at what was meant.

    Raises:
        ValueError: names the option and what it may be.
    """
    if value not in known:
        near = get_close_matches(value, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{option}: unknown {value!r}; expected one of {', '.join(known)}{hint}")


@dataclass(frozen=True)
class SceneOptions:
    """What scenes may show. Every factor is drawn uniformly and independently for each object.

    In mode ``parts`` a scene is one creature: a small head, whose ``shape`` and ``colour`` are the
    factors, at the left or right end of a large body. The body has the same muted colours for all
    classes; only the direction of its stripes tells the class.

    Args:
        image_size: side of the images in pixels. Other than for the noise, a scene is the same at
            any size.
        mode: ``objects`` or ``parts``.
        domain: ``day``, ``night``, ``photo`` (light, shade and a vignette) or ``sketch`` (coloured
            lines on paper).
        label: the factor that is the class: ``shape``, ``colour``, ``texture``, ``size`` or
            ``border``; in mode ``parts`` ``shape``, ``colour`` or ``size``.
        min_objects: fewest objects in a scene.
        max_objects: most objects in a scene; the more, the smaller they all are.
        shapes: of the object (or head), out of ``SHAPES``.
        colours: of the object (or head), out of ``COLOURS``.
        textures: of the object, out of ``TEXTURES``.
        sizes: out of ``SIZES``; the box of a lone object takes 15-24 %, 26-38 % or 42-60 % of the
            image.
        borders: ``borderless`` or ``bordered`` (a dark line along the edge).
        backgrounds: out of ``BACKGROUNDS``.
        rotation: objects are turned by at most so many degrees, 0 to 180.
        clutter: number of ellipses in the background, which belong to no class.
        clutter_contrast: how much their colours differ from the background's, in [0, 1].
        noise: standard deviation of the noise of each pixel, of white = 1.
        body_contrast: of the stripes of a body, in [0, 1].
        body_noise: standard deviation of more noise on bodies, which hides weak stripes.
        head_size: width of the head as a fraction of the height of the body, in (0, 0.6].

    Raises:
        ValueError: a value that is unknown or out of range, or objects smaller than 6 pixels
            (heads: 4).
    """

    image_size: int = 64
    mode: str = "objects"
    domain: str = "day"
    label: str = "shape"
    min_objects: int = 1
    max_objects: int = 1
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = TEXTURES
    sizes: tuple[str, ...] = tuple(SIZES)
    borders: tuple[str, ...] = ("borderless",)
    backgrounds: tuple[str, ...] = BACKGROUNDS
    rotation: int = 20
    clutter: int = 3
    clutter_contrast: float = 0.3
    noise: float = 0.02
    body_contrast: float = 0.2
    body_noise: float = 0.06
    head_size: float = 0.45

    def __post_init__(self) -> None:
        check_name("mode", self.mode, MODES)
        check_name("domain", self.domain, DOMAINS)
        check_name("label", self.label, FACTORS[self.mode])
        for name, known in (
            ("shapes", SHAPES),
            ("colours", tuple(COLOURS)),
            ("textures", TEXTURES),
            ("sizes", tuple(SIZES)),
            ("borders", BORDERS),
            ("backgrounds", BACKGROUNDS),
        ):
            values = getattr(self, name)
            if isinstance(values, str):
                raise ValueError(f"{name}={values!r} must be a list of names, e.g. [{values}]")
            for value in values:
                check_name(name, value, known)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must be at least one name, each once")
            object.__setattr__(self, name, tuple(values))
        if self.min_objects < 1:
            raise ValueError(f"min_objects={self.min_objects} must be at least 1")
        if self.max_objects < self.min_objects:
            raise ValueError(
                f"max_objects={self.max_objects} must be at least min_objects={self.min_objects}"
            )
        if self.mode == "parts" and self.max_objects > 1:
            raise ValueError(
                f"max_objects={self.max_objects}: a scene of mode 'parts' has one object; set "
                "max_objects to 1 or mode to 'objects'"
            )
        for name, low, high in (
            ("rotation", 0, 180),
            ("clutter", 0, 100),
            ("clutter_contrast", 0, 1),
            ("noise", 0, 1),
            ("body_contrast", 0, 1),
            ("body_noise", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={value} must be in [{low}, {high}]")
        if not 0 < self.head_size <= 0.6:
            raise ValueError(f"head_size={self.head_size} must be in (0, 0.6]")
        side = self.smallest_side
        if self.image_size * side < SMALLEST_OBJECT:
            raise ValueError(
                f"image_size={self.image_size} leaves objects of {self.image_size * side:.1f} "
                f"pixels; with max_objects={self.max_objects} and sizes={list(self.sizes)} it must "
                f"be at least {int(np.ceil(SMALLEST_OBJECT / side))}"
            )
        head = side / np.sqrt(1.9) * self.head_size
        if self.mode == "parts" and self.image_size * head < SMALLEST_HEAD:
            raise ValueError(
                f"image_size={self.image_size} leaves heads of {self.image_size * head:.1f} pixels; "
                f"with head_size={self.head_size} and sizes={list(self.sizes)} it must be at least "
                f"{int(np.ceil(SMALLEST_HEAD / head))}"
            )

    @property
    def crowding(self) -> float:
        """Factor on the area of each object."""
        return float(self.max_objects**-0.75)

    @property
    def smallest_side(self) -> float:
        """Side of a square as large as the smallest object's box, as a fraction of the image's."""
        return float(np.sqrt(min(SIZES[size][0] for size in self.sizes) * self.crowding))

    def plain(self) -> dict[str, Any]:
        """The options in plain values, for results and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def values(self, factor: str) -> tuple[str, ...]:
        """The values that a factor may take, in the order of their numbers."""
        return {
            "shape": self.shapes,
            "colour": self.colours,
            "texture": self.textures,
            "size": self.sizes,
            "border": self.borders,
        }[factor]


def scenes_and_side(
    drawn: bool, shapes: SceneOptions | dict[str, Any], image_size: int | None, of_files: int
) -> tuple[SceneOptions, int]:
    """The options of the scenes, and the side of the images of a data set that is drawn or made of files.

    Args:
        drawn: whether the data are scenes.
        shapes: as given, a dict where they come out of a checkpoint.
        image_size: as given for pictures of files; scenes have a size of their own.
        of_files: side of pictures of files where none is given.

    Raises:
        ValueError: a size is given for scenes.
    """
    options = SceneOptions(**shapes) if isinstance(shapes, dict) else shapes
    if drawn and image_size not in (None, options.image_size):
        raise ValueError(
            f"image_size={image_size} is the size of pictures in files; for scenes use "
            f"--data.shapes.image_size {image_size}"
        )
    return options, options.image_size if drawn else of_files if image_size is None else image_size
