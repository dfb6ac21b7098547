"""Inference in integers alone: equal to a slow NumPy reader of the documentation, and close to the float network."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from elsewhere import Elsewhere
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import detent as dt
from detent.demo import LeNet5
from detent.export.activations import Activations
from detent.export.integer import to_integer
from detent.export.integer_onnx import integers_to_onnx
from detent.export.integer_steps import IntegerModel, Step
from detent.grouping import Group
from papers.models import SmallConvNet, resnet8

INT32 = 2**31 - 1


# --- the reference: docs/export.md, read by someone who has never seen the code ---------------------------------------


def fits(value: int) -> int:
    """A number of 32 bits, or a failure."""
    assert -INT32 - 1 <= value <= INT32, value
    return value


def rescaled(n: dict[str, Any], acc: int, c: int) -> int:
    total = fits(acc) * fits(int(n["multiplier"][c])) + int(n["offset"][c])
    assert -(2**63) <= total < 2**63, total
    return clamp(total // 2 ** int(n["shift"][c]), n["low"], n["high"])


def clamp(value: int, low: int, high: int) -> int:
    return low if value < low else high if value > high else value


def windows(n: dict[str, Any], sides: tuple[int, ...], kernel: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """For every axis and output position: (kernel position, input position) of what lies inside."""
    found = []
    dilations = n.get("dilation", (1,) * len(sides))
    for side, k, stride, pad, dilation in zip(sides, kernel, n["stride"], n["padding"], dilations, strict=True):
        span = side + 2 * pad - dilation * (k - 1) - 1
        count = span // stride + 1
        if n.get("ceil"):
            count = -(-span // stride) + 1
            if (count - 1) * stride >= side + pad:  # PyTorch starts no window in the padding behind
                count -= 1
        axis = []
        for o in range(count):
            at = [(i, o * stride - pad + i * dilation) for i in range(k)]
            axis.append([(i, p) for i, p in at if 0 <= p < side])
        found.append(axis)
    return found


def conv(n: dict[str, Any], q: np.ndarray) -> np.ndarray:
    weight, groups = n["weight"], n["groups"]
    outputs, inputs = weight.shape[:2]
    axes = windows(n, q.shape[2:], weight.shape[2:])
    out = np.empty((len(q), outputs, *map(len, axes)), dtype=object)
    for b, o in itertools.product(range(len(q)), range(outputs)):
        first = (o // (outputs // groups)) * inputs
        for place in itertools.product(*map(range, map(len, axes))):
            acc = 0
            taps_of: Any = itertools.product(*[axes[d][i] for d, i in enumerate(place)])
            for taps in taps_of:
                k, p = tuple(t[0] for t in taps), tuple(t[1] for t in taps)
                for i in range(inputs):
                    acc = fits(acc + int(weight[(o, i, *k)]) * (int(q[(b, first + i, *p)]) - n["zero_in"]))
            out[(b, o, *place)] = rescaled(n, acc, o)
    return out


def linear(n: dict[str, Any], q: np.ndarray) -> np.ndarray:
    out = np.empty((len(q), len(n["weight"])), dtype=object)
    for b, o in itertools.product(range(len(q)), range(len(n["weight"]))):
        acc = 0
        for w, x in zip(n["weight"][o].tolist(), q[b].tolist(), strict=True):
            acc = fits(acc + w * (x - n["zero_in"]))
        out[b, o] = rescaled(n, acc, o)
    return out


def scale(n: dict[str, Any], q: np.ndarray) -> np.ndarray:
    out = np.empty(q.shape, dtype=object)
    for place in np.ndindex(*q.shape):
        out[place] = rescaled(n, int(q[place]) - n["zero_in"], place[1])
    return out


def add(n: dict[str, Any], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.empty(a.shape, dtype=object)
    for place in np.ndindex(*a.shape):
        first = fits((int(a[place]) - n["zeros_in"][0]) * n["multipliers"][0])
        second = fits((int(b[place]) - n["zeros_in"][1]) * n["multipliers"][1])
        total = fits(fits(first + second) + (1 << (n["shift"] - 1)))
        out[place] = clamp(n["zero"] + (total >> n["shift"]), n["low"], n["high"])
    return out


def pooled(n: dict[str, Any], q: np.ndarray, of: Callable[[list[int]], int]) -> np.ndarray:
    axes = windows(n, q.shape[2:], n["kernel"])
    out = np.empty((*q.shape[:2], *map(len, axes)), dtype=object)
    for b, c in itertools.product(range(q.shape[0]), range(q.shape[1])):
        for place in itertools.product(*map(range, map(len, axes))):
            taps: Any = itertools.product(*[axes[d][i] for d, i in enumerate(place)])
            out[(b, c, *place)] = of([int(q[(b, c, *[t[1] for t in tap])]) for tap in taps])
    return out


def average(n: dict[str, Any], q: np.ndarray) -> np.ndarray:
    def of(values: list[int]) -> int:
        return rescaled(n, sum(value - n["zero_in"] for value in values), 0)

    out = pooled(n, q, of)
    return out.reshape(out.shape[:2]) if n["flat"] else out


def pad(n: dict[str, Any], q: np.ndarray) -> np.ndarray:
    """Every axis but the first: positions in front and behind, negative ones are cut off."""
    for axis, (front, behind) in enumerate(n["sides"], start=1):
        side, parts = q.shape[axis], []
        for at in range(-front, side + behind):
            if not 0 <= at < side and n["mode"] == "constant":
                parts.append(np.full_like(q.take(0, axis), n["value"]))
                continue
            at = {"reflect": abs(at) if at < side else 2 * (side - 1) - at, "circular": at % side}.get(n["mode"], at)
            parts.append(q.take(min(max(at, 0), side - 1), axis))
        q = np.stack(parts, axis)
    return q


def by_the_letter(steps: tuple[Step, ...], q: np.ndarray) -> np.ndarray:
    """Runs the steps in Python's own integers."""
    values = {steps[0].name: q.astype(object)}
    for step in steps[1:]:
        n, given_ = dict(step.numbers), [values[name] for name in step.inputs]
        if step.op == "max":
            found = pooled(n, given_[0], max)
        elif step.op == "clamp":
            found = np.vectorize(lambda v, n=n: clamp(v, n["low"], n["high"]), otypes=[object])(*given_)
        elif step.op == "pad":
            found = pad(n, given_[0])
        elif step.op == "flatten":
            found = given_[0].reshape(len(q), -1)
        else:
            formula: Any = {"conv": conv, "linear": linear, "scale": scale, "add": add, "average": average}[step.op]
            found = formula(n, *given_)
        values[step.name] = found
    return values[steps[-1].name]


