"""Plans: a recipe resolved against a model, one claim a parameter."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detent.activations import Input, inputs_of, said_of
from detent.ends import by_execution, by_registration
from detent.grouping import NEAR_DEAD, Layout, near_dead
from detent.parameters import Parameter, canonical_name, census, refuse_no_model
from detent.specs import and_more, short

if TYPE_CHECKING:
    from detent.recipe import Recipe, Rule

__all__ = ["Claim", "Plan", "merged", "near_dead_said", "resolve"]

_UNMATCHED = "no rule matches"
_KEPT = "kept by "
_MUCH = 0.03  # share of all weights that is worth a word


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
        note: what a reader would not expect of a claimed tensor: its axes, a pruning mask.
        is_weight: whether it is a weight by structure, as "@weights" takes them.
        frozen: whether it requires no gradient.

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
    note: str = ""
    is_weight: bool = True
    frozen: bool = False

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
        ends: which layers are first and last, and how that was found; empty if no rule asks.
        inputs: the modules whose inputs are rounded.

    Example:
        >>> import detent as dt
        >>> plan = dt.Recipe.preset("psg-w4").resolve(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)))
        >>> [claim.name for claim in plan.claimed]
        ['0.weight', '1.weight', '2.weight']
    """

    recipe: Recipe
    claims: tuple[Claim, ...]
    stages: tuple[tuple[Claim, ...], ...]
    ends: str = ""
    inputs: tuple[Input, ...] = ()

    @property
    def claimed(self) -> tuple[Claim, ...]:
        """The claims that have a target."""
        return tuple(claim for claim in self.claims if claim.claimed)

    def left(self, share: float = _MUCH) -> str:
        """Which tensors that no rule keeps on purpose hold more than a share of all weights, by name; empty if none.

        All of two axes or more count, whatever their reason: what is taken for a bias may hold most of a model.
        Tensors whose names differ in their numbers alone count together, as those of the layers of a transformer.

        Args:
            share: of all weights, in [0, 1].
        """
        total = sum(claim.layout.numel for claim in self.claims)
        alike: dict[tuple[str, str], list[Claim]] = {}
        for claim in self.claims:
            wide = (claim.dtype.is_floating_point or claim.dtype.is_complex) and len(claim.layout.shape) > 1
            if wide and not claim.claimed and not claim.reason.startswith(_KEPT):
                alike.setdefault((re.sub(r"\d+", "#", claim.name), claim.reason), []).append(claim)
        parts = []
        for (_, reason), claims in alike.items():
            part = sum(claim.layout.numel for claim in claims) / max(total, 1)
            if part > share:
                more = f" and {len(claims) - 1} alike" if len(claims) > 1 else ""
                parts.append((part, f"{claims[0].name}{more} ({100 * part:.1f} % of the weights; {reason})"))
        return ", ".join(said for _, said in sorted(parts, key=lambda each: -each[0]))

    def near_dead(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, int]]:
        """Outputs of layers none of whose weights exceeds a millionth of their tensor's largest.

        They do nothing, yet every format of a fixed width spends its full width on them.

        Args:
            weights: the tensors by name, such as `model.named_parameters()`.

        Returns:
            By name of the tensors that have such outputs: (how many, of how many).

        Example:
            >>> import detent as dt
            >>> net = nn.Linear(4, 8)
            >>> with torch.no_grad():
            ...     net.weight[2:5] *= 1e-9
            >>> dt.Recipe.preset("uniform-w4").resolve(net).near_dead(net.named_parameters())
            {'weight': (3, 8)}
        """
        claims = {name: claim for claim in self.claims for name in (claim.name, *claim.aliases) if claim.is_weight}
        found: dict[str, tuple[int, int]] = {}
        for name, w in weights:
            claim = claims.get(canonical_name(name))
            if claim is not None and not w.is_meta and len(claim.layout.shape) > 1:
                count = near_dead(w.detach(), claim.layout)
                found |= {claim.name: (count, claim.layout.channels)} if count else {}
        return found

    def warn_left(self, who: str) -> None:
        """Say what is left in full precision by a recipe that is meant for the whole model.

        That is one that takes every weight ("@weights"), or has claimed more than half of the tensors that are weights.
        """
        weights = [claim for claim in self.claims if claim.is_weight]
        takes_all = any(rule.match == "@weights" and not rule.keep for rule in self.recipe.rules)
        left = self.left() if takes_all or 2 * len(self.claimed) > len(weights) else ""
        if left:
            warnings.warn(
                f"{who}: {left} stay in full precision; a rule with keep=True says that it is meant", stacklevel=3
            )

    def fits(self) -> list[str]:
        """When the targets of the rules are fitted to the weights, a sentence for each way.

        Example:
            >>> import torch, detent as dt
            >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.STE())
            >>> dt.Recipe([rule]).resolve(torch.nn.Linear(4, 4)).fits()
            ['scales, levels and masks: fitted every 10 steps (100 after step 1,000)']
        """
        found = self._whose(lambda rule: "" if rule.cadence is None else str(rule.cadence))
        one = len(found) == 1
        return [f"scales, levels and masks{'' if one else f' of {whose}'}: {said}" for said, whose in found.items()]

    def pulls(self) -> list[str]:
        """What mechanisms find for themselves, a sentence for each way.

        Example:
            >>> import torch, detent as dt
            >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.PSG())
            >>> dt.Recipe([rule]).resolve(torch.nn.Linear(4, 4)).pulls()
            ['PSG: sets its gain by itself; the base optimizer runs untouched until 0.4 of training']
        """

        def own(rule: Rule) -> str:
            said = "" if rule.mechanism is None else rule.mechanism.said
            return f"{type(rule.mechanism).__name__}: {said}" if said else ""

        found = self._whose(own)
        return list(found) if len(found) == 1 else [f"{said} ({whose})" for said, whose in found.items()]

    def _whose(self, say: Callable[[Rule], str]) -> dict[str, str]:
        """What is said of the rules that are trained, and of whose tensors: the first one's name, and how many more."""
        found: dict[str, list[str]] = {}
        for _, claim in self._shown():
            said = say(self.rule_of(claim)) if claim.claimed and not claim.frozen else ""
            if said:
                found.setdefault(said, []).append(claim.name)
        return {said: names[0] + and_more(names) for said, names in found.items()}

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
                    "note": "; ".join(part for part in (claim.reason, claim.note, remark, tied) if part),
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
        if self.ends:
            lines.append(self.ends)
        lines += said_of(self.inputs, self.recipe.activations)
        lines += [*self.fits(), *self.pulls()]
        if left := self.left():
            lines.append(f"left in full precision: {left}")
        return "\n".join(line.rstrip() for line in lines)


