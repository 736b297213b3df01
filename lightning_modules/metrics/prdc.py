"""Precision, recall, density and coverage of generated samples, and their relatives.

- Density and coverage: Naeem, Oh, Uh, Choi, Yoo, "Reliable Fidelity and Diversity Metrics for Generative Models",
  ICML 2020. Precision and recall: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
  Models", NeurIPS 2019. The numbers are those of the released code of the former (package ``prdc``): a ball around
  each point up to its k-th nearest *other* point, its surface excluded.
- Realism: Kynkaanniemi et al. 2019, eq. 3. Authenticity: Alaa et al., "How Faithful is your Synthetic Data?", ICML
  2022. P-precision and P-recall: Park and Kim, "Probabilistic Precision and Recall Towards Reliable Evaluation of
  Generative Models", ICCV 2023.

All are exact for any number of points, see :mod:`lightning_modules.metrics.distances`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch import distributed as dist
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics.distances import Distances, Pairs
from lightning_modules.randomness import mix

Name = Literal["precision", "recall", "density", "coverage"]
NAMES: tuple[Name, ...] = ("precision", "recall", "density", "coverage")
REAL, FAKE = 0, 1


# ------------------------------------------------------------------ closed forms
def expected_density(num_real: int, num_fake: int, nearest_k: int) -> float:
    """Expected density of two samples of one continuous distribution: 1, whatever the sizes.

    Each of the N balls holds a given fake with probability k / N (exchangeability).

    Raises:
        ValueError: sizes for which density is not defined.
    """
    _check_sizes(num_real, num_fake, nearest_k)
    return 1.0


def expected_coverage(num_real: int, num_fake: int, nearest_k: int) -> float:
    """Expected coverage of two samples of one continuous distribution, in any dimension.

    ``1 - prod_{i=1..k} (N - i) / (N + M - i)`` (Naeem et al. 2020); ``1 - 2^-k`` for large N = M.

    Args:
        num_real: N.
        num_fake: M.
        nearest_k: k, at most N - 1.

    Raises:
        ValueError: sizes for which coverage is not defined.
    """
    _check_sizes(num_real, num_fake, nearest_k)
    missed = 1.0
    for i in range(1, nearest_k + 1):
        missed *= (num_real - i) / (num_real + num_fake - i)
    return 1 - missed


def choose_nearest_k(num_real: int, num_fake: int, min_expected_coverage: float = 0.95) -> int:
    """The smallest k with an expected coverage above a value (Naeem et al. 2020): 5 for N = M and 0.95.

    Args:
        num_real: N.
        num_fake: M.
        min_expected_coverage: in [0, 1).

    Raises:
        ValueError: no k does it, or the value is outside [0, 1).
    """
    if not 0 <= min_expected_coverage < 1:
        raise ValueError(f"min_expected_coverage={min_expected_coverage} must be in [0, 1)")
    missed = 1.0
    for k in range(1, num_real):
        missed *= (num_real - k) / (num_real + num_fake - k)
        if 1 - missed > min_expected_coverage:
            return k
    raise ValueError(
        f"no nearest_k below N={num_real} gives M={num_fake} fakes an expected coverage above "
        f"{min_expected_coverage}; use more fake samples or fewer real ones"
    )


choose_k = choose_nearest_k


def _check_sizes(num_real: int, num_fake: int, nearest_k: int) -> None:
    if nearest_k < 1:
        raise ValueError(f"nearest_k={nearest_k} must be at least 1")
    for name, count in (("real", num_real), ("fake", num_fake)):
        if count < 1:
            raise ValueError(f"there are {count} {name} samples; at least one is needed")
    if num_real <= nearest_k:
        raise ValueError(
            f"nearest_k={nearest_k} needs at least {nearest_k + 1} real samples, there are "
            f"{num_real}; use more samples or a smaller nearest_k"
        )


# ------------------------------------------------------------------ counting
class Shards:
    """Which rows a process works on, and how the processes' parts are put together.

    Everything that is summed is an integer, or zero on all processes but one: the result does not depend on their
    number.
    """

    def __init__(self, sharded: bool = False, group: Any = None) -> None:
        self.world = dist.get_world_size(group) if sharded else 1
        self.rank = dist.get_rank(group) if sharded else 0
        self.group = group

    def rows(self, count: int) -> range:
        """This process's share of so many rows."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def whole(self, part: Tensor, count: int, dim: int = -1) -> Tensor:
        """The rows of all processes, from this one's ``part`` along ``dim``."""
        if self.world == 1:
            return part
        shape = list(part.shape)
        shape[dim] = count
        whole = part.new_zeros(shape)
        rows = self.rows(count)
        whole.narrow(dim, rows.start, len(rows)).copy_(part)
        return self.total(whole)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


