"""Mechanisms that act on the weight after the step: hard projection, and staying inside the range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from detent.mechanisms.base import Clock, Mechanism, Slot
from detent.schedules import Moment, step_at
from detent.targets import Params, Target

__all__ = ["Clip", "HardProjection"]


def clip_to_range(w: Tensor, target: Target, params: Params) -> None:
    """Clamp w in place to the limits of a bounded target; an unbounded target leaves it alone."""
    limits = target.limits(params)
    if limits is not None:
        limits = limits.to(w.dtype)
        torch.clamp_(w, min=-limits, max=limits)


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
        start: moment (step or fraction of training) clipping starts, with a fresh fit; `None` for when the fit is
            frozen.

    Example:
        >>> import detent as dt
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.Clip())
    """

    start: Moment | None = 0.0

    keeps_full_life: ClassVar[bool] = True

    @property
    def fit_every(self) -> int:
        return 100

    @property
    def fit_until(self) -> Moment | None:
        return 0.3

    def wants_fit(self, clock: Clock) -> bool:
        return clipping_begins(self.start, clock)

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
        if self.every < 1:
            raise ValueError(f"HardProjection(every={self.every}): must be >= 1 step")

    @property
    def fit_every(self) -> int:
        return self.every

    @property
    def fit_at_end(self) -> bool:
        return True

    def active(self, clock: Clock) -> bool:
        return clock.step >= step_at(self.start, clock.total_steps, "HardProjection.start")

    def before_step(self, slot: Slot, clock: Clock) -> None:
        mask = slot.state.get("mask")
        if mask is not None and slot.grad is not None:
            slot.grad.mul_(mask)

    def after_step(self, slot: Slot, clock: Clock) -> None:
        mask = slot.state.get("mask")
        if mask is not None:
            # Momentum and weight decay of another rule's making may still move them: put them back.
            slot.weight.mul_(mask)
        if (clock.step + 1) % self.every == 0:
            slot.weight.copy_(slot.project(slot.weight))
            if self.masks:
                slot.state["mask"] = slot.weight != 0
