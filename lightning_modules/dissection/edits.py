"""Copy-paste edits: a patch that shows what a unit looks for, pasted into an image, turns one class into another.

Which units are tried, and what is pasted, follows from the last layer's weights and the explanations; whether the
prediction changes is then looked at (Mu & Andreas, NeurIPS 2020, section on copy-paste examples).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.dissection.contributions import copy_paste_outcomes, paste, unit_margins
from lightning_modules.dissection.formulas import Formula

LARGEST_SHARE = 0.5
"""Of an image, that a patch may cover: the background is no object to paste."""
SMALLEST_SHARE = 0.01
PLACES = 3
DONORS = 16


@dataclass(frozen=True)
class Edit:
    """One experiment: what a unit's formula names, pasted into images of the source class.

    Attributes:
        unit: that speaks for the target and against the source.
        source: class of the images, which the network recognised.
        target: class to reach.
        donor: place of the image the patch is from.
        donor_class: its class; -1 unknown.
        images: places of the edited images.
        pasted: edited images, over all images and places.
        outcomes: shares of them, see :func:`~lightning_modules.dissection.contributions.copy_paste_outcomes`.
        before: the image of the best edit, [3, H, W] in [0, 1].
        after: the same, edited.
        probability: of the target, before and after the best edit.
        predicted: classes before and after the best edit.
    """

    unit: int
    source: int
    target: int
    donor: int
    donor_class: int
    images: list[int]
    pasted: int
    outcomes: dict[str, float]
    before: Tensor
    after: Tensor
    probability: tuple[float, float]
    predicted: tuple[int, int]


def cut_patch(image: Tensor, mask: Tensor) -> Tensor | None:
    """What lies under a mask, as a patch with opacity.

    Args:
        image: [3, H, W] in [0, 1].
        mask: bool [h, w], resized to the image.

    Returns:
        [4, h', w'], the smallest that holds the mask; None if the mask covers less than a hundredth or more than half
        of the image.
    """
    opacity = F.interpolate(mask[None, None].float(), image.shape[1:])[0, 0]
    share = float(opacity.mean())
    if not SMALLEST_SHARE <= share <= LARGEST_SHARE:
        return None
    rows, columns = opacity.any(1).nonzero()[:, 0], opacity.any(0).nonzero()[:, 0]
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return torch.cat([image, opacity[None]])[:, box[0], box[1]]


def paste_everywhere(image: Tensor, patch: Tensor, places: int = PLACES) -> Tensor:
    """An image with a patch at ``places ** 2`` places from edge to edge, [places ** 2, 3, H, W]."""
    free = [
        max(whole - part, 0) for whole, part in zip(image.shape[1:], patch.shape[1:], strict=True)
    ]
    starts = [[round(i * room / (places - 1)) for i in range(places)] for room in free]
    return torch.stack([paste(image, patch, x, y) for y in starts[0] for x in starts[1]])


def try_edits(
    classify: Callable[[Tensor], Tensor],
    sample: Callable[[int], tuple[Tensor, Tensor]],
    weight: Tensor,
    formulas: dict[int, Formula],
    labels: Tensor,
    predicted: Tensor,
    maxima: Tensor,
    firing: Tensor,
    count: int,
    images_each: int = 8,
) -> list[Edit]:
    """Looks for classes that a pasted patch turns into others.

    Pairs of classes are taken by descending ``W[target, u] - W[source, u]`` times the spread of the unit's maxima, each
    target at most once as long as there are others. The patch is where the unit's formula is true in one of the images
    on which the unit fires most strongly: first in one of a third class, which shows more, then in one of the target.

    Args:
        classify: images [B, 3, H, W] in [0, 1] to logits [B, K].
        sample: place of an image to the image and its layers of concepts [k, h, w].
        weight: what units say about classes, [K, U].
        formulas: explanation of each unit that has one.
        labels: of the images [N], -1 unknown.
        predicted: classes of the images [N].
        maxima: largest activation of every unit on every image, [N, U].
        firing: bool [N, U].
        count: edits to try.
        images_each: images that each patch is pasted into.

    Returns:
        At most ``count`` experiments, in the order in which they were tried.
    """
    edits: list[Edit] = []
    for source, target, unit in _promising(weight, formulas, labels, predicted, maxima):
        if len(edits) >= count or any((e.source, e.target) == (source, target) for e in edits):
            continue
        fires = firing[:, unit] & (labels != source)
        for donors in (fires & (labels != target), fires & (labels == target)):
            places = donors.nonzero()[:, 0]
            places = places[maxima[places, unit].argsort(descending=True, stable=True)][:DONORS]
            for donor in places.tolist():
                image, layers = sample(donor)
                patch = cut_patch(image, _where(formulas[unit], layers))
                if patch is not None and len(edits) < count:
                    chosen = (labels == source) & (predicted == source)
                    images = chosen.nonzero()[:images_each, 0].tolist()
                    given = [sample(place)[0] for place in images]
                    found = paste_into(classify, given, patch, source, target, int(labels[donor]))
                    edits.append(
                        Edit(unit, source, target, donor, int(labels[donor]), images, *found)
                    )
                    break
    return edits


def _where(formula: Formula, layers: Tensor) -> Tensor:
    return formula.evaluate({label: (layers == label).any(0) for label in formula.leaves()})


def _promising(
    weight: Tensor,
    formulas: dict[int, Formula],
    labels: Tensor,
    predicted: Tensor,
    maxima: Tensor,
) -> list[tuple[int, int, int]]:
    """Source, target and unit, best first; first one for each target, then the others."""
    classes = [k for k in range(len(weight)) if bool(((labels == k) & (predicted == k)).any())]
    spread = maxima.double().std(0)
    gains = []
    for source in classes:
        for target in classes:
            if source != target:
                gain = (unit_margins(weight.double(), source, target) * spread).tolist()
                gains += [
                    (-gain[unit], source, target, unit) for unit in formulas if gain[unit] > 0
                ]
    first: dict[int, tuple[int, int, int]] = {}
    others = []
    for _, source, target, unit in sorted(gains):
        if target in first:
            others.append((source, target, unit))
        else:
            first[target] = (source, target, unit)
    return [*first.values(), *others]


def paste_into(
    classify: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    patch: Tensor,
    source: int,
    target: int,
    patch_class: int,
) -> tuple[int, dict[str, float], Tensor, Tensor, tuple[float, float], tuple[int, int]]:
    """Pastes a patch into images at every place, and looks what the network says.

    Args:
        classify: images [B, 3, H, W] in [0, 1] to logits [B, K].
        images: of the source class, each [3, H, W].
        patch: [4, h, w], see :func:`cut_patch`.
        source: class of the images.
        target: class to reach.
        patch_class: class of the image that the patch is from, -1 unknown.

    Returns:
        The fields of :class:`Edit` from ``pasted`` on.
    """
    pasted = torch.cat([paste_everywhere(image, patch) for image in images])
    share = torch.softmax(classify(pasted).double(), 1)
    found = share.argmax(1)
    outcomes = copy_paste_outcomes(
        found.tolist(), source, target, None if patch_class < 0 else patch_class
    )
    # The most convincing one: the target reached, with the highest probability.
    best = int(((found == target).double() + share[:, target]).argmax())
    original = images[best // PLACES**2]
    before = torch.softmax(classify(original[None]).double(), 1)[0]
    probability = float(before[target]), float(share[best, target])
    predicted = int(before.argmax()), int(found[best])
    return len(found), outcomes, original, pasted[best], probability, predicted
