"""What a target leaves nothing of: tensors without a weight or with one level, and models that no longer listen."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from detent.ends import called_with, mapped, tensors_of
from detent.specs import short
from detent.targets import Target
from detent.undoing import without_gradients

__all__ = ["Losses", "answers"]

_NAMED = 3  # tensors that a warning names


class Losses:
    """Tensors of a run whose compressed life has one value; each is told once."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        self.found: dict[tuple[str, Target], list[str]] = {}

    def note(self, name: str, w: Tensor, q: Tensor, target: Target) -> None:
        """Look at a tensor and what its target makes of it."""
        if target.is_one_point or name in self.told or w.numel() < 2:
            return
        first = q.reshape(-1)[0]
        if bool((q != first).any()) or not bool((w != w.reshape(-1)[0]).any()):
            return  # a tensor that is constant anyway loses nothing
        self.told.add(name)
        self.found.setdefault(("no weight" if first == 0 else "one level", target), []).append(name)

    def say(self, who: str, stacklevel: int = 3) -> None:
        """Warn of what was found since the last time."""
        for (left, target), names in self.found.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            warnings.warn(
                f"{who}: {short(target)} leaves {left} of {', '.join(map(repr, names[:_NAMED]))}{more}; "
                f"{target.against_collapse}",
                stacklevel=stacklevel + 1,
            )
        self.found = {}


def answers(model: nn.Module, example: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a model, in eval mode, for an example and for another that holds other values."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with without_gradients():
            here = list(tensors_of(called_with(model, example)))
            there = list(tensors_of(called_with(model, mapped(example, _other))))
        return here, there
    finally:
        for module, mode in modes.items():
            module.training = mode


def _other(t: Tensor) -> Tensor:
    """Other values that a model takes as well: those given in another order, and with another sign if they have one."""
    turned = t.flip(-1) if t.dim() else t
    return 1 - 2 * turned if t.is_floating_point() else turned
