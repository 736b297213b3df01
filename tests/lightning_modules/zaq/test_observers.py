from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from lightning_modules.zaq.aciq import aciq_alpha
from lightning_modules.zaq.observers import ActivationQuantizer, Observer
from tests.processes import from_ranks, rank_file, run_ranks

OBSERVERS = get_args(Observer)


def batches(seed: int = 0, count: int = 3, size: int = 400) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_no_range_moves_in_evaluation_or_when_frozen(observer: Any) -> None:
    quantizer = ActivationQuantizer(4, observer)
    quantizer(batches()[0])
    before = quantizer.lo.item(), quantizer.hi.item(), quantizer.steps.item()
    wild = 100 * batches()[1]
    quantizer.eval()
    clamped = quantizer(wild)
    quantizer.train()
    quantizer.freeze()
    assert torch.equal(quantizer(wild), clamped)
    assert (quantizer.lo.item(), quantizer.hi.item(), quantizer.steps.item()) == before
    quantizer.observe()
    quantizer(wild)
    assert quantizer.hi > before[1]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_resuming_observes_as_if_uninterrupted(observer: Any) -> None:
    first, second, third = batches()
    straight, before, after = (ActivationQuantizer(4, observer) for _ in range(3))
    for quantizer in (straight, before):
        quantizer(first)
        quantizer(second)
    after.load_state_dict(before.state_dict())
    assert torch.equal(after(third), straight(third))
    assert torch.equal(after.hi, straight.hi)
    straight.freeze()
    after.load_state_dict(straight.state_dict())
    assert not after.observing


def test_zero_is_always_on_the_grid() -> None:
    quantizer = ActivationQuantizer(3, "ema")
    quantizer(torch.tensor([1.0, 2.0]))
    assert quantizer.lo > 0.9
    assert quantizer.eval()(torch.zeros(2)).eq(0).all()


def test_a_dead_activation_stays_zero() -> None:
    quantizer = ActivationQuantizer(4)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


def test_percentile_leaves_outliers_out() -> None:
    x = torch.arange(1000.0) - 200
    x[0], x[-1] = -1e6, 1e6
    quantizer = ActivationQuantizer(8, "percentile", percentile=99.9)
    quantizer(x)
    assert (quantizer.lo, quantizer.hi) == (-199, 798)
    quantizer(torch.zeros(10))
    assert (quantizer.lo, quantizer.hi) == (-99.5, 399)


@pytest.mark.parametrize("observer", ["mse", "aciq", "percentile"])
def test_clipping_lowers_the_error_of_few_bits(observer: Any) -> None:
    x = torch.distributions.Laplace(0.0, 1.0).sample((20000,))
    errors = {}
    for name in ("minmax", observer):
        quantizer = ActivationQuantizer(3, name, percentile=99)
        errors[name] = (quantizer(x) - x).square().mean()
    assert errors[observer] < 0.6 * errors["minmax"]


def test_the_best_fraction_of_the_extremes() -> None:
    (x,) = batches(count=1)
    quantizer = ActivationQuantizer(2, "mse")
    error = (quantizer(x) - x).square().mean()
    for fraction in torch.linspace(0.1, 1, 46):
        other = ActivationQuantizer(2)
        other.set_range(x.min() * fraction, x.max() * fraction)
        assert error <= (other(x) - x).square().mean() * (1 + 1e-5)


@pytest.mark.parametrize("distribution", ["laplace", "gauss"])
def test_aciq_clips_where_its_distribution_says(distribution: Any) -> None:
    (x,) = batches(count=1, size=5000)
    quantizer = ActivationQuantizer(3, "aciq", distribution=distribution)
    quantizer(x)
    center = x.mean()
    spread = (x - center).abs().mean() if distribution == "laplace" else x.std(correction=0)
    alpha = aciq_alpha(3, distribution) * spread
    lo = torch.maximum(x.min(), center - alpha)
    torch.testing.assert_close(quantizer.lo, lo)
    torch.testing.assert_close(quantizer.hi, lo + 2 * alpha)
    one_sided = ActivationQuantizer(3, "aciq", distribution=distribution)
    one_sided(x.abs())
    assert one_sided.lo == 0


def test_a_given_range_is_kept() -> None:
    quantizer = ActivationQuantizer(2)
    quantizer.set_range(0, 3)
    assert torch.equal(quantizer(torch.tensor([1.2, 9.0])), torch.tensor([1.0, 3.0]))
    with pytest.raises(ValueError, match=r"\[1.0, 0.0\] is no range"):
        quantizer.set_range(1, 0)
    with pytest.raises(ValueError, match="is no range"):
        quantizer.set_range(0, float("nan"))


def test_half_precision_becomes_float32() -> None:
    assert ActivationQuantizer(8)(torch.randn(5).half()).dtype == torch.float32


def test_without_a_range_nothing_is_rounded_to_zero() -> None:
    quantizer = ActivationQuantizer(4).eval()
    quantizer.name = "layer1_relu"
    with pytest.raises(RuntimeError, match=r"layer1_relu has no range yet: .*calibrate"):
        quantizer(torch.randn(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9 cannot be quantized to"),
        ({"observer": "max"}, "unknown observer='max'; choose one of minmax, ema"),
        ({"distribution": "cauchy"}, "unknown distribution='cauchy'"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"percentile": 50}, r"percentile=50 must be in \(50, 100\]"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationQuantizer(**{"bits": 4, **options})


def observe_on_a_rank(folder: Path) -> None:
    rank = dist.get_rank()
    ranges = {}
    for observer in OBSERVERS:
        quantizer = ActivationQuantizer(3, observer, percentile=90)
        for batch in batches():
            quantizer(batch[rank::2])
        ranges[observer] = torch.stack([quantizer.lo, quantizer.hi])
    torch.save(ranges, rank_file(folder))


def test_two_processes_observe_the_global_batch(tmp_path: Path) -> None:
    run_ranks(observe_on_a_rank, tmp_path)
    ranks = from_ranks(tmp_path)
    for observer in OBSERVERS:
        alone = ActivationQuantizer(3, observer, percentile=90)
        for batch in batches():
            alone(batch)
        assert torch.equal(ranks[0][observer], ranks[1][observer]), observer
        tolerance = 0.1 if observer == "percentile" else 1e-5
        expected = torch.stack([alone.lo, alone.hi])
        torch.testing.assert_close(ranks[0][observer], expected, rtol=tolerance, atol=tolerance)
