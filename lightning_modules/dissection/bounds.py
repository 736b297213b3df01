"""How good an explanation can be: the ceiling of any formula, and the certified optimum of up to three concepts.

Notation: a unit fires on N positions; a formula shares I of them and covers FP others, so its IoU is ``I / (N + FP)``.
Both are sums over positions, so the same inequalities bound them.
"""

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.formulas import Formula
from lightning_modules.dissection.scores import VISION_EPS, iou_from_counts
from lightning_modules.dissection.search import (
    EXTENSIONS,
    Explanation,
    UnitTable,
    beam_search,
    extension_counts,
    nothing_found,
)

LARGEST_ENUMERATION = 2_000_000
"""Formulas that :func:`exhaustive_search` is willing to score."""
LARGEST_LENGTH = 3
"""Concepts in the formulas that :func:`certified_search` covers."""


def iou_ceiling(unit: Tensor, concepts: ConceptMasks) -> float:
    """The highest IoU that any formula of any length over these concepts could reach.

    A formula is a set of signatures. With v of a signature's w positions on the unit, taking signatures by descending
    v / w until the IoU falls is optimal, because the IoU is linear-fractional in them.

    Args:
        unit: see :func:`~lightning_modules.dissection.search.beam_search`.
        concepts: of the probing set.

    Returns:
        Value in [0, 1], 0 for a unit that never fires. What is missing to 1 is the concepts' fault, not the search's.
    """
    counts = concepts.unit_counts(unit)
    fires = counts > 0
    v, w = counts[fires].double(), concepts.signatures.weights[fires].double()
    if not len(v):
        return 0.0
    order = (v / w).argsort(descending=True)
    inside, taken = v[order].cumsum(0), w[order].cumsum(0)
    return float(iou_from_counts(inside, taken, float(v.sum())).max())


def number_of_formulas(n_concepts: int, max_length: int) -> int:
    """Left-deep formulas of up to ``max_length`` concepts, with repetitions."""
    return sum(n_concepts**length * 3 ** (length - 1) for length in range(1, max_length + 1))


def exhaustive_search(
    unit: Tensor, concepts: ConceptMasks, max_length: int = 3
) -> tuple[Explanation, int]:
    """Scores every left-deep formula; :func:`certified_search` finds the same optimum without looking at most of them.

    Of equal formulas the first of a depth-first walk wins: by first concept, the concept itself before its extensions,
    which go by second concept, OR before AND before AND NOT, and so on.

    Args:
        unit: see :func:`~lightning_modules.dissection.search.beam_search`.
        concepts: of the probing set.
        max_length: concepts in a formula.

    Returns:
        The explanation, and how many formulas have its score.

    Raises:
        ValueError: more than two million formulas, or a unit that does not fit the concepts.
    """
    n_formulas = number_of_formulas(len(concepts), max_length)
    if max_length < 1 or n_formulas > LARGEST_ENUMERATION:
        raise ValueError(
            f"exhaustive_search of {len(concepts)} concepts to max_length={max_length} has {n_formulas} formulas, "
            f"expected 1 to {LARGEST_ENUMERATION}: use certified_search"
        )
    counts = concepts.unit_counts(unit)
    table = UnitTable(concepts, counts)
    best, first, ties = nothing_found(table.area), [0], 0
    rows = torch.stack([concepts.incidence.row(row) for row in range(len(concepts))])
    masks, weights = rows, concepts.signatures.weights
    intersections, areas = table.leaf_intersections, concepts.areas.double()
    for length in range(1, max_length + 1):
        scores = iou_from_counts(intersections, areas, table.area).flatten()
        highest = float(scores.max())
        if highest > 0 and highest >= best.score:
            place = int((scores == highest).nonzero()[0, 0])
            path = _path(place, length, len(concepts))
            ties = int((scores == highest).sum()) + (ties if highest == best.score else 0)
            if highest > best.score or path < first:
                inside, area = int(intersections.flatten()[place]), int(areas.flatten()[place])
                formula = _formula(path, concepts)
                found = Explanation(formula, highest, highest, inside, area, table.area)
                best, first = found, path
        if length == 1:
            leaf = best
        if length == max_length:
            break
        if length > 1:
            some = masks[:, None]
            masks = torch.stack([some | rows, some & rows, some & ~rows], 2).flatten(0, 2)
        shared = (concepts.incidence @ (masks * weights).T.double()).T
        areas = extension_counts((masks * weights).sum(1).double(), concepts.areas, shared)
        intersections = extension_counts(
            (masks * counts).sum(1).double(), table.leaf_intersections, table.shared(masks)
        )
    if best.formula is None:
        return best, 0
    return replace(best, best_leaf=leaf.formula, best_leaf_score=leaf.score, certified=True), ties


