"""A recipe whose file fits into a number of bytes: one step for all weights, or a target for every tensor."""

from __future__ import annotations

import copy
import heapq
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detent.amounts import Budget, budget_bytes
from detent.calibration import Batches
from detent.compression import Compressed, compress, filled, guesses
from detent.engine import Run
from detent.mechanisms import Mechanism
from detent.pack import Checkpoint, Coding, inspect, save
from detent.pack.loading import Rename
from detent.parameters import canonical_name, refuse_no_model
from detent.plan import Claim
from detent.recipe import Recipe, Rule
from detent.schedules import is_finite
from detent.targets import Round, Target, Uniform, UniformStep
from detent.targets.rate import entropy_at, step_at_rate

__all__ = ["Choices", "allocate", "compress_to_budget", "fisher"]

Choices = Literal["step", "widths"] | Sequence[Target]

_TRIES = 12  # files that are written to find a step
_CLOSE = 1e-3  # share of the budget that may be left over
_FED, _NEAR = 4, 4e-3  # the same two where each try is a calibration, which takes its time
_SLACK = 0.99  # of the rate in training: the coder's gains and losses move with the weights
_WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def allocate(
    model: nn.Module | Run,
    budget: Budget,
    *,
    choices: Choices = "step",
    importance: Mapping[str, Tensor | float] | None = None,
    loss: Callable[[nn.Module], float] | None = None,
    calibration: Batches | None = None,
    mechanism: Mechanism | None = None,
    rules: Recipe | None = None,
    example: Any = None,
) -> Recipe:
    """The recipe whose compressed file fits a budget with the least error: bits go where they buy most.

        minimise  sum_i h_i (w_i - q_i)^2    subject to    bytes of the whole file <= budget

    Prices are what the entropy coder writes, header, biases, normalisation weights and BatchNorm's statistics included;
    the latter three go on 16 bits. With `choices="step"` that minimum has one step for the whole model (a step a tensor
    in proportion to `h^(-1/2)`, given an importance); among targets it is found on the convex hulls of error against
    bytes with one multiplier for all tensors, and filled up greedily. Data-free unless `importance` or `loss` say more.

    Args:
        model: a trained model; or a run, whose trained weights (latents, where a mechanism keeps some) are then given
            another compressed life: `run.compressed(recipe=...)`, `save(run, path, recipe=...)`.
        budget: bytes of the file: a number, "84 kB" (1000 bytes), "84 KiB" (1024), "20x" smaller than the model's
            tensors are, or "3.2 bits" a parameter.
        choices: "step": `UniformStep`, for files. "widths": `Uniform` of 2 to 8 bits a channel, for hardware. Or
            targets, of which each tensor gets one.
        importance: by parameter, how much a squared error of its weights costs: a number, or a tensor of its shape
            (`fisher`); >= 0. `None`: 1 for all.
        loss: measures the error instead: called with the model, one tensor of which is compressed, for every tensor and
            choice; not with `choices="step"`.
        calibration: what the places will be chosen with, as for `compress`: batches of inputs, which are read once, or
            "prior". Such codes take another number of bytes than those of the nearest places, by a percent or more, so
            they are what is counted; errors that choose among targets are still those of nearest places. Then
            `compress(model, recipe, calibration=...)` with the same gives the file that was counted.
        mechanism: for training under the budget, with `choices="step"`: rules for `attach`, which hold the *rate* of
            the codes, so that the step follows the weights. What training leaves is then allocated once more:
            `save(run, path, life="compressed", recipe=allocate(run, budget), budget=budget)`.
        rules: rules that go before: layers that are kept, or have a target of their own.
        example: as for `Recipe.resolve`.

    Returns:
        The recipe, for `compress`, `attach` (give its rules a mechanism) or YAML. `save(..., budget=...)` holds the
        file to it.

    Raises:
        ValueError: no budget, or one that nothing fits, with the bytes of the smallest file; an importance or a choice
            that fits no parameter.

    Example:
        >>> import detent as dt
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> recipe = allocate(model, "20 kB")
        >>> run = dt.compress(model, recipe)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = dt.save(run, f"{folder}/model.detent", life="compressed", budget="20 kB")
        >>> 19_500 < size <= 20_000
        True

    Reference: Shannon's rate-distortion theory, with Gish and Pierce, "Asymptotically efficient quantizing", 1968, for
    the step; Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988, for the hulls.
    """
    if isinstance(model, Run):
        with model.latents():
            model = copy.deepcopy(model.model)
    refuse_no_model(model, "allocate")
    if mechanism is not None and choices != "step":
        raise ValueError('allocate(mechanism=...): trains with choices="step"; give the rules of others one yourself')
    if mechanism is not None and calibration is not None:
        raise ValueError(
            "allocate(mechanism=..., calibration=...): calibrate what training leaves; give one of the two"
        )
    task = _Task.of(model, budget, rules, example, calibration)
    found = _allocated(task, choices, _importance(importance, task), loss).recipe
    return found if mechanism is None else _to_train(task, found, mechanism, rules)


