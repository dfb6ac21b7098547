"""Which numbers PSG should have by default: one factor at a time, on held-out training images, never on test data.

    python -m papers.psg.defaults digits-sgd lenet-mnist --data-dir ../shared

Every variant of a task starts from the same trained weights (a seed's own, or a checkpoint's), for PSG is made for
trained networks, sees the same batches and takes the last epoch. What it was trained for is then measured on the
images held out from the *train* split: full precision, and the compressed life at the trained width, data-free and
(where there is BatchNorm) re-estimated. Finished trainings are kept in ``--out``, one line each, so that a run that was
cut off goes on; the record is written from them after every seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import nn

import detent as dt
from detent.data import Batches, ImageSet, digits, load_images, split_holdout
from detent.demo import DigitsNet
from detent.mechanisms import Cadence, Clock, Slot
from detent.report.record import summarise, write_record
from papers.models import LeNet5, MLPerfTinyResNet8, load_checkpoint
from papers.train import evaluate

__all__ = ["RECORDS", "TASKS", "VARIANTS", "MeanUnit", "Task", "Variant", "summarise_rows", "train_one"]

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "benchmarks" / "records"
WIDTHS = (3, 2, 4)
CALIBRATE = 1000  # train images for BatchNorm re-estimation
# A change here can change a number; every row says which version of it made the row.
CODE = tuple(f"src/detent/{part}" for part in ("mechanisms", "targets", "engine.py", "lives.py", "claimed.py"))


# --- variants -----------------------------------------------------------------------------------------------------

# Spelt out, so that a later change of a default does not change what these names mean.
BASE: dict[str, Any] = {"gain": 8.0, "eps": dt.Linear(first=0.05, last=0.0, end=0.8), "clip": True, "clip_start": 0.0}


@dataclass(frozen=True, kw_only=True)
class MeanUnit(dt.Mechanism):
    """PSG in the rival unit: distances are divided by the tensor's current mean, not by a quarter of the cell.

        s(w) = gain * (min(d, c / 2) + eps * c) / mean(min(d, c / 2) + eps * c)

    so the mean factor is `gain` at every step, however close the weights are. For one scale a tensor.

    Args:
        psg: everything else.
    """

    psg: dt.PSG

    keeps_full_life: ClassVar[bool] = True

    def cadence(self, target: dt.Target) -> Cadence:
        return self.psg.cadence(target)

    def active(self, clock: Clock) -> bool:
        return self.psg.active(clock)

    def before_step(self, slot: Slot, clock: Clock) -> None:
        mean = self.psg.scale(slot.weight, slot.target, slot.params, clock.step, clock.total_steps).mean()
        slot.scratch["mean"] = mean
        self._now(mean).before_step(slot, clock)

    def after_step(self, slot: Slot, clock: Clock) -> None:
        self._now(slot.scratch.pop("mean")).after_step(slot, clock)

    def undo(self, slot: Slot, clock: Clock) -> None:
        slot.scratch.pop("mean", None)
        self.psg.undo(slot, clock)

    def _now(self, mean: torch.Tensor) -> dt.PSG:
        """PSG whose gain makes the mean factor `gain`; where all weights lie on their levels, it stays finite."""
        return dataclasses.replace(self.psg, gain=float(self.psg.gain) ** 2 / max(float(mean), 1e-9))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing to train with.

    Args:
        name: unique.
        factor: what it differs in from the base ("base", "gain", ..., or "rival").
        mechanism: `None` for plain training.
        fit_until: fraction of training from which the grid is frozen, instead of the mechanism's own.
        paper: the published form: running min-max range fitted at every step, linear biases on a grid of their own,
            no weight decay at 2 bits.
    """

    name: str
    factor: str
    mechanism: dt.Mechanism | None
    fit_until: float | None = None
    paper: bool = False


