import math
from typing import Any

import pytest
import torch

from lightning_modules.metrics.translation import gan_test_accuracy, gan_train_accuracy


def test_gan_test_looks_at_the_edited_attribute_alone() -> None:
    targets = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[1, 1], [0, 0]]])
    predictions = targets.clone()
    predictions[:, 0, 1] = 1 - predictions[:, 0, 1]  # not looked at
    predictions[0, 1, 1] = 0
    per_domain, mean = gan_test_accuracy(targets, predictions.double())
    assert per_domain.tolist() == pytest.approx([1, 2 / 3])
    assert mean.item() == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("targets", "predictions"),
    [((0, 2, 2), (0, 2, 2)), ((3, 2, 2), (3, 2, 1)), ((3, 2), (3, 2)), ((3, 2, 4), (3, 2, 4))],
)
def test_gan_test_errors(targets: tuple[int, ...], predictions: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, c, c\]"):
        gan_test_accuracy(torch.zeros(targets), torch.zeros(predictions))


def test_accuracy_per_attribute_and_per_class() -> None:
    logits = torch.tensor([[2.0, -1, 0.5], [-1, 3, -2], [0.1, 0.2, -0.3], [1, 0, -1]])
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]])
    per_attribute, mean = gan_train_accuracy(logits, labels, "multi_label")
    assert per_attribute.tolist() == [0.75, 0.75, 0.75]  # a logit of 0 is no
    assert mean.item() == 0.75
    per_class, mean = gan_train_accuracy(logits, torch.tensor([0, 1, 0, 0]), "single_label")
    assert per_class[:2].tolist() == pytest.approx([2 / 3, 1])
    assert math.isnan(per_class[2])
    assert mean.item() == 0.75


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "message"),
    [
        ((3, 2), (3, 3), "multi_label", r"shape \(3, 2\)"),
        ((3, 2), (3, 2), "single_label", r"shape \(3,\)"),
        ((0, 2), (0, 2), "multi_label", "at least one"),
        ((3, 2), (3, 2), "both", "unknown kind='both'"),
    ],
)
def test_accuracy_errors(logits: Any, labels: Any, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gan_train_accuracy(torch.zeros(logits), torch.zeros(labels), kind)
