"""What a file holds, tensor by tensor: bits it takes, bits it could take, and how far its two lives are apart."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detent.grouping import near_dead
from detent.pack.coding import Coding, Piece, encode_tensor
from detent.pack.container import Reader, opened
from detent.pack.header import BUFFER, Row
from detent.specs import short_spec
from detent.targets.parts import Part

__all__ = ["Inspection", "distances", "entropy_bits", "inspect"]

_CHUNK = 1 << 20  # values compared at a time: bounds the memory of their float64 copies
_CODINGS: tuple[Coding, ...] = (
    "none",
    "bitpacked",
)  # by the first byte of a blob; every other byte is the entropy coder


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The numbers of a file.

    Attributes:
        rows: one a stored tensor, and one a shared codebook (its `weights` are 0), with
            name, shape, becomes; weights, kept (non-zero in the compressed life);
            nominal_bits (codes at true width, or the tensor in its own dtype);
            entropy_bits (codes at their zero-order entropy; raw numbers as nominal);
            bytes (written for the compressed life), index_bytes (of these, where survivors of a sparse target are),
            index_share, bits_per_weight; outputs of coded tensors of two or more axes (else 0) and near_dead, how many
            of them have no weight above a millionth of the tensor's largest, in the full life if the file has it;
            and for coded tensors in files with both lives
            error (|w - q|^2 / |w|^2) and wasserstein (1-Wasserstein distance of the values), else `None`.
        total: file, header and full (bytes), the same columns summed over all rows, `coded` and `raw` apart;
            bits_per_weight of the coded ones and of all; bits_per_conv_weight (weights of three and more dimensions,
            their codebooks included; `None` without any); error and wasserstein over all coded weights.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(torch.nn.Linear(64, 64), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent", coding="bitpacked")
        ...     found = inspect(f"{folder}/model.detent")
        >>> row = found.rows[0]
        >>> row["name"], row["nominal_bits"], row["bytes"], row["entropy_bits"] < row["nominal_bits"]
        ('weight', 8192, 1029, True)
    """

    rows: tuple[dict[str, Any], ...]
    total: dict[str, Any]


def inspect(path: str | os.PathLike[str] | Reader, *, advance: Callable[[], object] = lambda: None) -> Inspection:
    """Read a whole file, one tensor at a time, and measure every tensor of it.

    Args:
        path: a file that `save` wrote, or a `Reader` of it.
        advance: called after each tensor.

    Raises:
        FormatError: the file is damaged, of another version or not one of ours.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(torch.nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.TopK(keep=6))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = dt.save(run, f"{folder}/model.detent", "compressed")
        ...     found = inspect(f"{folder}/model.detent")
        >>> found.total["file"] == size, found.rows[0]["becomes"], found.rows[0]["kept"]
        (True, 'TopK(keep=6)', 6)
    """
    with opened(path) as file:
        rows = list(_shared_rows(file))
        for name, row in file._head.rows.items():
            rows.append(_row(file, name, row))
            advance()
        sizes = {"file": file.size, "full": sum(blob.length for blob in file._head.blobs if blob.bare)}
    taken = sum(row["bytes"] for row in rows if not row.pop("_bare"))
    total: dict[str, Any] = {**sizes, "header": sizes["file"] - sizes["full"] - taken}
    for part, mine in (
        ("all", rows),
        ("coded", [r for r in rows if r["coded"]]),
        ("raw", [r for r in rows if not r["coded"]]),
    ):
        total[part] = _summed(mine)
    coded = total["coded"]
    total["bits_per_weight"] = coded["bits_per_weight"]
    conv = [row for row in rows if row.pop("_conv")]
    total["bits_per_conv_weight"] = _summed(conv)["bits_per_weight"]
    both = [row for row in rows if row["error"] is not None]
    energy = sum(row["_energy"] for row in both)
    total["error"] = sum(row["error"] * row["_energy"] for row in both) / energy if energy else (0.0 if both else None)
    weights = sum(row["weights"] for row in both)
    total["wasserstein"] = sum(row["wasserstein"] * row["weights"] for row in both) / weights if weights else None
    for row in rows:
        del row["_energy"]
    return Inspection(rows=tuple(rows), total=total)


def _row(file: Reader, name: str, row: Row) -> dict[str, Any]:
    head = file._head
    blob, compressed = head.blobs[row.compressed], file.value(row, "compressed", view=True)
    found = _blank(name, row.shape, blob.length)
    found |= {"weights": compressed.numel(), "kept": int(torch.count_nonzero(compressed)), "_bare": blob.bare}
    if row.code is None:
        found["becomes"] = "buffer" if row.why == BUFFER else "full precision"
        found["nominal_bits"] = found["entropy_bits"] = 8 * compressed.numel() * compressed.dtype.itemsize
        found["_conv"] = len(row.shape) >= 3 and row.why != BUFFER
    else:
        becomes = short_spec(head.specs[row.code.target][0])
        found |= {"becomes": becomes, "coded": True, "_conv": len(row.shape) >= 3}
        found |= _codes(file, row.compressed, row.code.parts)
        layout, own = row.code.layout, compressed
        if row.full is not None:
            own = full = file.value(row, "full", view=True)
            found["error"], found["wasserstein"], found["_energy"] = distances(full, compressed)
        if len(row.shape) > 1:
            found |= {"outputs": layout.channels, "near_dead": near_dead(own, layout)}
    found["bits_per_weight"] = 8 * blob.length / found["weights"] if found["weights"] else None
    found["index_share"] = found["index_bytes"] / blob.length if blob.length else 0.0
    return found