def _variants() -> Iterator[Variant]:
    def psg(factor: str, name: str, fit_until: float | None = None, **changed: Any) -> Variant:
        return Variant(name=name, factor=factor, mechanism=dt.PSG(**BASE | changed), fit_until=fit_until)

    yield psg("base", "base")
    yield Variant(name="SGD", factor="rival", mechanism=None)
    yield Variant(name="Clip", factor="rival", mechanism=dt.Clip())
    yield from (psg("gain", f"gain {gain}", gain=float(gain)) for gain in (4, 16, 2))
    yield psg("clip", "clip off", clip=False)
    yield psg("clip", "clip from 0.1", clip_start=0.1)
    yield psg("clip", "clip when frozen", clip_start=None)
    # The range is fitted again to what it has clipped: it shrinks, and the weights with it.
    yield psg("fit_until", "fit until 0.3", 0.3)
    yield psg("eps", "eps 0", eps=0.0)
    yield psg("eps", "eps 0.05", eps=0.05)
    yield psg("eps", "eps 0.1 to 0", eps=dt.Linear(first=0.1, last=0.0, end=0.8))
    yield from (psg("start", f"start {start}", start=start) for start in (0.1, 0.3))
    for gain in (8, 4):
        rival = MeanUnit(psg=replace(dt.PSG(**BASE), gain=float(gain)))
        yield Variant(name=f"mean unit, gain {gain}", factor="unit", mechanism=rival)
    for lambda_s in (150, 50, 20, 450, 1350):
        mechanism = dt.PSG.paper(lambda_s=float(lambda_s))
        yield Variant(name=f"paper {lambda_s}", factor="rival", mechanism=mechanism, fit_until=1.0, paper=True)


VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _variants()}


# --- tasks --------------------------------------------------------------------------------------------------------


def deep_digits() -> nn.Module:
    """Eleven narrow convolutions with BatchNorm for 8x8 digits: rounding errors add up, unlike in a shallow network."""
    return DigitsNet(10, (8, 8, 8, 8, 16, 16, 16, 16, 32, 32, 32))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, its data and how it is trained.

    Args:
        model: makes the network.
        classes: number of classes.
        optimizer: "SGD" (momentum 0.9) or "AdamW"; cosine to 0.
        rate: learning rate.
        first_epochs: passes of plain training before the variants part, at `first_rate`; 0 with a checkpoint.
        first_rate: learning rate of those.
        decay: weight decay.
        epochs: passes over what is trained on.
        held_out: images of the train split that are never trained on, drawn anew for every seed.
        data: folder below ``--data-dir``, or `None` for scikit-learn's digits.
        subset: train on this many images only.
        ends: first and last weight, kept at 8 bits; empty for all weights at the width trained for.
        checkpoint: file below ``--data-dir`` to start from.
        raw: pixels 0..255 as the checkpoint expects them, else normalised.
        crop: pixels of padding before a random crop; flips too.
        batch: batch size.
    """

    model: Callable[[], nn.Module]
    classes: int = 10
    optimizer: str = "SGD"
    rate: float
    first_epochs: int = 0
    first_rate: float = 0.1
    decay: float = 5e-4
    epochs: int
    held_out: int
    data: str | None = None
    subset: int | None = None
    ends: tuple[str, ...] = ()
    checkpoint: str | None = None
    raw: bool = False
    crop: int = 0
    batch: int = 64

    def plain(self) -> dict[str, Any]:
        """What a reader must know, as plain data."""
        return {**dataclasses.asdict(self), "model": getattr(self.model, "__name__", str(self.model))}


_DIGITS = Task(
    model=deep_digits, first_epochs=20, rate=0.03, epochs=30, held_out=359, ends=("conv1.weight", "fc.weight")
)
TASKS: dict[str, Task] = {
    "digits-sgd": _DIGITS,
    "digits-sgd-all": dataclasses.replace(_DIGITS, ends=()),
    "digits-adamw": dataclasses.replace(_DIGITS, optimizer="AdamW", first_rate=3e-3, rate=1e-3, decay=1e-2),
    "lenet-mnist": Task(
        model=LeNet5,
        first_epochs=3,
        first_rate=0.01,
        rate=0.01,
        epochs=3,
        held_out=5000,
        data="data/mnist",
        subset=10000,
    ),
    "resnet8-cifar10": Task(
        model=MLPerfTinyResNet8,
        rate=0.01,
        decay=1e-4,
        epochs=2,
        held_out=2000,
        data="data/cifar10",
        subset=10000,
        ends=("conv2d.weight", "dense.weight"),
        checkpoint="checkpoints/cifar10_resnet8_mlperftiny.safetensors",
        raw=True,
        crop=4,
    ),
}


def recipe_of(task: Task, variant: Variant, bits: int) -> dt.Recipe:
    """First and last weight at 8 bits if the task says so, the rest at `bits`, one scale a tensor."""
    how = "ema" if variant.paper else "mse"
    rest: dict[str, Any] = {"mechanism": variant.mechanism, "fit_until": variant.fit_until}
    if variant.paper:
        rest |= {"fit_every": 1, "include": r"(fc\d?|dense)\.bias$"}
    rules = [
        dt.Rule(match=f"^{end.removesuffix('.weight')}\\.", target=dt.Uniform(bits=8, range=how), pinned=True, **rest)
        for end in task.ends
    ]
    body = r"(weight|bias)$" if variant.paper else r"weight$"
    return dt.Recipe([*rules, dt.Rule(match=body, target=dt.Uniform(bits=bits, range=how), **rest)])


# --- one training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The images of one task and seed; the test split is never opened."""

    task: Task
    seed: int
    train: ImageSet
    held_out: ImageSet
    started: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(task: Task, seed: int, data_dir: Path | None, cache: Path) -> Bench:
        """Reads the train split and holds a part of it out.

        Raises:
            ValueError: a task that needs ``--data-dir``.
        """
        if task.data is None:
            images = digits("train")
        elif data_dir is None:
            raise ValueError(f"--data-dir: give the folder that holds {task.data}")
        else:
            name = f"{Path(task.data).name}-train.safetensors"
            images = load_images(data_dir / task.data, "train", cache=cache / name, threads=1)
        train, held_out = split_holdout(images, task.held_out, seed)
        if task.subset is not None:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            train = train.subset(order[: task.subset])
        return Bench(task=task, seed=seed, train=train, held_out=held_out)

    def batches(self, images: ImageSet, size: int, training: bool) -> Batches:
        """Augmented, shuffled and full for training; as they are for measuring."""
        pixels = self.train.images[:2000].float() / 255
        mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
        if self.task.raw:
            mean, std = [0.0] * len(mean), [1 / 255] * len(std)
        crop = self.task.crop if training else 0
        more: dict[str, Any] = {"crop": crop, "flip": crop > 0, "seed": self.seed, "drop_last": training}
        return Batches(images.images, images.labels, size, training, mean, std, **more)

    def trained(self) -> nn.Module:
        """The network that every variant starts from; trained plainly the first time it is asked for."""
        task = self.task
        torch.manual_seed(self.seed)
        model = task.model()
        if task.checkpoint is not None:
            load_checkpoint(model, task.checkpoint)
        if task.first_epochs and not self.started:
            batches = self.batches(self.train, task.batch, training=True)
            optimizer = _optimizer(task, model, task.first_rate, task.decay)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.first_epochs * len(batches))
            if not _train(model, optimizer, schedule, batches, range(task.first_epochs)):
                raise RuntimeError(f"plain training diverges at first_rate={task.first_rate}")
            self.started.update({name: value.clone() for name, value in model.state_dict().items()})
        if self.started:
            model.load_state_dict(self.started)
        return model


