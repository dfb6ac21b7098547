"""Rounded activations: the quantizers against their papers, training, resuming, both lives, files, ONNX."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detent as dt
from detent.quantizers import Integers, Quantizer, Seen, from_row, row_of
from tests import reference

STEPS = 24
TRAINED: dict[str, Quantizer] = {
    "learned step": dt.LearnedStep(bits=3, rate=0.02),
    "learned clip": dt.LearnedClip(bits=3, rate=0.02),
    "running range": dt.RunningRange(bits=4, momentum=0.1),
    "reshaped": dt.Reshaped(bits=4, momentum=0.1),
    "per token": dt.PerToken(bits=4),
    "sign": dt.Sign(),
}
LEARNED_STEP: Any = dt.LearnedStep
STE: Any = dt.STE()
MECHANISMS: dict[str, dt.Mechanism] = {"STE": dt.STE(), "PSG": dt.PSG(), "mirror": dt.MirrorDescent()}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def recipe(quantizer: Quantizer, mechanism: dt.Mechanism | None = None, **fields: Any) -> dt.Recipe:
    rule = dt.Rule(match="@weights", target=dt.Uniform(bits=4), mechanism=mechanism or dt.STE())
    return dt.Recipe([rule], activations=[dt.Activation(quantizer=quantizer, **fields)])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def started(quantizer: Quantizer, **fields: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, dt.Run]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = dt.attach(model, optimizer, recipe(quantizer, **fields), total_steps=STEPS)
    return model, optimizer, run


def outputs(run: dt.Run) -> Tensor:
    run.model.eval()
    with torch.no_grad(), run.compressed():
        return run.model(batch(99)[0])


# --- the quantizers against their papers ----------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(0, 7), (-3, 4), (-8, 7)])
@pytest.mark.parametrize("kind", ["step", "clip"])
def test_gradients_are_those_of_the_papers(kind: str, ends: tuple[int, int]) -> None:
    low, high = ends
    if kind == "clip" and low:
        pytest.skip("PACT clips at zero")
    x = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul_(2).requires_grad_()
    grad = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    quantizer = dt.LearnedStep(bits=4) if kind == "step" else dt.LearnedClip(bits=3)
    log_scale = torch.tensor(0.4).log().requires_grad_()
    to = Integers(scale=log_scale.detach().exp(), low=low, high=high)
    s = float(to.scale)
    out = quantizer.view(x, to, log_scale)
    out.backward(grad)
    values, given = x.detach().numpy(), grad.numpy()
    if kind == "step":
        expected, dv, ds = reference.lsq(values, s, low, high)
        told = float((given * ds).sum()) * s  # of the logarithm
    else:
        expected, dv, da = reference.pact(values, s * high, 3)
        told = float((given * da).sum()) * s * high
    assert np.abs(out.detach().numpy() - expected).max() <= 1e-12
    assert np.array_equal(x.grad.numpy(), given * dv)  # type: ignore[union-attr]
    assert float(log_scale.grad) == pytest.approx(told, rel=1e-5)  # type: ignore[arg-type]


def test_a_learned_step_is_the_one_an_independent_loop_learns() -> None:
    """Both nets in float64 by hand: Adam on log s beside SGD."""
    quantizer = dt.LearnedStep(bits=3, rate=0.02)
    model, optimizer, run = started(quantizer, mechanism=dt.Penalty(strength=0.0))
    twin = net()
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, range(1))
    train(twin, other, range(1))
    places = run.activations.places
    logs = {n: p.log_scale.detach().double().clone() for n, p in places.items() if p.log_scale is not None}
    ends = {n: (p.to.low, p.to.high) for n, p in places.items() if p.to is not None}
    begun = dict(logs)
    moments = {n: [0.0, 0.0] for n in logs}
    for step in range(1, STEPS):
        leaves = {n: log.clone().requires_grad_() for n, log in logs.items()}

        def hook(name: str, module: nn.Module, args: Any, leaves: dict[str, Tensor] = leaves) -> Any:
            s, (low, high) = leaves[name].exp(), ends[name]
            v = args[0].double() / s
            inside = v.clamp(low, high)
            return ((inside + (inside.round() - inside).detach()) * s).float()

        handles = [twin.get_submodule(n).register_forward_pre_hook(partial(hook, n)) for n in logs]
        train(twin, other, range(step, step + 1))
        for handle in handles:
            handle.remove()
        for n, leaf in leaves.items():
            g, m = float(leaf.grad), moments[n]  # type: ignore[arg-type]
            m[0], m[1] = 0.9 * m[0] + 0.1 * g, 0.999 * m[1] + 0.001 * g * g
            logs[n] = logs[n] - 0.02 * (m[0] / (1 - 0.9**step)) / (m[1] / (1 - 0.999**step)) ** 0.5
        train(model, optimizer, range(step, step + 1))
    for name, place in places.items():
        assert place.log_scale is not None
        assert float(place.log_scale.detach()) == pytest.approx(float(logs[name]), abs=2e-4)
    moved = [abs(float(logs[name] - begun[name])) for name in logs]
    assert max(moved) > 0.05, "nothing moved, so nothing was compared"


def test_grids_hold_zero_and_follow_the_signs() -> None:
    for x, low in ((torch.rand(999), 0), (torch.randn(999), -8), (F.silu(4 * torch.randn(999)), -1)):
        seen = Seen()
        seen.add(x, sample=True)
        to = dt.LearnedStep(bits=4).start(seen)
        assert abs(to.low - low) <= 1 and to.high - to.low == 15
        q = dt.LearnedStep(bits=4).view(x, to, None)
        assert float((q - x).square().mean()) < 0.02 * float(x.square().mean())
        assert float(dt.LearnedStep(bits=4).view(torch.zeros(1), to, None)) == 0.0


def test_the_first_scale_has_the_least_error_of_those_tried() -> None:
    x = torch.randn(5000).abs()
    seen = Seen()
    seen.add(x, sample=True)
    quantizer = dt.LearnedStep(bits=3)
    best = quantizer.start(seen)

    def error(factor: float) -> float:
        to = Integers(scale=best.scale * factor, low=best.low, high=best.high)
        return float((quantizer.view(x, to, None) - x).square().sum())

    assert error(1.0) <= min(error(f) for f in (0.8, 0.9, 1.1, 1.25)) * 1.001


def test_the_sample_is_no_row_or_border_of_the_images() -> None:
    x = torch.zeros(64, 16, 32, 32)
    x[..., 1:] = torch.randn(64, 16, 32, 31, generator=torch.Generator().manual_seed(0)).abs()
    seen = Seen()
    seen.add(x, sample=True)
    share = float((seen.sample > 0).float().mean())
    assert share == pytest.approx(31 / 32, abs=0.01)
    whole = Seen()
    whole.add(x, sample=False)
    whole.parts.append(x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))][:200_000])
    quantizer = dt.LearnedStep(bits=4)
    assert float(quantizer.start(seen).scale) == pytest.approx(float(quantizer.start(whole).scale), rel=0.1)


def test_running_ranges_are_running_and_freeze() -> None:
    quantizer = dt.RunningRange(bits=4, momentum=0.5, freeze=0.5)
    model, optimizer, run = started(quantizer)
    train(model, optimizer, range(1))
    place = run.activations.places["0"]
    x = batch(1)[0]
    assert place.to is not None
    reach = max(float(x.max()) / place.to.high, -float(x.min()) / -place.to.low)
    expected = float(place.to.scale) + 0.5 * (reach - float(place.to.scale))
    train(model, optimizer, range(1, 2))
    assert float(place.to.scale) == pytest.approx(expected, rel=1e-6)
    train(model, optimizer, range(2, STEPS // 2 + 1))
    frozen = float(place.to.scale)
    train(model, optimizer, range(STEPS // 2 + 1, STEPS))
    assert float(place.to.scale) == frozen


def test_a_frozen_range_is_not_watched_and_one_that_is_thawed_by_an_earlier_state_is() -> None:
    quantizer = dt.RunningRange(bits=4, momentum=0.5, freeze=0.5)
    model, optimizer, run = started(quantizer)
    train(model, optimizer, range(6))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(6, 9))
    scale = str(run.activations.state())
    train(model, optimizer, range(9, STEPS - 1))
    model(batch(0)[0])
    assert all(not place.seen.batches for place in run.activations.places.values())
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    train(model, optimizer, range(6, 9))
    assert str(run.activations.state()) == scale


# --- training, lives --------------------------------------------------------------------------------------------------


def test_the_full_life_stays_in_floating_point_where_asked() -> None:
    """Weights after training are bitwise those of a training without any rounding of activations."""
    quantizer = dt.RunningRange(bits=3)
    model, optimizer, run = started(quantizer, mechanism=dt.PSG(), training=False)
    twin = net()
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    plain = dt.Recipe(recipe(quantizer, dt.PSG()).rules)
    dt.attach(twin, other, plain, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    train(twin, other, range(STEPS))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    x = batch(99)[0]
    model.eval()
    twin.eval()
    assert torch.equal(model(x), twin(x))
    assert not torch.equal(outputs(run), twin(x))


@pytest.mark.parametrize("kind", TRAINED)
def test_what_layers_get_lies_on_the_grid(kind: str) -> None:
    model, optimizer, run = started(TRAINED[kind])
    train(model, optimizer, range(STEPS))
    got: dict[str, Tensor] = {}
    for name in ("0", "3", "6"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: got.__setitem__(name, args[0].detach()))
    outputs(run)
    for name, place in run.activations.places.items():
        x = got[name]
        if place.to is not None:
            codes = (x / place.to.scale).round()
            assert torch.equal(codes * place.to.scale, x)
            assert place.to.low <= float(codes.min()) and float(codes.max()) <= place.to.high
        elif kind == "sign":
            assert set(x.unique().tolist()) <= {-1.0, 1.0}
        else:
            assert all(len(row.unique()) <= 15 for row in x.reshape(-1, x.shape[-1]))


def test_validation_does_not_move_anything() -> None:
    model, optimizer, run = started(dt.RunningRange(bits=4, momentum=0.5))
    train(model, optimizer, range(3))
    before = run.activations.state()
    with torch.no_grad():
        model(100 * batch(5)[0])
    with run.compressed():
        model(100 * batch(5)[0])
    train(model, optimizer, range(3, 3))
    assert str(run.activations.state()) == str(before)
    assert all(not place.seen.batches for place in run.activations.places.values())


def test_a_discarded_step_leaves_no_gradient_behind() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=3, rate=0.02))
    twin, other, second = started(dt.LearnedStep(bits=3, rate=0.02))
    train(model, optimizer, range(2))
    train(twin, other, range(2))
    x, y = batch(7)
    F.cross_entropy(model(x), y).backward()
    run.skip_step()
    second.skip_step()
    train(model, optimizer, range(2, 5))
    train(twin, other, range(2, 5))
    assert str(run.activations.state()) == str(second.activations.state())


@pytest.mark.parametrize("to_none", [True, False])
def test_a_backward_pass_without_a_step_moves_nothing(to_none: bool) -> None:
    """As of a generator through its discriminator, whose gradients are cleared: those of the scales are, too."""
    model, optimizer, run = started(dt.LearnedStep(bits=3, rate=0.02))
    twin, other, second = started(dt.LearnedStep(bits=3, rate=0.02))
    train(model, optimizer, range(2))
    train(twin, other, range(2))
    x, y = batch(7)
    model.eval()
    twin.eval()
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad(set_to_none=to_none)
    model.train()
    twin.train()
    train(model, optimizer, range(2, 5))
    train(twin, other, range(2, 5))
    assert str(run.activations.state()) == str(second.activations.state())


def test_gradients_of_several_passes_add_up() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=3, rate=0.02))
    train(model, optimizer, range(2))
    told = []
    for passes in (1, 2):
        optimizer.zero_grad()
        for _ in range(passes):
            x, y = batch(7)
            F.cross_entropy(model(x), y).backward()
        grads = [place.log_scale.grad for place in run.activations.places.values() if place.log_scale is not None]
        told.append(torch.stack([grad for grad in grads if grad is not None]))
    model.eval()
    torch.testing.assert_close(told[1], 2 * told[0], rtol=0.2, atol=1e-3)  # BatchNorm's batch is the same


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("order", ["model, attach, optimizer", "attach, model, optimizer", "run"])
@pytest.mark.parametrize("kind", TRAINED)
def test_resuming_is_exact(kind: str, order: str, mechanism: str, tmp_path: Path) -> None:
    model, optimizer, run = started(TRAINED[kind], mechanism=MECHANISMS[mechanism])
    train(model, optimizer, range(10))
    held = run.state_dict() if order == "run" else None
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": held}, tmp_path / "state.pt")
    train(model, optimizer, range(10, STEPS))
    state = torch.load(tmp_path / "state.pt")
    twin = net()
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    if order == "model, attach, optimizer":
        twin.load_state_dict(state["model"])
    second = dt.attach(twin, other, recipe(TRAINED[kind], MECHANISMS[mechanism]), total_steps=STEPS)
    if order != "model, attach, optimizer":
        twin.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    if order == "run":
        second.load_state_dict(state["run"])
    train(twin, other, range(10, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert str(run.activations.state()) == str(second.activations.state())
    assert torch.equal(outputs(run), outputs(second))


def test_a_state_of_other_activations_is_refused() -> None:
    model, optimizer, _ = started(dt.LearnedStep(bits=3))
    train(model, optimizer, range(2))
    twin = net()
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    dt.attach(twin, other, dt.Recipe(recipe(dt.LearnedStep(bits=3)).rules), total_steps=STEPS)
    with pytest.raises(ValueError, match="the rounding of what goes into '0' is in only one of them"):
        other.load_state_dict(optimizer.state_dict())


# --- after training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["detent", "safetensors"])
@pytest.mark.parametrize("life", ["both", "compressed"])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_loaded_file_computes_the_compressed_life(kind: str, life: Any, form: str, tmp_path: Path) -> None:
    model, optimizer, run = started(TRAINED[kind])
    train(model, optimizer, range(STEPS))
    expected = outputs(run)
    dt.save(run, tmp_path / f"net.{form}", life)
    twin = net().eval()
    if life == "both":
        dt.load(tmp_path / f"net.{form}", twin, "full")
        assert not any(module._forward_pre_hooks for module in twin.modules())
    told = dt.load(tmp_path / f"net.{form}", twin, "compressed")
    assert torch.equal(twin(batch(99)[0]), expected)
    assert [row["module"] for row in told.card["activations"]] == ["0", "3", "6"]
    dt.load(tmp_path / f"net.{form}", twin, "compressed")  # again: not rounded twice
    assert torch.equal(twin(batch(99)[0]), expected)


def test_a_plain_state_dict_says_what_it_cannot_hold(tmp_path: Path) -> None:
    model, optimizer, run = started(dt.PerToken())
    train(model, optimizer, range(STEPS))
    dt.save(run, tmp_path / "net.detent", "both")
    with pytest.warns(UserWarning, match="also rounds what goes into 3 modules"):
        dt.unpack(tmp_path / "net.detent", tmp_path / "net.safetensors", "compressed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dt.unpack(tmp_path / "net.detent", tmp_path / "full.safetensors", "full")


@pytest.mark.parametrize("with_model", [False, True])
def test_a_state_dict_alone_is_not_rounded_for(with_model: bool, tmp_path: Path) -> None:
    model = net() if with_model else None
    safetensors.torch.save_file(net().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="activations= needs a model that is run"):
        dt.compress_state_dict(tmp_path / "net.safetensors", tmp_path / "x.detent", recipe(dt.PerToken()), model=model)
    assert not (tmp_path / "x.detent").exists()


def test_a_loaded_file_finds_renamed_modules(tmp_path: Path) -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=4))
    train(model, optimizer, range(4))
    expected = outputs(run)
    dt.save(run, tmp_path / "net.detent", "compressed")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    twin = Wrapped().eval()
    dt.load(tmp_path / "net.detent", twin, "compressed")
    assert torch.equal(twin(batch(99)[0]), expected)


def test_finalize_keeps_the_rounding_and_detach_takes_it_away() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=3))
    train(model, optimizer, range(STEPS))
    expected = outputs(run)
    run.finalize()
    assert torch.equal(model(batch(99)[0]), expected)
    other_model, other, second = started(dt.LearnedStep(bits=3))
    train(other_model, other, range(STEPS))
    second.detach()
    assert not any(module._forward_pre_hooks for module in other_model.modules())


def test_compress_needs_inputs_and_takes_them_two_ways() -> None:
    model = net().eval()
    x = torch.cat([batch(i)[0] for i in range(8)])
    run = dt.compress(model, recipe(dt.LearnedStep(bits=8)))
    with pytest.raises(ValueError, match=r"what goes into '0' has not been seen yet.*run\.observe"), run.compressed():
        pass
    with torch.no_grad():
        full = model(x)
        run.observe([x])
        assert torch.equal(model(x), full), "the full life rounds nothing"
    with run.compressed(), torch.no_grad():
        rounded = model(x)
    calibrated = dt.compress(net().eval(), recipe(dt.LearnedStep(bits=8)), calibration=[x])
    with calibrated.compressed(), torch.no_grad():
        better = calibrated.model(x)
    assert 0 < float((better - full).norm()) < float((rounded - full).norm()) < 0.2 * float(full.norm())


def test_averaged_weights_round_with_the_same_grids() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=4), mechanism=dt.PSG())
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
    life = run.averaged(average)
    x = batch(99)[0]
    average.eval()
    with torch.no_grad(), life.compressed():
        got = average(x)
    twin = net().eval()
    twin.load_state_dict(average.module.state_dict())
    plain = dt.compress(twin, recipe(dt.LearnedStep(bits=4)))
    plain.activations.like(run.activations)
    with torch.no_grad(), plain.compressed():
        assert not torch.equal(got, model(x))
    assert len([h for m in average.modules() for h in m._forward_pre_hooks.values()]) == 3


@pytest.mark.parametrize("kind", ["learned step", "running range", "per token", "sign"])
def test_onnx_computes_what_training_saw(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnxruntime as ort

    from detent.export import to_onnx

    model, optimizer, run = started(TRAINED[kind])
    train(model, optimizer, range(STEPS))
    x = batch(99)[0]
    expected = outputs(run)
    to_onnx(run, tmp_path / "net.onnx", x)
    session = ort.InferenceSession(str(tmp_path / "net.onnx"))
    got = np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert np.abs(got - expected.numpy()).max() <= 1e-5 * float(expected.abs().max())
    dt.save(run, tmp_path / "net.detent", "compressed")
    twin = net().eval()
    dt.load(tmp_path / "net.detent", twin, "compressed")
    to_onnx(twin, tmp_path / "twin.onnx", x, codes=tmp_path / "net.detent")
    again = ort.InferenceSession(str(tmp_path / "twin.onnx"))
    assert np.array_equal(np.asarray(again.run(None, {again.get_inputs()[0].name: x.numpy()})[0]), got)


def test_integers_use_the_trained_grids() -> None:
    from detent.export import to_integer

    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = dt.attach(model, optimizer, recipe(dt.LearnedStep(bits=4)), total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    expected = outputs(run)
    integers = to_integer(run, [batch(i)[0] for i in range(4)])
    places = run.activations.places
    grids = {step.op: (step.scale, step.zero) for step in integers.steps}
    for op, name in (("input", "0"), ("max", "4")):
        to = places[name].to
        assert to is not None and grids[op] == (pytest.approx(float(to.scale)), -to.low)
    got = integers(batch(99)[0])
    assert float((got - expected).abs().max()) <= 0.02 * float(expected.abs().max())
    assert len([h for m in model.modules() for h in m._forward_pre_hooks.values()]) == 3, "the run keeps its hooks"


@pytest.mark.parametrize("export", ["onnx", "compressed-tensors"])
def test_exports_that_measure_ranges_refuse_trained_ones(export: str, tmp_path: Path) -> None:
    from detent.export import Activations, check_compressed_tensors, to_compressed_tensors, to_onnx

    if export == "onnx":
        model, optimizer, run = started(dt.LearnedStep(bits=4))
        train(model, optimizer, range(2))
        x = batch(0)[0]
        with pytest.raises(ValueError, match="rounds activations as it was trained to"):
            to_onnx(run, tmp_path / "x.onnx", x, activations=Activations(), calibration=[x])
        return
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    llama = transformers.LlamaForCausalLM(config)
    grid = dt.Rule(match="_proj", target=dt.Uniform(bits=4, granularity=dt.Group(size=16)))
    rounded = dt.Recipe([grid], activations=[dt.Activation(match="_proj$", quantizer=dt.PerToken())])
    with pytest.raises(ValueError, match="the recipe rounds activations"):
        to_compressed_tensors(dt.compress(llama, rounded), tmp_path)
    assert "rounds activations" in check_compressed_tensors(llama, rounded).refused[""]


# --- words ----------------------------------------------------------------------------------------------


def test_plan_and_yaml_say_it() -> None:
    given = dt.Recipe(
        [dt.Rule(match="@weights", target=dt.Uniform(bits=4), mechanism=dt.STE())],
        activations=[
            dt.Activation(match="@first", keep=True),
            dt.Activation(match="@last", quantizer=dt.RunningRange(bits=8), training=False),
            dt.Activation(quantizer=dt.LearnedStep(bits=4)),
        ],
    )
    assert dt.Recipe.from_yaml(given.to_yaml()) == given
    plan = given.resolve(net())
    assert [each.name for each in plan.inputs] == ["3", "6"]
    said = str(plan)
    assert "inputs of 6: RunningRange(bits=8), outside training" in said
    assert "inputs of 3: LearnedStep(bits=4)" in said


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: dt.Activation(), "give either quantizer= or keep=True"),
        (lambda: dt.Activation(quantizer=LEARNED_STEP), r"LearnedStep\(\.\.\.\), not the class"),
        (lambda: dt.Activation(match="@layer", keep=True), "did you mean '@layers'"),
        (lambda: dt.Activation(match="(", keep=True), "not a regular expression"),
        (lambda: dt.Activation(quantizer=dt.LearnedStep(bits=4), training=False), "learns from rounding in training"),
        (lambda: dt.LearnedStep(bits=1), "from 2 to 16"),
        (lambda: dt.LearnedStep(bits=4, rate=1.0), r"in \(0, 1\)"),
        (lambda: dt.RunningRange(bits=4, momentum=0.0), r"in \(0, 1\]"),
        (lambda: dt.Reshaped(bits=4, k=0.0), "> 0"),
        (lambda: dt.Sign(bits=2), "is 1 bit"),
        (lambda: dt.Recipe([dt.Rule(match="x", keep=True)], activations=[STE]), "must be an Activation, not STE"),
        (lambda: recipe(dt.PerToken(), match="convs").resolve(net()), "matches no module of this model"),
        (
            lambda: recipe(dt.PerToken(), match="@first").resolve(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))),
            "of this model: '0.weight' belongs to no linear layer or convolution",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()


def test_two_runs_do_not_round_the_same_inputs() -> None:
    model, _, run = started(dt.LearnedStep(bits=4))
    with pytest.raises(ValueError, match="rounded by another run in training"):
        dt.compress(model, recipe(dt.LearnedStep(bits=4)))
    run.detach()
    dt.compress(model, recipe(dt.LearnedStep(bits=4)))


def test_modules_that_are_never_called_are_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0][:, 0])

    model = Attention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = dt.attach(model, optimizer, recipe(dt.LearnedStep(bits=4)), total_steps=4)
    model(torch.randn(4, 5, 8)).sum().backward()
    with pytest.warns(UserWarning, match=r"inputs of 'attention\.out_proj' are not rounded"):
        optimizer.step()
    with run.compressed():
        model(torch.randn(4, 5, 8))


def test_rows_of_files_are_checked() -> None:
    good = row_of("fc", dt.LearnedStep(bits=4), Integers(scale=torch.tensor(0.5), low=-1, high=14), "")
    assert from_row(good)[2] == Integers(scale=torch.tensor(0.5), low=-1, high=14)
    changes: list[dict[str, Any]] = [
        {"scale": 0.0}, {"scale": float("nan")}, {"scale": 1e-60}, {"scale": 1}, {"low": 1}, {"high": 15}, {"high": -1},
        {"bits": 0}, {"bits": 17}, {"bits": True}, {"form": "table"}, {"module": 3}, {"more": 1}, {"low": 0.0},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(ValueError, match="no rounding of activations"):
            from_row({**good, **change})
    for key in good:
        with pytest.raises(ValueError, match="no rounding of activations"):
            from_row({k: v for k, v in good.items() if k != key})


def test_a_copy_of_the_model_shares_the_numbers() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=3))
    train(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    hooks = [hook for module in twin.modules() for hook in module._forward_pre_hooks.values()]
    assert {id(hook) for hook in hooks} == {id(place) for place in run.activations.places.values()}


# --- situations of real loops -----------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


def test_an_average_in_the_models_own_place_leaves_training_its_rounding() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=3, rate=0.02), mechanism=dt.PSG())
    twin, other, _ = started(dt.LearnedStep(bits=3, rate=0.02), mechanism=dt.PSG())
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    expected = outputs(run)
    life = run.averaged()
    assert torch.equal(outputs(life), expected)
    with pytest.raises(ValueError, match="these ranges belong to the training"):
        life.observe([batch(0)[0]])
    life.detach()
    model.train()
    train(model, optimizer, range(3, 8))
    train(twin, other, range(3, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_a_run_that_is_over_shows_the_same_compressed_life() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=2, rate=0.02), mechanism=dt.PSG())
    train(model, optimizer, range(STEPS))
    expected = outputs(run)
    copied = copy.deepcopy(model)
    run.detach()
    assert not hooks_of(model)
    assert torch.equal(outputs(run), expected) and not hooks_of(model)
    second = torch.optim.SGD(copied.parameters(), lr=0.05)
    dt.attach(copied, second, recipe(dt.LearnedStep(bits=4)), total_steps=STEPS)  # what the copy took along is nobody's
    assert len(hooks_of(copied)) == 3


@pytest.mark.parametrize("end", ["in training", "finalize", "load"])
def test_a_model_can_be_pickled(end: str, tmp_path: Path) -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=3))
    train(model, optimizer, range(STEPS))
    if end == "finalize":
        run.finalize()
    elif end == "load":
        dt.save(run, tmp_path / "net.detent", "compressed")
        model = net()
        dt.load(tmp_path / "net.detent", model, "compressed")
    torch.save(model.eval(), tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(twin(batch(99)[0]), model(batch(99)[0]))
    other = torch.optim.SGD(twin.parameters(), lr=0.05)
    if end == "in training":
        dt.attach(twin, other, recipe(dt.LearnedStep(bits=4)), total_steps=STEPS)
        assert len(hooks_of(twin)) == 3
    else:
        with pytest.raises(ValueError, match="rounded already"):
            dt.attach(twin, other, recipe(dt.LearnedStep(bits=4)), total_steps=STEPS)


class Branch(nn.Module):
    """A residual branch that begins with zeros, as many do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.zero, self.b, self.head = (nn.Linear(8, 8) for _ in range(4))
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.head(h + self.b(self.zero(h)))