def quantized(step: Step, x: Tensor) -> np.ndarray:
    q = np.rint(x.numpy().astype(np.float32) / np.float32(step.scale)).astype(np.int64) + step.zero
    return np.clip(q, step.numbers["low"], step.numbers["high"])


@functools.cache
def kernels_clip() -> bool:
    """Whether ONNX Runtime sums 8-bit products in pairs in 16 bits here and clips them: x86 without VNNI."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    ones = numpy_helper.from_array(np.full((64, 64), 127, np.int8), "w")
    ends = (
        helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64]),
        helper.make_tensor_value_info("y", TensorProto.INT32, [1, 64]),
    )
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], [ones])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, 64), 255, np.uint8)})
    return bool((np.asarray(found) != 255 * 127 * 64).any())


def equal_in_onnxruntime(found: IntegerModel, x: Tensor) -> None:
    """ONNX Runtime gives the same integers and the same numbers, with its optimizations and without."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "integers.onnx"
        assert integers_to_onnx(found, path) == path.stat().st_size
        for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
            options = ort.SessionOptions()
            options.graph_optimization_level, options.intra_op_num_threads = level, 1
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            q, y = session.run(["q", "y"], {"x": x.numpy()})
            if kernels_clip() and not np.array_equal(q, found.integers(found.quantize(x)).numpy()):
                pytest.skip("ONNX Runtime's 8-bit kernels clip large products on this CPU, which has no VNNI")
            assert np.array_equal(q, found.integers(found.quantize(x)).numpy())
            assert np.array_equal(y, found(x).numpy())


def equal(found: IntegerModel, x: Tensor) -> None:
    """The PyTorch form gives the very integers of the reference."""
    q = quantized(found.steps[0], x)
    assert np.array_equal(found.quantize(x).numpy(), q)
    expected = by_the_letter(found.steps, q)
    ours = found.integers(torch.from_numpy(q)).numpy()
    assert np.array_equal(ours, expected.astype(np.int64))
    last = found.steps[-1]
    np.testing.assert_array_equal(
        found(x).numpy(), ((expected - last.zero).astype(np.float64) * last.scale).astype(np.float32)
    )


