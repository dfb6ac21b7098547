"""Half precision: latents are float32 behind bfloat16 and float16 weights, and no optimizer's small step is lost."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent as dt

HALVES = (torch.bfloat16, torch.float16)
STEPS = 12

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate),
    "momentum": lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, foreach=True),
    "AdamW": lambda model, rate: torch.optim.AdamW(model.parameters(), lr=rate, foreach=False),
    "AdamW foreach": lambda model, rate: torch.optim.AdamW(model.parameters(), lr=rate, foreach=True),
    "AdamW fused": lambda model, rate: torch.optim.AdamW(model.parameters(), lr=rate, fused=True),
    "Adafactor": lambda model, rate: torch.optim.Adafactor(model.parameters(), lr=rate),
}

LATENTS: dict[str, tuple[dt.Target, dt.Mechanism]] = {
    "ste": (dt.Uniform(bits=3), dt.STE()),
    "ste-topk": (dt.TopK(keep=0.3), dt.STE()),
    "ste-late": (dt.Ternary(), dt.STE(start=4)),
    "mirror": (dt.Binary(), dt.MirrorDescent()),
    "gd-tanh": (dt.Binary(), dt.GDTanh(beta=2.0)),
    "pmf": (dt.Ternary(), dt.PMF(beta=2.0)),
    "relax": (dt.Uniform(bits=4), dt.BinaryRelax()),
    "parq": (dt.Uniform(bits=2), dt.PARQ()),
    "codebook": (dt.VectorCodebook(block=2, size=8), dt.CodebookLearning()),
}


class Falls(torch.optim.AdamW):
    """Raises when told to."""

    fall = False

    def step(self, closure: Any = None) -> Any:
        if self.fall:
            raise ArithmeticError("on the way")
        return super().step(closure)


def attached(
    dtype: torch.dtype, make: Callable[[nn.Module], torch.optim.Optimizer], target: dt.Target, mechanism: dt.Mechanism
) -> tuple[nn.Linear, torch.optim.Optimizer, dt.Run]:
    torch.manual_seed(0)
    model = nn.Linear(32, 32).to(torch.bfloat16).to(dtype)  # the same weights in every dtype
    optimizer = make(model)
    rule = dt.Rule(match="weight", target=target, mechanism=mechanism)
    return model, optimizer, dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=STEPS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, past: int) -> None:
    for step in range(first, past):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(step)).to(dtype)
        (model(inputs) - inputs.roll(1, 1)).square().mean().backward()
        optimizer.step()


def latent(run: dt.Run) -> Tensor:
    return run.state_dict()["weights"]["weight"]["state"]["latent"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_as_many_latents_move_as_in_float32(dtype: torch.dtype, name: str) -> None:
    """At a rate of 1e-5, where a step of bfloat16 weights rounds to nothing for most."""
    moved = []
    for each in (torch.float32, dtype):
        model, optimizer, run = attached(each, lambda m: OPTIMIZERS[name](m, 1e-5), *LATENTS["ste"])
        before = latent(run).clone()
        for step in range(3):
            model.weight.grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(step)).to(each)
            optimizer.step()
        assert latent(run).dtype == torch.float32 and model.weight.dtype == each
        moved.append(float((latent(run) != before).double().mean()))
    assert moved[0] > 0.98 and abs(moved[0] - moved[1]) < 0.005


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_latents_of_exact_gradients_are_those_of_float32(name: str) -> None:
    """Where weights, gradients and moments are numbers that bfloat16 holds, the latents are bitwise the same."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer, run = attached(dtype, lambda m: OPTIMIZERS[name](m, 1e-3), *LATENTS["ste"])
        for step in range(5):
            model.weight.grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(step)).bfloat16().to(dtype)
            optimizer.step()
        found.append(latent(run))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", LATENTS)
