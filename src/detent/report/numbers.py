"""The numbers of a report: what two lives of a network are, how far apart, how good and how many bytes."""

from __future__ import annotations

import json
import math
import numbers
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor, nn

from detent import sharding
from detent.engine import Run
from detent.lives import Encoded
from detent.pack import Inspection, inspect, read_header, save
from detent.pack.coding import Coding
from detent.pack.inspection import distances
from detent.pack.shown import Header
from detent.parameters import named_parameters
from detent.report.card import Card, card_of
from detent.specs import short
from detent.targets import Target

__all__ = [
    "Export",
    "Histogram",
    "History",
    "Layer",
    "Moment",
    "Report",
    "Sizes",
    "Width",
    "collect",
]

WIDTHS = (8, 6, 4, 3, 2)
CODINGS: tuple[Coding, ...] = ("entropy", "bitpacked")
_BINS = 61
Scores = Mapping[str, float]
Evaluate = Callable[[nn.Module], Scores]
Watch = Callable[[str, int], Callable[[], None]]


def silent(label: str, total: int) -> Callable[[], None]:
    """Watches nothing."""
    return lambda: None


class _Frozen(pydantic.BaseModel):
    """Plain data that JSON can hold."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _known(value: Any) -> Any:
    return None if isinstance(value, numbers.Real) and not math.isfinite(value) else value


# A number, or None where there is none: a training that diverged must not cost the report.
Known = Annotated[float | None, pydantic.BeforeValidator(_known)]


class Histogram(_Frozen):
    """Where the weights of one tensor lie, before and after.

    Attributes:
        unit: "steps" (weight divided by the step of its grid) or "value".
        low: left edge of the first bin.
        high: right edge of the last one.
        full: share of the weights in each bin, full life; empty if the file has none.
        compressed: the same for the compressed life.
        levels: the places that the compressed weights take, if they are few.
        outside: share of the weights of the full life beyond the edges.
    """

    unit: str
    low: float
    high: float
    full: tuple[float, ...]
    compressed: tuple[float, ...]
    levels: tuple[float, ...]
    outside: float


class Layer(_Frozen):
    """One compressed tensor.

    Attributes:
        bits: bits a weight of its codes and fitted numbers at their true width.
        coded_bits: bits a weight of the same as written with entropy coding.
        entropy: zero-order entropy of its codes alone, bits a weight.
        zeros: share of its weights that are zero when compressed.
        error: |w - q|^2 / |w|^2 between the lives; None without a full life.
        wasserstein: 1-Wasserstein distance between the values of the two lives; None without a full life.
        distance: mean |w - q| in steps of the grid; None where there are none.
        sensitivity: loss with only this tensor compressed, minus the loss of the full life; None if not measured.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    becomes: str
    mechanism: str
    bits: float
    coded_bits: float
    entropy: float
    zeros: float
    error: Known = None
    wasserstein: Known = None
    distance: Known = None
    sensitivity: Known = None
    histogram: Histogram | None = None


class Moment(_Frozen):
    """How far the two lives were apart at one step of a training. NaN and infinity become None.

    Attributes:
        step: steps of the optimizer so far.
        error: |w - q|^2 / |w|^2, mean over tensors weighted by their number of weights.
        distance: mean |w - q| in steps of the grid, over the tensors that have one; None if none has.
        layers: the error of each tensor.
        scores: whatever else was logged.
    """

    step: int
    error: Known
    distance: Known = None
    layers: dict[str, Known]
    scores: dict[str, Known] = {}


class Width(_Frozen):
    """The same checkpoint at one width: bytes of the file that holds this life alone, and what it scores."""

    label: str
    bits: int | None
    bytes: dict[str, int]
    scores: dict[str, float]


class Sizes(_Frozen):
    """Bytes.

    Attributes:
        raw: every parameter and buffer of the network as it is in memory.
        parts: by coding ("entropy", "bitpacked"), of the file with the compressed life alone: file (all of it),
            header, coded (codes and fitted numbers), index (of these, where survivors of sparse targets are), rest
            (tensors stored as they are).
        both: the file that holds both lives, where there is one.
    """

    raw: int
    parts: dict[str, dict[str, int]]
    both: int | None = None


