"""Slow references in plain float64, in the papers' letters. Nothing here imports detent.

Only the float32 rounding of stored scales is taken over from the library, because it is a promise of its own (params
are rounded to their stored dtype before anything is projected): `stored()`.
"""

from __future__ import annotations

import itertools
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


def spread_of_itself(g: Array, factor: Array) -> float:
    """F = sum g^2 f / sum g^2, at least 1 / 16, over a whole tensor, entry by entry."""
    above = below = 0.0
    for each, f in zip(g.ravel().tolist(), factor.ravel().tolist(), strict=True):
        above, below = above + each * each * f, below + each * each
    return max(above / below, 1 / 16) if below else 1.0


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


def psg_of_itself(
    w: Array,
    gradients: Sequence[Array],
    *,
    fit: Callable[[Array], tuple[Callable[[Array], Array], float, float, float]],
    rate: Callable[[int], float],
    eps: Callable[[int], float],
    optimizer: SGD | AdamW,
) -> list[Array]:
    """PSG that sets its gain: plain until 0.4 of training, fitted then, in full strength at half of the rest.

    Under SGD on the gradient, else on the step (without its decoupled decay); clipped from where it begins. F is found
    where it begins and in every tenth step from `begin`, the gain in every step: clamp(heat, 1 / F, 4 / F).
    """
    path, total = [], len(gradients)
    begin, spread = round(0.4 * total), 1.0
    project, r, c, limit = fit(w)
    for t, g in enumerate(gradients):
        optimizer.lr = rate(t)
        strength = min(max(t - begin, 0) / (0.5 * (total - begin)), 1.0)
        if t == begin + 1:
            project, r, c, limit = fit(w)
        heat = max(rate(i) for i in range(t + 1)) / rate(t)
        move = g if isinstance(optimizer, SGD) else optimizer.update(g)
        s = np.ones_like(w)
        if strength > 0:
            factor = scale_free(w, project(w), r, c, 1.0, 1.0, eps(t))
            if t == begin + 1 or (t - begin) % 10 == 0:
                spread = spread_of_itself(move, factor)
            s = 1 - strength + strength * min(max(heat, 1 / spread), 4 / spread) * factor
        if isinstance(optimizer, SGD):
            w = optimizer.step(w, s * g)
        else:
            w = w + s * move - optimizer.lr * optimizer.decay * w
        if strength > 0:
            w = np.clip(w, -limit, limit)
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


# --- sparse sets -------------------------------------------------------------------------------------------------


def positions(layout: tuple[tuple[int, ...], int, int]) -> list[list[tuple[int, int, int]]]:
    """For each output channel its inputs as (input channel, kernel position, place in the flattened tensor), in order.

    A layout is (shape, axis of the output channels, groups of a transposed convolution). PyTorch keeps convolutions as
    (out, in, *kernel) and transposed ones as (in, out / groups, *kernel), group g of the outputs reading group g of the
    inputs.
    """
    shape, axis, groups = layout
    kernel = math.prod(shape[2:])
    if len(shape) < 2:
        return [[(0, 0, i)] for i in range(math.prod(shape))]
    if axis == 0:
        return [
            [(i, p, (o * shape[1] + i) * kernel + p) for i in range(shape[1]) for p in range(kernel)]
            for o in range(shape[0])
        ]
    inputs, outputs = shape[0] // groups, shape[1]
    return [
        [(i, p, ((g * inputs + i) * outputs + o) * kernel + p) for i in range(inputs) for p in range(kernel)]
        for g in range(groups)
        for o in range(outputs)
    ]


def nm_blocks(layout: tuple[tuple[int, ...], int, int], m: int, along: str) -> list[list[int]]:
    """Blocks of at most m places of the flattened tensor, along the inputs of each output channel."""
    blocks = []
    for row in positions(layout):
        lines: dict[int, list[int]] = {}
        for _, p, at in row:
            lines.setdefault(p if along == "channels" else 0, []).append(at)
        for line in lines.values():
            blocks += [line[i : i + m] for i in range(0, len(line), m)]
    return blocks


