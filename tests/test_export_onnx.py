"""ONNX: weights stay codes, dequantize to the projection bitwise, and a runtime gets PyTorch's numbers."""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import pytest
import torch
from cases import TARGETS
from torch import Tensor, nn

import detent as dt
from detent.export import Activations, Exported, OnnxReport, latency, to_onnx
from detent.export.forms import form_of, index_parts, is_plain
from detent.export.latency import alternating
from detent.export.onnx import kernels_of, session
from detent.targets.forms import Floats, Form, Grid, Levels

# Older ones cannot read INT2, which half of the tests are about.
ort = pytest.importorskip("onnxruntime", minversion="1.31")

PACKED: dict[int, int] = {
    onnx.TensorProto.INT2: 2,
    onnx.TensorProto.UINT2: 2,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
}
LAYOUTS = {
    "conv": dt.Layout(shape=(8, 4, 3, 3)),
    "linear": dt.Layout(shape=(6, 10)),
    "transposed": dt.Layout(shape=(8, 6, 3, 3), channel_dim=1),
    "transposed-groups": dt.Layout(shape=(8, 3, 3, 3), channel_dim=1, conv_groups=2),
    "bias": dt.Layout(shape=(5,)),
}


class Zoo(nn.Module):
    """Every kind of layer that the export promises, one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 3)
        self.up_grouped = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.gemm = nn.Linear(8, 10)
        self.words = nn.Embedding(12, 10)
        self.product = nn.Linear(10, 12)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.grouped(torch.relu(self.norm(self.conv(x))))
        x = torch.relu(self.up_grouped(self.up(x))).mean((2, 3))
        x = torch.tanh(self.gemm(x))
        return self.product(self.words(ids) + x[:, None])


WEIGHTS = ("conv", "grouped", "up", "up_grouped", "gemm", "words", "product")


def zoo() -> tuple[Zoo, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    model = Zoo()
    with torch.no_grad():
        model.state_dict()["norm.running_mean"].uniform_(-1, 1)
        model.state_dict()["norm.running_var"].uniform_(0.5, 2)
        model.norm.weight.uniform_(-1.5, 1.5)  # a negative factor turns the sign of a whole channel's codes
        model.norm.bias.uniform_(-1, 1)
    return model, (torch.randn(2, 4, 6, 6), torch.randint(0, 12, (2, 5)))


def on(target: dt.Target, other: dt.Target | None = None) -> dt.Recipe:
    """A target for every weight that takes it, in one rule; another for the rest."""
    found = [f"{name}.weight" for name in WEIGHTS if fits(target, f"{name}.weight")]
    rules = [dt.Rule(match=rf"^({'|'.join(found)})$", target=target)]
    if other is not None:
        rules.append(dt.Rule(match=r"^(?!norm).*\.weight$", target=other, optional=True))
    return dt.Recipe(rules)


def fits(target: dt.Target, name: str) -> bool:
    try:
        return bool(dt.Recipe([dt.Rule(match=rf"^{name}$", target=target)]).resolve(Zoo()).claimed)
    except ValueError:
        return False


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in onnx.load(path).graph.initializer}


def run_ort(
    path: Path | bytes,
    feeds: list[np.ndarray],
    *,
    optimize: bool = True,
    want: list[str] | None = None,
    exact: bool = False,
) -> Any:
    options = ort.SessionOptions()
    if exact:  # without VNNI x86 sums 8-bit products in pairs in 16 bits and clips them (docs/export.md)
        options.add_session_config_entry("session.x64quantprecision", "1")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    data = path if isinstance(path, bytes) else path.read_bytes()
    running = ort.InferenceSession(data, options)
    names = [entry.name for entry in running.get_inputs()]
    return running.run(want, dict(zip(names, feeds, strict=True)))


def weights_in(path: Path, names: list[str], feeds: list[np.ndarray], optimize: bool = False) -> dict[str, np.ndarray]:
    """What a runtime makes of the codes, read off the graph itself."""
    model = onnx.load(path)
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return dict(zip(names, run_ort(model.SerializeToString(), feeds, optimize=optimize, want=names), strict=True))


# ------------------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_form_decodes_to_the_projection(name: str, layout: dt.Layout) -> None:
    target, w = TARGETS[name], torch.randn(layout.shape)
    if target.accepts(layout.shape, w.dtype, layout):
        pytest.skip("the target does not take this shape")
    (params,) = target.fit_model([w], [layout], [None])
    item = dt.Encoded(target=target, form=target.form(w, params))
    form = form_of(item)
    assert torch.equal(form.dense(), target.project(w, params))
    assert is_plain(form) == (target.leaves_free and not isinstance(target, dt.SparseLevels))
    assert (isinstance(form, Floats) and not is_plain(form)) == isinstance(target, dt.Round)
    if isinstance(form, Grid | Levels):
        factor = torch.randn(layout.channels)
        by_channel = layout.by_channel(form.scaled(factor).dense())
        wanted = layout.by_channel(target.project(w, params)).double() * factor.double()[:, None]
        torch.testing.assert_close(by_channel.double(), wanted, rtol=3e-7, atol=1e-9)


def test_indices_are_cut_where_it_pays() -> None:
    for values in (2, 3, 4, 5, 16, 17, 64, 65, 256, 257, 1024, 1025, 4096, 5000, 65536):
        parts, bits = index_parts(values, 10**6), (values - 1).bit_length()
        assert sum(parts) >= bits and (sum(parts) - bits < 2 or bits == 1)
        assert len(index_parts(values, 10)) <= 2


# ------------------------------------------------------------------------------------------------------- the matrix

MATRIX = {
    "uniform-8": dt.Uniform(bits=8),
    "uniform-5-channel": dt.Uniform(bits=5, granularity="channel"),
    "uniform-8-group": dt.Uniform(bits=8, granularity=dt.Group(size=16)),
    "uniform-4": dt.Uniform(bits=4),
    "uniform-3-channel-half": dt.Uniform(bits=3, granularity="channel", param_dtype="float16"),
    "uniform-4-group": dt.Uniform(bits=4, granularity=dt.Group(size=7)),
    "uniform-2": dt.Uniform(bits=2),
    "uniform-2-channel": dt.Uniform(bits=2, granularity="channel"),
    "uniform-2-group": dt.Uniform(bits=2, granularity=dt.Group(size=16)),
    "uniform-2-no-zero": dt.Uniform(bits=2, zero=False, granularity="channel"),
    "binary": dt.Binary(granularity="channel"),
    "ternary": dt.Ternary(),
    "powers": dt.PowerOfTwo(bits=4, granularity="channel"),
    "learned": dt.LearnedLevels(k=11, granularity=dt.Group(size=10)),
    "learned-tensor": dt.LearnedLevels(k=4),
    "kernels": dt.KernelCodebook(size=8),
    "kernels-global": dt.KernelCodebook(size=6, book="global", few="refuse"),
    "vectors": dt.VectorCodebook(block=2, size=5, codebook_bits=None),
    "sparse-levels": dt.SparseLevels(sparse=dt.TopK(keep=0.3), survivors=dt.Uniform(bits=3, granularity="channel")),
    "nm-levels": dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=dt.Uniform(bits=4)),
    "structured-learned": dt.SparseLevels(
        sparse=dt.Structured(group="filter", keep=0.5), survivors=dt.LearnedLevels(k=4)
    ),
    "zero": dt.Zero(),
    "round-half": dt.Round(),
    "round-brain": dt.Round(dtype="bfloat16"),
    "topk": dt.TopK(keep=0.5),
}


TYPES: dict[str, int] = {
    **{f"uniform-8{kind}": onnx.TensorProto.INT8 for kind in ("", "-group")},
    "uniform-5-channel": onnx.TensorProto.INT8,
    "uniform-3-channel-half": onnx.TensorProto.INT4,
    **{f"uniform-4{kind}": onnx.TensorProto.INT4 for kind in ("", "-group")},
    **{f"uniform-2{kind}": onnx.TensorProto.INT2 for kind in ("", "-channel", "-group")},
    **dict.fromkeys(("binary", "ternary", "zero"), onnx.TensorProto.INT2),
    **dict.fromkeys(("sparse-levels", "nm-levels"), onnx.TensorProto.INT4),
}


@pytest.mark.parametrize("name", MATRIX)
def test_every_target_in_every_layer(name: str, tmp_path: Path) -> None:
    model, inputs = zoo()
    run = dt.compress(model, on(MATRIX[name], dt.Uniform(bits=8)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = to_onnx(run, tmp_path / "m.onnx", inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)

    projected = {key: item.decode() for key, item in run.encoded().items()}
    feeds = [x.numpy() for x in inputs]
    found = weights_in(tmp_path / "m.onnx", list(projected), feeds)
    for key, value in projected.items():
        # What stays float is stored the way round that its matrix product takes it.
        turned = key == "product.weight" and key in report.float_claims
        assert found[key].tobytes() == (value.t() if turned else value).contiguous().numpy().tobytes(), key

    with run.compressed(), torch.no_grad():
        model.eval()
        expected = model(*inputs)
    for optimize, word in ((False, "off"), (True, "on")):
        theirs = torch.from_numpy(run_ort(tmp_path / "m.onnx", feeds, optimize=optimize)[0])
        worst = float((theirs - expected).abs().max())
        assert worst <= 2e-5 * float(expected.abs().max())
        assert report.bound is not None and worst <= report.difference[word] <= report.bound

    # Codes at their width, and nothing of a claimed weight left in full precision but what says so.
    held = initializers(tmp_path / "m.onnx")
    rows = {row.name: row for row in report.tensors}
    assert rows.keys() >= set(projected)
    assert {k for k in projected if rows[k].form == "float"} == set(report.float_claims)
    assert bool(report.float_claims) == (name == "topk")
    assert not {k for k in projected if k in held} - set(report.float_claims)
    for tensor in held.values():
        if tensor.data_type in PACKED:
            assert len(tensor.raw_data) == -(-int(np.prod(tensor.dims)) * PACKED[tensor.data_type] // 8)
    assert report.nbytes == (tmp_path / "m.onnx").stat().st_size
    if name in TYPES:
        assert {held[f"{key}.codes"].data_type for key in projected} == {TYPES[name]}
        kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
        assert kinds["DequantizeLinear"] == len(WEIGHTS)
    assert report.opset == (25 if any(t.data_type in list(PACKED)[:2] for t in held.values()) else 21)


def test_groups_are_blocks(tmp_path: Path) -> None:
    model, inputs = zoo()
    run = dt.compress(model, on(dt.Uniform(bits=4, granularity=dt.Group(size=4))))
    to_onnx(run, tmp_path / "m.onnx", inputs, check=False)
    nodes = {n.output[0]: n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "DequantizeLinear"}
    attributes = {a.name: a.i for a in nodes["words.weight"].attribute}
    assert attributes == {"axis": 1, "block_size": 4}
    assert list(initializers(tmp_path / "m.onnx")["words.weight.scale"].dims) == [12, 3]  # runs of 4, 4 and 2


# ------------------------------------------------------------------------------------------------- matrix products


@pytest.mark.parametrize("target", [dt.Uniform(bits=8), dt.Uniform(bits=4, granularity="channel"), dt.Ternary()])
def test_products_stay_exact_in_a_plain_session(target: dt.Target, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    x = torch.randn(2, 3, 64)
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=target)]))
    report = to_onnx(run, tmp_path / "exact.onnx", x)
    assert "MatMulNBits" not in kernels_of((tmp_path / "exact.onnx").read_bytes())
    # The trap this guards against: ONNX Runtime's own default rounds activations to 8 bits.
    with pytest.raises(ValueError, match=r"optimizations on\) is off PyTorch"):
        to_onnx(run, tmp_path / "fused.onnx", x, matmul="nbits")
    assert not (tmp_path / "fused.onnx").exists()
    loose = to_onnx(run, tmp_path / "fused.onnx", x, matmul="nbits", tolerance=0.1)
    assert kernels_of((tmp_path / "fused.onnx").read_bytes())["MatMulNBits"] == 2
    assert report.bound is not None and loose.difference["off"] < report.bound < 0.1 * loose.difference["on"]
    codes = {row.name: row.nbytes for row in loose.tensors}
    assert codes == {row.name: row.nbytes for row in report.tensors}


def test_a_product_with_a_bare_parameter(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    run = dt.compress(Bare(), dt.Recipe([dt.Rule(match="matrix", target=dt.Uniform(bits=4, granularity="channel"))]))
    to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 32))
    assert "MatMulNBits" not in kernels_of((tmp_path / "m.onnx").read_bytes())


def test_indices_of_nine_bits_take_ten(tmp_path: Path) -> None:
    run = dt.compress(
        nn.Sequential(nn.Linear(64, 128)),
        dt.Recipe([dt.Rule(match="weight", target=dt.VectorCodebook(block=2, size=300, iterations=2))]),
    )
    report = to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 64))
    found = weights_in(tmp_path / "m.onnx", ["0.weight"], [np.zeros((1, 64), dtype=np.float32)], optimize=True)
    assert found["0.weight"].tobytes() == run.encoded()["0.weight"].decode().numpy().tobytes()
    assert report.tensors[0].form == "codewords UINT8+UINT2"
    assert report.tensors[0].nbytes == 4096 * 10 // 8 + 300 * 2 + 4


# ----------------------------------------------------------------------------------------------------- the odd ones


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 16)
            self.body = nn.Linear(16, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(self.words(ids))))

    run = dt.compress(Tied(), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2, granularity="channel"))]))
    ways: tuple[Literal["exact", "nbits"], ...] = ("exact", "nbits")
    for matmul in ways:
        report = to_onnx(run, tmp_path / "m.onnx", torch.randint(0, 20, (2, 5)), matmul=matmul, tolerance=0.1)
        assert [row.name for row in report.tensors if row.target] == ["body.weight", "words.weight"]
        codes = [t for t in initializers(tmp_path / "m.onnx").values() if t.name.endswith(".codes")]
        assert sum(len(t.raw_data) for t in codes) == (20 * 16 + 16 * 16) * 2 // 8


def test_biases_and_norms_can_be_claimed_and_the_rest_stays(tmp_path: Path) -> None:
    model, inputs = zoo()
    rules = [
        dt.Rule(match=r"^gemm\.bias$", include=r"bias$", target=dt.Uniform(bits=4)),
        dt.Rule(match=r"^norm\.weight$", include=r"weight$", target=dt.Uniform(bits=8, granularity="channel")),
        dt.Rule(match=r"^grouped\.bias$", include=r"bias$", target=dt.LearnedLevels(k=3)),
        dt.Rule(match=r"^norm\.bias$", include=r"bias$", target=dt.Round()),
        dt.Rule(match=r"^up\.bias$", include=r"bias$", target=dt.Uniform(bits=4, granularity=dt.Group(size=4))),
    ]
    run = dt.compress(model, dt.Recipe(rules))
    report = to_onnx(run, tmp_path / "m.onnx", inputs)
    rows = {row.name: row for row in report.tensors}
    wanted = {
        "gemm.bias": "INT4",
        "norm.weight": "INT8",
        "norm.bias": "FLOAT16",
        "grouped.bias": "table UINT2",
        "up.bias": "INT4",
        "conv.weight": "float",
    }
    assert {name: rows[name].form for name in wanted} == wanted
    held = initializers(tmp_path / "m.onnx")
    assert np.array_equal(onnx.numpy_helper.to_array(held["conv.weight"]), model.conv.weight.detach().numpy())
    # Only what the graph uses; exactly the parameters and statistics of the model.
    assert rows.keys() == {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}


def test_a_target_from_elsewhere_becomes_a_table_or_says_why_not(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Tenths(dt.Target):
        """Multiples of a number, as somebody else would write it."""

        step: float
        is_exact: ClassVar[bool] = True

        @property
        def scope(self) -> Any:
            return "element"

        def fit(self, w: Tensor, layout: Any = None, previous: Any = None) -> dt.Params:
            return dt.Params(layout=layout or dt.Layout(shape=tuple(w.shape)))

        def form(self, w: Tensor, params: dt.Params) -> Form:
            value, own = (w.detach() / self.step).round() * self.step + 0.0, {"layout": params.layout, "dtype": w.dtype}
            levels, codes = value.unique(return_inverse=True)
            if len(levels) <= 256:
                return Levels(codes=codes.int(), table=levels[None], **own)
            return Floats(value=value.half() if torch.equal(value.half().float(), value) else value, **own)

        def typical(self, params: dt.Params) -> Tensor:
            return torch.tensor(self.step / 4)

    model = nn.Sequential(nn.Linear(64, 64))
    for step, form in ((0.05, "table UINT4"), (2.0**-13, "FLOAT16"), (1e-6, "float")):
        run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=Tenths(step=step))]))
        report = to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 64))
        assert report.tensors[0].form == form
        assert ("keep real values" in report.float_claims.get("0.weight", "")) == (form == "float")


def test_other_lives_keywords_and_several_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.a(x) + y)
            return {"h": h, "out": self.b(h)}

    run = dt.compress(Two(), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
    x, y = torch.randn(1, 8), torch.randn(1, 8)  # a single row, which torch.export alone would take for a constant
    with pytest.raises(ValueError, match=r"example_inputs=...\): give tensors, not ndarray"):
        to_onnx(run, tmp_path / "m.onnx", {"x": x, "y": y.numpy()})
    report = to_onnx(run, tmp_path / "m.onnx", {"x": x, "y": y}, bits=2)
    assert {row.form for row in report.tensors if row.target} == {"INT2"}
    recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))])
    report = to_onnx(run, tmp_path / "m.onnx", {"x": x, "y": y}, recipe=recipe)
    assert {row.form for row in report.tensors if row.target} == {"INT4"}
    with run.compressed(recipe=recipe), torch.no_grad():
        expected = run.model(x=x, y=y)
    theirs = run_ort(tmp_path / "m.onnx", [x.numpy(), y.numpy()])
    for mine, other in zip(expected.values(), theirs, strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(other))


def test_any_batch_or_one(tmp_path: Path) -> None:
    model, (x, ids) = zoo()
    run = dt.compress(model, on(dt.Uniform(bits=4)))
    to_onnx(run, tmp_path / "any.onnx", (x, ids))
    with run.compressed(), torch.no_grad():
        model.eval()
        for size in (1, 7):
            rows = torch.arange(size) % 2
            theirs = run_ort(tmp_path / "any.onnx", [x[rows].numpy(), ids[rows].numpy()])[0]
            torch.testing.assert_close(model(x[rows], ids[rows]), torch.from_numpy(theirs), rtol=1e-4, atol=1e-5)
    to_onnx(run, tmp_path / "two.onnx", (x, ids), dynamic_batch=False)
    shape = onnx.load(tmp_path / "two.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [2, 4, 6, 6]


def test_recalibrated_statistics_are_exported(tmp_path: Path) -> None:
    model, inputs = zoo()
    run = dt.compress(model, on(dt.Uniform(bits=2)))
    own = model.state_dict()["norm.running_mean"].clone()
    run.recalibrate([inputs], forward=lambda batch: model(*batch))
    to_onnx(run, tmp_path / "m.onnx", inputs)
    stored = onnx.numpy_helper.to_array(initializers(tmp_path / "m.onnx")["norm.running_mean"])
    found = run.statistics()
    assert found is not None and np.array_equal(stored, found["norm.running_mean"].numpy())
    assert torch.equal(model.state_dict()["norm.running_mean"], own) and not np.array_equal(stored, own.numpy())


# -------------------------------------------------------------------------------------------------------- BatchNorm


@pytest.mark.parametrize(
    "target",
    [
        dt.Uniform(bits=2),
        dt.Uniform(bits=4, granularity="channel"),
        dt.Uniform(bits=8, granularity=dt.Group(size=16)),
        dt.LearnedLevels(k=4),
        dt.KernelCodebook(size=4, codebook_bits=4),
        dt.TopK(keep=0.5),
    ],
    ids=["tensor", "channel", "group", "table", "codewords", "float"],
)
def test_folding_batchnorm_keeps_the_codes(target: dt.Target, tmp_path: Path) -> None:
    model, inputs = zoo()
    run = dt.compress(model, on(target))
    to_onnx(run, tmp_path / "nodes.onnx", inputs)
    report = to_onnx(run, tmp_path / "folded.onnx", inputs, fold_batchnorm=True)
    kinds = [
        Counter(n.op_type for n in onnx.load(tmp_path / f"{name}.onnx").graph.node) for name in ("nodes", "folded")
    ]
    assert (kinds[0]["BatchNormalization"], kinds[1]["BatchNormalization"]) == (1, 0) and report.notes == ()
    weight = weights_in(tmp_path / "folded.onnx", ["conv.weight"], [x.numpy() for x in inputs])
    factor = (model.norm.weight / (model.state_dict()["norm.running_var"] + 1e-5).sqrt()).detach().double()
    wanted = run.encoded()["conv.weight"].decode().double() * factor[:, None, None, None]
    for value in weight.values():
        torch.testing.assert_close(torch.from_numpy(value).double(), wanted, rtol=3e-7, atol=1e-9)
    if isinstance(target, dt.Uniform):
        before, after = (initializers(tmp_path / f"{n}.onnx")["conv.weight.codes"] for n in ("nodes", "folded"))
        codes = [onnx.numpy_helper.to_array(t).astype(np.int8).reshape(8, -1) for t in (before, after)]
        assert np.array_equal(codes[0] * np.sign(factor.numpy()).astype(np.int8)[:, None], codes[1])
        assert len(after.raw_data) == len(before.raw_data)


def test_codewords_keep_their_batchnorm_and_say_so(tmp_path: Path) -> None:
    model, inputs = zoo()
    run = dt.compress(
        model, dt.Recipe([dt.Rule(match=r"^conv\.", target=dt.KernelCodebook(size=4, codebook_bits=None))])
    )
    report = to_onnx(run, tmp_path / "m.onnx", inputs, fold_batchnorm=True)
    assert "BatchNormalization" in {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    assert len(report.notes) == 1 and "'conv.weight' is made of real codewords" in report.notes[0]


class Last(nn.Module):
    """A layer, its BatchNorm, and what of them is an output."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.conv, self.norm, self.gives = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), gives
        with torch.no_grad():
            self.state_dict()["norm.running_mean"].uniform_(-1, 1)
            self.state_dict()["norm.running_var"].uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Any:
        raw = self.conv(x)
        out = self.norm(raw)
        return {"norm": out, "both": (raw, out), "twice": (out, torch.relu(out), out)}[self.gives]


