"""Statistics of networks that several processes train together."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor


@torch.no_grad()
def average_over_ranks(trainer: Trainer, tensors: Iterable[Tensor]) -> None:
    """Replaces floating-point tensors by their mean over the ranks, in place and in one reduction."""
    tensors = list(tensors)
    if trainer.world_size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    reduced = trainer.strategy.reduce(flat, reduce_op="mean")
    assert isinstance(reduced, Tensor)
    for tensor, mean in zip(tensors, reduced.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
