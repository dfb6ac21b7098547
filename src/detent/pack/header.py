"""The header of a file: what it declares, how that is checked, and what a reader is shown of it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from pydantic import ConfigDict, Field, JsonValue, StringConstraints

from detent.grouping import Layout
from detent.recipe import from_spec, short
from detent.targets import Target

__all__ = [
    "BLOB",
    "BUFFER",
    "CLAIMED",
    "CODE_OF",
    "DTYPES",
    "REESTIMATED",
    "VERSION",
    "CodedRow",
    "FormatError",
    "Head",
    "Header",
    "Life",
    "SharedRow",
    "digest",
    "layout_of",
    "raw_bytes",
    "shown",
    "stream_bytes",
    "stream_width",
]

VERSION = 1
# No parameter or buffer can have this name: torch refuses empty names, so no canonical name starts with a dot.
BLOB = ".data"
BUFFER, CLAIMED, REESTIMATED = "buffer", "claimed", "buffer, re-estimated"

Life = Literal["both", "compressed"]
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_OF = {dtype: code for code, dtype in DTYPES.items()}


class FormatError(ValueError):
    """A file that is damaged, is not one of ours, or is of a version this release cannot read."""


# --- what the JSON may be: pydantic refuses everything else -------------------------------------------------------

Code = Literal["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"]
Count = Annotated[int, Field(ge=0, le=2**48)]
Shape = Annotated[tuple[Count, ...], Field(max_length=64)]
Digest = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{8}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[^.]")]


class RawRow(NamedTuple):
    """A tensor stored as it is. `why` points into `Head.why`: a buffer, or why a parameter is in full precision."""

    dtype: Code
    shape: Shape
    digest: Digest
    why: Count


class ParamRow(NamedTuple):
    """One of the fitted numbers that a target needs to decode."""

    name: str
    dtype: Code
    shape: Shape
    digest: Digest


class StreamRow(NamedTuple):
    """A run of codes: `kind` is bits a value, or the dtype of raw floats."""

    name: str
    kind: Annotated[int, Field(ge=1, le=16)] | Literal["F64", "F32", "F16", "BF16"]
    numel: Count
    digest: Digest


class SharedRow(NamedTuple):
    """Numbers and runs of codes that several coded tensors have in common: a global codebook."""

    params: tuple[ParamRow, ...]
    streams: tuple[StreamRow, ...]


class CodedRow(NamedTuple):
    """A tensor stored as codes.

    `target` points into `Head.targets`; `layout` is (channel_dim, conv_groups); `shared` points into `Head.shared`.
    """

    target: Count
    dtype: Code
    shape: Shape
    layout: tuple[Count, Count]
    params: tuple[ParamRow, ...]
    streams: tuple[StreamRow, ...]
    shared: Count | None


class Head(pydantic.BaseModel):
    """The whole header, as in docs/format.md."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    writer: str
    life: Life
    batchnorm: Literal["none", "own", "re-estimated"]
    targets: tuple[tuple[dict[str, JsonValue], str], ...]
    why: tuple[str, ...]
    aliases: dict[Name, Name]
    shared: tuple[SharedRow, ...]
    coded: dict[Name, CodedRow]
    rest: dict[Name, RawRow]
    full: dict[Name, RawRow]
    notes: dict[str, JsonValue]

    def build_targets(self) -> list[Target]:
        """The targets that the specs stand for.

        Raises:
            ValueError: an unknown kind, or a spec that is no target.
        """
        built = []
        for i, (spec, _) in enumerate(self.targets):
            target = from_spec(spec, f"targets[{i}]")
            if not isinstance(target, Target):
                raise ValueError(f"targets[{i}]: {spec.get('kind')!r} is not a target")
            built.append(target)
        return built

    def blob_bytes(self) -> int:
        """Size of the block that holds codes, params and raw rest."""
        pieces = (*self.shared, *self.coded.values())
        coded = sum(raw_bytes(n) for row in pieces for n in row.params)
        coded += sum(stream_bytes(r) for row in pieces for r in row.streams)
        return coded + sum(raw_bytes(row) for row in self.rest.values())

    def check(self) -> None:
        """Check what the types cannot say.

        Raises:
            ValueError: rows that contradict each other.
        """
        targets = self.build_targets()
        for name, row in self.coded.items():
            _check_coded(name, row, targets, self.shared)
        if odd := set(range(len(self.shared))) - {row.shared for row in self.coded.values()}:
            raise ValueError(f"shared[{min(odd)}] belongs to no tensor")
        for name, raw in (*self.rest.items(), *self.full.items()):
            if raw.why >= len(self.why):
                raise ValueError(f"{name!r} points at reason {raw.why} of {len(self.why)}")
        if self.life == "compressed":
            if self.full:
                raise ValueError("a compressed file holds a full life")
            if both := self.coded.keys() & self.rest.keys():
                raise ValueError(f"{min(both)!r} is stored twice")
        for name, row in (*self.coded.items(), *self.rest.items()) if self.life == "both" else ():
            whole = self.full.get(name)
            if whole is None or (whole.dtype, whole.shape) != (row.dtype, row.shape):
                raise ValueError(f"{name!r} differs between the two lives in more than its values")
        names = self.names()
        for alias, name in self.aliases.items():
            if alias in names or name not in names:
                raise ValueError(f"alias {alias!r} of {name!r} is stored itself or stands for nothing")

    def names(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor by name."""
        rows = self.full if self.life == "both" else {**self.coded, **self.rest}
        return {name: (row.dtype, row.shape) for name, row in rows.items()}


def _check_coded(name: str, row: CodedRow, targets: list[Target], shared: tuple[SharedRow, ...]) -> None:
    axis, groups = row.layout
    if row.target >= len(targets):
        raise ValueError(f"{name!r} points at target {row.target} of {len(targets)}")
    if axis > 1 or groups < 1 or (axis == 1 and len(row.shape) < 2) or (axis == 0 and groups != 1):
        raise ValueError(f"{name!r} has the impossible layout {row.layout}")
    if not DTYPES[row.dtype].is_floating_point:
        raise ValueError(f"{name!r} has codes but is {row.dtype}")
    target = targets[row.target]
    reason = target.accepts(row.shape, DTYPES[row.dtype], layout_of(row))
    if reason:
        raise ValueError(f"{name!r}: {reason}")
    common = SharedRow(params=(), streams=())
    if row.shared is not None:
        if row.shared >= len(shared):
            raise ValueError(f"{name!r} points at shared[{row.shared}] of {len(shared)}")
        common = shared[row.shared]
    if {piece.name for piece in (*common.params, *common.streams)} - set(target.shared) or (
        {piece.name for piece in (*row.params, *row.streams)} & set(target.shared)
    ):
        raise ValueError(f"{name!r} shares what is its own for {type(target).__name__}, or the other way round")
    if sorted(number.name for number in (*row.params, *common.params)) != sorted(target.stored):
        raise ValueError(f"{name!r} lacks numbers that {type(target).__name__} decodes with, or has others")
    streams = (*row.streams, *common.streams)
    if len({stream.name for stream in streams}) != len(streams):
        raise ValueError(f"{name!r} has two streams of one name")


def layout_of(row: CodedRow) -> Layout:
    """The layout of a coded tensor."""
    return Layout(shape=row.shape, channel_dim=row.layout[0], conv_groups=row.layout[1])


def raw_bytes(row: RawRow | ParamRow) -> int:
    """Bytes of a tensor stored as it is."""
    return math.prod(row.shape) * DTYPES[row.dtype].itemsize


def stream_width(row: StreamRow) -> int:
    """Bits a value."""
    return row.kind if isinstance(row.kind, int) else 8 * DTYPES[row.kind].itemsize


def stream_bytes(row: StreamRow) -> int:
    """Bytes of a run of codes, padded to whole bytes."""
    return -(-row.numel * stream_width(row) // 8)


def digest(data: Any) -> str:
    """The first 48 bits of SHA-256, in 8 characters.

    As short as a CRC-32 in hexadecimal, but any damage slips through once in 2^48, not once in 2^32, whatever its
    pattern. It guards against accidents: whoever can change a file on purpose can change its checksums too.
    """
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:6]).decode()


# --- what a reader is shown ---------------------------------------------------------------------------------------


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
        >>> import tempfile, detent as dt
        >>> run = dt.compress(torch.nn.Linear(16, 4), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent", notes={"author": "me"})
        ...     header = dt.pack.read_header(f"{folder}/model.detent")
        >>> header.card["notes"], header.tensors["weight"]["becomes"], header.tensors["weight"]["bytes"]
        ({'author': 'me'}, 'Uniform(bits=2)', 20)
    """

    version: int
    writer: str
    life: Life
    plan: tuple[Mapping[str, Any], ...]
    card: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]


