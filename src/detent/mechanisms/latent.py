"""Mechanisms with hidden real weights: the optimizer moves a latent, the forward pass sees its image."""

from __future__ import annotations

import abc
import functools
import math
import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.grouping import GranularityLike, Layout, granularity_of
from detent.mechanisms.base import Cadence, Clock, Mechanism, Slot
from detent.mechanisms.maps import (
    MirrorMap,
    SoftmaxMap,
    TanhMap,
    checked,
    piecewise_affine,
    piecewise_affine_grid,
)
from detent.pieces import in_pieces
from detent.schedules import (
    Exponential,
    Moment,
    Number,
    Schedule,
    Sigmoid,
    ends_of,
    is_finite,
    is_number,
    is_whole,
    step_at,
    value_at,
)
from detent.targets import Params, Target
from detent.targets.base import Lines, compute_dtype

__all__ = ["PARQ", "PMF", "STE", "BinaryRelax", "GDTanh", "MirrorDescent"]

_TO_HARD = Exponential(first=1.0, last=1e4)
_TO_JUMPS = Sigmoid(first=1.0, last=0.0)
_FARTHEST = 1e30  # units from zero: no map can tell a latent further out from its end
# What a map is asked for: beyond it beta times a gap, or a latent found for a weight, leaves float32.
_GENTLEST, _SHARPEST = 1e-25, 1e35
_STEEPEST = 1e15  # of a gradient: an optimizer may still square and sum it in float32
_INSIDE = 0.95  # share of the range that an inverse keeps to, as the weights beyond have no latent


@functools.lru_cache(maxsize=256)
def level_count(target: Target) -> int | None:
    """How many levels each weight of a target chooses among by itself, or `None` where there is no such list."""
    if type(target).levels is Target.levels or target.scope != "element":
        return None
    for shape in ((16, 16), (256,), (16, 16, 3, 3)):
        layout = Layout(shape=shape)
        if target.accepts(shape, torch.float32, layout) is None:
            levels = target.levels(target.fit(torch.linspace(-1, 1, math.prod(shape)).reshape(shape), layout))
            return None if levels is None else levels.shape[-1]
    return None


def levels_of(slot: Slot, like: Tensor, params: Params) -> Tensor:
    """The levels of a weight in the dtype of `like`, against what the params hold for.

    Raises:
        ValueError: the target lists none.
    """
    levels = slot.target.levels(params)
    if levels is None:
        raise ValueError(f"{slot.name!r}: {slot.target!r} lists no levels for these weights")
    return levels.to(like)


def _needs_levels(who: Mechanism, target: Target, instead: str) -> str | None:
    count, name = level_count(target), type(target).__name__
    if count is None:
        return f"{type(who).__name__} lets each weight choose among listed levels, and {name} has none; {instead}"
    if count < 2:
        return f"{type(who).__name__} needs two levels at least, and {name} has one; {instead}"
    return None


