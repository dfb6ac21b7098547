"""What a few unlabelled training images give back of what rounding costs: the released ResNet-20 on CIFAR-10.

    python -m benchmarks.calibration --data-dir ../shared

Settings are compared on training images that no calibration sees; the test split is read once for each row.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from detent.data import Batches, ImageSet, load_images
from detent.report.record import summarise
from papers.models import load_checkpoint, resnet20

CHECKPOINT = "checkpoints/cifar10_resnet20.safetensors"
LOOK: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
TRAINING: dict[str, Any] = {"crop": 4, "padding": "zero", "flip": True}  # as the network was trained
WIDTHS = (4, 3, 2)
COUNTS = (256, 1024)
AGAIN = 2048  # images to re-estimate BatchNorm on
HELD = 2000  # training images that settings are compared on
BUDGETS = ("70 kB", "50 kB")
SETTINGS: dict[str, dict[str, Any]] = {
    "GPTQ": {"drift": 0.0, "correct": False},
    "GPTQ, parallel": {"order": "parallel", "correct": False},
    "half the drift": {"correct": False},
    "corrected, no drift": {"drift": 0.0},
    "corrected, half the drift": {},
    "corrected, all of the drift": {"drift": 1.0},
}
CHOSEN: dict[str, dict[str, Any]] = {"calibrated": {"correct": False}, "corrected": {}}


class Images:
    """The three sets that one seed draws from the training split."""

    def __init__(self, train: ImageSet, seed: int) -> None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        self._train, self._order, self._seed = train, order, seed

    def _batches(self, chosen: Tensor) -> Batches:
        images, labels = self._train.images[chosen], self._train.labels[chosen]
        return Batches(images, labels, 256, **LOOK, **TRAINING, seed=self._seed)

    def calibration(self, count: int) -> list[Tensor]:
        """Without their labels."""
        return [x for x, _ in self._batches(self._order[:count])]

    def again(self) -> list[Tensor]:
        """Others, to re-estimate BatchNorm on."""
        return [x for x, _ in self._batches(self._order[max(COUNTS) : max(COUNTS) + AGAIN])]

    def held(self) -> Batches:
        """Others again, with labels, augmented as well: the network knows the images themselves by heart."""
        return self._batches(self._order[-HELD:])


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Percent right."""
    right, total = 0, 0
    for x, y in batches:
        right, total = right + int((model(x).argmax(1) == y).sum()), total + len(y)
    return 100 * right / total


def recipe(bits: int) -> dt.Recipe:
    """Every weight, the first and last layer too, on a grid a channel."""
    return dt.Recipe([dt.Rule(match="@weights", target=dt.Uniform(bits=bits, granularity="channel"))])


def both(run: dt.Run, again: list[Tensor], batches: Batches) -> dict[str, float]:
    """Accuracy of the compressed life as it is, then with BatchNorm re-estimated."""
    with run.compressed():
        own = accuracy(run.model, batches)
    run.recalibrate(again)
    with run.compressed():
        return {"own": own, "re-estimated": accuracy(run.model, batches)}


def size(run: dt.Run) -> int:
    """Bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        return dt.save(run, Path(folder) / "model.detent", life="compressed")


def timed(run: dt.Run, images: list[Tensor], options: dict[str, Any]) -> float:
    """Calibrates; seconds of the processor."""
    start = time.process_time()
    dt.calibrate(run, images, **options)
    return time.process_time() - start


def compared(model: nn.Module, images: Images) -> list[dict[str, Any]]:
    """Every setting on training images that were held out."""
    rows = []
    for bits in WIDTHS[1:]:
        run = dt.compress(model, recipe(bits))
        for name, options in SETTINGS.items():
            seconds = timed(run, images.calibration(COUNTS[0]), options)
            rows.append({"bits": bits, "setting": name, "seconds": seconds, **both(run, images.again(), images.held())})
            print(rows[-1])
    return rows


def measured(model: nn.Module, images: Images, test: Batches, bits: int) -> list[dict[str, Any]]:
    """Plain rounding, and what was chosen, on the test split."""
    run = dt.compress(model, recipe(bits))
    rows = [{"images": 0, "places": "plain", "bytes": size(run), "seconds": 0.0, **both(run, images.again(), test)}]
    for count in COUNTS:
        for name, options in CHOSEN.items():
            seconds = timed(run, images.calibration(count), options)
            row = {"images": count, "places": name, "bytes": size(run), "seconds": seconds}
            rows.append({**row, **both(run, images.again(), test)})
            print(bits, rows[-1])
    return [{"bits": bits, **row} for row in rows]


def within(model: nn.Module, images: Images, test: Batches, budget: str) -> list[dict[str, Any]]:
    """One step for all weights, such that the calibrated file takes at most so many bytes."""
    most, rows = int(float(budget.split()[0]) * 1000), []
    for count in (0, *COUNTS):
        given = most
        for _ in range(8):  # calibrated codes take another number of bytes than plain ones
            run = dt.compress(model, dt.allocate(model, given))
            if count:
                dt.calibrate(run, images.calibration(count))
            written = size(run)
            if written <= most:
                break
            given -= written - most + most // 1000
        else:
            raise RuntimeError(f"no step was found for {budget} and {count} images")
        with run.compressed():
            rows.append({"budget": budget, "images": count, "bytes": written, "accuracy": accuracy(model, test)})
        print(rows[-1])
    return rows


def main(
    data_dir: Annotated[Path, typer.Option(help="folder with data/ and checkpoints/", envvar="DETENT_SHARED")],
    seed: Annotated[list[int] | None, typer.Option(help="of the images; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Measures all of it and writes the record."""
    torch.set_num_threads(1)
    seeds = seed or [0, 1, 2]
    model: nn.Module = resnet20()
    load_checkpoint(model, data_dir / CHECKPOINT)
    model.eval()
    train = load_images(data_dir / "data" / "cifar10", "train")
    split = load_images(data_dir / "data" / "cifar10", "test")
    test = Batches(split.images, split.labels, 500, **LOOK)
    with recording(
        "calibration",
        question="What do a few unlabelled images give back of what rounding a trained network costs?",
        seeds=seeds,
        config={
            "checkpoint": CHECKPOINT,
            "widths": list(WIDTHS),
            "calibration_images": list(COUNTS),
            "reestimation_images": AGAIN,
            "held_images": HELD,
            "settings": SETTINGS,
            "measured": CHOSEN,
            "threads": 1,
        },
        notes="Accuracies (%) of the compressed life. All convolutions and the head on a grid a channel, or one step "
        "for all within a budget; weights only. Calibration and BatchNorm re-estimation on augmented training images "
        "without labels. Settings were compared on augmented training images that no calibration saw, the network "
        "did in training; nothing was selected on test images. Seconds of the processor, one thread.",
        out=out,
    ) as results:
        results["full"] = accuracy(model, test)
        results["compared"] = compared(model, Images(train, seeds[0]))
        results["budgets"] = [row for b in BUDGETS for row in within(model, Images(train, seeds[0]), test, b)]
        results["rows"] = []
        for bits in track(WIDTHS, description="widths"):
            by_seed = [measured(model, Images(train, each), test, bits) for each in seeds]
            for rows in zip(*by_seed, strict=True):
                keys = ("own", "re-estimated", "bytes", "seconds")
                same = {key: rows[0][key] for key in ("bits", "images", "places")}
                results["rows"].append({**same, **{key: summarise([row[key] for row in rows]) for key in keys}})


if __name__ == "__main__":
    typer.run(main)
