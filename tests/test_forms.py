"""Forms: what targets give is what files hold, in every process; what no form can be is refused on every way in."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases import TARGETS

import detent as dt
from benchmarks.fuzz_meaning import MEANINGS, forged, outcome, subjects, with_run
from detent import pack
from detent.lives import Encoded
from detent.pack.header import Columns, RawForm, read_head, write_head
from detent.pack.loading import same_bits
from detent.targets import Held
from detent.targets.forms import outline_of

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def encoded(target: dt.Target, shape: tuple[int, ...] = (8, 12), dtype: torch.dtype = torch.float32) -> Encoded:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    params = target.fit(w)
    return Encoded(target=target, form=target.form(w, params))


def write(path: Path, item: Encoded) -> Path:
    """A file with right checksums, whatever it says."""
    with mock.patch("detent.pack.container.read_head"), pack.Writer(path, "compressed", coding="bitpacked") as writer:
        writer.add("weight", None, encoded=item)
    return path


@pytest.mark.parametrize("name", TARGETS)
def test_every_form_is_its_projection_and_comes_back(name: str, tmp_path: Path) -> None:
    """From its values, and from a file whose reader is told nothing of the target; at both ends of every dtype."""
    target, tried = TARGETS[name], 0
    for shape in ((6, 4, 3, 3), (8, 12), (7,)):
        for dtype in DTYPES:
            plain = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            ends = torch.finfo(dtype)
            for w in (plain, plain * 0, plain.sign() * ends.max, plain * ends.smallest_normal):
                layout = dt.Layout(shape=shape)
                if target.accepts(shape, dtype, layout) is not None:
                    continue
                params = target.fit_model([w], [layout], [None])[0]
                form, q = target.form(w, params), target.project(w, params)
                form.check()
                assert same_bits(form.dense(), q)
                numbers = form.outline.numbers
                back = outline_of(numbers).form(form.values, form.layout, form.dtype)
                assert same_bits(back.dense(), q) and back.outline.numbers == numbers
                unheard = Encoded(target=Held(spec='{"kind":"elsewhere:Unheard"}'), form=form)
                with pack.Writer(tmp_path / "f", "compressed") as writer:
                    writer.add("weight", None, encoded=unheard)
                with pack.Reader(tmp_path / "f") as reader:
                    assert same_bits(reader.tensor("weight"), q)
                    assert reader.header.tensors["weight"]["becomes"] == "Unheard()"
                tried += 1
    assert tried >= 4


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_restored_projects_to_the_form(name: str) -> None:
    target = TARGETS[name]
    for shape in ((6, 4, 3, 3), (8, 12)):
        if target.accepts(shape, torch.float32, dt.Layout(shape=shape)) is None:
            w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            params = target.fit_model([w], [dt.Layout(shape=shape)], [None])[0]
            q = target.project(w, params)
            for life in (w, q):
                assert torch.equal(target.project(life, target.restored(life, target.form(w, params))), q)


def changed(item: Encoded, name: str, values: torch.Tensor) -> Encoded:
    """The same form with another run of numbers, whatever it is."""
    at, part = next((i, part) for i, part in enumerate(item.form.parts) if part.name == name)
    return with_run(item, at, part, values)


def codes_of(value: int) -> torch.Tensor:
    return torch.full((96,), value, dtype=torch.int32)


U2, T5, B = dt.Uniform(bits=2), dt.TopK(keep=5), dt.Binary()
LEARNED = dt.LearnedLevels(k=2)
ON_LEVELS = dt.SparseLevels(sparse=dt.TopK(keep=4), survivors=dt.Uniform(bits=3))
BOOK = dt.VectorCodebook(block=2, size=3)

# What was found in files that a reader took, each with a piece of the sentence that refuses it.
SPECIMENS: dict[str, tuple[Callable[[], Encoded], str]] = {
    "the unused code of a grid": (lambda: changed(encoded(U2), "codes", codes_of(3)), "must be below 3"),
    "a fourth level of three": (lambda: changed(encoded(dt.Ternary()), "codes", codes_of(3)), "must be below 3"),
    "a scale that is no number": (lambda: changed(encoded(U2), "scale", torch.tensor([torch.nan])), "from nan"),
    "a negative scale": (lambda: changed(encoded(U2), "scale", torch.tensor([-1.0])), "numbers from -1.0"),
    "an infinite scale": (lambda: changed(encoded(B), "scale", torch.tensor([torch.inf])), "numbers from inf"),
    "a scale too many": (lambda: changed(encoded(U2), "scale", torch.ones(2)), "bytes more than the pieces need"),
    "levels that the weights cannot take": (
        lambda: changed(encoded(LEARNED, dtype=torch.bfloat16), "levels", torch.tensor([0.1, 1.0])),
        "none of torch.bfloat16",
    ),
    "one value for four survivors": (lambda: changed(encoded(ON_LEVELS), "codes", torch.tensor([1])), "needs 2 bytes"),
    "a value of none": (lambda: changed(encoded(T5), "values", torch.ones(6)), "bytes more than the pieces need"),
    "a survivor of -0.0": (lambda: changed(encoded(T5), "values", -torch.zeros(5)), "holds -0.0"),
    "a survivor that is no number": (lambda: changed(encoded(T5), "values", torch.full((5,), torch.nan)), "nan"),
    "a codeword of none": (lambda: changed(encoded(BOOK), "codes", torch.full((48,), 3)), "must be below 3"),
    "the unused code of a codebook": (
        lambda: changed(encoded(BOOK), "book", torch.full((6,), 63, dtype=torch.int32)),
        "must be below 63",
    ),
    "a number beyond half precision": (
        lambda: changed(encoded(dt.Round()), "values", torch.full((96,), torch.inf).half()),
        "numbers from inf",
    ),
}


@pytest.mark.parametrize("name", SPECIMENS)
def test_what_a_form_cannot_be_is_refused_on_every_way_in(name: str, tmp_path: Path) -> None:
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


def test_fewer_survivors_than_a_target_keeps_are_as_many_as_there_are(tmp_path: Path) -> None:
    w = torch.zeros(8, 12)
    w[0, :3] = torch.tensor([1.0, -2.0, 0.5])
    target = dt.SparseLevels(sparse=dt.TopK(keep=6), survivors=dt.Uniform(bits=3))
    params = target.fit(w)
    item = Encoded(target=target, form=target.form(w, params))
    assert item.form.named["codes"].numel() == 3 == int(item.form.named["mask"].sum())
    with pack.Reader(write(tmp_path / "f.detent", item)) as reader:
        assert torch.equal(reader.tensor("weight"), target.project(w, params))


@pytest.mark.parametrize("name", ["uniform-4-group", "learned-5-group", "kernels", "sparse-levels-nm", "topk-five"])
def test_whatever_is_changed_is_refused_or_a_form(name: str, tmp_path: Path) -> None:
    """A few files of what benchmarks/fuzz_meaning.py does in earnest, with the table of cases."""
    pool = subjects([TARGETS[name], TARGETS["uniform-2"]])
    for index in range(60):
        if forged(random.Random(f"{name}:{index}"), tmp_path / "f.detent", pool):
            assert outcome(tmp_path / "f.detent") in ("FormatError", "a member of the set"), index


@pytest.mark.slow
def test_meanings_are_refused_or_forms_in_bounded_time_and_memory() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", "meaning:7,0,1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [] and found["grown_bytes"] < 1 << 26
    assert {kind for kind, what, _ in found["counts"] if what == "FormatError"} == {*MEANINGS} - {"fields"}


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
        columns.targets = [(f'{{"kind":"TopK","keep":{i + 1}}}', "") for i in range(300_000)]
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
