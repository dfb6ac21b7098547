"""Promises about optimizers: strength 0 is bitwise the base one; scalers, closures, decay and dummy steps behave."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent as dt

Factory = Callable[[nn.Module], "torch.optim.Optimizer | list[torch.optim.Optimizer]"]


def net() -> Any:  # an nn.Sequential, whose members no type checker knows
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def backward(model: nn.Module, step: int) -> Tensor:
    inputs, wanted = batch(step)
    loss = (model(inputs) - wanted).square().mean()
    loss.backward()
    return loss


def grid(mechanism: dt.Mechanism, bits: int = 3, match: str = "weight", **options: Any) -> dt.Recipe:
    target = dt.Uniform(bits=bits, range="minmax")
    return dt.Recipe([dt.Rule(match=match, target=target, mechanism=mechanism, **options)])


def many(optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    return optimizer if isinstance(optimizer, list) else [optimizer]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: Iterable[int]) -> None:
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def bitwise_base(
    factory: Factory,
    mechanism: dt.Mechanism,
    make_model: Callable[[], nn.Module] = net,
    step: Callable[[nn.Module, int], Any] = backward,
    steps: int = 6,
) -> bool:
    """Whether training with the mechanism attached equals the base optimizer's bitwise: weights and optimizer state."""
    results = []
    for attached in (False, True):
        model = make_model()
        optimizers = many(factory(model))
        if attached:
            dt.attach(model, optimizers, grid(mechanism), total_steps=steps)
        for tick in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            step(model, tick)
            for optimizer in optimizers:
                optimizer.step()
        state = [value for o in optimizers for held in o.state.values() for value in held.values()]
        results.append([*model.parameters(), *(torch.as_tensor(value) for value in state)])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Lion(torch.optim.Optimizer):
    """A third party's optimizer: sign of a momentum, decoupled decay, no flag that says so."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                held = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((0.9 * held + 0.1 * p.grad).sign(), alpha=-group["lr"])
                held.mul_(0.99).add_(p.grad, alpha=0.01)
        return loss


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no torch.optim.Muon")
    flat = [p for p in model.parameters() if p.dim() != 2]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1), torch.optim.AdamW(flat, lr=0.01)]


FACTORIES: dict[str, Factory] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd-nesterov-decay": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=False
    ),
    "sgd-foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=False),
    "adamw-foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "muon+adamw": muon_and_adamw,
    "lion": lambda m: Lion(m.parameters(), lr=0.01, weight_decay=0.1),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.1),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(
    "mechanism",
    [
        dt.PSG(gain=8.0, strength=0.0, form="gradient", clip_norm=0.01),
        dt.PSG(gain=8.0, strength=0.0, form="update"),
        dt.PSG(gain=8.0, start=1.0),
        dt.STE(start=1.0),
        dt.HardProjection(every=1, start=1.0),
        dt.Clip(start=1.0),
    ],
    ids=["psg-gradient", "psg-update", "psg-late", "ste-late", "projection-late", "clip-late"],
)
def test_nothing_to_do_is_bitwise_the_base_optimizer(name: str, mechanism: dt.Mechanism) -> None:
    assert bitwise_base(FACTORIES[name], mechanism)


@pytest.mark.parametrize("name", FACTORIES)
def test_the_comparison_can_fail(name: str) -> None:
    assert not bitwise_base(FACTORIES[name], dt.PSG(gain=8.0, strength=0.01))


# ------------------------------------------------------------------------------------------- forms of PSG and decay


def one_step(
    factory: Factory, mechanism: dt.Mechanism | None, bits: int = 3
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights before, weights after) one step."""
    model = net()
    optimizers = many(factory(model))
    if mechanism is not None:
        dt.attach(model, optimizers, grid(mechanism, bits=bits), total_steps=10)
    before = weights(model)
    train(model, optimizers, [0])
    return before, weights(model)


