"""What is undone whatever breaks it off: an exception at any line, Ctrl-C included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

__all__ = ["undone", "undone_unless_done", "without_gradients"]


@contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Undo something on leaving, whatever happens: an exception that comes while it is undone lets it begin anew.

    Args:
        undo: may be called again after it is done, or was broken off anywhere.
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def undone_unless_done(undo: Callable[[], object]) -> Iterator[None]:
    """The same if the block raises, and nothing if it does not."""
    try:
        try:
            yield
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise


@contextmanager
def without_gradients() -> Iterator[None]:
    """`torch.no_grad()` whose end nothing can break off: gradients that stay off would stop training for good."""
    with undone(partial(torch.set_grad_enabled, torch.is_grad_enabled())), torch.no_grad():
        yield
