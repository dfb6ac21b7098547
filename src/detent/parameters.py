"""The parameters of a model: their canonical names, which module owns each, and what a rule passes over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from detent.grouping import Layout

__all__ = [
    "Parameter",
    "by_numbers",
    "canonical_name",
    "census",
    "multiplies",
    "named_parameters",
    "own_name",
    "refuse_no_model",
]

_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_BIASES = {"bias", "biases"}
_CONVOLUTIONS = nn.modules.conv._ConvNd
# Modules of torch whose weights have their outputs on axis 0.
_ROWS = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.modules.rnn.RNNCellBase,
)
# Modules of transformers, known by class name so that it need not be there, one parameter of them by its own name too:
# (axis of the outputs, stacked axes).
_KNOWN: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "Conv1D": (1, ()),  # GPT-2: a linear layer that keeps (inputs, outputs)
    "Llama4TextExperts": (2, (0,)),
    "CsmCodebooksHead": (2, (0,)),
    "GroupedLinearLayer": (2, (0,)),
    "GraniteMoeParallelExperts": (1, (0,)),
    "JetMoeParallelExperts": (1, (0,)),
    "KyutaiSpeechToTextFlexibleLinear": (1, (0,)),
    "MoshiFlexibleLinear": (1, (0,)),
    "InklingSharedExperts": (1, (0,)),
    "LongcatFlashExperts": (1, (0,)),
    "Step3p7Experts": (1, (0,)),
    "EsmFold2ConfidenceHead": (2, (0,)),
    "AMSoftmaxLoss": (1, ()),
    "Gemma3MultiModalProjector": (1, ()),
    "T5Gemma2MultiModalProjector": (1, ()),
    "OmDetTurboLanguageBackbone": (1, ()),
    # XLNet multiplies (inputs, heads, outputs of a head), and on the way out (outputs, heads, inputs of a head).
    **{f"XLNetRelativeAttention.{own}": (2, (1,)) for own in "qkvr"},
    "XLNetRelativeAttention.o": (0, ()),
}
_LINEAR = ("Conv1D",)  # those of them that are linear layers and nothing else
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def canonical_name(name: str) -> str:
    """A parameter name without the segments that wrappers (DDP, compile, checkpoint, FSDP) insert.

    Example:
        >>> canonical_name("module._orig_mod.fc.weight")
        'fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def by_numbers(name: str) -> list[str | int]:
    """A key that sorts names by the numbers in them, as the layers of a model run.

    Example:
        >>> sorted(["12.weight", "7.weight"], key=by_numbers)
        ['7.weight', '12.weight']
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def multiplies(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, of torch or known of transformers."""
    return isinstance(module, (nn.Linear, _CONVOLUTIONS)) or type(module).__name__ in _LINEAR


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
        layout: shape, output channel axis, stacked axes.
        dtype: its dtype.
        passed_over: why rules pass over it unless `include=` names it; empty if they do not.
        owner: the module whose weight or bias it is.
        kind: class name of a module whose axes are known; empty where they are told by a bias, or assumed.
        told: whether the length of a bias tells its axes.
        order: place among all names of the model's parameters, of its last name where it is tied.
        frozen: whether it requires no gradient.
        pruned: name of the mask that `torch.nn.utils.prune` multiplies it with; empty for none.
        writer: the module whose forward pass writes it; empty for none.
    """

    name: str
    aliases: tuple[str, ...]
    layout: Layout
    dtype: torch.dtype
    passed_over: str
    owner: nn.Module
    kind: str
    told: bool
    order: int
    frozen: bool
    pruned: str
    writer: str

    @property
    def is_linear_bias(self) -> bool:
        """Whether it is the bias of a linear layer."""
        return isinstance(self.owner, nn.Linear) and own_name(self.name) == "bias"

    @property
    def is_layer(self) -> bool:
        """Whether it is the weight of a layer, and no position embedding or class token of the model's own."""
        return not self.passed_over and (bool(self.kind) or "weight" in own_name(self.name))

    @property
    def is_derived(self) -> bool:
        """Whether its module is a subclass of a layer of torch, which may use its weight the other way round."""
        outside = type(self.owner).__module__.partition(".")[0] != "torch"
        return outside and isinstance(self.owner, (_CONVOLUTIONS, *_ROWS))

    @property
    def is_assumed(self) -> bool:
        """Whether nothing says which of its axes are the outputs."""
        return not self.kind and not self.told and len(self.layout.shape) > 1

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight by structure: floating, two axes or more, no bias, norm or scale."""
        return not self.passed_over and self.dtype.is_floating_point


def census(model: nn.Module) -> Iterator[Parameter]:
    """Every distinct parameter once, under its first name, with its tied aliases."""
    names: dict[int, list[str]] = {}
    owners: dict[int, tuple[nn.Module, nn.Module, str, nn.Parameter]] = {}
    writers: dict[int, str] = {}
    order: dict[int, int] = {}
    place = 0
    for module_name, module in model.named_modules(remove_duplicate=False):
        layer = module
        if isinstance(module, ParametrizationList):  # what it makes is the weight of the module above
            layer = model.get_submodule(re.sub(r"(^|\.)parametrizations\.[^.]+$", "", module_name))
        for own, parameter in module._parameters.items():
            if parameter is not None:
                full = canonical_name(f"{module_name}.{own}" if module_name else own)
                seen = names.setdefault(id(parameter), [])
                if full not in seen:
                    seen.append(full)
                place += 1
                order[id(parameter)] = place
                owners.setdefault(id(parameter), (layer, module, own, parameter))
                if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                    writers[id(parameter)] = f"{type(module).__name__}(max_norm={module.max_norm:g})"
    for key, (layer, module, own, parameter) in owners.items():
        first, *others = names[key]
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{first!r} has no shape yet (a lazy module); run one batch through the model first")
        layout, kind = _layout_of(own_name(first), parameter, layer)
        outputs = _outputs_by_bias(own_name(first), parameter, layer)
        mask = f"{own.removesuffix('_orig')}_mask"
        yield Parameter(
            name=first,
            aliases=tuple(others),
            dtype=parameter.dtype,
            layout=layout,
            passed_over=_passed_over(first, own, parameter, layer, module, kind),
            owner=layer,
            kind=kind,
            told=outputs is not None,
            order=order[key],
            frozen=not parameter.requires_grad,
            pruned=mask if own.endswith("_orig") and mask in module._buffers else "",
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


def _layout_of(own: str, parameter: nn.Parameter, owner: nn.Module) -> tuple[Layout, str]:
    """The axes of a parameter, and the class that they are known from; no class where they are assumed."""
    shape, kind = tuple(parameter.shape), type(owner).__name__
    trusted = len(shape) < 2 or _is_of_torch(own, shape, owner)
    if isinstance(owner, _CONVOLUTIONS) and trusted:
        turned = owner.transposed and len(shape) >= 3
        return Layout(shape=shape, channel_dim=int(turned), conv_groups=owner.groups if turned else 1), kind
    if len(shape) < 2 or (isinstance(owner, (*_ROWS, *_NORMS)) and trusted):
        return Layout(shape=shape), kind
    named = _KNOWN.get(f"{kind}.{own}")
    known = named or _KNOWN.get(kind)
    # Experts of transformers 5: `use_experts_implementation` tells how their tensors lie.
    transposed = getattr(owner, "is_transposed", None)
    if known is None and len(shape) == 3 and isinstance(transposed, bool) and isinstance(_get(owner, "has_gate"), bool):
        known = (2 if transposed else 1, (0,))
    if known is not None and (named or len(shape) == len(known[1]) + 2):
        return Layout(shape=shape, channel_dim=known[0], batch_axes=known[1]), kind
    outputs = _outputs_by_bias(own, parameter, owner)
    if outputs is not None:
        return Layout(shape=shape, channel_dim=outputs), ""
    if shape[0] == 1 and len(shape) > 2:  # a table of positions with an axis for the batch
        ones = next((i for i, length in enumerate(shape[:-2]) if length > 1), len(shape) - 2)
        return Layout(shape=shape, channel_dim=ones, batch_axes=tuple(range(ones))), ""
    if len(shape) == 3 and own != "weight":  # matrices for `bmm`, as those of experts
        return Layout(shape=shape, channel_dim=1, batch_axes=(0,)), ""
    return Layout(shape=shape), ""


def _is_of_torch(own: str, shape: tuple[int, ...], owner: nn.Module) -> bool:
    """Whether a weight lies as torch's own class of its module has it: a subclass may keep it the other way round."""
    if isinstance(owner, nn.Linear):
        expected = (owner.out_features, owner.in_features)
    elif isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        expected = (owner.num_embeddings, owner.embedding_dim)
    elif isinstance(owner, _CONVOLUTIONS):
        channels = (
            (owner.in_channels, owner.out_channels) if owner.transposed else (owner.out_channels, owner.in_channels)
        )
        expected = (channels[0], channels[1] // owner.groups, *owner.kernel_size)
    else:
        return True
    return shape == expected


def _outputs_by_bias(own: str, parameter: nn.Parameter, owner: nn.Module) -> int | None:
    """The axis of a matrix that alone is as long as the bias beside it; none where that tells nothing."""
    bias = owner._parameters.get("bias") if own == "weight" else None
    if parameter.dim() != 2 or bias is None or bias.dim() != 1:
        return None
    fits = [axis for axis, length in enumerate(parameter.shape) if length == len(bias)]
    return fits[0] if len(fits) == 1 else None


def _get(module: nn.Module, name: str) -> Any:
    return getattr(module, name, None)


def _is_scale(own: str, parameter: nn.Parameter, module: nn.Module) -> bool:
    """Whether a parameter is the size of a weight whose direction is a parameter of its own."""
    if isinstance(module, ParametrizationList):
        if type(module[0]).__name__ == "_WeightNorm":
            return own == "original0"
        return len(module._parameters) > 1 and _long_axes(parameter) < 2
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, WeightNorm) and own == f"{hook.name}_g" for hook in hooks)


def _long_axes(parameter: nn.Parameter) -> int:
    """How many axes are longer than one."""
    return sum(length > 1 for length in parameter.shape)


def _passed_over(name: str, own: str, parameter: nn.Parameter, owner: nn.Module, module: nn.Module, kind: str) -> str:
    words = own_name(name).split("_")
    if _is_scale(own, parameter, module):
        return "gain of a weight normalisation"
    if not _BIASES.isdisjoint((words[0], words[-1])):
        return "bias"
    if isinstance(owner, _NORMS) or re.search(r"Norm(\dd)?$", type(owner).__name__):
        return "normalisation weight"
    if parameter.dim() < 2:
        return f"{parameter.dim()}-D parameter (bias, gain or normalisation weight)"
    if not kind and _long_axes(parameter) < 2 and (parameter.dim() > 2 or "weight" not in words):
        return "vector with further axes of length 1 (a token, gain or normalisation weight)"
    return ""