def factors(before: dict[str, Tensor], mechanism: dt.PSG, bits: int = 3) -> dict[str, Tensor]:
    """s(w) by the definition in the docs, not by the code under test: r is a quarter of the cell."""
    found = {}
    for name, w in before.items():
        if name.endswith("weight"):
            cell = w.abs().max() / (2 ** (bits - 1) - 1)
            distance = (w - (w / cell).round() * cell).abs()
            strength = 1.0 if mechanism.strength is None else float(mechanism.strength)  # type: ignore[arg-type]
            eps, gain = float(mechanism.eps), float(mechanism.gain)  # type: ignore[arg-type]
            found[name] = (1 - strength) + strength * gain * (distance + eps * cell) / (cell / 4)
    return found


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_gradient_form_scales_the_gradient(strength: float) -> None:
    psg = dt.PSG(strength=strength, gain=2.0, eps=0.1, form="gradient", clip=False)
    sgd: Factory = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731
    before, plain = one_step(sgd, None)
    _, pulled = one_step(sgd, psg)
    for name, s in factors(before, psg).items():
        torch.testing.assert_close(pulled[name] - before[name], s * (plain[name] - before[name]), rtol=2e-4, atol=1e-7)
    assert torch.equal(pulled["0.bias"], plain["0.bias"])


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "muon+adamw", "lion"])
def test_update_form_scales_the_step_and_leaves_decoupled_decay_alone(name: str) -> None:
    """AdamW and Muon carry a flag or are probed; Lion is a class nobody here has heard of."""
    psg = dt.PSG(gain=2.0, eps=0.1, clip=False)
    before, plain = one_step(FACTORIES[name], None)
    _, pulled = one_step(FACTORIES[name], psg)
    lr, decay = (0.01, 0.01) if name.startswith("adamw") else (0.01, 0.1)
    for key, s in factors(before, psg).items():
        w = before[key]
        update = plain[key] - w + lr * decay * w
        torch.testing.assert_close(pulled[key], w + s * update - lr * decay * w, rtol=1e-4, atol=1e-7)
    # The decay is large enough for a form that scales it to be seen.
    assert max(float((lr * decay * before[k]).abs().max()) for k in before) > 1e-5


def test_groups_are_found_by_their_weights_when_they_change_place() -> None:
    """Reordered, dropped and loaded groups: each weight keeps the decay of the group that it sits in."""
    ends = []
    for change in (False, True):
        model = net()
        biases = {"params": [model[i].bias for i in (0, 2, 4)], "weight_decay": 0.0}
        rest = {"params": [model[i].weight for i in (0, 2, 4)], "weight_decay": 0.3}
        optimizer = torch.optim.AdamW([biases, rest], lr=0.05)
        dt.attach(model, optimizer, grid(dt.PSG(gain=8.0, form="update")), total_steps=10)
        train(model, [optimizer], [0])
        if change:
            optimizer.param_groups.reverse()
        train(model, [optimizer], [1])
        biases["params"] = []  # both then train weights alone
        if change:
            optimizer.param_groups.pop()
        else:
            optimizer.param_groups.pop(0)
        train(model, [optimizer], [2])
        ends.append(weights(model))
    assert same(*ends)


class RateFree(torch.optim.Optimizer):
    """A rate that it finds by itself: lr=None, as transformers' Adafactor."""

    def __init__(self, params: Any, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": None, "weight_decay": weight_decay, "decoupled_weight_decay": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            p.sub_(1e-2 * p.grad)


def test_a_group_without_a_rate_trains_and_is_refused_where_the_number_is_needed() -> None:
    model = net()
    optimizer = RateFree(model.parameters())
    run = dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    train(model, [optimizer], range(2))
    assert run.clock == 2
    model = net()
    optimizer = RateFree(model.parameters(), weight_decay=0.1)
    dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"'0.weight' sits in a group with lr=None"):
        train(model, [optimizer], [0])
    assert same(before, weights(model))


