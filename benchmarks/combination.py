"""A pair that no paper has: ADMM onto N:M sparsity *and* few bits at once, beside its parts one after the other.

python -m benchmarks.combination
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import detent as dt
from benchmarks import recording
from detent.demo import Bench, Settings
from detent.report.record import summarise

N, M, BITS = 1, 4, 3
EPOCHS_DENSE, EPOCHS = 20, 12
NAMES = {
    "joint": "ADMM onto both at once (SparseLevels)",
    "staged": "ADMM onto 1:4, then onto both, half the epochs each",
    "sparse_first": "ADMM onto 1:4, its survivors rounded to 3 bits at the end",
    "grid_first": "ADMM onto 3 bits, pruned 1:4 at the end",
    "rounded": "no training: the dense network onto both",
}


def admm(until: float = 0.6) -> dt.ADMM:
    """Settings of the pruning demo (docs/decisions.md), alike for all ways."""
    return dt.ADMM(rho=0.01, growth=1.2, every=0.05, until=until)


def targets() -> dict[str, dt.Target]:
    """Both sets and their intersection."""
    sparse, grid = dt.NM(n=N, m=M), dt.Uniform(bits=BITS)
    return {"sparse": sparse, "grid": grid, "both": dt.SparseLevels(sparse=sparse, survivors=grid)}


# The first convolution has one input, which no block of four fits; it and the head stay in full precision for all.
MATCH = r"conv[2-8]\.weight$"


def rule(target: dt.Target, mechanism: dt.Mechanism | None = None) -> dt.Rule:
    """One rule for all convolutions but the first."""
    return dt.Rule(match=MATCH, target=target, mechanism=mechanism)


def recipes() -> dict[str, dt.Recipe]:
    """The recipe of every way that trains."""
    t = targets()
    return {
        "joint": dt.Recipe([rule(t["both"], admm())]),
        "staged": dt.Recipe(
            stages=[
                dt.Stage(share=0.5, rules=[rule(t["sparse"], admm())]),
                dt.Stage(share=0.5, rules=[rule(t["both"], admm())]),
            ]
        ),
        "sparse_first": dt.Recipe([rule(t["sparse"], admm())]),
        "grid_first": dt.Recipe([rule(t["grid"], admm())]),
    }


def one_seed(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy of every way: as trained, and once every weight lies in both sets."""
    bench = Bench(Settings(seed=seed), lambda label, total: lambda: None)
    decay = bench.task.decay
    dense, _ = bench.train("dense", None, decay, epochs=EPOCHS_DENSE)
    start = {name: value.detach().clone() for name, value in dense.state_dict().items()}
    both = dt.Recipe([rule(targets()["both"])])
    found: dict[str, dict[str, float]] = {"dense": {"trained": bench.accuracy(dense)}}
    for name, recipe in recipes().items():
        model, run = bench.train(name, recipe, decay, epochs=EPOCHS, start=start)
        assert run is not None
        found[name] = {"trained": bench.accuracy(model)}
        run.finalize()
        found[name]["one set"] = bench.accuracy(model)
        found[name] |= _in_both(bench, model, both)
    found["rounded"] = {"trained": found["dense"]["trained"], **_in_both(bench, dense, both)}
    return found


def _in_both(bench: Bench, model: torch.nn.Module, both: dt.Recipe) -> dict[str, float]:
    run = dt.compress(model, both)
    with run.compressed():
        accuracy = bench.accuracy(model)
    rows = run.measure()
    weights = sum(row["weights"] for row in rows)
    return {"both": accuracy, "bits": sum(row["bits_per_weight"] * row["weights"] for row in rows) / weights}


def main(
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Trains every way for every seed and writes the record."""
    torch.set_num_threads(1)
    seeds = seed or [0, 1, 2]
    with recording(
        "combination",
        question="Does ADMM onto N:M and few bits at once beat doing one after the other?",
        seeds=seeds,
        config={
            "n": N,
            "m": M,
            "bits": BITS,
            "epochs_dense": EPOCHS_DENSE,
            "epochs": EPOCHS,
            "match": MATCH,
            "names": NAMES,
        },
        notes="Test accuracy (%) on scikit-learn digits after the last epoch; nothing was selected on them. Every way "
        "starts from the same dense network of its seed, and has the same epochs, rate and ADMM settings (those of the "
        "pruning demo, found on held-out training images for pruning alone). BatchNorm is not re-estimated.",
        out=out,
    ) as results:
        by_seed: list[dict[str, Any]] = []
        for number in seeds:
            by_seed.append(one_seed(number))
            print(number, by_seed[-1])
        ways = by_seed[0]
        results["rows"] = [
            {"way": way, **{key: summarise([found[way][key] for found in by_seed]) for key in ways[way]}}
            for way in ways
        ]


if __name__ == "__main__":
    typer.run(main)
