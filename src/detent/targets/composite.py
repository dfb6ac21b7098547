"""Intersections of targets: few weights, and those on levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from detent import masks
from detent.grouping import Granularity, Layout, PerTensor, granularity_of
from detent.pieces import cut
from detent.schedules import is_whole
from detent.targets.base import Choice, Params, Scope, Target, check_finite
from detent.targets.forms import Form
from detent.targets.forms import Sparse as SparseForm
from detent.targets.sparse import Sparse, square_unit

__all__ = ["SparseLevels"]

_PATTERN = "pattern."
_PIECE = 1 << 18  # weights whose gains are worked out at a time


@dataclass(frozen=True, kw_only=True)
class SparseLevels(Target):
    """Few weights, each of them on a level: `project(w)` keeps the allowed pattern of the largest gains.

        gain(w) = w^2 - (w - q)^2 with q the level nearest to w;    project(w) = q where kept, 0 elsewhere

    The squared distance to the set is sum(w^2) minus the gains of what is kept, so the pattern of the largest gains
    (k of them, n in each block of m, whole groups by their sum) is the nearest one. It is that of the largest |w| only
    where all weights share one set of levels that is its own mirror image: with a scale a channel the two part.
    Levels need no zero of their own: zeros come from the pattern, and only survivors have codes. If they have none,
    every survivor lies on a level however small it is; if they have one, a survivor may be zero.

    A weight that is exactly zero has been pruned: it stays zero, whatever it would gain, and the nearest pattern is
    sought among the other weights. Where those are fewer than `TopK` or `Structured` ask for, fewer survive; a block of
    `NM` is filled up with zeros, which then go to the level nearest to them.

    The levels are fitted to the survivors alone: first to those of the largest |w|, then in turns, pattern from gains
    and levels from its survivors, as long as the squared error falls. Counts that a model-wide sparse target shares
    out follow |w|.

    Args:
        sparse: which patterns are allowed: `TopK`, `NM` or `Structured`.
        survivors: where kept weights may lie: `Uniform` or another target that takes weights one at a time.
        rounds: most turns of pattern and levels in a fit, >= 1.

    Raises:
        ValueError: a sparse target that is none, levels that are not for single weights, or fewer than 1 round.

    Example:
        >>> from detent import TopK, Uniform
        >>> w = torch.tensor([0.9, -0.2, 0.35, 0.1])
        >>> both = SparseLevels(sparse=TopK(keep=2), survivors=Uniform(bits=3, range="minmax"))
        >>> both.project(w, both.fit(w))
        tensor([0.9000, 0.0000, 0.3000, 0.0000])

    Reference: pruning, then quantizing what is left, is Ye et al., arXiv 1811.01907; the joint projection is ours.
    """

    sparse: Sparse
    survivors: Target
    rounds: int = 4

    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.sparse, Sparse):
            raise ValueError(f"SparseLevels(sparse={self.sparse!r}): must be a sparse target such as TopK(keep=0.1)")
        alone = isinstance(self.survivors, Target) and self.survivors.scope == "element"
        if not alone or self.survivors.fits_together:
            raise ValueError(
                f"SparseLevels(survivors={self.survivors!r}): must be a target that takes weights one at a time, such "
                "as Uniform(bits=4)"
            )
        if not is_whole(self.rounds):
            raise ValueError(f"SparseLevels(rounds={self.rounds!r}): must be a whole number >= 1")
        super().__post_init__()

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        return self.sparse.is_exact and self.survivors.is_exact

    @property
    def has_bits(self) -> bool:  # type: ignore[override]
        return self.survivors.has_bits

    @property
    def widths(self) -> Sequence[int]:
        return self.survivors.widths

    @property
    def has_codebook(self) -> bool:  # type: ignore[override]
        return self.survivors.has_codebook

    @property
    def bits(self) -> int | None:
        """Width of the survivors' codes, if they have one that can change."""
        return getattr(self.survivors, "bits", None) if self.has_bits else None

    @property
    def against_collapse(self) -> str:
        return self.sparse.against_collapse

    @property
    def scope(self) -> Scope:
        return "model" if self.sparse.scope == "model" else "tensor"

    def accepts(self, shape: Sequence[int], dtype: torch.dtype, layout: Layout) -> str | None:
        return self.sparse.accepts(shape, dtype, layout) or self.survivors.accepts(shape, dtype, layout)

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        check_finite(w)
        pattern = self.sparse.fit(w, layout, None if previous is None else _pattern_of(previous))
        return self._fit_jointly(w.detach(), pattern, previous)

    def fit_model(
        self, weights: Sequence[Tensor], layouts: Sequence[Layout], previous: Sequence[Params | None]
    ) -> list[Params]:
        known = [None if old is None else _pattern_of(old) for old in previous]
        patterns = self.sparse.fit_model(weights, layouts, known)
        fitted = zip(weights, patterns, previous, strict=True)
        return [self._fit_jointly(w.detach(), pattern, old) for w, pattern, old in fitted]

    def _fit_jointly(self, w: Tensor, pattern: Params, previous: Params | None) -> Params:
        old = None if previous is None else _levels_of(previous)
        old = old if old is not None and old.tensors else None  # what is carried over has a pattern alone
        mask = self.sparse.extend(self.sparse.size(w), w == 0, pattern)
        levels, error, distance = pattern, torch.inf, torch.ones(())
        for turn in range(self.rounds):
            found = self._fit_levels(w, mask, pattern.layout, old)
            q, chosen = self._choose(w, pattern, found)
            far, off = _distance(w, q, chosen)
            del q
            if turn and not off < error:
                break
            levels, error, distance = found, off, far
            if torch.equal(chosen, mask):
                break
            mask = chosen
        tensors = {_PATTERN + name: tensor for name, tensor in pattern.tensors.items()}
        tensors |= levels.tensors
        # PSG's unit, as in a sparse target; where nothing has to move any positive number will do.
        tensors[_PATTERN + "distance"] = torch.where(distance > 0, distance, torch.ones_like(distance))
        return Params(tensors=tensors, layout=pattern.layout)

    def _fit_levels(self, w: Tensor, mask: Tensor, layout: Layout, previous: Params | None) -> Params:
        """Fit the levels to the survivors and to nothing else."""
        groups = granularity_of(getattr(self.survivors, "granularity", "tensor"))
        if isinstance(groups, PerTensor):
            flat = w[mask] if bool(mask.any()) else w.new_zeros(1)
            fitted = self.survivors.fit(flat, Layout(shape=tuple(flat.shape)), previous)
            return replace(fitted, layout=layout)
        if _has_zero(self.survivors):
            # Zeros in place of the others cost nothing and widen no range.
            return self.survivors.fit(torch.where(mask, w, torch.zeros_like(w)), layout, previous)
        return self._fit_by_count(w, mask, layout, groups, previous)

    def _fit_by_count(
        self, w: Tensor, mask: Tensor, layout: Layout, groups: Granularity, previous: Params | None
    ) -> Params:
        """All groups with the same number of survivors are fitted at once, as rows of a matrix."""
        total = groups.count(layout)
        marks = groups.expand(torch.arange(total, dtype=torch.float64, device=w.device), layout)
        mine = marks.broadcast_to(w.shape)[mask].long()
        values = w[mask][mine.argsort(stable=True)]
        counts = torch.bincount(mine, minlength=total)
        first = counts.cumsum(0) - counts
        by_row: Any = replace(self.survivors, granularity="channel")  # type: ignore[call-arg]
        found: dict[str, Tensor] = {}
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().reshape(-1)
            part = w.new_zeros(len(rows), 1)
            if count:
                part = values[first[rows, None] + torch.arange(count, device=w.device)]
            layout_here = Layout(shape=tuple(part.shape))
            old = None
            if previous is not None:
                known = {name: tensor[rows] for name, tensor in previous.tensors.items()}
                old = Params(tensors=known, layout=layout_here)
            for name, tensor in by_row.fit(part, layout_here, old).tensors.items():
                assert tensor.dim() and tensor.shape[0] == len(rows), (self.survivors, name)
                found.setdefault(name, tensor.new_zeros((total, *tensor.shape[1:])))[rows] = tensor
        return Params(tensors=found, layout=layout)

    def _choose(self, w: Tensor, pattern: Params, levels: Params) -> tuple[Tensor, Tensor]:
        """(the nearest level of each weight, mask of those to keep)."""
        q = self.survivors.project(w, levels)
        return q, self.sparse.extend(_gain(w, q), w == 0, pattern)

    def choice(self, params: Params) -> Choice:
        pattern = self.sparse.choice(_pattern_of(params)).pattern
        return Choice(pattern=pattern, levels=(self.survivors, _levels_of(params)))

    def carried(self, params: Params) -> Params | None:
        return self.sparse.carried(_pattern_of(params)) and replace(
            params, tensors={n: t for n, t in params.tensors.items() if n.startswith(_PATTERN)}
        )

    def project(self, w: Tensor, params: Params) -> Tensor:
        q, mask = self._choose(w.detach(), _pattern_of(params), _levels_of(params))
        return masks.kept(q, mask, q)

    def form(self, w: Tensor, params: Params) -> SparseForm:
        w, layout, levels = w.detach(), params.layout, _levels_of(params)
        _, mask = self._choose(w, _pattern_of(params), levels)
        own = {"mask": mask, "inside": self.survivors.form(w, levels), "pattern": self.sparse.pattern(layout)}
        return SparseForm(layout=layout, dtype=w.dtype, **own)

    def restored(self, w: Tensor, form: Form) -> Params:
        assert isinstance(form, SparseForm)
        pattern, levels = self.sparse.restored(w, form), self.survivors.restored(w, form.inside)
        gap = form.dense().to(w.device).double().sub_(w.detach()).abs_().mean().float()
        tensors = {_PATTERN + name: tensor for name, tensor in pattern.tensors.items()}
        tensors[_PATTERN + "distance"] = torch.where(gap > 0, gap, torch.ones_like(gap))
        return replace(levels, tensors={**tensors, **levels.tensors})

    def recounted(self, w: Tensor, params: Params) -> Params:
        counts = self.sparse.counted(w != 0, params.layout)
        return replace(params, tensors={**params.tensors} | {_PATTERN + name: count for name, count in counts.items()})

    def typical(self, params: Params) -> Tensor:
        return params[_PATTERN + "distance"].clamp_max(torch.finfo(torch.float32).max)

    def limits(self, params: Params) -> Tensor | None:
        return self.survivors.limits(_levels_of(params))

    def assign(self, w: Tensor, params: Params) -> Tensor:
        """0 for what is pruned, else one more than the survivors' own index."""
        levels = _levels_of(params)
        _, mask = self._choose(w.detach(), _pattern_of(params), levels)
        index = self.survivors.assign(w, levels) + 1
        return torch.where(mask.reshape(-1), index, torch.zeros_like(index))

    def codebook(self, params: Params) -> Tensor:
        own = self.survivors.codebook(_levels_of(params))
        return torch.cat([own.new_zeros(1, own.shape[1]), own])

    def with_codebook(self, params: Params, codewords: Tensor, dtype: torch.dtype) -> Params:
        found = self.survivors.with_codebook(_levels_of(params), codewords[1:], dtype)
        return replace(params, tensors={**params.tensors, **found.tensors})

    def held_codewords(self, params: Params) -> Tensor | None:
        """Zero for good; and what the survivors' own codebook holds."""
        levels = _levels_of(params)
        own = self.survivors.held_codewords(levels)
        if own is None:
            own = torch.zeros_like(self.survivors.codebook(levels)[:, 0], dtype=torch.bool)
        return torch.cat([own.new_ones(1), own])

    def at_bits(self, w: Tensor, params: Params, bits: int) -> tuple[Target, Params]:
        """The same pattern rule with survivors at another width, as their own target changes it."""
        pattern, levels = _pattern_of(params), _levels_of(params)
        w = w.detach()
        _, mask = self._choose(w, pattern, levels)
        survivors, found = self.survivors.at_bits(torch.where(mask, w, torch.zeros_like(w)), levels, bits)
        if survivors is not self.survivors and not _has_zero(survivors):
            # The zeros of the others were no part of it: a fit to the survivors alone may be better.
            fresh = replace(self, survivors=survivors)._fit_levels(w, mask, params.layout, None)
            errors = [(survivors.project(w, p)[mask].double() - w[mask]).square().sum() for p in (found, fresh)]
            found = fresh if bool(errors[1] < errors[0]) else found
        kept = {name: tensor for name, tensor in params.tensors.items() if name.startswith(_PATTERN)}
        return replace(self, survivors=survivors), replace(params, tensors={**kept, **found.tensors})


