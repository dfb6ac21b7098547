"""What PSG costs: time of a training step and of an optimizer step alone, and memory, beside the plain optimizer.

    python -m benchmarks.step_cost

Plain and PSG take turns in blocks of a few steps within one run, so that a busy machine slows both alike; what counts
is the median of the ratios of neighbouring blocks.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from papers.models import resnet32

Form = Literal["gradient", "update"]
FORMS: tuple[Form, ...] = ("gradient", "update")
BATCH = 128
MATRICES = (10, 1536, 2048)  # 31.5 million weights
FIT_EVERY = 100  # PSG's default
OPTIMIZERS = ("SGD foreach", "AdamW foreach", "AdamW fused")


@dataclass(kw_only=True)
class Arm:
    """One of the rivals: `step` is timed, `prepare` before each step is not."""

    name: str
    step: Callable[[], None]
    prepare: Callable[[], None] = lambda: None


def take_turns(arms: Sequence[Arm], blocks: int, block: int, warmup: int) -> dict[str, Any]:
    """Seconds a step of every arm (median over blocks), and the ratios to the first arm over neighbouring blocks."""
    wall: dict[str, list[float]] = {arm.name: [] for arm in arms}
    cpu: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for i in range(-warmup, blocks):
        # Every arm leads equally often: what follows another arm finds its caches.
        order = [*arms[i % len(arms) :], *arms[: i % len(arms)]]
        for arm in order:
            wall_seconds = cpu_seconds = 0.0
            for _ in range(block):
                arm.prepare()
                wall_start, cpu_start = time.perf_counter(), time.process_time()
                arm.step()
                wall_seconds += time.perf_counter() - wall_start
                cpu_seconds += time.process_time() - cpu_start
            if i >= 0:
                wall[arm.name].append(wall_seconds / block)
                cpu[arm.name].append(cpu_seconds / block)
    base = arms[0].name
    found: dict[str, Any] = {}
    for arm in arms:
        ratios = [x / y for x, y in zip(wall[arm.name], wall[base], strict=True)]
        work = [x / y for x, y in zip(cpu[arm.name], cpu[base], strict=True)]
        found[arm.name] = {
            "seconds": statistics.median(wall[arm.name]),
            "cpu_seconds": statistics.median(cpu[arm.name]),
            "ratio": _spread(ratios),
            "cpu_ratio": _spread(work),
        }
    return found


def _spread(values: list[float]) -> dict[str, float | int]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "quartile_1": low, "quartile_3": high, "n": len(values)}


# --- a training step --------------------------------------------------------------------------------------------


def training_arm(name: str, recipe: dt.Recipe | None, seed: int) -> Arm:
    """A step of ResNet-32 on random images: forward, backward, SGD with momentum."""
    torch.manual_seed(seed)
    model = resnet32().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    if recipe is not None:
        dt.attach(model, optimizer, recipe, total_steps=100_000)
    inputs = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(100, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return Arm(name=name, step=step)


def training_recipe(form: Form, fit: bool) -> dt.Recipe:
    """The psg-w4 preset, its grids held from the start or fitted in every step; weights are clipped from the start."""
    mechanism = dt.PSG(form=form, clip_start=0)
    until = 1.0 if fit else 0

    def rule(match: str, bits: int) -> dt.Rule:
        return dt.Rule(match=match, target=dt.Uniform(bits=bits), mechanism=mechanism, fit_every=1, fit_until=until)

    return dt.Recipe([rule("@first", 8), rule("@last", 8), rule("weight$", 4)])


def training_row(blocks: int, block: int, seed: int) -> dict[str, Any]:
    """Plain, both forms, and a fit in every step (what a default run pays every 100 steps, for 30 % of it)."""
    arms = [
        training_arm("plain", None, seed),
        training_arm("gradient", training_recipe("gradient", fit=False), seed),
        training_arm("update", training_recipe("update", fit=False), seed),
        training_arm("gradient, fit each step", training_recipe("gradient", fit=True), seed),
    ]
    found = take_turns(arms, blocks, block, warmup=1)
    peaks = {arm.name: peak_passing_bytes(arm.step) for arm in arms}
    return {"arms": found, "fit_every": FIT_EVERY, "peak_bytes": peaks}


# --- an optimizer step alone ------------------------------------------------------------------------------------


class Matrices(nn.Module):
    """Weights of a small language model's linear layers."""

    def __init__(self, shape: tuple[int, int, int], seed: int) -> None:
        super().__init__()
        count, rows, columns = shape
        noise = torch.Generator().manual_seed(seed)
        self.w = nn.ParameterList(
            [nn.Parameter(0.02 * torch.randn(rows, columns, generator=noise)) for _ in range(count)]
        )


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """A rate so small that the weights, and with them the work, stay what they are."""
    if name == "SGD foreach":
        return torch.optim.SGD(model.parameters(), lr=1e-7, momentum=0.9, weight_decay=1e-4, foreach=True)
    fused = name == "AdamW fused"
    return torch.optim.AdamW(model.parameters(), lr=1e-7, weight_decay=1e-2, fused=fused, foreach=not fused)


