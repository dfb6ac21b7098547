"""What a mechanism costs: a whole training step, the optimizer's step alone, and memory, beside the plain optimizer.

    python -m benchmarks.step_cost [--section optimizer] [--only STE] [--peers]

Rivals take turns with the plain optimizer in blocks of a few steps within one run, so that a busy machine slows all
alike; what counts is the median of the ratios of neighbouring blocks. Rivals run in small groups, each with a plain
optimizer of its own, so that memory holds them. `--peers` times torchao, brevitas and quanto beside ours, in an
environment that has them (see `benchmarks/step_peers.py`).
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from papers.models import resnet20

GROUP = 5  # rivals that stand in memory at once
STEPS = 100  # an optimizer's step is averaged over, so that fits that are due now and then are in
MATRICES = (8, 1024, 1024)
MANY = (100, 8, 8)  # tensors of a few weights: what Python and launches cost
SECTIONS = ("llama", "resnet20", "optimizer", "small")
OPTIMIZERS = ("SGD foreach", "AdamW foreach", "AdamW fused")

_U4 = dt.Uniform(bits=4)
_TOP = dt.TopK(keep=0.1)
_NM = dt.NM(n=2, m=4)

# Every mechanism with its defaults on the targets that it is used for. Long trainings, so that each is at work and no
# schedule comes to its end while it is timed.
ARMS: dict[str, tuple[dt.Target, dt.Mechanism]] = {
    "PSG, gradient form, its own gain": (_U4, dt.PSG(form="gradient", start=0, strength=1.0)),
    "PSG, update form, its own gain": (_U4, dt.PSG(form="update", start=0, strength=1.0)),
    "PSG, gradient form": (_U4, dt.PSG(gain=8.0, form="gradient", clip_start=0)),
    "PSG, update form": (_U4, dt.PSG(gain=8.0, form="update", clip_start=0)),
    "ADMM, 4 bits": (_U4, dt.ADMM(every=1000)),
    "ADMM, TopK over the model": (dt.TopK(keep=0.1, scope="model"), dt.ADMM(every=1000)),
    "ADMM, 2:4": (_NM, dt.ADMM(every=1000)),
    "Penalty, 4 bits": (_U4, dt.Penalty(strength=1e-4)),
    "Penalty, TopK": (_TOP, dt.Penalty(strength=1e-4)),
    "Proximal, 4 bits": (_U4, dt.Proximal(strength=1e-4)),
    "Masked, TopK": (_TOP, dt.Masked()),
    "HardProjection, TopK": (_TOP, dt.HardProjection(every=1000)),
    "Clip, 4 bits": (_U4, dt.Clip()),
    "STE, 4 bits": (_U4, dt.STE()),
    "STE, 4 bits, minmax": (dt.Uniform(bits=4, range="minmax"), dt.STE()),
    "STE, 4 bits a channel": (dt.Uniform(bits=4, granularity="channel"), dt.STE()),
    "STE, 4 bits, groups of 32": (dt.Uniform(bits=4, granularity=dt.Group(size=32)), dt.STE()),
    "STE, binary": (dt.Binary(), dt.STE()),
    "STE, ternary": (dt.Ternary(), dt.STE()),
    "STE, TopK": (_TOP, dt.STE()),
    "STE, 2:4": (_NM, dt.STE()),
    "PARQ, 2 bits": (dt.Uniform(bits=2), dt.PARQ()),
    "PARQ, 4 bits": (_U4, dt.PARQ()),
    "PARQ, 4 bits a channel": (dt.Uniform(bits=4, granularity="channel"), dt.PARQ()),
    "BinaryRelax, binary": (dt.Binary(), dt.BinaryRelax()),
    "BinaryRelax, 4 bits": (_U4, dt.BinaryRelax()),
    "mirror descent, binary": (dt.Binary(), dt.MirrorDescent()),
    "mirror descent, ternary": (dt.Ternary(), dt.MirrorDescent()),
    "mirror descent, 4 bits, softmax": (_U4, dt.MirrorDescent(map="softmax")),
    "GD-tanh, binary": (dt.Binary(), dt.GDTanh()),
    "GD-tanh, ternary": (dt.Ternary(), dt.GDTanh()),
    "PMF, binary": (dt.Binary(), dt.PMF()),
    "PMF, ternary": (dt.Ternary(), dt.PMF()),
    "codebook learning, 256 x 8": (dt.VectorCodebook(block=8, size=256), dt.CodebookLearning()),
}


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
            "mean_cpu_seconds": statistics.fmean(cpu[arm.name]),
            "ratio": _spread(ratios),
            "cpu_ratio": _spread(work),
        }
    return found


def _spread(values: list[float]) -> dict[str, float | int]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "quartile_1": low, "quartile_3": high, "n": len(values)}


def recipe_of(name: str) -> dt.Recipe:
    """The arm's pair on every matrix."""
    target, mechanism = ARMS[name]
    return dt.Recipe([dt.Rule(match=r"(weight|w\.\d+)$", target=target, mechanism=mechanism)])