def test_half_precision_resumes_and_repeats_bitwise(name: str) -> None:
    """State of float32 behind weights of bfloat16 goes through a file in every order, and through steps that raise."""

    make = lambda m: Falls(m.parameters(), lr=1e-3)  # noqa: E731
    model, optimizer, run = attached(torch.bfloat16, make, *LATENTS[name])
    files = {}
    for step in range(STEPS):
        if step in (0, 2, 7):
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
            files[step] = file.getvalue()
        train(model, optimizer, step, step + 1)
    codes = {key: value.decode() for key, value in run.encoded().items()}
    for order in ("model attach optimizer", "attach model optimizer"):
        for at, file in files.items():
            torch.manual_seed(5)
            weights, states = torch.load(io.BytesIO(file), weights_only=True)
            again = nn.Linear(32, 32).bfloat16()
            if order.startswith("model"):
                again.load_state_dict(weights)
            fresh = make(again)
            rule = dt.Rule(match="weight", target=LATENTS[name][0], mechanism=LATENTS[name][1])
            resumed = dt.attach(again, fresh, dt.Recipe([rule]), total_steps=STEPS)
            if order.startswith("attach"):
                again.load_state_dict(weights)
            fresh.load_state_dict(states)
            for step in range(at, STEPS):
                fresh.fall = True
                with pytest.raises(ArithmeticError):
                    train(again, fresh, step, step + 1)
                fresh.fall = False
                train(again, fresh, step, step + 1)
            assert torch.equal(again.weight, model.weight), (order, at)
            assert all(torch.equal(value.decode(), codes[key]) for key, value in resumed.encoded().items())
    assert run.encoded()["weight"].form.dtype == torch.bfloat16
    with run.compressed():
        assert torch.equal(model.weight, codes["weight"])
    run.finalize()
    assert torch.equal(model.weight, codes["weight"])
    train(model, optimizer, 0, 2)  # the optimizer goes on by itself, with state that fits bfloat16 again


def test_training_comes_to_where_float32_comes() -> None:
    """The same small rate over many steps: bfloat16 latents would stand still."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer, _ = attached(
            dtype, lambda m: torch.optim.AdamW(m.parameters(), lr=2e-4), dt.Uniform(bits=4), dt.STE()
        )
        train(model, optimizer, 0, 150)
        x = torch.randn(512, 32, generator=torch.Generator().manual_seed(99))
        with torch.no_grad():
            ends[dtype] = float((model.float()(x) - x.roll(1, 1)).square().mean())
        start, _, _ = attached(
            torch.float32, lambda m: torch.optim.SGD(m.parameters(), lr=0.0), dt.Uniform(bits=4), dt.STE()
        )
        with torch.no_grad():
            first = float((start(x) - x.roll(1, 1)).square().mean())
    assert ends[torch.float32] < 0.95 * first
    assert abs(ends[torch.bfloat16] - ends[torch.float32]) < 0.05 * (first - ends[torch.float32])


def test_after_a_step_that_raised_zero_grad_and_a_new_gradient_are_what_they_seem() -> None:
    for set_to_none in (True, False):
        model, optimizer, _ = attached(torch.bfloat16, lambda m: Falls(m.parameters(), lr=0.1), *LATENTS["ste"])
        assert isinstance(optimizer, Falls)
        model.weight.grad = torch.full((32, 32), 3.0, dtype=torch.bfloat16)
        optimizer.fall = True
        with pytest.raises(ArithmeticError):
            optimizer.step()
        optimizer.fall = False
        optimizer.zero_grad(set_to_none=set_to_none)
        model(torch.ones(1, 32, dtype=torch.bfloat16)).sum().backward()
        optimizer.state_dict()  # an event
        assert torch.equal(model.weight.grad, torch.ones(32, 32, dtype=torch.bfloat16))
        assert optimizer.param_groups[0]["params"][0] is model.weight


def test_an_optimizer_that_moves_its_own_list_is_refused() -> None:
    class Stubborn(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            self.mine = list(params)
            super().__init__(self.mine, {"lr": 0.1})

        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for p in self.mine:
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad)

    model, optimizer, _ = attached(torch.bfloat16, lambda m: Stubborn(m.parameters()), *LATENTS["ste"])
    with pytest.raises(RuntimeError, match=r"Stubborn does not move what its param_groups name.*float32 weights under"):
        train(model, optimizer, 0, 1)


def test_a_stage_after_a_latent_one_goes_on_in_half_precision() -> None:
    """The optimizer's state is float32 while there are latents, and fits the weights again afterwards."""
    torch.manual_seed(0)
    model = nn.Linear(32, 32).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stages = [
        dt.Stage(rules=[dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.STE())], share=0.5),
        dt.Stage(
            rules=[
                dt.Rule(
                    match="weight",
                    target=dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=dt.Uniform(bits=4)),
                    mechanism=dt.PSG(gain=8.0),
                )
            ],
            share=0.5,
        ),
    ]
    run = dt.attach(model, optimizer, dt.Recipe(stages=stages), total_steps=STEPS)
    train(model, optimizer, 0, 3)
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float32
    train(model, optimizer, 3, STEPS)
    assert run.stage == 1 and optimizer.state[model.weight]["exp_avg"].dtype == torch.bfloat16
    assert int((model.weight != 0).sum()) <= 512
