import math

import pytest
import torch

from lightning_modules.dissection.analysis import (
    accuracy_when_firing,
    consistency,
    iou_accuracy_correlation,
    unit_type,
    word_similarity,
)
from lightning_modules.dissection.formulas import And, Formula, Leaf, Not, Or

SKY, SEA, DOG, RED = map(Leaf, range(4))
VECTORS = {
    "sky": torch.tensor([1.0, 0.1]),
    "sea": torch.tensor([1.0, 0.0]),
    "dog": torch.tensor([0.0, 1.0]),
}
LEXICAL = word_similarity(dict(enumerate(["sky", "sea", "dog", "red"])), VECTORS)


def looks(a: int, b: int) -> float:
    return 1.0 if {a, b} == {1, 2} else 0.0


def test_accuracy_and_silent_units() -> None:
    firing = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1]]).bool()
    found = accuracy_when_firing(firing, torch.tensor([True, False, False]))
    assert found[[0, 2]].tolist() == [0.5, 0.5]
    assert found[1].isnan()
    with pytest.raises(ValueError, match="must be the same"):
        accuracy_when_firing(firing, torch.ones(2))


def test_correlation_leaves_silent_units_out() -> None:
    iou = torch.tensor([0.1, 0.2, 0.9, 0.3])
    r, p = iou_accuracy_correlation(iou, torch.tensor([0.5, 0.6, math.nan, 0.7]))
    assert r == pytest.approx(1)
    assert p < 1e-3
    assert math.isnan(iou_accuracy_correlation(iou[:2], torch.tensor([0.5, math.nan]))[0])
    assert math.isnan(iou_accuracy_correlation(iou, torch.ones(4))[0])
    with pytest.raises(ValueError, match="of the same units"):
        iou_accuracy_correlation(iou, torch.ones(3))


def test_consistency_is_the_mean_over_known_pairs() -> None:
    assert consistency(SKY, LEXICAL) == 1
    near = LEXICAL(0, 1)
    assert consistency(Or(SKY, RED), LEXICAL) == 0
    assert consistency(Or(Or(SKY, SEA), RED), LEXICAL) == pytest.approx(near)
    expected = (near + LEXICAL(0, 2) + LEXICAL(1, 2)) / 3
    assert consistency(And(Or(SKY, SEA), Not(DOG)), LEXICAL) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (None, "silent"),
        (SKY, "single concept"),
        (And(SKY, Not(DOG)), "specialisation"),
        (And(And(SKY, RED), DOG), "specialisation"),
        (Or(SKY, SEA), "lexical abstraction"),
        (And(Or(SKY, SEA), Not(RED)), "lexical abstraction"),
        (Or(SEA, DOG), "perceptual abstraction"),
        (Or(SKY, DOG), "polysemantic"),
        (Or(SKY, RED), "polysemantic"),
        (Or(And(SKY, RED), DOG), "polysemantic"),
    ],
)
def test_types(formula: Formula | None, expected: str) -> None:
    assert unit_type(formula, LEXICAL, looks) == expected


def test_without_looks_nothing_is_perceptual() -> None:
    assert unit_type(Or(SEA, DOG), LEXICAL) == "polysemantic"
    assert unit_type(Or(SEA, DOG), LEXICAL, threshold=-1) == "lexical abstraction"
