"""Targets whose values are levels: a scale times integers, powers of two, learned levels."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from detent import masks
from detent.grouping import GranularityLike, Layout, granularity_of
from detent.pieces import is_large
from detent.schedules import is_whole
from detent.targets.base import Lines, Params, Scope, Target, check_finite, compute_dtype
from detent.targets.forms import Form, Grid, Levels, grid_cell, in_pieces, looked_up
from detent.targets.kmeans import kmeans, ternary_scale
from detent.targets.parts import scale_ends
from detent.targets.search import alternating, least_error

__all__ = ["Binary", "LearnedLevels", "PowerOfTwo", "Ternary", "Uniform"]

_MSE_RATIOS = torch.linspace(1.0, 0.1, 41, dtype=torch.float64).tolist()  # of the largest |w|: the search of the probes
_INTERVAL_RATIOS = torch.linspace(1.1, 0.9, 201, dtype=torch.float64).tolist()  # ADMM-NN's: steps of a thousandth
_PARAM_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_COMPARED = 32  # levels up to which to compare with each takes less time than to search


def _check_param_dtype(who: str, name: str) -> None:
    if not isinstance(name, str) or name not in _PARAM_DTYPES:
        raise ValueError(f"{who}(param_dtype={name!r}): must be one of {sorted(_PARAM_DTYPES)}")


class _Scaled(Target):
    """Levels that are a scale a group times integers: 0, +-1 .. +-n, or the same without 0."""

    granularity: GranularityLike
    param_dtype: Literal["float16", "bfloat16", "float32"]

    is_exact: ClassVar[bool] = True

    @property
    def scope(self) -> Scope:
        return "element"

    @property
    @abc.abstractmethod
    def _n(self) -> int:
        """The largest integer."""

    @property
    @abc.abstractmethod
    def _has_zero(self) -> bool:
        """Whether 0 is one of the integers."""

    @property
    def _kind(self) -> tuple[GranularityLike, int, bool]:
        """What the levels depend on besides the scale."""
        return self.granularity, self._n, self._has_zero

    def _rounded(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Round to `param_dtype`, far enough from underflow that projecting twice is projecting once."""
        store = _PARAM_DTYPES[self.param_dtype]
        smallest, largest = scale_ends(store, dtype, self._n)
        live = scale.clamp(min=smallest, max=largest).to(store)
        return live.mul_(scale > 0)

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

    def _grid(self, params: Params, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(what weights are divided by, what integers are multiplied with), against the weights held here."""

        def make() -> tuple[Tensor, Tensor]:
            scale = params["scale"].to(dtype)
            # An all-zero group has scale 0; divide it by 1 instead, the multiplication makes it zero again.
            divisor = torch.where(scale > 0, scale, 1.0)
            return groups.expand(divisor, params.layout), groups.expand(scale, params.layout)

        groups = granularity_of(self.granularity)
        return params.once(("grid", groups, dtype), make)

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

    def form(self, w: Tensor, params: Params) -> Grid:
        x = w.detach().to(compute_dtype(w.dtype))
        codes = self._indices(x, self._grid(params, x.dtype)[0], torch.empty_like(x)).add_(self._n)
        if not self._has_zero:
            codes.sub_((codes > self._n).to(codes.dtype))
        return Grid(
            layout=params.layout,
            dtype=w.dtype,
            codes=codes.to(torch.uint8 if self._n <= 128 - self._has_zero else torch.int32),
            scale=self._written(params),
            granularity=self.granularity,
            n=self._n,
            zero=self._has_zero,
        )

    def _written(self, params: Params) -> Tensor | None:
        """The scale that a file has to hold."""
        return params["scale"]

    def restored(self, w: Tensor, form: Form) -> Params:
        return Params(tensors={"scale": form.named["scale"]}, layout=form.layout)

    def cell(self, params: Params) -> Tensor:
        width = grid_cell(params["scale"].to(torch.float32), self._n, self._has_zero)
        return granularity_of(self.granularity).expand(width, params.layout)

    def typical(self, params: Params) -> Tensor:
        def make() -> Tensor:
            return self.cell(params) / 4

        return params.once(("typical", self._kind), make)

    def spacing(self, params: Params) -> Tensor | None:
        if not self._has_zero and self._n > 1:
            return None  # the gap about 0 is twice as wide

        def make() -> Tensor:
            scale = params["scale"].to(torch.float32)
            return granularity_of(self.granularity).expand(scale if self._has_zero else 2 * scale, params.layout)

        return params.once(("spacing", self._kind), make)

    def limits(self, params: Params) -> Tensor:
        # In float64 the product is exact, so that rounded to the weight's dtype it is the outermost level itself.
        limits = params["scale"].to(torch.float64) * self._n
        return granularity_of(self.granularity).expand(limits, params.layout)

    def levels(self, params: Params) -> Tensor:
        """Scale times integers, exactly, in float64; a group of scale 0 repeats the level 0."""
        scale = granularity_of(self.granularity).expand(params["scale"].to(torch.float64), params.layout)
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
        >>> grid.form(w, params).nbytes      # four 2-bit codes and one float32 scale
        5
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
        _check_param_dtype("Uniform", self.param_dtype)
        super().__post_init__()

    @property
    def _n(self) -> int:
        return 2 ** (self.bits - 1) - int(self.zero)

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

    def _written(self, params: Params) -> Tensor | None:
        return None if self.scale is None else params["scale"]

    def restored(self, w: Tensor, form: Form) -> Params:
        return self.fit(w, form.layout) if self.scale is None else super().restored(w, form)

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
        >>> binary.form(w, binary.fit(w)).nbytes      # four bits in a byte, and one float32
        5

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
        _check_param_dtype("Binary", self.param_dtype)
        super().__post_init__()

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
        >>> ternary.form(w, ternary.fit(w)).nbytes      # four 2-bit codes and one float32
        5

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
        _check_param_dtype("Ternary", self.param_dtype)
        super().__post_init__()

    @property
    def _has_zero(self) -> bool:
        return True

    def _fitted(self, w: Tensor, layout: Layout) -> Tensor:
        if self.scale == "exact":
            return ternary_scale(granularity_of(self.granularity).cut(w.abs(), layout, 0.0))
        return self._alternating(w.to(compute_dtype(w.dtype)), layout, 20)


class _Listed(Target):
    """Levels that are listed one by one for each group."""

    granularity: GranularityLike

    is_exact: ClassVar[bool] = True

    @property
    def scope(self) -> Scope:
        return "element"

    @abc.abstractmethod
    def _table(self, params: Params) -> Tensor:
        """(groups, levels), ascending, in float64; every level is a number of the weight's dtype."""

    @staticmethod
    def _bounds(table: Tensor, dtype: torch.dtype) -> Tensor:
        """The largest numbers that belong to each level but the last."""
        middles = (table[:, :-1] + table[:, 1:]) / 2
        # Rounded down: a weight is above the true middle exactly when it is above the largest number not beyond it.
        bounds = middles.to(dtype)
        return torch.where(bounds.double() > middles, bounds.nextafter(torch.full_like(bounds, -torch.inf)), bounds)

    def _places(self, x: Tensor, table: Tensor, layout: Layout) -> Tensor:
        """Number of the nearest level of each weight's group, int32; half-way the lower one."""
        bounds = self._bounds(table, x.dtype)
        if len(table) == 1:
            return torch.bucketize(x.contiguous(), bounds[0], out_int32=True)
        size = 1 << (table.shape[1] - 1).bit_length()
        bounds = torch.nn.functional.pad(bounds, (0, size - 1 - bounds.shape[1]), value=torch.inf).reshape(-1)
        places = []
        for part, group in in_pieces(x, granularity_of(self.granularity), layout):
            place = torch.zeros_like(part, dtype=torch.int32)
            step = size
            while step > 1:
                step //= 2
                bound = bounds.index_select(0, (group * (size - 1) + place + (step - 1)).reshape(-1))
                place += step * (part > bound.reshape(part.shape))
            places.append(place)
        return torch.cat(places) if len(places) > 1 else places[0]

    def project(self, w: Tensor, params: Params) -> Tensor:
        out = torch.empty_like(w.detach())
        self.project_into(w, params, out)
        return out

    def project_into(self, w: Tensor, params: Params, out: Tensor) -> None:
        w, table, dtype = w.detach(), self._table(params), compute_dtype(w.dtype)
        lined = Lines.of(self, params, w, out)
        if not lined.apart or table.shape[1] > _COMPARED:
            places = self._places(w.to(dtype), table, params.layout)
            out.copy_(looked_up(places, table.to(w.dtype), granularity_of(self.granularity), params.layout))
            return
        bounds, falling, k = self._bounds(table, dtype), table.to(w.dtype).flip(1).reshape(-1), table.shape[1]
        if len(table) == 1:
            for x, q in lined.cut():
                q.copy_(falling.index_select(0, _below(x.to(dtype), bounds[0].unbind())))
            return
        bounds, first = bounds.unsqueeze(-1), torch.arange(0, len(table) * k, k, dtype=torch.int32)[:, None]
        if (rows := lined.params.layout.rows) is not None:
            bounds, first = bounds[slice(*rows)], first[slice(*rows)]
        for x, q, here, at in lined.cut(bounds, first):
            place = _below(x.to(dtype), here.unbind(1)).add_(at)
            q.copy_(falling.index_select(0, place.view(-1)).view(q.shape))

    def lined(self, params: Params) -> Params | None:
        return params.lined(granularity_of(self.granularity))

    def form(self, w: Tensor, params: Params) -> Form:
        x = w.detach().to(compute_dtype(w.dtype))
        codes = self._places(x, self._table(params), params.layout)
        return self._form_of(codes.to(torch.uint8), w.dtype, params)

    @abc.abstractmethod
    def _form_of(self, codes: Tensor, dtype: torch.dtype, params: Params) -> Form:
        """The form of these places among the levels."""

    def typical(self, params: Params) -> Tensor:
        """A quarter of the mean distance of neighbouring levels, as on an evenly spaced grid."""
        table = self._table(params)
        mean = (table[:, -1] - table[:, 0]) / (4 * (table.shape[1] - 1))
        smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        mean = torch.where(mean > 0, mean.clamp(smallest, largest), 1.0).float()
        return granularity_of(self.granularity).expand(mean, params.layout)

    def limits(self, params: Params) -> Tensor:
        return granularity_of(self.granularity).expand(self._table(params).abs().amax(dim=1), params.layout)

    def levels(self, params: Params) -> Tensor:
        """The levels in float64, ascending; where a group has fewer, some are repeated."""
        groups = granularity_of(self.granularity)
        return torch.stack([groups.expand(level, params.layout) for level in self._table(params).unbind(1)], dim=-1)


def _below(x: Tensor, bounds: Iterable[Tensor]) -> Tensor:
    """How many bounds each number is not above, int32: a few comparisons take less time than a search."""
    count = torch.zeros(x.shape, dtype=torch.uint8)
    for bound in bounds:
        count += masks.compare(x, "le", bound).view(torch.uint8)
    return count.to(torch.int32)


_SMALLEST_POWER = {torch.float16: -24}  # half precision has few exponents, so its subnormal numbers count too
_DEAD = -2048.0  # the exponent of a group of zeros without the level 0


@dataclass(frozen=True, kw_only=True)
class PowerOfTwo(_Listed):
    """Levels +-2^top, +-2^(top-1), .. and 0: multiplying by a weight is a shift.

        project(w) = the nearest of {0, +-2^(top-n+1) .. +-2^top},    n = 2^(b-1) - 1

    Nearest in value: the boundary between 2^j and 2^(j+1) is 1.5 * 2^j, that between 0 and the smallest level half that
    level; a weight on a boundary goes to the lower level. With `zero=False` there are n = 2^(b-1) powers a side, 0
    itself goes to the smallest negative one, and a group of zeros stays zero.

    Args:
        bits: width of a code, 2 to 5: more powers than five bits hold no weight tensor spans.
        granularity: weights that share a top: "tensor", "channel" or `Group(size=...)`.
        range: how the top is found. "max": the power nearest to max|w|, which is floor(log2(4 max|w| / 3)). "mse": the
            one of that and the three below with the least squared error.
        zero: whether 0 is a level.

    Raises:
        ValueError: bits outside 2..5, or an unknown range or granularity.

    Example:
        >>> w = torch.tensor([1.1, 0.4, -0.7, 0.05])
        >>> powers = PowerOfTwo(bits=3)
        >>> powers.project(w, powers.fit(w))
        tensor([ 1.0000,  0.5000, -0.5000,  0.0000])

    Reference: Zhou et al., "Incremental Network Quantization", arXiv 1702.03044, section 2.2 (same rule for the top).
    """

    bits: int
    granularity: GranularityLike = "tensor"
    range: Literal["max", "mse"] = "mse"
    zero: bool = True

    has_bits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in self.widths:
            raise ValueError(f"PowerOfTwo(bits={self.bits!r}): bits must be a whole number from 2 to 5")
        granularity_of(self.granularity, "PowerOfTwo.granularity")
        if self.range not in ("max", "mse"):
            raise ValueError(f'PowerOfTwo(range={self.range!r}): must be "max" or "mse"')
        super().__post_init__()

    @property
    def widths(self) -> Sequence[int]:
        return range(2, 6)

    @property
    def _n(self) -> int:
        return 2 ** (self.bits - 1) - int(self.zero)

    def _table(self, params: Params) -> Tensor:
        top = params["top"].double().unsqueeze(1)
        down = torch.arange(self._n, dtype=torch.float64, device=top.device)
        sizes = torch.where(top > _DEAD, _power(top - down), 0.0)
        middle = [torch.zeros_like(top)] if self.zero else []
        return torch.cat([-sizes, *middle, sizes.flip(1)], dim=1) + 0.0

    def _ends(self, dtype: torch.dtype) -> tuple[int, int]:
        """The tops with which every level is a number of the weight's dtype."""
        return _SMALLEST_POWER.get(dtype, -126) + self._n - 1, 15 if dtype == torch.float16 else 127

    def _window(self, top: Tensor, dtype: torch.dtype) -> Tensor:
        """Tops moved between these; exact in float16, as they are stored."""
        return top.clamp(*self._ends(dtype)).to(torch.float16)

    def _form_of(self, codes: Tensor, dtype: torch.dtype, params: Params) -> Grid:
        smallest = self._table(params)[:, self._n + self.zero].to(torch.bfloat16)
        own = {"granularity": self.granularity, "n": self._n, "zero": self.zero, "powers": True}
        return Grid(layout=params.layout, dtype=dtype, codes=codes, scale=smallest, **own)

    def restored(self, w: Tensor, form: Form) -> Params:
        smallest = form.named["scale"].float()
        top = torch.where(smallest > 0, smallest.log2().round() + (self._n - 1), _DEAD).to(torch.float16)
        return Params(tensors={"top": top}, layout=form.layout)

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        check_finite(w)
        x = w.detach().to(compute_dtype(w.dtype))
        largest = granularity_of(self.granularity).amax(x.abs(), layout)
        mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [1/2, 1)
        top = self._window(exponent - (mantissa < 0.75).to(exponent.dtype), w.dtype)
        if not self.zero:
            top = torch.where(largest > 0, top, _DEAD)
        if self.range == "mse":
            top = self._best(x, [top, *(self._window(top.int() - i, w.dtype) for i in (1, 2, 3))], layout)
        return Params(tensors={"top": top}, layout=layout)

    def _best(self, x: Tensor, tops: list[Tensor], layout: Layout) -> Tensor:
        """For each group the top with the least squared error, the earliest of equals."""
        best, least = tops[0], self._error(x, tops[0], layout)
        for top in tops[1:]:
            error = self._error(x, top, layout)
            better = (error < least) & (best > _DEAD)
            best, least = torch.where(better, top, best), torch.where(better, error, least)
        return best

    def _error(self, x: Tensor, top: Tensor, layout: Layout) -> Tensor:
        q = self.project(x, Params(tensors={"top": top}, layout=layout))
        return granularity_of(self.granularity).sum(q.sub_(x).square_(), layout)

    def at_bits(self, w: Tensor, params: Params, bits: int) -> tuple[Target, Params]:
        """More or fewer powers: the better, for each group, of a fresh fit and the trained top."""
        if bits == self.bits:
            return self, params
        target = replace(self, bits=bits)
        fresh = target.fit(w, params.layout)
        trained = torch.where(params["top"] > _DEAD, target._window(params["top"], w.dtype), params["top"])
        best = target._best(w.detach().to(compute_dtype(w.dtype)), [trained, fresh["top"]], params.layout)
        return target, Params(tensors={"top": best}, layout=params.layout)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent for whole exponents in -1022 .. 1023, exactly: written as the bits of a float64."""
    return ((exponent.clamp(-1022, 1023).long() + 1023) << 52).view(torch.float64)


@dataclass(frozen=True, kw_only=True)
class LearnedLevels(_Listed):
    """k levels a group, found by k-means: `project(w)` is the nearest level, half-way the lower one.

    Each level is the mean of the weights it serves (Lloyd's algorithm from two fixed starts, the better one kept), so
    the fit draws nothing at random. Sorting takes one copy of the weights, whatever their number. Groups with fewer
    distinct weights than levels are met exactly, and the largest level is repeated.

    Args:
        k: levels, 2 to 256; a code takes ceil(log2 k) bits.
        zero: one of the levels is 0, for weights that a pruning set to zero.
        granularity: weights that share levels: "tensor", "channel" or `Group(size=...)`.
        param_dtype: what levels are rounded to before anything is projected, and stored as.

    Raises:
        ValueError: k outside 2..256, or an unknown granularity or param_dtype.

    Example:
        >>> w = torch.tensor([1.0, 1.5, -2.0, -2.5, 0.0])
        >>> learned = LearnedLevels(k=3, zero=True)
        >>> learned.project(w, learned.fit(w))
        tensor([ 1.2500,  1.2500, -2.2500, -2.2500,  0.0000])
        >>> learned.form(w, learned.fit(w)).nbytes      # five 2-bit codes in two bytes, and three float32
        14

    Reference: Han et al., "Deep Compression", arXiv 1510.00149, section 3.1.
    """

    k: int
    zero: bool = False
    granularity: GranularityLike = "tensor"
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float32"

    has_codebook: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_whole(self.k, 2, 256):
            raise ValueError(f"LearnedLevels(k={self.k!r}): k must be a whole number from 2 to 256")
        granularity_of(self.granularity, "LearnedLevels.granularity")
        _check_param_dtype("LearnedLevels", self.param_dtype)
        super().__post_init__()

    def _table(self, params: Params) -> Tensor:
        return params["levels"].double().sort(dim=1).values  # training may have let two of them pass each other

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        check_finite(w)
        groups = granularity_of(self.granularity)
        levels = kmeans(groups.cut(w.detach(), layout, torch.inf), groups.sizes(layout), self.k, self.zero)
        return Params(tensors={"levels": self._stored(levels, w.dtype)}, layout=layout)

    def _most(self, dtype: torch.dtype) -> float:
        """The largest number that levels and weights share, so that a level stays where it is when it becomes one."""
        store = _PARAM_DTYPES[self.param_dtype]
        most = min(torch.finfo(store).max, torch.finfo(dtype).max)
        return min(most, 65280.0) if {store, dtype} == {torch.float16, torch.bfloat16} else most

    def _form_of(self, codes: Tensor, dtype: torch.dtype, params: Params) -> Levels:
        table = params["levels"].sort(dim=1).values
        return Levels(layout=params.layout, dtype=dtype, codes=codes, table=table, granularity=self.granularity)

    def restored(self, w: Tensor, form: Form) -> Params:
        return Params(tensors={"levels": form.named["levels"].reshape(-1, self.k)}, layout=form.layout)

    def _stored(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        store, most = _PARAM_DTYPES[self.param_dtype], self._most(dtype)
        return levels.clamp(-most, most).to(dtype).to(store) + 0.0

    def assign(self, w: Tensor, params: Params) -> Tensor:
        x, layout = w.detach().to(compute_dtype(w.dtype)), params.layout
        ranked = params["levels"].double().sort(dim=1)
        # Row g * k + i of the codebook is level i of group g, in the order of the params.
        rows = ranked.indices + self.k * torch.arange(len(ranked.indices), device=w.device)[:, None]
        places = self._places(x, ranked.values, layout)
        flat = rows.reshape(-1)
        parts = [
            flat.index_select(0, (group * self.k + place).reshape(-1))
            for place, group in in_pieces(places, granularity_of(self.granularity), layout)
        ]
        return torch.cat(parts)

    def codebook(self, params: Params) -> Tensor:
        return params["levels"].reshape(-1, 1)

    def with_codebook(self, params: Params, codewords: Tensor, dtype: torch.dtype) -> Params:
        levels = self._stored(codewords.reshape(params["levels"].shape).to(compute_dtype(dtype)), dtype)
        return replace(params, tensors={**params.tensors, "levels": levels})

    def held_codewords(self, params: Params) -> Tensor | None:
        return params["levels"].reshape(-1) == 0 if self.zero else None
