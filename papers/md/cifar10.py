"""Mirror descent and its rivals with one bit (or a trit) in every layer: CIFAR-10, or digits in minutes.

    python -m papers.md.cifar10 --data-dir ../shared --model resnet20 --epochs 100 [--only md-tanh] [--resume]
    python -m papers.md.cifar10 --data-dir ../shared --model resnet18 --paper --precision bf16 --only md-tanh [--resume]
    python -m papers.md.cifar10 --model digits --epochs 15 --tune --seed 0 --seed 1 --seed 2

The paper's mode: BatchNorm without gain and shift, Xavier weights, every tensor that is left, biases included, on
{-1, 1} without a scale; `--scale` gives each tensor its own. Every rival has the same data, order, epochs, network and
optimizer (Adam) and as many trials of its learning rate: `--tune` reads each of `--lr` on images held out from the
train split, the best goes into the run that reads the test split, once, at the last epoch. `--paper` is the published
recipe instead: 100,000 steps, the rate times 0.3 every 30,000 of them, beta times 1.02 every 200.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from detent.report.record import Record
from papers import models
from papers.train import Experiment, one_seed, peak_memory, summary
from papers.tune import chosen

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "benchmarks" / "records"
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
HOLDOUT = 5000
QUESTION = "With one bit or a trit in every layer, which of mirror descent's family keeps the most accuracy?"
# The last tenth of training sees the levels themselves, so that BatchNorm and what is left of the rate settle on them.
HARD = {"beta": {"kind": "Exponential", "first": 1.0, "last": 1e4, "end": 0.9}, "hard_start": 0.9}

RIVALS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "ste": {"kind": "STE"},
    "binary-connect": {"kind": "STE", "clip_latent": 1.0},
    "md-tanh": {"kind": "MirrorDescent", **HARD},
    "md-tanh-soft": {"kind": "MirrorDescent"},
    "md-tanh-scale-aware": {"kind": "MirrorDescent", "scale_aware": "tensor", **HARD},
    "gd-tanh": {"kind": "GDTanh", **HARD},
    "gd-tanh-soft": {"kind": "GDTanh"},
    "pmf": {"kind": "PMF", "jacobian": "paper"},
    "pmf-hard": {"kind": "PMF", "jacobian": "paper", **HARD},
    "parq": {"kind": "PARQ"},
    "binary-relax": {"kind": "BinaryRelax"},
    "md-ternary": {"kind": "MirrorDescent", **HARD},
    "md-ternary-softmax": {"kind": "MirrorDescent", "map": "softmax", **HARD},
    "ste-ternary": {"kind": "STE"},
}


def network(name: str, classes: int = 10) -> nn.Module:
    """A network in the paper's mode: affine-free BatchNorm, Xavier weights, N(0, 0.1) biases."""
    made: nn.Module = {
        "resnet8": lambda: models.resnet8(classes),
        "resnet20": lambda: models.resnet20(classes, shortcut="B", head="fc"),
        "resnet18": lambda: models.resnet18(classes),
        "digits": lambda: models.SmallConvNet(width=8, classes=classes),
    }[name]()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.affine, module.weight, module.bias = False, None, None  # type: ignore[assignment]
    for parameter in made.parameters():
        if parameter.dim() >= 2:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.normal_(parameter, std=0.1)
    return made


# Published for ResNet-18 on CIFAR-10 (MD-tanh-S and PMF; GD-tanh as MD): beta times a factor every so many steps.
GROWTH = {
    "md-tanh": {"kind": "Growth", "factor": 1.02, "every": 200, "last": 1e35},
    "gd-tanh": {"kind": "Growth", "factor": 1.02, "every": 200, "last": 1e35},
    "pmf": {"kind": "Growth", "factor": 1.1, "every": 1000, "last": 1e4},
}
PAPER_EPOCHS = 285  # 100,000 steps of 128 out of the 45,000 images that are not held out


