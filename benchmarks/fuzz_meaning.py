"""Files that are sound in every checksum and length and mean what no form can: the fuzz that knows structure.

Real tensors of every target are taken as forms, one thing about them is changed (a code, a scale, a number of the form,
a shape, a layout, what is said of the target), and the result is written with right checksums. A reader refuses the
file, or what it gives is a form (a member of its set): finite, without -0.0, the same tensor from its own values, and
exported as that.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import detent as dt
from benchmarks.fuzz import Hang, Tally, shared_memory, targets
from detent import pack
from detent.export.forms import form_of
from detent.lives import Encoded
from detent.specs import short
from detent.targets import Form, Held
from detent.targets.parts import Part

ODD = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1e30, -1e30, 1e-40, 65504.0, -2048.0, 0.3, 1.0)
SIZES = (0, 1, 2, 3, 4, 5, 7, 127, 255, 256, 2**16, 2**31, 2**47)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Forged(Form):
    """What a faulty writer takes for a form: numbers and runs that need not belong together."""

    told: tuple[int, ...]
    runs: tuple[tuple[Part, Tensor], ...]

    @staticmethod
    def of(form: Form) -> Forged:
        """A form that can be changed, and is still right."""
        if isinstance(form, Forged):
            return form
        runs = tuple(zip(form.parts, form.values, strict=True))
        return Forged(layout=form.layout, dtype=form.dtype, told=form.outline.numbers, runs=runs)

    @property
    def outline(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(numbers=self.told)

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for part, _ in self.runs)

    @property
    def values(self) -> tuple[Tensor, ...]:
        return tuple(values for _, values in self.runs)

    def check(self) -> None:
        """A forger does not."""

    @property
    def fields(self) -> dict[str, Any]:
        return {}

    def dense(self) -> Tensor:
        raise TypeError("it is not what it says")

    @staticmethod
    def parts_of(fields: Any, layout: dt.Layout, dtype: torch.dtype) -> tuple[Part, ...]:
        return ()

    @staticmethod
    def made(fields: Any, values: Any, layout: dt.Layout, dtype: torch.dtype) -> Form:
        raise TypeError("it is not what it says")


def subjects(kinds: Sequence[dt.Target]) -> list[Encoded]:
    """A tensor or two of each target, as forms."""
    found = []
    for target in kinds:
        for shape, dtype in (((6, 4, 3, 3), torch.float32), ((8, 12), torch.float32), ((4, 8), torch.bfloat16)):
            layout = dt.Layout(shape=shape)
            if target.accepts(shape, dtype, layout) is None:
                w = torch.randn(shape, generator=torch.Generator().manual_seed(len(found))).to(dtype)
                params = target.fit_model([w], [layout], [None])[0]
                found.append(Encoded(target=target, form=target.form(w, params)))
    return found


# --- one thing that is changed ------------------------------------------------------------------------------------


def with_run(item: Encoded, i: int, part: Part, values: Tensor) -> Encoded:
    """Another run of numbers in one place."""
    form = Forged.of(item.form)
    return replace(item, form=replace(form, runs=(*form.runs[:i], (part, values), *form.runs[i + 1 :])))


def _changed(dice: random.Random, values: Tensor) -> Tensor:
    """A value or all of them."""
    values = values.clone()
    odd = dice.choice(ODD if values.is_floating_point() else (0, 1, 2, 3, 7, 200))
    values = values if values.is_floating_point() else values.to(torch.int32)
    if values.numel():
        values[dice.randrange(values.numel()) if dice.random() < 0.7 else slice(None)] = odd
    return values


def codes(dice: random.Random, item: Encoded, others: Sequence[Encoded]) -> Encoded:
    """Other codes, scales and widths, more of them or fewer; raw numbers for codes and the other way round."""
    form = Forged.of(item.form)
    if not form.runs:
        return numbers(dice, item, others)
    i = dice.randrange(len(form.runs))
    part, values = form.runs[i]
    cut = dice.choice((0, 1, values.numel() // 2, max(values.numel() - 1, 0)))
    most = (1 << part.kind) - 1 if isinstance(part.kind, int) else 1e30
    choices: list[Callable[[], Encoded]] = [
        lambda: with_run(item, i, part, _changed(dice, values)),
        lambda: with_run(item, i, part, torch.full((values.numel(),), most).to(values.dtype)),
        lambda: with_run(item, i, part, values[:cut]),
        lambda: with_run(item, i, part, torch.cat([values, values[: cut + 1]])),
        lambda: with_run(item, i, replace(part, kind=part.width % 16 + 1), values.int()),
        lambda: with_run(item, i, replace(part, kind=torch.float32), torch.randn(values.numel())),
        lambda: with_run(item, i, replace(part, kind=8), torch.ones(values.numel()).int()),
        lambda: with_run(item, i, part, -values if values.is_floating_point() else values),
        lambda: replace(item, form=replace(form, runs=form.runs[:i] + form.runs[i + 1 :])),
        lambda: replace(item, form=replace(form, runs=form.runs[::-1])),
        lambda: replace(item, form=replace(form, runs=Forged.of(dice.choice(others).form).runs)),
    ]
    return dice.choice(choices)()


def numbers(dice: random.Random, item: Encoded, others: Sequence[Encoded]) -> Encoded:
    """Another number of a form, one too many or too few, or those of another form."""
    form = Forged.of(item.form)
    told, at = list(form.told), dice.randrange(len(form.told))
    kind = dice.randrange(5)
    if kind == 0:
        told = list(Forged.of(dice.choice(others).form).told)
    elif kind == 1:
        told.insert(at, dice.choice(SIZES))
    elif kind == 2:
        del told[at]
    else:
        told[at] = dice.choice(SIZES)
    return replace(item, form=replace(form, told=tuple(told)))


def fields(dice: random.Random, item: Encoded, others: Sequence[Encoded]) -> Encoded:
    """Another target for the same form: of ours, of none, or one that does not fit."""
    other = dice.choice(("", "{}", '{"kind":"Uniform"}', '{"kind":"elsewhere:Target","of":[1]}', '{"kind":3}'))
    return replace(item, target=Held(spec=other) if other else dice.choice(others).target)


def layouts(dice: random.Random, item: Encoded, others: Sequence[Encoded]) -> Encoded:
    """Another shape, axis, number of groups or dtype of the weights."""
    form = Forged.of(item.form)
    shape = list(form.layout.shape)
    kind = dice.randrange(5)
    if kind == 0:
        return replace(item, form=replace(form, dtype=dice.choice(DTYPES)))
    if kind == 1:
        shape = dice.choice((shape[::-1], [math.prod(shape)], [1, *shape], shape[:-1], [*shape, 1]))
    elif kind == 2:
        shape[dice.randrange(len(shape))] = dice.choice(SIZES)
    axis = dice.randrange(len(shape)) if kind >= 3 and shape else 0
    groups = dice.choice((1, 2, 3, 2**31)) if kind == 4 and axis == 1 else 1
    layout = dt.Layout(shape=tuple(shape), channel_dim=axis, conv_groups=groups)
    return replace(item, form=replace(form, layout=layout))


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
    """FormatError, or a form in every way of reading; anything else is a fault."""
    try:
        with pack.Reader(path) as reader:
            value, item = reader.tensor("weight"), reader.encoded("weight")
            told = short(item.target)
        form = item.form
        form.check()
        again = form.outline.form(form.values, form.layout, form.dtype).dense()
        if again.dtype != value.dtype or not torch.equal(again, value):
            return f"{told}: from its own values it is another tensor"
        if not bool(torch.isfinite(value).all()) or bool((torch.signbit(value) & (value == 0)).any()):
            return f"{told}: holds -0.0 or what is not finite"
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
