import itertools
import math

import numpy as np
import pytest
import torch

from lightning_modules.dissection.formulas import And, Formula, Leaf, Neighbors, Not, Or
from lightning_modules.dissection.nli import (
    feature_neighbors,
    nearest_neighbors,
    neighbor_mask,
    overlap_ratio,
    pmi,
    sentence_concepts,
    sentence_features,
    sentence_search,
)

WORDS = ["dog", "puppy", "cat", "man", "nobody"]
VECTORS = {
    "dog": [1.0, 0.0],
    "puppy": [2.0, 0.1],
    "hound": [1.0, 0.02],
    "cat": [1.0, 1.0],
    "man": [0.0, 1.0],
}
NAMES = [f"{part}:tok:{word}" for part in ("pre", "hyp") for word in WORDS] + ["pre:tag:nn"]


def features(n: int = 60, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((n, len(NAMES))) < 0.25)


# ------------------------------------------------------------------ features
def test_features_of_a_pair() -> None:
    pairs = [("a dog sleeps", "the dog"), ("man", ["man"])]
    tags = [(["DT", "nn", "tag:VBZ"], ["DT", "NN"]), (["NN"], ["NN"])]
    found = sentence_features(pairs, tags, n_tokens=2)
    # Both words occur twice: the first seen comes first; `sleeps` is the third.
    assert found.names == [
        *("pre:tok:dog", "pre:tok:man", "hyp:tok:dog", "hyp:tok:man"),
        *("pre:tag:dt", "pre:tag:nn", "pre:tag:vbz", "hyp:tag:dt", "hyp:tag:nn"),
        *("oth:overlap:overlap25", "oth:overlap:overlap50", "oth:overlap:overlap75"),
    ]
    assert found.values.int().tolist() == [
        [1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1],
    ]
    assert found.overlap.tolist() == pytest.approx([1 / 3, 1e5], rel=1e-4)


def test_padding_counts_only_on_demand() -> None:
    assert overlap_ratio("a b", "a b c") == pytest.approx(2, rel=1e-4)
    assert overlap_ratio("a b", "a b c", include_pad=True) == pytest.approx(1, rel=1e-4)
    assert overlap_ratio("a b", "a c", include_pad=True) == overlap_ratio("a b", "a c")


def test_every_pair_has_tags() -> None:
    with pytest.raises(ValueError, match="2 sentence pairs need as many pairs of tags, not 1"):
        sentence_features([("a", "b")] * 2, [(["x"], ["y"])])


# ------------------------------------------------------------------ neighbours
def test_nearest_words() -> None:
    assert nearest_neighbors("dog", VECTORS, 3) == ["hound", "puppy", "cat"]
    assert nearest_neighbors("dog", VECTORS, 9) == ["hound", "puppy", "cat", "man"]
    assert nearest_neighbors("nobody", VECTORS) == []
    # Two words with one vector are neighbours; neither is its own.
    twins = {"a": [1.0, 0.0], "b": [1.0, 0.0], "c": [0.0, 1.0]}
    assert nearest_neighbors("b", twins, 2) == ["a", "c"]


def test_neighbours_stay_in_their_part_and_are_features() -> None:
    near = feature_neighbors(NAMES, VECTORS, k=2)
    assert [NAMES[i] for i in near[0]] == ["pre:tok:puppy"]
    assert [NAMES[i] for i in near[5]] == ["hyp:tok:puppy"]
    assert near[4] == near[10] == []
    short = [name.replace("tok:", "") for name in NAMES]
    assert feature_neighbors(short, VECTORS, k=2) == near


def test_released_lookup_finds_nothing() -> None:
    assert not any(feature_neighbors(NAMES, VECTORS, released=True).values())


def test_neighbor_mask() -> None:
    values = features()
    mask = neighbor_mask("hyp:tok:cat", values, NAMES, VECTORS, k=2)
    assert torch.equal(mask, values[:, 7] | values[:, 6])
    with pytest.raises(ValueError, match="'hyp:tok:bird' is none of the 11 features"):
        neighbor_mask("hyp:tok:bird", values, NAMES, VECTORS)


# ------------------------------------------------------------------ search
def reference(
    unit: np.ndarray, masks: dict[Formula, np.ndarray], size: int, length: int, penalty: float
) -> list[tuple[Formula, float]]:
    """The released rules over leaves and their NEIGHBORS."""

    def evaluate(formula: Formula) -> np.ndarray:
        if isinstance(formula, Or):
            return evaluate(formula.left) | evaluate(formula.right)
        if isinstance(formula, And):
            return evaluate(formula.left) & evaluate(formula.right)
        return ~evaluate(formula.operand) if isinstance(formula, Not) else masks[formula]

    def scored(formula: Formula) -> tuple[Formula, float]:
        mask = evaluate(formula)
        inside, union = int((mask & unit).sum()), int((mask | unit).sum())
        iou = inside / (union + float(np.finfo(np.float32).tiny))
        return formula, penalty ** (formula.length_reference - 1) * iou

    def top(entries: list[tuple[Formula, float]]) -> list[tuple[Formula, float]]:
        return sorted(entries, key=lambda entry: -entry[1])[:size]

    atoms = [entry for entry in map(scored, masks) if entry[1] > 0]
    right = [Leaf(formula.leaves()[0]) for formula, _ in atoms]
    beam = top(atoms)
    for _ in range(length - 1):
        beam = top(
            beam
            + [
                scored(made)
                for formula, _ in beam
                for leaf in right
                for made in (Or(formula, leaf), And(formula, leaf), And(formula, Not(leaf)))
            ]
        )
    return beam


