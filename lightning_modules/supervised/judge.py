"""Supervised modules as judges of other modules' images: trained inside another run, without touching it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Adam
from tqdm import tqdm

from lightning_modules.arguments import demand_at_least
from lightning_modules.randomness import mix
from lightning_modules.supervised.base import SupervisedModule

Judge = TypeVar("Judge", bound=SupervisedModule)


class Batches(Protocol):
    """A set that hands out any of its samples as a batch."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, device: torch.device | None = None) -> dict[str, Any]:
        """``image`` [B, C, H, W] in [0, 1] and the truth of the samples at ``indices`` [B]."""
        ...


def fit_judge(
    build: Callable[[], Judge],
    dataset: Batches,
    steps: int = 300,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    keys: tuple[int | str, ...] = (),
    device: torch.device | str = "cpu",
    horizontal_flip: bool = False,
    description: str = "judge",
) -> Judge:
    """Trains a module with its own loss, Adam and a learning rate that goes linearly to zero.

    Initial weights, order, flips and dropout are functions of ``seed`` and ``keys``, not of the run's seed; the global
    generators are afterwards as they were. Every process trains the same judge on its own.

    Args:
        build: makes the module; its initial weights are drawn here.
        dataset: what it learns from.
        steps: batches; each sample comes once before any comes again.
        batch_size: samples of a batch; a smaller set is taken whole.
        lr: learning rate of the first step.
        seed: of everything that is drawn.
        keys: tell judges of one seed apart.
        device: where it is trained.
        horizontal_flip: mirror each image, and its ``mask``, with probability 1/2.
        description: what the progress bar says.

    Returns:
        The module, frozen and in evaluation mode, on ``device``.

    Raises:
        ValueError: no steps or no samples.
        FileNotFoundError: pretrained weights that the module asks for are not on this machine.
    """
    demand_at_least(1, steps=steps, batch_size=batch_size)
    if not len(dataset):
        raise ValueError(f"the {description} has no images to learn from")
    device, size = torch.device(device), min(batch_size, len(dataset))
    with _apart(device, mix("judge", seed, *keys)):
        module = build()
        module.require_weights()
        module.to(device).train()
        optimizer = Adam(module.parameters(), lr=lr)
        shown = tqdm(
            range(steps),
            desc=f"training the {description}",
            disable=getattr(rank_zero_only, "rank", 0) != 0,
            leave=False,
        )
        for step in shown:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            batch = dataset.batch(_places(len(dataset), step, size, seed, keys), device)
            if horizontal_flip:
                generator = torch.Generator().manual_seed(mix("judge flip", seed, *keys, step))
                _flip(batch, torch.rand(size, generator=generator) < 0.5)
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
    return module.eval().requires_grad_(False)


def _places(count: int, step: int, size: int, seed: int, keys: tuple[int | str, ...]) -> Tensor:
    """Places of a batch in a row of keyed permutations."""
    wanted = range(step * size, (step + 1) * size)
    orders = {}
    for turn in {position // count for position in wanted}:
        generator = torch.Generator().manual_seed(mix("judge order", seed, *keys, turn))
        orders[turn] = torch.randperm(count, generator=generator)
    return torch.stack([orders[position // count][position % count] for position in wanted])


def _flip(batch: dict[str, Any], chosen: Tensor) -> None:
    for name in ("image", "mask"):
        if name in batch:
            values: Tensor = batch[name]
            where = chosen.to(values.device).view(-1, *[1] * (values.ndim - 1))
            batch[name] = torch.where(where, values.flip(-1), values)


@contextmanager
def _apart(device: torch.device, seed: int) -> Iterator[None]:
    """Training in the middle of an evaluation: with gradients, in float32, with random numbers of its own."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    default = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    try:
        # Equal on all processes, or each would have a judge of its own.
        cudnn.deterministic, cudnn.benchmark = True, False
        torch.set_default_dtype(torch.float32)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng(devices),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        torch.set_default_dtype(default)
