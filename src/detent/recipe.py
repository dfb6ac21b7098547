"""Recipes: which weights go where, and how. A `Recipe` is data; resolved against a model it is a `Plan`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, ClassVar

import yaml
from torch import Tensor, nn

from detent.activations import Activation
from detent.grouping import MOST_AXES
from detent.mechanisms import Cadence, Mechanism
from detent.parameters import canonical_name
from detent.plan import Plan, resolve
from detent.presets import PRESETS
from detent.schedules import Moment, check_moment, is_number, is_whole, moments_of
from detent.specs import build, check_pattern, check_size, nearest, to_spec
from detent.targets import Target

__all__ = ["Plan", "Recipe", "Rule", "Stage", "refuse_no_recipe"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of the parameters whose name matches.

    Args:
        match: regular expression searched in the canonical parameter name, or "@weights" for every weight of the model
            by structure, whatever it is called (floating-point, two axes or more, no bias, normalisation weight or
            scale of a reparametrization), or "@first" / "@last" for the first / last layer's weight (and its bias,
            where `include` names it), or "@kernels" for every convolution larger than 1 x 1.
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
        axis: axis of the output channels of the tensors that match, 0 to 15; `None` for what is known of their module:
            torch's layers, transformers' `Conv1D` (axis 1) and experts; else the plan says what it assumes.
        batch_axes: axes along which several such tensors are stacked, as experts are; `None` likewise.

    Raises:
        ValueError: a field of another type, an invalid regular expression, a rule with both or neither of `target`
            and `keep`, or an axis that is given twice.

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
    axis: int | None = None
    batch_axes: Sequence[int] | None = None

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        for name, kind in (("target", Target), ("mechanism", Mechanism)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                called = f"{value.__name__}(...), not the class" if isinstance(value, type) else f"not {value!r}"
                raise ValueError(f"Rule(match={self.match!r}, {name}=...): must be a {kind.__name__}, {called}")
        for name, known in (("match", ("@first", "@last", "@kernels", "@weights")), ("include", ("@linear",))):
            pattern = getattr(self, name)
            if pattern is None and name == "include":
                continue
            check_pattern(pattern, f"Rule({name}", known)
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
        self._check_axes()
        cadence = self._own_cadence
        for name in cadence.own if cadence else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"Rule(match={self.match!r}, {name}={getattr(self, name)}): {type(self.mechanism).__name__} says "
                    "itself when its target is fitted; leave it out"
                )
        for name, moment in moments_of(self.mechanism).items() if self.mechanism is not None else ():
            check_moment(moment, f"{type(self.mechanism).__name__}.{name}")
        own = cadence.until if cadence and cadence.after else None
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

    @property
    def cadence(self) -> Cadence | None:
        """When what its mechanism pulls to is fitted; `None` without a mechanism."""
        own = self._own_cadence
        return None if own is None else own.asked(every=self.fit_every, until=self.fit_until)

    @property
    def _own_cadence(self) -> Cadence | None:
        if self.mechanism is None or self.target is None:
            return None
        return self.mechanism.cadence(self.mechanism.pull or self.target)

    def _check_axes(self) -> None:
        if self.axis is not None and not is_whole(self.axis, 0, MOST_AXES - 1):
            raise ValueError(f"Rule(axis={self.axis!r}): must be a whole number from 0 to {MOST_AXES - 1}, or None")
        if self.batch_axes is None:
            return
        given = _listed(self.batch_axes, "Rule", "batch_axes")
        if not all(is_whole(axis, 0, MOST_AXES - 1) for axis in given) or len({*given}) != len(given):
            raise ValueError(f"Rule(batch_axes={self.batch_axes!r}): must be distinct whole numbers from 0, or None")
        if self.axis in given:
            raise ValueError(f"Rule(axis={self.axis}, batch_axes={self.batch_axes!r}): an axis is one or the other")
        object.__setattr__(self, "batch_axes", tuple(sorted(given)))


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


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; for each parameter the first rule that matches wins.

    Rules pass over biases and normalisation weights (and every other 0-D or 1-D parameter) unless `include=` names
    them. A rule that ends up with nothing, because nothing matches or earlier rules took it all, is an error.

    Args:
        rules: at least one `Rule`; with stages, leave it out: it is then the rules of all stages in order.
        stages: parts of the training with rules of their own, instead of `rules`.
        activations: which inputs of layers are rounded, and how; none if empty.

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
        scales, levels and masks: fitted once
        PSG: sets its gain by itself; the base optimizer runs untouched until 0.4 of training
    """

    rules: Sequence[Rule] = ()
    stages: Sequence[Stage] = field(default=(), kw_only=True)
    activations: Sequence[Activation] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        activations = _listed(self.activations, "Recipe", "activations")
        for each in activations:
            if not isinstance(each, Activation):
                raise ValueError(
                    f"Recipe(activations=...): every entry must be an Activation, not {type(each).__name__}"
                )
        object.__setattr__(self, "activations", activations)
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
            raise ValueError(
                "pass total_steps= (calls of optimizer.step() in the whole training) to attach: "
                "the stages of a recipe get their shares of it"
            )
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
        rules = [replace(rule, mechanism=None, fit_until=None, fit_every=None) for rule in self.rules]
        return Recipe(rules, activations=self.activations)

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
        data = _plain(source)
        known = ("rules", "stages", "activations")
        for key in data if isinstance(data, dict) else ():
            if key not in known:
                near = nearest(str(key), known)
                has = "a recipe has the one key 'rules', or 'stages', and may have 'activations'"
                raise ValueError(f"recipe: no key {key!r}{near}; {has}")
        keys = [key for key in known[:2] if isinstance(data, dict) and key in data]
        if len(keys) != 1 or not isinstance(data[keys[0]], list):
            raise ValueError("recipe: must be a mapping with the one key 'rules' (a list of rules), or 'stages'")
        given = data.get("activations", [])
        if not isinstance(given, list):
            raise ValueError("recipe: activations must be a list")
        rounded = [build(Activation, entry, f"activations[{i}]") for i, entry in enumerate(given)]
        if keys == ["stages"]:
            stages = [_stage(entry, f"stages[{i}]") for i, entry in enumerate(data["stages"])]
            return Recipe(stages=stages, activations=rounded)
        rules = [build(Rule, entry, f"rules[{i}]") for i, entry in enumerate(data["rules"])]
        return Recipe(rules, activations=rounded)

    def to_yaml(self) -> str:
        """The recipe as YAML that `from_yaml` reads back to an equal recipe.

        Example:
            >>> recipe = Recipe.preset("psg-w4")
            >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
            True
        """

        def plain(rules: Sequence[Rule | Activation]) -> list[dict[str, Any]]:
            return [{k: v for k, v in to_spec(rule).items() if k != "kind"} for rule in rules]

        stages = [
            {**({"name": stage.name} if stage.name else {}), "share": stage.share, "rules": plain(stage.rules)}
            for stage in self.stages
        ]
        data = {"stages": stages} if stages else {"rules": plain(self.rules)}
        data |= {"activations": plain(self.activations)} if self.activations else {}
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

    def resolve(self, model: nn.Module, *, example: Any = None) -> Plan:
        """Decide for every parameter of a model; touches no weights, works on the meta device.

        Args:
            model: the model.
            example: a tensor, a tuple of arguments or a mapping of keyword arguments that the model takes. Where it is
                given, "@first" and "@last" go by execution: every layer that the example reaches through no other, and
                every layer that an output sees through no other. Else they go by the order of registration, and for a
                language model of transformers by its head.

        Raises:
            ValueError: a rule that claims nothing, a target that refuses a parameter, or an embedding with `max_norm`,
                whose forward pass writes its weight.

        Example:
            >>> Recipe([Rule(match="wieght", keep=True)]).resolve(nn.Linear(2, 2))
            Traceback (most recent call last):
            ...
            ValueError: rule 0 (match='wieght') matches no parameter of this model; the nearest name is 'weight'
        """
        return resolve(self, model, example=example)


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


