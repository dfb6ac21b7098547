"""When the target of a rule is fitted to the weights: a value, and whether a step is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from detent.schedules import Moment, step_at

__all__ = ["Cadence", "Clock"]

_OFTEN, _RARELY = 10, 100  # steps between fits at first, and later
_YOUNG = 1000  # steps of training that count as "at first": weights move most while the rate is large


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Where training is: `step` ticks done so far, of `total_steps` (or `None` if unknown).

    Example:
        >>> Clock(step=0, total_steps=1000).step
        0
    """

    step: int
    total_steps: int | None


def _never(clock: Clock) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When a target is fitted: by periods until a moment, and at whatever steps the mechanism needs a fresh fit.

        due  <=>  step < until and (step % every == 0 or at(step))

    A fit costs 10 to 100 times what the rest of a step of a mechanism does. The default period of 10 steps in the first
    1,000 of a training (or a stage) and 100 from there on keeps that to a few percent of training.

    Args:
        every: steps between fits, >= 1; `None` for the default above; 0 for no periods, `at` alone.
        until: moment from which the fit is frozen; `None` for never.
        at: whether a step needs a fit for its own sake, also after `until` (but not where a rule has set `fit_until`).
        last: the fit of a period comes in its last step instead of its first.
        after: it comes after the optimizer's step, in the last one of a period, and `Mechanism.after_fit` follows.
        own: fields of a rule (`fit_every`, `fit_until`) that are refused, as the mechanism says itself when it fits.

    Example:
        >>> cadence = Cadence(until=0.5)
        >>> [step for step in range(100) if cadence.due(Clock(step=step, total_steps=100))]
        [0, 10, 20, 30, 40]
        >>> print(cadence)
        fitted every 10 steps (100 after step 1,000) until 0.5 of training
    """

    every: int | None = None
    until: Moment | None = None
    at: Callable[[Clock], bool] = _never
    last: bool = False
    after: bool = False
    own: tuple[Literal["fit_every", "fit_until"], ...] = ()
    binding: bool = False

    def asked(self, *, every: int | None, until: Moment | None) -> Cadence:
        """With what a rule says of it; `None` leaves it as it is."""
        mine = self if every is None else replace(self, every=every)
        return mine if until is None else replace(mine, until=until, binding=True)

    def ends(self, total_steps: int | None, name: str = "fit_until") -> int | None:
        """The step from which the fit is frozen, or `None`.

        Raises:
            ValueError: a fraction of a training whose length is not known, naming the field.
        """
        return None if self.until is None else step_at(self.until, total_steps, name)

    def due(self, clock: Clock) -> bool:
        """Whether the step at hand needs a fit. Whether it had it already is the caller's to know."""
        end, asked = self.ends(clock.total_steps), self.at(clock)
        if end is None or clock.step < end:
            return asked or self._opens(clock.step)
        return asked and not self.binding

    def _opens(self, step: int) -> bool:
        every = self.every
        if every is None:
            every = _OFTEN if step < _YOUNG else _RARELY
        return every > 0 and step % every == (every - 1 if self.last or self.after else 0)

    def __str__(self) -> str:
        if self.every == 0:
            return "fitted when its mechanism says so"
        plain = {None: f"every {_OFTEN} steps ({_RARELY} after step {_YOUNG:,})", 1: "every step"}
        often = plain.get(self.every, f"every {self.every} steps")
        if self.until is None:
            return f"fitted {often}"
        if self.until == 0 or (self.until == 1 and isinstance(self.until, int)):
            return "fitted once"
        at = f"step {self.until}" if isinstance(self.until, int) else f"{self.until:g} of training"
        return f"fitted {often} until {at}"
