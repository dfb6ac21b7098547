"""A mechanism of strength 0 is no mechanism: training is the base optimizer's, bit for bit.

python -m benchmarks.strength_zero
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording

STEPS = 40
BATCH = 16
IMPLEMENTATIONS = ("loop", "foreach", "fused")
OPTIMIZERS = ("SGD momentum 0.9", "AdamW", "Muon with AdamW")
FORMS: tuple[Literal["gradient", "update"], ...] = ("gradient", "update")


def network() -> nn.Sequential:
    """Two convolutions with BatchNorm and two linear layers (the matrices that Muon takes)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def make_optimizers(name: str, model: nn.Module, implementation: str) -> list[torch.optim.Optimizer]:
    """Weight decay is on: it must stay the base optimizer's too."""
    fused, foreach = implementation == "fused", implementation == "foreach"
    params = list(model.parameters())
    if name == "SGD momentum 0.9":
        return [torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=fused, foreach=foreach)]
    if name == "AdamW":
        return [torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-2, fused=fused, foreach=foreach)]
    matrices = [p for p in params if p.dim() == 2]
    rest = [p for p in params if p.dim() != 2]
    return [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=1e-2),
        torch.optim.AdamW(rest, lr=1e-3, weight_decay=1e-2, fused=fused, foreach=foreach),
    ]


def train(optimizer: str, implementation: str, mechanism: dt.PSG | None, seed: int, steps: int) -> dict[str, Tensor]:
    """Everything training leaves behind: weights, buffers, optimizer state, and the last gradients."""
    torch.manual_seed(seed)
    model = network()
    optimizers = make_optimizers(optimizer, model, implementation)
    if mechanism is not None:
        rule = dt.Rule(match="weight$", target=dt.Uniform(bits=4), mechanism=mechanism)
        dt.attach(model, optimizers, dt.Recipe([rule]), total_steps=steps)
    data = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        inputs = torch.randn(BATCH, 1, 8, 8, generator=data)
        labels = torch.randint(10, (BATCH,), generator=data)
        for o in optimizers:
            o.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        for o in optimizers:
            o.step()
    left = {f"model.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    for i, o in enumerate(optimizers):
        for j, param in enumerate(p for group in o.param_groups for p in group["params"]):
            assert param.grad is not None
            left[f"optimizer{i}.{j}.grad"] = param.grad.clone()
            for key, value in o.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    left[f"optimizer{i}.{j}.{key}"] = value.clone()
    return left


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> int:
    """How many tensors differ in any bit."""
    if a.keys() != b.keys():
        raise ValueError(f"the runs left different tensors behind: {sorted(a.keys() ^ b.keys())}")
    return sum(a[k].numpy().tobytes() != b[k].numpy().tobytes() for k in a)


def compare(
    optimizer: str, implementation: str, form: Literal["gradient", "update"], seed: int, steps: int
) -> dict[str, Any]:
    """One row: the base optimizer against itself, idle mechanisms, and a working one."""
    base = train(optimizer, implementation, None, seed, steps)
    rivals: dict[str, dt.PSG | None] = {
        "base_again": None,
        "strength_zero": dt.PSG(gain=8.0, strength=0.0, form=form),
        "not_started": dt.PSG(gain=8.0, start=steps, form=form),
        "strength_one": dt.PSG(gain=8.0, strength=1.0, form=form),
    }
    found = {
        name: differing(base, train(optimizer, implementation, mechanism, seed, steps))
        for name, mechanism in rivals.items()
    }
    row = {"optimizer": optimizer, "implementation": implementation, "form": form, "tensors": len(base)}
    return row | {"differing": found}


def main(
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Compares every optimizer, implementation and form, and writes the record."""
    torch.set_num_threads(1)
    seeds = seed or [0, 1, 2]
    with recording(
        "strength_zero",
        question="Is training with a mechanism of strength 0, or before its start, bitwise the base optimizer's?",
        seeds=seeds,
        config={"steps": steps, "batch": BATCH, "target": "Uniform(bits=4)", "threads": 1},
        notes="Tensors compared: weights, buffers, optimizer state, last gradients. Strength 1 shows that the "
        "comparison can fail; the base optimizer is run twice to show that it repeats itself.",
        out=out,
    ) as results:
        rows = []
        for optimizer in OPTIMIZERS:
            for implementation in IMPLEMENTATIONS:
                for form in FORMS:
                    by_seed = [compare(optimizer, implementation, form, s, steps) for s in seeds]
                    total = {k: sum(r["differing"][k] for r in by_seed) for k in by_seed[0]["differing"]}
                    tensors = sum(r["tensors"] for r in by_seed)
                    rows.append(by_seed[0] | {"tensors": tensors, "differing": total})
                    print(rows[-1])
        results["rows"] = rows


if __name__ == "__main__":
    typer.run(main)
