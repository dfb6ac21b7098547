"""What the engine must know of torch's optimizers: wrappers, closures, scalers, dummy steps, decay, second copies.

Everything here takes an optimizer and knows nothing of a run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detent import sharding

__all__ = [
    "check_finite_gradients",
    "clip_total_norm",
    "decay_is_decoupled",
    "decoupled_decay",
    "highest_rate",
    "is_nested_step",
    "marked",
    "moments",
    "only_makes_state",
    "outside_graphs",
    "overflowed",
    "peak_of",
    "rate_of",
    "refuse_copies_in_state",
    "refuse_sparse_gradients",
    "refuse_unfollowable",
    "replay_closure",
    "stands_still",
    "take_mark",
    "unmarked",
    "unwrap",
]


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside a wrapper that exposes it as `.optimizer` (accelerate, Lightning)."""
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(f"optimizer={type(optimizer).__name__}: has no param_groups; give a torch.optim.Optimizer")
    return optimizer


def outside_graphs(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.compiler.disable` with a reason where this torch takes one."""
    try:
        return torch.compiler.disable(reason=reason)
    except TypeError:  # torch < 2.7
        return torch.compiler.disable


def replay_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], moved: Callable[[], bool]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Evaluate a closure now, before any weight is touched, and hand the step its value.

    Args:
        args: positional arguments of the step, the optimizer first.
        kwargs: its keyword arguments.
        moved: whether weights or gradients have changed since the closure was evaluated.

    Returns:
        New arguments for the step, or `None` if there is no closure.
    """
    by_name = kwargs.get("closure") is not None
    closure = kwargs["closure"] if by_name else (args[1] if len(args) > 1 else None)
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
                "this optimizer evaluates its closure more than once a step, which Detent cannot follow; use an "
                "optimizer that evaluates it once"
            )
        if moved():
            raise RuntimeError(
                "this optimizer evaluates its closure after it moved weights or gradients (SAM does), which Detent "
                "cannot follow; use an optimizer that evaluates it first"
            )
        return loss

    if by_name:
        return args, {**kwargs, "closure": replay}
    return (*args[:1], replay, *args[2:]), kwargs


def is_nested_step(optimizer: Any) -> bool:
    """Whether this hook runs in a step inside a step: a subclass that calls its base's step runs all hooks twice."""
    code = getattr(type(optimizer).step, "__code__", None)
    frame, found = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code is code and any(value is optimizer for value in frame.f_locals.values()):
            found += 1
        frame = frame.f_back
    return found > 1


def stands_still(group: Mapping[str, Any]) -> bool:
    """Whether a group's learning rate is 0; one that an optimizer finds by itself (`None`, as Adafactor's) is not."""
    rate = group.get("lr")
    return rate is not None and float(rate) == 0.0


def rate_of(group: Mapping[str, Any], name: str) -> float:
    """The learning rate of a group.

    Raises:
        RuntimeError: there is none, naming the parameter.
    """
    rate = group.get("lr")
    if rate is None:
        raise RuntimeError(
            f"{name!r} sits in a group with lr=None, so the optimizer finds its rate by itself, but its mechanism or "
            "its decoupled weight decay needs the number; give lr"
        )
    return float(rate)


def peak_of(group: Mapping[str, Any]) -> float:
    """The highest learning rate that a group speaks of: the one of this step, or one that its scheduler has announced.

    Every scheduler of torch notes the rate that it starts from, and one that warms up by itself the highest one too.
    """
    rates = (group.get(name) for name in ("lr", "initial_lr", "max_lr"))
    return max((float(rate) for rate in rates if rate is not None), default=0.0)


def highest_rate(optimizer: Any) -> float | None:
    """The highest rate of a step over all groups, some of which may stand still; `None` if it finds them by itself."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return max((float(rate) for rate in rates if rate is not None), default=None)


# A group of a saved state says how many steps Detent had done: the one place where a plain optimizer keeps it.
_MARK = "detent_steps"


def marked(state_dict: dict[str, Any], steps: int) -> dict[str, Any]:
    """A state dict that tells whoever attaches after loading it that Detent's part has passed unseen."""
    groups = state_dict.get("param_groups")
    if not steps or not groups:
        return state_dict
    return {**state_dict, "param_groups": [{**groups[0], _MARK: steps}, *groups[1:]]}


def unmarked(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict without that."""
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return state_dict  # torch says what is wrong with it
    plain = [{key: value for key, value in group.items() if key != _MARK} for group in groups]
    return {**state_dict, "param_groups": plain}


def cast_state(optimizer: Any, param: Tensor, dtype: torch.dtype) -> None:
    """Bring an optimizer's state of a parameter to a dtype, as torch does on loading: all floats but the step count."""
    own: dict[str, Any] = optimizer.state.get(param, {})
    for key, value in own.items():
        if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
            own[key] = value.to(dtype)


def load_wide(optimizer: Any, state_dict: Mapping[str, Any], params: Sequence[Tensor]) -> list[Tensor]:
    """Take a saved state of half-precision parameters as it was saved, where torch has just rounded it to their dtype.

    Returns:
        The parameters of which a wider state was saved.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    own = [param for group in optimizer.param_groups for param in group["params"]]
    saved = {id(param): state_dict["state"].get(key, {}) for key, param in zip(keys, own, strict=True)}
    found = []
    for param in params:
        for name, value in saved.get(id(param), {}).items():
            floats = isinstance(value, Tensor) and value.is_floating_point() and name != "step"
            if floats and value.element_size() > param.element_size():
                optimizer.state[param][name] = value.to(param.device, copy=True)
                found.append(param)
    return found


def take_mark(optimizer: Any) -> int:
    """How many steps Detent had done in a state that was loaded before attach; asked once."""
    return max([int(group.pop(_MARK, 0)) for group in optimizer.param_groups], default=0)


def only_makes_state(optimizer: Any, claimed: Sequence[Tensor], *, fresh: bool) -> bool:
    """Whether the step that is due is none of training: checkpoint code makes it to have an optimizer's state created.

    Such a step comes to an optimizer that has no state yet, with gradients that are all 0, at rate 0 or before the
    first step of training. Every process that shares a sharded parameter gives the same answer. A step at rate 0 with
    gradients (a warm-up) is one of training: time passes, and momentum takes them in.

    Args:
        optimizer: the optimizer.
        claimed: its claimed parameters.
        fresh: it has made no step yet. Later a step with no gradient is one: weight decay moves the weights in it.
    """
    groups = optimizer.param_groups
    if getattr(optimizer, "state", True) or not (fresh or all(map(stands_still, groups))):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return not sharding.anywhere(any(bool(_values(grad).any()) for grad in grads), claimed)


def overflowed(optimizer: Any) -> bool:
    """Whether this is a fused step under a GradScaler that found an overflow: the optimizer skips it inside."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _values(grad: Tensor) -> Tensor:
    grad = sharding.local(grad)
    return grad if grad.layout == torch.strided else grad.coalesce().values()


def refuse_sparse_gradients(named: Mapping[str, Tensor]) -> None:
    """Refuse gradients that no mechanism can scale.

    Raises:
        RuntimeError: naming the parameter.
    """
    for name, grad in named.items():
        if grad.layout != torch.strided:
            raise RuntimeError(f"{name!r} has a sparse gradient, which no mechanism can scale; use sparse=False")


def check_finite_gradients(
    named: Mapping[str, Tensor], claimed: Sequence[Tensor], step: int, model: nn.Module | None = None
) -> None:
    """Raise before the step if a gradient is NaN or infinite; one reduction if all is well.

    Args:
        named: gradients by name.
        claimed: the parameters they are of.
        step: for the error.
        model: whose weights are looked at only when a gradient is bad: one that is NaN already is the cause.

    Raises:
        RuntimeError: on every process, naming the parameter on those that hold the bad entries.
    """
    grads = {name: sharding.local(grad) for name, grad in named.items()}
    bad: list[str] = []
    if grads:
        norms = torch._foreach_norm(list(grads.values()))
        # A norm may overflow where no entry is bad, so only the entries decide.
        if not bool(torch.isfinite(torch.stack([norm.float().to(norms[0].device) for norm in norms]).sum())):
            bad = [name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())]
    if sharding.anywhere(bool(bad), claimed):
        what = f"the gradient of {bad[0]!r}" if bad else "a gradient held by another process"
        held = {} if model is None else {n: sharding.local(p) for n, p in model.named_parameters()}
        lost = next((name for name, p in held.items() if not bool(torch.isfinite(p).all())), None)
        why = "" if lost is None else f"; {lost!r} itself holds NaN or infinite values, from an earlier step"
        raise RuntimeError(f"{what} is not finite at step {step}; no weight was changed by this step{why}")


def clip_total_norm(optimizer: Any, limit: float) -> None:
    """Clip the total norm of all gradients of an optimizer; in a fused step under GradScaler they are still scaled."""
    scale = getattr(optimizer, "grad_scale", None)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(params, limit * (1.0 if scale is None else float(scale)))


def refuse_unfollowable(optimizer: Any) -> None:
    """Refuse what no hook around one step can follow: several evaluations a step, weights that are not the model's.

    Raises:
        ValueError: LBFGS, or an optimizer with train() and eval() modes (schedule-free).
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"{name} evaluates its closure more than once a step, which Detent cannot follow")
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"{name} keeps a second copy of the weights (it has train() and eval() modes), so the weights Detent sees "
            "are not the ones it moves; not supported yet"
        )


def refuse_copies_in_state(optimizer: Any, named: Iterable[tuple[str, Tensor, Tensor, Mapping[str, Any]]]) -> None:
    """After the first step, look for a master copy: state that equals the weight itself, and that steps start from.

    Args:
        optimizer: the optimizer.
        named: name, parameter, what the step moved (it, or the latent in its place), and its group.

    Raises:
        RuntimeError: naming the parameter and the key of its copy.
    """
    for name, param, moved, group in named:
        own = getattr(optimizer, "state", {}).get(param, {})
        w = sharding.local(moved)
        for key, value in own.items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point():
                same = sharding.local(value).to(w.dtype)
                alike = same.data_ptr() != w.data_ptr() and bool(w.any()) and torch.equal(same, w)
                if alike and not _starts_from_the_weight(optimizer, group, param.dim()):
                    raise RuntimeError(
                        f"{type(optimizer).__name__} keeps a second copy of {name!r} in its state "
                        f"({key!r}), so the weights Detent sees are not the ones it moves; not supported yet"
                    )


def _starts_from_the_weight(optimizer: Any, group: Mapping[str, Any], dims: int) -> bool:
    """Whether a step starts from the weight as it is (ASGD, whose state is an average of it), found by trying.

    A weight that was moved between two steps without a gradient stays moved, unless a copy of it is written back.
    """
    scratch = nn.Parameter(torch.ones((2,) * max(dims, 1), dtype=torch.float64))
    scratch.grad = torch.zeros_like(scratch)
    try:
        probe = _scratch_optimizer(optimizer, group, scratch, rate=1e-3, decay=0.0)
        probe.step()
        with torch.no_grad():
            scratch.add_(1.0)
        probe.step()
    except Exception:
        return False  # what cannot be tried is taken for what it looks like
    return bool((scratch.detach() > 1.5).all())


def _scratch_optimizer(
    optimizer: Any, options: Mapping[str, Any], scratch: nn.Parameter, rate: float, decay: float
) -> Any:
    """A fresh optimizer of the same class and options on a weight of our own."""
    left_out = ("params", "fused", "foreach", "capturable", "initial_lr")
    kept = {k: v for k, v in options.items() if k not in left_out}
    kept |= {"lr": rate, **({"weight_decay": decay} if "weight_decay" in kept else {})}
    return type(optimizer)([{**kept, "params": [scratch]}], lr=rate)


def moments(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """What an optimizer remembers of every weight of a parameter by itself (momentum, squares), as held here."""
    state: dict[str, Any] = optimizer.state.get(param, {})
    return {
        name: sharding.local(value)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == param.shape
    }


def decoupled_decay(optimizer: Any, options: Mapping[str, Any], name: str, dims: int, probed: dict[Any, bool]) -> float:
    """What decoupled weight decay takes off in this step, as a fraction of the weight.

    Args:
        optimizer: the optimizer.
        options: the weight's parameter group.
        name: the weight's name.
        dims: dimensions of the weight.
        probed: what was found out before, by dimensions and options.

    Raises:
        RuntimeError: as `decay_is_decoupled`, and as `rate_of`.
    """
    decay = float(options.get("weight_decay", 0.0) or 0.0)
    if not decay:
        return 0.0
    decoupled = options.get("decoupled_weight_decay")
    if decoupled is None:
        kind = (dims, _kind_of(options))
        if kind not in probed:
            probed[kind] = decay_is_decoupled(optimizer, options, dims)
        decoupled = probed[kind]
    return rate_of(options, name) * decay if decoupled else 0.0


def _kind_of(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The options that may change the form of a step; of numbers only whether they are 0, as schedules move them."""

    def kind(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(kind, value))
        return value if isinstance(value, (bool, str)) else bool(value)

    left_out = ("params", "param_names", "lr", "initial_lr", "weight_decay")
    known = (bool, int, float, str, tuple, list, Tensor, type(None))
    named = {k: v for k, v in options.items() if k not in left_out and isinstance(v, known)}
    return tuple(sorted((k, kind(v)) for k, v in named.items() if not isinstance(v, Tensor) or v.numel() == 1))


def decay_is_decoupled(optimizer: Any, group: Mapping[str, Any], dims: int) -> bool:
    """Whether weight decay acts on the weight itself (AdamW) or through the gradient (Adam), found by trying.

    Two steps of a fresh optimizer of the same class on a scratch weight with zero gradients: decoupled decay leaves
    exactly `(1 - lr * decay)^2 w`, decay through the gradient is remembered or normalised.

    Raises:
        RuntimeError: no such optimizer can be built, or its decay is proportional to w but not lr * decay.
    """
    rate = decay = 0.1  # not the group's: either may be zero just now, or too small to tell
    shape = (2,) * max(dims, 1)
    start = torch.arange(1.0, 2 ** len(shape) + 1, dtype=torch.float64).reshape(shape)
    scratch = nn.Parameter(start.clone())
    scratch.grad = torch.zeros_like(scratch)
    advice = "put a key decoupled_weight_decay=True or False in its param_groups, or use PSG(form='gradient')"
    name = type(optimizer).__name__
    try:
        probe = _scratch_optimizer(optimizer, group, scratch, rate, decay)
        probe.step()
        first = scratch.detach() / start
        probe.step()
        second = scratch.detach() / start
    except Exception as error:
        raise RuntimeError(f"cannot tell if the weight decay of {name} is decoupled ({error}); {advice}") from error
    factor = 1.0 - rate * decay
    if torch.allclose(first, torch.full_like(first, factor)) and torch.allclose(second, first * factor):
        return True
    if torch.allclose(first, first.flatten()[0].expand_as(first)) and torch.allclose(second, first.square()):
        raise RuntimeError(f"the weight decay of {name} takes off another part than lr * weight_decay; {advice}")
    return False
