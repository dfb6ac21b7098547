"""The trainer: exact resume, no look at test data, records that say what was run."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

import detent as dt
from detent.report.record import Record, environment, summarise, write_record
from papers import models
from papers.train import (
    Experiment,
    ScheduleConfig,
    Trainer,
    evaluate,
    evaluate_lives,
    learning_rate,
    load_experiment,
    main,
    one_seed,
)
from papers.tune import chosen, held_out, tuned

EXPERIMENTS = Path(__file__).resolve().parent.parent / "papers" / "experiments"


def dropout_net() -> nn.Module:
    """Draws from torch's global generator in the forward pass, so that resume must restore it."""
    return nn.Sequential(models.SmallConvNet(width=4), nn.Dropout(0.2))


def tiny(**changes: Any) -> Experiment:
    base: dict[str, Any] = {
        "name": "tiny",
        "question": "Does it run?",
        "model": f"{__name__}:dropout_net",
        "data": {"name": "digits", "holdout": 100, "crop": 1, "flip": True, "mean": [0.3], "std": [0.37]},
        "optimizer": {"name": "SGD", "args": {"lr": 0.05, "momentum": 0.9}},
        "schedule": {"kind": "cosine", "warmup": 0.5},
        "batch_size": 32,
        "epochs": 3,
        "evaluate": {"bits": [4, 2], "calibrate": 64},
        "extra": {"train_subset": 160},
    }
    return Experiment.model_validate(base | changes)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


STE = {"match": r"\.weight$", "target": {"kind": "Uniform", "bits": 3}, "mechanism": {"kind": "STE"}}
RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw": {"optimizer": {"name": "torch.optim.AdamW", "args": {"lr": 0.003}}},
    "psg": {"recipe": "psg-w4"},
    "ste": {"recipe": {"rules": [STE]}},
    "channels_last": {"channels_last": True},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_cut_off_in_the_middle_of_an_epoch_is_the_unbroken_run(tmp_path: Path, case: str) -> None:
    experiment = tiny(**RESUMED[case])
    unbroken = Trainer(experiment, 1, tmp_path / "a")
    unbroken.train()
    for stop in (3, 8, 10):  # in the first epoch, in the second, between epochs
        cut = Trainer(experiment, 1, tmp_path / "b")
        assert cut.resume() == (stop > 3)
        cut.train(stop_at=stop)
    torch.rand(7)  # the next process starts with another generator
    last = Trainer(experiment, 1, tmp_path / "b")
    assert last.resume()
    assert last.step == 10
    last.train()
    assert last.step == unbroken.step == 15
    assert same(last.model.state_dict(), unbroken.model.state_dict())
    assert same(last.optimizer.state_dict(), unbroken.optimizer.state_dict())
    assert same(last.history, unbroken.history)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    trainers = [Trainer(tiny(), seed, tmp_path / str(seed)) for seed in (0, 1)]
    for trainer in trainers:
        trainer.train()
    assert not same(trainers[0].model.state_dict(), trainers[1].model.state_dict())
    first, second = (t.held_out for t in trainers)
    assert first is not None and second is not None and torch.equal(first.images, second.images)


def test_resume_refuses_another_experiment_and_seed(tmp_path: Path) -> None:
    Trainer(tiny(), 1, tmp_path).train(stop_at=1)
    with pytest.raises(ValueError, match=r"\['batch_size'\]"):
        Trainer(tiny(batch_size=16), 1, tmp_path).resume()
    with pytest.raises(ValueError, match="seed"):
        Trainer(tiny(), 2, tmp_path).resume()
    assert Trainer(tiny(notes="only words"), 1, tmp_path).resume()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    older = json.loads(state["experiment"])
    del older["data"]["warp"], older["label_smoothing"]  # fields that came later
    torch.save(state | {"experiment": json.dumps(older)}, tmp_path / "last.pt")
    assert Trainer(tiny(), 1, tmp_path).resume()
    with pytest.raises(ValueError, match=r"\['label_smoothing'\]"):
        Trainer(tiny(label_smoothing=0.1), 1, tmp_path).resume()


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(), 1, tmp_path)
    trainer.train(stop_at=2)

    def cut(state: object, file: Path) -> None:
        Path(file).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = Trainer(tiny(), 1, tmp_path)
    assert again.resume()
    assert again.step == 2


