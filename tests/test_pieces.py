"""Promises about working in pieces: no bit hangs on how a tensor is cut, on NumPy's part, or on what is remembered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import detent as dt
from detent import masks, pieces
from detent.targets.base import Lines
from tests.cases import TARGETS

SHAPES = ((24, 20), (8, 6, 3, 3), (7, 50))


def _weights() -> list[Tensor]:
    torch.manual_seed(0)
    plain = [torch.randn(shape) for shape in SHAPES]
    return [
        *plain,
        plain[1].to(memory_format=torch.channels_last),
        plain[0].t(),
        plain[2].bfloat16(),
        plain[0].double(),
    ]


@pytest.mark.parametrize("name", TARGETS)
def test_a_projection_in_pieces_is_that_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, cut, whole_alone = TARGETS[name], 0, True
    for w in _weights():
        layout = dt.Layout(shape=tuple(w.shape))
        if target.accepts(w.shape, w.dtype, layout) is not None:
            continue
        (params,) = target.fit_model([w], [layout], [None])
        whole, relaxed = target.project(w, params), target.relax(w, params, 2.0)
        for size in (17, 64):
            monkeypatch.setattr(pieces, "CACHED", size)
            cut += Lines.of(target, params, w).apart
            whole_alone &= target.lined(params) is None
            assert torch.equal(target.project(w, params), whole), (w.shape, w.dtype)
            for act, right in ((target.project_into, whole), (target.relax_into, relaxed)):
                out = torch.full_like(w, torch.nan)
                act(w, params, *([2.0] if act == target.relax_into else []), out)  # type: ignore[operator]
                assert torch.equal(out, right), (w.shape, w.dtype)
            if target.scope in ("element", "row"):
                rows = [target.project(w[i : i + 3], params.local(i, i + 3)) for i in range(0, len(w) - 2, 3)]
                assert torch.equal(torch.cat(rows), whole[: 3 * len(rows)])
            monkeypatch.undo()
    assert cut or whole_alone


@pytest.mark.parametrize("granularity", ["tensor", "channel", dt.Group(size=5), dt.Group(size=3)])
@pytest.mark.parametrize(
    "mechanism",
    [
        dt.STE(),
        dt.PARQ(inverse_slope=0.3),
        dt.BinaryRelax(beta=2.0),
        dt.Clip(),
        dt.PSG(gain=8.0, form="update"),
        dt.GDTanh(),
    ],
    ids=lambda mechanism: type(mechanism).__name__,
)
def test_training_in_pieces_is_training_at_once(mechanism: Any, granularity: Any, monkeypatch: Any) -> None:
    def train(size: int) -> Tensor:
        monkeypatch.setattr(pieces, "CACHED", size)
        torch.manual_seed(0)
        layer = torch.nn.Linear(20, 24, bias=False)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
        rule = dt.Rule(match="weight", target=dt.Uniform(bits=3, granularity=granularity), mechanism=mechanism)
        dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=6)
        for _ in range(5):
            layer.weight.grad = torch.randn(24, 20)
            optimizer.step()
        return layer.weight.detach().clone()

    whole, cut = train(1 << 30), train(47)
    # Sums of sixteen digits may differ in the last by where in a tensor a number stands; what only compares may not.
    assert (
        torch.allclose(cut, whole, rtol=1e-5, atol=1e-7)
        if isinstance(mechanism, dt.GDTanh)
        else torch.equal(cut, whole)
    )


def test_pieces_match_and_leave_nothing_out() -> None:
    x, row, column = torch.arange(60.0).reshape(6, 10), torch.arange(10.0), torch.arange(6.0)[:, None]
    levels = torch.arange(12.0).reshape(6, 1, 2)
    for size in (1, 7, 25, 60, 100):
        for others in ((x + 1, 3.0), (column, None), (row, column), (levels, x * 2)):
            parts = list(pieces.cut(x, *others, size=size))
            assert torch.equal(torch.cat([part[0].reshape(-1) for part in parts]), x.reshape(-1))
            for part, *here in parts:
                assert part.numel() <= max(size, 10)
                for other, mine in zip(others, here, strict=True):
                    if other is column:
                        assert torch.equal((part - part % 10) / 10, mine.expand(part.shape))
                    elif other is row:
                        assert torch.equal(part % 10, mine.expand(part.shape))
                    elif other is levels:
                        assert torch.equal(mine[..., 0].expand(part.shape), (part - part % 10) / 5)
                    elif isinstance(other, Tensor):
                        assert torch.equal(mine, part + 1) or torch.equal(mine, part * 2)
                    else:
                        assert mine is other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_are_torch_s(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, -0.0, 0.0, torch.inf, -torch.inf, torch.nan, 2.0, 1.0], dtype=dtype)
    b = torch.tensor([1.0, 0.0, 3.0, torch.inf, 1.0, 1.0, torch.nan, -1.0], dtype=dtype)
    for how, right in (("gt", a > b), ("ge", a >= b), ("le", a <= b), ("eq", a == b)):
        found = masks.compare(a, how, b)  # type: ignore[arg-type]
        assert torch.equal(found, right) and masks.count(found) == int(right.sum())
        assert torch.equal(masks.places(found), right.nonzero()[:, 0])
        zeroed = masks.kept(a, found)
        assert torch.equal(zeroed.nan_to_num(9.0), a.masked_fill(~found, 0.0).nan_to_num(9.0))
        assert torch.equal(zeroed.signbit(), a.masked_fill(~found, 0.0).signbit())
        again = a.clone()
        assert masks.kept(again, found, again) is again
        assert torch.equal(again.nan_to_num(9.0), zeroed.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coarse", [False, True])
def test_a_threshold_that_is_remembered_changes_nothing(dtype: torch.dtype, coarse: bool, monkeypatch: Any) -> None:
    """The k largest are looked for near the last threshold: among ties, after small moves and after large ones."""
    monkeypatch.setattr(pieces, "CACHED", 100)
    torch.manual_seed(0)
    w = torch.randn(40, 25, dtype=torch.float64)
    for target in (dt.TopK(keep=0.1), dt.SparseLevels(sparse=dt.TopK(keep=0.3), survivors=dt.Uniform(bits=3))):
        params = target.fit(w.to(dtype))
        for step in range(30):
            here = ((w * 10).round() / 10 if coarse else w).to(dtype)
            fresh = type(params)(tensors=params.tensors, layout=params.layout)  # which remembers nothing
            assert torch.equal(target.project(here, params), target.project(here, fresh)), step
            if isinstance(target, dt.TopK):
                order = np.argsort(-here.abs().numpy().reshape(-1), kind="stable")[:100]
                kept = target.mask(here, params).reshape(-1)
                assert kept.nonzero()[:, 0].tolist() == sorted(order.tolist())
            w = w + torch.randn_like(w) * (0.002 if step % 7 else 0.3)


def test_what_params_remember_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(64, 60)
    grid = dt.Uniform(bits=4, granularity=dt.Group(size=7))  # its runs do not lie in rows
    params, calls = grid.fit(w), [0]

    def made(value: Any) -> Any:
        calls[0] += 1
        return value

    def ask() -> Tensor:
        return params.once("cells", lambda: made(grid.cell(params).clone()))

    assert torch.equal(ask(), ask()) and calls == [2], "as large as the weights"
    assert params.once("n", lambda: made(5)) == params.once("n", lambda: made(6))
    assert params.once("n", lambda: 7, at=1) == 7 and params.once("n", lambda: 8, at=1) == 7
    assert params.once("n", lambda: 9) == 9, "known for the last moment alone"