def _allocated(
    task: _Task, choices: Choices, importance: Mapping[str, Tensor], loss: Callable[[nn.Module], float] | None
) -> _Try:
    if isinstance(choices, str):
        if choices not in ("step", "widths"):
            raise ValueError(f'allocate(choices={choices!r}): must be "step", "widths" or a list of targets')
        if choices == "step":
            if loss is not None:
                raise ValueError('allocate(choices="step", loss=...): a loss chooses among targets; give importance=')
            return _one_step(task, importance)
        choices = [Uniform(bits=bits, granularity="channel") for bits in _WIDTHS]
    if not choices or not all(isinstance(each, Target) for each in choices):
        raise ValueError('allocate(choices=...): must be "step", "widths" or a list of targets, at least one')
    return _among(task, list(choices), importance, loss)


def compress_to_budget(
    source: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    budget: Budget,
    *,
    choices: Choices = "step",
    calibration: Batches | None = "prior",
    coding: Coding | None = None,
    model: nn.Module | None = None,
    rename: Rename | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Compressed:
    """Compress a state dict on disk into a file of at most so many bytes, without training. It is held in memory.

    Args:
        source: a safetensors file, a folder of shards with their index, or the index.
        out: the file to write; no file of the source.
        budget: as for `allocate`.
        choices: as for `allocate`.
        calibration: as for `allocate`: "prior", which needs no data; batches of inputs, with `model`; or `None` for the
            nearest places.
        coding: as for `save`.
        model: for what names and shapes do not say, as for `compress_state_dict`; it is given the weights.
        rename: as for `compress_state_dict`.
        notes: plain JSON data to keep with the file.

    Raises:
        ValueError: as for `allocate` and `compress_state_dict`.
        OSError: a file cannot be opened or written.

    Example:
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.randn(64, 64)}, f"{folder}/w.safetensors")
        ...     made = compress_to_budget(f"{folder}/w.safetensors", f"{folder}/w.detent", "2 kB")
        >>> 1950 < made.bytes <= 2000
        True
    """
    if not isinstance(source, Checkpoint):
        with Checkpoint(source) as weights:
            return compress_to_budget(
                weights,
                out,
                budget,
                choices=choices,
                calibration=calibration,
                coding=coding,
                model=model,
                rename=rename,
                notes=notes,
            )
    if any(Path(out).resolve() == file.resolve() for file in source.files):
        raise ValueError(f"compress_to_budget(out={str(out)!r}): is a file of the state dict; give another name")
    if model is None and not (calibration is None or isinstance(calibration, str)):
        raise ValueError("compress_to_budget(calibration=...): inputs go with model=, which is run on them")
    net = filled(source, model, rename)
    task = _Task.of(net, budget, calibration=calibration, coding=coding, notes=notes)
    made = _allocated(task, choices, _importance(None, task), None)
    for warning in made.said:
        warnings.warn(warning, stacklevel=2)
    run = made.run
    written = save(run, out, life="compressed", coding=coding, notes=notes, budget=budget)
    own = dict(net.named_parameters())
    lost = energy = 0.0
    for name, item in run.encoded().items():
        w = own[name].detach().double()
        lost += float((item.decode().double() - w).square().sum())
        energy += float(w.square().sum())
    coded = inspect(out).total["coded"]
    return Compressed(
        file=str(out),
        bytes=written,
        raw_bytes=sum(t.numel() * t.itemsize for t in (*net.parameters(), *net.buffers())),
        weights=sum(p.numel() for p in net.parameters()),
        compressed_weights=coded["weights"],
        nominal_bits=coded["nominal_bits"] / max(coded["weights"], 1),
        bits_per_weight=8 * coded["bytes"] / max(coded["weights"], 1),
        error=lost / (energy or 1.0),
        notes=(*_chosen_by(calibration, run), *(guesses(run.plan) if model is None else ())),
    )


def _chosen_by(calibration: Batches | None, run: Run) -> list[str]:
    """What a user should know of how places were chosen, in sentences."""
    if calibration is None or run.calibration is None:
        return []
    if isinstance(calibration, str):
        return ["Places were chosen without data, by a prior of what inputs are like, so that errors cancel."]
    left, number = run.calibration.warning(), len(run.calibration.tensors)
    said = f"Places of {number} tensors were chosen with the inputs given, so that outputs change least"
    return [f"{said}; {left}." if left else f"{said}."]


# --- what is to be allocated, and what a file of it takes ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Task:
    model: nn.Module
    budget: int
    first: tuple[Rule, ...]
    claims: tuple[Claim, ...]
    example: Any
    calibration: Batches | None
    form: Mapping[str, Any]  # what else `save` is told

    @classmethod
    def of(
        cls,
        model: nn.Module,
        budget: Budget,
        rules: Recipe | None = None,
        example: Any = None,
        calibration: Batches | None = None,
        **form: Any,
    ) -> _Task:
        first = () if rules is None else tuple(rules.without_mechanisms().rules)
        free = Recipe([*first, Rule(match="@weights", target=UniformStep(step=1.0, bits=2))])
        plan = free.resolve(model, example=example)
        claims = tuple(claim for claim in plan.claimed if claim.rule == len(first))
        return cls(
            model=model,
            budget=budget_bytes(budget, model, "allocate"),
            first=first,
            claims=claims,
            example=example,
            calibration=calibration if calibration is None or isinstance(calibration, str) else list(calibration),
            form=form,
        )

    def weights(self) -> dict[str, Tensor]:
        """The tensors that are to be given a target."""
        named = {canonical_name(name): p for name, p in self.model.named_parameters(remove_duplicate=False)}
        return {claim.name: named[claim.name].detach() for claim in self.claims}

    @property
    def is_wide(self) -> bool:
        """Whether weights have 32 bits, so that no level is lost in their dtype."""
        return all(claim.dtype.itemsize >= 4 for claim in self.claims)

    def recipe(self, given: Sequence[Rule]) -> Recipe:
        """The user's rules, what was allocated, and 16 bits for whatever has no levels."""
        largest = max((float(p.detach().abs().max()) for p in self.model.parameters() if p.numel()), default=0.0)
        rest = Round(dtype="float16" if largest <= torch.finfo(torch.float16).max else "bfloat16")
        return Recipe([*self.first, *given, Rule(match=".", include=".", target=rest, optional=True)])

    def made(self, recipe: Recipe, calibration: Batches | None) -> _Try:
        """The compressed file, counted."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")  # nobody has chosen this try yet
            run = compress(self.model, recipe, example=self.example, calibration=calibration)
            size = save(run, Path(folder) / "try.detent", life="compressed", budget=1 << 62, **self.form)
        return _Try(recipe=recipe, run=run, size=size, said=tuple(str(warning.message) for warning in said))

    def too_small(self, least: int) -> ValueError:
        return ValueError(
            f"allocate(budget=...): {self.budget:,} bytes are {least - self.budget:,} too few; the smallest file of "
            f"these choices has {least:,}"
        )


@dataclass(frozen=True, kw_only=True)
class _Try:
    """A recipe, what it makes of the model, the bytes of the compressed file, and what was warned of."""

    recipe: Recipe
    run: Run
    size: int
    said: tuple[str, ...]


def _importance(given: Mapping[str, Tensor | float] | None, task: _Task) -> dict[str, Tensor]:
    """One tensor a claimed weight, of its shape or a scalar."""
    given = {} if given is None else {canonical_name(name): value for name, value in given.items()}
    known = {canonical_name(name) for name, _ in task.model.named_parameters(remove_duplicate=False)}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"allocate(importance=...): {unknown[0]!r} is no parameter of the model")
    found = {}
    for claim in task.claims:
        value = torch.as_tensor(given.get(claim.name, 1.0)).detach().double().cpu()
        if value.dim() and tuple(value.shape) != claim.layout.shape:
            raise ValueError(
                f"allocate(importance=...): {claim.name!r} has shape {claim.layout.shape}, its importance "
                f"{tuple(value.shape)}; give a number or a tensor of that shape"
            )
        if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise ValueError(f"allocate(importance=...): that of {claim.name!r} must be finite and >= 0")
        found[claim.name] = value
    if given and not any(bool(value.any()) for value in found.values()):
        raise ValueError("allocate(importance=...): all of it is 0, so nothing is worth a bit")
    return found


def fisher(model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information: the mean square of the gradient, batch by batch.

        h = mean over batches of (d loss / d w)^2

    Args:
        model: a trained model; it is left as it is, and runs in the mode it is in.
        batches: what `loss` takes, one batch at a time; smaller batches come nearer to the information of an example.
        loss: gives the loss of the model on a batch.

    Returns:
        By parameter, a tensor of its shape, for `allocate(importance=...)`.

    Raises:
        ValueError: no batches, or a loss that no parameter has a part in.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> batches = [torch.randn(8, 4) for _ in range(3)]
        >>> sorted(fisher(model, batches, lambda net, x: net(x).square().mean()))
        ['bias', 'weight']

    Reference: LeCun et al., "Optimal Brain Damage", 1989; Theis et al., "Faster gaze prediction with dense networks and
    Fisher pruning", arXiv 1801.05787.
    """
    refuse_no_model(model, "fisher")
    named = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64, device="cpu") for name, p in named.items()}
    count = 0
    for batch in batches:
        grads = torch.autograd.grad(loss(model, batch), list(named.values()), allow_unused=True)
        if all(grad is None for grad in grads):
            raise ValueError("fisher(loss=...): no parameter has a part in it")
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                total[name] += grad.detach().double().square().cpu()
        count += 1
    if not count:
        raise ValueError("fisher(batches=...): there were none")
    return {name: value / count for name, value in total.items()}


