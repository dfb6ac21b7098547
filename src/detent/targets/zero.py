"""The target of a single level, zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from detent.grouping import GranularityLike, Layout, granularity_of
from detent.targets.base import Params, Scope, Target, check_finite, compute_dtype
from detent.targets.forms import Grid

__all__ = ["Zero"]


@dataclass(frozen=True, kw_only=True)
class Zero(Target):
    """The single level zero: what PSG pulls towards for sparse training.

    Every weight may end only at 0, so the compressed life of a tensor on `Zero()` is empty. Use it as the
    pull of a sparse target: `Rule(target=TopK(keep=0.1), mechanism=PSG(toward=Zero()))`.

    Args:
        granularity: weights that share a typical size (their mean absolute value).

    Example:
        >>> w = torch.tensor([0.5, -1.5])
        >>> zero = Zero()
        >>> zero.project(w, zero.fit(w)), zero.typical(zero.fit(w))
        (tensor([0., 0.]), tensor(1.))

    Reference: Kim et al., "Position-based Scaled Gradient", arXiv 2005.11035, section on sparse training.
    """

    granularity: GranularityLike = "tensor"

    is_exact: ClassVar[bool] = True
    is_one_point: ClassVar[bool] = True

    def __post_init__(self) -> None:
        granularity_of(self.granularity, "Zero.granularity")
        super().__post_init__()

    @property
    def scope(self) -> Scope:
        return "element"

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        layout = layout or Layout(shape=tuple(w.shape))
        check_finite(w)
        groups = granularity_of(self.granularity)
        x = w.detach().abs().to(compute_dtype(w.dtype))
        size = groups.sum(torch.ones_like(x), layout)
        return Params(tensors={"mean": (groups.sum(x, layout) / size).float()}, layout=layout)

    def project(self, w: Tensor, params: Params) -> Tensor:
        return torch.zeros_like(w)

    def lined(self, params: Params) -> Params | None:
        return params.lined(granularity_of(self.granularity))

    def form(self, w: Tensor, params: Params) -> Grid:
        codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
        return Grid(layout=params.layout, dtype=w.dtype, codes=codes, scale=None, n=0)

    def typical(self, params: Params) -> Tensor:
        mean = params["mean"].clamp_max(torch.finfo(torch.float32).max)
        return granularity_of(self.granularity).expand(torch.where(mean > 0, mean, 1.0), params.layout)

    def levels(self, params: Params) -> Tensor:
        return torch.zeros(1, dtype=torch.float64, device=params["mean"].device)
