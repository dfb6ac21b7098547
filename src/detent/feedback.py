"""Places of a weight tensor in the metric of its inputs: what rounding one weight breaks, later ones repair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detent.grouping import Layout
from detent.targets import Choice, Params, Target
from detent.targets.base import compute_dtype

__all__ = ["Chosen", "choose_places"]


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
    moment: Tensor,
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
            runs, each with inputs of its own (groups of a convolution, experts). All zero where nothing came.
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
    parts, inputs = moment.shape[:2]
    full = layout.by_channel(w.detach()).double().reshape(parts, -1, inputs)
    straight = full @ moment
    slope = torch.zeros_like(full) if cross is None else cross.reshape(full.shape) - straight
    energy = energy if cross is not None else float((straight * full).sum())
    # |T - Q X|^2 is that of W and what leaving W adds; where T = W X, the former is zero.
    own = 0.0 if cross is None else energy - float(((straight + 2 * slope) * full).sum())

    def added(q: Tensor) -> Tensor:
        gap = layout.by_channel(q).double().reshape(full.shape) - full
        return ((gap @ moment - 2 * slope) * gap).sum(dim=2)

    before = added(plain)
    metric = _Metric(moment, damping, by_diagonal)
    start = metric.ordered(full)
    if cross is not None:
        start += metric.ordered(slope) @ metric.upper.mT @ metric.upper
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


class _Metric:
    """The order of the inputs of each part, and the upper factor U of the inverse of their damped moment in it."""

    def __init__(self, moment: Tensor, damping: float, by_diagonal: bool) -> None:
        parts, inputs = moment.shape[:2]
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
        self.upper = torch.linalg.solve_triangular(lower.flip(1, 2), unit, upper=True)
        self.back = self.order.argsort(dim=1)

    def ordered(self, x: Tensor) -> Tensor:
        """(parts, rows, inputs) with the inputs in the order of the metric."""
        return x.gather(2, self.order[:, None].expand(x.shape))

    def unordered(self, x: Tensor) -> Tensor:
        return x.gather(2, self.back[:, None].expand(x.shape))


class _Walk:
    """One walk over the inputs."""

    def __init__(self, w: Tensor, choice: Choice, layout: Layout, zero: Tensor, metric: _Metric, block: int) -> None:
        self._dtype, self._compute = w.dtype, compute_dtype(w.dtype)
        self._choice, self._layout, self._zero = choice, layout, zero
        self._metric, self._block = metric, block
        self._diagonal = metric.upper.diagonal(dim1=1, dim2=2)
        self._levels = None if choice.levels is None else choice.levels[0].by_column(choice.levels[1])
        self._kept = self._lost = torch.zeros(0)

    def places(self, w: Tensor) -> Tensor:
        """The places chosen, in the shape of the tensor; writes over the weights, (parts, rows, inputs) in order."""
        q, upper, inputs = torch.empty_like(w), self._metric.upper, w.shape[2]
        self._kept, self._lost = torch.zeros_like(w, dtype=torch.bool), self._matrix(self._zero)
        for first in range(0, inputs, self._block):
            past = min(first + self._block, inputs)
            if self._choice.pattern is not None:
                self._look_again(w, first, past)
            errors = torch.empty_like(w[:, :, first:past])
            for j in range(first, past):
                column = w[:, :, j]
                q[:, :, j] = self._place(column, j).masked_fill(self._lost[:, :, j], 0.0)
                error = (column - q[:, :, j]) / self._diagonal[:, j, None]
                errors[:, :, j - first] = error
                w[:, :, j:past] -= error[:, :, None] * upper[:, None, j, j:past]
            w[:, :, past:] -= errors @ upper[:, first:past, past:]
        return self._tensor(q).to(self._dtype)

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
        columns = self._metric.order[:, j].repeat_interleave(column.shape[1])
        places = target.project(column.reshape(-1, 1).to(self._compute), params_of(columns))
        return places.to(self._dtype).to(column.dtype).reshape(column.shape)

    def _look_again(self, w: Tensor, first: int, past: int) -> None:
        """Which weights of a block are kept, from what dropping each of all that are left would cost now."""
        assert self._choice.pattern is not None
        whole = self._tensor(w)
        gain = whole.square()
        if self._choice.levels is not None:
            target, params = self._choice.levels
            gain -= (target.project(whole.to(self._compute), params).double() - whole).square_()
        gain /= self._tensor(self._diagonal[:, None].expand(w.shape)).square_()
        decided = self._lost.clone()
        decided[:, :, first:] = False
        gain.masked_fill_(self._tensor(decided), -torch.inf).masked_fill_(self._tensor(self._kept), torch.inf)
        kept = self._matrix(self._choice.pattern(gain, self._zero))[:, :, first:past]
        self._kept[:, :, first:past] = kept
        self._lost[:, :, first:past] |= ~kept
