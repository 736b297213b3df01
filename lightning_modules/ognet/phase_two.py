"""Phase two of OGNet: reconstructions of three kinds, and the discriminator that learns to tell them apart."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.nn.modes import eval_mode
from lightning_modules.ognet.losses import phase_two_loss, pseudo_anomaly_input
from lightning_modules.randomness import keyed_generator

Pairing = Literal["separate", "permute"]


class PhaseTwoBatch(NamedTuple):
    """What an update is made of, all [B, C, H, W] in [-1, 1] and without gradient."""

    real: Tensor
    recon: Tensor
    old: Tensor
    pseudo: Tensor


class Reconstructor:
    """Makes phase-two batches; both generators stay as they are, in evaluation mode, without gradients.

    Args:
        generator: G.
        old_generator: G_old.
        images: indices [B] to images [B, C, H, W] in [-1, 1].
        count: images there are.
        precompute: reconstruct the whole set with both generators first; an update then costs one pass of G instead
            of five. Needs memory for two copies of the set.
        chunk: images reconstructed at once for that.
    """

    def __init__(
        self,
        generator: nn.Module,
        old_generator: nn.Module,
        images: Callable[[Tensor], Tensor],
        count: int,
        precompute: bool = False,
        chunk: int = 256,
    ) -> None:
        self.generator = generator
        self.old_generator = old_generator
        self.images = images
        self.count = count
        self._recon = self._old = None
        if precompute:
            parts = torch.arange(count).split(chunk)
            self._recon, self._old = (
                torch.cat([self._pass(network, images(part)) for part in parts])
                for network in (generator, old_generator)
            )

    @torch.no_grad()
    def batch(self, x: Tensor, a: Tensor, b: Tensor, real: Tensor | None = None) -> PhaseTwoBatch:
        """The batch of these images.

        Args:
            x: indices of the images to reconstruct [B].
            a: indices of the first images of the pseudo anomalies [B].
            b: indices of the second ones [B].
            real: the images at ``x`` in [-1, 1], where they are at hand.
        """
        real = self.images(x) if real is None else real
        if self._recon is not None and self._old is not None:
            recon, old = self._recon[x], self._old[x]
            old_a, old_b = self._old[a], self._old[b]
        else:
            recon = self._pass(self.generator, real)
            three = torch.cat([real, self.images(a), self.images(b)])
            old, old_a, old_b = self._pass(self.old_generator, three).chunk(3)
        pseudo = self._pass(self.generator, pseudo_anomaly_input(old_a, old_b))
        return PhaseTwoBatch(real, recon, old, pseudo)

    @torch.no_grad()
    def _pass(self, network: nn.Module, x: Tensor) -> Tensor:
        with eval_mode(network):
            return network(x)


def phase_two_terms(
    discriminator: nn.Module, batch: PhaseTwoBatch, alpha: float, beta: float
) -> dict[str, Tensor]:
    """The loss of an update; four passes in the order of the released code, each a batch of its own for batch norm.

    Returns:
        The terms of :func:`phase_two_loss`.
    """
    old = discriminator(batch.old)
    recon = discriminator(batch.recon)
    real = discriminator(batch.real)
    pseudo = discriminator(batch.pseudo)
    return phase_two_loss(real, recon, old, pseudo, alpha, beta)


def draw_pairs(
    count: int, rows: int, pairing: Pairing, x: Tensor, *keys: int | str
) -> tuple[Tensor, Tensor]:
    """Indices [rows] of the two images that each pseudo anomaly is made of, a function of the seed and ``keys``.

    Args:
        count: images there are.
        rows: pairs to draw.
        pairing: ``separate``: two batches of other images, without repetition where there are enough; ``permute``:
            the images at ``x`` in two orders.
        x: indices of the batch [rows].
        keys: name the draw.
    """
    generator = keyed_generator("pairs", *keys)
    if pairing == "permute":
        first, second = (torch.randperm(rows, generator=generator) for _ in range(2))
        x = x.cpu()
        return x[first], x[second]
    rounds = -(-2 * rows // count)
    drawn = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return drawn[:rows], drawn[rows : 2 * rows]
