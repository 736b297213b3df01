"""Quantizers attached to any network that torch.fx can trace: one per layer and per call of an activation."""

import copy
import operator
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from lightning_modules.arguments import demand_choice
from lightning_modules.nn.modes import eval_mode
from lightning_modules.zaq.observers import ActivationQuantizer, Observer
from lightning_modules.zaq.quantizers import (
    QUANTIZED,
    QuantizedLayer,
    QuantSpec,
    check_bits,
    quantized_layer,
)

Placement = Literal["relu", "full"]

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardtanh,
)
ACTIVATION_FUNCTIONS = {
    *(torch.relu, torch.relu_, torch.prelu),
    *(F.relu, F.relu6, F.leaky_relu, F.prelu, F.elu, F.silu, F.gelu, F.hardswish, F.hardtanh),
}
ACTIVATION_METHODS = {"relu", "relu_"}

ADDITIONS = {operator.add, operator.iadd, torch.add}
ADDING_METHODS = {"add", "add_"}
# What a tensor on a grid comes out of on the same grid.
REARRANGEMENTS = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d),
)
REARRANGING_FUNCTIONS = {
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute),
    *(torch.transpose, F.max_pool2d, torch.max_pool2d, F.dropout, F.pixel_shuffle),
}
REARRANGING_METHODS = {"contiguous", "flatten", "reshape", "view"}
REARRANGING_METHODS |= {"permute", "squeeze", "transpose", "unsqueeze"}
WEIGHT_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.linear}
# They have weights to quantize, and no quantized counterpart, apart from what QUANTIZED lists.
WEIGHT_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention)

QUANTIZERS = "activation_quantizers"
TAPS = "feature_taps"


