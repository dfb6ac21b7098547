"""What PSG costs and gives with nothing said: short trainings of equal length with and without it, nothing tuned.

    python -m papers.psg.auto digits lenet-mnist chars --data-dir ../shared

A setting is a start (from scratch, or trained before), a schedule, an optimizer and its rate. Every one is trained
plainly, with `dt.PSG()` for each width, and with the old fixed gain, from the same first weights and through the same
batches; the last step is measured on a part of the *train* split that is held out (of text: on the last tenth). No test
split is opened. Finished trainings are kept in ``--out``, one line each, so that a run that was cut off goes on.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

import detent as dt
from detent.data import ImageSet, digits, load_images, split_holdout
from detent.report.record import summarise, write_record
from papers.models import LeNet5, resnet8
from papers.psg.defaults import RECORDS, deep_digits

__all__ = ["TASKS", "Chars", "Setting", "Task", "jobs_of", "summarise_rows", "train_one"]

WIDTHS = (4, 3, 2)
_TRAINED = {"SGD": 0.05, "AdamW": 2e-3}  # the rate of the training before, where a setting starts from a trained net


# --- what is trained ------------------------------------------------------------------------------------------------


class Chars(nn.Module):
    """A small transformer over characters: two blocks, causal, weights of the head its own.

    Example:
        >>> Chars(65)(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 8, 65])
    """

    def __init__(self, tokens: int, width: int = 64, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Embedding(length, width)
        block = {"dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(width, heads, **block) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        h = self.embed(x) + self.place(torch.arange(length))
        for block in self.blocks:
            h = block(h, src_mask=mask)
        return self.head(self.norm(h))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a training goes.

    Args:
        start: "scratch", or "trained" by the same optimizer under a cosine before.
        schedule: "one-cycle", "cosine" (both to 0) or "step" (a tenth at 1/2 and at 3/4).
        optimizer: "SGD" (momentum 0.9) or "AdamW".
        rate: the highest learning rate.
    """

    start: Literal["scratch", "trained"]
    schedule: Literal["one-cycle", "cosine", "step"]
    optimizer: Literal["SGD", "AdamW"]
    rate: float

    def __str__(self) -> str:
        return f"{self.start}, {self.schedule}, {self.optimizer} {self.rate:g}"


