"""Wrong types of hyperparameters: every one is refused in a sentence, when the object is made and not in training."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import yaml
from cases import MECHANISMS, TARGETS

import detent as dt
from detent.schedules import check_types, moments_of
from detent.specs import from_spec, to_spec

# What a user may take for a flag, a whole number, a number or a moment. Each is tried on every field so declared.
_WRONG: dict[str, tuple[Any, ...]] = {
    "bool": ("no", 1, 0.0, None, []),
    "int": (True, 2.0, 2.5, "2", math.nan, []),
    "float": (True, "1", math.nan, [], 1j),
    "Number": (True, "1", math.nan, [], None),
    "Moment": (True, "1", math.nan, 1.5, -0.5, -1, []),
}

# By hand: the fields that the search below must find, or it shows nothing.
_MUST_BE_FOUND = {
    "Uniform.bits", "Uniform.zero", "Uniform.rounds", "PowerOfTwo.bits", "PowerOfTwo.zero", "LearnedLevels.k",
    "LearnedLevels.zero", "KernelCodebook.size", "KernelCodebook.codebook_bits", "KernelCodebook.zero",
    "KernelCodebook.seed", "KernelCodebook.restarts", "KernelCodebook.iterations", "KernelCodebook.sample",
    "KernelCodebook.warm_start", "VectorCodebook.block", "NM.n", "NM.m", "SparseLevels.rounds", "PSG.clip",
    "PSG.strength", "PSG.clip_start", "HardProjection.every", "HardProjection.masks", "Proximal.every",
    "Proximal.by_rate", "CodebookLearning.reassign_every", "CodebookLearning.ste_from", "ADMM.balance",
    "ADMM.per_level", "ADMM.freeze_every", "ADMM.every", "ADMM.rho_max", "STE.clip_latent", "MirrorDescent.hard_start",
    "PartialFreeze.per_level", "Growth.every", "Growth.factor", "Sigmoid.steepness", "Linear.begin",
}  # fmt: skip


def _samples() -> dict[str, Any]:
    """One sample of every public target, mechanism and schedule, by the name of its class."""
    ramps = [kind(first=1.0, last=2.0) for kind in (dt.Linear, dt.Cosine, dt.Cubic, dt.Exponential, dt.Sigmoid)]
    samples = [*TARGETS.values(), *MECHANISMS.values(), *ramps, dt.Growth(factor=2.0, every=3)]
    return {type(sample).__name__: sample for sample in reversed(samples)}


SAMPLES = _samples()


def _fields() -> dict[str, tuple[Any, str, str, bool]]:
    """(sample, field, type, whether it may be None) of every field of a type that is looked at."""
    found = {}
    for name, sample in SAMPLES.items():
        for field in dataclasses.fields(sample):
            declared = str(field.type).removesuffix(" | None")
            if declared in _WRONG:
                found[f"{name}.{field.name}"] = (sample, field.name, declared, declared != field.type)
    return found


FIELDS = _fields()


def test_the_search_for_fields_finds_them() -> None:
    assert not _MUST_BE_FOUND - set(FIELDS)
    assert {declared for _, _, declared, _ in FIELDS.values()} == set(_WRONG)


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_another_type(name: str) -> None:
    sample, field, declared, may_be_none = FIELDS[name]
    wrong = [value for value in _WRONG[declared] if not (value is None and may_be_none and declared == "Number")]
    if not may_be_none and None not in wrong:
        wrong.append(None)
    for value in wrong:
        with pytest.raises(ValueError, match=field) as caught:
            dataclasses.replace(sample, **{field: value})
        said = str(caught.value)
        assert said.startswith(type(sample).__name__) and repr(value) in said, said
        assert "must" in said or "need" in said or "holds" in said, said


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_right_goes_through(name: str) -> None:
    sample = SAMPLES[name]
    again = dataclasses.replace(sample)
    assert again == sample == pickle.loads(pickle.dumps(sample)) == copy.deepcopy(sample)
    assert from_spec(yaml.safe_load(yaml.safe_dump(to_spec(sample)))) == sample


# What a reviewer found: accepted without a word, or refused as "'>' not supported between ...".
FOUND: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "a period of a step and a half": (dt.Proximal, {"strength": 1.0, "every": 1.5}, "must be >= 1 step"),
    "a period of True": (dt.Proximal, {"strength": 1.0, "every": True}, "must be >= 1 step"),
    "re-assigned every 2.5 steps": (dt.CodebookLearning, {"reassign_every": 2.5}, "must be >= 1 step or None"),
    "growth every 2.5 steps": (dt.Growth, {"factor": 1.1, "every": 2.5}, "must be >= 1 step"),
    "growth by a word": (dt.Growth, {"every": 2, "factor": "a"}, "must be a finite number >= 1"),
    "a steepness in words": (dt.Sigmoid, {"first": 0.0, "last": 1.0, "steepness": "a"}, "must lie in (0, 500]"),
    "rho in words": (dt.ADMM, {"rho": "x"}, "must be a finite number > 0"),
    "rho of True": (dt.ADMM, {"rho": True}, "must be a finite number > 0"),
    "a huge whole beta": (dt.MirrorDescent, {"beta": 10**400}, "must be a number or a schedule, > 0, and a float"),
    "a huge whole rho": (dt.ADMM, {"rho": 10**400}, "must be a finite number > 0"),
    "rho_max in words": (dt.ADMM, {"rho_max": "a"}, "must be >= rho=0.001, or None"),
    "no growth": (dt.ADMM, {"growth": None}, "must be a finite number >= 1"),
    "ADMM every word": (dt.ADMM, {"every": "2"}, "must be >= 1 step, or a fraction of training > 0"),
    "ADMM until a word": (dt.ADMM, {"until": "2"}, "must be a number > 0, or None"),
    "one freeze round": (dt.ADMM, {"rounds": 0.5}, "must rise within (0, 1] and end at 1.0"),
    "freeze rounds in words": (dt.ADMM, {"rounds": ("a", "b")}, "must rise within (0, 1] and end at 1.0"),
    "a share of True": (dt.PartialFreeze, {"rounds": (0.5, True)}, "must rise within (0, 1] and end at 1.0"),
    "levels by a word": (dt.ADMM, {"per_level": "x"}, "must be True or False"),
    "balance of 1": (dt.ADMM, {"balance": 1}, "must be True or False"),
    "balance of 1 without growth": (dt.ADMM, {"growth": 1.0, "balance": 1}, "must be True or False"),
    "freeze every word": (dt.PartialFreeze, {"every": "a"}, "must be a number > 0, or None"),
    "a proximal strength in words": (dt.Proximal, {"strength": "a"}, "must be a finite number >= 0"),
    "no strength": (dt.Penalty, {"strength": None}, "must be a finite number >= 0"),
    "by no rate": (dt.Proximal, {"strength": 1.0, "by_rate": "no"}, "must be True or False"),
    "beta in words": (dt.MirrorDescent, {"beta": "x"}, "must be a number or a schedule"),
    "a latent limit in words": (dt.MirrorDescent, {"clip_latent": "a"}, "must be a finite number > 0 or None"),
    "a slope in words": (dt.PARQ, {"inverse_slope": "a"}, "must lie in [0, 1]"),
    "a codebook without a zero": (dt.KernelCodebook, {"size": 4, "zero": "no"}, "must be True or False"),
    "levels without a zero": (dt.LearnedLevels, {"k": 4, "zero": "no"}, "must be True or False"),
    "powers without a zero": (dt.PowerOfTwo, {"bits": 4, "zero": None}, "must be True or False"),
    "a grid with a zero": (dt.Uniform, {"bits": 4, "zero": "a"}, "must be True or False"),
    "half-hearted bits": (dt.KernelCodebook, {"size": 4, "codebook_bits": 6.0}, "must be 2 to 8, or None"),
    "a list of dtypes": (dt.KernelCodebook, {"size": 4, "param_dtype": ["float16"]}, "must be one of"),
    "a list of dtypes of a scale": (dt.Uniform, {"bits": 4, "param_dtype": ["float16"]}, "must be one of"),
    "a list of floats": (dt.Round, {"dtype": ["float16"]}, "must be one of"),
    "bits as text": (dt.Uniform, {"bits": "3"}, "bits must be a whole number from 2 to 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_taken_for_something_else(name: str) -> None:
    make, given, says = FOUND[name]
    field, value = list(given.items())[-1]
    with pytest.raises(ValueError) as caught:
        make(**given)
    said = str(caught.value)
    assert said.startswith(f"{make.__name__}(") and f"{field}={value!r}" in said and says in said


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: dt.CodebookLearning(ste_from=2.0),
            "CodebookLearning.ste_from=2.0: a fraction of training",
        ),
        (lambda: dt.CodebookLearning(ste_from="a"), "CodebookLearning.ste_from='a': must be a step number"),  # type: ignore[arg-type]
        (lambda: dt.CodebookLearning(reassign_until=5.0), "CodebookLearning.reassign_until=5.0: a fraction"),
        (lambda: dt.ADMM(freeze_every=2.0), "ADMM.freeze_every=2.0: a fraction of training must lie in"),
        (lambda: dt.ADMM(every=1.5), "ADMM.every=1.5: a fraction of training must lie in"),
        (lambda: dt.ADMM(start=-1), "ADMM.start=-1: a step number must be >= 0"),
        (lambda: dt.Masked(start=None, metric="fisher"), "Masked.start=None: must be a step number"),  # type: ignore[arg-type]
        (lambda: dt.HardProjection(start=2.0), "HardProjection.start=2.0: a fraction of training must lie in"),
    ],
)
def test_moments_are_checked_where_they_are_given(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert says in str(caught.value)


# --- strangers' classes ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(dt.Mechanism):
    """A stranger's mechanism with checks of its own, which do not call ours."""

    gather_from: dt.schedules.Moment | None = None  # type: ignore[name-defined]
    warm_start: bool = True
    late_start: Any = None

    keeps_full_life: ClassVar[bool] = True

    def __post_init__(self) -> None:
        pass

    def active(self, clock: Any) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(dt.Mechanism):
    """A stranger's mechanism without checks, with fields of types that nobody here knows."""

    steps: int = 1
    width: int | None = None
    limit: float = math.inf
    sloppy: int = None  # type: ignore[assignment]
    size: int | float = 3.0
    table: dict[str, NowhereToBeFound] = dataclasses.field(default_factory=dict)  # type: ignore[name-defined]  # noqa: F821
    many: Any = ()

    keeps_full_life: ClassVar[bool] = True

    def active(self, clock: Any) -> bool:
        return True


