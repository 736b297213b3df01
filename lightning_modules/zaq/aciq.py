"""ACIQ: ranges that clip where the squared error is smallest, bits for each channel, weights with their moments back.

Banner, Nahshan, Soudry, "Post Training 4-bit Quantization of Convolutional Networks for Rapid-Deployment", NeurIPS
2019.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from scipy.optimize import minimize_scalar
from scipy.special import lambertw
from torch import Tensor, nn

from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.zaq.moments import ChannelMoments, clipped_normal_mean, clipped_normal_var
from lightning_modules.zaq.quantizers import affine_qparams, extremes, fake_quantize

Distribution = Literal["laplace", "gauss"]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def aciq_mse(
    alpha: Tensor | float,
    num_bits: int,
    distribution: Distribution = "laplace",
    scale: float = 1.0,
) -> Tensor:
    """Expected squared error of a symmetric uniform quantizer that clips at ``alpha`` (paper, eq. 5 and its Gaussian).

    Args:
        alpha: where it clips, above 0, any shape.
        num_bits: M; ``2**M`` levels.
        distribution: of the values, with mean 0.
        scale: b of the Laplace, sigma of the Gaussian distribution.

    Returns:
        float64, the shape of ``alpha``.

    Raises:
        ValueError: unknown distribution.
    """
    demand_choice(Distribution, distribution=distribution)
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    rounding = alpha.square() / (3 * 4.0**num_bits)
    x = alpha / scale
    if distribution == "laplace":
        return 2 * scale**2 * (-x).exp() + rounding
    tail = (scale**2 + alpha.square()) * torch.special.erfc(x / math.sqrt(2))
    peak = math.sqrt(2 / math.pi) * alpha * scale * (-x.square() / 2).exp()
    return tail - peak + rounding


def aciq_alpha(
    num_bits: int, distribution: Distribution = "laplace", positive: bool = False
) -> float:
    """Where to clip for the smallest :func:`aciq_mse`, in units of b or sigma.

    Args:
        num_bits: M, at least 1.
        distribution: of the values.
        positive: the values passed a ReLU: all levels are on one side, as if there were one bit more.

    Raises:
        ValueError: unknown distribution, or less than one bit.
    """
    demand_choice(Distribution, distribution=distribution)
    demand_at_least(1, num_bits=num_bits)
    return _alpha(num_bits + positive, distribution)


@cache
def _alpha(num_bits: int, distribution: Distribution) -> float:
    if distribution == "laplace":
        return float(lambertw(3 * 4.0**num_bits).real)

    def error(alpha: float) -> float:
        return aciq_mse(alpha, num_bits, distribution).item()

    return float(minimize_scalar(error, bounds=(0.1, 20), options={"xatol": 1e-9}).x)


class TensorStatistics(NamedTuple):
    """What a clipping range is computed from; float64 scalars."""

    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    b: Tensor
    """Mean absolute deviation from the mean, scale of the Laplace distribution."""
    std: Tensor


def tensor_statistics(x: Tensor) -> TensorStatistics:
    """Statistics of all elements; the deviation is the biased one."""
    x = x.detach().double()
    mean = x.mean()
    return TensorStatistics(x.amin(), x.amax(), mean, (x - mean).abs().mean(), x.std(correction=0))


def average_statistics(batches: Iterable[TensorStatistics]) -> TensorStatistics:
    """Mean over calibration batches of each statistic, extremes too (released code).

    Raises:
        ValueError: no batch.
    """
    rows = [torch.stack(list(batch)) for batch in batches]
    if not rows:
        raise ValueError("ACIQ needs at least one calibration batch")
    return TensorStatistics(*torch.stack(rows).mean(0))


def rectified_statistics(
    moments: ChannelMoments, n: float = 6.0, cap: float | None = None
) -> TensorStatistics:
    """Statistics behind a ReLU of normal channels, without data: an own zero-shot variant, not in the paper.

    Args:
        moments: before the ReLU [C], such as those of a batch norm.
        n: deviations to the maximum.
        cap: 6 for ReLU6.

    Returns:
        Statistics of all channels together; b is that of a Laplace distribution of the same deviation.
    """
    mean, std = (value.double() for value in moments)
    means = clipped_normal_mean(mean, std, 0.0, cap)
    variance = clipped_normal_var(mean, std, 0.0, cap).mean() + means.var(correction=0)
    deviation = variance.sqrt()
    maximum = (mean + n * std).amax().clamp(0, cap)
    minimum = torch.zeros_like(maximum)
    return TensorStatistics(minimum, maximum, means.mean(), deviation / math.sqrt(2), deviation)


def aciq_clip_range(
    statistics: TensorStatistics | Tensor,
    num_bits: int,
    distribution: Distribution = "laplace",
    positive: bool = False,
) -> tuple[float, float]:
    """Range of an activation tensor that clips for the smallest expected error (released code).

    Args:
        statistics: of the tensor, or the tensor.
        num_bits: M.
        distribution: that the values are taken to have.
        positive: the values passed a ReLU.

    Returns:
        ``[max(minimum, mean - alpha), that + 2 * alpha]``, or ``[0, max(mean, 0) + alpha]`` for ``positive``. Of a
        constant tensor, an empty range at its value.

    Raises:
        ValueError: unknown distribution, or less than one bit.
    """
    found = tensor_statistics(statistics) if isinstance(statistics, Tensor) else statistics
    deviation = found.b if distribution == "laplace" else found.std
    alpha = aciq_alpha(num_bits, distribution, positive) * deviation.item()
    if positive:
        return 0.0, max(found.mean.item(), 0.0) + alpha
    low = max(found.minimum.item(), found.mean.item() - alpha)
    return low, low + 2 * alpha


def allocate_bits(
    std: Tensor, target_bits: float, round: bool = True, max_passes: int = 10
) -> Tensor:
    """Bits per channel for the smallest error at a mean width: the levels go with ``std**(2/3)`` (paper, section 4).

    Args:
        std: deviation, or b, of each channel [C], not negative.
        target_bits: mean width M.
        round: to whole bits; otherwise only clipped to [0, 8].
        max_passes: of adjusting the total until the mean is within 0.01 of the target; 1 for the plain formula.

    Returns:
        Bits [C] in 0..8; a channel without deviation gets 0. If all have none, M each.

    Raises:
        ValueError: a target outside [0, 8], or less than one pass.
    """
    demand_at_least(0, most=8, target_bits=target_bits)
    demand_at_least(1, max_passes=max_passes)
    shares = std.double() ** (2 / 3)
    if not shares.any():
        return torch.full_like(shares, target_bits)
    shares = shares / shares.mean()
    exponent = float(target_bits)
    for _ in range(max_passes):
        bits = exponent + shares.log2()
        bits = (bits.round() if round else bits).clamp(0, 8)
        gap = target_bits - bits.mean().item()
        if abs(gap) <= 0.01:
            break
        exponent += gap / 2
    return bits


def quantize_weight(weight: Tensor, bits: int | Tensor) -> Tensor:
    """Weights rounded between the minimum and maximum of each output channel.

    Args:
        weight: [D, ...].
        bits: one width, or one per channel [D]; a channel of 0 bits becomes 0, its mean once that is restored.

    Returns:
        The shape of ``weight``.
    """
    widths = torch.as_tensor(bits, device=weight.device).expand(len(weight))
    low, high = extremes(weight, 0)
    rounded = torch.zeros_like(weight)
    for width in widths.unique().int().tolist():
        if width > 0:
            rows = widths == width
            scale, zero_point = affine_qparams(low[rows], high[rows], width, signed=False)
            rounded[rows] = fake_quantize(
                weight[rows], scale, zero_point, 0, 2**width - 1, ch_axis=0
            )
    return rounded


def restore_weight_moments(weight: Tensor, quantized: Tensor, variance: bool = True) -> Tensor:
    """Quantized weights with the mean, and the deviation, that every output channel had before (paper, section 3).

    Args:
        weight: [D, ...].
        quantized: what it became.
        variance: the deviation too. A channel that became constant keeps its deviation of 0.

    Returns:
        The shape of ``weight``.
    """
    before, after = weight.flatten(1), quantized.flatten(1)
    centred = after - after.mean(1, keepdim=True)
    if variance:
        wanted, found = before.std(1, keepdim=True), after.std(1, keepdim=True)
        centred = centred * torch.where(found > 0, wanted / found, 1)
    return (centred + before.mean(1, keepdim=True)).view_as(weight)


@torch.no_grad()
def round_weights(
    model: nn.Module,
    bits: int,
    first_bits: int = 8,
    last_bits: int = 8,
    allocate: bool | None = None,
    restore: bool = True,
) -> dict[str, Tensor]:
    """Rounds the weights of all convolutions and linear layers in place, as ACIQ does (released code).

    Args:
        model: any network; first and last are meant in the order of its modules.
        bits: mean width.
        first_bits: of the first layer.
        last_bits: of the last one, mostly the classifier.
        allocate: :func:`allocate_bits` to the channels of the other layers; None: if ``bits`` is at most 4.
        restore: :func:`restore_weight_moments`. Weights are no longer on a grid with an integer zero point then.

    Returns:
        Bits of every output channel by name of the layer.

    Raises:
        ValueError: no such layer.
    """
    layers: dict[str, Any] = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, _LAYERS)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to quantize")
    names = list(layers)
    widths = dict.fromkeys(names, bits) | {names[0]: first_bits, names[-1]: last_bits}
    allocate = bits <= 4 if allocate is None else allocate
    found = {}
    for name, layer in layers.items():
        weight = layer.weight
        channels = torch.full((len(weight),), float(widths[name]), device=weight.device)
        if allocate and name not in (names[0], names[-1]):
            channels = allocate_bits(weight.flatten(1).std(1, correction=0), bits)
        rounded = quantize_weight(weight, channels)
        weight.copy_(restore_weight_moments(weight, rounded) if restore else rounded)
        found[name] = channels
    return found