@dataclass(frozen=True, kw_only=True)
class _Latent(Mechanism):
    """What all of them share: before the step the weight is the latent, after it the image of the latent."""

    start: Moment = 0
    clip_latent: float | None = None

    keeps_full_life: ClassVar[bool] = False
    memory: ClassVar[tuple[str, ...]] = ("latent",)
    moves: ClassVar[str | None] = "latent"

    def __post_init__(self) -> None:
        if self.clip_latent is not None and not (is_finite(self.clip_latent) and self.clip_latent > 0):
            raise ValueError(
                f"{type(self).__name__}(clip_latent={self.clip_latent!r}): must be a finite number > 0 or None"
            )
        super().__post_init__()

    @abc.abstractmethod
    def _see(self, slot: Slot, latent: Tensor, step: int, total_steps: int | None, out: Tensor) -> None:
        """Write what the forward pass of a step sees of a latent."""

    def _seen(self, slot: Slot, latent: Tensor, step: int, total_steps: int | None) -> Tensor:
        """The same, as a new tensor."""
        out = torch.empty_like(latent)
        self._see(slot, latent, step, total_steps, out)
        return out

    def _first_latent(self, slot: Slot, clock: Clock, step: int) -> Tensor:
        """The latent of weights that had none, as the forward pass of a step is to see it first."""
        return slot.weight.clone()

    def _bend(self, slot: Slot, clock: Clock) -> None:
        """Change the gradient on its way to the latent."""

    def active(self, clock: Clock) -> bool:
        return clock.step >= self._first(clock)

    def cadence(self, target: Target) -> Cadence:
        return Cadence(at=self._needs_fit)

    def _needs_fit(self, clock: Clock) -> bool:
        """Where it starts, and in the last step, so that what training leaves is nearest to the last latents."""
        last = clock.total_steps is not None and clock.step == clock.total_steps - 1
        return last or clock.step == self._first(clock)

    def _first(self, clock: Clock) -> int:
        return step_at(self.start, clock.total_steps, f"{type(self).__name__}.start")

    def open(self, slot: Slot, clock: Clock) -> None:
        if self.active(clock):
            self._begin(slot, clock, clock.step)
            self._show(slot, clock, clock.step)

    def _begin(self, slot: Slot, clock: Clock, step: int) -> None:
        first = self._first_latent(slot, clock, step)
        slot.state["latent"] = first.to(compute_dtype(first.dtype))

    def before_step(self, slot: Slot, clock: Clock) -> None:
        if "latent" in slot.state:
            if slot.grad is not None:
                self._bend(slot, clock)
            slot.weight.copy_(slot.state["latent"])

    def after_step(self, slot: Slot, clock: Clock) -> None:
        if "taken" not in slot.scratch:  # else broken off after that: the weight may be the image already
            if "latent" in slot.state:
                slot.state["latent"].copy_(slot.weight)
            else:
                self._begin(slot, clock, clock.step + 1)
            slot.scratch["taken"] = slot.state["latent"]
        slot.state["latent"] = slot.scratch["taken"]
        self._show(slot, clock, clock.step + 1)

    def undo(self, slot: Slot, clock: Clock) -> None:
        if "latent" in slot.state:
            self._show(slot, clock, clock.step)

    def _show(self, slot: Slot, clock: Clock, step: int) -> None:
        latent = slot.state["latent"]
        if self.clip_latent is not None:
            latent.clamp_(-self.clip_latent, self.clip_latent)
        # Rounded first: the compressed life is that of the rounded latent, and the forward pass must see the same.
        self._see(slot, latent.to(slot.seen.dtype), step, clock.total_steps, slot.seen)

    def _never(self, clock: Clock) -> bool:
        """Whether it does not begin in this training."""
        return clock.total_steps is not None and self._first(clock) >= clock.total_steps

    def _settled(self, field: str, clock: Clock) -> tuple[int, str] | None:
        """When the schedule that hardens the weights has come to its last value, as `mapping` says it.

        One that goes on beyond training is nothing to refuse: it is meant, and harder than this it does not get.
        """
        value = getattr(self, field)
        end = value.settles(clock.total_steps) if isinstance(value, Schedule) else None
        if end is None:
            return None
        last = end if clock.total_steps is None else min(end, clock.total_steps)
        return last, f"the end of {type(self).__name__}.{field}"