@pytest.mark.parametrize("activations", [None, Activations()], ids=["weights", "activations"])
@pytest.mark.parametrize("gives", ["norm", "both", "twice"])
def test_a_batchnorm_whose_result_is_an_output(gives: str, activations: Activations | None, tmp_path: Path) -> None:
    run = dt.compress(Last(gives), dt.Recipe([dt.Rule(match=r"conv\.weight", target=dt.Uniform(bits=4))]))
    x = torch.randn(2, 3, 8, 8)
    options: dict[str, Any] = {"fold_batchnorm": True}
    if activations is not None:
        options = {"activations": activations, "calibration": [x]}
    report = to_onnx(run, tmp_path / "m.onnx", x, **options)
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node)
    # What the layer itself gives is asked for, so that it must not be scaled.
    assert kinds["BatchNormalization"] == (gives == "both")
    assert any("is also an output of the graph" in note for note in report.notes) == (gives == "both")
    with run.compressed(), torch.no_grad():
        expected = run.model.eval()(x)
    theirs = run_ort(tmp_path / "m.onnx", [x.numpy()])
    for mine, other in zip([expected] if gives == "norm" else expected, theirs, strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(other), rtol=1e-4, atol=0.1 if activations else 1e-5)


# ----------------------------------------------------------------------------------------------- inputs and outputs


