"""How the channels of every value of a traced model hang together with those of the values it is made of.

A `Value` has one axis of channels. A `Use` says what a node does with the channels of its inputs: a layer mixes them
and makes new ones, an activation or a pooling hands each one on, a flattening repeats it, PixelShuffle merges some, a
sum ties those of its inputs. What an operation does that only moves elements is not written down here but found by
running it on the numbers of its input's channels, and whether it would still do so with fewer channels (no size is
written in the model's code) by running it again on fewer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from detent.export.trace import Op, Traced, called, classify, padding_of
from detent.export.units import Places

__all__ = ["All", "Groups", "Linker", "Pairs", "Same", "Use", "Value"]


@dataclass(kw_only=True)
class Value:
    """What is known of the channels of one tensor of the graph.

    Args:
        shape: on the example.
        axis: of its channels.
        constant: a channel's number, NaN where it depends on the input or the position.
        needed: whether anything uses it.
        ids: the places of its channels, when something is removed.
    """

    shape: tuple[int, ...]
    axis: int
    constant: Tensor
    needed: Tensor
    ids: list[int] = field(default_factory=list)

    @property
    def channels(self) -> int:
        """How many."""
        return self.shape[self.axis]


# --- links: from the channels of an input to those of the result -----------------------------------------------------


class Same:
    """Channel i of the result is made of channel i of the input."""

    def back(self, which: Tensor) -> Tensor:
        """The channels of the input that some channels of the result are made of."""
        return which

    def forth(self, constants: Tensor) -> Tensor:
        """The result's constants if it copies: NaN where the sources are unknown or differ."""
        return constants

    def place(self, places: Places, ids: list[int], why: str) -> list[int]:
        """The places of the result's channels; ties those that only go together."""
        return ids


@dataclass(frozen=True)
class Groups(Same):
    """Channels that are normalised together: each is made of all of its group."""

    count: int

    def back(self, which: Tensor) -> Tensor:
        size = len(which) // self.count
        return which.reshape(self.count, size).any(dim=1).repeat_interleave(size)

    def forth(self, constants: Tensor) -> Tensor:
        return torch.where(self.back(constants.isnan()), torch.nan, constants)

    def place(self, places: Places, ids: list[int], why: str) -> list[int]:
        size = len(ids) // self.count
        for i in range(self.count if size > 1 else 0):
            part = ids[i * size : (i + 1) * size]
            places.tie(part[:1] * (size - 1), part[1:], why)
        return ids


class All(Same):
    """One channel that is broadcast to all of the result's."""

    def __init__(self, count: int) -> None:
        self.count = count

    def back(self, which: Tensor) -> Tensor:
        return which.any().reshape(1)

    def forth(self, constants: Tensor) -> Tensor:
        return constants.expand(self.count)


class Pairs(Same):
    """Any relation: `target[i]` of the result is made of `source[i]` of the input, and maybe of others.

    Args:
        source: channels of the input.
        target: channels of the result.
        sizes: how many the input and the result have.
        ties: channels of the input that only go together, beside those that one channel of the result is made of.
    """

    def __init__(
        self, source: Tensor, target: Tensor, sizes: tuple[int, int], ties: Sequence[Sequence[int]] = ()
    ) -> None:
        self.source, self.target, self.sizes, self.ties = source, target, sizes, ties

    def back(self, which: Tensor) -> Tensor:
        found = torch.zeros(self.sizes[0], dtype=torch.bool, device=which.device)
        found[self.source[which[self.target]]] = True
        return found

    def forth(self, constants: Tensor) -> Tensor:
        low, high = (torch.full((self.sizes[1],), end, dtype=constants.dtype) for end in (torch.inf, -torch.inf))
        given = constants.cpu()[self.source.cpu()]
        low.scatter_reduce_(0, self.target.cpu(), given, "amin")
        high.scatter_reduce_(0, self.target.cpu(), given, "amax")
        return torch.where(low == high, low, torch.nan).to(constants.device)

    def place(self, places: Places, ids: list[int], why: str) -> list[int]:
        for part in self.ties:
            places.tie([ids[part[0]]] * (len(part) - 1), [ids[c] for c in part[1:]], why)
        found: list[int | None] = [None] * self.sizes[1]
        for source, target in zip(self.source.tolist(), self.target.tolist(), strict=True):
            first = found[target]
            if first is None:
                found[target] = ids[source]
            else:
                places.tie([first], [ids[source]], why)
        for target in self.missing().nonzero().reshape(-1).tolist():
            found[target] = places.new(1)[0]
            places.pin([found[target]], "it is added to padding of channels")
        return found  # type: ignore[return-value]

    def missing(self) -> Tensor:
        """Channels of the result that are made of none of the input's."""
        found = torch.ones(self.sizes[1], dtype=torch.bool, device=self.target.device)
        found[self.target] = False
        return found


