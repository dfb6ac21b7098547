"""Parts: the runs of numbers that a form consists of, and what their values must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["FLOATS", "Part", "Take", "compute_dtype", "scale_ends"]

Take: TypeAlias = Callable[[int, int], int]  # the next number of a form in a file, from a smallest to a largest one
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # a file writes the place in this list
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run of numbers of a form. Floats are finite and never -0.0.

    Args:
        name: what it holds ("scale", "codes").
        role: "numbers" that were fitted, "where" the survivors are, or "codes" (or floats) of weights.
        kind: bits of a code, or the dtype of raw floats.
        count: how many there are; `None`: one a survivor.
        is_listed: whether a file has to say how many survivors there are, because its mask has not a bit for each.
        below: codes are smaller than this; `None`: whatever their bits hold.
        low: the smallest float.
        high: the largest float.
        within: each float is a number of this dtype too.
        is_shared: several tensors of a file may have it in common (a codebook).

    Example:
        >>> Part(name="codes", role="codes", kind=2, count=2, below=3).check(torch.tensor([0, 3], dtype=torch.uint8))
        Traceback (most recent call last):
        ...
        ValueError: 'codes' holds 3, which must be below 3
    """

    name: str
    role: Literal["numbers", "where", "codes"]
    kind: int | torch.dtype
    count: int | None
    below: int | None = None
    low: float = -math.inf
    high: float = math.inf
    within: torch.dtype | None = None
    is_shared: bool = False
    is_listed: bool = False

    @property
    def width(self) -> int:
        """Bits a number."""
        return self.kind if isinstance(self.kind, int) else 8 * self.kind.itemsize

    def nbytes(self, values: Tensor) -> int:
        """Bytes on disk, bit-packed at true width."""
        return -(-values.numel() * self.width // 8)

    def check(self, values: Tensor) -> None:
        """Raise where values are none of this part's.

        Raises:
            ValueError: with the first thing that is wrong.
        """
        if values.dim() != 1 or (self.count is not None and values.numel() != self.count):
            raise ValueError(f"{self.name!r} holds {tuple(values.shape)} values, not {self.count}")
        if values.is_floating_point() != (not isinstance(self.kind, int)):
            raise ValueError(f"{self.name!r} holds {values.dtype}, not {self.kind}")
        if isinstance(self.kind, int):
            below = 1 << self.kind if self.below is None else self.below
            if values.numel() and int(values.max()) >= below:
                raise ValueError(f"{self.name!r} holds {int(values.max())}, which must be below {below}")
            if values.dtype.is_signed and values.numel() and int(values.min()) < 0:
                raise ValueError(f"{self.name!r} holds {int(values.min())}, which is below 0")
        elif values.dtype != self.kind:
            raise ValueError(f"{self.name!r} holds {values.dtype}, not {self.kind}")
        elif values.numel():
            self._check_floats(values)

    def _check_floats(self, values: Tensor) -> None:
        bits = values.contiguous().view(_BITS[values.element_size()])
        if bool((bits == torch.iinfo(bits.dtype).min).any()):
            raise ValueError(f"{self.name!r} holds -0.0")
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high) and self.low <= low and high <= self.high):
            raise ValueError(f"{self.name!r} holds numbers from {low} to {high}: must be {self.low} to {self.high}")
        if self.within is not None and not bool((values.to(self.within).to(values.dtype) == values).all()):
            raise ValueError(f"{self.name!r} holds numbers that are none of {self.within}")


def scale_ends(store: torch.dtype, dtype: torch.dtype, n: int) -> tuple[float, float]:
    """The smallest and largest scale that keeps -n .. n times it among the numbers of a dtype, as numbers of `store`.

    Not so small that projecting twice is not projecting once.
    """
    floats, weights, kept = torch.finfo(torch.float32), torch.finfo(dtype), torch.finfo(store)
    smallest = max(floats.tiny, kept.smallest_normal, 8 * weights.smallest_normal * weights.eps)
    largest = min(kept.max, weights.max / n)
    rounded = torch.tensor(largest, dtype=torch.float64).to(store)
    if float(rounded) > largest:  # down, or the outermost level would be infinite
        rounded = (rounded.view(_BITS[rounded.element_size()]) - 1).view(store)
    return smallest, float(rounded)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which targets compute: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
