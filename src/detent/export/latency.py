"""How long exported files take: calls that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from detent.export.onnx import session

__all__ = ["Latency", "alternating", "onnx_latency"]

Key = TypeVar("Key", bound=Hashable)
_BLOCK = 0.005  # seconds that the fastest call fills at least: a clock tick and a context switch are small beside it
_SECONDS = 3.0  # for all rounds of one batch size
_ROUNDS = (7, 101)  # fewest, most


def alternating(
    calls: Mapping[Key, Callable[[], object]], rounds: int, *, warmup: int = 2, repeats: int = 1
) -> dict[Key, list[float]]:
    """Milliseconds of every call in every round; all of them run in each round, every second time in reverse.

    Args:
        calls: what is timed.
        rounds: >= 1, how many are kept.
        warmup: >= 0, rounds before them that are not.
        repeats: >= 1, calls in a row, of which the mean counts.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> found = alternating({"short": lambda: sum(range(10)), "long": lambda: sum(range(10000))}, 5, repeats=3)
        >>> {name: len(times) for name, times in found.items()}
        {'short': 5, 'long': 5}
    """
    if rounds < 1 or warmup < 0 or repeats < 1:
        raise ValueError(f"alternating(rounds={rounds}, warmup={warmup}, repeats={repeats}): must be >= 1, 0 and 1")
    order = list(calls)
    times: dict[Key, list[float]] = {key: [] for key in order}
    for turn in range(rounds + warmup):
        for key in order if turn % 2 else order[::-1]:
            call, start = calls[key], time.perf_counter()
            for _ in range(repeats):
                call()
            if turn >= warmup:
                times[key].append(1000 * (time.perf_counter() - start) / repeats)
    return times


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One file beside a reference at one batch size.

    Args:
        batch: rows of the input.
        ms: median milliseconds of a run.
        reference_ms: the same for the reference.
        ratio: median over rounds of (ms of the file / ms of the reference in that round).
        quartiles: the middle half of these ratios lies between them.
        at_load_ms: `ms` with weights dequantized once, at load; None if not measured.

    Example:
        >>> Latency(batch=1, ms=3.0, reference_ms=2.0, ratio=1.5, quartiles=(1.4, 1.6)).verdict
        'slower'
    """

    batch: int
    ms: float
    reference_ms: float
    ratio: float
    quartiles: tuple[float, float]
    at_load_ms: float | None = None

    @property
    def verdict(self) -> str:
        """Which is faster, or that the rounds cannot tell."""
        low, high = self.quartiles
        return "slower" if low > 1 else "faster" if high < 1 else "no clear difference"


def onnx_latency(
    file: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    shape: Sequence[int],
    *,
    batches: Sequence[int] = (1, 64),
    threads: int = 1,
    at_load: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> list[Latency]:
    """Time an ONNX file against another of the same network in ONNX Runtime on this machine's CPU.

    Rounds alternate between the files until about three seconds a batch size are spent, 7 rounds at least.

    Args:
        file: what is measured.
        reference: what it is compared with.
        shape: of the input without the batch; normal random numbers are fed.
        batches: rows of the input, each >= 1.
        threads: >= 1, within an operator.
        at_load: also measure the file with `session.disable_quant_qdq`, which dequantizes weights once.
        advance: called after each batch size.

    Raises:
        ValueError: a number out of its range, or a file that ONNX Runtime does not load.
    """
    if threads < 1 or min(batches, default=0) < 1:
        raise ValueError(f"onnx_latency(threads={threads}, batches={tuple(batches)}): must be 1 or more")
    running = {"file": session(os.fspath(file), optimize=True, threads=threads)}
    running["reference"] = session(os.fspath(reference), optimize=True, threads=threads)
    if at_load:
        running["at load"] = session(os.fspath(file), optimize=True, threads=threads, dequantize_at_load=True)
    found = []
    for batch in batches:
        x = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
        calls = {name: partial(one.run, None, {one.get_inputs()[0].name: x}) for name, one in running.items()}
        first = {name: times[0] / 1000 for name, times in alternating(calls, 1).items()}
        repeats = max(1, math.ceil(_BLOCK / min(first.values())))
        rounds = min(max(int(_SECONDS / (repeats * sum(first.values()))), _ROUNDS[0]), _ROUNDS[1])
        times = alternating(calls, rounds, repeats=repeats)
        ratios = [a / b for a, b in zip(times["file"], times["reference"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        numbers = {"ms": medians["file"], "reference_ms": medians["reference"], "at_load_ms": medians.get("at load")}
        found.append(Latency(batch=batch, ratio=middle, quartiles=(low, high), **numbers))
        advance()
    return found