class _Tracer(fx.Tracer):
    """Remembers which node is the output of which module, and the node that tracing failed on."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}
        self.refused: fx.Node | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, QuantizedLayer | ActivationQuantizer)
        return ours or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.outputs[self.path_of_module(m)] = result.node
        return result

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refused = obj.node
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.refused = obj.node
        found = super().iter(obj)
        self.refused = None
        return found


def trace(model: nn.Module) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """The graph of a network in evaluation mode, over the network's own layers.

    Returns:
        The graph, and the node that computes each module's output (that of its last call).

    Raises:
        ValueError: the network cannot be traced; the message names the node and the line.
    """
    tracer = _Tracer()
    try:
        with eval_mode(model):
            graph = tracer.trace(model)
    except Exception as error:
        nodes = list(tracer.graph.nodes) if hasattr(tracer, "graph") else []
        node = tracer.refused or (nodes[-1] if nodes else None)
        where = "before the first node" if node is None else f"at the node {_describe(node)}"
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx: {where}{_line_of(error)}: {error}. Control flow "
            "must not depend on tensors; move it out of forward, quantize a submodule, or wrap it with torch.fx.wrap"
        ) from error
    graph_module = fx.GraphModule(model, graph, type(model).__name__)
    graph_module.train(model.training)
    return graph_module, tracer.outputs


def _describe(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    stack = node.meta.get("nn_module_stack") or {}
    inside = next(reversed(stack.values()), (None,))[0] if stack else None
    return f"{node.name!r} ({node.op} {target}{f' in {inside}' if inside else ''})"


def _line_of(error: Exception) -> str:
    torch_folder = str(torch.__path__[0])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(torch_folder) and frame.filename != __file__
    ]
    return f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def quantize_model(
    model: nn.Module,
    weight_bits: int | None,
    act_bits: int | None,
    *,
    weight_spec: QuantSpec | None = None,
    observer: Observer = "minmax",
    momentum: float = 0.9,
    percentile: float = 99.99,
    placement: Placement = "relu",
    extra_bits: int = 8,
    share_relu_ranges: bool = False,
    first_bits: int | None = None,
    last_bits: int | None = None,
    overrides: Mapping[str, int | None] | None = None,
    taps: Sequence[str] = (),
) -> fx.GraphModule:
    """A quantized copy of a network; parameters and buffers keep their names, batch norms stay layers of their own.

    Every convolution and linear layer gets quantized weights, first and last included (released code), and the output
    of every activation function its :class:`ActivationQuantizer`, one for each place where it is called. With
    placement ``full`` the input, both sides of every addition, what is concatenated (unless no layer follows), and
    whatever else enters a quantized layer without being on a grid (pooled features above all) are rounded too: all
    that integer kernels need.

    The copy follows the path that the network takes in evaluation mode. Its activation quantizers observe from the
    first training batch on; :func:`calibrate` gives them ranges at once.

    Args:
        model: any network that torch.fx can trace.
        weight_bits: 2 to 8, None for weights in floating point.
        act_bits: 2 to 8, None for activations in floating point.
        weight_spec: everything but the bits of the weights; its ``ste`` serves the activations as well.
        observer, momentum, percentile: see :class:`ActivationQuantizer`.
        placement: where activations are rounded.
        extra_bits: of the quantizers that ``full`` adds.
        share_relu_ranges: one quantizer for an activation module, however often it is called (released code).
        first_bits: of the first layer's weights, if they differ.
        last_bits: of the last layer's weights, if they differ.
        overrides: bits by name of a layer (``layer1.0.conv1``) or of an activation quantizer (as in
            :func:`named_ranges`), None for floating point. They win over all other rules.
        taps: names of modules whose outputs are features, see :func:`forward_with_features`.

    Returns:
        A ``torch.fx.GraphModule`` in the mode of the network. All its parameters are to be trained, also where those
        of the network are frozen.

    Raises:
        ValueError: impossible bits; an unknown name (near ones are listed); a network that cannot be traced or is
            quantized already; weights that no quantized layer exists for; no activation to quantize.
    """
    for name, bits in (
        *(("weight_bits", weight_bits), ("act_bits", act_bits), ("extra_bits", extra_bits)),
        *(("first_bits", first_bits), ("last_bits", last_bits), *(overrides or {}).items()),
    ):
        if bits is not None:
            check_bits(name, bits)
    demand_choice(Placement, placement=placement)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer | ActivationQuantizer):
            raise ValueError(f"the network is quantized already (its {path}); give the float one")

    graph_module, outputs = trace(copy.deepcopy(model))
    attachment = _Attachment(graph_module, share_relu_ranges)
    if act_bits is not None:
        attachment.after_activations(act_bits)
        if placement == "full":
            attachment.everywhere_else(extra_bits)
    layers = _weight_layers(graph_module)
    overrides = dict(overrides or {})
    _demand_known(overrides, [*layers, *attachment.bits, *attachment.functional_layers()])

    rules = {name: weight_bits for name in layers}
    names = list(layers)
    if weight_bits is not None and names:
        rules[names[0]] = first_bits or weight_bits
        rules[names[-1]] = last_bits or rules[names[-1]]
    rules.update({name: bits for name, bits in overrides.items() if name in layers})
    for name, layer in layers.items():
        width = rules[name]
        if width is None:
            continue
        if type(layer) not in QUANTIZED:
            raise ValueError(
                f"the layer {name!r} ({type(layer).__name__}) has no quantized counterpart; keep it in floating "
                f"point by overrides={{{name!r}: null}}"
            )
        spec = replace(weight_spec or QuantSpec(), bits=width)
        graph_module.set_submodule(name, quantized_layer(layer, spec))
    functional = [
        name
        for name in attachment.functional_layers()
        if overrides.get(name, weight_bits) is not None
    ]
    if functional:
        node = next(n for n in graph_module.graph.nodes if n.name == functional[0])
        raise ValueError(
            f"the node {_describe(node)} applies weights that belong to no layer; use nn.Conv2d or nn.Linear, or keep "
            f"it in floating point by overrides={{{functional[0]!r}: null}}"
        )
    attachment.finish(
        overrides,
        lambda bits: ActivationQuantizer(
            bits,
            observer,
            momentum=momentum,
            percentile=percentile,
            ste=(weight_spec or QuantSpec()).ste,
        ),
    )
    _add_taps(graph_module, outputs, attachment, taps)
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.requires_grad_(True)
    return graph_module.train(model.training)


def calls(
    graph_module: fx.GraphModule,
    node: fx.Node,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...],
    functions: Collection[Any] = (),
    methods: Collection[str] = (),
) -> bool:
    """Whether a node calls a module of these kinds, or one of these functions or methods."""
    match node.op:
        case "call_module":
            return isinstance(graph_module.get_submodule(str(node.target)), kinds)
        case "call_function":
            return node.target in functions
        case "call_method":
            return node.target in methods
    return False


def source_of(
    graph_module: fx.GraphModule, node: fx.Node, stops: Collection[fx.Node] = ()
) -> fx.Node:
    """Where a tensor was computed that has only been rearranged since (pooled by maximum, reshaped, ...)."""
    while node not in stops and calls(
        graph_module, node, REARRANGEMENTS, REARRANGING_FUNCTIONS, REARRANGING_METHODS
    ):
        node = cast(fx.Node, node.args[0])
    return node


class _Attachment:
    """The nodes that get an activation quantizer, and with how many bits."""

    def __init__(self, graph_module: fx.GraphModule, share: bool) -> None:
        self.graph_module = graph_module
        self.share = share
        self.bits: dict[str, int] = {}
        self.sites: dict[fx.Node, str] = {}
        self.rounded: dict[fx.Node, fx.Node] = {}

    def _add(self, node: fx.Node, name: str, bits: int) -> None:
        self.sites[node] = name
        self.bits[name] = bits

    def after_activations(self, bits: int) -> None:
        for node in self.graph_module.graph.nodes:
            if calls(
                self.graph_module, node, ACTIVATIONS, ACTIVATION_FUNCTIONS, ACTIVATION_METHODS
            ):
                shared = self.share and node.op == "call_module"
                name = str(node.target).replace(".", "_") if shared else node.name
                self._add(node, name, bits)
        if not self.sites:
            raise ValueError(
                f"{type(self.graph_module).__name__} calls no activation function that could be followed by a "
                "quantizer; give act_bits=null to keep activations in floating point"
            )

    def everywhere_else(self, bits: int) -> None:
        nodes = list(self.graph_module.graph.nodes)
        # Sums and concatenations behind the last layer are outputs, and stay in floating point.
        before_layers: set[fx.Node] = set()
        for node in reversed(nodes):
            if any(user in before_layers or self._is_layer(user) for user in node.users):
                before_layers.add(node)
        for node in nodes:
            if node not in before_layers and not self._is_layer(node):
                continue
            for operand in self._grid_operands(node):
                source = self.source(operand)
                if source not in self.sites:
                    self._add(source, source.name, bits)

    def _is_layer(self, node: fx.Node) -> bool:
        return calls(self.graph_module, node, tuple(QUANTIZED), WEIGHT_FUNCTIONS)

    def _grid_operands(self, node: fx.Node) -> list[fx.Node]:
        if self._is_layer(node):
            operands: Iterable[Any] = node.args[:1]
        elif calls(self.graph_module, node, (), ADDITIONS, ADDING_METHODS):
            operands = node.args[:2]
            if not all(isinstance(operand, fx.Node) for operand in operands):
                return []
        elif calls(self.graph_module, node, (), {torch.cat, torch.concat}):
            operands = cast(Sequence[Any], node.args[0])
        else:
            return []
        return [o for o in operands if isinstance(o, fx.Node) and not _is_size(o)]

    def source(self, node: fx.Node) -> fx.Node:
        return source_of(self.graph_module, node, self.sites)

    def functional_layers(self) -> list[str]:
        nodes = self.graph_module.graph.nodes
        return [n.name for n in nodes if n.op == "call_function" and n.target in WEIGHT_FUNCTIONS]

    def finish(
        self, overrides: Mapping[str, int | None], build: Callable[[int], ActivationQuantizer]
    ) -> None:
        quantizers = nn.ModuleDict()
        self.graph_module.add_module(QUANTIZERS, quantizers)
        for node, name in self.sites.items():
            bits = overrides.get(name, self.bits[name])
            if bits is None:
                continue
            if name not in quantizers:
                quantizers[name] = build(bits)
                cast(ActivationQuantizer, quantizers[name]).name = name
            self.rounded[node] = _insert_after(node, f"{QUANTIZERS}.{name}")


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a number made of the sizes of a tensor rather than a tensor."""
    if node.target in (getattr, "size", "dim", "numel"):
        return True
    of_nodes = getattr(node.target, "__module__", None) == "_operator"
    return of_nodes and any(_is_size(source) for source in node.all_input_nodes)


