"""Compression without training: of a model, and of a state dict on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from detent import claimed
from detent.claimed import fit_target
from detent.engine import Run
from detent.parameters import refuse_no_model
from detent.recipe import Recipe, refuse_no_recipe

__all__ = ["compress"]


def compress(model: nn.Module, recipe: Recipe, *, leave_out: str | Sequence[str] = (), example: Any = None) -> Run:
    """Apply the targets of a recipe to a trained model, with no optimizer and no data: post-training compression.

    The model keeps its weights; `run.compressed()` shows the compressed life, `run.finalize()` makes it permanent.

    Args:
        model: a trained model.
        recipe: rules whose mechanisms, if any, are ignored.
        leave_out: as for `attach`.
        example: as for `Recipe.resolve`.

    Returns:
        A run without optimizers.

    Raises:
        ValueError: a rule that claims nothing, a target that refuses a parameter, NaN weights, something in
            `model.state_dict()` that no file could hold.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(8, 4)
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2))]))
        >>> with run.compressed():
        ...     print(len(model.weight.unique()) <= 3)
        True
    """
    refuse_no_model(model, "compress")
    refuse_no_recipe(recipe, "compress")
    claimed.refuse_stages(recipe, "compress")
    # A file of this run must not say that weights were pulled.
    run = Run(model, recipe.without_mechanisms().resolve(model, example=example), [], None, "raise")
    run.leave(leave_out, "compress")
    fit_target(run._entries)
    run._adopt()
    run.plan.warn_left("compress")
    run._example = example
    run._look_for_losses(run._life(None, None))
    run._say_losses("compress")
    return run
