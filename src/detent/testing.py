"""The laws every target and every mechanism keeps, as functions: run them on your own.

`check_target` tries a target on ordinary and awkward tensors, `check_mechanism` trains tiny networks with a mechanism
on a target, `check_pair` is the short form of the latter for every pair. A broken law raises `AssertionError` with a
sentence that says which law broke and on which case.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer

from detent.engine import Run, attach
from detent.grouping import Layout
from detent.mechanisms import PSG, Mechanism
from detent.recipe import Recipe, Rule
from detent.specs import from_spec, to_spec
from detent.targets import Params, Target
from detent.targets.forms import Grid, Levels

__all__ = ["Sample", "awkward_samples", "check_mechanism", "check_pair", "check_target"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tensor to try a target on.

    Args:
        case: what is special about it, for the message.
        weight: its values.
        layout: its layout.

    Example:
        >>> Sample(case="plain", weight=torch.ones(2, 3), layout=Layout(shape=(2, 3))).case
        'plain'
    """

    case: str
    weight: Tensor
    layout: Layout


def check_target(
    target: Target,
    weights: Sequence[Tensor] | None = None,
    layouts: Sequence[Layout] | None = None,
    *,
    levels: Callable[[Params], Tensor] | None = None,
) -> None:
    """Check that a target keeps the laws, with the fitted params held.

    * `project` is idempotent bitwise, returns +0.0 only, and leaves its input alone.
    * Where `is_exact`: no member of the set is nearer, by brute force over the levels, over all subsets of a tiny
      tensor, and over random members.
    * `form(w).dense() == project(w)` bitwise, with values that a file may hold; it comes back from a file, in both
      lives, in a process that does not know the target, with the bytes that `form(w).nbytes` says.
    * `relax(w, beta)` tends to `project(w)`.
    * A process that holds some rows projects them as the whole tensor would be (targets of scope "element" or "row").
    * `fit` is repeatable, refuses NaN and infinite weights with `ValueError`; `typical` is positive; no weight lies
      beyond `limits`; weights in `free` stay as they are.
    * The target survives `to_spec` and `from_spec`.

    Args:
        target: the target.
        weights: tensors to try it on; by default `awkward_samples()`. Those it does not accept are passed over.
        layouts: one layout a tensor; by default output channels on axis 0.
        levels: for targets whose allowed values can be listed: a function of the params that gives them, with the
            levels on the last axis and the other axes broadcasting against the weights. Without it the levels are
            those of the form.

    Raises:
        AssertionError: a broken law, in a sentence.
        ValueError: the target accepts none of the weights.

    Example:
        A new target is a frozen dataclass with a handful of methods; this is how to know that it is right:

        >>> import detent as dt
        >>> from detent.targets.base import check_finite
        >>> from detent.targets.forms import Grid
        >>> from detent.testing import check_pair, check_target
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Signs(dt.Target):
        ...     '''Every weight is -size or +size.'''
        ...     size: float = 0.5
        ...     is_exact = True
        ...     scope = "element"
        ...     def fit(self, w, layout=None, previous=None):
        ...         check_finite(w)
        ...         return dt.Params(layout=layout or dt.Layout(shape=tuple(w.shape)))
        ...     def form(self, w, params):
        ...         codes, scale = (w.detach() >= 0).to(torch.uint8), torch.tensor([self.size])
        ...         return Grid(layout=params.layout, dtype=w.dtype, codes=codes, scale=scale, n=1, zero=False)
        ...     def typical(self, params):
        ...         return torch.tensor(self.size / 2)
        >>> check_target(Signs(size=0.5))
        >>> check_pair(Signs(size=0.5), dt.PSG())

        A wrong one is named: this one projects faster, to somewhere else.

        >>> @dataclass(frozen=True, kw_only=True)
        ... class Fast(Signs):  # in earnest, wrap a target instead of deriving from it
        ...     def project(self, w, params):
        ...         return torch.where(w.detach() < 0, -1.0, 1.0).to(w.dtype)
        >>> check_target(Fast())
        Traceback (most recent call last):
        ...
        AssertionError: Fast(size=0.5) breaks the law "form(w).dense() is project(w), bitwise" on plain float32: ...
    """
    if weights is None:
        samples = awkward_samples()
    else:
        given = layouts or [Layout(shape=tuple(w.shape)) for w in weights]
        samples = [
            Sample(case=f"weights[{i}] of shape {tuple(w.shape)}", weight=w, layout=layout)
            for i, (w, layout) in enumerate(zip(weights, given, strict=True))
        ]
    fitting = [s for s in samples if target.accepts(tuple(s.weight.shape), s.weight.dtype, s.layout) is None]
    if not fitting:
        raise ValueError(f"{target!r} accepts none of the {len(samples)} sample tensors: pass weights= that it accepts")
    _spec_round_trip(target)
    for sample in fitting:
        _check_sample(target, sample, levels)
    _refuses_nonfinite(target, fitting[0])
    if target.is_exact and target.scope in ("tensor", "model"):
        for seed in range(6):
            _no_subset_is_nearer(target, seed)
    if target.fits_together:
        _check_together(target, fitting)


