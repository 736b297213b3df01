"""What ZAQ is compared with and needs no training: RQ, DFQ, ACIQ, ZeroQ and its mixed precision, under one quantizer.

Each takes a float network in evaluation mode and gives a quantized copy with all of its ranges.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules.randomness import keyed_generator
from lightning_modules.zaq.aciq import aciq_clip_range, rectified_statistics, round_weights
from lightning_modules.zaq.attach import (
    Placement,
    activation_quantizers,
    calibrate,
    quantize_model,
)
from lightning_modules.zaq.dfq import (
    absorb_biases,
    activation_ranges,
    correct_biases,
    equalize_model,
    fold_model,
    relu_inputs,
)
from lightning_modules.zaq.moments import ChannelMoments
from lightning_modules.zaq.observers import Observer
from lightning_modules.zaq.quantizers import (
    FEWEST_BITS,
    MOST_BITS,
    QuantizedLayer,
    QuantSpec,
    check_bits,
    quantized_layer,
)
from lightning_modules.zaq.zeroq import allocate_mixed_precision, measure_sensitivities

NOISE_IMAGES = 64
MIXED_BITS = range(FEWEST_BITS, MOST_BITS + 1)
"""What a layer can get in mixed precision."""


class Width(NamedTuple):
    """Bits of weights and activations."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"


def parse_width(text: str) -> Width:
    """The width that is written like ``W4A4``.

    Raises:
        ValueError: written otherwise, or bits that nothing can be quantized to.
    """
    found = re.fullmatch(r"[wW](\d+)[aA](\d+)", str(text))
    if found is None:
        raise ValueError(
            f"widths: {text!r} is no width; write bits of weights and activations like W4A4"
        )
    weights, activations = map(int, found.groups())
    return Width(
        check_bits(f"widths: {text}, weights", weights),
        check_bits(f"widths: {text}, activations", activations),
    )