class Balls:
    """How balls around centres and points of another set lie to each other, for several k at once.

    Attributes:
        per_ball: points in each ball, int64 [len(ks), C].
        per_point: balls around each point, int64 [len(ks), P].
        of_ball: sum of the indices of the points in each ball: where there is one point, its index.
        of_point: likewise of the balls around each point.
    """

    def __init__(self, squared: Tensor, points: int, inclusive: bool) -> None:
        ks, centres = squared.shape
        self.squared = squared
        self.inclusive = inclusive
        zeros = squared.new_zeros
        self.per_ball, self.of_ball = (zeros(ks, centres, dtype=torch.long) for _ in range(2))
        self.per_point, self.of_point = (zeros(ks, points, dtype=torch.long) for _ in range(2))

    def add(
        self, distances: Distances, sets: tuple[int, int], pairs: Pairs, transposed: bool
    ) -> None:
        """Counts pairs of (centre, point), or of (point, centre) if transposed."""
        centres, points = (pairs.columns, pairs.rows) if transposed else (pairs.rows, pairs.columns)
        limits = self.squared[:, centres]
        values = distances.decided(*sets, pairs, limits)
        inside = values <= limits if self.inclusive else values < limits
        for k, chosen in enumerate(inside):
            centre, point = centres[chosen], points[chosen]
            one = torch.ones_like(centre)
            self.per_ball[k].index_add_(0, centre, one)
            self.per_point[k].index_add_(0, point, one)
            self.of_ball[k].index_add_(0, centre, point)
            self.of_point[k].index_add_(0, point, centre)

    def share(self, shards: Shards) -> None:
        """Adds up what all processes counted."""
        for counts in (self.per_ball, self.per_point, self.of_ball, self.of_point):
            shards.total(counts)


class PRDCSamples(NamedTuple):
    """What the numbers are made of, sample by sample (indices are positions in the sets that were compared).

    Attributes:
        balls_around_fake: balls of reals that hold each fake, int64 [M]; 0 = not faithful.
        fakes_in_ball: fakes in the ball of each real, int64 [N]; 0 = not covered.
        balls_around_real: balls of fakes that hold each real, int64 [N]; 0 = not recalled. Empty unless recall was
            computed.
        real_radius: distance of each real to its k-th nearest other real, float64 [N].
        nearest_real: the real next to each fake, int64 [M].
        nearest_real_distance: float64 [M].
        nearest_fake: the fake next to each real, int64 [N].
        nearest_fake_distance: float64 [N].
    """

    balls_around_fake: Tensor
    fakes_in_ball: Tensor
    balls_around_real: Tensor
    real_radius: Tensor
    nearest_real: Tensor
    nearest_real_distance: Tensor
    nearest_fake: Tensor
    nearest_fake_distance: Tensor