def test_a_branch_that_begins_with_zeros_comes_alive() -> None:
    model = Branch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = dt.Rule(match="^(a|b|head).weight", target=dt.Uniform(bits=4), mechanism=dt.STE())
    given = dt.Recipe([rule], activations=[dt.Activation(quantizer=dt.LearnedStep(bits=4))])
    run = dt.attach(model, optimizer, given, total_steps=20)
    place = run.activations.places["b"]
    inputs = torch.randn(20, 16, 8, generator=torch.Generator().manual_seed(1))
    for step in range(20):
        optimizer.zero_grad()
        x = inputs[step]
        (model(x) - x).square().mean().backward()
        optimizer.step()
        if step == 0:
            assert place.to is None
            with run.compressed(), torch.no_grad():
                model(x)  # zeros stay zeros
    assert place.to is not None and float(place.to.scale) > 1e-6
    got: list[Tensor] = []
    model.b.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    with run.compressed(), torch.no_grad():
        model(inputs[0])
    assert float(got[0].abs().max()) > 0


def test_modules_that_run_without_gradients_are_named_and_can_be_shown_inputs() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rule = dt.Rule(match="^6.weight", target=dt.Uniform(bits=4), mechanism=dt.STE())
    given = dt.Recipe([rule], activations=[dt.Activation(quantizer=dt.LearnedStep(bits=4, rate=0.02))])
    run = dt.attach(model, optimizer, given, total_steps=STEPS)

    def step(i: int) -> None:
        x, y = batch(i)
        with torch.no_grad():
            features = model[:6](x)
        F.cross_entropy(model[6:](features), y).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"inputs of '0', '3' are not rounded: .*without gradients"):
        step(0)
    step(1)
    learned = run.activations.places["6"].to
    with pytest.raises(ValueError, match="what goes into '0' has not been seen yet"), run.compressed():
        pass
    run.observe([batch(0)[0]])
    assert run.activations.places["6"].to is learned, "what was learned stays"
    with run.compressed():
        assert run.activations.is_ready


