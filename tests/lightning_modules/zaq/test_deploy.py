import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_modules.zaq import export
from lightning_modules.zaq.attach import calibrate, quantize_model
from lightning_modules.zaq.deploy import IntegerAddition, IntegerLayer, IntegerMean, deploy
from lightning_modules.zaq.export import (
    demand_integer_kernels,
    export_onnx,
    measure_onnx,
    optimised_kernels,
    verify_onnx,
)
from lightning_modules.zaq.quantizers import QuantSpec
from tests.lightning_modules.zaq.test_attach import Net, Shared, images

onnx_installed = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
with_onnx = pytest.mark.skipif(not onnx_installed, reason="needs the extra 'export'")


def trained(network: nn.Module) -> nn.Module:
    """Batch norms as training leaves them, some scales negative."""
    generator = torch.Generator().manual_seed(2)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                assert tensor is not None
                tensor.data = torch.randn(tensor.shape, generator=generator)
            norm.running_var = torch.rand(norm.num_features, generator=generator) + 0.3
    return network.eval()


def quantized(network: nn.Module, bits: int = 4, **options: Any) -> fx.GraphModule:
    model = quantize_model(trained(network), bits, bits, **{"placement": "full", **options})
    calibrate(model, [images(16)])
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


SPECS = {
    "asymmetric": QuantSpec(),
    "with_zero": QuantSpec(include_zero=True),
    "symmetric": QuantSpec(symmetric=True, narrow_range=True),
    "per_tensor": QuantSpec(per_channel=False),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("placement", ["full", "relu"])
def test_only_the_biases_differ_from_fake_quantization(
    placement: str, bits: int, spec: str
) -> None:
    torch.manual_seed(bits)
    model = quantized(Net(8), bits, placement=placement, weight_spec=SPECS[spec])
    deployed = deploy(model)
    assert not any(isinstance(part, nn.BatchNorm2d | nn.ReLU) for part in deployed.modules())
    # One step of a code here or there, where a bias crosses a tie.
    assert relative(deployed(images(16)), model(images(16))) < 2.0 ** (-bits)


def test_the_fake_quantized_network_stays_as_it_is() -> None:
    model = quantized(Net())
    before = model(images())
    deploy(model)
    assert torch.equal(model(images()), before)


def test_outputs_of_fused_layers_are_on_the_grid_that_follows() -> None:
    deployed = deploy(quantized(Net()))
    layers = [part for part in deployed.modules() if isinstance(part, IntegerLayer)]
    fused = [layer for layer in layers if layer.output_scale is not None]
    assert len(fused) == 5, "all but the logits"
    assert sum(isinstance(part, IntegerAddition) for part in deployed.modules()) == 2
    assert all(layer.bias.dtype == torch.int32 for layer in layers)
    stored = [(part.codes.float() - part.zero_point[0]).abs().max() for part in layers]
    assert min(stored) > 63, "few bits fill the container"


class Chain(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.activation = activation
        self.fc = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.activation(self.conv(x)), 2)
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.LeakyReLU(0.2), nn.Hardswish()])
def test_activations_are_left_out_only_where_the_quantizer_implies_them(
    activation: nn.Module,
) -> None:
    network = Chain(activation)
    network.conv.weight.data *= 20
    model = quantized(network, 8)
    deployed = deploy(model)
    assert relative(deployed(images()), model(images())) < 0.01
    left = any(isinstance(part, type(activation)) for part in deployed.modules())
    assert left == (not isinstance(activation, nn.ReLU6))


class Pooled(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 3, padding=1), pool, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv(x).relu()).flatten(1))


class SpatialMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), SpatialMean()])
def test_means_of_codes_do_not_depend_on_the_order_of_summation(pool: nn.Module) -> None:
    model = quantized(Pooled(pool), 8)
    deployed = deploy(model)
    (mean,) = (part for part in deployed.modules() if isinstance(part, IntegerMean))
    assert relative(deployed(images()), model(images())) < 0.01
    codes = torch.randint(256, (64, 4, 8, 8)).float()
    first, second = (mean(mean.scale * c) for c in (codes, codes.flip(2, 3)))
    assert torch.equal(first, second)


def test_a_relu_stays_before_a_range_that_reaches_below_zero() -> None:
    model = quantized(Chain(nn.ReLU()), 8)
    quantizer = model.get_submodule("activation_quantizers.activation")
    quantizer.set_range(-1, 2)  # type: ignore[operator]
    deployed = deploy(model)
    assert any(isinstance(part, nn.ReLU) for part in deployed.modules())
    assert relative(deployed(images()), model(images())) < 0.01


def test_dead_channels_and_huge_biases() -> None:
    network = Chain(nn.ReLU())
    network.conv.weight.data[0] = 0
    network.conv.weight.data[1] *= 1e-6
    network.conv.bias = nn.Parameter(torch.tensor([0.5, 2.0, 0.0, -1.0]))
    network.fc.bias = nn.Parameter(torch.zeros(5))
    model = quantized(network, 4, weight_spec=QuantSpec(symmetric=True))
    deployed = deploy(model)
    out = deployed(images())
    assert torch.isfinite(out).all()
    assert relative(out, model(images())) < 0.01
    layer = deployed.get_submodule("conv")
    assert isinstance(layer, IntegerLayer)
    assert (layer.bias.double() * layer.bias_scale)[:2].tolist() == pytest.approx([0.5, 2])