def prdc(
    real_features: Tensor,
    fake_features: Tensor,
    nearest_k: int = 5,
    *,
    inclusive: bool = False,
    metrics: Sequence[Name] = NAMES,
    standard_errors: bool = False,
    return_per_sample: bool = False,
    block_size: int | None = None,
) -> dict[str, Any]:
    """Precision, recall, density and coverage, equal to the released code's.

    With ``d`` the Euclidean distance, ``r_i`` the distance of real i to its k-th nearest other real and ``s_j`` that
    of fake j to its k-th nearest other fake:

    - precision: share of fakes with ``d(X_i, Y_j) < r_i`` for some i, in [0, 1];
    - recall: share of reals with ``d(X_i, Y_j) < s_j`` for some j, in [0, 1];
    - density: pairs with ``d(X_i, Y_j) < r_i``, divided by k M, in [0, N / k];
    - coverage: share of reals with ``d(X_i, Y_j) < r_i`` for some j, in [0, 1].

    Args:
        real_features: [N, D], N > k.
        fake_features: [M, D], M > k if recall is wanted.
        nearest_k: k.
        inclusive: count the surface of the balls (``<=``), as Kynkaanniemi et al. do.
        metrics: which to compute; without recall a third of the work is saved.
        standard_errors: add ``NAME_se`` for each: what the value would vary by if both samples were drawn anew,
            see :func:`_standard_errors`.
        return_per_sample: add ``samples``, a :class:`PRDCSamples`.
        block_size: rows of a block of distances; changes memory and speed, never the result.

    Returns:
        float64 scalars by name.

    Raises:
        ValueError: too few samples for k, features of other shapes or dimensions, NaN or infinite features, an
            unknown metric.
    """
    swept, samples = evaluate(
        real_features,
        fake_features,
        [nearest_k],
        inclusive=inclusive,
        metrics=metrics,
        standard_errors=standard_errors,
        per_sample=return_per_sample,
        block_size=block_size,
    )
    values: dict[str, Any] = {name: value[0] for name, value in swept.items()}
    if return_per_sample:
        values["samples"] = samples
    return values


def prdc_sweep(
    real_features: Tensor, fake_features: Tensor, nearest_k: Sequence[int], **options: Any
) -> dict[str, Tensor]:
    """:func:`prdc` for several k in one pass over the distances.

    Args:
        real_features: [N, D].
        fake_features: [M, D].
        nearest_k: the k's.
        options: ``inclusive``, ``metrics``, ``standard_errors`` and ``block_size`` of :func:`prdc`.

    Returns:
        float64 [len(nearest_k)] by name.

    Raises:
        ValueError: as :func:`prdc`.
    """
    return evaluate(real_features, fake_features, nearest_k, **options)[0]


def evaluate(
    real_features: Tensor,
    fake_features: Tensor,
    nearest_k: Sequence[int],
    *,
    inclusive: bool = False,
    metrics: Sequence[Name] = NAMES,
    standard_errors: bool = False,
    per_sample: bool = False,
    block_size: int | None = None,
    shards: Shards | None = None,
) -> tuple[dict[str, Tensor], PRDCSamples | None]:
    """What :func:`prdc` and :func:`prdc_sweep` return; the samples are those of the first k.

    Every process of ``shards`` has the same features and gets the same result, each does its share of the work.
    """
    shards = shards or Shards()
    wanted = [name for name in NAMES if name in metrics]
    unknown = sorted(set(metrics) - set(NAMES))
    if unknown or not wanted:
        raise ValueError(f"metrics {list(metrics)} must be some of {', '.join(NAMES)}")
    real, fake = _pair(real_features, fake_features)
    sets = {REAL: real, FAKE: fake}
    with_recall = "recall" in wanted
    for k in nearest_k:
        _check_sizes(len(real), len(fake), k)
        if with_recall and len(fake) <= k:
            raise ValueError(
                f"recall with nearest_k={k} needs at least {k + 1} fake samples, there are "
                f"{len(fake)}; use more samples, a smaller nearest_k, or leave recall out of metrics"
            )
    distances = Distances(real, fake, block_size=block_size)
    ranks = {side: list(nearest_k) for side in ((REAL, FAKE) if with_recall else (REAL,))}
    if standard_errors:  # they need the balls of k + 1 as well
        ranks = {
            side: ks + [min(k + 1, len(sets[side]) - 1) for k in ks] for side, ks in ranks.items()
        }
    balls: dict[int, Balls] = {}
    neighbours: dict[int, Tensor] = {}
    for side, ks in ranks.items():
        rows = shards.rows(len(sets[side]))
        squared, found = distances.nearest(side, side, ks, rows)
        neighbours[side] = shards.whole(found, len(sets[side]), 0)
        squared = shards.whole(squared, len(sets[side]), 1)
        balls[side] = Balls(squared, len(sets[1 - side]), inclusive)
    limits = {side: ball.squared.amax(0) for side, ball in balls.items()}
    for of_reals, of_fakes in distances.pairs_within(
        REAL, shards.rows(len(real)), FAKE, limits[REAL], limits.get(FAKE)
    ):
        assert of_reals is not None
        balls[REAL].add(distances, (REAL, FAKE), of_reals, transposed=False)
        if of_fakes is not None:
            balls[FAKE].add(distances, (REAL, FAKE), of_fakes, transposed=True)
    for ball in balls.values():
        ball.share(shards)

    values: dict[str, list[Tensor]] = {name: [] for name in wanted}
    errors: dict[str, list[Tensor]] = {f"{name}_se": [] for name in wanted}
    for position, k in enumerate(nearest_k):
        found_values = _from_counts(balls[REAL], position, k)
        found_values.pop("recall", None)
        if with_recall:
            found_values["recall"] = _from_counts(balls[FAKE], position, k)["precision"]
        for name in wanted:
            values[name].append(found_values[name])
        if standard_errors:
            found_errors = _standard_errors(balls[REAL], neighbours[REAL], position, k)
            if with_recall:
                found_errors["recall"] = _standard_errors(
                    balls[FAKE], neighbours[FAKE], position, k
                )["precision"]
            for name in wanted:
                errors[f"{name}_se"].append(found_errors[name])
    found_all = values | errors if standard_errors else values
    result = {name: torch.stack(parts) for name, parts in found_all.items()}
    samples = _samples(distances, balls, shards) if per_sample else None
    return result, samples


