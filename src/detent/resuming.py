"""The state of a run: given out for a checkpoint, taken back, and refused where only part of it came."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from detent import sharding, states
from detent.averages import Averages
from detent.claimed import Entry
from detent.drivers import Driver
from detent.undoing import undone_unless_done, without_gradients

__all__ = ["Resumable"]


class Resumable(Averages):
    """A run that training goes on from."""

    _drivers: list[Driver]
    _all: list[Entry]

    @abc.abstractmethod
    def _repair(self, driver: Driver) -> None:
        """Put the weights back as a forward pass may see them if the step before raised half-way."""

    @abc.abstractmethod
    def _refresh(self) -> None:
        """Find anew what the compressed life of this moment consists of."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides weights and optimizer state: clocks, fitted params, latents, masks.

        It also rides as key "detent" in the optimizer's own state dict, so saving model and optimizer is enough;
        save this one explicitly under `torch.distributed.checkpoint`, and for an optimizer without state-dict hooks.

        Raises:
            RuntimeError: inside `compressed()`, where the model's weights are not those that training goes on from.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.STE())])
            >>> run = dt.attach(model, optimizer, recipe)
            >>> sorted(run.state_dict()["weights"]["weight"])
            ['fitted_at', 'found', 'held', 'params', 'places', 'pull', 'seen', 'state']
        """
        weights: dict[str, Any] = {}
        with self._one_thread("run.state_dict()"):
            for driver in self._drivers:
                weights |= self._driver_state(driver, complete=True)["weights"]
            return {
                "version": states.STATE_VERSION,
                "steps": [driver.step for driver in self._drivers],
                "awaiting": [driver.awaiting for driver in self._drivers],
                "total_steps": self._drivers[0].total_steps if self._drivers else None,
                "weights": weights,
                **({"activations": self.activations.state()} if self.activations else {}),
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model's weights of then too, before or after this.

        Args:
            state_dict: from `state_dict()` of a run with the same recipe.

        Raises:
            ValueError: another version, number of optimizers, length of training, or set of claimed weights. The run
                then stays as it was.
        """
        kinds = {"steps": Sequence, "awaiting": Sequence, "weights": Mapping}
        if not isinstance(state_dict, Mapping) or not all(isinstance(state_dict.get(k), t) for k, t in kinds.items()):
            raise ValueError(f"run.load_state_dict({type(state_dict).__name__}): must be what run.state_dict() gave")
        with self._one_thread("run.load_state_dict()"):
            self._refuse_inside("loading a state")
            self._load(state_dict)

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        steps, awaiting, weights = state_dict["steps"], state_dict["awaiting"], state_dict["weights"]
        if not len(steps) == len(awaiting) == len(self._drivers):
            raise ValueError(f"state has {len(steps)} optimizer clocks, this run has {len(self._drivers)}")
        mine = {entry.name for entry in self._all}
        for odd in sorted(set(weights) - mine)[:1]:
            raise ValueError(f"Detent state and recipe disagree: {odd!r} is in only one of them")
        parts = []
        for driver, step, missing in zip(self._drivers, steps, awaiting, strict=True):
            self._repair(driver)
            mine = {entry.name for entry in driver.all_entries}
            part = {name: saved for name, saved in weights.items() if name in mine}
            parts.append({**state_dict, "step": step, "awaiting": missing, "weights": part})
            self._check_state(driver, parts[-1])
        for driver, part in zip(self._drivers, parts, strict=True):
            self._load_driver(driver, part)

    def _driver_state(self, driver: Driver, complete: bool = False) -> dict[str, Any]:
        with self._one_thread("optimizer.state_dict()"):
            self._refuse_inside("saving a state")
            self._repair(driver)
            saved = states.saved_state(driver, complete=complete)
            if self.activations and driver is self._drivers[0]:
                saved["activations"] = self.activations.state()
            return saved

    def _check_state(self, driver: Driver, state: Mapping[str, Any]) -> None:
        states.check_state(driver, state)
        if driver is self._drivers[0]:
            self.activations.check(state.get("activations"))

    def _load_riding(self, driver: Driver) -> None:
        with self._one_thread("optimizer.load_state_dict()"):
            self._take_riding(driver)

    def _take_riding(self, driver: Driver) -> None:
        (state, driver.riding), (given, driver.given) = (driver.riding, None), (driver.given, None)
        if given is not None:
            driver.stand_ins.load(given, driver.all_entries)
        if state is not None:
            self._load_driver(driver, state)
        elif self.plan.recipe.stages or self.activations or any(entry.mechanism.memory for entry in driver.entries):
            memory = {m for e in self._all for m in e.mechanism.memory}
            memory |= {"the grids of activations"} if self.activations else set()
            kept = ", ".join(sorted(memory) or ["the stage it is in"])
            driver.awaiting = (
                f"the optimizer's state was loaded without Detent's part, and this recipe keeps state ({kept}); load a "
                "checkpoint saved with the run attached, or call run.rebind(adopt=True) to start it afresh"
            )

    def _load_driver(self, driver: Driver, state: Mapping[str, Any]) -> None:
        stage, step, awaiting = driver.stage, driver.step, driver.awaiting
        rounded = self.activations.state()
        before = [(entry, entry.everything()) for entry in driver.all_entries if not entry.param.is_meta]

        def back() -> None:
            sharding.reshard(self.model)
            with without_gradients():
                for entry, held in before:
                    entry.be_again(held)
            sharding.reshard(self.model)
            driver.step, driver.awaiting = step, awaiting
            driver.enter(stage)
            self.activations.load(rounded)
            self._refresh()

        with undone_unless_done(back):
            states.load_state(driver, state, self.model)
            if driver is self._drivers[0] and self.activations:
                self.activations.load(state["activations"])
            self._forget_lives()
            self._refresh()

    def _refuse_unresumed(self) -> None:
        """Refuse to go on where only part of a checkpoint was loaded.

        Raises:
            RuntimeError: saying what is missing.
        """
        for driver in self._drivers:
            if driver.awaiting:
                raise RuntimeError(driver.awaiting)
            states.refuse_other_weights(driver, self.model)
