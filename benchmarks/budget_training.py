"""Training under a budget: ResNet-20 on CIFAR-10 from its checkpoint, a few epochs for each number of bytes.

    python -m benchmarks.budget_training --data-dir ../shared --budget "45 kB" --out runs/budget [--precision bf16]

Straight-through at the rate of the budget, taught by the full-precision network. Nothing is selected: the last epoch
counts, and one setting serves all budgets. A run that was broken off goes on exactly where its last epoch ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import budget as untrained
from benchmarks import recording
from detent.data import Batches, ImageSet, load_images
from papers.models import load_checkpoint

CHECKPOINT = "checkpoints/cifar10_resnet20.safetensors"
LOOK = untrained.NETWORKS["resnet20"].look
RATE, DECAY, BATCH, TEMPERATURE, SHARE = 0.02, 1e-4, 128, 2.0, 0.7


def net() -> nn.Module:
    """ResNet-20 before its weights are read."""
    return untrained.net("resnet20")


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Percent right."""
    batches = Batches(images.images, images.labels, 500, **LOOK)
    return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(images)


def loss_of(logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, and the divergence from the teacher's softened answers."""
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.log_softmax(taught / TEMPERATURE, 1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - SHARE) * F.cross_entropy(logits, labels) + SHARE * TEMPERATURE**2 * soft


def fine_tuned(
    label: str,
    recipe: Callable[[nn.Module], dt.Recipe],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    train_set: ImageSet,
    start: Path,
    epochs: int,
    precision: str,
    seed: int,
    folder: Path,
    teacher: nn.Module | None = None,
) -> dt.Run:
    """The run of a network from its checkpoint after its last epoch; its state is kept after each.

    Args:
        label: shown after each epoch.
        recipe: of the network with its weights.
        loss: of its answers, the teacher's (its own, if there is none) and the labels.
        train_set: images.
        start: the checkpoint.
        epochs: how many.
        precision: "bf16" for autocast.
        seed: of the batches.
        folder: keeps the state, from which a run that was broken off goes on exactly.
        teacher: answers beside it, if any.
    """
    torch.manual_seed(seed)
    model = net()
    load_checkpoint(model, start)
    batches = Batches(
        train_set.images, train_set.labels, BATCH, shuffle=True, seed=seed, crop=4, flip=True, drop_last=True, **LOOK
    )
    total = epochs * len(batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    run = dt.attach(model, optimizer, recipe(model), total_steps=total)
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
            x = x.to(memory_format=torch.channels_last)
            with low:
                with torch.no_grad():
                    taught = None if teacher is None else teacher(x)
                logits = model(x)
            optimizer.zero_grad()
            loss(logits.float(), (logits.detach() if taught is None else taught).float(), y).backward()
            optimizer.step()
            schedule.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state | {"epochs": epoch + 1}, kept)
        print(f"{label}: epoch {epoch + 1} of {epochs}", flush=True)
    model.eval()
    return run


def main(
    data_dir: Annotated[Path, typer.Option(help="the folder with checkpoints and data/cifar10")],
    budget: Annotated[str, typer.Option(help="bytes of the whole file")],
    out: Annotated[Path, typer.Option(help="keeps the state of the training")],
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 autocast; measured in fp32")] = "fp32",
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train, write the file, read it back, measure it, and write the record."""
    torch.set_num_threads(threads)
    name = budget.replace(" ", "")
    folder = out / f"{name}-{epochs}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    train_set = load_images(data_dir / "data" / "cifar10", "train", grey=False, cache=out / "train.safetensors")
    test = load_images(data_dir / "data" / "cifar10", "test", grey=False, cache=out / "test.safetensors")
    with recording(
        f"budget-trained-{name.lower()}",
        script="budget_training",
        question=f"How accurate is ResNet-20 on CIFAR-10 in {budget}, trained under that budget?",
        seeds=[seed],
        config={
            "network": "the released ResNet-20, 91.73 %",
            "epochs": epochs,
            "rate": f"{RATE}, cosine to 0",
            "weight decay": DECAY,
            "teacher": f"the network itself, {SHARE} of the loss at temperature {TEMPERATURE}",
            "precision": precision,
            "BatchNorm": "as trained, on 16 bits in the file",
        },
        notes="Last epoch; all 10,000 test images, once. A run that was resumed counts its last part's seconds alone.",
    ) as results:
        start, teacher = data_dir / CHECKPOINT, net()
        load_checkpoint(teacher, start)
        pull = partial(dt.allocate, budget=budget, mechanism=dt.STE())
        run = fine_tuned(budget, pull, loss_of, train_set, start, epochs, precision, seed, folder, teacher)
        recipe = dt.allocate(run, budget)
        path = folder / "model.detent"
        results["bytes"] = dt.save(run, path, life="compressed", recipe=recipe, budget=budget)
        twin: nn.Module = net()
        dt.load(path, twin, life="compressed")
        results["accuracy"] = accuracy(twin, test)
        results["rules"] = recipe.to_yaml()


if __name__ == "__main__":
    typer.run(main)