def test_test_images_are_read_after_the_last_step_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    read = Trainer._images
    monkeypatch.setattr(Trainer, "_images", lambda self, split: (asked.append(split), read(self, split))[1])
    trainer = Trainer(tiny(), 1, tmp_path)
    trainer.train(stop_at=14)
    with pytest.raises(RuntimeError, match="step 14 of 15"):
        trainer.result()
    trainer.train()
    assert asked == ["train"]
    trainer.result()
    assert asked == ["train", "test"]
    assert trainer.train_set is not None and trainer.held_out is not None
    rows = {bytes(x) for x in trainer.train_set.images.flatten(1).numpy()}
    assert not rows & {bytes(x) for x in trainer.held_out.images.flatten(1).numpy()}


def test_a_diverging_run_stops_in_words(tmp_path: Path) -> None:
    experiment = tiny(optimizer={"name": "SGD", "args": {"lr": 1e30}})
    with pytest.raises(RuntimeError, match=r"loss is (nan|inf)"):
        Trainer(experiment, 0, tmp_path).train()


def test_training_learns_and_both_lives_are_measured(tmp_path: Path) -> None:
    experiment = tiny(
        model="SmallConvNet", recipe="psg-w8", epochs=8, extra={}, data={"name": "digits", "holdout": 100}
    )
    trainer = Trainer(experiment, 0, tmp_path)
    trainer.train()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    result = trainer.result()
    assert same(before, dict(trainer.model.state_dict())), "measuring changes nothing"
    assert result["test"]["full"]["accuracy"] > 85
    lives = result["test"]["compressed"]
    assert set(lives) == {"recipe", "4", "2"}
    assert lives["recipe"]["data_free"]["accuracy"] > 85
    assert lives["recipe"]["weights"]["error"] < lives["4"]["weights"]["error"] < lives["2"]["weights"]["error"]
    assert lives["2"]["data_free"]["loss"] != lives["2"]["batchnorm"]["loss"]
    assert {"full", "compressed"} == set(trainer.history[0]["held_out"])
    assert (tmp_path / "model.safetensors").exists()


def test_a_plain_run_is_rounded_after_training(tmp_path: Path) -> None:
    trainer = Trainer(tiny(evaluate_recipe="psg-w4", epochs=1), 0, tmp_path)
    trainer.train()
    assert set(trainer.result()["test"]["compressed"]) == {"recipe", "4", "2"}
    bare = Trainer(tiny(epochs=1), 0, tmp_path / "bare")
    bare.train()
    assert bare.result()["test"]["compressed"] == {}
    held_out = [t.history[-1]["held_out"]["compressed"] for t in (trainer, bare)]
    assert [set(lives) for lives in held_out] == [{"recipe"}, set()]
    assert same(trainer.model.state_dict(), bare.model.state_dict()), "measuring changes nothing"


def test_a_trial_reads_held_out_images_alone_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_test_batches", lambda self: pytest.fail("a trial must not read the test split"))
    plan = tiny(evaluate_recipe="psg-w4", evaluate={"every": 0}, epochs=2, seeds=[5])
    lives = held_out(plan, tmp_path / "trial", None)
    trainer = Trainer(tiny(evaluate_recipe="psg-w4", epochs=2), 5, tmp_path / "same")
    trainer.train()
    seen = trainer.history[-1]["held_out"]
    assert lives["full"] == seen["full"]["accuracy"]
    assert lives["compressed"] == seen["compressed"]["recipe"]["data_free"]["accuracy"]
    assert set(held_out(tiny(epochs=1), tmp_path / "bare", None)) == {"full"}
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("a finished trial is read"))
    assert held_out(plan, tmp_path / "trial", None) == lives


def test_a_result_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    first = one_seed(tiny(epochs=1, recipe="psg-w4"), 0, tmp_path, None, tmp_path, False, quiet)
    assert one_seed(tiny(epochs=1, recipe="psg-w4"), 0, tmp_path, None, tmp_path, True, quiet) == first
    for changes in ({"epochs": 1, "recipe": "psg-w2"}, {"epochs": 2, "recipe": "psg-w4"}):
        with pytest.raises(ValueError, match="is of another experiment"):
            one_seed(tiny(**changes), 0, tmp_path, None, tmp_path, True, quiet)
    with pytest.raises(ValueError, match="seed"):
        one_seed(tiny(epochs=1, recipe="psg-w4"), 1, tmp_path, None, tmp_path, True, quiet)
    elsewhere = tiny(epochs=1, recipe="psg-w4", data={**tiny().data.model_dump(), "cache": str(tmp_path / "cache")})
    assert one_seed(elsewhere, 0, tmp_path, None, tmp_path, True, quiet) == first, "a cache is no setting"
    more = tiny(epochs=1, recipe="psg-w4", evaluate={"bits": [6], "calibrate": 64})
    again = one_seed(more, 0, tmp_path, None, tmp_path, True, quiet)
    assert set(again["test"]["compressed"]) == {"recipe", "6"} != set(first["test"]["compressed"])
    assert again["test"]["full"] == first["test"]["full"] and again["history"] == first["history"]
    assert one_seed(more, 0, tmp_path, None, tmp_path, True, quiet) == again, "measured, and kept"


