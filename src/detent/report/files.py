"""A report of a file: everything that a .detent file says by itself, and with its model and data the rest."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from detent import sharding
from detent.batchnorm import Statistics, statistics_of
from detent.engine import Run
from detent.lives import Encoded
from detent.pack import Inspection, Reader, Writer, inspect, load
from detent.pack.coding import Coding
from detent.pack.container import opened
from detent.pack.header import Life
from detent.parameters import named_parameters
from detent.recipe import Recipe, Rule
from detent.report.card import Card, card_of
from detent.report.numbers import (
    CODINGS,
    WIDTHS,
    Evaluate,
    Export,
    History,
    Moment,
    Piece,
    Report,
    Watch,
    Width,
    assemble,
    scores_of,
    sensitivities,
    silent,
    widths_of,
)
from detent.specs import to_spec
from detent.targets import Held, Params, Target

__all__ = ["card_of_file", "collect_file", "run_of_file"]


def collect_file(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    sensitivity: Evaluate | None = None,
    bits: Sequence[int] = WIDTHS,
    history: History | Sequence[Moment] = (),
    exports: Sequence[Export] = (),
    title: str = "",
    evaluated_on: str = "",
    sensitivity_on: str = "",
    watch: Watch = silent,
) -> Report:
    """The report of a file: what `collect` says of the run that wrote it, as far as the file knows it.

    Without a model everything that needs none: bytes, histograms, distances, the card. A file does not say which
    targets were pinned, so at other widths every target that has a width changes.

    Args:
        path: a file that `dt.save` wrote.
        model: built by the code that the file was made with; its weights are overwritten. Needed for scores.
        evaluate: as for `collect`.
        sensitivity: as for `collect`; needs a file with both lives.
        bits: widths to show the same checkpoint at; needs a file with both lives.
        history: as for `collect`.
        exports: as for `collect`.
        title: heading; by default the file's name.
        evaluated_on: in words, what `evaluate` measures on.
        sensitivity_on: in words, what `sensitivity` measures on.
        watch: as for `collect`.

    Raises:
        FormatError: the file is damaged or not one of ours.
        OSError: the file cannot be opened.
        ValueError: a model it does not fit, or a function to evaluate without a model.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent")
        ...     report = collect_file(f"{folder}/model.detent")
        >>> report.title, report.layers[0].becomes, sorted(report.absent)
        ('model.detent', 'Uniform(bits=3)', ['exports', 'history', 'scores', 'sensitivity', 'widths'])
    """
    if model is None and (evaluate or sensitivity):
        raise ValueError("collect_file(evaluate=...): needs model=, which the scores are of")
    scores: dict[str, dict[str, float]] = {}
    widths: list[Width] = []
    unfit: dict[str, str] = {}
    losses: dict[str, float] = {}
    with Reader(path) as file:
        header, both = file.header, file.header.life == "both"
        if model is not None and evaluate is not None:
            load(file, model, "compressed")
            scores["compressed"] = scores_of(evaluate, model)
        if model is not None and both and sensitivity is not None:
            load(file, model, "full")
            alone = ((name, file.tensor(name)) for name in file.coded)
            losses = sensitivities(model, alone, len(file.coded), sensitivity, watch)
        if model is not None and both and evaluate is not None:
            load(file, model, "full")
            scores = {"full": scores_of(evaluate, model), **scores}
            widths, unfit = widths_of(run_of_file(file, model), evaluate, bits, watch)
        tensors = header.tensors.values()
        return assemble(
            header=header,
            pieces=(Piece.of(n, file.tensor(n, "full") if both else None, file.encoded(n)) for n in file.coded),
            order=file.names,
            raw=sum(math.prod(t["shape"]) * getattr(torch, t["dtype"]).itemsize for t in tensors),
            written=_written(file, watch),
            both=file.size if both else None,
            scores=scores,
            widths=widths,
            unfit=unfit,
            losses=losses,
            history=tuple(history.moments if isinstance(history, History) else history),
            exports=tuple(exports),
            title=title or Path(path).name,
            evaluated_on=evaluated_on if scores else "",
            sensitivity_on=sensitivity_on if losses else "",
        )


def _written(file: Reader, watch: Watch) -> dict[str, Inspection]:
    """Files that hold a file's compressed life alone, written anew and measured, by coding."""
    advance, found = watch("writing", len(CODINGS) * len(file.names)), {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "alone.detent"
        for coding in CODINGS:
            alone(file, out, coding, advance)
            found[coding] = inspect(out)
    return found


def alone(file: Reader, out: Path, coding: Coding, advance: Callable[[], None]) -> None:
    """Write the compressed life of a file as a file of its own: nothing is fitted or rounded again."""
    header = file.header
    reasons = _reasons(file)
    mechanisms = {row["parameter"]: row["mechanism"] for row in header.plan}
    batchnorm, notes = header.card["batchnorm"], header.card["notes"]
    rounded = header.card["activations"]
    with Writer(out, "compressed", coding=coding, batchnorm=batchnorm, notes=notes, activations=rounded) as writer:
        coded = set(file.coded)
        for name in file.names:
            if name in coded:
                writer.add(name, None, encoded=file.encoded(name), mechanism=mechanisms[name])
            else:
                writer.add(name, file.tensor(name), reason=reasons.get(name, "buffer"))
            advance()
        for alias, name in file.aliases.items():
            writer.alias(alias, name)


def _reasons(file: Reader) -> dict[str, str]:
    """Why each parameter that is not compressed is not."""
    return {name: reason for reason, names in file.header.card["full_precision"].items() for name in names}


def card_of_file(path: str | os.PathLike[str]) -> Card:
    """The quantization card of a file.

    Raises:
        FormatError: the file is damaged or not one of ours.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent", notes={"epochs": 7})
        ...     card = card_of_file(f"{folder}/model.detent")
        >>> card.first, card.notes["epochs"]
        ('weight: Uniform(bits=3)', 7)
    """
    with Reader(path) as file:
        return card_of(file.header, file.names)


def run_of_file(path: str | os.PathLike[str] | Reader, model: nn.Module, life: Life = "both") -> Run:
    """A run with the targets and the fitted numbers of a file, on a model that gets one of its lives.

    As after `dt.compress`, but nothing is fitted again: the compressed life is the file's, and so are its BatchNorm
    statistics where the file has a second set.

    Args:
        path: a file that `dt.save` wrote, or a `Reader` of it.
        model: built by the same code; overwritten.
        life: "both" puts the full life into the model, "compressed" the compressed one.

    Raises:
        FormatError: the file is damaged or not one of ours.
        OSError: the file cannot be opened.
        ValueError: a model it does not fit, or a life that it does not hold.

    Example:
        >>> import tempfile, torch, detent as dt
        >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent")
        ...     again = run_of_file(f"{folder}/model.detent", nn.Linear(8, 8))
        >>> torch.equal(again.encoded()["weight"].decode(), run.encoded()["weight"].decode())
        True
    """
    with opened(path) as file:
        load(file, model, "full" if life == "both" else "compressed")
        encoded = {name: file.encoded(name) for name in file.coded}
        reasons, source = _reasons(file), file.header.card["batchnorm"]
        second = {n: file.tensor(n) for n in statistics_of(model)} if source not in ("none", "own") else {}
    weights = {name: sharding.whole(w) for name, w in named_parameters(model).items() if name in encoded}
    placed = {name: _placed(item, weights[name]) for name, item in encoded.items()}
    alike: list[tuple[Target, list[str]]] = []  # what shares a target was fitted together: a codebook, a threshold
    for name, (target, _, _) in placed.items():
        mine = next((names for other, names in alike if other == target), None)
        if mine is None:
            alike.append((target, [name]))
        else:
            mine.append(name)
    rules = [Rule(match=f"^({'|'.join(map(re.escape, names))})$", target=t, include=".") for t, names in alike]
    plan = Recipe(rules).resolve(model)
    claims = tuple(
        replace(claim, layout=encoded[claim.name].form.layout)
        if claim.claimed
        else replace(claim, reason=reasons.get(claim.name, claim.reason))
        for claim in plan.claims
    )
    run = Run(model, replace(plan, claims=claims), [], None, "raise")
    for entry in run._entries:
        _, params, chosen = placed[entry.name]
        entry.params = entry.pull_params = params.to(entry.param.device)
        entry.chosen = None if chosen is None else chosen.to(entry.param.device)
    run._adopt()
    if second:
        found = Statistics(second)
        found.source = source
        run._keep_statistics(found)
    return run


def _placed(item: Encoded, w: Tensor) -> tuple[Target, Params, Tensor | None]:
    """A target, the params with which it gives what a file holds, and the places if not the nearest were chosen."""
    try:
        params, places = item.target.restored(w, item.form), item.form.dense().to(w.device)
        if torch.equal(item.target.project(w, params), places):
            return item.target, params, None
        if torch.equal(item.target.project(places, params), places):  # a calibration chose others than the nearest
            return item.target, params, places
    except Exception:  # whatever a target makes of a form that it did not write
        pass
    held = Held(spec=json.dumps(to_spec(item.target)))
    return held, held.restored(w, item.form), None
