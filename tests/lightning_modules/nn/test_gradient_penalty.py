from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.nn.gradient_penalty import gradient_penalty


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("reduction", "slope"), [("sum", 4.0), ("mean", 1.0)])
def test_slope_of_the_sum_or_of_the_mean_of_the_patches(reduction: Any, slope: float) -> None:
    # Four patches that all have slope 1 along the one pixel of the image.
    real, fake = rand(3, 1, 1, 1), rand(3, 1, 1, 1, seed=1)
    value = gradient_penalty(lambda x: x.expand(-1, 1, 2, 2), real, fake, patch_reduction=reduction)
    assert value.item() == pytest.approx((slope - 1) ** 2)


def test_the_share_is_that_of_the_real_image_and_tuples_begin_with_the_scores() -> None:
    real, fake, alpha = torch.full((2, 1, 1, 2), 2.0), torch.zeros(2, 1, 1, 2), [1.0, 0.25]
    value = gradient_penalty(
        lambda x: (x.square().sum((1, 2, 3)) / 2, x * 100), real, fake, torch.tensor(alpha)
    )
    norms = [8**0.5 * share for share in alpha]
    assert value.item() == pytest.approx(sum((norm - 1) ** 2 for norm in norms) / 2)


def test_norm_per_sample_or_per_position() -> None:
    weight = torch.tensor([[[3.0, 0.0]], [[4.0, 2.0]]])  # [C=2, H=1, W=2]: columns of norms 5 and 2
    images = torch.zeros(1, 2, 1, 2)

    def value(norm: Any) -> float:
        return gradient_penalty(
            lambda x: (x * weight).sum((1, 2, 3)), images, images, norm=norm
        ).item()

    assert value("sample") == pytest.approx((29**0.5 - 1) ** 2)
    assert value("channel") == pytest.approx(((5 - 1) ** 2 + (2 - 1) ** 2) / 2)


def test_a_slope_of_zero_has_a_finite_gradient() -> None:
    weight = torch.zeros((), requires_grad=True)
    images = torch.ones(2, 1, 2, 2)
    value = gradient_penalty(lambda x: weight * x, images, images)
    value.backward()
    assert value.item() == 1
    assert weight.grad is not None
    assert weight.grad.item() == 0


def test_images_get_no_gradient() -> None:
    images = torch.ones(2, 1, 2, 2, requires_grad=True)
    weight = torch.tensor(3.0, requires_grad=True)
    gradient_penalty(lambda x: weight * x, images, images * 2).backward()
    assert images.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fake": torch.ones(3, 1, 2, 2)}, "differ in shape"),
        ({"patch_reduction": "max"}, "patch_reduction"),
        ({"norm": "batch"}, "norm"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    images = torch.ones(2, 1, 2, 2)
    with pytest.raises(ValueError, match=message):
        gradient_penalty(lambda x: x, **{"real": images, "fake": images, **options})
