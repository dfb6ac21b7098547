"""The compressed life as an ONNX graph: weights stay codes, and a runtime gets the numbers that were measured."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from detent import sharding
from detent.export.activations import Activations, Calibration, round_activations
from detent.export.forms import Codewords, Form, Grid, Table, form_of
from detent.export.graph import OPSET, OPSET_OF_2_BITS, Graph, OnnxReport
from detent.lives import Encoded, Lives
from detent.pack import Reader
from detent.pack.atomic import destination, replace_file
from detent.parameters import canonical_name
from detent.recipe import Recipe
from detent.specs import short

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["to_onnx"]

_NEEDED = "ONNX export needs onnx, onnxscript and onnxruntime: pip install 'detent[export]'"


# --- the export ----------------------------------------------------------------------------------------------------


def to_onnx(
    source: Lives | nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    codes: str | os.PathLike[str] | Mapping[str, Encoded] | None = None,
    bits: int | None = None,
    recipe: Recipe | None = None,
    fold_batchnorm: bool = False,
    matmul: Literal["exact", "nbits"] = "exact",
    activations: Activations | None = None,
    calibration: Calibration | None = None,
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
        example_inputs: what the model is called with: a tensor, several, or keyword arguments.
        codes: for a model, its codes: the `.detent` file, or what `run.encoded()` gave.
        bits: the compressed life that `run.compressed(bits=...)` shows.
        recipe: the compressed life that `run.compressed(recipe=...)` shows.
        fold_batchnorm: multiply BatchNorm into the scales of the layer before it (a scale a channel; codes stay), and
            into its bias. Weights are then codes times a rounded product, no longer `project(w)` bitwise.
        matmul: "exact" keeps ONNX Runtime from fusing dequantized weights into `MatMulNBits`, which by default rounds
            activations to 8 bits; "nbits" lays them out so that it fuses.
        activations: also round activations; folds BatchNorm. The difference to PyTorch is then told, not bounded.
        calibration: batches of inputs (tensors, tuples that start with inputs, mappings) that find their ranges.
        dynamic_batch: axis 0 of the inputs may have any size in the file.
        check: compare ONNX Runtime, optimizations off and on, with PyTorch on the inputs and on random ones; with
            `activations` on the inputs alone, so give real ones.
        tolerance: largest difference allowed in each output, as a share of its largest number; > 0. The default is
            about 170 roundings; activations in 8 bits would be off by 100 times as much. Whole numbers must be equal.

    Returns:
        What was written.

    Raises:
        ValueError: weights that are not float32, activations that find no range, a model that does not hold its codes,
            inputs that the model cannot be called with, a graph that fixes the batch, a difference beyond the
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
    where = destination(path)
    arguments = _Arguments.of(example_inputs)
    with compressed_life(source, codes, bits, recipe) as (model, encoded):
        graph = traced(model, arguments, encoded, dynamic_batch)
        if fold_batchnorm or activations is not None:
            graph.fold_batchnorm()
        integer = activations is not None
        graph.lower(matmul="direct" if integer else matmul, integer=integer)
        if activations is not None:
            round_activations(graph, activations, calibration)
        data = graph.serialized()
        difference, bound = {}, None
        if check:
            allowed = tolerance if activations is None else None
            difference, bound = _checked(data, model, arguments, dynamic_batch, allowed)
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
class _Arguments:
    """What a model is called with, all of it tensors."""

    positional: tuple[Tensor, ...] = ()
    named: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> _Arguments:
        named = dict(inputs) if isinstance(inputs, Mapping) else {}
        positional = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        found = _Arguments(positional=positional, named=named)
        wrong = next((type(x).__name__ for x in found.flat if not isinstance(x, Tensor)), None)
        if wrong or not found.flat:
            raise ValueError(f"to_onnx(example_inputs=...): must be tensors, not {wrong or 'nothing'}")
        return found

    @property
    def flat(self) -> tuple[Tensor, ...]:
        return (*self.positional, *self.named.values())

    @property
    def batch(self) -> int | None:
        first = self.flat[0]
        return first.shape[0] if first.dim() else None

    def has_batch(self, x: Tensor) -> bool:
        return x.dim() > 0 and x.shape[0] == self.batch

    def mapped(self, act: Any) -> _Arguments:
        """Every tensor changed."""
        named = {name: act(x) for name, x in self.named.items()}
        return _Arguments(positional=tuple(map(act, self.positional)), named=named)

    def with_batch(self, size: int) -> _Arguments:
        """Repeated or cut along axis 0."""
        rows = torch.arange(size) % max(self.batch or 1, 1)
        return self.mapped(lambda x: x[rows.to(x.device)] if self.has_batch(x) else x)

    def random(self, generator: torch.Generator) -> _Arguments:
        """Like the examples: normal numbers of their mean and spread, whole numbers out of theirs."""

        def draw(x: Tensor) -> Tensor:
            if x.is_floating_point() and x.numel():
                spread = float(x.double().std(correction=0)) or 1.0
                return (torch.randn(x.shape, generator=generator) * spread + float(x.double().mean())).to(x)
            order = torch.randint(max(x.numel(), 1), (x.numel(),), generator=generator)
            return x.reshape(-1)[order.to(x.device)].reshape(x.shape)

        return self.mapped(draw)

    def call(self, model: nn.Module) -> tuple[Tensor, ...]:
        with torch.no_grad():
            leaves = tree_leaves(model(*self.positional, **self.named))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


@contextlib.contextmanager
def compressed_life(
    source: Lives | nn.Module,
    codes: str | os.PathLike[str] | Mapping[str, Encoded] | None,
    bits: int | None,
    recipe: Recipe | None,
) -> Iterator[tuple[nn.Module, dict[str, Encoded]]]:
    """The model in its compressed life and eval mode, and the codes of its claimed tensors; put back afterwards.

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
    with life:
        model.eval()
        try:
            yield model, encoded
        finally:
            for module, mode in modes.items():
                module.training = mode


