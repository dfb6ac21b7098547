"""The demo, seed by seed, as a record: digits of scikit-learn, plain SGD beside PSG in every life.

python -m benchmarks.demo_psg
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import recording
from detent.demo import Settings, demonstrate


def main(
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    data: Annotated[Path | None, typer.Option(help="as in detent demo")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Runs what `detent demo` runs and writes the record."""
    seeds = seed or [0, 1, 2]
    with recording(
        "demo-psg",
        question="What does `detent demo` show: what is left of plain SGD and of PSG in every life?",
        seeds=seeds,
        config={"data": "digits" if data is None else data.name},
        notes="Accuracy on the test split after the last epoch; nothing is selected.",
        out=out,
    ) as results:
        outcomes = []
        for number in seeds:
            with tempfile.TemporaryDirectory() as folder:
                settings = Settings(data=data, out=Path(folder), seed=number)
                outcome = asdict(demonstrate(settings, lambda label, steps: lambda: None))
            del outcome["files"]
            outcomes.append(outcome)
            for row in outcome["rows"]:
                print(number, row["name"], row["range"], {k: round(c["accuracy"], 2) for k, c in row["cells"].items()})
        results["outcomes"] = outcomes


if __name__ == "__main__":
    typer.run(main)
