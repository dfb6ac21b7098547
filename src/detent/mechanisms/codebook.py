"""Learning a codebook: assignments stay, the codewords are what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.mechanisms.base import Cadence, Clock, Mechanism, Slot
from detent.schedules import Moment, is_whole, step_at
from detent.targets import Target
from detent.targets.base import compute_dtype

__all__ = ["CodebookLearning"]

# Members of a cluster that were moved alike differ by roundings alone: of the step, and of the weight it is added to.
_UNEQUAL_STEP, _UNEQUAL_WEIGHT = 1e-4, 8


@dataclass(frozen=True, kw_only=True)
class CodebookLearning(Mechanism):
    """Train the codewords of a codebook target: weights that share a codeword move together.

        w = codebook[index],    dL/dcodebook_j = mean (or sum) of dL/dw over the members of j

    At the start every weight becomes its codeword; from then on the members of a cluster get the same gradient, so that
    any optimizer that treats each weight by itself (SGD, Adam, ...) does to them what it would do to a real codebook
    parameter. An optimizer that moves them apart (Muon, parameter groups of unequal rates) is refused at its first
    step; momentum from before the start is averaged over the members. A codebook shared by several weights must have
    them all in one optimizer. In the last part of training the forward pass sees the codebook as it will be stored, and
    the gradient moves the unrounded one behind it (straight-through).

    Not under FSDP2, where the members of a cluster lie on several processes. Under DDP as it is.

    Args:
        reduce: "mean" makes the learning rate independent of how many weights share a codeword, "sum" is the true
            gradient of the codebook.
        ste_from: moment from which the forward pass sees the stored codebook; `None` for never.
        reassign_every: steps between re-assignments of the original weights to the codewords as they are now, >= 1;
            `None` for never. Costs a copy of the weights; the new members of a codeword then share their mean momentum.
        reassign_until: moment after which nothing is re-assigned.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Conv2d(4, 8, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> rule = dt.Rule(match="weight", target=dt.KernelCodebook(size=4), mechanism=dt.CodebookLearning())
        >>> run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=10)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(2, 4, 8, 8)).square().mean().backward()
        ...     _ = optimizer.step()
        >>> len(model.weight.detach().reshape(-1, 9).unique(dim=0))
        4

    Reference: Stock et al., "And the Bit Goes Down", arXiv 1907.05686 (mean); Son, Nah, Lee, "Clustering
    Convolutional Kernels to Compress Deep Neural Networks", ECCV 2018 (sum).
    """

    reduce: Literal["mean", "sum"] = "mean"
    ste_from: Moment | None = 0.8
    reassign_every: int | None = None
    reassign_until: Moment = 1 / 3

    keeps_full_life: ClassVar[bool] = False
    moves: ClassVar[str | None] = "codewords"
    ties: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f'CodebookLearning(reduce={self.reduce!r}): must be "mean" or "sum"')
        if self.reassign_every is not None and not is_whole(self.reassign_every):
            raise ValueError(f"CodebookLearning(reassign_every={self.reassign_every!r}): must be >= 1 step or None")
        super().__post_init__()

    @property
    def memory(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("index", "codewords") if self.reassign_every is None else ("index", "codewords", "original")

    def cadence(self, target: Target) -> Cadence:
        # Found once; from then on training moves it.
        return Cadence(until=1, own=("fit_every", "fit_until"))

    def check(self, target: Target) -> str | None:
        if not target.has_codebook:
            return f"CodebookLearning trains the codewords of a codebook, and {type(target).__name__} has none"
        return None

    def active(self, clock: Clock) -> bool:
        self._stored(clock.step, clock)
        self._reassigns(clock)
        return True

    def _stored(self, step: int, clock: Clock) -> bool:
        """Whether the forward pass of a step sees the codebook as it is stored."""
        if self.ste_from is None:
            return False
        return step >= step_at(self.ste_from, clock.total_steps, "CodebookLearning.ste_from")

    def _reassigns(self, clock: Clock) -> bool:
        if self.reassign_every is None:
            return False
        until = step_at(self.reassign_until, clock.total_steps, "CodebookLearning.reassign_until")
        return 0 < clock.step < until and clock.step % self.reassign_every == 0

    # --- moments --------------------------------------------------------------------------------------------------

    def open(self, slot: Slot, clock: Clock) -> None:
        _refuse_shards(slot)
        index = slot.target.assign(slot.weight, slot.params)
        slot.state["index"] = index.to(torch.int32)
        wide = compute_dtype(slot.weight.dtype)
        slot.state["codewords"] = slot.target.codebook(slot.params).to(wide, copy=True)
        if self.reassign_every is not None:
            slot.state["original"] = slot.weight.clone()
        self._show(slot, clock.step, clock)

    def _show(self, slot: Slot, step: int, clock: Clock) -> None:
        """Write the weights that the forward pass of a step sees."""
        stored = self._stored(step, clock)
        table = slot.target.codebook(slot.params).to(slot.seen.dtype) if stored else slot.state["codewords"]
        slot.seen.copy_(_spread(slot, table))

    def before_together(self, slots: Sequence[Slot], clock: Clock) -> None:
        for group in _groups(slots):
            if self._reassigns(clock):
                for slot in group:
                    index = slot.target.assign(slot.state["original"], slot.params)
                    slot.state["index"] = index.to(torch.int32)
            if any(slot.grad is not None for slot in group):
                self._tie_gradients(group)
            _tie_moments(group)

    def _tie_gradients(self, group: list[Slot]) -> None:
        """Find the gradient of the codewords.

        A codebook moves with the gradient of whichever members got one, and all of them with it: left out of the step,
        the others would keep a momentum and a count of steps of their own.
        """
        grads = [slot.fill() if slot.grad is None else slot.grad for slot in group]
        total = _reduced(group, grads, self.reduce)
        if (held := group[0].target.held_codewords(group[0].params)) is not None:
            total[held] = 0.0
        for slot, grad in zip(group, grads, strict=True):
            slot.grad, slot.scratch["gradient"] = grad, total

    def before_step(self, slot: Slot, clock: Clock) -> None:
        slot.weight.copy_(_spread(slot, slot.state["codewords"]))
        if slot.grad is not None:
            slot.grad.copy_(_spread(slot, slot.scratch["gradient"]))

    def after_together(self, slots: Sequence[Slot], clock: Clock) -> None:
        # All are looked at before any is written, so that a refusal leaves a step that can be undone.
        moved = [(group, self._moved_once(group)) for group in _groups(slots)]
        for group, codewords in moved:
            first = group[0]
            fresh = first.target.with_codebook(first.params, codewords, first.seen.dtype).tensors
            fresh = {name: value for name, value in fresh.items() if value is not first.params.tensors.get(name)}
            for slot in group:
                slot.state["codewords"] = codewords
                params = replace(slot.params, tensors={**slot.params.tensors, **fresh})
                slot.install(params)
                self._show(replace(slot, params=params), clock.step + 1, clock)

    def _moved_once(self, group: list[Slot]) -> Tensor:
        """The same, also where some members show it already, as the step was broken off."""
        scratch = group[0].scratch
        if "moved" not in scratch:
            scratch["moved"] = self._moved(group)
        return scratch["moved"]

    def _moved(self, group: list[Slot]) -> Tensor:
        """The codewords after the optimizer's step.

        Raises:
            RuntimeError: members of one cluster were moved apart.
        """
        old = group[0].state["codewords"]
        if group[0].grad is None:  # then none has one, and all stand where they were
            return old
        new = _first_members(old, group, [slot.weight for slot in group])
        gaps = [_spread(slot, new).sub_(slot.weight).abs_().amax() for slot in group]
        apart = float(torch.stack(gaps).amax())
        step, size = float((new - old).abs().amax()), float(new.abs().amax())
        if apart > _UNEQUAL_STEP * step + _UNEQUAL_WEIGHT * torch.finfo(old.dtype).eps * size:
            raise RuntimeError(
                f"{group[0].name!r}: the optimizer moved weights that share a codeword apart, by up to {apart:.3g}; "
                "CodebookLearning needs one that treats every weight by itself (SGD, AdamW; not Muon), with the same "
                "rate and weight decay for all weights of a codebook"
            )
        if (held := group[0].target.held_codewords(group[0].params)) is not None:
            new = torch.where(held[:, None], old, new)
        return new

    def undo(self, slot: Slot, clock: Clock) -> None:
        slot.scratch.clear()
        self._show(slot, clock.step, clock)


def _refuse_shards(slot: Slot) -> None:
    if slot.params.layout.rows is not None:
        raise ValueError(
            f"{slot.name!r} is sharded, and CodebookLearning ties weights across all rows; use DDP, or train without "
            "sharding"
        )


def _groups(slots: Sequence[Slot]) -> list[list[Slot]]:
    """The slots of a step, those that share a codebook together.

    Raises:
        ValueError: sharded weights, or a codebook some of whose weights are not here.
    """
    found: dict[object, list[Slot]] = {}
    for slot in slots:
        _refuse_shards(slot)
        family = slot.target.family(slot.params)
        found.setdefault(slot.name if family is None else (family, slot.weight.dtype), []).append(slot)
    for group in found.values():
        family = group[0].target.family(group[0].params)
        here = sum(slot.state["index"].numel() for slot in group)
        if family is not None and here != family[1]:
            raise ValueError(
                f"{group[0].name!r} shares its codebook with weights that are not in this step ({here} of {family[1]} "
                "units are); put all weights of a global codebook into one optimizer"
            )
    return list(found.values())


def _spread(slot: Slot, table: Tensor) -> Tensor:
    """Rows of a table in the places of their members, as a tensor like the weight."""
    return table.index_select(0, slot.state["index"]).reshape(slot.weight.shape)


def _reduced(group: list[Slot], values: Sequence[Tensor], reduce: str) -> Tensor:
    """Sum or mean over the members of every codeword, in float64.

    `index_put_` adds up in a fixed order in float64, on the CPU as on a GPU.
    """
    like = group[0].state["codewords"]
    total = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    members = torch.zeros(len(like), dtype=torch.float64, device=like.device)
    for slot, value in zip(group, values, strict=True):
        index = slot.state["index"].long()
        members += torch.bincount(index, minlength=len(like))
        total.index_put_((index,), value.double().reshape(len(index), -1), accumulate=True)
    return total / members.clamp_min(1)[:, None] if reduce == "mean" else total


def _tie_moments(group: list[Slot]) -> None:
    """Give the members of a codeword one momentum: the mean, where theirs differ.

    They do after a step that this mechanism did not see (rate 0, before the start, an earlier stage), and after a
    re-assignment. Those of a codeword that is held get none: what other weights had gathered must not move it.
    """
    first = group[0]
    still = first.target.held_codewords(first.params)
    held = [slot.moments() for slot in group]
    for name in sorted({name for moments in held for name in moments}):
        mine = [(slot, moments[name]) for slot, moments in zip(group, held, strict=True) if name in moments]
        slots = [slot for slot, _ in mine]
        none = torch.zeros_like(slots[0].state["codewords"], dtype=mine[0][1].dtype)
        members = _first_members(none, slots, [value for _, value in mine])
        same = all(torch.equal(value, _spread(slot, members)) for slot, value in mine)
        if same and (still is None or not bool(members[still].any())):
            continue
        mean = _reduced(slots, [value for _, value in mine], "mean")
        if still is not None:
            mean[still] = 0.0
        for slot, value in mine:
            value.copy_(_spread(slot, mean).to(value.dtype))


def _first_members(old: Tensor, slots: Sequence[Slot], values: Sequence[Tensor]) -> Tensor:
    """One unit of every cluster; the old codeword where a cluster is empty.

    One weight at a time: a codebook may be that of the whole model, and a copy of all its units is another model.
    """
    found, missing = old.clone(), torch.ones(len(old), dtype=torch.bool, device=old.device)
    for slot, value in zip(slots, values, strict=True):
        index = slot.state["index"].long()
        none = len(index)
        places = torch.arange(none, device=index.device)
        first = torch.full((len(old),), none, device=index.device).scatter_reduce_(0, index, places, "amin")
        new = missing & (first < none)
        found[new] = value.reshape(none, -1)[first[new]].to(found.dtype)
        missing &= ~new
    return found
