"""Targets whose levels are a scale times integers."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from detent.grouping import GranularityLike, Layout, granularity_of
from detent.pieces import is_large
from detent.schedules import is_whole
from detent.targets.base import Codes, Lines, Params, Scope, Stream, Target, check_finite, compute_dtype
from detent.targets.declared import Declared, Pieces, scale_ends
from detent.targets.kmeans import ternary_scale
from detent.targets.search import alternating, least_error

__all__ = ["PARAM_DTYPES", "Binary", "Ternary", "Uniform", "check_param_dtype"]

_MSE_RATIOS = torch.linspace(1.0, 0.1, 41, dtype=torch.float64).tolist()  # of the largest |w|: the search of the probes
_INTERVAL_RATIOS = torch.linspace(1.1, 0.9, 201, dtype=torch.float64).tolist()  # ADMM-NN's: steps of a thousandth
PARAM_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def check_param_dtype(who: str, name: str) -> None:
    """Refuse a dtype that numbers are not stored in.

    Raises:
        ValueError: naming target and value.
    """
    if not isinstance(name, str) or name not in PARAM_DTYPES:
        raise ValueError(f"{who}(param_dtype={name!r}): must be one of {sorted(PARAM_DTYPES)}")


class _Scaled(Target):
    """Levels that are a scale a group times integers: 0, +-1 .. +-n, or the same without 0."""

    granularity: GranularityLike
    param_dtype: Literal["float16", "bfloat16", "float32"]

    is_exact: ClassVar[bool] = True
    stored: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def scope(self) -> Scope:
        return "element"

    @property
    @abc.abstractmethod
    def _n(self) -> int:
        """The largest integer."""

    @property
    @abc.abstractmethod
    def _width(self) -> int:
        """Bits a code."""

    @property
    @abc.abstractmethod
    def _has_zero(self) -> bool:
        """Whether 0 is one of the integers."""

    @property
    def _kind(self) -> tuple[int, bool]:
        """What the levels depend on besides the scale."""
        return self._n, self._has_zero

    def _rounded(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Round to `param_dtype`, far enough from underflow that projecting twice is projecting once."""
        store = PARAM_DTYPES[self.param_dtype]
        smallest, largest = scale_ends(store, dtype, self._n)
        live = scale.clamp(min=smallest, max=largest).to(store)
        return live.mul_(scale > 0)

    def declared(self, layout: Layout, dtype: torch.dtype, held: Mapping[str, int]) -> Pieces:
        store, groups = PARAM_DTYPES[self.param_dtype], granularity_of(self.granularity).count(layout)
        low, high = scale_ends(store, dtype, self._n)
        scale = Declared(name="scale", kind=store, shape=(groups,), low=low, high=high, besides=0.0)
        levels = 2 * self._n + self._has_zero
        codes = Declared(name="codes", kind=self._width, shape=(layout.numel,), below=levels)
        return Pieces((scale,) if self.stored else (), (codes,))

    def _least_error(
        self, x: Tensor, full: Tensor, ratios: Sequence[float], layout: Layout, dtype: torch.dtype
    ) -> Tensor:
        """The best scale of each group among shares of the full one, the wider one of equals."""
        groups, compute = granularity_of(self.granularity), compute_dtype(x.dtype)
        shares = torch.tensor(ratios, dtype=compute, device=x.device)[:, None]

        def choices(rows: slice) -> Tensor:
            return self._rounded(full[rows].to(compute) * shares, dtype)

        sizes = groups.sizes(layout).to(x.device)
        return least_error(groups.cut(x, layout, 0.0), sizes, choices, self._n, self._has_zero, compute)

    def _alternating(self, x: Tensor, layout: Layout, rounds: int) -> Tensor:
        """Nearest integers for the scale, best scale for the integers, in turn; neither can make the error larger."""
        groups = granularity_of(self.granularity)
        sizes = groups.sizes(layout).to(x.device)
        return alternating(groups.cut(x, layout, 0.0), sizes, self._n, self._has_zero, rounds, x.dtype)

    def _scale(self, params: Params, dtype: torch.dtype) -> Tensor:
        """One scale a group; 1 where the target stores none and the params come from a file."""
        if "scale" in params.tensors:
            return params["scale"].to(dtype)
        return torch.ones(granularity_of(self.granularity).count(params.layout), dtype=dtype)

    def _grid(self, params: Params, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(what weights are divided by, what integers are multiplied with), against the weights held here."""

        def make() -> tuple[Tensor, Tensor]:
            scale = self._scale(params, dtype)
            # An all-zero group has scale 0; divide it by 1 instead, the multiplication makes it zero again.
            return torch.where(scale > 0, scale, 1.0), scale

        groups = granularity_of(self.granularity)
        divisor, step = params.once(("grid", dtype), make)
        return groups.expand(divisor, params.layout), groups.expand(step, params.layout)

    def _indices(self, x: Tensor, divisor: Tensor, out: Tensor) -> Tensor:
        index = torch.div(x, divisor, out=out)
        if self._has_zero:
            return index.round_().clamp_(-self._n, self._n)
        # By the sign of the weight, not of the quotient: sign(0) and sign(-0) are both +1.
        size = index.abs_().round_().clamp_(1, self._n)
        return torch.copysign(size, x + 0.0, out=size)  # -0.0 + 0.0 is 0.0

    def _on_grid(self, x: Tensor, divisor: Tensor, step: Tensor, out: Tensor) -> Tensor:
        # Adding 0.0 turns -0.0 into +0.0, which is what decoding an integer gives.
        return self._indices(x, divisor, out).mul_(step).add_(0.0)

    def project(self, w: Tensor, params: Params) -> Tensor:
        w = w.detach()
        out = torch.empty_like(w)
        self.project_into(w, params, out)
        return out

    def project_into(self, w: Tensor, params: Params, out: Tensor) -> None:
        dtype = compute_dtype(w.dtype)
        if w.dtype == out.dtype == dtype and not is_large(w):
            self._on_grid(w, *self._grid(params, dtype), out)
            return
        lined = Lines.of(self, params, w.detach(), out)
        for x, q, divisor, step in lined.cut(*self._grid(lined.params, dtype)):
            if q.dtype == dtype:
                self._on_grid(x, divisor, step, q)
            else:
                wide = x.to(dtype)
                q.copy_(self._on_grid(wide, divisor, step, torch.empty_like(wide)))

    def lined(self, params: Params) -> Params | None:
        return params.lined(granularity_of(self.granularity))

    def encode(self, w: Tensor, params: Params) -> Codes:
        check_finite(w)
        x = w.detach().to(compute_dtype(w.dtype))
        codes = self._indices(x, self._grid(params, x.dtype)[0], torch.empty_like(x)).add_(self._n)
        if not self._has_zero:
            codes.sub_((codes > self._n).to(codes.dtype))
        return Codes(streams=(Stream(name="codes", values=codes.to(torch.uint8).reshape(-1), width=self._width),))

    def decode(self, codes: Codes, params: Params, dtype: torch.dtype) -> Tensor:
        compute = compute_dtype(dtype)
        indices = codes["codes"].to(compute).sub_(self._n).reshape(params.layout.shape)
        if not self._has_zero:
            indices.add_((indices >= 0).to(compute))
        step = granularity_of(self.granularity).expand(self._scale(params, compute).to(indices.device), params.layout)
        return indices.mul_(step).add_(0.0).to(dtype)

    def restored(self, w: Tensor, params: Params, codes: Codes) -> Params:
        return params

    def bits_on_disk(self, params: Params) -> int:
        codes = 8 * -(-params.layout.numel * self._width // 8)
        if not self.stored:
            return codes
        return codes + params["scale"].numel() * torch.finfo(PARAM_DTYPES[self.param_dtype]).bits

    def _cells(self, params: Params) -> Tensor:
        """Width of the cells of each group."""
        # A dead group (scale 0) still needs a positive width to divide by; its weights are exactly zero.
        scale = self._scale(params, torch.float32)
        # Without zero the middle cell is twice as wide; where n is 1 there is no other.
        width = scale if self._has_zero or self._n > 1 else 2 * scale.clamp(max=torch.finfo(torch.float32).max / 2)
        return torch.where(scale > 0, width, 1.0)

    def cell(self, params: Params) -> Tensor:
        return granularity_of(self.granularity).expand(self._cells(params), params.layout)

    def typical(self, params: Params) -> Tensor:
        a_quarter = params.once(("typical", self._kind), lambda: self._cells(params) / 4)
        return granularity_of(self.granularity).expand(a_quarter, params.layout)

    def spacing(self, params: Params) -> Tensor | None:
        if not self._has_zero and self._n > 1:
            return None  # the gap about 0 is twice as wide

        def make() -> Tensor:
            scale = self._scale(params, torch.float32)
            return scale if self._has_zero else 2 * scale

        return granularity_of(self.granularity).expand(params.once(("spacing", self._kind), make), params.layout)

    def limits(self, params: Params) -> Tensor:
        # In float64 the product is exact, so that rounded to the weight's dtype it is the outermost level itself.
        limits = params.once(("limits", self._kind), lambda: self._scale(params, torch.float64) * self._n)
        return granularity_of(self.granularity).expand(limits, params.layout)

    def levels(self, params: Params) -> Tensor:
        """Scale times integers, exactly, in float64; a group of scale 0 repeats the level 0."""
        scale = granularity_of(self.granularity).expand(self._scale(params, torch.float64), params.layout)
        steps = torch.arange(-self._n, self._n + 1, dtype=torch.float64, device=scale.device)
        steps = steps if self._has_zero else steps[steps != 0]
        return scale.unsqueeze(-1) * steps + 0.0


@dataclass(frozen=True, kw_only=True)
class Uniform(_Scaled):
    """A symmetric b-bit grid: `project(w) = scale * clamp(round(w / scale), -n, n)` with `n = 2^(b-1) - 1`.

    The range is *restricted* (-n .. n, the code -2^(b-1) stays unused), so zero is a level and the grid is its
    own mirror image. A group whose weights are all zero has scale 0 and stays zero. With `zero=False` the levels are
    scale times +-1 .. +-n with n = 2^(b-1), every code used and 0 itself going to +scale: the grid for the survivors
    of a pruning (the published code stops at n = 2^(b-1) - 1, its last code standing for the pruned zeros).

    Args:
        bits: width of a code, 2 to 8.
        granularity: weights that share a scale: "tensor", "channel" or `Group(size=...)`.
        range: how the scale is found. "minmax": max|w| / n. "ema": the same from running extremes,
            `new = 0.9 old + 0.1 current`, as PSG's released code does. "mse": the one of 41 clipped ranges
            (0.1 to 1 times max|w|) with the least squared error. "alternate": Q = clamp(round(w / scale)) and
            scale = <w, Q> / <Q, Q> in turn, from the mean of |w| over non-zeros divided by n / 2 (by 1 if n < 2), as
            the ADMM line does; the squared error never grows. "interval": the best of 201 scales, 0.9 to 1.1 times
            max|w| / n, as in ADMM-NN.
        param_dtype: what a scale is rounded to before anything is projected, and stored as.
        zero: whether 0 is a level.
        rounds: most rounds of "alternate", >= 1; the ADMM line takes 6 to 20. It stops sooner if nothing moves.

    Raises:
        ValueError: bits outside 2..8, rounds below 1, or an unknown range, granularity or param_dtype.

    Example:
        >>> w = torch.tensor([1.0, 0.4, -0.7, 0.0])
        >>> grid = Uniform(bits=2, range="minmax")
        >>> params = grid.fit(w)
        >>> grid.project(w, params)
        tensor([ 1.,  0., -1.,  0.])
        >>> grid.bits_on_disk(params)      # four 2-bit codes and one float32 scale
        40
        >>> halves = Uniform(bits=2, range="minmax", zero=False)
        >>> halves.levels(halves.fit(w)).tolist()
        [-1.0, -0.5, 0.5, 1.0]

    Reference: the released code of Kim et al., "Position-based Scaled Gradient", arXiv 2005.11035. "alternate": Leng
    et al., "Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM", arXiv 1707.09870. "interval": Ren
    et al., "ADMM-NN", arXiv 1812.11677.
    """

    bits: int
    granularity: GranularityLike = "tensor"
    range: Literal["minmax", "ema", "mse", "alternate", "interval"] = "mse"
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    zero: bool = True
    rounds: int = 20

    has_bits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in self.widths:
            raise ValueError(f"Uniform(bits={self.bits!r}): bits must be a whole number from 2 to 8")
        granularity_of(self.granularity, "Uniform.granularity")
        if self.range not in ("minmax", "ema", "mse", "alternate", "interval"):
            known = '"minmax", "ema", "mse", "alternate" or "interval"'
            raise ValueError(f"Uniform(range={self.range!r}): must be {known}")
        if not is_whole(self.rounds):
            raise ValueError(f"Uniform(rounds={self.rounds!r}): must be a whole number >= 1")
        check_param_dtype("Uniform", self.param_dtype)
        super().__post_init__()

    @property
    def _n(self) -> int:
        return 2 ** (self.bits - 1) - int(self.zero)

    @property
    def _width(self) -> int:
        return self.bits

    @property
    def _has_zero(self) -> bool:
        return self.zero

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        groups = granularity_of(self.granularity)
        check_finite(w)
        x = w.detach().to(compute_dtype(w.dtype))
        if self.range == "alternate":
            scale = self._rounded(self._alternating(x, layout, self.rounds), w.dtype)
            return Params(tensors={"scale": scale}, layout=layout)
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
        if self.range in ("mse", "interval"):
            ratios = _MSE_RATIOS if self.range == "mse" else _INTERVAL_RATIOS
            scale = self._least_error(x, scale, ratios, layout, w.dtype)
        tensors["scale"] = scale
        return Params(tensors=tensors, layout=layout)

    def at_bits(self, w: Tensor, params: Params, bits: int) -> tuple[Target, Params]:
        """The b-bit grid with the least squared error among a fresh fit and the trained steps times 2^-3 .. 2^3.

        A net that clicked at 3 bits sits on multiples of its step, so the best 4-bit grid for it is usually
        half that step and not the grid a fresh search would choose.
        """
        if bits == self.bits:
            return self, params
        target = replace(self, bits=bits, range="minmax" if self.range == "ema" else self.range)
        fresh = target.fit(w, params.layout)
        groups = granularity_of(self.granularity)
        x = w.detach().to(compute_dtype(w.dtype))
        best = fresh["scale"]
        best_error = groups.sum(target.project(x, fresh).sub_(x).square_(), params.layout)
        for power in range(-3, 4):
            scale = target._rounded(params["scale"].to(x.dtype) * 2.0**power, w.dtype)
            tried = Params(tensors={"scale": scale}, layout=params.layout)
            error = groups.sum(target.project(x, tried).sub_(x).square_(), params.layout)
            better = error < best_error
            best = torch.where(better, scale, best)
            best_error = torch.where(better, error, best_error)
        return target, Params(tensors={"scale": best}, layout=params.layout)


class _Signs(_Scaled):
    """-1 and +1, with or without 0 between them, times one number a group, or times nothing."""

    scale: Any  # how the number is found, or None for none; each class says which words it knows

    @property
    def stored(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.scale is None else ("scale",)

    @property
    def _n(self) -> int:
        return 1

    @abc.abstractmethod
    def _fitted(self, w: Tensor, layout: Layout) -> Tensor:
        """The number of each group, before it is rounded."""

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        check_finite(w)
        if self.scale is None:
            count = granularity_of(self.granularity).count(layout)
            return Params(tensors={"scale": torch.ones(count, dtype=torch.float32, device=w.device)}, layout=layout)
        return Params(tensors={"scale": self._rounded(self._fitted(w.detach(), layout), w.dtype)}, layout=layout)


@dataclass(frozen=True, kw_only=True)
class Binary(_Signs):
    """One bit a weight: `project(w) = alpha * sign(w)` with sign(0) = +1.

    Args:
        scale: "mean": alpha is the mean |w| of a group, which is the exact least squares. `None`: alpha is 1 and
            nothing is stored, as in mirror descent on {-1, +1}; it needs a normalisation layer after each weight.
        granularity: weights that share alpha: "tensor", "channel" or `Group(size=...)`.
        param_dtype: what alpha is rounded to before anything is projected, and stored as.

    Raises:
        ValueError: an unknown scale, granularity or param_dtype.

    Example:
        >>> w = torch.tensor([0.5, -1.5, 0.0, 2.0])
        >>> binary = Binary()
        >>> binary.project(w, binary.fit(w))
        tensor([ 1., -1.,  1.,  1.])
        >>> binary.bits_on_disk(binary.fit(w))      # four bits in a byte, and one float32
        40

    Reference: Rastegari et al., "XNOR-Net", arXiv 1603.05279, section 3.1; without a scale Ajanthan et al., "Mirror
    Descent View for Neural Network Quantization", arXiv 1910.08237.
    """

    scale: Literal["mean"] | None = "mean"
    granularity: GranularityLike = "tensor"
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float32"

    def __post_init__(self) -> None:
        if self.scale not in ("mean", None):
            raise ValueError(f'Binary(scale={self.scale!r}): must be "mean" or None')
        granularity_of(self.granularity, "Binary.granularity")
        check_param_dtype("Binary", self.param_dtype)
        super().__post_init__()

    @property
    def _width(self) -> int:
        return 1

    @property
    def _has_zero(self) -> bool:
        return False

    def _fitted(self, w: Tensor, layout: Layout) -> Tensor:
        groups = granularity_of(self.granularity)
        return groups.sum(w.abs(), layout) / groups.sizes(layout).to(w.device)


@dataclass(frozen=True, kw_only=True)
class Ternary(_Signs):
    """Three levels: `project(w) = a * clamp(round(w / a), -1, 1)`, so the threshold is a / 2 (where w goes to 0).

    Args:
        scale: "exact": the a with the least squared error, found by sorting |w| and taking the k with the largest
            (sum of the k largest)^2 / k. "alternate": Q = clamp(round(w / a)) and a = <w, Q> / <Q, Q> in turn from the
            mean |w| over non-zeros, 20 rounds at most, as the ADMM line does; faster, and a local optimum. `None`: a
            is 1 and nothing is stored, as in mirror descent on {-1, 0, +1}.
        granularity: weights that share a: "tensor", "channel" or `Group(size=...)`.
        param_dtype: what a is rounded to before anything is projected, and stored as.

    Raises:
        ValueError: an unknown scale, granularity or param_dtype.

    Example:
        >>> w = torch.tensor([1.0, 0.1, -0.8, 0.0])
        >>> ternary = Ternary()
        >>> ternary.project(w, ternary.fit(w))
        tensor([ 0.9000,  0.0000, -0.9000,  0.0000])
        >>> ternary.bits_on_disk(ternary.fit(w))      # four 2-bit codes and one float32
        40

    Reference: Li et al., "Ternary Weight Networks", arXiv 1605.04711; "alternate": Leng et al., arXiv 1707.09870;
    without a scale Ajanthan et al., arXiv 1910.08237.
    """

    scale: Literal["exact", "alternate"] | None = "exact"
    granularity: GranularityLike = "tensor"
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float32"

    def __post_init__(self) -> None:
        if self.scale not in ("exact", "alternate", None):
            raise ValueError(f'Ternary(scale={self.scale!r}): must be "exact", "alternate" or None')
        granularity_of(self.granularity, "Ternary.granularity")
        check_param_dtype("Ternary", self.param_dtype)
        super().__post_init__()

    @property
    def _width(self) -> int:
        return 2

    @property
    def _has_zero(self) -> bool:
        return True

    def _fitted(self, w: Tensor, layout: Layout) -> Tensor:
        if self.scale == "exact":
            return ternary_scale(granularity_of(self.granularity).cut(w.abs(), layout, 0.0))
        return self._alternating(w.to(compute_dtype(w.dtype)), layout, 20)
