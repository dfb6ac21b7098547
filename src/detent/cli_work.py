"""What the commands do: everything of the command line that is neither a flag nor a table."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from detent.claimed import refuse_stages
from detent.data import Batches, ImageSet, digits, load_images
from detent.export import Activations, onnx_latency, to_compressed_tensors, to_onnx
from detent.lives import Encoded
from detent.pack import CODINGS, Writer, load, sizes
from detent.pack.frames import MAGIC, of_torch
from detent.pack.header import DTYPES
from detent.parameters import canonical_name
from detent.plan import Plan
from detent.recipe import Recipe
from detent.report import Export, History, Report, collect_file, run_of_file
from detent.report.page import figures
from detent.specs import short
from detent.targets import Params

__all__ = [
    "OnnxOptions",
    "compress_weights",
    "export_file",
    "model_of",
    "recipe_of",
    "refuse_standing",
    "report_of",
    "skeleton",
    "widths_in",
]

Watch = Callable[[str, int], Callable[[], None]]
SENSITIVITY_IMAGES = 1000
CALIBRATION_IMAGES = 512
LATENCY_BATCHES = (1, 64)


def recipe_of(source: str) -> Recipe:
    """A preset by name, or a recipe file.

    Raises:
        ValueError: neither.
        OSError: the file cannot be read.
    """
    return Recipe.from_yaml(Path(source)) if source.endswith((".yaml", ".yml")) else Recipe.preset(source)


# --- models -------------------------------------------------------------------------------------------------------


def model_of(source: str) -> nn.Module:
    """The model of a factory "package.module:function", looked for in the current folder too.

    Raises:
        ValueError: no such factory, or one that fails or makes no module.
    """
    module_name, colon, function = source.partition(":")
    if not (module_name and colon and function):
        raise ValueError(f'model={source!r}: give a factory as "package.module:function"')
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory: Any = importlib.import_module(module_name)
        for part in function.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model={source!r}: cannot find the factory: {error}") from None
    try:
        made = factory() if callable(factory) else factory
    except Exception as error:  # whatever a user's own code may raise
        raise ValueError(f"model={source!r}: the factory raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"model={source!r}: must give a torch.nn.Module, not {type(made).__name__}")
    return made


def skeleton(path: Path) -> nn.Module:
    """A module with the names, shapes and dtypes of a state dict, on the meta device: no weight is kept.

    A state dict does not say which convolutions are transposed or which 2-D tensors are buffers; BatchNorm's running
    statistics are known by their names.

    Raises:
        ValueError: a file that is no state dict.
    """
    root = nn.Module()
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  safe_open is not iterable
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name!r} is {part.get_dtype()}, which a file of ours cannot hold")
            try:
                _hang(root, name, torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta"))
            except KeyError as error:
                raise ValueError(f"{path}: not a safetensors state dict: {error}") from None
    return root


def _hang(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor at its dotted name below the root."""
    *folders, own = name.split(".")
    here = root
    for folder in folders:
        child = here._modules.get(folder)
        if child is None:
            child = nn.Module()
            here.add_module(folder, child)
        here = child
    if own in ("running_mean", "running_var", "num_batches_tracked") or not value.is_floating_point():
        here.register_buffer(own, value)
    else:
        here.register_parameter(own, nn.Parameter(value))


def _taken(number: int, axes: str) -> str:
    """How many tensors are taken for something.

    Example:
        >>> _taken(1, "two axes"), _taken(2, "two axes")
        ('1 tensor of two axes is taken', '2 tensors of two axes are taken')
    """
    return f"{number} tensor{'s' * (number != 1)} of {axes} {'is' if number == 1 else 'are'} taken"


def refuse_standing(path: Path) -> None:
    """Write over a file only where its name was given: under a default name there may be what cannot be made again.

    Raises:
        ValueError: there is such a file.
    """
    if path.exists():
        raise ValueError(f"{path} is there already; remove it, or name the file to write with --out")


