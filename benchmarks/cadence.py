"""How often a target must be fitted: accuracy of the compressed life by the steps between fits.

    python -m benchmarks.cadence [--epochs 12]

The default (every 10 steps at first, every 100 after step 1,000) was chosen by this, on training images held out.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import track

import detent as dt
from benchmarks import recording
from benchmarks.pairs import MEAN, STD, Net, accuracy, recipe_of
from detent.data import Batches, digits, split_holdout

EVERY = {"1": 1, "10": 10, "100": 100, "once": None}
ARMS: dict[str, tuple[dt.Target, dt.Mechanism]] = {
    "STE, 2 bits": (dt.Uniform(bits=2), dt.STE()),
    "STE, 3 bits a channel": (dt.Uniform(bits=3, granularity="channel"), dt.STE()),
    "STE, ternary": (dt.Ternary(), dt.STE()),
    "STE, TopK 10 %": (dt.TopK(keep=0.1), dt.STE()),
    "PARQ, 2 bits": (dt.Uniform(bits=2), dt.PARQ()),
    "BinaryRelax, 2 bits": (dt.Uniform(bits=2), dt.BinaryRelax()),
    "mirror descent, ternary": (dt.Ternary(), dt.MirrorDescent()),
}


def train(arm: str, every: str, optimizer: str, epochs: int, seed: int) -> float:
    """Percent right of the compressed life on the images held out."""
    target, mechanism = ARMS[arm]
    torch.manual_seed(seed)
    model = Net()
    images, held_out = split_holdout(digits("train", seed), 300, seed)
    batches = Batches(images.images, images.labels, 64, shuffle=True, seed=seed, mean=MEAN, std=STD)
    total = epochs * len(batches)
    rules = recipe_of(target, mechanism, model).rules
    timing: dict[str, Any] = {"fit_until": 1} if every == "once" else {"fit_every": EVERY[every]}
    rules = [
        rule if rule.keep else dt.Rule(match=rule.match, target=target, mechanism=mechanism, **timing) for rule in rules
    ]
    if optimizer == "SGD":
        base: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    else:
        base = torch.optim.Adam(model.parameters(), lr=0.003)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(base, total)
    run = dt.attach(model, base, dt.Recipe(rules), total_steps=total)
    for _ in range(epochs):
        for inputs, labels in batches:
            base.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            base.step()
            rate.step()
    with run.compressed():
        return accuracy(model, held_out)


def main(
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    seeds: Annotated[int, typer.Option(min=2)] = 3,
    name: Annotated[str, typer.Option(help="name of the record")] = "cadence",
) -> None:
    """Train every arm and write the record."""
    torch.set_num_threads(1)
    with recording(
        name,
        script="cadence",
        question="How often must a target be fitted to the weights?",
        seeds=list(range(seeds)),
        config={
            "network": "two 3x3 convolutions, one 1x1, a linear layer, BatchNorm; all weights claimed",
            "data": "digits, 300 of the training images held out to select on",
            "epochs": epochs,
            "steps": "18 an epoch, cosine to 0",
            "precision": "float32",
        },
        notes="Percent right of the compressed life on held-out training images; mean and range over the seeds.",
    ) as results:
        rows = [(arm, optimizer, every) for arm in ARMS for optimizer in ("SGD", "Adam") for every in EVERY]
        for arm, optimizer, every in track(rows, description="training"):
            right = [train(arm, every, optimizer, epochs, seed) for seed in range(seeds)]
            row = {"mean": statistics.fmean(right), "low": min(right), "high": max(right)}
            results.setdefault(arm, {}).setdefault(optimizer, {})[every] = row


if __name__ == "__main__":
    typer.run(main)