def _settings(sgd: float | None, adamw: float) -> tuple[Setting, ...]:
    """Every schedule, two rates a factor 4 apart, both optimizers and both starts, each at least once."""
    found = []
    if sgd is not None:
        found += [
            Setting(start="scratch", schedule="one-cycle", optimizer="SGD", rate=sgd),
            Setting(start="scratch", schedule="cosine", optimizer="SGD", rate=sgd / 4),
            Setting(start="scratch", schedule="step", optimizer="SGD", rate=sgd / 2),
            Setting(start="trained", schedule="cosine", optimizer="SGD", rate=sgd / 4),
        ]
    else:
        found += [
            Setting(start="scratch", schedule="cosine", optimizer="AdamW", rate=adamw / 4),
            Setting(start="scratch", schedule="step", optimizer="AdamW", rate=adamw),
        ]
    return (
        *found,
        Setting(start="scratch", schedule="one-cycle", optimizer="AdamW", rate=adamw),
        Setting(start="trained", schedule="cosine", optimizer="AdamW", rate=adamw / 4),
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, its data, and how long it is trained.

    Args:
        model: makes the network.
        settings: the trainings.
        steps: of one training, before and after alike.
        batch: its batch.
        train: how many examples are trained on.
        held_out: how many of the train split are not.
        data: folder below ``--data-dir``, or `None` for scikit-learn's digits.
        ends: first and last weight, kept at 8 bits.
        decay: weight decay of SGD; AdamW has 0.01.
        crop: pixels of padding before a random crop; flips too.
    """

    model: Callable[[], nn.Module]
    settings: tuple[Setting, ...]
    steps: int
    batch: int
    train: int
    held_out: int
    data: str | None
    ends: tuple[str, ...] = ()
    decay: float = 5e-4
    crop: int = 0

    def plain(self) -> dict[str, Any]:
        """What a reader must know, as plain data."""
        return {**dataclasses.asdict(self), "model": self.model.__name__}


def chars() -> nn.Module:
    """The transformer for the 65 characters of tiny Shakespeare."""
    return Chars(65)


TASKS: dict[str, Task] = {
    "digits": Task(
        model=deep_digits,
        settings=_settings(0.1, 4e-3),
        steps=160,
        batch=64,
        train=1078,
        held_out=359,
        data=None,
        ends=("conv1.weight", "fc.weight"),
    ),
    "lenet-mnist": Task(
        model=LeNet5,
        settings=_settings(0.05, 4e-3),
        steps=160,
        batch=64,
        train=5000,
        held_out=5000,
        data="data/mnist",
    ),
    "chars": Task(
        model=chars,
        settings=_settings(None, 4e-3),
        steps=240,
        batch=16,
        train=1_000_000,
        held_out=100_000,
        data="data/tinyshakespeare",
    ),
    "resnet8-cifar10": Task(
        model=resnet8,
        settings=_settings(0.1, 4e-3),
        steps=600,
        batch=64,
        train=20000,
        held_out=2000,
        data="data/cifar10",
        ends=("conv1.weight", "fc.weight"),
        crop=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What is trained on and what is held out; images as they are fed, or one long text."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    length: int = 0  # of a piece of text; 0 for images

    @staticmethod
    def of(task: Task, seed: int, data_dir: Path | None, cache: Path) -> Examples:
        """Read the train split and hold a part of it out.

        Raises:
            ValueError: a task that needs ``--data-dir``.
        """
        if task.data is not None and data_dir is None:
            raise ValueError(f"--data-dir: give the folder that holds {task.data}")
        if task.data is not None and task.data.endswith("tinyshakespeare"):
            assert data_dir is not None
            text = (data_dir / task.data / "input.txt").read_text(encoding="utf-8")
            letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
            ids = torch.tensor([letters[letter] for letter in text])
            mine, rest = ids[: task.train], ids[-task.held_out :]
            return Examples(train=(mine, mine), held_out=(rest, rest), length=64)
        if task.data is None:
            images = digits("train")
        else:
            assert data_dir is not None
            name = f"{Path(task.data).name}-train.safetensors"
            images = load_images(data_dir / task.data, "train", cache=cache / name, threads=1)
        train, held_out = split_holdout(images, task.held_out, seed)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        train = train.subset(order[: task.train])
        pixels = train.images[:2000].float() / 255
        mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)

        def fed(part: ImageSet) -> tuple[Tensor, Tensor]:
            return (part.images.float() / 255 - mean) / std, part.labels

        return Examples(train=fed(train), held_out=fed(held_out))

    def batches(self, task: Task, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As many batches as steps, the same for a seed."""
        draw = torch.Generator().manual_seed(1000 + seed)
        x, y = self.train
        if self.length:
            for _ in range(steps):
                yield self._pieces(torch.randint(len(x) - self.length - 1, (task.batch,), generator=draw))
            return
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < task.batch:
                order = torch.randperm(len(x), generator=draw)
            pick, order = order[: task.batch], order[task.batch :]
            yield _crop(x[pick], task.crop, draw), y[pick]

    def _pieces(self, places: Tensor) -> tuple[Tensor, Tensor]:
        index = places.unsqueeze(1) + torch.arange(self.length + 1)
        text = self.train[0][index]
        return text[:, :-1], text[:, 1:]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Percent right and mean cross-entropy on what is held out."""
        x, y = self.held_out
        if self.length:
            count = (len(x) - 1) // self.length
            y = x[1 : count * self.length + 1].reshape(count, -1)
            x = x[: count * self.length].reshape(count, -1)
        model.eval()
        with torch.no_grad():
            out = torch.cat([model(part) for part in x.split(250)]).flatten(0, -2)
        model.train()
        right = (out.argmax(1) == y.flatten()).double().mean()
        return {"accuracy": 100 * float(right), "loss": float(F.cross_entropy(out, y.flatten()))}


def _crop(x: Tensor, pad: int, draw: torch.Generator) -> Tensor:
    if not pad:
        return x
    size = x.shape[-1]
    wide = F.pad(x, (pad, pad, pad, pad))
    places = torch.randint(2 * pad + 1, (len(x), 2), generator=draw).tolist()
    flips = torch.rand(len(x), generator=draw) < 0.5
    parts = [each[:, i : i + size, j : j + size] for each, (i, j) in zip(wide, places, strict=True)]
    return torch.stack([part.flip(-1) if flip else part for part, flip in zip(parts, flips.tolist(), strict=True)])


# --- one training ---------------------------------------------------------------------------------------------------

_Key = tuple[str, str, int | None]


def recipe_of(task: Task, bits: int, mechanism: dt.Mechanism | None) -> dt.Recipe:
    """First and last weight at 8 bits if the task says so, the rest at `bits`, one scale a tensor."""
    ends = [dt.Rule(match=f"^{end}$", target=dt.Uniform(bits=8), mechanism=mechanism, pinned=True) for end in task.ends]
    return dt.Recipe([*ends, dt.Rule(match="@weights", target=dt.Uniform(bits=bits), mechanism=mechanism)])


def mechanism_of(variant: str) -> dt.Mechanism | None:
    """Plain training, PSG with nothing said, and what PSG was before, spelt out."""
    if variant == "plain":
        return None
    if variant == "auto":
        return dt.PSG()
    return dt.PSG(gain=8.0, strength=1.0, eps=dt.Linear(first=0.05, last=0.0, end=0.8), start=0.0, clip_start=0.0)


def _optimizer(task: Task, model: nn.Module, name: str, rate: float) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=task.decay)


def _schedule(kind: str, optimizer: torch.optim.Optimizer, rate: float, steps: int) -> Any:
    rates = torch.optim.lr_scheduler
    if kind == "one-cycle":
        return rates.OneCycleLR(optimizer, rate, total_steps=steps)
    if kind == "cosine":
        return rates.CosineAnnealingLR(optimizer, steps)
    return rates.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4], 0.1)


def _train(
    task: Task, seed: int, examples: Examples, model: nn.Module, setting: Setting, recipe: dt.Recipe | None
) -> tuple[dt.Run | None, bool]:
    """Trains to the end; whether the loss stayed a number."""
    optimizer = _optimizer(task, model, setting.optimizer, setting.rate)
    schedule = _schedule(setting.schedule, optimizer, setting.rate, task.steps)
    run = None if recipe is None else dt.attach(model, optimizer, recipe, task.steps, nonfinite="ignore")
    model.train()
    for x, y in examples.batches(task, seed, task.steps):
        optimizer.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out.flatten(0, -2), y.flatten())
        if not math.isfinite(loss.item()):
            return run, False
        loss.backward()
        optimizer.step()
        schedule.step()
    return run, all(bool(torch.isfinite(p).all()) for p in model.parameters())


def _first(task: Task, seed: int, examples: Examples, setting: Setting, cache: dict[str, Any]) -> nn.Module:
    """The network that every variant of a setting starts from."""
    torch.manual_seed(seed)
    model = task.model()
    if setting.start == "trained":
        key = f"{seed} {setting.optimizer}"
        if key not in cache:
            before = Setting(
                start="scratch", schedule="cosine", optimizer=setting.optimizer, rate=_TRAINED[setting.optimizer]
            )
            _train(task, seed + 100, examples, model, before, None)
            cache[key] = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(cache[key])
    return model


def train_one(
    task: Task, seed: int, examples: Examples, setting: Setting, variant: str, bits: int | None, cache: dict[str, Any]
) -> list[dict[str, Any]]:
    """Trains one variant and measures it: one row a width (plain training is measured at all of them)."""
    began = time.process_time()
    model = _first(task, seed, examples, setting, cache)
    recipe = None if bits is None else recipe_of(task, bits, mechanism_of(variant))
    run, finite = _train(task, seed, examples, model, setting, recipe)
    rows = []
    for width in WIDTHS if bits is None else (bits,):
        row: dict[str, Any] = {"setting": str(setting), "variant": variant, "bits": width, "seed": seed}
        row["diverged"] = not finite
        if finite:
            life = run or dt.compress(model, recipe_of(task, width, None))
            row["full"] = examples.measure(model)
            with life.compressed(batchnorm=False):
                row["data_free"] = examples.measure(model)
        rows.append(row | {"seconds": round(time.process_time() - began, 2)})
    return rows


# --- the record -----------------------------------------------------------------------------------------------------


def jobs_of(task: Task, seed: int, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Setting, str, int | None]]:
    """What is not finished yet."""
    done = {(row["setting"], row["variant"], row["bits"]) for row in rows if row["seed"] == seed}
    for setting in task.settings:
        if (str(setting), "plain", WIDTHS[-1]) not in done:
            yield setting, "plain", None
        for variant, widths in (("auto", WIDTHS), ("gain 8", (3,))):
            yield from ((setting, variant, bits) for bits in widths if (str(setting), variant, bits) not in done)


def summarise_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a setting, variant and width: both lives, and how far each is from the plain full life of its seed.

    Seeds whose plain training diverged have no say; a variant that diverged where plain training did not is counted.
    """
    by: dict[tuple[str, str, int], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["setting"], row["variant"], row["bits"]), {})[row["seed"]] = row
    found = []
    for (setting, variant, bits), mine in by.items():
        plain = by.get((setting, "plain", bits), {})
        seeds = [s for s in sorted(mine) if s in plain and not plain[s]["diverged"]]
        sound = [s for s in seeds if not mine[s]["diverged"]]
        entry: dict[str, Any] = {"setting": setting, "variant": variant, "bits": bits, "seeds": seeds}
        entry["diverged"] = len(seeds) - len(sound)
        if sound:
            for unit in ("accuracy", "loss"):
                entry[unit] = {
                    "full": summarise([mine[s]["full"][unit] for s in sound]),
                    "data_free": summarise([mine[s]["data_free"][unit] for s in sound]),
                    "full_minus_plain": summarise([mine[s]["full"][unit] - plain[s]["full"][unit] for s in sound]),
                    "data_free_minus_full": summarise(
                        [mine[s]["data_free"][unit] - mine[s]["full"][unit] for s in sound]
                    ),
                }
        found.append(entry)
    return found


