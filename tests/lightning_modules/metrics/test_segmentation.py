import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.metrics.segmentation import (
    SegmentationScores,
    confusion_matrix,
    decode_color_labels,
    mean_iou,
    segmentation_scores,
)

LABELS = torch.tensor([[[0, 0, 1], [1, 1, 255]]])
PREDS = torch.tensor([[[0, 2, 1], [1, 0, 7]]])


def test_by_hand() -> None:
    scores = segmentation_scores(LABELS, PREDS, 4)
    assert scores["confusion"].tolist() == [[1, 0, 1, 0], [1, 2, 0, 0], [0] * 4, [0] * 4]
    assert scores["confusion"].dtype == torch.long
    assert scores["per_class_acc"].tolist() == pytest.approx([1 / 2, 2 / 3, 0, 0])
    assert scores["per_class_iou"].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])
    means = {name: value for name, value in scores.items() if isinstance(value, float)}
    assert means == pytest.approx(
        {
            "pixel_acc": 3 / 5,
            "class_acc": (1 / 2 + 2 / 3) / 4,
            "class_iou": (1 / 3 + 2 / 3) / 4,
            # Class 2 is predicted but never there, class 3 is nowhere.
            "class_acc_present": (1 / 2 + 2 / 3) / 2,
            "class_iou_present": (1 / 3 + 2 / 3 + 0) / 3,
        }
    )


def test_mean_iou_leaves_absent_classes_out() -> None:
    found = mean_iou(LABELS, PREDS, 4)
    assert found["miou"] == pytest.approx((1 / 3 + 2 / 3) / 3)
    assert found["iou"][:3].tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert math.isnan(found["iou"][3])
    assert found["confusion"].sum() == 5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_many_classes_in_small_types(dtype: torch.dtype) -> None:
    # 200 * 254 overflows a byte.
    labels = torch.tensor([200, 3, 255]).to(dtype)
    preds = torch.tensor([253, 3, 0]).to(dtype)
    confusion = confusion_matrix(labels, preds, 254)
    assert confusion.nonzero().tolist() == [[3, 3], [200, 253]]


def test_what_is_ignored() -> None:
    assert confusion_matrix(LABELS, PREDS.clamp(max=2), 256, None)[255, 2] == 1
    # An ignored class among the K ones keeps its column: predicting it is an error.
    confusion = confusion_matrix(torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), 3, 2)
    assert confusion.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "preds", "message"),
    [
        (LABELS, PREDS[0], "same shape"),
        # A count of pairs would take (1, 5) of 4 classes for (2, 1).
        (torch.tensor([1]), torch.tensor([5]), "preds has classes 5 to 5, but num_classes=4"),
        (torch.tensor([1]), torch.tensor([-1]), "preds has classes -1"),
        (torch.tensor([4]), torch.tensor([1]), "labels has classes 4 to 4.*ignore_index=255"),
        (torch.tensor([1]), torch.tensor([0.3]), "preds must be classes"),
        (torch.tensor([255]), torch.tensor([0]), "every label is ignored"),
    ],
)
def test_bad_input(labels: Tensor, preds: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation_scores(labels, preds, 4)


def test_metric_counts_over_batches_and_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (6, 5, 5), generator=generator)
    labels[0, 0] = 255
    preds = torch.randint(4, (6, 5, 5), generator=generator)
    metric = SegmentationScores(4)
    for rows in (slice(0, 2), slice(2, 5), slice(5, 6)):
        metric.update(labels[rows], preds[rows])
    whole = segmentation_scores(labels, preds, 4)
    found = metric.compute()
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
    assert metric.confusion.dtype == torch.long
    other = SegmentationScores(4)
    other.update(labels[:1], preds[:1])
    summed = metric.confusion + other.confusion
    reduce: Any = metric._reductions["confusion"]
    assert torch.equal(reduce(torch.stack([metric.confusion, other.confusion])), summed)
    with pytest.raises(ValueError, match="num_classes=0"):
        SegmentationScores(0)


def test_nearest_colour() -> None:
    palette = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 0, 255]])
    classes = torch.randint(3, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    painted = palette[classes].movedim(-1, 1)
    noisy = (painted + torch.tensor([-40, 30, 20])[:, None, None]).clamp(0, 255).to(torch.uint8)
    assert torch.equal(decode_color_labels(noisy, palette), classes)
    assert torch.equal(decode_color_labels(noisy / 255, palette / 255), classes)
    # Equally near: the first.
    half = torch.tensor([127.5, 0, 0]).view(3, 1, 1)
    assert decode_color_labels(half, palette).item() == 0


def test_what_is_no_painted_map() -> None:
    with pytest.raises(ValueError, match=r"\[4, 4, 3\] must be \[..., 3, H, W\]"):
        decode_color_labels(torch.zeros(4, 4, 3), torch.zeros(2, 3))
    for shape in [(0, 3), (2, 4), (3,)]:
        with pytest.raises(ValueError, match="palette"):
            decode_color_labels(torch.zeros(3, 4, 4), torch.zeros(*shape))
