"""Masks of large tensors on a CPU, where NumPy compares and counts in a fifth of the time that torch takes."""

from __future__ import annotations

import operator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["compare", "count", "kept", "places", "shared"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def shared(x: Any) -> Any:
    """The memory of a tensor for NumPy, or the tensor itself where NumPy knows nothing of it; anything else as it is.

    Both are indexed, compared and added up alike.
    """
    known = type(x) is Tensor and x.device.type == "cpu" and x.dtype != torch.bfloat16 and not x.requires_grad
    return x.numpy() if known else x


def compare(a: Tensor, how: Literal["gt", "ge", "le", "eq"], b: Tensor | float) -> Tensor:
    """`a > b`, `a >= b`, `a <= b` or `a == b` as a mask, bit for bit that of torch for tensors of one dtype.

    Example:
        >>> compare(torch.tensor([1.0, 2.0]), "gt", torch.tensor(1.5))
        tensor([False,  True])
    """
    left, right = shared(a), shared(b)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        left, right = a, b
    found = getattr(operator, how)(left, right)
    return found if isinstance(found, Tensor) else torch.from_numpy(np.asarray(found))


def count(mask: Tensor) -> int:
    """How many are true."""
    held = shared(mask)
    return int(torch.count_nonzero(held) if isinstance(held, Tensor) else np.count_nonzero(held))


def places(mask: Tensor) -> Tensor:
    """Where a mask of one axis is true, ascending, int64."""
    held = shared(mask)
    return held.nonzero()[:, 0] if isinstance(held, Tensor) else torch.from_numpy(np.flatnonzero(held))


def kept(x: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """x where the mask is true, else 0.0, whatever x is there; a product of bits, which a CPU makes fastest.

    Args:
        x: floats.
        mask: of their shape.
        out: where to write; may be x.

    Example:
        >>> kept(torch.tensor([1.0, torch.inf, -0.0]), torch.tensor([True, False, True]))
        tensor([1., 0., -0.])
    """
    bits = _BITS[x.element_size()]
    out = torch.empty_like(x) if out is None else out
    torch.mul(x.view(bits), mask.view(torch.uint8), out=out.view(bits))
    return out
