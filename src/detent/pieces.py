"""Large tensors a piece at a time: what passes then stays in a core's cache, and is no freshly mapped memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["cut", "in_pieces", "is_dense", "is_large"]

CACHED = 1 << 18  # numbers: a megabyte in float32


def is_large(x: Tensor) -> bool:
    """Whether a tensor is to be worked on in pieces; never where launches cost more than memory."""
    return x.numel() > CACHED and x.device.type == "cpu"


def is_dense(x: Tensor) -> bool:
    """Whether a tensor is one run of memory without gaps, in the order of its axes or with the channels last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def cut(first: Tensor, *others: Any, size: int | None = None, by_rows: bool = False) -> Iterator[tuple[Any, ...]]:
    """Matching pieces of tensors.

    Args:
        first: a tensor.
        others: tensors that broadcast against it, or have an axis more at the end; anything else is the same for every
            piece.
        size: numbers of a piece; by default what a CPU's cache holds, and on other devices all of them.
        by_rows: cut along axis 0; else where that is faster as if all had one axis only.

    Example:
        >>> [x.tolist() for x, by in cut(torch.arange(5), 2, size=2)]
        [[0, 1], [2, 3], [4]]
    """
    if size is None:
        size = CACHED if first.device.type == "cpu" else first.numel()
    if first.numel() <= size or not first.dim():
        yield first, *others
        return
    alike = [isinstance(x, Tensor) and x.shape == first.shape for x in others]
    single = [not isinstance(x, Tensor) or x.numel() == 1 for x in others]
    same_order = all(x.stride() == first.stride() for x, here in zip(others, alike, strict=True) if here)
    if not by_rows and all(a or b for a, b in zip(alike, single, strict=True)) and is_dense(first) and same_order:
        flat = [x.as_strided((x.numel(),), (1,)) if here else x for x, here in zip(others, alike, strict=True)]
        flat = [x.reshape(()) if isinstance(x, Tensor) and not here else x for x, here in zip(flat, alike, strict=True)]
        length, step = first.numel(), size
        whole = first.as_strided((length,), (1,))
    else:
        whole, flat, length = first, list(others), first.shape[0]
        alike = [isinstance(x, Tensor) and x.dim() >= first.dim() and x.shape[0] == length for x in others]
        step = max(1, size * length // first.numel())
    for at in range(0, length, step):
        here = slice(at, at + step)
        yield whole[here], *(x[here] if own else x for x, own in zip(flat, alike, strict=True))


def in_pieces(
    act: Callable[..., Tensor], x: Tensor, levels: Tensor | None, *along: Any, out: Tensor | None = None
) -> Tensor:
    """`act(x, levels, *along)` of a function that works weight by weight, a piece of the weights at a time.

    The result is the same, bit for bit.

    Args:
        act: the function; its result has the shape and the dtype of x.
        x: the weights.
        levels: broadcasts against x with one axis more, its last; or `None`, which `act` gets as well.
        along: numbers, and tensors that broadcast against x.
        out: where to write the result; a new tensor by default.

    Example:
        >>> in_pieces(lambda x, levels, by: x * by, torch.ones(2), None, 3.0)
        tensor([3., 3.])
    """
    if out is None and not is_large(x):
        return act(x, levels, *along)
    out = torch.empty_like(x) if out is None else out
    shared = levels is None or levels.numel() == levels.shape[-1]
    of_all = levels.reshape(-1) if levels is not None and shared and is_large(x) else levels
    for piece, into, own, *here in cut(x, out, None if shared else levels, *along):
        into.copy_(act(piece, of_all if shared else own, *here))
    return out
