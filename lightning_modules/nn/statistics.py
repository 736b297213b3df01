"""What several processes have in common: statistics of the networks they train, and what each of them found."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

Found = TypeVar("Found")


def gather_over_ranks(trainer: Trainer, found: Found) -> list[Found]:
    """What every rank has found, in the order of the ranks, on all of them; anything that can be pickled."""
    gathered = [found] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(gathered, found)
    return gathered


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