def awkward_samples(seed: int = 0) -> list[Sample]:
    """Ordinary and awkward tensors: dtypes, strides, layouts, zeros, constants, ties, outliers, extreme sizes.

    Args:
        seed: of the random values.

    Example:
        >>> [sample.case for sample in awkward_samples()][:2]
        ['plain float32', 'float64']
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    outlier = randn(6, 10)
    outlier[2, 3] = 60.0
    zero_row = randn(4, 9)
    zero_row[1] = 0.0
    plain: list[tuple[str, Tensor]] = [
        ("plain float32", randn(12, 10)),
        ("float64", randn(12, 10, dtype=torch.float64)),
        ("float16", randn(12, 10, dtype=torch.float16)),
        ("bfloat16", randn(12, 10, dtype=torch.bfloat16)),
        ("a convolution", randn(6, 4, 3, 3)),
        ("a convolution in channels_last", randn(6, 4, 3, 3).to(memory_format=torch.channels_last)),
        ("an embedding", randn(23, 5)),
        ("a 1-D tensor", randn(19)),
        ("a single weight", randn(1, 1)),
        ("a 0-D tensor", randn(1).reshape(())),
        ("an all-zero tensor", torch.zeros(4, 5)),
        ("a tensor of negative zeros", torch.full((3, 3), -0.0)),
        ("a constant tensor", torch.full((4, 5), 0.3)),
        ("a constant negative tensor", torch.full((4, 5), -0.7)),
        ("a tensor with an all-zero row", zero_row),
        ("a tensor full of ties", torch.arange(-8.0, 8.0).div(4).round().reshape(4, 4)),
        ("a tensor with an outlier", outlier),
        ("a transposed (non-contiguous) tensor", randn(9, 7).t()),
        ("a strided slice", randn(8, 12)[::2, 1::3]),
        ("an expanded tensor", randn(5, 1).expand(5, 6)),
        ("weights near the smallest float", randn(5, 6) * 1e-42),
        ("weights near the largest float", randn(5, 6).clamp(-2, 2) * 1.5e38),
        ("small float16 weights", (randn(5, 6) * 1e-6).to(torch.float16)),
        ("a weight that requires a gradient", randn(4, 6).requires_grad_()),
    ]
    samples = [Sample(case=case, weight=w, layout=Layout(shape=tuple(w.shape))) for case, w in plain]
    for groups in (1, 2, 4):
        w = randn(8, 3, 2, 2)
        layout = Layout(shape=tuple(w.shape), channel_dim=1, conv_groups=groups)
        samples.append(Sample(case=f"a transposed convolution of {groups} groups", weight=w, layout=layout))
    stacked = {"a matrix of inputs times outputs": ((8, 6), 1, ()), "a stack of matrices": ((3, 4, 8), 1, (0,))}
    stacked |= {
        "a stack of inputs times outputs": ((3, 8, 4), 2, (0,)),
        "a stack on the last axis": ((4, 8, 3), 0, (2,)),
    }
    for case, (shape, channel, batch) in stacked.items():
        layout = Layout(shape=shape, channel_dim=channel, batch_axes=batch)
        samples.append(Sample(case=case, weight=randn(*shape), layout=layout))
    return samples


# --- the laws of a target ---------------------------------------------------------------------------------------


def _broken(who: object, law: str, case: str, detail: str) -> NoReturn:
    raise AssertionError(f'{who!r} breaks the law "{law}" on {case}: {detail}')


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits: tells -0.0 from 0.0, and a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    whole = {16: torch.int16, 32: torch.int32, 64: torch.int64}[torch.finfo(a.dtype).bits]
    return torch.equal(a.detach().contiguous().view(whole), b.detach().contiguous().view(whole))


def _unequal(a: Tensor, b: Tensor) -> str:
    """The first place where two tensors differ, in words."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} of shape {tuple(a.shape)} instead of {b.dtype} of shape {tuple(b.shape)}"
    x, y = a.detach().double().reshape(-1), b.detach().double().reshape(-1)
    where = ((x != y) | (torch.signbit(x) != torch.signbit(y))).nonzero().reshape(-1)
    if not len(where):
        return "a NaN of another kind"
    at = int(where[0])
    return f"{len(where)} of {len(x)} weights differ, the first is {x[at].item()!r} instead of {y[at].item()!r}"