def test_a_strangers_fields_of_other_types_are_let_through() -> None:
    made = Plain(width=None, size=2.5, table={"a": torch.ones(1)}, many=True)
    assert made.sloppy is None and Plain(limit=5).limit == 5 and Plain(limit=-math.inf).limit == -math.inf
    with pytest.raises(ValueError, match=r"Plain\(steps=True\): must be a whole number$"):
        Plain(steps=True)
    with pytest.raises(ValueError, match=r"Plain\(width=2.0\): must be a whole number, or None$"):
        Plain(width=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Plain\(limit=nan\): must be a number$"):
        Plain(limit=math.nan)


def test_a_strangers_moments_are_checked_by_the_rule() -> None:
    target = dt.Uniform(bits=4)
    assert moments_of(Own(gather_from=3, late_start=0.5)) == {"gather_from": 3, "late_start": 0.5}
    assert dt.Rule(match="w", target=target, mechanism=Own(gather_from=0.5, warm_start=True)).mechanism is not None
    for field in ("gather_from", "late_start"):
        with pytest.raises(ValueError, match=rf"Own.{field}=1.5: a fraction of training must lie in"):
            dt.Rule(match="w", target=target, mechanism=Own(**{field: 1.5}))  # type: ignore[arg-type]


def test_attach_looks_at_moments_once_more() -> None:
    model = torch.nn.Linear(4, 4)
    mechanism = Own(gather_from=0.5)
    recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=mechanism)])
    object.__setattr__(mechanism, "gather_from", 1.5)  # as unpickling one of another version would
    with pytest.raises(ValueError, match=r"Own.gather_from=1.5: a fraction of training must lie in"):
        dt.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe, total_steps=10)


def test_annotations_that_are_types_count_as_well() -> None:
    made = dataclasses.make_dataclass("Made", [("flag", bool), ("count", int | None)])
    check_types(made(True, None))
    with pytest.raises(ValueError, match=r"Made\(flag=1\): must be True or False"):
        check_types(made(1, None))
    with pytest.raises(ValueError, match=r"Made\(count=True\): must be a whole number, or None"):
        check_types(made(False, True))
