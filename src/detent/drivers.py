"""One attached optimizer: which claimed weights it moves, its clock and stages, and both halves of its steps."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from detent import optimizers, sharding
from detent.claimed import Entry, Held
from detent.mechanisms import Clock, Slot
from detent.standins import StandIns

__all__ = ["Driver", "owners_of", "register", "release"]

# Two runs on one optimizer would each scale its steps and overwrite each other's state.
_ATTACHED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@dataclass(kw_only=True)
class Driver:
    """One attached optimizer: its entries, its clock, and where it is inside a step.

    `entries` are those of the stage it is in; `kept` are those of earlier stages that no later one has claimed since.
    """

    optimizer: Any
    bounds: list[tuple[int, int | None]]
    total_steps: int | None
    stages: list[list[Entry]] = field(default_factory=list)
    stage: int = 0
    entries: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    copies: list[tuple[Entry, Tensor]] = field(default_factory=list)
    step: int = 0
    slots: list[tuple[Entry, Slot]] = field(default_factory=list)
    skip: bool = False
    clean: list[Entry] = field(default_factory=list)
    pending: bool = False
    landing: bool = False  # the optimizer has moved the weights: the step counts, and is brought to its end
    landed: dict[Any, list[tuple[Entry, dict[str, Tensor]]]] = field(default_factory=dict)  # done, with its memory
    late: list[tuple[Entry, Held]] = field(default_factory=list)  # what is fitted after it, as it was before
    fitted: list[tuple[Entry, Slot]] | None = None  # what has been
    by_hand: bool = False  # no step hooks: the user calls both halves
    begun: list[tuple[Entry, int]] = field(default_factory=list)
    nested: int = 0
    checked_copies: bool = False
    warned_beyond: bool = False
    handles: list[Any] = field(default_factory=list)
    undo: list[tuple[Driver, int, list[tuple[Entry, Held]]]] = field(default_factory=list)
    spent: dict[str, tuple[Any, int, dict[str, Tensor]]] = field(default_factory=dict)
    probed: dict[Any, bool] = field(default_factory=dict)
    riding: Mapping[str, Any] | None = None
    given: Mapping[str, Any] | None = None  # the optimizer's own part of a state that is being loaded
    awaiting: str = ""  # what is missing of a checkpoint, in a sentence
    made: dict[int, tuple[tuple[Any, ...], Slot, int | None]] = field(default_factory=dict)  # slots, by entry
    groups: list[Mapping[str, Any]] = field(default_factory=list)
    group_of: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    climbs: bool = False  # whether some group has maximize=True

    @property
    def standing(self) -> list[Entry]:
        return [*self.entries, *self.kept]

    @property
    def all_entries(self) -> list[Entry]:
        """Those of every stage."""
        return [entry for entries in self.stages for entry in entries]

    @property
    def params(self) -> list[Tensor]:
        return [entry.param for entry in self.standing]

    @property
    def holds_all(self) -> bool:
        """Whether the optimizer still moves the tensors that are known here."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return all(id(entry.param) in held for entry in self.standing)

    def enter(self, stage: int) -> None:
        """Be in a stage: what it claims is trained, what only earlier ones claimed is kept."""
        entries, kept = self.at(stage)
        self.stage, self.entries, self.kept = stage, entries, kept

    def at(self, stage: int) -> tuple[list[Entry], list[Entry]]:
        """What a stage trains and what it keeps."""
        last = {entry.name: entry for entries in self.stages[: stage + 1] for entry in entries}
        kept = [entry for entries in self.stages[:stage] for entry in entries if last[entry.name] is entry]
        return self.stages[stage], kept

    def coming(self, stage: int) -> list[tuple[Entry, Entry | None]]:
        """The entries of a later stage, each with the one that its weight stands in now, if it does."""
        standing = {entry.name: entry for entry in self.standing}
        return [(entry, standing.get(entry.name)) for entry in self.stages[stage]]

    def stage_of(self, step: int) -> int:
        """The stage that a step belongs to."""
        return max(i for i, (first, _) in enumerate(self.bounds) if first <= step)

    def __post_init__(self) -> None:
        self.stand_ins = StandIns(self.optimizer)
        self.look_up()

    # --- the clock ------------------------------------------------------------------------------------------------

    @property
    def clock(self) -> Clock:
        """Steps done in this stage, of how many."""
        return Clock(step=self.step - self.bounds[self.stage][0], total_steps=self.steps_of(self.stage))

    def steps_of(self, stage: int) -> int | None:
        """How many steps a stage has, if that is known."""
        first, past = self.bounds[stage]
        return self.total_steps if past is None else past - first

    @property
    def turns(self) -> bool:
        """Whether the stage is over, and the next one has not begun."""
        past = self.bounds[self.stage][1]
        return self.stage + 1 < len(self.stages) and past is not None and self.step >= past

    def unfinished(self) -> str:
        """What of the recipe has not come yet, in words; empty if all has."""
        if self.stage + 1 < len(self.bounds):
            return f"stage {self.stage + 1} of {len(self.bounds)} is not over"
        ends = [entry.mechanism.mapping(entry.target, self.clock) for entry in self.entries]
        late = max((end for end in ends if end is not None), default=(0, ""))
        if late[0] <= self.clock.step:
            return ""
        return f"{late[1]} is at step {late[0]}" + (" of its stage" if self.stage else "")

    def frozen(self, entry: Entry) -> bool:
        """Whether the fit of an entry is over."""
        until = entry.frozen_from(self.steps_of(self.stage))
        return until is not None and self.clock.step >= until

    # --- what the optimizer says of a weight ----------------------------------------------------------------------

    def look_up(self) -> None:
        """Find anew which group each weight sits in: groups are dropped, reordered and loaded anew in a training."""
        self.groups = list(self.optimizer.param_groups)
        self.climbs = any(group.get("maximize") for group in self.groups)
        self.group_of = {id(param): group for group in self.groups for param in group["params"]}

    def options_of(self, entry: Entry) -> Mapping[str, Any]:
        """The group a weight sits in now."""
        now = self.optimizer.param_groups
        same = len(now) == len(self.groups) and all(map(operator.is_, now, self.groups))
        if not same or id(entry.param) not in self.group_of:
            self.look_up()
        return self.group_of[id(entry.param)]

    def moves(self, entry: Entry, slot: Slot) -> bool:
        """Whether the step at hand may move a weight: it has a gradient, is not frozen, and its rate is not 0."""
        learns = slot.grad is not None and entry.param.requires_grad
        return learns and not optimizers.stands_still(self.options_of(entry))

    def heat(self, entry: Entry) -> float:
        """The highest rate so far, or announced, over the one of this step; 1 where an optimizer finds it by itself."""
        rate = self.options_of(entry).get("lr")
        return entry.found["peak"] / float(rate) if rate is not None and float(rate) > 0 else 1.0

    def slot(self, entry: Entry) -> Slot:
        """A weight as its mechanism sees it."""
        held = (entry.param, entry.params, entry.pull_params, self.stage)
        known = self.made.get(id(entry))
        if known is None or not all(map(operator.is_, known[0], held)):
            known = self.made[id(entry)] = (held, *self._new_slot(entry))
        _, blank, frozen_from = known
        seen, grad = sharding.local(entry.param), entry.param.grad
        return blank.with_now(
            weight=seen if entry.lent is None else sharding.local(entry.lent),
            seen=seen,
            grad=None if grad is None else sharding.local(grad),
            frozen=frozen_from is not None and self.step - self.bounds[self.stage][0] >= frozen_from,
            pruned=entry.zeros,
            grad_scale=getattr(self.optimizer, "grad_scale", None),
            sign=-1.0 if self.climbs and self.options_of(entry).get("maximize") else 1.0,
            state=entry.state,
            found=entry.found,
        )

    def _new_slot(self, entry: Entry) -> tuple[Slot, int | None]:
        """What stays the same from step to step as long as nothing is fitted, and when the fit is over."""
        assert entry.params is not None and entry.pull_params is not None
        target, params, pull, pull_params = entry.target, entry.params, entry.pull, entry.pull_params

        def fill() -> Tensor:
            entry.param.grad = torch.zeros_like(entry.param)
            return sharding.local(entry.param.grad)

        slot = Slot(
            name=entry.name,
            weight=entry.param,
            seen=entry.param,
            grad=None,
            fill=fill,
            target=target,
            params=entry.localised(params),
            pull=pull,
            pull_params=entry.localised(pull_params),
            project=lambda w: entry.map_whole(target.project, target, params, w),
            pull_project=lambda w: entry.map_whole(pull.project, pull, pull_params, w),
            pull_free=lambda w: entry.map_whole(pull.free, pull, pull_params, w),
            relax=lambda w, beta: entry.map_whole(lambda x, p: target.relax(x, p, beta), target, params, w),
            gather=lambda w: sharding.whole(sharding.as_sharded(w, entry.param)),
            total=lambda x: sharding.total(x, entry.param),
            rate=lambda: optimizers.rate_of(self.options_of(entry), entry.name),
            heat=lambda: self.heat(entry),
            install=entry.install,
            moments=lambda: optimizers.moments(self.optimizer, entry.param),
            frozen=False,
            pruned=None,
            plain=isinstance(self.optimizer, torch.optim.SGD),
            decay=lambda: optimizers.decoupled_decay(
                self.optimizer, self.options_of(entry), entry.name, entry.param.dim(), self.probed
            ),
            grad_scale=None,
            sign=1.0,
            state={},
            found={},
        )
        return slot, entry.frozen_from(self.steps_of(self.stage))

    # --- both halves of a step ------------------------------------------------------------------------------------

    def begin(self, drivers: list[Driver]) -> None:
        """A step begins: remember what it may change besides weights, of all optimizers, as some fits are shared."""
        self._warn_beyond(drivers)
        self.undo = [(each, each.step, [(e, e.held()) for e in each.standing]) for each in drivers]
        self.slots, self.copies, self.begun, self.landed, self.fitted = [], [], [], {}, None
        self.pending = True
        for entry in self.entries:
            if entry.mechanism.finds:
                entry.found["peak"] = max(entry.found.get("peak", 0.0), optimizers.peak_of(self.options_of(entry)))

    def _warn_beyond(self, drivers: list[Driver]) -> None:
        """Say once a run that training goes on beyond its end: it may, but a length that was misjudged looks alike."""
        if self.total_steps is None or self.step < self.total_steps or any(each.warned_beyond for each in drivers):
            return
        self.warned_beyond = True
        warnings.warn(
            f"step {self.step + 1} is beyond total_steps={self.total_steps}, which counts the calls of "
            f"{type(self.optimizer).__name__}.step() in the whole training: whatever the recipe says in fractions of "
            "training has come to its end, and stays as it is",
            stacklevel=2,
        )

    def end(self, ticks: int = 0) -> None:
        """A step is over, or nobody asks for it any more."""
        self.stand_ins.drop()
        # In one line, so that no step counts twice.
        self.pending, self.landing, self.step = False, False, self.step + ticks
        self.slots, self.copies, self.undo, self.spent = [], [], [], {}
        self.landed, self.late, self.fitted = {}, [], None

    def refuse_copies(self) -> None:
        """Look for a second copy of a weight before any mechanism moves the weight away from it; once.

        Raises:
            RuntimeError: naming the parameter, or the optimizer.
        """
        if self.checked_copies:
            return
        named = [(entry.name, entry.param, entry.moved, self.options_of(entry)) for entry in self.entries]
        try:
            optimizers.refuse_copies_in_state(self.optimizer, named)
            self.stand_ins.refuse_blind()
        except RuntimeError:
            self.landing = False  # such a step is none
            raise
        self.checked_copies = True

    def once(self, what: Any, slots: list[tuple[Entry, Slot]], act: Callable[[], None]) -> None:
        """A part of the end of a step, which is not done twice; its memory counts when it is done."""
        if what not in self.landed:
            for entry, slot in slots:
                slot.state = dict(entry.state)
            act()
            self.landed[what] = [(entry, slot.state) for entry, slot in slots]
        for entry, state in self.landed[what]:
            entry.state = state

    def forget_late_fits(self) -> None:
        """A fit after the step begins with what was fitted before it, also where one was broken off."""
        for entry, was in self.late:
            entry.params, entry.pull_params, entry.fitted_at = was.params, was.pull_params, was.fitted_at

    def land(self) -> None:
        """The optimizer has moved the weights: from here on the step counts."""
        if self.pending and not self.landing:
            self.landing = True
            self.late = [(entry, entry.held()) for entry in self.entries if entry.cadence.after]

    def roll_back(self) -> None:
        """The step raised: be as before it, and let every weight be what the forward pass last saw."""
        for driver, step, entries in self.undo:
            if driver is self or (driver.step == step and not driver.pending):
                for entry, held in entries:
                    entry.put_back(held)
        for entry, slot in self.slots:
            entry.mechanism.undo(replace(self.slot(entry), scratch=slot.scratch), self.clock)
        self.hold()
        self.stand_ins.drop()

    def rest(self) -> None:
        """The step that raised is undone; which gradients it has changed already is remembered."""
        self.slots, self.copies, self.undo, self.pending = [], [], [], False

    def hold(self) -> None:
        """Put back what earlier stages hold, whatever momentum and weight decay made of it."""
        for entry in self.standing:
            entry.hold()
        for entry, value in self.copies:
            entry.write(value)

    def mask_gradient(self, entry: Entry) -> None:
        """What earlier stages hold gets no gradient, so that neither momentum nor a norm clip is misled by it."""
        grad = entry.param.grad
        if grad is None or self.memory_of(entry, grad) is not None:
            return  # masked already by the step that raised
        if entry.is_fixed and entry.stage < self.stage:
            sharding.local(grad).zero_()
        elif entry.zeros is not None:
            sharding.local(grad).masked_fill_(entry.zeros, 0.0)

    def first_moment(self, entry: Entry, slot: Slot, clock: Clock) -> None:
        """The mechanism's first moment; a gradient that a step which raised had already changed is not shown again."""
        grad = entry.param.grad
        if grad is None or slot.grad is None:
            entry.mechanism.before_step(slot, clock)
            return
        untouched, memory = slot.grad._version, self.memory_of(entry, grad)
        if memory is None:
            entry.mechanism.before_step(slot, clock)
        else:
            entry.mechanism.before_step(replace(slot, grad=None), clock)
            slot.state.update(memory)
        if memory is not None or slot.grad._version != untouched:
            self.spent[entry.name] = (weakref.ref(grad), slot.grad._version, dict(slot.state))

    def memory_of(self, entry: Entry, grad: Tensor) -> dict[str, Tensor] | None:
        """What a mechanism made of a gradient in a step that raised; `None` if it has not changed this one."""
        if entry.name not in self.spent:
            return None
        reference, version, memory = self.spent[entry.name]
        return memory if reference() is grad and version == sharding.local(grad)._version else None

    def last_moment(self, entry: Entry, slot: Slot, clock: Clock) -> None:
        """The mechanism's last moment; a full life that the optimizer left alone is not moved by it either."""
        # Elsewhere this moment also shows a latent again, or maps weights when their time has come.
        if not entry.mechanism.keeps_full_life or entry.cadence.after or self.moves(entry, slot):
            entry.mechanism.after_step(slot, clock)

    def clip_norm(self) -> None:
        """Clip all gradients to the norm that the mechanisms ask for, if they do."""
        limits = sorted({e.mechanism.norm_limit for e, _ in self.slots if e.mechanism.norm_limit is not None})
        if not limits:
            return
        if len(limits) > 1:
            raise ValueError(f"clip_norm: the rules of one optimizer give different limits {limits}; give one")
        optimizers.clip_total_norm(self.optimizer, limits[0])
        for entry, slot in self.slots:
            if entry.name in self.spent and slot.grad is not None:
                reference, _, memory = self.spent[entry.name]
                self.spent[entry.name] = (reference, slot.grad._version, memory)