def _fit(target: Target, w: Tensor, layout: Layout) -> Params:
    return target.fit_model([w], [layout], [None])[0]


def _check_sample(target: Target, sample: Sample, levels: Callable[[Params], Tensor] | None) -> None:
    w, case = sample.weight, sample.case
    kept = w.detach().clone()
    params = _fit(target, w, sample.layout)
    again = _fit(target, w, sample.layout)
    for name, tensor in params.tensors.items():
        if not _same_bits(tensor, again[name]):
            _broken(target, "fitting twice gives the same params", case, f"{name}: {_unequal(again[name], tensor)}")
    q = target.project(w, params)
    if not _same_bits(w, kept):
        _broken(target, "fit and project leave their input alone", case, _unequal(w, kept))
    _projects_well(target, sample, params, q)
    _form_is_right(target, sample, params, q)
    _relaxes(target, sample, params, q)
    _describes_itself(target, sample, params, q)
    if target.is_exact:
        _no_member_is_nearer(target, sample, params, q, levels)
    if target.scope in ("element", "row") and w.dim():
        _shards_agree(target, sample, params, q)
    if target.scope == "element" and w.dim():
        _columns_agree(target, sample, params, q)
    if not _same_bits(w, kept):
        _broken(target, "relax, form and free leave their input alone", case, _unequal(w, kept))


def _projects_well(target: Target, sample: Sample, params: Params, q: Tensor) -> None:
    w, case = sample.weight, sample.case
    if q.shape != w.shape or q.dtype != w.dtype:
        _broken(target, "project keeps shape and dtype", case, _unequal(q, w))
    if q.requires_grad:
        _broken(target, "project is cut off from autograd", case, "its result requires a gradient")
    if not bool(torch.isfinite(q).all()):
        _broken(target, "project gives finite weights", case, f"{int((~torch.isfinite(q)).sum())} are not")
    if bool((torch.signbit(q) & (q == 0)).any()):
        _broken(target, "project returns +0.0, never -0.0", case, "a -0.0 was found")
    twice = target.project(q, params)
    if not _same_bits(twice, q):
        _broken(target, "projecting twice is projecting once, bitwise", case, _unequal(twice, q))


def _form_is_right(target: Target, sample: Sample, params: Params, q: Tensor) -> None:
    w, case = sample.weight, sample.case
    form = target.form(w, params)
    if not _same_bits(form.dense(), q):
        _broken(target, "form(w).dense() is project(w), bitwise", case, _unequal(form.dense(), q))
    if (form.layout, form.dtype) != (params.layout, w.dtype):
        detail = f"it is of {form.dtype} and {form.layout}"
        _broken(target, "a form has the layout and the dtype of the weight", case, detail)
    try:
        form.check()
        back = form.outline.form(form.values, form.layout, form.dtype)
    except ValueError as error:
        _broken(target, "a form holds what a file may hold", case, str(error))
    if not _same_bits(back.dense(), q):
        _broken(target, "a form is the same from its values", case, _unequal(back.dense(), q))


