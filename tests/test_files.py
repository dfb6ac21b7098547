"""Files: what is saved comes back bitwise, and a damaged, foreign or unfit file is refused in one sentence."""

from __future__ import annotations

import base64
import copy
import json
import os
import random
import re
import stat
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import stranger
import torch
from cases import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import detent as dt
from detent import pack
from detent.pack import atomic, bits
from detent.pack.dictionary import DICTIONARY

ROOT = Path(__file__).resolve().parent.parent
# The two forms of a file, by the end of its name.
FORMS = ["f.detent", "f.safetensors"]
CODINGS: list[Any] = ["entropy", "bitpacked", "none"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


# --- samples ------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """One weight of any shape and dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Mixed(nn.Module):
    """A bit of everything that a file must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.bn = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.low = nn.Linear(4, 4).to(torch.bfloat16)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.shared_bn = self.bn
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("scalar", torch.tensor(-0.0))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.register_buffer("strided", torch.arange(12.0).reshape(3, 4).t())
        self.register_buffer("nothing", None)
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


RECIPE = dt.Recipe(
    [
        dt.Rule(match="^conv", target=dt.Uniform(bits=4, granularity="channel", param_dtype="float16")),
        dt.Rule(match="^up", target=dt.Uniform(bits=3, granularity=dt.Group(size=5)), pinned=True),
        dt.Rule(match="^low", target=dt.Uniform(bits=5, granularity="channel", param_dtype="bfloat16")),
        dt.Rule(match="^embed", target=dt.TopK(keep=0.4)),
    ]
)
PRUNED = dt.Recipe([dt.Rule(match=r"^(conv|up|low)", target=dt.TopK(keep=0.3, scope="model"))])


def mixed_run(recalibrate: bool = True) -> dt.Run:
    model = Mixed()
    model.bn(torch.randn(4, 6, 5, 5) + 1)  # statistics of its own
    run = dt.compress(model, RECIPE)
    if recalibrate:
        batches = [torch.randn(3, 4, 6, 6)]
        run.recalibrate(batches)
        run.recalibrate(batches, bits=2)
        run.recalibrate(batches, recipe=PRUNED)
    return run


def small_run() -> dt.Run:
    """A run whose file is short enough to try every byte of it."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    rules = [dt.Rule(match="0.weight", target=dt.Uniform(bits=3)), dt.Rule(match="1", keep=True)]
    run = dt.compress(model, dt.Recipe(rules))
    run.recalibrate([torch.randn(8, 4)])
    return run


def snapshot(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor of a state dict, to the bit."""
    return {
        name: (t.dtype, tuple(t.shape), t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in model.state_dict().items()
    }


def scrambled(model: nn.Module) -> nn.Module:
    """A twin in which every tensor has other values, but the same strides."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.copy_(
                torch.randint_like(tensor, 0, 2) if not tensor.is_floating_point() else torch.randn_like(tensor)
            )
    return twin


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a container and make its checksum right again: what a faulty writer would give."""
    head, checks, data = stranger.split(path.read_bytes())
    changed = change(head)
    head = head if changed is None else changed
    path.write_bytes(stranger.join(stranger.flat(head) if isinstance(head, dict) else head, checks, data))


# --- bits ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 16).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=70))))
def test_bits_are_packed_as_one_long_number(case: tuple[int, list[int]]) -> None:
    width, values = case
    packed = pack.pack_bits(np.array(values, dtype=np.int64), width)
    number = sum(value << (i * width) for i, value in enumerate(values))
    assert packed == number.to_bytes(-(-len(values) * width // 8), "little")
    assert pack.unpack_bits(packed, len(values), width).tolist() == values


@pytest.mark.parametrize("width", range(1, 17))
def test_blocks_join_without_a_seam(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(width).integers(0, 2**width, 83)
    whole = pack.pack_bits(values, width)
    monkeypatch.setattr(bits, "_BLOCK", 16)
    assert pack.pack_bits(values, width) == whole
    assert pack.unpack_bits(whole, 83, width).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: pack.pack_bits(np.array([4]), 2), "do not fit into 2 bits"),
        (lambda: pack.pack_bits(np.array([-1]), 2), "do not fit into 2 bits"),
        (lambda: pack.pack_bits(np.array([1]), 0), "must be 1 to 16"),
        (lambda: pack.unpack_bits(b"1", 1, 17), "must be 1 to 16"),
        (lambda: pack.unpack_bits(b"12", 2, 3), "do not take 2 bytes"),
    ],
)
def test_values_that_do_not_fit_are_refused(act: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        act()


# --- there and back -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(TARGETS)),
    dtype=st.sampled_from(FLOATS),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    seed=st.integers(0, 2**31),
    turned=st.booleans(),
    form=st.sampled_from(FORMS),
    coding=st.sampled_from(CODINGS),
)
def test_any_target_dtype_and_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    dtype: torch.dtype,
    shape: list[int],
    seed: int,
    turned: bool,
    form: str,
    coding: Any,
) -> None:
    target = TARGETS[name]
    if target.accepts(shape, dtype, dt.Layout(shape=tuple(shape))):
        return
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    model = Holder(weight.mT if turned and weight.dim() >= 2 else weight)
    if target.accepts(model.weight.shape, dtype, dt.Layout(shape=tuple(model.weight.shape))):
        return
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", include="weight", target=target)]))
    full = snapshot(model)
    with run.compressed():
        compressed = snapshot(model)
    path = tmp_path_factory.getbasetemp() / form
    for life, wanted in (("both", ("full", "compressed")), ("compressed", ("compressed",))):
        assert dt.save(run, path, life, coding=coding) == path.stat().st_size  # type: ignore[arg-type]
        for load in wanted:
            twin: Any = scrambled(model)
            dt.load(path, twin, load)  # type: ignore[arg-type]
            assert snapshot(twin) == (full if load == "full" else compressed)
            assert twin.weight.stride() == model.weight.stride()
    dt.save(run, path, "compressed", coding="bitpacked")
    encoded = run.encoded()["weight"]
    found = pack.sizes(path)
    own = encoded.form
    codes = [(part, v) for part, v in zip(own.parts, own.values, strict=True) if part.role != "numbers"]
    assert found["codes"] == sum(part.nbytes(values) for part, values in codes)
    assert found["nominal_bits"] == sum(values.numel() * part.width for part, values in codes)
    assert found["codes"] + found["params"] == own.nbytes + own.shared_nbytes


@pytest.mark.parametrize("choice", [{}, {"bits": 2}, {"recipe": PRUNED}], ids=["trained", "bits", "recipe"])
@pytest.mark.parametrize("recalibrate", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_both_lives_of_a_mixed_model(tmp_path: Path, choice: dict[str, Any], recalibrate: bool, form: str) -> None:
    run = mixed_run(recalibrate)
    full = snapshot(run.model)
    with run.compressed(**choice):
        compressed = snapshot(run.model)
    assert (full["bn.running_mean"] != compressed["bn.running_mean"]) == recalibrate
    dt.save(run, tmp_path / f"both-{form}", **choice)
    dt.save(run, tmp_path / f"small-{form}", "compressed", **choice)
    assert snapshot(run.model) == full
    for file, life, wanted in (
        ("both", "full", full),
        ("both", "compressed", compressed),
        ("small", "compressed", compressed),
    ):
        twin: Any = scrambled(run.model)
        twin.cache.fill_(7.0)
        path = tmp_path / f"{file}-{form}"
        header = dt.load(path, twin, life)  # type: ignore[arg-type]
        assert snapshot(twin) == wanted
        assert bool((twin.cache == 7.0).all()), "a non-persistent buffer is not the file's business"
        assert twin.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert twin.head.weight is twin.embed.weight
        own = pack.read_header(path)
        assert (header.plan, header.card, header.tensors) == (own.plan, own.card, own.tensors)
        assert (header.missing, header.unexpected, header.mismatched, header.renamed) == ((), (), (), {})
        assert header.card["batchnorm"] == ("re-estimated" if recalibrate else "own")


def test_a_run_with_latents_in_mid_training(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rules = [
        dt.Rule(match="0.weight", target=dt.Uniform(bits=3), mechanism=dt.STE()),
        dt.Rule(match="1.weight", target=dt.TopK(keep=0.5), mechanism=dt.PSG(toward=dt.Zero())),
    ]
    run = dt.attach(model, optimizer, dt.Recipe(rules), total_steps=10)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(3, 5)).square().mean().backward()
        optimizer.step()
    full = snapshot(model)
    with run.compressed():
        compressed = snapshot(model)
    dt.save(run, tmp_path / "f")
    for life, wanted in (("full", full), ("compressed", compressed)):
        twin = scrambled(model)
        header = dt.load(tmp_path / "f", twin, life)  # type: ignore[arg-type]
        assert snapshot(twin) == wanted
    assert [row["mechanism"] for row in header.plan[:2]] == ["STE()", "PSG(toward=Zero())"]
    model(torch.randn(3, 5)).square().mean().backward()
    optimizer.step()  # saving has written no weight: the run goes on


def test_what_was_not_trained_does_not_say_that_it_was_pulled(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.PSG())])
    dt.save(dt.compress(model, recipe), tmp_path / "compressed")
    run = dt.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe, total_steps=10)
    dt.save(run, tmp_path / "trained")
    dt.save(run, tmp_path / "another", recipe=dt.Recipe.preset("psg-w4"))
    pulls = {
        name: pack.read_header(tmp_path / name).plan[0]["mechanism"] for name in ("compressed", "trained", "another")
    }
    assert pulls == {"compressed": "", "trained": "PSG()", "another": ""}


def test_wrappers_do_not_matter(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    recipe = dt.Recipe([dt.Rule(match="^0.weight", target=dt.Uniform(bits=2))])
    dt.save(dt.compress(nn.DataParallel(model), recipe), tmp_path / "wrapped")
    dt.save(dt.compress(model, recipe), tmp_path / "plain")
    assert pack.read_header(tmp_path / "wrapped") == pack.read_header(tmp_path / "plain")
    twin = scrambled(model)
    dt.load(tmp_path / "plain", nn.DataParallel(twin))
    assert snapshot(twin) == snapshot(model)


def test_a_normalisation_at_the_root_keeps_its_second_statistics(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(3)
    recipe = dt.Recipe([dt.Rule(match="weight", include="weight", target=dt.Uniform(bits=2))])
    run = dt.compress(model, recipe)
    run.recalibrate([torch.randn(8, 3)])
    with run.compressed():
        compressed = snapshot(model)
    dt.save(run, tmp_path / "f")
    dt.load(tmp_path / "f", model, "compressed")
    assert snapshot(model) == compressed
    run.finalize()
    assert snapshot(model) == compressed


def test_any_safetensors_reader_loads_the_full_life(tmp_path: Path) -> None:
    run = mixed_run()
    dt.save(run, tmp_path / "f.safetensors")
    plain = safetensors.torch.load_file(tmp_path / "f.safetensors")
    assert plain.pop(".data").dtype == torch.uint8
    twin = scrambled(run.model)
    left = twin.load_state_dict(plain, strict=False)
    assert left.unexpected_keys == []
    assert all(name == "head.weight" or name.startswith("shared_bn.") for name in left.missing_keys), "only aliases"
    assert snapshot(twin) == snapshot(run.model)


@pytest.mark.parametrize("coding", ["bitpacked", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_a_reader_written_from_the_documentation(tmp_path: Path, coding: Any, form: str) -> None:
    """docs/format.md, followed to the letter with nothing but the standard library and msgpack."""
    run = mixed_run()
    model: Any = run.model
    path = tmp_path / form
    for life in ("both", "compressed"):
        dt.save(run, path, life, coding=coding, notes={"a": [1]})
        raw = path.read_bytes() if form == "f.detent" else as_container(path)
        head, _, _ = stranger.split(raw)
        assert (head["writer"], head["batchnorm"], head["notes"]) == (dt.__version__, "re-estimated", '{"a":[1]}')
        blobs = stranger.blobs(raw)
        names = head["names"].split("\n")
        assert {alias: names[at] for alias, at in head["aliases"]} == {
            "head.weight": "embed.weight",
            **{f"shared_bn.{name}": f"bn.{name}" for name in model.bn.state_dict()},
        }
        with run.compressed():
            (values,) = blobs["bn.running_mean", False]
            assert model.bn.running_mean.tolist() == values
            form_of = dict(zip(names, (head["forms"][row] for row in head["rows"]), strict=True))
            spec, mechanism = head["targets"][form_of["conv.weight"]["target"]]
            assert mechanism == ""
            assert json.loads(spec)["kind"] == "Uniform"
            numbers, pieces = form_of["conv.weight"]["numbers"], blobs["conv.weight", False]
            assert model.conv.weight.flatten().tolist() == stranger.decoded(numbers, [6, 4, 3, 3], pieces)
            (mask, kept) = blobs["embed.weight", False]
            left = iter(kept)
            assert model.embed.weight.flatten().tolist() == [next(left) if one else 0.0 for one in mask]
        assert form_of["flags"]["why"] == head["why"].index("buffer")
        assert head["why"][form_of["gain"]["why"]] == "no rule matches"
        for name in ("conv.weight", "low.bias", "flags", "scalar", "empty") if life == "both" else ():
            (values,) = blobs[name, True]
            assert model.state_dict()[name].flatten().tolist() == values
        if life == "compressed":
            assert model.low.bias.tolist() == blobs["low.bias", False][0]


def as_container(path: Path) -> bytes:
    """Section 7, undone: the frame of a container around what a safetensors file holds."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    meta = entries["__metadata__"]
    header = base64.b64decode(meta["header"])
    assert (meta["detent"], meta["crc32"]) == ("2", f"{zlib.crc32(header):08x}")
    tail = struct.pack("<II", len(header), zlib.crc32(header))
    head, _, _ = stranger.split(b"\x89Detent\x02" + header + tail)
    pieces = {name: data[slice(*entry["data_offsets"])] for name, entry in entries.items() if name != "__metadata__"}
    at, found = 0, b""
    for blob, length in zip(stranger.order(head), stranger.lengths(head), strict=True):
        if blob["bare"]:
            found += pieces.pop(blob["name"])
        else:
            found, at = found + pieces[".data"][at : at + length], at + length
    assert at == len(pieces.pop(".data"))
    assert pieces == {}
    return b"\x89Detent\x02" + found + header + tail


def test_the_dictionary_on_the_page_is_the_one_in_use() -> None:
    assert stranger.dictionary() == DICTIONARY


# --- what a file says ---------------------------------------------------------------------------------------------


def test_the_header_says_what_was_done(tmp_path: Path) -> None:
    run = mixed_run()
    notes = {"who": "me", "accuracy": 0.5, "data": ["a", 1, None, {"é": True}]}
    dt.save(run, tmp_path / "f", "compressed", coding="bitpacked", notes=notes)
    header = pack.read_header(tmp_path / "f")
    assert (header.version, header.writer, header.life) == (2, dt.__version__, "compressed")
    assert header.card["notes"] == notes
    by_name = {row["parameter"]: row for row in run.plan.rows()}
    assert {row["parameter"]: dict(row) for row in header.plan} == by_name
    assert header.card["full_precision"] == {
        reason: names
        for reason in {c.reason for c in run.plan.claims if not c.claimed}
        if (names := [c.name for c in run.plan.claims if c.reason == reason])
    }
    assert [(row["target"], row["granularity"], row["tensors"]) for row in header.card["compressed"]] == [
        ("TopK(keep=0.4)", "tensor", 1),
        ("Uniform(bits=4, granularity='channel', param_dtype='float16')", "channel", 1),
        ("Uniform(bits=3, granularity=Group(size=5))", "Group(size=5)", 1),
        ("Uniform(bits=5, granularity='channel', param_dtype='bfloat16')", "channel", 1),
    ]
    assert header.card["weights"] == sum(p.numel() for p in run.model.parameters())
    assert header.card["compressed_weights"] == sum(c.layout.numel for c in run.plan.claimed)
    measured = {row["name"]: row["bits_per_weight"] for row in run.measure()}
    for name, bits_a_weight in measured.items():  # one byte more a tensor: which coding it is
        one = 8 / run.model.get_parameter(name).numel()
        assert header.tensors[name]["bits_per_weight"] == pytest.approx(bits_a_weight + one)
    assert set(header.tensors) == {*by_name, *dict(run.model.named_buffers())} - {"cache"}
    dt.save(run, tmp_path / "f", "compressed", bits=2)
    becomes = {row["parameter"]: row["becomes"] for row in pack.read_header(tmp_path / "f").plan}
    assert becomes["conv.weight"].startswith("Uniform(bits=2")
    assert becomes["up.weight"].startswith("Uniform(bits=3"), "pinned"


@pytest.mark.parametrize("life", ["both", "compressed"])
@pytest.mark.parametrize("form", FORMS)
def test_sizes_add_up(tmp_path: Path, life: Any, form: str) -> None:
    run = mixed_run()
    total = dt.save(run, tmp_path / form, life, coding="bitpacked")
    found = pack.sizes(tmp_path / form)
    model: Any = run.model
    widths = {"conv.weight": 4, "up.weight": 3, "low.weight": 5}
    grids = sum(model.get_parameter(name).numel() * width for name, width in widths.items())
    kept = round(0.4 * 24)
    assert found["nominal_bits"] == grids + 24 + 32 * kept
    assert found["weights"] == sum(model.get_parameter(name).numel() for name in widths) + 24
    assert found["codes"] == sum(-(-model.get_parameter(n).numel() * w // 8) for n, w in widths.items()) + 3 + 4 * kept
    assert found["params"] == 6 * 2 + 4 * 4 * -(-(model.up.weight.numel() // 4) // 5) + 4 * 2
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(("shared_bn", "head"))}
    plain = form == "f.safetensors" and life == "both"
    full = {name: t.nbytes if plain else shortest(t) for name, t in state.items()}
    with run.compressed():
        rest = {name: shortest(t) for name, t in model.state_dict().items() if name in state}
    both = {name for name in state if name.startswith("bn.") and name.split(".")[1][0] in "rn"}
    assert len(both) == 3
    if life == "both":
        assert found["full"] == sum(full.values())
        assert found["rest"] == sum(rest[name] for name in both)
    else:
        assert found["full"] == 0
        assert found["rest"] == sum(rest[name] for name in rest.keys() - {*widths, "embed.weight"})
    assert found["file"] == total == sum(found[k] for k in ("header", "codes", "params", "rest", "full"))
    assert found["overhead"] == found["header"] + found["params"] + found["codes"] - found["nominal_bits"] // 8


def shortest(tensor: Tensor) -> int:
    """Bytes of a tensor in the shortest dtype that holds all its numbers, found by trying."""

    def same(other: torch.dtype) -> bool:
        back = tensor.to(other).to(tensor.dtype)
        return back.numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()

    others = {torch.float32: FLOATS[1:3], torch.int64: [torch.uint8, torch.int8, torch.int16, torch.int32]}
    sizes = [other.itemsize for other in others.get(tensor.dtype, []) if same(other)]
    return tensor.numel() * min([*sizes, tensor.dtype.itemsize])


def test_the_header_of_a_deep_network_stays_small(tmp_path: Path) -> None:
    blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)) for _ in range(30)]
    model = scrambled(nn.Sequential(*blocks))  # equal tensors have equal checksums, which pack too well
    run = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=2))]))
    dt.save(run, tmp_path / "f", "compressed")
    assert pack.sizes(tmp_path / "f")["header"] < 128 + 9 * len(pack.read_header(tmp_path / "f").tensors)
    dt.save(run, tmp_path / "f.safetensors", "compressed")
    assert pack.sizes(tmp_path / "f.safetensors")["header"] < 500 + 12 * 180