class Export(_Frozen):
    """One exported model.

    Attributes:
        format: what it is, e.g. "ONNX, INT4 weights".
        bytes: size of the file.
        latency_ms: milliseconds a batch, by batch size as text; empty if not measured.
        reference_ms: the same for the full-precision model in the same runtime.
        difference: largest absolute difference of the outputs from PyTorch's compressed life; None if not measured.
        notes: what else a reader must know, e.g. the runtime and its threads.
    """

    format: str
    bytes: int
    latency_ms: dict[str, float] = {}
    reference_ms: dict[str, float] = {}
    difference: float | None = None
    notes: str = ""


class Report(_Frozen):
    """All that a page shows, as numbers.

    Attributes:
        title: heading of the page.
        sizes: bytes.
        scores: by life ("full", "compressed"): what `evaluate` gave.
        layers: the compressed tensors, in the model's order.
        history: how the lives came together while training.
        widths: the same checkpoint at other widths.
        unfit: widths that were asked for and that a target cannot take, and why.
        exports: exported models.
        card: what is compressed and how.
        evaluated_on: what the scores of `scores` and `widths` were measured on, in words.
        sensitivity_on: what the sensitivities were measured on, in words.

    Example:
        >>> import detent as dt
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])
        >>> report = collect(dt.compress(nn.Linear(64, 64), recipe))
        >>> Report.from_json(report.to_json()) == report
        True
    """

    title: str
    sizes: Sizes
    scores: dict[str, dict[str, float]] = {}
    layers: tuple[Layer, ...]
    history: tuple[Moment, ...] = ()
    widths: tuple[Width, ...] = ()
    unfit: dict[str, str] = {}
    exports: tuple[Export, ...] = ()
    card: Card
    evaluated_on: str = ""
    sensitivity_on: str = ""

    @property
    def absent(self) -> dict[str, str]:
        """By section: what to pass to get what is not there."""
        return _absent(self)

    @property
    def compressed_weights(self) -> int:
        """How many weights are stored as codes."""
        return sum(layer.weights for layer in self.layers)

    def bits_per_weight(self, coding: str = "entropy", *, index: bool = True) -> float:
        """Bits a compressed weight as written, fitted numbers counted.

        Args:
            coding: "entropy", or "bitpacked" for true width.
            index: count the positions of survivors; papers on pruning often do not.
        """
        parts = self.sizes.parts[coding]
        return 8 * (parts["coded"] - (0 if index else parts["index"])) / max(self.compressed_weights, 1)

    @property
    def full_bits(self) -> float:
        """Bits a weight of the same tensors in the full life."""
        bits = sum(torch.finfo(getattr(torch, layer.dtype)).bits * layer.weights for layer in self.layers)
        return bits / max(self.compressed_weights, 1)

    def to_json(self) -> str:
        """The report as JSON text; `from_json` gives it back."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        """The inverse of `to_json`.

        Raises:
            ValueError: text that is no report.
        """
        try:
            return Report.model_validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"not a report: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


# --- a training as it goes ----------------------------------------------------------------------------------------


class History:
    """Follows how far the two lives of a run are apart: call `log` once an epoch and give it to `collect`.

    Args:
        run: from `attach`.
        path: file of JSON lines to add to, so that a training that is cut off leaves what it had; None for none.

    Example:
        >>> import detent as dt
        >>> model = nn.Linear(8, 8)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.PSG())])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> history = History(dt.attach(model, optimizer, recipe, total_steps=9))
        >>> history.log(accuracy=12.5).scores
        {'accuracy': 12.5}
        >>> [moment.step for moment in history.moments]
        [0]
    """

    def __init__(self, run: Run, path: str | os.PathLike[str] | None = None) -> None:
        self.run, self.path = run, None if path is None else Path(path)
        self.moments: list[Moment] = []

    def log(self, **scores: float) -> Moment:
        """Measure the run as it is now (`run.measure()`: one projection of every claimed tensor).

        Args:
            scores: what else to keep of this moment, by name; NaN and infinity are kept as None.

        Example:
            >>> import detent as dt
            >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Binary())]))
            >>> moment = History(run).log(loss=0.5)
            >>> moment.step, sorted(moment.layers), moment.scores
            (0, ['weight'], {'loss': 0.5})
        """
        rows = self.run.measure()
        weights = [row["weights"] for row in rows]
        stepped = [(row["distance"], row["weights"]) for row in rows if not math.isnan(row["distance"])]
        moment = Moment(
            step=self.run.clock,
            error=_mean([row["error"] for row in rows], weights),
            distance=_mean(*zip(*stepped, strict=True)) if stepped else None,
            layers={row["name"]: row["error"] for row in rows},
            scores={**scores},
        )
        self.moments.append(moment)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(moment.model_dump_json() + "\n")
        return moment

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[Moment]:
        """The moments in a file of JSON lines that a `History` wrote.

        Raises:
            ValueError: a line that is no moment, with its number.
            OSError: the file cannot be read.
        """
        found = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(Moment.model_validate_json(line))
            except pydantic.ValidationError:
                raise ValueError(f"history={os.fspath(path)!r}: line {number} is not a line of History.log") from None
        return found


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * n for v, n in zip(values, weights, strict=True)) / max(sum(weights), 1)


# --- one tensor ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One compressed tensor as it is needed here: both lives, and where the compressed one lies."""

    name: str
    full: Tensor | None
    compressed: Tensor
    cell: Tensor | None

    @staticmethod
    def of(name: str, full: Tensor | None, item: Encoded) -> Piece:
        return Piece(name=name, full=full, compressed=item.decode(), cell=item.form.cell)