@pytest.mark.parametrize(
    "mechanism", [dt.PSG(gain=8.0), dt.PSG(gain=8.0, form="update"), dt.Clip(), dt.Proximal(strength=0.1)]
)
@pytest.mark.parametrize("how", ["rate 0", "frozen", "no gradient"])
def test_what_the_optimizer_may_not_move_is_not_clipped_either(how: str, mechanism: dt.Mechanism) -> None:
    model = net()
    still = model[0].weight
    with torch.no_grad():
        still.copy_(torch.linspace(-1, 1, still.numel()).view_as(still))  # three levels fitted to it end before 1
    rate = {"lr": 0.0} if how == "rate 0" else {}
    rest = [p for p in model.parameters() if p is not still]
    optimizer = torch.optim.SGD([{"params": [still], **rate}, {"params": rest}], lr=0.1)
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=mechanism)
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=10)
    before = weights(model)
    if how == "frozen":
        still.requires_grad_(False)
    optimizer.zero_grad()
    backward(model, 0)
    if how == "no gradient":
        still.grad = None
    optimizer.step()
    assert run.clock == 1
    assert torch.equal(still, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_decay_is_told_for_each_kind_of_group() -> None:
    """SGD without momentum decays as AdamW does; with momentum the decay is remembered, and one answer is wrong."""
    ends = []
    for order in (1, -1):
        model = net()
        groups = [{"params": model[i].parameters(), "momentum": 0.9 * (i == 2)} for i in (0, 2, 4)][::order]
        optimizer = torch.optim.SGD(groups, lr=0.05, weight_decay=0.3)
        dt.attach(model, optimizer, grid(dt.PSG(gain=8.0, form="update", clip=False)), total_steps=10)
        old = weights(model)["2.weight"]
        train(model, [optimizer], [0])
        ends.append(weights(model))
        alone = net()
        other = torch.optim.SGD(alone.parameters(), lr=0.05, weight_decay=0.3, momentum=0.9)
        dt.attach(alone, other, grid(dt.PSG(gain=8.0, form="update", clip=False)), total_steps=10)
        train(alone, [other], [0])
        assert not torch.equal(old, alone[2].weight)
        assert torch.equal(model[2].weight, alone[2].weight)
    assert same(*ends)


def test_decay_through_the_gradient_is_not_taken_for_decoupled() -> None:
    """Adam's own decay is a part of its normalised step: the whole step is scaled."""
    psg = dt.PSG(gain=2.0, eps=0.1, clip=False)
    adam: Factory = lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1)  # noqa: E731
    before, plain = one_step(adam, None)
    _, pulled = one_step(adam, psg)
    for key, s in factors(before, psg).items():
        torch.testing.assert_close(pulled[key] - before[key], s * (plain[key] - before[key]), rtol=2e-4, atol=1e-7)


def test_gradient_form_leaves_the_decay_of_sgd_alone() -> None:
    """SGD adds its decay to the gradient inside the step, after the scaling."""
    psg = dt.PSG(gain=2.0, eps=0.1, form="gradient", clip=False)
    decayed: Factory = lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.5)  # noqa: E731
    without: Factory = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731
    before, a = one_step(decayed, psg)
    _, b = one_step(without, psg)
    for key in factors(before, psg):
        torch.testing.assert_close(a[key] - b[key], -0.1 * 0.5 * before[key], rtol=1e-4, atol=1e-7)


def test_auto_is_gradient_for_sgd_and_update_for_all_else() -> None:
    for name in ("sgd-nesterov-decay", "adamw", "lion"):
        runs = {}
        for form in ("auto", "gradient", "update"):
            model = net()
            optimizers = many(FACTORIES[name](model))
            dt.attach(model, optimizers, grid(dt.PSG(gain=8.0, form=form)), total_steps=10)
            train(model, optimizers, range(3))
            runs[form] = weights(model)
        assert same(runs["auto"], runs["gradient" if name.startswith("sgd") else "update"])
        assert not same(runs["gradient"], runs["update"])


class Odd(Lion):
    """Decay that does not go with the learning rate: neither coupled nor `lr * weight_decay`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["weight_decay"]).add_(p.grad.sign(), alpha=-group["lr"])


class Unbuildable(Lion):
    def __init__(self, params: Any, wanted: int) -> None:
        super().__init__(params, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda m: Odd(m.parameters(), lr=0.01, weight_decay=0.1), "another part than lr"),
        (lambda m: Unbuildable(m.parameters(), 3), "cannot tell"),
    ],
)
def test_decay_that_cannot_be_told_is_refused_before_any_weight_moves(factory: Factory, words: str) -> None:
    model = net()
    optimizers = many(factory(model))
    dt.attach(model, optimizers, grid(dt.PSG(gain=8.0)), total_steps=10)
    before = weights(model)
    with pytest.raises(RuntimeError, match=words):
        train(model, optimizers, [0])
    assert same(before, weights(model))
    for group in optimizers[0].param_groups:
        group["decoupled_weight_decay"] = True  # what the message advises
    train(model, optimizers, [0])


def test_groups_with_other_rates_and_a_tensor_rate() -> None:
    """Decay and rate come from the weight's own group, as they are at this step."""
    psg = dt.PSG(gain=2.0, eps=0.1, clip=False)

    def groups(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        second = {"params": rest, "lr": torch.tensor(0.02), "weight_decay": 0.3}
        return torch.optim.AdamW([{"params": [first], "lr": 0.05, "weight_decay": 0.0}, second], foreach=False)

    before, plain = one_step(groups, None)
    _, pulled = one_step(groups, psg)
    for (name, s), taken in zip(factors(before, psg).items(), (0.0, 0.02 * 0.3, 0.02 * 0.3), strict=True):
        w = before[name]
        torch.testing.assert_close(
            pulled[name], w + s * (plain[name] - w + taken * w) - taken * w, rtol=1e-4, atol=1e-7
        )


# ----------------------------------------------------------------------------- clipping, accumulation, mixed precision


def test_clip_in_the_loop_acts_before_scaling_and_clip_norm_after() -> None:
    limit, lr = 0.05, 0.1
    moved = {}
    for where in ("loop", "mechanism"):
        model = net()
        psg = dt.PSG(gain=2.0, eps=0.1, clip=False, clip_norm=limit if where == "mechanism" else None)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        dt.attach(model, optimizer, grid(psg), total_steps=10)
        before = weights(model)
        backward(model, 0)
        raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if where == "loop":
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        moved[where] = {name: (value - before[name]) / -lr for name, value in weights(model).items()}
        s = factors(before, psg)
        scaled = {name: s.get(name, torch.ones(())) * g for name, g in raw.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in (raw if where == "loop" else scaled).values()))
        assert norm > limit
        for name, g in scaled.items():
            torch.testing.assert_close(moved[where][name], g * limit / norm, rtol=1e-3, atol=1e-6)
    total = math.sqrt(sum(float(m.square().sum()) for m in moved["mechanism"].values()))
    assert total == pytest.approx(limit, rel=1e-3)


