"""A plain detector: SSD on MobileNetV2."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchvision.ops import box_iou

from lightning_modules.metrics.detection import EDGES, DetectionAveragePrecision
from lightning_modules.nn.modes import eval_mode
from lightning_modules.nn.statistics import average_over_ranks
from lightning_modules.supervised.base import SupervisedModule
from lightning_modules.supervised.ssd import SSDNetwork


class Detector(SupervisedModule):
    """SSD's loss on ``boxes`` [B, M, 4] and ``object_labels`` [B, M]; rows of -1 are no object.

    Boxes are x0, y0, x1, y1 in pixels of the image, the last column and row included, here as in the data. Further
    arguments and errors are those of :class:`~lightning_modules.supervised.base.SupervisedModule`. Logs ``train/loss``
    and its parts ``classification`` and ``boxes``, ``val/loss``, ``val/map`` and ``test/map``, the mean average
    precision of PASCAL VOC at IoU 0.5, in [0, 1], and ``test/ap_CLASS``.

    Args:
        num_classes: K, without the background; must be the data's.
        network: ``mobilenet_v2``, which ``pretrained`` is for (the part before the detection heads); ``small``, a
            narrow one for small images; or an :class:`~lightning_modules.supervised.ssd.SSDNetwork` of your own.
        width: of ``small``: channels of the first layer, 32 for the full width of MobileNetV2.
        score_threshold: probability from which on a prediction reports an object. Average precision looks at all.

    Raises:
        ValueError: also for a network of your own that is no SSDNetwork for K + 1 classes.
    """

    task = "detection"
    classes_attribute = "class_names"
    network: SSDNetwork

    def __init__(
        self,
        num_classes: int = 20,
        network: str | nn.Module = "mobilenet_v2",
        width: int = 16,
        score_threshold: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, network=network, width=width, **options)
        if not 0 <= score_threshold <= 1:
            raise ValueError(
                f"score_threshold={score_threshold} must be in [0, 1] (--model.score_threshold)"
            )
        if not isinstance(self.network, SSDNetwork):
            raise ValueError(
                f"network={type(self.network).__name__} is no detector: give an SSDNetwork for {num_classes + 1} "
                "classes, the background among them"
            )
        self.val_precision, self.test_precision = (
            DetectionAveragePrecision(num_classes) for _ in range(2)
        )
        self.val_loss = MeanMetric()

    @property
    def pretrained_part(self) -> nn.Module:
        """MobileNetV2's own layers."""
        backbone = nn.Module()
        backbone.features = self.network.backbone.features
        return backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """What SSD says about every default box of images [B, C, H, W] in [0, 1], float32 or better.

        Returns:
            ``cls_logits`` [B, A, K + 1], class 0 for the background, and ``bbox_regression`` [B, A, 4].

        Raises:
            ValueError: the images have channels that the network does not take.
        """
        return self._outputs(self.network, self.to_network(images))

    @staticmethod
    def _outputs(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        return {
            name: values.to(torch.promote_types(values.dtype, torch.float32))
            for name, values in network(inputs).items()
        }

    # ------------------------------------------------------------------ training
    def loss(self, batch: dict[str, Any]) -> Tensor:
        """SSD's loss, a scalar: the sum of :meth:`loss_terms`."""
        return torch.stack([*self.loss_terms(batch).values()]).sum()

    def loss_terms(
        self, batch: dict[str, Any], network: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """The parts of SSD's loss for a batch with ``image``, ``boxes`` and ``object_labels``.

        Args:
            batch: see above.
            network: see :meth:`detect`.

        Returns:
            ``classification``: cross entropy of the default boxes that match an object, and of three times as many
            others, the worst; ``boxes``: smooth L1 loss of the former's corners. Both are divided by the number of
            default boxes that match; under several processes by the mean over these in training.

        Raises:
            ValueError: a class that the network does not know.
        """
        ssd, labels = self.network, batch["object_labels"]
        wrong = labels[(labels < -1) | (labels >= self.hp.num_classes)]
        if len(wrong):
            raise ValueError(
                f"an object has class {int(wrong[0])}, expected 0 to {self.hp.num_classes - 1} or -1; set "
                "--model.num_classes"
            )
        inputs = self.to_network(batch["image"])
        outputs = self._outputs(ssd if network is None else network, inputs)
        anchors = ssd.default_boxes(inputs)
        targets, matches = [], []
        for boxes, classes in zip(batch["boxes"], labels, strict=True):
            real = (classes >= 0) & (boxes[:, 0] >= 0)
            corners = boxes[real].to(anchors) + anchors.new_tensor(EDGES)
            targets.append({"boxes": corners, "labels": classes[real] + 1})
            if len(corners):
                matches.append(ssd.proposal_matcher(box_iou(corners, anchors)))
            else:
                matches.append(labels.new_full((len(anchors),), -1))
        found = ssd.compute_loss(targets, outputs, [anchors] * len(targets), matches)
        matched = (torch.stack(matches) >= 0).sum().to(found["classification"].dtype)
        share = self._share_of_matches(matched)
        return {
            "classification": share * found["classification"],
            "boxes": share * found["bbox_regression"],
        }

    def _share_of_matches(self, matched: Tensor) -> Tensor | float:
        """Turns a mean over this process's matches into its part of the mean over those of all processes."""
        if self._trainer is None or not self.trainer.training or self.trainer.world_size == 1:
            return 1.0
        mean = matched.clone()
        average_over_ranks(self.trainer, [mean])
        return matched.clamp_min(1) / mean.clamp_min(1 / self.trainer.world_size)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of the batch."""
        terms = self.loss_terms(batch)
        loss = torch.stack([*terms.values()]).sum()
        self.losses = {name: value.detach() for name, value in {"loss": loss, **terms}.items()}
        return loss

    # ------------------------------------------------------------------ detections
    def detect(self, images: Tensor, network: nn.Module | None = None) -> list[dict[str, Tensor]]:
        """The objects in images [B, C, H, W] in [0, 1].

        Args:
            images: of any size.
            network: takes the place of this module's own, which it is a quantized copy of, for instance.

        Returns:
            For each image ``boxes`` [N, 4], ``scores`` [N] in [0, 1], descending, and ``labels`` int64 [N] from 0 to
            K - 1; at most 200 with scores above 0.01, after non-maximum suppression at IoU 0.45.
        """
        inputs = self.to_network(images)
        outputs = self._outputs(self.network if network is None else network, inputs)
        return self._decode(outputs, inputs)

    def _decode(self, outputs: dict[str, Tensor], inputs: Tensor) -> list[dict[str, Tensor]]:
        anchors = self.network.default_boxes(inputs)
        count, size = len(inputs), tuple(inputs.shape[-2:])
        found = self.network.postprocess_detections(outputs, [anchors] * count, [size] * count)
        edges = anchors.new_tensor(EDGES)
        return [
            {
                "boxes": each["boxes"] - edges,
                "scores": each["scores"],
                "labels": each["labels"] - 1,
            }
            for each in found
        ]

    @torch.no_grad()
    def average_precision(
        self, batches: Iterable[dict[str, Any]], network: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """How well objects are found, in evaluation mode.

        Args:
            batches: with ``image``, ``boxes``, ``object_labels``, ``index`` and perhaps ``difficult``.
            network: see :meth:`detect`.

        Returns:
            ``map`` and ``ap`` [K] of :class:`~lightning_modules.metrics.detection.DetectionAveragePrecision`.

        Raises:
            ValueError: there is no object.
        """
        metric = DetectionAveragePrecision(self.hp.num_classes)
        with eval_mode(self, network):
            for batch in batches:
                self.judge(metric, batch, network)
        return metric.compute()

    def judge(
        self,
        metric: DetectionAveragePrecision,
        batch: dict[str, Any],
        network: nn.Module | None = None,
    ) -> None:
        """Adds what is found in a batch to a metric, see :meth:`average_precision`."""
        truth = batch["boxes"], batch["object_labels"], batch["index"]
        detections = self.detect(batch["image"], network)
        metric.update(detections, *truth, difficult=batch.get("difficult"))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and detections."""
        self.val_loss.update(self.loss(batch), len(batch["image"]))
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.judge(self.val_precision, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/map``."""
        self.log("val/map", self.val_precision.compute()["map"].float())
        self.val_precision.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Detections."""
        self.judge(self.test_precision, batch)

    def on_test_epoch_end(self) -> None:
        """Logs ``test/map`` and the average precision of each class that has objects."""
        found = self.test_precision.compute()
        self.log("test/map", found["map"].float())
        for name, value in zip(self.class_names, found["ap"].float(), strict=True):
            if not value.isnan():
                self.log(f"test/ap_{name}", value)
        self.test_precision.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The objects found in every image, see :meth:`columns`."""
        return self.columns(batch)

    def columns(self, batch: dict[str, Any], network: nn.Module | None = None) -> dict[str, Any]:
        """What a prediction reports of a batch.

        Args:
            batch: with ``image``.
            network: see :meth:`detect`.

        Returns:
            Columns ``count`` ([B], objects of at least ``score_threshold``) and ``objects`` (a list of them as JSON
            text: ``label``, ``confidence``, and ``box`` in pixels of the file where the batch has ``original_size``,
            else of the image).
        """
        height, width = batch["image"].shape[-2:]
        rows = []
        for place, found in enumerate(self.detect(batch["image"], network)):
            boxes = found["boxes"].double().cpu()
            if "original_size" in batch:
                scale = batch["original_size"][place].cpu() / torch.tensor([height, width])
                edges = boxes.new_tensor(EDGES)
                boxes = (boxes + edges) * scale[[1, 0, 1, 0]] - edges
            rows.append(
                [
                    {
                        "label": self.class_names[label],
                        "confidence": round(score, 4),
                        "box": [round(value, 1) for value in box],
                    }
                    for label, score, box in zip(
                        found["labels"].tolist(),
                        found["scores"].tolist(),
                        boxes.tolist(),
                        strict=True,
                    )
                    if score >= self.hp.score_threshold
                ]
            )
        return {
            "count": torch.tensor([len(row) for row in rows]),
            "objects": [json.dumps(row) for row in rows],
        }
