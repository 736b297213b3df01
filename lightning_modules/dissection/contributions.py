"""Which units feed which classes, and edits of the input that turn one class into another."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Label = str | int


def contributing_units(
    weight: Tensor, alpha: float = 0.01, scope: Literal["global", "unit"] = "global"
) -> tuple[Tensor, Tensor]:
    """Units with an outstanding weight for a class (released code).

    Args:
        weight: of the last layer, [K, U]; a convolution's [K, U, h, w] is averaged over its kernel.
        alpha: share of the weights, in (0, 0.5).
        scope: compare with the quantile of the whole matrix, or with that of the class's own row (``unit``).

    Returns:
        Contributors (``> quantile(1 - alpha)``) and inhibitors (``< quantile(alpha)``), each bool [K, U].

    Raises:
        ValueError: another scope, shape or share.
    """
    if weight.ndim == 4:
        weight = weight.mean((2, 3))
    if weight.ndim != 2:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} must be [K, U] or [K, U, h, w]")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha} must be in (0, 0.5)")
    if scope not in ("global", "unit"):
        raise ValueError(f"scope={scope!r} must be 'global' or 'unit'")
    rows = weight.double() if scope == "unit" else weight.double().reshape(1, -1)
    # By sorting: torch.quantile refuses more than 2 ** 24 weights.
    ordered = rows.sort(dim=1).values
    high, low = (_quantile(ordered, level) for level in (1 - alpha, alpha))
    return weight.double() > high, weight.double() < low


def _quantile(ordered: Tensor, level: float) -> Tensor:
    place = level * (ordered.shape[1] - 1)
    lower = int(place)
    upper = min(lower + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, lower], ordered[:, upper], place - lower)[:, None]


def _same_positions(previous: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Both layers [U, samples]: a larger map is averaged to the size of the other; vectors have one position.

    Raises:
        ValueError: different numbers of images.
    """
    if len(previous) != len(current):
        raise ValueError(f"{len(previous)} and {len(current)} images must be the same images")
    before, after = (x if x.ndim == 4 else x[:, :, None, None] for x in (previous, current))
    if before.shape[2:] != after.shape[2:]:
        height, width = after.shape[2:]
        before = F.adaptive_avg_pool2d(before, (height, width))
    return before.transpose(0, 1).flatten(1), after.transpose(0, 1).flatten(1)


def feature_correlation(previous: Tensor, current: Tensor) -> Tensor:
    """Pearson correlation of the units of two layers over all positions of all images (released code).

    Args:
        previous: [N, V] or [N, V, h, w].
        current: [N, U] or [N, U, h', w'], not larger; logits are such a layer.

    Returns:
        float64 [U, V], 0 for a unit that is the same everywhere.

    Raises:
        ValueError: different numbers of images.
    """
    unit_rows = []
    for rows in _same_positions(previous, current):
        centred = rows.double() - rows.double().mean(1, keepdim=True)
        norm = centred.norm(dim=1, keepdim=True)
        unit_rows.append(centred / norm.where(norm > 0, 1))
    return unit_rows[1] @ unit_rows[0].T


def activation_iou(
    previous: Tensor, current: Tensor, previous_thresholds: Tensor, current_thresholds: Tensor
) -> Tensor:
    """Jaccard index of where the units of two layers fire; the larger map is averaged to the smaller size first.

    Args:
        previous: [N, V] or [N, V, h, w].
        current: [N, U] or [N, U, h', w'], not larger.
        previous_thresholds: [V].
        current_thresholds: [U].

    Returns:
        float64 [U, V], 0 for two units that never fire.

    Raises:
        ValueError: different numbers of images.
    """
    before, after = _same_positions(previous, current)
    before = (before > previous_thresholds[:, None]).double()
    after = (after > current_thresholds[:, None]).double()
    both = after @ before.T
    union = after.sum(1)[:, None] + before.sum(1) - both
    return both / union.clamp_min(1)


def unit_margins(weight: Tensor, source: int, target: int) -> Tensor:
    """``W[target] - W[source]`` [U]: what one more of a unit adds to the margin of the target class."""
    classes = len(weight)
    for name, value in (("source", source), ("target", target)):
        if not 0 <= value < classes:
            raise ValueError(f"{name}={value} is none of the {classes} classes")
    return weight[target] - weight[source]


