from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.zaq.generators import (
    CategoricalConditionalBatchNorm2d,
    GDFQGenerator,
    ZAQGenerator,
)


@pytest.mark.parametrize(
    ("size", "blocks", "start"), [(32, 2, 8), (64, 2, 16), (224, 5, 7), (8, 3, 1)]
)
def test_images_have_their_size_from_any_start(size: int, blocks: int, start: int) -> None:
    network = ZAQGenerator(4, 2, 3, size, blocks).eval()
    assert network.project.out_features == 4 * start**2
    assert network(torch.zeros(2, 4)).shape == (2, 3, size, size)


def test_width_falls_at_full_resolution_only() -> None:
    network = ZAQGenerator(4, 2, 3, 224, 5)
    widths = [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [4, 4, 4, 4, 2, 3]


def test_images_are_standardised_in_training() -> None:
    torch.manual_seed(0)
    images = ZAQGenerator(8, 4, 3, 8)(torch.randn(16, 8))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=2e-2, rtol=0)


@pytest.mark.parametrize("conditioning", ["embed-multiply", "conditional-bn"])
def test_images_depend_on_the_class(conditioning: Any) -> None:
    torch.manual_seed(0)
    network = GDFQGenerator(3, 4, 8, conditioning, ngf=2).eval()
    for module in network.modules():
        if isinstance(module, CategoricalConditionalBatchNorm2d):
            nn.init.normal_(module.weight)
    z = torch.randn(1, 4).expand(2, 4)
    one, same = network(z, torch.tensor([1, 1]))
    other = network(z, torch.tensor([2, 2]))[0]
    torch.testing.assert_close(one, same)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("conditioning", ["embed-multiply", "conditional-bn"])
def test_doublings_have_the_large_eps_of_the_released_code(conditioning: Any) -> None:
    network = GDFQGenerator(3, 4, 8, conditioning, ngf=2)
    norms = [module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == [1e-5, 0.8, 0.8, 1e-5]


def test_conditional_norm_is_plain_at_first() -> None:
    x = torch.randn(4, 3, 5, 5)
    found = CategoricalConditionalBatchNorm2d(2, 3)(x, torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(found, nn.BatchNorm2d(3)(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ZAQGenerator(img_size=30), "img_size must be a multiple of 4"),
        (lambda: ZAQGenerator(img_size=0), "cannot end at 0 pixels"),
        (lambda: ZAQGenerator(latent_dim=0), "latent_dim=0"),
        (lambda: ZAQGenerator(up_blocks=0), "up_blocks=0"),
        (lambda: GDFQGenerator(0), "num_classes=0"),
        (lambda: GDFQGenerator(3, conditioning="concat"), "unknown conditioning='concat'"),  # type: ignore[arg-type]
    ],
)
def test_bad_sizes(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