# --- damage -------------------------------------------------------------------------------------------------------


class Victim:
    """A small file, and what each of its two lives must be if it loads at all."""

    def __init__(self, folder: Path, form: str) -> None:
        run = small_run()
        self.model = run.model
        self.path = folder / form
        dt.save(run, self.path, notes={"a": 1})
        self.data = self.path.read_bytes()
        self.lives = {"full": snapshot(run.model)}
        with run.compressed():
            self.lives["compressed"] = snapshot(run.model)
        assert self.lives["full"] != self.lives["compressed"]
        self.twin, self.other = scrambled(run.model), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.twin.load_state_dict(self.other.state_dict())
        self.untouched = snapshot(self.other)

    def outcome(self, data: bytes, life: str) -> str:
        """Load damaged bytes: "refused" with nothing written, or "same"; everything else fails the test."""
        # In place: truncating a file and writing it anew makes some file systems flush it.
        with open(self.path, "r+b") as file:
            file.write(data)
            file.truncate()
        try:
            dt.load(self.path, self.twin, life)  # type: ignore[arg-type]
        except dt.FormatError as error:
            sentence = str(error)
        else:
            assert snapshot(self.twin) == self.lives[life]
            self.twin.load_state_dict(self.other.state_dict())
            return "same"
        assert snapshot(self.twin) == self.untouched
        assert str(self.path) in sentence
        assert "\n" not in sentence
        return "refused"


