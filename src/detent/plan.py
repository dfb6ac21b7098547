"""Plans: a recipe resolved against a model, one claim a parameter."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from detent.grouping import Layout
from detent.parameters import Parameter, census, own_name, refuse_no_model
from detent.specs import short

if TYPE_CHECKING:
    from detent.recipe import Recipe, Rule

__all__ = ["Claim", "Plan", "merged", "resolve"]

_UNMATCHED = "no rule matches"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One parameter of a model and what was decided for it.

    Args:
        name: canonical name (wrapper segments removed).
        aliases: other names of the same (tied) parameter.
        layout: shape, output channel axis.
        dtype: dtype of the parameter.
        rule: index of the rule that claimed it, or `None` if it stays full precision.
        reason: why it stays full precision (empty when claimed).

    Example:
        >>> Claim(name="fc.bias", layout=Layout(shape=(4,)), dtype=torch.float32, rule=None, reason="bias").claimed
        False
    """

    name: str
    aliases: tuple[str, ...] = ()
    layout: Layout
    dtype: torch.dtype
    rule: int | None
    reason: str = ""

    @property
    def claimed(self) -> bool:
        """Whether a rule with a target took this parameter."""
        return self.rule is not None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe resolved against a model: what every parameter becomes, and why some stay full precision.

    Args:
        recipe: the recipe.
        claims: one entry a parameter, in the model's order; with stages, where the parameter stands in the end.
        stages: the claims of every stage (one if the recipe has none).

    Example:
        >>> import detent as dt
        >>> plan = dt.Recipe.preset("psg-w4").resolve(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)))
        >>> [claim.name for claim in plan.claimed]
        ['0.weight', '1.weight', '2.weight']
    """

    recipe: Recipe
    claims: tuple[Claim, ...]
    stages: tuple[tuple[Claim, ...], ...]

    @property
    def claimed(self) -> tuple[Claim, ...]:
        """The claims that have a target."""
        return tuple(claim for claim in self.claims if claim.claimed)

    def rule_of(self, claim: Claim) -> Rule:
        """The rule that claimed a parameter."""
        assert claim.rule is not None
        return self.recipe.rules[claim.rule]

    def rows(self) -> list[dict[str, Any]]:
        """The plan as plain data, one entry a parameter."""
        rows, remarks = [], self._remarks()
        for stage, claim in self._shown():
            rule = self.rule_of(claim) if claim.claimed else None
            remark = remarks.get((claim.rule, claim.name))
            tied = f"tied: {', '.join(claim.aliases)}" if claim.aliases else None
            rows.append(
                {
                    **({"stage": stage} if self.recipe.stages else {}),
                    "parameter": claim.name,
                    "shape": claim.layout.shape,
                    "becomes": short(rule.target) if rule else "full precision",
                    "mechanism": short(rule.mechanism) if rule and rule.mechanism else "",
                    "note": "; ".join(part for part in (claim.reason, remark, tied) if part),
                }
            )
        return rows

    def _remarks(self) -> dict[tuple[int | None, str], str | None]:
        """What targets say of their tensors, by rule and name."""
        members: dict[int | None, list[Claim]] = {}
        for claim in (claim for _, claim in self._shown() if claim.claimed):
            members.setdefault(claim.rule, []).append(claim)
        found = {}
        for rule, claims in members.items():
            if target := self.rule_of(claims[0]).target:
                said = target.remarks([claim.layout for claim in claims])
                found |= {(rule, claim.name): remark for claim, remark in zip(claims, said, strict=True)}
        return found

    def _shown(self) -> Iterator[tuple[str, Claim]]:
        """What every stage claims, then what none does; without stages simply every claim."""
        if not self.recipe.stages:
            yield from (("", claim) for claim in self.claims)
            return
        for i, (stage, claims) in enumerate(zip(self.recipe.stages, self.stages, strict=True)):
            label = f"{i} {stage.name}".rstrip() + f" ({100 * stage.share:g} %)"
            yield from ((label, claim) for claim in claims if claim.claimed)
        yield from (("", claim) for claim in self.claims if not claim.claimed)

    def __str__(self) -> str:
        head = ("parameter", "shape", "becomes", "pulled by", "note")
        head = ("stage", *head) if self.recipe.stages else head
        table = [head, *(tuple(str(value) for value in row.values()) for row in self.rows())]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        total = sum(claim.layout.numel for claim in self.claims)
        mine = sum(claim.layout.numel for claim in self.claimed)
        lines.append(f"{mine} of {total} weights claimed ({100 * mine / max(total, 1):.1f} %)")
        return "\n".join(line.rstrip() for line in lines)


def merged(stages: Sequence[Sequence[Claim]]) -> tuple[Claim, ...]:
    """Where every parameter stands after some stages: the last claim on it counts."""
    return tuple(
        next((c for c in reversed(each) if c.claimed), None)
        or next((c for c in reversed(each) if c.reason != _UNMATCHED), each[-1])  # why, of a stage that has a reason
        for each in zip(*stages, strict=True)
    )


def resolve(recipe: Recipe, model: nn.Module) -> Plan:
    """Decide for every parameter of a model; `Recipe.resolve` says more."""
    refuse_no_model(model, "Recipe.resolve")
    found = list(census(model))
    for odd in [name for name, times in Counter(p.name for p in found).items() if times > 1][:1]:
        raise ValueError(f"two parameters of this model have the canonical name {odd!r}; rename one of the modules")
    eligible = [p for p in found if not p.passed_over]
    # A position embedding or a class token of the model's own is no layer.
    eligible = [p for p in eligible if "weight" in own_name(p.name)] or eligible
    special: dict[str, set[str]] = {}
    for where, end in (("@first", eligible[:1]), ("@last", eligible[-1:])):
        special[where] = {p.name for p in end}
        special[f"beside {where}"] = {p.name for p in found if p.passed_over and p.layer in {e.layer for e in end}}
    special["@kernels"] = {p.name for p in eligible if math.prod(p.layout.shape[2:]) > 1}
    matched, taken = [0] * len(recipe.rules), [0] * len(recipe.rules)
    # Once for all parameters: Python's own memory of patterns is shorter than a long recipe.
    patterns = [(re.compile(rule.match), re.compile(_included(rule))) for rule in recipe.rules]
    by_stage = [
        tuple(_decide(recipe, p, mine, patterns, special, matched, taken) for p in found)
        for mine in recipe.stage_rules()
    ]
    names = [name for p in found for name in (p.name, *p.aliases)]
    for i, rule in enumerate(recipe.rules):
        if taken[i] or rule.optional:
            continue
        if matched[i]:
            why = f"only matches parameters that are passed over or claimed by earlier rules ({matched[i]} matched)"
        else:
            why = f"matches no parameter of this model{_nearest_name(rule.match, names)}"
        raise ValueError(f"{recipe.called(i)} {why}")
    for i, rule in enumerate(recipe.rules):
        if (
            rule.include not in (None, "@linear")
            and not rule.optional
            and not any(patterns[i][1].search(name) for name in names)
        ):
            hint = _nearest_name(rule.include, names)
            raise ValueError(f"{recipe.called(i, 'include')} names no parameter of this model{hint}")
    if not any(taken):
        raise ValueError("every rule of this recipe is optional, and none finds a parameter in this model")
    return Plan(recipe=recipe, claims=merged(by_stage), stages=tuple(by_stage))


def _decide(
    recipe: Recipe,
    p: Parameter,
    mine: range,
    patterns: Sequence[tuple[re.Pattern[str], re.Pattern[str]]],
    special: Mapping[str, set[str]],
    matched: list[int],
    taken: list[int],
) -> Claim:
    decided: tuple[int | None, str] | None = None
    passed = ""
    for i in mine:
        rule = recipe.rules[i]
        match, include = patterns[i]
        names = (p.name, *p.aliases)
        named = p.linear_bias if rule.include == "@linear" else any(map(include.search, names))
        if rule.match.startswith("@"):
            hit = p.name in special[rule.match] or (named and p.name in special.get(f"beside {rule.match}", ()))
        else:
            hit = any(map(match.search, names))
        if not hit:
            continue
        matched[i] += 1
        if decided is not None:
            continue
        if rule.keep:
            taken[i] += 1
            decided = (None, f"kept by {recipe.called(i)}")
            continue
        if p.passed_over and not named:
            passed = passed or f"passed over: {p.passed_over}; name it in include= to claim it"
            continue
        assert rule.target is not None
        reason = rule.target.accepts(p.layout.shape, p.dtype, p.layout)
        if reason:
            raise ValueError(f"{p.name!r} claimed by {recipe.called(i)}: {reason}")
        if p.writer:
            raise ValueError(
                f"{p.name!r} claimed by {recipe.called(i)}: the forward pass of {p.writer} writes its "
                "weight, which nothing else may do here; use max_norm=None, or keep it in full precision"
            )
        taken[i] += 1
        decided = (i, "")
    rule_index, reason = decided or (None, passed or _UNMATCHED)
    return Claim(name=p.name, aliases=p.aliases, layout=p.layout, dtype=p.dtype, rule=rule_index, reason=reason)


def _included(rule: Rule) -> str:
    """The pattern of `include`; one that finds nothing for none, and for `@linear`, which is no pattern."""
    return "(?!)" if rule.include in (None, "@linear") else rule.include


def _nearest_name(pattern: str, names: Sequence[str]) -> str:
    """The parameter that a pattern without a match may have meant; any resemblance counts."""
    near = difflib.get_close_matches(pattern.strip("^$").replace("\\", ""), names, 1, 0.0)
    return f"; the nearest name is {near[0]!r}" if near else ""
