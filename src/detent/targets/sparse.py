"""Targets that keep some weights as they are and set the rest to zero."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent import masks
from detent.grouping import Layout
from detent.pieces import cut, is_large
from detent.schedules import is_whole
from detent.targets.base import Choice, Params, Scope, Target, check_finite, compute_dtype
from detent.targets.forms import Floats, Form
from detent.targets.forms import Sparse as SparseForm
from detent.targets.largest import COMPUTED, Near, best, largest
from detent.targets.patterns import LONGEST_BLOCK, Blocks, Mask, Pattern, Tiles, matrix

__all__ = ["NM", "Sparse", "Structured", "TopK", "square_unit"]

_PIECE = 1 << 19  # weights ranked at a time, so that passing tensors stay small beside the weight


class Sparse(Target):
    """A target that keeps some weights as they are: which ones is all there is to say.

    A final subclass says which patterns are allowed (`choose`) and, where a bit a weight is more than they take, how
    one is written (`pattern`). `SparseLevels` uses the same two to put the survivors on levels.
    """

    is_exact: ClassVar[bool] = True

    @abc.abstractmethod
    def choose(self, gain: Tensor, params: Params) -> Tensor:
        """The allowed pattern whose kept weights have the largest sum of gains, as a mask; ties go to earlier ones.

        Gains of -inf come after all others, and are not kept where a pattern may be smaller.
        """

    def pattern(self, layout: Layout) -> Pattern:
        """How a mask is written."""
        return Mask()

    def extend(self, gain: Tensor, zero: Tensor, params: Params) -> Tensor:
        """`choose` among the weights that are not zero already: what was pruned stays so, whatever it would gain.

        May write over gain.
        """
        return self.choose(gain.masked_fill_(zero, -torch.inf), params)

    def choice(self, params: Params) -> Choice:
        return Choice(pattern=partial(self.extend, params=params))

    def size(self, w: Tensor) -> Tensor:
        """What is lost by dropping each weight, for `choose`."""
        return w.detach().abs()

    def mask(self, w: Tensor, params: Params) -> Tensor:
        """Mask of the weights that `project` keeps."""
        return self.choose(self.size(w), params)

    def _numbers(self, w: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The typical distance of those that must go: any positive number if none must."""
        losers = mask.numel() - int(torch.count_nonzero(mask))
        total = torch.zeros((), dtype=torch.float64, device=w.device)
        for part, kept in zip(w.detach().reshape(-1).split(_PIECE), mask.reshape(-1).split(_PIECE), strict=True):
            total += masks.kept(part.to(compute_dtype(w.dtype)).abs(), ~kept).sum(dtype=torch.float64)
        mean = (total / max(losers, 1)).clamp_max(torch.finfo(torch.float32).max).float()
        return {"mean": torch.where(mean > 0, mean, torch.ones_like(mean))}

    def unweighed(self, params: Params, w: Tensor, weighed: Tensor) -> Params:
        return replace(params, tensors={**params.tensors, **self._numbers(w, self.mask(weighed, params))})

    def project(self, w: Tensor, params: Params) -> Tensor:
        out = torch.empty_like(w.detach())
        self.project_into(w, params, out)
        return out

    def project_into(self, w: Tensor, params: Params, out: Tensor) -> None:
        w = w.detach()
        for x, mask, q in cut(w, self.mask(w, params), out):
            masks.kept(x, mask, q).add_(0.0)  # a kept -0.0 must become +0.0

    def form(self, w: Tensor, params: Params) -> Form:
        layout, w = params.layout, w.detach()
        inside = Floats(layout=layout, dtype=w.dtype, value=w + 0.0)
        mask = self.mask(w, params)
        return SparseForm(layout=layout, dtype=w.dtype, mask=mask, inside=inside, pattern=self.pattern(layout))

    def typical(self, params: Params) -> Tensor:
        return params["mean"]

    def restored(self, w: Tensor, form: Form) -> Params:
        assert isinstance(form, SparseForm)
        mask = form.mask.to(w.device)
        return Params(tensors={**self.counted(mask, form.layout), **self._numbers(w, mask)}, layout=form.layout)

    def counted(self, mask: Tensor, layout: Layout) -> dict[str, Tensor]:
        """The params that say how much is kept, from an allowed mask."""
        return {"count": torch.tensor(int(torch.count_nonzero(mask)))}

    def recounted(self, w: Tensor, params: Params) -> Params:
        return replace(params, tensors={**params.tensors, **self.counted(w != 0, params.layout)})

    def free(self, w: Tensor, params: Params) -> Tensor:
        return self.mask(w, params)


