"""The short training on scikit-learn's digits that several benchmarks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import detent as dt
from detent.data import Batches, ImageSet, digits

__all__ = ["digit_sets", "fit"]


def digit_sets() -> tuple[ImageSet, ImageSet, dict[str, Any]]:
    """Train and test digits, and how `Batches` normalises both: by the training pixels."""
    train, test = digits("train"), digits("test")
    pixels = train.images.float() / 255
    return train, test, {"mean": [float(pixels.mean())], "std": [float(pixels.std())]}


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, epochs: int, recipe: dt.Recipe | None = None
) -> dt.Run | None:
    """Train with a cosine down to zero; the recipe, if any, rides along."""
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    run = None if recipe is None else dt.attach(model, optimizer, recipe, total_steps=total)
    for epoch in range(epochs):
        model.train()
        batches.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return run
