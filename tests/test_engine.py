"""Promises of the engine: state that resumes bitwise, weights nobody else may write unseen, and two lives."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent as dt
from detent.pack import read_header

STEPS = 12


def net() -> Any:  # an nn.Sequential, whose members no type checker knows
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def normed() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def train(model: nn.Module, optimizers: torch.optim.Optimizer | list[Any], steps: Iterable[int]) -> None:
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    for step in steps:
        inputs, wanted = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(inputs) - wanted).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def recipe(mechanism: dt.Mechanism | None = None, match: str = "weight", **options: Any) -> dt.Recipe:
    target = options.pop("target", dt.Uniform(bits=3, range="minmax"))
    return dt.Recipe([dt.Rule(match=match, target=target, mechanism=mechanism or dt.PSG(gain=8.0), **options)])


def test_a_run_says_in_a_line_how_far_it_is() -> None:
    model = net()
    two = recipe().rules
    staged = dt.Recipe(stages=[dt.Stage(rules=two, share=0.5), dt.Stage(rules=two, share=0.5)])
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, staged, total_steps=4)
    weights = 6 * 8 + 8 * 5 + 5 * 3
    assert repr(run) == f"<Run: 3 parameters of Sequential on a target, {weights} weights, step 0 of 4, stage 1 of 2>"
    train(model, optimizer, range(3))
    assert repr(run).endswith("step 3 of 4, stage 2 of 2>")
    run.detach()
    assert repr(run).endswith(", detached>")
    assert "step" not in repr(dt.compress(net(), recipe()))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What a training script does: torch.save, and the safe load that is torch's default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------------------- resume

EMA = dt.Uniform(bits=3, range="ema")
PRUNE = dt.TopK(keep=0.3, scope="model")
RESUMES: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], dt.Recipe]] = {
    "psg-gradient": (sgd, recipe(dt.PSG(gain=8.0, clip_start=3))),
    "psg-update": (adamw, recipe(dt.PSG(gain=8.0, clip_start=3))),
    "psg-auto": (sgd, recipe(dt.PSG(start=2))),
    "psg-auto-update": (adamw, recipe(dt.PSG(start=2))),
    "psg-refit": (sgd, recipe(dt.PSG(gain=8.0), fit_every=4, fit_until=1.0)),
    "psg-ema": (sgd, recipe(dt.PSG.paper(), target=EMA, fit_every=1, fit_until=1.0)),
    "psg-mse": (sgd, recipe(dt.PSG(gain=8.0), target=dt.Uniform(bits=3), fit_every=5)),
    "psg-prune": (sgd, recipe(dt.PSG(gain=8.0, toward=dt.Zero()), target=PRUNE, fit_every=3)),
    "ste": (sgd, recipe(dt.STE())),
    "ste-late": (adamw, recipe(dt.STE(start=6))),
    "projection-masks": (sgd, recipe(dt.HardProjection(every=3), target=PRUNE)),
    "projection-late": (sgd, recipe(dt.HardProjection(every=3, start=5), target=dt.TopK(keep=0.3))),
    "projection-bare": (adamw, recipe(dt.HardProjection(every=4, masks=False))),
    "clip": (sgd, recipe(dt.Clip(start=2), fit_every=2)),
}


def resumed(name: str, cut: int, carry: Callable[[Any], Any] = through_a_file) -> dict[str, Tensor]:
    make, rules = RESUMES[name]
    model = net()
    optimizer = make(model)
    dt.attach(model, optimizer, rules, total_steps=STEPS)
    train(model, optimizer, range(cut))
    saved = carry({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = net()
    with torch.no_grad():
        for p in again.parameters():  # a resumed script starts from other weights
            p.mul_(1.3)
    fresh = make(again)
    run = dt.attach(again, fresh, rules, total_steps=STEPS)
    again.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert run.clock == cut
    train(again, fresh, range(cut, STEPS))
    return ending(run, again)


def ending(run: dt.Run, model: nn.Module) -> dict[str, Tensor]:
    """Both lives at the end of a training."""
    return {**everything(model), **{f"compressed {name}": value for name, value in compressed_of(run).items()}}


def compressed_of(run: dt.Run) -> dict[str, Tensor]:
    return {name: encoded.decode() for name, encoded in run.encoded().items()}


@pytest.mark.parametrize("cut", [0, 1, 5, 6, 9])
@pytest.mark.parametrize("name", RESUMES)
def test_resume_is_bitwise_the_unbroken_run(name: str, cut: int) -> None:
    make, rules = RESUMES[name]
    model = net()
    optimizer = make(model)
    run = dt.attach(model, optimizer, rules, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    assert_same(resumed(name, cut), ending(run, model))


def test_the_resume_test_can_fail() -> None:
    """Without the run's part even a stateless mechanism goes another way: its clock starts again."""

    def lossy(state: dict[str, Any]) -> dict[str, Any]:
        state = through_a_file(state)
        state["optimizer"]["detent"]["step"] = 0
        return state

    with pytest.raises(AssertionError):
        assert_same(resumed("psg-gradient", 5, lossy), resumed("psg-gradient", 5))


@pytest.mark.parametrize("name", RESUMES)
def test_a_plain_optimizer_reads_the_same_file(name: str) -> None:
    make, rules = RESUMES[name]
    model = net()
    optimizer = make(model)
    dt.attach(model, optimizer, rules, total_steps=STEPS)
    train(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    plain_model = net()
    plain = make(plain_model)
    plain.load_state_dict(saved)
    assert "detent" not in plain.state_dict()
    assert all(
        torch.equal(a[key], b[key])
        for a, b in zip(plain.state.values(), optimizer.state.values(), strict=True)
        for key in b
        if isinstance(b[key], Tensor)
    )
    train(plain_model, plain, [3])


def test_our_tensors_stay_out_of_the_base_optimizers_state() -> None:
    model = net()
    optimizer = adamw(model)
    dt.attach(model, optimizer, recipe(dt.STE()))
    assert not optimizer.state, "Adam initialises only where the state is empty"
    train(model, optimizer, range(2))
    assert {key for held in optimizer.state.values() for key in held} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_stateful_mechanism_does_not_resume_without_its_state() -> None:
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(dt.STE()))
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"keeps state \(latent\).*rebind\(adopt=True\)"):
        train(model, optimizer, [0])
    run.rebind(adopt=True)
    train(model, optimizer, [0])
    assert run.clock == 1