def _refuse_other_weights(model: nn.Module, encoded: Mapping[str, Encoded]) -> None:
    held = {canonical_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, item in encoded.items():
        if name not in held:
            raise ValueError(f"the codes have {name!r}, which is no parameter of this model")
        weight = held[name].detach().cpu()
        if weight.shape != item.params.layout.shape or not torch.equal(item.decode().to(weight), weight):
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
        return {name: file.encoded(name) for name in file.targets}


# --- tracing -------------------------------------------------------------------------------------------------------


def traced(model: nn.Module, arguments: _Arguments, encoded: Mapping[str, Encoded], dynamic_batch: bool) -> Graph:
    """The graph of a model as it stands, with the form of every claimed weight.

    Raises:
        ValueError: a weight that has no form, or a batch that the graph fixes.
    """
    _refuse_inputs(model, arguments)
    forms: dict[str, Form] = {}
    for name, item in encoded.items():
        try:
            forms[name] = form_of(item)
        except ValueError as error:
            raise ValueError(f"{name!r} on {short(item.target)} cannot be exported: {error}") from None
    fine = any(width == 2 for form in forms.values() for width in widths_of(form))
    opset = OPSET_OF_2_BITS if fine else OPSET
    program = _program(model, arguments, opset, dynamic_batch)
    owners = {id(p): [] for p in model.parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)].append(canonical_name(name))
    aliases = {alias: names[0] for names in owners.values() for alias in names}
    return Graph(program, forms, encoded, aliases, set(model.state_dict()), opset)


def _refuse_inputs(model: nn.Module, arguments: _Arguments) -> None:
    """Call the model once, because a tracer's complaint does not say that the inputs are the wrong ones."""
    try:
        arguments.call(model)
    except Exception as error:
        given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in arguments.flat)
        why = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(
            f"example_inputs: the model cannot be called with {given} ({why}); give inputs of the shapes and dtypes "
            "that it takes, such as whole numbers (torch.long) for tokens"
        ) from error


def widths_of(form: Form) -> tuple[int, ...]:
    """Bits of every packed integer of a form."""
    if isinstance(form, Grid):
        return (form.bits,)
    if isinstance(form, Codewords):
        return (*form.parts, form.bits or 32)
    return form.parts if isinstance(form, Table) else ()


