"""The integer program of `export.integer` as ONNX: ConvInteger, MatMulInteger and integer arithmetic, nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from detent.export.integer_steps import IntegerModel, Step
from detent.pack.atomic import destination, replace_file

__all__ = ["integers_to_onnx"]

_OPSET = 17
_NEEDED = "writing integers as ONNX needs onnx: pip install 'detent[export]'"


def integers_to_onnx(model: IntegerModel, path: str | os.PathLike[str]) -> int:
    """Write the steps as an ONNX file that gives exactly their integers in any correct runtime.

    The graph has the input `x` (float32) and the outputs `q` (int64, the last step's integers) and `y` (float32,
    `scale * (q - zero)`). Between the first rounding and `q` there are integer operations alone. A shift is written
    as `(v - v mod 2^n) / 2^n`, because ONNX shifts unsigned numbers only.

    Args:
        model: from `to_integer`.
        path: the file to write.

    Returns:
        Bytes written.

    Raises:
        ImportError: onnx is not installed.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch, detent as dt
        >>> from detent.export import to_integer
        >>> run = dt.compress(torch.nn.Sequential(torch.nn.Linear(4, 2)), dt.Recipe([
        ...     dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = integers_to_onnx(to_integer(run, [torch.randn(8, 4)]), f"{folder}/model.onnx")
        >>> size < 2000
        True
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    where = destination(path)
    writer = _Writer(onnx)
    # A prefix, for a step may be called as the graph's own input or outputs are.
    steps = [replace(s, name=f"step.{s.name}", inputs=tuple(f"step.{name}" for name in s.inputs)) for s in model.steps]
    for step in steps:
        writer.write(step)
    proto = writer.finish(steps[0], steps[-1])
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString()
    replace_file(where, data)
    return len(data)


class _Writer:
    """Collects nodes; every value between input and output is uint8 but the last one."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.ranks: dict[str, int] = {}
        self.channels: dict[str, int] = {}

    def constant(self, value: Any, dtype: str, name: str) -> str:
        array = np.asarray(value, dtype=dtype)
        name = f"{name}.{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        output = output or f"{op}.{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def cast(self, value: str, dtype: str, output: str | None = None) -> str:
        to = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node("Cast", [value], output, to=to)

    # One step ......................................................................................................

    def write(self, step: Step) -> None:
        """Append the nodes of a step."""
        n = step.numbers
        if step.op == "input":
            self.ranks[step.name], self.channels[step.name] = len(n["shape"]) + 1, n["shape"][0]
            scale = self.constant(step.scale, "float32", "scale")
            rounded = self.node("QuantizeLinear", ["x", scale, self.constant(step.zero, "uint8", "zero")])
            self.bounded(rounded, n, step.name, "uint8")
            return
        read = step.inputs
        self.ranks[step.name] = self.ranks[read[0]]
        self.channels[step.name] = len(n["weight"]) if "weight" in n else self.channels[read[0]]
        if step.op in ("conv", "average"):
            acc = self.convolution(step, read[0])
            flat = n.get("flat", False)
            self.rescaled(acc, n, f"{step.name}.sides" if flat else step.name, step.name)
            if flat:
                self.node("Flatten", [f"{step.name}.sides"], step.name)
                self.ranks[step.name] = 2
        elif step.op == "linear":
            weight = self.constant(n["weight"].T, "int8", "weight")
            zero = self.constant(n["zero_in"], "uint8", "zero")
            self.rescaled(self.node("MatMulInteger", [read[0], weight, zero]), n, step.name, step.name)
        elif step.op == "scale":
            self.rescaled(self.centred(read[0], n["zero_in"]), n, step.name, step.name)
        elif step.op == "add":
            self.sum(step, read)
        elif step.op == "max":
            sizes = {"kernel_shape": n["kernel"], "strides": n["stride"], "dilations": n["dilation"]}
            self.node("MaxPool", read, step.name, **sizes, pads=n["padding"] * 2, ceil_mode=int(n["ceil"]))
        elif step.op == "pad":
            self.padded(step, read[0])
        elif step.op == "clamp":
            self.bounded(read[0], n, step.name, "uint8")
        else:
            assert step.op == "flatten", step.op
            self.node("Flatten", read, step.name)
            self.ranks[step.name] = 2

    def padded(self, step: Step, read: str) -> None:
        """Padding with the zero point or another constant, or with the activation's own positions."""
        n = step.numbers
        sides = [(0, 0), *n["sides"]]
        modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
        if n["mode"] in modes:
            pads = self.constant([*(side[0] for side in sides), *(side[1] for side in sides)], "int64", "pads")
            value = [self.constant(n["value"], "uint8", "value")] if n["mode"] == "constant" else []
            self.node("Pad", [read, pads, *value], step.name, mode=modes[n["mode"]])
        else:  # no operator of this version goes round
            for axis, (front, behind) in enumerate(sides):
                ends = [self.sliced(read, -front, 2**31 - 1, axis)] * bool(front) + [read]
                ends += [self.sliced(read, 0, behind, axis)] * bool(behind)
                read = self.node("Concat", ends, axis=axis) if len(ends) > 1 else read
            self.node("Identity", [read], step.name)
        self.channels[step.name] += sum(sides[1])

    def sliced(self, read: str, start: int, end: int, axis: int) -> str:
        bounds = [self.constant([number], "int64", "bound") for number in (start, end, axis)]
        return self.node("Slice", [read, *bounds])

    def convolution(self, step: Step, read: str) -> str:
        n = step.numbers
        if step.op == "average":  # the sum over a window is a convolution with ones
            channels = self.channels[step.inputs[0]]
            weight = np.ones((channels, 1, *n["kernel"]), dtype=np.int8)
            options: dict[str, Any] = {"group": channels, "strides": n["stride"], "pads": n["padding"] * 2}
        else:
            weight = n["weight"]
            options = {"group": n["groups"], "strides": n["stride"], "pads": n["padding"] * 2}
            options["dilations"] = n["dilation"]
        zero = self.constant(n["zero_in"], "uint8", "zero")
        return self.node("ConvInteger", [read, self.constant(weight, "int8", "weight"), zero], **options)

    def centred(self, read: str, zero: int) -> str:
        return self.node("Sub", [self.cast(read, "int32"), self.constant(zero, "int32", "zero")])

    def rescaled(self, acc: str, n: Mapping[str, Any], output: str, name: str) -> None:
        """`clamp((acc * multiplier + offset) >> shift)`."""
        shape = (-1,) + (1,) * (self.ranks[name] - 2)
        m, c, d = (np.asarray(v).reshape(shape) for v in (n["multiplier"], n["offset"], 1 << n["shift"]))
        value = self.node("Mul", [self.cast(acc, "int64"), self.constant(m, "int64", "multiplier")])
        value = self.node("Add", [value, self.constant(c, "int64", "offset")])
        self.bounded(self.shifted(value, d, "int64"), n, output, "int64")

    def shifted(self, value: str, divisor: Any, dtype: str) -> str:
        by = self.constant(divisor, dtype, "divisor")
        return self.node("Div", [self.node("Sub", [value, self.node("Mod", [value, by])]), by])

    def sum(self, step: Step, read: Sequence[str]) -> None:
        n = step.numbers
        parts = [
            self.node("Mul", [self.centred(value, zero), self.constant(m, "int32", "multiplier")])
            for value, zero, m in zip(read, n["zeros_in"], n["multipliers"], strict=True)
        ]
        total = self.node("Add", [self.node("Add", parts), self.constant(1 << (n["shift"] - 1), "int32", "half")])
        value = self.shifted(total, 1 << n["shift"], "int32")
        self.bounded(self.node("Add", [value, self.constant(n["zero"], "int32", "zero")]), n, step.name, "int32")

    def bounded(self, value: str, n: Mapping[str, Any], output: str, dtype: str) -> None:
        """Clamped, and in 8 bits again if it fits."""
        low, high = (self.constant(n[key], dtype, key) for key in ("low", "high"))
        if dtype == "uint8":
            self.node("Clip", [value, low, high], output)
        elif n["low"] < 0:
            self.node("Clip", [value, low, high], output)  # the last step's 32 bits
        else:
            self.cast(self.node("Clip", [value, low, high]), "uint8", output)

    # The whole .....................................................................................................

    def finish(self, first: Step, last: Step) -> Any:
        """The model."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        self.cast(last.name, "int64", "q")
        centred = self.node("Sub", ["q", self.constant(last.zero, "int64", "zero")])
        scaled = self.node("Mul", [self.cast(centred, "float64"), self.constant(last.scale, "float64", "scale")])
        self.cast(scaled, "float32", "y")
        shape = first.numbers["shape"]
        sides = ["batch", *shape[:1], *(f"side{i}" for i in range(1, len(shape)))]
        rank = self.ranks[last.name]
        inputs = [helper.make_tensor_value_info("x", kinds.FLOAT, sides)]
        outputs = [
            helper.make_tensor_value_info("q", kinds.INT64, [None] * rank),
            helper.make_tensor_value_info("y", kinds.FLOAT, [None] * rank),
        ]
        graph = helper.make_graph(self.nodes, "integers", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
