"""Stops a run whose loss is no longer a number, on all ranks together, before it is saved."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.checkpoint import find_checkpoint_callback


class NonFiniteLossError(ArithmeticError):
    """A loss became infinite or not a number."""


class FiniteGuard(Callback):
    """Checks the losses of every batch, and the weights before they are saved.

    Works with any module: it looks at ``module.losses`` (name to scalar, as :class:`AdversarialModule` keeps
    them) and at the ``loss`` that ``training_step`` returned. Being no checkpoint callback, it runs before those, so a
    broken state is never saved. The gradients of a finite loss can still break the weights, which the next loss would
    tell, but a checkpoint may be due before.
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
        raise NonFiniteLossError(
            f"{', '.join(names) or 'a loss of another rank'} at {_place(trainer)}"
        )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Checks the weights.

        Raises:
            NonFiniteLossError: on all ranks, if a weight of any rank is not finite.
        """
        if trainer.state.fn != "fit":
            return
        names = [name for name, p in pl_module.named_parameters() if not p.isfinite().all()]
        if trainer.strategy.reduce_boolean_decision(bool(names), all=False):
            raise NonFiniteLossError(
                f"{len(names)} weights ({', '.join(names[:3]) or 'of another rank'}) are no finite numbers any more at "
                f"{_place(trainer)}"
            )


def _place(trainer: Trainer) -> str:
    """Where it happened, what is left, and what to do."""
    checkpoints = find_checkpoint_callback(trainer)
    left = checkpoints.last_good(trainer) if checkpoints else "no checkpoint is written"
    batch = trainer.fit_loop.epoch_loop.batch_idx
    return (
        f"epoch {trainer.current_epoch}, batch {batch}; {left}. Mend the data, lower the learning rate or clip the "
        "gradients, then continue from there with --run.resume true"
    )
