"""DFQ: weights equalized across layers, high biases absorbed, the bias that rounding brings corrected, without data.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019. The functions on
tensors come first, then those on whole networks, which find their layers in the torch.fx graph::

    folded = fold_model(network)
    equalize_model(folded)
    absorb_biases(folded)
    quantized = ...  # a copy of folded.network with quantized weights
    correct_biases(folded, quantized)
"""

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules.arguments import demand_choice
from lightning_modules.zaq.attach import trace
from lightning_modules.zaq.folding import fold_batchnorm
from lightning_modules.zaq.moments import (
    ChannelMoments,
    bn_activation_range,
    clipped_normal_mean,
    clipped_normal_var,
)
from lightning_modules.zaq.quantizers import QuantizedLayer

EqualizationRange = Literal["maxabs", "minmax"]


class Equalized(NamedTuple):
    """Two consecutive layers after equalization; what precedes the activation between them is divided by ``scale``."""

    scale: Tensor
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor


def cross_layer_equalize(
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    groups: int = 1,
    range: EqualizationRange = "maxabs",
) -> Equalized:
    """Makes the ranges of the channels between two layers equal; what the two compute stays the same.

    Holds for layers joined by a function with ``f(x / s) = f(x) / s`` for positive s, such as ReLU, but not ReLU6.
    ``s_i = sqrt(r1_i / r2_i)`` with r1_i the range of output channel i of the first layer and r2_i that of input
    channel i of the second (paper, eq. 11). A channel without weights on either side keeps s_i = 1.

    Args:
        weight1: [C, ...] of a convolution or linear layer.
        bias1: [C] or None.
        weight2: [D, C / groups, ...], or [D, C * n] of a linear layer behind a flattened map of n positions.
        groups: of the second layer; C for a depthwise one.
        range: ``maxabs``, the largest absolute value (paper), or ``minmax``, largest less smallest (released code).

    Returns:
        Scale [C] and the new tensors.

    Raises:
        ValueError: unknown range, or layers that do not follow each other.
    """
    demand_choice(EqualizationRange, range=range)
    inputs = _by_input_channel(weight2, len(weight1), groups)
    r1, r2 = _extent(weight1.flatten(1), range), _extent(inputs.flatten(1), range)
    scale = (r1 / r2).sqrt()
    # 0, infinite or nan without weights on one side or both.
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1)
    return Equalized(
        scale,
        weight1 / _column(scale, weight1),
        None if bias1 is None else bias1 / scale,
        _from_input_channel(inputs * scale[:, None, None], weight2, groups),
    )


