"""A mixing model of sparse masks: five adaptive guesses of each position, weighed by how well they have done.

docs/format-streams.md, section 5, defines every step in whole numbers.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from detent.pack.coder import Coder

__all__ = ["FOLDS", "estimated_bits", "sparse_mask", "takes", "within_limits"]

FOLDS = (1, 4, 9, 16, 25, 36, 49, 64)  # inner positions that the inputs of a matrix may hide: a flattened image

_MOST_ROWS = 1 << 12
_MOST_COLUMNS = 1 << 14
_MOST_CELLS = 1 << 20
_MOST_ROUNDS = 1 << 14
_TURNS = 3  # that a round takes beyond the coder's own: bounds the time of a reader by the bytes it has
_ROUNDS = 2048  # a mask is coded in about this many rounds, or one a row and inner position if these are more
_PRIOR = 6  # sixteenths that both counts of a context start with
_LIMIT = 4000  # a context's counts are halved above this sum, so that old rows fade
_BUCKETS = 8
_RANGE = 3072  # of a logit, in 1/256
_RATE = 2


@functools.cache
def _squash() -> np.ndarray:
    """2**24 / (1 + exp(-x / 256)) for x from -3072 to 3071, rounded, at least 64 from 0 and 1."""
    x = np.arange(-_RANGE, _RANGE)
    return np.clip(np.rint(2**24 / (1 + np.exp(-x / 256))), 64, 2**24 - 64).astype(np.int64)


@functools.cache
def _log() -> np.ndarray:
    """256 ln(k), rounded; 0 for k = 0."""
    table = np.zeros(1 << 20, dtype=np.int32)
    table[1:] = np.rint(256 * np.log(np.arange(1, table.size)))
    return table


@functools.cache
def _bucket() -> np.ndarray:
    """Bits of a number of observations, at most 7."""
    return np.array([min(n.bit_length(), _BUCKETS - 1) for n in range(1 << 13)])


def _density(ones: np.ndarray, seen: int) -> np.ndarray:
    """The share of ones on a scale of half units of the natural logarithm: 15 for all, 0 from exp(-7.5) down."""
    share = _log()[16 * ones + 8] - _log()[16 * seen + 16]
    return np.maximum(15 + (share >> 7), 0)


class _Mixer:
    """Binary contexts, one of each set a decision, and the weights of their logits."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        sets = len(sizes)
        self.first = np.cumsum((0, *sizes[:-1]))
        self._size = sum(sizes)
        self._counts = np.zeros((2, self._size), dtype=np.int64)  # of zeros and of ones
        self._weights = np.full(_BUCKETS * sets, 65536 * 13 // (10 * sets), dtype=np.int64)
        self._row = _BUCKETS * np.arange(sets)[:, None]

    def code(self, coder: Coder, where: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        """One round: decisions that do not know of each other.

        Args:
            coder: the coder.
            where: contexts, shape (sets, decisions), each set's counted from its `first`.
            values: the bits, or `None` when reading.
        """
        counts = self._counts[:, where]
        logits = _log()[16 * counts + _PRIOR]
        logits = (logits[1] - logits[0]).astype(np.int64)
        seen = counts[0] + counts[1]
        coder.spend(_TURNS)
        weights = self._row + _bucket()[seen]
        mixed = (self._weights[weights] * logits).sum(axis=0) >> 16
        guess = _squash()[np.minimum(np.maximum(mixed + _RANGE, 1), 2 * _RANGE - 1)]
        found = coder.decisions(guess, values)
        error = ((found.astype(np.int64) << 24) - guess) >> 8
        steps = np.zeros_like(self._weights)
        np.add.at(steps, weights.reshape(-1), (logits * error).reshape(-1))
        self._weights += (_RATE * steps) >> 18
        np.add.at(self._counts.reshape(-1), (where + self._size * found.astype(np.int64)).reshape(-1), 1)
        if int(seen.max()) + found.size > _LIMIT:
            full = where[self._counts[:, where].sum(axis=0) > _LIMIT]
            self._counts[:, full] = (self._counts[:, full] + 1) >> 1
        return found


def _parts(rows: int, alive: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Inner position and inputs of the rounds of a row."""
    chunk = max(8, rows * int(np.count_nonzero(alive)) // _ROUNDS)
    places = [np.flatnonzero(alive[:, k]) for k in range(alive.shape[1])]
    return [(k, here[i : i + chunk]) for k, here in enumerate(places) for i in range(0, here.size, chunk)]


def _core(coder: Coder, values: np.ndarray | None, rows: int, alive: np.ndarray) -> np.ndarray:
    """Rows of bits over (inputs, inner positions); where `alive` is 0 there is none.

    Args:
        coder: the coder.
        values: shape (rows, inputs, inner), or `None` when reading.
        rows: how many.
        alive: shape (inputs, inner).

    Raises:
        ValueError: more rounds than a mask may take.
    """
    inputs, inner = alive.shape
    side = math.isqrt(inner) if math.isqrt(inner) ** 2 == inner else inner
    width = max(1, int(np.count_nonzero(alive)))
    parts = _parts(rows, alive)
    if rows * len(parts) > _MOST_ROUNDS:
        raise ValueError(f"a mask of {rows} rows takes {rows * len(parts)} rounds, more than {_MOST_ROUNDS}")
    mixer = _Mixer((128, inputs, 16 * inner, 32, 256))
    first = mixer.first
    out = np.zeros((rows, inputs, inner), dtype=np.uint8)
    columns = np.zeros((inputs, inner), dtype=np.int64)
    above = two_above = columns
    for r in range(rows):
        coder.spend(1)
        row, kernel, ones, seen = np.zeros((inputs, inner), dtype=np.int64), np.zeros(inputs, dtype=np.int64), 0, 0
        old = 4 * above + 2 * two_above + int(first[3])
        dense = 16 * _density(columns, r) + int(first[4])
        for k, i in parts:
            where = np.empty((5, i.size), dtype=np.int64)
            few = np.minimum(kernel[i], 3)
            left = row[i, k - 1] if k % side else 0
            up = row[i, k - side] if k >= side else 0
            where[0] = 8 * min(ones, 15) + min(7, 8 * seen // width)
            where[1] = i + first[1]
            where[2] = 4 * few + (16 * k + int(first[2])) + 2 * left + up
            where[3] = old[i, k] + 8 * few + left
            where[4] = dense[i, k] + max(0, 15 + (int(_log()[16 * ones + 8]) - int(_log()[16 * seen + 16]) >> 7))
            found = mixer.code(coder, where, None if values is None else values[r, i, k])
            row[i, k] = found
            kernel[i] += found
            ones, seen = ones + int(found.sum()), seen + i.size
        out[r] = row
        columns = columns + row
        two_above, above = above, row
    return out


def _flags(coder: Coder, values: np.ndarray | None, count: int, fold: int) -> np.ndarray:
    """Which lines hold a one, as a mask of count / fold rows and fold columns."""
    alive = np.ones((fold, 1), dtype=np.uint8)
    given = None if values is None else values.reshape(count // fold, fold, 1)
    return _core(coder, given, count // fold, alive).reshape(-1)


def within_limits(rows: int, columns: int) -> bool:
    """Whether the model takes masks of this size."""
    return 1 < rows <= _MOST_ROWS and 1 < columns <= _MOST_COLUMNS and rows * columns <= _MOST_CELLS


def takes(mask: np.ndarray) -> bool:
    """Whether a mask of (rows, inputs, inner) within the limits takes few enough rounds."""
    rows = int(np.count_nonzero(mask.any(axis=(1, 2))))
    return rows * len(_parts(rows, np.asarray(mask.any(axis=0)))) <= _MOST_ROUNDS


def _entropy(ones: np.ndarray, seen: np.ndarray | int) -> float:
    """Bits of ones among so many places, context by context, with half a logarithm for what each has to learn."""
    ones, seen = np.broadcast_arrays(np.asarray(ones, dtype=np.float64), np.asarray(seen, dtype=np.float64))
    ones, seen = ones[seen > 0], seen[seen > 0]
    parts = [n * np.log2(np.maximum(n, 1)) for n in (seen, ones, seen - ones)]
    return float((parts[0] - parts[1] - parts[2] + 0.5 * np.log2(seen + 1)).sum())


def _of_contexts(contexts: np.ndarray, mask: np.ndarray, alive: np.ndarray, size: int) -> float:
    """Bits of a mask where every place knows the ones of its context in the whole mask."""
    both = (2 * contexts + mask)[:, alive]
    counts = np.bincount(both.reshape(-1), minlength=2 * size).reshape(size, 2)
    return _entropy(counts[:, 1], counts.sum(axis=1))


def estimated_bits(mask: np.ndarray) -> float:
    """About what the model takes for a mask of (rows, inputs, inner), in a hundredth of its time.

    What its sets of contexts save one by one over a single count: rows, columns, and the better of the neighbours in a
    kernel and those in the rows above. Mixed, they save at most about the sum.
    """
    rows, alive = mask.any(axis=(1, 2)), np.asarray(mask.any(axis=0))
    kept = mask[rows]
    ones, width, inner = int(np.count_nonzero(kept)), int(np.count_nonzero(alive)), mask.shape[2]
    lines = sum(_entropy(np.asarray(np.count_nonzero(line)), line.size) for line in (rows, alive))
    base = _entropy(np.array([ones]), len(kept) * width)
    by_row = _entropy(np.count_nonzero(kept, axis=(1, 2)), width)
    by_column = _entropy(np.count_nonzero(kept, axis=0)[alive], len(kept))
    side = math.isqrt(inner) if math.isqrt(inner) ** 2 == inner else inner
    near = np.zeros(kept.shape, dtype=np.int32)
    left = np.zeros_like(kept)
    if inner > 1:
        few = np.minimum(np.cumsum(kept, axis=2, dtype=np.int16) - kept, 3)
        left[:, :, 1:] = kept[:, :, :-1]
        left[:, :, ::side] = 0
        near += 4 * few + 2 * left
    above = near * 2
    above[1:] += 2 * kept[:-1]
    above[2:] += kept[:-2]
    best = min(base, _of_contexts(above, kept, alive, 32))
    if inner > 1:
        near += 16 * np.arange(inner, dtype=np.int32)
        near[:, :, side:] += kept[:, :, :-side]
        best = min(best, _of_contexts(near, kept, alive, 16 * inner))
    return lines + best - max(0.0, base - by_row) - max(0.0, base - by_column)


def sparse_mask(coder: Coder, values: np.ndarray | None, rows: int, inputs: int, inner: int) -> np.ndarray:
    """A mask of (rows, inputs, inner): first which rows and columns hold a one, then the rows over what is left.

    Raises:
        ValueError: more rounds than a mask may take.
    """
    whole = None if values is None else values.reshape(rows, inputs, inner)
    lines = _flags(coder, None if whole is None else np.asarray(whole.any(axis=(1, 2))), rows, 1)
    used = None if whole is None else whole.any(axis=0).reshape(-1)
    columns = _flags(coder, used, inputs * inner, inner if inputs > 1 else 1)
    kept = np.flatnonzero(lines)
    out = np.zeros((rows, inputs, inner), dtype=np.uint8)
    given = None if whole is None else whole[kept]
    out[kept] = _core(coder, given, kept.size, columns.reshape(inputs, inner))
    return out.reshape(-1)
