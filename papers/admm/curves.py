"""Draws accuracy and distance to the target by epoch, for the rivals of `papers.admm.lenet --rivals --holdout N`.

python -m papers.admm.curves [--records benchmarks/records] [--holdout 5000] [--out docs/pictures/admm-rivals.png]
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import PICTURES, RECORDS
from detent.demo import pyplot
from papers.admm.lenet import KINDS, RIVALS

TICKS = (10, 50, 80, 90, 95, 98, 99)


def curves(record: dict[str, Any]) -> dict[str, list[float]]:
    """By epoch, of the first seed: accuracies of both lives on held-out images, and |w - q| / |w|, RMS over layers."""
    lives: dict[str, list[float]] = {"full": [], "compressed": [], "distance": []}
    for row in record["results"]["seeds"][0]["history"]:
        seen = row["held_out"]
        lives["full"].append(seen["full"]["accuracy"])
        lives["compressed"].append(seen["compressed"]["recipe"]["data_free"]["accuracy"])
        errors = [part["error"] for part in row["weights"].values()]
        lives["distance"].append(math.sqrt(sum(errors) / len(errors)))
    return lives


def main(
    records: Annotated[Path, typer.Option(help="folder of the records")] = RECORDS,
    holdout: Annotated[int, typer.Option(help="images that were held out")] = 5000,
    out: Annotated[Path, typer.Option(help="the picture")] = PICTURES / "admm-rivals.png",
) -> None:
    """Reads the record of every rival that has one and writes the picture.

    Raises:
        typer.BadParameter: no such record.
    """
    found = {}
    for rival in RIVALS:
        path = records / f"admm-lenet-{rival}-holdout{holdout}.json"
        if path.exists():
            found[KINDS[rival.rstrip("0123456789")][0]] = curves(json.loads(path.read_text(encoding="utf-8")))
    if not found:
        raise typer.BadParameter(f"--records {records}: no record admm-lenet-*-holdout{holdout} there")
    plt = pyplot()
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9.6, 8.2), dpi=110, sharex=True, layout="constrained")
    for number, (name, lives) in enumerate(found.items()):
        epochs = range(1, len(lives["full"]) + 1)
        wrong = {life: [max(100 - accuracy, 0.01) for accuracy in lives[life]] for life in ("compressed", "full")}
        top.plot(epochs, wrong["compressed"], color=f"C{number}", label=name)
        top.plot(epochs, wrong["full"], color=f"C{number}", linestyle=":", linewidth=1)
        # a weight that lies in its target has distance 0, which a logarithm cannot show
        bottom.plot(epochs, [max(d, 1e-4) for d in lives["distance"]], color=f"C{number}")
    # Errors on a logarithm, upside down: rivals that end at 11 and at 99.2 % are in one picture.
    top.set_yscale("log")
    top.set_ylim(95, 0.6)
    top.set_yticks([100 - accuracy for accuracy in TICKS], [f"{accuracy:g}" for accuracy in TICKS])
    top.yaxis.set_minor_locator(plt.NullLocator())
    top.grid(axis="y", linewidth=0.3)
    top.set_ylabel("held-out accuracy, %\n(compressed; dotted: full)")
    figure.legend(fontsize=8, ncols=2, loc="outside upper center")
    bottom.set_yscale("log")
    bottom.set_ylabel("|w - q| / |w|, root mean square\nover layers (1e-4: in the target)")
    bottom.set_xlabel("epoch")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
