"""Inference in integers alone: 8-bit activations, our codes as weights, 32-bit sums, a multiplier and a shift.

The result is a list of `Step`s (`export.integer_steps`; docs/export.md has every formula). Everything that must not
overflow is checked when the steps are made, from bounds and not from data.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from detent.export.activations import Activations, ranges_from_data
from detent.export.calling import bind, unwrapped
from detent.export.forms import grid_of
from detent.export.integer_steps import IntegerModel, Step
from detent.export.trace import Op, Padding, classify, padding_of, trace
from detent.grouping import Channel, PerTensor, granularity_of
from detent.lives import Encoded, Lives
from detent.parameters import canonical_name
from detent.roundings import Place, take_off
from detent.specs import short

__all__ = ["to_integer"]

INT32 = 2**31 - 1
_STEP_OF = {
    Op.CONV: "conv", Op.LINEAR: "linear", Op.BATCHNORM: "scale", Op.RELU: "clamp", Op.MAXPOOL: "max",
    Op.AVGPOOL: "average", Op.ADAPTIVE_AVGPOOL: "average", Op.MEAN: "average", Op.FLATTEN: "flatten", Op.SAME: "same",
    Op.ADD: "add", Op.PAD: "pad",
}  # fmt: skip
_POOLS = (Op.MAXPOOL, Op.AVGPOOL, Op.ADAPTIVE_AVGPOOL)
_NONE = (nn.Conv3d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d)
# Axes of what a layer reads here, batch and channels among them.
_RANKS: tuple[tuple[Any, int], ...] = (
    (nn.Linear, 2),
    ((nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d), 3),
    ((nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d), 4),
)
_RANKS_OF_FUNCTIONS: dict[Any, int] = {
    F.adaptive_avg_pool1d: 3, F.avg_pool1d: 3, F.max_pool1d: 3, torch.max_pool1d: 3,
    F.adaptive_avg_pool2d: 4, F.avg_pool2d: 4, F.max_pool2d: 4, torch.max_pool2d: 4,
}  # fmt: skip


def to_integer(
    run: Lives, calibration: Iterable[Any], *, activations: Activations | None = None, bits: int | None = None
) -> IntegerModel:
    """The compressed life of a run as a network in integers alone.

    Convolutions (1-D and 2-D) and linear layers whose weights are a scale a tensor or channel times our integers;
    BatchNorm after them goes into multiplier and bias, alone it is a step of its own; ReLU, ReLU6, pooling, padding (of
    any mode, uneven too), flattening, sums. Activations are unsigned integers with fixed ranges, the result is 32-bit.

        acc = sum of weight * (q - zero_in)                                     in 32 bits
        q_out = clamp((acc * multiplier + offset) >> shift, low, high)          in 64 bits

    Args:
        run: its compressed life is taken, with its BatchNorm statistics. Wrappers (torch.compile, DataParallel,
            AveragedModel) are taken off.
        calibration: batches (inputs, or tuples that start with inputs) to find the ranges of activations with, but
            for those that the run's recipe rounds. Arguments of `forward` beyond the input keep their defaults.
        activations: how ranges are found, and their bits; not method="batchnorm".
        bits: the width of this life, as in `run.compressed(bits=...)`.

    Raises:
        ValueError: a layer or function that is not known, weights that are in full precision or not integers times a
            scale a channel, a sum that could leave 32 bits, no calibration data; with the name of the layer.

    Example:
        >>> import detent as dt
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> grid = dt.Uniform(bits=4, granularity="channel")
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match=r"(0|4).weight", target=grid)]))
        >>> integers = to_integer(run, [torch.randn(32, 1, 4, 4)])
        >>> integers.steps[1].numbers["weight"].shape, integers(torch.randn(5, 1, 4, 4)).shape
        ((4, 1, 3, 3), torch.Size([5, 2]))

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", arXiv 1712.05877.
    """
    settings = activations or Activations()
    if settings.method == "batchnorm":
        raise ValueError('to_integer(activations=...): method="batchnorm" is for ONNX only; give calibration data')
    with run._one_thread("to_integer"):
        encoded = {name: replace(item, form=item.form.to("cpu")) for name, item in run.encoded(bits=bits).items()}
        with run.compressed(bits=bits), unwrapped(run.model) as bare:
            model = copy.deepcopy(bare).cpu().eval()
            trained = take_off(model)
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration: the loader gave no batches")
    if batches is calibration:  # which can be read but once
        calibration = itertools.chain([first], batches)
    return _Builder(model, encoded, settings, _inputs(first), trained).build(calibration)


def _inputs(batch: Any) -> Tensor:
    return (batch[0] if isinstance(batch, (tuple, list)) else batch).cpu()


# --- making them --------------------------------------------------------------------------------------------------


_KEEP_THE_GRID = ("max", "clamp", "flatten", "pad")  # steps


@dataclass(frozen=True)
class _Grid:
    """The integers of one activation."""

    scale: float
    zero: int
    most: int

    @property
    def reach(self) -> int:
        """The largest |q - zero|."""
        return max(self.zero, self.most - self.zero)


class _Recorder(fx.Interpreter):
    """Runs the float model and keeps some of its activations."""

    def __init__(self, module: fx.GraphModule, wanted: Sequence[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = set(wanted)
        self.found: dict[fx.Node, np.ndarray] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        if n in self.wanted:
            self.found[n] = result.detach().float().cpu().numpy().copy()  # a later step may write over it
        return result


@dataclass(kw_only=True)
class _Block:
    """Nodes that become one step: what computes, the BatchNorm and the ReLU behind it."""

    op: str
    node: fx.Node
    norm: fx.Node | None = None
    relu: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        return self.relu or self.norm or self.node


class _Builder:
    """Turns a traced model into steps."""

    def __init__(
        self,
        model: nn.Module,
        encoded: Mapping[str, Encoded],
        settings: Activations,
        x: Tensor,
        trained: Mapping[str, Place],
    ) -> None:
        self.encoded = encoded
        self.trained = trained
        self.settings = settings
        self.modules = dict(model.named_modules())
        found = trace(model, bind(model, x, "calibration"))
        self.traced, self.graph, self.numbers, self.shapes = found.module, found, found.values, dict(found.shapes)
        self._refuse_hooks()
        self.steps: list[Step] = []
        self.grids: dict[fx.Node, _Grid] = {}
        self.source: dict[fx.Node, fx.Node] = {}  # nodes that change nothing, and what they stand for

    # What there is ...................................................................................................

    def _refuse_hooks(self) -> None:
        """Hooks of what is not traced into (layers, and the model itself) would be left out.

        Raises:
            ValueError: a module with one, by name.
        """
        called = {str(node.target) for node in self.traced.graph.nodes if node.op == "call_module"}
        for name in ("", *sorted(called)):
            module = self.modules[name]
            if module._forward_hooks or module._forward_pre_hooks:
                own = f"{name!r}" if name else "the model"
                raise ValueError(
                    f"to_integer: {own} ({type(module).__name__}) has forward hooks, which have no integer form here; "
                    "take them off first"
                )

    def _refuse_rank(self, node: fx.Node, source: fx.Node) -> None:
        """Integer layers take one batch axis and channels on axis 1; PyTorch's also take other axes.

        Raises:
            ValueError: an input with other axes, by name.
        """
        module = self._module(node)
        wanted = next((rank for types, rank in _RANKS if module is not None and isinstance(module, types)), None)
        wanted = _RANKS_OF_FUNCTIONS.get(node.target) if module is None else wanted
        found = self.shapes[source]
        if (wanted is not None and len(found) != wanted) or len(found) < 2:
            what = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
            asked = f"{wanted} axes" if wanted is not None else "a batch and channels"
            raise ValueError(f"to_integer: {node.name!r} ({what}) reads shape {found}; it must have {asked} here")

    def _module(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _op(self, node: fx.Node) -> str:
        """The kind of step a node becomes.

        Raises:
            ValueError: none, naming the node.
        """
        module, op = self._module(node), classify(node, self.modules)
        known = node.target in _RANKS_OF_FUNCTIONS or op not in _POOLS
        known = known if module is None else not isinstance(module, _NONE)
        if op in _STEP_OF and known:
            return _STEP_OF[op]
        if op is Op.MOVE and self._flattens(node):
            return "flatten"
        what = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
        raise ValueError(f"to_integer: {node.name!r} is a {what}, which has no integer form here")

    def _flattens(self, node: fx.Node) -> bool:
        """Whether a view keeps the batch and puts all else in a row: `x.view(x.size(0), -1)`."""
        if node.target not in ("view", "reshape", torch.reshape) or len(node.args) != 3 or node.args[2] != -1:
            return False
        count: Any = node.args[1]
        if not isinstance(count, fx.Node) or tuple(count.args[1:]) != (0,):
            return False
        of = count.all_input_nodes[0]
        of = of.all_input_nodes[0] if of in self.numbers else of  # x.shape[0] or x.size(0)
        return of in self.shapes and self.numbers.get(count) == self.shapes[node.args[0]][0]  # type: ignore[index]

    def _arguments(self, node: fx.Node, **defaults: Any) -> dict[str, Any]:
        """Arguments of a pooling, of a module or a function, behind its input."""
        module = self._module(node)
        if module is not None:
            return {name: getattr(module, name, default) for name, default in defaults.items()}
        given = defaults | dict(zip(defaults, node.args[1:], strict=False)) | dict(node.kwargs)
        return dict(map_arg(given, lambda n: self.numbers[n]))

    def _blocks(self) -> list[_Block]:
        """The model as blocks, in order; every node is in one, or stands for another."""
        blocks: list[_Block] = []
        taken: set[fx.Node] = set()
        for node in self.traced.graph.nodes:
            if node in taken or node.op == "output" or node in self.numbers:
                continue
            if node.op == "placeholder":
                if not blocks:
                    blocks.append(_Block(op="input", node=node))
                elif node.users:
                    raise ValueError(f"to_integer: {node.name!r} is a second input; one is supported")
                continue
            block = _Block(op=self._op(node), node=node)
            if block.op == "same":
                self.source[node] = self._input(node)
                continue
            if block.op in ("conv", "linear"):
                block.norm = self._next(block.last, "scale")
            if block.op in ("conv", "linear", "scale", "add"):
                block.relu = self._next(block.last, "clamp")
            taken |= {n for n in (block.norm, block.relu) if n is not None}
            blocks.append(block)
        return blocks

    def _next(self, node: fx.Node, op: str) -> fx.Node | None:
        """The only user of a node, if it is of a kind."""
        users = list(node.users)
        if len(users) != 1 or users[0].op == "output" or users[0] in self.numbers:
            return None
        return users[0] if self._op(users[0]) == op else None

    def _at(self, value: Any) -> fx.Node:
        """The node that a value stands for.

        Raises:
            ValueError: a number or a list where an activation must be.
        """
        if not isinstance(value, fx.Node):
            raise ValueError(f"to_integer: {value!r} is no activation; sums and layers take activations only")
        return self.source.get(value, value)

    def _input(self, node: fx.Node) -> fx.Node:
        """The one activation that a layer reads."""
        if not node.args:
            raise ValueError(f"to_integer: {node.name!r} is called with keywords; pass its input by position")
        return self._at(node.args[0])

    # Ranges .........................................................................................................

    def _measure(self, nodes: Sequence[fx.Node], calibration: Iterable[Any]) -> None:
        def run(batch: Any) -> list[np.ndarray]:
            recorder = _Recorder(self.traced, nodes)
            with torch.no_grad():
                recorder.run(_inputs(batch))
            self.shapes = recorder.shapes
            return [recorder.found[node] for node in nodes]

        ranges = ranges_from_data(run, calibration, [node.name for node in nodes], self.settings)
        around = self._surroundings()
        for node in nodes:
            low, high = ranges[node.name]
            values = around.get(node, [])
            scale, zero = self.settings.grid(min(low, *values, low), max(high, *values, high))
            self.grids[node] = _Grid(float(scale), zero, 2**self.settings.bits - 1)

    def _learned(self) -> dict[fx.Node, _Grid]:
        """The grids that training found for what goes into layers.

        Raises:
            ValueError: inputs that are rounded without a fixed grid, or one activation rounded to two of them.
        """
        found: dict[fx.Node, tuple[str, _Grid]] = {}
        for block in self.blocks:
            name = str(block.node.target)
            place = self.trained.get(name) if block.op in ("conv", "linear", "scale") else None
            if place is None:
                continue
            to = place.to
            if to is None:
                kind = type(place.quantizer).__name__
                raise ValueError(f"to_integer: what goes into {name!r} is rounded by {kind}, which has no fixed grid")
            at = self._origin(block)
            grid = _Grid(float(to.scale), -to.low, to.high - to.low)
            other, known = found.setdefault(at, (name, grid))
            if known != grid:
                raise ValueError(
                    f"to_integer: {other!r} and {name!r} read one activation and round it to different grids, and "
                    f"integers have one; train with dt.Activation(match={'^' + name + '$'!r}, keep=True) first"
                )
        return {node: grid for node, (_, grid) in found.items()}

    def _surroundings(self) -> dict[fx.Node, list[float]]:
        """What paddings put beside an activation other than 0, so that its grid holds it."""
        found: dict[fx.Node, list[float]] = {}
        for block in self.blocks:
            padding = padding_of(block.node, self.graph) if block.op == "pad" else None
            if padding is not None and padding.mode == "constant" and math.isfinite(padding.value):
                found.setdefault(self._origin(block), []).append(padding.value)
        return found

    def _origin(self, block: _Block) -> fx.Node:
        """The activation whose grid a block reads, before the steps that keep it."""
        at = self._input(block.node)
        while self._maker[at].op in _KEEP_THE_GRID:
            at = self._input(self._maker[at].node)
        return at

    def build(self, calibration: Iterable[Any]) -> IntegerModel:
        """The whole."""
        self.blocks = blocks = self._blocks()
        self._maker = {block.last: block for block in blocks}
        out = next(node for node in self.traced.graph.nodes if node.op == "output").args[0]
        last = self._at(out)
        wide = blocks[-1] if blocks[-1].last is last and blocks[-1].op in ("conv", "linear") else None
        if wide is not None and (wide.relu is not None or len(last.users) != 1):
            wide = None
        measured = ("input", "conv", "linear", "scale", "add", "average")
        learned = self._learned()
        mine = [block.last for block in blocks if block.op in measured and block is not wide]
        self._measure(mine, calibration)
        self.grids |= learned
        for block in blocks:
            self._emit(block, block is wide)
        if self.steps[-1].name != last.name:
            raise ValueError(f"to_integer: the output {last.name!r} is not what is computed last")
        return IntegerModel(self.steps)

    def _emit(self, block: _Block, wide: bool) -> None:
        if block.op != "input":
            self._refuse_rank(block.node, self._input(block.node))
        if block.op == "input":
            grid = self.grids[block.node]
            self._step(block, (), {"low": 0, "high": grid.most, "shape": self.shapes[block.node][1:]}, grid)
        elif block.op in ("conv", "linear", "scale"):
            self._layer(block, wide)
        elif block.op == "add":
            self._sum(block)
        elif block.op == "average":
            self._mean(block)
        elif block.op == "pad":
            padding = padding_of(block.node, self.graph)
            if padding is None:
                raise ValueError(f"to_integer: {block.node.name!r} pads in a way that has no integer form here")
            source = self._input(block.node)
            rank = len(self.shapes[source])
            self._pad(block.last.name, source, padding, [padding.of(axis, rank) for axis in range(rank)])
            self.grids[block.last] = self.grids[source]
        else:
            self._shape(block)

    def _step(self, block: _Block, inputs: Sequence[fx.Node | str], numbers: Mapping[str, Any], grid: _Grid) -> None:
        name = block.last.name
        self.grids[block.last] = grid
        self.steps.append(
            Step(
                op=block.op,
                name=name,
                inputs=tuple(each if isinstance(each, str) else each.name for each in inputs),
                numbers=numbers,
                scale=grid.scale,
                zero=grid.zero,
            )
        )

    def _limits(self, relu: fx.Node | None, grid: _Grid) -> tuple[int, int]:
        """What a ReLU leaves of the integers of a grid."""
        if relu is None:
            return 0, grid.most
        six = isinstance(self._module(relu), nn.ReLU6) or relu.target is F.relu6
        return grid.zero, min(grid.most, grid.zero + int(np.rint(6 / grid.scale))) if six else grid.most

    def _pad(self, name: str, source: fx.Node, padding: Padding, sides: Sequence[tuple[int, int]]) -> None:
        """A step that surrounds an activation; 0 is the zero point, so it stays exact.

        Raises:
            ValueError: a padded batch, channels that are padded with one another, a value no integer stands for.
        """
        grid, constant = self.grids[source], padding.mode == "constant"
        if sides[0] != (0, 0) or (not constant and (sides[1] != (0, 0) or min(min(each) for each in sides) < 0)):
            raise ValueError(f"to_integer: {name!r} pads in a way that has no integer form here; pad positions only")
        if not math.isfinite(padding.value):
            raise ValueError(f"to_integer: {name!r} pads with {padding.value}, which no integer stands for")
        value = int(np.clip(np.rint(padding.value / grid.scale) + grid.zero, 0, grid.most))
        numbers = {"sides": tuple(sides[1:]), "mode": padding.mode, "value": value}
        self.steps.append(
            Step(op="pad", name=name, inputs=(source.name,), numbers=numbers, scale=grid.scale, zero=grid.zero)
        )

    # Layers .........................................................................................................

    def _layer(self, block: _Block, wide: bool) -> None:
        """Weights, bias, multiplier and shift of a convolution, a linear layer, or a BatchNorm alone."""
        node, module = block.node, self._module(block.node)
        source = self._input(node)
        given = self.grids[source]
        if block.op == "scale":
            weight, scale = np.ones((module.num_features, 1), dtype=np.int64), np.ones(module.num_features)
            bias, norm = np.zeros(module.num_features), module
        else:
            weight, scale = self._weights(str(node.target), module)
            bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().numpy()
            norm = None if block.norm is None else self._module(block.norm)
        if norm is not None:
            gain, shift = _affine(norm)
            scale, bias = scale * gain, bias * gain + shift
        unit = scale * given.scale  # what one unit of the sum is worth, by channel; negative with a negative gain
        self._check(node.name, int(np.abs(weight).reshape(len(weight), -1).sum(axis=1).max()) * given.reach)
        if wide:
            # As fine as the coarsest channel, but not so fine that the bias takes all the bits.
            grid = _Grid(max(float(np.abs(unit).max()), 2.0**-19 * float(np.abs(bias).max())) or 1.0, 0, INT32)
            low, high = -INT32 - 1, INT32
        else:
            grid = self.grids[block.last]
            low, high = self._limits(block.relu, grid)
        numbers: dict[str, Any] = {"zero_in": given.zero, "low": low, "high": high}
        numbers |= _fixed(unit / grid.scale, bias / grid.scale + grid.zero, node.name)
        if block.op != "scale":
            numbers["weight"] = weight
        read = source.name
        if block.op == "conv":
            sides = _sides(module)
            even = module.padding_mode == "zeros" and all(front == behind for front, behind in sides)
            if not even:
                read = f"{node.name}.padded"
                mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
                self._pad(read, source, Padding(sides=(), mode=mode, value=0.0), [(0, 0), (0, 0), *sides])
            numbers |= {"stride": tuple(module.stride), "padding": tuple(side[0] * even for side in sides)}
            numbers |= {"dilation": tuple(module.dilation), "groups": module.groups}
        self._step(block, (read,), numbers, grid)

    def _weights(self, name: str, module: Any) -> tuple[np.ndarray, np.ndarray]:
        """(integers, one scale an output channel), from our codes.

        Raises:
            ValueError: the layer is in full precision, or no integers times a scale a channel.
        """
        key = canonical_name(f"{name}.weight")
        found = self.encoded.get(key)
        if found is None:
            raise ValueError(f"to_integer: {key!r} is in full precision; give it a rule such as Uniform(bits=8)")
        form = grid_of(found.form)
        if form is not None and int(form.steps.abs().max()) <= 127:
            groups = granularity_of(form.granularity)
            by_row = isinstance(groups, Channel) and form.layout.is_row_major and not form.layout.batch_axes
            if by_row or isinstance(groups, PerTensor):
                scale = torch.ones(1) if form.scale is None else form.scale
                whole = form.integers.to(torch.int64).numpy()
                return whole, scale.double().expand(len(whole)).numpy().copy()
        raise ValueError(
            f"to_integer: {key!r} lies on {short(found.target)}, which is not integers of 8 bits times one scale a "
            'tensor or channel; use Uniform(granularity="channel")'
        )

    def _check(self, name: str, bound: int) -> None:
        if bound > INT32:
            raise ValueError(
                f"to_integer: the sums of {name!r} can reach {bound:,}, which does not fit in 32 bits ({INT32:,}); use "
                "fewer bits"
            )

    # Everything else ................................................................................................

    def _sum(self, block: _Block) -> None:
        if len(block.node.args) != 2 or block.node.kwargs:
            raise ValueError(f"to_integer: {block.node.name!r} must be the plain sum of two activations")
        inputs = [self._at(arg) for arg in block.node.args]
        given, grid = [self.grids[n] for n in inputs], self.grids[block.last]
        ratios = [g.scale / grid.scale for g in given]
        # The larger multiplier has 21 bits, so that both products of 8-bit numbers and their sum fit in 32.
        shift = 21 - math.frexp(max(ratios))[1]
        if not 1 <= shift <= 30:
            raise ValueError(f"to_integer: {block.node.name!r} adds numbers of ranges too far apart ({ratios})")
        multipliers = tuple(round(math.ldexp(r, shift)) for r in ratios)
        bound = sum(g.reach * m for g, m in zip(given, multipliers, strict=True)) + 2 ** (shift - 1)
        self._check(block.node.name, bound)
        low, high = self._limits(block.relu, grid)
        numbers = {"multipliers": multipliers, "shift": shift, "zeros_in": tuple(g.zero for g in given)}
        self._step(block, inputs, {**numbers, "zero": grid.zero, "low": low, "high": high}, grid)

    def _mean(self, block: _Block) -> None:
        source = self._input(block.node)
        given, grid = self.grids[source], self.grids[block.node]
        window = self._window(block.node, source)
        flat = len(self.shapes[block.node]) == 2
        count = math.prod(window["kernel"])
        self._check(block.node.name, count * given.reach)
        numbers = _fixed(np.array([given.scale / count / grid.scale]), np.array([grid.zero]), block.node.name)
        numbers |= {"zero_in": given.zero, "flat": flat}
        self._step(block, (source,), {**window, **numbers, "low": 0, "high": grid.most}, grid)

    def _window(self, node: fx.Node, source: fx.Node) -> dict[str, tuple[int, ...]]:
        """Kernel, stride and padding of an average.

        Raises:
            ValueError: windows of different sizes.
        """
        module = self._module(node)
        spatial = tuple(self.shapes[source][2:])
        name = f"to_integer: {node.name!r}"
        if classify(node, self.modules) is Op.AVGPOOL:
            given = self._arguments(
                node, kernel_size=None, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
                divisor_override=None,
            )  # fmt: skip
            given["stride"] = given["stride"] or given["kernel_size"]
            kernel, stride, padding = (_pair(given[key], len(spatial)) for key in ("kernel_size", "stride", "padding"))
            uneven = given["ceil_mode"] or given["divisor_override"]
            if uneven or (any(padding) and not given["count_include_pad"]):
                raise ValueError(f"{name} averages windows of different sizes, which has no integer form here")
            return {"kernel": kernel, "stride": stride, "padding": padding}
        if node.target in (torch.mean, "mean"):
            asked: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            dims = [asked] if isinstance(asked, int) else list(asked or ())
            if not spatial or sorted(d % (len(spatial) + 2) for d in dims) != list(range(2, len(spatial) + 2)):
                raise ValueError(f"{name} must be the mean over all positions")
            sides: tuple[int, ...] = (1,) * len(spatial)
        else:
            asked = module.output_size if module is not None else (*node.args[1:], *node.kwargs.values())[0]
            sides = tuple(s if o is None else int(o) for o, s in zip(_pair(asked, len(spatial)), spatial, strict=True))
        if any(s % o for s, o in zip(spatial, sides, strict=True)):
            raise ValueError(f"{name} averages windows of different sizes, which has no integer form here")
        kernel = tuple(s // o for s, o in zip(spatial, sides, strict=True))
        return {"kernel": kernel, "stride": kernel, "padding": (0,) * len(spatial)}

    def _shape(self, block: _Block) -> None:
        """Steps that leave the grid as it is: largest values, ReLU alone, flattening."""
        node, module, source = block.node, self._module(block.node), self._input(block.node)
        grid = self.grids[source]
        numbers: dict[str, Any] = {}
        if block.op == "clamp":
            low, high = self._limits(node, grid)
            numbers = {"low": low, "high": high}
            read: Any = node.args[0]
            if len(read.users) > 1 and (getattr(module, "inplace", False) or node.target == "relu_"):
                raise ValueError(f"to_integer: {node.name!r} writes over what others read; use ReLU(inplace=False)")
        elif block.op == "max":
            dims = len(self.shapes[source]) - 2
            given = self._arguments(
                node, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
            )  # fmt: skip
            if given["return_indices"]:
                raise ValueError(f"to_integer: {node.name!r} returns indices, which has no integer form here")
            given["stride"] = given["stride"] or given["kernel_size"]
            numbers = {"kernel": _pair(given["kernel_size"], dims), "ceil": bool(given["ceil_mode"])}
            numbers |= {key: _pair(given[key], dims) for key in ("stride", "padding", "dilation")}
        elif not self._flattens(node):
            ends = (module.start_dim, module.end_dim) if module is not None else (*node.args[1:], *node.kwargs.values())
            if ends not in ((1,), (1, -1)):
                raise ValueError(f"to_integer: {node.name!r} must flatten all axes but the first")
        self._step(block, (source,), numbers, grid)


def _pair(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims


def _sides(module: Any) -> list[tuple[int, int]]:
    """(in front, behind) of every axis of positions that a convolution pads, as PyTorch does: behind where uneven."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(side, side) for side in module.padding]


