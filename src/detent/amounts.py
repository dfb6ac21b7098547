"""Budgets: how many bytes a number, a size in words, a ratio or bits a weight are."""

from __future__ import annotations

import re
from typing import TypeAlias

from torch import nn

from detent.schedules import is_whole

__all__ = ["Budget", "budget_bytes"]

Budget: TypeAlias = int | str

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_NUMBER = r"(\d{1,15}(?:,\d{3}){0,5}(?:\.\d{1,12})?)"


def budget_bytes(budget: Budget, model: nn.Module, who: str) -> int:
    """Bytes that a budget allows a file of a model, rounded down.

    Args:
        budget: a number of bytes; "84 kB" and "1.5 MB" in powers of ten, "84 KiB" in powers of two; "20x" smaller than
            parameters and buffers are in memory; "3.2 bits" for each parameter.
        model: what ratios and bits refer to.
        who: the function that was called, for the error.

    Raises:
        ValueError: anything else, or less than one byte.

    Example:
        >>> net = nn.Linear(100, 10, bias=False)
        >>> [budget_bytes(b, net, "save") for b in (500, "2 kB", "2KiB", "16,000 bytes", "10x", "2.5 bits")]
        [500, 2000, 2048, 16000, 400, 312]
    """
    found = _parsed(budget, model)
    if found is None or found < 1:
        ways = 'a number of bytes >= 1, "84 kB", "84 KiB", "20x" or "3.2 bits"'
        raise ValueError(f"{who}(budget={budget!r}): must be {ways}")
    return found


def _parsed(budget: Budget, model: nn.Module) -> int | None:
    if not isinstance(budget, str):
        return int(budget) if is_whole(budget) else None
    text = budget.strip()
    if match := re.fullmatch(rf"{_NUMBER}\s*(k|M|G|Ki|Mi|Gi|)(?:B|bytes?)?", text):
        return int(_float(match[1]) * _UNITS[match[2]])
    if match := re.fullmatch(rf"{_NUMBER}\s*x", text):
        held = {id(t): t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers())}
        ratio = _float(match[1])
        return int(sum(held.values()) / ratio) if ratio > 0 else None
    if match := re.fullmatch(rf"{_NUMBER}\s*bits?(?: a weight)?", text):
        return int(_float(match[1]) * sum(p.numel() for p in model.parameters()) / 8)
    return None


def _float(text: str) -> float:
    return float(text.replace(",", ""))
