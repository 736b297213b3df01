"""The formula that describes a unit best: beam search over counts per signature (Mu & Andreas, NeurIPS 2020).

Every step counts all extensions of the beam's formulas by every concept at once, see
:mod:`lightning_modules.dissection.concepts`. What depends on the unit is counted only over the signatures on which the
unit fires; what does not is remembered for the next unit. All counts are exact whole numbers, so the answer is that of
the slow way, ties included.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.dissection.concepts import ConceptMasks, Incidence
from lightning_modules.dissection.formulas import And, Formula, Not, Or
from lightning_modules.dissection.scores import (
    VISION_EPS,
    Metric,
    formula_score,
    iou_from_counts,
)

Mode = Literal["distinct", "reference"]

EXTENSIONS: tuple[Callable[[Formula, Formula], Formula], ...] = (
    Or,
    And,
    lambda formula, atom: And(formula, Not(atom)),
)
"""OR, AND, AND NOT: in this order where they tie."""
_EXTRA_LENGTH = (0, 0, 1)
"""What NOT adds to the released code's length."""


@dataclass(frozen=True)
class Explanation:
    """What a search found for one unit.

    Attributes:
        formula: the best formula; None for a unit that shares no position with any concept.
        score: what the search maximised: the metric times ``length_penalty ** (length_reference - 1)``.
        iou: IoU of formula and unit.
        intersection: positions of both.
        area: positions of the formula.
        unit_area: positions of the unit.
        best_leaf: the best single concept (Network Dissection's answer).
        best_leaf_score: its score.
        beam: the last beam, best first.
        certified: True if no formula of the searched lengths has a higher IoU.
    """

    formula: Formula | None
    score: float
    iou: float
    intersection: int
    area: int
    unit_area: int
    best_leaf: Formula | None = None
    best_leaf_score: float = 0.0
    beam: list[tuple[Formula, float]] = field(default_factory=list)
    certified: bool = False


def nothing_found(unit_area: int) -> Explanation:
    """The explanation of a unit that shares nothing with any concept."""
    return Explanation(None, 0.0, 0.0, 0, 0, unit_area)


def combine(mask: Tensor, other: Tensor, operation: int) -> Tensor:
    """Mask of an extension, given its position in ``EXTENSIONS``."""
    return mask | other if operation == 0 else mask & (other if operation == 1 else ~other)


def extension_counts(of_formula: Tensor, of_atoms: Tensor, shared: Tensor) -> Tensor:
    """Positions of ``F OR c``, ``F AND c`` and ``F AND (NOT c)`` from those of F, c and both.

    Args:
        of_formula: |F|, [F].
        of_atoms: |c|, [C].
        shared: |F & c|, [F, C].

    Returns:
        [F, C, 3].
    """
    alone = of_formula[:, None]
    return torch.stack([alone + of_atoms - shared, shared, alone - shared], -1)


class UnitTable:
    """The signatures on which one unit fires, with all concepts.

    Args:
        concepts: of the probing set.
        counts: of the unit, Long [S], see :meth:`ConceptMasks.unit_counts`.

    Attributes:
        area: positions of the unit.
        leaf_intersections: float64 [C], positions that the unit shares with every concept.
    """

    def __init__(self, concepts: ConceptMasks, counts: Tensor) -> None:
        fires = counts > 0
        self.fires = fires.nonzero()[:, 0]
        self.weights = counts.index_select(0, self.fires).double()
        self.area = int(counts.sum())
        self.incidence: Incidence = concepts.incidence.restricted(fires)
        self.leaf_intersections = (self.incidence @ self.weights[:, None])[:, 0]

    def shared(self, masks: Tensor) -> Tensor:
        """Positions that the unit shares with formulas and every concept.

        Args:
            masks: bool [F, S], signatures of the formulas.

        Returns:
            float64 [F, C].
        """
        return (self.incidence @ (masks.index_select(1, self.fires) * self.weights).T).T


def expansion_counts(
    formula: Formula, unit: Tensor, concepts: ConceptMasks
) -> tuple[Tensor, Tensor]:
    """Counts of a formula extended by every concept.

    Args:
        formula: over labels of the concepts.
        unit: see :meth:`ConceptMasks.unit_counts`.
        concepts: of the probing set.

    Returns:
        Areas and intersections with the unit, each Long [C, 3], for OR, AND, AND NOT.

    Raises:
        KeyError: the formula names an unknown concept.
        ValueError: a unit that does not fit the concepts.
    """
    counts = concepts.unit_counts(unit)
    table = UnitTable(concepts, counts)
    mask = concepts.signature_mask(formula)
    shared, _ = concepts.measure([formula], [mask])
    own_area = concepts.signatures.weights[mask].sum()[None]
    own_intersection = counts[mask].sum()[None]
    areas = extension_counts(own_area, concepts.areas, shared)
    intersections = extension_counts(
        own_intersection, table.leaf_intersections, table.shared(mask[None])
    )
    return areas[0].long(), intersections[0].long()