# --- networks -----------------------------------------------------------------------------------------------------


def lively(model: nn.Module) -> nn.Module:
    """BatchNorm that does something, with negative gains among the weights."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.3, 2.0)  # type: ignore[union-attr]
                module.weight.normal_(0, 1.0)
                module.bias.normal_(0, 0.3)
    return model.eval()


def compressed(model: nn.Module, bits: int = 8, granularity: Any = "channel", **options: Any) -> dt.Run:
    rule = dt.Rule(match="weight$", target=dt.Uniform(bits=bits, granularity=granularity, **options))
    return dt.compress(model, dt.Recipe([rule]))


class Block(nn.Module):
    """A residual block with a shortcut, ReLU behind the sum, and every way to spell the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.short = nn.Conv2d(2, 4, 1, stride=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)) + self.short(x))
        return self.fc(y.mean((2, 3)))


def test_a_residual_block_equals_the_reference() -> None:
    run = compressed(lively(Block()))
    x = torch.randn(16, 2, 9, 9)
    found = to_integer(run, [x])
    assert [step.op for step in found.steps] == ["input", "conv", "conv", "conv", "add", "average", "linear"]
    equal(found, torch.randn(3, 2, 9, 9) * 2)
    equal_in_onnxruntime(found, torch.randn(3, 2, 9, 9) * 2)
    with run.compressed(), torch.no_grad():
        wanted = run.model(x)
    assert float((found(x) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("activation_bits", [4, 8])
def test_widths(bits: int, granularity: str, activation_bits: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
    found = to_integer(compressed(model, bits, granularity), [torch.randn(8, 1, 8, 8)],
                       activations=Activations(bits=activation_bits))  # fmt: skip
    n = 2 ** (bits - 1) - 1
    for step in found.steps:
        if "weight" in step.numbers:
            assert int(np.abs(step.numbers["weight"]).max()) <= n
    assert found.steps[0].numbers["high"] == 2**activation_bits - 1
    equal(found, torch.randn(4, 1, 8, 8))


@pytest.mark.parametrize(
    "target",
    [
        dt.Binary(),
        dt.Ternary(),
        dt.Uniform(bits=3, zero=False),
        dt.SparseLevels(sparse=dt.TopK(keep=0.3), survivors=dt.Uniform(bits=4, zero=False, granularity="channel")),
        None,
    ],
    ids=["binary", "ternary", "no zero", "sparse", "codebook"],
)
def test_other_integers_times_a_scale(target: dt.Target | None) -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(16, 3))
    rules = [dt.Rule(match="weight", target=target)] if target is not None else []
    if target is None:  # whose codewords are integers times one scale
        kernels, blocks = dt.KernelCodebook(size=4), dt.VectorCodebook(size=16, block=2)
        rules = [dt.Rule(match="0.weight", target=kernels), dt.Rule(match="4.weight", target=blocks)]
    run = dt.compress(model, dt.Recipe(rules))
    x = torch.randn(32, 2, 8)
    found = to_integer(run, [x])
    equal(found, torch.randn(3, 2, 8))
    equal_in_onnxruntime(found, torch.randn(3, 2, 8))
    with run.compressed(), torch.no_grad():
        wanted = model.eval()(x)
    assert float((found(x) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


# --- padding, wrappers, flags -------------------------------------------------------------------------------------


class Padded(nn.Module):
    def __init__(self, pad: Callable[[Tensor], Tensor], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.pad = nn.Conv2d(2, 3, 3), pad
        self.conv = conv or nn.Conv2d(3, 4, 3, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.pad(self.first(x))))
        x = F.max_pool2d(x, 2, stride=1)
        return self.fc(F.avg_pool2d(x, 2).mean((2, 3)))


PADS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros in a module": nn.ZeroPad2d((0, 1, 0, 1)),
    "zeros in a function": lambda x: F.pad(x, (2, 0, 1, 1)),
    "one axis": lambda x: F.pad(x, (0, 1)),
    "cut off": lambda x: F.pad(x, (-1, 2, 0, -1)),
    "a constant": nn.ConstantPad2d((1, 0, 0, 1), 0.7),
    "a constant beyond the range": nn.ConstantPad2d((1, 0, 0, 1), -40.0),
    "reflected": nn.ReflectionPad2d((2, 1, 0, 1)),
    "reflected by a function": lambda x: F.pad(x, (0, 0, 1, 2), mode="reflect"),
    "replicated": nn.ReplicationPad2d((0, 2, 1, 0)),
    "round": nn.CircularPad2d((1, 2, 0, 1)),
}


def check_padded(model: nn.Module, x: Tensor) -> IntegerModel:
    run = compressed(model, 6, "channel")  # few enough bits for kernels that add pairs in 16
    found = to_integer(run, [x], activations=Activations(symmetric=False))
    assert found.steps[0].zero not in (0, 128)  # asymmetric: 0 lies somewhere
    equal(found, x[:2])
    equal_in_onnxruntime(found, x[:3])
    with run.compressed(), torch.no_grad():
        wanted = model.eval()(x)
    assert float((found(x) - wanted).abs().max()) < 0.04 * float(wanted.abs().max())
    return found


@pytest.mark.parametrize("pad", PADS.values(), ids=PADS.keys())
def test_padding_of_any_kind_is_exact(pad: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(3)
    found = check_padded(Padded(pad), torch.randn(6, 2, 11, 11) + 0.6)
    step = next(step for step in found.steps if step.op == "pad")
    if "Zero" in type(pad).__name__:
        assert step.numbers["value"] == step.zero


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's own, once a process
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("size", [(2, "same"), ((4, 3), "same"), (3, (0, 1))], ids=["2", "4 and 3", "by hand"])
def test_a_convolution_may_pad_unevenly_and_in_any_mode(mode: str, size: tuple[Any, Any]) -> None:
    torch.manual_seed(4)
    conv = nn.Conv2d(3, 4, size[0], padding=size[1], padding_mode=mode)  # type: ignore[arg-type]
    check_padded(Padded(lambda x: x, conv), torch.randn(6, 2, 9, 9) - 0.4)


def test_features_and_channels_may_be_padded_with_zeros() -> None:
    torch.manual_seed(5)
    pad = Pad(lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), pad, nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(18, 2))
    check_padded(model, torch.randn(4, 2, 5, 5) + 0.5)


class Pad(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def test_wrappers_are_taken_off_and_flags_keep_their_defaults() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3), nn.Linear(4 * 9, 2)

        def forward(self, x: Tensor, embed: bool = False) -> Tensor:
            x = torch.relu(self.a(x))
            return x if embed else self.b(x.view(x.size(0), -1))

    torch.manual_seed(6)
    model, x = Flagged().eval(), torch.randn(4, 2, 5, 5)
    plain = to_integer(compressed(model, 6), [x])
    equal(plain, x)
    equal_in_onnxruntime(plain, x)
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        torch.optim.swa_utils.AveragedModel(model),
    ):
        found = to_integer(compressed(wrapped, 6), iter([x]))  # type: ignore[arg-type]
        assert torch.equal(found(x), plain(x))


def random_net(draw: Callable[[Any], Any]) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    width, layers = 2, []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["conv", "conv", "depthwise", "norm"]))
        if kind == "norm":
            layers.append(nn.BatchNorm2d(width))
        else:
            after = width if kind == "depthwise" else draw(st.integers(1, 4))
            kernel, stride, padding, dilation = (draw(st.integers(a, b)) for a, b in ((1, 3), (1, 2), (0, 2), (1, 2)))
            groups = width if kind == "depthwise" else 1
            layers.append(
                nn.Conv2d(width, after, kernel, stride, padding, dilation, groups=groups, bias=draw(st.booleans()))
            )
            width = after
            if draw(st.booleans()):
                layers.append(nn.BatchNorm2d(width))
        pools = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2, 1, 1), nn.Identity()]
        layers += [draw(st.sampled_from([nn.ReLU(), nn.ReLU6(), nn.Identity()])), draw(st.sampled_from(pools))]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(width, 3)]
    return lively(nn.Sequential(*layers))