@pytest.fixture(scope="module", params=FORMS)
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return Victim(tmp_path_factory.mktemp("victim"), request.param)


@pytest.mark.parametrize("life", ["full", "compressed"])
def test_every_byte_matters(victim: Victim, life: str) -> None:
    same = 0
    for i in range(len(victim.data)):
        data = bytearray(victim.data)
        data[i] ^= 0xFF if life == "full" else 1 << (i % 8)
        same += victim.outcome(bytes(data), life) == "same"
    # Only the other life's numbers may change unnoticed; in the safetensors form also the padding of its header.
    if victim.path.suffix == ".detent":
        head, _, _ = stranger.split(victim.data)
        blobs = list(zip(stranger.order(head), stranger.lengths(head), strict=True))
        apart = {blob["name"] for blob, _ in blobs if not blob["bare"]}
        other = [n for blob, n in blobs if blob["name"] in apart and blob["bare"] == (life == "compressed")]
        assert same == sum(other)
    else:
        assert same < len(victim.data) / 5
    assert victim.outcome(victim.data, life) == "same"


def test_every_truncation_is_refused(victim: Victim) -> None:
    for size in range(len(victim.data)):
        assert victim.outcome(victim.data[:size], "full") == "refused"
    for more in (b"\0", b" ", victim.data):
        assert victim.outcome(victim.data + more, "compressed") == "refused"


