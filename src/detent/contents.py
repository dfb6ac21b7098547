"""What of a model goes into a file, and what of its state dict no file can hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detent import sharding
from detent.parameters import canonical_name

__all__ = ["DTYPES", "Contents", "Unsavable", "contents_of", "refuse_unsavable", "refuse_unused", "unfit"]

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
_STORABLE = frozenset(DTYPES.values())


class Unsavable(NamedTuple):
    """Why a file cannot hold something of a model, and what to do."""

    reason: str
    remedy: str


_DROP = "or, if the model makes it anew, register it with persistent=False"
_NO_DATA = Unsavable(
    "lies on the meta device and has no data",
    "build the model with memory, or, if accelerate keeps its weights elsewhere (offload, device_map), bring them back "
    "with accelerate.hooks.remove_hook_from_submodules(model)",
)
_UNREADY = Unsavable("is not initialised yet", "run one batch through the model first")


@dataclass(kw_only=True)
class Contents:
    """Distinct parameters and persistent buffers of a model, each under its first canonical name.

    Attributes:
        tensors: by name.
        aliases: further names of tied tensors, and the first one.
        buffers: names of those that are buffers.
        lost: what else its `state_dict()` has, by name, and why a file cannot hold it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    lost: dict[str, Unsavable] = field(default_factory=dict)

    def names(self, first: str) -> list[str]:
        """All names of a tensor."""
        return [first, *(alias for alias, name in self.aliases.items() if name == first)]

    def without(self, patterns: Sequence[str]) -> Contents:
        """The same without what these regular expressions find."""
        gone = {name for name in (*self.tensors, *self.lost) if any(re.search(p, name) for p in patterns)}
        return Contents(
            tensors={name: tensor for name, tensor in self.tensors.items() if name not in gone},
            aliases={alias: name for alias, name in self.aliases.items() if name not in gone},
            buffers=self.buffers - gone,
            lost={name: why for name, why in self.lost.items() if name not in gone},
        )


def contents_of(model: nn.Module) -> Contents:
    """What of a model goes into a file; nothing is copied, gathered or read.

    `state_dict()` is asked too: modules may write there what is neither parameter nor buffer.

    Raises:
        ValueError: FSDP1, or two tensors of one name.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> model.register_buffer("seen", torch.zeros(1).to_sparse())
        >>> found = contents_of(model)
        >>> list(found.tensors), found.lost["seen"].reason
        (['weight', 'bias'], 'is not a dense tensor (torch.sparse_coo)')
    """
    sharding.refuse_flattened(model)
    found, first_name, by_name = Contents(), dict[int, str](), dict[str, Tensor]()
    for path, module in model.named_modules(remove_duplicate=False):
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for own, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is None:
                continue
            name = canonical_name(f"{path}.{own}" if path else own)
            if by_name.setdefault(name, tensor) is not tensor:
                raise ValueError(f"two tensors of the model are both called {name!r} once wrapper names are removed")
            first = first_name.setdefault(id(tensor), name)
            if first != name:
                found.aliases[name] = first
                continue
            why = unfit(tensor) if name else Unsavable("has only wrapper names", "give it one of its own")
            if why and why != _NO_DATA:
                found.lost[name] = why
                continue
            found.tensors[name] = tensor
            if own in buffers:
                found.buffers.add(name)
    found.aliases = {alias: name for alias, name in found.aliases.items() if name in found.tensors}
    known = {id(tensor) for tensor in by_name.values()} | {_place(tensor) for tensor in by_name.values()} - {None}
    for full, value in model.state_dict(keep_vars=True).items():
        name = canonical_name(full)
        if name in by_name or id(value) in known or (isinstance(value, Tensor) and _place(value) in known):
            continue
        if isinstance(value, Tensor):
            reason = "is in state_dict() and neither a parameter nor a buffer"
        else:
            is_extra = full.rpartition(".")[2] == "_extra_state"
            reason = f"is {'extra state' if is_extra else f'a {type(value).__name__}'} of the state dict and no tensor"
        found.lost[name] = Unsavable(reason, "keep it in a tensor and register that with register_buffer")
    return found


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where a tensor lies in memory, if that can be told: two that lie in one place are one."""
    try:
        at = tensor.data_ptr()
        return (at, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device) if at else None
    except (RuntimeError, ValueError):  # without memory or strides of its own: sparse, nested, of a lazy module
        return None


def refuse_unsavable(contents: Contents, who: str, *, unready: bool) -> None:
    """Refuse what no file can hold.

    Args:
        contents: of the model, without what the user leaves out.
        who: the call that is refused.
        unready: whether tensors without data are let pass, because training has yet to make them.

    Raises:
        ValueError: naming the tensor, and what to do.
    """
    for name, why in contents.lost.items():
        if unready and why == _UNREADY:
            continue
        raise ValueError(
            f"{who}: {name!r} {why.reason}, which a file cannot hold: {why.remedy}; or give attach or compress "
            f"leave_out={'^' + re.escape(name) + '$'!r} and save it yourself"
        )
    for name, tensor in contents.tensors.items():
        if tensor.is_meta and not unready:
            raise ValueError(f"{who}: {name!r} {_NO_DATA.reason}: {_NO_DATA.remedy}")


def refuse_unused(contents: Contents, leave_out: Sequence[str], claimed: Iterable[str], who: str) -> None:
    """Refuse patterns of what to leave out that find nothing, or find a weight that a rule claims.

    Raises:
        ValueError: naming the pattern.
    """
    for pattern in leave_out:
        try:
            found = [name for name in (*contents.tensors, *contents.lost) if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"{who}(leave_out={pattern!r}): not a regular expression: {error}") from None
        if not found:
            raise ValueError(f"{who}(leave_out={pattern!r}): finds nothing in the state dict of the model")
        if both := sorted({*found} & {*claimed}):
            raise ValueError(f"{who}(leave_out={pattern!r}): finds {both[0]!r}, which a rule of the recipe claims")


def unfit(tensor: Tensor) -> Unsavable | None:
    """Why a file cannot hold a tensor, if it cannot."""
    if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        return _UNREADY
    if tensor.is_meta:
        return _NO_DATA
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
        return Unsavable(f"is not a dense tensor ({kind})", f"make it dense {_DROP}")
    if any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True)):
        # Also torch's own load_state_dict fails in such a place.
        return Unsavable(
            "repeats its memory (an expanded tensor)", f"make it .contiguous() before registering it {_DROP}"
        )
    if tensor.dtype not in _STORABLE:
        return Unsavable(f"is {tensor.dtype}", f"convert it {_DROP}")
    return None