@pytest.mark.parametrize("rates", ["first stands still", "none"])
def test_scales_learn_whatever_the_groups_say_of_rates(rates: str) -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = 0.05
            super().step(closure)
            for group in self.param_groups:
                group["lr"] = None

    model = net()
    parts = [{"params": list(model[0].parameters()), "lr": 0.0}, {"params": list(model[1:].parameters())}]
    optimizer = torch.optim.SGD(parts, lr=0.05) if rates != "none" else Own(model.parameters(), lr=0.05)
    for group in optimizer.param_groups if rates == "none" else ():
        group["lr"] = None
    run = dt.attach(model, optimizer, recipe(dt.LearnedStep(bits=3, rate=0.02), dt.PSG()), total_steps=STEPS)
    train(model, optimizer, range(1))
    place = run.activations.places["3"]
    assert place.to is not None
    before = float(place.to.scale)
    train(model, optimizer, range(1, 6))
    assert abs(float(place.to.scale) / before - 1) > 1e-3


def test_weights_taken_over_from_elsewhere_get_grids_of_their_own() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=3))
    train(model, optimizer, range(3))
    model.load_state_dict(net().state_dict())
    run.rebind(adopt=True)
    with pytest.raises(ValueError, match="has not been seen yet"), run.compressed():
        pass
    train(model, optimizer, range(3, 4))
    fresh, other, second = started(dt.LearnedStep(bits=3))
    train(fresh, other, range(3, 4))
    assert str(run.activations.places["0"].to) == str(second.activations.places["0"].to)


def test_a_state_that_is_damaged_is_refused_before_anything_changes() -> None:
    model, optimizer, run = started(dt.LearnedStep(bits=3))
    train(model, optimizer, range(2))
    state = run.state_dict()
    for key, wrong in {"scale": 3, "memory": {}}.items():
        broken = copy.deepcopy(state)
        broken["activations"]["places"]["3"][key] = wrong
        with pytest.raises(ValueError, match=r"into '3' is not what state_dict\(\) gave"):
            run.load_state_dict(broken)
