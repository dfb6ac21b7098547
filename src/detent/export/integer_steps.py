"""The steps of a network in integers, and a model that runs them exactly in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IntegerModel", "Step"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One integer operation.

    Args:
        op: "input", "conv", "linear", "scale", "add", "average", "max", "pad", "clamp" or "flatten".
        name: of its result, the node of the traced model.
        inputs: names of the results it reads.
        numbers: its integers, by the names that docs/export.md uses: whole numbers, tuples of them, int64 arrays.
        scale: what one unit of its result is worth; not needed to compute.
        zero: the integer that stands for 0.

    Example:
        >>> Step(op="clamp", name="relu", inputs=("conv",), numbers={"low": 128, "high": 255}, scale=0.1, zero=128).op
        'clamp'
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    numbers: Mapping[str, Any]
    scale: float
    zero: int


class IntegerModel:
    """A network in integers; made by `to_integer`. It runs on the CPU, and moves there what it is given.

    Attributes:
        steps: the program, in order; the first is the input, the last the output.

    Example:
        >>> import detent as dt
        >>> from torch import nn
        >>> from detent.export import to_integer
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))]))
        >>> x = torch.randn(64, 4)
        >>> integers = to_integer(run, [x])
        >>> [step.op for step in integers.steps]
        ['input', 'linear', 'linear']
        >>> bool((integers(x) - model.eval()(x)).abs().max() < 0.05)
        True
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and shifts (one each), multipliers (four) and offsets (eight)."""
        return sum(
            value.size * {"multiplier": 4, "offset": 8}.get(key, 1)
            for step in self.steps
            for key, value in step.numbers.items()
            if isinstance(value, np.ndarray)
        )

    def quantize(self, x: Tensor) -> Tensor:
        """The input's integers: `clamp(rint(x / scale) + zero, low, high)`, divided in float32.

        Raises:
            ValueError: another number of axes than the calibration had.
        """
        step = self.steps[0]
        if x.dim() != len(step.numbers["shape"]) + 1:
            raise ValueError(f"x has shape {tuple(x.shape)}; calibration had a batch of {step.numbers['shape']}")
        q = torch.round(x.detach().cpu().float() / torch.tensor(step.scale, dtype=torch.float32)).double() + step.zero
        return q.clamp_(step.numbers["low"], step.numbers["high"]).to(torch.int64)

    @torch.no_grad()
    def integers(self, q: Tensor) -> Tensor:
        """The output's integers for the input's integers: no floating-point number takes part but as an exact integer.

        Args:
            q: int64, from `quantize`.
        """
        values = {self.steps[0].name: q.cpu()}
        for step in self.steps[1:]:
            values[step.name] = _STEPS[step.op](step.numbers, *(values[name] for name in step.inputs))
        return values[self.steps[-1].name]

    def __call__(self, x: Tensor) -> Tensor:
        """The output as real numbers: `scale * (q - zero)` of the last step."""
        last = self.steps[-1]
        return ((self.integers(self.quantize(x)) - last.zero).double() * last.scale).float()


# --- what the steps compute ---------------------------------------------------------------------------------------


def _rescaled(acc: Tensor, numbers: Mapping[str, Any]) -> Tensor:
    """`clamp((acc * multiplier + offset) >> shift, low, high)`, by channel (axis 1)."""
    shape = (-1,) + (1,) * (acc.dim() - 2)
    m, c, n = (torch.as_tensor(numbers[key]).reshape(shape) for key in ("multiplier", "offset", "shift"))
    # An arithmetic shift to the right is a division rounded down.
    return ((acc * m + c) >> n).clamp_(numbers["low"], numbers["high"])


def _conv(numbers: Mapping[str, Any], q: Tensor) -> Tensor:
    # Sums of products of integers below 2^53 are exact in float64 in whatever order they are added.
    conv = F.conv1d if q.dim() == 3 else F.conv2d
    weight = torch.as_tensor(numbers["weight"]).double()
    options = {key: numbers[key] for key in ("stride", "padding", "dilation", "groups")}
    return _rescaled(conv((q - numbers["zero_in"]).double(), weight, **options).to(torch.int64), numbers)


def _linear(numbers: Mapping[str, Any], q: Tensor) -> Tensor:
    weight = torch.as_tensor(numbers["weight"]).double()
    return _rescaled(F.linear((q - numbers["zero_in"]).double(), weight).to(torch.int64), numbers)


def _scale(numbers: Mapping[str, Any], q: Tensor) -> Tensor:
    return _rescaled(q - numbers["zero_in"], numbers)


def _add(numbers: Mapping[str, Any], a: Tensor, b: Tensor) -> Tensor:
    n = numbers["shift"]
    first, second = numbers["multipliers"]
    total = (a - numbers["zeros_in"][0]) * first + (b - numbers["zeros_in"][1]) * second
    return (((total + (1 << (n - 1))) >> n) + numbers["zero"]).clamp_(numbers["low"], numbers["high"])


def _average(numbers: Mapping[str, Any], q: Tensor) -> Tensor:
    size, stride, padding = (numbers[key] for key in ("kernel", "stride", "padding"))
    pool = F.avg_pool1d if q.dim() == 3 else F.avg_pool2d
    # The average times its count: rounding takes away what the division left.
    mean = pool((q - numbers["zero_in"]).double(), size, stride, padding)
    found = _rescaled((mean * math.prod(size)).round().to(torch.int64), numbers)
    return found.flatten(1) if numbers["flat"] else found


def _max(numbers: Mapping[str, Any], q: Tensor) -> Tensor:
    pool = F.max_pool1d if q.dim() == 3 else F.max_pool2d
    options = {key: numbers[key] for key in ("stride", "padding", "dilation")}
    return pool(q.double(), numbers["kernel"], ceil_mode=numbers["ceil"], **options).to(torch.int64)


def _pad(numbers: Mapping[str, Any], q: Tensor) -> Tensor:
    sides = [side for axis in reversed(numbers["sides"]) for side in axis]
    if numbers["mode"] == "constant":
        return F.pad(q, sides, value=numbers["value"])
    return F.pad(q.double(), sides[:-2], mode=numbers["mode"]).to(torch.int64)


def _clamp(numbers: Mapping[str, Any], q: Tensor) -> Tensor:
    return q.clamp(numbers["low"], numbers["high"])


def _flatten(numbers: Mapping[str, Any], q: Tensor) -> Tensor:
    return q.flatten(1)


_STEPS: dict[str, Any] = {
    "conv": _conv,
    "linear": _linear,
    "scale": _scale,
    "add": _add,
    "average": _average,
    "max": _max,
    "pad": _pad,
    "clamp": _clamp,
    "flatten": _flatten,
}
