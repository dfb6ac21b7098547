"""A claimed weight as the engine knows it: where it is, what is fitted to it, what its mechanism remembers of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detent import sharding
from detent.mechanisms import Cadence, Clock, Mechanism
from detent.mechanisms.base import never_zero
from detent.parameters import named_parameters
from detent.plan import Claim, Plan
from detent.recipe import Recipe, Rule
from detent.schedules import Schedule, check_moment, moments_of, step_at
from detent.specs import short
from detent.targets import Params, Target
from detent.targets.base import compute_dtype
from detent.undoing import without_gradients
from detent.writes import Seal, holds_on_to, sealed

__all__ = [
    "Entry",
    "Held",
    "by_rule",
    "entries_of",
    "fit_pull",
    "fit_target",
    "mapped_whole",
    "refuse_nonfinite",
    "refuse_split_rules",
    "refuse_stages",
    "refuse_unpulled",
    "rehearse",
    "retyped",
    "still_fits",
]

_T = TypeVar("_T")
_FOREIGN = -2  # no count of writes
_NEARER = 1e-2  # how much smaller survivors are made to see whether a level is 0 whatever the weights are


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a step may change of a weight besides its values."""

    params: Params | None
    pull_params: Params | None
    fitted_at: int
    state: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Everything:
    """A weight, and all that is known of it."""

    value: Tensor
    held: Held
    zeros: Tensor | None
    settled: bool
    before: Tensor | None
    loaded: Tensor | None
    found: dict[str, Any]
    version: int
    seal: Seal | None


