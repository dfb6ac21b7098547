"""Is a resumed training the unbroken one, for every mechanism, in every order of loading, in every framework?"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording

STEPS, CUT = 10, 6

# Every mechanism in each of its forms, moments such that something is under way at the cut.
CASES: dict[str, tuple[dt.Target, dt.Mechanism]] = {
    "PSG, gradient form": (dt.Uniform(bits=3), dt.PSG(gain=8.0, form="gradient")),
    "PSG, update form": (dt.Uniform(bits=3), dt.PSG(gain=8.0, form="update")),
    "Penalty": (dt.Uniform(bits=3), dt.Penalty(strength=0.1)),
    "Proximal": (dt.Uniform(bits=3), dt.Proximal(strength=0.5)),
    "Clip": (dt.Uniform(bits=3), dt.Clip()),
    "ADMM": (dt.Uniform(bits=2), dt.ADMM(rho=0.1, every=2, until=5)),
    "ADMM, Fisher metric": (dt.TopK(keep=0.3), dt.ADMM(rho=0.1, every=2, until=8, metric="fisher")),
    "Masked": (dt.TopK(keep=0.3), dt.Masked()),
    "HardProjection": (dt.TopK(keep=0.3), dt.HardProjection(every=3)),
    "PartialFreeze": (dt.Uniform(bits=2), dt.PartialFreeze(every=3)),
    "CodebookLearning": (dt.VectorCodebook(block=2, size=6), dt.CodebookLearning()),
    "STE": (dt.Uniform(bits=3), dt.STE()),
    "STE, Binary": (dt.Binary(), dt.STE()),
    "PARQ": (dt.Ternary(), dt.PARQ()),
    "BinaryRelax": (dt.TopK(keep=0.3), dt.BinaryRelax()),
    "MirrorDescent, dual": (dt.Binary(), dt.MirrorDescent()),
    "MirrorDescent, primal": (dt.Binary(), dt.MirrorDescent(form="primal", beta=2.0)),
    "GDTanh": (dt.Binary(), dt.GDTanh(beta=2.0)),
    "PMF": (dt.Ternary(), dt.PMF(beta=2.0)),
    "two stages": (dt.Uniform(bits=3), dt.PSG(gain=8.0)),
}


class Net(nn.Module):
    """A small network that gives its own loss, as transformers' Trainer wants it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.body(x) - labels).square().mean()}


def batch() -> tuple[Tensor, Tensor]:
    """The one batch of every step: where in an epoch a framework goes on is not what is asked."""
    noise = torch.Generator().manual_seed(7)
    return torch.randn(16, 6, generator=noise), torch.randn(16, 4, generator=noise)


def recipe(name: str) -> dt.Recipe:
    """The recipe of a case."""
    target, mechanism = CASES[name]
    rule = dt.Rule(match="weight$", target=target, mechanism=mechanism)
    if name != "two stages":
        return dt.Recipe([rule])
    prune = dt.Rule(match="weight$", target=dt.TopK(keep=0.5), mechanism=dt.STE())
    grid = dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=target)
    then = dt.Rule(match="weight$", target=grid, mechanism=mechanism)
    return dt.Recipe(stages=[dt.Stage(rules=[prune], share=0.4), dt.Stage(rules=[then], share=0.6)])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state."""
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def attach(model: nn.Module, optimizer: Any, name: str) -> dt.Run:
    """Attach the recipe of a case."""
    return dt.attach(model, optimizer, recipe(name), total_steps=STEPS)


def values(model: nn.Module) -> list[Tensor]:
    """What a forward pass sees."""
    return [p.detach().clone() for p in model.parameters()]


@dataclass(kw_only=True)
class Trained:
    """What a training started from, and what it came to."""

    first: list[Tensor]
    last: list[Tensor]


def loop(
    model: nn.Module, optimizer: Any, steps: int, backward: Callable[[Tensor], Any] = torch.Tensor.backward
) -> None:
    """Plain steps."""
    x, labels = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model(x, labels)["loss"])
        optimizer.step()


# --- a loop of one's own ----------------------------------------------------------------------------------------


def by_hand(order: tuple[str, ...]) -> Callable[[str, Path], tuple[Trained, Trained]]:
    """Unbroken, and resumed in an order of "model", "attach" and "optimizer"."""

    def both(name: str, folder: Path) -> tuple[Trained, Trained]:
        model = Net()
        optimizer = adamw(model)
        attach(model, optimizer, name)
        loop(model, optimizer, CUT)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "saved.pt")
        first = values(model)
        loop(model, optimizer, STEPS - CUT)
        whole = Trained(first=first, last=values(model))
        held = torch.load(folder / "saved.pt", weights_only=True)
        model = Net(seed=1)
        optimizer = adamw(model)
        does: dict[str, Callable[[], Any]] = {
            "model": lambda: model.load_state_dict(held["model"]),
            "optimizer": lambda: optimizer.load_state_dict(held["optimizer"]),
            "attach": lambda: attach(model, optimizer, name),
        }
        for what in order:
            does[what]()
        first = values(model)
        loop(model, optimizer, STEPS - CUT)
        return whole, Trained(first=first, last=values(model))

    return both


# --- accelerate -------------------------------------------------------------------------------------------------


def accelerated(*, prepared_first: bool) -> Callable[[str, Path], tuple[Trained, Trained]]:
    """`save_state` and `load_state`, attached before or after `prepare`."""

    def start(name: str, seed: int) -> tuple[Any, Any, Any]:
        from accelerate import Accelerator

        accelerator, model = Accelerator(cpu=True), Net(seed)
        optimizer: Any = adamw(model)
        if prepared_first:
            model, optimizer = accelerator.prepare(model, optimizer)
        attach(model, optimizer, name)
        if not prepared_first:
            model, optimizer = accelerator.prepare(model, optimizer)
        return accelerator, model, optimizer

    def both(name: str, folder: Path) -> tuple[Trained, Trained]:
        accelerator, model, optimizer = start(name, 0)
        loop(model, optimizer, CUT, accelerator.backward)
        accelerator.save_state(str(folder))
        first = values(model)
        loop(model, optimizer, STEPS - CUT, accelerator.backward)
        whole = Trained(first=first, last=values(model))
        accelerator, model, optimizer = start(name, 1)
        accelerator.load_state(str(folder))
        first = values(model)
        loop(model, optimizer, STEPS - CUT, accelerator.backward)
        return whole, Trained(first=first, last=values(model))

    return both


# --- Lightning --------------------------------------------------------------------------------------------------


def lightning(name: str, folder: Path) -> tuple[Trained, Trained]:
    """Attached in `configure_optimizers`; the model is loaded before it, the optimizer after it."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net, self.first = Net(seed), []

        def training_step(self, part: Any, index: int) -> Tensor:
            return self.net(*part)["loss"]

        def on_train_start(self) -> None:
            self.first = values(self.net)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = adamw(self)
            attach(self, optimizer, name)
            return optimizer

    def fit(module: Module, steps: int, path: Path | None = None) -> Any:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, enable_model_summary=False, default_root_dir=folder, **quiet
        )
        parts: Any = [batch()]
        trainer.fit(module, torch.utils.data.DataLoader(parts, batch_size=None), ckpt_path=path)
        return trainer

    path = folder / "saved.ckpt"
    whole, cut, again = Module(0), Module(0), Module(1)
    fit(whole, STEPS)
    fit(cut, CUT).save_checkpoint(path)
    fit(again, STEPS, path)
    return Trained(first=values(cut.net), last=values(whole.net)), Trained(first=again.first, last=values(again.net))


