"""What a mechanism is: whatever happens around `optimizer.step()`, one claimed weight at a time."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from detent.mechanisms.cadence import Cadence, Clock
from detent.schedules import check_types
from detent.targets import Params, Target
from detent.targets.base import Lines

__all__ = ["Cadence", "Clock", "Mechanism", "Slot", "never_zero"]

_LEAST = 2.0**-40  # share of the largest weighing below which one says "none", and size decides


@dataclass(kw_only=True)
class Slot:
    """One claimed weight as a mechanism sees it. Tensors are what this process holds (a shard under FSDP2).

    Args:
        name: canonical parameter name.
        weight: what the optimizer moves, written in place: the weight, or in half precision a float32 copy in its place
            where the mechanism `moves` a memory.
        seen: the weight itself, which the forward pass sees, written in place.
        grad: the gradient, written in place; `None` if the parameter got none.
        fill: gives a parameter that got no gradient one of zeros, for the optimizer too, and returns it.
        target: where the weight may end.
        params: fitted params of `target` (for the shard held here).
        pull: what the mechanism pulls towards; `target` unless the mechanism has `toward`.
        pull_params: fitted params of `pull`.
        project: nearest point of `target`, right also under sharding.
        pull_project: nearest point of `pull`, right also under sharding.
        pull_free: mask of weights `pull` leaves free, right also under sharding, or `None`.
        relax: `target.relax(w, beta)`, right also under sharding.
        gather: the whole tensor of a part like the weight; a collective under sharding, so every rank must call it.
        total: the sum of a number a rank over the parts of the weight; a collective under sharding.
        rate: gives the optimizer's learning rate of this step.
        heat: gives the highest learning rate so far, or that a scheduler has announced, over the one of this step; for
            mechanisms that ask for it by `finds`.
        moments: gives the optimizer's own tensors of the weight's shape (momentum), by name; written in place.
        install: takes params that the mechanism has moved itself (a learned codebook) as the fitted ones.
        frozen: the fit is over: params do not change any more.
        plain: the optimizer's step is linear in the gradient (SGD), so a scaled gradient is a scaled step.
        decay: gives what decoupled weight decay takes off in this step, as a fraction of the weight.
        grad_scale: factor the gradients still carry (a fused step under GradScaler), or `None`.
        sign: -1 where the optimizer climbs (`maximize=True`), else 1: what is added to a gradient carries it.
        pruned: mask of the zeros that earlier stages hold, or `None`.
        state: the mechanism's memory for this weight, saved and resumed by the engine.
        found: numbers of the whole weight that the mechanism has found and can find again, by name: saved and resumed,
            as plain numbers, but a training may go on without them. "peak" is the highest learning rate so far.
        scratch: passing tensors between the two halves of one step, never saved.
        landed: parts that `write_once` has written in this step.
        log: what it is about to write.
    """

    name: str
    weight: Tensor
    seen: Tensor
    grad: Tensor | None
    fill: Callable[[], Tensor]
    target: Target
    params: Params
    pull: Target
    pull_params: Params
    project: Callable[[Tensor], Tensor]
    pull_project: Callable[[Tensor], Tensor]
    pull_free: Callable[[Tensor], Tensor | None]
    relax: Callable[[Tensor, float], Tensor]
    gather: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]
    rate: Callable[[], float]
    heat: Callable[[], float]
    moments: Callable[[], dict[str, Tensor]]
    install: Callable[[Params], None]
    frozen: bool
    plain: bool
    decay: Callable[[], float]
    grad_scale: Tensor | None
    sign: float
    pruned: Tensor | None
    state: dict[str, Tensor]
    found: dict[str, Any]
    scratch: dict[str, Tensor] = field(default_factory=dict)
    landed: frozenset[str] = frozenset()
    log: Tensor | None = None

    def with_now(self, **now: Any) -> Slot:
        """The same weight in the step at hand, with these fields; `dataclasses.replace` takes ten times as long."""
        fresh = object.__new__(type(self))
        vars(fresh).update(vars(self), scratch={}, **now)
        return fresh

    def project_into(self, w: Tensor, out: Tensor) -> None:
        """Write the nearest point of `target` to another tensor."""
        if self.params.layout.rows is None or self.target.scope in ("element", "row"):
            self.target.project_into(w, self.params, out)
        else:
            out.copy_(self.project(w))

    def relax_into(self, w: Tensor, beta: float, out: Tensor) -> None:
        """Write `target.relax(w, beta)` to another tensor."""
        lined = Lines.of(self.target, self.params, w, out)
        if not lined.apart:
            out.copy_(self.relax(w, beta))
            return
        for params, x, seen in lined.pieces():
            self.target.relax_into(x, params, beta, seen)

    def write_once(self, part: str, place: Tensor, make: Callable[[], Tensor]) -> None:
        """Write over a weight, or part of it, what is not the same made twice: a step that was broken off goes on.

        What is to be written is logged first, so that it is made from what the optimizer left and nothing else.

        Args:
            part: its name, one of its own for each.
            place: where to.
            make: gives a new tensor.
        """
        if part in self.landed:
            return
        if self.log is None:
            self.log = make()
        place.copy_(self.log)
        self.landed, self.log = self.landed | {part}, None


class Mechanism(abc.ABC):
    """How training pulls weights to their target: three moments around the optimizer's step.

    Final subclasses are frozen keyword-only dataclasses; what they remember lives in `Slot.state`.

    Class attributes:
        keeps_full_life: the weights the forward pass sees stay full precision, so one checkpoint has two useful lives.
        memory: names of the tensors kept between steps (empty: resuming needs nothing but the weights).
        offset: name of the memory that is added to the weights before the pull is fitted (ADMM's dual); the compressed
            life is still that of the weights alone. `None` for no offset.
        weighing: name of the memory that the weights (and the offset) are multiplied with before anything is fitted to
            them: how much each weight matters to which of them survive. `None` for no weighing.
        moves: name of the memory that the optimizer moves in place of the weights (a latent). It is float32 where
            weights are narrower, so that small steps are not lost in rounding; only what the forward pass sees is
            rounded. `None` where the weights themselves are moved.
        ties: weights share one value and must be moved alike, which only an optimizer that treats every weight by
            itself does (SGD, Adam; not Muon).

    Example:
        >>> from detent import PSG, STE
        >>> PSG().keeps_full_life, STE().keeps_full_life
        (True, False)
    """

    keeps_full_life: ClassVar[bool]
    memory: ClassVar[tuple[str, ...]] = ()
    offset: ClassVar[str | None] = None
    weighing: ClassVar[str | None] = None
    moves: ClassVar[str | None] = None
    ties: ClassVar[bool] = False
    # Lets a recipe file be checked field by field although fields may hold abstract types.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        check_types(self)  # a class with ranges of its own checks those first, and says them

    @property
    def pull(self) -> Target | None:
        """Another target to pull towards during training, or `None` for the rule's own."""
        return None

    def cadence(self, target: Target) -> Cadence:
        """When `target`, what it pulls to, is fitted; a rule's `fit_every` and `fit_until` go before it."""
        return Cadence()

    @property
    def norm_limit(self) -> float | None:
        """Largest total gradient norm after `before_step`, or `None`; the engine clips to it."""
        return None

    @property
    def said(self) -> str:
        """What it finds for itself in training, for the reader of a plan; empty if all is given."""
        return ""

    @property
    def finds(self) -> tuple[str, ...]:
        """Names of what it keeps in `Slot.found`; with any, the learning rate is followed from the first step on."""
        return ()

    def check(self, target: Target) -> str | None:
        """Why this mechanism means nothing on this target, in one sentence, or `None` if it does."""
        return None

    def mapping(self, target: Target, clock: Clock) -> tuple[int, str] | None:
        """The step at which the last weights are in their target, or as near as they come, and its name, or `None`.

        `None` too if it never begins: a `start` that never comes is no mistake, the base optimizer is then left alone.
        """
        return None

    @abc.abstractmethod
    def active(self, clock: Clock) -> bool:
        """Whether this step is touched at all; an inactive step is bitwise the base optimizer's."""

    def open(self, slot: Slot, clock: Clock) -> None:
        """Called once when training starts, before the first forward pass."""

    def before_step(self, slot: Slot, clock: Clock) -> None:
        """First moment: the gradient is there, the optimizer has not run."""

    def after_step(self, slot: Slot, clock: Clock) -> None:
        """Last moment: the optimizer has run. Broken off by an exception, it is called once more with the same slot.

        Left out where the full life is the plain weights and this step moved none (no gradient, frozen, rate 0).
        """

    def before_together(self, slots: Sequence[Slot], clock: Clock) -> None:
        """All weights of one rule and one optimizer at once, before the first moment of each."""

    def after_together(self, slots: Sequence[Slot], clock: Clock) -> None:
        """All weights of one rule and one optimizer at once, after the last moment of each; called again like it."""

    def after_fit(self, slot: Slot, clock: Clock) -> None:
        """With a cadence `after` the step: the pull has just been fitted to the weights (and the offset)."""

    def undo(self, slot: Slot, clock: Clock) -> None:
        """The optimizer's step raised: put the weight back as the forward pass last saw it."""

    def hidden(self, slot: Slot) -> Tensor:
        """The weights that are fitted and projected: the latent if there is one, else the weights themselves."""
        return slot.state.get("latent", slot.weight)


def never_zero(weighing: Tensor) -> Tensor:
    """A whole tensor's weighing without (near-)zero entries, which would make large weights nothing: `max(h, floor)`.

    The floor is 2^-40 of the largest entry, and at least what can still be squared. Above it nothing changes; weights
    below it are told apart by size alone, in effect after all others, so that a count asked for is kept.

    Example:
        >>> never_zero(torch.tensor([1.0, 0.25, 0.0])).tolist() == [1.0, 0.25, 2.0**-40]
        True
    """
    return weighing.clamp_min((weighing.max() * _LEAST).clamp_min(torch.finfo(weighing.dtype).tiny ** 0.5))
