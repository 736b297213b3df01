"""Fake quantization, and the layers whose weights pass through it.

A real number x is represented by the integer code ``q = clamp(round(x / scale) + zero_point, qmin, qmax)``, and the
code stands for ``(q - zero_point) * scale``. Rounding comes before the zero point is added, halves to even: the rule
of ONNX and of torch. The released ZAQ, ZeroQ and GDFQ code adds first, which differs on exact ties only.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.arguments import demand_choice

STE = Literal["identity", "clipped"]
"""Straight-through estimators: the gradient passes everywhere (released code), or not where a code was clamped."""

FEWEST_BITS, MOST_BITS = 2, 8


def check_bits(name: str, bits: object) -> int:
    """The width of a layer or an activation.

    Args:
        name: of the argument or the layer, for the message.
        bits: a whole number from 2 to 8.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not FEWEST_BITS <= bits <= MOST_BITS:
        raise ValueError(
            f"{name}={bits!r} cannot be quantized to: give a whole number of bits from {FEWEST_BITS} to {MOST_BITS}, "
            "or null to keep it in floating point"
        )
    return bits


@dataclass(frozen=True)
class QuantSpec:
    """How weights become integers.

    The defaults are those of the released ZAQ, ZeroQ and GDFQ code. ``QuantSpec(symmetric=True, narrow_range=True)``
    is what integer kernels like best.

    Attributes:
        bits: 2 to 8.
        symmetric: zero point 0 and a scale from the larger of both ends; otherwise the range is used to its ends.
        per_channel: a scale for every output channel rather than one for the layer.
        narrow_range: leaves out the most negative code, so that the codes are symmetric too.
        include_zero: widens every range to contain 0, which puts the zero point among the codes.
        ste: gradient of the rounding.

    Raises:
        ValueError: impossible bits or an unknown estimator.
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = True
    narrow_range: bool = False
    include_zero: bool = False
    ste: STE = "identity"

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        demand_choice(STE, ste=self.ste)


def integer_range(
    num_bits: int, signed: bool = True, narrow_range: bool = False
) -> tuple[int, int]:
    """Smallest and largest code.

    Args:
        num_bits: at least 1.
        signed: codes around 0 rather than from 0.
        narrow_range: without the smallest code.
    """
    low = -(2 ** (num_bits - 1)) if signed else 0
    return low + narrow_range, low + 2**num_bits - 1


def affine_qparams(
    lo: Tensor,
    hi: Tensor,
    num_bits: int,
    *,
    symmetric: bool = False,
    signed: bool = True,
    narrow_range: bool = False,
    include_zero: bool = False,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that spread the codes over a range.

    Asymmetric (released code): ``scale = (hi - lo) / (qmax - qmin)``, ``zero_point = qmin - round(lo / scale)``; the
    zero point lies outside the codes where the range does not contain 0. Symmetric: zero point 0 and
    ``scale = max(|lo|, |hi|) / qmax``; the full range has one more code at the lower end, which no value needs.

    Args:
        lo: smallest values, any shape.
        hi: largest values, of the same shape.
        num_bits: at least 1, symmetric signed ones at least 2.
        symmetric, signed, narrow_range, include_zero: see :class:`QuantSpec` and :func:`integer_range`.
        eps: smallest length of a range; a constant tensor is reproduced, not divided by 0.

    Returns:
        Scale (above 0) and zero point (whole numbers), in the shape and floating-point type of ``lo``.

    Raises:
        ValueError: symmetric signed codes of one bit, which have no positive code.
    """
    qmin, qmax = integer_range(num_bits, signed, narrow_range)
    if include_zero:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if not symmetric:
        scale = (hi - lo).clamp_min(eps) / (qmax - qmin)
        return scale, qmin - torch.round(lo / scale)
    if qmax < 1:
        raise ValueError(f"num_bits={num_bits} has no positive code: symmetric needs 2 bits")
    scale = torch.maximum(lo.abs(), hi.abs()).clamp_min(eps) / qmax
    return scale, torch.zeros_like(scale)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    ch_axis: int | None = None,
) -> Tensor:
    """Integer codes of x as a floating-point tensor (an asymmetric zero point may not fit an integer type).

    Args:
        x: any shape.
        scale: scalar, or [C] along ``ch_axis``.
        zero_point: of the same shape as ``scale``.
        qmin: smallest code.
        qmax: largest code.
        ch_axis: axis of x with the channels.
    """
    scale, zero_point = _along(scale, x, ch_axis), _along(zero_point, x, ch_axis)
    return (torch.round(x / scale) + zero_point).clamp(qmin, qmax)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int | None = None
) -> Tensor:
    """The real numbers that codes stand for; shapes as in :func:`quantize`."""
    return (codes - _along(zero_point, codes, ch_axis)) * _along(scale, codes, ch_axis)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    ch_axis: int | None = None,
    ste: STE = "identity",
) -> Tensor:
    """Quantizes and dequantizes; the gradient goes to x only, by the straight-through estimator.

    Half precision has no room for an 8-bit grid: such an x is taken to float32, and so is the result.

    Args:
        x, scale, zero_point, qmin, qmax, ch_axis: see :func:`quantize`.
        ste: ``identity`` (released code) or ``clipped`` (torch's fake quantization).

    Raises:
        ValueError: unknown estimator.
    """
    demand_choice(STE, ste=ste)
    x = full_precision(x)
    scale, zero_point = _along(scale, x, ch_axis), _along(zero_point, x, ch_axis)
    return cast(Tensor, _StraightThrough.apply(x, scale, zero_point, qmin, qmax, ste == "clipped"))


