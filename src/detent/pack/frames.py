"""The two frames of a file, Detent's own and safetensors: where header and blobs lie in it."""

from __future__ import annotations

import base64
import binascii
import json
import math
import mmap
import os
import stat
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from detent.pack.atomic import Replacement
from detent.pack.header import DTYPES, LONGEST, VERSION, FormatError, Head, checksum, first_line, read_head

__all__ = ["MAGIC", "DetentFrame", "Frame", "SafetensorsFrame", "open_frame"]

_OLD = ("0", "1")
MAGIC = b"\x89Detent"  # no text, no safetensors file and no archive starts like this; the version is the next byte
_START, _FOOTER = len(MAGIC) + 1, 8
# No parameter or buffer can have this name: torch refuses empty names, so no canonical name starts with a dot.
_BLOBS = ".data"


# --- writing ------------------------------------------------------------------------------------------------------


class Frame(Protocol):
    """What blobs and a header are written into."""

    def blob(self, data: bytes) -> None:
        """A blob of the compressed life."""
        ...

    def bare(self, name: str, dtype: str, shape: Sequence[int], data: np.ndarray) -> None:
        """A tensor of the full life."""
        ...

    def finish(self, header: bytes) -> None:
        """The header, when all blobs are there."""
        ...


class DetentFrame:
    """Magic and version, the blobs as they come, the header, and eight bytes that say where it is."""

    def __init__(self, file: Replacement) -> None:
        self._file = file
        file.write(MAGIC + bytes([VERSION]))

    def blob(self, data: bytes) -> None:
        self._file.write(data)

    def bare(self, name: str, dtype: str, shape: Sequence[int], data: np.ndarray) -> None:
        self._file.write(data)

    def finish(self, header: bytes) -> None:
        self._file.write(header)
        self._file.write(len(header).to_bytes(4, "little") + checksum(header).to_bytes(4, "little"))


class SafetensorsFrame:
    """An ordinary safetensors file: its header stands first, so everything is held until the end."""

    def __init__(self, file: Replacement) -> None:
        self._file = file
        self._blobs: list[bytes] = []
        self._bare: list[tuple[str, str, tuple[int, ...], np.ndarray]] = []

    def blob(self, data: bytes) -> None:
        self._blobs.append(data)

    def bare(self, name: str, dtype: str, shape: Sequence[int], data: np.ndarray) -> None:
        self._bare.append((name, dtype, tuple(shape), data))

    def finish(self, header: bytes) -> None:
        metadata = {"detent": str(VERSION), "header": base64.b64encode(header).decode(), "crc32": _hex(header)}
        if self._bare:
            metadata["format"] = "pt"  # transformers refuses a safetensors file without it
        entries = [(name, dtype, shape) for name, dtype, shape, _ in self._in_order()]
        if held := sum(map(len, self._blobs)):
            entries.append((_BLOBS, "U8", (held,)))
        self._file.write(safetensors_header(entries, metadata))
        for *_, data in self._in_order():
            self._file.write(data)
        for data in self._blobs:
            self._file.write(data)

    def _in_order(self) -> list[tuple[str, str, tuple[int, ...], np.ndarray]]:
        return sorted(self._bare, key=lambda entry: by_alignment(entry[0], entry[1]))


def by_alignment(name: str, dtype: str) -> tuple[int, str]:
    """The order of entries in which every one lies at a multiple of its own size."""
    return -DTYPES[dtype].itemsize, name


def safetensors_header(entries: Sequence[tuple[str, str, Sequence[int]]], metadata: dict[str, str]) -> bytes:
    """What stands before the data of a safetensors file whose entries follow each other in this order."""
    plain: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape in entries:
        refuse_frame_name(name)
        past = at + math.prod(shape) * DTYPES[dtype].itemsize
        plain[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, past]}
        at = past
    text = json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def refuse_frame_name(name: str) -> None:
    """Refuse the one name that no entry of a safetensors file may have.

    Raises:
        ValueError: naming it.
    """
    if name == "__metadata__":
        raise ValueError(
            "a tensor is called '__metadata__', which a safetensors file keeps for itself: save it under a path that "
            "ends in .detent"
        )


def _hex(header: bytes) -> str:
    return f"{checksum(header):08x}"


# --- reading ------------------------------------------------------------------------------------------------------


