"""Stages: rules that follow one another, what they may not undo, and resuming in the middle of any of them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent as dt
from detent.pack import read_header
from detent.targets.forms import Form, Grid

STEPS = 20
Make = Callable[[nn.Module], list[torch.optim.Optimizer]]


def net() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)]


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)]


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    first, *rest = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() != 2]
    return [
        torch.optim.SGD([first], lr=0.1, momentum=0.9),
        torch.optim.AdamW([*rest, *biases], lr=0.02),
    ]


MAKES: dict[str, Make] = {"SGD": sgd, "AdamW": adamw, "SGD and AdamW": two}


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: Iterable[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        inputs, wanted = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(inputs) - wanted).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def prune(keep: float, scope: Any = "tensor") -> dt.Rule:
    return dt.Rule(match="weight", target=dt.TopK(keep=keep, scope=scope), mechanism=dt.HardProjection(every=3))


def grid(match: str, bits: int = 3) -> dt.Rule:
    return dt.Rule(match=match, target=dt.Uniform(bits=bits), mechanism=dt.STE(), fit_every=1)


MIDDLE, ENDS = r"^2\.weight", r"^(0|4)\.weight"
PROGRESSIVE = dt.Recipe(
    stages=[
        dt.Stage(name="prune", share=0.3, rules=[prune(0.5)]),
        dt.Stage(name="prune on", share=0.3, rules=[prune(0.2)]),
        dt.Stage(name="middle", share=0.2, rules=[grid(MIDDLE)]),
        dt.Stage(name="ends", share=0.2, rules=[grid(ENDS)]),
    ]
)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_each_stage_keeps_what_the_ones_before_reached(make: Make) -> None:
    model = net()
    optimizers = make(model)
    run = dt.attach(model, optimizers, PROGRESSIVE, total_steps=STEPS)
    after: dict[int, dict[str, Tensor]] = {0: weights(model)}
    for step in range(STEPS):
        train(model, optimizers, [step])
        after[step + 1] = weights(model)
    for w in after[6].values():  # the map at the end of the first stage
        assert int((w != 0).sum()) == max(1, round(0.5 * w.numel()))
    for step in range(6, STEPS + 1):
        for name, w in after[step].items():
            assert not w[after[6][name] == 0].any(), (step, name)
    for step in range(12, STEPS + 1):
        for name, w in after[step].items():
            assert not w[after[12][name] == 0].any(), (step, name)
            assert int((w != 0).sum()) <= round(0.2 * w.numel())
    assert any((after[9][name] != after[6][name]).any() for name in after[6])  # survivors do move
    for step in range(16, STEPS + 1):  # the middle layer is done
        assert torch.equal(after[step]["2.weight"], after[16]["2.weight"])
    assert len(after[16]["2.weight"].unique()) <= 7
    assert any(not torch.equal(after[20][name], after[16][name]) for name in ("0.weight", "4.weight"))
    assert run.stage == 3


def test_the_end_lies_in_every_last_target() -> None:
    model = net()
    optimizers = sgd(model)
    run = dt.attach(model, optimizers, PROGRESSIVE, total_steps=STEPS)
    train(model, optimizers, range(STEPS))
    encoded = run.encoded()
    assert {name: type(code.target).__name__ for name, code in encoded.items()} == dict.fromkeys(encoded, "Uniform")
    run.finalize()
    for name, code in encoded.items():
        w = dict(model.named_parameters())[name].detach()
        assert torch.equal(code.target.project(w, code.target.restored(w, code.form)), w)
        assert torch.equal(code.decode(), w)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("at", [0, 1, 5, 6, 7, 11, 12, 14, 16, 17, 20])
def test_resumed_anywhere_is_the_unbroken_run(make: Make, at: int) -> None:
    total = STEPS + 3  # training may go on after its announced end
    unbroken = net()
    theirs = make(unbroken)
    run = dt.attach(unbroken, theirs, PROGRESSIVE, total_steps=STEPS)
    train(unbroken, theirs, range(at))
    saved = through_a_file({"model": unbroken.state_dict(), "opt": [o.state_dict() for o in theirs]})
    train(unbroken, theirs, range(at, total))

    model = net()
    mine = make(model)
    again = dt.attach(model, mine, PROGRESSIVE, total_steps=STEPS)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(mine, saved["opt"], strict=True):
        optimizer.load_state_dict(state)
    train(model, mine, range(at, total))
    for name, w in weights(unbroken).items():
        assert torch.equal(weights(model)[name], w), name
    for name, code in run.encoded().items():
        assert torch.equal(again.encoded()[name].decode(), code.decode()), name


def test_resumed_by_the_runs_own_state() -> None:
    unbroken = net()
    theirs = adamw(unbroken)
    run = dt.attach(unbroken, theirs, PROGRESSIVE, total_steps=STEPS)
    train(unbroken, theirs, range(14))
    saved = through_a_file({"model": unbroken.state_dict(), "opt": theirs[0].state_dict(), "run": run.state_dict()})
    train(unbroken, theirs, range(14, STEPS))
    model = net()
    mine = adamw(model)
    again = dt.attach(model, mine, PROGRESSIVE, total_steps=STEPS)
    model.load_state_dict(saved["model"])
    saved["opt"].pop("detent")
    mine[0].load_state_dict(saved["opt"])
    again.load_state_dict(saved["run"])
    train(model, mine, range(14, STEPS))
    for name, w in weights(unbroken).items():
        assert torch.equal(weights(model)[name], w), name


def test_a_state_without_ours_is_refused() -> None:
    model = net()
    optimizers = sgd(model)
    dt.attach(model, optimizers, PROGRESSIVE, total_steps=STEPS)
    train(model, optimizers, range(8))
    state = optimizers[0].state_dict()
    del state["detent"]
    optimizers[0].load_state_dict(state)
    with pytest.raises(RuntimeError, match="was loaded without Detent's part"):
        train(model, optimizers, [8])


def test_a_model_wide_count_holds_under_two_optimizers() -> None:
    recipe = dt.Recipe(
        stages=[
            dt.Stage(share=0.5, rules=[prune(0.3, "model")]),
            dt.Stage(share=0.5, rules=[prune(0.1, "model")]),
        ]
    )
    model = net()
    optimizers = two(model)
    run = dt.attach(model, optimizers, recipe, total_steps=STEPS)
    total = sum(w.numel() for w in weights(model).values())
    train(model, optimizers, range(10))
    assert sum(int((w != 0).sum()) for w in weights(model).values()) == round(0.3 * total)
    train(model, optimizers, range(10, STEPS))
    run.finalize()
    assert sum(int((w != 0).sum()) for w in weights(model).values()) == round(0.1 * total)


def test_a_stage_of_two_optimizers_counts_what_the_last_one_leaves_of_both() -> None:
    """The first optimizer to turn used to count the other's weights as they were before their mapping: all of them."""
    pruned = dt.Rule(
        match="weight", target=dt.TopK(keep=0.1, scope="model"), mechanism=dt.PSG(gain=8.0, toward=dt.Zero())
    )
    left = dt.Rule(match="weight", target=dt.TopK(keep="nonzero", scope="model"), mechanism=dt.STE())
    recipe = dt.Recipe(stages=[dt.Stage(share=0.5, rules=[pruned]), dt.Stage(share=0.5, rules=[left])])
    model = net()
    optimizers = two(model)
    run = dt.attach(model, optimizers, recipe, total_steps=STEPS)
    total = sum(w.numel() for w in weights(model).values())
    for done in (STEPS // 2, STEPS):
        train(model, optimizers, range(run.clock, done))
        counts = [int(encoded.form.named["mask"].sum()) for encoded in run.encoded().values()]
        assert sum(counts) == round(0.1 * total) == sum(int((w != 0).sum()) for w in weights(model).values())


@pytest.mark.parametrize(
    ("target", "mechanism", "more"),
    [
        (dt.TopK(keep=0.3, scope="model"), dt.HardProjection(every=4), {}),
        (dt.TopK(keep=0.3, scope="model"), dt.PSG(gain=2.0), {"fit_every": 4, "fit_until": 1.0}),
        (dt.VectorCodebook(block=1, size=4, book="global"), dt.STE(), {"fit_every": 4, "fit_until": 1.0}),
    ],
    ids=["projection", "PSG", "codebook"],
)
def test_optimizers_whose_clocks_have_parted_resume_bitwise(target: Any, mechanism: Any, more: Any) -> None:
    """The loop calls the first optimizer from step 3 on, so its clock is three steps behind; fits are over both."""
    recipe = dt.Recipe([dt.Rule(match="weight", target=target, mechanism=mechanism, **more)])

    def begin() -> tuple[Any, ...]:
        model = net()
        optimizers = two(model)
        run = dt.attach(model, optimizers, recipe, total_steps=STEPS)
        return model, optimizers, run

    def go(model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        train(model, optimizers if step >= 3 else optimizers[1:], [step])
        model.zero_grad()

    model, optimizers, run = begin()
    saved = {}
    for step in range(12):
        saved[step] = through_a_file([model.state_dict(), [o.state_dict() for o in optimizers]])
        go(model, optimizers, step)
    assert run._drivers[0].step == run._drivers[1].step - 3
    for step in range(4, 12):
        again, others, _ = begin()
        again.load_state_dict(saved[step][0])
        for optimizer, state in zip(others, saved[step][1], strict=True):
            optimizer.load_state_dict(state)
        for each in range(step, 12):
            go(again, others, each)
        for name, w in weights(model).items():
            assert torch.equal(weights(again)[name], w), (step, name)


def test_a_step_that_raises_lets_nothing_back_in() -> None:
    model = net()
    optimizers = sgd(model)
    dt.attach(model, optimizers, PROGRESSIVE, total_steps=STEPS)
    train(model, optimizers, range(17))
    before = weights(model)
    optimizer = optimizers[0]
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def broken() -> None:
        raise OSError("out of power")

    handle = optimizer.register_step_post_hook(lambda *_: broken())
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)
    with pytest.raises(OSError, match="out of power"):
        optimizer.step()
    handle.remove()
    train(model, optimizers, [17])
    after = weights(model)
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert not any(after[name][before[name] == 0].any() for name in ("0.weight", "4.weight"))


def test_the_compressed_life_in_the_middle_is_what_has_been_reached(tmp_path: Path) -> None:
    model = net()
    optimizers = sgd(model)
    run = dt.attach(
        model,
        optimizers,
        dt.Recipe(
            stages=[
                dt.Stage(share=0.5, rules=[grid(MIDDLE)]),
                dt.Stage(share=0.5, rules=[grid(ENDS)]),
            ]
        ),
        total_steps=STEPS,
    )
    train(model, optimizers, range(4))
    assert [row["name"] for row in run.measure()] == ["2.weight"]
    dt.save(run, tmp_path / "early.detent")
    header = read_header(tmp_path / "early.detent")
    assert {row["parameter"]: row["note"] for row in header.plan}["0.weight"] == "claimed by a later stage"
    train(model, optimizers, range(4, 14))
    assert [row["name"] for row in run.measure()] == ["0.weight", "2.weight", "4.weight"]
    dt.save(run, tmp_path / "late.detent")
    fresh = net()
    dt.load(tmp_path / "late.detent", fresh, life="compressed")
    with run.compressed():
        expected = weights(model)
    for name, w in weights(fresh).items():
        assert torch.equal(w, expected[name])


def test_plans_show_their_stages() -> None:
    text = str(PROGRESSIVE.resolve(net()))
    assert "0 prune (30 %)" in text and "3 ends (20 %)" in text
    assert text.count("TopK(keep=0.5)") == 3 and text.count("Uniform(bits=3)") == 3


def test_a_recipe_with_stages_survives_yaml() -> None:
    assert dt.Recipe.from_yaml(PROGRESSIVE.to_yaml()) == PROGRESSIVE
    assert "stages:" in PROGRESSIVE.to_yaml() and "name: prune on" in PROGRESSIVE.to_yaml()


def test_without_training_there_are_no_stages() -> None:
    with pytest.raises(ValueError, match=r"compress\(recipe=...\): its stages follow one another in a training"):
        dt.compress(net(), PROGRESSIVE)
    run = dt.compress(net(), dt.Recipe([grid("weight")]))
    with pytest.raises(ValueError, match=r"compressed\(recipe=...\): its stages"), run.compressed(recipe=PROGRESSIVE):
        pass


def test_an_optional_rule_may_find_nothing() -> None:
    some = dt.Rule(match="conv", target=dt.TopK(keep=0.5), mechanism=dt.STE(), optional=True)
    plan = dt.Recipe([some, grid("weight")]).resolve(net())
    assert {claim.rule for claim in plan.claimed} == {1}
    assert dt.Recipe.from_yaml(dt.Recipe([some]).to_yaml()).rules[0].optional
    with pytest.raises(ValueError, match="every rule of this recipe is optional"):
        dt.Recipe([some]).resolve(net())


@dataclass(frozen=True, kw_only=True)
class _Signs(dt.Target):
    """-1 or +1: no zero."""

    is_exact = True
    scope = "element"  # type: ignore[assignment]

    def fit(self, w: Tensor, layout: dt.Layout | None = None, previous: dt.Params | None = None) -> dt.Params:
        return dt.Params(layout=layout or dt.Layout(shape=tuple(w.shape)))

    def project(self, w: Tensor, params: dt.Params) -> Tensor:
        return torch.where(w.detach() < 0, -1.0, 1.0).to(w.dtype)

    def form(self, w: Tensor, params: dt.Params) -> Form:
        codes = (w.detach() >= 0).to(torch.uint8)
        return Grid(layout=params.layout, dtype=w.dtype, codes=codes, scale=None, n=1, zero=False)

    def typical(self, params: dt.Params) -> Tensor:
        return torch.tensor(0.5)


def test_a_target_without_zero_after_pruning_is_refused_before_training() -> None:
    recipe = dt.Recipe(
        stages=[
            dt.Stage(share=0.5, rules=[prune(0.5)]),
            dt.Stage(share=0.5, rules=[dt.Rule(match="weight", target=_Signs(), mechanism=dt.STE())]),
        ]
    )
    model = net()
    with pytest.raises(ValueError, match=r"stages\[1\]: _Signs\(\) has no zero for the weights of '0.weight'"):
        dt.attach(model, sgd(model), recipe, total_steps=STEPS)


ONE = dt.Stage(share=1.0, rules=[prune(0.5)])
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no share": (lambda: dt.Stage(share=0.0, rules=[prune(0.5)]), r"Stage(share=0.0)"),
    "a share that is no number": (lambda: dt.Stage(share="0.5", rules=[prune(0.5)]), "share='0.5'): must be a number"),  # type: ignore[arg-type]
    "a name that is none": (lambda: dt.Stage(share=1.0, rules=[prune(0.5)], name=3), "name=3): must be a string"),  # type: ignore[arg-type]
    "no rules": (lambda: dt.Stage(share=0.5, rules=[]), "Stage(rules=[])"),
    "a rule that is none": (lambda: dt.Stage(share=0.5, rules=["weight"]), "must be a Rule, not str"),  # type: ignore[list-item]
    "rules that are a number": (lambda: dt.Stage(share=0.5, rules=torch.ones(())), "must be a list"),  # type: ignore[arg-type]
    "a stage that is none": (lambda: dt.Recipe(stages=[prune(0.5)]), "must be a Stage, not Rule"),  # type: ignore[list-item]
    "both": (lambda: dt.Recipe([prune(0.5)], stages=[ONE]), "give one of them"),
    "too little": (lambda: dt.Recipe(stages=[dt.Stage(share=0.5, rules=[prune(0.5)])]), "add up to 0.5, not to 1"),
    "no length": (lambda: _attach(None), "the stages of a recipe get their shares of it"),
    "too short": (lambda: _attach(2), "gets no step of attach(total_steps=2)"),
    "yaml: both": (lambda: dt.Recipe.from_yaml("rules: []\nstages: []"), "the one key 'rules'"),
    "yaml: unknown key": (
        lambda: dt.Recipe.from_yaml("stages:\n- {share: 1, rule: []}"),
        "stages[0]: must be a mapping with share, rules",
    ),
    "yaml: misspelt key": (
        lambda: dt.Recipe.from_yaml("stages:\n- {share: 1, rules: [], nam: a}"),
        "stages[0]: Stage has no field 'nam'; did you mean 'name'?",
    ),
    "yaml: no share": (
        lambda: dt.Recipe.from_yaml("stages:\n- rules: [{match: a, keep: true}]"),
        "stages[0].share: must be given",
    ),
    "yaml: share too large": (
        lambda: dt.Recipe.from_yaml("stages:\n- {share: 2, rules: [{match: a, keep: true}]}"),
        "stages[0]: Stage(share=2)",
    ),
}


