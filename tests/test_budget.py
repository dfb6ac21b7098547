"""Budgets: what they mean, that files keep to them, and that bytes go where they buy most."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import detent as dt
from detent.amounts import budget_bytes
from detent.pack import read_header


def _mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[2].weight.mul_(5.0)
    return model.to(dtype)


def _conv(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.BatchNorm2d(16)
    )
    for _ in range(3):
        model(3 * torch.randn(4, 3, 12, 12))
    return model.eval()


def _transformer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.Embedding(50, 32), layer, nn.LSTM(32, 16))


MODELS: dict[str, Any] = {"mlp": _mlp, "conv": _conv, "transformer": _transformer}


def _errors(run: dt.Run) -> dict[str, float]:
    own = dict(run.model.named_parameters())
    return {
        n: float((item.decode().double() - own[n].detach().double()).square().sum())
        for n, item in run.encoded().items()
    }


def _file(model: nn.Module, recipe: dt.Recipe, folder: Path, budget: dt.Budget = 1 << 40) -> int:
    return dt.save(dt.compress(model, recipe), folder / "m.detent", life="compressed", budget=budget)


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1234, 1234), ("84 kB", 84_000), ("84kB", 84_000), ("1.5 MB", 1_500_000), ("2 KiB", 2048), ("1 GiB", 2**30),
        ("16,000,000", 16_000_000), ("10x", 400), ("2.5 bits", 312), ("3 bits a weight", 375), (" 7 bytes ", 7),
        ("1B", 1),
    ],
)  # fmt: skip
def test_a_budget_in_words(budget: dt.Budget, expected: int) -> None:
    assert budget_bytes(budget, nn.Linear(100, 10, bias=False), "save") == expected


@pytest.mark.parametrize(
    "budget", [0, -1, True, 3.5, "", "kB", "84 kb", "84 K", "1e3", "0x", "-3 kB", "0.1 B", "x", None, "½ MB"]
)
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"save\(budget=.*\): must be a number of bytes"):
        budget_bytes(budget, nn.Linear(4, 4), "save")


# --- the promise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_a_file_keeps_to_any_budget(name: str, seed: int, tmp_path: Path) -> None:
    model = MODELS[name](seed)
    numbers = sum(p.numel() for p in model.parameters())
    budget = int(numbers * np.random.default_rng(seed).uniform(0.25, 0.6)) + 900
    recipe = dt.allocate(model, budget)
    run = dt.compress(model, recipe)
    size = dt.save(run, tmp_path / "m.detent", life="compressed", budget=budget)
    assert 0.95 * budget < size <= budget
    twin = MODELS[name](seed + 100)
    dt.load(tmp_path / "m.detent", twin, life="compressed")
    with run.compressed():
        for (key, mine), (_, theirs) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
            assert torch.equal(mine, theirs), key


def test_a_budget_that_nothing_fits_says_what_would(tmp_path: Path) -> None:
    model = _mlp()
    with pytest.raises(
        ValueError, match=r"100 bytes are [\d,]+ too few; the smallest file of these choices has ([\d,]+)"
    ) as caught:
        dt.allocate(model, 100)
    least = int(str(caught.value).rpartition(" ")[2].replace(",", ""))
    assert _file(model, dt.allocate(model, least + 40), tmp_path) <= least + 40


def test_more_bytes_than_a_model_needs_leave_it_nearly_as_it_is(tmp_path: Path) -> None:
    model = _mlp()
    run = dt.compress(model, dt.allocate(model, "1 MB"))
    assert all(error < 1e-5 for error in _errors(run).values())


def test_a_file_beyond_its_budget_is_not_written(tmp_path: Path) -> None:
    model = _mlp()
    run = dt.compress(model, dt.Recipe.preset("uniform-w4"))
    path = tmp_path / "m.detent"
    path.write_bytes(b"what was there")
    size = dt.save(run, tmp_path / "other.detent", life="compressed")
    with pytest.raises(ValueError, match=rf"would be {size:,} bytes, 1 more than the {size - 1:,} allowed"):
        dt.save(run, path, life="compressed", budget=size - 1)
    assert path.read_bytes() == b"what was there" and len(list(tmp_path.iterdir())) == 2
    assert dt.save(run, path, life="compressed", budget=size) == size
    with pytest.raises(ValueError, match='life="compressed" takes less'):
        dt.save(run, path, budget=size)


def test_statistics_of_batchnorm_go_on_16_bits_and_the_card_says_it(tmp_path: Path) -> None:
    model = _conv()
    run = dt.compress(model, dt.allocate(model, "1500 B"))
    dt.save(run, tmp_path / "m.detent", life="compressed", budget="1500 B")
    assert read_header(tmp_path / "m.detent").card["batchnorm"] == "own, rounded to float16"
    with run.compressed():
        mean = model[1].running_mean.clone()
    assert torch.equal(mean, mean.half().float()) and not torch.equal(mean, model[1].running_mean)


def test_a_half_precision_model(tmp_path: Path) -> None:
    model = _mlp(dtype=torch.bfloat16)
    assert _file(model, dt.allocate(model, "4 bits"), tmp_path) <= budget_bytes("4 bits", model, "save")


INPUTS: dict[str, Any] = {
    "mlp": lambda: torch.randn(64, 48) @ torch.randn(48, 48),
    "conv": lambda: torch.randn(16, 3, 12, 12).cumsum(2),
    "transformer": lambda: torch.randint(50, (8, 12)),
}


def _calibration(name: str, kind: str) -> Any:
    return None if kind == "none" else "prior" if kind == "prior" else [INPUTS[name]()]


def _keeps_its_promise(name: str, kind: str, seed: int, folder: Path) -> None:
    """A file of at most the budget, or none and the bytes of one that would be written."""
    draw = np.random.default_rng(seed)
    model, path = MODELS[name](seed), folder / f"{name}-{seed}.detent"
    calibration = _calibration(name, kind)
    numbers = sum(p.numel() for p in model.parameters())
    budget = int(numbers * np.exp(draw.uniform(np.log(0.02), np.log(3.0)))) + int(draw.integers(0, 1500))
    choices: Any = draw.choice(["step", "widths"])
    try:
        recipe = dt.allocate(model, budget, choices=choices, calibration=calibration)
    except ValueError as error:
        over, least = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) too few.* has ([\d,]+)$", str(error))[0])
        assert budget + over == least
        recipe = dt.allocate(model, least, choices=choices, calibration=calibration)
        budget = least
    run = dt.compress(model, recipe, calibration=calibration)
    size = dt.save(run, path, life="compressed", budget=budget)
    assert size == path.stat().st_size <= budget
    with pytest.raises(ValueError, match=f"would be {size:,} bytes, 1 more than"):
        dt.save(run, folder / "over.detent", life="compressed", budget=size - 1)
    assert not (folder / "over.detent").exists()
    dt.load(path, MODELS[name](seed + 1000), life="compressed")


@pytest.mark.filterwarnings("ignore:calibrate:UserWarning")  # of tables and LSTMs
@pytest.mark.parametrize("kind", ["none", "prior", "inputs"])
@pytest.mark.parametrize("name", MODELS)
def test_the_promise(name: str, kind: str, tmp_path: Path) -> None:
    _keeps_its_promise(name, kind, len(name + kind), tmp_path)


@pytest.mark.filterwarnings("ignore:calibrate:UserWarning")  # of tables and LSTMs
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "prior", "inputs"])
@pytest.mark.parametrize("name", MODELS)
def test_the_promise_over_a_hundred_budgets(name: str, kind: str, tmp_path: Path) -> None:
    for seed in range(100, 112):
        _keeps_its_promise(name, kind, seed, tmp_path)


@pytest.mark.filterwarnings("ignore:calibrate:UserWarning")  # of tables and LSTMs
@pytest.mark.parametrize("kind", ["prior", "inputs"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_are_the_calibrated_codes(name: str, kind: str, tmp_path: Path) -> None:
    model, calibration = MODELS[name](), _calibration(name, kind)
    budget = sum(p.numel() for p in model.parameters()) // 3 + 900
    recipe = dt.allocate(model, budget, calibration=calibration)
    run = dt.compress(model, recipe, calibration=calibration)
    assert run.calibration is not None and run.calibration.tensors
    size = dt.save(run, tmp_path / "m.detent", life="compressed", budget=budget)
    assert 0.93 * budget < size <= budget
    assert size != _file(model, recipe, tmp_path), "the nearest places take as many bytes: this shows nothing"


def test_a_loader_is_read_once() -> None:
    model = _conv()
    batches = [INPUTS["conv"](), INPUTS["conv"]()]
    once = dt.allocate(model, "1500 B", calibration=iter(batches))
    assert once == dt.allocate(model, "1500 B", calibration=batches)


def test_a_budget_on_disk_counts_notes_and_coding(tmp_path: Path) -> None:
    save_file(_mlp().state_dict(), tmp_path / "w.safetensors")
    out = tmp_path / "m.detent"
    cases: list[dict[str, Any]] = [{}, {"notes": {"who": "x" * 500}}, {"coding": "bitpacked"}, {"calibration": None}]
    for more in cases:
        made = dt.compress_to_budget(tmp_path / "w.safetensors", out, "3 kB", **more)
        assert 2900 < made.bytes == out.stat().st_size <= 3000
        assert ("by a prior" in " ".join(made.notes)) == ("calibration" not in more)
    with pytest.raises(ValueError, match="inputs go with model="):
        dt.compress_to_budget(tmp_path / "w.safetensors", out, "3 kB", calibration=[torch.randn(4, 48)])
    inputs = [INPUTS["mlp"]()]
    made = dt.compress_to_budget(tmp_path / "w.safetensors", out, "3 kB", calibration=inputs, model=_mlp(9))
    assert made.bytes <= 3000 and made.notes[0].startswith("Places of 3 tensors were chosen with the inputs")


def test_training_is_calibrated_afterwards() -> None:
    with pytest.raises(ValueError, match="calibrate what training leaves"):
        dt.allocate(_mlp(), "3 kB", calibration="prior", mechanism=dt.STE())


# --- where the bytes go -------------------------------------------------------------------------------------------


def test_one_step_errs_less_than_one_width(tmp_path: Path) -> None:
    model = _mlp()
    rest = dt.Rule(match=".", include=".", target=dt.Round())
    fixed = dt.Recipe([dt.Rule(match="@weights", target=dt.Uniform(bits=3, granularity="channel")), rest])
    budget = _file(model, fixed, tmp_path)
    free = dt.allocate(model, budget)
    errors = [sum(_errors(dt.compress(model, recipe)).values()) for recipe in (fixed, free)]
    assert errors[1] < 0.6 * errors[0]
    assert len({rule.target.step for rule in free.rules if isinstance(rule.target, dt.UniformStep)}) == 1


CHOICES = (dt.Ternary(granularity="channel"), dt.Uniform(bits=3, granularity="channel"), dt.Uniform(bits=6))


@pytest.mark.parametrize("seed", range(3))
def test_among_targets_it_is_near_the_best_of_all_ways(seed: int, tmp_path: Path) -> None:
    model = _mlp(seed)
    names = ["0.weight", "2.weight", "4.weight"]
    found: dict[tuple[int, ...], tuple[int, float]] = {}
    for way in itertools.product(range(3), repeat=3):
        rules = [dt.Rule(match=f"^{n}$", target=CHOICES[i]) for n, i in zip(names, way, strict=True)]
        recipe = dt.Recipe([*rules, dt.Rule(match=".", include=".", target=dt.Round())])
        errors = _errors(dt.compress(model, recipe))
        found[way] = (_file(model, recipe, tmp_path), sum(errors[n] for n in names))
    sizes = sorted(size for size, _ in found.values())
    for budget in (sizes[3] + 60, sizes[13] + 60, sizes[-1] + 60):
        recipe = dt.allocate(model, budget, choices=CHOICES)
        run = dt.compress(model, recipe)
        assert dt.save(run, tmp_path / "m.detent", life="compressed", budget=budget) <= budget
        error = sum(_errors(run)[n] for n in names)
        best = min(e for size, e in found.values() if size <= budget)
        alike = [e for way, (size, e) in found.items() if size <= budget - 100 and len({*way}) == 1]
        assert error <= 1.5 * best and error <= min(alike, default=error)


def test_widths_are_for_hardware(tmp_path: Path) -> None:
    model = _mlp()
    recipe = dt.allocate(model, "3.5 bits", choices="widths")
    targets = [rule.target for rule in recipe.rules[:-1]]
    assert all(isinstance(target, dt.Uniform) for target in targets) and len(targets) > 1
    _file(model, recipe, tmp_path, "3.5 bits")


@pytest.mark.parametrize("choices", ["step", "widths"])
def test_importance_draws_bytes(choices: Any) -> None:
    model = _mlp()
    plain = _errors(dt.compress(model, dt.allocate(model, "3.5 bits", choices=choices)))
    marked = {"0.weight": 100.0, "2.weight": torch.full((32, 64), 0.01)}
    drawn = _errors(dt.compress(model, dt.allocate(model, "3.5 bits", choices=choices, importance=marked)))
    assert drawn["0.weight"] < 0.5 * plain["0.weight"] and drawn["2.weight"] > plain["2.weight"]


def test_a_measured_loss_decides_and_leaves_no_trace() -> None:
    model = _mlp()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.randn(64, 48)
    with torch.no_grad():
        wanted = model(x)
        model[2].weight[:, :32] = 0  # what comes from these units does not matter

    @torch.no_grad()
    def loss(net: nn.Module) -> float:
        return float((net(x) - wanted).square().mean())

    model.load_state_dict(before)
    recipe = dt.allocate(model, "3.5 bits", choices="widths", loss=loss)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    run = dt.compress(model, recipe)
    other = dt.compress(model, dt.allocate(model, "3.5 bits", choices="widths"))
    with run.compressed():
        measured = loss(model)
    with other.compressed():
        assert measured < 1.3 * loss(model)


def test_rules_go_before_and_are_paid_for(tmp_path: Path) -> None:
    model = _mlp()
    rules = dt.Recipe([dt.Rule(match="^4", keep=True), dt.Rule(match="^0.weight", target=dt.Binary())])
    recipe = dt.allocate(model, "3 kB", rules=rules)
    encoded = dt.compress(model, recipe).encoded()
    assert encoded["0.weight"].target == dt.Binary() and "4.weight" not in encoded
    assert _file(model, recipe, tmp_path) <= 3000
    assert dt.Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_fisher_is_the_mean_square_of_gradients() -> None:
    model = nn.Linear(3, 1, bias=False)
    rows = [torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0, 0.0, 1.0]])]

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).sum()

    found = dt.fisher(model, rows, loss)["weight"]
    assert found.tolist() == [[5.0, 2.0, 0.5]]
    with pytest.raises(ValueError, match="there were none"):
        dt.fisher(model, [], loss)
    with pytest.raises(ValueError, match="no parameter has a part"):
        dt.fisher(model, rows, lambda net, x: torch.zeros((), requires_grad=True) * x.sum())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"choices": "bits"}, 'must be "step", "widths" or a list of targets'),
        ({"choices": []}, "at least one"),
        ({"choices": ["step"]}, "at least one"),
        ({"loss": lambda net: 0.0}, "give importance="),
        ({"importance": {"nowhere": 1.0}}, "'nowhere' is no parameter"),
        ({"importance": {"0.weight": torch.ones(3)}}, "give a number or a tensor of that shape"),
        ({"importance": {"0.weight": -1.0}}, "finite and >= 0"),
        ({"importance": dict.fromkeys(["0.weight", "2.weight", "4.weight"], 0.0)}, "all of it is 0"),
        ({"choices": "widths", "loss": lambda net: float("nan")}, "must be a finite number"),
        ({"choices": [dt.VectorCodebook(block=7, size=4)]}, "none takes"),
    ],
)
def test_refusals(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dt.allocate(_mlp(), "4 bits", **arguments)


# --- training under a budget --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", [dt.STE(), dt.PSG(), dt.BinaryRelax(), dt.ADMM(every=10, until=50)], ids=str)
def test_training_under_a_budget_ends_in_its_file(mechanism: dt.Mechanism, tmp_path: Path) -> None:
    model = _mlp()
    x, wanted = torch.randn(256, 48), torch.randn(256, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    run = dt.attach(model, optimizer, dt.allocate(model, "3 kB", mechanism=mechanism), total_steps=60)
    for _ in range(60):
        optimizer.zero_grad()
        (model(x) - wanted).square().mean().backward()
        optimizer.step()
    for budget in (3000, 2500):  # any other size from the same weights
        recipe = dt.allocate(run, budget)
        size = dt.save(run, tmp_path / "m.detent", life="compressed", recipe=recipe, budget=budget)
        assert 0.97 * budget < size <= budget
        twin = _mlp(5)
        dt.load(tmp_path / "m.detent", twin, life="compressed")
        with run.compressed(recipe=recipe):
            assert torch.equal(model[0].weight, twin[0].weight)


def test_training_gets_more_of_a_budget_than_rounding(tmp_path: Path) -> None:
    model, teacher = _mlp(), _mlp(3)
    x = torch.randn(512, 48)
    wanted = teacher(x).detach()

    def train(recipe: dt.Recipe | None, steps: int) -> dt.Run | None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        run = None if recipe is None else dt.attach(model, optimizer, recipe, total_steps=steps)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
        return run

    def loss(run: dt.Run, recipe: dt.Recipe | None) -> float:
        with run.compressed(recipe=recipe), torch.no_grad():
            return float((model(x) - wanted).square().mean())

    train(None, 300)
    rounded = loss(dt.compress(model, dt.allocate(model, "2 kB")), None)
    run = train(dt.allocate(model, "2 kB", mechanism=dt.STE()), 200)
    assert run is not None
    assert loss(run, dt.allocate(run, "2 kB")) < 0.5 * rounded


def test_training_takes_one_step_for_all() -> None:
    with pytest.raises(ValueError, match='trains with choices="step"'):
        dt.allocate(_mlp(), "3 kB", choices="widths", mechanism=dt.STE())
    with pytest.raises(ValueError, match="leave importance out"):
        dt.allocate(_mlp(), "3 kB", mechanism=dt.STE(), importance={"0.weight": 5.0})