@given(data=st.data())
@settings(max_examples=40)
def test_random_networks_equal_the_reference_exactly(data: st.DataObject) -> None:
    model = random_net(data.draw)
    try:
        model(torch.zeros(1, 2, 13, 13))
    except RuntimeError:  # nothing is left of the picture
        assume(False)
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    run = compressed(model, bits, data.draw(st.sampled_from(["tensor", "channel"])))
    method: Any = data.draw(st.sampled_from(["minmax", "percentile", "mse"]))
    symmetric = data.draw(st.booleans())
    shift = data.draw(st.sampled_from([0.0, 3.0, -5.0]))
    settings_ = Activations(method=method, symmetric=symmetric)
    found = to_integer(run, [torch.randn(8, 2, 13, 13) + shift], activations=settings_)
    equal(found, torch.randn(2, 2, 13, 13) * 2 + shift)


@given(data=st.data())
@settings(max_examples=8)
def test_random_networks_give_the_same_integers_in_onnxruntime(data: st.DataObject) -> None:
    model = random_net(data.draw)
    try:
        model(torch.zeros(1, 2, 13, 13))
    except RuntimeError:
        assume(False)
    found = to_integer(compressed(model, 4), [torch.randn(8, 2, 13, 13) + 1])
    equal_in_onnxruntime(found, torch.randn(2, 2, 13, 13) * 2 + 1)


