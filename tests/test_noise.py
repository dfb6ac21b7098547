"""Quant-Noise: a share of the blocks is seen projected (arXiv 2004.07320)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import detent as dt

STEPS = 12


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 3, 6, 6, generator=generator), torch.randint(4, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def trained(mechanism: dt.Mechanism | None, steps: int = STEPS, total: int | None = STEPS, **fields: Any) -> Any:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = None
    if mechanism is not None:
        target = fields.get("target", dt.Uniform(bits=3))
        recipe = dt.Recipe([dt.Rule(match="@weights", target=target, mechanism=mechanism)])
        run = dt.attach(model, optimizer, recipe, total_steps=total)
    train(model, optimizer, range(steps))
    return model, optimizer, run


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_no_noise_is_the_base_optimizer_to_the_bit() -> None:
    assert same(trained(dt.STE(noise=0.0))[0], trained(None)[0])


def test_all_noise_is_straight_through_to_the_bit() -> None:
    assert same(trained(dt.STE(noise=1.0))[0], trained(dt.STE())[0])


@pytest.mark.parametrize("block", [1, 8, "kernel"])
def test_the_share_of_noised_blocks_and_what_they_are(block: Any) -> None:
    share = 0.3
    model, _, run = trained(dt.STE(noise=share, block=block), steps=STEPS - 1)
    seen = {name: p.detach().clone() for name, p in model.named_parameters()}
    with run.latents():
        latent = {name: p.detach().clone() for name, p in model.named_parameters()}
    with run.compressed():
        places = {name: p.detach().clone() for name, p in model.named_parameters()}
    noised = blocks = 0
    for name in ("0.weight", "3.weight", "5.weight"):
        is_place, is_latent = seen[name] == places[name], seen[name] == latent[name]
        assert bool((is_place | is_latent).all())
        size = 9 if block == "kernel" and name == "0.weight" else 1 if block == "kernel" else block
        rows = is_latent.flatten(1)
        for at in range(0, rows.shape[1], size):
            part = rows[:, at : at + size]
            projected = ~part.all(1)  # a block whose latents all lie on places cannot be told, which is rare
            assert bool(is_place.flatten(1)[:, at : at + size][projected].all())
            noised, blocks = noised + int(projected.sum()), blocks + len(part)
    spread = 3 * (share * (1 - share) / blocks) ** 0.5
    assert abs(noised / blocks - share) < spread + 0.01


def test_noise_is_new_in_every_step_and_the_end_is_the_latent() -> None:
    masks = []
    for steps in (4, 5):
        model, _, run = trained(dt.STE(noise=0.5), steps=steps)
        with run.latents():
            latent = model[0].weight.detach().clone()
        masks.append(model[0].weight.detach() == latent)
    assert not torch.equal(*masks)
    model, _, run = trained(dt.STE(noise=0.5))
    with run.latents():
        latent = model[0].weight.detach().clone()
    assert torch.equal(model[0].weight.detach(), latent)


@pytest.mark.parametrize("target", [dt.Uniform(bits=3), dt.TopK(keep=0.3)])
def test_resuming_draws_the_same_noise(target: dt.Target) -> None:
    mechanism = dt.STE(noise=dt.Linear(first=0.1, last=0.9), block=4)
    model, optimizer, _ = trained(mechanism, steps=5, target=target)
    held = copy.deepcopy((model.state_dict(), optimizer.state_dict()))  # an optimizer shares what it loads
    twin, other, _ = trained(mechanism, steps=0, target=target)
    twin.load_state_dict(held[0])
    other.load_state_dict(held[1])
    train(model, optimizer, range(5, STEPS))
    train(twin, other, range(5, STEPS))
    assert same(model, twin)


@pytest.mark.parametrize(
    ("fields", "why"), [({"noise": 1.5}, r"\[0, 1\]"), ({"block": 0}, "kernel"), ({"block": "row"}, "kernel")]
)
def test_mistakes_are_named(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        dt.STE(**fields)
