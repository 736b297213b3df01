"""Patches of an image pair, and which two of them the Siamese network sees.

The G*G patches of the domain-A image are numbered 0 .. G*G-1, those of the domain-B image G*G .. 2*G*G-1, both row by
row. Two patches are in one of four scenarios: D1 (both of A), D2 (both of B), C1 (one of each, at the same position) or
C2 (one of each, at different positions). Labels follow the domain of an image, not whether it is real, so that one
network serves both directions of translation (inferred).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Scenario = Literal["D1", "D2", "C1", "C2"]
PairSampling = Literal["scenario", "uniform", "class"]

DOMAIN_A, DOMAIN_B, CROSS = 0, 1, 2
"""Classes of a pair: D1, D2, and C1 together with C2."""

SCENARIOS: dict[Scenario, tuple[int, int]] = {
    "D1": (DOMAIN_A, DOMAIN_A),
    "D2": (DOMAIN_B, DOMAIN_B),
    "C1": (DOMAIN_A, DOMAIN_B),
    "C2": (DOMAIN_A, DOMAIN_B),
}
"""Domains of the two patches. A cross pair has the patch of A first, so that a network sees one order (inferred)."""


def patch_grid(x: Tensor, grid: int = 3) -> Tensor:
    """Cuts images into a grid of equal patches; remaining rows below and columns to the right are dropped (inferred).

    Args:
        x: [B, C, H, W].
        grid: patches along each side, 3 in the paper.

    Returns:
        [B, grid*grid, C, H//grid, W//grid], row by row.

    Raises:
        ValueError: no grid, or an image smaller than it.
    """
    height, width = x.shape[-2] // max(grid, 1), x.shape[-1] // max(grid, 1)
    if grid < 1 or min(height, width) < 1:
        raise ValueError(
            f"images of {x.shape[-2]}x{x.shape[-1]} pixels cannot be cut into {grid}x{grid} patches; "
            "choose --model.grid between 1 and the smaller side of the crop"
        )
    cells = x[..., : grid * height, : grid * width].unflatten(3, (grid, width))
    return cells.unflatten(2, (grid, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def pair_labels(pairs: Tensor, num_positions: int = 9) -> tuple[Tensor, Tensor]:
    """Class of pairs, and which of them are C1; the order inside a pair does not matter.

    Args:
        pairs: patch numbers [..., 2] in 0 .. 2*num_positions-1.
        num_positions: patches of one image.

    Returns:
        int64 [...] of DOMAIN_A, DOMAIN_B or CROSS, and bool [...].
    """
    domains, positions = pairs // num_positions, pairs % num_positions
    cross = domains[..., 0] != domains[..., 1]
    labels = torch.where(cross, CROSS, domains[..., 0])
    return labels, cross & (positions[..., 0] == positions[..., 1])


def pair_label(p: int, q: int, num_positions: int = 9) -> tuple[int, bool]:
    """Class of one pair, and whether it is C1; see :func:`pair_labels`.

    Raises:
        ValueError: no such patch, or twice the same one.
    """
    for patch in (p, q):
        if not 0 <= patch < 2 * num_positions:
            raise ValueError(
                f"patch {patch} is none of 0..{2 * num_positions - 1}: two images have {num_positions} patches each"
            )
    if p == q:
        raise ValueError(f"a pair needs two different patches, got {p} twice")
    label, same_position = pair_labels(torch.tensor([p, q]), num_positions)
    return int(label), bool(same_position)


def pair_from_draws(
    scenario: Scenario, u: int, v: int = 0, num_positions: int = 9
) -> tuple[int, int]:
    """The pair that two integers choose; uniform integers choose every pair of a scenario equally often (inferred).

    Args:
        scenario: D1, D2, C1 or C2.
        u: position of the first patch, 0 .. num_positions-1; for C1 of both.
        v: 0 .. num_positions-2; the position of the second patch among those other than u.
        num_positions: patches of one image.

    Returns:
        Patch numbers (p, q).

    Raises:
        ValueError: unknown scenario, or a draw outside its range.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario={scenario!r}; choose one of {', '.join(SCENARIOS)}")
    if not 0 <= u < num_positions:
        raise ValueError(f"u={u} must be one of the positions 0..{num_positions - 1}")
    if scenario == "C1":
        other = u
    elif 0 <= v < num_positions - 1:
        other = v + (v >= u)
    else:
        raise ValueError(
            f"v={v} must be in 0..{num_positions - 2}, the {num_positions - 1} positions other than u"
        )
    first, second = SCENARIOS[scenario]
    return first * num_positions + u, second * num_positions + other


def draws_per_image(mode: PairSampling = "scenario", pairs_per_scenario: int = 1) -> int:
    """How many uniform numbers :func:`sample_patch_pairs` takes for one image.

    Raises:
        ValueError: unknown mode, or no pair.
    """
    if pairs_per_scenario < 1:
        raise ValueError(f"--model.pairs_per_scenario={pairs_per_scenario} must be at least 1")
    match mode:
        case "scenario":
            return len(SCENARIOS) * pairs_per_scenario * 2
        case "uniform":
            return pairs_per_scenario
        case "class":
            return pairs_per_scenario * 2
    raise ValueError(
        f"unknown --model.pair_sampling={mode!r}; choose one of {', '.join(get_args(PairSampling))}"
    )


def sample_patch_pairs(
    batch: int,
    mode: PairSampling = "scenario",
    pairs_per_scenario: int = 1,
    generator: torch.Generator | None = None,
    *,
    grid: int = 3,
    draws: Tensor | None = None,
) -> Tensor:
    """Pairs of patches for every image of a batch.

    The paper picks two patches at random (not verified), which gives C1 in 9 of 153 draws only. With k =
    ``pairs_per_scenario``: ``scenario`` takes k pairs of each of the four scenarios, positions uniform (inferred);
    ``uniform`` takes k of all pairs; ``class`` draws a class and then one of its pairs, k times.

    Args:
        batch: images B.
        mode: see above.
        pairs_per_scenario: k.
        generator: source of the draws if these are not given; torch's own one without.
        grid: patches along each side of an image, at least 2.
        draws: uniform numbers [B, K] in [0, 1), K = :func:`draws_per_image`; the pairs of an image depend on its row
            alone. For ``scenario`` a row is [D1, D2, C1, C2] x k x (u, v), where ``floor(9 u)`` and ``floor(8 v)`` are
            the draws of :func:`pair_from_draws` on a 3x3 grid.

    Returns:
        int64 [N, 3]: image, p and q, image by image, on the device of the draws; N = 4kB for ``scenario``, else kB.

    Raises:
        ValueError: unknown mode, no pair, a grid of one patch, or draws of another shape.
    """
    count = draws_per_image(mode, pairs_per_scenario)
    if grid < 2:
        raise ValueError(
            f"--model.grid={grid} must be at least 2: one patch has none to be compared with"
        )
    if draws is None:
        device = None if generator is None else generator.device
        draws = torch.rand(batch, count, generator=generator, device=device)
    if draws.shape != (batch, count):
        raise ValueError(
            f"draws of shape {tuple(draws.shape)} must be [{batch}, {count}]: one row per image, "
            f"draws_per_image({mode!r}, {pairs_per_scenario}) numbers in it"
        )
    positions = grid**2
    every = torch.combinations(torch.arange(2 * positions, device=draws.device))
    match mode:
        case "scenario":
            by_pair = draws.view(batch, len(SCENARIOS), pairs_per_scenario, 2)
            first = _choose(by_pair[..., 0], positions)
            second = _choose(by_pair[..., 1], positions - 1)
            second = second + (second >= first)
            same = list(SCENARIOS).index("C1")
            second[:, same] = first[:, same]
            domains = torch.tensor(list(SCENARIOS.values()), device=draws.device)
            pairs = torch.stack((first, second), -1) + positions * domains[:, None]
        case "uniform":
            pairs = every[_choose(draws, len(every))]
        case _:
            by_pair = draws.view(batch, pairs_per_scenario, 2)
            chosen = _choose(by_pair[..., 0], 3)
            labels, _ = pair_labels(every, positions)
            pairs = torch.zeros(batch, pairs_per_scenario, 2, dtype=torch.long, device=draws.device)
            for label in (DOMAIN_A, DOMAIN_B, CROSS):
                members = every[labels == label]
                drawn = members[_choose(by_pair[..., 1], len(members))]
                pairs = torch.where((chosen == label)[..., None], drawn, pairs)
    pairs = pairs.view(batch, -1, 2)
    images = torch.arange(batch, device=draws.device).view(-1, 1, 1).expand(-1, pairs.shape[1], 1)
    return torch.cat((images, pairs), -1).flatten(0, 1)


def content_pairs(batch: int, grid: int = 3, device: torch.device | str | None = None) -> Tensor:
    """Every C1 pair of a batch: each position of the two images of every sample.

    Args:
        batch: images B.
        grid: patches along each side of an image.
        device: of the result.

    Returns:
        int64 [B*grid*grid, 3]: image, p and q, image by image.
    """
    image = torch.arange(batch, device=device).repeat_interleave(grid**2)
    position = torch.arange(grid**2, device=device).repeat(batch)
    return torch.stack((image, position, position + grid**2), 1)


def _choose(draws: Tensor, count: int) -> Tensor:
    """Uniform numbers as integers 0 .. count-1; a number close to 1 may have been rounded up to it."""
    return (draws * count).long().clamp(max=count - 1)