def guesses(plan: Plan) -> list[str]:
    """What had to be guessed of a model that only its state dict is known of, in sentences."""
    several = [claim for claim in plan.claims if len(claim.layout.shape) >= 2]
    stacks = [claim for claim in several if claim.layout.batch_axes]
    turned = [claim for claim in several if not claim.layout.is_row_major and not claim.layout.batch_axes]
    matrices = [claim for claim in several if len(claim.layout.shape) == 2 and claim not in turned]
    kernels = [claim for claim in several if len(claim.layout.shape) > 2 and claim not in stacks]
    said = []
    if kernels:
        said.append(
            f"{_taken(len(kernels), 'more than two axes')} as convolutions with output channels first; "
            "transposed ones cannot be told apart without --model."
        )
    if matrices:
        said.append(f"{_taken(len(matrices), 'two axes')} as linear or embedding weights, a row an output.")
    if turned:
        said.append(f"{_taken(len(turned), 'two axes')} as (inputs, outputs), for there are as many biases.")
    if stacks:
        said.append(
            f"{_taken(len(stacks), 'more than two axes')} as stacks of (outputs, inputs), as experts are; axis= and "
            "batch_axes= in a rule, or --model, say otherwise."
        )
    used = {rule.match for rule in plan.recipe.rules} & {"@first", "@last"}
    ranked = [claim.name for claim in plan.claims if len(claim.layout.shape) > 1]
    if used and ranked:
        said.append(
            f"A state dict keeps its names in alphabetical order, so @first is {ranked[0]} and @last is {ranked[-1]}; "
            "if that is wrong, name them in the recipe or give --model."
        )
    return said


def unused_mechanisms(recipe: Recipe) -> str:
    """What to say of mechanisms in a recipe when nothing is trained; empty if there are none."""
    names = dict.fromkeys(short(rule.mechanism) for rule in recipe.rules if rule.mechanism is not None)
    return f"No training took place: {', '.join(names)} of the recipe did nothing." if names else ""


# --- a state dict without training --------------------------------------------------------------------------------


def compress_weights(
    source: Path, recipe: Recipe, out: Path | None, *, life: str, coding: str | None, model: str | None, watch: Watch
) -> dict[str, Any]:
    """Compress a state dict and write the file, tensor by tensor.

    Args:
        source: a .safetensors state dict.
        recipe: what becomes of which tensor.
        out: where to; the source's name with .detent by default.
        life: "compressed" or "both".
        coding: "entropy", "bitpacked" or "none"; by default what `save` takes for this name.
        model: a factory, for what names and shapes do not say.
        watch: told how far it is.

    Returns:
        What was done: file, bytes, raw_bytes, weights, compressed_weights, nominal_bits (at true width) and
        bits_per_weight (as written), error, notes.

    Raises:
        ValueError: a source that is no state dict, or a recipe that does not fit it.
    """
    with _opened(source) as weights:  # first: another kind of file is at fault before anything else is
        file = source.with_suffix(".detent") if out is None else out
        if file.resolve() == source.resolve():
            raise ValueError(f"--out {file}: is the state dict itself; give another name")
        if out is None:
            refuse_standing(file)
        if life not in ("compressed", "both"):
            raise ValueError(f"--life {life}: must be compressed or both")
        if coding not in (None, *CODINGS):
            raise ValueError(f"--coding {coding}: must be one of {', '.join(CODINGS)}")
        net = skeleton(source) if model is None else model_of(model)
        refuse_stages(recipe, "compress")
        plan = recipe.without_mechanisms().resolve(net)
        said: dict[str, Any] = {"data": "none", "epochs": 0, "calibration": "none"}
        said["made by"] = f"detent compress {source.name}"
        if model is None:
            said["order"] = "alphabetical, as in a state dict: which weight is really first or last is not known"
        norms = any(getattr(module, "running_mean", None) is not None for module in net.modules())
        batchnorm = "own" if norms else "none"
        writer = Writer(file, life, coding=coding, batchnorm=batchnorm, notes=said)
        done = _write(writer, weights, _stored(net, weights, source), plan, life == "both", watch)
    left = f"Left in full precision: {plan.left()}." if plan.left() else ""
    notes = [*(guesses(plan) if model is None else []), left, unused_mechanisms(recipe)]
    together = sorted({type(r.target).__name__ for r in plan.recipe.rules if r.target and r.target.fits_together})
    if together:
        notes.append(f"{', '.join(together)} is fitted to several tensors at once, so these were in memory together.")
    parts = sizes(file)
    return {
        "file": str(file),
        "bytes": writer.size,
        "raw_bytes": done.raw,
        "weights": done.weights,
        "compressed_weights": done.coded,
        "nominal_bits": 8 * done.packed / max(done.coded, 1),
        "bits_per_weight": 8 * (parts["codes"] + parts["params"]) / max(done.coded, 1),
        "error": done.lost / (done.energy or 1.0),
        "notes": [note for note in notes if note],
    }


