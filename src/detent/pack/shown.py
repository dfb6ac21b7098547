"""What a reader is shown of a header: one row a tensor, the plan, and what was compressed and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detent.grouping import Channel, Granularity, PerTensor
from detent.pack.header import BUFFER, DTYPES, VERSION, Head, Life
from detent.specs import short, short_spec
from detent.targets.forms import Codewords, Floats, Grid, Outline, Sparse

__all__ = ["Header", "shown", "symmetry"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself.

    Attributes:
        version: version of the format.
        writer: version of Detent that wrote the file.
        life: which lives it holds, "both" or "compressed".
        plan: one row a parameter: parameter, shape, becomes, mechanism, note; claimed parameters first.
        card: what was compressed and how, what stays full precision and why, where the BatchNorm statistics come
            from, the user's notes.
        tensors: by name: dtype, shape, becomes, bytes (in the compressed life) and, for claimed ones,
            bits_per_weight (codes and params).

    Example:
        >>> import tempfile, torch, detent as dt
        >>> run = dt.compress(torch.nn.Linear(16, 4), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent", notes={"author": "me"})
        ...     header = dt.pack.read_header(f"{folder}/model.detent")
        >>> header.card["notes"], header.tensors["weight"]["becomes"], header.tensors["weight"]["bytes"] < 22
        ({'author': 'me'}, 'Uniform(bits=2)', True)
    """

    version: int
    writer: str
    life: Life
    plan: tuple[Mapping[str, Any], ...]
    card: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]

    def __repr__(self) -> str:
        """In a line; a big model's rows are kilobytes."""
        card, rows = self.card, self.card["compressed"]
        kinds = [f"{row['tensors']} x {row['target']}" for row in rows[:3]]
        kinds += [f"{len(rows) - 3} more targets"] if len(rows) > 3 else []
        size = sum(tensor["bytes"] for tensor in self.tensors.values())
        return (
            f"<Header: format {self.version} by Detent {self.writer}, lives: {self.life}; {len(self.tensors)} tensors, "
            f"compressed life {size:,} bytes; {card['compressed_weights']:,} of {card['weights']:,} parameters "
            f"compressed: {', '.join(kinds) or 'none'}>"
        )


def shown(head: Head) -> Header:
    """The header as a reader sees it."""
    tensors: dict[str, dict[str, Any]] = {}
    # Claimed parameters first: they are what one looks for.
    for name, row in sorted(head.rows.items(), key=lambda item: item[1].code is None):
        tensor: dict[str, Any] = {"dtype": str(DTYPES[row.dtype]).removeprefix("torch."), "shape": row.shape}
        size = head.blobs[row.compressed].length
        if row.code is not None:
            becomes = short_spec(head.specs[row.code.target][0])
            tensor |= {"becomes": becomes, "bytes": size, "bits_per_weight": 8 * size / math.prod(row.shape)}
        else:
            tensor |= {"becomes": "buffer" if row.why == BUFFER else "full precision", "bytes": size}
        tensors[name] = tensor
    return Header(
        version=VERSION,
        writer=head.writer,
        life=head.life,
        plan=tuple(_plan(head, tensors)),
        card=_card(head, tensors),
        tensors=tensors,
    )


def _plan(head: Head, tensors: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    others: dict[str, list[str]] = {}
    for alias, name in head.aliases.items():
        others.setdefault(name, []).append(alias)
    rows = []
    for name, tensor in tensors.items():
        if tensor["becomes"] == "buffer":
            continue
        row = head.rows[name]
        why = row.why if row.code is None else ""
        tied = f"tied: {', '.join(others[name])}" if name in others else ""
        rows.append(
            {
                "parameter": name,
                "shape": tensor["shape"],
                "becomes": tensor["becomes"],
                "mechanism": head.specs[row.code.target][1] if row.code else "",
                "note": "; ".join(part for part in (why, tied) if part),
            }
        )
    return rows


def _card(head: Head, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    compressed = []
    for i, (spec, mechanism) in enumerate(head.specs):
        mine = [row for row in head.rows.values() if row.code is not None and row.code.target == i]
        outline = next((row.code.outline for row in mine if row.code is not None), None)
        if outline is None:  # metadata of nothing
            continue
        compressed.append(
            {
                "target": short_spec(spec),
                "granularity": _granularity(outline),
                "symmetry": symmetry(outline),
                "mechanism": mechanism,
                "tensors": len(mine),
                "weights": sum(math.prod(row.shape) for row in mine),
            }
        )
    full_precision: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor["becomes"] == "full precision":
            full_precision.setdefault(head.rows[name].why, []).append(name)
    parameters = [tensor for tensor in tensors.values() if tensor["becomes"] != "buffer"]
    return {
        "compressed": compressed,
        "compressed_weights": sum(row["weights"] for row in compressed),
        "weights": sum(math.prod(tensor["shape"]) for tensor in parameters),
        "full_precision": full_precision,
        "batchnorm": head.batchnorm,
        "activations": [dict(row) for row in head.activations],
        "notes": dict(head.notes),
    }


def _granularity(outline: Outline) -> str:
    """What shares fitted numbers."""
    if outline.kind is Sparse:
        return _granularity(outline.fields["inside"])
    if outline.kind is Codewords:
        return "rule" if outline.fields["is_shared"] else "tensor"
    groups: Granularity = outline.fields.get("granularity", PerTensor())
    return "channel" if isinstance(groups, Channel) else "tensor" if isinstance(groups, PerTensor) else short(groups)


def symmetry(outline: Outline) -> str:
    """How the levels of a form lie around zero."""
    if outline.kind is Sparse:
        inside = outline.fields["inside"]
        is_free = inside.kind is Floats
        return "survivors stay in full precision" if is_free else f"survivors {symmetry(inside)}; zero between"
    if outline.kind is Grid:
        return f"symmetric, {'with' if outline.fields['zero'] else 'without'} a zero"
    words = {Codewords: "codewords, no symmetry asked for", Floats: "its levels cannot be listed"}
    return words.get(outline.kind, "not symmetric (levels of a table)")
