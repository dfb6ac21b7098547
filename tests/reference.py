"""Slow references in plain float64, in the papers' letters. Nothing here imports detent.

Only the float32 rounding of stored scales is taken over from the library, because it is a promise of its own (params
are rounded to their stored dtype before anything is projected): `stored()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def stored(scale: float) -> float:
    """A number as a float32 keeps it."""
    return float(np.float32(scale))


def most(bits: int) -> int:
    """n: the largest level of the restricted grid; 8: 127, 4: 7, 3: 3, 2: 1."""
    return 2 ** (bits - 1) - 1


def on_grid(x: float, delta: float, n: int) -> float:
    """x-bar = delta * clamp(round(x / delta), -n, n), halves to even; a grid without width holds only zero."""
    if delta == 0:
        return 0.0
    k = min(max(round(x / delta), -n), n)
    return k * delta if k else 0.0


def grid(w: Array, delta: float, bits: int) -> Array:
    """The targets of a whole tensor, weight by weight."""
    return np.array([on_grid(float(x), delta, most(bits)) for x in w.reshape(-1)]).reshape(w.shape)


class RunningRange:
    """The released code's range: running extremes, 0.1 of the new and 0.9 of the old, zero always inside."""

    def __init__(self) -> None:
        self.low: float | None = None
        self.high: float | None = None

    def see(self, w: Array, bits: int) -> float:
        """Look at the weights of one forward pass; give delta."""
        low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low, self.high = 0.1 * low + 0.9 * self.low, 0.1 * high + 0.9 * self.high
        return stored(max(abs(self.low), self.high) / most(bits))


def minmax_delta(w: Array, bits: int) -> float:
    """max|w| / n."""
    return stored(float(np.abs(w).max()) / most(bits))


def mse_delta(w: Array, bits: int) -> float:
    """The one of 41 evenly spaced clipped ranges, 1 down to 0.1 times max|w|, with the least squared error."""
    full = minmax_delta(w, bits)
    best, least = full, math.inf
    for i in range(41):
        delta = stored(full * (1.0 - 0.9 * i / 40))
        error = sum((on_grid(float(x), delta, most(bits)) - float(x)) ** 2 for x in w.reshape(-1))
        if error < least:
            best, least = delta, error
    return best


def top_k(w: Array, k: int) -> Array:
    """The k largest |w| and zeros: by sorting, ties to the earlier position."""
    flat = w.reshape(-1)
    ranked = sorted(range(len(flat)), key=lambda i: (-abs(float(flat[i])), i))
    kept = set(ranked[:k])
    return np.array([float(flat[i]) if i in kept and flat[i] else 0.0 for i in range(len(flat))]).reshape(w.shape)


def paper_scale(w: Array, target: Array, lambda_s: float, eps: float) -> Array:
    """The paper's s = lambda_s (|x - x-bar| + eps)."""
    return lambda_s * (np.abs(w - target) + eps)


def scale_free(w: Array, target: Array, r: float, c: float, strength: float, gain: float, eps: float) -> Array:
    """s = (1 - strength) + strength gain (min(d, c / 2) + eps c) / r."""
    d = np.minimum(np.abs(w - target), c / 2)
    return (1 - strength) + strength * gain * (d + eps * c) / r


class SGD:
    """Heavy ball with coupled weight decay: v <- m v + (g + decay w), w <- w - lr v; v starts as the first gradient."""

    def __init__(self, lr: float, momentum: float = 0.0, decay: float = 0.0) -> None:
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self.v: Array | None = None

    def step(self, w: Array, g: Array) -> Array:
        g = g + self.decay * w
        self.v = g if self.v is None else self.momentum * self.v + g
        return w - self.lr * self.v


class AdamW:
    """Adam with decoupled weight decay; `update` is what it makes of the gradient, without the decay."""

    def __init__(self, lr: float, decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.lr, self.decay, self.betas, self.eps = lr, decay, betas, eps
        self.m: Array | float = 0.0
        self.v: Array | float = 0.0
        self.t = 0

    def update(self, g: Array) -> Array:
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return np.asarray(-self.lr * m / (np.sqrt(v) + self.eps))


def psg_paper(
    w: Array, gradients: Sequence[Array], *, bits: int, lambda_s: float, eps: float, optimizer: SGD
) -> list[Array]:
    """The weights after each step: range seen, gradient scaled, then the ordinary optimizer with unscaled decay."""
    running, path = RunningRange(), []
    for g in gradients:
        delta = running.see(w, bits)
        w = optimizer.step(w, paper_scale(w, grid(w, delta, bits), lambda_s, eps) * g)
        path.append(w)
    return path


def psg_gradient(
    w: Array,
    gradients: Sequence[Array],
    *,
    fit: Callable[[Array], tuple[Callable[[Array], Array], float, float, float]],
    fit_at: Callable[[int], bool],
    strength: Callable[[int], float],
    gain: float,
    eps: Callable[[int], float],
    clip_from: int | None,
    optimizer: SGD,
) -> list[Array]:
    """Scale-free PSG on the gradient. `fit` gives (projection, r, c, limit)."""
    path = []
    project, r, c, limit = fit(w)
    for t, g in enumerate(gradients):
        if t and fit_at(t):
            project, r, c, limit = fit(w)
        s = scale_free(w, project(w), r, c, strength(t), gain, eps(t))
        w = optimizer.step(w, s * g)
        if clip_from is not None and t >= clip_from:
            w = np.clip(w, -limit, limit)
        path.append(w)
    return path


def psg_update(
    w: Array,
    gradients: Sequence[Array],
    *,
    fit: Callable[[Array], tuple[Callable[[Array], Array], float, float, float]],
    strength: float,
    gain: float,
    eps: float,
    optimizer: AdamW,
) -> list[Array]:
    """Scale-free PSG on the step: w <- w + s(w) u - lr decay w, the decay outside s; the grid is fitted once."""
    path = []
    project, r, c, _ = fit(w)
    for g in gradients:
        s = scale_free(w, project(w), r, c, strength, gain, eps)
        w = w + s * optimizer.update(g) - optimizer.lr * optimizer.decay * w
        path.append(w)
    return path


def straight_through(
    a: Array, gradients: Sequence[Array], *, delta_of: Callable[[Array], float], bits: int, optimizer: SGD
) -> list[tuple[Array, Array]]:
    """(latent, weight) after each step: the gradient moves the latent, the forward pass sees its projection.

    The grid is fitted to the latent at the start of a step, so the new weight lies on the grid of the old latent.
    """
    path = []
    for g in gradients:
        delta = delta_of(a)
        a = optimizer.step(a, g)
        path.append((a, grid(a, delta, bits)))
    return path


def hard_threshold(
    w: Array, gradients: Sequence[Array], *, k: int, every: int, optimizer: SGD
) -> list[tuple[Array, Array | None]]:
    """(weight, mask) after each step of iterative hard thresholding with masks that only grow."""
    mask: Array | None = None
    path: list[tuple[Array, Array | None]] = []
    for t, g in enumerate(gradients):
        w = optimizer.step(w, g if mask is None else g * mask)
        if mask is not None:
            w = w * mask
        if (t + 1) % every == 0:
            w = top_k(w, k)
            mask = (w != 0).astype(np.float64)
        path.append((w, mask))
    return path
