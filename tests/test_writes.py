"""Writes by others: found whatever way they were made, and none where everything was put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import detent as dt
from detent.writes import sealed

GRID = dt.Uniform(bits=4)


def attached(mechanism: dt.Mechanism, size: int = 8, target: dt.Target = GRID) -> tuple[nn.Linear, Any, dt.Run]:
    torch.manual_seed(0)
    model = nn.Linear(size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = dt.Rule(match="weight", target=target, mechanism=mechanism)
    return model, optimizer, dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=12)


def step(model: nn.Linear, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, model.in_features)).square().mean().backward()
    optimizer.step()


def by_data(w: Any, value: Tensor) -> None:
    w.data = value.clone()


def in_data(w: Any, value: Tensor) -> None:
    w.data.copy_(value)


def counted(w: Any, value: Tensor) -> None:
    with torch.no_grad():
        w.copy_(value)


WRITES = {"a new .data": by_data, "into .data": in_data, "counted": counted}
Write = Callable[[Any, Tensor], None]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_after_compress_is_found_wherever_the_weights_are_asked_for(write: Write, tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=GRID)]))
    old = model.weight.detach().clone()
    write(model.weight, old + 1.0)
    asked = (run.measure, run.finalize, run.encoded, lambda: dt.save(run, tmp_path / "m.detent"))
    for ask in (*asked, lambda: run.compressed().__enter__()):
        with pytest.raises(RuntimeError, match=r"'weight' was written by someone else since this run was made"):
            ask()
    assert not list(tmp_path.iterdir())
    run.rebind(adopt=True)
    fresh = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=GRID)]))
    assert run.measure()[0]["error"] == fresh.measure()[0]["error"]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize("name", ["psg", "ste", "admm", "hard", "mirror", "clip"])
def test_other_weights_between_steps_are_found_and_those_put_back_are_not(name: str, size: int, write: Write) -> None:
    """An average that is looked at and taken out again; where it stays, whoever asks for the weights is told."""
    ends = []
    for look in (False, True):
        model, optimizer, run = attached(cases.MECHANISMS[name], size)
        step(model, optimizer)
        if look:
            own = model.weight.detach().clone()
            write(model.weight, own * 0.9)
            with pytest.raises(RuntimeError, match="'weight' was written by someone else") as said:
                run.measure()
            first = str(said.value).index("put")
            assert first < str(said.value).index("rebind(adopt=True)")
            assert ("latents" in str(said.value)) == ("latent" in run.state_dict()["weights"]["weight"]["state"])
            write(model.weight, own)
            run.measure()
            write(model.weight, own * 0.9)
            write(model.weight, own)
        torch.manual_seed(1)
        step(model, optimizer)
        with run.compressed():
            ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)


def test_a_counted_write_of_one_weight_is_found_in_the_next_step() -> None:
    model, optimizer, run = attached(
        dt.PSG(gain=8.0), 50
    )  # 2,500 weights: all of them are remembered from step to step
    step(model, optimizer)
    with torch.no_grad():
        model.weight[31, 7] += 1e-6
    with pytest.raises(RuntimeError, match="'weight' was written by someone else"):
        step(model, optimizer)
    assert run.clock == 1


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_inside_a_compressed_life_is_said_on_leaving(write: Write) -> None:
    model, optimizer, run = attached(dt.PSG(gain=8.0))
    own = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"'weight' was written inside run.compressed\(\)"), run.compressed():
        write(model.weight, own)
    assert torch.equal(model.weight, own)
    with run.compressed():
        shown = model.weight.detach().clone()
        write(model.weight, own)
        write(model.weight, shown)
    assert torch.equal(model.weight, own)
    step(model, optimizer)


def test_a_model_whose_names_are_gone_is_another_model() -> None:
    base: Any = nn.ModuleDict({"wrapped": nn.ModuleDict({"base_layer": nn.Linear(8, 8)})})
    run = dt.compress(base, dt.Recipe([dt.Rule(match="weight", target=GRID)]))
    base["wrapped"] = base["wrapped"]["base_layer"]  # what merging and unloading adapters does
    words = r"'wrapped.base_layer.weight' is claimed .* needs a run of its own \(detent.attach, or detent.compress\)"
    for ask, kind in ((run.measure, RuntimeError), (lambda: run.rebind(adopt=True), ValueError)):
        with pytest.raises(kind, match=words) as said:
            ask()
        assert "adopt" not in str(said.value)


def test_a_seal_tells_weights_apart_by_any_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        w = torch.randn(6, 700).to(dtype)
        for whole in (True, False):
            seal = sealed(w, whole=whole)
            assert seal is not None and seal.holds(w) and seal.holds(w.clone())
        seal = sealed(w, whole=True)
        assert seal is not None
        one = w.clone()
        one[3, 411] = -one[3, 411]
        assert not seal.holds(one)
        assert not seal.holds(-w) and not seal.holds(w.flip(0)) and not seal.holds(w.flip(1)) and not seal.holds(w[:5])
    odd = torch.tensor([torch.nan, 0.0])
    seal = sealed(odd, whole=True)
    assert seal is not None and seal.holds(odd) and not seal.holds(torch.tensor([torch.nan, -0.0]))


def test_a_sample_sees_every_row_and_column_block_of_a_large_matrix() -> None:
    """An update of low rank, a scaled row block or an average moves what a step remembers."""
    w = torch.randn(1024, 1024)
    seal = sealed(w, whole=False)
    assert seal is not None and seal.bits.numel() == 4096 and seal.holds(w.clone())
    for changed in (w + 1e-3 * torch.randn(1024, 1) @ torch.randn(1, 1024), w.roll(1, 0), w * 1.0001):
        assert not seal.holds(changed)
    for axis, block in ((0, 16), (1, 64)):
        for at in range(0, 1024, block):
            part = w.clone()
            part.narrow(axis, at, block).mul_(2.0)
            assert not seal.holds(part), (axis, at)


def test_offloaded_weights_are_named_with_what_to_do() -> None:
    accelerate = pytest.importorskip("accelerate")
    for make in (dt.compress, lambda m, r: dt.attach(m, torch.optim.SGD(m.parameters(), lr=0.1), r, total_steps=4)):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        recipe = dt.Recipe([dt.Rule(match="weight", target=GRID, mechanism=dt.PSG(gain=8.0))])
        with pytest.raises(ValueError, match=r"'0.weight' is offloaded by accelerate.*remove_hook_from_submodules"):
            make(model, recipe)
        accelerate.hooks.remove_hook_from_submodules(model)
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        make(model, recipe)


def test_an_empty_model_is_refused_where_its_weights_are_wanted() -> None:
    with torch.device("meta"):
        model = nn.Linear(8, 8)
    recipe = dt.Recipe([dt.Rule(match="weight", target=GRID, mechanism=dt.STE())])
    with pytest.raises(ValueError, match=r"'weight' is on the meta device.*to_empty"):
        dt.compress(model, recipe)
    run = dt.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe, total_steps=4)
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        run.measure()


LATENTS = {
    "ste": dt.STE(),
    "relaxed": dt.BinaryRelax(),
    "mirror": dt.MirrorDescent(),
    "codebook": dt.CodebookLearning(),
}


@pytest.mark.parametrize("name", LATENTS)
@pytest.mark.parametrize("size", [8, 200])
def test_a_clip_through_data_that_the_step_would_undo_is_refused(name: str, size: int) -> None:
    """As the critic of a WGAN clips: the step puts the latent, which the clip did not reach, in the weight's place."""
    mechanism = LATENTS[name]
    target = cases.TARGETS["vectors"] if name == "codebook" else dt.Uniform(bits=2)
    model, optimizer, run = attached(mechanism, size, target)
    step(model, optimizer)
    step(model, optimizer)
    own = model.weight.detach().clone()
    model.weight.data.clamp_(-1e-3, 1e-3)
    with pytest.raises(RuntimeError, match="'weight' was written by someone else since attach or the last step"):
        step(model, optimizer)
    assert run.clock == 2
    model.weight.data.copy_(own)  # what is put back as it was is no write
    step(model, optimizer)
    assert run.clock == 3


