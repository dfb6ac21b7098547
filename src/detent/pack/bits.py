"""Codes as strings of bits and tensors as strings of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["array_of", "bytes_of", "pack_bits", "tensor_of", "unpack_bits"]

_BLOCK = 1 << 20  # values packed at a time; a multiple of 8, so that blocks end on whole bytes


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Integers as a string of bits: bit k of value i is bit `i * width + k`, counted from the lowest of byte 0.

    Args:
        values: 1-D, integers in [0, 2**width).
        width: bits a value, 1 to 16.

    Raises:
        ValueError: a width or value out of range.

    Example:
        >>> pack_bits(np.array([1, 2, 3]), 2).hex()     # 0b00_11_10_01
        '39'
    """
    if not 1 <= width <= 16:
        raise ValueError(f"width={width}: must be 1 to 16 bits")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**width:
        raise ValueError(f"values from {values.min()} to {values.max()} do not fit into {width} bits")
    octets = 1 if width <= 8 else 2
    plain = np.ascontiguousarray(values).astype("<u1" if octets == 1 else "<u2")
    if width == 8 * octets:
        return plain.tobytes()
    packed = []
    for first in range(0, plain.size, _BLOCK):
        block = plain[first : first + _BLOCK].view(np.uint8).reshape(-1, octets)
        bits = np.unpackbits(block, axis=1, bitorder="little")[:, :width]
        packed.append(np.packbits(bits.reshape(-1), bitorder="little").tobytes())
    return b"".join(packed)


def unpack_bits(data: bytes | np.ndarray, count: int, width: int) -> np.ndarray:
    """The inverse of `pack_bits`, as uint8 up to 8 bits and uint16 above.

    Args:
        data: exactly the bytes that `pack_bits` gave.
        count: number of values.
        width: bits a value, 1 to 16.

    Raises:
        ValueError: a width out of range, or another number of bytes than count and width ask for.

    Example:
        >>> unpack_bits(bytes.fromhex("39"), 3, 2)
        array([1, 2, 3], dtype=uint8)
    """
    if not 1 <= width <= 16:
        raise ValueError(f"width={width}: must be 1 to 16 bits")
    raw = np.frombuffer(data, dtype=np.uint8)
    if raw.size != -(-count * width // 8):
        raise ValueError(f"{count} values of {width} bits do not take {raw.size} bytes")
    octets = 1 if width <= 8 else 2
    if width == 8 * octets:
        return raw.view("<u1" if octets == 1 else "<u2").copy()
    out = np.empty(count, dtype="<u1" if octets == 1 else "<u2")
    for first in range(0, count, _BLOCK):
        past = min(first + _BLOCK, count)
        piece = raw[first * width // 8 : -(-past * width // 8)]
        bits = np.unpackbits(piece, count=(past - first) * width, bitorder="little").reshape(-1, width)
        wide = np.packbits(bits, axis=1, bitorder="little")
        out[first:past] = np.ascontiguousarray(wide).view(out.dtype).reshape(-1)
    return out


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor in row-major order."""
    return tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy()


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor in row-major order as a 1-D array; bfloat16, 8-bit floats and complex numbers as bit patterns.

    Example:
        >>> array_of(torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16))
        array([16256, 49152], dtype=uint16)
    """
    whole = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1)
    if whole.is_complex():
        return whole.view(torch.int64).numpy().view(np.uint64)
    if whole.dtype == torch.bfloat16:
        return whole.view(torch.int16).numpy().view(np.uint16)
    if whole.dtype == torch.bool or (whole.is_floating_point() and whole.dtype.itemsize == 1):
        return whole.view(torch.uint8).numpy()
    return whole.numpy()


def tensor_of(data: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The inverse of `bytes_of` and of `array_of`, in memory of its own."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    if data.size:
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = data.view(np.uint8)
    return tensor
