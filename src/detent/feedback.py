"""Places of a weight tensor in the metric of its inputs: what rounding one weight breaks, later ones repair."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detent.grouping import Layout
from detent.targets import Choice, Params, Target
from detent.targets.base import compute_dtype

__all__ = ["Chosen", "Prior", "choose_places"]


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What inputs are like that nobody has seen, in units of the energy that each has of its own.

        H = I + near * (ones between the kernel positions of one input channel) + far * (ones between all inputs)

    What comes out of a ReLU is never negative, so any two inputs have positive products on average (`far`), and
    neighbouring positions of an image are nearly alike (`near`). Errors then hurt that add up in a kernel, and in a
    channel, most of all: an output that is off by the same everywhere. Where inputs have no mean and know nothing of
    each other, the price is a slightly larger squared error.

    Args:
        near: >= 0.
        far: >= 0.
        kernel: how many inputs in a row are the kernel positions of one input channel.

    Example:
        >>> from detent import UniformStep
        >>> w, grid = torch.full((1, 8), 0.3), UniformStep(step=1.0)
        >>> choose_places(w, grid, grid.fit(w), Prior(kernel=4)).places    # two of eight: 2.4 in all
        tensor([[0., 0., 1., 0., 0., 0., 1., 0.]])
    """

    near: float = 2.0
    far: float = 0.1
    kernel: int = 1


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Where the weights of one tensor go, and what that costs at its outputs.

    Args:
        places: the chosen places, in shape and dtype of the weights; `project` leaves them where they are.
        plain: squared error of the outputs over all inputs, had each weight gone to its nearest place.
        error: the same of the chosen places; never more than `plain`.
        energy: the squares of the outputs aimed at.
    """

    places: Tensor
    plain: float
    error: float
    energy: float


def choose_places(
    w: Tensor,
    target: Target,
    params: Params,
    moment: Tensor | Prior,
    *,
    cross: Tensor | None = None,
    energy: float = 0.0,
    held: Tensor | None = None,
    damping: float = 0.01,
    by_diagonal: bool = True,
    block: int = 128,
) -> Chosen:
    """Choose places one input at a time, each time moving the weights that are still free against the error made.

        minimise |(W - Q) X|^2 = tr (W - Q) H (W - Q)',  H = X X'
        e = (w_j - q_j) / U_jj,  w_k <- w_k - e U_jk for k > j,  with U upper and U' U = (H + damping mean(diag H) I)^-1

    The error grows by exactly e^2 a weight, which also decides which weights a pattern keeps: those whose dropping
    would cost the most, looked at anew in each block. A weight that is exactly zero, and whose place is zero, was
    pruned and stays zero. Where the result is worse than plain rounding (it is greedy), plain rounding stays: in that
    output channel, or in the whole tensor if a pattern is chosen.

    Args:
        w: the whole tensor, full precision.
        target: a target whose weights choose one by one (`Target.choice`).
        params: its fitted params; they are not fitted again.
        moment: H of each part, (parts, inputs, inputs) in float64: rows of `Layout.by_channel` fall into so many equal
            runs, each with inputs of its own (groups of a convolution, experts). All zero where nothing came. Or what
            inputs are taken to be like, for which nothing is inverted: damping has no part in it.
        cross: T X' in rows of `Layout.by_channel`, if the outputs are to be T instead of W X: then the walk starts from
            the weights that give T best, W + (T X' - W H) H^-1.
        energy: |T|^2, with `cross`.
        held: mask of further weights that must stay zero.
        damping: share of the mean of the diagonal that is added to it, > 0.
        by_diagonal: inputs of the largest energy first, else in their order.
        block: inputs after which the effect on all later ones is worked out, and patterns look again.

    Raises:
        ValueError: a metric that is no longer positive definite with this damping.

    Example:
        >>> from detent import Uniform
        >>> w = torch.tensor([[0.9, 0.3, 0.3]])
        >>> grid = Uniform(bits=2, range="minmax")
        >>> grid.project(w, grid.fit(w))
        tensor([[0.9000, 0.0000, 0.0000]])
        >>> alike = torch.ones(1, 3, 3, dtype=torch.float64)    # three inputs that are always equal: the sum counts
        >>> choose_places(w, grid, grid.fit(w), alike).places
        tensor([[0.9000, 0.0000, 0.9000]])

    Reference: Frantar, Alistarh, "Optimal Brain Compression", arXiv 2208.11580; the order and the Cholesky form are
    those of Frantar et al., "GPTQ", arXiv 2210.17323; patterns as in "SparseGPT", arXiv 2301.00774.
    """
    choice, layout = target.choice(params), params.layout
    assert choice is not None, target
    plain = target.project(w, params)
    zero = (w == 0) & (plain == 0)
    zero = zero if held is None else zero | held
    metric = _Known(moment, layout, w.device) if isinstance(moment, Prior) else _Seen(moment, damping, by_diagonal)
    full = layout.by_channel(w.detach()).double().reshape(metric.parts, -1, metric.inputs)
    straight = metric.applied(full)
    slope = torch.zeros_like(full) if cross is None else cross.reshape(full.shape) - straight
    energy = energy if cross is not None else float((straight * full).sum())
    # |T - Q X|^2 is that of W and what leaving W adds; where T = W X, the former is zero.
    own = 0.0 if cross is None else energy - float(((straight + 2 * slope) * full).sum())

    def added(q: Tensor) -> Tensor:
        gap = layout.by_channel(q).double().reshape(full.shape) - full
        return ((metric.applied(gap) - 2 * slope) * gap).sum(dim=2)

    before = added(plain)
    start = metric.ordered(full)
    if cross is not None:
        start += metric.solved(metric.ordered(slope))
    found = target.project(_Walk(w, choice, layout, zero, metric, block).places(start), params)
    after = added(found)
    if choice.pattern is None:
        better = after < before
        rows = better.reshape(-1, 1)
        found = layout.from_channels(torch.where(rows, layout.by_channel(found), layout.by_channel(plain)))
        after = torch.where(better, after, before)
    elif not float(after.sum()) < float(before.sum()):
        found, after = plain, before
    errors = [max(own + float(each.sum()), 0.0) for each in (before, after)]
    return Chosen(places=found, plain=errors[0], error=errors[1], energy=energy)


class _Metric(abc.ABC):
    """H of each part, and U of the inverse of what is added to it, with the inputs in the order of the walk.

    Attributes:
        parts: how many metrics.
        inputs: of each.
        diagonal: that of U, (parts, inputs), in order.
        order: (parts, inputs), which input comes when.
    """

    parts: int
    inputs: int
    diagonal: Tensor
    order: Tensor

    @abc.abstractmethod
    def applied(self, x: Tensor) -> Tensor:
        """`x H` of (parts, rows, inputs), out of order."""

    @abc.abstractmethod
    def solved(self, x: Tensor) -> Tensor:
        """`x H^-1`, in order."""

    @abc.abstractmethod
    def within(self, first: int, past: int) -> Tensor:
        """Rows and columns of U of some inputs, (parts, past - first, past - first)."""

    @abc.abstractmethod
    def beyond(self, errors: Tensor, first: int, past: int) -> Tensor:
        """`errors U` of some inputs for all later ones; both with the rows last, and as it broadcasts against those."""

    def blocks(self, size: int) -> int:
        """How many inputs to take at a time, if so many are wanted."""
        return size

    def ordered(self, x: Tensor) -> Tensor:
        """(parts, rows, inputs) with the inputs in the order of the metric."""
        return x.gather(2, self.order[:, None].expand(x.shape))

    def unordered(self, x: Tensor) -> Tensor:
        return x.gather(2, self.order.argsort(dim=1)[:, None].expand(x.shape))


class _Seen(_Metric):
    """Moments of inputs."""

    def __init__(self, moment: Tensor, damping: float, by_diagonal: bool) -> None:
        self._moment = moment
        self.parts, self.inputs = parts, inputs = moment.shape[:2]
        size = moment.diagonal(dim1=1, dim2=2)
        if by_diagonal:
            self.order = size.sort(dim=1, descending=True, stable=True).indices
        else:
            self.order = torch.arange(inputs, device=moment.device).expand(parts, inputs)
        at = self.order[:, :, None].expand(parts, inputs, inputs)
        damped = moment.gather(1, at).gather(2, at.transpose(1, 2))
        live = size > 0
        mean = (size.sum(dim=1) / live.sum(dim=1).clamp_min(1))[:, None]
        # An input that is always zero has no say: any number keeps it apart from all others.
        level = torch.where(mean > 0, mean, 1.0)
        damped.diagonal(dim1=1, dim2=2).add_(torch.where(live, damping * mean, level).gather(1, self.order))
        # H = R R' with R upper is the Cholesky factor of H from its other end, and U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if bool(failed.any()):
            raise ValueError(f"damping={damping:g}: the inputs depend on one another so far that more is needed")
        unit = torch.eye(inputs, dtype=moment.dtype, device=moment.device).expand(parts, inputs, inputs)
        self._upper = torch.linalg.solve_triangular(lower.flip(1, 2), unit, upper=True)
        self.diagonal = self._upper.diagonal(dim1=1, dim2=2)

    def applied(self, x: Tensor) -> Tensor:
        return x @ self._moment

    def solved(self, x: Tensor) -> Tensor:
        return x @ self._upper.mT @ self._upper

    def within(self, first: int, past: int) -> Tensor:
        return self._upper[:, first:past, first:past]

    def beyond(self, errors: Tensor, first: int, past: int) -> Tensor:
        return self._upper[:, first:past, past:].mT @ errors


class _Known(_Metric):
    """A prior: of each row of U, all that belongs to the same kernel is one number, and all that comes later another.

    U_jj U_jk = (H_jj..)^-1_jk over the inputs from j on: what is left of a kernel, and whole ones. By Sherman and
    Morrison its inverse is that of the kernels, each (I - near / (1 + near m) ones), less a product of two vectors.
    """

    def __init__(self, prior: Prior, layout: Layout, device: torch.device) -> None:
        self.parts, self.inputs = 1, layout.numel // layout.channels
        self._prior = prior
        at = torch.arange(self.inputs, dtype=torch.float64, device=device)
        self.order = at.long()[None]
        near, far, kernel = prior.near, prior.far, prior.kernel
        left = kernel - at % kernel  # of the kernel, this one included
        later = self.inputs - at - left
        mine, others = 1 / (1 + near * left), 1 / (1 + near * kernel)
        gone = far / (1 + far * (left * mine + later * others))
        self.diagonal = (1 - near * mine - gone * mine.square()).sqrt()[None]
        self._same = (-near * mine - gone * mine.square()) / self.diagonal[0]
        self._later = -gone * mine * others / self.diagonal[0]

    def applied(self, x: Tensor) -> Tensor:
        kernels = x.unflatten(2, (-1, self._prior.kernel)).sum(dim=3, keepdim=True)
        found = self._prior.near * kernels + self._prior.far * kernels.sum(dim=2, keepdim=True)
        return x + found.expand(*found.shape[:3], self._prior.kernel).flatten(2)

    def solved(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # nobody aims at other outputs without inputs

    def within(self, first: int, past: int) -> Tensor:
        at = torch.arange(first, past, device=self.order.device) // self._prior.kernel
        upper = torch.where(at[:, None] == at, self._same[first:past, None], self._later[first:past, None]).triu_(1)
        return (upper + self.diagonal[0, first:past].diag())[None]

    def beyond(self, errors: Tensor, first: int, past: int) -> Tensor:
        return (self._later[first:past] @ errors)[:, None]

    def blocks(self, size: int) -> int:
        return math.ceil(size / self._prior.kernel) * self._prior.kernel


class _Walk:
    """One walk over the inputs."""

    def __init__(self, w: Tensor, choice: Choice, layout: Layout, zero: Tensor, metric: _Metric, block: int) -> None:
        self._dtype, self._compute = w.dtype, compute_dtype(w.dtype)
        self._choice, self._layout, self._zero = choice, layout, zero
        self._metric, self._block = metric, metric.blocks(block)
        self._levels = None if choice.levels is None else choice.levels[0].by_column(choice.levels[1])
        self._kept = self._lost = torch.zeros(0)

    def places(self, w: Tensor) -> Tensor:
        """The places chosen, in the shape of the tensor; writes over the weights, (parts, rows, inputs) in order."""
        free = w.transpose(1, 2).contiguous()  # the rows of an input lie side by side
        q, inputs = torch.empty_like(free), w.shape[2]
        self._kept, self._lost = torch.zeros_like(w, dtype=torch.bool), self._matrix(self._zero)
        loses = self._choice.pattern is not None or bool(self._zero.any())
        for first in range(0, inputs, self._block):
            past = min(first + self._block, inputs)
            if self._choice.pattern is not None:
                self._look_again(free.transpose(1, 2), first, past)
            here, upper = free[:, first:past], self._metric.within(first, past)
            errors = torch.empty_like(here)
            for j in range(past - first):
                place = q[:, first + j]
                place.copy_(self._place(here[:, j], first + j))
                if loses:
                    place.masked_fill_(self._lost[:, :, first + j], 0.0)
                torch.sub(here[:, j], place, out=errors[:, j]).div_(self._metric.diagonal[:, first + j, None])
                here[:, j + 1 :].addcmul_(upper[:, j, j + 1 :, None], errors[:, j, None], value=-1.0)
            free[:, past:] -= self._metric.beyond(errors, first, past)
        return self._tensor(q.transpose(1, 2)).to(self._dtype)

    def _matrix(self, x: Tensor) -> Tensor:
        """A tensor of the shape of the weights as (parts, rows, inputs) in the order of the metric."""
        parts, inputs = self._metric.order.shape
        return self._metric.ordered(self._layout.by_channel(x).reshape(parts, -1, inputs))

    def _tensor(self, x: Tensor) -> Tensor:
        return self._layout.from_channels(self._metric.unordered(x).reshape(-1, x.shape[2]))

    def _place(self, column: Tensor, j: int) -> Tensor:
        """Places of one weight of each row."""
        if self._levels is None:
            return column.to(self._dtype).to(column.dtype)
        target, params_of = self._levels
        columns = self._metric.order[:, j, None].expand(column.shape).reshape(-1)
        places = target.project(column.reshape(-1, 1).to(self._compute), params_of(columns))
        return places.to(self._dtype).reshape(column.shape)

    def _look_again(self, w: Tensor, first: int, past: int) -> None:
        """Which weights of a block are kept, from what dropping each of all that are left would cost now."""
        assert self._choice.pattern is not None
        whole = self._tensor(w)
        gain = whole.square()
        if self._choice.levels is not None:
            target, params = self._choice.levels
            gain -= (target.project(whole.to(self._compute), params).double() - whole).square_()
        gain /= self._tensor(self._metric.diagonal[:, None].expand(w.shape)).square_()
        decided = self._lost.clone()
        decided[:, :, first:] = False
        gain.masked_fill_(self._tensor(decided), -torch.inf).masked_fill_(self._tensor(self._kept), torch.inf)
        kept = self._matrix(self._choice.pattern(gain, self._zero))[:, :, first:past]
        self._kept[:, :, first:past] = kept
        self._lost[:, :, first:past] |= ~kept
