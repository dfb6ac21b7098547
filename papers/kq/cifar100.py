"""Kernel codebooks on CIFAR-100: how far K-means alone goes, and training the codebook beside weights of as many bits.

    python -m papers.kq.cifar100 error --data-dir ../shared
    python -m papers.kq.cifar100 train --data-dir ../shared --epochs 30 [--tune 1] [--only kq-512] [--resume]

`error` clusters the kernels of the released ResNet-32 checkpoint and needs no data. `train` starts from the same
checkpoint: every rival gets the same data, order and epochs, and the same learning rate or, with --tune, its own: the
best of the same rates on held-out training images. The weights of the last epoch count and nothing is selected on test
images. Each is read data-free and with BatchNorm re-estimated.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import detent as dt
from detent.report.record import Record
from papers import models
from papers.train import Experiment, all_seeds, load_recipe
from papers.tune import chosen

CHECKPOINT = "checkpoints/cifar100_resnet32_sgd150.safetensors"
SCHEMES: tuple[tuple[str, int], ...] = (*(("global", k) for k in (64, 256, 512, 1024)), ("layer", 64), ("layer", 256))
WIDTHS = (4, 3, 2)
EPOCHS = 30
RATE = 0.01
# --tune tries RATE times these, and goes on in such steps where the best is at the edge.
TIMES, STEP, HOLDOUT = (1 / 3, 1.0, 3.0), 3.0, 5000
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
        >>> [round(found[part] * 9 * 320) for part in ("codes", "books", "full")]
        [768, 464, 18432]
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
        runs = dict(zip(item.form.parts, item.form.values, strict=True))
        codes += 8 * sum(part.nbytes(v) for part, v in runs.items() if part.role == "codes" and part.name != "book")
        book = {part: values for part, values in runs.items() if part.role != "codes" or part.name == "book"}
        bits = 8 * sum(part.nbytes(values) for part, values in book.items())
        values = list(book.values())
        if any(part.is_shared for part in book):
            if any(target == item.target and _equal(values, held) for target, held in once):
                continue
            once.append((item.target, values))
        books += bits
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
        own = 8 * sum(target.form(w, params).nbytes for w, params in zip(kernels, fitted, strict=True))
        bits = planned([w.shape for w in kernels]) if planned else own
        rows.append(
            {
                "scheme": name,
                "codebook_bits": getattr(target, "codebook_bits", None),
                "bits_per_weight": bits / weights,
                "error": gap / energy,
            }
        )
    rows += [_unit_norm(kernels, size, seed) for size in (64, 256)]
    return rows


def _unit_norm(kernels: list[Tensor], size: int, seed: int) -> dict[str, Any]:
    """Kernels of norm 1 out of one codebook, each with a sign and a norm of 4 bits (a grid a layer): does it pay?"""
    flat = [w.reshape(-1, 9) for w in kernels]
    norms = [w.norm(dim=1, keepdim=True).clamp_min(1e-12) for w in flat]
    largest = [w.gather(1, w.abs().argmax(1, keepdim=True)) for w in flat]
    signs = [torch.where(x < 0, -1.0, 1.0) for x in largest]
    alike = torch.cat([w / n * s for w, n, s in zip(flat, norms, signs, strict=True)]).reshape(-1, 1, 3, 3)
    book = dt.KernelCodebook(size=size, book="layer", codebook_bits=None, seed=seed)
    directions = book.project(alike, book.fit(alike)).reshape(-1, 9).split([len(w) for w in flat])
    gap, grid = 0.0, dt.Uniform(bits=5, zero=False)  # 16 positive levels of a symmetric grid: 4 bits
    for w, direction, sign in zip(flat, directions, signs, strict=True):
        unit = direction * sign
        scale = ((w * unit).sum(1) / unit.square().sum(1).clamp_min(1e-12)).clamp_min(1e-12)
        gap += float((grid.project(scale, grid.fit(scale))[:, None] * unit - w).double().square().sum())
    units, weights = len(alike), sum(w.numel() for w in kernels)
    bits = units * (math.ceil(math.log2(size)) + 1 + 4) + 32 * (size * 9 + len(kernels))
    energy = sum(float(w.double().square().sum()) for w in kernels)
    name = f"global K={size}, unit norm, sign, 4-bit scale"
    return {"scheme": name, "codebook_bits": None, "bits_per_weight": bits / weights, "error": gap / energy}


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
        question="How much of the 3x3 kernels of a trained ResNet-32 does K-means alone keep, by size and scope?",
        seeds=[seed],
        config={"checkpoint": CHECKPOINT, "kernels": sum(w.shape[0] * w.shape[1] for w in kernels), "restarts": 2},
        notes="No fine-tuning, no data. error: |w - q|^2 / |w|^2 over all 3x3 kernels.",
    )
    with record:
        rows = cluster_errors(kernels, seed)
    record.write(out, {"rows": rows})
    Console().print(rows)


# --- training the codebook ----------------------------------------------------------------------------------------


def kernels(target: dict[str, Any] | None, mechanism: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """`target` for every 3x3 convolution but the first; that one, 1x1 and the head at 8 bits a channel."""
    grid = {"kind": "Uniform", "bits": 8, "granularity": "channel", "range": "minmax"}
    pull = {"mechanism": {"kind": "STE"}, "fit_every": 1} if mechanism else {}
    own = {"mechanism": mechanism} if mechanism else {}
    body = {"match": "@kernels", "target": target, **own, **more}
    return {"rules": [{"match": "@first", "target": grid, "pinned": True, **pull}, body, {**EIGHT_REST, **pull}]}


def codebook(size: int) -> dict[str, Any]:
    """A global codebook; 512 codewords are about 1.05 bits a weight on VGG-16, larger ones cost up to 1.62."""
    return {"kind": "KernelCodebook", "size": size, "book": "global"}


EIGHT_REST = {
    "match": "weight$",
    "target": {"kind": "Uniform", "bits": 8, "granularity": "channel", "range": "minmax"},
    "pinned": True,
}
LEARN = {"kind": "CodebookLearning"}
# Under straight-through the weights behind the codewords go on moving, and the codewords follow them.
OFTEN = {"fit_every": 10}
# Weight by weight, a scale a channel: 1 bit, and three levels (1.58; 2 bits where codes are not entropy coded).
BINARY = {"kind": "Binary", "granularity": "channel"}
TERNARY = {"kind": "Ternary", "granularity": "channel"}
RIVALS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "kq-512": kernels(codebook(512), LEARN),
    "kq-512-sum": kernels(codebook(512), {**LEARN, "reduce": "sum"}),
    "kq-512-again": kernels(codebook(512), {**LEARN, "reassign_every": 20}),
    "kq-512-ste": kernels(codebook(512), {"kind": "STE"}, **OFTEN),
    "kq-2048": kernels(codebook(2048), LEARN),
    "kq-2304": kernels(codebook(2304), LEARN),
    "kq-2304-ste": kernels(codebook(2304), {"kind": "STE"}, **OFTEN),
    "ste-w1": kernels(BINARY, {"kind": "STE"}, fit_every=1),
    "ste-w1.58": kernels(TERNARY, {"kind": "STE"}, fit_every=1),
}


def experiment(
    rival: str,
    epochs: int,
    seeds: list[int],
    threads: int | None,
    steps: int | None,
    rate: float = RATE,
    holdout: int = 0,
    distill: float = 0.0,
    precision: str = "fp32",
) -> Experiment:
    """The experiment of one rival; "none" only compresses the checkpoint."""
    recipe = RIVALS[rival]
    alone = {f"kq-{size}": kernels(codebook(size), None) for size in (512, 2048)}
    return Experiment.model_validate(
        {
            "name": f"kq-cifar100-{rival}{'-distilled' if distill else ''}",
            "question": "From the released checkpoint: what is left of it with kernels out of a codebook, and with as "
            "many bits a weight?",
            "model": "resnet32",
            "init": CHECKPOINT,
            "data": {
                "name": "data/cifar100",
                "label": "fine_label",
                "crop": 4,
                "padding": "reflect",
                "flip": True,
                "mean": [129.3 / 255, 124.1 / 255, 112.4 / 255],
                "std": [68.2 / 255, 65.4 / 255, 70.4 / 255],
                "cache": "runs/cache",
                "holdout": holdout,
            },
            "recipe": recipe,
            "evaluate_recipe": kernels(codebook(512), None) if recipe is None else None,
            "optimizer": {"name": "SGD", "args": {"lr": rate, "momentum": 0.9, "weight_decay": 1e-4}},
            "schedule": {"kind": "cosine"},
            "batch_size": 128,
            "epochs": epochs,
            "distill": distill,
            "channels_last": True,
            "precision": precision,
            "threads": threads,
            "seeds": seeds,
            "evaluate": {"bits": [], "recipes": alone if recipe is None else {}, "calibrate": 4000, "every": 0},
            "extra": {"max_steps": steps},
        }
    )


@app.command()
def train(
    data_dir: Annotated[Path, typer.Option(help="folder with data/ and checkpoints/", envvar="DETENT_SHARED")],
    epochs: Annotated[int, typer.Option(min=1)] = EPOCHS,
    out: Annotated[Path, typer.Option()] = Path("runs/kq-cifar100"),
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(RIVALS)}; may be repeated")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="stop after so many steps, schedules included")] = None,
    tune: Annotated[
        int | None,
        typer.Option(min=1, help="epochs of each trial that chooses a rival's rate, on held-out train images"),
    ] = None,
    distill: Annotated[
        float, typer.Option(min=0, max=1, help="share of the loss that is the divergence from the checkpoint's outputs")
    ] = 0.0,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="bf16 is autocast, where the CPU has AMX or AVX512-BF16")
    ] = "fp32",
    resume: Annotated[bool, typer.Option("--resume")] = False,
) -> None:
    """Trains the rivals one after another and writes a record for each; "none" trains a plain network as long."""
    console = Console()
    for rival in only or list(RIVALS):
        if rival not in RIVALS:
            raise typer.BadParameter(f"--only {rival}: must be one of {', '.join(RIVALS)}")
        folder = out / (f"{rival}-distilled" if distill else rival)
        rate, further = RATE, {}
        if tune is not None:

            def trial(number: float, rival: str = rival, length: int = tune) -> Experiment:
                return experiment(rival, length, [1000], threads, steps, number, HOLDOUT, distill, precision)

            rate, tried = chosen(trial, [RATE * times for times in TIMES], folder, data_dir, console, step=STEP)
            further = {"tuned": {"lr": rate, "epochs": tune, "held_out": tried}}
        plan = experiment(rival, epochs, seed or [1], threads, steps, rate, distill=distill, precision=precision)

        def more(rival: str = rival, further: dict[str, Any] = further) -> dict[str, Any]:
            return {"bits": rival_bits(rival), **further}

        all_seeds(plan, folder, data_dir, folder, resume, console, more)


def rival_bits(rival: str) -> dict[str, float] | None:
    """Bits a weight of a rival over all convolutions, its first and 1x1 layers at their width."""
    recipe = RIVALS[rival]
    if recipe is None:
        return None
    torch.manual_seed(0)
    net = models.resnet32()
    bare = {"rules": [{k: v for k, v in rule.items() if k != "mechanism"} for rule in recipe["rules"]]}
    for rule in bare["rules"]:  # which codewords they are does not change their price
        if rule["target"]["kind"] == "KernelCodebook":
            rule["target"] = {**rule["target"], "restarts": 1, "iterations": 1}
    return average_bits(net, dt.compress(net, load_recipe(bare) or dt.Recipe([])))


if __name__ == "__main__":
    app()
