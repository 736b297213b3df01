from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.stargan.networks import StarGANDiscriminator, StarGANGenerator


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({}, 8_430_528),
        ({"c_dim": 7}, 8_436_800),
        ({"conv_dim": 32}, 2_118_112),
        ({"repeat_num": 9}, 11_972_544),
    ],
)
def test_generator_parameters(sizes: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        generator = StarGANGenerator(**sizes)
    assert sum(p.numel() for p in generator.parameters()) == count


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({"c_dim": 7}, 44_778_432),
        ({"image_size": 256}, 44_884_928),
        ({"image_size": 64}, 44_731_328),
        ({"image_size": 64, "repeat_num": 5}, 11_175_872),
        ({"conv_dim": 32}, 11_207_136),
    ],
)
def test_discriminator_parameters(sizes: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        discriminator = StarGANDiscriminator(**sizes)
    assert sum(p.numel() for p in discriminator.parameters()) == count


def test_generator_translates_any_image_and_has_no_state() -> None:
    torch.manual_seed(0)
    generator = StarGANGenerator(4, 2, 3, in_channels=1)
    assert not list(generator.buffers())
    assert all(
        layer.eps == 1e-5 for layer in generator.modules() if isinstance(layer, nn.InstanceNorm2d)
    )
    x = torch.randn(2, 1, 12, 8)
    y = generator(x, torch.eye(2))
    assert y.shape == x.shape
    assert y.abs().max() <= 1
    assert torch.equal(generator.eval()(x, torch.eye(2)), y)
    # One image says nothing about another.
    torch.testing.assert_close(generator(x[1:], torch.eye(2)[1:]), y[1:])


def test_the_label_changes_the_translation() -> None:
    torch.manual_seed(0)
    generator, x = StarGANGenerator(4, 2, 1), torch.randn(1, 3, 16, 16)
    plain, other = (generator(x, torch.tensor([c])) for c in ([0, 0], [0, 1]))
    assert (plain - other).abs().max() > 1e-3


def test_generator_without_blocks() -> None:
    generator = StarGANGenerator(2, 1, 0)
    assert generator(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1)).shape == (1, 3, 8, 8)


def test_discriminator_shapes_and_features() -> None:
    torch.manual_seed(0)
    discriminator = StarGANDiscriminator(45, 2, 3, 3, in_channels=2)
    x = torch.randn(4, 2, 45, 45)
    features = discriminator.features(x)
    assert features.shape == (4, 8, 5, 5)
    src, cls = discriminator(x)
    assert src.shape == (4, 1, 5, 5)
    assert cls.shape == (4, 3)
    assert all(map(torch.equal, discriminator.heads(features), (src, cls)))
    assert [name for name, p in discriminator.named_parameters() if p.dim() == 1] == [
        "main.0.bias",
        "main.2.bias",
        "main.4.bias",
    ]


@pytest.mark.parametrize(
    ("network", "sizes", "message"),
    [
        (StarGANGenerator, {"conv_dim": 0}, "conv_dim=0"),
        (StarGANGenerator, {"c_dim": 0}, "c_dim=0"),
        (StarGANGenerator, {"in_channels": 0}, "in_channels=0"),
        (StarGANGenerator, {"repeat_num": -1}, "repeat_num=-1"),
        (StarGANDiscriminator, {"repeat_num": 0}, "repeat_num=0"),
        (StarGANDiscriminator, {"c_dim": -2}, "c_dim=-2"),
        (StarGANDiscriminator, {"image_size": 0}, "image_size=0"),
        (StarGANDiscriminator, {"image_size": 32}, "6 halvings .* take at most 5"),
    ],
)
def test_sizes_that_are_errors(network: Any, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**sizes)


def test_largest_depth_that_the_error_names_is_possible() -> None:
    assert StarGANDiscriminator(32, 1, 1, 5).side == 1


def test_inputs_that_are_errors() -> None:
    generator, discriminator = StarGANGenerator(1, 2, 0), StarGANDiscriminator(8, 1, 2, 2)
    with pytest.raises(ValueError, match=r"\(2, 3\) for 2 images; .* c_dim=2"):
        generator(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3))
    for height, width in ((8, 10), (10, 8), (4, 8), (8, 4)):
        with pytest.raises(
            ValueError, match=f"{height}x{width}; both sides must be multiples of 4"
        ):
            generator(torch.zeros(2, 3, height, width), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"16x16; .* built for 8x8 \(--data.image_size\)"):
        discriminator(torch.zeros(2, 3, 16, 16))
