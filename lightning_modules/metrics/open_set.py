"""Metrics of open-set recognition. The larger a score, the more unknown; unknown is the positive
class.

AUROC does not depend on which class is called positive; AUPR and FPR95 do, so both AUPRs are given.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve
from torch import Tensor

from lightning_modules.metrics.samples import SampleMetric, label_array, score_array


def open_set_metrics(
    known_scores: ArrayLike | Tensor,
    unknown_scores: ArrayLike | Tensor,
    known_logits: ArrayLike | Tensor | None = None,
    target: ArrayLike | Tensor | None = None,
    known_predictions: ArrayLike | Tensor | None = None,
) -> dict[str, float]:
    """All metrics of one score on one split, in [0, 1].

    ``auroc``: share of (known, unknown) pairs in which the unknown scores higher, ties half.
    ``aupr_unknown``: average precision with unknown as the positive class; ``aupr_known``: with
    known as the positive class and the negated score. ``fpr95``: share of the knowns that are
    flagged at the threshold that flags at least 95 % of the unknowns. With predictions also
    ``closed_accuracy``, the share of knowns whose class is right, and ``openauc``, the share of
    pairs in which the class of the known is right and the unknown scores higher, ties half (Wang et
    al. 2022; equal to the area under the OSCR curve of Dhamija et al. 2018).

    Args:
        known_scores: [n].
        unknown_scores: [m].
        known_logits: [n, K]; predictions are their argmax.
        target: classes of the knowns [n].
        known_predictions: predicted classes [n], instead of ``known_logits``.

    Returns:
        The metrics by name.

    Raises:
        ValueError: no known or no unknown sample, nan, or lengths that differ.
    """
    known = score_array(known_scores, "known_scores")
    unknown = score_array(unknown_scores, "unknown_scores")
    is_unknown = np.repeat([0, 1], [len(known), len(unknown)])
    scores = np.concatenate([known, unknown])
    false_positives, true_positives, _ = roc_curve(is_unknown, scores, drop_intermediate=False)
    metrics = {
        "auroc": float(roc_auc_score(is_unknown, scores)),
        "aupr_unknown": float(average_precision_score(is_unknown, scores)),
        "aupr_known": float(average_precision_score(1 - is_unknown, -scores)),
        "fpr95": float(false_positives[true_positives >= 0.95].min()),
    }
    if known_logits is not None and known_predictions is None:
        logits = torch.as_tensor(known_logits)
        known_predictions = logits.argmax(1)
    if known_predictions is None:
        return metrics
    correct = _correct(known, known_predictions, target)
    ordered = np.sort(unknown)
    above = len(ordered) - np.searchsorted(ordered, known[correct], side="right")
    not_below = len(ordered) - np.searchsorted(ordered, known[correct], side="left")
    pairs = len(known) * len(unknown)
    metrics["closed_accuracy"] = float(correct.mean())
    metrics["openauc"] = float((above.sum() + not_below.sum()) / 2 / pairs)
    return metrics


def _correct(
    known: NDArray[np.float64],
    predictions: ArrayLike | Tensor,
    target: ArrayLike | Tensor | None,
) -> NDArray[np.bool_]:
    if target is None:
        raise ValueError("predictions of the knowns need their target")
    predicted, wanted = label_array(predictions), label_array(target)
    if not len(known) == len(predicted) == len(wanted):
        raise ValueError(
            f"{len(known)} known scores, {len(predicted)} predictions and {len(wanted)} targets "
            "differ in length"
        )
    return predicted == wanted


def oscr_curve(
    known_scores: ArrayLike | Tensor,
    unknown_scores: ArrayLike | Tensor,
    known_predictions: ArrayLike | Tensor,
    target: ArrayLike | Tensor,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Correct classification rate of knowns over false positive rate of unknowns (OSCR).

    A sample is accepted as known while its score is at most the threshold; the threshold runs over
    all scores.

    Args:
        known_scores: [n].
        unknown_scores: [m].
        known_predictions: predicted classes of the knowns [n].
        target: their classes [n].

    Returns:
        ``(ccr, fpr)``, both from 0 upwards: the share of knowns accepted and right, the share of
        unknowns accepted. The trapezoidal area is the ``openauc`` of :func:`open_set_metrics`.

    Raises:
        ValueError: no known or no unknown sample, nan, or lengths that differ.
    """
    known = score_array(known_scores, "known_scores")
    unknown = score_array(unknown_scores, "unknown_scores")
    right = known[_correct(known, known_predictions, target)]
    thresholds = np.unique(np.concatenate([known, unknown]))
    ccr = np.searchsorted(np.sort(right), thresholds, side="right") / len(known)
    fpr = np.searchsorted(np.sort(unknown), thresholds, side="right") / len(unknown)
    return np.concatenate([[0.0], ccr]), np.concatenate([[0.0], fpr])


