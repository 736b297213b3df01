"""Batch normalisation folded into the layer before it: into its weights, or into the scale of its integer codes."""

from torch import Tensor


def fold_batchnorm(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that does what a layer and its batch norm do in evaluation mode.

    ``w gamma / sqrt(var + eps)`` and ``beta + (bias - mean) gamma / sqrt(var + eps)``.

    Args:
        weight: [C, ...], output channels first.
        bias: [C], or None for none.
        gamma: weight of the batch norm [C].
        beta: its bias [C].
        mean: its running mean [C].
        var: its running variance [C].
        eps: its constant.

    Returns:
        Weight [C, ...] and bias [C].
    """
    factor = gamma / (var + eps).sqrt()
    rows = factor.reshape(-1, *[1] * (weight.ndim - 1))
    return weight * rows, _folded_bias(bias, factor, beta, mean)


def fold_batchnorm_into_scale(
    codes: Tensor,
    scale: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-5,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a quantized layer, without rounding again: only signs and scales of the channels change.

    Args:
        codes: integer codes minus their zero point [C, ...], output channels first.
        scale: [C].
        gamma, beta, mean, var, eps, bias: see :func:`fold_batchnorm`.

    Returns:
        Codes [C, ...], negated where gamma is negative; scale [C], 0 where gamma is; bias [C].
    """
    factor = gamma / (var + eps).sqrt()
    sign = 1 - 2 * (gamma < 0).to(codes.dtype)
    rows = sign.reshape(-1, *[1] * (codes.ndim - 1))
    return codes * rows, scale * factor.abs(), _folded_bias(bias, factor, beta, mean)


def _folded_bias(bias: Tensor | None, factor: Tensor, beta: Tensor, mean: Tensor) -> Tensor:
    return beta + ((0 if bias is None else bias) - mean) * factor
