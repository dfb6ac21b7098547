"""The target whose values are the numbers of a shorter float: 16 bits for biases and normalisation weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.grouping import Layout, PerTensor
from detent.targets.base import Params, Scope, Target, check_finite
from detent.targets.forms import Floats

__all__ = ["Round"]

_STORE = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Round(Target):
    """Numbers of a 16-bit float: `project(w)` is the nearest one, of two equally near the even one.

    For what is small and sensitive: biases, normalisation weights, a last layer. Name them in `include=`, since rules
    pass over them. A file then holds 16 bits a weight, and decodes to exactly the weights that were measured. Weights
    beyond the largest number of the format go to that.

    Args:
        dtype: "float16" (11 bits of precision, up to 65504) or "bfloat16" (8 bits, the range of float32).

    Raises:
        ValueError: another dtype.

    Example:
        >>> w = torch.tensor([1.0, 0.1, -3.14159])
        >>> halves = Round()
        >>> halves.project(w, halves.fit(w))
        tensor([ 1.0000,  0.1000, -3.1406])
        >>> halves.form(w, halves.fit(w)).nbytes
        6
    """

    dtype: Literal["float16", "bfloat16"] = "float16"

    is_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in _STORE:
            raise ValueError(f"Round(dtype={self.dtype!r}): must be one of {sorted(_STORE)}")
        super().__post_init__()

    @property
    def scope(self) -> Scope:
        return "element"

    def _most(self, dtype: torch.dtype) -> float:
        """The largest number that the format and the weights' dtype share."""
        store = _STORE[self.dtype]
        if {store, dtype} == {torch.float16, torch.bfloat16}:
            return 65280.0
        return min(torch.finfo(store).max, torch.finfo(dtype).max)

    def _short(self, w: Tensor) -> Tensor:
        most = self._most(w.dtype)
        x = w.detach().clamp(-most, most)
        if x.dtype == torch.float64:
            x = _halfway(x)
        return x.to(_STORE[self.dtype]).add_(0.0)

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        check_finite(w)
        params = Params(tensors={"most": torch.tensor(self._most(w.dtype), dtype=torch.float64)}, layout=layout)
        mean = (self.project(w, params).double() - w.detach().double()).abs().mean()
        smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        mean = torch.where(mean > 0, mean.clamp(smallest, largest), 1.0).float()
        moved = {"mean": mean, "most": params["most"].to(w.device)}
        return Params(tensors=moved, layout=layout)

    def project(self, w: Tensor, params: Params) -> Tensor:
        return self._short(w).to(w.dtype)

    def lined(self, params: Params) -> Params | None:
        return params.lined(PerTensor())

    def form(self, w: Tensor, params: Params) -> Floats:
        return Floats(layout=params.layout, dtype=w.dtype, value=self._short(w))

    def typical(self, params: Params) -> Tensor:
        """The mean distance; 1 if there is none (any positive number)."""
        return params["mean"]

    def limits(self, params: Params) -> Tensor:
        return params["most"]


def _halfway(x: Tensor) -> Tensor:
    """Float64 as float32 such that rounding that once more is rounding x: cut off, with a last bit that says so."""
    y = x.float()
    y = torch.where(y.double().abs() > x.abs(), y.nextafter(torch.zeros_like(y)), y)
    return torch.where(y.double() == x, y, (y.view(torch.int32) | 1).view(torch.float32))
