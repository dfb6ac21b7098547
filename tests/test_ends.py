"""Both ends of the number range of every dtype: what is finite stays so, under every target and mechanism."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import nn

import detent as dt
from detent.grouping import Layout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
_LAYOUT = Layout(shape=(8, 40))


def spread(dtype: torch.dtype, size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(8, 40, generator=generator, dtype=torch.float64).mul_(2).sub_(1).mul_(size)
    w[0, 0], w[3, 3] = size, -size
    return w.to(dtype)


def ends(dtype: torch.dtype) -> dict[str, float]:
    number = torch.finfo(dtype)
    return {"largest": number.max, "smallest": number.tiny * 16, "denormal": number.tiny * number.eps * 8}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.TARGETS)
def test_a_target_stays_finite_at_both_ends(name: str, dtype: torch.dtype) -> None:
    target = cases.TARGETS[name]
    if target.accepts(_LAYOUT.shape, dtype, _LAYOUT):
        pytest.skip("refused")
    for end, size in ends(dtype).items():
        w = spread(dtype, size)
        params = target.fit_model([w], [_LAYOUT], [None])[0]
        q = target.project(w, params)
        assert bool(torch.isfinite(q).all()), end
        assert torch.equal(target.project(q, params), q), end
        assert torch.equal(target.form(w, params).dense(), q), end
        assert bool((target.typical(params) > 0).all()) and bool(torch.isfinite(target.typical(params)).all()), end


# Of the targets one a kind: every mechanism on every one of them would be a thousand trainings.
_KINDS = (
    "uniform-3-minmax",
    "uniform-4-group",
    "binary",
    "ternary",
    "learned-4",
    "topk-tenth",
    "zero",
    "sparse-levels",
)


@pytest.mark.parametrize("name", cases.MECHANISMS)
def test_a_mechanism_trains_at_both_ends(name: str) -> None:
    """The upper end is the root of the largest number: a weight times a weight, or times a gradient, is finite."""
    for dtype in (torch.float32, torch.bfloat16):
        for size in (torch.finfo(dtype).max ** 0.5, torch.finfo(dtype).tiny * 16, torch.finfo(dtype).tiny / 16):
            for kind in _KINDS:
                if (kind, name) in cases.REFUSED or (name == "psg-paper" and size > 1):
                    continue  # the published form measures in units of a weight, which has its own ends
                layer = nn.Linear(40, 8, bias=False, dtype=dtype)
                with torch.no_grad():
                    layer.weight.copy_(spread(dtype, size))
                optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
                rule = dt.Rule(match="weight", target=cases.TARGETS[kind], mechanism=cases.MECHANISMS[name])
                run = dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=10)
                for tick in range(10):
                    layer.weight.grad = spread(dtype, min(size, 1e4)).roll(tick, 1)
                    optimizer.step()
                    assert bool(torch.isfinite(layer.weight).all()), (dtype, size, kind, tick)
                with run.compressed():
                    assert bool(torch.isfinite(layer.weight).all()), (dtype, size, kind)
