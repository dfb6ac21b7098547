"""ADMM and its plain relative, the penalty: a pull towards the target that acts through the gradient."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from detent.mechanisms.base import Cadence, Clock, Mechanism, Slot
from detent.mechanisms.projection import (
    WEIGHT,
    Masked,
    Metric,
    check_metric,
    check_rounds,
    check_strength,
    due_share,
    freeze_nearest,
    hold_gradient,
    hold_weight,
    map_and_mask,
    round_steps,
    survivors,
    watch_gradient,
)
from detent.schedules import Moment, Number, is_finite, is_number, is_whole, step_at, value_at
from detent.targets import Target
from detent.targets.base import compute_dtype

__all__ = ["ADMM", "Penalty", "periodic_rate", "residuals"]

# rho stays in here unless told otherwise: far from where what Adam squares, or a dual divided by rho, leaves float32.
_LEAST_RHO, _MOST_RHO = 1e-9, 1e9
_RESIDUALS = ("primal", "relative", "drift", "rho")
_OUT_OF_BALANCE = 10.0  # a residual this much larger than the other makes rho change (Boyd et al., section 3.4.1)
_ENDLESS = 1 << 62  # steps of a period that nothing ends


@dataclass(frozen=True, kw_only=True)
class _Periods:
    """Where z and u are updated: every so many steps from `start`, or at `count` even shares of the way to `until`.

    A fraction of training need not be a whole number of steps: rounded by itself it would have an update just before
    the mapping, with no time for the weights to settle in between.
    """

    start: int
    until: int | None
    every: int
    count: int | None = None

    def around(self, step: int) -> tuple[int, int]:
        """First step of the period that a step from `start` on lies in, and the first one after it."""
        at = step - self.start
        if self.count is None:
            first = step - at % self.every
            return first, first + self.every
        assert self.until is not None
        length = self.until - self.start
        i = at * self.count // length
        edges = [self.start + round(j * length / self.count) for j in (i, i + 1, i + 2)]
        return next((a, b) for a, b in itertools.pairwise(edges) if a <= step < b)


@dataclass(frozen=True, kw_only=True)
class ADMM(Mechanism):
    """Alternating direction method of multipliers: train towards z, a point of the target that moves with the weights.

        every step:      g <- g + rho (w - z + u)
        every period:    z <- project(w + u),  u <- u + w - z;  then rho <- growth rho,  u <- u / growth
        at `until`:      w <- project(w), and the feasibility steps of `finish` to the end of training

    z starts as project(w) and u as 0. u is the dual variable divided by rho, so it is rescaled whenever rho changes:
    the force rho u stays what it was. The penalty acts through the gradient under every optimizer; biases and
    normalisation are not touched. ADMM ends near the target, not on it: a training that stops at `until` loses what the
    last projection takes, which is what `finish` is for.

    The learning rate is meant to be periodic (`periodic_rate`): back to its base after every z, small before the next.

    Before `until` the weights are full precision and useful so. With `finish` the two lives become one at the end.

    Args:
        rho: first strength of the pull, > 0; multiplies a distance between weights to give a gradient.
        growth: factor on rho after every period, >= 1.
        every: steps (int) or fraction of training (float) between updates of z and u, counted from `start`; a fraction
            is made to divide the way to `until` evenly.
        until: moment of the masked mapping; `None` for ADMM to the end and no mapping in training.
        rho_max: rho grows no further; `None` for 1e9 (or `rho`, if that is more). Nor does balancing take it below 1e-9
            (or `rho`): farther out gradients and duals overflow.
        metric: what "nearest" means where a sparse target chooses its survivors: "euclidean" as in the papers, so that
            the largest |w + u| survive; "fisher": the largest h |w + u| with h the root mean square of the gradients
            so far (about the last hundred steps), which is how much the loss would miss them. Needs `until`.
        balance: instead of growing, compare the residuals |w - z| and rho |z - z_old|: rho is multiplied (divided) by
            `growth` where the first (second) is more than ten times the other.
        form: "gradient" as above; "decoupled" takes lr rho (w - z + u) off the weight after the step, as AdamW does
            with weight decay. Under an optimizer that is not plain SGD that is another objective, with another end.
        finish: what holds from `until` on. "mask": zeros stay zero, survivors train on the plain loss. "freeze": the
            share `rounds[i]` of weights nearest their level is put there and held in each round. `None`: all weights
            train on freely. "auto": "mask" where a target leaves survivors free, else "freeze".
        rounds: cumulative shares of the freeze rounds, rising to 1.
        freeze_every: steps or fraction of training between freeze rounds; `None` spreads them evenly over what is left
            after `until`, the first at `until`.
        per_level: freeze the nearest of each level instead of the whole tensor.
        start: moment ADMM starts; before it the base optimizer runs untouched.

    Raises:
        ValueError: a value outside its range; by `attach`, a mapping or a round after the end of training.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        >>> admm = dt.ADMM(rho=0.1, every=5, until=25)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.TopK(keep=7), mechanism=admm)])
        >>> run = dt.attach(model, optimizer, recipe)
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     (model(torch.randn(16, 10)) - 1).square().mean().backward()
        ...     _ = optimizer.step()
        >>> int((model.weight != 0).sum())
        7

    Reference: Ye et al., "Progressive DNN Compression", arXiv 1903.09769; Zhang et al., arXiv 1804.03294. Rescaling and
    balancing: Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 2011, section 3.4.1.
    """

    rho: float = 1e-3
    growth: float = 1.3
    every: Moment = 0.05
    until: Moment | None = 0.5
    rho_max: float | None = None
    balance: bool = False
    form: Literal["gradient", "decoupled"] = "gradient"
    finish: Literal["auto", "mask", "freeze"] | None = "auto"
    rounds: tuple[float, ...] = (0.5, 0.75, 1.0)
    freeze_every: Moment | None = None
    per_level: bool = False
    start: Moment = 0
    metric: Metric = "euclidean"

    keeps_full_life: ClassVar[bool] = True
    offset: ClassVar[str | None] = "dual"
    weighing: ClassVar[str | None] = WEIGHT

    def __post_init__(self) -> None:
        if not (is_finite(self.rho) and self.rho > 0):
            raise ValueError(f"ADMM(rho={self.rho!r}): must be a finite number > 0")
        if not (is_finite(self.growth) and self.growth >= 1):
            raise ValueError(f"ADMM(growth={self.growth!r}): must be a finite number >= 1")
        if self.balance is True and self.growth == 1:
            raise ValueError("ADMM(balance=True, growth=1.0): balancing moves rho by growth; give one > 1")
        if not (is_number(self.every) and self.every > 0):
            raise ValueError(f"ADMM(every={self.every!r}): must be >= 1 step, or a fraction of training > 0")
        if self.until is not None and not (is_number(self.until) and self.until > 0):
            raise ValueError(f"ADMM(until={self.until!r}): must be a number > 0, or None")
        same = type(self.until) is type(self.start)  # of two kinds only steps can tell
        if self.until is not None and same and self.until <= self.start:
            raise ValueError(f"ADMM(until={self.until!r}): must come after start={self.start!r}")
        if self.rho_max is not None and not (is_number(self.rho_max) and self.rho_max >= self.rho):
            raise ValueError(f"ADMM(rho_max={self.rho_max!r}): must be >= rho={self.rho}, or None")
        if self.form not in ("gradient", "decoupled"):
            raise ValueError(f'ADMM(form={self.form!r}): must be "gradient" or "decoupled"')
        if self.finish not in ("auto", "mask", "freeze", None):
            raise ValueError(f'ADMM(finish={self.finish!r}): must be "auto", "mask", "freeze" or None')
        check_rounds(self.rounds, "ADMM")
        check_metric(self.metric, None, "ADMM")
        if self.metric == "fisher" and self.until is None:
            raise ValueError('ADMM(until=None): metric="fisher" needs a moment at which survivors are chosen for good')
        if self.freeze_every is not None and not (is_number(self.freeze_every) and self.freeze_every > 0):
            raise ValueError(f"ADMM(freeze_every={self.freeze_every!r}): must be a number > 0, or None")
        super().__post_init__()

    @property
    def memory(self) -> tuple[str, ...]:  # type: ignore[override]
        always = ("z", "dual", "rho", "primal", "relative", "drift", "mask", "frozen", "held")
        return always if self.metric == "euclidean" else (*always, WEIGHT)

    # --- when ---------------------------------------------------------------------------------------------------

    def cadence(self, target: Target) -> Cadence:
        return Cadence(every=0, until=self.until, at=self._updates, after=True, own=("fit_every",))

    def _moments(self, clock: Clock) -> tuple[int, int | None]:
        """(first tick of ADMM, first tick after the mapping)."""
        start = step_at(self.start, clock.total_steps, "ADMM.start")
        until = None if self.until is None else step_at(self.until, clock.total_steps, "ADMM.until")
        return start, until

    def periods(self, total_steps: int | None) -> _Periods:
        """When z and u are updated; `periodic_rate` follows it."""
        start, until = self._moments(Clock(step=0, total_steps=total_steps))
        every = max(step_at(self.every, total_steps, "ADMM.every"), 1)
        if isinstance(self.every, int) or until is None or total_steps is None or until <= start:
            return _Periods(start=start, until=until, every=every)
        length = until - start
        count = min(max(round(length / (self.every * total_steps)), 1), length)
        if length % count == 0:
            return _Periods(start=start, until=until, every=length // count)
        return _Periods(start=start, until=until, every=every, count=count)

    def _freeze_steps(self, clock: Clock) -> list[int]:
        until = self._moments(clock)[1]
        assert until is not None
        return round_steps(until, self.freeze_every, len(self.rounds), clock.total_steps, "ADMM.freeze_every")

    def _updates(self, clock: Clock) -> bool:
        """Whether z and u start, or are updated, after the step at hand."""
        start, until = self._moments(clock)
        tick = clock.step + 1
        if until is not None and tick > until:
            return False  # mapped; z would start once more, and hold the survivors where they are
        return tick in (start, until) or (tick > start and self.periods(clock.total_steps).around(tick)[0] == tick)

    def check(self, target: Target) -> str | None:
        name = type(target).__name__
        if self.finish == "mask" and not target.leaves_free:
            return f'ADMM(finish="mask") trains the survivors of a sparse target, and {name} leaves no weight free'
        if self.finish == "freeze" and target.leaves_free:
            return f'ADMM(finish="freeze") puts weights on levels, and the survivors of {name} have none to go to'
        return check_metric(self.metric, target, "ADMM")

    def mapping(self, target: Target, clock: Clock) -> tuple[int, str] | None:
        start, until = self._moments(clock)
        end = math.inf if clock.total_steps is None else clock.total_steps
        if until is None or start >= end or (self.finish is None and until <= end):
            return None
        if self._freezes(target) and until <= end:
            last = self._freeze_steps(clock)[-1]
            return last, f"the last of ADMM(rounds={self.rounds}, freeze_every={self.freeze_every})"
        return until, f"the mapping of ADMM(until={self.until})"

    def active(self, clock: Clock) -> bool:
        start, until = self._moments(clock)
        if until is not None and until <= start and (clock.total_steps is None or start < clock.total_steps):
            few = f"; training, or its stage, has too few steps ({clock.total_steps})" if until == start else ""
            raise ValueError(
                f"ADMM: until={self.until} (step {until}) must come after start={self.start} (step {start}){few}"
            )
        step_at(self.every, clock.total_steps, "ADMM.every")  # asked again at `start`, which is late for a refusal
        return clock.step + 1 >= start

    # --- the moments of a step ------------------------------------------------------------------------------------

    def open(self, slot: Slot, clock: Clock) -> None:
        start, until = self._moments(clock)
        self._number(slot, "rho", self.rho)
        for name in ("primal", "relative", "drift"):
            self._number(slot, name, math.nan)
        if until is not None and self._freezes(slot.target):
            self._freeze_steps(clock)  # an end that is not known is found now, not at the mapping
        if until is not None and clock.step >= until:
            self._finish(slot, clock, clock.step)
        elif clock.step >= start:
            self._begin(slot)

    def before_step(self, slot: Slot, clock: Clock) -> None:
        if "z" in slot.state and self.metric == "fisher":
            watch_gradient(slot)
        hold_gradient(slot)
        if "z" in slot.state and self.form == "gradient" and slot.grad is not None:
            pull = self._pull(slot)
            slot.grad.add_(pull if slot.grad_scale is None else pull.mul_(slot.grad_scale), alpha=slot.sign)

    def after_step(self, slot: Slot, clock: Clock) -> None:
        hold_weight(slot)
        if "z" in slot.state and self.form == "decoupled" and slot.grad is not None:  # what is frozen is not moved
            slot.write_once("pull", slot.weight, lambda: slot.weight - self._pull(slot).mul_(slot.rate()))
        if "frozen" in slot.state and slot.frozen:
            share = due_share(clock.step + 1, self._freeze_steps(clock), self.rounds)
            if share is not None:
                freeze_nearest(slot, share, self.per_level)

    def after_fit(self, slot: Slot, clock: Clock) -> None:
        if "z" in slot.state:
            self._update(slot)
        else:
            self._begin(slot)
        if clock.step + 1 == self._moments(clock)[1]:
            self._finish(slot, clock, clock.step + 1)

    def undo(self, slot: Slot, clock: Clock) -> None:
        hold_weight(slot)

    # --- the algorithm --------------------------------------------------------------------------------------------

    @staticmethod
    def _number(slot: Slot, name: str, value: float | Tensor) -> None:
        dtype = compute_dtype(slot.weight.dtype)
        slot.state[name] = torch.as_tensor(value, dtype=dtype, device=slot.weight.device).clone()

    @staticmethod
    def _wide(w: Tensor) -> Tensor:
        # The dual is a sum of small differences; in half precision it would stand still.
        return w.to(compute_dtype(w.dtype))

    def _pull(self, slot: Slot) -> Tensor:
        return (self._wide(slot.weight) - slot.state["z"]).add_(slot.state["dual"]).mul_(slot.state["rho"])

    def _begin(self, slot: Slot) -> None:
        slot.state["z"] = slot.pull_project(self._wide(slot.weight))
        slot.state["dual"] = torch.zeros_like(slot.state["z"])

    def _update(self, slot: Slot) -> None:
        state, w = slot.state, self._wide(slot.weight)
        old, z = state["z"], survivors(slot, slot.pull_project, w + state["dual"])
        state["z"], state["dual"] = z, state["dual"] + w - z
        primal, drift = slot.gather(w - z).double().norm(), slot.gather(z - old).double().norm()
        self._number(slot, "primal", primal)
        size = slot.gather(w).double().norm()
        self._number(slot, "relative", primal / size.clamp_min(torch.finfo(size.dtype).tiny))
        self._number(slot, "drift", drift)
        before = state["rho"]
        self._number(slot, "rho", self._next(before.double(), primal, drift))
        state["dual"] *= before / state["rho"]  # the force rho u is what it was

    def _next(self, rho: Tensor, primal: Tensor, drift: Tensor) -> Tensor:
        if not self.balance:
            rho = rho * self.growth
        else:
            up, down = primal > _OUT_OF_BALANCE * rho * drift, rho * drift > _OUT_OF_BALANCE * primal
            rho = torch.where(up, rho * self.growth, torch.where(down, rho / self.growth, rho))
        most = max(_MOST_RHO, self.rho) if self.rho_max is None else self.rho_max
        return rho.clamp(min(_LEAST_RHO, self.rho), most)

    def _freezes(self, target: Target) -> bool:
        return self.finish == "freeze" or (self.finish == "auto" and not target.leaves_free)

    def _finish(self, slot: Slot, clock: Clock, tick: int) -> None:
        """Masked mapping, by the projection of w and not of w + u; the fit is frozen from here on."""
        z = slot.state.get("z")  # none where weights are taken over as they are after the mapping (rebind)
        if z is not None and slot.target.fits_together and not bool(slot.gather(z).any()):
            # Other weights had the say. |w - z| is |w| then, however small it has become, and no rho changes that; what
            # was empty before is no news.
            if bool(slot.gather(slot.weight).any()):
                warnings.warn(
                    "ADMM maps whole weights to zero: their target keeps nothing of them. One threshold on |w| over "
                    'the model empties layers of small weights; metric="fisher", or a rule of their own, keeps some',
                    stacklevel=2,
                )
        elif float(slot.state["relative"]) >= 1.0:
            # The same words for every weight, so that Python's own filter says them once.
            warnings.warn(
                "ADMM maps weights that are still as far from their target as from zero ('relative' in "
                "dt.residuals(run) is 1 or more): the pull came to nothing; give it a larger rho, or more steps",
                stacklevel=2,
            )
        for name in ("z", "dual"):
            slot.state.pop(name, None)
        if self.finish is None:
            slot.weight.copy_(survivors(slot, slot.project, slot.weight))
            slot.state.pop(WEIGHT, None)
        elif self._freezes(slot.target):
            due = [share for at, share in zip(self._freeze_steps(clock), self.rounds, strict=True) if at <= tick]
            freeze_nearest(slot, max(due), self.per_level)
        else:
            map_and_mask(slot)


class _Remembers(Protocol):
    def state_dict(self) -> dict[str, Any]: ...


def residuals(run: _Remembers) -> dict[str, dict[str, float]]:
    """How far ADMM was from its target at the last update of z, and how strong it pulls now.

    Args:
        run: from `attach`.

    Returns:
        By name of the weight: primal (|w - z|), relative (|w - z| / |w|: a few hundredths at the mapping, or the
        mapping costs accuracy), drift (|z - z_old|) and rho; nan before the first update.

    Raises:
        ValueError: what is no run.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rule = dt.Rule(match="weight", target=dt.TopK(keep=4), mechanism=dt.ADMM(rho=0.5, every=1, until=None))
        >>> run = dt.attach(model, optimizer, dt.Recipe([rule]))
        >>> residuals(run)["weight"]["rho"]
        0.5
    """
    if not hasattr(run, "plan"):
        raise ValueError(f"residuals(run=...): must be the run that attach gave, not {type(run).__name__}")
    found = {}
    for name, entry in run.state_dict()["weights"].items():
        if entry["held"].get("rho") and "drift" in entry["held"]:
            found[name] = {key: float(entry["state"].get(key, math.nan)) for key in _RESIDUALS}
    return found


class _Staged(Protocol):
    @property
    def rules(self) -> Sequence[Any]: ...

    def bounds(self, total_steps: int | None) -> list[tuple[int, int | None]]: ...

    def stage_rules(self) -> list[range]: ...

    def called(self, index: int) -> str: ...


def periodic_rate(
    optimizer: Optimizer,
    every: int | _Staged,
    *,
    until: int | None = None,
    total: int | None = None,
    milestones: Sequence[float] = (1 / 3, 2 / 3),
    gamma: float = 0.1,
    retrain: float = 1.0,
    floor: float = 0.0,
) -> LambdaLR:
    """The learning rate ADMM wants: at its base after every update of z and u, decayed inside the period.

        factor = gamma ^ (number of milestones passed in this period);  after `until`: (1 + cos(pi t)) / 2

    Call its `step()` after every optimizer step. After `until` (the masked mapping) the rate starts from its base once
    more and falls along half a cosine to 0 at `total`, or stays at the base if `total` is unknown.

    Args:
        optimizer: the optimizer, with its base learning rates.
        every: steps of a period, >= 1: what `ADMM(every=...)` says. Or the recipe: then period and mapping are those of
            each of its stages, whose retraining ends with it. `Masked` maps at its `start`; a stage that maps nothing
            has one cosine. All ADMM rules of a stage must update at the same steps, and `Masked` rules beside them map
            with them or at 0.
        until: step of the masked mapping, or `None` for periods to the end; not with a recipe.
        total: steps in the whole training, or `None`; needed with a recipe.
        milestones: fractions of a period in (0, 1) at which the rate is multiplied by `gamma`.
        gamma: factor in (0, 1].
        retrain: factor > 0 on the base rate after the mapping: the few weights that are left may want larger steps.
        floor: where the cosine after the mapping ends, as a part of its beginning, in [0, 1].

    Raises:
        ValueError: a value outside its range, or a stage whose ADMM rules update, or Masked rules map, at different
            steps.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> rate = periodic_rate(optimizer, 4, milestones=(0.5,), until=8, total=10)
        >>> seen = []
        >>> for _ in range(10):
        ...     seen.append(round(rate.get_last_lr()[0], 3))
        ...     optimizer.step(); rate.step()
        >>> seen
        [1.0, 1.0, 0.1, 0.1, 1.0, 1.0, 0.1, 0.1, 1.0, 0.5]

    Reference: the training scripts behind arXiv 1903.09769.
    """
    recipe = None if isinstance(every, int) or not hasattr(every, "stage_rules") else every
    if not isinstance(optimizer, Optimizer):
        given = type(optimizer).__name__
        raise ValueError(f"periodic_rate(optimizer=...): must be a torch.optim.Optimizer, not {given}")
    if recipe is None and not is_whole(every):
        given = every if is_number(every) or isinstance(every, str) else type(every).__name__
        hint = "; the recipe of a run is run.plan.recipe" if hasattr(every, "plan") else ""
        raise ValueError(f"periodic_rate(every={given!r}): must be a whole number >= 1 of steps, or the recipe{hint}")
    for name, moment, least in (("until", until, 0), ("total", total, 1)):
        if moment is not None and not is_whole(moment, least):
            raise ValueError(f"periodic_rate({name}={moment!r}): must be a whole number >= {least} of steps, or None")
    if recipe is not None and (total is None or until is not None):
        raise ValueError("periodic_rate(every=recipe): needs total=, and until= is the recipe's own")
    if not retrain > 0:
        raise ValueError(f"periodic_rate(retrain={retrain}): must be > 0")
    if not 0 <= floor <= 1:
        raise ValueError(f"periodic_rate(floor={floor}): must lie in [0, 1]")
    if not 0 < gamma <= 1:
        raise ValueError(f"periodic_rate(gamma={gamma}): must lie in (0, 1]")
    if not all(0 < m < 1 for m in milestones):
        raise ValueError(f"periodic_rate(milestones={tuple(milestones)}): must lie in (0, 1)")
    if until is not None and total is not None and not until < total:
        raise ValueError(f"periodic_rate(until={until}, total={total}): the mapping must come before the end")

    if recipe is None:
        assert isinstance(every, int)
        parts = [_Part(first=0, past=total, periods=_Periods(start=0, until=until, every=every), after=retrain)]
    else:
        parts = _parts_of(recipe, total, retrain)

    def factor(step: int) -> float:
        part = next((p for p in parts if p.past is None or step < p.past), parts[-1])
        at = step - part.first
        until = part.periods.until
        if until is None or at < until:
            if at < part.periods.start:
                return 1.0
            begin, end = part.periods.around(at)
            return gamma ** sum(at - begin >= m * (end - begin) for m in milestones)
        if part.past is None:
            return part.after
        length = max(part.past - part.first - until, 1)
        turn = math.pi * min(at - until, length) / length
        return part.after * (floor + (1 - floor) * 0.5 * (1 + math.cos(turn)))

    return LambdaLR(optimizer, factor)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A stage as its learning rate sees it; its periods count from its first step, `after` is the rate then."""

    first: int
    past: int | None
    periods: _Periods
    after: float


