"""One thread at a time: who works on a model's weights, so that a second thread is told and not misled."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from detent.undoing import undone

__all__ = ["OneThread"]

_Work = tuple[threading.Thread, str]


class OneThread:
    """The work on one model's weights: one thread does it, and may come in again; others are refused, none waits.

    A lock would let both work in turn, and each would go on from weights that the other has exchanged meanwhile.
    """

    def __init__(self) -> None:
        self._now: dict[str, _Work] = {}  # one entry at most: `setdefault` is what no other thread can come between
        self._steps: weakref.WeakKeyDictionary[object, _Work] = weakref.WeakKeyDictionary()

    @staticmethod
    def of(model: nn.Module) -> OneThread:
        """That of a model, whatever run asks."""
        return _OF.setdefault(model, OneThread())

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Work on the weights inside.

        Raises:
            RuntimeError: another thread does, or is between both halves of an optimizer's step.
        """
        me = threading.current_thread()
        if self._at_work() is me:
            yield
            return

        def leave() -> None:
            if self._at_work() is me:
                del self._now["now"]

        with undone(leave):
            self._forget_the_dead()
            others = [self._now.setdefault("now", (me, what)), *self._steps.values()]
            for thread, work in others:
                if thread is not me and thread.is_alive():
                    raise RuntimeError(
                        f"{what} in thread {me.name!r} while thread {thread.name!r} is in {work} of the same model: "
                        "only one thread at a time may; do it between two steps in the thread that trains, or give "
                        "each thread a copy of the model and a run of its own"
                    )
            yield

    def stay(self, who: object, what: str) -> None:
        """The work of this thread goes on after the call, until `go`."""
        self._steps[who] = (threading.current_thread(), what)

    def go(self, who: object) -> None:
        """It is over."""
        self._steps.pop(who, None)

    def _at_work(self) -> threading.Thread | None:
        return self._now.get("now", (None, ""))[0]

    def _forget_the_dead(self) -> None:
        """A thread that ended inside leaves no one who could go on."""
        thread = self._at_work()
        if thread is not None and not thread.is_alive():
            self._now.pop("now", None)


_OF: weakref.WeakKeyDictionary[nn.Module, OneThread] = weakref.WeakKeyDictionary()
