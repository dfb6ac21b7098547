"""Rounding of activations at work: hooks on the modules, the numbers of each, and how they move with training."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from detent import sharding
from detent.activations import Activation, Input, modules_of
from detent.mechanisms import Clock
from detent.quantizers import Integers, Quantizer, Seen, from_row, rounded, row_of
from detent.schedules import step_at
from detent.specs import short
from detent.undoing import undone, without_gradients

__all__ = ["Place", "Roundings", "install", "rounding", "stored", "take_off"]

_BETAS = (0.9, 0.999)  # of Adam, which moves the logarithms of learned scales
_MEMORY = ("mean", "square", "moves")
_MARK = "_detent_rounding"  # what a model that holds a file's roundings knows them by


@dataclass(eq=False, kw_only=True)
class Place:
    """The input of one module: a forward pre-hook, and the numbers that it rounds with.

    Attributes:
        name: of the module.
        quantizer: how it rounds.
        training: whether it rounds in training too.
        to: the grid; `None` until inputs have been seen.
        log_scale: receives the gradient of the logarithm of a learned scale.
        memory: running means of that gradient, and how many it has seen.
        seen: the inputs that were watched since.
        shown: whether the compressed life is shown.
        watches: whether to look at inputs; `None`: in training.
        ran: whether it was called with something that can be rounded.
        frozen: whether its range stays as it is from here on, so that nothing is gained by watching.
        idle: whether that was nothing but zeros in the last step of training, which stay zeros.
        owner: a weak reference to the roundings it belongs to; `None` if it rounds for good.
        beside: the parameters of the module, whose gradients are cleared when training is to forget them.
    """

    name: str
    quantizer: Quantizer
    training: bool = True
    to: Integers | None = None
    log_scale: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    shown: bool = False
    watches: bool | None = None
    ran: bool = False
    frozen: bool = False
    idle: bool = False
    owner: Any = None
    beside: tuple[Tensor, ...] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for i, x in enumerate(args):
            if _is_input(x):
                return (*args[:i], self.rounded(x), *args[i + 1 :]), kwargs
        for key, x in kwargs.items():
            if _is_input(x):
                return args, {**kwargs, key: self.rounded(x)}
        return None

    def __deepcopy__(self, memo: Any) -> Place:
        return self  # of a copy of the model, as an average: its numbers are these

    def __getstate__(self) -> dict[str, Any]:
        """Of a pickled model, which rounds as this one does now and learns no more."""
        owner = None if self.owner is None else _nobody
        left = {"seen": Seen(), "log_scale": None, "memory": {}, "watches": False, "owner": owner, "beside": ()}
        return {**self.__dict__, **left}

    @property
    def is_ready(self) -> bool:
        """Whether it has all that it needs to round."""
        return self.to is not None or not self.quantizer.begins

    def rounded(self, x: Tensor) -> Tensor:
        """What the module gets."""
        self.ran = True
        if torch.compiler.is_exporting():
            return _exported(x, self) if self.is_ready and (self.shown or self.training) else x
        watches = torch.is_grad_enabled() and not self.shown if self.watches is None else self.watches
        if watches and self.quantizer.begins and (self.to is None or (self.quantizer.watches and not self.frozen)):
            self.seen.add(x, sample=self.to is None)
        if not self.is_ready or not (self.shown or self.training) or self.watches:
            return x
        if not self.shown:
            self._forget_stale()
        return self.quantizer.view(x, self.to, None if self.shown else self.log_scale)

    def _forget_stale(self) -> None:
        """Clear the gradient of the scale where that of the layer is cleared: no `zero_grad` reaches it.

        Else a backward pass without a step would move it later, as that of a generator through its discriminator.
        """
        scale = self.log_scale
        if scale is None or scale.grad is None or not self.beside:
            return
        if all(p.grad is None or not bool(sharding.local(p.grad).any()) for p in self.beside):
            scale.grad = None

    def begin(self, to: Integers) -> None:
        """Round to a grid from here on."""
        log_scale = to.scale.log() if self.quantizer.learns != "no" else None
        self._set(to, log_scale, {})

    def _set(self, to: Integers, log_scale: Tensor | None, memory: dict[str, Tensor]) -> None:
        if log_scale is not None:
            log_scale = log_scale.detach().clone()
            to = replace(to, scale=log_scale.exp())
            log_scale.requires_grad_()
        # At once, so that whatever breaks in leaves the old numbers or the new ones.
        self.to, self.log_scale, self.memory, self.seen = to, log_scale, memory, Seen()

    def move(self, log_scale: Tensor, memory: dict[str, Tensor]) -> None:
        """Learn: another scale, and the running means that it came from."""
        assert self.to is not None
        self._set(self.to, log_scale, memory)

    def numbers(self) -> dict[str, Any]:
        """What a resumed training needs; of the same structure at any time, as distributed checkpoints want it."""
        held, low, high = torch.zeros(()), 0, 0
        if self.to is not None:
            held = self.to.scale if self.log_scale is None else self.log_scale.detach()
            low, high = self.to.low, self.to.high
        memory = {name: self.memory.get(name, torch.zeros(())).clone() for name in _MEMORY}
        return {"begun": self.to is not None, "scale": held.clone(), "low": low, "high": high, "memory": memory}

    def restore(self, numbers: Mapping[str, Any]) -> None:
        """Go on with what `numbers` gave."""
        self.frozen = False  # the clock of the next step says
        if not numbers["begun"]:
            self.to, self.log_scale, self.memory, self.seen = None, None, {}, Seen()
            return
        held = numbers["scale"].detach().clone()
        to = Integers(scale=held, low=int(numbers["low"]), high=int(numbers["high"]))
        learned = self.quantizer.learns != "no"
        memory = {name: numbers["memory"][name].detach().clone() for name in _MEMORY} if learned else {}
        self._set(to, held if learned else None, memory)


def _nobody() -> None:
    """The owner of what a run that is over left behind, as a weak reference would give it."""


def _is_input(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _exported(x: Tensor, place: Place) -> Tensor:
    """The operators of ONNX that round, for its exporter."""
    to = place.to
    if to is None:
        return place.quantizer.view(x.detach(), None, None)
    if to.high - to.low > 255:
        return rounded(x, to)
    zero = torch.tensor(-to.low, dtype=torch.uint8)
    scale = to.scale.detach().cpu()
    if to.high - to.low < 255:
        x = torch.clamp(x, min=scale * to.low, max=scale * to.high)  # one more rounding would not change what follows
    symbolic: Any = torch.onnx.ops.symbolic
    q = symbolic("QuantizeLinear", (x, scale, zero), dtype=torch.uint8, shape=x.shape, version=21)
    return symbolic("DequantizeLinear", (q, scale, zero), dtype=x.dtype, shape=x.shape, version=21)


class Roundings:
    """All roundings of a run: in training its numbers move after every step of the first optimizer.

    Args:
        model: the model whose modules get hooks.
        entries: of the recipe.
        inputs: of the plan.
        trained: whether the model is in training, so that inputs are watched, and rounded unless an entry says no.

    Raises:
        ValueError: another run rounds the same inputs in training.
    """

    def __init__(
        self, model: nn.Module, entries: Sequence[Activation], inputs: Sequence[Input], *, trained: bool
    ) -> None:
        self.places: dict[str, Place] = {}
        for each in inputs:
            entry = entries[each.entry]
            assert entry.quantizer is not None
            place = Place(name=each.name, quantizer=entry.quantizer, training=entry.training and trained)
            place.watches, place.owner = None if trained else False, weakref.ref(self)
            self.places[each.name] = place
        self._handles: list[Any] = []
        self._top = 0.0
        self._trained = trained
        self._over = False  # whether only the compressed life rounds any more
        self._lent = False  # whether the hooks are those of another
        self.hook(model)

    def __bool__(self) -> bool:
        return bool(self.places)

    @property
    def _unready(self) -> list[str]:
        """Modules whose inputs wait to be seen; once training has begun, not those that the model never calls."""
        begun = any(place.to is not None for place in self.places.values())
        waiting = {n: place for n, place in self.places.items() if not place.is_ready and not place.idle}
        return [n for n, place in waiting.items() if place.ran or not begun]

    @property
    def is_ready(self) -> bool:
        """Whether the compressed life can be shown."""
        return not self._unready

    def hook(self, model: nn.Module) -> None:
        """Round what goes into the modules of this model."""
        self.unhook()
        modules = modules_of(model) if self.places else {}  # a walk through the model, for nothing in most runs
        for name in self.places:
            _refuse_rounded(modules[name], name)
        for name, place in self.places.items():
            place.beside = tuple(modules[name].parameters())
            self._handles.append(modules[name].register_forward_pre_hook(place, with_kwargs=True))

    def end(self) -> None:
        """Training is over: only the compressed life of this run rounds from here on."""
        if not self._lent:
            self._over = True
            self.unhook()
            for place in self.places.values():
                place.owner, place.watches = _nobody, False

    def shared(self) -> Roundings:
        """The same, for another run over the same modules, which ends nothing."""
        twin = copy.copy(self)
        twin._handles, twin._lent = [], True
        return twin

    def fix(self, model: nn.Module) -> None:
        """Round what goes into the modules for good: the compressed life is the model's own now."""
        self.unhook()
        self._over = False
        modules = modules_of(model)
        for name, place in self.places.items():
            fix(modules[name], replace(place))

    def unhook(self) -> None:
        """Let the modules be what they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --- training -------------------------------------------------------------------------------------------------

    def land(self, clock: Clock, rate: float | None) -> None:
        """Move the numbers after a step of training.

        Args:
            clock: of the step.
            rate: the optimizer's rate; `None` if it finds it by itself.
        """
        self._top = max(self._top, rate or 0.0)
        share = 1.0 if rate is None else rate / self._top if self._top > 0 else 0.0
        with without_gradients():
            # What each process exchanges depends on the state, which is the same on all, and never on what it has seen.
            waiting = [place for place in self.places.values() if place.quantizer.begins and place.to is None]
            found = list(zip(waiting, _agreed([place.seen for place in waiting]), strict=True))
            begins = {place.name: seen for place, seen in found if seen.batches and not seen.is_nothing}
            for place, seen in found:
                if place.name in begins:
                    place.begin(_started(place, seen))
                else:  # a grid of zeros would let nothing through ever again
                    place.idle, place.seen = place.idle if not seen.batches else True, Seen()
            if begins:
                self._name_unseen()
            self._learn(share)
            self._follow(clock)

    def _name_unseen(self) -> None:
        silent = [name for name, place in self.places.items() if not place.ran]
        if silent:
            warnings.warn(
                f"the inputs of {', '.join(map(repr, silent))} are not rounded: the model computes without calling "
                "these modules (torch's attention reads the weight of its output projection)",
                stacklevel=2,
            )
        still = [n for n, place in self.places.items() if place.ran and not place.is_ready and not place.idle]
        if still:
            warnings.warn(
                f"the inputs of {', '.join(map(repr, still))} are not rounded: these modules were called without "
                "gradients alone, as in validation; if that is how they are trained, show them some inputs with "
                "run.observe(batches)",
                stacklevel=2,
            )

    def _learn(self, share: float) -> None:
        mine = [place for place in self.places.values() if place.log_scale is not None]
        if not mine or (_ranks() == 1 and all(p.log_scale.grad is None for p in mine)):  # type: ignore[union-attr]
            return
        device = mine[0].log_scale.device  # type: ignore[union-attr]
        zero = torch.zeros((), device=device)

        def stacked(values: Sequence[Tensor]) -> Tensor:
            return torch.stack([value.detach().reshape(()).to(device) for value in values])

        told = [None if p.log_scale is None else p.log_scale.grad for p in mine]
        grads, came = _averaged(stacked([zero if t is None else t for t in told]), [t is not None for t in told])
        mean, square, moves = (stacked([p.memory.get(name, zero) for p in mine]) for name in _MEMORY)
        fine = torch.isfinite(grads)  # an overflow of mixed precision moves nothing
        grads = torch.where(fine, grads, 0.0)
        mean = torch.where(fine, mean.lerp(grads, 1 - _BETAS[0]), mean)
        square = torch.where(fine, square.lerp(grads.square(), 1 - _BETAS[1]), square)
        moves = moves + fine
        size = (square / (1 - _BETAS[1] ** moves.clamp_min(1))).sqrt()
        rates = torch.tensor([share * p.quantizer.pace for p in mine], device=device)
        change = torch.where((size > 0) & fine, rates * mean / (1 - _BETAS[0] ** moves.clamp_min(1)) / size, 0.0)
        logs = stacked([p.log_scale for p in mine]) - change  # type: ignore[misc]
        for i in (i for i, some in enumerate(came) if some):
            place = mine[i]
            memory = {"mean": mean[i], "square": square[i], "moves": moves[i]}
            place.move(logs[i].to(place.log_scale.device), memory)  # type: ignore[union-attr]

    def _follow(self, clock: Clock) -> None:
        for place in self.places.values():
            place.frozen = self._is_frozen(place, clock)
            if place.frozen and place.to is not None:
                place.seen = Seen()
        mine = [p for p in self.places.values() if p.quantizer.watches and p.to is not None and not p.frozen]
        for place, seen in zip(mine, _agreed([place.seen for place in mine]), strict=True):
            assert place.to is not None
            if seen.batches:
                place.to, place.seen = replace(place.to, scale=place.quantizer.follow(place.to, seen)), Seen()

    def drop(self) -> None:
        """Forget what a step that did not happen left."""
        for place in self.places.values():
            place.seen = Seen()
            if place.log_scale is not None:
                place.log_scale.grad = None

    def forget(self, clock: Clock) -> None:
        """Begin anew, as the weights are others, with all that is not frozen yet."""
        for place in self.places.values():
            if not self._is_frozen(place, clock):
                place.restore({"begun": False})
                place.ran = False

    def _is_frozen(self, place: Place, clock: Clock) -> bool:
        until = place.quantizer.until
        return until is not None and clock.step >= step_at(until, clock.total_steps, "freeze")

    def check_moments(self, total_steps: int | None) -> None:
        """Refuse moments that cannot be resolved.

        Raises:
            ValueError: a share of a training whose length is not known.
        """
        for place in self.places.values():
            if place.quantizer.until is not None:
                step_at(place.quantizer.until, total_steps, f"{type(place.quantizer).__name__}.freeze")

    # --- lives ----------------------------------------------------------------------------------------------------

    def refuse_unready(self, who: str) -> None:
        """Refuse to round where no input was seen yet.

        Raises:
            ValueError: naming the first module.
        """
        for name in self._unready[:1]:
            raise ValueError(
                f"{who}: what goes into {name!r} has not been seen yet, so nothing says how to round it; train a step "
                "(with gradients), or show some inputs with run.observe(batches)"
            )

    @contextmanager
    def _hooked(self, model: nn.Module) -> Iterator[None]:
        """With hooks on the modules, also of a run that is over."""
        if not self._over:
            yield
            return
        with undone(self.unhook):
            self.hook(model)
            yield

    @contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """Round as the compressed life of a model does, and watch nothing."""
        before = [(place, place.shown) for place in self.places.values()]

        def back() -> None:
            for place, was in before:
                place.shown = was

        with self._hooked(model), undone(back):
            for place, _ in before:
                place.shown = True
            yield

    @contextmanager
    def _watching(self, how: bool) -> Iterator[None]:
        def back() -> None:
            for place in self.places.values():
                place.watches = None if self._trained and not self._over else False

        with undone(back):
            for place in self.places.values():
                place.watches = how
            yield

    def observe(self, model: nn.Module, passes: Callable[[], object], who: str) -> None:
        """Find every grid anew from what passes through the model; in training those that are missing, if any are.

        Args:
            model: the model.
            passes: runs it over the inputs.
            who: asks, for errors.

        Raises:
            ValueError: an input that nothing reached, or that is not finite; grids of a training, asked elsewhere.
        """
        if self._lent:
            raise ValueError(f"{who}: these ranges belong to the training; ask the run that trains")
        held = [(place, place.to, place.log_scale, place.seen) for place in self.places.values()]
        every = [place for place in self.places.values() if place.quantizer.begins]
        missing = [place for place in every if place.to is None and place.name in self._unready]
        mine = missing if self._trained and missing else every  # what others have learned stays

        def back() -> None:
            for place, to, log_scale, seen in held:
                place.to, place.log_scale, place.seen = to, log_scale, seen

        try:
            for place in mine:
                place.to, place.seen, place.ran = None, Seen(), False
            with self._hooked(model), self._watching(True):
                passes()
            for place in mine:
                if not place.seen.batches:
                    keep = f"dt.Activation(match={'^' + place.name + '$'!r}, keep=True)"
                    raise ValueError(
                        f"{who}: nothing went into {place.name!r}, so its inputs cannot be rounded; put {keep} first"
                    )
            with without_gradients():
                for place, seen in zip(mine, _agreed([place.seen for place in mine]), strict=True):
                    place.begin(_started(place, seen))
        except BaseException:
            with undone(back):
                raise

    # --- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a resumed training needs, by module."""
        return {"top": self._top, "places": {name: place.numbers() for name, place in self.places.items()}}

    def check(self, state: Any) -> None:
        """Refuse a state of other activations.

        Raises:
            ValueError: saying which.
        """
        known = set(state["places"]) if isinstance(state, Mapping) else set()
        for odd in sorted(known ^ set(self.places))[:1]:
            raise ValueError(
                f"Detent state and recipe disagree: the rounding of what goes into {odd!r} is in only one of them"
            )
        for name, numbers in state["places"].items() if self.places else ():
            if not _is_state(numbers):
                raise ValueError(f"Detent state: the rounding of what goes into {name!r} is not what state_dict() gave")

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `check` let pass."""
        if self.places:
            self._top = float(state["top"])
            for name, place in self.places.items():
                place.restore(state["places"][name])

    def like(self, other: Roundings) -> None:
        """Take over the numbers of another run over the same modules."""
        self.load(other.state())


def _is_state(numbers: Any) -> bool:
    if not isinstance(numbers, Mapping) or set(numbers) != {"begun", "scale", "low", "high", "memory"}:
        return False
    memory = numbers["memory"]
    if not isinstance(memory, Mapping) or set(memory) != set(_MEMORY):
        return False
    tensors = [numbers["scale"], *memory.values()]
    return all(isinstance(x, Tensor) and x.numel() == 1 and x.is_floating_point() for x in tensors)


def _started(place: Place, seen: Seen) -> Integers:
    if not seen.is_finite:
        raise ValueError(f"what goes into {place.name!r} is not finite")
    return place.quantizer.start(seen)


def _ranks() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _averaged(values: Tensor, came: Sequence[bool]) -> tuple[Tensor, Sequence[bool]]:
    """The mean over all processes, and what came on any of them."""
    if _ranks() == 1:
        return values, came
    both = torch.stack([values, values.new_tensor(came)])
    given = both.cuda() if torch.distributed.get_backend() == "nccl" else both.cpu()
    torch.distributed.all_reduce(given)
    return given[0].to(values.device) / _ranks(), (given[1] > 0).tolist()


def _agreed(seen: Sequence[Seen]) -> list[Seen]:
    """What all processes together have seen; the same on each."""
    if _ranks() == 1 or not seen:
        return list(seen)
    told = [(s.batches, s.low.cpu(), s.high.cpu(), s.mean.cpu(), [part.cpu() for part in s.parts]) for s in seen]
    everywhere: list[Any] = [None] * _ranks()
    torch.distributed.all_gather_object(everywhere, told)
    found = []
    for mine, parts in zip(seen, zip(*everywhere, strict=True), strict=True):
        parts = [part for part in parts if part[0]]  # of the processes on which the module was called
        if not parts:
            found.append(mine)
            continue
        batches, lows, highs, means, samples = zip(*parts, strict=True)
        device = mine.low.device
        ends = torch.stack(lows).amin().to(device), torch.stack(highs).amax().to(device)
        mean, values = torch.stack(means).mean().to(device), [x.to(device) for sample in samples for x in sample]
        found.append(Seen(batches=max(batches), low=ends[0], high=ends[1], mean=mean, parts=values))
    return found


def rounding(model: nn.Module) -> bool:
    """Whether a model rounds what goes into its modules, be it only in a compressed life."""
    return any(isinstance(hook, Place) for module in model.modules() for hook in module._forward_pre_hooks.values())


def take_off(model: nn.Module, of: Roundings | None = None) -> dict[str, Place]:
    """Take away the hooks that round, as from a copy of a run's model, which took them along; gives them by module.

    Args:
        model: the model.
        of: those of this run alone.
    """
    mine = None if of is None else {id(place) for place in of.places.values()}
    found = {}
    for name, module in modules_of(model).items():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Place) and (mine is None or id(hook) in mine):
                found[name] = hook
                _remove(module, key)
    return found


def _remove(module: nn.Module, key: int) -> None:
    """Take away a hook whose handle is not at hand."""
    del module._forward_pre_hooks[key]
    module._forward_pre_hooks_with_kwargs.pop(key, None)


# --- files ----------------------------------------------------------------------------------------------------------


def stored(places: Mapping[str, Place]) -> list[dict[str, Any]]:
    """Roundings as plain data, for a file."""
    ready = {name: place for name, place in places.items() if place.is_ready}
    return [row_of(name, place.quantizer, place.to, short(place.quantizer)) for name, place in ready.items()]


def _refuse_rounded(module: nn.Module, name: str) -> None:
    """Refuse to round twice, and clear away what a run left that nobody has any more."""
    if getattr(module, _MARK, None) is not None:
        raise ValueError(
            f"what goes into {name!r} is rounded already, by a loaded file or a run that is over; make the model anew"
        )
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, Place) and hook.owner is not None:
            if hook.owner() is None:
                _remove(module, key)
            elif hook.training:
                raise ValueError(
                    f"what goes into {name!r} is rounded by another run in training; detach that one first"
                )


def install(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> None:
    """Round what goes into these modules of a model for good, as a file says, and into no others.

    Args:
        model: the model.
        rows: what `stored` gave, for modules that it has.
    """
    modules = modules_of(model)
    for held in (getattr(module, _MARK, None) for module in modules.values()):
        if held is not None:
            held[1].remove()
    for module in modules.values():
        module.__dict__.pop(_MARK, None)
    for row in rows:
        name, quantizer, to = from_row(row)
        fix(modules[name], Place(name=name, quantizer=quantizer, to=to))


def fix(module: nn.Module, place: Place) -> None:
    """Round what goes into a module from here on, in every life."""
    place.shown, place.log_scale, place.watches, place.owner = True, None, False, None
    handle = module.register_forward_pre_hook(place, with_kwargs=True)
    object.__setattr__(module, _MARK, (place, handle))
