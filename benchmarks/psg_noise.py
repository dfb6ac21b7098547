"""Which form of PSG clicks under which optimizer: weights on pure noise, with no loss at all.

    python -m benchmarks.psg_noise

2,000 independent weights start uniform in +-3 cells of a held grid; each step each gets a fresh gradient from N(0, 1).
Nothing in a loss can pull them: what is left of the mean distance to the grid (0.25 cells if uniform) is PSG's doing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import PICTURES, recording
from detent.report.record import summarise

WEIGHTS = 2000
MATRIX = (40, 50)
LEVELS = 127  # of an 8-bit grid to either side: a weight that wanders stays on it
LR = 0.01
RATIOS = (0.003, 0.01, 0.03, 0.1)
MARKS = (2000, 6700, 20000)
EPS = (0.0, 0.02)
FORMS: tuple[Literal["gradient", "update"], ...] = ("gradient", "update")
OPTIMIZERS = ("SGD", "SGD momentum 0.9", "AdamW", "Lion", "Muon")
# How the notes' toy (design, reference 1c.2 and 1c.4) was set up: step of the grid 1, rate 0.05, s = distance + eps.
NOTES_LR = 0.05
SAME = 0.01  # cells; two forms closer than this are called equal


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: every weight matrix has its own cell width, so the ratio lr / cell varies at one learning rate."""

    optimizer: str
    mechanism: dt.PSG | None
    lr: float
    cells: Sequence[float]
    seeds: Sequence[int]
    marks: Sequence[int]


class Weights(nn.Module):
    """Bare weights; nothing reads them but the optimizer."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(t) for t in tensors])


def make_optimizer(name: str, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Defaults, but no weight decay: decay is a pull of its own."""
    if name == "SGD":
        return torch.optim.SGD(params, lr=lr)
    if name == "SGD momentum 0.9":
        return torch.optim.SGD(params, lr=lr, momentum=0.9)
    if name == "AdamW":
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    if name == "Lion":
        # Only this benchmark needs it (pip install --no-deps lion-pytorch), so it is no dependency to be type-checked.
        return importlib.import_module("lion_pytorch").Lion(params, lr=lr, weight_decay=0.0)
    return torch.optim.Muon(params, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def start(case: Case) -> tuple[list[Tensor], list[Tensor], list[tuple[float, int]]]:
    """Weights, their cell widths, and which (cell, seed) each row or matrix belongs to.

    The first entry of each is an anchor at the end of the range: it fits the grid to the wanted cell, and is left out.
    """
    keys = [(cell, seed) for cell in case.cells for seed in case.seeds]
    rows = []
    for cell, seed in keys:
        w = (torch.rand(WEIGHTS, generator=torch.Generator().manual_seed(seed)) * 6 - 3) * cell
        rows.append(torch.cat([torch.tensor([LEVELS * cell]), w[1:]]))
    cells = [torch.tensor(cell) for cell, _ in keys]
    if case.optimizer == "Muon":
        return [row.reshape(MATRIX) for row in rows], cells, keys
    return [torch.stack(rows)], [torch.stack(cells).unsqueeze(1)], keys


def distances(weights: Sequence[Tensor], cells: Sequence[Tensor]) -> tuple[list[float], float]:
    """Mean distance in cells, one a row, of the weights still on the grid; largest share of weights that left it."""
    found: list[float] = []
    outside = 0.0
    for w, cell in zip(weights, cells, strict=True):
        x = (w.detach().double() / cell).reshape(cell.numel(), -1)[:, 1:]
        inside = x.abs() <= LEVELS + 0.5
        found += (((x - x.round()).abs() * inside).sum(dim=1) / inside.sum(dim=1)).tolist()
        outside = max(outside, 1 - float(inside.double().mean(dim=1).min()))
    return found, outside


def simulate(case: Case) -> dict[str, Any]:
    """Distances by cell and mark, over seeds."""
    tensors, cells, keys = start(case)
    model = Weights(tensors)
    params = list(model.w)
    optimizer = make_optimizer(case.optimizer, params, case.lr)
    if case.mechanism is not None:
        one_scale_a_row = "tensor" if case.optimizer == "Muon" else "channel"
        target = dt.Uniform(bits=8, range="minmax", granularity=one_scale_a_row)
        rule = dt.Rule(match=".", include=".", target=target, mechanism=case.mechanism, fit_until=0)
        dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=max(case.marks), nonfinite="ignore")
    noise = torch.Generator().manual_seed(1000 + case.seeds[0])
    for p in params:
        p.grad = torch.empty_like(p)
    by_mark: dict[int, list[float]] = {}
    outside = 0.0
    for step in range(1, max(case.marks) + 1):
        for p in params:
            assert p.grad is not None
            p.grad.normal_(generator=noise)
        optimizer.step()
        if step in case.marks:
            by_mark[step], share = distances(params, cells)
            outside = max(outside, share)
    ratios: dict[str, Any] = {}
    for cell in case.cells:
        mine = [i for i, key in enumerate(keys) if key[0] == cell]
        name = f"{case.lr / cell:.4g}"
        ratios[name] = {str(step): summarise([values[i] for i in mine]) for step, values in by_mark.items()}
    return {"ratios": ratios, "outside": outside}