def copy_paste_units(weight: Tensor, source: int, target: int, k: int) -> list[int]:
    """The ``k`` units whose concepts, pasted into an image of the source class, speak most for the target class.

    Args:
        weight: of the last layer, [K, U].
        source: class of the image.
        target: class to reach.
        k: number of units.

    Returns:
        Units by descending ``W[target] - W[source]``.

    Raises:
        ValueError: no such class.
    """
    order = unit_margins(weight, source, target).sort(descending=True, stable=True).indices
    return order[:k].tolist()


def logit_margin_change(
    weight: Tensor, before: Tensor, after: Tensor, source: int, target: int
) -> Tensor:
    """What every unit adds to the margin of the target class over the source class by an edit.

    The sum over units is the exact change for a linear head on pooled features.

    Args:
        weight: of the last layer, [K, U].
        before: pooled features of the image [..., U].
        after: of the edited image.
        source: class.
        target: class.

    Returns:
        [..., U].

    Raises:
        ValueError: no such class.
    """
    return unit_margins(weight, source, target) * (after - before)


def copy_paste_outcomes(
    predictions: Sequence[Label], source: Label, target: Label, patch: Label | None
) -> dict[str, float]:
    """What became of edited images.

    Args:
        predictions: class of every edited image.
        source: class before the edit.
        target: class the edit is to reach.
        patch: class of what was pasted, None if it is none.

    Returns:
        Shares of ``success`` (the target), ``failure`` (still the source, or the patch) and ``partial_success``.

    Raises:
        ValueError: no prediction.
    """
    if not len(predictions):
        raise ValueError("there are no predictions to judge")
    n = len(predictions)
    success = sum(label == target for label in predictions)
    unchanged = (source,) if patch is None else (source, patch)
    failure = sum(label in unchanged and label != target for label in predictions)
    return {
        "success": success / n,
        "failure": failure / n,
        "partial_success": (n - success - failure) / n,
    }


REFERENCE_SIZES = tuple(int(224 * share) for share in (0.33, 0.5, 0.75, 1, 1.5, 2))
REFERENCE_POSITIONS = (-150, -100, -50, 0, 50, 100)


def paste_grid(
    image: Tensor,
    patch: Tensor,
    positions: Sequence[int] = REFERENCE_POSITIONS,
    sizes: Sequence[int] = REFERENCE_SIZES,
) -> Tensor:
    """An image with a patch pasted at every place and in every size: does the edit depend on them (released code)?

    Args:
        image: [3, H, W] in [0, 1].
        patch: [4, h, w] in [0, 1], the last channel its opacity.
        positions: of the left and of the upper edge, may be negative.
        sizes: sides of the resized patch.

    Returns:
        [len(sizes) * len(positions) ** 2, 3, H, W]: by size, then x, then y.

    Raises:
        ValueError: shapes that are not those.
    """
    if image.ndim != 3 or len(image) != 3 or patch.ndim != 3 or len(patch) != 4:
        raise ValueError(
            f"paste_grid needs an image [3, H, W] and a patch [4, h, w], not {tuple(image.shape)} and "
            f"{tuple(patch.shape)}"
        )
    pasted = []
    for size in sizes:
        resized = F.interpolate(patch[None], (size, size), mode="bilinear", antialias=True)[0]
        for x in positions:
            for y in positions:
                pasted.append(paste(image, resized, x, y))
    return torch.stack(pasted)


def paste(image: Tensor, patch: Tensor, x: int, y: int) -> Tensor:
    """An image [3, H, W] with a patch [4, h, w] whose upper left corner is at (x, y); what hangs over is cut."""
    height, width = image.shape[1:]
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + patch.shape[1], height), min(x + patch.shape[2], width)
    edited = image.clone()
    if top < bottom and left < right:
        part = patch[:, top - y : bottom - y, left - x : right - x]
        opacity = part[3:]
        region = edited[:, top:bottom, left:right]
        edited[:, top:bottom, left:right] = region * (1 - opacity) + part[:3] * opacity
    return edited
