"""The gain that PSG sets by itself: as much as keeps the descent, and what the rate can bear where weights are late."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detent.mechanisms.cadence import Clock
from detent.schedules import Moment, step_at

__all__ = ["BEGIN", "Descent", "kept_gain", "ramp"]

BEGIN: Moment = 0.4  # of training: until then the base optimizer runs untouched
_RAMP = 0.5  # of what is left after that: the strength has come to 1
_MOST = 4.0  # times the gain that keeps the descent
_LEAST = 1 / 16  # where nearly all has settled, the few weights that are left are not stirred without end


def ramp(begin: Moment, clock: Clock) -> float:
    """The strength at a step: 0 up to `begin`, then a straight line to 1 at half of what is left.

    Example:
        >>> [ramp(0.4, Clock(step=step, total_steps=100)) for step in (40, 55, 70, 99)]
        [0.0, 0.5, 1.0, 1.0]
    """
    total = step_at(1.0, clock.total_steps, "PSG.gain")
    first = step_at(begin, clock.total_steps, "PSG.start")
    return min(max(clock.step - first, 0) / max(_RAMP * (total - first), 1.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How fast the loss falls, at first order, with factors on the gradient and without: `(sum g^2 f, sum g^2)`.

    Example:
        >>> Descent.of(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])).sums.tolist()
        [3.0, 5.0]
    """

    sums: Tensor

    @staticmethod
    def none(like: Tensor) -> Descent:
        """Of no weights yet, in float32 or wider."""
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return Descent(sums=torch.zeros(2, dtype=wide, device=like.device))

    @staticmethod
    def of(g: Tensor, factor: Tensor) -> Descent:
        """Of a gradient, or a step, and the factor on each entry."""
        wide = g if g.dtype == torch.float64 else g.float()
        squares = wide * wide
        return Descent(sums=torch.stack([(squares * factor).sum(), squares.sum()]))

    def __add__(self, other: Descent) -> Descent:
        return Descent(sums=self.sums + other.sums)


def kept_gain(sums: Tensor, heat: float) -> Tensor:
    """The gain that a tensor has in a step.

        gain = clamp(heat, 1 / F, 4 / F),    F = sum g^2 f / sum g^2, at least 1 / 16

    At 1 / F the loss falls at first order as fast as under the base optimizer, however many weights have settled. Where
    the rate has come down, weights are stirred more, as far as they moved at the highest rate: what does not settle
    now never will.

    Args:
        sums: of the whole tensor, as `Descent` has them: sum g^2 f, with f the factor at gain 1, and sum g^2, so that
            F, their ratio, is about 1 for weights anywhere and 0 for settled ones.
        heat: highest learning rate of the training, as far as it is known, over the one of this step.

    Example:
        >>> sums = torch.tensor([0.5, 1.0])
        >>> [kept_gain(sums, heat).item() for heat in (1.0, 5.0, 100.0)]
        [2.0, 5.0, 8.0]
    """
    spread = sums[0] / sums[1]
    # Without a gradient to speak of nothing moves, whatever the gain.
    spread = torch.where(torch.isfinite(spread), spread, torch.ones_like(spread)).clamp_min(_LEAST)
    least = 1 / spread
    return torch.minimum(_MOST * least, least.clamp_min(heat))