@pytest.mark.parametrize("recipe", ["psg-prune90", "md-binary"])
def test_widths_that_cannot_be_read_are_refused_before_training(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.bits=\[4, 2\].*no rule of the recipe has"):
        Trainer(tiny(recipe=recipe), 0, tmp_path)
    Trainer(tiny(recipe=recipe, evaluate={"bits": []}), 0, tmp_path)


def test_a_trial_that_diverges_is_the_worst_and_no_more() -> None:
    def trial(rate: float) -> dict[str, float]:
        if rate > 0.3:
            raise RuntimeError("tiny, seed 0: the loss is nan at step 7")
        return {"full": 50.0, "compressed": 90 * rate}

    best, found = tuned(trial, [0.01, 0.1, 1.0], step=3.0)
    assert best == 0.1 and found[1.0]["compressed"] == 0.0
    assert tuned(trial, [0.1, 0.2], step=3.0)[0] == 0.2
    with pytest.raises(RuntimeError, match="out of memory"):
        tuned(lambda rate: (_ for _ in ()).throw(RuntimeError("out of memory")), [0.1])


def test_the_number_chosen_is_the_best_of_trainings_that_saw_no_test_data(tmp_path: Path) -> None:
    def plan(rate: float) -> Experiment:
        data = {**tiny().data.model_dump(), "holdout": 100}
        return tiny(epochs=1, data=data, optimizer={"name": "SGD", "args": {"lr": rate}})

    best, found = chosen(plan, [1e-6, 0.05], tmp_path, None)
    assert best == 0.05 and found["0.05"]["full"] > found["1e-06"]["full"]
    assert found["0.05"] == held_out(plan(0.05), tmp_path / "tune-0.05-1", None)


def test_a_recipe_file_that_changed_is_another_experiment(tmp_path: Path) -> None:
    recipe = "rules: [{match: weight$, target: {kind: Uniform, bits: 3}, mechanism: {kind: PSG, gain: 5.0}}]"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tiny(recipe="recipe.yaml").model_dump(mode="json")))
    plan = load_experiment(tmp_path / "plan.yaml")
    assert plan.recipe["rules"][0]["mechanism"]["gain"] == 5.0  # type: ignore[index,call-overload]
    first = Trainer(plan, 0, tmp_path / "out", folder=tmp_path)
    first.train(stop_at=2)
    assert Trainer(load_experiment(tmp_path / "plan.yaml"), 0, tmp_path / "out").resume()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("5.0", "50.0"))
    with pytest.raises(ValueError, match="another experiment: .*recipe"):
        Trainer(load_experiment(tmp_path / "plan.yaml"), 0, tmp_path / "out").resume()


def test_batchnorm_without_running_statistics_has_nothing_to_estimate() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False))
    run = dt.compress(model, dt.Recipe.preset("uniform-w4"))
    batches = [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))]
    lives = evaluate_lives(model, run, batches, calibration=batches)
    assert set(lives["compressed"]["recipe"]) == {"data_free", "weights", "layers"}