@dataclass(frozen=True, kw_only=True)
class STE(_Latent):
    """Straight-through estimator: forward and backward at `project(latent)`, the gradient moves the latent as it is.

        w = project(a),    a <- a - lr * dL/dw

    The full life of the checkpoint is what the forward pass last saw, that is the compressed one; the latent is
    training state and rides with the optimizer's.

    With `noise` below 1 it is Quant-Noise: in each step a random share of the blocks is seen projected and the rest as
    the latent is, so that most gradients are exact. The forward pass after the last step sees the latent, so that the
    full life of the result is a network of its own; before that, `with run.latents():` shows it.

        w = project(a) in a share p of the blocks, a elsewhere

    Args:
        noise: share p of the blocks that are seen projected, in [0, 1], or a schedule: 1 is the plain straight-through
            estimator, 0 the base optimizer. 0.05 to 0.2 for codebooks, 0.5 for 8 bits.
        block: neighbouring inputs of a channel that are seen alike, >= 1 (8 for linear layers on codebooks); "kernel":
            all positions of a convolution's kernel.
        start: moment the projection starts; before it the base optimizer runs untouched.
        clip_latent: after each step the latent is clamped to [-clip_latent, clip_latent], as BinaryConnect does with 1;
            > 0, or `None` for no limit.

    Raises:
        ValueError: a limit that is not positive, a share outside [0, 1], a block that is no size.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.STE())])
        >>> run = dt.attach(model, optimizer, recipe)
        >>> len(model.weight.unique()) <= 3
        True

    Reference: Courbariaux et al., "BinaryConnect", arXiv 1511.00363; Bengio et al., arXiv 1308.3432. Noise: Fan et al.,
    "Training with Quantization Noise for Extreme Model Compression", arXiv 2004.07320.
    """

    noise: Number = 1.0
    block: int | Literal["kernel"] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(is_number(end) and 0 <= end <= 1 for end in ends_of(self.noise)):
            raise ValueError(f"STE(noise={self.noise!r}): must lie in [0, 1]")
        if self.block != "kernel" and not is_whole(self.block):
            raise ValueError(f'STE(block={self.block!r}): must be a whole number >= 1, or "kernel"')

    def _see(self, slot: Slot, latent: Tensor, step: int, total_steps: int | None, out: Tensor) -> None:
        share = value_at(self.noise, step, total_steps)
        if share >= 1:
            slot.project_into(latent, out)
        elif share <= 0 or step == total_steps:
            out.copy_(latent)
        else:
            slot.project_into(latent, out)
            torch.where(self._noised(slot, share, step).to(latent.device), out, latent, out=out)

    def _noised(self, slot: Slot, share: float, step: int) -> Tensor:
        """Which weights held here are seen projected: the same however often it is asked, and on every process."""
        layout = slot.params.layout
        size = layout.kernel if self.block == "kernel" else self.block
        fan_in = layout.numel // max(layout.channels, 1)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{slot.name}:{step}".encode()))
        drawn = torch.rand(layout.channels, -(-fan_in // size), generator=generator) < share
        mask = drawn.repeat_interleave(size, 1)[:, :fan_in]
        whole = layout.whole().from_channels(mask)
        return whole if layout.rows is None else whole[slice(*layout.rows)]


@dataclass(frozen=True, kw_only=True)
class PARQ(_Latent):
    """Piecewise-affine proximal relaxation: the forward pass sees steps whose slopes steepen until they are jumps.

        w = clamp(m + (a - m) / s, q, q')  between neighbouring levels q, q' of middle m,    a <- a - lr * dL/dw

    With s = 1 a latent inside the range is seen as it is, with s = 0 this is STE. A latent beyond the outermost level
    is seen on that level from `start` on.

    Args:
        inverse_slope: s, in [0, 1], by schedule from 1 to 0.
        start: moment it starts; before it the base optimizer runs untouched.
        clip_latent: after each step the latent is clamped to [-clip_latent, clip_latent]; `None` for no limit.

    Raises:
        ValueError: an inverse slope outside [0, 1].

    Example:
        >>> import detent as dt
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.PARQ())

    Reference: Jin et al., "PARQ: Piecewise-Affine Regularized Quantization", arXiv 2503.15748.
    """

    inverse_slope: Number = _TO_JUMPS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(is_number(end) and 0 <= end <= 1 for end in ends_of(self.inverse_slope)):
            raise ValueError(f"PARQ(inverse_slope={self.inverse_slope!r}): must lie in [0, 1]")

    def check(self, target: Target) -> str | None:
        return _needs_levels(self, target, "use BinaryRelax")

    def mapping(self, target: Target, clock: Clock) -> tuple[int, str] | None:
        return None if self._never(clock) else self._settled("inverse_slope", clock)

    def _see(self, slot: Slot, latent: Tensor, step: int, total_steps: int | None, out: Tensor) -> None:
        inverse_slope = value_at(self.inverse_slope, step, total_steps)
        if inverse_slope <= 0:
            slot.project_into(latent, out)
            return
        wide = latent.to(compute_dtype(latent.dtype))
        lined = Lines.of(slot.target, slot.params, wide, out)
        x, out = lined.tensors
        spacing, count = slot.target.spacing(lined.params), level_count(slot.target)
        if spacing is None or count is None:
            levels = levels_of(slot, x, lined.params)
            in_pieces(lambda a, q: piecewise_affine(a, q, inverse_slope), x, levels, out=out)
        else:
            for a, seen, h in lined.cut(spacing.to(x)):
                found = piecewise_affine_grid(a, h, count, inverse_slope, seen if seen.dtype == a.dtype else None)
                if found is not seen:
                    seen.copy_(found)


@dataclass(frozen=True, kw_only=True)
class _Annealed(_Latent):
    """A latent seen through something that hardens with beta."""

    beta: Number = _TO_HARD
    hard_start: Moment | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(is_number(end) and end > 0 for end in ends_of(self.beta)):
            must = "must be a number or a schedule, > 0, and a float must hold it"
            raise ValueError(f"{type(self).__name__}(beta={self.beta!r}): {must}")

    def mapping(self, target: Target, clock: Clock) -> tuple[int, str] | None:
        if self._never(clock):
            return None
        if self.hard_start is None:
            return self._settled("beta", clock)
        name = type(self).__name__
        at = step_at(self.hard_start, clock.total_steps, f"{name}.hard_start")
        return at, f"the hard limit of {name}(hard_start={self.hard_start})"

    def beta_at(self, step: int, total_steps: int | None) -> float:
        """Beta of the forward pass of a step; `inf` from `hard_start` on.

        Raises:
            ValueError: a schedule that gives no positive number.
        """
        name = type(self).__name__
        if self.hard_start is not None and step >= step_at(self.hard_start, total_steps, f"{name}.hard_start"):
            return math.inf
        beta = value_at(self.beta, step, total_steps)
        if not beta > 0:
            raise ValueError(f"{name}.beta is {beta} at step {step}: must be > 0")
        return beta

    def _see(self, slot: Slot, latent: Tensor, step: int, total_steps: int | None, out: Tensor) -> None:
        beta = self.beta_at(step, total_steps)
        if math.isinf(beta):
            slot.project_into(latent, out)
        else:
            self._softly(slot, latent, beta, out)

    def _softly(self, slot: Slot, latent: Tensor, beta: float, out: Tensor) -> None:
        """Write what is seen at a finite beta."""
        slot.relax_into(latent, beta, out)


@dataclass(frozen=True, kw_only=True)
class BinaryRelax(_Annealed):
    """The forward pass sees a mean of latent and projection that leans to the projection: works for any target.

        w = (a + beta project(a)) / (1 + beta),    a <- a - lr * dL/dw

    Args:
        beta: sharpness, > 0, by schedule.
        hard_start: moment from which the projection itself is seen (the paper's second phase); `None` for never.
        start: moment it starts; before it the base optimizer runs untouched.
        clip_latent: after each step the latent is clamped to [-clip_latent, clip_latent]; `None` for no limit.

    Raises:
        ValueError: a beta that is not positive.

    Example:
        >>> import detent as dt
        >>> rule = dt.Rule(match="weight", target=dt.TopK(keep=0.1), mechanism=dt.BinaryRelax(hard_start=0.8))

    Reference: Yin et al., "BinaryRelax", arXiv 1801.06313, algorithm 1.
    """


@dataclass(frozen=True, kw_only=True)
class _Mapped(_Annealed):
    """A latent seen through a mirror map."""

    units: Literal["cell", "weight"] = "cell"
    scale_aware: GranularityLike | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units not in ("cell", "weight"):
            raise ValueError(f'{type(self).__name__}(units={self.units!r}): must be "cell" or "weight"')
        if self.scale_aware is not None:
            granularity_of(self.scale_aware, f"{type(self).__name__}.scale_aware")

    @property
    def _mirror(self) -> MirrorMap:
        """The map."""
        return TanhMap()

    def check(self, target: Target) -> str | None:
        return _needs_levels(self, target, "use BinaryRelax")

    def _lines(self, slot: Slot, *tensors: Tensor) -> Lines:
        """Latents, and tensors like them, to be worked on in pieces."""
        if self.scale_aware is None:
            return Lines.of(slot.target, slot.params, *tensors)
        return Lines(params=slot.params, tensors=tensors, apart=False)  # other groups than those of the target

    def _frame(self, slot: Slot, params: Params, x: Tensor, beta: float) -> _Frame:
        """What a map works in; x is what the params hold for."""
        beta = min(max(beta, _GENTLEST), _SHARPEST)
        spacing, count = slot.target.spacing(params), level_count(slot.target)
        levels = scaled = None
        if self.units == "cell" and spacing is not None and count is not None:
            # Whole numbers, the same for all groups: a level is its number times the unit to the last bit.
            back = spacing.to(x) / 2
            scaled = torch.arange(1 - count, count, 2, dtype=x.dtype, device=x.device)
        else:
            levels = levels_of(slot, x, params)
            back = torch.ones_like(levels[..., 0])
            if self.units == "cell":
                back = (levels[..., -1] - levels[..., 0]) / (2 * (levels.shape[-1] - 1))
        unit = torch.where(back > 0, back, 1.0)  # a dead group has one level many times over
        if levels is not None:
            scaled, back = levels / unit.unsqueeze(-1), unit
        assert scaled is not None
        if self.scale_aware is None:
            return _Frame(scaled=scaled, levels=levels, unit=unit, back=back, beta=beta)
        wider = (beta * unit / self._size(slot, x)).clamp(_GENTLEST, _SHARPEST)
        return _Frame(scaled=scaled, levels=levels, unit=unit, back=back, beta=wider)

    def _size(self, slot: Slot, x: Tensor) -> Tensor:
        """Root mean square of the latents of a group."""
        assert self.scale_aware is not None
        groups, layout = granularity_of(self.scale_aware), slot.params.layout
        whole = slot.gather(x).double()
        count = groups.sum(torch.ones_like(whole), layout.whole())
        size = (groups.sum(whole.square(), layout.whole()) / count).sqrt()
        return groups.expand(torch.where(size > 0, size, 1.0).to(x), layout)

    def _softly(self, slot: Slot, latent: Tensor, beta: float, out: Tensor) -> None:
        lined = self._lines(slot, latent.to(compute_dtype(latent.dtype)), out)
        x, out = lined.tensors
        frame = self._frame(slot, lined.params, x, beta)
        apart = frame.levels is not None

        def act(a: Tensor, q: Tensor, unit: Tensor, back: Tensor, beta: float | Tensor) -> Tensor:
            scaled = q / unit.unsqueeze(-1) if apart else q
            seen = self._mirror.forward((a / unit).clamp_(-_FARTHEST, _FARTHEST), scaled, beta)
            w = seen * back
            # What the map has brought to a level is that level to the last bit, not the level there and back in units.
            for level, at in zip(q.unbind(-1), scaled.unbind(-1), strict=True) if apart else ():
                there = (seen == at).to(w.dtype)
                w = w * (1 - there) + level * there
            return w

        levels = frame.scaled if frame.levels is None else frame.levels
        in_pieces(act, x, levels, frame.unit, frame.back, frame.beta, out=out)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What a map works in: numbers of units.

    Attributes:
        scaled: the levels in units.
        levels: the levels, where they are not `scaled * back` to the last bit.
        unit: what weights are divided by, > 0.
        back: what is multiplied with to come back; 0 for groups whose only level is 0.
        beta: sharpness in units.
    """

    scaled: Tensor
    levels: Tensor | None
    unit: Tensor
    back: Tensor
    beta: float | Tensor


_NAMED: dict[str, MirrorMap] = {"tanh": TanhMap(), "softmax": SoftmaxMap()}


@dataclass(frozen=True, kw_only=True)
class MirrorDescent(_Mapped):
    """Mirror descent: the base optimizer moves dual weights, the forward pass sees them through a map that hardens.

        w = P_beta(a),    a <- a - lr * dL/dw  (or whatever the base optimizer makes of dL/dw)

    With `Phi = integral of P^-1` this is `w_new = argmin <lr g, w> + D_Phi(w, w_old)` at constant beta. The compressed
    life is `project(a)`, which P tends to as beta grows. The gradient is taken at w and moves a as it is.

    The dual form keeps a. The primal form keeps only w, and steps by `P(P^-1(w) - lr g)`: when beta changes it does not
    sharpen, its later steps only grow. In float32 it freezes near `|beta a| = 8.3` (in units of the cell), where w
    rounds to its level: from there no step moves it. It exists for study, for two levels only; in half
    precision small steps are lost in rounding w.

    Args:
        map: "tanh", "softmax", any `MirrorMap` object that `check_map` passes, or "relax" for `target.relax`, which is
            no mirror map but works for targets that list no levels (sparse sets, codebooks).
        form: "dual" or "primal".
        beta: sharpness, > 0, by schedule; of the order of 1e4 at the end.
        units: what beta is measured in. "cell": latent and levels are divided by half the mean gap of neighbouring
            levels, so that beta means the same for every target and scale; "weight": as published, for {-1, 1} the same
            and for the ternary tanh half as large a number.
        scale_aware: divide the latent by its root mean square ("tensor", "channel" or `Group`), so that layers with
            small weights harden as early as the others; `None` for no.
        init: "weights": the weights at the start are the latent; "inverse": they are what the first forward pass sees,
            `a = P^-1(w)`, clipped to 95 % of the range of the levels (for pretrained weights).
        hard_start: moment from which `project(a)` itself is seen, as in STE; `None` for never.
        start: moment it starts; before it the base optimizer runs untouched.
        clip_latent: after each step the latent is clamped to [-clip_latent, clip_latent]; `None` for no limit.

    Raises:
        ValueError: an unknown map, form or unit, a beta that is not positive, a map that fails the conditions, options
            that exclude each other.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.MirrorDescent(map="softmax"))
        >>> run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=50)
        >>> for _ in range(50):
        ...     loss = model(torch.randn(16, 8)).square().mean()
        ...     optimizer.zero_grad(); loss.backward(); _ = optimizer.step()
        >>> run.finalize()
        >>> len(model.weight.unique()) <= 3
        True

    Reference: Ajanthan et al., "Mirror Descent View for Neural Network Quantization", arXiv 1910.08237, algorithm 1.
    """

    map: Literal["tanh", "softmax", "relax"] | MirrorMap = "tanh"
    form: Literal["dual", "primal"] = "dual"
    init: Literal["weights", "inverse"] = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.map, MirrorMap):
            checked(self.map)
        elif self.map not in (*_NAMED, "relax"):
            given = self.map.__name__ if isinstance(self.map, type) else repr(self.map)
            hint = f": {given}(...), not the class" if isinstance(self.map, type) else ""
            raise ValueError(f'MirrorDescent(map={given}): must be "tanh", "softmax", "relax" or a MirrorMap{hint}')
        if self.form not in ("dual", "primal"):
            raise ValueError(f'MirrorDescent(form={self.form!r}): must be "dual" or "primal"')
        if self.init not in ("weights", "inverse"):
            raise ValueError(f'MirrorDescent(init={self.init!r}): must be "weights" or "inverse"')
        inverts = "form='primal'" if self.form == "primal" else "init='inverse'" if self.init == "inverse" else ""
        if inverts and self.map == "relax":
            raise ValueError(f"MirrorDescent({inverts}, map='relax'): relax has no inverse; use a mirror map")
        if inverts and self.scale_aware is not None:
            raise ValueError(
                f"MirrorDescent({inverts}, scale_aware={self.scale_aware!r}): the size of the latent is not known "
                "before the latent; leave one of them out"
            )
        if self.form == "primal" and (self.init, self.hard_start, self.clip_latent) != ("weights", None, None):
            raise ValueError("MirrorDescent(form='primal'): init, hard_start and clip_latent belong to the dual form")

    @property
    def _mirror(self) -> MirrorMap:
        return self.map if isinstance(self.map, MirrorMap) else _NAMED[self.map]

    def cadence(self, target: Target) -> Cadence:
        # The primal form inverts with the levels it was seen with; they must not move in between.
        return Cadence(until=0, at=self._is_raw) if self.form == "primal" else super().cadence(target)

    def check(self, target: Target) -> str | None:
        if self.map == "relax":
            return None
        reason = _needs_levels(self, target, "use map='relax'")
        count = level_count(target)
        if reason is None and self.form == "primal" and count is not None and count > 2:
            return (
                f"the primal form of MirrorDescent keeps no latent, and at the inner levels of {type(target).__name__} "
                "a weight forgets it by rounding; use form='dual'"
            )
        return reason

    def _softly(self, slot: Slot, latent: Tensor, beta: float, out: Tensor) -> None:
        if self.map == "relax":
            slot.relax_into(latent, beta, out)
        else:
            super()._softly(slot, latent, beta, out)

    def _unseen(self, slot: Slot, w: Tensor, beta: float, share: float) -> Tensor:
        """The latent of weights, those outside a share of the range moved inside."""
        x = w.to(compute_dtype(w.dtype))
        frame = self._frame(slot, slot.params, x, beta)
        scaled = frame.scaled
        margin = (scaled[..., -1] - scaled[..., 0]) * (1 - share) / 2
        inside = torch.minimum(torch.maximum(x / frame.unit, scaled[..., 0] + margin), scaled[..., -1] - margin)
        most = min(torch.finfo(w.dtype).max, _FARTHEST)
        return (self._mirror.inverse(inside, scaled, frame.beta) * frame.back).clamp(-most, most).to(w.dtype)

    def _first_latent(self, slot: Slot, clock: Clock, step: int) -> Tensor:
        beta = self.beta_at(step, clock.total_steps)
        if self.init == "weights" or math.isinf(beta):
            return super()._first_latent(slot, clock, step)
        return self._unseen(slot, slot.weight, beta, _INSIDE)

    # --- the primal form ------------------------------------------------------------------------------------------

    def _is_raw(self, clock: Clock) -> bool:
        """Whether the weights of this step have not been through the map yet, as it starts only now."""
        return 0 < clock.step == step_at(self.start, clock.total_steps, "MirrorDescent.start")

    def open(self, slot: Slot, clock: Clock) -> None:
        if self.form == "dual":
            super().open(slot, clock)
        elif self.active(clock) and not self._is_raw(clock):
            slot.weight.copy_(self._seen(slot, slot.weight, clock.step, clock.total_steps))

    def before_step(self, slot: Slot, clock: Clock) -> None:
        if self.form == "dual":
            super().before_step(slot, clock)
        elif not self._is_raw(clock):
            slot.scratch["seen"] = slot.weight.clone()
            beta = self.beta_at(clock.step, clock.total_steps)
            nearly = 1 - torch.finfo(slot.weight.dtype).eps
            slot.weight.copy_(self._unseen(slot, slot.weight, beta, nearly))
            slot.scratch["dual"] = slot.weight.clone()

    def after_step(self, slot: Slot, clock: Clock) -> None:
        if self.form == "dual":
            super().after_step(slot, clock)
            return
        slot.write_once("image", slot.weight, lambda: self._moved(slot, clock))

    def _moved(self, slot: Slot, clock: Clock) -> Tensor:
        """What is seen of the latent that the optimizer has moved."""
        moved = self._seen(slot, slot.weight, clock.step, clock.total_steps)
        if "seen" not in slot.scratch:
            return moved
        seen = slot.scratch["seen"]
        levels = levels_of(slot, seen, slot.params)
        # A rounding away from its level a weight has no latent to come back from: whether the tanh at hand rounds
        # up to the level or not, it stays.
        middle, half = (levels[..., -1] + levels[..., 0]) / 2, (levels[..., -1] - levels[..., 0]) / 2
        frozen = (seen - middle).abs() >= half * (1 - torch.finfo(seen.dtype).eps)
        return torch.where(frozen | (slot.weight == slot.scratch["dual"]), seen, moved)

    def undo(self, slot: Slot, clock: Clock) -> None:
        if self.form == "dual":
            super().undo(slot, clock)
        elif "seen" in slot.scratch:
            slot.weight.copy_(slot.scratch["seen"])


@dataclass(frozen=True, kw_only=True)
class _Descent(_Mapped):
    """A map with its derivative on the gradient: plain descent in the latent instead of mirror descent."""

    def _bend(self, slot: Slot, clock: Clock) -> None:
        assert slot.grad is not None
        beta = self.beta_at(clock.step, clock.total_steps)
        if math.isinf(beta):
            return  # a jump has no derivative: straight through from here on
        latent = slot.state["latent"]
        lined = self._lines(slot, latent.to(compute_dtype(latent.dtype)), slot.grad)
        x, grad = lined.tensors
        frame = self._frame(slot, lined.params, x, beta)
        # A factor that the gradient's own dtype cannot hold may still give a product that it can.
        most = min(torch.finfo(slot.grad.dtype).max, _STEEPEST)

        def act(a: Tensor, q: Tensor, g: Tensor, unit: Tensor, beta: float | Tensor) -> Tensor:
            slope = self._slope((a / unit).clamp_(-_FARTHEST, _FARTHEST), q, beta)
            return (g.to(a.dtype) * slope).clamp_(-most, most)

        in_pieces(act, x, frame.scaled, grad, frame.unit, frame.beta, out=grad)

    def _slope(self, at: Tensor, levels: Tensor, beta: float | Tensor) -> Tensor:
        """The factor on the gradient, from latent and levels in units."""
        return self._mirror.derivative(at, levels, beta)


@dataclass(frozen=True, kw_only=True)
class GDTanh(_Descent):
    """Gradient descent through the tanh map: mirror descent's forward pass, with the map's derivative on the gradient.

        w = tanh(beta a),    a <- a - lr * beta (1 - w^2) dL/dw

    Weights that have hardened no longer move, as the factor is nearly zero there; between levels it is up to beta, so
    that plain SGD takes ever larger steps: use it with Adam or its kin. For more than two levels the shifted tanh, as
    in `MirrorDescent`. The levels in the factor are those fitted at the start of the step.

    Args:
        beta: sharpness, > 0, by schedule.
        units: "cell" or "weight", as in `MirrorDescent`.
        scale_aware: "tensor", "channel", `Group` or `None`, as in `MirrorDescent`.
        hard_start: moment from which `project(a)` is seen and the gradient passes straight through; `None` for never.
        start: moment it starts; before it the base optimizer runs untouched.
        clip_latent: after each step the latent is clamped to [-clip_latent, clip_latent]; `None` for no limit.

    Raises:
        ValueError: an unknown unit, or a beta that is not positive.

    Example:
        >>> import detent as dt
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.GDTanh())

    Reference: Ajanthan et al., arXiv 1910.08237 (the baseline "GD-tanh").
    """


@dataclass(frozen=True, kw_only=True)
class PMF(_Descent):
    """Proximal mean-field: a softmax over the levels, with its Jacobian on the gradient.

        w = sum_q u_q q,  u = softmax(-beta (a - q)^2 / 2),    a <- a - lr * beta (sum_q u_q q^2 - w^2) dL/dw

    One latent serves all levels, where the published form keeps one a level; for two levels under SGD that is the same
    at half the rate. The factor is up to beta: use it with Adam or its kin, as plain SGD takes ever larger steps.

    Args:
        jacobian: "true" as above, or "paper": the released code's `beta (I - u u^T)`, here `beta (sum_q q^2 - w^2)`,
            which never lets go of a hardened weight.
        beta: sharpness, > 0, by schedule.
        units: "cell" or "weight", as in `MirrorDescent`.
        scale_aware: "tensor", "channel", `Group` or `None`, as in `MirrorDescent`.
        hard_start: moment from which `project(a)` is seen and the gradient passes straight through; `None` for never.
        start: moment it starts; before it the base optimizer runs untouched.
        clip_latent: after each step the latent is clamped to [-clip_latent, clip_latent]; `None` for no limit.

    Raises:
        ValueError: an unknown Jacobian or unit, or a beta that is not positive.

    Example:
        >>> import detent as dt
        >>> rule = dt.Rule(match="weight", target=dt.Uniform(bits=2), mechanism=dt.PMF(jacobian="paper"))

    Reference: Ajanthan et al., "Proximal Mean-field for Neural Network Quantization", arXiv 1812.04353, and its code.
    """

    jacobian: Literal["true", "paper"] = "true"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jacobian not in ("true", "paper"):
            raise ValueError(f'PMF(jacobian={self.jacobian!r}): must be "true" or "paper"')

    @property
    def _mirror(self) -> MirrorMap:
        return SoftmaxMap()

    def _slope(self, at: Tensor, levels: Tensor, beta: float | Tensor) -> Tensor:
        if self.jacobian == "true":
            return super()._slope(at, levels, beta)
        slope = beta * (levels.square().sum(-1) - self._mirror.forward(at, levels, beta).square())
        return slope.clamp_max(torch.finfo(at.dtype).max)  # an infinite one would make a NaN of a gradient of zero