def fake_quantize_minmax(
    x: Tensor,
    num_bits: int,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    *,
    symmetric: bool = False,
    narrow_range: bool = False,
    include_zero: bool = False,
    integer_zero_point: bool = True,
    ch_axis: int | None = None,
    ste: STE = "identity",
) -> Tensor:
    """Fake quantization over a range, by default that of x itself.

    Args:
        x: any shape.
        num_bits: at least 1.
        lo: smallest value, scalar or [C]; None for the minimum of x, of each channel with ``ch_axis``.
        hi: largest value.
        symmetric, narrow_range, include_zero: see :func:`affine_qparams`.
        integer_zero_point: False starts the grid at ``lo`` exactly, so that 0 is not on it (released DFQ code).
        ch_axis: axis of x with the channels.
        ste: see :func:`fake_quantize`.

    Raises:
        ValueError: unknown estimator, or symmetric codes of one bit.
    """
    x = full_precision(x)
    smallest, largest = extremes(x.detach(), ch_axis)
    lo, hi = smallest if lo is None else lo, largest if hi is None else hi
    if not integer_zero_point:
        start = _along(lo, x, ch_axis)
        shifted = fake_quantize_minmax(
            x - start, num_bits, torch.zeros_like(lo), hi - lo, ch_axis=ch_axis, ste=ste
        )
        return shifted + start
    scale, zero_point = affine_qparams(
        lo,
        hi,
        num_bits,
        symmetric=symmetric,
        narrow_range=narrow_range,
        include_zero=include_zero,
    )
    qmin, qmax = integer_range(num_bits, narrow_range=narrow_range)
    return fake_quantize(x, scale, zero_point, qmin, qmax, ch_axis, ste)


