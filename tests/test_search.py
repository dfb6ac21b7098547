"""The search for a scale: the same numbers as trying every candidate on every weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import detent as dt
from detent.grouping import Layout, granularity_of
from detent.targets import search
from detent.targets.base import check_finite

_RATIOS = {
    "mse": torch.linspace(1.0, 0.1, 41, dtype=torch.float64).tolist(),
    "interval": torch.linspace(1.1, 0.9, 201, dtype=torch.float64).tolist(),
}

_WEIGHTS = {
    "normal": lambda *shape: torch.randn(*shape),
    "heavy tails": lambda *shape: torch.randn(*shape) ** 5,
    "on a grid": lambda *shape: torch.randn(*shape).mul(2).round(),
    "mostly zero": lambda *shape: torch.randn(*shape) * (torch.rand(*shape) < 0.1),
    "far from zero": lambda *shape: torch.rand(*shape) + 5,
    "dead rows": lambda *shape: torch.randn(*shape) * (torch.arange(shape[0]) % 2).reshape(-1, *(1 for _ in shape[1:])),
    "huge": lambda *shape: torch.randn(*shape) * 1e30,
    "tiny": lambda *shape: torch.randn(*shape) * 1e-38,
}


def _finds_the_same(target: dt.Uniform, w: Tensor) -> bool:
    """Whether trying every candidate on all weights of a group, in order, finds the same scales.

    Only a strictly smaller error wins. Sums in another order may tell errors apart that are equal but for the last bits
    of float64.
    """
    mine = target.fit(w)["scale"]
    layout = Layout(shape=tuple(w.shape))
    groups = granularity_of(target.granularity)
    x = w if w.dtype == torch.float64 else w.float()
    minmax = dt.Uniform(bits=target.bits, granularity=target.granularity, range="minmax", zero=target.zero)
    best = full = minmax.fit(w, layout)["scale"]
    least = torch.full(full.shape, torch.inf, dtype=torch.float64)
    own = torch.full_like(least, torch.inf)
    unit = 2.0 ** -math.frexp(float(x.abs().max()))[1]
    n, one = 2 ** (target.bits - 1) - target.zero, torch.ones(())
    for ratio in _RATIOS[target.range]:
        scale = target._rounded(full.to(x.dtype) * ratio, w.dtype)
        s = groups.expand(scale.to(x.dtype), layout)
        q = (x / torch.where(s > 0, s, one.to(x))).round().clamp(-n, n)
        if not target.zero:
            q = torch.where(x < 0, -one.to(x), one.to(x)) * q.abs().clamp_min(1)
        error = groups.sum(((q * s - x) * unit).square(), layout)
        own = torch.where((scale == mine) & own.isinf(), error, own)
        best, least = torch.where(error < least, scale, best), torch.where(error < least, error, least)
    return bool(((best == mine) | ((own - least) <= 1e-14 * least)).all())


@pytest.mark.parametrize("weights", _WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "channel", dt.Group(size=32), dt.Group(size=300)], ids=str)
def test_the_search_finds_what_trying_all_finds(weights: str, dtype: torch.dtype, granularity: Any) -> None:
    w = _WEIGHTS[weights](9, 1000).to(dtype)
    for bits, zero in ((2, True), (4, True), (4, False), (6, True)):
        target = dt.Uniform(bits=bits, granularity=granularity, zero=zero)
        assert _finds_the_same(target, w), (bits, zero)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 40_000), (16, 8, 3, 3), (100, 300)], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", dt.Group(size=7)], ids=str)
def test_the_search_on_every_shape(shape: tuple[int, ...], granularity: Any) -> None:
    w = torch.randn(*shape)
    for bits, zero in ((3, True), (8, True), (3, False)):
        target = dt.Uniform(bits=bits, granularity=granularity, zero=zero)
        assert _finds_the_same(target, w), (bits, zero)
    narrow = dt.Uniform(bits=4, granularity=granularity, range="interval")
    assert _finds_the_same(narrow, w)


@pytest.mark.parametrize("weights", ["normal", "heavy tails", "on a grid", "mostly zero", "far from zero", "dead rows"])
def test_the_bounds_hold_the_error(weights: str) -> None:
    """Below and above the error that float64 finds, and close to it."""
    w = _WEIGHTS[weights](6, 2000)
    tops = w.abs().amax(1)
    candidates = torch.stack([tops * ratio / 7 for ratio in (1.0, 0.8, 0.5, 0.2)]).double()
    levels = candidates.unsqueeze(2) * torch.arange(8.0, dtype=torch.float64)
    low, high = search.error_bounds(w, torch.full((6,), 2000), levels, torch.float32)
    a = w.double().abs()
    for row in range(6):
        exponent = math.frexp(float(tops[row]))[1] if tops[row] > 0 else 0
        errors = (a[row][None, :, None] - levels[:, row][:, None]).abs().amin(2).square().sum(1)
        if tops[row] == 0:
            assert low[0, row] <= high[0, row] and bool(low[1:, row].isinf().all())
            continue
        # In units of a bin, and up to one number a row: compare differences to the first candidate.
        unit = 2.0 ** (2 * (10 - exponent))
        gap_low = (low[1:, row] - high[0, row]) / unit
        gap_high = (high[1:, row] - low[0, row]) / unit
        gap = errors[1:] - errors[0]
        assert bool((gap_low <= gap).all() and (gap <= gap_high).all())
        if weights == "normal":
            assert bool((gap_high - gap_low < 0.05 * errors[0]).all()), "too wide to leave anything out"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_is_counted(bad: float, dtype: torch.dtype) -> None:
    w = torch.randn(5, 7).to(dtype)
    check_finite(w)
    w[2, 3] = w[4, 0] = bad
    with pytest.raises(ValueError, match="2 of 35 weights are NaN or infinite"):
        check_finite(w)
    largest = torch.finfo(dtype).max
    check_finite(torch.tensor([largest, -largest], dtype=dtype))
