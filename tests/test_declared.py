"""What a file may hold of each target: what is written is declared, and what is not is refused on every way in."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases import TARGETS

import detent as dt
from benchmarks.fuzz_meaning import MEANINGS, forged, outcome, subjects
from detent import pack
from detent.lives import Encoded
from detent.pack.header import Columns, RawForm, read_head, write_head

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def encoded(target: dt.Target, shape: tuple[int, ...] = (8, 12), dtype: torch.dtype = torch.float32) -> Encoded:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    params = target.fit(w)
    return Encoded(target=target, params=params, codes=target.encode(w, params), dtype=dtype)


def write(path: Path, item: Encoded) -> Path:
    """A file with right checksums, whatever it says."""
    with mock.patch("detent.pack.container.read_head"), pack.Writer(path, "compressed") as writer:
        writer.add("weight", None, encoded=item)
    return path


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_written_is_what_is_declared(name: str) -> None:
    """Names, dtypes, widths, shapes, counts and ranges, at both ends of every dtype."""
    target, tried = TARGETS[name], 0
    for shape in ((6, 4, 3, 3), (8, 12), (7,)):
        for dtype in DTYPES:
            plain = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            ends = torch.finfo(dtype)
            for w in (plain, plain * 0, plain.sign() * ends.max, plain * ends.smallest_normal):
                layout = dt.Layout(shape=shape)
                if target.accepts(shape, dtype, layout) is not None:
                    continue
                params = target.fit(w.to(dtype), layout)
                codes = target.encode(w.to(dtype), params)
                streams = {stream.name: stream.values for stream in codes.streams}
                held = {n: params[n].numel() for n in target.stored} | {n: v.numel() for n, v in streams.items()}
                pieces = target.declared(layout, dtype, held)
                assert pieces is not None
                assert [piece.name for piece in pieces.params] == list(target.stored)
                assert [piece.name for piece in pieces.streams] == list(streams)
                assert all(piece.fits(params[piece.name].dtype, params[piece.name].shape) for piece in pieces.params)
                for piece, stream in zip(pieces.streams, codes.streams, strict=True):
                    kind = stream.values.dtype if stream.values.is_floating_point() else stream.width
                    assert piece.fits(kind, stream.values.shape)
                pieces.check(params.tensors, streams)
                assert bool(torch.isfinite(target.decode(codes, params, dtype)).all())
                tried += 1
    assert tried >= 4


def stream(item: Encoded, which: str, **changes: object) -> Encoded:
    streams = tuple(replace(s, **changes) if s.name == which else s for s in item.codes.streams)
    return replace(item, codes=dt.Codes(streams=streams))


def param(item: Encoded, name: str, values: torch.Tensor) -> Encoded:
    return replace(item, params=replace(item.params, tensors={**item.params.tensors, name: values}))


def codes_of(value: int) -> torch.Tensor:
    return torch.full((96,), value, dtype=torch.int32)


def few(item: Encoded, name: str, count: int) -> Encoded:
    values = next(s.values for s in item.codes.streams if s.name == name)
    more = torch.ones(max(count, 0)).to(values.dtype)
    return stream(item, name, values=torch.cat([values, more]) if count > 0 else values[:count])


U2, T5, B = dt.Uniform(bits=2), dt.TopK(keep=5), dt.Binary()
LEARNED = dt.LearnedLevels(k=2)
ON_LEVELS = dt.SparseLevels(sparse=dt.TopK(keep=4), survivors=dt.Uniform(bits=3))
BOOK = dt.VectorCodebook(block=2, size=4, zero=True)

# What was found in files that a reader took, each with a piece of the sentence that refuses it.
SPECIMENS: dict[str, tuple[Callable[[], Encoded], str]] = {
    "floats for codes": (
        lambda: stream(encoded(U2), "codes", values=torch.full((96,), 1e30), width=32),
        "'codes' is F32",
    ),
    "the unused code of a grid": (lambda: stream(encoded(U2), "codes", values=codes_of(3)), "which must be below 3"),
    "a fourth level of three": (
        lambda: stream(encoded(dt.Ternary()), "codes", values=codes_of(3)),
        "which must be below 3",
    ),
    "a byte for a bit": (lambda: stream(encoded(B), "codes", values=codes_of(200), width=8), "'codes' is 8"),
    "a scale that is no number": (lambda: param(encoded(U2), "scale", torch.tensor([torch.nan])), "numbers from nan"),
    "a negative scale": (lambda: param(encoded(U2), "scale", torch.tensor([-1.0])), "numbers from -1.0"),
    "an infinite scale": (lambda: param(encoded(B), "scale", torch.tensor([torch.inf])), "numbers from inf"),
    "a scale of another dtype": (
        lambda: param(encoded(U2), "scale", torch.ones(1, dtype=torch.float16)),
        "'scale' is F16",
    ),
    "a scale too many": (lambda: param(encoded(U2), "scale", torch.ones(2)), "'scale' is F32 (2,)"),
    "five levels of two": (
        lambda: param(encoded(LEARNED), "levels", torch.arange(5.0)[None]),
        "'levels' is F32 (1, 5)",
    ),
    "levels that the weights cannot take": (
        lambda: param(encoded(LEARNED, dtype=torch.bfloat16), "levels", torch.tensor([[0.1, 1.0]])),
        "none of torch.bfloat16",
    ),
    "levels without their zero": (
        lambda: param(encoded(dt.LearnedLevels(k=2, zero=True)), "levels", torch.tensor([[1.0, 2.0]])),
        "without the 0",
    ),
    "a power between two": (
        lambda: param(encoded(dt.PowerOfTwo(bits=3)), "top", torch.tensor([0.5]).half()),
        "not whole",
    ),
    "one value for four survivors": (lambda: few(encoded(ON_LEVELS), "survivors.codes", -3), "1 values for 4"),
    "a value of none": (lambda: few(encoded(T5), "values", 1), "6 values for 5 survivors"),
    "a survivor of -0.0": (lambda: stream(encoded(T5), "values", values=-torch.zeros(5)), "holds -0.0"),
    "a survivor that is no number": (lambda: stream(encoded(T5), "values", values=torch.full((5,), torch.nan)), "nan"),
    "more survivors than the target keeps": (lambda: replace(encoded(T5), target=dt.TopK(keep=3)), "keeps 5 weights"),
    "a stream nobody reads": (
        lambda: replace(
            encoded(U2),
            codes=dt.Codes(streams=(*encoded(U2).codes.streams, dt.Stream(name="spare", values=codes_of(1), width=1))),
        ),
        "not what Uniform has",
    ),
    "a stream of another name": (lambda: stream(encoded(U2), "codes", name="mask"), "not what Uniform has"),
    "a codeword of none": (
        lambda: stream(encoded(replace(BOOK, size=3), (8, 12)), "codes", values=torch.full((48,), 3)),
        "which must be below",
    ),
    "a codebook without its zero": (
        lambda: stream(encoded(BOOK), "book", values=torch.ones(8, dtype=torch.int32)),
        "first codeword is not zero",
    ),
    "codes for a target of none": (lambda: replace(encoded(U2), target=dt.Zero()), "not what Zero has"),
    "a number beyond half precision": (
        lambda: stream(encoded(dt.Round()), "values", values=torch.full((96,), torch.inf).half()),
        "numbers from inf",
    ),
}


@pytest.mark.parametrize("name", SPECIMENS)
def test_what_a_target_cannot_mean_is_refused_on_every_way_in(name: str, tmp_path: Path) -> None:
    make, says = SPECIMENS[name]
    path = write(tmp_path / "f.detent", make())
    ways: list[Callable[[], object]] = [
        lambda: pack.Reader(path).tensor("weight"),
        lambda: pack.Reader(path).encoded("weight"),
        lambda: pack.inspect(path),
        lambda: dt.unpack(path, tmp_path / "plain.safetensors"),
    ]
    for way in ways:
        with pytest.raises(dt.FormatError) as caught:
            way()
        assert says in str(caught.value)
    assert not (tmp_path / "plain.safetensors").exists()


def test_zeros_that_fill_up_survivors_are_read(tmp_path: Path) -> None:
    """Fewer weights than a pattern may keep: their places are written as zeros, which no mask points at."""
    w = torch.zeros(8, 12)
    w[0, :3] = torch.tensor([1.0, -2.0, 0.5])
    target = dt.SparseLevels(sparse=dt.TopK(keep=6), survivors=dt.Uniform(bits=3))
    params = target.fit(w)
    item = Encoded(target=target, params=params, codes=target.encode(w, params), dtype=w.dtype)
    assert item.codes["survivors.codes"].numel() == 6 > int(item.codes["mask"].sum())
    with pack.Reader(write(tmp_path / "f.detent", item)) as reader:
        assert torch.equal(reader.tensor("weight"), target.project(w, params))


def test_a_target_of_elsewhere_declares_nothing_and_is_read(tmp_path: Path) -> None:
    class_free = dt.Target.declared(U2, dt.Layout(shape=(2, 2)), torch.float32, {})
    assert class_free is None


@pytest.mark.parametrize("name", ["uniform-4-group", "learned-5-group", "kernels", "sparse-levels-nm", "topk-five"])
def test_whatever_is_changed_is_refused_or_a_member_of_the_set(name: str, tmp_path: Path) -> None:
    """A few files of what benchmarks/fuzz_meaning.py does in earnest, with the table of cases."""
    pool = subjects([TARGETS[name], TARGETS["uniform-2"]])
    for index in range(60):
        if forged(random.Random(f"{name}:{index}"), tmp_path / "f.detent", pool):
            assert outcome(tmp_path / "f.detent") in ("FormatError", "a member of the set"), index


@pytest.mark.slow
def test_meanings_are_refused_or_members_of_the_set_in_bounded_time_and_memory() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", "meaning:7,0,1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [] and found["grown_bytes"] < 1 << 26
    assert {kind for kind, what, _ in found["counts"] if what == "FormatError"} == set(MEANINGS)


def test_a_header_takes_memory_by_the_length_of_its_file() -> None:
    """Tensors of nothing cost a few bytes each, and a kilobyte once they are read."""
    columns = Columns(writer="", life="compressed")
    form = RawForm("buffer", "U8", "U8", None)
    for i in range(400_000):
        columns.names[str(i)] = i
    columns.rows, columns.shapes = [0] * 400_000, [(0,)] * 400_000
    columns.forms[form] = 0
    columns.lengths, columns.checks = [0] * 400_000, [0] * 400_000
    data = write_head(columns)
    tracemalloc.start()
    with pytest.raises(ValueError, match="declares more than a file of this length may"):
        read_head(data, len(data))
    assert tracemalloc.get_traced_memory()[1] < (1 << 27) + 64 * len(data)
    tracemalloc.stop()


@pytest.mark.parametrize("what", ["targets", "notes", "shapes"])
def test_no_part_of_a_header_is_free(what: str) -> None:
    columns = Columns(writer="", life="compressed")
    if what == "targets":
        columns.targets = [(f'{{"kind":"TopK","keep":{i + 1}}}', "") for i in range(60_000)]
    elif what == "notes":
        columns.notes = '{"a":[' + "[]," * 2_000_000 + "[]]}"
    else:
        columns.forms[RawForm("buffer", "U8", "U8", None)] = 0
        columns.names = {str(i): i for i in range(50_000)}
        columns.rows, columns.shapes = [0] * 50_000, [(1,) * 64] * 50_000
        columns.lengths, columns.checks = [0] * 50_000, [0] * 50_000
    data = write_head(columns)
    with pytest.raises(ValueError, match="declares more than a file of this length may|unpacks to too much"):
        read_head(data, len(data))
