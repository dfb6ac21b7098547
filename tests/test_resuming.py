"""Resuming: exact in every order that can be right, refused in words in every other; a step that raised is undone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LONG_PAIRS, MECHANISMS, TARGETS
from torch import Tensor, nn

import detent as dt
from benchmarks.resume import CASES, WAYS, outcome
from detent.grouping import Layout

STEPS = 8
AT = (0, 3, 6)  # where a run is cut

# One target a mechanism: the first of the table of pairs.
PAIRS: dict[str, str] = {}
for _target, _mechanism in LONG_PAIRS:
    PAIRS.setdefault(_mechanism, _target)


def net(target: dt.Target, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if target.accepts((8, 6), torch.float32, Layout(shape=(8, 6))) is not None:
        flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1), *flat
        )
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> dt.Run:
    rule = dt.Rule(match="weight$", target=TARGETS[PAIRS[name]], mechanism=MECHANISMS[name])
    return dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=STEPS)


def backward(model: nn.Module, step: int) -> None:
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    (model(inputs) - inputs[:, :4]).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, past: int) -> None:
    for step in range(first, past):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


ORDERS = {
    "model, attach, optimizer": ("model", "attach", "optimizer"),
    "attach, model, optimizer": ("attach", "model", "optimizer"),
    "attach, optimizer, model": ("attach", "optimizer", "model"),
    # Trainer and accelerate: what wraps the optimizer loads its own state back; Lightning loads some models twice.
    "model, attach, wrap, optimizer": ("model", "attach", "wrap", "optimizer"),
    "model, attach, optimizer, model": ("model", "attach", "optimizer", "model"),
}


def resume(order: tuple[str, ...], name: str, file: bytes) -> tuple[nn.Module, torch.optim.Optimizer, dt.Run]:
    held = torch.load(io.BytesIO(file), weights_only=True)
    model = net(TARGETS[PAIRS[name]], seed=99)
    optimizer, run = adamw(model), None
    for what in order:
        if what == "model":
            model.load_state_dict(held["model"])
        elif what == "optimizer":
            optimizer.load_state_dict(held["optimizer"])
        elif what == "wrap":
            optimizer.load_state_dict(optimizer.state_dict())
        else:
            run = attach(model, optimizer, name)
    assert run is not None
    return model, optimizer, run


@pytest.mark.parametrize("name", PAIRS)
def test_every_order_is_the_unbroken_run(name: str) -> None:
    """What the first forward pass sees, both lives before the first step, and what training comes to: bitwise."""
    unbroken = net(TARGETS[PAIRS[name]])
    optimizer = adamw(unbroken)
    run = attach(unbroken, optimizer, name)
    cuts, step = {}, 0
    for at in AT:
        train(unbroken, optimizer, step, at)
        codes = [encoded.decode() for encoded in run.encoded().values()]
        cuts[at], step = (saved(unbroken, optimizer), values(unbroken), codes), at
    train(unbroken, optimizer, step, STEPS)
    for order, parts in ORDERS.items():
        for at, (held, seen, codes) in cuts.items():
            model, again, resumed = resume(parts, name, held)
            assert same([encoded.decode() for encoded in resumed.encoded().values()], codes), f"{order}, cut at {at}"
            assert same(values(model), seen), f"{order}, cut at {at}: the first forward pass"
            train(model, again, at, STEPS)
            assert same(values(model), values(unbroken)), f"{order}, cut at {at}: the end"


@pytest.mark.parametrize("name", ["ste", "mirror-primal", "psg", "masked"])
@pytest.mark.parametrize(
    ("order", "words"),
    [
        (("model", "optimizer", "attach"), "loaded before attach"),
        (("optimizer", "attach", "model"), "loaded before attach"),
        (("model", "optimizer", "attach", "wrap"), "loaded before attach"),
        (("attach", "optimizer"), "does not hold the weights that the loaded state was saved with"),
        (("attach", "model"), "written by someone else"),
    ],
)
def test_every_other_order_is_refused(name: str, order: tuple[str, ...], words: str) -> None:
    """By the first step, and before it by whoever asks for the compressed life, which would be another one."""
    model = net(TARGETS[PAIRS[name]])
    optimizer = adamw(model)
    attach(model, optimizer, name)
    train(model, optimizer, 0, 5)
    model, optimizer, run = resume(order, name, saved(model, optimizer))
    with pytest.raises(RuntimeError, match=words):
        run.encoded()
    with pytest.raises(RuntimeError, match=words):
        train(model, optimizer, 5, 6)
    run.rebind(adopt=True)
    train(model, optimizer, 5, 6)


def test_row_sums_tell_weights_apart_and_shard_like_them() -> None:
    from detent import sharding

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        w = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        sums = sharding.row_sums(w)
        assert torch.equal(torch.cat([sharding.row_sums(w[:3]), sharding.row_sums(w[3:])]), sums)
        for at in range(35):  # one bit, anywhere
            other = w.clone()
            other.view(sharding._BITS[w.element_size()]).view(-1)[at] ^= 1
            assert int((sharding.row_sums(other) != sums).sum()) == 1
        swapped = w[:, [1, 0, 2, 3, 4]]
        assert bool((sharding.row_sums(swapped) != sums).all())
    assert [len(sharding.row_sums(torch.ones(shape))) for shape in ((), (3,), (0, 4), (2, 3, 4))] == [1, 3, 0, 2]


# -------------------------------------------------------------------------------------------------------- frameworks

_OFTEN = ("STE, Binary", "MirrorDescent, primal", "CodebookLearning", "PartialFreeze", "two stages")


@pytest.mark.filterwarnings("ignore")  # what the frameworks say of themselves
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in _OFTEN else pytest.mark.slow) for n in CASES])
def test_the_matrix_of_mechanisms_orders_and_frameworks(name: str, way: str, tmp_path: Path) -> None:
    pytest.importorskip({"Lightning": "lightning", "Trainer": "transformers"}.get(way, "accelerate"))
    assert outcome(name, way, tmp_path) == {"first_forward": 0.0, "end": 0.0}


def test_the_matrix_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that belongs to no weights, so that what attach wrote over them is not put back."""
    monkeypatch.setattr("detent.states.match_weights", lambda driver, model: None)
    monkeypatch.setattr("detent.states.refuse_other_weights", lambda driver, model: None)
    monkeypatch.setattr("detent.guards.refuse_foreign_writes", lambda entries, **how: None)
    found = outcome("MirrorDescent, dual", "by hand: model, attach, optimizer", tmp_path)
    assert found["first_forward"] > 0.0