def _insert_after(node: fx.Node, target: str) -> fx.Node:
    """A call of the module ``target`` on what the node computes; all other users get its result."""
    with node.graph.inserting_after(node):
        inserted = node.graph.call_module(target, (node,))
    node.replace_all_uses_with(inserted)
    inserted.args = (node,)
    return inserted


def _weight_layers(graph_module: fx.GraphModule) -> dict[str, nn.Module]:
    """Layers with weights by name, in the order in which they are called."""
    called = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    layers = {name: graph_module.get_submodule(name) for name in called}
    return {name: layer for name, layer in layers.items() if isinstance(layer, WEIGHT_LAYERS)}


def _add_taps(
    graph_module: fx.GraphModule,
    outputs: Mapping[str, fx.Node],
    attachment: _Attachment,
    taps: Sequence[str],
) -> None:
    if not taps:
        return
    graph_module.add_module(TAPS, nn.ModuleDict())
    for name in taps:
        if name not in outputs:
            raise ValueError(_unknown("tap", name, list(outputs)))
        node = attachment.rounded.get(outputs[name], outputs[name])
        key = name.replace(".", "_")
        cast(nn.ModuleDict, getattr(graph_module, TAPS))[key] = nn.Identity()
        _insert_after(node, f"{TAPS}.{key}")


