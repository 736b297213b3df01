"""From activations and label maps to boolean masks of one size."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.nn.maps import upsample_map

Upsampling = Literal["bilinear", "receptive_field"]
Record = Mapping[str, Sequence[Any]]
"""Of one image: per category its channels, each a map of labels [H, W] or the label of the whole image."""

CHANNEL_MEANS = (124.6901, 118.6897, 109.5388)
"""Of red, green and blue in [0, 255] (released code)."""
CHANNEL_STD = 255 * 0.224
"""One number for all channels (released code), not ImageNet's three."""


def netdissect_normalize(image: Tensor) -> Tensor:
    """Images as the released code feeds its networks.

    Args:
        image: [..., H, W, 3], RGB in [0, 255], any type.

    Returns:
        Float [..., 3, H, W].

    Raises:
        ValueError: not three channels at the end.
    """
    if image.shape[-1] != 3:
        raise ValueError(f"an image of shape {tuple(image.shape)} must end in [H, W, 3]")
    means = torch.tensor(CHANNEL_MEANS, device=image.device)
    return ((image.float() - means) / CHANNEL_STD).movedim(-1, -3)


def upsample_activations(
    activations: Tensor,
    size: tuple[int, int],
    mode: Upsampling = "bilinear",
    image_size: tuple[int, int] | None = None,
    scale: float | None = None,
    offset: float | None = None,
) -> Tensor:
    """Activations at the size of the concept masks.

    Args:
        activations: [..., h, w].
        size: (height, width) of the masks.
        mode: ``bilinear`` with half-pixel centres (both papers), or ``receptive_field``, which puts every activation on
            the centre of its receptive field (as later versions of Network Dissection; form inferred, not verified).
        image_size: (height, width) of the network's input, for ``receptive_field``.
        scale: input pixels between two neighbouring centres, for ``receptive_field`` (AlexNet's conv5: 32).
        offset: input pixel of the first centre (AlexNet's conv5: 31).

    Returns:
        [..., *size], float32 or float64.

    Raises:
        ValueError: another mode, or ``receptive_field`` without its numbers.
    """
    if mode == "bilinear":
        return upsample_map(activations, size, "bilinear")
    if mode != "receptive_field":
        raise ValueError(f"upsampling mode={mode!r} must be 'bilinear' or 'receptive_field'")
    if image_size is None or scale is None or offset is None:
        raise ValueError("mode='receptive_field' needs image_size, scale and offset of the layer")
    activations = activations if activations.dtype == torch.float64 else activations.float()
    planes = activations.reshape(-1, 1, *activations.shape[-2:])
    # Zeros around the map, so that a map of one row or column has a neighbour to interpolate with.
    planes = F.pad(planes, (1, 1, 1, 1))
    axes = [
        _feature_coordinate(out, pixels, scale, offset, inner)
        for out, pixels, inner in zip(size, image_size, activations.shape[-2:], strict=True)
    ]
    ys, xs = torch.meshgrid(*(axis.to(planes) for axis in axes), indexing="ij")
    grid = torch.stack([xs, ys], -1).expand(len(planes), -1, -1, -1)
    sampled = F.grid_sample(planes, grid, align_corners=True, padding_mode="zeros")
    return sampled.reshape(*activations.shape[:-2], *size)


def _feature_coordinate(out: int, pixels: int, scale: float, offset: float, inner: int) -> Tensor:
    """Of every mask pixel, its place in a padded axis of ``inner + 2`` activations, in [-1, 1] from end to end."""
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) * pixels / out - 0.5
    return ((centre - offset) / scale + 1) * 2 / (inner + 1) - 1


def unit_masks(
    activations: Tensor,
    thresholds: Tensor,
    size: tuple[int, int],
    mode: Upsampling = "bilinear",
    **receptive_field: Any,
) -> Tensor:
    """Where the units fire: upsampled first, then strictly above the threshold.

    Args:
        activations: [N, U, h, w].
        thresholds: [U].
        size: (height, width) of the concept masks.
        mode: see :func:`upsample_activations`, as the further arguments.

    Returns:
        Bool [U, N, *size].

    Raises:
        ValueError: not one threshold per unit.
    """
    if activations.ndim != 4 or thresholds.shape != activations.shape[1:2]:
        raise ValueError(
            f"activations of shape {tuple(activations.shape)} must be [N, U, h, w] with U thresholds, "
            f"not {tuple(thresholds.shape)}"
        )
    upsampled = upsample_activations(activations, size, mode, **receptive_field)
    return (upsampled > thresholds[:, None, None]).transpose(0, 1)


def label_layers(records: Sequence[Record], size: tuple[int, int]) -> Tensor:
    """All labels of every position, one layer per channel; 0 is none.

    Args:
        records: one per image, see :data:`Record`. Label 0 means unlabelled, also as the label of an image.
        size: (height, width), that of all maps.

    Returns:
        Long [N, K, *size] with the channels of all categories; an image with fewer has layers of zeros.

    Raises:
        ValueError: a map of another size.
    """
    stacks = []
    for position, record in enumerate(records):
        layers = []
        for category, channels in record.items():
            for channel in channels:
                layer = torch.as_tensor(channel).long()
                if layer.ndim and tuple(layer.shape) != tuple(size):
                    raise ValueError(
                        f"the {category} map of image {position} has size {tuple(layer.shape)}, the masks have "
                        f"{tuple(size)}: resize it (nearest) or choose the size of the masks"
                    )
                layers.append(layer.expand(size))
        stacks.append(torch.stack(layers) if layers else torch.zeros(0, *size, dtype=torch.long))
    most = max((len(stack) for stack in stacks), default=0)
    padded = [F.pad(stack, (0, 0, 0, 0, 0, most - len(stack))) for stack in stacks]
    return torch.stack(padded) if padded else torch.zeros(0, 0, *size, dtype=torch.long)


def rasterize_concepts(
    records: Sequence[Record], size: tuple[int, int]
) -> tuple[list[int], Tensor]:
    """The mask of every concept: the union over channels and categories; an image's label fills the image.

    NetDissect-Lite counts a label twice where two channels carry it; the union does not.

    Args:
        records: see :func:`label_layers`.
        size: (height, width).

    Returns:
        The labels that occur, ascending, and their masks, bool [C, N, *size].

    Raises:
        ValueError: a map of another size.
    """
    layers = label_layers(records, size)
    labels = [label for label in layers.unique().tolist() if label]
    masks = torch.zeros(len(labels), len(layers), *size, dtype=torch.bool)
    for row, label in enumerate(labels):
        masks[row] = (layers == label).any(1)
    return labels, masks
