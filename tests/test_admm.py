"""ADMM and what surrounds it: fast against the slow reference, exact counts, rescaling, masks and freezes that hold."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import nn

import detent as dt
from detent.mechanisms import Clock
from detent.mechanisms.base import never_zero
from detent.specs import from_spec, to_spec

STEPS = 40
SGD, ADAM = "SGD", "Adam"


def _start(seed: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    w = generator.normal(size=(6, 5)) * 0.3
    return w, [generator.normal(size=(6, 5)) for _ in range(STEPS)]


def _layer(w: np.ndarray) -> nn.Linear:
    layer = nn.Linear(5, 6, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w))
    return layer


def _run(layer: nn.Module, optimizer: torch.optim.Optimizer, mechanism: dt.Mechanism, target: dt.Target) -> dt.Run:
    rule = dt.Rule(match="weight", target=target, mechanism=mechanism)
    return dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=STEPS)


def _state(run: dt.Run, name: str = "weight") -> dict[str, torch.Tensor]:
    entry = run.state_dict()["weights"][name]
    return {key: value for key, value in entry["state"].items() if entry["held"][key]}


# --- fast == reference -------------------------------------------------------------------------------------------

_TARGETS = {
    "sparse": (dt.TopK(keep=9), lambda x: reference.top_k(x, 9)),
    "grid": (
        dt.Uniform(bits=3, range="minmax"),
        lambda x: reference.grid(x, reference.minmax_delta(x, 3), 3),
    ),
}


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
@pytest.mark.parametrize("kind", _TARGETS)
def test_admm_is_the_reference(kind: str, optimizer: str) -> None:
    """Every step of W, Z, U and rho: growth with a ceiling, updates every 4 steps, mapping at 23, what follows."""
    target, project = _TARGETS[kind]
    w, gradients = _start()
    layer = _layer(w)
    fast: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9)
    slow: reference.SGD | reference.Adam = reference.SGD(0.02, 0.9)
    if optimizer == ADAM:
        fast, slow = torch.optim.Adam(layer.parameters(), lr=0.02), reference.Adam(0.02)
    finish: Any = "mask" if kind == "sparse" else None
    run = _run(layer, fast, dt.ADMM(rho=0.5, growth=1.3, rho_max=1.2, every=4, until=23, finish=finish), target)
    expected = reference.admm(
        w,
        gradients,
        project=project,
        rho=0.5,
        growth=1.3,
        rho_max=1.2,
        update_at=lambda t: t % 4 == 3,
        until=23,
        optimizer=slow,
        mask_after=kind == "sparse",
    )
    assert float(np.abs(expected[22]["W"] - expected[0]["W"]).max()) > 0.02, "nothing moved"
    for t, (gradient, want) in enumerate(zip(gradients, expected, strict=True)):
        layer.weight.grad = torch.from_numpy(gradient.copy())
        fast.step()
        assert np.allclose(layer.weight.detach().numpy(), want["W"], rtol=0, atol=1e-12), f"W after step {t}"
        state = _state(run)
        assert float(state["rho"]) == pytest.approx(want["rho"], rel=1e-12)
        if t < 22:
            assert np.allclose(state["z"].numpy(), want["Z"], rtol=0, atol=1e-12), f"Z after step {t}"
            assert np.allclose(state["dual"].numpy(), want["U"], rtol=0, atol=1e-12), f"U after step {t}"
        else:
            assert not {"z", "dual"} & set(state), "nothing reads z and u after the mapping"


def test_the_residuals_are_those_of_the_update() -> None:
    w, gradients = _start()
    layer = _layer(w)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    run = _run(layer, optimizer, dt.ADMM(rho=0.5, growth=1.5, every=2, until=None), dt.TopK(keep=9))
    assert math.isnan(dt.residuals(run)["weight"]["primal"])
    before = _state(run)["z"].numpy().copy()
    for gradient in gradients[:2]:
        layer.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    found, z = dt.residuals(run)["weight"], _state(run)["z"].numpy()
    assert found["primal"] == pytest.approx(np.linalg.norm(layer.weight.detach().numpy() - z), rel=1e-12)
    assert found["relative"] == pytest.approx(found["primal"] / float(layer.weight.detach().norm()), rel=1e-12)
    assert found["drift"] == pytest.approx(np.linalg.norm(z - before), rel=1e-12)
    assert found["drift"] > 0 and found["rho"] == pytest.approx(0.75)


@pytest.mark.parametrize("balance", [False, True])
def test_the_force_of_the_dual_survives_a_change_of_rho(balance: bool) -> None:
    """rho u is the multiplier: growing rho must not inflate it. Without growth the same update gives the same force."""
    forces = {}
    for growth in (1.0, 3.0):
        w, gradients = _start()
        layer = _layer(w)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        mechanism = dt.ADMM(rho=0.01, growth=growth, every=3, until=None, balance=balance and growth > 1)
        run = _run(layer, optimizer, mechanism, dt.TopK(keep=9))
        for gradient in gradients[:3]:
            layer.weight.grad = torch.from_numpy(gradient.copy())
            optimizer.step()
        state = _state(run)
        forces[growth] = (state["rho"] * state["dual"]).numpy()
        assert float(state["rho"]) == pytest.approx(0.01 * growth)
    assert np.abs(forces[1.0]).max() > 0
    assert np.allclose(forces[1.0], forces[3.0], rtol=1e-12, atol=0)


def test_balance_moves_rho_both_ways() -> None:
    number = torch.tensor(2.0, dtype=torch.float64)
    admm = dt.ADMM(rho=0.1, growth=1.5, balance=True, rho_max=2.5)
    far, near = torch.tensor(100.0, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    assert float(admm._next(number, near, far)) == pytest.approx(2.0 / 1.5)
    assert float(admm._next(number, far, near)) == 2.5, "the ceiling holds"
    assert float(admm._next(number, near, near)) == 2.0


@pytest.mark.parametrize(
    ("changes", "target", "reached"),
    [
        ({"growth": 2.0, "every": 1}, dt.TopK(keep=9), 1e9),
        ({"growth": 2.0, "every": 1, "rho_max": 64.0}, dt.TopK(keep=9), 64.0),
        ({"growth": 2.0, "every": 1, "balance": True}, dt.TopK(keep=1.0), 1e-9),
    ],
    ids=["up", "up to a ceiling", "down"],
)
def test_rho_stays_where_float32_can_follow(changes: Any, target: dt.Target, reached: float) -> None:
    """It grew until gradients squared overflowed, or fell to 0, and the dual times 0 / 0 made all weights NaN."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 6, bias=False)
    run = _run(layer, torch.optim.Adam(layer.parameters(), lr=1e-3), dt.ADMM(until=None, **changes), target)
    optimizer = run._drivers[0].optimizer
    for step in range(300):
        layer.weight.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        state = _state(run)
        assert all(bool(torch.isfinite(state[name]).all()) for name in ("rho", "dual", "z")), f"step {step}"
        assert bool(torch.isfinite(layer.weight).all()), f"step {step}"
    assert dt.residuals(run)["weight"]["rho"] == pytest.approx(reached)