def groups_of(names: Iterable[str]) -> Iterator[list[str]]:
    """A few rivals at a time."""
    left = list(names)
    while left:
        yield left[:GROUP]
        left = left[GROUP:]


# --- a training step --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of a Llama-shaped decoder."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A character model of 10.6 million weights in 42 matrices."""

    def __init__(self, width: int = 384, heads: int = 6, hidden: int = 1024, layers: int = 6, vocab: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


Changed = Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]]


def llama_arm(name: str, seed: int, change: Changed | None = None) -> Arm:
    """Forward, backward and AdamW on 8 sequences of 64 characters; the matrices of the blocks are claimed."""
    torch.manual_seed(seed)
    model: nn.Module = Llama()
    if change is not None:
        model, optimizer = change(model)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    if name in ARMS:
        keep = [dt.Rule(match="^(embed|head)", keep=True)]
        dt.attach(model, optimizer, dt.Recipe([*keep, *recipe_of(name).rules]), total_steps=100_000)
    ids = torch.randint(256, (8, 65))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    return Arm(name=name, step=step)


def resnet_arm(name: str, seed: int) -> Arm:
    """Forward, backward and SGD with momentum on 128 random images; convolutions and linear layer are claimed."""
    torch.manual_seed(seed)
    model = resnet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    if name in ARMS:
        target, mechanism = ARMS[name]
        if isinstance(target, dt.VectorCodebook):
            target = dt.KernelCodebook(size=256)
        ends = [dt.Rule(match=end, keep=True) for end in ("@first", "@last")]
        rule = dt.Rule(match="weight$", target=target, mechanism=mechanism)
        dt.attach(model, optimizer, dt.Recipe([*ends, rule]), total_steps=100_000)
    inputs = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return Arm(name=name, step=step)


def training_rows(make: Callable[[str, int], Arm], names: Sequence[str], blocks: int, seed: int) -> dict[str, Any]:
    """Whole training steps of every arm."""
    rows: dict[str, Any] = {}
    for some in groups_of(names):
        gc.collect()
        arms = [make("plain", seed), *(make(name, seed) for name in some)]
        found = take_turns(arms, blocks, 1, warmup=2)
        rows |= {name: found[name] | {"plain_seconds": found["plain"]["seconds"]} for name in some}
        for name in some:
            print(f"  {name}: x {found[name]['ratio']['median']:.3f}", flush=True)
    return rows


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


def optimizer_arm(name: str, optimizer: str, shape: tuple[int, int, int], seed: int) -> tuple[Arm, float]:
    """An optimizer step on given gradients, copied in anew as some mechanisms change them; and seconds of attach."""
    model = Matrices(shape, seed)
    opt = make_optimizer(optimizer, model)
    seconds = 0.0
    if name in ARMS:
        target, mechanism = ARMS[name]
        start = time.process_time()
        rule = dt.Rule(match=".", include=".", target=target, mechanism=mechanism)
        dt.attach(model, opt, dt.Recipe([rule]), total_steps=100_000)
        seconds = time.process_time() - start
    torch.manual_seed(seed)
    given = [1e-3 * torch.randn_like(p) for p in model.w]
    for p in model.w:
        p.grad = torch.empty_like(p)

    def prepare() -> None:
        for p, g in zip(model.w, given, strict=True):
            assert p.grad is not None
            p.grad.copy_(g)

    return Arm(name=name, step=lambda: _step(opt), prepare=prepare), seconds


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def optimizer_rows(
    names: Sequence[str], optimizer: str, steps: int, shape: tuple[int, int, int], seed: int
) -> dict[str, Any]:
    """Time of every arm, also as the mean over `steps` steps with the fits that fall into them, and memory it keeps."""
    rows: dict[str, Any] = {}
    weights = shape[0] * shape[1] * shape[2]
    few = (2, *shape[1:])
    plain_kept = kept_by("plain", optimizer, few, seed)
    for some in groups_of(names):
        gc.collect()
        plain, _ = optimizer_arm("plain", optimizer, shape, seed)
        arms, attach = [plain], {}
        for name in some:
            arm, attach[name] = optimizer_arm(name, optimizer, shape, seed)
            arms.append(arm)
        found = take_turns(arms, steps, 1, warmup=2)
        added = {name: found[name]["mean_cpu_seconds"] - found["plain"]["mean_cpu_seconds"] for name in some}
        mean = {name: found[name]["mean_cpu_seconds"] / found["plain"]["mean_cpu_seconds"] for name in some}
        del arms, plain
        gc.collect()
        for name in some:
            rows[name] = found[name] | {
                "mean_ratio": mean[name],
                "added_ns_per_weight": 1e9 * added[name] / weights,
                "added_us_per_tensor": 1e6 * added[name] / shape[0],
                "attach_cpu_seconds": attach[name],
                "kept_bytes_per_weight": kept_by(name, optimizer, few, seed) - plain_kept,
            }
            ratio = rows[name]["ratio"]["median"]
            print(f"  {name}: x {ratio:.2f}, with fits x {mean[name]:.2f}", flush=True)
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


