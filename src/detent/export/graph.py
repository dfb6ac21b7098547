"""The graph of a model while its weights are replaced by what they are: codes, tables, codewords."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detent.export.forms import bits_of, is_plain, packed_nbytes, parts_of
from detent.grouping import Channel, Group, Layout, granularity_of
from detent.lives import Encoded
from detent.parameters import canonical_name
from detent.specs import short
from detent.targets.forms import Codewords, Floats, Form, Grid, Levels

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OPSET", "OPSET_OF_2_BITS", "OWN", "Exported", "Graph", "OnnxReport", "constants_of"]

OPSET, OPSET_OF_2_BITS = 21, 25  # the first with INT4 and blocks; the first with INT2
_IR_VERSION = {OPSET: 10, OPSET_OF_2_BITS: 13}
OWN = "."  # before names that are not made of a parameter's: no name of a parameter can start with it
_MIDDLE = 128  # the zero point of unsigned codes
_SAFE = 64  # the largest code with which two products fit 16 bits: 2 * 255 * 64 < 2^15
_LARGEST = 2**31 - 2**20  # bytes of one protocol buffer, less what is not tensors


# --- what is said about it -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One parameter in the file.

    Args:
        name: of the parameter.
        target: what it was claimed by, as text; empty if nothing claimed it.
        form: "INT8", "INT4", "INT2" (dequantized); "table UINT4", "codewords UINT8+UINT2" (looked up); "float".
        nbytes: of its codes, scales, levels and codewords.
        reason: why it stays float, if it does.

    Example:
        >>> Exported(name="fc.weight", target="Uniform(bits=4)", form="INT4", nbytes=36).name
        'fc.weight'
    """

    name: str
    target: str
    form: str
    nbytes: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """What an export wrote and how far a runtime was from PyTorch.

    Args:
        path: the file.
        nbytes: its size.
        opset: version of the operator set.
        tensors: every parameter in the file, claimed or not.
        float_claims: claimed parameters that stayed float, with the reason.
        difference: largest |ONNX Runtime - PyTorch| of all outputs, by optimization ("off", "on"); empty if unchecked.
        bound: the largest that any output may differ by, each being held to the tolerance times its own largest value;
            `None` if unchecked or if activations are quantized.
        kernels: operators of the graph that ONNX Runtime made of it with optimizations on, and how many.
        notes: what else is worth knowing: BatchNorm that stayed, layers whose integers are only simulated.

    Example:
        >>> OnnxReport(path="m.onnx", nbytes=4096, opset=25, tensors=()).to_dict()["opset"]
        25
    """

    path: str
    nbytes: int
    opset: int
    tensors: tuple[Exported, ...]
    difference: Mapping[str, float] = field(default_factory=dict)
    bound: float | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def float_claims(self) -> dict[str, str]:
        """Claimed parameters that stayed float, with the reason."""
        return {row.name: row.reason for row in self.tensors if row.target and row.form == "float"}

    def __repr__(self) -> str:
        """In a line; a big model's rows are kilobytes."""
        forms = Counter(row.form for row in self.tensors)
        counted = ", ".join(f"{count} {form}" for form, count in forms.items()) or "no parameters"
        allowed = "" if self.bound is None else f" (allowed {self.bound:.3g})"
        difference = f"difference {max(self.difference.values()):.3g}{allowed}" if self.difference else "unchecked"
        notes = f", {len(self.notes)} notes" if self.notes else ""
        return f"<OnnxReport: {self.path}, {self.nbytes:,} bytes, opset {self.opset}; {counted}; {difference}{notes}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON takes it."""
        return asdict(self) | {"float_claims": self.float_claims}


# --- the graph -----------------------------------------------------------------------------------------------------


