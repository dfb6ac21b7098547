"""What training towards a target needs beside plain training: memory kept, and passing at attach and in a step.

    python -m benchmarks.training_memory

Each system trains in a process of its own (Linux). What the process holds is read from the kernel, so copies made by
NumPy count too. The C library is told to give large blocks back at once: as it comes, it keeps many of those freed,
and a process then looks several times as large as what it uses.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import detent as dt
from benchmarks import recording
from detent.report.record import process_peak

LAYERS, WIDTH = 16, 256  # 9.4 million weights of 3x3 convolutions
STEPS = 12
EVERY = 3  # steps between fits, or updates of z and u
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}


def rules() -> dict[str, dt.Rule | None]:
    """The systems, all weights of convolutions claimed."""
    model, tensor = dt.TopK(keep=0.1, scope="model"), dt.TopK(keep=0.1)
    grid, signs = dt.Uniform(bits=4), dt.Binary()
    # Few rounds: memory does not hang on how many.
    kernels = dt.KernelCodebook(size=256, book="global", restarts=1, iterations=2)
    admm = dt.ADMM(every=EVERY, until=3 * EVERY)

    def rule(target: dt.Target, mechanism: dt.Mechanism, fit_every: int | None = None) -> dt.Rule:
        return dt.Rule(match="weight$", target=target, mechanism=mechanism, fit_every=fit_every)

    return {
        "plain": None,
        "PSG, 4 bits": rule(grid, dt.PSG(gain=8.0), EVERY),
        "straight-through, 4 bits": rule(grid, dt.STE()),
        "mirror descent, binary": rule(signs, dt.MirrorDescent()),
        "ADMM, 10 % of each tensor": rule(tensor, admm),
        "ADMM, 10 % of the model": rule(model, admm),
        "ADMM, 10 % of the model, Fisher": rule(model, replace(admm, metric="fisher")),
        "codebook learning, one codebook": rule(kernels, dt.CodebookLearning()),
        "straight-through, one codebook": rule(kernels, dt.STE(), EVERY),
    }


def held() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget() -> None:
    """Let `process_peak` count from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(name: str) -> dict[str, float]:
    """One system in this process: multiples of the bytes of the model."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(LAYERS)))
    x = torch.randn(1, WIDTH, 4, 4)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    step()
    step()
    gc.collect()
    before = held()
    forget()
    rule = rules()[name]
    if rule is not None:
        dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=STEPS)
    gc.collect()
    found = {"attach": process_peak() - before, "kept": 0.0, "step": 0.0}
    for _ in range(STEPS):
        forget()
        step()
        found["step"] = max(found["step"], process_peak() - before)
        found["kept"] = max(found["kept"], held() - before)
    return {key: value / size for key, value in found.items()}


def main(
    only: Annotated[str | None, typer.Option(help="measure one system here and print it")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Measures every system in a process of its own and writes the record."""
    if only is not None:
        print(json.dumps(measure(only)))
        return
    torch.set_num_threads(1)  # as in the processes that are measured: the record tells the threads of this one
    with recording(
        "training_memory",
        question="How much memory does training towards a target need beside plain training?",
        seeds=[0],
        config={
            "layers": LAYERS,
            "width": WIDTH,
            "steps": STEPS,
            "every": EVERY,
            "optimizer": "SGD",
            "malloc": GIVE_BACK,
        },
        notes="Multiples of the bytes of the model (float32), beyond plain training with its gradients. Kept: the most "
        "held between steps. attach and step: the most held at any moment of them, what is kept included.",
        out=out,
    ) as results:
        for name in rules():
            command = [sys.executable, "-m", "benchmarks.training_memory", "--only", name]
            done = subprocess.run(command, env=os.environ | GIVE_BACK, check=True, capture_output=True, text=True)
            results[name] = json.loads(done.stdout)
            print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)


if __name__ == "__main__":
    typer.run(main)
