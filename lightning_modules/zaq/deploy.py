"""A quantized network as integers: batch norms folded, weights as 8-bit codes, biases on the accumulator's grid.

The result is a torch network that computes what integer kernels compute, so its accuracy is that of the exported
model. It differs from the fake-quantized network it came from by the rounding of the biases, by that of the scales of
what is added, and by that of what is on no grid, to 16 bits.
"""

import copy
import math
import warnings
from collections import Counter
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules.zaq.attach import ADDING_METHODS, ADDITIONS, calls, source_of
from lightning_modules.zaq.folding import fold_batchnorm_into_scale
from lightning_modules.zaq.observers import ActivationQuantizer
from lightning_modules.zaq.quantizers import (
    QuantConvTranspose2d,
    QuantizedLayer,
    QuantLinear,
    fake_quantize,
)

LARGEST_CODE = 127
LARGEST_UNIT = 2**15 - 1
LARGEST_BIAS = 2**30
"""Of an int32 accumulator half is left to the bias."""
SATURATION = 2**15 - 1
"""Kernels of processors without dot-product instructions add pairs of products in 16 bits when weights are signed."""

RELU = ((nn.ReLU,), {torch.relu, F.relu}, {"relu", "relu_"})
RELU6 = ((nn.ReLU6,), {F.relu6}, set[str]())


class IntegerActivation(nn.Module):
    """An activation as codes in 8 unsigned bits; fewer bits leave codes above ``2^bits - 1`` unused.

    Attributes:
        scale: scalar, float32.
        zero_point: scalar, uint8.
        exporting: writes ONNX operators instead of computing.
    """

    scale: Tensor
    zero_point: Tensor
    smallest: Tensor
    largest: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scale, zero_point = quantizer.qparams()
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", zero_point.to(torch.uint8))
        self.register_buffer("smallest", torch.zeros_like(self.zero_point))
        self.register_buffer("largest", torch.full_like(self.zero_point, 2**quantizer.bits - 1))
        self.bits = quantizer.bits
        self.exporting = False

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if not self.exporting:
            return fake_quantize(x, self.scale, self.zero_point.float(), 0, 2**self.bits - 1)
        operands = [x, self.scale, self.zero_point]
        codes = _operator("QuantizeLinear", operands, {}, torch.uint8, x.shape)
        if self.bits < 8:
            # A Clip of codes may stand between both operators in the eyes of onnxruntime, one of numbers may not.
            operands = [codes, self.smallest, self.largest]
            codes = _operator("Clip", operands, {}, torch.uint8, x.shape)
        return _dequantized(codes, self.scale, self.zero_point, x.shape)


