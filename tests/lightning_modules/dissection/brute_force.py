"""Explanations the slow way: every mask written down, every rule spelled out."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_modules.dissection.formulas import And, Formula, Leaf, Not, Or

Mask = NDArray[np.bool_]


def random_problem(
    seed: int, n_concepts: int = 6, n_positions: int = 90, density: float = 0.3
) -> tuple[Mask, Mask]:
    """Concept masks [C, D] and a noisy unit [D] that follows some; of some seeds disjoint, equal or empty masks."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n_concepts, n_positions)) < density
    if seed % 4 == 1:
        # Disjoint concepts.
        owner = rng.integers(0, n_concepts + 1, n_positions)
        masks = owner == np.arange(n_concepts)[:, None]
    if seed % 4 == 2:
        masks[1] = masks[0]
        masks[2] = False
    a, b, c = rng.permutation(n_concepts)[:3]
    unit = (masks[a] | masks[b]) & ~masks[c]
    return masks, unit ^ (rng.random(n_positions) < 0.1)


def iou(mask: Mask, unit: Mask, eps: float = 1e-10) -> float:
    inside = int((mask & unit).sum())
    return inside / (int(mask.sum()) + int(unit.sum()) - inside + eps)


def extensions(formula: Formula, labels: Sequence[int]) -> list[Formula]:
    made: list[Formula] = []
    for label in labels:
        leaf = Leaf(label)
        made += [Or(formula, leaf), And(formula, leaf), And(formula, Not(leaf))]
    return made


def beam(
    masks: Mask,
    unit: Mask,
    labels: Sequence[int],
    size: int,
    length: int,
    penalty: float = 1.0,
    limit: int | None = None,
    distinct: bool = False,
) -> list[tuple[Formula, float]]:
    """The rules of the released code, or those without repeated masks."""
    by_label = dict(zip(labels, masks, strict=True))

    def scored(formula: Formula) -> tuple[Formula, float]:
        return formula, penalty ** (formula.length_reference - 1) * iou(
            formula.evaluate(by_label), unit
        )

    def best(formulas: list[tuple[Formula, float]]) -> list[tuple[Formula, float]]:
        kept: list[tuple[Formula, float]] = []
        seen: set[bytes] = set()
        for formula, score in sorted(formulas, key=lambda entry: -entry[1]):
            mask = formula.evaluate(by_label)
            if distinct and (not mask.any() or mask.tobytes() in seen):
                continue
            seen.add(mask.tobytes())
            kept.append((formula, score))
        return kept[:size]

    leaves = [entry for entry in map(scored, map(Leaf, labels)) if entry[1] > 0]
    offered = list(labels)
    if limit is not None:
        ordered = sorted(leaves, key=lambda entry: -entry[1])
        offered = [formula.leaves()[0] for formula, _ in ordered[:limit]]
    found = best(leaves)
    for _ in range(length - 1):
        found = best(found + [scored(e) for f, _ in found for e in extensions(f, offered)])
    return found


def all_formulas(labels: Sequence[int], length: int) -> list[Formula]:
    """All left-deep formulas, depth first."""
    made: list[Formula] = []

    def visit(formula: Formula, depth: int) -> None:
        made.append(formula)
        if depth < length:
            for extension in extensions(formula, labels):
                visit(extension, depth + 1)

    for label in labels:
        visit(Leaf(label), 1)
    return made


def tensor(mask: Mask) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask))
