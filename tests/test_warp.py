"""Theorem 1 of PSG (arXiv 2005.11035): scaling gradients by s is gradient descent in a warped space with f' = s^(-1/2).

Shown for every form with eps > 0, in float64; with eps = 0 the theorem has an exception, which has its own test.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import detent as dt

W = torch.float64


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of PSG on one target; `total` stretches the schedules."""

    psg: dt.PSG
    target: dt.Target
    step: int = 0
    total: int | None = None

    def params(self) -> dt.Params:
        weights = torch.randn(8, 6, dtype=W, generator=torch.Generator().manual_seed(5))
        if self.target == dt.Uniform(bits=3, granularity="channel"):
            weights *= torch.logspace(-2, 1, 8, dtype=W)[:, None]
        return self.target.fit(weights)

    def f(self, w: Tensor, params: dt.Params) -> Tensor:
        return self.psg.warp(w, self.target, params, self.step, self.total)

    def inverse(self, y: Tensor, params: dt.Params) -> Tensor:
        return self.psg.unwarp(y, self.target, params, self.step, self.total)

    def s(self, w: Tensor, params: dt.Params) -> Tensor:
        return self.psg.scale(w, self.target, params, self.step, self.total)

    def typical(self, params: dt.Params) -> Tensor:
        """The unit of the target's weights, one a row."""
        return self.target.typical(params).to(W).reshape(-1, 1).expand(8, 1)

    def line(self, params: dt.Params, points: int = 4001) -> Tensor:
        """Weights in rising order on the last axis, from far below to far above everything the target knows."""
        limits = self.target.limits(params)
        reach = (limits if limits is not None else 4 * self.target.typical(params)).to(W)
        reach = reach.broadcast_to((8, 1)) if reach.numel() == 8 else reach.reshape(1, 1).expand(8, 1)
        return reach * torch.linspace(-2.5, 2.5, points, dtype=W)


FORMS: dict[str, Form] = {
    "grid in cells": Form(psg=dt.PSG(gain=8.0, eps=0.05), target=dt.Uniform(bits=3)),
    "grid in cells, 8 bits": Form(psg=dt.PSG(gain=2.0, eps=0.05), target=dt.Uniform(bits=8, range="minmax")),
    "grid in cells, 2 bits": Form(psg=dt.PSG(gain=0.3, eps=1.0), target=dt.Uniform(bits=2)),
    "grid in cells, half strength": Form(psg=dt.PSG(gain=8.0, strength=0.5, eps=0.05), target=dt.Uniform(bits=3)),
    "grid in cells, half strength, eps 0": Form(psg=dt.PSG(gain=8.0, strength=0.5, eps=0.0), target=dt.Uniform(bits=3)),
    "grid in cells, strength 0": Form(psg=dt.PSG(gain=8.0, strength=0.0, eps=0.05), target=dt.Uniform(bits=3)),
    "grid in cells, by channel": Form(psg=dt.PSG(gain=8.0, eps=0.05), target=dt.Uniform(bits=3, granularity="channel")),
    "grid in cells, running range": Form(psg=dt.PSG(gain=8.0, eps=0.05), target=dt.Uniform(bits=4, range="ema")),
    "grid in cells, scheduled": Form(psg=dt.PSG(gain=8.0), target=dt.Uniform(bits=3), step=400, total=1000),
    "grid in weights": Form(psg=dt.PSG.paper(lambda_s=150, eps=0.01), target=dt.Uniform(bits=3)),
    "grid in weights, a tenth": Form(
        psg=replace(dt.PSG.paper(lambda_s=150, eps=0.01), strength=0.1), target=dt.Uniform(bits=3)
    ),
    "zero in cells": Form(psg=dt.PSG(gain=8.0, eps=0.05), target=dt.Zero()),
    "zero in cells, half strength": Form(psg=dt.PSG(gain=8.0, strength=0.5, eps=0.05), target=dt.Zero()),
    "zero by channel": Form(psg=dt.PSG(gain=8.0, eps=0.05), target=dt.Zero(granularity="channel")),
    "zero in weights": Form(psg=dt.PSG.paper(lambda_s=38, eps=0.01), target=dt.Zero()),
}
every_form = pytest.mark.parametrize("name", FORMS)


