"""Schedules: numbers at their ends and by hand in between, moments, and refusals."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import detent as dt
from detent.mechanisms import Cadence, Clock
from detent.schedules import step_at, value_at
from detent.specs import from_spec, to_spec
from tests.cases import MECHANISMS

SHAPES = [dt.Linear, dt.Cosine, dt.Cubic, dt.Exponential]
_positive = st.floats(0.01, 100.0)


@pytest.mark.parametrize("shape", SHAPES)
@given(first=_positive, last=_positive, begin=st.integers(0, 50), length=st.integers(1, 50))
def test_a_ramp_starts_and_ends_where_it_says_and_never_turns(shape, first, last, begin, length) -> None:
    ramp = shape(first=first, last=last, begin=begin, end=begin + length)
    values = [ramp(step, None) for step in range(begin + length + 3)]
    assert values[: begin + 1] == [first] * (begin + 1) and values[begin + length :] == [last] * 3
    rises = [b - a for a, b in itertools.pairwise(values)]
    slack = 1e-12 * max(first, last)
    assert all(rise * (last - first) >= -slack * abs(last - first) for rise in rises)


@pytest.mark.parametrize(
    ("shape", "half_way"),
    [
        (dt.Linear, 1 + (9 - 1) / 2),
        (dt.Cosine, 9 + (1 - 9) * (1 + math.cos(math.pi / 2)) / 2),
        (dt.Cubic, 9 + (1 - 9) / 8),
        (dt.Exponential, math.sqrt(1 * 9)),
    ],
)
def test_half_way_by_hand(shape, half_way) -> None:
    assert shape(first=1.0, last=9.0, begin=10, end=20)(15, None) == pytest.approx(half_way, rel=1e-12)


def test_fractions_are_of_the_whole_training() -> None:
    by_fraction = dt.Linear(first=0, last=1, begin=0.25, end=0.75)
    by_step = dt.Linear(first=0, last=1, begin=50, end=150)
    assert [by_fraction(step, 200) for step in range(201)] == [by_step(step, 200) for step in range(201)]


def test_a_ramp_without_length_is_a_step() -> None:
    step = dt.Linear(first=0.0, last=1.0, begin=5, end=5)
    assert [step(t, None) for t in (4, 5, 6)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("moment", "total", "step"), [(0, None, 0), (7, None, 7), (7, 3, 7), (0.0, None, 0), (0.5, 11, 6), (1.0, 11, 11)]
)
def test_moments(moment, total, step) -> None:
    # round() takes halves to even: 0.5 of 11 is 5.5, which becomes 6
    assert step_at(moment, total, "start") == step


@pytest.mark.parametrize(
    ("moment", "total", "says"),
    [
        (-1, None, "start=-1: a step number must be >= 0"),
        (1.5, 10, r"start=1.5: a fraction of training must lie in \[0, 1\]"),
        (-0.5, 10, r"must lie in \[0, 1\]"),
        (math.nan, 10, r"must lie in \[0, 1\]"),
        (0.5, None, r"^pass total_steps= \(calls of optimizer.step\(\) in the whole training\) to attach: start=0.5"),
    ],
)
def test_moments_that_mean_nothing(moment, total, says) -> None:
    with pytest.raises(ValueError, match=says):
        step_at(moment, total, "start")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("field", ["first", "last"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_ends_must_be_finite(shape, field, bad) -> None:
    with pytest.raises(ValueError, match=rf"{shape.__name__}\({field}={bad}\): must be a finite number"):
        shape(**{"first": 1.0, "last": 2.0, field: bad})


def test_an_exponential_cannot_reach_zero() -> None:
    with pytest.raises(ValueError, match="both must be > 0"):
        dt.Exponential(first=1.0, last=0.0)


def test_ends_too_far_apart_for_their_ratio_are_refused() -> None:
    """The ratio was infinite, so that `Growth` overflowed in the middle of training and `Exponential` gave infinity."""
    with pytest.raises(ValueError, match="too far apart for a float"):
        dt.Growth(first=1e-10, last=1e308, factor=1.2, every=1)
    for first, last in ((1e-200, 1e200), (1e200, 1e-200)):
        with pytest.raises(ValueError, match="too far apart for a float"):
            dt.Exponential(first=first, last=last)
    assert dt.Growth(last=1e308, factor=1.2, every=1)(10**6, None) == 1e308


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_are_values(shape) -> None:
    ramp = shape(first=1.0, last=2.0, begin=3, end=0.5)
    assert from_spec(to_spec(ramp)) == ramp and hash(ramp) == hash(from_spec(to_spec(ramp)))
    assert type(from_spec(to_spec(ramp)).begin) is int and type(from_spec(to_spec(ramp)).end) is float


def test_a_number_is_the_schedule_that_never_changes() -> None:
    assert value_at(0.3, 5, None) == 0.3
    assert value_at(dt.Linear(first=0.0, last=1.0, begin=0, end=10), 5, None) == 0.5


# --- when targets are fitted -------------------------------------------------------------------------------------


def _due(cadence: Cadence, total: int | None, steps: int) -> list[int]:
    return [step for step in range(steps) if cadence.due(Clock(step=step, total_steps=total))]


def test_fits_come_often_at_first_and_then_rarely() -> None:
    assert _due(Cadence(), None, 1201) == [*range(0, 1000, 10), 1000, 1100, 1200]
    assert _due(Cadence(every=7), None, 30) == [0, 7, 14, 21, 28]
    assert _due(Cadence(every=7, last=True), None, 30) == [6, 13, 20, 27]
    assert _due(Cadence(every=0), None, 30) == []


def test_a_fit_that_a_mechanism_needs_comes_after_the_end_too_unless_a_rule_has_set_it() -> None:
    cadence = Cadence(every=4, until=0.5, at=lambda clock: clock.step in (3, 17))
    assert _due(cadence, 20, 20) == [0, 3, 4, 8, 17]
    assert _due(cadence.asked(every=5, until=None), 20, 20) == [0, 3, 5, 17]
    assert _due(cadence.asked(every=None, until=12), 20, 20) == [0, 3, 4, 8]
    with pytest.raises(ValueError, match="total_steps"):
        cadence.due(Clock(step=0, total_steps=None))


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_share_of_fits_is_bounded_by_default(name: str) -> None:
    """Whatever says how often it works says it itself; all others share one default."""
    mechanism = MECHANISMS[name]
    for target in (dt.Uniform(bits=4), dt.TopK(keep=0.1), dt.KernelCodebook(size=4)):
        if mechanism.check(target) is None:
            cadence = mechanism.cadence(target)
            own = getattr(mechanism, "every", None)  # it works every so often, and is fitted then
            assert cadence.every in (None, 0, own)
            assert own is not None or len(_due(cadence, 5000, 5000)) <= 160
