from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.nn.modes import frozen
from lightning_modules.zaq.attach import (
    activation_quantizers,
    calibrate,
    forward_with_features,
    named_ranges,
    observe_ranges,
    quantize_model,
    zero_shot_guard,
)
from lightning_modules.zaq.quantizers import QuantConv2d, QuantizedLayer, QuantLinear, QuantSpec


class Block(nn.Module):
    """One ReLU module called twice, as in torchvision's residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + x)


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.fc(self.dropout(self.pool(x).flatten(1)))


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def bits_of(model: nn.Module) -> dict[str, int]:
    layers = model.named_modules()
    return {name: part.spec.bits for name, part in layers if isinstance(part, QuantizedLayer)}


def test_a_quantizer_for_every_call() -> None:
    names = ["relu", "blocks_0_relu", "blocks_0_relu_1", "blocks_1_relu", "blocks_1_relu_1"]
    assert list(activation_quantizers(quantize_model(Net(), 4, 4))) == names
    shared = quantize_model(Net(), 4, 4, share_relu_ranges=True)
    assert list(activation_quantizers(shared)) == ["relu", "blocks_0_relu", "blocks_1_relu"]


def test_full_placement_puts_all_that_layers_and_additions_read_on_grids() -> None:
    model = quantize_model(Net(), 4, 4, placement="full", extra_bits=8)
    bits = {name: part.bits for name, part in activation_quantizers(model).items()}
    assert {name for name, width in bits.items() if width == 8} == {
        *("x", "blocks_0_bn2", "blocks_1_bn2", "pool"),
    }
    assert len(bits) == 9


def test_concatenation_linear_bottleneck_and_sizes() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            height = x.shape[2] + x.shape[3]
            left, right = self.a(x.view(len(images()), 3, height // 2, -1)).chunk(2, 1)
            both = torch.cat([F.relu6(left), right.relu(), left, right], 1)
            return self.b(both).view(x.size(0), -1, height // 2)

    model = quantize_model(Wide(), 4, 4, placement="full")
    names = {"x", "relu6", "relu", "getitem_2", "getitem_3", "cat"}
    assert set(activation_quantizers(model)) == names
    assert model(images()).shape == (4, 16, 8)


def test_outputs_are_not_rounded() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.stem(x))
            boxes = [head(x).flatten(1) for head in (self.a, self.b)]
            return torch.cat(boxes, 1), boxes[0] + boxes[1]

    model = quantize_model(Heads(), 4, 4, placement="full")
    assert set(activation_quantizers(model)) == {"x", "relu"}


def test_eight_bits_are_close_and_two_are_not() -> None:
    network = Net().eval()
    outputs = {}
    for bits in (2, 8):
        model = quantize_model(network, bits, bits, placement="full")
        calibrate(model, [images()])
        outputs[bits] = (model(images()) - network(images())).abs().max()
    assert outputs[8] < 0.02 < outputs[2]


def test_the_float_network_stays_as_it_is_and_its_copy_trains() -> None:
    network = Net().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with frozen(network):
        model = quantize_model(network, 4, 4).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    optimizer.step()
    after = network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    ours = {name for name in model.state_dict() if "activation_quantizers" not in name}
    assert ours == set(before)


def test_the_mode_is_kept_and_evaluation_is_what_is_traced() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.layers(x), 0.5, self.training)

    network = Dropping().train()
    model = quantize_model(network, 8, 8)
    assert network.layers.training
    assert all(part.training for part in model.modules())
    x = torch.ones(2, 3)
    assert torch.equal(model(x), model(x))
    assert not any(part.training for part in quantize_model(network.eval(), 8, 8).modules())


def test_first_and_last_layer_and_overrides() -> None:
    model = quantize_model(
        Net(),
        4,
        4,
        first_bits=8,
        last_bits=6,
        overrides={
            "blocks.0.conv1": 2,
            "fc": 7,
            "blocks.1.conv2": None,
            "blocks_0_relu": 3,
            "relu": None,
        },
        weight_spec=QuantSpec(symmetric=True),
    )
    assert bits_of(model) == {"stem": 8, "blocks.0.conv1": 2, "blocks.0.conv2": 4} | {
        "blocks.1.conv1": 4,
        "fc": 7,
    }
    widths = {name: part.bits for name, part in activation_quantizers(model).items()}
    assert widths["blocks_0_relu"] == 3
    assert "relu" not in widths
    assert model.get_submodule("stem").spec.symmetric  # type: ignore[union-attr]


def test_weights_or_activations_alone() -> None:
    only_weights = quantize_model(Net(), 4, None)
    assert not activation_quantizers(only_weights)
    only_activations = quantize_model(Net(), None, 4)
    assert not bits_of(only_activations)
    assert activation_quantizers(only_activations)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))))


def test_shared_layers_share_their_parameters() -> None:
    model = quantize_model(Shared(), 4, 4)
    calibrate(model, [images()])
    assert len(list(model.parameters())) == 2
    assert model(images()).shape == (4, 3, 8, 8)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -y


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.kernel))


def volume() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 1, 1), nn.ReLU())


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Net, {"weight_bits": 1}, "weight_bits=1 cannot be quantized to"),
        (Net, {"act_bits": 9}, "act_bits=9 cannot be quantized to"),
        (Net, {"overrides": {"fc": 9}}, "fc=9 cannot be quantized to"),
        (Net, {"first_bits": 1}, "first_bits=1"),
        (Net, {"overrides": {"blocks.0.conv": 4}}, r"'blocks\.0\.conv'; near names: blocks\.0\.conv"),
        (Net, {"overrides": {"zzz": 4}}, "no layer or activation quantizer 'zzz'; it has: stem"),
        (Net, {"placement": "all"}, "unknown placement='all'; choose one of relu, full"),
        (Net, {"taps": ["block.0"]}, r"no tap 'block\.0'; near names: blocks\.0"),
        (Net, {"observer": "max"}, "unknown observer='max'"),
        (Branching, {}, r"Branching cannot be traced .* node 'gt' \(call_function gt\).*attach\.py:\d+"),
        (Functional, {}, r"node 'conv2d' \(call_function conv2d\) applies weights .*overrides=\{'conv2d'"),
        (volume, {}, r"layer '0' \(Conv3d\) has no quantized counterpart; .*overrides=\{'0': null\}"),
        (lambda: nn.Linear(2, 2), {}, "calls no activation function"),
        (lambda: quantize_model(Net(), 4, 4), {}, "quantized already"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantized(
    build: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_model(build(), **{"weight_bits": 4, "act_bits": 4, **options})


def test_weights_kept_in_floating_point_by_name() -> None:
    model = quantize_model(Functional(), 4, 4, overrides={"conv2d": None})
    assert not bits_of(model)
    assert bits_of(quantize_model(volume(), 4, 4, overrides={"0": None})) == {}


def test_features_of_both_networks() -> None:
    network = Net().eval()
    model = quantize_model(network, 8, 4, taps=["blocks.0", "stem"])
    calibrate(model, [images()])
    for part in (network, model):
        output, (block, stem) = forward_with_features(part, images(), ["blocks.0", "stem"])
        assert torch.equal(output, part(images()))
        assert block.shape == stem.shape == (4, 4, 6, 6)
    assert len(block.unique()) <= 16, "taken after the quantizer"
    assert len(stem.unique()) > 16
    with pytest.raises(ValueError, match=r"no tap 'blocks\.1'.*give quantize_model the taps"):
        forward_with_features(model, images(), ["blocks.1"])
    with pytest.raises(ValueError, match="no module 'block'; near names: blocks"):
        forward_with_features(network, images(), ["block"])


def test_calibration_moves_ranges_and_nothing_else() -> None:
    model = quantize_model(Net().train(), 4, 4)
    norms = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    calibrate(model, [images(), 2 * images()])
    ranges = named_ranges(model)
    assert all(lo == 0 < hi for lo, hi in ranges.values())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], before) for name, before in norms.items())
    model(5 * images())
    assert named_ranges(model) == ranges, "frozen, though in training mode"
    assert model.training
    observe_ranges(model)
    model(5 * images())
    assert named_ranges(model) != ranges
    with pytest.raises(ValueError, match="no batch to calibrate with"):
        calibrate(model, [])


def test_state_goes_into_another_quantized_network() -> None:
    torch.manual_seed(0)
    model = quantize_model(Net(), 4, 4)
    calibrate(model, [images()])
    other = quantize_model(Net(), 4, 4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images()), model.eval()(images()))


def test_the_guard_names_what_an_evaluation_moved() -> None:
    model = quantize_model(Net(), 4, 4).train()
    calibrate(model, [images()])
    with zero_shot_guard(model.eval()):
        model(10 * images())
    observe_ranges(model.train())
    with (
        pytest.raises(RuntimeError, match=r"moved .*blocks\.0\.bn1\.running_mean.*Call eval\(\)"),
        zero_shot_guard(model),
    ):
        model(10 * images())


def test_kinds_of_layers() -> None:
    model = quantize_model(Net(), 4, 4)
    kinds = [type(part) for part in model.modules() if isinstance(part, QuantizedLayer)]
    assert kinds == [QuantConv2d] * 5 + [QuantLinear]
