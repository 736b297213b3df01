"""Rows of pictures that show what the procedural scenes can do."""

from dataclasses import replace

import torch
from torch import Tensor

from datamodules.datasets import unit_interval
from datamodules.shapes import Scenes
from datamodules.shapes_drawing import SHAPES, TEXTURES
from datamodules.shapes_options import BORDERS, COLOURS, SceneOptions

BOX_COLOUR = torch.tensor([1.0, 1.0, 1.0])
SHADES = torch.tensor(
    [(0.95, 0.35, 0.30), (0.30, 0.60, 0.95), (0.98, 0.80, 0.25), (0.40, 0.80, 0.45)]
)


def scene_sheet(image_size: int = 96, columns: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Row title -> images [columns, 3, S, S] in [0, 1].

    Args:
        image_size: side of the images.
        columns: images of a row.
        seed: of the scenes.
    """
    one = SceneOptions(image_size=image_size, borders=BORDERS, noise=0.0)
    many = replace(one, min_objects=3, max_objects=4, clutter=6)
    creature = replace(one, mode="parts", label="colour", shapes=("circle", "square", "star"))
    index = list(range(columns))

    singles = Scenes(replace(one, borders=("borderless",)), seed, columns)
    choice = Scenes(one, seed, columns)
    litter = Scenes(replace(one, clutter=12, clutter_contrast=0.8, noise=0.05), seed, columns)
    crowd = Scenes(many, seed, columns)
    rows = {
        "one object (day)": singles.render(index),
        "the same at night": singles.render(index, "night"),
        "... as a photo": singles.render(index, "photo"),
        "... as a sketch": singles.render(index, "sketch"),
        "shape changed": singles.render(index, change={"shape": _cycle(SHAPES, columns)}),
        "colour changed": singles.render(index, change={"colour": _cycle(list(COLOURS), columns)}),
        "texture changed": singles.render(index, change={"texture": _cycle(TEXTURES, columns)}),
        "size changed": singles.render(index, change={"size": _cycle(one.sizes[::-1], columns)}),
        "border added": choice.render(index, change={"border": "bordered"}),
        "more clutter and noise": litter.render(index),
        "background alone": singles.render(index, objects=False),
        "several objects": crowd.render(index),
        "several at night": crowd.render(index, "night"),
        "... as photos": crowd.render(index, "photo"),
        "... as sketches": crowd.render(index, "sketch"),
    }
    sheet = {title: unit_interval(images, torch.float32) for title, images in rows.items()}
    truth = crowd.truth(index)
    sheet["masks and boxes"] = _annotated(
        sheet["several objects"], truth["object_masks"], truth["boxes"]
    )
    for name in ("stripes", "red"):
        channel = crowd.concept_names.index(name)
        concept = truth["concept_masks"][:, channel : channel + 1]
        sheet[f"concept: {name}"] = sheet["several objects"] * (0.25 + 0.75 * concept)
    for contrast in (0.1, 0.3, 1.0):
        scenes = Scenes(replace(creature, body_contrast=contrast), seed, columns)
        sheet[f"head and body, contrast {contrast:g}"] = unit_interval(
            scenes.render(index), torch.float32
        )
    truth = scenes.truth(index)
    sheet["parts and box"] = _annotated(
        sheet[f"head and body, contrast {contrast:g}"], truth["part_masks"], truth["boxes"]
    )
    return sheet


def _cycle(names: list[str] | tuple[str, ...], count: int) -> list[str]:
    return [names[i % len(names)] for i in range(count)]


def _annotated(images: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
    """Images [B, 3, S, S] with tinted masks [B, M, S, S] and the outlines of boxes [B, K, 4]."""
    shown = images * 0.35
    for number in range(masks.shape[1]):
        tint = SHADES[number % len(SHADES)][:, None, None]
        shown = torch.where(masks[:, number, None], 0.25 * images + 0.75 * tint, shown)
    for picture, corners in zip(shown, boxes.tolist(), strict=True):
        for left, top, right, bottom in corners:
            if left >= 0:
                frame = picture[:, top : bottom + 1, left : right + 1]
                frame[:, [0, -1], :] = BOX_COLOUR[:, None, None]
                frame[:, :, [0, -1]] = BOX_COLOUR[:, None, None]
    return shown
