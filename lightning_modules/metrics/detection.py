"""Mean average precision of object detection by the rules of PASCAL VOC.

The rules are those of the VOC development kit (recalled, not verified against its code): detections of a class are
taken in the order of their scores; one is right if its IoU with the true object of that class it overlaps most reaches
0.5, last pixels included, and no detection before it has found that object; those that find an object marked as
difficult do not count. Boxes are ``x0, y0, x1, y1`` in pixels, the last column and row included.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchvision.ops import box_iou

from lightning_modules.metrics.samples import SampleMetric

Interpolation = Literal["continuous", "11_point"]

EDGES = (0, 0, 1, 1)
"""From the last pixel of a box to the edge behind it."""

RIGHT, WRONG, IGNORED = 1, 0, -1
TRUTH = 2
ROWS_OF_AN_IMAGE = 2**20


def average_precision(
    scores: ArrayLike | Tensor,
    right: ArrayLike | Tensor,
    objects: int,
    interpolation: Interpolation = "continuous",
) -> float:
    """Average precision of one class.

    Detections of equal score count as one step, so their order plays no part.

    Args:
        scores: of the detections [N], in any order.
        right: whether each of them is right [N].
        objects: number of true objects, found or not; difficult ones excluded.
        interpolation: ``continuous``, the area under the precision that no larger recall exceeds (VOC from 2010 on),
            or ``11_point``, its mean at recalls 0, 0.1 ... 1 (VOC 2007).

    Returns:
        In [0, 1]; nan without an object.

    Raises:
        ValueError: columns of different lengths, nan, more right detections than objects, unknown interpolation.
    """
    if interpolation not in get_args(Interpolation):
        names = ", ".join(get_args(Interpolation))
        raise ValueError(f"unknown interpolation={interpolation!r}; choose one of {names}")
    values, hits = _array(scores).astype(np.float64), _array(right).astype(bool)
    if values.shape != hits.shape:
        raise ValueError(f"{values.size} scores, but {hits.size} detections that are right or not")
    if np.isnan(values).any():
        raise ValueError("scores contain nan")
    if hits.sum() > objects:
        raise ValueError(f"{hits.sum()} right detections of {objects} objects")
    if not objects:
        return float("nan")
    order = np.argsort(-values, kind="stable")
    found = np.cumsum(hits[order])
    last = np.append(np.diff(values[order]) != 0, True)[: len(order)]
    recall = found[last] / objects
    precision = found[last] / (np.flatnonzero(last) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "continuous":
        return float((np.diff(recall, prepend=0.0) * highest).sum())
    # Of whole numbers: 0.1 has no exact float, and a recall of 3/10 must reach the fourth step.
    places = np.searchsorted(10 * found[last], np.arange(11) * objects)
    return float(np.append(highest, 0.0)[places].mean())


def match_detections(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    true_labels: Tensor,
    difficult: Tensor | None = None,
    iou_threshold: float = 0.5,
) -> Tensor:
    """Which detections in one image are right.

    Args:
        boxes: [N, 4].
        scores: [N].
        labels: classes [N].
        true_boxes: [G, 4].
        true_labels: classes [G].
        difficult: objects that need not be found, bool [G]; None for no such object.
        iou_threshold: IoU that finds an object.

    Returns:
        int64 [N] on the CPU: 1 right, 0 wrong, -1 found a difficult object and does not count.

    Raises:
        ValueError: shapes that do not fit.
    """
    for name, corners, classes in (("", boxes, labels), ("true_", true_boxes, true_labels)):
        if corners.shape != (len(classes), 4):
            raise ValueError(
                f"{name}boxes of shape {list(corners.shape)} must be [N, 4] with N = {len(classes)}, the number of "
                f"{name}labels"
            )
    edges = torch.tensor(EDGES, dtype=torch.float64)
    found, true = (corners.detach().cpu().double() + edges for corners in (boxes, true_boxes))
    outcome = torch.full((len(boxes),), WRONG)
    if not len(true) or not len(found):
        return outcome
    same = labels.detach().cpu()[:, None] == true_labels.cpu()
    overlaps = box_iou(found, true).masked_fill(~same, -1.0)
    best, place = (values.tolist() for values in overlaps.max(1))
    unimportant = [False] * len(true) if difficult is None else difficult.tolist()
    taken = [False] * len(true)
    for n in scores.detach().cpu().argsort(descending=True, stable=True).tolist():
        object_ = place[n]
        if best[n] < iou_threshold:
            continue
        if unimportant[object_]:
            outcome[n] = IGNORED
        elif not taken[object_]:
            outcome[n], taken[object_] = RIGHT, True
    return outcome


class DetectionAveragePrecision(SampleMetric):
    """Mean of the :func:`average_precision` of all classes, over all batches and processes.

    Args:
        num_classes: K.
        iou_threshold: IoU that finds an object.
        interpolation: see :func:`average_precision`.
        **kwargs: for ``torchmetrics.Metric``.

    Raises:
        ValueError: values out of range.
    """

    # A row for each detection, and one for each object.
    columns: ClassVar = {"labels": torch.long, "scores": torch.float64, "outcome": torch.long}

    def __init__(
        self,
        num_classes: int,
        iou_threshold: float = 0.5,
        interpolation: Interpolation = "continuous",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or not 0 < iou_threshold <= 1:
            raise ValueError(
                f"num_classes={num_classes} must be at least 1 and iou_threshold={iou_threshold} in (0, 1]"
            )
        if interpolation not in get_args(Interpolation):
            names = ", ".join(get_args(Interpolation))
            raise ValueError(f"unknown interpolation={interpolation!r}; choose one of {names}")
        self.num_classes = num_classes
        self.iou_threshold = iou_threshold
        self.interpolation: Interpolation = interpolation

    def update(
        self,
        detections: Sequence[dict[str, Tensor]],
        boxes: Tensor,
        labels: Tensor,
        index: Tensor,
        difficult: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            detections: for each image ``boxes`` [N, 4], ``scores`` [N] and ``labels`` [N], N different in each.
            boxes: true ones [B, M, 4]; rows whose first value is negative are none.
            labels: true classes [B, M]; rows of -1 are no object.
            index: position of each image in the dataset [B].
            difficult: objects that need not be found, bool [B, M].

        Raises:
            ValueError: shapes that do not fit, or classes outside 0 .. K - 1.
        """
        if not len(detections) == len(boxes) == len(labels) == len(index):
            raise ValueError(
                f"detections in {len(detections)} images, boxes in {len(boxes)}, labels in {len(labels)}, "
                f"{len(index)} indices"
            )
        for row, (found, image) in enumerate(zip(detections, index.tolist(), strict=True)):
            real = (labels[row] >= 0) & (boxes[row, :, 0] >= 0)
            hard = torch.zeros_like(real) if difficult is None else difficult[row].bool()
            classes = labels[row][real]
            for values in (classes, found["labels"]):
                wrong = values[(values < 0) | (values >= self.num_classes)]
                if len(wrong):
                    raise ValueError(
                        f"an object has class {int(wrong[0])}, expected 0 to {self.num_classes - 1}; set num_classes"
                    )
            outcome = match_detections(
                **found,
                true_boxes=boxes[row][real],
                true_labels=classes,
                difficult=hard[real],
                iou_threshold=self.iou_threshold,
            ).to(labels.device)
            wanted = labels[row][real & ~hard]
            self._add(image, wanted, torch.full(wanted.shape, torch.inf), TRUTH, 0)
            self._add(image, found["labels"], found["scores"], outcome, len(boxes[row]))

    def _add(
        self, image: int, labels: Tensor, scores: Tensor, outcome: Tensor | int, start: int
    ) -> None:
        places = image * ROWS_OF_AN_IMAGE + start + torch.arange(len(labels))
        outcome = torch.as_tensor(outcome).expand(len(labels))
        columns = {"labels": labels, "scores": scores, "outcome": outcome, "index": places}
        self.add(**{name: column.to(self.device) for name, column in columns.items()})

    def compute(self) -> dict[str, Tensor]:
        """``map``, the mean over the classes that have objects, in [0, 1]; ``ap`` [K], nan for the others.

        Raises:
            ValueError: there was no object at all.
        """
        rows = self.rows()
        labels, outcome = rows["labels"], rows["outcome"]
        values = []
        for label in range(self.num_classes):
            counted = (labels == label) & ((outcome == RIGHT) | (outcome == WRONG))
            objects = int(((labels == label) & (outcome == TRUTH)).sum())
            scores, right = rows["scores"][counted], outcome[counted] == RIGHT
            values.append(average_precision(scores, right, objects, self.interpolation))
        if np.isnan(values).all():
            raise ValueError("mean average precision needs at least one object, there was none")
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        ap = torch.tensor(values, dtype=wide, device=self.device)
        return {"map": ap.nanmean(), "ap": ap}


def _array(values: ArrayLike | Tensor) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values).ravel()