def test_a_stateless_mechanism_starts_from_a_plain_optimizers_state() -> None:
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, range(2))
    momentum = through_a_file(optimizer.state_dict())
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    optimizer.load_state_dict(momentum)
    train(model, optimizer, range(2))
    assert run.clock == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.update(version=99), "version 99; this release reads 2"),
        (lambda s: s["weights"].pop("2.weight"), "'2.weight' is in only one"),
        (lambda s: s["weights"].update({"9.weight": {}}), "'9.weight' is in only one"),
        (lambda s: s["weights"]["0.weight"]["state"].clear(), "'0.weight' has lost its 'latent'"),
    ],
)
def test_state_of_another_run_is_refused(spoil: Callable[[dict[str, Any]], Any], words: str) -> None:
    model = net()
    optimizer = sgd(model)
    dt.attach(model, optimizer, recipe(dt.STE()))
    saved = through_a_file(optimizer.state_dict())
    spoil(saved["detent"])
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("mechanism", [dt.STE(), dt.PSG(gain=8.0)], ids=["ste", "psg"])
def test_a_state_that_was_loaded_before_attach_is_missed(mechanism: dt.Mechanism) -> None:
    """torch drops our part without a word; what is left of it in a group says that there was one."""
    model = net()
    optimizer = adamw(model)
    unbroken = dt.attach(model, optimizer, recipe(mechanism), total_steps=STEPS)
    train(model, optimizer, range(5))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model = net()
    optimizer = adamw(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run = dt.attach(model, optimizer, recipe(mechanism), total_steps=STEPS)
    with pytest.raises(RuntimeError, match=r"AdamW was loaded before attach.*\(after 5 steps\).*rebind\(adopt=True\)"):
        train(model, optimizer, [5])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert run.clock == 5
    assert_same(compressed_of(run), compressed_of(unbroken))
    train(model, optimizer, [5])
    optimizer.load_state_dict(optimizer.state_dict())
    assert "detent_steps" not in optimizer.param_groups[0]
    for start_afresh in (False, True):
        model = net()
        optimizer = adamw(model)
        optimizer.load_state_dict(saved["optimizer"])
        run = dt.attach(model, optimizer, recipe(mechanism), total_steps=STEPS)
        if start_afresh:
            run.rebind(adopt=True)
        else:
            model.load_state_dict(saved["model"])
            run.load_state_dict(unbroken.state_dict())
        train(model, optimizer, [5])


def test_a_state_that_torch_refuses_changes_nothing_of_ours() -> None:
    model = net()
    halves = [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}]
    optimizer = torch.optim.SGD(halves, lr=0.1, momentum=0.9)
    dt.attach(model, optimizer, recipe(dt.STE()), total_steps=STEPS)
    train(model, optimizer, range(5))
    saved = through_a_file(optimizer.state_dict())
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(dt.STE()), total_steps=STEPS)
    before = through_a_file(run.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(saved)
    assert run.clock == 0
    for name, kept in before["weights"].items():
        assert_same(kept["state"], run.state_dict()["weights"][name]["state"])
        assert_same(kept["params"], run.state_dict()["weights"][name]["params"])
    with pytest.raises(ValueError, match="'4.weight' is in only one"):
        run.load_state_dict({**before, "weights": {k: v for k, v in before["weights"].items() if k != "4.weight"}})
    train(model, optimizer, [0])
    assert run.clock == 1


@pytest.mark.parametrize("through", ["optimizer", "run"])
def test_another_length_of_training_is_refused(through: str) -> None:
    """It would thaw a frozen grid, and move every schedule, without a word."""
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    train(model, optimizer, range(5))
    saved = through_a_file({"optimizer": optimizer.state_dict(), "run": run.state_dict()})
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=4 * STEPS)
    load = {"optimizer": optimizer.load_state_dict, "run": run.load_state_dict}[through]
    with pytest.raises(ValueError, match=rf"total_steps={STEPS}, this run has {4 * STEPS}.*attach with total_steps"):
        load(saved[through])
    assert run.clock == 0
    saved["optimizer"]["detent"]["total_steps"] = saved["run"]["total_steps"] = None
    load(saved[through])
    assert run.clock == 5


def _state(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, **changes}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: None, "must be what run.state_dict"),
        (lambda state: {"steps": [0]}, "must be what run.state_dict"),
        (_state(steps=[-5]), "the clock -5; it must be a whole number >= 0"),
        (_state(steps=["a"]), "the clock 'a'; it must be a whole number >= 0"),
        (_state(steps=0), "must be what run.state_dict"),
        (_state(weights=None), "must be what run.state_dict"),
        (lambda state: _state(weights={**state["weights"], "0.weight": {}})(state), "'0.weight' is not what"),
    ],
)
def test_what_is_no_state_is_refused(spoil: Callable[[dict[str, Any]], Any], words: str) -> None:
    model = net()
    run = dt.attach(model, sgd(model), recipe(), total_steps=STEPS)
    with pytest.raises(ValueError, match=words):
        run.load_state_dict(spoil(run.state_dict()))


def test_state_dict_of_the_run_holds_all_optimizers() -> None:
    ends = []
    for cut in (None, 5):
        model = net()
        params = list(model.parameters())
        optimizers = [torch.optim.SGD(params[:2], lr=0.1), torch.optim.AdamW(params[2:], lr=0.02)]
        run = dt.attach(model, optimizers, recipe(dt.STE()), total_steps=STEPS)
        train(model, optimizers, range(cut or STEPS))
        if cut:
            saved = {"model": model.state_dict(), "run": run.state_dict(), "adam": optimizers[1].state_dict()}
            saved = through_a_file(saved)
            model = net()
            params = list(model.parameters())
            optimizers = [torch.optim.SGD(params[:2], lr=0.1), torch.optim.AdamW(params[2:], lr=0.02)]
            run = dt.attach(model, optimizers, recipe(dt.STE()), total_steps=STEPS)
            model.load_state_dict(saved["model"])
            optimizers[1].load_state_dict(saved["adam"])
            run.load_state_dict(saved["run"])
            train(model, optimizers, range(cut, STEPS))
            with pytest.raises(ValueError, match="1 optimizer clocks, this run has 2"):
                run.load_state_dict({**saved["run"], "steps": [3]})
        ends.append(everything(model))
    assert_same(*ends)