def absorb_high_bias(
    bias1: Tensor,
    bias2: Tensor,
    weight2: Tensor,
    mean: Tensor,
    std: Tensor,
    n: float = 3.0,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves what a ReLU almost never cuts off from a layer's bias into the next one's (paper, section 4.1.3).

    ``relu(x - c) = relu(x) - c`` where x > c, and c is n deviations below the mean of x, if that is positive. Behind a
    zero-padded convolution it is exact in the interior only.

    Args:
        bias1: [C].
        bias2: [D].
        weight2: see :func:`cross_layer_equalize`.
        mean: of the first layer's output per channel [C].
        std: its deviation [C].
        n: deviations.
        groups: of the second layer.

    Returns:
        c [C], the new ``bias1`` and the new ``bias2``.

    Raises:
        ValueError: layers that do not follow each other.
    """
    c = (mean - n * std).clamp(min=0)
    return c, bias1 - c, bias2 + _kernel_sum(weight2, len(c), groups) @ c


def bias_correction(weight: Tensor, quantized_weight: Tensor, expected_input: Tensor) -> Tensor:
    """What to add to a layer's bias so that the mean of its output is that before quantization (paper, eq. 17).

    Args:
        weight: [D, C / groups, ...] of a convolution or linear layer.
        quantized_weight: what it became, on the same scale.
        expected_input: mean of the layer's input per channel [C].

    Returns:
        ``-(sum over the kernel of the error) @ expected_input``, [D].

    Raises:
        ValueError: shapes that do not fit.
    """
    if weight.shape != quantized_weight.shape:
        raise ValueError(
            f"weights {tuple(weight.shape)} and quantized weights {tuple(quantized_weight.shape)} differ in shape"
        )
    channels = len(expected_input)
    groups = max(1, channels // weight.shape[1])
    return -_kernel_sum(quantized_weight - weight, channels, groups) @ expected_input


def _extent(rows: Tensor, range: EqualizationRange) -> Tensor:
    return rows.abs().amax(1) if range == "maxabs" else rows.amax(1) - rows.amin(1)


def _column(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


def _by_input_channel(weight: Tensor, channels: int, groups: int) -> Tensor:
    """[C, D / groups, positions] of a weight [D, C / groups, ...] or [D, C * positions]."""
    if not _follows(weight, channels, groups):
        raise ValueError(
            f"a layer with weights {tuple(weight.shape)} in {groups} groups cannot follow one of {channels} channels"
        )
    blocks = weight.reshape(groups, len(weight) // groups, channels // groups, -1)
    return blocks.transpose(1, 2).flatten(0, 1)


def _follows(weight: Tensor, channels: int, groups: int) -> bool:
    inner = weight.shape[1]
    if weight.dim() == 2:  # linear, perhaps behind a flattened map
        return groups == 1 and inner % channels == 0
    return inner * groups == channels


def _from_input_channel(inputs: Tensor, weight: Tensor, groups: int) -> Tensor:
    blocks = inputs.unflatten(0, (groups, -1)).transpose(1, 2)
    return blocks.reshape(weight.shape)


def _kernel_sum(weight: Tensor, channels: int, groups: int) -> Tensor:
    """[D, C]: what every output gets of a constant input channel."""
    sums = _by_input_channel(weight, channels, groups).sum(2).unflatten(0, (groups, -1))
    return torch.block_diag(*sums.transpose(1, 2))


# ------------------------------------------------------------------ networks
@dataclass
class FoldedModel:
    """A network without batch norms behind its layers, and what they said about the layers' outputs.

    Attributes:
        network: traced, in evaluation mode; its layers have the names of the original's.
        moments: by name of the layer, of its output before the activation.
    """

    network: fx.GraphModule
    moments: dict[str, ChannelMoments]


class LayerPair(NamedTuple):
    """Names of two layers, of which the second alone takes what the first gives, through a ReLU or not."""

    first: str
    second: str
    relu: bool


_RELU = {nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_RELU6 = {nn.ReLU6, F.relu6}
_PASS = {
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(
        torch.max_pool2d,
        F.max_pool1d,
        F.max_pool2d,
        F.max_pool3d,
        F.avg_pool1d,
        F.avg_pool2d,
        F.avg_pool3d,
    ),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout, F.dropout2d),
    *(nn.Flatten, torch.flatten, "flatten", "view", "reshape", "contiguous", "clone"),
    *(torch.squeeze, "squeeze"),
}
_MEAN = {torch.mean, "mean"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CAT = {torch.cat, torch.concat}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

Kind = Literal["layer", "norm", "relu", "relu6", "pass", "add", "cat", "other"]


def _kind(node: fx.Node, modules: Mapping[str, nn.Module]) -> Kind:
    """What a node means to the channels that pass through it."""
    target: Any = node.target
    if not node.op.startswith("call_"):
        return "other"
    if node.op == "call_module":
        module = modules[target]
        if isinstance(module, _LAYERS):
            return "layer"
        if isinstance(module, _BatchNorm):
            return "norm"
        target = type(module)
    for targets, kind in ((_RELU, "relu"), (_RELU6, "relu6"), (_ADD, "add"), (_CAT, "cat")):
        if target in targets:
            return kind  # type: ignore[return-value]
    if target in _MEAN:
        return "pass" if _is_spatial(node) else "other"
    return "pass" if target in _PASS else "other"


def _is_spatial(node: fx.Node) -> bool:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = (dims,) if isinstance(dims, int) else dims
    return isinstance(dims, Sequence) and {-1, -2, 2, 3, 4}.issuperset(dims)


def fold_model(model: nn.Module, replace_relu6: bool = True) -> FoldedModel:
    """Folds every batch norm into the layer before it and keeps its scale and shift as moments.

    The output of a layer with batch norm is taken to be N(beta, gamma**2) per channel (paper, section 4.2.1).

    Args:
        model: any network that torch.fx can trace; it stays as it is.
        replace_relu6: puts ReLU in the place of ReLU6, which equalization cannot pass (paper). This is the only change
            of what the network computes.

    Raises:
        ValueError: the network cannot be traced.
    """
    network, _ = trace(copy.deepcopy(model).eval())
    modules = dict(network.named_modules())
    calls = _calls(network)
    moments = {}
    for node in list(network.graph.nodes):
        kind = _kind(node, modules)
        if kind == "relu6" and replace_relu6:
            _replace_relu6(network, node)
        if kind != "norm":
            continue
        layer_node, norm = node.args[0], modules[node.target]
        if not (
            _kind(layer_node, modules) == "layer"
            and len(layer_node.users) == 1
            and calls[layer_node.target] == calls[node.target] == 1
            and norm.running_mean is not None
        ):
            continue
        moments[layer_node.target] = _norm_moments(norm)
        _fold(modules[layer_node.target], norm)
        node.replace_all_uses_with(layer_node)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return FoldedModel(network, moments)


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    like = norm.running_mean
    gamma = torch.ones_like(like) if norm.weight is None else norm.weight
    beta = torch.zeros_like(like) if norm.bias is None else norm.bias
    statistics = (gamma, beta, norm.running_mean, norm.running_var, norm.eps)
    weight, bias = fold_batchnorm(layer.weight, layer.bias, *statistics)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)


def _calls(network: fx.GraphModule) -> dict[Any, int]:
    targets = [node.target for node in network.graph.nodes if node.op == "call_module"]
    return {target: targets.count(target) for target in targets}


def _replace_relu6(network: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_module":
        network.set_submodule(str(node.target), nn.ReLU())
    else:
        node.target, node.args, node.kwargs = F.relu, node.args[:1], {}


def _norm_moments(norm: _BatchNorm) -> ChannelMoments:
    if norm.weight is None:
        device = None if norm.running_mean is None else norm.running_mean.device
        zeros = torch.zeros(norm.num_features, device=device)
        return ChannelMoments(zeros, zeros + 1)
    beta = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return ChannelMoments(beta.detach().clone(), norm.weight.detach().abs())


def find_equalization_pairs(network: fx.GraphModule) -> list[LayerPair]:
    """Layers whose output goes through ReLU, pooling or nothing to one other layer and nowhere else, in graph order.

    Args:
        network: traced, batch norms folded (:func:`fold_model`).
    """
    modules = dict(network.named_modules())
    calls = _calls(network)
    pairs = []
    for node in network.graph.nodes:
        if _kind(node, modules) != "layer" or calls[node.target] > 1:
            continue
        follower, relu = _next_layer(node, modules)
        if follower is None or calls[follower.target] > 1:
            continue
        first, second = modules[node.target], modules[str(follower.target)]
        groups = getattr(second, "groups", 1)
        if _follows(second.weight, len(first.weight), groups):
            pairs.append(LayerPair(node.target, str(follower.target), relu))
    return pairs


def _next_layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[fx.Node | None, bool]:
    relu = False
    while True:
        # x.view(x.size(0), -1) uses x twice, but its values once.
        users = [user for user in node.users if user.target not in ("size", getattr)]
        if len(users) != 1:
            return None, relu
        (node,) = users
        match _kind(node, modules):
            case "layer":
                return node, relu
            case "relu":
                relu = True
            case "pass":
                pass
            case _:
                return None, relu


@torch.no_grad()
def equalize_model(
    folded: FoldedModel,
    range: EqualizationRange = "maxabs",
    tolerance: float = 2e-7,
    max_sweeps: int = 1000,
) -> list[LayerPair]:
    """Equalizes all pairs of a network in place, from first to last, until the weights stop moving.

    Args:
        folded: of :func:`fold_model`; its moments follow.
        range: see :func:`cross_layer_equalize`.
        tolerance: largest mean change of a pair's weights in the last sweep (released code).
        max_sweeps: at most.

    Returns:
        The pairs.
    """
    pairs = find_equalization_pairs(folded.network)
    for _ in repeat(None, max_sweeps):
        change = 0.0
        for pair in pairs:
            change = max(change, _equalize_pair(folded, pair, range))
        if change < tolerance:
            break
    return pairs


def _equalize_pair(folded: FoldedModel, pair: LayerPair, range: EqualizationRange) -> float:
    first: Any = folded.network.get_submodule(pair.first)
    second: Any = folded.network.get_submodule(pair.second)
    groups = getattr(second, "groups", 1)
    found = cross_layer_equalize(first.weight, first.bias, second.weight, groups, range)
    changes = (found.weight1 - first.weight, found.weight2 - second.weight)
    first.weight.copy_(found.weight1)
    second.weight.copy_(found.weight2)
    if found.bias1 is not None:
        first.bias.copy_(found.bias1)
    if pair.first in folded.moments:
        mean, std = folded.moments[pair.first]
        folded.moments[pair.first] = ChannelMoments(mean / found.scale, std / found.scale)
    return max(change.abs().mean().item() for change in changes)


@torch.no_grad()
def absorb_biases(folded: FoldedModel, n: float = 3.0) -> list[LayerPair]:
    """:func:`absorb_high_bias` for all pairs across a ReLU whose first layer had a batch norm, in place.

    Args:
        folded: of :func:`fold_model`; its moments follow.
        n: deviations.

    Returns:
        The pairs in which something was absorbed.

    Raises:
        ValueError: the network had no batch norm behind a layer.
    """
    _demand_moments(folded)
    absorbed = []
    for pair in find_equalization_pairs(folded.network):
        if not pair.relu or pair.first not in folded.moments:
            continue
        first: Any = folded.network.get_submodule(pair.first)
        second: Any = folded.network.get_submodule(pair.second)
        mean, std = folded.moments[pair.first]
        bias2 = _bias(second)
        c, bias1, bias2 = absorb_high_bias(
            first.bias, bias2, second.weight, mean, std, n, getattr(second, "groups", 1)
        )
        if not c.any():
            continue
        first.bias.copy_(bias1)
        second.bias = nn.Parameter(bias2)
        folded.moments[pair.first] = ChannelMoments(mean - c, std)
        absorbed.append(pair)
    return absorbed


def _bias(layer: Any) -> Tensor:
    if layer.bias is None:
        return layer.weight.new_zeros(len(layer.weight))
    return layer.bias.detach()


def _demand_moments(folded: FoldedModel) -> None:
    if not folded.moments:
        raise ValueError(_NO_NORM)


_NO_NORM = (
    "the network has no batch norm behind a convolution or linear layer, from which the distribution of activations "
    "would be taken; use equalization alone, another network, or a method that runs images (zaq)"
)


class _Flow(NamedTuple):
    """Moments of a node's value, and its range, which the moments alone do not give behind a ReLU."""

    moments: ChannelMoments
    low: Tensor
    high: Tensor


def activation_ranges(
    network: nn.Module,
    moments: Mapping[str, ChannelMoments] | None = None,
    n: float = 6.0,
    input_range: tuple[float, float] | None = None,
) -> dict[str, tuple[float, float]]:
    """Ranges of all activations that batch norms say something about (paper, section 5).

    Normal variables reach ``n`` deviations to each side; what a ReLU clips is clipped. Sums add means and variances of
    their branches.

    Args:
        network: any network that torch.fx can trace.
        moments: of :class:`FoldedModel`, if its batch norms are folded.
        n: deviations.
        input_range: smallest and largest pixel of a normalised image; n deviations of N(0, 1) if not given.

    Returns:
        Lower and upper end by name of the node in the torch.fx graph, such as ``layer1_0_relu_1`` for the second call
        of ``layer1.0.relu``. Nodes behind an operation that is not followed, up to the next batch norm, are missing.

    Raises:
        ValueError: the network cannot be traced, or nothing is known because it has no batch norm.
    """
    traced, flows = _known(network, moments, n)
    ranges = {name: (flow.low.item(), flow.high.item()) for name, flow in flows.items()}
    if input_range is not None:
        inputs = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
        ranges |= dict.fromkeys(inputs, input_range)
    return ranges


def relu_inputs(
    network: nn.Module, moments: Mapping[str, ChannelMoments] | None = None
) -> dict[str, tuple[ChannelMoments, float | None]]:
    """What goes into every ReLU, as far as batch norms tell, and what it is capped at: 6 for ReLU6, None for ReLU.

    Args:
        network: see :func:`activation_ranges`.
        moments: see there.

    Returns:
        By name of the ReLU's node, as there.

    Raises:
        ValueError: see there.
    """
    traced, flows = _known(network, moments, n=6.0)
    modules = dict(traced.named_modules())
    found = {}
    for node in traced.graph.nodes:
        kind = _kind(node, modules)
        if kind in ("relu", "relu6") and node.name in flows:
            (source,) = node.all_input_nodes
            found[node.name] = (flows[source.name].moments, 6.0 if kind == "relu6" else None)
    return found


def _known(
    network: nn.Module, moments: Mapping[str, ChannelMoments] | None, n: float
) -> tuple[fx.GraphModule, dict[str, _Flow]]:
    traced = network if isinstance(network, fx.GraphModule) else trace(network)[0]
    if not moments and not any(isinstance(part, _BatchNorm) for part in traced.modules()):
        raise ValueError(_NO_NORM)
    return traced, _flows(traced, moments or {}, n)


@torch.no_grad()
def correct_biases(folded: FoldedModel, quantized: nn.Module) -> list[str]:
    """:func:`bias_correction` of every layer whose mean input is known, in place in ``quantized``.

    The mean input comes from the batch norms before: clipped by ReLU or ReLU6, added up where branches meet, as it is
    through pooling (paper, section 4.2). The image is taken to have mean 0.

    Args:
        folded: the float network, equalized and absorbed as ``quantized`` was.
        quantized: a network whose layers have the same names: quantized layers, or ones with rounded weights. Biases
            are added where there are none; they need 16 bits or more.

    Returns:
        The layers that were corrected.

    Raises:
        ValueError: a layer is missing in ``quantized``, or the network had no batch norm behind a layer.
    """
    _demand_moments(folded)
    flows = _flows(folded.network, folded.moments, n=6.0)
    modules = dict(folded.network.named_modules())
    calls = _calls(folded.network)
    corrected = []
    for node in folded.network.graph.nodes:
        if _kind(node, modules) != "layer" or calls[node.target] > 1:
            continue
        (source,) = node.all_input_nodes
        if source.name not in flows:
            continue
        layer: Any = modules[node.target]
        try:
            twin: Any = quantized.get_submodule(node.target)
        except AttributeError as error:
            raise ValueError(
                f"the quantized network has no layer {node.target!r}; quantize a copy of the folded network"
            ) from error
        rounded = twin.quantized_weight() if isinstance(twin, QuantizedLayer) else twin.weight
        mean = _expand(flows[source.name].moments, layer).mean
        delta = bias_correction(layer.weight, rounded, mean)
        # A new parameter: the two networks may share the old one.
        twin.bias = nn.Parameter(_bias(twin) + delta.to(rounded.dtype))
        corrected.append(node.target)
    return corrected


def _expand(moments: ChannelMoments, layer: Any) -> ChannelMoments:
    """The image's moments are one number each, whatever its channels."""
    if moments.mean.dim():
        return moments
    channels = layer.weight.shape[1] * getattr(layer, "groups", 1)
    return ChannelMoments(*(value.expand(channels) for value in moments))


def _linear_moments(layer: Any, inputs: ChannelMoments) -> ChannelMoments:
    """Moments of a layer's output if everything it sums were independent."""
    channels, groups = len(inputs.mean), getattr(layer, "groups", 1)
    mean = _kernel_sum(layer.weight, channels, groups) @ inputs.mean
    var = _kernel_sum(layer.weight.square(), channels, groups) @ inputs.std.square()
    return ChannelMoments(mean + _bias(layer), var.sqrt())


@torch.no_grad()
def _flows(
    network: fx.GraphModule, moments: Mapping[str, ChannelMoments], n: float
) -> dict[str, _Flow]:
    """What is known of each node of a graph, by its name."""
    modules = dict(network.named_modules())
    like = next(network.parameters())
    flows: dict[str, _Flow] = {}

    def normal(found: ChannelMoments) -> _Flow:
        return _Flow(found, *bn_activation_range(*found, n, relu=False))

    def follow(node: fx.Node) -> _Flow | None:
        if node.op == "placeholder":
            return normal(ChannelMoments(like.new_zeros(()), like.new_ones(())))
        kind = _kind(node, modules)
        module: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        if kind == "norm":
            return normal(_norm_moments(module))
        if kind == "layer" and node.target in moments:
            return normal(moments[str(node.target)])
        before = [flows.get(source.name) for source in node.all_input_nodes]
        known = [flow for flow in before if flow is not None]
        if kind == "other" or not known or (len(known) < len(before) and kind != "pass"):
            return None
        first = known[0]
        match kind:
            case "layer":
                return normal(_linear_moments(module, _expand(first.moments, module)))
            case "relu" | "relu6":
                cap = 6.0 if kind == "relu6" else None
                mean, std = first.moments
                clipped = clipped_normal_mean(mean, std, 0.0, cap)
                var = clipped_normal_var(mean, std, 0.0, cap)
                return _Flow(
                    ChannelMoments(clipped, var.sqrt()),
                    first.low.clamp(0, cap),
                    first.high.clamp(0, cap),
                )
            case "add":
                return add(*node.args[:2])
            case "cat":
                arguments: Any = node.args
                return concatenate(*arguments, **node.kwargs)
        return first

    def add(left: Any, right: Any) -> _Flow | None:
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            flow, number = (
                (flows[left.name], right)
                if isinstance(left, fx.Node)
                else (flows[right.name], left)
            )
            (mean, std), low, high = flow
            return _Flow(ChannelMoments(mean + number, std), low + number, high + number)
        (mean1, std1), (mean2, std2) = (flows[term.name].moments for term in (left, right))
        return normal(ChannelMoments(mean1 + mean2, torch.hypot(std1, std2)))

    def concatenate(tensors: Any, dim: Any = 0) -> _Flow | None:
        parts = [flows[tensor.name] for tensor in tensors]
        if dim not in (1, -3) or not all(part.moments.mean.dim() for part in parts):
            return None
        means, stds = zip(*(part.moments for part in parts), strict=True)
        return _Flow(
            ChannelMoments(torch.cat(means), torch.cat(stds)),
            torch.stack([part.low for part in parts]).amin(),
            torch.stack([part.high for part in parts]).amax(),
        )

    for node in network.graph.nodes:
        flow = follow(node)
        if flow is not None:
            flows[node.name] = flow
    return flows
