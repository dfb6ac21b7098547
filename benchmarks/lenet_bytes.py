"""LeNet-5 on MNIST as one self-contained file: pruned by ADMM, a few shared values a layer, dead units folded, coded.

    python -m papers.admm.lenet --data-dir ../shared --only NAME --out RUNS
    python -m benchmarks.lenet_bytes --data-dir ../shared --runs RUNS --job NAME

Reads the networks that the first command trained, folds what cannot reach the output, puts the biases on 8 bits, writes
the file, reads it into a fresh network and measures that one on the test split.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import nn

import detent as dt
from benchmarks import recording
from detent.data import Batches, load_images
from detent.demo import LeNet5
from detent.export import fold_dead_units
from detent.pack import sizes
from detent.report.record import summarise
from papers.train import evaluate

WEIGHTS = 430_500
PAPER = 2_730  # bytes, index included: the published 623-fold reduction of the 430,500 weights in float32


def recipe(levels: int) -> dt.Recipe:
    """What lies there already: the shared values of the survivors, found again exactly; biases rounded to 8 bits."""
    shared = dt.LearnedLevels(k=levels, zero=True, param_dtype="float16")
    weights = dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=shared)
    return dt.Recipe(
        [
            dt.Rule(match=r"weight$", target=weights),
            dt.Rule(match=r"bias$", include=r"bias$", target=dt.Uniform(bits=8, range="minmax")),
        ]
    )


def survivors(model: nn.Module) -> dict[str, int]:
    """Non-zero weights by name."""
    return {name: int((p != 0).sum()) for name, p in model.named_parameters() if name.endswith("weight")}


def store(state: dict[str, torch.Tensor], levels: int, batches: Batches, folder: Path) -> dict[str, Any]:
    """One trained network as a file, and what is read back from it."""
    model = LeNet5()
    model.load_state_dict(state)
    found: dict[str, Any] = {"trained": evaluate(model, batches)["accuracy"], "survivors": survivors(model)}
    folded = fold_dead_units(model, torch.zeros(1, 1, 28, 28))
    found |= {"folded": evaluate(model, batches)["accuracy"], "survivors_folded": survivors(model)}
    found["left_and_why"] = list(folded.left)
    run = dt.compress(model, recipe(levels))
    with run.compressed():
        found["rounded"] = evaluate(run.model, batches)["accuracy"]
    for coding in ("none", "bitpacked", "entropy"):
        path = folder / f"{coding}.detent"
        found[f"bytes_{coding}"] = dt.save(run, path, "compressed", coding=coding)
        twin = LeNet5()
        dt.load(path, twin, "compressed")
        with run.compressed():
            ours = run.model.state_dict()
            same = all(torch.equal(ours[name], value) for name, value in twin.state_dict().items())
        if not same:
            raise RuntimeError(f"{coding}: what was read differs from what was written")
        found["accuracy"] = evaluate(twin, batches)["accuracy"]
    found["sizes"] = sizes(folder / "entropy.detent")
    return found


def main(
    data_dir: Annotated[Path, typer.Option(help="folder with data/mnist", envvar="DETENT_SHARED")],
    runs: Annotated[Path, typer.Option(help="--out of papers.admm.lenet")] = Path("runs/admm-lenet"),
    job: Annotated[str, typer.Option(help="a job of papers.admm.lenet that ends on shared values")] = "file",
    levels: Annotated[int, typer.Option(help="shared values a layer")] = 16,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Stores every seed of a job that is finished and writes the record."""
    torch.set_num_threads(1)
    images = load_images(str(data_dir / "data" / "mnist"), "test")
    batches = Batches(images.images, images.labels, 500, False, [0.1307], [0.3081])
    files = sorted((runs / job).glob("seed*/result.json"))
    if not files:
        raise typer.BadParameter(f"{runs / job} holds no finished training; run papers.admm.lenet --only {job} first")
    seeds = [int(file.parent.name.removeprefix("seed")) for file in files]
    with recording(
        "lenet_bytes",
        question="How many bytes is a whole LeNet-5 on disk, index, biases and names included, and how good is it?",
        seeds=seeds,
        config={"job": job, "levels": levels, "bias_bits": 8, "paper_bytes_with_index": PAPER},
        notes="Accuracies in % on the test split, of the network read back from the file; nothing was chosen by them.",
        out=out,
    ) as results:
        rows = []
        for seed, file in zip(seeds, files, strict=True):
            with tempfile.TemporaryDirectory() as name:
                row = store(load_file(file.parent / "model.safetensors"), levels, batches, Path(name))
            rows.append({"seed": seed, **row})
            print(rows[-1])
        results["rows"] = rows
        keys = ("accuracy", "trained", "bytes_entropy", "bytes_bitpacked", "bytes_none")
        results["summary"] = {key: summarise([float(row[key]) for row in rows]) for key in keys}
        results["summary"]["ratio"] = summarise([4 * WEIGHTS / row["bytes_entropy"] for row in rows])


if __name__ == "__main__":
    typer.run(main)
