"""Mechanisms that act on the weight after the step: projection hard and soft, masks, freezing, staying in range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent import masks
from detent.mechanisms.base import Cadence, Clock, Mechanism, Slot, never_zero
from detent.schedules import Moment, Number, Schedule, ends_of, is_finite, is_number, is_whole, step_at, value_at
from detent.targets import Params, Target
from detent.targets.base import Lines, compute_dtype

__all__ = ["Clip", "HardProjection", "Masked", "PartialFreeze", "Proximal"]


def clip_to_range(w: Tensor, target: Target, params: Params) -> None:
    """Clamp w in place to the limits of a bounded target; an unbounded target leaves it alone.

    So does a group of weights that were all zero when the range was fitted: it could never leave zero again.
    """
    if type(target).limits is Target.limits:
        return
    lined = Lines.of(target, params, w)
    box = box_of(target, lined.params, w.dtype)
    for part, most, least in lined.cut(*box) if box is not None else ():
        clip_to_box(part, most, least)


def box_of(target: Target, params: Params, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The largest and the smallest value that each weight may have, or `None` where there is no range."""

    def make() -> tuple[Tensor, Tensor] | None:
        limits = target.limits(params)
        if limits is None:
            return None
        most = limits.to(dtype)
        most = most.masked_fill(most == 0, math.inf)
        return most, -most

    return params.once(("box", target), make, at=dtype)


def clip_to_box(w: Tensor, most: Tensor, least: Tensor) -> Tensor:
    """In place. The same as clamp_ with tensors for limits, which takes three times as long on a CPU."""
    torch.minimum(w, most, out=w)
    return torch.maximum(w, least, out=w)


def clipping_begins(start: Moment | None, clock: Clock) -> bool:
    """Whether clipping starts in this step: the range must then be that of the weights as they are, not an old one."""
    return start is not None and clock.step == step_at(start, clock.total_steps, "clip start")


def clipping(start: Moment | None, slot: Slot, clock: Clock) -> bool:
    """Whether weights are clipped in this step: from `start` on, or once the fit is frozen if that is `None`."""
    return slot.frozen if start is None else clock.step >= step_at(start, clock.total_steps, "clip start")


@dataclass(frozen=True, kw_only=True)
class Clip(Mechanism):
    """Keep weights inside the range of their target and do nothing else: projected gradient onto a box.

        w <- clamp(w, -limit, limit)    after each step

    The plain rival of PSG: a few outliers hold most of the rounding error, and this alone removes them.

    Args:
        start: moment (step or fraction of training) clipping starts, with a fresh fit that is the last one, unless the
            rule says `fit_until`; `None` for when the fit is frozen otherwise, after 30 % of training.

    Raises:
        ValueError: a start that is no moment.

    Example:
        >>> import detent as dt
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.Clip())
    """

    start: Moment | None = 0.0

    keeps_full_life: ClassVar[bool] = True

    def cadence(self, target: Target) -> Cadence:
        until = 0.3 if self.start is None else self.start
        return Cadence(until=until, at=lambda clock: clipping_begins(self.start, clock))

    def check(self, target: Target) -> str | None:
        if type(target).limits is Target.limits:
            return f"Clip keeps weights inside a range, and {type(target).__name__} has none"
        return None

    def active(self, clock: Clock) -> bool:
        return self.start is None or clock.step >= step_at(self.start, clock.total_steps, "Clip.start")

    def after_step(self, slot: Slot, clock: Clock) -> None:
        if clipping(self.start, slot, clock):
            clip_to_range(slot.weight, slot.target, slot.params)


@dataclass(frozen=True, kw_only=True)
class HardProjection(Mechanism):
    """Project onto the target every so many steps: iterative hard thresholding, the plain baseline.

        w <- project(w)    after every `every`-th step

    Args:
        every: steps between projections, >= 1.
        masks: weights that a projection set to zero stay zero: their gradients are zeroed and the step is undone. Meant
            for sparse targets: on a grid it holds every weight of the zero cell there for good.
        start: moment the first projection may happen.

    Raises:
        ValueError: every below 1.

    Example:
        >>> import detent as dt
        >>> rule = dt.Rule(match="weight", target=dt.TopK(keep=0.1), mechanism=dt.HardProjection(every=100))

    Reference: Blumensath and Davies, "Iterative hard thresholding for compressed sensing", arXiv 0805.0510, eq. 3.
    """

    every: int = 100
    masks: bool = True
    start: Moment = 0

    keeps_full_life: ClassVar[bool] = False
    memory: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        if not is_whole(self.every):
            raise ValueError(f"HardProjection(every={self.every!r}): must be a whole number >= 1 of steps")
        super().__post_init__()

    def cadence(self, target: Target) -> Cadence:
        return Cadence(every=self.every, last=True)

    def active(self, clock: Clock) -> bool:
        return clock.step >= step_at(self.start, clock.total_steps, "HardProjection.start")

    def before_step(self, slot: Slot, clock: Clock) -> None:
        hold_gradient(slot)

    def after_step(self, slot: Slot, clock: Clock) -> None:
        hold_weight(slot)
        if (clock.step + 1) % self.every == 0:
            slot.weight.copy_(slot.project(slot.weight))
            if self.masks:
                slot.state["mask"] = slot.weight != 0