def extremes(x: Tensor, ch_axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum: scalars, or [C] with a channel axis."""
    if ch_axis is None:
        return torch.aminmax(x)
    return torch.aminmax(x.movedim(ch_axis, 0).flatten(1), dim=1)


def full_precision(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        clipped: bool,
    ) -> Tensor:
        codes = torch.round(x / scale) + zero_point
        ctx.clipped = clipped
        if clipped:
            ctx.save_for_backward((codes >= qmin) & (codes <= qmax))
        return (codes.clamp_(qmin, qmax) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.clipped:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None, None, None, None


def _along(values: Tensor, x: Tensor, ch_axis: int | None) -> Tensor:
    if ch_axis is None:
        return values
    shape = [1] * x.ndim
    shape[ch_axis] = -1
    return values.reshape(shape)


class QuantizedLayer(nn.Module):
    """What the quantized layers share: weights that are rounded in every forward, latent ones that are trained.

    The range of the weights is their minimum and maximum now, as in the released code, so there is nothing to
    observe. Parameters keep the names of the float layer; biases stay in floating point. Autocast is off inside.
    Arguments are those of the float layer and ``spec``.

    Attributes:
        spec: how the weights are quantized.
    """

    weight: Tensor
    spec: QuantSpec
    transposed: bool = False  # the convolutions say themselves

    def __init__(self, *args: Any, spec: QuantSpec | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spec = spec or QuantSpec()

    def channels_first(self, weight: Tensor) -> Tensor:
        """The weight as [C_out, ...], one row for every output channel."""
        if not self.transposed:
            return weight
        groups = cast(int, self.groups)
        grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1)

    def channels_back(self, rows: Tensor) -> Tensor:
        """Undoes :meth:`channels_first`."""
        if not self.transposed:
            return rows
        groups = cast(int, self.groups)
        return rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the output channels, [C_out] each; equal ones if quantized per tensor."""
        weight = full_precision(self.weight.detach())
        lo, hi = extremes(self.channels_first(weight), 0)
        if not self.spec.per_channel:
            lo, hi = lo.min().expand_as(lo), hi.max().expand_as(hi)
        return affine_qparams(
            lo,
            hi,
            self.spec.bits,
            symmetric=self.spec.symmetric,
            narrow_range=self.spec.narrow_range,
            include_zero=self.spec.include_zero,
        )

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Integer codes of the weights as floating-point numbers, [C_out, ...]."""
        qmin, qmax = integer_range(self.spec.bits, narrow_range=self.spec.narrow_range)
        rows = self.channels_first(full_precision(self.weight))
        return quantize(rows, *self.qparams(), qmin, qmax, 0)

    def quantized_weight(self) -> Tensor:
        """The weights on their grid, in the shape of ``weight``; the gradient passes to ``weight``."""
        qmin, qmax = integer_range(self.spec.bits, narrow_range=self.spec.narrow_range)
        rows = self.channels_first(self.weight)
        return self.channels_back(
            fake_quantize(rows, *self.qparams(), qmin, qmax, 0, self.spec.ste)
        )

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, rounded weights and bias, none in half precision."""
        bias = cast(Tensor | None, self.bias)
        bias = None if bias is None else full_precision(bias)
        return full_precision(x), self.quantized_weight(), bias

    def extra_repr(self) -> str:
        """The float layer's and the width."""
        return f"{super().extra_repr()}, bits={self.spec.bits}"


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """``nn.Conv1d`` with quantized weights."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C_in, L] to [B, C_out, L']."""
        with torch.autocast(input.device.type, enabled=False):
            return self._conv_forward(*self.operands(input))


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` with quantized weights, depthwise and grouped ones too."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, H', W']."""
        with torch.autocast(input.device.type, enabled=False):
            return self._conv_forward(*self.operands(input))


class QuantConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with quantized weights; a channel is an output channel, in every group its own."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, H', W']."""
        padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        with torch.autocast(input.device.type, enabled=False):
            x, weight, bias = self.operands(input)
            return F.conv_transpose2d(
                x,
                weight,
                bias,
                self.stride,
                self.padding,  # type: ignore[arg-type]
                padding,
                self.groups,
                self.dilation,
            )


class QuantLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with quantized weights."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., D_in] to [..., D_out]."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(*self.operands(input))


QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
}
"""The quantized layer for each float one."""


def quantized_layer(layer: nn.Module, spec: QuantSpec) -> QuantizedLayer:
    """The quantized layer with the parameters of a float one (the same tensors, not copies).

    Raises:
        TypeError: a layer without a quantized counterpart.
    """
    kind = QUANTIZED.get(type(layer))
    if kind is None:
        names = ", ".join(known.__name__ for known in QUANTIZED)
        raise TypeError(f"{type(layer).__name__} has no quantized counterpart; {names} have")
    geometry = ["in_features", "out_features"]
    if not isinstance(layer, nn.Linear):
        geometry = ["in_channels", "out_channels", "kernel_size", "stride", "padding"]
        geometry += ["dilation", "groups", "padding_mode"]
        geometry += ["output_padding"] * isinstance(layer, nn.ConvTranspose2d)
    arguments = {name: getattr(layer, name) for name in geometry}
    bias = layer.bias is not None
    quantized = kind(**arguments, bias=bias, device="meta", spec=spec)
    quantized._parameters.update(layer._parameters)
    return quantized.train(layer.training)
