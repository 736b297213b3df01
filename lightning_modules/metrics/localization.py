"""Metrics of weakly supervised object localization. Accuracies and errors are in percent.

MaxBoxAcc, MaxBoxAccV2 and PxAP: Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR
2020 and TPAMI 2022 (released code). Top-1, Top-5 and GT-known localization error: ILSVRC, as evaluated by CAM (Zhou et
al., CVPR 2016). All keep integer counts that are summed over processes, so that the result does not depend on their
number; samplers must not pad with samples that come twice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.metrics.boxes import Select, best_iou, box_sweep

IGNORED = 255  # pixels of a mask that count neither way


def threshold_grid(steps: int = 1000) -> Tensor:
    """The thresholds 0, 1/steps, ... below 1, float64 [steps].

    All code takes them from here: ``int(t * 255)`` depends on the last bit of t.

    Raises:
        ValueError: no step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    return torch.from_numpy(np.arange(0, 1, 1 / steps)[:steps].copy())


class _CountMetric(Metric):
    """Sums integer states over batches and processes."""

    full_state_update = False
    is_differentiable = False

    def _add_counts(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def _check_samples(self, count: Tensor) -> None:
        if count == 0:
            raise ValueError(f"{type(self).__name__} has seen no sample; call update first")


class MaxBoxAcc(_CountMetric):
    """Share of images with a right box, in percent, at the best threshold for the whole set.

    A box is right if its IoU with some ground-truth box of the image reaches the IoU threshold
    (:func:`~lightning_modules.metrics.boxes.box_iou_inclusive`). Boxes come from the map of the true class by
    :func:`~lightning_modules.metrics.boxes.boxes_from_map`. The best threshold is chosen on the very images it is
    judged on ("oracle"); to judge one chosen on validation data, set ``at_threshold``.

    Args:
        iou_thresholds: in (0, 1].
        multi_contour: judge the best of all boxes of an image instead of the largest (V2).
        thresholds: share of the maximum of a map, ascending [T], or how many (see :func:`threshold_grid`).
        at_threshold: a threshold to report besides the best one. May be set at any time before ``compute``.
        quantize: see :func:`~lightning_modules.metrics.boxes.boxes_from_map`.
        **kwargs: for ``torchmetrics.Metric``.

    Raises:
        ValueError: values outside their range.
    """

    higher_is_better = True
    name = "max_box_acc"
    hits: Tensor
    count: Tensor

    def __init__(
        self,
        iou_thresholds: Sequence[float] = (0.5,),
        multi_contour: bool = False,
        thresholds: ArrayLike | Tensor | int = 1000,
        at_threshold: float | None = None,
        quantize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not iou_thresholds or not all(0 < iou <= 1 for iou in iou_thresholds):
            raise ValueError(f"iou_thresholds={iou_thresholds} must be one or more in (0, 1]")
        self.iou_thresholds = tuple(iou_thresholds)
        self.multi_contour = multi_contour
        self.quantize = quantize
        self.thresholds = _grid(thresholds)
        self.at_threshold = at_threshold
        if at_threshold is not None:
            self._index(at_threshold)
        self._add_counts("hits", len(self.iou_thresholds), len(self.thresholds))
        self._add_counts("count")

    def update(self, maps: Tensor, boxes: Sequence[Tensor]) -> None:
        """Adds a batch.

        Args:
            maps: maps of the true classes, at the resolution of the boxes and normalised to [0, 1] after resizing
                [B, H, W].
            boxes: ground-truth boxes of each image, ``x0, y0, x1, y1``, last pixels included [G, 4], G >= 1.

        Raises:
            ValueError: numbers of maps and boxes that differ, an image without a box, maps outside [0, 1].
        """
        if maps.ndim != 3 or len(maps) != len(boxes):
            raise ValueError(
                f"maps [B, H, W] and boxes of B images are needed, got maps of shape "
                f"{tuple(maps.shape)} and boxes of {len(boxes)} images"
            )
        select: Select = "all" if self.multi_contour else "largest"
        hits = np.zeros(self.hits.shape, dtype=np.int64)
        limits = np.array(self.iou_thresholds)[:, None]
        for values, truth in zip(maps, boxes, strict=True):
            sweep = box_sweep(values, self.thresholds, select, self.quantize)
            best = best_iou(sweep.boxes, truth)
            starts = np.flatnonzero(np.diff(sweep.level, prepend=-1))
            hits += (np.maximum.reduceat(best, starts) >= limits)[:, sweep.level_of_threshold]
        self.hits += torch.from_numpy(hits).to(self.hits.device)
        self.count += len(maps)

    def compute(self) -> dict[str, Tensor]:
        """Accuracies in percent, and thresholds, float64 (float32 on MPS).

        ``max_box_acc``: the mean over IoU thresholds of the accuracies at their own best thresholds. For each IoU
        threshold, say 0.5: ``max_box_acc@50``; ``threshold@50``, the best threshold (of equal ones the lowest);
        ``curve@50``, accuracy at every threshold [T]. With ``at_threshold``: ``box_acc`` and ``box_acc@50`` at it.

        Raises:
            ValueError: no image was added.
        """
        self._check_samples(self.count)
        curves = _percent(self.hits, self.count)
        names = [f"{100 * iou:g}" for iou in self.iou_thresholds]
        best, where = curves.cpu().max(1).values, curves.cpu().numpy().argmax(1)
        values = {self.name: best.mean()}
        if self.at_threshold is not None:
            fixed = curves[:, self._index(self.at_threshold)]
            values[self.name.removeprefix("max_")] = fixed.mean()
            for name, value in zip(names, fixed, strict=True):
                values[f"{self.name.removeprefix('max_')}@{name}"] = value
        for row, name in enumerate(names):
            values[f"{self.name}@{name}"] = best[row]
            values[f"threshold@{name}"] = self.thresholds[where[row]].to(curves.dtype)
            values[f"curve@{name}"] = curves[row]
        return {name: value.to(curves.device) for name, value in values.items()}

    def _index(self, threshold: float) -> int:
        distance = (self.thresholds - threshold).abs()
        if distance.min() > 1e-6:
            raise ValueError(
                f"at_threshold={threshold} is not one of the {len(self.thresholds)} thresholds from "
                f"{self.thresholds[0]:g} to {self.thresholds[-1]:g}; take a value that compute gave as the "
                "best, or add it to thresholds"
            )
        return int(distance.argmin())


class MaxBoxAccV2(MaxBoxAcc):
    """Mean of the box accuracies at IoU 0.3, 0.5 and 0.7, in percent, each at its own best threshold.

    Of all boxes of an image, around every part of the mask and around holes, the best one counts. Names in ``compute``
    begin with ``max_box_acc_v2``.

    Args:
        iou_thresholds: in (0, 1].
        **kwargs: for :class:`MaxBoxAcc`.
    """

    name = "max_box_acc_v2"

    def __init__(self, iou_thresholds: Sequence[float] = (0.3, 0.5, 0.7), **kwargs: Any) -> None:
        super().__init__(iou_thresholds, multi_contour=True, **kwargs)


class PxAP(_CountMetric):
    """Pixel average precision of maps against masks, in percent.

    The area under the precision-recall curve over all pixels of the set: the sum over thresholds, from high to low, of
    precision times the growth of recall.

    Args:
        thresholds: ascending, from 0, below 1 [T], or how many (see :func:`threshold_grid`).
        **kwargs: for ``torchmetrics.Metric``.

    Raises:
        ValueError: thresholds out of order or range.
    """

    higher_is_better = True
    positive: Tensor
    negative: Tensor

    def __init__(self, thresholds: ArrayLike | Tensor | int = 1000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.thresholds = _grid(thresholds)
        # The last bin holds the value 1 alone.
        self._add_counts("positive", len(self.thresholds) + 1)
        self._add_counts("negative", len(self.thresholds) + 1)

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Adds a batch.

        Args:
            maps: values in [0, 1] [B, H, W].
            masks: 1 = object, 0 = background, 255 = ignored; same shape.

        Raises:
            ValueError: shapes that differ or values out of range.
        """
        if maps.shape != masks.shape:
            raise ValueError(
                f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} differ in shape"
            )
        masks = masks.to(maps.device)
        if maps.numel() and not (maps.amin() >= 0 and maps.amax() <= 1):
            raise ValueError(
                f"the values of maps must be in [0, 1], got {float(maps.amin())} to "
                f"{float(maps.amax())}; apply normalize_map first"
            )
        if not ((masks == 0) | (masks == 1) | (masks == IGNORED)).all():
            raise ValueError(
                f"masks must hold 0, 1 and {IGNORED} only, got {masks.unique().tolist()[:10]}"
            )
        if maps.device.type == "mps":  # has no float64
            maps, masks = maps.cpu(), masks.cpu()
        edges = torch.cat([self.thresholds, torch.ones(1, dtype=torch.float64)]).to(maps.device)
        bins = torch.bucketize(maps.detach().double(), edges, right=True) - 1
        for value, state in ((1, self.positive), (0, self.negative)):
            state += torch.bincount(bins[masks == value], minlength=len(edges)).to(state.device)

    def compute(self) -> dict[str, Tensor]:
        """``pxap`` in percent, float64 (float32 on MPS).

        Raises:
            ValueError: there was no pixel of an object.
        """
        if self.positive.sum() == 0:
            raise ValueError("PxAP needs masks with at least one pixel of value 1, there was none")
        positive, negative = (
            counts.cpu().double().flip(0) for counts in (self.positive, self.negative)
        )
        hits, alarms = positive.cumsum(0), negative.cumsum(0)
        precision = hits / (hits + alarms).clamp_min(1)
        value = 100 * (precision * positive).sum() / positive.sum()
        return {"pxap": value.to(self.positive.device, _wide(self.positive.device))}


def localization_flags(
    classes: ArrayLike | Tensor,
    boxes: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    truth: Sequence[ArrayLike | Tensor],
    iou_threshold: float = 0.5,
    topk: Sequence[int] = (1, 5),
) -> dict[str, Tensor]:
    """What is right about ranked classes and their boxes, image by image.

    Args:
        classes: the predicted classes, best first [B, R]. A class may come twice with different boxes, as in the
            combined top-5 of CAM (class 1 with two boxes, class 2 with two, class 3).
        boxes: the box of each of them, ``x0, y0, x1, y1`` [B, R, 4].
        labels: true classes [B].
        truth: ground-truth boxes of each image [G, 4], G >= 1.
        iou_threshold: a box is right if its IoU with some ground-truth box, last pixels included, reaches this.
        topk: numbers of ranks to look at, each at most R.

    Returns:
        Bool [B] by name: ``top1_cls``: the label is among the first 1; ``top1_loc``: it is, and there with a right box;
        and so on for every number of ``topk``.

    Raises:
        ValueError: shapes that do not fit, an image without a ground-truth box, or fewer than ``max(topk)`` ranks.
    """
    ranked, corners, wanted = (
        np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        for value in (classes, boxes, labels)
    )
    if ranked.ndim != 2 or corners.shape != (*ranked.shape, 4) or wanted.shape != ranked.shape[:1]:
        raise ValueError(
            "classes [B, R], boxes [B, R, 4] and labels [B] are needed, got "
            f"{ranked.shape}, {corners.shape} and {wanted.shape}"
        )
    if len(truth) != len(ranked):
        raise ValueError(f"{len(ranked)} images, but ground-truth boxes of {len(truth)}")
    if not topk or not 1 <= min(topk) <= max(topk) <= ranked.shape[1]:
        raise ValueError(
            f"topk={tuple(topk)} must lie between 1 and the number of ranked classes, {ranked.shape[1]}"
        )
    same = ranked == wanted[:, None]
    placed = np.zeros_like(same)
    for row, (found, true) in enumerate(zip(corners, truth, strict=True)):
        placed[row] = best_iou(found, true) >= iou_threshold
    flags = {}
    for k in topk:
        flags[f"top{k}_cls"] = torch.from_numpy(same[:, :k].any(1))
        flags[f"top{k}_loc"] = torch.from_numpy((same & placed)[:, :k].any(1))
    return flags


class LocalizationError(_CountMetric):
    """Top-k and GT-known localization errors and top-k classification errors, in percent.

    Top-k localization is wrong unless the label is among the first k classes *and* the box of that class is right;
    GT-known localization looks at the box of the true class alone. See :func:`localization_flags`.

    Args:
        topk: the values of k.
        iou_threshold: IoU that makes a box right, last pixels included.
        **kwargs: for ``torchmetrics.Metric``.

    Raises:
        ValueError: values out of range.
    """

    higher_is_better = False
    correct: Tensor
    count: Tensor
    known_correct: Tensor
    known_count: Tensor

    def __init__(
        self, topk: Sequence[int] = (1, 5), iou_threshold: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not topk or min(topk) < 1 or not 0 < iou_threshold <= 1:
            raise ValueError(
                f"topk={topk} must be positive and iou_threshold={iou_threshold} in (0, 1]"
            )
        self.topk = tuple(topk)
        self.iou_threshold = iou_threshold
        self._add_counts("correct", 2 * len(self.topk))
        for name in ("count", "known_correct", "known_count"):
            self._add_counts(name)

    def update(
        self,
        classes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        truth: Sequence[Tensor],
        known_boxes: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            classes: the predicted classes, best first [B, R], R >= max(topk).
            boxes: the box of each of them [B, R, 4].
            labels: true classes [B].
            truth: ground-truth boxes of each image [G, 4].
            known_boxes: the box from the map of the true class [B, 4], for the GT-known error.

        Raises:
            ValueError: see :func:`localization_flags`.
        """
        flags = localization_flags(classes, boxes, labels, truth, self.iou_threshold, self.topk)
        if known_boxes is not None:
            known = localization_flags(
                labels[:, None], known_boxes[:, None], labels, truth, self.iou_threshold, (1,)
            )
            self.known_correct += int(known["top1_loc"].sum())
            self.known_count += len(labels)
        sums = torch.stack([flag.sum() for flag in flags.values()])
        self.correct += sums.to(self.correct.device)
        self.count += len(labels)

    def compute(self) -> dict[str, Tensor]:
        """Errors in percent, float64 (float32 on MPS).

        ``top1_cls_error``, ``top1_loc_error`` and so on for every k; ``gt_known_error`` if boxes of the true classes
        were given.

        Raises:
            ValueError: no image was added.
        """
        self._check_samples(self.count)
        names = [f"top{k}_{what}_error" for k in self.topk for what in ("cls", "loc")]
        errors = dict(zip(names, _percent(self.count - self.correct, self.count), strict=True))
        if self.known_count > 0:
            wrong = self.known_count - self.known_correct
            errors["gt_known_error"] = _percent(wrong, self.known_count)
        return errors


def _grid(thresholds: ArrayLike | Tensor | int) -> Tensor:
    if isinstance(thresholds, int):
        return threshold_grid(thresholds)
    values = torch.as_tensor(np.asarray(thresholds, dtype=np.float64).ravel())
    ascending = len(values) and bool((values.diff() > 0).all())
    if not ascending or not (values[0] >= 0 and values[-1] < 1):
        raise ValueError(f"thresholds must be ascending numbers in [0, 1), got {values.tolist()}")
    return values


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _percent(part: Tensor, whole: Tensor) -> Tensor:
    wide = _wide(part.device)
    return 100 * part.to(wide) / whole.to(wide)