def test_two_limits_in_one_optimizer_are_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = dt.Uniform(bits=4)
    rules = [dt.Rule(match=f"{i}.weight", target=target, mechanism=dt.PSG(gain=8.0, clip_norm=1.0 + i)) for i in (0, 2)]
    dt.attach(model, optimizer, dt.Recipe(rules), total_steps=10)
    with pytest.raises(ValueError, match=r"different limits \[1.0, 3.0\]"):
        train(model, [optimizer], [0])


def test_gradients_may_be_accumulated() -> None:
    """Two half batches and one step equal the whole batch: only the step ticks and scales."""
    ends = []
    for parts in (1, 2):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
        for step in range(3):
            inputs, wanted = batch(step)
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), wanted.chunk(parts), strict=True):
                ((model(x) - y).square().mean() / parts).backward()
            optimizer.step()
        assert run.clock == 3
        ends.append(weights(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "mechanism", [dt.PSG(gain=8.0), dt.PSG(gain=8.0, form="update"), dt.STE(), dt.HardProjection(every=1)]
)
def test_an_overflow_under_grad_scaler_moves_nothing_and_counts_where_the_step_is_called(
    fused: bool, mechanism: dt.Mechanism
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    run = dt.attach(model, optimizer, grid(mechanism), total_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def step(tick: int, bad: bool) -> None:
        optimizer.zero_grad()
        inputs, wanted = batch(tick)
        scaler.scale((model(inputs) - wanted).square().mean()).backward()
        if bad:
            grad = model[0].weight.grad
            assert grad is not None
            grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()

    def trained() -> dict[str, Tensor]:
        """A latent where there is one: what is seen of it follows the fits, and those the clock."""
        held = run.state_dict()["weights"]
        return {
            name: held[name]["state"].get("latent", value).clone() if name in held else value
            for name, value in weights(model).items()
        }

    step(0, bad=False)
    assert run.clock == 1
    before = trained()
    step(1, bad=True)
    assert same(before, trained()), "an overflow must move nothing"
    assert run.clock == (2 if fused else 1), "only a fused step is called at all"
    if not fused:
        run.skip_step()
        assert same(before, trained()), "nor must a step that was left out"
    step(2, bad=False)
    assert run.clock == 3
    assert not same(before, trained())


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_fused_step_under_grad_scaler_equals_an_unfused_one(clip_norm: float | None) -> None:
    """In a fused step the gradients are still multiplied by the loss scale: a limit must be too."""
    ends = []
    for fused in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        dt.attach(model, optimizer, grid(dt.PSG(gain=8.0, clip_norm=clip_norm)), total_steps=10)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for tick in range(3):
            optimizer.zero_grad()
            inputs, wanted = batch(tick)
            scaler.scale((model(inputs) - wanted).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(weights(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)
    assert not same(ends[0], weights(net()))


# ------------------------------------------------------------------------------------------------------- closures


@pytest.mark.parametrize(
    "mechanism", [dt.PSG(gain=8.0), dt.PSG(gain=8.0, form="update"), dt.STE()], ids=["gradient", "update", "ste"]
)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_evaluated_once_with_gradients_on(mechanism: dt.Mechanism, by_name: bool) -> None:
    """Equal to the plain loop; the naive way scales last step's gradient and shows the forward pass the latent."""
    ends, losses = [], []
    for closures in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run = dt.attach(model, optimizer, grid(mechanism), total_steps=10)
        for tick in range(4):
            calls = []

            def closure(held: Any = (model, optimizer, tick, calls)) -> Tensor:
                shown, optimizer, tick, calls = held
                calls.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                return backward(shown, tick)

            if closures:
                with torch.no_grad():
                    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                losses.append(float(loss.detach()))  # type: ignore[union-attr]
            else:
                losses.append(float(closure().detach()))
                optimizer.step()
            assert calls == [True]
        assert run.clock == 4
        ends.append(weights(model))
    assert same(*ends)
    assert losses[:4] == losses[4:]


def test_lbfgs_is_refused_in_words() -> None:
    model = net()
    with pytest.raises(ValueError, match="LBFGS evaluates its closure more than once"):
        dt.attach(model, torch.optim.LBFGS(model.parameters()), grid(dt.PSG(gain=8.0)), total_steps=10)


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return closure()


class Sam(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=0.05)
        return closure()


@pytest.mark.parametrize(("cls", "words"), [(Twice, "more than once a step"), (Sam, "after it moved weights")])
def test_closures_that_cannot_be_replayed_are_refused_in_words(cls: type, words: str) -> None:
    """A replay gives SAM its old loss and no second gradient: silently another method."""
    model = net()
    optimizer = cls(model.parameters(), lr=0.1)
    dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    with pytest.raises(RuntimeError, match=words):
        optimizer.step(lambda: backward(model, 0))


# --------------------------------------------------------------------- dummy steps, warm-up, wrappers, other protocols


@pytest.mark.parametrize(
    "mechanism", [dt.PSG(gain=8.0), dt.PSG(gain=8.0, form="update"), dt.STE(), dt.HardProjection(every=1)]
)
@pytest.mark.parametrize("name", ["adamw", "sgd-foreach"])
def test_dummy_steps_of_checkpoint_code_move_nothing(name: str, mechanism: dt.Mechanism) -> None:
    """torch.distributed.checkpoint makes state by a step with zero gradients; a projection would move weights."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    ends = []
    for dummy in (False, True):
        model = net()
        optimizers = many(FACTORIES[name](model))
        run = dt.attach(model, optimizers, grid(mechanism), total_steps=10)
        if dummy:
            before = weights(model)
            get_optimizer_state_dict(model, optimizers[0])
            assert optimizers[0].state, "the step that this test is about did not happen"
            assert run.clock == 0
            assert same(before, weights(model))
        train(model, optimizers, range(2))
        assert run.clock == 2
        ends.append(weights(model))
    if name != "adamw":  # Adam's own counter is advanced by the dummy step (torchtitan PR 4382), with or without us
        assert same(*ends)


@pytest.mark.parametrize(
    "mechanism", [dt.PSG(gain=8.0), dt.PSG(gain=8.0, form="update"), dt.Clip(), dt.Penalty(strength=0.1)]
)
def test_a_warm_up_that_starts_at_rate_zero_counts_and_moves_nothing(mechanism: dt.Mechanism) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 2, 1.0))
    run = dt.attach(model, optimizer, grid(mechanism), total_steps=10)
    before = weights(model)
    for tick in range(3):
        train(model, [optimizer], [tick])
        scheduler.step()
        assert run.clock == tick + 1
        assert same(before, weights(model)) == (tick == 0)


def test_momentum_takes_in_the_scaled_gradient_of_a_step_at_rate_zero() -> None:
    """By hand: m = s(w) g, and the next step at rate 1 without a gradient moves w by mu m."""
    model = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    grid4, psg = dt.Uniform(bits=4), dt.PSG(gain=8.0, clip=False, eps=0.0)
    dt.attach(model, optimizer, dt.Recipe([dt.Rule(match="weight", target=grid4, mechanism=psg)]), total_steps=10)
    w, gradient = model.weight.detach().clone(), torch.randn(4, 6)
    scale = psg.scale(w, grid4, grid4.fit(w))
    model.weight.grad = gradient.clone()
    optimizer.step()
    assert torch.equal(model.weight, w)
    optimizer.param_groups[0]["lr"] = 1.0
    model.weight.grad = torch.zeros(4, 6)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), w - 0.5 * scale * gradient)


def _skips_nothing(t: int) -> float:
    return 1.0


_RATES = {"from zero": lambda t: min(t / 4, 1.0), "to zero": lambda t: 1 - t / 19, "one": _skips_nothing}


@pytest.mark.parametrize("rate", _RATES)
@pytest.mark.parametrize(
    "mechanism",
    [dt.ADMM(until=1.0), dt.Masked(start=1.0), dt.ADMM(until=0.5, metric="fisher")],
    ids=["admm", "masked", "fisher"],
)
def test_what_falls_on_the_last_moment_happens_whatever_the_rate(mechanism: dt.Mechanism, rate: str) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _RATES[rate])
    rule = dt.Rule(match="weight", target=dt.TopK(keep=0.25), mechanism=mechanism)
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert run.clock == 20
    assert int((model.weight != 0).sum()) == 16


def test_a_foreign_write_is_still_seen_after_a_dummy_step_at_rate_zero() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    model.load_state_dict({name: 2 * value for name, value in weights(model).items()})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for rate in (0.0, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        with pytest.raises(RuntimeError, match="written by someone else"):
            train(model, [optimizer], [0])


def test_schedulers_drive_the_rate_of_attached_optimizers() -> None:
    """Cosine to zero: the last steps are at ever smaller rates, and the moves shrink with them."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    run = dt.attach(model, optimizer, grid(dt.PSG(gain=8.0, clip=False)), total_steps=6)
    moves = []
    for tick in range(6):
        before = weights(model)
        train(model, [optimizer], [tick])
        scheduler.step()
        moves.append(max(float((v - before[n]).abs().max()) for n, v in weights(model).items()))
    assert run.clock == 6
    assert moves[-1] < 0.2 * moves[0]


class Doubled(torch.optim.SGD):
    """A subclass whose step calls its base's: torch then runs every hook twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.PSG(gain=8.0, form="update"), dt.STE()])
def test_a_step_inside_a_step_counts_once(mechanism: dt.Mechanism) -> None:
    ends = []
    for cls in (torch.optim.SGD, Doubled):
        model = net()
        optimizer = cls(model.parameters(), lr=0.1, momentum=0.9)
        run = dt.attach(model, optimizer, grid(mechanism), total_steps=10)
        train(model, [optimizer], range(3))
        assert run.clock == 3
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("idle", ["rate", "gradient"])
@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.PSG(gain=8.0, form="update"), dt.STE()])
def test_a_step_inside_a_step_that_moves_nothing_is_none(mechanism: dt.Mechanism, idle: str) -> None:
    ends = []
    for cls in (torch.optim.SGD, Doubled):
        model = net()
        optimizer = cls(model.parameters(), lr=0.1)
        run = dt.attach(model, optimizer, grid(mechanism), total_steps=10)
        optimizer.param_groups[0]["lr"] = 0.0 if idle == "rate" else 0.1
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert run.clock == 0
        optimizer.param_groups[0]["lr"] = 0.1
        train(model, [optimizer], range(3))
        assert run.clock == 3
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE(), dt.HardProjection(every=2)])
def test_an_optimizer_inside_backward(mechanism: dt.Mechanism) -> None:
    """One optimizer a parameter, stepping as soon as its gradient is there: equal to the usual loop."""
    ends = []
    for inside in (False, True):
        model = net()
        if inside:
            of = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
            run = dt.attach(model, list(of.values()), grid(mechanism), total_steps=10)

            def step(p: Tensor, of: dict[Any, Any] = of) -> None:
                of[p].step()
                of[p].zero_grad()

            for p in model.parameters():
                p.register_post_accumulate_grad_hook(step)
            for tick in range(4):
                backward(model, tick)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            run = dt.attach(model, optimizer, grid(mechanism), total_steps=10)
            train(model, [optimizer], range(4))
        assert run.clock == 4
        ends.append(weights(model))
    assert same(*ends)


def test_a_fit_over_the_whole_model_is_refused_inside_backward() -> None:
    model = net()
    of = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    target = dt.TopK(keep=0.5, scope="model")
    recipe = dt.Recipe([dt.Rule(match="weight", target=target, mechanism=dt.PSG(gain=8.0), fit_every=1)])
    dt.attach(model, list(of.values()), recipe, total_steps=10)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: of[p].step())
    with pytest.raises(RuntimeError, match="steps inside backward cannot offer"):
        backward(model, 0)


def test_a_fit_over_the_whole_model_uses_the_weights_before_the_first_of_two_optimizers() -> None:
    """Attached to one optimizer or to two, the shares of a model-wide TopK are the same at every tick."""
    ends = []
    for split in (False, True):
        model = net()
        params = list(model.parameters())
        parts = [params[:2], params[2:]] if split else [params]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(part, lr=0.3) for part in parts]
        target = dt.TopK(keep=0.5, scope="model")
        mechanism = dt.HardProjection(every=1, masks=False)
        dt.attach(model, optimizers, dt.Recipe([dt.Rule(match="weight", target=target, mechanism=mechanism)]))
        train(model, optimizers, range(4))
        ends.append(weights(model))
    assert same(*ends)
    kept = sum(int((value != 0).sum()) for name, value in ends[0].items() if name.endswith("weight"))
    assert kept == round(0.5 * (6 * 8 + 8 * 5 + 5 * 3))


class Bare:
    """An optimizer that owes torch nothing but `param_groups`."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        self.param_groups = [{"params": list(params), "lr": lr}]

    def step(self) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0, form="gradient"), dt.STE(), dt.HardProjection(every=2)])
def test_an_optimizer_without_hooks_through_the_two_public_halves(mechanism: dt.Mechanism) -> None:
    ends = []
    for bare in (False, True):
        model = net()
        optimizer: Any = (Bare if bare else torch.optim.SGD)(model.parameters(), lr=0.1)
        if bare:
            with pytest.raises(ValueError, match="hooks=False"):
                dt.attach(model, optimizer, grid(mechanism))
        run = dt.attach(model, optimizer, grid(mechanism), total_steps=10, hooks=not bare)
        for tick in range(4):
            optimizer.zero_grad()
            backward(model, tick)
            if bare:
                run.before_step()
            optimizer.step()
            if bare:
                run.after_step()
        assert run.clock == 4
        ends.append(weights(model))
        if bare:
            with pytest.raises(RuntimeError, match="without run.before_step"):
                run.after_step()
            with pytest.raises(ValueError, match="name one of the 1 attached"):
                run.before_step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert same(*ends)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE()])
