"""Half precision: the optimizer moves float32 latents in place of the weights, so that no small step is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detent import optimizers, sharding
from detent.claimed import Entry
from detent.targets.base import compute_dtype

__all__ = ["StandIns", "refuse_narrow_shards"]


class StandIns:
    """What one optimizer is given in its step in place of half-precision weights, whose latents are float32.

    `make` before the mechanisms' first moments, which write the latents there; `lend` as the last thing before the
    step, `take_back` as the first thing after it; `drop` when the mechanisms have read what became of them.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._made: dict[str, nn.Parameter] = {}  # the same object in every step, for whoever guards on it
        self._lent: list[tuple[Entry, Tensor | None]] = []  # with the gradients of the weights
        self._entries: list[Entry] = []
        self._before: list[tuple[Entry, Tensor]] = []
        self._wide: dict[int, Tensor] = {}  # parameters whose optimizer state is wider than they are

    def make(self, entries: Sequence[Entry]) -> None:
        """Make stand-ins of the weights whose latents the optimizer is to move."""
        for entry in entries:
            if entry.is_wide:
                stand_in = self._made.setdefault(entry.name, nn.Parameter(torch.empty(0)))
                vars(stand_in).update(vars(entry.param))  # some optimizers read marks that users set
                moved = entry.state[entry.mechanism.moves or ""]
                value = moved if moved.shape == entry.param.shape else entry.param.detach()
                stand_in.data = value.to(compute_dtype(entry.param.dtype), copy=True)
                entry.lent = stand_in
                self._entries.append(entry)

    def lend(self, *, watched: bool) -> None:
        """Give the optimizer stand-ins, gradients and states of float32.

        The gradients are taken away meanwhile: if the step raises, `zero_grad()` finds nothing that it would miss.

        Args:
            watched: look at them, for `refuse_blind`.
        """
        self._before = []
        for entry in self._entries:
            assert entry.lent is not None
            stand_in, param, grad = entry.lent, entry.param, entry.param.grad
            self._lent.append((entry, grad))
            stand_in.grad = None if grad is None else grad.to(stand_in.dtype)
            param.grad = None
            self._wide[id(param)] = param
            optimizers.cast_state(self.optimizer, param, stand_in.dtype)
            if watched and grad is not None and bool(grad.any()):
                self._before.append((entry, sharding.row_sums(stand_in)))
        self._swap([(entry.param, entry.moved) for entry, _ in self._lent])
        mine = {id(entry.param) for entry in self._entries}
        self._narrow([param for key, param in self._wide.items() if key not in mine])

    def take_back(self) -> None:
        """Put the model's own weights, and their gradients, where the stand-ins are."""
        if not self._lent:
            return
        self._swap([(entry.moved, entry.param) for entry, _ in self._lent])
        for entry, grad in self._lent:
            stand_in, param = entry.moved, entry.param
            if stand_in.grad is not None:
                # A backward pass after a step that raised has put a new gradient there.
                param.grad = grad if param.grad is None else param.grad + stand_in.grad.to(param.dtype)
            stand_in.grad = None
        self._lent = []

    def drop(self) -> None:
        """A step is over: free the memory of its stand-ins."""
        self.take_back()
        for entry in self._entries:
            assert entry.lent is not None
            entry.lent.data, entry.lent = torch.empty(0), None
        self._entries, self._before = [], []

    def end(self) -> None:
        """The optimizer goes on without us: its state must fit the half-precision weights."""
        self.drop()
        self._narrow(list(self._wide.values()))

    def load(self, state_dict: Any, entries: Sequence[Entry]) -> None:
        """Take a saved optimizer state as wide as it was saved, where torch has just rounded it."""
        narrow = [entry.param for entry in entries if entry.is_narrow]
        if narrow:
            self._wide |= {id(p): p for p in optimizers.load_wide(self.optimizer, state_dict, narrow)}

    def refuse_blind(self) -> None:
        """Refuse an optimizer that moves other tensors than its parameter groups name.

        Raises:
            RuntimeError: naming the optimizer.
        """
        if not self._before or isinstance(self.optimizer, torch.optim.SGD):
            return  # SGD reads them, and keeps no state by which a very small step is told from none
        for entry, before in self._before:
            if self.optimizer.state.get(entry.param) or not torch.equal(sharding.row_sums(entry.moved), before):
                return
        name, dtype = self._before[0][0].name, self._before[0][0].param.dtype
        raise RuntimeError(
            f"{type(self.optimizer).__name__} does not move what its param_groups name in place of {name!r}, which is "
            f"{dtype} and has a float32 latent; train with float32 weights under autocast"
        )

    def _narrow(self, params: Sequence[Tensor]) -> None:
        for param in params:
            optimizers.cast_state(self.optimizer, param, param.dtype)
            del self._wide[id(param)]

    def _swap(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Other tensors for the optimizer to move, with the states of those before."""
        new = {id(old): other for old, other in pairs}
        for group in self.optimizer.param_groups if pairs else ():
            group["params"][:] = [new.get(id(param), param) for param in group["params"]]
        state = getattr(self.optimizer, "state", {})
        for old, other in pairs:
            if old in state:
                state[other] = state.pop(old)


def refuse_narrow_shards(entry: Entry) -> None:
    """Refuse a half-precision shard that a float32 latent would have to stand in for.

    Raises:
        ValueError: naming the parameter.
    """
    if entry.is_narrow and sharding.rows_of(entry.param, entry.name) is not None:
        raise ValueError(
            f"{entry.name!r} is sharded in {entry.param.dtype}, and {type(entry.mechanism).__name__} keeps float32 "
            "latents that no optimizer could move in its place; shard float32 weights, and let MixedPrecisionPolicy "
            "cast them"
        )
