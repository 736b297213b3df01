from collections import Counter
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_modules.opgan.pairs import (
    CROSS,
    DOMAIN_A,
    DOMAIN_B,
    SCENARIOS,
    PairSampling,
    Scenario,
    content_pairs,
    draws_per_image,
    pair_from_draws,
    pair_label,
    pair_labels,
    patch_grid,
    sample_patch_pairs,
)

MODES: list[PairSampling] = ["scenario", "uniform", "class"]


def kinds(pairs: Tensor, positions: int = 9) -> Counter[tuple[int, bool]]:
    return Counter(pair_label(p, q, positions) for _, p, q in pairs.tolist())


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ patches
@pytest.mark.parametrize(("grid", "height", "width"), [(3, 11, 16), (2, 7, 5), (1, 4, 4)])
def test_patches_are_cut_row_by_row(grid: int, height: int, width: int) -> None:
    x = uniform(2, 3, height, width)
    found = patch_grid(x, grid)
    h, w = height // grid, width // grid
    assert found.shape == (2, grid**2, 3, h, w)
    for position in range(grid**2):
        top, left = position // grid * h, position % grid * w
        assert torch.equal(found[:, position], x[..., top : top + h, left : left + w])


@pytest.mark.parametrize(("grid", "size"), [(3, (2, 9)), (3, (9, 2)), (0, (9, 9))])
def test_no_patches(grid: int, size: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"{size[0]}x{size[1]} pixels.*{grid}x{grid}.*model\.grid"
    ):
        patch_grid(torch.zeros(1, 3, *size), grid)


# ------------------------------------------------------------------ labels
@pytest.mark.parametrize(("positions", "counts"), [(9, (36, 36, 9, 72)), (4, (6, 6, 4, 12))])
def test_every_pair_has_its_scenario(positions: int, counts: tuple[int, ...]) -> None:
    found = Counter(pair_label(p, q, positions) for p, q in combinations(range(2 * positions), 2))
    order = [(DOMAIN_A, False), (DOMAIN_B, False), (CROSS, True), (CROSS, False)]
    assert tuple(found[kind] for kind in order) == counts
    assert sum(counts) == found.total()


def test_labels_of_many_pairs_are_those_of_each_in_either_order() -> None:
    pairs = torch.tensor(list(combinations(range(18), 2)))
    for some in (pairs, pairs.flip(1)):
        labels, same = pair_labels(some)
        each = [pair_label(p, q) for p, q in some.tolist()]
        assert list(zip(labels.tolist(), same.tolist(), strict=True)) == each


@pytest.mark.parametrize("pair", [(0, 18), (-1, 3)])
def test_no_such_patch(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"none of 0\.\.17"):
        pair_label(*pair)


def test_a_patch_is_no_pair_with_itself() -> None:
    with pytest.raises(ValueError, match="got 4 twice"):
        pair_label(4, 4)


