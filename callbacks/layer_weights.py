"""The weights of ZAQ's feature layers, which follow the layers in which P and Q differ most."""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.report import require
from lightning_modules.nn.statistics import average_over_ranks
from lightning_modules.zaq.layer_weights import LayerWeightEMA

Interval = Literal["epoch", "step"]


class EMALayerWeights(Callback):
    """Moves the layer weights of a game by the softmax of the layers' distances.

    Protocol: the module offers ``layer_weight_ema``, the :class:`~lightning_modules.zaq.layer_weights.LayerWeightEMA`
    of the current game or None, and ``layer_distances``, [L] of the last batch or None. Weights and the sums of the
    epoch are buffers of the module, so that every checkpoint has them. Without this callback the weights stay 1/L.

    Logs ``train/layer_weight_N`` at the end of each epoch, N from 1.

    Args:
        momentum: share of the old weights (our choice: neither the paper as reported nor the released code tells).
        temperature: of the softmax.
        interval: update at the end of every ``epoch`` with its mean distances (paper), or at every ``step``.

    Raises:
        ValueError: unknown interval.
    """

    def __init__(
        self, momentum: float = 0.9, temperature: float = 1.0, interval: Interval = "epoch"
    ) -> None:
        LayerWeightEMA(1, momentum, temperature)  # raises for values that are none
        if interval not in get_args(Interval):
            raise ValueError(f"unknown interval={interval!r}; choose epoch or step")
        self.momentum = momentum
        self.temperature = temperature
        self.interval = interval

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module weighs no layers.
        """
        require(self, pl_module, "layer_weight_ema", "layer_distances")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes up the distances of the batch, the same on all processes."""
        module: Any = pl_module
        average, distances = module.layer_weight_ema, module.layer_distances
        if average is None or distances is None:
            return
        distances = distances.clone()
        average_over_ranks(trainer, [distances])
        average.momentum, average.temperature = self.momentum, self.temperature
        if self.interval == "step":
            average.update(distances)
        average.accumulate(distances)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Updates, logs and begins anew."""
        module: Any = pl_module
        average = module.layer_weight_ema
        if average is None or not average.distance_count:
            return
        if self.interval == "epoch":
            average.update(average.mean_distances())
        distances: list[float] = average.mean_distances().tolist()
        for number, (weight, distance) in enumerate(
            zip(average.weights.tolist(), distances, strict=True), 1
        ):
            module.log(f"train/layer_weight_{number}", torch.tensor(weight))
            module.log(f"train/layer_distance_{number}", torch.tensor(distance))
        average.reset()
