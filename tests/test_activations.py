"""Rounded activations: ranges from data and from BatchNorm, integer kernels that run, weights that nobody touches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_export_onnx import initializers, run_ort
from torch import Tensor, nn

import detent as dt
from detent.export import Activations, to_onnx
from detent.export.activations import ranges_from_data

FLOAT_LAYERS = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "ConvTranspose", "MatMulNBits"}


class Net(nn.Module):
    """Two convolutions with BatchNorm, a residual sum, a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


def net(width: int = 8) -> tuple[Net, list[Tensor]]:
    """A model whose BatchNorm has seen its data, and that data."""
    torch.manual_seed(5)
    model, batches = Net(width), [torch.randn(8, 3, 8, 8) for _ in range(3)]
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        for batch in batches:
            model(batch)
    return model.eval(), batches


def on(target: dt.Target, match: str = r"(conv\d|fc)\.weight$") -> dt.Recipe:
    rest = dt.Rule(match=r"fc\.weight$", target=dt.Uniform(bits=8), optional=True)
    return dt.Recipe([dt.Rule(match=match, target=target), rest])


def value(path: Path, name: str) -> np.ndarray:
    return onnx.numpy_helper.to_array(initializers(path)[name])


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-9, 1e9)])
def test_a_grid_holds_zero_and_its_range(bits: int, symmetric: bool, low: float, high: float) -> None:
    scale, zero = Activations(bits=bits, symmetric=symmetric).grid(low, high)
    most = 2**bits - 1
    assert scale > 0 and 0 <= zero <= most
    ends = ((0 - zero) * float(scale), (most - zero) * float(scale))
    step = float(scale) * 0.5000001
    assert ends[0] - step <= min(low, 0.0) and max(high, 0.0) <= ends[1] + step
    if symmetric:
        assert zero == (2 ** (bits - 1) if low < 0 else 0)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"method": "entropy"}, "method='entropy'"),
        ({"percentile": 50}, "percentile=50"),
        ({"percentile": 100.1}, "percentile=100.1"),
        ({"sigmas": 0.0}, "sigmas=0.0"),
        ({"input_range": (1.0, 1.0)}, "input_range"),
        ({"method": "batchnorm"}, "needs input_range"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Activations(**wrong)


# ------------------------------------------------------------------------------------------------------------ ranges


def arrays(batch: Any) -> list[np.ndarray]:
    return [np.asarray(batch, dtype=np.float32)]


def test_percentiles_are_those_of_the_data() -> None:
    x = np.random.default_rng(0).normal(size=(10, 5000)).astype(np.float32)
    settings = Activations(method="percentile", percentile=99.0)
    low, high = ranges_from_data(arrays, iter(x), ["x"], settings)["x"]  # an iterator, although it is read twice
    width = (x.max() - x.min()) / 2048
    assert abs(low - np.percentile(x, 1.0)) < 2 * width and abs(high - np.percentile(x, 99.0)) < 2 * width
    everything = ranges_from_data(arrays, x, ["x"], Activations(method="percentile", percentile=100))["x"]
    assert everything == pytest.approx((x.min(), x.max()), rel=1e-6)
    # Behind a Relu more than the share left out is zero, and zero stays the lower end.
    low, _ = ranges_from_data(arrays, np.maximum(x, 0), ["x"], settings)["x"]
    assert 0 <= low < 2 * width


@pytest.mark.parametrize("bits", [4, 8])
def test_least_error_is_the_least_of_the_shares(bits: int) -> None:
    x = np.random.default_rng(1).standard_t(3, size=20000).astype(np.float32)
    settings = Activations(method="mse", bits=bits)
    low, high = ranges_from_data(arrays, [x], ["x"], settings)["x"]

    def error(a: float, b: float) -> float:
        scale, zero = settings.grid(a, b)
        q = np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1)
        return float((((q - zero) * scale - x).astype(np.float64) ** 2).sum())

    shares = np.linspace(1.0, 0.1, 91)
    best = min(error(x.min() * s, x.max() * s) for s in shares)
    assert error(low, high) <= 1.02 * best < error(float(x.min()), float(x.max()))