def recipe(rival: str, scale: bool, paper: bool) -> dict[str, Any] | None:
    """Every tensor on the levels, biases too."""
    mechanism = RIVALS[rival]
    if mechanism is None:
        return None
    if paper and rival in GROWTH:
        mechanism = {k: v for k, v in mechanism.items() if k != "hard_start"} | {"beta": GROWTH[rival]}
    kind = "Ternary" if "ternary" in rival else "Binary"
    target = {"kind": kind} if scale else {"kind": kind, "scale": None}
    # Scales are fitted in every step, as in the records.
    rule = {"match": "(weight|bias)$", "include": "bias$", "target": target, "mechanism": mechanism, "fit_every": 1}
    return {"rules": [rule]}


def experiment(
    rival: str,
    model: str,
    epochs: int,
    lr: float,
    seeds: list[int],
    *,
    scale: bool,
    holdout: int,
    paper: bool = False,
    **extra: Any,
) -> Experiment:
    """One rival at one rate; `holdout` images of the train split are kept apart."""
    steps = {"kind": "step", "milestones": [n * 30_000 / 352 for n in (1, 2, 3)], "gamma": 0.3}
    images: dict[str, Any] = {
        "name": "data/cifar10",
        "label": "label",
        "crop": 4,
        "padding": "zero",
        "flip": True,
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2470, 0.2435, 0.2616],
        "cache": "runs/cache",
    }
    if model == "digits":
        images = {"name": "digits", "crop": 1, "padding": "zero", "mean": [0.305], "std": [0.376]}
    return Experiment.model_validate(
        {
            "name": f"md-{model}-{rival}",
            "question": QUESTION,
            "model": "papers.md.cifar10:network",
            "model_args": {"name": model},
            "data": images | {"holdout": holdout},
            "recipe": recipe(rival, scale, paper),
            "optimizer": {"name": "Adam", "args": {"lr": lr}},
            "schedule": steps if paper else {"kind": "cosine"},
            "batch_size": 64 if model == "digits" else 128,
            "epochs": epochs,
            "channels_last": model != "digits",
            "seeds": seeds,
            "evaluate": {
                "bits": [],
                "calibrate": 1000 if model == "digits" else 4000,
                "augment": model != "digits",
                "every": 0,
            },
            **extra,
        }
    )


