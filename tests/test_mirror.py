"""Mirror descent and its neighbours: the maps and their conditions, the step, the paths, the equalities, the limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import detent as dt
from detent.mechanisms import Clock, MirrorMap, SoftmaxMap, TanhMap, check_map
from detent.mechanisms.base import Slot
from detent.mechanisms.maps import piecewise_affine

STEPS = 60
TWO, THREE, UNEVEN = (-1.0, 1.0), (-1.0, 0.0, 1.0), (-2.0, -0.5, 0.25, 3.0)
FREE2, FREE3 = dt.Binary(scale=None), dt.Ternary(scale=None)


def _t(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# --- the maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 7.0, 60.0])
def test_the_maps_are_the_papers(beta) -> None:
    a = np.linspace(-2.2, 2.2, 89)
    for mirror in (TanhMap(), SoftmaxMap()):
        two = mirror.forward(_t(a), _t(TWO), beta).numpy()
        assert np.allclose(two, reference.tanh_map(a, beta), rtol=0, atol=1e-15)
    three = TanhMap().forward(_t(a), _t(THREE), beta).numpy()
    assert np.allclose(three, reference.shifted_tanh(a, beta), rtol=0, atol=1e-15)
    for levels in (THREE, UNEVEN, (-0.3, 0.9)):
        soft = SoftmaxMap().forward(_t(a), _t(levels), beta).numpy()
        assert np.allclose(soft, reference.softmax_map(a, levels, beta), rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", [0.5, 3.0, 9.0])
def test_the_derivatives_are_the_papers(beta) -> None:
    a = np.linspace(-1.8, 1.8, 61)
    for levels in (TWO, THREE):
        fast = TanhMap().derivative(_t(a), _t(levels), beta).numpy()
        assert np.allclose(fast, reference.tanh_jacobian(a, levels, beta), rtol=1e-12, atol=1e-14)
    for levels in (TWO, THREE, UNEVEN):
        fast = SoftmaxMap().derivative(_t(a), _t(levels), beta).numpy()
        slow = reference.softmax_jacobian(a, levels, beta, published=False)
        assert np.allclose(fast, slow, rtol=1e-9, atol=1e-12 * beta)


def test_the_inverse_of_the_shifted_tanh_in_closed_form() -> None:
    w = np.linspace(-0.97, 0.97, 41)
    ours = TanhMap().inverse(_t(w), _t(THREE), 3.0).numpy()
    assert np.allclose(ours, reference.shifted_tanh_inverse(w, 3.0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("mirror", [TanhMap(), SoftmaxMap()])
@pytest.mark.parametrize("levels", [TWO, THREE, UNEVEN])
def test_there_and_back(mirror, levels) -> None:
    a = torch.linspace(-1.5, 1.5, 51, dtype=torch.float64)
    there = mirror.forward(a, _t(levels), 2.0)
    assert torch.allclose(mirror.inverse(there, _t(levels), 2.0), a, rtol=0, atol=1e-9)
    ends = mirror.inverse(_t([levels[0], levels[-1]]), _t(levels), 2.0)
    assert ends.tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("mirror", [TanhMap(), SoftmaxMap()])
def test_the_shipped_maps_keep_the_conditions(mirror) -> None:
    check_map(mirror)


@dataclass(frozen=True, kw_only=True)
class Arctan(dt.MirrorMap):
    """A map that no paper has: defines forward and nothing else."""

    def forward(self, a, levels, beta):
        w = levels[..., 0].expand(a.shape)
        for low, high in zip(levels.unbind(-1)[:-1], levels.unbind(-1)[1:], strict=True):
            w = w + (high - low) * (0.5 + torch.atan(beta * (a - (low + high) / 2)) / math.pi)
        return w.clamp(levels[..., 0], levels[..., -1])


@dataclass(frozen=True, kw_only=True)
class Broken(dt.MirrorMap):
    """Every way of being no mirror map."""

    how: str

    def forward(self, a: Tensor, levels: Tensor, beta: Any) -> Tensor:
        low, high = levels[..., 0], levels[..., -1]
        middle, half = (low + high) / 2, (high - low) / 2
        good = SoftmaxMap().forward(a, levels, beta)
        return {
            "sign": lambda: torch.where(a > middle, high, low),
            "sparsemax": lambda: piecewise_affine(a, levels, 1 / (1 + beta)),
            "identity": lambda: a.clone(),
            "two": lambda: torch.lerp(*levels.unbind(-1), torch.sigmoid(beta * a)),  # type: ignore[misc]
            "short": lambda: middle + 0.9 * (good - middle),
            "soft": lambda: middle + half * torch.tanh(a - middle),
            "falling": lambda: -good,
            "float32": lambda: good.float(),
            "whole": lambda: SoftmaxMap().forward(a, levels.reshape(-1, levels.shape[-1])[0], beta),
            "naive": lambda: (
                middle + half * (torch.exp(beta * a) - 1) / (torch.exp(beta * a) + 1) if half == 1 else good
            ),
        }.get(self.how, lambda: good)()

    def inverse(self, w, levels, beta):
        return super().inverse(w, levels, beta) + (0.1 if self.how == "inverse" else 0)

    def derivative(self, a, levels, beta):
        return super().derivative(a, levels, beta) * (2 if self.how == "derivative" else 1)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("sign", "not strictly increasing"),
        ("sparsemax", "not strictly increasing"),
        ("identity", "reaches or leaves the ends of the open range"),
        ("short", "not onto the open range"),
        ("two", "does not take 3 levels"),
        ("soft", "away from the nearest level"),
        ("falling", "not strictly increasing"),
        ("float32", "does not keep shape and dtype"),
        ("whole", "levels given for each row"),
        ("naive", "not finite"),
        ("inverse", r"inverse\(forward\(a\)\) is off"),
        ("derivative", "derivative is off"),
    ],
)
def test_what_is_no_mirror_map_is_refused_in_words(how, says) -> None:
    with pytest.raises(ValueError, match=says):
        check_map(Broken(how=how))
    with pytest.raises(ValueError, match=says):
        dt.MirrorDescent(map=Broken(how=how))


class Loose(MirrorMap):
    def forward(self, a, levels, beta):
        return SoftmaxMap().forward(a, levels, beta)


class Plain(Arctan):  # a dataclass by its parent only, which knows nothing of `k`: all are equal, and written alike
    def __init__(self, k: int) -> None:
        object.__setattr__(self, "k", k)


@dataclass
class Thawed(Loose):
    pass


@dataclass(frozen=True, kw_only=True)
class Listed(Loose):
    some: list[int] = field(default_factory=list)


@pytest.mark.parametrize("mirror", [Loose(), Plain(1), Thawed()])
def test_a_map_that_no_recipe_could_write_is_refused(mirror: MirrorMap) -> None:
    for refuses in (check_map, lambda mirror: dt.MirrorDescent(map=mirror)):
        with pytest.raises(ValueError, match=f"{type(mirror).__name__}: a map of one's own must be a frozen dataclass"):
            refuses(mirror)


def test_a_map_with_fields_that_cannot_be_compared_or_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match="Listed: the fields of a map must be numbers"):
        dt.MirrorDescent(map=Listed())
    with pytest.raises(ValueError, match=r"MirrorDescent\(map=Arctan\): must be .* or a MirrorMap: Arctan\(...\), not"):
        dt.MirrorDescent(map=Arctan)  # type: ignore[arg-type]


def test_the_refusals_are_not_of_all() -> None:
    check_map(Broken(how="not at all"))


def test_a_map_of_ones_own_needs_only_a_forward() -> None:
    with pytest.raises(ValueError, match="not onto|away from the nearest"):
        check_map(Broken(how="short"))
    mechanism = dt.MirrorDescent(map=Arctan(), beta=dt.Exponential(first=1.0, last=1e6))
    recipe = dt.Recipe([dt.Rule(match="weight", target=FREE2, mechanism=mechanism)])
    assert dt.Recipe.from_yaml(recipe.to_yaml()) == recipe
    layer = nn.Linear(5, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    run = dt.attach(layer, optimizer, recipe, total_steps=20)
    for step in range(20):
        layer.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert float((layer.weight.detach().abs() - 1).abs().max()) < 1e-3
    run.finalize()
    assert layer.weight.detach().unique().tolist() == [-1.0, 1.0]


# --- the mirror map and the step ----------------------------------------------------------------------------------


def test_the_potential_is_the_entropy() -> None:
    w = np.linspace(-0.95, 0.95, 21)
    for beta in (1.0, 4.0):
        entropy = ((1 + w) * np.log(1 + w) + (1 - w) * np.log(1 - w)) / (2 * beta)
        for mirror in (TanhMap(), SoftmaxMap()):
            assert np.allclose(mirror.potential(_t(w), _t(TWO), beta).numpy(), entropy, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mirror", [TanhMap(), SoftmaxMap(), Arctan()])
@pytest.mark.parametrize("levels", [TWO, UNEVEN])
def test_the_potential_grows_as_the_inverse_and_the_divergence_is_positive(mirror, levels) -> None:
    w = torch.linspace(levels[0], levels[-1], 13, dtype=torch.float64)[1:-1]
    up, down = (mirror.potential(w + side * 1e-5, _t(levels), 1.5) for side in (1, -1))
    slope = mirror.inverse(w, _t(levels), 1.5)
    assert torch.allclose((up - down) / 2e-5, slope, rtol=1e-5, atol=1e-5)
    divergence = mirror.bregman(w[:, None].expand(-1, len(w)), w[None].expand(len(w), -1), _t(levels), 1.5)
    assert torch.allclose(divergence.diagonal(), _t(0.0), atol=1e-12)
    assert bool((divergence[~torch.eye(len(w), dtype=torch.bool)] > 0).all())


@pytest.mark.parametrize("mirror", [TanhMap(), SoftmaxMap(), Arctan()])
@pytest.mark.parametrize("levels", [TWO, THREE, UNEVEN])
def test_a_step_is_a_bregman_minimisation(mirror, levels) -> None:
    """P(P^-1(w) - lr g) against the slow search for argmin <lr g, x> + D_Phi(x, w)."""
    beta = 1.3

    grid = np.tan(np.linspace(-1.57, 1.57, 400_001))  # the inverse by a table of the map, and by nothing of ours
    table = mirror.forward(_t(grid), _t(levels), beta).numpy()

    def inverse(v: np.ndarray) -> np.ndarray:
        return np.interp(v, table, grid)

    for share, pull in ((0.3, 0.4), (0.5, -0.2), (0.8, 0.05)):
        w = levels[0] + share * (levels[-1] - levels[0])
        step = mirror.forward(mirror.inverse(_t([w]), _t(levels), beta) - pull, _t(levels), beta)
        slow = reference.bregman_step(w, pull, inverse, (levels[0] + 1e-6, levels[-1] - 1e-6))
        assert float(step) == pytest.approx(slow, abs=2e-5)
        assert abs(float(step) - w) > 1e-3


# --- paths against the reference ----------------------------------------------------------------------------------


class _Bench:
    """One layer and its gradients, given or as a function of step and weights."""

    def __init__(self, target: dt.Target, mechanism: dt.Mechanism, dtype: torch.dtype = torch.float64, seed: int = 0):
        numbers = np.random.default_rng(seed)
        self.w0 = numbers.normal(size=(6, 5)) * 0.7
        self.gradients = [numbers.normal(size=(6, 5)) for _ in range(STEPS)]
        self.layer = nn.Linear(5, 6, bias=False, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.from_numpy(self.w0))
        self.recipe = dt.Recipe([dt.Rule(match="weight", target=target, mechanism=mechanism, fit_every=1)])

    def path(
        self,
        make: Callable[..., torch.optim.Optimizer],
        gradient: Callable[[int, np.ndarray], np.ndarray] | None = None,
        steps: int = STEPS,
        **options: Any,
    ) -> list[np.ndarray]:
        """What the forward pass of each step sees, and after the last step."""
        optimizer = make(self.layer.parameters(), **options)
        dt.attach(self.layer, optimizer, self.recipe, total_steps=steps)
        weight = self.layer.weight
        seen = [weight.detach().double().numpy().copy()]
        for step in range(steps):
            g = self.gradients[step] if gradient is None else gradient(step, seen[-1])
            weight.grad = torch.tensor(g, dtype=weight.dtype)
            optimizer.step()
            seen.append(weight.detach().double().numpy().copy())
        return seen


def _ramp(step: int, last: float = 50.0) -> float:
    return last ** (step / STEPS)


_BETA = dt.Exponential(first=1.0, last=50.0)
_GRID = dt.Uniform(bits=3, range="minmax")


def _grid_levels(w: np.ndarray) -> list[float]:
    delta = reference.minmax_delta(w, 3)
    return [k * delta for k in range(-3, 4)]


def _see_two(a: np.ndarray, t: int) -> np.ndarray:
    return reference.tanh_map(a, _ramp(t))


def _see_three(a: np.ndarray, t: int) -> np.ndarray:
    return reference.shifted_tanh(a, _ramp(t))


_PATHS: dict[str, tuple[dt.Target, dt.Mechanism, Any, Any]] = {
    "tanh on two": (FREE2, dt.MirrorDescent(beta=_BETA), _see_two, None),
    "softmax on two": (FREE2, dt.MirrorDescent(map="softmax", beta=_BETA), _see_two, None),
    "tanh on three": (FREE3, dt.MirrorDescent(beta=_BETA, units="weight"), _see_three, None),
    "tanh on three in cells": (
        FREE3,
        dt.MirrorDescent(beta=_BETA),
        lambda a, t: reference.shifted_tanh(a, 2 * _ramp(t)),
        None,
    ),
    "softmax on three": (
        FREE3,
        dt.MirrorDescent(map="softmax", beta=_BETA, units="weight"),
        lambda a, t: reference.softmax_map(a, THREE, _ramp(t)),
        None,
    ),
    "gd-tanh on two": (FREE2, dt.GDTanh(beta=_BETA), _see_two, lambda a, t: reference.tanh_jacobian(a, TWO, _ramp(t))),
    "gd-tanh on three": (
        FREE3,
        dt.GDTanh(beta=_BETA, units="weight"),
        _see_three,
        lambda a, t: reference.tanh_jacobian(a, THREE, _ramp(t)),
    ),
    "pmf on three": (
        FREE3,
        dt.PMF(beta=_BETA, units="weight"),
        lambda a, t: reference.softmax_map(a, THREE, _ramp(t)),
        lambda a, t: reference.softmax_jacobian(a, THREE, _ramp(t), published=False),
    ),
    "pmf as published": (
        FREE2,
        dt.PMF(beta=_BETA, jacobian="paper"),
        _see_two,
        lambda a, t: reference.softmax_jacobian(a, TWO, _ramp(t), published=True),
    ),
    "parq": (
        FREE3,
        dt.PARQ(inverse_slope=dt.Linear(first=1.0, last=0.25)),
        lambda a, t: reference.parq_map(a, THREE, 1 - 0.75 * t / STEPS),
        None,
    ),
    "binary-relax": (
        FREE2,
        dt.BinaryRelax(beta=_BETA),
        lambda a, t: (a + _ramp(t) * np.where(a >= 0, 1.0, -1.0)) / (1 + _ramp(t)),
        None,
    ),
}


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("name", _PATHS)
def test_training_is_the_references(name, adam) -> None:
    target, mechanism, see, slope = _PATHS[name]
    bench = _Bench(target, mechanism)
    lr = 0.002 if isinstance(mechanism, dt.PMF | dt.GDTanh) and not adam else 0.02
    fast = bench.path(torch.optim.Adam if adam else torch.optim.SGD, lr=lr)
    optimizer = reference.Adam(lr) if adam else reference.SGD(lr)
    slow = reference.latent_descent(bench.w0, bench.gradients, see=see, slope=slope, optimizer=optimizer)
    assert np.allclose(fast[0], see(bench.w0, 0), rtol=0, atol=1e-12)
    assert float(np.abs(fast[-1] - see(bench.w0, STEPS)).max()) > 0.02, "nothing moved, so nothing was compared"
    for step, (w, (_, other)) in enumerate(zip(fast[1:], slow, strict=True)):
        assert np.allclose(w, other, rtol=0, atol=2e-10), f"step {step}: off by {np.abs(w - other).max():.3g}"


@pytest.mark.parametrize("mirror", ["tanh", "softmax"])
def test_a_grid_of_many_levels_in_cells(mirror) -> None:
    """One unit of beta is half a cell of the grid fitted at the start of the step."""
    bench = _Bench(_GRID, dt.MirrorDescent(map=mirror, beta=3.0))
    fast = bench.path(torch.optim.SGD, lr=0.02)
    a, optimizer = bench.w0, reference.SGD(0.02)
    for step, g in enumerate(bench.gradients):
        levels = _grid_levels(a)
        unit = (levels[1] - levels[0]) / 2
        a = optimizer.step(a, g)
        if mirror == "softmax":
            slow = reference.softmax_map(a, levels, 3.0 / unit**2)
        else:
            slow = levels[0] + unit * sum(1 + np.tanh(3.0 * (a / unit - k)) for k in range(-5, 6, 2))
        assert np.allclose(fast[step + 1], slow, rtol=0, atol=1e-9), step


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-6, 1e6), st.sampled_from(["tanh", "softmax"]), st.sampled_from([2, 3, 15]))
def test_in_cells_scale_does_not_matter(unit, mirror, count) -> None:
    """Weights and levels in other units are seen alike, which "weight" units do not give."""
    target = {2: dt.Binary(), 3: dt.Ternary(), 15: dt.Uniform(bits=4)}[count]
    w = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = []
    for factor in (1.0, unit):
        layer = nn.Linear(5, 7, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(w * factor)
        rule = dt.Rule(match="weight", target=target, mechanism=dt.MirrorDescent(map=mirror, beta=2.0))
        dt.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), dt.Recipe([rule]))
        seen.append(layer.weight.detach() / factor)
    # the stored scale is a float32, so a unit that is no power of two moves the levels by a rounding
    assert torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    assert float((seen[0] - w).abs().max()) > 1e-3


# --- schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "interval", "most"), [(1.2, 7, 1e4), (2.0, 1, 100.0), (1.05, 13, 1.3), (1.0, 5, 9.0)]
)
def test_growth_has_the_timing_of_the_released_loop(scale, interval, most) -> None:
    slow = reference.beta_by_loop(300, scale, interval, most)
    growth = dt.Growth(factor=scale, every=interval, last=most)
    assert [growth(step, None) for step in range(300)] == pytest.approx(slow, rel=1e-12)


def test_growth_does_not_overflow() -> None:
    assert dt.Growth(factor=1e300, every=1, last=1e35)(10**9, None) == 1e35


def test_the_papers_rule_of_thumb_reaches_its_cap_at_the_end() -> None:
    growth = dt.Growth(factor=1e4 ** (200 / 10_000), every=200)
    assert growth(9_801, None) == pytest.approx(1e4) and growth(9_800, None) < 9_000


def test_sigmoid_is_parqs_annealing() -> None:
    """1 at the start, 0 at the end, 1/2 half-way, and symmetric about it."""
    schedule = dt.Sigmoid(first=1.0, last=0.0, steepness=8.0, begin=10, end=50)
    values = [schedule(step, None) for step in range(61)]
    assert values[10] == 1.0 and values[50] == 0.0 and values[30] == pytest.approx(0.5)
    raw = [1 / (1 + math.exp(8.0 * ((t - 10) / 40 - 0.5))) for t in range(10, 51)]
    assert values[10:51] == pytest.approx([(x - raw[-1]) / (raw[0] - raw[-1]) for x in raw], abs=1e-12)


def test_beta_of_a_step_is_what_its_forward_pass_sees() -> None:
    schedule = dt.Growth(factor=3.0, every=2, last=100.0)
    bench = _Bench(FREE2, dt.MirrorDescent(beta=schedule))
    seen = bench.path(torch.optim.SGD, gradient=lambda t, w: np.zeros_like(w), steps=6, lr=0.1, momentum=0.5)
    betas = reference.beta_by_loop(7, 3.0, 2, 100.0)
    # a gradient of zero without state is a dummy step, which does not count; so give it state first
    assert np.allclose(seen[0], np.tanh(betas[0] * bench.w0))
    bench = _Bench(FREE2, dt.MirrorDescent(beta=schedule))
    seen = bench.path(torch.optim.SGD, gradient=lambda t, w: np.full_like(w, 1e-13), steps=6, lr=0.1)
    for step, beta in enumerate(betas):
        assert np.allclose(seen[step], np.tanh(beta * bench.w0), rtol=0, atol=1e-9), step


# --- equalities ---------------------------------------------------------------------------------------------------


def _closed_loop(t: int, w: np.ndarray) -> np.ndarray:
    """A gradient that depends on the weights: a quadratic with a pull that changes."""
    pull = np.sin(np.arange(w.size).reshape(w.shape) * 1.7 + 0.3 * t)
    return 0.4 * w - pull


@pytest.mark.parametrize("adam", [False, True])
def test_published_copies_are_one_latent(adam) -> None:
    growth = dt.Growth(factor=1.1, every=5, last=1e4)
    bench = _Bench(FREE2, dt.MirrorDescent(map="softmax", beta=growth))
    ours = bench.path(torch.optim.Adam if adam else torch.optim.SGD, _closed_loop, steps=200, lr=0.01)
    copies = reference.softmax_copies(
        bench.w0,
        _closed_loop,
        steps=200,
        betas=reference.beta_by_loop(200, 1.1, 5, 1e4),
        optimizers=[reference.Adam(0.01) if adam else reference.SGD(0.01) for _ in range(2)],
    )
    assert all(np.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours, copies, strict=False))


@pytest.mark.parametrize("adam", [False, True])
def test_the_primal_form_is_the_published_one(adam) -> None:
    """With beta growing: the primal form does not sharpen, its steps grow."""
    growth = dt.Growth(factor=1.15, every=10, last=1e4)
    bench = _Bench(FREE2, dt.MirrorDescent(form="primal", beta=growth))
    ours = bench.path(torch.optim.Adam if adam else torch.optim.SGD, _closed_loop, steps=50, lr=0.01)
    slow = reference.primal_tanh(
        np.tanh(bench.w0),
        _closed_loop,
        steps=50,
        betas=reference.beta_by_loop(50, 1.15, 10, 1e4),
        G=reference.Adam(0.01) if adam else reference.SGD(0.01),
    )
    assert all(np.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(ours[1:], slow, strict=True))
    dual = _Bench(FREE2, dt.MirrorDescent(beta=growth)).path(torch.optim.SGD, _closed_loop, steps=50, lr=0.01)
    assert not np.allclose(dual[-1], ours[-1], atol=1e-3)


@pytest.mark.parametrize("target", [FREE2, dt.Binary(granularity="channel")])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_primal_is_dual_at_constant_beta(target, make) -> None:
    paths = []
    for form in ("primal", "dual"):
        bench = _Bench(target, dt.MirrorDescent(form=form, beta=1.5))
        bench.recipe = dt.Recipe([replace(bench.recipe.rules[0], fit_until=0)])
        paths.append(bench.path(make, _closed_loop, lr=0.02))
    assert all(np.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(*paths, strict=True))
    assert float(np.abs(paths[0][-1] - paths[0][0]).max()) > 0.02


def test_the_primal_form_freezes_in_float32_and_the_dual_does_not() -> None:
    """Past |beta a| of about 8.3 a float32 weight is its level; a strong pull back does not move it any more."""

    def pull(t: int, w: np.ndarray) -> np.ndarray:
        return np.where(t < 22, -0.5, 0.5) * np.ones_like(w)

    last = {}
    for form in ("primal", "dual"):
        for dtype in (torch.float32, torch.float64):
            bench = _Bench(FREE2, dt.MirrorDescent(form=form, beta=1.0), dtype)
            last[form, dtype] = bench.path(torch.optim.SGD, pull, steps=60, lr=1.0)
    stuck = last["primal", torch.float32]
    assert (stuck[22] >= 1 - 1.2e-7).all() and np.array_equal(stuck[22], stuck[-1])
    for free in (("dual", torch.float32), ("dual", torch.float64), ("primal", torch.float64)):
        assert (last[free][-1] < -0.99).all(), free
    beta_a = np.arctanh(np.float64(np.nextafter(np.float32(1), np.float32(0))))
    assert 8.2 < beta_a < 8.8


_HARD = {
    "huge beta": dt.MirrorDescent(beta=1e35),
    "hard from the start": dt.MirrorDescent(hard_start=0),
    "softmax": dt.MirrorDescent(map="softmax", beta=1e35),
    "parq": dt.PARQ(inverse_slope=0.0),
    "parq nearly": dt.PARQ(inverse_slope=1e-300),
    "binary-relax": dt.BinaryRelax(hard_start=0.0),
    "gd-tanh hard": dt.GDTanh(hard_start=0),
    "pmf hard": dt.PMF(hard_start=0),
}


@pytest.mark.parametrize(
    "target", [FREE2, FREE3, dt.Binary(), dt.Ternary(granularity="channel"), _GRID, dt.LearnedLevels(k=4)]
)
@pytest.mark.parametrize("name", _HARD)
def test_the_hard_limit_is_ste_bitwise(name, target) -> None:
    for dtype in (torch.float32, torch.float64):
        hard = _Bench(target, _HARD[name], dtype).path(torch.optim.AdamW, _closed_loop, steps=25, lr=0.02)
        ste = _Bench(target, dt.STE(), dtype).path(torch.optim.AdamW, _closed_loop, steps=25, lr=0.02)
        assert all(np.array_equal(a, b) for a, b in zip(hard, ste, strict=True))


# --- limits, options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e4, 1e20, 1e35])
@pytest.mark.parametrize("mirror", ["tanh", "softmax", "relax"])
def test_no_beta_makes_a_nan(mirror, beta, dtype) -> None:
    """Weights of all sizes, some exactly half-way between levels, some dead channels."""
    for target in (FREE2, FREE3, dt.Binary(granularity="channel"), dt.Uniform(bits=4, granularity="channel")):
        layer = nn.Linear(6, 4, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight[0] = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 1e-7])
            layer.weight[1] = 0.0
            layer.weight[2] *= 1e4
            layer.weight[3] *= 1e-6
        mechanism = dt.MirrorDescent(map=mirror, beta=beta, scale_aware="channel")
        rule = dt.Rule(match="weight", target=target, mechanism=mechanism)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        dt.attach(layer, optimizer, dt.Recipe([rule]))
        for step in range(3):
            assert bool(torch.isfinite(layer.weight).all())
            layer.weight.grad = torch.full((4, 6), 0.1 * (-1) ** step, dtype=dtype)
            optimizer.step()
        assert bool(torch.isfinite(layer.weight).all())


@pytest.mark.parametrize("groups", ["tensor", "channel"])
def test_scale_aware_beta_divides_the_latent_by_its_size(groups) -> None:
    bench = _Bench(FREE2, dt.MirrorDescent(beta=2.0, scale_aware=groups))
    bench.w0 *= 0.01
    with torch.no_grad():
        bench.layer.weight.mul_(0.01)
    seen = bench.path(torch.optim.SGD, steps=1, lr=0.01)
    size = np.sqrt(np.mean(bench.w0**2, axis=1 if groups == "channel" else None, keepdims=True))
    assert np.allclose(seen[0], np.tanh(2.0 * bench.w0 / size), rtol=0, atol=1e-12)
    after = bench.w0 - 0.01 * bench.gradients[0]
    size = np.sqrt(np.mean(after**2, axis=1 if groups == "channel" else None, keepdims=True))
    assert np.allclose(seen[1], np.tanh(2.0 * after / size), rtol=0, atol=1e-12)


def test_an_inverse_start_shows_the_weights_as_they_are() -> None:
    mirror: Any
    for target, mirror in ((FREE2, "tanh"), (dt.Uniform(bits=3, range="minmax"), "softmax"), (FREE3, "tanh")):
        bench = _Bench(target, dt.MirrorDescent(map=mirror, beta=1.0, init="inverse"))
        seen = bench.path(torch.optim.SGD, steps=1, lr=0.01)
        end = 1.0 if target in (FREE2, FREE3) else 3 * reference.minmax_delta(bench.w0, 3)
        assert np.allclose(seen[0], np.clip(bench.w0, -0.95 * end, 0.95 * end), rtol=0, atol=1e-9)
    assert not np.allclose(_Bench(FREE2, dt.MirrorDescent()).path(torch.optim.SGD, steps=1, lr=0.1)[0], bench.w0)


def test_a_clipped_latent_stays_inside() -> None:
    layer = nn.Linear(5, 6, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    rule = dt.Rule(match="weight", target=FREE2, mechanism=dt.STE(clip_latent=0.2))
    run = dt.attach(layer, optimizer, dt.Recipe([rule]))
    for sign in (1.0, -1.0):
        layer.weight.grad = torch.full((6, 5), sign)
        optimizer.step()
        assert bool((layer.weight == -sign).all()), "a clipped latent turns within one step"
        latent = run.state_dict()["weights"]["weight"]["state"]["latent"]
        assert torch.equal(latent, torch.full((6, 5), -0.2 * sign))


def _slot(target: dt.Target, w: Tensor, rows: tuple[int, int] | None, whole: Tensor, params: dt.Params) -> Slot:
    here = params if rows is None else params.local(*rows)
    used: dict[str, Any] = {
        "name": "weight",
        "weight": w,
        "seen": w,
        "target": target,
        "params": here,
        "project": lambda x: target.project(x, here),
        "relax": lambda x, beta: target.relax(x, here, beta),
        "gather": lambda x: whole,
        "state": {},
        "scratch": {},
    }
    blank: dict[str, Any] = {field.name: None for field in fields(Slot)}  # a latent needs nothing else
    return Slot(**(blank | used))


@pytest.mark.parametrize(
    "target", [FREE2, dt.Binary(granularity="channel"), dt.Uniform(bits=3, granularity=dt.Group(size=2)), dt.Ternary()]
)
@pytest.mark.parametrize(
    "mechanism",
    [
        dt.MirrorDescent(map="softmax", beta=3.0, scale_aware="channel"),
        dt.MirrorDescent(beta=3.0, scale_aware="tensor"),
        dt.PARQ(inverse_slope=0.4),
        dt.BinaryRelax(beta=2.0),
    ],
)
def test_rows_are_seen_as_the_whole_is(mechanism, target) -> None:
    """What a process that holds some rows shows is the rows of what one process shows.

    To a rounding, as torch's vectorised exp and tanh may differ in the last bit by where in a tensor a number stands.
    """
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    params = target.fit(whole)
    clock = Clock(step=0, total_steps=10)
    one = _slot(target, whole.clone(), None, whole, params)
    mechanism.open(one, clock)
    for rows in ((0, 3), (3, 8), (7, 8), (8, 8)):
        part = _slot(target, whole[slice(*rows)].clone(), rows, whole, params)
        mechanism.open(part, clock)
        assert torch.allclose(part.weight, one.weight[slice(*rows)], rtol=1e-6, atol=1e-7)
        assert torch.equal(part.state["latent"], one.state["latent"][slice(*rows)])
    assert not torch.equal(one.weight, whole)


@pytest.mark.parametrize(
    "mechanism", [dt.MirrorDescent(), dt.MirrorDescent(form="primal", beta=1.0), dt.GDTanh(), dt.PARQ()]
)
def test_a_step_that_raises_is_repaired(mechanism) -> None:
    class Stumbles(torch.optim.SGD):
        fall = True

        def step(self, closure=None):
            loss = super().step(closure)
            if self.fall:
                raise ArithmeticError("on the way")
            return loss

    layer = nn.Linear(5, 4, bias=False)
    optimizer = Stumbles(layer.parameters(), lr=0.1)
    run = dt.attach(layer, optimizer, dt.Recipe([dt.Rule(match="weight", target=FREE2, mechanism=mechanism)]), 5)
    seen = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(4, 5)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    with run.compressed():
        pass
    assert torch.equal(layer.weight, seen)
    optimizer.fall = False
    optimizer.step()
    assert run.clock == 1 and not torch.equal(layer.weight, seen)


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_starting_late_takes_the_weights_as_they_are_then(form) -> None:
    """Until its start the base optimizer, bitwise; then the weights are the latent."""
    mechanism = dt.MirrorDescent(form=form, beta=2.0, start=3)
    seen = _Bench(FREE2, mechanism).path(torch.optim.SGD, _closed_loop, steps=6, lr=0.05)
    w, optimizer = _Bench(FREE2, mechanism).w0, reference.SGD(0.05)
    for step in range(6):
        assert np.allclose(seen[step], w if step <= 3 else np.tanh(2.0 * w), rtol=0, atol=1e-12), step
        w = optimizer.step(w, _closed_loop(step, seen[step]))


def test_the_primal_form_that_starts_late_has_the_levels_of_its_start() -> None:
    layer = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mechanism = dt.MirrorDescent(form="primal", beta=2.0, start=3)
    run = dt.attach(layer, optimizer, dt.Recipe([dt.Rule(match="weight", target=dt.Binary(), mechanism=mechanism)]), 6)
    sizes = []
    for step in range(6):
        sizes.append(float(layer.weight.detach().abs().mean()))
        layer.weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert sizes[3] != pytest.approx(sizes[0], rel=1e-3)
    assert float(run.encoded()["weight"].form.named["scale"]) == pytest.approx(sizes[3], rel=1e-6)


def test_true_and_published_pmf_under_sgd_are_the_copies_at_twice_the_rate() -> None:
    """Two copies move their half difference by half of what one latent would: u+ and u- each see their own gradient."""
    a, beta, g = 0.3, 2.0, 0.7
    u = reference.softmax_weights(a, TWO, beta)
    for published in (False, True):
        jacobian = beta * ((np.eye(2) if published else np.diag(u)) - np.outer(u, u))
        moved = jacobian @ (g * np.array(TWO))
        one = float(reference.softmax_jacobian(np.array([a]), TWO, beta, published)[0]) * g
        assert (moved[1] - moved[0]) / 2 == pytest.approx(one / 2)


@pytest.mark.parametrize("mirror", [TanhMap(), SoftmaxMap()])
@pytest.mark.parametrize("levels", [[-1000.0, 1000.0], [-4e4, 0.0, 2e4, 4e4]])
def test_wide_levels_at_a_huge_beta_give_no_nan(mirror: Any, levels: list[float]) -> None:
    """beta fits into a float32, beta times half the gap of wide levels does not, and infinity times zero is NaN."""
    q = torch.tensor(levels)
    a = torch.cat([q, (q[1:] + q[:-1]) / 2, torch.tensor([-1e30, -1.0, 0.0, 1e-30, 3.0, 1e30])])
    for beta in (1.0, 1e4, 1e35, 1e36, 3e38):
        for w in (mirror.forward(a, q, beta), mirror.derivative(a, q, beta)):
            assert not bool(w.isnan().any()), beta
        assert bool((mirror.forward(a, q, beta) >= q[0]).all()) and bool((mirror.forward(a, q, beta) <= q[-1]).all())


@pytest.mark.parametrize("mirror", [TanhMap(), SoftmaxMap()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_weight_is_subnormal(mirror: Any, dtype: torch.dtype) -> None:
    """A few percent of subnormal weights make a convolution fifty times slower on a CPU."""
    q = 1e-3 * torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)
    a = torch.linspace(-0.2, 0.2, 100_001, dtype=dtype)
    ends = 0
    for beta in (1.0, 1e3, 1e5, 1e6, 1e7, 1e9, 1e12):
        w = mirror.forward(a, q, beta)
        assert not bool(((w != 0) & (w.abs() < torch.finfo(dtype).tiny)).any()), beta
        ends += int((w == 0).sum())
        assert bool((w.diff() >= -1e-5 * float(q[-1])).all())
    assert ends > 100, "the level itself is reached"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("jacobian", ["true", "paper"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pmf_is_finite_at_any_beta(bits: int, jacobian: Any, dtype: torch.dtype) -> None:
    """The published Jacobian is beta times a sum of squares: it overflowed, and times a gradient of 0 it was a NaN."""
    for beta in (1e-3, 1.0, 100.0, 1e4, 1e33, 1e35, 1e36, 1e38, 1e300):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4, bias=False, dtype=dtype)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        rule = dt.Rule(match="weight", target=dt.Uniform(bits=bits), mechanism=dt.PMF(jacobian=jacobian, beta=beta))
        run = dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=5, hooks=False)
        gradient = torch.randn(4, 4).to(dtype)
        gradient[0] = 0.0
        layer.weight.grad = gradient.clone()
        entry = run._entries[0]
        wide = entry.state["latent"].to(torch.float64 if dtype == torch.float64 else torch.float32)
        run.before_step()
        found = entry.moved.grad  # of a float32 latent where the weight is narrower
        assert found is not None
        assert bool(torch.isfinite(found).all()) and not bool(found[0].any()), f"beta {beta}"
        if jacobian == "paper":
            assert entry.params is not None
            count = 2**bits - 1
            scaled = torch.arange(1 - count, count, 2).to(wide)  # levels over half their distance
            seen = SoftmaxMap().forward(wide / (entry.params["scale"].to(wide) / 2), scaled, beta)
            plain = gradient.to(wide) * (min(beta, 1e35) * (scaled.square().sum(-1) - seen.square()))
            held = plain.to(dtype).to(found)  # bent in the gradient's own dtype
            fits = held.abs() < min(1e15, torch.finfo(dtype).max)
            assert torch.equal(found[fits], held[fits]), f"beta {beta}: what does not overflow is as it was"


_BENT = {
    "pmf": lambda beta: dt.PMF(beta=beta, scale_aware="tensor"),
    "pmf as published": lambda beta: dt.PMF(beta=beta, jacobian="paper", scale_aware="tensor"),
    "gd-tanh": lambda beta: dt.GDTanh(beta=beta),
    "a map of one's own": lambda beta: dt.MirrorDescent(map=Arctan(), beta=beta, units="weight", scale_aware="tensor"),
    "inverse": lambda beta: dt.MirrorDescent(beta=beta, init="inverse"),
    "primal": lambda beta: dt.MirrorDescent(beta=beta, form="primal"),
}


@pytest.mark.parametrize("name", _BENT)
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_no_beta_makes_a_nan_of_what_an_optimizer_remembers(name: str, make: Any) -> None:
    """The largest float32 is finite, but not its square, nor its distance from the mean of gradients so far."""
    for beta in (1e-300, 1e-40, 1e-6, 3e38, 1e300):
        numbers = torch.Generator().manual_seed(0)
        layer = nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(4, 6, generator=numbers) * 0.4)
            layer.weight[0, 0] = 0.0  # half-way between the levels
        optimizer = make(layer.parameters(), lr=0.01)
        run = dt.attach(
            layer, optimizer, dt.Recipe([dt.Rule(match="weight", target=FREE2, mechanism=_BENT[name](beta))])
        )
        for step in range(10):
            layer.weight.grad = torch.randn(4, 6, generator=numbers)
            optimizer.step()
            hidden = run.state_dict()["weights"]["weight"]["state"]["latent"]
            assert bool(torch.isfinite(layer.weight).all() and torch.isfinite(hidden).all()), f"{beta}, step {step}"


@dataclass(frozen=True, kw_only=True)
class _Wrapped(MirrorMap):
    """A map as a user writes it: a forward pass, and all else derived from it."""

    inner: MirrorMap

    def forward(self, a: Tensor, levels: Tensor, beta: float | Tensor) -> Tensor:
        return self.inner.forward(a, levels, beta)


@pytest.mark.parametrize("inner", [TanhMap(), SoftmaxMap()], ids=["tanh", "softmax"])
def test_a_wrapper_of_a_shipped_map_is_one(inner: MirrorMap) -> None:
    """The derivative of |x| by autograd is 0 at 0: at a threshold the tanh map lost its steepest part."""
    check_map(_Wrapped(inner=inner))
    for levels in (torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-2.0, -0.5, 0.25, 3.0])):
        a = torch.cat([levels, (levels[1:] + levels[:-1]) / 2, torch.linspace(-3, 3, 13)])
        slope = inner.derivative(a, levels, 2.0)
        assert torch.allclose(_Wrapped(inner=inner).derivative(a, levels, 2.0), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mirror", [TanhMap(), SoftmaxMap()], ids=["tanh", "softmax"])
def test_levels_that_are_repeated_count_once(mirror: MirrorMap) -> None:
    """A group with fewer levels than others repeats its largest, which drew the weights to it many times over."""
    few, many = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    a = torch.linspace(-2, 2, 41)
    for beta in (0.5, 4.0, 1e4):
        assert torch.equal(mirror.forward(a, many, beta), mirror.forward(a, few, beta))
        assert torch.equal(mirror.derivative(a, many, beta), mirror.derivative(a, few, beta))
    rows = torch.stack([many, torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0])])[:, None]
    both = mirror.forward(a.expand(2, -1), rows, 4.0)
    assert torch.allclose(both[0], mirror.forward(a, few, 4.0), rtol=1e-6, atol=1e-7)
    assert torch.equal(dt.LearnedLevels(k=6).fit(torch.tensor([-1.0, 0.0, 1.0] * 5))["levels"].reshape(-1), many)


@pytest.mark.parametrize("start", [0, 3])
def test_a_latent_found_by_the_inverse_is_seen_as_the_weights_it_came_from(start: int) -> None:
    layer = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        layer.weight.mul_(0.5)  # all inside the range of the map
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-12)
    mechanism = dt.MirrorDescent(init="inverse", start=start)
    target = dt.Binary(scale=None)
    dt.attach(layer, optimizer, dt.Recipe([dt.Rule(match="weight", target=target, mechanism=mechanism)]), 10)
    for _ in range(start + 1 if start else 0):
        layer.weight.grad = torch.ones(4, 6)
        optimizer.step()
    assert torch.allclose(layer.weight, before, rtol=0, atol=1e-5)


def test_a_compressed_life_before_the_hard_limit_warns(tmp_path) -> None:
    layer = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mechanism = dt.MirrorDescent(hard_start=0.5)
    rule = dt.Rule(match="weight", target=dt.Binary(), mechanism=mechanism)
    run = dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=4)
    with pytest.warns(
        UserWarning, match=r"after 0 of 4 steps: the hard limit of MirrorDescent\(hard_start=0.5\) is at"
    ):
        dt.save(run, tmp_path / "early.detent", life="compressed")
    for _ in range(2):
        layer.weight.grad = torch.ones(4, 6)
        optimizer.step()
    dt.save(run, tmp_path / "late.detent", life="compressed")
    late = dt.Recipe([dt.Rule(match="weight", target=dt.Binary(), mechanism=dt.MirrorDescent(hard_start=9))])
    with pytest.raises(ValueError, match="is at step 9, but training has 4 steps"):
        other = nn.Linear(6, 4, bias=False)
        dt.attach(other, torch.optim.SGD(other.parameters(), lr=0.1), late, total_steps=4)


@dataclass(frozen=True, kw_only=True)
class _ErfSteps(MirrorMap):
    """Smooth steps that saturate sooner than any other map here."""

    def forward(self, a: Tensor, levels: Tensor, beta: float | Tensor) -> Tensor:
        each = levels.unbind(-1)
        sharp = beta.clamp_max(1e30) if isinstance(beta, torch.Tensor) else min(beta, 1e30)
        w = each[0].expand(a.shape)
        for low, high in itertools.pairwise(each):
            w = w + (high - low) / 2 * (1 + torch.erf((sharp * (a - (low + high) / 2)).clamp(-1e4, 1e4)))
        return w


@dataclass(frozen=True, kw_only=True)
class _Number(MirrorMap):
    def forward(self, a: Tensor, levels: Tensor, beta: float | Tensor) -> Any:
        return 0.5


def test_a_map_that_saturates_fast_is_a_map() -> None:
    dt.MirrorDescent(map=_ErfSteps())
    with pytest.raises(ValueError, match="it does not keep shape and dtype"):
        dt.MirrorDescent(map=_Number())
