"""Rounded activations: ResNet-20 on CIFAR-10 from its checkpoint, calibrated at 8 bits and trained at fewer.

    python -m benchmarks.activation_training --data-dir ../shared --out runs/activations [--bits 4] [--precision bf16]

First and last layer stay at 8 bits, weights and inputs, as in the papers. Nothing is selected: the last epoch counts,
and one setting serves all widths. A run that was broken off goes on exactly where its last epoch ended.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import nn

import detent as dt
from benchmarks import recording
from benchmarks.budget_training import CHECKPOINT, LOOK, accuracy, net
from detent.data import Batches, ImageSet, load_images
from detent.export import to_onnx
from papers.models import load_checkpoint

RATE, DECAY, BATCH = 0.02, 1e-4, 128
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
    plain = dt.Recipe(recipe(bits).without_mechanisms().rules, activations=recipe(bits).activations)
    run = dt.compress(model, plain)
    run.observe([x for x, _ in Batches(train_set.images[:SEEN], train_set.labels[:SEEN], 256, **LOOK)])
    with run.compressed():
        return accuracy(model, test)


def train(bits: int, train_set: ImageSet, start: Path, epochs: int, precision: str, seed: int, folder: Path) -> dt.Run:
    """The run after its last epoch; its state is kept after each."""
    torch.manual_seed(seed)
    model = net()
    load_checkpoint(model, start)
    batches = Batches(
        train_set.images, train_set.labels, BATCH, shuffle=True, seed=seed, crop=4, flip=True, drop_last=True, **LOOK
    )
    total = epochs * len(batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    run = dt.attach(model, optimizer, recipe(bits), total_steps=total)
    kept, done = folder / "state.pt", 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["epochs"]
    low: Any = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    for epoch in range(done, epochs):
        batches.set_epoch(epoch)
        model.train()
        for x, y in batches:
            with low:
                logits = model(x.to(memory_format=torch.channels_last))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            schedule.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state | {"epochs": epoch + 1}, kept)
        print(f"W{bits}A{bits}: epoch {epoch + 1} of {epochs}", flush=True)
    model.eval()
    return run


def in_onnx(run: dt.Run, test: ImageSet) -> dict[str, float]:
    """How far ONNX Runtime's answers are from PyTorch's compressed life, on test images."""
    import onnxruntime as ort

    batches = Batches(test.images[:IN_ONNX], test.labels[:IN_ONNX], 100, **LOOK)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        to_onnx(run, Path(folder) / "net.onnx", next(iter(batches))[0])
        session = ort.InferenceSession(str(Path(folder) / "net.onnx"))
        name, same, gap = session.get_inputs()[0].name, 0, 0.0
        with run.compressed():
            for x, _ in batches:
                mine, theirs = run.model(x).numpy(), np.asarray(session.run(None, {name: x.numpy()})[0])
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
        run = train(bits, train_set, start, epochs, precision, seed, folder)
        path = folder / "model.detent"
        results["bytes"] = dt.save(run, path, life="compressed")
        twin: nn.Module = net()
        dt.load(path, twin, life="compressed")
        results["accuracy"] = accuracy(twin, test_set)
        results["onnx"] = in_onnx(run, test_set)


if __name__ == "__main__":
    typer.run(main)
