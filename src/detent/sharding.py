"""The few places that know a parameter may be a shard (FSDP2's DTensor) of a whole tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "anywhere",
    "as_sharded",
    "from_whole",
    "local",
    "refuse_flattened",
    "reshard",
    "row_sums",
    "rows_as_sharded",
    "rows_of",
    "total",
    "whole",
]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x1E3779B97F4A7C15  # multiplies the places of a row apart
_PIECE = 1 << 14  # weights whose 64-bit copies are held at a time: few enough for a core's cache


def _is_sharded(x: Tensor) -> bool:
    if type(x) is Tensor or type(x) is nn.Parameter:  # asked many times a step; a missing attribute takes longer
        return False
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """What this process holds, as a plain tensor sharing the memory, cut off from autograd."""
    # Detaching the inner tensor keeps its version counter, detaching the outer one does not.
    return x._local_tensor.detach() if _is_sharded(x) else x.detach()  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """The whole tensor on every process; a collective if x is sharded, so every rank must call it."""
    x = x.detach()
    return x.full_tensor() if _is_sharded(x) else x  # type: ignore[attr-defined]


def rows_of(x: Tensor, name: str) -> tuple[int, int] | None:
    """Rows of axis 0 held here, or `None` if x is not sharded.

    Raises:
        ValueError: sharded in a way other than by rows.
    """
    if not _is_sharded(x):
        return None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements: Any = x.placements  # type: ignore[attr-defined]
    if all(isinstance(p, Replicate) for p in placements):
        return None
    shards = [p for p in placements if not isinstance(p, Replicate)]
    if len(shards) != 1 or not isinstance(shards[0], Shard) or shards[0].dim != 0:
        raise ValueError(f"{name!r} is sharded as {placements}: only FSDP2's sharding of axis 0 is supported")
    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, placements)  # type: ignore[attr-defined]
    return (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)


def from_whole(full: Tensor, like: Tensor, name: str) -> Tensor:
    """The part of a whole tensor that this process holds of `like`."""
    rows = rows_of(like, name)
    return full if rows is None else full[slice(*rows)]


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """A local part as a tensor sharded like `like`, so that distributed checkpoints can reshard it."""
    if not _is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = like
    return DTensor.from_local(part, whole.device_mesh, whole.placements, shape=like.shape, stride=like.stride())


def row_sums(w: Tensor) -> Tensor:
    """A whole number for every row (of axis 0), by its bits: other weights have others, however rows are sharded.

    Example:
        >>> row_sums(torch.ones(2, 3)).tolist() == [int(row_sums(torch.ones(1, 3)))] * 2
        True
    """
    w = w.detach()
    if w.is_meta:
        return torch.zeros(w.shape[:1] or (1,), dtype=torch.int64)
    bits = w.contiguous().view(_BITS[w.element_size()])
    if bits.dtype == torch.int64:
        bits = bits ^ (bits >> 32)  # an even number of signs, 2^63 each, would be lost in a sum
    rows = bits.flatten(1) if bits.dim() > 1 else bits.reshape(-1, 1)
    # Odd, so that no change of one weight is lost; sums wrap around.
    factors = torch.arange(rows.shape[1], device=w.device).mul_(_ODD).bitwise_or_(1)
    pieces = rows.split(max(_PIECE // max(rows.shape[1], 1), 1))
    return torch.cat([(piece.to(torch.int64) * factors).sum(1) for piece in pieces])


def rows_as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """A number for every row held here, sharded as the rows of `like` are."""
    if not _is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = like
    return DTensor.from_local(part, whole.device_mesh, whole.placements, shape=like.shape[:1], stride=(1,))


def reshard(model: nn.Module) -> None:
    """Drop the gathered copies FSDP2 keeps of parameters, which a write to the shards would not reach."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def anywhere(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether the flag is set on any process that shares a sharded tensor; a collective if one is sharded."""
    meshes: list[Any] = list(dict.fromkeys(x.device_mesh for x in tensors if _is_sharded(x)))  # type: ignore[attr-defined]
    for mesh in meshes:
        for axis in range(mesh.ndim):
            told = torch.tensor(float(flag), device=mesh.device_type)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=mesh.get_group(axis))
            flag = bool(told)
    return flag


def total(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the processes that hold parts of `like`; a collective if it is sharded."""
    if rows_of(like, "a parameter") is None:
        return x
    from torch.distributed.tensor import Replicate

    found, mesh, placements = x.clone(), like.device_mesh, like.placements  # type: ignore[attr-defined]
    for axis, placement in enumerate(placements):
        if not isinstance(placement, Replicate):
            torch.distributed.all_reduce(found, group=mesh.get_group(axis))
    return found


def refuse_flattened(model: nn.Module) -> None:
    """Refuse FSDP1, whose parameters are pieces of one flat tensor.

    Raises:
        ValueError: naming the module.
    """
    for name, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            raise ValueError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters; use "
                "torch.distributed.fsdp.fully_shard"
            )
