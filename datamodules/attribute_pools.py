"""What a training batch of attribute images is made of: pools of images, and the order in which they come.

The order of every pool is a function of (global seed, epoch, name of the pool) alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from datamodules.datasets import BatchDataset
from datamodules.sampler import ShardedSampler
from lightning_modules.randomness import keyed_generator


class Pool(Protocol):
    """Images of a set that are drawn together.

    Attributes:
        images: the set.
        places: of the pool's images in it, int64 [N].
    """

    images: BatchDataset
    places: Tensor

    def draw(self, name: str, epoch: int, count: int) -> Tensor:
        """The first ``count`` places of this epoch, int64 [count]; ``name`` keys the draw."""


class ShuffledPool:
    """Images in a random order, each once before any comes again within an epoch.

    Args:
        images: a set.
        places: of the pool's images in it; None for all.
    """

    def __init__(self, images: BatchDataset, places: Tensor | None = None) -> None:
        self.images = images
        self.places = torch.arange(len(images)) if places is None else places

    def draw(self, name: str, epoch: int, count: int) -> Tensor:
        """The first ``count`` places of this epoch, int64 [count]."""
        generator = keyed_generator(f"order {name}", epoch)
        return self.places[_permutations(len(self.places), count, generator)]


class GroupedPool:
    """Images in blocks of ``n_groups`` distinct classes with ``group_size`` distinct images each, class by class.

    Classes come without replacement: no class is in a second block of an epoch before all others have been in one,
    apart from those that are left over when ``n_groups`` does not divide the number of classes. So do the images of a
    class. The two blocks of a batch, on one process or two, thus share images only where a class has too few.

    Args:
        images: a set.
        places: of the pool's images in it.
        classes: of these images, int64 [N].
        n_groups: classes in a block.
        group_size: images of each.

    Raises:
        ValueError: fewer classes than ``n_groups``, or a class of fewer than ``group_size`` images.
    """

    def __init__(
        self,
        images: BatchDataset,
        places: Tensor,
        classes: Tensor,
        n_groups: int = 4,
        group_size: int = 4,
    ) -> None:
        self.images = images
        self.places = places
        self.n_groups = n_groups
        self.group_size = group_size
        self._members = [places[classes == k] for k in classes.unique().tolist()]
        if len(self._members) < n_groups:
            raise ValueError(f"{len(self._members)} classes for {n_groups} groups")
        if min(map(len, self._members)) < group_size:
            raise ValueError(f"a class has fewer than {group_size} images")

    def draw(self, name: str, epoch: int, count: int) -> Tensor:
        """The first ``count`` places of this epoch, a multiple of ``n_groups * group_size``; int64 [count]."""
        groups = count // self.group_size
        generator = keyed_generator(f"classes {name}", epoch)
        drawn = _permutations(len(self._members), groups, generator, self.n_groups)
        places = torch.empty(groups, self.group_size, dtype=torch.int64)
        for k, members in enumerate(self._members):
            mine = drawn == k
            generator = keyed_generator(f"group {name}", epoch, k)
            wanted = int(mine.sum()) * self.group_size
            chosen = members[_permutations(len(members), wanted, generator, self.group_size)]
            places[mine] = chosen.view(-1, self.group_size)
        return places.flatten()


class PoolDataset(BatchDataset):
    """The pools of a training set. A batch is ``{name: {...}, ...}``, or that of the only pool if it has no name.

    Args:
        pools: by name; one of the name "" gives plain batches.
        length: number of images in an epoch.
        unlabelled: pools of which only ``image`` and ``index`` are handed out.
    """

    def __init__(
        self, pools: Mapping[str, Pool], length: int, unlabelled: tuple[str, ...] = ()
    ) -> None:
        self.pools = dict(pools)
        self.unlabelled = unlabelled
        self.length = length
        self.sample_shape = next(iter(pools.values())).images.sample_shape

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Any) -> dict[str, Any]:
        """The batch of these rows [B, number of pools]; of a pool whose column is -1 nothing is read."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        batch = {}
        for (name, pool), places in zip(self.pools.items(), rows.unbind(1), strict=True):
            if places[0] < 0:
                continue
            found = pool.images.__getitems__(places)
            if name in self.unlabelled:
                found = {key: found[key] for key in ("image", "index")}
            batch[name] = found
        return batch.get("", batch)


class PoolSampler(ShardedSampler):
    """Gives out rows of places, one column per pool, the same ones for any number of processes.

    A pool moves on only in batches that use it.

    Args:
        dataset: the pools.
        batch_size: the global batch of every pool, over all processes.
        num_replicas: number of processes.
        rank: this process.
        batches: as in :class:`ShardedSampler`.
        wanted: (epoch, place of a batch in it) -> names of the pools in that batch; None: all in each.
    """

    dataset: PoolDataset

    def __init__(
        self,
        dataset: PoolDataset,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        batches: int | None = None,
        wanted: Callable[[int, int], set[str]] | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, rank, batches=batches)
        self.wanted = wanted

    def order(self) -> Tensor:
        """The rows of an epoch, int64 [batches * batch_size, number of pools], -1 where a pool is not used."""
        pools = self.dataset.pools
        batches = len(self.dataset) // self.batch_size if self.batches is None else self.batches
        used = torch.ones(batches, len(pools), dtype=torch.bool)
        if self.wanted is not None:
            for batch in range(batches):
                names = self.wanted(self.epoch, batch)
                used[batch] = torch.tensor([name in names for name in pools])
        rows = torch.full((batches, self.batch_size, len(pools)), -1)
        for column, (name, pool) in enumerate(pools.items()):
            mine = used[:, column]
            drawn = pool.draw(name, self.epoch, int(mine.sum()) * self.batch_size)
            rows[mine, :, column] = drawn.view(-1, self.batch_size)
        return rows.flatten(0, 1)


def _permutations(size: int, count: int, generator: torch.Generator, unit: int = 1) -> Tensor:
    """``count`` numbers below ``size``: permutations one after the other, each cut to whole units."""
    kept = size - size % unit
    rounds = -(-count // kept)
    drawn = [torch.randperm(size, generator=generator)[:kept] for _ in range(rounds)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *drawn])[:count]
