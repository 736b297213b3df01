"""A running average of a network's weights, kept as a frozen submodule."""

from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def _read_counter(network: "AveragedNetwork", _: object) -> None:
    network.updates = int(network.n_averaged)


class AveragedNetwork(nn.Module):
    """Exponential moving average of a network, with the update rule and the state of torch's ``AveragedModel``.

    Parameters follow ``average <- decay * average + (1 - decay) * network``; the first update copies.
    Buffers are copied at every update, never averaged, so running statistics are those of the
    network and integer counters stay integers. The copy is frozen and always in evaluation mode,
    whatever mode its parent is put in.

    Unlike ``AveragedModel`` it can be pickled, and an update does not wait for the accelerator.

    Args:
        network: the network to follow; a deep copy is taken.
        decay: weight of the past, in [0, 1].

    Raises:
        ValueError: if ``decay`` is outside [0, 1].
    """

    n_averaged: Tensor

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay} must lie in [0, 1]; 0.999 is a usual value")
        self.module = deepcopy(network).requires_grad_(False).eval()
        self.decay = decay
        device = next((p.device for p in network.parameters()), None)
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.long, device=device))
        # The same number on the host: asking the device for it would stop the pipeline at every batch.
        self.updates = 0
        self.register_load_state_dict_post_hook(_read_counter)
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the averaged network."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update_parameters(self, network: nn.Module, copy: bool = False) -> None:
        """Moves the average one step towards ``network``.

        Args:
            network: the followed network, of the same structure as at construction.
            copy: take the weights over as they are, as the first update always does.
        """
        averages = [parameter.detach() for parameter in self.module.parameters()]
        currents = [parameter.detach() for parameter in network.parameters()]
        if copy or self.updates == 0:
            for average, current in zip(averages, currents, strict=True):
                average.copy_(current)
        elif averages:
            get_ema_multi_avg_fn(self.decay)(averages, currents, None)
        for average, current in zip(self.module.buffers(), network.buffers(), strict=True):
            average.copy_(current)
        self.n_averaged += 1
        self.updates += 1