def test_a_first_rho_outside_the_range_is_taken_as_it_is() -> None:
    none, some = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for rho, primal, drift, after in [
        (1e12, some, none, 1e12),
        (1e12, none, some, 1e12 / 1.5),
        (1e-12, none, some, 1e-12),
        (1e-12, some, none, 1.5e-12),
    ]:
        admm = dt.ADMM(rho=rho, growth=1.5, balance=True)
        assert float(admm._next(torch.tensor(rho, dtype=torch.float64), primal, drift)) == pytest.approx(after)


def test_a_pull_under_a_gradient_scaler_is_scaled_too() -> None:
    """Fused steps under GradScaler divide the gradient inside: what was not multiplied would all but vanish."""
    ends = []
    for scale in (None, 1024.0):
        w, gradients = _start()
        layer = _layer(w)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        run = _run(layer, optimizer, dt.ADMM(rho=0.5, every=2, until=None), dt.TopK(keep=9))
        run.detach()
        run = dt.attach(layer, optimizer, run.plan.recipe, total_steps=STEPS, hooks=False)
        for gradient in gradients[:6]:
            layer.weight.grad = torch.from_numpy(gradient * (scale or 1.0))
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale, dtype=torch.float64)  # type: ignore[attr-defined]
            run.before_step()
            optimizer.__dict__.pop("grad_scale", None)  # SGD unscales inside its fused step only: done here by hand
            layer.weight.grad.div_(scale or 1.0)
            optimizer.step()
            run.after_step()
        ends.append(layer.weight.detach().numpy().copy())
    assert np.allclose(*ends, rtol=0, atol=1e-12)


# --- when --------------------------------------------------------------------------------------------------------


def _updates(admm: dt.ADMM, clock: Clock) -> bool:
    return admm.cadence(dt.TopK(keep=9)).at(clock)


def test_updates_fall_where_every_says() -> None:
    """Steps and fractions count from the start; z begins there, and the mapping has an update."""
    steps = dt.ADMM(every=0.1, start=10, until=0.6)
    wanted = [t for t in range(100) if _updates(steps, Clock(step=t, total_steps=100))]
    assert wanted == [9, 19, 29, 39, 49, 59]
    sevens = [t for t in range(100) if _updates(dt.ADMM(every=7, until=0.5), Clock(step=t, total_steps=100))]
    assert sevens == [6, 13, 20, 27, 34, 41, 48, 49]
    late = dt.ADMM(every=10, start=5, until=35)
    assert [t + 1 for t in range(40) if _updates(late, Clock(step=t, total_steps=40))] == [5, 15, 25, 35]


@pytest.mark.parametrize("every", [4, 0.1])
@pytest.mark.parametrize("target", [dt.TopK(keep=9), dt.Binary()], ids=["mask", "freeze"])
def test_after_the_mapping_nothing_pulls(every: Any, target: dt.Target) -> None:
    """With a fraction for `every` z began anew after the mapping, and pulled with a rho that grew on to the end."""
    w, gradients = _start()
    layer = _layer(w)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    run = _run(layer, optimizer, dt.ADMM(every=every, until=0.5), target)
    for t, gradient in enumerate(gradients):
        before = layer.weight.detach().numpy().copy()
        layer.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        state = _state(run)
        assert ("z" in state) == (t + 1 < 20)
        if t >= 20:
            held = ~state["mask"].numpy() if "mask" in state else state["frozen"].numpy()
            free = ~held
            moved = layer.weight.detach().numpy() - before
            assert np.allclose(moved[free], -0.02 * gradient[free], rtol=0, atol=1e-15)


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_masked_maps_at_its_start_and_not_at_a_fit(metric: Any) -> None:
    """With fit_every=5 and the Fisher metric the first fit mapped, at step 5, by five gradients."""
    w, gradients = _start()
    layer = _layer(w)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    masked = dt.Masked(start=20, metric=metric)
    rule = dt.Rule(match="weight", target=dt.TopK(keep=9), mechanism=masked, fit_every=5)
    dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=STEPS)
    for t, gradient in enumerate(gradients):
        layer.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        assert int((layer.weight != 0).sum()) == (30 if t + 1 < 20 else 9), f"step {t}"


@pytest.mark.parametrize("total", [22464, 1004, 1044, 40, 7])
def test_fractions_share_the_way_to_the_mapping_evenly(total: int) -> None:
    """`every` and `until`, rounded apart, had an update a step or two before the mapping, and rho grew once more."""
    admm = dt.ADMM(every=0.1, until=0.5)
    until = round(0.5 * total)
    found = [t + 1 for t in range(until) if _updates(admm, Clock(step=t, total_steps=total))]
    count = 5 if until >= 5 else until
    assert found == [round(i * until / count) for i in range(1, count + 1)]
    assert max(np.diff([0, *found])) - min(np.diff([0, *found])) <= 1


@pytest.mark.parametrize(("every", "start", "until"), [(0.1, 0, 0.5), (10, 5, 35), (0.13, 0.1, 0.9), (7, 0, 33)])
@pytest.mark.parametrize("total", [40, 1004])
def test_the_rate_is_small_before_every_update_and_full_after(every: Any, start: Any, until: Any, total: int) -> None:
    """Periods of the rate began at steps, or counted from a start, that updates of z knew nothing of."""
    admm = dt.ADMM(every=every, start=start, until=until)
    rate = dt.periodic_rate(_sgd(), dt.Recipe([_rule(dt.TopK(keep=5), admm)]), total=total).lr_lambdas[0]
    updates = [t + 1 for t in range(total) if _updates(admm, Clock(step=t, total_steps=total))]
    mapping = until if isinstance(until, int) else round(until * total)
    for here, following in itertools.pairwise(updates):
        if following > mapping:
            break
        if following - here >= 4:
            full = [t for t in range(here, following) if rate(t) == 1.0]
            assert full == [*range(here, full[-1] + 1)] and full[-1] < following - 1, "once, right after the update"


def test_one_rate_cannot_follow_two_periods() -> None:
    def recipe(*changes: dict[str, Any], **fits: Any) -> dt.Recipe:
        usual: dict[str, Any] = {"every": 10, "until": 50}
        made = [dt.ADMM(**usual | each) for each in changes]
        return dt.Recipe(
            [dt.Rule(match=f"^{i}", target=dt.TopK(keep=5), mechanism=m, **fits) for i, m in enumerate(made)]
        )

    dt.periodic_rate(_sgd(), recipe({}, {"rho": 1.0}, {"every": 0.1, "until": 0.5}), total=100)
    for other in ({"every": 25}, {"until": 60}, {"start": 10}):
        with pytest.raises(ValueError, match=r"two ADMM rules of one stage.*at 10, 20, .* mapping at 50"):
            dt.periodic_rate(_sgd(), recipe({}, other), total=100)
    with pytest.raises(ValueError, match=r"rule 0 .*fit_until=10.*leave fit_until out"):
        dt.periodic_rate(_sgd(), recipe({"until": None}, fit_until=10), total=100)


