"""The learning rates, by the names of the optimizers."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.cluster_metrics import optimizer_names


class LearningRates(Callback):
    """Logs ``lr/OPTIMIZER`` beside the losses.

    Works with every module; Lightning's own monitor calls the three Adams of a GAN ``lr-Adam``, ``lr-Adam-1`` and
    ``lr-Adam-2``. An optimizer of several parameter groups shows that of the first.
    """

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Logs what this batch is going to use."""
        for name, optimizer in zip(
            optimizer_names(trainer, pl_module), trainer.optimizers, strict=True
        ):
            pl_module.log(f"lr/{name}", optimizer.param_groups[0]["lr"], on_step=True)
