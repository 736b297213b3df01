from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.cyclegan import load_reference_discriminator, load_reference_generator
from lightning_modules.cyclegan.networks import (
    PatchDiscriminator,
    PixelDiscriminator,
    build_generator,
)

ARCH: dict[str, Any] = {"name": "resnet_2blocks", "ngf": 3}


def released(folder: Path, network: nn.Module, prefix: str = "module.") -> Path:
    """A file as of 2018: saved from DataParallel, with running statistics of instance norms."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    for place, layer in network.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            state[f"{prefix}{place}.{name}"] = parameter.detach()
        if isinstance(layer, nn.InstanceNorm2d):
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                state[f"{prefix}{place}.{name}"] = torch.zeros(layer.num_features)
    path = folder / "latest_net.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_weights_load(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = build_generator(**ARCH)
    x = torch.rand(1, 3, 32, 32)
    loaded = load_reference_generator(released(tmp_path, generator, prefix), **ARCH)
    assert torch.equal(loaded(x), generator(x))
    for kind, network in (
        ("patch", PatchDiscriminator(ndf=2)),
        ("pixel", PixelDiscriminator(ndf=2)),
    ):
        path = released(tmp_path, network, prefix)
        discriminator = load_reference_discriminator(path, kind, ndf=2)  # type: ignore[arg-type]
        assert torch.equal(discriminator(x), network(x))


def test_running_statistics_of_batch_norm_are_kept(tmp_path: Path) -> None:
    generator = build_generator(**ARCH, norm="batch")
    generator(torch.rand(2, 3, 16, 16))
    torch.save(generator.state_dict(), tmp_path / "g.pth")
    loaded = load_reference_generator(tmp_path / "g.pth", **ARCH, norm="batch")
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded.eval()(x), generator.eval()(x))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            {"name": "resnet_3blocks"},
            r"name='resnet_3blocks'.*missing: model.12.conv_block.1.weight.*and 2 more",
        ),
        ({"name": "resnet_1blocks"}, r"unexpected: model.11.conv_block.1.weight.*and 6 more"),
        (
            {"ngf": 4},
            r"ngf=4.*of another shape: model.1.weight \[3, 3, 7, 7\] instead of \[4, 3, 7, 7\]",
        ),
        (
            {"dropout": True},
            r"missing: model.10.conv_block.6.weight.*unexpected: model.10.conv_block.5.weight",
        ),
    ],
)
def test_weights_of_another_network(arch: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = released(tmp_path, build_generator(**ARCH))
    with pytest.raises(RuntimeError, match=message):
        load_reference_generator(path, **{**ARCH, **arch})


def test_what_is_no_weight_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        load_reference_generator(tmp_path / "no.pth")
    (tmp_path / "text.pth").write_text("x")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=r"text\.pth is not a readable checkpoint"):
        load_reference_discriminator(tmp_path / "text.pth")
    for name in ("list", "other"):
        with pytest.raises(
            RuntimeError, match=rf"{name}\.pth does not hold the weights of a network"
        ):
            load_reference_discriminator(tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="kind='basic'"):
        load_reference_discriminator(tmp_path / "text.pth", "basic")  # type: ignore[arg-type]