class IntegerLayer(nn.Module):
    """A convolution or linear layer with 8-bit weight codes, whose sums of products are those of integers, and exact.

    Where the input is on a grid and the output is rounded directly, the sum is taken to float32 as by the kernels that
    onnxruntime fuses, multiplied once, and rounded to the grid that follows. Where one of both is missing, and for the
    weights of transposed convolutions and sequences apart, the file has operators on integers: a kernel of floats would
    sum in an order of its own. An input on no grid is rounded to 16 bits over the largest value of its image, and
    taken as two bytes.

    Attributes:
        codes: int8 or uint8, in the shape of the layer's weight.
        zero_point: of the same type [C_out].
        scale: float32 [C_out].
        bias: int32 in units of ``input_scale * scale``, or float32 where the input is on no grid [C_out].
        input_scale: scalar, or None where the input is on no grid.
        output_scale: scalar, or None where the output is not rounded directly.
    """

    codes: Tensor
    zero_point: Tensor
    scale: Tensor
    bias: Tensor
    bias_scale: Tensor
    no_zero_point: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    output_scale: Tensor | None

    def __init__(
        self,
        layer: QuantizedLayer,
        norm: _BatchNorm | None,
        source: IntegerActivation | None,
        target: IntegerActivation | None,
        name: str,
    ) -> None:
        super().__init__()
        self.compute = _computation(layer)
        self.linear = isinstance(layer, QuantLinear)
        self.axis = int(layer.transposed)
        self.exporting = False
        centered, scale, bias = _centered_codes(layer, norm, name)
        self.register_buffer("input_scale", None if source is None else source.scale.clone())
        self.register_buffer(
            "input_zero_point", None if source is None else source.zero_point.clone()
        )
        self.register_buffer("output_scale", None if target is None else target.scale.clone())
        if source is not None:
            centered, scale = _room_for_bias(centered, scale, bias, source.scale.double())
        zero_point = _zero_points(centered)
        codes = centered + _rows(zero_point, centered)
        saturates = source is not None and 2 * codes.abs().max() * (2**source.bits - 1) > SATURATION
        kind = torch.int8
        if saturates or self._by_operators:
            codes, zero_point, kind = codes + 128, zero_point + 128, torch.uint8
        self.register_buffer("codes", layer.channels_back(codes).to(kind).contiguous())
        self.register_buffer("zero_point", zero_point.to(kind))
        self.one_zero_point = bool((zero_point == zero_point[0]).all())
        self.register_buffer("scale", scale.float())
        if self.input_scale is None:
            self.register_buffer("bias", bias.float())
            return
        self.register_buffer("bias_scale", self.input_scale * self.scale)
        units = torch.round(bias / self.bias_scale.double())
        self.register_buffer("bias", units.to(torch.int32))
        self.register_buffer("no_zero_point", torch.zeros_like(self.bias))

    @property
    def _by_operators(self) -> bool:
        """Whether the file says which integers to sum; onnxruntime finds out by itself where both grids are there."""
        if self.linear:
            return self.input_scale is None
        if self.input_scale is not None and self.output_scale is not None:
            return False
        geometry: dict[str, Any] = self.compute.keywords
        zeros = self.compute.func in (F.conv1d, F.conv2d)
        return zeros and not isinstance(geometry["padding"], str)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, in float32."""
        by_operators = self._by_operators and (x.ndim == 2 or not self.linear)
        if self.exporting and not by_operators:
            return self._fused(x)
        if self.exporting:
            return self._operators(x)
        weight = self.codes.double() - self._per_channel(self.zero_point.double(), self.axis)
        if self.input_scale is None:
            if by_operators:
                high, low, step = _bytes_of_units(x)
                totals = [self.compute(part.double(), weight).float() for part in (high, low)]
                return self._from_bytes(totals[0], totals[1], step)
            weight = weight * self._per_channel(self.scale.double(), self.axis)
            return self.compute(x, weight.float(), self.bias)
        codes = torch.round(x.double() / self.input_scale.double())
        total = self.compute(codes, weight, self.bias.double()).float()
        channels = -1 if self.linear else 1
        if self.output_scale is None:
            return total * self._along(self.bias_scale, total, channels)
        multiplier = self._along(self.bias_scale / self.output_scale, total, channels)
        return torch.round(total * multiplier) * self.output_scale

    def _from_bytes(self, high: Tensor, low: Tensor, step: Tensor) -> Tensor:
        scale, bias = (self._along(values, high, 1) for values in (self.scale, self.bias))
        return (high * 256 + low) * (step * scale) + bias

    def _fused(self, x: Tensor) -> Tensor:
        weight = _dequantized(self.codes, self.scale, self.zero_point, self.codes.shape, self.axis)
        bias = self.bias
        if self.input_scale is not None:
            bias = _dequantized(bias, self.bias_scale, self.no_zero_point, bias.shape, 0)
        if self.linear and x.ndim == 2:
            shape = (x.shape[0], self.codes.shape[0])
            return _operator("Gemm", [x, weight, bias], {"transB": 1}, torch.float32, shape)
        return self.compute(x, weight, bias)

    def _operators(self, x: Tensor) -> Tensor:
        if self.input_scale is not None and self.input_zero_point is not None:
            operands = [x, self.input_scale, self.input_zero_point]
            codes = _operator("QuantizeLinear", operands, {}, torch.uint8, x.shape)
            total = self._products(codes, self.input_zero_point)
            total = (total + self._along(self.bias, total, 1)).float()
            return total * self._along(self.bias_scale, total, 1)
        if self.linear:
            x = x[:, :, None, None]
        high, low, step = _bytes_of_units(x)
        zeros = [torch.tensor(value, dtype=torch.uint8, device=x.device) for value in (128, 0)]
        totals = [
            self._products((part + zero).to(torch.uint8), zero).float()
            for part, zero in zip((high, low), zeros, strict=True)
        ]
        result = self._from_bytes(totals[0], totals[1], step)
        return result.flatten(1) if self.linear else result

    def _products(self, x: Tensor, zero_point: Tensor) -> Tensor:
        """Sums of products [B, C_out, ...], int32, of codes [B, C_in, ...] of type uint8.

        The kernel knows one zero point of the weights only: what is missing to that of a channel comes from the sum of
        its inputs.
        """
        codes = self.codes[:, :, None, None] if self.linear else self.codes
        if self.one_zero_point:
            return self._convolution(x, zero_point, codes, self.zero_point[0])
        middle = torch.full_like(self.zero_point[0], 128)
        total = self._convolution(x, zero_point, codes, middle)
        missing = middle.int() - self.zero_point.int()
        groups = 1 if self.linear else self.compute.keywords["groups"]
        inputs = self._convolution(x, zero_point, torch.full_like(codes[:groups], 129), middle)
        if groups > 1:
            inputs = inputs.repeat_interleave(len(codes) // groups, 1)
        return total + inputs * self._along(missing, total, 1)

    def _convolution(self, x: Tensor, x_zero: Tensor, codes: Tensor, zero: Tensor) -> Tensor:
        geometry: dict[str, Any] = {} if self.linear else self.compute.keywords
        kernel = list(codes.shape[2:])
        single = [1] * len(kernel)
        strides, padding, dilations = (
            list(geometry.get(name, default))
            for name, default in (
                ("stride", single),
                ("padding", [0] * len(kernel)),
                ("dilation", single),
            )
        )
        sides = [
            (side + 2 * pad - dilation * (size - 1) - 1) // stride + 1
            for side, size, stride, pad, dilation in zip(
                x.shape[2:], kernel, strides, padding, dilations, strict=True
            )
        ]
        attributes = {
            "strides": strides,
            "pads": 2 * padding,
            "dilations": dilations,
            "group": geometry.get("groups", 1),
            "kernel_shape": kernel,
        }
        shape = (x.shape[0], codes.shape[0], *sides)
        return _operator("ConvInteger", [x, codes, x_zero, zero], attributes, torch.int32, shape)

    def _per_channel(self, values: Tensor, axis: int) -> Tensor:
        return self._along(values, self.codes, axis)

    @staticmethod
    def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
        shape = [1] * x.ndim
        shape[axis] = -1
        return values.reshape(shape)


def _bytes_of_units(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of any range as 16-bit codes in two parts, high in [-128, 127] and low in [0, 255], and their unit.

    The unit is a share of the largest number of an image [B, 1, ...]; ``256 * high + low`` of it are next to x.
    """
    step = x.abs().amax(tuple(range(1, x.ndim)), keepdim=True).clamp_min(1e-30) / LARGEST_UNIT
    units = torch.round(x / step)
    high = torch.floor(units / 256)
    return high, units - 256 * high, step


