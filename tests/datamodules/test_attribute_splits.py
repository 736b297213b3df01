import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from datamodules.attribute_splits import (
    balanced_label_split,
    identity_label_split,
    reference_celeba_split,
)
from lightning_modules.attributes import enumerate_label_space, label_ids

ATTRIBUTES = ["Black_Hair", "Blond_Hair", "Male"]
SPACE = enumerate_label_space(ATTRIBUTES)


def rows(n: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (n, 3), generator=generator) * 2 - 1
    return labels, torch.randint(0, 3, (n,), generator=generator)


# ------------------------------------------------------------------ balanced labels
def test_rounds_over_the_classes_in_file_order() -> None:
    labels, partition = rows()
    split = balanced_label_split(labels, partition, 20, SPACE)
    classes = label_ids((labels > 0).float(), SPACE)
    for k in range(6):
        members = [i + 1 for i in range(300) if partition[i] == 0 and classes[i] == k]
        assert split.labelled_ids[split.labelled_class == k].tolist() == members[:4]
    assert len(split.labelled_ids) == 24
    pools = set(split.labelled_ids.tolist()), set(split.unlabelled_ids.tolist())
    sensible = {i + 1 for i in range(300) if partition[i] == 0 and classes[i] >= 0}
    assert pools[0] | pools[1] == sensible
    assert not pools[0] & pools[1]
    assert split.test_ids.tolist() == [i + 1 for i in range(300) if partition[i] == 2]


def test_splits_are_nested_and_zeros_do_as_well_as_minus_ones() -> None:
    labels, partition = rows()
    before: set[int] = set()
    for wanted in (1, 6.5, 30, 60, 10**6):
        split = balanced_label_split((labels > 0).long(), partition.tolist(), wanted, SPACE)
        found = set(split.labelled_ids.tolist())
        assert before <= found
        assert len(found) >= min(wanted, len(found | set(split.unlabelled_ids.tolist())))
        before = found
    assert not len(split.unlabelled_ids)


def test_a_class_that_runs_out_is_skipped() -> None:
    labels = SPACE[torch.tensor([0, 1, 1, 1, 1, 0])]
    split = balanced_label_split(labels, torch.zeros(6), 5, SPACE)
    assert Counter(split.labelled_class.tolist()) == {0: 2, 1: 3}
    assert split.unlabelled_ids.tolist() == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partition": [0, 1]}, "3 labels and 2 partition"),
        ({"partition": [0, 1, 3]}, r"partition has \[3\]"),
        ({"n_labelled": 0}, "n_labelled=0"),
        ({"n_labelled": float("nan")}, "n_labelled=nan"),
        ({"partition": [2, 2, 2]}, "no training image"),
        ({"labels": torch.zeros(3, 2)}, "2 attributes"),
    ],
)
def test_balanced_split_errors(change: dict, message: str) -> None:
    given = {"labels": SPACE[:3], "partition": [0, 0, 0], "n_labelled": 2, "label_space": SPACE}
    with pytest.raises(ValueError, match=message):
        balanced_label_split(**{**given, **change})


# ------------------------------------------------------------------ identities and CelebA
def test_identity_split_is_a_shuffle_of_the_distinct_people() -> None:
    people = [f"{i:02}" for i in range(13)]
    labelled, unlabelled = identity_label_split([p for p in people for _ in range(3)], 20, seed=7)
    random.Random(7).shuffle(people)
    assert (labelled, unlabelled) == (people[:3], people[3:])
    assert identity_label_split(people, 100)[1] == []


@pytest.mark.parametrize("percent", [0, -1, 101, float("nan")])
def test_identity_split_errors(percent: float) -> None:
    with pytest.raises(ValueError, match="percent"):
        identity_label_split(["a"], percent)
    with pytest.raises(ValueError, match=r"--data\.root"):
        identity_label_split([], 10)


def test_reference_celeba_split_is_a_partition() -> None:
    train, test = reference_celeba_split(3000, seed=5)
    assert len(test) == 1999
    assert sorted(train + test) == list(range(1, 3001))
    assert reference_celeba_split(3000, seed=6)[1] != test
    assert [len(part) for part in reference_celeba_split(100)] == [0, 100]
    with pytest.raises(ValueError, match=r"--data\.root"):
        reference_celeba_split(0)