def _program(model: nn.Module, arguments: _Arguments, opset: int, dynamic_batch: bool) -> ir.Model:
    dynamic_batch = dynamic_batch and arguments.batch is not None
    # Two rows, because torch.export takes a size of 1 for a constant.
    sample = arguments.with_batch(max(arguments.batch or 1, 2)) if dynamic_batch else arguments
    batch = torch.export.Dim("batch")

    def dims(x: Tensor) -> dict[int, Any] | None:  # of what was given: with two rows, a side input of 2 looks like them
        return {0: batch} if arguments.has_batch(x) else None

    positional = tuple(dims(x) for x in arguments.positional)
    shapes = positional or {name: dims(x) for name, x in arguments.named.items()}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        # torch's own use of its own deprecated names, and its advice on torchvision, are nothing to a user of ours.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                model,
                sample.positional,
                kwargs=dict(sample.named) or None,
                dynamo=True,
                optimize=False,  # it would fold BatchNorm into the weights, which have to stay what they are
                opset_version=opset,
                dynamic_shapes=shapes if dynamic_batch else None,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = (str(error.__cause__ or error) or type(error).__name__).strip().splitlines()[0]
            hint = "; try dynamic_batch=False if it fixes the batch" if dynamic_batch else ""
            raise ValueError(f"PyTorch cannot trace this model for ONNX: {cause}{hint}") from error
        finally:
            logger.setLevel(level)
    assert program is not None
    first = program.model.graph.inputs[0].shape
    if dynamic_batch and first is not None and isinstance(first[0], int):
        raise ValueError(f"the graph fixes the batch at {first[0]}; export with dynamic_batch=False, or mend the model")
    return program.model


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
        why = str(error).splitlines()[0]
        hint = "INT2 needs 1.31 or newer; check=False writes the file all the same"
        raise ValueError(f"ONNX Runtime {ort.__version__} cannot load this graph ({hint}): {why}") from error


def kernels_of(data: bytes) -> dict[str, int]:
    """Operators that ONNX Runtime makes of a graph with optimizations on, and how many of each."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        where = str(Path(folder) / "optimized.onnx")
        session(data, optimize=True, save_to=where)
        nodes = onnx.load(where, load_external_data=False).graph.node
    kinds = sorted(node.op_type for node in nodes)
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def feeds_of(running: Any, arguments: _Arguments) -> dict[str, np.ndarray]:
    """The inputs of a session, in the order in which the model was called."""
    names = [entry.name for entry in running.get_inputs()]
    return {name: x.detach().cpu().numpy() for name, x in zip(names, arguments.flat, strict=True)}


def _checked(
    data: bytes, model: nn.Module, arguments: _Arguments, dynamic_batch: bool, tolerance: float | None
) -> tuple[dict[str, float], float | None]:
    """The largest differences to PyTorch, by optimization, and the largest that was allowed.

    Every output is held to the tolerance times its own largest value; whole numbers have to be equal.

    Raises:
        ValueError: a difference beyond that.
    """
    import onnx

    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    samples = [arguments]
    if tolerance is not None:  # random inputs leave the ranges of rounded activations: that would tell of clipping
        samples.append(arguments.random(torch.Generator().manual_seed(0)))
    if dynamic_batch and arguments.batch is not None:
        samples.append(samples[-1].with_batch(3 if arguments.batch != 3 else 2))
    expected = [sample.call(model) for sample in samples]
    bounds = None if tolerance is None else [tolerance * _size(values) for values in zip(*expected, strict=True)]
    found = dict[str, float]()
    for word, optimize in (("off", False), ("on", True)):
        running = session(data, optimize=optimize)
        gaps = [0.0] * len(expected[0])
        for sample, ours in zip(samples, expected, strict=True):
            theirs = running.run(None, feeds_of(running, sample))
            gaps = [max(gap, _gap(*pair)) for gap, *pair in zip(gaps, ours, theirs, strict=True)]
        found[word] = max(gaps, default=0.0)
        for i, (gap, bound) in enumerate(zip(gaps, bounds or [math.inf] * len(gaps), strict=True)):
            if not gap <= bound:
                which = f" in output {i}" if len(gaps) > 1 else ""
                raise ValueError(
                    f"ONNX Runtime (optimizations {word}) is off PyTorch by {gap:.3g}{which}, and {bound:.3g} was "
                    f"allowed (tolerance={tolerance:g} of the largest output); nothing was written"
                )
    return found, None if bounds is None else max(bounds, default=0.0)


def _size(values: Sequence[Tensor]) -> float:
    """The largest absolute number of one output; 0 of whole numbers, which have no tolerance."""
    return max((float(y.double().abs().max()) for y in values if y.numel() and y.is_floating_point()), default=0.0)


def _gap(mine: Tensor, other: Any) -> float:
    gap = (mine.double().cpu() - torch.from_numpy(np.asarray(other)).double()).abs()
    return float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max()) if gap.numel() else 0.0