def _relaxes(target: Target, sample: Sample, params: Params, q: Tensor) -> None:
    w, case = sample.weight.detach(), sample.case
    hard = target.relax(w, params, math.inf)
    if not _same_bits(hard, q):
        _broken(target, "relax at beta = inf is project, bitwise", case, _unequal(hard, q))
    if torch.finfo(w.dtype).bits < 32 or float(w.abs().amax()) > 1e30:
        return  # the limit cannot be followed where a step of the dtype is larger than what is left
    gap = float((target.relax(w, params, 1e6) - q).abs().mean())
    far = float((w - q).abs().mean())
    if gap > 0.01 * far + 4 * torch.finfo(w.dtype).eps * float(q.abs().amax()) + torch.finfo(w.dtype).tiny:
        detail = f"at beta = 1e6 the mean distance is still {gap:.3g} of {far:.3g}"
        _broken(target, "relax tends to project as beta grows", case, detail)


def _describes_itself(target: Target, sample: Sample, params: Params, q: Tensor) -> None:
    w, case = sample.weight.detach(), sample.case
    for name in ("typical", "cell", "limits"):
        value: Tensor | None = getattr(target, name)(params)
        if value is None:
            continue
        if torch.broadcast_shapes(value.shape, w.shape) != w.shape:
            _broken(target, f"{name} broadcasts against the weight", case, f"{tuple(value.shape)} to {tuple(w.shape)}")
        if not bool(torch.isfinite(value).all()):
            _broken(target, f"{name} is finite", case, f"it has {value[~torch.isfinite(value)][0].item()}")
        if name != "limits" and not bool((value > 0).all()):
            _broken(target, f"{name} is positive", case, f"its smallest value is {float(value.min())}")
        dtype = torch.finfo(w.dtype)
        most = value.double() * (1 + 2 * dtype.eps) + dtype.smallest_normal * dtype.eps
        if name == "limits" and bool((q.double().abs() > most).any()):
            _broken(target, "no allowed weight lies beyond the limits", case, "project gives one that does")
    free = target.free(w, params)
    if free is not None and not bool((q[free] == w[free]).all()):
        _broken(target, "free weights stay as they are", case, "project moves some")


def _levels_of(target: Target, params: Params, like: Tensor) -> Iterator[Tensor]:
    """Every level as a tensor like the weight, for grids and tables; only those that stay themselves."""
    form = target.form(like, params)
    if not isinstance(form, Grid | Levels):
        return
    count = 2 * form.n + form.zero if isinstance(form, Grid) else form.table.shape[1]
    for code in range(count):
        level = replace(form, codes=torch.full_like(form.codes, code)).dense()
        if torch.equal(target.project(level, params), level):
            yield level


def _no_member_is_nearer(
    target: Target, sample: Sample, params: Params, q: Tensor, levels: Callable[[Params], Tensor] | None
) -> None:
    w, case = sample.weight.detach().double(), sample.case
    eps = torch.finfo(sample.weight.dtype).eps
    mine = (w - q.double()).abs()
    law = "project gives the nearest member of the set"
    if target.scope == "element":
        slack = 4 * eps * w.abs() + torch.finfo(sample.weight.dtype).smallest_normal * 8
        if levels is None:
            rivals = [level.double() for level in _levels_of(target, params, sample.weight)]
        else:
            listed = levels(params).to(sample.weight.dtype).double()
            rivals = [level.broadcast_to(w.shape) for level in listed.unbind(-1)]
            on = torch.stack([(q.double() - level).abs() <= slack for level in rivals]).any(0)
            if not bool(on.all()):
                _broken(target, "project gives a listed level", case, f"{q[~on][0].item()!r} is none")
        for level in rivals:
            worse = mine > (w - level).abs() + slack
            if bool(worse.any()):
                at = worse.nonzero()[0].tolist()
                three = [float(x[worse][0]) for x in (w, q, level)]
                detail = f"weight {three[0]!r} at {at} goes to {three[1]!r}, not to {three[2]!r}"
                _broken(target, law, case, detail)
    generator = torch.Generator().manual_seed(1)
    total = float(mine.square().sum())
    size = float(w.abs().mean())
    for spread in (0.03, 0.3, 3.0):
        noise = torch.randn(w.shape, generator=generator, dtype=torch.float64) * spread * size
        member = target.project((w + noise).to(sample.weight.dtype), params).double()
        other = float((w - member).square().sum())
        if math.isfinite(total) and total > other * (1 + 64 * eps) + 64 * eps * size**2:
            _broken(target, law, case, f"squared distance {total!r}, but a random member is at {other!r}")


