"""What the commands do: everything of the command line that is neither a flag nor a table."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from detent.data import Batches, ImageSet, digits, load_images
from detent.export import to_onnx
from detent.export.hf import to_compressed_tensors
from detent.lives import Encoded, refuse_stages
from detent.pack import Writer, load, sizes
from detent.recipe import Plan, Recipe, short
from detent.report import Export, History, Report, collect_file, run_of_file
from detent.targets import Params

__all__ = ["Bench", "bench_of", "guesses", "model_of", "recipe_of", "skeleton", "unused_mechanisms"]

Watch = Callable[[str, int], Callable[[], None]]
SENSITIVITY_IMAGES = 1000


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
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is not iterable
                _hang(root, name, file.get_tensor(name).to("meta"))
    except (SafetensorError, KeyError) as error:
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


def guesses(plan: Plan) -> list[str]:
    """What had to be guessed of a model that only its state dict is known of, in sentences."""
    matrices = [claim for claim in plan.claims if len(claim.layout.shape) == 2]
    kernels = [claim for claim in plan.claims if len(claim.layout.shape) > 2]
    said = []
    if kernels:
        said.append(
            f"{len(kernels)} tensors of more than two axes are taken as convolutions with output channels first; "
            "transposed ones cannot be told apart without --model."
        )
    if matrices:
        said.append(f"{len(matrices)} tensors of two axes are taken as linear or embedding weights, a row an output.")
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
    source: Path, recipe: Recipe, out: Path | None, *, life: str, coding: str, model: str | None, watch: Watch
) -> dict[str, Any]:
    """Compress a state dict and write the file, tensor by tensor.

    Args:
        source: a .safetensors state dict.
        recipe: what becomes of which tensor.
        out: where to; the source's name with .detent by default.
        life: "compressed" or "both".
        coding: "entropy", "bitpacked" or "none".
        model: a factory, for what names and shapes do not say.
        watch: told how far it is.

    Returns:
        What was done: file, bytes, raw_bytes, weights, compressed_weights, nominal_bits (at true width) and
        bits_per_weight (as written), error, notes.

    Raises:
        ValueError: a source that is no state dict, or a recipe that does not fit it.
    """
    file = source.with_suffix(".detent") if out is None else out
    if file.resolve() == source.resolve():
        raise ValueError(f"--out {file}: is the state dict itself; give another name")
    net = skeleton(source) if model is None else model_of(model)
    refuse_stages(recipe, "compress")
    plan = recipe.without_mechanisms().resolve(net)
    said: dict[str, Any] = {"data": "none", "epochs": 0, "calibration": "none"}
    said["made by"] = f"detent compress {source.name}"
    if model is None:
        said["order"] = "alphabetical, as in a state dict: which weight is really first or last is not known"
    norms = any(getattr(module, "running_mean", None) is not None for module in net.modules())
    writer = Writer(file, life, coding=coding, batchnorm="own" if norms else "none", notes=said)  # type: ignore[arg-type]
    with _opened(source) as weights:
        names = _names(net, set(weights.keys()), source)
        advance = watch("compressing", len(names))
        done = _Done()
        with writer:
            for name, tensor, encoded, reason in _encoded(weights, names, plan):
                done.add(tensor, encoded, is_buffer=reason == "buffer")
                writer.add(name, tensor if life == "both" or encoded is None else None, encoded=encoded, reason=reason)
                advance()
            for claim in plan.claims:
                for alias in claim.aliases:
                    writer.alias(alias, claim.name)
    notes = [*(guesses(plan) if model is None else []), unused_mechanisms(recipe)]
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
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors state dict: {error}") from None


_COUNTER = "num_batches_tracked"  # old checkpoints lack it; PyTorch too takes the model's own then


def _names(net: nn.Module, stored: set[str], source: Path) -> list[str]:
    """Names of the distinct tensors of a model in its order, all of them in the state dict and none besides.

    Raises:
        ValueError: naming the first tensor that one of them lacks.
    """
    first: dict[int, str] = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    known = net.state_dict().keys()
    for name in first.values():
        if name not in stored and not name.endswith(_COUNTER):
            raise ValueError(f"{source} does not fit the model: it has no {name!r}")
    if odd := sorted(stored - known):
        raise ValueError(f"{source} does not fit the model: it has {odd[0]!r}, which the model has not")
    return list(first.values())


def _encoded(weights: Any, names: list[str], plan: Plan) -> Iterator[tuple[str, Tensor, Encoded | None, str]]:
    """(name, tensor, its codes if it is claimed, why not) of every tensor, read one at a time."""
    claims = {claim.name: claim for claim in plan.claims}
    together: dict[str, Params] = {}
    stored = set(weights.keys())
    for name in names:
        tensor = weights.get_tensor(name) if name in stored else torch.tensor(0)
        claim = claims.get(name)
        if claim is not None and tuple(tensor.shape) != claim.layout.shape:
            shapes = f"{tuple(tensor.shape)} in the state dict and {claim.layout.shape} in the model"
            raise ValueError(f"{name!r} has shape {shapes}")
        if claim is None or not claim.claimed:
            yield name, tensor, None, "buffer" if claim is None else claim.reason
            continue
        target = plan.rule_of(claim).target
        assert target is not None
        try:
            if target.fits_together and name not in together:
                mine = [c for c in plan.claimed if c.rule == claim.rule]
                whole = [weights.get_tensor(c.name) for c in mine]
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
    if data == "digits":
        train, test = digits("train"), digits("test")
    elif Path(data).is_dir():
        train = load_images(data, "train")
        test = load_images(data, "test", grey=train.images.shape[1] == 1)
    else:
        raise ValueError(f"--data {data}: must be 'digits', or a folder of Parquet images")
    pixels = train.images.float() / 255
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).clamp_min(1e-3).tolist()
    some = train.subset(torch.arange(min(SENSITIVITY_IMAGES, len(train))))
    scaled = "pixels scaled by the training split's mean and deviation"
    return Bench(
        test=lambda model: _scores(model, test, mean, std),
        train=lambda model: _scores(model, some, mean, std),
        test_words=f"the test split of {data}, {len(test):,} images, {scaled}",
        train_words=f"the first {len(some):,} training images of {data}, {scaled}",
    )


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


def export_file(
    file: Path, *, model: str, to: str, out: Path | None, shape: str | None, watch: Watch
) -> dict[str, Any]:
    """Export the compressed life of a file.

    Returns:
        What was done: path, format, bytes, difference (from PyTorch, or None), notes, and more that the exporter says.

    Raises:
        ValueError: an unknown format, a shape that is missing or none, or a file that does not fit the model.
        ImportError: the packages of the format are missing.
    """
    if to not in ("onnx", "compressed-tensors"):
        raise ValueError(f"--to {to}: must be onnx or compressed-tensors")
    if (to == "onnx") != (shape is not None):
        raise ValueError("--input 1,3,32,32: is needed for onnx, and for nothing else")
    sizes_of_input = None if shape is None else _sizes_in(shape)
    net = model_of(model).eval()
    advance = watch("exporting", 2)
    if sizes_of_input is not None:
        load(file, net, "compressed")
        advance()
        path = out or file.with_suffix(".onnx")
        said = to_onnx(net, path, torch.zeros(sizes_of_input), codes=file)
        advance()
        forms = Counter(row.form for row in said.tensors if row.target)
        return {
            **said.to_dict(),
            "format": f"ONNX opset {said.opset}, weights as {', '.join(forms)}",
            "bytes": said.nbytes,
            "difference": max(said.difference.values(), default=None),
            "notes": list(said.notes),
        }
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


def _sizes_in(shape: str) -> list[int]:
    try:
        found = [int(part) for part in shape.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"--input {shape}: must be sizes with commas between them, as 1,3,32,32")
    return found
