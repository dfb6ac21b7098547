"""What is the same algorithm under two names: copies and one latent, primal and dual, hard limits and STE, torchao.

python -m benchmarks.md_equalities [--torchao FOLDER]
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import ROOT, recording

sys.path.insert(0, str(ROOT / "tests"))  # the slow references are no package
import reference

STEPS = 1000
HARD_STEPS = 200  # bit for bit or not shows soon
SHAPE = (8, 6)
LR = 0.01
SCALE, INTERVAL = 1.02, 2
CAP, STABLE_CAP = 1e4, 50.0  # the second: beta * lr < 1, so that a closed loop damps errors
FREE = dt.Binary(scale=None)
Gradient = Callable[[int, np.ndarray], np.ndarray]


class Weights(nn.Module):
    """A bare weight."""

    def __init__(self, w: np.ndarray, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(w, dtype=dtype))  # a copy: it is trained in place


def problem(seed: int, closed: bool = True) -> tuple[np.ndarray, Gradient]:
    """Starting weights, and the gradient of a quadratic whose minimum wanders; if not `closed`, its wandering alone."""
    numbers = np.random.default_rng(seed)
    w0, centre, phase = (numbers.normal(size=SHAPE) for _ in range(3))

    def gradient(t: int, w: np.ndarray) -> np.ndarray:
        return w * closed - 0.5 * centre - np.sin(0.05 * t + 6 * phase)

    return 0.5 * w0, gradient


def optimizer_of(name: str, params: Any) -> torch.optim.Optimizer:
    """SGD, or Adam as published."""
    return torch.optim.SGD(params, lr=LR) if name == "SGD" else torch.optim.Adam(params, lr=LR)


def reference_of(name: str) -> reference.SGD | reference.Adam:
    """The same, slow."""
    return reference.SGD(LR) if name == "SGD" else reference.Adam(LR)


def follow(
    w0: np.ndarray,
    gradient: Gradient,
    optimizer: str,
    target: dt.Target,
    mechanism: dt.Mechanism,
    steps: int,
    *,
    dtype: torch.dtype = torch.float64,
    fit_until: int | None = None,
    latents: list[Tensor] | None = None,
) -> list[Tensor]:
    """What the forward pass sees, from the first step to after the last."""
    model = Weights(w0, dtype)
    opt = optimizer_of(optimizer, model.parameters())
    rule = dt.Rule(match="weight", target=target, mechanism=mechanism, fit_until=fit_until)
    run = dt.attach(model, opt, dt.Recipe([rule]), total_steps=steps)
    seen = [model.weight.detach().clone()]
    for t in range(steps):
        model.weight.grad = torch.from_numpy(gradient(t, seen[-1].double().numpy())).to(dtype)
        opt.step()
        seen.append(model.weight.detach().clone())
        if latents is not None:
            saved = run.state_dict()["weights"]["weight"]
            latents.append(torch.cat([saved["state"]["latent"].reshape(-1), saved["params"]["scale"].reshape(-1)]))
    return seen


def gap(a: Sequence[Tensor], b: Sequence[Any]) -> float:
    """Largest difference of two paths."""
    return max(float((x.double() - torch.as_tensor(y).double()).abs().max()) for x, y in zip(a, b, strict=True))


def copies(optimizer: str, seed: int, steps: int, closed: bool = False) -> float:
    """The published softmax, one copy a level, against one latent through the tanh."""
    w0, gradient = problem(seed, closed)
    cap = STABLE_CAP if closed else CAP
    growth = dt.Growth(factor=SCALE, every=INTERVAL, last=cap)
    ours = follow(w0, gradient, optimizer, FREE, dt.MirrorDescent(map="tanh", beta=growth), steps)
    betas = reference.beta_by_loop(steps, SCALE, INTERVAL, cap)
    two = [reference_of(optimizer) for _ in range(2)]
    published = reference.softmax_copies(w0, gradient, steps=steps, betas=betas, optimizers=two)
    return gap(ours[:-1], published)


def maps(optimizer: str, seed: int, steps: int) -> float:
    """Our two maps on two levels."""
    w0, gradient = problem(seed)
    growth = dt.Growth(factor=SCALE, every=INTERVAL, last=CAP)
    paths = [
        follow(w0, gradient, optimizer, FREE, dt.MirrorDescent(map=name, beta=growth), steps)
        for name in ("tanh", "softmax")
    ]
    return gap(*paths)


def forms(optimizer: str, seed: int, steps: int) -> float:
    """Primal against dual at constant beta."""
    w0, gradient = problem(seed)
    primal = follow(w0, gradient, optimizer, FREE, dt.MirrorDescent(form="primal", beta=1.0), steps)
    dual = follow(w0, gradient, optimizer, FREE, dt.MirrorDescent(form="dual", beta=1.0), steps)
    return gap(primal, dual)


def annealed_forms(optimizer: str, seed: int, steps: int) -> float:
    """The same with beta growing: these part, which shows that the comparison can fail."""
    w0, gradient = problem(seed)
    growth = dt.Growth(factor=SCALE, every=INTERVAL, last=CAP)
    primal = follow(w0, gradient, optimizer, FREE, dt.MirrorDescent(form="primal", beta=growth), steps)
    dual = follow(w0, gradient, optimizer, FREE, dt.MirrorDescent(beta=growth), steps)
    return gap(primal, dual)


HARD: dict[str, dt.Mechanism] = {
    "mirror descent, hard from the start": dt.MirrorDescent(hard_start=0),
    "mirror descent, beta 1e35": dt.MirrorDescent(beta=1e35),
    "PARQ, inverse slope 0": dt.PARQ(inverse_slope=0.0),
    "BinaryRelax, hard from the start": dt.BinaryRelax(hard_start=0),
    "mirror descent, beta 1 (must differ)": dt.MirrorDescent(beta=1.0),
}
HARD_TARGETS: dict[str, dt.Target] = {
    "Binary without scale": FREE,
    "Ternary without scale": dt.Ternary(scale=None),
    "Uniform, 3 bits": dt.Uniform(bits=3, range="minmax"),
}


def hard_limits(seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Of the weights seen over a whole path, how many differ in any bit from those of STE."""
    rows = []
    for place, target in HARD_TARGETS.items():
        for name, mechanism in HARD.items():
            for optimizer in ("SGD", "Adam"):
                differing = total = 0
                for dtype in (torch.float32, torch.float64):
                    for seed in seeds:
                        w0, gradient = problem(seed)
                        ste = follow(w0, gradient, optimizer, target, dt.STE(), steps, dtype=dtype)
                        own = follow(w0, gradient, optimizer, target, mechanism, steps, dtype=dtype)
                        a, b = (torch.stack(path) for path in (ste, own))
                        bits = torch.int32 if dtype == torch.float32 else torch.int64
                        differing += int((a.view(bits) != b.view(bits)).sum())
                        total += a.numel()
                row = {"target": place, "mechanism": name, "optimizer": optimizer, "weights": total}
                rows.append(row | {"differing": differing})
    return rows


