import pytest
import torch

from lightning_modules.dissection.scores import (
    best_category,
    best_labels,
    formula_score,
    iou_from_counts,
    netdissect_counts,
    netdissect_scores,
)

GENERATOR = torch.Generator().manual_seed(0)
UNITS = torch.rand(4, 6, 3, 3, generator=GENERATOR) < 0.2
UNITS[3] = False
CONCEPTS = torch.rand(5, 6, 3, 3, generator=GENERATOR) < 0.15
CATEGORIES = ["object", "color", "object", "color", "scene"]
CONCEPTS[4] = (torch.arange(6) % 2 == 0)[:, None, None]
CONCEPTS[1, :3] = CONCEPTS[3, :3] = False


def brute(scope: str, unit: int, concept: int) -> tuple[int, int, int]:
    own = [c for c in range(5) if CATEGORIES[c] == CATEGORIES[concept]]
    labelled = CONCEPTS[own].any(0)
    counted = 0
    for image in range(6):
        mask = UNITS[unit, image]
        counts = {
            "all": True,
            "category": bool(labelled[image].any()),
            "active": bool((labelled[image] & mask).any()),
        }[scope]
        counted += int(mask.sum()) * counts
    both = int((UNITS[unit] & CONCEPTS[concept]).sum())
    return both, counted, int(CONCEPTS[concept].sum())


@pytest.mark.parametrize("scope", ["all", "category", "active"])
def test_scopes(scope: str) -> None:
    counts = netdissect_counts(UNITS, CONCEPTS, CATEGORIES, scope)  # type: ignore[arg-type]
    scores = netdissect_scores(UNITS, CONCEPTS, CATEGORIES, scope)  # type: ignore[arg-type]
    for unit in range(4):
        for concept in range(5):
            both, area, whole = brute(scope, unit, concept)
            found = (counts.intersection, counts.unit_area, counts.area)
            assert [int(x[unit, concept]) for x in found] == [both, area, whole]
            assert scores[unit, concept] == both / (area + whole - both + 1e-10)


def test_scopes_differ_here() -> None:
    scopes = ("all", "category", "active")
    scores = [netdissect_scores(UNITS, CONCEPTS, CATEGORIES, scope) for scope in scopes]
    assert not torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[1], scores[2])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="scope='image'"):
        netdissect_scores(UNITS, CONCEPTS, CATEGORIES, "image")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="have no categories"):
        netdissect_scores(UNITS, CONCEPTS, scope="category")
    with pytest.raises(ValueError, match="over the 54 positions"):
        netdissect_scores(UNITS[:, :5], CONCEPTS)
    with pytest.raises(ValueError, match="metric='f1'"):
        formula_score(torch.ones(1), torch.ones(1), 1, "f1")  # type: ignore[arg-type]


def test_first_label_and_last_category_of_equal_ones() -> None:
    iou = torch.tensor([[0.2, 0.5, 0.2, 0.5, 0.5], [0.0, 0.1, 0.3, 0.2, 0.0]])
    table = best_labels(iou.double(), CATEGORIES, list("abcde"))
    assert {key: label for key, (label, _) in table[0].items()} == {
        "object": "a",
        "color": "b",
        "scene": "e",
    }
    assert best_category(table[0]) == "scene"
    assert table[1]["object"][0] == "c"
    assert best_category(table[1]) == "object"


def test_large_counts_are_exact() -> None:
    one, two = torch.tensor(2**40 + 1), torch.tensor(2**41)
    assert iou_from_counts(one, two, 2**41).item() == (2**40 + 1) / (2**42 - 2**40 - 1 + 1e-10)


def test_coverage() -> None:
    inside, area, unit = torch.tensor([6, 0]), torch.tensor([8, 0]), 12
    assert formula_score(inside, area, unit, "coverage_of_unit").tolist() == [0.5, 0]
    assert formula_score(inside, area, unit, "coverage_of_formula").tolist() == [0.75, 0]