def shown(head: Head) -> Header:
    """The header as a reader sees it."""
    targets = head.build_targets()
    kept = {**head.full, **(head.rest if head.life == "compressed" else {})}
    reasons = {name: head.why[row.why] for name, row in kept.items()}
    tensors: dict[str, dict[str, Any]] = {}
    for name, row in head.coded.items():
        size = sum(map(raw_bytes, row.params)) + sum(map(stream_bytes, row.streams))
        tensors[name] = {
            "dtype": str(DTYPES[row.dtype]).removeprefix("torch."),
            "shape": row.shape,
            "becomes": short(targets[row.target]),
            "bytes": size,
            "bits_per_weight": 8 * size / math.prod(row.shape),
        }
    for name, raw in kept.items():
        if name not in tensors:
            kind = "buffer" if reasons[name] == BUFFER else "full precision"
            dtype = str(DTYPES[raw.dtype]).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": raw.shape, "becomes": kind, "bytes": raw_bytes(raw)}
    return Header(
        version=VERSION,
        writer=head.writer,
        life=head.life,
        plan=tuple(_plan(head, tensors, reasons)),
        card=_card(head, targets, tensors, reasons),
        tensors=tensors,
    )


def _plan(head: Head, tensors: Mapping[str, Mapping[str, Any]], reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    for name, tensor in tensors.items():
        if tensor["becomes"] == "buffer":
            continue
        others = ", ".join(alias for alias, first in head.aliases.items() if first == name)
        why = "" if name in head.coded else reasons[name]
        rows.append(
            {
                "parameter": name,
                "shape": tensor["shape"],
                "becomes": tensor["becomes"],
                "mechanism": head.targets[head.coded[name].target][1] if name in head.coded else "",
                "note": "; ".join(part for part in (why, f"tied: {others}" if others else "") if part),
            }
        )
    return rows


def _card(
    head: Head, targets: list[Target], tensors: Mapping[str, Mapping[str, Any]], reasons: Mapping[str, str]
) -> dict[str, Any]:
    compressed = []
    for i, target in enumerate(targets):
        mine = [row for row in head.coded.values() if row.target == i]
        granularity = getattr(target, "granularity", target.scope)
        compressed.append(
            {
                "target": short(target),
                "granularity": granularity if isinstance(granularity, str) else short(granularity),
                "mechanism": head.targets[i][1],
                "tensors": len(mine),
                "weights": sum(math.prod(row.shape) for row in mine),
            }
        )
    full_precision: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor["becomes"] == "full precision":
            full_precision.setdefault(reasons[name], []).append(name)
    parameters = [tensor for tensor in tensors.values() if tensor["becomes"] != "buffer"]
    return {
        "compressed": compressed,
        "compressed_weights": sum(row["weights"] for row in compressed),
        "weights": sum(math.prod(tensor["shape"]) for tensor in parameters),
        "full_precision": full_precision,
        "batchnorm": head.batchnorm,
        "notes": dict(head.notes),
    }