def _parts_of(recipe: _Staged, total: int | None, retrain: float) -> list[_Part]:
    parts = []
    for (first, past), rules in zip(recipe.bounds(total), recipe.stage_rules(), strict=True):
        end = total if past is None else past
        assert end is not None
        found = [recipe.rules[i].mechanism for i in rules]
        pulls = [each.periods(end - first) for each in found if isinstance(each, ADMM)]
        masks = [each for each in found if isinstance(each, Masked)]
        for i in rules:
            rule = recipe.rules[i]
            if isinstance(rule.mechanism, ADMM) and rule.fit_until is not None:
                raise ValueError(
                    f"periodic_rate: {recipe.called(i)} ends ADMM's updates by fit_until="
                    f"{rule.fit_until}, and a rate that goes on in periods waits for them; leave fit_until out"
                )
        mapped = sorted({step_at(each.start, end - first, "Masked.start") for each in masks})
        # Beside ADMM a mask that holds from the start on is no mapping of this stage.
        mapped = [at for at in mapped if at > 0] if pulls else mapped
        if len(mapped) > 1:
            raise ValueError(
                f"periodic_rate: Masked rules of one stage map at different steps ({mapped}), and there is "
                "one learning rate; give them the same start"
            )
        other = next((each for each in pulls if each != pulls[0]), None)
        if other is not None:
            raise ValueError(
                f"periodic_rate: two ADMM rules of one stage update at different steps ({_said(pulls[0])}; "
                f"{_said(other)}), and there is one learning rate; give them the same start, every and until"
            )
        if pulls and mapped and mapped != [pulls[0].until]:
            raise ValueError(
                f"periodic_rate: a Masked rule maps at step {mapped[0]} of its stage, ADMM updates {_said(pulls[0])}, "
                "and there is one learning rate; give Masked the start that ADMM has for its until, or 0"
            )
        if pulls:
            periods = pulls[0]
        else:
            periods = _Periods(start=0, until=mapped[0] if mapped else 0, every=_ENDLESS)
        after = retrain if pulls or masks else 1.0
        parts.append(_Part(first=first, past=end, periods=periods, after=after))
    return parts