# ------------------------------------------------------------------ draws
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("positions", [4, 9])
def test_draws_reach_every_pair_equally_often(scenario: Scenario, positions: int) -> None:
    found = Counter(
        pair_from_draws(scenario, u, v, positions)
        for u in range(positions)
        for v in range(positions - 1)
    )
    expected = (DOMAIN_A, DOMAIN_B, CROSS, CROSS)[list(SCENARIOS).index(scenario)]
    assert {pair_label(*pair, positions) for pair in found} == {(expected, scenario == "C1")}
    assert len(found) == (positions if scenario == "C1" else positions * (positions - 1))
    assert len(set(found.values())) == 1
    if expected == CROSS:
        assert all(p < positions <= q for p, q in found)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (("D3", 0, 0), "unknown scenario='D3'"),
        (("D1", 9, 0), r"u=9 must be one of the positions 0\.\.8"),
        (("C1", -1, 0), "u=-1"),
        (("C2", 0, 8), r"v=8 must be in 0\.\.7"),
    ],
)
def test_impossible_draws(draw: tuple[Scenario, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_from_draws(*draw)


# ------------------------------------------------------------------ sampling
@pytest.mark.parametrize("grid", [2, 3])
@pytest.mark.parametrize("each", [1, 3])
def test_scenario_sampling_follows_its_draws(grid: int, each: int) -> None:
    n = grid**2
    draws = uniform(5, draws_per_image("scenario", each))
    found = sample_patch_pairs(5, "scenario", each, grid=grid, draws=draws)
    rows = draws.view(5, 4, each, 2)
    expected = [
        (i, *pair_from_draws(scenario, int(u * n), int(v * (n - 1)), n))
        for i in range(5)
        for scenario, drawn in zip(SCENARIOS, rows[i], strict=True)
        for u, v in drawn.tolist()
    ]
    assert found.tolist() == [list(row) for row in expected]


def test_scenario_sampling_is_balanced() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = sample_patch_pairs(4000, generator=generator)
    assert set(kinds(pairs).values()) == {4000}
    labels, same = pair_labels(pairs[:, 1:])
    at = pairs[same, 1].bincount(minlength=9)
    assert len(at) == 9
    assert (at - 4000 / 9).abs().max() < 5 * (4000 / 9) ** 0.5
    inside = {tuple(sorted(pair)) for pair in pairs[labels == DOMAIN_B, 1:].tolist()}
    assert len(inside) == 36


def test_uniform_sampling_reaches_all_pairs_equally_often() -> None:
    draws = ((torch.arange(153, dtype=torch.float64) + 0.5) / 153)[:, None]
    pairs = sample_patch_pairs(153, "uniform", draws=draws)
    assert {(p, q) for _, p, q in pairs.tolist()} == set(combinations(range(18), 2))
    assert pairs[:, 0].tolist() == list(range(153))


def test_class_sampling_is_balanced_over_classes_and_uniform_within() -> None:
    generator = torch.Generator().manual_seed(0)
    found = kinds(sample_patch_pairs(3000, "class", 3, generator))
    for label in (DOMAIN_A, DOMAIN_B):
        assert abs(found[label, False] - 3000) < 5 * 2000**0.5
    assert abs(found[CROSS, True] - 3000 / 9) < 5 * (3000 / 9) ** 0.5
    third = torch.full((81,), 2 / 3 + 0.01)
    pair = (torch.arange(81) + 0.5) / 81
    pairs = sample_patch_pairs(81, "class", draws=torch.stack((third, pair), 1))
    assert len({(p, q) for _, p, q in pairs.tolist()}) == 81
    assert pair_labels(pairs[:, 1:])[0].unique().tolist() == [CROSS]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("each", [1, 2])
def test_an_image_depends_on_its_own_draws_alone(mode: PairSampling, each: int) -> None:
    draws = uniform(6, draws_per_image(mode, each))
    together = sample_patch_pairs(6, mode, each, draws=draws)
    alone = [sample_patch_pairs(1, mode, each, draws=row[None]) for row in draws]
    assert torch.equal(together[:, 1:], torch.cat(alone)[:, 1:])
    assert torch.equal(together[:, 0], torch.arange(6).repeat_interleave(len(together) // 6))
    assert torch.equal(together, sample_patch_pairs(6, mode, each, draws=draws))


@pytest.mark.parametrize("mode", MODES)
def test_a_generator_stands_for_its_draws(mode: PairSampling) -> None:
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    draws = torch.rand(4, draws_per_image(mode), generator=first)
    expected = sample_patch_pairs(4, mode, draws=draws)
    state = torch.random.get_rng_state()
    assert torch.equal(sample_patch_pairs(4, mode, generator=second), expected)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_draws_at_the_ends_of_their_range(mode: PairSampling, value: float) -> None:
    """A draw may be rounded up to 1."""
    draws = torch.full((1, draws_per_image(mode)), value, dtype=torch.bfloat16)
    for grid in (2, 3):
        kinds(sample_patch_pairs(1, mode, grid=grid, draws=draws), grid**2)


def test_all_content_pairs() -> None:
    pairs = content_pairs(2, 2)
    expected = [[image, position, position + 4] for image in range(2) for position in range(4)]
    assert pairs.tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "pair_sampling='best'"),
        ({"pairs_per_scenario": 0}, "pairs_per_scenario=0"),
        ({"grid": 1}, "grid=1"),
        ({"draws": torch.zeros(2, 7)}, r"draws of shape \(2, 7\) must be \[2, 8\]"),
        ({"draws": torch.zeros(1, 8)}, r"must be \[2, 8\]"),
    ],
)
def test_impossible_sampling(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_patch_pairs(2, **options)