def _blank(name: str, shape: Sequence[int], length: int) -> dict[str, Any]:
    return {
        "name": name,
        "shape": tuple(shape),
        "becomes": "",
        "coded": False,
        "weights": 0,
        "kept": 0,
        "nominal_bits": 0,
        "entropy_bits": 0.0,
        "bytes": length,
        "index_bytes": 0,
        "index_share": 0.0,
        "bits_per_weight": None,
        "outputs": 0,
        "near_dead": 0,
        "error": None,
        "wasserstein": None,
        "_energy": 0.0,
        "_conv": False,
        "_bare": False,
    }


def _shared_rows(file: Reader) -> Iterator[dict[str, Any]]:
    """Codebooks that several tensors share."""
    head = file._head
    for i, shared in enumerate(head.shared):
        users = [row for row in head.rows.values() if row.code is not None and row.code.shared == i]
        spec = next(head.specs[row.code.target][0] for row in users if row.code is not None)
        found = _blank(f"shared by {len(users)} tensors", (), head.blobs[shared.blob].length)
        found |= {"becomes": short_spec(spec), "coded": True, "_conv": any(len(row.shape) >= 3 for row in users)}
        yield found | _codes(file, shared.blob, shared.parts)


def _codes(file: Reader, index: int, parts: Sequence[Part]) -> dict[str, Any]:
    """Nominal and entropy bits of the codes of a blob, and the bytes of those that say where survivors are."""
    blob, data = file._head.blobs[index], file._opened.blob(index)
    roles = [part.role for part in parts]
    runs = list(zip(roles, blob.specs, file.pieces(index), strict=True))
    streams = [(spec, values) for role, spec, values in runs if role != "numbers"]
    nominal = sum(spec.width * values.size for spec, values in streams)
    entropy = sum(
        entropy_bits(values) if isinstance(spec.kind, int) else spec.width * values.size for spec, values in streams
    )
    where = [Piece(spec.name, spec.kind, values) for role, spec, values in runs if role == "where"]
    alone = 0
    if where:
        coding: Coding = _CODINGS[data[0]] if data[0] < len(_CODINGS) else "entropy"
        # In one blob pieces share their last bytes: what the pattern takes is what it takes alone.
        alone = min(len(encode_tensor(where, shape=blob.shape, coding=coding)) - 1, blob.length)
    return {"nominal_bits": nominal, "entropy_bits": entropy, "index_bytes": alone}


def entropy_bits(symbols: np.ndarray) -> float:
    """Zero-order entropy of a run of symbols times their number: `sum of -log2(share of each)`.

    Example:
        >>> entropy_bits(np.array([0, 1, 1, 0]))
        4.0
    """
    if not symbols.size:
        return 0.0
    counts = np.bincount(symbols.reshape(-1)).astype(np.float64)
    counts = counts[counts > 0]
    return float(symbols.size * math.log2(symbols.size) - (counts * np.log2(counts)).sum()) if counts.size > 1 else 0.0


def distances(w: Tensor, q: Tensor) -> tuple[float, float, float]:
    """Normalised squared error `|w - q|^2 / |w|^2`, 1-Wasserstein distance of the values, and `|w|^2`.

    Example:
        >>> distances(torch.tensor([1.0, -2.0]), torch.tensor([1.0, -1.0]))
        (0.2, 0.5, 5.0)
    """
    w, q = w.reshape(-1), q.reshape(-1)
    gap = energy = moved = 0.0
    for x, y in zip(w.split(_CHUNK), q.split(_CHUNK), strict=True):
        gap += float((x.double() - y.double()).square().sum())
        energy += float(x.double().square().sum())
    # The cheapest way of carrying one set of values over to another keeps their order.
    for x, y in zip(w.sort().values.split(_CHUNK), q.sort().values.split(_CHUNK), strict=True):
        moved += float((x.double() - y.double()).abs().sum())
    return (gap / energy if energy else 0.0), moved / max(w.numel(), 1), energy


def _summed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = ("weights", "kept", "nominal_bits", "entropy_bits", "bytes", "index_bytes", "outputs", "near_dead")
    found: dict[str, Any] = {key: sum(row[key] for row in rows) for key in keys}
    found["index_share"] = found["index_bytes"] / found["bytes"] if found["bytes"] else 0.0
    found["bits_per_weight"] = 8 * found["bytes"] / found["weights"] if found["weights"] else None
    return found