def _path(place: int, length: int, n_concepts: int) -> list[int]:
    """The choices that lead to a formula: the first concept, then ``3 * concept + operation`` of every extension."""
    path = []
    for _ in range(length - 1):
        place, choice = divmod(place, 3 * n_concepts)
        path.append(choice)
    return [place, *reversed(path)]


def _formula(path: list[int], concepts: ConceptMasks) -> Formula:
    formula = concepts.atoms[path[0]]
    for choice in path[1:]:
        row, op = divmod(choice, 3)
        formula = EXTENSIONS[op](formula, concepts.atoms[row])
    return formula


def certified_search(
    unit: Tensor,
    concepts: ConceptMasks,
    max_length: int = 3,
    time_limit: float | None = 60.0,
    start: Explanation | None = None,
    chunk: int = 512,
) -> Explanation:
    """The formula of up to three concepts with the highest IoU of all, and whether that was proved in time.

    Formulas of two concepts are scored from pair counts. They are then visited by descending upper bound of what a
    third concept can make of them; pair counts bound all extensions, and only the few that could still win are counted.
    When no upper bound is above the best IoU the search is over.

    Args:
        unit: see :func:`~lightning_modules.dissection.search.beam_search`.
        concepts: of the probing set.
        max_length: 1, 2 or 3 concepts.
        time_limit: seconds after which the best formula so far is returned; None for no limit.
        start: a good explanation to begin with, without length penalty; a beam search by default. It remains the answer
            if nothing is better.
        chunk: formulas bounded together.

    Returns:
        The explanation; ``certified`` is False if the time was up before the proof.

    Raises:
        ValueError: another length, or a unit that does not fit the concepts.
    """
    if not 1 <= max_length <= LARGEST_LENGTH:
        raise ValueError(
            f"certified_search proves max_length 1 to {LARGEST_LENGTH}, not {max_length}; "
            "iou_ceiling bounds formulas of any length"
        )
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    counts = concepts.unit_counts(unit)
    found = start or beam_search(counts, concepts, max_length=max_length)
    leaf = beam_search(counts, concepts, 1, 1)
    if leaf.iou > found.iou:
        found = leaf
    if found.formula is None or max_length == 1:
        return replace(found, certified=True)
    table = UnitTable(concepts, counts)
    pairs = _Pairs(concepts, table)
    best = pairs.best_of_two(found)
    if max_length == 2:
        return replace(best, certified=True)
    bounds = pairs.upper_bounds()
    order = (bounds > best.iou).nonzero()[:, 0]
    order = order[bounds[order].argsort(descending=True)]
    for first in range(0, len(order), chunk):
        some = order[first : first + chunk]
        some = some[bounds[some] > best.iou]
        if not len(some):
            break
        if time.monotonic() > deadline:
            return replace(best, certified=False)
        some = some[pairs.extension_bounds(some) > best.iou]
        if len(some):
            best = pairs.best_extension(some, best)
    return replace(best, certified=True)


