from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.zaq.aciq import (
    aciq_alpha,
    aciq_clip_range,
    aciq_mse,
    allocate_bits,
    average_statistics,
    quantize_weight,
    rectified_statistics,
    restore_weight_moments,
    round_weights,
    tensor_statistics,
)
from lightning_modules.zaq.moments import ChannelMoments


@pytest.mark.parametrize("distribution", ["laplace", "gauss"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_alpha_is_where_the_error_is_smallest(distribution: Any, bits: int) -> None:
    alpha = aciq_alpha(bits, distribution)
    around = torch.tensor([alpha * 0.99, alpha, alpha * 1.01])
    assert aciq_mse(around, bits, distribution).argmin() == 1


@pytest.mark.parametrize("distribution", ["laplace", "gauss"])
def test_error_is_that_of_a_quantizer(distribution: Any) -> None:
    torch.manual_seed(0)
    scale, bits, alpha = 0.7, 4, 2.0
    laplace = torch.distributions.Laplace(0.0, scale).sample((400_000,))
    x = laplace if distribution == "laplace" else scale * torch.randn(400_000)
    step = 2 * alpha / 2**bits
    centres = (x / step).floor() * step + step / 2
    rounded = torch.where(x.abs() < alpha, centres, x.clamp(-alpha, alpha))
    expected = aciq_mse(alpha, bits, distribution, scale).item()
    assert (x - rounded).square().mean().item() == pytest.approx(expected, rel=0.1)


def test_statistics_are_averaged_over_batches() -> None:
    batches = [torch.tensor([0.0, 2.0]), torch.tensor([-4.0, 6.0])]
    found = average_statistics(tensor_statistics(batch) for batch in batches)
    assert [value.item() for value in found] == [-2, 4, 1, 3, 3]
    with pytest.raises(ValueError, match="at least one calibration batch"):
        average_statistics([])


def test_clipping_begins_at_the_minimum_if_that_is_nearer() -> None:
    x = torch.tensor([-0.1] * 50 + [0.0] * 50 + [5.0])
    low, high = aciq_clip_range(x, 4)
    assert low == pytest.approx(-0.1)
    assert high - low == pytest.approx(2 * aciq_alpha(4) * tensor_statistics(x).b.item())
    assert aciq_clip_range(x, 4, "gauss") != (low, high)


def test_range_of_a_constant_tensor_is_empty() -> None:
    assert aciq_clip_range(torch.full((4,), 2.0), 4) == (2, 2)
    assert aciq_clip_range(torch.zeros(4), 4, positive=True) == (0, 0)


def test_statistics_of_rectified_channels() -> None:
    moments = ChannelMoments(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 2.0]))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 2, generator=generator)
    samples = (moments.mean + moments.std * noise).relu()
    found = rectified_statistics(moments)
    assert found.mean.item() == pytest.approx(samples.mean().item(), abs=0.01)
    assert found.std.item() == pytest.approx(samples.std().item(), abs=0.01)
    assert found.maximum == 11
    assert rectified_statistics(moments, cap=6.0).maximum == 6


def test_bits_have_the_mean_that_was_asked_for() -> None:
    torch.manual_seed(0)
    std = torch.rand(64) * 3 + 0.01
    for target in (3, 4):
        bits = allocate_bits(std, target)
        assert bits.mean().item() == pytest.approx(target, abs=0.1)
        assert bits[std.argmax()] > bits[std.argmin()]
        assert torch.equal(bits, bits.round())
    exact = allocate_bits(std, 4, round=False)
    assert not torch.equal(exact, exact.round())


def test_dead_channels_get_no_bits() -> None:
    assert allocate_bits(torch.tensor([1.0, 0.0, 1.0, 1.0]), 3)[1] == 0
    assert allocate_bits(torch.zeros(3), 4).tolist() == [4, 4, 4]


def test_weights_have_their_levels_channel_by_channel() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 50)
    rounded = quantize_weight(weight, torch.tensor([0, 2, 5]))
    assert [row.unique().numel() for row in rounded] == [1, 4, pytest.approx(26, abs=6)]
    assert not rounded[0].any()
    assert (rounded[2] - weight[2]).abs().max() <= (weight[2].max() - weight[2].min()) / 31


def test_moments_come_back() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 2, 2)
    weight[1] = 0.25
    rounded = quantize_weight(weight, 2)
    found = restore_weight_moments(weight, rounded)
    torch.testing.assert_close(found.flatten(1).mean(1), weight.flatten(1).mean(1))
    torch.testing.assert_close(found.flatten(1).std(1), weight.flatten(1).std(1))
    means = restore_weight_moments(weight, rounded, variance=False)
    torch.testing.assert_close(means.flatten(1).mean(1), weight.flatten(1).mean(1))
    assert (means.flatten(1).std(1) - weight.flatten(1).std(1)).abs().max() > 0.01


@pytest.mark.parametrize("allocate", [None, False])
def test_first_and_last_layer_keep_more_bits(allocate: bool | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 20)),
    )
    with torch.no_grad():
        network[2].weight *= torch.rand(32, 1, 1, 1)
    bits = round_weights(network, 3, allocate=allocate, restore=False)
    assert set(bits["0"].tolist()) == set(bits["5"].tolist()) == {8}
    assert (bits["2"].unique().numel() > 1) == (allocate is None)
    assert bits["2"].mean().item() == pytest.approx(3, abs=0.1)
    levels = [row.unique().numel() for row in network[2].weight]
    assert all(count <= 2**width for count, width in zip(levels, bits["2"], strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aciq_alpha(4, "cauchy"), "unknown distribution='cauchy'"),  # type: ignore[arg-type]
        (lambda: aciq_alpha(0), "num_bits=0"),
        (lambda: allocate_bits(torch.ones(3), 9), "target_bits=9"),
        (lambda: allocate_bits(torch.ones(3), 4, max_passes=0), "max_passes=0"),
        (lambda: round_weights(nn.ReLU(), 4), "ReLU has no convolution or linear layer"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
