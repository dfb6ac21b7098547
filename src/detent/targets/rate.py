"""Grids for files: a step, and integers as large as they come, as entropy coding makes unused levels free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.grouping import GranularityLike, Layout, PerTensor, granularity_of
from detent.schedules import is_finite, is_number, is_whole
from detent.targets.base import Params, check_finite, compute_dtype
from detent.targets.levels import _check_param_dtype, _Scaled

__all__ = ["UniformStep", "entropy_at", "step_at_rate"]

_HALVINGS = 40  # of the ratio of the widest to the narrowest step, which is below 2^17: far below a float32's digits


@dataclass(frozen=True, kw_only=True)
class UniformStep(_Scaled):
    """Entropy-constrained uniform quantization: a step, and as many integer levels as the weights take.

        project(w) = step * sign(w) * min(floor(|w| / step + rounding), n),    n = 2^(bits-1) - 1

    Where `Uniform` fixes a width and looks for the step, this fixes the step, or how many bits a weight its codes take
    after entropy coding, and lets the width be. At equal bytes of an entropy-coded file its squared error is far
    smaller: by rate-distortion theory the least error of a model has the same step everywhere (`over="model"`).
    `detent.allocate` chooses the step for a budget in bytes.

    Args:
        step: distance of neighbouring levels, > 0, in the units of the weights. Give either this or `rate`.
        rate: zero-order entropy of the codes in bits a weight, > 0, which the step is fitted to, as near as it gets.
        over: with `rate`, "tensor": each tensor has it; "model": all tensors of the rule together, with one step.
        granularity: weights that share a step: "tensor", "channel" or `Group(size=...)`. With `rate`, finer ones have
            steps in proportion to the root mean square of their weights; with `step` all are the same.
        rounding: share of a step from which a weight goes to the farther of two levels, in [0.25, 0.5]. 0.5 is the
            nearest level; less widens the cell of zero (dead zone) and leans all others towards it, which saves bits
            for a little error (rate-distortion optimised rounding of a Laplacian source).
        bits: width of a code before entropy coding, 2 to 16; weights beyond n steps are clipped.
        param_dtype: what a step is rounded to before anything is projected, and stored as.

    Raises:
        ValueError: both or none of step and rate, or a number out of range.

    Example:
        >>> w = torch.tensor([0.9, -0.24, 0.26, 0.0, 1.6])
        >>> grid = UniformStep(step=0.5)
        >>> grid.project(w, grid.fit(w))
        tensor([1.0000, 0.0000, 0.5000, 0.0000, 1.5000])
        >>> w = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> coarse = UniformStep(rate=2.0)
        >>> round(entropy_at([w], float(coarse.fit(w)["scale"]), 0.5, 127), 3)    # bits a weight
        2.0

    Reference: Sullivan, "Efficient scalar quantization of exponential and Laplacian random variables", 1996; Gish and
    Pierce, "Asymptotically efficient quantizing", 1968.
    """

    step: float | None = None
    rate: float | None = None
    over: Literal["tensor", "model"] = "tensor"
    granularity: GranularityLike = "tensor"
    rounding: float = 0.5
    bits: int = 8
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float32"

    has_bits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.step is None) == (self.rate is None):
            raise ValueError(f"UniformStep(step={self.step!r}, rate={self.rate!r}): must be given one of the two")
        for name in ("step", "rate"):
            value = getattr(self, name)
            if value is not None and not (is_finite(value) and value > 0):
                raise ValueError(f"UniformStep({name}={value!r}): must be a finite number > 0")
        if self.over not in ("tensor", "model"):
            raise ValueError(f'UniformStep(over={self.over!r}): must be "tensor" or "model"')
        if self.step is not None and self.over == "model":
            raise ValueError('UniformStep(step=..., over="model"): a given step is the same for all; leave over out')
        granularity_of(self.granularity, "UniformStep.granularity")
        if not (is_number(self.rounding) and 0.25 <= self.rounding <= 0.5):
            raise ValueError(f"UniformStep(rounding={self.rounding!r}): must be a number from 0.25 to 0.5")
        if not is_whole(self.bits, 2, 16):
            raise ValueError(f"UniformStep(bits={self.bits!r}): must be a whole number from 2 to 16")
        _check_param_dtype("UniformStep", self.param_dtype)
        super().__post_init__()

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        return self.rounding == 0.5

    @property
    def fits_together(self) -> bool:
        return self.over == "model"

    @property
    def against_collapse(self) -> str:
        return "use a smaller step (a higher rate), or keep it in full precision (a rule with keep=True)"

    @property
    def _n(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def _has_zero(self) -> bool:
        return True

    def accepts(self, shape: Sequence[int], dtype: torch.dtype, layout: Layout) -> str | None:
        reason = super().accepts(shape, dtype, layout)
        if reason is None and self._n * torch.finfo(dtype).eps / 2 >= self.rounding:
            # Neighbouring levels far out would be one number of that dtype.
            return f"UniformStep(bits={self.bits}) has more levels than {dtype} tells apart; use fewer bits"
        return reason

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        return self._fitted([w], [layout or Layout(shape=tuple(w.shape))])[0]

    def fit_model(
        self, weights: Sequence[Tensor], layouts: Sequence[Layout], previous: Sequence[Params | None]
    ) -> list[Params]:
        if not self.fits_together:
            return super().fit_model(weights, layouts, previous)
        return self._fitted(weights, layouts)

    def _fitted(self, weights: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Params]:
        for w in weights:
            check_finite(w)
        if self.step is not None:
            units = [
                torch.ones(self._groups(layout), device=w.device) for w, layout in zip(weights, layouts, strict=True)
            ]
            step = self.step
        else:
            assert self.rate is not None
            each = [self._unit(w, layout) for w, layout in zip(weights, layouts, strict=True)]
            units = [unit for unit, _ in each]
            step = step_at_rate([scaled for _, scaled in each], self.rate, self.rounding, self._n)
        return [
            Params(tensors={"scale": self._rounded(unit.double() * step, w.dtype)}, layout=layout)
            for w, unit, layout in zip(weights, units, layouts, strict=True)
        ]

    def _groups(self, layout: Layout) -> int:
        return granularity_of(self.granularity).count(layout)

    def _unit(self, w: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """What the steps of groups are in proportion to, and the weights in it. A tensor that has one step has 1."""
        groups, x = granularity_of(self.granularity), w.detach().to(compute_dtype(w.dtype))
        if isinstance(groups, PerTensor):
            return torch.ones(1, device=w.device), x
        largest = groups.amax(x.abs(), layout)
        safe = torch.where(largest > 0, largest, 1.0)  # squares of what is divided by it neither over- nor underflow
        square = groups.sum((x / groups.expand(safe, layout)).square_(), layout)
        size = (square / groups.sum(torch.ones_like(x), layout)).sqrt().to(x) * safe
        return size * (largest > 0), x / groups.expand(torch.where(size > 0, size, 1.0).to(x), layout)

    def _indices(self, x: Tensor, divisor: Tensor, out: Tensor) -> Tensor:
        if self.rounding == 0.5:
            return super()._indices(x, divisor, out)
        index = torch.div(x, divisor, out=out)
        size = index.abs_().add_(self.rounding).floor_().clamp_(max=self._n)
        return torch.copysign(size, x, out=size)


def entropy_at(weights: Sequence[Tensor], step: float, rounding: float, n: int) -> float:
    """Zero-order entropy of the codes of tensors on a grid, each with its own code: bits a weight over all of them.

    Args:
        weights: the tensors.
        step: of the grid, > 0.
        rounding: as for `UniformStep`.
        n: the largest integer.

    Example:
        >>> entropy_at([torch.tensor([0.0, 1.0, -1.0, 0.1])], 1.0, 0.5, 3)
        1.5
    """
    return _entropy([_sorted(w) for w in weights], step, rounding, n)


def step_at_rate(weights: Sequence[Tensor], rate: float, rounding: float, n: int) -> float:
    """The widest step at which the codes of all tensors together take at least so many bits a weight; by bisection.

    Where no step does, the narrowest that clips nothing. Arguments as for `entropy_at`.

    Example:
        >>> round(step_at_rate([torch.tensor([0.0, 1.0, -1.0, 0.1])], 1.5, 0.5, 3), 6)    # farther, 1.0 goes to 0
        2.0
    """
    largest = max(float(w.detach().abs().max()) for w in weights)
    if largest == 0:
        return 1.0
    ordered = [_sorted(w.detach().to(compute_dtype(w.dtype)) / largest) for w in weights]
    low, high = 1 / n, 2 / rounding  # of these the second makes everything zero
    if _entropy(ordered, low, rounding, n) < rate:
        return low * largest
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _entropy(ordered, middle, rounding, n) >= rate else (low, middle)
    return low * largest


def _sorted(w: Tensor) -> Tensor:
    return w.detach().reshape(-1).to(compute_dtype(w.dtype)).sort().values


def _entropy(ordered: Sequence[Tensor], step: float, rounding: float, n: int) -> float:
    """By the places of the cells' ends among the sorted weights: no pass over them for a step."""
    bits = total = 0.0
    for w in ordered:
        most = min(n, int(max(-float(w[0]), float(w[-1])) / step) + 1)
        ends = (torch.arange(1, most + 1, dtype=torch.float64, device=w.device) - rounding) * step
        above = len(w) - torch.searchsorted(w, ends.to(w), right=False)
        below = torch.searchsorted(w, -ends.to(w), right=True)
        counts = [torch.diff(side, append=side.new_zeros(1)).neg() for side in (above, below)]
        zero = len(w) - above[:1] - below[:1]
        found = torch.cat([*counts, zero]).double()
        found = found[found > 0]
        bits -= float((found * (found / len(w)).log2()).sum())
        total += len(w)
    return bits / total