class Opened:
    """An open file whose header is sound and agrees with its length."""

    def __init__(self, path: str, size: int, mapped: mmap.mmap, head: Head, starts: Sequence[int]) -> None:
        self.path, self.size, self.head = path, size, head
        self._mapped, self._starts = mapped, starts

    def blob(self, index: int) -> memoryview:
        """The bytes of a blob, checked.

        Raises:
            FormatError: they do not have the checksum in the header.
        """
        blob = self.head.blobs[index]
        data = memoryview(self._mapped)[self._starts[index] : self._starts[index] + blob.length]
        if checksum(data) != blob.check:
            raise FormatError(f"{self.path}: {blob.owner!r} is damaged: its bytes do not have the checksum they must")
        return data

    def release(self, index: int) -> None:
        """Give back the memory of a blob that was read; whoever still looks at it has it read from the file anew."""
        if hasattr(mmap, "MADV_DONTNEED"):  # there is none on Windows
            first = self._starts[index] // mmap.PAGESIZE * mmap.PAGESIZE
            past = self._starts[index] + self.head.blobs[index].length
            if past > first:
                self._mapped.madvise(mmap.MADV_DONTNEED, first, past - first)

    def close(self) -> None:
        """Let go of the file, as soon as nothing looks into it any more."""
        try:
            self._mapped.close()
        except BufferError:  # somebody still does; the map goes with the last one
            del self._mapped


def open_frame(path: str | os.PathLike[str]) -> Opened:
    """Open a file of either kind and check all that it declares against its size, before any tensor is made.

    Raises:
        FormatError: anything wrong with it.
        OSError: it cannot be opened.
    """
    shown = os.fspath(path)
    try:
        # Not blocking, or a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise type(error)(f"cannot open {shown}: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise FormatError(f"{shown}: is {kind}, not a Detent file")
        if status.st_size == 0:
            raise FormatError(f"{shown}: is empty, not a Detent file")
        mapped = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    try:
        is_ours = mapped[: len(MAGIC)] == MAGIC
        head, starts = _read_detent(shown, mapped) if is_ours else _read_safetensors(shown, mapped)
    except BaseException:
        mapped.close()
        raise
    return Opened(shown, status.st_size, mapped, head, starts)


def _read_detent(path: str, mapped: mmap.mmap) -> tuple[Head, list[int]]:
    size = len(mapped)
    if size < _START + _FOOTER:
        raise FormatError(f"{path}: is cut short: {size} bytes are no Detent file")
    _check_version(path, str(mapped[len(MAGIC)]))
    length, check = (int.from_bytes(mapped[i : i + 4], "little") for i in (size - 8, size - 4))
    first = size - _FOOTER - length
    if first < _START or length > LONGEST:
        raise FormatError(f"{path}: is cut short or damaged: its last bytes point at no header")
    header = mapped[first : first + length]
    if checksum(header) != check:
        _damaged(path)
    head = _parsed(path, header, size)
    starts, at = [], _START
    for blob in head.blobs:
        starts.append(at)
        at += blob.length
    if at != first:
        raise FormatError(f"{path}: header and contents disagree: {at - _START} bytes declared, {first - _START} there")
    return head, starts


