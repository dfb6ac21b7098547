"""What goes into the layers of a model, as a second kind of claim: which inputs are rounded, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from detent.parameters import canonical_name, multiplies
from detent.quantizers import Quantizer
from detent.specs import and_more, check_pattern, nearest, short

__all__ = ["Activation", "Input", "inputs_of", "modules_of", "said_of"]

_KNOWN = ("@layers", "@first", "@last")


@dataclass(frozen=True, kw_only=True)
class Activation:
    """How the inputs of some modules are rounded: the first tensor that each is called with.

    Inputs rather than outputs, so that the sums of residual networks are covered. The quantizer's own numbers move
    beside the optimizer, at its relative rate, and are saved and resumed with the run.

    Args:
        match: regular expression searched in the module's name, or "@layers" for every linear layer and convolution, or
            "@first" / "@last" for the first / last of them. For each module the first entry that matches wins.
        quantizer: how they are rounded; not with `keep`.
        keep: leave them in floating point.
        training: round in training as well, so that the network learns with it. With False the full life stays in
            floating point: ranges are watched, and only `run.compressed()` rounds.

    Raises:
        ValueError: an invalid regular expression, both or neither of `quantizer` and `keep`, or a quantizer that learns
            its scale where `training` is False.

    Example:
        >>> import detent as dt
        >>> grid = dt.Rule(match="@weights", target=dt.Uniform(bits=4), mechanism=dt.STE())
        >>> recipe = dt.Recipe([grid], activations=[dt.Activation(quantizer=dt.LearnedStep(bits=4))])
        >>> recipe.activations[0].match
        '@layers'
    """

    match: str = "@layers"
    quantizer: Quantizer | None = None
    keep: bool = False
    training: bool = True

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        if self.quantizer is not None and not isinstance(self.quantizer, Quantizer):
            given = self.quantizer
            called = f"{given.__name__}(...), not the class" if isinstance(given, type) else f"not {given!r}"
            raise ValueError(f"Activation(match={self.match!r}, quantizer=...): must be a Quantizer, {called}")
        check_pattern(self.match, "Activation(match", _KNOWN)
        for name in ("keep", "training"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Activation({name}={getattr(self, name)!r}): must be True or False")
        if self.keep == (self.quantizer is not None):
            raise ValueError(f"Activation(match={self.match!r}): give either quantizer= or keep=True")
        if self.quantizer is not None and self.quantizer.learns != "no" and not self.training:
            kind = type(self.quantizer).__name__
            raise ValueError(
                f"Activation(match={self.match!r}, training=False): {kind} learns from rounding in training; use "
                "RunningRange"
            )


@dataclass(frozen=True, kw_only=True)
class Input:
    """One module whose inputs are rounded.

    Args:
        name: canonical name of the module.
        entry: index of the `Activation` that claims it.
    """

    name: str
    entry: int


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by canonical name; of a wrapper and what it wraps the latter."""
    return {canonical_name(name): module for name, module in model.named_modules()}


def inputs_of(entries: Sequence[Activation], model: nn.Module, ends: Mapping[str, Iterable[str]]) -> tuple[Input, ...]:
    """The modules whose inputs are rounded, in the model's order.

    Args:
        entries: first match wins.
        model: the model.
        ends: names of the first and last layers' weights, by "@first" and "@last".

    Raises:
        ValueError: an entry that matches no module.
    """
    if not entries:
        return ()
    at_end = {end: {name.rpartition(".")[0] for name in names} for end, names in ends.items()}
    patterns = [re.compile(entry.match) for entry in entries]
    matched = [0] * len(entries)
    found = []
    modules = modules_of(model)
    for name, module in modules.items():
        speaks = [
            multiplies(module) and (entry.match == "@layers" or name in at_end.get(entry.match, ()))
            if entry.match.startswith("@")
            else bool(name) and pattern.search(name) is not None
            for entry, pattern in zip(entries, patterns, strict=True)
        ]
        for i, hit in enumerate(speaks):
            matched[i] += hit
        first = next((i for i, hit in enumerate(speaks) if hit), None)
        if first is not None and not entries[first].keep:
            found.append(Input(name=name, entry=first))
    for i, entry in enumerate(entries):
        if not matched[i]:
            hint = nearest(entry.match, modules)
            if at_end.get(entry.match):
                names = ", ".join(map(repr, sorted(ends[entry.match])))
                hint = f": {names} belongs to no linear layer or convolution; leave this entry out"
            raise ValueError(f"activations[{i}] (match={entry.match!r}) matches no module of this model{hint}")
    return tuple(found)


def said_of(inputs: Sequence[Input], entries: Sequence[Activation]) -> list[str]:
    """A line for each kind of rounding, for a plan."""
    by_entry: dict[int, list[str]] = {}
    for each in inputs:
        by_entry.setdefault(each.entry, []).append(each.name)
    lines = []
    for i, names in sorted(by_entry.items()):
        when = "" if entries[i].training else ", outside training"
        lines.append(f"inputs of {names[0] or 'the model'}{and_more(names)}: {short(entries[i].quantizer)}{when}")
    return lines
