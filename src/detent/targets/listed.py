"""Targets whose levels are listed one by one for each group: powers of two, learned levels."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent import masks
from detent.grouping import GranularityLike, Layout, granularity_of
from detent.schedules import is_whole
from detent.targets.base import Codes, Lines, Params, Scope, Stream, Target, check_finite, compute_dtype
from detent.targets.declared import Declared, Pieces
from detent.targets.kmeans import kmeans
from detent.targets.levels import PARAM_DTYPES, check_param_dtype

__all__ = ["LearnedLevels", "PowerOfTwo"]

_COMPARED = 32  # levels up to which to compare with each takes less time than to search
_PIECE = 1 << 21  # weights placed at a time where a group's levels have to be looked up weight by weight


class _Listed(Target):
    """Levels that are listed one by one for each group."""

    granularity: GranularityLike

    is_exact: ClassVar[bool] = True

    @property
    def scope(self) -> Scope:
        return "element"

    @property
    @abc.abstractmethod
    def _width(self) -> int:
        """Bits a code."""

    @abc.abstractmethod
    def _table(self, params: Params) -> Tensor:
        """(groups, levels), ascending, in float64; every level is a number of the weight's dtype."""

    def _pieces(self, x: Tensor, layout: Layout) -> Iterable[tuple[Tensor, Tensor]]:
        """Pieces of a tensor, each with the group of every weight."""
        marks = torch.arange(granularity_of(self.granularity).count(layout), dtype=torch.int32, device=x.device)
        group = granularity_of(self.granularity).expand(marks, layout).broadcast_to(x.shape)
        if x.numel() <= _PIECE or x.dim() < 2:
            return [(x, group)]
        rows = max(1, _PIECE * x.shape[0] // x.numel())
        return zip(x.split(rows), group.split(rows), strict=True)

    @staticmethod
    def _bounds(table: Tensor, dtype: torch.dtype) -> Tensor:
        """The largest numbers that belong to each level but the last."""
        middles = (table[:, :-1] + table[:, 1:]) / 2
        # Rounded down: a weight is above the true middle exactly when it is above the largest number not beyond it.
        bounds = middles.to(dtype)
        return torch.where(bounds.double() > middles, bounds.nextafter(torch.full_like(bounds, -torch.inf)), bounds)

    def _places(self, x: Tensor, table: Tensor, layout: Layout) -> Tensor:
        """Number of the nearest level of each weight's group, int32; half-way the lower one."""
        bounds = self._bounds(table, x.dtype)
        if len(table) == 1:
            return torch.bucketize(x.contiguous(), bounds[0], out_int32=True)
        size = 1 << (table.shape[1] - 1).bit_length()
        bounds = torch.nn.functional.pad(bounds, (0, size - 1 - bounds.shape[1]), value=torch.inf).reshape(-1)
        places = []
        for part, group in self._pieces(x, layout):
            place = torch.zeros_like(part, dtype=torch.int32)
            step = size
            while step > 1:
                step //= 2
                bound = bounds.index_select(0, (group * (size - 1) + place + (step - 1)).reshape(-1))
                place += step * (part > bound.reshape(part.shape))
            places.append(place)
        return torch.cat(places) if len(places) > 1 else places[0]

    def _values(self, places: Tensor, table: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        table = table.to(dtype)
        if len(table) == 1:
            return table[0].index_select(0, places.reshape(-1)).reshape(places.shape)
        flat, k = table.reshape(-1), table.shape[1]
        parts = [
            flat.index_select(0, (group * k + place).reshape(-1)).reshape(place.shape)
            for place, group in self._pieces(places, layout)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def project(self, w: Tensor, params: Params) -> Tensor:
        out = torch.empty_like(w.detach())
        self.project_into(w, params, out)
        return out

    def project_into(self, w: Tensor, params: Params, out: Tensor) -> None:
        w, table, dtype = w.detach(), self._table(params), compute_dtype(w.dtype)
        lined = Lines.of(self, params, w, out)
        if not lined.apart or table.shape[1] > _COMPARED:
            out.copy_(self._values(self._places(w.to(dtype), table, params.layout), table, params.layout, w.dtype))
            return
        bounds, falling, k = self._bounds(table, dtype), table.to(w.dtype).flip(1).reshape(-1), table.shape[1]
        if len(table) == 1:
            for x, q in lined.cut():
                q.copy_(falling.index_select(0, _below(x.to(dtype), bounds[0].unbind())))
            return
        bounds, first = bounds.unsqueeze(-1), torch.arange(0, len(table) * k, k, dtype=torch.int32)[:, None]
        if (rows := lined.params.layout.rows) is not None:
            bounds, first = bounds[slice(*rows)], first[slice(*rows)]
        for x, q, here, at in lined.cut(bounds, first):
            place = _below(x.to(dtype), here.unbind(1)).add_(at)
            q.copy_(falling.index_select(0, place.view(-1)).view(q.shape))

    def lined(self, params: Params) -> Params | None:
        return params.lined(granularity_of(self.granularity))

    def encode(self, w: Tensor, params: Params) -> Codes:
        check_finite(w)
        x = w.detach().to(compute_dtype(w.dtype))
        codes = self._places(x, self._table(params), params.layout).to(torch.uint8).reshape(-1)
        return Codes(streams=(Stream(name="codes", values=codes, width=self._width),))

    def decode(self, codes: Codes, params: Params, dtype: torch.dtype) -> Tensor:
        table = self._table(params).to(codes["codes"].device)
        places = codes["codes"].to(torch.int32).reshape(params.layout.shape)
        if places.numel() and int(places.max()) >= table.shape[1]:
            raise ValueError(f"a code of {int(places.max())}, where there are only {table.shape[1]} levels")
        return self._values(places, table, params.layout, dtype)

    def restored(self, w: Tensor, params: Params, codes: Codes) -> Params:
        return params

    def bits_on_disk(self, params: Params) -> int:
        codes = 8 * -(-params.layout.numel * self._width // 8)
        return codes + sum(params[name].numel() * torch.finfo(params[name].dtype).bits for name in self.stored)

    def typical(self, params: Params) -> Tensor:
        """A quarter of the mean distance of neighbouring levels, as on an evenly spaced grid."""
        table = self._table(params)
        mean = (table[:, -1] - table[:, 0]) / (4 * (table.shape[1] - 1))
        smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        mean = torch.where(mean > 0, mean.clamp(smallest, largest), 1.0).float()
        return granularity_of(self.granularity).expand(mean, params.layout)

    def limits(self, params: Params) -> Tensor:
        return granularity_of(self.granularity).expand(self._table(params).abs().amax(dim=1), params.layout)

    def levels(self, params: Params) -> Tensor:
        """The levels in float64, ascending; where a group has fewer, some are repeated."""
        groups = granularity_of(self.granularity)
        return torch.stack([groups.expand(level, params.layout) for level in self._table(params).unbind(1)], dim=-1)


def _below(x: Tensor, bounds: Iterable[Tensor]) -> Tensor:
    """How many bounds each number is not above, int32: a few comparisons take less time than a search."""
    count = torch.zeros(x.shape, dtype=torch.uint8)
    for bound in bounds:
        count += masks.compare(x, "le", bound).view(torch.uint8)
    return count.to(torch.int32)


_SMALLEST_POWER = {torch.float16: -24}  # half precision has few exponents, so its subnormal numbers count too
_DEAD = -2048.0  # the exponent of a group of zeros without the level 0


@dataclass(frozen=True, kw_only=True)
class PowerOfTwo(_Listed):
    """Levels +-2^top, +-2^(top-1), .. and 0: multiplying by a weight is a shift.

        project(w) = the nearest of {0, +-2^(top-n+1) .. +-2^top},    n = 2^(b-1) - 1

    Nearest in value: the boundary between 2^j and 2^(j+1) is 1.5 * 2^j, that between 0 and the smallest level half that
    level; a weight on a boundary goes to the lower level. With `zero=False` there are n = 2^(b-1) powers a side, 0
    itself goes to the smallest negative one, and a group of zeros stays zero.

    Args:
        bits: width of a code, 2 to 5: more powers than five bits hold no weight tensor spans.
        granularity: weights that share a top: "tensor", "channel" or `Group(size=...)`.
        range: how the top is found. "max": the power nearest to max|w|, which is floor(log2(4 max|w| / 3)). "mse": the
            one of that and the three below with the least squared error.
        zero: whether 0 is a level.

    Raises:
        ValueError: bits outside 2..5, or an unknown range or granularity.

    Example:
        >>> w = torch.tensor([1.1, 0.4, -0.7, 0.05])
        >>> powers = PowerOfTwo(bits=3)
        >>> powers.project(w, powers.fit(w))
        tensor([ 1.0000,  0.5000, -0.5000,  0.0000])

    Reference: Zhou et al., "Incremental Network Quantization", arXiv 1702.03044, section 2.2 (same rule for the top).
    """

    bits: int
    granularity: GranularityLike = "tensor"
    range: Literal["max", "mse"] = "mse"
    zero: bool = True

    has_bits: ClassVar[bool] = True
    stored: ClassVar[tuple[str, ...]] = ("top",)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in self.widths:
            raise ValueError(f"PowerOfTwo(bits={self.bits!r}): bits must be a whole number from 2 to 5")
        granularity_of(self.granularity, "PowerOfTwo.granularity")
        if self.range not in ("max", "mse"):
            raise ValueError(f'PowerOfTwo(range={self.range!r}): must be "max" or "mse"')
        super().__post_init__()

    @property
    def widths(self) -> Sequence[int]:
        return range(2, 6)

    @property
    def _n(self) -> int:
        return 2 ** (self.bits - 1) - int(self.zero)

    @property
    def _width(self) -> int:
        return self.bits

    def _table(self, params: Params) -> Tensor:
        top = params["top"].double().unsqueeze(1)
        down = torch.arange(self._n, dtype=torch.float64, device=top.device)
        sizes = torch.where(top > _DEAD, _power(top - down), 0.0)
        middle = [torch.zeros_like(top)] if self.zero else []
        return torch.cat([-sizes, *middle, sizes.flip(1)], dim=1) + 0.0

    def _ends(self, dtype: torch.dtype) -> tuple[int, int]:
        """The tops with which every level is a number of the weight's dtype."""
        return _SMALLEST_POWER.get(dtype, -126) + self._n - 1, 15 if dtype == torch.float16 else 127

    def _window(self, top: Tensor, dtype: torch.dtype) -> Tensor:
        """Tops moved between these; exact in float16, as they are stored."""
        return top.clamp(*self._ends(dtype)).to(torch.float16)

    def declared(self, layout: Layout, dtype: torch.dtype, held: Mapping[str, int]) -> Pieces:
        (low, high), shape = self._ends(dtype), (granularity_of(self.granularity).count(layout),)
        dead = None if self.zero else _DEAD
        top = Declared(name="top", kind=torch.float16, shape=shape, low=low, high=high, besides=dead, whole=True)
        levels = 2 * self._n + self.zero
        return Pieces((top,), (Declared(name="codes", kind=self.bits, shape=(layout.numel,), below=levels),))

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        check_finite(w)
        x = w.detach().to(compute_dtype(w.dtype))
        largest = granularity_of(self.granularity).amax(x.abs(), layout)
        mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [1/2, 1)
        top = self._window(exponent - (mantissa < 0.75).to(exponent.dtype), w.dtype)
        if not self.zero:
            top = torch.where(largest > 0, top, _DEAD)
        if self.range == "mse":
            top = self._best(x, [top, *(self._window(top.int() - i, w.dtype) for i in (1, 2, 3))], layout)
        return Params(tensors={"top": top}, layout=layout)

    def _best(self, x: Tensor, tops: list[Tensor], layout: Layout) -> Tensor:
        """For each group the top with the least squared error, the earliest of equals."""
        best, least = tops[0], self._error(x, tops[0], layout)
        for top in tops[1:]:
            error = self._error(x, top, layout)
            better = (error < least) & (best > _DEAD)
            best, least = torch.where(better, top, best), torch.where(better, error, least)
        return best

    def _error(self, x: Tensor, top: Tensor, layout: Layout) -> Tensor:
        q = self.project(x, Params(tensors={"top": top}, layout=layout))
        return granularity_of(self.granularity).sum(q.sub_(x).square_(), layout)

    def at_bits(self, w: Tensor, params: Params, bits: int) -> tuple[Target, Params]:
        """More or fewer powers: the better, for each group, of a fresh fit and the trained top."""
        if bits == self.bits:
            return self, params
        target = replace(self, bits=bits)
        fresh = target.fit(w, params.layout)
        trained = torch.where(params["top"] > _DEAD, target._window(params["top"], w.dtype), params["top"])
        best = target._best(w.detach().to(compute_dtype(w.dtype)), [trained, fresh["top"]], params.layout)
        return target, Params(tensors={"top": best}, layout=params.layout)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent for whole exponents in -1022 .. 1023, exactly: written as the bits of a float64."""
    return ((exponent.clamp(-1022, 1023).long() + 1023) << 52).view(torch.float64)


@dataclass(frozen=True, kw_only=True)
class LearnedLevels(_Listed):
    """k levels a group, found by k-means: `project(w)` is the nearest level, half-way the lower one.

    Each level is the mean of the weights it serves (Lloyd's algorithm from two fixed starts, the better one kept), so
    the fit draws nothing at random. Sorting takes one copy of the weights, whatever their number. Groups with fewer
    distinct weights than levels are met exactly, and the largest level is repeated.

    Args:
        k: levels, 2 to 256; a code takes ceil(log2 k) bits.
        zero: one of the levels is 0, for weights that a pruning set to zero.
        granularity: weights that share levels: "tensor", "channel" or `Group(size=...)`.
        param_dtype: what levels are rounded to before anything is projected, and stored as.

    Raises:
        ValueError: k outside 2..256, or an unknown granularity or param_dtype.

    Example:
        >>> w = torch.tensor([1.0, 1.5, -2.0, -2.5, 0.0])
        >>> learned = LearnedLevels(k=3, zero=True)
        >>> learned.project(w, learned.fit(w))
        tensor([ 1.2500,  1.2500, -2.2500, -2.2500,  0.0000])
        >>> learned.bits_on_disk(learned.fit(w))      # five 2-bit codes in two bytes, and three float32
        112

    Reference: Han et al., "Deep Compression", arXiv 1510.00149, section 3.1.
    """

    k: int
    zero: bool = False
    granularity: GranularityLike = "tensor"
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float32"

    has_codebook: ClassVar[bool] = True
    stored: ClassVar[tuple[str, ...]] = ("levels",)

    def __post_init__(self) -> None:
        if not is_whole(self.k, 2, 256):
            raise ValueError(f"LearnedLevels(k={self.k!r}): k must be a whole number from 2 to 256")
        granularity_of(self.granularity, "LearnedLevels.granularity")
        check_param_dtype("LearnedLevels", self.param_dtype)
        super().__post_init__()

    @property
    def _width(self) -> int:
        return (self.k - 1).bit_length()

    def _table(self, params: Params) -> Tensor:
        return params["levels"].double().sort(dim=1).values  # training may have let two of them pass each other

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        check_finite(w)
        groups = granularity_of(self.granularity)
        levels = kmeans(groups.cut(w.detach(), layout, torch.inf), groups.sizes(layout), self.k, self.zero)
        return Params(tensors={"levels": self._stored(levels, w.dtype)}, layout=layout)

    def _most(self, dtype: torch.dtype) -> float:
        """The largest number that levels and weights share, so that a level stays where it is when it becomes one."""
        store = PARAM_DTYPES[self.param_dtype]
        most = min(torch.finfo(store).max, torch.finfo(dtype).max)
        return min(most, 65280.0) if {store, dtype} == {torch.float16, torch.bfloat16} else most

    def declared(self, layout: Layout, dtype: torch.dtype, held: Mapping[str, int]) -> Pieces:
        store, most = PARAM_DTYPES[self.param_dtype], self._most(dtype)
        shape = (granularity_of(self.granularity).count(layout), self.k)
        levels = Declared(name="levels", kind=store, shape=shape, low=-most, high=most, within=dtype)
        codes = Declared(name="codes", kind=self._width, shape=(layout.numel,), below=self.k)
        return Pieces((levels,), (codes,))

    def decode(self, codes: Codes, params: Params, dtype: torch.dtype) -> Tensor:
        if self.zero and not bool((params["levels"] == 0).any(dim=1).all()):
            raise ValueError("levels without the 0 that is one of them")
        return super().decode(codes, params, dtype)

    def _stored(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        store, most = PARAM_DTYPES[self.param_dtype], self._most(dtype)
        return levels.clamp(-most, most).to(dtype).to(store) + 0.0

    def assign(self, w: Tensor, params: Params) -> Tensor:
        x, layout = w.detach().to(compute_dtype(w.dtype)), params.layout
        ranked = params["levels"].double().sort(dim=1)
        # Row g * k + i of the codebook is level i of group g, in the order of the params.
        rows = ranked.indices + self.k * torch.arange(len(ranked.indices), device=w.device)[:, None]
        places = self._places(x, ranked.values, layout)
        flat = rows.reshape(-1)
        parts = [
            flat.index_select(0, (group * self.k + place).reshape(-1)) for place, group in self._pieces(places, layout)
        ]
        return torch.cat(parts)

    def codebook(self, params: Params) -> Tensor:
        return params["levels"].reshape(-1, 1)

    def with_codebook(self, params: Params, codewords: Tensor, dtype: torch.dtype) -> Params:
        levels = self._stored(codewords.reshape(params["levels"].shape).to(compute_dtype(dtype)), dtype)
        return replace(params, tensors={**params.tensors, "levels": levels})

    def held_codewords(self, params: Params) -> Tensor | None:
        return params["levels"].reshape(-1) == 0 if self.zero else None
