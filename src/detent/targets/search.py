"""Search among candidate grids for the one with the least squared error, exactly, in pieces that stay in the cache.

A passing tensor of some megabytes is freshly mapped at each use, which costs several times what is computed in it; so
everything here works on pieces with one buffer. The error of every candidate is bounded from both sides, by sums over a
histogram where rows are long, else by float32 sums of the errors themselves; only candidates whose bounds overlap are
tried in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["alternating", "error_bounds", "least_error", "piece_of"]

_CACHED = 1 << 16  # numbers a piece on a CPU: with its buffers a megabyte
_LAUNCHED = 1 << 24  # and on a GPU, where launches cost more than memory
_SHORTEST = 1024  # numbers of a row from which a histogram pays
_LONGEST = 1 << 13  # and up to which float32 sums tell candidates apart
_FEWEST, _MOST = 10, 14  # bins of a histogram, as powers of two
_TERMS = 1 << 18  # middles of all candidates of a block whose sums are looked up at a time
_BETWEEN = 8  # candidates tried between two looks at whether the others can be better
_FARTHEST = 40  # exponent of a largest weight up to which no square over- or underflows in float32


def piece_of(device: torch.device) -> int:
    """Numbers to handle at a time."""
    return _CACHED if device.type == "cpu" else _LAUNCHED


def least_error(
    w: Tensor, sizes: Tensor, choices: Callable[[slice], Tensor], n: int, zero: bool, dtype: torch.dtype
) -> Tensor:
    """For each row the scale, among its candidates, whose grid has the least squared error; the earliest of equals.

    The grid is the scale times the integers of size up to n, without 0 unless `zero`. Errors are those of float32 (or
    float64) differences, summed in float64.

    Args:
        w: matrix (groups, weights), any floating dtype; a shorter group ends in zeros.
        sizes: weights of each group, int64.
        choices: gives, for a slice of the rows, their candidates: (candidates, rows), the widest grid first.
        n: the largest integer.
        zero: whether 0 is one of the integers.
        dtype: dtype to compute in.

    Returns:
        (groups,) scales in the dtype of the candidates.

    Example:
        >>> w = torch.tensor([[1.0, 0.4, -0.6]])
        >>> least_error(w, torch.tensor([3]), lambda rows: torch.tensor([[1.0], [0.5]]), 1, True, torch.float32)
        tensor([0.5000])
    """
    rows, columns = w.shape
    count, step = len(choices(slice(0, 1))), piece_of(w.device)
    pays = columns >= _SHORTEST and count * n <= columns  # else there are more sums to look up than weights to try
    bounded = w.device.type == "cpu" and pays
    block = max(1, step // max(columns, 1))
    if bounded:
        block = max(1, min(block, _TERMS // (count * n)))
    search = _Search(n=n, zero=zero, dtype=dtype, device=w.device)
    found = []
    for first in range(0, rows, block):
        here = slice(first, min(first + block, rows))
        scales = choices(here)
        part, used = _in_range(w[here], scales, dtype)
        found.append(scales.gather(0, search.best(part, sizes[here], used, bounded)[None])[0])
    return torch.cat(found)


def alternating(w: Tensor, sizes: Tensor, n: int, zero: bool, rounds: int, dtype: torch.dtype) -> Tensor:
    """For each row the nearest integers of a scale and the best scale of these integers, in turn, until none moves.

    Args:
        w: matrix (groups, weights), any floating dtype; a shorter group ends in zeros.
        sizes: weights of each group, int64.
        n: the largest integer.
        zero: whether 0 is one of the integers.
        rounds: most rounds, >= 1.
        dtype: dtype to compute in.

    Returns:
        (groups,) scales, float64.

    Example:
        >>> alternating(torch.tensor([[1.0, 0.4, -0.6]]), torch.tensor([3]), 1, True, 20, torch.float32)
        tensor([0.6667], dtype=torch.float64)
    """
    rows, columns = w.shape
    block = max(1, piece_of(w.device) // max(columns, 1))
    search = _Search(n=n, zero=zero, dtype=dtype, device=w.device)
    firsts = range(0, rows, block)
    return torch.cat([search.settled(w[i : i + block], sizes[i : i + block], rounds) for i in firsts])


def _in_range(w: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and their candidates, times a power of two where squares would over- or underflow in float32."""
    tops = torch.maximum(w.amax(1), -w.amin(1)).to(dtype)
    exponent = torch.frexp(tops).exponent
    far = (exponent.abs() > _FARTHEST) & (tops > 0)
    if not bool(far.any()):
        return w, scales
    half = torch.where(far, exponent, 0) // 2
    units = [torch.ldexp(torch.ones_like(tops), power) for power in (-half, half - torch.where(far, exponent, 0))]
    return w.to(dtype) * units[0][:, None] * units[1][:, None], scales.to(dtype) * units[0] * units[1]


