"""Schedules: a step number in, a strength out.

Every strength in Detent (`PSG(strength=...)`, `eps`, a mirror map's beta) takes a plain number or a
`Schedule`. Moments (`start=`, `fit_until=`, the ends of a ramp) are a step number when given as an `int`
and a fraction of the whole training when given as a `float` in [0, 1].
"""

from __future__ import annotations

import abc
import math
import sys
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

__all__ = [
    "Cosine",
    "Cubic",
    "Exponential",
    "Growth",
    "Linear",
    "Moment",
    "Number",
    "Schedule",
    "Sigmoid",
    "check_moment",
    "check_types",
    "ends_of",
    "is_finite",
    "is_number",
    "is_whole",
    "moments_of",
    "step_at",
    "value_at",
]

Moment: TypeAlias = int | float


def is_number(value: object) -> bool:
    """Whether a value is a plain number (True and False are not, nor is a whole number that no float can hold).

    Example:
        >>> is_number(1.5), is_number(True), is_number("1.5"), is_number(10**400)
        (True, False, False, False)
    """
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)


def is_finite(value: object) -> bool:
    """Whether a value is a plain number that a float can hold (True and False are not).

    Example:
        >>> is_finite(1.5), is_finite(math.inf), is_finite(math.nan), is_finite(10**400), is_finite("1.5")
        (True, False, False, False, False)
    """
    # math.isfinite would raise for a whole number too large for a float.
    return isinstance(value, (int, float)) and is_number(value) and abs(value) <= sys.float_info.max