@pytest.mark.parametrize("name", ["ste", "ste-late", "projection-masks", "projection-late", "psg-ema"])
@pytest.mark.parametrize("cut", [2, 7])
def test_torch_distributed_checkpoint_saves_and_loads_the_run(name: str, cut: int, tmp_path: Path) -> None:
    """It reads into a template: a fresh run must offer every key, also of memory that was not there yet."""
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    make, rules = RESUMES[name]
    ends = []
    for broken in (False, True):
        model = net()
        optimizer = make(model)
        run = dt.attach(model, optimizer, rules, total_steps=STEPS)
        train(model, optimizer, range(cut))
        if broken:
            momentum = through_a_file(optimizer.state_dict())
            momentum.pop("detent")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that no process group is there
                save({"model": model.state_dict(), "run": run.state_dict()}, checkpoint_id=tmp_path)
            model = net()
            optimizer = make(model)
            run = dt.attach(model, optimizer, rules, total_steps=STEPS)
            template = {"model": model.state_dict(), "run": run.state_dict()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(template, checkpoint_id=tmp_path)
            model.load_state_dict(template["model"])
            optimizer.load_state_dict(momentum)
            run.load_state_dict(template["run"])
            assert run.clock == cut
        train(model, optimizer, range(cut, STEPS))
        ends.append(everything(model))
    assert_same(*ends)


# ------------------------------------------------------------------------------------ writes by others, broken steps


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE(), dt.HardProjection(every=2)])
def test_weights_loaded_behind_our_back_are_noticed(mechanism: dt.Mechanism) -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(mechanism), total_steps=STEPS)
    train(model, optimizer, range(2))
    loaded = {name: value * 2 for name, value in everything(net()).items()}
    model.load_state_dict(loaded)
    with pytest.raises(RuntimeError, match=r"'0.weight' was written by someone else.*rebind\(adopt=True\)"):
        train(model, optimizer, [2])
    with pytest.raises(RuntimeError, match="written by someone else"), run.compressed():
        pass
    run.rebind(adopt=True)
    if isinstance(mechanism, dt.STE):
        grid = dt.Uniform(bits=3, range="minmax")
        wanted = grid.project(loaded["0.weight"], grid.fit(loaded["0.weight"]))
        assert torch.equal(model[0].weight, wanted), "the latent starts afresh from the loaded weights"
    train(model, optimizer, [2])
    assert run.clock == 3


@pytest.mark.parametrize("attached", [True, False])
def test_weights_replaced_behind_our_back_are_noticed(attached: bool, tmp_path: Path) -> None:
    """`assign=True` leaves the run, and the optimizer, with tensors that the model does not compute with any more."""
    model, loaded = net(), everything(net())
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS) if attached else dt.compress(model, recipe())
    model.load_state_dict({name: 3 * value for name, value in loaded.items()}, assign=True)
    advice = r"give the new one to the optimizer" if attached else r"rebind\(adopt=True\)"

    def look() -> None:
        with run.compressed():
            pass

    asked: list[Callable[[], Any]] = [look, run.finalize, run.measure, lambda: dt.save(run, tmp_path / "model.detent")]
    for ask in [*asked, lambda: train(model, optimizer, [0])] if attached else asked:
        with pytest.raises(RuntimeError, match=rf"'0.weight' of the model is another tensor now.*{advice}"):
            ask()
    assert not list(tmp_path.iterdir())
    if not attached:
        run.rebind(adopt=True)
        with run.compressed():
            grid = dt.Uniform(bits=3, range="minmax")
            wanted = 3 * loaded["0.weight"]
            assert torch.equal(model[0].weight, grid.project(wanted, grid.fit(wanted)))


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE()], ids=["psg", "ste"])
def test_adopting_after_the_fit_is_over_keeps_the_grid(mechanism: dt.Mechanism) -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(mechanism, fit_every=1, fit_until=2), total_steps=STEPS)
    train(model, optimizer, range(3))
    before = run.encoded()["0.weight"].form.named["scale"].clone()
    model.load_state_dict({name: value * 1.7 for name, value in everything(model).items()})
    run.rebind(adopt=True)
    assert torch.equal(run.encoded()["0.weight"].form.named["scale"], before)
    if isinstance(mechanism, dt.STE):
        assert torch.equal(model[0].weight, compressed_of(run)["0.weight"]), "the latent starts afresh, on the old grid"
    train(model, optimizer, [3])


def test_an_unclaimed_weight_may_be_written_by_anybody() -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(match=r"^0\.weight"), total_steps=STEPS)
    with torch.no_grad():
        model[2].weight.zero_()
    train(model, optimizer, range(2))
    assert run.clock == 2


class Breaks(torch.optim.SGD):
    """Raises before or after it moved the weights, once, when told to."""

    broken: str = ""

    def step(self, closure: Any = None) -> Any:
        where, self.broken = self.broken, ""
        if where == "before":
            raise OSError("the disk is full")
        if where == "after":
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(1.0)
            raise OSError("the disk is full")
        return super().step(closure)


@pytest.mark.parametrize(
    ("mechanism", "where"),
    [
        (dt.PSG(gain=8.0, form="gradient", clip=False), "before"),
        (dt.PSG(gain=8.0, form="gradient", clip=False, clip_norm=0.5), "before"),
        (dt.PSG(gain=8.0, form="update"), "before"),
        (dt.PSG(gain=8.0, form="update"), "after"),
        (dt.PSG(start=0), "before"),
        (dt.PSG(start=0, form="update"), "after"),
        (dt.STE(), "before"),
        (dt.STE(), "after"),
        (dt.HardProjection(every=2), "before"),
    ],
)
def test_a_step_that_raised_is_repaired_and_may_be_tried_again(mechanism: dt.Mechanism, where: str) -> None:
    """The naive way scales the same gradient twice, or leaves the latent in the model."""
    ends = []
    for broken in (False, True):
        model = net()
        optimizer = Breaks(model[0].parameters(), lr=0.1, momentum=0.0)
        run = dt.attach(model, optimizer, recipe(mechanism, match=r"^0\.weight"), total_steps=STEPS)
        train(model, optimizer, range(2))
        inputs, wanted = batch(2)
        optimizer.zero_grad()
        (model(inputs) - wanted).square().mean().backward()
        seen = model[0].weight.detach().clone()
        if broken:
            optimizer.broken = where
            with pytest.raises(OSError, match="disk is full"):
                optimizer.step()
            assert run.clock == 2
            with run.compressed():  # an event: the repair happens here
                pass
            assert torch.equal(model[0].weight, seen)
            if isinstance(mechanism, dt.STE):
                assert len(model[0].weight.unique()) <= 7 < len(seen_latent(run).unique())
            with torch.no_grad():
                model[0].bias.copy_(model[0].bias - 1.0 if where == "after" else model[0].bias)
        optimizer.step()
        assert run.clock == 3
        train(model, optimizer, range(3, 6))
        ends.append(everything(model))
    # Bitwise, but for the bias that this test itself repairs, and a norm that is clipped a second time.
    rounded = where == "after" or getattr(mechanism, "clip_norm", None)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0.0, atol=1e-5 if rounded else 0.0)


def seen_latent(run: dt.Run) -> Tensor:
    return run.state_dict()["weights"]["0.weight"]["state"]["latent"]


