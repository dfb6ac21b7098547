"""The bytes of one stored tensor: its pieces (params, masks, codes, raw numbers) as one blob."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from detent.pack.bits import pack_bits, unpack_bits
from detent.pack.coder import Reader, Writer, most_turns
from detent.pack.models import Grid, patterns, whole_numbers

__all__ = ["CODINGS", "Coding", "Kind", "Piece", "Spec", "decode_tensor", "encode_tensor"]

Coding = Literal["entropy", "bitpacked", "none"]
Kind = int | str
CODINGS: tuple[Coding, ...] = ("entropy", "bitpacked", "none")

# How raw numbers lie in memory. NumPy has no bfloat16 and no 8-bit floats: those are carried as their bit patterns, and
# so are complex numbers, of which no model needs to know more.
_RAW: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "C64": "<u8",
}
_ALIGNED, _PACKED, _CODED, _CODED_AND_PLAIN = range(4)


@dataclass(frozen=True)
class Piece:
    """A run of numbers of one tensor.

    Args:
        name: what it holds ("scale", "mask", "codes").
        kind: bits of one unsigned integer, 1 to 16; or the dtype of raw numbers as safetensors calls it ("F32").
        values: 1-D; integers in [0, 2**kind), or raw numbers (bfloat16 as uint16, 8-bit floats as uint8: bit patterns).

    Example:
        >>> Piece("codes", 2, np.array([0, 3, 1])).values.size
        3
    """

    name: str
    kind: Kind
    values: np.ndarray


@dataclass(frozen=True)
class Spec:
    """What a reader must know of a piece beforehand.

    Args:
        name: as in `Piece`.
        kind: as in `Piece`.
        count: how many values. `None`: as many as the nearest earlier piece of kind 1 has ones (survivors of a mask).

    Example:
        >>> Spec("codes", 2, 3).count
        3
    """

    name: str
    kind: Kind
    count: int | None

    @property
    def width(self) -> int:
        """Bits a value takes at its true width."""
        return _width(self.kind)


def encode_tensor(pieces: Sequence[Piece], *, shape: Sequence[int], coding: Coding = "entropy") -> bytes:
    """The blob of one tensor.

    Args:
        pieces: in the order in which they shall be decoded.
        shape: of the tensor that they rebuild; where rows and columns lie.
        coding: "entropy": as small as the models get it. "bitpacked": integers at their true width. "none": integers
            in whole bytes.

    Raises:
        ValueError: an unknown coding or kind, or a value that does not fit.

    Example:
        >>> codes = Piece("codes", 2, np.array([0, 3, 1, 1]))
        >>> blob = encode_tensor([codes], shape=(2, 2), coding="bitpacked")
        >>> blob.hex(), decode_tensor(blob, [Spec("codes", 2, 4)], shape=(2, 2))[0].tolist()
        ('015c', [0, 3, 1, 1])
    """
    if coding not in CODINGS:
        raise ValueError(f"coding={coding!r}: must be one of {', '.join(map(repr, CODINGS))}")
    if not pieces:
        return b""
    for piece in pieces:
        _check(piece)
    if coding == "none":
        return b"".join([bytes([_ALIGNED]), *(_plain(piece, _ALIGNED) for piece in pieces)])
    packed = 1 + sum(-(-piece.values.size * _width(piece.kind) // 8) for piece in pieces)
    if coding == "entropy":
        coded = _encode(pieces, tuple(shape))
        if coded is not None and len(coded) < packed:
            return coded
    return b"".join([bytes([_PACKED]), *(_plain(piece, _PACKED) for piece in pieces)])


def decode_tensor(data: bytes | memoryview, specs: Sequence[Spec], *, shape: Sequence[int]) -> list[np.ndarray]:
    """The values of every piece, bit for bit as they were encoded.

    Integers come as uint8 up to 8 bits and as uint16 above, raw numbers as their NumPy dtype (see `Piece`).
    No more memory is reserved than the specs and the length of the data account for.

    Args:
        data: what `encode_tensor` gave.
        specs: one a piece, in the order of encoding.
        shape: as in `encode_tensor`.

    Raises:
        ValueError: data that does not belong to these specs.
    """
    whole = memoryview(data).cast("B")
    if not specs:
        if whole.nbytes:
            raise ValueError(f"{whole.nbytes} bytes for a tensor without pieces")
        return []
    if not whole.nbytes:
        raise ValueError("no bytes for a tensor with pieces")
    form = whole[0]
    if form > _CODED_AND_PLAIN:
        raise ValueError(f"form {form} of a tensor's data: must be 0 to {_CODED_AND_PLAIN}")
    if form in (_ALIGNED, _PACKED):
        return _decode_plain(whole[1:], specs, form)
    return _decode(whole, specs, tuple(shape))


# --- plain forms --------------------------------------------------------------------------------------------------


def _width(kind: Kind, form: int = _PACKED) -> int:
    """Bits a value in a plain form."""
    if isinstance(kind, str):
        if kind not in _RAW:
            raise ValueError(f"kind={kind!r}: must be 1 to 16 bits or one of {', '.join(_RAW)}")
        return 8 * np.dtype(_RAW[kind]).itemsize
    if not 1 <= kind <= 16:
        raise ValueError(f"kind={kind}: must be 1 to 16 bits or one of {', '.join(_RAW)}")
    return kind if form == _PACKED else (8 if kind <= 8 else 16)


def _raw(piece: Piece) -> np.ndarray:
    """Raw numbers in the dtype of their kind."""
    dtype = np.dtype(_RAW[str(piece.kind)])
    values = np.ascontiguousarray(piece.values)
    if values.dtype == np.bool_ and dtype.itemsize == 1:
        return values.view(dtype)
    if values.dtype != dtype:
        raise ValueError(f"{piece.name!r} is {values.dtype}, but its kind {piece.kind} is held as {dtype}")
    return values


def _checked(piece: Piece) -> np.ndarray:
    """Integers of at most 16 bits as uint8 or uint16."""
    kind = int(piece.kind)
    values = piece.values
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**kind:
        raise ValueError(f"{piece.name!r}: values from {values.min()} to {values.max()} do not fit into {kind} bits")
    return np.ascontiguousarray(values).astype("|u1" if kind <= 8 else "<u2", copy=False)


def _check(piece: Piece) -> None:
    if piece.values.ndim != 1:
        raise ValueError(f"{piece.name!r} has {piece.values.ndim} dimensions: must be 1")
    _width(piece.kind)


def _plain(piece: Piece, form: int) -> bytes:
    if isinstance(piece.kind, str):
        return _raw(piece).tobytes()
    values = _checked(piece)
    return values.tobytes() if form == _ALIGNED else pack_bits(values, piece.kind)


def _decode_plain(data: memoryview, specs: Sequence[Spec], form: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    first = 0
    for spec in specs:
        count = _count(spec, specs, found)
        size = -(-count * _width(spec.kind, form) // 8)
        if first + size > data.nbytes:
            raise ValueError(f"{spec.name!r} needs {size} bytes, {data.nbytes - first} are left")
        found.append(_from_plain(data[first : first + size], spec, count, form))
        first += size
    if first != data.nbytes:
        raise ValueError(f"{data.nbytes - first} bytes more than the pieces need")
    return found


def _from_plain(data: memoryview, spec: Spec, count: int, form: int) -> np.ndarray:
    if isinstance(spec.kind, str):
        return np.frombuffer(data, dtype=_RAW[spec.kind]).copy()
    if form == _ALIGNED:
        values = np.frombuffer(data, dtype="|u1" if spec.kind <= 8 else "<u2").copy()
        if values.size and int(values.max()) >= 2**spec.kind:
            raise ValueError(f"{spec.name!r} holds {values.max()}, which does not fit into {spec.kind} bits")
        return values
    spare = -count * spec.kind % 8
    if spare and data[-1] >> (8 - spare):
        raise ValueError(f"{spec.name!r} has set bits after its last value")
    return unpack_bits(np.frombuffer(data, dtype=np.uint8), count, spec.kind)


def _count(spec: Spec, specs: Sequence[Spec], found: Sequence[np.ndarray]) -> int:
    """How many values a piece has, given the pieces before it."""
    if spec.count is not None:
        if spec.count < 0:
            raise ValueError(f"{spec.name!r} has a count of {spec.count}")
        return spec.count
    for earlier, values in zip(reversed(specs[: len(found)]), reversed(found), strict=True):
        if earlier.kind == 1:
            return int(np.count_nonzero(values))
    raise ValueError(f"{spec.name!r} has as many values as a mask has ones, but no mask comes before it")


# --- coded forms --------------------------------------------------------------------------------------------------


def _encode(pieces: Sequence[Piece], shape: tuple[int, ...]) -> bytes | None:
    """The coded form, or `None` where reading it would take longer than its bytes may."""
    writer = Writer()
    mask = None
    for piece in pieces:
        if isinstance(piece.kind, str):
            bits = _raw(piece)
            bits = bits.view(f"<u{bits.dtype.itemsize}")
            grid = _grid(bits.size, shape, mask)
            patterns(writer, bits, bits.size, 8 * bits.dtype.itemsize, _is_real(piece.kind), grid)
            continue
        values = _checked(piece)
        whole_numbers(writer, values, values.size, 2**piece.kind, _grid(values.size, shape, mask))
        if piece.kind == 1:
            mask = values
    raw, coded = writer.finish()
    if writer.turns > most_turns(len(raw) + len(coded)):
        return None
    if not raw:
        return bytes([_CODED]) + coded
    return b"".join([bytes([_CODED_AND_PLAIN]), _length(len(raw)), raw, coded])


def _decode(whole: memoryview, specs: Sequence[Spec], shape: tuple[int, ...]) -> list[np.ndarray]:
    first, size = 1, 0
    if whole[0] == _CODED_AND_PLAIN:
        first, size = _read_length(whole)
    reader = Reader(whole[first : first + size], whole[first + size :])
    found: list[np.ndarray] = []
    mask = None
    for spec in specs:
        count = _count(spec, specs, found)
        width = _width(spec.kind)
        grid = _grid(count, shape, mask)
        if isinstance(spec.kind, str):
            bits = patterns(reader, None, count, width, _is_real(spec.kind), grid)
            found.append(np.ascontiguousarray(bits).view(_RAW[spec.kind]))
            continue
        found.append(whole_numbers(reader, None, count, 2**spec.kind, grid))
        if spec.kind == 1:
            mask = found[-1]
    reader.finish()
    return found


def _grid(count: int, shape: tuple[int, ...], mask: np.ndarray | None) -> Grid:
    """Where the values of a piece lie: at the ones of the mask before it, if there are as many."""
    if mask is not None and count != mask.size and count == np.count_nonzero(mask):
        return Grid.of(count, shape, mask)
    return Grid.of(count, shape)


def _is_real(kind: str) -> bool:
    return kind.startswith(("F", "BF"))


def _length(number: int) -> bytes:
    """LEB128: seven bits a byte from the lowest, the top bit set in all but the last."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_length(data: memoryview) -> tuple[int, int]:
    """Where the plain bytes begin and how many there are."""
    number, first = 0, 1
    while True:
        if first >= data.nbytes or first > 8:
            raise ValueError("the length of the plain bytes is cut off")
        number |= (data[first] & 127) << 7 * (first - 1)
        first += 1
        if data[first - 1] < 128:
            break
    if not 0 < number <= data.nbytes - first:
        raise ValueError(f"{number} plain bytes are declared, {data.nbytes - first} are there")
    return first, number
