"""A reader written from docs/format.md by somebody who has never seen the library: Python's own library and msgpack."""

from __future__ import annotations

import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import msgpack

PAGE = Path(__file__).resolve().parent.parent / "docs" / "format.md"
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")
DTYPES += ("U16", "U32", "U64", "C64")
SIZE: dict[str, int] = dict(zip(DTYPES, (4, 2, 2, 8, 8, 4, 2, 1, 1, 1, 1, 1, 2, 4, 8, 8), strict=True))
FLOATS = ("F32", "F16", "BF16", "F64")
STRUCT = {"F32": "f", "F16": "e", "F64": "d", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}
STRUCT |= {"U16": "H", "U32": "I", "U64": "Q", "C64": "Q"}  # of a complex number its bits


def dictionary() -> bytes:
    """The one text block of the page that starts with the words of the dictionary."""
    (found,) = re.findall(r"```text\n(float32 bfloat16.*?)\n```", PAGE.read_text(), re.DOTALL)
    return found.encode("ascii")


def split(raw: bytes) -> tuple[dict[str, Any], list[int], bytes]:
    """Header, checksums, and the bytes of all blobs."""
    assert raw[:8] == b"\x89Detent\x02"
    length, check = struct.unpack("<II", raw[-8:])
    packed = raw[-8 - length : -8]
    assert zlib.crc32(packed) == check
    inflate = zlib.decompressobj(-15, dictionary())
    unpacker = msgpack.Unpacker()
    unpacker.feed(inflate.decompress(packed))
    checks = inflate.unused_data
    return parse(list(unpacker)), list(struct.unpack(f"<{len(checks) // 4}I", checks)), raw[8 : -8 - length]


def parse(values: list[Any]) -> dict[str, Any]:
    """Section 3, value by value."""
    it = iter(values)

    def many(read: Any) -> list[Any]:
        return [read() for _ in range(next(it))]

    def form() -> dict[str, Any]:
        kind = next(it)
        if kind < 2:
            return {"kind": kind, "why": next(it), "dtypes": [next(it) for _ in range(2 + kind)]}
        keys = ("dtype", "target", "axis", "groups", "shared")
        return {"kind": kind} | {key: next(it) for key in keys} | {"numbers": many(lambda: next(it))}

    head: dict[str, Any] = {key: next(it) for key in ("writer", "life", "batchnorm")}
    head["targets"] = many(lambda: [next(it), next(it)])
    head["why"] = many(lambda: next(it))
    head["forms"] = many(form)
    head["names"] = next(it)
    names = head["names"].split("\n") if head["names"] else []
    head["rows"] = [next(it) for _ in names]
    head["shapes"] = [many(lambda: next(it)) for _ in names]
    rest = list(it)
    # How many counts and lengths there are follows from the forms.
    blobs = list(order(head))
    counts = sum(any(piece[2] == "listed" for piece in blob["pieces"]) for blob in blobs)
    lengths = sum(not blob["bare"] for blob in blobs)
    head["counts"], head["lengths"], rest = rest[:counts], rest[counts : counts + lengths], rest[counts + lengths :]
    head["aliases"] = [rest[i : i + 2] for i in range(1, 1 + 2 * rest[0], 2)]
    (head["notes"],) = rest[1 + 2 * rest[0] :]
    return head


def order(head: dict[str, Any]) -> Any:
    """The blobs in the order in which they lie in the file, each with its pieces as (name, kind, count)."""
    seen, names = 0, head["names"].split("\n") if head["rows"] else []
    for name, row, shape in zip(names, head["rows"], head["shapes"], strict=True):
        form = head["forms"][row]
        mine = {"name": name, "shape": shape, "form": form, "bare": False}
        if form["kind"] == 2:
            told = pieces(iter(form["numbers"]), shape, form["axis"], form["groups"])
            if form["shared"] == seen + 1:
                yield mine | {"name": f"shared {seen}", "shape": None, "pieces": [p[:3] for p in told if p[3]]}
                seen += 1
            yield mine | {"pieces": [piece[:3] for piece in told if not piece[3]]}
        elif form["kind"] == 1 or head["life"] == 0:
            yield mine | {"pieces": [("raw", DTYPES[form["dtypes"][-1]], math.prod(shape))]}
        if head["life"] == 1:
            dtype = form["dtype"] if form["kind"] == 2 else form["dtypes"][1]
            yield mine | {"bare": True, "pieces": [("raw", DTYPES[dtype], math.prod(shape))]}