def test_a_rule_cannot_give_admm_another_period() -> None:
    """It replaced an int `every` in silence, and the learning rate went on in periods of `every`."""
    with pytest.raises(ValueError, match=r"fit_every=7\): ADMM says itself when .* leave it out"):
        dt.Rule(match="weight", target=dt.TopK(keep=5), mechanism=dt.ADMM(every=10), fit_every=7)


def test_a_late_start_takes_z_from_the_weights_of_that_moment() -> None:
    w, gradients = _start()
    layer = _layer(w)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    run = _run(layer, optimizer, dt.ADMM(start=5, every=50, until=None), dt.TopK(keep=9))
    for t, gradient in enumerate(gradients[:5]):
        assert ("z" in _state(run)) == (t == 5)
        layer.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    state, now = _state(run), layer.weight.detach().numpy()
    assert np.array_equal(state["z"].numpy(), reference.top_k(now, 9)) and not bool(state["dual"].any())
    assert not np.array_equal(reference.top_k(now, 9) != 0, reference.top_k(w, 9) != 0), "the case shows nothing"


def test_periodic_rate() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    rate, seen = dt.periodic_rate(optimizer, 6, until=12, total=16), []
    for _ in range(16):
        seen.append(rate.get_last_lr()[0])
        optimizer.step()
        rate.step()
    period = [2.0, 2.0, 0.2, 0.2, 0.02, 0.02]
    tail = [2.0 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert seen == pytest.approx([*period, *period, *tail])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dt.ADMM(rho=0.0), "ADMM(rho=0.0): must be a finite number > 0"),
        (lambda: dt.ADMM(growth=0.5), "ADMM(growth=0.5): must be a finite number >= 1"),
        (lambda: dt.ADMM(every=0), "ADMM(every=0): must be >= 1 step"),
        (lambda: dt.ADMM(until=0), "ADMM(until=0): must be a number > 0, or None"),
        (lambda: dt.ADMM(rho=1.0, rho_max=0.5), "must be >= rho=1.0"),
        (lambda: dt.ADMM(form="dual"), '"gradient" or "decoupled"'),  # type: ignore[arg-type]
        (lambda: dt.ADMM(finish="stop"), '"auto", "mask", "freeze" or None'),  # type: ignore[arg-type]
        (lambda: dt.ADMM(rounds=(0.5, 0.4, 1.0)), "must rise within (0, 1] and end at 1.0"),
        (lambda: dt.ADMM(freeze_every=0), "ADMM(freeze_every=0)"),
        (lambda: dt.ADMM(metric="taylor"), 'must be "euclidean" or "fisher"'),  # type: ignore[arg-type]
        (lambda: dt.ADMM(metric="fisher", until=None), "needs a moment at which survivors are chosen"),
        (lambda: dt.Masked(metric="fisher"), "give start > 0"),
        (lambda: _rule(dt.Uniform(bits=4), dt.ADMM(metric="fisher")), "Uniform is not a set of few free weights"),
        (lambda: dt.PartialFreeze(rounds=(0.5,)), "PartialFreeze(rounds=(0.5,)): shares of frozen weights must rise"),
        (lambda: dt.PartialFreeze(every=0), "PartialFreeze(every=0): must be a number > 0, or None"),
        (lambda: dt.Penalty(strength=-1.0), "Penalty(strength=-1.0): must be a finite number >= 0"),
        (lambda: dt.Penalty(strength=1.0, norm="l3"), 'must be "l2" or "l1"'),  # type: ignore[arg-type]
        (lambda: dt.Proximal(strength=math.inf), "Proximal(strength=inf)"),
        (lambda: dt.Proximal(strength=1.0, every=0), "Proximal(every=0): must be >= 1 step"),
        (lambda: dt.Proximal(strength=1.0, norm="l0"), 'must be "l2" or "l1"'),  # type: ignore[arg-type]
        (lambda: dt.ADMM(start=0.8, until=0.5), "ADMM(until=0.5): must come after start=0.8"),
        (lambda: _attach(dt.ADMM(start=8, until=0.5), 10), "until=0.5 (step 5) must come after start=8 (step 8)"),
        (lambda: _attach(dt.ADMM(), 1), "(step 0); training, or its stage, has too few steps (1)"),
        (lambda: _attach(dt.ADMM(every=2, until=4), None), "to attach: ADMM.freeze_every shares it among its rounds"),
        (lambda: _attach(dt.PartialFreeze(), None), "to attach: PartialFreeze shares it among its rounds"),
        (lambda: _rule(dt.TopK(keep=5), dt.ADMM(finish="freeze")), "the survivors of TopK have none to go to"),
        (lambda: _rule(dt.Uniform(bits=4), dt.ADMM(finish="mask")), "Uniform leaves no weight free"),
        (lambda: dt.periodic_rate(_sgd(), 0), "periodic_rate(every=0)"),
        (lambda: dt.periodic_rate(_sgd(), 0.05, total=9), "every=0.05): must be a whole number >= 1"),  # type: ignore[arg-type]
        (lambda: dt.periodic_rate(_sgd(), "kq", total=9), "every='kq'): must be a whole"),  # type: ignore[arg-type]
        (
            lambda: dt.periodic_rate(_sgd(), _attach(dt.STE(), 9), total=9),  # type: ignore[arg-type]
            "every='Run'): must be a whole number >= 1 of steps, or the recipe; the recipe of a run is run.plan.recipe",
        ),
        (lambda: dt.periodic_rate(dt.Recipe.preset("kq"), _sgd(), total=9), "must be a torch.optim.Optimizer, not Rec"),  # type: ignore[arg-type]
        (lambda: dt.residuals(nn.Linear(2, 2)), "residuals(run=...): must be the run that attach gave, not Linear"),
        (lambda: _attach(dt.ADMM(until=0.5, every=3), None), "to attach: ADMM.until=0.5 is a fraction of it"),
        (lambda: dt.periodic_rate(_sgd(), 5, until=0.5, total=9), "until=0.5): must be a whole"),  # type: ignore[arg-type]
        (lambda: dt.periodic_rate(_sgd(), 5, until=-1, total=9), "until=-1): must be a whole number >= 0"),
        (lambda: dt.periodic_rate(_sgd(), 5, total=0), "total=0): must be a whole number >= 1"),
        (lambda: dt.periodic_rate(_sgd(), dt.Recipe.preset("admm-prune-10x")), "needs total="),
        (lambda: dt.periodic_rate(_sgd(), _masks(None, 2, 8), total=10), "map at different steps ([2, 8])"),
        (lambda: dt.periodic_rate(_sgd(), _masks(dt.ADMM(), 2, 8), total=10), "map at different steps ([2, 8])"),
        (lambda: dt.periodic_rate(_sgd(), _masks(dt.ADMM(every=1, until=5), 0, 8), total=10), "maps at step 8 of its"),
        (lambda: dt.periodic_rate(_sgd(), _masks(dt.ADMM(every=1, until=None), 8), total=10), "maps at step 8 of its"),
        (lambda: dt.periodic_rate(_sgd(), 5, retrain=0.0), "periodic_rate(retrain=0.0)"),
        (lambda: dt.periodic_rate(_sgd(), 5, floor=2.0), "periodic_rate(floor=2.0)"),
        (lambda: dt.ADMM(balance=True, growth=1.0), "balancing moves rho by growth"),
        (lambda: dt.periodic_rate(_sgd(), 5, gamma=0.0), "gamma=0.0"),
        (lambda: dt.periodic_rate(_sgd(), 5, milestones=(1.0,)), "must lie in (0, 1)"),
        (lambda: dt.periodic_rate(_sgd(), 5, until=9, total=9), "the mapping must come before the end"),
    ],
)
def test_what_cannot_be_is_said_in_words(make: Any, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert says in str(caught.value)


def _sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def _masks(admm: dt.ADMM | None, *starts: int) -> dt.Recipe:
    pulls: list[dt.Mechanism] = [*(dt.Masked(start=start) for start in starts), *([admm] if admm else [])]
    return dt.Recipe([dt.Rule(match=f"m{i}", target=dt.TopK(keep=5), mechanism=pull) for i, pull in enumerate(pulls)])


def test_masks_that_map_with_admm_or_were_there_before_change_no_rate() -> None:
    admm = dt.ADMM(every=2, until=6)
    seen = [
        dt.periodic_rate(_sgd(), _masks(admm, *starts), total=10).lr_lambdas[0] for starts in ((), (0,), (0, 6), (6, 6))
    ]
    assert all([rate(at) for at in range(11)] == [seen[0](at) for at in range(11)] for rate in seen)


def _rule(target: dt.Target, mechanism: dt.Mechanism) -> dt.Rule:
    return dt.Rule(match="weight", target=target, mechanism=mechanism)


def _attach(mechanism: dt.Mechanism, total: int | None) -> dt.Run:
    layer = _layer(_start()[0])
    recipe = dt.Recipe([_rule(dt.Uniform(bits=3), mechanism)])
    return dt.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), recipe, total_steps=total)


