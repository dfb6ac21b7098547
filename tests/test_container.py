"""The container: what it adds to its streams, tensor by tensor in and out, memory, shorter floats, inspection."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections import Counter
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
from test_files import FORMS, RECIPE, leftovers, mixed_run, scrambled, shortest, small_run, snapshot
from torch import Tensor, nn

import detent as dt
from detent import pack
from detent.pack.container import narrowest
from detent.pack.header import DTYPES
from papers.models import LeNet5, resnet32

ROOT = Path(__file__).resolve().parent.parent


# --- what a file adds to its streams ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [LeNet5, resnet32])
@pytest.mark.parametrize("life", ["both", "compressed"])
def test_overhead_is_at_most_32_bytes_a_tensor_and_128_a_file(tmp_path: Path, build: Any, life: Any) -> None:
    model = scrambled(build())
    run = dt.compress(model, dt.Recipe.preset("psg-w2"))
    size = dt.save(run, tmp_path / "f", life, coding="bitpacked")
    encoded = run.encoded()
    streams = sum(item.form.nbytes for item in encoded.values())
    state = model.state_dict()
    if life == "compressed":
        streams += sum(shortest(value) for name, value in state.items() if name not in encoded)
    else:
        streams += sum(value.nbytes if name in encoded else shortest(value) for name, value in state.items())
    names = pack.Reader(tmp_path / "f").names
    assert names == list(state)
    assert size - streams <= 32 * len(names) + 128, "what the format promises"
    assert size - streams <= 10 * len(names) + 128, "what it does"
    assert pack.sizes(tmp_path / "f")["header"] == size - streams
    smaller = dt.save(run, tmp_path / "f", life)
    assert smaller <= size
    assert pack.sizes(tmp_path / "f")["header"] <= 11 * len(names) + 128


def test_a_run_of_2_kilobytes_is_mostly_streams(tmp_path: Path) -> None:
    model = scrambled(LeNet5())
    with torch.no_grad():
        for weight in (model.get_parameter(f"{name}.weight") for name in ("conv2", "fc1", "fc2")):
            weight.mul_(torch.rand_like(weight) < 0.005)
    target = dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=dt.Uniform(bits=3))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=target)]))
    size = dt.save(run, tmp_path / "f", "compressed")
    assert pack.sizes(tmp_path / "f")["header"] < 220 < size / 5


# --- tensor by tensor ---------------------------------------------------------------------------------------------


def encoded(weight: Tensor, target: dt.Target | None = None) -> dt.Encoded:
    target = target or dt.Uniform(bits=3)
    params = target.fit(weight)
    return dt.Encoded(target=target, form=target.form(weight, params))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("coding", [None, *pack.CODINGS])
def test_a_state_dict_goes_in_and_out_tensor_by_tensor(tmp_path: Path, form: str, coding: Any) -> None:
    torch.manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(8, 16) for i in range(5)}
    items = {name: encoded(weight) for name, weight in weights.items()}
    mean, other = torch.randn(4), torch.randn(4)
    with pack.Writer(tmp_path / form, coding=coding, batchnorm="re-estimated", notes={"a": 1}) as writer:
        for name, weight in weights.items():
            writer.add(name, weight, encoded=items[name], mechanism="PSG()")
        writer.add("bn.running_mean", mean, second=other, reason="buffer")
        writer.add("bias", torch.ones(3), reason="I said so")
        writer.alias("head.weight", "layers.0.weight")
        assert not (tmp_path / form).exists()
    assert writer.size == (tmp_path / form).stat().st_size
    with pack.Reader(tmp_path / form) as reader:
        assert reader.names == [*weights, "bn.running_mean", "bias"]
        assert reader.aliases == {"head.weight": "layers.0.weight"}
        assert reader.header.card["full_precision"] == {"I said so": ["bias"]}
        assert reader.coded == list(weights)
        assert all(reader.encoded(name).target == dt.Uniform(bits=3) for name in weights)
        for name in ("layers.3.weight", "layers.0.weight", "layers.3.weight"):
            assert torch.equal(reader.tensor(name, "full"), weights[name])
            assert torch.equal(reader.tensor(name), items[name].decode())
            again = reader.encoded(name)
            assert torch.equal(again.decode(), items[name].decode())
            assert torch.equal(again.form.named["scale"], items[name].form.named["scale"])
        assert torch.equal(reader.tensor("head.weight", "full"), weights["layers.0.weight"])
        assert torch.equal(reader.tensor("bn.running_mean", "full"), mean)
        assert torch.equal(reader.tensor("bn.running_mean"), other)
        for name, sentence in (("nobody", "holds no tensor 'nobody'"), ("bias", "as it is, not as codes")):
            with pytest.raises(ValueError, match=sentence):
                reader.encoded(name)
        value = reader.tensor("bias")
    assert value.add_(1.0).tolist() == [2.0, 2.0, 2.0], "memory of its own, also when the file is closed"


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("w", {"value": torch.ones(2)}, "stands twice"),
        ("alias", {"value": torch.ones(2)}, "stands twice"),
        ("", {"value": torch.ones(2)}, "is empty"),
        (".x", {"value": torch.ones(2)}, "starts with a dot"),
        ("a\nb", {"value": torch.ones(2)}, "line break"),
        ("x", {"value": None}, "neither values nor codes"),
        ("x", {"value": None, "encoded": encoded(torch.ones(2))}, "neither values nor codes"),
        ("x", {"value": torch.ones(2, dtype=torch.complex128)}, "is torch.complex128"),
        ("x", {"value": torch.ones(2), "second": torch.ones(2, device="meta")}, "meta device"),
        ("x", {"value": torch.ones(2), "second": torch.ones(3)}, "another shape or dtype in its other life"),
        ("x", {"value": torch.ones(2), "encoded": encoded(torch.ones(2).half())}, "another shape or dtype"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_added_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, arguments: dict[str, Any], sentence: str, form: str
) -> None:
    (tmp_path / form).write_bytes(b"what was there")
    with pytest.raises(ValueError, match=sentence), pack.Writer(tmp_path / form) as writer:
        writer.add("w", torch.ones(3))
        writer.alias("alias", "w")
        writer.add(name, **arguments)
    assert (tmp_path / form).read_bytes() == b"what was there"
    assert os.listdir(tmp_path) == [form]


def test_an_error_of_ones_own_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"what was there")
    with pytest.raises(ZeroDivisionError), pack.Writer(tmp_path / "f") as writer:
        writer.add("w", torch.ones(3))
        raise ZeroDivisionError
    assert (tmp_path / "f").read_bytes() == b"what was there"
    assert not leftovers(tmp_path)


def test_a_damaged_tensor_does_not_keep_the_others_from_being_read(tmp_path: Path) -> None:
    with pack.Writer(tmp_path / "f", "compressed", coding="bitpacked") as writer:
        for i in range(3):
            writer.add(f"w{i}", torch.full((100,), 0.1 + i))
    data = bytearray((tmp_path / "f").read_bytes())
    data[8 + 401 + 200] ^= 1
    (tmp_path / "f").write_bytes(data)
    with pack.Reader(tmp_path / "f") as reader:
        assert reader.tensor("w0").unique().tolist() == torch.tensor([0.1]).tolist()
        assert reader.tensor("w2").unique().tolist() == torch.tensor([2.1]).tolist()
        with pytest.raises(dt.FormatError, match="'w1' is damaged"):
            reader.tensor("w1")
    with pytest.raises(dt.FormatError, match="'w1' is damaged"):
        dt.unpack(tmp_path / "f", tmp_path / "out", "compressed")
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("form", FORMS)
def test_unpack_gives_either_life_to_every_other_tool(tmp_path: Path, form: str) -> None:
    run = mixed_run()
    lives = {"full": snapshot(run.model)}
    with run.compressed():
        lives["compressed"] = snapshot(run.model)
    dt.save(run, tmp_path / form)
    for life, wanted in lives.items():
        out = tmp_path / f"{life}.safetensors"
        assert dt.unpack(tmp_path / form, out, life) == out.stat().st_size  # type: ignore[arg-type]
        twin = scrambled(run.model)
        twin.load_state_dict(safetensors.torch.load_file(out))  # strict: further names of tied tensors are there too
        assert snapshot(twin) == wanted


_MEMORY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import detent as dt
from detent import pack
from detent.report.record import process_peak as peak

what, path = sys.argv[1], Path(sys.argv[2])
target, each, count = dt.Uniform(bits=4, range="minmax"), 1 << 20, 24
def weights():
    for i in range(count):
        yield f"layers.{i}.weight", torch.randn(1024, each // 1024, generator=torch.Generator().manual_seed(i))
def encode(w):
    params = target.fit(w)
    return dt.Encoded(target=target, form=target.form(w, params))
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(each // 1024, 1024, bias=False) for _ in range(count))
# Once with a small one, so that what is loaded lazily is there.
with pack.Writer(path.with_name("small"), "both") as writer:
    w = torch.randn(1024, 64)
    writer.add("w", w, encoded=encode(w))
small = torch.nn.Module()
small.w = torch.nn.Parameter(w)
dt.load(path.with_name("small"), small, "compressed")
dt.unpack(path.with_name("small"), path.with_name("small.safetensors"), "compressed")
model = Model() if "load" in what else None
if what == "write":
    before = peak()
    with pack.Writer(path, "both", coding=sys.argv[3]) as writer:
        for name, w in weights():
            writer.add(name, w, encoded=encode(w))
else:
    before = peak()
    if what == "unpack":
        dt.unpack(path, path.with_name("out.safetensors"), "compressed")
    else:
        dt.load(path, model, what.split()[1])
sys.stdout.write(str((peak() - before) / (4 * each)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("coding", ["bitpacked"])
def test_memory_is_that_of_a_tensor_or_of_what_is_loaded(tmp_path: Path, coding: str) -> None:
    """In tensors of 4 MB, of which the file has 24."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}

    def grown(what: str) -> float:
        command = [sys.executable, "-c", _MEMORY, what, str(tmp_path / "f"), coding]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert grown("write") < 12, "a few copies of one tensor, of which the fit takes four"
    assert grown("load full") < 1.5 * 24
    assert grown("load compressed") < 1.5 * 24
    assert grown("unpack") < 8, "a form and its dense weights, one tensor at a time"


