"""The script that PSG's defaults are chosen by: a tiny run of it, its arithmetic, and what it may not look at."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import detent as dt
from papers.psg import defaults

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install detent[demo]")

CHOICE = ["--variant", "base", "--variant", "SGD", "--variant", "mean unit, gain 4", "--variant", "paper 150"]


@pytest.fixture
def run(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(defaults.main)

    def go(*arguments):
        where = ["--out", str(tmp_path / "out"), "--records", str(tmp_path)]
        return CliRunner().invoke(app, [*arguments, *where], catch_exceptions=False)

    return go


@pytest.fixture(autouse=True)
def _keep_torch_settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_a_tiny_run_writes_a_record_and_a_second_one_trains_nothing(run, tmp_path, monkeypatch):
    tiny = ["digits-sgd", "--seed", "0", "--bits", "2", "--epochs", "1", "--subset", "128", *CHOICE]
    assert run(*tiny).exit_code == 0
    record = json.loads((tmp_path / "psg-defaults-digits-sgd.json").read_text())
    rows = record["results"]["rows"]
    assert {row["variant"] for row in rows} == {"base", "SGD", "mean unit, gain 4", "paper 150"}
    assert {row["bits"] for row in rows if row["variant"] == "SGD"} == {4, 3, 2}
    for row in rows:
        assert row["steps"] == 2
        assert all(0 <= row[life]["accuracy"] <= 100 for life in ("full", "data_free", "batchnorm"))
    assert record["config"]["held_out"] == 359
    assert record["config"]["subset"] == 128
    summary = {entry["variant"]: entry for entry in record["results"]["summary"]}
    assert summary["base"]["data_free_minus_base"]["mean"] == 0
    assert summary["SGD"]["widths"] == [2]  # only what the base has too

    monkeypatch.setattr(defaults, "train_one", lambda *_: pytest.fail("trained again"))
    assert run(*tiny).exit_code == 0


def test_an_unknown_task_or_variant_is_refused(run):
    for arguments in (["digit"], ["digits-sgd", "--variant", "gain 13"]):
        assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_only_the_train_split_is_read_and_the_held_out_part_is_not_trained_on(seed, tmp_path, monkeypatch):
    asked = []
    real = defaults.digits
    monkeypatch.setattr(defaults, "digits", lambda split: asked.append(split) or real(split))
    bench = defaults.Bench.of(defaults.TASKS["digits-sgd"], seed, None, tmp_path)
    assert asked == ["train"]
    assert (len(bench.train), len(bench.held_out)) == (1437 - 359, 359)
    whole = real("train").images.flatten(1)
    parts = torch.cat([bench.train.images, bench.held_out.images]).flatten(1)
    # Together they are the train split, each image once.
    assert sorted(whole.tolist()) == sorted(parts.tolist())


def _row(variant, bits, seed, accuracy):
    life = {"accuracy": accuracy, "loss": 0.0}
    return {
        "variant": variant,
        "bits": bits,
        "seed": seed,
        "diverged": False,
        "full": life,
        "data_free": life,
        "batchnorm": life,
    }


def test_differences_are_paired_and_missing_trainings_are_left_out_of_both():
    rows = [
        *(_row("base", bits, seed, 90.0 + 4 * seed - 2 * (bits == 2)) for bits in (2, 3) for seed in (0, 1)),
        *(_row("gain 4", bits, 0, 91.0 - 2 * (bits == 2)) for bits in (2, 3)),
        _row("gain 4", 3, 1, 93.0),
    ]
    entry = {e["variant"]: e for e in defaults.summarise_rows(rows)}["gain 4"]
    # Seed 0: +1 at both widths. Seed 1: only 3 bits, 93 against 94.
    assert entry["data_free_minus_base"]["values"] == [1.0, -1.0]
    assert entry["data_free"]["values"] == [90.0, 93.0]
    assert entry["trainings"] == 3


def test_the_best_lambda_is_taken_at_each_width():
    rows = [_row("base", bits, 0, 50.0) for bits in (2, 3)]
    rows += [_row("paper 150", 2, 0, 40.0), _row("paper 150", 3, 0, 60.0)]
    rows += [_row("paper 50", 2, 0, 45.0), _row("paper 50", 3, 0, 55.0)]
    entry = {e["variant"]: e for e in defaults.summarise_rows(rows)}["paper, best"]
    assert entry["lambda_s"] == {"2": "paper 50", "3": "paper 150"}
    assert entry["data_free"]["mean"] == (45.0 + 60.0) / 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_rival_unit_has_the_same_mean_factor_at_every_step(optimizer):
    torch.manual_seed(0)
    model = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    plain = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    psg = dt.PSG(gain=3.0, eps=0.02, clip=False)
    rule = dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=defaults.MeanUnit(psg=psg))
    optimizers = [optimizer(m.parameters(), lr=1e-3) for m in (model, plain)]
    dt.attach(model, optimizers[0], dt.Recipe([rule]), total_steps=10)
    before = model.weight.detach().clone()
    for m, o in zip((model, plain), optimizers, strict=True):
        m.weight.grad = torch.ones_like(m.weight)
        o.step()
    factor = (model.weight - before) / (plain.weight - before)
    assert factor.mean().item() == pytest.approx(3.0, rel=1e-6)
    assert factor.min() < 1.5 < 4.5 < factor.max()


def test_every_variant_fits_every_task():
    for task in defaults.TASKS.values():
        with torch.device("meta"):
            model = task.model()
        for variant in defaults.VARIANTS.values():
            claims = defaults.recipe_of(task, variant, 3).resolve(model).claimed
            biases = [claim.name for claim in claims if claim.name.endswith("bias")]
            assert bool(biases) == variant.paper
            pinned = [c.name for c in claims if c.rule is not None and c.rule < len(task.ends)]
            assert set(task.ends) <= set(pinned)


def test_one_factor_differs_from_the_base():
    base = defaults.VARIANTS["base"]
    for variant in defaults.VARIANTS.values():
        if variant.factor in ("base", "rival", "unit", "pair"):
            continue
        assert isinstance(variant.mechanism, dt.PSG)
        assert isinstance(base.mechanism, dt.PSG)
        was, now = dataclasses.asdict(base.mechanism), dataclasses.asdict(variant.mechanism)
        differing = [k for k in was if was[k] != now[k]] + ["fit_until"] * (variant.fit_until != base.fit_until)
        assert len(differing) == 1, variant.name
