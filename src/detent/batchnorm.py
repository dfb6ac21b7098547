"""A second set of BatchNorm statistics for the compressed life: found, rounded, swapped in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detent.parameters import canonical_name
from detent.undoing import undone

__all__ = [
    "Statistics",
    "feed",
    "install",
    "matched",
    "reestimate",
    "rounded",
    "statistics_of",
    "swapped_buffers",
]


class Statistics(dict[str, Tensor]):
    """BatchNorm statistics by buffer; `source` says where they come from, as a file's card does."""

    source = "re-estimated"


def _normalisations(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with running statistics, by canonical name."""
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None
    }


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's own running statistics, by canonical name of their buffer."""
    return {
        (f"{name}.{buffer}" if name else buffer): value
        for name, module in _normalisations(model).items()
        for buffer, value in module.named_buffers(recurse=False)
    }


def install(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Make a second set of BatchNorm statistics the model's own."""
    for name, value in statistics_of(model).items():
        value.copy_(statistics[name])


@contextmanager
def swapped_buffers(model: nn.Module, statistics: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Put a second set of BatchNorm statistics in place, if there is one; the first set comes back bitwise at the end.

    Even without a second set: a forward pass in training mode writes into whichever set is there.
    """
    buffers = statistics_of(model)
    kept = {name: value.clone() for name, value in buffers.items()}

    def back() -> None:
        for name, value in buffers.items():
            value.copy_(kept[name])

    with undone(back):
        if statistics is not None:
            install(model, statistics)
        yield


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

    def back() -> None:
        for module, momentum in momenta.items():
            module.momentum = momentum
        for module, mode in modes.items():
            module.training = mode

    own = {name: value.clone() for name, value in statistics_of(model).items()}
    with swapped_buffers(model, own), undone(back):
        model.eval()
        for module in modules.values():
            module.reset_running_stats()  # type: ignore[operator]
            module.momentum = None  # type: ignore[assignment]
            module.train()
        with torch.no_grad():
            for batch in batches:
                feed(model, batch, forward, "recalibrate")
                count += 1
        found = {name: value.clone() for name, value in statistics_of(model).items()}
    if not count:
        raise ValueError("recalibrate: the loader gave no batches")
    return Statistics(found)


def feed(model: nn.Module, batch: Any, forward: Callable[[Any], Any] | None, who: str) -> None:
    """Run a model on a batch: inputs, a tuple that starts with them, or a mapping of keyword arguments.

    Raises:
        ValueError: anything else, without `forward`.
    """
    if forward is not None:
        forward(batch)
    elif isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        model(batch[0])
    else:
        raise ValueError(f"{who}: cannot feed a {type(batch).__name__} to the model; pass forward=")


def matched(model: nn.Module, name: str, full: Tensor, now: Tensor, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Running statistics with which a normalisation's outputs keep their mean and spread although its inputs change.

        var' + eps = (var + eps) r^2,  r^2 = (v' + eps) / (v + eps);    mean' = m' + (mean - m) r

    Args:
        model: the model.
        name: canonical name of the running mean.
        full: mean m and variance v of each of its inputs, (2, channels).
        now: the same of what they change to.
        known: the statistics as they are, by name.

    Returns:
        The new mean and variance, by name.
    """
    module, spread = _normalisations(model)[name.rpartition(".")[0]], name.removesuffix("mean") + "var"
    eps, mean, var = float(module.eps), known[name].double(), known[spread].double()  # type: ignore[arg-type]
    (m, v), (m_, v_) = full.to(mean), now.to(mean)
    old = var + eps
    new = (old * (v_ + eps) / (v + eps)).clamp_min(eps)
    moved = m_ + (mean - m) * (new / old).sqrt()
    return {name: moved.to(known[name].dtype), spread: (new - eps).to(known[spread].dtype)}


_SHORT = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def _check_short(name: str, value: Tensor, short: Tensor, most: float, dtype: str) -> None:
    """Refuse what 8 bits would destroy: the range of a 16-bit float is wide enough to say nothing."""
    if not dtype.startswith("float8"):
        return
    if bool((value.abs() > most).any()):
        raise ValueError(
            f"round_statistics({dtype!r}): {name!r} holds {float(value.abs().max()):.4g}, and the largest number of "
            f"{dtype} is {most:g}; take a float of 16 bits"
        )
    # Below its smallest normal number a float has fewer digits, down to none.
    lost = (short - value).abs() > value.abs() * torch.finfo(getattr(torch, dtype)).eps / 2
    if name.endswith("running_var") and bool(lost.any()):
        worst = float(value[lost].min())
        raise ValueError(
            f"round_statistics({dtype!r}): {name!r} holds a variance of {worst:.4g}, which is too small for the digits "
            f"of {dtype}: it would become {float(short[lost].min()):.4g}; take a float of 16 bits"
        )


def rounded(model: nn.Module, old: Statistics | None, dtype: str) -> Statistics:
    """Statistics rounded to a shorter float: old ones, or the model's own if there are none.

    Raises:
        ValueError: another dtype, a model without running statistics, numbers that do not fit into 8 bits, or
            re-estimated ones that are rounded already.
    """
    if dtype not in _SHORT:
        raise ValueError(f"round_statistics({dtype!r}): must be one of {', '.join(map(repr, _SHORT))}")
    if old and "rounded" in old.source:
        if not old.source.startswith("own"):
            raise ValueError(f"round_statistics({dtype!r}): these are rounded already; recalibrate first")
        old = None  # from the model's own again, or the file would not say what they went through
    to = getattr(torch, dtype)
    most, found = torch.finfo(to).max, Statistics(old or statistics_of(model))
    if not found:
        raise ValueError("round_statistics: this model has no BatchNorm with running statistics to round")
    for name, value in found.items():
        if not value.is_floating_point():  # how many batches there were
            found[name] = value.clone()
            continue
        found[name] = value.clamp(-most, most).to(to).to(value.dtype)
        _check_short(name, value, found[name], most, dtype)
    found.source = f"{old.source.partition(',')[0] if old else 'own'}, rounded to {dtype}"
    return found
