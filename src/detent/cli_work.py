"""What the commands do: everything of the command line that is neither a flag nor a table."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detent import calibration
from detent.data import Batches, ImageSet, digits, load_images
from detent.export import Activations, onnx_latency, to_compressed_tensors, to_onnx
from detent.pack import load
from detent.recipe import Recipe
from detent.report import Export, History, Report, collect_file, run_of_file
from detent.report.page import figures

__all__ = [
    "OnnxOptions",
    "budget_of",
    "bytes_in",
    "code_of",
    "example_of",
    "export_file",
    "import_own",
    "model_of",
    "places_of",
    "recipe_of",
    "refuse_images",
    "refuse_overwriting",
    "report_of",
    "visible",
    "widths_in",
]

Watch = Callable[[str, int], Callable[[], None]]
SENSITIVITY_IMAGES = 1000
CALIBRATION_IMAGES = 512  # for ranges of activations
PLACES_IMAGES = 256
LATENCY_BATCHES = (1, 64)


def recipe_of(source: str) -> Recipe:
    """A preset by name, or a recipe file.

    Raises:
        ValueError: neither.
        OSError: the file cannot be read.
    """
    return Recipe.from_yaml(Path(source)) if source.endswith((".yaml", ".yml")) else Recipe.preset(source)


# --- models -------------------------------------------------------------------------------------------------------


def _look_here() -> None:
    """Let modules of the current folder be found."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file in the folder must not stand in for a package


def import_own(module: str) -> None:
    """Import a user's module, so that its targets and mechanisms can be named; looked for in the current folder too.

    Raises:
        ValueError: no such module, or one that fails.
    """
    _look_here()
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a user's own code may raise
        raise ValueError(f"--import {module}: {type(error).__name__}: {error}") from error


def model_of(source: str) -> nn.Module:
    """The model of a factory "package.module:function", looked for in the current folder too; its code is run.

    Raises:
        ValueError: no such factory, or one that fails or makes no module.
    """
    made = _made(source, f"model={source!r}")
    if not isinstance(made, nn.Module):
        raise ValueError(f"model={source!r}: must give a torch.nn.Module, not {type(made).__name__}")
    return made


def example_of(source: str | None) -> Any:
    """What `--example` says the model takes: zeros of a shape, or what a factory gives; its code is run.

    Raises:
        ValueError: neither sizes with commas between them nor a factory, or one that fails.
    """
    if source is None:
        return None
    return _made(source, f"--example {source}") if ":" in source else torch.zeros(_sizes_in(source, "--example"))


def _made(source: str, said: str) -> Any:
    """What a factory makes, or stands there ready-made; errors begin with what was `said`."""
    module_name, colon, function = source.partition(":")
    if not (module_name and colon and function):
        raise ValueError(f'{said}: give a factory as "package.module:function"')
    _look_here()
    try:
        factory: Any = importlib.import_module(module_name)
        for part in function.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{said}: cannot find the factory: {error}") from None
    try:
        return factory() if callable(factory) else factory
    except Exception as error:  # whatever a user's own code may raise
        raise ValueError(f"{said}: the factory raised {type(error).__name__}: {error}") from error


# --- what is written ----------------------------------------------------------------------------------------------


def refuse_overwriting(
    *,
    named: Sequence[Path | None] = (),
    unnamed: Sequence[Path | None] = (),
    inputs: Sequence[str | Path | None] = (),
    force: bool,
) -> None:
    """Let no command write over its input, or over what stands under a name that nobody gave.

    Every command asks before it works. What the user named is replaced; what was named for him is not, unless he says
    so: a default name, the twin beside a page, the files in a folder.

    Args:
        named: outputs whose names the user gave.
        unnamed: outputs whose names follow from others; a folder counts as there if anything is in it.
        inputs: what the command reads; a folder stands for the files in it.
        force: whether what is there may be written over; inputs never.

    Raises:
        ValueError: naming the file.
    """
    read = [file for given in inputs if given is not None for file in _files(Path(given))]
    for out in (*named, *unnamed):
        if out is None:
            continue
        over = [file for file in read if _is_same(out, file)]
        if out.is_dir():
            over += [file for file in read if file.parent.resolve() == out.resolve() and file.suffix != ".detent"]
        if over:
            raise ValueError(
                f"{out}: would write over {over[0]}, which this command reads; give another name with --out"
            )
    for out in unnamed:
        if out is not None and not force and (any(out.iterdir()) if out.is_dir() else out.exists()):
            what = "a folder with files in it" if out.is_dir() else "there already"
            raise ValueError(f"{out} is {what}; give another name with --out, or --force to write over it")


def budget_of(budget: str, *, recipe: str | None, choices: str, life: str) -> Literal["step", "widths"]:
    """The choices of a budget, if nothing else was asked for that contradicts it.

    Raises:
        ValueError: naming the other option.
    """
    if recipe is not None:
        raise ValueError(f"--recipe {recipe} beside --budget {budget}: a budget finds the recipe; give one of the two")
    if life != "compressed":
        raise ValueError(f"--life {life} beside --budget {budget}: the full life is no part of a budget")
    if choices == "step" or choices == "widths":
        return choices
    raise ValueError(f"--choices {choices}: must be step or widths")