class Tokens(nn.Module):
    """Scores, the best token as a large whole number, and nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.fc(x)
        return scores, scores.argmax(1) + 50_000, scores[:, :0]


def test_every_output_has_its_own_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dt.compress(Tokens(), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
    x = torch.randn(3, 8)
    report = to_onnx(run, tmp_path / "m.onnx", x)
    assert report.bound is not None and max(report.difference.values()) <= report.bound < 1e-3

    # A runtime that is off by more than the scores allow, but by less than 2e-5 of 50,000.
    class Off:
        def __init__(self, which: int, by: float) -> None:
            self.which, self.by = which, by

        def __call__(self, *args: Any, **options: Any) -> Any:
            self.real = real(*args, **options)
            return self

        def get_inputs(self) -> Any:
            return self.real.get_inputs()

        def run(self, *args: Any) -> list[Any]:
            found = self.real.run(*args)
            found[self.which] = found[self.which] + np.asarray(self.by, dtype=found[self.which].dtype)
            return found

    real = ort.InferenceSession
    for which, by in ((0, 0.5), (1, 1)):
        monkeypatch.setattr(ort, "InferenceSession", Off(which, by))
        with pytest.raises(ValueError, match=rf"is off PyTorch by {by:g} in output {which}.*nothing was written"):
            to_onnx(run, tmp_path / "off.onnx", x)
    assert not (tmp_path / "off.onnx").exists()


def test_a_side_input_of_two_is_no_batch(tmp_path: Path) -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor, side: Tensor) -> Tensor:
            return self.fc(x) * side

    # At one row the exporter is given two, which the length of the side input is too.
    run = dt.compress(Side(), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
    x, side = torch.randn(1, 8), torch.randn(2)
    to_onnx(run, tmp_path / "m.onnx", (x, side))
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(tmp_path / "m.onnx").graph.input
    ]
    assert isinstance(shapes[0][0], str) and shapes[1] == [2]
    rows = torch.randn(5, 8)
    with run.compressed(), torch.no_grad():
        expected = run.model.eval()(rows, side)
    theirs = run_ort(tmp_path / "m.onnx", [rows.numpy(), side.numpy()])[0]
    torch.testing.assert_close(expected, torch.from_numpy(theirs))


def test_inputs_of_the_wrong_kind_are_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="1.weight", target=dt.Uniform(bits=8))]))
    why = r"cannot be called with float32 \(2, 5\) \(.*\); give inputs .* whole numbers \(torch.long\) for tokens$"
    with pytest.raises(ValueError, match=why):
        to_onnx(run, tmp_path / "m.onnx", torch.zeros(2, 5))
    assert to_onnx(run, tmp_path / "m.onnx", torch.zeros(2, 5, dtype=torch.long)).nbytes


def test_parameters_may_have_any_name(tmp_path: Path) -> None:
    """Names of our own in the graph once met parameters called like them."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
            self.codebook0 = nn.Parameter(torch.ones(4))
            self.shift3 = nn.Parameter(torch.ones(4))
            self.activations = nn.ParameterDict({"min": torch.ones(4), "max": torch.ones(4)})

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).mean((2, 3)) * self.codebook0 * self.shift3
            return self.fc(x * self.activations["min"] * self.activations["max"])

    rules = [
        dt.Rule(match=r"conv\.weight", target=dt.KernelCodebook(size=4)),
        dt.Rule(match=r"fc\.weight", target=dt.Uniform(bits=4)),
    ]
    run, x = dt.compress(Named(), dt.Recipe(rules)), torch.randn(2, 2, 6, 6)
    to_onnx(run, tmp_path / "m.onnx", x)
    narrow = Activations(bits=4)
    report = to_onnx(run, tmp_path / "narrow.onnx", x, activations=narrow, calibration=[x])
    assert {"codebook0", "shift3", "activations.min"} <= {row.name for row in report.tensors}


