"""First and last layers of a model: from the graph of one forward pass, else from the order of registration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detent.parameters import Parameter, named_parameters

__all__ = ["by_execution", "by_registration", "called_with", "mapped", "tensors_of"]

_LOOKUPS = ("EmbeddingBackward", "EmbeddingBagBackward")


def by_registration(model: nn.Module, layers: Sequence[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """First and last as the model names them; of a language model of transformers the last is its head."""
    last = sorted(layers, key=lambda p: p.order)[-1:]
    told = next((m for m in _unwrapped(model) if callable(getattr(m, "get_output_embeddings", None))), None)
    head: Any = told.get_output_embeddings() if told is not None else None  # type: ignore[operator]
    if isinstance(head, nn.Module):
        mine, named = {id(p) for p in head.parameters()}, named_parameters(model)
        last = [p for p in layers if id(named[p.name]) in mine] or last
    return list(layers[:1]), last


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and what its wrappers hold."""
    here: Any = model
    while isinstance(here, nn.Module):
        yield here
        here = here._modules.get("module") or here._modules.get("_orig_mod")


def by_execution(
    model: nn.Module, example: Any, layers: Sequence[Parameter]
) -> tuple[list[Parameter], list[Parameter]] | None:
    """First and last by one forward pass: fed by the example through no other layer, and seen by the output likewise.

    Args:
        model: the model; it runs once, in eval mode and with gradients, and is left as it was.
        example: a tensor, a tuple of arguments or a mapping of keyword arguments.
        layers: the candidates.

    Returns:
        First and last, or `None` where the pass leaves no graph from an input to an output.

    Raises:
        ValueError: the model does not take the example.
    """
    named = named_parameters(model)
    mine = {id(named[p.name]): p for p in layers}
    with _all_differentiable(model):
        inputs = mapped(example, lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)
        fed = {t.untyped_storage().data_ptr() for t in tensors_of(inputs)}
        given: set[Any] = set()
        lookups: set[Any] = set()

        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            lookups.add(output.grad_fn)
            if any(t.untyped_storage().data_ptr() in fed for t in tensors_of(args)):
                given.add(output.grad_fn)

        tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        handles = [module.register_forward_hook(look) for module in tables]
        try:
            with torch.enable_grad():
                outputs = called_with(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        leaves = {id(t) for t in tensors_of(inputs) if t.requires_grad}
        ends = [t.grad_fn for t in tensors_of(outputs) if t.grad_fn is not None]
        beside = lookups - given if given or leaves else set()  # positions are looked up, but are no input
        return _Graph(mine, leaves, beside).ends(ends)


class _Graph:
    """The autograd graph of one pass: which nodes hang on the data, and which layers the data meets there."""

    def __init__(self, mine: Mapping[int, Parameter], leaves: set[int], beside: set[Any]) -> None:
        self.mine = mine
        self.leaves = leaves
        self.beside = beside
        self.is_data: dict[Any, bool] = {}
        self.reach: dict[Any, set[int]] = {}  # layers below a node that hangs on no data
        self.fed: dict[Any, bool] = {}  # whether any layer is met at a node or below it

    def ends(self, outputs: Sequence[Any]) -> tuple[list[Parameter], list[Parameter]] | None:
        order = self._ordered(outputs)
        for node in order:
            self._visit(node)
        data = [node for node in order if self.is_data[node]]
        first = {k for node in data if not any(self.fed[c] for c in self._data(node)) for k in self._met(node)}
        # What another output is made of is shown on the way, and is no end.
        inner = {below for node in outputs for below in self._below(node) if below is not node}
        last = {k for node in outputs if node not in inner for k in self._last(node)}
        if not first or not last:
            return None
        return [p for k, p in self.mine.items() if k in first], [p for k, p in self.mine.items() if k in last]

    def _next(self, node: Any) -> list[Any]:
        return [child for child, _ in node.next_functions if child is not None]

    def _data(self, node: Any) -> list[Any]:
        return [child for child in self._next(node) if self.is_data[child]]

    def _ordered(self, outputs: Sequence[Any]) -> list[Any]:
        """Every node after those it is made of."""
        done: dict[Any, None] = {}
        stack = [(node, False) for node in outputs]
        while stack:
            node, ready = stack.pop()
            if ready:
                done[node] = None
            elif node not in done:
                stack.append((node, True))
                stack.extend((child, False) for child in self._next(node) if child not in done)
        return list(done)

    def _visit(self, node: Any) -> None:
        variable = getattr(node, "variable", None)
        children = self._next(node)
        looked_up = str(node.name()).startswith(_LOOKUPS) and node not in self.beside
        self.is_data[node] = id(variable) in self.leaves or looked_up or any(self.is_data[c] for c in children)
        own = {id(variable)} & self.mine.keys()
        self.reach[node] = own.union(*(self.reach[c] for c in children if not self.is_data[c]))
        below = any(self.fed[c] for c in children if self.is_data[c])
        self.fed[node] = self.is_data[node] and (below or bool(self._met(node)))

    def _met(self, node: Any) -> set[int]:
        """The layers that the data meets at a node."""
        return self.reach[node] if self.is_data[node] else set()

    def _below(self, node: Any) -> set[Any]:
        return set(self._ordered([node]))

    def _last(self, node: Any) -> set[int]:
        """The layers that an output sees through no other."""
        found: set[int] = set()
        seen, stack = {node}, [node]
        while stack:
            here = stack.pop()
            if self._met(here):
                found |= self._met(here)
                continue
            fresh = [child for child in self._data(here) if child not in seen]
            seen.update(fresh)
            stack.extend(fresh)
        return found


def called_with(model: nn.Module, example: Any) -> Any:
    """What a model makes of an example: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        ValueError: an example of another kind, or one that the model does not take.
    """
    try:
        if isinstance(example, Mapping):
            return model(**example)
        if isinstance(example, (tuple, list)):
            return model(*example)
        if isinstance(example, Tensor):
            return model(example)
    except Exception as error:  # whatever a user's own code may raise
        raise ValueError(f"example=...: the model raised {type(error).__name__} on it: {error}") from error
    raise ValueError(
        f"example={type(example).__name__}: must be a tensor, a tuple of arguments, or a mapping of keyword arguments"
    )


@contextmanager
def _all_differentiable(model: nn.Module) -> Iterator[None]:
    """In eval mode, with a graph through every parameter, frozen or not; then as before."""
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_of(value)


def mapped(tree: Any, act: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and mappings with another tensor for each."""
    if isinstance(tree, Tensor):
        return act(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(value, act) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([mapped(value, act) for value in tree]) if type(tree) in (tuple, list) else tree
    return tree
