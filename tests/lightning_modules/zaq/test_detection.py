"""SSD quantized, judged and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.supervised import Detector
from lightning_modules.supervised.ssd import small_ssd
from lightning_modules.zaq.attach import activation_quantizers, calibrate, quantize_model
from lightning_modules.zaq.deploy import deploy
from lightning_modules.zaq.detection import detection_precision, round_detector, rounding_table
from lightning_modules.zaq.export import demand_integer_kernels, export_onnx, verify_onnx
from lightning_modules.zaq.quantizers import QuantSpec
from lightning_modules.zaq.zeroq import distill_data
from tests.lightning_modules.supervised.tiny import scenes, tiny_detector, trained_detector


@pytest.fixture(scope="module")
def trained() -> Detector:
    return trained_detector(80)


def noise(count: int = 16, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def seasoned() -> torch.nn.Module:
    """With running statistics that are those of noise."""
    torch.manual_seed(0)
    network = small_ssd(6, 8).train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, 3, 64, 64))
    return network.eval()


@pytest.mark.parametrize("placement", ["relu", "full"])
def test_ssd_on_mobilenet_is_quantized_with_outputs_near(placement: str) -> None:
    network, images = seasoned(), noise()
    errors = {}
    for bits in (8, 6):
        quantized = quantize_model(network, bits, bits, placement=placement)  # type: ignore[arg-type]
        calibrate(quantized, [images])
        with torch.no_grad():
            ours, theirs = network(images), quantized.eval()(images)
        assert list(theirs) == ["cls_logits", "bbox_regression"]
        errors[bits] = [float((ours[k] - theirs[k]).std() / ours[k].std()) for k in ours]
    assert max(errors[8]) < 0.03
    assert max(errors[6]) < 0.1
    assert min(errors[6]) > max(errors[8]), "it was rounded"


def test_every_convolution_and_activation_of_ssd_is_quantized() -> None:
    network = small_ssd(6, 8)
    quantized = quantize_model(network, 6, 6)
    layers = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)]
    left = [n for n in layers if type(quantized.get_submodule(n)) is torch.nn.Conv2d]
    assert len(layers) > 60
    assert not left
    activations = [m for m in network.modules() if isinstance(m, torch.nn.ReLU6)]
    assert len(activation_quantizers(quantized)) == len(activations)
    assert quantized.state_dict().keys() >= network.state_dict().keys()


def test_rounded_detectors_beside_the_float_one(trained: Detector) -> None:
    batches = [scenes(48, 5000)]
    before = {name: values.clone() for name, values in trained.state_dict().items()}
    noise_ranges = [noise(32, 32)]
    table = rounding_table(trained, batches, [(8, 8), (6, 6), (2, 2)], noise_ranges)
    assert list(table) == ["float", "W8A8", "W6A6", "W2A2"]
    assert table["float"] > 0.6
    assert abs(table["W8A8"] - table["float"]) < 0.03
    assert abs(table["W6A6"] - table["float"]) < 0.1
    assert table["W2A2"] < table["float"] / 2
    assert all(torch.equal(values, before[name]) for name, values in trained.state_dict().items())
    distilled = distill_data(trained.network, 16, (3, 32, 32), steps=20)
    quantized = round_detector(trained, 6, 6, [distilled])
    assert abs(detection_precision(trained, batches, quantized) - table["float"]) < 0.1


def test_evaluation_may_not_move_a_range(trained: Detector) -> None:
    quantized = quantize_model(trained.network, 8, 8)
    calibrate(quantized, [noise(4, 32)])

    class Leaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = quantized

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            next(iter(activation_quantizers(self.inner).values())).hi.add_(1)
            return self.inner(x)

    with pytest.raises(RuntimeError, match="would not be zero-shot"):
        detection_precision(trained, [scenes(2)], Leaky())


def exported(network: torch.nn.Module, side: int, path: Path) -> tuple[Any, Any]:
    """Parity and kernels of the integer network in onnxruntime."""
    for library in ("onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    images = noise(8, side)
    spec = QuantSpec(include_zero=True)
    quantized = quantize_model(network, 8, 8, placement="full", weight_spec=spec)
    calibrate(quantized, [images])
    integer = deploy(quantized.eval())
    export_onnx(integer, path, images)
    return verify_onnx(path, integer, [images], class_axis=2), demand_integer_kernels(path)


def test_a_detector_runs_as_integers(tmp_path: Path) -> None:
    parity, kernels = exported(tiny_detector().network.eval(), 32, tmp_path / "tiny.onnx")
    assert parity.max_difference <= 1e-5
    assert parity.agreement == 1
    # What the heads say is in floating point.
    assert (kernels.integer, kernels.floating) == (4, 4)


@pytest.mark.slow
def test_ssd_on_mobilenet_runs_as_integers(tmp_path: Path) -> None:
    parity, kernels = exported(seasoned(), 64, tmp_path / "ssd.onnx")
    assert parity.max_difference <= 1e-5
    assert parity.agreement == 1
    assert kernels.floating == 8
    assert kernels.integer > 60
