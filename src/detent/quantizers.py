"""Quantizers of activations: which integers stand for what goes into a layer, and how their scale is found."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from detent.schedules import Moment, check_moment, is_number, is_whole

__all__ = [
    "Integers",
    "LearnedClip",
    "LearnedStep",
    "PerToken",
    "Quantizer",
    "Reshaped",
    "RunningRange",
    "Seen",
    "Sign",
    "from_row",
    "rounded",
    "row_of",
]

_SAMPLE = 1 << 14  # values of a batch that a scale is searched on
_BATCHES = 16  # of which a sample is kept
_SHARES = torch.linspace(1.0, 0.02, 99)  # of the largest magnitude: the ranges that are tried
_OUTLIERS = 1e-3  # share of values on either side that do not decide on the sign
_SMALLEST = 1e-12  # scale


@dataclass(frozen=True, kw_only=True)
class Integers:
    """The integers that stand for an activation, and what one of them is worth.

        x_hat = scale * clamp(round(x / scale), low, high)

    Args:
        scale: the step of the grid, one number, > 0.
        low: the smallest integer, <= 0, so that zero is exact.
        high: the largest.
    """

    scale: Tensor
    low: int
    high: int


@dataclass(kw_only=True)
class Seen:
    """What went into a layer while its inputs were watched: extremes, mean magnitude, and a sample.

    Attributes:
        batches: how many calls.
        low: the smallest value.
        high: the largest value.
        mean: the mean magnitude, of the batches alike.
    """

    batches: int = 0
    low: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    high: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    mean: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    parts: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, *, sample: bool) -> None:
        """Watch one batch; `sample` also keeps some of its values."""
        x = x.detach()
        if not x.numel():
            return
        low, high = (end.float() for end in torch.aminmax(x))
        mean = x.abs().mean(dtype=torch.float32)
        if self.batches:
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
            mean = self.mean + (mean - self.mean) / (self.batches + 1)
        self.low, self.high, self.mean, self.batches = low, high, mean, self.batches + 1
        if sample and len(self.parts) < _BATCHES:
            flat = x.flatten()
            if flat.numel() > _SAMPLE:  # at random: every n-th value would be the border of an image, or one channel
                drawn = torch.randint(flat.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(self.batches))
                flat = flat[drawn.to(flat.device)]
            self.parts.append(flat.float())

    @property
    def sample(self) -> Tensor:
        """The values that were kept."""
        return torch.cat(self.parts)

    @property
    def is_nothing(self) -> bool:
        """Whether all of it was zero."""
        return not self.batches or bool((self.low == 0) & (self.high == 0))

    @property
    def is_finite(self) -> bool:
        """Whether all of it was."""
        return bool(torch.isfinite(self.low) & torch.isfinite(self.high))


class _Round(torch.autograd.Function):
    """Onto the integers, straight through where they reach, with the gradient of the logarithm of the scale.

    The incoming gradient times what each value contributes: `x_hat - x` inside and `x_hat` outside for a learned step,
    `x_hat` outside alone for a learned clip.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, scale: Tensor, low: int, high: int, learns: str) -> Tensor:
        out = rounded(x, Integers(scale=scale, low=low, high=high))
        ctx.save_for_backward(x, out, scale.to(x.dtype))
        ctx.ends, ctx.learns = (low, high), learns
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, out, step = ctx.saved_tensors
        low, high = ctx.ends
        inside = (x >= low * step) & (x <= high * step)
        through = grad * inside
        told = None
        if ctx.needs_input_grad[1]:
            taken = through * (x if ctx.learns == "step" else out)
            told = torch.mul(grad, out).sub_(taken).sum(dtype=torch.float32)
        return through, told, None, None, None, None


class _Through(torch.autograd.Function):
    """Other values, straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None


class _Sign(torch.autograd.Function):
    """The sign, straight through where |x| <= 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


