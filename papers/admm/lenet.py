"""LeNet-5 on MNIST: progressive ADMM at the published pruning rates and beyond, one bit in all layers, and rivals.

    python -m papers.admm.lenet --data-dir DIR [--only NAME] [--seed N] [--epochs N] [--holdout N] [--resume]

NAME is one of `python -m papers.admm.lenet --list`, or prune<rate> / oneshot<rate> / imp<rate> for any rate. Every job
starts from the same dense network of its seed (trained first if it is not there) and has the same epochs; the last
epoch counts; the test split is read once, at the end. With --holdout the training images are fewer and curves are
measured on those held out: that is how settings are looked for, and how the rivals' curves are drawn.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
import yaml
from rich.console import Console
from torch import Tensor

import detent as dt
from benchmarks import RECORDS
from detent.report.record import process_peak, summarise, write_record
from papers.train import Experiment, Trainer, finished, peak_memory

WEIGHTS = 430_500
PUBLISHED = {"conv1": 100, "conv2": 2_000, "fc1": 3_600, "fc2": 350}  # 80 / 92 / 99.1 / 93 % pruned: 71.2x
UNTIL = 0.5  # the part of a stage that ADMM takes; masked retraining has the rest
PERIODS = 5  # updates of z and u in that part
RETRAIN = 2.0  # times the rate of ADMM: the few weights that are left want larger steps
# Degrees, scale and pixels. Without it the few weights that are left at 246x overfit: 99.7 % of the training images
# against 98.9 % of 5,000 held-out ones after 15 epochs; with it both were 99.0 after 30 (10,000 held out, one seed).
WARP = (8.0, 0.08, 1.0)
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training.

    Args:
        question: what it is for.
        recipe: gives the recipe; `None` for the dense network.
        epochs: its length, all stages together.
        rate: pruning rate over all 430,500 weights, or `None`.
    """

    question: str
    recipe: Callable[[], dt.Recipe] | None
    epochs: int = 40
    rate: float | None = None


# --- recipes ------------------------------------------------------------------------------------------------------


def admm(**changes: Any) -> dt.ADMM:
    """ADMM as all jobs use it: `UNTIL` of a stage in `PERIODS` periods, then the feasibility steps.

    On 5,000 held-out training images, one seed, at 246x: rho of 5e-3 and 2e-2 the better one; survivors by the Fisher
    metric 98.8 % in 12 epochs and 98.9 in 16, by magnitude alone 98.5 in 9.
    """
    return replace(dt.ADMM(rho=5e-3, growth=1.5, every=UNTIL / PERIODS, until=UNTIL, metric="fisher"), **changes)


def masked(metric: Literal["euclidean", "fisher"]) -> dt.Masked:
    """The plain rival: by magnitude, or its survivors chosen in the same metric as ADMM's."""
    return dt.Masked(start=0.05, metric=metric)


def ladder(rate: float) -> list[float]:
    """Rates of the progressive stages: each twice the one before, as the paper takes its two steps."""
    return [rate] if rate < 20 else [rate / 4, rate / 2, rate]


def prune(rates: Sequence[float], mechanism: dt.Mechanism) -> dt.Recipe:
    """Stages of rising share; how many weights each layer keeps is found by one threshold over the model."""
    return dt.Recipe(stages=pruning(rates, mechanism))


def pruning(rates: Sequence[float], mechanism: dt.Mechanism, share: float = 1.0) -> list[dt.Stage]:
    """The stages of `prune`, as a share of a longer training."""
    stages = []
    parts = [0.15, 0.25, 0.6] if len(rates) == 3 else [1 / len(rates)] * len(rates)
    for rate, part in zip(rates, parts, strict=True):
        target = dt.TopK(keep=round(WEIGHTS / rate), scope="model")
        rule = dt.Rule(match=r"weight$", target=target, mechanism=mechanism)
        stages.append(dt.Stage(rules=[rule], share=part * share, name=f"prune {rate:g}x"))
    return stages


