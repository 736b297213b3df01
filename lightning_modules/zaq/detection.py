"""Quantized detectors judged beside the float one."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, fx, nn

from lightning_modules.zaq.attach import calibrate, quantize_model, zero_shot_guard


class DetectorLike(Protocol):
    """What is needed of a detector."""

    @property
    def network(self) -> nn.Module:
        """Takes normalised images; what torch.fx traces."""

    def average_precision(
        self, batches: Iterable[dict[str, Any]], network: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """``map``, mean average precision in [0, 1], with another network in the place of its own."""


def round_detector(
    detector: DetectorLike,
    weight_bits: int | None,
    act_bits: int | None,
    inputs: Iterable[Tensor],
    **options: Any,
) -> fx.GraphModule:
    """The detector's network rounded, without any training (RQ), in evaluation mode.

    Args:
        detector: stays as it is.
        weight_bits: see :func:`~lightning_modules.zaq.attach.quantize_model`.
        act_bits: likewise.
        inputs: batches of normalised images that the ranges come from: noise, or what
            :func:`~lightning_modules.zaq.zeroq.distill_data` makes. No images of an evaluation.
        **options: further ones of ``quantize_model``.

    Raises:
        ValueError: see ``quantize_model``, or no batch.
    """
    quantized = quantize_model(detector.network, weight_bits, act_bits, **options)
    calibrate(quantized, inputs)
    return quantized.eval()


def detection_precision(
    detector: DetectorLike, batches: Iterable[dict[str, Any]], quantized: nn.Module | None = None
) -> float:
    """Mean average precision of a quantized copy of the detector's network, or of the network itself; in [0, 1].

    Args:
        detector: decodes and judges what the network says.
        batches: see :meth:`lightning_modules.supervised.Detector.average_precision`.
        quantized: the copy.

    Raises:
        ValueError: there is no object in the batches.
        RuntimeError: the evaluation has moved a range, a statistic or a weight.
    """
    with zero_shot_guard(detector.network if quantized is None else quantized):
        return float(detector.average_precision(batches, quantized)["map"])


def rounding_table(
    detector: DetectorLike,
    batches: Sequence[dict[str, Any]],
    widths: Sequence[tuple[int, int]],
    inputs: Sequence[Tensor],
    **options: Any,
) -> dict[str, float]:
    """Mean average precision of the float detector and of its roundings.

    Args:
        detector: see :func:`round_detector`.
        batches: to judge on.
        widths: bits of weights and activations.
        inputs: see :func:`round_detector`.
        **options: likewise.

    Returns:
        ``float``, then ``W6A6`` and so on, in the order of ``widths``; in [0, 1].

    Raises:
        ValueError: see :func:`round_detector` and :func:`detection_precision`.
    """
    table = {"float": detection_precision(detector, batches)}
    for weight_bits, act_bits in widths:
        quantized = round_detector(detector, weight_bits, act_bits, inputs, **options)
        table[f"W{weight_bits}A{act_bits}"] = detection_precision(detector, batches, quantized)
    return table