# --- staying feasible -------------------------------------------------------------------------------------------


def hold_gradient(slot: Slot) -> None:
    """Zero the gradients of masked and of frozen weights, so that no moment of the optimizer learns from them."""
    if slot.grad is None:
        return
    if "mask" in slot.state:
        masks.kept(slot.grad, slot.state["mask"], slot.grad)
    if "frozen" in slot.state:
        masks.kept(slot.grad, ~slot.state["frozen"], slot.grad)


def hold_weight(slot: Slot) -> None:
    """Put masked and frozen weights back: momentum and weight decay move them although their gradient is zero."""
    if "mask" in slot.state:
        masks.kept(slot.weight, slot.state["mask"], slot.weight)
    if "frozen" in slot.state:
        slot.weight.copy_(torch.where(slot.state["frozen"], slot.state["held"], slot.weight))


def map_and_mask(slot: Slot) -> None:
    """Masked mapping: w = project(w), in the metric of what was gathered, and its zeros are held from now on."""
    slot.weight.copy_(survivors(slot, slot.project, slot.weight))
    slot.state.pop(WEIGHT, None)
    slot.state["mask"] = slot.weight != 0


# --- which weights matter -----------------------------------------------------------------------------------------

WEIGHT = "weighing"  # the memory: square root of the running mean of squared gradients
Metric = Literal["euclidean", "fisher"]
_MEMORY = 0.99  # of that mean: about a hundred steps


def check_metric(metric: str, target: Target | None, name: str) -> str | None:
    """Why survivors of this target cannot be chosen in a metric, or `None`.

    Raises:
        ValueError: an unknown metric.
    """
    if metric not in ("euclidean", "fisher"):
        raise ValueError(f'{name}(metric={metric!r}): must be "euclidean" or "fisher"')
    if metric == "fisher" and target is not None and not target.leaves_free:
        return (
            f'{name}(metric="fisher") decides which weights survive, and {type(target).__name__} is not a set of few '
            "free weights"
        )
    return None


def watch_gradient(slot: Slot) -> None:
    """Take this step's gradient into the running root mean square that weighs the weights."""
    if slot.grad is None:
        return
    wide = compute_dtype(slot.weight.dtype)
    grad = slot.grad.to(wide) if slot.grad_scale is None else slot.grad.to(wide) / slot.grad_scale
    old = slot.state.get(WEIGHT)
    mean = torch.zeros_like(grad) if old is None else old.square()
    slot.state[WEIGHT] = mean.lerp_(grad.square(), 1 - _MEMORY).sqrt_()


