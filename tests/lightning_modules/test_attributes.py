from itertools import product

import pytest
import torch

from lightning_modules.attributes import (
    HAIR_COLOURS,
    attribute_index,
    enumerate_label_space,
    exclusive_indices,
    label_ids,
    observed_label_space,
)

FIVE = ["Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"]


@pytest.mark.parametrize("hair", [0, 1, 2, 3, 4])
def test_label_space_is_the_filtered_product_for_any_number_of_hair_colours(hair: int) -> None:
    attributes = ["Male", *HAIR_COLOURS[:hair], "Young"]
    expected = [row for row in product((0, 1), repeat=hair + 2) if sum(row[1:-1]) <= 1]
    assert enumerate_label_space(attributes).tolist() == [list(map(float, row)) for row in expected]


def test_several_groups_and_more_than_one_at_once() -> None:
    attributes = ["red", "round", "green", "square", "blue", "big"]
    groups = [["red", "green", "blue", "pink"], ["round", "square"]]
    assert exclusive_indices(attributes, groups) == [[0, 2, 4], [1, 3]]
    assert exclusive_indices(attributes, HAIR_COLOURS) == []
    assert len(enumerate_label_space(attributes, groups)) == 4 * 3 * 2
    assert len(enumerate_label_space(attributes, groups, at_most=2)) == 7 * 4 * 2
    assert (
        len(enumerate_label_space([str(i) for i in range(200)], [str(i) for i in range(200)]))
        == 201
    )


@pytest.mark.parametrize(
    ("attributes", "options", "message"),
    [
        ([], {}, "--data.attributes"),
        (["a", "b", "a"], {}, "'a' is selected twice"),
        (["a"], {"at_most": 0}, "at_most=0"),
        ([str(i) for i in range(17)], {}, "more than 65536"),
        (["a"], {"exclusive": [["a", "b"], ["a"]]}, "two exclusive groups"),
        (["a"], {"exclusive": "ab"}, "list of names"),
    ],
)
def test_label_space_errors(attributes: list[str], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enumerate_label_space(attributes, **options)


def test_label_ids_in_any_space() -> None:
    space = enumerate_label_space(FIVE)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert label_ids(space[order], space).tolist() == order.tolist()
    assert label_ids(space, space[order])[order].tolist() == list(range(16))
    two_colours = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert label_ids(two_colours, space).tolist() == [-1, 1]
    assert label_ids(space[:0], space).tolist() == []


def test_label_id_errors() -> None:
    space = enumerate_label_space(["a", "b"])
    with pytest.raises(ValueError, match="3 attributes, the label space has 2"):
        label_ids(torch.zeros(1, 3), space)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        label_ids(torch.tensor([[-1, 1]]), space)


def test_observed_labels_come_in_the_order_of_the_label_space() -> None:
    space = enumerate_label_space(FIVE)
    kept = [0, 3, 4, 11, 15]
    labels = space[torch.tensor([15, 3, 0, 11, 3, 4, 4])]
    assert torch.equal(observed_label_space(labels), space[kept])


def test_unknown_attributes_are_named_with_near_ones() -> None:
    assert attribute_index("Male", FIVE) == 3
    with pytest.raises(ValueError, match=r"no attribute 'black hair'; did you mean Black_Hair or"):
        attribute_index("black hair", FIVE)
    with pytest.raises(
        ValueError, match="'zzz'; there are Black_Hair, Blond_Hair, Brown_Hair, Male"
    ):
        attribute_index("zzz", FIVE)
