"""The stand-in for a target that this process does not have, and whose tensors a file holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from detent.grouping import Layout
from detent.targets.base import Params, Scope, Target
from detent.targets.forms import Form, outline_of

__all__ = ["Held"]


@dataclass(frozen=True, kw_only=True)
class Held(Target):
    """What a file holds, of a target that this process does not know or cannot fit again: one tensor, as it is.

    Files open without the classes that made them. Their weights then lie on such a target: it projects to the tensor of
    the file and to nothing else, so it cannot be fitted, trained towards or changed in width.

    Args:
        spec: the target as the file describes it, a JSON object.

    Example:
        >>> from detent import Uniform
        >>> grid, w = Uniform(bits=2), torch.tensor([1.0, -1.0])
        >>> held = Held(spec='{"kind": "mine:Grid"}')
        >>> held.project(torch.zeros(2), held.restored(w, grid.form(w, grid.fit(w))))
        tensor([ 1., -1.])
    """

    spec: str

    is_exact: ClassVar[bool] = False
    is_one_point: ClassVar[bool] = True

    @property
    def scope(self) -> Scope:
        return "tensor"

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        raise ValueError(f"{self.spec} was read from a file, and this process does not know how to fit it")

    def restored(self, w: Tensor, form: Form) -> Params:
        numbers = torch.tensor(form.outline.numbers)
        return Params(tensors={"": numbers, **form.named}, layout=form.layout)

    def form(self, w: Tensor, params: Params) -> Form:
        numbers, *values = params.tensors.values()
        found = outline_of(tuple(numbers.tolist())).form(values, params.layout, w.dtype)
        return found.to(w.device)

    def typical(self, params: Params) -> Tensor:
        return torch.ones(())