def test_a_second_half_that_is_forgotten_is_said(cls: Any, mechanism: dt.Mechanism) -> None:
    model = net()
    optimizer = cls(model.parameters(), lr=0.1)
    run = dt.attach(model, optimizer, grid(mechanism), total_steps=10, hooks=False)
    backward(model, 0)
    run.before_step()  # and then the loop thinks better of it: nothing moved
    optimizer.zero_grad()
    backward(model, 0)
    run.before_step()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"run\.after_step\(\) was not called"):
        run.before_step()


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE()])
def test_by_hand_the_state_rides_with_an_optimizer_that_can_carry_it(mechanism: dt.Mechanism) -> None:
    def go(model: nn.Module, optimizer: torch.optim.Optimizer, run: dt.Run, steps: Iterable[int]) -> None:
        for tick in steps:
            optimizer.zero_grad()
            backward(model, tick)
            run.before_step()
            optimizer.step()
            run.after_step()

    def start() -> tuple[nn.Module, torch.optim.Optimizer, dt.Run]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, dt.attach(model, optimizer, grid(mechanism), total_steps=10, hooks=False)

    model, optimizer, run = start()
    go(model, optimizer, run, range(4))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer, run, range(4, 8))
    again, its, resumed = start()
    again.load_state_dict(kept[0])
    its.load_state_dict(kept[1])
    go(again, its, resumed, range(4, 8))
    assert resumed.clock == 8
    assert same(weights(model), weights(again))
    run.detach()
    assert "detent" not in optimizer.state_dict()


