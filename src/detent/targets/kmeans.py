"""Fits of a few levels to numbers on a line: k-means, and the best scaled ternary set.

Both sort each group once and then look at sums of sorted runs only. Memory stays at about one more copy of the weights
(in float32 where they are shorter), and what is summed in parallel is summed in an order that does not change, so that
every rank finds the same levels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from detent.targets.base import compute_dtype

__all__ = ["kmeans", "sorted_rows", "ternary_scale"]

_RUNS = 1 << 16  # sorted numbers of a group that Lloyd's rounds look at; longer groups are cut into as many runs
_WIDEST = 256  # runs, the widest of a group, of which each number is looked at: there may be as many levels
_ROUNDS = 100
_PIECE = 1 << 19  # numbers handled at a time in float64


def kmeans(x: Tensor, sizes: Tensor, k: int, pinned: bool) -> Tensor:
    """Up to k levels a group with a small squared error: Lloyd's algorithm from two starts, the better one kept.

    The starts are k levels evenly spaced over the range, and k levels as dense as the cube root of the numbers' own
    density, which is the best for large k. A level that serves no number moves to the far end of the cluster with the
    largest error. Groups of more than 2^16 numbers are summed up in 2^16
    runs of neighbours first, but for the runs that span most, at far outliers and wide gaps, whose numbers stay single;
    one last round on all numbers makes every level the exact mean of those it serves.

    Args:
        x: matrix (groups, numbers), any floating dtype; a shorter group ends in `inf`.
        sizes: numbers of each group, int64.
        k: levels, >= 2.
        pinned: one of the levels is 0, whatever the numbers are.

    Returns:
        (groups, k) levels in float64, ascending; where a group has fewer distinct numbers the largest is repeated.

    Example:
        >>> x = torch.tensor([[1.0, 1.1, 5.0, 5.2, 9.0, 9.1]])
        >>> kmeans(x, torch.tensor([6]), 3, False).round(decimals=2)
        tensor([[1.0500, 5.1000, 9.0500]], dtype=torch.float64)

    Reference: Lloyd, "Least squares quantization in PCM", 1982; the starts are those of Han et al., "Deep Compression",
    arXiv 1510.00149, section 3.2, and of Panter and Dite, "Quantization distortion in pulse-count modulation", 1951.
    """
    found = []
    step = max(1, _PIECE // x.shape[1])
    for first in range(0, x.shape[0], step):
        ordered = sorted_rows(x[first : first + step])
        counts = sizes[first : first + step].cpu()
        points = _Points(*_runs(ordered, counts))
        starts = [_lloyd(points, start, pinned) for start in (_spread(points, k), _companded(points, k))]
        levels = starts[0]
        for other in starts[1:]:
            levels = torch.where((points.error(other) < points.error(levels)).unsqueeze(1), other, levels)
        served = points.between(points.below, points.edges(levels))
        if ordered.shape[1] > _RUNS:
            # By the numbers, not by the runs: a level of few numbers may serve no run, and yet be needed.
            levels, served = _exact_means(ordered, counts, levels, pinned)
        found.append(_tidy(levels, served, pinned))
    return torch.cat(found).to(x.device)


def ternary_scale(size: Tensor) -> Tensor:
    """The a >= 0 for which {-a, 0, a} has the least squared error on each group, exactly.

    With the k largest |w| on +-a the best a is their mean, and the error is less by (sum of the k largest)^2 / k than
    that of zeros alone; sorting tells the best k.

    Args:
        size: matrix (groups, |w|), >= 0, any floating dtype; shorter groups end in zeros.

    Returns:
        (groups,) in float64.

    Example:
        >>> ternary_scale(torch.tensor([[1.0, 0.9, 0.1, 0.0]]))
        tensor([0.9500], dtype=torch.float64)

    Reference: the optimum that Li et al., "Ternary Weight Networks", arXiv 1605.04711, section 2.2, approximate.
    """
    found = []
    columns = size.shape[1]
    step = max(1, _PIECE // columns)
    for first in range(0, size.shape[0], step):
        ordered = sorted_rows(size[first : first + step])
        rows = len(ordered)
        total = torch.zeros((rows, 1), dtype=torch.float64)
        best, gain = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
        width = max(1, _PIECE // rows)
        for past in range(columns, 0, -width):
            block = ordered[:, max(0, past - width) : past].flip(1).double().cpu()
            sums = block.cumsum(1).add_(total)
            total = sums[:, -1:].clone()
            counts = torch.arange(columns - past + 1, columns - past + 1 + block.shape[1], dtype=torch.float64)
            # The root of the gain: its square could leave the range of float64.
            reached, at = (sums / counts.sqrt()).max(dim=1)
            mean = sums.gather(1, at.unsqueeze(1)).squeeze(1) / counts[at]
            best = torch.where(reached > gain, mean, best)
            gain = torch.maximum(reached, gain)
        found.append(best)
    return torch.cat(found).to(size.device)


def sorted_rows(x: Tensor) -> Tensor:
    """Each row in ascending order, in memory of its own and at least in float32."""
    dtype = compute_dtype(x.dtype)
    if x.device.type != "cpu":
        return x.to(dtype).sort(dim=1).values
    rows = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    # NumPy sorts in place; torch would write positions of 8 bytes a number beside the values.
    rows.numpy().sort(axis=1)
    return rows


def _pieces(first: int, past: int) -> Iterator[tuple[int, int]]:
    for start in range(first, past, _PIECE):
        yield start, min(start + _PIECE, past)


def _runs(ordered: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, count) of up to 2^16 runs of neighbours a row, in float64 on the CPU; an empty run has mean inf.

    Where there are more numbers than that, those of the widest runs stand for themselves, with count 1.
    """
    rows, columns = ordered.shape
    length = -(-columns // _RUNS)
    runs = -(-columns // length)
    counts = (sizes.unsqueeze(1) - torch.arange(runs) * length).clamp(0, length).double()
    if length == 1:
        return ordered.double().cpu(), counts
    sums = torch.empty((rows, runs), dtype=torch.float64)
    width = max(1, _PIECE // (rows * length))
    for first in range(0, runs, width):
        part = ordered[:, first * length : (first + width) * length].double()
        missing = -part.shape[1] % length
        part = torch.nn.functional.pad(part.masked_fill_(part.isinf(), 0.0), (0, missing))
        sums[:, first : first + width] = part.reshape(rows, -1, length).sum(2).cpu()
    return _apart(ordered, torch.where(counts > 0, sums / counts, torch.inf), counts, length)


def _apart(ordered: Tensor, means: Tensor, counts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The runs' (mean, count), with the numbers of the widest of them in place of their mean.

    The mean of a run that an outlier ends, or that a gap parts, lies where there are no numbers, and draws a level.
    """
    first = (torch.arange(counts.shape[1]) * length).expand_as(counts)
    low, high = (_at(ordered, place) for place in (first, first + (counts.long() - 1).clamp_min(0)))
    widest = torch.where(counts > 0, high - low, -1.0).argsort(dim=1, descending=True, stable=True)[:, :_WIDEST]
    within = torch.arange(length)
    live = (within < counts.gather(1, widest).unsqueeze(2)).flatten(1)
    places = (widest.unsqueeze(2) * length + within).flatten(1).clamp_max(ordered.shape[1] - 1)
    numbers = torch.where(live, _at(ordered, places), torch.inf)
    points, order = torch.cat([means.scatter(1, widest, torch.inf), numbers], dim=1).sort(dim=1, stable=True)
    return points, torch.cat([counts.scatter(1, widest, 0.0), live.double()], dim=1).gather(1, order)


def _at(ordered: Tensor, places: Tensor) -> Tensor:
    return ordered.gather(1, places.to(ordered.device)).double().cpu()


class _Points:
    """Weighted points, ascending in each row, with what is needed to sum up any stretch of them."""

    def __init__(self, points: Tensor, counts: Tensor) -> None:
        self.points, self.counts = points, counts
        mass = torch.where(counts > 0, points, 0.0).mul_(counts)
        self.below = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
        self.sums = torch.nn.functional.pad(mass.cumsum(1), (1, 0))
        self.squares = torch.nn.functional.pad((mass * torch.where(counts > 0, points, 0.0)).cumsum(1), (1, 0))
        self.live = (counts > 0).sum(1, keepdim=True)
        self.low = points[:, :1]
        self.high = points.gather(1, self.live - 1)

    def edges(self, levels: Tensor) -> Tensor:
        """(rows, k + 1): level j serves points edges[j] to edges[j + 1] - 1; a point half-way goes down."""
        bounds = torch.searchsorted(self.points, _middles(levels), right=True).minimum(self.live)
        return torch.cat([torch.zeros_like(self.live), bounds, self.live], dim=1)

    def between(self, cumulated: Tensor, edges: Tensor) -> Tensor:
        """Sums over the stretches between edges."""
        return cumulated.gather(1, edges).diff(dim=1)

    def error(self, levels: Tensor) -> Tensor:
        """Squared error of each row, up to a constant that hangs on the points alone."""
        edges = self.edges(levels)
        return (levels * (levels * self.between(self.below, edges) - 2 * self.between(self.sums, edges))).sum(1)


def _middles(levels: Tensor) -> Tensor:
    return (levels[:, :-1] + levels[:, 1:]) / 2


def _spread(points: _Points, k: int) -> Tensor:
    return points.low + (points.high - points.low) * ((torch.arange(k, dtype=torch.float64) + 0.5) / k)


def _companded(points: _Points, k: int) -> Tensor:
    """Levels where density^(1/3), summed up from the left, is (j + 1/2) / k of the whole."""
    gaps = points.points.minimum(points.high).diff(dim=1, prepend=points.low)
    grown = (points.counts.pow(1 / 3) * gaps.pow(2 / 3)).cumsum(1)
    share = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    at = torch.searchsorted(grown, grown[:, -1:] * share)
    return points.points.gather(1, at.minimum(points.live - 1))


def _lloyd(points: _Points, levels: Tensor, pinned: bool) -> Tensor:
    """Means of clusters, clusters of means, until nothing moves."""
    fixed = torch.zeros_like(levels, dtype=torch.bool)
    if pinned:
        fixed.scatter_(1, levels.abs().argmin(dim=1, keepdim=True), True)
    levels = levels.masked_fill(fixed, 0.0)
    for _ in range(_ROUNDS):
        edges = points.edges(levels)
        counts = points.between(points.below, edges)
        sums = points.between(points.sums, edges)
        empty = counts == 0
        means = torch.where(empty, levels, sums / counts.clamp_min(1.0))
        # The mean of equal numbers may miss them by a rounding; they are served exactly.
        last = points.points.shape[1] - 1
        first_of = points.points.gather(1, edges[:, :-1].clamp_max(last))
        last_of = points.points.gather(1, (edges[:, 1:] - 1).clamp_min(0))
        means = torch.where(~empty & (first_of == last_of), first_of, means).masked_fill(fixed, 0.0)
        if bool((empty & ~fixed).any()):
            squares = points.between(points.squares, edges)
            worth = squares - means * (2 * sums - means * counts)
            means, fixed = _repair(means, fixed, empty, first_of, last_of, worth)
        if torch.equal(means, levels):
            break
        levels = means
    return levels


def _repair(
    levels: Tensor, fixed: Tensor, empty: Tensor, first_of: Tensor, last_of: Tensor, worth: Tensor
) -> tuple[Tensor, Tensor]:
    """Levels that serve nothing go, one each, to the farther end of the clusters with the largest errors."""
    down, up = (levels - first_of).abs(), (last_of - levels).abs()
    far = torch.where(up > down, last_of, first_of)
    splits = ~empty & (torch.maximum(down, up) > 0)
    order = torch.where(splits, worth.clamp_min(0.0), -1.0).argsort(dim=1, descending=True, stable=True)
    spare = empty & ~fixed
    slots = (~spare).long().argsort(dim=1, stable=True)
    rank = torch.arange(levels.shape[1])
    filled = (rank < spare.sum(1, keepdim=True)) & (rank < splits.sum(1, keepdim=True))
    moved = levels.scatter(1, slots, torch.where(filled, far.gather(1, order), levels.gather(1, slots)))
    moved, places = moved.sort(dim=1, stable=True)
    return moved, fixed.gather(1, places)


def _exact_means(ordered: Tensor, sizes: Tensor, levels: Tensor, pinned: bool) -> tuple[Tensor, Tensor]:
    """One round on all numbers: each level the mean of those it serves, or the numbers themselves if there are few.

    Also returns how many numbers each level serves.
    """
    exact, served = levels.clone(), torch.zeros(levels.shape, dtype=torch.int64)
    for row, (numbers, size) in enumerate(zip(ordered, sizes.tolist(), strict=True)):
        values = _distinct(numbers[:size], levels.shape[1])
        if values is not None and pinned and not bool((values == 0).any()):
            values = torch.cat([values, values.new_zeros(1)]).sort().values
        if values is not None and len(values) <= levels.shape[1]:
            exact[row] = values[-1]
            exact[row, : len(values)] = values
            served[row] = 1  # or more: none of them is idle
            continue
        middles = _middles(levels[row : row + 1])[0].to(numbers.dtype).to(numbers.device)
        bounds = torch.searchsorted(numbers, middles, right=True).clamp_max(size).tolist()
        for j, (first, past) in enumerate(zip([0, *bounds], [*bounds, size], strict=True)):
            served[row, j] = past - first
            if past > first and not (pinned and float(levels[row, j]) == 0.0):
                total = sum(float(numbers[a:b].sum(dtype=torch.float64)) for a, b in _pieces(first, past))
                exact[row, j] = total / (past - first)
    return exact, served


def _distinct(numbers: Tensor, most: int) -> Tensor | None:
    """The distinct values of ascending numbers, in float64 on the CPU; `None` if there are more than `most`."""
    found = numbers[:1]
    for first, past in _pieces(1, len(numbers)):
        some = numbers[first - 1 : past]
        found = torch.cat([found, some[1:][some[1:] != some[:-1]]])
        if len(found) > most:
            return None
    return found.double().cpu()


def _tidy(levels: Tensor, served: Tensor, pinned: bool) -> Tensor:
    """Levels that serve nothing repeat the largest that does; -0.0 becomes +0.0."""
    spare = served == 0
    if pinned:
        spare &= levels != 0
    largest = levels.masked_fill(spare, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(spare, largest, levels).sort(dim=1).values + 0.0
