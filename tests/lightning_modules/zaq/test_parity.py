"""The integer file computes what the integer network in torch computes, to the last bit of every activation."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

from lightning_modules.supervised.cifar import (
    BasicBlock,
    CifarResNet,
    InvertedResidual,
    mobilenetv2_cifar,
    resnet20,
    vgg19_cifar,
)
from lightning_modules.zaq.attach import Placement, activation_quantizers, calibrate, quantize_model
from lightning_modules.zaq.baselines import parse_width
from lightning_modules.zaq.deploy import FloatAddition, IntegerAddition, IntegerLayer, deploy
from lightning_modules.zaq.export import demand_integer_kernels, export_onnx, verify_onnx

onnx_installed = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
with_onnx = pytest.mark.skipif(not onnx_installed, reason="needs the extra 'export'")


class Inverted(nn.Sequential):
    """Depthwise layers and sums of linear bottlenecks, as MobileNetV2 has them."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, 2, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU6(),
            InvertedResidual(4, 4, 2, 1),
            InvertedResidual(4, 6, 2, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        )


class Plain(nn.Sequential):
    """Pooling by maximum, groups, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4)),
            *(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5)),
        )


class Twice(nn.Module):
    """An activation in two sums, which cannot both have short quotients."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.third, self.last = (
            nn.Conv2d(inner, outer, 3, padding=1)
            for inner, outer in ((3, 4), *[(4, 4)] * 3, (4, 5))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = (x + self.first(x)).relu()
        z = (x + self.second(y)).relu()
        return self.last((y + self.third(z)).relu()).mean((2, 3))


SMALL: dict[str, Any] = {
    "residual": lambda: CifarResNet(BasicBlock, (1, 1), 4),
    "inverted": Inverted,
    "plain": Plain,
    "twice": Twice,
}
DEEP: dict[str, Any] = {
    "resnet20": resnet20,
    "mobilenetv2": mobilenetv2_cifar,
    "vgg19": vgg19_cifar,
    "torchvision_resnet18": lambda: torchvision.models.resnet18(num_classes=10),
}


