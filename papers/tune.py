"""Choosing a number on images held out of the train split: one trial for each, the same for every rival."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from papers.train import Experiment, Trainer, differences

__all__ = ["chosen", "held_out", "tuned"]

Lives = dict[str, float]


def tuned(
    trial: Callable[[float], Lives], numbers: Sequence[float], *, step: float | None = None
) -> tuple[float, dict[float, Lives]]:
    """The number with the best compressed life (the full one, if there is no other), and what each number gave.

    A trial that diverges (the trainer or the engine raise RuntimeError on what is not finite) is as bad as can be, and
    is no reason to look beyond it.

    Args:
        trial: what a number gives on held-out images, as `held_out`.
        numbers: that are tried, > 0, at least one.
        step: > 1: while the best is the smallest or largest tried, one more is tried, so many times beyond it.

    Example:
        >>> best, found = tuned(lambda lr: {"full": -abs(lr - 27.0)}, [1.0, 3.0], step=3.0)
        >>> best, sorted(found)
        (27.0, [1.0, 3.0, 9.0, 27.0, 81.0])
    """

    def tried(number: float) -> Lives:
        try:
            return trial(number)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("finite", "loss is", "NaN")):
                raise
            return {"full": 0.0, "compressed": 0.0}

    found = {number: tried(number) for number in numbers}
    while True:
        best = max(found, key=lambda number: found[number].get("compressed", found[number]["full"]))
        beyond = None
        if step is not None:
            beyond = best * step if best == max(found) else best / step if best == min(found) else None
        if beyond is None:
            return best, {number: found[number] for number in sorted(found)}
        found[beyond] = tried(beyond)


def held_out(plan: Experiment, out: Path, data_dir: Path | None, console: Console | None = None) -> dict[str, float]:
    """Accuracies (%) of both lives on held-out training images after the last epoch: a trial that chooses a number.

    Args:
        plan: the experiment, with images held out; its first seed is trained. The test split is not read.
        out: a folder of its own, from which an unfinished trial is resumed and a finished one read.
        data_dir: as for `Trainer`.
        console: where progress goes.

    Returns:
        "full", and "compressed" (data-free) if there is such a life.

    Raises:
        ValueError: the folder holds a trial of other settings.
    """
    kept = out / "held-out.json"
    if not kept.exists():
        plan = plan.model_copy(update={"evaluate": plan.evaluate.model_copy(update={"every": plan.epochs})})
        trainer = Trainer(plan, plan.seeds[0], out, data_dir, None, console)
        trainer.resume()
        trainer.train()
        last = trainer.history[-1]["held_out"]
        found = {"full": last["full"]["accuracy"]}
        if last["compressed"]:
            found["compressed"] = last["compressed"]["recipe"]["data_free"]["accuracy"]
        kept.write_text(json.dumps({"experiment": plan.model_dump_json(), "accuracy": found}))
    trial = json.loads(kept.read_text())
    differs = differences(trial["experiment"], plan) if "experiment" in trial else ["all settings, which it lacks,"]
    if differs:
        raise ValueError(f"{kept} is of another trial: {differs} differ; choose another --out, or remove it")
    return trial["accuracy"]


def chosen(
    plan_of: Callable[[float], Experiment],
    numbers: Sequence[float],
    out: Path,
    data_dir: Path | None,
    console: Console | None = None,
    *,
    step: float | None = None,
) -> tuple[float, dict[str, Lives]]:
    """The number whose experiment is best on held-out training images, and what every one tried gave.

    Args:
        plan_of: the experiment of a number, with images held out.
        numbers: as for `tuned`.
        out: every trial has a folder of its own in it, named by its number and epochs.
        data_dir: as for `Trainer`.
        console: where progress goes.
        step: as for `tuned`.

    Returns:
        The best number, and the lives by number as text, for a record.
    """

    def trial(number: float) -> Lives:
        plan = plan_of(number)
        return held_out(plan, out / f"tune-{number:.6g}-{plan.epochs}", data_dir, console)

    best, found = tuned(trial, numbers, step=step)
    return best, {f"{number:.6g}": lives for number, lives in found.items()}
