"""Accuracy by bytes of the whole file: budgets without data beside fixed widths and the standard codec.

    python -m benchmarks.budget --data-dir ../shared [--nncodec PYTHON]

Nothing is selected on test images; every file is read back before it is measured.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import nn

import detent as dt
from benchmarks import recording
from detent.data import Batches, ImageSet, load_images
from papers.models import load_checkpoint, resnet20

CHECKPOINT = "checkpoints/cifar10_resnet20.safetensors"
LOOK: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
BUDGETS = ("20 kB", "30 kB", "45 kB", "60 kB", "70 kB", "84 kB", "98 kB", "128 kB")
QPS = (-10, -12, -14, -16, -18, -20, -22, -24)


def net() -> nn.Module:
    """The network before its weights are read."""
    return resnet20().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Percent right."""
    batches = Batches(images.images, images.labels, 500, **LOOK)
    right = sum(int((model(x.to(memory_format=torch.channels_last)).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / len(images)


def written(
    make: Callable[[nn.Module], tuple[dt.Run, dt.Budget | None]], state: Path, test: ImageSet
) -> dict[str, Any]:
    """Bytes and accuracy of the file of a run, read back into a network of its own; seconds to make it."""
    model = net()
    load_checkpoint(model, state)
    start = time.perf_counter()
    run, budget = make(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.detent"
        size = dt.save(run, path, life="compressed", budget=budget)
        seconds = time.perf_counter() - start
        twin = net()
        dt.load(path, twin, life="compressed")
    return {"bytes": size, "accuracy": accuracy(twin, test), "seconds": seconds}


def by_codec(python: str, state: Path, test: ImageSet) -> dict[str, Any]:
    """The standard codec at every quantization parameter."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("budget_nncodec.py")
        subprocess.run([python, str(script), str(state), folder, *map(str, QPS)], check=True, capture_output=True)
        for qp in QPS:
            twin = net()
            load_checkpoint(twin, Path(folder) / f"{qp}.safetensors")
            found[f"qp {qp}"] = json.loads((Path(folder) / f"{qp}.json").read_text()) | {
                "accuracy": accuracy(twin, test)
            }
    return found


def allocated(budget: str, choices: Any) -> Callable[[nn.Module], tuple[dt.Run, dt.Budget | None]]:
    """A run within a budget."""
    return lambda model: (dt.compress(model, dt.allocate(model, budget, choices=choices)), budget)


def fixed(bits: int) -> Callable[[nn.Module], tuple[dt.Run, dt.Budget | None]]:
    """One width for all weights, a scale a channel."""
    rule = dt.Rule(match="@weights", target=dt.Uniform(bits=bits, granularity="channel"))
    return lambda model: (dt.compress(model, dt.Recipe([rule])), None)


def main(
    data_dir: Annotated[Path, typer.Option(help="the folder with checkpoints and data/cifar10")],
    nncodec: Annotated[str | None, typer.Option(help="a Python that has NNCodec, torch and safetensors")] = None,
    cache: Annotated[Path | None, typer.Option(help="keeps the decoded test images")] = None,
) -> None:
    """Measure every file and write the record."""
    torch.set_num_threads(1)
    state = data_dir / CHECKPOINT
    test = load_images(data_dir / "data" / "cifar10", "test", grey=False, cache=cache)
    jobs: list[tuple[str, str, Callable[[nn.Module], tuple[dt.Run, dt.Budget | None]]]] = [
        *(("width", f"{bits} bits", fixed(bits)) for bits in (2, 3, 4, 5)),
        *(("step", budget, allocated(budget, "step")) for budget in BUDGETS),
        *(("widths", budget, allocated(budget, "widths")) for budget in BUDGETS[3:]),
    ]
    with recording(
        "budget",
        question="How accurate is ResNet-20 on CIFAR-10 in so many bytes, without data and without training?",
        seeds=[],
        config={
            "network": "the released ResNet-20, 91.73 %",
            "file": "whole: weights, biases, BatchNorm, header",
            "precision": "float32",
            "BatchNorm": "statistics as they are, on 16 bits where a budget is given",
        },
        notes="Accuracy on all 10,000 test images, once a file; nothing is selected on them. No randomness.",
    ) as results:
        model = net()
        load_checkpoint(model, state)
        results["float"] = {"bytes": state.stat().st_size, "accuracy": accuracy(model, test)}
        for kind, name, make in track(jobs, description="files"):
            results.setdefault(kind, {})[name] = written(make, state, test)
        if nncodec:
            results["nncodec"] = by_codec(nncodec, state, test)
            results["versions"] = {"nncodec": "2.1.3"}


if __name__ == "__main__":
    typer.run(main)
