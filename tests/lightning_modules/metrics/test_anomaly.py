from typing import Any

import numpy as np
import pytest
import torch

from lightning_modules.metrics.anomaly import (
    AnomalyMetrics,
    anomaly_metrics,
    auc_interval,
    frame_scores,
)
from lightning_modules.metrics.open_set import acceptance_threshold

SCORES, LABELS = [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]


def test_by_hand() -> None:
    # Points of the curve (fpr, tpr) by threshold: 0.8 (0, 1/2), 0.4 (1/2, 1/2), 0.35 (1/2, 1), 0.1 (1, 1).
    tuned = {"auc": 0.75, "eer": 0.5, "eer_threshold": 0.4, "f1_inlier": 0.5, "f1_outlier": 0.5}
    assert anomaly_metrics(SCORES, LABELS) == pytest.approx(tuned)
    # At the threshold that accepts all of the inliers only 0.8 is flagged.
    threshold = acceptance_threshold([0.4, 0.1], 1.0)
    assert anomaly_metrics(
        torch.tensor(SCORES, dtype=torch.double), LABELS, threshold
    ) == pytest.approx(
        tuned
        | {
            "f1_inlier_heldout": 4 / 5,
            "f1_outlier_heldout": 2 / 3,
            "false_alarm_rate": 0.0,
            "detection_rate": 0.5,
        }
    )
    lower = anomaly_metrics([*SCORES, 0.2, 0.05, 0.0], [*LABELS, 0, 0, 0], 0.15)
    assert (lower["false_alarm_rate"], lower["detection_rate"]) == (0.4, 1.0)


def test_equal_scores_are_told_by_the_area() -> None:
    metrics = anomaly_metrics([1.0] * 4, LABELS)
    assert (metrics["auc"], metrics["eer"], metrics["eer_threshold"]) == (0.5, 0.0, np.inf)


@pytest.mark.parametrize("function", [anomaly_metrics, auc_interval])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([], [], "scores is empty"),
        ([1.0, float("nan")], [0, 1], "nan"),
        ([1.0, float("inf")], [0, 1], "infinite"),
        ([1.0, 2.0], [0, 0], "none of 2 is an outlier"),
        ([1.0, 2.0], [1, 1], "none of 2 is an inlier"),
        ([1.0, 2.0], [0, -1], r"not \[-1, 0\]"),
        ([1.0, 2.0], [0, 1, 1], "differ in length"),
    ],
)
def test_bad_input(function: Any, scores: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(scores, labels)


def test_bad_options() -> None:
    for options, message in (({"level": 1.0}, "level=1.0"), ({"samples": 0}, "samples=0")):
        with pytest.raises(ValueError, match=message):
            auc_interval(SCORES, LABELS, **options)
    with pytest.raises(ValueError, match="threshold=nan"):
        anomaly_metrics(SCORES, LABELS, float("nan"))


@pytest.mark.parametrize(("inliers", "outliers"), [(40, 15), (3000, 1000)])
def test_interval_is_that_of_a_slow_bootstrap(inliers: int, outliers: int) -> None:
    random = np.random.default_rng(1)
    low = np.round(random.normal(0, 1, inliers), 1)  # with ties
    high = np.round(random.normal(1, 1, outliers), 1)
    wins = (low[:, None] < high) + 0.5 * (low[:, None] == high)
    weights = [random.multinomial(n, np.full(n, 1 / n), 4000) / n for n in (inliers, outliers)]
    areas = ((weights[0] @ wins) * weights[1]).sum(1)
    scores, labels = np.concatenate([low, high]), np.repeat([0, 1], [inliers, outliers])
    state = np.random.get_state()[1].tolist()  # type: ignore[index]
    for level in (0.95, 0.5):
        found = np.array(auc_interval(scores, labels, level, samples=4000))
        slow = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
        assert np.abs(found - slow).max() < 0.15 * areas.std()
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]


def test_interval_is_a_function_of_its_seed() -> None:
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=50), np.repeat([0, 1], 25)
    assert auc_interval(scores, labels, seed=3) == auc_interval(scores, labels, seed=3)
    assert auc_interval(scores, labels, seed=3) != auc_interval(scores, labels, seed=4)
    assert auc_interval([1, 2, 3], [0, 0, 1]) == (1.0, 1.0)
    assert auc_interval([2, 2, 2], [0, 0, 1]) == (0.5, 0.5)


def test_frames_take_their_largest_score() -> None:
    scores = np.array([3.0, 5.0, -2.0, 9.0, 4.0, -50.0])
    group = np.array([1, 1, 3, -1, 3, -1])
    assert frame_scores(scores, group, 5).tolist() == [-3.0, 5.0, -3.0, 4.0, -3.0]
    with pytest.raises(ValueError, match="frame 3, but there are 3"):
        frame_scores(scores, group, 3)
    with pytest.raises(ValueError, match="none of 6"):
        frame_scores(scores, np.full(6, -1), 3)


# ------------------------------------------------------------------ torchmetrics
def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (60,), generator=generator)
    return {
        "scores": torch.randn(60, generator=generator) + labels,
        "labels": labels,
        "index": torch.randperm(1000, generator=generator)[:60],
        "group": torch.randint(-1, 20, (60,), generator=generator),
    }


def filled(data: dict[str, torch.Tensor], **options: Any) -> AnomalyMetrics:
    metric = AnomalyMetrics(**options)
    for start in range(0, 60, 16):
        metric.update(**{name: column[start : start + 16] for name, column in data.items()})
    metric.update(**{name: column[:7] for name, column in data.items()})
    return metric


def test_metric_over_batches_drops_duplicates_and_takes_a_threshold_later() -> None:
    data = rows()
    metric = filled({name: data[name] for name in ("scores", "labels", "index")})
    assert metric.compute() == anomaly_metrics(data["scores"], data["labels"])
    metric.threshold = 0.3
    assert metric.compute() == anomaly_metrics(data["scores"], data["labels"], 0.3)
    order = data["index"].argsort()
    np.testing.assert_array_equal(metric.samples[0], data["scores"][order].double())
    np.testing.assert_array_equal(metric.samples[1], data["labels"][order])


def test_metric_of_frames() -> None:
    data = rows()
    frame_labels = torch.arange(25) % 2
    inside = data["group"] >= 0
    best = torch.full((25,), float(data["scores"][inside].min()) - 1).double()
    for score, frame in zip(data["scores"][inside], data["group"][inside], strict=True):
        best[frame] = max(best[frame], score)
    metric = filled(data, threshold=0.5, frame_labels=frame_labels)
    assert metric.compute() == pytest.approx(anomaly_metrics(best, frame_labels, 0.5))
    assert len(metric.samples[0]) == 25
    without = filled({name: data[name] for name in ("scores", "labels", "index")})
    without.frame_labels = frame_labels
    with pytest.raises(ValueError, match="pass group"):
        without.compute()
