"""The one table of samples: targets, mechanisms, pairs with their skips, and errors with a piece of their sentence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import detent as dt

# Every target with sample arguments. A new target or a new branch of one gets a row here and nothing else.
TARGETS: dict[str, dt.Target] = {
    "uniform-2": dt.Uniform(bits=2),
    "uniform-3-minmax": dt.Uniform(bits=3, range="minmax"),
    "uniform-4": dt.Uniform(bits=4),
    "uniform-4-channel-half": dt.Uniform(bits=4, granularity="channel", param_dtype="float16"),
    "uniform-4-group": dt.Uniform(bits=4, granularity=dt.Group(size=4), range="minmax", param_dtype="bfloat16"),
    "uniform-5-channel-ema": dt.Uniform(bits=5, granularity="channel", range="ema"),
    "uniform-8-ema": dt.Uniform(bits=8, range="ema"),
    "zero": dt.Zero(),
    "zero-channel": dt.Zero(granularity=dt.Channel()),
    "topk-tenth": dt.TopK(keep=0.1),
    "topk-most": dt.TopK(keep=0.7),
    "topk-all": dt.TopK(keep=1.0),
    "topk-five": dt.TopK(keep=5),
    "topk-model": dt.TopK(keep=0.25, scope="model"),
}

# Every mechanism with sample arguments, short enough to act within a dozen steps.
MECHANISMS: dict[str, dt.Mechanism] = {
    "psg": dt.PSG(),
    "psg-gradient": dt.PSG(form="gradient", gain=2.0, eps=0.1, clip_norm=1.0, clip_start=2),
    "psg-update": dt.PSG(form="update", gain=0.5, strength=0.4, clip=False),
    "psg-late": dt.PSG(start=4, strength=dt.Linear(first=0.0, last=1.0, begin=4, end=9)),
    "psg-paper": dt.PSG.paper(lambda_s=20.0, eps=0.01),
    "psg-toward-zero": dt.PSG(toward=dt.Zero(granularity="channel")),
    "ste": dt.STE(),
    "ste-late": dt.STE(start=0.4),
    "hard": dt.HardProjection(every=3),
    "hard-free": dt.HardProjection(every=4, masks=False, start=2),
    "clip": dt.Clip(start=0.2),
}

# Pairs a mechanism refuses, with a piece of the sentence it says so in.
REFUSED: dict[tuple[str, str], str] = {
    (target, "clip"): "Clip keeps weights inside a range" for target in TARGETS if target.startswith(("zero", "topk"))
}

# Pairs left out although nothing refuses them, with the reason.
SKIPPED: dict[tuple[str, str], str] = {}

PAIRS: list[tuple[str, str]] = [
    pair for pair in itertools.product(TARGETS, MECHANISMS) if pair not in REFUSED and pair not in SKIPPED
]

# Pairs that go through the long check of a mechanism: every mechanism, and every target but its mere variants.
LONG_PAIRS: list[tuple[str, str]] = [
    ("uniform-4", "psg"),
    ("uniform-4-channel-half", "psg-gradient"),
    ("uniform-4-group", "psg-update"),
    ("uniform-5-channel-ema", "psg-late"),
    ("uniform-8-ema", "psg-paper"),
    ("topk-model", "psg-toward-zero"),
    ("zero", "psg-update"),
    ("uniform-3-minmax", "ste"),
    ("topk-most", "ste-late"),
    ("topk-five", "hard"),
    ("topk-model", "hard"),
    ("uniform-2", "hard-free"),
    ("uniform-4", "clip"),
]


@dataclass(frozen=True, kw_only=True)
class ErrorCase:
    """Something a user may do wrong, and a piece of the sentence that must tell them."""

    make: Callable[[], Any]
    says: str


def _resolve(*rules: dt.Rule) -> dt.Plan:
    return dt.Recipe(rules).resolve(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))


def _yaml(rule: str) -> dt.Recipe:
    return dt.Recipe.from_yaml(f"rules:\n- {rule}")


_U4 = dt.Uniform(bits=4)

ERRORS: dict[str, ErrorCase] = {
    "bits too few": ErrorCase(make=lambda: dt.Uniform(bits=1), says="Uniform(bits=1)"),
    "bits too many": ErrorCase(make=lambda: dt.Uniform(bits=9), says="Uniform(bits=9)"),
    "no such range": ErrorCase(make=lambda: dt.Uniform(bits=4, range="max"), says='"minmax", "ema" or "mse"'),  # type: ignore[arg-type]
    "no such granularity": ErrorCase(
        make=lambda: dt.Uniform(bits=4, granularity="row"),  # type: ignore[arg-type]
        says='must be "tensor", "channel" or Group',
    ),
    "no such param dtype": ErrorCase(
        make=lambda: dt.Uniform(bits=4, param_dtype="int8"),  # type: ignore[arg-type]
        says="Uniform(param_dtype='int8')",
    ),
    "a group of none": ErrorCase(make=lambda: dt.Group(size=0), says="size=0"),
    "keep nothing": ErrorCase(make=lambda: dt.TopK(keep=0.0), says="TopK(keep=0.0): a fraction must lie in (0, 1]"),
    "keep more than all": ErrorCase(make=lambda: dt.TopK(keep=1.5), says="a fraction must lie in (0, 1]"),
    "keep a count of none": ErrorCase(make=lambda: dt.TopK(keep=0), says="a count must be an int >= 1"),
    "keep a bool": ErrorCase(make=lambda: dt.TopK(keep=True), says="a count must be an int >= 1"),
    "no such scope": ErrorCase(
        make=lambda: dt.TopK(keep=0.1, scope="layer"),  # type: ignore[arg-type]
        says='must be "tensor" or "model"',
    ),
    "strength too large": ErrorCase(make=lambda: dt.PSG(strength=1.5), says="PSG(strength=1.5): must lie in [0, 1]"),
    "gain not positive": ErrorCase(make=lambda: dt.PSG(gain=0.0), says="PSG(gain=0.0): must be a finite number > 0"),
    "gain not finite": ErrorCase(make=lambda: dt.PSG(gain=float("inf")), says="finite number > 0"),
    "eps negative": ErrorCase(make=lambda: dt.PSG(eps=-0.1), says="PSG(eps=-0.1): must be a finite number >= 0"),
    "clip_norm not positive": ErrorCase(make=lambda: dt.PSG(clip_norm=0.0), says="PSG(clip_norm=0.0): must be > 0"),
    "no such form": ErrorCase(make=lambda: dt.PSG(form="grad"), says='"auto", "gradient" or "update"'),  # type: ignore[arg-type]
    "no such units": ErrorCase(make=lambda: dt.PSG(units="metre"), says='must be "cell" or "weight"'),  # type: ignore[arg-type]
    "project never": ErrorCase(make=lambda: dt.HardProjection(every=0), says="HardProjection(every=0): must be >= 1"),
    "ramp to nowhere": ErrorCase(make=lambda: dt.Linear(first=0.0, last=float("nan")), says="Linear(last=nan)"),
    "exponential from zero": ErrorCase(make=lambda: dt.Exponential(first=0.0, last=1.0), says="both must be > 0"),
    "not a regex": ErrorCase(make=lambda: dt.Rule(match="(", keep=True), says="not a regular expression"),
    "include not a regex": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, include="["), says="Rule(include='['): not a regular expression"
    ),
    "no such @": ErrorCase(make=lambda: dt.Rule(match="@middle", keep=True), says='"@first" and "@last"'),
    "neither target nor keep": ErrorCase(make=lambda: dt.Rule(match="a"), says="give either target= or keep=True"),
    "both target and keep": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, keep=True), says="give either target= or keep=True"
    ),
    "mechanism without target": ErrorCase(
        make=lambda: dt.Rule(match="a", keep=True, mechanism=dt.PSG()), says="a mechanism needs a target"
    ),
    "fit never": ErrorCase(make=lambda: dt.Rule(match="a", target=_U4, fit_every=0), says="Rule(fit_every=0)"),
    "fit until after the end": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, fit_until=1.5), says="must lie in [0, 1]"
    ),
    "no rules": ErrorCase(make=lambda: dt.Recipe([]), says="give at least one Rule"),
    "not a rule": ErrorCase(make=lambda: dt.Recipe([_U4]), says="every entry must be a Rule, not Uniform"),  # type: ignore[list-item]
    "no such preset": ErrorCase(make=lambda: dt.Recipe.preset("psgw4"), says="did you mean 'psg-w4'?"),
    "rule matches nothing": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="0.wieght", target=_U4)), says="the nearest name is '0.weight'"
    ),
    "rule shadowed": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="weight", target=_U4), dt.Rule(match=r"^0\.weight", keep=True)),
        says="rule 1 (match='^0\\\\.weight') only matches parameters that are passed over or claimed by earlier rules",
    ),
    "rule only matches passed-over": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="bias", target=_U4)), says="rule 0 (match='bias') only matches parameters"
    ),
    "count larger than the tensor": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="2.weight", target=dt.TopK(keep=99))),
        says="'2.weight' claimed by rule 0 (match='2.weight'): TopK(keep=99) asks for more weights than the 6",
    ),
    "yaml: not yaml": ErrorCase(make=lambda: dt.Recipe.from_yaml("rules: [\n"), says="recipe: not YAML"),
    "yaml: a list": ErrorCase(make=lambda: dt.Recipe.from_yaml("- a\n- b"), says="the one key 'rules'"),
    "yaml: another key": ErrorCase(make=lambda: dt.Recipe.from_yaml("rules: []\nmore: 1"), says="the one key 'rules'"),
    "yaml: a rule that is a word": ErrorCase(make=lambda: _yaml("weight"), says="rules[0]: must be a mapping, not str"),
    "yaml: unknown rule key": ErrorCase(
        make=lambda: _yaml("{match: a, keeep: true}"), says="rules[0]: Rule has no field 'keeep'; did you mean 'keep'?"
    ),
    "yaml: unknown kind": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Unifrom, bits: 4}}"),
        says="rules[0].target: unknown kind 'Unifrom'; did you mean 'Uniform'?",
    ),
    "yaml: no kind": ErrorCase(
        make=lambda: _yaml("{match: a, target: {bits: 4}}"), says="rules[0].target: unknown kind"
    ),
    "yaml: unknown field": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bit: 4}}"),
        says="rules[0].target: Uniform has no field 'bit'; did you mean 'bits'?",
    ),
    "yaml: field missing": ErrorCase(make=lambda: _yaml("{match: a, target: {kind: Uniform}}"), says="Uniform.bits"),
    "yaml: value of the wrong type": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bits: four}}"), says="rules[0].target: Uniform.bits"
    ),
    "yaml: value out of range": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bits: 40}}"), says="rules[0].target: Uniform(bits=40)"
    ),
    "yaml: word not in the list": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bits: 4, range: max}}"), says="Uniform.range"
    ),
    "yaml: a mechanism as target": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: PSG}}"), says="rules[0]: Rule.target"
    ),
    "yaml: unknown field deep down": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Zero}, mechanism: {kind: PSG, eps: {kind: Linear, frist: 1}}}"),
        says="rules[0].mechanism.eps: Linear has no field 'frist'; did you mean 'first'?",
    ),
}
