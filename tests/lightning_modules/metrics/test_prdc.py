"""Precision, recall, density and coverage: against brute force, their expectations, and over processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from lightning_modules.metrics.prdc import (
    NAMES,
    PRDC,
    PrecisionRecallDensityCoverage,
    authenticity,
    choose_nearest_k,
    expected_coverage,
    expected_density,
    improved_precision_recall,
    knn_radii,
    prdc,
    prdc_sweep,
    probabilistic_precision_recall,
    realism_score,
)
from tests.lightning_modules.metrics.test_distances import DATA, brute_force, clouds, generator
from tests.processes import from_ranks, rank_file, run_ranks


def by_definition(real: Tensor, fake: Tensor, k: int, inclusive: bool = False) -> dict[str, float]:
    """The four metrics from whole float64 matrices."""

    def radii(points: Tensor) -> Any:
        matrix = brute_force(points, points)
        np.fill_diagonal(matrix, np.inf)
        return np.sort(matrix, 1)[:, k - 1]

    across = brute_force(real, fake)
    below = np.less_equal if inclusive else np.less
    in_real = below(across, radii(real)[:, None])
    in_fake = below(across, radii(fake)[None])
    return {
        "precision": in_real.any(0).mean(),
        "recall": in_fake.any(1).mean(),
        "density": in_real.sum() / (k * len(fake)),
        "coverage": in_real.any(1).mean(),
    }


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize(("n", "m"), [(40, 40), (50, 23), (23, 50)])
@pytest.mark.parametrize("data", DATA)
def test_equal_to_the_definition(
    data: Callable[..., tuple[Tensor, Tensor]], n: int, m: int, inclusive: bool
) -> None:
    for seed, dim in ((1, 2), (2, 17)):
        real, fake = data(n, m, dim, seed)
        for k in (1, 3, min(n, m) - 1):
            found = prdc(real, fake, k, inclusive=inclusive, block_size=16)
            expected = by_definition(real, fake, k, inclusive)
            assert {name: float(found[name]) for name in NAMES} == pytest.approx(
                expected, rel=1e-15, abs=0
            )


def test_the_sweep_is_each_k_alone() -> None:
    real, fake = clouds(80, 60, 6, 1)
    ks = [5, 1, 20]
    swept = prdc_sweep(real, fake, ks, standard_errors=True)
    for position, k in enumerate(ks):
        alone = prdc(real, fake, k, standard_errors=True)
        assert {name: value[position] for name, value in swept.items()} == alone


def test_fewer_metrics_are_the_same_metrics() -> None:
    real, fake = clouds(80, 60, 6, 2)
    everything = prdc(real, fake, 3)
    some = prdc(real, fake, 3, metrics=("coverage", "density"))
    assert some == {name: everything[name] for name in ("density", "coverage")}
    assert len(prdc(real, fake[:2], 3, metrics=("density",))) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_other_types_are_their_values(dtype: torch.dtype) -> None:
    real, fake = (part.mul(20).clamp(0).to(dtype) for part in clouds(60, 50, 4, 3))
    assert prdc(real, fake, 3) == prdc(real.double(), fake.double(), 3)


def test_samples_say_what_the_numbers_are_made_of() -> None:
    real, fake = clouds(70, 50, 3, 4)
    real[7] = 50  # covered by nobody
    fake[9] = -40  # close to nobody
    values = prdc(real, fake, 4, return_per_sample=True)
    samples = values["samples"]
    assert (samples.balls_around_fake > 0).double().mean() == values["precision"]
    assert (samples.fakes_in_ball > 0).double().mean() == values["coverage"]
    assert (samples.balls_around_real > 0).double().mean() == values["recall"]
    assert samples.balls_around_fake.sum() == samples.fakes_in_ball.sum()
    assert samples.balls_around_fake[9] == 0
    across = brute_force(real, fake) ** 0.5
    np.testing.assert_array_equal(samples.nearest_real, across.argmin(0))
    np.testing.assert_array_equal(samples.nearest_fake, across.argmin(1))
    np.testing.assert_allclose(samples.nearest_real_distance, across.min(0), rtol=1e-12)
    np.testing.assert_allclose(samples.nearest_fake_distance, across.min(1), rtol=1e-12)
    np.testing.assert_allclose(samples.real_radius, knn_radii(real, 4), rtol=1e-15)


def test_radii_of_several_k() -> None:
    points, _ = clouds(40, 1, 5, 5)
    radii = knn_radii(points, [1, 39])
    assert torch.equal(radii[0], knn_radii(points, 1))
    assert (radii[0] < radii[1]).all()


# ------------------------------------------------------------------ expectations
@pytest.mark.parametrize(("n", "m", "k"), [(200, 200, 5), (200, 60, 5), (60, 200, 2)])
def test_expectations_hold_for_equal_distributions(n: int, m: int, k: int) -> None:
    g = generator(7)
    runs = [
        prdc(torch.randn(n, 4, generator=g), torch.randn(m, 4, generator=g), k) for _ in range(60)
    ]
    for name, expected in (
        ("density", expected_density(n, m, k)),
        ("coverage", expected_coverage(n, m, k)),
    ):
        values = torch.stack([run[name] for run in runs])
        error = values.std() / 60**0.5
        assert abs(values.mean() - expected) < 4 * error
        assert error < 0.02 * expected


def test_standard_errors_are_not_too_small_and_not_useless() -> None:
    """Delete-one jackknife of both samples: at least the true spread, at most a few times it."""
    g = generator(8)
    runs = [
        prdc(
            torch.randn(200, 8, generator=g), torch.randn(200, 8, generator=g), standard_errors=True
        )
        for _ in range(80)
    ]
    for name in NAMES:
        spread = torch.stack([run[name] for run in runs]).std()
        estimated = torch.stack([run[f"{name}_se"] for run in runs]).square().mean().sqrt()
        assert 0.85 < estimated / spread < 3, (name, estimated, spread)


@pytest.mark.parametrize("name", ["density", "coverage"])
def test_standard_errors_are_the_delete_one_jackknife(name: str) -> None:
    real, fake = clouds(30, 20, 3, 9)
    value = prdc(real, fake, 3, standard_errors=True)
    variance = 0.0
    for left_out in ("real", "fake"):
        size = len(real) if left_out == "real" else len(fake)
        without = []
        for i in range(size):
            others = [j for j in range(size) if j != i]
            sets = (real[others], fake) if left_out == "real" else (real, fake[others])
            without.append(prdc(*sets, 3)[name])
        deviations = torch.stack(without) - torch.stack(without).mean()
        variance += float(deviations.square().sum() * (size - 1) / size)
    assert float(value[f"{name}_se"]) == pytest.approx(variance**0.5, rel=1e-9)


def test_choice_of_k() -> None:
    assert choose_nearest_k(10_000, 10_000) == 5
    k = choose_nearest_k(50_000, 10_000, 0.9)
    assert expected_coverage(50_000, 10_000, k) > 0.9 >= expected_coverage(50_000, 10_000, k - 1)
    with pytest.raises(ValueError, match="no nearest_k below N=3"):
        choose_nearest_k(3, 1, 0.99)
    with pytest.raises(ValueError, match=r"1\.0"):
        choose_nearest_k(10, 10, 1.0)


def test_a_dropped_mode_shows_in_coverage_and_noise_in_density() -> None:
    g = generator(10)
    centres = 20 * torch.randn(5, 8, generator=g)

    def sample(modes: int, noise: float = 1.0) -> Tensor:
        which = torch.randint(0, modes, (600,), generator=g)
        return centres[which] + noise * torch.randn(600, 8, generator=g)

    real = sample(5)
    same, dropped, noisy = (prdc(real, fake) for fake in (sample(5), sample(4), sample(5, 1.7)))
    assert dropped["coverage"] < same["coverage"] - 0.15
    assert dropped["density"] > same["density"] - 0.1
    assert noisy["density"] < same["density"] - 0.3


# ------------------------------------------------------------------ relatives
def test_improved_precision_and_recall_count_the_surface() -> None:
    real, fake = torch.zeros(6, 2), torch.zeros(7, 2)
    assert improved_precision_recall(real, fake) == (1, 1)
    assert prdc(real, fake, 3)["precision"] == 0


def test_realism_of_a_copy_is_infinite_and_of_an_outlier_small() -> None:
    real, fake = clouds(60, 10, 4, 11)
    fake[0], fake[1] = real[0], 100
    radii = knn_radii(real, 3)
    kept = radii <= radii.quantile(0.5)
    fake[0] = real[kept][0]
    scores = realism_score(real, fake)
    distances = torch.from_numpy(brute_force(real[kept], fake)).sqrt()
    torch.testing.assert_close(scores, (radii[kept, None] / distances).amax(0))
    assert scores[0] == torch.inf
    assert scores[1] < 0.1
    assert (realism_score(real, fake, percentile=100) >= scores).all()


def test_copies_are_not_authentic() -> None:
    real, fake = clouds(60, 10, 4, 12)
    fake[:5] = real[:5] + 1e-4
    fake[5:] += 10
    assert authenticity(real, fake).tolist() == [False] * 5 + [True] * 5


def test_probabilistic_precision_of_copies_is_one() -> None:
    real, fake = clouds(60, 40, 4, 13)
    precision, recall = probabilistic_precision_recall(real, real[:40])
    assert precision == 1
    assert recall < 1
    far, _ = probabilistic_precision_recall(real, fake + 100)
    assert far == 0


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("real", "fake", "options", "message"),
    [
        (torch.randn(5, 2), torch.randn(9, 2), {"nearest_k": 5}, "at least 6 real samples.* 5"),
        (torch.randn(9, 2), torch.randn(5, 2), {"nearest_k": 5}, "at least 6 fake samples.* 5"),
        (torch.randn(9, 2), torch.randn(9, 3), {}, "2 dimensions, fake features 3"),
        (torch.randn(9), torch.randn(9, 1), {}, r"shape \[9\]"),
        (torch.randn(9, 2), torch.randn(0, 2), {}, r"fake features have shape \[0, 2\]"),
        (
            torch.tensor([[0.0], [torch.nan], [1.0]]),
            torch.randn(3, 1),
            {},
            "1 of 3 real .*number 1",
        ),
        (torch.randn(9, 2), torch.full((9, 2), torch.inf), {}, "9 of 9 fake samples"),
        (torch.randn(9, 2), torch.randn(9, 2), {"nearest_k": 0}, "nearest_k=0"),
        (torch.randn(9, 2), torch.randn(9, 2), {"metrics": ("fid",)}, "fid.*precision, recall"),
    ],
)
def test_bad_input(real: Tensor, fake: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prdc(real, fake, **options)


# ------------------------------------------------------------------ the metric
def filled(real: Tensor, fake: Tensor, **options: Any) -> PrecisionRecallDensityCoverage:
    metric = PRDC(nearest_k=3, **options)
    for side, points in ((True, real), (False, fake)):
        for start in range(0, len(points), 16):
            rows = torch.arange(start, min(start + 16, len(points)))
            metric.update(points[rows], real=side, indices=rows)
    return metric


def test_metric_is_the_function_whatever_the_batches() -> None:
    real, fake = clouds(80, 60, 6, 14)
    metric = filled(real, fake, sweep=(1, 3, 7), per_sample=True)
    values = metric.compute()
    expected = prdc(real, fake, 3, standard_errors=True)
    assert {name: values[name] for name in expected} == expected
    assert values["normalized_coverage"] == values["coverage"] / expected_coverage(80, 60, 3)
    assert torch.equal(metric.curve["density"], prdc_sweep(real, fake, [1, 3, 7])["density"])
    assert metric.samples is not None
    assert len(metric.samples.fakes_in_ball) == 80


def test_repeated_indices_count_once_and_order_does_not_matter() -> None:
    real, fake = clouds(80, 60, 6, 15)
    expected = filled(real, fake).compute()
    metric = PRDC(nearest_k=3)
    order = torch.randperm(80, generator=generator(16))
    padded = torch.cat([order, order[:9]])
    metric(real[padded], real=True, indices=padded)  # forward only updates
    metric.update(fake, real=False, indices=torch.arange(60))
    assert metric.compute() == expected
    assert metric.features is not None
    assert torch.equal(metric.features[0], real)


def test_a_seeded_part_of_the_samples() -> None:
    real, fake = clouds(80, 60, 6, 17)
    part = filled(real, fake, max_samples=30)
    part.compute()
    assert part.features is not None
    assert [len(features) for features in part.features] == [30, 30]
    again = filled(real, fake, max_samples=30)
    assert again.compute() == part.compute()
    without = PRDC(nearest_k=3, max_samples=30)
    without.update(real, real=True)
    without.update(fake, real=False)
    with pytest.raises(ValueError, match="max_samples needs the indices"):
        without.compute()


def test_real_features_can_stay() -> None:
    real, fake = clouds(80, 60, 6, 18)
    metric = filled(real, fake, reset_real_features=False)
    expected = metric.compute()
    metric.reset()
    metric.update(fake, real=False, indices=torch.arange(60))
    assert metric.compute() == expected
    forgetful = filled(real, fake)
    forgetful.reset()
    forgetful.update(fake, real=False)
    with pytest.raises(ValueError, match="no real sample"):
        forgetful.compute()


def test_a_network_may_make_the_features() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    g = generator(19)
    real, fake = (torch.rand(40, 3, 2, 2, generator=g) for _ in range(2))
    metric = PRDC(network, nearest_k=3)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    values, expected = metric.compute(), prdc(network(real), network(fake), 3)
    assert {name: values[name] for name in NAMES} == expected


def test_updates_that_cannot_be() -> None:
    metric = PRDC()
    metric.update(torch.randn(4, 3), real=True, indices=torch.arange(4))
    with pytest.raises(ValueError, match="some batches of real"):
        metric.update(torch.randn(4, 3), real=True)
    with pytest.raises(ValueError, match="2 dimensions, those before 3"):
        metric.update(torch.randn(4, 2), real=False)
    with pytest.raises(ValueError, match="1 of 2 fake"):
        metric.update(torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]), real=False)


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.randn(90, 2), torch.randn(10, 2), "perfect generator has a coverage of 0.2"),
        (torch.zeros(20, 2), torch.randn(20, 2), "20 of 20 real samples have 3 exact copies"),
    ],
)
def test_warnings(real: Tensor, fake: Tensor, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        filled(real, fake, per_sample=True).compute()


# ------------------------------------------------------------------ several processes
def lattice_sets() -> tuple[Tensor, Tensor]:
    """Half continuous, half tied, so that every path of the computation is taken."""
    real, fake = clouds(70, 51, 4, 20)
    real[::2], fake[::2] = real[::2].round(), fake[::2].round()
    return real, fake


def on_a_rank(folder: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    real, fake = lattice_sets()
    results = []
    for case in ("spread", "padded", "empty", "one side each"):
        metric = PRDC(nearest_k=3, sweep=(1, 5), per_sample=True)
        for points, side in ((real, True), (fake, False)):
            rows = torch.arange(rank, len(points), world)
            if case == "padded":  # as DistributedSampler does
                rows = torch.arange(rank, -(-len(points) // world) * world, world) % len(points)
            if case == "empty":
                rows = torch.arange(len(points) if rank == world - 1 else 0)
            if case == "one side each":
                rows = torch.arange(len(points) if rank == int(side) % world else 0)
            if case == "spread":
                rows = rows.flip(0)
            for part in rows.split(8):
                if len(part):
                    metric.update(points[part], real=side, indices=part)
        values = metric.compute()
        assert metric.samples is not None
        results.append((values, metric.curve, tuple(metric.samples)))
        metric.reset()
    without = PRDC(nearest_k=3)  # no indices, and a rank without a batch
    if rank == world - 1:
        without.update(real, real=True)
    if rank == 0:
        without.update(fake.double(), real=False)
    results.append((without.compute(), {}, ()))
    torch.save(results, rank_file(folder))


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    for world in (1, 2, 4):
        run_ranks(on_a_rank, tmp_path, world)
    (expected,) = from_ranks(tmp_path, 1)
    for values, curve, samples in expected[1:4]:
        assert (values, len(samples)) == (expected[0][0], 8)
        assert all(torch.equal(curve[name], expected[0][1][name]) for name in curve)
    for results in (*from_ranks(tmp_path, 2), *from_ranks(tmp_path, 4)):
        for found, wanted in zip(results, expected, strict=True):
            assert found[0] == wanted[0]
            assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])
            assert all(torch.equal(a, b) for a, b in zip(found[2], wanted[2], strict=True))
