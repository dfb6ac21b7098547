"""What integers alone cost in accuracy: digits from the start, and the released ResNet-32 on part of CIFAR-100.

python -m benchmarks.integer --data-dir ../shared
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from benchmarks.training import digit_sets
from detent.data import Batches, ImageSet, load_images
from detent.demo import fit
from detent.export import Activations, to_integer
from detent.report.record import summarise
from papers.models import SmallConvNet, load_checkpoint, resnet32

EPOCHS, RATE, BATCH = 20, 3e-3, 64
CHECKPOINT = "checkpoints/cifar100_resnet32_sgd150.safetensors"
CIFAR100: dict[str, Any] = {
    "mean": [0.50705882, 0.48666667, 0.44078431],
    "std": [0.26745098, 0.25647059, 0.27607843],
}
WIDTHS = ((8, 8), (4, 8), (4, 4))  # bits of weights, of activations
METHODS = ("minmax", "percentile", "mse")


def loader(images: ImageSet, count: int | None, look: dict[str, Any], **options: Any) -> Batches:
    """The first images of a set, in batches."""
    return Batches(images.images[:count], images.labels[:count], BATCH, **look, **options)


@torch.no_grad()
def right(answers: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Percent of (logits, labels) that agree."""
    found = [(logits.argmax(1) == y).double() for logits, y in answers]
    return 100 * float(torch.cat(found).mean())


def compare(run: dt.Run, calibration: Batches, test: Batches, activations: Activations) -> dict[str, Any]:
    """Accuracy of the float network with compressed weights, and of the integers, on the same images."""
    integers = to_integer(run, calibration, activations=activations)
    model = run.model.eval()
    with run.compressed(), torch.no_grad():
        wanted = [(model(x), y) for x, y in test]
    start = time.perf_counter()
    found = [(integers(x), y) for x, y in test]
    seconds = time.perf_counter() - start
    same = torch.cat([a.argmax(1) == b.argmax(1) for (a, _), (b, _) in zip(wanted, found, strict=True)])
    return {
        "float": right(wanted),
        "integer": right(found),
        "same_answer": 100 * float(same.double().mean()),
        "integer_seconds": seconds,
        "bytes": integers.nbytes,
    }


def recipe(bits: int) -> dt.Recipe:
    """All weights on a grid a channel; the first and last layer at 8 bits at least."""
    grid = dt.Uniform(bits=bits, granularity="channel")
    ends = [dt.Rule(match=end, target=dt.Uniform(bits=8, granularity="channel")) for end in ("@first", "@last")]
    return dt.Recipe([*ends, dt.Rule(match="weight$", target=grid)])


def on_digits(seed: int) -> list[dict[str, Any]]:
    """A small network trained here, every width and method."""
    torch.manual_seed(seed)
    train, held, look = digit_sets()
    model = SmallConvNet()
    batches = loader(train, None, look, shuffle=True, seed=seed, drop_last=True)
    fit(model, torch.optim.AdamW(model.parameters(), lr=RATE), batches, EPOCHS)
    calibration, test = loader(train, 512, look), loader(held, None, look)
    full = right([(model.eval()(x), y) for x, y in test])
    rows = []
    for bits, inputs in WIDTHS:
        run = dt.compress(model, recipe(bits))
        for method in METHODS:
            settings = Activations(bits=inputs, method=method)
            found = compare(run, calibration, test, settings)
            rows.append({"weights": bits, "activations": inputs, "method": method, "full": full, **found})
    return rows


def on_cifar100(data_dir: Path, images: int) -> list[dict[str, Any]]:
    """The released ResNet-32, post-training: nothing is trained here."""
    model: nn.Module = resnet32()
    load_checkpoint(model, data_dir / CHECKPOINT)
    train = load_images(data_dir / "data" / "cifar100", "train", "fine_label")
    test = loader(load_images(data_dir / "data" / "cifar100", "test", "fine_label"), images, CIFAR100)
    calibration = loader(train, 512, CIFAR100)
    with torch.no_grad():
        full = right([(model.eval()(x), y) for x, y in test])
    rows = []
    for bits, inputs in WIDTHS:
        run = dt.compress(model, recipe(bits))
        found = compare(run, calibration, test, Activations(bits=inputs, method="mse"))
        rows.append({"weights": bits, "activations": inputs, "method": "mse", "full": full, **found})
        print(rows[-1])
    return rows


def main(
    data_dir: Annotated[Path | None, typer.Option(help="folder with data/", envvar="DETENT_SHARED")] = None,
    images: Annotated[int, typer.Option(min=100, help="of the test split of CIFAR-100")] = 1000,
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Trains on digits, measures both, and writes the record."""
    torch.set_num_threads(1)
    seeds = seed or [0, 1, 2]
    with recording(
        "integer",
        question="How accurate is a network that runs in integers alone, beside the float one with the same weights?",
        seeds=seeds,
        config={
            "digits": {"network": "SmallConvNet", "epochs": EPOCHS, "rate": RATE, "batch_size": BATCH},
            "cifar100": {"checkpoint": CHECKPOINT, "test_images": images},
            "calibration_images": 512,
            "widths": [list(w) for w in WIDTHS],
            "threads": 1,
        },
        notes="Accuracies (%) on test splits; nothing was selected on them. float: the network with its compressed "
        "weights and float activations; integer: the same weights, activations rounded, no floating point between "
        "input and answer. Weights a grid a channel, first and last layer at 8 bits; post-training, without "
        "re-estimated BatchNorm. The seconds are those of our exact PyTorch form, which is no fast kernel.",
        out=out,
    ) as results:
        by_seed = [on_digits(number) for number in seeds]
        keys = ("full", "float", "integer", "same_answer")
        results["digits"] = [
            {
                **{key: rows[0][key] for key in ("weights", "activations", "method", "bytes")},
                **{key: summarise([row[key] for row in rows]) for key in keys},
            }
            for rows in zip(*by_seed, strict=True)
        ]
        for row in results["digits"]:
            print(row)
        results["cifar100"] = [] if data_dir is None else on_cifar100(data_dir, images)


if __name__ == "__main__":
    typer.run(main)
