"""Kernel codebooks on CIFAR-100: how far K-means alone goes, and training the codebook beside weights of as many bits.

    python -m papers.kq.cifar100 error --data-dir ../shared
    python -m papers.kq.cifar100 train --data-dir ../shared --epochs 30 [--only kq-512 --only w1-bits] [--resume]

`error` clusters the kernels of the released ResNet-32 checkpoint and needs no data. `train` starts from the same
checkpoint: every rival gets the same data, order, epochs and learning rates; the weights of the last epoch count and
nothing is selected. Each is read data-free and with BatchNorm re-estimated.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import detent as dt
from detent.report.record import Record
from papers.train import Experiment, _one_seed, summary

CHECKPOINT = "checkpoints/cifar100_resnet32_sgd150.safetensors"
SCHEMES: tuple[tuple[str, int], ...] = (*(("global", k) for k in (64, 256, 512, 1024)), ("layer", 64), ("layer", 256))
WIDTHS = (4, 3, 2)
EPOCHS = 30
app = typer.Typer(add_completion=False)


# --- bits ---------------------------------------------------------------------------------------------------------


def average_bits(model: nn.Module, run: dt.Run) -> dict[str, float]:
    """Bits a weight over all weights with more than two axes (convolutions): what a file holds of them.

    Indices and other codes, codebooks (a shared one once), scales; what no rule claims at its own width.

    Args:
        model: the network.
        run: a run on it.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> run = dt.compress(net, dt.Recipe([dt.Rule(match="^1", target=dt.KernelCodebook(size=8, book="global"))]))
        >>> found = average_bits(net, run)
        >>> found["codes"] * 9 * 320, found["books"] * 9 * 320, found["full"] * 9 * 320
        (768.0, 464.0, 18432.0)
    """
    encoded = run.encoded()
    total, codes, books, full = 0, 0, 0, 0
    once: list[tuple[dt.Target, list[Tensor]]] = []
    for name, p in model.named_parameters():
        if p.dim() < 3:
            continue
        total += p.numel()
        if name not in encoded:
            full += 8 * p.element_size() * p.numel()
            continue
        item = encoded[name]
        mine = item.target.bits_on_disk(item.params)
        index = 8 * sum(s.nbytes for s in item.codes.streams if s.name != "book")
        codes += index
        books += mine - index if not item.target.shared else 0
        streams = {s.name: (s.values, 8 * s.nbytes) for s in item.codes.streams}
        numbers = {n: (item.params[n], item.params[n].numel() * 8 * item.params[n].element_size()) for n in item.target.stored}
        shared = [(streams | numbers)[n] for n in item.target.shared if n in streams | numbers]
        values = [value for value, _ in shared]
        if shared and not any(t == item.target and _equal(values, held) for t, held in once):
            once.append((item.target, values))
            books += sum(bits for _, bits in shared)
    parts = {"codes": codes / total, "books": books / total, "full": full / total}
    return {**parts, "total": sum(parts.values())}


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- K-means alone ------------------------------------------------------------------------------------------------


def cluster_errors(kernels: list[Tensor], seed: int) -> list[dict[str, Any]]:
    """Relative squared error of the weights for every scheme, and for scalar min-max rounding beside it."""
    layouts = [dt.Layout(shape=tuple(w.shape)) for w in kernels]
    rows = []
    targets: list[tuple[str, dt.Target]] = [
        (f"{book} K={size}", dt.KernelCodebook(size=size, book=book, codebook_bits=bits, seed=seed))  # type: ignore[arg-type]
        for book, size in SCHEMES
        for bits in (None, 6)
    ]
    targets += [(f"min-max {bits} bit", dt.Uniform(bits=bits, range="minmax")) for bits in WIDTHS]
    for name, target in targets:
        fitted = target.fit_model(kernels, layouts, [None] * len(kernels))
        gap = sum(
            float((target.project(w, p) - w).double().square().sum()) for w, p in zip(kernels, fitted, strict=True)
        )
        energy = sum(float(w.double().square().sum()) for w in kernels)
        weights = sum(w.numel() for w in kernels)
        planned = getattr(target, "planned_bits", None)
        bits = (
            planned([w.shape for w in kernels])
            if planned
            else sum(target.bits_on_disk(p) for p in fitted)
        )
        rows.append(
            {
                "scheme": name,
                "codebook_bits": getattr(target, "codebook_bits", None),
                "bits_per_weight": bits / weights,
                "error": gap / energy,
            }
        )
    return rows


@app.command()
def error(
    data_dir: Annotated[Path, typer.Option(help="folder with checkpoints/", envvar="DETENT_SHARED")],
    out: Annotated[Path, typer.Option()] = Path("benchmarks/records/kq-cifar100-error.json"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Clusters the 3x3 kernels of ResNet-32 (the first convolution too) and writes the record."""
    state = load_file(data_dir / CHECKPOINT)
    kernels = [w for _, w in sorted(state.items()) if w.dim() == 4 and math.prod(w.shape[2:]) == 9]
    record = Record(
        name="kq-cifar100-error",
        question="How much of the 3x3 kernels of a trained ResNet-32 does K-means alone keep, by codebook size and scope?",
        command=f"python -m papers.kq.cifar100 error --seed {seed}",
        seeds=[seed],
        config={"checkpoint": CHECKPOINT, "kernels": sum(w.shape[0] * w.shape[1] for w in kernels), "restarts": 2},
        notes="No fine-tuning, no data. error: |w - q|^2 / |w|^2 over all 3x3 kernels.",
    )
    with record:
        rows = cluster_errors(kernels, seed)
    record.write(out, {"rows": rows})
    Console().print(rows)
