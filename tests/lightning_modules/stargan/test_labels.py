import pytest
import torch

from lightning_modules.attributes import HAIR_COLOURS
from lightning_modules.stargan.labels import (
    class_targets,
    joint_label,
    one_hot,
    parse_edits,
    permute_targets,
    single_attribute_targets,
)

FIVE = ["Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"]


def test_vectors_and_class_targets() -> None:
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert one_hot(torch.tensor([1], dtype=torch.int32), 2).dtype == torch.float32
    targets = class_targets(2, 3)
    assert [target.argmax(1).tolist() for target in targets] == [[0, 0], [1, 1], [2, 2]]
    assert all(target.sum(1).tolist() == [1, 1] for target in targets)


def test_permutation_is_given_or_drawn() -> None:
    labels = torch.arange(6).view(3, 2)
    assert permute_targets(labels, torch.tensor([2, 0, 1])).tolist() == [[4, 5], [0, 1], [2, 3]]
    labels = torch.arange(100)
    draws = [permute_targets(labels, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0].sort().values.tolist() == labels.tolist()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert permute_targets(labels).sort().values.tolist() == labels.tolist()


def test_single_edits_in_several_groups() -> None:
    labels = torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 1, 1]])
    attributes = ["red", "green", "round", "square", "big"]
    targets = single_attribute_targets(labels, attributes, [["red", "green"], ["round", "square"]])
    first = [[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 1, 0, 1]]
    assert [target[0].tolist() for target in targets] == first
    second = [[1, 0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 1, 1, 0, 1], [0, 1, 0, 1, 1], [0, 1, 0, 1, 0]]
    assert [target[1].tolist() for target in targets] == second
    assert labels.tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 1, 1]]
    with pytest.raises(ValueError, match=r"\(2, 5\) for 4 attributes"):
        single_attribute_targets(labels, attributes[:4])
    with pytest.raises(ValueError, match="selected twice"):
        single_attribute_targets(labels, ["red", "red", "b", "c", "d"])


def test_joint_labels_of_three_datasets() -> None:
    dims, kinds = (2, 3, 1), ("multi_label", "single_label", "multi_label")
    first = joint_label(torch.tensor([[0, 1]]), 0, dims, kinds)  # type: ignore[arg-type]
    assert first.tolist() == [[0, 1, 0, 0, 0, 0, 1, 0, 0]]
    second = joint_label(torch.tensor([2, 0]), 1, dims, kinds)  # type: ignore[arg-type]
    assert second.tolist() == [[0, 0, 0, 0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0, 1, 0]]
    vectors = one_hot(torch.tensor([2, 0]), 3)
    assert torch.equal(joint_label(vectors, 1, dims, kinds), second)  # type: ignore[arg-type]
    third = joint_label(torch.tensor([[1]]), 2, dims, kinds)  # type: ignore[arg-type]
    assert third.tolist() == [[0, 0, 0, 0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("labels", "index", "kinds", "message"),
    [
        (torch.zeros(2, 2), 0, ["multi_label"], "2 dims and 1 kinds"),
        (torch.zeros(2, 2), 2, ["multi_label"] * 2, r"dataset_index=2 must be in 0\.\.1"),
        (torch.zeros(2, 2), -1, ["multi_label"] * 2, "dataset_index=-1"),
        (torch.zeros(2, 3), 0, ["multi_label"] * 2, r"\[B, 2\] for multi_label"),
        (torch.zeros(2), 0, ["multi_label"] * 2, r"shape \(2,\)"),
    ],
)
def test_joint_label_errors(labels: torch.Tensor, index: int, kinds: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint_label(labels, index, (2, 3), kinds)


# ------------------------------------------------------------------ named edits
@pytest.mark.parametrize(
    ("edits", "target"),
    [
        ("+Blond_Hair", [0, 1, 0, 1, 0]),
        ("Blond_Hair", [0, 1, 0, 1, 0]),
        (" + Young , -Male ", [1, 0, 0, 0, 1]),
        ("-Black_Hair", [0, 0, 0, 1, 0]),
        ("+Brown_Hair,-Black_Hair,+Young,", [0, 0, 1, 1, 1]),
        ("+Black_Hair", [1, 0, 0, 1, 0]),
        ("-Young", [1, 0, 0, 1, 0]),
    ],
)
def test_named_edits(edits: str, target: list[int]) -> None:
    source = torch.tensor([[1.0, 0, 0, 1, 0]])
    assert parse_edits(edits, FIVE)(source).tolist() == [target]
    assert source.tolist() == [[1, 0, 0, 1, 0]]


def test_edits_clear_two_colours_and_classes_are_one_group() -> None:
    source = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    assert parse_edits("+Brown_Hair", FIVE)(source).tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 1]]
    classes = ["angry", "happy", "sad"]
    assert parse_edits("sad", classes, classes)(torch.eye(3)).tolist() == [[0, 0, 1]] * 3
    assert parse_edits("-5", ["-5", "5"])(torch.zeros(1, 2)).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ("", "names no attribute"),
        (" , ", "names no attribute"),
        ("+Smilling", r"no attribute 'Smilling'; there are Black_Hair"),
        ("-young", "did you mean Young"),
        ("+Blond Hair", "did you mean Blond_Hair"),
        ("+", "no attribute ''"),
        ("+Male,-Male", "'Male' is edited twice"),
        ("+Black_Hair,+Blond_Hair", "Black_Hair and Blond_Hair exclude each other"),
    ],
)
def test_edit_errors(edits: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_edits(edits, FIVE, HAIR_COLOURS)


def test_edits_of_labels_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 5\]"):
        parse_edits("+Male", FIVE)(torch.zeros(2, 4))
