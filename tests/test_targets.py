"""Targets: the shipped laws on every row of the table, and the fast projections against the slow references."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import ERRORS, TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

import detent as dt
from detent.grouping import granularity_of
from detent.targets import forms
from detent.testing import awkward_samples, check_target

UNIFORMS = {name: target for name, target in TARGETS.items() if isinstance(target, dt.Uniform)}


def own_targets() -> set[type]:
    """Every final target class that the package exports."""
    return {v for v in vars(dt).values() if isinstance(v, type) and issubclass(v, dt.Target) and v is not dt.Target}


def levels_of(target: dt.Target, params: dt.Params) -> Tensor:
    """The allowed values, from the definition: every multiple of the scale from -n to n; or zero alone."""
    if isinstance(target, dt.Uniform):
        n = reference.most(target.bits) + (not target.zero)
        scale = granularity_of(target.granularity).expand(params["scale"].double(), params.layout)
        return scale.unsqueeze(-1) * torch.tensor([k for k in range(-n, n + 1) if k or target.zero])
    assert isinstance(target, dt.Zero)
    return torch.zeros(1, dtype=torch.float64)


def test_every_target_has_a_row() -> None:
    assert {type(target) for target in TARGETS.values()} == own_targets()


@pytest.mark.parametrize("name", TARGETS)
def test_laws(name: str) -> None:
    target = TARGETS[name]
    listed = isinstance(target, (dt.Uniform, dt.Zero))
    check_target(target, levels=(lambda params: levels_of(target, params)) if listed else None)
    if listed:  # and with the levels that the laws find for themselves, as a third party would run them
        check_target(target, [torch.randn(7, 5), torch.zeros(2, 2)])


def test_the_laws_say_when_a_target_accepts_nothing() -> None:
    with pytest.raises(ValueError, match="accepts none of the 1 sample tensors"):
        check_target(dt.TopK(keep=50), [torch.randn(3, 3)])


# --- the laws can fail: one wrong target each --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Grid(dt.Target):
    """A right target with one thing wrong, named by `wrong`: the integers -3 .. 3."""

    wrong: str = ""

    is_exact = True

    @property
    def scope(self):
        return "element"

    def fit(self, w, layout=None, previous=None):
        if self.wrong != "eats NaN" and not bool(torch.isfinite(w).all()):
            raise ValueError("not finite")
        tensors = {"draw": torch.rand(1)} if self.wrong == "draws" else {}
        return dt.Params(tensors=tensors, layout=layout or dt.Layout(shape=tuple(w.shape)))

    def project(self, w, params):
        wide = w.detach().double()
        q = wide.round().clamp(-3, 3)
        if self.wrong == "floors":
            q = wide.floor().clamp(-3, 3)
        if self.wrong == "drifts":
            q = (wide / 2).clamp(-3, 3)
        if self.wrong == "narrow":
            q = wide.round().clamp(-2, 2)
        if self.wrong == "writes":
            w.detach().mul_(0.5)
        if self.wrong == "by position" and params.layout.rows is not None and params.layout.rows[0] > 0:
            q = -q
        q = q if self.wrong == "minus zero" else q + 0.0
        return q.to(torch.float64 if self.wrong == "widens" else w.dtype)

    def relax(self, w, params, beta):
        return w.detach().clone() if self.wrong == "never sharp" else dt.Target.relax(self, w, params, beta)

    def form(self, w, params):
        codes = (self.project(w, params).double() + 3).to(torch.uint8)
        scale = torch.tensor([2.0 if self.wrong == "another" else 1.0])
        layout = dt.Layout(shape=(w.numel(),)) if self.wrong == "flat" else params.layout
        return forms.Grid(layout=layout, dtype=w.dtype, codes=codes, scale=scale, n=3)

    def typical(self, params):
        return torch.tensor(0.0 if self.wrong == "no size" else 0.25)

    def limits(self, params):
        return torch.tensor(2.0 if self.wrong == "limits" else 3.0)

    def free(self, w, params):
        return torch.ones_like(w, dtype=torch.bool) if self.wrong == "all free" else None


def grid_levels(params: dt.Params) -> Tensor:
    return torch.arange(-3.0, 4.0, dtype=torch.float64)


def test_a_right_target_passes() -> None:
    check_target(Grid(), levels=grid_levels)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("floors", "project gives the nearest member of the set"),
        ("narrow", "project gives the nearest member of the set"),
        ("drifts", "projecting twice is projecting once"),
        ("minus zero", "never -0.0"),
        ("widens", "project keeps shape and dtype"),
        ("writes", "leave their input alone"),
        ("by position", "rows project as the whole does"),
        ("never sharp", "relax at beta = inf is project"),
        ("another", "form.w..dense.. is project.w."),
        ("flat", "a form has the layout and the dtype of the weight"),
        ("no size", "typical is positive"),
        ("limits", "no allowed weight lies beyond the limits"),
        ("all free", "free weights stay as they are"),
        ("eats NaN", "refuses NaN and infinite weights"),
        ("draws", "fitting twice gives the same params"),
    ],
)
def test_a_wrong_target_is_found(wrong: str, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_target(Grid(wrong=wrong), levels=grid_levels)


@dataclass(frozen=True, kw_only=True)
class SmallestK(dt.Target):
    """Its set is that of TopK, any k non-zeros, but its projection keeps the k smallest non-zeros, not the largest."""

    is_exact = True

    @property
    def scope(self):
        return "tensor"

    def fit(self, w, layout=None, previous=None):
        return dt.TopK(keep=0.5).fit(w, layout)

    def project(self, w, params):
        size = w.detach().abs().double().reshape(-1)
        order = torch.where(size > 0, size, torch.inf).argsort(stable=True)[: int(params["count"])]
        kept = torch.zeros(w.numel(), dtype=w.dtype)
        kept[order] = w.detach().reshape(-1)[order] + 0.0
        return kept.reshape(w.shape)

    def form(self, w, params):
        return dt.TopK(keep=0.5).form(self.project(w, params), params)

    def typical(self, params):
        return torch.tensor(1.0)


def test_a_wrong_subset_is_found() -> None:
    for weight in (torch.randn(6, 5), torch.zeros(3, 3)):  # by random members, and on the tiny tensors of the law's own
        with pytest.raises(AssertionError, match=r"nearest member of the set.*(subsets of 8|random member)"):
            check_target(SmallestK(), [weight])


# --- fast == reference -------------------------------------------------------------------------------------------

_GROUPS = {"tensor": lambda w: [np.arange(w.size)], "channel": lambda w: np.split(np.arange(w.size), w.shape[0])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["minmax", "mse"])
def test_uniform_is_the_reference(kind, bits, granularity, dtype) -> None:
    """Scales within one rounding of float32; with the scale given, the projection bitwise (rounded to the dtype)."""
    w = torch.randn(4, 7, dtype=dtype)
    target = dt.Uniform(bits=bits, granularity=granularity, range=kind)
    params = target.fit(w)
    x, q = w.double().numpy(), target.project(w, params).reshape(-1)
    find = reference.minmax_delta if kind == "minmax" else reference.mse_delta
    for scale, where in zip(params["scale"].tolist(), _GROUPS[granularity](x), strict=True):
        part = x.reshape(-1)[where]
        assert scale == pytest.approx(find(part, bits), rel=2**-22)
        expected = torch.from_numpy(reference.grid(part, scale, bits)).to(dtype)
        assert torch.equal(q[torch.from_numpy(where)], expected)


def test_the_running_range_is_the_released_codes() -> None:
    target, running = dt.Uniform(bits=4, range="ema"), reference.RunningRange()
    params = None
    for step in range(50):
        w = torch.randn(5, 6, dtype=torch.float64) * (1 + step / 10) + (3.0 if step > 30 else 0.0)
        params = target.fit(w, previous=params)
        assert float(params["scale"]) == running.see(w.numpy(), 4)
    assert params is not None
    assert float(params["high"]) > -float(params["low"]) > 0, "both ends were meant to be tried"


def test_zero_stays_inside_the_running_range() -> None:
    params = dt.Uniform(bits=2, range="ema").fit(torch.tensor([2.0, 3.0]))
    assert (float(params["low"]), float(params["high"])) == (0.0, 3.0)


def test_mse_is_the_least_of_all_candidates() -> None:
    for bits, seed in itertools.product((2, 3, 4), range(4)):
        w = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        target = dt.Uniform(bits=bits)
        mine = float((target.project(w, target.fit(w)) - w).square().sum())
        full = reference.minmax_delta(w.numpy(), bits)
        for i in range(41):
            q = reference.grid(w.numpy(), reference.stored(full * (1 - 0.9 * i / 40)), bits)
            assert mine <= float(((q - w.numpy()) ** 2).sum()) * (1 + 1e-6)


@pytest.mark.parametrize("name", UNIFORMS)
def test_a_fit_does_not_hang_on_the_default_dtype(name: str) -> None:
    w = torch.randn(6, 10, dtype=torch.float32)
    params = TARGETS[name].fit(w)
    torch.set_default_dtype(torch.float64)
    again = TARGETS[name].fit(w)
    assert torch.equal(params["scale"], again["scale"]) and params["scale"].dtype == again["scale"].dtype


@pytest.mark.parametrize("param_dtype", ["float16", "bfloat16", "float32"])
def test_scales_are_rounded_before_anything_is_projected(param_dtype: str) -> None:
    target = dt.Uniform(bits=4, granularity="channel", param_dtype=param_dtype)  # type: ignore[arg-type]
    params = target.fit(torch.randn(5, 9))
    assert params["scale"].dtype == getattr(torch, param_dtype)


@pytest.mark.parametrize("fitted", ["minmax", "ema", "mse", "alternate", "interval"])
def test_at_bits_is_never_worse_than_a_fresh_fit(fitted: Any) -> None:
    w = torch.randn(30, 4)
    trained = dt.Uniform(bits=3, range=fitted)
    params = trained.fit(w)
    clicked = trained.project(w, params)
    finer, finer_params = trained.at_bits(clicked, params, 4)
    assert isinstance(finer, dt.Uniform) and finer.bits == 4
    assert torch.equal(finer.project(clicked, finer_params), clicked), "a 3-bit grid lies inside a 4-bit one"
    for bits in (2, 4, 6):
        at, at_params = trained.at_bits(w, params, bits)
        fresh = dt.Uniform(bits=bits, range=fitted)
        error = float((at.project(w, at_params) - w).square().sum())
        assert error <= float((fresh.project(w, fresh.fit(w)) - w).square().sum()) * (1 + 1e-6)
    same, same_params = trained.at_bits(w, params, 3)
    assert same is trained and same_params is params
    with pytest.raises(ValueError, match="TopK has no bit-width to change"):
        dt.TopK(keep=0.5).at_bits(w, dt.TopK(keep=0.5).fit(w), 4)


# --- properties --------------------------------------------------------------------------------------------------

_SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)
_FLOATS = arrays.arrays(np.float32, _SHAPES, elements=st.floats(-(2.0**100), 2.0**100, width=32))
_TIES = arrays.arrays(np.float64, _SHAPES, elements=st.integers(-3, 3).map(float))


@settings(max_examples=40)
@given(_FLOATS, st.integers(2, 8), st.sampled_from(["minmax", "ema"]), st.sampled_from(["tensor", "channel"]))
def test_any_tensor_keeps_the_laws_on_a_grid(x, bits, kind, granularity) -> None:
    target = dt.Uniform(bits=bits, range=kind, granularity=granularity)
    check_target(target, [torch.from_numpy(x)], levels=lambda params: levels_of(target, params))


@settings(max_examples=60)
@given(_FLOATS | _TIES, st.floats(0.01, 1.0))
def test_top_k_is_sorting(x, keep) -> None:
    w = torch.from_numpy(x)
    target = dt.TopK(keep=keep)
    params = target.fit(w)
    k = max(1, round(keep * x.size))
    assert int(params["count"]) == k
    expected = reference.top_k(x.astype(np.float64), k)
    assert np.array_equal(target.project(w, params).double().numpy(), expected)


@settings(max_examples=40)
@given(st.lists(_TIES, min_size=1, max_size=4), st.floats(0.01, 1.0))
def test_a_model_wide_count_is_exact(xs, keep) -> None:
    weights = [torch.from_numpy(x) for x in xs]
    target = dt.TopK(keep=keep, scope="model")
    layouts = [dt.Layout(shape=tuple(w.shape)) for w in weights]
    fitted = target.fit_model(weights, layouts, [None] * len(weights))
    total = sum(w.numel() for w in weights)
    assert sum(int(p["count"]) for p in fitted) == max(1, round(keep * total))
    flat = np.concatenate([x.reshape(-1) for x in xs])
    expected = reference.top_k(flat, max(1, round(keep * total)))
    mine = torch.cat([target.project(w, p).reshape(-1) for w, p in zip(weights, fitted, strict=True)])
    assert np.array_equal(mine.numpy(), expected)


@settings(max_examples=40)
@given(_TIES, st.data())
def test_layouts_cut_the_same_groups_everywhere(x, data) -> None:
    """Spreading each group's sum over its weights and adding the weights up by group gives the tensor's sum."""
    w = torch.from_numpy(x)
    transposed = w.dim() >= 2 and data.draw(st.booleans())
    divisors = [g for g in (1, 2, 3) if w.shape[0] % g == 0]
    groups = data.draw(st.sampled_from(divisors)) if transposed else 1
    layout = dt.Layout(shape=tuple(w.shape), channel_dim=int(transposed), conv_groups=groups)
    for granularity in (dt.PerTensor(), dt.Channel(), dt.Group(size=data.draw(st.integers(1, 5)))):
        sums, sizes = granularity.sum(w, layout), granularity.sum(torch.ones_like(w), layout)
        assert sums.shape == (granularity.count(layout),)
        assert int(sizes.sum()) == w.numel() and float(sums.sum()) == float(w.sum())
        marks = granularity.expand(torch.arange(len(sums), dtype=torch.float64), layout).broadcast_to(w.shape)
        for group in range(len(sums)):
            inside = w[marks == group]
            assert len(inside) == int(sizes[group]) and float(inside.sum()) == float(sums[group])
            assert float(granularity.amax(w, layout)[group]) == float(inside.max())
            assert float(granularity.amin(w, layout)[group]) == float(inside.min())
    assert torch.equal(layout.from_channels(layout.by_channel(w)), w)


def test_channels_of_a_transposed_convolution_are_its_outputs() -> None:
    """The grid of output channel c sees exactly the weights that reach output c of the real layer."""
    conv = torch.nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
    plan = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]).resolve(conv)
    layout = plan.claimed[0].layout
    assert layout.channels == 6
    for channel in range(6):
        with torch.no_grad():
            values = torch.arange(1.0, 7.0) == channel + 1
            marks = dt.Channel().expand(values.float(), layout).broadcast_to(conv.weight.shape)
            conv.weight.copy_(marks)
            out = conv(torch.ones(1, 4, 2, 2))
        assert [bool(out[0, c].any()) for c in range(6)] == [c == channel for c in range(6)]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_told_in_words(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        ERRORS[name].make()
    assert ERRORS[name].says in str(caught.value)


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_target_cannot_take_is_refused(name: str) -> None:
    target = TARGETS[name]
    whole = target.accepts((2, 3), torch.int64, dt.Layout(shape=(2, 3)))
    empty = target.accepts((0, 3), torch.float32, dt.Layout(shape=(0, 3)))
    short = target.accepts((2, 3), torch.float8_e4m3fn, dt.Layout(shape=(2, 3)))
    assert whole is not None and empty is not None and short is not None
    if name != "topk-five":
        assert "torch.int64" in whole and "at least one weight" in empty
        assert "needs weights of 16 bits or more, this one is torch.float8_e4m3fn" in short
    with pytest.raises(ValueError, match="at least one weight, this one has shape"):
        target.fit(torch.empty(0, 4, 3, 3))
    # The first shape that the target takes: units of a codebook are kernels, or blocks of a matrix.
    shape = next(s for s in ((4, 4), (4, 4, 3, 3)) if target.accepts(s, torch.float32, dt.Layout(shape=s)) is None)
    with pytest.raises(ValueError, match="beta=-1"):
        w = torch.randn(shape)
        target.relax(w, target.fit(w), -1)
    if "KernelCodebook" in repr(target) or "VectorCodebook" in repr(target):
        with pytest.raises(ValueError, match="needs a convolution|needs a matrix"):
            target.fit(torch.randn(12))


def test_the_samples_are_what_they_say() -> None:
    by_case = {sample.case: sample.weight for sample in awkward_samples()}
    assert not by_case["a strided slice"].is_contiguous() and by_case["a tensor of negative zeros"].signbit().all()
    assert by_case["a convolution in channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert {w.dtype for w in by_case.values()} == {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    again = {sample.case: sample.weight for sample in awkward_samples()}
    assert all(torch.equal(w, again[case]) for case, w in by_case.items())


def test_params_move_and_localise() -> None:
    w = torch.randn(6, 4)
    target = dt.Uniform(bits=4, granularity="channel")
    params = target.fit(w)
    assert params.local(2, 4).layout.rows == (2, 4) and params.local(2, 4).layout.whole() == params.layout
    assert params.to(torch.device("meta"))["scale"].is_meta
    assert replace(params).tensors is params.tensors