def _no_subset_is_nearer(target: Target, seed: int) -> None:
    """Exhaustive over the subsets of a tiny tensor: no way of keeping some weights and zeroing the others is nearer."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(8, generator=generator, dtype=torch.float64)
    if seed % 2:
        w = (w * 2).round()  # ties and zeros
    layout = Layout(shape=(8,))
    if target.accepts((8,), w.dtype, layout) is not None:
        return
    params = _fit(target, w, layout)
    mine = float((w - target.project(w, params)).square().sum())
    for code in range(2**8):
        keep = torch.tensor([bool(code >> bit & 1) for bit in range(8)])
        rival = torch.where(keep, w, torch.zeros_like(w))
        if torch.equal(target.project(rival, params), rival):
            other = float((w - rival).square().sum())
            if mine > other * (1 + 1e-12):
                detail = f"squared distance {mine!r} of {w.tolist()}, but keeping {keep.tolist()} gives {other!r}"
                _broken(target, "project gives the nearest member of the set", "all subsets of 8 weights", detail)


def _shards_agree(target: Target, sample: Sample, params: Params, q: Tensor) -> None:
    w, case = sample.weight, sample.case
    rows = w.shape[0]
    for first, past in sorted({(0, rows // 2), (rows // 2, rows), (0, 1), (rows - 1, rows), (rows, rows)}):
        local = params.local(first, past)
        part = target.project(w[first:past], local)
        if not _same_bits(part, q[first:past]):
            detail = f"rows {first} to {past}: {_unequal(part, q[first:past])}"
            _broken(target, "rows project as the whole does", case, detail)
        for name in ("typical", "cell", "limits"):
            value = getattr(target, name)(params)
            if value is None:
                continue
            whole = value.broadcast_to(w.shape)[first:past]
            here = getattr(target, name)(local).broadcast_to(whole.shape)
            if not _same_bits(here, whole):
                _broken(target, f"{name} of rows is that of the whole", case, f"rows {first} to {past} differ")


def _columns_agree(target: Target, sample: Sample, params: Params, q: Tensor) -> None:
    """One weight of each channel alone goes where it goes among all others."""
    matrix, places = sample.layout.by_channel(sample.weight.detach()), sample.layout.by_channel(q)
    alone, params_of = target.by_column(params)
    shift = torch.arange(len(matrix), device=matrix.device)
    for first in range(matrix.shape[1]):
        at = (shift + first) % matrix.shape[1]  # a column of its own for each channel
        found = alone.project(matrix.gather(1, at[:, None]), params_of(at))
        if not _same_bits(found, places.gather(1, at[:, None])):
            detail = _unequal(found, places.gather(1, at[:, None]))
            _broken(target, "by_column places a weight as project does", sample.case, detail)


def _refuses_nonfinite(target: Target, sample: Sample) -> None:
    law = "fit refuses NaN and infinite weights with ValueError"
    for bad in (math.nan, math.inf, -math.inf):
        w = sample.weight.detach().clone()
        w.view(-1)[-1] = bad
        try:
            _fit(target, w, sample.layout)
        except ValueError:
            continue
        _broken(target, law, f"a tensor with {bad}", "it raised nothing")


def _spec_round_trip(target: Target) -> None:
    spec = yaml.safe_load(yaml.safe_dump(to_spec(target)))
    back = from_spec(spec)
    if back != target or type(back) is not type(target):
        _broken(target, "from_spec(to_spec(target)) is the target, through YAML", "its spec", f"{back!r} came back")


def _check_together(target: Target, samples: Sequence[Sample]) -> None:
    """A model-wide target: fitted to several tensors at once, each tensor keeps the laws with its own params."""
    some = [s for s in samples if s.weight.dtype == torch.float32 and float(s.weight.detach().abs().amax()) < 1e30]
    fitted = target.fit_model([s.weight for s in some], [s.layout for s in some], [None] * len(some))
    for sample, params in zip(some, fitted, strict=True):
        together = replace(sample, case=f"{sample.case}, fitted with {len(some) - 1} others")
        q = target.project(sample.weight, params)
        _projects_well(target, together, params, q)
        _form_is_right(target, together, params, q)
        _describes_itself(target, together, params, q)


# --- the laws of a mechanism ------------------------------------------------------------------------------------

_STEPS = 12


def _sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)]


def _adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-2)]


def _muon(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    if not matrices:
        return _adamw(model)
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1), torch.optim.AdamW(rest, lr=0.01)]


def _optimizers(mechanism: Mechanism) -> dict[str, Callable[[nn.Module], list[Optimizer]]]:
    found = {"SGD": _sgd, "AdamW": _adamw}
    return found | {"Muon and AdamW": _muon} if hasattr(torch.optim, "Muon") and not mechanism.ties else found


def _model(target: Target, seed: int = 0) -> nn.Module:
    """Two linear layers; or, for a target that takes no matrices, two convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if target.accepts((8, 6), torch.float32, Layout(shape=(8, 6))) is not None:
            first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
            return nn.Sequential(
                nn.Unflatten(1, (1, 2, 3)), first, nn.Tanh(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _attach(
    model: nn.Module, optimizers: list[Optimizer], mechanism: Mechanism, target: Target, hooks: bool = True
) -> Run:
    rule = Rule(match="weight$", target=target, mechanism=mechanism)
    return attach(model, optimizers, Recipe([rule]), total_steps=_STEPS, hooks=hooks)


def _backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 6, generator=generator)
    y = torch.randn(16, 4, generator=generator)
    (model(x) - y).square().mean().backward()


def _train(model: nn.Module, optimizers: list[Optimizer], first: int, past: int) -> None:
    for step in range(first, past):
        for optimizer in optimizers:
            optimizer.zero_grad()
        _backward(model, step)
        for optimizer in optimizers:
            optimizer.step()


def _differs(a: nn.Module, b: nn.Module) -> str | None:
    """The first parameter in which two models differ, in words."""
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        if not _same_bits(x, y):
            return f"{name}: {_unequal(x, y)}"
    return None


def check_mechanism(mechanism: Mechanism, target: Target) -> None:
    """Check that a mechanism keeps the laws on a target, by training a tiny network of two layers.

    * With strength 0, and before its start, every optimizer is bitwise what it is without Detent.
    * A run saved by `torch.save` of the model's and the optimizers' state dicts, loaded with `weights_only=True` into a
      new process's objects, goes on bitwise as the unbroken run; it remembers nothing but its `memory`.
    * Dummy optimizer steps (gradients of zero before there is state) move nothing and do not count.
    * No gradient, and in PSG's update form no step, changes its sign (PSG).
    * Masked weights are zero, and the mask holds the exact count the target asks for.
    * The compressed life is put back bitwise, and after `finalize` every claimed weight lies in its target exactly.

    SGD, AdamW and, where torch has it and the mechanism does not tie weights, Muon with AdamW for the biases.

    Args:
        mechanism: the mechanism.
        target: a target it works on that accepts (8, 6) and (4, 8) float32 matrices, or else kernels of 3 x 3.

    Raises:
        AssertionError: a broken law, in a sentence.
        ValueError: the mechanism refuses this target.

    Example:
        >>> from detent import PSG, Uniform
        >>> check_mechanism(PSG(), Uniform(bits=4))
    """
    reason = mechanism.check(target)
    if reason:
        raise ValueError(f"{mechanism!r} refuses {target!r}: {reason}")
    for name, make in _optimizers(mechanism).items():
        case = f"{target!r} under {name}"
        _idle_is_base(mechanism, target, make, case)
        _resumes(mechanism, target, make, case)
        _dummy_steps_move_nothing(mechanism, target, make, case)
        _masks_hold(mechanism, target, make, case)
        _two_lives(mechanism, target, make, case)
        if isinstance(mechanism, PSG):
            _keeps_signs(mechanism, target, make, case)


def check_pair(target: Target, mechanism: Mechanism) -> None:
    """Check one pair in short: it survives YAML, trains, keeps its two lives apart, and ends in the target exactly.

    Args:
        target: the target.
        mechanism: the mechanism.

    Raises:
        AssertionError: a broken law, in a sentence.
        ValueError: the mechanism refuses this target.

    Example:
        >>> from detent import STE, TopK
        >>> check_pair(TopK(keep=0.25), STE())
    """
    recipe = Recipe([Rule(match="weight$", target=target, mechanism=mechanism)])
    if Recipe.from_yaml(recipe.to_yaml()) != recipe:
        _broken(mechanism, "a recipe survives YAML", repr(target), recipe.to_yaml())
    _two_lives(mechanism, target, _sgd, f"{target!r} under SGD")


def _memory(run: Run) -> dict[str, dict[str, Tensor]]:
    """What a mechanism keeps for each weight by now; a state dict also holds placeholders of what is to come."""
    saved = run.state_dict()["weights"]
    return {
        name: {key: value for key, value in entry["state"].items() if entry["held"].get(key, True)}
        for name, entry in saved.items()
    }


def _idle_is_base(
    mechanism: Mechanism, target: Target, make: Callable[[nn.Module], list[Optimizer]], case: str
) -> None:
    fields = {f.name for f in dataclasses.fields(mechanism)}  # type: ignore[arg-type]
    idle: dict[str, Mechanism] = {}
    if "strength" in fields:
        idle["strength 0"] = replace(mechanism, strength=0.0)  # type: ignore[type-var]
    if "start" in fields:
        idle["before its start"] = replace(mechanism, start=10**6)  # type: ignore[type-var]
    for what, quiet in idle.items():
        base, model = _model(target), _model(target)
        _train(base, make(base), 0, 5)
        optimizers = make(model)
        _attach(model, optimizers, quiet, target)
        _train(model, optimizers, 0, 5)
        difference = _differs(model, base)
        if difference:
            _broken(quiet, f"{what} it is the base optimizer, bitwise", case, difference)


def _resumes(mechanism: Mechanism, target: Target, make: Callable[[nn.Module], list[Optimizer]], case: str) -> None:
    unbroken = _model(target)
    optimizers = make(unbroken)
    whole = _attach(unbroken, optimizers, mechanism, target)
    saved: dict[int, bytes] = {}
    for step in range(_STEPS):
        if step in (0, 5):
            buffer = io.BytesIO()
            torch.save({"model": unbroken.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, buffer)
            saved[step] = buffer.getvalue()
        _train(unbroken, optimizers, step, step + 1)
    for name, memory in _memory(whole).items():
        unknown = set(memory) - set(mechanism.memory)
        if unknown:
            detail = f"{name} also keeps {sorted(unknown)}"
            _broken(mechanism, f"memory names all it keeps: {list(mechanism.memory)}", case, detail)
    expected = {name: e.decode() for name, e in whole.encoded().items()}
    for step, data in saved.items():
        checkpoint = torch.load(io.BytesIO(data), weights_only=True)
        model = _model(target, seed=99)
        fresh = make(model)
        run = _attach(model, fresh, mechanism, target)
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(fresh, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        _train(model, fresh, step, _STEPS)
        law = "a resumed run is the unbroken run, bitwise"
        difference = _differs(model, unbroken)
        if difference:
            _broken(mechanism, law, f"{case}, saved at step {step}", difference)
        for name, encoded in run.encoded().items():
            if not _same_bits(encoded.decode(), expected[name]):
                detail = f"the compressed life of {name}: {_unequal(encoded.decode(), expected[name])}"
                _broken(mechanism, law, f"{case}, saved at step {step}", detail)


def _dummy_steps_move_nothing(
    mechanism: Mechanism, target: Target, make: Callable[[nn.Module], list[Optimizer]], case: str
) -> None:
    for what in ("zero gradients at a rate of 0", "zero gradients and no state"):
        model = _model(target)
        optimizers = make(model)
        run = _attach(model, optimizers, mechanism, target)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["weight_decay"] = 0.0  # it moves weights on its own, gradient or not
            group["lr"] = 0.0 if "rate" in what else group["lr"]
        before = [p.detach().clone() for p in model.parameters()]
        _backward(model, 0)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        for optimizer in optimizers:
            optimizer.step()
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            if not torch.equal(p.detach(), old):
                _broken(mechanism, f"a dummy step ({what}) moves nothing", case, f"{name}: {_unequal(p, old)}")
        if run.clock:
            _broken(mechanism, f"a dummy step ({what}) does not count", case, f"the clock shows {run.clock}")
        for group, (rate, decay) in zip(groups, rates, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        _train(model, optimizers, 0, 2)
        if run.clock != 2:
            _broken(mechanism, f"training goes on after a dummy step ({what})", case, f"the clock shows {run.clock}")


def _masks_hold(mechanism: Mechanism, target: Target, make: Callable[[nn.Module], list[Optimizer]], case: str) -> None:
    if "mask" not in mechanism.memory:
        return
    model = _model(target)
    optimizers = make(model)
    run = _attach(model, optimizers, mechanism, target)
    weights = dict(model.named_parameters())
    for step in range(_STEPS):
        _train(model, optimizers, step, step + 1)
        saved = run.state_dict()["weights"]
        for name, memory in _memory(run).items():
            mask = memory.get("mask")
            if mask is None:
                continue
            if bool(weights[name][~mask].any()):
                _broken(mechanism, "masked weights are zero", f"{case} after step {step}", f"{name} has others")
            asked = saved[name]["params"].get("count")
            if asked is not None and int(mask.sum()) != int(asked):
                detail = f"{name}: the mask holds {int(mask.sum())}, the target asks for {int(asked)}"
                _broken(mechanism, "masks hold the exact count", f"{case} after step {step}", detail)


def _two_lives(mechanism: Mechanism, target: Target, make: Callable[[nn.Module], list[Optimizer]], case: str) -> None:
    model = _model(target)
    optimizers = make(model)
    run = _attach(model, optimizers, mechanism, target)
    _train(model, optimizers, 0, _STEPS)
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            _broken(mechanism, "training gives finite weights", case, f"{name} is not finite after {_STEPS} steps")
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoded = run.encoded()
    weights = dict(model.named_parameters())
    with run.compressed():
        for name, code in encoded.items():
            if not _same_bits(weights[name], code.decode()):
                detail = f"{name}: {_unequal(weights[name], code.decode())}"
                _broken(mechanism, "the compressed life is what the codes decode to, bitwise", case, detail)
    for name, p in weights.items():
        if not _same_bits(p, full[name]):
            _broken(mechanism, "the full life comes back bitwise", case, f"{name}: {_unequal(p, full[name])}")
    run.finalize()
    for entry in run._entries:
        name, code, params = entry.name, encoded[entry.name], entry.params
        assert params is not None
        nearest = code.target.project(weights[name], params)
        if not _same_bits(weights[name], nearest):
            detail = f"{name}: {_unequal(weights[name], nearest)}"
            _broken(mechanism, "after finalize every claimed weight lies in its target exactly", case, detail)
        if not _same_bits(weights[name], code.decode()):
            detail = f"{name}: {_unequal(weights[name], code.decode())}"
            _broken(mechanism, "finalize gives what the codes decode to", case, detail)


def _keeps_signs(psg: PSG, target: Target, make: Callable[[nn.Module], list[Optimizer]], case: str) -> None:
    """One step with and without: no entry of the gradient, or of the step taken from it, may turn round."""
    base, model = _model(target), _model(target)
    psg = replace(psg, clip=False, clip_norm=None)
    if psg.sets_gain:  # else its first step is the base optimizer's
        psg = replace(psg, start=0, strength=1.0)
    ours, plain = make(model), make(base)
    for group in (group for optimizer in (*ours, *plain) for group in optimizer.param_groups):
        group["weight_decay"] = 0.0
    run = _attach(model, ours, psg, target, hooks=False)
    before = [p.detach().clone() for p in model.parameters()]
    for net in (base, model):
        _backward(net, 0)
    for optimizer, other in zip(ours, plain, strict=True):
        run.before_step(optimizer)
        for p, q in zip(model.parameters(), base.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            if bool((p.grad.sign() * q.grad.sign() < 0).any()):
                _broken(psg, "no gradient changes its sign", case, "one does")
        optimizer.step()
        run.after_step(optimizer)
        other.step()
    if isinstance(ours[0], torch.optim.SGD) or psg.form != "gradient":
        for p, q, old in zip(model.parameters(), base.parameters(), before, strict=True):
            if bool(((p.detach() - old).sign() * (q.detach() - old).sign() < 0).any()):
                _broken(psg, "no step changes its sign", case, "one does")
