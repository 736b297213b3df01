"""Decisions about distances are those of float64, whatever the data and the block size."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.metrics.distances import PIECE, Distances, full_precision


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(n, dim, generator=g), torch.randn(m, dim, generator=g) + 0.3


def lattice(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return tuple(torch.randint(0, 3, (k, dim), generator=g).float() for k in (n, m))  # type: ignore[return-value]


def duplicates(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    real, fake = clouds(n, m, dim, seed)
    real[n // 2 :] = real[: n - n // 2].clone()
    fake[: m // 3] = real[: m // 3]
    return real, fake


def constant(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    return torch.full((n, dim), 0.1), torch.full((m, dim), 0.1)


def far_away(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    real, fake = clouds(n, m, dim, seed)
    return real.double() + 1e6, fake.double() + 1e6


def far_away_float32(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Spread of a few units in the last place: nearly everything is a tie."""
    real, fake = far_away(n, m, dim, seed)
    return real.float(), fake.float()


def outliers(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    real, fake = clouds(n, m, dim, seed)
    real[0] *= 1e6
    fake[-2:] *= -1e5
    return real, fake


def tight_clusters(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distances within a cluster are far below what float32 resolves."""
    real, fake = (part.double() * 1e-7 for part in clouds(n, m, dim, seed))
    real[::2] += 1
    fake[::3] += 1
    return real, fake


def tiny_and_huge(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    real, fake = (part.double() * 1e-30 for part in clouds(n, m, dim, seed))
    real[0] += 1e30
    return real, fake


def nearly_tied(n: int, m: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """All points on a sphere up to 1e-9."""
    parts = (part.double() for part in clouds(n, m, dim, seed))
    real, fake = (part / part.norm(dim=1, keepdim=True) for part in parts)
    real[0] = 0
    return real, fake * (1 + 1e-9 * torch.arange(m)[:, None])


DATA: list[Callable[[int, int, int, int], tuple[Tensor, Tensor]]] = [
    clouds,
    lattice,
    duplicates,
    constant,
    far_away,
    far_away_float32,
    outliers,
    tight_clusters,
    tiny_and_huge,
    nearly_tied,
]


def brute_force(left: Tensor, right: Tensor) -> NDArray[np.float64]:
    x, y = (part.double().numpy() for part in (left, right))
    squares: NDArray[np.float64] = np.zeros((len(x), len(y)))
    terms = [(x[:, None, d] - y[None, :, d]) ** 2 for d in range(x.shape[1])]
    while len(terms) > 1:  # the documented order of summation
        half = (len(terms) + 1) // 2
        terms = [
            terms[d] + terms[half + d] if half + d < len(terms) else terms[d] for d in range(half)
        ]
    squares += terms[0]
    return squares


@pytest.mark.parametrize("block_size", [7, None])
@pytest.mark.parametrize("dim", [1, 5, 64])
@pytest.mark.parametrize("data", DATA)
def test_neighbours_and_pairs(
    data: Callable[..., tuple[Tensor, Tensor]], dim: int, block_size: int | None
) -> None:
    real, fake = data(60, 50, dim, 1)
    distances = Distances(real, fake, block_size=block_size)
    scale = distances.unit**2
    within = brute_force(real, real)
    np.fill_diagonal(within, np.inf)
    ranks = [1, 4, 59]
    squared, order = distances.nearest(0, 0, ranks)
    expected = np.sort(within, 1)
    for found, rank in zip(squared.numpy() * scale, ranks, strict=True):
        np.testing.assert_array_equal(found, expected[:, rank - 1])
    reached = np.take_along_axis(within, order.numpy()[:, :4], 1).max(1)
    np.testing.assert_array_equal(reached, expected[:, 3])

    across = brute_force(real, fake)
    limit = squared[1]
    inside = np.zeros(across.shape, dtype=int)
    of_columns = np.zeros(across.shape, dtype=int)
    column_limit = limit[: len(fake)]
    for rows, columns in distances.pairs_within(0, range(60), 1, limit, column_limit):
        for pairs, limits, seen in ((rows, limit, inside), (columns, column_limit, of_columns)):
            assert pairs is not None
            of_pair = limits[pairs.rows if pairs is rows else pairs.columns]
            values = distances.decided(0, 1, pairs, of_pair[None])
            chosen = values < of_pair
            np.add.at(seen, (pairs.rows[chosen].numpy(), pairs.columns[chosen].numpy()), 1)
    np.testing.assert_array_equal(inside, across < (limit.numpy() * scale)[:, None])
    np.testing.assert_array_equal(of_columns, across < (column_limit.numpy() * scale)[None])

    ratio = distances.largest_ratio(0, limit, 1).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        best = np.nan_to_num((limit.numpy() * scale)[:, None] / across, nan=0.0, posinf=np.inf)
    np.testing.assert_allclose(ratio, best.max(0), rtol=1e-12)


@pytest.mark.parametrize("dim", [PIECE - 4, PIECE - 2, 2 * PIECE])
def test_rows_longer_than_a_piece(dim: int) -> None:
    real, fake = clouds(60, 40, dim, 2)
    squared, order = Distances(real, fake).nearest(0, 1, [1, 3])
    across = brute_force(real, fake)
    np.testing.assert_array_equal(order[:, 0].numpy(), across.argmin(1))
    assert squared.shape == (2, 60)


def test_bounds_hold() -> None:
    """Lower and upper bounds enclose every distance, and are close together."""
    for data in DATA:
        for dim in (2, 64, 700):
            real, fake = data(60, 50, dim, 3)
            distances = Distances(real, fake)
            rows = torch.arange(60).repeat_interleave(50)
            columns = torch.arange(50).repeat(60)
            exact = distances.squared(0, rows, 1, columns)
            tile = distances._product(distances._left[0], distances._right(distances._left[1]))
            lower = tile.flatten().double() - distances._underflow
            slack = distances._slack(0, rows, 1, columns)
            assert (lower <= exact).all(), (data, dim)
            assert (exact <= lower + slack).all(), (data, dim)
    assert (slack < 1e-3 * exact.mean()).all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precision_changes_nothing_and_is_restored(precision: str) -> None:
    real, fake = clouds(200, 150, 64, 4)
    before = torch.get_float32_matmul_precision()
    expected = Distances(real, fake).nearest(0, 1, [5])
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = Distances(real, fake).nearest(0, 1, [5])
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_the_product_is_in_float32_under_autocast() -> None:
    left = torch.randn(8, 64, generator=generator(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (left @ left.T).dtype == torch.bfloat16
        with full_precision(torch.device("cpu")):
            assert (left @ left.T).dtype == torch.float32


def test_a_collapsed_set_does_not_cost_a_pair_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 points at 5 places: the float64 work is for distinct pairs."""
    g = generator(6)
    points = torch.randn(5, 3, generator=g)[torch.randint(0, 5, (400,), generator=g)]
    computed = 0
    original = Distances._squared

    def counted(self: Distances, left: Tensor, rows: Tensor, *rest: Tensor) -> Tensor:
        nonlocal computed
        computed += len(rows)
        return original(self, left, rows, *rest)

    monkeypatch.setattr(Distances, "_squared", counted)
    squared, _ = Distances(points).nearest(0, 0, [3])
    assert (squared == 0).all()
    assert computed < 400