HOLDING = {
    "PartialFreeze": dt.Rule(match="weight", target=GRID, mechanism=dt.PartialFreeze(rounds=(0.5, 1.0), every=9)),
    "ADMM freeze": dt.Rule(
        match="weight", target=GRID, mechanism=dt.ADMM(rho=0.1, every=1, until=1, rounds=(0.5, 1.0))
    ),
    "ADMM mask": dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.ADMM(rho=0.1, every=1, until=1)),
    "Masked": dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.Masked()),
}


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("size", [8, 200])
def test_a_write_through_data_to_weights_that_are_held_is_refused_and_one_to_the_others_counts(
    name: str, size: int
) -> None:
    """What the step would put back in silence is said; what training goes on from is not."""
    torch.manual_seed(0)
    model = nn.Linear(size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = dt.attach(model, optimizer, dt.Recipe([HOLDING[name]]), total_steps=12)
    step(model, optimizer)
    step(model, optimizer)
    saved = run.state_dict()["weights"]["weight"]
    held = saved["state"]["frozen"].bool() if saved["held"].get("frozen") else ~saved["state"]["mask"].bool()
    assert held.any() and not held.all()
    own = model.weight.detach().clone()
    model.weight.data[held] += 0.25
    with pytest.raises(RuntimeError, match="'weight' was written by someone else since attach or the last step"):
        step(model, optimizer)
    model.weight.data.copy_(own)
    model.weight.data[~held] += 0.25
    optimizer.zero_grad()
    optimizer.step()
    assert run.clock == 3 and torch.equal(model.weight, torch.where(held, own, own + 0.25))


@pytest.mark.parametrize("fixed", [True, False])
def test_a_write_through_data_to_what_an_earlier_stage_holds_is_refused(fixed: bool) -> None:
    """Weights that a stage has put on levels, and the zeros alone of one that pruned."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first = dt.Rule(match="0.weight", target=GRID if fixed else dt.TopK(keep=0.5), mechanism=dt.HardProjection())
    second = dt.Rule(match="1.weight", target=GRID, mechanism=dt.PSG())
    recipe = dt.Recipe(stages=[dt.Stage(rules=[first], share=0.5), dt.Stage(rules=[second], share=0.5)])
    run = dt.attach(model, optimizer, recipe, total_steps=6)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()

    for _ in range(4):
        step()
    assert run.stage == 1
    own = model[0].weight.detach().clone()
    free = (own != 0) & (not fixed)
    model[0].weight.data[~free] += 0.25
    with pytest.raises(RuntimeError, match="'0.weight' was written by someone else since attach or the last step"):
        step()
    model[0].weight.data.copy_(own)
    model[0].weight.data[free] += 0.25
    step()
    assert run.clock == 5 and torch.equal(model[0].weight[~free], own[~free])


@pytest.mark.parametrize("name", ["psg", "ste"])
def test_a_clip_through_data_counts_where_no_latent_stands_in_the_weights_place(name: str) -> None:
    """Under PSG the clipped weights are what the step moves; so they are under STE before it begins."""
    ends = []
    mechanism = dt.STE(start=8) if name == "ste" else cases.MECHANISMS[name]
    for clips in (False, True):
        model, optimizer, run = attached(mechanism, target=dt.Uniform(bits=4))
        step(model, optimizer)
        optimizer.zero_grad()
        if clips:
            model.weight.data.clamp_(-0.05, 0.05)
        optimizer.step()  # without a gradient the weights stay
        ends.append(model.weight.detach().clone())
        assert run.clock == 2
    assert torch.equal(ends[1], ends[0].clamp(-0.05, 0.05)) and not torch.equal(*ends)


def test_another_order_in_memory_is_no_write() -> None:
    w = torch.randn(64, 32, 3, 3)
    for given in (w, w.to(memory_format=torch.channels_last)):
        for whole in (True, False):
            seal = sealed(given, whole=whole)
            assert seal is not None
            assert seal.holds(w) and seal.holds(w.to(memory_format=torch.channels_last))
            assert not seal.holds(-w)