# ---------------------------------------------------------------------------------------------------------- a file


@pytest.mark.parametrize("name", ["uniform-4-group", "kernels-global", "sparse-levels"])
def test_from_a_saved_file(name: str, tmp_path: Path) -> None:
    model, inputs = zoo()
    run = dt.compress(model, on(MATRIX[name], dt.Ternary()))
    direct = to_onnx(run, tmp_path / "direct.onnx", inputs)
    dt.save(run, tmp_path / "m.detent", life="compressed")
    twin = Zoo()
    dt.load(tmp_path / "m.detent", twin, "compressed")
    again = to_onnx(twin, tmp_path / "again.onnx", inputs, codes=tmp_path / "m.detent")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "direct.onnx").read_bytes()
    assert replace(again, path=direct.path) == direct
    to_onnx(twin, tmp_path / "third.onnx", inputs, codes=run.encoded())
    assert (tmp_path / "third.onnx").read_bytes() == (tmp_path / "direct.onnx").read_bytes()


def test_a_model_must_hold_its_codes(tmp_path: Path) -> None:
    model, inputs = zoo()
    run = dt.compress(model, on(dt.Uniform(bits=4)))
    with pytest.raises(ValueError, match=r"'conv.weight' does not hold what its codes decode to"):
        to_onnx(model, tmp_path / "m.onnx", inputs, codes=run.encoded())
    with pytest.raises(ValueError, match="no parameter of this model"):
        to_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", torch.randn(2, 2), codes=run.encoded())
    with pytest.raises(ValueError, match="needs codes="):
        to_onnx(model, tmp_path / "m.onnx", inputs)
    with pytest.raises(ValueError, match="a run has its own codes"):
        to_onnx(run, tmp_path / "m.onnx", inputs, codes=run.encoded())
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    with pytest.raises(ValueError, match=rf"'0.weight' on Uniform\(bits=4\) cannot be exported: weights are {dtype}"):
        to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 8, dtype=dtype))


