"""The compressed life as an ONNX graph: weights stay codes, and a runtime gets the numbers that were measured."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from detent import sharding
from detent.export.activations import Activations, Calibration, round_activations
from detent.export.calling import Call, Inputs, bind, unwrapped
from detent.export.forms import bits_of, form_of, parts_of
from detent.export.graph import OPSET, OPSET_OF_2_BITS, Graph, OnnxReport
from detent.export.rescaling import fold_factors
from detent.lives import Encoded, Lives
from detent.pack import Reader
from detent.pack.atomic import destination, replace_file
from detent.parameters import canonical_name
from detent.recipe import Recipe
from detent.roundings import rounding
from detent.specs import short
from detent.targets.forms import Codewords, Form, Grid, Levels

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["to_onnx"]

_NEEDED = "ONNX export needs onnx, onnxscript and onnxruntime: pip install 'detent[export]'"


# --- the export ----------------------------------------------------------------------------------------------------


def to_onnx(
    source: Lives | nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    codes: str | os.PathLike[str] | Mapping[str, Encoded] | None = None,
    bits: int | None = None,
    recipe: Recipe | None = None,
    fold_batchnorm: bool = False,
    matmul: Literal["exact", "nbits"] = "exact",
    activations: Activations | None = None,
    calibration: Calibration | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    dynamic_batch: bool = True,
    check: bool = True,
    tolerance: float = 2e-5,
) -> OnnxReport:
    """Write the compressed life as an ONNX file whose weights are codes.

    Every claimed weight becomes `DequantizeLinear` of INT8, INT4 or INT2 codes, or a lookup of packed indices, and has
    in the graph the value of `project(w)` bitwise. Everything else is as PyTorch's exporter writes it, in eval mode.

    Args:
        source: a run, or a model that `dt.load(..., life="compressed")` filled.
        path: the file to write; its folder must exist.
        example_inputs: what the model is called with: a tensor, several, or keyword arguments; flags among them
            (`None`, numbers, strings) are fixed in the graph, and the notes say so.
        codes: for a model, its codes: the `.detent` file, or what `run.encoded()` gave.
        bits: the compressed life that `run.compressed(bits=...)` shows.
        recipe: the compressed life that `run.compressed(recipe=...)` shows.
        fold_batchnorm: multiply BatchNorm into the scales of the layer before it (a scale a channel; codes stay), and
            into its bias. Weights are then codes times a rounded product, no longer `project(w)` bitwise.
        matmul: "exact" keeps ONNX Runtime from fusing dequantized weights into `MatMulNBits`, which by default rounds
            activations to 8 bits; "nbits" lays them out so that it fuses.
        activations: also round activations; folds BatchNorm. The difference to PyTorch is then told, not bounded, as it
            is for a model that was trained with rounded activations, which rounds them itself.
        calibration: batches of inputs (tensors, tuples that start with inputs, mappings) that find their ranges.
        dynamic: names of axes that may have any size in the file, by input: `{"x": {2: "time"}}`. Axes of one name have
            one size.
        dynamic_batch: axis 0 of the inputs may have any size in the file.
        check: compare ONNX Runtime, optimizations off and on, with PyTorch on the inputs, on random ones and at a
            second size of every axis that may have any; with `activations` not on random ones, so give real ones, and
            hold the session with optimizations to the one without.
        tolerance: largest difference allowed in each output, as a share of its largest number; > 0. The default is
            about 170 roundings; activations in 8 bits would be off by 100 times as much. Whole numbers must be equal.

    Returns:
        What was written.

    Raises:
        ValueError: weights that are not float32, activations that find no range, a model that does not hold its codes,
            inputs that the model cannot be called with, an axis that the graph fixes, a difference beyond the
            tolerance, more than 2 GiB.
        ImportError: onnx, onnxscript or onnxruntime are not installed.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, detent as dt
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = to_onnx(run, f"{folder}/model.onnx", torch.randn(2, 8))
        >>> [(row.name, row.form, row.nbytes) for row in report.tensors]
        [('0.weight', 'INT2', 20), ('0.bias', 'float', 32)]
        >>> max(report.difference.values()) <= report.bound
        True
    """
    require_packages()
    if matmul not in ("exact", "nbits"):
        raise ValueError(f'to_onnx(matmul={matmul!r}): must be "exact" or "nbits"')
    if activations is not None and matmul == "nbits":
        raise ValueError(
            'to_onnx(matmul="nbits", activations=...): MatMulNBits rounds activations its own way; choose one'
        )
    if not tolerance > 0:
        raise ValueError(f"to_onnx(tolerance={tolerance}): must be > 0")
    whole = source.model if isinstance(source, Lives) else source
    trained = isinstance(whole, nn.Module) and rounding(whole)
    if activations is not None and trained:
        raise ValueError("to_onnx(activations=...): the model rounds activations as it was trained to; leave it out")
    where = destination(path)
    with _one_thread(source), compressed_life(source, codes, bits, recipe) as (model, encoded):
        call = bind(model, example_inputs, "to_onnx(example_inputs=...)")
        example = _Example.of(call, dynamic, dynamic_batch)
        graph = traced(model, example, encoded)
        fold_factors(graph)
        if fold_batchnorm or activations is not None:
            graph.fold_batchnorm()
        integer = activations is not None
        graph.lower(matmul="direct" if integer else matmul, integer=integer)
        if activations is not None:
            round_activations(graph, activations, calibration)
        data = graph.serialized()
        difference, bound = {}, None
        if check:
            difference, bound = _checked(data, model, example, tolerance, activations is not None or trained)
    kernels = kernels_of(data) if check else {}
    if activations is not None:
        graph.notes += _simulated(activations.bits, kernels)
    replace_file(where, data)
    return graph.report(os.fspath(path), len(data), difference, bound, kernels)


def _simulated(bits: int, kernels: Mapping[str, int]) -> list[str]:
    """What has the numbers of a narrow computation and not its kernel: few bits, and layers left in floats."""
    narrow = f"simulated: activations of {bits} bits are computed in 8 bits, since no kernel is narrower"
    real = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits")
    found = [f"{kernels[kind]} {kind}" for kind in real if kind in kernels]
    floats = [f"simulated, computed in float: {', '.join(found)}"] if found else []
    return [narrow, *floats] if bits < 8 else floats


def require_packages() -> None:
    """Say in one sentence what to install.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{_NEEDED} (missing: {', '.join(missing)})")


