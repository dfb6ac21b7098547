"""Targets that keep some weights as they are and set the rest to zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.grouping import Layout
from detent.targets.base import Codes, Params, Stream, Target, check_finite, compute_dtype

__all__ = ["TopK"]


@dataclass(frozen=True, kw_only=True)
class TopK(Target):
    """At most k non-zero weights: `project(w)` keeps the k largest |w| and sets the others to zero.

    Ties are broken by position (row-major), so the count is exact and every rank agrees.

    Args:
        keep: fraction of weights kept, a `float` in (0, 1], rounded to the nearest count; or a count, an `int` >= 1.
        scope: "tensor": `keep` applies to each tensor. "model": `keep` applies to all tensors of the rule
            together; `fit` then shares the count out by one threshold over all of them.

    Raises:
        ValueError: keep outside its range, or an unknown scope.

    Example:
        >>> w = torch.tensor([3.0, -1.0, 1.0, -4.0])
        >>> half = TopK(keep=0.5)
        >>> half.project(w, half.fit(w))
        tensor([ 3.,  0.,  0., -4.])

    Reference: magnitude pruning; Han et al., arXiv 1506.02626.
    """

    keep: float | int
    scope: Literal["tensor", "model"] = "tensor"  # type: ignore[assignment]

    is_exact: ClassVar[bool] = True
    stored: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or (isinstance(self.keep, int) and self.keep < 1):
            raise ValueError(f"TopK(keep={self.keep}): a count must be an int >= 1")
        if isinstance(self.keep, float) and not 0.0 < self.keep <= 1.0:
            raise ValueError(f"TopK(keep={self.keep}): a fraction must lie in (0, 1]")
        if self.scope not in ("tensor", "model"):
            raise ValueError(f'TopK(scope={self.scope!r}): must be "tensor" or "model"')

    def accepts(self, shape: Sequence[int], dtype: torch.dtype, layout: Layout) -> str | None:
        if self.scope == "tensor" and isinstance(self.keep, int) and self.keep > layout.numel:
            return f"TopK(keep={self.keep}) asks for more weights than the {layout.numel} there are"
        return Target.accepts(self, shape, dtype, layout)

    def _count(self, total: int) -> int:
        if isinstance(self.keep, int):
            if self.keep > total:
                raise ValueError(f"TopK(keep={self.keep}) asks for more weights than the {total} there are")
            return self.keep
        return max(1, round(self.keep * total))

    def _params(self, w: Tensor, layout: Layout, count: int) -> Params:
        size = w.detach().abs().to(compute_dtype(w.dtype))
        losers = size.numel() - count
        # The typical distance is the mean |w| of the weights that must go; any positive number if none must.
        total = size.sum(dtype=torch.float64) - size[_largest(w, count)].sum(dtype=torch.float64)
        mean = (total / max(losers, 1)).float()
        tensors = {
            "count": torch.tensor(count),
            "width": torch.tensor(torch.finfo(w.dtype).bits),
            "mean": torch.where(mean > 0, mean, torch.ones_like(mean)),
        }
        return Params(tensors=tensors, layout=layout)

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        check_finite(w)
        layout = layout or Layout(shape=tuple(w.shape))
        return self._params(w, layout, self._count(w.numel()))

    def fit_model(
        self, weights: Sequence[Tensor], layouts: Sequence[Layout], previous: Sequence[Params | None]
    ) -> list[Params]:
        if self.scope == "tensor":
            return Target.fit_model(self, weights, layouts, previous)
        for w in weights:
            check_finite(w)
        flat = torch.cat([w.detach().reshape(-1).to(compute_dtype(w.dtype)) for w in weights])
        kept = _largest(flat, self._count(flat.numel()))
        counts = [int(part.sum()) for part in kept.split([w.numel() for w in weights])]
        return [self._params(w, layout, k) for w, layout, k in zip(weights, layouts, counts, strict=True)]

    def project(self, w: Tensor, params: Params) -> Tensor:
        w = w.detach()
        # where, not multiplication: 0 * inf would be NaN, and a kept -0.0 must become +0.0.
        kept = torch.where(_largest(w, int(params["count"])), w, torch.zeros((), dtype=w.dtype, device=w.device))
        return kept.add_(0.0)

    def encode(self, w: Tensor, params: Params) -> Codes:
        check_finite(w)
        mask = _largest(w.detach(), int(params["count"])).reshape(-1)
        values = (w.detach().reshape(-1)[mask] + 0.0).contiguous()
        width = torch.finfo(w.dtype).bits
        return Codes(
            streams=(
                Stream(name="mask", values=mask.to(torch.uint8), width=1),
                Stream(name="values", values=values, width=width),
            )
        )

    def decode(self, codes: Codes, params: Params, dtype: torch.dtype) -> Tensor:
        values = codes["values"]
        whole = torch.zeros(params.layout.numel, dtype=dtype, device=values.device)
        whole[codes["mask"].bool()] = values.to(dtype)
        return whole.reshape(params.layout.shape)

    def bits_on_disk(self, params: Params) -> int:
        return 8 * -(-params.layout.numel // 8) + int(params["count"]) * int(params["width"])

    def typical(self, params: Params) -> Tensor:
        return params["mean"]

    def free(self, w: Tensor, params: Params) -> Tensor:
        return _largest(w.detach(), int(params["count"]))


def _largest(w: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest |w|; ties go to the earlier position in row-major order."""
    size = w.detach().abs().reshape(-1)
    if count >= size.numel():
        return torch.ones_like(w, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(w, dtype=torch.bool)
    threshold = size.kthvalue(size.numel() - count + 1).values
    mask = size > threshold
    ties = (size == threshold).nonzero().reshape(-1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(w.shape)