# --- one step -----------------------------------------------------------------------------------------------------


def _one_step(task: _Task, importance: Mapping[str, Tensor]) -> _Try:
    """By the secant in log2(step) against bytes, which is nearly a line; every size is of a file that was written."""
    weights = task.weights()
    means = {name: float(h.mean()) for name, h in importance.items()}
    typical = sum(means[n] * w.numel() for n, w in weights.items()) / sum(w.numel() for w in weights.values())
    shares = {n: math.sqrt(typical / max(mean, 1e-6 * typical)) for n, mean in means.items()}
    moves = task.calibration is not None

    def recipe(step: float) -> Recipe:
        return task.recipe(_step_rules({name: step * share for name, share in shares.items()}, weights, moves=moves))

    scaled = [weights[name].float() / share for name, share in shares.items()]
    largest = max(float(w.abs().max()) for w in scaled)
    count = sum(w.numel() for w in scaled)
    # So coarse that no error that is handed on comes to half a step.
    coarse = 4 * (largest or 1.0) * max(claim.layout.numel // claim.layout.channels for claim in task.claims)
    least = task.made(recipe(coarse), None)
    if least.size > task.budget:
        raise task.too_small(least.size)
    if largest == 0:
        return least
    rate = 8 * (task.budget - least.size) / count
    step = step_at_rate(scaled, min(max(rate, 1e-3), 15.0), 0.5, 2**15 - 1)
    slope = -count / 8 * min(max(rate, 0.25), 1.0)  # bytes for twice the step: a bit a weight, or less
    narrowest = largest / (2**15 - 1)
    search = _Search(task=task, recipe=recipe, widest=coarse, narrowest=narrowest)
    found = search.from_step(step, slope, None, tries=_TRIES, close=_CLOSE)
    if task.calibration is not None:
        fed = not isinstance(task.calibration, str)
        tries, close = (_FED, _NEAR) if fed else (_TRIES, 2 * _CLOSE)
        found = search.from_step(found.step, found.slope, task.calibration, tries=tries, close=close)
    return found.best or least


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Where a search ended: the best that fits, if anything did, its step, and bytes for twice the step."""

    best: _Try | None
    step: float
    slope: float


@dataclass(frozen=True, kw_only=True)
class _Search:
    """For the narrowest step whose file fits."""

    task: _Task
    recipe: Callable[[float], Recipe]
    widest: float
    narrowest: float

    def from_step(self, step: float, slope: float, calibration: Batches | None, *, tries: int, close: float) -> _Found:
        """Until the file fits and leaves less than a share `close` of the budget, and on until it fits.

        Args:
            step: to begin with.
            slope: what bytes for twice the step are taken to be at first, < 0.
            calibration: what places are chosen with.
            tries: files to write, if one of them fits.
            close: in (0, 1).
        """
        budget, best, last = self.task.budget, None, None
        fits, over = self.widest, 0.0  # the narrowest step known to fit, and the widest known not to
        for number in range(_TRIES):
            made = self.task.made(self.recipe(step), calibration)
            if made.size <= budget:
                best, fits = made, step
                if budget - made.size <= close * budget:
                    break
            else:
                over = step
            if best is not None and number + 1 >= tries:
                break
            at = math.log2(step)
            if last is not None and last[0] != at:
                slope = min((made.size - last[1]) / (at - last[0]), slope / 4)
            last = (at, made.size)
            guess = 2 ** (at + (budget * (1 - close / 3) - made.size) / slope)
            if not over < guess < fits:
                guess = math.sqrt(over * fits) if over else fits / 2
            if guess < self.narrowest or (over and fits / over < 1 + 1e-5):
                break
            step = guess
        return _Found(best=best, step=fits if best is not None else step, slope=slope)


def _step_rules(steps: Mapping[str, float], weights: Mapping[str, Tensor], *, moves: bool) -> list[Rule]:
    """One rule for all where all have one step; with room for weights that move, if they do."""
    targets = {
        name: UniformStep(step=step, bits=_bits_for(weights[name], step, int(moves))) for name, step in steps.items()
    }
    if len(set(steps.values())) == 1 and all(w.dtype.itemsize >= 4 for w in weights.values()):
        bits = max(target.bits for target in targets.values())
        return [Rule(match="@weights", target=UniformStep(step=next(iter(steps.values())), bits=bits))]
    return _grouped(targets)


def _to_train(task: _Task, found: Recipe, mechanism: Mechanism, rules: Recipe | None) -> Recipe:
    """One rule that holds the rate of a recipe whose step is right for the weights as they are."""
    targets = [rule.target for rule in found.rules if isinstance(rule.target, UniformStep)]
    steps = {target.step for target in targets}
    if len(steps) != 1:
        raise ValueError("allocate(mechanism=..., importance=...): training has one step; leave importance out")
    step = steps.pop()
    assert step is not None
    rate = _SLACK * entropy_at(list(task.weights().values()), step, 0.5, 2**15 - 1)
    bits = max(8, *(target.bits for target in targets)) if task.is_wide else targets[0].bits
    target = UniformStep(rate=rate, over="model", bits=bits)
    first = () if rules is None else rules.rules
    return Recipe([*first, Rule(match="@weights", target=target, mechanism=mechanism)])


def _bits_for(w: Tensor, step: float, room: int) -> int:
    """The narrowest width that clips nothing, `room` steps farther, as far as the dtype tells levels apart."""
    most = math.ceil(float(w.abs().max()) / step) + room
    widest = {torch.bfloat16: 8, torch.float16: 11}.get(w.dtype, 16)
    return min(max(2, (2 * most + 1).bit_length()), widest)


def _grouped(targets: Mapping[str, Target]) -> list[Rule]:
    """One rule a target, for the tensors that have it."""
    names: dict[Target, list[str]] = {}
    for name, target in targets.items():
        names.setdefault(target, []).append(name)
    return [
        Rule(match=f"^({'|'.join(map(re.escape, mine))})$", target=target, include=".")
        for target, mine in names.items()
    ]


# --- among targets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Option:
    """What a tensor may become: `size` bytes of its own, for an error."""

    target: Target
    size: int
    error: float


def _among(
    task: _Task,
    choices: list[Target],
    importance: Mapping[str, Tensor],
    loss: Callable[[nn.Module], float] | None,
) -> _Try:
    options = _options(task, choices, importance, loss)
    smallest = {name: min(mine, key=lambda o: (o.size, o.error)) for name, mine in options.items()}
    room = task.budget
    for _ in range(_TRIES):
        taken = _filled(options, smallest, room)
        made = task.made(
            task.recipe(_grouped({name: option.target for name, option in taken.items()})), task.calibration
        )
        if made.size <= task.budget:
            return made
        if taken == smallest:
            raise task.too_small(made.size)
        # What is no tensor's own (the header, codebooks that are shared) is known only once all have been chosen.
        own = sum(option.size for option in taken.values())
        room = min(room - 1, own - (made.size - task.budget))
    least = task.recipe(_grouped({name: option.target for name, option in smallest.items()}))
    raise task.too_small(task.made(least, task.calibration).size)


def _filled(options: Mapping[str, list[_Option]], smallest: Mapping[str, _Option], room: int) -> dict[str, _Option]:
    """Steepest segments of the convex hulls first, as long as they fit; then whatever else still does."""
    taken = dict(smallest)
    left = room - sum(option.size for option in taken.values())
    ways = {name: _hull(mine, smallest[name]) for name, mine in options.items()}
    queue = [_segment(name, smallest[name], way, 0) for name, way in ways.items() if way]
    heapq.heapify(queue)
    while queue:
        _, name, at = heapq.heappop(queue)
        option, way = ways[name][at], ways[name]
        if (more := option.size - taken[name].size) > left:
            continue
        taken[name], left = option, left - more
        if at + 1 < len(way):
            heapq.heappush(queue, _segment(name, option, way, at + 1))
    gains = [
        ((taken[name].error - option.error) / (option.size - taken[name].size), name, option.size, option)
        for name, mine in options.items()
        for option in mine
        if option.size > taken[name].size and option.error < taken[name].error
    ]
    for _, name, _, option in sorted(gains, key=lambda gain: (-gain[0], gain[1], gain[2])):
        if option.error < taken[name].error and option.size - taken[name].size <= left:
            left -= option.size - taken[name].size
            taken[name] = option
    return taken


def _segment(name: str, old: _Option, way: Sequence[_Option], at: int) -> tuple[float, str, int]:
    return ((way[at].error - old.error) / (way[at].size - old.size), name, at)


def _hull(options: Sequence[_Option], first: _Option) -> list[_Option]:
    """The lower convex hull of error against bytes, from the smallest on and without it."""
    hull = [first]
    for option in sorted(options, key=lambda o: (o.size, o.error)):
        if option.size <= hull[-1].size or option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _steepness(hull[-2], option) <= _steepness(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull[1:]


def _steepness(a: _Option, b: _Option) -> float:
    return (b.error - a.error) / (b.size - a.size)


def _options(
    task: _Task,
    choices: Sequence[Target],
    importance: Mapping[str, Tensor],
    loss: Callable[[nn.Module], float] | None,
) -> dict[str, list[_Option]]:
    """Every tensor with every choice that takes it: written, for its bytes, and read, for its error."""
    base = 0.0 if loss is None else _measured(loss, task.model)
    weights = task.weights()
    found: dict[str, list[_Option]] = {claim.name: [] for claim in task.claims}
    for target in choices:
        mine = [c for c in task.claims if target.accepts(c.layout.shape, c.dtype, c.layout) is None]
        if not mine:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = compress(task.model, Recipe(_grouped({claim.name: target for claim in mine})), example=task.example)
        sizes = _sizes(run)
        for name, item in run.encoded().items():
            q = item.decode()
            if loss is None:
                error = float((importance[name] * (q.double() - weights[name].double()).square().cpu()).sum())
            else:
                error = _with(task.model, weights[name], q, lambda: _measured(loss, task.model)) - base
            found[name].append(_Option(target=target, size=sizes[name], error=error))
    lacking = next((name for name, mine in found.items() if not mine), None)
    if lacking is not None:
        raise ValueError(
            f"allocate(choices=...): none takes {lacking!r}; add one that does, or a rule with keep=True for it"
        )
    return found


def _sizes(run: Run) -> dict[str, int]:
    """Bytes of each tensor's own codes and numbers."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(run, path := Path(folder) / "try.detent", life="compressed")
        return {row["name"]: row["bytes"] for row in inspect(path).rows}


def _measured(loss: Callable[[nn.Module], float], model: nn.Module) -> float:
    with torch.no_grad():
        value = float(loss(model))
    if not is_finite(value):
        raise ValueError(f"allocate(loss=...): gave {value}: must be a finite number")
    return value


def _with(model: nn.Module, place: Tensor, value: Tensor, act: Callable[[], float]) -> float:
    """Something of the model with other weights in one place, which come back bitwise."""
    kept = place.clone()
    with torch.no_grad():
        try:
            place.copy_(value)
            return act()
        finally:
            place.copy_(kept)