def test_a_gradient_scaled_beyond_half_precision_is_refused_by_name() -> None:
    model = nn.Linear(4, 4).half()
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 16).reshape(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    dt.attach(model, optimizer, grid(dt.PSG(gain=100.0)), total_steps=10)
    model.weight.grad = torch.full_like(model.weight, 1e4)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"'weight'.*beyond float16"):
        optimizer.step()
    assert torch.equal(model.weight, before)


# --------------------------------------------------------------------------------- second copies, copies of optimizers


class Master(torch.optim.Optimizer):
    """Keeps the true weights in fp32 state and writes a rounded copy into the model, as bf16 training does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            master = self.state[p].setdefault("master", p.detach().float().clone())
            master.sub_(p.grad.float(), alpha=0.1)
            p.copy_(master)


class ScheduleFree(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0, form="update"), dt.STE(), dt.HardProjection(every=1)])
def test_master_copies_are_refused_in_words(dtype: torch.dtype, mechanism: dt.Mechanism) -> None:
    """The naive look after our own write finds nothing: the mechanism has already moved the weight off its copy."""
    model = net().to(dtype)
    optimizer = Master(model.parameters())
    dt.attach(model, optimizer, grid(mechanism), total_steps=10)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"second copy of '0.weight' in its state \('master'\)"):
        optimizer.step()


def test_a_step_without_gradient_ticks_once_training_has_begun() -> None:
    """Plain SGD never has state, so state alone cannot tell a dummy step of checkpoint code from a training step."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    run = dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    clocks = []
    for size in (0.0, 1e-3, 0.0, 1e-3):
        for p in model.parameters():
            p.grad = torch.full_like(p, size)
        optimizer.step()
        clocks.append(run.clock)
    assert clocks == [0, 1, 2, 3]


