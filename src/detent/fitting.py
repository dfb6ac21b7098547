"""When targets are fitted: what is due at a tick of one optimizer, and which weights have a say in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detent.claimed import Entry, by_rule, fit_pull, fit_target, mapped_whole
from detent.drivers import Driver
from detent.recipe import Recipe

__all__ = ["fit_due", "settle_stage"]


def fit_due(
    driver: Driver,
    drivers: list[Driver],
    everything: list[Entry],
    recipe: Recipe,
    is_unfixed: Callable[[Entry], bool],
    *,
    after: bool,
) -> list[Entry]:
    """Fit what is due at this tick; a model-wide target together, whichever optimizer comes first.

    Args:
        driver: the optimizer.
        drivers: all of them.
        everything: the claimed weights of all stages and optimizers.
        recipe: the recipe.
        is_unfixed: whether a weight's own target is to be fitted before it is mapped.
        after: fit the mechanisms that want it after the step, instead of those that want it before.

    Returns:
        The driver's entries that were fitted.
    """
    done: list[Entry] = []
    clock = driver.clock
    for index in range(len(recipe.rules)):
        mine = [entry for entry in driver.entries if entry.claim.rule == index]
        if not mine:
            continue
        cadence = mine[0].cadence
        missing = any(entry.pull_params is None for entry in mine)
        if mine[0].settled and not missing:  # another optimizer came to the end of the stage, and fixed it for all
            continue
        if not missing and (cadence.after != after or not cadence.due(clock)):
            continue
        if missing and after and not cadence.after:
            continue
        if mine[0].pull.fits_together:
            mine = [entry for entry in everything if entry.claim.rule == index]
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    f"{recipe.called(index)} is fitted over the whole model, which an optimizer that "
                    "steps inside backward cannot offer; use scope='tensor'"
                )
        if after and not mine[0].mechanism.active(clock):
            continue
        if not missing and not after and mine[0].fitted_at == clock.step:
            continue
        fit_pull(mine, _ahead(driver, drivers, mine, is_unfixed))
        fitted = {id(entry) for entry in mine}
        for each in drivers:  # each by the clock of its own optimizer, which may have parted
            for entry in each.entries:
                entry.fitted_at = each.clock.step if id(entry) in fitted else entry.fitted_at
        done += [entry for entry in driver.entries if entry.claim.rule == index]
    return done


def _ahead(
    driver: Driver, drivers: list[Driver], entries: list[Entry], is_unfixed: Callable[[Entry], bool]
) -> dict[str, Tensor]:
    """Of those whose optimizer is still in an earlier stage what its end will make of them.

    Fitted together with them as they are, a model-wide target of the new stage would count what is about to be
    pruned.
    """
    found, wanted = {}, {id(entry) for entry in entries}
    for late in (other for other in drivers if other.stage < driver.stage):
        for entry, old in late.coming(driver.stage):
            if id(entry) in wanted:
                fresh = old is not None and is_unfixed(old)
                found[entry.name] = entry.hidden_whole() if old is None else mapped_whole(old, refit=fresh)
    return found


def settle_stage(driver: Driver, everything: list[Entry], is_unfixed: Callable[[Entry], bool]) -> None:
    """A stage is over: bring the fit of each of its rules to its end. Arguments as for `fit_due`."""
    for entries in by_rule([(entry, entry) for entry in driver.entries]):
        mine = [entry for entry, _ in entries if not entry.settled]
        if mine and mine[0].target.fits_together:  # one threshold, whichever optimizer comes first
            mine = [entry for entry in everything if entry.claim.rule == mine[0].claim.rule]
        unfixed = [entry for entry in mine if is_unfixed(entry)]
        if unfixed:
            fit_target(unfixed)
        for entry in mine:
            entry.settled = True