def _write(writer: Writer, weights: Any, stored: list[_Stored], plan: Plan, both: bool, watch: Watch) -> _Done:
    """Write every tensor of a state dict under each of its names."""
    advance, done = watch("compressing", len(stored)), _Done()
    with writer:
        for name, tensor, encoded, reason in _encoded(weights, stored, plan):
            done.add(tensor, encoded, is_buffer=reason == "buffer")
            writer.add(name, tensor if both or encoded is None else None, encoded=encoded, reason=reason)
            advance()
        for entry in stored:
            for alias in entry.aliases:
                writer.alias(alias, entry.name)
    return done


@dataclass(kw_only=True)
class _Done:
    """Sums over tensors."""

    raw: int = 0
    weights: int = 0
    coded: int = 0
    packed: int = 0
    lost: float = 0.0
    energy: float = 0.0

    def add(self, tensor: Tensor, encoded: Encoded | None, is_buffer: bool) -> None:
        self.raw += tensor.numel() * tensor.element_size()
        self.weights += 0 if is_buffer else tensor.numel()
        if encoded is not None:
            w = tensor.double()
            self.coded += tensor.numel()
            self.packed += encoded.target.bits_on_disk(encoded.params) // 8
            self.lost += float((w - encoded.decode().double()).square().sum())
            self.energy += float(w.square().sum())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A state dict, open to be read at random.

    Raises:
        ValueError: another kind of file.
        OSError: it cannot be opened.
    """
    ours = f"{path}: is a Detent file, not a state dict; detent unpack makes a state dict of it"
    with path.open("rb") as raw:
        begin = raw.read(len(MAGIC))
    if begin == MAGIC:
        raise ValueError(ours)
    try:
        with safe_open(path, "pt") as file:
            if "detent" in (file.metadata() or {}):
                raise ValueError(ours)
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors state dict{of_torch(begin[:4]) or f': {error}'}") from None


_COUNTER = "num_batches_tracked"  # old checkpoints lack it; PyTorch too takes the model's own then


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A distinct tensor of a model: its first name, the others, and which name it has in the state dict, if any."""

    name: str
    aliases: tuple[str, ...]
    source: str | None


