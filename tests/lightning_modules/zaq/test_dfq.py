from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from lightning_modules.supervised.cifar import resnet20
from lightning_modules.zaq.attach import quantize_model
from lightning_modules.zaq.dfq import (
    LayerPair,
    absorb_biases,
    absorb_high_bias,
    activation_ranges,
    bias_correction,
    correct_biases,
    cross_layer_equalize,
    equalize_model,
    find_equalization_pairs,
    fold_model,
    relu_inputs,
)
from lightning_modules.zaq.moments import (
    bn_activation_range,
    clipped_normal_mean,
    clipped_normal_var,
)
from lightning_modules.zaq.quantizers import QuantSpec


class Bottlenecked(nn.Module):
    """A residual block around a depthwise one, a flattened map, and a batch norm of uneven channels."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(6)
        self.expand = nn.Conv2d(6, 8, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 6, 1)
        self.reduce = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.reduce_norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 16, 5)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = self.activation(self.expand_norm(self.expand(x)))
        y = self.activation(self.depthwise_norm(self.depthwise(y)))
        x = x + self.project(y)
        x = F.max_pool2d(self.activation(self.reduce_norm(self.reduce(x))), 2)
        return self.linear(x.view(x.size(0), -1))


PAIRS = [
    LayerPair("expand", "depthwise", True),
    LayerPair("depthwise", "project", True),
    LayerPair("reduce", "linear", True),
]


def trained(network: nn.Module, size: int = 16) -> nn.Module:
    """Running statistics of standard normal images, and scales and shifts that differ a lot."""
    torch.manual_seed(1)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand(norm.num_features) * 2 * torch.randn(1).sign() + 0.05)
            norm.bias.copy_(torch.randn(norm.num_features))
            norm.momentum = None
        network.train()
        for _ in range(4):
            network(torch.randn(32, 3, size, size))
    return network.eval()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return trained(Bottlenecked())


# ------------------------------------------------------------------ pairs of tensors
@pytest.mark.parametrize("kind", ["maxabs", "minmax"])
@pytest.mark.parametrize(("groups", "outputs"), [(1, 5), (2, 4), (6, 12)])
def test_equalization_keeps_what_two_layers_compute(kind: Any, groups: int, outputs: int) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 3).double()
    second = nn.Conv2d(6, outputs, 3, groups=groups).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    before = second(first(x).relu())
    found = cross_layer_equalize(first.weight, first.bias, second.weight, groups, kind)
    hidden = F.conv2d(x, found.weight1, found.bias1).relu()
    after = F.conv2d(hidden, found.weight2, second.bias, groups=groups)
    torch.testing.assert_close(after, before)
    assert (found.scale - 1).abs().max() > 0.05
    if kind == "maxabs" and groups == 1:
        left, right = found.weight1.flatten(1), found.weight2.transpose(0, 1).flatten(1)
        torch.testing.assert_close(left.abs().amax(1), right.abs().amax(1))


@pytest.mark.parametrize("value", [0.0, 1e-45])
def test_a_channel_without_weights_is_left_alone(value: float) -> None:
    weight1, weight2 = torch.randn(3, 2), torch.randn(4, 3)
    weight1[0], weight2[:, 1] = value, 0
    found = cross_layer_equalize(weight1, None, weight2)
    assert torch.isfinite(found.weight1).all()
    assert torch.isfinite(found.weight2).all()
    assert found.scale[1] == 1
    assert found.bias1 is None


def test_absorption_is_exact_above_the_bias() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    x = torch.randn(50, 3)
    with torch.no_grad():
        first.bias.add_(30)
        hidden = first(x)
        std, mean = torch.std_mean(hidden, 0)
        c, bias1, bias2 = absorb_high_bias(first.bias, second.bias, second.weight, mean, std)
        after = F.linear(F.linear(x, first.weight, bias1).relu(), second.weight, bias2)
        torch.testing.assert_close(after, second(hidden.relu()), atol=1e-4, rtol=0)
    assert (c > 20).all()


def test_a_low_bias_is_not_absorbed() -> None:
    c, *biases = absorb_high_bias(
        torch.ones(2), torch.zeros(3), torch.ones(3, 2), torch.tensor([1.0, -4.0]), torch.ones(2)
    )
    assert not c.any()
    assert torch.equal(biases[0], torch.ones(2))


@pytest.mark.parametrize(("groups", "inner"), [(1, 4), (2, 2), (4, 1)])
def test_correction_is_what_a_constant_input_loses(groups: int, inner: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, inner, 3, 3)
    rounded = weight.round()
    mean = torch.rand(4)
    x = mean.view(1, 4, 1, 1).expand(1, 4, 3, 3)
    lost = F.conv2d(x, weight, groups=groups) - F.conv2d(x, rounded, groups=groups)
    torch.testing.assert_close(bias_correction(weight, rounded, mean), lost.flatten())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_layer_equalize(torch.ones(3, 2), None, torch.ones(4, 5)), "cannot follow"),
        (
            lambda: cross_layer_equalize(torch.ones(3, 2), None, torch.ones(4, 2, 3, 3)),
            "cannot follow one of 3 channels",
        ),
        (
            lambda: cross_layer_equalize(torch.ones(3, 2), None, torch.ones(4, 3), range="std"),  # type: ignore[arg-type]
            "unknown range='std'",
        ),
        (lambda: bias_correction(torch.ones(4, 3), torch.ones(3, 4), torch.ones(3)), "differ"),
        (lambda: bias_correction(torch.ones(4, 3), torch.ones(4, 3), torch.ones(2)), "2 channels"),
    ],
)
def test_bad_tensors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------ moments
@pytest.mark.parametrize(("low", "high"), [(0.0, None), (0.0, 6.0), (None, 1.0), (None, None)])
def test_moments_of_clipped_samples(low: float | None, high: float | None) -> None:
    mean, std = torch.tensor([-2.0, 0.3, 5.5]), torch.tensor([1.0, 2.0, 0.7])
    generator = torch.Generator().manual_seed(0)
    samples = mean + std * torch.randn(400_000, 3, generator=generator)
    if low is not None or high is not None:
        samples = samples.clamp(low, high)
    found = clipped_normal_mean(mean, std, low, high), clipped_normal_var(mean, std, low, high)
    torch.testing.assert_close(found[0], samples.mean(0), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[1], samples.var(0), atol=2e-2, rtol=0)


def test_moments_without_deviation_and_far_from_the_bound() -> None:
    mean, std = torch.tensor([-1.0, 2.0, -100.0, 100.0]), torch.tensor([0.0, 0.0, 0.1, 0.1])
    assert clipped_normal_mean(mean, std).tolist() == [0, 2, 0, 100]
    torch.testing.assert_close(clipped_normal_var(mean, std), torch.tensor([0, 0, 0, 0.01]))


def test_range_of_capped_and_dead_channels() -> None:
    mean, std = torch.tensor([1.0, -9.0]), torch.tensor([1.0, 1.0])
    assert [end.item() for end in bn_activation_range(mean, std)] == [0, 7]
    assert [end.item() for end in bn_activation_range(mean, std, cap=6.0)] == [0, 6]
    assert [end.item() for end in bn_activation_range(mean, std, relu=False)] == [-15, 7]
    assert [end.item() for end in bn_activation_range(mean[1:], std[1:])] == [0, 0]


# ------------------------------------------------------------------ networks
def test_folding_keeps_the_network_and_its_moments(network: nn.Module) -> None:
    folded = fold_model(network)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(folded.network(x), network(x), atol=1e-5, rtol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.network.modules())
    assert set(folded.moments) == {"stem", "expand", "depthwise", "reduce"}
    mean, std = folded.moments["expand"]
    assert torch.equal(mean, network.expand_norm.bias)
    assert torch.equal(std, network.expand_norm.weight.abs())
    assert network.stem.bias is None, "the original is left alone"


def test_pairs_are_found_through_relu_pool_and_flatten(network: nn.Module) -> None:
    assert find_equalization_pairs(fold_model(network).network) == PAIRS


@pytest.mark.parametrize("tracks", [True, False])
def test_a_norm_without_scale_or_statistics(tracks: bool) -> None:
    norm = nn.BatchNorm2d(4, affine=False, track_running_stats=tracks)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert activation_ranges(layers)["_2"] == (0, 6)
    folded = fold_model(layers)
    assert bool(folded.moments) == tracks, "batch statistics cannot be folded"
    pairs = find_equalization_pairs(folded.network)
    assert pairs == ([LayerPair("0", "3", True)] if tracks else [])


def test_relu6_separates_layers_until_it_is_replaced() -> None:
    network = trained(Bottlenecked(nn.ReLU6))
    kept = fold_model(network, replace_relu6=False)
    assert find_equalization_pairs(kept.network) == []
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(kept.network(x), network(x), atol=1e-5, rtol=1e-4)
    assert find_equalization_pairs(fold_model(network).network) == PAIRS


class Joined(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, join: Any) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 2)
        self.join = join

    def forward(self, relu: Tensor) -> Tensor:
        return self.join(self, relu)


@pytest.mark.parametrize(
    "join",
    [
        lambda net, x: net.norm(net.first(x)) + net.first(x),
        lambda net, x: net.norm(net.second(net.norm(net.first(x)))),
        lambda net, x: (lambda y: net.norm(y) * y)(net.first(x)),
    ],
)
def test_what_is_used_twice_is_not_folded(join: Any) -> None:
    network = trained(Joined(join), 4)
    folded = fold_model(network)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(folded.network(x), network(x))
    assert not folded.moments


def test_mean_over_channels_separates_layers() -> None:
    spatial = Joined(lambda net, x: net.linear(net.first(x).mean((2, 3))))
    channels = Joined(lambda net, x: net.linear(net.first(x).mean(1)))
    pairs = [find_equalization_pairs(fold_model(net).network) for net in (spatial, channels)]
    assert pairs == [[LayerPair("first", "linear", False)], []]


def test_absorption_needs_a_relu_between() -> None:
    network = Joined(lambda net, x: net.second(net.norm(net.first(x))))
    nn.init.constant_(network.norm.bias, 30)
    folded = fold_model(network)
    assert len(equalize_model(folded)) == 1
    assert absorb_biases(folded) == []


def test_an_argument_may_have_the_name_of_a_function() -> None:
    network = Joined(lambda net, x: net.norm(net.first(x)))
    assert set(relu_inputs(network)) == set()
    assert activation_ranges(network)["relu"] == (-6, 6)


@pytest.mark.parametrize(
    "join",
    [
        lambda net, x: net.first(net.second(net.second(x).relu()).relu()),
        lambda net, x: net.second(net.second(net.first(x).relu()).relu()),
    ],
)
def test_a_layer_that_is_called_twice_is_in_no_pair(join: Any) -> None:
    assert find_equalization_pairs(fold_model(Joined(join)).network) == []


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("resnet18", 8), ("resnet50", 32), ("mobilenet_v2", 37), ("vgg11_bn", 10)],
)
def test_pairs_of_torchvision_networks(name: str, pairs: int) -> None:
    with torch.device("meta"):
        network = get_model(name)
        found = find_equalization_pairs(fold_model(network).network)
    assert len(found) == pairs


@pytest.mark.parametrize("kind", ["maxabs", "minmax"])
def test_equalized_network_computes_the_same(kind: Any, network: nn.Module) -> None:
    folded = fold_model(network)
    assert equalize_model(folded, kind) == PAIRS
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(folded.network(x), network(x), atol=1e-4, rtol=1e-4)
    if kind == "maxabs":
        left = folded.network.expand.weight.flatten(1).abs().amax(1)
        right = folded.network.depthwise.weight.flatten(1).abs().amax(1)
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_moments_follow_equalization_and_absorption(network: nn.Module) -> None:
    folded = fold_model(network)
    equalize_model(folded)
    absorbed = absorb_biases(folded)
    hidden: list[Tensor] = []
    folded.network.expand.register_forward_hook(lambda *args: hidden.append(args[-1]))
    torch.manual_seed(2)
    folded.network(torch.randn(64, 3, 16, 16))
    std, mean = torch.std_mean(hidden[0], (0, 2, 3))
    torch.testing.assert_close(folded.moments["expand"].mean, mean, atol=0.1, rtol=0.1)
    torch.testing.assert_close(folded.moments["expand"].std, std, atol=0.1, rtol=0.1)
    assert set(absorbed) <= set(PAIRS)


def test_absorption_lowers_a_high_bias_and_moves_the_output_little(network: nn.Module) -> None:
    with torch.no_grad():
        network.reduce_norm.bias.add_(20)
        network.expand_norm.bias.fill_(0)
        network.depthwise_norm.bias.fill_(0)
    folded = fold_model(network)
    before = folded.network.reduce.bias.clone()
    assert absorb_biases(folded, n=6) == [PAIRS[2]]
    assert (folded.network.reduce.bias < before - 1).all()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(folded.network(x), network(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize("per_channel", [True, False])
def test_corrected_biases_restore_the_mean_output(per_channel: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )
    folded = fold_model(trained(layers))
    spec = QuantSpec(per_channel=per_channel)
    quantized = quantize_model(folded.network, 4, None, weight_spec=spec)
    x = torch.randn(256, 3, 16, 16)
    with torch.no_grad():
        expected = folded.network(x).mean(0)
        before = (quantized(x).mean(0) - expected).abs().mean()
        correct_biases(folded, quantized)
        after = (quantized(x).mean(0) - expected).abs().mean()
    assert after < 0.3 * before


def test_every_layer_is_corrected_in_the_quantized_network_alone(network: nn.Module) -> None:
    folded = fold_model(network)
    quantized = quantize_model(folded.network, 3, None)
    biases = {name: value.clone() for name, value in folded.network.named_parameters()}
    names = ["stem", "expand", "depthwise", "project", "reduce", "linear"]
    assert correct_biases(folded, quantized) == names
    for name in names:
        changed = not torch.equal(quantized.get_submodule(name).bias, biases[f"{name}.bias"])
        assert changed == (name != "stem"), "the image has mean 0"
    assert all(torch.equal(biases[name], p) for name, p in folded.network.named_parameters())


def test_ranges_cover_the_activations(network: nn.Module) -> None:
    images = torch.randn(64, 3, 16, 16)
    traced = fold_model(network)
    for ranges in (
        activation_ranges(network, input_range=(-2.5, 2.0)),
        activation_ranges(traced.network, traced.moments, input_range=(-2.5, 2.0)),
    ):
        assert ranges["x"] == (-2.5, 2.0)
        activations = {"relu": network.stem_norm(network.stem(images)).relu()}
        expanded = network.expand_norm(network.expand(activations["relu"])).relu()
        activations["activation"] = expanded
        activations["activation_1"] = network.depthwise_norm(network.depthwise(expanded)).relu()
        for name, values in activations.items():
            low, high = ranges[name]
            assert low == 0
            assert values.amax() < 1.2 * high < 4 * values.amax()
        total = activations["relu"] + network.project(activations["activation_1"])
        low, high = ranges["add"]
        assert 8 * total.amin() < low < total.amin()
        assert total.amax() < 1.2 * high < 4 * total.amax()


def test_inputs_of_every_relu(network: nn.Module) -> None:
    found = relu_inputs(network)
    assert set(found) == {"relu", "activation", "activation_1", "activation_2"}
    moments, cap = found["activation_1"]
    assert cap is None
    assert torch.equal(moments.mean, network.depthwise_norm.bias)
    assert relu_inputs(Bottlenecked(nn.ReLU6))["activation"][1] == 6


def test_sums_add_means_and_variances() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> list[Tensor]:
            left, right = self.left(x), self.right(x)
            both, wide = torch.cat([left, right], 1), torch.cat([left, right], 2)
            return [torch.relu(y) for y in (left + right + 1, both, x.sigmoid(), wide)]

    network = Branches()
    nn.init.constant_(network.left.bias, 2)
    nn.init.constant_(network.right.weight, 3)
    found = relu_inputs(network)
    torch.testing.assert_close(found["relu"][0].mean, torch.full((2,), 3.0))
    torch.testing.assert_close(found["relu"][0].std, torch.full((2,), 10**0.5))
    assert found["relu_1"][0].mean.tolist() == [2, 2, 0, 0]
    assert set(found) == {"relu", "relu_1"}, "nothing is known of a sigmoid or of joined rows"


def test_resnet_of_the_paper() -> None:
    torch.manual_seed(0)
    network = trained(resnet20(width=4))
    folded = fold_model(network)
    pairs = equalize_model(folded)
    assert [pair.first for pair in pairs[:2]] == ["layer1.0.conv1", "layer1.1.conv1"]
    assert len(pairs) == 9
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded.network(x), network(x), atol=1e-4, rtol=1e-3)
    assert "layer3_2_relu_1" in activation_ranges(folded.network, folded.moments)


@pytest.mark.parametrize(
    "call",
    [
        absorb_biases,
        lambda folded: correct_biases(folded, folded.network),
        lambda folded: activation_ranges(folded.network, folded.moments),
        lambda folded: relu_inputs(folded.network),
    ],
)
def test_statistics_need_batch_norm(call: Any) -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    folded = fold_model(layers)
    assert equalize_model(folded) == [LayerPair("0", "2", True)]
    with pytest.raises(ValueError, match="has no batch norm"):
        call(folded)


def test_quantized_network_must_have_the_layers(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="has no layer 'stem'"):
        correct_biases(fold_model(network), nn.Sequential())


def test_untraceable_network_is_named() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branching"):
        fold_model(Branching())