class IntegerAddition(nn.Module):
    """A sum of two activations on grids, rounded to a third, as onnxruntime's kernel gives it.

    The kernel adds the zero point before it rounds, and multiplies codes by quotients of scales in float32. In which
    order, and with how many roundings, is up to the processor and the compiler; :func:`_align_scales` makes the
    quotients so short that nothing is ever rounded.
    """

    scales: Tensor
    zero_points: Tensor
    quotients: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, first: IntegerActivation, second: IntegerActivation, target: IntegerActivation
    ) -> None:
        super().__init__()
        scales = torch.stack([first.scale, second.scale])
        zero_points = torch.stack([first.zero_point, second.zero_point]).float()
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points)
        self.register_buffer("quotients", scales / target.scale)
        self.register_buffer("scale", target.scale.clone())
        self.register_buffer("zero_point", target.zero_point.float())
        self.exporting = False

    @property
    def exact(self) -> bool:
        """Whether float32 holds all that the kernel computes, in whatever order."""
        quotients = self.quotients.double()
        unit = _unit_of_sums(float(quotients.sum()))
        units = quotients / unit
        return unit <= 1 and bool((units == units.round()).all())

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two tensors of shapes that broadcast."""
        if self.exporting:
            return first + second
        terms = [
            torch.round(x / scale) * quotient
            for x, scale, quotient in zip((first, second), self.scales, self.quotients, strict=True)
        ]
        codes = torch.round(terms[0] + terms[1] + self.zero_point).clamp(0, 255)
        return (codes - self.zero_point) * self.scale


class FloatAddition(nn.Module):
    """A sum whose quotients of scales cannot be made short; the maximum keeps onnxruntime from fusing it."""

    lowest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lowest", torch.tensor(torch.finfo(torch.float32).min))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two tensors of shapes that broadcast."""
        return torch.maximum(first + second, self.lowest)