def test_what_cannot_be_traced_is_told(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if float(x.sum()) > 0 else x

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(2, 2, 2)[:, :, :1].reshape(1, 4)) + x.reshape(2, 4)

    recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])
    for model in (Branches(), Fixed()):
        with pytest.raises(ValueError, match=r"dynamic_batch=False"):
            to_onnx(dt.compress(model, recipe), tmp_path / "m.onnx", torch.randn(2, 4))
    assert to_onnx(dt.compress(Fixed(), recipe), tmp_path / "m.onnx", torch.randn(2, 4), dynamic_batch=False).nbytes


def test_arguments_are_checked(tmp_path: Path) -> None:
    run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    x = torch.randn(2, 8)
    for wrong, text in [
        ({"matmul": "fast"}, r"matmul='fast'"),
        ({"tolerance": 0.0}, r"tolerance=0.0"),
        ({"bits": 4, "recipe": run.plan.recipe}, "not both"),
        ({"matmul": "nbits", "activations": Activations(), "calibration": [x]}, "its own way; choose one"),
    ]:
        with pytest.raises(ValueError, match=text):
            to_onnx(run, tmp_path / "m.onnx", x, **wrong)
    with pytest.raises(ValueError, match="must be a run or a torch.nn.Module"):
        to_onnx("m.detent", tmp_path / "m.onnx", x)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        to_onnx(run, tmp_path / "none" / "m.onnx", x)
    with pytest.raises(ValueError, match=r"nothing was written"):
        to_onnx(run, tmp_path / "m.onnx", x, tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else real(name, *rest))
    run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    with pytest.raises(ImportError, match=r"pip install 'detent\[export\]'.*missing: onnx"):
        to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 8))


