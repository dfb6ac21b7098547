"""The engine: attaches a recipe to a model and its optimizers by their own hooks, and owns clock, state and lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from detent import sharding
from detent.lives import Encoded, Statistics, distance_row, reestimate, swapped_buffers
from detent.mechanisms import Clock, Mechanism, Slot
from detent.recipe import Claim, Plan, Recipe, Rule, canonical_name
from detent.schedules import step_at
from detent.targets import Params, Target

__all__ = ["Run", "attach", "compress"]

_STATE_KEY = "detent"
_STATE_VERSION = 1


@dataclass(kw_only=True)
class _Entry:
    """One claimed parameter: what the plan said, and what the engine knows of it now."""

    claim: Claim
    rule: Rule
    param: Tensor
    params: Params | None = None
    pull_params: Params | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    version: int = -1

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

    def hidden_whole(self) -> Tensor:
        """The whole tensor that is fitted and projected (a collective under sharding)."""
        latent = self.state.get("latent")
        return sharding.whole(self.param if latent is None else sharding.as_sharded(latent, self.param))

    def localised(self, params: Params) -> Params:
        rows = sharding.rows_of(self.param, self.name)
        return params if rows is None else params.local(*rows)

    def map_whole(self, act: Callable[[Tensor, Params], Any], target: Target, params: Params, w: Tensor) -> Any:
        """Apply a function of whole tensors to what is held here, gathering only where the target needs it."""
        rows = sharding.rows_of(self.param, self.name)
        if rows is None:
            return act(w, params)
        if target.scope == "element":
            return act(w, params.local(*rows))
        result = act(sharding.whole(sharding.as_sharded(w, self.param)), params)
        return None if result is None else result[slice(*rows)].clone()


@dataclass(kw_only=True)
class _Driver:
    """One attached optimizer: its entries, its clock, and where it is inside a step."""

    optimizer: Any
    entries: list[_Entry]
    step: int = 0
    slots: list[tuple[_Entry, Slot]] = field(default_factory=list)
    skip: bool = False
    pending: bool = False
    checked_copies: bool = False
    handles: list[Any] = field(default_factory=list)
    spent: dict[str, tuple[Any, int]] = field(default_factory=dict)
    decoupled: bool | None = None


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    recipe: Recipe,
    total_steps: int | None = None,
    *,
    hooks: bool = True,
    nonfinite: Literal["raise", "ignore"] = "raise",
) -> Run:
    """Attach a recipe to a training script: from here on every optimizer step pulls the weights to their targets.

    Model, loss, loop, scheduler, AMP and DDP stay as they are. Attach after the model is wrapped, moved and loaded.
    When resuming, attach first, then load the model's state dict, then the optimizer's (which carries Detent's).

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer, or all optimizers that hold claimed parameters.
        recipe: which weights go where and how.
        total_steps: optimizer steps in the whole training; needed where the recipe speaks of fractions of training.
        hooks: register optimizer hooks; with `False` call `run.before_step()` and `run.after_step()` yourself.
        nonfinite: "raise" stops before the step when a claimed weight's gradient is NaN or infinite (one
            reduction a step); "ignore" does not look.

    Returns:
        The run, whose `compressed()`, `recalibrate()`, `finalize()` and `state_dict()` are the rest of the interface.

    Raises:
        ValueError: a rule that claims nothing or has no mechanism; a claimed parameter that is frozen, all zero, or
            in no attached optimizer or in two; an optimizer that keeps a second copy of the weights.

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
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"attach(total_steps={total_steps}): must be >= 1, or None if unknown")
    if nonfinite not in ("raise", "ignore"):
        raise ValueError(f'attach(nonfinite={nonfinite!r}): must be "raise" or "ignore"')
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers:
        raise ValueError("attach(optimizer=[]): give at least one optimizer, or use detent.compress")
    plan = recipe.resolve(model)
    for i, rule in enumerate(recipe.rules):
        if rule.target is not None and rule.mechanism is None:
            raise ValueError(f"rule {i} (match={rule.match!r}) has no mechanism; only detent.compress needs none")
    run = Run(model, plan, [_unwrap(o) for o in optimizers], total_steps, nonfinite)
    run._start(hooks)
    return run