def register(
    driver: Driver,
    owner: object,
    *,
    before: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    after: Callable[[], None],
    save: Callable[[dict[str, Any]], dict[str, Any]],
    look: Callable[[dict[str, Any]], dict[str, Any]],
    load: Callable[[], None],
) -> None:
    """Hang a run on an optimizer: both halves of its step, and its state dict.

    Args:
        driver: the optimizer.
        owner: the run; one at a time.
        before: what precedes a step, given its arguments.
        after: what follows it.
        save: adds our part to a state dict.
        look: takes it out of one that is about to be loaded.
        load: takes it over, once torch has accepted its own.

    Raises:
        ValueError: an optimizer without step hooks, or one that has a run attached.
    """
    optimizer = driver.optimizer
    if not driver.by_hand and not hasattr(optimizer, "register_step_pre_hook"):
        raise ValueError(
            f"{type(optimizer).__name__} has no step hooks: attach with hooks=False and call run.before_step() and "
            "run.after_step() around its step"
        )
    if driver.by_hand and not hasattr(optimizer, "register_state_dict_post_hook"):
        return  # nothing to hang on to; run.state_dict() is there
    if optimizer in _ATTACHED:
        raise ValueError(f"this {type(optimizer).__name__} has a run attached already; call its run.detach() first")
    _ATTACHED[optimizer] = weakref.ref(owner)
    reason = "Detent keeps a Python clock and cannot be traced; compile the step without fullgraph=True"
    outside = optimizers.outside_graphs(reason)

    def keep(registered: Callable[[Any], Any], hook: Callable[..., Any]) -> None:
        driver.handles.append(registered(hook))  # in one line, so that no interrupt leaves a hook that nobody removes

    if not driver.by_hand:
        keep(optimizer.register_step_pre_hook, outside(lambda opt, args, kwargs: before(args, kwargs)))
        keep(optimizer.register_step_post_hook, outside(lambda opt, args, kwargs: after()))
    keep(optimizer.register_state_dict_post_hook, lambda opt, state_dict: save(state_dict))
    keep(optimizer.register_load_state_dict_pre_hook, lambda opt, state_dict: look(state_dict))
    keep(optimizer.register_load_state_dict_post_hook, lambda opt: load())


