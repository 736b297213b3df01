"""The same few samples, drawn again every few epochs."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from callbacks.media import batch_count, labelled_grid, log_images
from lightning_modules.arguments import demand_at_least
from lightning_modules.randomness import global_seed, mix


class ImageGrid(Callback):
    """Draws what the module makes of a fixed handful of samples.

    Protocol: the module offers ``image_grid(batch) -> dict[str, Tensor]``, row titles with images [N, C, H, W] in
    [0, 1]; it gets the first samples of the first validation batch (of the first training batch when there
    is no validation). It is called on all ranks, in evaluation mode, without gradients and with the
    random state of its own, the same in every epoch; training goes on as if it had not been called.

    The picture is ``images/grid-EPOCH.png`` in the run directory, and goes to all loggers that take pictures.

    Args:
        every_n_epochs: epochs from one picture to the next.
        pictures: samples drawn, side by side.

    Raises:
        ValueError: if an argument is below 1.
    """

    def __init__(self, every_n_epochs: int = 1, pictures: int = 8) -> None:
        demand_at_least(1, every_n_epochs=every_n_epochs, pictures=pictures)
        self.every_n_epochs = every_n_epochs
        self.pictures = pictures
        self._batch: Any = None
        self._from_training = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module draws nothing.
        """
        if stage == "fit" and not callable(getattr(pl_module, "image_grid", None)):
            raise MisconfigurationException(
                f"ImageGrid needs a module with image_grid(batch) -> dict[str, Tensor], which "
                f"{type(pl_module).__name__} lacks; write it or remove the callback"
            )

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the first samples of the first validation batch."""
        if self._batch is None and batch_idx == 0 and dataloader_idx == 0:
            self._batch = _first(batch, self.pictures)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the first training samples when there is no validation."""
        if self._batch is None and not trainer.enable_validation:
            self._batch = _first(batch, self.pictures)
            self._from_training = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws; the validation of the epoch has run by now.

        Raises:
            ValueError: if the module returns something else than rows of images.
        """
        if self._batch is None or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        rows = _draw(pl_module, _to(self._batch, pl_module.device))
        if trainer.is_global_zero:
            picture = labelled_grid(rows, self.pictures)
            log_images(trainer, "grid", picture, batch_count(trainer))

    def state_dict(self) -> dict[str, Any]:
        """The samples, where a resumed run could not find the same ones again: training data are shuffled."""
        return {"batch": _to(self._batch, torch.device("cpu"))} if self._from_training else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the samples of the run that is resumed."""
        if "batch" in state_dict:
            self._batch = state_dict["batch"]
            self._from_training = True


@torch.no_grad()
def _draw(pl_module: LightningModule, batch: Any) -> dict[str, Tensor]:
    modes = {module: module.training for module in pl_module.modules()}
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    pl_module.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(mix(global_seed(), "image grid"))
            return pl_module.image_grid(batch)  # type: ignore[operator]
    finally:
        # Not pl_module.train(): that would also put parts into training mode that were not.
        for module, mode in modes.items():
            module.training = mode


def _first(batch: Any, count: int) -> Any:
    """The first ``count`` samples of a batch, detached and copied."""
    if isinstance(batch, Tensor):
        return batch[:count].detach().clone() if batch.ndim else batch.detach().clone()
    if isinstance(batch, dict):
        return {key: _first(value, count) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        holds_parts = any(isinstance(value, Tensor | dict) for value in batch)
        parts = [_first(value, count) for value in batch] if holds_parts else batch[:count]
        return list(parts)
    return batch


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_to(value, device) for value in batch]
    return batch