def test_random_damage_is_refused(victim: Victim) -> None:
    dice = random.Random(7)
    for trial in range(2000):
        data = bytearray(victim.data)
        for _ in range(dice.choice([1, 2, 5])):
            at, size = dice.randrange(len(data)), dice.choice([1, 2, 8, 40])
            kind = dice.randrange(5)
            if kind == 0:
                data[at : at + size] = dice.randbytes(size)
            elif kind == 1:
                del data[at : at + size]
            elif kind == 2:
                data[at:at] = dice.randbytes(size)
            elif kind == 3:
                other = dice.randrange(len(data))
                data[at : at + size] = data[other : other + size]
            else:
                data[at : at + size] = dice.choice([b"0", b"9", b"\xff", b"\0", b'"', b"["]) * size
        victim.outcome(bytes(data), ("full", "compressed")[trial % 2])


def frame(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n", "damaged or neither a Detent nor a safetensors file"),
        (b"PK\x03\x04" + bytes(200), "it begins as what torch.save writes"),
        (struct.pack("<Q", 2**63), "damaged or neither a Detent nor a safetensors file"),
        (frame(b"{}"), "without a Detent header"),
        (frame(b"[" * 50_000), "damaged or neither a Detent nor a safetensors file"),
        (frame(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"), "without a Detent header"),
        (frame(b'{"__metadata__":{"detent":"3","header":"?"}}'), "format version 3; this release reads 2"),
        (frame(b'{"__metadata__":{"detent":"1","header":"?"}}'), "format version 1, of drafts .*reads 2. Convert it"),
        (frame(b'{"__metadata__":{"detent":"-1"}}'), "no valid format version"),
        (frame(b'{"__metadata__":{"detent":"2"}}'), "header is damaged"),
        (frame(b'{"__metadata__":{"detent":"2","header":"","crc32":"00000000"}}'), "header is damaged"),
        (frame(b'{"__metadata__":{"detent":"2","header":"!","crc32":"00000000"}}'), "header is damaged"),
        (b"\x89Detent", "is cut short"),
        (b"\x89Detent\x02", "is cut short"),
        (b"\x89Detent\x03" + bytes(100), "format version 3; this release reads 2"),
        (b"\x89Detent\x01" + bytes(100), "format version 1, of drafts .* Convert it: `detent unpack`"),
        (b"\x89Detent\x02" + bytes(92) + struct.pack("<II", 93, 0), "its last bytes point at no header"),
        (b"\x89Detent\x02" + bytes(92) + struct.pack("<II", 2**32 - 1, 0), "its last bytes point at no header"),
        (b"\x89Detent\x02" + bytes(92) + struct.pack("<II", 92, 1), "header is damaged"),
        (b"\x89Detent\x02" + bytes(8), "header is not valid: it is cut short"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "f").write_bytes(data)
    for act in (pack.read_header, pack.sizes, lambda path: dt.load(path, nn.Linear(1, 1))):
        with pytest.raises(dt.FormatError, match=sentence) as caught:
            act(tmp_path / "f")
        assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(dt.FormatError, match="is a folder"):
        pack.read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(dt.FormatError, match="not a regular file"):
        pack.read_header(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"cannot open .*nowhere: No such file"):
        pack.read_header(tmp_path / "nowhere")


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(head: dict[str, Any]) -> None:
        place: Any = head
        for step in path[:-1]:
            place = place[step]
        if to is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = to

    return change


_CODED, _RAW = ("forms", 0), ("forms", 1)  # of small_run: the weight, and the bias
_NUMBERS = (*_CODED, "numbers")  # a grid, one scale, F32, three integers a side, with zero, even
_TOP = ("writer", "life", "batchnorm", "names", "notes")


@pytest.mark.parametrize(
    "change",
    [
        lambda head: b"",
        lambda head: b"\xc1",
        lambda head: b"\x80" * 1000,
        lambda head: b"\xdd\xff\xff\xff\xff",
        lambda head: b"\xdb\xff\xff\xff\xff",
        lambda head: [],
        lambda head: [stranger.flat(head)],
        lambda head: [*stranger.flat(head), 0],
        lambda head: stranger.flat(head)[:-1],
        lambda head: [*stranger.flat(head)[:-1], b""],
        *(_set(key, to=7) for key in _TOP),
        _set("life", to=0),
        _set("batchnorm", to="other"),
        _set("batchnorm", to="none, rounded to float16"),
        _set("targets", to=[]),
        *(
            _set("targets", 0, 0, to=spec)
            for spec in (
                '{"kind":"Uniform","bits":NaN}',
                '{"kind":"Uniform","bits":3}}',
                "[]",
                "3",
                "",
                "[" * 100_000,
                '{"kind":' * 100_000,
                '{"kind":' * 40 + "1" + "}" * 40,
            )
        ),
        _set("why", to=[]),
        _set("aliases", to=[["1.weight", 0]]),
        _set("aliases", to=[["x", 99]]),
        _set("aliases", to=[["x", 1], ["x", 1]]),
        _set("aliases", to=[["", 1]]),
        _set("aliases", to=[[".x", 1]]),
        _set(*_CODED, "kind", to=0),
        _set(*_CODED, "kind", to=3),
        _set(*_CODED, "target", to=1),
        _set(*_CODED, "shared", to=1),
        _set(*_CODED, "axis", to=2),
        _set(*_CODED, "groups", to=2),
        _set(*_CODED, "groups", to=0),
        _set(*_CODED, "dtype", to=1),
        _set(*_CODED, "dtype", to=4),
        _set(*_CODED, "dtype", to=12),
        _set(*_NUMBERS, to=[]),
        _set(*_NUMBERS, to=[0, 0, 1, 3, 1]),
        _set(*_NUMBERS, to=[0, 0, 1, 3, 1, 0, 0]),
        _set(*_NUMBERS, 0, to=1),
        _set(*_NUMBERS, 0, to=2),
        _set(*_NUMBERS, 0, to=3),
        _set(*_NUMBERS, 0, to=5),
        _set(*_NUMBERS, 1, to=1),
        _set(*_NUMBERS, 1, to=3),
        _set(*_NUMBERS, 1, to=2**40),
        _set(*_NUMBERS, 2, to=0),
        _set(*_NUMBERS, 2, to=2),
        _set(*_NUMBERS, 2, to=5),
        _set(*_NUMBERS, 3, to=0),
        _set(*_NUMBERS, 3, to=1),
        _set(*_NUMBERS, 3, to=4),
        _set(*_NUMBERS, 3, to=2**15),
        _set(*_NUMBERS, 4, to=2),
        _set(*_NUMBERS, 5, to=2),
        _set(*_NUMBERS, to=[4, 0, 0, 0, 1, 3, 1, 0]),
        _set(*_NUMBERS, to=[4, 0, 4, 0, 0, 0, 1, 3, 1, 0]),
        _set(*_NUMBERS, to=[4, 1, 9, 9, 0, 0, 1, 3, 1, 0]),
        _set(*_NUMBERS, to=[4, 2, 3, 2, 0, 0, 0, 1, 3, 1, 0]),
        _set(*_NUMBERS, to=[4, 3, 0, 0, 1, 3, 1, 0]),
        _set(*_NUMBERS, to=[2, 0, 0, 3, 8, 5, 0]),
        _set(*_NUMBERS, to=[2, 0, 0, 1, 8, 4, 0]),
        _set(*_RAW, "why", to=99),
        _set(*_RAW, "dtypes", 0, to=2),
        _set(*_RAW, "dtypes", 0, to=3),
        _set(*_RAW, "dtypes", 0, to=5),
        _set(*_RAW, "dtypes", 1, to=2),
        _set(*_RAW, "dtypes", 1, to=5),
        _set("names", to=""),
        lambda head: head | {"names": head["names"].replace("0.bias", "0.weight")},
        lambda head: head | {"names": head["names"].replace("0.bias", ".bias")},
        lambda head: head | {"names": head["names"].replace("0.bias", "")},
        lambda head: head | {"names": head["names"] + "\nnew"},
        _set("rows", 0, to=1),
        _set("rows", 0, to=99),
        _set("shapes", 0, to=[4, 3]),
        _set("shapes", 0, to=[2**40, 2**40]),
        _set("shapes", 0, to=[12]),
        _set("shapes", 0, to=[0, 12]),
        _set("shapes", 0, to=[1] * 65),
        _set("shapes", 1, to=[1, 3]),
        _set("shapes", 1, to=[4]),
        _set("lengths", 0, to=1),
        _set("lengths", 0, to=9),
        _set("lengths", 0, to=2**47),
        _set("notes", to="[]"),
        _set("notes", to="{"),
        _set("notes", to='{"a":Infinity}'),
        _set("notes", to="[" * 100_000),
    ],
)
def test_a_well_formed_wrong_header_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    run = small_run()
    path = tmp_path / "f"
    dt.save(run, path, coding="bitpacked")
    rewrite(path, lambda head: None)
    dt.load(path, run.model, "compressed")  # the rewriting itself is sound
    unchanged, before = path.read_bytes(), snapshot(run.model)
    rewrite(path, change)
    if path.read_bytes() == unchanged:
        pytest.skip("the value is what it was")
    with pytest.raises(ValueError) as caught:
        dt.load(path, run.model, "compressed")
    # A header that is right by itself may still be that of another model.
    assert isinstance(caught.value, dt.FormatError) or "does not fit this model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(run.model) == before


@pytest.mark.parametrize("value", [None, 2**60, -1, 0.5, "text", b"bytes", [], {}, True], ids=repr)
def test_no_value_of_a_header_may_be_anything(tmp_path: Path, value: Any) -> None:
    """Every value in turn is something else; some text may be other text, as notes and names of another model."""
    run = small_run()
    dt.save(run, tmp_path / "f", coding="bitpacked")
    head, checks, data = stranger.split((tmp_path / "f").read_bytes())
    before, same = snapshot(run.model), 0
    for i, old in enumerate(values := stranger.flat(head)):
        (tmp_path / "f").write_bytes(stranger.join([*values[:i], value, *values[i + 1 :]], checks, data))
        try:
            dt.load(tmp_path / "f", run.model)
        except ValueError as error:
            assert isinstance(error, dt.FormatError) or "does not fit this model" in str(error), old
            assert "\n" not in str(error)
        else:
            same += 1
            assert value == "text" and isinstance(old, str), old
        assert snapshot(run.model) == before
    assert (same > 0) == (value == "text")


def test_a_header_that_unpacks_to_more_than_there_may_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(stranger.join(bytes(1 << 26), [], b""))
    with pytest.raises(dt.FormatError, match="cut short or unpacks to too much"):
        pack.read_header(path)
    for header in (b"", b"?" * 50, bytes(50), struct.pack("<I", 0)):
        path.write_bytes(b"\x89Detent\x02" + header + struct.pack("<II", len(header), zlib.crc32(header)))
        with pytest.raises(dt.FormatError, match="the header is not valid"):
            pack.read_header(path)


def test_a_huge_tensor_without_codes_is_not_made(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    dt.save(dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Zero())])), tmp_path / "f", "compressed")
    before = (tmp_path / "f").read_bytes()
    rewrite(tmp_path / "f", _set("shapes", 0, to=[2**12, 2**12]))
    with pytest.raises(ValueError, match=r"shape \(4, 4\) in the model and \(4096, 4096\) in the file"):
        dt.load(tmp_path / "f", model, "compressed")
    (tmp_path / "f").write_bytes(before)
    rewrite(tmp_path / "f", _set("shapes", 0, to=[2**20, 2**20]))
    with pytest.raises(dt.FormatError, match="are more than a file of [0-9]+ bytes can hold"):
        pack.unpack(tmp_path / "f", tmp_path / "out", "compressed")
    assert os.listdir(tmp_path) == ["f"]


