"""Claimed weights that a model multiplies before it uses them, as weight norm does: the factors go into the scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from detent.export.graph import Graph, constants_of
from detent.grouping import Channel, Layout

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["fold_factors"]

_ROUNDING = 1e-5  # of the largest weight: float32 norms of a few thousand weights, with room


def fold_factors(graph: Graph) -> None:
    """Fold what is one factor a channel of a claimed weight into its scales, before the weights are lowered.

        w = g * v / ||v||,  v = scale * codes   ->   w = (scale * g / ||v||) * codes

    Nothing is recognised by name: the values that the graph makes of a weight alone are computed, and one that is the
    weight times a factor along the channels of its layout takes its place. Where it is no such product, it stays in the
    graph and a note says so.

    Args:
        graph: not lowered yet.
    """
    constants = constants_of(graph)
    found: dict[str, tuple[ir.Value, list[ir.Node]]] = {}
    for name, value in graph.weights.items():
        if name in graph.forms:
            product = _product(value, constants)
            if product is not None:
                found[name] = product
    if not found:
        return
    arrays = _computed(graph, [value for value, _ in found.values()])
    for (name, (value, nodes)), array in zip(found.items(), arrays, strict=True):
        weight, form = graph.weights[name], graph.forms[name]
        assert weight.const_value is not None
        own = torch.from_numpy(weight.const_value.numpy().copy()).double()
        factor = _factor(own, torch.from_numpy(array.copy()).double(), form.layout)
        scaled = None if factor is None else form.scaled(factor)
        if scaled is None:
            graph.notes.append(f"{name!r} is rescaled at every run (weight norm): no factors along its channels")
            continue
        graph.forms[name] = scaled
        graph.replace_uses(value, weight)
        for node in reversed(nodes):
            graph.graph.remove(node, safe=True)
    graph.forget_unused()


def _product(value: ir.Value, constants: set[int]) -> tuple[ir.Value, list[ir.Node]] | None:
    """The last value of the weight's shape that everything made of the weight goes through, and the nodes up to it."""
    nodes: list[ir.Node] = []
    reached = {id(value)}
    graph = next((use.node.graph for use in value.uses()), None)
    best: tuple[ir.Value, list[ir.Node]] | None = None
    for node in graph or ():
        if not any(id(v) in reached for v in node.inputs if v is not None):
            continue
        if not all(id(v) in constants for v in node.outputs):
            continue
        nodes.append(node)
        reached |= {id(v) for v in node.outputs}
        last = node.outputs[0]
        if last.shape != value.shape or node.op_type not in ("Mul", "Div"):
            continue
        inside = {id(n) for n in nodes}
        held = [value, *(v for n in nodes for v in n.outputs if v is not last)]
        if all(id(use.node) in inside for v in held for use in v.uses()) and not last.is_graph_output():
            best = last, list(nodes)
    return best


def _computed(graph: Graph, values: Sequence[ir.Value]) -> list[np.ndarray]:
    """Values that hang on weights alone, worked out by ONNX Runtime."""
    import onnx
    import onnx.utils
    import onnxruntime as ort

    model = onnx.load_model_from_string(graph.serialized(shapes=True))
    names = [str(v.name) for v in values]
    known = {info.name for info in model.graph.value_info}
    for name in names:
        if name not in known:
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    part = onnx.utils.Extractor(model).extract_model([], names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    running = ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in running.run(names, {})]


def _factor(own: torch.Tensor, product: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """The factor of every channel, if that is all that a product is."""
    mine, theirs = layout.by_channel(own), layout.by_channel(product)
    squares = (mine * mine).sum(1)
    factor = torch.where(squares > 0, (mine * theirs).sum(1) / squares.clamp_min(1e-300), 1.0)
    gap = (Channel().expand(factor, layout) * own - product).abs().max()
    return factor if bool(gap <= _ROUNDING * product.abs().max()) else None