def compress(model: nn.Module, recipe: Recipe) -> Run:
    """Apply the targets of a recipe to a trained model, with no optimizer and no data: post-training compression.

    The model keeps its weights; `run.compressed()` shows the compressed life, `run.finalize()` makes it permanent.

    Args:
        model: a trained model.
        recipe: rules whose mechanisms, if any, are ignored.

    Returns:
        A run without optimizers.

    Raises:
        ValueError: a rule that claims nothing, a target that refuses a parameter, NaN weights.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(8, 4)
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
        >>> with run.compressed():
        ...     print(len(model.weight.unique()) <= 3)
        True
    """
    run = Run(model, recipe.resolve(model), [], None, "raise")
    run._fit_fresh(run._entries)
    return run


class Run:
    """A recipe attached to a model. Made by `attach` and `compress`, never directly.

    Attributes:
        model: the model.
        plan: the resolved recipe; `print(run.plan)`.

    Example:
        >>> import torch, detent as dt
        >>> run = dt.compress(torch.nn.Linear(8, 4), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
        >>> run.clock
        0
    """

    def __init__(
        self, model: nn.Module, plan: Plan, optimizers: list[Any], total_steps: int | None, nonfinite: str
    ) -> None:
        self.model = model
        self.plan = plan
        self._total_steps = total_steps
        self._nonfinite = nonfinite
        self._inside = False
        self._closed = False
        self._awaiting_state = False
        self._statistics: dict[str, Statistics] = {}
        self._fitted_at: dict[int, int] = {}
        named = _named_parameters(model)
        self._entries = [
            _Entry(claim=claim, rule=plan.rule_of(claim), param=named[claim.name]) for claim in plan.claimed
        ]
        self._drivers = [_Driver(optimizer=o, entries=[]) for o in optimizers]
        if optimizers:
            self._assign()

    # --- attaching ------------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Give every entry to the one optimizer that holds its parameter."""
        owners: dict[int, list[_Driver]] = {}
        for driver in self._drivers:
            driver.entries = []
            for group in driver.optimizer.param_groups:
                for param in group["params"]:
                    owners.setdefault(id(param), []).append(driver)
        for entry in self._entries:
            if not entry.param.requires_grad:
                raise ValueError(f"{entry.name!r} is frozen (requires_grad=False), so nothing can pull it; keep it")
            found = owners.get(id(entry.param), [])
            if len(found) != 1:
                where = "no attached optimizer" if not found else f"{len(found)} places of the attached optimizers"
                raise ValueError(f"{entry.name!r} is claimed by the recipe but sits in {where}; it must sit in exactly one")
            found[0].entries.append(entry)

    def _start(self, hooks: bool) -> None:
        for driver in self._drivers:
            _refuse_second_copies(driver.optimizer)
            if hooks:
                self._register(driver)
        try:
            self._check_schedules()
            if not any(entry.param.is_meta for entry in self._entries):
                self._open()
        except Exception:
            self.detach()
            raise

    def _check_schedules(self) -> None:
        """Find a fraction of training that cannot be resolved now, not at step 3,000."""
        for entry in self._entries:
            self._cadence(entry)
            entry.mechanism.active(Clock(step=0, total_steps=self._total_steps))
            slot_free = _moments(entry.mechanism)
            for name, moment in slot_free.items():
                step_at(moment, self._total_steps, f"{type(entry.mechanism).__name__}.{name}")

    def _open(self) -> None:
        """First fit, and the first look of latent mechanisms at their weights."""
        for entry in self._entries:
            if not bool(sharding.whole(entry.param).any()):
                raise ValueError(
                    f"{entry.name!r} is all zero, so {type(entry.target).__name__} has nothing to fit and the mechanism "
                    "nothing to pull; initialise it, or keep it in full precision"
                )
        for driver in self._drivers:
            self._fit_due(driver, first=True)
        with torch.no_grad():
            for driver in self._drivers:
                for entry in driver.entries:
                    entry.mechanism.open(self._slot(driver, entry), self._clock(driver))
        self._adopt()

    def _register(self, driver: _Driver) -> None:
        optimizer = driver.optimizer
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise ValueError(
                f"{type(optimizer).__name__} has no step hooks: attach with hooks=False and call run.before_step() and "
                "run.after_step() around its step"
            )
        reason = "Detent keeps a Python clock and cannot be traced; compile the step without fullgraph=True"

        @_outside_graphs(reason)
        def before(opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._before(driver, args, kwargs)

        @_outside_graphs(reason)
        def after(opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._after(driver)

        def save(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {**state_dict, _STATE_KEY: self._driver_state(driver)}

        def load(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return self._load_riding(driver, state_dict)

        driver.handles = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
            optimizer.register_state_dict_post_hook(save),
            optimizer.register_load_state_dict_pre_hook(load),
        ]

    # --- the two halves of a step ---------------------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """Training steps done so far (of the first optimizer)."""
        return self._drivers[0].step if self._drivers else 0

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

    def _driver_of(self, optimizer: Any) -> _Driver:
        if optimizer is None and len(self._drivers) == 1:
            return self._drivers[0]
        for driver in self._drivers:
            if optimizer is not None and driver.optimizer is _unwrap(optimizer):
                return driver
        raise ValueError(f"optimizer={type(optimizer).__name__}: name one of the {len(self._drivers)} attached optimizers")

    def _before(self, driver: _Driver, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._closed:
            return None
        if self._inside:
            raise RuntimeError("optimizer.step() inside run.compressed(): leave the compressed life before training on")
        replay = _replay_closure(args, kwargs)
        driver.skip = self._is_dummy(driver) or _overflowed(driver.optimizer)
        if driver.skip:
            return replay
        self._follow(driver)
        retried = driver.pending
        self._settle(driver)
        if self._awaiting_state:
            raise RuntimeError(
                "the optimizer's state was loaded without Detent's part, and this recipe keeps state "
                f"({', '.join(sorted({m for e in self._entries for m in e.mechanism.memory}))}); load a checkpoint "
                "saved with the run attached, or call run.rebind(adopt=True) to start it afresh"
            )
        clock = self._clock(driver)
        active = [entry for entry in driver.entries if entry.mechanism.active(clock)]
        self._check_gradients(driver, active)
        with torch.no_grad():
            self._fit_due(driver)
            driver.slots = [(entry, self._slot(driver, entry)) for entry in active]
            driver.pending = True
            spent = driver.spent if retried else {}
            for entry, slot in driver.slots:
                if slot.grad is not None and _same_gradient(spent.get(entry.name), slot.grad):
                    continue  # the step before this one raised, and this gradient was already scaled for it
                entry.mechanism.before_step(slot, clock)
            self._clip_norm(driver)
            driver.spent = {
                entry.name: (weakref.ref(slot.grad), slot.grad._version)
                for entry, slot in driver.slots
                if slot.grad is not None
            }
        return replay

    def _after(self, driver: _Driver) -> None:
        if self._closed:
            return
        if driver.skip:
            driver.skip = False
            return
        if not driver.pending:
            raise RuntimeError("run.after_step() without run.before_step(): call both around one optimizer step")
        clock = self._clock(driver)
        with torch.no_grad():
            for entry, slot in driver.slots:
                entry.mechanism.after_step(slot, clock)
        if not driver.checked_copies:
            _refuse_copies_in_state(driver)
            driver.checked_copies = True
        driver.slots = []
        driver.pending = False
        driver.step += 1
        self._statistics.clear()
        self._adopt(driver)

    def _is_dummy(self, driver: _Driver) -> bool:
        """A step that only makes an optimizer create its state (checkpoint code), or a warm-up step at rate 0."""
        groups = driver.optimizer.param_groups
        if all(float(group.get("lr", 1.0)) == 0.0 for group in groups):
            return True
        if driver.optimizer.state:
            return False
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return all(not bool(sharding.local(grad).any()) for grad in grads)

    def _check_gradients(self, driver: _Driver, active: list[_Entry]) -> None:
        if self._nonfinite == "ignore":
            return
        grads = {e.name: sharding.local(e.param.grad) for e in active if e.param.grad is not None}
        for name, grad in grads.items():
            if grad.layout != torch.strided:
                raise RuntimeError(f"{name!r} has a sparse gradient, which no mechanism can scale; use sparse=False")
        if not grads:
            return
        total = torch.stack([n.float() for n in torch._foreach_norm(list(grads.values()))]).sum()
        if bool(torch.isfinite(total)):
            return
        for name, grad in grads.items():
            if not bool(torch.isfinite(grad).all()):
                raise RuntimeError(
                    f"the gradient of {name!r} is not finite at step {driver.step}; no weight was changed by this step"
                )

    def _clip_norm(self, driver: _Driver) -> None:
        limits = {e.mechanism.norm_limit for e, _ in driver.slots} - {None}
        if not limits:
            return
        if len(limits) > 1:
            raise ValueError(f"clip_norm: the rules of one optimizer give different limits {sorted(limits)}; give one")  # type: ignore[type-var]
        scale = getattr(driver.optimizer, "grad_scale", None)
        limit = limits.pop() * (1.0 if scale is None else float(scale))  # type: ignore[operator]
        params = [p for group in driver.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, limit)

    def _slot(self, driver: _Driver, entry: _Entry) -> Slot:
        assert entry.params is not None and entry.pull_params is not None
        target, params, pull, pull_params = entry.target, entry.params, entry.pull, entry.pull_params
        grad = entry.param.grad
        return Slot(
            name=entry.name,
            weight=sharding.local(entry.param),
            grad=None if grad is None else sharding.local(grad),
            target=target,
            params=entry.localised(params),
            pull=pull,
            pull_params=entry.localised(pull_params),
            project=lambda w: entry.map_whole(target.project, target, params, w),
            pull_project=lambda w: entry.map_whole(pull.project, pull, pull_params, w),
            pull_free=lambda w: entry.map_whole(pull.free, pull, pull_params, w),
            frozen=self._frozen(driver, entry),
            plain=isinstance(driver.optimizer, torch.optim.SGD),
            decay=lambda: self._decay(driver, entry),
            grad_scale=getattr(driver.optimizer, "grad_scale", None),
            state=entry.state,
        )

    def _decay(self, driver: _Driver, entry: _Entry) -> float:
        for group in driver.optimizer.param_groups:
            if any(p is entry.param for p in group["params"]):
                decay = float(group.get("weight_decay", 0.0) or 0.0)
                if not decay:
                    return 0.0
                if driver.decoupled is None:
                    driver.decoupled = _decay_is_decoupled(driver.optimizer, group, entry.param.dim())
                return float(group["lr"]) * decay if driver.decoupled else 0.0
        raise AssertionError(entry.name)

    def _clock(self, driver: _Driver) -> Clock:
        return Clock(step=driver.step, total_steps=self._total_steps)

    # --- fitting --------------------------------------------------------------------------------------------------

    def _cadence(self, entry: _Entry) -> tuple[int, int | None]:
        """(steps between fits, step from which the fit is frozen)."""
        rule, mechanism = entry.rule, entry.mechanism
        every = mechanism.fit_every if rule.fit_every is None else rule.fit_every
        until = mechanism.fit_until if rule.fit_until is None else rule.fit_until
        return every, None if until is None else step_at(until, self._total_steps, f"fit_until of {rule.match!r}")

    def _frozen(self, driver: _Driver, entry: _Entry) -> bool:
        until = self._cadence(entry)[1]
        return until is not None and driver.step >= until

    def _fit_due(self, driver: _Driver, first: bool = False) -> None:
        """Fit what is due at this tick; a model-wide target together, whichever optimizer comes first."""
        for index, rule in enumerate(self.plan.recipe.rules):
            mine = [entry for entry in driver.entries if entry.claim.rule == index]
            if not mine:
                continue
            every, until = self._cadence(mine[0])
            phase = every - 1 if mine[0].mechanism.fit_at_end and not first else 0
            missing = any(entry.pull_params is None for entry in mine)
            due = driver.step % every == phase and (until is None or driver.step < until)
            if not (missing or due):
                continue
            if mine[0].pull.scope == "model":
                mine = [entry for entry in self._entries if entry.claim.rule == index]
                if torch._C._current_graph_task_id() != -1:
                    raise RuntimeError(
                        f"rule {index} (match={rule.match!r}) is fitted over the whole model, which an optimizer that "
                        "steps inside backward cannot offer; use scope='tensor'"
                    )
            if not missing and self._fitted_at.get(id(mine[0])) == driver.step:
                continue
            self._fit(mine)
            for entry in mine:
                self._fitted_at[id(entry)] = driver.step

    def _fit(self, entries: list[_Entry]) -> None:
        """Fit what training pulls to; the rule's own target too where it is the same."""
        fitted = _fit_together(entries[0].pull, entries, [entry.pull_params for entry in entries])
        for entry, params in zip(entries, fitted, strict=True):
            entry.pull_params = params
            if entry.pull is entry.target:
                entry.params = params
        if entries[0].pull is not entries[0].target:
            self._fit_fresh(entries)

    def _fit_fresh(self, entries: list[_Entry]) -> None:
        """Fit the rules' own targets to the weights as they are."""
        by_rule: dict[int | None, list[_Entry]] = {}
        for entry in entries:
            by_rule.setdefault(entry.claim.rule, []).append(entry)
        for mine in by_rule.values():
            for entry, params in zip(mine, _fit_together(mine[0].target, mine, [None] * len(mine)), strict=True):
                entry.params = params

    # --- keeping up with the outside ------------------------------------------------------------------------------

    def _adopt(self, driver: _Driver | None = None) -> None:
        for entry in self._entries if driver is None else driver.entries:
            entry.version = sharding.local(entry.param)._version

    def _settle(self, driver: _Driver) -> None:
        """Repair a step that raised half-way, then make sure nobody else wrote the claimed weights."""
        if driver.pending:
            with torch.no_grad():
                for entry, slot in driver.slots:
                    entry.mechanism.undo(slot, self._clock(driver))
            driver.pending = False
            driver.slots = []
            self._adopt(driver)
        for entry in driver.entries:
            if entry.version not in (-1, sharding.local(entry.param)._version):
                raise RuntimeError(
                    f"{entry.name!r} was written by someone else since the last step (a load_state_dict after attach?); "
                    "call run.rebind(adopt=True) to go on from the new values"
                )

    def _follow(self, driver: _Driver) -> None:
        """Find parameters again that were replaced after attach (FSDP2, accelerate, model.to)."""
        held = {id(p) for group in driver.optimizer.param_groups for p in group["params"]}
        if all(id(entry.param) in held for entry in driver.entries) and not any(
            entry.pull_params is None for entry in driver.entries
        ):
            return
        self.rebind()

    def rebind(self, model: nn.Module | None = None, *, adopt: bool = False) -> None:
        """Find the claimed parameters again by name, after they were replaced or written by someone else.

        Args:
            model: the model whose parameters count from now on; by default the same one.
            adopt: go on from the weights as they are now. Latents and masks start afresh from them, and grids
                that are not frozen yet are fitted again.

        Raises:
            ValueError: a claimed name is gone, has another shape, or is in no attached optimizer or in two.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.STE())])
            >>> run = dt.attach(model, optimizer, recipe)
            >>> _ = model.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
            >>> run.rebind(adopt=True)
        """
        self.model = self.model if model is None else model
        named = _named_parameters(self.model)
        for entry in self._entries:
            param = named.get(entry.name)
            if param is None:
                raise ValueError(f"{entry.name!r} is claimed by the recipe but is not a parameter of the model any more")
            if tuple(param.shape) != entry.claim.layout.shape:
                raise ValueError(f"{entry.name!r} has shape {tuple(param.shape)} now, not {entry.claim.layout.shape}")
            entry.param = param
        if self._drivers:
            self._assign()
        if adopt:
            self._awaiting_state = False
            for entry in self._entries:
                entry.state.clear()
                entry.params = None if not self._drivers else entry.params
                entry.pull_params = None
            for driver in self._drivers:
                driver.pending, driver.slots = False, []
        if any(entry.pull_params is None for entry in self._entries) and self._drivers:
            self._open()
        elif not self._drivers:
            self._fit_fresh(self._entries)
        self._adopt()

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides weights and optimizer state: clocks, fitted params, latents, masks.

        It also rides as key "detent" in the optimizer's own state dict, so saving model and optimizer is enough;
        save this one explicitly under `torch.distributed.checkpoint`.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.STE())])
            >>> run = dt.attach(model, optimizer, recipe)
            >>> sorted(run.state_dict()["weights"]["weight"])
            ['params', 'pull', 'state']
        """
        weights: dict[str, Any] = {}
        for driver in self._drivers:
            weights |= self._driver_state(driver)["weights"]
        return {"version": _STATE_VERSION, "steps": [driver.step for driver in self._drivers], "weights": weights}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model's weights before this.

        Args:
            state_dict: from `state_dict()` of a run with the same recipe.

        Raises:
            ValueError: another version, number of optimizers, or set of claimed weights.
        """
        if len(state_dict.get("steps", ())) != len(self._drivers):
            raise ValueError(
                f"state has {len(state_dict.get('steps', ()))} optimizer clocks, this run has {len(self._drivers)}"
            )
        for driver, step in zip(self._drivers, state_dict["steps"], strict=True):
            part = {entry.name: state_dict["weights"].get(entry.name) for entry in driver.entries}
            self._load_driver(driver, {"version": state_dict.get("version"), "step": step, "weights": part})

    def _driver_state(self, driver: _Driver) -> dict[str, Any]:
        weights = {}
        for entry in driver.entries:
            weights[entry.name] = {
                "params": dict(entry.params.tensors) if entry.params else {},
                "pull": dict(entry.pull_params.tensors) if entry.pull_params else {},
                "state": {name: sharding.as_sharded(t, entry.param) for name, t in entry.state.items()},
            }
        return {"version": _STATE_VERSION, "step": driver.step, "weights": weights}

    def _load_riding(self, driver: _Driver, state_dict: dict[str, Any]) -> dict[str, Any]:
        rest = dict(state_dict)
        mine = rest.pop(_STATE_KEY, None)
        if mine is not None:
            self._load_driver(driver, mine)
        elif any(entry.mechanism.memory for entry in driver.entries):
            self._awaiting_state = True
        return rest

    def _load_driver(self, driver: _Driver, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"Detent state has version {state.get('version')!r}; this release reads {_STATE_VERSION}")
        claimed = {entry.name for entry in driver.entries}
        given = {name for name, value in state["weights"].items() if value is not None}
        if claimed != given:
            odd = sorted(claimed ^ given)[0]
            raise ValueError(f"Detent state and recipe disagree: {odd!r} is in only one of them")
        device_of = {entry.name: sharding.local(entry.param).device for entry in driver.entries}
        for entry in driver.entries:
            saved, device = state["weights"][entry.name], device_of[entry.name]

            def params_of(tensors: Mapping[str, Tensor], entry: _Entry = entry, device: Any = device) -> Params:
                moved = {name: t.detach().clone().to(device) for name, t in tensors.items()}
                return Params(tensors=moved, layout=entry.claim.layout)

            entry.params, entry.pull_params = params_of(saved["params"]), params_of(saved["pull"])
            if entry.pull is entry.target:
                entry.params = entry.pull_params
            entry.state = {
                name: _localised_state(t, entry.param, entry.name).to(device) for name, t in saved["state"].items()
            }
        driver.step = int(state["step"])
        driver.pending, driver.slots = False, []
        self._fitted_at.update({id(entry): -1 for entry in driver.entries})
        self._awaiting_state = False
        self._statistics.clear()
        self._adopt(driver)

    # --- lives ----------------------------------------------------------------------------------------------------

    def _life(self, bits: int | None, recipe: Recipe | None) -> list[tuple[_Entry, Target, Params]]:
        """What each claimed tensor is in a compressed life; collective under sharding."""
        for driver in self._drivers:
            self._settle(driver)
        if bits is not None and recipe is not None:
            raise ValueError("give bits= or recipe=, not both")
        if recipe is not None:
            return self._life_of(recipe)
        life: list[tuple[_Entry, Target, Params]] = []
        unfixed = [e for e in self._entries if e.pull is not e.target or e.params is None]
        if unfixed:
            self._fit_fresh(unfixed)
        changed = 0
        for entry in self._entries:
            assert entry.params is not None
            target, params = entry.target, entry.params
            if bits is not None and target.has_bits and not entry.rule.pinned:
                target, params = target.at_bits(entry.hidden_whole(), params, bits)
                changed += 1
            life.append((entry, target, params))
        if bits is not None and not changed:
            raise ValueError(f"bits={bits}: no rule of this recipe has an unpinned target with a bit-width")
        return life

    def _life_of(self, recipe: Recipe) -> list[tuple[_Entry, Target, Params]]:
        plan = recipe.resolve(self.model)
        named = _named_parameters(self.model)
        latents = {entry.name: entry.state for entry in self._entries}
        entries = [
            _Entry(claim=c, rule=plan.rule_of(c), param=named[c.name], state=latents.get(c.name, {}))
            for c in plan.claimed
        ]
        self._fit_fresh(entries)
        return [(entry, entry.target, entry.params) for entry in entries if entry.params is not None]

    @contextmanager
    def compressed(
        self, *, bits: int | None = None, recipe: Recipe | None = None, batchnorm: bool = True
    ) -> Iterator[Run]:
        """Show the model in its compressed life; on leaving, the full-precision weights are back bitwise.

        Args:
            bits: another width for every target that has one and is not pinned, without retraining: the better of
                a fresh fit and the trained step times a power of two.
            recipe: other targets altogether, fitted to the weights as they are.
            batchnorm: use the BatchNorm statistics that `recalibrate` found for this life, if there are any.

        Raises:
            ValueError: both bits and recipe, or bits where no target has a width.
            RuntimeError: inside another `compressed()`.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(16, 16)
            >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
            >>> with run.compressed(bits=2):
            ...     print(len(model.weight.unique()))
            3
        """
        if self._inside:
            raise RuntimeError("run.compressed() inside run.compressed(): leave the first one before entering another")
        life = self._life(bits, recipe)
        statistics = self._statistics.get(_life_key(bits, recipe)) if batchnorm else None
        sharding.reshard(self.model)
        kept = [(entry, sharding.local(entry.param).clone()) for entry, _, _ in life]
        self._inside = True
        try:
            with torch.no_grad():
                for entry, target, params in life:
                    self._write(entry, entry.map_whole(target.project, target, params, self._hidden(entry)))
            with swapped_buffers(self.model, statistics):
                yield self
        finally:
            sharding.reshard(self.model)
            with torch.no_grad():
                for entry, value in kept:
                    self._write(entry, value)
            sharding.reshard(self.model)
            self._inside = False
            self._adopt()

    def _hidden(self, entry: _Entry) -> Tensor:
        return entry.state.get("latent", sharding.local(entry.param))

    def _write(self, entry: _Entry, value: Tensor) -> None:
        sharding.local(entry.param).copy_(value)

    def recalibrate(
        self,
        batches: Iterable[Any],
        *,
        bits: int | None = None,
        recipe: Recipe | None = None,
        forward: Callable[[Any], Any] | None = None,
    ) -> None:
        """Re-estimate BatchNorm statistics for a compressed life, into buffers that belong to that life alone.

        The plain average over the batches; the full life's statistics stay untouched. The next training step drops them.

        Args:
            batches: inputs, tuples that start with inputs, or mappings of keyword arguments, on the model's device.
            bits: the life `compressed(bits=...)` shows.
            recipe: the life `compressed(recipe=...)` shows.
            forward: how to feed one batch, if `model(inputs)` is not it.

        Raises:
            ValueError: no BatchNorm with running statistics, no batches, or batches of an unknown kind.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=2))]))
            >>> run.recalibrate([torch.randn(64, 4)])
            >>> bool((model[1].running_mean == 0).all())    # the full life keeps its own
            True
        """
        with self.compressed(bits=bits, recipe=recipe, batchnorm=False):
            found = reestimate(self.model, batches, forward)
        self._statistics[_life_key(bits, recipe)] = found

    def statistics(self, *, bits: int | None = None, recipe: Recipe | None = None) -> Statistics | None:
        """The BatchNorm statistics of a compressed life, if `recalibrate` found any."""
        return self._statistics.get(_life_key(bits, recipe))

    def measure(self, *, bits: int | None = None, recipe: Recipe | None = None) -> list[dict[str, Any]]:
        """How far the two lives are apart, one row a claimed tensor.

        Returns:
            Rows with name, target, weights, bits_per_weight (codes and params), error (|w - q|^2 / |w|^2),
            wasserstein (1-Wasserstein distance between the values of the two lives), distance (mean |w - q| in
            cells, nan where there are none) and zeros (share of zeros among q).

        Example:
            >>> import torch, detent as dt
            >>> run = dt.compress(torch.nn.Linear(16, 16), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
            >>> run.measure()[0]["error"] < 1e-3
            True
        """
        rows = []
        for entry, target, params in self._life(bits, recipe):
            rows.append(distance_row(entry.name, entry.hidden_whole(), target, params))
        return rows

    def encoded(self, *, bits: int | None = None, recipe: Recipe | None = None) -> dict[str, Encoded]:
        """The claimed tensors of a compressed life as codes, by name: what a file holds."""
        found = {}
        for entry, target, params in self._life(bits, recipe):
            codes = target.encode(entry.hidden_whole(), params)
            found[entry.name] = Encoded(target=target, params=params, codes=codes, dtype=entry.claim.dtype)
        return found

    def finalize(self) -> None:
        """Make the compressed life permanent: every claimed weight ends in its target exactly, and the run is over.

        Statistics found by `recalibrate` become the model's own. Save both lives *before* this.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(16, 16)
            >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
            >>> run.finalize()
            >>> len(model.weight.unique())
            3
        """
        if self._inside:
            raise RuntimeError("run.finalize() inside run.compressed(): leave the compressed life first")
        life = self._life(None, None)
        statistics = self._statistics.get(_life_key(None, None))
        sharding.reshard(self.model)
        with torch.no_grad():
            for entry, target, params in life:
                self._write(entry, entry.map_whole(target.project, target, params, self._hidden(entry)))
                entry.state.clear()
            if statistics is not None:
                buffers = {canonical_name(name): buffer for name, buffer in self.model.named_buffers()}
                for name, value in statistics.items():
                    buffers[name].copy_(value)
        sharding.reshard(self.model)
        self._adopt()
        self.detach()

    def detach(self) -> None:
        """Remove all hooks: the optimizers are again what they were. The weights stay as they are."""
        for driver in self._drivers:
            for handle in driver.handles:
                handle.remove()
            driver.handles = []
        self._closed = True


# --- helpers that know torch, not the run -----------------------------------------------------------------------


def _fit_together(target: Target, entries: list[_Entry], previous: list[Params | None]) -> list[Params]:
    try:
        with torch.no_grad():
            return target.fit_model([e.hidden_whole() for e in entries], [e.claim.layout for e in entries], previous)
    except ValueError as error:
        bad = next((e.name for e in entries if not bool(torch.isfinite(e.hidden_whole()).all())), entries[0].name)
        raise ValueError(f"{bad!r}: {error}") from None


def _moments(mechanism: Mechanism) -> dict[str, Any]:
    """Fields of a mechanism that are moments, by the convention that their names end in `start`."""
    return {name: value for name, value in vars(mechanism).items() if name.endswith("start")}


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {canonical_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}


def _unwrap(optimizer: Any) -> Any:
    """The optimizer inside a wrapper that exposes it as `.optimizer` (accelerate)."""
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(f"optimizer={type(optimizer).__name__}: has no param_groups; give a torch.optim.Optimizer")
    return optimizer


def _outside_graphs(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.compiler.disable` with a reason where this torch takes one."""
    try:
        return torch.compiler.disable(reason=reason)  # type: ignore[call-arg]
    except TypeError:  # torch < 2.7
        return torch.compiler.disable


def _replay_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Evaluate a closure now, before any weight is touched, and hand the step its value."""
    closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    calls = 0

    def replay() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError(
                "this optimizer evaluates its closure more than once a step (LBFGS does), which Detent cannot follow; "
                "use an optimizer that evaluates it once"
            )
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": replay}
    return (args[0], replay, *args[2:]), kwargs


def _overflowed(optimizer: Any) -> bool:
    """A fused optimizer under GradScaler steps even on overflow and skips inside: read what the scaler found."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item() if isinstance(found, Tensor) else found)


def _same_gradient(spent: tuple[Any, int] | None, grad: Tensor) -> bool:
    return spent is not None and spent[0]() is grad and spent[1] == grad._version


def _refuse_second_copies(optimizer: Any) -> None:
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"{type(optimizer).__name__} keeps a second copy of the weights (it has train() and eval() modes), so the "
            "weights Detent sees are not the ones it moves; not supported yet"
        )


def _refuse_copies_in_state(driver: _Driver) -> None:
    """After the first step, look for a master copy: state that equals the weight itself."""
    for entry in driver.entries:
        own = driver.optimizer.state.get(entry.param, {})
        w = sharding.local(entry.param)
        for key, value in own.items():
            if isinstance(value, Tensor) and value.shape == entry.param.shape and value.is_floating_point():
                same = sharding.local(value).to(w.dtype)
                if same.data_ptr() != w.data_ptr() and bool(w.any()) and torch.equal(same, w):
                    raise RuntimeError(
                        f"{type(driver.optimizer).__name__} keeps a second copy of {entry.name!r} in its state "
                        f"({key!r}), so the weights Detent sees are not the ones it moves; not supported yet"
                    )


def _decay_is_decoupled(optimizer: Any, group: Mapping[str, Any], dims: int) -> bool:
    """Whether weight decay acts on the weight itself (AdamW) or through the gradient (Adam).

    The group's own flag where there is one, else one step of a fresh optimizer of the same class on a scratch weight
    with a zero gradient: decoupled decay takes off exactly lr * decay * w.
    """
    flag = group.get("decoupled_weight_decay")
    if flag is not None:
        return bool(flag)
    scratch = nn.Parameter(torch.full((2,) * dims, 0.5, dtype=torch.float64))
    scratch.grad = torch.zeros_like(scratch)
    options = {k: v for k, v in group.items() if k not in ("params", "fused", "foreach", "capturable")}
    try:
        probe = type(optimizer)([{**options, "params": [scratch]}], lr=float(group["lr"]))
        probe.step()
    except Exception as error:
        raise RuntimeError(
            f"cannot tell whether the weight decay of {type(optimizer).__name__} is decoupled ({error}); put a key "
            "decoupled_weight_decay=True or False in its param_groups, or use PSG(form='gradient')"
        ) from error
    expected = 0.5 * (1.0 - float(group["lr"]) * float(group["weight_decay"]))
    return torch.allclose(scratch.detach(), torch.full_like(scratch, expected), rtol=0.0, atol=1e-7)


def _localised_state(value: Tensor, param: Tensor, name: str) -> Tensor:
    """Saved state for what this process holds of the parameter, whatever sharding it was saved under."""
    full = sharding.whole(value) if hasattr(value, "full_tensor") else value.detach()
    if tuple(full.shape) == tuple(param.shape):
        return sharding.from_whole(full, param, name).clone()
    return full.clone()


def _life_key(bits: int | None, recipe: Recipe | None) -> str:
    return f"bits={bits}" if recipe is None else recipe.to_yaml()
