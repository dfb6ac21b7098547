"""What a tensor of codes is in a graph: integers and a scale, indices into a table, indices of codewords, or floats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from detent.grouping import Channel, Granularity, Layout, PerTensor, granularity_of
from detent.lives import Encoded
from detent.targets import Codes, Params, PowerOfTwo, SparseLevels, Stream, Target, Zero
from detent.targets.codebook import _Codebook
from detent.targets.composite import _CODES
from detent.targets.levels import _Scaled
from detent.targets.listed import _Listed
from detent.targets.sparse import Sparse

__all__ = ["Codewords", "Form", "Grid", "Half", "Plain", "Table", "form_of", "index_parts"]

_WIDTHS = (2, 4, 8)  # bits of the integers that a graph can hold packed
_MOST_VALUES = 256  # distinct values up to which a tensor of an unknown target is worth a table

# Bits of a packed index that is put together from several parts, by the bits it needs: 9 bits are held as 8 + 2.
_PARTS = {1: (2,), 2: (2,), 3: (4,), 4: (4,), 5: (4, 2), 6: (4, 2), 7: (8,), 8: (8,)}
_PARTS |= {9: (8, 2), 10: (8, 2), 11: (8, 4), 12: (8, 4), 13: (8, 4, 2), 14: (8, 4, 2), 15: (8, 8), 16: (8, 8)}
_SPLIT_COST = 160  # bytes of the nodes that put two parts together


def index_parts(values: int, count: int) -> tuple[int, ...]:
    """Widths, from the lowest bits up, of the packed integers that hold `count` indices below `values`.

    Example:
        >>> index_parts(512, 10), index_parts(32, 100_000), index_parts(32, 10)
        ((8, 2), (4, 2), (8,))
    """
    bits = max((values - 1).bit_length(), 1)
    parts = _PARTS[bits]
    whole = (8,) * -(-bits // 8)
    saved = (sum(whole) - sum(parts)) * count // 8
    return parts if saved > _SPLIT_COST * (len(parts) - len(whole)) else whole


def packed_bytes(count: int, width: int) -> int:
    """Bytes of integers packed at a width."""
    return -(-count * width // 8)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Integers times a scale a group.

    Args:
        indices: int16, in the shape of the weight.
        scale: float32, one a group.
        granularity: weights that share a scale.
        layout: of the weight.
        bits: 2, 4 or 8, of the signed integers in the graph.
    """

    indices: Tensor
    scale: Tensor
    granularity: Granularity
    layout: Layout
    bits: int

    def decode(self) -> Tensor:
        """The weight: one product in float32, as `DequantizeLinear` takes it."""
        return self.indices.float() * self.granularity.expand(self.scale, self.layout) + 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return packed_bytes(self.indices.numel(), self.bits) + 4 * self.scale.numel()

    def times(self, factor: Tensor) -> Grid:
        """The same codes with every output channel multiplied: its scales take the factor, its codes the sign."""
        runs = self.granularity.count(self.layout) // self.layout.channels
        grouped = self.granularity if runs else Channel()
        scale = self.scale.double().reshape(-1, runs) if runs else self.scale.double().reshape(1, 1)
        scale = (scale * factor.double().abs()[:, None]).reshape(-1).float()
        sign = Channel().expand(torch.where(factor < 0, -1, 1).to(self.indices.dtype), self.layout)
        return replace(self, indices=self.indices * sign, scale=scale, granularity=grouped)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Indices into the levels of a group.

    Args:
        codes: int32, in the shape of the weight.
        levels: float32, shape (groups, levels).
        granularity: weights that share a row of levels.
        layout: of the weight.
    """

    codes: Tensor
    levels: Tensor
    granularity: Granularity
    layout: Layout

    def decode(self) -> Tensor:
        """The weight."""
        marks = torch.arange(len(self.levels))
        group = self.granularity.expand(marks, self.layout).broadcast_to(self.codes.shape)
        return self.levels.reshape(-1)[group * self.levels.shape[1] + self.codes]

    @property
    def parts(self) -> tuple[int, ...]:
        """Bits of the indices."""
        return index_parts(self.levels.shape[1], self.codes.numel())

    @property
    def nbytes(self) -> int:
        """Bytes of indices and levels."""
        return sum(packed_bytes(self.codes.numel(), part) for part in self.parts) + 4 * self.levels.numel()

    def times(self, factor: Tensor) -> Table:
        """The same codes with every output channel multiplied: each gets levels of its own."""
        runs = self.granularity.count(self.layout) // self.layout.channels
        levels, k = self.levels.double(), self.levels.shape[1]
        grouped = self.granularity if runs else Channel()
        levels = (levels.reshape(-1, max(runs, 1), k) * factor.double()[:, None, None]).reshape(-1, k).float() + 0.0
        return replace(self, levels=levels, granularity=grouped)


@dataclass(frozen=True, kw_only=True)
class Codewords:
    """Indices of codewords; a unit is a run of weights in row-major order.

    Args:
        index: int32, one a unit.
        book: the codewords, shape (codewords, weights of a unit): float32, or int16 integers with a scale.
        layout: of the weight.
        bits: 2, 4 or 8, of the integers in the graph; `None` for floats.
        scale: float32, one for all or one an output channel; `None` for floats.
    """

    index: Tensor
    book: Tensor
    layout: Layout
    bits: int | None = None
    scale: Tensor | None = None

    @property
    def parts(self) -> tuple[int, ...]:
        """Bits of the indices."""
        return index_parts(len(self.book), self.index.numel())

    @property
    def steps(self) -> Tensor:
        """The scale, so that it broadcasts against the weight."""
        assert self.scale is not None
        groups = PerTensor() if self.scale.numel() == 1 else Channel()
        return groups.expand(self.scale, self.layout)

    def decode(self) -> Tensor:
        """The weight."""
        units = self.book[self.index.long()].reshape(self.layout.shape)
        return units if self.scale is None else units.float() * self.steps + 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of indices, codebook and scales; a codebook that several tensors share counts in each."""
        index = sum(packed_bytes(self.index.numel(), part) for part in self.parts)
        scales = 0 if self.scale is None else 4 * self.scale.numel()
        return index + packed_bytes(self.book.numel(), self.bits or 32) + scales

    def times(self, factor: Tensor) -> Codewords:
        """The same indices and integers with every output channel multiplied; scales may become negative."""
        assert self.scale is not None
        return replace(self, scale=(self.scale.double() * factor.double()).float())


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A tensor that stays what it is, and why."""

    value: Tensor
    reason: str

    def decode(self) -> Tensor:
        """The weight."""
        return self.value

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.value.numel() * self.value.element_size()


@dataclass(frozen=True, kw_only=True)
class Half:
    """Numbers of a 16-bit float.

    Args:
        value: float16 or bfloat16, in the shape of the weight.
    """

    value: Tensor

    def decode(self) -> Tensor:
        """The weight."""
        return self.value.float()

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return 2 * self.value.numel()


Form: TypeAlias = Grid | Table | Codewords | Half | Plain


def form_of(item: Encoded) -> Form:
    """The smallest form of a tensor that decodes to its projection bitwise.

    Args:
        item: a claimed tensor of float32.

    Raises:
        ValueError: another dtype.

    Example:
        >>> import detent as dt
        >>> model = torch.nn.Linear(8, 8)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))])
        >>> form = form_of(dt.compress(model, recipe).encoded()["weight"])
        >>> type(form).__name__, form.bits, form.nbytes
        ('Grid', 4, 36)
    """
    if item.dtype != torch.float32:
        raise ValueError(f"weights are {item.dtype}, a graph dequantizes to float32; convert the model with .float()")
    item = on_cpu(item)
    target, params, codes = item.target, item.params, item.codes
    value = target.decode(codes, params, torch.float32)
    form = _form(target, params, codes, value)
    assert torch.equal(form.decode(), value), f"{target} does not decode to its projection as {type(form).__name__}"
    return form


def on_cpu(item: Encoded) -> Encoded:
    """Codes and params on the CPU, wherever the model is."""
    codes = Codes(streams=tuple(replace(s, values=s.values.cpu()) for s in item.codes.streams))
    return replace(item, params=item.params.to(torch.device("cpu")), codes=codes)


def _form(target: Target, params: Params, codes: Codes, value: Tensor) -> Form:
    if isinstance(target, Zero):
        zero = torch.zeros(params.layout.shape, dtype=torch.int16)
        return Grid(indices=zero, scale=torch.zeros(1), granularity=PerTensor(), layout=params.layout, bits=2)
    if isinstance(target, _Codebook):
        return _codewords(target, params, codes)
    if isinstance(target, _Scaled | _Listed):
        return _leveled(target, params, codes, None)
    if isinstance(target, SparseLevels) and isinstance(target.survivors, _Scaled | _Listed):
        mask = target.sparse.unpattern(codes, params).reshape(params.layout.shape)
        return _leveled(target.survivors, params, _spread(codes, mask), mask)
    if isinstance(target, Sparse):
        return Plain(value=value, reason=f"the survivors of {type(target).__name__} keep their real values")
    return _listed_values(target, params, value)


def _spread(codes: Codes, mask: Tensor) -> Codes:
    """The codes of the survivors, with 0 where there is none."""
    streams = []
    for stream in codes.streams:
        if stream.name.startswith(_CODES):
            values = torch.zeros(mask.numel(), dtype=stream.values.dtype)
            values[mask.reshape(-1)] = stream.values[: int(mask.sum())]
            streams.append(Stream(name=stream.name.removeprefix(_CODES), values=values, width=stream.width))
    return Codes(streams=tuple(streams))


def _leveled(target: _Scaled | _Listed, params: Params, codes: Codes, mask: Tensor | None) -> Form:
    """Scalars on levels, as integers or as a table, whichever takes fewer bytes; 0 where the mask is off."""
    layout, groups = params.layout, granularity_of(target.granularity)
    places = codes["codes"].to(torch.int32).reshape(layout.shape)
    if isinstance(target, _Scaled):
        steps = torch.arange(-target._n, target._n + 1)
        steps = (steps if target._has_zero else steps[steps != 0]).float()
        scale = target._scale(params, torch.float32)
        levels = scale[:, None] * steps + 0.0
    else:
        levels = target._table(params).float()
        scale, steps = _powers(target, params, levels)
    if mask is not None:
        levels, places = torch.cat([levels, torch.zeros(len(levels), 1)], dim=1), places.clone()
        places[~mask] = levels.shape[1] - 1
        steps = None if steps is None else torch.cat([steps, torch.zeros(1)])
    table = Table(codes=places, levels=levels, granularity=groups, layout=layout)
    bits = None if steps is None else _width_of(steps)
    if steps is None or scale is None or bits is None:
        return table
    indices = steps.to(torch.int16)[places.long()]
    grid = Grid(indices=indices, scale=scale, granularity=groups, layout=layout, bits=bits)
    return grid if grid.nbytes <= table.nbytes else table


def _width_of(steps: Tensor) -> int | None:
    """Bits of the narrowest packed signed integers that hold these, if any do."""
    low, high = int(steps.min()), int(steps.max())
    return next((b for b in _WIDTHS if low >= -(2 ** (b - 1)) and high < 2 ** (b - 1)), None)


def _powers(target: _Listed, params: Params, levels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Powers of two as whole multiples of the smallest one: (its value in each group, the multiples)."""
    if not isinstance(target, PowerOfTwo) or target._n > 7:
        return None, None
    down = torch.arange(target._n).flip(0)
    sizes = 2.0 ** down.flip(0)
    steps = torch.cat([-sizes.flip(0), torch.zeros(int(target.zero)), sizes])
    return levels[:, target._n + int(target.zero)].clone(), steps


