"""What a weight held when the engine last wrote it, so that writes by others are found whatever way they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detent import sharding

__all__ = ["Seal", "holds_on_to", "sealed"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_RUNS, _RUN = 256, 16  # of a large tensor: how many runs are looked at in passing, and how many weights each has


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What a weight held: a number a row of all its bits, or the bits of a sample.

    After an optimizer's step only the sample is taken: 4,096 weights, or all of a smaller tensor. Whoever looks at
    the weights between two steps takes all of them.
    """

    is_whole: bool
    bits: Tensor
    order: torch.memory_format = torch.contiguous_format

    def holds(self, w: Tensor) -> bool:
        """Whether the weights are bitwise what they were, as far as was looked."""
        now = sharding.row_sums(w) if self.is_whole else _sample(w.contiguous(memory_format=self.order))
        return now.shape == self.bits.shape and torch.equal(now.to(self.bits.device), self.bits)


def sealed(w: Tensor, *, whole: bool) -> Seal | None:
    """What a weight holds now; `None` for one on the meta device."""
    if w.is_meta:
        return None
    if whole:
        return Seal(is_whole=True, bits=sharding.row_sums(w))
    last = w.dim() == 4 and not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)
    return Seal(is_whole=False, bits=_sample(w), order=torch.channels_last if last else torch.contiguous_format)


def holds_on_to(w: Tensor, zeros: Tensor | None, state: Mapping[str, Tensor]) -> bool:
    """Whether all that a step would put back is in its place: zeros of earlier stages, masked and frozen weights."""
    if zeros is not None and bool(w[zeros].any()):
        return False
    if "mask" in state and bool(w[~state["mask"]].any()):
        return False
    return "frozen" not in state or torch.equal(w[state["frozen"]], state["held"][state["frozen"]])


def _sample(w: Tensor) -> Tensor:
    """The bits of all weights, or of runs spread over a large tensor that touch different columns."""
    dense = w.is_contiguous() or (w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last))
    if w.numel() <= _RUNS * _RUN or not dense:
        return w.contiguous().view(_BITS[w.element_size()]).clone()
    stride = (w.numel() - _RUN) // (_RUNS - 1)
    return w.as_strided((_RUNS, _RUN), (stride, 1), w.storage_offset()).view(_BITS[w.element_size()]).clone()
