"""ADMM where the optimum is known: small quadratics by brute force, the two forms under Adam, fixed and growing rho.

python -m benchmarks.admm_quadratic
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from detent.mechanisms import Slot
from detent.report.record import summarise

STEPS, EVERY, RATE = 600, 20, 0.5
RHO, GROWTH, MOST = 0.05, 1.2, 2.0
NOISE, PULL = 30.0, 0.121  # the second part: |w - 1|^2 / 2 with noisy gradients, rho / 2 |w|^2 on top


@dataclass(frozen=True, kw_only=True)
class NotRescaled(dt.ADMM):
    """ADMM as the released code grows rho: the scaled dual keeps its value, so the force rho u grows with rho."""

    def _update(self, slot: Slot) -> None:
        before = slot.state["rho"]
        super()._update(slot)
        slot.state["dual"] *= slot.state["rho"] / before


def growing(**changes: Any) -> dt.ADMM:
    """What the variants are changes of: ADMM to the end, with nothing after it."""
    settings: dict[str, Any] = {"rho": RHO, "growth": GROWTH, "rho_max": MOST, "every": EVERY, "until": None}
    return dt.ADMM(**settings | changes)


VARIANTS: dict[str, dt.Mechanism | None] = {
    "projection of the optimum": None,
    "hard projection": dt.HardProjection(every=EVERY, masks=False),
    "ADMM": growing(),
    "ADMM, dual not rescaled": NotRescaled(rho=RHO, growth=GROWTH, rho_max=MOST, every=EVERY, until=None),
    "ADMM, rho fixed at its first": growing(growth=1.0),
    "ADMM, rho fixed at its mean": growing(growth=1.0, rho=(RHO * MOST) ** 0.5),
    "ADMM, rho fixed at its last": growing(growth=1.0, rho=MOST),
    "ADMM, balanced": growing(balance=True),
    "penalty alone": dt.Penalty(strength=dt.Exponential(first=RHO, last=MOST)),
}
KINDS: dict[str, tuple[int, dt.Target]] = {
    "3 non-zeros of 10": (10, dt.TopK(keep=3)),
    "10 signs and a scale": (10, dt.Binary()),
    "8 of -1, 0, 1 and a scale": (8, dt.Ternary()),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """f(w) = (w - b)' A (w - b) / 2 with eigenvalues of A between 0.05 and 1."""

    a: Tensor
    b: Tensor

    @staticmethod
    def draw(size: int, generator: torch.Generator) -> Problem:
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        eigenvalues = torch.logspace(-1.3, 0, size, dtype=torch.float64)
        b = torch.randn(size, generator=generator, dtype=torch.float64)
        return Problem(a=basis @ torch.diag(eigenvalues) @ basis.T, b=b)

    def gradient(self, w: Tensor) -> Tensor:
        return self.a @ (w - self.b)

    def best_on_support(self, kept: Sequence[int]) -> float:
        """Least f with the other weights at zero."""
        index = torch.tensor(kept)
        inner, side = self.a[index][:, index], (self.a @ self.b)[index]
        return 0.5 * float(self.b @ self.a @ self.b - side @ torch.linalg.solve(inner, side))

    def best_scale(self, patterns: Tensor) -> Tensor:
        """Least f over the positive scale of each pattern (a row of -1, 0, 1)."""
        along = (patterns @ self.a @ self.b).clamp_min(0.0)
        size = ((patterns @ self.a) * patterns).sum(1)
        return 0.5 * (self.b @ self.a @ self.b - along.square() / size.clamp_min(1e-300))

    def optimum(self, kind: str) -> float:
        """By trying everything."""
        size = len(self.b)
        if "non-zeros" in kind:
            return min(self.best_on_support(kept) for kept in itertools.combinations(range(size), 3))
        values = (-1.0, 1.0) if "signs" in kind else (-1.0, 0.0, 1.0)
        every = torch.tensor(list(itertools.product(values, repeat=size)), dtype=torch.float64)
        return float(self.best_scale(every).min())

    def reached(self, kind: str, q: Tensor) -> float:
        """f of a point of the set, given the best survivors or scale: what masked retraining ends at."""
        if "non-zeros" in kind:
            return self.best_on_support(q.nonzero().reshape(-1).tolist())
        return float(self.best_scale(torch.sign(q)[None])[0])