def rounded(x: Tensor, to: Integers) -> Tensor:
    """The nearest of the values that the integers stand for, as a device computes it.

    Example:
        >>> rounded(torch.tensor([0.3, 0.1, 9.0]), Integers(scale=torch.tensor(0.25), low=0, high=15)).tolist()
        [0.25, 0.0, 3.75]
    """
    step = to.scale.to(x.dtype)
    return torch.div(x, step).round_().clamp_(to.low, to.high).mul_(step)


@dataclass(frozen=True, kw_only=True)
class Quantizer(abc.ABC):
    """How the inputs of layers are rounded; final classes say how the scale is found.

    The grid has 2^bits integers, one of which stands for zero exactly: from 0 where nothing negative goes in, else from
    as far below zero as the values reach.

    Args:
        bits: width of the integers, 1 to 16 bits.

    Raises:
        ValueError: another width.

    Example:
        >>> isinstance(LearnedStep(bits=4), Quantizer)
        True
    """

    bits: int

    learns: ClassVar[Literal["no", "step", "clip"]] = "no"  # by the gradient of its scale
    watches: ClassVar[bool] = False  # whether it goes on looking at its inputs
    fewest: ClassVar[int] = 1
    form: ClassVar[Literal["grid", "token", "sign"]] = "grid"  # what it comes to: only a grid has a scale of its own

    @property
    def begins(self) -> bool:
        """Whether it has a scale that is found by looking at inputs."""
        return self.form == "grid"

    def __post_init__(self) -> None:
        if not is_whole(self.bits, self.fewest, 16):
            raise ValueError(
                f"{type(self).__name__}(bits={self.bits!r}): must be a whole number from {self.fewest} to 16"
            )

    @property
    def pace(self) -> float:
        """Largest relative change of a learned scale in a step."""
        return 0.0

    @property
    def until(self) -> Moment | None:
        """When it stops looking at its inputs; `None` if it never does."""
        return None

    def ends(self, seen: Seen) -> tuple[int, int]:
        """The smallest and the largest integer for what was seen."""
        most = 2**self.bits - 1
        tails = torch.quantile(seen.sample, torch.tensor([_OUTLIERS, 1 - _OUTLIERS], device=seen.low.device))
        low, high = (float(end) for end in tails)
        if float(seen.low) >= 0 or low >= 0 or self.bits == 1:
            return 0, most
        below = min(max(round(-low / max(high - low, _SMALLEST) * most), 1), most - 1)
        return -below, most - below

    def start(self, seen: Seen) -> Integers:
        """The grid to begin with: the scale of the least squared error on what was seen."""
        low, high = self.ends(seen)
        x = seen.sample
        reach = float(torch.maximum(seen.high / max(high, 1), -seen.low / max(-low, 1) if low else seen.low * 0))
        scales = (_SHARES.to(x) * max(reach, _SMALLEST)).tolist()

        def error(scale: float) -> float:
            to = Integers(scale=x.new_tensor(scale), low=low, high=high)
            return float((rounded(x, to) - x).square().sum())

        return Integers(scale=x.new_tensor(min(scales, key=error)), low=low, high=high)

    def follow(self, now: Integers, seen: Seen) -> Tensor:
        """The scale after some more batches."""
        return now.scale

    def view(self, x: Tensor, to: Integers | None, log_scale: Tensor | None) -> Tensor:
        """What the layer gets, for training: gradients pass where the integers reach.

        Args:
            x: what goes in.
            to: the grid.
            log_scale: a leaf that receives the gradient of the logarithm of the scale; `None` if nobody learns it.
        """
        assert to is not None
        if not torch.is_grad_enabled() or not (x.requires_grad or (log_scale is not None and self.learns != "no")):
            return rounded(x, to)
        leaf = to.scale if log_scale is None else log_scale
        return _Round.apply(x, leaf, to.scale, to.low, to.high, self.learns)


