"""The searches against brute force on small random problems."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from lightning_modules.dissection.bounds import (
    _Pairs,
    certified_search,
    exhaustive_search,
    iou_ceiling,
    number_of_formulas,
)
from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.formulas import And, Leaf, Not, Or
from lightning_modules.dissection.search import (
    UnitTable,
    beam_search,
    expansion_counts,
    stable_top,
)
from tests.lightning_modules.dissection.brute_force import (
    all_formulas,
    beam,
    iou,
    random_problem,
    tensor,
)


def problem(seed: int, **sizes: int) -> tuple[np.ndarray, np.ndarray, list[int], ConceptMasks]:
    masks, unit = random_problem(seed, **sizes)
    labels = sorted(np.random.default_rng(seed).permutation(50)[: len(masks)].tolist())
    return masks, unit, labels, ConceptMasks.from_masks(tensor(masks), labels)


# ------------------------------------------------------------------ beam search
@pytest.mark.parametrize("mode", ["reference", "distinct"])
@pytest.mark.parametrize(
    ("size", "length", "penalty", "limit"),
    [(5, 3, 1.0, None), (1, 2, 1.0, None), (3, 4, 0.9, None), (4, 3, 1.0, 3), (50, 3, 0.97, 2)],
)
def test_beam_is_that_of_brute_force(
    mode: str, size: int, length: int, penalty: float, limit: int | None
) -> None:
    for seed in range(24):
        masks, unit, labels, concepts = problem(seed)
        expected = beam(masks, unit, labels, size, length, penalty, limit, mode == "distinct")
        found = beam_search(tensor(unit), concepts, size, length, penalty, limit, mode=mode)  # type: ignore[arg-type]
        # Scores too are equal to the last bit.
        assert [(str(f), s) for f, s in found.beam] == [(str(f), s) for f, s in expected], seed
        assert found.formula == expected[0][0]
        mask = found.formula.evaluate(dict(zip(labels, masks, strict=True)))
        assert (found.area, found.intersection) == (mask.sum(), (mask & unit).sum())
        assert found.iou == iou(mask, unit)


def test_large_tables_are_counted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [
        beam_search(tensor(unit), concepts) for _, unit, _, concepts in map(problem, range(8))
    ]
    monkeypatch.setattr("lightning_modules.dissection.concepts.LARGE_TABLE", 0)
    again = [beam_search(tensor(unit), concepts) for _, unit, _, concepts in map(problem, range(8))]
    assert again == expected


def test_units_are_searched_the_same_whatever_was_remembered() -> None:
    masks, _, labels, shared = problem(3)
    for seed in range(8):
        _, unit, _, _ = problem(seed)
        alone = ConceptMasks.from_masks(tensor(masks), labels)
        assert beam_search(tensor(unit), shared) == beam_search(tensor(unit), alone)


def test_a_full_memory_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    _, unit, _, concepts = problem(0)
    expected = beam_search(tensor(unit), concepts)
    monkeypatch.setattr("lightning_modules.dissection.concepts.LARGEST_CACHE", 150)
    _, _, _, small = problem(0)
    assert beam_search(tensor(unit), small) == expected
    assert len(small._measured) <= 12


def test_counts_per_signature_are_a_unit_too() -> None:
    _, unit, _, concepts = problem(5)
    counts = concepts.unit_counts(tensor(unit))
    assert counts.dtype == torch.long
    assert beam_search(counts, concepts) == beam_search(tensor(unit), concepts)


@pytest.mark.parametrize("fires", [[], [8, 9]])
def test_unit_that_meets_no_concept_has_no_formula(fires: list[int]) -> None:
    masks = torch.zeros(2, 10, dtype=torch.bool)
    masks[0, :4] = masks[1, 3:8] = True
    unit = torch.zeros(10, dtype=torch.bool)
    unit[fires] = True
    concepts = ConceptMasks.from_masks(masks)
    for found in (
        beam_search(unit, concepts),
        certified_search(unit, concepts),
        exhaustive_search(unit, concepts, 2)[0],
    ):
        assert (found.formula, found.score, found.iou) == (None, 0.0, 0.0)
        assert found.unit_area == len(fires)
    # The complement of both concepts would be the unit itself.
    assert iou_ceiling(unit, concepts) == pytest.approx(1.0 if fires else 0.0)


def test_one_concept_alone() -> None:
    masks = torch.tensor([[True, True, False]])
    unit = torch.tensor([True, False, False])
    found = beam_search(unit, ConceptMasks.from_masks(masks))
    assert found.formula == Leaf(0)
    assert found.beam == [(Leaf(0), pytest.approx(0.5))]
    assert certified_search(unit, ConceptMasks.from_masks(masks)).formula == Leaf(0)


def test_equal_concepts_tie_for_the_first() -> None:
    masks = torch.tensor([[True, True, False, False]] * 2 + [[False, False, True, False]])
    unit = torch.tensor([True, True, True, False])
    concepts = ConceptMasks.from_masks(masks, [4, 7, 9])
    reference = beam_search(unit, concepts, 4, 2, mode="reference")
    assert [str(f) for f, _ in reference.beam] == ["(4 OR 9)", "(7 OR 9)", "(9 OR 4)", "(9 OR 7)"]
    distinct = beam_search(unit, concepts, 4, 2)
    assert [str(f) for f, _ in distinct.beam] == ["(4 OR 9)", "4", "9"]


def test_a_planted_formula_of_three_is_found() -> None:
    masks, _, labels, concepts = problem(0)
    by_label = dict(zip(labels, masks, strict=True))
    planted = And(Or(Leaf(labels[1]), Leaf(labels[4])), Not(Leaf(labels[2])))
    unit = planted.evaluate(by_label)
    for found in (beam_search(tensor(unit), concepts), certified_search(tensor(unit), concepts)):
        assert found.formula is not None
        assert (found.formula.evaluate(by_label) == unit).all()
        assert found.iou == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"length_penalty": 1.5}, "length_penalty=1.5"),
        ({"length_penalty": 0.0}, "length_penalty=0.0"),
        ({"mode": "default"}, "mode='default'"),
        ({"candidate_limit": 0}, "candidate_limit=0"),
        ({"metric": "auc"}, "metric='auc'"),
    ],
)
def test_impossible_arguments(options: dict, message: str) -> None:
    _, unit, _, concepts = problem(0)
    with pytest.raises(ValueError, match=message):
        beam_search(tensor(unit), concepts, **options)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (torch.zeros(89, dtype=torch.bool), "89 positions, the concepts have 90"),
        (torch.zeros(90), "boolean mask or int64 counts"),
        (torch.full((90,), 1), "boolean mask or int64 counts"),
    ],
)
def test_unit_of_another_size(unit: torch.Tensor, message: str) -> None:
    _, _, _, concepts = problem(0)
    with pytest.raises(ValueError, match=message):
        beam_search(unit, concepts)


def test_more_counts_than_positions() -> None:
    _, _, _, concepts = problem(0)
    with pytest.raises(ValueError, match="more positions than a signature has"):
        beam_search(concepts.signatures.weights + 1, concepts)


def test_stable_top_is_a_stable_sort() -> None:
    scores = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0)).double()
    expected = sorted(range(60), key=lambda i: -scores[i])
    for k in (1, 7, 59, 60, 100):
        assert stable_top(scores, k).tolist() == expected[:k]


# ------------------------------------------------------------------ counts
def test_expansion_counts_are_those_of_the_masks() -> None:
    for seed in range(6):
        masks, unit, labels, concepts = problem(seed)
        by_label = dict(zip(labels, masks, strict=True))
        formula = Or(And(Leaf(labels[0]), Not(Leaf(labels[3]))), Leaf(labels[5]))
        areas, inside = expansion_counts(formula, tensor(unit), concepts)
        for row, label in enumerate(labels):
            made = (Or(formula, Leaf(label)), And(formula, Leaf(label)))
            for column, extension in enumerate((*made, And(formula, Not(Leaf(label))))):
                mask = extension.evaluate(by_label)
                assert areas[row, column] == mask.sum()
                assert inside[row, column] == (mask & unit).sum()


def test_unknown_concept_in_a_formula() -> None:
    _, unit, _, concepts = problem(0)
    with pytest.raises(KeyError, match="99 is none of the 6 concepts"):
        expansion_counts(Leaf(99), tensor(unit), concepts)


# ------------------------------------------------------------------ optimum and ceiling
@pytest.mark.parametrize("length", [1, 2, 3])
def test_exhaustive_search_is_the_first_best_of_all_formulas(length: int) -> None:
    for seed in range(4):
        masks, unit, labels, concepts = problem(seed, n_concepts=4)
        by_label = dict(zip(labels, masks, strict=True))
        formulas = all_formulas(labels, length)
        assert number_of_formulas(4, length) == len(formulas)
        scores = [iou(formula.evaluate(by_label), unit) for formula in formulas]
        best, ties = exhaustive_search(tensor(unit), concepts, length)
        assert best.score == max(scores)
        assert best.formula == formulas[scores.index(max(scores))]
        assert ties == scores.count(max(scores))
        assert best.best_leaf_score == max(iou(mask, unit) for mask in masks)
        assert best.certified


@pytest.mark.parametrize("length", [1, 2, 3])
def test_certified_search_is_exhaustive(length: int) -> None:
    beaten = 0
    for seed in range(200 if length == 3 else 20):
        masks, unit, labels, concepts = problem(seed, n_concepts=4 + seed % 6, n_positions=60)
        best, _ = exhaustive_search(tensor(unit), concepts, length)
        # From a poor start, so that the search has something to do.
        start = beam_search(tensor(unit), concepts, 1, 1)
        found = certified_search(tensor(unit), concepts, length, start=start, chunk=7)
        assert found.certified
        assert found.score == found.iou == best.score, seed
        assert found.formula is not None
        assert found.formula.n_leaves <= length
        mask = found.formula.evaluate(dict(zip(labels, masks, strict=True)))
        assert (found.area, found.intersection) == (mask.sum(), (mask & unit).sum())
        beaten += beam_search(tensor(unit), concepts, 2, length, mode="reference").iou < found.iou
    assert beaten or length < 3


def test_a_start_below_the_best_concept() -> None:
    masks, unit, labels, concepts = problem(1)
    start = beam_search(tensor(~unit), concepts, 1, 1)
    worse = replace(start, iou=1e-3, score=1e-3)
    for length in (1, 3):
        best, _ = exhaustive_search(tensor(unit), concepts, length)
        assert certified_search(tensor(unit), concepts, length, start=worse).iou == best.iou
    # One concept that is the unit: nothing longer is better.
    alone = ConceptMasks.from_masks(tensor(masks), labels)
    found = certified_search(tensor(masks[3]), alone, start=worse)
    assert found.formula == Leaf(labels[3])


def test_without_time_nothing_is_certified() -> None:
    _, unit, _, concepts = problem(0, n_concepts=9)
    start = beam_search(tensor(unit), concepts, 1, 1)
    found = certified_search(tensor(unit), concepts, start=start, time_limit=0)
    assert not found.certified
    assert found.iou >= start.iou
    assert certified_search(tensor(unit), concepts, start=start, time_limit=None).certified


def test_a_beam_that_is_optimal_remains_the_answer() -> None:
    _, unit, _, concepts = problem(0)
    start = beam_search(tensor(unit), concepts, 100)
    found = certified_search(tensor(unit), concepts)
    assert found.formula == start.formula
    assert found.beam == beam_search(tensor(unit), concepts).beam


def test_bounds_of_pairs_hold() -> None:
    for seed in range(12):
        masks, unit, _, concepts = problem(seed)
        pairs = _Pairs(concepts, UnitTable(concepts, concepts.unit_counts(tensor(unit))))
        loose = pairs.upper_bounds()
        tight = pairs.extension_bounds(torch.arange(len(loose)))
        assert len(loose) == 4 * 15
        for place in range(len(loose)):
            a, b = masks[pairs.a[place]], masks[pairs.b[place]]
            mask = (a | b, a & b, a & ~b)[pairs.op[place]]
            best = max(
                iou(extended, unit) for c in masks for extended in (mask | c, mask & c, mask & ~c)
            )
            assert best <= tight[place]
            assert tight[place] <= loose[place]


@pytest.mark.parametrize("length", [0, 4])
def test_only_three_concepts_are_certified(length: int) -> None:
    _, unit, _, concepts = problem(0)
    with pytest.raises(ValueError, match=f"not {length}"):
        certified_search(tensor(unit), concepts, length)


def test_too_many_formulas_to_enumerate() -> None:
    concepts = ConceptMasks.from_masks(torch.eye(100, dtype=torch.bool))
    with pytest.raises(ValueError, match="use certified_search"):
        exhaustive_search(torch.ones(100, dtype=torch.bool), concepts, 3)


def test_ceiling_is_the_best_set_of_signatures() -> None:
    for seed in range(12):
        _, unit, _, concepts = problem(seed, n_concepts=3)
        index = concepts.signatures.index_map
        assert index is not None
        size = len(concepts.signatures)
        sets = [np.isin(index.numpy(), np.flatnonzero(row)) for row in product((0, 1), repeat=size)]
        expected = max(iou(mask, unit) for mask in sets)
        assert iou_ceiling(tensor(unit), concepts) == expected
        assert certified_search(tensor(unit), concepts).iou <= expected
