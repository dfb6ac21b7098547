"""One trainer for every experiment: ``python -m papers.train experiment.yaml --data-dir DIR --out DIR [--resume]``.

An experiment is a YAML file checked by :class:`Experiment`. Training is plain PyTorch; Detent is attached by three
lines. A run that was cut off continues bit for bit, also in the middle of an epoch. While training, only the held-out
part of the train split is looked at; the test split is read once, after the last epoch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

import detent as dt
from detent.batchnorm import statistics_of
from detent.data import Batches, ImageSet, count_images, digits, load_images, split_holdout, stream_images
from detent.report.record import Record, environment, process_peak, summarise
from papers import models

__all__ = [
    "Experiment",
    "Trainer",
    "all_seeds",
    "evaluate",
    "evaluate_lives",
    "finished",
    "load_experiment",
    "load_recipe",
    "one_seed",
    "peak_memory",
    "summary",
]

LOG_EVERY = 50
YAML = (".yaml", ".yml")
RecipeSpec = str | dict[str, Any] | list[Any] | None


class Strict(BaseModel):
    """Unknown keys are errors: a misspelt option must not run with its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Strict):
    """Which images, and what is done to them."""

    name: str = Field(description='"digits", a folder (under --data-dir or the current one), or a hub name')
    label: str | None = None
    grey: bool | None = None
    holdout: int = Field(default=0, ge=0, description="images of the train split kept for looking at while training")
    holdout_seed: int = Field(default=0, ge=0)
    crop: int = Field(default=0, ge=0, description="pixels of padding before a random crop")
    padding: Literal["reflect", "zero"] = "reflect"
    flip: bool = False
    warp: tuple[float, float, float] | None = Field(default=None, description="degrees, scale, pixels; see Batches")
    mean: list[float] | None = None
    std: list[float] | None = None
    cache: str | None = Field(default=None, description="folder for decoded splits")
    stream: int | None = Field(
        default=None, ge=1, description="for sets that do not fit in memory: side of the random crops, in pixels"
    )
    test_split: str = Field(default="test", description='part of the file name; "validation" for ImageNet')

    @model_validator(mode="after")
    def _streams_alone(self) -> DataConfig:
        if self.stream is not None:
            mine = {"name": "digits"} if self.name == "digits" else {}
            mine |= {k: v for k in ("holdout", "crop", "flip", "warp", "grey", "cache") if (v := getattr(self, k))}
            if mine:
                raise ValueError(f"data.stream={self.stream}: goes with images in Parquet files and without {mine}")
        return self


class OptimizerConfig(Strict):
    """A name in torch.optim or any "package.module.Class"; ``args`` go to it, ``lr`` among them."""

    name: str = "SGD"
    args: dict[str, Any] = {}


class ScheduleConfig(Strict):
    """Learning rate by step; warm-up and milestones are counted in epochs of this run."""

    kind: Literal["cosine", "step", "constant"] = "cosine"
    warmup: float = Field(default=0.0, ge=0)
    milestones: list[float] = []
    gamma: float = Field(default=0.1, gt=0)
    final: float = Field(default=0.0, ge=0, le=1, description="cosine ends at this share of the learning rate")


class EvaluateConfig(Strict):
    """What is measured at the end (test split) and between epochs (held-out part)."""

    bits: list[int] = [8, 6, 4, 3, 2]
    recipes: dict[str, RecipeSpec] = Field(default={}, description="further compressed lives by name")
    calibrate: int = Field(default=2000, ge=0, description="train images for BatchNorm re-estimation, 0 for none")
    # Crops padded with black darken the borders: statistics without them are those of images training never saw.
    augment: bool = Field(default=False, description="crop, flip and warp those as in training")
    batch_size: int = Field(default=500, ge=1)
    every: int = Field(default=1, ge=0, description="epochs between looks at the held-out part, 0 for none")
    every_bits: list[int] = Field(default=[], description="widths looked at on the held-out part")