@every_form
def test_the_warp_rises_strictly(name: str) -> None:
    form = FORMS[name]
    params = form.params()
    line = form.line(params)
    rises = form.f(line, params).diff(dim=-1)
    assert bool((rises > 0).all())
    assert torch.equal(form.f(torch.zeros(8, 6, dtype=W), params), torch.zeros(8, 6, dtype=W))
    assert torch.allclose(form.f(-line, params), -form.f(line, params), rtol=1e-12, atol=0)


@every_form
def test_unwarp_undoes_warp(name: str) -> None:
    form = FORMS[name]
    params = form.params()
    line = form.line(params)
    assert torch.allclose(form.inverse(form.f(line, params), params), line, rtol=1e-9, atol=1e-9 * float(line.max()))
    y = form.f(line, params)
    spread = torch.linspace(0, 1, 999, dtype=W) * (y[:, -1:] - y[:, :1]) + y[:, :1]
    back = form.f(form.inverse(spread, params), params)
    assert torch.allclose(back, spread, rtol=1e-9, atol=1e-9 * float(y.max()))


@every_form
def test_the_slope_is_one_over_the_root_of_s(name: str) -> None:
    """A central difference of f, away from the kinks at levels, borders and the ends of the range."""
    form = FORMS[name]
    params = form.params()
    line = form.line(params)
    h = 1e-6 * form.typical(params)
    lower, upper = form.s(line - h, params), form.s(line + h, params)
    middle = form.s(line, params)
    smooth = (lower + upper - 2 * middle).abs() <= 1e-9 * middle
    slope = (form.f(line + h, params) - form.f(line - h, params)) / (2 * h)
    assert float(smooth.double().mean()) > 0.8
    assert torch.allclose(slope[smooth], middle[smooth] ** -0.5, rtol=1e-5, atol=0)


def _borders(form: Form, params: dt.Params) -> Tensor:
    """Cell borders, and the points where the distance is capped beyond the range."""
    if isinstance(form.target, dt.Uniform):
        n = reference.most(form.target.bits)
        half = torch.arange(-n - 1, n + 1, dtype=W) + 0.5
        cell = form.target.cell(params).to(W)
        return cell.reshape(-1, 1) * half
    return 2 * form.target.typical(params).to(W).reshape(-1, 1) * torch.tensor([-1.0, 1.0], dtype=W)


@every_form
def test_the_warp_has_no_jumps(name: str) -> None:
    """Across every border f rises over a tiny step by its slope; a jump would not shrink with the step."""
    form = FORMS[name]
    params = form.params()
    borders = _borders(form, params).expand(8, -1)
    size = form.typical(params)
    for h in (1e-3 * size, 1e-6 * size):
        rise = form.f(borders + h, params) - form.f(borders - h, params)
        slope = form.s(borders, params) ** -0.5
        assert torch.allclose(rise, 2 * h * slope, rtol=5e-3, atol=1e-13 * float(borders.abs().max() * slope.max()))
    # and s itself is continuous there: both sides are half a cell from their level
    left, right = form.s(borders - 1e-9 * size, params), form.s(borders + 1e-9 * size, params)
    assert torch.allclose(left, right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.psg.strength != 0.0])
def test_steps_agree_to_second_order(name: str) -> None:
    """One gradient step in f-space against one PSG step, within a cell: the error falls as the rate squared."""
    form = FORMS[name]
    params = form.params()
    typical = form.typical(params)
    w = typical * torch.tensor([[0.7, 1.0, 1.2]], dtype=W)  # a grid's levels are 4 apart in this unit, a border 2 away
    g = typical * torch.tensor([[1.0, -1.0, 0.5]], dtype=W) / form.s(w, params)
    rates = np.logspace(-1, -4, 7)
    errors = []
    for rate in rates:
        stepped = form.inverse(form.f(w, params) - rate * g * form.s(w, params).sqrt(), params)
        plain = w - rate * form.s(w, params) * g
        errors.append(((stepped - plain).abs() / typical).amax(0).numpy())
    for column in np.array(errors).T:
        slope = np.polyfit(np.log(rates), np.log(column), 1)[0]
        assert slope == pytest.approx(2.0, abs=0.05)