def of_torch(begin: bytes) -> str:
    """What to do with a file of `torch.save`, known by how it begins; empty for any other.

    The archives that torch writes today begin as zip files do, its older files as a pickle with a large number in it,
    any other pickle with its protocol.
    """
    is_pickle = begin[:1] == b"\x80" and begin[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if begin[:4] != b"PK\x03\x04" and not is_pickle:
        return ""
    return (
        "; it begins as what torch.save writes, a pickle, which may run code when it is read and is never opened here. "
        "If you trust it, load it with torch.load(path, weights_only=True), or a whole module with weights_only=False; "
        "put the state dict into its model and write that with safetensors.torch.save_model(model, path)"
    )


def _read_safetensors(path: str, mapped: mmap.mmap) -> tuple[Head, list[int]]:
    try:
        metadata, entries = read_safetensors_header(mapped)
    except (ValueError, RecursionError) as error:
        why = f": {first_line(error)}" if mapped[8:9] == b"{" else ""
        why = of_torch(mapped[:4]) or why
        raise FormatError(f"{path}: is damaged or neither a Detent nor a safetensors file{why}") from None
    if "detent" not in metadata:
        raise FormatError(
            f"{path}: is a safetensors file without a Detent header, that is, plain weights; `detent compress` makes a "
            "Detent file of it, safetensors.torch.load_file reads it"
        )
    _check_version(path, metadata["detent"])
    try:
        header = base64.b64decode(metadata.get("header", ""), validate=True)
    except (binascii.Error, ValueError):
        _damaged(path)
    if not header or metadata.get("crc32") != _hex(header):
        _damaged(path)
    head = _parsed(path, header, len(mapped))
    try:
        places = _entries(head, entries)
    except ValueError as error:
        raise FormatError(f"{path}: header and contents disagree: {error}") from None
    length = int.from_bytes(mapped[:8], "little")
    starts, at = [], places.get(_BLOBS, 0)
    for blob in head.blobs:
        start = places[blob.owner] if blob.bare else at
        starts.append(8 + length + start)
        at += 0 if blob.bare else blob.length
    return head, starts


def read_safetensors_header(mapped: mmap.mmap) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Metadata and entries of a safetensors file, which fill it without gaps or overlaps.

    The safetensors library opens a path by itself, and a path that is opened twice may be two files.

    Raises:
        ValueError: anything wrong with them.
    """
    length, size = int.from_bytes(mapped[:8], "little"), len(mapped)
    if length > _LONGEST_FRAME or 8 + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    plain = json.loads(mapped[8 : 8 + length].decode(), object_pairs_hook=_once)
    if not isinstance(plain, dict):
        raise ValueError("the header is no JSON object")
    metadata = plain.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata are not text")
    places = []
    for name, entry in plain.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} does not have dtype, shape and data_offsets")
        offsets, dtype = _wholes(entry["data_offsets"]), entry["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES or len(offsets) != 2:
            raise ValueError(f"{name!r} is of no known dtype, or does not lie from one place to another")
        first, past = offsets
        if past - first != math.prod(_wholes(entry["shape"])) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name!r} does not have the bytes of its dtype and shape")
        places.append((first, past))
    at = 0
    for first, past in sorted(places):
        if first != at:
            raise ValueError(f"entries with a gap or an overlap at byte {at}")
        at = past
    if 8 + length + at != size:
        raise ValueError(f"entries of {at} bytes in a file that holds {size - 8 - length}")
    return metadata, plain


_LONGEST_FRAME = 100_000_000  # bytes of the header of a safetensors file, as its library takes them


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _wholes(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise ValueError("a shape or a place is not of whole numbers")
    return value


def _entries(head: Head, entries: dict[str, Any]) -> dict[str, int]:
    """Where every entry starts, if they are those that the header declares."""
    expected: dict[str, tuple[str, list[int]]] = {}
    for blob in head.blobs:
        if blob.bare:
            expected[blob.owner] = (str(blob.specs[0].kind), list(blob.shape))
    if held := sum(blob.length for blob in head.blobs if not blob.bare):
        expected[_BLOBS] = ("U8", [held])
    if odd := entries.keys() ^ expected.keys():
        name = min(odd)
        raise ValueError(f"{name!r} is {'not declared' if name in entries else 'missing'}")
    for name, (dtype, shape) in expected.items():
        if (entries[name]["dtype"], entries[name]["shape"]) != (dtype, shape):
            raise ValueError(f"{name!r} is not of the declared dtype and shape")
    return {name: entry["data_offsets"][0] for name, entry in entries.items()}


def _check_version(path: str, version: str) -> None:
    if version == str(VERSION):
        return
    if version in _OLD:
        raise FormatError(
            f"{path}: has format version {version}, of drafts that only their own targets could decode; this release "
            f"reads {VERSION}. Convert it: `detent unpack` of the Detent that wrote it makes a state dict of a life, "
            "and `detent compress` of this one makes a file of that"
        )
    newer = version.isascii() and version.isdigit()
    what = f"has format version {version}; this release reads {VERSION}" if newer else "has no valid format version"
    raise FormatError(f"{path}: {what}")


def _damaged(path: str) -> NoReturn:
    raise FormatError(f"{path}: the header is damaged: it does not have the checksum beside it")


def _parsed(path: str, header: bytes, size: int) -> Head:
    try:
        return read_head(header, size)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not valid: {first_line(error)}") from None
