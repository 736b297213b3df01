"""Batch statistics of the global batch, where they are allowed."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import SyncBatchNorm


class SynchronizedBatchNorm(Callback):
    """Turns BatchNorm into SyncBatchNorm, except in networks under a gradient penalty.

    SyncBatchNorm cannot be differentiated twice, so Lightning's ``sync_batchnorm: true``, which converts everything,
    breaks a critic with a gradient penalty. The exceptions are the module's ``gradient_penalised`` networks. Needs
    GPUs: there is no SyncBatchNorm on the CPU.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Converts before the optimizers are built.

        Raises:
            MisconfigurationException: on another accelerator than GPUs.
        """
        if stage != "fit" or trainer.world_size == 1:
            return
        if trainer.strategy.root_device.type != "cuda":
            raise MisconfigurationException(
                f"SynchronizedBatchNorm needs GPUs, this run is on {trainer.strategy.root_device.type}; "
                "remove the callback"
            )
        convert(pl_module)


def convert(module: LightningModule) -> None:
    """Converts the networks of ``module`` in place, apart from its ``gradient_penalised`` ones."""
    kept = getattr(module, "gradient_penalised", ())
    for name, network in list(module.named_children()):
        if name not in kept:
            setattr(module, name, SyncBatchNorm.convert_sync_batchnorm(network))
