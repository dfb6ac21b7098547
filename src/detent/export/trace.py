"""One tracer for the exports that read a model's graph, and one table of what its nodes compute.

`trace` runs `torch.fx` on a model with the inputs of an example and records what every node gives. `classify` names
the operation of a node (`Op`); `export.links` and `export.integer` both decide by that name, so that a module, a
function and a method that compute the same thing are the same thing.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

from detent.export.calling import Call

__all__ = ["CONVS", "LAYERS", "TRANSPOSED", "Op", "Padding", "Traced", "called", "classify", "padding_of", "trace"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)


class Op(Enum):
    """What a node computes."""

    CONV = auto()
    TRANSPOSED = auto()
    LINEAR = auto()
    BATCHNORM = auto()
    INSTANCENORM = auto()
    GROUPNORM = auto()
    LAYERNORM = auto()  # over the last axes; RMSNorm too
    RELU = auto()  # and ReLU6
    ACTIVATION = auto()  # any other function of one number
    SAME = auto()  # gives what it gets in eval mode
    MAXPOOL = auto()
    AVGPOOL = auto()
    ADAPTIVE_MAXPOOL = auto()
    ADAPTIVE_AVGPOOL = auto()
    PAD = auto()
    RESIZE = auto()
    FLATTEN = auto()
    MOVE = auto()  # elements change places, none changes its value
    SPLIT = auto()  # into a tuple
    ITEM = auto()
    GLU = auto()
    ADD = auto()
    MUL = auto()
    ELEMENTWISE = auto()  # any other function of two numbers
    CAT = auto()
    MEAN = auto()
    SOFTMAX = auto()
    MATMUL = auto()
    ATTENTION = auto()
    OTHER = auto()


_MODULES: dict[Op, tuple[type[nn.Module], ...]] = {
    Op.CONV: CONVS,
    Op.TRANSPOSED: TRANSPOSED,
    Op.LINEAR: (nn.Linear,),
    Op.BATCHNORM: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    Op.INSTANCENORM: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    Op.GROUPNORM: (nn.GroupNorm,),
    Op.LAYERNORM: (nn.LayerNorm, nn.RMSNorm),
    Op.RELU: (nn.ReLU, nn.ReLU6),
    Op.ACTIVATION: (
        *(nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish),
        *(nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Softplus, nn.Softsign),
        *(nn.Softshrink, nn.Hardshrink),
    ),
    Op.SAME: (
        *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        nn.FeatureAlphaDropout,
    ),
    Op.MAXPOOL: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    Op.AVGPOOL: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    Op.ADAPTIVE_MAXPOOL: (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    Op.ADAPTIVE_AVGPOOL: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    Op.PAD: (
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
        *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d),
        *(nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    ),
    Op.RESIZE: (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    Op.FLATTEN: (nn.Flatten,),
    Op.MOVE: (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unflatten),
    Op.GLU: (nn.GLU,),
    Op.SOFTMAX: (nn.Softmax, nn.LogSoftmax, nn.Softmin),
}
# Functions, and methods by their names; a trailing underscore (in place) is taken off before.
_FUNCTIONS: dict[Op, tuple[Any, ...]] = {
    Op.RELU: (F.relu, torch.relu, F.relu6, "relu"),
    Op.ACTIVATION: (
        *(F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid),
        *(F.sigmoid, F.logsigmoid, F.tanh, F.tanhshrink, F.softplus, F.softsign, F.softshrink, F.hardshrink),
        *(torch.selu, torch.celu, torch.sigmoid, torch.tanh, torch.clamp, torch.clip, torch.abs, torch.neg),
        *(torch.exp, torch.sqrt, torch.square, torch.sin, torch.cos, torch.erf, operator.neg, operator.abs, abs),
        *("sigmoid", "tanh", "clamp", "clip", "abs", "neg", "exp", "sqrt", "square", "erf", "sin", "cos"),
    ),
    Op.SAME: ("contiguous", "clone", "detach", "float", torch.clone),
    Op.MAXPOOL: (*(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),),
    Op.AVGPOOL: (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    Op.ADAPTIVE_MAXPOOL: (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    Op.ADAPTIVE_AVGPOOL: (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    Op.PAD: (F.pad, torch.constant_pad_nd),
    Op.RESIZE: (F.interpolate, F.upsample),
    Op.FLATTEN: (torch.flatten, "flatten"),
    Op.MOVE: (
        *("view", "reshape", "unflatten", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis"),
        *("squeeze", "unsqueeze", "expand", "repeat", "flip", "roll", "narrow", "select"),
        *(torch.reshape, torch.unflatten, torch.permute, torch.transpose, torch.t, torch.swapaxes, torch.swapdims),
        *(torch.movedim, torch.moveaxis, torch.squeeze, torch.unsqueeze, torch.flip, torch.roll, torch.narrow),
        *(torch.select, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, torch.channel_shuffle),
    ),
    Op.SPLIT: ("chunk", "split", "unbind", "tensor_split", torch.chunk, torch.split, torch.unbind, torch.tensor_split),
    Op.ITEM: (operator.getitem,),
    Op.GLU: (F.glu,),
    Op.ADD: (operator.add, operator.iadd, torch.add, "add"),
    Op.MUL: (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "multiply"),
    Op.ELEMENTWISE: (
        *(operator.sub, operator.isub, torch.sub, "sub", operator.truediv, operator.itruediv, torch.div, "div"),
        *(operator.pow, torch.pow, "pow", torch.maximum, torch.minimum, "maximum", "minimum"),
    ),
    Op.CAT: (torch.cat, torch.concat, torch.concatenate),
    Op.MEAN: (torch.mean, "mean"),
    Op.SOFTMAX: (F.softmax, F.log_softmax, F.softmin, torch.softmax, torch.log_softmax, "softmax", "log_softmax"),
    Op.MATMUL: (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"),
    Op.ATTENTION: (F.scaled_dot_product_attention,),
}
_OF_MODULE = {kind: op for op, kinds in _MODULES.items() for kind in kinds}
_OF_FUNCTION = {function: op for op, functions in _FUNCTIONS.items() for function in functions}


def classify(node: fx.Node, modules: Mapping[str, nn.Module]) -> Op:
    """The operation of a node of a traced model in eval mode.

    The classes of the table count, and subclasses that compute as they do (no `forward` of their own); a module that is
    parametrized or whose `forward` was replaced may compute anything, and so does dropout that is on.

    Example:
        >>> from detent.export.calling import bind
        >>> net = nn.Sequential(nn.Flatten(), nn.ReLU())
        >>> traced = trace(net, bind(net, torch.zeros(1, 2)))
        >>> [classify(node, traced.modules).name for node in traced.nodes]
        ['OTHER', 'FLATTEN', 'RELU', 'OTHER']
    """
    if node.op == "call_module":
        return _of_module(modules[str(node.target)])
    if node.op == "call_function":
        if node.target is F.dropout:
            off = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is False
            return Op.SAME if off else Op.OTHER
        return _OF_FUNCTION.get(node.target, Op.OTHER)
    if node.op == "call_method":
        return _OF_FUNCTION.get(str(node.target).removesuffix("_"), Op.OTHER)
    return Op.OTHER


def _of_module(module: nn.Module) -> Op:
    kind = next((kind for kind in type(module).__mro__ if kind in _OF_MODULE), None)
    if kind is None or "forward" in vars(module) or is_parametrized(module):
        return Op.OTHER
    same = all(
        getattr(type(module), name, None) is getattr(kind, name, None)
        for name in ("forward", "__call__", "_conv_forward", "_check_input_dim")
    )
    return _OF_MODULE[kind] if same else Op.OTHER


def called(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """A node in words."""
    if node.op == "placeholder":
        return f"the input {str(node.target)!r}"
    if node.op == "output":
        return "the output"
    if node.op == "get_attr":
        return f"the parameter {node.target!r}"
    if node.op == "call_module":
        return f"{node.target!r} ({type(modules[str(node.target)]).__name__})"
    return repr(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target)))


@dataclass(frozen=True, kw_only=True)
class Padding:
    """What a padding puts around a tensor.

    Args:
        sides: (in front, behind) of every axis that `F.pad` names, the last axis first; negative numbers cut off.
        mode: "constant", "reflect", "replicate" or "circular".
        value: of the constant.
    """

    sides: tuple[tuple[int, int], ...]
    mode: str
    value: float

    def of(self, axis: int, rank: int) -> tuple[int, int]:
        """(in front, behind) of an axis.

        Example:
            >>> Padding(sides=((0, 1), (2, 0)), mode="constant", value=0.0).of(2, 4)
            (2, 0)
        """
        back = rank - 1 - axis
        return self.sides[back] if back < len(self.sides) else (0, 0)


_PADDINGS = {"Zero": "constant", "Constant": "constant", "Reflection": "reflect", "Replication": "replicate"}


def padding_of(node: fx.Node, traced: Traced) -> Padding | None:
    """What a node of `Op.PAD` does, or `None` where it is not a plain number of places on each side."""
    value: Any
    if node.op == "call_module":
        module: Any = traced.modules[str(node.target)]
        flat, value = module.padding, getattr(module, "value", 0.0)
        kind = type(module).__name__
        mode = next((mode for start, mode in _PADDINGS.items() if kind.startswith(start)), "circular")
        if len(traced.shapes[node]) != len(flat) // 2 + 2:
            return None  # without a batch
    else:
        plain = node.target is torch.constant_pad_nd
        given = dict(
            zip(("input", "pad", "value") if plain else ("input", "pad", "mode", "value"), node.args, strict=False)
        )
        given |= node.kwargs
        flat, mode, value = given.get("pad"), given.get("mode", "constant"), given.get("value") or 0.0
    if not isinstance(flat, (tuple, list)) or not isinstance(value, (int, float)) or not isinstance(mode, str):
        return None
    numbers = [traced.values.get(side) if isinstance(side, fx.Node) else side for side in flat]
    if not all(isinstance(side, int) for side in numbers):
        return None
    sides: Any = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    return Padding(sides=sides, mode=mode, value=float(value))


# --- tracing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A traced model and what its nodes gave on the example.

    Args:
        module: the graph, with the model's own submodules.
        modules: the model's submodules, by name.
        shapes: of every node that is one tensor.
        devices: of the same.
        values: of every node that is a number or a tuple of numbers.
    """

    module: fx.GraphModule
    modules: Mapping[str, nn.Module]
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    devices: dict[fx.Node, torch.device] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order of the calls."""
        return list(self.module.graph.nodes)


# torch's transformers in terms of their parts, where they are called without masks.
_INPUTS = ("src", "tgt", "memory")


def _stack(module: Any, x: Any, *memory: Any) -> Any:
    for layer in module.layers:
        x = layer(x, *memory)
    return x if module.norm is None else module.norm(x)


_STACKS: dict[Any, Callable[..., Any]] = {
    nn.TransformerEncoder: lambda module, src, *masks, **without: _stack(module, src),
    nn.TransformerDecoder: lambda module, tgt, memory, *masks, **without: _stack(module, tgt, memory),
    nn.Transformer: lambda module, src, tgt, *masks, **without: module.decoder(tgt, module.encoder(src)),
}


def _opened(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """What one of torch's transformer modules does in terms of its parts, where it is called without masks.

    Its own `forward` asks its inputs for sizes and kinds, to choose kernels and to check masks.
    """
    kind: Any = type(module)
    if kind not in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, *_STACKS) or "forward" in vars(module):
        return None
    given = inspect.signature(kind.forward).bind(module, *args, **kwargs).arguments
    if any(value is not None and value is not False for name, value in list(given.items())[1:] if name not in _INPUTS):
        return None
    return partial(_STACKS.get(kind, kind.forward), module)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without the fused kernel of `TransformerEncoderLayer`, for which it asks its inputs for sizes."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Tracer(fx.Tracer):
    """Gives the model a placeholder for every tensor of a call; all else is the call's own, or keeps its default."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or _of_module(m) is not Op.OTHER

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        inside = _opened(m, args, kwargs)
        return super().call_module(m, forward, args, kwargs) if inside is None else inside(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        names = {id(value): name for name, value in self._call.arguments.items()}
        given: list[str] = []

        def placeholder(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            name = names.get(id(value))
            given.append(name if name and name not in given else f"{name or 'input'}_{len(given)}")
            return self.create_proxy("placeholder", given[-1], (), {})

        args, kwargs = tree_map(placeholder, (self._call.args, dict(self._call.kwargs)))
        inside = _opened(self.root, args, kwargs) or partial(root_fn, self.root)
        return (lambda: inside(*args, **kwargs)), []


class _Recorder(fx.Interpreter):
    """Runs the graph once and keeps shapes, devices and numbers."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.module)
        self._traced = traced

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self._traced.shapes[n], self._traced.devices[n] = tuple(result.shape), result.device
        elif not (isinstance(result, (tuple, list)) and any(isinstance(part, Tensor) for part in result)):
            self._traced.values[n] = result
        return result


def trace(model: nn.Module, call: Call) -> Traced:
    """Trace a model in eval mode as it is called.

    Args:
        model: unwrapped, in eval mode.
        call: from `bind`.

    Raises:
        ValueError: torch.fx cannot trace it, or it does not run on the example.

    Example:
        >>> from detent.export.calling import bind
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> found = trace(net, bind(net, torch.zeros(4, 2)))
        >>> [found.shapes[node] for node in found.nodes if node.op == "call_module"]
        [(4, 3), (4, 3)]
    """
    try:
        tracer = _Tracer(call)
        with _plain_kernels():
            graph = tracer.trace(model)
        traced = Traced(module=fx.GraphModule(tracer.root, graph), modules=dict(model.named_modules()))
        with torch.no_grad():
            _Recorder(traced).run(*call.tensors)
    except Exception as error:
        raise ValueError(f"torch.fx cannot trace this {type(model).__name__}: {error}") from error
    return traced
