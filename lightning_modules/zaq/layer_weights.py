"""Weights of ZAQ's feature layers: where P and Q differ most, the feature loss looks most."""

import torch
from torch import Tensor, nn

from lightning_modules.arguments import demand_at_least


class LayerWeightEMA(nn.Module):
    """Moving average of the softmax of the layers' distances; all of its state is buffers.

    ``weights <- momentum * weights + (1 - momentum) * softmax(distances / temperature)``, from ``1/L`` each. The paper
    updates every epoch; momentum and temperature are not recoverable (the released code has no weights), the defaults
    are ours.

    Args:
        num_layers: L.
        momentum: share of the old weights, in [0, 1]; 1 keeps them uniform.
        temperature: above 0. Distances averaged over a map lie between about 0.01 and 0.3, where 1 gives almost uniform
            weights and a smaller temperature sharper ones.

    Raises:
        ValueError: a value outside its range.
    """

    weights: Tensor
    distance_sum: Tensor
    distance_count: Tensor

    def __init__(self, num_layers: int, momentum: float = 0.9, temperature: float = 1.0) -> None:
        super().__init__()
        demand_at_least(1, num_layers=num_layers)
        demand_at_least(0, most=1, momentum=momentum)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} of the layer weights must be above 0")
        self.momentum, self.temperature = momentum, temperature
        self.register_buffer("weights", torch.full((num_layers,), 1 / num_layers))
        self.register_buffer("distance_sum", torch.zeros(num_layers))
        self.register_buffer("distance_count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, distances: Tensor) -> Tensor:
        """Moves the weights by one step.

        Args:
            distances: [L]; equal on all processes, or their weights part.

        Returns:
            The new weights [L]; they sum to 1.

        Raises:
            ValueError: another number of distances.
        """
        self._check(distances)
        fresh = (distances.detach().to(self.weights) / self.temperature).softmax(0)
        self.weights.lerp_(fresh, 1 - self.momentum)
        return self.weights.clone()

    @torch.no_grad()
    def accumulate(self, distances: Tensor) -> None:
        """Adds the distances [L] of a step to the epoch's.

        Raises:
            ValueError: another number of distances.
        """
        self._check(distances)
        self.distance_sum += distances.detach().to(self.distance_sum)
        self.distance_count += 1

    def mean_distances(self) -> Tensor:
        """Mean [L] of the distances since the last :meth:`reset`; zeros if there was none."""
        return self.distance_sum / self.distance_count.clamp(min=1)

    def reset(self) -> None:
        """Begins a new epoch."""
        self.distance_sum.zero_()
        self.distance_count.zero_()

    def _check(self, distances: Tensor) -> None:
        if distances.shape != self.weights.shape:
            raise ValueError(
                f"distances of shape {tuple(distances.shape)} for {len(self.weights)} feature layers; give one each"
            )
