"""Compression without training: of a model, with or without a few inputs, and of a state dict on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from detent import claimed
from detent.calibration import Batches, Calibration, How, looked_up, placed
from detent.claimed import fit_target, refuse_stages
from detent.contents import DTYPES, contents_of, refuse_unsavable
from detent.engine import Run
from detent.guards import refuse_empty
from detent.lives import Encoded
from detent.pack import Coding, Writer, sizes
from detent.pack.checkpoint import Checkpoint
from detent.pack.header import Life
from detent.pack.loading import Rename, names_in_model, same_bits
from detent.parameters import by_numbers, canonical_name, refuse_no_model
from detent.plan import Plan
from detent.recipe import Recipe, refuse_no_recipe
from detent.specs import short
from detent.targets import Params
from detent.threads import OneThread

__all__ = ["Compressed", "calibrate", "compress", "compress_state_dict", "filled", "skeleton"]

Watch = Callable[[str, int], Callable[[], object]]


def compress(
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Batches | None = None,
    leave_out: str | Sequence[str] = (),
    example: Any = None,
) -> Run:
    """Apply the targets of a recipe to a trained model, with no optimizer and no data: post-training compression.

    The model keeps its weights; `run.compressed()` shows the compressed life, `run.finalize()` makes it permanent.

    Args:
        model: a trained model.
        recipe: rules whose mechanisms, if any, are ignored.
        calibration: a few batches of inputs without labels, or "prior" without data; then places are chosen as
            `calibrate(run, calibration)` chooses them.
        leave_out: as for `attach`.
        example: as for `Recipe.resolve`.

    Returns:
        A run without optimizers.

    Raises:
        ValueError: a rule that claims nothing, a target that refuses a parameter, NaN weights, something in
            `model.state_dict()` that no file could hold.
        RuntimeError: another thread works on the same model.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(8, 4)
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
        >>> with run.compressed():
        ...     print(len(model.weight.unique()) <= 3)
        True
    """
    refuse_no_model(model, "compress")
    refuse_no_recipe(recipe, "compress")
    claimed.refuse_stages(recipe, "compress")
    with OneThread.of(model).doing("detent.compress"):
        # A file of this run must not say that weights were pulled.
        run = Run(model, recipe.without_mechanisms().resolve(model, example=example), [], None, "raise")
        refuse_empty(model, [(entry.name, entry.param) for entry in run._entries])
        run.leave(leave_out, "compress")
        fit_target(run._entries)
        run._adopt()
        run.plan.warn_left("compress")
        run._example = example
        if calibration is not None:
            run._calibrate(calibration, None, How())
        run._look_for_losses(run._life(None, None))
        run._say_losses("compress")
        return run


def calibrate(
    run: Run,
    batches: Batches,
    *,
    order: Literal["sequential", "parallel"] = "sequential",
    drift: float = 0.5,
    correct: bool = True,
    damping: float = 0.01,
    by_diagonal: bool = True,
    block: int = 128,
    forward: Callable[[Any], Any] | None = None,
) -> Calibration:
    """Choose the places of the compressed life with a few inputs, such that the outputs of each layer change least.

        minimise |(W - Q) X|^2 instead of |W - Q|^2, one input of a layer at a time: the error made in one weight is
        repaired by those of its output channel that are still free

    For all targets whose weights choose by themselves (grids, ternary, learned levels, 16-bit floats), and for masks
    (`TopK`, `NM`, `Structured`, `SparseLevels`), whose survivors then move. Fitted scales, levels and counts stay as
    they are. Linear layers, all convolutions, transformers' `Conv1D` and experts are seen at the product itself,
    whatever module makes it; what cannot be seen (a lookup, a recurrent kernel), and codebooks, keep plain rounding,
    and a warning names them. No layer's error on these inputs is larger than plain rounding's.

    The full-precision weights stay. `run.compressed()`, `run.finalize()`, `save` and exports have the chosen places
    until the next training step: then they would belong to other weights. Lives of other widths and recipes are
    rounded plainly. Call `run.recalibrate` afterwards, not before.

    Without data, "prior" stands for inputs as they mostly are: they have positive products, as what comes out of a ReLU
    has, and within a kernel they are nearly alike. Then errors cancel in each kernel and each output channel. That
    takes seconds, hardly changes the file, and gives convolutions much of what inputs would; linear layers little.

        H = I + 2 (ones within the kernel positions of an input channel) + 0.1 (ones)

    Args:
        run: from `compress`, or from `attach`, at any moment between two steps.
        batches: inputs without labels, as for `run.recalibrate`: some hundred images, or sequences. They are kept in
            memory, since each layer takes a pass of its own, and one layer's moments (8 bytes times its inputs squared,
            for each group of a convolution or expert) at a time. The model is in eval mode. Under DDP give every
            process the same. Or "prior", which takes no switch but `block`, and corrects nothing.
        order: "sequential": each layer sees the inputs that the compressed layers before it make. "parallel": those of
            the full-precision model, in fewer passes.
        drift: with order "sequential", how much of what the compressed layers before changed in a layer's inputs its
            weights are to make up for, in [0, 1]. 0 is GPTQ; 1 aims at the outputs of the full-precision model, with
            less to spare for inputs that were not seen. Needs the inputs of one layer in memory, and a pass more.
        correct: let the outputs of a layer keep their mean: in the statistics of the BatchNorm that takes them, which
            also keeps their spread, else in a bias that the recipe claims (as on `Round`, in 16 bits).
        damping: share of the mean of the inputs' energies that is added to each, > 0.
        by_diagonal: weights of the inputs with most energy choose first, instead of in their order.
        block: weights of a channel after which the effect on all others is worked out, and masks look again; >= 1.
        forward: how to feed one batch, if `model(inputs)` is not it.

    Returns:
        Errors of each layer, and what keeps plain rounding and why; also as `run.calibration`. Print it.

    Raises:
        ValueError: no batches, inputs that are NaN or infinite, a sharded model, or an argument out of its range.
        RuntimeError: inside `run.compressed()`, or while another thread works on the same model.

    Example:
        >>> import torch, detent as dt
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> x = torch.randn(256, 4) @ torch.randn(4, 16)
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> @torch.no_grad()
        ... def error():
        ...     full = model(x)
        ...     with run.compressed():
        ...         return float((model(x) - full).square().sum())
        >>> plain = error()
        >>> _ = dt.calibrate(run, [x])
        >>> error() < plain / 3
        True

    Reference: Frantar et al., "GPTQ", arXiv 2210.17323; Frantar, Alistarh, "SparseGPT", arXiv 2301.00774. Drift: Li et
    al., "GPTAQ", arXiv 2504.02692, solved here as a least-squares problem. Correction of biases: Nagel et al.,
    "Data-Free Quantization", arXiv 1906.04721, section 4.2, here with measured means.
    """
    how = How(order=order, drift=drift, correct=correct, damping=damping, by_diagonal=by_diagonal, block=block)
    return run._calibrate(batches, forward, how)


# --- a state dict without training --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What `compress_state_dict` did.

    Attributes:
        file: the file written.
        bytes: its size.
        raw_bytes: that of the tensors it came from.
        weights: how many there are.
        compressed_weights: how many of them have codes.
        nominal_bits: bits each of those takes at true width, scales and codebooks included.
        bits_per_weight: bits each of those takes as written.
        error: squared error of those, as a share of their squares.
        notes: what had to be guessed, and what did nothing, in sentences.
    """

    file: str
    bytes: int
    raw_bytes: int
    weights: int
    compressed_weights: int
    nominal_bits: float
    bits_per_weight: float
    error: float
    notes: tuple[str, ...]