def test_ranges_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="gave no batches"):
        ranges_from_data(arrays, [], ["x"], Activations())
    with pytest.raises(ValueError, match="'x' is not finite"):
        ranges_from_data(arrays, [[1.0, np.inf]], ["x"], Activations())
    # NaN is lost in comparisons, so that it must be seen in every batch, whatever comes before and after.
    for batches in ([[1.0], [np.nan]], [[np.nan], [1.0]], [[1.0], [np.nan, 2.0], [3.0]], [[1.0], [-np.inf], [3.0]]):
        with pytest.raises(ValueError, match="'x' is not finite on batch"):
            ranges_from_data(arrays, batches, ["x"], Activations())
    with pytest.raises(ValueError, match=r"batch 1 is empty \('x' has shape \(0,\)\)"):
        ranges_from_data(arrays, [[1.0], []], ["x"], Activations())
    constant = ranges_from_data(arrays, [[2.0, 2.0]], ["x"], Activations(method="mse"))["x"]
    assert constant == (2.0, 2.0)


def test_ranges_from_batchnorm_are_beta_and_gamma(tmp_path: Path) -> None:
    model, _ = net()
    run = dt.compress(model, on(dt.Uniform(bits=8)))
    settings = Activations(method="batchnorm", sigmas=4.0, input_range=(-3.0, 3.0))
    report = to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 3, 8, 8), activations=settings)
    assert report.kernels["QLinearConv"] == 2 and not FLOAT_LAYERS & report.kernels.keys()

    def ends(norm: nn.BatchNorm2d) -> tuple[float, float]:
        beta, gamma = norm.bias.detach().double(), norm.weight.detach().double().abs()
        return float((beta - 4 * gamma).min()), float((beta + 4 * gamma).max())

    first = max(ends(model.bn1)[1], 0.0)  # behind a Relu
    second = ends(model.bn2)  # into the sum
    total = max(second[1] + first, 0.0)  # the sum, behind a Relu; the mean keeps its range
    wanted = [6.0 / 255, first / 255, (second[1] - second[0]) / 255, total / 255, total / 255]
    nodes = [n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "QuantizeLinear"]
    found = [float(value(tmp_path / "m.onnx", n.input[1])) for n in nodes]
    assert found == pytest.approx(wanted, rel=1e-6)


def test_ranges_from_batchnorm_go_through_activations(tmp_path: Path) -> None:
    acts: list[nn.Module] = [nn.ReLU6(), nn.Hardtanh(-0.5, 1.5), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.5), nn.Hardswish()]
    acts += [nn.SiLU(), nn.GELU(), nn.Mish(), nn.Hardsigmoid(), nn.Tanh(), nn.ELU(0.7)]
    norms = [nn.BatchNorm2d(3) for _ in range(len(acts) + 1)]
    parts = [[nn.Conv2d(3, 3, 1), norm, act] for norm, act in zip(norms, [*acts, nn.Identity()], strict=True)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.0)
            norm.bias.uniform_(-0.5, 0.5)
    model = nn.Sequential(*(layer for part in parts for layer in part))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
    settings = Activations(method="batchnorm", sigmas=4.0, input_range=(-3.0, 3.0))
    to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 3, 4, 4), activations=settings, check=False)
    convs = [n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "Conv"]
    for act, norm, reader in zip(acts, norms, convs[1:], strict=False):
        beta, spread = norm.bias.detach().double(), 4 * norm.weight.detach().double()
        with torch.no_grad():  # what the activation makes of everything that may reach it, by brute force
            every = act(torch.linspace(float((beta - spread).min()), float((beta + spread).max()), 1_000_001).double())
        low, high = min(float(every.min()), 0.0), max(float(every.max()), 0.0)
        scale = float(value(tmp_path / "m.onnx", reader.input[0].removesuffix(".back") + ".rounded.scale"))
        assert scale == pytest.approx((high - low) / 255, rel=1e-5), act


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (nn.PReLU(), "passes through PRelu, which is not followed"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), "comes from no BatchNorm"),
    ],
    ids=["activation", "layer"],
)
def test_where_the_range_is_lost_is_said(between: nn.Module, why: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), between, nn.Conv2d(4, 4, 3))
    run = dt.compress(model, dt.Recipe([dt.Rule(match=r"^[03]\.weight", target=dt.Uniform(bits=8))]))
    settings = Activations(method="batchnorm", input_range=(-3.0, 3.0))
    with pytest.raises(ValueError, match=why):
        to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 3, 8, 8), activations=settings, check=False)