@dataclass(kw_only=True)
class Entry:
    """One claimed parameter: what the plan said, and what the engine knows of it now."""

    claim: Claim
    rule: Rule
    param: Tensor
    stage: int = 0
    staged: bool = False
    zeros: Tensor | None = None
    settled: bool = False
    params: Params | None = None
    pull_params: Params | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    version: int = -1
    seal: Seal | None = None
    fitted_at: int = -1
    found: dict[str, Any] = field(default_factory=dict)  # numbers of the whole weight
    lent: nn.Parameter | None = None  # what the optimizer is given in this step in place of a half-precision weight
    before: Tensor | None = None  # what attach wrote over, until training begins
    chosen: Tensor | None = None  # places that a calibration chose for the weights as they are now, and these params
    loaded: Tensor | None = None  # a number a row of the weights that a loaded state belongs to, until training goes on

    @property
    def name(self) -> str:
        return self.claim.name

    @property
    def mechanism(self) -> Mechanism:
        assert self.rule.mechanism is not None
        return self.rule.mechanism

    @property
    def target(self) -> Target:
        assert self.rule.target is not None
        return self.rule.target

    @property
    def pull(self) -> Target:
        """The target that training pulls to."""
        other = self.rule.mechanism.pull if self.rule.mechanism else None
        return other or self.target

    @property
    def has_own_fit(self) -> bool:
        """Whether what training pulls to and what the compressed life lies on are fitted apart."""
        return self.pull is not self.target or (self.rule.mechanism is not None and bool(self.rule.mechanism.offset))

    @property
    def known(self) -> Params | None:
        """What a fit of the rule's own target goes on from.

        That of what training pulls to, if it is the same: K-means started over would find another codebook.
        """
        if self.pull is self.target:
            return self.pull_params
        return None if self.params is None else self.target.carried(self.params)

    @property
    def is_ours(self) -> bool:
        """Whether nobody else wrote the weight since the engine last did, or it was put back as it was.

        The count of writes says whether to look; a write through `.data` moves none, and `holds` finds it.
        """
        return self.version in (-1, _version_of(self.param)) or self.holds()

    @property
    def is_ours_in_step(self) -> bool:
        """The same before a step, which replaces the weight by a memory or holds part of it: a write would be undone.

        There a write that moved no count is looked for too; elsewhere such a write is what training goes on from.
        """
        if self.is_replaced or self.is_fixed:
            return self.holds()
        if not self.is_ours:
            return False
        partly = self.zeros is not None or not self.state.keys().isdisjoint(("mask", "frozen"))
        return not partly or self.holds() or holds_on_to(sharding.local(self.param), self.zeros, self.state)

    def holds(self) -> bool:
        """Whether the weight is bitwise what it was when the engine last wrote it, whatever was written meanwhile."""
        if self.seal is None:
            return self.version in (-1, _version_of(self.param))
        return self.seal.holds(sharding.local(self.param))

    @property
    def is_sparse(self) -> bool:
        """Whether the target leaves survivors free, so that only its zeros bind."""
        return self.target.leaves_free

    @property
    def holds_zeros(self) -> bool:
        """Whether the zeros of the target bind later stages.

        All of them: a survivor that lies on a level zero is not told apart from what was pruned, nor has it anything
        left that a later stage could build on.
        """
        return self.target.leaves_free or self.target.prunes

    @property
    def is_fixed(self) -> bool:
        """Whether the stage is over and the weight stays where it was mapped to."""
        return self.settled and not self.is_sparse

    def hold(self) -> None:
        """Put back the zeros of earlier stages."""
        if self.zeros is not None:
            sharding.local(self.param).masked_fill_(self.zeros, 0.0)
            if "latent" in self.state:
                self.state["latent"].masked_fill_(self.zeros, 0.0)
            if self.lent is not None:
                self.lent.data.masked_fill_(self.zeros, 0.0)

    def map_into_target(self) -> None:
        """The stage is over: the weight goes to its nearest place, and the zeros of a target that prunes are held."""
        assert self.params is not None
        self.write(self.map_whole(self.target.project, self.target, self.params, self.hidden()))
        self.state.clear()
        if self.holds_zeros:
            gone = sharding.local(self.param) == 0
            self.zeros = gone if self.zeros is None else gone | self.zeros

    def forget(self) -> None:
        """Be as before the first fit."""
        self.params = self.pull_params = self.zeros = None
        self.state, self.found, self.settled, self.fitted_at = {}, {}, False, -1

    def adopt(self, *, passing: bool = False) -> None:
        """Take the weight as it is now for our own writing; `passing` by in a step, remember a sample of it alone."""
        self.version = _version_of(self.param)
        self.seal = sealed(sharding.local(self.param), whole=not passing)

    def reseal(self, seal: Seal | None) -> None:
        """Take a weight that was put back as it was for our own writing."""
        self.version, self.seal = _version_of(self.param), seal

    def keep(self, *, whole: bool) -> None:
        """Take a weight that holds what it held for our own writing; from now on, if `whole`, remember all of it."""
        self.version = _version_of(self.param)
        if whole and self.seal is not None and not self.seal.is_whole:
            self.adopt()

    @property
    def is_narrow(self) -> bool:
        """Whether the weight is half precision, but what the optimizer moves in its place is not."""
        moves = self.rule.mechanism.moves if self.rule.mechanism else None
        return moves is not None and self.param.dtype != compute_dtype(self.param.dtype)

    @property
    def is_replaced(self) -> bool:
        """Whether the optimizer moves a memory in place of the weight now."""
        return self.rule.mechanism is not None and self.rule.mechanism.moves in self.state

    @property
    def is_wide(self) -> bool:
        """Whether the optimizer moves a float32 memory in place of this half-precision weight now."""
        return self.is_narrow and self.is_replaced

    @property
    def moved(self) -> Tensor:
        """What the optimizer of the step at hand moves."""
        return self.param if self.lent is None else self.lent

    def disown(self) -> None:
        """Take the weight as it is for somebody else's writing."""
        self.version, self.seal = _FOREIGN, None

    def keep_before(self, value: Tensor) -> None:
        """Remember what attach wrote over, as a state that is loaded later may belong to that."""
        if not torch.equal(value, sharding.local(self.param)):
            self.before = value

    def go_on(self) -> None:
        """Training goes on: what was loaded, and written before, is past."""
        self.before = self.loaded = None

    def held(self) -> Held:
        """What a step may change besides the weight; memory is replaced in its first half, never written in place."""
        return Held(params=self.params, pull_params=self.pull_params, fitted_at=self.fitted_at, state=dict(self.state))

    def put_back(self, held: Held) -> None:
        """Be as before a step that raised."""
        self.params, self.pull_params, self.fitted_at = held.params, held.pull_params, held.fitted_at
        self.state.clear()
        self.state.update(held.state)

    def everything(self) -> _Everything:
        """All that is known of the weight, and a copy of it."""
        return _Everything(
            value=sharding.local(self.param).clone(),
            held=self.held(),
            zeros=self.zeros,
            settled=self.settled,
            before=self.before,
            loaded=self.loaded,
            found=dict(self.found),
            version=self.version,
            seal=self.seal,
        )

    def be_again(self, was: _Everything) -> None:
        """Be as then."""
        self.write(was.value)
        self.put_back(was.held)
        self.zeros, self.settled, self.before, self.loaded = was.zeros, was.settled, was.before, was.loaded
        self.found = was.found
        if was.version == _FOREIGN:
            self.disown()
        else:
            self.reseal(was.seal)

    def mark(self) -> tuple[int, bool]:
        """What a closure that is evaluated too late would find changed: the weight, and whether it has a gradient."""
        return self.moved._version, self.moved.grad is None

    @functools.cached_property
    def cadence(self) -> Cadence:
        """When its pull is fitted."""
        found = self.rule.cadence
        assert found is not None
        return found

    def frozen_from(self, total_steps: int | None) -> int | None:
        """The step from which the fit is over, or `None`."""
        return self.cadence.ends(total_steps, f"fit_until of {self.rule.match!r}")

    def check_moments(self, total_steps: int | None) -> None:
        """Find a moment that cannot be resolved, or lies beyond the end, now and not at step 3,000.

        Raises:
            ValueError: naming the moment, and the stage with its length.
        """
        try:
            self._check_moments(total_steps)
        except ValueError as error:
            if not self.staged:
                raise
            raise ValueError(f"stages[{self.stage}], which has {total_steps} steps: {error}") from None

    def _check_moments(self, total_steps: int | None) -> None:
        clock = Clock(step=0, total_steps=total_steps)
        self.mechanism.active(clock)
        for name, value in vars(self.mechanism).items():
            if isinstance(value, Schedule):
                try:
                    value(0, total_steps)
                except ValueError as error:
                    raise ValueError(f"{error} ({type(self.mechanism).__name__}.{name})") from None
        self.frozen_from(total_steps)  # after the mechanism, which may be where the moment comes from and can name it
        last = self.mechanism.mapping(self.target, clock)
        if total_steps is not None and last is not None and last[0] > total_steps:
            part = "its stage" if self.staged else "training"
            where = f"{last[1]} is at step {last[0]}, but {part} has {total_steps} steps"
            raise ValueError(f"{self.name!r}: {where}, so it would never come")
        for name, moment in moments_of(self.mechanism).items():
            check_moment(moment, f"{type(self.mechanism).__name__}.{name}")
            if name.endswith("start"):  # others may go unused, as the end of what never happens
                step_at(moment, total_steps, f"{type(self.mechanism).__name__}.{name}")

    def check_decay(self, options: Mapping[str, Any]) -> None:
        """Refuse a parameter group whose weight decay is not the one that the rule asks for.

        Raises:
            ValueError: naming the parameter.
        """
        asked, given = self.rule.weight_decay, float(options.get("weight_decay", 0.0) or 0.0)
        if asked is not None and given != asked:
            raise ValueError(
                f"{self.name!r} has weight decay {given}, but its rule (match={self.rule.match!r}) asks for {asked}; "
                "build the optimizer from recipe.param_groups(model, ...)"
            )

    def follow(self, param: Tensor) -> None:
        """Go on with another object for the same parameter; memory kept for the whole is cut to what is held here."""
        if param is not self.param:
            self.param, self.seal = param, None
            self.version = _version_of(param) if self.loaded is None else _FOREIGN
        shape = tuple(sharding.local(param).shape)
        for name, value in self.state.items():
            if tuple(value.shape) == self.claim.layout.shape != shape:
                self.state[name] = sharding.from_whole(value, param, self.name).clone()
        for name in ("zeros", "before"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) == self.claim.layout.shape != shape:
                setattr(self, name, sharding.from_whole(value, param, self.name).clone())
        if self.loaded is not None and shape and len(self.loaded) == self.claim.layout.shape[0] != shape[0]:
            self.loaded = sharding.from_whole(self.loaded, param, self.name).clone()

    def hidden(self) -> Tensor:
        """What is held here of the weights that are fitted and projected, in the dtype of the weight."""
        return self.state.get("latent", sharding.local(self.param)).to(self.param.dtype)

    def source(self, target: Target, params: Params, *, whole: bool = False) -> Tensor:
        """What a compressed life is projected from: the places that a calibration chose, if it is theirs, else weights.

        What is held here of it, or the whole tensor (a collective under sharding, where no places are chosen).
        """
        if self.chosen is not None and target is self.target and params is self.params:
            return self.chosen
        return self.hidden_whole() if whole else self.hidden()

    def write(self, value: Tensor) -> None:
        """Write what is held here of the weight."""
        sharding.local(self.param).copy_(value)

    def hidden_whole(self) -> Tensor:
        """The whole tensor that the compressed life is fitted to and projected from (a collective under sharding)."""
        latent = self.state.get("latent")
        if latent is None:
            return sharding.whole(self.param)
        return sharding.whole(sharding.as_sharded(latent.to(self.param.dtype), self.param))

    def pulled_whole(self) -> Tensor:
        """The whole tensor that the pull is fitted to: the hidden one, with a mechanism's offset."""
        key = self.rule.mechanism.offset if self.rule.mechanism else None
        hidden = self.hidden_whole()
        if key is not None and key in self.state:
            hidden = hidden + sharding.whole(sharding.as_sharded(self.state[key], self.param))
        return hidden

    def weighing_whole(self) -> Tensor | None:
        """What the mechanism weighs the weights with, if it has gathered it (a collective under sharding)."""
        key = self.rule.mechanism.weighing if self.rule.mechanism else None
        if key is None or key not in self.state:
            return None
        return sharding.whole(sharding.as_sharded(self.state[key], self.param))

    def saved(self, complete: bool) -> dict[str, Any]:
        """What resuming needs of this weight besides its values.

        Memory that is not formed yet is a placeholder if `complete`: distributed checkpoints read into a template,
        so the state of a run that has just been attached must have all keys.
        """
        held = {name: str(self.state[name].dtype) if name in self.state else "" for name in self.mechanism.memory}
        memory = dict(self.state)
        wide = compute_dtype(self.param.dtype)  # as some memory is, and a template may not be narrower
        for name in held if complete else ():
            memory.setdefault(name, torch.zeros_like(sharding.local(self.param), dtype=wide))
        return {
            "params": dict(self.params.tensors) if self.params else {},
            "pull": dict(self.pull_params.tensors) if self.pull_params else {},
            "state": {name: self._as_held(value) for name, value in memory.items()},
            "held": held,
            "places": self._places,
            "seen": sharding.rows_as_sharded(sharding.row_sums(sharding.local(self.param)), self.param),
            "fitted_at": self.fitted_at,
            "found": {name: float(self.found.get(name, -1.0)) for name in self.mechanism.finds},
            **(self._saved_stage() if self.staged else {}),
        }

    def _saved_stage(self) -> dict[str, Any]:
        zeros = self.zeros
        if zeros is None:
            zeros = torch.zeros_like(sharding.local(self.param), dtype=torch.bool)
        return {"zeros": sharding.as_sharded(zeros, self.param), "settled": self.settled}

    def _as_held(self, value: Tensor) -> Tensor:
        """Memory as it is saved: sharded like the parameter, unless it is one number for the whole of it."""
        return value if value.shape != sharding.local(self.param).shape else sharding.as_sharded(value, self.param)

    @property
    def _places(self) -> str:
        return f"{short(self.target)} <- {short(self.pull)}"

    def check_saved(self, saved: Any) -> None:
        """Refuse numbers that were fitted for another target, and memory that is missing.

        Raises:
            ValueError: naming the parameter.
        """
        keys = ("params", "pull", "state", "held", "places", "seen")
        if not isinstance(saved, Mapping) or not all(key in saved for key in keys):
            raise ValueError(f"the state of {self.name!r} is not what run.state_dict() gave: it must have {keys}")
        if saved["places"] != self._places:
            raise ValueError(
                f"the state of {self.name!r} was saved for {saved['places']}, this recipe has {self._places}; "
                "resume with the recipe it was saved with"
            )
        for name, dtype in saved["held"].items():
            if dtype and name not in saved["state"]:
                raise ValueError(f"the state of {self.name!r} has lost its {name!r}, which the saved run kept")

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take back what `saved` gave and `check_saved` let pass, under whatever sharding."""
        device = sharding.local(self.param).device

        def params_of(tensors: Mapping[str, Tensor]) -> Params:
            moved = {name: t.detach().clone().to(device) for name, t in tensors.items()}
            return Params(tensors=moved, layout=self.claim.layout)

        self.pull_params = params_of(saved["pull"])
        self.params = params_of(saved["params"]) if self.has_own_fit else self.pull_params
        self.settled = bool(saved.get("settled", False))
        # A fit that is due in the step at hand may have been done: by another optimizer, or before the step raised.
        self.fitted_at = int(saved.get("fitted_at", 0))
        self.found = {name: x for name, x in saved.get("found", {}).items() if x >= 0}
        seen = saved["seen"]
        seen = sharding.whole(seen) if hasattr(seen, "full_tensor") else seen
        self.loaded = sharding.from_whole(seen, self.param, self.name).to(device)
        self.zeros = None
        if saved.get("zeros") is not None:
            zeros = _localised_state(saved["zeros"], self.param, self.name).to(device)
            # Whether there are any is asked of the whole: a rank that holds none must still go the way of the others.
            self.zeros = zeros if bool(sharding.whole(saved["zeros"]).any()) else None
        self.state = {}
        for name, dtype in saved["held"].items():
            if dtype:
                value = _localised_state(saved["state"][name], self.param, self.name)
                self.state[name] = value.to(device, getattr(torch, dtype.removeprefix("torch.")))

    def install(self, params: Params) -> None:
        """Take numbers that a mechanism has moved itself as the fitted ones."""
        assert not self.has_own_fit, "a mechanism that moves the numbers pulls towards the rule's own target"
        self.params = self.pull_params = replace(params, layout=self.claim.layout)

    def localised(self, params: Params) -> Params:
        rows = sharding.rows_of(self.param, self.name)
        return params if rows is None else params.local(*rows)

    def map_whole(self, act: Callable[[Tensor, Params], Any], target: Target, params: Params, w: Tensor) -> Any:
        """Apply a function of whole tensors to what is held here, gathering only where the target needs it."""
        rows = sharding.rows_of(self.param, self.name)
        if rows is None:
            return act(w, params)
        if target.scope in ("element", "row"):
            return act(w, params.local(*rows))
        result = act(sharding.whole(sharding.as_sharded(w, self.param)), params)
        return None if result is None else result[slice(*rows)].clone()


def _version_of(param: Tensor) -> int:
    """The count of writes to a parameter; one made in inference mode has none, so its writes go unseen (-1)."""
    return -1 if param.is_inference() else param._version


def entries_of(
    model: nn.Module, plan: Plan, states: Mapping[str, dict[str, Tensor]], stage: int | None = None
) -> list[Entry]:
    """The claimed parameters of a plan (or of one stage), with the memory that mechanisms have of them already."""
    named = named_parameters(model)
    return [
        Entry(
            claim=claim,
            rule=plan.rule_of(claim),
            param=named[claim.name],
            stage=stage or 0,
            staged=bool(plan.recipe.stages),
            state=states.get(claim.name, {}),
        )
        for claim in (plan.claims if stage is None else plan.stages[stage])
        if claim.claimed
    ]


def rehearse(entries: list[Entry], plan: Plan) -> None:
    """Fit every stage to what the ones before would leave of the weights as they are: better refused now than at night.

    Raises:
        ValueError: a stage whose target cannot take what earlier stages leave, naming stage and parameter.
    """
    if len(plan.stages) < 2:
        return
    values: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}
    for rule in range(len(plan.recipe.rules)):
        mine = [entry for entry in entries if entry.claim.rule == rule]
        if not mine:
            continue
        whole = [values[e.name] if e.name in values else e.hidden_whole() for e in mine]
        target, stage = mine[0].target, mine[0].stage
        try:
            fitted = _fit_together(target, mine, [None] * len(mine), whole)
        except ValueError as error:
            raise ValueError(f"stages[{stage}]: {error}") from None
        lost = _lost_zeros(mine, whole, fitted, zeros)
        for entry, params, w in zip(mine, fitted, whole, strict=True):
            q = target.project(w, params)
            if entry.name in zeros and (entry.name in lost or bool(q[zeros[entry.name]].any())):
                raise ValueError(
                    f"stages[{stage}]: {short(target)} has no zero for the weights of {entry.name!r} that an earlier "
                    f"stage pruned; {_advice(target, params)}"
                )
            values[entry.name] = q
            if entry.holds_zeros:
                zeros[entry.name] = q == 0


def _advice(target: Target, params: Params) -> str:
    if target.prunes:
        return 'it keeps more than is left: use TopK(keep="nonzero") in it, or levels with a zero'
    if _unit(target, params) == 1:
        return "use SparseLevels(...) around it"
    if not getattr(target, "zero", True):
        return "give it zero=True"
    return "a codeword is zero as a whole only: prune whole filters or channels, as Structured(...) does"


def _unit(target: Target, params: Params) -> int:
    """How many weights move together."""
    return target.codebook(params).shape[1] if target.has_codebook else 1


def _lost_zeros(
    entries: list[Entry], whole: list[Tensor], fitted: list[Params], zeros: Mapping[str, Tensor]
) -> set[str]:
    """Which weights of a rule lose zeros once some survivors are small.

    Levels that are fitted may have a zero by chance, while only zeros are near it; training moves survivors there.
    """
    if not any(entry.name in zeros for entry in entries) or all(entry.is_sparse for entry in entries):
        return set()
    target = entries[0].target
    nearer = []
    for w, params in zip(whole, fitted, strict=True):
        units = w.reshape(-1, _unit(target, params)).clone()
        units[units.any(dim=1).nonzero()[::2, 0]] *= _NEARER
        nearer.append(units.reshape(w.shape))
    again = _fit_together(target, entries, [None] * len(entries), nearer)
    each = zip(entries, nearer, again, strict=True)
    lost = {e.name for e, w, p in each if e.name in zeros and bool(target.project(w, p)[zeros[e.name]].any())}
    if target.has_codebook:
        lost |= _shared_zeros(entries, whole, fitted, zeros) | _shared_zeros(entries, nearer, again, zeros)
    return lost


def _shared_zeros(
    entries: list[Entry], whole: list[Tensor], fitted: list[Params], zeros: Mapping[str, Tensor]
) -> set[str]:
    """Which weights have zeros that share a codeword with weights that are left: it will follow those."""
    target = entries[0].target
    pruned: dict[object, Tensor] = {}
    left: dict[object, Tensor] = {}
    found: dict[str, object] = {}
    for entry, w, params in zip(entries, whole, fitted, strict=True):
        book = target.codebook(params)
        gone = zeros.get(entry.name, torch.zeros_like(w, dtype=torch.bool)).reshape(-1, book.shape[1])
        index = target.assign(w, params)
        free = torch.ones(len(book), dtype=torch.long, device=w.device)
        if (held := target.held_codewords(params)) is not None:
            free[held] = 0
        key = found[entry.name] = target.family(params) or entry.name
        for count, units in ((pruned, gone.any(dim=1)), (left, ~gone.all(dim=1))):
            here = torch.bincount(index[units], minlength=len(book)) * free
            count[key] = count[key] + here if key in count else here
    return {name for name, key in found.items() if name in zeros and bool((pruned[key] * left[key]).any())}


def by_rule(slots: list[tuple[Entry, _T]]) -> list[list[tuple[Entry, _T]]]:
    """The slots of a step, those of one rule together."""
    found: dict[int | None, list[tuple[Entry, _T]]] = {}
    for entry, slot in slots:
        found.setdefault(entry.claim.rule, []).append((entry, slot))
    return list(found.values())


def refuse_split_rules(owner: Mapping[str, int], entries: list[Entry]) -> None:
    """Refuse what several optimizers, which do not step at once, cannot do: model-wide fits after it, model-wide ties.

    Raises:
        ValueError: naming two of the parameters.
    """
    for group in by_rule([(entry, entry) for entry in entries]):
        first = group[0][0]
        if first.rule.mechanism is None or not first.pull.fits_together:
            continue
        if not (first.cadence.after or first.mechanism.ties):
            continue
        other = next((e for e, _ in group if owner[e.name] != owner[first.name]), None)
        wants = "wants that after the step" if first.cadence.after else "moves them all in one step"
        if other is not None:
            raise ValueError(
                f"{first.name!r} and {other.name!r} sit in two optimizers, but {short(first.pull)} is fitted to all "
                f"its weights at once, and {type(first.mechanism).__name__} {wants}; give each optimizer a rule of its "
                "own"
            )


def refuse_unpulled(plan: Plan) -> None:
    """Refuse a weight that training moves and nothing pulls: without a mechanism its target would go stale.

    Raises:
        ValueError: naming rule and parameter.
    """
    for claim in (claim for stage in plan.stages for claim in stage if claim.claimed and not claim.frozen):
        if plan.rule_of(claim).mechanism is None:
            raise ValueError(
                f"{plan.recipe.called(claim.rule or 0)} has no mechanism, and {claim.name!r} is trained: give it one; "
                "only frozen weights and detent.compress need none"
            )


def refuse_stages(recipe: Recipe, who: str) -> None:
    """Without training there is nothing that stages could follow one another in.

    Raises:
        ValueError: a recipe with stages.
    """
    if recipe.stages:
        raise ValueError(
            f"{who}(recipe=...): its stages follow one another in a training, and here is none; give a recipe with "
            "rules alone: those of one stage, or one target for what they lead to, as SparseLevels(...)"
        )


def fit_pull(entries: list[Entry], ahead: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Fit what training pulls one rule's weights to; the rule's own target too. A collective under sharding.

    Args:
        entries: the weights.
        ahead: whole tensors, by name, of those that are not in this stage yet: they count for the others, and have
            their own fit when they come.
    """
    previous = [entry.pull_params for entry in entries]
    whole = [ahead[entry.name] if entry.name in ahead else entry.pulled_whole() for entry in entries]
    for entry, params in zip(entries, _fit_together(entries[0].pull, entries, previous, whole), strict=True):
        if entry.name not in ahead:
            entry.pull_params = params
            if not entry.has_own_fit:
                entry.params = params
    if entries[0].has_own_fit:
        fit_target(entries, ahead)


