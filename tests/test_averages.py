"""Averages of weights: their compressed life is that of the average, and latents are averaged, never what was seen."""

from __future__ import annotations

import pytest
import torch
from cases import LONG_PAIRS, MECHANISMS, TARGETS
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import detent as dt

STEPS = 10
NAMES = ("psg", "admm", "penalty", "proximal", "ste", "mirror", "binary-relax", "parq", "mirror-primal", "codebook")
PAIRS = {mechanism: target for target, mechanism in reversed(LONG_PAIRS) if mechanism in NAMES}


def start(name: str) -> tuple[nn.Module, torch.optim.Optimizer, dt.Run]:
    torch.manual_seed(0)
    target = dt.VectorCodebook(block=2, size=6) if name == "codebook" else TARGETS[PAIRS[name]]
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    rule = dt.Rule(match="weight$", target=target, mechanism=MECHANISMS[name])
    return model, optimizer, dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=STEPS)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(index))
    optimizer.zero_grad()
    (model(x) - x[:, :4]).square().mean().backward()
    optimizer.step()


def trained(run: dt.Run) -> dict[str, Tensor]:
    """What training moves, by name: the latent, else the weight."""
    weights, state = dict(run.model.named_parameters()), run.state_dict()["weights"]
    kept = {name: entry["state"]["latent"] for name, entry in state.items() if entry["held"].get("latent")}
    return {name: kept.get(name, weights[name]).detach().clone() for name in state}


@pytest.mark.parametrize("name", NAMES)
def test_the_compressed_life_is_that_of_the_average(name: str) -> None:
    """The mean of what training moved, by hand, projected onto the numbers that the average's run says."""
    model, optimizer, run = start(name)
    average, moved = AveragedModel(model), []
    for index in range(STEPS):
        step(model, optimizer, index)
        if index >= 5:
            with run.latents():
                average.update_parameters(model)
            moved.append(trained(run))
    seen = {key: p.detach().clone() for key, p in model.named_parameters()}
    averaged = run.averaged(average)
    for key, encoded in averaged.encoded().items():
        mean = torch.stack([each[key] for each in moved]).mean(0)
        weight = dict(average.module.named_parameters())[key]
        torch.testing.assert_close(weight.detach(), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(
            encoded.decode(),
            encoded.target.project(weight.detach(), encoded.target.restored(weight.detach(), encoded.form)),
        )
    codes = {key: encoded.decode() for key, encoded in averaged.encoded().items()}
    with averaged.compressed():
        assert all(torch.equal(dict(average.module.named_parameters())[key], code) for key, code in codes.items())
    assert all(torch.equal(p, seen[key]) for key, p in model.named_parameters()), "the training goes on as it was"
    step(model, optimizer, STEPS)


@pytest.mark.parametrize("name", ["ste", "mirror", "parq", "binary-relax"])
def test_an_average_of_what_was_seen_is_refused(name: str) -> None:
    model, optimizer, run = start(name)
    average = AveragedModel(model)
    for index in range(3):
        step(model, optimizer, index)
        average.update_parameters(model)
    with pytest.raises(RuntimeError, match=r"has a latent.*update the average inside `with run.latents\(\):`"):
        run.averaged(average)


def test_final_numbers_are_kept_and_others_fitted_to_the_average() -> None:
    """PSG's grid is final from the start of clipping; ADMM fits the compressed life to the weights as they are."""
    for name, final in (("psg", True), ("admm", False)):
        model, optimizer, run = start(name)
        average = AveragedModel(model)
        for index in range(4):
            step(model, optimizer, index)
            average.update_parameters(model)
        for mine, theirs in zip(run.encoded().values(), run.averaged(average).encoded().values(), strict=True):
            assert torch.equal(mine.form.named["scale"], theirs.form.named["scale"]) == final, name


def test_another_model_is_refused() -> None:
    _, _, run = start("psg")
    with pytest.raises(ValueError, match="no parameter of the model any more"):
        run.averaged(nn.Linear(6, 8))


def test_an_average_that_is_put_into_the_model_and_taken_out_again() -> None:
    """As diffusers' `copy_to` and `restore`: through `.data`, around a look."""
    ends = []
    for looks in (False, True):
        model, optimizer, run = start("psg")
        average = AveragedModel(model)
        for index in range(6):
            step(model, optimizer, index)
            average.update_parameters(model)
            if looks:
                kept = [p.data.clone() for p in model.parameters()]
                for p, mean in zip(model.parameters(), average.module.parameters(), strict=True):
                    p.data.copy_(mean.data)
                codes = run.averaged().encoded()
                assert all(
                    torch.equal(c.decode(), o.decode())
                    for c, o in zip(codes.values(), run.averaged(average).encoded().values(), strict=True)
                )
                for p, value in zip(model.parameters(), kept, strict=True):
                    p.data.copy_(value)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_latents_are_shown_and_put_back() -> None:
    model, optimizer, run = start("ste")
    step(model, optimizer, 0)
    seen = [p.detach().clone() for p in model.parameters()]
    with run.latents():
        for key, value in trained_inside(run).items():
            assert torch.equal(dict(model.named_parameters())[key], value)
        with pytest.raises(RuntimeError, match="optimizer.step"):
            step(model, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), seen, strict=True))
    with pytest.raises(RuntimeError, match=r"written inside run.latents\(\)"), run.latents(), torch.no_grad():
        model.get_parameter("0.weight").zero_()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), seen, strict=True))


def trained_inside(run: dt.Run) -> dict[str, Tensor]:
    return {entry.name: entry.state["latent"] for entry in run._entries}