def main(
    data_dir: Annotated[Path | None, typer.Option(help="folder with data/cifar10", envvar="DETENT_SHARED")] = None,
    model: Annotated[str, typer.Option(help="resnet8, resnet20, resnet18 or digits")] = "resnet20",
    epochs: Annotated[int | None, typer.Option(min=1, help="100 if absent; 285 with --paper")] = None,
    out: Annotated[Path, typer.Option()] = Path("runs/md"),
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(RIVALS)}; may be repeated")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="a rate, or the ones --tune tries; may be repeated")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="choose the rate on held-out training images")] = False,
    tune_epochs: Annotated[int | None, typer.Option(min=1, help="length of --tune's trials; as --epochs")] = None,
    scale: Annotated[bool, typer.Option("--scale", help="a scale a tensor instead of +-1")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="cut every run short: a trial")] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    paper: Annotated[bool, typer.Option("--paper", help="the published rates and beta of ResNet-18")] = False,
    precision: Annotated[
        str, typer.Option(help="fp32, or bf16 (autocast) where the CPU has AMX or AVX512-BF16")
    ] = "fp32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="train through torch.compile, which takes a C++ compiler")
    ] = False,
    record_as: Annotated[str | None, typer.Option(help="write benchmarks/records/NAME.json")] = None,
    note: Annotated[str, typer.Option(help="a caveat for the record")] = "",
    resume: Annotated[bool, typer.Option("--resume")] = False,
) -> None:
    """Trains the rivals one after another and writes one record."""
    console = Console()
    names, seeds = only or list(RIVALS), seed or [0]
    for name in names:
        if name not in RIVALS:
            raise typer.BadParameter(f"--only {name}: must be one of {', '.join(RIVALS)}")
    rates = lr or (list(RATES) if tune else [1e-3])
    if len(rates) > 1 and not tune:
        raise typer.BadParameter("--lr: several rates need --tune")
    if tune_epochs is not None and not tune:
        raise typer.BadParameter("--tune-epochs: needs --tune")
    if paper and (model != "resnet18" or tune):
        raise typer.BadParameter("--paper: published for --model resnet18, and nothing is tuned")
    if precision not in ("fp32", "bf16"):
        raise typer.BadParameter(f"--precision {precision}: must be fp32 or bf16")
    epochs = epochs or (PAPER_EPOCHS if paper else 100)
    kinds: dict[str, Any] = {
        "scale": scale,
        "threads": threads,
        "paper": paper,
        "precision": precision,
        "compile": compiled,
    }
    if max_steps is not None:
        kinds["extra"] = {"max_steps": max_steps}
    if threads is not None:
        torch.set_num_threads(threads)
    results: dict[str, Any] = {}
    config = {"model": model, "epochs": epochs, "rates": rates, "tuned": tune, "scale": scale, "max_steps": max_steps}
    length, kept = tune_epochs or epochs, 300 if model == "digits" else HOLDOUT
    config |= {"tune_epochs": length if tune else None, "paper": paper, "precision": precision, "compile": compiled}
    rule = "the same learning rate for every rival, not searched"
    if tune:
        rule = "learning rates chosen on held-out training images, by a seed of their own, the same tried for each"
    record = Record(
        name=record_as or f"md-{model}",
        question=QUESTION,
        seeds=seeds,
        config=config,
        notes=f"All tensors, biases too, on the levels; affine-free BatchNorm; last epoch; {rule}. {note}".rstrip(),
    )
    every: list[dict[str, Any]] = []
    with record:
        for name in names:
            folder = out / model / ("scaled" if scale else "unscaled") / name
            rate, tried = rates[0], {}
            if tune:
                trial = functools.partial(experiment, name, model, length, seeds=[1000], holdout=kept, **kinds)
                rate, found = chosen(lambda number, of=trial: of(lr=number), rates, folder, data_dir)
                tried = {lr: lives.get("compressed", lives["full"]) for lr, lives in found.items()}
            plan = experiment(name, model, epochs, rate, seeds, holdout=HOLDOUT if paper else 0, **kinds)
            runs = [one_seed(plan, n, folder / f"seed{n}", data_dir, folder, resume, console) for n in seeds]
            every += runs
            results[name] = {"lr": rate, "held_out": tried, "summary": summary(runs)}
            console.print(f"{name}: lr {rate:g}, {_line(results[name]['summary'])}")
    if resume:  # what was finished before took no time now
        _cost(record, every)
    record.write(RECORDS / f"{record_as}.json" if record_as else out / model / "record.json", {"rivals": results})


def _cost(record: Record, runs: list[dict[str, Any]]) -> None:
    """Seconds and peak memory as the runs tell them."""
    record.seconds = sum(run["train_seconds"] for run in runs)
    record.notes += " Seconds are those of the trainings alone, without trials and tests."
    record.peak_memory = peak_memory(runs).get("peak_memory_bytes", {})
    if not record.peak_memory:
        record.notes += " Peak memory was not measured."
    commits = sorted({run["commit"] for run in runs if run.get("commit")})
    if commits:
        record.notes += f" Trained at commit {', '.join(commits)}."


def _line(found: Any) -> str:
    """Accuracies out of a summary."""
    keys = {"full": "full.accuracy", "compressed": "compressed.recipe.data_free.accuracy"}
    return ", ".join(f"{life} {found[key]['mean']:.2f} %" for life, key in keys.items() if key in found)


if __name__ == "__main__":
    typer.run(main)