def against_torchao(folder: Path, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """What STE shows on a grid against torchao's fake quantization of the same latents with the same scale."""
    sys.path.insert(0, str(folder))
    torchao: Any = importlib.import_module("torchao")  # not among our dependencies: it comes from `folder`
    fake_quantize: Any = importlib.import_module("torchao.quantization.quant_primitives")._fake_quantize_affine

    rows = []
    for bits in (2, 3, 4, 8):
        n = reference.most(bits)
        differing = total = ties = 0
        for seed in seeds:
            w0, gradient = problem(seed)
            kept: list[Tensor] = []
            target = dt.Uniform(bits=bits)
            seen = follow(w0, gradient, "Adam", target, dt.STE(), steps, dtype=torch.float32, fit_until=0, latents=kept)
            for shown, state in zip(seen[1:], kept, strict=True):
                latent, scale = state[:-1].reshape(SHAPE), state[-1:]
                theirs = fake_quantize(
                    latent, SHAPE, scale, torch.zeros(1, dtype=torch.int32), torch.int8, quant_min=-n, quant_max=n
                )
                wrong = theirs != shown
                # torchao multiplies by 1 / scale where we divide: at a tie the last bit of the quotient decides.
                near_tie = ((latent.double() / scale.double()) % 1 - 0.5).abs() < 1e-5
                differing, total = differing + int(wrong.sum()), total + wrong.numel()
                ties += int((wrong & near_tie).sum())
        rows.append({"bits": bits, "weights": total, "differing": differing, "of_these_at_a_tie": ties})
    return {"version": torchao.__version__, "rows": rows}


def main(
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    torchao: Annotated[
        Path | None, typer.Option(help="folder of an unpacked torchao wheel; left out if absent")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Measures every equality and writes the record."""
    torch.set_num_threads(1)
    seeds = seed or [0, 1, 2]
    beta = {"factor": SCALE, "every": INTERVAL, "last": CAP}
    with recording(
        "md_equalities",
        question="Which methods of mirror descent's family are the same algorithm, and to how many digits?",
        seeds=seeds,
        config={"steps": steps, "shape": SHAPE, "lr": LR, "beta": beta, "hard_steps": HARD_STEPS, "threads": 1},
        notes="Paths of weights in float64. Closed loop: the gradient depends on the weights seen. At a beta far above "
        "1 / lr a closed loop multiplies the rounding of a latent by beta lr at each change of sign, so that any two "
        "correct programs part; there the gradients are given. Published forms come from tests/reference.py, which "
        "shares no code with the library. The bitwise counts are over float32 and float64 together."
        + ("" if torchao else " torchao was not at hand, so its row is left out."),
        out=out,
    ) as results:
        pairs = {
            f"published softmax with two copies = tanh on one latent, beta to {CAP:g}, given gradients": copies,
            f"the same, beta to {STABLE_CAP:g}, closed loop": lambda o, s, n: copies(o, s, n, closed=True),
            f"softmax map = tanh map, beta to {CAP:g}, closed loop": maps,
            "primal = dual, beta 1, closed loop": forms,
            f"primal and dual, beta to {CAP:g}, closed loop (must differ)": annealed_forms,
        }
        results["paths"] = [
            {"pair": name, "optimizer": optimizer, "largest_gap": max(f(optimizer, s, steps) for s in seeds)}
            for name, f in pairs.items()
            for optimizer in ("SGD", "Adam")
        ]
        print(*results["paths"], sep="\n")
        results["hard_limits"] = hard_limits(seeds, min(steps, HARD_STEPS))
        print(*results["hard_limits"], sep="\n")
        if torchao is not None:
            results["torchao"] = against_torchao(torchao, seeds, min(steps, HARD_STEPS))
            print(results["torchao"])


if __name__ == "__main__":
    typer.run(main)