# ------------------------------------------------------------------------------------------------- steps that raised


class Falls(torch.optim.AdamW):
    fall = False

    def step(self, closure: Any = None) -> Any:
        if self.fall:
            raise ArithmeticError("on the way")
        return super().step(closure)


@pytest.mark.parametrize("retry", ["the same gradient", "a new one", "after a look"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_step_that_raised_leaves_no_trace(name: str, retry: str) -> None:
    """Every step fails once: weights stay as seen, no fit, mask or metric moves twice, and the end is the same."""
    ends = []
    for broken in (False, True):
        model = net(TARGETS[PAIRS[name]])
        optimizer = Falls(model.parameters(), lr=0.01)
        run = attach(model, optimizer, name)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step)
            if broken:
                seen = values(model)
                optimizer.fall = True
                with pytest.raises(ArithmeticError):
                    optimizer.step()
                optimizer.fall = False
                if retry == "after a look":
                    run.encoded()
                    assert same(values(model), seen), step
                if retry == "a new one":
                    run.state_dict()  # an event, which repairs
                    optimizer.zero_grad()
                    backward(model, step)
            optimizer.step()
        ends.append(values(model))
    norm = getattr(MECHANISMS[name], "clip_norm", None)
    if norm is not None and retry != "a new one":  # a norm that is clipped a second time, by rounding
        torch.testing.assert_close(ends[0], ends[1], rtol=0.0, atol=1e-5)
    else:
        assert same(*ends)
