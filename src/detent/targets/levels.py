"""Targets whose values are levels: the uniform grid and the single level zero."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.grouping import GranularityLike, Layout, granularity_of
from detent.targets.base import Codes, Params, Scope, Stream, Target, check_finite, compute_dtype

__all__ = ["Uniform", "Zero"]

_MSE_CANDIDATES = 41  # ratios of the largest |w|; the search of the probes in the design notes
_MSE_SMALLEST_RATIO = 0.1
_PARAM_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Uniform(Target):
    """A symmetric b-bit grid: `project(w) = scale * clamp(round(w / scale), -n, n)` with `n = 2^(b-1) - 1`.

    The range is *restricted* (-n .. n, the code -2^(b-1) stays unused), so zero is a level and the grid is its
    own mirror image. A group whose weights are all zero has scale 0 and stays zero.

    Args:
        bits: width of a code, 2 to 8.
        granularity: weights that share a scale: "tensor", "channel" or `Group(size=...)`.
        range: how the scale is found. "minmax": max|w| / n. "ema": the same from running extremes,
            `new = 0.9 old + 0.1 current`, as PSG's released code does. "mse": the one of 41 clipped ranges
            (0.1 to 1 times max|w|) with the least squared error.
        param_dtype: what a scale is rounded to before anything is projected, and stored as.

    Raises:
        ValueError: bits outside 2..8, or an unknown range, granularity or param_dtype.

    Example:
        >>> w = torch.tensor([1.0, 0.4, -0.7, 0.0])
        >>> grid = Uniform(bits=2, range="minmax")
        >>> params = grid.fit(w)
        >>> grid.project(w, params)
        tensor([ 1.,  0., -1.,  0.])
        >>> grid.bits_on_disk(params)      # four 2-bit codes and one float32 scale
        40

    Reference: the released code of Kim et al., "Position-based Scaled Gradient", arXiv 2005.11035.
    """

    bits: int
    granularity: GranularityLike = "tensor"
    range: Literal["minmax", "ema", "mse"] = "mse"
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float32"

    is_exact: ClassVar[bool] = True
    has_bits: ClassVar[bool] = True
    stored: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"Uniform(bits={self.bits}): bits must be a whole number from 2 to 8")
        granularity_of(self.granularity, "Uniform.granularity")
        if self.range not in ("minmax", "ema", "mse"):
            raise ValueError(f'Uniform(range={self.range!r}): must be "minmax", "ema" or "mse"')
        if self.param_dtype not in _PARAM_DTYPES:
            raise ValueError(f"Uniform(param_dtype={self.param_dtype!r}): must be one of {sorted(_PARAM_DTYPES)}")

    @property
    def scope(self) -> Scope:
        return "element"

    @property
    def _n(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        groups = granularity_of(self.granularity)
        check_finite(w)
        x = w.detach().to(compute_dtype(w.dtype))
        tensors: dict[str, Tensor] = {}
        if self.range == "ema":
            low = groups.amin(x, layout).clamp_max(0.0)
            high = groups.amax(x, layout).clamp_min(0.0)
            if previous is not None:
                low = 0.9 * previous["low"] + 0.1 * low
                high = 0.9 * previous["high"] + 0.1 * high
            tensors |= {"low": low, "high": high}
            largest = torch.maximum(-low, high)
        else:
            largest = groups.amax(x.abs(), layout)
        scale = self._rounded(largest / self._n, w.dtype)
        if self.range == "mse":
            scale = self._least_error(x, scale, layout, w.dtype)
        tensors["scale"] = scale
        return Params(tensors=tensors, layout=layout)

    def _rounded(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Round to `param_dtype`, far enough from underflow that projecting twice is projecting once."""
        store = _PARAM_DTYPES[self.param_dtype]
        smallest = max(
            torch.finfo(torch.float32).tiny,
            torch.finfo(store).smallest_normal,
            8 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
        )
        largest = min(torch.finfo(store).max, torch.finfo(dtype).max / self._n)
        live = scale.clamp(min=smallest, max=largest).to(store)
        return torch.where(scale > 0, live, torch.zeros_like(live))

    def _least_error(self, x: Tensor, full: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        groups = granularity_of(self.granularity)
        best = full
        best_error = torch.full(full.shape, torch.inf, dtype=torch.float64, device=x.device)
        # From the widest range down, and only a strictly smaller error wins: ties keep the wider range.
        for ratio in torch.linspace(1.0, _MSE_SMALLEST_RATIO, _MSE_CANDIDATES, dtype=torch.float64).tolist():
            scale = self._rounded(full.to(x.dtype) * ratio, dtype)
            error = groups.sum((self._on_grid(x, scale, layout) - x).square_(), layout)
            better = error < best_error
            best = torch.where(better, scale, best)
            best_error = torch.where(better, error, best_error)
        return best

    def _indices(self, x: Tensor, scale: Tensor, layout: Layout) -> Tensor:
        # An all-zero group has scale 0; divide it by 1 instead, the multiplication makes it zero again.
        divisor = torch.where(scale > 0, scale, 1.0).to(x.dtype)
        step = granularity_of(self.granularity).expand(divisor, layout)
        return torch.div(x, step).round_().clamp_(-self._n, self._n)

    def _on_grid(self, x: Tensor, scale: Tensor, layout: Layout) -> Tensor:
        step = granularity_of(self.granularity).expand(scale.to(x.dtype), layout)
        # Adding 0.0 turns -0.0 into +0.0, which is what decoding an integer gives.
        return self._indices(x, scale, layout).mul_(step).add_(0.0)

    def project(self, w: Tensor, params: Params) -> Tensor:
        x = w.detach().to(compute_dtype(w.dtype))
        return self._on_grid(x, params["scale"], params.layout).to(w.dtype)

    def encode(self, w: Tensor, params: Params) -> Codes:
        check_finite(w)
        x = w.detach().to(compute_dtype(w.dtype))
        codes = self._indices(x, params["scale"], params.layout).add_(self._n).to(torch.uint8)
        return Codes(streams=(Stream(name="codes", values=codes.reshape(-1), width=self.bits),))

    def decode(self, codes: Codes, params: Params, dtype: torch.dtype) -> Tensor:
        compute = compute_dtype(dtype)
        indices = codes["codes"].to(compute).sub_(self._n).reshape(params.layout.shape)
        step = granularity_of(self.granularity).expand(params["scale"].to(compute), params.layout)
        return indices.mul_(step).add_(0.0).to(dtype)

    def bits_on_disk(self, params: Params) -> int:
        codes = 8 * -(-params.layout.numel * self.bits // 8)
        return codes + params["scale"].numel() * torch.finfo(_PARAM_DTYPES[self.param_dtype]).bits

    def cell(self, params: Params) -> Tensor:
        # A dead group (scale 0) still needs a positive width to divide by; its weights are exactly zero.
        scale = params["scale"].float()
        return granularity_of(self.granularity).expand(torch.where(scale > 0, scale, 1.0), params.layout)

    def typical(self, params: Params) -> Tensor:
        return self.cell(params) / 4

    def limits(self, params: Params) -> Tensor:
        # In float64 the product is exact, so that rounded to the weight's dtype it is the outermost level itself.
        return granularity_of(self.granularity).expand(params["scale"].double() * self._n, params.layout)

    def at_bits(self, w: Tensor, params: Params, bits: int) -> tuple[Target, Params]:
        """The b-bit grid with the least squared error among a fresh fit and the trained steps times 2^-3 .. 2^3.

        A net that clicked at 3 bits sits on multiples of its step, so the best 4-bit grid for it is usually
        half that step and not the grid a fresh search would choose.
        """
        if bits == self.bits:
            return self, params
        fresh_range: Literal["minmax", "mse"] = "mse" if self.range == "mse" else "minmax"
        target = replace(self, bits=bits, range=fresh_range)
        fresh = target.fit(w, params.layout)
        if self.range != "mse":
            return target, fresh
        groups = granularity_of(self.granularity)
        x = w.detach().to(compute_dtype(w.dtype))
        best = fresh["scale"]
        best_error = groups.sum((target._on_grid(x, best, params.layout) - x).square_(), params.layout)
        for power in range(-3, 4):
            scale = target._rounded(params["scale"].to(x.dtype) * 2.0**power, w.dtype)
            error = groups.sum((target._on_grid(x, scale, params.layout) - x).square_(), params.layout)
            better = error < best_error
            best = torch.where(better, scale, best)
            best_error = torch.where(better, error, best_error)
        return target, Params(tensors={"scale": best}, layout=params.layout)


@dataclass(frozen=True, kw_only=True)
class Zero(Target):
    """The single level zero: what PSG pulls towards for sparse training.

    Every weight may end only at 0, so the compressed life of a tensor on `Zero()` is empty. Use it as the
    pull of a sparse target: `Rule(target=TopK(keep=0.1), mechanism=PSG(toward=Zero()))`.

    Args:
        granularity: weights that share a typical size (their mean absolute value).

    Example:
        >>> w = torch.tensor([0.5, -1.5])
        >>> zero = Zero()
        >>> zero.project(w, zero.fit(w)), zero.typical(zero.fit(w))
        (tensor([0., 0.]), tensor(1.))

    Reference: Kim et al., "Position-based Scaled Gradient", arXiv 2005.11035, section on sparse training.
    """

    granularity: GranularityLike = "tensor"

    is_exact: ClassVar[bool] = True
    stored: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        granularity_of(self.granularity, "Zero.granularity")

    @property
    def scope(self) -> Scope:
        return "element"

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        check_finite(w)
        groups = granularity_of(self.granularity)
        x = w.detach().abs().to(compute_dtype(w.dtype))
        size = groups.sum(torch.ones_like(x), layout)
        return Params(tensors={"mean": (groups.sum(x, layout) / size).float()}, layout=layout)

    def project(self, w: Tensor, params: Params) -> Tensor:
        return torch.zeros_like(w)

    def encode(self, w: Tensor, params: Params) -> Codes:
        check_finite(w)
        return Codes()

    def decode(self, codes: Codes, params: Params, dtype: torch.dtype) -> Tensor:
        return torch.zeros(params.layout.shape, dtype=dtype)

    def bits_on_disk(self, params: Params) -> int:
        return 0

    def typical(self, params: Params) -> Tensor:
        mean = params["mean"]
        return granularity_of(self.granularity).expand(torch.where(mean > 0, mean, 1.0), params.layout)