def test_after_a_broken_step_a_new_gradient_is_scaled_as_ever() -> None:
    ends = []
    for broken in (False, True):
        model = net()
        optimizer = Breaks(model.parameters(), lr=0.1)
        dt.attach(model, optimizer, recipe(dt.PSG(gain=8.0, form="gradient")), total_steps=STEPS)
        if broken:
            optimizer.broken = "before"
            with pytest.raises(OSError, match="disk is full"):
                train(model, optimizer, [0])
        train(model, optimizer, range(3))
        ends.append(everything(model))
    assert_same(*ends)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing_and_is_named(bad: float) -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(dt.STE()), total_steps=STEPS)
    train(model, optimizer, range(2))
    before, state = everything(model), through_a_file(optimizer.state_dict())
    optimizer.zero_grad()
    model(batch(2)[0]).sum().backward()
    model[2].weight.grad[1, 1] = bad
    with pytest.raises(RuntimeError, match=r"gradient of '2.weight' is not finite at step 2; no weight was changed"):
        optimizer.step()
    assert_same(everything(model), before)
    after = optimizer.state_dict()
    assert run.clock == 2
    assert torch.equal(
        after["detent"]["weights"]["2.weight"]["state"]["latent"],
        state["detent"]["weights"]["2.weight"]["state"]["latent"],
    )
    train(model, optimizer, [2])
    assert run.clock == 3


def test_bad_gradients_may_be_ignored() -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(dt.PSG(gain=8.0, form="gradient")), total_steps=STEPS, nonfinite="ignore")
    model(batch(0)[0]).sum().backward()
    model[2].weight.grad[1, 1] = float("nan")
    optimizer.step()
    assert run.clock == 1
    assert bool(model[2].weight.isnan().any())


def test_a_finite_gradient_whose_norm_overflows_is_not_called_bad() -> None:
    model = net().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    run = dt.attach(model, optimizer, recipe(dt.PSG(gain=8.0, start=5)), total_steps=STEPS)
    for p in model.parameters():
        p.grad = torch.full_like(p, 6e4)
    optimizer.step()
    rule = recipe(dt.PSG(gain=8.0, form="update"))
    run.detach()
    run = dt.attach(model, optimizer, rule, total_steps=STEPS)
    optimizer.step()
    assert run.clock == 1


def test_sparse_gradients_are_refused_in_words() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'weight' has a sparse gradient.*sparse=False"):
        optimizer.step()


def test_an_unclaimed_sparse_gradient_is_fine() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(10, 4, sparse=True), "head": nn.Linear(4, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = dt.attach(model, optimizer, recipe(match="head.weight"), total_steps=STEPS)
    model["head"](model["table"](torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    assert run.clock == 1


def test_a_claimed_weight_without_a_gradient_is_left_alone() -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(dt.PSG(gain=8.0, clip=False)), total_steps=STEPS)
    before = everything(model)
    model[:2](batch(0)[0]).square().sum().backward()
    optimizer.step()
    assert run.clock == 1
    assert torch.equal(model[4].weight, before["4.weight"])
    assert not torch.equal(model[0].weight, before["0.weight"])


# ------------------------------------------------------------------------------- which parameters, and where they sit


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def poisoned(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "params", "words"),
    [
        (net, lambda m: [m[0].weight], r"'2.weight' is claimed by the recipe but sits in no attached optimizer"),
        (lambda: net().requires_grad_(False), lambda m: [m[0].weight], "'0.weight' is frozen"),
        (lambda: zeroed(net()), lambda m: m.parameters(), "'0.weight' is all zero"),
        (lambda: poisoned(net()), lambda m: m.parameters(), "'0.weight': 1 of 48 weights are NaN or infinite"),
    ],
)
def test_parameters_that_cannot_be_pulled_are_named(make: Callable[[], Any], params: Any, words: str) -> None:
    model = make()
    optimizer = torch.optim.SGD(params(model), lr=0.1)
    with pytest.raises(ValueError, match=words):
        dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    assert "detent" not in optimizer.state_dict(), "a refused attach leaves hooks behind"
    dt.attach(other := net(), torch.optim.SGD(other.parameters(), lr=0.1), recipe(), total_steps=STEPS)


def test_a_parameter_in_two_optimizers_is_named() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"'0.weight'.* sits in 2 places"):
        dt.attach(model, [sgd(model), adamw(model)], recipe(), total_steps=STEPS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": "3"}, "total_steps='3'.: must be a whole number >= 1"),
        ({"total_steps": 3.5}, "total_steps=3.5.: must be a whole number >= 1"),
        ({"total_steps": None}, "pass total_steps="),
        ({"nonfinite": "skip"}, "nonfinite='skip'"),
        ({"optimizer": []}, "at least one optimizer"),
        ({"optimizer": object()}, "has no param_groups"),
        ({"recipe": dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])}, "has no mechanism"),
    ],
)
def test_attach_refuses_what_makes_no_sense(options: dict[str, Any], words: str) -> None:
    model = net()
    given: dict[str, Any] = {"optimizer": sgd(model), "recipe": recipe(), "total_steps": STEPS} | options
    with pytest.raises(ValueError, match=words):
        dt.attach(model, given.pop("optimizer"), given.pop("recipe"), **given)


def test_tied_weights_are_claimed_and_scaled_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 4, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = dt.attach(model, optimizer, recipe(dt.PSG(gain=2.0, eps=0.1, clip=False)), total_steps=STEPS)
    assert [(claim.name, claim.aliases) for claim in run.plan.claimed] == [("table.weight", ("head.weight",))]
    w = model.table.weight.detach().clone()
    model(torch.eye(4)).square().sum().backward()
    assert model.table.weight.grad is not None
    grad = model.table.weight.grad.clone()
    optimizer.step()
    cell = w.abs().max() / 3
    scale = 2.0 * ((w - (w / cell).round() * cell).abs() + 0.1 * cell) / (cell / 4)
    torch.testing.assert_close(model.table.weight.detach(), w - 0.1 * scale * grad, rtol=1e-4, atol=1e-6)
    with run.compressed():
        assert model.head.weight is model.table.weight


def test_wrapped_names_are_stripped() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    bare, wrapped = net(), Wrapper(net())
    ends = []
    for model in (bare, wrapped):
        optimizer = sgd(model)
        run = dt.attach(model, optimizer, recipe(match=r"^0\.weight"), total_steps=STEPS)
        assert [claim.name for claim in run.plan.claimed] == ["0.weight"]
        train(model, optimizer, range(2))
        ends.append((everything(model if model is bare else wrapped.module), through_a_file(run.state_dict())))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1]["weights"].keys() == ends[1][1]["weights"].keys()