def small_file(rate: float = 200, levels: int = 8) -> dt.Recipe:
    """Progressive ADMM to a rate, then the survivors share a few values, which learn: for benchmarks/lenet_bytes.py.

    An evenly spaced grid of 3 bits under straight-through cost 0.9 points of training accuracy here.
    """
    shared = dt.LearnedLevels(k=levels, zero=True, param_dtype="float16")
    survivors = dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=shared)
    last = dt.Rule(match=r"weight$", target=survivors, mechanism=dt.CodebookLearning())
    pruned = pruning(ladder(rate), admm(), share=0.75)
    return dt.Recipe(stages=[*pruned, dt.Stage(rules=[last], share=0.25, name=f"{levels} shared values")])


def prune_published(mechanism: dt.Mechanism, rate: float | None = None) -> dt.Recipe:
    """The published ratios of each layer, reached in three stages: six times as many weights first, then twice.

    At another rate than the published one each layer keeps its part of the whole. On 5,000 held-out training images,
    one seed, 40 epochs in bfloat16: 99.34 %; in two stages, three times as many first and 0.3 and 0.7 of the epochs,
    99.26.
    """
    whole = sum(PUBLISHED.values())
    share = 1.0 if rate is None else WEIGHTS / rate / whole
    stages = []
    for times, part in ((6, 0.15), (2, 0.25), (1, 0.6)):
        rules = []
        for layer, keep in PUBLISHED.items():
            most = {"conv1": 500, "conv2": 25_000, "fc1": 400_000, "fc2": 5_000}[layer]
            target = dt.TopK(keep=min(round(keep * share * times), most))
            rules.append(dt.Rule(match=rf"^{layer}\.weight$", target=target, mechanism=mechanism))
        stages.append(dt.Stage(rules=rules, share=part, name=f"prune {WEIGHTS / (whole * share * times):.0f}x"))
    return dt.Recipe(stages=stages)


def quantize(target: dt.Target, mechanism: dt.Mechanism, share: float = 1.0) -> list[dt.Stage]:
    """The paper's two steps, as a share of a training: all layers but the first and last, then those two."""
    ends = ("@first", "@last")
    body = [
        *(dt.Rule(match=end, keep=True) for end in ends),
        dt.Rule(match=r"weight$", target=target, mechanism=mechanism),
    ]
    last = [dt.Rule(match=end, target=target, mechanism=mechanism) for end in ends]
    return [
        dt.Stage(rules=body, share=0.6 * share, name="all but the ends"),
        dt.Stage(rules=last, share=0.4 * share, name="the ends"),
    ]


def binary(
    admm_share: float, granularity: Literal["tensor", "channel"] = "tensor", after: dt.Mechanism | None = None
) -> dt.Recipe:
    """One bit a weight and its scales, in all layers: ADMM for a share of training, then straight-through or `after`.

    The last rounds of ADMM are small: what is snapped in one can only be made good by what is still free, and the
    tenth that a round from 0.9 to 1 would snap are the weights farthest from their sign (LeNet-5 lost a point in it).
    Straight-through lets signs change again that the rounds have frozen. On 5,000 held-out training images, one seed,
    40 epochs in bfloat16, half of them ADMM: 99.12 % with a scale a tensor, 99.28 with one a channel; dense 99.40.
    """
    target = dt.Binary(granularity=granularity)
    rounds = (0.5, 0.75, 0.9, 0.96, 0.985, 0.995, 1.0)
    pull = admm(rho=1e-3, growth=2.0, rounds=rounds, metric="euclidean")
    stages = quantize(target, pull, admm_share) if admm_share else []
    if admm_share < 1:
        rule = dt.Rule(match=r"weight$", target=target, mechanism=after or dt.STE(), fit_every=1)
        stages.append(dt.Stage(rules=[rule], share=1 - admm_share, name="straight-through" if after is None else "md"))
    return dt.Recipe(stages=stages)


