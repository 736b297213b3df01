import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from lightning_modules.osrci.openmax import (
    OpenMax,
    WeibullTail,
    openmax_recalibrate,
    openmax_reference_score,
)


def blobs(per_class: int = 40, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(target), classes, generator=generator, dtype=torch.float64)
    return 3.0 * torch.eye(classes, dtype=torch.float64)[target] + noise, target


@pytest.mark.parametrize("size", [2, 5, 20, 57])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 50.0])
def test_fit_agrees_with_scipy(size: int, spread: float) -> None:
    distances = spread * torch.rand(60, generator=torch.Generator().manual_seed(size)).double()
    tail = WeibullTail.fit(distances, size)
    largest = np.sort(distances.numpy())[-size:]
    translated = largest + 1 - largest[0]
    shape, _, scale = scipy.stats.weibull_min.fit(
        translated, floc=0, method="MLE", scale=translated.mean()
    )
    ours = scipy.stats.weibull_min.nnlf((tail.shape, 0, tail.scale), translated)
    theirs = scipy.stats.weibull_min.nnlf((shape, 0, scale), translated)
    assert ours <= theirs + 1e-6 * abs(theirs)  # at least as likely as what scipy finds
    for factor in (0.999, 1.001):
        for other in ((tail.shape * factor, tail.scale), (tail.shape, tail.scale * factor)):
            assert ours < scipy.stats.weibull_min.nnlf((other[0], 0, other[1]), translated)
    assert tail.small_score == largest[0]
    assert tail.size == size


def test_tail_takes_what_there_is_and_the_largest_only() -> None:
    assert WeibullTail.fit(torch.tensor([1.0, 2.0, 3.0]), 20).size == 3
    assert WeibullTail.fit(torch.tensor([0.1, 0.2, 1.0, 2.0, 3.0]), 3) == WeibullTail.fit(
        torch.tensor([3.0, 1.0, 2.0]), 3
    )


def test_cdf_by_formula() -> None:
    tail = WeibullTail(shape=2.5, scale=1.7, small_score=4.0, size=20)
    x = torch.tensor([0.0, 2.99, 3.5, 4.0, 6.0, 100.0], dtype=torch.float64)
    slow = [1 - math.exp(-((max(v + 1 - 4.0, 0.0) / 1.7) ** 2.5)) for v in x.tolist()]
    assert tail.cdf(x).tolist() == pytest.approx(slow)
    assert tail.cdf(x)[:2].tolist() == [0, 0]


@pytest.mark.parametrize("distances", [[], [1.0], [2.0, 2.0, 2.0], [1.0, math.nan]])
def test_tails_without_a_maximum_are_refused(distances: list[float]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        WeibullTail.fit(torch.tensor(distances))


def test_openmax_uses_correct_samples_only() -> None:
    logits, target = blobs()
    openmax = OpenMax(3, tail_size=10).double().fit(logits, target)
    right = logits.argmax(1) == target
    assert 0 < right.sum() < len(target)
    assert int(openmax.correct) == int(right.sum())
    for k in range(3):
        rows = logits[right & (target == k)]
        center = rows.mean(0)
        tail = WeibullTail.fit((rows - center).norm(dim=1), 10)
        torch.testing.assert_close(openmax.mavs[k], center)
        test = torch.randn(4, 3, dtype=torch.float64)
        torch.testing.assert_close(openmax.cdf(test)[:, k], tail.cdf((test - center).norm(dim=1)))


@pytest.mark.parametrize("variant", ["reference", "bendale"])
def test_outliers_score_higher(variant: str) -> None:
    logits, target = blobs(200)
    openmax = OpenMax(3).fit(logits, target)
    known = openmax.score(5.0 * torch.eye(3), variant=variant)  # type: ignore[arg-type]
    far = openmax.score(torch.full((1, 3), 0.1), variant=variant)  # type: ignore[arg-type]
    assert (known < far).all()


def test_bendale_score_is_the_unknown_probability_and_alpha_is_limited_to_k() -> None:
    logits, target = blobs()
    openmax = OpenMax(3).double().fit(logits, target)
    cdf = openmax.cdf(logits)
    probabilities = openmax_recalibrate(logits, cdf, alpha=3)
    torch.testing.assert_close(openmax.score(logits, "bendale", alpha=10), probabilities[:, -1])
    torch.testing.assert_close(openmax.score(logits), openmax_reference_score(logits, cdf))
    with pytest.raises(ValueError, match="variant"):
        openmax.score(logits, "both")  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [1, 2, 4, 9])