def test_integer_batchnorm_is_the_stated_one() -> None:
    """Multiplier, shift and bias of a folded BatchNorm, from the formulas of the documentation."""
    model = lively(nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()))
    run = compressed(model, 8, "channel")
    found = to_integer(run, [torch.randn(8, 2, 5, 5)])
    start, step = found.steps[0], found.steps[1]
    conv, norm = model[0], model[1]  # type: ignore[index]
    encoded = run.encoded()["0.weight"]
    a = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    unit = a * encoded.form.named["scale"].double() * start.scale
    constant = norm.bias.double() - norm.running_mean.double() * a
    m, c, s = (torch.as_tensor(step.numbers[key]).double() for key in ("multiplier", "offset", "shift"))
    torch.testing.assert_close(m * 2.0**-s, unit / step.scale, rtol=2.0**-30, atol=0.0)
    assert all(2**30 <= abs(each) < 2**31 for each in m.tolist())
    torch.testing.assert_close(c * 2.0**-s, constant / step.scale + step.zero + 0.5, rtol=1e-9, atol=1e-9)
    n = encoded.form.named["codes"].long().reshape(conv.weight.shape) - 127
    assert np.array_equal(step.numbers["weight"], n.numpy())
    assert bool((m < 0).any()) == bool((a < 0).any())


def test_batchnorm_gains_of_zero_and_almost_zero() -> None:
    model = lively(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)))
    norm: Any = model[1]  # type: ignore[index]
    with torch.no_grad():
        norm.weight[1], norm.bias[1], norm.weight[2] = 0.0, 0.7, 1e-9
    run = compressed(model)
    x = torch.randn(16, 1, 5, 5)
    found = to_integer(run, [x])
    equal(found, x[:2])
    middle = IntegerModel(found.steps[:2])(x)
    assert float((middle[:, 1] - 0.7).abs().max()) <= found.steps[1].scale / 2 + 1e-6
    assert len(middle[:, 2].unique()) == 1


def test_a_network_whose_last_layer_sees_almost_nothing() -> None:
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(first, nn.ReLU(), last)
    with torch.no_grad():
        first.weight.mul_(1e-9)
        first.bias.zero_()
        last.bias.copy_(torch.tensor([0.7, -0.2]))
    run = compressed(model)
    x = torch.randn(16, 2)
    found = to_integer(run, [x])
    equal(found, x)
    assert float((found(x) - torch.tensor([0.7, -0.2])).abs().max()) < 1e-5


