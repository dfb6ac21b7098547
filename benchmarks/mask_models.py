"""Masks of few ones: the models that files use against ideal models of the gaps between the ones.

    python -m benchmarks.mask_models --data-dir ../shared

A gap model says how far it is to the next one, a bitmap model whether there is one here. With the same probabilities
both are the same code, so what can differ is what they learn from: gaps in row-major order see density that drifts or
comes in bursts, bitmaps see rows, columns and kernels. All sizes are code lengths: a mask shares its coder's end with
the other numbers of its tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file

from benchmarks import recording
from detent.pack import models
from detent.pack.models import Grid

SHAPES = ((32, 32), (128, 128), (512, 512), (2048, 2048))
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1)
CHECKPOINT = "cifar100_resnet32_sgd150"
SEED = 0
_MODELS = {models._EVEN: "even", models._ADAPTIVE: "one density", models._CLASSES: "classes", models._MIXED: "mixing"}
_WAYS = ("gaps", "gaps after gaps", "ones of rows", "ones of columns")


def drawn(kind: str, shape: tuple[int, int], density: float, generator: np.random.Generator) -> np.ndarray:
    """A mask whose ones fall with these chances: alike, by row, by row and column, or in bursts along the rows."""
    chance = np.full(shape, density)
    if kind in ("rows", "rows and columns"):
        chance = chance * generator.lognormal(sigma=1.0, size=(shape[0], 1))
    if kind == "rows and columns":
        chance = chance * generator.lognormal(sigma=1.0, size=(1, shape[1]))
    if kind == "bursts":
        # On for 64 places on average, with a quarter of the places on; off there is a tenth of the density.
        turns = np.cumsum(generator.geometric(np.tile([1 / 64, 1 / 192], math.prod(shape) // 64 + 1)))
        on = np.searchsorted(turns, np.arange(math.prod(shape)), side="right") % 2 == 0
        chance = np.where(on, 10.0, 1.0).reshape(shape) * density
    chance = np.minimum(chance * (density / chance.mean()), 0.9)
    return (generator.random(shape) < chance).astype(np.uint8)


def pruned(folder: Path, density: float) -> Iterator[tuple[str, np.ndarray]]:
    """The masks of a trained network, one threshold over all its convolutions; those with 64 ones or more."""
    state = load_file(folder / "checkpoints" / f"{CHECKPOINT}.safetensors")
    weights = {name: w.abs() for name, w in state.items() if w.dim() == 4}
    threshold = torch.cat([w.reshape(-1) for w in weights.values()]).quantile(1 - density)
    for name, w in weights.items():
        mask = (w > threshold).to(torch.uint8).numpy()
        if mask.sum() >= 64:
            yield name, mask


# --- ideal models of gaps, in bits --------------------------------------------------------------------------------


def _learned(counts: np.ndarray) -> float:
    """Symbols by counts that start at one half and adapt after each."""
    total, size = int(counts.sum()), counts.size
    each = sum(math.lgamma(n + 0.5) - math.lgamma(0.5) for n in counts[counts > 0].tolist())
    return (math.lgamma(total + size / 2) - math.lgamma(size / 2) - each) / math.log(2)


def _lengths(values: np.ndarray) -> np.ndarray:
    return np.floor(np.log2(np.maximum(values, 0.5))).astype(np.int64) + 1


def memoryless(mask: np.ndarray) -> float:
    """Gaps that are geometric, with the density given for nothing: the number of ones, and which pattern of so many."""
    return math.log2(mask.size + 1) + models._patterns_of(mask.size, int(mask.sum()))


def by_row(mask: np.ndarray) -> float:
    """The same in each row by itself; the numbers of ones as bit lengths that are learned, and the bits below."""
    matrix = mask.reshape(mask.shape[0], -1)
    ones = matrix.sum(axis=1, dtype=np.int64)
    lengths = _lengths(ones)
    said = _learned(np.bincount(lengths)) + float(np.maximum(lengths - 1, 0).sum())
    return said + sum(models._patterns_of(matrix.shape[1], k) for k in ones.tolist())


def by_length(mask: np.ndarray, context: bool) -> float:
    """Bit lengths of gaps that are learned (each after the one before it), and the bits below."""
    gaps = np.diff(np.flatnonzero(mask), prepend=-1)
    lengths = _lengths(gaps)
    size = mask.size.bit_length() + 1
    pairs = np.zeros((size, size), dtype=np.int64)
    np.add.at(pairs, (np.concatenate([[0], lengths[:-1]]) if context else np.zeros_like(lengths), lengths), 1)
    learned = sum(_learned(row) for row in pairs if row.any())
    return math.log2(mask.size + 1) + learned + float((lengths - 1).sum())


def moving(mask: np.ndarray, memory: float) -> float:
    """Geometric gaps whose chance follows the gaps so far, each new one with a weight of 1 / memory."""
    at = np.flatnonzero(mask)
    gaps = np.diff(at, prepend=-1).tolist()
    mean, bits = mask.size / max(1, at.size), 0.0
    for gap in gaps:
        chance = 1 / max(mean, 1.0 + 1e-3)
        bits -= (math.log(chance) + (gap - 1) * math.log1p(-chance)) / math.log(2)
        mean += (gap - mean) / memory
    return math.log2(mask.size + 1) + bits


RIVALS = {
    "one geometric": memoryless,
    "one geometric a row": by_row,
    "lengths": lambda mask: by_length(mask, False),
    "lengths after lengths": lambda mask: by_length(mask, True),
    "geometric, last 8": lambda mask: moving(mask, 8.0),
    "geometric, last 64": lambda mask: moving(mask, 64.0),
}


# --- the comparison -----------------------------------------------------------------------------------------------


def measured(mask: np.ndarray) -> dict[str, Any]:
    """Bytes by the files' models, without those of distance and with them, and which wins; and by each rival."""
    grid = Grid.of(mask.size, mask.shape)
    plans = models._plans(mask.reshape(-1), 2, grid)
    best = models._smallest(plans, mask, 2)
    return {
        "ones": int(mask.sum()),
        "before": min(plan.bits for plan in plans if plan.model != models._GAPS) / 8,
        "bytes": best.bits / 8,
        "model": _WAYS[best.way] if best.model == models._GAPS else _MODELS[best.model],
        "rivals": {name: bits(mask) / 8 for name, bits in RIVALS.items()},
    }


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Several masks as one row."""
    return {
        "ones": sum(row["ones"] for row in rows),
        "before": sum(row["before"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "model": ", ".join(sorted({row["model"] for row in rows})),
        "rivals": {name: sum(row["rivals"][name] for row in rows) for name in RIVALS},
    }


def main(
    data_dir: Annotated[Path, typer.Option(help="folder with checkpoints/", envvar="DETENT_SHARED")],
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Measures every mask and writes the record."""
    with recording(
        "mask_models",
        question="Would a model of the gaps between ones make the masks of pruned tensors smaller?",
        seeds=[SEED],
        config={"shapes": SHAPES, "densities": DENSITIES, "checkpoint": CHECKPOINT},
        notes="Code lengths in bytes, without a coder's end. The rivals are ideal codes, told for nothing which of "
        "them is used; of a network's masks each is summed over all of them.",
        out=out,
    ) as results:
        rows = results["rows"] = []
        generator = np.random.default_rng(SEED)
        for kind in ("even", "rows", "rows and columns", "bursts"):
            for shape in SHAPES:
                for density in DENSITIES:
                    mask = drawn(kind, shape, density, generator)
                    if mask.any():
                        rows.append({"kind": kind, "places": mask.size, "density": density, **measured(mask)})
                        print(rows[-1], flush=True)
        for density in DENSITIES:
            masks = [mask for _, mask in pruned(data_dir, density)]
            if masks:
                places = sum(mask.size for mask in masks)
                row = summed([measured(mask) for mask in masks])
                rows.append({"kind": CHECKPOINT, "places": places, "density": density, **row})
                print(rows[-1], flush=True)


if __name__ == "__main__":
    typer.run(main)
