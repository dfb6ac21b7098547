"""Averages of weights: latents shown so that any tool may average them, and the lives of what it made of them."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.optim.swa_utils import AveragedModel

from detent.claimed import Entry, fit_target
from detent.lives import Lives
from detent.parameters import refuse_no_model
from detent.undoing import without_gradients

__all__ = ["Averages"]

_A = TypeVar("_A", bound="Averages")


class Averages(Lives):
    """The lives of averaged weights beside those of the weights."""

    _averages: bool = False  # whether latents were shown to an average

    @abc.abstractmethod
    def _alone(self: _A, model: nn.Module) -> _A:
        """The same plan over another model, without optimizers."""

    @abc.abstractmethod
    def _is_over(self, entry: Entry) -> bool:
        """Whether the numbers fitted to a weight are final."""

    @abc.abstractmethod
    def _refuse_unresumed(self) -> None:
        """Refuse to go on where only part of a checkpoint was loaded."""

    @contextmanager
    def latents(self) -> Iterator[None]:
        """Show what the optimizer moves, so that an average of the weights (EMA, SWA) is one of the latents.

        Update the average inside; `run.averaged(...)` then gives its lives. Under mechanisms without a latent nothing
        changes.

        Raises:
            RuntimeError: inside `compressed()`, or while another thread works on the same model; on leaving, if a
                latent was written inside.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.STE())
            >>> run = dt.attach(model, optimizer, dt.Recipe([rule]))
            >>> average = torch.optim.swa_utils.AveragedModel(model)
            >>> with run.latents():
            ...     average.update_parameters(model)
            >>> len(model.weight.unique()) < len(average.module.weight.unique())
            True
        """
        with self._one_thread("run.latents()"):
            self._refuse_inside("run.latents()")
            self._settle()
            moved = [entry for entry in self._entries if _hides(entry)]
            with self._set_aside(moved, statistics=False):
                with without_gradients():
                    for entry in moved:
                        entry.write(entry.hidden())
                        entry.adopt()
                self._averages = True
                yield
                written = [entry.name for entry in moved if not entry.is_ours]
        if written:
            raise RuntimeError(
                f"{written[0]!r} was written inside run.latents(), which shows latents and keeps none: what was "
                "written is gone; write weights outside"
            )

    def averaged(self: _A, model: nn.Module | None = None) -> _A:
        """The lives of averaged weights: on the numbers of this training where those are final, else fitted to them.

        Args:
            model: the averaged model (torch's `AveragedModel`, or a copy of the model with averaged weights); by
                default this run's own, for tools that put the average into it for a while (`copy_to`, Lightning).

        Returns:
            A run without optimizers: `compressed()`, `recalibrate()`, `measure()`; `dt.save` and exports take it.

        Raises:
            ValueError: a model without the claimed parameters.
            RuntimeError: latents were never shown to the average (`run.latents()`), or an unfinished resume.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.PSG())
            >>> run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=10)
            >>> average = torch.optim.swa_utils.AveragedModel(model)
            >>> with run.averaged(average).compressed():
            ...     len(average.module.weight.unique()) <= 3
            True
        """
        if isinstance(model, AveragedModel):
            model = model.module
        model = self.model if model is None else model
        refuse_no_model(model, "run.averaged")
        with self._one_thread("run.averaged()"):
            self._refuse_inside("run.averaged()")
            self._refuse_unresumed()
            _refuse_average_of_seen(self._entries, shown=self._averages)
            run = self._alone(model)
            _take_over(run._entries, [(entry, self._is_over(entry)) for entry in self._entries])
            run._adopt()
        return run


def _hides(entry: Entry) -> bool:
    """Whether the forward pass sees something else than what is trained."""
    return "latent" in entry.state


def _refuse_average_of_seen(entries: Sequence[Entry], *, shown: bool) -> None:
    """Refuse an average that can only be one of what forward passes saw of latents.

    Raises:
        RuntimeError: naming a parameter.
    """
    hiding = next((entry for entry in entries if _hides(entry)), None)
    if hiding is not None and not shown:
        raise RuntimeError(
            f"{hiding.name!r} has a latent under {type(hiding.mechanism).__name__}, and an average of what forward "
            "passes saw of it lies on no level; update the average inside `with run.latents():`, then ask again"
        )


def _take_over(average: Sequence[Entry], trained: Sequence[tuple[Entry, bool]]) -> None:
    """Let averaged weights lie where training has come to: on numbers that are final, else on a fit that goes on.

    Args:
        average: entries of averaged weights, in order.
        trained: those of the training, each with whether its fit is over.
    """
    for mine, (entry, over) in zip(average, trained, strict=True):
        mine.params, mine.pull_params = entry.params, entry.pull_params
        # A codebook that is trained is averaged with its weights: found again from them, starting where it is.
        mine.settled = over and not entry.mechanism.ties
        key = entry.mechanism.weighing
        if key is not None and key in entry.state:
            mine.state[key] = entry.state[key]
    unsettled = [entry for entry in average if not entry.settled or entry.params is None]
    if unsettled:
        fit_target(unsettled)
        for entry in unsettled:
            entry.settled = True