def _from_counts(balls: Balls, position: int, k: int) -> dict[str, Tensor]:
    per_ball, per_point = balls.per_ball[position], balls.per_point[position]
    return {
        "precision": (per_point > 0).double().mean(),
        "density": per_point.sum().double() / (k * len(per_point)),
        "coverage": (per_ball > 0).double().mean(),
    }


def _standard_errors(balls: Balls, neighbours: Tensor, position: int, k: int) -> dict[str, Tensor]:
    """Delete-one jackknife over both samples, from counts alone.

    It tends to be too large (Efron and Stein, "The Jackknife Estimate of Variance", 1981), for coverage up to
    twice.

    Without point j: its own contributions are gone. Without centre i: its ball is gone, and the balls of those that
    have i among their k nearest reach to their next neighbour. Both are exact for density and coverage. For precision
    a deleted centre uncovers the points that lie in its ball only; that larger neighbouring balls take some of them
    over is left out.
    """
    grown = balls.per_ball.shape[0] // 2 + position
    per_ball, larger = balls.per_ball[position], balls.per_ball[grown]
    per_point = balls.per_point[position]
    centres, points = len(per_ball), len(per_point)
    near = neighbours[:, :k].flatten()

    def of_neighbours(change: Tensor) -> Tensor:
        return torch.zeros_like(change).index_add_(0, near, change.repeat_interleave(k))

    def alone(counts: Tensor, which: Tensor, owners: int) -> Tensor:
        return torch.bincount(which[counts == 1], minlength=owners)

    covered = (per_ball > 0).long()
    uncovers_centre = alone(per_ball, balls.of_ball[position], points)
    uncovers_point = alone(per_point, balls.of_point[position], centres)
    of_points = {
        "precision": (per_point > 0).double() / (points - 1),
        "density": per_point.double() / (k * (points - 1)),
        "coverage": uncovers_centre.double() / centres,
    }
    of_centres = {
        "precision": uncovers_point.double() / points,
        "density": (per_ball - of_neighbours(larger - per_ball)).double() / (k * points),
        "coverage": (covered - of_neighbours((larger > 0).long() - covered)).double()
        / (centres - 1),
    }
    enough = centres > k + 1 and points > 1
    return {
        name: torch.sqrt(_jackknife(of_points[name]) + _jackknife(of_centres[name]))
        if enough
        else torch.full((), torch.nan, dtype=torch.float64, device=per_ball.device)
        for name in of_points
    }