class IntegerMean(nn.Module):
    """The mean over all positions of an activation on a grid, the same in every order of summation.

    A sum of codes is exact in float32, one of numbers is not, and means of few codes often lie right between two codes
    of the quantizer that follows.
    """

    scale: Tensor

    def __init__(self, source: IntegerActivation, keepdim: bool) -> None:
        super().__init__()
        self.register_buffer("scale", source.scale.clone())
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 1, 1], or to [B, C]."""
        codes = torch.round(x / self.scale).sum((2, 3), keepdim=self.keepdim)
        return codes * (self.scale / (x.shape[2] * x.shape[3]))


INTEGER = (IntegerActivation, IntegerLayer, IntegerAddition)


class RoundedSum(NamedTuple):
    """A sum of two activations on grids that is put on a third one."""

    node: fx.Node
    terms: tuple[fx.Node, fx.Node]
    grids: tuple[IntegerActivation, IntegerActivation]
    target: IntegerActivation


@torch.no_grad()
def deploy(model: fx.GraphModule) -> fx.GraphModule:
    """The integer network of a quantized one, in evaluation mode; the quantized network stays as it is.

    Batch norms behind quantized layers are folded into the scales of the weight codes, which changes no code. Codes of
    few bits are multiplied to fill 8 bits, which makes the unit of the accumulator fine. Biases are rounded to whole
    units where the input is on a grid. ReLUs that the quantizer behind them implies are left out. Scales of sums and of
    what they add get short quotients.

    Args:
        model: result of :func:`quantize_model` with ranges in all of its activation quantizers.

    Raises:
        ValueError: no quantized network, one with activation quantizers without a range, or a transposed convolution
            with groups, which ONNX has no scales for.
    """
    if not isinstance(model, fx.GraphModule) or not any(
        isinstance(module, QuantizedLayer) for module in model.modules()
    ):
        raise ValueError(f"{type(model).__name__} is no quantized network: give quantize_model's")
    deployed = copy.deepcopy(model).eval()
    for module in deployed.modules():
        if isinstance(module, ActivationQuantizer) and not module.has_range:
            raise ValueError(
                f"the activation quantizer {module.name} has no range yet: calibrate or train first"
            )
    _drop(deployed, (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d))
    norms = _fold_norms(deployed)
    for name, module in list(deployed.named_modules()):
        if isinstance(module, ActivationQuantizer):
            deployed.set_submodule(name, IntegerActivation(module))
    _drop_implied_relus(deployed)
    _align_scales(deployed)
    _replace_layers(deployed, norms)
    _replace_additions(deployed)
    _replace_means(deployed)
    deployed.graph.lint()
    deployed.delete_all_unused_submodules()
    deployed.recompile()
    return deployed.eval()


def _drop(graph_module: fx.GraphModule, kinds: tuple[type[nn.Module], ...]) -> None:
    for node in list(graph_module.graph.nodes):
        if calls(graph_module, node, kinds):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            graph_module.graph.erase_node(node)


def _fold_norms(graph_module: fx.GraphModule) -> dict[str, _BatchNorm]:
    times = Counter(node.target for node in graph_module.graph.nodes)
    folded = {}
    for node in list(graph_module.graph.nodes):
        if not calls(graph_module, node, _BatchNorm):
            continue
        norm = cast(_BatchNorm, graph_module.get_submodule(str(node.target)))
        before = cast(fx.Node, node.args[0])
        if (
            calls(graph_module, before, QuantizedLayer)
            and len(before.users) == times[before.target] == times[node.target] == 1
            and norm.running_mean is not None
        ):
            folded[str(before.target)] = norm
            node.replace_all_uses_with(before)
            graph_module.graph.erase_node(node)
    return folded


def _drop_implied_relus(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        capped = calls(graph_module, node, *RELU6)
        if not capped and not calls(graph_module, node, *RELU):
            continue
        targets = [_activation(graph_module, user) for user in node.users]
        if all(
            target is not None
            and target.zero_point == 0
            and (not capped or target.scale * target.largest <= 6 * (1 + 1e-6))
            for target in targets
        ):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            graph_module.graph.erase_node(node)


def _replace_layers(graph_module: fx.GraphModule, norms: dict[str, _BatchNorm]) -> None:
    times = Counter(node.target for node in graph_module.graph.nodes)
    replacements = {}
    for node in graph_module.graph.nodes:
        if not calls(graph_module, node, QuantizedLayer):
            continue
        name = str(node.target)
        layer = cast(QuantizedLayer, graph_module.get_submodule(name))
        source = _activation(graph_module, source_of(graph_module, cast(fx.Node, node.args[0])))
        target = _only_user(graph_module, node)
        if times[name] > 1:  # its calls may have different grids
            source = target = None
        integer = IntegerLayer(layer, norms.get(name), source, target, name)
        replacements[name] = integer.to(layer.weight.device)
    for name, integer in replacements.items():
        graph_module.set_submodule(name, integer)


def _rounded_sums(graph_module: fx.GraphModule) -> list[RoundedSum]:
    sums = []
    for node in graph_module.graph.nodes:
        target = _only_user(graph_module, node)
        if target is None or not calls(graph_module, node, (), ADDITIONS, ADDING_METHODS):
            continue
        terms = [term for term in node.args if isinstance(term, fx.Node)]
        grids = [_activation(graph_module, source_of(graph_module, term)) for term in terms]
        if len(terms) == 2 and grids[0] is not None and grids[1] is not None:
            sums.append(RoundedSum(node, (terms[0], terms[1]), (grids[0], grids[1]), target))
    return sums


def _align_scales(graph_module: fx.GraphModule) -> None:
    """Scales of what is added become short multiples of the scale of the sum, from the last sum to the first.

    They change so little that the largest value moves by some hundredths of a code of the sum. An activation keeps its
    scale once a later sum has settled it.
    """
    settled: set[IntegerActivation] = set()
    for rounded in reversed(_rounded_sums(graph_module)):
        of = rounded.target.scale
        settled.add(rounded.target)
        # With room for what rounding adds to the quotients.
        unit = _unit_of_sums(1.01 * sum(float(grid.scale / of) for grid in rounded.grids))
        for grid in rounded.grids:
            if grid not in settled:
                grid.scale.copy_(_short_multiple(grid.scale, of, unit))
                settled.add(grid)


def _unit_of_sums(quotients: float) -> float:
    """The finest power of two of whose multiples float32 holds all sums of zero point and codes times quotients."""
    return 2.0 ** -math.floor(math.log2(2**24 / (255 * (1 + quotients))))


def _short_multiple(scale: Tensor, of: Tensor, unit: float) -> Tensor:
    """The number next to ``scale`` whose quotient by ``of``, rounded to float32, is a whole number of units."""
    nearest = max(1, round(float(scale / of) / unit))
    for number in sorted(range(max(1, nearest - 8), nearest + 9), key=lambda n: abs(n - nearest)):
        candidate = of * (number * unit)
        if candidate / of == number * unit:
            return candidate
    return scale


def _replace_additions(graph_module: fx.GraphModule) -> None:
    for node, terms, grids, target in _rounded_sums(graph_module):
        addition: nn.Module = IntegerAddition(*grids, target)
        if not addition.exact:
            addition = FloatAddition()
        graph_module.add_submodule(node.name, addition)
        with graph_module.graph.inserting_after(node):
            replacement = graph_module.graph.call_module(node.name, terms)
        node.replace_all_uses_with(replacement)
        graph_module.graph.erase_node(node)


def _replace_means(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        keepdim = _keeps_dims_of_mean(graph_module, node)
        if keepdim is None:
            continue
        source = cast(fx.Node, node.args[0])
        grid = _activation(graph_module, source_of(graph_module, source))
        if grid is None:
            continue
        name = f"{node.name}_of_codes"
        graph_module.add_submodule(name, IntegerMean(grid, keepdim))
        with graph_module.graph.inserting_after(node):
            mean = graph_module.graph.call_module(name, (source,))
        node.replace_all_uses_with(mean)
        graph_module.graph.erase_node(node)


def _keeps_dims_of_mean(graph_module: fx.GraphModule, node: fx.Node) -> bool | None:
    """Of a mean over height and width whether it keeps them, None for any other node."""
    if calls(graph_module, node, nn.AdaptiveAvgPool2d):
        pool: Any = graph_module.get_submodule(str(node.target))
        return True if pool.output_size in (1, (1, 1)) else None
    arguments = [*node.args[1:], *node.kwargs.values()]
    if calls(graph_module, node, (), {F.adaptive_avg_pool2d}):
        return True if arguments in ([1], [(1, 1)]) else None
    if not calls(graph_module, node, (), {torch.mean}, {"mean"}):
        return None
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(dims, list | tuple) or sorted(cast(Any, dims)) not in ([2, 3], [-2, -1]):
        return None
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def _only_user(graph_module: fx.GraphModule, node: fx.Node) -> IntegerActivation | None:
    return _activation(graph_module, next(iter(node.users))) if len(node.users) == 1 else None


def _activation(graph_module: fx.GraphModule, node: fx.Node) -> IntegerActivation | None:
    if not calls(graph_module, node, IntegerActivation):
        return None
    return cast(IntegerActivation, graph_module.get_submodule(str(node.target)))


def _computation(layer: QuantizedLayer) -> Any:
    if isinstance(layer, QuantLinear):
        return F.linear
    conv: Any = layer
    geometry = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    if isinstance(layer, QuantConvTranspose2d):
        return partial(
            F.conv_transpose2d,
            padding=conv.padding,
            output_padding=conv.output_padding,
            **geometry,
        )
    function = F.conv1d if conv.weight.ndim == 3 else F.conv2d
    if conv.padding_mode == "zeros":
        return partial(function, padding=conv.padding, **geometry)
    return partial(
        _padded, function, conv._reversed_padding_repeated_twice, conv.padding_mode, geometry
    )


def _padded(
    function: Any, pad: list[int], mode: str, geometry: dict[str, Any], x: Tensor, *args: Tensor
) -> Tensor:
    return function(F.pad(x, pad, mode=mode), *args, **geometry)


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (rows.ndim - 1))


def _centered_codes(
    layer: QuantizedLayer, norm: _BatchNorm | None, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes minus zero points that fit 8 bits [C, ...], scales and bias [C], in float64."""
    if layer.transposed and cast(int, layer.groups) > 1:
        raise ValueError(
            f"the transposed convolution {name!r} has groups, for which ONNX has no scale per output channel; keep it "
            f"in floating point by overrides={{{name!r}: null}}"
        )
    scale, zero_point = (values.double() for values in layer.qparams())
    codes = layer.codes().double()
    centered = codes - _rows(zero_point, codes)
    given = cast(Tensor | None, layer.bias)
    bias = torch.zeros_like(scale) if given is None else given.double()
    if norm is not None:
        mean, var = (cast(Tensor, t).double() for t in (norm.running_mean, norm.running_var))
        gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
        beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
        centered, scale, bias = fold_batchnorm_into_scale(
            centered, scale, gamma, beta, mean, var, norm.eps, bias
        )
    centered = torch.where(_rows(scale, centered) > 0, centered, 0)
    lo, hi = centered.flatten(1).aminmax(dim=1)
    largest = torch.maximum(lo.abs(), hi.abs())
    # A dead channel is its bias: any scale will do, and this one makes the bias 2^20 units of it.
    constant = torch.where(bias == 0, 1, bias.abs() / 2**20)
    scale = torch.where(largest > 0, scale, constant)

    narrow = largest <= LARGEST_CODE
    factor = torch.where(narrow, torch.floor(LARGEST_CODE / largest.clamp_min(1)), 1)
    # Codes of a range far from 0 need more than 8 bits from 0 on: they are rounded again.
    far = hi.clamp_min(0) - lo.clamp_max(0) > 255
    factor = torch.where(far, LARGEST_CODE / largest.clamp_min(1), factor)
    if far.any():
        warnings.warn(
            f"{int(far.sum())} of {len(far)} channels of {name!r} have weights too far from 0 for their codes, and are "
            "rounded again to 8 bits; QuantSpec(include_zero=True) avoids it",
            stacklevel=3,
        )
    return torch.round(centered * _rows(factor, centered)), scale / factor, bias


def _room_for_bias(
    centered: Tensor, scale: Tensor, bias: Tensor, input_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Coarser codes for channels whose bias would not fit the accumulator: they hardly depend on their input."""
    factor = (bias.abs() / (input_scale * scale) / (LARGEST_BIAS - 1)).clamp_min(1)
    return torch.round(centered / _rows(factor, centered)), scale * factor


def _zero_points(centered: Tensor) -> Tensor:
    lo, hi = centered.flatten(1).aminmax(dim=1)
    fits = torch.maximum(lo.abs(), hi.abs()) <= LARGEST_CODE
    return torch.where(fits, 0, -128 - lo.clamp_max(0))


def _operator(
    name: str, inputs: list[Tensor], attributes: dict[str, Any], dtype: torch.dtype, shape: Any
) -> Tensor:
    return cast(Tensor, torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape))


def _dequantized(
    codes: Tensor, scale: Tensor, zero_point: Tensor, shape: Any, axis: int | None = None
) -> Tensor:
    attributes = {} if axis is None else {"axis": axis}
    return _operator(
        "DequantizeLinear", [codes, scale, zero_point], attributes, torch.float32, shape
    )
