"""Metrics of anomaly detection. The larger a score, the more anomalous; label 1 is an outlier.

The rule is that of the released code of OGNet (Zaheer et al., "Old is Gold", 2020): threshold and F1
scores at the equal error rate of the test set itself. That threshold has seen the test labels, so
the same quantities at a threshold from held-out inliers stand beside them.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import auc, f1_score, roc_curve
from torch import Tensor

from lightning_modules.metrics.samples import SampleMetric, label_array, score_array


def _checked(
    scores: ArrayLike | Tensor, labels: ArrayLike | Tensor
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    values, sides = score_array(scores, "scores"), label_array(labels)
    if np.isinf(values).any():
        raise ValueError("scores contains infinite values")
    if len(values) != len(sides):
        raise ValueError(f"{len(values)} scores and {len(sides)} labels differ in length")
    found = np.unique(sides).tolist()
    if found in ([0], [1]):
        missing = "outlier (label 1)" if found == [0] else "inlier (label 0)"
        raise ValueError(
            f"anomaly metrics need inliers and outliers, but none of {len(sides)} is an {missing}"
        )
    if found != [0, 1]:
        raise ValueError(f"labels are 0 for inliers and 1 for outliers, not {found}")
    return values, sides


def anomaly_metrics(
    scores: ArrayLike | Tensor, labels: ArrayLike | Tensor, threshold: float | None = None
) -> dict[str, float]:
    """All metrics of one score on one test set.

    ``auc``: area under the ROC curve. ``eer``: the false positive rate at the point of the curve (of
    scikit-learn, collinear points dropped) where it is closest to the false negative rate;
    ``eer_threshold``: the score there. ``f1_inlier`` and ``f1_outlier``: F1 scores with the inliers
    and with the outliers as the positive class, where a score of at least ``eer_threshold`` is called
    an outlier. **These two are tuned on the test set.** Scores that are all equal have only the two
    ends of the curve, of which the rule takes the first: ``eer`` 0 at an infinite threshold. Read
    it together with ``auc``.

    With ``threshold`` also ``f1_inlier_heldout``, ``f1_outlier_heldout``, ``false_alarm_rate`` and
    ``detection_rate``, the shares of inliers and of outliers called an outlier, where a score above
    it is.

    Args:
        scores: [N], finite.
        labels: [N], 0 = inlier, 1 = outlier.
        threshold: chosen without test data, e.g. by
            :func:`lightning_modules.metrics.open_set.acceptance_threshold` on held-out inliers.

    Returns:
        The metrics by name, all but ``eer_threshold`` in [0, 1].

    Raises:
        ValueError: no inlier or no outlier, other labels, scores or a threshold that are nan or
            infinite, or lengths that differ.
    """
    values, sides = _checked(scores, labels)
    false_positives, true_positives, thresholds = roc_curve(sides, values, pos_label=1)
    chosen = int(np.nanargmin(np.abs((1 - true_positives) - false_positives)))
    tuned = values >= thresholds[chosen]
    metrics = {
        "auc": float(auc(false_positives, true_positives)),
        "eer": float(false_positives[chosen]),
        "eer_threshold": float(thresholds[chosen]),
        "f1_inlier": float(f1_score(sides, tuned, pos_label=0)),
        "f1_outlier": float(f1_score(sides, tuned, pos_label=1)),
    }
    if threshold is None:
        return metrics
    if not np.isfinite(threshold):
        raise ValueError(f"threshold={threshold} is no number; pass None where none was chosen")
    flagged = values > threshold
    return metrics | {
        "f1_inlier_heldout": float(f1_score(sides, flagged, pos_label=0)),
        "f1_outlier_heldout": float(f1_score(sides, flagged, pos_label=1)),
        "false_alarm_rate": float(flagged[sides == 0].mean()),
        "detection_rate": float(flagged[sides == 1].mean()),
    }


def auc_interval(
    scores: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the area under the ROC curve.

    Inliers and outliers are drawn with replacement, each as many as there are. The interval says what
    another test set of independent samples would change, nothing about another training; frames of
    one video are not independent, so theirs is too narrow. Perfect separation gives (1, 1).

    Args:
        scores: [N], finite.
        labels: [N], 0 = inlier, 1 = outlier.
        level: coverage in (0, 1).
        samples: number of draws.
        seed: of a generator of its own.

    Returns:
        ``(low, high)``.

    Raises:
        ValueError: as :func:`anomaly_metrics`, a level outside (0, 1) or no draw.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1")
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    values, sides = _checked(scores, labels)
    levels, place = np.unique(values, return_inverse=True)
    draw = np.random.default_rng(seed)

    def counts(members: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        drawn = members[draw.integers(len(members), size=(size, len(members)))]
        drawn += len(levels) * np.arange(size)[:, None]
        return np.bincount(drawn.ravel(), minlength=size * len(levels)).reshape(size, -1)

    areas = []
    at_once = max(1, 2_000_000 // len(values))  # bounds the memory
    for start in range(0, samples, at_once):
        size = min(at_once, samples - start)
        inliers, outliers = (counts(place[sides == side], size) for side in (0, 1))
        below = inliers.cumsum(1) - inliers / 2
        areas.append((outliers * below).sum(1) / ((sides == 0).sum() * (sides == 1).sum()))
    low, high = np.quantile(np.concatenate(areas), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def frame_scores(
    scores: NDArray[Any], group: NDArray[np.int64], frames: int
) -> NDArray[np.float64]:
    """The largest score of every frame; a frame without a sample gets the lowest score minus 1.

    Args:
        scores: [N].
        group: frame of each sample [N], below ``frames``; negative: the sample is in no frame.
        frames: F.

    Returns:
        [F].

    Raises:
        ValueError: no sample in any frame, or a frame number that is too large.
    """
    inside = group >= 0
    if not inside.any():
        raise ValueError(f"none of {len(group)} samples is in a frame; pass group to update()")
    if group.max() >= frames:
        raise ValueError(f"a sample is in frame {group.max()}, but there are {frames} frame labels")
    largest = np.full(frames, scores[inside].min() - 1, dtype=np.float64)
    np.maximum.at(largest, group[inside], scores[inside])
    return largest


class AnomalyMetrics(SampleMetric):
    """The :func:`anomaly_metrics` over all batches and processes, of samples or of frames.

    With ``frame_labels`` the scores are reduced to one per frame, see :func:`frame_scores`, and the
    labels of the samples are ignored. ``threshold`` then has to come from frames as well: the
    maximum over a frame is larger than the score of a sample.

    Args:
        threshold: see :func:`anomaly_metrics`; may be set later.
        frame_labels: [F], 1 = the frame is an outlier; may be set later.

    Attributes:
        samples: after ``compute``, scores and labels of the samples or frames, each [N].
    """

    columns: ClassVar = {"scores": torch.float64, "labels": torch.long, "group": torch.long}
    samples: tuple[NDArray[Any], NDArray[Any]]

    def __init__(
        self, threshold: float | None = None, frame_labels: Tensor | None = None, **kwargs: Any
    ) -> None:
        # A threshold that is set after a compute must count in the next one.
        super().__init__(compute_with_cache=False, **kwargs)
        self.threshold = threshold
        self.frame_labels = frame_labels

    def update(
        self, scores: Tensor, labels: Tensor, index: Tensor, group: Tensor | None = None
    ) -> None:
        """Adds a batch.

        Args:
            scores: [B], larger = more anomalous.
            labels: [B], 0 = inlier, 1 = outlier.
            index: position in the dataset [B].
            group: frame number [B], -1 = in no frame; None: no sample is in a frame.

        Raises:
            ValueError: columns of different lengths.
        """
        group = torch.full_like(index, -1) if group is None else group
        self.add(scores=scores, labels=labels, index=index, group=group)

    def compute(self) -> dict[str, float]:
        """The metrics by name.

        Raises:
            ValueError: as :func:`anomaly_metrics` and :func:`frame_scores`.
        """
        rows = self.rows()
        scores, labels = rows["scores"], rows["labels"]
        if self.frame_labels is not None:
            labels = label_array(self.frame_labels)
            scores = frame_scores(scores, rows["group"], len(labels))
        self.samples = (scores, labels)
        return anomaly_metrics(scores, labels, self.threshold)