def _jackknife(changes: Tensor) -> Tensor:
    """Variance from what the value changes by when each sample is left out [n]."""
    return (changes - changes.mean()).square().sum() * (len(changes) - 1) / len(changes)


def _samples(distances: Distances, balls: dict[int, Balls], shards: Shards) -> PRDCSamples:
    nearest = {}
    for side in (REAL, FAKE):
        count = len(distances.sets[side])
        squared, found = distances.nearest(side, 1 - side, [1], shards.rows(count))
        length = shards.whole(squared, count)[0].sqrt() * distances.unit
        nearest[side] = (shards.whole(found, count, 0)[:, 0], length)
    of_real = balls[FAKE].per_point[0] if FAKE in balls else nearest[REAL][0].new_empty(0)
    return PRDCSamples(
        balls[REAL].per_point[0],
        balls[REAL].per_ball[0],
        of_real,
        balls[REAL].squared[0].sqrt() * distances.unit,
        *nearest[FAKE],
        *nearest[REAL],
    )


def _checked(features: Tensor, name: str) -> Tensor:
    """float32 or float64 [n, D], finite."""
    features = torch.as_tensor(features).detach()
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{name} features have shape {list(features.shape)}; expected [samples, dimensions]"
        )
    if features.dtype != torch.float64:
        features = features.float()
    bad = ~features.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(features)} {name} samples have NaN or infinite features, "
            f"the first is number {int(bad.nonzero()[0])}"
        )
    return features


def _pair(real_features: Tensor, fake_features: Tensor) -> tuple[Tensor, Tensor]:
    real, fake = _checked(real_features, "real"), _checked(fake_features, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"real features have {real.shape[1]} dimensions, fake features {fake.shape[1]}; "
            "take both from the same layer of the same network"
        )
    return real, fake


def knn_radii(features: Tensor, nearest_k: int | Sequence[int] = 5) -> Tensor:
    """Distance of each point to its k-th nearest other point.

    Args:
        features: [N, D].
        nearest_k: k < N, or several.

    Returns:
        float64 [N], or [len(nearest_k), N].

    Raises:
        ValueError: too few points, or features that are not finite.
    """
    points = _checked(features, "the")
    ks = [nearest_k] if isinstance(nearest_k, int) else list(nearest_k)
    for k in ks:
        _check_sizes(len(points), 1, k)
    distances = Distances(points)
    radii = distances.nearest(0, 0, ks)[0].sqrt() * distances.unit
    return radii[0] if isinstance(nearest_k, int) else radii


# ------------------------------------------------------------------ relatives
def improved_precision_recall(
    real_features: Tensor, fake_features: Tensor, nearest_k: int = 3
) -> tuple[Tensor, Tensor]:
    """Precision and recall as Kynkaanniemi et al. define them: closed balls, k = 3.

    Args:
        real_features: [N, D].
        fake_features: [M, D].
        nearest_k: k.

    Returns:
        (precision, recall), float64 scalars in [0, 1].

    Raises:
        ValueError: as :func:`prdc`.
    """
    values = prdc(
        real_features, fake_features, nearest_k, inclusive=True, metrics=("precision", "recall")
    )
    return values["precision"], values["recall"]


