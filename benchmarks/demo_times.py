"""How long `detent demo` takes with each method, on the digits that scikit-learn carries.

    python -m benchmarks.demo_times

Each runs once in a process of its own, imports included, as a user would run it; installation is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import ROOT, recording

METHODS = ("psg", "admm", "md", "kq", "budget")
START = "from detent.cli import app; app()"


def main(
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Runs the four demos and writes the record."""
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(threads)}
    with recording(
        "demo_times",
        question="How long does each demo take?",
        seeds=[0],
        config={"methods": list(METHODS), "threads": threads},
        notes="Wall time of one run each, from the command to the prompt.",
        out=out,
    ) as results:
        for method in METHODS:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", START, "demo", "--method", method, "--out", folder]
                start = time.perf_counter()
                subprocess.run(command, check=True, env=surroundings, stdout=subprocess.DEVNULL)
                results[method] = {
                    "seconds": time.perf_counter() - start,
                    "files": sorted(path.name for path in Path(folder).iterdir()),
                }


if __name__ == "__main__":
    typer.run(main)