class Graph:
    """A traced graph whose claimed weights are still to be replaced by their forms.

    Args:
        model: from torch's exporter, not optimized.
        forms: of the claimed weights, by canonical name.
        encoded: where they came from.
        aliases: the first name of every parameter, by each of its names.
        owned: names of all parameters and buffers of the model.
        opset: of the file.
    """

    def __init__(
        self,
        model: ir.Model,
        forms: dict[str, Form],
        encoded: Mapping[str, Encoded],
        aliases: Mapping[str, str],
        owned: set[str],
        opset: int,
    ) -> None:
        self.model, self.forms, self.encoded, self.opset = model, forms, encoded, opset
        self.notes: list[str] = []
        self.reasons: dict[str, str] = {}  # why a claimed weight stays float
        self.rows: dict[str, Exported] = {}
        self.aliases = aliases
        self.normal: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # BatchNorm's (gamma, beta), by what it gives
        self.folded: set[str] = set()  # names of what went into scales and biases, where it is no node any more
        self.lowered: dict[str, ir.Value] = {}  # what stands for a claimed weight, by its name
        self._new: list[ir.Node] = []
        self._books: dict[bytes, ir.Value] = {}
        self._shifts: dict[int, ir.Value] = {}
        self._optimize(owned)
        self.weights = {
            aliases.get(canonical_name(str(name)), canonical_name(str(name))): value
            for name, value in self.graph.initializers.items()
            if name in owned
        }

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    def _optimize(self, owned: set[str]) -> None:
        """Tidy the graph while every parameter and buffer is an input, so that none of them can be folded away."""
        import onnxscript.optimizer

        held = [value for name, value in self.graph.initializers.items() if name in owned]
        constants = [value.const_value for value in held]
        real = list(self.graph.inputs)
        for value in held:
            self._drop(value)
            value.const_value = None
            self.graph.inputs.append(value)
        onnxscript.optimizer.optimize(self.model)
        del self.graph.inputs[:]
        self.graph.inputs.extend(real)
        for value, constant in zip(held, constants, strict=True):
            value.const_value = constant
            if value.uses():
                self.graph.register_initializer(value)

    def _drop(self, value: ir.Value) -> None:
        """Take a value out of the initializers."""
        assert value.name is not None
        self.graph.initializers.pop(value.name)

    # --- small pieces ----------------------------------------------------------------------------------------------

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        import onnx_ir as ir

        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(self, kind: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        """A new node with one output, to be put in front of the others."""
        import onnx_ir as ir

        made = ir.node(kind, inputs, attributes, outputs=[ir.Value(name=name)], name=f"{name}:{kind}")
        self._new.append(made)
        return made.outputs[0]

    def place_new(self) -> None:
        """Put the new nodes in front of the others."""
        if len(self.graph):
            self.graph.insert_before(self.graph[0], self._new)
        else:
            self.graph.extend(self._new)
        self._new = []

    def layout_of(self, name: str) -> Layout | None:
        """The layout of a claimed weight."""
        return self.encoded[name].form.layout if name in self.encoded else None

    # --- claimed weights -------------------------------------------------------------------------------------------

    def lower(self, *, matmul: str, integer: bool = False) -> None:
        """Replace every claimed weight by its form.

        Args:
            matmul: "exact", "nbits" or "direct": whether weights of matrix products are kept from being fused.
            integer: widen INT4 and INT2 codes to INT8 before they are dequantized, as integer kernels ask for.
        """
        for name, value in list(self.weights.items()):
            form = self.forms.get(name)
            if form is not None and integer and _is_bias(value):
                form = Floats(layout=form.layout, dtype=form.dtype, value=form.dense())
                self.reasons[name] = "a bias beside integers, which needs more bits than its codes"
            if form is None or is_plain(form):
                self._note_float(name, value, form)
                continue
            self._replace(name, value, form, matmul, integer)
        for name in sorted(self.forms.keys() - self.weights.keys()):
            self._note(
                name, "absent", 0, "folded into other numbers" if name in self.folded else "the graph does not use it"
            )
        self._fold_transposes()
        self.place_new()

    def _note(self, name: str, form: str, nbytes: int, reason: str = "") -> None:
        item = self.encoded.get(name)
        target = short(item.target) if item else ""
        self.rows[name] = Exported(name=name, target=target, form=form, nbytes=nbytes, reason=reason)

    def _note_float(self, name: str, value: ir.Value, form: Form | None) -> None:
        constant = value.const_value
        assert constant is not None
        self._note(
            name,
            "float" if constant.dtype.is_floating_point() else constant.dtype.name,
            constant.nbytes,
            self.reasons.get(name, "its weights, or their survivors, keep real values") if form else "",
        )

    def _replace(self, name: str, value: ir.Value, form: Form, matmul: str, integer: bool) -> None:
        import onnx_ir as ir

        products = _products(value)
        # An integer kernel takes no blocks; those stay as exact as they are without one.
        matmul = "exact" if matmul == "direct" and _has_blocks(form) else matmul
        turned = matmul != "exact" and isinstance(form, Grid) and len(form.layout.shape) == 2 and products is not None
        self._drop(value)
        kept, value.name = value.name, f"{value.name}:before"
        assert kept is not None
        if turned:
            assert isinstance(form, Grid) and products is not None
            fresh = self._grid(kept, form, integer=integer, turned=True)
            for transpose in products:
                ir.convenience.replace_all_uses_with(transpose.outputs[0], fresh)
                self.graph.remove(transpose, safe=True)
        elif isinstance(form, Grid):
            zero = integer and all(use.node.op_type == "Gemm" for use in value.uses())
            fresh = self._grid(kept, form, integer=integer, zero=zero)
            if matmul == "exact" and _reaches_product(value):
                # A product right behind DequantizeLinear becomes MatMulNBits, which rounds activations to 8 bits. Of a
                # Gemm that is true where its weight is not transposed, and may become true elsewhere.
                fresh = self._reshaped(fresh, form.layout.shape, f"{kept}:as_is")
        elif isinstance(form, Floats):
            fresh = self.node("Cast", [self.constant(f"{kept}.half", _half(form.value))], kept, to=_data_type("FLOAT"))
        elif isinstance(form, Levels):
            fresh = self._table(kept, form)
        else:
            assert isinstance(form, Codewords)
            fresh = self._codewords(kept, form, integer)
        if not turned:
            ir.convenience.replace_all_uses_with(value, fresh)
        self.lowered[name] = fresh
        self._note(name, _word(form, integer), packed_nbytes(form))

    def _reshaped(self, value: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
        return self.node("Reshape", [value, self.constant(f"{name}.shape", np.array(shape, dtype=np.int64))], name)

    def _from_channels(self, value: ir.Value, layout: Layout, name: str) -> ir.Value:
        """A matrix (channels, inputs) back in the shape of the weight."""
        if layout.is_row_major:
            return self._reshaped(value, layout.shape, name)
        if layout.conv_groups == 1:
            split = self._reshaped(value, [layout.shape[axis] for axis in layout.order], f"{name}:split")
            back = sorted(range(len(layout.shape)), key=layout.order.__getitem__)
            return self.node("Transpose", [split], name, perm=back)
        groups, inside = layout.conv_groups, layout.shape[0] // layout.conv_groups
        kernel = layout.shape[2:]
        split = self._reshaped(value, (groups, layout.shape[1], inside, *kernel), f"{name}:split")
        order = [0, 2, 1, *range(3, 3 + len(kernel))]
        return self._reshaped(self.node("Transpose", [split], f"{name}:turned", perm=order), layout.shape, name)

    def _grid(
        self, name: str, form: Grid, *, integer: bool = False, turned: bool = False, zero: bool = False
    ) -> ir.Value:
        layout, scale, bits = form.layout, form.scale, bits_of(form)
        assert scale is not None and bits is not None
        indices, attributes = form.integers, {}
        channels, runs = layout.channels, scale.numel() // layout.channels
        as_matrix = False
        if scale.numel() == 1:
            scale = scale.reshape(())
        elif runs == 1 and layout.conv_groups == 1 and not layout.batch_axes:
            attributes["axis"] = layout.channel_dim
        else:
            as_matrix = len(layout.shape) != 2 or not layout.is_row_major
            indices, attributes["axis"] = layout.by_channel(indices), 0
            if runs > 1:
                groups = granularity_of(form.granularity)
                assert isinstance(groups, Group)
                scale = scale.reshape(channels, runs)
                attributes |= {"axis": 1, "block_size": groups.size}
        if turned:
            indices = indices.t()
            scale = scale.t() if scale.dim() == 2 else scale
            attributes |= {"axis": 1 - attributes["axis"]} if attributes else {}
        unsigned = integer and bits == 8 and _saturates(indices)
        if unsigned:
            codes = self.constant(f"{name}.codes", _integers(indices + _MIDDLE, 8, signed=False))
        else:
            codes = self.constant(f"{name}.codes", _integers(indices, bits))
        if integer and bits < 8:
            shift = 8 - bits - 1
            codes, scale = self._widened(codes, name, shift), scale / 2.0**shift
        inputs = [codes, self.constant(f"{name}.scale", scale.contiguous().numpy())]
        if unsigned:
            inputs.append(self.constant(f"{name}.zero", np.full(tuple(scale.shape), _MIDDLE, dtype=np.uint8)))
        elif zero:  # QGemm is not made without one, although it is 0
            inputs.append(self.constant(f"{name}.zero", np.zeros(tuple(scale.shape), dtype=np.int8)))
        out = self.node("DequantizeLinear", inputs, f"{name}:matrix" if as_matrix else name, **attributes)
        return self._from_channels(out, layout, name) if as_matrix else out

    def _widened(self, codes: ir.Value, name: str, shift: int) -> ir.Value:
        """Narrow codes times 2^shift as INT8, which a runtime works out once: 7 bits, so that no kernel saturates.

        Times a power of two, because biases are whole numbers of inputs x weights, and those of narrow codes are few.
        """
        whole = self.node("Cast", [codes], f"{name}.whole", to=_data_type("INT32"))
        if shift not in self._shifts:
            self._shifts[shift] = self.constant(f"{OWN}shift{shift}", np.array(1 << shift, dtype=np.int32))
        shifted = self.node("Mul", [whole, self._shifts[shift]], f"{name}.shifted")
        return self.node("Cast", [shifted], f"{name}.wide", to=_data_type("INT8"))

    def _raised(self, units: ir.Value, name: str) -> ir.Value:
        """INT8 as UINT8 around 128, which a runtime works out once."""
        whole = self.node("Cast", [units], f"{name}.signed", to=_data_type("INT32"))
        middle = self.constant(f"{name}.middle", np.array(_MIDDLE, dtype=np.int32))
        moved = self.node("Add", [whole, middle], f"{name}.moved")
        return self.node("Cast", [moved], f"{name}.unsigned", to=_data_type("UINT8"))

    def _index(self, name: str, codes: Tensor, parts: tuple[int, ...]) -> ir.Value:
        """Indices as int32, put together from packed parts, the lowest bits first."""
        total: ir.Value | None = None
        at = 0
        for i, width in enumerate(parts):
            part = codes.long() >> at & (1 << width) - 1
            packed = self.constant(f"{name}.codes{i or ''}", _integers(part, width, signed=False))
            found = self.node("Cast", [packed], f"{name}.index{i or ''}", to=_data_type("INT32"))
            if total is not None:
                factor = self.constant(f"{name}.factor{i}", np.array(1 << at, dtype=np.int32))
                found = self.node("Mul", [found, factor], f"{name}.high{i}")
                total = self.node("Add", [total, found], f"{name}.sum{i}")
            total = found if total is None else total
            at += width
        assert total is not None
        return total

    def _table(self, name: str, form: Levels) -> ir.Value:
        layout, (groups, _) = form.layout, form.table.shape
        if groups == 1:
            index = self._index(name, form.codes, parts_of(form))
            return self.node("Gather", [self.constant(f"{name}.levels", form.table[0].numpy()), index], name)
        rows, fan_in = layout.by_channel(form.codes), layout.numel // layout.channels
        runs = groups // layout.channels
        if runs > 1:
            rows = granularity_of(form.granularity).cut(form.codes, layout, 0)
        index = self._index(name, rows, parts_of(form))
        levels = self.constant(f"{name}.levels", form.table.contiguous().numpy())
        out = self.node("GatherElements", [levels, index], f"{name}:rows", axis=1)
        if runs > 1 and rows.numel() != layout.numel:
            out = self._reshaped(out, (layout.channels, -1), f"{name}:padded")
            cut = [self.constant(f"{name}.{k}", np.array([v])) for k, v in (("from", 0), ("to", fan_in), ("axis", 1))]
            out = self.node("Slice", [out, *cut], f"{name}:cut")
        return self._from_channels(out, layout, name)

    def _codewords(self, name: str, form: Codewords, integer: bool) -> ir.Value:
        bits = bits_of(form)
        whole = form.book if bits is None else form.integers
        book = whole.contiguous().numpy()
        key = f"{bits} {book.shape}".encode() + book.tobytes()
        if key not in self._books:
            own = f"{OWN}codebook{len(self._books)}"
            found = self.constant(own, book if bits is None else _integers(whole, bits))
            wide = bits is None or bits == 8
            self._books[key] = found if wide else self.node("Cast", [found], f"{own}.wide", to=_data_type("INT8"))
        index = self._index(name, form.index, parts_of(form))
        units = self.node("Gather", [self._books[key], index], f"{name}:units")
        if form.scale is None:
            return self._reshaped(units, form.layout.shape, name)
        units = self._reshaped(units, form.layout.shape, f"{name}:whole")
        if integer and (form.scale.numel() == 1 or (form.layout.conv_groups == 1 and not form.layout.batch_axes)):
            axis = {} if form.scale.numel() == 1 else {"axis": form.layout.channel_dim}
            scale = form.scale.reshape(()) if form.scale.numel() == 1 else form.scale
            inputs = [units, self.constant(f"{name}.scale", scale.numpy())]
            if _saturates(whole):
                inputs = [self._raised(units, name), inputs[1]]
                inputs.append(self.constant(f"{name}.zero", np.full(tuple(scale.shape), _MIDDLE, dtype=np.uint8)))
            return self.node("DequantizeLinear", inputs, name, **axis)
        # A product and no DequantizeLinear, which runtimes keep for every run: this they work out once, at the start.
        plain = self.node("Cast", [units], f"{name}:float", to=_data_type("FLOAT"))
        return self.node("Mul", [plain, self.constant(f"{name}.scale", form.steps.contiguous().numpy())], name)

    def _fold_transposes(self) -> None:
        """Transpose weights that stay float now and not at every start."""
        import onnx_ir as ir

        for value in list(self.graph.initializers.values()):
            constant = value.const_value
            users = [use.node for use in value.uses()]
            if constant is None or value.name is None or len(users) != 1 or users[0].op_type != "Transpose":
                continue
            perm = users[0].attributes["perm"].as_ints()
            name = value.name
            self._drop(value)
            value.name = f"{name}:before"
            fresh = self.constant(name, np.ascontiguousarray(constant.numpy().transpose(perm)))
            ir.convenience.replace_all_uses_with(users[0].outputs[0], fresh)
            self.graph.remove(users[0], safe=True)

    def keep_float(self, node: ir.Node) -> None:
        """Keep a runtime from making an integer kernel of a layer: it does so only right behind `DequantizeLinear`."""
        import onnx_ir as ir

        weight = node.inputs[1]
        assert weight is not None
        form = next(self.forms[name] for name, value in self.lowered.items() if value is weight)
        shape = np.zeros(len(form.layout.shape), dtype=np.int64)  # 0: as it is
        name = f"{weight.name}:as_is{len(self.graph.initializers)}"
        inputs = [weight, self.constant(f"{name}.shape", shape)]
        made = ir.node("Reshape", inputs, outputs=[ir.Value(name=name)], name=f"{name}:Reshape")
        node.replace_input_with(1, made.outputs[0])
        self.graph.insert_before(node, [made])

    def replace_uses(self, old: ir.Value, fresh: ir.Value) -> None:
        """Use one value wherever another was."""
        import onnx_ir as ir

        ir.convenience.replace_all_uses_with(old, fresh)

    def forget_unused(self) -> None:
        """Leave out what nothing uses any more."""
        self.folded |= {name for name, value in self.weights.items() if not value.uses()}
        for value in [v for v in self.graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
            self._drop(value)
        self.weights = {name: value for name, value in self.weights.items() if value.uses()}

    # --- BatchNorm -------------------------------------------------------------------------------------------------

    def fold_batchnorm(self) -> None:
        """Multiply every BatchNorm behind a layer into the scales and the bias of that layer."""
        for norm in [n for n in self.graph if n.op_type == "BatchNormalization"]:
            reason = self._fold(norm)
            if reason:
                constants = [v.const_value for v in norm.inputs[1:3] if v is not None]
                gamma, beta = (None if c is None else c.numpy().astype(np.float64) for c in constants)
                if gamma is not None and beta is not None:
                    self.normal[str(norm.outputs[0].name)] = (gamma, beta)
                self.notes.append(f"BatchNorm {norm.name or norm.outputs[0].name!r} stays a node: {reason}")

    def _fold(self, norm: ir.Node) -> str:
        """Fold one BatchNorm, or say why not."""

        layer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if layer is None or layer.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(layer.outputs[0].uses()) != 1:
            return "it does not follow a layer of its own"
        if layer.outputs[0].is_graph_output():
            return "what the layer before it gives is also an output of the graph"
        weight = layer.inputs[1]
        names = {id(v): name for name, v in self.weights.items()}
        if weight is None or id(weight) not in names or len(weight.uses()) != 1:
            return "the weight before it is shared or computed"
        name = names[id(weight)]
        constants = [v.const_value for v in norm.inputs[1:] if v is not None]
        numbers = [c.numpy().astype(np.float64) for c in constants if c is not None]
        if len(numbers) != 4:
            return "its numbers are computed"
        if layer.op_type == "Gemm" and not _number(layer, "transB", 0):
            return "the weight before it has its channels elsewhere"
        gamma, beta, mean, var = numbers
        factor = gamma / np.sqrt(var + _number(norm, "epsilon", 1e-5))
        if not self._scaled(name, layer, weight, torch.from_numpy(factor)):
            return f"{name!r} is made of real codewords, which have no scale"
        before = layer.inputs[2] if len(layer.inputs) > 2 else None
        own = before.const_value.numpy() if before is not None and before.const_value is not None else 0.0
        bias = beta + (own - mean) * factor
        fresh = self.constant(f"{name}.bias", bias.astype(np.float32))
        layer.resize_inputs(3)
        layer.replace_input_with(2, fresh)
        self.weights[f"{name} and BatchNorm (bias)"] = fresh
        self._take_over(layer.outputs[0], norm.outputs[0])
        self.normal[str(layer.outputs[0].name)] = (gamma, beta)
        dropped = [v for v in (*norm.inputs[1:], before) if v is not None]
        self.graph.remove(norm, safe=True)
        for value in dropped:
            if value.name in self.graph.initializers and not value.uses():
                self._drop(value)
        self.folded |= {n for n, v in self.weights.items() if not v.uses()}
        self.weights = {n: v for n, v in self.weights.items() if v.uses()}
        return ""

    def _take_over(self, fresh: ir.Value, old: ir.Value) -> None:
        """Use one value wherever another was, also as an output of the graph."""
        import onnx_ir as ir

        for i, output in enumerate(self.graph.outputs):  # first, because uses of an output are not replaced
            if output is old:
                name, old.name = old.name, f"{old.name}:before"
                fresh.name, fresh.shape, fresh.type = name, old.shape, old.type
                self.graph.outputs[i] = fresh
        ir.convenience.replace_all_uses_with(old, fresh)

    def _scaled(self, name: str, layer: ir.Node, weight: ir.Value, factor: Tensor) -> bool:
        form = self.forms.get(name)
        if isinstance(form, Codewords) and form.scale is None:
            return False
        scaled = None if form is None else form.scaled(factor)
        if scaled is not None:
            self.forms[name] = scaled
            return True
        layout = self._layout(name, layer, weight)
        assert weight.const_value is not None
        value = torch.from_numpy(weight.const_value.numpy().copy()).double()
        value = (value * Channel().expand(factor.double(), layout)).float()
        self._drop(weight)
        kept, weight.name = weight.name, f"{weight.name}:before"
        fresh = self.constant(str(kept), value.numpy())
        if form is not None:
            if not is_plain(form):
                self.reasons[name] = "16-bit floats times a factor are none any more"
            self.forms[name] = Floats(layout=layout, dtype=value.dtype, value=value)
        layer.replace_input_with(1, fresh)
        self.weights[name] = fresh
        return True

    def _layout(self, name: str, layer: ir.Node, weight: ir.Value) -> Layout:
        known = self.layout_of(name)
        if known is not None:
            return known
        assert weight.shape is not None
        turned = layer.op_type == "ConvTranspose"
        groups = int(_number(layer, "group", 1)) if turned else 1
        return Layout(shape=tuple(weight.shape.numpy()), channel_dim=int(turned), conv_groups=groups)

    # --- the file --------------------------------------------------------------------------------------------------

    def serialized(self, *, shapes: bool = False) -> bytes:
        """The file: no stack traces, and no shapes that any reader infers, unless they are asked for.

        Raises:
            ValueError: more than one protocol buffer holds.
        """
        import onnx_ir as ir

        size = sum(v.const_value.nbytes for v in self.graph.initializers.values() if v.const_value is not None)
        if size > _LARGEST:
            raise ValueError(f"to_onnx: {size} bytes of tensors; one ONNX file holds {_LARGEST}")
        self.model.ir_version = _IR_VERSION[self.opset]
        self.model.producer_name, self.model.producer_version = "detent", ""
        self.model.metadata_props.clear()
        self.graph.metadata_props.clear()
        for value in (*self.graph.inputs, *self.graph.outputs, *self.graph.initializers.values()):
            value.metadata_props.clear()
        for node in self.graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                if value not in self.graph.outputs and not shapes:
                    value.shape, value.type = None, None
        return ir.to_proto(self.model).SerializeToString()

    def report(
        self,
        path: str,
        nbytes: int,
        difference: Mapping[str, float],
        bound: float | None,
        kernels: Mapping[str, int],
    ) -> OnnxReport:
        """What was written."""
        return OnnxReport(
            path=path,
            nbytes=nbytes,
            opset=self.opset,
            tensors=tuple(self.rows.values()),
            difference=dict(difference),
            bound=bound,
            kernels=dict(kernels),
            notes=tuple(self.notes),
        )


def constants_of(graph: Graph) -> set[int]:
    """Ids of the values that hang on weights alone."""
    found = {id(value) for value in graph.graph.initializers.values()}
    for node in graph.graph:
        if all(value is None or id(value) in found for value in node.inputs):
            found |= {id(value) for value in node.outputs}
    return found


# --- small things --------------------------------------------------------------------------------------------------


def _products(value: ir.Value) -> list[ir.Node] | None:
    """The transpositions of a matrix, if all it does is to be the transposed right side of matrix products."""
    users = [use.node for use in value.uses()]
    for node in users:
        feeds = list(node.outputs[0].uses())
        if node.op_type != "Transpose" or any(u.node.op_type != "MatMul" or u.idx != 1 for u in feeds):
            return None
    return users or None


def _reaches_product(value: ir.Value) -> bool:
    """Whether a weight goes into a matrix product, perhaps transposed."""
    kinds = {use.node.op_type for use in value.uses()}
    turned = [use.node.outputs[0] for use in value.uses() if use.node.op_type == "Transpose"]
    return bool(kinds & {"MatMul", "Gemm"}) or any(_reaches_product(other) for other in turned)


def _half(value: Tensor) -> np.ndarray:
    """16-bit floats as NumPy holds them."""
    import ml_dtypes

    bits = value.contiguous().view(torch.int16).numpy()
    return bits.view(np.float16 if value.dtype == torch.float16 else ml_dtypes.bfloat16)


def _is_bias(value: ir.Value) -> bool:
    """Whether all that a tensor does is to be the bias of layers that have integer kernels."""
    users = list(value.uses())
    return bool(users) and all(use.node.op_type in ("Conv", "Gemm") and use.idx == 2 for use in users)


def _has_blocks(form: Form) -> bool:
    """Whether an output channel has several scales."""
    return isinstance(form, Grid) and form.scale is not None and form.scale.numel() > form.layout.channels


def _saturates(integers: Tensor) -> bool:
    """Whether x86 kernels without VNNI clip sums of these, which add products of unsigned and signed bytes in pairs in
    16 bits. Products of unsigned bytes they add exactly, so such codes are written unsigned.
    """
    return bool((integers.abs() > _SAFE).any())


def _word(form: Form, integer: bool = False) -> str:
    """The form as the report says it."""
    if isinstance(form, Grid):
        bits = bits_of(form)
        return f"UINT{bits}" if integer and bits == 8 and _saturates(form.integers) else f"INT{bits}"
    if isinstance(form, Floats):
        return str(form.value.dtype).removeprefix("torch.").upper()
    assert isinstance(form, Levels | Codewords)
    parts = "+".join(f"UINT{part}" for part in parts_of(form))
    return f"{'table' if isinstance(form, Levels) else 'codewords'} {parts}"


def _integers(values: Tensor, bits: int, signed: bool = True) -> np.ndarray:
    """Integers in the NumPy dtype that packs them at a width."""
    import ml_dtypes

    name = f"{'' if signed else 'u'}int{bits}"
    plain = np.ascontiguousarray(values.numpy()).astype(np.int16)
    return plain.astype(np.dtype(getattr(np if bits == 8 else ml_dtypes, name)))


def _data_type(name: str) -> int:
    import onnx_ir as ir

    return ir.DataType[name].value


def _number(node: ir.Node, name: str, default: float) -> float:
    """A numeric attribute of a node."""
    return node.attributes[name].value if name in node.attributes else default