def pieces(it: Any, shape: list[int], axis: int, groups: int) -> list[Any]:
    """Section 6: the pieces that a form's numbers stand for, as (name, kind, count, whether it is shared)."""
    kind, weights = next(it), math.prod(shape)
    channels = math.prod(n for i, n in enumerate(shape) if i == axis % 16 or axis >> 4 + i & 1) * groups

    def counted(granularity: int) -> int:
        run = weights // channels
        return (
            1 if granularity == 0 else channels if granularity == 1 else channels * -(-run // min(granularity - 1, run))
        )

    def codes(values: int, count: int) -> list[Any]:
        return [("codes", (values - 1).bit_length(), count, False)] if values > 1 else []

    if kind == 0:
        granularity, store, n, zero, _ = (next(it) for _ in range(5))
        scale = [("scale", FLOATS[store - 1], counted(granularity), False)] if store else []
        return [*scale, *codes(2 * n + zero, weights)]
    if kind == 1:
        granularity, store, levels = (next(it) for _ in range(3))
        return [("levels", FLOATS[store], counted(granularity) * levels, False), *codes(levels, weights)]
    if kind == 2:
        granularity, store, width, size, length, shared = (next(it) for _ in range(6))
        index, shared = codes(size, weights // length), bool(shared)
        if not width:
            return [("book", FLOATS[store], size * length, shared), *index]
        return [
            ("scale", FLOATS[store], counted(granularity), shared), *index, ("book", width, size * length, shared)
        ]  # fmt: skip
    if kind == 3:
        return [("values", FLOATS[next(it)], weights, False)]
    assert kind == 4
    pattern = next(it)
    if pattern == 1:
        rows, columns = next(it), next(it)
        where = [("mask", 1, -(-channels // rows) * -(-(weights // channels) // columns), False)]
    else:
        assert pattern == 0, "the ranks of blocks are for a longer reader"
        where = [("mask", 1, weights, False)]
    inside = pieces(it, shape, axis, groups)
    survivors = [(*inside[-1][:2], "listed" if pattern else "ones", False)] if inside[-1][0] != "scale" else []
    return inside[: len(inside) - len(survivors)] + where + survivors


def lengths(head: dict[str, Any]) -> list[int]:
    """The length of every blob."""
    told = iter(head["lengths"])
    found = []
    for blob, pieces in described(head):
        found.append(bare_bytes(blob) if blob["bare"] else next(told) or packed_bytes(pieces))
    return found


def bare_bytes(blob: dict[str, Any]) -> int:
    ((_, kind, count),) = blob["pieces"]
    return SIZE[kind] * count


def packed_bytes(pieces: list[Any]) -> int:
    bits = [(count, kind if isinstance(kind, int) else 8 * SIZE[kind]) for _, kind, count in pieces]
    return bool(pieces) + sum(-(-count * width // 8) for count, width in bits)


def described(head: dict[str, Any]) -> Any:
    """Every blob with its pieces as (name, kind, count); no count means the ones of a mask."""
    counts = iter(head["counts"])
    for blob in order(head):
        told = {"ones": None} | ({"listed": next(counts)} if any(p[2] == "listed" for p in blob["pieces"]) else {})
        yield blob, [(name, kind, told.get(count, count)) for name, kind, count in blob["pieces"]]


def blobs(raw: bytes) -> dict[tuple[str, bool], list[list[float]]]:
    """The numbers of every piece, by name and life; only for files whose codes are bit-packed or whole bytes."""
    head, checks, data = split(raw)
    found, at = {}, 0
    for (blob, pieces), length, check in zip(described(head), lengths(head), checks, strict=True):
        piece, at = data[at : at + length], at + length
        assert zlib.crc32(piece) == check, blob["name"]
        found[blob["name"], blob["bare"]] = values(piece, pieces, blob["bare"])
    assert at == len(data)
    return found


def values(data: bytes, pieces: list[Any], bare: bool) -> list[list[float]]:
    """The pieces of one blob: bit-packed (first byte 1), integers in whole bytes (0), or bare numbers."""
    packed = bare or (bool(pieces) and data[0] == 1)
    found, at, ones = [], 0 if bare else bool(pieces), 0
    for _, kind, count in pieces:
        count = ones if count is None else count
        if isinstance(kind, str):
            size = SIZE[kind] * count
            # bfloat16 is the upper half of a float32
            plain = (
                data[at : at + size]
                if kind != "BF16"
                else b"".join(b"\0\0" + data[i : i + 2] for i in range(at, at + size, 2))
            )
            found.append(list(struct.unpack(f"<{count}{STRUCT['F32' if kind == 'BF16' else kind]}", plain)))
        else:
            width = kind if packed else (8 if kind <= 8 else 16)
            size = -(-count * width // 8)
            number = int.from_bytes(data[at : at + size], "little")
            found.append([number >> i * width & (1 << width) - 1 for i in range(count)])
            ones = sum(found[-1]) if kind == 1 else ones
        at += size
    assert at == len(data)
    return found


# --- and a writer of headers, for what no reader may take ---------------------------------------------------------


def flat(head: dict[str, Any]) -> list[Any]:
    """The inverse of `parse`."""

    def many(items: list[Any], write: Any = lambda item: [item]) -> list[Any]:
        return [len(items), *(value for item in items for value in write(item))]

    def form(item: dict[str, Any]) -> list[Any]:
        if "why" in item:
            return [item["kind"], item["why"], *item["dtypes"]]
        return [item[key] for key in ("kind", "dtype", "target", "axis", "groups", "shared")] + many(item["numbers"])

    found = [head["writer"], head["life"], head["batchnorm"], *many(head["targets"], list), *many(head["why"])]
    found += [*many(head["forms"], form), head["names"], *head["rows"]]
    found += [value for shape in head["shapes"] for value in many(shape)]
    found += [*head["counts"], *head["lengths"], *many(head["aliases"], list), head["notes"]]
    return found


def join(plain: list[Any] | bytes, checks: list[int], data: bytes) -> bytes:
    """A file with this header, whose own checksum is right."""
    if not isinstance(plain, bytes):
        plain = b"".join(map(msgpack.packb, plain))  # type: ignore[arg-type]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary())
    packed = packer.compress(plain) + packer.flush() + struct.pack(f"<{len(checks)}I", *checks)
    return b"\x89Detent\x02" + data + packed + struct.pack("<II", len(packed), zlib.crc32(packed))


def decoded(numbers: list[int], shape: list[int], pieces: list[list[float]]) -> list[float]:
    """Weights of an even grid with a zero, and one scale a tensor or a channel, as the table of forms says."""
    kind, _, _, n, zero, powers = numbers
    assert (kind, zero, powers) == (0, 1, 0)
    scale, codes = pieces
    run = math.prod(shape) // len(scale)
    return [struct.unpack("<f", struct.pack("<f", (c - n) * scale[i // run]))[0] for i, c in enumerate(codes)]
