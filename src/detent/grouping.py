"""Granularity: which weights of a tensor share one set of fitted numbers.

A target never sees a module. It sees a tensor and a `Layout` that says which axis is the output channel (0 for
convolution, linear and embedding; 1 for transposed convolution), along which axes several such tensors are stacked
(experts), and, under sharding, which rows of the whole tensor are held here. A `Granularity` turns that into groups:
reduce within a group, and spread one number a group back over the tensor.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "MOST_AXES",
    "NEAR_DEAD",
    "Channel",
    "Granularity",
    "Group",
    "Layout",
    "PerTensor",
    "granularity_of",
    "near_dead",
]

NEAR_DEAD = 1e-6  # of the largest weight: what training with weight decay leaves of a unit that does nothing
MOST_AXES = 16  # of a tensor whose channels lie along another axis than the first


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a target may know about a weight besides its values.

    A weight is a stack of matrices: its batch axes count them, its channel axis is their rows, and the other axes, in
    their order, are their columns (the inputs, then the kernel positions of a convolution).

    Args:
        shape: shape of the whole (unsharded) tensor.
        channel_dim: axis of the output channels.
        conv_groups: groups of a transposed convolution, whose axis 1 holds `out_channels / groups`; 1 otherwise.
        batch_axes: axes along which matrices of their own are stacked (experts), in ascending order.
        rows: (first, past-last) rows of axis 0 held by this process, or `None` for all of them.

    Example:
        >>> Layout(shape=(8, 4, 3, 3)).channels
        8
        >>> Layout(shape=(8, 4, 3, 3), channel_dim=1, conv_groups=2).channels
        8
        >>> Layout(shape=(16, 64, 32), channel_dim=2, batch_axes=(0,)).channels     # 16 experts with 32 outputs each
        512
    """

    shape: tuple[int, ...]
    channel_dim: int = 0
    conv_groups: int = 1
    batch_axes: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.channel_dim < max(len(self.shape), 1), self
        assert self.conv_groups == 1 or (self.channel_dim == 1 and not self.batch_axes), self
        assert self.channel_dim not in self.batch_axes and [*self.batch_axes] == sorted({*self.batch_axes}), self
        assert all(0 <= axis < len(self.shape) for axis in self.batch_axes), self

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of what is held here."""
        return self.shape if self.rows is None else (self.rows[1] - self.rows[0], *self.shape[1:])

    @property
    def numel(self) -> int:
        """Number of weights in the whole tensor."""
        return math.prod(self.shape)

    @property
    def batch(self) -> int:
        """Number of matrices that are stacked."""
        return math.prod(self.shape[axis] for axis in self.batch_axes)

    @property
    def channels(self) -> int:
        """Number of output channels of the whole tensor (1 for a scalar)."""
        if not self.shape:
            return 1
        return self.batch * self.shape[self.channel_dim] * self.conv_groups

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of one channel: the inputs, then the kernel positions of a convolution."""
        return tuple(i for i in range(len(self.shape)) if i != self.channel_dim and i not in self.batch_axes)

    @property
    def kernel(self) -> int:
        """Kernel positions of a convolution; 1 for matrices."""
        return math.prod(self.shape[axis] for axis in self.input_axes[1:])

    @property
    def is_row_major(self) -> bool:
        """Whether the weights of a channel lie side by side, and the channels one after another."""
        return self.channel_dim == len(self.batch_axes) and self.batch_axes == tuple(range(self.channel_dim))

    @property
    def order(self) -> tuple[int, ...]:
        """The axes as a stack of matrices has them: batch, channel, inputs."""
        return (*self.batch_axes, *((self.channel_dim,) if self.shape else ()), *self.input_axes)

    @property
    def axes_code(self) -> int:
        """The axis of the channels, and 16 for batch axis 0, 32 for batch axis 1, and so on: one number for files.

        Example:
            >>> Layout(shape=(8, 64, 32), channel_dim=2, batch_axes=(0,)).axes_code
            18
        """
        return self.channel_dim + sum(MOST_AXES << axis for axis in self.batch_axes)

    @classmethod
    def of_code(cls, code: int, shape: tuple[int, ...], conv_groups: int) -> Layout | None:
        """The layout that `axes_code` stands for, or `None` if a tensor of that shape cannot have it."""
        axis, batch = code % MOST_AXES, code // MOST_AXES
        if axis >= max(len(shape), 1) or batch >> len(shape) or batch >> axis & 1:
            return None
        if conv_groups != 1 and (code != 1 or conv_groups < 1 or shape[0] % conv_groups):
            return None
        batch_axes = tuple(i for i in range(len(shape)) if batch >> i & 1)
        return cls(shape=shape, channel_dim=axis, conv_groups=conv_groups, batch_axes=batch_axes)

    def local(self, first: int, past: int) -> Layout:
        """The same layout, seen by a process that holds rows `first` to `past - 1` of axis 0."""
        return replace(self, rows=(first, past))

    def whole(self) -> Layout:
        """The same layout without sharding."""
        return replace(self, rows=None)

    def by_channel(self, w: Tensor) -> Tensor:
        """View a whole tensor as a matrix (channels, weights of a channel), in a fixed order."""
        assert self.rows is None, "a matrix of channels needs the whole tensor"
        if self.is_row_major:
            return w.reshape(self.channels, -1)
        if self.conv_groups == 1:
            return w.reshape(self.shape).permute(self.order).reshape(self.channels, -1)
        split = w.reshape(self.conv_groups, self.shape[0] // self.conv_groups, self.shape[1], -1)
        return split.permute(0, 2, 1, 3).reshape(self.channels, -1)

    def from_channels(self, matrix: Tensor) -> Tensor:
        """Inverse of `by_channel`."""
        if self.is_row_major:
            return matrix.reshape(self.shape)
        if self.conv_groups == 1:
            back = sorted(range(len(self.shape)), key=self.order.__getitem__)
            return matrix.reshape([self.shape[axis] for axis in self.order]).permute(back).reshape(self.shape)
        split = matrix.reshape(self.conv_groups, self.shape[1], self.shape[0] // self.conv_groups, -1)
        return split.permute(0, 2, 1, 3).reshape(self.shape)

    def over_channels(self, values: Tensor) -> Tensor:
        """One value a channel, so that it broadcasts against the rows held here."""
        if not self.shape:
            return values.reshape(())
        if self.conv_groups > 1:
            per_row = values.reshape(self.conv_groups, self.shape[1])
            spread = per_row.repeat_interleave(self.shape[0] // self.conv_groups, dim=0)
            spread = spread.reshape((*spread.shape, *(1,) * (len(self.shape) - 2)))
        elif self.is_row_major:
            spread = values.reshape(
                (*self.shape[: self.channel_dim + 1], *(1,) * (len(self.shape) - self.channel_dim - 1))
            )
        else:
            given = [self.shape[axis] if axis not in self.input_axes else 1 for axis in self.order]
            back = sorted(range(len(self.shape)), key=self.order.__getitem__)
            spread = values.reshape(given).permute(back)
        return spread if self.rows is None or len(spread) == 1 < self.shape[0] else spread[slice(*self.rows)]


class Granularity(abc.ABC):
    """How a tensor is cut into groups; final subclasses are frozen and hold no tensors.

    Example:
        >>> layout = Layout(shape=(2, 3))
        >>> w = torch.tensor([[1.0, -5.0, 2.0], [0.5, 0.25, -0.125]])
        >>> Channel().amax(w.abs(), layout)
        tensor([5.0000, 0.5000])
    """

    @abc.abstractmethod
    def count(self, layout: Layout) -> int:
        """Number of groups in the whole tensor."""

    @abc.abstractmethod
    def amax(self, x: Tensor, layout: Layout) -> Tensor:
        """Largest value of each group of a whole tensor, shape (count,)."""

    @abc.abstractmethod
    def amin(self, x: Tensor, layout: Layout) -> Tensor:
        """Smallest value of each group of a whole tensor, shape (count,)."""

    @abc.abstractmethod
    def sum(self, x: Tensor, layout: Layout) -> Tensor:
        """Sum of each group of a whole tensor, accumulated in float64, shape (count,)."""

    @abc.abstractmethod
    def sizes(self, layout: Layout) -> Tensor:
        """Number of weights of each group of a whole tensor, int64, shape (count,)."""

    @abc.abstractmethod
    def cut(self, x: Tensor, layout: Layout, fill: float) -> Tensor:
        """A whole tensor as a matrix (count, size of the largest group); shorter groups end in `fill`."""

    @abc.abstractmethod
    def expand(self, values: Tensor, layout: Layout) -> Tensor:
        """One number a group, shape (count,), as a tensor that broadcasts against the rows held here."""

    def lined(self, layout: Layout) -> Layout | None:
        """A layout for the same weights seen, as they lie in memory, as a matrix with a row a group.

        With one axis where all weights are one group; `None` where they do not lie so.
        """
        return None

    @abc.abstractmethod
    def at(self, columns: Tensor, layout: Layout) -> Tensor:
        """The group of one weight of each channel, which lies in the given column of `Layout.by_channel`."""


@dataclass(frozen=True, kw_only=True)
class PerTensor(Granularity):
    """One group: the whole tensor.

    Example:
        >>> PerTensor().count(Layout(shape=(8, 4)))
        1
    """

    def count(self, layout: Layout) -> int:
        return 1

    def amax(self, x: Tensor, layout: Layout) -> Tensor:
        return x.amax().reshape(1)

    def amin(self, x: Tensor, layout: Layout) -> Tensor:
        return x.amin().reshape(1)

    def sum(self, x: Tensor, layout: Layout) -> Tensor:
        return x.sum(dtype=torch.float64).reshape(1)

    def sizes(self, layout: Layout) -> Tensor:
        return torch.tensor([layout.numel])

    def cut(self, x: Tensor, layout: Layout, fill: float) -> Tensor:
        return x.reshape(1, -1)

    def expand(self, values: Tensor, layout: Layout) -> Tensor:
        return values.reshape(())

    def lined(self, layout: Layout) -> Layout | None:
        return Layout(shape=(layout.numel,))

    def at(self, columns: Tensor, layout: Layout) -> Tensor:
        return torch.zeros_like(columns)


@dataclass(frozen=True, kw_only=True)
class Channel(Granularity):
    """One group an output channel (a row of an embedding, a filter of a convolution).

    Example:
        >>> Channel().count(Layout(shape=(8, 4, 3, 3)))
        8
    """

    def count(self, layout: Layout) -> int:
        return layout.channels

    def amax(self, x: Tensor, layout: Layout) -> Tensor:
        return layout.by_channel(x).amax(dim=1)

    def amin(self, x: Tensor, layout: Layout) -> Tensor:
        return layout.by_channel(x).amin(dim=1)

    def sum(self, x: Tensor, layout: Layout) -> Tensor:
        return layout.by_channel(x).sum(dim=1, dtype=torch.float64)

    def sizes(self, layout: Layout) -> Tensor:
        return torch.full((layout.channels,), layout.numel // max(layout.channels, 1))

    def cut(self, x: Tensor, layout: Layout, fill: float) -> Tensor:
        return layout.by_channel(x)

    def expand(self, values: Tensor, layout: Layout) -> Tensor:
        return layout.over_channels(values)

    def lined(self, layout: Layout) -> Layout | None:
        return _rows_of(layout, layout.channels)

    def at(self, columns: Tensor, layout: Layout) -> Tensor:
        return torch.arange(len(columns), device=columns.device)


@dataclass(frozen=True, kw_only=True)
class Group(Granularity):
    """Runs of `size` weights along the inputs of each output channel; the last run of a channel may be shorter.

    Args:
        size: weights a group, >= 1.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> Group(size=4).count(Layout(shape=(2, 10)))   # runs of 4, 4, 2 in each of two rows
        6
    """

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"Group(size={self.size!r}): must be a whole number >= 1 of weights")

    def _runs(self, layout: Layout) -> tuple[int, int, int]:
        """(weights of a channel, runs in it, weights of a run): a run is no longer than its channel."""
        fan_in = max(layout.numel // max(layout.channels, 1), 1)
        size = min(self.size, fan_in)
        return fan_in, -(-fan_in // size), size

    def cut(self, x: Tensor, layout: Layout, fill: float) -> Tensor:
        fan_in, runs, size = self._runs(layout)
        matrix = layout.by_channel(x)
        missing = runs * size - fan_in
        if missing:
            matrix = torch.nn.functional.pad(matrix, (0, missing), value=fill)
        return matrix.reshape(layout.channels * runs, size)

    def count(self, layout: Layout) -> int:
        return layout.channels * self._runs(layout)[1]

    def amax(self, x: Tensor, layout: Layout) -> Tensor:
        return self.cut(x, layout, -math.inf).amax(dim=1)

    def amin(self, x: Tensor, layout: Layout) -> Tensor:
        return self.cut(x, layout, math.inf).amin(dim=1)

    def sum(self, x: Tensor, layout: Layout) -> Tensor:
        return self.cut(x, layout, 0.0).sum(dim=1, dtype=torch.float64)

    def sizes(self, layout: Layout) -> Tensor:
        fan_in, runs, size = self._runs(layout)
        of_channel = torch.full((runs,), size)
        of_channel[-1] = fan_in - (runs - 1) * size
        return of_channel.repeat(layout.channels)

    def expand(self, values: Tensor, layout: Layout) -> Tensor:
        fan_in, runs, size = self._runs(layout)
        if runs == 1:
            return layout.over_channels(values)
        matrix = values.reshape(layout.channels, runs).repeat_interleave(size, dim=1)[:, :fan_in]
        whole = layout.whole().from_channels(matrix)
        return whole if layout.rows is None else whole[slice(*layout.rows)]

    def lined(self, layout: Layout) -> Layout | None:
        fan_in, runs, size = self._runs(layout)
        return None if fan_in % size else _rows_of(layout, layout.channels * runs)

    def at(self, columns: Tensor, layout: Layout) -> Tensor:
        _, runs, size = self._runs(layout)
        return torch.arange(len(columns), device=columns.device) * runs + columns // size


def _rows_of(layout: Layout, groups: int) -> Layout | None:
    """The layout of a matrix with a row a group, if channels lie one after another."""
    if not layout.shape or not layout.is_row_major:
        return None
    each = groups // layout.shape[0]
    rows = None if layout.rows is None else (layout.rows[0] * each, layout.rows[1] * each)
    return Layout(shape=(groups, layout.numel // groups), rows=rows)


GranularityLike: TypeAlias = Literal["tensor", "channel"] | PerTensor | Channel | Group

_NAMED: dict[str, Granularity] = {"tensor": PerTensor(), "channel": Channel()}


def granularity_of(value: GranularityLike, field: str = "granularity") -> Granularity:
    """`"tensor"`, `"channel"` or a `Granularity` object, as an object.

    Raises:
        ValueError: any other value.

    Example:
        >>> granularity_of("channel")
        Channel()
    """
    if isinstance(value, str) and value in _NAMED:  # first, as to ask for a class with abstract methods takes longer
        return _NAMED[value]
    if not isinstance(value, Granularity):
        raise ValueError(f'{field}={value!r}: must be "tensor", "channel" or Group(size=...)')
    return value


def near_dead(w: Tensor, layout: Layout, share: float = NEAR_DEAD) -> int:
    """Channels none of whose weights exceeds a share of the tensor's largest; those of zeros alone count too.

    Example:
        >>> near_dead(torch.tensor([[1.0, 2.0], [1e-9, 0.0], [0.0, 0.0]]), Layout(shape=(3, 2)))
        2
    """
    if w.numel() == 0 or not w.is_floating_point():
        return 0
    w = w.float() if w.dtype.itemsize < 2 else w  # numbers of 8 bits have no extremes in PyTorch
    low, high = layout.by_channel(w).aminmax(dim=1)
    size = torch.maximum(-low, high)
    return int((size <= share * size.max()).sum())