@dataclass(frozen=True, kw_only=True)
class LearnedStep(Quantizer):
    """The step is learned with the network.

        d x_hat / d scale = round(x / scale) - x / scale inside, low or high outside

    Its logarithm moves by Adam, so that it cannot turn negative and has no unit.

    Args:
        bits: 2 to 16.
        rate: largest relative change of a step while the optimizer's rate is at its highest, in (0, 1); it falls as
            that falls.

    Example:
        >>> LearnedStep(bits=4).learns
        'step'

    Reference: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
    """

    rate: float = 1e-3
    learns: ClassVar[Literal["no", "step", "clip"]] = "step"
    fewest: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.rate) and 0 < self.rate < 1):
            raise ValueError(f"{type(self).__name__}(rate={self.rate!r}): must be a number in (0, 1)")

    @property
    def pace(self) -> float:
        return self.rate


@dataclass(frozen=True, kw_only=True)
class LearnedClip(LearnedStep):
    """The end of the range is learned, from the values beyond it alone.

        x_hat = round(clip(x, 0, alpha) / scale) scale,  scale = alpha / (2^bits - 1);  d x_hat / d alpha = [x > alpha]

    Args:
        bits: 1 to 16.
        rate: as for `LearnedStep`.

    Example:
        >>> LearnedClip(bits=4).learns
        'clip'

    Reference: Choi et al., "PACT: Parameterized Clipping Activation", arXiv 1805.06085.
    """

    learns: ClassVar[Literal["no", "step", "clip"]] = "clip"


@dataclass(frozen=True, kw_only=True)
class RunningRange(Quantizer):
    """The range follows the inputs, and is frozen in time.

        low, high <- (1 - momentum) (low, high) + momentum (min x, max x), scale = range / (2^bits - 1)

    Args:
        bits: 2 to 16.
        momentum: weight of a new batch, in (0, 1].
        freeze: moment after which the range stays, as a share of training or a step.

    Example:
        >>> RunningRange(bits=8).watches
        True

    Reference: Jacob et al., "Quantization and Training of Neural Networks", arXiv 1712.05877.
    """

    momentum: float = 0.01
    freeze: Moment = 0.8
    watches: ClassVar[bool] = True
    fewest: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.momentum) and 0 < self.momentum <= 1):
            raise ValueError(f"{type(self).__name__}(momentum={self.momentum!r}): must be a number in (0, 1]")
        check_moment(self.freeze, f"{type(self).__name__}.freeze")

    @property
    def until(self) -> Moment | None:
        return self.freeze

    def _reach(self, low: int, high: int, seen: Seen) -> Tensor:
        up = seen.high / max(high, 1)
        return torch.maximum(up, -seen.low / -low if low else torch.zeros_like(up)).clamp_min(_SMALLEST)

    def start(self, seen: Seen) -> Integers:
        low, high = self.ends(seen)
        return Integers(scale=self._reach(low, high, seen), low=low, high=high)

    def follow(self, now: Integers, seen: Seen) -> Tensor:
        return now.scale + self.momentum * (self._reach(now.low, now.high, seen) - now.scale)


@dataclass(frozen=True, kw_only=True)
class Reshaped(RunningRange):
    """The inputs are clipped where few of them lie, so that they use the grid evenly.

        x_hat = rounded clip(x, -T, T), T = k mean|x|, a running mean over batches

    Args:
        bits: 2 to 16.
        k: > 0; 2 is the fixed point of uniform values, more clips less.
        momentum: weight of a new batch, in (0, 1].
        freeze: moment after which the range stays.

    Raises:
        ValueError: also a `k` that is not positive.

    Example:
        >>> Reshaped(bits=3, k=3.0).k
        3.0

    Reference: Yu et al., "Low-bit Quantization Needs Good Distribution" (GDRQ), arXiv 1908.01477.
    """

    k: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.k) and self.k > 0):
            raise ValueError(f"Reshaped(k={self.k!r}): must be a number > 0")

    def _reach(self, low: int, high: int, seen: Seen) -> Tensor:
        return (self.k * seen.mean / max(high, -low)).clamp_min(_SMALLEST)


