"""Which channels of a traced model are constant, which are used, and which can only go together.

A unit is one output channel of a convolution or one output of a linear layer, with everything that follows it channel
by channel (BatchNorm, activations, pooling, flattening). It is *unused* where no later layer has a weight for it, and
*constant* where it has no incoming weights left, so that it gives the same number whatever the input. Both are found
on the traced graph: constants forwards, use backwards, in turns until nothing changes. `export.slim` is what uses this.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from detent.parameters import canonical_name

__all__ = ["CONVS", "ChannelGraph", "grouped"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Modules and functions that treat every channel alone and by the same rule.
_BY_CHANNEL = (
    *_BATCHNORMS,
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_FUNCTIONS: frozenset[Any] = frozenset(
    [
        *(torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish),
        *(F.hardsigmoid, torch.sigmoid, F.sigmoid, torch.tanh, F.tanh, F.softplus, F.dropout, torch.clamp, torch.abs),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    ]
)
_METHODS = {"relu", "relu_", "sigmoid", "tanh", "clamp", "abs", "contiguous", "clone", "detach", "float"}
_SUMS: frozenset[Any] = frozenset([operator.add, operator.iadd, torch.add, "add", "add_"])
_SUMS_IN_PLACE: frozenset[Any] = frozenset([operator.iadd, "add_", "relu_"])
_PRODUCTS: frozenset[Any] = frozenset([operator.mul, torch.mul, "mul"])
_UNCOUNTED = {"size", "shape", "dim"}


# --- the graph ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Value:
    """What is known of the channels of one tensor of the graph.

    `constant` holds a channel's number, NaN where it depends on the input; `needed` whether anything uses it.
    """

    shape: tuple[int, ...]
    axis: int
    constant: Tensor
    needed: Tensor
    ids: list[int] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.shape[self.axis]


class _Shapes(fx.Interpreter):
    """Runs the graph once and keeps the shape and device of every tensor in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.devices: dict[fx.Node, torch.device] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n], self.devices[n] = tuple(result.shape), result.device
        return result


