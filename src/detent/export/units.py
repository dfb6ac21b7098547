"""The units of a layer: its weights by output and input whatever their layout, and taking some of them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detent.export.trace import TRANSPOSED

__all__ = ["Places", "Units", "grouped", "shrink_norm", "taken"]

_FEATURES = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


class Units:
    """A convolution, transposed convolution or linear layer as (groups, outputs, inputs, taps).

    Args:
        module: the layer.

    Example:
        >>> Units(nn.ConvTranspose2d(4, 6, 3, groups=2)).grid().shape
        torch.Size([2, 3, 2, 9])
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.groups: int = getattr(module, "groups", 1)
        self.turned = isinstance(module, TRANSPOSED)

    @property
    def size(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        first, second = self.module.weight.shape[:2]
        return (first, second * self.groups) if self.turned else (second * self.groups, first)

    def grid(self) -> Tensor:
        """The weights; writing to the result need not reach them."""
        weight = self.module.weight.detach()
        grid = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return grid.transpose(1, 2) if self.turned else grid

    def bias(self) -> Tensor:
        """The bias, or zeros, in float64."""
        if self.module.bias is None:
            return torch.zeros(self.size[1], dtype=torch.float64, device=self.module.weight.device)
        return self.module.bias.detach().double()

    def rows(self) -> Tensor:
        """Whether each output has a weight."""
        return (self.grid() != 0).any(dim=3).any(dim=2).reshape(-1)

    def columns(self) -> Tensor:
        """Whether each input has a weight."""
        return (self.grid() != 0).any(dim=3).any(dim=1).reshape(-1)

    def uses(self, needed: Tensor) -> Tensor:
        """Whether each input has a weight to an output that is needed."""
        live = (self.grid() != 0).any(dim=3)
        return (live & needed.reshape(self.groups, -1, 1)).any(dim=1).reshape(-1)

    def contribution(self, constants: Tensor) -> Tensor:
        """What constant inputs add to each output, in float64."""
        return (self.grid().double().sum(dim=3) * constants.reshape(self.groups, 1, -1)).sum(dim=2).reshape(-1)

    def clear(self, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Set the weights of some outputs or inputs to zero."""
        grid = self.grid()
        mask = torch.zeros(grid.shape[:3], dtype=torch.bool, device=grid.device)
        if rows is not None:
            mask |= rows.reshape(self.groups, -1, 1)
        if columns is not None:
            mask |= columns.reshape(self.groups, 1, -1)
        weight = self.module.weight
        mask = (mask.transpose(1, 2) if self.turned else mask).reshape(weight.shape[:2])
        weight.masked_fill_(mask.reshape(*mask.shape, *[1] * (weight.dim() - 2)), 0.0)

    def spreads_evenly(self) -> bool:
        """Whether a constant input that is not 0 adds the same number at every position."""
        module = self.module
        if isinstance(module, nn.Linear):
            return True
        if self.turned:
            return False
        if module.padding_mode != "zeros":
            return True
        if isinstance(module.padding, str):
            return module.padding == "valid" or all(k == 1 for k in module.kernel_size)
        return not any(module.padding)

    def near_dead(self, share: float) -> tuple[Tensor, Tensor]:
        """(outputs, inputs) that have weights, none above a share of the layer's largest."""
        size = self.grid().abs().amax(dim=3)
        least = share * size.max()
        rows, columns = size.amax(dim=2).reshape(-1), size.amax(dim=1).reshape(-1)
        return (rows > 0) & (rows <= least), (columns > 0) & (columns <= least)

    def shrink(self, outputs: list[int], inputs: list[int]) -> None:
        """Keep some outputs and inputs; of a grouped layer whole groups."""
        module: Any = self.module
        before = self.size
        first, second = (inputs, outputs) if self.turned else (outputs, inputs)
        module.weight = taken(module.weight, first)
        if self.groups == 1:
            module.weight = taken(module.weight, second, dim=1)
        module.bias = taken(module.bias, outputs)
        if isinstance(self.module, nn.Linear):
            module.in_features, module.out_features = len(inputs), len(outputs)
            return
        if self.groups > 1:
            module.groups = len(inputs) * self.groups // before[0]
        module.in_channels, module.out_channels = len(inputs), len(outputs)


def taken(tensor: Tensor | None, keep: list[int], dim: int = 0) -> Any:
    """Some slices of a parameter or buffer, as the same kind of thing."""
    if tensor is None:
        return None
    index = torch.tensor(keep, device=tensor.device)
    part = tensor.detach().index_select(dim, index)
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def shrink_norm(module: Any, keep: list[int]) -> None:
    """Keep some channels of a norm or PReLU."""
    if isinstance(module, nn.GroupNorm):
        module.num_groups = len(keep) * module.num_groups // module.num_channels
        module.num_channels = len(keep)
    elif isinstance(module, nn.PReLU):
        if module.num_parameters == 1:
            return
        module.num_parameters = len(keep)
    elif isinstance(module, _FEATURES):
        norm: Any = module
        norm.num_features = len(keep)
    else:
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            setattr(module, name, taken(getattr(module, name), keep))


class Places:
    """Numbers that can be tied together (union-find), some of them pinned."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._ties: dict[int, dict[str, None]] = {}
        self._pins: dict[int, str] = {}

    @property
    def all(self) -> set[int]:
        """One number of every class."""
        return {self.of(place) for place in range(len(self._parent))}

    @property
    def pinned(self) -> set[int]:
        """The numbers of classes that hold a pinned place."""
        return {self.of(place) for place in self._pins}

    def new(self, count: int) -> list[int]:
        """Fresh numbers."""
        first = len(self._parent)
        self._parent += range(first, first + count)
        return list(range(first, first + count))

    def of(self, place: int) -> int:
        """The number of the class of a place."""
        while self._parent[place] != place:
            self._parent[place] = place = self._parent[self._parent[place]]
        return place

    def tie(self, left: Iterable[int], right: Iterable[int], why: str) -> None:
        """Places that go only together, pair by pair, and why."""
        for a, b in zip(left, right, strict=True):
            a, b = self.of(a), self.of(b)
            if a != b:
                self._parent[a] = b
                self._ties.setdefault(b, {}).update({**self._ties.pop(a, {}), why: None})

    def pin(self, places: Iterable[int], why: str) -> None:
        """Places that cannot go, and why."""
        for place in places:
            self._pins.setdefault(place, why)

    def reasons(self) -> dict[int, str]:
        """Why classes that nothing uses had to stay, by their numbers."""
        found = {own: " and ".join(list(ties)[:2]) for own, ties in self._ties.items()}
        found |= {self.of(place): why for place, why in reversed(self._pins.items())}
        return found


def grouped(stuck: Mapping[tuple[str, str, int], str]) -> tuple[str, ...]:
    """One sentence a layer and reason.

    Args:
        stuck: (layer, "unit" or "input", number) to the reason.

    Example:
        >>> grouped({("fc", "unit", 3): "a", ("fc", "unit", 1): "a", ("fc", "input", 0): "b"})
        ('fc: 1 input (0) stays unread: b', 'fc: 2 units (1, 3) stay: a')
    """
    found: dict[tuple[str, str, str], list[int]] = {}
    for (name, what, channel), why in stuck.items():
        found.setdefault((name, what, why), []).append(channel)
    lines = []
    for (name, what, why), channels in sorted(found.items()):
        some = ", ".join(map(str, sorted(channels)[:8])) + ", ..." * (len(channels) > 8)
        verb = ("stay" if len(channels) > 1 else "stays") + " unread" * (what == "input")
        lines.append(f"{name}: {len(channels)} {what}{'s' * (len(channels) > 1)} ({some}) {verb}: {why}")
    return tuple(lines)
