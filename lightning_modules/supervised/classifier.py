"""A plain classifier: teachers, judges, networks to look into."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.supervised.base import SupervisedModule

NO_CLASS = -1


class Classifier(SupervisedModule):
    """Cross entropy on ``label`` [B]; images with label -1, which are of none of the classes, do not count.

    Arguments and errors are those of :class:`~lightning_modules.supervised.base.SupervisedModule`. Logs ``val/loss``,
    ``val/accuracy`` and ``test/accuracy``, in [0, 1].
    """

    task = "classification"
    classes_attribute = "class_names"

    def __init__(self, num_classes: int = 10, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(num_classes, average="micro", ignore_index=NO_CLASS)
            for _ in range(2)
        )
        self.val_loss = MeanMetric()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean cross entropy of a batch with ``image`` [B, C, H, W] in [0, 1] and ``label`` [B]."""
        return F.cross_entropy(self(batch["image"]), batch["label"], ignore_index=NO_CLASS)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and accuracy."""
        logits, labels = self(batch["image"]), batch["label"]
        self.val_accuracy.update(logits, labels)
        self.log("val/accuracy", self.val_accuracy, on_step=False, on_epoch=True)
        losses = F.cross_entropy(logits, labels, ignore_index=NO_CLASS, reduction="none")
        self.val_loss.update(losses, (labels != NO_CLASS).to(losses))
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy."""
        self.test_accuracy.update(self(batch["image"]), batch["label"])
        self.log("test/accuracy", self.test_accuracy, on_step=False, on_epoch=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The most probable class of every image.

        Returns:
            Columns ``label`` (names) and ``confidence`` ([B], in (0, 1]).
        """
        confidence, label = torch.softmax(self(batch["image"]), 1).max(1)
        return {"label": [self.class_names[k] for k in label.tolist()], "confidence": confidence}