@dataclass(frozen=True, kw_only=True)
class PerToken(Quantizer):
    """Every token has a scale of its own, found as it comes: nothing is learned, watched or kept.

        x_hat = s clamp(round(x / s), -n, n),  s = max|x| / n along the last axis,  n = 2^(bits - 1) - 1

    Args:
        bits: 2 to 16.

    Example:
        >>> PerToken(bits=8).view(torch.tensor([[1.0, 0.1], [10.0, -5.0]]), None, None)[0, 0].item()
        1.0

    Reference: Yao et al., "ZeroQuant", arXiv 2206.01861.
    """

    bits: int = 8
    fewest: ClassVar[int] = 2
    form: ClassVar[Literal["grid", "token", "sign"]] = "token"

    def view(self, x: Tensor, to: Integers | None, log_scale: Tensor | None) -> Tensor:
        most = 2 ** (self.bits - 1) - 1
        scale = x.detach().abs().amax(-1, keepdim=True).div_(most)
        scale = torch.where(scale > 0, scale, 1.0)
        return _Through.apply(x, rounded(x.detach(), Integers(scale=scale, low=-most, high=most)))


@dataclass(frozen=True, kw_only=True)
class Sign(Quantizer):
    """One bit: -1 or 1, with the gradient passed where |x| <= 1.

    Example:
        >>> Sign().view(torch.tensor([-0.2, 0.0, 3.0]), None, None).tolist()
        [-1.0, 1.0, 1.0]

    Reference: Hubara et al., "Binarized Neural Networks", arXiv 1602.02830.
    """

    bits: int = 1
    form: ClassVar[Literal["grid", "token", "sign"]] = "sign"

    def __post_init__(self) -> None:
        if self.bits != 1:
            raise ValueError(f"Sign(bits={self.bits!r}): is 1 bit")

    def view(self, x: Tensor, to: Integers | None, log_scale: Tensor | None) -> Tensor:
        return _Sign.apply(x)


# --- as a file has them -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Fixed(Quantizer):
    """The grid of a file: nothing is found or learned any more."""


def row_of(module: str, quantizer: Quantizer, to: Integers | None, said: str) -> dict[str, Any]:
    """The rounding of one module's inputs as plain data, which says all that a reader needs.

    Args:
        module: its name.
        quantizer: how they are rounded.
        to: the grid, where there is one.
        said: the quantizer in words, for people.
    """
    row: dict[str, Any] = {"module": module, "form": quantizer.form, "bits": quantizer.bits, "said": said}
    return row if to is None else {**row, "scale": float(to.scale), "low": to.low, "high": to.high}


def from_row(row: Any) -> tuple[str, Quantizer, Integers | None]:
    """What `row_of` wrote, checked: the module, how its inputs are rounded, and the grid.

    Raises:
        ValueError: anything else.

    Example:
        >>> from_row({"module": "fc", "form": "sign", "bits": 1, "said": ""})
        ('fc', Sign(bits=1), None)
    """
    wrong = ValueError(f"{row!r} is no rounding of activations")
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("module", "form", "said")):
        raise wrong
    bits, scale, low, high = (row.get(key) for key in ("bits", "scale", "low", "high"))
    kinds: dict[str, tuple[type[Quantizer], int]] = {"grid": (_Fixed, 1), "token": (PerToken, 2), "sign": (Sign, 1)}
    if row["form"] not in kinds or not is_whole(bits, kinds[row["form"]][1], 1 if row["form"] == "sign" else 16):
        raise wrong
    assert isinstance(bits, int)
    quantizer = kinds[row["form"]][0](bits=bits)
    expected = {"module", "form", "bits", "said"} | ({"scale", "low", "high"} if quantizer.begins else set())
    if set(row) != expected:
        raise wrong
    if not quantizer.begins:
        return row["module"], quantizer, None
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in (low, high))
    if not (whole and isinstance(scale, float) and is_number(scale) and 0 < scale < math.inf):
        raise wrong
    assert isinstance(low, int) and isinstance(high, int)
    if not (low <= 0 <= high and 0 < high - low < 2**bits) or not float(torch.tensor(scale)) > 0:
        raise wrong
    return row["module"], quantizer, Integers(scale=torch.tensor(scale), low=low, high=high)
