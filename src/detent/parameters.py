"""The parameters of a model: their canonical names, which module owns each, and what a rule passes over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from detent.grouping import Layout

__all__ = ["Parameter", "canonical_name", "census", "named_parameters", "own_name", "refuse_no_model"]

_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def canonical_name(name: str) -> str:
    """A parameter name without the segments that wrappers (DDP, compile, checkpoint, FSDP) insert.

    Example:
        >>> canonical_name("module._orig_mod.fc.weight")
        'fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by canonical name, tied ones under each of their names."""
    return {canonical_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}


def refuse_no_model(model: Any, who: str) -> None:
    """Refuse what is no module, as a state dict, or an optimizer that stands in its place.

    Raises:
        ValueError: saying what to give.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{who}(model=...): must be a torch.nn.Module, not {type(model).__name__}")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a model as a recipe sees it.

    Args:
        name: canonical name.
        aliases: other names of the same (tied) parameter.
        layout: shape, output channel axis.
        dtype: its dtype.
        passed_over: why rules pass over it unless `include=` names it; empty if they do not.
        layer: identity of the module whose weight or bias it is.
        linear_bias: whether it is the bias of a linear layer.
        writer: the module whose forward pass writes it; empty for none.
    """

    name: str
    aliases: tuple[str, ...]
    layout: Layout
    dtype: torch.dtype
    passed_over: str
    layer: int
    linear_bias: bool
    writer: str


def census(model: nn.Module) -> Iterator[Parameter]:
    """Every distinct parameter once, under its first name, with its tied aliases."""
    names: dict[int, list[str]] = {}
    owners: dict[int, tuple[nn.Module, nn.Parameter, bool]] = {}
    writers: dict[int, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        gains, layer = _weight_norm_gains(module), module
        if isinstance(module, ParametrizationList):  # what it makes is the weight of the module above
            layer = model.get_submodule(re.sub(r"(^|\.)parametrizations\.[^.]+$", "", module_name))
        for own, parameter in module._parameters.items():
            if parameter is not None:
                full = canonical_name(f"{module_name}.{own}" if module_name else own)
                seen = names.setdefault(id(parameter), [])
                if full not in seen:
                    seen.append(full)
                owners.setdefault(id(parameter), (layer, parameter, own in gains))
                if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                    writers[id(parameter)] = f"{type(module).__name__}(max_norm={module.max_norm:g})"
    for key, (module, parameter, gain) in owners.items():
        first, *others = names[key]
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{first!r} has no shape yet (a lazy module); run one batch through the model first")
        transposed = bool(getattr(module, "transposed", False)) and parameter.dim() >= 3
        yield Parameter(
            name=first,
            aliases=tuple(others),
            dtype=parameter.dtype,
            layout=Layout(
                shape=tuple(parameter.shape),
                channel_dim=1 if transposed else 0,
                conv_groups=int(module.groups) if transposed else 1,  # type: ignore[arg-type]
            ),
            passed_over="gain of a weight normalisation" if gain else _passed_over(first, parameter, module),
            layer=id(module),
            linear_bias=isinstance(module, nn.Linear) and parameter is module.bias,
            writer=writers.get(key, ""),
        )


def own_name(name: str) -> str:
    """What its module calls a parameter, also where a parametrization stands between them.

    Example:
        >>> own_name("conv.weight"), own_name("conv.parametrizations.weight.original1")
        ('weight', 'weight')
    """
    *_, own = name.split(".parametrizations." if ".parametrizations." in name else ".")
    return own.removeprefix("parametrizations.").split(".")[0]


def _weight_norm_gains(module: nn.Module) -> set[str]:
    """Names of the parameters that are the sizes of weights whose directions are parameters of their own."""
    if isinstance(module, ParametrizationList):
        return {"original0"} if type(module[0]).__name__ == "_WeightNorm" else set()
    hooks = module._forward_pre_hooks.values()
    return {f"{hook.name}_g" for hook in hooks if isinstance(hook, WeightNorm)}


def _passed_over(name: str, parameter: nn.Parameter, module: nn.Module) -> str:
    if own_name(name).startswith("bias"):
        return "bias"
    if isinstance(module, _NORMS):
        return "normalisation weight"
    if parameter.dim() < 2:
        return f"{parameter.dim()}-D parameter (bias, gain or normalisation weight)"
    return ""
