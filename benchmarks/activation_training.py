"""Rounded activations: ResNet-20 on CIFAR-10 from its checkpoint, calibrated at 8 bits and trained at fewer.

    python -m benchmarks.activation_training --data-dir ../shared --out runs/activations [--bits 4] [--precision bf16]

First and last layer stay at 8 bits, weights and inputs, as in the papers. Nothing is selected: the last epoch counts,
and one setting serves all widths. A run that was broken off goes on exactly where its last epoch ended.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from benchmarks.budget_training import CHECKPOINT, DECAY, LOOK, RATE, accuracy, fine_tuned, net
from detent.data import Batches, ImageSet, load_images
from detent.export import to_onnx
from detent.export.onnx import session
from papers.models import load_checkpoint

SEEN = 512  # training images that 8 bits are calibrated on
IN_ONNX = 2000  # test images on which ONNX Runtime is compared


def recipe(bits: int) -> dt.Recipe:
    """Weights a channel, inputs a tensor, all of this width but for the first and the last layer."""
    ends = [
        dt.Rule(match=end, target=dt.Uniform(bits=8, granularity="channel"), mechanism=dt.STE())
        for end in ("@first", "@last")
    ]
    inner = dt.Rule(match="@weights", target=dt.Uniform(bits=bits, granularity="channel"), mechanism=dt.STE())
    eight = [dt.Activation(match=end, quantizer=dt.LearnedStep(bits=8)) for end in ("@first", "@last")]
    return dt.Recipe([*ends, inner], activations=[*eight, dt.Activation(quantizer=dt.LearnedStep(bits=bits))])


def calibrated(start: Path, train_set: ImageSet, test: ImageSet, bits: int) -> float:
    """Without training: the grids of weights and inputs fitted, nothing else."""
    model = net()
    load_checkpoint(model, start)
    model.eval()
    run = dt.compress(model, recipe(bits))
    run.observe([x for x, _ in Batches(train_set.images[:SEEN], train_set.labels[:SEEN], 256, **LOOK)])
    with run.compressed():
        return accuracy(model, test)


def _loss(logits: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def in_onnx(run: dt.Run, test: ImageSet) -> dict[str, float]:
    """How far ONNX Runtime's answers are from PyTorch's compressed life, on test images."""
    batches = Batches(test.images[:IN_ONNX], test.labels[:IN_ONNX], 100, **LOOK)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        to_onnx(run, Path(folder) / "net.onnx", next(iter(batches))[0])
        running = session(str(Path(folder) / "net.onnx"), optimize=True)
        name, same, gap = running.get_inputs()[0].name, 0, 0.0
        with run.compressed():
            for x, _ in batches:
                mine, theirs = run.model(x).numpy(), np.asarray(running.run(None, {name: x.numpy()})[0])
                same += int((mine.argmax(1) == theirs.argmax(1)).sum())
                gap = max(gap, float(np.abs(mine - theirs).max()))
    return {"images": IN_ONNX, "same_answer": same, "largest_difference": gap}


def main(
    data_dir: Annotated[Path, typer.Option(help="the folder with checkpoints and data/cifar10")],
    out: Annotated[Path, typer.Option(help="keeps the state of the training")],
    bits: Annotated[int, typer.Option(min=2, max=8, help="of weights and activations")] = 4,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 autocast; measured in fp32")] = "fp32",
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Calibrate, train, write the file, read it back, measure it, compare with ONNX Runtime, and write the record."""
    torch.set_num_threads(threads)
    folder = out / f"w{bits}a{bits}-{epochs}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    train_set = load_images(data_dir / "data" / "cifar10", "train", grey=False, cache=out / "train.safetensors")
    test_set = load_images(data_dir / "data" / "cifar10", "test", grey=False, cache=out / "test.safetensors")
    start = data_dir / CHECKPOINT
    with recording(
        f"activations-w{bits}a{bits}",
        script="activation_training",
        question=f"How accurate is ResNet-20 on CIFAR-10 with weights and activations of {bits} bits?",
        seeds=[seed],
        config={
            "network": "the released ResNet-20, 91.73 %",
            "epochs": epochs,
            "rate": f"{RATE}, cosine to 0",
            "weight decay": DECAY,
            "precision": precision,
            "first and last layer": "8 bits, weights and inputs",
            "calibrated on": f"{SEEN} training images without labels",
            "BatchNorm": "as trained",
        },
        notes="Last epoch; all 10,000 test images, once. A run that was resumed counts its last part's seconds alone.",
    ) as results:
        results["calibrated"] = {str(b): calibrated(start, train_set, test_set, b) for b in dict.fromkeys((8, bits))}
        run = fine_tuned(
            f"W{bits}A{bits}", lambda _: recipe(bits), _loss, train_set, start, epochs, precision, seed, folder
        )
        path = folder / "model.detent"
        results["bytes"] = dt.save(run, path, life="compressed")
        twin: nn.Module = net()
        dt.load(path, twin, life="compressed")
        results["accuracy"] = accuracy(twin, test_set)
        results["onnx"] = in_onnx(run, test_set)


if __name__ == "__main__":
    typer.run(main)