def fit_target(entries: list[Entry], ahead: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Fit the rules' own targets to the weights as they are. A collective under sharding; `ahead` as for `fit_pull`."""
    by_rule: dict[int | None, list[Entry]] = {}
    for entry in entries:
        by_rule.setdefault(entry.claim.rule, []).append(entry)
    for mine in by_rule.values():
        whole = [ahead[entry.name] if entry.name in ahead else entry.hidden_whole() for entry in mine]
        before = [entry.known for entry in mine]
        for entry, params in zip(mine, _fit_together(mine[0].target, mine, before, whole), strict=True):
            if entry.name not in ahead:
                entry.params = params


def mapped_whole(entry: Entry, *, refit: bool) -> Tensor:
    """What the end of its stage would make of a weight as it is now, whole. A collective under sharding."""
    whole, params = entry.hidden_whole(), entry.params
    if refit or params is None:
        (params,) = _fit_together(entry.target, [entry], [entry.known], [whole])
    return entry.target.project(whole, params)


def still_fits(entries: list[Entry]) -> bool:
    """Whether a fit to the weights as they are finds the numbers held: written meanwhile, but put back as they were."""
    held = [entry.params for entry in entries]
    fit_target(entries)
    same = all(
        old is not None and entry.params is not None and torch.equal(value, entry.params[name])
        for entry, old in zip(entries, held, strict=True)
        for name, value in (old.tensors if old else {}).items()
    )
    for entry, old in zip(entries, held, strict=True):
        entry.params = old
    return same


def _fit_together(
    target: Target, entries: list[Entry], previous: list[Params | None], whole: list[Tensor]
) -> list[Params]:
    """Fit one target to the whole tensors of several entries, in the metric of their mechanism.

    Raises:
        ValueError: what the target refuses, naming the parameter.
    """
    weighing = [entry.weighing_whole() for entry in entries]
    try:
        with without_gradients():
            layouts = [e.claim.layout for e in entries]
            if all(h is None for h in weighing):
                return target.fit_model(whole, layouts, previous)
            weighed = [_weighed(w, h, target) for w, h in zip(whole, weighing, strict=True)]
            fitted = target.fit_model(weighed, layouts, previous)
            return [target.unweighed(p, w, x) for p, w, x in zip(fitted, whole, weighed, strict=True)]
    except ValueError as error:
        finite = [bool(torch.isfinite(w).all()) for w in whole]
        bad = next((e.name for e, good in zip(entries, finite, strict=True) if not good), entries[0].name)
        raise ValueError(f"{bad!r}: {error}") from None


def _weighed(w: Tensor, h: Tensor | None, target: Target) -> Tensor:
    if h is None and target.fits_together:
        # No gradient ever came to it: it goes first, as where all gradients are zero.
        h = torch.zeros(w.shape, dtype=compute_dtype(w.dtype), device=w.device)
    return w if h is None else w * never_zero(h)


def retyped(plan: Plan, named: Mapping[str, Tensor]) -> Plan:
    """A plan for the same parameters in the dtypes that they have now.

    Raises:
        ValueError: a target that refuses one, naming the parameter.
    """

    def now(claim: Claim) -> Claim:
        dtype = named[claim.name].dtype if claim.name in named else claim.dtype
        if dtype == claim.dtype:
            return claim
        target = plan.rule_of(claim).target if claim.claimed else None
        reason = target.accepts(claim.layout.shape, dtype, claim.layout) if target is not None else None
        if reason:
            raise ValueError(f"{claim.name!r}: {reason}")
        return replace(claim, dtype=dtype)

    return replace(plan, claims=tuple(map(now, plan.claims)), stages=tuple(tuple(map(now, s)) for s in plan.stages))


def refuse_nonfinite(name: str, whole: Tensor, target: Target) -> None:
    """Refuse NaN and infinite weights, which lie in no target.

    Raises:
        ValueError: naming the parameter.
    """
    if not bool(torch.isfinite(whole).all()):
        raise ValueError(f"{name!r} holds NaN or infinite weights, which have no place in {short(target)}")


def _localised_state(value: Tensor, param: Tensor, name: str) -> Tensor:
    """Saved state for what this process holds of the parameter, whatever sharding it was saved under."""
    full = sharding.whole(value) if hasattr(value, "full_tensor") else value.detach()
    if tuple(full.shape) == tuple(param.shape):
        return sharding.from_whole(full, param, name).clone()
    return full.clone()
