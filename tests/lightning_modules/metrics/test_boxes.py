"""Boxes equal OpenCV's on thousands of masks of every kind, and the rules on small ones."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from lightning_modules.metrics import level_sets
from lightning_modules.metrics.boxes import (
    box_iou_inclusive,
    box_sweep,
    boxes_from_map,
    cam_dt_boxes,
    component_polygon_area,
    resize_box,
)
from tests.lightning_modules.metrics.opencv_boxes import opencv_boxes

Map = NDArray[np.float64]


def noise(rng: np.random.Generator, height: int, width: int) -> Map:
    return rng.random((height, width))


def sparse(rng: np.random.Generator, height: int, width: int) -> Map:
    return (rng.random((height, width)) < rng.random()).astype(np.float64)


def plateaus(rng: np.random.Generator, height: int, width: int) -> Map:
    return rng.integers(0, rng.integers(2, 9), (height, width)).astype(np.float64)


def blobs(rng: np.random.Generator, height: int, width: int) -> Map:
    return ndimage.gaussian_filter(rng.random((height, width)), rng.uniform(0.5, 3))


def rings(rng: np.random.Generator, height: int, width: int) -> Map:
    y, x = np.mgrid[:height, :width]
    values = np.zeros((height, width))
    for _ in range(4):
        distance = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width))
        edge = np.abs(distance - rng.uniform(0, max(height, width) / 2)) < rng.uniform(0.5, 2)
        values[edge] = rng.random()
    return values


def lines(rng: np.random.Generator, height: int, width: int) -> Map:
    values = np.zeros((height, width))
    for _ in range(8):
        ends = rng.integers(0, [height, width], (2, 2))
        steps = np.linspace(ends[0], ends[1], 2 * max(height, width)).round().astype(int)
        values[steps[:, 0], steps[:, 1]] = rng.random()
    return values


def borders(rng: np.random.Generator, height: int, width: int) -> Map:
    y, x = np.mgrid[:height, :width]
    inwards = np.minimum.reduce([y, x, height - 1 - y, width - 1 - x])
    return (inwards % rng.integers(1, 4) == 0) * rng.random((height, width)).round(1)


KINDS = (noise, sparse, plateaus, blobs, rings, lines, borders)


def scaled(values: Map) -> Map:
    spread = np.ptp(values)
    return (values - values.min()) / spread if spread else np.zeros_like(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select", ["largest", "all"])
def test_boxes_equal_opencv(kind: Callable[..., Map], select: str) -> None:
    """84 maps x 6 thresholds for each of 7 kinds: 3528 masks, with both rules."""
    rng = np.random.default_rng(0)
    for _ in range(84):
        values = scaled(kind(rng, *rng.integers(1, 28, 2)))
        thresholds = rng.random(6)
        ours = [boxes.tolist() for boxes in boxes_from_map(values, thresholds, select)]
        assert ours == opencv_boxes(values, thresholds, select == "all"), values.tolist()


def test_areas_equal_opencv() -> None:
    rng = np.random.default_rng(1)
    for number in range(140):
        mask = scaled(KINDS[number % len(KINDS)](rng, 20, 20)) > 0.5
        areas = component_polygon_area(mask)[0].tolist()
        contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        outer = [
            cv2.contourArea(contour)
            for contour, relation in zip(
                contours[0], contours[1][0] if contours[0] else [], strict=True
            )
            if relation[3] < 0
        ]
        assert sorted(areas) == sorted(outer)


def test_pixel_counts_are_those_of_scipy() -> None:
    mask = np.random.default_rng(2).random((40, 50)) < 0.45
    labels, number = ndimage.label(mask, np.ones((3, 3)))
    sizes = ndimage.sum_labels(mask, labels, range(1, number + 1))
    # SciPy numbers parts in raster order as well.
    assert component_polygon_area(mask)[1].tolist() == sizes.tolist()


@pytest.mark.parametrize("select", ["largest", "all", "largest_pixels"])
def test_sweep_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch, select: str) -> None:
    values = blobs(np.random.default_rng(3), 40, 30)
    thresholds = np.arange(0, 1, 0.01)
    whole = boxes_from_map(scaled(values), thresholds, select)
    monkeypatch.setattr(level_sets, "MAX_CELLS", 100)
    pieces = boxes_from_map(scaled(values), thresholds, select)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_one_threshold_is_a_row_of_many() -> None:
    values = scaled(blobs(np.random.default_rng(4), 30, 30))
    thresholds = [0.9, 0.1, 0.5]  # any order
    many = boxes_from_map(torch.from_numpy(values), thresholds)
    assert isinstance(many, list)
    for threshold, boxes in zip(thresholds, many, strict=True):
        assert torch.equal(boxes_from_map(values, threshold), boxes)
        assert boxes.dtype == torch.long
        assert boxes.shape == (1, 4)


def test_largest_by_pixels_is_another_rule() -> None:
    values = np.zeros((8, 12))
    values[1, :10] = 1  # more pixels, but a line has no area
    values[4:7, 4:7] = 1
    assert boxes_from_map(values, 0.5).tolist() == [[4, 4, 7, 7]]
    assert boxes_from_map(values, 0.5, "largest_pixels").tolist() == [[0, 1, 10, 2]]


def test_islands_count_for_the_part_around_them() -> None:
    values = np.zeros((12, 20))
    values[1:9, 1:9] = 1
    values[2:8, 2:8] = 0
    values[4, 4] = 1  # an island in a hole: both are filled
    values[2:8, 11:17] = 1  # more pixels, but a smaller outline
    assert boxes_from_map(values, 0.5).tolist() == [[1, 1, 9, 9]]
    assert component_polygon_area(values)[0].tolist() == [49, 25, 0]


def test_without_quantizing_close_values_are_told_apart() -> None:
    values = np.array([[0.5, 0.501, 1.0]])
    assert boxes_from_map(values, 0.5, quantize=False).tolist() == [[1, 0, 2, 0]]
    assert boxes_from_map(values, 0.5).tolist() == [[2, 0, 2, 0]]


def test_nothing_above_the_threshold() -> None:
    sweep = box_sweep(np.zeros((3, 4)), [0.0, 0.5])
    assert sweep.boxes.tolist() == [[0, 0, 0, 0]]
    assert sweep.level_of_threshold.tolist() == [0, 0]
    assert boxes_from_map(np.ones((3, 4)), 1.0, "all").tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("values", "threshold", "select", "message"),
    [
        (np.full((3, 3), 1.5), 0.5, "largest", "normalize_map"),
        (np.full((3, 3), np.nan), 0.5, "largest", "normalize_map"),
        (np.zeros(3), 0.5, "largest", r"\[H, W\]"),
        (np.zeros((3, 3)), 1.5, "largest", "thresholds"),
        (np.zeros((3, 3)), np.nan, "largest", "thresholds"),
        (np.zeros((3, 3)), 0.5, "biggest", "biggest"),
    ],
)
def test_bad_input(values: Map, threshold: float, select: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boxes_from_map(values, threshold, select)  # type: ignore[arg-type]


def test_iou_counts_last_pixels() -> None:
    assert box_iou_inclusive([[2, 2, 2, 2]], [[2, 2, 2, 2], [3, 3, 3, 3]]).tolist() == [[1.0, 0.0]]
    # 10 x 10 pixels and their upper half: exactly 0.5, which torchvision's widths would miss.
    assert box_iou_inclusive([[0, 0, 9, 9]], [[0, 0, 9, 4]]).item() == 0.5
    with pytest.raises(ValueError, match="x0 <= x1"):
        box_iou_inclusive([[4, 0, 1, 9]], [[0, 0, 9, 9]])


def test_resize_truncates() -> None:
    assert resize_box([60, 27, 385, 331], (500, 335), (224, 224)).tolist() == [26, 18, 172, 221]
    assert resize_box([[1, 1, 3, 3]], (4, 8), (8, 4)).tolist() == [[2, 0, 6, 1]]
    with pytest.raises(ValueError, match="resize"):
        resize_box([[0, 0, 1, 1]], (0, 5), (8, 8))


def test_cam_boxes_of_an_empty_and_of_a_full_map() -> None:
    assert cam_dt_boxes(np.zeros((20, 30), dtype=np.uint8)).shape == (0, 4)
    full = cam_dt_boxes(np.full((20, 30), 255, dtype=np.uint8))
    # Three equal boxes; each removal skips a neighbour, so that two are left.
    assert full.tolist() == [[0, 0, 25, 15], [0, 0, 25, 15]]


def test_cam_boxes_are_largest_first() -> None:
    y, x = np.mgrid[:60, :80]
    peaks = np.exp(-((y - 20) ** 2 + (x - 20) ** 2) / 90) + 0.9 * np.exp(
        -((y - 42) ** 2 + (x - 55) ** 2) / 30
    )
    boxes = cam_dt_boxes((255 * peaks / peaks.max()).astype(np.uint8))
    sizes = (boxes[:, 2] * boxes[:, 3]).tolist()
    assert len(boxes) >= 2
    assert sizes == sorted(sizes, reverse=True)
