import math

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from lightning_modules.metrics.frechet import frechet_distance, frechet_distance_of_features
from lightning_modules.metrics.inception import inception_score_from_probs


def gaussian(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(n, d, generator=generator, dtype=torch.float64)
    samples = samples @ torch.randn(d, d, generator=generator, dtype=torch.float64) + seed
    return samples.mean(0), samples.T.cov()


def test_distance_is_that_of_the_matrix_root() -> None:
    (mu1, sigma1), (mu2, sigma2) = gaussian(50, 6, 1), gaussian(50, 6, 2)
    root = torch.from_numpy(sqrtm((sigma1 @ sigma2).numpy()).real)
    gap = (mu1 - mu2).square().sum()
    expected = gap + (sigma1 + sigma2 - 2 * root).trace()
    found = frechet_distance(mu1, sigma1, mu2, sigma2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert found.item() == pytest.approx(frechet_distance(mu2, sigma2, mu1, sigma1).item())


def test_distance_of_singular_covariances() -> None:
    mu, sigma = gaussian(4, 12, 1)
    assert frechet_distance(mu, sigma, mu, sigma).item() == pytest.approx(0, abs=1e-4)
    zero = torch.zeros(12, 12, dtype=torch.float64)
    distance = frechet_distance(mu, zero, mu + 1, sigma)
    assert distance.item() == pytest.approx(12 + sigma.trace().item(), rel=1e-5)


def test_distance_errors() -> None:
    mu, sigma = gaussian(20, 3, 1)
    for wrong in ((mu[:2], sigma, mu, sigma), (mu, sigma, mu, sigma[:2])):
        with pytest.raises(ValueError, match="of one D"):
            frechet_distance(*wrong)


def test_score_of_certain_and_of_constant_predictions() -> None:
    certain = torch.eye(4).repeat(5, 1)
    mean, std = inception_score_from_probs(certain, 5)
    assert (mean.item(), std.item()) == (pytest.approx(4), pytest.approx(0))
    constant = torch.full((7, 3), 1 / 3)
    assert inception_score_from_probs(constant, 2)[0].item() == pytest.approx(1)


def test_splits_are_contiguous_and_the_remainder_is_dropped() -> None:
    probs = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0.5, 0.5]])
    mean, std = inception_score_from_probs(probs, 2)
    assert mean.item() == pytest.approx((1 + 2) / 2)
    assert std.item() == pytest.approx(0.5)
    assert math.isfinite(inception_score_from_probs(probs, 5)[0])


@pytest.mark.parametrize("splits", [0, 6])
def test_score_errors(splits: int) -> None:
    with pytest.raises(ValueError, match=rf"splits={splits} must be in 1\.\.5"):
        inception_score_from_probs(torch.ones(5, 2) / 2, splits)


@pytest.mark.parametrize(("real", "fake"), [(50, 40), (7, 5), (4, 30)])
def test_distance_of_features_is_that_of_their_moments(real: int, fake: int) -> None:
    """Also with fewer samples than dimensions, from inner products; there roots of rounding errors blur the moments."""
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(n, 12, generator=generator) * (1 + n) + n for n in (real, fake)]
    moments = [(x.double().mean(0), x.double().T.cov()) for x in sets]
    expected = frechet_distance(*moments[0], *moments[1])
    assert frechet_distance_of_features(*sets) == pytest.approx(float(expected), rel=1e-5)