def digits_net(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network trained on digits for a few seconds, its training images, and the test split."""
    from detent.data import digits

    torch.manual_seed(0)
    train, test = digits("train"), digits("test")
    x = (train.images.float() / 255 - 0.3) / 0.35
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        for part in torch.randperm(len(x)).split(48):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), train.labels[part]).backward()
            optimizer.step()
    return model.eval(), x, (test.images.float() / 255 - 0.3) / 0.35, test.labels


def test_accuracy_on_digits_is_that_of_the_float_network() -> None:
    model, train, x, y = digits_net(SmallConvNet)
    run = compressed(model)
    found = to_integer(run, train.split(256), activations=Activations(method="mse"))
    with run.compressed(), torch.no_grad():
        wanted = model(x)
    ours = found(x)
    full = float((wanted.argmax(1) == y).double().mean())
    assert full > 0.9
    assert float((ours.argmax(1) == y).double().mean()) >= full - 0.01
    assert float((ours.argmax(1) == wanted.argmax(1)).double().mean()) > 0.98
    # The integers themselves decide: no floating-point number is needed to name the digit.
    assert torch.equal(found.integers(found.quantize(x)).argmax(1), ours.argmax(1))
    equal(found, x[:2])


def test_papers_networks_have_an_integer_form() -> None:
    for model, side in ((LeNet5(), 28), (lively(resnet8()), 32)):
        x = torch.randn(4, 1 if side == 28 else 3, side, side)
        run = compressed(model.eval())
        found = to_integer(run, [x])
        with run.compressed(), torch.no_grad():
            wanted = model(x)
        assert float((found(x) - wanted).norm()) < 0.1 * float(wanted.norm())
        assert found.nbytes > sum(e.form.layout.numel for e in run.encoded().values())


def test_calibration_takes_batches_like_recalibrate_and_another_width() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    run = compressed(model, 4)
    x, y = torch.randn(8, 4), torch.zeros(8)
    a, b = to_integer(run, [x]), to_integer(run, iter([(x, y)]))
    assert torch.equal(a(x), b(x))
    other = to_integer(run, [x], bits=2)
    assert int(np.abs(other.steps[1].numbers["weight"]).max()) == 1


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_sum_that_could_leave_32_bits_is_refused_when_the_steps_are_made() -> None:
    model = nn.Linear(80_000, 1)
    run = dt.compress(
        nn.Sequential(model), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8, range="minmax"))])
    )
    with torch.no_grad():
        model.weight.fill_(1.0)
    run.rebind(adopt=True)
    assert INT32 < 80_000 * 127 * 255
    with pytest.raises(ValueError, match="'_0' can reach 2,590,800,000, which does not fit in 32 bits"):
        to_integer(run, [torch.rand(2, 80_000)])
    smaller = dt.compress(nn.Sequential(model), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    to_integer(smaller, [torch.rand(2, 80_000)])


class Odd(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU()), "'_1' is a GELU, which has no integer form"),
        (Odd(torch.sigmoid), "'sigmoid' is a sigmoid"),
        (Odd(lambda x: x + 1.0), "1.0 is no activation"),
        (Odd(lambda x: torch.add(x, x, alpha=2)), "must be the plain sum"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), "without running statistics"),
        (nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Linear(2, 2)), "'_0' is a Unflatten"),
    ],
    ids=["gelu", "function", "number", "alpha", "statistics", "module"],
)
def test_what_has_no_integer_form_is_named(model: nn.Module, why: str) -> None:
    run = dt.compress(model, dt.Recipe([dt.Rule(match=r"weight$", target=dt.Uniform(bits=8))]))
    with pytest.raises(ValueError, match=why):
        to_integer(run, [torch.randn(4, 4)])


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([nn.Conv2d(1, 2, 3), nn.ConstantPad2d(1, -float("inf")), nn.MaxPool2d(2)], "pads with -inf"),
        ([nn.Conv2d(1, 2, 3), nn.AvgPool2d(2, padding=1, count_include_pad=False)], "windows of different sizes"),
        ([nn.Conv2d(1, 2, 3), nn.AvgPool2d(2, ceil_mode=True)], "windows of different sizes"),
        ([nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(4)], "windows of different sizes"),
        ([nn.Conv2d(1, 2, 3), nn.Flatten(2)], "must flatten all axes but the first"),
    ],
)
def test_shapes_that_have_no_integer_form_are_named(layers: list[nn.Module], why: str) -> None:
    run = compressed(nn.Sequential(*layers))
    with pytest.raises(ValueError, match=why):
        to_integer(run, [torch.randn(2, 1, 8, 8)])


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (dt.Uniform(bits=4, granularity=Group(size=2)), "'2.weight' lies on Uniform.*one scale a tensor or channel"),
        (dt.VectorCodebook(size=4, block=2, codebook_bits=None), "'2.weight' lies on VectorCodebook"),
        (dt.TopK(keep=0.5), "'2.weight' lies on TopK"),
        (dt.Uniform(bits=8, zero=False), "'2.weight' lies on Uniform.*integers of 8 bits"),
        (None, "'2.weight' is in full precision"),
    ],
)
def test_weights_that_are_no_integers_are_named(target: dt.Target | None, why: str) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    if isinstance(target, dt.Uniform) and not target.zero:
        with torch.no_grad():
            model[2].weight[0] = 1.0
    last = dt.Rule(match=r"^2", target=target) if target is not None else dt.Rule(match=r"^2", keep=True)
    run = dt.compress(model, dt.Recipe([dt.Rule(match=r"^0", target=dt.Uniform(bits=8)), last]))
    with pytest.raises(ValueError, match=why):
        to_integer(run, [torch.randn(4, 4)])


def test_calibration_must_be_there_and_finite() -> None:
    run = compressed(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="no batches"):
        to_integer(run, [])
    with pytest.raises(ValueError, match="not finite"):
        to_integer(run, [torch.full((2, 4), torch.inf)])
    with pytest.raises(ValueError, match="batchnorm"):
        to_integer(run, [], activations=Activations(method="batchnorm", input_range=(-1.0, 1.0)))


@pytest.mark.parametrize(
    ("layers", "shape", "why"),
    [
        ([nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 5)], (8, 5, 8), r"'_0' \(Linear\) reads shape \(8, 5, 8\).* 2 axes"),
        ([nn.Conv1d(2, 3, 3)], (2, 8), r"'_0' \(Conv1d\) reads shape \(2, 8\).* 3 axes"),
        ([nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)], (2, 8, 8), r"'_0' \(Conv2d\) reads .* 4 axes"),
        ([nn.Linear(4, 4), nn.AdaptiveAvgPool1d(2)], (3, 4), r"'_1' \(AdaptiveAvgPool1d\) reads .* 3 axes"),
    ],
    ids=["linear", "conv1d", "conv2d", "pool"],
)
def test_axes_that_have_no_integer_form_are_named(layers: list[nn.Module], shape: tuple[int, ...], why: str) -> None:
    """Rescaling goes by channel, axis 1: of another axis it would be silently wrong."""
    with pytest.raises(ValueError, match=why):
        to_integer(compressed(nn.Sequential(*layers)), [torch.randn(shape)])


def test_an_input_of_other_axes_than_the_calibration_is_refused() -> None:
    found = to_integer(compressed(nn.Sequential(nn.Linear(8, 5))), [torch.randn(16, 8)])
    assert found(torch.randn(3, 8)).shape == (3, 5)
    with pytest.raises(ValueError, match=r"x has shape \(4, 5, 8\); calibration had a batch of \(8,\)"):
        found(torch.randn(4, 5, 8))


@pytest.mark.parametrize("where", ["1", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_tracing_would_leave_out_are_refused(where: str, kind: str) -> None:
    run = compressed(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    handle = getattr(run.model.get_submodule(where), kind)(lambda *given: None)
    with pytest.raises(ValueError, match="'1' \\(ReLU\\) has forward hooks" if where else "the model .* forward hooks"):
        to_integer(run, [torch.randn(8, 4)])
    handle.remove()
    assert len(to_integer(run, [torch.randn(8, 4)]).steps) == 3


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_model_in_double_precision(granularity: str) -> None:
    model = lively(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)))
    run = compressed(model.double(), 8, granularity)
    x = torch.randn(32, 2, 5, 5)
    found = to_integer(run, [x.double()])
    with run.compressed(), torch.no_grad():
        expected = run.model.eval()(x.double())
    assert found.steps[1].numbers["weight"].shape == (3, 2, 3, 3)
    assert float((found(x) - expected).abs().max()) < 0.05 * float(expected.abs().max())
    equal(found, x[:2])


def test_adaptive_pooling_by_keyword() -> None:
    x = torch.randn(16, 1, 8)
    by_keyword = Pooled(lambda y: F.adaptive_avg_pool1d(y, output_size=1))
    by_position = Pooled(lambda y: F.adaptive_avg_pool1d(y, 1))
    by_keyword.load_state_dict(by_position.state_dict())
    found = [to_integer(compressed(model), [x]) for model in (by_keyword, by_position)]
    assert torch.equal(found[0](x), found[1](x))


class Pooled(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.pool = nn.Conv1d(1, 4, 3), nn.Linear(4, 2), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(torch.relu(self.conv(x))), 1))


def test_a_model_on_an_accelerator() -> None:
    """Bias, BatchNorm, codes and calibration come from the device; the integer network is on the CPU."""
    model = lively(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    )
    x = torch.randn(16, 2, 6, 6)
    expected = to_integer(compressed(model), [x])(x)
    with Elsewhere(model) as elsewhere:
        there = elsewhere.mark(x.clone())
        found = to_integer(compressed(model), [there])(there)
        assert not elsewhere.is_there(found)
    assert torch.equal(found, expected)