def places_of(
    budget: str | None, *, places: str | None, data: str | None, calibrate: int | None, model: str | None
) -> tuple[calibration.Batches | None, str]:
    """What places are chosen with, and words for it.

    Raises:
        ValueError: options that do not go together, or whatever `--data` refuses.
    """
    if places not in (None, "nearest", "prior"):
        raise ValueError(f"--places {places}: must be nearest or prior")
    if data is not None and budget is None:
        raise ValueError(f"--data {data}: goes with --budget")
    if calibrate is not None and data is None:
        raise ValueError(f"--calibrate {calibrate}: goes with --data")
    if data is None:
        nearest = places == "nearest" or (places is None and budget is None)
        return (None, "none") if nearest else ("prior", "none; places by a prior of inputs")
    if places is not None:
        raise ValueError(f"--places {places} beside --data {data}: images choose the places; give one of the two")
    if model is None:
        raise ValueError(f"--data {data}: goes with --model, which is run on its images")
    images = _drawn(data, calibrate, PLACES_IMAGES)
    return images.batches, f"places by {images.words}"


def bytes_in(text: str) -> int:
    """Bytes of "5GB" or "500MB", in powers of ten as transformers counts them.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"([1-9]\d{0,8})(k|M|G)?B?", text.strip())
    if not found:
        raise ValueError(f"--shard-size {text}: must be a size as 5GB, 500MB or 100kB")
    return int(found[1]) * {None: 1, "k": 10**3, "M": 10**6, "G": 10**9}[found[2]]


def _files(given: Path) -> list[Path]:
    return [file for file in given.rglob("*") if file.is_file()] if given.is_dir() else [given]


def _is_same(a: Path, b: Path) -> bool:
    """Whether two paths are one file, also by a link."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return a.resolve() == b.resolve()


def code_of(model: str | None) -> Path | None:
    """Where the code of a factory would be in the current folder: it is an input too."""
    return None if model is None else Path(*model.partition(":")[0].split(".")).with_suffix(".py")


def visible(text: str) -> str:
    """Text whose control characters are shown instead of sent: names and notes of a file may hold any.

    Example:
        >>> visible("a" + chr(27) + "[2Jb")
        'a\\\\x1b[2Jb'
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# All control characters but the line feed, and those that turn the direction of what follows.
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


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


_PYTHON_ONLY = ("dynamic_batch=False", "check=False")  # what `to_onnx` advises and `detent export` has no option for
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
    file: Path, *, model: str, to: str, out: Path | None, options: OnnxOptions, watch: Watch, force: bool = False
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
    inputs = (file, code_of(model), None if options.data == "digits" else options.data)
    if to == "onnx":
        default = None if out else file.with_suffix(".onnx")
        refuse_overwriting(named=[out], unnamed=[default], inputs=inputs, force=force)
        return _export_onnx(file, model, out or file.with_suffix(".onnx"), options, watch)
    if options.given:
        raise ValueError(f"--to {to}: {', '.join(options.given)} go with onnx only")
    folder = out or file.with_suffix("")
    refuse_overwriting(unnamed=[folder], inputs=inputs, force=force)
    net = model_of(model).eval()
    advance = watch("exporting", 2)
    run = run_of_file(file, net, "compressed")
    advance()
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
    try:
        said = to_onnx(
            net,
            path,
            example,
            codes=file,
            fold_batchnorm=options.batchnorm == "fold",
            activations=settings,
            calibration=None if images is None else images.batches,
        )
    except (ValueError, RuntimeError) as error:
        if not (named := next((word for word in _PYTHON_ONLY if word in str(error)), None)):
            raise
        raise ValueError(
            f"{error} (this command has no option for that: in Python, detent.export.to_onnx(..., {named}))"
        ) from error
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
    """Images without labels, scaled."""

    batches: list[Tensor]
    words: str


def _calibration(options: OnnxOptions, sizes_of_input: list[int]) -> _Images | None:
    """What finds the ranges of activations.

    Raises:
        ValueError: more images than there are, or none, or images of another shape than the input.
    """
    if options.data is None:
        return None
    images = _drawn(options.data, options.calibrate, CALIBRATION_IMAGES)
    shape = list(images.batches[0].shape[1:])
    if shape != sizes_of_input[1:]:
        raise ValueError(f"--input {options.shape}: the images of {options.data} are {'x'.join(map(str, shape))}")
    return images


def refuse_images(net: nn.Module, places: calibration.Batches | None, data: str | None) -> None:
    """Refuse images that a model does not take.

    Raises:
        ValueError: saying why.
    """
    if data is None or not isinstance(places, list):
        return
    try:
        with torch.no_grad():
            net.eval()(places[0][:1])
    except Exception as error:  # whatever a user's own code may raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        shape = "x".join(map(str, places[0].shape[1:]))
        raise ValueError(f"--data {data}: the model does not take images of {shape}: {why}") from None


def _drawn(data: str, wanted: int | None, usual: int) -> _Images:
    """Training images of `--data`, drawn without replacement from a fixed seed.

    Raises:
        ValueError: more images than there are, or none.
    """
    train, mean, std = _training_images(data)
    count = min(usual, len(train)) if wanted is None else wanted
    if not 1 <= count <= len(train):
        raise ValueError(f"--calibrate {count}: must be 1 to {len(train)}, the training images of {data}")
    some = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count])
    batches = Batches(some.images, some.labels, min(count, 128), shuffle=False, mean=mean, std=std, drop_last=False)
    return _Images(batches=[x for x, _ in batches], words=f"{count:,} training images of {data}, {_SCALED}")


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


def _sizes_in(shape: str, flag: str = "--input") -> list[int]:
    try:
        found = [int(part) for part in shape.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"{flag} {shape}: must be sizes with commas between them, as 1,3,32,32")
    return found