def test_a_graph_that_this_runtime_cannot_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))

    def refuse(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no such type\nand a long story")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(ValueError, match=rf"ONNX Runtime {ort.__version__} cannot load .*check=False.*: no such type$"):
        to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 8))
    assert not (tmp_path / "m.onnx").exists()
    assert to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 8), check=False).difference == {}


def test_a_wrapped_model_and_its_modes(tmp_path: Path) -> None:
    model, inputs = zoo()
    model.norm.eval()
    run = dt.compress(model, on(dt.Uniform(bits=4)))
    plain = to_onnx(run, tmp_path / "plain.onnx", inputs)
    assert model.training and not model.norm.training
    wrapped = nn.Sequential()
    wrapped.module = copy.deepcopy(model)
    wrapped.forward = wrapped.module.forward  # type: ignore[method-assign]
    twin = dt.compress(wrapped, on(dt.Uniform(bits=4)))
    report = to_onnx(twin, tmp_path / "wrapped.onnx", inputs)
    assert [row.name for row in report.tensors] == [row.name for row in plain.tensors]


# --- latency ---------------------------------------------------------------------------------------------------------


def test_calls_that_are_timed_take_turns() -> None:
    seen: list[str] = []
    times = alternating({name: partial(seen.append, name) for name in "ab"}, 3, warmup=1, repeats=2)
    assert "".join(seen) == "bbaa" + "aabb" + "bbaa" + "aabb"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    slow = alternating({"quick": lambda: None, "slow": lambda: time.sleep(0.01)}, 3, warmup=0)
    assert min(slow["slow"]) >= 10 > 2 * min(slow["quick"]), "milliseconds of one call"
    for wrong in ({"rounds": 0}, {"rounds": 1, "warmup": -1}, {"rounds": 1, "repeats": 0}):
        with pytest.raises(ValueError, match="must be >= 1, 0 and 1"):
            alternating({}, **wrong)