def solve(problems: Sequence[Problem], kind: str, mechanism: dt.Mechanism | None, steps: int) -> dict[str, Any]:
    """All problems of one kind at once, from their unconstrained optima; what each ends at, and its distance."""
    target = KINDS[kind][1]
    model = nn.Module()
    for i, problem in enumerate(problems):
        # A little off the optimum: a first step with no gradient at all is taken for a dummy and does not count.
        model.register_parameter(f"w{i}", nn.Parameter((problem.b * 1.001)[None]))
    weights = list(model.parameters())
    rule = dt.Rule(match="w", target=target, mechanism=mechanism)
    if mechanism is None:
        run = dt.compress(model, dt.Recipe([rule]))
    else:
        optimizer = torch.optim.SGD(weights, lr=RATE)
        run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=steps)
        for _ in range(steps):
            for w, problem in zip(weights, problems, strict=True):
                w.grad = problem.gradient(w.detach()[0])[None]
            optimizer.step()
    gaps = [row["error"] ** 0.5 for row in run.measure()]
    run.finalize()
    ends = [p.reached(kind, w.detach()[0]) for w, p in zip(weights, problems, strict=True)]
    return {"ends": ends, "gap": gaps}


def small_problems(count: int, seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """For every kind and variant: how often the optimum was found, how far above it f ends, how far w is from it."""
    rows = []
    for kind, (size, _) in KINDS.items():
        draws = {s: torch.Generator().manual_seed(1000 * s + size) for s in seeds}
        problems = {s: [Problem.draw(size, draws[s]) for _ in range(count)] for s in seeds}
        best = {s: [p.optimum(kind) for p in problems[s]] for s in seeds}
        for name, mechanism in VARIANTS.items():
            found, above, gap = [], [], []
            for s in seeds:
                got = solve(problems[s], kind, mechanism, steps)
                excess = [end / least - 1 for end, least in zip(got["ends"], best[s], strict=True)]
                found.append(100 * sum(x < 1e-6 for x in excess) / count)
                above.append(100 * sum(excess) / count)
                gap.append(100 * sum(got["gap"]) / count)
            row = {"kind": kind, "variant": name, "optimum": summarise(found), "above": summarise(above)}
            rows.append(row | {"distance": summarise(gap)})
            print(kind, "|", name, "|", *(f"{row[k]['mean']:.1f}" for k in ("optimum", "above")), f"{sum(gap):.2g}")
    return rows


def forms(seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Where each form ends on a noisy quadratic whose optimum is 1 / (1 + rho)."""
    rows = []
    for optimizer in ("SGD", "Adam"):
        for form in ("gradient", "decoupled"):
            ends = [_end_of(optimizer, form, s, steps) for s in seeds]
            rows.append({"optimizer": optimizer, "form": form, "end": summarise(ends), "optimum": 1 / (1 + PULL)})
            print(rows[-1])
    return rows


def _end_of(name: str, form: Any, seed: int, steps: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(2000, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    rate = 0.02 if name == "Adam" else 5e-3
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(model.parameters(), lr=rate)
    # z stays at project(w) = 0 and u at 0: no update comes, so the pull is rho w all along.
    mechanism = dt.ADMM(rho=PULL, growth=1.0, every=steps + 1, until=None, form=form)
    rule = dt.Rule(match="weight", target=dt.Zero(), mechanism=mechanism)
    dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=steps)
    mean = torch.zeros(())
    for step in range(steps):
        w = model.weight.detach()
        model.weight.grad = w - 1.0 + NOISE * torch.randn(w.shape, generator=generator)
        optimizer.step()
        if step >= 3 * steps // 4:
            mean += model.weight.detach().mean()
    return float(mean) / (steps - 3 * steps // 4)


def main(
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    problems: Annotated[int, typer.Option(min=1, help="of each kind and seed")] = 12,
    steps: Annotated[int, typer.Option(min=EVERY)] = STEPS,
    noisy_steps: Annotated[int, typer.Option(min=100)] = 10000,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Solves every kind with every variant, runs both forms, and writes the record."""
    torch.set_num_threads(1)
    seeds = seed or [0, 1, 2]
    config: Mapping[str, Any] = {
        "problems": problems,
        "steps": steps,
        "every": EVERY,
        "rate": RATE,
        "rho": [RHO, MOST],
        "growth": GROWTH,
        "noise": NOISE,
        "pull": PULL,
        "noisy_steps": noisy_steps,
    }
    with recording(
        "admm_quadratic",
        question="Does ADMM find the brute-force optimum of small constrained quadratics, and which form and rho do?",
        seeds=seeds,
        config=config,
        notes="Every variant starts from the unconstrained optimum and takes the same SGD steps; its last point is "
        "projected, and its support or sign pattern is given the best survivors or scale (what masked retraining ends "
        "at). optimum: % of problems whose best was found; above: mean % of f above it; distance: mean % |w - q| / |w| "
        "before the projection. Eigenvalues 0.05 to 1; rho was set once, to that range.",
        out=out,
    ) as results:
        results["small"] = small_problems(problems, seeds, steps)
        results["forms"] = forms(seeds, noisy_steps)


if __name__ == "__main__":
    typer.run(main)