def near_dead_said(found: Mapping[str, tuple[int, int]], outputs: int) -> str:
    """Near-dead units in a sentence, with what to do; empty if there are none.

    Args:
        found: by tensor, (how many, of how many outputs).
        outputs: of all tensors.

    Example:
        >>> near_dead_said({"fc": (1, 4)}, 8).partition(":")[0]
        "1 of 8 outputs of layers (12.5 %) have no weight above 1e-06 of their tensor's largest (fc 1 of 4)"
    """
    count = sum(dead for dead, _ in found.values())
    if not count:
        return ""
    most = sorted(found.items(), key=lambda item: -item[1][0])
    names = ", ".join(f"{name} {dead:,} of {all_:,}" for name, (dead, all_) in most[:3]) + ", ..." * (len(most) > 3)
    return (
        f"{count:,} of {outputs:,} outputs of layers ({100 * count / outputs:.1f} %) have no weight above "
        f"{NEAR_DEAD:g} of their tensor's largest ({names}): they do nothing and take their full width. Before "
        f"compression, detent.export.fold_dead_units(model, example, tolerance={NEAR_DEAD:g}) sets them to zero, and "
        "slim takes them out"
    )


def merged(stages: Sequence[Sequence[Claim]]) -> tuple[Claim, ...]:
    """Where every parameter stands after some stages: the last claim on it counts."""
    return tuple(
        next((c for c in reversed(each) if c.claimed), None)
        or next((c for c in reversed(each) if c.reason != _UNMATCHED), each[-1])  # why, of a stage that has a reason
        for each in zip(*stages, strict=True)
    )