def survivors(slot: Slot, project: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """The nearest point of a sparse set in the metric sum(h^2 (z - w)^2): w where h w survives, else 0.

    h is what was gathered, if anything was. A collective under sharding.
    """
    if WEIGHT not in slot.state:
        return project(w)
    weighing = never_zero(slot.gather(slot.state[WEIGHT]))
    rows = slot.params.layout.rows
    weighing = weighing if rows is None else weighing[slice(*rows)]
    return torch.where(project(w * weighing) != 0, w, torch.zeros_like(w))


def freeze_nearest(slot: Slot, share: float, per_level: bool) -> None:
    """Put the share of weights that lie nearest their place on it, for good; the others stay as they are.

    Pruned weights are put to zero at once and do not count: they lie nearest of all, and a share of all weights would
    leave every survivor to the last round.
    """
    q = slot.project(slot.weight)
    if share >= 1.0:
        # Everything at once, earlier freezes included: only the projection of the whole lies in the set for certain.
        slot.weight.copy_(q)
        frozen = torch.ones_like(slot.weight, dtype=torch.bool)
    else:
        distance = slot.target.distance(q - slot.weight, slot.params)
        if "frozen" in slot.state:
            distance = distance.masked_fill(slot.state["frozen"], -1.0)
            q = torch.where(slot.state["frozen"], slot.state["held"], q)
        gone = (q == 0) if slot.target.prunes else torch.zeros_like(q, dtype=torch.bool)
        gone = gone if slot.pruned is None else gone | slot.pruned
        # Ranks are those of the whole tensor, so that every sharding freezes the same weights.
        counted = slot.gather((~gone).to(q.dtype)) != 0
        frozen = ~counted
        # Weights that move together (a kernel) are ranked together: half of one on its codeword would be no codeword.
        size = slot.target.codebook(slot.params).shape[1] if slot.target.has_codebook else 1
        mine = counted.reshape(-1, size).any(dim=1)
        places = slot.gather(q).reshape(-1, size)[mine] if per_level else None
        taken = torch.zeros_like(mine)
        taken[mine] = _nearest(slot.gather(distance).reshape(-1, size)[mine, 0], share, places)
        frozen |= taken[:, None].expand(-1, size).reshape(frozen.shape)
        rows = slot.params.layout.rows
        frozen = frozen if rows is None else frozen[slice(*rows)].clone()
        # Weights may leave a level: its share may then be less than what is held there already.
        frozen = frozen | slot.state["frozen"] if "frozen" in slot.state else frozen
        slot.weight.copy_(torch.where(frozen, q, slot.weight))
    slot.state["frozen"], slot.state["held"] = frozen, slot.weight.clone()


def _nearest(distance: Tensor, share: float, places: Tensor | None) -> Tensor:
    """Mask of the share of smallest distances, among all or among those of each place; ties to the earlier position."""
    order = distance.reshape(-1).argsort(stable=True)
    rank = torch.arange(len(order), device=order.device)
    if places is None:
        taken = rank < round(share * len(order))
    else:
        flat = places.reshape(-1) if places.shape[1] == 1 else places
        inverse, sizes = flat.unique(return_inverse=True, return_counts=True, dim=None if flat.dim() == 1 else 0)[1:]
        order = order[inverse[order].argsort(stable=True)]
        within = rank - (sizes.cumsum(0) - sizes)[inverse[order]]
        taken = within < (share * sizes.double()).round()[inverse[order]]
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order] = taken
    return mask.reshape(distance.shape)


def check_rounds(rounds: tuple[float, ...], who: str) -> None:
    """Refuse shares that do not rise to 1.

    Raises:
        ValueError: naming the field.
    """
    listed = rounds if isinstance(rounds, Sequence) and all(is_number(share) for share in rounds) else ()
    rising = all(a < b for a, b in zip((0.0, *listed), listed, strict=False))
    if not listed or not rising or listed[-1] != 1.0:
        raise ValueError(f"{who}(rounds={rounds!r}): shares of frozen weights must rise within (0, 1] and end at 1.0")


