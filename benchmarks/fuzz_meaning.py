"""Files that are sound in every checksum and length and mean what their targets cannot: the fuzz that knows structure.

Real tensors of every target are encoded, one thing about them is changed (a code, a scale, a width, a name, a shape, a
field of the target, a layout), and the result is written with right checksums. A reader refuses the file, or what it
gives is a member of its target's set: projected once more it stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import detent as dt
from benchmarks.fuzz import Hang, Tally, shared_memory, targets
from detent import pack
from detent.export.forms import form_of
from detent.lives import Encoded

ODD = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1e30, -1e30, 1e-40, 65504.0, -2048.0, 0.3, 1.0)
SIZES = (1, 2, 3, 5, 255, 256, 2**16, 2**31, 2**47)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def subjects(kinds: Sequence[dt.Target]) -> list[Encoded]:
    """A tensor or two of each target, encoded."""
    found = []
    for target in kinds:
        for shape, dtype in (((6, 4, 3, 3), torch.float32), ((8, 12), torch.float32), ((4, 8), torch.bfloat16)):
            layout = dt.Layout(shape=shape)
            if target.accepts(shape, dtype, layout) is None:
                w = torch.randn(shape, generator=torch.Generator().manual_seed(len(found))).to(dtype)
                params = target.fit_model([w], [layout], [None])[0]
                found.append(Encoded(target=target, params=params, codes=target.encode(w, params), dtype=dtype))
    return found


# --- one thing that is changed ------------------------------------------------------------------------------------


def _with_stream(item: Encoded, i: int, *streams: dt.Stream) -> Encoded:
    old = item.codes.streams
    return replace(item, codes=dt.Codes(streams=(*old[:i], *streams, *old[i + 1 :])))


def _changed(dice: random.Random, values: Tensor) -> Tensor:
    """A value or all of them, and another number of them now and then."""
    values = values.clone()
    if values.is_floating_point():
        flat = values.reshape(-1)
        at = dice.randrange(flat.numel()) if flat.numel() and dice.random() < 0.7 else slice(None)
        flat[at] = dice.choice(ODD)
        return flat.reshape(values.shape)
    values = values.to(torch.int32)
    if values.numel():
        values[dice.randrange(values.numel()) if dice.random() < 0.7 else slice(None)] = dice.choice(
            (0, 1, 2, 3, 7, 200)
        )
    return values


def codes(dice: random.Random, item: Encoded, others: Sequence[Encoded]) -> Encoded:
    """Other codes, widths, counts, names, orders; raw numbers for codes and the other way round."""
    streams = item.codes.streams
    if not streams:
        return _with_stream(item, 0, dt.Stream(name="codes", values=torch.tensor([1]), width=1))
    i = dice.randrange(len(streams))
    one, cut = streams[i], dice.choice((0, 1, streams[i].values.numel() // 2, max(streams[i].values.numel() - 1, 0)))
    raw = torch.randn(one.values.numel()) if dice.random() < 0.5 else torch.full((one.values.numel(),), 1e30)
    widest = {1: 1, 2: 3}.get(one.width, (1 << one.width) - 1)
    choices: list[Callable[[], Encoded]] = [
        lambda: _with_stream(item, i, replace(one, values=_changed(dice, one.values))),
        lambda: _with_stream(item, i, replace(one, values=torch.full((one.values.numel(),), widest))),
        lambda: _with_stream(item, i, replace(one, values=one.values[:cut])),
        lambda: _with_stream(item, i, replace(one, values=torch.cat([one.values, one.values[: cut + 1]]))),
        lambda: _with_stream(item, i, replace(one, values=torch.cat([one.values, one.values.new_zeros(1 + cut)]))),
        lambda: _with_stream(item, i, replace(one, width=one.width % 16 + 1)),
        lambda: _with_stream(item, i, dt.Stream(name=one.name, values=raw, width=32)),
        lambda: _with_stream(item, i, dt.Stream(name=one.name, values=torch.ones(one.values.numel()).int(), width=8)),
        lambda: _with_stream(item, i, replace(one, name=dice.choice(("codes", "mask", "values", "book", "spare")))),
        lambda: _with_stream(item, i),
        lambda: _with_stream(item, i, one, replace(one, name="spare")),
        lambda: replace(item, codes=dt.Codes(streams=streams[::-1])),
        lambda: replace(item, codes=dice.choice(others).codes),
    ]
    return dice.choice(choices)()


def numbers(dice: random.Random, item: Encoded, others: Sequence[Encoded]) -> Encoded:
    """Other params: NaN, infinite, negative, tiny; another dtype, another shape."""
    if not item.target.stored:
        return codes(dice, item, others)
    name = dice.choice(item.target.stored)
    old = item.params[name]
    kinds: list[Callable[[], Tensor]] = [
        lambda: _changed(dice, old),
        lambda: _changed(dice, old),
        lambda: -old,
        lambda: old.to(dice.choice(DTYPES)),
        lambda: torch.cat([old, old]),
        lambda: old[:-1],
        lambda: old.unsqueeze(0),
        lambda: old.new_zeros(0),
    ]
    return replace(item, params=replace(item.params, tensors={**item.params.tensors, name: dice.choice(kinds)()}))


def fields(dice: random.Random, item: Encoded, others: Sequence[Encoded]) -> Encoded:
    """Another target, or another field of this one, for the same codes."""
    if dice.random() < 0.3:
        other = dice.choice(others).target
        held = {name: item.params.tensors.get(name, torch.ones(1)) for name in other.stored}
        return replace(item, target=other, params=replace(item.params, tensors={**item.params.tensors, **held}))
    target, part = item.target, ""
    if isinstance(target, dt.SparseLevels):
        part = dice.choice(("sparse", "survivors"))
        target = getattr(target, part)
    field = dice.choice([f.name for f in dataclasses.fields(target)] or [""])  # type: ignore[arg-type]
    value: Any = dice.choice(
        (*SIZES, 0.1, 0.9, True, False, None, "tensor", "channel", "model", "global", "float16", "bfloat16")
    )
    if field == "granularity":
        value = dice.choice(("tensor", "channel", dt.Group(size=dice.choice(SIZES))))
    elif field == "block" and dice.random() < 0.5:
        value = (dice.choice(SIZES), dice.choice(SIZES))
    changed: Any = replace(target, **{field: value})  # type: ignore[type-var]
    return replace(item, target=replace(item.target, **{part: changed}) if part else changed)  # type: ignore[type-var]


def layouts(dice: random.Random, item: Encoded, others: Sequence[Encoded]) -> Encoded:
    """Another shape, axis, number of groups or dtype of the weights."""
    shape = list(item.params.layout.shape)
    kind = dice.randrange(5)
    if kind == 0:
        return replace(item, dtype=dice.choice(DTYPES))
    if kind == 1:
        shape = dice.choice((shape[::-1], [math.prod(shape)], [1, *shape], shape[:-1], [*shape, 1]))
    elif kind == 2:
        shape[dice.randrange(len(shape))] = dice.choice((0, *SIZES))
    axis = dice.randrange(len(shape)) if kind >= 3 and shape else 0
    groups = dice.choice((1, 2, 3, 2**31)) if kind == 4 and axis == 1 else 1
    return replace(
        item, params=replace(item.params, layout=dt.Layout(shape=tuple(shape), channel_dim=axis, conv_groups=groups))
    )


MEANINGS: dict[str, Callable[[random.Random, Encoded, Sequence[Encoded]], Encoded]] = {
    "codes": codes,
    "numbers": numbers,
    "fields": fields,
    "layouts": layouts,
}


def forged(dice: random.Random, path: Path, pool: Sequence[Encoded]) -> str:
    """Write a file in which one thing, or two, are not so; the kind, or nothing where no file can say it."""
    item, kind = dice.choice(pool), dice.choice(list(MEANINGS))
    try:
        for _ in range(dice.choice((1, 1, 2))):
            item = MEANINGS[kind](dice, item, pool)
        coding = dice.choice(pack.CODINGS)
        # The writer reads its own header before it puts a file in place: that is what must not stop a forger.
        with mock.patch("detent.pack.container.read_head"), pack.Writer(path, "compressed", coding=coding) as writer:
            writer.add("weight", None, encoded=item)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AssertionError, OverflowError):
        return ""
    return kind


# --- what becomes of it -------------------------------------------------------------------------------------------


def outcome(path: Path) -> str:
    """FormatError, or a member of the set in every way of reading; anything else is a fault."""
    try:
        with pack.Reader(path) as reader:
            value, item = reader.tensor("weight"), reader.encoded("weight")
        params = item.target.restored(value, item.params, item.codes)
        again = item.target.project(value, params)
        if again.dtype != value.dtype or not torch.equal(again, value):
            return f"{item.target}: projected once more it is another tensor"
        if not bool(torch.isfinite(value).all()) or bool((torch.signbit(value) & (value == 0)).any()):
            return f"{item.target}: holds -0.0 or what is not finite"
        if value.dtype == torch.float32:
            form_of(item)
        pack.inspect(path)
        dt.unpack(path, path.with_suffix(".safetensors"))
    except dt.FormatError:
        return "FormatError"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"
    return "a member of the set"


def work(seed: int, first: int, past: int, kinds: Sequence[dt.Target] | None = None) -> dict[str, Any]:
    """Files `first` to `past - 1` in this process, with a limit on time and memory."""
    torch.set_num_threads(1)
    pool = subjects(kinds or [target for group in targets() for target in group])
    with tempfile.TemporaryDirectory(dir=shared_memory()) as name:
        path = Path(name) / "f.detent"
        for i, item in enumerate(pool):  # what is built once is no cost of a forged file
            with pack.Writer(path, "compressed") as writer:
                writer.add("weight", None, encoded=item)
            if (found := outcome(path)) != "a member of the set":
                raise AssertionError(f"the sound tensor {i} of {item.target}: {found}")
        tally = Tally()
        for index in range(first, past):
            kind = forged(random.Random(f"{seed}:{index}"), path, pool)
            if not kind:
                tally.counts["any", "cannot be written"] += 1
                continue
            with tally.timed():
                found = outcome(path)
            fine = found in ("FormatError", "a member of the set")
            tally.add(index, kind, found if fine else "WRONG", "" if fine else f": {found}")
    return tally.figures()