# --- shorter floats -----------------------------------------------------------------------------------------------

_PATTERNS = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64), torch.int64: (torch.int64, 64)}
_ODD = [0.0, -0.0, math.nan, math.inf, -math.inf, 65504.0, 65520.0, 2.0**-24, 2.0**-25, 1 / 3, 2.0**-140, 3e38]


@given(
    st.sampled_from(list(_PATTERNS)),
    st.lists(st.sampled_from(_ODD) | st.integers(-300, 300).map(float), max_size=5),
)
def test_the_shorter_dtype_holds_every_bit(dtype: torch.dtype, values: list[float]) -> None:
    if dtype == torch.int64:
        values = [float(int(v)) if math.isfinite(v) and abs(v) < 1e15 else 0.0 for v in values]
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    kind = DTYPES[narrowest(tensor)]
    assert kind.is_floating_point == dtype.is_floating_point
    back = tensor.to(kind).to(dtype)
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
    assert kind.itemsize * tensor.numel() == shortest(tensor) or dtype == torch.float64


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(_ODD) | st.floats(width=32), min_size=1, max_size=40))
def test_numbers_that_stay_come_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.getbasetemp() / "raw.detent"
    tensor = torch.tensor(values, dtype=torch.float64).float()
    for coding, life in itertools.product(pack.CODINGS, ("both", "compressed")):
        with pack.Writer(path, life, coding=coding) as writer:
            writer.add("x", tensor)
        with pack.Reader(path) as reader:
            assert torch.equal(reader.tensor("x").view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_round_gives_the_nearest_of_all_numbers_of_the_format(dtype: Any) -> None:
    """By brute force over all 65,536 patterns; float64 weights just beside a middle are the ones that are missed."""
    store = getattr(torch, dtype)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(store).double()
    every = every[torch.isfinite(every)].unique()
    middles = (every[1:] + every[:-1]) / 2
    torch.manual_seed(1)
    middles = middles[torch.randint(len(middles), (500,))]
    up, down = torch.full_like(middles, math.inf), torch.full_like(middles, -math.inf)
    for w in (middles, middles.nextafter(up), middles.nextafter(down), torch.randn(500).double(), middles.float()):
        target = dt.Round(dtype=dtype)
        q = target.project(w, target.fit(w))
        place = torch.searchsorted(every, w.double()).clamp(1, len(every) - 1)
        low, high = every[place - 1], every[place]
        nearest = torch.minimum((w.double() - low).abs(), (high - w.double()).abs())
        assert torch.equal((q.double() - w.double()).abs(), nearest)
        assert bool((torch.isin(q.double(), every)).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_biases_and_norms_in_16_bits_are_part_of_the_compressed_life(tmp_path: Path, dtype: Any) -> None:
    model: Any = scrambled(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    rules = [
        dt.Rule(match="0.weight", target=dt.Uniform(bits=4, param_dtype=dtype)),
        dt.Rule(match="0.bias", include="bias", target=dt.Uniform(bits=8)),
        dt.Rule(match="^1", include="^1", target=dt.Round(dtype=dtype)),
    ]
    run = dt.compress(model, dt.Recipe(rules))
    own = snapshot(model)
    run.round_statistics(dtype)
    assert snapshot(model) == own, "the full life keeps its own"
    with run.compressed():
        wanted = snapshot(model)
        mean = model[1].running_mean.clone()
    assert torch.equal(mean, model[1].running_mean.to(getattr(torch, dtype)).float())
    assert not torch.equal(mean, model[1].running_mean)
    dt.save(run, tmp_path / "f", "compressed", coding="bitpacked")
    twin = scrambled(model)
    header = dt.load(tmp_path / "f", twin, "compressed")
    assert snapshot(twin) == wanted
    assert header.card["batchnorm"] == f"own, rounded to {dtype}"
    assert [row["target"] for row in header.card["compressed"]] == [
        f"Uniform(bits=4, param_dtype={dtype!r})",
        "Uniform(bits=8)",
        "Round()" if dtype == "float16" else f"Round(dtype={dtype!r})",
    ]
    sizes = {name: tensor["bytes"] for name, tensor in header.tensors.items()}
    assert sizes == {
        "0.weight": 1 + 2 + 15,
        "0.bias": 1 + 4 + 5,
        **{f"1.{name}": 1 + 10 for name in ("weight", "bias", "running_mean", "running_var")},
        "1.num_batches_tracked": 1 + 1,
    }


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_statistics_in_8_bits(tmp_path: Path, dtype: str) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    model[1].running_mean.copy_(torch.tensor([0.1, -0.33, 7.7, 100.0, 0.0]))
    model[1].running_var.copy_(torch.tensor([0.1, 0.33, 7.7, 100.0, 0.004]))
    model[1].num_batches_tracked.fill_(100_000)  # no statistic: it stays as it is
    run = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=4))]))
    run.round_statistics(dtype)
    dt.save(run, tmp_path / "f", "compressed", coding="bitpacked")
    twin: Any = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    header = dt.load(tmp_path / "f", twin, "compressed")
    assert header.card["batchnorm"] == f"own, rounded to {dtype}"
    for name in ("running_mean", "running_var"):
        own, short = getattr(model[1], name), getattr(twin[1], name)
        assert header.tensors[f"1.{name}"]["bytes"] == 1 + 5
        assert torch.equal(short, own.to(getattr(torch, dtype)).float()) and not torch.equal(short, own)
        torch.testing.assert_close(short, own, rtol=1 / 16 if dtype == "float8_e4m3fn" else 1 / 8, atol=0)
    # Rounded again, they are what they would have been at once.
    again = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=4))]))
    again.round_statistics("float8_e5m2")
    again.round_statistics(dtype)
    twice, once = again.statistics(), run.statistics()
    assert twice is not None and once is not None
    assert all(torch.equal(twice[name], value) for name, value in once.items())
    # What 8 bits would destroy is refused, not clamped: the last digits of a small variance first.
    if dtype == "float8_e4m3fn":
        model[1].running_var[0] = 0.0011
        with pytest.raises(ValueError, match=r"running_var.*too small"):
            dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=4))])).round_statistics(
                dtype
            )
    model[1].running_var[0] = 1e-9
    run = dt.compress(model, run.plan.recipe)
    with pytest.raises(ValueError, match="'1.running_var' holds a variance of 1e-09, which is too small"):
        run.round_statistics(dtype)
    model[1].running_mean[0] = 1e5
    with pytest.raises(ValueError, match="'1.running_mean' holds 1e\\+05, and the largest number"):
        run.round_statistics(dtype)


