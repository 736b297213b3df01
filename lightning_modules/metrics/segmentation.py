"""Scores of semantic segmentation from one confusion matrix over all images."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix


def confusion_matrix(
    labels: Tensor, preds: Tensor, num_classes: int, ignore_index: int | None = 255
) -> Tensor:
    """Pixels by label (row) and prediction (column).

    Args:
        labels: classes, int, of any shape.
        preds: predicted classes of the same shape.
        num_classes: K.
        ignore_index: label of pixels that do not count; None: all do.

    Returns:
        int64 [K, K].

    Raises:
        ValueError: shapes that differ, scores in place of classes, or a counted pixel with a class outside 0..K-1.
    """
    if labels.shape != preds.shape:
        raise ValueError(
            f"labels {list(labels.shape)} and preds {list(preds.shape)} must have the same shape"
        )
    counted = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        counted = labels != ignore_index
    for name, classes in (("labels", labels[counted]), ("preds", preds[counted])):
        if classes.is_floating_point():
            raise ValueError(f"{name} must be classes (integers), not {classes.dtype}")
        # In the count below a class too many would silently be another pair.
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(
                f"{name} has classes {int(classes.min())} to {int(classes.max())}, but num_classes={num_classes} "
                f"allows 0 to {num_classes - 1} (labels also ignore_index={ignore_index})"
            )
    return multiclass_confusion_matrix(
        preds, labels, num_classes, ignore_index=ignore_index, validate_args=False
    )


def scores_of_confusion(confusion: Tensor) -> dict[str, Any]:
    """All scores of a confusion matrix, see :func:`segmentation_scores`.

    Args:
        confusion: int [K, K], labels in rows.

    Raises:
        ValueError: it counts no pixel.
    """
    counts = confusion.double()
    if counts.sum() == 0:
        raise ValueError(
            "no pixel to judge: the confusion matrix is empty or every label is ignored"
        )
    hits, labelled = counts.diagonal(), counts.sum(1)
    union = labelled + counts.sum(0) - hits
    # A class that does not occur has 0/0.
    accuracy, iou = hits / labelled, hits / union
    return {
        "pixel_acc": float(hits.sum() / counts.sum()),
        "class_acc": float(accuracy.nan_to_num().mean()),
        "class_iou": float(iou.nan_to_num().mean()),
        "class_acc_present": float(accuracy.nanmean()),
        "class_iou_present": float(iou.nanmean()),
        "per_class_acc": accuracy.nan_to_num(),
        "per_class_iou": iou.nan_to_num(),
        "confusion": confusion,
    }


def segmentation_scores(
    labels: Tensor, preds: Tensor, num_classes: int, ignore_index: int | None = 255
) -> dict[str, Any]:
    """Pixel accuracy, class accuracy and class IoU over all images together ("FCN score", CycleGAN, section 5.1.1).

    Args:
        labels: classes [N, H, W] or of any other shape.
        preds: predicted classes of the same shape.
        num_classes: K.
        ignore_index: label of pixels that do not count.

    Returns:
        In [0, 1]: ``pixel_acc``; ``class_acc`` and ``class_iou``, means over all K classes in which one that does not
        occur counts 0 (released code); ``class_acc_present`` and ``class_iou_present``, means over the classes that
        occur in the labels (accuracy), in labels or predictions (IoU). ``per_class_acc`` and ``per_class_iou`` [K];
        ``confusion`` int64 [K, K], labels in rows.

    Raises:
        ValueError: see :func:`confusion_matrix`, or no pixel counts.
    """
    return scores_of_confusion(confusion_matrix(labels, preds, num_classes, ignore_index))


def mean_iou(
    labels: Tensor, preds: Tensor, num_classes: int, ignore_index: int | None = 255
) -> dict[str, Any]:
    """Intersection over union, averaged over the classes that occur in labels or predictions.

    Args:
        labels: see :func:`segmentation_scores`.
        preds: see :func:`segmentation_scores`.
        num_classes: K.
        ignore_index: label of pixels that do not count.

    Returns:
        ``miou``, in [0, 1]; ``iou`` [K], nan for a class that does not occur; ``confusion`` int64 [K, K].

    Raises:
        ValueError: see :func:`segmentation_scores`.
    """
    scores = segmentation_scores(labels, preds, num_classes, ignore_index)
    confusion = scores["confusion"]
    absent = confusion.sum(0) + confusion.sum(1) == 0
    return {
        "miou": scores["class_iou_present"],
        "iou": scores["per_class_iou"].masked_fill(absent, torch.nan),
        "confusion": confusion,
    }


def decode_color_labels(rgb: Tensor, palette: Tensor) -> Tensor:
    """The class whose colour is nearest, for every pixel of a painted label map.

    Nearest by Euclidean distance in RGB; among equally near colours the first counts. (That the paper decoded
    photo-to-label results like this is recalled, not verified.)

    Args:
        rgb: [..., 3, H, W].
        palette: colours of the classes [K, 3], in the range of ``rgb``.

    Returns:
        Classes [..., H, W], int64.

    Raises:
        ValueError: images or colours without three channels, or no colour.
    """
    if rgb.ndim < 3 or rgb.shape[-3] != 3:
        raise ValueError(f"painted labels of shape {list(rgb.shape)} must be [..., 3, H, W]")
    if palette.ndim != 2 or palette.shape[1] != 3 or not len(palette):
        raise ValueError(f"a palette of shape {list(palette.shape)} must be [K, 3] with K > 0")
    pixels = rgb.double()
    distances = [(pixels - colour[:, None, None]).square().sum(-3) for colour in palette.to(pixels)]
    return torch.stack(distances).argmin(0)


class SegmentationScores(Metric):
    """The :func:`segmentation_scores` over all batches and processes.

    Args:
        num_classes: K.
        ignore_index: label of pixels that do not count.
        **kwargs: for ``torchmetrics.Metric``.

    Raises:
        ValueError: fewer than one class.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    confusion: Tensor

    def __init__(self, num_classes: int, ignore_index: int | None = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.add_state("confusion", zeros, dist_reduce_fx="sum")

    def update(self, labels: Tensor, preds: Tensor) -> None:
        """Adds images.

        Args:
            labels: classes [N, H, W].
            preds: predicted classes [N, H, W].

        Raises:
            ValueError: see :func:`confusion_matrix`.
        """
        self.confusion += confusion_matrix(labels, preds, self.num_classes, self.ignore_index)

    def compute(self) -> dict[str, Any]:
        """The scores by name, and what they were computed from.

        Raises:
            ValueError: no pixel counted.
        """
        return scores_of_confusion(self.confusion)
