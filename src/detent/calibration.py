"""Choosing the places of a model's weights in the metric of each layer's inputs, and moving biases after them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detent import sharding
from detent.batchnorm import Statistics, feed, matched, statistics_of
from detent.claimed import Entry
from detent.feedback import Chosen, Prior, choose_places
from detent.inputs import Aim, Enough, Seen, Watch, Weight, calm
from detent.parameters import canonical_name, named_parameters
from detent.plan import Claim
from detent.schedules import is_finite, is_whole
from detent.specs import short
from detent.targets import Params, Target

__all__ = ["Batches", "Calibrated", "Calibration", "Found", "How", "by_prior", "calibrated", "looked_up", "placed"]

_MOMENTS = 1 << 30  # bytes of moments held at a time, and those of one layer at least
_NAMED = 5  # tensors that a sentence names

Life = Sequence[tuple[Entry, Target, Params]]
Batches = Iterable[Any] | Literal["prior"]


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """One tensor whose places were chosen in the metric of its inputs.

    Attributes:
        name: the tensor.
        inputs: how many inputs it was seen with (positions of a convolution, tokens); 0 with a prior.
        plain: squared error of its outputs on those, had each weight gone to its nearest place, as a share of their
            squares.
        error: the same of the chosen places; never more.
    """

    name: str
    inputs: int
    plain: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibration did.

    Attributes:
        tensors: those whose places were chosen, in the order of their use.
        left: those that keep plain rounding, by name, and why.
        corrected: what was moved so that a layer's outputs keep their mean: a BatchNorm, which keeps their spread too,
            or a bias.
        uncorrected: weights whose outputs may have another mean, and why nothing corrects it.

    Example:
        >>> import detent as dt
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(8, 4)
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
        >>> row = dt.calibrate(run, [torch.randn(64, 8) @ torch.randn(8, 8)]).tensors[0]
        >>> row.name, row.inputs, row.error < row.plain
        ('weight', 64, True)
    """

    tensors: tuple[Calibrated, ...]
    left: Mapping[str, str]
    corrected: tuple[str, ...] = ()
    uncorrected: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [("tensor", "inputs", "plain rounding", "calibrated")]
        lines += [
            (t.name, f"{t.inputs:,}" if t.inputs else "prior", f"{t.plain:.3g}", f"{t.error:.3g}") for t in self.tensors
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        said = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        said += [f"{name}: plain rounding ({why})" for name, why in self.left.items()]
        said += [f"outputs corrected in {name}" for name in self.corrected]
        said += [f"{name}: outputs not corrected ({why})" for name, why in self.uncorrected.items()]
        return "\n".join(said)

    def warning(self) -> str:
        """What keeps plain rounding, in a sentence; empty if nothing does."""
        if not self.left:
            return ""
        named = [f"{name!r} ({why})" for name, why in self.left.items()]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        total = len(named) + len(self.tensors)
        return f"{len(named)} of {total} tensors keep plain rounding: {', '.join(named[:_NAMED])}{more}"


@dataclass(frozen=True, kw_only=True)
class How:
    """How to calibrate; `dt.calibrate` explains the fields.

    Raises:
        ValueError: a field out of its range.
    """

    order: Literal["sequential", "parallel"] = "sequential"
    drift: float = 0.5
    correct: bool = True
    damping: float = 0.01
    by_diagonal: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        if self.order not in ("sequential", "parallel"):
            raise ValueError(f'calibrate(order={self.order!r}): must be "sequential" or "parallel"')
        if not (is_finite(self.drift) and 0 <= self.drift <= 1):
            raise ValueError(f"calibrate(drift={self.drift!r}): must be a number from 0 to 1")
        if not (is_finite(self.damping) and self.damping > 0):
            raise ValueError(f"calibrate(damping={self.damping!r}): must be a finite number > 0")
        if not is_whole(self.block):
            raise ValueError(f"calibrate(block={self.block!r}): must be a whole number >= 1 of inputs")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found: a report, the places by name, and BatchNorm statistics if any mean was corrected."""

    report: Calibration
    places: dict[str, Tensor]
    statistics: Statistics | None


def calibrated(
    model: nn.Module,
    life: Life,
    full: Mapping[str, Tensor],
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None,
    how: How,
) -> Found:
    """Choose the places of a life; the model's weights and running means are written, and its caller puts them back.

    Args:
        model: the model, in its full life.
        life: the claimed tensors, what they lie on, and their fitted numbers.
        full: their full-precision weights, by name, which nobody writes.
        batches: inputs, on the model's device; kept in memory, as each layer has a pass of its own.
        forward: how to feed one, if `model(inputs)` is not it.
        how: how.

    Raises:
        ValueError: no batches, inputs that are NaN or infinite, a sharded model.
    """
    _refuse_sharded(life)
    given = list(batches)
    if not given:
        raise ValueError("calibrate: the loader gave no batches")
    with calm(model):
        return _Work(model, life, full, given, forward, how).found()


def by_prior(model: nn.Module, life: Life, full: Mapping[str, Tensor], how: How) -> Found:
    """Choose the places of a life in the metric that inputs are taken to have, with nothing fed to the model.

    Args:
        model: the model.
        life: the claimed tensors, what they lie on, and their fitted numbers.
        full: their full-precision weights, by name.
        how: only its block has a part in it.

    Raises:
        ValueError: a sharded model, or a switch that needs inputs.
    """
    if how != How(block=how.block):
        raise ValueError('calibrate(..., "prior"): feeds nothing, so it takes no switch but block=')
    _refuse_sharded(life)
    tables = looked_up(model)
    places: dict[str, Tensor] = {}
    rows: list[Calibrated] = []
    left: dict[str, str] = {}
    for entry, target, params in life:
        if not entry.claim.is_weight:
            continue
        if why := _why_plain(entry.claim, target, params, tables):
            left[entry.name] = why
        else:
            chosen = _chosen(entry, target, params, full[entry.name], Prior(kernel=entry.claim.layout.kernel), how)
            places[entry.name] = chosen.places.to(full[entry.name].device)
            rows.append(_row(entry.name, 0, chosen))
    return Found(report=Calibration(tensors=tuple(rows), left=left), places=places, statistics=None)


def placed(claim: Claim, target: Target, params: Params, w: Tensor, tables: Collection[str]) -> Tensor:
    """One tensor on the places of a prior, or as it is, if it has no inputs or its weights move together."""
    if not claim.is_weight or _why_plain(claim, target, params, tables):
        return w
    return choose_places(w, target, params, Prior(kernel=claim.layout.kernel)).places


def _why_plain(claim: Claim, target: Target, params: Params, tables: Collection[str] = ()) -> str:
    """Why a weight keeps plain rounding, whatever its inputs are; empty if it need not."""
    if target.choice(params) is None:
        return f"{short(target)} moves weights together"
    return "" if {claim.name, *claim.aliases}.isdisjoint(tables) else "a table that is looked up"


def looked_up(model: nn.Module) -> set[str]:
    """Names of the tables whose rows are taken as they are: these have no inputs."""
    return {
        canonical_name(f"{name}.weight")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }


def _refuse_sharded(life: Life) -> None:
    for entry, _, _ in life:
        if sharding.rows_of(entry.param, entry.name) is not None:
            raise ValueError(f"calibrate: {entry.name!r} is sharded; calibrate in one process, before FSDP2 cuts it")


def _chosen(
    entry: Entry, target: Target, params: Params, w: Tensor, metric: Tensor | Prior, how: How, **aim: Any
) -> Chosen:
    """`choose_places` of one tensor, where float64 is."""
    device = (
        metric.device if isinstance(metric, Tensor) else torch.device("cpu") if w.device.type == "mps" else w.device
    )
    try:
        return choose_places(
            w.to(device),
            target,
            params.to(device),
            metric,
            held=None if entry.zeros is None else entry.zeros.to(device),
            damping=how.damping,
            by_diagonal=how.by_diagonal,
            block=how.block,
            **aim,
        )
    except ValueError as error:
        raise ValueError(f"calibrate: {entry.name!r}: {error}") from None


def _row(name: str, inputs: int, chosen: Chosen) -> Calibrated:
    scale = chosen.energy or 1.0
    return Calibrated(name=name, inputs=inputs, plain=chosen.plain / scale, error=chosen.error / scale)


class _Work:
    """One calibration."""

    def __init__(
        self,
        model: nn.Module,
        life: Life,
        full: Mapping[str, Tensor],
        batches: list[Any],
        forward: Callable[[Any], Any] | None,
        how: How,
    ) -> None:
        self._model, self._full, self._batches, self._forward, self._how = model, full, batches, forward, how
        self._life = {entry.name: (entry, target, params) for entry, target, params in life}
        self._statistics = statistics_of(model)
        self._own_statistics = {name: buffer.clone() for name, buffer in self._statistics.items()}
        unclaimed = {n: p.detach() for n, p in named_parameters(model).items() if n not in self._life}
        self._biases = {n: p for n, p in {**unclaimed, **full}.items() if n.endswith("bias")}
        self._now: dict[str, Tensor] = {}  # what the model has in place of its full-precision weights
        self._places: dict[str, Tensor] = {}
        self._rows: dict[str, Calibrated] = {}
        self._left: dict[str, str] = {}
        self._corrections: dict[str, Tensor] = {}  # running statistics, by name
        self._corrected: list[str] = []
        self._uncorrected: dict[str, str] = {}
        mine: list[Weight] = []
        for entry, target, params in life:
            if not entry.claim.is_weight:
                continue  # biases and gains have no inputs
            if why := _why_plain(entry.claim, target, params):
                self._left[entry.name] = why
            else:
                held = sharding.local(entry.param)
                mine.append(Weight(name=entry.name, tensor=held, layout=entry.claim.layout))
        self._weights = mine

    def found(self) -> Found:
        """Do it."""
        for name, (entry, _, _) in self._life.items():
            entry.write(self._full[name])  # of a latent the forward pass may see something else
        first, order = self._look()
        sequential = self._how.order == "sequential"
        if sequential:
            seen = {weight.name for weight in self._weights}
            for name, (entry, target, params) in self._life.items():
                if name not in seen:
                    self._now[name] = target.project(self._full[name], params)
                    entry.write(self._now[name])
        for turn in self._turns(first, order):
            watch = self._pass(wanted=turn, until=_first_after(turn, order), sequential=sequential)
            for name in turn:
                self._choose(name, first.seen[name], watch.seen[name], write=sequential)
                del watch.seen[name]
        report = Calibration(
            tensors=tuple(self._rows.values()),
            left=self._left,
            corrected=tuple(self._corrected),
            uncorrected=self._uncorrected,
        )
        statistics = None
        if self._corrections:
            statistics = Statistics({**self._own_statistics, **self._corrections})
            statistics.source = "corrected"
        return Found(report=report, places=self._places, statistics=statistics)

    def _pass(self, wanted: Collection[str], until: str | None, *, sequential: bool) -> Watch:
        """The inputs of some weights, and if they drift from those of the full-precision model, what to aim at."""
        # Others than the weight that ends the pass need not be looked at.
        mine = [weight for weight in self._weights if weight.name in wanted or weight.name == until]
        kept: list[Any] = [{} for _ in self._batches]
        aim = None
        if sequential and self._how.drift and self._now:
            self._show(compressed=False)
            look = Watch(mine, wanted=wanted, until=until, keep=True)
            for number, batch in enumerate(self._batches):
                self._feed(look, batch)
                kept[number], look.kept = look.kept, {}
            self._show(compressed=True)
            matrices = {name: self._life[name][0].claim.layout.by_channel(self._full[name]) for name in wanted}
            aim = Aim(matrices=matrices, share=self._how.drift)
        watch = Watch(mine, wanted=wanted, sums=self._how.correct, until=until, aim=aim)
        for batch, partners in zip(self._batches, kept, strict=True):
            watch.begin(partners)
            self._feed(watch, batch)
        return watch

    def _show(self, *, compressed: bool) -> None:
        """Let the model have its full-precision weights and means, or what of them was chosen by now."""
        for name, places in self._now.items():
            self._life[name][0].write(places if compressed else self._full[name])
        for name, mean in self._corrections.items():
            self._statistics[name].copy_(mean if compressed else self._own_statistics[name])

    def _feed(self, watch: Watch, batch: Any) -> None:
        try:
            with watch:
                feed(self._model, batch, self._forward, "calibrate")
        except Enough:
            pass

    def _look(self) -> tuple[Watch, list[list[tuple[str, int]]]]:
        """A first pass in full precision: which weights can be seen, and in what order each batch uses them."""
        norms = {name: mean for name, mean in self._statistics.items() if name.endswith("running_mean")}
        outputs = {w.name: w.layout.by_channel(self._full[w.name]) for w in self._weights} if self._how.correct else {}
        watch = Watch(self._weights, outputs=outputs, norms=norms)
        order = []
        for batch in self._batches:
            self._feed(watch, batch)
            order.append(watch.uses)
            watch.uses = []
        for weight in self._weights:
            seen = watch.seen[weight.name]
            if seen.otherwise or not seen.rows:
                self._left[weight.name] = seen.otherwise or "no batch used it"
        self._weights = [weight for weight in self._weights if weight.name not in self._left]
        return watch, [[use for use in uses if use[0] not in self._left] for uses in order]

    def _turns(self, first: Watch, order: list[list[tuple[str, int]]]) -> list[list[str]]:
        """The weights by passes: those that take one tensor together, or in parallel as many as memory allows."""
        turns: list[list[str]] = []
        known: set[str] = set()
        last, room = -1, 0
        for name, number in (use for uses in order for use in uses):
            if name in known:
                continue
            known.add(name)
            layout = self._life[name][0].claim.layout
            size = 8 * (layout.numel // layout.channels) ** 2 * (layout.channels // first.seen[name].rows)
            together = size <= room if self._how.order == "parallel" else number == last
            if together:
                turns[-1].append(name)
            else:
                turns.append([name])
                room = _MOMENTS
            last, room = number, room - size
        return turns

    def _choose(self, name: str, before: Seen, seen: Seen, *, write: bool) -> None:
        entry, target, params = self._life[name]
        w, layout = self._full[name], entry.claim.layout
        parts, inputs = layout.channels // before.rows, layout.numel // layout.channels
        some = next(iter(seen.moments.values()), w)
        moment = torch.zeros(parts, inputs, inputs, dtype=torch.float64, device=some.device)
        for row in list(seen.moments):
            moment[row // before.rows] = seen.moments.pop(row)
        cross = torch.cat([seen.crosses[row] for row in sorted(seen.crosses)]) if seen.crosses else None
        if not bool(torch.isfinite(moment).all()):
            raise ValueError(f"calibrate: the inputs of {name!r} are NaN or infinite, or their squares are")
        chosen = _chosen(entry, target, params, w, moment, self._how, cross=cross, energy=seen.energy)
        places = chosen.places.to(w.device)
        self._rows[name] = _row(name, sum(seen.counts.values()), chosen)
        self._place(name, places, write=write)
        if self._how.correct:
            full = torch.zeros(2, layout.channels, dtype=torch.float64, device=moment.device)
            for row, sums in before.outputs.items():
                full[:, row : row + before.rows] = sums / before.counts[row]
            now = _outputs(layout.by_channel(chosen.places).double(), moment, before.rows, seen)
            self._correct(name, _spread(full), _spread(now), before.follower, write=write)

    def _correct(self, name: str, full: Tensor, now: Tensor, follower: str | None, *, write: bool) -> None:
        """Keep the outputs of a layer where they were, from the means and variances of `W x`, (2, channels)."""
        bias = next((b for b in (f"{name.removesuffix('weight')}bias", f"{name}_bias") if b in self._biases), None)
        bias = None if bias is None or self._biases[bias].numel() != full.shape[1] else bias
        if follower and follower in self._corrections:
            self._uncorrected[name] = "its BatchNorm takes another layer too"
        elif follower:
            if bias is not None:  # it is part of what the BatchNorm takes
                full[0] += self._biases[bias].reshape(-1).to(full)
                now[0] += self._compressed(bias).reshape(-1).to(now)
            found = matched(self._model, follower, full, now, self._own_statistics)
            self._corrections |= found
            self._corrected.append(follower.rpartition(".")[0] or "running statistics")
            if write:
                for each, value in found.items():
                    self._statistics[each].copy_(value)
        elif bias is None or bias not in self._life or bias in self._places:
            self._uncorrected[name] = (
                "no BatchNorm follows it, and the recipe claims no bias of it: name it in include="
            )
        else:
            _, target, params = self._life[bias]
            own = self._full[bias]
            moved = own.double() + (full[0] - now[0]).to(own.device).reshape(own.shape)
            self._corrected.append(bias)
            self._place(bias, target.project(moved.to(own.dtype), params), write=write)

    def _compressed(self, name: str) -> Tensor:
        """A bias in the compressed life."""
        if name in self._places or name not in self._life:
            return self._places.get(name, self._biases[name])
        _, target, params = self._life[name]
        return target.project(self._full[name], params)

    def _place(self, name: str, places: Tensor, *, write: bool) -> None:
        self._places[name] = places
        if write:
            self._now[name] = places
            self._life[name][0].write(places)


def _spread(moments: Tensor) -> Tensor:
    """Means and variances from means and means of squares."""
    return torch.stack([moments[0], (moments[1] - moments[0].square()).clamp_min(0.0)])


def _outputs(matrix: Tensor, moment: Tensor, rows: int, seen: Seen) -> Tensor:
    """Means of the outputs of a matrix and of their squares, (2, channels); 0 where no input came."""
    found = torch.zeros(2, len(matrix), dtype=torch.float64, device=matrix.device)
    for row, total in seen.sums.items():
        mine = matrix[row : row + rows]
        found[0, row : row + rows] = mine @ total / seen.counts[row]
        found[1, row : row + rows] = (mine @ moment[row // rows] * mine).sum(dim=1) / seen.counts[row]
    return found


def _first_after(turn: Sequence[str], order: list[list[tuple[str, int]]]) -> str | None:
    """A weight that no batch uses before it has made its last use of those of a turn: there a pass may end."""
    mine, candidates = set(turn), dict[str, None]()
    refused: set[str] = set()
    for uses in order:
        last = max((i for i, (name, _) in enumerate(uses) if name in mine), default=-1)
        refused |= {name for name, _ in uses[: last + 1]}
        candidates |= dict.fromkeys(name for name, _ in uses[last + 1 :])
    return next((name for name in candidates if name not in refused), None)
