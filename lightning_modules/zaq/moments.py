"""Channels that are normally distributed, as batch norms say, and what clipping makes of them.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ChannelMoments(NamedTuple):
    """Mean and deviation of a value per channel, both [C]."""

    mean: Tensor
    std: Tensor


def clipped_normal_mean(
    mean: Tensor, std: Tensor, low: float | None = 0.0, high: float | None = None
) -> Tensor:
    """Mean of a normal variable that was clipped to [low, high] (paper, eq. 19 and its supplement).

    Args:
        mean: any shape.
        std: of the same shape, not negative; where it is 0 the mean is clipped.
        low: None for no bound.
        high: None for no bound, 6 for ReLU6.

    Returns:
        The shape of ``mean``, in its precision; computed in float64.
    """
    return _clipped_moments(mean, std, low, high)[0].to(mean.dtype)


def clipped_normal_var(
    mean: Tensor, std: Tensor, low: float | None = 0.0, high: float | None = None
) -> Tensor:
    """Variance of a normal variable that was clipped to [low, high], arguments of :func:`clipped_normal_mean`."""
    return _clipped_moments(mean, std, low, high)[1].to(mean.dtype)


def bn_activation_range(
    mean: Tensor, std: Tensor, n: float = 6.0, relu: bool = True, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Range of an activation from its distribution before the non-linearity (paper, section 5).

    Args:
        mean: per channel [C].
        std: per channel [C].
        n: deviations to each side.
        relu: the range begins at 0.
        cap: upper bound, 6 for ReLU6.

    Returns:
        Lower and upper end, scalars, over all channels.
    """
    low, high = (mean - n * std).amin(), (mean + n * std).amax()
    if relu:
        low, high = torch.zeros_like(low), high.clamp(min=0)
    return low, high if cap is None else high.clamp(max=cap)


def _clipped_moments(
    mean: Tensor, std: Tensor, low: float | None, high: float | None
) -> tuple[Tensor, Tensor]:
    mean, std = mean.double(), std.double()
    lower, upper = -math.inf if low is None else low, math.inf if high is None else high
    safe = torch.where(std > 0, std, 1)
    a, b = (lower - mean) / safe, (upper - mean) / safe
    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)
    inside = 1 - below - above
    pdf_a, pdf_b = _density(a), _density(b)
    # Moments about the mean, in deviations; an infinite bound has no density and no mass.
    first = pdf_a - pdf_b
    second = inside + _times(a, pdf_a) - _times(b, pdf_b)
    first = first + _times(a, below) + _times(b, above)
    second = second + _times(a.square(), below) + _times(b.square(), above)
    clipped_mean = mean + safe * first
    clipped_var = safe.square() * (second - first.square()).clamp(min=0)
    constant = std <= 0
    return (
        torch.where(constant, mean.clamp(lower, upper), clipped_mean),
        torch.where(constant, 0, clipped_var),
    )


def _density(x: Tensor) -> Tensor:
    return (-x.square() / 2).exp() / math.sqrt(2 * math.pi)


def _times(bound: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, bound * weight, 0)
