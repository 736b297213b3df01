import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.zaq.zeroq import (
    allocate_mixed_precision,
    bn_statistics_loss,
    distill_data,
    layer_sensitivity,
    measure_sensitivities,
    network_statistics_loss,
    record_norm_inputs,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)),
    )
    with torch.no_grad():
        for _ in range(30):
            layers(0.5 + 2 * torch.randn(16, 3, 8, 8))
    return layers


def test_norm_inputs_of_one_pass_in_order() -> None:
    layers = network().eval()
    images = torch.randn(2, 3, 8, 8)
    with record_norm_inputs(layers) as found:
        layers(images)
    layers(images)
    assert [norm for norm, _ in found] == [layers[1], layers[4]]
    torch.testing.assert_close(found[0].feat, layers[0](images))
    torch.testing.assert_close(found[1].feat, layers[:4](images))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(4, track_running_stats=False)])
def test_a_network_without_batch_norm_is_refused(norm: nn.Module) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    with pytest.raises(ValueError, match="has no batch norm with running statistics"):
        distill_data(layers, 1, steps=1)


@pytest.mark.parametrize("kind", ["zeroq", "gdfq"])
def test_own_statistics_cost_nothing(kind: Any) -> None:
    feat = torch.randn(1, 3, 6, 6)
    correction = 1 if kind == "zeroq" else 0
    var, mean = torch.var_mean(feat, (0, 2, 3), correction=correction)
    losses = torch.stack(bn_statistics_loss(feat, mean, var, kind))
    torch.testing.assert_close(losses, torch.zeros(2), atol=1e-6, rtol=0)
    assert min(bn_statistics_loss(feat, mean + 1, var + 1, kind)) > 0.1


def test_a_single_position_has_no_deviation() -> None:
    feat = torch.randn(4, 3, requires_grad=True)
    losses = bn_statistics_loss(feat, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(losses[1], torch.tensor(3.0), atol=1e-2, rtol=0)
    (gradient,) = torch.autograd.grad(sum(losses), feat)
    assert torch.isfinite(gradient).all()


def test_layers_are_summed_or_averaged() -> None:
    layers = network().eval()
    with record_norm_inputs(layers) as found:
        layers(torch.randn(2, 3, 8, 8))
    for kind, divisor in (("zeroq", 1), ("gdfq", 2)):
        alone = [network_statistics_loss([one], kind) for one in found]  # type: ignore[arg-type]
        both = network_statistics_loss(found, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(both, sum(alone) / divisor)


def test_unknown_statistics() -> None:
    with pytest.raises(ValueError, match="unknown kind='mean'"):
        bn_statistics_loss(torch.zeros(1, 2, 3), torch.zeros(2), torch.zeros(2), "mean")  # type: ignore[arg-type]


def statistics(layers: nn.Module, images: Tensor) -> float:
    with record_norm_inputs(layers.eval()) as found:
        layers(images)
    return network_statistics_loss(found).item()


def test_distilled_images_have_the_statistics_and_leave_the_network_alone() -> None:
    layers = network().train()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    images = distill_data(layers, 3, (3, 8, 8), steps=60, lr=0.1, batch_size=2)
    assert layers.training
    assert all(p.requires_grad and p.grad is None for p in layers.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    noise = distill_data(layers, 3, (3, 8, 8), steps=1, lr=1e-9)
    assert statistics(layers, images) < 0.5 * statistics(layers, noise)


def test_image_depends_on_seed_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = network()

    def images(**options: Any) -> Tensor:
        return distill_data(layers, 2, (3, 8, 8), steps=1, lr=1e-9, **options)

    first = images(batch_size=1)
    torch.testing.assert_close(first, images(batch_size=2), atol=1e-6, rtol=0)
    assert not torch.allclose(first[0], first[1])
    with torch.inference_mode():
        torch.testing.assert_close(first, images(batch_size=1))
    assert images(init="released").abs().max() <= 0.0236
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.allclose(first, images(batch_size=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"count": 1, "steps": 0}, "steps=0"),
        ({"count": 1, "init": "zeros"}, "unknown init='zeros'"),
    ],
)
def test_bad_distillation(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_data(network(), **options)


def test_distillation_stops_at_nan() -> None:
    layers = network()
    layers[1].running_var.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="is nan at step 0"):
        distill_data(layers, 1, (3, 8, 8), steps=2)


# ------------------------------------------------------------------ mixed precision
def test_sensitivity_is_zero_for_equal_predictions_and_survives_large_logits() -> None:
    logits = torch.randn(5, 4)
    assert layer_sensitivity(logits, logits + 3).abs() < 1e-6
    assert layer_sensitivity(logits, logits.roll(1, 1)) > 0
    assert torch.isfinite(layer_sensitivity(1e4 * logits, -1e4 * logits))


class Widths:
    """A network that loses ``4**-bits`` times a factor of the layer, and counts its forwards."""

    def __init__(self, layers: nn.Sequential, factors: dict[str, float]) -> None:
        self.float = {name: layers.get_submodule(name).weight.detach().clone() for name in factors}
        self.layers, self.factors = layers, factors
        self.bits: dict[str, int | None] = dict.fromkeys(factors, 2)

    def set_bits(self, name: str, bits: int | None) -> None:
        self.bits[name] = bits
        assert sum(width is not None for width in self.bits.values()) <= len(self.factors)
        lost = 0.0 if bits is None else self.factors[name] * 4.0**-bits
        self.layers.get_submodule(name).weight.data = self.float[name] * (1 - lost)


def test_one_layer_at_a_time_is_quantized() -> None:
    layers = network().eval()
    copy = network()
    widths = Widths(copy, {"0": 1.0, "3": 5.0, "8": 0.0})
    images = torch.randn(4, 3, 8, 8)
    found = measure_sensitivities(layers, copy, list("038"), [2, 4, 8], widths.set_bits, images)
    assert found.shape == (3, 3)
    assert (found[1, 0] > found[1, 1]).item()
    assert (found[1, 0] > found[0, 0]).item()
    assert not found[2].any()
    assert set(widths.bits.values()) == {None}
    torch.testing.assert_close(copy.eval()(images), layers(images))


def test_nothing_to_measure() -> None:
    layers = network()
    with pytest.raises(ValueError, match="at least one layer and one width"):
        measure_sensitivities(layers, layers, ["0"], [], print, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits, sizes = [2, 3, 4, 8], [7, 30, 11, 4, 19]
    omega = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    for budget in (142, 250, 320, 10_000):
        choices = [
            (sum(omega[i, k].item() for i, k in enumerate(choice)), choice)
            for choice in itertools.product(range(4), repeat=5)
            if sum(sizes[i] * bits[k] for i, k in enumerate(choice)) <= budget
        ]
        total, choice = min(choices)
        found = allocate_mixed_precision(omega, sizes, bits, budget)
        assert found.bits == [bits[k] for k in choice]
        assert found.total == pytest.approx(total)


def test_equal_optima_take_the_least_memory() -> None:
    found = allocate_mixed_precision([[0.5, 0.5], [1.0, 0.0]], [10, 10], [2, 8], 1000)
    assert found.bits == [2, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0, 0.5]], [10], [2, 4], 19), "a budget of 19 bits is below the 20"),
        (([[1.0, 0.5]], [10, 3], [2, 4], 100), r"shape \(1, 2\) for 2 layers"),
        (([[1.0, float("nan")]], [10], [2, 4], 100), "sensitivity of layer 0 is not finite"),
    ],
)
def test_bad_allocation(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate_mixed_precision(*arguments)