def _stored(net: nn.Module, weights: Any, source: Path) -> list[_Stored]:
    """The distinct tensors of a model in its order, all of them in the state dict and none besides.

    A tied tensor may stand there under any of its names, as tools differ in which they keep.

    Raises:
        ValueError: naming the first tensor that one of them lacks, or that differs.
    """

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"{source} does not fit the model: {why}")

    there: dict[str, str] = {}
    for own in weights.keys():  # noqa: SIM118  safe_open is not iterable
        if there.setdefault(canonical_name(own), own) != own:
            refuse(f"{there[canonical_name(own)]!r} and {own!r} are one name once wrapper names are removed")
    state = net.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(canonical_name(name))
    shapes = {canonical_name(name): tensor.shape for name, tensor in state.items() if isinstance(tensor, Tensor)}
    found = []
    for first, *aliases in names.values():
        kept = [name for name in (first, *aliases) if name in there]
        if not kept and not first.endswith(_COUNTER):
            refuse(f"it has no {first!r}")
        for name in kept:
            shape = tuple(weights.get_slice(there[name]).get_shape())
            if shape != tuple(shapes[name]):
                refuse(f"{name!r} has shape {shape} in the state dict and {tuple(shapes[name])} in the model")
            if name != kept[0] and not _same(weights.get_tensor(there[kept[0]]), weights.get_tensor(there[name])):
                refuse(f"{kept[0]!r} and {name!r} are one tied tensor in the model and differ in the state dict")
        found.append(_Stored(name=first, aliases=tuple(aliases), source=there[kept[0]] if kept else None))
    if odd := sorted(own for name, own in there.items() if name not in shapes):
        refuse(f"it has {odd[0]!r}, which the model has not")
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _encoded(weights: Any, stored: list[_Stored], plan: Plan) -> Iterator[tuple[str, Tensor, Encoded | None, str]]:
    """(name, tensor, its codes if it is claimed, why not) of every tensor, read one at a time."""
    claims = {claim.name: claim for claim in plan.claims}
    together: dict[str, Params] = {}
    sources = {entry.name: entry.source for entry in stored}
    for name, source in sources.items():
        tensor = torch.tensor(0) if source is None else weights.get_tensor(source)
        claim = claims.get(name)
        if claim is None or not claim.claimed:
            yield name, tensor, None, "buffer" if claim is None else claim.reason
            continue
        target = plan.rule_of(claim).target
        assert target is not None
        try:
            if target.fits_together and name not in together:
                mine = [c for c in plan.claimed if c.rule == claim.rule]
                whole = [weights.get_tensor(sources[c.name]) for c in mine]
                fitted = target.fit_model(whole, [c.layout for c in mine], [None] * len(mine))
                together |= {c.name: params for c, params in zip(mine, fitted, strict=True)}
            params = together[name] if name in together else target.fit(tensor, claim.layout)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        codes = target.encode(tensor, params)
        yield name, tensor, Encoded(target=target, params=params, codes=codes, dtype=tensor.dtype), ""


# --- images to evaluate on ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How to score a model on images: the test split for scores, training images for sensitivity."""

    test: Callable[[nn.Module], dict[str, float]]
    train: Callable[[nn.Module], dict[str, float]]
    test_words: str
    train_words: str


def bench_of(data: str) -> Bench:
    """A bench on scikit-learn's digits ("digits") or on a folder of Parquet images.

    Pixels are scaled by mean and standard deviation of the training split, a channel at a time.

    Raises:
        ValueError: no such folder, or one without both splits.
        ImportError: an extra that is not installed.
    """
    train, mean, std = _training_images(data)
    test = digits("test") if data == "digits" else load_images(data, "test", grey=train.images.shape[1] == 1)
    some = train.subset(torch.arange(min(SENSITIVITY_IMAGES, len(train))))
    return Bench(
        test=lambda model: _scores(model, test, mean, std),
        train=lambda model: _scores(model, some, mean, std),
        test_words=f"the test split of {data}, {len(test):,} images, {_SCALED}",
        train_words=f"the first {len(some):,} training images of {data}, {_SCALED}",
    )


_SCALED = "pixels scaled by the training split's mean and deviation"


def _training_images(data: str) -> tuple[ImageSet, list[float], list[float]]:
    """The training split of `--data`, and the mean and standard deviation of its pixels, a channel at a time.

    Raises:
        ValueError: neither "digits" nor a folder with such a split.
    """
    if data != "digits" and not Path(data).is_dir():
        raise ValueError(f"--data {data}: must be 'digits', or a folder of Parquet images")
    train = digits("train") if data == "digits" else load_images(data, "train")
    pixels = train.images.float() / 255
    return train, pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).clamp_min(1e-3).tolist()


def _scores(model: nn.Module, images: ImageSet, mean: list[float], std: list[float]) -> dict[str, float]:
    model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for x, y in Batches(images.images, images.labels, 500, shuffle=False, mean=mean, std=std, drop_last=False):
            try:
                out = model(x)
            except (RuntimeError, ValueError, TypeError) as error:
                shape = "x".join(map(str, x.shape[1:]))
                raise ValueError(f"the model does not take images of {shape}: {error}") from None
            if out.dim() != 2 or out.shape[1] <= int(y.max()):
                raise ValueError(
                    f"the model gives {tuple(out.shape)}: must be one score a class for each of {len(y)} images"
                )
            loss += float(F.cross_entropy(out, y, reduction="sum"))
            right += int((out.argmax(1) == y).sum())
    return {"accuracy": 100 * right / len(images), "loss": loss / len(images)}


