"""Mechanisms with hidden real weights: the optimizer moves a latent, the forward pass sees its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from detent.mechanisms.base import Clock, Mechanism, Slot
from detent.schedules import Moment, step_at

__all__ = ["STE"]


@dataclass(frozen=True, kw_only=True)
class STE(Mechanism):
    """Straight-through estimator: forward and backward at `project(latent)`, the gradient moves the latent as it is.

        w = project(a),    a <- a - lr * dL/dw

    The full life of the checkpoint is what the forward pass last saw, that is the compressed one; the latent is
    training state and rides with the optimizer's.

    Args:
        start: moment the projection starts; before it the base optimizer runs untouched.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.STE())])
        >>> run = dt.attach(model, optimizer, recipe)
        >>> len(model.weight.unique()) <= 3
        True

    Reference: Courbariaux et al., "BinaryConnect", arXiv 1511.00363; Bengio et al., arXiv 1308.3432.
    """

    start: Moment = 0

    keeps_full_life: ClassVar[bool] = False
    memory: ClassVar[tuple[str, ...]] = ("latent",)

    def active(self, clock: Clock) -> bool:
        return clock.step >= step_at(self.start, clock.total_steps, "STE.start")

    def open(self, slot: Slot, clock: Clock) -> None:
        if self.active(clock):
            slot.state["latent"] = slot.weight.clone()
            slot.weight.copy_(slot.project(slot.weight))

    def before_step(self, slot: Slot, clock: Clock) -> None:
        if "latent" in slot.state:
            slot.weight.copy_(slot.state["latent"])

    def after_step(self, slot: Slot, clock: Clock) -> None:
        if "latent" in slot.state:
            slot.state["latent"].copy_(slot.weight)
        else:
            slot.state["latent"] = slot.weight.clone()
        slot.weight.copy_(slot.project(slot.state["latent"]))

    def undo(self, slot: Slot, clock: Clock) -> None:
        if "latent" in slot.state:
            slot.weight.copy_(slot.project(slot.state["latent"]))
