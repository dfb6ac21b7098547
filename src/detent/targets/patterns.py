"""Patterns: how a file says which weights of a sparse tensor survive."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.grouping import Layout
from detent.targets.parts import Part, Take

__all__ = ["Blocks", "Mask", "Pattern", "Tiles", "pattern_of"]

LONGEST_BLOCK = 1 << 31  # weights; no tensor has rows as long
_LONGEST_RANK = 1 << 62  # patterns of a block that int64 can count
_PIECE = 1 << 19  # weights ranked at a time, so that passing tensors stay small beside the weight


class Pattern(abc.ABC):
    """How the survivors of a tensor are written; final subclasses are frozen and hold no tensors."""

    number: ClassVar[int]  # of the kind, in files

    @abc.abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """The fields, as whole numbers for files."""

    @classmethod
    @abc.abstractmethod
    def taken(cls, take: Take) -> Pattern:
        """The inverse of `numbers`."""

    @abc.abstractmethod
    def parts(self, layout: Layout) -> tuple[Part, ...]:
        """The runs of whole numbers that hold a pattern."""

    @abc.abstractmethod
    def survivors(self, layout: Layout) -> int | Literal["ones", "listed"]:
        """How many weights survive: a number, the ones of the mask, or a number that a file has to list."""

    @abc.abstractmethod
    def values(self, mask: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        """A mask in the shape of the weight, as the runs of `parts`."""

    @abc.abstractmethod
    def mask(self, values: Sequence[Tensor], layout: Layout) -> Tensor:
        """The inverse of `values`.

        Raises:
            ValueError: numbers that stand for no pattern.
        """


@dataclass(frozen=True, kw_only=True)
class Mask(Pattern):
    """One bit a weight.

    Example:
        >>> Mask().values(torch.tensor([[True, False]]), Layout(shape=(1, 2)))
        (tensor([1, 0], dtype=torch.uint8),)
    """

    number: ClassVar[int] = 0

    def numbers(self) -> tuple[int, ...]:
        return ()

    @classmethod
    def taken(cls, take: Take) -> Mask:
        return cls()

    def parts(self, layout: Layout) -> tuple[Part, ...]:
        return (Part(name="mask", role="where", kind=1, count=layout.numel),)

    def survivors(self, layout: Layout) -> Literal["ones"]:
        return "ones"

    def values(self, mask: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        return (mask.reshape(-1).to(torch.uint8),)

    def mask(self, values: Sequence[Tensor], layout: Layout) -> Tensor:
        return values[0].bool().reshape(layout.shape)


@dataclass(frozen=True, kw_only=True)
class Tiles(Pattern):
    """One bit a tile of the matrix (output channels, inputs); tiles at the edges may be smaller.

    Args:
        rows: output channels of a tile, >= 1.
        columns: inputs of a tile, >= 1.

    Example:
        >>> Tiles(rows=2, columns=2).count(Layout(shape=(4, 5)))
        6
    """

    number: ClassVar[int] = 1

    rows: int
    columns: int

    def numbers(self) -> tuple[int, ...]:
        return (self.rows, self.columns)

    @classmethod
    def taken(cls, take: Take) -> Tiles:
        return cls(rows=take(1, LONGEST_BLOCK), columns=take(1, LONGEST_BLOCK))

    def _sides(self, layout: Layout) -> tuple[tuple[int, int], tuple[int, int]]:
        """(length, length of a tile) of the rows and of the columns."""
        rows, columns = matrix(layout)
        return (rows, self.rows), (columns, self.columns)

    def count(self, layout: Layout) -> int:
        """Number of tiles."""
        return math.prod(-(-length // size) for length, size in self._sides(layout))

    def sizes(self, layout: Layout) -> Tensor:
        """Weights of each tile."""
        sides = []
        for length, size in self._sides(layout):
            side = torch.full((-(-length // size),), size)
            side[-1] = length - size * (len(side) - 1)
            sides.append(side)
        return (sides[0][:, None] * sides[1]).reshape(-1)

    def cut(self, x: Tensor, layout: Layout) -> Tensor:
        """The tiles as rows of a contiguous matrix, smaller ones filled with zeros."""
        whole = layout.by_channel(x)
        (rows, columns), r, c = whole.shape, self.rows, self.columns
        whole = torch.nn.functional.pad(whole, (0, -columns % c, 0, -rows % r))
        tiles = whole.reshape(whole.shape[0] // r, r, whole.shape[1] // c, c).permute(0, 2, 1, 3)
        return tiles.reshape(-1, r * c).contiguous()

    def spread(self, chosen: Tensor, layout: Layout) -> Tensor:
        """One value a tile, for each of its weights."""
        (rows, r), (columns, c) = self._sides(layout)
        grid = chosen.reshape(-(-rows // r), -(-columns // c))
        return layout.from_channels(grid.repeat_interleave(r, dim=0)[:rows].repeat_interleave(c, dim=1)[:, :columns])

    def parts(self, layout: Layout) -> tuple[Part, ...]:
        if any(size > length for length, size in self._sides(layout)):
            raise ValueError(f"tiles of {self.rows} x {self.columns} are larger than {matrix(layout)}")
        return (Part(name="mask", role="where", kind=1, count=self.count(layout)),)

    def survivors(self, layout: Layout) -> Literal["listed"]:
        return "listed"

    def values(self, mask: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        return (self.cut(mask, layout).any(dim=1).to(torch.uint8),)

    def mask(self, values: Sequence[Tensor], layout: Layout) -> Tensor:
        return self.spread(values[0].bool(), layout)


@dataclass(frozen=True, kw_only=True)
class Blocks(Pattern):
    """The number of a pattern for every m weights along the inputs, n of which survive.

    Args:
        n: survivors of a block, 1 to m; a last short block keeps min(n, its length).
        m: weights of a block, 1 to 2^31.
        along: "channels": input channels at one kernel position. "columns": inputs of the GEMM matrix.

    Example:
        >>> [part.kind for part in Blocks(n=2, m=4).parts(Layout(shape=(8, 8)))]    # one of six: three bits
        [3]
    """

    number: ClassVar[int] = 2

    n: int
    m: int
    along: Literal["channels", "columns"] = "channels"

    def numbers(self) -> tuple[int, ...]:
        return (self.n, self.m, int(self.along == "columns"))

    @classmethod
    def taken(cls, take: Take) -> Blocks:
        n, m = take(1, LONGEST_BLOCK), take(1, LONGEST_BLOCK)
        if n > m:
            raise ValueError(f"{n} of the {m} weights of a block survive")
        return cls(n=n, m=m, along="columns" if take(0, 1) else "channels")

    def _shape(self, layout: Layout) -> tuple[int, int, int]:
        """(lines that blocks run along, full blocks a line, length of its last short block)."""
        kernel = layout.kernel if self.along == "channels" else 1
        length = matrix(layout)[1] // kernel
        return layout.channels * kernel, length // self.m, length % self.m

    def is_flat(self, layout: Layout) -> bool:
        """Whether blocks are runs of m weights in memory, one after another, and all are full."""
        lines, _, tail = self._shape(layout)
        return layout.is_row_major and lines == layout.channels and not tail

    def cut(self, rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """(full blocks, short blocks), one a row, of some channels: rows of `Layout.by_channel`."""
        lines, full, _ = self._shape(layout)
        kernel = lines // layout.channels
        line = rows.reshape(len(rows), -1, kernel).transpose(1, 2).reshape(len(rows) * kernel, -1)
        return line[:, : full * self.m].reshape(-1, self.m), line[:, full * self.m :]

    def joined(self, blocks: Tensor, rest: Tensor, layout: Layout) -> Tensor:
        """The inverse of `cut`."""
        lines, full, _ = self._shape(layout)
        line = torch.cat([blocks.reshape(len(rest), full * self.m), rest], dim=1)
        kernel = lines // layout.channels
        return line.reshape(len(rest) // kernel, kernel, -1).transpose(1, 2).reshape(len(rest) // kernel, -1)

    def parts(self, layout: Layout) -> tuple[Part, ...]:
        lines, full, tail = self._shape(layout)
        return (*_rank_parts("positions", lines * full, self.m, self.n), *_rank_parts("last", lines, tail, self.n))

    def survivors(self, layout: Layout) -> int:
        lines, full, tail = self._shape(layout)
        return lines * (full * self.n + min(tail, self.n))

    def values(self, mask: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        blocks, rest = self.cut(layout.by_channel(mask), layout)
        return (*_ranked(blocks, self.n), *_ranked(rest, self.n))

    def mask(self, values: Sequence[Tensor], layout: Layout) -> Tensor:
        lines, full, tail = self._shape(layout)
        own = len(_rank_parts("positions", lines * full, self.m, self.n))
        blocks = _unranked(values[:own], lines * full, self.m, self.n)
        return layout.from_channels(self.joined(blocks, _unranked(values[own:], lines, tail, self.n), layout))


_KINDS: tuple[type[Pattern], ...] = (Mask, Tiles, Blocks)


def pattern_of(take: Take) -> Pattern:
    """The pattern that the next numbers of a form stand for."""
    return _KINDS[take(0, len(_KINDS) - 1)].taken(take)


def matrix(layout: Layout) -> tuple[int, int]:
    """(output channels, inputs of each): the shape of `Layout.by_channel`."""
    return layout.channels, layout.numel // layout.channels


# --- ranks --------------------------------------------------------------------------------------------------------


def _patterns(m: int, n: int) -> int:
    """How many ways there are to choose n of m; of more than int64 can count, that it is more."""
    few = min(n, m - n)
    if few and few * math.log2(m / few) > 63:  # there are at least (m / few)^few, and to count them could take for ever
        return _LONGEST_RANK + 1
    return math.comb(m, n)


def _rank_parts(name: str, rows: int, m: int, n: int) -> tuple[Part, ...]:
    """The runs that hold the numbers of patterns of n in m: at most 16 bits each, none if they are certain.

    Patterns that int64 cannot count are written as one bit a weight.
    """
    if n >= m:
        return ()
    patterns = _patterns(m, n)
    if patterns > _LONGEST_RANK:
        return (Part(name=name, role="where", kind=1, count=rows * m),)
    bits = (patterns - 1).bit_length()
    below = patterns if bits <= 16 else None
    return tuple(
        Part(
            name=name if not at else f"{name}-{at // 16}",
            role="where",
            kind=min(16, bits - at),
            count=rows,
            below=below,
        )
        for at in range(0, bits, 16)
    )


def _binomials(m: int, k: int, device: torch.device | None) -> Tensor:
    """C(p, i) for i from 1 to k in row i - 1 and p from 0 to m - 1, each row the running sum of the one before."""
    rows, last = [], torch.ones(m, dtype=torch.int64, device=device)
    for _ in range(k):
        last = torch.cat([last.new_zeros(1), last[:-1].cumsum(0)])
        rows.append(last)
    return torch.stack(rows)


def _ranked(mask: Tensor, n: int) -> tuple[Tensor, ...]:
    """Rows of a mask with n set each, as the numbers of their patterns (the combinatorial number system)."""
    rows, m = mask.shape
    parts = _rank_parts("", rows, m, n)
    if not parts or _patterns(m, n) > _LONGEST_RANK:
        return tuple(mask.reshape(-1).to(torch.uint8) for _ in parts)
    few = min(n, m - n)  # counting the rarer kind keeps every number below that of the patterns
    table = _binomials(m if rows else 0, few, mask.device)  # a block longer than a line is one that there is not
    rank = torch.empty(rows, dtype=torch.int64, device=mask.device)
    step = max(1, _PIECE // m)
    for first in range(0, rows, step):
        some = mask[first : first + step]
        hits = (some if few == n else ~some).nonzero()[:, 1].reshape(-1, few)
        rank[first : first + step] = table.gather(1, hits.t()).sum(dim=0)
    return tuple((rank >> 16 * i & (1 << part.width) - 1).to(torch.int32) for i, part in enumerate(parts))


def _unranked(values: Sequence[Tensor], rows: int, m: int, n: int) -> Tensor:
    """Inverse of `_ranked`.

    Raises:
        ValueError: a number that stands for no pattern.
    """
    device = values[0].device if values else None
    if n >= m or not rows:
        return torch.ones(rows, m, dtype=torch.bool, device=device)
    if _patterns(m, n) > _LONGEST_RANK:
        mask = values[0].bool().reshape(rows, m)
        if bool((mask.sum(dim=1) != n).any()):
            raise ValueError(f"a block that keeps another number than {n} of {m}")
        return mask
    few = min(n, m - n)
    rank = torch.zeros(rows, dtype=torch.int64, device=device)
    for i, part in enumerate(values):
        rank += part.to(torch.int64) << 16 * i
    if int(rank.max()) >= _patterns(m, n):
        raise ValueError(f"a number of no pattern of {n} in {m}")
    mask = torch.zeros(rows, m, dtype=torch.bool, device=device)
    for row in _binomials(m, few, device).flip(0):  # the place of the last hit is the largest p with C(p, few) <= rank
        place = torch.searchsorted(row, rank, right=True) - 1
        rank = rank - row[place]
        mask.scatter_(1, place[:, None], True)
    return mask if few == n else ~mask