def _codewords(target: _Codebook, params: Params, codes: Codes) -> Codewords:
    shape = params.layout.shape
    length = target._length(shape)
    held = {stream.name: stream.values for stream in codes.streams}
    units = params.layout.numel // length
    index = held["codes"].to(torch.int32) if "codes" in held else torch.zeros(units, dtype=torch.int32)
    layout = params.layout.whole()
    if target.codebook_bits is None:
        return Codewords(index=index, book=target._entries(params, torch.float32), layout=layout)
    n = 2 ** (target.codebook_bits - 1) - 1
    book = held["book"].to(torch.int16).reshape(-1, length) - n
    bits = next(b for b in _WIDTHS if b >= target.codebook_bits)
    return Codewords(index=index, book=book, layout=layout, bits=bits, scale=params["scale"].float().reshape(1))


def _listed_values(target: Target, params: Params, value: Tensor) -> Form:
    """A tensor whose target says nothing of its form: its distinct values if they are few, or 16-bit floats."""
    distinct, places = torch.unique(value, return_inverse=True)
    reason = f"{type(target).__name__} has {len(distinct)} distinct values here, and no form that a graph knows"
    found: list[Form] = [Plain(value=value, reason=reason)]
    if len(distinct) <= _MOST_VALUES:
        layout = replace(params.layout, shape=tuple(value.shape))
        codes = places.to(torch.int32)
        found.append(Table(codes=codes, levels=distinct[None], granularity=PerTensor(), layout=layout))
    stores = (torch.float16, torch.bfloat16)
    found += [Half(value=value.to(store)) for store in stores if torch.equal(value.to(store).float(), value)]
    return min(found, key=lambda form: form.nbytes)
