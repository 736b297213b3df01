"""Networks by name, their first layer, their weights."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from lightning_modules.supervised.networks import (
    build_network,
    load_pretrained,
    network_names,
    replace_first_convolution,
    statistics_of,
)


@pytest.mark.parametrize("size", [(8, 8), (17, 31), (1, 5)])
def test_small_networks_take_any_size(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    assert build_network("classification", "small", 5, width=2).eval()(images).shape == (2, 5)
    assert build_network("segmentation", "small", 5, width=2).eval()(images).shape == (2, 5, *size)


def test_a_small_segmenter_sees_details_and_surroundings() -> None:
    torch.manual_seed(0)
    network = build_network("segmentation", "small", 2, width=4, norm="none")
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    network(images)[0, 0, 16, 16].backward()
    assert images.grad is not None
    seen = images.grad.abs().sum(1)[0] > 0
    assert seen[16, 16]
    assert seen[16, 2], "coarse scales reach far"


@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_networks_of_torchvision(in_channels: int) -> None:
    images = torch.rand(2, in_channels, 64, 64)
    network = build_network("classification", "resnet18", 7, in_channels).eval()
    assert network(images).shape == (2, 7)
    assert {"googlenet", "mobilenet_v2", "small"} <= set(network_names("classification"))
    segmenter = build_network("segmentation", "lraspp_mobilenet_v3_large", 4, in_channels).eval()
    assert segmenter(images)["out"].shape == (2, 4, 64, 64)


def test_statistics() -> None:
    mean, std = statistics_of("resnet18", 3)
    assert list(mean) == pytest.approx([0.485, 0.456, 0.406])
    assert list(std) == pytest.approx([0.229, 0.224, 0.225])
    mean, _ = statistics_of("resnet18", 1)
    assert list(mean) == pytest.approx([0.449])
    assert statistics_of("googlenet", 3)[0] == (0.5,)


def test_a_grey_network_answers_as_the_colour_one_to_grey_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
    images = torch.rand(2, 1, 9, 9)
    before = network(images.expand(-1, 3, -1, -1))
    replace_first_convolution(network, 1)
    torch.testing.assert_close(network(images), before)
    with pytest.raises(ValueError, match="Linear has no convolution"):
        replace_first_convolution(nn.Linear(2, 2), 1)


def test_pretrained_weights_but_for_the_head(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = get_model("squeezenet1_1")
    file = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), file)
    for classes, kept in ((1000, True), (5, False)):
        ours = build_network("classification", "squeezenet1_1", classes)
        assert load_pretrained(ours, "squeezenet1_1", str(file)) == file
        weights = ours.state_dict()
        assert torch.equal(weights["features.0.weight"], theirs.features[0].weight)
        head = weights["classifier.1.weight"]
        assert head.shape == (classes, 512, 1, 1)
        assert not kept or torch.equal(head, theirs.classifier[1].weight)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    network = build_network("classification", "resnet18", 5)
    with pytest.raises(FileNotFoundError, match=r"--model\.weights_path"):
        load_pretrained(network, "resnet18", str(tmp_path / "none.pth"))
    torch.save(get_model("squeezenet1_1").state_dict(), tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="does not hold the weights of resnet18"):
        load_pretrained(network, "resnet18", str(tmp_path / "other.pth"))
    torch.save(
        get_model("resnet34").state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
        tmp_path / "x.pth",
    )
    with pytest.raises(RuntimeError, match="does not hold the weights of resnet18"):
        load_pretrained(network, "resnet18", str(tmp_path / "x.pth"))
    with pytest.raises(ValueError, match="network 'small'"):
        load_pretrained(network, "small")
    with pytest.raises(ValueError, match=r"unknown network='resnet19'.*closest: resnet"):
        build_network("classification", "resnet19", 5)
    with pytest.raises(ValueError, match="unknown network='resnet18' for segmentation"):
        build_network("segmentation", "resnet18", 5)