def _affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """BatchNorm in eval mode as `gain * x + shift`, in float64.

    Raises:
        ValueError: one without running statistics.
    """
    if norm.running_mean is None:
        raise ValueError("to_integer: a BatchNorm without running statistics is no fixed function")
    root = np.sqrt(norm.running_var.double().numpy() + norm.eps)
    gain = (norm.weight.detach().double().numpy() if norm.affine else np.ones(len(root))) / root
    shift = norm.bias.detach().double().numpy() if norm.affine else np.zeros(len(root))
    return gain, shift - norm.running_mean.double().numpy() * gain


def _fixed(ratio: np.ndarray, start: np.ndarray, name: str) -> dict[str, Any]:
    """`ratio * acc + start`, rounded, as `(acc * multiplier + offset) >> shift`.

    Multipliers have 31 bits, or fewer where the offset leaves no room for so large a shift; the shift is then at least
    31, so that a sum of 31 bits is off by half a step at most (2^-10 of one for offsets below 2^20 steps).

    Raises:
        ValueError: numbers too large for that.
    """
    room = 61 - np.frexp(start)[1].astype(np.int64)
    fraction, exponent = np.frexp(ratio)
    shift = np.minimum(31 - exponent.astype(np.int64), room)
    multiplier = np.rint(np.ldexp(fraction, exponent + shift)).astype(np.int64)
    full = np.abs(multiplier) == 2**31
    multiplier, shift = np.where(full, multiplier // 2, multiplier), np.where(full, shift - 1, shift)
    if (shift < 1).any() or (room < 31).any():
        raise ValueError(
            f"to_integer: {name!r} multiplies by {float(np.abs(ratio).max()):.3g} and adds "
            f"{float(np.abs(start).max()):.3g} steps of its output, which leaves no room in 64 bits"
        )
    half = np.ones_like(shift) << (shift - 1)
    return {
        "multiplier": multiplier,
        "shift": shift,
        "offset": np.rint(np.ldexp(start.astype(np.float64), shift)).astype(np.int64) + half,
    }