@dataclass(frozen=True, kw_only=True)
class _Example:
    """What a model is called with, and which axes of it may have other sizes.

    Args:
        call: the tensors.
        axes: for every tensor, the name of each axis that may have another size; axes of one name have one size.
        batch: the name of those of them that are the batch, if any are.
    """

    call: Call
    axes: tuple[Mapping[int, str], ...]
    batch: str | None = None

    @staticmethod
    def of(call: Call, dynamic: Mapping[str, Mapping[int, str]] | None, dynamic_batch: bool) -> _Example:
        """With the axes that were asked for, and the batch on axis 0 of whatever has as many rows as the first tensor.

        Raises:
            ValueError: a tensor or an axis that is not there, or two sizes for one name.
        """
        axes = [dict(named) for named in _named_axes(call, dynamic or {})]
        first, batch = call.tensors[0], None
        if dynamic_batch and first.dim():
            batch = axes[0].get(0, "batch")
            for x, named in zip(call.tensors, axes, strict=True):
                if x.dim() and x.shape[0] == first.shape[0]:
                    named.setdefault(0, batch)
        example = _Example(call=call, axes=tuple(axes), batch=batch)
        example.sizes()
        return example

    def sizes(self) -> dict[str, int]:
        """The size that every named axis has here.

        Raises:
            ValueError: two sizes for one name.
        """
        found: dict[str, int] = {}
        for name, x, named in zip(self.call.names, self.call.tensors, self.axes, strict=True):
            for axis, word in named.items():
                if found.setdefault(word, x.shape[axis]) != x.shape[axis]:
                    raise ValueError(
                        f"to_onnx(dynamic=...): axis {axis} of {name!r} has {x.shape[axis]} and another axis called "
                        f"{word!r} has {found[word]}; give them two names or inputs of one size"
                    )
        return found

    def sized(self, sizes: Mapping[str, int]) -> _Example:
        """Repeated or cut to other sizes."""

        def changed(x: Tensor, named: Mapping[int, str]) -> Tensor:
            for axis, word in named.items():
                if word in sizes and sizes[word] != x.shape[axis]:
                    places = torch.arange(sizes[word], device=x.device) % max(x.shape[axis], 1)
                    x = x.index_select(axis, places)
            return x

        pairs = zip(self.call.tensors, self.axes, strict=True)
        return replace(self, call=self.call.replaced(changed(x, named) for x, named in pairs))

    def random(self, generator: torch.Generator) -> _Example:
        """Like the examples: normal numbers of their mean and spread, whole numbers out of theirs."""

        def draw(x: Tensor) -> Tensor:
            if x.is_floating_point() and x.numel():
                spread = float(x.double().std(correction=0)) or 1.0
                return (torch.randn(x.shape, generator=generator) * spread + float(x.double().mean())).to(x)
            order = torch.randint(max(x.numel(), 1), (x.numel(),), generator=generator)
            return x.reshape(-1)[order.to(x.device)].reshape(x.shape)

        return replace(self, call=self.call.mapped(draw))

    def outputs(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The tensors that the model gives."""
        return tuple(leaf for leaf in tree_leaves(self.call(model)) if isinstance(leaf, Tensor))

    def others(self, model: nn.Module) -> list[tuple[str, _Example, list[Tensor]]]:
        """A second size of every named axis in turn, with what the model gives: what a file for any size is held to.

        Raises:
            ValueError: a model that takes no other size.
        """
        return [(word, *self._other(model, word, size)) for word, size in self.sizes().items()]

    def _other(self, model: nn.Module, word: str, size: int) -> tuple[_Example, list[Tensor]]:
        # One more is the hardest on a graph that fixed something. Some models take multiples, or no more than they had.
        tried = [3 if size != 3 else 2] if word == self.batch else [size + 1, 2 * size, size - 1, size // 2]
        why = ""
        for other in tried:
            try:
                example = self.sized({word: other})
                return example, list(example.outputs(model))
            except Exception as error:  # whatever a user's own code may raise
                why = why or first_line(error)
        hint = "export with dynamic_batch=False" if word == self.batch else f"leave {word!r} out of dynamic="
        raise ValueError(
            f"the model itself takes no other size of {word!r} than {size} (tried {', '.join(map(str, tried))}: {why})"
            f"; {hint}"
        )


def _named_axes(call: Call, dynamic: Mapping[str, Mapping[int, str]]) -> list[dict[int, str]]:
    """The axes that were asked for, by tensor, counted from the front."""
    known = ", ".join(map(repr, call.names))
    if not isinstance(dynamic, Mapping) or not all(isinstance(named, Mapping) for named in dynamic.values()):
        raise ValueError('to_onnx(dynamic=...): must be like {"x": {0: "batch", 2: "time"}}')
    unknown = next((name for name in dynamic if name not in call.names), None)
    if unknown is not None:
        raise ValueError(f"to_onnx(dynamic=...): there is no input {unknown!r}; the inputs are {known}")
    found: list[dict[int, str]] = []
    for name, x in zip(call.names, call.tensors, strict=True):
        asked = dynamic.get(name, {})
        for axis, word in asked.items():
            if not isinstance(axis, int) or not -x.dim() <= axis < x.dim():
                raise ValueError(f"to_onnx(dynamic=...): {name!r} has {x.dim()} axes, and no axis {axis!r}")
            if not isinstance(word, str) or not word:
                raise ValueError(f"to_onnx(dynamic=...): axis {axis} of {name!r} needs a name, not {word!r}")
        found.append({axis % x.dim(): word for axis, word in asked.items()})
    return found


def first_line(error: BaseException) -> str:
    """What an exception says first, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _one_thread(source: Any) -> contextlib.AbstractContextManager[None]:
    """Codes and graph are of the same weights: no other thread works on them meanwhile."""
    return source._one_thread("to_onnx") if isinstance(source, Lives) else contextlib.nullcontext()


@contextlib.contextmanager
def compressed_life(
    source: Lives | nn.Module,
    codes: str | os.PathLike[str] | Mapping[str, Encoded] | None,
    bits: int | None,
    recipe: Recipe | None,
) -> Iterator[tuple[nn.Module, dict[str, Encoded]]]:
    """The model in its compressed life and eval mode, without wrappers, and the codes of its claimed tensors.

    All is put back afterwards.

    Raises:
        ValueError: codes that the model does not hold, or arguments that do not go together.
    """
    if isinstance(source, Lives):
        if codes is not None:
            raise ValueError("to_onnx(codes=...): a run has its own codes; give them for a model only")
        model, encoded = source.model, source.encoded(bits=bits, recipe=recipe)
        life: Any = source.compressed(bits=bits, recipe=recipe)
    elif isinstance(source, nn.Module):
        if codes is None or bits is not None or recipe is not None:
            raise ValueError(
                "to_onnx of a model needs codes= (its .detent file or run.encoded()), and no bits or recipe"
            )
        model = source
        encoded = dict(codes) if isinstance(codes, Mapping) else encoded_of(codes)
        _refuse_other_weights(model, encoded)
        life = contextlib.nullcontext()
    else:
        raise ValueError(f"to_onnx(source=...): must be a run or a torch.nn.Module, not {type(source).__name__}")
    if any(sharding._is_sharded(p) for p in model.parameters()):
        raise ValueError("to_onnx: the model is sharded; save the run and export from the file in one process")
    modes = {module: module.training for module in model.modules()}
    with life, unwrapped(model) as plain:
        plain.eval()
        try:
            yield plain, encoded
        finally:
            for module, mode in modes.items():
                module.training = mode


def _refuse_other_weights(model: nn.Module, encoded: Mapping[str, Encoded]) -> None:
    held = {canonical_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, item in encoded.items():
        if name not in held:
            raise ValueError(f"the codes have {name!r}, which is no parameter of this model")
        weight = held[name].detach().cpu()
        if weight.shape != item.form.layout.shape or not torch.equal(item.decode().to(weight), weight):
            raise ValueError(
                f"{name!r} does not hold what its codes decode to; load the model with life='compressed' first"
            )


def encoded_of(path: str | os.PathLike[str]) -> dict[str, Encoded]:
    """The codes of every claimed tensor of a file.

    Raises:
        FormatError: the file is damaged or not one of ours.
        OSError: it cannot be opened.
    """
    with Reader(path) as file:
        return {name: file.encoded(name) for name in file.coded}


# --- tracing -------------------------------------------------------------------------------------------------------


def traced(model: nn.Module, example: _Example, encoded: Mapping[str, Encoded]) -> Graph:
    """The graph of a model as it stands, with the form of every claimed weight.

    Raises:
        ValueError: a weight that has no form, outputs that are no tensors, or an axis that the graph fixes.
    """
    left_out = _outputs_left_out(model, example)
    for name, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise ValueError(
                f"{name!r} is an LSTM with proj_size={module.proj_size}, which ONNX's LSTM has not, and PyTorch's "
                "exporter leaves it out; use an LSTM without it and a Linear layer, or torch.nn.LSTMCell in a loop"
            )
    forms: dict[str, Form] = {}
    for name, item in encoded.items():
        try:
            forms[name] = form_of(item)
        except ValueError as error:
            raise ValueError(f"{name!r} on {short(item.target)} cannot be exported: {error}") from None
    fine = any(width == 2 for form in forms.values() for width in widths_of(form))
    opset = OPSET_OF_2_BITS if fine else OPSET
    hook = model.register_forward_hook(_only_tensors) if left_out else None
    try:
        program = _program(model, example, opset)
    finally:
        if hook is not None:
            hook.remove()
    owners = {id(p): [] for p in model.parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)].append(canonical_name(name))
    aliases = {alias: names[0] for names in owners.values() for alias in names}
    graph = Graph(program, forms, encoded, aliases, set(model.state_dict()), opset)
    graph.notes += left_out
    graph.notes += [f"{name}={value!r} is fixed in the graph" for name, value in example.call.fixed.items()]
    return graph


def _only_tensors(module: nn.Module, given: Any, output: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _outputs_left_out(model: nn.Module, example: _Example) -> list[str]:
    """Call the model once, and name what it gives beside tensors, which no graph can.

    A tracer's complaint would not say that the inputs are the wrong ones.

    Raises:
        ValueError: inputs that it does not take, or no tensor among its outputs.
    """
    try:
        output = example.call(model)
    except Exception as error:
        given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in example.call.tensors)
        raise ValueError(
            f"example_inputs: the model cannot be called with {given} ({first_line(error)}); give inputs of the shapes "
            f"and dtypes that it takes{_tokens(model, example)}"
        ) from error
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(output)[0]]
    others = [(path, leaf) for path, leaf in leaves if not isinstance(leaf, Tensor)]
    if len(others) == len(leaves):
        words = ", ".join(f"{type(leaf).__name__}{f' at {path}' if path else ''}" for path, leaf in others[:3])
        raise ValueError(
            f"{type(model).__name__} returns no tensor ({words or 'nothing'}); a graph gives tensors, alone or in "
            "tuples, lists and dicts"
        )
    told = [(path, leaf) for path, leaf in others if leaf is not None]
    notes = [f"output{path} is left out: it is no tensor but {_said(leaf)}" for path, leaf in told]
    return notes or ["outputs that are None are left out"] * bool(others)


