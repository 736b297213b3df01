"""Networks as ONNX files: written, compared with torch, and measured in onnxruntime."""

import importlib
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_modules.nn.modes import eval_mode
from lightning_modules.zaq.deploy import INTEGER

OPSET = 18
INTEGER_KERNELS = {
    *("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul"),
    *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
}
FLOAT_KERNELS = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


class Parity(NamedTuple):
    """How far the outputs in onnxruntime are from those in torch.

    Attributes:
        max_difference: largest absolute difference of any output.
        mean_difference: mean absolute difference.
        agreement: share of the predictions, positions of the largest score, that are equal; in [0, 1].
        predictions: number of predictions.
    """

    max_difference: float
    mean_difference: float
    agreement: float
    predictions: int


class Kernels(NamedTuple):
    """What onnxruntime runs after its optimisations.

    Attributes:
        integer: convolutions and matrix products of integers.
        floating: those of floating-point numbers.
        operators: number of nodes by operator.
    """

    integer: int
    floating: int
    operators: dict[str, int]


class Cost(NamedTuple):
    """What a file costs.

    Attributes:
        size: bytes on disk.
        latency: median time of a call in seconds.
    """

    size: int
    latency: float


def export_onnx(model: nn.Module, path: str | Path, sample: Tensor) -> Path:
    """Writes a network to an ONNX file, batch size left open.

    The result of :func:`deploy` becomes QuantizeLinear and DequantizeLinear pairs around ordinary operators, which
    onnxruntime fuses to integer kernels; 8-bit containers hold all widths. Other networks are written in floating
    point.

    Args:
        model: takes one tensor.
        path: of the file, replaced if it exists.
        sample: an input [B, ...], of which only the shape beyond the batch matters.

    Returns:
        The path.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    for library in ("onnx", "onnxscript"):
        _library(library)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The exporter takes sizes 0 and 1 for constants.
    example = torch.zeros(2, *sample.shape[1:], device=sample.device)
    integer = [m for m in model.modules() if isinstance(m, INTEGER)]
    handle, unfinished = tempfile.mkstemp(suffix=".onnx", dir=path.parent)
    os.close(handle)
    try:
        for module in integer:
            module.exporting = True
        with eval_mode(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                unfinished,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["image"],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
        for module in integer:
            module.exporting = False
    return path


@torch.no_grad()
def verify_onnx(
    path: str | Path, model: nn.Module, batches: Iterable[Tensor], class_axis: int = 1
) -> Parity:
    """Compares a file, fully optimised, with the torch network it was written from.

    Args:
        path: of the file.
        model: gives a tensor, or any nesting of tensors; predictions are those of the first one.
        batches: inputs [B, ...].
        class_axis: of the first output.

    Raises:
        ImportError: onnxruntime is missing.
        ValueError: no batch, or outputs that differ in number or shape.
    """
    session = _session(path)
    largest, total, values, equal, predictions = 0.0, 0.0, 0, 0, 0
    with eval_mode(model):
        for batch in batches:
            expected = [t.cpu().numpy() for t in pytree.tree_leaves(model(batch))]
            found = _run(session, batch)
            shapes = [[array.shape for array in arrays] for arrays in (found, expected)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{path} gives {shapes[0]}, the network {shapes[1]}")
            for ours, theirs in zip(expected, found, strict=True):
                difference = np.abs(ours.astype(np.float64) - theirs)
                largest = max(largest, float(difference.max(initial=0)))
                total += float(difference.sum())
                values += difference.size
            same = expected[0].argmax(class_axis) == found[0].argmax(class_axis)
            equal += int(same.sum())
            predictions += same.size
    if not predictions:
        raise ValueError("no batch to compare with")
    return Parity(largest, total / values, equal / predictions, predictions)


def optimised_kernels(path: str | Path) -> Kernels:
    """The operators of a file after all of onnxruntime's optimisations.

    Raises:
        ImportError: onnx or onnxruntime is missing.
    """
    onnx = _library("onnx")
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder, "optimised.onnx")
        _session(path, optimised)
        operators = Counter(node.op_type for node in onnx.load(optimised).graph.node)
    integer = sum(operators[name] for name in INTEGER_KERNELS)
    floating = sum(operators[name] for name in FLOAT_KERNELS)
    return Kernels(integer, floating, dict(operators.most_common()))


def demand_integer_kernels(path: str | Path, at_least: int = 1) -> Kernels:
    """Makes sure that integer arithmetic is what onnxruntime really uses.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        RuntimeError: fewer integer kernels than demanded.
    """
    kernels = optimised_kernels(path)
    if kernels.integer < at_least:
        raise RuntimeError(
            f"onnxruntime runs {kernels.integer} integer kernels of {path}, expected at least {at_least}; beside "
            f"them {kernels.floating} in floating point. quantize_model(..., placement='full') puts the inputs and "
            f"outputs of all layers on grids. Operators: {kernels.operators}"
        )
    return kernels


def measure_onnx(path: str | Path, sample: Tensor, runs: int = 20, threads: int = 1) -> Cost:
    """Size of a file and time of a call with all of ``sample``, on the CPU, after three calls to warm up.

    Raises:
        ImportError: onnxruntime is missing.
    """
    session = _session(path, threads=threads)
    times = []
    for _ in range(3 + runs):
        start = time.perf_counter()
        _run(session, sample)
        times.append(time.perf_counter() - start)
    return Cost(Path(path).stat().st_size, float(np.median(times[3:])))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"ONNX files need {name}: pip install 'adversaria[export]' ({error})"
        ) from error


def _session(path: str | Path, optimised: Path | None = None, threads: int = 1) -> Any:
    onnxruntime = _library("onnxruntime")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no ONNX file at {path}; write one with export_onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, batch: Tensor) -> list[np.ndarray]:
    return session.run(None, {session.get_inputs()[0].name: batch.float().cpu().numpy()})
