"""The gain that PSG sets by itself: as much as keeps the descent, and what the rate can bear where weights are late."""

from __future__ import annotations

import torch
from torch import Tensor

from detent.mechanisms.cadence import Clock
from detent.schedules import Moment, step_at

__all__ = ["BEGIN", "MOST", "descent", "kept_gain", "measures", "ramp", "spread_of"]

BEGIN: Moment = 0.4  # of training: until then the base optimizer runs untouched
_RAMP = 0.5  # of what is left after that: the strength has come to 1
_EVERY = 10  # steps
_FASTEST = 4.0  # times the gain that keeps the descent
_LEAST = 1 / 16  # where nearly all has settled, the few weights that are left are not stirred without end
MOST = _FASTEST / _LEAST  # gain of all


def ramp(begin: Moment, clock: Clock) -> float:
    """The strength at a step: 0 up to `begin`, then a straight line to 1 at half of what is left.

    Example:
        >>> [ramp(0.4, Clock(step=step, total_steps=100)) for step in (40, 55, 70, 99)]
        [0.0, 0.5, 1.0, 1.0]
    """
    total = step_at(1.0, clock.total_steps, "PSG.gain")
    first = step_at(begin, clock.total_steps, "PSG.start")
    return min(max(clock.step - first, 0) / max(_RAMP * (total - first), 1.0), 1.0)


def measures(begin: Moment, clock: Clock) -> bool:
    """Whether F is found anew in a step: it changes slowly, and to look at it takes longer than to use it.

    Example:
        >>> [step for step in range(41, 70) if measures(0.4, Clock(step=step, total_steps=100))]
        [50, 60]
    """
    return (clock.step - step_at(begin, clock.total_steps, "PSG.start")) % _EVERY == 0


def descent(g: Tensor, factor: Tensor) -> Tensor:
    """How fast the loss falls, at first order, with factors on the gradient and without: `(sum g^2 f, sum g^2)`.

    Args:
        g: gradient, or step.
        factor: f, for each entry.

    Example:
        >>> descent(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])).tolist()
        [3.0, 5.0]
    """
    squares = (g if g.dtype == torch.float64 else g.float()).square()
    return torch.stack([(squares * factor).sum(), squares.sum()])


def spread_of(sums: Tensor) -> Tensor:
    """F = sum g^2 f / sum g^2, at least 1 / 16: about 1 for weights anywhere, near 0 for settled ones.

    Args:
        sums: of the whole tensor, as `descent` has them, with f the factor at gain 1.

    Example:
        >>> spread_of(torch.tensor([0.5, 1.0])).item()
        0.5
    """
    # Without a gradient to speak of nothing moves, whatever the gain.
    return (sums[0] / sums[1]).nan_to_num_(nan=1.0, posinf=1.0).clamp_min_(_LEAST)


def kept_gain(spread: Tensor, heat: float) -> Tensor:
    """The gain that a tensor has in a step.

        gain = clamp(heat, 1 / F, 4 / F)

    At 1 / F the loss falls at first order as fast as under the base optimizer, however many weights have settled. Where
    the rate has come down, weights are stirred more, as far as they moved at the highest rate: what does not settle
    now never will.

    Args:
        spread: F of the whole tensor.
        heat: highest learning rate of the training, as far as it is known, over the one of this step.

    Example:
        >>> [kept_gain(torch.tensor(0.5), heat).item() for heat in (1.0, 5.0, 100.0)]
        [2.0, 5.0, 8.0]
    """
    return (spread * heat).clamp_(1.0, _FASTEST).div_(spread)