def test_statistics_that_were_estimated_anew_can_be_rounded_too(tmp_path: Path) -> None:
    run = small_run()
    run.round_statistics("bfloat16")
    dt.save(run, tmp_path / "f")
    assert pack.read_header(tmp_path / "f").card["batchnorm"] == "re-estimated, rounded to bfloat16"
    with pytest.raises(ValueError, match="rounded already; recalibrate first"):
        run.round_statistics("float16")  # the file could not say that they went through both
    with pytest.raises(ValueError, match="must be"):
        run.round_statistics("float64")
    plain = dt.compress(nn.Linear(3, 3), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
    with pytest.raises(ValueError, match="no BatchNorm"):
        plain.round_statistics("float16")


def test_every_scale_and_codebook_can_be_16_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 4, 3, 3)
    short = 0
    for name, target in TARGETS.items():
        if not hasattr(target, "param_dtype"):
            continue
        for dtype in ("float16", "bfloat16"):
            fields = dict(vars(target))
            if "survivors" in fields:
                continue  # a target of its own, in this table too
            shape = (8, 36) if isinstance(target, dt.VectorCodebook) else w.shape
            other = type(target)(**{**fields, "param_dtype": dtype})
            form = other.form(w.reshape(shape), other.fit(w.reshape(shape)))
            assert {part.kind for part in form.parts if part.role == "numbers"} <= {getattr(torch, dtype)}, name
            short += 1
    assert short > 20
    kernels = dt.KernelCodebook(size=4, codebook_bits=8)
    widths = {part.name: part.width for part in kernels.form(w, kernels.fit(w)).parts}
    assert widths == {"scale": 32, "codes": 2, "book": 8}


