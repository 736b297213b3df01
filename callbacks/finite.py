"""Stops a run whose loss is no longer a number, on all ranks together, before it is saved."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.checkpoint import ResumableCheckpoint


class NonFiniteLossError(ArithmeticError):
    """A loss became infinite or not a number."""


class FiniteGuard(Callback):
    """Checks the losses of every batch.

    Works with any module: it looks at ``module.losses`` (name to scalar, as :class:`AdversarialModule` keeps
    them) and at the ``loss`` that ``training_step`` returned. Being no checkpoint callback, it runs before those, so a
    broken state is never saved.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks this batch.

        Raises:
            NonFiniteLossError: on all ranks, if a loss of any rank is not finite.
        """
        losses: dict[str, Tensor] = dict(getattr(pl_module, "losses", {}))
        if isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
            losses.setdefault("loss", outputs["loss"])
        if not losses:
            return
        values = torch.stack([loss.detach().float().reshape(()) for loss in losses.values()])
        broken = not bool(values.isfinite().all())
        if not trainer.strategy.reduce_boolean_decision(broken, all=False):
            return
        names = [
            f"{name} = {value:g}"
            for name, value in zip(losses, values.tolist(), strict=True)
            if value - value != 0
        ]
        path = ResumableCheckpoint.path_in(trainer.default_root_dir)
        last = (
            f"the last good checkpoint is {path}"
            if path.exists()
            else "no checkpoint was written yet"
        )
        raise NonFiniteLossError(
            f"{', '.join(names) or 'a loss of another rank'} at epoch {trainer.current_epoch}, "
            f"batch {batch_idx}; {last}. Lower the learning rate or clip the gradients, then continue from there"
        )