def test_parameters_replaced_after_attach_are_found_again_by_name() -> None:
    """What FSDP2 and accelerate do: other objects under the same names, in the model and in the optimizer."""
    ends = []
    for replaced in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = dt.attach(model, optimizer, recipe(dt.STE()), total_steps=STEPS)
        if replaced:
            for module in model:
                for name, p in list(module._parameters.items()):
                    if p is not None:
                        module._parameters[name] = nn.Parameter(p.detach().clone())
            optimizer.param_groups[0]["params"] = list(model.parameters())
        train(model, optimizer, range(3))
        assert run.clock == 3
        ends.append(everything(model))
    assert_same(*ends)


def test_replaced_parameters_that_do_not_fit_are_named() -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    wider = nn.Sequential(nn.Linear(6, 9))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(9, 6\) now, not \(8, 6\)"):
        run.rebind(wider)
    with pytest.raises(ValueError, match="'0.weight' is claimed by the recipe but is no parameter"):
        run.rebind(nn.Sequential(nn.Tanh()))
    with pytest.raises(ValueError, match="sits in no attached optimizer"):
        run.rebind(net())
    model[0] = nn.Linear(6, 8)  # in the model, not in the optimizer
    with pytest.raises(ValueError, match="'0.weight' is claimed by the recipe but sits in no attached optimizer"):
        run.rebind()


def test_a_refused_rebind_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    train(model, optimizer, [0])
    other = net()
    other[4] = nn.Linear(5, 4)
    for wrong, words in [(other, "has shape"), (net(), "no attached optimizer"), ("x", "must be a torch.nn.Module")]:
        with pytest.raises(ValueError, match=words):
            run.rebind(wrong)
        assert run.model is model
        train(model, optimizer, [1])
        dt.save(run, tmp_path / "model.detent")
    assert run.clock == 4


def test_frozen_parameters_may_be_adopted(tmp_path: Path) -> None:
    """After the last step: freeze, load the best weights, adopt, save; only attach needs something to train."""
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    train(model, optimizer, range(2))
    model.requires_grad_(False)
    model.load_state_dict(everything(net()))
    run.rebind(adopt=True)
    dt.save(run, tmp_path / "model.detent")


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "compress"])
def test_another_dtype_is_named_and_may_be_adopted(attached: bool, tmp_path: Path) -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(dt.STE()), total_steps=STEPS) if attached else dt.compress(model, recipe())
    model.bfloat16()

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    asked: list[Callable[[], Any]] = [run.measure, run.finalize, lambda: dt.save(run, tmp_path / "model.detent")]
    for ask in [*asked, step] if attached else asked:
        with pytest.raises(RuntimeError, match=r"'0.weight' is torch.bfloat16 now and was torch.float32.*adopt=True"):
            ask()
    run.rebind(adopt=True)
    if attached:
        step()
        assert run.clock == 1
    dt.save(run, tmp_path / "model.detent")
    encoded = run.encoded()["0.weight"]
    assert encoded.form.dtype == torch.bfloat16
    with run.compressed():
        assert torch.equal(encoded.decode(), model[0].weight)


def test_a_detached_run_adopts_weights_and_leaves_them_alone() -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(dt.STE(), target=dt.Uniform(bits=3)), total_steps=STEPS)
    train(model, optimizer, range(2))
    run.detach()
    train(model, optimizer, range(2, 5))
    before = everything(model)
    run.rebind(adopt=True)
    assert_same(everything(model), before)
    grid = dt.Uniform(bits=3)
    assert torch.equal(compressed_of(run)["0.weight"], grid.project(before["0.weight"], grid.fit(before["0.weight"])))


def test_a_refused_attach_leaves_the_weights_alone() -> None:
    class Never(dt.Schedule):
        def __call__(self, step: int, total_steps: int | None) -> float:
            return 0.0

    model = net()
    before = everything(model)
    grid = dt.Uniform(bits=2)
    late = dt.MirrorDescent(beta=Never())  # type: ignore[arg-type]
    rules = [
        dt.Rule(match="^0.weight", target=grid, mechanism=dt.STE()),
        dt.Rule(match="^2.weight", target=grid, mechanism=late),
    ]
    with pytest.raises(ValueError, match="beta"):
        dt.attach(model, sgd(model), dt.Recipe(rules), total_steps=STEPS)
    assert_same(everything(model), before)


def test_fsdp1_is_refused_in_words() -> None:
    class FullyShardedDataParallel(nn.Module):  # the one trait of the real one that its module tree shows
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = inner

    model = FullyShardedDataParallel(net())
    with pytest.raises(ValueError, match="FSDP1.*use torch.distributed.fsdp.fully_shard"):
        dt.attach(model, sgd(model), recipe(), total_steps=STEPS)


def test_a_model_made_in_inference_mode_has_a_compressed_life() -> None:
    with torch.inference_mode():
        model = net()
        run = dt.compress(model, recipe())
        before = everything(model)
        with run.compressed():
            assert len(model[0].weight.unique()) <= 7
        assert_same(everything(model), before)


def test_a_model_on_the_meta_device_is_attached_now_and_fitted_at_the_first_step() -> None:
    ends = []
    for late in (False, True):
        with torch.device("meta" if late else "cpu"):
            model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = None
        if late:
            run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
            model.to_empty(device="cpu")
            optimizer.param_groups[0]["params"] = list(model.parameters())
        model.load_state_dict(net().state_dict())
        run = run or dt.attach(model, optimizer, recipe(), total_steps=STEPS)
        train(model, optimizer, range(3))
        assert run.clock == 3
        ends.append(everything(model))
    assert_same(*ends)


# -------------------------------------------------------------------------------------------------------- two lives


def trained(mechanism: dt.Mechanism | None = None, **options: Any) -> tuple[Any, torch.optim.Optimizer, dt.Run]:
    model = normed()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(mechanism, **options), total_steps=STEPS)
    train(model, optimizer, range(3))
    return model, optimizer, run


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE(), dt.HardProjection(every=2)])
def test_compressed_shows_the_codes_and_gives_the_full_life_back_bitwise(mechanism: dt.Mechanism) -> None:
    model, optimizer, run = trained(mechanism)
    before = everything(model)
    codes = compressed_of(run)
    assert set(codes) == {"0.weight", "3.weight"}
    with run.compressed() as inside:
        assert inside is run
        for name, value in codes.items():
            assert torch.equal(model.get_parameter(name), value)
            assert len(value.unique()) <= 7
        model.train()
        model(batch(0)[0])  # a forward pass in training mode writes BatchNorm's statistics
    assert_same(everything(model), before)
    with pytest.raises(KeyError, match="evaluation failed"), run.compressed():
        raise KeyError("evaluation failed")
    assert_same(everything(model), before)
    with torch.inference_mode(), run.compressed(bits=2):
        assert len(model[0].weight.unique()) <= 3
    assert_same(everything(model), before)
    train(model, optimizer, range(3, 5))
    assert run.clock == 5