# --- Stages as plain data ---------------------------------------------------------------------------------------------


_LONGEST = 1 << 18  # characters of a recipe: some three thousand rules


class _OnceLoader(yaml.SafeLoader):
    """YAML's safe loader, which takes the last of several values for one key, and with it a typing error."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        check_size(_outline(node), "recipe")  # before merge keys and aliases are written out
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # what it brings may be overwritten
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused by the loader itself
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"recipe: line {line}: the key {key!r} stands twice in one mapping")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _outline(node: yaml.Node | None) -> Any:
    """The nodes of a document as lists within lists, shared and looping where aliases are."""
    made: dict[int, list[Any]] = {}

    def of(node: yaml.Node) -> Any:
        if not isinstance(node, yaml.CollectionNode):
            return None
        if id(node) not in made:
            made[id(node)] = []
            todo.append(node)
        return made[id(node)]

    todo: list[yaml.CollectionNode] = []
    whole = None if node is None else of(node)
    while todo:
        here = todo.pop()
        parts = [part for pair in here.value for part in pair] if isinstance(here, yaml.MappingNode) else here.value
        made[id(here)] += [of(part) for part in parts]
    return whole


def _plain(text: str) -> Any:
    """YAML as plain data, in bounded time.

    Raises:
        ValueError: text that is no YAML, or too long, too deep or too large to be a recipe.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"recipe: longer than {_LONGEST} characters")
    try:
        data = yaml.load(text, _OnceLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"recipe: not YAML: {error}") from None
    except ValueError as error:  # numbers and dates that are none
        raise ValueError(str(error) if str(error).startswith("recipe: ") else f"recipe: not YAML: {error}") from None
    check_size(data, "recipe")
    return data


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
