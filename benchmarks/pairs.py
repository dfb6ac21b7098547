"""Every target with every mechanism: each pair trains, ends in its target exactly, comes back from its file bitwise.

    python -m benchmarks.pairs [--only PSG] [--epochs 3]

A pair that a mechanism refuses is kept with the sentence it refuses it in.
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from detent.data import Batches, ImageSet, digits
from detent.specs import to_spec

# One sample of every target; what is left of its name in the table is the class.
TARGETS: dict[str, dt.Target] = {
    "Uniform, 4 bits": dt.Uniform(bits=4),
    "Uniform, 2 bits a channel": dt.Uniform(bits=2, granularity="channel"),
    "Binary": dt.Binary(),
    "Binary, no scale": dt.Binary(scale=None),
    "Ternary": dt.Ternary(),
    "PowerOfTwo": dt.PowerOfTwo(bits=3),
    "LearnedLevels": dt.LearnedLevels(k=8),
    "Round": dt.Round(),
    "Zero": dt.Zero(),
    "TopK": dt.TopK(keep=0.2),
    "TopK, model-wide": dt.TopK(keep=0.2, scope="model"),
    "NM, 2:4": dt.NM(n=2, m=4),
    "Structured, filters": dt.Structured(group="filter", keep=0.75),
    "KernelCodebook": dt.KernelCodebook(size=16),
    "VectorCodebook": dt.VectorCodebook(block=4, size=16),
    "SparseLevels, 20 % on 3 bits": dt.SparseLevels(sparse=dt.TopK(keep=0.2), survivors=dt.Uniform(bits=3)),
    "SparseLevels, 2:4 on 4 bits": dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=dt.Uniform(bits=4)),
}

MECHANISMS: dict[str, dt.Mechanism] = {
    "PSG": dt.PSG(gain=8.0),
    "PSG towards Zero": dt.PSG(gain=8.0, toward=dt.Zero()),
    "STE": dt.STE(),
    "HardProjection": dt.HardProjection(every=10),
    "Clip": dt.Clip(),
    "Penalty": dt.Penalty(strength=0.01),
    "Proximal": dt.Proximal(strength=0.01),
    "ADMM": dt.ADMM(rho=1e-2, every=6, until=0.6),
    "Masked": dt.Masked(),
    "PartialFreeze": dt.PartialFreeze(),
    "MirrorDescent": dt.MirrorDescent(),
    "MirrorDescent, relax": dt.MirrorDescent(map="relax"),
    "GDTanh": dt.GDTanh(),
    "PMF": dt.PMF(),
    "BinaryRelax": dt.BinaryRelax(),
    "PARQ": dt.PARQ(),
    "CodebookLearning": dt.CodebookLearning(),
}


# Samples that train by Adam: a map's derivative multiplies the gradient by up to beta, which ends near 1e4. SGD throws
# weights and fitted levels with them, an optimizer that divides by the size of the gradient does not.
BY_ADAM = ("GDTanh", "PMF")

MEAN, STD = [0.3], [0.35]


def missing() -> list[str]:
    """Public targets and mechanisms that have no row or column here."""
    public = [value for value in vars(dt).values() if inspect.isclass(value) and dataclasses.is_dataclass(value)]
    wanted = {cls for cls in public if issubclass(cls, (dt.Target, dt.Mechanism))}
    return sorted(cls.__name__ for cls in wanted - {type(x) for x in (*TARGETS.values(), *MECHANISMS.values())})


class Net(nn.Sequential):
    """Two 3x3 convolutions with BatchNorm, a 1x1 convolution and a linear layer, for 8x8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(16, 32, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.relu3 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(512, 10)


def recipe_of(target: dt.Target, mechanism: dt.Mechanism | None, model: nn.Module) -> dt.Recipe:
    """The target on every weight of the network that it accepts; the others stay in full precision.

    Raises:
        ValueError: the mechanism refuses the target.
    """
    rule = dt.Rule(match=r"(conv\d|fc)\.weight$", target=target, mechanism=mechanism)
    kept = []
    for name, p in model.named_parameters():
        if p.dim() > 1 and target.accepts(tuple(p.shape), p.dtype, dt.Layout(shape=tuple(p.shape))):
            kept.append(dt.Rule(match=f"^{name}$", keep=True))
    return dt.Recipe([*kept, rule])


def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Percent right."""
    model.eval()
    with torch.no_grad():
        batches = Batches(images.images, images.labels, len(images), mean=MEAN, std=STD)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    model.train()
    return 100 * right / len(images)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit."""
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def optimizer_of(mechanism: str, model: nn.Module) -> torch.optim.Optimizer:
    """What a sample trains by."""
    if mechanism in BY_ADAM:
        return torch.optim.Adam(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def try_pair(target: str, mechanism: str, seed: int, epochs: int, sets: tuple[ImageSet, ImageSet]) -> dict[str, Any]:
    """Train, finalize, save, load; what the pair of samples was refused for, or what came of it."""
    torch.manual_seed(seed)
    model = Net()
    train_set, test_set = sets
    batches = Batches(
        train_set.images, train_set.labels, 64, shuffle=True, seed=seed, drop_last=True, mean=MEAN, std=STD
    )
    optimizer = optimizer_of(mechanism, model)
    try:
        recipe = recipe_of(TARGETS[target], MECHANISMS[mechanism], model)
        run = dt.attach(model, optimizer, recipe, total_steps=epochs * len(batches))
    except ValueError as error:
        return {"refused": str(error)}
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    found: dict[str, Any] = {"full": accuracy(model, test_set)}
    with run.compressed():
        found["compressed"] = accuracy(model, test_set)
    codes = run.encoded()
    twin = Net()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pair.detent"
        dt.save(run, file, "compressed")
        found["bytes"] = file.stat().st_size
        dt.load(file, twin, "compressed")
    run.finalize()
    final = {name: p.detach() for name, p in model.named_parameters()}
    read = {name: p.detach() for name, p in twin.named_parameters()}
    gaps = [float((code.decode().double() - final[name].double()).abs().max()) for name, code in codes.items()]
    found["distance"] = max(gaps)
    found["file_agrees"] = all(same_bits(final[name], read[name]) for name in final)
    found["codes_agree"] = all(same_bits(final[name], code.decode()) for name, code in codes.items())
    found["claimed"] = sorted(codes)
    return found


def main(
    seed: Annotated[int, typer.Option(min=0)] = 0,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    only: Annotated[str | None, typer.Option(help="one mechanism; writes no record unless --out is given")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Tries every pair and writes the record.

    Raises:
        SystemExit: a pair that broke a promise, after all were tried.
    """
    torch.set_num_threads(1)
    lacking = missing()
    if lacking:
        raise SystemExit(f"benchmarks/pairs.py has no sample of {', '.join(lacking)}")
    sets = (digits("train"), digits("test"))
    mechanisms = MECHANISMS if only is None else {only: MECHANISMS[only]}
    pairs = [(t, m) for t in TARGETS for m in mechanisms]
    broken = []

    def measure() -> list[dict[str, Any]]:
        rows = []
        for t, m in track(pairs, "pairs"):
            found = try_pair(t, m, seed, epochs, sets)
            rows.append({"target": t, "mechanism": m, **found})
            if "refused" not in found and (found["distance"] or not (found["file_agrees"] and found["codes_agree"])):
                broken.append(f"{t} with {m}: {found}")
        return rows

    if only is not None and out is None:
        for row in measure():
            print(row)
    else:
        with recording(
            "pairs",
            question="Does every target work with every mechanism, and why not where it does not?",
            seeds=[seed],
            config={
                "epochs": epochs,
                "data": "scikit-learn digits, 1,437 for training, 360 for testing",
                "network": "conv 3x3, conv 3x3, conv 1x1, linear; BatchNorm",
                "optimizer": f"SGD, lr 0.05, momentum 0.9; {' and '.join(BY_ADAM)}: Adam, lr 0.01; batch 64",
                "targets": {name: to_spec(target) for name, target in TARGETS.items()},
                "mechanisms": {name: to_spec(mechanism) for name, mechanism in mechanisms.items()},
            },
            notes="A few epochs from scratch with untuned settings: whether a pair works, not which is best. distance: "
            "largest |w - project(w)| after finalize.",
            out=out,
        ) as results:
            results["rows"] = measure()
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    typer.run(main)