def is_whole(value: object, least: float = 1, most: float = math.inf) -> bool:
    """Whether a value is a whole number within bounds, both included (True and False are not).

    Example:
        >>> is_whole(2), is_whole(0), is_whole(9, 2, 8), is_whole(2.0), is_whole(True)
        (True, False, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_moment(moment: Moment, field: str) -> None:
    """Refuse what is no moment of any training.

    Raises:
        ValueError: another type, a negative step, or a fraction outside [0, 1].

    Example:
        >>> check_moment(0.3, "PSG.start")
    """
    if not is_number(moment):
        raise ValueError(f"{field}={moment!r}: must be a step number (int) or a fraction of training (float)")
    step_at(moment, 1, field)


def step_at(moment: Moment, total_steps: int | None, field: str) -> int:
    """Turn a moment into a step number.

    An `int` is already a step; a `float` f in [0, 1] means step `round(f * total_steps)`.

    Args:
        moment: step number (>= 0) or fraction of training in [0, 1].
        total_steps: optimizer steps in the whole training, or `None` if unknown.
        field: name used in the error.

    Raises:
        ValueError: a negative step, a fraction outside [0, 1], or a fraction without `total_steps`.

    Example:
        >>> step_at(0.25, 1000, "start"), step_at(7, None, "start")
        (250, 7)
    """
    if isinstance(moment, int):
        if moment < 0:
            raise ValueError(f"{field}={moment}: a step number must be >= 0")
        return moment
    if not 0.0 <= moment <= 1.0:
        raise ValueError(f"{field}={moment}: a fraction of training must lie in [0, 1]; give an int for a step number")
    if total_steps is None:
        if moment == 0.0:
            return 0
        raise ValueError(
            "pass total_steps= (calls of optimizer.step() in the whole training) to attach: "
            f"{field}={moment} is a fraction of it; or give that as an int, a step number"
        )
    return round(moment * total_steps)


def _declared(annotation: object) -> tuple[str, bool]:
    """The name of a field's one type besides `None` ("" if there are several), and whether `None` is among them.

    Read off the annotation as it stands: a stranger's may name what cannot be looked up at run time.
    """
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    names = [name.strip() for name in text.split("|")]
    others = [name for name in names if name != "None"]
    return others[0] if len(others) == 1 else "", len(others) < len(names)


def _is_moment(declared: str) -> bool:
    return declared.rpartition(".")[2] == "Moment"


def moments_of(obj: Any) -> dict[str, Any]:
    """The moments among what an object holds, by name, but for those that are `None`.

    Those are the fields declared as `Moment`, and by convention all others whose name ends in "start" or "until",
    unless they are declared as `bool`.

    Example:
        >>> from detent import CodebookLearning
        >>> moments_of(CodebookLearning(ste_from=0.5, reassign_until=9))
        {'ste_from': 0.5, 'reassign_until': 9}
    """
    declared = {f.name: _declared(f.type)[0] for f in (fields(obj) if is_dataclass(obj) else ())}
    held: dict[str, Any] = vars(obj)
    return {
        name: value
        for name, value in held.items()
        if value is not None
        and declared.get(name) != "bool"
        and (_is_moment(declared.get(name, "")) or name.endswith(("start", "until")))
    }


def check_types(obj: Any) -> None:
    """Refuse fields of a dataclass whose value is not of the type they are declared with.

    Looked at are `bool`, `int`, `float` and `Moment`, each also with `| None`; fields of other types, and ranges, are
    for the class itself to check. Whatever a class has for a default is right.

    Raises:
        ValueError: anything but True and False, a bool or a fraction for a whole number, no number at all, or what is
            no moment of any training.

    Example:
        >>> @dataclass(frozen=True)
        ... class Every:
        ...     steps: int = 1
        >>> check_types(Every(3))
        >>> check_types(Every(True))
        Traceback (most recent call last):
        ...
        ValueError: Every(steps=True): must be a whole number
    """
    who = type(obj).__name__
    for f in fields(obj):
        value: Any = getattr(obj, f.name)
        declared, may_be_none = _declared(f.type)
        if value is f.default or (value is None and may_be_none):
            continue
        must = None
        if declared == "bool" and not isinstance(value, bool):
            must = "True or False"
        elif declared == "int" and not is_whole(value, -math.inf):
            must = "a whole number"
        elif declared == "float" and not (is_number(value) and value == value):
            must = "a number"
        elif _is_moment(declared):
            check_moment(getattr(obj, f.name), f"{who}.{f.name}")
        if must is not None:
            raise ValueError(f"{who}({f.name}={value!r}): must be {must}{', or None' if may_be_none else ''}")


class Schedule(abc.ABC):
    """A pure function from the step number to a strength.

    Example:
        >>> ramp = Linear(first=0.0, last=1.0, begin=0, end=10)
        >>> [ramp(step, None) for step in (0, 5, 10, 99)]
        [0.0, 0.5, 1.0, 1.0]
    """

    def __post_init__(self) -> None:
        check_types(self)

    @abc.abstractmethod
    def __call__(self, step: int, total_steps: int | None) -> float:
        """The value at `step` (0 is the first optimizer step)."""

    def bounds(self) -> tuple[float, float] | None:
        """The values between which the schedule stays, if it knows them."""
        return None

    def settles(self, total_steps: int | None) -> int | None:
        """The step from which it keeps its last value, or `None` if it has none or does not tell."""
        return None


@dataclass(frozen=True, kw_only=True)
class _Ramp(Schedule):
    """A change from `first` to `last` between two moments, constant outside them."""

    first: float
    last: float
    begin: Moment = 0.0
    end: Moment = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("first", "last"):
            value = getattr(self, field)
            if not is_finite(value):
                raise ValueError(f"{name}({field}={value!r}): must be a finite number")
        for field in ("begin", "end"):
            check_moment(getattr(self, field), f"{name}.{field}")
        if type(self.begin) is type(self.end) and self.end < self.begin:
            raise ValueError(f"{name}(begin={self.begin}, end={self.end}): must not end before it begins")
        super().__post_init__()

    def __call__(self, step: int, total_steps: int | None) -> float:
        name = type(self).__name__
        begin = step_at(self.begin, total_steps, f"{name}.begin")
        end = step_at(self.end, total_steps, f"{name}.end")
        if step >= end:
            return self.last
        if step <= begin:
            return self.first
        return self._between((step - begin) / (end - begin))

    def bounds(self) -> tuple[float, float]:
        """Its two ends."""
        return self.first, self.last

    def settles(self, total_steps: int | None) -> int:
        return step_at(self.end, total_steps, f"{type(self).__name__}.end")

    @abc.abstractmethod
    def _between(self, t: float) -> float:
        """The value at progress t in (0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Linear(_Ramp):
    """Straight line: `first + (last - first) t`.

    Args:
        first: value up to `begin`.
        last: value from `end` on.
        begin: moment the change starts (int step or fraction of training).
        end: moment the change is over.

    Example:
        >>> Linear(first=0.05, last=0.0, end=0.8)(400, 1000)
        0.025
    """

    def _between(self, t: float) -> float:
        return self.first + (self.last - self.first) * t


@dataclass(frozen=True, kw_only=True)
class Cosine(_Ramp):
    """Half a cosine: `last + (first - last) (1 + cos(pi t)) / 2`.

    Args:
        first: value up to `begin`.
        last: value from `end` on.
        begin: moment the change starts.
        end: moment the change is over.

    Example:
        >>> round(Cosine(first=1.0, last=0.0)(250, 1000), 4)
        0.8536
    """

    def _between(self, t: float) -> float:
        return self.last + (self.first - self.last) * 0.5 * (1.0 + math.cos(math.pi * t))


@dataclass(frozen=True, kw_only=True)
class Cubic(_Ramp):
    """Fast first, slow last: `last + (first - last) (1 - t)^3`, the usual ramp of a sparsity.

    Reference: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1.

    Args:
        first: value up to `begin`.
        last: value from `end` on.
        begin: moment the change starts.
        end: moment the change is over.

    Example:
        >>> Cubic(first=0.0, last=0.9)(500, 1000)
        0.7875
    """

    def _between(self, t: float) -> float:
        return self.last + (self.first - self.last) * (1.0 - t) ** 3


@dataclass(frozen=True, kw_only=True)
class Exponential(_Ramp):
    """Constant factor a step: `first (last / first)^t`; both ends must be positive.

    Args:
        first: value up to `begin`, > 0.
        last: value from `end` on, > 0.
        begin: moment the change starts.
        end: moment the change is over.

    Raises:
        ValueError: an end that is not positive.

    Example:
        >>> round(Exponential(first=1.0, last=1e4)(500, 1000), 6)
        100.0
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first <= 0 or self.last <= 0:
            raise ValueError(f"Exponential(first={self.first}, last={self.last}): both must be > 0")
        if not (is_finite(self.last / self.first) and self.last / self.first > 0):
            raise ValueError(f"Exponential(first={self.first}, last={self.last}): too far apart for a float")

    def _between(self, t: float) -> float:
        return self.first * (self.last / self.first) ** t


@dataclass(frozen=True, kw_only=True)
class Sigmoid(_Ramp):
    """An S-curve cut and stretched to its ends: `first + (last - first) (s(t) - s(0)) / (s(1) - s(0))`.

    Here `s(t) = 1 / (1 + exp(steepness (1/2 - t)))`: slow, fast, slow.

    Args:
        first: value up to `begin`.
        last: value from `end` on.
        begin: moment the change starts.
        end: moment the change is over.
        steepness: how sudden the middle is, in (0, 500]; nearly a straight line below 1.

    Raises:
        ValueError: a steepness outside its range.

    Example:
        >>> Sigmoid(first=1.0, last=0.0)(500, 1000)
        0.5

    Reference: Jin et al., "PARQ", arXiv 2503.15748 (the annealing of its inverse slope).
    """

    steepness: float = 10.0

    def __post_init__(self) -> None:
        if not (is_number(self.steepness) and 0 < self.steepness <= 500):
            raise ValueError(f"Sigmoid(steepness={self.steepness!r}): must lie in (0, 500]")
        super().__post_init__()

    def _between(self, t: float) -> float:
        def s(t: float) -> float:
            return 1.0 / (1.0 + math.exp(self.steepness * (0.5 - t)))

        return self.first + (self.last - self.first) * (s(t) - s(0.0)) / (s(1.0) - s(0.0))


@dataclass(frozen=True, kw_only=True)
class Growth(Schedule):
    """Multiplied by `factor` every so many steps, up to a cap: `min(first factor^ceil(step / every), last)`.

    The timing is that of the released mirror-descent code, whose test `step % every == 0` comes after the step: the
    first multiplication follows step 0 already. `factor = (last / first) ** (every / total_steps)` just reaches it.

    Args:
        first: value in step 0, > 0.
        factor: what it is multiplied by, >= 1.
        every: steps between multiplications, >= 1.
        last: the cap, >= first.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> beta = Growth(factor=2.0, every=100, last=5.0)
        >>> [beta(step, None) for step in (0, 1, 100, 101, 201)]
        [1.0, 2.0, 2.0, 4.0, 5.0]

    Reference: the released code of Ajanthan et al., arXiv 1910.08237 (there the cap is 1e35; PMF's is 1e4).
    """

    first: float = 1.0
    factor: float
    every: int
    last: float = 1e4

    def __post_init__(self) -> None:
        if not (is_finite(self.factor) and self.factor >= 1):
            raise ValueError(f"Growth(factor={self.factor!r}): must be a finite number >= 1")
        if not is_whole(self.every):
            raise ValueError(f"Growth(every={self.every!r}): must be >= 1 step, a whole number")
        if not (is_finite(self.first) and is_finite(self.last) and 0 < self.first <= self.last):
            raise ValueError(f"Growth(first={self.first!r}, last={self.last!r}): need 0 < first <= last, both finite")
        if not is_finite(self.last / self.first):
            raise ValueError(f"Growth(first={self.first!r}, last={self.last!r}): too far apart for a float")
        super().__post_init__()

    def __call__(self, step: int, total_steps: int | None) -> float:
        times = -(-step // self.every)
        # The power itself may overflow long before the training ends; its logarithm does not.
        if times * math.log(self.factor) >= math.log(self.last / self.first):
            return self.last
        return self.first * self.factor**times

    def bounds(self) -> tuple[float, float]:
        """Its start and its cap."""
        return self.first, self.last


Number: TypeAlias = float | Linear | Cosine | Cubic | Exponential | Sigmoid | Growth


def ends_of(value: float | Schedule) -> tuple[float, ...]:
    """The values between which a number or a schedule stays; none if a schedule does not tell.

    Example:
        >>> ends_of(0.3), ends_of(Linear(first=0.0, last=1.0))
        ((0.3,), (0.0, 1.0))
    """
    return (value.bounds() or ()) if isinstance(value, Schedule) else (value,)


def value_at(value: float | Schedule, step: int, total_steps: int | None) -> float:
    """The number itself, or the schedule's value at `step`.

    Example:
        >>> value_at(0.3, 5, None), value_at(Linear(first=0, last=1, end=10), 5, None)
        (0.3, 0.5)
    """
    return value(step, total_steps) if isinstance(value, Schedule) else float(value)