def resolve(recipe: Recipe, model: nn.Module, *, example: Any = None, trained: bool = True) -> Plan:
    """Decide for every parameter of a model; `Recipe.resolve` says more.

    Args:
        recipe: the recipe.
        model: the model.
        example: what the model takes, to find the first and the last layer by.
        trained: its mechanisms are to pull, so that they pass over frozen parameters.
    """
    refuse_no_model(model, "Recipe.resolve")
    found = list(census(model))
    for odd in [name for name, times in Counter(p.name for p in found).items() if times > 1][:1]:
        raise ValueError(f"two parameters of this model have the canonical name {odd!r}; rename one of the modules")
    weights = [p for p in found if p.is_weight]
    layers = [p for p in weights if p.is_layer] or weights
    special: dict[str, set[str]] = {}
    ends, said = _ends(recipe, model, layers, example)
    for where, end in (*ends.items(), ("@weights", weights)):
        owners = {id(p.owner) for p in (found if where == "@weights" else end)}
        special[where] = {p.name for p in end}
        special[f"beside {where}"] = {p.name for p in found if p.passed_over and id(p.owner) in owners}
    special["@kernels"] = {p.name for p in layers if p.layout.kernel > 1}
    matched, taken = [0] * len(recipe.rules), [0] * len(recipe.rules)
    frozen: list[list[str]] = [[] for _ in recipe.rules]
    # Once for all parameters: Python's own memory of patterns is shorter than a long recipe.
    patterns = [(re.compile(rule.match), re.compile(_included(rule))) for rule in recipe.rules]
    by_stage = [
        tuple(_decide(recipe, p, mine, patterns, special, matched, taken, frozen if trained else None) for p in found)
        for mine in recipe.stage_rules()
    ]
    names = [name for p in found for name in (p.name, *p.aliases)]
    for i, rule in enumerate(recipe.rules):
        if taken[i] or rule.optional:
            continue
        if rule.match in ends and any(other.match in ends for other in recipe.rules[:i]) and matched[i]:
            continue  # one tensor is both ends, as the table of a language model that is also its head
        if frozen[i]:
            raise ValueError(
                f"{frozen[i][0]!r} is frozen (requires_grad=False), so nothing can pull it, and {recipe.called(i)} "
                "finds nothing else: leave out mechanism=, and its target is fitted to it once, or unfreeze it first"
            )
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
        raise ValueError(
            "every rule of this recipe is optional, and none finds a parameter in this model"
            + (" that training moves: they are frozen (requires_grad=False)" if any(frozen) else "")
        )
    at_ends = {end: [p.name for p in ends[end]] for end in ("@first", "@last")}
    inputs = inputs_of(recipe.activations, model, at_ends)
    return Plan(recipe=recipe, claims=merged(by_stage), stages=tuple(by_stage), ends=said, inputs=inputs)


def _ends(
    recipe: Recipe, model: nn.Module, layers: Sequence[Parameter], example: Any
) -> tuple[dict[str, list[Parameter]], str]:
    """The first and last layers, and a sentence on how they were found; none if no rule asks."""
    asking = {rule.match for rule in (*recipe.rules, *recipe.activations)}
    wanted = [end for end in ("@first", "@last") if end in asking]
    found = by_execution(model, example, layers) if wanted and example is not None else None
    how = "by execution of the example"
    if found is None and example is None:
        how = "by order of registration; an example= goes by execution"
    elif found is None:
        how = "by order of registration: the example left no graph from an input to an output"
    first, last = found or by_registration(model, layers)
    ends = {"@first": first, "@last": last}
    parts = [f"{end.removeprefix('@')}: {', '.join(p.name for p in ends[end]) or 'none'}" for end in wanted]
    return ends, f"{'; '.join(parts)} ({how})" if parts else ""


def _decide(
    recipe: Recipe,
    p: Parameter,
    mine: range,
    patterns: Sequence[tuple[re.Pattern[str], re.Pattern[str]]],
    special: Mapping[str, set[str]],
    matched: list[int],
    taken: list[int],
    frozen: list[list[str]] | None,
) -> Claim:
    decided: tuple[int | None, str] | None = None
    passed, layout = "", p.layout
    for i in mine:
        rule = recipe.rules[i]
        speaks, named = _speaks(rule, p, patterns[i], special)
        if not speaks:
            continue
        matched[i] += 1
        if decided is not None:
            continue
        if rule.keep:
            taken[i] += 1
            decided = (None, f"{_KEPT}{recipe.called(i)}")
            continue
        if p.dtype.is_complex and rule.match == "@weights":
            passed = passed or "passed over: complex numbers, which lie on no target"
            continue
        if p.passed_over and not named:
            passed = passed or f"passed over: {p.passed_over}; name it in include= to claim it"
            continue
        if p.frozen and rule.mechanism is not None and frozen is not None:
            frozen[i].append(p.name)
            passed = passed or "passed over: frozen, so nothing can pull it; a rule without mechanism= may claim it"
            continue
        assert rule.target is not None
        layout = _placed(p, rule, recipe.called(i))
        reason = rule.target.accepts(p.layout.shape, p.dtype, layout)
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
    return Claim(
        name=p.name,
        aliases=p.aliases,
        layout=layout,
        dtype=p.dtype,
        rule=rule_index,
        reason=reason,
        note="" if rule_index is None else _note(p, layout, recipe.rules[rule_index]),
        is_weight=p.is_weight,
        frozen=p.frozen,
    )