def realism_score(
    real_features: Tensor,
    fake_features: Tensor,
    nearest_k: int = 3,
    percentile: float = 50,
    variant: Literal["paper", "reference"] = "paper",
) -> Tensor:
    """How realistic each fake is: ``max_i r_i / d(X_i, Y_j)`` over the reals with the smaller radii.

    Above 1 the fake lies in the ball of a real. Reals with large radii, outliers, would flatter any fake.

    Args:
        real_features: [N, D].
        fake_features: [M, D].
        nearest_k: k of the radii.
        percentile: radii up to this percentile count, in (0, 100].
        variant: ``paper``, eq. 3; ``reference``, the released code: ``max_i r_i^2 / (d^2 + 1e-5)``.

    Returns:
        float64 [M], infinite for a copy of a real (``paper``).

    Raises:
        ValueError: as :func:`prdc`, or a percentile outside (0, 100].
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} must be in (0, 100]")
    distances = _space(real_features, fake_features, nearest_k)
    squared = distances.nearest(REAL, REAL, [nearest_k])[0][0]
    limit = squared.sqrt().quantile(percentile / 100)
    squared = torch.where(squared.sqrt() <= limit, squared, 0.0)
    if variant == "reference":
        return distances.largest_ratio(REAL, squared, FAKE, 1e-5 / distances.unit**2)
    return distances.largest_ratio(REAL, squared, FAKE).sqrt()


def authenticity(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """Whether each fake is more than a slightly moved copy of a real (Alaa et al. 2022).

    A fake is authentic if it is farther from its nearest real than that real is from the nearest other real.

    Args:
        real_features: [N, D], N > 1.
        fake_features: [M, D].

    Returns:
        bool [M]; the metric is its mean.

    Raises:
        ValueError: as :func:`prdc`.
    """
    distances = _space(real_features, fake_features, 1)
    squared, nearest = distances.nearest(FAKE, REAL, [1])
    between_reals = distances.nearest(REAL, REAL, [1])[0][0]
    return squared[0] > between_reals[nearest[:, 0]]


def probabilistic_precision_recall(
    real_features: Tensor, fake_features: Tensor, nearest_k: int = 4, scale: float = 1.2
) -> tuple[Tensor, Tensor]:
    """P-precision and P-recall (Park and Kim 2023): balls of one size, whose edge is soft.

    With ``R = scale * mean_i NND_k(X_i)``: ``P-precision = mean_j [1 - prod_i min(1, d(X_i, Y_j) / R)]``; P-recall is
    the same with the roles exchanged. Every pair closer than R is computed in float64, so data that are dense
    compared to R take time.

    Args:
        real_features: [N, D].
        fake_features: [M, D].
        nearest_k: k.
        scale: a.

    Returns:
        (P-precision, P-recall), float64 scalars in [0, 1].

    Raises:
        ValueError: as :func:`prdc`, or a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale={scale} must be positive")
    distances = _space(real_features, fake_features, nearest_k)
    if len(fake_features) <= nearest_k:
        raise ValueError(
            f"nearest_k={nearest_k} needs at least {nearest_k + 1} fake samples, there are "
            f"{len(fake_features)}"
        )
    real, fake = distances.sets
    radius = {
        side: scale * distances.nearest(side, side, [nearest_k])[0][0].sqrt().mean()
        for side in (REAL, FAKE)
    }
    limits = {side: radius[side].square() for side in radius}
    logs = {
        side: real.new_zeros(len(distances.sets[1 - side]), dtype=torch.float64) for side in radius
    }
    for of_reals, of_fakes in distances.pairs_within(
        REAL,
        range(len(real)),
        FAKE,
        limits[REAL].expand(len(real)),
        limits[FAKE].expand(len(fake)),
    ):
        for side, pairs in ((REAL, of_reals), (FAKE, of_fakes)):
            assert pairs is not None
            length = distances.squared(REAL, pairs.rows, FAKE, pairs.columns).sqrt()
            soft = torch.where(length == 0, 0.0, (length / radius[side]).clamp(max=1))
            logs[side].index_add_(0, pairs.columns if side == REAL else pairs.rows, soft.log())
    precision, recall = (-logs[side].expm1().mean() for side in (REAL, FAKE))
    return precision, recall


def _space(real_features: Tensor, fake_features: Tensor, nearest_k: int) -> Distances:
    real, fake = _pair(real_features, fake_features)
    _check_sizes(len(real), len(fake), nearest_k)
    return Distances(real, fake)


