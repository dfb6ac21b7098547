"""Structured sparsity made real: parameters, multiply-accumulates and time before and after removal, on digits.

    python -m benchmarks.slim

Both models of a pair take turns in blocks within one run, so that a busy machine slows both alike; what counts is the
median of the ratios of neighbouring blocks.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from benchmarks.training import digit_sets
from detent.data import Batches
from detent.demo import fit
from detent.export import slim
from detent.report.record import summarise
from papers.models import SmallConvNet

EPOCHS, RATE, BATCH = 30, 0.05, 64
KEEP = (0.5, 0.25)
BATCHES = (1, 64)
BLOCKS, WARMUP = 60, 5


class PlainConvNet(nn.Sequential):
    """Convolutions without padding or BatchNorm, so that filters that go take their constants with them.

    Example:
        >>> PlainConvNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, 2 * width, 3)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(8 * width, 4 * width)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(4 * width, classes)


# Filters: the output channels of a layer. Channels: the input channels of a layer, so the outputs of the one before,
# with its BatchNorm, whose constant a zero-padding convolution could not take.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "plain, filters": (PlainConvNet, "filter", r"^(conv1|conv2|fc1)\.weight$"),
    "BatchNorm and padding, channels": (lambda: SmallConvNet(width=32), "channel", r"^(conv2|conv3|fc)\.weight$"),
}


def loaders(seed: int) -> tuple[Batches, Batches]:
    """Train and test batches of one seed."""
    train, test, look = digit_sets()
    batches = Batches(train.images, train.labels, BATCH, shuffle=True, seed=seed, drop_last=True, **look)
    return batches, Batches(test.images, test.labels, 360, **look)


def train(model: nn.Module, recipe: dt.Recipe | None, batches: Batches) -> dt.Run | None:
    """The same for all networks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
    return fit(model, optimizer, batches, EPOCHS, recipe)


@torch.no_grad()
def logits(model: nn.Module, batches: Batches) -> tuple[Tensor, float]:
    """(all logits of the test split, percent right)."""
    found = [(model.eval()(x), y) for x, y in batches]
    out, labels = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])
    return out, 100 * float((out.argmax(1) == labels).double().mean())


@torch.no_grad()
def latency(big: nn.Module, small: nn.Module, batch: int) -> dict[str, float]:
    """Median milliseconds of both, and the median of their ratios over neighbouring blocks."""
    x, repeats = torch.randn(batch, 1, 8, 8), max(64 // batch, 4)
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(BLOCKS + WARMUP):
        for which in (0, 1) if i % 2 else (1, 0):
            model = (big, small)[which]
            start = time.perf_counter()
            for _ in range(repeats):
                model(x)
            if i >= WARMUP:
                seconds[which].append((time.perf_counter() - start) / repeats)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    return {
        "before_ms": 1e3 * statistics.median(seconds[0]),
        "after_ms": 1e3 * statistics.median(seconds[1]),
        "ratio": ratio,
    }


def one(name: str, keep: float, seed: int) -> dict[str, Any]:
    """One network trained to a structured target, measured before and after removal."""
    make, group, match = NETWORKS[name]
    torch.manual_seed(seed)
    model = make()
    target = dt.Structured(group=group, keep=keep)  # type: ignore[arg-type]
    mechanism = dt.ADMM(rho=0.01, growth=1.2, every=0.05, until=0.6)
    batches, test = loaders(seed)
    run = train(model, dt.Recipe([dt.Rule(match=match, target=target, mechanism=mechanism)]), batches)
    assert run is not None
    run.finalize()
    model.eval()
    before = copy.deepcopy(model)
    found = slim(model, next(iter(test))[0][:1])
    (ours, accuracy), (theirs, after) = logits(before, test), logits(found.model, test)
    return {
        "parameters": list(found.parameters),
        "macs": list(found.macs),
        "accuracy": [accuracy, after],
        "difference": float((ours - theirs).abs().max()),
        "scale": float(ours.abs().max()),
        "left": list(found.left),
        "layers": {row.name: [*row.before, *row.after] for row in found.layers},
        "latency": {str(batch): latency(before, found.model, batch) for batch in BATCHES},
    }


def dense(name: str, seed: int) -> float:
    """Test accuracy of the same network without any target."""
    torch.manual_seed(seed)
    model = NETWORKS[name][0]()
    batches, test = loaders(seed)
    train(model, None, batches)
    return logits(model, test)[1]


def main(
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Trains, removes, measures, and writes the record."""
    torch.set_num_threads(1)
    seeds = seed or [0, 1, 2]
    with recording(
        "slim",
        question="What do parameters, multiply-accumulates and time become when channels that are zero are removed?",
        seeds=seeds,
        config={
            "networks": {name: {"group": group, "match": match} for name, (_, group, match) in NETWORKS.items()},
            "keep": list(KEEP),
            "epochs": EPOCHS,
            "rate": RATE,
            "batch_size": BATCH,
            "latency_batches": list(BATCHES),
            "latency_blocks": BLOCKS,
            "threads": 1,
        },
        notes="Accuracy (%) on the test split of scikit-learn digits after the last epoch, before and after removal; "
        "nothing was selected on it. Time: PyTorch eager on one thread, the same process, taking turns; the ratio is "
        "the median over neighbouring blocks. Multiply-accumulates as torch's counter sees them, for one image.",
        out=out,
    ) as results:
        rows = []
        for name in NETWORKS:
            full = summarise([dense(name, number) for number in seeds])
            for keep in KEEP:
                found = [one(name, keep, number) for number in seeds]
                rows.append(
                    {
                        "network": name,
                        "keep": keep,
                        "dense": full,
                        "before": summarise([f["accuracy"][0] for f in found]),
                        "after": summarise([f["accuracy"][1] for f in found]),
                        "difference": max(f["difference"] for f in found),
                        "scale": max(f["scale"] for f in found),
                        "parameters": [summarise([float(f["parameters"][i]) for f in found]) for i in (0, 1)],
                        "macs": [summarise([float(f["macs"][i]) for f in found]) for i in (0, 1)],
                        "ratio": {b: summarise([f["latency"][b]["ratio"] for f in found]) for b in map(str, BATCHES)},
                        "seeds": found,
                    }
                )
                print({key: value for key, value in rows[-1].items() if key != "seeds"})
        results["rows"] = rows


if __name__ == "__main__":
    typer.run(main)
