import pytest
import torch
from torch import nn

from lightning_modules.supervised.cifar import CIFAR_NETWORKS, CifarResNet, resnet20
from lightning_modules.zaq.attach import trace

RESOLUTIONS = {
    "resnet20": [32, 16, 8],
    "resnet18_cifar": [32, 16, 8, 4],
    "resnet50_cifar": [32, 16, 8, 4],
    "mobilenetv2_cifar": [32, 16, 8, 4],
    "vgg19_cifar": [32, 16, 8, 4, 2],
}


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_taps_are_at_every_resolution(name: str) -> None:
    with torch.device("meta"):
        network = CIFAR_NETWORKS[name](num_classes=7, in_channels=1).eval()
        sizes: list[int] = []
        for tap in network.taps:  # type: ignore[union-attr]
            module = network.get_submodule(tap)
            module.register_forward_hook(lambda *args: sizes.append(args[-1].shape[-1]))
        assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert sizes == RESOLUTIONS[name]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 278_324),
        ("resnet18_cifar", 11_220_132),
        ("resnet50_cifar", 23_705_252),
        ("mobilenetv2_cifar", 2_412_212),
        ("vgg19_cifar", 39_327_652),
    ],
)
def test_parameters_for_100_classes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = CIFAR_NETWORKS[name](num_classes=100)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_networks_can_be_traced(name: str) -> None:
    with torch.device("meta"):
        trace(CIFAR_NETWORKS[name]())


def test_relu_calls_and_modules_of_resnet20() -> None:
    network = resnet20()
    graph, _ = trace(network)
    modules = dict(graph.named_modules())
    nodes = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    relus = [target for target in nodes if isinstance(modules[target], nn.ReLU)]
    assert (len(relus), len(set(relus))) == (19, 10)


@pytest.mark.parametrize("size", [8, 32, 40])
def test_resnet_takes_any_image_size(size: int) -> None:
    network = resnet20(in_channels=1, width=2)
    assert network(torch.randn(2, 1, size, size)).shape == (2, 10)


def test_weights_are_kaiming_normal() -> None:
    torch.manual_seed(0)
    weight = resnet20(width=32).get_submodule("layer3.1.conv2").weight
    assert isinstance(weight, torch.Tensor)
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="width=0"):
        resnet20(width=0)
    with pytest.raises(ValueError, match="num_classes=0"):
        resnet20(num_classes=0)
    assert isinstance(resnet20(num_classes=1), CifarResNet)