def noise(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, seed: int = 1) -> Tensor:
    """Smooth images of bytes, normalised, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    smooth = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return ((smooth.clamp(0, 1) * 255).round() / 255 - 0.5) / 0.2


def deployed(network: nn.Module, width: str, placement: Placement) -> fx.GraphModule:
    """The integer network of one with random weights, and statistics and ranges of some images."""
    examples = torch.cat([noise(8, 2), pictures(8, 2)])
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            part.weight.data.uniform_(-0.5, 1.5)
            part.bias.data.normal_(0, 0.3)
    with torch.no_grad():
        network.train()(examples)
    bits = parse_width(width)
    quantized = quantize_model(network.eval(), *bits, placement=placement)
    calibrate(quantized, [examples])
    return deploy(quantized)


def demand_parity(network: fx.GraphModule, path: Path) -> None:
    export_onnx(network, path, noise(1))
    for count in (1, 7, 64):
        parity = verify_onnx(path, network, [noise(count), pictures(count)])
        assert parity.max_difference <= 1e-5, f"batches of {count}"
        assert parity.agreement == 1
    layers = sum(isinstance(part, IntegerLayer) for part in network.modules())
    assert demand_integer_kernels(path, layers).floating == 0


@with_onnx
@pytest.mark.parametrize(
    ("name", "width", "placement"),
    [
        ("residual", "W4A4", "full"),
        ("inverted", "W8A8", "relu"),
        pytest.param("residual", "W8A8", "relu", marks=pytest.mark.slow),
        pytest.param("inverted", "W8A8", "full", marks=pytest.mark.slow),
        pytest.param("inverted", "W4A4", "relu", marks=pytest.mark.slow),
        pytest.param("plain", "W2A2", "relu", marks=pytest.mark.slow),
        pytest.param("twice", "W4A8", "full", marks=pytest.mark.slow),
    ],
)
def test_small_networks(name: str, width: str, placement: Placement, tmp_path: Path) -> None:
    torch.manual_seed(0)
    demand_parity(deployed(SMALL[name](), width, placement), tmp_path / "net.onnx")


@with_onnx
@pytest.mark.slow
@pytest.mark.parametrize("placement", ["full", "relu"])
@pytest.mark.parametrize("width", ["W2A2", "W3A5", "W4A4", "W8A8"])
@pytest.mark.parametrize("name", DEEP)
def test_deep_networks(name: str, width: str, placement: Placement, tmp_path: Path) -> None:
    torch.manual_seed(1)
    demand_parity(deployed(DEEP[name](), width, placement), tmp_path / "net.onnx")


@pytest.mark.parametrize(("name", "sums"), [("resnet20", 9), ("torchvision_resnet18", 8)])
def test_float32_holds_the_sums_of_deep_networks(name: str, sums: int) -> None:
    quantized = quantize_model(DEEP[name]().eval(), 4, 4, placement="full")
    generator = torch.Generator().manual_seed(3)
    for quantizer in activation_quantizers(quantized).values():
        low, high = torch.rand(2, generator=generator)
        below = -low if quantizer.bits == 8 else 0  # a ReLU is implied by 0
        quantizer.set_range(below, 0.1 + 3 * high)
    before = {name: part.qparams()[0] for name, part in activation_quantizers(quantized).items()}
    network = deploy(quantized)
    additions = [part for part in network.modules() if isinstance(part, IntegerAddition)]
    assert len(additions) == sums
    assert all(addition.exact for addition in additions)
    for key, scale in before.items():
        changed = network.get_buffer(f"activation_quantizers.{key}.scale")
        assert changed.item() == pytest.approx(scale.item(), rel=5e-3), key


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(1, 1, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.second(x))


@with_onnx
@pytest.mark.parametrize("seed", range(20))
def test_sums_of_all_pairs_of_codes_are_those_of_the_kernel(seed: int) -> None:
    import onnxruntime
    from onnx import TensorProto, helper

    generator = torch.Generator().manual_seed(seed)
    quantized = quantize_model(nn.Sequential(nn.ReLU(), Sum()).eval(), 8, 8, placement="full")
    for quantizer in activation_quantizers(quantized).values():
        low, high = 10 ** (2 * torch.rand(2, generator=generator) - 1)
        quantizer.set_range(-low, high)
    (addition,) = (p for p in deploy(quantized).modules() if isinstance(p, IntegerAddition))

    codes = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    scales = [*addition.scales.tolist(), addition.scale.item()]
    zeros = [int(zero) for zero in (*addition.zero_points, addition.zero_point)]
    constants = {f"scale{i}": (TensorProto.FLOAT, scale) for i, scale in enumerate(scales)}
    constants |= {f"zero{i}": (TensorProto.UINT8, zero) for i, zero in enumerate(zeros)}
    inputs = ["a", "scale0", "zero0", "b", "scale1", "zero1", "scale2", "zero2"]
    node = helper.make_node("QLinearAdd", inputs, ["c"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "sum",
        [helper.make_tensor_value_info(n, TensorProto.UINT8, [None, None]) for n in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.UINT8, [None, None])],
        [helper.make_tensor(name, kind, [], [value]) for name, (kind, value) in constants.items()],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, dict(zip("ab", codes, strict=True)))
    values = [
        (torch.from_numpy(c).float() - zero) * scale
        for c, zero, scale in zip(codes, addition.zero_points, addition.scales, strict=True)
    ]
    expected = torch.round(addition(*values) / addition.scale) + addition.zero_point
    assert np.array_equal(found, expected.numpy())


def test_what_no_scale_can_make_exact_is_summed_in_floating_point() -> None:
    torch.manual_seed(0)
    network = deployed(Twice(), "W4A8", "full")
    kinds = [type(part) for part in network.modules()]
    assert kinds.count(FloatAddition) == 1
    assert kinds.count(IntegerAddition) == 2