# --- reports and exports of a file --------------------------------------------------------------------------------


def widths_in(text: str) -> list[int]:
    """The widths of "8,4,2".

    Raises:
        ValueError: anything else, or a width outside 2 to 8.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--bits {text}: must be widths with commas between them, as 8,6,4") from None
    if not all(2 <= width <= 8 for width in found):
        raise ValueError(f"--bits {text}: widths must be 2 to 8")
    return found


def report_of(
    file: Path,
    *,
    model: str | None,
    data: str | None,
    bits: list[int],
    history: Path | None,
    exported: Path | None,
    title: str,
    watch: Watch,
) -> Report:
    """The report of a file, with scores where model and data are given.

    Raises:
        ValueError: one of model and data without the other, or whatever they refuse.
    """
    if (model is None) != (data is None):
        raise ValueError("--model and --data go together: scores need a network and images to score it on")
    moments = () if history is None else History.read(history)
    exports = () if exported is None else exports_in(exported)
    if model is None or data is None:
        return collect_file(file, history=moments, exports=exports, title=title, watch=watch)
    bench = bench_of(data)
    return collect_file(
        file,
        model=model_of(model),
        evaluate=bench.test,
        sensitivity=bench.train,
        bits=bits,
        history=moments,
        exports=exports,
        title=title,
        evaluated_on=bench.test_words,
        sensitivity_on=bench.train_words,
        watch=watch,
    )


def exports_in(path: Path) -> list[Export]:
    """Exports as `detent export --json` tells of them, one or a list.

    Raises:
        ValueError: anything else.
        OSError: the file cannot be read.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        rows = said if isinstance(said, list) else [said]
        kept = [{key: row[key] for key in Export.model_fields if key in row} for row in rows]
        return [Export(**{**row, "notes": " ".join(row.get("notes", []))}) for row in kept]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--exported {path}: is not what detent export --json says: {str(error).splitlines()[0]}"
        ) from None


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """What `detent export --to onnx` may be told, as its flags are; None where a flag was not given."""

    shape: str | None = None
    batchnorm: str | None = None
    activations: int | None = None
    method: str | None = None
    data: str | None = None
    calibrate: int | None = None
    input_range: str | None = None
    latency: bool = False
    threads: int | None = None

    @property
    def given(self) -> list[str]:
        """Flags that were given, `--input` left out."""
        return [
            "--" + name.replace("_", "-")
            for name, value in vars(self).items()
            if name != "shape" and value is not None and value is not False
        ]


def export_file(
    file: Path, *, model: str, to: str, out: Path | None, options: OnnxOptions, watch: Watch
) -> dict[str, Any]:
    """Export the compressed life of a file.

    Returns:
        What was done: path, format, bytes, difference (from PyTorch, or None), notes, and more that the exporter says;
        if measured, latency_ms and reference_ms by batch size, and latency with the ratios.

    Raises:
        ValueError: an unknown format, flags that do not go together, or a file that does not fit the model.
        ImportError: the packages of the format are missing.
    """
    if to not in ("onnx", "compressed-tensors"):
        raise ValueError(f"--to {to}: must be onnx or compressed-tensors")
    if to == "onnx" and options.shape is None:
        raise ValueError("--input is missing: onnx needs the shape of one input, e.g. --input 1,3,32,32")
    if to != "onnx" and options.shape is not None:
        raise ValueError(f"--to {to}: --input goes with onnx only")
    if to == "onnx":
        return _export_onnx(file, model, out or file.with_suffix(".onnx"), options, watch)
    if options.given:
        raise ValueError(f"--to {to}: {', '.join(options.given)} go with onnx only")
    net = model_of(model).eval()
    advance = watch("exporting", 2)
    run = run_of_file(file, net, "compressed")
    advance()
    folder = out or file.with_suffix("")
    made = to_compressed_tensors(run, folder)
    advance()
    kept = [f"Left as they are: {', '.join(made.ignored)}."] if made.ignored else []
    return {
        "path": str(folder),
        "format": "compressed-tensors, pack-quantized",
        "bytes": made.bytes,
        "difference": None,
        "packed": dict(made.packed),
        "notes": kept,
    }