def test_distillation_is_the_divergence_from_the_initial_network(tmp_path: Path) -> None:
    first = Trainer(tiny(epochs=1), 3, tmp_path / "first")
    first.train()
    first.result()
    init = str(tmp_path / "first" / "model.safetensors")
    plan = tiny(init=init, distill=0.25, recipe={"rules": [STE]}, epochs=2)
    trainer = Trainer(plan, 0, tmp_path / "a")
    assert trainer.teacher is not None
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    assert same(before, dict(first.model.state_dict())), "the teacher is not what `init` names"
    x, y = next(iter(trainer.batches))
    drawn = torch.get_rng_state()
    logits = trainer.model(x).double()  # the network that trains has dropout and its weights on 3 bits
    torch.set_rng_state(drawn)
    loss = trainer._step(x, y)
    student, wanted = logits.detach().softmax(1), first.model.eval()(x).detach().double().softmax(1)
    right = -student[torch.arange(len(y)), y].log().mean()
    apart = (wanted * (wanted / student).log()).sum(1).mean()
    assert float(loss) == pytest.approx(float(0.75 * right + 0.25 * apart), rel=1e-5)
    assert float(apart) > 1e-3 and abs(float(apart - right)) > 1e-3, "the test shows nothing"

    whole = Trainer(plan, 0, tmp_path / "b")
    whole.train()
    assert whole.teacher is not None and same(before, dict(whole.teacher.state_dict())), "the teacher was trained"
    cut = Trainer(plan, 0, tmp_path / "c")
    cut.train(stop_at=7)
    again = Trainer(plan, 0, tmp_path / "c")
    assert again.resume()
    again.train()
    assert same(dict(whole.model.state_dict()), dict(again.model.state_dict()))
    with pytest.raises(ValueError, match="distill=0.5: needs `init`"):
        tiny(distill=0.5)


def test_evaluate_counts_by_hand() -> None:
    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return x

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    model = Shifted().train()
    got = evaluate(model, [(logits[:2], torch.tensor([0, 0])), (logits[2:], torch.tensor([0]))])
    assert model.training
    assert got["accuracy"] == pytest.approx(200 / 3)
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(1 + math.exp(-3))]
    assert got["loss"] == pytest.approx(sum(losses) / 3)
    with pytest.raises(ValueError, match="batch"):
        evaluate(model, [])
    assert evaluate_lives(model, None, [(logits, torch.tensor([0, 1, 0]))])["full"]["accuracy"] == 100


