"""How fast files of a 100-million-weight model are written and read, and what memory reading takes.

python -m benchmarks.coding_speed
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import detent as dt
from benchmarks import ROOT, recording
from detent.report.record import process_peak

LAYERS, SIDE = 24, 2048  # 100.7 million weights
TARGETS: dict[str, dt.Target] = {
    "Uniform(bits=2)": dt.Uniform(bits=2),
    "Uniform(bits=4)": dt.Uniform(bits=4, granularity="channel"),
    "Uniform(bits=8)": dt.Uniform(bits=8, granularity="channel"),
    "TopK(5 %), 4 bits": dt.SparseLevels(sparse=dt.TopK(keep=0.05), survivors=dt.Uniform(bits=4)),
}
CODINGS = ("bitpacked", "entropy")
MEGA = 1e6


def network(layers: int) -> nn.Sequential:
    """Linear layers whose rows differ in spread, as trained ones do."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)])
    with torch.no_grad():
        for layer in model:
            spread = torch.randn(SIDE, 1).mul_(0.3).exp_()
            layer.weight.normal_(std=0.02).mul_(spread)  # pyright: ignore[reportCallIssue]
    return model


def _seconds() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def write(target: str, layers: int, folder: Path) -> dict[str, Any]:
    """In a process of its own: the codings of one target, and for comparison encoding without any file."""
    torch.set_num_threads(1)
    model = network(layers)
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=TARGETS[target])]))
    start = _seconds()
    for encode in run.encoders().values():
        encode()
    project = _seconds()[1] - start[1]
    found: dict[str, Any] = {"project_cpu_seconds": project}
    for coding in CODINGS:
        start = _seconds()
        size = dt.save(run, folder / f"{coding}.detent", life="compressed", coding=coding)
        end = _seconds()
        found[coding] = {"bytes": size, "save_seconds": end[0] - start[0], "save_cpu_seconds": end[1] - start[1]}
    return found


def read(path: Path, layers: int) -> dict[str, Any]:
    """In a process of its own: loading one file, and how much memory that adds to what the model takes."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)])
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0)  # so that its memory is there before the file's
    dt.load(path, model, "compressed")  # what is read once lies in memory, and the libraries are loaded
    before, start = process_peak(), _seconds()
    dt.load(path, model, "compressed")
    end = _seconds()
    peak = process_peak()
    loaded = 4 * sum(weight.numel() for weight in model.parameters())
    return {
        "load_seconds": end[0] - start[0],
        "load_cpu_seconds": end[1] - start[1],
        "loaded_bytes": loaded,
        "peak_process_bytes": max(before, peak),
    }


def child(*words: str) -> dict[str, Any]:
    """Run a step of this script in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.coding_speed", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def idle_bytes() -> int:
    """Memory of a process that has imported everything and holds nothing."""
    code = "import detent; from detent.report.record import process_peak; print(process_peak())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(
    step: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    layers: Annotated[int, typer.Option(help="linear layers of 2048 x 2048 weights", min=1)] = LAYERS,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Writes and reads the files and writes the record."""
    if step:
        job, *words = step
        result = write(words[0], layers, Path(words[1])) if job == "write" else read(Path(words[0]), layers)
        print(json.dumps(result))
        return
    weights = layers * SIDE * SIDE
    with recording(
        "coding_speed",
        question="How many megabytes of float32 weights a second does a core put into a file, and get out again?",
        seeds=[0],
        config={"layers": layers, "side": SIDE, "weights": weights, "targets": list(TARGETS), "threads": 1},
        notes="Megabytes are those of the float32 weights. Seconds of the processor, one thread; everything counts "
        "that dt.save and dt.load do, also checksums and the disk; coding is saving less projecting. Peak memory is "
        "that of a process that holds the model and loads a file into it; the model's own weights and an idle process "
        "are taken off.",
        out=out,
    ) as results:
        results["weights"], results["idle_bytes"], results["rows"] = weights, idle_bytes(), []
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as name:
                arm = child("write", target, name, "--layers", str(layers))
                for coding in CODINGS:
                    arm[coding] |= child("read", f"{name}/{coding}.detent", "--layers", str(layers))
                    found = arm[coding]
                    extra = found["peak_process_bytes"] - results["idle_bytes"] - found["loaded_bytes"]
                    row = {
                        "target": target,
                        "coding": coding,
                        "project_cpu_seconds": arm["project_cpu_seconds"],
                        **found,
                    }
                    coding_seconds = found["save_cpu_seconds"] - arm["project_cpu_seconds"]
                    row["save_mb_per_s"] = 4 * weights / MEGA / found["save_cpu_seconds"]
                    row["encode_mb_per_s"] = 4 * weights / MEGA / coding_seconds
                    row["load_mb_per_s"] = 4 * weights / MEGA / found["load_cpu_seconds"]
                    row["memory_of_loaded"] = extra / found["loaded_bytes"]
                    results["rows"].append(row)
                    print(row)


if __name__ == "__main__":
    typer.run(main)
