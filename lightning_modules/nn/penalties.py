"""Penalties on the input gradient of a critic."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | None = None,
    weight: float = 10.0,
    norm: Literal["channel", "sample"] = "channel",
    outputs: Literal["all", "first"] = "all",
) -> Tensor:
    """Penalty on the discriminator's input gradient at random interpolates, differentiable again.

    Runs in float32 (float64 for float64 images) with autocast disabled: the second derivative of a
    half-precision forward overflows.

    Args:
        discriminator: maps images [B, C, H, W] to [B, K] or to several maps [B, K, h, w].
        real: images [B, C, H, W]; no gradient flows into them.
        fake: images of the same shape; no gradient flows into them.
        alpha: share of ``real`` in the interpolate of every sample, [B]; U[0, 1) if not given.
        weight: factor of the penalty (lambda).
        norm: ``"channel"``: norm over the channel axis, averaged over batch and positions (released
            code); ``"sample"``: norm over all axes but the batch (WGAN-GP equation, as in the
            paper).
        outputs: ``"all"`` sums the K output columns (released code); ``"first"`` uses column 0
            (paper).

    Returns:
        Scalar ``weight * mean((||gradient|| - 1)**2)``.

    Raises:
        ValueError: ``real`` and ``fake`` differ in shape, or an option is unknown.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"real images {tuple(real.shape)} and fake images {tuple(fake.shape)} differ in shape"
        )
    if norm not in ("channel", "sample"):
        raise ValueError(f"unknown norm={norm!r}; choose 'channel' or 'sample'")
    if outputs not in ("all", "first"):
        raise ValueError(f"unknown outputs={outputs!r}; choose 'all' or 'first'")
    if real.dtype != torch.float64:
        real, fake = real.float(), fake.float()
    if alpha is None:
        alpha = torch.rand(len(real), device=real.device, dtype=real.dtype)
    share = alpha.to(real.dtype).view(-1, *[1] * (real.dim() - 1))
    with torch.autocast(real.device.type, enabled=False):
        interpolate = (share * real + (1 - share) * fake).detach().requires_grad_(True)
        logits = discriminator(interpolate)
        selected = logits if outputs == "all" else logits[:, 0]
        (gradient,) = torch.autograd.grad(selected.sum(), interpolate, create_graph=True)
        axes = 1 if norm == "channel" else tuple(range(1, gradient.dim()))
        length = torch.linalg.vector_norm(gradient, dim=axes)
        return weight * (length - 1).square().mean()