class _Pairs:
    """All formulas of two concepts: ``a OR b`` and ``a AND b`` once per pair, ``a AND (NOT b)`` in both orders.

    Attributes:
        op: of every formula, its position in ``EXTENSIONS`` [P].
        a: row of the first concept [P].
        b: row of the second [P].
        inside: positions shared with the unit [P].
        outside: other positions [P].
    """

    def __init__(self, concepts: ConceptMasks, table: UnitTable) -> None:
        self.concepts, self.table = concepts, table
        self.n = table.area
        self.inside_of = table.leaf_intersections
        self.outside_of = concepts.areas.double() - self.inside_of
        self.inside_pairs = table.incidence.pair_counts(table.weights)
        self.outside_pairs = concepts.pair_intersections().double() - self.inside_pairs
        size = len(concepts)
        device = concepts.areas.device
        a, b = torch.triu_indices(size, size, 1, device=device)
        both = torch.cat([a, b]), torch.cat([b, a])
        kinds = [(0, a, b), (1, a, b), (2, *both)]
        self.op = torch.cat([torch.full_like(first, op) for op, first, _ in kinds])
        self.a = torch.cat([first for _, first, _ in kinds])
        self.b = torch.cat([second for _, _, second in kinds])
        self.inside = self._measure(self.inside_of, self.inside_pairs)
        self.outside = self._measure(self.outside_of, self.outside_pairs)

    def _measure(self, single: Tensor, pair: Tensor) -> Tensor:
        both = pair[self.a, self.b]
        a, b = single[self.a], single[self.b]
        return torch.where(self.op == 0, a + b - both, torch.where(self.op == 1, both, a - both))

    def iou(self, inside: Tensor, outside: Tensor) -> Tensor:
        """IoU from positions on the unit and outside of it; rounding keeps the order of bounds and values."""
        return iou_from_counts(inside, inside + outside, self.n, VISION_EPS)

    def formula(self, place: int) -> Formula:
        """One of the formulas."""
        a, b = (self.concepts.atoms[int(rows[place])] for rows in (self.a, self.b))
        return EXTENSIONS[int(self.op[place])](a, b)

    def _better(
        self, formula: Formula, iou: float, inside: Tensor, outside: Tensor, best: Explanation
    ) -> Explanation:
        area = int(inside + outside)
        return replace(
            best, formula=formula, score=iou, iou=iou, intersection=int(inside), area=area
        )

    def best_of_two(self, best: Explanation) -> Explanation:
        """The best formula of two concepts, if better."""
        if not len(self.op):
            return best
        iou = self.iou(self.inside, self.outside)
        place = int(iou.argmax())
        if float(iou[place]) <= best.iou:
            return best
        inside, outside = self.inside[place], self.outside[place]
        return self._better(self.formula(place), float(iou[place]), inside, outside, best)

    def upper_bounds(self) -> Tensor:
        """Of every formula, a bound [P] for its extensions by one more concept."""
        most = self.inside_of.max() if len(self.inside_of) else torch.tensor(0.0)
        union = self.iou((self.inside + most).clamp_max(self.n), self.outside)
        narrowed = self.iou(self.inside, torch.zeros_like(self.outside))
        return torch.maximum(union, narrowed)

    def extension_bounds(self, some: Tensor) -> Tensor:
        """Of some formulas, a closer bound for their extensions, from the pair counts of three concepts."""
        in_low, in_high = self._shared_bounds(some, self.inside_of, self.inside_pairs)
        out_low, out_high = self._shared_bounds(some, self.outside_of, self.outside_pairs)
        inside, outside = self.inside[some, None], self.outside[some, None]
        union = self.iou(
            (inside + self.inside_of - in_low).clamp_max(self.n),
            outside + self.outside_of - out_high,
        )
        joint = self.iou(in_high, out_low)
        narrowed = self.iou(inside - in_low, outside - out_high)
        return torch.maximum(torch.maximum(union, joint), narrowed).amax(1)

    def _shared_bounds(self, some: Tensor, single: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of ``|F & c|`` [P, C] from what F = a op b and c share in pairs (Bonferroni)."""
        a, b, op = self.a[some], self.b[some], self.op[some, None]
        ac, bc, c = pair[a], pair[b], single[None]
        ab = pair[a, b][:, None]
        one, two = single[a][:, None], single[b][:, None]
        low_and = torch.maximum((ac + bc - c), torch.maximum(ac + ab - one, bc + ab - two))
        low_and = low_and.clamp_min(0)
        high_and = torch.minimum(torch.minimum(ac, bc), ab)
        # What is in a and c is either in b or not, and a OR b has each part once: both follow from a AND b.
        low = torch.where(op == 0, ac + bc - high_and, torch.where(op == 1, low_and, ac - high_and))
        high = torch.where(op == 0, ac + bc - low_and, torch.where(op == 1, high_and, ac - low_and))
        return low, high

    def best_extension(self, some: Tensor, best: Explanation) -> Explanation:
        """The best extension of some formulas, counted, if better."""
        rows = self.concepts.incidence
        first = torch.stack([rows.row(a) for a in self.a[some].tolist()])
        second = torch.stack([rows.row(b) for b in self.b[some].tolist()])
        op = self.op[some, None]
        masks = torch.where(
            op == 0, first | second, torch.where(op == 1, first & second, first & ~second)
        )
        inside = extension_counts(self.inside[some], self.inside_of, self.table.shared(masks))
        weights = self.concepts.signatures.weights.double()
        shared = (rows @ (masks * weights).T).T
        whole = self.inside[some] + self.outside[some]
        areas = extension_counts(whole, self.concepts.areas.double(), shared)
        iou = iou_from_counts(inside, areas, self.n).flatten()
        place = int(iou.argmax())
        if float(iou[place]) <= best.iou:
            return best
        rest, third = divmod(place, 3)
        which, c = divmod(rest, len(self.concepts))
        formula = EXTENSIONS[third](self.formula(int(some[which])), self.concepts.atoms[c])
        share, area = inside.flatten()[place], areas.flatten()[place]
        return self._better(formula, float(iou[place]), share, area - share, best)