@dataclass
class _Candidates:
    """Formulas in the order in which they were made, as columns."""

    make: Callable[[int], tuple[Formula, Tensor]]
    scores: Tensor
    intersections: Tensor
    areas: Tensor
    lengths: Tensor
    fingerprints: Tensor


@dataclass
class _Entry:
    formula: Formula
    mask: Tensor
    score: float
    intersection: float
    area: float
    length: int
    fingerprint: float
    shared: Tensor | None = None

    @property
    def mark(self) -> tuple[float, float, float]:
        """Equal for equal masks."""
        return self.intersection, self.area, self.fingerprint


def stable_top(scores: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` highest scores, best first; of equal ones the earlier first."""
    if len(scores) <= k:
        return scores.sort(descending=True, stable=True).indices
    lowest = scores.topk(k).values[-1]
    among = (scores >= lowest).nonzero()[:, 0]
    return among[scores[among].sort(descending=True, stable=True).indices[:k]]


def _check(beam_size: int, max_length: int, length_penalty: float, mode: str) -> None:
    if beam_size < 1 or max_length < 1:
        raise ValueError(f"beam_size={beam_size} and max_length={max_length} must be at least 1")
    if not 0 < length_penalty <= 1:
        raise ValueError(f"length_penalty={length_penalty} must be in (0, 1]")
    if mode not in ("distinct", "reference"):
        raise ValueError(f"mode={mode!r} must be 'distinct' or 'reference'")


def beam_search(
    unit: Tensor,
    concepts: ConceptMasks,
    beam_size: int = 5,
    max_length: int = 3,
    length_penalty: float = 1.0,
    candidate_limit: int | None = None,
    mode: Mode = "distinct",
    offered: Callable[[Tensor], Tensor] | None = None,
    metric: Metric = "iou",
    eps: float = VISION_EPS,
) -> Explanation:
    """The best formula that a beam search finds.

    The beam starts with the best concepts. In each of ``max_length - 1`` rounds its formulas are extended by every
    concept with OR, AND and AND NOT; old and new ones compete for the places. Of equal scores the earlier one wins: the
    shorter formula, the concept that comes first, OR before AND before AND NOT.

    Args:
        unit: its mask, bool [D], or its positions per signature, Long [S].
        concepts: of the probing set.
        beam_size: formulas kept (5; the released NLI code 10).
        max_length: concepts in a formula (3; NLI 5; up to 10 in the paper).
        length_penalty: in (0, 1], factor per unit of ``length_reference`` beyond the first, in which NOT counts.
        candidate_limit: extend by so many best concepts only.
        mode: ``reference`` is the released code, whose beam holds the same mask several times (``A OR B``, ``B OR A``,
            ``A AND A``); ``distinct`` drops empty masks and those equal to a better one.
        offered: rows of the concepts to extend by, given the scores of all; all by default.
        metric: what to maximise, see :func:`~lightning_modules.dissection.scores.formula_score`.
        eps: see :func:`~lightning_modules.dissection.scores.iou_from_counts`.

    Returns:
        The explanation; its formula is None if the unit shares no position with any concept.

    Raises:
        ValueError: an impossible argument, or a unit that does not fit the concepts.
    """
    _check(beam_size, max_length, length_penalty, mode)
    if candidate_limit is not None and candidate_limit < 1:
        raise ValueError(f"candidate_limit={candidate_limit} must be at least 1")
    table = UnitTable(concepts, concepts.unit_counts(unit))

    def score(intersections: Tensor, areas: Tensor, lengths: Tensor) -> Tensor:
        value = formula_score(intersections, areas, table.area, metric, eps)
        if length_penalty == 1:
            return value
        # Powers of Python numbers, as the released code takes them: ties must stay ties.
        powers = [length_penalty ** (n - 1) for n in range(int(lengths.max()) + 1)]
        return torch.tensor(powers, dtype=torch.float64, device=value.device)[lengths] * value

    leaves = _leaves(concepts, table, score)
    positive = (leaves.scores > 0).nonzero()[:, 0]
    if not len(positive):
        return nothing_found(table.area)
    if offered is not None:
        rows = offered(leaves.scores)
    elif candidate_limit is not None:
        rows = positive[stable_top(leaves.scores[positive], candidate_limit)]
    else:
        rows = torch.arange(len(concepts), device=positive.device)
    distinct = mode == "distinct"
    beam = _select([], leaves, positive, beam_size, distinct)
    leaf = beam[0]
    for _ in range(max_length - 1):
        extended = _extend(beam, concepts, table, rows, score)
        keep = torch.arange(len(extended.scores), device=rows.device)
        if distinct:
            # An extension with as many positions as the formula is that formula.
            own = torch.tensor(
                [entry.area for entry in beam], device=rows.device, dtype=torch.float64
            )
            same = extended.areas.view(len(beam), -1) == own[:, None]
            keep = (~same.flatten() & (extended.areas > 0)).nonzero()[:, 0]
        beam = _select(beam, extended, keep, beam_size, distinct)
    best = beam[0]
    iou = iou_from_counts(torch.tensor(best.intersection), torch.tensor(best.area), table.area, eps)
    return Explanation(
        best.formula,
        best.score,
        float(iou),
        int(best.intersection),
        int(best.area),
        table.area,
        leaf.formula,
        leaf.score,
        [(entry.formula, entry.score) for entry in beam],
    )


Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def _leaves(concepts: ConceptMasks, table: UnitTable, score: Score) -> _Candidates:
    areas = concepts.areas.double()

    def make(row: int) -> tuple[Formula, Tensor]:
        return concepts.atoms[row], concepts.incidence.row(row)

    scores = score(table.leaf_intersections, areas, concepts.lengths)
    return _Candidates(
        make, scores, table.leaf_intersections, areas, concepts.lengths, concepts.fingerprints
    )


def _extend(
    beam: list[_Entry], concepts: ConceptMasks, table: UnitTable, rows: Tensor, score: Score
) -> _Candidates:
    """All extensions of the beam's formulas: formula by formula, concept by concept, OR, AND, AND NOT."""
    fresh = [entry for entry in beam if entry.shared is None]
    if fresh:
        counts = table.shared(torch.stack([entry.mask for entry in fresh]))
        for entry, line in zip(fresh, counts, strict=True):
            entry.shared = line
    own = torch.tensor(
        [[e.intersection, e.area, e.length, e.fingerprint] for e in beam],
        dtype=torch.float64,
        device=rows.device,
    )
    shared = torch.stack([entry.shared for entry in beam if entry.shared is not None])
    areas, prints = concepts.measure([e.formula for e in beam], [e.mask for e in beam])
    shared, areas, prints = (x.index_select(1, rows) for x in (shared, areas, prints))
    atoms = table.leaf_intersections, concepts.areas, concepts.fingerprints, concepts.lengths
    inside, area, fingerprints, atom_lengths = (x.index_select(0, rows) for x in atoms)
    intersections = extension_counts(own[:, 0], inside, shared)
    extended = extension_counts(own[:, 1], area, areas)
    fingerprints = extension_counts(own[:, 3], fingerprints, prints)
    extra = torch.tensor(_EXTRA_LENGTH, device=rows.device)
    lengths = own[:, 2].long()[:, None, None] + atom_lengths[:, None] + extra
    order = rows.tolist()

    def make(position: int) -> tuple[Formula, Tensor]:
        rest, operation = divmod(position, 3)
        parent, place = divmod(rest, len(order))
        entry, row = beam[parent], order[place]
        mask = combine(entry.mask, concepts.incidence.row(row), operation)
        return EXTENSIONS[operation](entry.formula, concepts.atoms[row]), mask

    return _Candidates(
        make,
        score(intersections, extended, lengths).flatten(),
        intersections.flatten(),
        extended.flatten(),
        lengths.flatten(),
        fingerprints.flatten(),
    )


def _select(
    beam: list[_Entry], made: _Candidates, usable: Tensor, size: int, distinct: bool
) -> list[_Entry]:
    """The best of the old beam and of the usable new formulas; of equal scores the earlier."""
    if not len(usable):
        return beam
    kept = torch.tensor([entry.score for entry in beam], dtype=torch.float64)
    scores = torch.cat([kept.to(usable.device), made.scores.index_select(0, usable)])
    chosen: list[_Entry] = []
    for places in _best_first(scores, 4 * size if distinct else size):
        new = usable[(places - len(beam)).clamp_min(0)]
        columns = made.scores, made.intersections, made.areas, made.lengths, made.fingerprints
        numbers = torch.stack([column[new] for column in columns], 1).tolist()
        for place, position, row in zip(places.tolist(), new.tolist(), numbers, strict=True):
            old = place < len(beam)
            mark = beam[place].mark if old else (row[1], row[2], row[4])
            if distinct and any(mark == entry.mark for entry in chosen):
                continue
            if old:
                chosen.append(beam[place])
            else:
                score, inside, area, length, fingerprint = row
                formula, mask = made.make(position)
                chosen.append(_Entry(formula, mask, score, inside, area, int(length), fingerprint))
            if len(chosen) == size:
                return chosen
    return chosen


def _best_first(scores: Tensor, at_a_time: int) -> Iterator[Tensor]:
    """Positions by descending score, sorted no further than they are asked for."""
    done = 0
    while done < len(scores):
        order = stable_top(scores, done + at_a_time)
        yield order[done:]
        done, at_a_time = len(order), 4 * at_a_time
