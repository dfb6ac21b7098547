"""The compressed life of a model: its weights, its own BatchNorm statistics, and how far it is from the full one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detent.recipe import canonical_name
from detent.targets import Codes, Params, Target

__all__ = ["Encoded", "Statistics", "distance_row", "reestimate", "swapped_buffers"]

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


def _normalisations(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with running statistics, by canonical name."""
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None
    }


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{buffer}": value
        for name, module in _normalisations(model).items()
        for buffer, value in module.named_buffers(recurse=False)
    }


@contextmanager
def swapped_buffers(model: nn.Module, statistics: Statistics | None) -> Iterator[None]:
    """Put a second set of BatchNorm statistics in place; the first set comes back bitwise at the end."""
    if statistics is None:
        yield
        return
    buffers = _buffers(model)
    kept = {name: value.clone() for name, value in buffers.items()}
    try:
        for name, value in buffers.items():
            value.copy_(statistics[name])
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
                module.momentum = momentum  # type: ignore[assignment]
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