# ------------------------------------------------------------------ the metric
class PrecisionRecallDensityCoverage(Metric):
    """:func:`prdc` over all batches and processes.

    Features are gathered once, every process then does its share of the distances, and integer counts are summed: the
    values are the same for any number of processes, any order and any batch size. A process may have no batch.

    After ``compute`` the attributes ``features`` (the two sets that were compared, in the order of their indices),
    ``samples`` (:class:`PRDCSamples`) and ``curve`` (metric name to float64 [len(sweep)]) tell more.

    Args:
        feature_extractor: network from images [B, C, H, W] to features [B, D]; None if ``update`` gets features.
        nearest_k: k.
        sweep: further k's of which ``curve`` is made in the same pass.
        inclusive: count the surface of the balls.
        metrics: which to compute.
        standard_errors: add ``NAME_se``.
        per_sample: fill ``samples``.
        reset_real_features: ``reset`` also forgets the real features; otherwise they serve the next fakes.
        max_samples: at most so many of each set, drawn by their indices, the same for any number of processes.
        kwargs: those of ``torchmetrics.Metric``.

    Raises:
        ValueError: impossible arguments.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    real_features: list[Tensor]
    fake_features: list[Tensor]
    real_indices: list[Tensor]
    fake_indices: list[Tensor]

    def __init__(
        self,
        feature_extractor: torch.nn.Module | None = None,
        nearest_k: int = 5,
        sweep: Sequence[int] = (),
        inclusive: bool = False,
        metrics: Sequence[Name] = NAMES,
        standard_errors: bool = True,
        per_sample: bool = False,
        reset_real_features: bool = True,
        max_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for k in (nearest_k, *sweep):
            if k < 1:
                raise ValueError(f"nearest_k={k} must be at least 1")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples={max_samples} must be at least 1")
        self.feature_extractor = feature_extractor
        self.nearest_k = nearest_k
        self.sweep = list(sweep)
        self.inclusive = inclusive
        self.metrics = list(metrics)
        self.standard_errors = standard_errors
        self.per_sample = per_sample
        self.reset_real_features = reset_real_features
        self.max_samples = max_samples
        self.features: tuple[Tensor, Tensor] | None = None
        self.samples: PRDCSamples | None = None
        self.curve: dict[str, Tensor] = {}
        for side in ("real", "fake"):
            self.add_state(f"{side}_features", default=[], dist_reduce_fx="cat")
            self.add_state(f"{side}_indices", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, *, real: bool, indices: Tensor | None = None) -> None:
        """Adds a batch of one of the two sets.

        Args:
            features: [B, D] (float64 is kept, all else becomes float32), or images for the feature extractor.
            real: which set.
            indices: positions in the dataset [B]. Samples that come twice, as samplers pad with, count once. Give
                them always or never.

        Raises:
            ValueError: features of another shape or dimension, NaN or infinite ones.
        """
        if self.feature_extractor is not None:
            with torch.no_grad():
                features = self.feature_extractor(features)
        side = "real" if real else "fake"
        features = _checked(features, side)
        for other in (*self.real_features[:1], *self.fake_features[:1]):
            if other.shape[1] != features.shape[1]:
                raise ValueError(
                    f"{side} features have {features.shape[1]} dimensions, those before "
                    f"{other.shape[1]}; take all from the same layer of the same network"
                )
        batches, positions = getattr(self, f"{side}_features"), getattr(self, f"{side}_indices")
        if len(batches) and (indices is None) == bool(len(positions)):
            raise ValueError(f"indices were given for some batches of {side} samples only")
        batches.append(features)
        if indices is not None:
            positions.append(indices.detach().long().to(features.device))

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Only updates: a value for a batch would mean nothing."""
        self.update(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The values by name, float64 scalars, with ``expected_coverage`` and ``normalized_coverage`` beside them.

        Raises:
            ValueError: as :func:`prdc`.
        """
        real, fake = self._set("real"), self._set("fake")
        self.features = (real, fake)
        shards = Shards(self._is_synced, self.process_group)
        ks = [self.nearest_k, *(k for k in self.sweep if k != self.nearest_k)]
        swept, self.samples = evaluate(
            real,
            fake,
            ks,
            inclusive=self.inclusive,
            metrics=self.metrics,
            standard_errors=self.standard_errors,
            per_sample=self.per_sample,
            shards=shards,
        )
        order = [ks.index(k) for k in self.sweep]
        self.curve = {name: value[order] for name, value in swept.items()}
        values = {name: value[0] for name, value in swept.items()}
        if "coverage" in values:
            expected = expected_coverage(len(real), len(fake), self.nearest_k)
            values["expected_coverage"] = torch.tensor(expected, dtype=torch.float64)
            values["normalized_coverage"] = values["coverage"] / expected
        self._warn(real, fake)
        return values

    def reset(self) -> None:
        """Forgets the samples, the real ones only if ``reset_real_features``."""
        kept = (list(self.real_features), list(self.real_indices))
        super().reset()
        if not self.reset_real_features:
            self.real_features, self.real_indices = kept
        self.features = self.samples = None

    def _set(self, side: str) -> Tensor:
        features, indices = getattr(self, f"{side}_features"), getattr(self, f"{side}_indices")
        if not len(features):
            raise ValueError(f"no {side} sample was added; call update(..., real={side == 'real'})")
        features = dim_zero_cat(features)
        if not len(indices):
            if self.max_samples is not None and len(features) > self.max_samples:
                raise ValueError("max_samples needs the indices of the samples, see update")
            return features
        _, first = _unique_first(dim_zero_cat(indices))
        if self.max_samples is not None and len(first) > self.max_samples:
            generator = torch.Generator().manual_seed(mix("prdc samples", side))
            drawn = torch.randperm(len(first), generator=generator)[: self.max_samples]
            first = first[drawn.sort().values.to(first.device)]
        return features[first]

    def _warn(self, real: Tensor, fake: Tensor) -> None:
        expected = expected_coverage(len(real), len(fake), self.nearest_k)
        if expected < 0.8:
            rank_zero_warn(
                f"with {len(real)} real and {len(fake)} fake samples and nearest_k={self.nearest_k} even a "
                f"perfect generator has a coverage of {expected:.3f}; compare as many fakes as reals, or "
                "raise nearest_k (choose_nearest_k tells)"
            )
        if self.samples is not None and not self.inclusive:
            empty = int((self.samples.real_radius == 0).sum())
            if empty:
                rank_zero_warn(
                    f"{empty} of {len(real)} real samples have {self.nearest_k} exact copies among the real "
                    "samples; their balls are empty. Remove duplicates, or use inclusive=True"
                )

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """A process without a batch takes part with no rows of the right width and type."""
        here = torch.zeros(4, dtype=torch.long, device=self.device)
        for position, side in enumerate(("real", "fake")):
            features = getattr(self, f"{side}_features")
            if len(features):
                features = dim_zero_cat(features)
                wide = features.dtype == torch.float64
                here[0], here[1] = features.shape[1], max(int(here[1]), int(wide))
                here[2 + position] = 1 + int(len(getattr(self, f"{side}_indices")) > 0)
        group = kwargs.get("process_group") or self.process_group
        everywhere = [torch.zeros_like(here) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everywhere, here, group=group)
        table = torch.stack(everywhere)
        widths = table[:, 0][table[:, 0] > 0].unique().tolist()
        if len(widths) > 1:
            raise ValueError(f"processes have features of {widths} dimensions; all must be equal")
        dtype = torch.float64 if table[:, 1].any() else torch.float32
        for position, side in enumerate(("real", "fake")):
            kinds = table[:, 2 + position]
            if set(kinds.tolist()) >= {1, 2}:
                raise ValueError(f"some processes gave indices of {side} samples, others did not")
            if not kinds.any():
                continue
            parts = getattr(self, f"{side}_features")
            whole = dim_zero_cat(parts).to(dtype) if len(parts) else None
            if whole is None:
                whole = torch.empty(0, widths[0], dtype=dtype, device=self.device)
            setattr(self, f"{side}_features", [whole])
            if (kinds == 2).any() and not len(getattr(self, f"{side}_indices")):
                empty = torch.empty(0, dtype=torch.long, device=self.device)
                setattr(self, f"{side}_indices", [empty])
        super()._sync_dist(*args, **kwargs)


PRDC = PrecisionRecallDensityCoverage


def _unique_first(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values in order and the first position of each."""
    values, inverse = indices.unique(return_inverse=True)
    positions = torch.arange(len(indices), device=indices.device)
    first = torch.full_like(values, len(indices)).scatter_reduce_(0, inverse, positions, "amin")
    return values, first