# --- uses: what nodes do -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Use:
    """What a node does with the channels of its inputs.

    Args:
        kind: "weighted" (makes new channels with a layer's weights), "copy", "evaluate" (a function of a channel, or
            of its group), "merge" (an elementwise function of several), "product", "concat", "join" (several of the
            same channels after one another), "nothing" (tells no number of a channel) or "opaque".
        links: of the inputs whose channels go into the result's.
        whole: inputs that are used in whole; their channels stay where they are.
        stiff: why the channels of the linked inputs must stay where they are, empty if they may go.
        why: in words, for what stays.
        fill: the constant of channels of the result that no input has.
        attribute: (node, axis) of a parameter that is sliced along.
    """

    kind: str
    links: dict[fx.Node, Same] = field(default_factory=dict)
    whole: tuple[fx.Node, ...] = ()
    stiff: str = ""
    why: str = ""
    fill: float = torch.nan
    attribute: tuple[fx.Node, int] | None = None


_HARMLESS = {"ndim", "device", "dtype", "is_cuda", "requires_grad", "dim", "ndimension", "layout", "is_floating_point"}
_CHANNELS_SECOND = (Op.CONV, Op.TRANSPOSED, Op.BATCHNORM, Op.INSTANCENORM, Op.GROUPNORM)