def _said(periods: _Periods) -> str:
    """The first updates of z and u, and the mapping."""
    some = [periods.around(periods.start)[1]]
    some.append(periods.around(some[-1])[1])
    return (
        f"at {some[0]}, {some[1]}, ... and {'no mapping' if periods.until is None else f'a mapping at {periods.until}'}"
    )


@dataclass(frozen=True, kw_only=True)
class Penalty(Mechanism):
    """A penalty on the distance to the target, through the gradient under every optimizer.

        l2:  g <- g + strength (w - project(w))         of strength/2 |w - Q|^2
        l1:  g <- g + strength sign(w - project(w))     of strength |w - Q|

    Args:
        strength: >= 0, a number or a schedule; 0 is the base optimizer, bitwise.
        norm: "l2" or "l1".
        start: moment the pull starts.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> import detent as dt
        >>> ramp = dt.Linear(first=0.0, last=1e-2)
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.Penalty(strength=ramp))

    Reference: Choi, El-Khamy, Lee, "Learning low precision deep neural networks through regularization",
    arXiv 1809.00095.
    """

    strength: Number
    norm: Literal["l2", "l1"] = "l2"
    start: Moment = 0

    keeps_full_life: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_strength(self.strength, "Penalty")
        if self.norm not in ("l2", "l1"):
            raise ValueError(f'Penalty(norm={self.norm!r}): must be "l2" or "l1"')
        super().__post_init__()

    def active(self, clock: Clock) -> bool:
        started = clock.step >= step_at(self.start, clock.total_steps, "Penalty.start")
        return started and value_at(self.strength, clock.step, clock.total_steps) > 0

    def before_step(self, slot: Slot, clock: Clock) -> None:
        if slot.grad is None:
            return
        gap = slot.weight - slot.pull_project(slot.weight)
        gap = gap if self.norm == "l2" else gap.sign_()
        if slot.grad_scale is not None:
            gap = gap * slot.grad_scale
        slot.grad.add_(gap, alpha=slot.sign * value_at(self.strength, clock.step, clock.total_steps))
