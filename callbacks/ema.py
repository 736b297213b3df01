"""Running average of a network's weights, updated once per batch."""

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.nn.ema import AveragedNetwork
from lightning_modules.nn.statistics import average_over_ranks


class GeneratorEMA(Callback):
    """Keeps an exponential moving average of a network, the generator by default.

    Protocol: the module offers ``register_ema(name, decay)``, which adds the submodule ``<name>_ema`` (an
    :class:`~lightning_modules.nn.ema.AveragedNetwork`) once and returns it; every
    :class:`~lightning_modules.paper.PaperModule` does. The average is then in each checkpoint, survives
    ``load_from_checkpoint``, and is never swapped with the network: a module that wants to sample from it
    uses ``self.<name>_ema``.

    One update per batch, however many optimizer steps the batch has. With several processes the running
    statistics that the average takes over are their mean over the ranks.

    Args:
        network: attribute of the module that holds the network.
        decay: weight of the past per batch, in [0, 1].
        start_batch: up to this number of batches the average is a plain copy; the first batch always is.

    Raises:
        ValueError: for a decay outside [0, 1] or a negative ``start_batch``.
    """

    def __init__(
        self, network: str = "generator", decay: float = 0.999, start_batch: int = 0
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay} must lie in [0, 1]; 0.999 is a usual value")
        if start_batch < 0:
            raise ValueError(f"start_batch={start_batch} must not be negative; 0 averages at once")
        self.network = network
        self.decay = decay
        self.start_batch = start_batch

    @property
    def state_key(self) -> str:
        """One callback per averaged network."""
        return self._generate_state_key(network=self.network)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers the average before the weights of a checkpoint are restored.

        Raises:
            MisconfigurationException: if the module cannot register averages.
        """
        if stage != "fit":
            return
        register = getattr(pl_module, "register_ema", None)
        if register is None:
            raise MisconfigurationException(
                f"GeneratorEMA needs a module with register_ema(name, decay), which "
                f"{type(pl_module).__name__} lacks; derive it from PaperModule or remove the callback"
            )
        register(self.network, self.decay)
        # The average is in evaluation mode by design.
        warnings.filterwarnings("ignore", r".*module\(s\) in eval mode at the start of training")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Moves the average by one step."""
        average: AveragedNetwork = getattr(pl_module, f"{self.network}_ema")
        average.update_parameters(
            getattr(pl_module, self.network), copy=average.updates < self.start_batch
        )
        # Under automatic optimisation the statistics of the ranks become equal only before their next use.
        average_over_ranks(trainer, (b for b in average.module.buffers() if b.is_floating_point()))
