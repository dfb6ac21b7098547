"""A claimed weight and its two lives: what is fitted to it, a second set of BatchNorm statistics, the distance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from detent import sharding
from detent.mechanisms import Clock, Mechanism
from detent.recipe import Claim, Plan, Rule, canonical_name, short
from detent.schedules import Schedule, step_at
from detent.targets import Codes, Params, Target

__all__ = [
    "Encoded",
    "Entry",
    "Statistics",
    "distance_row",
    "entries_of",
    "fit_pull",
    "fit_target",
    "install",
    "named_parameters",
    "reestimate",
    "swapped_buffers",
]

Statistics = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One claimed tensor, ready to be written: what it is, and its codes.

    Args:
        target: where the weights lie.
        params: the fitted numbers.
        codes: the codes; `target.decode(codes, params, dtype)` gives the projected tensor bitwise.
        dtype: dtype of the weights.

    Example:
        >>> import detent as dt
        >>> model = nn.Linear(4, 4)
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
        >>> run.encoded()["weight"].codes.nbytes
        8
    """

    target: Target
    params: Params
    codes: Codes
    dtype: torch.dtype

    def decode(self) -> Tensor:
        """The projected tensor."""
        return self.target.decode(self.codes, self.params, self.dtype)


@dataclass(kw_only=True)
class Entry:
    """One claimed parameter: what the plan said, and what the engine knows of it now."""

    claim: Claim
    rule: Rule
    param: Tensor
    group: int = -1
    params: Params | None = None
    pull_params: Params | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    version: int = -1
    fitted_at: int = -1

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
    def is_ours(self) -> bool:
        """Whether nobody else wrote the weight since the engine last did."""
        return self.version in (-1, _version_of(self.param))

    def adopt(self) -> None:
        """Take the weight as it is now for our own writing."""
        self.version = _version_of(self.param)

    def mark(self) -> tuple[int, bool]:
        """What a closure that is evaluated too late would find changed: the weight, and whether it has a gradient."""
        return self.param._version, self.param.grad is None

    def cadence(self, total_steps: int | None) -> tuple[int, int | None]:
        """(steps between fits, step from which the fit is frozen)."""
        every = self.mechanism.fit_every if self.rule.fit_every is None else self.rule.fit_every
        until = self.mechanism.fit_until if self.rule.fit_until is None else self.rule.fit_until
        return every, None if until is None else step_at(until, total_steps, f"fit_until of {self.rule.match!r}")

    def check_moments(self, total_steps: int | None) -> None:
        """Find a fraction of training that cannot be resolved now, not at step 3,000."""
        self.cadence(total_steps)
        self.mechanism.active(Clock(step=0, total_steps=total_steps))
        for name, value in vars(self.mechanism).items():
            if isinstance(value, Schedule):
                value(0, total_steps)
            elif name.endswith("start") and value is not None:  # by convention a moment
                step_at(value, total_steps, f"{type(self.mechanism).__name__}.{name}")

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
            self.param, self.version = param, _version_of(param)
        shape = tuple(sharding.local(param).shape)
        for name, value in self.state.items():
            if tuple(value.shape) == self.claim.layout.shape != shape:
                self.state[name] = sharding.from_whole(value, param, self.name).clone()

    def hidden(self) -> Tensor:
        """What is held here of the weights that are fitted and projected."""
        return self.state.get("latent", sharding.local(self.param))

    def write(self, value: Tensor) -> None:
        """Write what is held here of the weight."""
        sharding.local(self.param).copy_(value)

    def hidden_whole(self) -> Tensor:
        """The whole tensor that the compressed life is fitted to and projected from (a collective under sharding)."""
        latent = self.state.get("latent")
        return sharding.whole(self.param if latent is None else sharding.as_sharded(latent, self.param))

    def pulled_whole(self) -> Tensor:
        """The whole tensor that the pull is fitted to: the hidden one, and a mechanism's offset on top."""
        key = self.rule.mechanism.offset if self.rule.mechanism else None
        hidden = self.hidden_whole()
        if key is None or key not in self.state:
            return hidden
        return hidden + sharding.whole(sharding.as_sharded(self.state[key], self.param))

    def saved(self, complete: bool) -> dict[str, Any]:
        """What resuming needs of this weight besides its values.

        Memory that is not formed yet is a placeholder if `complete`: distributed checkpoints read into a template,
        so the state of a run that has just been attached must have all keys.
        """
        held = {name: str(self.state[name].dtype) if name in self.state else "" for name in self.mechanism.memory}
        memory = dict(self.state)
        for name in held if complete else ():
            memory.setdefault(name, torch.zeros_like(sharding.local(self.param)))
        return {
            "params": dict(self.params.tensors) if self.params else {},
            "pull": dict(self.pull_params.tensors) if self.pull_params else {},
            "state": {name: sharding.as_sharded(value, self.param) for name, value in memory.items()},
            "held": held,
            "places": self._places,
        }

    @property
    def _places(self) -> str:
        return f"{short(self.target)} <- {short(self.pull)}"

    def check_places(self, saved: Mapping[str, Any]) -> None:
        """Refuse numbers that were fitted for another target.

        Raises:
            ValueError: naming the parameter.
        """
        if saved.get("places") != self._places:
            raise ValueError(
                f"the state of {self.name!r} was saved for {saved.get('places')}, this recipe has {self._places}; "
                "resume with the recipe it was saved with"
            )

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take back what `saved` gave, under whatever sharding.

        Raises:
            ValueError: memory that the saved run had is missing.
        """
        device = sharding.local(self.param).device

        def params_of(tensors: Mapping[str, Tensor]) -> Params:
            moved = {name: t.detach().clone().to(device) for name, t in tensors.items()}
            return Params(tensors=moved, layout=self.claim.layout)

        self.pull_params = params_of(saved["pull"])
        self.params = params_of(saved["params"]) if self.has_own_fit else self.pull_params
        self.state = {}
        for name, dtype in saved["held"].items():
            if dtype and name not in saved["state"]:
                raise ValueError(f"the state of {self.name!r} has lost its {name!r}, which the saved run kept")
            if dtype:
                value = _localised_state(saved["state"][name], self.param, self.name)
                self.state[name] = value.to(device, getattr(torch, dtype.removeprefix("torch.")))

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


def entries_of(model: nn.Module, plan: Plan, states: Mapping[str, dict[str, Tensor]]) -> list[Entry]:
    """The claimed parameters of a plan, with the memory that mechanisms have of them already."""
    named = named_parameters(model)
    return [
        Entry(claim=claim, rule=plan.rule_of(claim), param=named[claim.name], state=states.get(claim.name, {}))
        for claim in plan.claimed
    ]


def fit_pull(entries: list[Entry]) -> None:
    """Fit what training pulls one rule's weights to; the rule's own target too. A collective under sharding."""
    previous = [entry.pull_params for entry in entries]
    fitted = _fit_together(entries[0].pull, entries, previous, [entry.pulled_whole() for entry in entries])
    for entry, params in zip(entries, fitted, strict=True):
        entry.pull_params = params
        if not entry.has_own_fit:
            entry.params = params
    if entries[0].has_own_fit:
        fit_target(entries)


def fit_target(entries: list[Entry]) -> None:
    """Fit the rules' own targets to the weights as they are. A collective under sharding."""
    by_rule: dict[int | None, list[Entry]] = {}
    for entry in entries:
        by_rule.setdefault(entry.claim.rule, []).append(entry)
    for mine in by_rule.values():
        whole = [entry.hidden_whole() for entry in mine]
        for entry, params in zip(mine, _fit_together(mine[0].target, mine, [None] * len(mine), whole), strict=True):
            entry.params = params