def sweep(seeds: Sequence[int], steps: Callable[[str], int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every optimizer, form and eps, over all ratios; and each optimizer without PSG."""
    cells = [LR / ratio for ratio in RATIOS]
    rows = []
    for name in OPTIMIZERS:
        marks = [m for m in MARKS if m <= steps(name)] or [steps(name)]
        runs: list[tuple[str, float | None]] = [(form, eps) for form in FORMS for eps in EPS]
        for form, eps in runs if name == "Muon" else [*runs, ("none", None)]:
            mechanism = None
            if eps is not None:
                mechanism = dt.PSG(gain=1.0, eps=eps, clip=False, form="update" if form == "update" else "gradient")
            case = Case(optimizer=name, mechanism=mechanism, lr=LR, cells=cells, seeds=seeds, marks=marks)
            row = {"optimizer": name, "form": form, "eps": eps, "steps": marks, **simulate(case)}
            say(f"{name}, {form}, eps {eps}: {_last(row)}")
            rows.append(row)
    return rows


def _last(row: dict[str, Any]) -> dict[str, float]:
    """Ratio to mean distance at the last mark."""
    mark = str(row["steps"][-1])
    return {ratio: round(found[mark]["mean"], 4) for ratio, found in row["ratios"].items()}


def by_hand(
    optimizer: str, scale: Callable[[Tensor], Tensor], update: bool, seeds: Sequence[int], steps: int
) -> Tensor:
    """Weights on a grid of step 1 after `steps` steps, written out without the library or torch's optimizers."""
    w = torch.stack([torch.rand(WEIGHTS, generator=torch.Generator().manual_seed(s)) * 6 - 3 for s in seeds])
    noise = torch.Generator().manual_seed(2000 + seeds[0])
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, steps + 1):
        s = scale((w - w.round()).abs())
        g = torch.randn(w.shape, generator=noise)
        if not update:
            g.mul_(s)
        if optimizer == "AdamW":
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            g = (m / (1 - 0.9**t)).div_((v / (1 - 0.999**t)).sqrt_().add_(1e-8))
        if update:
            g.mul_(s)
        w.sub_(g, alpha=NOTES_LR)
    return (w - w.round()).abs().mean()


def notes_check(seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """The rows of the project's notes in the paper's units, beside the numbers written there."""
    marks = [m for m in MARKS if m <= steps] or [steps]

    def psg(gain: float, eps: float, form: Literal["gradient", "update"]) -> dt.PSG:
        return dt.PSG(units="weight", gain=gain, eps=eps, clip=False, form=form)

    wanted: list[tuple[str, str, dt.PSG | None, list[float]]] = [
        ("constant scale", "SGD", None, [0.249, 0.253, 0.247]),
        ("s = d", "SGD", psg(1.0, 0.0, "gradient"), [0.051, 0.006, 0.000]),
        ("s = d + 0.02", "SGD", psg(1.0, 0.02, "gradient"), [0.058, 0.050, 0.048]),
        ("gradient times d", "AdamW", psg(1.0, 0.0, "gradient"), [0.034, 0.034, 0.031]),
        ("update times 4 d", "AdamW", psg(4.0, 0.0, "update"), [0.033, 0.016, 0.004]),
    ]
    rows = []
    for name, optimizer, mechanism, noted in wanted:
        case = Case(optimizer=optimizer, mechanism=mechanism, lr=NOTES_LR, cells=[1.0], seeds=seeds, marks=marks)
        (found,) = simulate(case)["ratios"].values()
        row = {"name": name, "optimizer": optimizer, "noted": noted[: len(marks)], "found": found}
        if mechanism is not None:
            gain, eps = float(mechanism.gain), float(mechanism.eps)  # type: ignore[arg-type]
            update = mechanism.form == "update"
            hand = by_hand(optimizer, lambda d, g=gain, e=eps: g * (d + e), update, seeds, marks[-1])
            row["by_hand"] = [float(hand)]
        rows.append(row)
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `form="auto"` should be, counted: which form ends closer to the grid, over all ratios and eps."""
    counts: dict[str, dict[str, int]] = {}
    for name in OPTIMIZERS:
        won = {"gradient": 0, "update": 0, "equal": 0}
        for eps in EPS:
            g, u = (
                next(_last(r) for r in rows if (r["optimizer"], r["form"], r["eps"]) == (name, form, eps))
                for form in FORMS
            )
            for ratio in g:
                gap = g[ratio] - u[ratio]
                won["equal" if abs(gap) < SAME else ("update" if gap > 0 else "gradient")] += 1
        counts[name] = won
    return {"closer": counts, "equal_within_cells": SAME}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Distance over lr / cell, one panel an optimizer, one line of panels an eps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    looks = {
        "gradient": {"color": "#0b5394", "linestyle": "-", "marker": "o"},
        "update": {"color": "#b45f06", "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
    }
    figure, axes = plt.subplots(
        len(EPS), len(OPTIMIZERS), figsize=(13, 5.6), sharex=True, sharey=True, layout="constrained"
    )
    for i, eps in enumerate(EPS):
        for j, name in enumerate(OPTIMIZERS):
            panel = axes[i][j]
            steps = next(row["steps"][-1] for row in rows if row["optimizer"] == name)
            panel.axhline(0.25, color="0.45", linewidth=1, linestyle=":")
            for row in rows:
                if (row["optimizer"], row["eps"]) != (name, eps):
                    continue
                mark = str(row["steps"][-1])
                x = [float(ratio) for ratio in row["ratios"]]
                y = [found[mark]["mean"] for found in row["ratios"].values()]
                e = [found[mark]["std"] or 0.0 for found in row["ratios"].values()]
                panel.errorbar(x, y, yerr=e, label=f"{row['form']} form", markersize=6, capsize=2, **looks[row["form"]])
            panel.set_xscale("log")
            panel.set_xticks(RATIOS, [f"{r:g}" for r in RATIOS])
            panel.minorticks_off()
            panel.set_ylim(-0.012, 0.285)
            panel.grid(axis="y", color="0.9")
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
            if i == 0:
                panel.set_title(f"{name}\n{steps:,} steps", fontsize=11)
            if i == len(EPS) - 1:
                panel.set_xlabel("learning rate / cell")
        axes[i][0].set_ylabel(f"eps = {eps:g}")
        axes[i][0].text(RATIOS[-1], 0.256, "uniform", color="0.35", fontsize=9, ha="right")
    axes[0][0].legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 0.28))
    figure.supylabel("mean distance to the grid (cells)", fontsize=11)
    figure.suptitle("PSG on pure noise, mean factor 1: the lower, the more weights have clicked", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 20000,
    muon_steps: Annotated[int, typer.Option(min=1, help="the same for Muon, whose steps are slow")] = 20000,
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file; draws no picture")] = None,
) -> None:
    """Runs the sweep and writes record and picture."""
    torch.set_num_threads(1)
    seeds = seed or [0, 1, 2]
    config = {
        "weights": WEIGHTS,
        "start_cells": 3,
        "noise": "N(0, 1), fresh each step",
        "lr": LR,
        "ratios": list(RATIOS),
        "eps": list(EPS),
        "gain": 1.0,
        "optimizers": list(OPTIMIZERS),
        "muon": {"shape": list(MATRIX), "adjust_lr_fn": "match_rms_adamw"},
        "lion_pytorch": importlib.metadata.version("lion-pytorch"),
        "steps": steps,
        "muon_steps": muon_steps,
        "threads": 1,
    }
    with recording(
        "psg_noise",
        question="Which form of PSG, scaling the gradient or the update, lets weights click under which optimizer?",
        seeds=seeds,
        config=config,
        notes="Pure noise, no loss: it says whether weights click, not whether a network is better for it. Weights "
        "that wander off the 8-bit grid (the share is `outside`) are left out of the mean.",
        out=out,
    ) as results:
        results["check"] = notes_check(seeds, steps)
        for row in results["check"]:
            print(row["name"], [round(f["mean"], 4) for f in row["found"].values()], "noted", row["noted"])
        results["rows"] = sweep(seeds, lambda name: muon_steps if name == "Muon" else steps, print)
        results["verdict"] = verdict(results["rows"])
        print(results["verdict"])
    if out is None:
        draw(results["rows"], PICTURES / "psg_noise.png")


if __name__ == "__main__":
    typer.run(main)
