"""Recipes: which weights go where, and how. A `Recipe` is data; resolved against a model it is a `Plan`."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from detent.grouping import Layout
from detent.mechanisms import Mechanism
from detent.presets import PRESETS
from detent.schedules import Moment, check_moment, is_number, is_whole, moments_of
from detent.specs import build, nearest, short, to_spec
from detent.targets import Target

__all__ = ["Claim", "Plan", "Recipe", "Rule", "Stage", "canonical_name"]

_UNMATCHED = "no rule matches"
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of the parameters whose name matches.

    Args:
        match: regular expression searched in the canonical parameter name, or "@first" / "@last" for the first /
            last weight of the model that a rule may claim (named so, as `fc.weight`; and its bias, where `include`
            names it), or "@kernels" for every convolution larger than 1 x 1 (weights of three dimensions or more).
        target: where the weights may end; not with `keep`.
        mechanism: how training pulls them there; `None` only for `detent.compress`.
        keep: leave the parameters in full precision.
        include: regular expression of names to claim although they are biases or normalisation weights, or "@linear"
            for the biases of all linear layers.
        pinned: `run.compressed(bits=...)` leaves this rule's target as it is.
        fit_every: steps between fits of the target, >= 1; `None` for the mechanism's default.
        fit_until: moment after which the fit is frozen; `None` for the mechanism's default.
        weight_decay: the weight decay this rule is meant for, >= 0: `Recipe.param_groups` gives it to the optimizer and
            `attach` refuses any other; `None` for whatever the optimizer has.
        optional: the rule may end up with nothing: for recipes that are meant for any model.

    Raises:
        ValueError: a field of another type, an invalid regular expression, or a rule with both or neither of `target`
            and `keep`.

    Example:
        >>> Rule(match=r"^fc\\.", keep=True).keep
        True
    """

    match: str
    target: Target | None = None
    mechanism: Mechanism | None = None
    keep: bool = False
    include: str | None = None
    pinned: bool = False
    fit_every: int | None = None
    fit_until: Moment | None = None
    weight_decay: float | None = None
    optional: bool = False

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        for name, kind in (("target", Target), ("mechanism", Mechanism)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                called = f"{value.__name__}(...), not the class" if isinstance(value, type) else f"not {value!r}"
                raise ValueError(f"Rule(match={self.match!r}, {name}=...): must be a {kind.__name__}, {called}")
        for name, known in (("match", ("@first", "@last", "@kernels")), ("include", ("@linear",))):
            pattern = getattr(self, name)
            if pattern is None and name == "include":
                continue
            if not isinstance(pattern, str):
                raise ValueError(f"Rule({name}={pattern!r}): must be a string")
            if pattern.startswith("@") and pattern not in known:
                names, hint = " and ".join(f'"{each}"' for each in known), nearest(pattern, known)
                raise ValueError(f"Rule({name}={pattern!r}): names with @ are {names}{hint}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"Rule({name}={pattern!r}): not a regular expression: {error}") from None
        for name in ("keep", "pinned", "optional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Rule({name}={getattr(self, name)!r}): must be True or False")
        if self.keep == (self.target is not None):
            raise ValueError(f"Rule(match={self.match!r}): give either target= or keep=True")
        if self.mechanism is not None and self.target is None:
            raise ValueError(f"Rule(match={self.match!r}): a mechanism needs a target")
        if self.fit_every is not None and not is_whole(self.fit_every):
            raise ValueError(f"Rule(fit_every={self.fit_every!r}): must be a whole number >= 1 of steps")
        if self.fit_until is not None:
            check_moment(self.fit_until, "Rule.fit_until")
        if self.weight_decay is not None and not (is_number(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"Rule(weight_decay={self.weight_decay!r}): must be a number >= 0, or None")
        for name in self.mechanism.own_cadence if self.mechanism is not None else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"Rule(match={self.match!r}, {name}={getattr(self, name)}): {type(self.mechanism).__name__} says "
                    "itself when its target is fitted; leave it out"
                )
        for name, moment in moments_of(self.mechanism).items() if self.mechanism is not None else ():
            check_moment(moment, f"{type(self.mechanism).__name__}.{name}")
        own = self.mechanism.fit_until if self.mechanism is not None and self.mechanism.fits_after else None
        if self.fit_until is not None and own is not None:
            raise ValueError(
                f"Rule(match={self.match!r}, fit_until={self.fit_until}): {type(self.mechanism).__name__} maps the "
                f"weights right after its own last fit (at {own}), which this could take away; leave it out"
            )
        if self.mechanism is not None and self.target is not None:
            for target in (self.target, self.mechanism.pull):
                reason = None if target is None else self.mechanism.check(target)
                if reason:
                    raise ValueError(f"Rule(match={self.match!r}): {reason}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training with rules of its own; stages follow one another.

    Within a stage, moments and fractions (`start`, `fit_until`, schedules) count from its first step to its last. When
    it ends, its weights are mapped: `w <- project(w)` (those of the last stage by `run.finalize()`). What later stages
    may not undo is then held whatever the optimizer does: the zeros of a sparse target (of `SparseLevels` too, also its
    survivors on a level zero) stay zero, so that from the second pruning stage on only survivors move; and a weight
    that no later stage claims again stays where it is altogether, unless its target left survivors free.

    Args:
        rules: at least one `Rule`, first match wins.
        share: its share of the training, in (0, 1]; the shares of all stages add up to 1.
        name: shown in plans and messages.

    Raises:
        ValueError: no rules, or a share outside (0, 1].

    Example:
        >>> import detent as dt
        >>> prune = dt.Rule(match="weight", target=dt.TopK(keep=0.1), mechanism=dt.HardProjection())
        >>> grid = dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.STE())
        >>> dt.Recipe(stages=[dt.Stage(rules=[prune], share=0.6), dt.Stage(rules=[grid], share=0.4)]).rules[1].target
        Uniform(bits=4, granularity='tensor', range='mse', param_dtype='float32', zero=True, rounds=20)

    Reference: Ye et al., "Progressive DNN Compression", arXiv 1903.09769: prune twice, then all layers but the first
    and last onto the grid, then those two.
    """

    rules: Sequence[Rule]
    share: float
    name: str = ""

    def __post_init__(self) -> None:
        if not is_number(self.share) or not 0.0 < self.share <= 1.0:
            raise ValueError(f"Stage(share={self.share!r}): must be a number in (0, 1]")
        if not isinstance(self.name, str):
            raise ValueError(f"Stage(name={self.name!r}): must be a string")
        object.__setattr__(self, "rules", _checked_rules(self.rules, "Stage"))


def _listed(given: Any, owner: str, field_name: str) -> tuple[Any, ...]:
    if isinstance(given, str | Tensor) or not isinstance(given, Iterable):
        raise ValueError(f"{owner}({field_name}={given!r}): must be a list")
    return tuple(given)


def _checked_rules(given: Sequence[Rule], owner: str) -> tuple[Rule, ...]:
    rules = _listed(given, owner, "rules")
    if not rules:
        raise ValueError(f"{owner}(rules=[]): give at least one Rule")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(f"{owner}(rules=...): every entry must be a Rule, not {type(rule).__name__}")
    return rules


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


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; for each parameter the first rule that matches wins.

    Rules pass over biases and normalisation weights (and every other 0-D or 1-D parameter) unless `include=` names
    them. A rule that ends up with nothing, because nothing matches or earlier rules took it all, is an error.

    Args:
        rules: at least one `Rule`; with stages, leave it out: it is then the rules of all stages in order.
        stages: parts of the training with rules of their own, instead of `rules`.

    Raises:
        ValueError: no rules, both rules and stages, or shares of stages that do not add up to 1.

    Example:
        >>> from detent import PSG, Uniform
        >>> recipe = Recipe([Rule(match=r"^0", target=Uniform(bits=4), mechanism=PSG())])
        >>> print(recipe.resolve(nn.Sequential(nn.Linear(4, 3))))
        parameter  shape   becomes          pulled by  note
        0.weight   (3, 4)  Uniform(bits=4)  PSG()
        0.bias     (3,)    full precision              passed over: bias; name it in include= to claim it
        12 of 15 weights claimed (80.0 %)
    """

    rules: Sequence[Rule] = ()
    stages: Sequence[Stage] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        stages = _listed(self.stages, "Recipe", "stages")
        for stage in stages:
            if not isinstance(stage, Stage):
                raise ValueError(f"Recipe(stages=...): every entry must be a Stage, not {type(stage).__name__}")
        if stages:
            if self.rules:
                raise ValueError("Recipe(rules=..., stages=...): give one of them; stages hold rules of their own")
            total = sum(stage.share for stage in stages)
            if abs(total - 1.0) > 1e-6:
                raise ValueError(f"Recipe(stages=...): the shares of the stages add up to {total:g}, not to 1")
        rules = tuple(rule for stage in stages for rule in stage.rules) if stages else self.rules
        object.__setattr__(self, "rules", _checked_rules(rules, "Recipe"))
        object.__setattr__(self, "stages", stages)

    def bounds(self, total_steps: int | None) -> list[tuple[int, int | None]]:
        """(first step, step after the last) of every stage; one stage without an end if there are none.

        Raises:
            ValueError: stages without `total_steps`, or a stage that gets no step.

        Example:
            >>> Recipe.preset("psg-w4").bounds(None)
            [(0, None)]
        """
        if not self.stages:
            return [(0, None)]
        if total_steps is None:
            raise ValueError("a recipe with stages needs attach(total_steps=...), of which they get their shares")
        ends = [
            round(total_steps * sum(stage.share for stage in self.stages[: i + 1])) for i in range(len(self.stages))
        ]
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        for i, (first, past) in enumerate(bounds):
            if past <= first:
                share = self.stages[i].share
                raise ValueError(f"stages[{i}] (share={share:g}) gets no step of attach(total_steps={total_steps})")
        return [*bounds]

    def stage_rules(self) -> list[range]:
        """The indices in `rules` that belong to each stage."""
        counts = [len(stage.rules) for stage in self.stages] or [len(self.rules)]
        return [range(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]

    def called(self, index: int, field: str = "match") -> str:
        """A rule of `rules` in words, by its place in a recipe file.

        Example:
            >>> Recipe.preset("psg-w4").called(0)
            "rule 0 (match='@first')"
        """
        stage, mine = next((s, mine) for s, mine in enumerate(self.stage_rules()) if index in mine)
        place = f"stages[{stage}].rules[{index - mine.start}]" if self.stages else f"rule {index}"
        return f"{place} ({field}={getattr(self.rules[index], field)!r})"

    def without_mechanisms(self) -> Recipe:
        """The same targets with nothing that pulls: what a model that is not trained is compressed by.

        Example:
            >>> Recipe.preset("psg-w4").without_mechanisms().rules[-1].mechanism is None
            True
        """
        assert not self.stages, "stages are parts of a training"
        return Recipe([replace(rule, mechanism=None, fit_until=None, fit_every=None) for rule in self.rules])

    @staticmethod
    def preset(name: str, **changes: Any) -> Recipe:
        """A ready recipe by name; `print(Recipe.preset(name).to_yaml())` shows what it stands for.

        Names: psg-w8, psg-w6, psg-w4, psg-w3, psg-w2 (PSG onto a b-bit grid, first and last weight at 8 bits),
        psg-prune90 (PSG towards zero, then the 10 % largest of the whole model), psg-paper-w4, -w3, -w2 (the
        published form: running min-max range, lambda_s = 150, linear biases too, first and last at 8 bits when b <= 3,
        and at 2 bits no weight decay: build the optimizer from `param_groups`), kq, kq-layer (for a pre-trained CNN:
        512 codewords for the kernels, of the whole model or of each layer, everything else at 8 bits a channel),
        admm-prune-10x, -70x, -246x (progressive ADMM in two stages, one threshold over the model, by the Fisher
        metric), admm-binary (one bit in all layers, first and last in a second stage), md-binary, md-ternary (mirror
        descent from scratch, every weight on two or three levels with one scale a tensor; published with Adam and
        without weight decay), uniform-w8, -w6, -w4, -w3, -w2 (for `detent.compress` alone, without training: every
        weight on a b-bit grid, one step an output channel).

        Args:
            name: one of these.
            changes: fields of its mechanisms, as `start=0.3`; all mechanisms that have such a field get it.

        Raises:
            ValueError: an unknown name, with the nearest known one, or a change that none of its mechanisms takes.

        Example:
            >>> len(Recipe.preset("psg-w4").rules)
            3
            >>> Recipe.preset("psg-w4", start=0.3).rules[-1].mechanism.start
            0.3
        """
        if not isinstance(name, str) or name not in PRESETS:
            hint = nearest(str(name), PRESETS)
            raise ValueError(f"Recipe.preset({name!r}): unknown{hint}; known: {', '.join(PRESETS)}")
        made, taken = PRESETS[name](), set()
        known: set[str] = set()

        def rule(fields: dict[str, Any]) -> Rule:
            own = {f.name for f in fields_of(fields["mechanism"])} if "mechanism" in fields else set()
            known.update(own)
            mine = {key: value for key, value in changes.items() if key in own}
            taken.update(mine)
            return Rule(**{**fields, "mechanism": replace(fields["mechanism"], **mine)} if mine else fields)

        if "stages" in made:
            stages = [
                Stage(**{**fields, "rules": [rule(each) for each in fields["rules"]]}) for fields in made["stages"]
            ]
            recipe = Recipe(stages=stages)
        else:
            recipe = Recipe([rule(fields) for fields in made["rules"]])
        if unknown := sorted(changes.keys() - taken):
            hint = nearest(unknown[0], known)
            if any(hasattr(each.target, unknown[0]) for each in recipe.rules):
                hint = ", and its targets are as they are: choose another preset, or write the rule"
            raise ValueError(
                f"Recipe.preset({name!r}, {unknown[0]}=...): none of its mechanisms has that field{hint}"
                + (f"; they have {', '.join(sorted(known))}" if known else "")
            )
        return recipe

    @staticmethod
    def from_yaml(source: str | Path) -> Recipe:
        """A recipe from YAML text, or from a file if `source` is a path to one.

        Raises:
            ValueError: anything that is not a recipe; an unknown key is refused with the nearest valid name.

        Example:
            >>> text = "rules:\\n- {match: weight, target: {kind: Uniform, bits: 4}, mechanism: {kind: PSG}}"
            >>> Recipe.from_yaml(text).rules[0].target
            Uniform(bits=4, granularity='tensor', range='mse', param_dtype='float32', zero=True, rounds=20)
        """
        if not isinstance(source, (str, Path)):
            raise ValueError(f"Recipe.from_yaml({source!r}): must be YAML text, or a path to a file of it")
        if isinstance(source, Path) or ("\n" not in source and source.endswith((".yaml", ".yml"))):
            try:
                return Recipe.from_yaml(Path(source).read_text(encoding="utf-8") + "\n")
            except FileNotFoundError:
                raise FileNotFoundError(f"cannot open {source}: No such file or directory") from None
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
        try:
            data = yaml.load(source, _OnceLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"recipe: not YAML: {error}") from None
        for key in data if isinstance(data, dict) else ():
            if key not in ("rules", "stages"):
                near = nearest(str(key), ["rules", "stages"])
                raise ValueError(f"recipe: no key {key!r}{near}; a recipe has the one key 'rules', or 'stages'")
        keys = list(data) if isinstance(data, dict) else []
        if len(keys) != 1 or not isinstance(data[keys[0]], list):
            raise ValueError("recipe: must be a mapping with the one key 'rules' (a list of rules), or 'stages'")
        if keys == ["stages"]:
            return Recipe(stages=[_stage(entry, f"stages[{i}]") for i, entry in enumerate(data["stages"])])
        return Recipe([build(Rule, entry, f"rules[{i}]") for i, entry in enumerate(data["rules"])])

    def to_yaml(self) -> str:
        """The recipe as YAML that `from_yaml` reads back to an equal recipe.

        Example:
            >>> recipe = Recipe.preset("psg-w4")
            >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
            True
        """

        def plain(rules: Sequence[Rule]) -> list[dict[str, Any]]:
            return [{k: v for k, v in to_spec(rule).items() if k != "kind"} for rule in rules]

        stages = [
            {**({"name": stage.name} if stage.name else {}), "share": stage.share, "rules": plain(stage.rules)}
            for stage in self.stages
        ]
        data = {"stages": stages} if stages else {"rules": plain(self.rules)}
        return yaml.safe_dump(data, sort_keys=False, width=120)

    def param_groups(self, model: nn.Module, **options: Any) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with the weight decay that rules ask for.

        Args:
            model: the model.
            options: optimizer options that every group gets (lr, weight_decay, ...); a rule's weight decay wins.

        Example:
            >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4))
            >>> groups = Recipe.preset("psg-paper-w2").param_groups(net, lr=0.1, weight_decay=1e-4)
            >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
            [(4, 0.0), (2, 0.0001)]
        """
        plan = self.resolve(model)
        asked: dict[str, float | None] = {}
        for claim in (claim for stage in plan.stages for claim in stage if claim.claimed):
            decay = plan.rule_of(claim).weight_decay
            if asked.setdefault(claim.name, decay) != decay:
                raise ValueError(
                    f"{claim.name!r}: its stages ask for weight decay {asked[claim.name]} and {decay}, but a parameter "
                    "sits in one group all along"
                )
        groups: dict[float | None, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            groups.setdefault(asked.get(canonical_name(name)), []).append(parameter)
        return [
            {**options, **({} if decay is None else {"weight_decay": decay}), "params": parameters}
            for decay, parameters in groups.items()
        ]

    def resolve(self, model: nn.Module) -> Plan:
        """Decide for every parameter of a model; touches no weights, works on the meta device.

        Raises:
            ValueError: a rule that claims nothing, a target that refuses a parameter, or an embedding with `max_norm`,
                whose forward pass writes its weight.

        Example:
            >>> Recipe([Rule(match="wieght", keep=True)]).resolve(nn.Linear(2, 2))
            Traceback (most recent call last):
            ...
            ValueError: rule 0 (match='wieght') matches no parameter of this model; the nearest name is 'weight'
        """
        refuse_no_model(model, "Recipe.resolve")
        found = list(_parameters(model))
        for odd in [name for name, times in Counter(p.name for p in found).items() if times > 1][:1]:
            raise ValueError(f"two parameters of this model have the canonical name {odd!r}; rename one of the modules")
        eligible = [p for p in found if not p.passed_over]
        # A position embedding or a class token of the model's own is no layer.
        eligible = [p for p in eligible if "weight" in _own_name(p.name)] or eligible
        special: dict[str, set[str]] = {}
        for where, end in (("@first", eligible[:1]), ("@last", eligible[-1:])):
            special[where] = {p.name for p in end}
            special[f"beside {where}"] = {p.name for p in found if p.passed_over and p.layer in {e.layer for e in end}}
        special["@kernels"] = {p.name for p in eligible if math.prod(p.layout.shape[2:]) > 1}
        matched, taken = [0] * len(self.rules), [0] * len(self.rules)
        # Once for all parameters: Python's own memory of patterns is shorter than a long recipe.
        patterns = [(re.compile(rule.match), re.compile(_included(rule))) for rule in self.rules]
        by_stage = [
            tuple(self._decide(p, mine, patterns, special, matched, taken) for p in found)
            for mine in self.stage_rules()
        ]
        names = [name for p in found for name in (p.name, *p.aliases)]
        for i, rule in enumerate(self.rules):
            if taken[i] or rule.optional:
                continue
            if matched[i]:
                why = f"only matches parameters that are passed over or claimed by earlier rules ({matched[i]} matched)"
            else:
                why = f"matches no parameter of this model{_nearest_name(rule.match, names)}"
            raise ValueError(f"{self.called(i)} {why}")
        for i, rule in enumerate(self.rules):
            if (
                rule.include not in (None, "@linear")
                and not rule.optional
                and not any(patterns[i][1].search(name) for name in names)
            ):
                hint = _nearest_name(rule.include, names)
                raise ValueError(f"{self.called(i, 'include')} names no parameter of this model{hint}")
        if not any(taken):
            raise ValueError("every rule of this recipe is optional, and none finds a parameter in this model")
        return Plan(recipe=self, claims=merged(by_stage), stages=tuple(by_stage))

    def _decide(
        self,
        p: _Found,
        mine: range,
        patterns: Sequence[tuple[re.Pattern[str], re.Pattern[str]]],
        special: Mapping[str, set[str]],
        matched: list[int],
        taken: list[int],
    ) -> Claim:
        decided: tuple[int | None, str] | None = None
        passed = ""
        for i in mine:
            rule = self.rules[i]
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
                decided = (None, f"kept by {self.called(i)}")
                continue
            if p.passed_over and not named:
                passed = passed or f"passed over: {p.passed_over}; name it in include= to claim it"
                continue
            assert rule.target is not None
            reason = rule.target.accepts(p.layout.shape, p.dtype, p.layout)
            if reason:
                raise ValueError(f"{p.name!r} claimed by {self.called(i)}: {reason}")
            if p.writer:
                raise ValueError(
                    f"{p.name!r} claimed by {self.called(i)}: the forward pass of {p.writer} writes its "
                    "weight, which nothing else may do here; use max_norm=None, or keep it in full precision"
                )
            taken[i] += 1
            decided = (i, "")
        rule_index, reason = decided or (None, passed or _UNMATCHED)
        return Claim(name=p.name, aliases=p.aliases, layout=p.layout, dtype=p.dtype, rule=rule_index, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe resolved against a model: what every parameter becomes, and why some stay full precision.

    Args:
        recipe: the recipe.
        claims: one entry a parameter, in the model's order; with stages, where the parameter stands in the end.
        stages: the claims of every stage (one if the recipe has none).

    Example:
        >>> plan = Recipe.preset("psg-w4").resolve(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)))
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


@dataclass(frozen=True, kw_only=True)
class _Found:
    name: str
    aliases: tuple[str, ...]
    layout: Layout
    dtype: torch.dtype
    passed_over: str
    layer: int
    linear_bias: bool
    writer: str


def _included(rule: Rule) -> str:
    """The pattern of `include`; one that finds nothing for none, and for `@linear`, which is no pattern."""
    return "(?!)" if rule.include in (None, "@linear") else rule.include


def _nearest_name(pattern: str, names: Sequence[str]) -> str:
    """The parameter that a pattern without a match may have meant; any resemblance counts."""
    near = difflib.get_close_matches(pattern.strip("^$").replace("\\", ""), names, 1, 0.0)
    return f"; the nearest name is {near[0]!r}" if near else ""


def refuse_no_model(model: Any, who: str) -> None:
    """Refuse what is no module, as a state dict, or an optimizer that stands in its place.

    Raises:
        ValueError: saying what to give.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{who}(model=...): must be a torch.nn.Module, not {type(model).__name__}")


def refuse_no_recipe(recipe: Any, who: str) -> None:
    """Refuse what is no recipe, above all the name of one.

    Raises:
        ValueError: saying what to give instead.
    """
    if not isinstance(recipe, Recipe):
        said, advice = type(recipe).__name__, "a detent.Recipe"
        if isinstance(recipe, str):
            said, advice = repr(recipe), f"detent.Recipe.preset({recipe!r})"
        elif isinstance(recipe, Rule) or (isinstance(recipe, Sequence) and all(isinstance(r, Rule) for r in recipe)):
            advice = "detent.Recipe([...]) of it" if isinstance(recipe, Rule) else "detent.Recipe(...) of them"
        raise ValueError(f"{who}(recipe={said}): must be a Recipe; give {advice}")


def canonical_name(name: str) -> str:
    """A parameter name without the segments that wrappers (DDP, compile, checkpoint, FSDP) insert.

    Example:
        >>> canonical_name("module._orig_mod.fc.weight")
        'fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _parameters(model: nn.Module) -> Iterator[_Found]:
    """Every distinct parameter once, under its first name, with its tied aliases."""
    names: dict[int, list[str]] = {}
    owners: dict[int, tuple[nn.Module, nn.Parameter, bool]] = {}
    writers: dict[int, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        gains, layer = _weight_norm_gains(module), module
        if isinstance(module, ParametrizationList):  # what it makes is the weight of the module above
            layer = model.get_submodule(re.sub(r"(^|\.)parametrizations\.[^.]+$", "", module_name))
        for own, parameter in module._parameters.items():
            if parameter is not None:
                full = canonical_name(f"{module_name}.{own}" if module_name else own)
                seen = names.setdefault(id(parameter), [])
                if full not in seen:
                    seen.append(full)
                owners.setdefault(id(parameter), (layer, parameter, own in gains))
                if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                    writers[id(parameter)] = f"{type(module).__name__}(max_norm={module.max_norm:g})"
    for key, (module, parameter, gain) in owners.items():
        first, *others = names[key]
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{first!r} has no shape yet (a lazy module); run one batch through the model first")
        transposed = bool(getattr(module, "transposed", False)) and parameter.dim() >= 3
        yield _Found(
            name=first,
            aliases=tuple(others),
            dtype=parameter.dtype,
            layout=Layout(
                shape=tuple(parameter.shape),
                channel_dim=1 if transposed else 0,
                conv_groups=int(module.groups) if transposed else 1,  # type: ignore[arg-type]
            ),
            passed_over="gain of a weight normalisation" if gain else _passed_over(first, parameter, module),
            layer=id(module),
            linear_bias=isinstance(module, nn.Linear) and parameter is module.bias,
            writer=writers.get(key, ""),
        )


def _own_name(name: str) -> str:
    """What its module calls a parameter, also where a parametrization stands between them.

    Example:
        >>> _own_name("conv.weight"), _own_name("conv.parametrizations.weight.original1")
        ('weight', 'weight')
    """
    *_, own = name.split(".parametrizations." if ".parametrizations." in name else ".")
    return own.removeprefix("parametrizations.").split(".")[0]


def _weight_norm_gains(module: nn.Module) -> set[str]:
    """Names of the parameters that are the sizes of weights whose directions are parameters of their own."""
    if isinstance(module, ParametrizationList):
        return {"original0"} if type(module[0]).__name__ == "_WeightNorm" else set()
    hooks = module._forward_pre_hooks.values()
    return {f"{hook.name}_g" for hook in hooks if isinstance(hook, WeightNorm)}


def _passed_over(name: str, parameter: nn.Parameter, module: nn.Module) -> str:
    if _own_name(name).startswith("bias"):
        return "bias"
    if isinstance(module, _NORMS):
        return "normalisation weight"
    if parameter.dim() < 2:
        return f"{parameter.dim()}-D parameter (bias, gain or normalisation weight)"
    return ""


# --- Stages as plain data ---------------------------------------------------------------------------------------------


class _OnceLoader(yaml.SafeLoader):
    """YAML's safe loader, which takes the last of several values for one key, and with it a typing error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # what it brings may be overwritten
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"recipe: line {line}: the key {key!r} stands twice in one mapping")
            seen.append(key)
        return super().construct_mapping(node, deep)


def _stage(values: Any, where: str) -> Stage:
    if not isinstance(values, dict) or not isinstance(values.get("rules"), list):
        raise ValueError(f"{where}: must be a mapping with share, rules (a list) and, if wanted, name")
    for key in values:
        if key not in ("name", "share", "rules"):
            raise ValueError(f"{where}: Stage has no field {key!r}{nearest(str(key), ('name', 'share', 'rules'))}")
    if not is_number(values.get("share")):
        raise ValueError(f"{where}.share: must be given, a number in (0, 1]")
    rules = [build(Rule, entry, f"{where}.rules[{i}]") for i, entry in enumerate(values["rules"])]
    try:
        return Stage(rules=rules, share=values["share"], name=str(values.get("name", "")))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
