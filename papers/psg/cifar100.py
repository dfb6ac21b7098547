"""The paper's own experiment: CIFAR-100, ResNet-32, from the released SGD checkpoint of epoch 82, for every rival.

    python -m papers.psg.cifar100 --data-dir ../shared --epochs 68 [--only psg-w3 --only sgd] [--resume]

Every rival gets the same data, order, epochs and learning rates; weights of the last epoch count, nothing is selected.
Each is measured at full precision and at 8, 6, 4, 3 and 2 bits, data-free and with BatchNorm re-estimated.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from detent.report.record import Record
from papers.train import Experiment, all_seeds
from papers.tune import chosen, held_out

GRID8 = {"kind": "Uniform", "bits": 8}


def ends_at_8(bits: int, mechanism: dict[str, Any] | None, granularity: str = "tensor") -> dict[str, Any]:
    """First and last weight at 8 bits, the rest at `bits`, MSE ranges, one scale a tensor or a channel."""
    pull = {} if mechanism is None else {"mechanism": mechanism}
    fine = {} if granularity == "tensor" else {"granularity": granularity}
    ends = [{"match": where, "target": {**GRID8, **fine}, "pinned": True, **pull} for where in ("@first", "@last")]
    return {"rules": [*ends, {"match": "weight$", "target": {"kind": "Uniform", "bits": bits, **fine}, **pull}]}


def paper(bits: int, lambda_s: float) -> dict[str, Any]:
    """The published form; first and last at 8 bits when bits <= 3."""
    mechanism = {"kind": "PSG", "gain": lambda_s, "eps": 0.0, "clip": False, "form": "gradient", "units": "weight"}
    rest = {"mechanism": mechanism, "include": r"^fc\.bias$", "fit_every": 1, "fit_until": 1.0}
    ends = [
        {"match": where, "target": {"kind": "Uniform", "bits": 8, "range": "ema"}, "pinned": True, **rest}
        for where in ("@first", "@last")
    ]
    body = {"match": "(weight|bias)$", "target": {"kind": "Uniform", "bits": bits, "range": "ema"}, **rest}
    return {"rules": [*(ends if bits <= 3 else []), body]}


def prune(mechanism: dict[str, Any] | None, keep: float = 0.1) -> dict[str, Any]:
    """The `keep` largest weights of the whole model."""
    pull = {} if mechanism is None else {"mechanism": mechanism}
    return {"rules": [{"match": "weight$", "target": {"kind": "TopK", "keep": keep, "scope": "model"}, **pull}]}


# Chosen by --gains, one for all widths: the best in the mean of both lives.
PSG = {"kind": "PSG", "gain": 8.0}
# What --gains tries, by width. (At 3 bits 16 was worse than 8 in both lives.)
GAINS: dict[int, tuple[float, ...]] = {3: (4.0, 8.0, 16.0), 2: (4.0, 8.0)}
# Towards zero PSG lets small weights be, and weight decay takes them the rest of the way (docs/psg.md).
PRUNE_DECAY = 5e-3
# --tune tries the number in RIVALS times these, and goes on in such steps where the best is at the edge.
TIMES = (1 / 3, 1.0, 3.0, 9.0, 27.0)
STEP = 3.0
HOLDOUT = 5000
RIVALS: dict[str, dict[str, Any]] = {
    "sgd": {"recipe": None, "evaluate_recipe": ends_at_8(4, None)},
    "clip-w3": {"recipe": ends_at_8(3, {"kind": "Clip"})},
    "psg-w3": {"recipe": ends_at_8(3, PSG)},
    "paper-w4": {"paper": 4, "lambda_s": 150.0},
    "psg-w4": {"recipe": ends_at_8(4, PSG)},
    "psg-w2": {"recipe": ends_at_8(2, PSG)},
    "clip-w2": {"recipe": ends_at_8(2, {"kind": "Clip"})},
    # A scale a channel, as most deployments have: clipping to a channel's own range costs the full life less.
    **{f"psg-w{bits}-channel": {"recipe": ends_at_8(bits, PSG, "channel")} for bits in (4, 3, 2)},
    **{f"clip-w{bits}-channel": {"recipe": ends_at_8(bits, {"kind": "Clip"}, "channel")} for bits in (3, 2)},
    # lambda_s for 3 and 2 bits was never published: these give the mean factor that 150 gives at 4 bits
    "paper-w3": {"paper": 3, "lambda_s": 66.0, "tune": "lambda_s"},
    "paper-w2": {"paper": 2, "lambda_s": 39.0, "tune": "lambda_s", "decay": 0.0},
    "sgd-prune90": {"recipe": None, "evaluate_recipe": prune(None), "decay": PRUNE_DECAY, "tune": "decay"},
    "psg-prune90": {
        "recipe": prune({"kind": "PSG", "gain": 8.0, "toward": {"kind": "Zero"}}),
        "decay": PRUNE_DECAY,
        "tune": "decay",
    },
}


def experiment(
    rival: str,
    epochs: int,
    seeds: list[int],
    *,
    milestones: bool,
    knob: float | None = None,
    gain: float | None = None,
    holdout: int = 0,
    **extra: Any,
) -> Experiment:
    """The experiment of one rival.

    Args:
        rival: a key of `RIVALS`.
        epochs: its length.
        seeds: of order and augmentation.
        milestones: the published steps of the rate instead of a cosine to zero.
        knob: instead of the rival's own number for what its "tune" names.
        gain: instead of PSG's own, for a rival that has it with a scale a tensor.
        holdout: training images that are kept apart.
        extra: more fields of the experiment.
    """
    setting = RIVALS[rival]
    if knob is not None:
        setting = {**setting, setting["tune"]: knob}
    recipe = paper(setting["paper"], setting["lambda_s"]) if "paper" in setting else setting["recipe"]
    if gain is not None:
        assert recipe is not None
        recipe = ends_at_8(recipe["rules"][-1]["target"]["bits"], {**PSG, "gain": gain})
    own = 4 if recipe is None else recipe["rules"][-1]["target"].get("bits")
    schedule = {"kind": "step", "milestones": [epochs * 40 / 68]} if milestones else {"kind": "cosine"}
    sparse = {"prune90": prune(None), "prune80": prune(None, 0.2)}
    # Every rival with a scale a tensor is also read on the other grid of the comparison: all layers on min-max ranges
    # as published, and first and last at 8 bits on searched ranges as ours.
    rounding = {f"minmax-w{bits}": f"psg-paper-w{bits}" for bits in (4, 3, 2)}
    if "paper" in setting:
        rounding |= {f"ends8-w{bits}": ends_at_8(bits, None) for bits in (4, 3, 2)}
    channel = {f"channel-w{bits}": ends_at_8(bits, None, "channel") for bits in (4, 3, 2)}
    if rival.endswith("-channel"):
        rounding = channel
    elif rival == "sgd":
        rounding |= channel
    return Experiment.model_validate(
        {
            "name": f"psg-cifar100-{rival}",
            "question": "From the SGD checkpoint of epoch 82: which rival holds full precision and every width?",
            "model": "resnet32",
            "init": "checkpoints/cifar100_resnet32_sgd82.safetensors",
            "data": {
                "name": "data/cifar100",
                "label": "fine_label",
                "crop": 4,
                "padding": "reflect",
                "flip": True,
                "mean": [129.3 / 255, 124.1 / 255, 112.4 / 255],
                "std": [68.2 / 255, 65.4 / 255, 70.4 / 255],
                "cache": "runs/cache",
                "holdout": holdout,
            },
            "recipe": recipe,
            "evaluate_recipe": setting.get("evaluate_recipe"),
            "optimizer": {
                "name": "SGD",
                "args": {"lr": 0.01, "momentum": 0.9, "weight_decay": setting.get("decay", 1e-4)},
            },
            "schedule": schedule,
            "batch_size": 128,
            "epochs": epochs,
            "channels_last": True,
            "seeds": seeds,
            "evaluate": {
                "bits": [bits for bits in (8, 6, 4, 3, 2) if bits != own] if own else [],
                "recipes": {
                    **({} if rival.endswith("prune90") else rounding),
                    **(sparse if rival == "sgd" else {}),
                },
                "calibrate": 4000,
                "every": 0,
            },
            **extra,
        }
    )


def choose_gain(epochs: int, out: Path, data_dir: Path, console: Console, kinds: dict[str, Any]) -> None:
    """One training for each of `GAINS`, measured on held-out training images; writes a record.

    The best is that of the largest mean over widths and lives, of the gains that every width has: a larger gain trades
    the full life for the compressed one, and both count.
    """
    record = Record(
        name="psg-gain",
        question="Which gain should PSG have, one for all widths?",
        seeds=[1000],
        config={"epochs": epochs, "gains": GAINS, "holdout": HOLDOUT, **kinds},
        notes="Accuracy (%) on images held out from the train split; the checkpoint has seen them. A trial that --out "
        "holds already is read, so that the seconds may be those of reading.",
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    with record:
        for bits, gain in [(bits, gain) for bits, gains in GAINS.items() for gain in gains]:
            plan = experiment(f"psg-w{bits}", epochs, [1000], gain=gain, holdout=HOLDOUT, **kinds)
            lives = held_out(plan, out / f"w{bits}-{gain:g}-{epochs}", data_dir, console)
            found.setdefault(f"{gain:g}", {})[str(bits)] = lives
    everywhere = {gain: of for gain, of in found.items() if len(of) == len(GAINS)}
    mean = {g: sum(sum(lives.values()) for lives in of.values()) / (2 * len(of)) for g, of in everywhere.items()}
    record.write(out / "record.json", {"held_out": found, "mean": mean, "best": float(max(mean, key=mean.__getitem__))})


def main(
    data_dir: Annotated[Path, typer.Option(help="folder with data/ and checkpoints/", envvar="DETENT_SHARED")],
    epochs: Annotated[int, typer.Option(min=1)] = 68,
    out: Annotated[Path, typer.Option()] = Path("runs/psg-cifar100"),
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(RIVALS)}; may be repeated")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    milestones: Annotated[
        bool, typer.Option(help="rate / 10 at 40/68 of the run, as published; else cosine to 0")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the network")] = False,
    tune: Annotated[
        int | None,
        typer.Option(min=1, help="epochs of each trial that chooses what a rival tunes, on held-out train images"),
    ] = None,
    gains: Annotated[
        int | None, typer.Option(min=1, help="epochs of the trials that choose PSG's gain, and train nothing else")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume")] = False,
) -> None:
    """Trains the rivals one after another and writes a record for each."""
    console = Console()
    kinds: dict[str, Any] = {"milestones": milestones, "compile": compiled, "threads": threads}
    if gains is not None:
        choose_gain(gains, out / "gain", data_dir, console, kinds)
        return
    for rival in only or list(RIVALS):
        if rival not in RIVALS:
            raise typer.BadParameter(f"--only {rival}: must be one of {', '.join(RIVALS)}")
        folder = out / rival
        knob, further = None, {}
        if tune is not None and "tune" in RIVALS[rival]:
            what = RIVALS[rival]["tune"]
            trial = functools.partial(experiment, rival, tune, [1000], holdout=HOLDOUT, **kinds)
            numbers = [RIVALS[rival][what] * times for times in TIMES]
            knob, tried = chosen(
                lambda number, of=trial: of(knob=number), numbers, folder, data_dir, console, step=STEP
            )
            further = {"tuned": {what: knob, "epochs": tune, "held_out": tried}}
        plan = experiment(rival, epochs, seed or [1], knob=knob, **kinds)
        all_seeds(plan, folder, data_dir, folder, resume, console, lambda further=further: further)


if __name__ == "__main__":
    typer.run(main)