def still_fits(entries: list[Entry]) -> bool:
    """Whether a fit to the weights as they are finds the numbers held: written meanwhile, but put back as they were."""
    if all(entry.is_ours for entry in entries):
        return True
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
    """Fit one target to the whole tensors of several entries.

    Raises:
        ValueError: what the target refuses, naming the parameter.
    """
    try:
        with torch.no_grad():
            return target.fit_model(whole, [e.claim.layout for e in entries], previous)
    except ValueError as error:
        finite = [bool(torch.isfinite(w).all()) for w in whole]
        bad = next((e.name for e, good in zip(entries, finite, strict=True) if not good), entries[0].name)
        raise ValueError(f"{bad!r}: {error}") from None


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by canonical name, tied ones under each of their names."""
    return {canonical_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}


def _localised_state(value: Tensor, param: Tensor, name: str) -> Tensor:
    """Saved state for what this process holds of the parameter, whatever sharding it was saved under."""
    full = sharding.whole(value) if hasattr(value, "full_tensor") else value.detach()
    if tuple(full.shape) == tuple(param.shape):
        return sharding.from_whole(full, param, name).clone()
    return full.clone()


def _normalisations(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with running statistics, by canonical name."""
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None
    }


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        (f"{name}.{buffer}" if name else buffer): value
        for name, module in _normalisations(model).items()
        for buffer, value in module.named_buffers(recurse=False)
    }