def layer_of(piece: Piece, mechanism: str, coded: Mapping[str, Any], packed: Mapping[str, Any]) -> Layer:
    """Everything about one tensor that needs no data, with its rows of the two files."""
    w, q, cell = piece.full, piece.compressed, piece.cell
    error = wasserstein = distance = None
    if w is not None:
        error, wasserstein, _ = distances(w, q)
        distance = None if cell is None else float(((w.double() - q.double()).abs() / cell.double()).mean())
    return Layer(
        name=piece.name,
        shape=tuple(q.shape),
        dtype=str(q.dtype).removeprefix("torch."),
        weights=q.numel(),
        becomes=coded["becomes"],
        mechanism=mechanism,
        bits=packed["bits_per_weight"],
        coded_bits=coded["bits_per_weight"],
        entropy=coded["entropy_bits"] / q.numel(),
        zeros=float((q == 0).double().mean()),
        error=error,
        wasserstein=wasserstein,
        distance=distance,
        histogram=_histogram(w, q, cell),
    )


_MANY = 64  # more levels than this are a haze in a picture, not places


def _histogram(w: Tensor | None, q: Tensor, cell: Tensor | None) -> Histogram:
    unit = 1.0 if cell is None else cell.double()
    places = (q.double() / unit).reshape(-1)
    spread = None if w is None else (w.double() / unit).reshape(-1)
    levels = places.round(decimals=4).unique() if cell is not None else places.unique()
    levels = levels if len(levels) <= _MANY else levels.new_zeros(0)
    edge, bins = _edges(places, spread, cell is not None)

    def shares(values: Tensor) -> tuple[float, ...]:
        counts = torch.histc(values.clamp(-edge, edge) if values is places else values, bins, -edge, edge)
        return tuple(round(share, 6) for share in (counts / values.numel()).tolist())

    return Histogram(
        unit="value" if cell is None else "steps",
        low=-edge,
        high=edge,
        full=() if spread is None else shares(spread),
        compressed=shares(places),
        levels=tuple(levels.tolist()),
        outside=0.0 if spread is None else float((spread.abs() > edge).double().mean()),
    )


def _edges(places: Tensor, spread: Tensor | None, stepped: bool) -> tuple[float, int]:
    """Half the width of the picture, and an odd number of bins, so that zero lies in the middle of one."""
    reach = float(places.abs().max())
    if spread is not None:
        rank = max(1, math.ceil(0.999 * spread.numel()))
        reach = max(reach, float(spread.abs().kthvalue(rank).values)) if not stepped else reach
    if not stepped:
        return 1.05 * reach or 1.0, _BINS
    edge = math.floor(reach) + 1.0
    a_step = max(1, round(_BINS / (2 * edge)))
    # Half a bin more on both sides puts the levels of a grid into the middle of their bins.
    bins = 2 * int(edge) * a_step + 1 if edge <= _BINS else _BINS
    return edge * bins / (bins - 1) if edge <= _BINS else edge, bins


# --- a whole run --------------------------------------------------------------------------------------------------


