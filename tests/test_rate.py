"""Grids by step and rate: entropy against counting by hand, laws of the step, dead zones, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import detent as dt
from detent.targets.rate import entropy_at, step_at_rate


def _noise(count: int, seed: int = 0, kind: str = "normal") -> Tensor:
    rng = np.random.default_rng(seed)
    draw = rng.laplace(size=count) if kind == "laplace" else rng.standard_normal(count)
    return torch.from_numpy(0.05 * draw).float()


def _counted(w: Tensor, step: float, rounding: float, n: int) -> float:
    """Entropy of the codes, weight by weight."""
    codes = [int(math.copysign(min(math.floor(abs(x) / step + rounding), n), x)) for x in w.double().tolist()]
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@settings(max_examples=30, deadline=None)
@given(st.floats(0.003, 0.3), st.sampled_from([0.25, 0.4, 0.5]), st.sampled_from([1, 7, 127]), st.integers(0, 50))
def test_entropy_is_that_of_the_codes(step: float, rounding: float, n: int, seed: int) -> None:
    w = _noise(400, seed)
    assert entropy_at([w], step, rounding, n) == pytest.approx(_counted(w, step, rounding, n), abs=1e-12)


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.5, 4.0])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rounding", [0.3, 0.5])
def test_a_fit_has_the_rate(rate: float, granularity: str, rounding: float) -> None:
    w = _noise(64 * 300, kind="laplace").reshape(64, 300) * torch.linspace(0.2, 3, 64)[:, None]
    grid = dt.UniformStep(rate=rate, granularity=granularity, rounding=rounding)  # type: ignore[arg-type]
    codes = grid.form(w, grid.fit(w)).named["codes"].numpy()
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    assert float(-(shares * np.log2(shares)).sum()) == pytest.approx(rate, abs=0.002)


def test_one_step_over_the_model_shares_the_rate() -> None:
    model: Any = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30))
    with torch.no_grad():
        model[1].weight.mul_(0.1)
    target = dt.UniformStep(rate=2.0, over="model")
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=target)]))
    steps = {float(item.form.named["scale"]) for item in run.encoded().values()}
    assert len(steps) == 1
    weights = [model[0].weight, model[1].weight]
    assert entropy_at(weights, steps.pop(), 0.5, 127) == pytest.approx(2.0, abs=0.005)
    each = [
        _counted(w.detach().reshape(-1), float(run.encoded()["0.weight"].form.named["scale"]), 0.5, 127)
        for w in weights
    ]
    assert each[0] > 2.0 > each[1]  # bits go where they buy something


def test_at_equal_entropy_its_error_is_below_that_of_a_fixed_width() -> None:
    """The reason for it: a width spends levels on the tails. Cover and Thomas, section 10.3: 0.25 bit off the bound."""
    w = _noise(200_000, kind="normal")
    fixed = dt.Uniform(bits=3)
    params = fixed.fit(w)
    rate = _counted(w, float(params["scale"]), 0.5, 3)
    free = dt.UniformStep(rate=rate)
    found = free.project(w, free.fit(w))
    error, other = ((found - w).square().mean(), (fixed.project(w, params) - w).square().mean())
    assert float(error) < 0.95 * float(other)
    bound = float(w.square().mean()) * 2 ** (-2 * rate)  # of a Gaussian source
    assert 1.0 < float(error) / bound < 1.53 * 1.02  # the space-filling loss of a scalar, pi e / 6 = 1.42, and low rate


@pytest.mark.parametrize(("rounding", "expected"), [(0.5, [1, 1, 2, 0]), (0.3, [0, 1, 2, 0])])
def test_less_rounding_leans_to_zero(rounding: float, expected: list[int]) -> None:
    w = torch.tensor([0.6, -0.75, 1.8, 0.0])
    grid = dt.UniformStep(step=1.0, rounding=rounding)
    assert grid.project(w, grid.fit(w)).abs().tolist() == expected
    assert grid.is_exact == (rounding == 0.5)


def test_a_given_step_is_the_step_and_clips_at_the_width() -> None:
    grid = dt.UniformStep(step=0.25, bits=3)
    w = torch.tensor([5.0, -5.0, 0.3])
    assert grid.project(w, grid.fit(w)).tolist() == [0.75, -0.75, 0.25]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_levels_that_a_dtype_cannot_tell_apart_are_refused(dtype: torch.dtype) -> None:
    """A bfloat16 has 8 digits: 127 steps are told apart, 511 are not."""
    layout = dt.Layout(shape=(4,))
    fine = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 16}[dtype]
    assert dt.UniformStep(step=0.1, bits=fine).accepts((4,), dtype, layout) is None
    if fine < 16:
        assert "more levels" in str(dt.UniformStep(step=0.1, bits=fine + 1).accepts((4,), dtype, layout))
    grid = dt.UniformStep(step=0.1, bits=fine)
    w = (0.1 * torch.arange(-(2 ** (fine - 1)), 2 ** (fine - 1))).to(dtype)
    params = grid.fit(w)
    q = grid.project(w, params)
    assert torch.equal(grid.project(q, params), q)


def test_wide_codes_come_back_from_a_file(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.UniformStep(step=1e-4, bits=13))]))
    with run.compressed():
        shown = model.weight.detach().clone()
    assert len(shown.unique()) > 256
    for coding in ("entropy", "bitpacked", "none"):
        dt.save(run, f"{tmp_path}/{coding}.detent", life="compressed", coding=coding)
        twin = nn.Linear(64, 64)
        dt.load(f"{tmp_path}/{coding}.detent", twin, life="compressed")
        assert torch.equal(twin.weight, shown)


@pytest.mark.parametrize("w", [torch.zeros(9), torch.full((9,), 1e-45), torch.tensor([3e38, -1.0])])
def test_ends_of_floats(w: Tensor) -> None:
    grid = dt.UniformStep(rate=1.0)
    q = grid.project(w, grid.fit(w))
    assert bool(torch.isfinite(q).all()) and (q == 0).all() == (float(w.abs().max()) < 1e-30)


def test_where_no_step_has_the_rate_nothing_is_clipped() -> None:
    w = torch.tensor([1.0, -0.5, 0.25, 0.1])
    assert step_at_rate([w], 7.0, 0.5, 127) == pytest.approx(1 / 127)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "must be given one of the two"),
        ({"step": 1.0, "rate": 1.0}, "must be given one of the two"),
        ({"step": 0.0}, "step=0.0"),
        ({"rate": float("inf")}, "finite"),
        ({"step": 1.0, "over": "model"}, "leave over out"),
        ({"rate": 1.0, "over": "rule"}, "over"),
        ({"rate": 1.0, "rounding": 0.6}, "0.25 to 0.5"),
        ({"rate": 1.0, "bits": 17}, "2 to 16"),
    ],
)
def test_refusals(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dt.UniformStep(**arguments)
