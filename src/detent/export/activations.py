"""Activations in 8 bits and fewer: ranges from data or from BatchNorm, and the nodes that round to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from detent.export.forms import bits_of
from detent.export.graph import OWN, Graph, constants_of
from detent.targets.forms import Codewords, Form, Grid

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Activations",
    "Calibration",
    "Range",
    "insert",
    "places",
    "ranges_from_batchnorm",
    "ranges_from_data",
    "round_activations",
]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BINS = 2048
_SHRINKS = np.linspace(1.0, 0.1, 91)  # of the observed range: what "mse" tries
_HALF_OF_INT32 = 2**30
_SMALLEST_SCALE = 1e-30  # of inputs x weights: far from where float32 becomes 0
_LOOKS_UP = ("Gather", "GatherElements", "GatherND")
_SAME_RANGE = ("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Reshape", "Flatten", "Transpose", "Slice")
_SAME_RANGE += ("Squeeze", "Unsqueeze", "Identity", "Gather", "Expand", "Dropout")

_CURVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Softplus": F.softplus,
    "Gelu": F.gelu,  # its approximation by tanh is less than 5e-4 away
}

Range = tuple[float, float]
Calibration = Iterable[Any]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How activations are rounded: per tensor, with fixed ranges (static quantization).

        q = clamp(round(x / scale) + zero_point, 0, 2^bits - 1)

    Args:
        bits: 2 to 8. Below 8 the rounded values are kept in 8 bits, since integer kernels have no others: the numbers
            are those of the narrow grid, the speed and memory those of 8 bits.
        method: where a range comes from. "minmax": the extremes over the calibration data. "percentile": what leaves
            `100 - percentile` per cent out on each side. "mse": the share of the extremes with the least squared error
            of rounding and clipping. "batchnorm": without data, `beta + sigmas * |gamma|` of the BatchNorm before,
            the largest over the channels (and `beta - sigmas * |gamma|`, the smallest).
        symmetric: the zero point is 0 where no value is negative and the middle elsewhere; otherwise it follows the
            range, which always holds 0.
        percentile: in (50, 100], for "percentile".
        sigmas: > 0, for "batchnorm".
        input_range: (smallest, largest) of each model input, for "batchnorm", which cannot know it.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> Activations(method="percentile", percentile=99.9).bits
        8

    Reference: "batchnorm": the data-free option of Kim et al., "Position-based Scaled Gradient", arXiv 2005.11035,
    after Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721.
    """

    bits: int = 8
    method: Literal["minmax", "percentile", "mse", "batchnorm"] = "minmax"
    symmetric: bool = False
    percentile: float = 99.99
    sigmas: float = 6.0
    input_range: Range | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"Activations(bits={self.bits}): must be a whole number from 2 to 8")
        if self.method not in ("minmax", "percentile", "mse", "batchnorm"):
            known = '"minmax", "percentile", "mse" or "batchnorm"'
            raise ValueError(f"Activations(method={self.method!r}): must be {known}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"Activations(percentile={self.percentile}): must be above 50 and at most 100")
        if not self.sigmas > 0:
            raise ValueError(f"Activations(sigmas={self.sigmas}): must be > 0")
        if self.input_range is not None and not self.input_range[0] < self.input_range[1]:
            raise ValueError(f"Activations(input_range={self.input_range}): must be (smallest, largest)")
        if self.method == "batchnorm" and self.input_range is None:
            raise ValueError('Activations(method="batchnorm"): needs input_range=(smallest, largest) of the inputs')

    def grid(self, low: float, high: float) -> tuple[np.float32, int]:
        """The scale and zero point of a range.

        Example:
            >>> scale, zero = Activations().grid(-1.0, 3.0)
            >>> round(float(scale), 6), zero
            (0.015686, 64)
            >>> Activations(symmetric=True).grid(-1.0, 3.0)[1], Activations(symmetric=True).grid(0.0, 3.0)[1]
            (128, 0)
        """
        most = 2**self.bits - 1
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric and low < 0:
            half = 2 ** (self.bits - 1)
            scale = np.float32(max(-low, high) / (half - 1))
            return (scale, half) if scale > 0 else (np.float32(1.0), half)
        scale = np.float32((high - low) / most)
        if not scale > 0:
            return np.float32(1.0), 0
        return scale, int(np.clip(np.rint(-low / float(scale)), 0, most))


# --- where to round ------------------------------------------------------------------------------------------------


def places(graph: Graph) -> list[ir.Value]:
    """The activations to round: what goes into a layer, what comes out of a convolution, sums of those.

    A result is taken behind its Relu or Clip, which rounding to a range does as well. Matrix products give floats, as
    an integer kernel can; outputs of the graph stay floats, and only what reads them gets them rounded. Only layers
    whose weights are integers with a scale a tensor or an output channel take part: of others ONNX Runtime would round
    the weights itself.
    """
    found: dict[int, ir.Value] = {}
    constants = constants_of(graph)

    def add(value: ir.Value | None) -> None:
        if value is not None and value.uses() and id(value) not in constants:
            found.setdefault(id(value), value)

    for node in graph.graph:
        if node.op_type in _LAYERS:
            weight = node.inputs[1]
            if weight is None or id(weight) not in constants or _why_float(graph, node):
                continue
            add(node.inputs[0])
            if node.op_type == "Conv":
                add(_behind_relu(node.outputs[0]))
        elif node.op_type == "Add" and all(v is not None and id(v) in found for v in node.inputs):
            add(_behind_relu(node.outputs[0]))
    return list(found.values())


def _why_float(graph: Graph, node: ir.Node) -> str:
    """Why a layer with constant weights has no integer form, or nothing."""
    weight = node.inputs[1]
    assert weight is not None
    maker = weight.producer()
    if maker is None or maker.op_type != "DequantizeLinear" or "block_size" in maker.attributes:
        return "the weights are no integers with one scale"
    scale = maker.inputs[1]
    assert scale is not None and scale.const_value is not None
    if scale.const_value.numpy().ndim and _axis(maker) != _output_axis(node, graph):
        return "the scales do not run along the outputs"
    form = next((graph.forms[name] for name, value in graph.lowered.items() if value is weight), None)
    if form is not None and _largest_sum(form) > _HALF_OF_INT32:
        return "a sum of its products can leave 32 bits"
    return ""


def _axis(maker: ir.Node) -> int:
    return maker.attributes["axis"].as_int() if "axis" in maker.attributes else 1


def _output_axis(node: ir.Node, graph: Graph) -> int:
    """The axis of a layer's weight that makes its output channels."""
    if node.op_type == "Gemm":
        return 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
    if node.op_type == "MatMul":  # of matrices; stacks of them have no integer kernel with scales along their columns
        codes = _codes_of(node.inputs[1].producer()) if node.inputs[1] is not None else None
        return 1 if codes is None or len(codes.shape or ()) == 2 else -1
    return int(node.op_type == "ConvTranspose")


def _largest_sum(form: Form) -> int:
    """The largest sum of an output channel's products with activations of 8 bits, in a matrix or a convolution."""
    if not isinstance(form, Grid | Codewords):
        return 0
    bits = bits_of(form)
    if bits is None:
        return 0
    integers = form.integers
    widened = 2 ** (7 - bits) if isinstance(form, Grid) and bits < 8 else 1  # as `Graph` widens them
    return 255 * int(integers.abs().max()) * widened * (form.layout.numel // form.layout.channels)


def name_floats(graph: Graph, values: Iterable[ir.Value]) -> None:
    """Note every claimed weight that no integer kernel computes with, and every layer that stays in floats, by name.

    Args:
        graph: with its activations rounded.
        values: what is rounded behind where it is made.
    """
    constants, rounded = constants_of(graph), {id(value) for value in values}
    claimed = {id(value): name for name, value in graph.lowered.items()}
    claimed |= {id(value): name for name, value in graph.weights.items() if name in graph.forms and value.uses()}
    names: dict[str, list[str]] = {}
    seen: set[int] = set()
    for start, name in claimed.items():
        value = next(v for v in (*graph.lowered.values(), *graph.weights.values()) if id(v) == start)
        for node, place in _readers(value, constants):
            seen.add(id(node))
            why = (
                "" if node.op_type in ("Conv", "Gemm") and place == 2 else _why_idle(graph, node, place, rounded, value)
            )
            if why:
                names.setdefault(why, []).append(name)
    for node in graph.graph:
        weight = node.inputs[1] if node.op_type in _LAYERS else None
        if weight is not None and id(weight) in constants and id(node) not in seen:
            names.setdefault(_why_float(graph, node), []).append(str(weight.name))
    for why, found in names.items():
        many = ", ".join(map(repr, dict.fromkeys(found)))
        graph.notes.append(f"{many}: computed in float, because {why}")


def _readers(value: ir.Value, constants: set[int]) -> list[tuple[ir.Node, int]]:
    """What computes with a constant, however it is turned before: the nodes that also read something else."""
    found: list[tuple[ir.Node, int]] = []
    for use in value.uses():
        outputs = [out for out in use.node.outputs if id(out) in constants]
        if not outputs:
            found.append((use.node, use.idx))
        for out in outputs:
            found += _readers(out, constants)
    return found


def _why_idle(graph: Graph, node: ir.Node, place: int, rounded: set[int], value: ir.Value) -> str:
    """Why a node has no integer kernel for a claimed weight that it reads, or nothing."""
    if node.op_type not in _LAYERS or place != 1:
        return "they are looked up" if node.op_type in _LOOKS_UP else f"{node.op_type} has no integer kernel"
    if node.inputs[1] is not value and _why_float(graph, node):
        return "what the layer multiplies with is worked out from them at every run"
    if _why_float(graph, node):
        return _why_float(graph, node)
    if node.op_type == "ConvTranspose":
        return "ConvTranspose has no integer kernel; its inputs are rounded"
    out = _behind_relu(node.outputs[0])
    if node.op_type == "Conv" and (id(out) not in rounded or out.is_graph_output()):
        return "a convolution whose result stays a float has no integer kernel; its inputs are rounded"
    return ""


def _behind_relu(value: ir.Value) -> ir.Value:
    users = [use.node for use in value.uses()]
    if len(users) == 1 and users[0].op_type in ("Relu", "Clip") and not value.is_graph_output():
        return users[0].outputs[0]
    return value


# --- ranges --------------------------------------------------------------------------------------------------------


def ranges_from_data(
    run: Callable[[Any], list[np.ndarray]], batches: Calibration, names: list[str], settings: Activations
) -> dict[str, Range]:
    """The range of every activation over calibration data.

    Args:
        run: gives the activations of one batch, in the order of the names.
        batches: read once for "minmax", twice otherwise.
        names: of the activations.
        settings: the method.

    Raises:
        ValueError: no batches, an empty one, or activations that are not finite.

    Example:
        >>> run = lambda batch: [np.asarray(batch, dtype=np.float32)]
        >>> ranges_from_data(run, [[-1.0, 2.0], [3.0]], ["x"], Activations())
        {'x': (-1.0, 3.0)}
    """
    kept = list(batches) if iter(batches) is batches and settings.method != "minmax" else batches
    low = np.full(len(names), np.inf)
    high = np.full(len(names), -np.inf)
    count = 0
    for batch in kept:
        for i, value in enumerate(run(batch)):
            if not value.size:
                raise ValueError(f"calibration: batch {count} is empty ({names[i]!r} has shape {value.shape})")
            # Of each batch, since NaN is lost in comparisons with what other batches gave.
            ends = value.min(), value.max()
            if not np.isfinite(ends).all():
                raise ValueError(f"calibration: the activation {names[i]!r} is not finite on batch {count}")
            low[i], high[i] = min(low[i], ends[0]), max(high[i], ends[1])
        count += 1
    if not count:
        raise ValueError("calibration: the loader gave no batches")
    if settings.method == "minmax":
        return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}
    counts = np.zeros((len(names), _BINS), dtype=np.int64)
    for batch in kept:
        for i, value in enumerate(run(batch)):
            if high[i] > low[i]:
                counts[i] += np.histogram(value, bins=_BINS, range=(low[i], high[i]))[0]
    chosen = _by_percentile if settings.method == "percentile" else _by_error
    return {
        name: chosen(counts[i], float(low[i]), float(high[i]), settings) if high[i] > low[i] else (low[i], high[i])
        for i, name in enumerate(names)
    }


def _by_percentile(counts: np.ndarray, low: float, high: float, settings: Activations) -> Range:
    edges = np.linspace(low, high, _BINS + 1)
    share = counts.cumsum() / counts.sum()
    out = 1 - settings.percentile / 100
    first = int(np.searchsorted(share, out, side="right"))
    last = int(np.searchsorted(share, 1 - out, side="left"))
    return float(edges[min(first, _BINS - 1)]) if out else low, float(edges[min(last, _BINS - 1) + 1])


def _by_error(counts: np.ndarray, low: float, high: float, settings: Activations) -> Range:
    edges = np.linspace(low, high, _BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    most, best, least = 2**settings.bits - 1, (low, high), np.inf
    for share in _SHRINKS:
        scale, zero = settings.grid(low * share, high * share)
        rounded = (np.clip(np.rint(middles / float(scale)) + zero, 0, most) - zero) * float(scale)
        error = float((counts * (rounded - middles) ** 2).sum())
        if error < least:
            best, least = (low * share, high * share), error
    return best


def ranges_from_batchnorm(graph: Graph, values: list[ir.Value], settings: Activations) -> dict[str, Range]:
    """The range of every activation from the BatchNorm before it, followed through what comes in between.

    Raises:
        ValueError: an activation that comes from no BatchNorm.
    """
    known: dict[str, Range] = {}
    assert settings.input_range is not None
    for value in graph.graph.inputs:
        known[str(value.name)] = settings.input_range
    for node in graph.graph:
        found = _followed(node, graph, known, settings)
        if found is not None:
            known[str(node.outputs[0].name)] = found
    lost = next((v for v in values if v.name not in known), None)
    if lost is not None:
        why = _why_lost(lost, known, constants_of(graph))
        raise ValueError(
            f'Activations(method="batchnorm"): {lost.name!r} {why}, so its range has to be measured; use another '
            "method and calibration data"
        )
    return {str(v.name): known[str(v.name)] for v in values}


def _why_lost(value: ir.Value, known: Mapping[str, Range], constants: set[int]) -> str:
    node = value.producer()
    while node is not None and node.op_type not in _LAYERS:
        given = [v for v in node.inputs if v is not None and id(v) not in constants]
        unknown = [v for v in given if v.name not in known]
        if not unknown:
            return f"passes through {node.op_type}, which is not followed"
        node = unknown[0].producer()
    return "comes from no BatchNorm"


def _curve(node: ir.Node) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The function of one number that a node computes, if it is an activation that is known here."""

    def number(name: str, default: float) -> float:
        return float(node.attributes[name].value) if name in node.attributes else default

    if node.op_type == "Mul":
        x, gate = node.inputs[:2]
        maker = None if gate is None else gate.producer()
        return F.silu if maker is not None and maker.op_type == "Sigmoid" and maker.inputs[0] is x else None
    if node.op_type == "Clip":
        ends = [None if v is None else v.const_value for v in (*node.inputs[1:3], None, None)[:2]]
        if any(v is not None and c is None for v, c in zip(node.inputs[1:3], ends, strict=False)):
            return None
        low, high = (None if c is None else float(c.numpy()) for c in ends)
        return lambda x: x.clamp(low, high)
    if node.op_type == "LeakyRelu":
        return lambda x: F.leaky_relu(x, number("alpha", 0.01))
    if node.op_type == "Elu":
        return lambda x: F.elu(x, number("alpha", 1.0))
    if node.op_type == "HardSigmoid":
        return lambda x: (number("alpha", 0.2) * x + number("beta", 0.5)).clamp(0, 1)
    return _CURVES.get(node.op_type)


def _image(curve: Callable[[torch.Tensor], torch.Tensor], low: float, high: float) -> Range:
    """What a function makes of an interval: its ends, 0, and points between, for those that dip."""
    points = torch.linspace(low, high, _BINS * 2 + 1, dtype=torch.float64)
    points = torch.cat([points, torch.tensor([low, high, min(max(0.0, low), high)], dtype=torch.float64)])
    found = curve(points)
    return float(found.min()), float(found.max())


def _followed(node: ir.Node, graph: Graph, known: Mapping[str, Range], settings: Activations) -> Range | None:
    """The range of a node's first output, if it can be told."""
    name = str(node.outputs[0].name)
    if name in graph.normal:
        gamma, beta = graph.normal[name]
        spread = settings.sigmas * np.abs(gamma)
        return float((beta - spread).min()), float((beta + spread).max())
    inputs = [known.get(str(v.name)) for v in node.inputs if v is not None]
    if not inputs or inputs[0] is None:
        return None
    low, high = inputs[0]
    curve = _curve(node)
    if curve is not None:
        return _image(curve, low, high)
    if node.op_type == "Pad":
        return min(low, 0.0), max(high, 0.0)
    if node.op_type in ("Add", "Concat") and all(r is not None for r in inputs):
        others = [r for r in inputs if r is not None]
        if node.op_type == "Concat":
            return min(a for a, _ in others), max(b for _, b in others)
        return sum(a for a, _ in others), sum(b for _, b in others)
    return inputs[0] if node.op_type in _SAME_RANGE else None


# --- rounding ------------------------------------------------------------------------------------------------------


def insert(graph: Graph, values: list[ir.Value], ranges: Mapping[str, Range], settings: Activations) -> None:
    """Round every value behind where it is made, and biases to int32 where an integer kernel asks for it."""
    import onnx_ir as ir

    scales: dict[int, np.float32] = {}
    constants, rounded = constants_of(graph), {id(value) for value in values}
    limits: list[ir.Value] = []
    if settings.bits < 8:
        most = 2**settings.bits - 1
        limits = [
            graph.constant(f"{OWN}activations.{k}", np.array(v, dtype=np.uint8)) for k, v in (("min", 0), ("max", most))
        ]
    for value in values:
        scale, zero = settings.grid(*ranges[str(value.name)])
        name, users = str(value.name), list(value.uses())
        numbers = [
            graph.constant(f"{name}.rounded.scale", np.array(scale, dtype=np.float32)),
            graph.constant(f"{name}.rounded.zero", np.array(zero, dtype=np.uint8)),
        ]
        quantize = ir.node("QuantizeLinear", [value, *numbers], name=f"{name}:QuantizeLinear")
        quantize.outputs[0].name = f"{name}.rounded"
        made = [quantize]
        if limits:
            # On the integers, and not before they are made: a clip between a layer and its rounding bars the kernel.
            made.append(ir.node("Clip", [quantize.outputs[0], *limits], name=f"{name}:Clip"))
            made[-1].outputs[0].name = f"{name}.narrow"
        back = ir.node("DequantizeLinear", [made[-1].outputs[0], *numbers], name=f"{name}:DequantizeLinear")
        back.outputs[0].name = f"{name}.back"
        made.append(back)
        for use in users:
            if not _would_be_rounded(graph, use.node, use.idx, constants, rounded):
                use.node.replace_input_with(use.idx, back.outputs[0])
        first = value.producer()
        if first is None:
            graph.graph.insert_before(graph.graph[0], made)
        else:
            graph.graph.insert_after(first, made)
        scales[id(back.outputs[0])] = scale
    _round_biases(graph, scales)
    graph.place_new()


def _round_biases(graph: Graph, scales: Mapping[int, np.float32]) -> None:
    """Biases as int32 times (scale of the inputs x scale of the weights), which is what an integer sum is in."""
    layers = [n for n in graph.graph if n.op_type in ("Conv", "Gemm") and id(n.inputs[0]) in scales]
    layers = [n for n in layers if n.inputs[1] is not None and _is_dequantized(n.inputs[1])]
    by_weight: dict[int, list[ir.Node]] = {}
    for node in layers:
        by_weight.setdefault(id(node.inputs[1]), []).append(node)
    # First the scales of all weights, then the biases: layers that share a weight share its scale.
    for nodes in by_weight.values():
        _make_room(graph, nodes, scales)
    for node in layers:
        _round_bias(graph, node, float(scales[id(node.inputs[0])]))


def _is_dequantized(weight: ir.Value) -> bool:
    maker = weight.producer()
    return maker is not None and maker.op_type == "DequantizeLinear" and "block_size" not in maker.attributes


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _make_room(graph: Graph, nodes: Sequence[ir.Node], scales: Mapping[int, np.float32]) -> None:
    """Raise the scales of channels so that their biases, counted in inputs x weights, fit half of int32.

    What weight decay and BatchNorm leave of a dead channel are weights of nothing and a bias that counts. Its codes
    are rounded again on the coarser scale, which moves its result by far less than float32 resolves beside the bias.
    The other half of int32 is for the sum of products.
    """
    weight = nodes[0].inputs[1]
    assert weight is not None
    maker = weight.producer()
    assert maker is not None and maker.inputs[1] is not None
    scale = _numbers(maker.inputs[1])
    assert scale is not None
    if not scale.ndim:
        return
    own = np.abs(scale.astype(np.float64))
    least = np.full(own.shape, _SMALLEST_SCALE)
    for node in nodes:
        bias = _numbers(node.inputs[2]) if len(node.inputs) > 2 else None
        per_input = float(scales[id(node.inputs[0])])
        least = np.maximum(least, _SMALLEST_SCALE / per_input)
        if bias is not None and bias.shape == own.shape:
            least = np.maximum(least, np.abs(bias.astype(np.float64)) / per_input / _HALF_OF_INT32)
    small = own < least
    if not small.any():
        return
    codes = _codes_of(maker)
    if codes is None:
        return  # codewords, which channels share: their layer is computed in floats
    wanted = np.where(small, (least * (1 + 2.0**-20)).astype(np.float32), scale).astype(np.float32)
    array = _numbers(codes)
    assert array is not None
    zero = 128 if array.dtype == np.uint8 else 0
    shape = [1] * array.ndim
    shape[_axis(maker)] = -1
    ratio = (scale.astype(np.float64) / wanted.astype(np.float64)).reshape(shape)
    rounded = np.rint((array.astype(np.float64) - zero) * ratio) + zero
    was_zero = (array.astype(np.float64) == zero).all(axis=tuple(i for i in range(array.ndim) if i != _axis(maker)))
    _replace_constant(codes, rounded.astype(np.int16).astype(array.dtype))
    _replace_constant(maker.inputs[1], wanted)
    count = int((small & ~was_zero).sum())
    if count:
        name = next((n for n, v in graph.lowered.items() if v is weight), str(weight.name))
        graph.notes.append(
            f"{name!r}: {count} of {own.size} channels have weights so small beside their bias that int32 cannot hold "
            "both; these weights are rounded on a coarser scale"
        )


def _codes_of(maker: ir.Node | None) -> ir.Value | None:
    """The stored integers that a node dequantizes, widened or not; `None` of codewords."""
    value = maker.inputs[0] if maker is not None else None
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "Mul"):
            return None
        value = node.inputs[0]
    return value


def _round_bias(graph: Graph, node: ir.Node, per_input: float) -> None:
    """The bias of one layer, or no integer kernel for it where the bias does not fit."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return
    weight = node.inputs[1]
    assert weight is not None
    maker = weight.producer()
    assert maker is not None
    value, own = _numbers(bias), _numbers(maker.inputs[1])
    assert own is not None
    step = (per_input * own.astype(np.float64)).astype(np.float32)
    if value is not None and value.ndim == 1 and own.ndim <= 1 and (not own.ndim or own.shape == value.shape):
        step = np.broadcast_to(step, value.shape) if own.ndim else step
        large = np.abs(value.astype(np.float64)) > _HALF_OF_INT32 * np.abs(step).astype(np.float64)
        if step.all() and not large.any():
            _write_bias(graph, node, bias, np.rint(value / step.astype(np.float64)).astype(np.int32), step)
            return
    # A bias that stays a float would be rounded by ONNX Runtime, to int32 that overflows.
    graph.keep_float(node)
    name = next((n for n, v in graph.weights.items() if v is bias), str(bias.name))
    graph.notes.append(f"{name!r} stays float, and so does its layer: it has no int32 in units of inputs x weights")


def _write_bias(graph: Graph, node: ir.Node, bias: ir.Value, codes: np.ndarray, step: np.ndarray) -> None:
    name = str(bias.name)
    held = graph.graph.initializers
    own = f"{name}.{len(held)}" if f"{name}.codes" in held else name  # a bias that layers share has several scales
    attributes: dict[str, Any] = {"axis": 0} if step.ndim else {}
    inputs = [graph.constant(f"{own}.codes", codes), graph.constant(f"{own}.scale", np.ascontiguousarray(step))]
    node.replace_input_with(2, graph.node("DequantizeLinear", inputs, f"{own}.back", **attributes))
    for row in [n for n, v in graph.weights.items() if v is bias]:
        graph.rows[row] = replace(graph.rows[row], form="INT32", nbytes=4 * (codes.size + step.size))
    if not bias.uses() and bias.name in graph.graph.initializers:
        graph.graph.initializers.pop(name)


def _would_be_rounded(graph: Graph, node: ir.Node, place: int, constants: set[int], rounded: set[int]) -> bool:
    """Whether ONNX Runtime would round the float weights of a layer between a rounded input and a rounded result.

    Such a layer reads what was there before rounding.
    """
    weight = node.inputs[1] if node.op_type in ("Conv", "ConvTranspose", "Gemm") and place == 0 else None
    if weight is None or id(weight) not in constants or not _why_float(graph, node):
        return False
    return id(_behind_relu(node.outputs[0])) in rounded


def _replace_constant(value: ir.Value, array: np.ndarray) -> None:
    import onnx_ir as ir

    value.const_value = ir.Tensor(array, name=value.name)


def measured(graph: Graph, values: list[ir.Value], calibration: Calibration, settings: Activations) -> dict[str, Range]:
    """The range of every value over calibration data, run by ONNX Runtime on the graph as it stands.

    Raises:
        ValueError: no batches, or batches with fewer inputs than the graph.
    """
    import onnx
    import onnxruntime as ort

    names = [str(v.name) for v in values]
    inputs = [str(v.name) for v in graph.graph.inputs]
    model = onnx.load_model_from_string(graph.serialized())
    for name in names:
        if name not in inputs:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    running = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = [name for name in names if name not in inputs]

    def run(batch: Any) -> list[np.ndarray]:
        feeds = dict(zip(inputs, _arrays(batch, len(inputs)), strict=True))
        found: dict[str, Any] = dict(zip(wanted, running.run(wanted, feeds), strict=True)) if wanted else {}
        return [feeds[name] if name in feeds else found[name] for name in names]

    return ranges_from_data(run, calibration, names, settings)


def _arrays(batch: Any, count: int) -> list[np.ndarray]:
    """The inputs of a batch: a tensor, a tuple or list that starts with them, or a mapping."""
    parts = (
        [batch] if isinstance(batch, torch.Tensor) else list(batch.values() if isinstance(batch, Mapping) else batch)
    )
    if len(parts) < count:
        raise ValueError(f"calibration: a batch has {len(parts)} tensors, the model takes {count}")
    return [x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in parts[:count]]


def round_activations(graph: Graph, settings: Activations, calibration: Calibration | None) -> None:
    """Put the nodes in that round activations.

    Args:
        graph: with its weights lowered.
        settings: how to round.
        calibration: batches of inputs; not for "batchnorm".

    Raises:
        ValueError: no data where it is needed, or data where it is not.
    """
    by_norm = settings.method == "batchnorm"
    if by_norm == (calibration is not None):
        need = "takes no calibration data" if by_norm else "needs calibration="
        raise ValueError(f"Activations(method={settings.method!r}): {need}")
    values = places(graph)
    name_floats(graph, values)
    for node in [n for n in graph.graph if n.op_type in ("Gemm", "MatMul")]:
        if node.inputs[1] is not None and _is_dequantized(node.inputs[1]) and _why_float(graph, node):
            graph.keep_float(node)
    if not values:
        raise ValueError(f"activations: no layer of this graph takes part ({'; '.join(graph.notes) or 'it has none'})")
    if calibration is not None:
        ranges = measured(graph, values, calibration, settings)
    else:
        ranges = ranges_from_batchnorm(graph, values, settings)
    insert(graph, values, ranges, settings)