def compress_state_dict(
    source: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    life: Life = "compressed",
    calibration: Literal["prior"] | None = None,
    coding: Coding | None = None,
    model: nn.Module | None = None,
    example: Any = None,
    rename: Rename | None = None,
    notes: Mapping[str, Any] | None = None,
    watch: Watch = lambda what, steps: lambda: None,
) -> Compressed:
    """Compress a state dict on disk and write the file, with one tensor in memory at a time: no training, no data.

    Args:
        source: a safetensors file, a folder of shards with their index, or the index.
        out: the file to write; no file of the source.
        recipe: rules whose mechanisms, if any, are ignored; without stages.
        life: "compressed" or "both".
        calibration: "prior" chooses places as `calibrate(run, "prior")` does; `None` takes the nearest. Without
            `model`, tables that are looked up cannot be told from linear layers, and are treated as these.
        coding: "entropy", "bitpacked" or "none"; by default what `save` takes for this name.
        model: for what names and shapes do not say: transposed convolutions, ties, buffers, which layer is first. Its
            own weights are not read, so it may lie on the meta device.
        example: as for `Recipe.resolve`; the model is run, so it needs numbers.
        rename: from names in the state dict to names in the model, as for `load`.
        notes: plain JSON data to keep with the file.
        watch: called with a label and a number of steps, gives what is called at each.

    Raises:
        ValueError: a source that is no state dict, or a recipe or a model that does not fit it.
        OSError: a file cannot be opened or written.

    Example:
        >>> import tempfile, detent as dt
        >>> from safetensors.torch import save_file
        >>> recipe = dt.Recipe.preset("uniform-w4")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.randn(64, 64)}, f"{folder}/w.safetensors")
        ...     made = compress_state_dict(f"{folder}/w.safetensors", f"{folder}/w.detent", recipe)
        >>> made.compressed_weights, made.nominal_bits, made.bytes < 2500
        (4096, 4.5, True)
    """
    refuse_no_recipe(recipe, "compress_state_dict")
    if not isinstance(source, Checkpoint):
        with Checkpoint(source) as weights:
            return compress_state_dict(
                weights,
                out,
                recipe,
                life=life,
                calibration=calibration,
                coding=coding,
                model=model,
                example=example,
                rename=rename,
                notes=notes,
                watch=watch,
            )
    if any(Path(out).resolve() == file.resolve() for file in source.files):
        raise ValueError(f"compress_state_dict(out={str(out)!r}): is a file of the state dict; give another name")
    if model is None and example is not None:
        raise ValueError("compress_state_dict(example=...): goes with model=, which is run on it")
    if calibration not in (None, "prior"):
        raise ValueError('compress_state_dict(calibration=...): must be "prior" or None; with inputs, use compress')
    if recipe.activations:
        raise ValueError(
            "compress_state_dict(recipe=...): activations= needs a model that is run to find its grids; use compress, "
            "run.observe and save, or leave it out"
        )
    net = skeleton(source) if model is None else model
    refuse_stages(recipe, "compress")
    plan = recipe.without_mechanisms().resolve(net, example=example)
    norms = any(getattr(module, "running_mean", None) is not None for module in net.modules())
    writer = Writer(out, life, coding=coding, batchnorm="own" if norms else "none", notes=notes)
    codes = _encoded(
        source, stored := _stored(net, source, rename), plan, None if calibration is None else looked_up(net)
    )
    done = _write(writer, codes, stored, life == "both", watch)
    left = f"Left in full precision: {plan.left()}." if plan.left() else ""
    said = [*(guesses(plan) if model is None else []), left, unused_mechanisms(recipe)]
    together = sorted({type(r.target).__name__ for r in plan.recipe.rules if r.target and r.target.fits_together})
    if together:
        said.append(f"{', '.join(together)} is fitted to several tensors at once, so these were in memory together.")
    parts = sizes(out)
    return Compressed(
        file=str(out),
        bytes=writer.size,
        raw_bytes=done.raw,
        weights=done.weights,
        compressed_weights=done.coded,
        nominal_bits=8 * done.packed / max(done.coded, 1),
        bits_per_weight=8 * (parts["codes"] + parts["params"]) / max(done.coded, 1),
        error=done.lost / (done.energy or 1.0),
        notes=tuple(note for note in said if note),
    )