def optimizer_arm(name: str, optimizer: str, form: Form | None, shape: tuple[int, int, int], seed: int) -> Arm:
    """An optimizer step on given gradients, which PSG scales in place and which are therefore copied in anew."""
    model = Matrices(shape, seed)
    opt = make_optimizer(optimizer, model)
    if form is not None:
        mechanism = dt.PSG(form=form, clip_start=0)
        rule = dt.Rule(match=".", include=".", target=dt.Uniform(bits=4), mechanism=mechanism, fit_until=0)
        dt.attach(model, opt, dt.Recipe([rule]), total_steps=100_000)
    torch.manual_seed(seed)
    given = [1e-3 * torch.randn_like(p) for p in model.w]
    for p in model.w:
        p.grad = torch.empty_like(p)

    def prepare() -> None:
        for p, g in zip(model.w, given, strict=True):
            assert p.grad is not None
            p.grad.copy_(g)

    return Arm(name=name, step=lambda: _step(opt), prepare=prepare)


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def optimizer_rows(blocks: int, block: int, shape: tuple[int, int, int], seed: int) -> list[dict[str, Any]]:
    """Time and memory of every optimizer with every form."""
    rows = []
    for optimizer in OPTIMIZERS:
        arms = [optimizer_arm("plain", optimizer, None, shape, seed)]
        arms += [optimizer_arm(form, optimizer, form, shape, seed) for form in FORMS]
        found = take_turns(arms, blocks, block, warmup=1)
        del arms
        gc.collect()
        rivals: list[tuple[str, Form | None]] = [("plain", None), ("gradient", "gradient"), ("update", "update")]
        memory = {name: memory_of(optimizer, form, shape, seed) for name, form in rivals}
        weights = shape[0] * shape[1] * shape[2]
        rows.append({"optimizer": optimizer, "weights": weights, "arms": found, "memory": memory})
        print(optimizer, {k: round(v["ratio"]["median"], 2) for k, v in found.items()}, memory)
    return rows


# --- memory -----------------------------------------------------------------------------------------------------


def held_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        # Not isinstance: that would ask lazy modules for their __class__. Fake and sparse tensors (left behind by
        # compiled or other tests of one process) have no storage to count.
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_passing_bytes(step: Callable[[], None]) -> int:
    """Most bytes allocated at once during a step, over what was there before it (torch's own account)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, now)
    return peak


def memory_of(optimizer: str, form: Form | None, shape: tuple[int, int, int], seed: int) -> dict[str, float]:
    """Bytes a weight kept between steps (weights, gradients, optimizer state, PSG), and passing within a step."""
    before = held_bytes()
    arm = optimizer_arm("memory", optimizer, form, shape, seed)
    for _ in range(2):
        arm.prepare()
        arm.step()
    weights = shape[0] * shape[1] * shape[2]
    kept = (held_bytes() - before) / weights
    arm.prepare()
    return {"kept_bytes_per_weight": kept, "passing_bytes_per_weight": peak_passing_bytes(arm.step) / weights}


def main(
    blocks: Annotated[int, typer.Option(min=1, help="blocks an arm")] = 15,
    block: Annotated[int, typer.Option(min=1, help="steps a block")] = 2,
    count: Annotated[int, typer.Option(min=1, help="matrices of 3.1 million weights each")] = MATRICES[0],
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Times everything and writes the record."""
    torch.set_num_threads(threads)
    shape = (count, *MATRICES[1:])
    load = os.getloadavg()[0]
    busy = f" The machine was busy (load average {load:.1f} on {os.cpu_count()} cores)." if load > 1 else ""
    with recording(
        "step_cost",
        question="What does PSG cost beside the plain optimizer, in a training step and in an optimizer step alone?",
        seeds=[seed],
        config={
            "training": "ResNet-32, CIFAR-sized random images, batch 128, fp32, channels_last, SGD momentum 0.9",
            "batch": BATCH,
            "matrices": list(shape),
            "blocks": blocks,
            "steps_a_block": block,
            "threads": threads,
            "recipe": "psg-w4; weights clipped from the start; grids held, except where a fit is asked for",
        },
        notes=f"Ratios of neighbouring blocks of wall time; CPU time beside them.{busy}",
        out=out,
    ) as results:
        results["training"] = training_row(blocks, block, seed)
        for name, arm in results["training"]["arms"].items():
            print(name, round(arm["ratio"]["median"], 3), round(arm["seconds"], 4))
        gc.collect()
        results["optimizer"] = optimizer_rows(blocks, block, shape, seed)


if __name__ == "__main__":
    typer.run(main)
