"""An accelerator without one: tensors that are said to be on another device, and torch's rules for those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

THERE = torch.device("cuda", 0)
_MOVES = ("copy_", "__set__", "_has_compatible_shallow_copy_type")  # what may see both; the last two move modules
_INDEXED = ("__getitem__", "__setitem__")  # by tensors of either kind, if what is indexed is there


class Elsewhere(TorchFunctionMode):
    """Marks storages as being on `THERE`, although they are on the CPU.

    As on CUDA: `device` says so, factories that are asked for it make such tensors, results of marked tensors are
    marked, `numpy` refuses them, and tensors of both kinds do not mix but for scalars, indices and copies.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.marked: dict[int, Any] = {}  # by address; held, so that no address is used again
        for tensor in (*model.parameters(), *model.buffers()):
            self.mark(tensor)

    def mark(self, tensor: Tensor) -> Tensor:
        self.marked[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def is_there(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.marked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in given if self.is_there(x)]
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return THERE if there else func(*args)
        if name == "cpu" or (name == "to" and torch.device("cpu") in args[1:]):
            return func(*args, **kwargs).clone()
        asked = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device) and x.type == "cuda"]
        if asked:
            plain: Callable[[Any], Any] = lambda x: torch.device("cpu") if x in asked else x  # noqa: E731
            args, kwargs = tuple(map(plain, args)), {k: plain(x) for k, x in kwargs.items()}
            found = func(*args, **kwargs)
            return self.mark(found.clone() if any(found is x for x in given) else found)
        if there:
            self.check(func, name, given, there)
        found = func(*args, **kwargs)
        if there and name not in _MOVES:
            for x in tree_leaves(found):
                if isinstance(x, Tensor) and x.numel():
                    self.mark(x)
        return found

    def check(self, func: Any, name: str, given: list[Tensor], there: list[Tensor]) -> None:
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        free = name in _MOVES or (name in _INDEXED and given[0] is there[0])
        here = [x for x in given if x.dim() and x.numel() and not self.is_there(x)]
        if here and not free:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
