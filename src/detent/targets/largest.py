"""Which numbers are the largest: of a whole tensor by a threshold, of short blocks by comparing all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from detent import masks
from detent.pieces import cut, is_large
from detent.targets.base import compute_dtype

__all__ = ["COMPUTED", "Near", "best", "largest"]

COMPUTED = (torch.float32, torch.float64)
_PIECE = 1 << 19  # numbers ranked at a time, so that passing tensors stay small beside the weight
_COMPARED = 16  # up to this length of a block, comparing all pairs is faster than sorting
_LEAST_NEAR, _MOST_NEAR = 2.0**-12, 2.0**-8  # share of the numbers to be found around the last threshold


class Near:
    """Where the last threshold of a tensor lay: the next is looked for near it, which takes a tenth of the time.

    What is found does not depend on it.
    """

    def __init__(self) -> None:
        self.at, self.width = 0.0, 1 / 64  # a number > 0 if it is known; how far around it, as a part of it

    def others(
        self, gains: Iterable[Tensor], take: Callable[[int, Tensor], object], total: int, count: int
    ) -> Tensor | None:
        """Find the `count` largest; ties go to the earlier one.

        Args:
            gains: pieces of a vector of numbers >= 0.
            take: is given the number of each piece, and the mask of those above what is near the last threshold.
            total: numbers in all.
            count: how many are wanted.

        Returns:
            The places of the others that belong to them; `None` if the threshold is not near, so that nothing is found.
        """
        if not 0 < self.at < math.inf:
            return None
        close, many, first = [], 0, 0
        low, high = self.at * (1 - self.width), self.at * (1 + self.width)
        for i, part in enumerate(gains):
            above = masks.compare(part, "gt", high)
            many += masks.count(above)
            at = masks.places(above ^ masks.compare(part, "ge", low))
            close.append(torch.stack([at.double() + first, part[at].double()]))
            take(i, above)
            first += len(part)
        places, values = torch.cat(close, dim=1)
        share, need = len(places) / total, count - many
        self.width *= 0.5 if share > _MOST_NEAR else 2.0 if share < _LEAST_NEAR else 1.0
        self.width = min(max(self.width, 2.0**-20), 0.5)
        if not 1 <= need <= len(places):
            return None
        ranked = values.sort(descending=True, stable=True)
        self.at = float(ranked.values[need - 1])
        return places[ranked.indices[:need]].long()


def largest(gain: Tensor, count: int, near: Near | None = None) -> Tensor:
    """Mask of the `count` largest, without those of -inf; ties go to the earlier position in row-major order."""
    flat = gain.reshape(-1)
    if count >= flat.numel():
        return gain != -torch.inf
    if count <= 0:
        return torch.zeros_like(gain, dtype=torch.bool)
    near = near if is_large(flat) and flat.dtype in COMPUTED else None
    if near is not None:
        mask = torch.empty(flat.shape, dtype=torch.bool)
        pieces = list(cut(flat, mask))
        found = near.others((part for part, _ in pieces), lambda i, above: pieces[i][1].copy_(above), len(flat), count)
        if found is not None:
            mask[found] = True
            return mask.reshape(gain.shape)
    threshold = _nth(flat, flat.numel() - count)
    if near is not None:
        near.at = float(threshold)
    mask, ties = masks.compare(flat, "gt", threshold), masks.compare(flat, "eq", threshold)
    need = count - masks.count(mask)
    if masks.count(ties) <= need:
        mask |= ties
    else:
        for part, tied in zip(mask.split(_PIECE), ties.split(_PIECE), strict=True):
            places = masks.places(tied)[:need]
            part[places] = True
            need -= len(places)
            if not need:
                break
    if bool(threshold == -torch.inf):
        mask.logical_and_(flat != -torch.inf)
    return mask.reshape(gain.shape)


def _nth(flat: Tensor, n: int) -> Tensor:
    """The number at place n, from 0, of a vector in ascending order."""
    if flat.device.type != "cpu":
        return flat.kthvalue(n + 1).values
    if flat.dtype == torch.float64 and flat.numel() > _PIECE:
        # Rounding keeps the order, so that only what rounds to the same number is left to be told apart: in this way
        # the copy takes half the memory.
        found = _parted(flat.float(), n)
        if bool(found.isnan()):
            return found.double()
        like = []
        for part in flat.split(_PIECE):
            rounded = part.float()
            n -= int(torch.count_nonzero(rounded < found))
            like.append(part[rounded == found])
        return _parted(torch.cat(like), n)
    return _parted(flat.detach().to(compute_dtype(flat.dtype), copy=True), n).to(flat.dtype)


def _parted(flat: Tensor, n: int) -> Tensor:
    """The number at place n in ascending order; writes over the vector."""
    low, past = flat.amin(), 0
    # Selection is twenty times slower where most numbers equal the lowest: pruned zeros. They are set apart.
    many = sum(int(torch.count_nonzero(part == low)) for part in flat.split(_PIECE))
    if n < many:
        return low
    if many > len(flat) // 16:
        for part in flat.split(_PIECE):
            others = part[part != low]
            flat[past : past + len(others)] = others
            past += len(others)
        flat, n = flat[:past], n - many
    # NumPy works in place; torch would write positions of 8 bytes a number beside a copy.
    flat.detach().numpy().partition(n)
    return flat[n].clone()


def best(gain: Tensor, n: int) -> Tensor:
    """Mask of the n largest of each row; ties go to the earlier place in the row."""
    rows, length = gain.shape
    if n >= length or not rows:
        return torch.ones_like(gain, dtype=torch.bool)
    mask = torch.empty_like(gain, dtype=torch.bool, memory_format=torch.contiguous_format)
    step = max(_PIECE // length, 1)
    for part, chosen in zip(gain.split(step), mask.split(step), strict=True):
        if length > _COMPARED:
            order = part.sort(dim=1, descending=True, stable=True).indices[:, :n]
            chosen.zero_().scatter_(1, order, True)
            continue
        part = part.to(compute_dtype(part.dtype))
        columns = torch.empty((length, len(part)), dtype=part.dtype, device=part.device)
        better = torch.zeros(columns.shape, dtype=torch.uint8, device=part.device)
        a, into, above, found = map(masks.shared, (part, columns, better, chosen))
        for j in range(length):
            into[j] = a[:, j]
        for j in range(length):
            above[j + 1 :] += into[j] >= into[j + 1 :]
            above[:j] += into[j] > into[:j]
        for j in range(length):
            found[:, j] = above[j] < n
    return mask