def train_one(bench: Bench, variant: Variant, bits: int | None) -> list[dict[str, Any]]:
    """Trains one variant and measures it: one row a width (plain training is measured at all of them)."""
    task, began = bench.task, time.process_time()
    model = bench.trained()
    optimizer = _optimizer(task, model, task.rate, 0.0 if variant.paper and bits == 2 else task.decay)
    batches = bench.batches(bench.train, task.batch, training=True)
    total = task.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    run = None
    if variant.mechanism is not None:
        assert bits is not None
        run = dt.attach(model, optimizer, recipe_of(task, variant, bits), total, nonfinite="ignore")
    diverged = not _train(
        model, optimizer, schedule, batches, range(task.first_epochs, task.first_epochs + task.epochs)
    )
    rows = []
    for width in WIDTHS if bits is None else (bits,):
        row: dict[str, Any] = {"variant": variant.name, "bits": width, "seed": bench.seed, "steps": total}
        if diverged:
            # The weights are not numbers: such a network guesses.
            chance = {"accuracy": 100 / task.classes, "loss": math.log(task.classes)}
            row |= {"diverged": True, "full": chance, "data_free": chance, "batchnorm": chance}
        else:
            life = run or dt.compress(model, recipe_of(task, variant, width))
            row |= {"diverged": False, **_measure(bench, model, life)}
        rows.append({**row, "seconds": time.process_time() - began})
    return rows