def test_looking_at_the_compressed_life_does_not_change_the_training() -> None:
    ends = []
    for look in (False, True):
        model = normed()
        optimizer = sgd(model)
        run = dt.attach(
            model, optimizer, recipe(dt.PSG(gain=8.0), target=EMA, fit_every=2, fit_until=1.0), total_steps=STEPS
        )
        for step in range(6):
            train(model, optimizer, [step])
            if look:
                with run.compressed(), torch.no_grad():
                    model(batch(step)[0])
                with run.compressed(bits=2):
                    pass
                run.measure()
                run.encoded()
        ends.append(everything(model))
    assert_same(*ends)


def test_steps_and_lives_inside_a_life_are_refused() -> None:
    model, optimizer, run = trained()
    before = everything(model)
    states = run.state_dict(), optimizer.state_dict()
    with run.compressed():
        with pytest.raises(RuntimeError, match="inside run.compressed"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="leave that life first"), run.compressed():
            pass
        asked = (run.finalize, run.encoded, run.measure, lambda: run.recalibrate([]), lambda: run.rebind(adopt=True))
        for ask in (*asked, lambda: run.load_state_dict(states[0]), lambda: optimizer.load_state_dict(states[1])):
            with pytest.raises(RuntimeError, match="leave that life first"):
                ask()
    assert_same(everything(model), before)
    assert run.clock == 3


def test_what_is_written_inside_a_life_is_refused_on_leaving() -> None:
    """Leaving puts the full life back, so that a checkpoint loaded inside would be gone without a word."""
    model, optimizer, run = trained()
    before = everything(model)
    with pytest.raises(RuntimeError, match=r"'0.weight' was written inside run.compressed\(\)"), run.compressed():
        model.load_state_dict({name: 2 * value for name, value in before.items()})
    for name in ("0.weight", "3.weight"):
        assert torch.equal(model.get_parameter(name), before[name])
    with pytest.raises(KeyError, match="mine"), run.compressed():
        raise KeyError("mine")
    train(model, optimizer, [3])
    assert run.clock == 4


def test_infinite_weights_are_named_by_what_would_keep_them(tmp_path: Path) -> None:
    model = net()
    optimizer = sgd(model)
    free = recipe(dt.PSG(gain=8.0, clip=False), fit_until=1)
    run = dt.attach(model, optimizer, free, total_steps=STEPS, nonfinite="ignore")
    train(model, optimizer, range(2))
    assert model[2].weight.grad is not None
    model[2].weight.grad[0, 0] = float("inf")
    optimizer.step()
    for ask in (run.finalize, run.encoded, lambda: dt.save(run, tmp_path / "model.detent")):
        with pytest.raises(ValueError, match=r"'2.weight' holds NaN or infinite weights"):
            ask()
    assert not list(tmp_path.iterdir())
    assert bool(torch.isfinite(model[0].weight).all())


def test_other_widths_and_other_recipes() -> None:
    model = net()
    rules = [
        dt.Rule(match=r"^0\.", target=dt.Uniform(bits=8), mechanism=dt.PSG(gain=8.0), pinned=True),
        dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.PSG(gain=8.0)),
    ]
    run = dt.attach(model, sgd(model), dt.Recipe(rules), total_steps=STEPS)
    before = everything(model)
    with run.compressed(bits=2):
        assert len(model[0].weight.unique()) > 15, "a pinned rule keeps its width"
        assert [len(model[i].weight.unique()) for i in (2, 4)] == [3, 3]
    with run.compressed(recipe=recipe(dt.PSG(gain=8.0), target=dt.TopK(keep=0.25, scope="model"))):
        kept = sum(int((model[i].weight != 0).sum()) for i in (0, 2, 4))
        assert kept == round(0.25 * (48 + 40 + 15))
    assert_same(everything(model), before)
    with pytest.raises(ValueError, match="bits= or recipe=, not both"), run.compressed(bits=2, recipe=recipe()):
        pass
    pruned = dt.compress(model, recipe(target=dt.TopK(keep=0.5)))
    with pytest.raises(ValueError, match="bits=2: no rule of this recipe has an unpinned target"):
        pruned.encoded(bits=2)


def test_recalibrated_statistics_belong_to_one_life_alone() -> None:
    """Put over the full life they cost a digits net 99.5 -> 69.0 (design.md); so they are a second set of buffers."""
    model, optimizer, run = trained()
    before = everything(model)
    inputs = [batch(i)[0] for i in range(4)]
    model.eval()
    run.recalibrate(inputs)
    run.recalibrate([(x, "label") for x in inputs], bits=2)
    assert_same(everything(model), before)
    assert not any(module.training for module in model.modules())
    for bits in (None, 2):
        with run.compressed(bits=bits), torch.no_grad():
            wanted = torch.stack([model[0](x).mean(0) for x in inputs]).mean(0)
            torch.testing.assert_close(model[1].running_mean, wanted)
            variance = torch.stack([model[0](x).var(0) for x in inputs]).mean(0)
            torch.testing.assert_close(model[1].running_var, variance)
            assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    with run.compressed(batchnorm=False):
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert_same(everything(model), before)
    assert run.statistics() is not None
    model.train()
    train(model, optimizer, [3])
    assert run.statistics() is None, "statistics of weights that have moved since"


def test_recalibrate_refuses_what_it_cannot_do() -> None:
    model, _, run = trained()
    before = everything(model)
    momentum = model[1].momentum
    for batches, words in (([], "no batches"), (["text"], "cannot feed a str")):
        with pytest.raises(ValueError, match=words):
            run.recalibrate(batches)
    assert_same(everything(model), before)
    assert model[1].momentum == momentum
    assert model.training
    plain = net()
    with pytest.raises(ValueError, match="no BatchNorm"):
        dt.compress(plain, recipe()).recalibrate([batch(0)[0]])


