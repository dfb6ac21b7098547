"""The model that an export traces and what it is called with: wrappers taken off, example inputs bound by signature."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

__all__ = ["Call", "Inputs", "bind", "unwrap", "unwrapped"]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]

# (module, class, attribute that holds the model). A class counts only where its module is imported already: without
# it there is no instance, and torch._dynamo alone takes a second to import.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper", "_checkpoint_wrapped_module"),
)
# Classes whose `forward` is there and only raises.
_UNWRITTEN = (
    ("torch.nn", "Module"),
    ("lightning.pytorch", "LightningModule"),
    ("pytorch_lightning", "LightningModule"),
)


def _imported(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model without what stands around it: torch.compile, DataParallel, DDP, AveragedModel, activation checkpoints.

    Raises:
        ValueError: a wrapper with forward hooks, which would be left out.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(net)) is net
        True
    """
    for module, name, attribute in _WRAPPERS:
        kind = _imported(module, name)
        if kind is not None and isinstance(model, kind):
            if model._forward_hooks or model._forward_pre_hooks:
                raise ValueError(
                    f"the {name} around the model has forward hooks, which an export would lose; remove them"
                )
            return unwrap(getattr(model, attribute))
    return model


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model without wrappers around it or inside it, and without `Module.compile`; all is put back afterwards.

    Example:
        >>> net = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
        >>> with unwrapped(net) as plain:
        ...     type(plain[0]).__name__
        'Linear'
        >>> type(net[0]).__name__
        'DataParallel'
    """
    bare = unwrap(model)
    swapped: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
    compiled: list[tuple[Any, Any]] = []
    try:
        for parent in list(bare.modules()):
            for name, child in parent._modules.items():
                inner = child if child is None else unwrap(child)
                if inner is not child:
                    assert child is not None
                    swapped.append((parent._modules, name, child))
                    parent._modules[name] = inner
        for module in bare.modules():
            if module._compiled_call_impl is not None:
                compiled.append((module, module._compiled_call_impl))
                module._compiled_call_impl = None
        yield bare
    finally:
        for children, name, child in swapped:
            children[name] = child
        for module, call in compiled:
            module._compiled_call_impl = call


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a model is called.

    Args:
        args: positional arguments: tensors, or nested containers of tensors and constants.
        kwargs: keyword arguments, likewise.
        arguments: all that is given, by parameter of `forward`: of `*xs` a tuple, of `**others` a mapping.
        constants: parameters of `forward` that get no tensor, with the value they have: given or their default. These
            are what `torch.fx.symbolic_trace(concrete_args=)` takes.
        names: of the tensors, in the order of the call: the parameter, or where it holds several `xs[0]`, `state['h']`.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x, embed=False):
        ...         return x if embed else 2 * x
        >>> call = bind(Net(), torch.ones(2))
        >>> call.constants, call(Net())
        ({'embed': False}, tensor([2., 2.]))
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    names: tuple[str, ...]

    @property
    def fixed(self) -> dict[str, Any]:
        """What is given and holds no tensor, by parameter."""
        return {name: value for name, value in self.arguments.items() if name in self.constants}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that is given, in the order of the call."""
        return tuple(x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Tensor))

    def mapped(self, act: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed."""

        return self.replaced([act(x) for x in self.tensors])

    def replaced(self, tensors: Iterable[Tensor]) -> Call:
        """The same call with other tensors, in the same order."""
        fresh = list(tensors)

        def changed(tree: Any) -> Any:
            left = iter(fresh)  # both trees hold the tensors in the order of the call
            return tree_map(lambda x: next(left) if isinstance(x, Tensor) else x, tree)

        args, kwargs = changed((self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, arguments=changed(dict(self.arguments)))

    def __call__(self, model: nn.Module) -> Any:
        """What the model returns, without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)


def bind(model: nn.Module, inputs: Inputs, field: str = "example_inputs") -> Call:
    """Example inputs as the model's `forward` takes them.

    Args:
        model: without wrappers, see `unwrap`.
        inputs: a tensor; several arguments in a row; or a mapping of arguments by name. Beside tensors they may hold
            constants (`None`, bool, int, float, str), which a trace keeps as they are.
        field: how the argument is called where this raises.

    Raises:
        ValueError: no tensor, something that is neither tensor nor constant, a model without `forward`, or arguments
            that do not fit its signature.

    Example:
        >>> bind(nn.Bilinear(2, 2, 1), [torch.ones(1, 2), torch.ones(1, 2)]).arguments.keys()
        dict_keys(['input1', 'input2'])
    """
    named = isinstance(inputs, Mapping)
    if not isinstance(inputs, (Tensor, Sequence, Mapping)) or isinstance(inputs, str):
        raise ValueError(f"{field}: give tensors, not {type(inputs).__name__}")
    args = () if named else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    kwargs = {str(name): value for name, value in inputs.items()} if isinstance(inputs, Mapping) else {}
    leaves = tree_leaves((args, kwargs))
    wrong = next((x for x in leaves if not isinstance(x, (Tensor, bool, int, float, str, type(None)))), None)
    if wrong is not None or not any(isinstance(x, Tensor) for x in leaves):
        given = "nothing" if not leaves else type(leaves[0] if wrong is None else wrong).__name__
        raise ValueError(f"{field}: give tensors, not {given}")
    signature = _signature(model)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{field}: {type(model).__name__}.forward{signature} cannot be called so: {error}") from None
    arguments = dict(bound.arguments)
    bound.apply_defaults()
    several = {name for name, p in signature.parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    spread = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    extra: dict[str, Any] = {} if spread is None else arguments.get(spread, {})
    order = [*arguments, *extra]  # of the signature, in which exporters list inputs
    kwargs = {name: kwargs[name] for name in sorted(kwargs, key=order.index)}
    constants = {
        name: value
        for name, value in bound.arguments.items()
        if not any(isinstance(x, Tensor) for x in tree_leaves(value)) and (name not in several or value)
    }
    flat = {name: value for name, value in arguments.items() if name != spread} | extra
    names = tuple(path for path, x in _named(flat) if isinstance(x, Tensor))
    return Call(args=args, kwargs=kwargs, arguments=arguments, constants=constants, names=names)


def _named(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every leaf of every value with its path, such as "state['h']"."""
    return [
        (f"{name}{keystr(path)}", leaf)
        for name, value in values.items()
        for path, leaf in tree_flatten_with_path(value)[0]
    ]


def _signature(model: nn.Module) -> inspect.Signature:
    """The signature of `forward`.

    Raises:
        ValueError: the class has none of its own.
    """
    for module, name in _UNWRITTEN:
        kind = _imported(module, name)
        if kind is not None and getattr(type(model), "forward", None) is kind.forward:
            parts = ", ".join(name for name, _ in model.named_children()) or "none"
            raise ValueError(
                f"{type(model).__name__} has no forward of its own, so there is nothing to export; write one, or give "
                f"the network it holds (its parts: {parts})"
            )
    return inspect.signature(model.forward)
