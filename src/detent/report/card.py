"""The quantization card: what of a network is compressed and how, as data, text and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import pydantic
from pydantic import JsonValue

from detent.pack.shown import Header

__all__ = ["Card", "CardTarget", "card_of"]

# What a reader asks first and a file can only know from its notes.
_ASKED = {"data": "training data", "epochs": "epochs", "calibration": "calibration data"}


class CardTarget(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One kind of place that weights were put in."""

    target: str
    granularity: str
    symmetry: str
    mechanism: str
    tensors: int
    weights: int


class Card(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What is compressed and what is not, and how it was done.

    Attributes:
        weights: parameters of the network.
        compressed_weights: those of them that are stored as codes.
        targets: where the compressed ones lie.
        first: name of the first weight of two or more axes, and what it became.
        last: the last one.
        full_precision: names of parameters left as they were, by reason.
        batchnorm: "none", "own" (one set of statistics for both lives), "re-estimated" or "corrected" (a second set).
        lives: what a file holds, "both" or "compressed"; "run" if it is the card of a run, which is no file yet.
        writer: version of Detent.
        notes: what the author said.
        activations: how inputs of layers are rounded, and of which.

    Example:
        >>> import detent as dt
        >>> from torch import nn
        >>> from detent.report import collect
        >>> run = dt.compress(nn.Linear(4, 4), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
        >>> print(collect(run).card.text().splitlines()[0])
        compressed: 16 of 20 parameters (80.0 %)
    """

    weights: int
    compressed_weights: int
    targets: tuple[CardTarget, ...]
    first: str
    last: str
    full_precision: dict[str, tuple[str, ...]]
    batchnorm: str
    lives: str
    writer: str
    notes: dict[str, JsonValue]
    activations: dict[str, tuple[str, ...]] = {}

    def rows(self) -> list[tuple[str, str]]:
        """The card as (heading, sentence) pairs."""
        share = 100 * self.compressed_weights / max(self.weights, 1)
        rows = [("compressed", f"{self.compressed_weights:,} of {self.weights:,} parameters ({share:.1f} %)")]
        for kind in self.targets:
            pull = f"pulled there by {kind.mechanism}" if kind.mechanism else "put there without training"
            many = f"{kind.tensors} tensor{'s' if kind.tensors != 1 else ''}, {kind.weights:,} weights"
            rows.append(("target", f"{kind.target}: {many}; one fit a {kind.granularity}; {kind.symmetry}; {pull}"))
        rows += [("first weight", self.first), ("last weight", self.last)]
        for reason, names in self.full_precision.items():
            rows.append(("full precision", f"{reason}: {_some(names)}"))
        source, *rounding = self.batchnorm.split(", ")
        rows += [
            ("BatchNorm", "; ".join([_BATCHNORM.get(source, source), *rounding])),
            *(("activations", f"{said}: what goes into {_some(names)}") for said, names in self.activations.items()),
        ]
        if not self.activations:
            rows.append(("activations", "floating point: this file holds no activation ranges"))
        for key, what in _ASKED.items():
            said = self.notes.get(key)
            missing = f'not stated; say it with dt.save(..., notes={{"{key}": ...}})'
            rows.append((what, missing if said is None else str(said)))
        rows += [(key, str(value)) for key, value in self.notes.items() if key not in _ASKED]
        where = "both lives, of a run" if self.lives == "run" else f"lives in the file: {self.lives}"
        return [*rows, ("made with", f"Detent {self.writer}; {where}")]

    def text(self) -> str:
        """The card as plain lines.

        Example:
            >>> Card(weights=4, compressed_weights=0, targets=(), first="a: full precision", last="a: full precision",
            ...      full_precision={}, batchnorm="none", lives="both", writer="1", notes={}).text().splitlines()[1]
            'first weight: a: full precision'
        """
        return "\n".join(f"{head}: {text}" for head, text in self.rows())

    def markdown(self, title: str = "Quantization card") -> str:
        """The card as a Markdown table, for a README or a model page.

        Args:
            title: heading above the table.
        """

        def cell(text: str) -> str:
            return text.replace("|", "\\|").replace("\n", " ")

        lines = [f"## {title}", "", "| | |", "|---|---|"]
        return "\n".join([*lines, *(f"| {cell(head)} | {cell(text)} |" for head, text in self.rows())]) + "\n"


_BATCHNORM = {
    "none": "none with running statistics",
    "own": "statistics are those of training, alike in both lives; not re-estimated",
    "corrected": "statistics moved with the inputs that calibration saw changing; a second set of buffers",
    "re-estimated": "statistics re-estimated for the compressed life, on data after training; a second set of buffers",
}


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def card_of(header: Header, order: Sequence[str]) -> Card:
    """The card of a file.

    Args:
        header: what `dt.pack.read_header` gave.
        order: names of the parameters in the model's order, as far as it is known.
    """
    card, becomes = header.card, {row["parameter"]: row["becomes"] for row in header.plan}
    kinds = [CardTarget(**kind) for kind in card["compressed"]]
    ranked = [name for name in order if name in becomes and len(header.tensors[name]["shape"]) > 1]
    rounded: dict[str, tuple[str, ...]] = {}
    for row in card["activations"]:
        rounded[row["said"]] = (*rounded.get(row["said"], ()), row["module"])
    ends = [f"{name}: {becomes[name]}" for name in (ranked[:1] + ranked[-1:])] or ["none", "none"]
    return Card(
        weights=card["weights"],
        compressed_weights=card["compressed_weights"],
        targets=tuple(kinds),
        first=ends[0],
        last=ends[-1],
        full_precision={reason: tuple(names) for reason, names in card["full_precision"].items()},
        batchnorm=card["batchnorm"],
        lives=header.life,
        writer=header.writer,
        notes=dict(card["notes"]),
        activations=rounded,
    )