def release(driver: Driver, owner: object) -> None:
    """Take a run off an optimizer; may be called again, also after it was broken off."""
    while driver.handles:
        driver.handles[-1].remove()
        driver.handles.pop()
    held = _ATTACHED.get(driver.optimizer)
    if held is not None and held() is owner:
        del _ATTACHED[driver.optimizer]


def owners_of(drivers: list[Driver], entries: list[Entry], params: Mapping[str, Tensor]) -> list[Driver]:
    """The one optimizer that holds each entry's parameter.

    Args:
        drivers: the attached optimizers.
        entries: claimed weights.
        params: their parameters by name, before anything goes on with them.

    Raises:
        ValueError: a parameter in no group or in two, or in one with another weight decay than its rule asks for.
    """
    owners: dict[int, list[tuple[Driver, Mapping[str, Any]]]] = {}
    for driver in drivers:
        for group in driver.optimizer.param_groups:
            for param in group["params"]:
                owners.setdefault(id(param), []).append((driver, group))
    found = []
    for entry in entries:
        mine = owners.get(id(params[entry.name]), [])
        if len(mine) != 1:
            where = "no attached optimizer" if not mine else f"{len(mine)} places of the attached optimizers"
            raise ValueError(f"{entry.name!r} is claimed by the recipe but sits in {where}; it must sit in exactly one")
        driver, options = mine[0]
        entry.check_decay(options)
        found.append(driver)
    return found