class _Buffers:
    """Tensors to write over, each as large as the largest asked for under its name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.held[name][:size].reshape(tuple(shape))

    def sizes_of(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """|w|, in the buffer of that name."""
        return self.get("size", w.shape, dtype).copy_(w).abs_()


class _Search:
    """What a search needs all the time: the grid, and the buffers."""

    def __init__(self, *, n: int, zero: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.zero, self.dtype, self.step = n, zero, dtype, piece_of(device)
        self.buffers = _Buffers(device)

    def best(self, w: Tensor, sizes: Tensor, scales: Tensor, bounded: bool) -> Tensor:
        """Which scale is the best of each row of a block, of equal ones the first."""
        if bounded:
            integers = torch.arange(0 if self.zero else 1, self.n + 1, dtype=torch.float64)
            levels = scales.double().unsqueeze(2) * integers
            low, high = error_bounds(w, sizes, levels, self.dtype, self.buffers)
        elif w.shape[1] <= _LONGEST:
            low, high = self.rough(w, sizes, scales)
        else:
            return self.least(w, sizes, scales)
        may = low <= high.amin(0)
        # In one product: how many there are of each row, and which it is where there is one.
        count = torch.arange(len(may), dtype=torch.float32, device=w.device)
        several, best = (torch.stack([torch.ones_like(count), count]) @ may.float()).long()
        open_yet = (several > 1).nonzero()[:, 0]
        if len(open_yet):
            may = may[:, open_yet]
            which, row = may.nonzero().unbind(1)
            order = torch.zeros((int(several.max()), len(open_yet)), dtype=torch.long, device=w.device)
            order[may.cumsum(0, dtype=torch.int32)[which, row].long() - 1, row] = which
            at = self.least(w[open_yet], sizes[open_yet], scales[:, open_yet].gather(0, order))
            best[open_yet] = order.gather(0, at[None])[0]
        return best

    def rough(self, w: Tensor, sizes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds (candidates, rows) of what `least` finds, from sums in the dtype of the weights.

        Multiplying by 1 / s instead of dividing by s moves only weights that lie within n roundings of half-way, where
        both levels cost the same up to 32 n roundings; sums are off by as many roundings as there are terms.
        """
        a, live, turned = self._laid(w, sizes)
        count, rows = scales.shape
        along, top = 0 if turned else 1, a.amax(0 if turned else 1)
        off = (a.shape[along] + 32 * self.n + 8) * torch.finfo(a.dtype).eps
        many = max(1, self.step // max(a.numel(), 1))
        found = torch.full((count, rows), torch.inf, dtype=a.dtype, device=a.device)
        used = scales.to(a.dtype).unsqueeze(1 + along)
        inverse = used.clamp_min(torch.finfo(a.dtype).tiny).reciprocal_()
        looked = 0
        for j, (s, r, error) in enumerate(zip(used.split(many), inverse.split(many), found.split(many), strict=True)):
            if j * many - looked >= _BETWEEN:
                looked = j * many
                least = found[:looked].nan_to_num_(nan=torch.inf, posinf=torch.inf).amin(0)
                if bool((self._clips(scales[looked], top) * (1 - off) > least * (1 + off)).all()):
                    break
            q = self.buffers.get("grid", (len(s), *a.shape), a.dtype)
            torch.mul(a, r, out=q).round_()
            q = q.clamp_max_(self.n) if self.zero else q.clamp_(1, self.n)
            q.mul_(s).sub_(a)
            if live is not None:
                q.mul_(live)
            torch.sum(q.mul_(q), 1 + along, out=error)
        found.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        slack = a.shape[along] * torch.finfo(a.dtype).tiny
        found[1:, top == 0] = torch.inf
        return found * (1 - off) - slack, found * (1 + off) + slack

    def _laid(self, w: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """(|w|, which of them count, whether rows lie along the last axis): many short rows sum up faster that way."""
        rows, columns = w.shape
        turned = columns < rows
        live = self._live(columns, sizes, w.device)
        live = live.t().contiguous() if live is not None and turned else live
        return self.buffers.sizes_of(w.t() if turned else w, self.dtype), live, turned

    def settled(self, w: Tensor, sizes: Tensor, rounds: int) -> Tensor:
        """The scales, float64, that alternating ends with in a block of rows."""
        tops = torch.maximum(w.amax(1), -w.amin(1)).to(self.dtype)
        # In units of about the largest weight, so that no product leaves the range of the dtype.
        unit = torch.ldexp(torch.ones_like(tops), torch.frexp(tops).exponent - 1)
        unit = torch.where(tops > 0, unit, 1.0)
        a = torch.abs(w.to(self.dtype)).div_(unit[:, None])
        live = self._live(a.shape[1], sizes, w.device)
        chunks = range(0, a.shape[1], self.step)
        parts = [(a[:, i : i + self.step], None if live is None else live[:, i : i + self.step]) for i in chunks]
        many = torch.count_nonzero(a, dim=1).clamp_min_(1)
        scale = torch.stack([self._exact(part) for part, _ in parts]).sum(0) / many / max(self.n / 2, 1.0)
        # Squares of integers sum up exactly in float32 too, as long as that holds the sum.
        whole = min(a.shape[1], self.step) * self.n**2 <= 1 << 24
        for _ in range(rounds):
            divisor = torch.where(scale > 0, scale, 1.0).to(self.dtype)[:, None]
            size, along = torch.zeros_like(scale), torch.zeros_like(scale)
            for part, here in parts:
                q = torch.div(part, divisor, out=self.buffers.get("grid", part.shape, self.dtype)).round_()
                q = q.clamp_max_(self.n) if self.zero else q.clamp_(1, self.n)
                q = q if here is None else q.mul_(here)
                square = self.buffers.get("square", part.shape, self.dtype)
                square = torch.mul(q, q, out=square)
                size += square.sum(1) if whole else self._exact(square)
                along += self._exact(q.mul_(part))
            fresh = torch.where(size > 0, along / size.clamp_min(1.0), scale)
            if torch.equal(fresh, scale):
                break
            scale = fresh
        return scale * unit

    def _exact(self, x: Tensor) -> Tensor:
        """Sums of rows in float64, which in one call would convert in a fresh copy."""
        return self.buffers.get("exact", x.shape, torch.float64).copy_(x).sum(1)

    def least(self, w: Tensor, sizes: Tensor, scales: Tensor) -> Tensor:
        """Which scale is the best of each row by the weights themselves, of equal ones the first."""
        rows, columns = w.shape
        if columns > self.step:
            live = self._live(columns, sizes, w.device)
            errors = torch.zeros((rows, len(scales)), dtype=torch.float64, device=w.device)
            for first in range(0, columns, self.step):
                chunk = slice(first, first + self.step)
                a = self.buffers.sizes_of(w[:, chunk], self.dtype)
                here = None if live is None else live[:, chunk]
                for j in range(len(scales)):
                    errors[:, j] += self._error(a, here, scales[j : j + 1], turned=False)[0]
        else:
            a, live, turned = self._laid(w, sizes)
            errors = self._tried(a, live, scales, turned=turned)
        return errors.argmin(dim=1)

    def _tried(self, a: Tensor, live: Tensor | None, scales: Tensor, *, turned: bool) -> Tensor:
        """Errors (rows, candidates) of one piece: as many candidates at a time as a piece holds, the widest first.

        Ends where for no row the next can be better, as its largest weight alone would cost more than the best so far:
        the others are `inf`.
        """
        count, rows = scales.shape
        many, top = max(1, self.step // max(a.numel(), 1)), a.amax(0 if turned else 1)
        found = torch.full((rows, count), torch.inf, dtype=torch.float64, device=a.device)
        looked = 0
        for first in range(0, count, many):
            if first - looked >= _BETWEEN:
                looked = first
                if bool((self._clips(scales[first], top) >= found[:, :first].amin(1)).all()):
                    break
            found[:, first : first + many] = self._error(a, live, scales[first : first + many], turned=turned).t()
        return found

    def _live(self, columns: int, sizes: Tensor, device: torch.device) -> Tensor | None:
        """1 for weights, 0 for what fills up a shorter row, where that would have an error."""
        if self.zero or bool((sizes >= columns).all()):
            return None
        return (torch.arange(columns, device=device) < sizes.to(device)[:, None]).to(self.dtype)

    def _error(self, a: Tensor, live: Tensor | None, scales: Tensor, *, turned: bool) -> Tensor:
        """Squared errors (candidates, rows) in float64; `inf` where it is no number."""
        along = 1 if turned else 2
        s = scales.to(a.dtype).unsqueeze(along)
        q = self.buffers.get("grid", (len(s), *a.shape), a.dtype)
        # A row of zeros has scale 0: divided by any other number it is zero too.
        torch.div(a, s.clamp_min(torch.finfo(a.dtype).tiny), out=q).round_()
        q = q.clamp_max_(self.n) if self.zero else q.clamp_(1, self.n)
        q.mul_(s).sub_(a)
        if live is not None:
            q.mul_(live)
        # A sum in another dtype would convert in a fresh copy.
        exact = self.buffers.get("exact", q.shape, torch.float64).copy_(q.square_())
        return exact.sum(along).nan_to_num_(nan=torch.inf)

    def _clips(self, scale: Tensor, top: Tensor) -> Tensor:
        """The error of the largest weight of each row where it is clipped: a part of that of every narrower grid."""
        gap = (self.n * scale.to(top.dtype)).sub_(top)
        return gap.clamp_max_(0.0).square_()


def error_bounds(
    w: Tensor, sizes: Tensor, levels: Tensor, dtype: torch.dtype, buffers: _Buffers | None = None
) -> tuple[Tensor, Tensor]:
    """Bounds from below and above of the squared error of candidate levels, up to one number a row, by a histogram.

        sum (|w| - nearest level)^2 = sum (|w| - l_0)^2 - 2 sum_j (l_j - l_(j-1)) F((l_j + l_(j-1)) / 2)

    with F(m) = sum of |w| - m over all |w| > m, which is known exactly at the edges of the bins, and convex between
    them: it lies under the chord and over the tangents at both ends. The bounds are wider by what roundings come to, so
    that they hold for what a search in `dtype` finds.

    Args:
        w: matrix (groups, weights) on the CPU, whose squares a float32 holds; a shorter group ends in zeros.
        sizes: weights of each group, int64.
        levels: (candidates, groups, levels), >= 0, ascending, float64.
        dtype: dtype that weights are compared in.
        buffers: of a search that goes on.

    Returns:
        (below, above), each (candidates, groups); of a group of zeros the first candidate alone is finite.
    """
    rows, columns = w.shape
    tops = torch.maximum(w.amax(1), -w.amin(1)).to(dtype)
    power = min(max((columns - 1).bit_length() - 1, _FEWEST), _MOST)
    bins = 2**power
    # Times a power of two, so that nothing is rounded: the largest lies in the upper half of the bins.
    unit = torch.ldexp(torch.ones_like(tops), power - torch.frexp(tops).exponent)
    counts, sums = _histogram(w, sizes, unit, bins, buffers or _Buffers(w.device))
    counts, sums = (torch.nn.functional.pad(x, (1, 0)).cumsum_(1) for x in (counts, sums))
    levels = levels * unit.double()[:, None]
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    at = middles.long().clamp_(0, bins - 1)
    part = (middles - at).clamp_(0, 1)
    place = torch.arange(0, rows * (bins + 1), bins + 1)[:, None] + at
    many, total = counts[:, -1:], sums[:, -1:]

    def beyond(place: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        """(weights above an edge, F there)."""
        above = many - counts.view(-1).index_select(0, place.view(-1)).reshape(place.shape)
        return above, (total - sums.view(-1).index_select(0, place.view(-1)).reshape(place.shape)) - edge * above

    (left_many, left), (right_many, right) = beyond(place, at), beyond(place + 1, at + 1)
    chord = torch.lerp(left, right, part)
    tangent = torch.maximum(left - part * left_many, right + (1 - part) * right_many)
    first, step = levels[..., 0], levels.diff(dim=-1)
    squares = _squares(sums, bins)
    base = squares + first * (first * many[:, 0] - 2 * total[:, 0])
    low, high = base - 2 * (step * chord).sum(-1), base - 2 * (step * tangent).sum(-1)
    eps = torch.finfo(dtype).eps
    slack = 2 * eps * levels[..., -1] * (many[:, 0] * high).clamp_min_(0.0).sqrt_() + 8 * eps * high.abs()
    slack += 1e-10 * squares
    low[1:, tops == 0] = torch.inf
    return low - slack, high + slack


def _squares(sums: Tensor, bins: int) -> Tensor:
    """The sum of squares of each row or a little more: every number times the upper edge of its bin."""
    # sum_i (i + 1) (S_(i+1) - S_i), summed by parts.
    return bins * sums[:, -1] - sums[:, 1:-1].sum(1)


def _histogram(w: Tensor, sizes: Tensor, unit: Tensor, bins: int, buffers: _Buffers) -> tuple[Tensor, Tensor]:
    """(number, sum) of |w| times the unit in each bin of each row, in float64."""
    rows, columns = w.shape
    counts, sums = None, None
    offset = torch.arange(0, rows * bins, bins, dtype=torch.int32)[:, None]
    for chunk in w.split(max(1, 4 * piece_of(w.device) // rows), dim=1):
        size = buffers.sizes_of(chunk, unit.dtype).mul_(unit[:, None])
        index = buffers.get("index", size.shape, torch.int32).copy_(size)
        index = (index.add_(offset) if rows > 1 else index).view(-1)
        exact = buffers.get("exact", size.shape, torch.float64).copy_(size).view(-1)
        count, total = (torch.bincount(index, weights=x, minlength=rows * bins) for x in (None, exact))
        counts, sums = (count, total) if counts is None or sums is None else (counts.add_(count), sums.add_(total))
    assert counts is not None and sums is not None
    counts = counts.reshape(rows, bins).double()
    counts[:, 0] -= columns - sizes
    return counts, sums.reshape(rows, bins)
