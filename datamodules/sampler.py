"""One sampler for training and evaluation, on any number of processes."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_modules.randomness import keyed_generator


class ShardedSampler(DistributedSampler):
    """Shards a dataset so that the number of processes does not change what is drawn.

    The order of an epoch is a function of (global seed, epoch) alone.

    - ``drop_last=True`` (training): the order is cut into global batches of ``batch_size``; rank r
      of w takes rows [r * batch_size / w, (r + 1) * batch_size / w) of each. The incomplete last
      batch is dropped.
    - ``drop_last=False`` (evaluation): rank r takes every w-th index from r on. Nothing is repeated
      to make the shares even, so a sum over ranks counts each image once; the shares may differ by
      one.

    It is a ``DistributedSampler`` so that Lightning leaves it in place and calls ``set_epoch``.

    Args:
        dataset: only its length is used.
        batch_size: the global batch, over all processes.
        num_replicas: number of processes.
        rank: this process.
        shuffle: draw a new order each epoch.
        drop_last: see above.
        batches: global batches in an epoch; the order is continued with further ones of the same epoch as often as
            needed, so that a set of any size will do. None: as many complete ones as the set has (training only).

    Attributes:
        skip: number of local samples that the next pass leaves out, for a resume in the middle of
            an epoch; a pass uses it up. It does not change the length.

    Raises:
        ValueError: the global batch cannot be divided evenly over the processes (training only).
    """

    dataset: Sized  # type: ignore[assignment]

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        batches: int | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, drop_last=drop_last)  # type: ignore[arg-type]
        if drop_last and batch_size % num_replicas:
            lower = batch_size - batch_size % num_replicas
            nearest = " or ".join(str(size) for size in (lower, lower + num_replicas) if size)
            raise ValueError(
                f"batch_size={batch_size} is the global batch and cannot be divided over "
                f"{num_replicas} processes; use a multiple of {num_replicas}, e.g. {nearest}"
            )
        self.batch_size = batch_size
        self.batches = batches
        self.skip = 0

    def order(self) -> Tensor:
        """What an epoch gives out over all processes, row by row: here int64 [N], places in the set."""
        size = len(self.dataset)
        rounds = 1 if self.batches is None else -(-self.batches * self.batch_size // size)
        if self.shuffle:
            generator = keyed_generator("order", self.epoch)
            order = torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])
        else:
            order = torch.arange(size).repeat(rounds)
        return order if self.batches is None else order[: self.batches * self.batch_size]

    def __iter__(self) -> Iterator[Any]:
        order = self.order()
        rows = torch.arange(len(order))
        if self.drop_last:
            batches = rows[: len(rows) - len(rows) % self.batch_size].view(-1, self.batch_size)
            rows = batches.chunk(self.num_replicas, dim=1)[self.rank].flatten()
        else:
            rows = rows[self.rank :: self.num_replicas]
        skip, self.skip = self.skip, 0
        return iter(order[rows[skip:]].tolist())

    def __len__(self) -> int:
        size = len(self.dataset)
        if self.drop_last:
            batches = size // self.batch_size if self.batches is None else self.batches
            return batches * (self.batch_size // self.num_replicas)
        return len(range(self.rank, size, self.num_replicas))