def _export_onnx(file: Path, model: str, path: Path, options: OnnxOptions, watch: Watch) -> dict[str, Any]:
    assert options.shape is not None
    sizes_of_input = _sizes_in(options.shape)
    if options.batchnorm not in (None, "keep", "fold"):
        raise ValueError(f"--batchnorm {options.batchnorm}: must be keep or fold")
    if options.threads is not None and (not options.latency or options.threads < 1):
        raise ValueError(f"--threads {options.threads}: must be 1 or more, and goes with --latency")
    settings = _activations(options)
    net = model_of(model).eval()
    images = _calibration(options, sizes_of_input)
    advance = watch("exporting", 2)
    load(file, net, "compressed")
    advance()
    example = _example(sizes_of_input, settings, images)
    _try(net, example, options.shape)
    said = to_onnx(
        net,
        path,
        example,
        codes=file,
        fold_batchnorm=options.batchnorm == "fold",
        activations=settings,
        calibration=None if images is None else images.batches,
    )
    advance()
    forms = ", ".join(Counter(row.form for row in said.tensors if row.target))
    rounded = "" if settings is None else f", activations in {settings.bits} bits"
    notes = [] if settings is None else [_ranges(settings, images)]
    made = {
        **said.to_dict(),
        "format": f"ONNX opset {said.opset}, weights as {forms}{rounded}",
        "bytes": said.nbytes,
        "difference": max(said.difference.values(), default=None),
        "notes": [*notes, *said.notes],
    }
    if options.latency:
        at_load = settings is None and "DequantizeLinear" in said.kernels
        measured, told = _latency(net, path, sizes_of_input[1:], options.threads or 1, at_load, watch)
        made |= {**measured, "notes": [*made["notes"], *told]}
    return made