def _write(writer: Writer, codes: Iterator[_Coded], stored: list[_Stored], both: bool, watch: Watch) -> _Done:
    """Write every tensor of a state dict under each of its names."""
    advance, done = watch("compressing", len(stored)), _Done()
    with writer:
        for name, tensor, encoded, reason in codes:
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
            self.packed += encoded.form.nbytes
            self.lost += float((w - encoded.decode().double()).square().sum())
            self.energy += float(w.square().sum())


_Coded = tuple[str, Tensor, Encoded | None, str]  # a tensor by name, its codes if it is claimed, and why not

_COUNTER = "num_batches_tracked"  # old checkpoints lack it; PyTorch too takes the model's own then


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A distinct tensor of a model: its first name, the others, and which name it has in the state dict, if any."""

    name: str
    aliases: tuple[str, ...]
    source: str | None


def _stored(net: nn.Module, weights: Checkpoint, rename: Rename | None) -> list[_Stored]:
    """The distinct tensors of a model in its order, all of them in the state dict and none besides.

    A tied tensor may stand there under any of its names, as tools differ in which they keep.

    Raises:
        ValueError: naming the first tensor that one of them lacks, or that differs.
    """

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"{weights.path} does not fit the model: {why}")

    there: dict[str, str] = {}
    for own in weights:
        if there.setdefault(canonical_name(own), own) != own:
            refuse(f"{there[canonical_name(own)]!r} and {own!r} are one name once wrapper names are removed")
    contents = contents_of(net)
    refuse_unsavable(contents, "compress", unready=True)
    known = {*contents.tensors, *contents.aliases}
    renamed = names_in_model(list(there), known, rename)
    there = {new: there[old] for old, new in renamed.items() if new is not None}
    found = []
    for first, tensor in contents.tensors.items():
        kept = [name for name in contents.names(first) if name in there]
        if not kept and not first.endswith(_COUNTER):
            odd = sorted(own for name, own in there.items() if name not in known)
            why = (
                f"; it has {odd[0]!r} instead, which rename= can say, or save model.state_dict() yourself"
                if odd
                else ""
            )
            refuse(f"it has no {first!r}{why}")
        for name in kept:
            shape = weights.shapes[there[name]]
            if shape != tuple(tensor.shape):
                refuse(f"{name!r} has shape {shape} in the state dict and {tuple(tensor.shape)} in the model")
            if name != kept[0] and not same_bits(weights.tensor(there[kept[0]]), weights.tensor(there[name])):
                refuse(f"{kept[0]!r} and {name!r} are one tied tensor in the model and differ in the state dict")
        aliases = tuple(contents.names(first)[1:])
        found.append(_Stored(name=first, aliases=aliases, source=there[kept[0]] if kept else None))
    if odd := sorted(own for name, own in there.items() if name not in known):
        refuse(f"it has {odd[0]!r}, which the model has not")
    return found


def _encoded(weights: Checkpoint, stored: list[_Stored], plan: Plan, tables: set[str] | None) -> Iterator[_Coded]:
    """Every tensor, read one at a time, on its nearest places or, given the names of tables, those of a prior."""
    claims = {claim.name: claim for claim in plan.claims}
    together: dict[str, Params] = {}
    sources = {entry.name: entry.source for entry in stored}
    for name, source in sources.items():
        tensor = torch.tensor(0) if source is None else weights.tensor(source)
        claim = claims.get(name)
        if claim is None or not claim.claimed:
            yield name, tensor, None, "buffer" if claim is None else claim.reason
            continue
        target = plan.rule_of(claim).target
        assert target is not None
        try:
            if target.fits_together and name not in together:
                mine = [c for c in plan.claimed if c.rule == claim.rule]
                whole = [weights.tensor(sources[c.name] or c.name) for c in mine]
                fitted = target.fit_model(whole, [c.layout for c in mine], [None] * len(mine))
                together |= {c.name: params for c, params in zip(mine, fitted, strict=True)}
            params = together[name] if name in together else target.fit(tensor, claim.layout)
            places = tensor if tables is None else placed(claim, target, params, tensor, tables)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        yield name, tensor, Encoded(target=target, form=target.form(places, params)), ""


# --- what only a state dict is known of ---------------------------------------------------------------------------


def skeleton(weights: Checkpoint) -> nn.Module:
    """A module with the names, shapes and dtypes of a state dict, on the meta device: no weight is kept.

    Names come in alphabetical order, numbers in theirs.
    A state dict does not say which convolutions are transposed or which 2-D tensors are buffers; BatchNorm's running
    statistics are known by their names.

    Raises:
        ValueError: a file that is no state dict.
    """
    root = nn.Module()
    for name in sorted(weights.shapes, key=by_numbers):
        shape = weights.shapes[name]
        try:
            _hang(root, name, torch.empty(shape, dtype=DTYPES[weights.dtypes[name]], device="meta"))
        except KeyError as error:
            raise ValueError(f"{weights.path}: not a safetensors state dict: {error}") from None
    return root


def filled(weights: Checkpoint, model: nn.Module | None = None, rename: Rename | None = None) -> nn.Module:
    """A module in memory with the weights of a state dict: the model itself, or a skeleton of it.

    Args:
        weights: the state dict.
        model: takes the weights; `None` for a module that has nothing but their names.
        rename: as for `compress_state_dict`.

    Raises:
        ValueError: a state dict that does not fit the model.
    """
    net = skeleton(weights).to_empty(device="cpu") if model is None else model
    values = {
        entry.name: weights.tensor(entry.source) for entry in _stored(net, weights, rename) if entry.source is not None
    }
    net.load_state_dict(values, strict=False)
    return net


def _hang(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor at its dotted name below the root, which may have parts that modules call something else by."""
    *folders, own = name.split(".")
    here = root
    for folder in folders:
        child = here._modules.get(folder)
        if child is None:
            child = nn.Module()
            here._modules[folder] = child
        here = child
    if own in ("running_mean", "running_var", "num_batches_tracked") or not value.is_floating_point():
        here._buffers[own] = value
        if own.startswith("running_"):
            here.track_running_stats = True  # type: ignore[assignment]  # as a BatchNorm says that they are its own
    else:
        here._parameters[own] = nn.Parameter(value)


def _taken(number: int, axes: str) -> str:
    """How many tensors are taken for something.

    Example:
        >>> _taken(1, "two axes"), _taken(2, "two axes")
        ('1 tensor of two axes is taken', '2 tensors of two axes are taken')
    """
    return f"{number} tensor{'s' * (number != 1)} of {axes} {'is' if number == 1 else 'are'} taken"


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
            f"A state dict keeps no order, so that of names and their numbers must do: @first is {ranked[0]} and "
            f"@last is {ranked[-1]}; if that is wrong, name them in the recipe or give --model."
        )
    return said


def unused_mechanisms(recipe: Recipe) -> str:
    """What to say of mechanisms in a recipe when nothing is trained; empty if there are none."""
    names = dict.fromkeys(short(rule.mechanism) for rule in recipe.rules if rule.mechanism is not None)
    return f"No training took place: {', '.join(names)} of the recipe did nothing." if names else ""