class Linker:
    """Finds the values and uses of a traced model.

    Args:
        traced: the model.
        shared: names of modules that must stay as they are, with the reason.

    Attributes:
        values: of every tensor of two or more axes that a node gives.
        uses: of every node.
        pins: (node, reason): values whose channels must stay because something reads how many there are.
        clobbered: nodes whose result is written over while others read it.
    """

    def __init__(self, traced: Traced, shared: dict[str, str]) -> None:
        self.traced, self.shared = traced, shared
        self.values: dict[fx.Node, Value] = {}
        self.uses: dict[fx.Node, Use] = {}
        self.pins: list[tuple[fx.Node, str]] = []
        self.clobbered: set[fx.Node] = set()
        self.ops = {node: classify(node, traced.modules) for node in traced.nodes}
        self._widths: dict[fx.Node, frozenset[fx.Node]] = {}  # of numbers: the values whose channels they count
        self._axes: dict[fx.Node, tuple[fx.Node, list[int]]] = {}  # of shapes: the value, and which axes
        for node in traced.nodes:
            self.uses[node] = self._resolve(node)
            self._pin_widths(node)

    # Small pieces ....................................................................................................

    def module_of(self, node: fx.Node) -> Any:
        """The module that a node calls, or `None`."""
        return self.traced.modules[str(node.target)] if node.op == "call_module" else None

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that are values with channels."""
        return [n for n in node.all_input_nodes if n in self.values]

    def _only(self, node: fx.Node) -> fx.Node | None:
        """The one tensor that a node reads, beside numbers."""
        tensors = [n for n in node.all_input_nodes if n not in self.traced.values]
        return tensors[0] if len(tensors) == 1 and tensors[0] in self.values else None

    def called(self, node: fx.Node) -> str:
        """A node in words."""
        return called(node, self.traced.modules)

    def _argument(self, node: fx.Node, place: int, name: str, default: Any = None) -> Any:
        """An argument of a function or an attribute of a module."""
        module = self.module_of(node)
        if module is not None:
            return getattr(module, name, default)
        return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)

    def _value(self, node: fx.Node, axis: int) -> Value:
        shape, device = self.traced.shapes[node], self.traced.devices[node]
        # Beside the weights that they are compared with, which may be on an accelerator.
        value = Value(
            shape=shape,
            axis=axis,
            constant=torch.full((shape[axis],), torch.nan, dtype=torch.float64, device=device),
            needed=torch.zeros(shape[axis], dtype=torch.bool, device=device),
        )
        self.values[node] = value
        return value

    def _opaque(self, node: fx.Node, why: str = "") -> Use:
        if len(self.traced.shapes.get(node, ())) >= 2:
            self._value(node, self._guess(node))
        why = why or f"{self.called(node)}, which is not understood"
        return Use(kind="opaque", whole=tuple(self.inputs(node)), why=why)

    def _guess(self, node: fx.Node) -> int:
        """The axis that the first reader with a rule takes for that of channels."""
        rank, seen, todo = len(self.traced.shapes[node]), {node}, [node]
        while todo:
            for user in todo.pop(0).users:
                op = self.ops[user]
                if op in (Op.LINEAR, Op.LAYERNORM):
                    return rank - 1
                if op in _CHANNELS_SECOND:
                    return 1
                if user not in seen and len(self.traced.shapes.get(user, ())) == rank and op is not Op.MOVE:
                    seen.add(user)
                    todo.append(user)
        return 1

    # The table .......................................................................................................

    def _resolve(self, node: fx.Node) -> Use:
        if node.op == "get_attr" and node in self.traced.shapes:
            return Use(kind="nothing")  # whoever uses it looks at it
        if node.op in ("placeholder", "output", "get_attr"):
            return self._opaque(node, f"{self.called(node)}")
        if node not in self.traced.shapes:
            return self._number(node)
        why = self._refusal(node)
        if why or len(self.traced.shapes[node]) < 2:
            return self._opaque(node, why)
        rule = _RULES.get(self.ops[node])
        found = rule(self, node) if rule is not None else None
        return found if found is not None else self._opaque(node)

    def _refusal(self, node: fx.Node) -> str:
        """Why a node is not understood whatever it computes, or nothing."""
        module = self.module_of(node)
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            return f"{self.called(node)}, which has forward hooks"
        if module is not None and str(node.target) in self.shared:
            return f"{self.called(node)}, which {self.shared[str(node.target)]}"
        mutates = node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
        mutates |= node.op == "call_method" and str(node.target).endswith("_")
        mutates |= bool(getattr(module, "inplace", False) or node.kwargs.get("inplace", False))
        if mutates and self.ops[node] is not Op.SAME and node.all_input_nodes:
            # What is written over, and what it is a view of; whoever else reads them sees what was written.
            chain = [node.all_input_nodes[0]]
            while self.ops[chain[-1]] in (Op.MOVE, Op.FLATTEN, Op.ITEM, Op.SPLIT, Op.SAME):
                chain.append(chain[-1].all_input_nodes[0])
            if any(sum(user not in self.traced.values for user in n.users) > 1 for n in chain):
                self.clobbered.update(chain)
                return f"{self.called(node)}, which writes over what others read"
        return ""

    def _number(self, node: fx.Node) -> Use:
        """A node that is no tensor: a number, a shape, or a tuple of tensors."""
        read = node.all_input_nodes
        first = read[0] if read else None
        self._widths[node] = frozenset()
        if node not in self.traced.values:
            parts = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
            return Use(kind="nothing") if self.ops[node] is Op.SPLIT and parts else self._opaque(node)
        sized = (node.op == "call_method" and node.target == "size") or (
            node.target is getattr and node.args[1] == "shape"
        )
        if sized and first is not None and first in self.traced.shapes:
            axes = list(range(len(self.traced.shapes[first])))
            if node.target == "size" and (len(node.args) > 1 or node.kwargs):
                axes = [axes[self._argument(node, 1, "dim")]]
            self._axes[node] = (first, axes)
        elif node.target is operator.getitem and first in self._axes and not isinstance(node.args[1], fx.Node):
            of, axes = self._axes[first]
            chosen: Any = operator.getitem(axes, node.args[1])  # type: ignore[call-overload]
            self._axes[node] = (of, chosen if isinstance(chosen, list) else [chosen])
        elif (node.op == "call_method" and node.target in _HARMLESS) or (
            node.target is getattr and node.args[1] in _HARMLESS
        ):
            return Use(kind="nothing")
        elif all(n in self.traced.values for n in read):
            self._widths[node] = frozenset().union(*(self._widths.get(n, frozenset()) for n in read))
            return Use(kind="nothing")
        else:
            return self._opaque(node)
        of, axes = self._axes[node]
        if of in self.values and self.values[of].axis in axes:
            self._widths[node] = frozenset([of])
        return Use(kind="nothing")

    def _pin_widths(self, node: fx.Node) -> None:
        """Who uses how many channels a value has, other than to move just that value, keeps them."""
        if node in self.traced.values:
            return
        use = self.uses[node]
        for number in node.all_input_nodes:
            for of in self._widths.get(number, ()):
                moved = self.ops[node] in _MOVES and list(use.links) == [
                    of
                ]  # which it does anew with fewer, or is stiff
                divided = self.ops[node] is Op.SPLIT and use.kind == "nothing" and node.all_input_nodes[0] is of
                if not (moved or divided):
                    self.pins.append((of, f"{self.called(node)} depends on how many there are"))

    # Rules ...........................................................................................................

    def _layer(self, node: fx.Node) -> Use | None:
        module, read = self.module_of(node), self._only(node)
        if read is None:
            return None
        source, linear = self.values[read], isinstance(module, nn.Linear)
        axis = len(source.shape) - 1 if linear else 1
        if not linear and len(source.shape) != module.weight.dim():
            return None
        self._value(node, axis)
        if source.axis == axis:
            return Use(kind="weighted", links={read: Same()})
        return Use(kind="weighted", whole=(read,), why=f"{self.called(node)} reads another axis of them")

    def _through(
        self, node: fx.Node, kind: str = "evaluate", link: Same | None = None, stiff: str = "", why: str = ""
    ) -> Use | None:
        """Every channel alone: one input, of the same channels."""
        read = self._only(node)
        if read is None:
            return None
        source, shape = self.values[read], self.traced.shapes[node]
        if len(shape) != len(source.shape) or shape[source.axis] != source.channels:
            return None
        self._value(node, source.axis)
        return Use(kind=kind, links={read: link or Same()}, stiff=stiff, why=why)

    def _spatial(self, node: fx.Node) -> Use | None:
        """Pooling and resizing, over all axes but the first two."""
        read = self.inputs(node)
        if not read or self.values[read[0]].axis != 1:
            return None
        name = (
            type(self.module_of(node)).__name__
            if node.op == "call_module"
            else str(getattr(node.target, "__name__", ""))
        )
        dims = next((int(c) for c in name if c.isdigit()), len(self.values[read[0]].shape) - 2)
        if len(self.values[read[0]].shape) != dims + 2:
            return None
        return self._through(node, "evaluate" if self.ops[node] is Op.AVGPOOL else "copy")

    def _norm(self, node: fx.Node) -> Use | None:
        module, read, op = self.module_of(node), self.inputs(node), self.ops[node]
        if not read:
            return None
        source = self.values[read[0]]
        if op is Op.LAYERNORM:
            within = source.axis >= len(source.shape) - len(module.normalized_shape)
            why = f"{self.called(node)} normalises over all of them"
            return self._through(node, "evaluate", Groups(1) if within else None, why if within else "")
        if source.axis != 1 or (op is Op.BATCHNORM and module.running_mean is None):
            return None  # what it gives depends on the batch
        if op is Op.GROUPNORM:
            why = f"{self.called(node)} normalises it together with channels that live"
            return self._through(node, "evaluate", Groups(module.num_groups), why=why)
        return self._through(node)

    def _prelu(self, node: fx.Node) -> Use | None:
        module, read = self.module_of(node), self.inputs(node)
        several = isinstance(module, nn.PReLU) and module.num_parameters > 1
        return None if several and read and self.values[read[0]].axis != 1 else self._through(node)

    def _over_axes(self, node: fx.Node) -> Use | None:
        """Softmax and means, over other axes than that of channels."""
        read = self._only(node)
        asked = self._argument(node, 1, "dim")
        dims = [asked] if isinstance(asked, int) else asked
        if read is None or not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
            return None
        source = self.values[read]
        dims = [d % len(source.shape) for d in dims]
        if source.axis in dims:
            return None
        if self.ops[node] is Op.SOFTMAX:
            return self._through(node)
        gone = 0 if len(self.traced.shapes[node]) == len(source.shape) else sum(d < source.axis for d in dims)
        self._value(node, source.axis - gone)
        return Use(kind="copy", links={read: Same()})

    def _pad(self, node: fx.Node) -> Use | None:
        read, padding = self._only(node), padding_of(node, self.traced)
        if read is None or padding is None:
            return None
        source, rank = self.values[read], len(self.values[read].shape)
        front, behind = padding.of(source.axis, rank)
        others = [side for axis in range(rank) if axis != source.axis for side in padding.of(axis, rank)]
        around = padding.mode == "constant" and any(side > 0 for side in others)
        if front == behind == 0:
            found = self._through(node, "padded" if around else "copy")
        elif around or padding.mode != "constant" or min(front, behind) < 0:
            return None
        else:
            self._value(node, source.axis)
            where = torch.arange(source.channels, device=source.needed.device)
            link = Pairs(where, where + front, (source.channels, source.channels + front + behind))
            found = Use(kind="copy", links={read: link})
        if found is not None:
            found.fill, found.why = padding.value, f"{self.called(node)} surrounds it with {padding.value:g}"
        return found

    def _glu(self, node: fx.Node) -> Use | None:
        read = self._only(node)
        if read is None:
            return None
        source, dim = self.values[read], self._argument(node, 1, "dim", -1)
        if dim % len(source.shape) != source.axis:
            return None
        half = source.channels // 2
        self._value(node, source.axis)
        which = torch.arange(source.channels, device=source.needed.device)
        link = Pairs(which, which % half, (source.channels, half))
        return Use(kind="evaluate", links={read: link}, why=f"{self.called(node)} multiplies it by one that lives")

    def _elementwise(self, node: fx.Node) -> Use | None:
        """A function of several tensors and numbers, element by element."""
        tensors = [n for n in node.all_input_nodes if n in self.traced.shapes]
        read = [n for n in tensors if n in self.values]
        held = [n for n in tensors if n.op == "get_attr"]
        if not read or len(read) + len(held) != len(tensors) or node.kwargs.get("out") is not None:
            return None
        if len(tensors) == 1 and node.args.count(read[0]) == 1:
            return self._through(node)
        shape = self.traced.shapes[node]
        rank = len(shape)
        # The axis of those that are understood; what is not may have any.
        known = sorted(read, key=lambda n: self.uses[n].kind == "opaque")
        axis = next(self.values[n].axis + rank - len(self.values[n].shape) for n in known)
        links: dict[fx.Node, Same] = {}
        whole: list[fx.Node] = []
        for n in read:
            value = self.values[n]
            own = axis - (rank - len(value.shape))
            if own == value.axis and value.channels == shape[axis]:
                links[n] = Same()
            elif own == value.axis and value.channels == 1:
                links[n] = All(shape[axis])
            elif own < 0 or value.shape[own] == 1:
                whole.append(n)
            else:
                return None
        if not any(type(link) is Same for link in links.values()):
            return None
        attribute, stiff = None, ""
        for n in held:
            own = axis - (rank - len(self.traced.shapes[n]))
            if own < 0 or self.traced.shapes[n][own] == 1:
                continue
            stiff = "" if attribute is None and self._may_slice(n) else f"it meets {self.called(n)}"
            attribute = (n, own)
        self._value(node, axis)
        word = {Op.ADD: "added to", Op.MUL: "multiplied by"}.get(self.ops[node], "combined with")
        return Use(
            kind="product" if self.ops[node] is Op.MUL else "merge",
            links=links,
            whole=tuple(whole),
            stiff=stiff,
            why=f"it is {word} a channel that lives ({node.name})",
            attribute=attribute,
        )

    def _may_slice(self, node: fx.Node) -> bool:
        module, _, name = str(node.target).rpartition(".")
        owner = self.traced.modules.get(module)
        again = sum(other.op == "get_attr" and other.target == node.target for other in self.traced.nodes)
        known = owner is not None and (name in owner._parameters or name in owner._buffers)
        return known and len(node.users) == 1 and again == 1 and str(node.target) not in self.shared

    def _cat(self, node: fx.Node) -> Use | None:
        listed = node.args[0] if node.args else node.kwargs.get("tensors")
        axis = self._argument(node, 1, "dim", 0)
        if not isinstance(listed, (list, tuple)) or not all(n in self.values for n in listed):
            return None
        read = [self.values[n] for n in listed]  # type: ignore[index]
        if not isinstance(axis, int) or len({value.axis for value in read}) > 1 or len(set(listed)) < len(listed):
            return None
        mine, rank = read[0].axis, len(read[0].shape)
        self._value(node, mine)
        if axis % rank != mine:
            why = f"it stands beside one that lives ({node.name})"
            return Use(kind="join", links={n: Same() for n in listed}, why=why)  # type: ignore[misc]
        links: dict[fx.Node, Same] = {}
        start, total = 0, self.values[node].channels
        for n, value in zip(listed, read, strict=True):
            where = torch.arange(value.channels, device=value.needed.device)
            links[n] = Pairs(where, where + start, (value.channels, total))  # type: ignore[index]
            start += value.channels
        return Use(kind="concat", links=links)

    def _product(self, node: fx.Node) -> Use | None:
        """Matrix products of activations, and attention: the last axis is that of the last operand."""
        attention = self.ops[node] is Op.ATTENTION
        operands = [*node.args, *(v for k, v in node.kwargs.items() if k in ("query", "key", "value"))]
        count = 3 if attention else 2
        if len(operands) < count or not all(isinstance(n, fx.Node) and n in self.values for n in operands[:count]):
            return None
        last: Any = operands[count - 1]
        others = tuple(n for n in self.inputs(node) if n is not last)
        value, rank = self.values[last], len(self.traced.shapes[node])
        plain = not set(node.kwargs) - {"query", "key", "value", "is_causal"} and len(node.args) <= count
        if value.axis != len(value.shape) - 1 or len(value.shape) != rank or last in operands[: count - 1]:
            return None
        self._value(node, rank - 1)
        # A row of attention sums to 1, that of any other product does not.
        kind = "copy" if attention and plain else "copy zeros"
        return Use(kind=kind, links={last: Same()}, whole=others, why=f"{self.called(node)} needs it where it is")

    # What only moves .................................................................................................

    def _move(self, node: fx.Node) -> Use | None:
        """Anything whose result has elements of its input, in other places."""
        source_node, ties = self._moved_from(node)
        tensors = [n for n in node.all_input_nodes if n in self.traced.shapes]
        if source_node is None or source_node not in self.values or set(tensors) - {source_node}:
            return None
        source = self.values[source_node]
        run = self._runner(node, source_node)
        numbers = torch.arange(source.channels)
        try:
            moved = run(self._spread(source, numbers))
        except Exception:
            return None
        best: tuple[Any, ...] | None = None
        for axis in range(1, moved.dim()):
            pairs = torch.unique(
                moved.transpose(0, axis).reshape(moved.shape[axis], -1)
                + torch.arange(moved.shape[axis])[:, None] * source.channels
            )
            target, where = pairs // source.channels, pairs % source.channels
            apart = len(target) == moved.shape[axis] or len(where) == len(torch.unique(where))
            if not apart and source.channels > 1:
                continue
            link = Pairs(where, target, (source.channels, moved.shape[axis]), ties)
            parts = _parts(link)
            stiff = not _may_shrink(lambda keep: run(self._spread(source, keep)), moved, axis, parts, source.channels)
            kept_axis = axis == source.axis and moved.dim() == len(source.shape)
            rank = (len(parts) > 1, not stiff, len(parts), kept_axis, axis)
            if best is None or rank > best[0]:
                best = (rank, axis, link, stiff)
        if best is None:
            return None
        _, axis, link, stiff = best
        device = source.needed.device
        link.source, link.target = link.source.to(device), link.target.to(device)
        self._value(node, axis)
        why = f"sizes are written in the code of {self.called(node)}"
        together = f"{self.called(node)} moves it together with one that lives"
        same = link.sizes[0] == link.sizes[1] and torch.equal(link.source, link.target) and not ties
        return Use(kind="copy", links={source_node: Same() if same else link}, stiff=why if stiff else "", why=together)

    def _moved_from(self, node: fx.Node) -> tuple[fx.Node | None, list[list[int]]]:
        """What a node moves, and which of its channels only go together: those of equal parts."""
        first = node.all_input_nodes[0]
        if self.ops[node] is not Op.ITEM or self.ops[first] is not Op.SPLIT:
            return first, []
        source_node = first.all_input_nodes[0]
        if source_node not in self.values or self.uses[first].kind == "opaque":
            return None, []
        source = self.values[source_node]
        size = self.traced.shapes[node][source.axis] if len(self.traced.shapes[node]) == len(source.shape) else 0
        if not 0 < size < source.channels or source.channels % size:
            return source_node, []
        return source_node, [list(range(i, source.channels, size)) for i in range(size)]

    @staticmethod
    def _spread(source: Value, numbers: Tensor) -> Tensor:
        """A tensor of the source's shape (with as many channels as numbers) that holds each channel's number."""
        shape = list(source.shape)
        shape[source.axis] = len(numbers)
        return numbers.reshape([-1 if i == source.axis else 1 for i in range(len(shape))]).expand(shape).contiguous()

    def _runner(self, node: fx.Node, source: fx.Node) -> Callable[[Tensor], Tensor]:
        """The node as a function of its one tensor, sizes of which are worked out anew."""

        def result(n: fx.Node, x: Tensor) -> Any:
            if n is source:
                return x
            if n in self.traced.values:
                if source not in self._widths.get(n, ()):
                    return self.traced.values[n]
                if self._widths[n] != {source}:
                    raise ValueError("depends on the channels of others")
            args, kwargs = map_arg((n.args, dict(n.kwargs)), lambda m: result(m, x))
            if n.op == "call_module":
                return self.module_of(n)(*args, **kwargs)
            if n.op == "call_method":
                return getattr(args[0], str(n.target))(*args[1:], **kwargs)
            assert callable(n.target)
            return n.target(*args, **kwargs)

        return lambda x: result(node, x)


def _parts(link: Pairs) -> list[list[int]]:
    """The channels of the input that only go together."""
    places = Places()
    ids = places.new(link.sizes[0])
    link.place(places, ids, "")
    found: dict[int, list[int]] = {}
    for i in ids:
        found.setdefault(places.of(i), []).append(i)
    return list(found.values())


def _may_shrink(
    run: Callable[[Tensor], Tensor], moved: Tensor, axis: int, parts: Sequence[Sequence[int]], channels: int
) -> bool:
    """Whether a move does to fewer channels what it does to all: tried with one part less, and with one alone."""
    if len(parts) < 2:
        return True
    for gone in (parts[:1], parts[-1:], parts[1:], parts[:-1]):
        out = {c for part in gone for c in part}
        keep = torch.tensor([c for c in range(channels) if c not in out])
        first = moved.transpose(0, axis).reshape(moved.shape[axis], -1)
        stay = [i for i, row in enumerate(_first_column(first)) if row not in out]
        try:
            found = run(keep)
        except Exception:
            return False
        expected = moved.index_select(axis, torch.tensor(stay, dtype=torch.long))
        if found.shape != expected.shape or not torch.equal(found, expected):
            return False
    return True


def _first_column(rows: Tensor) -> Iterable[int]:
    return rows[:, 0].tolist() if rows.shape[1] else []


_MOVES = (Op.MOVE, Op.FLATTEN, Op.ITEM)
_RULES: dict[Op, Callable[[Linker, fx.Node], Use | None]] = {
    Op.CONV: Linker._layer,
    Op.TRANSPOSED: Linker._layer,
    Op.LINEAR: Linker._layer,
    Op.BATCHNORM: Linker._norm,
    Op.INSTANCENORM: Linker._norm,
    Op.GROUPNORM: Linker._norm,
    Op.LAYERNORM: Linker._norm,
    Op.RELU: Linker._through,
    Op.ACTIVATION: Linker._prelu,
    Op.SAME: lambda linker, node: linker._through(node, "copy"),
    Op.MAXPOOL: Linker._spatial,
    Op.AVGPOOL: Linker._spatial,
    Op.ADAPTIVE_MAXPOOL: Linker._spatial,
    Op.ADAPTIVE_AVGPOOL: Linker._spatial,
    Op.RESIZE: Linker._spatial,
    Op.PAD: Linker._pad,
    Op.FLATTEN: Linker._move,
    Op.MOVE: Linker._move,
    Op.ITEM: Linker._move,
    Op.GLU: Linker._glu,
    Op.ADD: Linker._elementwise,
    Op.MUL: Linker._elementwise,
    Op.ELEMENTWISE: Linker._elementwise,
    Op.CAT: Linker._cat,
    Op.MEAN: Linker._over_axes,
    Op.SOFTMAX: Linker._over_axes,
    Op.MATMUL: Linker._product,
    Op.ATTENTION: Linker._product,
}