def collect(
    run: Run,
    *,
    evaluate: Evaluate | None = None,
    sensitivity: Evaluate | None = None,
    bits: Sequence[int] = WIDTHS,
    history: History | Sequence[Moment] = (),
    exports: Sequence[Export] = (),
    notes: Mapping[str, Any] | None = None,
    title: str = "",
    evaluated_on: str = "",
    sensitivity_on: str = "",
    watch: Watch = silent,
) -> Report:
    """Measure everything that a report shows; the run and its weights are as they were afterwards.

    Bytes are those of files that are really written (into a temporary folder). What is not passed is not invented: the
    report then says in words what to pass.

    Args:
        run: from `attach` or `compress`, on one process.
        evaluate: gives scores of the model it is called with, such as {"loss": 0.31, "accuracy": 91.2} (accuracy in
            percent); it puts the model in evaluation mode itself. Called for both lives and every width.
        sensitivity: gives {"loss": ...} on training data; called once a compressed tensor, with only that one
            compressed. Choosing bits by test data would be selection on it, so this is not `evaluate`.
        bits: widths to show the same checkpoint at.
        history: a `History`, or its moments.
        exports: exported models.
        notes: plain JSON data for the card: who, which data, how many epochs.
        title: heading; by default the class of the model.
        evaluated_on: in words, what `evaluate` measures on.
        sensitivity_on: in words, what `sensitivity` measures on.
        watch: called with a label and a number of steps when something long starts; what it returns is called each
            step.

    Raises:
        ValueError: scores that are no numbers, a sharded model, or notes that are not JSON.

    Example:
        >>> import detent as dt
        >>> run = dt.compress(nn.Linear(64, 64), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
        >>> report = collect(run, evaluate=lambda model: {"loss": float(model.weight.abs().sum())}, bits=(4, 2))
        >>> [width.label for width in report.widths], round(report.bits_per_weight("bitpacked"), 2)
        (['W4', 'W2'], 4.01)
    """
    if any(sharding._is_sharded(p) for p in run.model.parameters()):
        raise ValueError("collect(run=...): a sharded model; save it, load the file on one process and report that")
    named = named_parameters(run.model)
    pieces = [Piece.of(name, named[name].detach(), item) for name, item in run.encoded().items()]
    written = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "compressed.detent"
        for coding in CODINGS:
            save(run, file, "compressed", coding=coding, notes=notes)
            written[coding] = inspect(file)
        header = read_header(file)
    scores = {}
    if evaluate is not None:
        scores["full"] = scores_of(evaluate, run.model)
        with run.compressed():
            scores["compressed"] = scores_of(evaluate, run.model)
    widths, unfit = widths_of(run, evaluate, bits, watch) if evaluate is not None else ([], {})
    losses = {}
    if sensitivity is not None:
        alone = [(piece.name, piece.compressed) for piece in pieces]
        losses = sensitivities(run.model, alone, len(alone), sensitivity, watch)
    report = assemble(
        header=header,
        pieces=pieces,
        order=[claim.name for claim in run.plan.claims],
        raw=_bytes_of(run.model),
        written=written,
        scores=scores,
        widths=widths,
        unfit=unfit,
        losses=losses,
        history=tuple(history.moments if isinstance(history, History) else history),
        exports=tuple(exports),
        title=title or type(run.model).__name__,
        evaluated_on=evaluated_on,
        sensitivity_on=sensitivity_on,
    )
    # The file that was measured is gone, and held one life; what is reported has two.
    return report.model_copy(update={"card": report.card.model_copy(update={"lives": "run"})})