def test_weights_far_from_zero_are_rounded_again_with_a_warning() -> None:
    network = Chain(nn.ReLU())
    network.conv.weight.data[1] = torch.linspace(5, 5.01, 27).view(3, 3, 3)
    model = quantized(network, 4)
    with pytest.warns(UserWarning, match="1 of 4 channels of 'conv' .*include_zero=True"):
        deployed = deploy(model)
    assert relative(deployed(images()), model(images())) < 0.05


@pytest.mark.parametrize("sign", [-1, 1])
def test_weights_of_one_sign_fit_if_zero_is_included(sign: int) -> None:
    network = Chain(nn.ReLU())
    network.conv.weight.data[1] = sign * torch.linspace(0.1, 1, 27).view(3, 3, 3)
    model = quantized(network, 8, weight_spec=QuantSpec(include_zero=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deployed = deploy(model)
    layer = deployed.get_submodule("conv")
    assert isinstance(layer, IntegerLayer)
    weight = layer.codes.float() - layer.zero_point.float()[:, None, None, None]
    weight = weight * layer.scale[:, None, None, None]
    torch.testing.assert_close(weight, model.get_submodule("conv").quantized_weight())  # type: ignore[operator]


def test_layers_that_share_parameters() -> None:
    model = quantized(Shared())
    # What is on no grid is rounded to 16 bits.
    assert relative(deploy(model)(images()), model(images())) < 1e-4


def test_a_norm_beside_another_reader_of_the_layer_is_not_folded() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.last = (
                nn.Conv2d(3, 4, 1),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.last(torch.relu(self.bn(x)) + x)

    model = quantized(Both(), 4, placement="relu", weight_spec=QuantSpec(symmetric=True))
    deployed = deploy(model)
    assert isinstance(deployed.get_submodule("bn"), nn.BatchNorm2d)
    assert relative(deployed(images()), model(images())) < 0.01


def test_what_cannot_be_deployed() -> None:
    with pytest.raises(ValueError, match="Net is no quantized network"):
        deploy(Net())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation quantizer relu has no range yet"):
        deploy(quantize_model(Net(), 4, 4, placement="full"))
    up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.ReLU())
    model = quantize_model(up, 4, 4)
    calibrate(model, [torch.randn(2, 4, 5, 5)])
    with pytest.raises(ValueError, match=r"convolution '0' has groups.*overrides=\{'0': null\}"):
        deploy(model)


# ------------------------------------------------------------------ ONNX
@with_onnx
def test_onnxruntime_computes_the_same_with_integer_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deployed = deploy(quantized(Net(8)))
    path = export_onnx(deployed, tmp_path / "new" / "net.onnx", images())
    parity = verify_onnx(path, deployed, [images(7), 3 * images(1)])
    assert parity.max_difference <= 1e-5
    assert (parity.agreement, parity.predictions) == (1, 8)
    kernels = demand_integer_kernels(path, at_least=6)
    assert kernels.floating == 0
    assert kernels.operators["QLinearConv"] == 5
    assert kernels.operators["QLinearAdd"] == 2
    cost = measure_onnx(path, images(), runs=3)
    assert cost.size == path.stat().st_size
    assert cost.latency > 0
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]
    changed = copy.deepcopy(deployed)
    changed.get_submodule("fc").bias.add_(2**20)  # type: ignore[operator,union-attr]
    assert verify_onnx(path, changed, [images()]).max_difference > 1e-2


@with_onnx
def test_float_networks_and_other_layers(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 3, padding_mode="reflect")
    )
    path = export_onnx(network, tmp_path / "float.onnx", images())
    assert verify_onnx(path, network, [images()]).max_difference < 1e-5
    assert optimised_kernels(path).integer == 0
    with pytest.raises(RuntimeError, match=r"runs 0 integer kernels of .*placement='full'"):
        demand_integer_kernels(path)
    with pytest.raises(ValueError, match="no batch to compare with"):
        verify_onnx(path, network, [])
    with pytest.raises(ValueError, match=r"float\.onnx gives .*, the network"):
        verify_onnx(path, network[:2], [images()])
    deployed = deploy(quantized(network, 4))
    path = export_onnx(deployed, tmp_path / "float.onnx", images())
    assert verify_onnx(path, deployed, [images()]).max_difference < 1e-5


@with_onnx
def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no ONNX file at .*no\.onnx"):
        measure_onnx(tmp_path / "no.onnx", images())


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(export.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"need onnx: pip install 'adversaria\[export\]'"):
        export_onnx(Net(), tmp_path / "net.onnx", images())
    with pytest.raises(ImportError, match="need onnxruntime"):
        verify_onnx(tmp_path / "net.onnx", Net(), [])
