"""Average precision against cases counted by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.metrics.detection import (
    DetectionAveragePrecision,
    average_precision,
    match_detections,
)

EMPTY = torch.empty(0, 4)


def found(*rows: tuple[list[float], float, int]) -> dict[str, Tensor]:
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    corners = torch.tensor(boxes).reshape(-1, 4)
    return {"boxes": corners, "scores": torch.tensor(scores), "labels": torch.tensor(labels).long()}


# Right, wrong, right, wrong, right of 4: recall 1/4, 1/4, 2/4, 2/4, 3/4; precision 1, 1/2, 2/3, 2/4, 3/5.
SCORES, RIGHT = [0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 1, 0, 1]


def test_average_precision_by_hand() -> None:
    continuous = average_precision(SCORES, RIGHT, 4)
    assert continuous == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    # Recalls 0, 0.1, 0.2 | 0.3, 0.4, 0.5 | 0.6, 0.7 | 0.8, 0.9, 1.
    eleven = average_precision(SCORES, RIGHT, 4, "11_point")
    assert eleven == pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 3 / 5 + 0) / 11)
    shuffled = [3, 0, 4, 2, 1]
    again = average_precision([SCORES[i] for i in shuffled], [RIGHT[i] for i in shuffled], 4)
    assert again == pytest.approx(continuous)


@pytest.mark.parametrize("interpolation", ["continuous", "11_point"])
def test_average_precision_at_the_ends(interpolation: Any) -> None:
    assert average_precision([0.2, 0.9], [1, 1], 2, interpolation) == pytest.approx(1)
    assert average_precision([0.2, 0.9], [0, 0], 2, interpolation) == 0
    assert average_precision([], [], 2, interpolation) == 0
    assert math.isnan(average_precision([0.5], [0], 0, interpolation)), "there is nothing to find"


def test_a_recall_of_three_tenths_reaches_the_fourth_of_eleven_points() -> None:
    right = [1] * 3
    assert average_precision([3, 2, 1], right, 10, "11_point") == pytest.approx(4 / 11)


def test_equal_scores_are_one_step() -> None:
    for right in ([1, 0], [0, 1]):
        assert average_precision([0.5, 0.5], right, 1) == pytest.approx(0.5)


def test_bad_columns() -> None:
    with pytest.raises(ValueError, match="2 scores, but 1 detections"):
        average_precision([0.1, 0.2], [1], 1)
    with pytest.raises(ValueError, match="nan"):
        average_precision([float("nan")], [1], 1)
    with pytest.raises(ValueError, match="2 right detections of 1 objects"):
        average_precision([0.1, 0.2], [1, 1], 1)
    with pytest.raises(ValueError, match="unknown interpolation='12_point'"):
        average_precision([0.1], [1], 1, "12_point")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- matching
def outcome(detections: dict[str, Any], boxes: Any, labels: Any, **more: Any) -> list[int]:
    true = torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels).long()
    return match_detections(
        **{**detections, **more}, true_boxes=true[0], true_labels=true[1]
    ).tolist()


def test_the_last_pixels_of_boxes_count() -> None:
    # 10x10 and 5x10 pixels: IoU 1/2; without the last pixels it would be 4/9.
    assert outcome(found(([0, 0, 4, 9], 0.9, 0)), [[0, 0, 9, 9]], [0]) == [1]
    assert outcome(found(([0, 0, 3, 9], 0.9, 0)), [[0, 0, 9, 9]], [0]) == [0]
    assert outcome(found(([0, 0, 3, 9], 0.9, 0)), [[0, 0, 9, 9]], [0], iou_threshold=0.4) == [1]


def test_an_object_is_found_once_by_the_surest_detection() -> None:
    twice = found(([0, 0, 9, 9], 0.5, 0), ([0, 0, 9, 8], 0.9, 0))
    assert outcome(twice, [[0, 0, 9, 9]], [0]) == [0, 1]


def test_a_detection_belongs_to_the_object_it_overlaps_most() -> None:
    near = [[0, 0, 9, 9], [0, 1, 9, 10]]
    # Both overlap the first object most; the second stays without one, though its IoU would do.
    both = found(([0, 0, 9, 9], 0.9, 0), ([0, 0, 9, 9], 0.8, 0))
    assert outcome(both, near, [0, 0]) == [1, 0]


def test_classes_are_apart() -> None:
    assert outcome(found(([0, 0, 9, 9], 0.9, 1)), [[0, 0, 9, 9]], [0]) == [0]
    two = found(([0, 0, 9, 9], 0.9, 1), ([0, 0, 9, 9], 0.8, 0))
    assert outcome(two, [[0, 0, 9, 9], [0, 0, 9, 9]], [0, 1]) == [1, 1]


def test_difficult_objects_do_not_count() -> None:
    hard = {"difficult": torch.tensor([True])}
    twice = found(([0, 0, 9, 9], 0.5, 0), ([0, 0, 9, 8], 0.9, 0), ([30, 30, 39, 39], 0.7, 0))
    assert outcome(twice, [[0, 0, 9, 9]], [0], **hard) == [-1, -1, 0]


def test_nothing_there_and_nothing_found() -> None:
    assert outcome(found(([0, 0, 9, 9], 0.9, 0)), [], []) == [0]
    assert outcome(found(), [[0, 0, 9, 9]], [0]) == []
    with pytest.raises(
        ValueError, match=r"true_boxes of shape \[1, 4\] must be \[N, 4\] with N = 2"
    ):
        outcome(found(), [[0, 0, 9, 9]], [0, 1])


# ---------------------------------------------------------------------- metric
def two_images() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Class 0: right 0.9, wrong 0.8, right 0.7, of 3 objects that count. Class 1: never found. Class 2: absent."""
    detections = [
        found(([0, 0, 9, 9], 0.9, 0), ([40, 40, 49, 49], 0.8, 0), ([20, 20, 29, 29], 0.95, 0)),
        found(([5, 5, 14, 14], 0.7, 0), ([5, 5, 14, 14], 0.6, 2)),
    ]
    none = [-1, -1, -1, -1]
    truth = {
        "boxes": torch.tensor(
            [
                [[0, 0, 9, 9], [20, 20, 29, 29], [50, 50, 59, 59], none],
                [[5, 5, 14, 14], [30, 30, 39, 39], none, none],
            ]
        ),
        # The last object of the second image is hidden: it has a class and no box.
        "labels": torch.tensor([[0, 0, 1, -1], [0, 0, 1, -1]]),
        "difficult": torch.tensor([[False, True, False, False], [False] * 4]),
        "index": torch.arange(2),
    }
    return detections, truth