def install(model: nn.Module, statistics: Statistics) -> None:
    """Make a second set of BatchNorm statistics the model's own."""
    for name, value in _buffers(model).items():
        value.copy_(statistics[name])


@contextmanager
def swapped_buffers(model: nn.Module, statistics: Statistics | None) -> Iterator[None]:
    """Put a second set of BatchNorm statistics in place, if there is one; the first set comes back bitwise at the end.

    Even without a second set: a forward pass in training mode writes into whichever set is there.
    """
    buffers = _buffers(model)
    kept = {name: value.clone() for name, value in buffers.items()}
    try:
        if statistics is not None:
            install(model, statistics)
        yield
    finally:
        for name, value in buffers.items():
            value.copy_(kept[name])


def reestimate(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None) -> Statistics:
    """BatchNorm statistics of the model as it is now, as the plain average over the batches.

    Only modules with running statistics are put in training mode; the model's own statistics and modes come back.

    Raises:
        ValueError: no module with running statistics, or no batches.
    """
    modules = _normalisations(model)
    if not modules:
        raise ValueError("recalibrate: this model has no BatchNorm with running statistics to re-estimate")
    modes = {module: module.training for module in model.modules()}
    momenta = {module: module.momentum for module in modules.values()}
    count = 0
    with swapped_buffers(model, {name: value.clone() for name, value in _buffers(model).items()}):
        try:
            model.eval()
            for module in modules.values():
                module.reset_running_stats()  # type: ignore[operator]
                module.momentum = None  # type: ignore[assignment]
                module.train()
            with torch.no_grad():
                for batch in batches:
                    _call(model, batch, forward)
                    count += 1
            found = {name: value.clone() for name, value in _buffers(model).items()}
        finally:
            for module, momentum in momenta.items():
                module.momentum = momentum
            for module, mode in modes.items():
                module.training = mode
    if not count:
        raise ValueError("recalibrate: the loader gave no batches")
    return found


def _call(model: nn.Module, batch: Any, forward: Callable[[Any], Any] | None) -> None:
    if forward is not None:
        forward(batch)
    elif isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        model(batch[0])
    else:
        raise ValueError(f"recalibrate: cannot feed a {type(batch).__name__} to the model; pass forward=")


def distance_row(name: str, w: Tensor, target: Target, params: Params) -> dict[str, Any]:
    """How far one tensor's two lives are from each other."""
    q = target.project(w, params)
    w64, q64 = w.double(), q.double()
    gap = (w64 - q64).abs()
    cell = target.cell(params)
    energy = float(w64.square().sum())
    ordered = (w64.reshape(-1).sort().values - q64.reshape(-1).sort().values).abs()
    return {
        "name": name,
        "target": target,
        "weights": w.numel(),
        "bits_per_weight": target.bits_on_disk(params) / w.numel(),
        "error": float(gap.square().sum()) / energy if energy else 0.0,
        "wasserstein": float(ordered.mean()),
        "distance": float("nan") if cell is None else float((gap / cell.double()).mean()),
        "zeros": float((q == 0).double().mean()),
    }
