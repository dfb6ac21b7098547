"""Mechanisms: the shipped laws on the pairs of the table, and the hooks' training against the slow references."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import LONG_PAIRS, MECHANISMS, PAIRS, REFUSED, SKIPPED, TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import detent as dt
from detent.specs import from_spec, to_spec
from detent.testing import check_mechanism, check_pair

STEPS = 60


def own_mechanisms() -> set[type]:
    """Every final mechanism class that the package exports."""
    classes = [v for v in vars(dt).values() if isinstance(v, type) and issubclass(v, dt.Mechanism)]
    return set(classes) - {dt.Mechanism}


def test_every_mechanism_has_a_row_and_a_long_check() -> None:
    assert {type(mechanism) for mechanism in MECHANISMS.values()} == own_mechanisms()
    assert {mechanism for _, mechanism in LONG_PAIRS} == set(MECHANISMS)
    assert len(PAIRS) + len(REFUSED) + len(SKIPPED) == len(TARGETS) * len(MECHANISMS)
    assert all(len(reason) > 10 for reason in SKIPPED.values())


@pytest.mark.parametrize(("target", "mechanism"), LONG_PAIRS)
def test_laws(target: str, mechanism: str) -> None:
    check_mechanism(MECHANISMS[mechanism], TARGETS[target])


@pytest.mark.parametrize(("target", "mechanism"), PAIRS)
def test_every_pair(target: str, mechanism: str) -> None:
    check_pair(TARGETS[target], MECHANISMS[mechanism])


@pytest.mark.parametrize(("target", "mechanism"), REFUSED)
def test_pairs_without_meaning_are_refused(target: str, mechanism: str) -> None:
    with pytest.raises(ValueError) as caught:
        dt.Rule(match="weight", target=TARGETS[target], mechanism=MECHANISMS[mechanism])
    assert REFUSED[target, mechanism] in str(caught.value)
    with pytest.raises(ValueError, match="refuses"):
        check_mechanism(MECHANISMS[mechanism], TARGETS[target])


# --- the laws can fail: one wrong mechanism each -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shrink(dt.Mechanism):
    """A right mechanism (w <- 0.99 w, counting its steps) with one thing wrong, named by `wrong`."""

    wrong: str = ""
    start: int = 0

    keeps_full_life = True
    memory = ("mask", "steps")

    def active(self, clock):
        return self.wrong == "always on" or clock.step >= self.start

    def open(self, slot, clock):
        if self.wrong == "early":
            slot.weight.mul_(0.5)

    def after_step(self, slot, clock):
        steps = slot.state.setdefault("steps", torch.zeros(()))
        steps += 1
        if self.wrong == "says too little":
            slot.state["secret"] = steps.clone()
        slot.weight.mul_(1 - 0.001 * float(steps))
        if self.wrong == "blows up":
            slot.weight.fill_(float("inf"))
        if self.wrong == "leaks":
            slot.state["mask"] = torch.zeros_like(slot.weight, dtype=torch.bool)
        if self.wrong == "miscounts":
            slot.state["mask"] = slot.weight != 0


def test_a_right_mechanism_passes() -> None:
    check_mechanism(Shrink(), dt.TopK(keep=0.5))


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("always on", "before its start it is the base optimizer"),
        ("early", "before its start it is the base optimizer"),
        ("says too little", "memory names all it keeps"),
        ("blows up", "not finite|training gives finite weights"),
        ("leaks", "masked weights are zero"),
        ("miscounts", "masks hold the exact count"),
    ],
)
def test_a_wrong_mechanism_is_found(wrong: str, law: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=law):
        check_mechanism(Shrink(wrong=wrong), dt.TopK(keep=0.5))


_DRAWS = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Forgets(dt.Mechanism):
    """Its steps depend on something no checkpoint holds."""

    keeps_full_life = True

    def active(self, clock):
        return True

    def after_step(self, slot, clock):
        slot.weight.mul_(1 - 1e-3 / next(_DRAWS))


def test_a_mechanism_that_forgets_is_found() -> None:
    with pytest.raises(AssertionError, match="a resumed run is the unbroken run"):
        check_mechanism(Forgets(), dt.Uniform(bits=4))


def test_a_psg_that_flips_is_found(monkeypatch) -> None:
    right = dt.PSG._scale
    monkeypatch.setattr(dt.PSG, "_scale", lambda self, *args: right(self, *args) - 1.0)
    for form in ("gradient", "update"):
        with pytest.raises(AssertionError, match="changes its sign"):
            check_mechanism(dt.PSG(form=form, eps=0.0, gain=1.0), dt.Uniform(bits=3, range="minmax"))


# --- fast == reference -------------------------------------------------------------------------------------------


class _Bench:
    """One weight under a real optimizer with Detent attached, fed given gradients."""

    def __init__(self, dtype: torch.dtype, seed: int = 3) -> None:
        generator = np.random.default_rng(seed)
        self.w0 = generator.normal(size=(6, 5)) * 0.3
        self.gradients = [generator.normal(size=(6, 5)) for _ in range(STEPS)]
        self.dtype = dtype
        self.layer = nn.Linear(5, 6, bias=False, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.from_numpy(self.w0))

    def start(self) -> np.ndarray:
        """The starting weights exactly as the layer holds them."""
        return self.layer.weight.detach().double().numpy().copy()

    def given(self) -> list[np.ndarray]:
        """The gradients exactly as the layer gets them."""
        return [torch.from_numpy(g).to(self.dtype).double().numpy() for g in self.gradients]

    def path(self, optimizer: torch.optim.Optimizer, rule: dt.Rule) -> tuple[list[np.ndarray], list[dict]]:
        """The weights, and the state, after every step."""
        dt.attach(self.layer, optimizer, dt.Recipe([rule]), total_steps=STEPS)
        weights, states = [], []
        for gradient in self.gradients:
            self.layer.weight.grad = torch.tensor(gradient, dtype=self.dtype)  # a copy: PSG scales it in place
            optimizer.step()
            weights.append(self.layer.weight.detach().double().numpy().copy())
            saved = optimizer.state_dict()["detent"]["weights"]["weight"]["state"]
            states.append({name: value.double().numpy().copy() for name, value in saved.items()})
        return weights, states


# Stated rounding, as a share of the largest |w|, over a whole path of 60 steps: float64 as good as exact; float32 some
# hundred roundings of 6e-8, because a step multiplies an error in w by 1 + lr * gain * g / r.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5}


def _agree(fast: list[np.ndarray], slow: list[np.ndarray], dtype: torch.dtype) -> None:
    assert len(fast) == len(slow) == STEPS
    assert float(np.abs(slow[-1] - slow[0]).max()) > 0.02, "nothing moved, so nothing was compared"
    for step, (a, b) in enumerate(zip(fast, slow, strict=True)):
        worst = float(np.abs(a - b).max() / np.abs(b).max())
        assert worst <= ROUNDING[dtype], f"step {step}: off by {worst:.3g} of the largest weight"


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("bits", "lambda_s", "eps"), [(4, 20.0, 0.0), (3, 10.0, 0.02), (2, 4.0, 0.0)])
def test_psg_is_the_papers(bits, lambda_s, eps, dtype) -> None:
    bench = _Bench(dtype)
    w0, gradients = bench.start(), bench.given()
    rule = dt.Rule(
        match="weight",
        target=dt.Uniform(bits=bits, range="ema"),
        mechanism=dt.PSG.paper(lambda_s=lambda_s, eps=eps),
        fit_every=1,
        fit_until=1.0,
    )
    optimizer = torch.optim.SGD(bench.layer.parameters(), lr=0.004, momentum=0.9, weight_decay=1e-2)
    fast, _ = bench.path(optimizer, rule)
    slow = reference.psg_paper(
        w0, gradients, bits=bits, lambda_s=lambda_s, eps=eps, optimizer=reference.SGD(0.004, 0.9, 1e-2)
    )
    _agree(fast, slow, dtype)


def _fit_grid(bits: int):
    def fit(w):
        delta = reference.minmax_delta(w, bits)
        return lambda x: reference.grid(x, delta, bits), delta / 4, delta, reference.most(bits) * delta

    return fit


def _fit_zero(w):
    r = reference.stored(float(np.abs(w).mean()))
    return np.zeros_like, r, 4 * r, np.inf


_PULLS = {"grid": (dt.Uniform(bits=3, range="minmax"), _fit_grid(3)), "zero": (dt.Zero(), _fit_zero)}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("pull", _PULLS)
def test_psg_on_the_gradient_is_the_reference(pull, dtype) -> None:
    """Schedules of strength and eps, a fit every 7 steps until step 30, clipping and a fit from step 6, momentum."""
    target, fit = _PULLS[pull]
    bench = _Bench(dtype)
    w0, gradients = bench.start(), bench.given()
    mechanism = dt.PSG(
        gain=2.0,
        strength=dt.Linear(first=0.2, last=1.0, begin=10, end=50),
        eps=dt.Linear(first=0.05, last=0.0, begin=0.0, end=0.8),
        clip_start=0.1,
    )
    rule = dt.Rule(match="weight", target=target, mechanism=mechanism, fit_every=7, fit_until=30)
    optimizer = torch.optim.SGD(bench.layer.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-2)
    fast, _ = bench.path(optimizer, rule)
    slow = reference.psg_gradient(
        w0,
        gradients,
        fit=fit,
        fit_at=lambda t: (t % 7 == 0 or t == 6) and t < 30,
        strength=lambda t: 0.2 + 0.8 * min(max((t - 10) / 40, 0.0), 1.0),
        gain=2.0,
        eps=lambda t: 0.05 * max(1 - t / 48, 0.0),
        clip_from=6,
        optimizer=reference.SGD(0.005, 0.9, 1e-2),
    )
    _agree(fast, slow, dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("pull", _PULLS)
def test_psg_on_the_update_is_the_reference(pull, dtype) -> None:
    """Under AdamW `form="auto"` scales the step, and the decoupled decay stays outside."""
    target, fit = _PULLS[pull]
    bench = _Bench(dtype)
    w0, gradients = bench.start(), bench.given()
    mechanism = dt.PSG(gain=1.5, strength=0.7, eps=0.03, clip=False)
    rule = dt.Rule(match="weight", target=target, mechanism=mechanism, fit_until=0)
    optimizer = torch.optim.AdamW(bench.layer.parameters(), lr=0.004, weight_decay=0.5)
    fast, _ = bench.path(optimizer, rule)
    slow = reference.psg_update(
        w0, gradients, fit=fit, strength=0.7, gain=1.5, eps=0.03, optimizer=reference.AdamW(0.004, 0.5)
    )
    _agree(fast, slow, dtype)


def test_both_forms_agree_under_plain_sgd() -> None:
    paths = []
    for form in ("gradient", "update"):
        bench = _Bench(torch.float64)
        rule = dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=dt.PSG(form=form, gain=2.0))
        paths.append(bench.path(torch.optim.SGD(bench.layer.parameters(), lr=0.02), rule)[0])
    _agree(*paths, dtype=torch.float64)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", ["minmax", "ema"])
@pytest.mark.parametrize("every", [1, 7, None])
def test_ste_is_the_reference(every, kind, dtype) -> None:
    bench = _Bench(dtype)
    w0, gradients = bench.start(), bench.given()
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=3, range=kind), mechanism=dt.STE(), fit_every=every)
    optimizer = torch.optim.SGD(bench.layer.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
    weights, states = bench.path(optimizer, rule)
    running = reference.RunningRange()
    fits: list[float] = []

    def delta_of(a: Any) -> float:
        """One a step: a fresh one where it is due, else the last."""
        fresh = len(fits) % (every or 10) == 0 or len(fits) == len(gradients) - 1
        if fresh:
            fits.append(running.see(a, 3) if kind == "ema" else reference.minmax_delta(a, 3))
        else:
            fits.append(fits[-1])
        return fits[-1]

    slow = reference.straight_through(
        w0,
        gradients,
        delta_of=delta_of,
        bits=3,
        optimizer=reference.SGD(0.01, 0.9, 1e-2),
    )
    _agree([state["latent"] for state in states], [a for a, _ in slow], dtype)
    if dtype == torch.float64:  # in float32 a latent half-way between two levels may fall to either side
        _agree(weights, [w for _, w in slow], dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_hard_projection_is_the_reference(dtype) -> None:
    bench = _Bench(dtype)
    w0, gradients = bench.start(), bench.given()
    rule = dt.Rule(match="weight", target=dt.TopK(keep=12), mechanism=dt.HardProjection(every=5))
    optimizer = torch.optim.SGD(bench.layer.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
    weights, states = bench.path(optimizer, rule)
    slow = reference.hard_threshold(w0, gradients, k=12, every=5, optimizer=reference.SGD(0.01, 0.9, 1e-2))
    _agree(weights, [w for w, _ in slow], dtype)
    for state, (_, mask) in zip(states, slow, strict=True):
        assert ("mask" in state) == (mask is not None)
        assert mask is None or np.array_equal(state["mask"], mask)
    assert int(states[-1]["mask"].sum()) == 12


def test_clip_is_sgd_on_a_box() -> None:
    bench = _Bench(torch.float64)
    w, gradients = bench.start(), bench.given()
    limit = reference.most(3) * reference.mse_delta(w, 3)
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=dt.Clip(start=5), fit_until=0)
    fast, _ = bench.path(torch.optim.SGD(bench.layer.parameters(), lr=0.02), rule)
    optimizer, slow = reference.SGD(0.02), []
    for step, g in enumerate(gradients):
        w = optimizer.step(w, g)
        w = np.clip(w, -limit, limit) if step >= 5 else w
        slow.append(w)
    _agree(fast, slow, torch.float64)
    assert float(np.abs(fast[4]).max()) > limit >= float(np.abs(fast[-1]).max())


# --- PSG's numbers -----------------------------------------------------------------------------------------------


def test_the_scale_by_hand() -> None:
    """2 bits, levels -1, 0, 1: c = 1, r = 1/4, so s = 4 gain (min(d, 1/2) + eps)."""
    w = torch.tensor([1.0, 0.0, 0.25, -0.5, 0.9, 3.0], dtype=torch.float64)
    grid = dt.Uniform(bits=2, range="minmax")
    params = grid.fit(w[:5])
    close = [0.0, 0.0, 1.0, 2.0, 0.4, 2.0]  # the last is capped at half a cell
    assert dt.PSG(gain=1.0, eps=0.0).scale(w, grid, params).tolist() == pytest.approx(close, abs=1e-12)
    half = dt.PSG(gain=3.0, eps=0.1, strength=0.5).scale(w, grid, params).tolist()
    assert half == pytest.approx([0.5 + 0.5 * 3 * (s + 0.4) for s in close], abs=1e-12)
    paper = dt.PSG.paper(lambda_s=150.0, eps=0.01).scale(w, grid, params).tolist()
    distances = [0.0, 0.0, 0.25, 0.5, 0.1, 2.0]
    assert paper == pytest.approx([150 * (d + 0.01) for d in distances], abs=1e-12)


@settings(max_examples=50)
@given(st.integers(2, 8), st.floats(1e-6, 1e6), st.floats(0, 1), st.floats(0.01, 100))
def test_the_scale_knows_no_units(bits, unit, strength, gain) -> None:
    """Weights in other units have the same s; it is never negative; its mean over a cell is about the gain."""
    w = torch.linspace(-1, 1, 41, dtype=torch.float64)
    grid, psg = dt.Uniform(bits=bits, range="minmax"), dt.PSG(gain=gain, eps=0.0, strength=strength)
    scale = psg.scale(w, grid, grid.fit(w))
    other = psg.scale(w * unit, grid, grid.fit(w * unit))
    assert torch.allclose(other, scale, rtol=1e-4, atol=1e-4 * gain)
    assert bool((scale >= 0).all())
    cell = torch.linspace(0, 1, 1001, dtype=torch.float64) / reference.most(bits)
    mean = float(psg.scale(cell, grid, grid.fit(w)).mean())
    assert mean == pytest.approx(1 - strength + strength * gain, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_scale_of_small_half_weights_is_finite(dtype) -> None:
    w = (torch.randn(20, 4) * 1e-3).to(dtype)
    for target in (dt.Uniform(bits=4), dt.Zero(), dt.TopK(keep=0.5)):
        scale = dt.PSG(eps=0.01, gain=8.0).scale(w, target, target.fit(w))
        assert scale.dtype == dtype and bool(scale.isfinite().all()) and bool((scale >= 0).all())


def test_survivors_of_a_sparse_target_train_freely() -> None:
    w = torch.tensor([5.0, 0.1, -4.0, 0.0])
    target = dt.TopK(keep=0.5)
    scale = dt.PSG(eps=0.0, gain=1.0).scale(w, target, target.fit(w))
    assert scale[[0, 2]].tolist() == [1.0, 1.0] and scale[3] == 0
    assert float(scale[1]) > 0


def test_clip_norm_acts_after_scaling() -> None:
    layer = nn.Linear(5, 4, bias=False)
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=dt.PSG(clip_norm=0.5, gain=8.0))
    run = dt.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), dt.Recipe([rule]), total_steps=5)
    layer.weight.grad = torch.randn(4, 5) * 100
    run.detach()
    run = dt.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), dt.Recipe([rule]), total_steps=5, hooks=False)
    run.before_step()
    assert float(layer.weight.grad.norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_step_that_raises_is_repaired() -> None:
    """The update form and STE hold weights between the two halves of a step; a step that raised must not lose them."""

    class Stumbles(torch.optim.SGD):
        fall = False

        def step(self, closure=None):
            loss = super().step(closure)
            if self.fall:
                raise ArithmeticError("on the way")
            return loss

    for mechanism in (dt.PSG(form="update", gain=2.0), dt.STE()):
        torch.manual_seed(0)
        layer = nn.Linear(5, 4, bias=False)
        optimizer = Stumbles(layer.parameters(), lr=0.1)
        rule = dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=mechanism)
        run = dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=5)
        seen = layer.weight.detach().clone()
        layer.weight.grad = torch.randn(4, 5)
        optimizer.fall = True
        with pytest.raises(ArithmeticError):
            optimizer.step()
        optimizer.fall = False
        with run.compressed():
            pass
        assert torch.equal(layer.weight, seen)
        optimizer.step()
        assert run.clock == 1


def test_mechanisms_are_values() -> None:
    """Equal and hashed alike when their fields are, as recipes that are compared and cached need."""
    for mechanism in MECHANISMS.values():
        again = from_spec(to_spec(mechanism))
        assert again == mechanism and again is not mechanism
        assert len({mechanism, again}) == 1


@pytest.mark.parametrize("form", ["gradient", "update"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cutting_a_large_weight_into_pieces_changes_no_bit(monkeypatch, form, memory_format: Any) -> None:
    """PSG works on cache-sized pieces of large weights; the pieces must add up to the whole, bitwise."""

    def train(piece: int) -> torch.Tensor:
        monkeypatch.setattr("detent.pieces.CACHED", piece)
        torch.manual_seed(0)
        model = torch.nn.Conv2d(7, 5, 3, bias=False).to(memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        rule = dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=dt.PSG(form=form, clip_start=0, gain=8.0))
        dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=5)
        for _ in range(5):
            model.weight.grad = torch.randn(5, 7, 3, 3).to(memory_format=memory_format)
            optimizer.step()
        return model.weight.detach().clone()

    assert torch.equal(train(1 << 30), train(17))


@pytest.mark.parametrize("target", [dt.Uniform(bits=2), dt.Uniform(bits=4, granularity="channel"), dt.Ternary()])
@pytest.mark.parametrize(
    "mechanism",
    [
        dt.PSG(gain=8.0),
        dt.Clip(),
        dt.PSG(start=0.05, gain=8.0),
        dt.PSG(clip_start=0.1, gain=8.0),
        dt.PSG(gain=8.0, start=0.05),
    ],
)
def test_clipping_does_not_shrink_weights_that_nothing_moves(target: dt.Target, mechanism: dt.Mechanism) -> None:
    """A range that is fitted again to what it has clipped is smaller each time: the naive way ends at a fraction."""
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 32, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    rule = dt.Rule(match="weight", target=target, mechanism=mechanism)
    dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=3000)
    norms = []
    for _ in range(1000):
        model.weight.grad = torch.randn(32, 32)
        optimizer.step()
        norms.append(float(model.weight.detach().norm()))
    clipped = norms[310]
    assert clipped < norms[0] or mechanism in (dt.PSG(gain=8.0), dt.Clip()), (
        "nothing was ever clipped: the test shows nothing"
    )
    assert norms[-1] == pytest.approx(clipped, rel=1e-3) and clipped > 0.7 * norms[0]


def test_a_channel_of_zeros_may_still_train() -> None:
    model = torch.nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        model.weight[0] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=4, granularity="channel"), mechanism=dt.Clip())
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=100)
    limit = model.weight.detach()[1:].abs().amax(1)
    for _ in range(10):
        model.weight.grad = -torch.ones(4, 8)
        optimizer.step()
    assert float(model.weight.detach()[0].amin()) == pytest.approx(1.0)
    assert bool((model.weight.detach()[1:].abs().amax(1) <= limit * 1.2).all()), "the others stay in their range"
    with run.compressed():
        assert not bool(model.weight.detach()[0].any())  # its grid has one level; docs/psg.md says so


@pytest.mark.parametrize("mechanism", [dt.PSG(clip_start=7, gain=8.0), dt.Clip(start=7)])
def test_clipping_starts_from_the_range_of_the_weights_as_they_are(mechanism):
    """A range fitted at the start would hold a growing weight at its initial size; the naive way fails here."""
    model = torch.nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=8, range="minmax"), mechanism=mechanism, fit_until=50)
    dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=100)
    for _ in range(7):
        model.weight.grad = torch.zeros(8, 8)
        with torch.no_grad():
            model.weight.grad.copy_(-model.weight)  # doubles every weight that is not exactly on its level
        optimizer.step()
    grown = float(model.weight.detach().abs().max())
    model.weight.grad = torch.full((8, 8), 1e-9)
    optimizer.step()
    assert float(model.weight.detach().abs().max()) == pytest.approx(grown, rel=1e-5)