def test_recalibration_by_loops(alpha: int) -> None:
    logits, _ = blobs(2, 4)
    cdf = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)).double()
    ours = openmax_recalibrate(logits, cdf, alpha)
    steps = min(alpha, 4)
    for row, value, result in zip(logits.tolist(), cdf.tolist(), ours.tolist(), strict=True):
        new, unknown = list(row), 0.0
        for rank, k in enumerate(sorted(range(4), key=lambda k: -row[k])[:steps]):
            weight = 1 - value[k] * (steps - rank) / steps
            new[k] = row[k] * weight
            unknown += row[k] * (1 - weight)
        total = sum(math.exp(v) for v in [*new, unknown])
        assert result == pytest.approx([math.exp(v) / total for v in [*new, unknown]])
    with pytest.raises(ValueError, match="alpha"):
        openmax_recalibrate(logits, cdf, 0)


def test_reference_score_is_stable() -> None:
    logits = torch.tensor([[900.0, 0.0], [-900.0, -800.0]])
    assert openmax_reference_score(logits, torch.zeros(2, 2)).tolist() == [-900.0, 800.0]


def test_small_distances_between_large_logits_do_not_cancel() -> None:
    logits, target = blobs()
    openmax = OpenMax(3).fit(logits, target)
    openmax.mavs += 3000.0
    near = openmax.mavs + 0.5
    exact = (near.double() - openmax.mavs.double()).norm(dim=1)
    cdf = openmax.cdf(near).diagonal()
    shape, scale, small = openmax.shape, openmax.scale, openmax.small_score
    expected = 1 - torch.exp(-(((exact + 1 - small) / scale).clamp_min(0) ** shape))
    assert (expected > 0.001).any()
    torch.testing.assert_close(cdf.double(), expected, rtol=1e-3, atol=1e-5)


def test_classes_without_a_tail_get_cdf_zero_and_a_warning() -> None:
    logits = torch.tensor([[2.0, 0, 0], [1.9, 0, 0], [1.5, 0, 0], [0, 3.0, 0], [9.0, 0, 0]])
    target = torch.tensor([0, 0, 0, 1, 2])  # one correct sample of class 1, none of class 2
    with pytest.warns(UserWarning, match="class [12]") as caught:
        openmax = OpenMax(3).fit(logits, target)
    assert len(caught) == 2
    cdf = openmax.cdf(torch.tensor([[50.0, 50.0, 50.0]]))
    assert cdf[0, 0] > 0.99
    assert cdf[0, 1:].tolist() == [0, 0]
    assert openmax.tail.tolist() == [3, 1, 0]
    assert torch.isfinite(openmax.score(logits)).all()


def test_fit_is_in_the_state_dict_and_can_be_repeated() -> None:
    logits, target = blobs()
    first = OpenMax(3).fit(logits, target)
    second = OpenMax(3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.score(logits), second.score(logits))
    other = blobs(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(second.fit(*other).score(logits), OpenMax(3).fit(*other).score(logits))
    assert not torch.equal(first.score(logits), second.score(logits))


def test_misuse() -> None:
    openmax = OpenMax(3)
    with pytest.raises(RuntimeError, match="fit"):
        openmax.score(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="3 classes"):
        openmax.cdf(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="target"):
        openmax.fit(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="num_classes"):
        OpenMax(0)
    with pytest.raises(ValueError, match="tail_size"):
        OpenMax(3, tail_size=1)