def _demand_known(overrides: Mapping[str, object], known: Sequence[str]) -> None:
    for name in overrides:
        if name not in known:
            raise ValueError(_unknown("layer or activation quantizer", name, known))


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=5, cutoff=0.4)
    listed = ", ".join(near or known[:20])
    return f"the network has no {kind} {name!r}; {'near names' if near else 'it has'}: {listed}"


# ------------------------------------------------------------------ features
def forward_with_features(
    model: nn.Module, x: Tensor, taps: Sequence[str]
) -> tuple[Any, list[Tensor]]:
    """The output of a network, float or quantized, and that of some of its modules.

    Of a quantized network a feature is what comes out of the quantizer that follows the module, if one does.

    Args:
        model: a network, or the result of ``quantize_model(..., taps=taps)``.
        x: its input.
        taps: names of modules.

    Raises:
        ValueError: an unknown name, or one that was not given to :func:`quantize_model`.
    """
    features: dict[str, Tensor] = {}
    handles = []
    try:
        for name in taps:
            keep = partial(_keep, features, name)
            handles.append(_tapped(model, name).register_forward_hook(keep))
        output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return output, [features[name] for name in taps]


def _keep(
    features: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor
) -> None:
    features[name] = output


def _tapped(model: nn.Module, name: str) -> nn.Module:
    if isinstance(model, fx.GraphModule):
        taps = getattr(model, TAPS, nn.ModuleDict())
        if name.replace(".", "_") not in taps:
            raise ValueError(_unknown("tap", name, list(taps)) + "; give quantize_model the taps")
        return taps[name.replace(".", "_")]
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(_unknown("module", name, list(modules)))
    return modules[name]


# ------------------------------------------------------------------ ranges
def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of a quantized network by name."""
    found = (m for m in model.modules() if isinstance(m, ActivationQuantizer))
    return {quantizer.name: quantizer for quantizer in found}


def named_ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Range of every activation quantizer by name."""
    return {
        name: (quantizer.lo.item(), quantizer.hi.item())
        for name, quantizer in activation_quantizers(model).items()
    }


def observe_ranges(model: nn.Module, enabled: bool = True) -> None:
    """Lets the ranges of all activation quantizers move in training mode, or freezes them."""
    for quantizer in activation_quantizers(model).values():
        quantizer.observe(enabled)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Gives the activation quantizers their ranges from some batches, then freezes them; batch norms stay as they are.

    Raises:
        ValueError: no batch.
    """
    seen = 0
    observe_ranges(model)
    with eval_mode(model):
        for quantizer in activation_quantizers(model).values():
            quantizer.train()
        for batch in batches:
            model(batch)
            seen += 1
    observe_ranges(model, False)
    if not seen:
        raise ValueError("no batch to calibrate with: ranges need one at least")


def evaluation_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers: what an evaluation must leave as it is."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


def demand_unmoved(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Compares with an earlier :func:`evaluation_state`.

    Raises:
        RuntimeError: a range, a running statistic or a weight has moved; the message names the first ones.
    """
    now = evaluation_state(model)
    moved = [
        name
        for name, tensor in before.items()
        if name not in now or not torch.equal(now[name].nan_to_num(), tensor.nan_to_num())
    ]
    if moved:
        raise RuntimeError(
            f"evaluation data have moved {len(moved)} tensors of the quantized network ({', '.join(moved[:5])}): its "
            "results would not be zero-shot. Call eval() before evaluating"
        )


@contextmanager
def zero_shot_guard(model: nn.Module) -> Iterator[None]:
    """Nothing in the block may move a range, a running statistic or a weight, see :func:`demand_unmoved`."""
    before = evaluation_state(model)
    yield
    demand_unmoved(model, before)