def mirror() -> dt.MirrorDescent:
    """Mirror descent from where the weights are, on the levels themselves in its last tenth."""
    return dt.MirrorDescent(init="inverse", beta=dt.Exponential(first=1.0, last=1e4, end=0.9), hard_start=0.9)


def progressive_yaml() -> dt.Recipe:
    """The recipe of the paper's whole procedure, from the file beside this script."""
    return dt.Recipe.from_yaml(FOLDER / "lenet-progressive.yaml")


JOBS: dict[str, Job] = {
    "dense": Job(question="How good is the dense network that everything starts from?", recipe=None, epochs=20),
    "published71": Job(
        question="Does progressive ADMM hold 99.2 % at the published per-layer ratios (71.2x)?",
        recipe=lambda: prune_published(admm()),
        epochs=60,
        rate=WEIGHTS / sum(PUBLISHED.values()),
    ),
    "binary": Job(
        question="Does one bit in all layers cost accuracy against the dense network?", recipe=lambda: binary(1.0)
    ),
    "binary-then-ste": Job(
        question="Does one bit in all layers cost accuracy, if straight-through goes on from what ADMM found?",
        recipe=lambda: binary(0.5),
    ),
    "binary-channel": Job(
        question="Does one bit in all layers with a scale a channel cost accuracy, by ADMM and then straight-through?",
        recipe=lambda: binary(0.5, "channel"),
        epochs=60,
    ),
    "binary-mirror": Job(
        question="How good is one bit in all layers with a scale a channel by mirror descent alone?",
        recipe=lambda: binary(0.0, "channel", mirror()),
    ),
    "binary-ste": Job(
        question="How good is one bit in all layers by straight-through alone?", recipe=lambda: binary(0.0)
    ),
    "file": Job(
        question="How good is 200x by ADMM, then 8 shared values a layer, which a file of 2.7 kB holds?",
        recipe=small_file,
        rate=200,
        epochs=60,
    ),
    "prune246-w3": Job(
        question="How accurate is one YAML file: prune 71x, then 246x, then 3 bits on the survivors, ends last?",
        recipe=progressive_yaml,
        rate=246,
        epochs=60,
    ),
}
LONG = {"prune300": 80, "prune350": 80}  # epochs of jobs by rate that have more than the others
STANDARD = ("dense", "published71", "prune167", "prune246", "prune350", "binary", "binary-channel", "prune246-w3")
RIVALS = (
    *("prune246", "oneshot246", "onemagnitude246", "impfisher246", "imp246", "magnitude246", "fixed246"),
    "nofinish246",
)
KINDS: dict[str, tuple[str, Callable[[float], dt.Recipe]]] = {
    "prune": ("progressive ADMM", lambda rate: prune(ladder(rate), admm())),
    "ratio": ("progressive ADMM with the published layers' parts", lambda rate: prune_published(admm(), rate)),
    "oneshot": ("one-shot ADMM", lambda rate: prune([rate], admm())),
    "onemagnitude": ("one-shot ADMM, survivors by magnitude", lambda rate: prune([rate], admm(metric="euclidean"))),
    "imp": ("iterative magnitude pruning", lambda rate: prune(ladder(rate), masked("euclidean"))),
    "impfisher": ("iterative Fisher pruning", lambda rate: prune(ladder(rate), masked("fisher"))),
    "magnitude": (
        "one-shot magnitude pruning, then masked retraining",
        lambda rate: prune([rate], masked("euclidean")),
    ),
    "fixed": ("progressive ADMM with rho fixed at its geometric mean", lambda rate: prune(ladder(rate), fixed())),
    "nofinish": (
        "one-shot ADMM to the end, survivors by magnitude, with no feasibility steps",
        lambda rate: prune([rate], admm(until=None, every=1 / PERIODS, metric="euclidean")),
    ),
    "nogrowth": ("one-shot ADMM with rho fixed at its first value", lambda rate: prune([rate], admm(growth=1.0))),
    "balanced": ("progressive ADMM with balanced residuals", lambda rate: prune(ladder(rate), admm(balance=True))),
}