def _gain(w: Tensor, q: Tensor) -> Tensor:
    """w^2 - (w - q)^2 in float64, up to one power of two."""
    unit = square_unit(w, q)
    gain = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for out, x, y in cut(gain, w, q, size=_PIECE):
        x, y = x.double() * unit, y.double() * unit
        out.copy_(x.mul_(2).sub_(y).mul_(y))
    return gain


def _distance(w: Tensor, q: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """(mean distance of the weights to what is kept of q, the squared error)."""
    gap = masks.kept(q, mask).double()
    for part, x in cut(gap, w, size=_PIECE):
        part.sub_(x).abs_()
    mean = gap.mean().float()
    return mean, float(gap.square_().sum())


def _pattern_of(params: Params) -> Params:
    def make() -> Params:
        found = {name.removeprefix(_PATTERN): t for name, t in params.tensors.items() if name.startswith(_PATTERN)}
        return replace(params, tensors=found)

    return params.once("pattern", make)


def _levels_of(params: Params) -> Params:
    def make() -> Params:
        found = {name: t for name, t in params.tensors.items() if not name.startswith(_PATTERN)}
        return replace(params, tensors=found)

    return params.once("levels", make)


def _has_zero(target: Target) -> bool:
    """Whether zero is a level whatever the weights are: it is then one of a tensor far from zero."""
    w = torch.linspace(1.0, 2.0, 64).reshape(1, 64)
    return not bool(target.project(torch.zeros_like(w), target.fit(w)).any())