def _activations(options: OnnxOptions) -> Activations | None:
    """How to round activations, if at all.

    Raises:
        ValueError: flags that do not go together.
    """
    if options.activations is None:
        alone = [f for f in options.given if f in ("--method", "--data", "--calibrate", "--input-range")]
        if alone:
            raise ValueError(f"{', '.join(alone)}: go with --activations 8, which rounds activations")
        return None
    if options.batchnorm == "keep":
        raise ValueError("--batchnorm keep: rounded activations need it folded")
    method = options.method or "minmax"
    if method not in ("minmax", "percentile", "mse", "batchnorm"):
        raise ValueError(f"--method {method}: must be minmax, percentile, mse or batchnorm")
    if method == "batchnorm":
        if options.data is not None or options.calibrate is not None:
            raise ValueError("--method batchnorm: takes no images; leave out --data and --calibrate")
        if options.input_range is None:
            raise ValueError("--method batchnorm: needs --input-range -2,2.1, the smallest and largest input")
    elif options.data is None:
        raise ValueError(f"--method {method}: needs --data, images that find the ranges")
    elif options.input_range is not None:
        raise ValueError(f"--input-range {options.input_range}: goes with --method batchnorm only")
    if not 2 <= options.activations <= 8:
        raise ValueError(f"--activations {options.activations}: must be 2 to 8 bits")
    bounds = None if options.input_range is None else _range_in(options.input_range)
    return Activations(bits=options.activations, method=method, input_range=bounds)


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What finds the ranges of activations."""

    batches: list[Tensor]
    words: str


def _calibration(options: OnnxOptions, sizes_of_input: list[int]) -> _Images | None:
    """Training images of `--data`, drawn without replacement from a fixed seed.

    Raises:
        ValueError: more images than there are, or none, or images of another shape than the input.
    """
    if options.data is None:
        return None
    train, mean, std = _training_images(options.data)
    count = min(CALIBRATION_IMAGES, len(train)) if options.calibrate is None else options.calibrate
    if not 1 <= count <= len(train):
        raise ValueError(f"--calibrate {count}: must be 1 to {len(train)}, the training images of {options.data}")
    shape = list(train.images.shape[1:])
    if shape != sizes_of_input[1:]:
        raise ValueError(f"--input {options.shape}: the images of {options.data} are {'x'.join(map(str, shape))}")
    some = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count])
    batches = Batches(some.images, some.labels, min(count, 128), shuffle=False, mean=mean, std=std, drop_last=False)
    return _Images(batches=[x for x, _ in batches], words=f"{count:,} training images of {options.data}, {_SCALED}")


def _example(sizes_of_input: list[int], settings: Activations | None, images: _Images | None) -> Tensor:
    """What the file is compared with PyTorch on: rounded activations need inputs within their ranges."""
    if images is not None:
        return images.batches[0]
    if settings is None or settings.input_range is None:
        return torch.zeros(sizes_of_input)
    low, high = settings.input_range
    return low + (high - low) * torch.rand(sizes_of_input, generator=torch.Generator().manual_seed(0))


def _try(net: nn.Module, example: Tensor, shape: str) -> None:
    """Call the model once: what a tracer says of inputs that it does not take speaks of no flag.

    Raises:
        ValueError: it does not take them.
    """
    try:
        with torch.no_grad():
            net(example)
    except Exception as error:  # whatever a user's own code may raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--input {shape}: the model does not take one input of floating-point numbers of this shape ({why}); for "
            "tokens (whole numbers) or several inputs call detent.export.to_onnx(model, path, inputs, codes=file)"
        ) from None


def _ranges(settings: Activations, images: _Images | None) -> str:
    """Where the ranges come from."""
    if images is None:
        low, high = settings.input_range or (0.0, 0.0)
        inputs = f"uniform random inputs from {low:g} to {high:g}"
        return f"ranges of activations: from BatchNorm, without data; the difference is that on {inputs}"
    shown = f"the difference is that on the first {len(images.batches[0]):,} of them"
    return f"ranges of activations: {settings.method} over {images.words}; {shown}"


def _latency(
    net: nn.Module, path: Path, shape: list[int], threads: int, at_load: bool, watch: Watch
) -> tuple[dict[str, Any], list[str]]:
    """How long the file takes in ONNX Runtime beside the same network written in float32; numbers and sentences."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float32.onnx"
        # BatchNorm folded, as ONNX Runtime does it to floats anyway: the fastest float32 file there is.
        to_onnx(net, plain, torch.zeros(1, *shape), codes={}, fold_batchnorm=True, check=False)
        advance = watch("measuring", len(LATENCY_BATCHES))
        rows = onnx_latency(
            path, plain, shape, batches=LATENCY_BATCHES, threads=threads, at_load=at_load, advance=advance
        )
    where = f"ONNX Runtime {onnxruntime.__version__} on this machine's CPU, {threads} thread{'s' * (threads > 1)}"
    notes = [f"latency: {where}, against the same network in float32; medians of alternating rounds"]
    for row in rows:
        times = f"{figures(row.ms)} ms, float32 {figures(row.reference_ms)} ms"
        notes.append(f"batch {row.batch}: {times}, {row.ratio:.2f} times as long: {row.verdict}")
    if at_load:
        found = ", ".join(f"batch {row.batch} {figures(row.at_load_ms)} ms" for row in rows)
        how = "the session option session.disable_quant_qdq=1 makes floats of them once, at load"
        notes.append(f"weights are dequantized anew at every run, and nothing is prepared with them; {how}: {found}")
    numbers = {
        "latency_ms": {str(row.batch): row.ms for row in rows},
        "reference_ms": {str(row.batch): row.reference_ms for row in rows},
        "latency": [asdict(row) | {"verdict": row.verdict} for row in rows],
        "threads": threads,
    }
    return numbers, notes


def _range_in(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"--input-range {text}: must be the smallest and the largest input, as -2,2.1")
    return low, high


def _sizes_in(shape: str) -> list[int]:
    try:
        found = [int(part) for part in shape.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"--input {shape}: must be sizes with commas between them, as 1,3,32,32")
    return found
