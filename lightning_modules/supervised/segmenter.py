"""A plain segmenter: how well translated images keep their objects is judged by one."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lightning_modules.metrics.segmentation import SegmentationScores
from lightning_modules.supervised.base import SupervisedModule

VOID = 255


class Segmenter(SupervisedModule):
    """Cross entropy on ``mask`` [B, H, W], integers below K; pixels of 255 do not count.

    Arguments and errors are those of :class:`~lightning_modules.supervised.base.SupervisedModule`; ``small`` is a
    U-Net. Logs ``val/loss``, ``val/miou`` and ``test/miou``: from one confusion matrix over all images, the mean over
    the classes that occur, in [0, 1].
    """

    task = "segmentation"
    classes_attribute = "mask_classes"

    def __init__(self, num_classes: int = 2, width: int = 16, **options: Any) -> None:
        super().__init__(num_classes, width=width, **options)
        self.val_scores, self.test_scores = (SegmentationScores(num_classes) for _ in range(2))
        self.val_loss = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K, H, W], float32 or better, of images [B, C, H, W] in [0, 1].

        Raises:
            ValueError: the images have channels that the network does not take.
        """
        logits = super().forward(images)
        if logits.shape[-2:] == images.shape[-2:]:
            return logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean cross entropy of a batch with ``image`` [B, C, H, W] in [0, 1] and ``mask`` [B, H, W].

        Raises:
            ValueError: the mask has classes the network does not know.
        """
        return F.cross_entropy(self(batch["image"]), self._target(batch), ignore_index=VOID)

    def classes(self, images: Tensor) -> Tensor:
        """The most probable class of every pixel, int64 [B, H, W], of images [B, C, H, W] in [0, 1]."""
        return self(images).argmax(1)

    def _target(self, batch: dict[str, Any]) -> Tensor:
        mask = batch["mask"].long()
        wrong = mask[(mask != VOID) & ((mask < 0) | (mask >= self.hp.num_classes))]
        if len(wrong):
            raise ValueError(
                f"a mask has class {int(wrong[0])}, expected 0 to {self.hp.num_classes - 1} or {VOID}; set "
                "--model.num_classes"
            )
        return mask

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and confusions."""
        mask, logits = self._target(batch), self(batch["image"])
        self.val_scores.update(mask, logits.argmax(1))
        losses = F.cross_entropy(logits, mask, ignore_index=VOID, reduction="none")
        self.val_loss.update(losses, (mask != VOID).to(losses))
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/miou``."""
        self._log_miou("val", self.val_scores)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Confusions."""
        self.test_scores.update(self._target(batch), self.classes(batch["image"]))

    def on_test_epoch_end(self) -> None:
        """Logs ``test/miou``."""
        self._log_miou("test", self.test_scores)

    def _log_miou(self, stage: str, scores: SegmentationScores) -> None:
        self.log(f"{stage}/miou", scores.compute()["class_iou_present"])
        scores.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What the pixels of every image are of.

        Returns:
            Columns ``share_CLASS`` ([B], share of the pixels), one for each class, and ``confidence`` ([B], mean over
            the pixels, in (0, 1]).
        """
        confidence, classes = torch.softmax(self(batch["image"]), 1).max(1)
        shares = F.one_hot(classes, self.hp.num_classes).float().flatten(1, 2).mean(1)
        columns = {f"share_{name}": shares[:, k] for k, name in enumerate(self.class_names)}
        return {**columns, "confidence": confidence.flatten(1).mean(1)}
