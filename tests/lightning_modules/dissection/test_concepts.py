"""Signatures, concepts and unit counts against the masks they are made of."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.formulas import And, Leaf, Neighbors, Not, Or
from lightning_modules.dissection.masks import label_layers, rasterize_concepts
from lightning_modules.dissection.search import beam_search
from lightning_modules.dissection.signatures import (
    SignatureBuilder,
    Signatures,
    UnitCounts,
    unique_signatures,
)
from tests.lightning_modules.dissection.brute_force import random_problem, tensor


def records(n: int = 9, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "object": [rng.integers(0, 4, (5, 5)).tolist()],
            "part": [(rng.integers(0, 3, (5, 5)) * 3).tolist() for _ in range(i % 3)],
            "scene": [int(rng.integers(7, 9))],
        }
        for i in range(n)
    ]


def dense(signatures: Signatures, n_concepts: int) -> torch.Tensor:
    members = torch.zeros(len(signatures), n_concepts, dtype=torch.bool)
    members[signatures.owners, signatures.indices] = True
    return members


@pytest.mark.parametrize("n_concepts", [0, 1, 5, 64, 130])
def test_signatures_are_the_distinct_columns(n_concepts: int) -> None:
    masks = tensor(np.random.default_rng(0).random((n_concepts, 300)) < 0.02)
    signatures = unique_signatures(masks)
    members = dense(signatures, n_concepts)
    assert signatures.index_map is not None
    assert torch.equal(members[signatures.index_map].T, masks)
    assert len({tuple(row) for row in members.tolist()}) == len(members)
    assert torch.equal(signatures.weights, signatures.index_map.bincount())


def test_no_position_is_an_error() -> None:
    with pytest.raises(ValueError, match="have no position"):
        unique_signatures(torch.zeros(3, 0))


def test_streamed_signatures_are_those_of_all_masks() -> None:
    labels, masks = rasterize_concepts(records(), (5, 5))
    whole = ConceptMasks.from_masks(masks, labels)
    builder = SignatureBuilder(labels)
    numbers = [builder.add(label_layers(part, (5, 5))) for part in (records()[:4], records()[4:])]
    signatures = builder.signatures()
    assert torch.equal(builder.add(label_layers(records()[4:], (5, 5)), count=False), numbers[1])
    assert torch.equal(builder.signatures().weights, signatures.weights)
    assert len(signatures) == len(builder) == len(whole.signatures)
    members = dense(signatures, len(labels))[torch.cat(numbers).flatten()]
    assert torch.equal(members.T, masks.flatten(1))
    streamed = ConceptMasks(labels, signatures)
    assert torch.equal(streamed.areas, whole.areas)
    assert torch.equal(streamed.pair_intersections(), whole.pair_intersections())


def test_processes_merge_to_the_same_answer() -> None:
    labels, masks = rasterize_concepts(records(), (5, 5))
    units = torch.rand(3, 9, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.2
    whole = ConceptMasks.from_masks(masks, labels)
    builders, counters = [], []
    for rank in range(2):
        builder, counter = SignatureBuilder(labels), UnitCounts(3)
        for image in range(rank, 9, 2):
            numbers = builder.add(label_layers(records()[image : image + 1], (5, 5)))
            counter.add(units[:, image : image + 1], numbers)
        builders.append(builder)
        counters.append(counter)
    other = UnitCounts(3)
    other.load_state_dict(counters[1].state_dict())
    counters[0].merge(other, builders[0].merge(builders[1].signatures()))
    merged = ConceptMasks(labels, builders[0].signatures())
    assert merged.n_positions == 225
    for unit in range(3):
        counts = counters[0].unit(unit, len(merged.signatures))
        assert counts.sum() == units[unit].sum()
        assert beam_search(counts, merged) == beam_search(units[unit], whole)


def test_unknown_label_in_a_map() -> None:
    builder = SignatureBuilder([1, 2, 7])
    with pytest.raises(ValueError, match=r"labels \[5, 9\] of the label maps are not among the 3"):
        builder.add(torch.tensor([[[5, 1, 9, 0]]]))


@pytest.mark.parametrize("labels", [[2, 1], [1, 1], [0, 1]])
def test_labels_ascend(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending and at least 1"):
        SignatureBuilder(labels)


def test_images_without_any_label() -> None:
    builder = SignatureBuilder([1])
    assert builder.add(torch.zeros(2, 0, 3, 3, dtype=torch.long)).shape == (2, 3, 3)
    assert builder.signatures().weights.tolist() == [18]
    counts = UnitCounts(1)
    counts.add(torch.zeros(1, 2, 3, 3, dtype=torch.bool), torch.zeros(2, 3, 3, dtype=torch.long))
    assert counts.unit(0, 1).tolist() == [0]


def test_unit_masks_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"must be \(2, 3, 3\)"):
        UnitCounts(2).add(torch.zeros(2, 4, 3, dtype=torch.bool), torch.zeros(3, 3).long())


def test_counts_are_those_of_the_masks() -> None:
    for seed in range(4):
        masks, unit = random_problem(seed)
        concepts = ConceptMasks.from_masks(tensor(masks))
        assert concepts.areas.tolist() == masks.sum(1).tolist()
        pairs = masks.astype(int) @ masks.T.astype(int)
        assert concepts.pair_intersections().tolist() == pairs.tolist()
        blocks = concepts.incidence.pair_counts(concepts.signatures.weights, block=5)
        assert blocks.tolist() == pairs.tolist()
        assert concepts.unit_counts(tensor(unit)).sum() == unit.sum()


def test_formulas_on_signatures() -> None:
    masks, _ = random_problem(0)
    concepts = ConceptMasks.from_masks(tensor(masks), [3, 5, 8, 9, 11, 20])
    formula = And(Or(Leaf(3), Leaf(20)), Not(Leaf(8)))
    index = concepts.signatures.index_map
    assert index is not None
    expected = (masks[0] | masks[5]) & ~masks[2]
    assert concepts.signature_mask(formula)[index].tolist() == expected.tolist()


def test_fingerprints_differ_where_masks_do() -> None:
    masks, _ = random_problem(0, n_concepts=3)
    concepts = ConceptMasks.from_masks(tensor(masks))
    rows = [concepts.incidence.row(row) for row in range(3)]
    both, prints = concepts.measure([Leaf(0)], rows[:1])
    assert both[0].tolist() == (masks & masks[0]).sum(1).tolist()
    assert prints[0, 0] == concepts.fingerprints[0]
    assert len({*concepts.fingerprints.tolist(), *prints[0, 1:].tolist()}) == 5


def test_images_with_a_concept() -> None:
    masks = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    masks[1, 0, 0, 0] = masks[1, 2, 1, 1] = True
    concepts = ConceptMasks.from_masks(masks, [1, 4], {1: "sky", 4: "sea"})
    assert concepts.images_with("sea") == [0, 2]
    assert concepts.images_with("sky") == []
    with pytest.raises(KeyError, match="no concept has the name 'sun'"):
        concepts.images_with("sun")
    with pytest.raises(ValueError, match="do not know their images"):
        ConceptMasks.from_masks(masks.flatten(1)).images_with("sea")


def test_a_file_brings_everything_back(tmp_path: Path) -> None:
    masks, unit = random_problem(0)
    atoms = [Leaf(0), Neighbors(Leaf(0)), *map(Leaf, range(1, 5))]
    names, categories = {0: "a, (b)"}, list("aabbcc")
    concepts = ConceptMasks.from_masks(tensor(masks).view(6, 9, 2, 5), atoms, names, categories)
    concepts.save(tmp_path / "concepts.pt")
    again = ConceptMasks.load(tmp_path / "concepts.pt")
    assert (again.atoms, again.names, again.categories) == (concepts.atoms, names, categories)
    assert again.presence is not None
    assert torch.equal(again.presence, concepts.presence)
    assert beam_search(tensor(unit), again) == beam_search(tensor(unit), concepts)


def test_concepts_that_do_not_fit() -> None:
    masks = torch.eye(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="as many labels, not 2"):
        ConceptMasks.from_masks(masks, [1, 2])
    with pytest.raises(ValueError, match="labels repeat"):
        ConceptMasks.from_masks(masks, [1, 2, 2])
    with pytest.raises(ValueError, match="3 concepts need 3 categories"):
        ConceptMasks.from_masks(masks, categories=["a"])
    with pytest.raises(ValueError, match="name concept 2, but there are 2"):
        ConceptMasks([1, 2], unique_signatures(masks))
    huge = Signatures(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([2**53]))
    with pytest.raises(ValueError, match="cannot be counted exactly"):
        ConceptMasks([1], huge)
    streamed = ConceptMasks([1], Signatures(*(torch.tensor(x) for x in ([0, 1], [0], [4]))))
    with pytest.raises(ValueError, match="were streamed"):
        streamed.unit_counts(torch.ones(4, dtype=torch.bool))