def fixed() -> dt.ADMM:
    """rho constant at the geometric mean of what `admm` goes through."""
    usual = admm()
    return replace(usual, rho=usual.rho * usual.growth ** ((PERIODS - 1) / 2), growth=1.0)


def job_of(name: str) -> Job:
    """A job by name; prune<rate> and its rivals take any rate.

    Raises:
        typer.BadParameter: an unknown name.
    """
    if name in JOBS:
        return JOBS[name]
    found = re.fullmatch(r"([a-z]+)(\d+)", name)
    if found is None or found[1] not in KINDS or not 1 < int(found[2]) <= 5000:
        known = ", ".join([*JOBS, *(f"{kind}<rate>" for kind in KINDS)])
        raise typer.BadParameter(f"{name}: known are {known}")
    rate = float(found[2])
    what, make = KINDS[found[1]]
    epochs = LONG.get(name, Job.epochs)
    return Job(question=f"How accurate is {what} at {rate:g}x?", recipe=lambda: make(rate), epochs=epochs, rate=rate)


# --- training -----------------------------------------------------------------------------------------------------


def rate_factor(recipe: dt.Recipe | None, total: int) -> Callable[[int], float]:
    """The learning rate's factor by step: ADMM's periods up to every mapping, cosines down after it."""
    scratch = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if recipe is None:
        return dt.periodic_rate(scratch, total, until=0, total=total, floor=0.01).lr_lambdas[0]
    return dt.periodic_rate(scratch, recipe, total=total, retrain=RETRAIN, floor=0.01).lr_lambdas[0]