# --- the wrong model ----------------------------------------------------------------------------------------------


def _double(model: Any) -> nn.Module:
    return model.double()


def _swap(index: int, new: Callable[[], nn.Module]) -> Callable[[Any], nn.Module]:
    def act(model: Any) -> nn.Module:
        model[index] = new()
        return model

    return act


def _inference(model: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(model)


def _untied(model: Any) -> nn.Module:
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: nn.Sequential(*m, nn.Linear(2, 2)), "'3.weight', '3.bias' are in the model and not in the file"),
        (lambda m: m[:2], "'2.weight', '2.bias' are in the file and not in the model"),
        (
            _swap(1, nn.Identity),
            r"'1.weight', '1.bias', '1.running_mean' \(and 2 more\) are in the file and not in the model",
        ),
        (_swap(0, lambda: nn.Linear(3, 4)), r"'0.weight' has shape \(4, 3\) in the model and \(3, 3\) in the file"),
        (_swap(2, lambda: nn.Linear(3, 3, bias=False)), "'2.bias' is in the file and not in the model"),
        (_double, "'0.weight' is torch.float64 in the model and torch.float32 in the file"),
        (lambda m: m.to("meta"), "'0.weight' lies on the meta device"),
        (
            _untied,
            "'0.weight' is one tied tensor in the model and two in the file, '0.weight' and '2.weight'",
        ),
        (_inference, "'0.weight' cannot be written"),
    ],
)
@pytest.mark.parametrize("life", ["full", "compressed"])
def test_a_wrong_model_is_named_and_left_alone(
    tmp_path: Path, change: Callable[[Any], nn.Module], sentence: str, life: Any
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    dt.save(run, tmp_path / "f")
    other = change(scrambled(model))
    meta = any(p.is_meta for p in other.parameters())
    before = {} if meta else snapshot(other)
    with pytest.raises(ValueError, match=sentence) as caught:
        dt.load(tmp_path / "f", other, life)
    assert not isinstance(caught.value, dt.FormatError)
    assert meta or snapshot(other) == before


def test_an_untied_model_takes_a_tied_file(tmp_path: Path) -> None:
    tied: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    run = dt.compress(tied, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
    dt.save(run, tmp_path / "f", "compressed")
    assert pack.read_header(tmp_path / "f").plan[0]["note"] == "tied: 1.weight"
    free: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    dt.load(tmp_path / "f", free, "compressed")
    with run.compressed():
        assert torch.equal(free[0].weight, tied[0].weight)
        assert torch.equal(free[1].weight, tied[0].weight)


WRONG: Any = "neither"
WRONG_NOTES: Any = {1: "a"}


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda run, path: dt.load(path, run.model), "holds only the compressed life; ask for life='compressed'"),
        (lambda run, path: dt.load(path, run.model, WRONG), "load.life='neither'.: must be"),
        (lambda run, path: dt.load(path, run, "compressed"), "must be a torch.nn.Module, not Run"),
        (lambda run, path: dt.save(run, path, WRONG), "save.life='neither'.: must be"),
        (lambda run, path: dt.save(run, path, coding=WRONG), "save.coding='neither'.: must be one of 'entropy', "),
        (lambda run, path: dt.unpack(path, path.with_name("out"), "full"), "holds only the compressed life"),
        (lambda run, path: dt.save(run, path, bits=2, recipe=PRUNED), "not both"),
        (lambda run, path: dt.save(run, path, notes={"a": torch.ones(1)}), "not plain JSON data"),
        (lambda run, path: dt.save(run, path, notes={"a": float("nan")}), "not plain JSON data"),
        (lambda run, path: dt.save(run, path, notes={"a": (1, 2)}), "must be plain JSON data"),
        (lambda run, path: dt.save(run, path, notes=WRONG_NOTES), "must be plain JSON data"),
        (lambda run, path: dt.save(run, path, notes={"a": "\ud800"}), "not plain JSON data"),
    ],
)
def test_wrong_arguments_are_refused_in_words(
    tmp_path: Path, act: Callable[[dt.Run, Path], Any], sentence: str
) -> None:
    run = mixed_run(recalibrate=False)
    dt.save(run, tmp_path / "f", "compressed")
    before = (tmp_path / "f").read_bytes()
    with pytest.raises(ValueError, match=sentence) as caught:
        act(run, tmp_path / "f")
    assert not isinstance(caught.value, dt.FormatError)
    assert (tmp_path / "f").read_bytes() == before


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"anything": 1}