@dataclass(frozen=True)
class Quantizer:
    """How every method quantizes; arguments of :func:`~lightning_modules.zaq.attach.quantize_model` but the widths.

    Attributes:
        spec: everything but the bits of the weights.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    observer: Observer = "minmax"
    percentile: float = 99.99
    placement: Placement = "relu"
    share_relu_ranges: bool = False
    first_bits: int | None = None
    last_bits: int | None = None
    overrides: Mapping[str, int | None] = field(default_factory=dict)

    def attach(
        self, network: nn.Module, width: Width, observer: Observer | None = None, **changes: Any
    ) -> fx.GraphModule:
        """A quantized copy without ranges; ``changes`` win over what is said here."""
        options: dict[str, Any] = {
            "weight_bits": width.weights,
            "act_bits": width.activations,
            "weight_spec": self.spec,
            "observer": observer or self.observer,
            "percentile": self.percentile,
            "placement": self.placement,
            "share_relu_ranges": self.share_relu_ranges,
            "first_bits": self.first_bits,
            "last_bits": self.last_bits,
            "overrides": self.overrides,
        }
        return quantize_model(network, **{**options, **changes})


def has_batch_norms(network: nn.Module) -> bool:
    """Whether there are running statistics to learn from."""
    return any(
        isinstance(part, _BatchNorm) and part.running_mean is not None for part in network.modules()
    )


def round_to_nearest(
    network: nn.Module, width: Width, quantizer: Quantizer, shape: tuple[int, ...]
) -> fx.GraphModule:
    """RQ: weights rounded; ranges six deviations of the batch norms wide, or those of noise where there are none.

    Args:
        network: float, takes normalised images.
        width: bits.
        quantizer: everything else.
        shape: of an image [C, H, W].
    """
    quantized = quantizer.attach(network, width)
    ranges = activation_ranges(network) if has_batch_norms(network) else {}
    return _with_ranges(quantized, ranges, shape)


def dfq(
    network: nn.Module, width: Width, quantizer: Quantizer, shape: tuple[int, ...]
) -> fx.GraphModule:
    """DFQ: weights equalized across layers, high biases absorbed, then rounded, biases corrected.

    Arguments as of :func:`round_to_nearest`. ReLU6 becomes ReLU.

    Raises:
        ValueError: a network without batch norms.
    """
    folded = fold_model(network)
    equalize_model(folded)
    absorb_biases(folded)
    quantized = quantizer.attach(folded.network, width)
    correct_biases(folded, quantized)
    return _with_ranges(quantized, activation_ranges(folded.network, folded.moments), shape)


def aciq(
    network: nn.Module, width: Width, quantizer: Quantizer, shape: tuple[int, ...]
) -> fx.GraphModule:
    """ACIQ without data: clipping from rectified batch-norm statistics, bits per channel, weight moments restored.

    Arguments as of :func:`round_to_nearest`. All layers have the same width, first and last included, unlike in the
    paper; up to 4 bits on average over their channels, but for first and last. With their moments restored the weights
    are on no integer grid.

    Raises:
        ValueError: a network without batch norms.
    """
    rounded = copy.deepcopy(network)
    first, last = quantizer.first_bits, quantizer.last_bits
    round_weights(rounded, width.weights, first or width.weights, last or width.weights)
    layers = dict(network.named_modules())
    overrides = {name: b for name, b in quantizer.overrides.items() if name not in layers}
    no_rounding = {"weight_bits": None, "first_bits": None, "last_bits": None}
    quantized = quantizer.attach(rounded, width, overrides=overrides, **no_rounding)
    return set_clipping_ranges(network, quantized, shape)


def set_clipping_ranges(
    network: nn.Module, quantized: fx.GraphModule, shape: tuple[int, ...]
) -> fx.GraphModule:
    """Gives a quantized copy ACIQ's activation ranges, from the batch norms of the float network alone.

    Args:
        network: float.
        quantized: its copy, changed in place.
        shape: of an image [C, H, W].

    Returns:
        The copy in evaluation mode; its ranges are frozen.

    Raises:
        ValueError: a network without batch norms.
    """
    quantizers = activation_quantizers(quantized)
    ranges = activation_ranges(network)
    for name, (moments, cap) in relu_inputs(network).items():
        if name in quantizers:
            channels = ChannelMoments(*(torch.atleast_1d(value) for value in moments))
            statistics = rectified_statistics(channels, cap=cap)
            ranges[name] = aciq_clip_range(statistics, quantizers[name].bits, positive=True)
    return _with_ranges(quantized, ranges, shape)


def zeroq(network: nn.Module, width: Width, quantizer: Quantizer, images: Tensor) -> fx.GraphModule:
    """ZeroQ, ``zeroq-calib``: weights rounded, ranges the extremes on distilled images; nothing is fine-tuned.

    Args:
        network, width, quantizer: see :func:`round_to_nearest`.
        images: of :func:`~lightning_modules.zaq.zeroq.distill_data`.
    """
    quantized = quantizer.attach(network, width, observer="minmax")
    calibrate(quantized, [images])
    return quantized.eval()


def weight_bits(quantized: nn.Module) -> dict[str, int]:
    """Bits of the weights of all quantized layers by name."""
    parts = quantized.named_modules()
    return {name: part.spec.bits for name, part in parts if isinstance(part, QuantizedLayer)}


def weight_sensitivities(
    network: nn.Module, quantizer: Quantizer, images: Tensor
) -> dict[str, Tensor]:
    """How much a network's predictions change when the weights of one layer alone have 2 to 8 bits.

    Args:
        network, quantizer, images: see :func:`zeroq`.

    Returns:
        For every layer that ``quantizer.overrides`` does not name, and by its name, Omega [7] at 2, ..., 8 bits.
    """
    layers = dict(network.named_modules())
    overrides = {name: b for name, b in quantizer.overrides.items() if name in layers}
    probe = quantizer.attach(
        network, Width(MOST_BITS, MOST_BITS), act_bits=None, overrides=overrides
    )
    chosen = [name for name in weight_bits(probe) if name not in overrides]

    def set_bits(name: str, bits: int | None) -> None:
        layer = layers[name]
        if bits is not None:
            layer = quantized_layer(layer, replace(quantizer.spec, bits=bits))
        probe.set_submodule(name, layer)

    found = measure_sensitivities(network, probe, chosen, MIXED_BITS, set_bits, images)
    return dict(zip(chosen, found, strict=True))


def mixed_precision(
    network: nn.Module,
    width: Width,
    quantizer: Quantizer,
    images: Tensor,
    sensitivities: Mapping[str, Tensor],
) -> fx.GraphModule:
    """ZeroQ with bits for each layer: least sensitive in total, and no larger than with the width's bits everywhere.

    Activations keep the bits of the width. Layers that ``quantizer.overrides`` names keep theirs, and do not count.

    Args:
        network, width, quantizer, images: see :func:`zeroq`.
        sensitivities: of :func:`weight_sensitivities`.
    """
    uniform = weight_bits(quantizer.attach(network, width))
    sizes = {name: network.get_submodule(name).weight.numel() for name in sensitivities}  # type: ignore[operator]
    allocated = allocate_mixed_precision(
        torch.stack(list(sensitivities.values())),
        list(sizes.values()),
        MIXED_BITS,
        sum(size * uniform[name] for name, size in sizes.items()),
    )
    own = {**quantizer.overrides, **dict(zip(sizes, allocated.bits, strict=True))}
    return zeroq(network, width, replace(quantizer, overrides=own), images)


def _with_ranges(
    quantized: fx.GraphModule, ranges: Mapping[str, tuple[float, float]], shape: tuple[int, ...]
) -> fx.GraphModule:
    """Ranges by name; what is not known, because no batch norm tells, is observed on N(0, 1) noise."""
    device = next(quantized.parameters()).device
    noise = torch.randn(NOISE_IMAGES, *shape, generator=keyed_generator("noise for ranges"))
    calibrate(quantized, [noise.to(next(quantized.parameters()))])
    for name, quantizer in activation_quantizers(quantized).items():
        if name in ranges:
            quantizer.set_range(*ranges[name])
    return quantized.to(device).eval()