class LeNetTrainer(Trainer):
    """The common trainer, with ADMM's periodic learning rate and its residuals by epoch."""

    def __init__(self, experiment: Experiment, recipe: dt.Recipe | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(experiment, *args, **kwargs)
        self.recipe = recipe
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.factor = rate_factor(recipe, self.total)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        factor = self.factor(self.step)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["initial_lr"] = base * factor
        return super()._step(x, y)

    def _end_of_epoch(self) -> None:
        super()._end_of_epoch()
        if self.run is not None:
            row = self.history[-1]
            row["residuals"] = dt.residuals(self.run)
            row["weights"] = {r["name"]: {k: r[k] for k in ("error", "zeros", "weights")} for r in self.run.measure()}


def experiment(name: str, job: Job, seed: int, options: Options) -> Experiment:
    """The job as the common trainer takes it."""
    recipe = None if job.recipe is None else yaml.safe_load(job.recipe().to_yaml())
    return Experiment.model_validate(
        {
            "name": f"admm-lenet-{name}",
            "question": job.question,
            "model": "LeNet5",
            "init": None if recipe is None else str((options.folder("dense", seed) / "model.safetensors").resolve()),
            "data": {
                "name": "data/mnist",
                "holdout": options.holdout,
                "holdout_seed": seed,
                "warp": options.warp,
                "mean": [0.1307],
                "std": [0.3081],
                "cache": str(options.out / "cache"),
            },
            "recipe": recipe,
            "optimizer": {"name": "Adam", "args": {"lr": options.lr, "weight_decay": options.decay, "fused": True}},
            "schedule": {"kind": "constant"},
            "batch_size": options.batch,
            "epochs": options.epochs or job.epochs,
            "distill": 0.0 if recipe is None else options.distill,
            "device": "cpu",
            "channels_last": True,
            "precision": options.precision,
            "threads": options.threads,
            "seeds": [seed],
            "evaluate": {"bits": [], "calibrate": 0, "every": 1 if options.holdout else 0},
            "extra": {"max_steps": options.max_steps, "train_subset": options.subset},
        }
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may change for all jobs alike."""

    data_dir: Path
    out: Path
    holdout: int = 0
    epochs: int | None = None
    lr: float = 2e-3
    decay: float = 0.0
    batch: int = 128
    warp: tuple[float, float, float] | None = WARP
    distill: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    subset: int | None = None
    max_steps: int | None = None

    def folder(self, name: str, seed: int) -> Path:
        """Where a job of one seed keeps its files; held-out, distilled and bfloat16 ones apart, others are refused."""
        tail = "-distilled" if self.distill and job_of(name).recipe is not None else ""
        tail += "-bf16" if self.precision == "bf16" else ""
        tail += f"-holdout{self.holdout}" if self.holdout else ""
        return self.out / f"{name}{tail}" / f"seed{seed}"


def kept(run: dt.Run) -> dict[str, int]:
    """Weights that are not zero in the compressed life, by name."""
    return {row["name"]: round(row["weights"] * (1 - row["zeros"])) for row in run.measure()}


def train_one(name: str, seed: int, options: Options, console: Console, resume: bool) -> dict[str, Any]:
    """One job of one seed, after the dense network it starts from; a finished one is read from its file.

    Raises:
        ValueError: its folder holds an unfinished run and `resume` was not asked for, or a run of other settings.
    """
    out, job = options.folder(name, seed), job_of(name)
    plan = experiment(name, job, seed, options)
    if (done := finished(plan, seed, out)) is not None:
        return done
    if not resume and (out / "last.pt").exists():
        raise ValueError(f"{out} holds an unfinished run: add --resume or choose another --out")
    recipe = None if job.recipe is None else job.recipe()
    if recipe is not None:
        train_one("dense", seed, replace(options, epochs=None), console, resume=True)
    trainer = LeNetTrainer(plan, recipe, seed, out, options.data_dir, None, console)
    if resume:
        trainer.resume()
    if trainer.run is not None:
        trainer.log(f"plan:\n{trainer.run.plan}")
    trainer.train()
    result = trainer.result()
    if trainer.run is not None:
        result |= sizes(trainer, out)
    result["peak_memory_bytes"] = process_peak()
    passing = out / "result.json.tmp"
    passing.write_text(json.dumps(result, indent=1))
    passing.replace(out / "result.json")
    return result


def sizes(trainer: LeNetTrainer, out: Path) -> dict[str, Any]:
    """What is left of the weights, whether they lie in their targets, and the bytes of the file."""
    run = trainer.run
    assert run is not None
    rows = run.measure()
    counts = kept(run)
    written = dt.save(run, out / "model.detent", "compressed")
    found = {
        "kept": counts,
        "kept_all": sum(counts.values()),
        "rate": WEIGHTS / max(sum(counts.values()), 1),
        "error": max(row["error"] for row in rows),
        "bytes": written,
    }
    trainer.log(f"kept {found['kept_all']} weights ({found['rate']:.1f}x) {counts}, {found['bytes']} bytes")
    return found


# --- records ------------------------------------------------------------------------------------------------------


def record(name: str, options: Options, folder: Path, command: str) -> Path | None:
    """Writes the record of a job from all its seeds that are finished."""
    parent = options.folder(name, 0).parent
    done = sorted(parent.glob("seed*/result.json"))
    if not done:
        return None
    results = [json.loads(file.read_text()) for file in done]
    job = job_of(name)
    summary: dict[str, Any] = {"full": summarise([r["test"]["full"]["accuracy"] for r in results])}
    if job.recipe is not None:
        lives = [r["test"]["compressed"]["recipe"]["data_free"]["accuracy"] for r in results]
        summary |= {
            "compressed": summarise(lives),
            "kept": summarise([float(r["kept_all"]) for r in results]),
            "rate": summarise([r["rate"] for r in results]),
            "bytes": summarise([float(r["bytes"]) for r in results]),
        }
    stem = f"admm-lenet-{parent.name}"
    config = experiment(name, job, results[0]["seed"], options).model_dump()
    config["data"]["cache"] = config["init"] = None  # folders of one machine
    write_record(
        folder / f"{stem}.json",
        name=stem,
        question=job.question,
        command=command,
        seeds=[r["seed"] for r in results],
        config=config,
        results={"summary": summary, "seeds": results},
        notes=f"Retraining after a mapping at {RETRAIN:g} times the rate (ADMM's and plain masks' alike). "
        "Accuracies in % on the test split, read once after the last epoch; every seed starts from a dense "
        "network of its own. Settings were chosen on images held out from the train split. Rates count weights, "
        "not indices, of the 430,500; bytes are those of the file, indices and biases included. Seconds are those of "
        "training alone; peak memory is that of the process to the end of a seed, other jobs before it included.",
        cost={"seconds": sum(r["train_seconds"] for r in results)} | peak_memory(results),
    )
    return folder / f"{stem}.json"


def main(
    data_dir: Annotated[Path, typer.Option(help="folder with data/mnist", envvar="DETENT_SHARED")],
    only: Annotated[list[str] | None, typer.Option(help="a job by name; may be repeated")] = None,
    rivals: Annotated[bool, typer.Option("--rivals", help="the jobs of the comparison at one rate")] = False,
    listed: Annotated[bool, typer.Option("--list", help="name the jobs and stop")] = False,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="may be repeated; 0, 1 and 2 by default")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="instead of the job's own")] = None,
    holdout: Annotated[int, typer.Option(min=0, help="train images that are measured on instead")] = 0,
    lr: Annotated[float, typer.Option(help="base learning rate of Adam")] = 2e-3,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    warp: Annotated[tuple[float, float, float], typer.Option(help="degrees, scale and pixels; see Batches")] = WARP,
    distill: Annotated[
        float, typer.Option(min=0, max=1, help="share of the loss that is the divergence from the dense network")
    ] = 0.0,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="bf16 is autocast, where the CPU has AMX or AVX512-BF16")
    ] = "fp32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    subset: Annotated[int | None, typer.Option(min=64, help="train on this many images only")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="stop early, for trying things out")] = None,
    out: Annotated[Path, typer.Option(help="where trainings are kept")] = Path("runs/admm-lenet"),
    records: Annotated[Path, typer.Option(help="folder of the records")] = RECORDS,
    resume: Annotated[bool, typer.Option("--resume", help="continue what --out holds")] = False,
) -> None:
    """Trains what is not finished in --out yet, job by job and seed by seed, and writes a record for each job."""
    console = Console()
    names = [*(only or ()), *(RIVALS if rivals else ())] or list(STANDARD)
    if listed:
        for name in [*JOBS, *RIVALS]:
            console.print(f"{name:16} {job_of(name).question}", highlight=False)
        return
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    options = Options(
        data_dir=data_dir,
        out=out,
        holdout=holdout,
        epochs=epochs,
        lr=lr,
        batch=batch,
        warp=warp,
        distill=distill,
        precision=precision,
        threads=threads,
        subset=subset,
        max_steps=max_steps,
    )
    command = shlex.join(["python", "-m", "papers.admm.lenet", *sys.argv[1:]])
    for name in names:
        job_of(name)
        for number in seed or (0, 1, 2):
            result = train_one(name, number, options, console, resume)
            console.print(_line(name, number, result), highlight=False)
        written = record(name, options, records, command)
        console.print(f"record: {written}", highlight=False)


def _line(name: str, seed: int, result: Mapping[str, Any]) -> str:
    test = result["test"]
    text = f"{name} seed {seed}: test, full {test['full']['accuracy']:.2f} %"
    if "recipe" in test["compressed"]:
        text += f", compressed {test['compressed']['recipe']['data_free']['accuracy']:.2f} %, kept {result['kept_all']}"
    return text


if __name__ == "__main__":
    typer.run(main)