class ExtraConfig(Strict):
    """For tiny runs."""

    max_steps: int | None = Field(default=None, ge=1, description="length of the run, schedules included")
    train_subset: int | None = Field(default=None, ge=1, description="use the first images of the train part only")


class Experiment(Strict):
    """A whole experiment."""

    name: str
    question: str
    notes: str = ""
    model: str = Field(description='a factory in papers.models or "package.module:factory"')
    model_args: dict[str, Any] = {}
    init: str | None = Field(default=None, description="a .safetensors checkpoint to start from")
    data: DataConfig
    recipe: RecipeSpec = Field(default=None, description="preset name, .yaml path or inline; null is plain training")
    evaluate_recipe: RecipeSpec = Field(default=None, description="for plain training: what dt.compress takes")
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    batch_size: int = Field(default=128, ge=1)
    epochs: int = Field(ge=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    distill: float = Field(
        default=0.0, ge=0, le=1, description="share of the loss that is the divergence from the outputs of `init`"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: str = Field(default="auto", description='"auto" takes the GPU if there is one')
    threads: int | None = Field(default=None, ge=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    extra: ExtraConfig = ExtraConfig()

    @model_validator(mode="after")
    def _someone_to_learn_from(self) -> Experiment:
        if self.distill and self.init is None:
            raise ValueError(f"distill={self.distill}: needs `init`, the network whose outputs are learned from")
        return self


_GAPS = ("error", "wasserstein", "distance")  # between a tensor's two lives
# what a resumed run may change: nothing here touches a weight
FREE_TO_CHANGE = {"name", "question", "notes", "evaluate", "evaluate_recipe", "checkpoint_minutes", "threads", "seeds"}


def differences(was: str, now: Experiment) -> list[str]:
    """What of an experiment that was saved as JSON a run of another may not go on from."""
    # through the class, so that what it has learnt since then has the default it had in effect
    old, new = Experiment.model_validate_json(was).model_dump(mode="json"), now.model_dump(mode="json")
    for each in (old, new):
        del each["data"]["cache"]  # where decoded images lie says nothing of them
    return sorted(k for k in new if k not in FREE_TO_CHANGE and old[k] != new[k])


def load_experiment(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment, and the recipes that it names as files; ``overrides`` are ``key=value`` with dotted keys.

    Raises:
        ValueError: for an unknown key, a value out of range or an override without "=".
    """
    raw: Any = yaml.safe_load(Path(path).read_text())
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: need a YAML mapping at the top")
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise ValueError(f"--set {override!r}: need key=value")
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {override!r}: {parent!r} holds a value, not a mapping")
        node[last] = yaml.safe_load(value)
    plan = Experiment.model_validate(raw)

    def inline(spec: RecipeSpec) -> RecipeSpec:
        # what a file says goes into checkpoints and records: its name would say nothing once it is changed
        is_file = isinstance(spec, str) and spec.endswith(YAML)
        recipe = load_recipe(spec, Path(path).parent) if is_file else None
        return spec if recipe is None else yaml.safe_load(recipe.to_yaml())

    named = {name: inline(spec) for name, spec in plan.evaluate.recipes.items()}
    return plan.model_copy(
        update={
            "recipe": inline(plan.recipe),
            "evaluate_recipe": inline(plan.evaluate_recipe),
            "evaluate": plan.evaluate.model_copy(update={"recipes": named}),
        }
    )


def load_recipe(spec: RecipeSpec, folder: Path | None = None) -> dt.Recipe | None:
    """A recipe from a preset name, a ``.yaml`` path (relative to ``folder``) or inline YAML data."""
    if spec is None:
        return None
    if not isinstance(spec, str):
        return dt.Recipe.from_yaml(yaml.safe_dump(spec, sort_keys=False))
    if spec.endswith(YAML):
        file = Path(spec) if folder is None or Path(spec).exists() else folder / spec
        return dt.Recipe.from_yaml(file.read_text())
    return dt.Recipe.preset(spec)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Top-1 accuracy in % and mean cross-entropy in nats, in float32 and eval mode; the mode is put back."""
    was_training = model.training
    model.eval()
    correct, loss, num = 0, 0.0, 0
    for x, y in batches:
        logits = model(x).float()
        correct += int((logits.argmax(1) == y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        num += len(y)
    model.train(was_training)
    if num == 0:
        raise ValueError("evaluate(batches=...): need one batch at least")
    return {"accuracy": 100 * correct / num, "loss": loss / num}


def evaluate_lives(
    model: nn.Module,
    run: dt.Run | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    bits: Sequence[int] = (),
    recipes: Mapping[str, dt.Recipe] | None = None,
    calibration: Iterable[tuple[Tensor, Tensor]] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures the full life and every compressed life asked for, data-free and with BatchNorm re-estimated.

    Args:
        model: the model ``run`` is attached to.
        run: from ``dt.attach`` or ``dt.compress``; None measures the full life only.
        batches: what is measured on; iterated once a life.
        bits: widths besides the run's own recipe, whose life is always measured.
        recipes: further compressed lives by name.
        calibration: batches of *training* images for BatchNorm re-estimation; None, or a model without BatchNorm,
            for data-free lives only.
        note: called with one line a life.

    Returns:
        ``{"full": {accuracy, loss}, "compressed": {life: {"data_free": ..., "batchnorm": ..., "weights": ...}}}`` where
        life is ``"recipe"``, ``"4"`` (a width) or a name, weights are means over tensors of ``run.measure``, and layers
        what they are means of.
    """
    full = evaluate(model, batches)
    note(f"full {full['accuracy']:.2f} %")
    if run is None:
        return {"full": full, "compressed": {}}
    lives: dict[str, dict[str, Any]] = {"recipe": {}}
    lives |= {str(b): {"bits": b} for b in bits}
    lives |= {name: {"recipe": recipe} for name, recipe in (recipes or {}).items()}
    has_batchnorm = bool(statistics_of(model))
    compressed: dict[str, dict[str, Any]] = {}
    for name, life in lives.items():
        with run.compressed(batchnorm=False, **life):
            result: dict[str, Any] = {"data_free": evaluate(model, batches)}
        if calibration is not None and has_batchnorm:
            run.recalibrate(calibration, **life)
            with run.compressed(**life):
                result["batchnorm"] = evaluate(model, batches)
        rows = run.measure(**life)
        result["weights"] = _summary(rows)
        result["layers"] = {row["name"]: {key: float(row[key]) for key in _GAPS} for row in rows}
        compressed[name] = result
        again = f", BatchNorm re-estimated {result['batchnorm']['accuracy']:.2f} %" if "batchnorm" in result else ""
        note(f"{name}: data-free {result['data_free']['accuracy']:.2f} %{again}")
    return {"full": full, "compressed": compressed}


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bits a weight over all claimed weights; error, Wasserstein gap and click distance as means over tensors."""
    weights = sum(row["weights"] for row in rows)
    out = {"bits_per_weight": sum(row["bits_per_weight"] * row["weights"] for row in rows) / weights}
    for key in _GAPS:
        out[key] = sum(float(row[key]) for row in rows) / len(rows)
    return out


def learning_rate(schedule: ScheduleConfig, step: int, total: int, per_epoch: int) -> float:
    """The factor on the base learning rate at a step, 0 <= step < total."""
    warmup = round(schedule.warmup * per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "step":
        return schedule.gamma ** sum(step >= round(m * per_epoch) for m in schedule.milestones)
    if schedule.kind == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress))


def _import(name: str, home: Any) -> Any:
    """An attribute of ``home``, or "package.module:name" / "package.module.name" from anywhere."""
    if ":" in name or "." in name:
        module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
        home, name = importlib.import_module(module), attribute
    found = getattr(home, name, None)
    if not callable(found):
        raise ValueError(f"{name!r}: nothing callable of that name in {home.__name__}")
    return found


def _locate(path: str, data_dir: Path | None) -> str:
    """``path`` under the data folder if it is there, else as given (the current folder, or a hub name)."""
    return str(data_dir / path) if data_dir is not None and (data_dir / path).exists() else path


class Streamed:
    """Batches of a set that is read anew each epoch; like `Batches` to the trainer.

    Args:
        data: the set; `stream` is the side of the images that come out.
        path: its folder or hub name.
        split: part of the file name.
        batch_size: >= 1.
        seed: of order and augmentation.
        train: shuffle, crop at random and flip, and leave out a last batch that is not full.
        device: where the batches end up.
        channels_last: memory format of the batches.
        limit: stop after so many images, None for all.

    Raises:
        ValueError: for fewer training images than one batch.
    """

    def __init__(
        self,
        data: DataConfig,
        path: str,
        split: str,
        batch_size: int,
        *,
        seed: int = 0,
        train: bool = False,
        device: torch.device,
        channels_last: bool = False,
        limit: int | None = None,
    ) -> None:
        assert data.stream is not None
        images = count_images(path, split)
        self.images = images if limit is None else min(limit, images)
        self.length = self.images // batch_size if train else -(-self.images // batch_size)
        if self.length < 1:
            raise ValueError(f"batch_size={batch_size}: {path} has {images} images in its split {split!r}")
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.epoch, self.skip = 0, 0
        self.open = functools.partial(
            stream_images,
            path,
            split,
            data.stream,
            batch_size,
            label=data.label,
            train=train,
            seed=seed,
            mean=data.mean,
            std=data.std,
            drop_last=train,
            device=device,
        )

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Which of the random passes comes next, and how many of its batches are passed over."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.length - self.skip
        for x, y in itertools.islice(self.open(epoch=self.epoch, skip=self.skip), left):
            yield x.contiguous(memory_format=self.format), y


class Trainer:
    """One seed of one experiment: builds everything, trains with exact resume, evaluates at the end.

    Args:
        experiment: what to do.
        seed: of initialisation, order and augmentation.
        out: folder of this seed: ``last.pt``, ``log.txt``, ``model.safetensors``, ``result.json``.
        data_dir: folder that relative data and checkpoint paths are looked up in first.
        folder: folder of the experiment file, for recipe paths.
        console: where progress goes.

    Raises:
        ValueError: for a model, optimizer, data set or recipe that does not fit.
    """

    def __init__(
        self,
        experiment: Experiment,
        seed: int,
        out: Path,
        data_dir: Path | None = None,
        folder: Path | None = None,
        console: Console | None = None,
    ) -> None:
        self.experiment, self.seed, self.out, self.data_dir, self.folder = experiment, seed, out, data_dir, folder
        self.console = console or Console(quiet=True)
        out.mkdir(parents=True, exist_ok=True)
        if experiment.threads is not None:
            torch.set_num_threads(experiment.threads)
        gpu = torch.cuda.is_available() if experiment.device == "auto" else experiment.device != "cpu"
        self.device = torch.device(("cuda" if gpu else "cpu") if experiment.device == "auto" else experiment.device)

        self.train_set: ImageSet | None = None
        self.held_out: ImageSet | None = None
        self.batches = self._training_batches()
        self.total = len(self.batches) * experiment.epochs
        if experiment.extra.max_steps is not None:
            self.total = min(self.total, experiment.extra.max_steps)

        torch.manual_seed(seed)
        self.model: nn.Module = _import(experiment.model, models)(**experiment.model_args)
        if experiment.init is not None:
            models.load_checkpoint(self.model, _locate(experiment.init, data_dir))
        self.model.to(self.device).train()
        if experiment.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._check_lives()
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False) if experiment.distill else None
        recipe = load_recipe(experiment.recipe, folder)
        params = self.model.parameters() if recipe is None else recipe.param_groups(self.model)
        self.optimizer: torch.optim.Optimizer = _import(experiment.optimizer.name, torch.optim)(
            params, **experiment.optimizer.args
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.run: dt.Run | None = None
        if recipe is not None:
            self.run = dt.attach(self.model, self.optimizer, recipe, total_steps=self.total)
        self.forward: Any = torch.compile(self.model) if experiment.compile else self.model
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, images of this epoch

    def _check_lives(self) -> None:
        """What is to be measured after training must be possible: better said now than then.

        Raises:
            ValueError: widths of a recipe that has none, or a further recipe that cannot be read.
        """
        settings = self.experiment.evaluate
        for spec in settings.recipes.values():
            load_recipe(spec, self.folder)
        recipe = load_recipe(self.experiment.recipe or self.experiment.evaluate_recipe, self.folder)
        if recipe is None or not (settings.bits or settings.every_bits):
            return
        rules = [rule for stage in recipe.stages for rule in stage.rules] or recipe.rules
        if not any(rule.target is not None and rule.target.has_bits and not rule.pinned for rule in rules):
            raise ValueError(
                f"evaluate.bits={settings.bits}, every_bits={settings.every_bits}: no rule of the recipe has an "
                "unpinned target with a bit-width; give evaluate.bits=[]"
            )

    def _training_batches(self) -> Batches | Streamed:
        data, experiment = self.experiment.data, self.experiment
        if data.stream is not None:
            if experiment.extra.train_subset is not None:
                raise ValueError("extra.train_subset: a streamed set is used whole; give extra.max_steps")
            if experiment.evaluate.augment:
                raise ValueError("evaluate.augment: a streamed set is calibrated on plain images")
            return self._streamed("train", experiment.batch_size, train=True)
        train, self.held_out = split_holdout(self._images("train"), data.holdout, data.holdout_seed)
        if experiment.extra.train_subset is not None:
            train = train.subset(torch.arange(min(experiment.extra.train_subset, len(train))))
        self.train_set = train
        return self._augmented_batches(train, experiment.batch_size)

    def _augmented_batches(self, train: ImageSet, batch_size: int) -> Batches:
        """Images as training sees them: in random order, cropped, flipped and warped."""
        data = self.experiment.data
        return Batches(
            train.images,
            train.labels,
            batch_size,
            True,
            data.mean,
            data.std,
            crop=data.crop,
            padding=data.padding,
            flip=data.flip,
            warp=data.warp,
            seed=self.seed,
            drop_last=True,
            channels_last=self.experiment.channels_last,
        )

    def _streamed(self, split: str, batch_size: int, **options: Any) -> Streamed:
        data, experiment = self.experiment.data, self.experiment
        path = _locate(data.name, self.data_dir)
        last = experiment.channels_last
        return Streamed(
            data, path, split, batch_size, seed=self.seed, device=self.device, channels_last=last, **options
        )

    def _test_batches(self) -> Batches | Streamed:
        data, size = self.experiment.data, self.experiment.evaluate.batch_size
        if data.stream is not None:
            return self._streamed(data.test_split, size)
        return self._plain_batches(self._images("test"))

    def _calibration_batches(self) -> Batches | Streamed | None:
        """Some training images, as evaluation or (`augment`) as training sees them; None if none are asked for."""
        settings = self.experiment.evaluate
        if not settings.calibrate:
            return None
        if self.train_set is None:
            return self._streamed("train", settings.batch_size, limit=settings.calibrate)
        generator = torch.Generator().manual_seed(self.seed)
        some = torch.randperm(len(self.train_set), generator=generator)[: settings.calibrate]
        chosen = self.train_set.subset(some)
        if settings.augment:
            return self._augmented_batches(chosen, min(settings.batch_size, len(some)))
        return self._plain_batches(chosen)

    def _images(self, split: Literal["train", "test"]) -> ImageSet:
        data = self.experiment.data
        if data.name == "digits":
            return digits(split, data.holdout_seed, self.device)
        part = data.test_split if split == "test" else split
        cache = None if data.cache is None else Path(data.cache) / f"{Path(data.name).name}-{part}.safetensors"
        path = _locate(data.name, self.data_dir)
        return load_images(path, part, data.label, data.grey, self.device, cache=cache)

    def _plain_batches(self, images: ImageSet) -> Batches:
        data, size = self.experiment.data, self.experiment.evaluate.batch_size
        return Batches(
            images.images, images.labels, size, False, data.mean, data.std, channels_last=self.experiment.channels_last
        )

    def log(self, text: str) -> None:
        """One line to ``log.txt`` and the console."""
        with (self.out / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.console.print(f"[dim]seed {self.seed}[/] {text}", highlight=False, soft_wrap=True)

    def save(self) -> None:
        """Writes ``last.pt`` (readable with ``weights_only=True``); the old file stays until the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            },
            "step": self.step,
            "epoch": self.step // len(self.batches),
            "batch": self.step % len(self.batches),
            "seconds": self.seconds,
            "sums": self.sums,
            "history": self.history,
            "experiment": self.experiment.model_dump_json(),
            "seed": self.seed,
        }
        passing = self.out / "last.pt.tmp"
        torch.save(state, passing)
        passing.replace(self.out / "last.pt")

    def resume(self) -> bool:
        """Continues from ``last.pt``; False if there is none.

        Raises:
            ValueError: if the file is of another experiment or seed.
        """
        file = self.out / "last.pt"
        if not file.exists():
            return False
        state = torch.load(file, map_location=self.device, weights_only=True)
        differs = differences(state["experiment"], self.experiment)
        if differs or state["seed"] != self.seed:
            raise ValueError(f"{file} is of another experiment: {differs or 'seed'} differ; choose another --out")
        # the model first: the engine checks its latent state, in the optimizer's file, against the weights
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all([s.cpu() for s in state["rng"]["cuda"]])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.sums = state["sums"].to(self.device)
        self.log(f"resumed at step {self.step} of {self.total}")
        return True

    def train(self, stop_at: int | None = None) -> None:
        """Trains to the end, or to step ``stop_at`` (a cut-off run, for tests); saves there."""
        end = self.total if stop_at is None else min(stop_at, self.total)
        per_epoch = len(self.batches)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(f"seed {self.seed}", total=self.total, completed=self.step)
            saved = mark = time.monotonic()
            mark_step, tick = self.step, time.perf_counter()
            while self.step < end:
                epoch, batch = divmod(self.step, per_epoch)
                self.batches.set_epoch(epoch, skip=batch)
                for x, y in self.batches:
                    loss = self._step(x, y)
                    self.step += 1
                    progress.update(task, completed=self.step)
                    if self.step % LOG_EVERY == 0 or self.step == self.total:
                        value = float(loss)  # waits for the device, so that the time is that of the work
                        speed = (self.step - mark_step) / (time.monotonic() - mark)
                        self._report(value, speed)
                        mark, mark_step = time.monotonic(), self.step
                    ends = self.step % per_epoch == 0 or self.step == self.total
                    if ends and self.device.type == "cuda":
                        torch.cuda.synchronize()
                    self.seconds += time.perf_counter() - tick
                    if ends:
                        self._end_of_epoch()
                    if ends or time.monotonic() - saved > 60 * self.experiment.checkpoint_minutes:
                        self.save()
                        saved = time.monotonic()
                    tick = time.perf_counter()
                    if ends:
                        mark, mark_step = time.monotonic(), self.step
                    if self.step >= end:
                        break
        self.save()

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        factor = learning_rate(self.experiment.schedule, self.step, self.total, len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        half = self.experiment.precision == "bf16"
        context = torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()
        with context:
            logits = self.forward(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=self.experiment.label_smoothing)
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = self.teacher(x).float().log_softmax(1)
                apart = F.kl_div(logits.float().log_softmax(1), wanted, reduction="batchmean", log_target=True)
                loss = torch.lerp(loss, apart, self.experiment.distill)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.sums[0] += loss.detach() * len(y)
            self.sums[1] += (logits.detach().argmax(1) == y).sum()
            self.sums[2] += len(y)
        return loss.detach()

    def _report(self, loss: float, speed: float) -> None:
        minutes = (self.total - self.step) / speed / 60
        rate = self.optimizer.param_groups[0]["lr"]
        self.log(
            f"epoch {(self.step - 1) // len(self.batches) + 1} step {self.step}/{self.total} loss {loss:.4f} "
            f"lr {rate:.3g} {speed:.2f} steps/s eta {minutes:.1f} min"
        )
        if not math.isfinite(loss):
            raise RuntimeError(f"{self.experiment.name}, seed {self.seed}: the loss is {loss} at step {self.step}")

    def _end_of_epoch(self) -> None:
        loss, correct, num = self.sums.tolist()
        self.sums.zero_()
        epoch = (self.step - 1) // len(self.batches) + 1
        row: dict[str, Any] = {"epoch": epoch, "step": self.step, "loss": loss / num, "accuracy": 100 * correct / num}
        settings = self.experiment.evaluate
        last = self.step == self.total
        if (
            self.held_out is not None
            and len(self.held_out)
            and settings.every
            and (epoch % settings.every == 0 or last)
        ):
            batches = self._plain_batches(self.held_out)
            run = self._compressible()
            row["held_out"] = evaluate_lives(self.model, run, batches, bits=settings.every_bits if run else ())
        self.history.append(row)
        text = f"epoch {epoch} done: loss {row['loss']:.4f} accuracy {row['accuracy']:.2f} %"
        if "held_out" in row:
            text += f", held out: full {row['held_out']['full']['accuracy']:.2f} %"
            for name, life in row["held_out"]["compressed"].items():
                text += f", {name} {life['data_free']['accuracy']:.2f} %"
        self.log(text)

    def _compressible(self) -> dt.Run | None:
        """The run whose lives are measured: of training, or of `evaluate_recipe` on the weights as they are."""
        if self.run is not None:
            return self.run
        recipe = load_recipe(self.experiment.evaluate_recipe, self.folder)
        return None if recipe is None else dt.compress(self.model, recipe)

    def result(self) -> dict[str, Any]:
        """Evaluates the last weights on the test split, writes ``model.safetensors`` and ``result.json``.

        Raises:
            RuntimeError: before the last step, since test data must not steer a run.
        """
        if self.step < self.total:
            raise RuntimeError(f"result() at step {self.step} of {self.total}: the test split is read at the end only")
        settings = self.experiment.evaluate
        run = self._compressible()
        named = {name: load_recipe(spec, self.folder) for name, spec in settings.recipes.items()}
        test = evaluate_lives(
            self.model,
            run,
            self._test_batches(),
            bits=settings.bits if run else (),
            recipes={name: recipe for name, recipe in named.items() if recipe is not None},
            calibration=self._calibration_batches(),
            note=lambda text: self.log(f"test, {text}"),
        )
        weights = {name: tensor.detach().contiguous() for name, tensor in self.model.state_dict().items()}
        passing = self.out / "model.safetensors.tmp"
        save_file(weights, passing)
        passing.replace(self.out / "model.safetensors")
        out = {
            "seed": self.seed,
            "steps": self.step,
            "train_seconds": self.seconds,
            "peak_memory_bytes": process_peak(),
            "commit": environment()["commit"],
            "test": test,
            "history": self.history,
        }
        passing = self.out / "result.json.tmp"
        passing.write_text(json.dumps(out, indent=1))
        passing.replace(self.out / "result.json")
        return out


def _numbers(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _numbers(value, (*path, str(key)))
    elif isinstance(tree, int | float):
        yield path, float(tree)


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, deviation and values over seeds of every test number, keyed like "compressed.4.data_free.accuracy"."""
    gathered: dict[str, list[float]] = {}
    for result in results:
        for path, value in _numbers(result["test"]):
            if "layers" in path:
                continue  # there to be looked at seed by seed
            gathered.setdefault(".".join(path), []).append(value)
    return {key: summarise(values) for key, values in gathered.items()}


def peak_memory(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest of the seeds; nothing where one of them is from before it was measured."""
    if any("peak_memory_bytes" not in r for r in results):
        return {}
    return {"peak_memory_bytes": {"process": max(r["peak_memory_bytes"] for r in results)}}


def main(
    experiment: Annotated[Path, typer.Argument(help="experiment file (YAML)", exists=True, dir_okay=False)],
    data_dir: Annotated[
        Path | None, typer.Option(help="where data and checkpoints lie", envvar="DETENT_SHARED")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="output folder, runs/NAME if absent")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from what --out holds")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="instead of the file's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="this seed only, instead of the file's")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. data.crop=2")] = None,
) -> None:
    """Trains an experiment, seed by seed, and writes record.json."""
    changes = list(overrides or [])
    changes += [f"epochs={epochs}"] if epochs is not None else []
    changes += [f"seeds=[{seed}]"] if seed is not None else []
    plan = load_experiment(experiment, changes)
    folder = out or Path("runs") / plan.name
    console = Console()
    all_seeds(plan, folder, data_dir, experiment.parent, resume, console)
    console.print(f"record: {folder / 'record.json'}")


def all_seeds(
    plan: Experiment,
    out: Path,
    data_dir: Path | None,
    folder: Path,
    resume: bool,
    console: Console,
    further: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Trains an experiment seed by seed and writes `out/record.json`.

    Args:
        plan: the experiment.
        out: each seed has a folder of its own in it.
        data_dir: as for `Trainer`.
        folder: as for `Trainer`.
        resume: continue from what `out` holds.
        console: where progress goes.
        further: gives more results for the record, once all seeds are trained.
    """
    record = Record(
        name=plan.name, question=plan.question, seeds=plan.seeds, config=plan.model_dump(), notes=plan.notes
    )
    with record:
        results = [
            one_seed(plan, number, out / f"seed{number}", data_dir, folder, resume, console) for number in plan.seeds
        ]
    record.write(out / "record.json", {"seeds": results, "summary": summary(results), **further()})


def finished(plan: Experiment, seed: int, out: Path) -> dict[str, Any] | None:
    """What a folder holds of a seed that is trained, and measured as the experiment says; `None` if work is left.

    Raises:
        ValueError: what it holds is of another experiment or seed.
    """
    if not (out / "result.json").exists():
        return None
    if not (out / "last.pt").exists():
        raise ValueError(f"{out} holds a result without last.pt, which says of what; choose another --out")
    state = torch.load(out / "last.pt", map_location="cpu", weights_only=True)
    differs = differences(state["experiment"], plan)
    if differs or state["seed"] != seed:
        raise ValueError(f"{out} is of another experiment: {differs or 'seed'} differ; choose another --out")
    was = Experiment.model_validate_json(state["experiment"])
    same = (was.evaluate, was.evaluate_recipe) == (plan.evaluate, plan.evaluate_recipe)
    return json.loads((out / "result.json").read_text()) if same else None


def one_seed(
    plan: Experiment, seed: int, out: Path, data_dir: Path | None, folder: Path, resume: bool, console: Console
) -> dict[str, Any]:
    """One seed from start to test, or what its folder says of it if it is finished.

    Raises:
        ValueError: the folder holds a run and `resume` was not asked for, or a run of another experiment.
    """
    if resume and (done := finished(plan, seed, out)) is not None:
        return done
    if not resume and (out / "last.pt").exists():
        raise ValueError(f"{out} holds a run already: add --resume or choose another --out")
    trainer = Trainer(plan, seed, out, data_dir, folder, console)
    if resume:
        trainer.resume()
    if trainer.run is not None:
        trainer.log(f"plan:\n{trainer.run.plan}")
    trainer.train()
    return trainer.result()


if __name__ == "__main__":
    typer.run(main)