def _with_buffer(value: Tensor) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Linear(3, 3)
        model.register_buffer("odd", value)
        return model

    return build


def _clash() -> nn.Module:
    model = nn.Linear(3, 3)
    model.module = nn.Linear(3, 3)
    return model


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: Extra(3, 3),
            "'_extra_state' is extra state of the state dict and no tensor, which a file cannot hold",
        ),
        (_with_buffer(torch.ones(2, dtype=torch.complex128)), "'odd' is torch.complex128, which a file cannot hold"),
        (_with_buffer(torch.eye(2).to_sparse()), "'odd' is not a dense tensor"),
        (_with_buffer(torch.ones(2, device="meta")), "'odd' lies on the meta device"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d()), "is not initialised yet"),
        (_clash, "two tensors of the model are both called 'weight'"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_in_words(
    tmp_path: Path, build: Callable[[], nn.Module], sentence: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about lazy modules
        model = build()
    good = nn.Linear(3, 3)
    run = dt.compress(good, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
    run.model = model
    for form in FORMS:
        with pytest.raises(ValueError, match=sentence):
            dt.save(run, tmp_path / form)
        assert os.listdir(tmp_path) == []


def test_saving_inside_the_compressed_life_is_refused(tmp_path: Path) -> None:
    run = small_run()
    with run.compressed(), pytest.raises(RuntimeError, match="leave the compressed life first"):
        dt.save(run, tmp_path / "f")
    assert os.listdir(tmp_path) == []


# --- saving, when things go wrong ---------------------------------------------------------------------------------


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    run = small_run()
    (tmp_path / "file").write_bytes(b"kept")
    for path, kind in (
        (tmp_path / "none" / "f", FileNotFoundError),
        (tmp_path, IsADirectoryError),
        (tmp_path / "file" / "f", OSError),
        (Path("/proc/model.detent"), OSError),
        (tmp_path / ("x" * 300), OSError),
    ):
        with pytest.raises(kind, match="cannot save to " + re.escape(str(path))):
            dt.save(run, path)
    assert os.listdir(tmp_path) == ["file"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        dt.save(run, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("runs as root, whom no folder is read-only for; /proc stands in for it in the test above")
    (tmp_path / "f").write_bytes(b"kept")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="cannot save to"):
            dt.save(small_run(), tmp_path / "f")
        assert (tmp_path / "f").read_bytes() == b"kept"
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr
)
def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    run = small_run()
    dt.save(run, tmp_path / "f")
    before = (tmp_path / "f").read_bytes()

    def fail(*args: Any) -> None:
        assert len(leftovers(tmp_path)) == 1
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)) as caught:
            dt.save(run, tmp_path / "f", "compressed")
    if isinstance(error, OSError):
        assert f"cannot save to {tmp_path / 'f'}: No space left" in str(caught.value)
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == before


_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import detent as dt

folder = Path(sys.argv[1])
path = folder / "model.detent"
runs, wanted = [], []
for seed in (1, 2):
    torch.manual_seed(seed)
    model = torch.nn.Linear(300, 200)
    runs.append(dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])))
    wanted.append(model.weight.detach().clone())