def kept_by(name: str, optimizer: str, shape: tuple[int, int, int], seed: int) -> float:
    """Bytes a weight kept between steps: weights, gradients, optimizer state, ours."""
    before = held_bytes()
    arm, _ = optimizer_arm(name, optimizer, shape, seed)
    for _ in range(2):
        arm.prepare()
        arm.step()
    return (held_bytes() - before) / (shape[0] * shape[1] * shape[2])


def passing_of(name: str, optimizer: str, shape: tuple[int, int, int], seed: int) -> float:
    """Bytes a weight that are allocated at once within a step, at most."""
    arm, _ = optimizer_arm(name, optimizer, shape, seed)
    for _ in range(2):
        arm.prepare()
        arm.step()
    arm.prepare()
    return peak_passing_bytes(arm.step) / (shape[0] * shape[1] * shape[2])


def main(
    section: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SECTIONS)}; all by default")] = None,
    only: Annotated[list[str] | None, typer.Option(help="arms whose names hold one of these words")] = None,
    peers: Annotated[bool, typer.Option(help="time peers beside ours, in a whole training step")] = False,
    blocks: Annotated[int, typer.Option(min=3, help="training steps an arm")] = 15,
    steps: Annotated[int, typer.Option(min=3, help="optimizer steps an arm")] = STEPS,
    optimizer: Annotated[str, typer.Option(help=f"of {', '.join(OPTIMIZERS)}")] = "AdamW fused",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
    name: Annotated[str, typer.Option(help="name of the record")] = "step_cost",
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Times everything and writes the record."""
    torch.set_num_threads(threads)
    wanted = section or list(SECTIONS)
    names = [n for n in ARMS if not only or any(word in n for word in only)]
    load = os.getloadavg()[0]
    busy = f" The machine was busy (load average {load:.1f} on {os.cpu_count()} cores)." if load > 1 else ""
    with recording(
        name,
        script="step_cost",
        question="What does each mechanism cost beside the plain optimizer?",
        seeds=[seed],
        config={
            "llama": "Llama-shaped model of 10.6 million weights in 42 matrices, 8 x 64 tokens, foreach AdamW",
            "resnet20": "ResNet-20, 128 random images of 32 x 32, channels_last, SGD with momentum",
            "optimizer": f"{optimizer} alone, {MATRICES[0]} matrices of {MATRICES[1]} x {MATRICES[2]}",
            "small": f"{optimizer} alone, {MANY[0]} matrices of {MANY[1]} x {MANY[2]}",
            "precision": "float32",
            "blocks": blocks,
            "steps": steps,
            "threads": threads,
        },
        notes=f"Ratios of neighbouring steps of wall time; means and seconds are CPU time.{busy}",
        out=out,
    ) as results:
        if "llama" in wanted:
            results["llama"] = training_rows(llama_arm, names, blocks, seed)
        if peers:
            from benchmarks import step_peers

            results["peers"], results["versions"] = step_peers.rows(blocks, seed)
        if "resnet20" in wanted:
            results["resnet20"] = training_rows(resnet_arm, names, blocks, seed)
        if "optimizer" in wanted:
            results["optimizer"] = optimizer_rows(names, optimizer, steps, MATRICES, seed)
        if "small" in wanted:
            results["small"] = optimizer_rows(names, optimizer, steps, MANY, seed)


if __name__ == "__main__":
    typer.run(main)