def test_schedule_free_optimizers_are_refused_in_words() -> None:
    model = net()
    with pytest.raises(ValueError, match="ScheduleFree keeps a second copy"):
        dt.attach(model, ScheduleFree(model.parameters(), lr=0.1), grid(dt.PSG(gain=8.0)), total_steps=10)


def test_two_runs_on_one_optimizer_are_refused_until_the_first_is_detached() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    with pytest.raises(ValueError, match=r"run attached already; call its run.detach\(\)"):
        dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    train(model, [optimizer], [0])
    assert run.clock == 1, "the refused attach took the first run's hooks away"
    run.detach()
    again = dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    train(model, [optimizer], [1])
    assert (run.clock, again.clock) == (1, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_an_optimizer_have_no_hooks(copied: Callable[[Any], Any]) -> None:
    """torch drops hooks when it copies an optimizer: the copy is the plain one, and the original keeps its own."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = dt.attach(model, optimizer, grid(dt.STE()), total_steps=10)
    other_model, other = copied((model, optimizer))
    assert "detent" in optimizer.state_dict()
    assert "detent" not in other.state_dict()
    train(other_model, [other], [0])
    assert run.clock == 0
    assert len(other_model[0].weight.unique()) > 7, "a plain step leaves the grid"
    train(model, [optimizer], [0])
    assert run.clock == 1
    assert len(model[0].weight.unique()) <= 7
    again = dt.attach(other_model, other, grid(dt.STE()), total_steps=10)
    assert "detent" in other.state_dict()
    assert again.clock == 0


def test_detach_gives_the_plain_optimizer_back() -> None:
    ends = []
    for attached in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if attached:
            dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10).detach()
        train(model, [optimizer], range(3))
        assert "detent" not in optimizer.state_dict()
        ends.append(weights(model))
    assert same(*ends)


# ------------------------------------------------------------------------------------------------------- compiled


# torch's own import of inductor, under Python 3.11 and later.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*is deprecated:DeprecationWarning")
def test_a_compiled_step_is_not_compiled_again_at_every_tick() -> None:
    """A Python clock inside the graph would be a new constant, and a new graph, at every step."""
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    ends = []
    for compiled in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run = dt.attach(
            model, optimizer, grid(dt.PSG(gain=8.0, eps=dt.Linear(first=0.2, last=0.0, end=8))), total_steps=10
        )
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        frames = []
        for tick in range(6):
            optimizer.zero_grad()
            backward(model, tick)
            step()
            frames.append(counter.frame_count)
        assert run.clock == 6
        if compiled:
            assert frames[-1] == frames[2], f"recompiled at later ticks: {frames}"
            assert frames[-1] > 0, "nothing was compiled, so nothing was tested"
        ends.append(weights(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])
    torch._dynamo.reset()


def test_a_fullgraph_step_is_refused_in_words() -> None:
    torch._dynamo.reset()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dt.attach(model, optimizer, grid(dt.PSG(gain=8.0)), total_steps=10)
    backward(model, 0)
    with pytest.raises(Exception, match="Detent keeps a Python clock"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    torch._dynamo.reset()


def test_a_compiled_model_trains_as_the_plain_one() -> None:
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        model = net()
        shown = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(shown.parameters(), lr=0.1)  # type: ignore[attr-defined]
        run = dt.attach(shown, optimizer, grid(dt.STE(), match=r"^0\.weight$"))  # type: ignore[arg-type]
        assert [claim.name for claim in run.plan.claimed] == ["0.weight"]
        train(shown, [optimizer], range(3))  # type: ignore[arg-type]
        with run.compressed(bits=2), torch.no_grad():
            inside = shown(batch(0)[0])
        ends.append((weights(model), inside))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    torch._dynamo.reset()
