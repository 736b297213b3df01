"""Agreement of a unit and a formula, and the tally of Network Dissection in its three readings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.dissection.concepts import ConceptMasks

Scope = Literal["all", "category", "active"]
Metric = Literal["iou", "coverage_of_unit", "coverage_of_formula", "precision", "recall"]

VISION_EPS = 1e-10
NLI_EPS = float(torch.finfo(torch.float32).tiny)
"""Added to the union by the two released codes, so that two empty masks have IoU 0."""

DETECTOR_IOU = 0.04
"""A unit above it is a detector of its concept (Network Dissection)."""


def iou_from_counts(
    intersection: Tensor, area: Tensor, unit_area: Tensor | float, eps: float = VISION_EPS
) -> Tensor:
    """``I / (A + N - I + eps)``, in float64.

    Args:
        intersection: positions of formula and unit, any shape.
        area: positions of the formula.
        unit_area: positions of the unit.
        eps: added to the union (1e-10 in the vision code, the smallest float32 in the NLI code).

    Returns:
        Values in [0, 1] of the broadcast shape.
    """
    intersection = intersection.double()
    return intersection / (area + unit_area - intersection + eps)


def formula_score(
    intersection: Tensor,
    area: Tensor,
    unit_area: Tensor | float,
    metric: Metric = "iou",
    eps: float = VISION_EPS,
) -> Tensor:
    """How well a formula describes a unit.

    Args:
        intersection: positions of formula and unit.
        area: positions of the formula.
        unit_area: positions of the unit.
        metric: ``iou``; ``coverage_of_unit`` |M & F| / |M|, which the released NLI code calls ``precision``; or
            ``coverage_of_formula`` |M & F| / |F|, its ``recall``.
        eps: see :func:`iou_from_counts`.

    Returns:
        float64 in [0, 1]; 0 where nothing could be shared.

    Raises:
        ValueError: another metric.
    """
    if metric == "iou":
        return iou_from_counts(intersection, area, unit_area, eps)
    if metric in ("coverage_of_unit", "precision"):
        whole = torch.as_tensor(unit_area, dtype=torch.float64, device=intersection.device)
    elif metric in ("coverage_of_formula", "recall"):
        whole = area.double()
    else:
        raise ValueError(
            f"metric={metric!r} must be iou, coverage_of_unit (precision) or coverage_of_formula (recall)"
        )
    return intersection.double() / whole.clamp_min(1)


class CategoryTally:
    """Per unit and category, the unit's area in the images that count for the category.

    Args:
        n_units: units U.
        n_categories: categories K.
    """

    def __init__(self, n_units: int, n_categories: int) -> None:
        self.category = torch.zeros(n_units, n_categories, dtype=torch.long)
        self.active = torch.zeros(n_units, n_categories, dtype=torch.long)

    def add(self, unit_masks: Tensor, signature_of: Tensor, has_category: Tensor) -> None:
        """Adds a batch; tallies of several processes may simply be summed.

        Args:
            unit_masks: bool [U, N, H, W].
            signature_of: Long [N, H, W].
            has_category: bool [S, K], which categories the concepts of a signature belong to.
        """
        n_units, n_images = unit_masks.shape[:2]
        n_categories = has_category.shape[1]
        area = unit_masks.flatten(2).sum(2)
        labelled = has_category[signature_of].flatten(1, 2).any(1)
        self.category += (area[:, :, None] * labelled).sum(1).cpu()
        units, images, rows, columns = unit_masks.nonzero(as_tuple=True)
        below = has_category[signature_of[images, rows, columns]]
        hit = torch.zeros(n_units, n_images, n_categories, dtype=torch.bool, device=area.device)
        entry, category = below.nonzero(as_tuple=True)
        hit[units[entry], images[entry], category] = True
        self.active += (area[:, :, None] * hit).sum(1).cpu()


def category_members(concepts: ConceptMasks) -> tuple[list[str], Tensor, Tensor]:
    """The categories of the concepts in the order of their first concept.

    Returns:
        Their names [K], the category of every concept, Long [C], and which signature has a concept of which category,
        bool [S, K].

    Raises:
        ValueError: concepts without categories.
    """
    if concepts.categories is None:
        raise ValueError("the concepts have no categories: build them with `categories`")
    categories = list(dict.fromkeys(concepts.categories))
    device = concepts.areas.device
    of = torch.tensor([categories.index(name) for name in concepts.categories], device=device)
    members = torch.zeros(
        len(concepts.signatures), len(categories), dtype=torch.bool, device=device
    )
    members[concepts.incidence.columns, of[concepts.incidence.rows]] = True
    return categories, of, members


def netdissect_scores(
    unit_masks: Tensor,
    concept_masks: Tensor | ConceptMasks,
    categories: Sequence[str] | None = None,
    scope: Scope = "all",
) -> Tensor:
    """IoU of every unit and concept.

    The scopes differ in the images in which the unit's area counts: ``all`` of them (Compositional Explanations), those
    with a label of the concept's ``category`` (Network Dissection, paper), or those with such a label inside the
    ``active`` region of the unit (NetDissect-Lite, released code; a label of the image is inside any active region).

    Args:
        unit_masks: bool [U, N, H, W].
        concept_masks: bool [C, N, H, W], or concepts built from such masks.
        categories: of the concepts, where masks are given.
        scope: see above.

    Returns:
        float64 [U, C].

    Raises:
        ValueError: another scope, shapes that do not fit, or a scope that needs categories which are missing.
    """
    return netdissect_counts(unit_masks, concept_masks, categories, scope).iou


@dataclass(frozen=True)
class DissectionCounts:
    """What the scores of a scope are made of, each Long [U, C]: shared positions, unit's and concept's area."""

    intersection: Tensor
    unit_area: Tensor
    area: Tensor

    @property
    def iou(self) -> Tensor:
        """float64 [U, C]."""
        return iou_from_counts(self.intersection, self.area, self.unit_area)


def netdissect_counts(
    unit_masks: Tensor,
    concept_masks: Tensor | ConceptMasks,
    categories: Sequence[str] | None = None,
    scope: Scope = "all",
) -> DissectionCounts:
    """The counts behind :func:`netdissect_scores`, with its arguments and errors."""
    if scope not in ("all", "category", "active"):
        raise ValueError(f"scope={scope!r} must be one of all, category, active")
    concepts = (
        concept_masks
        if isinstance(concept_masks, ConceptMasks)
        else ConceptMasks.from_masks(concept_masks, categories=categories)
    )
    signature_of = concepts.signatures.index_map
    positions = unit_masks.shape[1:].numel()
    if unit_masks.ndim != 4 or signature_of is None or len(signature_of) != positions:
        raise ValueError(
            f"unit masks must be [U, N, H, W] over the {concepts.n_positions} positions of the concept masks, "
            f"not {tuple(unit_masks.shape)}"
        )
    counts = torch.stack([concepts.unit_counts(mask) for mask in unit_masks])
    intersection = (concepts.incidence @ counts.T.double()).T.long()
    if scope == "all":
        unit_area = counts.sum(1, keepdim=True).expand_as(intersection)
    else:
        names, of, members = category_members(concepts)
        tally = CategoryTally(len(unit_masks), len(names))
        tally.add(unit_masks, signature_of.view(unit_masks.shape[1:]), members)
        unit_area = getattr(tally, scope).to(of.device)[:, of]
    return DissectionCounts(intersection, unit_area, concepts.areas.expand_as(intersection))


def best_labels(
    iou: Tensor, categories: Sequence[str], labels: Sequence[str]
) -> list[dict[str, tuple[str, float]]]:
    """Of every unit, the best concept of every category and its IoU; the first one of several.

    Args:
        iou: [U, C].
        categories: of the concepts [C].
        labels: of the concepts [C].

    Returns:
        Per unit ``{category: (label, iou)}`` in the order of the categories' first concepts.
    """
    table = []
    for row in iou.tolist():
        best: dict[str, tuple[str, float]] = {}
        for category, label, value in zip(categories, labels, row, strict=True):
            if category not in best or value > best[category][1]:
                best[category] = (label, value)
        table.append(best)
    return table


def best_category(best: dict[str, tuple[str, float]]) -> str:
    """The category of the best concept; the last one of several (released code)."""
    return max(reversed(best), key=lambda category: best[category][1])


def best_concepts(iou: Tensor, categories: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Network Dissection's answer for a unit: the best concept of every category, and of all.

    Args:
        iou: of every concept [C].
        categories: of the concepts [C].
        labels: of the concepts [C].

    Returns:
        ``label``, ``category`` and ``iou`` of the best concept, whether it makes the unit a ``detector``, and
        ``by_category`` the label and IoU of the best one of each.
    """
    (best,) = best_labels(iou[None], categories, labels)
    category = best_category(best)
    label, score = best[category]
    return {
        "label": label,
        "category": category,
        "iou": score,
        "detector": score > DETECTOR_IOU,
        "by_category": {name: [*pair] for name, pair in best.items()},
    }
