"""Gradient penalty of WGAN-GP (Gulrajani et al., NeurIPS 2017), in the variants of several papers."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

PatchReduction = Literal["sum", "mean"]
SlopeNorm = Literal["sample", "channel"]


def slope_norms(
    critic: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | None = None,
    patch_reduction: PatchReduction = "sum",
    norm: SlopeNorm = "sample",
) -> Tensor:
    """Norm of the critic's slope at random interpolates, differentiable again.

    Runs in float32 (float64 for float64 images) with autocast disabled: the second derivative of a
    half-precision forward overflows. A slope of exactly zero has the finite gradient zero.

    Args:
        critic: maps images [B, C, H, W] to scores [B, ...], or to a tuple that begins with them.
        real: images [B, C, H, W]; no gradient flows into them.
        fake: images of the same shape; no gradient flows into them.
        alpha: share of ``real`` in the interpolate of every sample, [B]; U[0, 1) if not given.
        patch_reduction: the slope is that of the ``"sum"`` or of the ``"mean"`` of a sample's scores.
        norm: ``"sample"``: over all axes but the batch (the equation); ``"channel"``: over the channel
            axis.

    Returns:
        [B] for ``"sample"``, [B, H, W] for ``"channel"``.

    Raises:
        ValueError: ``real`` and ``fake`` differ in shape, or an option is unknown.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"real images {tuple(real.shape)} and fake images {tuple(fake.shape)} differ in shape"
        )
    if patch_reduction not in get_args(PatchReduction):
        raise ValueError(f"unknown patch_reduction={patch_reduction!r}; choose 'sum' or 'mean'")
    if norm not in get_args(SlopeNorm):
        raise ValueError(f"unknown norm={norm!r}; choose 'channel' or 'sample'")
    if real.dtype != torch.float64:
        real, fake = real.float(), fake.float()
    if alpha is None:
        alpha = torch.rand(len(real), device=real.device, dtype=real.dtype)
    share = alpha.to(real.dtype).view(-1, *[1] * (real.dim() - 1))
    with torch.autocast(real.device.type, enabled=False):
        interpolate = (share * real + (1 - share) * fake).detach().requires_grad_(True)
        scores = critic(interpolate)
        if isinstance(scores, tuple):
            scores = scores[0]
        per_sample = scores.reshape(len(scores), -1)
        reduced = per_sample.sum() if patch_reduction == "sum" else per_sample.mean(1).sum()
        (slope,) = torch.autograd.grad(reduced, interpolate, create_graph=True)
        axes = 1 if norm == "channel" else tuple(range(1, slope.dim()))
        return torch.linalg.vector_norm(slope, dim=axes)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | None = None,
    patch_reduction: PatchReduction = "sum",
    norm: SlopeNorm = "sample",
) -> Tensor:
    """Two-sided penalty on :func:`slope_norms`, whose arguments these are.

    Returns:
        Scalar ``mean((||slope|| - 1)**2)``.
    """
    slopes = slope_norms(critic, real, fake, alpha, patch_reduction, norm)
    return (slopes - 1).square().mean()