@dataclass(frozen=True, kw_only=True)
class TopK(Sparse):
    """At most k non-zero weights: `project(w)` keeps the k largest |w| and sets the others to zero.

    Ties are broken by position (row-major), so the count is exact and every rank agrees.

    Args:
        keep: fraction of weights kept, a `float` in (0, 1], rounded to the nearest count; or a count, an `int` >= 1;
            or "nonzero", as many as are not zero when the target is first fitted: what an earlier pruning left.
        scope: "tensor": `keep` applies to each tensor. "model": `keep` applies to all tensors of the rule
            together; `fit` then shares the count out by one threshold over all of them.
        share: what that threshold is on, for scope "model". "magnitude": |w|. "lamp": w^2 divided by the sum of the
            squares that are no smaller in the same tensor, which is 1 for the largest: no tensor is emptied as long
            as there are as many weights to keep as tensors, and one of many small weights keeps its part.

    Raises:
        ValueError: keep outside its range, or an unknown scope or share.

    Example:
        >>> w = torch.tensor([3.0, -1.0, 1.0, -4.0])
        >>> half = TopK(keep=0.5)
        >>> half.project(w, half.fit(w))
        tensor([ 3.,  0.,  0., -4.])

    Reference: magnitude pruning; Han et al., arXiv 1506.02626. "lamp": Lee et al., arXiv 2010.07611, eq. 1.
    """

    keep: float | int | Literal["nonzero"]
    scope: Literal["tensor", "model"] = "tensor"  # type: ignore[assignment]
    share: Literal["magnitude", "lamp"] = "magnitude"

    def __post_init__(self) -> None:
        if isinstance(self.keep, str) and self.keep != "nonzero":
            raise ValueError(f'TopK(keep={self.keep!r}): must be a fraction in (0, 1], a count >= 1 or "nonzero"')
        if self.keep != "nonzero":
            _check_keep("TopK", self.keep)
        if self.scope not in ("tensor", "model"):
            raise ValueError(f'TopK(scope={self.scope!r}): must be "tensor" or "model"')
        if self.share not in ("magnitude", "lamp"):
            raise ValueError(f'TopK(share={self.share!r}): must be "magnitude" or "lamp"')
        if self.share == "lamp" and self.scope != "model":
            raise ValueError(f'TopK(share="lamp", scope={self.scope!r}): a count is shared out in scope "model" only')
        super().__post_init__()

    @property
    def against_collapse(self) -> str:
        if self.scope == "tensor":
            return "keep more of it"
        other = 'share="lamp" or ' if self.share == "magnitude" else ""
        return f'one threshold over the model does that where weights are small: use {other}scope="tensor"'

    def accepts(self, shape: Sequence[int], dtype: torch.dtype, layout: Layout) -> str | None:
        if self.scope == "tensor" and isinstance(self.keep, int) and self.keep > layout.numel:
            return f"TopK(keep={self.keep}) asks for more weights than the {layout.numel} there are"
        return Target.accepts(self, shape, dtype, layout)

    def _count(self, weights: Sequence[Tensor], previous: Sequence[Params | None]) -> int:
        if isinstance(self.keep, str):
            known = [int(old["count"]) for old in previous if old is not None]
            if len(known) == len(weights):  # counted once: training moves zeros that nothing holds
                return sum(known)
            return sum(int(torch.count_nonzero(w.detach())) for w in weights)
        return _count_of("TopK", self.keep, sum(w.numel() for w in weights), "weights")

    def _params(self, w: Tensor, layout: Layout, count: int) -> Params:
        numbers = self._numbers(w, largest(w.detach().abs(), count))
        return Params(tensors={"count": torch.tensor(count), **numbers}, layout=layout)

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        check_finite(w)
        return self._params(w, layout or Layout(shape=tuple(w.shape)), self._count([w], [previous]))

    def fit_model(
        self, weights: Sequence[Tensor], layouts: Sequence[Layout], previous: Sequence[Params | None]
    ) -> list[Params]:
        if self.scope == "tensor":
            return Target.fit_model(self, weights, layouts, previous)
        for w in weights:
            check_finite(w)
        sizes = [w.numel() for w in weights]
        double = self.share == "lamp" or any(w.dtype == torch.float64 for w in weights)
        # One tensor's scores at a time: all of them beside what they are put together in would be another whole model.
        flat = torch.empty(sum(sizes), dtype=torch.float64 if double else torch.float32, device=weights[0].device)
        for w, part in zip(weights, flat.split(sizes), strict=True):
            part.copy_(self._score(w.detach().reshape(-1)))
        kept = largest(flat, self._count(weights, previous))
        del flat
        counts = [int(torch.count_nonzero(part)) for part in kept.split(sizes)]
        return [self._params(w, layout, k) for w, layout, k in zip(weights, layouts, counts, strict=True)]

    def carried(self, params: Params) -> Params | None:
        return params if self.keep == "nonzero" else None

    def _score(self, w: Tensor) -> Tensor:
        """What the threshold over all tensors is on."""
        if self.share == "magnitude":
            return w.to(compute_dtype(w.dtype)).abs()
        # Squares of float32 are exact in float64 and sort as |w| does; those of float64 may be equal where |w| is not.
        size = (w.double().square() if w.dtype == torch.float64 else w.abs().float()).neg_()
        # From the largest down, of equal ones the earlier first: the order in which `_largest` keeps them.
        if size.device.type == "cpu":  # where torch would write the sorted numbers too
            order = torch.from_numpy(size.numpy().argsort(kind="stable"))
        else:
            order = size.argsort(stable=True)
        score = torch.empty(size.shape, dtype=torch.float64, device=w.device)
        above = torch.zeros(1, dtype=torch.float64, device=w.device)
        for places in order.split(_PIECE):
            part = -size[places] if w.dtype == torch.float64 else size[places].double().square_()
            sums = torch.cat([above, part]).cumsum(0)[1:]
            above = sums[-1:].clone()
            score[places] = torch.where(sums > 0, part / torch.where(sums > 0, sums, 1.0), part)
        return score

    def choose(self, gain: Tensor, params: Params) -> Tensor:
        return largest(gain, int(params["count"]), params.once("near", Near))

    def project_into(self, w: Tensor, params: Params, out: Tensor) -> None:
        near, found = params.once("near", Near), None
        if is_large(w) and w.is_contiguous() and out.is_contiguous() and w.dtype in COMPUTED:
            x, q = w.detach().view(-1), out.view(-1)
            pieces = list(cut(x, q))

            def keep(i: int, above: Tensor) -> None:
                masks.kept(pieces[i][0], above, pieces[i][1]).add_(0.0)

            found = near.others((part.abs() for part, _ in pieces), keep, len(x), int(params["count"]))
            if found is not None:
                q[found] = x[found]
        if found is None:
            super().project_into(w, params, out)