def test_mean_over_the_classes_that_are_there() -> None:
    metric = DetectionAveragePrecision(3)
    detections, truth = two_images()
    metric.update(detections, **truth)
    values = metric.compute()
    assert values["ap"][0] == pytest.approx((1 + 2 / 3) / 3)
    assert values["ap"][1] == 0
    assert values["ap"][2].isnan()
    assert values["map"] == pytest.approx((1 + 2 / 3) / 6)


def test_batches_order_and_repeated_images_play_no_part() -> None:
    detections, truth = two_images()
    whole, parts = DetectionAveragePrecision(3), DetectionAveragePrecision(3)
    whole.update(detections, **truth)
    for row in (1, 0, 1):  # samplers repeat images
        parts.update(detections[row : row + 1], **{k: v[row : row + 1] for k, v in truth.items()})
    assert parts.compute()["map"] == whole.compute()["map"]


def test_float_boxes_with_a_corner_below_a_pixel() -> None:
    # A box 0.4 pixels wide at the left edge ends at -0.6: it is one, its first value is not negative.
    thin = torch.tensor([[[0.0, 0.0, -0.6, 9.0]]])
    metric = DetectionAveragePrecision(1)
    metric.update(
        [found((thin[0, 0].tolist(), 0.9, 0))], thin, torch.zeros(1, 1).long(), torch.arange(1)
    )
    assert metric.compute()["map"] == 1


def test_bad_input() -> None:
    for options in ({"num_classes": 0}, {"num_classes": 2, "iou_threshold": 0.0}):
        with pytest.raises(ValueError, match=r"must be at least 1 and iou_threshold"):
            DetectionAveragePrecision(**options)
    with pytest.raises(ValueError, match="unknown interpolation"):
        DetectionAveragePrecision(2, interpolation="no")  # type: ignore[arg-type]
    detections, truth = two_images()
    with pytest.raises(ValueError, match="class 2, expected 0 to 1"):
        DetectionAveragePrecision(2).update(detections, **truth)
    with pytest.raises(ValueError, match="detections in 1 images, boxes in 2"):
        DetectionAveragePrecision(3).update(detections[:1], **truth)
    empty = DetectionAveragePrecision(2)
    empty.update([found()], EMPTY[None], torch.empty(1, 0).long(), torch.arange(1))
    with pytest.raises(ValueError, match="at least one object"):
        empty.compute()
