"""What a file may hold of a target: names, widths, counts and ranges of its pieces, for a reader to compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Declared", "Pieces", "scale_ends"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One piece of a tensor in a file: fitted numbers, or a run of codes. Floats are finite and never -0.0.

    Args:
        name: what it holds ("scale", "codes").
        kind: bits of a code, or the dtype of raw floats.
        shape: of the numbers; `None`: one value for each survivor of the pattern before it, and perhaps zeros after.
        below: codes are smaller than this; `None`: whatever their bits hold.
        low: the smallest float.
        high: the largest float.
        besides: one number that may lie outside.
        within: each float is a number of this dtype too.
        whole: floats are whole numbers.

    Example:
        >>> Declared(name="codes", kind=2, shape=(2,), below=3).check(torch.tensor([0, 3], dtype=torch.uint8))
        Traceback (most recent call last):
        ...
        ValueError: 'codes' holds 3, which must be below 3
    """

    name: str
    kind: int | torch.dtype
    shape: tuple[int, ...] | None
    below: int | None = None
    low: float = -math.inf
    high: float = math.inf
    besides: float | None = None
    within: torch.dtype | None = None
    whole: bool = False

    def fits(self, kind: int | torch.dtype, shape: Sequence[int] | None) -> bool:
        """Whether a file may declare a piece like this; without a shape its count shows when it is read."""
        return kind == self.kind and (shape is None or self.shape is None or tuple(shape) == self.shape)

    def check(self, values: Tensor) -> None:
        """Raise where values are none of this piece's.

        Raises:
            ValueError: with the first thing that is wrong.
        """
        if self.shape is not None and values.numel() != math.prod(self.shape):
            raise ValueError(f"{self.name!r} holds {values.numel()} values, not {math.prod(self.shape)}")
        if not values.numel():
            return
        if not values.is_floating_point():
            if self.below is not None and int(values.max()) >= self.below:
                raise ValueError(f"{self.name!r} holds {int(values.max())}, which must be below {self.below}")
            return
        bits = values.view(_BITS[values.element_size()])
        if bool((bits == torch.iinfo(bits.dtype).min).any()):
            raise ValueError(f"{self.name!r} holds -0.0")
        inside = values if self.besides is None else values[values != self.besides]
        if inside.numel():
            self._check_range(inside)

    def _check_range(self, values: Tensor) -> None:
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high) and self.low <= low and high <= self.high):
            raise ValueError(f"{self.name!r} holds numbers from {low} to {high}: must be {self.low} to {self.high}")
        if self.within is not None and not bool((values.to(self.within).to(values.dtype) == values).all()):
            raise ValueError(f"{self.name!r} holds numbers that are none of {self.within}")
        if self.whole and not bool((values == values.round()).all()):
            raise ValueError(f"{self.name!r} holds numbers that are not whole")


class Pieces(NamedTuple):
    """All that a file holds of one tensor: the params named in `stored`, in that order, and the streams of codes."""

    params: tuple[Declared, ...] = ()
    streams: tuple[Declared, ...] = ()

    def check(self, params: Mapping[str, Tensor], streams: Mapping[str, Tensor]) -> None:
        """Raise where values that were read are none of theirs.

        Raises:
            ValueError: with the first thing that is wrong.
        """
        for declared, values in ((self.params, params), (self.streams, streams)):
            for piece in declared:
                piece.check(values[piece.name])


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