def test_at_strength_zero_the_spaces_are_one() -> None:
    """f is the identity, so there the steps agree exactly."""
    form = FORMS["grid in cells, strength 0"]
    params = form.params()
    line = form.line(params)
    assert torch.allclose(form.f(line, params), line, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_warp_by_the_papers_letters(bits: int) -> None:
    """f(x) = 2 sign(x - q) (sqrt(|x - q| + eps) - sqrt(eps)) / sqrt(lambda) + c(q), with
    c(q + delta) - c(q) = 4 (sqrt(delta / 2 + eps) - sqrt(eps)) / sqrt(lambda)."""
    lambda_s, eps = 150.0, 0.01
    form = Form(psg=dt.PSG.paper(lambda_s=lambda_s, eps=eps), target=dt.Uniform(bits=bits, range="minmax"))
    params = form.params()
    delta = float(params["scale"])
    for x in np.linspace(-1.5, 1.5, 301) * delta * reference.most(bits):
        q = reference.on_grid(float(x), delta, reference.most(bits))
        jump = 4 * (math.sqrt(delta / 2 + eps) - math.sqrt(eps))
        f = 2 * math.copysign(math.sqrt(abs(x - q) + eps) - math.sqrt(eps), x - q) + round(q / delta) * jump
        mine = float(form.f(torch.tensor([[x]], dtype=W), params))
        assert mine == pytest.approx(f / math.sqrt(lambda_s), rel=1e-9, abs=1e-12)


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    gain=st.floats(0.1, 100),
    eps=st.floats(1e-3, 2),
    strength=st.floats(0, 1),
    x=st.lists(st.floats(-10, 10), min_size=1, max_size=20),
)
def test_any_form_can_be_undone(bits, gain, eps, strength, x) -> None:
    grid, psg = dt.Uniform(bits=bits, range="minmax"), dt.PSG(gain=gain, eps=eps, strength=strength)
    params = grid.fit(torch.tensor([1.0, -0.3]))
    w = torch.tensor(sorted(x), dtype=W)
    y = psg.warp(w, grid, params)
    assert torch.allclose(psg.unwarp(y, grid, params), w, rtol=1e-9, atol=1e-9)
    assert bool((y.diff() >= 0).all())


# --- the exception: eps = 0 ---------------------------------------------------------------------------------------


def test_without_eps_a_weight_on_its_target_never_moves() -> None:
    """s = 0 there, so no gradient moves it; in f-space, where its slope is infinite, a step would."""
    layer = torch.nn.Linear(3, 1, bias=False, dtype=W)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 0.6]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    grid = dt.Uniform(bits=2, range="minmax")
    rule = dt.Rule(match="weight", target=grid, mechanism=dt.PSG(eps=0.0, gain=1.0, clip=False), fit_until=0)
    dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=20)
    for _ in range(20):
        layer.weight.grad = torch.ones(1, 3, dtype=W)
        optimizer.step()
    assert layer.weight[0, :2].tolist() == [1.0, 0.0]
    assert layer.weight[0, 2].item() < 0.6
    params = grid.fit(torch.tensor([[1.0, 0.0, 0.6]]))
    psg = dt.PSG(eps=0.0, gain=1.0)
    on_target = torch.tensor([[0.0]], dtype=W)
    moved = psg.unwarp(psg.warp(on_target, grid, params) - 0.05, grid, params)
    assert float(moved) < 0


def test_without_eps_the_warp_still_is_one() -> None:
    """Continuous, strictly rising, invertible; only its slope at a target is infinite."""
    units_of, targets = (dt.PSG(gain=8.0, eps=0.0), dt.PSG.paper(lambda_s=150.0)), (dt.Uniform(bits=3), dt.Zero())
    for units, target in itertools.product(units_of, targets):
        form = Form(psg=units, target=target)
        params = form.params()
        line = form.line(params)
        y = form.f(line, params)
        assert bool((y.diff(dim=-1) > 0).all())
        assert torch.allclose(form.inverse(y, params), line, rtol=1e-9, atol=1e-9 * float(line.max()))
        rise = [float(form.f(torch.tensor([[h]], dtype=W), params)) / h for h in (1e-4, 1e-8)]
        assert rise[1] == pytest.approx(100 * rise[0], rel=1e-2), "the slope grows as 1 / sqrt(h)"


def test_a_target_without_even_levels_has_no_known_warp() -> None:
    w = torch.randn(5)
    target = dt.TopK(keep=0.5)
    for act in (dt.PSG(gain=8.0, eps=0.05).warp, dt.PSG(gain=8.0, eps=0.05).unwarp):
        with pytest.raises(ValueError, match="evenly spaced levels .Uniform. and for Zero, not for TopK"):
            act(w, target, target.fit(w))