def round_steps(begin: int, every: Moment | None, rounds: int, total_steps: int | None, who: str) -> list[int]:
    """The tick at whose start each freeze round is over; the rounds share what is left of training if `every` is None.

    Raises:
        ValueError: a length that depends on an unknown end of training.
    """
    if every is None:
        if total_steps is None:
            raise ValueError(
                "pass total_steps= (calls of optimizer.step() in the whole training) to attach: "
                f"{who} shares it among its rounds; or give the steps between rounds as an int"
            )
        left = total_steps - begin
        if 0 < left < rounds:
            raise ValueError(
                f"{who}: {rounds} freeze rounds from step {begin} on need a step each, and {left} are left"
            )
        return [begin + i * max(left, 0) // rounds for i in range(rounds)]
    length = step_at(every, total_steps, f"{who} steps between rounds")
    if length < 1:
        raise ValueError(f"{who}: {every} of {total_steps} steps between freeze rounds is none; need one at least")
    return [begin + i * length for i in range(rounds)]


def due_share(tick: int, steps: list[int], rounds: tuple[float, ...]) -> float | None:
    """The share to be frozen at the start of a tick, if a round falls there."""
    due = [share for step, share in zip(steps, rounds, strict=True) if step == tick]
    return max(due) if due else None


@dataclass(frozen=True, kw_only=True)
class Masked(Mechanism):
    """Masked retraining: project once, hold the zeros, train the survivors on the plain loss.

        w <- project(w) at the start; from then on gradients and steps of zeros are taken back

    With `metric="fisher"` the survivors are those of the largest h |w|, h the root mean square of the gradients seen
    between the beginning of the stage and `start`: by how much the loss would change, not by how large they are. Where
    the count asked for is larger than the number of weights that any gradient reached, the largest of the others
    survive, too.

    What follows a pruning by any other means, and the plain rival of all of them (one-shot magnitude pruning).

    Args:
        start: moment (step or fraction of training) of the projection; before it the base optimizer runs untouched.
        metric: what "nearest" means: "euclidean", or "fisher", which needs `start` > 0.

    Raises:
        ValueError: an unknown metric, or "fisher" without steps to gather it in.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.TopK(keep=7), mechanism=dt.Masked())])
        >>> run = dt.attach(model, optimizer, recipe)
        >>> int((model.weight != 0).sum())
        7

    Reference: Han et al., "Learning both weights and connections", arXiv 1506.02626; the Fisher metric: Theis et al.,
    "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787, eq. 9 (there per feature map).
    """

    start: Moment = 0
    metric: Metric = "euclidean"

    keeps_full_life: ClassVar[bool] = False
    weighing: ClassVar[str | None] = WEIGHT

    def __post_init__(self) -> None:
        check_metric(self.metric, None, "Masked")
        super().__post_init__()
        if self.metric == "fisher" and not self.start > 0:
            raise ValueError(f'Masked(start={self.start}): metric="fisher" gathers gradients before it; give start > 0')

    @property
    def memory(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("mask",) if self.metric == "euclidean" else ("mask", WEIGHT)

    def cadence(self, target: Target) -> Cadence:
        return Cadence(every=0, until=self.start, at=lambda clock: clock.step + 1 == self._begin(clock), after=True)

    def _begin(self, clock: Clock) -> int:
        return step_at(self.start, clock.total_steps, "Masked.start")

    def check(self, target: Target) -> str | None:
        if not target.leaves_free:
            name = type(target).__name__
            return (
                f"Masked trains the survivors of a sparse target, and {name} leaves no weight free; use PartialFreeze"
            )
        return None

    def active(self, clock: Clock) -> bool:
        return self.metric == "fisher" or clock.step + 1 >= self._begin(clock)

    def open(self, slot: Slot, clock: Clock) -> None:
        if clock.step >= self._begin(clock):
            map_and_mask(slot)

    def after_fit(self, slot: Slot, clock: Clock) -> None:
        if clock.step + 1 == self._begin(clock):  # the rule may ask for other fits, too
            map_and_mask(slot)

    def before_step(self, slot: Slot, clock: Clock) -> None:
        if self.metric == "fisher" and clock.step < self._begin(clock):
            watch_gradient(slot)
        hold_gradient(slot)

    def after_step(self, slot: Slot, clock: Clock) -> None:
        hold_weight(slot)

    def undo(self, slot: Slot, clock: Clock) -> None:
        hold_weight(slot)


@dataclass(frozen=True, kw_only=True)
class PartialFreeze(Mechanism):
    """Partial freeze rounds: the weights nearest their level are put on it and held, the others train on to make up.

        in round i: w_j <- project(w)_j for the share rounds[i] of smallest |w_j - project(w)_j|, held from then on

    The levels are those fitted at the start. After the last round every weight lies in the target exactly; what is
    not claimed (biases, BatchNorm) trains on.

    Args:
        rounds: share of the weights that is frozen after each round, rising to 1.
        every: steps (int) or fraction of training (float) between rounds; `None` spreads them evenly over what is left
            after `start`, the first at once.
        per_level: take the share among the weights of each level (the kernels of each codeword) instead of the whole
            tensor. Rounds of 30 % of the weights that are left at each level are `rounds=(0.3, 0.51, 0.657, 1.0)`.
        start: moment of the first round; before it the base optimizer runs untouched.

    Raises:
        ValueError: shares that do not rise to 1, or no time between rounds; by `attach`, a round after the end of
            training.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.PartialFreeze(every=2))
        >>> run = dt.attach(model, optimizer, dt.Recipe([rule]))
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 8)).square().mean().backward()
        ...     _ = optimizer.step()
        >>> len(model.weight.unique())
        3

    Reference: Zhou et al., "Incremental Network Quantization", arXiv 1702.03044; per level: Ren et al., "ADMM-NN",
    arXiv 1812.11677.
    """

    rounds: tuple[float, ...] = (0.5, 0.75, 1.0)
    every: Moment | None = None
    per_level: bool = False
    start: Moment = 0

    keeps_full_life: ClassVar[bool] = False
    memory: ClassVar[tuple[str, ...]] = ("frozen", "held")

    def __post_init__(self) -> None:
        check_rounds(self.rounds, "PartialFreeze")
        if self.every is not None and not (is_number(self.every) and self.every > 0):
            raise ValueError(f"PartialFreeze(every={self.every!r}): must be a number > 0, or None")
        super().__post_init__()

    def cadence(self, target: Target) -> Cadence:
        return Cadence(every=0, until=self.start, at=lambda clock: clock.step + 1 == self._steps(clock)[0], after=True)

    def _steps(self, clock: Clock) -> list[int]:
        begin = step_at(self.start, clock.total_steps, "PartialFreeze.start")
        return round_steps(begin, self.every, len(self.rounds), clock.total_steps, "PartialFreeze")

    def check(self, target: Target) -> str | None:
        if target.leaves_free:
            name = type(target).__name__
            return f"PartialFreeze puts weights on levels, and the survivors of {name} have none to go to; use Masked"
        return None

    def mapping(self, target: Target, clock: Clock) -> tuple[int, str] | None:
        steps = self._steps(clock)
        if clock.total_steps is not None and steps[0] > clock.total_steps:
            return None
        return steps[-1], f"the last of PartialFreeze(rounds={self.rounds}, every={self.every})"

    def active(self, clock: Clock) -> bool:
        return clock.step + 1 >= self._steps(clock)[0]

    def open(self, slot: Slot, clock: Clock) -> None:
        due = [share for step, share in zip(self._steps(clock), self.rounds, strict=True) if step <= clock.step]
        if due:
            freeze_nearest(slot, max(due), self.per_level)

    def before_step(self, slot: Slot, clock: Clock) -> None:
        hold_gradient(slot)

    def after_step(self, slot: Slot, clock: Clock) -> None:
        hold_weight(slot)
        share = due_share(clock.step + 1, self._steps(clock), self.rounds)
        if share is not None and slot.frozen:
            freeze_nearest(slot, share, self.per_level)

    def after_fit(self, slot: Slot, clock: Clock) -> None:
        share = due_share(clock.step + 1, self._steps(clock), self.rounds)
        if share is not None:
            freeze_nearest(slot, share, self.per_level)

    def undo(self, slot: Slot, clock: Clock) -> None:
        hold_weight(slot)


# --- proximal steps ---------------------------------------------------------------------------------------------


def check_strength(strength: float | Schedule, who: str) -> None:
    """Refuse a negative or infinite strength.

    Raises:
        ValueError: naming the field.
    """
    if not all(is_finite(end) and end >= 0 for end in ends_of(strength)):
        raise ValueError(f"{who}(strength={strength!r}): must be a finite number >= 0, or a schedule that stays so")


@dataclass(frozen=True, kw_only=True)
class Proximal(Mechanism):
    """Proximal steps: after the optimizer's step, one step of the prox of the distance to the target.

        l2:  w <- (w + t q) / (1 + t)                         prox of t/2 |w - Q|^2
        l1:  w <- q + sign(w - q) max(|w - q| - t, 0)         prox of t |w - Q|, q = project(w)

    with t = strength * learning rate (`by_rate`), or t = strength.

    Args:
        strength: >= 0, a number or a schedule; 0 is the base optimizer, bitwise.
        norm: "l2" comes near the target and never arrives; "l1" arrives.
        every: steps between proximal steps, >= 1.
        by_rate: multiply by the optimizer's learning rate of the step, as a proximal gradient method does.
        start: moment the pull starts.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> import detent as dt
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.Proximal(strength=0.1, norm="l1"))

    Reference: Bai, Wang, Liberty, "ProxQuant", arXiv 1810.00861, eqs. 6 and 7.
    """

    strength: Number
    norm: Literal["l2", "l1"] = "l2"
    every: int = 1
    by_rate: bool = True
    start: Moment = 0

    keeps_full_life: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_strength(self.strength, "Proximal")
        if self.norm not in ("l2", "l1"):
            raise ValueError(f'Proximal(norm={self.norm!r}): must be "l2" or "l1"')
        if not is_whole(self.every):
            raise ValueError(f"Proximal(every={self.every!r}): must be >= 1 step, a whole number")
        super().__post_init__()

    def active(self, clock: Clock) -> bool:
        started = clock.step >= step_at(self.start, clock.total_steps, "Proximal.start")
        return started and value_at(self.strength, clock.step, clock.total_steps) > 0

    def after_step(self, slot: Slot, clock: Clock) -> None:
        if (clock.step + 1) % self.every:
            return
        t = value_at(self.strength, clock.step, clock.total_steps) * (slot.rate() if self.by_rate else 1.0)
        slot.write_once("prox", slot.weight, lambda: self._nearer(slot, t))

    def _nearer(self, slot: Slot, t: float) -> Tensor:
        q = slot.pull_project(slot.weight)
        if self.norm == "l2":
            return slot.weight.add(q, alpha=t).div_(1.0 + t)
        gap = slot.weight - q
        return q.add_(gap.sign().mul_(gap.abs().sub_(t).clamp_min_(0.0)))
