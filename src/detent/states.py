"""The state of a run as it is saved and loaded, and which weights it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detent import sharding
from detent.claimed import Entry
from detent.drivers import Driver
from detent.undoing import without_gradients

__all__ = ["STATE_VERSION", "check_state", "load_state", "match_weights", "refuse_other_weights", "saved_state"]

STATE_VERSION = 2


def saved_state(driver: Driver, *, complete: bool = False) -> dict[str, Any]:
    """What one optimizer's part of a run is resumed from; `complete` as for `Entry.saved`."""
    return {
        "version": STATE_VERSION,
        "step": driver.step,
        "total_steps": driver.total_steps,
        "awaiting": driver.awaiting,
        "weights": {entry.name: entry.saved(complete) for entry in driver.standing},
    }


def check_state(driver: Driver, state: Mapping[str, Any]) -> None:
    """Refuse a state that cannot be loaded, before anything is.

    Raises:
        ValueError: another version, clock, length of training, or set of claimed weights.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(f"Detent state has version {state.get('version')!r}; this release reads {STATE_VERSION}")
    step = state["step"]
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"Detent state has the clock {step!r}; it must be a whole number >= 0 of steps")
    total = state.get("total_steps")
    if None not in (total, driver.total_steps) and total != driver.total_steps:
        raise ValueError(
            f"Detent state is of a training of total_steps={total}, this run has {driver.total_steps}, which moves "
            f"all moments given as fractions; attach with total_steps={total} (training may go on beyond it)"
        )
    standing = [entry for entries in driver.at(driver.stage_of(step)) for entry in entries]
    mine = {entry.name for entry in standing}
    given = {name for name, value in state["weights"].items() if value is not None}
    if mine != given:
        odd = sorted(mine ^ given)[0]
        raise ValueError(f"Detent state and recipe disagree: {odd!r} is in only one of them")
    for entry in standing:
        entry.check_saved(state["weights"][entry.name])


def load_state(driver: Driver, state: Mapping[str, Any], model: nn.Module) -> None:
    """Go on from a state that `check_state` let pass, with the weights that it was saved with."""
    step = state["step"]
    if driver.stage_of(step) != driver.stage:
        for entry in (entry for entries in driver.stages for entry in entries):
            entry.forget()
        driver.enter(driver.stage_of(step))
    for entry in driver.standing:
        entry.restore(state["weights"][entry.name])
    driver.step, driver.awaiting = step, state.get("awaiting", "")
    driver.pending, driver.slots, driver.undo, driver.spent = False, [], [], {}
    match_weights(driver, model)


def match_weights(driver: Driver, model: nn.Module) -> None:
    """Make sure that the weights are those that the loaded state belongs to; mark those that are not as foreign.

    A state knows its weights by a number a row. What attach wrote over them is put back, so that it does not matter
    whether the model was loaded before attach or after it. A collective under sharding, so nothing in it goes by what
    this process alone holds: attach may have written over the rows of one process and not over another's.
    """
    overwritten = {entry.name: entry.before for entry in driver.all_entries if entry.before is not None}
    for entry in driver.standing:
        if entry.loaded is None:
            continue
        before = overwritten.get(entry.name, sharding.local(entry.param))
        if _is_of_state(entry, sharding.local(entry.param)):
            entry.adopt()
        elif _is_of_state(entry, before):
            sharding.reshard(model)
            with without_gradients():
                entry.write(before)
            sharding.reshard(model)
            entry.adopt()
        else:
            entry.disown()


def refuse_other_weights(driver: Driver, model: nn.Module) -> None:
    """Refuse to go on from a state with weights that it does not belong to. A collective under sharding.

    Raises:
        RuntimeError: naming the parameter.
    """
    waiting = [entry for entry in driver.standing if entry.loaded is not None]
    if not sharding.anywhere(not all(entry.is_ours for entry in waiting), [entry.param for entry in waiting]):
        return
    match_weights(driver, model)
    for entry in driver.standing:
        if entry.loaded is not None and not entry.is_ours:
            raise RuntimeError(
                f"{entry.name!r} does not hold the weights that the loaded state was saved with; load the model's "
                "state of the same checkpoint too, before or after the optimizer's, or call run.rebind(adopt=True) to "
                "go on from the weights as they are"
            )


def _is_of_state(entry: Entry, weight: Tensor) -> bool:
    """Whether these are the weights that the loaded state was saved with; the same answer on every process."""
    assert entry.loaded is not None
    return not sharding.anywhere(not torch.equal(sharding.row_sums(weight), entry.loaded), [entry.param])
