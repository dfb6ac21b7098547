"""Mechanisms that act on the gradient, or on the step taken from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.mechanisms.base import Cadence, Clock, Mechanism, Slot
from detent.mechanisms.gain import BEGIN, MOST, descent, kept_gain, measures, ramp, spread_of
from detent.mechanisms.projection import box_of, clip_to_box, clip_to_range, clipping, clipping_begins
from detent.schedules import Linear, Moment, Number, ends_of, is_finite, is_number, step_at, value_at
from detent.targets import Params, Target, Uniform, Zero
from detent.targets.base import Lines, compute_dtype

__all__ = ["PSG"]

_EPS = Linear(first=0.05, last=0.0, begin=0.0, end=0.8)


@dataclass(frozen=True, kw_only=True)
class PSG(Mechanism):
    """Position-based scaled gradient: weights far from their target take large steps, weights near it stay.

    Each gradient entry (or each entry of the step the optimizer took) is multiplied by

        s(w) = (1 - strength) + strength * gain * (min(d, c / 2) + eps * c) / r,    d = |w - project(w)|

    where c is the cell width and r the typical distance c / 4, so `strength` and `gain` mean the same for every
    layer, bit-width and granularity. Where the set has no cells, r is the mean distance of the weights that are off it
    (for `Zero` the group's mean |w|, for a sparse target that of what it drops) and c = 4 r. Weights
    that the target leaves free (survivors of a sparse target) keep s = 1. s is never negative, so no gradient
    changes its sign. Weight decay stays outside s (in the update form: decoupled decay; what an optimizer folds into
    its gradient cannot be told apart afterwards). The forward pass always sees the full-precision weights.

    Args:
        strength: 0 is the base optimizer, bitwise; 1 is pure PSG. Number in [0, 1] or a schedule. `None` is 1 with a
            number as gain; with "auto" it grows from 0 at `start` to 1 at half of what is left of training.
        gain: mean factor on the learning rate, > 0; or "auto", by tensor and step

                clamp(heat, 1 / F, 4 / F),    F = max(1 / 16, sum g^2 f / sum g^2),    f = s at gain 1 and strength 1

            with g the gradient (or the step) and heat the highest learning rate over the one of this step. F is found
            in every tenth step. At 1 / F the loss falls at first order as fast as under the base optimizer, however
            many weights have settled; where the rate has come down weights are stirred as far as they were at its
            height, up to four times as much. What a scheduler of torch announces counts as known, a rate set by hand
            from when it comes. With a number, clicking goes with (learning rate * gain)^2, but so does the price in
            full precision; the published lambda_s = 150 amounts to a factor of about 4 at 4 bits.
        eps: smallest distance, as a fraction of the cell, >= 0. Number or schedule; ending at 0 lets clusters close.
        clip: keep the weights inside the range of a bounded target, after each step from `clip_start` on while
            strength is above 0.
        clip_start: moment (step or fraction of training) clipping starts, with a fresh fit that is the last one, unless
            the rule says `fit_until`; `None` for when the fit is frozen otherwise, after 30 % of training. A range that
            was fitted to what it has clipped would be smaller every time.
        start: moment PSG starts, with a fresh fit; before it the base optimizer runs untouched. `None` is 0 with a
            number as gain, and 0.4 (of training) with "auto".
        form: "gradient" scales the gradient (the paper), "update" scales the step the optimizer took, "auto" is
            "gradient" under SGD and "update" under every other optimizer: a normalising optimizer divides a scaled
            gradient's scale out again.
        clip_norm: largest total norm of the gradients *after* scaling (in the gradient form), or `None`. A clip in
            the training loop acts before scaling.
        toward: pull towards this target instead of the rule's own, e.g. `Zero()` for the sparse training of a `TopK`.
        units: "cell" as above; "weight" is the published s = (1 - strength) + strength * gain * (d + eps), with gain
            the paper's lambda_s and eps in the unit of a weight.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> import torch, detent as dt
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.PSG())])
        >>> run = dt.attach(model, optimizer, recipe, total_steps=10)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 8)).square().mean().backward()
        ...     _ = optimizer.step()
        >>> run.clock
        10

    Reference: Kim, Yoo, Kwak, "Position-based Scaled Gradient for Model Quantization and Pruning", NeurIPS 2020,
    arXiv 2005.11035. The scale-free form is ours (docs/decisions.md).
    """

    strength: Number | None = None
    gain: float | Literal["auto"] = "auto"
    eps: Number = field(default=_EPS)
    clip: bool = True
    clip_start: Moment | None = 0.0
    start: Moment | None = None
    form: Literal["auto", "gradient", "update"] = "auto"
    clip_norm: float | None = None
    toward: Target | None = None
    units: Literal["cell", "weight"] = "cell"

    keeps_full_life: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("strength", "eps"):
            value = getattr(self, name)
            if not (name == "strength" and value is None) and not all(is_number(end) for end in ends_of(value)):
                raise ValueError(f"PSG({name}={value!r}): must be a number or a schedule")
        if self.strength is not None and not all(0.0 <= end <= 1.0 for end in ends_of(self.strength)):
            raise ValueError(f"PSG(strength={self.strength}): must lie in [0, 1]")
        if not self.sets_gain and (isinstance(self.gain, str) or not (is_finite(self.gain) and self.gain > 0)):
            raise ValueError(f'PSG(gain={self.gain!r}): must be a finite number > 0, or "auto"')
        if self.sets_gain and self.units == "weight":
            raise ValueError('PSG(units="weight"): gain="auto" is told in cells; give the number lambda_s as gain')
        if not all(end >= 0 and is_finite(end) for end in ends_of(self.eps)):
            raise ValueError(f"PSG(eps={self.eps}): must be a finite number >= 0")
        if self.clip_norm is not None and not (is_number(self.clip_norm) and self.clip_norm > 0):
            raise ValueError(f"PSG(clip_norm={self.clip_norm!r}): must be a number > 0, or None")
        if self.toward is not None and not isinstance(self.toward, Target):
            raise ValueError(f"PSG(toward={self.toward!r}): must be a Target or None")
        if self.form not in ("auto", "gradient", "update"):
            raise ValueError(f'PSG(form={self.form!r}): must be "auto", "gradient" or "update"')
        if self.units not in ("cell", "weight"):
            raise ValueError(f'PSG(units={self.units!r}): must be "cell" or "weight"')
        super().__post_init__()

    @classmethod
    def paper(cls, lambda_s: float = 150.0, eps: float = 0.0) -> PSG:
        """The published form: `s = lambda_s (|w - project(w)| + eps)`, absolute units, no clipping.

        Use it with `Uniform(range="ema")` and `Rule(fit_every=1, fit_until=1.0)`, or the "psg-paper-w4" preset.

        Args:
            lambda_s: strength in 1 / (unit of a weight), > 0; 150 is published for 4 bits.
            eps: 0 in the released code, > 0 in the paper; in the unit of a weight.

        Raises:
            ValueError: lambda_s that is not > 0.

        Example:
            >>> PSG.paper(lambda_s=150).gain
            150.0
        """
        if not (is_number(lambda_s) and lambda_s > 0):
            raise ValueError(f"PSG.paper(lambda_s={lambda_s!r}): must be a number > 0")
        return cls(gain=float(lambda_s), eps=eps, clip=False, form="gradient", units="weight")

    @property
    def pull(self) -> Target | None:
        return self.toward

    @property
    def sets_gain(self) -> bool:
        """Whether the gain is found in training."""
        return isinstance(self.gain, str) and self.gain == "auto"

    @property
    def said(self) -> str:
        if not self.sets_gain:
            return ""
        begin = self._begin
        until = f"step {begin}" if isinstance(begin, int) else f"{begin:g} of training"
        return "sets its gain by itself" + (f"; the base optimizer runs untouched until {until}" if begin else "")

    @property
    def finds(self) -> tuple[str, ...]:
        return ("peak", "spread") if self.sets_gain else ()

    @property
    def _begin(self) -> Moment:
        if self.start is not None:
            return self.start
        return BEGIN if self.sets_gain else 0.0

    def _strength_at(self, clock: Clock) -> float:
        if self.strength is not None:
            return value_at(self.strength, clock.step, clock.total_steps)
        return ramp(self._begin, clock) if self.sets_gain else 1.0

    def cadence(self, target: Target) -> Cadence:
        # A pull that starts late goes to a grid fitted then, and on for a while as one from step 0 does.
        until: Moment | None = min(1.0, max(0.3, self._begin + 0.1)) if isinstance(self._begin, float) else 0.3
        if self.clip and self.clip_start is not None and type(target).limits is not Target.limits:
            until = self.clip_start
        return Cadence(until=until, at=self._needs_fit)

    @property
    def norm_limit(self) -> float | None:
        return self.clip_norm

    def _needs_fit(self, clock: Clock) -> bool:
        return self._begins(clock) or (self.clip and clipping_begins(self.clip_start, clock))

    def _begins(self, clock: Clock) -> bool:
        """Whether the pull sets in at this step: at `start`, or where a strength that was 0 until now is no more."""
        before = (replace(clock, step=step) for step in range(clock.step - 1, -1, -1))
        return self.active(clock) and not any(map(self.active, before))

    def active(self, clock: Clock) -> bool:
        started = clock.step >= step_at(self._begin, clock.total_steps, "PSG.start")
        return started and self._strength_at(clock) > 0

    def before_step(self, slot: Slot, clock: Clock) -> None:
        if slot.grad is None:
            return
        if self._scales_gradient(slot):
            gain = self._gain(slot, clock, slot.weight, slot.grad, lambda _, grad: grad)
            for scale, _, grad in self._factors(slot, clock, gain, [slot.weight, slot.grad]):
                grad.mul_(scale)
            # Finite before, and looked at then: what was scaled beyond the largest half-precision number would end at
            # the range's end, where clipping hides it.
            if slot.grad.dtype == torch.float16 and not bool(torch.isfinite(slot.grad).all()):
                raise RuntimeError(
                    f"the gradient of {slot.name!r}, as PSG(gain={self.gain!r}) scales it, is beyond float16; train "
                    "with float32 weights (autocast), or with a smaller gain"
                )
        else:
            slot.decay()  # an optimizer whose decay cannot be told is refused before any weight moves
            slot.scratch["before"] = slot.weight.clone()

    def after_step(self, slot: Slot, clock: Clock) -> None:
        before = slot.scratch.get("before")
        clips = self.clip and clipping(self.clip_start, slot, clock)
        if before is not None:
            lost = slot.decay()
            gain = self._gain(slot, clock, before, slot.weight, lambda old, w: w.sub(old).add_(old, alpha=lost))
            pieces = self._factors(slot, clock, gain, [before, slot.weight], boxed=clips)
            for i, (scale, old, w, *box) in enumerate(pieces):
                slot.write_once(f"piece {i}", w, partial(_scaled_step, w, old, lost, scale, *box))
        elif clips:
            clip_to_range(slot.weight, slot.pull, slot.pull_params)

    def undo(self, slot: Slot, clock: Clock) -> None:
        before = slot.scratch.pop("before", None)
        if before is not None:
            slot.weight.copy_(before)

    def _scales_gradient(self, slot: Slot) -> bool:
        return self.form == "gradient" or (self.form == "auto" and slot.plain)

    def _gain(
        self, slot: Slot, clock: Clock, w: Tensor, given: Tensor, move: Callable[[Tensor, Tensor], Tensor]
    ) -> float | Tensor:
        """The gain of a tensor in this step; one that sets itself looks at `move(w, given)`, what s is to scale."""
        if not isinstance(self.gain, str):
            return self.gain
        if "gain" not in slot.scratch:  # else the step goes on after it was broken off, and w is written over in part
            if "spread" not in slot.found or measures(self._begin, clock):
                slot.found["spread"] = self._spread(slot, clock, w, given, move)
            dtype = compute_dtype(w.dtype)
            spread = torch.as_tensor(slot.found["spread"], dtype=dtype, device=w.device)
            slot.scratch["gain"] = kept_gain(spread, slot.heat())
        return slot.scratch["gain"]

    def _spread(
        self, slot: Slot, clock: Clock, w: Tensor, given: Tensor, move: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """F of the whole tensor; weights that the target leaves free have no say."""
        parts = []
        for factor, here, x in self._factors(slot, clock, 1.0, [w, given], strength=1.0):
            step = move(here, x)
            if slot.pull.leaves_free and (free := slot.pull_free(here)) is not None:
                step = step.masked_fill(free, 0.0)
            parts.append(descent(step, factor))
        return spread_of(slot.total(torch.stack(parts).sum(0)))

    def _factors(
        self,
        slot: Slot,
        clock: Clock,
        gain: float | Tensor,
        tensors: Sequence[Tensor],
        strength: float | None = None,
        boxed: bool = False,
    ) -> Iterator[tuple[Tensor, ...]]:
        """(s, pieces of the tensors, their range if `boxed`) of the weights that the first of them holds."""
        lined = Lines.of(slot.pull, slot.pull_params, *tensors)
        box = box_of(slot.pull, lined.params, slot.weight.dtype) if boxed else None
        dtype = compute_dtype(slot.weight.dtype)
        slope, offset, cap = self._line(slot.pull, lined.params, clock, dtype, gain, strength)
        for params, w, *piece, slope_here, cap_here in lined.pieces(*(box or ()), slope, cap):
            q = slot.pull.project(w, params) if lined.apart else slot.pull_project(w)
            distance = slot.pull.distance(q.sub_(w), params)
            scale = self._scale(distance, slope_here, offset, cap_here)
            free = slot.pull_free(w) if slot.pull.leaves_free else None
            yield scale if free is None else scale.masked_fill_(free, 1.0), w, *piece

    def _scale(self, distance: Tensor, slope: Tensor | float, offset: Tensor | float, cap: Tensor | None) -> Tensor:
        """s = slope * min(d, cap) + offset; may write over the distance."""
        # A slope is gain / typical distance: it can leave the range of float16, the product with a distance cannot.
        wide = distance.to(compute_dtype(distance.dtype))
        # Weights that move together have one distance, which may stand in memory once.
        wide = wide if wide.is_contiguous() else wide.clone()
        if cap is not None:
            wide.clamp_max_(cap)
        return wide.mul_(slope).add_(offset).to(distance.dtype)

    def _line(
        self,
        target: Target,
        params: Params,
        clock: Clock,
        dtype: torch.dtype,
        gain: float | Tensor | None = None,
        strength: float | None = None,
    ) -> tuple[Tensor | float, Tensor | float, Tensor | None]:
        """s = slope * min(d, cap) + offset, at its own gain and strength or at these."""
        if gain is None:
            if isinstance(self.gain, str):
                raise ValueError('PSG(gain="auto"): finds the gain from gradients; give the number as gain here')
            gain = self.gain
        strength = self._strength_at(clock) if strength is None else strength
        eps = value_at(self.eps, clock.step, clock.total_steps)
        if not (0 <= strength <= 1 and eps >= 0):
            raise ValueError(f"PSG: at step {clock.step} strength={strength} (in [0, 1]) and eps={eps} (>= 0)")
        force = strength * gain
        # c / r is 4 on a grid by definition of r, and where there are no cells by definition of c.
        offset = (1 - strength) + force * (eps if self.units == "weight" else 4 * eps)
        if self.units == "weight":
            return force, offset, None
        known = 1.0 if isinstance(force, Tensor) else force

        def make() -> tuple[Tensor, Tensor]:
            typical = target.typical(params).to(dtype)
            # Below 1e-37 the slope would be infinite, and infinity times a distance of 0 is no number.
            return (known / typical).clamp_max(torch.finfo(dtype).max / MOST), 2 * typical

        slope, cap = params.once(("slope", target), make, at=(known, dtype))
        return slope * force if isinstance(force, Tensor) else slope, offset, cap

    def scale(self, w: Tensor, target: Target, params: Params, step: int = 0, total_steps: int | None = None) -> Tensor:
        """s(w), the factor on each gradient entry, where the gain is a number.

        Args:
            w: weights.
            target: what they are pulled to.
            params: its fitted params.
            step: step number, for schedules.
            total_steps: length of training, for schedules.

        Example:
            >>> import torch
            >>> w = torch.tensor([0.0, 0.25, 1.0])
            >>> grid = Uniform(bits=2, range="minmax")
            >>> PSG(gain=1.0, eps=0.0).scale(w, grid, grid.fit(w))
            tensor([0., 1., 0.])
        """
        distance = target.distance(target.project(w, params).sub_(w), params)
        clock = Clock(step=step, total_steps=total_steps)
        scale = self._scale(distance, *self._line(target, params, clock, compute_dtype(distance.dtype)))
        free = target.free(w, params)
        return scale if free is None else scale.masked_fill_(free, 1.0)

    def warp(self, w: Tensor, target: Target, params: Params, step: int = 0, total_steps: int | None = None) -> Tensor:
        """The warped space f(w) in which plain gradient descent is PSG: `f'(w) = s(w)^(-1/2)`, f(0) = 0.

        Inside a cell `f(q + d) - f(q) = 2 / b (sqrt(a + b d) - sqrt(a))` with s = a + b d; cells join continuously;
        beyond the capped distance f goes on as a straight line. f is strictly increasing. With eps = 0 and
        strength 1, a = 0: f is still continuous and invertible, but its slope at a target is infinite, a weight
        exactly on its target never moves, and steps agree with f-space only away from targets.

        Args:
            w: weights.
            target: `Uniform` or `Zero`.
            params: its fitted params.
            step: step number, for schedules.
            total_steps: length of training, for schedules.

        Raises:
            ValueError: a target without evenly spaced levels.

        Example:
            >>> import torch
            >>> w = torch.tensor([-1.0, 0.1, 0.4], dtype=torch.float64)
            >>> grid, psg = Uniform(bits=3, range="minmax"), PSG(gain=8.0, eps=0.05)
            >>> params = grid.fit(w)
            >>> torch.allclose(psg.unwarp(psg.warp(w, grid, params), grid, params), w)
            True

        Reference: arXiv 2005.11035, Theorem 1.
        """
        inner, cell, span = self._warp_parts(w, target, params, step, total_steps)
        nearest = target.project(w, params)
        offset = w - nearest
        cells = nearest / cell if cell is not None else torch.zeros_like(w)
        return cells * span + torch.sign(offset) * inner(offset.abs(), False)

    def unwarp(
        self, y: Tensor, target: Target, params: Params, step: int = 0, total_steps: int | None = None
    ) -> Tensor:
        """The inverse of `warp`.

        Args:
            y: points of the warped space.
            target: `Uniform` or `Zero`.
            params: its fitted params.
            step: step number, for schedules.
            total_steps: length of training, for schedules.

        Raises:
            ValueError: a target without evenly spaced levels.

        Example:
            >>> import torch
            >>> zero, psg = Zero(), PSG(gain=8.0, eps=0.05)
            >>> params = zero.fit(torch.tensor([1.0, -1.0]))
            >>> bool(psg.unwarp(torch.tensor(0.0), zero, params) == 0)
            True
        """
        inner, cell, span = self._warp_parts(y, target, params, step, total_steps)
        if cell is None:
            return torch.sign(y) * inner(y.abs(), True)
        limits = target.limits(params)
        assert limits is not None
        most = torch.round(limits.to(y.dtype) / cell)
        cells = torch.maximum(torch.minimum(torch.round(y / span), most), -most)
        offset = y - cells * span
        return cells * cell + torch.sign(offset) * inner(offset.abs(), True)

    def _warp_parts(
        self, like: Tensor, target: Target, params: Params, step: int, total_steps: int | None
    ) -> tuple[Callable[[Tensor, bool], Tensor], Tensor | None, Tensor]:
        """(the warp of a distance or its inverse, cell width, warped width of a cell)."""
        if not isinstance(target, (Uniform, Zero)) or (isinstance(target, Uniform) and not target.zero):
            raise ValueError(f"the warp is known for evenly spaced levels (Uniform) and for Zero, not for {target!r}")
        slope, offset, cap = self._line(target, params, Clock(step=step, total_steps=total_steps), like.dtype)
        b = torch.as_tensor(slope, dtype=like.dtype)
        cap = torch.full((), math.inf, dtype=like.dtype) if cap is None else cap.to(like.dtype)
        cell = target.cell(params)
        cell = None if cell is None else cell.to(like.dtype)
        a = offset

        def inner(x: Tensor, inverse: bool) -> Tensor:
            def bent(d: Tensor) -> Tensor:
                # 2 / b (sqrt(a + b d) - sqrt(a)), written so that b -> 0 gives d / sqrt(a).
                return 2 * d / (torch.sqrt(a + b * d) + math.sqrt(a)) if a > 0 else 2 * torch.sqrt(d / b)

            infinite = torch.isinf(cap)
            edge = torch.where(infinite, torch.zeros_like(cap), cap)
            top, steepness = bent(edge), torch.sqrt(a + b * edge)
            if not inverse:
                within = bent(torch.minimum(x, cap))
                return torch.where(infinite | (x <= cap), within, top + (x - cap) / steepness)
            y = torch.where(infinite, x, torch.minimum(x, top))
            within = y * math.sqrt(a) + b * y * y / 4
            return torch.where(infinite | (x <= top), within, edge + (x - top) * steepness)

        span = torch.zeros((), dtype=like.dtype) if cell is None else 2 * inner(cell / 2, False)
        return inner, cell, span


def _scaled_step(w: Tensor, old: Tensor, lost: float, scale: Tensor, *box: Tensor) -> Tensor:
    """old + s (step + decay) - decay, in its range: only what the optimizer made of the gradient is scaled.

    Written over the scale: memory that is new costs more than the arithmetic.
    """
    start = old * (1 - lost) if lost else old
    scaled = torch.lerp(start, w, scale, out=scale)
    return clip_to_box(scaled, *box) if box else scaled