def test_latency_is_that_of_the_file_beside_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with 64 times the work takes longer, and the ratio says so, in the direction it is read."""
    monkeypatch.setattr(latency, "_SECONDS", 0.05)
    for name, width in (("small", 32), ("large", 512)):
        model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
        to_onnx(run, tmp_path / f"{name}.onnx", torch.randn(2, 16), check=False)
    done: list[int] = []
    rows = latency.onnx_latency(
        tmp_path / "large.onnx", tmp_path / "small.onnx", (16,), batches=(1, 3), at_load=True,
        advance=lambda: done.append(1),
    )  # fmt: skip
    assert [row.batch for row in rows] == [1, 3] and len(done) == 2
    for row in rows:
        assert row.ms > row.reference_ms > 0 and row.ratio > 1 and row.verdict == "slower"
        assert row.quartiles[0] <= row.ratio <= row.quartiles[1] and row.at_load_ms is not None and row.at_load_ms > 0
    flipped = replace(rows[0], quartiles=(0.5, 0.9)), replace(rows[0], quartiles=(0.9, 1.1))
    assert [row.verdict for row in flipped] == ["faster", "no clear difference"]
    with pytest.raises(ValueError, match="must be 1 or more"):
        latency.onnx_latency(tmp_path / "large.onnx", tmp_path / "small.onnx", (16,), threads=0)
    running = session(str(tmp_path / "small.onnx"), optimize=True, threads=2)
    assert running.get_session_options().intra_op_num_threads == 2


def test_what_was_written_shows_itself_in_a_line() -> None:
    rows = [Exported(name=f"layer{i}.weight", target="Binary()", form="INT2", nbytes=9) for i in range(90)]
    rows += [replace(row, target="", form="float") for row in rows[:7]]
    report = OnnxReport(path="m.onnx", nbytes=12345, opset=25, tensors=tuple(rows), notes=("a", "b"))
    text = repr(replace(report, difference={"off": 1e-7, "on": 3e-7}, bound=2e-5))
    assert len(text) < 200
    for words in ("m.onnx", "12,345 bytes", "opset 25", "90 INT2, 7 float", "3e-07 (allowed 2e-05)", "2 notes"):
        assert words in text, (words, text)
    assert "unchecked" in repr(report)
