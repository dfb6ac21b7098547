"""Mirror maps: smooth projections of a latent onto the open range of some levels, that harden as beta grows."""

from __future__ import annotations

import abc
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["MirrorMap", "SoftmaxMap", "TanhMap", "check_map", "piecewise_affine", "piecewise_affine_grid"]

Sharpness: TypeAlias = float | Tensor

_SPARE = 20.0  # of e: what a normal number that small may still be multiplied with, as gaps between levels
_SHARPEST = 1e36  # beta is cut here: a float32 holds it, and beta times zero stays zero
_DOUBLINGS = 200  # of the bracket in which an inverse is looked for
_BISECTIONS = 140
_PANELS = 64  # of 8 Gauss-Legendre points each, for the integral of a map


class MirrorMap(abc.ABC):
    """A projection P of mirror descent, applied weight by weight: `w = P(a)`, sharper as beta grows.

    The paper's conditions, which `check_map` tests: P has a derivative, is strictly increasing, and takes the real line
    onto the *open* interval from the lowest level to the highest. Then `Phi = integral of P^-1` is a mirror map, and
    the step `P^-1(w_new) = P^-1(w) - lr * gradient` is `w_new = argmin <lr * gradient, w> + D_Phi(w, w_old)`. As beta
    grows P must tend to the nearest level.

    Final subclasses are frozen dataclasses that define `forward`; the rest can be derived from it, slowly.

    In all methods `levels` holds the allowed values, ascending on the last axis, its other axes broadcasting against
    the weights; `beta` is a number > 0, or a tensor that broadcasts against the weights.

    Example:
        >>> tanh, levels = TanhMap(), torch.tensor([-1.0, 1.0])
        >>> tanh.forward(torch.tensor([-0.5, 0.0, 2.0]), levels, beta=3.0)
        tensor([-0.9051,  0.0000,  1.0000])

    Reference: Ajanthan et al., "Mirror Descent View for Neural Network Quantization", arXiv 1910.08237, section 3.
    """

    # Lets a recipe file be checked field by field although fields may hold abstract types.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

    @abc.abstractmethod
    def forward(self, a: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        """P: the weights of a latent; every level itself once rounding can tell no difference."""

    def derivative(self, a: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        """P': how the weights move with their latent, >= 0."""
        with torch.enable_grad():
            x = a.detach().clone().requires_grad_()
            seen = self.forward(x, levels, beta)
            if not seen.requires_grad:
                return torch.zeros_like(a)
            (slope,) = torch.autograd.grad(seen.sum(), x)
        return slope

    def inverse(self, w: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        """P^-1: the latent of weights inside the open range; the ends of the range give -inf and inf.

        Found by bisection in float64 unless a map knows better.
        """
        w64, levels = w.double(), levels.double()
        beta = beta.double() if isinstance(beta, Tensor) else beta
        lowest, highest = (levels[..., end].expand(w.shape) for end in (0, -1))
        low, high = lowest.clone(), highest.clone()
        reach = (highest - lowest).clamp_min(torch.finfo(torch.float64).tiny)
        for _ in range(_DOUBLINGS):
            short_low, short_high = self.forward(low, levels, beta) > w64, self.forward(high, levels, beta) < w64
            if not bool((short_low | short_high).any()):
                break
            low, high = torch.where(short_low, low - reach, low), torch.where(short_high, high + reach, high)
            reach = reach * 2
        for _ in range(_BISECTIONS):
            middle = low + (high - low) / 2
            if bool(((middle == low) | (middle == high)).all()):
                break
            above = self.forward(middle, levels, beta) > w64
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        a = low + (high - low) / 2
        a = torch.where(w64 <= lowest, -math.inf, torch.where(w64 >= highest, math.inf, a))
        return a.to(w.dtype)

    def potential(self, w: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        """The mirror map `Phi(w) = integral of P^-1` from the middle of the range to w, in float64; for study.

        Example:
            >>> half, levels = torch.tensor([0.5], dtype=torch.float64), torch.tensor([-1.0, 1.0])
            >>> entropy = (1.5 * math.log(1.5) + 0.5 * math.log(0.5)) / 2
            >>> abs(float(TanhMap().potential(half, levels, beta=1.0)) - entropy) < 1e-9
            True
        """
        w, levels = w.double(), levels.double()
        beta = beta.double() if isinstance(beta, Tensor) else beta
        middle = ((levels[..., 0] + levels[..., -1]) / 2).expand(w.shape)
        a, b = self.inverse(w, levels, beta), self.inverse(middle, levels, beta)
        # Integration by parts: P is bounded and smooth where P^-1 has poles.
        points, shares = np.polynomial.legendre.leggauss(8)
        area = torch.zeros_like(w)
        for panel in range(_PANELS):
            for point, share in zip(points.tolist(), shares.tolist(), strict=True):
                at = b + (a - b) * (panel + (point + 1) / 2) / _PANELS
                area += self.forward(at, levels, beta) * (share / 2 / _PANELS)
        return a * w - b * middle - area * (a - b)

    def bregman(self, w: Tensor, v: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        """The divergence `D(w, v) = Phi(w) - Phi(v) - Phi'(v) (w - v)` of the mirror map, in float64; for study.

        Example:
            >>> w, v = torch.tensor([0.5]), torch.tensor([-0.25])
            >>> bool(TanhMap().bregman(w, v, torch.tensor([-1.0, 1.0]), beta=2.0) > 0)
            True
        """
        w, v = w.double(), v.double()
        slope = self.inverse(v, levels.double(), beta)
        return self.potential(w, levels, beta) - self.potential(v, levels, beta) - slope * (w - v)


def _cut(beta: Sharpness) -> Sharpness:
    """Beta, or a product with it, that neither overflows a float32 nor makes a NaN of zero."""
    return beta.clamp(-_SHARPEST, _SHARPEST) if isinstance(beta, Tensor) else min(beta, _SHARPEST)


def _as_number(compare: Callable[..., Tensor], a: Tensor, b: float | Tensor) -> Tensor:
    """A comparison as 0.0 and 1.0 in the dtype of a: choosing by arithmetic takes a tenth of what `where` takes."""
    if torch.is_grad_enabled() and a.requires_grad:
        return compare(a, b).to(a.dtype)
    return compare(a, b, out=a.new_empty(0))


def _by_numpy(function: Callable[..., Any], x: Tensor) -> Tensor | None:
    """Write over x what a function of NumPy makes of it, if it may; on a CPU they take a seventh of the time."""
    if x.requires_grad or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    function(x.numpy(), out=x.numpy())
    return x


def _tanh(x: Tensor) -> Tensor:
    """tanh; may write over x."""
    found = _by_numpy(np.tanh, x)
    return torch.tanh(x) if found is None else found


def _exp(x: Tensor) -> Tensor:
    """exp of a number <= 0 (or taken for 0) that is zero well before it would be subnormal.

    Weights next to the level 0 would otherwise stay subnormal for a good part of a training, and convolutions over a
    few percent of those take fifty times as long on a CPU.
    """
    smallest = math.log(torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32).tiny) + _SPARE
    above, x = _as_number(torch.ge, x, smallest), x.clamp(smallest, 0)
    found = _by_numpy(np.exp, x)
    return (torch.exp(x) if found is None else found) * above


def _add_up(levels: Tensor) -> bool:
    """Whether a level and the gap to the next are that one, to the last bit; on a CPU, else it is waited for."""
    return levels.device.type == "cpu" and torch.equal(levels[..., :-1] + levels.diff(), levels[..., 1:])


def _two(a: Tensor, levels: Tensor, slope: Sharpness) -> Tensor:
    """`c + h tanh(slope (a - c))` for two levels c - h and c + h: what both shipped maps are for two levels."""
    low, high = levels.unbind(-1)
    slope = _cut(slope)  # beta times half a wide gap
    # Looked at on a CPU only: elsewhere it would have to be waited for.
    if levels.device.type == "cpu" and bool((low == -high).all()):
        return _tanh(slope * a) * high
    t = _tanh(slope * (a - (low + high) / 2))
    w = (low + high) / 2 + (high - low) / 2 * t
    # A level itself where rounding can tell no difference, whatever its sum of middle and half is.
    up, down = _as_number(torch.ge, t, 1.0), _as_number(torch.le, t, -1.0)
    return w * (1 - up - down) + up * high + down * low


def _two_inverse(w: Tensor, levels: Tensor, slope: Sharpness) -> Tensor:
    low, high = levels.unbind(-1)
    ratio = ((w - low) / (high - w)).clamp_min(0)
    return (low + high) / 2 + torch.where(w >= high, math.inf, torch.log(ratio)) / (2 * slope)


def _nearest(a: Tensor, levels: Tensor) -> Tensor:
    """The nearest level; half-way the lower one."""
    found = levels[..., 0].expand(a.shape)
    exact = _add_up(levels)
    for low, high in itertools.pairwise(levels.unbind(-1)):
        above = _as_number(torch.gt, a, (low + high) / 2)
        found = found + (high - low) * above if exact else found * (1 - above) + high * above
    return found


@dataclass(frozen=True, kw_only=True)
class TanhMap(MirrorMap):
    """One tanh a threshold: `w = q_1 + sum_j h_j (1 + tanh(beta (a - t_j)))`.

    Here t_j is the middle and h_j half the gap of two neighbouring levels. For {-1, 1} it is `tanh(beta a)`, for
    {-1, 0, 1} the shifted tanh `(tanh(beta (a + 1/2)) + tanh(beta (a - 1/2))) / 2`.

    Example:
        >>> TanhMap().forward(torch.tensor([-0.9, 0.6]), torch.tensor([-1.0, 0.0, 1.0]), beta=10.0)
        tensor([-0.9997,  0.8808])

    Reference: Ajanthan et al., arXiv 1910.08237, examples 1 and 3.
    """

    def forward(self, a: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        beta = _cut(beta)
        if levels.shape[-1] == 2:
            return _two(a, levels, beta)
        # What is saturated must be its level exactly: where gaps do not add up to that, from the nearest level on.
        if _add_up(levels):
            w = levels[..., 0]
            for low, high in itertools.pairwise(levels.unbind(-1)):
                w = w + (high - low) / 2 * (1 + _tanh(beta * (a - (low + high) / 2)))
            return w
        w = _nearest(a, levels)
        for low, high in itertools.pairwise(levels.unbind(-1)):
            away = a - (low + high) / 2
            # Not abs: at the threshold itself that has derivative 0, and this one is half the slope of the map.
            side = 1 - 2 * _as_number(torch.gt, away, 0.0)
            small = _exp(2 * (side * (beta * away)))
            w = w + side * ((high - low) * (small / (1 + small)))
        return w

    def derivative(self, a: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        beta = _cut(beta)
        slope = torch.zeros_like(a)
        for low, high in itertools.pairwise(levels.unbind(-1)):
            slope = slope + (high - low) / 2 * (1 - _tanh(beta * (a - (low + high) / 2)).square())
        return beta * slope

    def inverse(self, w: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        if levels.shape[-1] == 2:
            return _two_inverse(w, levels, _cut(beta))
        return super().inverse(w, levels, beta)


@dataclass(frozen=True, kw_only=True)
class SoftmaxMap(MirrorMap):
    """The mean level under softmax weights: `w = sum_q u_q q` with `u = softmax(-beta (a - q)^2 / 2)` over the levels.

    The published form keeps a copy of every weight a level; here one latent serves all levels, which for two levels is
    the same algorithm, and is `c + h tanh(beta h (a - c))` for levels c - h and c + h: with {-1, 1}, `tanh(beta a)`.

    Example:
        >>> levels = torch.tensor([-1.0, 0.25, 2.0])
        >>> SoftmaxMap().forward(torch.tensor([0.2, 1.5]), levels, beta=40.0)
        tensor([0.2500, 2.0000])

    Reference: Ajanthan et al., arXiv 1910.08237, example 2; Ajanthan et al., "PMF", arXiv 1812.04353.
    """

    def forward(self, a: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        beta = _cut(beta)
        if levels.shape[-1] == 2:
            return _two(a, levels, beta * self._half(levels))
        nearest, first, _ = self._moments(a, levels, beta)
        return nearest + first

    def derivative(self, a: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        beta = _cut(beta)
        if levels.shape[-1] == 2:
            half = self._half(levels)
            steep = _cut(beta * half)
            turns = steep * (2 * a - (levels[..., 0] + levels[..., 1]))
            return steep * (torch.sigmoid(turns) * torch.sigmoid(-turns)) * (4 * half)
        _, first, second = self._moments(a, levels, beta)
        return beta * (second - first.square()).clamp_min(0)

    def inverse(self, w: Tensor, levels: Tensor, beta: Sharpness) -> Tensor:
        if levels.shape[-1] == 2:
            return _two_inverse(w, levels, _cut(beta) * self._half(levels))
        return super().inverse(w, levels, beta)

    @staticmethod
    def _half(levels: Tensor) -> Tensor:
        return (levels[..., 1] - levels[..., 0]) / 2

    @staticmethod
    def _moments(a: Tensor, levels: Tensor, beta: Sharpness) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest level, and the first two moments of the levels about it; one level at a time to save memory."""
        nearest = _nearest(a, levels)
        away = a - nearest
        total, first, second = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a)
        before = None
        for q in levels.unbind(-1):
            off = q - nearest
            # The exponent less that of the nearest level: never positive, exactly zero for that level, no cancellation.
            weight = _exp(off * (away - off / 2) * beta)
            if before is not None:  # a group with fewer levels than others repeats some: each counts once
                weight = weight * _as_number(torch.ne, q, before)
            before = q
            total = total + weight
            weight = weight * off
            first = first + weight
            second = second + weight * off
        return nearest, first / total, second / total


def piecewise_affine(a: Tensor, levels: Tensor, inverse_slope: float) -> Tensor:
    """PARQ's proximal map: `clamp(m + (a - m) / inverse_slope, q, q')` between neighbouring levels q, q' of middle m.

    At inverse slope 1 it leaves a weight inside the range alone, at 0 it is the nearest level. It is flat at the
    levels, so it is no mirror map.

    Example:
        >>> piecewise_affine(torch.tensor([-1.2, 0.1, 0.9]), torch.tensor([-1.0, 1.0]), 0.5)
        tensor([-1.0000,  0.2000,  1.0000])

    Reference: Jin et al., "PARQ: Piecewise-Affine Regularized Quantization", arXiv 2503.15748.
    """
    if inverse_slope <= 0:
        return _nearest(a, levels)
    w = levels[..., 0].expand(a.shape)
    for low, high in itertools.pairwise(levels.unbind(-1)):
        middle = (low + high) / 2
        piece = torch.minimum(torch.maximum(middle + (a - middle) / inverse_slope, low), high)
        above = _as_number(torch.gt, a, low)
        w = w * (1 - above) + piece * above
    return w


def piecewise_affine_grid(
    a: Tensor, spacing: Tensor, count: int, inverse_slope: float, out: Tensor | None = None
) -> Tensor:
    """`piecewise_affine` for levels that are evenly spaced about 0: the cell is found by rounding down.

    Args:
        a: the weights.
        spacing: distance of neighbouring levels, >= 0; broadcasts against a.
        count: number of levels, >= 2.
        inverse_slope: in (0, 1].
        out: where to write the result, of the dtype of a and no part of it; a new tensor by default.

    Example:
        >>> piecewise_affine_grid(torch.tensor([-1.2, 0.1, 0.9]), torch.tensor(2.0), 2, 0.5)
        tensor([-1.0000,  0.2000,  1.0000])
    """
    # In cells: from 0, or from half a cell below where 0 is no level. A dead group ends at 0.
    shift = 0.0 if count % 2 else 0.5
    first = shift - (count - 1) / 2
    share = torch.div(a, torch.where(spacing > 0, spacing, 1.0), out=out)
    share = share.add_(shift) if shift else share
    cell = share.floor().clamp_(first, first + count - 2)
    share.sub_(cell).sub_(0.5).mul_(1 / inverse_slope).add_(0.5).clamp_(0, 1).add_(cell)
    share = share.sub_(shift) if shift else share
    return share.mul_(spacing).add_(0.0)


# --- the conditions -----------------------------------------------------------------------------------------------

_SETS = ((-1.0, 1.0), (-1.0, 0.0, 1.0), (-0.75, 0.25), (-2.0, -0.5, 0.25, 3.0), tuple(0.25 * k for k in range(-3, 4)))


def check_map(mirror: MirrorMap) -> None:
    """Check the conditions under which a projection makes a mirror map, on samples.

    Strictly increasing, onto the open range of the levels, with an inverse and a derivative that are its own; hardening
    to the nearest level as beta grows; finite for beta up to 1e35 and latents up to 1e30; the same for levels given
    for each row. And that it is a frozen dataclass, and takes more than two levels.

    Args:
        mirror: the map.

    Raises:
        ValueError: the first condition that fails, in a sentence.

    Example:
        >>> check_map(TanhMap())
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Clip(MirrorMap):
        ...     def forward(self, a, levels, beta):
        ...         return a.clamp(levels[..., 0], levels[..., -1])
        >>> check_map(Clip())
        Traceback (most recent call last):
        ...
        ValueError: Clip() makes no mirror map of (-1.0, 1.0) at beta 0.5: it is not strictly increasing (near a = ...
    """
    _refuse_unwritable(mirror)
    for levels in _SETS:
        try:
            mirror.forward(torch.zeros(3, dtype=torch.float64), torch.tensor(levels, dtype=torch.float64), 1.0)
        except Exception as error:
            many = f"{len(levels)} levels {levels}"
            raise ValueError(f"{mirror!r} does not take {many} on the last axis of `levels`: {error}") from error
        for beta in (0.5, 2.0, 6.0):
            complaint = _complaint(mirror, torch.tensor(levels, dtype=torch.float64), beta)
            if complaint:
                raise ValueError(f"{mirror!r} makes no mirror map of {levels} at beta {beta}: {complaint}")
        complaint = _at_the_limit(mirror, torch.tensor(levels, dtype=torch.float64))
        if complaint:
            raise ValueError(f"{mirror!r} makes no mirror map of {levels}: {complaint}")
    rows = torch.tensor([[-1.0, 1.0], [-0.5, 2.0]], dtype=torch.float64)
    a = torch.linspace(-2, 3, 14, dtype=torch.float64).reshape(2, 7)
    together = mirror.forward(a, rows.unsqueeze(1), 2.0)
    apart = torch.stack([mirror.forward(a[i], rows[i], 2.0) for i in range(2)])
    if together.shape != apart.shape or not torch.allclose(together, apart, rtol=1e-9, atol=1e-12):
        raise ValueError(f"{mirror!r} is no mirror map: levels given for each row do not act row by row")


def _complaint(mirror: MirrorMap, levels: Tensor, beta: float) -> str | None:
    """What is wrong with P at a moderate beta, or `None`."""
    low, high = float(levels[0]), float(levels[-1])
    # Half a unit around the range: further out even a gentle map has saturated in float64.
    a = torch.linspace(low - 0.5, high + 0.5, 403, dtype=torch.float64)
    # A sharp map of steps lies on its levels there, by rounding alone: erf(6) is 1 in float64.
    rounding = 1e-14 * (high - low) if beta * (high - low + 1.0) > 5.0 else -1.0
    w: Any = mirror.forward(a, levels, beta)
    if not isinstance(w, Tensor) or w.shape != a.shape or w.dtype != a.dtype:
        return "it does not keep shape and dtype"
    if not bool(torch.isfinite(w).all()):
        return "it is not finite"
    rounded = (w.unsqueeze(-1) - levels).abs().amin(-1) <= rounding
    flat = ((w[1:] <= w[:-1]) & ~(rounded[1:] & rounded[:-1])).nonzero()
    if len(flat):
        return f"it is not strictly increasing (near a = {float(a[int(flat[0])]):.3g}), so it has no inverse"
    if bool((((w <= low) | (w >= high)) & ~rounded).any()):
        return f"it reaches or leaves the ends of the open range ({low}, {high}) at a finite latent"
    ends = mirror.forward(torch.tensor([-1e12, 1e12], dtype=torch.float64), levels, beta)
    short = max(abs(float(ends[0]) - low), abs(float(ends[1]) - high))
    if not short <= 1e-6 * (high - low):
        return f"it is not onto the open range ({low}, {high}): it stays {short:.3g} short of an end"
    back = mirror.inverse(w, levels, beta)
    slope = mirror.derivative(a, levels, beta)
    # An error of one rounding of w is 1 / P' times as large in a.
    allowed = 1e-7 + 1e-14 * (high - low) / slope.clamp_min(1e-300)
    if not bool((((back - a).abs() <= allowed) | rounded).all()):
        return f"inverse(forward(a)) is off by {float((back - a).abs().max()):.3g}"
    if float(slope.min()) < 0:
        return "its derivative is negative somewhere"
    step = 1e-6
    numeric = (mirror.forward(a + step, levels, beta) - mirror.forward(a - step, levels, beta)) / (2 * step)
    if not torch.allclose(slope, numeric, rtol=1e-4, atol=1e-6 * (high - low) * beta):
        return f"its derivative is off by {float((slope - numeric).abs().max()):.3g}"
    return None


def _at_the_limit(mirror: MirrorMap, levels: Tensor) -> str | None:
    """What is wrong with P at a huge beta or a huge latent, or `None`."""
    a = torch.linspace(float(levels[0]) - 1, float(levels[-1]) + 1, 101, dtype=torch.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    for dtype in (torch.float32, torch.float64):
        odd = torch.cat([torch.tensor([0.0, 1e-30, -1e-30, 1e30, -1e30]), levels, middles, a]).to(dtype)
        for beta in (1e-6, 1.0, 1e4, 1e35):
            for w in (mirror.forward(odd, levels.to(dtype), beta), mirror.derivative(odd, levels.to(dtype), beta)):
                if not bool(torch.isfinite(w).all()):
                    return f"at beta {beta:g} it is not finite in {dtype}"
    clear = a[((a[:, None] - middles).abs() > 1e-3).all(1)]
    gap = float((mirror.forward(clear, levels, 1e9) - _nearest(clear, levels)).abs().max())
    if not gap <= 1e-6:
        return f"at beta 1e9 it is still {gap:.3g} away from the nearest level"
    return None


def _refuse_unwritable(mirror: MirrorMap) -> None:
    """Recipes write, compare and hash a map by its fields, which a class has only if it is decorated itself."""
    name = type(mirror).__name__
    made = vars(type(mirror)).get("__dataclass_params__")
    if made is None or not made.frozen:
        raise ValueError(
            f"{name}: a map of one's own must be a frozen dataclass, so that recipes can write and compare it"
        )
    try:
        hash(mirror)
    except TypeError as error:
        raise ValueError(f"{name}: the fields of a map must be numbers, words or tuples of them: {error}") from error


def checked(mirror: MirrorMap) -> MirrorMap:
    """The map itself, its conditions checked once.

    Raises:
        ValueError: as `check_map`.
    """
    _refuse_unwritable(mirror)  # before it is looked up: by fields that it does not have, all of its class are equal
    return _checked(mirror)


@functools.lru_cache(maxsize=64)
def _checked(mirror: MirrorMap) -> MirrorMap:
    check_map(mirror)
    return mirror