def test_rounds_survive_a_spec() -> None:
    admm = dt.ADMM(rounds=(0.3, 1.0), freeze_every=0.1, finish=None)
    assert from_spec(to_spec(admm)) == admm
    recipe = dt.Recipe([_rule(dt.Uniform(bits=2), admm)])
    assert dt.Recipe.from_yaml(recipe.to_yaml()) == recipe


# --- staying feasible --------------------------------------------------------------------------------------------


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 4))


def _optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    params = list(model.parameters())
    if name == "SGD momentum":
        return [torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)]
    if name == "AdamW":
        return [torch.optim.AdamW(params, lr=0.02, weight_decay=0.1)]
    if name == "Adam fused":
        return [torch.optim.Adam(params, lr=0.02, weight_decay=0.1, fused=True)]
    if name == "RMSprop":
        return [torch.optim.RMSprop(params, lr=0.01, momentum=0.9)]
    if name == "Adadelta":
        return [torch.optim.Adadelta(params, lr=1.0)]
    matrices = [p for p in params if p.dim() == 2]
    return [
        torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1),
        torch.optim.AdamW([p for p in params if p.dim() != 2], lr=0.02),
    ]


ALL = ["SGD momentum", "AdamW", "Adam fused", "RMSprop", "Adadelta", "Muon"]


def _train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        data = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 10, generator=data), torch.randn(32, 4, generator=data)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("optimizer", ALL)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_masks_survive_every_optimizer(optimizer: str, scope: Any) -> None:
    """From the mapping on: the zeros of that moment, bitwise +0.0, the exact count, and survivors that move."""
    if optimizer == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = _network()
    optimizers = _optimizers(optimizer, model)
    target = dt.TopK(keep=0.1, scope=scope)
    rule = dt.Rule(match="weight$", target=target, mechanism=dt.ADMM(rho=0.1, every=3, until=12))
    run = dt.attach(model, optimizers, dt.Recipe([rule]), total_steps=STEPS)
    _train(model, optimizers, range(12))
    mapped = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}
    assert sum(int((w != 0).sum()) for w in mapped.values()) == round(0.1 * 168)
    for step in range(12, STEPS):
        _train(model, optimizers, range(step, step + 1))
        for name, w in mapped.items():
            now = dict(model.named_parameters())[name].detach()
            assert torch.equal(now != 0, w != 0) and not bool((torch.signbit(now) & (now == 0)).any())
    assert all(not torch.equal(dict(model.named_parameters())[name], w) for name, w in mapped.items())
    last = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.finalize()
    assert all(torch.equal(p, last[name]) for name, p in model.named_parameters()), "finalize had something to do"


@pytest.mark.parametrize("optimizer", ALL)
@pytest.mark.parametrize("mechanism", [dt.ADMM(rho=0.1, every=3, until=10), dt.PartialFreeze(start=10)])
def test_freezes_survive_every_optimizer(optimizer: str, mechanism: dt.Mechanism) -> None:
    """Half, three quarters, all: on their level, bitwise held, and finalize has nothing left to do."""
    if optimizer == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = _network()
    optimizers = _optimizers(optimizer, model)
    recipe = dt.Recipe(
        [dt.Rule(match="weight$", target=dt.Uniform(bits=3, granularity="channel"), mechanism=mechanism)]
    )
    run = dt.attach(model, optimizers, recipe, total_steps=STEPS)
    _train(model, optimizers, range(9))
    assert "frozen" not in _state(run, "0.weight")
    _train(model, optimizers, range(9, 10))
    held: dict[str, torch.Tensor] = {}
    for step in range(10, STEPS):
        for name, p in model.named_parameters():
            if p.dim() == 2:
                state = _state(run, name)
                share = 0.5 if step < 20 else 0.75 if step < 30 else 1.0
                assert int(state["frozen"].sum()) == round(share * p.numel()), f"{name} before step {step}"
                levels = run.encoded()[name].decode()
                assert torch.equal(p[state["frozen"]], levels[state["frozen"]])
                if name in held:
                    before = held[name]
                    assert torch.equal(p[~before.isnan()], before[~before.isnan()]), "a frozen weight moved"
                held[name] = torch.where(state["frozen"], p.detach(), torch.nan)
        _train(model, optimizers, range(step, step + 1))
    last = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(row["error"] == 0 for row in run.measure())
    run.finalize()
    assert all(torch.equal(p, last[name]) for name, p in model.named_parameters())