dt.save(runs[0], path)
dice, alive, trials = random.Random(3), set(), 10

def child(trial):
    if trial == 0:      # killed when all is written and nothing is swapped
        os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    if trial == 1:      # killed when half is written
        os.fsync = lambda fd: (os.ftruncate(fd, 1000), os.kill(os.getpid(), signal.SIGKILL))
    while True:
        for run in runs:
            dt.save(run, path)

for trial in range(trials):
    pid = os.fork()
    if not pid:
        child(trial)
    if trial > 1:
        time.sleep(dice.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    if trial < 2:
        assert sum(name.endswith(".tmp") for name in os.listdir(folder)) >= 1
    twin = torch.nn.Linear(300, 200)
    dt.load(path, twin)
    which = [torch.equal(twin.weight, w) for w in wanted]
    assert any(which), trial
    alive.add(which.index(True))
assert 0 in alive, alive
dt.save(runs[1], path)
# One that was killed between making its file and locking it leaves an empty one, which is let be.
left = {name: os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)}
assert left.pop("model.detent") and not any(left.values()), left
sys.stdout.write("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_killed_save_leaves_a_whole_file_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert (done.returncode, done.stdout) == (0, "done"), done.stderr


def test_only_abandoned_temporary_files_of_this_file_are_removed(tmp_path: Path) -> None:
    run = small_run()
    strange = [".f.tmp", ".f.0123456789ab.tmp.bak", ".other.0123456789ab.tmp", "f.0123456789ab.tmp"]
    for name in (*strange, ".f.0123456789ab.tmp", ".f.ba9876543210.tmp"):
        (tmp_path / name).write_bytes(b"half a file")
    for name in (".f.000000000000.tmp", ".f.111111111111.tmp"):
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / ".f.111111111111.tmp", (0, 0))  # made long ago, and still empty
    strange.append(".f.000000000000.tmp")  # another process may be about to lock it
    with open(tmp_path / ".f.ba9876543210.tmp", "rb") as held:
        assert atomic.lock(held.fileno())  # another process is at it
        dt.save(run, tmp_path / "f")
    assert sorted(os.listdir(tmp_path)) == sorted([*strange, ".f.ba9876543210.tmp", "f"])


def test_many_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    runs = [small_run() for _ in range(4)]  # one a thread: a run is one thread's
    failures: list[BaseException] = []

    def work(run: dt.Run) -> None:
        try:
            for _ in range(5):
                dt.save(run, tmp_path / "f")
                pack.read_header(tmp_path / "f")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(tmp_path) == ["f"]