def _optimizer(task: Task, model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    if task.optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Batches,
    epochs: range,
) -> bool:
    """Trains to the end; False if the loss stopped being a number."""
    model.train()
    for epoch in epochs:
        batches.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if not math.isfinite(loss.item()):
                return False
            loss.backward()
            optimizer.step()
            schedule.step()
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def _measure(bench: Bench, model: nn.Module, run: dt.Run) -> dict[str, Any]:
    held_out = bench.batches(bench.held_out, 500, training=False)
    found: dict[str, Any] = {"full": evaluate(model, held_out)}
    with run.compressed(batchnorm=False):
        found["data_free"] = evaluate(model, held_out)
    found["batchnorm"] = found["data_free"]
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        few = bench.train.subset(torch.arange(min(CALIBRATE, len(bench.train))))
        run.recalibrate(bench.batches(few, 250, training=False))
        with run.compressed():
            found["batchnorm"] = evaluate(model, held_out)
    body = [row["distance"] for row in run.measure() if row["target"].bits < 8]
    return found | {"distance": sum(body) / len(body)}


# --- the record ---------------------------------------------------------------------------------------------------


def summarise_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a variant, only from seeds and widths that the base has too.

    ``score`` and ``full`` are means over widths, summarised over seeds; ``minus_base`` pairs each (seed, width)
    with the base's, which removes what start and batches do to both. A paper variant is one width of one lambda_s:
    ``paper, best`` takes at each width the lambda_s with the best mean score, so it is an optimistic bound.
    """
    by: dict[str, dict[tuple[int, int], Mapping[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["variant"], {})[row["seed"], row["bits"]] = row
    best = _best_paper(by)
    if best:
        by["paper, best"] = best
    base = by.get("base", {})
    found = []
    for name, mine in by.items():
        keys = sorted(mine.keys() & base.keys())
        if not keys:
            continue
        entry: dict[str, Any] = {
            "variant": name,
            "factor": VARIANTS[name].factor if name in VARIANTS else "rival",
            "trainings": len(keys),
            "diverged": sum(bool(mine[k]["diverged"]) for k in keys),
            "widths": sorted({bits for _, bits in keys}),
        }
        if name == "paper, best":
            entry["lambda_s"] = {str(bits): mine[k]["variant"] for k in keys for bits in [k[1]]}
        for life in ("full", "data_free", "batchnorm"):
            entry[life] = _over_seeds(mine, keys, lambda row, life=life: row[life]["accuracy"])
            entry[f"{life}_loss"] = _over_seeds(mine, keys, lambda row, life=life: row[life]["loss"])
            gaps = {k: {"gap": mine[k][life]["accuracy"] - base[k][life]["accuracy"]} for k in keys}
            entry[f"{life}_minus_base"] = _over_seeds(gaps, keys, lambda row: row["gap"])
        entry["by_width"] = {
            str(bits): {
                life: summarise([mine[k][life]["accuracy"] for k in keys if k[1] == bits])
                for life in ("full", "data_free", "batchnorm")
            }
            for bits in entry["widths"]
        }
        found.append(entry)
    return found


def _best_paper(
    by: Mapping[str, Mapping[tuple[int, int], Mapping[str, Any]]],
) -> dict[tuple[int, int], Mapping[str, Any]]:
    papers = [mine for name, mine in by.items() if name in VARIANTS and VARIANTS[name].paper]
    best: dict[tuple[int, int], Mapping[str, Any]] = {}
    for bits in WIDTHS:

        def score(mine: Mapping[tuple[int, int], Mapping[str, Any]], bits: int = bits) -> float:
            own = [row["data_free"]["accuracy"] for (_, width), row in mine.items() if width == bits]
            return sum(own) / len(own) if own else -1.0

        if papers:
            best |= {k: row for k, row in max(papers, key=score).items() if k[1] == bits}
    return best


def _over_seeds(
    rows: Mapping[tuple[int, int], Mapping[str, Any]],
    keys: Sequence[tuple[int, int]],
    value: Callable[[Mapping[str, Any]], float],
) -> dict[str, Any]:
    """Mean over widths, then mean and spread over seeds."""
    per_seed = []
    for seed in sorted({seed for seed, _ in keys}):
        own = [value(rows[k]) for k in keys if k[0] == seed]
        per_seed.append(sum(own) / len(own))
    return summarise(per_seed)


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for part in CODE:
        path = ROOT / part
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _write(name: str, task: Task, rows: Sequence[Mapping[str, Any]], path: Path, command: str, note: str) -> None:
    write_record(
        path,
        name=path.stem,
        question="Which of PSG's defaults should be another, for all bit-widths at once?",
        command=command,
        seeds=sorted({row["seed"] for row in rows}),
        config={"task": name, **task.plain(), "threads": torch.get_num_threads(), "calibrate": CALIBRATE},
        results={"summary": summarise_rows(rows), "rows": list(rows)},
        notes="Accuracies in % on images held out from the train split; the test split was not opened. Last epoch. "
        f"seconds are CPU seconds of one training, on a machine that did other work too. Peak "
        f"memory was not measured: rows are gathered from cached trainings. {note}".rstrip(),
        cost={"cpu_seconds": sum(row["seconds"] for row in rows), "code": sorted({row["code"] for row in rows})},
    )


def _cached(file: Path) -> list[dict[str, Any]]:
    """Finished trainings; a last line that was cut off is left out."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def main(
    task: Annotated[list[str], typer.Argument(help=f"of {', '.join(TASKS)}")],
    data_dir: Annotated[
        Path | None, typer.Option(help="folder with data/ and checkpoints/", envvar="DETENT_SHARED")
    ] = None,
    out: Annotated[Path, typer.Option(help="where finished trainings are kept")] = Path("runs/psg-defaults"),
    records: Annotated[Path, typer.Option(help="folder of the records")] = RECORDS,
    variant: Annotated[list[str] | None, typer.Option(help="may be repeated; all by default")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="may be repeated; 3, 2 and 4 by default")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated; 0, 1 and 2 by default")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="instead of the task's own")] = None,
    subset: Annotated[int | None, typer.Option(min=64, help="train on this many images only")] = None,
    train: Annotated[bool, typer.Option(help="--no-train writes the records of what is finished")] = True,
    label: Annotated[str, typer.Option(help="end of the records' names")] = "",
    note: Annotated[str, typer.Option(help="more to say in the records")] = "",
) -> None:
    """Trains what is not in ``--out`` yet and writes a record for each task."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # near its target PSG's momenta fade through denormals, which are slow
    console = Console()
    code, command = _fingerprint(), shlex.join(["python", "-m", "papers.psg.defaults", *sys.argv[1:]])
    for unknown in [name for name in task if name not in TASKS] + [v for v in variant or () if v not in VARIANTS]:
        raise typer.BadParameter(f"{unknown}: known are {', '.join([*TASKS, *VARIANTS])}")
    for name in task:
        changed = {"epochs": epochs, "subset": subset}
        plan = dataclasses.replace(TASKS[name], **{k: v for k, v in changed.items() if v is not None})
        if plan.checkpoint is not None and data_dir is not None:
            plan = dataclasses.replace(plan, checkpoint=str(data_dir / plan.checkpoint))
        file = out / f"{name}-{_plan_key(plan)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        record = records / f"psg-defaults-{name}{label}.json"
        rows = _cached(file)
        if train:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # without a line that was cut off
        for number in (seed or (0, 1, 2)) if train else ():
            bench = Bench.of(plan, number, data_dir, out / "cache")
            for each, width in _jobs(variant, bits, number, rows):
                fresh = [row | {"code": code} for row in train_one(bench, VARIANTS[each], width)]
                rows += fresh
                with file.open("a") as lines:
                    lines.writelines(json.dumps(row) + "\n" for row in fresh)
                console.print(*(_line(name, row) for row in fresh), sep="\n", highlight=False)
            _write(name, plan, rows, record, command, note)
        if not train:
            _write(name, plan, rows, record, command, note)


def _plan_key(task: Task) -> str:
    return hashlib.sha256(json.dumps(task.plain(), sort_keys=True).encode()).hexdigest()[:8]


def _jobs(
    variants: Sequence[str] | None, bits: Sequence[int] | None, seed: int, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, int | None]]:
    done = {(row["variant"], row["bits"]) for row in rows if row["seed"] == seed}
    for name in variants or VARIANTS:
        if VARIANTS[name].mechanism is None:
            if (name, WIDTHS[-1]) not in done:
                yield name, None
            continue
        yield from ((name, width) for width in bits or WIDTHS if (name, width) not in done)


def _line(task: str, row: Mapping[str, Any]) -> str:
    full, free, again = (row[life]["accuracy"] for life in ("full", "data_free", "batchnorm"))
    return (
        f"{task} seed {row['seed']} W{row['bits']} {row['variant']:20} full {full:6.2f}  data-free {free:6.2f}  "
        f"BN {again:6.2f}  distance {row.get('distance', float('nan')):.3f}  {row['seconds']:.1f} s"
    )


if __name__ == "__main__":
    typer.run(main)