def _write(name: str, task: Task, rows: Sequence[Mapping[str, Any]], path: Path, command: str) -> None:
    write_record(
        path,
        name=path.stem,
        question="What does PSG cost the full life, and what does rounding cost, with nothing said and nothing tuned?",
        command=command,
        seeds=sorted({row["seed"] for row in rows}),
        config={"task": name, **task.plain(), "threads": torch.get_num_threads()},
        results={"summary": summarise_rows(rows), "rows": list(rows)},
        notes="On examples held out from the train split, after the last step; no test split was opened. The rule of "
        "the gain was chosen on LeNet-5 with CIFAR-10 in grey (28 x 28), before these were run; its start and ramp "
        "also on the digits under SGD at 2 bits, so that those rows are no test of them. seconds are "
        "CPU seconds of one training, on a machine that did other work too. Peak memory was not measured: rows are "
        "gathered from cached trainings. An entry has the seeds that are finished.",
        cost={"cpu_seconds": sum(row["seconds"] for row in rows)},
    )


def _cached(file: Path) -> list[dict[str, Any]]:
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def main(
    task: Annotated[list[str], typer.Argument(help=f"of {', '.join(TASKS)}")],
    data_dir: Annotated[Path | None, typer.Option(help="folder with data/", envvar="DETENT_SHARED")] = None,
    out: Annotated[Path, typer.Option(help="where finished trainings are kept")] = Path("runs/psg-auto"),
    records: Annotated[Path, typer.Option(help="folder of the records")] = RECORDS,
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated; 0, 1 and 2 by default")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="instead of the task's own")] = None,
    train: Annotated[bool, typer.Option(help="--no-train writes the records of what is finished")] = True,
) -> None:
    """Trains what is not in ``--out`` yet and writes a record for each task."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    console = Console()
    command = shlex.join(["python", "-m", "papers.psg.auto", *sys.argv[1:]])
    for unknown in [name for name in task if name not in TASKS]:
        raise typer.BadParameter(f"{unknown}: known are {', '.join(TASKS)}")
    for name in task:
        plan = TASKS[name] if steps is None else dataclasses.replace(TASKS[name], steps=steps)
        same = {name: value for name, value in plan.plain().items() if name != "settings"}  # more of them may follow
        key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
        file = out / f"{name}-{key}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows, cache = _cached(file), {}
        for number in (seed or (0, 1, 2)) if train else ():
            examples = Examples.of(plan, number, data_dir, out / "cache")
            for setting, variant, bits in jobs_of(plan, number, rows):
                fresh = train_one(plan, number, examples, setting, variant, bits, cache)
                rows += fresh
                with file.open("a") as lines:
                    lines.writelines(json.dumps(row) + "\n" for row in fresh)
                for row in fresh:
                    lives = [f"{row[life]['accuracy']:6.2f}" for life in ("full", "data_free") if life in row]
                    console.print(name, number, str(setting), variant, f"W{row['bits']}", *lives, highlight=False)
            _write(name, plan, rows, records / f"psg-auto-{name}.json", command)
        if not train:
            _write(name, plan, rows, records / f"psg-auto-{name}.json", command)


if __name__ == "__main__":
    typer.run(main)
