import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.opgan.losses import (
    AttentionNorm,
    affine_warp,
    attention_std,
    content_attention_map,
    content_consistency_loss,
    content_negative_loss,
    domain_accuracy,
    domain_classification_loss,
    opgan_generator_objective,
)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ content maps
def test_map_by_hand() -> None:
    c = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]]])
    weight, bias = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1), torch.tensor([0.5])
    found = content_attention_map(c, weight, bias, (2, 4))
    # The map is (2.5, 0.5); half-pixel centres put the four columns at -1/4, 1/4, 3/4 and 5/4.
    torch.testing.assert_close(found[0, 0], torch.tensor([2.5, 2.0, 1.0, 0.5]).expand(2, 4))
    without = content_attention_map(c, weight, None, (2, 4))
    torch.testing.assert_close(without, found - 0.5)


def test_standardised_maps() -> None:
    c, weight = uniform(3, 4, 5, 6), uniform(1, 4, 1, 1, seed=1)
    bias = torch.zeros(1)
    found = content_attention_map(c, weight, bias, (5, 6), "instance")
    torch.testing.assert_close(found.mean((2, 3)), torch.zeros(3, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var((2, 3), correction=0), torch.ones(3, 1), atol=1e-3, rtol=0)
    again = content_attention_map(c, 100 * weight, bias + 7, (5, 6), "instance")
    torch.testing.assert_close(again, found, atol=1e-3, rtol=0)


def test_a_flat_patch_stays_finite_when_standardised() -> None:
    c = torch.ones(1, 4, 3, 3, requires_grad=True)
    found = content_attention_map(c, torch.ones(1, 4, 1, 1), torch.ones(1), (9, 9), "instance")
    assert torch.equal(found, torch.zeros(1, 1, 9, 9))
    found.square().sum().backward()
    assert c.grad is not None
    assert c.grad.isfinite().all()


def test_sigmoid_maps_lie_between_0_and_1() -> None:
    c, weight, bias = 10 * uniform(2, 4, 3, 3), uniform(1, 4, 1, 1, seed=1), torch.zeros(1)
    found = content_attention_map(c, weight, bias, (3, 3), "sigmoid")
    torch.testing.assert_close(found, content_attention_map(c, weight, bias, (3, 3)).sigmoid())


def test_unknown_map() -> None:
    norm: Any = "softmax"
    with pytest.raises(ValueError, match="attention_norm='softmax'"):
        content_attention_map(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), None, (2, 2), norm)


@pytest.mark.parametrize("norm", ["none", "instance", "sigmoid"])
def test_maps_have_single_precision_under_autocast(norm: AttentionNorm) -> None:
    c, weight, bias = uniform(2, 4, 3, 3), uniform(1, 4, 1, 1, seed=1), uniform(1, seed=2)
    expected = content_attention_map(c, weight, bias, (7, 7), norm)
    with torch.autocast("cpu", torch.bfloat16):
        found = content_attention_map(c, weight, bias, (7, 7), norm)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    half = c.bfloat16()
    torch.testing.assert_close(
        content_attention_map(half, weight, bias, (7, 7), norm),
        content_attention_map(half.float(), weight, bias, (7, 7), norm),
    )


