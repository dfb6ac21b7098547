"""The engine: attaches a recipe to a model and its optimizers by their own hooks, and owns clock, state and lives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from detent import claimed, guards, optimizers, sharding
from detent.batchnorm import Statistics, install, statistics_of
from detent.claimed import Entry, by_rule, fit_target
from detent.collapse import Losses
from detent.contents import contents_of, refuse_unsavable, refuse_unused
from detent.drivers import Driver, owners_of, register, release
from detent.fitting import fit_due, settle_stage
from detent.mechanisms import Clock, Mechanism
from detent.parameters import named_parameters, refuse_no_model
from detent.recipe import Plan, Recipe, refuse_no_recipe
from detent.resuming import Resumable
from detent.roundings import Roundings, take_off
from detent.standins import refuse_narrow_shards
from detent.threads import OneThread
from detent.undoing import undone, undone_unless_done, without_gradients

__all__ = ["Run", "attach"]

_STATE_KEY = "detent"


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    recipe: Recipe,
    total_steps: int | None = None,
    *,
    hooks: bool = True,
    nonfinite: Literal["raise", "ignore"] = "raise",
    leave_out: str | Sequence[str] = (),
    example: Any = None,
) -> Run:
    """Attach a recipe to a training script: from now on every optimizer step pulls the weights to their targets.

    Model, loss, loop, scheduler, AMP and DDP stay as they are. Attach after the model is wrapped and moved and holds
    the weights that training starts from. When resuming, load the optimizer's state dict (which carries Detent's) after
    attach, and the model's before or after: the state knows its weights, and any others raise.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer, or all optimizers that hold claimed parameters.
        recipe: which weights go where and how.
        total_steps: calls of `optimizer.step()` in the whole training, at rate 0 too; needed where the recipe speaks of
            fractions of training. Steps that the loop leaves out count only with `run.skip_step()`; a step of
            zero gradients that checkpoint code makes to create an optimizer's state does not count.
        hooks: register hooks around the optimizer's step; with `False` call `run.before_step()` and `run.after_step()`
            yourself. Where the optimizer has no hooks of its state dict either, save and load `run.state_dict()`.
        nonfinite: "raise" stops before the step when a claimed weight's gradient is NaN or infinite (one
            reduction a step); "ignore" does not look.
        leave_out: regular expressions of names in `model.state_dict()` that files of this run need not hold, such as
            extra state, which they cannot. Save those yourself.
        example: as for `Recipe.resolve`.

    Returns:
        The run, whose `compressed()`, `recalibrate()`, `finalize()` and `state_dict()` are the rest of the interface.

    Raises:
        ValueError: a rule that claims nothing, or frozen weights alone (without a mechanism it may: its target is
            fitted once); a trained weight whose rule has no mechanism; a claimed parameter that is all zero, or in no
            attached optimizer or in two; an optimizer that keeps a second copy of the weights; something in
            `model.state_dict()` that no file could hold.
        RuntimeError: another thread works on the same model.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=dt.PSG())])
        >>> run = dt.attach(model, optimizer, recipe, total_steps=20)
        >>> for _ in range(20):
        ...     loss = model(torch.randn(32, 8)).square().mean()
        ...     optimizer.zero_grad(); loss.backward(); _ = optimizer.step()
        >>> with run.compressed():
        ...     levels = len(model[0].weight.unique())
        >>> levels <= 7
        True
    """
    whole = isinstance(total_steps, int) and not isinstance(total_steps, bool)
    if total_steps is not None and not (whole and total_steps >= 1):
        raise ValueError(f"attach(total_steps={total_steps!r}): must be a whole number >= 1, or None if unknown")
    if nonfinite not in ("raise", "ignore"):
        raise ValueError(f'attach(nonfinite={nonfinite!r}): must be "raise" or "ignore"')
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not given:
        raise ValueError("attach(optimizer=[]): give at least one optimizer, or use detent.compress")
    refuse_no_model(model, "attach")
    refuse_no_recipe(recipe, "attach")
    sharding.refuse_flattened(model)
    sharding.reshard(model)
    plan = recipe.resolve(model, example=example)
    claimed.refuse_unpulled(plan)
    plan.warn_left("attach")
    run = Run(model, plan, [optimizers.unwrap(each) for each in given], total_steps, nonfinite)
    kept: list[tuple[Entry, Tensor]] = []

    def leave() -> None:
        run.detach()
        with without_gradients():
            for entry, value in kept:
                entry.write(value)

    try:
        with OneThread.of(model).doing("detent.attach"):
            # Mechanisms that look at their weights at the start may write them.
            looks = [entry for entry in run._all if type(entry.mechanism).open is not Mechanism.open]
            kept += [(entry, sharding.local(entry.param).clone()) for entry in looks if not entry.param.is_meta]
            run.leave(leave_out, "attach")
            run._start(hooks, kept)
        run._example = example
        return run
    except BaseException:  # also Ctrl-C: nobody has this run
        with undone(leave):
            raise


class Run(Resumable):
    """A recipe attached to a model. Made by `attach` and `compress`, never directly.

    Attributes:
        model: the model.
        plan: the resolved recipe; `print(run.plan)`.
        calibration: what `detent.calibrate` did for the weights as they are, or `None`.
        standing: the plan as far as it has come: what the compressed life of this moment consists of.
        leave_out: regular expressions of what files of this run leave out.

    Example:
        >>> import torch, detent as dt
        >>> run = dt.compress(torch.nn.Linear(8, 4), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
        >>> run.clock
        0
    """

    def __init__(
        self, model: nn.Module, plan: Plan, attached: list[Any], total_steps: int | None, nonfinite: str
    ) -> None:
        self.model = model
        self.plan = plan
        self.leave_out: tuple[str, ...] = ()
        self._nonfinite = nonfinite
        self._inside = False
        self._closed = False
        self._statistics: dict[str, Statistics] = {}
        self._losses, self._example = Losses(), None
        bounds = plan.recipe.bounds(total_steps) if attached else []
        self._drivers = [Driver(optimizer=each, bounds=bounds, total_steps=total_steps) for each in attached]
        if attached:
            staged = [e for i in range(len(plan.stages)) for e in claimed.entries_of(model, plan, {}, stage=i)]
            self._all = [entry for entry in staged if entry.rule.mechanism is not None]
            self._frozen = [e for e in claimed.entries_of(model, plan, {}) if e.rule.mechanism is None]
            self._assign(self._owners({entry.name: entry.param for entry in self._all}))
        else:
            self._all, self._frozen = claimed.entries_of(model, plan, {}), []
        self._refresh()
        self.activations = Roundings(model, plan.recipe.activations, plan.inputs, trained=bool(attached))

    def __repr__(self) -> str:
        """In a line: how far training is and how much of the model is claimed."""
        mine = sum(entry.param.numel() for entry in self._entries)
        where = f"{len(self._entries)} parameters of {type(self.model).__name__} on a target, {mine} weights"
        for driver in self._drivers[:1]:
            total = "" if driver.total_steps is None else f" of {driver.total_steps}"
            where += f", step {driver.step}{total}"
            if len(driver.bounds) > 1:
                where += f", stage {driver.stage + 1} of {len(driver.bounds)}"
        return f"<Run: {where}{', detached' if self._closed else ''}>"

    # --- attaching ------------------------------------------------------------------------------------------------

    def leave(self, patterns: str | Sequence[str], who: str) -> None:
        """Leave out of files what these regular expressions find; refuse what is left that no file can hold.

        Raises:
            ValueError: naming it, or a pattern that finds nothing or a claimed weight.
        """
        self.leave_out = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        contents = contents_of(self.model)
        refuse_unused(contents, self.leave_out, {entry.name for entry in self._all}, who)
        refuse_unsavable(contents.without(self.leave_out), who, unready=True)

    def _owners(self, params: Mapping[str, Tensor]) -> list[Driver]:
        """The optimizer that holds each entry, were the claimed parameters these."""
        owners = owners_of(self._drivers, self._all, params)
        index = {entry.name: self._drivers.index(driver) for entry, driver in zip(self._all, owners, strict=True)}
        claimed.refuse_split_rules(index, self._all)
        return owners

    def _assign(self, owners: list[Driver]) -> None:
        """Give every entry to the one optimizer that holds its parameter."""
        for driver in self._drivers:
            driver.stages = [[] for _ in self.plan.stages]
        for entry, driver in zip(self._all, owners, strict=True):
            driver.stages[entry.stage].append(entry)
        for driver in self._drivers:
            driver.enter(driver.stage)

    def _refresh(self) -> None:
        """What the compressed life of this moment consists of, in the model's order."""
        pulled = [entry for driver in self._drivers for entry in driver.standing] if self._drivers else self._all
        found = {entry.name: entry for entry in [*pulled, *self._frozen]}
        self._entries = [found[claim.name] for claim in self.plan.claims if claim.name in found]

    def _start(self, hooks: bool, kept: list[tuple[Entry, Tensor]]) -> None:
        """Register, fit and look; `kept` are weights as they were before."""
        guards.refuse_empty(self.model, [(entry.name, entry.param) for entry in self._all], waits=True)
        for driver in self._drivers:
            optimizers.refuse_unfollowable(driver.optimizer)
            driver.by_hand = not hooks
            self._register(driver)
        for entry in self._all:  # a fraction that cannot be resolved is found now, not at step 3,000
            entry.check_moments(self._drivers[0].steps_of(entry.stage))
        self.activations.check_moments(self._drivers[0].total_steps)
        if not any(entry.param.is_meta for entry in self._all):
            claimed.rehearse(self._all, self.plan)
            self._fit_frozen()
            self._open(self._drivers)
        for entry, value in kept:
            entry.keep_before(value)
        for driver in self._drivers:
            steps = optimizers.take_mark(driver.optimizer)
            if steps:
                driver.awaiting = (
                    f"a state of {type(driver.optimizer).__name__} was loaded before attach, so Detent's part of "
                    f"it (after {steps} steps) was lost; load it again after attach, or call "
                    "run.rebind(adopt=True) to start afresh"
                )

    def _open(self, drivers: list[Driver]) -> None:
        """First fit of a stage, and the first look of its latent mechanisms at their weights."""
        guards.refuse_empty(self.model, [(entry.name, entry.param) for driver in drivers for entry in driver.entries])
        for entry in (entry for driver in drivers for entry in driver.entries):
            refuse_narrow_shards(entry)
            # What an earlier stage pruned away altogether is no mistake.
            if entry.zeros is None and not bool(sharding.whole(entry.param).any()):
                raise ValueError(
                    f"{entry.name!r} is all zero, so {type(entry.target).__name__} has nothing to fit and the "
                    "mechanism nothing to pull; initialise it, keep it in full precision, or, to resume, attach first"
                )
        for driver in drivers:
            self._fit_due(driver)
        with without_gradients():
            for driver in drivers:
                for entry in driver.entries:
                    entry.mechanism.open(driver.slot(entry), driver.clock)
                    entry.hold()
                self._adopt(driver)

    def _turn(self, driver: Driver) -> None:
        """A stage is over: map its weights, hold what later stages may not undo, and open the next one.

        Broken off, everything is as before, and whoever asks next turns it.
        """
        stage = driver.stage
        before = [(entry, entry.everything()) for entry in self._all]

        def back() -> None:
            for entry, held in before:
                entry.be_again(held)
            driver.enter(stage)
            self._refresh()

        with undone_unless_done(back), without_gradients():
            settle_stage(driver, self._all, self._is_unfixed)
            self._look_for_losses((e, e.target, e.params) for e in driver.entries if e.params is not None)
            self._losses.say(f"the end of stage {stage + 1}")
            for entry in driver.entries:
                entry.map_into_target()
            zeros = {entry.name: entry.zeros for entry in driver.standing}
            driver.enter(stage + 1)
            for entry in driver.entries:
                entry.zeros = zeros.get(entry.name)
            self._refresh()
            self._open([driver])

    def _register(self, driver: Driver) -> None:
        def save(state_dict: dict[str, Any]) -> dict[str, Any]:
            return optimizers.marked({**state_dict, _STATE_KEY: self._driver_state(driver)}, driver.step)

        def look(state_dict: dict[str, Any]) -> dict[str, Any]:
            with self._one_thread("optimizer.load_state_dict()"):
                self._refuse_inside("loading a state")
                self._repair(driver)
                driver.riding, driver.given = state_dict.get(_STATE_KEY), state_dict
                if driver.riding is not None:
                    self._check_state(driver, driver.riding)
            return optimizers.unmarked({key: value for key, value in state_dict.items() if key != _STATE_KEY})

        register(
            driver,
            self,
            before=lambda args, kwargs: self._before(driver, args, kwargs),
            after=lambda: self._after(driver),
            save=save,
            look=look,
            load=lambda: self._load_riding(driver),
        )

    # --- the two halves of a step ---------------------------------------------------------------------------------

    @contextmanager
    def _one_thread(self, what: str) -> Iterator[None]:
        """The same, and what one thread has begun of an optimizer's step stays its own until that is over."""
        with OneThread.of(self.model).doing(what), undone(self._mark_step):
            yield

    def _mark_step(self) -> None:
        if not self._closed and any(driver.pending or driver.skip for driver in self._drivers):
            OneThread.of(self.model).stay(self, "optimizer.step()")
        else:
            OneThread.of(self.model).go(self)

    @property
    def clock(self) -> int:
        """Training steps done so far (of the first optimizer)."""
        return self._drivers[0].step if self._drivers else 0

    @property
    def stage(self) -> int:
        """The stage training is in, 0 for the first (of the first optimizer)."""
        return self._drivers[0].stage if self._drivers else 0

    def before_step(self, optimizer: Optimizer | None = None) -> None:
        """The first half of a step, for optimizers without hooks: call it when the gradients are there.

        Args:
            optimizer: which one steps; may be left out if there is only one.

        Raises:
            ValueError: an optimizer that is not attached.
            RuntimeError: as `optimizer.step()` would (non-finite gradients, weights written by others).
        """
        self._before(self._driver_of(optimizer), (), {})

    def after_step(self, optimizer: Optimizer | None = None) -> None:
        """The second half of a step, for optimizers without hooks: call it after the optimizer moved the weights.

        Args:
            optimizer: which one stepped; may be left out if there is only one.

        Raises:
            ValueError: an optimizer that is not attached.
        """
        self._after(self._driver_of(optimizer))

    def skip_step(self, optimizer: Optimizer | None = None) -> None:
        """Count a step that the loop left out: time passes, and what the recipe does at this moment happens.

        For a `GradScaler` that found an overflow and did not call `optimizer.step()` at all, or a batch that the loop
        threw away, where the recipe's last moments are to come in time. The gradients are not looked at.

        Args:
            optimizer: which one was left out; may be left out if there is only one.

        Raises:
            ValueError: an optimizer that is not attached.
            RuntimeError: as `optimizer.step()` would (weights written by others).

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.PSG())])
            >>> run = dt.attach(model, optimizer, recipe, total_steps=10)
            >>> run.skip_step()
            >>> run.clock
            1
        """
        driver = self._driver_of(optimizer)
        with self._one_thread("run.skip_step()"):
            self._before(driver, (), {}, idle=True)
            self._after(driver)

    def _driver_of(self, optimizer: Any) -> Driver:
        if optimizer is None and len(self._drivers) == 1:
            return self._drivers[0]
        for driver in self._drivers:
            if optimizer is not None and driver.optimizer is optimizers.unwrap(optimizer):
                return driver
        count = len(self._drivers)
        raise ValueError(f"optimizer={type(optimizer).__name__}: name one of the {count} attached optimizers")

    def _before(self, driver: Driver, args: tuple[Any, ...], kwargs: dict[str, Any], *, idle: bool = False) -> Any:
        if self._closed:
            return None
        last: list[object] = []  # what the step before would undo, once no other thread may begin one
        try:
            with self._one_thread("optimizer.step()"):
                last.append(driver.undo)
                return self._start_step(driver, args, kwargs, idle)
        except BaseException:
            if last and driver.undo is not last[0]:  # begun here, and nobody will end it
                with undone(self._mark_step), undone(partial(self._repair, driver)):
                    raise
            raise

    def _start_step(self, driver: Driver, args: tuple[Any, ...], kwargs: dict[str, Any], idle: bool) -> Any:
        self._refuse_inside("optimizer.step()")
        if (driver.pending or driver.skip) and optimizers.is_nested_step(driver.optimizer):
            driver.nested += 1
            return None
        if (
            driver.by_hand
            and driver.pending
            and not driver.landing
            and any(entry.mark()[0] != version for entry, version in driver.begun)
        ):
            raise RuntimeError(
                "weights moved since run.before_step(), and run.after_step() was not called: call both around a step"
            )
        self._repair(driver)
        seen: list[tuple[Entry, int, bool]] = []
        replay = optimizers.replay_closure(args, kwargs, lambda: any(entry.mark() != (v, g) for entry, v, g in seen))
        driver.skip = not idle and optimizers.only_makes_state(driver.optimizer, driver.params, fresh=driver.step == 0)
        if driver.skip:
            # A step at rate 0 still writes (w += 0): only what nobody else had written before it stays ours.
            driver.clean = [entry for entry in driver.standing if entry.is_ours_in_step]
            if driver.holds_all:  # no gradient comes to tensors that the model has let go of
                guards.refuse_replaced(self.model, driver.standing, attached=True)
            driver.stand_ins.make(driver.entries)
            driver.stand_ins.lend(watched=False)
            return replay
        self._follow(driver)
        driver.look_up()
        guards.refuse_retyped(driver.standing)
        guards.refuse_replaced(self.model, driver.standing, attached=True)
        self._refuse_unresumed()
        guards.refuse_foreign_writes(driver.standing)
        clock = driver.clock
        at_work = {entry.claim.rule: entry.mechanism for entry in driver.entries}
        at_work = {rule for rule, mechanism in at_work.items() if mechanism.active(clock)}
        active = [entry for entry in driver.entries if entry.claim.rule in at_work]
        if idle or optimizers.overflowed(driver.optimizer):
            self.activations.drop()
            self._begin(driver, active, sees_gradients=False)
            return replay
        grads = {e.name: e.param.grad for e in active if e.param.grad is not None}
        optimizers.refuse_sparse_gradients(grads)
        if self._nonfinite == "raise" and active:
            if any(e.mechanism.norm_limit is not None for e in active):  # a clip spreads one bad gradient to all
                mine = {id(p) for group in driver.optimizer.param_groups for p in group["params"]}
                named = named_parameters(self.model).items()
                grads |= {n: grad for n, p in named if id(p) in mine and (grad := p.grad) is not None}
            optimizers.check_finite_gradients(grads, [e.param for e in active], driver.step, self.model)
        self._begin(driver, active, sees_gradients=True)
        seen += [(entry, *entry.mark()) for entry in driver.entries]
        return replay

    def _begin(self, driver: Driver, active: list[Entry], *, sees_gradients: bool) -> None:
        """The first half of a step; one that moves nothing shows the mechanisms no gradient, and time passes alone."""
        clock = driver.clock
        with without_gradients():
            driver.begin(self._drivers)
            self._fit_due(driver)
            driver.stand_ins.make(active)
            slots = [(entry, driver.slot(entry)) for entry in active]
            driver.slots = slots if sees_gradients else [(entry, replace(slot, grad=None)) for entry, slot in slots]
            driver.copies = [(e, sharding.local(e.param).clone()) for e in driver.kept if e.is_fixed]
            for entry in driver.standing if sees_gradients else ():
                driver.mask_gradient(entry)
            for mine in by_rule(driver.slots):
                mine[0][0].mechanism.before_together([slot for _, slot in mine], clock)
            for entry, slot in driver.slots:
                driver.first_moment(entry, slot, clock)
            if sees_gradients:
                driver.clip_norm()
            driver.stand_ins.lend(watched=sees_gradients and not driver.checked_copies)
            driver.begun = [(entry, entry.mark()[0]) for entry in driver.entries] if driver.by_hand else []

    def _after(self, driver: Driver) -> None:
        if self._closed:
            return
        try:
            self._end_step(driver)
        except BaseException:
            with undone(partial(self._repair, driver)):  # that is, brought to its end
                raise
        finally:
            self._mark_step()

    def _end_step(self, driver: Driver) -> None:
        if driver.nested:
            driver.nested -= 1
            return
        driver.land()
        driver.stand_ins.take_back()
        if driver.skip:
            driver.skip = False
            driver.stand_ins.drop()
            for entry in driver.clean:
                entry.adopt(passing=True)
            driver.clean = []
            return
        if not driver.pending:
            raise RuntimeError("run.after_step() without run.before_step(): call both around one optimizer step")
        driver.refuse_copies()
        self._land(driver)

    def _land(self, driver: Driver) -> None:
        """The last moments of a step. It has happened: broken off, whoever asks next goes on where they ended."""
        clock = driver.clock
        with without_gradients():
            driver.hold()
            for entry, slot in driver.slots:
                driver.once(entry.name, [(entry, slot)], lambda e=entry, s=slot: driver.last_moment(e, s, clock))
            for slots in by_rule(driver.slots):
                rule, mine = slots[0][0], [slot for _, slot in slots]
                driver.once(rule.claim.rule, slots, lambda r=rule, m=mine: r.mechanism.after_together(m, clock))
            if driver.fitted is None:
                driver.forget_late_fits()
                driver.fitted = [(entry, driver.slot(entry)) for entry in self._fit_due(driver, after=True)]
            for entry, slot in driver.fitted:
                driver.once((entry.name,), [(entry, slot)], lambda e=entry, s=slot: e.mechanism.after_fit(s, clock))
            driver.hold()
        if driver is self._drivers[0] and self.activations:
            now = Clock(step=driver.step, total_steps=driver.total_steps)  # of the training: stages share them
            rate = optimizers.highest_rate(driver.optimizer)
            driver.once("activations", [], partial(self.activations.land, now, rate))
        self._forget_lives()
        self._adopt(driver, passing=True)
        for entry in driver.all_entries:
            entry.go_on()
        driver.end(ticks=1)
        if driver.turns:
            self._turn(driver)

    # --- fitting --------------------------------------------------------------------------------------------------

    def _fit_due(self, driver: Driver, after: bool = False) -> list[Entry]:
        return fit_due(driver, self._drivers, self._all, self.plan.recipe, self._is_unfixed, after=after)

    def _is_settled(self, entry: Entry) -> bool:
        if entry.settled:
            return True
        mine = [driver for driver in self._drivers if any(each is entry for each in driver.entries)]
        return bool(mine) and entry.mechanism.offset is not None and mine[0].frozen(entry)

    # --- keeping up with the outside ------------------------------------------------------------------------------

    def _adopt(self, driver: Driver | None = None, *, passing: bool = False) -> None:
        for entry in self._entries if driver is None else driver.standing:
            entry.adopt(passing=passing)

    def _repair(self, driver: Driver) -> None:
        """Put the weights back as a forward pass may see them if the step before raised half-way."""
        driver.nested = 0
        driver.stand_ins.take_back()
        if driver.landing:
            self._land(driver)
        elif driver.pending:
            with without_gradients():
                driver.roll_back()
            self.activations.drop()
            self._adopt(driver, passing=True)
            driver.rest()
        else:
            driver.stand_ins.drop()
        if driver.turns:
            self._turn(driver)

    def _settle(self) -> None:
        """Between steps: repair what raised, and make sure nobody else wrote the claimed weights."""
        for driver in self._drivers:
            self._repair(driver)
        guards.refuse_replaced(self.model, self._entries, attached=bool(self._drivers))
        guards.refuse_retyped(self._entries)
        self._refuse_unresumed()
        guards.refuse_empty(self.model, [(entry.name, entry.param) for entry in self._entries])
        if not self._closed:
            self._fit_frozen()
        if not self._drivers and not all(entry.holds() for entry in self._entries):
            if claimed.still_fits(self._entries):
                self._adopt()
            # The same numbers may be fitted to other weights (and none to signs), but statistics are of these alone.
            found = self._statistics or self.calibration
            if found and guards.fingerprint(self._entries) != self._found_for:
                self._forget_lives()
        over = "detached" if self._closed else ("" if self._drivers else "made")
        guards.refuse_foreign_writes(self._entries, contents=True, over=over)

    def _follow(self, driver: Driver) -> None:
        """Find parameters again that were replaced after attach (FSDP2, accelerate, model.to)."""
        if not driver.holds_all or any(entry.pull_params is None for entry in driver.entries):
            self.rebind()

    def rebind(self, model: nn.Module | None = None, *, adopt: bool = False) -> None:
        """Find the claimed parameters again by name, after they were replaced or written by someone else.

        Args:
            model: the model whose parameters count from now on; by default the same one.
            adopt: go on from the weights as they are now, in the dtype they have now. Latents and masks start afresh
                from them, and grids that are not frozen yet are fitted again. Of a run that is over (`detach`,
                `finalize`) only the compressed life changes: no weight is written.

        Raises:
            ValueError: no module; a claimed name that is gone, has another shape, a dtype that its target refuses, or
                is in no attached optimizer or in two. The run then stays as it was.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.STE())])
            >>> run = dt.attach(model, optimizer, recipe)
            >>> _ = model.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
            >>> run.rebind(adopt=True)
        """
        model = self.model if model is None else model
        refuse_no_model(model, "run.rebind")
        with self._one_thread("run.rebind()"):
            self._refuse_inside("run.rebind()")
            self._rebind(model, adopt)

    def _rebind(self, model: nn.Module, adopt: bool) -> None:
        sharding.reshard(model)
        params = guards.found_again([*self._all, *self._frozen], model)
        attached = bool(self._drivers) and not self._closed
        owners = self._owners(params) if attached else []
        plan = claimed.retyped(self.plan, named_parameters(model)) if adopt else self.plan
        # Nothing is taken over before everything has been looked at: a refused call leaves the run as it was.
        if not self._closed:
            self.activations.hook(model)  # also on the same model, whose parameters may be others now
        self.model, self.plan = model, plan
        for entry in (*self._all, *self._frozen):
            entry.follow(params[entry.name])
            if adopt:
                entry.claim = replace(entry.claim, dtype=entry.param.dtype)
        if attached:
            self._assign(owners)
        if adopt:
            self._start_afresh()
        if adopt and not attached:
            # Without an optimizer (any more) the weights are somebody's own: they are looked at, never written.
            fit_target([entry for entry in self._entries if not self._drivers or entry.pull_params is None])
            self._adopt()
        elif attached and (adopt or any(e.pull_params is None for d in self._drivers for e in d.entries)):
            self._open(self._drivers)

    def _start_afresh(self) -> None:
        """Forget what was known of the weights as they were."""
        self._forget_lives()
        if self._drivers and not self._closed:
            first = self._drivers[0]
            self.activations.forget(Clock(step=first.step, total_steps=first.total_steps))
        for driver in self._drivers:
            driver.end()
            driver.awaiting = ""
            for entry in driver.all_entries:
                entry.go_on()
            for entry in driver.standing:
                if entry.zeros is not None:
                    entry.zeros = sharding.local(entry.param) == 0
            for entry in driver.entries:
                entry.state.clear()
                if not driver.frozen(entry):
                    entry.params = entry.pull_params = None

    # --- averages ---------------------------------------------------------------------------------------------------

    def _alone(self, model: nn.Module) -> Run:
        guards.found_again(self._entries, model)
        mine = {id(module) for module in self.model.modules()}
        if any(id(module) in mine for module in model.modules()):  # the model in training, whose hooks stay
            run = Run(model, replace(self.standing, inputs=()), [], None, self._nonfinite)
            run.plan, run.activations = self.standing, self.activations.shared()
            return run
        take_off(model, self.activations)
        run = Run(model, self.standing, [], None, self._nonfinite)
        run.activations.like(self.activations)
        return run

    def _is_over(self, entry: Entry) -> bool:
        frozen = any(entry in driver.entries and driver.frozen(entry) for driver in self._drivers)
        return frozen or self._is_settled(entry)

    # --- the end -------------------------------------------------------------------------------------------------

    def finalize(self) -> None:
        """Make the compressed life permanent: every claimed weight ends in its target exactly, and the run is over.

        Statistics found by `recalibrate` become the model's own. Save both lives *before* this. Warns if the recipe
        had not come to its end (a stage, the mapping of ADMM): then this is a projection of unfinished weights.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(16, 16)
            >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
            >>> run.finalize()
            >>> len(model.weight.unique())
            3
        """
        self._warn_early("finalize()")
        with self._one_thread("run.finalize()"):
            self.activations.refuse_unready("run.finalize()")
            life = self._life(None, None)
            self._look_for_losses(life)
            self._say_losses("finalize()")
            for entry, target, _ in life:
                claimed.refuse_nonfinite(entry.name, entry.hidden_whole(), target)
            statistics, was_over = self.statistics(), self._closed
            sharding.reshard(self.model)
            before = [(entry, entry.everything()) for entry, _, _ in life]
            buffers = [(buffer, buffer.clone()) for buffer in statistics_of(self.model).values()]

            def back() -> None:
                if self._closed and not was_over:
                    return self.detach()  # it was over already
                sharding.reshard(self.model)
                with without_gradients():
                    for entry, held in before:
                        entry.be_again(held)
                    for buffer, value in buffers:
                        buffer.copy_(value)
                sharding.reshard(self.model)

            with undone_unless_done(back):
                with without_gradients():
                    for entry, target, params in life:
                        entry.write(entry.map_whole(target.project, target, params, entry.source(target, params)))
                    if statistics is not None:
                        install(self.model, statistics)
                for entry, _, _ in life:
                    entry.state.clear()
                sharding.reshard(self.model)
                self._adopt()
                self.detach()
                self.activations.fix(self.model)
                for entry, _, _ in life:
                    entry.chosen = None  # the weights are these places now

    def _warn_early(self, who: str) -> None:
        """Say so if the recipe has not come to its end: what it does in the end is what makes this life a good one."""
        for driver in self._drivers:
            why = driver.unfinished()
            if not why:
                continue
            total = "" if driver.total_steps is None else f" of {driver.total_steps}"
            warnings.warn(
                f"{who} after {driver.step}{total} steps: {why}, so the weights are projected from where they are now "
                "(a step that the loop leaves out, as GradScaler does on overflow, counts only with run.skip_step())",
                stacklevel=3,
            )
            return

    def detach(self) -> None:
        """Remove all hooks: the optimizers are again what they were. The weights stay as they are."""
        self._closed = True  # hooks that are still there do nothing from here on
        self.activations.end()
        OneThread.of(self.model).go(self)
        for driver in self._drivers:
            driver.stand_ins.end()
            release(driver, self)
