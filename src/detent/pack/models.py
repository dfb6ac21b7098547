"""Models of whole numbers: each is one function that writes, measures and reads.

A function takes a coder and the values, or `None` in their place when the coder reads, and returns the values.
docs/format-streams.md, section 4, defines every step in whole numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from detent.pack.coder import PRECISION, Coder, Meter, Tape, Writer, most_turns
from detent.pack.mixing import FOLDS, estimated_bits, sparse_mask, takes, within_limits

__all__ = ["Grid", "patterns", "whole_numbers"]

MOST_SIZE = 1 << 16  # symbols of an alphabet

_EVEN, _ADAPTIVE, _CLASSES, _SPLIT, _MIXED = range(5)
_GAPS = _SPLIT  # of two symbols: there is nothing to split
_PLAIN, _BETWEEN, _BY_ROW, _BY_COLUMN = range(4)
_PLANES, _ASCENDING, _LISTED, _SPARSE = range(4)
_PRIORS = (16, 8, 2, 1)  # sixteenths that each symbol's count starts with
_SMALL = 1 << 20  # values up to which candidates are measured, not estimated
_SAMPLE = 1 << 14
_MIXED_CELLS = 1 << 18  # cells in rows and columns with a one up to which the mixing model is tried: it is slow
_FOLDED_CELLS = 1 << 16  # and in all its foldings
_MIXED_GAIN = 0.01  # of a mask's bits that the mixing model must be expected to save before it is tried
_DOUBT = 0.1  # by which the estimate for a sparse mask may lose and yet be wrong
_CLASS_GAIN = 0.002  # and that classes of lines must
_FACTORIALS = 1 << 12  # counts whose logarithms are looked up
_COUNTED_AT_ONCE = 1 << 16  # values whose runs are measured in one go
_FEWEST_OF_CLASSES = 256  # values from which on rows and columns may differ by more than chance
_FEW = 16  # zeros, or ones, from which on a model of masks has something to learn
_MOST_LISTED = 1 << 12
_MOST_CLASSES = 16
_MOST_LINES = 1 << 16
_MOST_CELLS = 1 << 22  # counts of lines by symbols that are looked at for classes
_MOST_COUNTED = 1 << 22  # places of a mask by the ones of its lines
_LONGEST_COUNTED = 1 << 14  # and of one line: each is a turn of the coder
_WORTH_IT = 1.005  # by how much counting must win in a large mask, because it takes three times as long
_LONGEST = 1 << 18  # values that go through one table
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Where the values of a piece lie in their tensor: rows, inputs, inner positions, in row-major order.

    Args:
        rows: output channels.
        inputs: input channels.
        inner: positions of a kernel.
        mask: 1 where there is a value, flat; `None`: everywhere.
    """

    rows: int
    inputs: int
    inner: int
    mask: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def of(cls, count: int, shape: tuple[int, ...], mask: np.ndarray | None = None) -> Grid:
        """The grid of a piece of `count` values: as many as the tensor has, or its kernels, or its rows."""
        rows, inputs, inner = _sides(shape)
        if mask is not None and mask.size == rows * inputs * inner:
            return cls(rows, inputs, inner, mask)
        if count == rows * inputs * inner:
            return cls(rows, inputs, inner)
        if count == rows * inputs:
            return cls(rows, inputs, 1)
        if rows and count % rows == 0:
            return cls(rows, count // rows, 1)
        return cls(1, count, 1)

    @property
    def columns(self) -> int:
        return self.inputs * self.inner

    @functools.cached_property
    def per_row(self) -> np.ndarray:
        """Values of each row."""
        if self.mask is None:
            return np.full(self.rows, self.columns)
        return np.count_nonzero(self.mask.reshape(self.rows, self.columns), axis=1)

    def within(self, mask: np.ndarray) -> Grid:
        """The grid of those values where `mask`, one a value, is 1."""
        if self.mask is None:
            return Grid(self.rows, self.inputs, self.inner, mask)
        whole = np.zeros(self.mask.size, dtype=np.uint8)
        whole[np.flatnonzero(self.mask)] = mask
        return Grid(self.rows, self.inputs, self.inner, whole)

    def cells(self, of_row: np.ndarray, of_column: np.ndarray, columns: int) -> np.ndarray:
        """Class of each value, from those of its row and column, as `row * columns + column`."""
        both = (of_row * columns)[:, None].astype(np.uint8) + of_column[None].astype(np.uint8)
        return both.reshape(-1) if self.mask is None else both.reshape(-1)[self.mask.astype(bool)]


def _sides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return shape[0], shape[1], math.prod(shape[2:])


@dataclass(kw_only=True)
class _Plan:
    """What a writer settled on, and what it takes.

    Args:
        model: number of the model.
        bits: its size, measured or estimated.
        prior: index into the priors.
        lines: classes of rows and of columns.
        parts: plans of a zero mask and of the other values.
        pivot: the value that the mask sets apart.
        fold: index into the folds.
        way: of a mask by its gaps or by the ones of its lines.
        tape: of the mixing model, what its trial coded.
    """

    model: int
    bits: float = math.inf
    prior: int = 0
    lines: tuple[np.ndarray, np.ndarray] | None = None
    parts: tuple[_Plan, _Plan] | None = None
    pivot: int = 0
    fold: int = 0
    way: int = 0
    tape: Tape | None = None

    @property
    def cost(self) -> float:
        """Size of a large mask, with what time is worth."""
        return self.bits * (_WORTH_IT if self.model == _GAPS and self.way in (_BY_ROW, _BY_COLUMN) else 1.0)


# --- the models ---------------------------------------------------------------------------------------------------


def whole_numbers(
    coder: Coder,
    values: np.ndarray | None,
    count: int,
    size: int,
    grid: Grid,
    plan: _Plan | None = None,
    *,
    part: bool = False,
) -> np.ndarray:
    """Whole numbers below `size`, by whichever model makes them smallest.

    Args:
        coder: the coder.
        values: uint8 or uint16, or `None` when reading.
        count: how many.
        size: of the alphabet, 1 to 2**16.
        grid: where they lie.
        plan: the model to write with; found out when missing.
        part: whether they are part of a split, which is not split again.

    Raises:
        ValueError: data that no writer leaves.
    """
    if size < 2 or not count:
        return np.zeros(count, dtype=np.uint8 if size <= 256 else np.uint16)
    coder.expect(count)
    if values is not None:
        plan = plan or _best(values, size, grid, part)
    model = coder.number(plan and plan.model, 5)
    if model == _EVEN:
        return _even(coder, values, count, size)
    if model == _ADAPTIVE:
        prior = coder.number(plan and plan.prior, len(_PRIORS))
        return _adaptive(coder, values, count, np.full(size, _PRIORS[prior]))[0]
    if model == _CLASSES:
        return _by_classes(coder, values, count, size, grid, plan)
    if model == _GAPS and size == 2:
        return _mask_by_distance(coder, values, count, grid, plan)
    if model == _SPLIT and size > 2 and not part:
        return _split(coder, values, count, size, grid, plan)
    if model == _SPLIT or size != 2 or grid.mask is not None or not within_limits(grid.rows, grid.columns):
        raise ValueError(f"{count} values of {grid.rows} rows and {grid.columns} columns cannot be of model {model}")
    fold = FOLDS[coder.number(plan and plan.fold, len(FOLDS))]
    inputs, inner = _folded(grid, fold)
    if not inputs:
        raise ValueError(f"{grid.inputs} inputs do not fold into runs of {fold}")
    if values is not None and plan and plan.tape and isinstance(coder, (Meter, Writer)):
        coder.replay(plan.tape)
        return values
    return sparse_mask(coder, values, grid.rows, inputs, inner)


def _folded(grid: Grid, fold: int) -> tuple[int, int]:
    """Inputs and inner positions of a grid whose inputs are runs; (0, 0) if they are not."""
    if fold == 1:
        return grid.inputs, grid.inner
    return (grid.inputs // fold, fold) if grid.inner == 1 and grid.inputs % fold == 0 else (0, 0)


def _even(coder: Coder, values: np.ndarray | None, count: int, size: int) -> np.ndarray:
    """All values alike; whole bytes are copied, which is as small and faster."""
    if size == 256:
        return coder.raw(values, count)
    return coder.even(values, count, size)


@functools.cache
def _lengths(count: int) -> np.ndarray:
    """How many values each run has."""
    return np.array([past - first for first, past in _spans(count)], dtype=np.int64)


def _spans(count: int) -> Iterator[tuple[int, int]]:
    """Ever longer runs of values, each coded by what the runs before it were."""
    first = 0
    while first < count:
        past = min(count, first + min(_LONGEST, max(16, first >> 3)))
        yield first, past
        first = past


def _adaptive(
    coder: Coder, values: np.ndarray | None, count: int, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By the counts so far, in sixteenths; also returns them."""
    weights = weights.astype(np.int64)
    if isinstance(coder, Meter) and coder.tables and values is not None and count <= _COUNTED_AT_ONCE:
        runs = _lengths(count)
        if count and runs.size * weights.size <= 4 * _COUNTED_AT_ONCE:
            return values, _counted_at_once(coder, values, runs, weights)
    out = np.empty(count, dtype=np.uint8 if weights.size <= 256 else np.uint16)
    for first, past in _spans(count):
        part = coder.symbols(weights, None if values is None else values[first:past], past - first)
        out[first:past] = part
        weights += 16 * np.bincount(part, minlength=weights.size)
    return out, weights


def _counted_at_once(meter: Meter, values: np.ndarray, runs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights after all runs, with what the runs take counted: a table of its own for each."""
    run = np.repeat(np.arange(0, runs.size * weights.size, weights.size), runs)
    found = np.bincount(run + values, minlength=runs.size * weights.size).reshape(runs.size, -1)
    after = weights + 16 * np.cumsum(found, axis=0)
    meter.counted(after - 16 * found, found)
    return after[-1]


def _by_classes(
    coder: Coder, values: np.ndarray | None, count: int, size: int, grid: Grid, plan: _Plan | None
) -> np.ndarray:
    """Rows and columns fall into classes; each pair of classes has counts of its own, which start from all before."""
    prior = _PRIORS[coder.number(plan and plan.prior, len(_PRIORS))]
    given = plan.lines if plan and plan.lines else (None, None)
    if max(grid.rows, grid.columns) > _MOST_LINES:
        raise ValueError(f"a tensor of {grid.rows} x {grid.columns} has too many lines for classes")
    rows, of_row = _line_classes(coder, given[0], grid.rows)
    columns, of_column = _line_classes(coder, given[1], grid.columns)
    if rows * columns > _MOST_CLASSES:
        raise ValueError(f"{rows} classes of rows and {columns} of columns are more than {_MOST_CLASSES} pairs")
    cell = grid.cells(of_row, of_column, columns)
    if cell.size != count:
        raise ValueError(f"{count} values where a tensor of {grid.rows} x {grid.columns} has {cell.size}")
    out = np.empty(count, dtype=np.uint8 if size <= 256 else np.uint16)
    total = np.zeros(size, dtype=np.int64)
    for number in range(rows * columns):
        here = cell == number
        # A class begins with what 64 values of the classes before it would have been.
        start = prior + 1024 * total // max(1, int(total.sum()))
        part, weights = _adaptive(coder, None if values is None else values[here], int(np.count_nonzero(here)), start)
        out[here] = part
        total += weights - start
    return out


def _line_classes(coder: Coder, given: np.ndarray | None, count: int) -> tuple[int, np.ndarray]:
    """How many classes there are, and that of each line."""
    classes = 1 + coder.number(None if given is None else int(given.max()), _MOST_CLASSES)
    if classes == 1:
        return 1, np.zeros(count, dtype=np.uint8)
    return classes, _adaptive(coder, given, count, np.full(classes, 8))[0]


def _split(
    coder: Coder, values: np.ndarray | None, count: int, size: int, grid: Grid, plan: _Plan | None
) -> np.ndarray:
    """One value by a mask of where it is not, then the others."""
    pivot = coder.number(plan and plan.pivot, size)
    mask, rest = (None, None) if values is None else _apart(values, pivot)
    parts = plan.parts if plan and plan.parts else (None, None)
    mask = whole_numbers(coder, mask, count, 2, grid, parts[0], part=True)
    others = int(np.count_nonzero(mask))
    rest = whole_numbers(coder, rest, others, size - 1, grid.within(mask), parts[1], part=True)
    out = np.full(count, pivot, dtype=np.uint8 if size <= 256 else np.uint16)
    out[mask.astype(bool)] = rest + (rest >= pivot)
    return out


def _apart(values: np.ndarray, pivot: int) -> tuple[np.ndarray, np.ndarray]:
    mask = values != pivot
    rest = values[mask]
    return mask.view(np.uint8), rest - (rest > pivot).astype(rest.dtype)


# --- masks by how far it is from one to the next, and by how many there are in a line ------------------------------


def _mask_by_distance(
    coder: Coder, values: np.ndarray | None, count: int, grid: Grid, plan: _Plan | None
) -> np.ndarray:
    way = coder.number(plan and plan.way, 4)
    if way in (_PLAIN, _BETWEEN):
        return _by_gaps(coder, values, count, way == _BETWEEN)
    if not _is_counted(grid, way):
        raise ValueError(f"a mask of {grid.rows} rows and {grid.columns} columns cannot be counted by its lines")
    if way == _BY_ROW:
        return _by_lines(coder, values, grid.rows, grid.columns)
    turned = None if values is None else np.ascontiguousarray(values.reshape(grid.rows, grid.columns).T).reshape(-1)
    found = _by_lines(coder, turned, grid.columns, grid.rows)
    return np.ascontiguousarray(found.reshape(grid.columns, grid.rows).T).reshape(-1)


def _is_counted(grid: Grid, way: int) -> bool:
    lines, length = (grid.rows, grid.columns) if way == _BY_ROW else (grid.columns, grid.rows)
    # Every place of a line is a turn, whatever the number of lines: few long lines would take long for their bytes.
    few = 1 < lines <= _MOST_LINES and 1 < length <= min(_LONGEST_COUNTED, max(64, 16 * lines))
    return few and grid.mask is None and lines * length <= _MOST_COUNTED


def _by_gaps(coder: Coder, values: np.ndarray | None, count: int, between: bool) -> np.ndarray:
    """The number of ones, then the steps from one to the next: their bit lengths, and the bits below these.

    With `between`, every second bit length is coded by the sum of its neighbours'.
    """
    steps = None if values is None else np.diff(np.flatnonzero(values).astype("<u8"), prepend=np.uint64(2**64 - 1))
    ones = _one_number(coder, None if steps is None else steps.size, count)
    if 2 * ones > count:  # steps take many times the memory of a mask
        raise ValueError(f"{ones} gaps in a mask of {count} places")
    size = count.bit_length() + 1
    given = None if steps is None else _bit_lengths(steps)
    lengths = np.zeros(ones, dtype=np.uint8)
    for first in (0, 1) if between else (0,):
        here = slice(first, None, 2 if between else 1)
        mine = None if given is None else given[here]
        if first:
            lengths[here] = _by_neighbours(coder, mine, lengths, size)
        else:
            lengths[here] = _of_one_row(coder, mine, lengths[here].size, size)
    places = _below(coder, steps, lengths, 64)
    np.cumsum(places, out=places)
    if ones and (int(places[-1]) > count or bool((places[1:] <= places[:-1]).any()) or not places[0]):
        raise ValueError(f"ones lie beyond the {count} places of a mask")
    out = np.zeros(count, dtype=np.uint8)
    places -= np.uint64(1)
    out[places.view(np.int64)] = 1
    return out


def _of_one_row(coder: Coder, values: np.ndarray | None, count: int, size: int) -> np.ndarray:
    return whole_numbers(coder, values, count, size, Grid(1, count, 1), part=True)


def _one_number(coder: Coder, value: int | None, most: int) -> int:
    """A number from 0 to `most`, cheaper if it is small."""
    steps = None if value is None else np.array([value], dtype="<u8")
    length = coder.number(None if value is None else value.bit_length(), most.bit_length() + 1)
    found = int(_below(coder, steps, np.array([length], dtype=np.uint8), 64)[0])
    if found > most:
        raise ValueError(f"{found} ones in {most} places")
    return found


def _by_neighbours(coder: Coder, values: np.ndarray | None, lengths: np.ndarray, size: int) -> np.ndarray:
    """Bit lengths at odd places: the sum of those on both sides says which counts code them."""
    before, after = lengths[0:-1:2], lengths[2::2]
    context = 2 * before.astype(np.int64)
    context[: after.size] += after.astype(np.int64) - before[: after.size]
    out = np.empty(context.size, dtype=np.uint8)
    total = 16 * np.bincount(lengths[::2], minlength=size)
    for each in np.flatnonzero(np.bincount(context)):
        here = context == each
        start = 1 + 1024 * total // max(1, int(total.sum()))
        mine = None if values is None else values[here]
        out[here], weights = _adaptive(coder, mine, int(np.count_nonzero(here)), start)
        total += weights - start
    return out


def _by_lines(coder: Coder, values: np.ndarray | None, lines: int, length: int) -> np.ndarray:
    """How many ones each line has; then place by place in all lines at once, by how many are left for how many."""
    whole = None if values is None else values.reshape(lines, length)
    ones = None if whole is None else whole.sum(axis=1, dtype="<u8")
    left = _line_ones(coder, ones, lines, length).astype(np.int64)
    out = np.zeros((lines, length), dtype=np.uint8)
    for j in range(length):
        open_ = np.flatnonzero((left > 0) & (left < length - j))
        out[left == length - j, j] = 1
        chances = (left[open_] << PRECISION) // (length - j)
        out[open_, j] = coder.decisions(chances, None if whole is None else whole[open_, j])
        left -= out[:, j]
    return out.reshape(-1)


def _line_ones(coder: Coder, ones: np.ndarray | None, lines: int, length: int) -> np.ndarray:
    given = None if ones is None else _bit_lengths(ones)
    found = _below(coder, ones, _of_one_row(coder, given, lines, length.bit_length() + 1), 64)
    if int(found.max()) > length:
        raise ValueError(f"a line of {length} places has {int(found.max())} ones")
    return found


# --- the choice ---------------------------------------------------------------------------------------------------


def _best(values: np.ndarray, size: int, grid: Grid, part: bool = False) -> _Plan:
    return _smallest(_plans(values, size, grid, part), values, size)


def _smallest(plans: list[_Plan], values: np.ndarray, size: int) -> _Plan:
    large = size == 2 and values.size > _SMALL
    return min(plans, key=lambda plan: plan.cost if large else plan.bits)


def _plans(values: np.ndarray, size: int, grid: Grid, part: bool = False) -> list[_Plan]:
    """What may be smallest, with its size: estimated, and measured where few values make that rough."""
    found = np.bincount(values, minlength=size)
    even = _Plan(model=_EVEN, bits=values.size * math.log2(size))
    priors = [_Plan(model=_ADAPTIVE, prior=i, bits=_adaptive_bits(found, p)) for i, p in enumerate(_PRIORS)]
    plans = [min(even, *priors, key=lambda plan: plan.bits)]
    if size > 2 and not part and 2 * int(found.max()) > values.size:
        plans.append(_split_plan(values, size, grid, int(found.argmax())))
    plans += _class_plans(values, size, grid, plans[0].bits)
    if size == 2 and _FEW <= int(found[1]) <= values.size // 4:
        plans += _distance_plans(values, grid)
    for plan in plans[1:]:
        if plan.model == _CLASSES:
            plan.prior = min(priors, key=lambda plan: plan.bits).prior
    mixes = size == 2 and grid.mask is None and int(found.min()) >= _FEW and within_limits(grid.rows, grid.columns)
    if values.size <= _SMALL and (mixes or len(plans) > 1):
        for plan in plans:
            known = plan.model == _GAPS and size == 2
            plan.bits = plan.bits if known else _measured(values, size, grid, plan)
    if mixes:
        plans += _mixed_plans(values, grid, min(plan.bits for plan in plans))
    return plans


def _measured(values: np.ndarray, size: int, grid: Grid, plan: _Plan) -> float:
    meter = Meter()
    whole_numbers(meter, values, values.size, size, grid, plan)
    return _readable(meter.bits, meter.turns)


def _readable(bits: float, turns: int) -> float:
    """The size, or infinite where a reader would refuse to take so long for so few bits."""
    return bits if turns <= most_turns(int(bits / 8)) else math.inf


def _split_plan(values: np.ndarray, size: int, grid: Grid, pivot: int) -> _Plan:
    mask, rest = _apart(values, pivot)
    parts = _best(mask, 2, grid, True), _Plan(model=_EVEN, bits=0)
    if rest.size and size > 2:
        parts = parts[0], _best(rest, size - 1, grid.within(mask), True)
    bits = parts[0].bits + parts[1].bits + math.log2(size) + 5
    return _Plan(model=_SPLIT, pivot=pivot, parts=parts, bits=bits)


@functools.cache
def _rising(prior: int) -> np.ndarray:
    """ln(a (a + 1) ... (a + n - 1)) by n, with a = prior / 16."""
    steps = np.log(np.arange(_FACTORIALS) + prior / 16)
    return np.concatenate([[0.0], np.cumsum(steps[:-1])])


def _adaptive_bits(found: np.ndarray, prior: int, size: int | None = None) -> float:
    """Size by counts that adapt after every value (Dirichlet-multinomial)."""
    alpha, total, size = prior / 16, int(found.sum()), size or found.size
    few = found[found < _FACTORIALS]
    each = float(_rising(prior)[few].sum())
    each += sum(math.lgamma(n + alpha) - math.lgamma(alpha) for n in found[found >= _FACTORIALS].tolist())
    return (math.lgamma(total + size * alpha) - math.lgamma(size * alpha) - each) / math.log(2)


def _class_plans(values: np.ndarray, size: int, grid: Grid, base: float) -> list[_Plan]:
    """The best plan with classes of rows or columns, and one with both, where they beat `base` bits."""
    lines = max(grid.rows, grid.columns)
    if values.size < _FEWEST_OF_CLASSES or lines > _MOST_LINES or lines * size > _MOST_CELLS:
        return []
    plans, best = [], dict[int, _Plan]()
    for axis, length in enumerate((grid.rows, grid.columns)):
        if length < 4 or values.size < 4 * length:
            continue
        counts = _line_counts(values, size, grid, axis)
        used = counts[:, counts.any(axis=0)].astype(np.float64)
        if not _differ(used, base):
            continue
        none = np.zeros(grid.columns if axis == 0 else grid.rows, dtype=np.uint8)
        for classes in (2, 4, 8):
            if length < 2 * classes:
                continue
            of_line = _clustered(used, classes)
            both = (of_line, none) if axis == 0 else (none, of_line)
            plan = _Plan(model=_CLASSES, lines=both, bits=_class_bits(used, of_line, size))
            plans.append(plan)
            if classes <= 4 and plan.bits < (best[axis].bits if axis in best else base):
                best[axis] = plan
    most = (1 - _CLASS_GAIN) * base
    plans = sorted((plan for plan in plans if plan.bits < most), key=lambda plan: plan.bits)[:1]
    if len(best) == 2:
        plans.append(_pair_plan(values, size, grid, best[0], best[1]))
    return plans


def _pair_plan(values: np.ndarray, size: int, grid: Grid, rows: _Plan, columns: _Plan) -> _Plan:
    """A plan with the classes of rows of one and those of columns of another."""
    assert rows.lines and columns.lines
    lines = rows.lines[0], columns.lines[1]
    many = int(lines[1].max()) + 1
    cells = grid.cells(*lines, many).astype(np.int64)
    counts = np.bincount(cells * size + values, minlength=16 * size).reshape(-1, size)
    bits = sum(_adaptive_bits(row, 2) for row in counts if row.any())
    bits += sum(_adaptive_bits(np.bincount(of_line), 8) for of_line in lines)
    return _Plan(model=_CLASSES, lines=lines, bits=bits)


def _differ(counts: np.ndarray, base: float) -> bool:
    """Whether lines, each with counts of its own, save more than by chance, and more than it takes to be worth it."""
    n, total = np.maximum(counts, 1), np.maximum(counts.sum(axis=1), 1)
    own = float((total * np.log2(total)).sum() - (counts * np.log2(n)).sum())
    by_chance = (np.count_nonzero(counts) - len(counts)) / (2 * math.log(2))
    return own + by_chance < (1 - _CLASS_GAIN) * base


def _line_counts(values: np.ndarray, size: int, grid: Grid, axis: int) -> np.ndarray:
    """How often each symbol is found in each row (axis 0) or in each column (axis 1)."""
    lines = (grid.rows, grid.columns)[axis]
    out = np.zeros(lines * size, dtype=np.int64)
    past_of = np.cumsum(grid.per_row)
    step = max(1, max(_COUNTED_AT_ONCE, 2 * lines * size * axis) // max(1, grid.columns))
    for top in range(0, grid.rows, step):
        low = min(grid.rows, top + step)
        part = values[int(past_of[top] - grid.per_row[top]) : int(past_of[low - 1])]
        if axis == 0:
            where = np.repeat(np.arange(low - top) * size, grid.per_row[top:low])
            out[top * size : low * size] = np.bincount(where + part, minlength=(low - top) * size)
            continue
        where = np.broadcast_to(np.arange(lines) * size, (low - top, lines))
        if grid.mask is None:
            both = where + part.reshape(where.shape)
        else:
            both = where[grid.mask.reshape(grid.rows, -1)[top:low].astype(bool)] + part
        out += np.bincount(both.reshape(-1), minlength=out.size)
    return out.reshape(lines, size)


def _clustered(counts: np.ndarray, classes: int) -> np.ndarray:
    """Lines in classes of alike distributions: a few rounds of k-means in bits."""
    total = np.maximum(1, counts.sum(axis=1))
    centre = (counts @ np.arange(counts.shape[1])) / total
    spread = (counts @ np.arange(counts.shape[1]) ** 2) / total - centre**2
    order = np.argsort(spread if counts.shape[1] > 2 else centre, kind="stable")
    found = np.empty(len(counts), dtype=np.uint8)
    found[order] = np.arange(len(counts)) * classes // len(counts)
    for _ in range(4):
        sums = (found == np.arange(classes)[:, None]).astype(np.float64) @ counts + 0.1
        bits = -np.log2(sums / sums.sum(axis=1, keepdims=True))
        found = np.argmin(counts @ bits.T, axis=1).astype(np.uint8)
    return found


def _class_bits(counts: np.ndarray, found: np.ndarray, size: int) -> float:
    """Size with these classes, and of saying them; `counts` may leave symbols out that never come."""
    sums = (found == np.arange(int(found.max()) + 1)[:, None]).astype(np.float64) @ counts
    return sum(_adaptive_bits(row, 2, size) for row in sums.astype(np.int64)) + _adaptive_bits(np.bincount(found), 8)


def _mixed_plans(values: np.ndarray, grid: Grid, rival: float) -> list[_Plan]:
    """The mixing model as it promises most, plain or with the inputs of a matrix folded, where that beats `rival` bits.

    Args:
        values: the mask.
        grid: where they lie.
        rival: bits of the best other model.
    """
    whole = values.reshape(grid.rows, grid.columns)
    cells = int(np.count_nonzero(whole.any(axis=1))) * int(np.count_nonzero(whole.any(axis=0)))
    if cells > _MIXED_CELLS:
        return []
    folds = [0]
    if cells <= _FOLDED_CELLS:
        by_column = whole.sum(axis=0, dtype=np.int64)
        told = {i: _told(by_column, f) for i, f in enumerate(FOLDS) if f > 1 and _folded(grid, f)[0] > 1}
        folds += [i for i in sorted(told, key=lambda i: -told[i])[:2] if told[i] > 0]
    masks = {fold: values.reshape(grid.rows, *_folded(grid, FOLDS[fold])) for fold in folds}
    hopes = {fold: estimated_bits(mask) for fold, mask in masks.items() if takes(mask)}
    sparse = 32 * int(np.count_nonzero(values)) < values.size  # lines of few ones: what they have to learn is overrated
    most = rival * (1 + _DOUBT if sparse else 1 - _MIXED_GAIN)
    hopes = {fold: bits for fold, bits in hopes.items() if bits < most}
    plans = []
    for fold in sorted(hopes, key=lambda fold: hopes[fold])[:1]:
        tape = Tape()
        sparse_mask(tape, values, *masks[fold].shape)
        bits = tape.bits + math.log2(5) + math.log2(len(FOLDS))
        plans.append(_Plan(model=_MIXED, fold=fold, bits=_readable(bits, tape.turns), tape=tape))
    return plans


def _distance_plans(values: np.ndarray, grid: Grid) -> list[_Plan]:
    """Masks by their gaps, and by the ones of their rows or columns."""
    plans = [_Plan(model=_GAPS, way=way) for way in (_PLAIN, _BETWEEN)]
    for plan in plans:
        plan.bits = _measured(values, 2, grid, plan)
    for way in (_BY_ROW, _BY_COLUMN):
        if _is_counted(grid, way):
            matrix = values.reshape(grid.rows, grid.columns)
            ones = matrix.sum(axis=1 if way == _BY_ROW else 0, dtype="<u8")
            meter, length = Meter(), values.size // ones.size
            _line_ones(meter, ones, ones.size, length)
            numbers, many = np.unique(ones, return_counts=True)
            chosen = sum(n * _patterns_of(length, int(k)) for k, n in zip(numbers, many.tolist(), strict=True))
            bits = meter.bits + chosen + 5
            plans.append(_Plan(model=_GAPS, way=way, bits=_readable(bits, meter.turns + length)))
    return plans


def _patterns_of(n: int, k: int) -> float:
    """log2 of the number of ways to choose k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _told(ones: np.ndarray, fold: int) -> float:
    """Bits that runs of columns save by how many ones they hold, less what it takes to say it."""
    runs = ones.reshape(-1, fold).sum(axis=1)
    share = runs / max(1, int(runs.sum()))
    used = share[share > 0]
    return float((runs[runs > 0] * np.log2(used * runs.size)).sum()) - 0.5 * runs.size * math.log2(2 + runs.mean())


# --- raw numbers --------------------------------------------------------------------------------------------------


def patterns(coder: Coder, values: np.ndarray | None, count: int, width: int, real: bool, grid: Grid) -> np.ndarray:
    """Bit patterns of raw numbers, by whichever way makes them smallest.

    Args:
        coder: the coder.
        values: unsigned integers of `width` bits, or `None` when reading.
        count: how many.
        width: 8, 16, 32 or 64.
        real: floating-point numbers, whose lowest plane takes the sign.
        grid: where they lie.

    Raises:
        ValueError: data that no writer leaves.
    """
    if not count:
        return np.zeros(0, dtype=f"<u{width // 8}")
    way = coder.number(None if values is None else _best_way(values, width, real, grid), 4)
    return _by_way(coder, values, count, width, real, grid, way)


def _by_way(
    coder: Coder, values: np.ndarray | None, count: int, width: int, real: bool, grid: Grid, way: int
) -> np.ndarray:
    if way == _PLANES:
        return _planes(coder, values, count, width, real, grid)
    if way == _ASCENDING:
        keys = _ascending(coder, None if values is None else _keys(values, width, real), count, width)
        return _unkeyed(keys, width, real)
    if way == _LISTED:
        return _listed(coder, values, count, width, real, grid)
    mask = None if values is None else (values != 0).view(np.uint8)
    mask = whole_numbers(coder, mask, count, 2, grid)
    others = int(np.count_nonzero(mask))
    rest = None if values is None else values[values != 0]
    out = np.zeros(count, dtype=f"<u{width // 8}")
    out[mask.astype(bool)] = _planes(coder, rest, others, width, real, grid.within(mask))
    return out


def _planes(coder: Coder, values: np.ndarray | None, count: int, width: int, real: bool, grid: Grid) -> np.ndarray:
    """Byte by byte from the highest, the sign of a floating-point number moved to the lowest bit."""
    out = np.zeros(count, dtype=f"<u{width // 8}")
    turned = None if values is None else (values << 1 | values >> (width - 1) if real else values)
    for shift in range(width - 8, -8, -8):
        plane = None if turned is None else (turned >> shift & 255).astype(np.uint8)
        out |= whole_numbers(coder, plane, count, 256, grid).astype(out.dtype) << shift
        grid = Grid(1, count, 1)  # rows and columns tell something of exponents only
    return out >> 1 | out << (width - 1) if real else out


def _keys(values: np.ndarray, width: int, real: bool) -> np.ndarray:
    """Patterns that ascend as the floating-point numbers do."""
    if not real:
        return values
    sign = values >> (width - 1)
    return np.where(sign, ~values, values | values.dtype.type(1 << (width - 1)))


def _unkeyed(keys: np.ndarray, width: int, real: bool) -> np.ndarray:
    if not real:
        return keys
    top = keys.dtype.type(1 << (width - 1))
    return np.where(keys & top, keys ^ top, ~keys)


def _ascending(coder: Coder, keys: np.ndarray | None, count: int, width: int) -> np.ndarray:
    """Ascending keys by the steps from one to the next: first the bit lengths of all steps, then their lower bits."""
    dtype = np.dtype(f"<u{width // 8}")
    steps = None if keys is None else np.diff(keys, prepend=dtype.type(0))
    lengths = None if steps is None else _bit_lengths(steps)
    lengths = whole_numbers(coder, lengths, count, width + 1, Grid(1, count, 1))
    return np.cumsum(_below(coder, steps, lengths, width), dtype=dtype)


def _below(coder: Coder, steps: np.ndarray | None, lengths: np.ndarray, width: int) -> np.ndarray:
    """Numbers of known bit lengths: for each length, all that lies below the top bits."""
    dtype = np.dtype(f"<u{width // 8}")
    out = np.zeros(lengths.size, dtype=dtype)
    for length in np.flatnonzero(np.bincount(lengths)):
        here = lengths == length
        found = np.full(int(np.count_nonzero(here)), int(length > 0), dtype=dtype)
        left = max(0, int(length) - 1)
        while left:
            digit = min(16, left)
            left -= digit
            low = None if steps is None else steps[here] >> left & dtype.type((1 << digit) - 1)
            part = coder.even(None if low is None else low.astype(np.uint16), found.size, 1 << digit)
            found = found << digit | part.astype(dtype)
        out[here] = found
    return out


def _bit_lengths(values: np.ndarray) -> np.ndarray:
    """Bits of each number, 0 for 0."""
    out = np.zeros(values.size, dtype=np.uint8)
    left = values.copy()
    while left.any():
        out += left != 0
        left >>= 1
    return out


def _listed(coder: Coder, values: np.ndarray | None, count: int, width: int, real: bool, grid: Grid) -> np.ndarray:
    """The distinct numbers in ascending order, then which of them each value is."""
    listed, index = None, None
    if values is not None:
        listed, index = np.unique(_keys(values, width, real), return_inverse=True)
    size = 1 + coder.number(None if listed is None else listed.size - 1, _MOST_LISTED)
    listed = _ascending(coder, listed, size, width)
    narrow = None if index is None else index.reshape(-1).astype(np.uint8 if size <= 256 else np.uint16)
    return _unkeyed(listed, width, real)[whole_numbers(coder, narrow, count, size, grid)]


def _best_way(values: np.ndarray, width: int, real: bool, grid: Grid) -> int:
    """The smallest way: measured for few values, by what a sample tells for many."""
    ways = [_PLANES]
    keys = _keys(values, width, real)
    if values.size <= MOST_SIZE and bool((keys[1:] >= keys[:-1]).all()):
        ways.append(_ASCENDING)
    sample = values[:: 1 + values.size // _SAMPLE]
    few = np.unique(sample).size
    if 2 * few <= sample.size and few <= _MOST_LISTED and np.unique(values).size <= _MOST_LISTED:
        ways.append(_LISTED)
    if values.size > np.count_nonzero(values) + values.size // 8:
        ways.append(_SPARSE)
    if len(ways) > 1 and values.size > _SMALL:
        # Fewer planes than values of their own: an index is all there is to say.
        return _LISTED if _LISTED in ways else ways[-1]
    if len(ways) == 1:
        return _PLANES
    return min(ways, key=lambda way: _way_bits(values, width, real, grid, way))


def _way_bits(values: np.ndarray, width: int, real: bool, grid: Grid, way: int) -> float:
    meter = Meter()
    _by_way(meter, values, values.size, width, real, grid, way)
    return meter.bits