def _attach(total_steps: int | None) -> dt.Run:
    model = net()
    return dt.attach(model, sgd(model), PROGRESSIVE, total_steps=total_steps)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_stages_end_in_a_sentence(case: str) -> None:
    make, says = WRONG[case]
    with pytest.raises(ValueError) as caught:
        make()
    assert says in str(caught.value)


def test_weight_decay_that_differs_between_stages_is_refused() -> None:
    def rule(decay: float) -> dt.Rule:
        return dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.STE(), weight_decay=decay)

    recipe = dt.Recipe(stages=[dt.Stage(share=0.5, rules=[rule(d)]) for d in (0.1, 0.0)])
    with pytest.raises(ValueError, match="'0.weight': its stages ask for weight decay"):
        recipe.param_groups(net(), lr=0.1)


@pytest.mark.filterwarnings("ignore:ADMM maps whole weights to zero")
def test_the_recipe_in_the_readme_trains_to_its_end() -> None:
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    recipe = dt.Recipe.from_yaml(text.split("```yaml\n")[1].split("```")[0])
    assert [stage.name for stage in recipe.stages] == ["prune", "prune on", "middle", "ends"]
    model = net()
    optimizers = adamw(model)
    run = dt.attach(model, optimizers, recipe, total_steps=40)
    train(model, optimizers, range(40))
    run.finalize()
    total = sum(w.numel() for w in weights(model).values())
    assert 0 < sum(int((w != 0).sum()) for w in weights(model).values()) <= max(1, round(0.03 * total))
    assert all(len(w.unique()) <= 7 for w in weights(model).values())