# --- transformers' Trainer --------------------------------------------------------------------------------------


def trainer(name: str, folder: Path) -> tuple[Trained, Trained]:
    """Attached in `create_optimizer`; the model is loaded before it, the optimizer wrapped and loaded after it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Looks(TrainerCallback):
        def __init__(self) -> None:
            self.first: list[Tensor] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.first = values(given["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == CUT:
                self.cut = values(given["model"])

    class Attached(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            trained: Any = self.model
            self.optimizer = adamw(trained)
            attach(trained, self.optimizer, name)
            return self.optimizer

        def get_train_dataloader(self) -> Any:
            x, labels = batch()
            rows = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
            return torch.utils.data.DataLoader(rows, batch_size=16)  # type: ignore[arg-type]

    def start(seed: int) -> tuple[Any, Looks]:
        quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
        args = TrainingArguments(
            str(folder), max_steps=STEPS, save_steps=CUT, lr_scheduler_type="constant", max_grad_norm=0.0, **quiet
        )
        looks = Looks()
        return Attached(model=Net(seed), args=args, callbacks=[looks]), looks

    whole, seen = start(0)
    whole.train()
    again, looks = start(1)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}"))
    return Trained(first=seen.cut, last=values(whole.model)), Trained(first=looks.first, last=values(again.model))


WAYS: dict[str, Callable[[str, Path], tuple[Trained, Trained]]] = {
    "by hand: model, attach, optimizer": by_hand(("model", "attach", "optimizer")),
    "by hand: attach, model, optimizer": by_hand(("attach", "model", "optimizer")),
    "by hand: attach, optimizer, model": by_hand(("attach", "optimizer", "model")),
    "Lightning": lightning,
    "Trainer": trainer,
    "accelerate: attach, prepare": accelerated(prepared_first=False),
    "accelerate: prepare, attach": accelerated(prepared_first=True),
}


def outcome(name: str, way: str, folder: Path) -> dict[str, float]:
    """How far a resumed training is from the unbroken one, at its first forward pass and at its end."""
    whole, again = WAYS[way](name, folder)

    def gap(a: list[Tensor], b: list[Tensor]) -> float:
        same = len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        return 0.0 if same else max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) or float("nan")

    return {"first_forward": gap(whole.first, again.first), "end": gap(whole.last, again.last)}


def main(out: Annotated[Path | None, typer.Option(help="another record file")] = None) -> None:
    """Runs the matrix and writes the record."""
    warnings.filterwarnings("ignore")
    with recording(
        "resume",
        question="Is a resumed training the unbroken one, by mechanism, order of loading and framework?",
        seeds=[0],
        config={"net": "6-16-4, tanh", "optimizer": "AdamW", "steps": STEPS, "cut": CUT},
        notes="Largest difference of a weight; 0 is bitwise.",
        out=out,
    ) as results:
        for name in CASES:
            results[name] = {}
            for way in WAYS:
                with tempfile.TemporaryDirectory() as folder:
                    results[name][way] = outcome(name, way, Path(folder))
            print(name, {way: tuple(found.values()) for way, found in results[name].items()}, flush=True)


if __name__ == "__main__":
    typer.run(main)