class ChannelGraph:
    """A traced model with what is known of its channels; `fold` changes its weights, `remove` its shapes."""

    def __init__(self, model: nn.Module, example: Sequence[Tensor], locked: Iterable[str] = ()) -> None:
        """Trace the model, which must be in eval mode.

        Args:
            model: in eval mode.
            example: what it is called with.
            locked: canonical names of parameters that must stay as they are.

        Raises:
            ValueError: it cannot be traced.
        """
        self.model = model
        self.locked = set(locked)
        try:
            traced = fx.symbolic_trace(model)
            with torch.no_grad():
                run = _Shapes(traced)
                run.run(*example)
        except Exception as error:
            raise ValueError(
                f"torch.fx cannot trace this {type(model).__name__}, so its dead units cannot be found: {error}"
            ) from error
        self.nodes = list(traced.graph.nodes)
        self.modules = dict(model.named_modules())
        self.names = {id(p): canonical_name(name) for name, p in model.named_parameters()}
        self.values: dict[fx.Node, _Value] = {}
        self.calls: dict[str, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)] = self.calls.get(str(node.target), 0) + 1
        self.owners: dict[int, set[str]] = {}
        for name, module in self.modules.items():
            for param in module.parameters(recurse=False):
                self.owners.setdefault(id(param), set()).add(name)
        for node in self.nodes:
            if node.op == "get_attr":  # used by a function, past its module
                module, _, name = str(node.target).rpartition(".")
                param = getattr(self.modules[module], name, None)
                self.owners.setdefault(id(param), set()).add("")
        for node in self.nodes:
            if node in run.shapes and len(run.shapes[node]) >= 2:
                shape, device = run.shapes[node], run.devices[node]
                axis = self._axis(node, shape)
                # Beside the weights that they are compared with, which may be on an accelerator.
                unknown = torch.full((shape[axis],), math.nan, dtype=torch.float64, device=device)
                unneeded = torch.zeros(shape[axis], dtype=torch.bool, device=device)
                self.values[node] = _Value(shape=shape, axis=axis, constant=unknown, needed=unneeded)
        self.kinds = {node: self._kind(node) for node in self.nodes}
        self.unused: dict[str, set[int]] = {}
        self.folded: dict[str, set[int]] = {}
        self.stuck: dict[tuple[str, int], str] = {}

    # What each node is ..............................................................................................

    def _axis(self, node: fx.Node, shape: tuple[int, ...]) -> int:
        if self._is_linear(node):
            return len(shape) - 1
        same = [self.values[n] for n in node.all_input_nodes if n in self.values]
        same = [value for value in same if len(value.shape) == len(shape)]
        if same:
            return same[0].axis
        # Channels come last where a linear layer reads them, and second everywhere else.
        return len(shape) - 1 if any(self._is_linear(user) for user in node.users) else 1

    def _is_linear(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], nn.Linear)

    def module_of(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)]

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that are tensors with channels."""
        return [n for n in node.all_input_nodes if n in self.values]

    def _kind(self, node: fx.Node) -> str:
        """ "weighted", "channel", "sum", "product", "concat", "flatten", "mean", "nothing" or "other"."""
        if node.op in ("placeholder", "output"):
            return "other"
        if node not in self.values:
            return "nothing" if self._is_count(node) else "other"
        found = self._kind_of_call(node)
        mutates = node.target in _SUMS_IN_PLACE or (
            node.op == "call_module" and bool(getattr(self.module_of(node), "inplace", False))
        )
        mutates = mutates or bool(node.kwargs.get("inplace", False))
        if mutates and any(len(n.users) > 1 for n in node.all_input_nodes):
            return "other"  # whoever else reads the input sees what was written over it
        return found

    def _is_count(self, node: fx.Node) -> bool:
        """Whether a node only asks how many samples there are."""
        args: tuple[Any, ...] = tuple(node.args)
        if node.op == "call_method" and node.target == "size":
            return args[1:] == (0,)
        if node.op != "call_function":
            return False
        if node.target is getattr:
            users: list[Any] = list(node.users)
            return args[1] == "shape" and all(u.target is operator.getitem and u.args[1] == 0 for u in users)
        # Of a shape, which is no tensor.
        return node.target is operator.getitem and args[1] == 0 and args[0] not in self.values

    def _kind_of_call(self, node: fx.Node) -> str:
        args: list[Any] = list(node.args)
        inputs = self.inputs(node)
        first = self.values[inputs[0]] if inputs else None
        mine = self.values[node]
        if first is None:
            return "other"
        if node.op == "call_module":
            return self._kind_of_module(node, first, mine)
        if (node.target in _FUNCTIONS or node.target in _METHODS) and len(node.all_input_nodes) == 1:
            return "channel" if (first.channels, first.axis) == (mine.channels, mine.axis) else "other"
        if node.target in _SUMS or node.target in _PRODUCTS:
            fits = all((self.values[n].channels, self.values[n].axis) == (mine.channels, mine.axis) for n in inputs)
            whole = len(inputs) == len(node.all_input_nodes) and not node.kwargs
            same = all(len(self.values[n].shape) == len(mine.shape) for n in inputs)
            known = all(isinstance(a, (fx.Node, int, float)) for a in args)
            if not (fits and whole and same and known):
                return "other"
            return "sum" if node.target in _SUMS else "product"
        if node.target in (torch.cat, torch.concat):
            axis = node.kwargs.get("dim", args[1] if len(args) > 1 else 0)
            aligned = all(self.values[n].axis == mine.axis for n in inputs)
            listed = isinstance(args[0], (list, tuple)) and list(args[0]) == inputs
            fits = isinstance(axis, int) and axis % len(mine.shape) == mine.axis
            return "concat" if aligned and listed and fits else "other"
        if node.target in (torch.flatten, "flatten"):
            return "flatten" if self._flattens(args[1:], node.kwargs, first, mine) else "other"
        if node.target in ("view", "reshape", torch.reshape):
            asked = args[1:]
            asked = asked[0] if len(asked) == 1 and isinstance(asked[0], (list, tuple)) else asked
            fits = len(asked) == 2 and asked[1] == -1 and first.axis == 1 and mine.shape[0] == first.shape[0]
            return "flatten" if fits else "other"
        if node.target in (torch.mean, "mean"):
            dims = args[1] if len(args) > 1 else node.kwargs.get("dim")
            dims = [dims] if isinstance(dims, int) else dims
            if not isinstance(dims, (list, tuple)) or first.axis != 1 or mine.axis != 1:
                return "other"
            far = all(isinstance(d, int) and d % len(first.shape) > 1 for d in dims)
            return "mean" if far and mine.channels == first.channels else "other"
        return "other"

    def _kind_of_module(self, node: fx.Node, first: _Value, mine: _Value) -> str:
        module = self.module_of(node)
        parts = list(module.parameters(recurse=False))
        shared = self.calls[str(node.target)] > 1 or any(len(self.owners[id(p)]) > 1 for p in parts)
        if module._forward_hooks or module._forward_pre_hooks or (shared and parts):
            return "other"
        if type(module) in CONVS:
            return "weighted" if first.axis == 1 and len(first.shape) == module.weight.dim() else "other"
        if type(module) is nn.Linear:
            return "weighted" if first.axis == len(first.shape) - 1 else "other"
        if type(module) is nn.Flatten:
            return "flatten" if self._flattens((module.start_dim, module.end_dim), {}, first, mine) else "other"
        if getattr(module, "return_indices", False) or type(module) not in _BY_CHANNEL:
            return "other"
        if isinstance(module, (*_BATCHNORMS, nn.PReLU)) and first.axis != 1:
            return "other"
        if isinstance(module, _BATCHNORMS) and module.running_mean is None:
            return "other"  # what it gives depends on the batch
        return "channel" if (first.channels, first.axis) == (mine.channels, mine.axis) else "other"

    @staticmethod
    def _flattens(args: Sequence[Any], kwargs: Mapping[str, Any], first: _Value, mine: _Value) -> bool:
        start = args[0] if args else kwargs.get("start_dim", 0)
        end = args[1] if len(args) > 1 else kwargs.get("end_dim", -1)
        return first.axis == 1 and (start, end % len(first.shape)) == (1, len(first.shape) - 1) and mine.axis == 1

    # What is constant, forwards .....................................................................................

    def _evaluate(self, node: fx.Node, known: Mapping[fx.Node, Tensor]) -> Tensor:
        """The node on tensors whose channels are constant; a channel of the result, or NaN where it is not."""

        def tensor_of(n: fx.Node) -> Any:
            if n not in known:
                return n
            value = self.values[n]
            shape = [1] * len(value.shape)
            shape[value.axis] = -1
            return known[n].reshape(shape).expand((1, *value.shape[1:])).clone()

        args = map_arg(node.args, tensor_of)
        kwargs = map_arg(node.kwargs, tensor_of)
        if node.op == "call_module":
            # In float64: a constant is worked out more exactly than any sample would be.
            result = copy.deepcopy(self.module_of(node)).double()(*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], str(node.target).removesuffix("_"))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        mine = self.values[node]
        by_channel = result.double().transpose(0, mine.axis).reshape(mine.channels, -1)
        same = (by_channel == by_channel[:, :1]).all(dim=1)
        return torch.where(same, by_channel[:, 0], math.nan)

    def _forwards(self, node: fx.Node) -> Tensor:
        """The constants of a node's channels."""
        kind, mine = self.kinds[node], self.values[node]
        inputs = self.inputs(node)
        given = [self.values[n].constant for n in inputs]
        if kind == "weighted":
            return self._weighted_constants(node)
        if kind in ("channel", "mean"):
            found = self._evaluate(node, dict(zip(inputs, given, strict=True))) if kind == "channel" else given[0]
            module = self.module_of(node) if node.op == "call_module" else None
            if isinstance(module, _BATCHNORMS) and module.affine:
                found = torch.where(module.weight.detach().double() == 0, module.bias.detach().double(), found)
            return found
        if kind == "sum":
            others = [a for a in node.args if not isinstance(a, fx.Node)]
            twice = given * (2 if len(inputs) == 1 and not others else 1)
            return sum((t for t in twice), torch.full_like(given[0], float(sum(others))))  # type: ignore[arg-type]
        if kind == "product":
            others = [a for a in node.args if not isinstance(a, fx.Node)]
            twice = given * (2 if len(inputs) == 1 and not others else 1)
            found = torch.full_like(given[0], float(math.prod(others)))  # type: ignore[arg-type]
            for t in twice:
                found = found * t
            dead = torch.stack([t == 0 for t in twice]).any(dim=0)
            return torch.where(dead, 0.0, found)
        if kind == "concat":
            return torch.cat(given)
        if kind == "flatten":
            return given[0].repeat_interleave(mine.channels // given[0].numel())
        return torch.full_like(mine.constant, math.nan)

    def _weighted_constants(self, node: fx.Node) -> Tensor:
        """An output without incoming weights is its bias."""
        module = self.module_of(node)
        bias = _bias_of(module)
        return torch.where(_rows(module) == 0, bias, math.nan)

    # What is used, backwards ........................................................................................

    def _backwards(self, node: fx.Node) -> None:
        """Mark what the node needs of its inputs."""
        kind = self.kinds[node]
        inputs = self.inputs(node)
        if kind == "nothing":
            return
        if kind == "other":
            for n in inputs:
                self.values[n].needed[:] = True
            return
        mine = self.values[node]
        if kind == "weighted":
            self.values[inputs[0]].needed |= _uses(self.module_of(node), mine.needed)
        elif kind in ("channel", "mean", "sum"):
            needed = mine.needed
            module = self.module_of(node) if node.op == "call_module" else None
            if isinstance(module, _BATCHNORMS) and module.affine:
                needed = needed & (module.weight.detach() != 0)
            for n in inputs:
                self.values[n].needed |= needed
        elif kind == "product":
            dead = torch.stack([self.values[n].constant == 0 for n in inputs])
            for i, n in enumerate(inputs):
                others = dead[[j for j in range(len(inputs)) if j != i]].any(dim=0)
                # Where two zeros meet, the first one is kept to be the reason.
                self.values[n].needed |= mine.needed & ~(others & ~dead[i] if i == 0 else others)
        elif kind == "concat":
            for n, part in zip(inputs, mine.needed.split([self.values[n].channels for n in inputs]), strict=True):
                self.values[n].needed |= part
        elif kind == "flatten":
            self.values[inputs[0]].needed |= mine.needed.reshape(self.values[inputs[0]].channels, -1).any(dim=1)

    def look(self) -> None:
        """Find out anew what is constant and what is used."""
        with torch.no_grad():
            for node in self.nodes:
                if node in self.values:
                    self.values[node].constant = self._forwards(node)
                    self.values[node].needed = torch.zeros_like(self.values[node].needed)
            for node in reversed(self.nodes):
                self._backwards(node)

    # Folding ........................................................................................................

    def is_locked(self, param: Tensor | None) -> bool:
        return param is not None and self.names.get(id(param)) in self.locked

    def fold(self, new_biases: bool) -> None:
        """Put constants into biases and zeros where nothing is used, until nothing changes.

        Args:
            new_biases: give a layer that has no bias one if a constant must go there.
        """
        changed = True
        with torch.no_grad():
            while changed:
                self.look()
                self.stuck = {}
                changed = False
                for node in self.nodes:
                    if self.kinds[node] == "weighted":
                        changed |= self._fold_inputs(node, new_biases)
                        changed |= self._clear_outputs(node)
                    elif node.op == "call_module" and self.kinds[node] == "channel":
                        changed |= self._clear_norm(node)

    def _clear_outputs(self, node: fx.Node) -> bool:
        """Rows and biases of outputs that nothing uses become zero."""
        module, unused = self.module_of(node), ~self.values[node].needed
        found = False
        for param in (module.weight, module.bias):
            if param is None or not unused.any():
                continue
            live = unused & (param.detach().reshape(len(unused), -1) != 0).any(dim=1)
            if not live.any():
                continue
            if self.is_locked(param):
                for c in live.nonzero().reshape(-1).tolist():
                    self.stuck[(str(node.target), c)] = (
                        f"{self.names[id(param)]} lies in a target that has no zero there"
                    )
                continue
            param[live] = 0.0
            found = True
        self.unused.setdefault(str(node.target), set()).update(unused.nonzero().reshape(-1).tolist())
        return found

    def _clear_norm(self, node: fx.Node) -> bool:
        """The numbers of unused BatchNorm channels become those of a fresh one, with weight and bias zero."""
        module = self.module_of(node)
        if not isinstance(module, _BATCHNORMS):
            return False
        unused = ~self.values[node].needed
        found = False
        fresh = ((module.weight, 0.0), (module.bias, 0.0), (module.running_mean, 0.0), (module.running_var, 1.0))
        for tensor, value in fresh:
            if tensor is None or self.is_locked(tensor):
                continue
            live = unused & (tensor != value)
            if live.any():
                tensor[live] = value
                found = True
        return found

    def _fold_inputs(self, node: fx.Node, new_biases: bool) -> bool:
        """Constants among a layer's inputs go into its bias; their columns become zero."""
        module = self.module_of(node)
        source = self.values[self.inputs(node)[0]]
        used = _columns(module)
        known = ~source.constant.isnan() & used
        if not known.any():
            return False
        if self.is_locked(module.weight):
            self._stay(node, known, f"{self.names[id(module.weight)]} lies in a target that has no zero there")
            return False
        free = known.clone()
        if _pads_with_zeros(module):
            free &= source.constant == 0
            self._stay(node, known & ~free, f"{node.target} pads with zeros, so at the borders it is no constant")
        delta = _contribution(module, torch.where(free, source.constant, 0.0))
        if bool((delta != 0).any()) and not self._shift(node, delta, new_biases):
            self._stay(node, free & (source.constant != 0), f"{node.target} has no bias that could take it")
            free &= source.constant == 0
        if not free.any():
            return False
        _column_view(module, module.weight, free)
        self.folded.setdefault(str(node.target), set()).update(free.nonzero().reshape(-1).tolist())
        return True

    def _stay(self, node: fx.Node, which: Tensor, why: str) -> None:
        for name, channel in self._origins(self.inputs(node)[0], which):
            self.stuck[(name, channel)] = why

    def _shift(self, node: fx.Node, delta: Tensor, new_biases: bool) -> bool:
        """Add to the bias of a layer, or take it from the mean of the BatchNorm that follows."""
        module = self.module_of(node)
        if module.bias is not None:
            if self.is_locked(module.bias):
                return False
            module.bias.copy_((module.bias.double() + delta).to(module.bias.dtype))
            return True
        users = list(node.users)
        norm = (
            self.module_of(users[0])
            if len(users) == 1 and self.kinds[users[0]] == "channel" and (users[0].op == "call_module")
            else None
        )
        if isinstance(norm, _BATCHNORMS) and norm.running_mean is not None:
            norm.running_mean.copy_((norm.running_mean.double() - delta).to(norm.running_mean.dtype))
            return True
        if new_biases:
            bias = nn.Parameter(delta.to(module.weight.dtype), requires_grad=module.weight.requires_grad)
            module.bias = bias
            self.owners[id(bias)] = {str(node.target)}
            self.names[id(bias)] = canonical_name(f"{node.target}.bias")
        return new_biases

    # Saying what stays ..............................................................................................

    def _origins(self, node: fx.Node, which: Tensor) -> Iterator[tuple[str, int]]:
        """The outputs of layers that the given channels of a value come from, channel by channel."""
        kind, inputs = self.kinds[node], self.inputs(node)
        if not which.any():
            return
        if kind == "weighted":
            yield from ((str(node.target), c) for c in which.nonzero().reshape(-1).tolist())
        elif kind in ("channel", "mean", "sum", "product"):
            for n in inputs:
                yield from self._origins(n, which)
        elif kind == "concat":
            for n, part in zip(inputs, which.split([self.values[n].channels for n in inputs]), strict=True):
                yield from self._origins(n, part)
        elif kind == "flatten":
            yield from self._origins(inputs[0], which.reshape(self.values[inputs[0]].channels, -1).any(dim=1))

    def left(self) -> tuple[str, ...]:
        """Outputs that are constant but used by something that cannot take them, in words."""
        for node in self.nodes:
            if self.kinds[node] == "sum" and node in self.values:
                for n in self.inputs(node):
                    held = ~self.values[n].constant.isnan() & self.values[node].constant.isnan()
                    held &= (self.values[n].constant != 0) & self.values[node].needed
                    for origin in self._origins(n, held):
                        self.stuck.setdefault(origin, f"it is added to a channel that lives ({node.name})")
            elif self.kinds[node] == "other" and node.op not in ("placeholder", "output"):
                for n in self.inputs(node):
                    held = ~self.values[n].constant.isnan() & (self.values[n].constant != 0)
                    for origin in self._origins(n, held):
                        self.stuck.setdefault(origin, f"it goes into {_called(node)}, which is not understood")
        return grouped(self.stuck)

    # Removing .......................................................................................................

    def remove(self) -> None:
        """Take out every place that nothing uses: rows, columns and BatchNorm channels of what hangs together."""
        self.look()
        places = self._places()
        gone = self._removable(places)
        for node in self.nodes:
            if self.kinds[node] not in ("weighted", "channel") or node.op != "call_module":
                continue
            keep = [i for i, place in enumerate(self.values[node].ids) if places.of(place) not in gone]
            if self.kinds[node] == "weighted":
                source = self.values[self.inputs(node)[0]]
                _shrink(self.module_of(node), keep, [i for i, p in enumerate(source.ids) if places.of(p) not in gone])
                unused = (~self.values[node].needed).nonzero().reshape(-1).tolist()
                for c in set(unused) & set(keep):
                    self.stuck.setdefault((str(node.target), c), places.why(self.values[node].ids[c]))
            elif len(keep) < self.values[node].channels:
                _shrink_norm(self.module_of(node), keep)

    def _places(self) -> _Places:
        """Number the channels of all values so that those that can only go together have one number."""
        places = _Places()
        for node in self.nodes:
            if self.kinds[node] == "other":
                for n in self.inputs(node):
                    places.pin(self.values[n].ids, f"{_called(node)} needs it where it is")
            if node not in self.values:
                continue
            kind, mine = self.kinds[node], self.values[node]
            given = [self.values[n].ids for n in self.inputs(node)]
            if kind in ("channel", "mean", "sum", "product"):
                mine.ids = given[0]
                for other in given[1:]:
                    places.tie(given[0], other)
            elif kind == "concat":
                mine.ids = [place for ids in given for place in ids]
            elif kind == "flatten":
                mine.ids = [place for place in given[0] for _ in range(mine.channels // len(given[0]))]
            else:
                mine.ids = places.new(mine.channels)
                groups = getattr(self.module_of(node), "groups", 1) if kind == "weighted" else 1
                if kind == "other":
                    places.pin(mine.ids, f"it comes from {_called(node)}")
                elif groups > 1:
                    for part in zip(_parts(mine.ids, groups), _parts(given[0], groups), strict=True):
                        whole = [place for side in part for place in side]
                        places.tie(whole[:1] * (len(whole) - 1), whole[1:])
        return places

    def _removable(self, places: _Places) -> set[int]:
        """The numbers of places that are used nowhere; a layer keeps one channel at least."""
        blocked: set[int] = set()
        for node in self.nodes:
            if self.kinds[node] == "weighted" and getattr(self.module_of(node), "groups", 1) == 1:
                used = _columns(self.module_of(node)).tolist()
                ids = self.values[self.inputs(node)[0]].ids
                blocked |= {places.of(place) for place, live in zip(ids, used, strict=True) if live}
        gone = places.all - blocked - places.pinned
        for node, value in self.values.items():
            mine = [places.of(place) for place in value.ids]
            if mine and gone.issuperset(mine):
                gone.discard(mine[0])
                for origin in self._origins(node, torch.arange(value.channels, device=value.needed.device) < 1):
                    self.stuck.setdefault(origin, "a layer keeps one channel at least")
        return gone


class _Places:
    """Numbers that can be tied together (union-find), some of them pinned."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._pinned: list[tuple[int, str]] = []

    @property
    def all(self) -> set[int]:
        return {self.of(place) for place in range(len(self._parent))}

    @property
    def pinned(self) -> set[int]:
        return {self.of(place) for place, _ in self._pinned}

    def new(self, count: int) -> list[int]:
        first = len(self._parent)
        self._parent += range(first, first + count)
        return list(range(first, first + count))

    def of(self, place: int) -> int:
        while self._parent[place] != place:
            self._parent[place] = place = self._parent[self._parent[place]]
        return place

    def tie(self, left: Iterable[int], right: Iterable[int]) -> None:
        for a, b in zip(left, right, strict=True):
            self._parent[self.of(a)] = self.of(b)

    def pin(self, places: Iterable[int], why: str) -> None:
        self._pinned += [(place, why) for place in places]

    def why(self, place: int) -> str:
        """Why a place that nothing uses had to stay."""
        own = self.of(place)
        return next((why for p, why in self._pinned if self.of(p) == own), "a channel it is tied to lives")


# --- layers -------------------------------------------------------------------------------------------------------


def _bias_of(module: Any) -> Tensor:
    if module.bias is None:
        return torch.zeros(module.weight.shape[0], dtype=torch.float64, device=module.weight.device)
    return module.bias.detach().double()


def _rows(module: Any) -> Tensor:
    """Non-zero weights of each output."""
    return (module.weight.detach() != 0).reshape(module.weight.shape[0], -1).sum(dim=1)


def _grid(module: Any, weight: Tensor) -> Tensor:
    """Weights as (groups, outputs of a group, inputs of a group, taps)."""
    groups = getattr(module, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _columns(module: Any) -> Tensor:
    """Whether each input has a weight."""
    return (_grid(module, module.weight.detach()) != 0).any(dim=3).any(dim=1).reshape(-1)


def _uses(module: Any, needed: Tensor) -> Tensor:
    """Whether each input has a weight to an output that is needed."""
    grid = (_grid(module, module.weight.detach()) != 0).any(dim=3)
    return (grid & needed.reshape(grid.shape[0], -1, 1)).any(dim=1).reshape(-1)


def _contribution(module: Any, constants: Tensor) -> Tensor:
    """What constant inputs add to each output, in float64."""
    grid = _grid(module, module.weight.detach().double()).sum(dim=3)
    return (grid * constants.reshape(grid.shape[0], 1, -1)).sum(dim=2).reshape(-1)


def _column_view(module: Any, weight: Tensor, which: Tensor) -> None:
    """Set the columns of the given inputs to zero."""
    grid = _grid(module, weight)
    grid.copy_(torch.where(which.reshape(grid.shape[0], 1, -1, 1), 0.0, grid))


def _pads_with_zeros(module: Any) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and any(k > 1 for k in module.kernel_size)
    return any(module.padding)


def _parts(ids: list[int], groups: int) -> list[list[int]]:
    size = len(ids) // groups
    return [ids[i * size : (i + 1) * size] for i in range(groups)]


def _taken(tensor: Tensor | None, keep: list[int], dim: int = 0) -> Any:
    """Rows of a parameter or buffer, as the same kind of thing."""
    if tensor is None:
        return None
    index = torch.tensor(keep, device=tensor.device)
    part = tensor.detach().index_select(dim, index)
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _shrink(module: Any, keep_out: list[int], keep_in: list[int]) -> None:
    groups = getattr(module, "groups", 1)
    module.weight = _taken(module.weight, keep_out)
    module.bias = _taken(module.bias, keep_out)
    if groups == 1:
        module.weight = _taken(module.weight, keep_in, dim=1)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = len(keep_in), len(keep_out)
        return
    if groups > 1:
        module.groups = len(keep_in) * groups // module.in_channels
    module.in_channels, module.out_channels = len(keep_in), len(keep_out)


def _shrink_norm(module: Any, keep: list[int]) -> None:
    if isinstance(module, _BATCHNORMS):
        module.num_features = len(keep)
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(module, name, _taken(getattr(module, name), keep))
    elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
        module.num_parameters = len(keep)
        module.weight = _taken(module.weight, keep)


def _called(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return "the input" if node.op == "placeholder" else "the output" if node.op == "output" else repr(name)


def grouped(stuck: Mapping[tuple[str, int], str]) -> tuple[str, ...]:
    """One sentence a layer and reason."""
    found: dict[tuple[str, str], list[int]] = {}
    for (name, channel), why in stuck.items():
        found.setdefault((name, why), []).append(channel)
    return tuple(
        f"{name}: {len(channels)} unit{'s' * (len(channels) > 1)} ({', '.join(map(str, sorted(channels)[:8]))}"
        f"{', ...' if len(channels) > 8 else ''}) stay: {why}"
        for (name, why), channels in sorted(found.items())
    )