@dataclass(frozen=True, kw_only=True)
class NM(Sparse):
    """At most n non-zero weights in every m consecutive ones along the inputs: the n largest |w| of each block.

    Blocks run along the inputs of one output channel. Ties are broken by position in the block; a last short block
    keeps min(n, its length). On disk a block is the number of its pattern, `ceil(log2(C(m, n)))` bits, and n values.

    Args:
        n: non-zero weights a block, 1 to m.
        m: weights a block, 1 to 2^31.
        along: order of the inputs of a convolution. "channels": input channels at one kernel position, which is how
            2:4 hardware reads a convolution; a depthwise one has a single input channel and is left whole. "columns":
            columns of the GEMM matrix, that is input channel by input channel, each with its kernel positions. Linear
            layers know no difference.

    Raises:
        ValueError: n or m outside its range, or an unknown order.

    Example:
        >>> w = torch.tensor([[3.0, -1.0, 1.0, -4.0, 0.5, 0.1]])
        >>> two_of_four = NM(n=2, m=4)
        >>> two_of_four.project(w, two_of_four.fit(w))
        tensor([[ 3.0000,  0.0000,  0.0000, -4.0000,  0.5000,  0.1000]])

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
    """

    n: int
    m: int
    along: Literal["channels", "columns"] = "channels"

    def __post_init__(self) -> None:
        if not is_whole(self.m, 1, LONGEST_BLOCK):
            raise ValueError(f"NM(m={self.m!r}): a block holds a whole number of weights, 1 to {LONGEST_BLOCK}")
        if not is_whole(self.n, 1, self.m):
            raise ValueError(f"NM(n={self.n!r}, m={self.m}): n must be a whole number from 1 to m")
        if self.along not in ("channels", "columns"):
            raise ValueError(f'NM(along={self.along!r}): must be "channels" or "columns"')
        super().__post_init__()

    @property
    def scope(self) -> Scope:
        return "tensor"  # a row of axis 0 is no output channel in a transposed convolution

    def pattern(self, layout: Layout) -> Blocks:
        return Blocks(n=self.n, m=self.m, along=self.along)

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        check_finite(w)
        params = Params(layout=layout or Layout(shape=tuple(w.shape)))
        count = torch.tensor(self.pattern(params.layout).survivors(params.layout))
        return Params(tensors={"count": count, **self._numbers(w, self.mask(w, params))}, layout=params.layout)

    def choose(self, gain: Tensor, params: Params) -> Tensor:
        layout = params.layout.whole()
        # Some channels at a time: along the channels of a convolution, lines are a copy of the gains.
        parts = layout.by_channel(gain).split(max(1, _PIECE * layout.channels // layout.numel))
        chosen, pattern = [], self.pattern(layout)
        for part in parts:
            blocks, rest = pattern.cut(part, layout)
            chosen.append(pattern.joined(best(blocks, self.n), best(rest, self.n), layout))
        return layout.from_channels(torch.cat(chosen))

    def project_into(self, w: Tensor, params: Params, out: Tensor) -> None:
        layout = params.layout.whole()
        flat = is_large(w) and self.pattern(layout).is_flat(layout) and w.is_contiguous() and out.is_contiguous()
        if not flat:
            super().project_into(w, params, out)
            return
        for x, q in cut(w.detach().view(-1, self.m), out.view(-1, self.m), by_rows=True):
            masks.kept(x, best(x.abs(), self.n), q).add_(0.0)

    def extend(self, gain: Tensor, zero: Tensor, params: Params) -> Tensor:
        held = gain[zero]
        mask = super().extend(gain, zero, params)
        if bool((mask & zero).any()):  # a block has fewer others than it keeps: those, and the best of its zeros
            gain[zero] = held
            mask = self.choose(gain.masked_fill_(mask & ~zero, torch.inf), params)
        return mask


@dataclass(frozen=True, kw_only=True)
class Structured(Sparse):
    """At most k non-zero groups of the GEMM matrix: the k of the largest L2 norm; all other groups are zero.

    The matrix has a row an output channel and a column an input position (input channel by input channel, each with
    its kernel positions). Ties are broken by position, so counts are exact. In a convolution of several groups a
    column or channel is that position in all of them.

    Args:
        group: "filter": a row. "column": a column, one input position of all filters (shape-wise). "channel": the
            columns of one input channel. "block": a tile of the matrix.
        keep: fraction of the groups kept, a `float` in (0, 1], rounded to the nearest count; or a count, an `int` >= 1.
        scope: "tensor": `keep` applies to each tensor. "model": to the groups of all tensors of the rule together,
            which are then compared by their mean square, as groups of different layers have different sizes.
        block: (rows, columns) of a tile, each >= 1, for group="block"; tiles at the edges may be smaller.

    Raises:
        ValueError: a field outside its range, or a block without group="block" or the other way round.

    Example:
        >>> w = torch.tensor([[3.0, -1.0], [0.5, 0.1], [1.0, -4.0]])
        >>> rows = Structured(group="filter", keep=2)
        >>> rows.project(w, rows.fit(w))
        tensor([[ 3., -1.],
                [ 0.,  0.],
                [ 1., -4.]])

    Reference: Zhang et al., "StructADMM", arXiv 1807.11091.
    """

    group: Literal["filter", "channel", "column", "block"]
    keep: float | int
    scope: Literal["tensor", "model"] = "tensor"  # type: ignore[assignment]
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.group not in ("filter", "channel", "column", "block"):
            raise ValueError(f'Structured(group={self.group!r}): must be "filter", "channel", "column" or "block"')
        _check_keep("Structured", self.keep)
        if self.scope not in ("tensor", "model"):
            raise ValueError(f'Structured(scope={self.scope!r}): must be "tensor" or "model"')
        if (self.block is not None) != (self.group == "block"):
            raise ValueError(f"Structured(group={self.group!r}, block={self.block}): tiles need both, others no block")
        sides = self.block if isinstance(self.block, tuple) and len(self.block) == 2 else (0,)
        if self.block is not None and not all(type(side) is int and side >= 1 for side in sides):
            raise ValueError(f"Structured(block={self.block}): must be a pair (rows, columns) of whole numbers >= 1")
        super().__post_init__()

    @property
    def against_collapse(self) -> str:
        return 'use scope="tensor", or keep more of it' if self.scope == "model" else "keep more of it"

    def accepts(self, shape: Sequence[int], dtype: torch.dtype, layout: Layout) -> str | None:
        reason = Target.accepts(self, shape, dtype, layout)
        if reason is None and self.scope == "tensor" and isinstance(self.keep, int):
            groups = self.pattern(layout).count(layout)
            if self.keep > groups:
                return f"Structured(keep={self.keep}) asks for more groups ({self.group}) than the {groups} there are"
        return reason

    def pattern(self, layout: Layout) -> Tiles:
        """Tiles, which never reach over several of the matrices that are stacked."""
        rows, columns = matrix(layout)
        deep = rows // layout.batch
        if self.group == "block":
            assert self.block is not None
            return Tiles(rows=min(self.block[0], deep), columns=min(self.block[1], columns))
        sides = {"filter": (1, columns), "column": (deep, 1), "channel": (deep, layout.kernel)}
        return Tiles(rows=sides[self.group][0], columns=sides[self.group][1])

    def _sums(self, gain: Tensor, layout: Layout) -> Tensor:
        return self.pattern(layout).cut(gain, layout).sum(dim=1, dtype=torch.float64)

    def _params(self, w: Tensor, layout: Layout, groups: int) -> Params:
        held = Params(tensors={"groups": torch.tensor(groups)}, layout=layout)
        return Params(tensors={**held.tensors, **self._numbers(w, self.mask(w, held))}, layout=layout)

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        check_finite(w)
        layout = layout or Layout(shape=tuple(w.shape))
        return self._params(w, layout, _count_of("Structured", self.keep, self.pattern(layout).count(layout), "groups"))

    def fit_model(
        self, weights: Sequence[Tensor], layouts: Sequence[Layout], previous: Sequence[Params | None]
    ) -> list[Params]:
        if self.scope == "tensor":
            return Target.fit_model(self, weights, layouts, previous)
        for w in weights:
            check_finite(w)
        unit = square_unit(*weights)
        means = [
            self._sums((w.detach().double() * unit).square_(), layout) / self.pattern(layout).sizes(layout).to(w.device)
            for w, layout in zip(weights, layouts, strict=True)
        ]
        total = _count_of("Structured", self.keep, sum(map(len, means)), "groups")
        kept = largest(torch.cat(means), total).split([len(part) for part in means])
        return [
            self._params(w, layout, int(part.sum())) for w, layout, part in zip(weights, layouts, kept, strict=True)
        ]

    def size(self, w: Tensor) -> Tensor:
        x = w.detach().double()
        return (x * square_unit(x)).square_()

    def extend(self, gain: Tensor, zero: Tensor, params: Params) -> Tensor:
        layout = params.layout.whole()  # a group goes with its largest: only one of nothing but zeros is zero
        tiles = self.pattern(layout)
        return super().extend(gain, ~tiles.spread(tiles.cut(~zero, layout).any(dim=1), layout), params)

    def choose(self, gain: Tensor, params: Params) -> Tensor:
        layout = params.layout.whole()
        chosen = largest(self._sums(gain, layout), int(params["groups"]))
        return self.pattern(layout).spread(chosen, layout)

    def counted(self, mask: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"groups": self.pattern(layout).cut(mask, layout).any(dim=1).sum().cpu()}


# --- counting and ranking ----------------------------------------------------------------------------------------


def _check_keep(who: str, keep: object) -> None:
    if isinstance(keep, bool) or (isinstance(keep, int) and keep < 1):
        raise ValueError(f"{who}(keep={keep}): a count must be an int >= 1")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise ValueError(f"{who}(keep={keep}): a fraction must lie in (0, 1]")
    if not isinstance(keep, (int, float)):
        raise ValueError(f"{who}(keep={keep!r}): must be a fraction in (0, 1] or a count >= 1")


def _count_of(who: str, keep: float, total: int, what: str) -> int:
    if not isinstance(keep, int):
        return max(1, round(keep * total))
    if keep > total:
        raise ValueError(f"{who}(keep={keep}) asks for more {what} than the {total} there are")
    return keep


def square_unit(*tensors: Tensor) -> float:
    """A power of two by which to multiply weights so that their squares neither overflow nor vanish together."""
    ends = [end for x in tensors for end in torch.aminmax(x.detach())]
    largest = max(abs(float(end)) for end in ends) if all(map(torch.isfinite, ends)) else math.inf
    return math.ldexp(1.0, -min(max(math.frexp(largest)[1], -1000), 1000)) if math.isfinite(largest) else 1.0