@pytest.mark.parametrize(
    ("mechanism", "target"),
    [
        (dt.PSG(gain=8.0), dt.Uniform(bits=3)),
        (dt.STE(), dt.Uniform(bits=2, granularity="channel")),
        (dt.HardProjection(every=2), dt.TopK(keep=0.25)),
        (dt.PSG(gain=8.0, toward=dt.Zero()), dt.TopK(keep=0.25, scope="model")),
    ],
)
def test_finalize_is_exact_and_over(mechanism: dt.Mechanism, target: dt.Target) -> None:
    model, optimizer, run = trained(mechanism, target=target)
    codes = compressed_of(run)
    run.recalibrate([batch(i)[0] for i in range(2)])
    with run.compressed():
        life = everything(model)
    run.finalize()
    assert_same(everything(model), life)
    for name, value in codes.items():
        assert torch.equal(model.get_parameter(name), value)
    for entry in run._entries:
        assert entry.params is not None
        assert torch.equal(entry.target.project(codes[entry.name], entry.params), codes[entry.name])
    if isinstance(target, dt.TopK):
        kept = sum(int((value != 0).sum()) for value in codes.values())
        assert kept == sum(round(0.25 * n) for n in ([48 + 24] if target.scope == "model" else [48, 24]))
    assert "detent" not in optimizer.state_dict()
    train(model, optimizer, [3])
    assert run.clock == 3, "the run is over"
    assert not torch.equal(model[0].weight, codes["0.weight"])


def test_memory_is_what_the_mechanism_says() -> None:
    """PSG keeps nothing between steps, STE a latent, hard projection a mask."""
    for mechanism, wanted in (
        (dt.PSG(gain=8.0), set()),
        (dt.STE(), {"latent"}),
        (dt.HardProjection(every=2), {"mask"}),
    ):
        _, optimizer, _ = trained(mechanism)
        held = optimizer.state_dict()["detent"]["weights"]["0.weight"]["state"]
        assert set(held) == wanted == set(mechanism.memory)


# --- what a fresh review found -----------------------------------------------------------------------------------


def _small(mechanism: dt.Mechanism, bits: int = 4) -> tuple[nn.Linear, torch.optim.Optimizer, dt.Run]:
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=bits), mechanism=mechanism)
    return model, optimizer, dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=20)


def _one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(3, 6)).square().mean().backward()
    optimizer.step()


def test_rebind_without_adopt_does_not_silence_a_foreign_write():
    model, optimizer, run = _small(dt.STE())
    _one_step(model, optimizer)
    model.load_state_dict({"weight": torch.full((5, 6), 5.0), "bias": torch.zeros(5)})
    run.rebind()
    with pytest.raises(RuntimeError, match=r"'weight' was written by someone else"):
        _one_step(model, optimizer)


def test_compress_notices_a_foreign_write():
    model = nn.Linear(6, 5)
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    model.load_state_dict({name: value * 100 for name, value in model.state_dict().items()})
    with pytest.raises(RuntimeError, match=r"'weight' was written by someone else"), run.compressed():
        pass
    run.rebind(adopt=True)
    with run.compressed():
        assert float(model.weight.detach().abs().max()) > 5


def test_adopting_other_weights_drops_the_statistics_of_the_old_ones():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=4))]))
    run.recalibrate([torch.randn(32, 6)])
    assert run.statistics() is not None
    run.rebind(adopt=True)
    assert run.statistics() is None


