"""Localization metrics: small cases by hand, and the same value however the set is divided."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from lightning_modules.metrics.localization import (
    LocalizationError,
    MaxBoxAcc,
    MaxBoxAccV2,
    PxAP,
    threshold_grid,
)
from lightning_modules.nn.maps import normalize_map, upsample_map
from tests.lightning_modules.metrics.opencv_boxes import opencv_boxes


def localization_set(count: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Smooth maps [count, 32, 32] and one or two boxes each."""
    generator = torch.Generator().manual_seed(seed)
    maps = normalize_map(upsample_map(torch.rand(count, 5, 5, generator=generator), 32))
    boxes = []
    for number in range(count):
        corners = torch.randint(0, 32, (1 + number % 2, 2, 2), generator=generator)
        boxes.append(torch.cat([corners.amin(1), corners.amax(1)], dim=1))
    return maps, boxes


def test_thresholds_are_those_of_the_released_code() -> None:
    assert threshold_grid().tolist() == np.arange(0, 1, 0.001).tolist()
    assert [len(threshold_grid(steps)) for steps in (1, 3, 49, 1000)] == [1, 3, 49, 1000]


@pytest.mark.parametrize(("metric", "every"), [(MaxBoxAcc, False), (MaxBoxAccV2, True)])
def test_box_accuracy_equals_a_plain_loop(metric: type[MaxBoxAcc], every: bool) -> None:
    maps, truth = localization_set(12)
    thresholds, ious = np.arange(0, 1, 0.05), (0.3, 0.5)
    hits = np.zeros((2, len(thresholds)))
    for values, boxes in zip(maps, truth, strict=True):
        for column, found in enumerate(opencv_boxes(values.numpy(), thresholds, every)):
            best = 0.0
            for a in found:
                for b in boxes.tolist():
                    across = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
                    overlap = across * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
                    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
                    best = max(best, overlap / (sum(areas) - overlap))
            hits[:, column] += [best >= iou for iou in ious]
    ours = metric(ious, thresholds=thresholds)
    ours.update(maps, truth)
    values = ours.compute()
    assert ours.hits.tolist() == hits.tolist()
    assert values["curve@30"].tolist() == (100 * hits[0] / 12).tolist()
    assert values["threshold@50"].item() == thresholds[hits[1].argmax()]
    assert values[ours.name].item() == pytest.approx(100 * hits.max(1).mean() / 12)


def test_best_threshold_is_the_lowest_of_equal_ones() -> None:
    box = torch.zeros(1, 20, 20)
    box[0, 5:15, 5:15] = 1
    metric = MaxBoxAcc()
    metric.update(box, [torch.tensor([[5, 5, 14, 14]])])
    assert metric.compute()["max_box_acc@50"] == 100
    assert metric.compute()["threshold@50"] == 0


def test_threshold_chosen_elsewhere() -> None:
    maps, truth = localization_set(30)
    validation, test = MaxBoxAcc(), MaxBoxAcc()
    validation.update(maps[:15], truth[:15])
    test.update(maps[15:], truth[15:])
    assert "box_acc" not in test.compute()
    chosen = validation.compute()["threshold@50"]
    fixed = MaxBoxAcc(at_threshold=float(chosen))
    fixed.update(maps[15:], truth[15:])
    values = fixed.compute()
    assert values["box_acc@50"] == values["curve@50"][threshold_grid() == chosen].item()
    assert values["box_acc"] <= values["max_box_acc"]
    with pytest.raises(ValueError, match="at_threshold"):
        MaxBoxAcc(at_threshold=0.12345)


METRICS: list[Callable[[], Any]] = [MaxBoxAcc, MaxBoxAccV2, PxAP, LocalizationError]