def _bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, tied ones once."""
    distinct = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def assemble(
    *,
    header: Header,
    pieces: Iterable[Piece],
    order: Sequence[str],
    losses: Mapping[str, float],
    widths: Sequence[Width],
    raw: int,
    written: Mapping[str, Inspection],
    both: int | None = None,
    **rest: Any,
) -> Report:
    """A report from what was measured; the pieces are looked at one at a time."""
    mechanisms = {row["parameter"]: row["mechanism"] for row in header.plan}
    rows = {coding: {row["name"]: row for row in found.rows} for coding, found in written.items()}
    layers = []
    for piece in pieces:
        name = piece.name
        layer = layer_of(piece, mechanisms[name], rows["entropy"][name], rows["bitpacked"][name])
        layers.append(layer.model_copy(update={"sensitivity": losses.get(name)}))
    place = {name: i for i, name in enumerate(order)}
    layers.sort(key=lambda layer: place[layer.name])
    card = card_of(header, order)
    if both is not None:  # what is weighed here are files of the compressed life alone
        card = card.model_copy(update={"lives": "both"})
    return Report(
        layers=tuple(layers),
        widths=tuple(widths),
        sizes=Sizes(raw=raw, parts={coding: _parts(found.total) for coding, found in written.items()}, both=both),
        card=card,
        **rest,
    )


def _parts(total: Mapping[str, Any]) -> dict[str, int]:
    """Where the bytes of a file with the compressed life alone are."""
    return {
        "file": total["file"],
        "header": total["header"],
        "coded": total["coded"]["bytes"],
        "index": total["coded"]["index_bytes"],
        "rest": total["raw"]["bytes"],
    }


def _absent(report: Report) -> dict[str, str]:
    """What to pass to get the sections that are missing."""
    line = "or `--model` and `--data` on the command line"
    evaluate, sensitivity = (
        f"`collect(evaluate=...)`, {line}",
        f"`collect(sensitivity=...)`, a loss on training data, {line}",
    )
    both = 'a file with both lives: `dt.save(run, path, life="both")`'
    has_both = any(layer.error is not None for layer in report.layers)
    if not has_both:  # one thing at a time where the rest was given
        sensitivity = both if report.scores else f"{both}; and {sensitivity}"
    if report.unfit:
        widths = f"other widths: {'; '.join(dict.fromkeys(report.unfit.values()))}"
    elif not report.scores:
        widths = evaluate if has_both else f"{both}; and {evaluate}"
    else:
        widths = "a recipe with a target that has a bit-width and is not pinned" if has_both else both
    wanted = {
        "scores": (report.scores, evaluate),
        "sensitivity": (any(layer.sensitivity is not None for layer in report.layers), sensitivity),
        "widths": (report.widths, widths),
        "history": (
            report.history,
            "`History(run)`, its `log()` once an epoch, and `collect(history=...)`, or `--history FILE` on the command "
            "line",
        ),
        "exports": (
            report.exports,
            "`collect(exports=...)`, or `--exported FILE` with what `detent export --json` said",
        ),
        "full": (has_both, both),
    }
    return {name: words for name, (there, words) in wanted.items() if not there}


def scores_of(evaluate: Evaluate, model: nn.Module) -> dict[str, float]:
    """What the user's function says of a model, checked.

    Raises:
        ValueError: anything but a mapping of numbers.
    """
    with torch.no_grad():
        found = evaluate(model)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"evaluate gave {found!r}: must give scores by name, such as {{'loss': 0.3, 'accuracy': 91.2}}"
        )
    scores = {str(name): float(value) for name, value in found.items()}
    bad = next((name for name, value in scores.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise ValueError(f"evaluate gave {bad}={scores[bad]}: must be finite")
    return scores


def widths_of(run: Run, evaluate: Evaluate, bits: Sequence[int], watch: Watch) -> tuple[list[Width], dict[str, str]]:
    """The same checkpoint at other widths, and why some are left out; none where no target has one that may change."""
    changing = [entry.target for entry in run._entries if entry.target.has_bits and not entry.rule.pinned]
    if not changing:
        return [], {}
    refusing = {width: next((t for t in changing if width not in t.widths), None) for width in bits}
    unfit = {f"W{width}": _widths_in_words(target) for width, target in refusing.items() if target is not None}
    advance = watch("widths", len(refusing) - len(unfit))
    found = []
    for width in (width for width, target in refusing.items() if target is None):
        with run._one_life(width), tempfile.TemporaryDirectory() as folder:
            with run.compressed(bits=width):
                scores = scores_of(evaluate, run.model)
            file = Path(folder) / "width.detent"
            written = {coding: save(run, file, "compressed", bits=width, coding=coding) for coding in CODINGS}
        found.append(Width(label=f"W{width}", bits=width, bytes=written, scores=scores))
        advance()
    return found, unfit


def _widths_in_words(target: Target) -> str:
    return f"{short(target)} can be {', '.join(map(str, target.widths))} bits wide"


def sensitivities(
    model: nn.Module, alone: Iterable[tuple[str, Tensor]], total: int, evaluate: Evaluate, watch: Watch
) -> dict[str, float]:
    """Loss with only one tensor compressed, minus the loss of the full life, for each tensor.

    Raises:
        ValueError: a function that gives no loss.
    """
    named = named_parameters(model)
    advance = watch("sensitivity", total)

    def loss() -> float:
        scores = scores_of(evaluate, model)
        if "loss" not in scores:
            raise ValueError(f"sensitivity gave {sorted(scores)}: must give a 'loss'")
        return scores["loss"]

    base, found = loss(), {}
    for name, value in alone:
        with _shown(named[name], value):
            found[name] = loss() - base
        advance()
    return found


@contextmanager
def _shown(param: Tensor, value: Tensor) -> Iterator[None]:
    """A parameter with another value, and bitwise its own at the end.

    Through `.data`, which does not count as a write: a run that the model belongs to would take it for somebody else's.
    """
    kept = param.detach().clone()
    param.data.copy_(value)
    try:
        yield
    finally:
        param.data.copy_(kept)