def structured_groups(
    layout: tuple[tuple[int, ...], int, int], group: str, block: tuple[int, int] | None = None
) -> list[list[int]]:
    """Groups of places of the flattened tensor: rows, columns, input channels or tiles of the GEMM matrix."""
    found: dict[tuple[int, int], list[int]] = {}
    for o, row in enumerate(positions(layout)):
        for j, (i, _, at) in enumerate(row):
            if group == "block":
                assert block is not None
                key = (o // block[0], j // block[1])
            else:
                key = {"filter": (o, 0), "column": (0, j), "channel": (0, i)}[group]
            found.setdefault(key, []).append(at)
    return [found[key] for key in sorted(found)]


def keep_in_blocks(gain: Array, blocks: Sequence[Sequence[int]], n: int) -> set[int]:
    """The n places of the largest gain in each block, ties to the earlier one of the block."""
    kept: set[int] = set()
    for block in blocks:
        kept.update(sorted(block, key=lambda at: -float(gain[at]))[:n])
    return kept


def keep_groups(gain: Array, groups: Sequence[Sequence[int]], count: int) -> set[int]:
    """The places of the `count` groups of the largest sum of gains, ties to the earlier group."""
    sums = [math.fsum(float(gain[at]) for at in group) for group in groups]
    ranked = sorted(range(len(groups)), key=lambda g: -sums[g])
    return {at for g in ranked[:count] for at in groups[g]}


def zero_but(w: Array, kept: set[int]) -> Array:
    """w where kept, zero elsewhere."""
    flat = w.reshape(-1)
    return np.array([float(flat[i]) if i in kept and flat[i] else 0.0 for i in range(flat.size)]).reshape(w.shape)


def nearest_on_levels(w: Array, levels: Sequence[Sequence[float]], patterns: Sequence[set[int]]) -> float:
    """Least squared distance over all patterns and all ways of putting their places on levels: nothing is clever here.

    `levels[i]` are the values that place i may take if it is kept.
    """
    flat, least = [float(x) for x in w.reshape(-1)], math.inf
    for kept in patterns:
        order = sorted(kept)
        lost = sum(x * x for i, x in enumerate(flat) if i not in kept)
        for values in itertools.product(*(levels[i] for i in order)):
            least = min(least, lost + sum((flat[i] - v) ** 2 for i, v in zip(order, values, strict=True)))
    return least


# --- ADMM, in the letters of arXiv 1903.09769: W, Z, U, rho -------------------------------------------------------


class Adam:
    """Adam without decay."""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.inner = AdamW(lr, 0.0, betas, eps)

    def step(self, w: Array, g: Array) -> Array:
        return w + self.inner.update(g)


def admm(
    W: Array,
    gradients: Sequence[Array],
    *,
    project: Callable[[Array], Array],
    rho: float,
    growth: float,
    rho_max: float,
    update_at: Callable[[int], bool],
    until: int,
    optimizer: SGD | Adam,
    mask_after: bool,
) -> list[dict[str, Array | float]]:
    """W, Z, U, rho after each step; from `until` on W alone, mapped and, if asked for, with its zeros held.

    `project` fits the target to what it is given: the projection of W + U and that of W each have a fit of their own.
    """
    Z, U = project(W), np.zeros_like(W)
    mask: Array | None = None
    path: list[dict[str, Array | float]] = []
    for t, g in enumerate(gradients):
        if t < until:
            W = optimizer.step(W, g + rho * (W - Z + U))
            if update_at(t) or t + 1 == until:
                Z = project(W + U)
                U = U + W - Z
                rho, old = min(rho * growth, rho_max), rho
                U = U * (old / rho)
            if t + 1 == until:
                W = project(W)
                mask = (W != 0).astype(np.float64) if mask_after else None
        else:
            W = optimizer.step(W, g if mask is None else g * mask)
            W = W if mask is None else W * mask
        path.append({"W": W, "Z": Z, "U": U, "rho": rho})
    return path


def freeze_rounds(
    W: Array,
    gradients: Sequence[Array],
    *,
    project: Callable[[Array], Array],
    rounds: dict[int, float],
    optimizer: SGD,
) -> list[tuple[Array, Array]]:
    """(W, frozen) after each step: at the end of step t the share rounds[t] of smallest |W - project(W)| is snapped."""
    frozen = np.zeros(W.shape, dtype=bool)
    path = []
    for t, g in enumerate(gradients):
        held = W
        W = optimizer.step(W, np.where(frozen, 0.0, g))
        W = np.where(frozen, held, W)
        if t in rounds:
            q = project(W)
            distance = [-1.0 if f else abs(float(a - b)) for a, b, f in zip(W.flat, q.flat, frozen.flat, strict=True)]
            nearest = sorted(range(W.size), key=lambda i: (distance[i], i))[: round(rounds[t] * W.size)]
            for i in nearest:
                if not frozen.flat[i]:
                    W.flat[i], frozen.flat[i] = q.flat[i], True
            frozen, W = frozen.copy(), W.copy()
        path.append((W, frozen.copy()))
    return path


# --- mirror descent and its neighbours, in the letters of arXiv 1910.08237: w, w~ (here a), u, beta ------------------


def tanh_map(a: Array, beta: float) -> Array:
    """P on {-1, 1}."""
    return np.tanh(beta * a)


def shifted_tanh(a: Array, beta: float) -> Array:
    """P on {-1, 0, 1}."""
    return (np.tanh(beta * (a + 0.5)) + np.tanh(beta * (a - 0.5))) / 2


def shifted_tanh_inverse(w: Array, beta: float) -> Array:
    """Its inverse in closed form: with A = tanh(beta a), B = tanh(beta / 2), w = A (1 - B^2) / (1 - A^2 B^2)."""
    B = math.tanh(beta / 2)
    rest, BB = 1 - B * B, B * B
    A = [0.0 if x == 0 else (-rest + math.sqrt(rest**2 + 4 * x * x * BB)) / (2 * x * BB) for x in w.flat]
    return np.arctanh(np.array(A)).reshape(w.shape) / beta


def softmax_weights(a: float, levels: Sequence[float], beta: float) -> list[float]:
    """u of one latent: softmax of -beta (a - q)^2 / 2 over the levels."""
    z = [-beta * (a - q) ** 2 / 2 for q in levels]
    e = [math.exp(x - max(z)) for x in z]
    return [x / sum(e) for x in e]


def softmax_map(a: Array, levels: Sequence[float], beta: float) -> Array:
    """w = sum_q u_q q, weight by weight."""
    means = [sum(u * q for u, q in zip(softmax_weights(x, levels, beta), levels, strict=True)) for x in a.flat]
    return np.array(means).reshape(a.shape)


def tanh_jacobian(a: Array, levels: Sequence[float], beta: float) -> Array:
    """GD-tanh: beta (1 - w^2), for three levels beta (2 - tanh^2 - tanh^2) / 2."""
    if len(levels) == 2:
        return beta * (1 - np.tanh(beta * a) ** 2)
    return beta * (2 - np.tanh(beta * (a + 0.5)) ** 2 - np.tanh(beta * (a - 0.5)) ** 2) / 2


def softmax_jacobian(a: Array, levels: Sequence[float], beta: float, published: bool) -> Array:
    """dw/da through the matrix J = beta (diag(u) - u u^T), or the released beta (I - u u^T): q^T J q."""
    q = np.array(levels)
    found = []
    for x in a.flat:
        u = np.array(softmax_weights(float(x), levels, beta))
        J = beta * ((np.eye(len(u)) if published else np.diag(u)) - np.outer(u, u))
        found.append(float(q @ J @ q))
    return np.array(found).reshape(a.shape)


def beta_by_loop(steps: int, scale: float, interval: int, most: float) -> list[float]:
    """Beta of every step as the released loop makes it: the test on the iteration comes after the step."""
    beta, used = 1.0, []
    for iteration in range(steps):
        used.append(beta)
        if iteration % interval == 0:
            beta = min(beta * scale, most)
    return used


def latent_descent(
    a: Array,
    gradients: Sequence[Array],
    *,
    see: Callable[[Array, int], Array],
    slope: Callable[[Array, int], Array] | None,
    optimizer: SGD | Adam,
) -> list[tuple[Array, Array]]:
    """(latent, what step t + 1 sees) after each step t; the gradient unchanged (mirror descent) or times a slope."""
    path = []
    for t, g in enumerate(gradients):
        a = optimizer.step(a, g if slope is None else slope(a, t) * g)
        path.append((a, see(a, t + 1)))
    return path


def softmax_copies(
    a: Array,
    gradient: Callable[[int, Array], Array],
    *,
    steps: int,
    betas: Sequence[float],
    optimizers: Sequence[SGD | Adam],
) -> list[Array]:
    """MD-softmax-S as published, on {-1, 1}: an auxiliary copy of every weight for each level; the w of every step.

    The copy of level q gets q dL/dw unchanged, each copy from an optimizer of its own.
    """
    q = (-1.0, 1.0)
    copies = [level * a for level in q]
    path = []
    for t in range(steps):
        z = [betas[t] * copy for copy in copies]
        e = [np.exp(x - np.maximum(*z)) for x in z]
        w = sum(level * x for level, x in zip(q, e, strict=True)) / sum(e)
        path.append(np.asarray(w))
        g = gradient(t, path[-1])
        copies = [o.step(copy, level * g) for o, copy, level in zip(optimizers, copies, q, strict=True)]
    return path


def primal_tanh(
    w: Array, gradient: Callable[[int, Array], Array], *, steps: int, betas: Sequence[float], G: SGD | Adam
) -> list[Array]:
    """MD-tanh as published: e = (1 + w) / (1 - w + 1e-20) exp(-2 beta G), w = (e - 1) / (e + 1 + 1e-20)."""
    path = []
    for t in range(steps):
        step = -G.step(np.zeros_like(w), gradient(t, w))
        e = (1 + w) / (1 - w + 1e-20) * np.exp(-2 * betas[t] * step)
        w = (e - 1) / (e + 1 + 1e-20)
        path.append(w)
    return path


def bregman_step(w: float, pull: float, inverse: Callable[[Array], Array], ends: tuple[float, float]) -> float:
    """argmin over x in the open range of pull x + D_Phi(x, w), Phi = integral of the inverse: ternary search.

    D_Phi(x, w) is the integral of inverse(v) - inverse(w) from w to x, by the midpoint rule.
    """
    there = float(inverse(np.array([w]))[0])

    def objective(x: float) -> float:
        v = w + (x - w) * (np.arange(300) + 0.5) / 300
        return pull * x + float(np.sum(inverse(v) - there)) * (x - w) / 300

    low, high = ends
    for _ in range(40):
        third = (high - low) / 3
        if objective(low + third) < objective(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


def parq_map(a: Array, levels: Sequence[float], rho: float) -> Array:
    """PARQ's proximal map: between neighbouring levels a line of slope 1 / rho through their middle."""
    found = []
    for x in a.flat:
        if x <= levels[0] or x >= levels[-1]:
            found.append(levels[0] if x <= levels[0] else levels[-1])
            continue
        i = max(k for k in range(len(levels) - 1) if levels[k] <= x)
        middle = (levels[i] + levels[i + 1]) / 2
        found.append(min(max(middle + (x - middle) / rho, levels[i]), levels[i + 1]))
    return np.array(found).reshape(a.shape)


# --- levels: binary, ternary, powers of two, learned, the ADMM line's grids ---------------------------------------


def nearest(x: float, levels: Sequence[float]) -> float:
    """The nearest of some levels by looking at all of them; half-way the lower one."""
    return min(sorted(levels), key=lambda level: abs(x - level))


def squared_error(w: Array, levels: Sequence[float]) -> float:
    """Sum of squared distances to the nearest level."""
    return sum((nearest(float(x), levels) - float(x)) ** 2 for x in w.reshape(-1))


def binary_alpha(w: Array) -> float:
    """alpha = mean|w|, from argmin over alpha of sum (w - alpha sign(w))^2."""
    return stored(sum(abs(float(x)) for x in w.reshape(-1)) / w.size)


def ternary_alpha(w: Array) -> tuple[float, float]:
    """(a, error) of the best {-a, 0, a}: for every k the k largest |w| on their mean, all errors added up anew."""
    size = sorted((abs(float(x)) for x in w.reshape(-1)), reverse=True)
    best = (0.0, sum(x * x for x in size))
    for k in range(1, len(size) + 1):
        a = sum(size[:k]) / k
        error = sum((x - a) ** 2 for x in size[:k]) + sum(x * x for x in size[k:])
        if error < best[1]:
            best = (a, error)
    return best


def alternate(w: Array, n: int, rounds: int, zero: bool = True) -> tuple[float, list[float]]:
    """Q = clip(round(V / alpha)), alpha = <V, Q> / <Q, Q>, in turn; gives alpha and the error after every round."""
    v = [float(x) for x in w.reshape(-1)]
    live = [abs(x) for x in v if x]
    alpha = sum(live) / len(live) / max(n / 2, 1)
    errors = []
    for _ in range(rounds):
        q = []
        for x in v:
            k = min(max(round(abs(x) / alpha), 0 if zero else 1), n)
            q.append(-k if x < 0 else k)
        alpha = sum(x * k for x, k in zip(v, q, strict=True)) / sum(k * k for k in q)
        errors.append(sum((x - alpha * k) ** 2 for x, k in zip(v, q, strict=True)))
    return alpha, errors


def interval(w: Array, n: int) -> float:
    """The best of 201 scales from 1.1 down to 0.9 times max|w| / n, in steps of a thousandth."""
    full = stored(float(np.abs(w).max()) / n)
    best, least = full, math.inf
    for i in range(201):
        q = stored(full * (1.1 - i / 1000))
        error = squared_error(w, [q * k for k in range(-n, n + 1)])
        if error < least:
            best, least = q, error
    return best


def powers(top: int, n: int, zero: bool = True) -> list[float]:
    """-2^top .. -2^(top-n+1), perhaps 0, 2^(top-n+1) .. 2^top."""
    sizes = [math.ldexp(1.0, top - i) for i in range(n)]
    return sorted([-x for x in sizes] + sizes + ([0.0] if zero else []))


def power_top(w: Array) -> int:
    """floor(log2(4 max|w| / 3)), by trying exponents."""
    s = float(np.abs(w).max())
    return max(j for j in range(-200, 200) if math.ldexp(1.0, j) <= 4 * s / 3)


def best_levels(w: Array, k: int, pinned: bool = False) -> float:
    """The least squared error of k levels (one of them 0 if pinned) by dynamic programming over sorted numbers.

    cost[i][j] is that of one level for numbers i to j - 1; a cluster served by the pinned 0 costs the sum of squares.
    """
    x = sorted(float(v) for v in w.reshape(-1))
    count = len(x)

    def cost(i: int, j: int, at_zero: bool) -> float:
        mean = 0.0 if at_zero or i == j else sum(x[i:j]) / (j - i)
        return sum((v - mean) ** 2 for v in x[i:j])

    free = [[cost(i, j, False) for j in range(count + 1)] for i in range(count + 1)]
    # least[used, spent][j]: error of the first j numbers with `used` levels, the zero among them if spent is 1.
    least = {(0, 0): [0.0] + [math.inf] * count}
    for used in range(1, k + 1):
        for spent in (0, 1):
            row = [math.inf] * (count + 1)
            for j in range(count + 1):
                before = least.get((used - 1, spent))
                if before is not None:
                    row[j] = min(row[j], *(before[i] + free[i][j] for i in range(j + 1)))
                before = least.get((used - 1, 0)) if spent and pinned else None
                if before is not None:
                    row[j] = min(row[j], *(before[i] + cost(i, j, True) for i in range(j + 1)))
            least[used, spent] = row
    return least[k, int(pinned)][count]


# --- codebooks (KQ, arXiv 2003.05148) ----------------------------------------------------------------------------


def nearest_codewords(units: Array, book: Array) -> tuple[list[int], Array]:
    """Index of the nearest codeword of every unit, ties to the first, and the unit's squared distance to it."""
    index, far = [], []
    for unit in units:
        distances = [float(((unit - codeword) ** 2).sum()) for codeword in book]
        index.append(distances.index(min(distances)))
        far.append(min(distances))
    return index, np.array(far)


def kq_bits(
    shapes: Sequence[Sequence[int]], k: int, *, shared: bool, book_bits: int = 6, other_bits: int = 32
) -> float:
    """[sum N_l ceil(log2 K) + sum K k^2 b + other] / weights over convolutions (out, in, k, k).

    The first convolution and 1x1 ones are `other`; the scale of a codebook is left out, as in the notes.
    """
    index = book = other = weights = 0
    sizes = set()
    for i, (out, into, *kernel) in enumerate(shapes):
        length = math.prod(kernel)
        weights += out * into * length
        if i == 0 or length == 1:
            other += out * into * length * other_bits
            continue
        index += out * into * math.ceil(math.log2(k))
        if not shared or length not in sizes:
            book += k * length * book_bits
        sizes.add(length)
    return (index + book + other) / weights


def with_codebook(
    book: Array, index: Sequence[Sequence[int]], gradients: Sequence[Sequence[Array]], reduce: str, step: Callable
) -> list[Array]:
    """The codebook after each step, where `gradients[t][l][i]` belongs to unit i of layer l at step t."""
    path = []
    for layers in gradients:
        g = np.zeros_like(book)
        for j in range(len(book)):
            members = [units[i] for units, of in zip(layers, index, strict=True) for i, c in enumerate(of) if c == j]
            if members:
                g[j] = sum(members) / (len(members) if reduce == "mean" else 1)
        book = step(book, g)
        path.append(book)
    return path


# --- error feedback ----------------------------------------------------------------------------------------------


def damped(h: Array, share: float) -> Array:
    """H + share mean(diag H) I, the mean over inputs that are not always zero; those get that mean themselves."""
    size = np.diag(h)
    mean = size[size > 0].mean() if (size > 0).any() else 1.0
    return h + np.diag(np.where(size > 0, share * mean, mean))


def without(h_inv: Array, p: int) -> Array:
    """H^-1 with row and column p removed from H: one step of Gaussian elimination (OBC, lemma 1)."""
    left = h_inv - np.outer(h_inv[:, p], h_inv[p, :]) / h_inv[p, p]
    left[p, :] = left[:, p] = 0.0
    return left


def obq(w: Array, h: Array, quant: Callable[[float, int, int], float], order: Sequence[int]) -> Array:
    """Optimal Brain Quantizer in a given order: one weight at a time, H^-1 explicit and updated after each.

    delta = -(w_p - quant(w_p)) / [H_F^-1]_pp (H_F^-1)_:,p
    """
    found = w.copy()
    for i, row in enumerate(found):
        h_inv = np.linalg.inv(h).astype(np.float64)
        for p in order:
            q = quant(row[p], i, p)
            row -= (row[p] - q) / h_inv[p, p] * h_inv[:, p]
            row[p] = q
            h_inv = without(h_inv, p)
    return found


def pruned_obs(
    w: Array,
    h: Array,
    order: Sequence[int],
    block: int,
    choose: Callable[[Array], NDArray[np.bool_]],
    quant: Callable[[float, int, int], float] = lambda x, i, p: x,
) -> Array:
    """SparseGPT, weight by weight: a mask before each block from w_p^2 / [H_F^-1]_pp, F what is left at p's own turn.

    Kept weights go to `quant`, whose own error is no gain. What earlier blocks kept and dropped stays so.
    """
    found, h_inv, d = w.copy(), np.linalg.inv(h).astype(np.float64), np.zeros(len(order))
    for p in order:
        d[p] = h_inv[p, p]
        h_inv = without(h_inv, p)
    h_inv = np.linalg.inv(h).astype(np.float64)
    mask = np.zeros(w.shape, dtype=bool)
    for n, p in enumerate(order):
        if n % block == 0:
            q = np.array([[quant(x, i, j) for j, x in enumerate(row)] for i, row in enumerate(found)])
            gain = (found**2 - (found - q) ** 2) / d
            for done in order[:n]:
                gain[:, done] = np.where(mask[:, done], np.inf, -np.inf)
            mask = choose(gain)
        for i, row in enumerate(found):
            q = quant(row[p], i, p) if mask[i, p] else 0.0
            row -= (row[p] - q) / h_inv[p, p] * h_inv[:, p]
            row[p] = q
        h_inv = without(h_inv, p)
    return found


# --- activations ----------------------------------------------------------------------------------------------------


def lsq(x: Array, s: float, low: int, high: int) -> tuple[Array, Array, Array]:
    """Learned Step Size Quantization (arXiv 1902.08153), equations 1 to 3: v_hat, d v_hat / d v, d v_hat / d s."""
    v_hat, dv, ds = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for i, v in np.ndenumerate(x):
        v_bar = np.rint(min(max(v / s, low), high))
        v_hat[i] = v_bar * s
        dv[i] = float(low <= v / s <= high)
        ds[i] = low if v / s < low else high if v / s > high else -v / s + np.rint(v / s)
    return v_hat, dv, ds


def pact(x: Array, alpha: float, bits: int) -> tuple[Array, Array, Array]:
    """PACT (arXiv 1805.06085), equations 1 to 4: y_q, d y_q / d x, d y_q / d alpha."""
    y = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)
    scale = alpha / (2**bits - 1)
    return np.rint(y / scale) * scale, ((x >= 0) & (x <= alpha)).astype(float), (x > alpha).astype(float)
