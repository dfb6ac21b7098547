"""The digits as several benchmarks train on them; `detent.demo.fit` trains."""

from __future__ import annotations

from typing import Any

from detent.data import ImageSet, digits

__all__ = ["digit_sets"]


def digit_sets() -> tuple[ImageSet, ImageSet, dict[str, Any]]:
    """Train and test digits, and how `Batches` normalises both: by the training pixels."""
    train, test = digits("train"), digits("test")
    pixels = train.images.float() / 255
    return train, test, {"mean": [float(pixels.mean())], "std": [float(pixels.std())]}
