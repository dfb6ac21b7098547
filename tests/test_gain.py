"""PSG that sets its gain: the law against a slow one, what it promises, and what it remembers of the learning rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

import detent as dt
from detent import pieces
from detent.mechanisms.gain import descent, kept_gain, spread_of
from detent.optimizers import peak_of

STEPS, SHAPE = 60, (6, 5)
GRID = dt.Uniform(bits=3, range="minmax")
# float64 as good as exact; float32 some hundred roundings of 6e-8 over a whole path.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5}


def half_cosine(step: int, top: float = 0.02) -> float:
    """Six steps of warm-up, then a cosine that does not reach 0."""
    return top * min((step + 1) / 6, 0.55 + 0.45 * math.cos(math.pi * step / STEPS))


def layer_of(dtype: torch.dtype = torch.float64) -> nn.Linear:
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.random.default_rng(3).normal(size=SHAPE) * 0.3))
    return layer


def gradients(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = np.random.default_rng(4)
    return [torch.from_numpy(draw.normal(size=SHAPE)).to(dtype) for _ in range(STEPS)]


def attach(layer: nn.Module, optimizer: Any, psg: dt.Mechanism | None = None, **more: Any) -> dt.Run:
    rule = dt.Rule(match="weight", target=GRID, mechanism=psg or dt.PSG())
    return dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=STEPS, **more)


def go(layer: nn.Linear, optimizer: Any, given: list[Tensor], rate: Callable[[int], float], first: int = 0) -> None:
    """Steps with a rate that the loop sets by hand."""
    for step, gradient in enumerate(given, start=first):
        optimizer.param_groups[0]["lr"] = rate(step)
        layer.weight.grad = gradient.clone()
        optimizer.step()


def fit(w: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], float, float, float]:
    delta = reference.minmax_delta(w, 3)
    return lambda x: reference.grid(x, delta, 3), delta / 4, delta, 3 * delta


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_law_is_the_reference(name: str, dtype: torch.dtype) -> None:
    """With momentum or AdamW, weight decay, and a rate that warms up and falls."""
    layer, given = layer_of(dtype), gradients(dtype)
    w0 = layer.weight.detach().double().numpy().copy()
    if name == "SGD":
        optimizer: Any = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        slow: Any = reference.SGD(0.1, 0.9, 1e-2)
    else:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.3)
        slow = reference.AdamW(0.1, 0.3)
    attach(layer, optimizer)
    wanted = reference.psg_of_itself(
        w0,
        [g.double().numpy() for g in given],
        fit=fit,
        rate=half_cosine,
        eps=lambda t: 0.05 * max(1 - t / (0.8 * STEPS), 0.0),
        optimizer=slow,
    )
    for step, gradient in enumerate(given):
        go(layer, optimizer, [gradient], half_cosine, step)
        off = np.abs(layer.weight.detach().double().numpy() - wanted[step]).max() / np.abs(wanted[step]).max()
        assert off <= ROUNDING[dtype], f"step {step}: off by {off:.3g} of the largest weight"


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
def test_at_first_the_base_optimizer_runs_untouched_and_then_not(make: Any) -> None:
    nets = [layer_of(torch.float32), layer_of(torch.float32)]
    optimizers = [make(net.parameters(), lr=0.02, weight_decay=0.1) for net in nets]
    attach(nets[0], optimizers[0])
    same = []
    for step, gradient in enumerate(gradients(torch.float32)):
        for net, optimizer in zip(nets, optimizers, strict=True):
            go(net, optimizer, [gradient], lambda _: 0.02, step)
        same.append(torch.equal(nets[0].weight, nets[1].weight))
    assert same == [True] * (2 * STEPS // 5 + 1) + [False] * (3 * STEPS // 5 - 1)


# An optimizer, and whether its weight decay (0.3) acts on the weights themselves.
KINDS: dict[str, tuple[Callable[..., Any], bool]] = {
    "SGD": (partial(torch.optim.SGD, momentum=0.9, nesterov=True), False),
    "SGD, dampened": (partial(torch.optim.SGD, momentum=0.8, dampening=0.5), False),
    "Adam": (torch.optim.Adam, False),
    "AdamW": (partial(torch.optim.AdamW, amsgrad=True), True),
    "NAdam": (partial(torch.optim.NAdam, decoupled_weight_decay=True), True),
    "RMSprop": (partial(torch.optim.RMSprop, momentum=0.9), False),
    "Muon": (torch.optim.Muon, True),
    "Muon, rate of AdamW": (partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), True),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_law_holds_for_the_step_of_any_optimizer(name: str) -> None:
    """Against a plain copy of the optimizer that takes each step from the same weights, with the same memory."""
    kind, decoupled = KINDS[name]
    layer = layer_of()
    optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.3)
    attach(layer, optimizer)
    begin, spread = 24, 1.0
    project, r, c, limit = fit(layer.weight.detach().numpy())
    for t, g in enumerate(gradients()):
        w, rate = layer.weight.detach().numpy().copy(), half_cosine(t)
        plain, copied = copy.deepcopy((layer, optimizer))
        lost = rate * 0.3 if decoupled else 0.0
        scales_gradient = isinstance(optimizer, torch.optim.SGD)
        strength = min(max(t - begin, 0) / (0.5 * (STEPS - begin)), 1.0)
        if t == begin + 1:
            project, r, c, limit = fit(w)

        def s_of(move: np.ndarray) -> np.ndarray:
            nonlocal spread
            eps = 0.05 * max(1 - t / (0.8 * STEPS), 0.0)  # noqa: B023 (called in this turn of the loop)
            factor = reference.scale_free(w, project(w), r, c, 1.0, 1.0, eps)  # noqa: B023
            if t == begin + 1 or (t - begin) % 10 == 0:  # noqa: B023
                spread = reference.spread_of_itself(move, factor)
            heat = max(map(half_cosine, range(t + 1))) / rate  # noqa: B023
            return 1 - strength + strength * min(max(heat, 1 / spread), 4 / spread) * factor  # noqa: B023

        on_gradient = s_of(g.numpy()) if scales_gradient and strength else np.ones(SHAPE)
        go(plain, copied, [torch.from_numpy(on_gradient) * g], lambda _, rate=rate: rate)
        wanted = plain.weight.detach().numpy()
        if strength and not scales_gradient:
            move = wanted - w + lost * w
            wanted = w + s_of(move) * move - lost * w
        wanted = np.clip(wanted, -limit, limit) if strength else wanted
        go(layer, optimizer, [g], lambda _, rate=rate: rate)
        off = np.abs(layer.weight.detach().numpy() - wanted).max() / np.abs(wanted).max()
        assert off <= ROUNDING[torch.float64], f"step {t}: off by {off:.3g} of the largest weight"
    assert spread != 1.0


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("Adam", "RMSprop")])
def test_weight_decay_is_what_it_is_without_pulling(name: str) -> None:
    """Weights without a gradient, on their levels or between them, shrink as under the base optimizer.

    Not so where decay is part of the gradient and the step is scaled as a whole.
    """
    ends = []
    for pulled in (False, True):
        layer = layer_of()
        optimizer = KINDS[name][0](layer.parameters(), lr=0.1, weight_decay=0.3)
        if pulled:
            attach(layer, optimizer, dt.PSG(start=0, strength=1.0, clip=False))
        go(layer, optimizer, [torch.zeros(SHAPE, dtype=torch.float64)] * 5, half_cosine)
        ends.append(layer.weight.detach())
    assert torch.allclose(*ends, rtol=1e-13, atol=0)
    assert bool((ends[0].abs() < layer_of().weight.abs()).all())


def first_step(make: Callable[..., Any], most: float, **more: Any) -> tuple[float, Tensor]:
    """F, and the step taken, with the norm of the gradient clipped in the loop."""
    layer = layer_of()
    optimizer = make(layer.parameters(), lr=0.1)
    run = attach(layer, optimizer, dt.PSG(start=0, strength=1.0, clip=False, **more))
    before = layer.weight.detach().clone()
    layer.weight.grad = gradients()[0].clone()
    nn.utils.clip_grad_norm_(layer.parameters(), most)
    optimizer.step()
    return run.state_dict()["weights"]["weight"]["found"]["spread"], layer.weight.detach() - before


@pytest.mark.parametrize("make", [torch.optim.SGD, partial(torch.optim.AdamW, eps=0.0), torch.optim.Muon])
def test_a_gradient_clipped_in_the_loop_is_pulled_with_the_same_gain(make: Callable[..., Any]) -> None:
    (free, step), (clipped, shorter) = (first_step(make, most) for most in (1e9, 1e-3))
    assert clipped == pytest.approx(free, rel=1e-2 if make is torch.optim.Muon else 1e-9)  # it works in bfloat16
    share = shorter.norm() / step.norm()
    norm = 1e-3 / gradients()[0].norm() if make is torch.optim.SGD else torch.tensor(1.0)
    assert float(share) == pytest.approx(float(norm), rel=1e-2)


def test_a_norm_that_psg_clips_is_that_of_what_it_has_scaled() -> None:
    (free, step), (same, shorter) = first_step(torch.optim.SGD, 1e9), first_step(torch.optim.SGD, 1e9, clip_norm=0.5)
    assert free == same and float(step.norm()) > 0.1 * 0.5
    assert float(shorter.norm()) == pytest.approx(0.1 * 0.5, rel=1e-5)
    assert torch.allclose(shorter / shorter.norm(), step / step.norm(), rtol=1e-9)


@pytest.mark.parametrize("heat", [1.0, 2.0, 100.0])
def test_the_loss_falls_as_fast_as_without_factors_or_up_to_four_times(heat: float) -> None:
    """First order: sum g (s g) over sum g g is 1 where the rate is at its highest, and at most 4."""
    draw = torch.Generator().manual_seed(0)
    g, factor = torch.randn(1000, generator=draw), torch.rand(1000, generator=draw)
    gain = kept_gain(spread_of(descent(g, factor)), heat)
    share = float((g * gain * factor * g).sum() / (g * g).sum())
    plain = float((g * factor * g).sum() / (g * g).sum())
    assert share == pytest.approx(min(max(heat * plain, 1.0), 4.0), rel=1e-5)


def test_a_tensor_without_a_gradient_and_one_that_has_settled_have_a_finite_gain() -> None:
    assert kept_gain(spread_of(torch.zeros(2)), 1.0).item() == 1.0
    assert kept_gain(spread_of(torch.tensor([0.0, 1.0])), 1.0).item() == 16.0
    assert kept_gain(spread_of(torch.tensor([0.0, 1.0])), 1e9).item() == 64.0


@pytest.mark.parametrize("form", ["gradient", "update"])
def test_a_gradient_scaled_as_a_whole_has_the_same_gain(form: Any) -> None:
    """So a norm that is clipped in the loop, or a loss scale, does not change the pull: only their ratio counts."""
    ends = []
    for factor in (1.0, 2.0**-10):
        layer = layer_of()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        attach(layer, optimizer, dt.PSG(form=form))
        go(layer, optimizer, [g * factor for g in gradients()], lambda step, f=factor: half_cosine(step) / f)
        ends.append(layer.weight.detach())
    assert torch.allclose(*ends, rtol=1e-9, atol=0)


def test_pieces_of_a_large_tensor_have_one_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for piece in (pieces.CACHED, 7):
        monkeypatch.setattr(pieces, "CACHED", piece)
        for make in (torch.optim.SGD, torch.optim.AdamW):
            layer = layer_of()
            optimizer = make(layer.parameters(), lr=0.1)
            attach(layer, optimizer)
            go(layer, optimizer, gradients(), half_cosine)
            ends.append(layer.weight.detach())
    assert torch.allclose(ends[0], ends[2], rtol=1e-9) and torch.allclose(ends[1], ends[3], rtol=1e-9)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("at", [15, 45])
def test_resumed_it_goes_on_bitwise_and_knows_the_highest_rate(at: int, make: Any) -> None:
    """The rate is set by hand and was highest before the break: a process that resumes never sees it."""
    ends = []
    for resumed in (False, True):
        layer = layer_of()
        optimizer = make(layer.parameters(), lr=0.1)
        attach(layer, optimizer)
        given = gradients()
        go(layer, optimizer, given[:at], half_cosine)
        if resumed:
            saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(layer.state_dict())
            layer = layer_of()
            layer.load_state_dict(weights)
            optimizer = make(layer.parameters(), lr=1e-9)
            attach(layer, optimizer)
            optimizer.load_state_dict(saved)
        go(layer, optimizer, given[at:], half_cosine, at)
        ends.append(layer.weight.detach())
    assert torch.equal(*ends)


def test_the_state_of_a_plain_optimizer_may_be_loaded() -> None:
    """What PSG has found it can find again, so a training may go from plain to pulled."""
    layer = layer_of()
    plain = torch.optim.AdamW(layer.parameters(), lr=0.1)
    go(layer, plain, gradients()[:3], half_cosine)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    run = attach(layer, optimizer, dt.PSG(start=0, strength=1.0))
    optimizer.load_state_dict(plain.state_dict())
    go(layer, optimizer, gradients()[3:5], half_cosine, 3)
    assert run.state_dict()["weights"]["weight"]["found"]["spread"] > 0
    assert float(optimizer.state[layer.weight]["step"]) == 5


def test_the_highest_rate_is_known_from_the_scheduler_before_it_comes() -> None:
    parameter = [nn.Parameter(torch.ones(1))]
    optimizer = torch.optim.SGD(parameter, lr=0.01)
    assert peak_of(optimizer.param_groups[0]) == 0.01
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02) and peak_of(optimizer.param_groups[0]) == 0.5
    warm = torch.optim.SGD(parameter, lr=0.3)
    torch.optim.lr_scheduler.LambdaLR(warm, lambda step: min(step / 100, 1.0))
    assert warm.param_groups[0]["lr"] == 0.0 and peak_of(warm.param_groups[0]) == 0.3


def test_under_a_falling_rate_weights_end_nearer_their_levels_than_at_gain_one() -> None:
    ends = []
    for psg in (dt.PSG(), dt.PSG(gain=1.0, start=0.4)):
        torch.manual_seed(0)
        layer = nn.Linear(40, 40, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        rule = dt.Rule(match="weight", target=GRID, mechanism=psg)
        run = dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=STEPS)
        for _ in range(STEPS):
            layer.weight.grad = torch.randn(40, 40) * 0.15
            optimizer.step()
            schedule.step()
        ends.append(run.measure()[0]["distance"])
    assert ends[0] < 0.8 * ends[1]


def test_a_warp_and_a_scale_want_a_number() -> None:
    w = torch.tensor([0.1, 0.4, 1.0])
    for act in (dt.PSG().scale, dt.PSG().warp):
        with pytest.raises(ValueError, match=r'gain="auto"\): finds the gain from gradients'):
            act(w, GRID, GRID.fit(w), 9, 10)


@pytest.mark.parametrize("gain", [0.0, -1.0, "much", float("inf"), None])
def test_another_gain_is_refused(gain: Any) -> None:
    with pytest.raises(ValueError, match=r'gain=.*must be a finite number > 0, or "auto"'):
        dt.PSG(gain=gain)


def test_the_published_unit_wants_a_number() -> None:
    with pytest.raises(ValueError, match='gain="auto" is told in cells'):
        dt.PSG(units="weight")
