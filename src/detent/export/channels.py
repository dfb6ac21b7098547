"""Which channels of a traced model are constant, which are used, and which can only go together.

A unit is one output channel of a convolution or one output of a linear layer, with everything that follows it channel
by channel (norms, activations, pooling, resizing, flattening). It is *unused* where no later layer has a weight for
it, and *constant* where it has no incoming weights left, so that it gives the same number whatever the input. Both are
found on the traced graph: constants forwards, use backwards, in turns until nothing changes. `export.links` says what
each node does with channels; `export.slim` uses the result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from detent.export.calling import Call
from detent.export.links import All, Groups, Linker, Pairs, Same, Use, Value
from detent.export.trace import Op, trace
from detent.export.units import Places, Units, grouped, shrink_norm, taken
from detent.parameters import canonical_name

__all__ = ["ChannelGraph"]

_NORMS = (Op.BATCHNORM, Op.INSTANCENORM, Op.GROUPNORM, Op.LAYERNORM)
_ALIKE = 1e-12  # of float64 numbers that differ by the order of their sums alone


class ChannelGraph:
    """A traced model with what is known of its channels; `fold` changes its weights, `remove` its shapes.

    Args:
        model: unwrapped, in eval mode.
        call: how it is called.
        locked: canonical names of parameters that must stay as they are.

    Raises:
        ValueError: it cannot be traced.

    Attributes:
        unused: by layer, the outputs that nothing used.
        folded: by layer, the inputs that were constant and went into a bias.
    """

    def __init__(self, model: nn.Module, call: Call, locked: Iterable[str] = ()) -> None:
        self.model, self.locked = model, set(locked)
        traced = trace(model, call)
        self.nodes, self.modules = traced.nodes, traced.modules
        self.names = {id(p): canonical_name(name) for name, p in model.named_parameters()}
        self.linker = Linker(traced, self._shared())
        self.values: dict[fx.Node, Value] = self.linker.values
        self.uses: dict[fx.Node, Use] = self.linker.uses
        self.weighted = {node: Units(self.module_of(node)) for node in self.nodes if self.uses[node].kind == "weighted"}
        self.unused: dict[str, set[int]] = {}
        self.folded: dict[str, set[int]] = {}
        self._stuck: dict[tuple[str, str, int], str] = {}

    def _shared(self) -> dict[str, str]:
        """Modules and parameters that stand at several places, with the reason why they stay as they are."""
        calls: dict[str, int] = {}
        owners: dict[int, set[str]] = {}
        found: dict[str, str] = {}
        for node in self.nodes:
            if node.op == "call_module":
                calls[str(node.target)] = calls.get(str(node.target), 0) + 1
            elif node.op == "get_attr":  # used by a function, past its module
                owner, _, name = str(node.target).rpartition(".")
                owners.setdefault(id(getattr(self.modules.get(owner), name, None)), set()).add("a function")
        for name, module in self.model.named_modules(remove_duplicate=False):
            for param in module.parameters(recurse=False):
                owners.setdefault(id(param), set()).add(name or "the model")
        for name, module in self.modules.items():
            own = list(module.parameters(recurse=False))
            if own and calls.get(name, 0) > 1:
                found[name] = f"is called {calls[name]} times"
            elif any(len(owners[id(p)]) > 1 for p in own):
                found[name] = "shares its parameters"
                if name == "":
                    continue
            for own_name, param in module._parameters.items():
                if param is not None and len(owners[id(param)] - {"a function"}) > 1:
                    found[f"{name}.{own_name}" if name else own_name] = "shares its parameters"
        return found

    def module_of(self, node: fx.Node) -> Any:
        """The module that a node calls, or `None`."""
        return self.linker.module_of(node)

    # What is constant, forwards .....................................................................................

    def _forwards(self, node: fx.Node) -> Tensor:
        """The constants of a node's channels."""
        use, mine = self.uses[node], self.values[node]
        known = {n: link.forth(self.values[n].constant) for n, link in use.links.items()}
        unknown = torch.full_like(mine.constant, torch.nan)
        if node in self.linker.clobbered or use.kind == "opaque":
            return unknown
        if use.kind == "weighted":
            return torch.where(self.weighted[node].rows(), torch.nan, self.weighted[node].bias())
        if use.kind in ("evaluate", "merge", "product"):
            return self._calculated(node, use)
        if use.kind == "concat":
            for n, link in use.links.items():
                assert isinstance(link, Pairs)
                unknown[link.target] = self.values[n].constant[link.source]
            return unknown
        first = next(iter(known.values()))
        if use.kind == "join":
            for other in known.values():
                first = torch.where(first == other, first, torch.nan)
        elif use.kind == "padded":
            first = torch.where(first == use.fill, first, torch.nan)
        elif use.kind == "copy zeros":
            first = torch.where(first == 0, first, torch.nan)
        link = next(iter(use.links.values()))
        return torch.where(link.missing(), use.fill, first) if isinstance(link, Pairs) else first

    def _calculated(self, node: fx.Node, use: Use) -> Tensor:
        """Constants of what changes numbers: the node itself on constants, in float64."""
        module, op = self.module_of(node), self.linker.ops[node]
        found, mine = torch.full_like(self.values[node].constant, torch.nan), self.values[node]
        known = {n: self.values[n].constant for n in use.links}
        sure = torch.stack([_certain(link, known[n], mine.channels) for n, link in use.links.items()]).all(dim=0)
        gain = self._gain(node)
        if op is Op.INSTANCENORM and module.running_mean is None:  # a constant is its own mean
            shift = torch.zeros_like(found) if module.bias is None else module.bias.detach().double()
            found = torch.where(sure, shift, found)
        elif sure.any() and not use.whole:
            found = torch.where(sure, self._evaluated(node, known), found)
            if op in _NORMS:  # differences of equal numbers
                found = torch.where(found.abs() < _ALIKE, 0.0, found)
        if gain is not None:
            bias = getattr(module, "bias", None)
            shift = torch.zeros_like(found) if bias is None else bias.detach().double()
            found = torch.where(gain.detach() == 0, shift, found)
        if use.kind == "product":
            for n, link in use.links.items():
                found = torch.where(link.forth(known[n]) == 0, 0.0, found)
        return found

    def _gain(self, node: fx.Node) -> Any:
        """The weight that a norm has for every channel, or `None`."""
        if self.linker.ops[node] not in _NORMS or not self.uses[node].links:
            return None
        link, weight = next(iter(self.uses[node].links.values())), self.module_of(node).weight
        across = self.linker.ops[node] is not Op.LAYERNORM or isinstance(link, Groups)
        return weight if weight is not None and across and weight.shape == self.values[node].needed.shape else None

    def _evaluated(self, node: fx.Node, known: Mapping[fx.Node, Tensor]) -> Tensor:
        """The node on constant channels; a number a channel of the result, or NaN where it varies by position."""
        numbers, shapes = self.linker.traced.values, self.linker.traced.shapes

        def tensor_of(n: fx.Node) -> Any:
            if n in known:
                value = self.values[n]
                shape = [1] * len(value.shape)
                shape[value.axis] = -1
                return known[n].reshape(shape).expand((1, *value.shape[1:])).clone()
            if n in numbers:
                return numbers[n]
            assert n.op == "get_attr" and n in shapes
            held: Any = self.linker.traced.module
            for part in str(n.target).split("."):
                held = getattr(held, part)
            return held.detach().double()

        args, kwargs = map_arg((node.args, dict(node.kwargs)), tensor_of)
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
        low, high = by_channel.amin(dim=1), by_channel.amax(dim=1)
        return torch.where(high - low <= _ALIKE * high.abs(), by_channel[:, 0], torch.nan)

    # What is used, backwards ........................................................................................

    def _backwards(self, node: fx.Node) -> None:
        """Mark what the node needs of its inputs."""
        use = self.uses[node]
        for n in use.whole:
            self.values[n].needed[:] = True
        if not use.links:
            return
        needed = self.values[node].needed
        if use.kind == "weighted":
            self.values[next(iter(use.links))].needed |= self.weighted[node].uses(needed)
            return
        gain = self._gain(node)
        if gain is not None:
            needed = needed & (gain.detach() != 0)
        if use.kind == "product":
            dead = {n: link.forth(self.values[n].constant) == 0 for n, link in use.links.items()}
            for i, (n, link) in enumerate(use.links.items()):
                others = torch.zeros_like(needed)
                for m in use.links:
                    others |= dead[m] & (m is not n)
                # Where two zeros meet, the first one is kept to be the reason.
                self.values[n].needed |= link.back(needed & ~(others & ~dead[n] if i == 0 else others))
            return
        for n, link in use.links.items():
            self.values[n].needed |= link.back(needed)

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
        """Whether a parameter must stay as it is."""
        return param is not None and self.names.get(id(param)) in self.locked

    def clear_near_dead(self, share: float) -> int:
        """Set to zero the weights of outputs and inputs none of whose weights exceeds a share of the layer's largest.

        Norms likewise: a gain, beside the largest of its norm. Returns how many outputs and gains there were.
        """
        count = 0
        with torch.no_grad():
            for node in self.nodes:
                if node in self.weighted and not self.is_locked(self.module_of(node).weight):
                    rows, columns = self.weighted[node].near_dead(share)
                    self.weighted[node].clear(rows=rows, columns=columns)
                    count += int(rows.sum())
                else:
                    gain = self._gain(node)
                    if gain is not None and not self.is_locked(gain):
                        size = gain.detach().abs()
                        near = (size > 0) & (size <= share * size.max())
                        gain[near] = 0.0
                        count += int(near.sum())
        return count

    def fold(self, new_biases: bool) -> None:
        """Put constants into biases and zeros where nothing is used, until nothing changes.

        Args:
            new_biases: give a layer that has no bias one if a constant must go there.
        """
        changed = True
        with torch.no_grad():
            while changed:
                self.look()
                self._stuck = {}
                changed = False
                for node in self.nodes:
                    if node in self.weighted:
                        changed |= self._fold_inputs(node, new_biases)
                        changed |= self._clear_outputs(node)
                    elif self._gain(node) is not None or self.linker.ops[node] in _NORMS[:3]:
                        changed |= self._clear_norm(node)

    def _clear_outputs(self, node: fx.Node) -> bool:
        """Rows and biases of outputs that nothing uses become zero."""
        module, unused = self.module_of(node), ~self.values[node].needed
        self.unused.setdefault(str(node.target), set()).update(unused.nonzero().reshape(-1).tolist())
        live = {"weight": unused & self.weighted[node].rows(), "bias": unused & (self.weighted[node].bias() != 0)}
        found = False
        for name, which in live.items():
            if not which.any():
                continue
            if self.is_locked(getattr(module, name)):
                why = f"{self.names[id(getattr(module, name))]} lies in a target that has no zero there"
                self._note(str(node.target), "unit", which, why)
            elif name == "weight":
                self.weighted[node].clear(rows=which)
                found = True
            else:
                module.bias[which] = 0.0
                found = True
        return found

    def _clear_norm(self, node: fx.Node) -> bool:
        """The numbers of unused channels become those of a fresh norm, with weight and bias zero."""
        module, unused, found = self.module_of(node), ~self.values[node].needed, False
        if not self.uses[node].links:
            return False
        for name, value in (("weight", 0.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            tensor = getattr(module, name, None)
            if tensor is None or tensor.shape != unused.shape or self.is_locked(tensor):
                continue
            live = unused & (tensor != value)
            if live.any():
                tensor[live] = value
                found = True
        return found

    def _fold_inputs(self, node: fx.Node, new_biases: bool) -> bool:
        """Constants among a layer's inputs go into its bias; their columns become zero."""
        units, module = self.weighted[node], self.module_of(node)
        if not self.uses[node].links:
            return False
        source = self.values[next(iter(self.uses[node].links))]
        known = ~source.constant.isnan() & units.columns()
        if not known.any():
            return False
        if self.is_locked(module.weight):
            self._stay(node, known, f"{self.names[id(module.weight)]} lies in a target that has no zero there")
            return False
        free = known.clone()
        if not units.spreads_evenly():
            free &= source.constant == 0
            word = "spreads it unevenly" if units.turned else "pads with zeros, so at the borders it is no constant"
            self._stay(node, known & ~free, f"{node.target} {word}")
        delta = units.contribution(torch.where(free, source.constant, 0.0))
        if bool((delta != 0).any()) and not self._shift(node, delta, new_biases):
            self._stay(node, free & (source.constant != 0), f"{node.target} has no bias that could take it")
            free &= source.constant == 0
        if not free.any():
            return False
        units.clear(columns=free)
        self.folded.setdefault(str(node.target), set()).update(free.nonzero().reshape(-1).tolist())
        return True

    def _shift(self, node: fx.Node, delta: Tensor, new_biases: bool) -> bool:
        """Add to the bias of a layer, or take it from the mean of the BatchNorm that follows."""
        module = self.module_of(node)
        if module.bias is not None:
            if self.is_locked(module.bias):
                return False
            module.bias.copy_((module.bias.double() + delta).to(module.bias.dtype))
            return True
        users = list(node.users)
        follows = len(users) == 1 and self.linker.ops[users[0]] is Op.BATCHNORM and self.uses[users[0]].links
        if follows:
            norm = self.module_of(users[0])
            norm.running_mean.copy_((norm.running_mean.double() - delta).to(norm.running_mean.dtype))
            return True
        if new_biases:
            bias = nn.Parameter(delta.to(module.weight.dtype), requires_grad=module.weight.requires_grad)
            module.bias = bias
            self.names[id(bias)] = canonical_name(f"{node.target}.bias")
        return new_biases

    # Saying what stays ..............................................................................................

    def _note(self, name: str, what: str, which: Tensor, why: str) -> None:
        for c in which.nonzero().reshape(-1).tolist():
            self._stuck.setdefault((name, what, c), why)

    def _stay(self, node: fx.Node, which: Tensor, why: str) -> None:
        """Inputs of a layer that stay constant there."""
        for name, channels in self._origins(next(iter(self.uses[node].links)), which):
            self._note(name, "unit", channels, why)

    def _origins(self, node: fx.Node, which: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The outputs of layers that the given channels of a value come from, channel by channel."""
        if not which.any():
            return
        if node in self.weighted:
            yield str(node.target), which
            return
        for n, link in self.uses[node].links.items():
            yield from self._origins(n, link.back(which))

    def left(self, zeros: bool = False) -> tuple[str, ...]:
        """Outputs that are constant but used by something that cannot take them, in words.

        Args:
            zeros: also those that are always 0, and those that are given out.
        """
        for node in self.nodes:
            use = self.uses[node]
            for n in use.whole if zeros or node.op != "output" else ():
                self._hold(n, ~self.values[n].constant.isnan(), f"it goes into {use.why}", zeros)
            if node not in self.values or use.kind == "weighted":
                continue
            lost = self.values[node].constant.isnan() & self.values[node].needed
            why = use.why or use.stiff or f"behind {self.linker.called(node)} it varies"
            for n, link in use.links.items():
                self._hold(n, ~self.values[n].constant.isnan() & link.back(lost), why, zeros)
        return grouped(self._stuck)

    def _hold(self, node: fx.Node, which: Tensor, why: str, zeros: bool) -> None:
        which = which if zeros else which & (self.values[node].constant != 0)
        for name, channels in self._origins(node, which):
            self._note(name, "unit", channels, why)

    def unread(self) -> tuple[str, ...]:
        """Everything that stays, after `remove`: also parts of modules that are not understood."""
        known = {str(node.target) for node in self.weighted}
        called = {str(node.target): self.uses[node].why for node in self.nodes if node.op == "call_module"}
        lines = []
        for name, module in self.model.named_modules():
            if name in known or isinstance(module, nn.Embedding):
                continue
            for own, param in module.named_parameters(recurse=False):
                if param.dim() < 2 or min(param.shape[:2]) < 2 or not param.is_floating_point():
                    continue
                live = (param.detach() != 0).reshape(*param.shape[:2], -1).any(dim=2)
                rows, columns = int((~live.any(dim=1)).sum()), int((~live.any(dim=0)).sum())
                if rows or columns:
                    counts = f"{rows} of {live.shape[0]} rows and {columns} of {live.shape[1]} columns"
                    full = f"{name}.{own}" if name else own
                    why = called.get(name) or self._outside(name, full)
                    lines.append(f"{full}: {counts} of zeros stay: {why}")
        return (*grouped(self._stuck), *lines)

    def _outside(self, name: str, full: str) -> str:
        """Why a parameter is no weight of a node of the graph."""
        within = [str(node.target) for node in self.nodes if node.op == "call_module"]
        within = [whole for whole in within if name.startswith(f"{whole}.")]
        if within:
            return f"it is part of {within[0]!r} ({type(self.modules[within[0]]).__name__}), which is not understood"
        reads = [node for node in self.nodes if node.op == "get_attr" and str(node.target) == full]
        readers = [user for node in reads for user in node.users]
        if readers:
            return f"{self.linker.called(readers[0])} reads it, which is not understood"
        return "the example's call does not reach it"

    # Removing .......................................................................................................

    def remove(self) -> None:
        """Take out every place that nothing uses: rows, columns and norm channels of what hangs together."""
        self.look()
        places, slices = self._places()
        gone, last = self._removable(places)
        reasons = places.reasons() | dict.fromkeys(last, "a layer keeps one channel at least")
        for node in self.nodes:
            if node not in self.values:
                continue
            ids = [places.of(place) for place in self.values[node].ids]
            keep = [i for i, place in enumerate(ids) if place not in gone]
            if node in self.weighted:
                self._shrink(node, places, gone, reasons)
            elif len(keep) < len(ids) and node.op == "call_module" and self.uses[node].kind == "evaluate":
                shrink_norm(self.module_of(node), keep)
            if node in slices and len(keep) < len(ids):
                attribute, axis = slices[node]
                owner, _, name = str(attribute.target).rpartition(".")
                held = getattr(self.modules[owner], name)
                setattr(self.modules[owner], name, taken(held, keep, axis))

    def _read(self, node: fx.Node) -> Value:
        return self.values[next(iter(self.uses[node].links))]

    def _shrink(self, node: fx.Node, places: Places, gone: set[int], reasons: dict[int, str]) -> None:
        """A layer without the outputs and inputs that go, and a word for those that nothing uses but that stay."""
        name, units, use = str(node.target), self.weighted[node], self.uses[node]
        outputs = [places.of(place) for place in self.values[node].ids]
        inputs = [places.of(place) for place in self._read(node).ids] if use.links else []
        tied = "it is tied to one that lives"
        for c in (~self.values[node].needed).nonzero().reshape(-1).tolist():
            if outputs[c] not in gone:
                self._stuck.setdefault((name, "unit", c), reasons.get(outputs[c], tied))
        for c in (~units.rows()).nonzero().reshape(-1).tolist():
            over = node in self.linker.clobbered
            why = "written over" if over else f"read by {self.linker.called(next(iter(node.users)))}"
            if outputs[c] not in gone:
                self._stuck.setdefault((name, "unit", c), f"it is constant, but {why}")
        for c in (~units.columns()).nonzero().reshape(-1).tolist() if units.groups == 1 else ():
            if not inputs:
                self._stuck.setdefault((name, "input", c), use.why)
            elif inputs[c] not in gone:
                self._stuck.setdefault((name, "input", c), reasons.get(inputs[c], tied))
        for c in range(units.size[1]):
            if outputs[c] in gone:
                self._stuck.pop((name, "unit", c), None)
        keep_in = [i for i, place in enumerate(inputs) if place not in gone] if inputs else list(range(units.size[0]))
        units.shrink([i for i, place in enumerate(outputs) if place not in gone], keep_in)

    def _places(self) -> tuple[Places, dict[fx.Node, tuple[fx.Node, int]]]:
        """Number the channels of all values so that those that can only go together are in one class.

        Also which parameters are sliced with which value.
        """
        places, slices = Places(), {}
        for node in self.nodes:
            use = self.uses[node]
            for n in use.whole:
                places.pin(self.values[n].ids, use.why)
            if node not in self.values:
                continue
            mine = self.values[node]
            if use.kind in ("weighted", "opaque"):
                mine.ids = places.new(mine.channels)
                if use.kind == "opaque":
                    places.pin(mine.ids, f"it comes from {use.why}")
                elif self.weighted[node].groups > 1:
                    self._tie_groups(node, places)
                continue
            for n in use.links if use.stiff else ():
                places.pin(self.values[n].ids, use.stiff)
            if use.kind == "concat":
                mine.ids = [place for n in use.links for place in self.values[n].ids]
            else:
                parts = {n: link.place(places, self.values[n].ids, use.why) for n, link in use.links.items()}
                same = [parts[n] for n, link in use.links.items() if not isinstance(link, All)]
                mine.ids = same[0]
                for other in same[1:]:
                    places.tie(mine.ids, other, use.why)
                for n, link in use.links.items():
                    if isinstance(link, All) and mine.channels > 1:
                        places.pin(self.values[n].ids, use.why)
            if use.attribute is not None:
                slices[node] = use.attribute
        for of, why in self.linker.pins:
            places.pin(self.values[of].ids, why)
        return places, slices

    def _tie_groups(self, node: fx.Node, places: Places) -> None:
        """A group of a convolution goes as a whole: its inputs and its outputs."""
        units, why = self.weighted[node], f"{self.linker.called(node)} takes it together with channels that live"
        use, mine = self.uses[node], self.values[node]
        if not use.links:
            places.pin(mine.ids, use.why)
            return
        given = self.values[next(iter(use.links))].ids
        inputs, outputs = len(given) // units.groups, mine.channels // units.groups
        for i in range(units.groups):
            whole = mine.ids[i * outputs : (i + 1) * outputs] + given[i * inputs : (i + 1) * inputs]
            places.tie(whole[:1] * (len(whole) - 1), whole[1:], why)

    def _removable(self, places: Places) -> tuple[set[int], set[int]]:
        """The classes of places that are used nowhere, and those that stay because a layer keeps one channel."""
        blocked: set[int] = set()
        for node, units in self.weighted.items():
            if units.groups == 1 and self.uses[node].links:
                used = units.columns().tolist()
                blocked |= {places.of(p) for p, live in zip(self._read(node).ids, used, strict=True) if live}
        gone, last = places.all - blocked - places.pinned, set()
        for value in self.values.values():
            mine = [places.of(place) for place in value.ids]
            if mine and gone.issuperset(mine):
                gone.discard(mine[0])
                last.add(mine[0])
        return gone, last


def _certain(link: Same, constants: Tensor, count: int) -> Tensor:
    """Whether all that a channel of the result is made of is constant, whatever the numbers."""
    known = ~constants.isnan()
    if isinstance(link, Pairs):
        found = torch.ones(count, dtype=torch.bool, device=constants.device)
        found[link.target[~known[link.source]]] = False
        return found
    return ~link.forth(constants).isnan() if isinstance(link, (Groups, All)) else known
