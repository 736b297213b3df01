"""The K+1 phase of OSRCI alone: any classifier, any open set."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_modules.osrci.losses import kplusone_loss, open_set_score
from lightning_modules.paper import PaperModule


class KPlusOneClassifierModule(PaperModule):
    """The K+1 phase alone: any classifier with K logits against any set of open-set images.

    Args:
        classifier: maps images [B, C, H, W] to K logits; trained in place.
        open_set: images [N, C, H, W] in [0, 1] of the class "unknown".
        lr: learning rate of Adam.
        betas: of Adam.
    """

    bar_terms = ("closed", "open")

    def __init__(
        self,
        classifier: torch.nn.Module,
        open_set: Tensor,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        super().__init__()
        self.save_hyperparameters("lr", "betas")
        self.classifier = classifier
        self.register_buffer("open_set", open_set)

    @classmethod
    def from_classifier(
        cls, classifier: torch.nn.Module, open_set: Tensor, **options: Any
    ) -> "KPlusOneClassifierModule":
        """Starts from a copy of ``classifier``, weights and buffers, and leaves the original alone."""
        return cls(copy.deepcopy(classifier), open_set, **options)

    def configure_optimizers(self) -> Optimizer:
        """Adam, as in the joint phase, with a smaller learning rate."""
        hparams: Any = self.hparams
        return Adam(self.classifier.parameters(), lr=hparams.lr, betas=tuple(hparams.betas))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]; the logit of "unknown" is the constant 0."""
        return self.classifier(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Closed loss on the known batch plus open loss on as many open-set images."""
        images: Any = self.open_set
        uniform = self.draw("open_set", "uniform", len(batch["image"]))
        unknown = images[(uniform * len(images)).long()]
        loss = kplusone_loss(self(batch["image"]), batch["label"], self(unknown))
        self.losses = {name: value.detach() for name, value in loss.items()}
        return loss["total"]

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Margin score (larger is more unknown) and the best known class of every image."""
        logits = self(batch["image"])
        return {"score": open_set_score(logits, kind="margin"), "label": logits.argmax(1)}
