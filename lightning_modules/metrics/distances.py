"""Comparisons of Euclidean distances between many points: as fast as a float32 matrix product, as exact as float64.

Every pair of points gets a *lower bound* of its squared distance from one float32 matrix product; the bound's error
is known, so an upper bound follows. A comparison that the two bounds decide is decided. The few that they do not
decide (and ties, which no float32 product could decide) are made again in float64 from the original coordinates.
Blocks of the product are thrown away as they are made: memory is a copy of the points and one block.

Three things make the bounds tight: the points are moved so that a median lies at the origin (distances do not
change), they are scaled by a power of two, and long rows are multiplied in pieces of :data:`PIECE` columns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PIECE = 512
"""Columns that one float32 product sums up; the error bound grows with it, the time with its inverse."""

_CENTRE_SAMPLE = 1024
_PAIRS_AT_ONCE = 1 << 21  # coordinates of pairs held in float64: 16 MiB
_GROUPS = 256  # columns of a block are looked through in so many groups
_ROW_GROUP = 8  # rows are looked through so many at a time
_SPARE = 3  # neighbours kept beyond the k-th, so that rounding rarely hides one


class Pairs(NamedTuple):
    """Pairs of a row and a column whose distance may not exceed a limit.

    Attributes:
        rows: index of the row [P].
        columns: index of the column [P].
        lower: bound of the squared distance in units of the geometry, float64 [P].
        upper: likewise.
    """

    rows: Tensor
    columns: Tensor
    lower: Tensor
    upper: Tensor


class Distances:
    """Exact decisions about distances between the rows of point sets in one space.

    All squared distances are in the geometry's own unit, :attr:`unit` squared. Whatever the block size, the number of
    threads, the precision that is set for matrix products, or autocast: the decisions are those of float64 arithmetic
    on the coordinates as they are, squared differences summed in pairs (so equal on every device).

    Args:
        sets: point sets [N_s, D] on one device, float32 or float64 (float64 coordinates count in full).
        block_size: rows of a block; it has 64 times as many columns. None: 128, a block of 4 MiB; on a GPU 512.
    """

    def __init__(self, *sets: Tensor, block_size: int | None = None) -> None:
        self.sets = sets
        self.dim = sets[0].shape[1]
        self.device = sets[0].device
        self.rows_at_once = block_size or (128 if self.device.type == "cpu" else 512)
        self.columns_at_once = 64 * self.rows_at_once
        every = max(1, len(sets[0]) // _CENTRE_SAMPLE)
        # A median of some points will do: any origin is right, and outliers must not drag it away.
        centre = sets[0][::every].double().median(0).values
        spans = [
            (part.double() - centre).abs().max() for points in sets for part in self._chunks(points)
        ]
        largest = float(torch.stack(spans).max()) if self.dim else 0.0
        self.unit = 2.0 ** torch.tensor(largest).frexp().exponent.item() if largest else 1.0
        terms, pieces = min(self.dim + 3, PIECE), -(-(self.dim + 3) // PIECE)
        # Of `terms` products summed in any order, `pieces` partial sums, and rounded factors: each contributes
        # at most 2^-24 (|x| + |y|)^2. The rest is for terms of second order.
        self._error = 2.0**-24 * 1.05 * (terms + pieces + 8)
        self._underflow = (self.dim + 8) * 2.0**-120
        # Row i holds (|x|^2 (1 - error), 1, |x|, x), see _right.
        self._left = [self._prepared(points, centre) for points in sets]
        self._repeat: bool | None = None

    def _chunks(self, points: Tensor) -> Iterator[Tensor]:
        return iter(points.split(max(1, 2 * _PAIRS_AT_ONCE // max(1, self.dim))))

    def _prepared(self, points: Tensor, centre: Tensor) -> Tensor:
        left = torch.empty(len(points), self.dim + 3, dtype=torch.float32, device=self.device)
        done = 0
        for part in self._chunks(points):
            moved = (part.double() - centre) / self.unit
            squared = moved.square().sum(1)
            rows = left[done : done + len(part)]
            rows[:, 0] = squared * (1 - self._error)
            rows[:, 1] = 1
            rows[:, 2] = squared.sqrt()
            rows[:, 3:] = moved
            done += len(part)
        return left

    def _right(self, columns: Tensor) -> Tensor:
        """The factors that make ``left @ right.T`` the lower bound
        ``(|x|^2 + |y|^2)(1 - error) - 2 error |x||y| - 2 x.y``, that is ``|x - y|^2 - error (|x| + |y|)^2``.
        """
        right = columns * -2
        right[:, 0] = 1
        right[:, 1] = columns[:, 0]
        right[:, 2] *= self._error
        return right

    def _slack(self, a: int, rows: Tensor, b: int, columns: Tensor) -> Tensor:
        """Twice the error of the pairs' lower bounds: what lies between lower and upper bound [P]."""
        reach = self._left[a][rows, 2].double() + self._left[b][columns, 2].double()
        return reach.square() * (2.1 * self._error) + 2 * self._underflow

    def _tiles(self, a: int, rows: range, b: int) -> Iterator[tuple[int, int, Tensor]]:
        """Lower bounds of all pairs, block by block: (first row, first column, float32 [R, C]).

        C is a multiple of :data:`_GROUPS`; beyond the last point the bounds are infinite.
        """
        for start in range(0, len(self.sets[b]), self.columns_at_once):
            right = self._padded(self._right(self._left[b][start : start + self.columns_at_once]))
            for first in range(rows.start, rows.stop, self.rows_at_once):
                block = slice(first, min(first + self.rows_at_once, rows.stop))
                yield first, start, self._product(self._left[a][block], right)

    def _padded(self, right: Tensor) -> Tensor:
        missing = -len(right) % _GROUPS
        if not missing:
            return right
        padding = torch.zeros(missing, right.shape[1], device=self.device)
        padding[:, 1] = torch.inf
        return torch.cat([right, padding])

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        with full_precision(self.device):
            product = left[:, :PIECE] @ right[:, :PIECE].T
            for piece in range(PIECE, self.dim + 3, PIECE):
                part = slice(piece, piece + PIECE)
                product.addmm_(left[:, part], right[:, part].T)
        return product

    def squared(self, a: int, rows: Tensor, b: int, columns: Tensor) -> Tensor:
        """Squared distances of pairs in float64 [P], in units of ``unit`` squared.

        Differences are exact wherever float64 is, their squares are summed by halving: a fixed order, so that equal
        pairs get equal distances on every device and in every call.
        """
        if len(rows) > 4 * sum(map(len, self.sets)) and self._points_repeat():
            # Every distinct pair is computed once: collapsed generators make millions of equal ones.
            pairs = self._first[a][rows] * len(self._together) + self._first[b][columns]
            distinct, inverse = pairs.unique(return_inverse=True)
            i, j = distinct // len(self._together), distinct % len(self._together)
            return self._squared(self._together, i, self._together, j)[inverse]
        return self._squared(self.sets[a], rows, self.sets[b], columns)

    def _squared(self, left: Tensor, rows: Tensor, right: Tensor, columns: Tensor) -> Tensor:
        result = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        step = max(1, _PAIRS_AT_ONCE // max(1, self.dim))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            terms = left[rows[part]].double() - right[columns[part]].double()
            terms.div_(self.unit).square_()
            width = self.dim
            while width > 1:
                half = (width + 1) // 2
                terms[:, : width - half] += terms[:, half:width]
                width = half
            result[part] = terms[:, 0]
        return result

    def _points_repeat(self) -> bool:
        """Whether most points equal another one; finds out once."""
        if self._repeat is None:
            self._together = torch.cat([points.double() for points in self.sets])
            groups, group = self._together.unique(dim=0, return_inverse=True)
            self._repeat = 2 * len(groups) < len(group)
            first = torch.empty(len(groups), dtype=torch.long, device=self.device)
            first[group] = torch.arange(len(group), device=self.device)
            self._first = first[group].split([len(points) for points in self.sets])
        return self._repeat

    def nearest(
        self, a: int, b: int, ranks: Sequence[int], rows: range | None = None
    ) -> tuple[Tensor, Tensor]:
        """The neighbours of points of set ``a`` within set ``b``; within the same set a point is not its own.

        Args:
            a: number of the set of the queries.
            b: number of the set of the neighbours.
            ranks: wanted ranks k >= 1, each at most the number of neighbours.
            rows: queries, None for the whole set.

        Returns:
            Exact squared distances to the k-th nearest neighbours, float64 [len(ranks), R], and the neighbours in
            order of distance, int64 [R, max(ranks)].
        """
        rows = range(len(self.sets[a])) if rows is None else rows
        available = len(self.sets[b]) - (a == b)
        kept = min(max(ranks) + _SPARE, available)
        lower = torch.full((len(rows), kept), torch.inf, device=self.device)
        columns = torch.zeros(len(rows), kept, dtype=torch.long, device=self.device)
        for first, start, tile in self._tiles(a, rows, b):
            if a == b:
                _exclude_self(tile, first, start)
            part = slice(first - rows.start, first - rows.start + len(tile))
            values, found = _smallest(tile, min(kept, tile.shape[1]))
            if start or kept > values.shape[1]:
                values = torch.cat([lower[part], values], 1)
                found = torch.cat([columns[part], found + start], 1)
                values, chosen = values.topk(kept, largest=False)
                found = found.gather(1, chosen)
            lower[part], columns[part] = values, found
        queries = torch.arange(rows.start, rows.stop, device=self.device)
        squared, order, certain = self._ranked(a, queries, b, columns, lower, ranks, available)
        for part in (~certain).nonzero().flatten().split(max(1, self._full_rows(b))):
            squared[:, part], order[part] = self._nearest_of_all(a, queries[part], b, ranks)
        return squared, order

    def _full_rows(self, b: int) -> int:
        return self.rows_at_once * self.columns_at_once // max(1, len(self.sets[b]))

    def _nearest_of_all(
        self, a: int, queries: Tensor, b: int, ranks: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`nearest`, for queries with so many neighbours at nearly one distance that all are looked at."""
        everyone = torch.arange(len(self.sets[b]), device=self.device)
        lower = self._product(self._left[a][queries], self._right(self._left[b]))
        if a == b:
            lower[torch.arange(len(queries), device=self.device), queries] = torch.inf
        columns = everyone.expand(len(queries), -1)
        available = len(everyone) - (a == b)
        squared, order, _ = self._ranked(a, queries, b, columns, lower, ranks, available)
        return squared, order

    def _ranked(
        self,
        a: int,
        queries: Tensor,
        b: int,
        columns: Tensor,
        lower: Tensor,
        ranks: Sequence[int],
        available: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exact ranks among candidates [R, K] of which the lower bounds are known.

        Returns:
            Squared distances [len(ranks), R], neighbours [R, max(ranks)], and whether no column outside the
            candidates could change them [R].
        """
        count = max(ranks)
        low = lower.double() - self._underflow
        slack = self._slack(a, queries.repeat_interleave(columns.shape[1]), b, columns.flatten())
        high = low + slack.view_as(low)
        least, most = (bound.topk(count, largest=False).values for bound in (low, high))
        certain = low.amax(1) > most[:, -1]
        if columns.shape[1] >= available:
            certain.fill_(True)
        # A candidate matters for rank k if its bounds reach those of the k-th distance.
        matters = torch.zeros_like(low, dtype=torch.bool)
        for rank in ranks:
            of_rank = slice(rank - 1, rank)
            matters |= (low <= most[:, of_rank]) & (high >= least[:, of_rank])
        matters &= certain[:, None] & low.isfinite()
        values = (low + high) / 2
        row, position = matters.nonzero(as_tuple=True)
        values[row, position] = self.squared(a, queries[row], b, columns[row, position])
        values, order = values.topk(count, largest=False)
        squared = torch.stack([values[:, rank - 1] for rank in ranks])
        return squared, columns.gather(1, order), certain

    def pairs_within(
        self,
        a: int,
        rows: range,
        b: int,
        row_limit: Tensor | None = None,
        column_limit: Tensor | None = None,
    ) -> Iterator[tuple[Pairs | None, Pairs | None]]:
        """All pairs that may lie within a limit, block by block.

        Args:
            a: number of the set of the rows.
            rows: which of its points.
            b: number of the set of the columns.
            row_limit: squared distance for each row of the whole set, float64 [N_a].
            column_limit: likewise for each column [N_b].

        Yields:
            For each block the pairs within the row's limit and those within the column's (None without a limit);
            a pair whose upper bound exceeds the limit may or may not be within it.
        """
        row_bound = None if row_limit is None else _rounded_up(row_limit + self._underflow)
        column_bound = None
        if column_limit is not None:
            column_bound = _rounded_up(column_limit + self._underflow)
            padding = torch.full((_GROUPS,), -torch.inf, device=self.device)
            column_bound = torch.cat([column_bound, padding])
        for first, start, tile in self._tiles(a, rows, b):
            height, width = tile.shape
            of_rows = of_columns = None
            if row_bound is not None:
                found = _within_rows(tile, row_bound[first : first + height])
                of_rows = self._pairs(a, b, tile, *found, first, start)
            if column_bound is not None:
                found = _within_columns(tile, column_bound[start : start + width])
                of_columns = self._pairs(a, b, tile, *found, first, start)
            yield of_rows, of_columns

    def largest_ratio(self, a: int, weights: Tensor, b: int, offset: float = 0.0) -> Tensor:
        """``max_i weights[i] / (d(i, j)^2 + offset)`` for each point j of set ``b``.

        Args:
            a: number of the set of i.
            weights: not negative, float64 [N_a].
            b: number of the set of j.
            offset: added to the squared distance, in units of ``unit`` squared.

        Returns:
            float64 [N_b], infinite where a distance (and the offset) is 0.
        """
        best = torch.zeros(len(self.sets[b]), dtype=torch.float64, device=self.device)
        for first, start, tile in self._tiles(a, range(len(self.sets[a])), b):
            here = best[start : start + tile.shape[1]]
            low = tile[:, : len(here)].double().sub_(self._underflow).clamp_(min=0)
            at_most = weights[first : first + len(tile), None] / (low + offset)
            at_most.nan_to_num_(0, torch.inf)
            # The likeliest pair first: it leaves few others that could do better.
            for rows, columns in _candidates(at_most, here):
                squared = self.squared(a, rows + first, b, columns + start)
                ratios = (weights[rows + first] / (squared + offset)).nan_to_num_(0, torch.inf)
                here.scatter_reduce_(0, columns, ratios, "amax")
        return best

    def _pairs(
        self, a: int, b: int, tile: Tensor, rows: Tensor, columns: Tensor, first: int, start: int
    ) -> Pairs:
        lower = tile[rows, columns].double() - self._underflow
        rows, columns = rows + first, columns + start
        return Pairs(rows, columns, lower, lower + self._slack(a, rows, b, columns))

    def decided(self, a: int, b: int, pairs: Pairs, limits: Tensor) -> Tensor:
        """A value for each pair that compares with its limits as the exact squared distance does.

        Args:
            a: number of the set of the rows.
            b: number of the set of the columns.
            pairs: P pairs.
            limits: squared distances, float64 [L, P].

        Returns:
            float64 [P]: the exact squared distance where a limit lies between the bounds, else the upper bound.
        """
        unsure = ((pairs.upper >= limits) & (pairs.lower <= limits)).any(0)
        values = pairs.upper.clone()
        values[unsure] = self.squared(a, pairs.rows[unsure], b, pairs.columns[unsure])
        return values


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in float32: no TF32, no bfloat16, no autocast."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _exclude_self(tile: Tensor, first: int, start: int) -> None:
    """Point i is in row i - first and column i - start."""
    tile.diagonal(first - start).fill_(torch.inf)


def _smallest(tile: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest values of each row and their columns, in any order.

    They lie in the ``count`` groups of columns with the smallest minima, which spares a look at the rest.
    """
    rows, columns = tile.shape
    if columns < 4 * _GROUPS or count > _GROUPS // 4:
        chosen = _positions_of_smallest(tile, count)
        return tile.gather(1, chosen), chosen
    grouped = tile.view(rows, columns // _GROUPS, _GROUPS)
    groups = _positions_of_smallest(grouped.amin(1), count)
    members = grouped.gather(2, groups[:, None, :].expand(-1, columns // _GROUPS, -1)).flatten(1)
    chosen = _positions_of_smallest(members, count)
    member = chosen.div(count, rounding_mode="floor")
    return members.gather(1, chosen), member * _GROUPS + groups.gather(1, chosen - member * count)


def _positions_of_smallest(values: Tensor, count: int) -> Tensor:
    """Columns of the ``count`` smallest values of each row [R, count]."""
    if values.device.type != "cpu" or count == values.shape[1]:
        return values.topk(count, largest=False, sorted=False).indices
    # Several times faster than torch.topk on a CPU.
    return torch.from_numpy(np.argpartition(values.numpy(), count - 1, axis=1)[:, :count].copy())


def _within_rows(tile: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the values that do not exceed the bound of their row [R]."""
    grouped = tile.view(len(tile), -1, _GROUPS)
    row, group = _true_positions(grouped.amin(1) <= bound[:, None])
    hit, member = (grouped[row, :, group] <= bound[row, None]).nonzero(as_tuple=True)
    return row[hit], member * _GROUPS + group[hit]


def _within_columns(tile: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the values that do not exceed the bound of their column [C]."""
    if len(tile) % _ROW_GROUP:
        return _true_positions(tile <= bound)
    grouped = tile.view(-1, _ROW_GROUP, tile.shape[1])
    block, column = _true_positions(grouped.amin(1) <= bound)
    hit, member = (grouped[block, :, column] <= bound[column, None]).nonzero(as_tuple=True)
    return block[hit] * _ROW_GROUP + member, column[hit]


def _candidates(at_most: Tensor, best: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs with the largest bound of each column, then those whose bound exceeds what is ``best`` by then."""
    yield at_most.argmax(0), torch.arange(len(best), device=best.device)
    rows, columns = (at_most > best).nonzero(as_tuple=True)
    yield rows, columns


def _true_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the true entries; the number of columns is a multiple of 8."""
    if mask.device.type != "cpu":
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    # Few are true: eight at a time are looked at.
    words = mask.flatten().view(torch.int64).nonzero().flatten()
    word, bit = mask.view(-1, 8)[words].nonzero(as_tuple=True)
    flat = words[word] * 8 + bit
    rows = flat.div(mask.shape[1], rounding_mode="floor")
    return rows, flat - rows * mask.shape[1]


def _rounded_up(values: Tensor) -> Tensor:
    """float32 values that are not below the float64 ones."""
    return torch.nextafter(values.float(), torch.tensor(torch.inf, device=values.device))