@pytest.mark.parametrize(("size", "length", "penalty"), [(4, 3, 1.0), (10, 2, 0.9), (2, 4, 1.0)])
def test_reference_beam_is_that_of_brute_force(size: int, length: int, penalty: float) -> None:
    for seed in range(8):
        values = features(seed=seed)
        near = feature_neighbors(NAMES, VECTORS)
        masks: dict[Formula, np.ndarray] = {}
        for column in range(len(NAMES)):
            masks[Leaf(column)] = values[:, column].numpy()
            masks[Neighbors(Leaf(column))] = values[:, [column, *near[column]]].any(1).numpy()
        unit = values[:, seed % 5] | (values[:, 7] & ~values[:, 3])
        activations = unit.float() * torch.rand(60)
        concepts = sentence_concepts(values, NAMES, VECTORS, mode="reference")
        found = sentence_search(activations, concepts, size, length, penalty, min_activations=0)
        expected = reference((activations > 0).numpy(), masks, size, length, penalty)
        assert found.beam == expected, seed


def test_neighbours_are_operands_like_any_other() -> None:
    values = features(200)
    unit = values[:, 3] & (values[:, 5] | values[:, 6])
    # k=2: puppy is the only feature near dog.
    concepts = sentence_concepts(values, NAMES, VECTORS, k=2)
    found = sentence_search(unit.float(), concepts, max_length=2, min_activations=1)
    assert found.score == 1
    assert found.formula is not None
    text = found.formula.to_str(NAMES.__getitem__)
    assert text in (
        "((NEIGHBORS hyp:tok:dog) AND pre:tok:man)",
        "(pre:tok:man AND (NEIGHBORS hyp:tok:dog))",
    )
    columns = {i: values[:, i] for i in range(len(NAMES))}
    assert torch.equal(found.formula.evaluate(columns, concepts.neighbors), unit)
    without = sentence_concepts(values, NAMES, VECTORS, k=2, released_neighbors=True)
    assert sentence_search(unit.float(), without, max_length=2, min_activations=1).score < 1


def test_only_words_with_neighbours_have_the_operator() -> None:
    concepts = sentence_concepts(features(), NAMES, VECTORS, k=2).concepts
    operators = [atom for atom in concepts.atoms if isinstance(atom, Neighbors)]
    assert {NAMES[atom.leaves()[0]].split(":")[2] for atom in operators} == {
        *("dog", "puppy", "cat", "man")
    }
    assert len(sentence_concepts(features(), NAMES, VECTORS, mode="reference").concepts) == 22


def test_rare_units_have_no_formula() -> None:
    concepts = sentence_concepts(features(), NAMES)
    activations = torch.zeros(60)
    activations[:7] = 1
    found = sentence_search(activations, concepts, min_activations=8)
    assert (found.formula, found.score, found.unit_area) == (None, 0.0, 7)
    assert sentence_search(activations, concepts, min_activations=7).formula is not None


def test_alpha_is_a_quantile() -> None:
    concepts = sentence_concepts(features(), NAMES)
    activations = torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.1
    found = sentence_search(activations, concepts, alpha=0.2, min_activations=1)
    assert found.unit_area == 12


def test_metric_is_what_is_maximised() -> None:
    values = features()
    unit = values[:, 1] & values[:, 2]
    concepts = sentence_concepts(values, NAMES)
    options = {"max_length": 2, "min_activations": 1}
    covered = sentence_search(unit.float(), concepts, metric="coverage_of_unit", **options)  # type: ignore[arg-type]
    assert covered.score == 1
    assert covered.area > covered.intersection == unit.sum()
    assert covered.iou == covered.intersection / covered.area
    parity = sentence_search(unit.float(), concepts, metric="recall", **options)  # type: ignore[arg-type]
    assert parity.intersection == parity.area


def test_one_activation_per_pair() -> None:
    with pytest.raises(ValueError, match=r"must be one per pair, \[60\]"):
        sentence_search(torch.zeros(59), sentence_concepts(features(), NAMES))
    with pytest.raises(ValueError, match="one column per name"):
        sentence_concepts(features(), NAMES[:-1])


# ------------------------------------------------------------------ PMI
def test_pmi_of_events() -> None:
    values = features(300)
    labels = torch.randint(-1, 3, (300,), generator=torch.Generator().manual_seed(0))
    found = pmi(values, labels, 3)
    gold = labels >= 0
    n = int(gold.sum())
    for column, label in itertools.product(range(len(NAMES)), range(3)):
        has, of = values[gold, column], labels[gold] == label
        joint = int((has & of).sum())
        expected = math.log(joint * n / (int(has.sum()) * int(of.sum())))
        assert found[column, label] == pytest.approx(expected)


def test_pmi_of_what_never_meets() -> None:
    values = torch.tensor([[True, False], [False, False]])
    found = pmi(values, torch.tensor([0, 1]), 2)
    assert found[0].tolist() == [pytest.approx(math.log(2)), -math.inf]
    assert found[1].isnan().all()
    assert torch.equal(pmi(values, torch.tensor([0, 1]), 2, 100.0).isfinite(), torch.ones(2, 2) > 0)


def test_pmi_of_unknown_classes() -> None:
    with pytest.raises(ValueError, match="label 2 is none of the 2 classes"):
        pmi(torch.ones(1, 1), torch.tensor([2]), 2)
    with pytest.raises(ValueError, match="of the same pairs"):
        pmi(torch.ones(2, 1), torch.tensor([0]), 2)