def _speaks(
    rule: Rule, p: Parameter, patterns: tuple[re.Pattern[str], re.Pattern[str]], special: Mapping[str, set[str]]
) -> tuple[bool, bool]:
    """Whether a rule speaks of a parameter, be it to pass it over, and whether its `include` names it."""
    match, include = patterns
    names = (p.name, *p.aliases)
    named = p.is_linear_bias if rule.include == "@linear" else any(map(include.search, names))
    if rule.match.startswith("@"):
        hit = p.name in special[rule.match] or (named and p.name in special.get(f"beside {rule.match}", ()))
    else:
        hit = any(map(match.search, names))
    # "@weights" means every weight: what it does not take for one is passed over, and says why.
    aside = rule.match == "@weights" and not rule.keep and len(p.layout.shape) > 1
    aside = aside and (bool(p.passed_over) or p.dtype.is_complex)
    return hit or aside, named


def _placed(p: Parameter, rule: Rule, called: str) -> Layout:
    """The layout of a parameter under a rule that may say its axes.

    Raises:
        ValueError: axes that the tensor has not, or others than its module is known to have.
    """
    if rule.axis is None and rule.batch_axes is None:
        return p.layout
    axis = p.layout.channel_dim if rule.axis is None else rule.axis
    batch = p.layout.batch_axes if rule.batch_axes is None else tuple(rule.batch_axes)
    if rule.batch_axes is None and axis in batch:
        batch = ()
    said = f"axis={rule.axis}, batch_axes={rule.batch_axes}"
    if max(axis, *batch, 0) >= len(p.layout.shape) or axis in batch:
        raise ValueError(f"{p.name!r} claimed by {called}: {said} does not fit its shape {p.layout.shape}")
    if p.kind and not p.is_derived and (axis, batch) != (p.layout.channel_dim, p.layout.batch_axes):
        raise ValueError(
            f"{p.name!r} claimed by {called}: {said}, but the outputs of {p.kind} are on axis {p.layout.channel_dim}"
            + (f", stacked on {p.layout.batch_axes}" if p.layout.batch_axes else "")
        )
    return replace(p.layout, channel_dim=axis, batch_axes=batch)


def _note(p: Parameter, layout: Layout, rule: Rule) -> str:
    """What a reader of the plan would not expect of a claimed tensor."""
    said = []
    assumed = p.is_assumed and rule.axis is None
    expected = isinstance(p.owner, nn.modules.conv._ConvNd)  # transposed or not, torch's own pages say it
    if assumed or not (expected or layout.is_row_major) or layout.batch_axes:
        said.append(channels_of(layout) + (" (assumed; axis= and batch_axes= say otherwise)" if assumed else ""))
    if p.pruned:
        said.append(
            f"a pruning mask {p.pruned!r} is multiplied with it: make it permanent (torch.nn.utils.prune.remove), or "
            "the file holds it too"
        )
    return "; ".join(said)


def channels_of(layout: Layout) -> str:
    """What the channels of a tensor are, and with them its filters, columns, and runs of a group.

    Example:
        >>> channels_of(Layout(shape=(4, 64, 32), channel_dim=2, batch_axes=(0,)))
        '4 stacked on axis 0, channels on axis 2 (32 each), inputs on axis 1 (64)'
    """
    parts = []
    if layout.batch_axes:
        axes = " and ".join(map(str, layout.batch_axes))
        parts.append(f"{layout.batch} stacked on ax{'e' if len(layout.batch_axes) > 1 else 'i'}s {axes}")
    count = layout.channels // layout.batch
    parts.append(f"channels on axis {layout.channel_dim} ({count}{' each' if layout.batch_axes else ''})")
    if layout.input_axes:
        inputs = layout.shape[layout.input_axes[0]] // layout.conv_groups
        parts.append(f"inputs on axis {layout.input_axes[0]} ({inputs})")
    if layout.kernel > 1:
        parts.append(f"{layout.kernel} kernel positions")
    return ", ".join(parts)


def _included(rule: Rule) -> str:
    """The pattern of `include`; one that finds nothing for none, and for `@linear`, which is no pattern."""
    return "(?!)" if rule.include in (None, "@linear") else rule.include


def _nearest_name(pattern: str, names: Sequence[str]) -> str:
    """The parameter that a pattern without a match may have meant; any resemblance counts."""
    near = difflib.get_close_matches(pattern.strip("^$").replace("\\", ""), names, 1, 0.0)
    return f"; the nearest name is {near[0]!r}" if near else ""