def test_without_batchnorm_there_is_no_such_range(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
    settings = Activations(method="batchnorm", input_range=(-3.0, 3.0))
    with pytest.raises(ValueError, match="comes from no BatchNorm"):
        to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 8), activations=settings)
    with pytest.raises(ValueError, match="takes no calibration data"):
        to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 8), activations=settings, calibration=[torch.randn(2, 8)])
    with pytest.raises(ValueError, match="needs calibration="):
        to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 8), activations=Activations())
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- kernels


def reference(run: dt.Run, path: Path, x: Tensor, bits: int) -> Tensor:
    """The rounded network by hand, in float64: weights from the library's codes, scales read off the file."""
    weights = {name: item.decode().double() for name, item in run.encoded().items()}
    held = {name: t.double() for name, t in run.model.state_dict().items()}
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"]
    grids = [(float(value(path, n.input[1])), int(value(path, n.input[2]))) for n in nodes]
    turn = iter(grids)

    def rounded(a: Tensor) -> Tensor:
        scale, zero = next(turn)
        return ((a / scale).round().add(zero).clamp(0, 2**bits - 1) - zero) * scale

    def bias(name: str, true: Tensor) -> Tensor:
        codes, scale = value(path, f"{name}.codes"), value(path, f"{name}.scale").astype(np.float64)
        assert codes.dtype == np.int32
        np.testing.assert_allclose(codes * scale, true.numpy(), atol=0.51 * float(np.abs(scale).max()), rtol=1e-7)
        return torch.from_numpy(codes * scale)

    def layer(a: Tensor, name: str, norm: str) -> Tensor:
        mean, var, gamma, beta = (held[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        factor = gamma / (var + 1e-5).sqrt()
        weight = weights[f"{name}.weight"] * factor[:, None, None, None]
        return nn.functional.conv2d(a, weight, bias(f"{name}.weight.bias", beta - mean * factor), padding=1)

    h = rounded(torch.relu(layer(rounded(x.double()), "conv1", "bn1")))
    s = rounded(layer(h, "conv2", "bn2"))
    s = rounded(torch.relu(s + h))
    return nn.functional.linear(rounded(s.mean((2, 3))), weights["fc.weight"], bias("fc.bias", held["fc.bias"]))


WEIGHTS = {
    "w8": (dt.Uniform(bits=8, granularity="channel"), onnx.TensorProto.UINT8),
    "w4": (dt.Uniform(bits=4), onnx.TensorProto.INT4),
    "w2": (dt.Ternary(granularity="channel"), onnx.TensorProto.INT2),
    "codewords": (dt.KernelCodebook(size=6), onnx.TensorProto.UINT4),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_integer_kernels_run_and_weights_stay(name: str, bits: int, tmp_path: Path) -> None:
    model, batches = net()
    target, kind = WEIGHTS[name]
    match = r"conv\d\.weight$" if name == "codewords" else r"(conv\d|fc)\.weight$"
    run = dt.compress(model, on(target, match))
    settings = Activations(bits=bits, symmetric=name == "w4", method="mse" if name == "w8" else "minmax")
    report = to_onnx(run, tmp_path / "m.onnx", batches[0], activations=settings, calibration=[(b, 0) for b in batches])
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
    assert report.kernels["QLinearConv"] == 2 and report.kernels["QGemm"] == 1 and report.kernels["QLinearAdd"] == 1
    assert not FLOAT_LAYERS & report.kernels.keys() and report.bound is None
    assert [note.split(" are ")[0] for note in report.notes] == ["simulated: activations of 4 bits"] * (bits == 4)

    # Codes are those of the weight-only file; a negative BatchNorm factor turns the sign of a channel.
    held = initializers(tmp_path / "m.onnx")
    assert held["conv1.weight.codes"].data_type == kind and not {"conv1.weight", "conv2.weight"} & held.keys()
    if name != "codewords":
        codes = onnx.numpy_helper.to_array(held["conv2.weight.codes"]).astype(np.int64)
        scale = onnx.numpy_helper.to_array(held["conv2.weight.scale"]).astype(np.float64)
        factor = (model.bn2.weight / (model.state_dict()["bn2.running_var"] + 1e-5).sqrt()).detach().double()
        wanted = run.encoded()["conv2.weight"].decode().double() * factor[:, None, None, None]
        # Eight bits lie around 128, which no kernel saturates; of others a kernel sees a power of two.
        codes = codes - 128 if name == "w8" else codes << (3 if name == "w4" else 5)
        np.testing.assert_allclose(codes * scale[:, None, None, None], wanted.numpy(), rtol=3e-7, atol=1e-12)

    x = torch.randn(5, 3, 8, 8)
    expected = reference(run, tmp_path / "m.onnx", x, bits).numpy()
    step = float(value(tmp_path / "m.onnx", "mean.rounded.scale"))
    allowed = 3 * step * float(run.encoded()["fc.weight"].decode().abs().sum(1).max())
    for optimize in (False, True):
        theirs = run_ort(tmp_path / "m.onnx", [x.numpy()], optimize=optimize, exact=True)[0]
        # Nearly all of it is the same number; a tie in rounding may move one activation by a step.
        assert np.median(np.abs(theirs - expected)) < 1e-4 * np.abs(expected).max()
        assert np.abs(theirs - expected).max() <= allowed


def test_a_dead_channel_keeps_its_bias(tmp_path: Path) -> None:
    model, batches = net()
    with torch.no_grad():
        model.conv1.weight[2] = 0.0
        model.bn1.bias[2] = 0.7
    run = dt.compress(model, on(dt.Uniform(bits=8, granularity="channel")))
    to_onnx(run, tmp_path / "m.onnx", batches[0], activations=Activations(), calibration=batches)
    expected = reference(run, tmp_path / "m.onnx", batches[0], 8).numpy()
    theirs = run_ort(tmp_path / "m.onnx", [batches[0].numpy()], exact=True)[0]
    assert np.median(np.abs(theirs - expected)) < 1e-4 * np.abs(expected).max()


def both(path: Path, x: Tensor) -> list[np.ndarray]:
    """What a session without optimizations gives, and a default one."""
    return [run_ort(path, [x.numpy()], optimize=optimize)[0] for optimize in (False, True)]


class TwoBiases(nn.Module):
    """A weight that two layers share, with a bias each; its first channel is all but dead."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.one, self.two = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        with torch.no_grad():
            self.weight[0] *= 1e-7
            self.one[0], self.two[0] = 1.5, 40.0
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.relu(nn.functional.conv2d(x, self.weight, bias)) for bias in (self.one, self.two)]
        return self.head(torch.cat(parts, 1))


def near_dead(bits: int, norm: bool) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    net: Any = nn.Sequential(*(parts if norm else [parts[0], *parts[2:]])).eval()
    with torch.no_grad():
        if norm:  # what a long weight decay leaves of a scale
            net[1].weight[0], net[1].bias[0] = 1e-12, 1.5
        else:
            net[0].weight[0] *= 1e-6
            net[0].bias[0] = 1.5
        net[-1].weight[:, 0] = 1.0
    return net


NEAR_DEAD = {
    "w8": (lambda: near_dead(8, False), dt.Uniform(bits=8, granularity="channel")),
    "w4": (lambda: near_dead(4, False), dt.Uniform(bits=4, granularity="channel")),
    "w8-norm": (lambda: near_dead(8, True), dt.Uniform(bits=8)),
    "codewords-norm": (lambda: near_dead(8, True), dt.KernelCodebook(size=6)),
    "shared": (TwoBiases, dt.Uniform(bits=8, granularity="channel")),
}


@pytest.mark.parametrize("name", NEAR_DEAD)
def test_a_default_session_computes_what_the_file_says(name: str, tmp_path: Path) -> None:
    """Biases of channels that are all but dead once overflowed int32: off by as much as the output is large."""
    make, target = NEAR_DEAD[name]
    torch.manual_seed(0)
    net, x = make(), torch.randn(4, 3, 8, 8)
    # A codebook of kernels takes kernels of 3 x 3 alone.
    match = r"^0\.weight$" if name.startswith("codewords") else r"weight$"
    run = dt.compress(net, dt.Recipe([dt.Rule(match=match, target=target)]))
    report = to_onnx(run, tmp_path / "m.onnx", x, activations=Activations(), calibration=[x])
    with run.compressed(), torch.no_grad():
        expected = run.model(x).numpy()
    plain, fast = both(tmp_path / "m.onnx", x)
    size = np.abs(expected).max()
    assert np.abs(plain - fast).max() < 0.02 * size and np.abs(fast - expected).max() < 0.05 * size
    said = "has no int32" if name.startswith("codewords") else "of .* channels have weights so small beside their bias"
    assert any(re.search(said, note) for note in report.notes), report.notes
    assert report.kernels.get("QLinearConv", 0) == (0 if name.startswith("codewords") else 2 if name == "shared" else 1)


def test_full_codes_are_unsigned_because_signed_ones_saturate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    )
    with torch.no_grad():
        for i in (0, 2, 5):  # the largest sums of pairs: 2 * 255 * 127 is twice what 16 bits hold
            net.get_parameter(f"{i}.weight").abs_()
    run, x = dt.compress(net, on(dt.Uniform(bits=8, granularity="channel"), "weight")), torch.rand(4, 3, 8, 8)
    report = to_onnx(run, tmp_path / "m.onnx", x, activations=Activations(), calibration=[x])
    assert {row.form for row in report.tensors if row.target} == {"UINT8"}
    plain, fast = both(tmp_path / "m.onnx", x)
    assert np.abs(plain - fast).max() < 1e-3 * np.abs(plain).max()
    assert report.kernels["QLinearConv"] == 2 and report.kernels["QGemm"] == 1
    # The codes are ours, 128 higher.
    codes = initializers(tmp_path / "m.onnx")["0.weight.codes"]
    ours = run.encoded()["0.weight"].form.named["codes"].reshape(16, 3, 3, 3).numpy().astype(int) - 127
    assert codes.data_type == onnx.TensorProto.UINT8
    assert np.array_equal(onnx.numpy_helper.to_array(codes).astype(int) - 128, ours)


def test_a_session_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detent.export import onnx as exporter

    model, batches = net()
    run = dt.compress(model, on(dt.Uniform(bits=8, granularity="channel")))
    real = exporter._run
    calls = []

    def wrong(running: Any, samples: Any) -> Any:
        calls.append(running)
        found = real(running, samples)
        return found if len(calls) == 1 else [[y * 1.2 for y in row] for row in found]  # the optimized one

    monkeypatch.setattr(exporter, "_run", wrong)
    with pytest.raises(ValueError, match=r"default session is off the same graph without optimizations by .*written"):
        to_onnx(run, tmp_path / "m.onnx", batches[0], activations=Activations(), calibration=batches)
    assert not (tmp_path / "m.onnx").exists()


class Several(nn.Module):
    """Weights that no integer kernel knows, beside one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.gru = (
            nn.Embedding(9, 8),
            nn.LSTM(8, 8, batch_first=True),
            nn.GRU(8, 8, batch_first=True),
        )
        self.mix, self.fc, self.last = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.gru(self.rnn(self.words(ids))[0])[0]
        h = torch.relu(self.fc(torch.einsum("btc,cd->btd", x, self.mix)[:, -1]))
        return h, self.last(h)


def test_every_weight_in_floats_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = dt.compress(Several(), dt.Recipe([dt.Rule(match=r"weight|mix", target=dt.Uniform(bits=8))]))
    ids = torch.randint(0, 9, (3, 5))
    settings = {"activations": Activations(), "calibration": [ids]}
    report = to_onnx(run, tmp_path / "m.onnx", ids, dynamic_batch=False, **settings)
    floats = " ".join(note for note in report.notes if "computed in float" in note)
    claimed = {claim.name for claim in run.plan.claimed}
    in_integers = {name for name in claimed if repr(name) not in floats}
    # `h` is an output as well: it stays a float there, and the layer behind it gets it rounded.
    assert {"mix", "fc.weight", "last.weight"} >= in_integers >= {"fc.weight", "last.weight"} and len(claimed) == 8
    assert "LSTM has no integer kernel" in floats and "GRU has no integer kernel" in floats and "looked up" in floats
    assert report.kernels["QGemm"] == 2
    plain, fast = both(tmp_path / "m.onnx", ids)
    np.testing.assert_allclose(plain, fast, atol=1e-5)


def test_sums_that_leave_32_bits_stay_in_floats(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(40_000, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    torch.nn.init.ones_(net.get_parameter("0.weight"))  # 40,000 * 127 * 255 is 0.6 of 2^31, and a bias may take half
    run, x = dt.compress(net, on(dt.Uniform(bits=8), "weight")), torch.rand(2, 40_000)
    report = to_onnx(run, tmp_path / "m.onnx", x, activations=Activations(), calibration=[x])
    assert any("'0.weight': computed in float" in note and "32 bits" in note for note in report.notes)
    plain, fast = both(tmp_path / "m.onnx", x)
    np.testing.assert_allclose(plain, fast, rtol=1e-5)


def test_what_no_kernel_computes_is_said(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)
            self.up = nn.ConvTranspose2d(8, 6, 2)
            self.blocks = nn.Conv2d(6, 6, 3)
            self.table = nn.Conv2d(6, 6, 1)
            self.plain = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.table(self.blocks(self.up(torch.relu(self.conv(x))))).mean((2, 3)))

    rules = [
        dt.Rule(match=r"(conv|up)\.weight", target=dt.Uniform(bits=7)),  # which no kernel clips, with VNNI or without
        dt.Rule(match=r"blocks\.weight", target=dt.Uniform(bits=8, granularity=dt.Group(size=16))),
        dt.Rule(match=r"table\.weight", target=dt.LearnedLevels(k=4)),
    ]
    run = dt.compress(Odd(), dt.Recipe(rules))
    x = torch.randn(2, 4, 8, 8)
    report = to_onnx(run, tmp_path / "m.onnx", x, activations=Activations(), calibration=[x])
    for name in ("blocks.weight", "table.weight", "plain.weight"):
        assert any(name in note and "computed in float" in note for note in report.notes), (name, report.notes)
    assert any("simulated" in note and "1 ConvTranspose" in note for note in report.notes)
    assert report.kernels["QLinearConv"] == 1
    # The trap: around float weights ONNX Runtime would put rounding of its own. Nothing but ours may be in the graph.
    plain = run.model.get_parameter("plain.weight").detach()
    assert np.array_equal(value(tmp_path / "m.onnx", "plain.weight"), plain.numpy())
    assert abs(report.difference["on"] - report.difference["off"]) < 1e-3


def test_products_of_matrices_run_in_integers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4, granularity="channel"))]))
    x = torch.randn(2, 3, 32)
    report = to_onnx(run, tmp_path / "m.onnx", x, activations=Activations(), calibration=[torch.randn(2, 3, 32), x])
    assert report.kernels["MatMulIntegerToFloat"] == 2 and not FLOAT_LAYERS & report.kernels.keys()
    assert report.difference["on"] == pytest.approx(report.difference["off"], rel=0.1)
    with pytest.raises(ValueError, match="a batch has 0 tensors"):
        to_onnx(run, tmp_path / "m.onnx", x, activations=Activations(), calibration=[()])


def test_a_claimed_bias_becomes_an_int32_too(tmp_path: Path) -> None:
    model, batches = net()
    rules = [dt.Rule(match=r"fc\.bias$", include="bias", target=dt.Round()), *on(dt.Uniform(bits=8)).rules]
    run = dt.compress(model, dt.Recipe(rules))
    report = to_onnx(run, tmp_path / "m.onnx", batches[0], activations=Activations(), calibration=batches)
    assert not FLOAT_LAYERS & report.kernels.keys()
    rows = {row.name: row.form for row in report.tensors}
    assert rows["fc.bias"] == "INT32" and rows["conv1.weight and BatchNorm (bias)"] == "INT32"


def test_with_nothing_to_round_it_refuses(tmp_path: Path) -> None:
    run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.TopK(keep=0.5))]))
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="no layer of this graph takes part"):
        to_onnx(run, tmp_path / "m.onnx", x, activations=Activations(), calibration=[x])