def test_learning_rate_by_hand() -> None:
    step = ScheduleConfig(kind="step", milestones=[2, 3], gamma=0.1)
    assert [learning_rate(step, s, 40, 10) for s in (0, 19, 20, 29, 30)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = ScheduleConfig(kind="cosine", warmup=0.4, final=0.2)
    assert [learning_rate(cosine, s, 24, 10) for s in (0, 1, 2, 3, 4)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert learning_rate(cosine, 14, 24, 10) == pytest.approx(0.6)
    assert 0.2 < learning_rate(cosine, 23, 24, 10) < 0.21
    assert learning_rate(ScheduleConfig(kind="constant"), 39, 40, 10) == 1


def test_experiment_files_are_valid_and_misspelt_keys_are_not(tmp_path: Path) -> None:
    files = sorted(EXPERIMENTS.glob("*.yaml"))
    assert files
    for file in files:
        load_experiment(file)
    changed = load_experiment(files[0], ["optimizer.args.lr=0.5", "recipe=null", "evaluate.bits=[4]"])
    assert changed.optimizer.args["lr"] == 0.5
    assert (changed.recipe, changed.evaluate.bits) == (None, [4])
    with pytest.raises(ValueError, match=r"evaluate\.bit\b"):
        load_experiment(files[0], ["evaluate.bit=[4]"])
    with pytest.raises(ValueError, match="key=value"):
        load_experiment(files[0], ["epochs"])
    with pytest.raises(ValueError, match="ResNet99"):
        Trainer(tiny(model="ResNet99"), 0, tmp_path)


def test_the_command_trains_resumes_and_records(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    experiment = tiny(model="SmallConvNet", seeds=[3, 4], epochs=1).model_dump()
    file.write_text(yaml.safe_dump(experiment))
    out = tmp_path / "out"
    main(file, out=out)
    record = json.loads((out / "record.json").read_text())
    assert record["seeds"] == [3, 4]
    assert record["config"]["extra"]["train_subset"] == 160
    accuracies = [r["test"]["full"]["accuracy"] for r in record["results"]["seeds"]]
    assert record["results"]["summary"]["full.accuracy"] == summarise(accuracies)
    assert record["cost"]["seconds"] > 0
    assert "test, full" in (out / "seed3" / "log.txt").read_text()
    with pytest.raises(ValueError, match="--resume"):
        main(file, out=out)
    main(file, out=out, resume=True)
    assert json.loads((out / "record.json").read_text())["results"] == record["results"]
    main(file, out=tmp_path / "one", seed=9, epochs=2, overrides=["batch_size=64"])
    one = json.loads((tmp_path / "one" / "record.json").read_text())
    assert (one["seeds"], one["config"]["epochs"], one["config"]["batch_size"]) == ([9], 2, 64)


def test_records(tmp_path: Path) -> None:
    with Record(name="n", question="q?", command="c", seeds=[1], config={"a": (1, None)}) as record:
        torch.rand(10)
    record.write(tmp_path / "deep" / "r.json", {"x": math.inf, "y": 0.5})
    text = (tmp_path / "deep" / "r.json").read_text()
    got = json.loads(text)
    assert got["results"] == {"x": "inf", "y": 0.5}
    assert got["config"] == {"a": [1, None]}
    assert got["cost"]["peak_memory_bytes"]["process"] > 10_000_000
    assert text == json.dumps(got, indent=1, sort_keys=True) + "\n"
    with pytest.raises(ValueError, match=r"results\.x is a Tensor"):
        record.write(tmp_path / "deep" / "r.json", {"x": torch.ones(1)})
    assert (tmp_path / "deep" / "r.json").read_text() == text, "a refused record leaves the old file"
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["r.json"]
    with pytest.raises(ValueError, match="need one value"):
        summarise([])
    assert summarise([2.0])["std"] is None


def test_environment_states_commit_and_versions(tmp_path: Path) -> None:
    here = environment()
    assert here["versions"]["torch"] == torch.__version__
    assert here["hardware"]["cores"] >= 1
    outside = environment(tmp_path)
    assert (outside["commit"], outside["dirty"], outside["dirty_files"]) == (None, None, None)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "a.txt").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "m"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    clean = environment(tmp_path)
    assert (len(clean["commit"]), clean["dirty"], clean["dirty_files"]) == (40, False, [])
    (tmp_path / "a.txt").write_text("2")
    (tmp_path / "b.txt").write_text("new")
    changed = environment(tmp_path)
    assert (changed["commit"], changed["dirty"]) == (clean["commit"], True)
    assert changed["dirty_files"] == ["a.txt", "b.txt"]
    (tmp_path / "b.txt").unlink()
    (tmp_path / "a.txt").write_text("1")
    assert not environment(tmp_path)["dirty"]
    write_record(tmp_path / "r.json", name="n", question="q", command="c", seeds=[], config={}, results={})


# ------------------------------------------------------------------------------------------------------------ streams


def colour_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    )


def streamed(folder: Path, **data: Any) -> Experiment:
    """Images of unequal size, which only a stream can take."""
    pytest.importorskip("pyarrow", reason="image sets need pip install detent[data]")
    from tests.test_data import noise, write_set

    if not folder.exists():
        images = [x for i in range(3) for x in noise(15, (8 + i, 9, 3), seed=i)]
        write_set(folder, images, "train", labels={"label": [i % 3 for i in range(45)]}, files=2)
        write_set(folder, noise(11, (9, 8, 3), seed=9), "validation")
    return tiny(
        model=f"{__name__}:colour_net",
        data={"name": str(folder), "stream": 8, "test_split": "validation", "mean": [0.5], "std": [0.25]} | data,
        recipe="psg-w4" if not data else None,
        batch_size=8,
        evaluate={"bits": [4], "calibrate": 20, "batch_size": 4},
        extra={},
    )


def test_a_streamed_set_trains_resumes_and_is_measured(tmp_path: Path) -> None:
    experiment = streamed(tmp_path / "set").model_copy(
        update={
            "recipe": {
                "rules": [
                    {"match": "weight", "target": {"kind": "Uniform", "bits": 4}, "mechanism": {"kind": "PSG"}},
                ]
            }
        }
    )
    unbroken = Trainer(experiment, 1, tmp_path / "a")
    assert len(unbroken.batches) == 45 // 8 and unbroken.total == 15
    unbroken.train()
    for stop in (2, 7, 10, 15):
        cut = Trainer(experiment, 1, tmp_path / "b")
        cut.resume()
        cut.train(stop_at=stop)
    again = Trainer(experiment, 1, tmp_path / "b")
    assert again.resume()
    assert same(unbroken.model.state_dict(), again.model.state_dict())
    found = unbroken.result()["test"]
    right = found["full"]["accuracy"] * 11 / 100  # all eleven images were looked at
    assert math.isclose(right, round(right), abs_tol=1e-9)
    assert "batchnorm" in found["compressed"]["recipe"]


@pytest.mark.parametrize("option", [{"holdout": 5}, {"crop": 2}, {"flip": True}, {"name": "digits"}])
def test_a_stream_refuses_what_it_would_ignore(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"data.stream=8"):
        streamed(tmp_path / "set", **option)
