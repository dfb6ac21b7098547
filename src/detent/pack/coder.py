"""The entropy coder as the models see it: one face for writing, measuring and reading.

docs/format-streams.md, section 3, says how weights become probabilities and symbols become bytes.
"""

from __future__ import annotations

import abc
import functools
import importlib
import math
from typing import Any

import numpy as np

__all__ = ["Coder", "Meter", "Reader", "Tape", "Writer", "most_turns"]

PRECISION = 24
_LEAST_TURNS, _TURNS_A_BYTE = 1 << 11, 32  # what the bytes of a blob may cost to decode
_PER_TURN = 1 << 12  # symbols of one table that take about as long as a turn, and so are one
_PER_TABLE = 1 << 11  # weights of a table, likewise
_BLOCK = 1 << 20  # symbols that go through the coder at a time: bounds the memory of its 32-bit copies


# --- the coder ----------------------------------------------------------------------------------------------------


def most_turns(size: int) -> int:
    """Turns of the coder that a blob of `size` bytes may take, besides one for every 4096 values.

    A stream of no bytes is a stream of zeros without end: what bounds the time of a reader is not what it decodes.
    """
    return _LEAST_TURNS + _TURNS_A_BYTE * size


class Coder(abc.ABC):
    """Takes or gives symbols of known probabilities.

    Attributes:
        turns: what has been done so far, in calls that each cost a little time whatever they decode, less the values
            that account for them.
        tables: whether many tables at once can be counted, by `counted`.
    """

    reads: bool
    tables: bool = False
    turns: int = 0

    def spend(self, turns: int) -> None:
        """Count turns; a reader refuses more than its bytes may take."""
        self.turns += turns

    def expect(self, values: int) -> None:
        """Count the turns that so many values may take however few bytes they are."""
        self.turns -= values // _PER_TURN

    @abc.abstractmethod
    def symbols(self, weights: np.ndarray, values: np.ndarray | None, count: int) -> np.ndarray:
        """`count` symbols of one distribution: symbol i has about `weights[i] / sum(weights)`.

        Args:
            weights: whole numbers >= 0, at least two, with a sum of 1 to 2**53.
            values: the symbols, or `None` when reading.
            count: how many.
        """

    @abc.abstractmethod
    def decisions(self, ones: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        """One bit for each entry of `ones`, which is its probability of being 1 times 2**24, 1 to 2**24 - 1."""

    @abc.abstractmethod
    def raw(self, values: np.ndarray | None, size: int) -> np.ndarray:
        """`size` bytes as they are."""

    def even(self, values: np.ndarray | None, count: int, size: int) -> np.ndarray:
        """`count` symbols of `size`, all alike."""
        return self.symbols(np.ones(size), values, count)

    def number(self, value: int | None, size: int) -> int:
        """A number from 0 to size - 1, all alike."""
        if size < 2:
            return 0
        given = None if value is None else np.array([value])
        return int(self.even(given, 1, size)[0])


@functools.cache
def _library() -> Any:
    """What we use of constriction; imported late, because most of Detent runs without it."""
    return importlib.import_module("constriction").stream


def _table(weights: np.ndarray) -> Any:
    return _library().model.Categorical(np.ascontiguousarray(weights, dtype=np.float64), perfect=False)


@functools.lru_cache(maxsize=64)
def _even_table(size: int) -> Any:
    return _table(np.ones(size))


@functools.cache
def _bits() -> Any:
    """The family of distributions over two symbols."""
    return _library().model.Categorical(perfect=False)


def _pairs(ones: np.ndarray) -> np.ndarray:
    """What the coder takes for given probabilities: it adds 1 to each weight, and these sums are exact in float32."""
    pair = np.empty((ones.size, 2), dtype=np.float32)
    pair[:, 0] = (1 << PRECISION) - 1 - ones
    pair[:, 1] = ones - 1
    return pair


class Writer(Coder):
    """Keeps what is to be coded; the coder is a stack, so it is fed backwards at the end."""

    reads = False

    def __init__(self) -> None:
        self._todo: list[tuple[np.ndarray, Any]] = []
        self._raw: list[np.ndarray] = []

    def symbols(self, weights: np.ndarray, values: np.ndarray | None, count: int) -> np.ndarray:
        assert values is not None and values.size == count, count
        self.spend(1 + weights.size // _PER_TABLE)
        if count:
            self._todo.append((values, _table(weights)))
        return values

    def even(self, values: np.ndarray | None, count: int, size: int) -> np.ndarray:
        assert values is not None and values.size == count, count
        self.spend(1 + size // _PER_TABLE)
        if count:
            self._todo.append((values, _even_table(size)))
        return values

    def decisions(self, ones: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        assert values is not None and values.size == ones.size, ones.size
        self.spend(1)
        if ones.size:
            self._todo.append((values, _pairs(ones)))
        return values

    def raw(self, values: np.ndarray | None, size: int) -> np.ndarray:
        assert values is not None and values.size == size, size
        self._raw.append(values)
        return values

    def replay(self, tape: Tape) -> None:
        """All that a tape keeps, in its order."""
        self.spend(tape.turns)
        for probabilities, values, decisions in tape.kept:
            self._todo.append((values, _pairs(probabilities) if decisions else _table(probabilities)))

    def finish(self) -> tuple[bytes, bytes]:
        """The raw bytes and the coded ones."""
        coder = _library().stack.AnsCoder()
        while self._todo:
            values, model = self._todo.pop()
            if isinstance(model, np.ndarray):
                coder.encode_reverse(values.astype(np.int32), _bits(), model)
                continue
            for first in reversed(range(0, values.size, _BLOCK)):
                coder.encode_reverse(values[first : first + _BLOCK].astype(np.int32), model)
        words = coder.get_compressed().astype("<u4", copy=False).view(np.uint8)
        size = words.size
        while size and not words[size - 1]:
            size -= 1
        return b"".join(part.tobytes() for part in self._raw), words[:size].tobytes()


class Meter(Coder):
    """Only counts the bits that a `Writer` would write."""

    reads = False
    tables = True

    def __init__(self) -> None:
        self.bits = 0.0

    def symbols(self, weights: np.ndarray, values: np.ndarray | None, count: int) -> np.ndarray:
        assert values is not None
        self.spend(1 + weights.size // _PER_TABLE)
        if count:
            shares = np.maximum(weights, float(weights.sum()) / (1 << PRECISION))
            found = np.bincount(values, minlength=weights.size)
            used = np.flatnonzero(found)
            self.bits += float((found[used] * (math.log2(float(shares.sum())) - np.log2(shares[used]))).sum())
        return values

    def even(self, values: np.ndarray | None, count: int, size: int) -> np.ndarray:
        assert values is not None
        self.spend(1 + size // _PER_TABLE)
        self.bits += count * math.log2(size)
        return values

    def counted(self, weights: np.ndarray, found: np.ndarray) -> None:
        """As many calls of `symbols` as there are rows: the weights, and how often each symbol came."""
        self.spend(len(weights) * (1 + weights.shape[1] // _PER_TABLE))
        shares = np.maximum(weights, weights.sum(axis=1, keepdims=True) / (1 << PRECISION))
        whole = np.log2(shares.sum(axis=1))
        self.bits += float(found.sum(axis=1) @ whole - (found * np.log2(shares)).sum())

    def replay(self, tape: Tape) -> None:
        """All that a tape keeps."""
        self.spend(tape.turns)
        self.bits += tape.bits

    def decisions(self, ones: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        assert values is not None
        self.spend(1)
        self.bits += PRECISION * ones.size - float(np.log2(np.where(values, ones, (1 << PRECISION) - ones)).sum())
        return values

    def raw(self, values: np.ndarray | None, size: int) -> np.ndarray:
        assert values is not None
        self.bits += 8 * size
        return values


class Tape(Meter):
    """A meter that also keeps what it counts, so that a trial that wins need not be run again.

    Attributes:
        kept: probabilities or weights, the values, and whether these are decisions.
    """

    tables = False

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[np.ndarray, np.ndarray, bool]] = []

    def symbols(self, weights: np.ndarray, values: np.ndarray | None, count: int) -> np.ndarray:
        found = super().symbols(weights, values, count)
        if count:
            self.kept.append((weights.copy(), found, False))
        return found

    def even(self, values: np.ndarray | None, count: int, size: int) -> np.ndarray:
        return self.symbols(np.ones(size), values, count)

    def decisions(self, ones: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        found = super().decisions(ones, values)
        if ones.size:
            self.kept.append((ones, found, True))
        return found

    def raw(self, values: np.ndarray | None, size: int) -> np.ndarray:
        raise AssertionError("plain bytes have no probabilities to keep")


class Reader(Coder):
    """Gives back what a `Writer` wrote.

    Raises:
        ValueError: bytes that no writer leaves.
    """

    reads = True

    def __init__(self, raw: memoryview, coded: memoryview) -> None:
        if coded.nbytes and not coded[-1]:
            raise ValueError("coded data ends in a zero byte")
        words = np.zeros(-(-coded.nbytes // 4), dtype="<u4")
        words.view(np.uint8)[: coded.nbytes] = np.frombuffer(coded, dtype=np.uint8)
        self._coder = _library().stack.AnsCoder(words.astype(np.uint32, copy=False))
        self._raw = raw
        self._first = 0
        self._most = most_turns(raw.nbytes + coded.nbytes)

    def spend(self, turns: int) -> None:
        self.turns += turns
        if self.turns > self._most:
            raise ValueError(f"the data take more than the {self._most} turns of the coder that their bytes allow")

    def symbols(self, weights: np.ndarray, values: np.ndarray | None, count: int) -> np.ndarray:
        self.spend(1 + weights.size // _PER_TABLE)
        narrow = np.uint8 if weights.size <= 256 else np.uint16
        out = np.empty(count, dtype=narrow)
        model = _table(weights) if count else None
        for first in range(0, count, _BLOCK):
            size = min(_BLOCK, count - first)
            out[first : first + size] = self._coder.decode(model, size)
        return out

    def decisions(self, ones: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        self.spend(1)
        if not ones.size:
            return np.empty(0, dtype=np.uint8)
        return self._coder.decode(_bits(), _pairs(ones)).astype(np.uint8)

    def raw(self, values: np.ndarray | None, size: int) -> np.ndarray:
        if self._first + size > self._raw.nbytes:
            raise ValueError(f"{size} plain bytes are due, {self._raw.nbytes - self._first} are left")
        self._first += size
        return np.frombuffer(self._raw[self._first - size : self._first], dtype=np.uint8)

    def finish(self) -> None:
        """Raises:
        ValueError: there is more data than the pieces need, or another state than encoding starts from.
        """
        if self._first != self._raw.nbytes or not self._coder.is_empty():
            raise ValueError("the data do not end where the pieces do")
