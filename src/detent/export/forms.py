"""Forms as a graph holds them: integers of 2, 4 or 8 bits, packed indices into tables and codebooks, or floats."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch

from detent.grouping import granularity_of
from detent.lives import Encoded
from detent.targets.forms import Codewords, Floats, Form, Grid, Levels, Sparse

__all__ = ["Packed", "bits_of", "form_of", "grid_of", "index_parts", "is_plain", "packed_nbytes", "parts_of"]

Packed: TypeAlias = Grid | Levels | Codewords

_WIDTHS = (2, 4, 8)  # bits of the integers that a graph can hold packed

# Bits of a packed index that is put together from several parts, by the bits it needs: 9 bits are held as 8 + 2.
_PARTS = {1: (2,), 2: (2,), 3: (4,), 4: (4,), 5: (4, 2), 6: (4, 2), 7: (8,), 8: (8,)}
_PARTS |= {9: (8, 2), 10: (8, 2), 11: (8, 4), 12: (8, 4), 13: (8, 4, 2), 14: (8, 4, 2), 15: (8, 8), 16: (8, 8)}
_SPLIT_COST = 160  # bytes of the nodes that put two parts together


def form_of(item: Encoded) -> Form:
    """The smallest form in a graph of a claimed tensor: on the CPU, in float32, not sparse, the same tensor to the bit.

    Args:
        item: a claimed tensor of float32.

    Raises:
        ValueError: another dtype.

    Example:
        >>> import detent as dt
        >>> model = torch.nn.Linear(8, 8)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))])
        >>> form = form_of(dt.compress(model, recipe).encoded()["weight"])
        >>> type(form).__name__, bits_of(form), packed_nbytes(form)
        ('Grid', 4, 36)
    """
    form = item.form.to("cpu")
    if form.dtype != torch.float32:
        raise ValueError(f"weights are {form.dtype}, a graph dequantizes to float32; convert the model with .float()")
    found = _in_float32(_filled(form) if isinstance(form, Sparse) else form)
    assert torch.equal(found.dense(), form.dense()), f"{item.target} is another tensor as {type(found).__name__}"
    if not isinstance(found, Grid):
        return found
    table = _listed(found)
    fits = bits_of(found) is not None
    return found if fits and packed_nbytes(found) <= packed_nbytes(table) else table


def _filled(form: Sparse) -> Form:
    """The inside of a sparse form with a zero where nothing survives."""
    inside, pruned = form.inside, ~form.mask
    if isinstance(inside, Grid):
        codes = inside.codes.int()
        codes = codes if inside.zero else codes + (codes >= inside.n)
        return replace(inside, codes=codes.masked_fill(pruned, inside.n), zero=True)
    if isinstance(inside, Levels):
        table = torch.nn.functional.pad(inside.table, (0, 1))
        return replace(inside, codes=inside.codes.int().masked_fill(pruned, table.shape[1] - 1), table=table)
    return Floats(layout=form.layout, dtype=form.dtype, value=form.dense())


def grid_of(form: Form) -> Grid | None:
    """A form as integers times scales, if it is that."""
    form = _filled(form) if isinstance(form, Sparse) else form
    if isinstance(form, Codewords) and form.width is not None:
        codes = form.book[form.index.long()].reshape(form.layout.shape)
        n = 2 ** (form.width - 1) - 1
        own = {"codes": codes, "scale": form.scale, "granularity": form.granularity, "n": n}
        return Grid(layout=form.layout, dtype=form.dtype, **own)
    return form if isinstance(form, Grid) else None


def _in_float32(form: Form) -> Form:
    if isinstance(form, Grid):
        scale = torch.ones(granularity_of(form.granularity).count(form.layout)) if form.scale is None else form.scale
        return replace(form, scale=scale.float())
    if isinstance(form, Levels):
        return replace(form, table=form.table.float())
    if isinstance(form, Codewords):
        return replace(form, book=form.entries) if form.scale is None else replace(form, scale=form.scale.float())
    return form


def _listed(form: Grid) -> Levels:
    """A grid as a table of its levels."""
    assert form.scale is not None
    table = form.scale[:, None] * form.steps.float() + 0.0
    return Levels(layout=form.layout, dtype=form.dtype, codes=form.codes, table=table, granularity=form.granularity)


def is_plain(form: Form) -> bool:
    """Whether a tensor stays the floats it is."""
    return isinstance(form, Floats) and form.value.dtype == form.dtype


def bits_of(form: Grid | Codewords) -> int | None:
    """Bits of the narrowest packed signed integers that hold a form's, if any do; `None` for floats."""
    if isinstance(form, Codewords):
        return next((b for b in _WIDTHS if form.width is not None and b >= form.width), None)
    most = int(form.steps.max())
    return next((b for b in _WIDTHS if most < 2 ** (b - 1)), None)


def parts_of(form: Levels | Codewords) -> tuple[int, ...]:
    """Bits of the packed integers that make up the indices, the lowest bits first."""
    if isinstance(form, Levels):
        return index_parts(form.table.shape[1], form.codes.numel())
    return index_parts(len(form.book), form.index.numel())


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


def packed_nbytes(form: Form) -> int:
    """Bytes in a graph: codes, scales, levels, codewords; a codebook that several tensors share counts in each."""
    if isinstance(form, Floats):
        return form.value.nbytes
    scale = form.scale if isinstance(form, Grid | Codewords) else None
    scales = 0 if scale is None else 4 * scale.numel()
    if isinstance(form, Grid):
        return _bytes(form.codes.numel(), bits_of(form) or 32) + scales
    assert isinstance(form, Levels | Codewords)
    count = (form.codes if isinstance(form, Levels) else form.index).numel()
    index = sum(_bytes(count, part) for part in parts_of(form))
    if isinstance(form, Levels):
        return index + 4 * form.table.numel()
    return index + _bytes(form.book.numel(), bits_of(form) or 32) + scales


def _bytes(count: int, width: int) -> int:
    return -(-count * width // 8)