def acceptance_threshold(known_scores: ArrayLike | Tensor, rate: float = 0.95) -> float:
    """The smallest known score that at least the share ``rate`` of the knowns does not exceed.

    A sample is then called unknown if its score is above the threshold.

    Args:
        known_scores: scores of held-out known samples [n].
        rate: share to accept, in (0, 1].

    Raises:
        ValueError: no sample, nan, or a rate outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} must be in (0, 1]")
    ordered = np.sort(score_array(known_scores, "known_scores"))
    # The small slack keeps e.g. 0.95 * 20 from being rounded up to 20.
    return float(ordered[math.ceil(rate * len(ordered) - 1e-9) - 1])


def macro_f1(
    scores: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    predictions: ArrayLike | Tensor,
    threshold: float,
    num_classes: int,
) -> float:
    """Mean F1 score over K classes and "unknown", which scores above the threshold are.

    Args:
        scores: [N].
        labels: classes [N], -1 = unknown.
        predictions: classes among the K known ones [N].
        threshold: from :func:`acceptance_threshold`, never chosen on unknowns.
        num_classes: K; a class that is neither present nor predicted counts 0.

    Returns:
        Value in [0, 1].

    Raises:
        ValueError: no sample or nan.
    """
    decisions = np.where(score_array(scores, "scores") > threshold, -1, label_array(predictions))
    return float(
        f1_score(
            label_array(labels),
            decisions,
            labels=[-1, *range(num_classes)],
            average="macro",
            zero_division=0,
        )
    )


def openness(num_known: int, num_unknown: int) -> float:
    """Openness ``1 - sqrt(2 * K / (2 * K + U))`` of K known and U unknown classes.

    Scheirer et al., "Toward Open Set Recognition", 2013: ``1 - sqrt(2 * training / (target +
    testing))`` with K training and target classes and K+U testing classes.

    Raises:
        ValueError: no known class or a negative number.
    """
    if num_known < 1 or num_unknown < 0:
        raise ValueError(f"num_known={num_known} and num_unknown={num_unknown} make no problem")
    return 1 - math.sqrt(2 * num_known / (2 * num_known + num_unknown))


class OpenSetMetrics(SampleMetric):
    """The :func:`open_set_metrics` over all batches and processes.

    A process may have no batch at all.
    """

    columns: ClassVar = {
        "scores": torch.float64,
        "labels": torch.long,
        "predictions": torch.long,
    }
    samples: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

    def update(self, scores: Tensor, labels: Tensor, predictions: Tensor, index: Tensor) -> None:
        """Adds a batch.

        Args:
            scores: [B], larger = more unknown.
            labels: classes [B], -1 = unknown.
            predictions: classes among the known ones [B]; those of unknown samples are ignored.
            index: position in the dataset [B], unique over known and unknown samples.

        Raises:
            ValueError: columns of different lengths.
        """
        self.add(scores=scores, labels=labels, predictions=predictions, index=index)

    def compute(self) -> dict[str, float]:
        """The metrics by name.

        Raises:
            ValueError: no known or no unknown sample was added.
        """
        rows = self.rows()
        scores, labels, predictions = (rows[name] for name in ("scores", "labels", "predictions"))
        self.samples = (scores, labels, predictions)
        known = labels >= 0
        for name, number in (("known", known.sum()), ("unknown", (~known).sum())):
            if number == 0:
                raise ValueError(
                    "open-set metrics need known and unknown samples, "
                    f"but none of {len(known)} is {name}"
                )
        return open_set_metrics(
            scores[known],
            scores[~known],
            target=labels[known],
            known_predictions=predictions[known],
        )