def test_links_modes_and_odd_names(tmp_path: Path) -> None:
    run = small_run()
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real" / "f", tmp_path / "link")
    mask = os.umask(0o027)
    try:
        dt.save(run, tmp_path / "link")
    finally:
        os.umask(mask)
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "real" / "f").stat().st_mode) == 0o640
    for name in ("naïve name\n.detent", "x" * 238, "é" * 127):  # the longest that a folder takes: 255 bytes
        odd = tmp_path / name
        assert dt.save(run, str(odd)) == odd.stat().st_size
        pack.read_header(str(odd))


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o640])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, path = small_run(), tmp_path / "f"
    path.write_bytes(b"an older one")
    path.chmod(mode)
    seen, lock = [], atomic.lock

    def look(descriptor: int) -> bool:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return lock(descriptor)

    monkeypatch.setattr(atomic, "lock", look)
    dt.save(run, path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert seen[-1] == mode, "the new file is never open to more than the old one"


@pytest.mark.parametrize("name", ["open", "fdopen", "fchmod", "ftruncate", "fsync", "replace"])
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_leaves_no_temporary_file(
    tmp_path: Path, name: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C just before and just after each call that touches the file system."""
    run, path = small_run(), tmp_path / "f"
    path.write_bytes(b"an older one")
    act, made = getattr(os, name), []

    def interrupted(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(os, name, act)
        made.extend([act(*given, **more)] if late else [])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        dt.save(run, path)
    assert os.listdir(tmp_path) == ["f"]
    assert (path.read_bytes() == b"an older one") == (not (late and name == "replace"))
    for left in made:
        if name == "fdopen":
            left.close()
        elif name == "open":
            os.close(left)


@pytest.mark.parametrize("form", FORMS)
def test_a_path_is_opened_once(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced just after it was opened, a good file is read as what it was."""
    path, later, run = tmp_path / form, tmp_path / f"later-{form}", small_run()
    dt.save(run, path)
    dt.save(small_run(), later)
    opened, act = [], os.open

    def swapped(where: Any, *given: Any, **more: Any) -> int:
        found = act(where, *given, **more)
        if Path(os.fspath(where)) == path:
            opened.append(where)
            os.replace(later, path)
        return found

    monkeypatch.setattr(os, "open", swapped)
    twin = scrambled(run.model)
    dt.load(path, twin)
    assert len(opened) == 1
    assert snapshot(twin) == snapshot(run.model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h | {"a": h["a"] | {"data_offsets": [1, 9]}}, "gap or an overlap at byte 0"),
        (lambda h: h | {"a": h["a"] | {"data_offsets": [0, 9]}}, "'a' does not have the bytes of its dtype and shape"),
        (lambda h: h | {"a": h["a"] | {"data_offsets": [0]}}, "does not lie from one place to another"),
        (lambda h: h | {"a": h["a"] | {"dtype": "F3"}}, "of no known dtype"),
        (lambda h: h | {"a": h["a"] | {"shape": [-1]}}, "not of whole numbers"),
        (lambda h: h | {"a": h["a"] | {"more": 1}}, "does not have dtype, shape and data_offsets"),
        (lambda h: h | {"b": h["a"]}, "gap or an overlap at byte 8"),
        (lambda h: {"__metadata__": h["__metadata__"]}, "entries of 0 bytes in a file that holds 8"),
        (lambda h: h | {"__metadata__": {"detent": 1}}, "the metadata are not text"),
        (lambda h: [h], "neither a Detent nor a safetensors file"),
    ],
)
def test_a_safetensors_header_is_read_with_care(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    """We read it ourselves, as the library opens paths by itself; what that refuses is refused here too."""
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "f", metadata={"detent": "2"})
    raw = (tmp_path / "f").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(dt.FormatError, match=words):
        pack.read_header(tmp_path / "f")
    if "more" not in text.decode():  # that library passes over keys that it does not know
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load_file(tmp_path / "f")


def test_a_tensor_cannot_have_the_name_that_safetensors_keeps(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(2)))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
    dt.save(run, tmp_path / "f.detent")
    twin = scrambled(model)
    dt.load(tmp_path / "f.detent", twin)
    assert snapshot(twin) == snapshot(model)
    for act in (
        lambda: dt.save(run, tmp_path / "f.safetensors"),
        lambda: dt.unpack(tmp_path / "f.detent", tmp_path / "f.safetensors"),
    ):
        with pytest.raises(ValueError, match="called '__metadata__', which a safetensors file keeps for itself"):
            act()
    assert os.listdir(tmp_path) == ["f.detent"]


def test_distinct_tensors_may_share_memory(tmp_path: Path) -> None:
    memory = torch.randn(24)
    model = nn.Module()
    model.a, model.b = nn.Parameter(memory[:12].view(3, 4)), nn.Parameter(memory[12:].view(3, 4))
    model.register_buffer("c", memory[6:18])
    run = dt.compress(model, dt.Recipe([dt.Rule(match="a", target=dt.Uniform(bits=2))]))
    dt.save(run, tmp_path / "f")
    twin = nn.Module()
    twin.a, twin.b = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))
    twin.register_buffer("c", torch.zeros(12))
    dt.load(tmp_path / "f", twin)
    assert snapshot(twin) == snapshot(model)


# --- several processes --------------------------------------------------------------------------------------------

_SHARDED = """
import os, sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
import detent as dt

folder = Path(sys.argv[1])
rank = int(os.fork() == 0)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def build(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))

recipe = dt.Recipe([
    dt.Rule(match="0.weight", target=dt.Uniform(bits=4, granularity="channel")),
    dt.Rule(match="2.weight", target=dt.TopK(keep=0.5)),
])
plain = dt.compress(build(1), recipe)
sharded = dt.compress(fully_shard(build(1), mesh=init_device_mesh("cpu", (2,))), recipe)
size = dt.save(sharded, folder / "sharded", "both")
if rank == 0:
    assert size == (folder / "sharded").stat().st_size
    dt.save(plain, folder / "plain")
dist.barrier()
assert dt.pack.read_header(folder / "sharded") == dt.pack.read_header(folder / "plain")
for life in ("full", "compressed"):
    for file in ("sharded", "plain"):
        one = build(2)
        two = fully_shard(build(3), mesh=init_device_mesh("cpu", (2,)))
        dt.load(folder / file, one, life)
        dt.load(folder / file, two, life)
        for (name, a), b in zip(one.named_parameters(), two.parameters()):
            assert torch.equal(a, b.full_tensor()), name
try:
    dt.save(sharded, "/proc/model.detent")
    raise SystemExit("saved to /proc")
except OSError as error:
    assert "cannot save" in str(error)
dist.destroy_process_group()
if rank:
    os._exit(0)
assert os.wait()[1] == 0
sys.stdout.write("done")
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its second process")
def test_a_sharded_run_is_gathered_and_written_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", _SHARDED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert (done.returncode, done.stdout) == (0, "done"), done.stderr


def test_what_load_gives_shows_itself_in_a_line(tmp_path: Path) -> None:
    """Every number of it, worked out again; nothing grows with the model."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(60)))
    rules = [dt.Rule(match=f"^{i}.weight", target=dt.Uniform(bits=2 + i)) for i in range(5)]
    recipe = dt.Recipe([*rules, dt.Rule(match="weight$", target=dt.Binary())])
    dt.save(dt.compress(model, recipe), tmp_path / "m.detent")
    header = dt.load(tmp_path / "m.detent", copy.deepcopy(model))
    text = repr(header)
    assert len(text) < 400 and "\n" not in text and str(header) == text
    size = sum(row["bytes"] for row in header.tensors.values())
    for words in (dt.__version__, "lives: both", "120 tensors", f"{size:,} bytes", "3,840 of 4,320 parameters",
                  "1 x Uniform(bits=2)", "3 more targets"):  # fmt: skip
        assert words in text, (words, text)