@pytest.mark.parametrize("make", METRICS)
def test_parts_add_up(make: Callable[[], Any]) -> None:
    """Summing the states of parts, as processes do, gives the value of the whole set."""
    maps, truth = localization_set(9)
    generator = torch.Generator().manual_seed(1)
    classes = torch.rand(9, 8, generator=generator).argsort(1)[:, :5]
    corners = torch.stack([boxes[:1].expand(5, 4) for boxes in truth])
    masks = (torch.rand(9, 32, 32, generator=generator) < maps).long()
    masks[:, 0] = 255

    def add(metric: Any, part: slice) -> None:
        if isinstance(metric, PxAP):
            metric.update(maps[part], masks[part])
        elif isinstance(metric, MaxBoxAcc):
            metric.update(maps[part], truth[part])
        else:
            labels = torch.arange(9) % 8
            known = corners[part, 0] // 2
            metric.update(classes[part], corners[part], labels[part], truth[part], known)

    whole, parts = make(), [make() for _ in range(3)]
    add(whole, slice(None))
    for start, metric in enumerate(parts):
        add(metric, slice(4 * start, 4 * start + 4))
    for name, reduction in whole._reductions.items():
        total = reduction(torch.stack([getattr(part, name) for part in parts]))
        assert total.dtype == torch.long
        setattr(parts[0], name, total)
    parts[0]._computed = None
    expected = whole.compute()
    for name, value in parts[0].compute().items():
        assert torch.equal(value, expected[name]), name


def test_pixel_precision_approaches_that_of_scikit_learn() -> None:
    maps, _ = localization_set(4)
    masks = torch.bernoulli(maps, generator=torch.Generator().manual_seed(0)).long()
    metric = PxAP(20000)
    metric.update(maps, masks)
    exact = 100 * average_precision_score(masks.ravel().numpy(), maps.ravel().numpy())
    assert metric.compute()["pxap"].item() == pytest.approx(exact, abs=0.05)


def test_ignored_pixels_do_not_count() -> None:
    maps, _ = localization_set(2)
    masks = (maps > 0.6).long()
    clean, marked = PxAP(), PxAP()
    clean.update(maps[:1], masks[:1])
    masks[1] = 255
    marked.update(maps, masks)
    assert marked.compute()["pxap"] == clean.compute()["pxap"]


def test_class_and_box_must_both_be_right() -> None:
    metric = LocalizationError(topk=(1, 2))
    right, wrong = [0, 0, 9, 9], [20, 20, 29, 29]
    metric.update(
        torch.tensor([[3, 1], [1, 3], [3, 1], [1, 2]]),
        torch.tensor([[right, wrong], [right, right], [wrong, right], [right, right]]),
        torch.tensor([3, 3, 3, 3]),
        [torch.tensor([right])] * 4,
        torch.tensor([right, right, wrong, right]),
    )
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "top1_cls_error": 50,
        "top1_loc_error": 75,
        "top2_cls_error": 25,
        "top2_loc_error": 50,
        "gt_known_error": 25,
    }


def test_a_class_may_have_two_boxes() -> None:
    metric = LocalizationError(topk=(5,))
    boxes = torch.tensor([[[20, 20, 29, 29], [0, 0, 9, 9]] + [[30, 30, 31, 31]] * 3])
    metric.update(
        torch.tensor([[3, 3, 1, 1, 2]]), boxes, torch.tensor([3]), [torch.tensor([[0, 0, 9, 9]])]
    )
    assert metric.compute()["top5_loc_error"] == 0
    assert "gt_known_error" not in metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input() -> None:
    maps, truth = localization_set(2)
    with pytest.raises(ValueError, match="no ground-truth box"):
        MaxBoxAcc().update(maps, [truth[0], torch.empty(0, 4)])
    with pytest.raises(ValueError, match="boxes of 1 images"):
        MaxBoxAcc().update(maps, truth[:1])
    with pytest.raises(ValueError, match="normalize_map"):
        MaxBoxAcc().update(2 * maps, truth)
    with pytest.raises(ValueError, match="no sample"):
        MaxBoxAcc().compute()
    with pytest.raises(ValueError, match="iou_thresholds"):
        MaxBoxAcc(iou_thresholds=(50,))
    with pytest.raises(ValueError, match="ascending"):
        PxAP([0.5, 0.2])
    with pytest.raises(ValueError, match="masks must hold"):
        PxAP().update(maps, 7 * torch.ones_like(maps))
    with pytest.raises(ValueError, match="at least one pixel"):
        PxAP().compute()
    with pytest.raises(ValueError, match="topk"):
        LocalizationError().update(torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2), truth)