# --- what an earlier stage pruned --------------------------------------------------------------------------------

NONZERO = dt.TopK(keep="nonzero")
LATE: dict[str, dt.Mechanism] = {
    "STE": dt.STE(),
    "ADMM": dt.ADMM(rho=0.01, every=5, until=0.5),
    "PSG": dt.PSG(gain=8.0),
    "PartialFreeze": dt.PartialFreeze(),
}
WITHOUT_ZERO: dict[str, dt.Target] = {
    "learned a row": dt.LearnedLevels(k=4, granularity="channel"),
    "learned": dt.LearnedLevels(k=4),
    "uniform a row": dt.Uniform(bits=3, zero=False, granularity="channel"),
    "binary a row": dt.Binary(granularity="channel"),
    "powers a row": dt.PowerOfTwo(bits=3, zero=False, granularity="channel"),
}


def in_turn(*rules: tuple[dt.Target, dt.Mechanism], match: str = "weight") -> dt.Recipe:
    each = [dt.Rule(match=match, target=target, mechanism=mechanism) for target, mechanism in rules]
    return dt.Recipe(stages=[dt.Stage(rules=[rule], share=1 / len(each)) for rule in each])


def one_layer() -> tuple[Any, torch.optim.Optimizer, Callable[[range], None]]:
    """A layer whose rows differ in size by ten, so that the gain of a level differs from row to row as well."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(0, 1, 16)[:, None])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)

    def run(steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (layer(x) - 1).square().mean().backward()
            optimizer.step()

    return layer, optimizer, run


@pytest.mark.parametrize("mechanism", LATE)
@pytest.mark.parametrize("survivors", WITHOUT_ZERO)
def test_what_a_stage_pruned_is_never_chosen_again(survivors: str, mechanism: str, tmp_path: Path) -> None:
    """A zero may gain more than a small survivor in a row of large levels: it came back, and the survivor was lost."""
    layer, optimizer, train_on = one_layer()
    levels = dt.SparseLevels(sparse=NONZERO, survivors=WITHOUT_ZERO[survivors])
    recipe = in_turn((dt.NM(n=1, m=4), dt.Masked()), (levels, LATE[mechanism]))
    run = dt.attach(layer, optimizer, recipe, total_steps=60)
    train_on(range(30))
    left = layer.weight.detach() != 0
    assert int(left.sum()) == 64
    train_on(range(30, 60))
    seen = layer.weight.detach().clone()
    with run.compressed():
        assert torch.equal(layer.weight != 0, left)
        assert mechanism != "STE" or torch.equal(layer.weight, seen), "what the forward pass saw is the compressed life"
    dt.save(run, tmp_path / "x.detent", "compressed")
    run.finalize()
    assert torch.equal(layer.weight != 0, left)
    other = nn.Linear(16, 16, bias=False)
    dt.load(tmp_path / "x.detent", other, "compressed")
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("count", [30, 100])
@pytest.mark.parametrize("mechanism", LATE)
def test_a_count_is_taken_among_what_is_left(count: int, mechanism: str) -> None:
    layer, optimizer, train_on = one_layer()
    levels = dt.SparseLevels(sparse=dt.TopK(keep=count), survivors=dt.Binary(granularity="channel"))
    run = dt.attach(
        layer, optimizer, in_turn((dt.TopK(keep=60), dt.Masked()), (levels, LATE[mechanism])), total_steps=60
    )
    train_on(range(30))
    gone = run.state_dict()["weights"]["weight"]["zeros"]
    assert int(gone.sum()) == 196
    train_on(range(30, 60))
    run.finalize()
    left = int((layer.weight != 0).sum())
    assert not bool((layer.weight[gone] != 0).any()) and 0 < left <= min(count, 60)
    # PSG fits once, where it starts: a channel that had no survivor then has the level 0 alone, and may take a place.
    assert left == min(count, 60) or mechanism == "PSG"


def test_blocks_that_must_be_filled_up_want_a_level_zero() -> None:
    layer, optimizer, train_on = one_layer()
    first = (dt.TopK(keep=20), dt.Masked())

    def second(survivors: dt.Target) -> tuple[dt.Target, dt.Mechanism]:
        return dt.SparseLevels(sparse=dt.NM(n=1, m=4), survivors=survivors), dt.STE()

    with pytest.raises(ValueError, match=r"that an earlier stage pruned; it keeps more than is left: use TopK\(keep="):
        dt.attach(layer, optimizer, in_turn(first, second(dt.Binary())), total_steps=20)
    run = dt.attach(layer, optimizer, in_turn(first, second(dt.Ternary())), total_steps=20)
    train_on(range(20))
    run.finalize()
    assert int((layer.weight != 0).sum()) <= 20


@pytest.mark.parametrize("mechanism", LATE)
def test_zeros_of_survivors_on_levels_hold_in_later_stages(mechanism: str) -> None:
    layer, optimizer, train_on = one_layer()
    first = dt.SparseLevels(sparse=dt.TopK(keep=60), survivors=dt.Uniform(bits=6))
    second = dt.SparseLevels(sparse=dt.TopK(keep=30), survivors=dt.Uniform(bits=4))
    recipe = in_turn((first, dt.HardProjection(every=5)), (second, LATE[mechanism]))
    run = dt.attach(layer, optimizer, recipe, total_steps=60)
    train_on(range(30))
    gone = run.state_dict()["weights"]["weight"]["zeros"]
    assert int(gone.sum()) >= 196
    for step in range(30, 60):
        train_on(range(step, step + 1))
        assert not bool((layer.weight[gone] != 0).any()), step
    run.finalize()
    assert not bool((layer.weight[gone] != 0).any())


def test_levels_without_zero_after_survivors_on_levels_are_refused() -> None:
    layer, optimizer, _ = one_layer()
    first = dt.SparseLevels(sparse=dt.TopK(keep=60), survivors=dt.Uniform(bits=6))
    with pytest.raises(ValueError, match=r"stages\[1\]: Binary\(\) has no zero for the weights of 'weight'"):
        dt.attach(layer, optimizer, in_turn((first, dt.HardProjection()), (dt.Binary(), dt.STE())), total_steps=20)


def test_a_codebook_after_a_pruning_needs_a_zero_that_stays() -> None:
    """A codeword that pruned kernels shared with others moved, and the optimizer was blamed for moving them apart."""

    def attach(target: dt.Target, mechanism: dt.Mechanism) -> tuple[Any, torch.optim.Optimizer, dt.Run]:
        torch.manual_seed(3)
        layer = nn.Conv2d(16, 16, 3)
        recipe = in_turn((dt.Structured(group="filter", keep=0.5), dt.Masked()), (target, mechanism))
        optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
        return layer, optimizer, dt.attach(layer, optimizer, recipe, total_steps=20)

    for mechanism in (dt.CodebookLearning(), dt.STE()):
        with pytest.raises(ValueError, match=r"KernelCodebook\(size=32\) has no zero for .* give it zero=True"):
            attach(dt.KernelCodebook(size=32), mechanism)
        for target in (dt.KernelCodebook(size=32, zero=True), dt.LearnedLevels(k=5, granularity="channel")):
            layer, optimizer, run = attach(target, mechanism)
            for step in range(20):
                optimizer.zero_grad()
                layer(torch.randn(2, 16, 6, 6)).sub(1).square().mean().backward()
                optimizer.step()
                assert step < 9 or int(layer.weight.reshape(16, -1).any(1).sum()) <= 8
            run.finalize()
            assert int(layer.weight.reshape(16, -1).any(1).sum()) <= 8


def test_a_codeword_is_zero_as_a_whole_only() -> None:
    layer = nn.Conv2d(16, 16, 3)
    recipe = in_turn((dt.TopK(keep=0.02), dt.Masked()), (dt.KernelCodebook(size=32, zero=True), dt.STE()))
    with pytest.raises(ValueError, match=r"stages\[1\]: KernelCodebook\(.*prune whole filters or channels"):
        dt.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), recipe, total_steps=20)


# --- stopped early ------------------------------------------------------------------------------------------------


def test_a_plan_says_of_every_stage_why_a_weight_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    last = dt.Rule(match="@last", target=dt.Binary(), mechanism=dt.STE())
    everywhere = dt.Rule(match="weight$", target=dt.Binary(), mechanism=dt.STE())
    for stages in ([everywhere], [last]), ([last], [everywhere]):
        plan = dt.Recipe(stages=[dt.Stage(rules=rules, share=0.5) for rules in stages]).resolve(model)
        reasons = {claim.name: claim.reason for claim in plan.claims}
        assert reasons["1.weight"].startswith("passed over: normalisation weight"), stages
        assert reasons["1.bias"] == "no rule matches" and reasons["0.weight"] == reasons["3.weight"] == ""


def _admm(until: float = 0.5, **more: Any) -> dt.Rule:
    return dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.ADMM(until=until, **more))


def _soft(mechanism: dt.Mechanism) -> dt.Rule:
    return dt.Rule(match="weight", target=dt.Binary(), mechanism=mechanism)


FREEZE = dt.Rule(match="weight", target=dt.Binary(), mechanism=dt.PartialFreeze(start=0.1, every=5))


@pytest.mark.parametrize(
    ("recipe", "steps", "says"),
    [
        (dt.Recipe([_admm()]), 9, r"after 9 of 20 steps: the mapping of ADMM\(until=0.5\) is at step 10, so"),
        (dt.Recipe([_admm()]), 10, None),
        (dt.Recipe([_admm(until=0.9, finish=None)]), 3, None),
        (
            dt.Recipe([_soft(dt.MirrorDescent())]),
            2,
            r"after 2 of 20 steps: the end of MirrorDescent.beta is at step 20, so",
        ),
        (dt.Recipe([_soft(dt.MirrorDescent())]), 20, None),
        (dt.Recipe([_soft(dt.PMF(beta=dt.Exponential(first=1, last=9, end=7)))]), 6, r"of PMF.beta is at step 7, so"),
        (dt.Recipe([_soft(dt.PMF(beta=dt.Exponential(first=1, last=9, end=7)))]), 7, None),
        (dt.Recipe([_soft(dt.MirrorDescent(beta=dt.Linear(first=1, last=9, end=99)))]), 19, "is at step 20, so"),
        (dt.Recipe([_soft(dt.MirrorDescent(beta=dt.Linear(first=1, last=9, end=99)))]), 20, None),
        (dt.Recipe([_soft(dt.MirrorDescent(beta=5.0))]), 1, None),
        (dt.Recipe([_soft(dt.MirrorDescent(start=1.0))]), 1, None),
        (dt.Recipe([_soft(dt.PARQ())]), 19, r"the end of PARQ.inverse_slope is at step 20, so"),
        (dt.Recipe([_soft(dt.PARQ(start=20))]), 19, None),
        (dt.Recipe([FREEZE]), 11, r"after 11 of 20 steps: the last of PartialFreeze.* is at step 12, so"),
        (dt.Recipe([FREEZE]), 12, None),
        (dt.Recipe(stages=[dt.Stage(rules=[_admm()], share=0.5)] * 2), 9, "stage 1 of 2 is not over"),
        (dt.Recipe(stages=[dt.Stage(rules=[_admm()], share=0.5)] * 2), 14, r"is at step 5 of its stage, so"),
        (dt.Recipe(stages=[dt.Stage(rules=[_admm()], share=0.5)] * 2), 15, None),
    ],
)
def test_the_compressed_life_of_a_training_stopped_early_says_so(
    recipe: dt.Recipe, steps: int, says: str | None, tmp_path: Path
) -> None:
    model = net()
    optimizers = sgd(model)
    run = dt.attach(model, optimizers, recipe, total_steps=STEPS)
    train(model, optimizers, range(steps))
    with run.compressed():
        pass
    ends = [lambda life=life: dt.save(run, tmp_path / "m.detent", life=life) for life in ("both", "compressed")]  # type: ignore[arg-type]
    for end in (*ends, run.finalize):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            end()
        assert len(caught) == (says is not None), [str(each.message) for each in caught]
        if says is not None:
            assert re.search(says, str(caught[0].message)) and caught[0].filename == __file__