def test_freeze_rounds_are_the_reference() -> None:
    w, gradients = _start()
    layer = _layer(w)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    target = dt.Uniform(bits=3, range="minmax")
    run = _run(layer, optimizer, dt.PartialFreeze(rounds=(0.3, 0.7, 1.0), every=8, start=4), target)
    slow = reference.SGD(0.01, 0.9)
    x = w
    for gradient in gradients[:4]:
        x = slow.step(x, gradient)
    delta = reference.minmax_delta(x, 3)
    first: dict[int, float] = {3: 0.3, 11: 0.7, 19: 1.0}
    expected = reference.freeze_rounds(
        w,
        gradients,
        project=lambda a: reference.grid(a, delta, 3),
        rounds=first,
        optimizer=reference.SGD(0.01, 0.9),
    )
    for t, (gradient, (want, frozen)) in enumerate(zip(gradients, expected, strict=True)):
        layer.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        assert np.allclose(layer.weight.detach().numpy(), want, rtol=0, atol=1e-12), f"step {t}"
        if t >= 3:
            assert np.array_equal(_state(run)["frozen"].numpy(), frozen), f"frozen after step {t}"
    assert 0 < int(expected[12][1].sum()) < 30


def test_per_level_freezes_a_share_of_every_level() -> None:
    layer = _layer(_start()[0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    mechanism = dt.PartialFreeze(rounds=(0.5, 1.0), per_level=True)
    before = layer.weight.detach().clone()
    target = dt.Uniform(bits=2, range="minmax")
    run = _run(layer, optimizer, mechanism, target)
    q = target.project(before, target.fit(before))
    frozen = _state(run)["frozen"]
    for level in q.unique():
        mine = q == level
        assert int((frozen & mine).sum()) == round(0.5 * int(mine.sum()))
        inside, outside = (before - q).abs()[frozen & mine], (before - q).abs()[~frozen & mine]
        assert not len(outside) or float(inside.max()) <= float(outside.min())


def test_a_sparse_set_on_levels_is_met_after_the_last_round() -> None:
    """The pattern of a joint set may still move between rounds: only a projection of the whole lies in it for sure."""
    model = _network()
    optimizers = _optimizers("AdamW", model)
    target = dt.SparseLevels(sparse=dt.TopK(keep=0.3), survivors=dt.Uniform(bits=3))
    rule = dt.Rule(match="weight$", target=target, mechanism=dt.ADMM(rho=0.1, every=3, until=10))
    run = dt.attach(model, optimizers, dt.Recipe([rule]), total_steps=STEPS)
    _train(model, optimizers, range(STEPS))
    assert all(row["error"] == 0 for row in run.measure())
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert int((p != 0).sum()) <= round(0.3 * p.numel()), name
            assert torch.equal(p, run.encoded()[name].decode())


def test_masked_projects_once_at_the_start() -> None:
    model = _network()
    optimizers = _optimizers("AdamW", model)
    expected = {n: reference.top_k(p.detach().double().numpy(), 7) for n, p in model.named_parameters() if p.dim() == 2}
    rule = dt.Rule(match="weight$", target=dt.TopK(keep=7), mechanism=dt.Masked())
    run = dt.attach(model, optimizers, dt.Recipe([rule]))
    for name, want in expected.items():
        assert np.array_equal(dict(model.named_parameters())[name].detach().double().numpy(), want)
    _train(model, optimizers, range(10))
    for name, want in expected.items():
        now = dict(model.named_parameters())[name].detach().numpy()
        assert np.array_equal(now != 0, want != 0) and not np.allclose(now, want)
        assert int(_state(run, name)["mask"].sum()) == 7


def _fed(weight: torch.Tensor, seed: int) -> list[np.ndarray]:
    """Gradients whose size differs from weight to weight."""
    generator = np.random.default_rng(seed)
    size = generator.lognormal(sigma=2.0, size=weight.shape)
    return [size * generator.normal(size=weight.shape) for _ in range(STEPS)]


@pytest.mark.parametrize("mechanism", [dt.Masked(start=6, metric="fisher"), dt.ADMM(every=3, until=6, metric="fisher")])
def test_the_fisher_metric_keeps_what_the_loss_would_miss(mechanism: dt.Mechanism) -> None:
    layers = nn.ModuleList([_layer(_start(seed)[0]) for seed in (3, 4)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-9)  # weights stand still, so that h alone decides
    target = dt.TopK(keep=9, scope="model")
    dt.attach(layers, optimizer, dt.Recipe([dt.Rule(match="weight$", target=target, mechanism=mechanism)]))
    before = np.stack([layer.weight.detach().numpy().copy() for layer in layers])  # type: ignore[union-attr,operator]
    fed = [_fed(layer.weight, seed) for seed, layer in enumerate(layers)]  # type: ignore[arg-type]
    for step in range(6):
        for layer, gradients in zip(layers, fed, strict=True):
            layer.weight.grad = torch.from_numpy(gradients[step].copy())
        optimizer.step()
    # ADMM begins with its first step and its pull is 1e-3 of a weight; both see six gradients.
    h = np.stack([np.sqrt(sum(0.01 * 0.99 ** (5 - i) * g[i] ** 2 for i in range(6))) for g in fed])
    score = (h * np.abs(before)).reshape(-1)
    kept = np.zeros(score.size, dtype=bool)
    kept[np.argsort(-score)[:9]] = True
    now = np.stack([layer.weight.detach().numpy() for layer in layers])  # type: ignore[union-attr,operator]
    assert np.array_equal(now.reshape(-1) != 0, kept)
    largest = np.zeros(score.size, dtype=bool)
    largest[np.argsort(-np.abs(before).reshape(-1))[:9]] = True
    assert not np.array_equal(kept, largest), "the sample does not tell the metrics apart"
    np.testing.assert_allclose(now.reshape(-1)[kept], before.reshape(-1)[kept], atol=1e-6)


@pytest.mark.parametrize(
    "mechanism",
    [
        dt.Masked(start=6, metric="fisher"),
        dt.ADMM(every=3, until=6, metric="fisher"),
        dt.ADMM(every=3, until=6, metric="fisher", finish=None),
    ],
)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_fisher_metric_keeps_the_count_where_units_are_dead(mechanism: dt.Mechanism, scope: Any) -> None:
    """Two of six rows never get a gradient: among them the largest survive, after every weight that gets one."""
    starts = [_start(seed)[0] for seed in (3, 4)]
    layers = nn.ModuleList([_layer(start) for start in starts])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-9)
    target = dt.TopK(keep=50 if scope == "model" else 25, scope=scope)
    dt.attach(layers, optimizer, dt.Recipe([dt.Rule(match="weight$", target=target, mechanism=mechanism)]))
    for step in range(6):
        for seed, layer in enumerate(layers):
            gradient = _fed(layer.weight, seed)[step]  # type: ignore[arg-type]
            gradient[[1, 4]] = 0.0
            layer.weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    kept = np.stack([layer.weight.detach().numpy() != 0 for layer in layers])  # type: ignore[union-attr,operator]
    assert int(kept.sum()) == 50
    assert kept[:, [0, 2, 3, 5]].all(), "what the loss would miss goes first"
    left = np.abs(np.stack(starts))[:, [1, 4]]
    for size, mine in zip(left, kept[:, [1, 4]], strict=True):
        count = int(mine.sum())
        assert scope == "model" or count == 5
        assert np.array_equal(mine.reshape(-1), size.reshape(-1) >= np.sort(size.reshape(-1))[size.size - count])


def test_a_weighing_without_zeros_is_left_as_it_is() -> None:
    h = torch.from_numpy(np.random.default_rng(0).lognormal(sigma=3.0, size=1000))
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(never_zero(h.to(dtype)), h.to(dtype))
        nothing = never_zero(torch.zeros(3, dtype=dtype))
        assert bool((nothing > 0).all()) and bool((nothing.square() > 0).all())


@pytest.mark.parametrize("step", [4, 14, 26, 33])
@pytest.mark.parametrize("target", [dt.TopK(keep=0.2, scope="model"), dt.Uniform(bits=2)])
def test_resuming_in_every_phase_is_bitwise(step: int, target: dt.Target) -> None:
    """In ADMM, after the mapping, between freeze rounds and after the last one; and u is not near zero in the first."""

    def make() -> tuple[nn.Module, list[torch.optim.Optimizer], dt.Run]:
        model = _network()
        optimizers = _optimizers("AdamW", model)
        admm = dt.ADMM(rho=0.1, every=3, until=12, balance=True)
        rule = dt.Rule(match="weight$", target=target, mechanism=admm)
        return model, optimizers, dt.attach(model, optimizers, dt.Recipe([rule]), total_steps=STEPS)

    model, optimizers, run = make()
    _train(model, optimizers, range(step))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizers[0].state_dict()}, buffer)
    if step == 4:
        assert float(_state(run, "0.weight")["dual"].abs().max()) > 1e-3
    _train(model, optimizers, range(step, STEPS))
    other, fresh, _ = make()
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other.load_state_dict(saved["model"])
    fresh[0].load_state_dict(saved["optimizer"])
    _train(other, fresh, range(step, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# --- penalty and proximal steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_penalty_is_its_formula(norm: Any) -> None:
    w, gradients = _start()
    layer = _layer(w)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    ramp = dt.Linear(first=0.2, last=2.0)
    rule = dt.Rule(match="weight", target=dt.TopK(keep=9), mechanism=dt.Penalty(strength=ramp, norm=norm), fit_every=1)
    dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=STEPS)
    for t, gradient in enumerate(gradients):
        gap = w - reference.top_k(w, 9)
        w = w - 0.05 * (gradient + (0.2 + 1.8 * t / STEPS) * (gap if norm == "l2" else np.sign(gap)))
        layer.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        assert np.allclose(layer.weight.detach().numpy(), w, rtol=0, atol=1e-12), f"step {t}"


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("by_rate", [True, False])
def test_proximal_minimises_what_it_says(norm: Any, by_rate: bool) -> None:
    """The step against a search over a fine line of 1/2 (x - w)^2 + t d(x), d the (half squared) distance to q."""
    w, _ = _start()
    layer = _layer(w)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    mechanism = dt.Proximal(strength=0.1, norm=norm, by_rate=by_rate)
    run = _run(layer, optimizer, mechanism, dt.Uniform(bits=3, range="minmax"))
    q = reference.grid(w, reference.minmax_delta(w, 3), 3)
    layer.weight.grad = torch.full((6, 5), 1e-300, dtype=torch.float64)  # moves nothing, and yet is a step
    optimizer.step()
    assert run.clock == 1
    t = 0.1 * (0.5 if by_rate else 1.0)
    for got, a, b in zip(layer.weight.detach().numpy().flat, w.flat, q.flat, strict=True):
        line = b + (a - b) * np.linspace(0, 1, 20001)
        cost = 0.5 * (line - a) ** 2 + t * (0.5 * (line - b) ** 2 if norm == "l2" else np.abs(line - b))
        assert got == pytest.approx(line[cost.argmin()], abs=abs(a - b) / 10000)


@pytest.mark.parametrize("form", ["gradient", "decoupled"])
def test_the_two_forms_agree_only_without_an_optimizer_between(form: Any) -> None:
    """Under plain SGD the decoupled pull is the gradient's, one step later; under Adam it is another objective."""
    w, _ = _start()
    ends = {}
    for name in (SGD, ADAM):
        layer = _layer(w)
        made = torch.optim.SGD if name == SGD else torch.optim.Adam
        optimizer = made(layer.parameters(), lr=0.01)
        mechanism = dt.ADMM(rho=2.0, growth=1.0, every=1000, until=None, form=form)
        _run(layer, optimizer, mechanism, dt.TopK(keep=9))
        for _ in range(STEPS * 12):
            layer.weight.grad = layer.weight.detach() - 1.0  # of |w - 1|^2 / 2
            optimizer.step()
        ends[name] = layer.weight.detach().numpy()
    z = reference.top_k(w, 9)
    optimum = (1.0 + 2.0 * z) / 3.0  # of |w - 1|^2 / 2 + rho / 2 |w - z|^2
    assert np.allclose(ends[SGD], optimum, atol=0.03)
    assert np.allclose(ends[ADAM], optimum, atol=0.03) == (form == "gradient")


def test_the_files_beside_the_script_are_recipes() -> None:
    from papers.admm.lenet import FOLDER, JOBS, RETRAIN, job_of, rate_factor
    from papers.models import LeNet5

    files = sorted(FOLDER.glob("*.yaml"))
    assert files
    for file in files:
        recipe = dt.Recipe.from_yaml(file)
        assert dt.Recipe.from_yaml(recipe.to_yaml()) == recipe
        recipe.resolve(LeNet5())
    for name in [*JOBS, "prune350", "ratio246", "imp246", "oneshot100", "fixed246", "balanced71"]:
        made = job_of(name).recipe
        if made is not None:
            made().resolve(LeNet5())
    recipe = job_of("prune246").recipe
    assert recipe is not None
    factors = [*map(rate_factor(recipe(), 400), range(400))]
    assert recipe().bounds(400) == [(0, 60), (60, 160), (160, 400)]
    assert factors[0] == factors[6] == factors[60] == factors[160] == 1.0  # a period of the first stage has 6 steps
    assert factors[30] == factors[110] == factors[280] == max(factors) == RETRAIN  # after the mapping
    assert factors[5] == pytest.approx(0.01) and min(factors) >= 0.01 - 1e-12


@pytest.mark.parametrize("staged", [True, False])
def test_rounds_after_a_pruning_count_survivors(staged: bool) -> None:
    """Zeros lie nearest of all: a share of all weights leaves every survivor to the last round."""
    layer = nn.Linear(50, 40, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    levels = dt.Uniform(bits=3, range="minmax", zero=False)
    sparse = dt.TopK(keep="nonzero" if staged else 100)
    joint = dt.SparseLevels(sparse=sparse, survivors=levels)
    snap = dt.ADMM(rho=0.01, every=5, until=10, rounds=(0.5, 0.75, 0.9, 1.0), freeze_every=5)
    rule = dt.Rule(match="weight", target=joint, mechanism=snap)
    if staged:
        first = dt.Rule(match="weight", target=dt.TopK(keep=100), mechanism=dt.Masked())
        recipe = dt.Recipe(stages=[dt.Stage(rules=[first], share=0.25), dt.Stage(rules=[rule], share=0.75)])
    else:
        recipe = dt.Recipe([rule])
    begin = 10 if staged else 0
    run = dt.attach(layer, optimizer, recipe, total_steps=40 if staged else 30)
    seen = []
    for step in range(begin + 26):
        layer.weight.grad = torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        if step >= begin + 9 and (step - begin) % 5 == 4:
            state = _state(run)
            seen.append(int((state["frozen"] & (state["held"] != 0)).sum()))
    assert seen == [50, 75, 90, 100]


@pytest.mark.parametrize("per_level", [True, False])
def test_a_round_freezes_whole_kernels(per_level: bool) -> None:
    """Levels of a codebook are its codewords: by single weights, rounds cut kernels apart."""
    torch.manual_seed(0)
    layer = nn.Conv2d(7, 9, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    freeze = dt.PartialFreeze(rounds=(0.3, 0.6, 1.0), every=3, per_level=per_level)
    run = _run(layer, optimizer, freeze, dt.KernelCodebook(size=8))
    for step in range(5):
        frozen = _state(run)["frozen"].reshape(-1, 9)
        kernels = frozen.all(1)
        assert torch.equal(kernels, frozen.any(1)), step
        assert abs(int(kernels.sum()) - (0.3 if step < 3 else 0.6) * 63) <= (4 if per_level else 1)
        if per_level and step == 0:
            held = layer.weight.detach().reshape(-1, 9)[kernels]
            assert len(held.unique(dim=0)) > 4, "some of every codeword, not all of a few"
        layer.weight.grad = torch.randn(9, 7, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.parametrize("per_level", [True, False])
def test_what_a_round_has_frozen_stays_frozen(per_level: bool) -> None:
    """Free weights leave their level between rounds: a share of what is left of it may be less than is held there."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 20, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    freeze = dt.PartialFreeze(rounds=(0.5, 0.6, 0.7, 0.8, 1.0), every=3, per_level=per_level)
    run = _run(layer, optimizer, freeze, dt.Binary())
    before = _state(run)["frozen"].clone()
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        layer.weight.grad = torch.rand(20, 20, generator=generator)  # all of them drift to one side
        optimizer.step()
        frozen = _state(run)["frozen"]
        assert not bool((before & ~frozen).any()), f"step {step} released weights"
        before = frozen.clone()


def test_the_periodic_rate_reads_every_stage_of_a_recipe() -> None:
    def stage(share: float, mechanism: dt.Mechanism) -> dt.Stage:
        return dt.Stage(rules=[dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=mechanism)], share=share)

    recipe = dt.Recipe(
        stages=[
            stage(0.5, dt.ADMM(every=0.25, until=0.5)),
            stage(0.25, dt.Masked(start=2)),
            stage(0.25, dt.HardProjection()),
        ]
    )
    rate, seen = dt.periodic_rate(_sgd(), recipe, total=32, milestones=(0.5,), retrain=2.0, floor=0.1), []
    for _ in range(32):
        seen.append(rate.get_last_lr()[0] / _sgd().param_groups[0]["lr"])
        rate.optimizer.step()
        rate.step()
    down = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8))) for i in range(8)]
    short = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 6))) for i in range(6)]
    plain = [factor / 2 for factor in down]
    assert np.allclose(seen, [1, 1, 0.1, 0.1] * 2 + down + [1, 1] + short + plain)


@pytest.mark.parametrize(
    ("preset", "least"), [("admm-prune-10x", 96.0), ("admm-prune-70x", 93.0), ("admm-binary", 93.0)]
)
def test_the_presets_train_a_small_network(preset: str, least: float) -> None:
    """With a rho that is too small for a short training the last mapping breaks the network (70x ended at 41 %)."""
    from detent.data import digits
    from papers.models import SmallConvNet

    torch.manual_seed(0)
    train, test = digits("train"), digits("test")
    seen, unseen = ((s.images.float().reshape(-1, 1, 8, 8) / 255 - 0.305) / 0.376 for s in (train, test))
    model = SmallConvNet(width=32, classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def run_for(steps: int) -> None:
        for _ in range(steps):
            batch = torch.randint(len(train.labels), (64,))
            loss = nn.functional.cross_entropy(model(seen[batch]), train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    run_for(200)
    run = dt.attach(model, optimizer, dt.Recipe.preset(preset), total_steps=440)
    run_for(440)
    run.finalize()
    model.eval()
    with torch.no_grad():
        right = (model(unseen).argmax(1) == test.labels).double().mean()
    assert 100 * float(right) >= least


@pytest.mark.parametrize("finish", ["auto", None])
@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
@pytest.mark.parametrize("cut", [3, 8, 10])
def test_a_model_wide_target_takes_weights_as_they_are_at_any_time(finish: Any, metric: Any, cut: int) -> None:
    """After the mapping there is no z any more that could be looked at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    admm = dt.ADMM(rho=0.1, every=2, until=8, metric=metric, finish=finish)
    recipe = dt.Recipe([dt.Rule(match="weight", target=dt.TopK(keep=9, scope="model"), mechanism=admm)])
    run = dt.attach(model, optimizer, recipe, total_steps=12)
    for step in range(12):
        if step == cut:
            model.load_state_dict({name: p + torch.randn_like(p) for name, p in model.state_dict().items()})
            run.rebind(adopt=True)
        optimizer.zero_grad()
        model(torch.randn(8, 6)).sub(1).square().mean().backward()
        optimizer.step()
    run.finalize()
    assert sum(int(torch.count_nonzero(layer.weight)) for layer in model) == 9  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_binary_preset_takes_few_layers(layers: int) -> None:
    """One layer is both ends; with two there is nothing between them, and the first stage only trains."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    run = dt.attach(model, optimizer, dt.Recipe.preset("admm-binary"), total_steps=40)
    assert str(run.plan).count("Binary()") == layers
    for step in range(40):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).sub(1).square().mean().backward()
        optimizer.step()
        if step == 10:
            assert [row["name"] for row in run.measure()] == (["1.weight"] if layers == 3 else [])
    run.finalize()
    assert all(len(p.unique()) == 2 for p in model.parameters() if p.dim() == 2)


@pytest.mark.parametrize(
    ("mechanism", "says"),
    [
        (dt.ADMM(every=5, until=41), r"the mapping of ADMM\(until=41\) is at step 41"),
        (dt.ADMM(every=5, until=41, finish=None), r"the mapping of ADMM\(until=41\) is at step 41"),
        (dt.ADMM(every=5, until=20, freeze_every=11), r"freeze_every=11\) is at step 42"),
        (dt.ADMM(every=5, until=0.5, freeze_every=0.3), r"freeze_every=0.3\) is at step 44"),
        (dt.PartialFreeze(every=21), r"PartialFreeze\(rounds=.*, every=21\) is at step 42"),
        (dt.PartialFreeze(every=15, start=11), "is at step 41"),
    ],
)
def test_what_would_come_after_the_end_is_refused(mechanism: dt.Mechanism, says: str) -> None:
    """Rounds and mappings beyond the last step were dropped in silence."""

    def attach(mechanism: dt.Mechanism, before: int, steps: int | None) -> dt.Run:
        layer = nn.Linear(8, 8, bias=False)
        rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=mechanism)
        recipe = dt.Recipe([rule])
        if before:
            assert steps is not None
            first = dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.Masked())
            share = before / (before + steps)
            recipe = dt.Recipe(stages=[dt.Stage(rules=[r], share=s) for r, s in ((first, share), (rule, 1 - share))])
        total = None if steps is None else before + steps
        return dt.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), recipe, total_steps=total)

    with pytest.raises(ValueError, match=rf"'weight': .*{says}, but training has 40 steps, so it would never come"):
        attach(mechanism, 0, 40)
    with pytest.raises(ValueError, match=rf"'weight': .*{says}, but its stage has 40 steps"):
        attach(mechanism, 60, 40)  # there are 100 steps in all
    if "0.3" not in says:  # fractions grow with the training
        attach(mechanism, 0, 46)
    if isinstance(mechanism, dt.PartialFreeze):
        attach(mechanism, 0, None)


@pytest.mark.filterwarnings("ignore:ADMM maps whole weights to zero")
@pytest.mark.parametrize("mechanism", [dt.Masked(start=3, metric="fisher"), dt.ADMM(every=2, until=6, metric="fisher")])
def test_weights_without_any_gradient_are_the_first_to_go_in_the_fisher_metric(mechanism: dt.Mechanism) -> None:
    """Whether the optimizer is given no gradient or zeros; they used to stay unweighed, and beat all others."""
    left = {}
    for how in ("none", "zeros"):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
        model = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = dt.Rule(match="weight", target=dt.TopK(keep=0.5, scope="model"), mechanism=mechanism)
        dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=8)
        for step in range(8):
            optimizer.zero_grad()
            model(torch.randn(16, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            middle = layers[1].weight.grad
            assert middle is not None
            middle.zero_()
            layers[1].weight.grad = None if how == "none" else middle
            optimizer.step()
        left[how] = [int((layer.weight != 0).sum()) for layer in layers]
        assert sum(left[how]) == 68
        assert left[how][1] == 0, "68 of the 72 others are left"
    assert left["none"] == left["zeros"]


@pytest.mark.parametrize("target", [dt.TopK(keep=0.25), dt.NM(n=2, m=4), dt.Structured(group="filter", keep=0.5)])
def test_the_fisher_metric_does_not_change_what_a_weight_is_stored_in(target: dt.Target) -> None:
    sizes = {}
    for metric in ("euclidean", "fisher"):
        torch.manual_seed(0)
        layer = nn.Linear(16, 16, bias=False).bfloat16()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        mechanism = dt.Masked(start=2, metric=metric)
        run = dt.attach(layer, optimizer, dt.Recipe([dt.Rule(match="weight", target=target, mechanism=mechanism)]), 4)
        for _ in range(4):
            layer.weight.grad = torch.randn(16, 16).bfloat16()
            optimizer.step()
        form = run.encoded()["weight"].form
        sizes[metric] = next(part.width for part in form.parts if part.name == "values")
    assert sizes == {"euclidean": 16, "fisher": 16}


@pytest.mark.parametrize("mechanism", [dt.ADMM(rho=0.1, every=2, until=6), dt.Penalty(strength=0.1)])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_climbs_is_pulled_the_same_way(make: Any, mechanism: dt.Mechanism) -> None:
    """The loss down, or its negative up."""
    ends = []
    for climbs in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        optimizer = make(layer.parameters(), lr=0.05, maximize=climbs)
        rule = dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=mechanism)
        dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=8)
        for step in range(8):
            optimizer.zero_grad()
            loss = layer(torch.randn(16, 6, generator=torch.Generator().manual_seed(step))).square().mean()
            (-loss if climbs else loss).backward()
            optimizer.step()
        ends.append(layer.weight.detach().clone())
    assert torch.equal(*ends)


def test_the_decoupled_pull_leaves_a_frozen_weight() -> None:
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rule = dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.ADMM(every=2, until=6, form="decoupled"))
    dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=8)
    layer.weight.requires_grad_(False)
    before = layer.weight.detach().clone()
    layer(torch.randn(16, 6)).square().mean().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("mechanism", "sentence"),
    [
        (dt.PartialFreeze(every=0.001), "steps between freeze rounds is none"),
        (dt.PartialFreeze(start=0.8), "3 freeze rounds from step 8 on need a step each, and 2 are left"),
        (dt.ADMM(every=2, until=8), "3 freeze rounds from step 8 on need a step each, and 2 are left"),
        (dt.ADMM(every=2, until=4, freeze_every=0.001), "steps between freeze rounds is none"),
    ],
)
def test_freeze_rounds_that_fall_together_are_refused(mechanism: dt.Mechanism, sentence: str) -> None:
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=mechanism)])
    with pytest.raises(ValueError, match=sentence):
        dt.attach(layer, optimizer, recipe, total_steps=10)


@pytest.mark.parametrize(("rho", "far"), [(1e-6, True), (1.0, False)])
def test_a_mapping_as_far_away_as_zero_warns(rho: float, far: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 20, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    mechanism = dt.ADMM(rho=rho, every=4, until=40)
    rule = dt.Rule(match="weight", target=dt.TopK(keep=0.02), mechanism=mechanism)
    run = dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            layer.weight.grad = torch.full((20, 20), 1e-6)
            optimizer.step()
    relative = dt.residuals(run)["weight"]["relative"]
    assert (relative >= 1.0) == far
    assert [str(w.message)[:40] for w in caught] == (["ADMM maps weights that are still as far "] if far else [])


def test_a_layer_that_is_emptied_is_called_that() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    model = nn.Sequential(first, second)
    with torch.no_grad():
        second.weight.mul_(1e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mechanism = dt.ADMM(rho=1.0, every=10, until=80, growth=1.0)
    rule = dt.Rule(match="weight$", target=dt.TopK(keep=0.2, scope="model"), mechanism=mechanism)
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=90)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(90):
            optimizer.zero_grad()
            (model(torch.randn(4, 8)).square().mean() * 1e-3).backward()
            optimizer.step()
    assert not second.weight.any() and bool(first.weight.any())
    assert [str(each.message).partition(":")[0] for each in caught] == ["ADMM maps whole weights to zero"]
    assert dt.residuals(run)["0.weight"]["relative"] < 1