# ------------------------------------------------------------------ losses
def test_consistency_by_hand() -> None:
    p_a = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    p_b = torch.zeros(3, 1, 2, 2, requires_grad=True)
    loss = content_consistency_loss(p_a, p_b, torch.tensor([True, False, True]))
    loss.backward()
    assert loss.item() == (1 + 25) / 2
    assert p_b.grad is not None
    # d/dp of (p - a)^2 / 4 pixels / 2 pairs
    expected = torch.tensor([-0.25, 0.0, -1.25]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    torch.testing.assert_close(p_b.grad, expected)


def test_no_content_pair_costs_nothing_whatever_the_others_are() -> None:
    p_b = torch.full((2, 1, 3, 3), math.inf, requires_grad=True)
    loss = content_consistency_loss(torch.zeros(2, 1, 3, 3), p_b, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert p_b.grad is not None
    assert torch.equal(p_b.grad, torch.zeros(2, 1, 3, 3))


def test_negative_by_hand() -> None:
    p_a = torch.tensor([0.5, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    p_b = torch.zeros(2, 1, 2, 2, requires_grad=True)
    loss = content_negative_loss(p_a, p_b)
    loss.backward()
    assert loss.item() == 0.75 / 2
    assert p_b.grad is not None
    # The pair that is far enough apart is left alone, the other is pushed away from 0.5.
    expected = torch.tensor([0.125, 0.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    torch.testing.assert_close(p_b.grad, expected)
    assert content_negative_loss(p_a, p_b, 10.0).item() == (9.75 + 1) / 2


def test_negative_without_pairs() -> None:
    p_b = torch.zeros(0, 1, 2, 2, requires_grad=True)
    loss = content_negative_loss(torch.zeros(0, 1, 2, 2), p_b)
    loss.backward()
    assert loss.item() == 0


def test_small_differences_survive_half_precision() -> None:
    p_a = torch.full((1, 1, 4, 4), 1e-4, dtype=torch.float16)
    p_b, flags = torch.zeros_like(p_a), torch.ones(1, dtype=torch.bool)
    with torch.autocast("cpu", torch.float16):
        found = content_consistency_loss(p_a, p_b, flags)
        margin = content_negative_loss(p_a, p_b, 1e-8)
    assert found.item() == pytest.approx(1e-8, rel=1e-2)
    assert margin.item() < 1e-9


def test_maps_of_two_sizes() -> None:
    p_a, p_b = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 1)
    with pytest.raises(ValueError, match="differ in shape"):
        content_consistency_loss(p_a, p_b, torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="differ in shape"):
        content_negative_loss(p_a, p_b)


def test_classification_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    loss = domain_classification_loss(logits, labels)
    expected = (math.log(3) + math.log(math.exp(2) + 2) - 2) / 2
    assert loss.item() == pytest.approx(expected)
    assert domain_accuracy(logits, labels).item() == 0.5
    half = domain_classification_loss(logits.bfloat16(), labels)
    torch.testing.assert_close(half, loss.float())


def test_objective_weighs_cycle_and_self_supervision() -> None:
    names = ("adv_ab", "adv_ba", "cyc", "cc_ab", "dc_ab", "cc_ba", "dc_ba")
    terms: dict[str, Any] = {name: torch.tensor(10.0**-i) for i, name in enumerate(names)}
    found = opgan_generator_objective(**terms, alpha=2, beta=3)
    assert found.item() == pytest.approx(1 + 0.1 + 2 * 0.01 + 3 * 0.001111)
    assert opgan_generator_objective(**terms).item() == pytest.approx(1.1 + 0.1 + 0.001111)


# ------------------------------------------------------------------ monitors
def test_std_inside_a_patch_ignores_differences_between_patches() -> None:
    maps = torch.tensor([[-1.0, 1.0], [97.0, 103.0]]).view(2, 1, 1, 2).requires_grad_()
    found = attention_std(maps)
    assert found.item() == 2
    assert not found.requires_grad


def test_warp_turns_and_enlarges() -> None:
    rows, columns = torch.meshgrid(torch.arange(21.0), torch.arange(31.0), indexing="ij")
    spot = torch.exp(-((rows - 10) ** 2 + (columns - 20) ** 2) / 4)[None, None]
    for degrees, scale in ((0.0, 1.0), (0.0, 1.4), (30.0, 1.0), (20.0, 1.2)):
        warped = affine_warp(spot, degrees, scale)[0, 0]
        at = torch.stack((rows, columns)).mul(warped).sum((1, 2)) / warped.sum()
        angle = math.radians(degrees)
        # The spot is 5 pixels to the right of the centre (10, 15).
        expected = (10 - 5 * scale * math.sin(angle), 15 + 5 * scale * math.cos(angle))
        torch.testing.assert_close(at, torch.tensor(expected), atol=0.1, rtol=0)


def test_default_warp_is_the_same_for_all_images() -> None:
    images = uniform(3, 2, 12, 12) * 2 - 1
    warped = affine_warp(images)
    assert warped.shape == images.shape
    assert warped.abs().max() <= 1
    torch.testing.assert_close(warped[1:2], affine_warp(images[1:2]))
    assert F.mse_loss(warped, images) > 0.05