def test_statistics_of_other_weights_are_dropped_though_the_same_fit_is_found(tmp_path: Path):
    """Signs alone have nothing fitted; and a look through another run writes, and puts back, the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5))
    signs = dt.Recipe([dt.Rule(match="0.weight", target=dt.Binary(scale=None))])
    run = dt.compress(model, signs)
    run.recalibrate([torch.randn(32, 6)])
    with dt.compress(model, signs).compressed():
        pass
    with run.compressed():
        assert run.statistics() is not None
    kept = everything(model)
    for use in (run.measure, lambda: dt.save(run, tmp_path / "model.detent"), lambda: run.round_statistics("float16")):
        model.load_state_dict(kept | {"0.weight": -kept["0.weight"]})
        use()
        found = run.statistics()
        assert found is None or found.source == "own, rounded to float16"
        run.recalibrate([torch.randn(32, 6)])
        model.load_state_dict(kept)
        with run.compressed():
            assert run.statistics() is None
        run.recalibrate([torch.randn(32, 6)])
    assert read_header(tmp_path / "model.detent").card["batchnorm"] == "own"


def test_the_trained_width_asked_for_by_number_is_the_trained_life():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=4))]))
    run.recalibrate([torch.randn(32, 6)])
    assert run.statistics(bits=4) is run.statistics()
    assert run.statistics(bits=3) is None


def test_state_fitted_for_another_target_is_refused_by_name():
    saved = _small(dt.PSG(gain=8.0), bits=8)[2].state_dict()
    run = _small(dt.PSG(gain=8.0), bits=2)[2]
    with pytest.raises(
        ValueError, match=r"'weight' was saved for Uniform\(bits=8\).*this recipe has Uniform\(bits=2\)"
    ):
        run.load_state_dict(saved)
    saved["weights"]["other"] = saved["weights"]["weight"]
    with pytest.raises(ValueError, match=r"'other' is in only one of them"):
        run.load_state_dict(saved)


@pytest.mark.parametrize("field", ["strength", "eps"])
def test_a_schedule_that_would_turn_s_negative_is_refused(field):
    with pytest.raises(ValueError, match=rf"PSG\({field}="):
        replace(dt.PSG(gain=8.0), **{field: dt.Linear(first=0.1, last=-0.5)})
    with pytest.raises(ValueError, match=r"PSG\(strength="):
        dt.PSG(gain=8.0, strength=dt.Linear(first=0, last=2))


def test_two_parameters_of_one_canonical_name_are_refused():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "module": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match=r"canonical name 'fc\.weight'"):
        dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]).resolve(model)


def test_a_clipped_norm_does_not_spread_the_nan_of_an_unclaimed_gradient():
    model, optimizer, _ = _small(dt.PSG(gain=8.0, clip_norm=1.0))
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.ones(5, 6), torch.full((5,), float("nan"))
    with pytest.raises(RuntimeError, match=r"gradient of 'bias' is not finite"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_pull_that_starts_late_goes_to_a_grid_fitted_then():
    model, optimizer, run = _small(dt.PSG(gain=8.0, start=0.5))
    for _ in range(10):
        _one_step(model, optimizer)
    held = run.state_dict()["weights"]["weight"]["pull"]["scale"].clone()
    with torch.no_grad():
        model.weight.mul_(3)
    run.rebind(adopt=True)
    _one_step(model, optimizer)
    assert not torch.equal(run.state_dict()["weights"]["weight"]["pull"]["scale"], held)


LATE = {
    "start": dt.PSG(gain=8.0, start=50, clip=False),
    "start-and-clip": dt.PSG(gain=8.0, start=50, clip_start=50),
    "clip": dt.PSG(clip_start=0.5, gain=1.0),
    "schedule": dt.PSG(gain=8.0, strength=dt.Linear(first=0.0, last=1.0, begin=0.5, end=0.6), clip=False),
    "clip-alone": dt.Clip(start=0.5),
}


@pytest.mark.parametrize("name", LATE)
def test_what_sets_in_after_the_fit_is_frozen_fits_afresh(name: str) -> None:
    """A grid of the first weights would cut weights that have grown since to their first size, or pull them there."""
    model = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=3, range="minmax"), mechanism=LATE[name])
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=100)
    for step in range(53):
        if step == 40:
            with torch.no_grad():
                model.weight.mul_(3)
            run.rebind(adopt=True)
        largest = float(model.weight.detach().abs().max())
        model.weight.grad = torch.full((5, 6), 1e-6)
        optimizer.step()
        assert float(model.weight.detach().abs().max()) == pytest.approx(largest, abs=1e-4), f"cut at step {step}"
    scale = run.state_dict()["weights"]["weight"]["pull"]["scale"]
    assert float(scale) == pytest.approx(float(model.weight.detach().abs().max()) / 3, abs=1e-4)


def test_a_freeze_that_the_recipe_asks_for_holds_whatever_sets_in_later() -> None:
    model = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = dt.Rule(
        match="weight", target=dt.Uniform(bits=3), mechanism=dt.PSG(gain=8.0, start=50, clip=False), fit_until=10
    )
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=100)
    first = run.state_dict()["weights"]["weight"]["pull"]["scale"].clone()
    for step in range(53):
        if step == 40:
            with torch.no_grad():
                model.weight.mul_(3)
            run.rebind(adopt=True)
        model.weight.grad = torch.full((5, 6), 1e-12)
        optimizer.step()
    assert torch.equal(run.state_dict()["weights"]["weight"]["pull"]["scale"], first)


def test_lazy_parameters_and_unknown_recipe_keys_are_named():
    recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])
    with pytest.raises(ValueError, match=r"'weight' has no shape yet"):
        recipe.resolve(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"no key 'ruels'; did you mean 'rules'"):
        dt.Recipe.from_yaml("ruels:\n- {match: weight, keep: true}")


def test_two_compressions_of_one_model_do_not_take_each_other_for_foreign():
    model = nn.Linear(6, 5)
    coarse, fine = (dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=b))])) for b in (2, 4))
    for run, most in ((coarse, 3), (fine, 15), (coarse, 3)):
        with run.compressed():
            assert len(model.weight.unique()) <= most


# ------------------------------------------------------------------------------------- models that change under a run


@pytest.mark.parametrize("life", ["both", "compressed"])
def test_a_layer_that_came_after_attach_is_kept_in_full_precision(tmp_path: Path, life: Any) -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[-1].parameters()})
    train(model, optimizer, range(3))
    dt.save(run, tmp_path / "f", life)
    other = net()
    other.append(nn.Linear(3, 3))
    dt.load(tmp_path / "f", other, life="compressed")
    assert torch.equal(other[-1].weight, model[-1].weight)
    with run.compressed():
        assert_same(everything(model), everything(other))


def test_a_tie_that_breaks_after_attach_is_said() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3))
    model[2].weight = model[1].weight
    run = dt.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe(), total_steps=STEPS)
    model[2].weight = nn.Parameter(model[1].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"'2\.weight' of the model is another tensor"), run.compressed():
        pass


def test_no_state_is_saved_inside_the_compressed_life() -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    train(model, optimizer, range(2))
    for save in (optimizer.state_dict, run.state_dict):
        with run.compressed(), pytest.raises(RuntimeError, match="saving a state inside run.compressed"):
            save()
        save()


def test_steps_beyond_the_length_that_was_given_are_said_once() -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=2)
    train(model, optimizer, range(2))
    words = r"step 3 is beyond total_steps=2, which counts the calls of SGD\.step\(\) in the whole training"
    with pytest.warns(UserWarning, match=words) as said:
        train(model, optimizer, range(2, 5))
    assert len(said) == 1 and run.clock == 5


def test_a_moment_without_a_length_of_training_names_the_mechanisms_field() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"^pass total_steps= .*: Linear\.end=0\.8 is a fraction of it.*\(PSG\.eps\)"):
        dt.attach(model, sgd(model), recipe())


def test_a_weight_that_is_lost_already_is_named_as_the_cause() -> None:
    model = net()
    optimizer = sgd(model)
    dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    inputs, wanted = batch(0)
    (model(inputs) - wanted).square().mean().backward()
    model[2].bias.grad[0] = float("nan")  # which no rule claims, and nobody looks at
    optimizer.step()
    optimizer.zero_grad()
    model(inputs).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0\.weight' is not finite at step 1.*; '2\.bias' itself holds NaN"):
        optimizer.step()


class _Stumbles(torch.optim.SGD):
    falls = False

    def step(self, closure: Any = None) -> Any:
        if self.falls:
            raise ArithmeticError("on the way")
        return super().step(closure)


def test_a_step_that_raised_after_its_fit_resumes_bitwise() -> None:
    """The running range moves once for that step: in the process that goes on, and in one that resumes."""
    moving = recipe(dt.PSG(gain=8.0, clip=False), target=dt.Uniform(bits=3, range="ema"), fit_every=1, fit_until=1.0)
    ends = []
    for resumed in (False, True):
        model = net()
        optimizer = _Stumbles(model.parameters(), lr=0.1, momentum=0.9)
        dt.attach(model, optimizer, moving, total_steps=STEPS)
        train(model, optimizer, range(4))
        optimizer.falls = True
        with pytest.raises(ArithmeticError):
            train(model, optimizer, [4])
        optimizer.falls = False
        if resumed:
            kept = model.state_dict(), optimizer.state_dict()
            model = net()
            optimizer = _Stumbles(model.parameters(), lr=0.1, momentum=0.9)
            dt.attach(model, optimizer, moving, total_steps=STEPS)
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
        train(model, optimizer, range(4, 8))
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_training_on_after_the_end_is_called_that() -> None:
    model = net()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, recipe(), total_steps=STEPS)
    train(model, optimizer, range(2))
    run.finalize()
    train(model, optimizer, range(2, 4))
    with pytest.raises(RuntimeError, match="written since this run was finalized or detached"):
        run.finalize()


def test_what_is_no_recipe_is_refused_without_printing_it() -> None:
    rule = recipe().rules[0]
    for given, advice in ((rule, "Recipe(...) of it"), ([rule], "Recipe(...) of them"), ("psg-w3", "preset")):
        with pytest.raises(ValueError, match="must be a Recipe") as caught:
            dt.attach(net(), sgd(net()), given)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 120 and (advice.split("(")[0] in str(caught.value))