# --- inspection ---------------------------------------------------------------------------------------------------


def entropy(symbols: list[Any]) -> float:
    counts = Counter(symbols)
    return sum(n * math.log2(len(symbols) / n) for n in counts.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("coding", pack.CODINGS)
def test_inspection_against_slow_counting(tmp_path: Path, form: str, coding: Any) -> None:
    run = mixed_run()
    model: Any = run.model
    dt.save(run, tmp_path / form, coding=coding)
    found = pack.inspect(tmp_path / form)
    rows = {row["name"]: row for row in found.rows}
    full = {name: value.clone() for name, value in model.state_dict().items()}
    assert rows.keys() == {name for name in full if not name.startswith(("shared_bn", "head."))}
    measured = {row["name"]: row for row in run.measure()}
    codes = run.encoded()
    with run.compressed():
        state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, row in rows.items():
        q = state[name]
        assert (row["shape"], row["weights"], row["kept"]) == (q.shape, q.numel(), int((q != 0).sum()))
        if name not in codes:
            assert (row["coded"], row["error"], row["index_bytes"]) == (False, None, 0)
            assert row["nominal_bits"] == 8 * q.nbytes
            continue
        own = codes[name].form
        runs = [(part, v) for part, v in zip(own.parts, own.values, strict=True) if part.role != "numbers"]
        assert row["nominal_bits"] == sum(values.numel() * part.width for part, values in runs)
        assert row["entropy_bits"] == pytest.approx(
            sum(32 * len(v) if v.is_floating_point() else entropy(v.tolist()) for _, v in runs)
        )
        assert row["error"] == pytest.approx(measured[name]["error"])
        assert row["wasserstein"] == pytest.approx(measured[name]["wasserstein"])
        assert row["bits_per_weight"] == 8 * row["bytes"] / q.numel()
    if coding != "entropy":
        assert rows["embed.weight"]["index_bytes"] == (3 if coding == "bitpacked" else 24)
        assert (
            rows["embed.weight"]["index_share"] == rows["embed.weight"]["index_bytes"] / rows["embed.weight"]["bytes"]
        )
    assert sum(row["index_bytes"] > 0 for row in rows.values()) == 1
    total = found.total
    assert total["file"] == (tmp_path / form).stat().st_size
    for part, wanted in (("all", None), ("coded", True), ("raw", False)):
        mine = [row for row in rows.values() if wanted in (None, row["coded"])]
        assert total[part]["bytes"] == sum(row["bytes"] for row in mine)
        assert total[part]["weights"] == sum(row["weights"] for row in mine)
    # "up" is a convolution too, 2x2.
    conv = [rows["conv.weight"], rows["up.weight"]]
    assert total["bits_per_conv_weight"] == sum(8 * r["bytes"] for r in conv) / sum(r["weights"] for r in conv)
    w = torch.cat([full[name].double().flatten() for name in codes])
    q = torch.cat([state[name].double().flatten() for name in codes])
    assert total["error"] == pytest.approx(float((w - q).square().sum() / w.square().sum()))
    dt.save(run, tmp_path / form, "compressed", coding=coding)
    alone = pack.inspect(tmp_path / form)
    assert {row["error"] for row in alone.rows} == {None}
    assert (alone.total["error"], alone.total["full"]) == (None, 0)
    sizes = pack.sizes(tmp_path / form)
    taken = sum(row["bytes"] for row in alone.rows)
    assert alone.total["file"] == alone.total["header"] + taken == sizes["file"]


def test_inspection_of_what_tensors_share(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3))
    rules = [dt.Rule(match="@kernels", target=dt.KernelCodebook(size=6, book="global"))]
    dt.save(dt.compress(model, dt.Recipe(rules)), tmp_path / "f", "compressed", coding="bitpacked")
    found = pack.inspect(tmp_path / "f")
    book = found.rows[0]
    assert (book["name"], book["weights"], book["bytes"]) == ("shared by 2 tensors", 0, 1 + 4 + -(-6 * 9 * 6 // 8))
    kernels = [row for row in found.rows if row["name"] in ("0.weight", "1.weight")]
    assert found.total["bits_per_conv_weight"] == 8 * (book["bytes"] + sum(r["bytes"] for r in kernels)) / (96 * 9)


def test_bits_and_index_of_a_recipe_of_everything(tmp_path: Path) -> None:
    dt.save(dt.compress(mixed_run().model, RECIPE), tmp_path / "f", "compressed")
    rows = pack.inspect(tmp_path / "f").rows
    head, _, _ = stranger.split((tmp_path / "f").read_bytes())
    lengths = dict(zip((b["name"] for b in stranger.order(head)), head["lengths"], strict=True))
    assert all(row["bytes"] == lengths[row["name"]] for row in rows if lengths[row["name"]])
    assert np.isfinite([row["entropy_bits"] for row in rows]).all()
