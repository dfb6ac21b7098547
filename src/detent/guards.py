"""What the engine refuses to go on with: weights that others wrote, replaced, emptied or converted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detent import sharding
from detent.claimed import Entry
from detent.parameters import named_parameters

__all__ = [
    "fingerprint",
    "found_again",
    "refuse_empty",
    "refuse_foreign_writes",
    "refuse_replaced",
    "refuse_retyped",
]


def refuse_foreign_writes(entries: list[Entry], *, contents: bool = False, over: str = "") -> None:
    """Refuse to go on with weights that someone else wrote; a collective under sharding.

    Args:
        entries: the weights.
        contents: compare what they hold also where no write was counted (writes through `.data` are not). Else, before
            a step, only where that would undo the write.
        over: what the run is if it does not follow training: "made" without an optimizer, or "detached".

    Raises:
        RuntimeError: on every process, naming the parameter on those that hold what was written.
    """
    bad = next((entry for entry in entries if not (entry.holds() if contents else entry.is_ours_in_step)), None)
    if not sharding.anywhere(bad is not None, [entry.param for entry in entries]):
        for entry in entries:
            entry.keep(whole=contents)
        return
    name = repr(bad.name) if bad is not None else "a weight that another process holds"
    adopt = "call run.rebind(adopt=True)"
    if over == "detached":
        raise RuntimeError(
            f"{name} was written since this run was finalized or detached (training went on?), and what it knows is of "
            f"the weights of then; to take them as they are now, {adopt}"
        )
    if over:
        raise RuntimeError(
            f"{name} was written by someone else since this run was made (an average, merged adapters, a "
            f"load_state_dict?); put it back as it was, or, to compress it as it is now, {adopt}"
        )
    who = (
        f"{name} was written by someone else since attach or the last step (a load_state_dict, an average of weights?)"
    )
    if any("latent" in entry.state for entry in entries):
        raise RuntimeError(
            f"{who}, but training goes on from the hidden latents, which that did not reach; put the weights back as "
            "they were; to resume, load the optimizer's state too, after the model's; only to drop all latents and "
            f"start afresh from the new values, {adopt}"
        )
    raise RuntimeError(
        f"{who}; put it back as it was; to resume, load the optimizer's state too, after the model's; to start afresh "
        f"from the new values, {adopt}"
    )


def refuse_replaced(model: nn.Module, entries: list[Entry], *, attached: bool) -> None:
    """Refuse to go on with tensors that the model does not compute with any more.

    Raises:
        RuntimeError: naming the parameter.
    """
    if _replaced(model, entries) is None:
        return
    sharding.reshard(model)  # under FSDP2 gathered copies stand in for the weights between forward and backward
    name = _replaced(model, entries)
    if name is None:
        return
    if name not in named_parameters(model):
        raise RuntimeError(_gone(name))
    advice = "give the new one to the optimizer and call run.rebind()" if attached else "call run.rebind(adopt=True)"
    raise RuntimeError(
        f"{name!r} of the model is another tensor now than the one this run knows (a load_state_dict with "
        f"assign=True?); {advice}"
    )


def _replaced(model: nn.Module, entries: list[Entry]) -> str | None:
    named = named_parameters(model)
    for entry in entries:
        if named.get(entry.name) is not entry.param:
            return entry.name
        # A tie that broke: the other name has a tensor of its own, which nobody claims.
        for name in entry.claim.aliases:
            if named.get(name, entry.param) is not entry.param:
                return name
    return None


def _gone(name: str) -> str:
    """What to say of a model that lacks a claimed parameter."""
    return (
        f"{name!r} is claimed by the recipe but is no parameter of the model any more (adapters merged and unloaded, a "
        "layer exchanged?): this is another model, and needs a run of its own (detent.attach, or detent.compress)"
    )


def found_again(entries: list[Entry], model: nn.Module) -> dict[str, Tensor]:
    """The claimed parameters of a model by name.

    Raises:
        ValueError: a claimed name is gone, or has another shape.
    """
    named, found = named_parameters(model), {}
    for entry in entries:
        param = named.get(entry.name)
        if param is None:
            raise ValueError(_gone(entry.name))
        if tuple(param.shape) != entry.claim.layout.shape:
            raise ValueError(f"{entry.name!r} has shape {tuple(param.shape)} now, not {entry.claim.layout.shape}")
        found[entry.name] = param
    return found


def refuse_retyped(entries: list[Entry]) -> None:
    """Refuse to go on with weights of another dtype than the plan was made for.

    Raises:
        RuntimeError: naming the parameter.
    """
    for entry in entries:
        if entry.param.dtype != entry.claim.dtype:
            raise RuntimeError(
                f"{entry.name!r} is {entry.param.dtype} now and was {entry.claim.dtype} when this run was made (a "
                "model.half() since?); convert the model before, or call run.rebind(adopt=True) to go on from the new "
                "values"
            )


def refuse_empty(model: nn.Module, named: Sequence[tuple[str, Tensor]], *, waits: bool = False) -> None:
    """Refuse weights that hold no numbers.

    Args:
        model: the model.
        named: its claimed weights by name.
        waits: weights of an empty model may still come, but not those that accelerate keeps elsewhere.

    Raises:
        ValueError: naming the parameter, and what to do.
    """
    name = next((name for name, w in named if w.is_meta), None)
    if name is None:
        return
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"{name!r} is offloaded by accelerate: it is on the meta device, and its numbers come for a forward pass "
            "alone; bring the weights into memory first (accelerate.hooks.remove_hook_from_submodules(model), or load "
            "the model without device_map or offloading), or compress the checkpoint's state dict file by file"
        )
    if not waits:
        raise ValueError(
            f"{name!r} is on the meta device and holds no numbers: the model was built empty; give it memory "
            '(model.to_empty(device="cpu")) and load its weights first'
        )


def fingerprint(entries: list[Entry]) -> bytes:
    """What tells other weights from those that were written and put back: a digest of what is held here."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries:
        digest.update(sharding.local(entry.param).contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