def _said(leaf: Any) -> str:
    plain = isinstance(leaf, (bool, int, float)) or (isinstance(leaf, str) and len(leaf) < 40)
    return f"{leaf!r} ({type(leaf).__name__})" if plain else f"an object ({type(leaf).__name__})"


def _tokens(model: nn.Module, example: _Example) -> str:
    """Advice for models that look tokens up and were given floating-point numbers."""
    looks_up = any(isinstance(module, nn.Embedding) for module in model.modules())
    floats = any(x.is_floating_point() for x in example.call.tensors)
    return ", such as whole numbers (torch.long) for tokens" if looks_up and floats else ""


def widths_of(form: Form) -> tuple[int, ...]:
    """Bits of every packed integer of a form."""
    if isinstance(form, Grid):
        return (bits_of(form) or 32,)
    if isinstance(form, Codewords):
        return (*parts_of(form), bits_of(form) or 32)
    return parts_of(form) if isinstance(form, Levels) else ()


def _program(model: nn.Module, example: _Example, opset: int) -> ir.Model:
    # Two or more, because torch.export takes a size of 1 for a constant.
    sample = example.sized({word: max(size, 2) for word, size in example.sizes().items()}).call
    sample = sample.mapped(torch.clone)  # of one tensor given twice it would make one input
    left = iter(example.axes)
    shapes = tree_map(
        lambda x: dict.fromkeys(next(left), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None,
        dict(sample.arguments),
    )
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    # Fused attention on the CPU gives other strides than what the exporter takes it apart into, and a view that the
    # trace found possible (T5's) would not be.
    with warnings.catch_warnings(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        # Whatever the model warns of was shown when it was called; the rest is torch's and nothing to a user of ours.
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                model,
                # Without keyword arguments a mapping at the end is taken for them, were it an argument of its own.
                sample.args if sample.kwargs else (*sample.args, {}),
                kwargs=dict(sample.kwargs) or None,
                dynamo=True,
                optimize=False,  # it would fold BatchNorm into the weights, which have to stay what they are
                opset_version=opset,
                dynamic_shapes=shapes if any(example.axes) else None,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(f"PyTorch cannot trace this model for ONNX: {_cause(error, example, model)}") from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    assert program is not None
    _name_axes(program.model, example)
    return program.model


def _cause(error: Exception, example: _Example, model: nn.Module) -> str:
    """What torch's exporter met, with advice where there is some."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    whole = " ".join(map(str, chain))
    said = first_line(error.__cause__ or error)
    if "transformers.grouped_mm" in whole:
        said += '; call model.set_experts_implementation("batched_mm") before the export'
    elif "linalg" in whole and (odd := next((n for n, m in model.named_modules() if is_parametrized(m)), None)):
        said += (
            f"; {odd!r} is parametrized by what ONNX has no operator for (orthogonal): call "
            "torch.nn.utils.parametrize.remove_parametrizations on it, and compress the weight that is left"
        )
    elif "data-dependent" in whole or "onstraints violated" in whole or "ConstraintViolation" in whole:
        said += "; the model decides by its data, or by a size that was to be free"
        said += ": try dynamic_batch=False" if example.batch else ""
    return said


def _name_axes(program: ir.Model, example: _Example) -> None:
    """Call the free axes in the graph what they were called.

    Raises:
        ValueError: one that is not free in the graph.
    """
    import onnx_ir as ir

    inputs = program.graph.inputs
    assert len(inputs) == len(example.axes), "the exporter dropped an input"
    words: dict[str, str] = {}
    for value, name, named in zip(inputs, example.call.names, example.axes, strict=True):
        for axis, word in named.items():
            assert value.shape is not None
            size = value.shape[axis]
            if isinstance(size, int):
                if word == example.batch:
                    raise ValueError(
                        f"the graph fixes the batch at {size}; export with dynamic_batch=False, or mend the model"
                    )
                raise ValueError(
                    f"axis {axis} of {name!r} ({word!r}) is not dynamic: the graph fixes it at {size}; leave it out of "
                    "dynamic=, or mend the model"
                )
            words.setdefault(str(size.value), word)
    for value in (*inputs, *program.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else _renamed(str(d.value), words) for d in value.shape])


def _renamed(size: str, words: Mapping[str, str]) -> str | None:
    """An expression of sizes such as "2*s77" in the words of the user; one that is unknown is left open."""
    found = re.sub(r"\b[A-Za-z_]\w*\b", lambda m: words.get(m.group(), ""), size)
    known = all(symbol in words for symbol in re.findall(r"\b[A-Za-z_]\w*\b", size))
    return found if known else None


def session(
    source: bytes | str,
    *,
    optimize: bool,
    save_to: str | None = None,
    threads: int = 1,
    dequantize_at_load: bool = False,
) -> Any:
    """An ONNX Runtime session on the CPU, of a graph or of a file; one thread within an operator by default.

    Raises:
        ValueError: this ONNX Runtime does not know something in the graph.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if dequantize_at_load:  # without quantized operators weights are constants, which it folds
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if save_to is not None:
        options.optimized_model_filepath = save_to
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions have no common base but this
        old = tuple(map(int, re.findall(r"\d+", ort.__version__)[:2])) < (1, 31)
        hint = f"{'INT2 needs 1.31 or newer; ' * old}check=False writes the file all the same"
        raise ValueError(
            f"ONNX Runtime {ort.__version__} cannot load this graph ({hint}): {first_line(error)}"
        ) from error


def kernels_of(data: bytes) -> dict[str, int]:
    """Operators that ONNX Runtime makes of a graph with optimizations on, and how many of each."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        where = str(Path(folder) / "optimized.onnx")
        session(data, optimize=True, save_to=where)
        nodes = onnx.load(where, load_external_data=False).graph.node
    kinds = sorted(node.op_type for node in nodes)
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def feeds_of(running: Any, call: Call) -> dict[str, np.ndarray]:
    """The inputs of a session, in the order in which the model was called."""
    names = [entry.name for entry in running.get_inputs()]
    return {name: x.detach().cpu().numpy() for name, x in zip(names, call.tensors, strict=True)}


def _samples(model: nn.Module, example: _Example, rounded: bool) -> list[tuple[str, _Example, list[Tensor]]]:
    """What a file is compared on: (how it differs from the example, the inputs, what the model gives for them)."""
    found = [("", example, list(example.outputs(model)))]
    if not rounded:  # random inputs leave the ranges of rounded activations: that would tell of clipping
        example = example.random(torch.Generator().manual_seed(0))
        found.append(("", example, list(example.outputs(model))))
    here = example.sizes()
    for word, other, outputs in example.others(model):
        changed = f" at {other.sizes()[word]} of {word!r} instead of {here[word]}"
        found.append((f"{changed}, so that axis is not dynamic in the graph", other, outputs))
    return found


def _checked(
    data: bytes, model: nn.Module, example: _Example, tolerance: float, rounded: bool
) -> tuple[dict[str, float], float | None]:
    """The largest differences to PyTorch, by optimization, and the largest that was allowed.

    Every output is held to the tolerance times its own largest value; whole numbers have to be equal. With rounded
    activations the unoptimized session may differ, since it rounds, and the optimized one is held to it.

    Raises:
        ValueError: a difference beyond that.
    """
    import onnx

    try:
        onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    except Exception as error:  # its two kinds have no common base but this
        raise ValueError(f"the graph is no valid ONNX: {first_line(error)}; nothing was written") from error
    samples = _samples(model, example, rounded)
    sizes = [_size(values) for values in zip(*(outputs for _, _, outputs in samples), strict=True)]
    bounds = [tolerance * size for size in sizes]
    plain, fast = (_run(session(data, optimize=optimize), samples) for optimize in (False, True))
    found = dict[str, float]()
    for word, theirs in (("off", plain), ("on", fast)):
        gaps = [_gaps(outputs, theirs[i]) for i, (_, _, outputs) in enumerate(samples)]
        found[word] = max((gap for row in gaps for gap in row), default=0.0)
        if not rounded:
            for (where, _, _), row in zip(samples, gaps, strict=True):
                _hold(row, bounds, f"ONNX Runtime (optimizations {word}) is off PyTorch", where, tolerance)
    if rounded:
        _hold_sessions(samples, plain, fast, bounds)
    return found, None if rounded else max(bounds, default=0.0)


def _hold(gaps: Sequence[float], bounds: Sequence[float], what: str, where: str, tolerance: float) -> None:
    for i, (gap, bound) in enumerate(zip(gaps, bounds, strict=True)):
        if not gap <= bound:
            which = f" in output {i}" if len(gaps) > 1 else ""
            raise ValueError(
                f"{what} by {gap:.3g}{which}{where}, and {bound:.3g} was allowed (tolerance={tolerance:g} of the "
                "largest output); nothing was written"
            )


def _hold_sessions(
    samples: Sequence[tuple[str, _Example, list[Tensor]]],
    plain: Sequence[Sequence[Tensor]],
    fast: Sequence[Sequence[Tensor]],
    bounds: Sequence[float],
) -> None:
    """Refuse a file that a default session computes otherwise than as it is written.

    Integer kernels sum in another order and round once where the graph rounds twice, so an activation on a tie moves by
    one step, which is less than what rounding moves all of them by. Three times that is allowed: beyond it a kernel has
    overflowed, or rounds what the graph does not.

    Raises:
        ValueError: a difference beyond that.
    """
    for (where, _, outputs), slow, quick in zip(samples, plain, fast, strict=True):
        rounding = _gaps(outputs, slow)
        for i, (gap, cost, bound) in enumerate(zip(_gaps(slow, quick), rounding, bounds, strict=True)):
            if not gap <= 3 * cost + bound:
                which = f" in output {i}" if len(outputs) > 1 else ""
                raise ValueError(
                    f"ONNX Runtime's default session is off the same graph without optimizations by {gap:.3g}{which}"
                    f"{where}, where rounding activations costs {cost:.3g}; nothing was written"
                )


def _run(running: Any, samples: Sequence[tuple[str, _Example, list[Tensor]]]) -> list[list[Tensor]]:
    """What a session gives for every sample.

    Raises:
        ValueError: a sample that it cannot run.
    """
    found: list[list[Tensor]] = []
    for where, example, outputs in samples:
        try:
            theirs = [torch.from_numpy(np.asarray(y)) for y in running.run(None, feeds_of(running, example.call))]
        except Exception as error:  # its own exceptions have no common base but this
            raise ValueError(
                f"ONNX Runtime cannot run this graph{where}: {first_line(error)}; nothing was written"
            ) from error
        if [tuple(y.shape) for y in theirs] != [tuple(y.shape) for y in outputs]:
            shapes = [[tuple(y.shape) for y in both] for both in (theirs, outputs)]
            raise ValueError(f"ONNX Runtime gives {shapes[0]}{where}, PyTorch {shapes[1]}; nothing was written")
        found.append(theirs)
    return found


def _size(values: Sequence[Tensor]) -> float:
    """The largest absolute number of one output; 0 of whole numbers, which have no tolerance."""
    return max((float(y.double().abs().max()) for y in values if y.numel() and y.is_floating_point()), default=0.0)


def _gaps(mine: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    return [_gap(*pair) for pair in zip(mine, others, strict=True)]


def _gap(mine: Tensor, other: Tensor) -> float:
    gap = (mine.double().cpu() - other.double()).abs()
    return float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max()) if gap.numel() else 0.0
