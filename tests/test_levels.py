"""Levels: every fit and every projection against its slow reference, and what the fits promise."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

import detent as dt
from detent.targets import kmeans as line
from detent.testing import awkward_samples, check_target

CODED = (dt.Uniform, dt.Binary, dt.Ternary, dt.PowerOfTwo, dt.LearnedLevels, dt.Zero)
LISTED = {name: target for name, target in TARGETS.items() if isinstance(target, CODED)}
_GROUPS = {"tensor": lambda w: [np.arange(w.numel())], "channel": lambda w: np.split(np.arange(w.numel()), len(w))}
_SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)
_FLOATS = arrays.arrays(np.float32, _SHAPES, elements=st.floats(-(2.0**100), 2.0**100, width=32))
_SMALL = arrays.arrays(np.float64, st.integers(1, 12), elements=st.floats(-8, 8).map(lambda x: round(x, 2)))


def _error(target: dt.Target, w: Tensor) -> float:
    return float((target.project(w, target.fit(w)).double() - w.double()).square().sum())


# --- levels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTED)
def test_levels_are_the_allowed_values(name: str) -> None:
    """Ascending, each its own projection, and every projection among them; rows of them are those of the whole."""
    target = LISTED[name]
    for sample in awkward_samples():
        w = sample.weight.detach()
        params = target.fit(w, sample.layout)
        levels = target.levels(params)
        assert levels is not None and levels.dtype == torch.float64
        assert bool((levels.diff(dim=-1) >= 0).all()), sample.case
        on = levels.to(torch.float64 if w.dtype == torch.float64 else torch.float32).to(w.dtype)
        q = target.project(w, params)
        assert bool((q.unsqueeze(-1) == on).any(-1).all()), f"{sample.case}: a projection off its levels"
        for level in on.unbind(-1):
            whole = level.broadcast_to(w.shape).contiguous()
            assert torch.equal(target.project(whole, params), whole), f"{sample.case}: a level that moves"
        if w.dim():
            rows = target.levels(params.local(0, 1))
            assert rows is not None
            assert torch.equal(
                rows.broadcast_to((*w[:1].shape, on.shape[-1])), levels.broadcast_to((*w.shape, on.shape[-1]))[:1]
            )


@pytest.mark.parametrize("name", LISTED)
def test_laws_with_the_targets_own_levels(name: str) -> None:
    target = LISTED[name]
    check_target(target, levels=target.levels)


@settings(max_examples=40)
@given(_FLOATS, st.sampled_from(sorted(LISTED)))
def test_any_tensor_keeps_the_laws(x, name) -> None:
    check_target(LISTED[name], [torch.from_numpy(x)], levels=LISTED[name].levels)


@pytest.mark.parametrize("name", LISTED)
def test_projection_is_brute_force_over_the_levels(name: str) -> None:
    target = LISTED[name]
    w = torch.randn(4, 6, dtype=torch.float64)
    params = target.fit(w)
    levels = target.levels(params)
    assert levels is not None
    each = levels.broadcast_to((*w.shape, levels.shape[-1])).reshape(w.numel(), -1).tolist()
    expected = [reference.nearest(x, all_of) for x, all_of in zip(w.reshape(-1).tolist(), each, strict=True)]
    assert target.project(w, params).reshape(-1).tolist() == expected


@pytest.mark.parametrize("name", LISTED)
def test_a_fit_does_not_hang_on_the_default_dtype(name: str) -> None:
    w = torch.randn(6, 10, dtype=torch.float32)
    params = LISTED[name].fit(w)
    torch.set_default_dtype(torch.float64)
    again = LISTED[name].fit(w)
    for key, value in params.tensors.items():
        assert again[key].dtype == value.dtype and torch.equal(again[key], value)


@pytest.mark.parametrize("name", LISTED)
def test_the_order_of_strides_changes_nothing(name: str) -> None:
    w = torch.randn(6, 4, 3, 3)
    other = w.to(memory_format=torch.channels_last)
    target = LISTED[name]
    params, again = target.fit(w), target.fit(other)
    assert all(torch.equal(params[key], again[key]) for key in params.tensors)
    assert torch.equal(target.project(other, again), target.project(w, params))


def test_groups_have_the_sizes_they_say() -> None:
    for sample in awkward_samples():
        for groups in (dt.PerTensor(), dt.Channel(), dt.Group(size=4)):
            sizes = groups.sizes(sample.layout)
            assert torch.equal(sizes.double(), groups.sum(torch.ones(sample.layout.shape), sample.layout))
            matrix = groups.cut(sample.weight.detach().double(), sample.layout, torch.inf)
            assert torch.equal((matrix < torch.inf).sum(1), sizes)
            for row, size in zip(matrix, sizes.tolist(), strict=True):
                assert bool((row[size:] == torch.inf).all()), "the fill is not at the end"


# --- binary and ternary ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_binary_is_the_mean(granularity: Any) -> None:
    w = torch.randn(4, 7, dtype=torch.float64)
    w[1, 2] = 0.0
    target = dt.Binary(granularity=granularity)
    params = target.fit(w)
    for alpha, where in zip(params["scale"].tolist(), _GROUPS[granularity](w), strict=True):
        part = w.reshape(-1)[torch.from_numpy(where)].numpy()
        assert alpha == pytest.approx(reference.binary_alpha(part), rel=2**-23)
        least = sum((abs(float(x)) - alpha) ** 2 for x in part)
        for rival in np.linspace(0.5, 1.5, 41) * alpha:
            assert least <= sum((abs(float(x)) - rival) ** 2 for x in part) * (1 + 1e-12)


def test_the_sign_of_zero_is_plus() -> None:
    w = torch.tensor([0.0, -0.0, -1e-30, 3.0])
    for target in (dt.Binary(), dt.Binary(scale=None)):
        params = target.fit(w)
        assert torch.signbit(target.project(w, params)).tolist() == [False, False, True, False]


def test_without_a_scale_nothing_is_stored() -> None:
    w = torch.randn(3, 5)
    for target, values, bits in (
        (dt.Binary(scale=None), {-1.0, 1.0}, 16),
        (dt.Ternary(scale=None), {-1.0, 0.0, 1.0}, 32),
    ):
        params = target.fit(w)
        assert set(target.project(w, params).unique().tolist()) <= values
        form = target.form(w, params)
        assert [part.name for part in form.parts] == ["codes"] and 8 * form.nbytes == bits
        assert torch.equal(form.dense(), target.project(w, params))


@settings(max_examples=80)
@given(_SMALL)
def test_ternary_is_the_best_of_all_cuts(x) -> None:
    alpha, error = reference.ternary_alpha(x)
    w = torch.from_numpy(x)
    target = dt.Ternary()
    assert _error(target, w) <= error + 1e-6 * float((x**2).sum())
    if float(target.fit(w)["scale"]):  # the error of another a with the same error may do as well
        assert reference.squared_error(x, [-alpha, 0.0, alpha]) == pytest.approx(_error(target, w), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_ternary_is_the_reference(granularity: Any) -> None:
    w = torch.randn(4, 9, dtype=torch.float64)
    params = dt.Ternary(granularity=granularity).fit(w)
    for alpha, where in zip(params["scale"].tolist(), _GROUPS[granularity](w), strict=True):
        part = w.reshape(-1)[torch.from_numpy(where)].numpy()
        assert alpha == pytest.approx(reference.ternary_alpha(part)[0], rel=2**-23)


def test_the_exact_ternary_fit_beats_turns_of_two() -> None:
    """Alternation stops at a fixed point; over many small tensors it must lose somewhere and win nowhere."""
    lost = 0
    for seed in range(60):
        w = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3)
        exact, turns = _error(dt.Ternary(), w), _error(dt.Ternary(scale="alternate"), w)
        assert exact <= turns * (1 + 1e-6)
        lost += exact < turns * (1 - 1e-6)
    assert lost > 0


def test_ternary_in_pieces_is_ternary_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    size = torch.randn(5, 1000).abs()
    whole = line.ternary_scale(size)
    monkeypatch.setattr(line, "_PIECE", 37)
    assert torch.allclose(line.ternary_scale(size), whole, rtol=1e-13)


# --- the ADMM line's grids ---------------------------------------------------------------------------------------

_ALTERNATING = [
    (dt.Uniform(bits=3, range="alternate"), 3, True),
    (dt.Uniform(bits=2, range="alternate", zero=False), 2, False),
    (dt.Uniform(bits=4, range="alternate", zero=False), 8, False),
    (dt.Uniform(bits=8, range="alternate"), 127, True),
]


@pytest.mark.parametrize(("target", "n", "zero"), _ALTERNATING)
def test_alternation_is_the_reference_and_never_gets_worse(target, n, zero) -> None:
    for seed in range(5):
        w = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        w[:7] = 0.0
        _, errors = reference.alternate(w.numpy(), n, 12, zero)
        energy = float(w.square().sum())
        last = float("inf")
        for rounds in range(1, 13):
            fitted = type(target)(bits=target.bits, range="alternate", zero=zero, rounds=rounds)
            scale, _ = reference.alternate(w.numpy(), n, rounds, zero)
            assert float(fitted.fit(w)["scale"]) == pytest.approx(scale, rel=2**-23)
            assert errors[rounds - 1] <= last + 1e-14 * energy
            last = errors[rounds - 1]
            # Nearest integers for the last scale can only gain on those it was made for.
            assert _error(fitted, w) <= last + 1e-13 * energy


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_interval_is_the_reference(bits: int) -> None:
    w = torch.randn(30, dtype=torch.float64)
    scale = float(dt.Uniform(bits=bits, range="interval").fit(w)["scale"])
    assert scale == pytest.approx(reference.interval(w.numpy(), reference.most(bits)), rel=2**-22)


def test_a_grid_without_zero_uses_every_code() -> None:
    target = dt.Uniform(bits=3, range="minmax", zero=False)
    w = torch.tensor([-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    params = target.fit(w)
    assert target.project(w, params).tolist() == [-4.0, -3.0, -2.0, -1.0, 1.0, 1.0, 2.0, 3.0, 4.0]
    assert target.form(w, params).named["codes"].unique().tolist() == list(range(8))


@pytest.mark.parametrize("kind", ["mse", "alternate", "interval"])
@pytest.mark.parametrize("zero", [True, False])
def test_a_finer_grid_holds_the_coarser(kind: Any, zero: bool) -> None:
    w = torch.randn(200)
    trained = dt.Uniform(bits=3, range=kind, zero=zero)
    params = trained.fit(w)
    clicked = trained.project(w, params)
    finer, finer_params = trained.at_bits(clicked, params, 4)
    assert torch.equal(finer.project(clicked, finer_params), clicked)


def test_the_warp_refuses_a_grid_without_zero() -> None:
    w = torch.randn(5)
    target = dt.Uniform(bits=3, zero=False)
    with pytest.raises(ValueError, match="evenly spaced levels"):
        dt.PSG(gain=8.0, eps=0.1).warp(w, target, target.fit(w))


# --- powers of two -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_powers_are_the_reference(bits: int, zero: bool) -> None:
    n = 2 ** (bits - 1) - zero
    for seed in range(6):
        w = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0 ** (seed - 3)
        x, top = w.numpy(), reference.power_top(w.numpy())
        target = dt.PowerOfTwo(bits=bits, range="max", zero=zero)
        params = target.fit(w)
        levels = target.levels(params)
        assert levels is not None and levels.tolist() == reference.powers(top, n, zero)
        expected = [reference.nearest(v, reference.powers(top, n, zero)) for v in x.tolist()]
        assert target.project(w, params).tolist() == expected
        errors = {j: reference.squared_error(x, reference.powers(top - j, n, zero)) for j in range(4)}
        searched = dt.PowerOfTwo(bits=bits, zero=zero)
        assert float(searched.fit(w)["top"]) == top - min(errors, key=lambda j: errors[j])
        assert _error(searched, w) == pytest.approx(min(errors.values()), rel=1e-12)


@settings(max_examples=100)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_top_power_is_that_of_the_largest_weight(x) -> None:
    params = dt.PowerOfTwo(bits=3, range="max").fit(torch.tensor([x, -x / 3]))
    assert float(params["top"]) == reference.power_top(np.array([x]))


def test_a_boundary_of_powers_goes_down() -> None:
    """1.5 lies half-way between 1 and 2, 0.25 between 0 and 0.5."""
    target = dt.PowerOfTwo(bits=3, range="max")
    w = torch.tensor([2.0, 1.5, -1.5, 0.25, -0.25, 0.75, 1.5000001])
    assert target.project(w, target.fit(w)).tolist() == [2.0, 1.0, -2.0, 0.0, -0.5, 0.5, 2.0]


def test_more_powers_hold_what_clicked_on_fewer() -> None:
    w = torch.randn(300)
    for zero in (True, False):
        trained = dt.PowerOfTwo(bits=3, zero=zero)
        params = trained.fit(w)
        clicked = trained.project(w, params)
        finer, finer_params = trained.at_bits(clicked, params, 4)
        assert torch.equal(finer.project(clicked, finer_params), clicked)
        same, _ = trained.at_bits(w, params, 3)
        assert same is trained


def test_a_group_of_zeros_stays_zero_without_the_level_zero() -> None:
    w = torch.randn(3, 4)
    w[1] = 0.0
    for target in (
        dt.PowerOfTwo(bits=3, granularity="channel", zero=False),
        dt.Uniform(bits=3, granularity="channel", zero=False),
    ):
        q = target.project(w, target.fit(w))
        assert not bool(q[1].any()) and bool((q[[0, 2]] != 0).all())


# --- learned levels ----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(_SMALL, st.integers(2, 5), st.booleans())
def test_learned_levels_are_near_the_best_there_are(x, k, zero) -> None:
    """Never below the optimum; a fixed point of Lloyd's rounds; and exact where there are as many levels as values."""
    w = torch.from_numpy(x)
    target = dt.LearnedLevels(k=k, zero=zero)
    params = target.fit(w)
    energy = float((x**2).sum())
    assert _error(target, w) >= reference.best_levels(x, k, zero) - 1e-6 * energy
    q = target.project(w, params)
    for level in params["levels"].double().unique().tolist():
        served = x[q.numpy() == np.float32(level)]
        if len(served) and not (zero and level == 0):
            assert level == pytest.approx(served.mean(), rel=1e-6, abs=1e-7)
    if zero:
        assert 0.0 in params["levels"].tolist()[0]
    if len(set(x.tolist()) | ({0.0} if zero else set())) <= k:
        assert torch.equal(q.float(), w.float() + 0.0)


def test_learned_levels_are_the_best_on_average() -> None:
    """Local optima cost a few per cent over many small draws, and nothing on well-parted clusters."""
    mine, best = 0.0, 0.0
    for seed, k in itertools.product(range(15), (2, 4)):
        w = torch.randn(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mine += _error(dt.LearnedLevels(k=k), w)
        best += reference.best_levels(w.numpy(), k)
    assert best <= mine <= 1.05 * best
    centres = torch.tensor([-3.0, -1.0, 0.5, 4.0])
    w = (centres.unsqueeze(1) + 0.01 * torch.randn(4, 6)).double()
    assert _error(dt.LearnedLevels(k=4), w) == pytest.approx(reference.best_levels(w.numpy(), 4), rel=1e-5)


def test_lloyds_levels_of_a_normal_are_maxs() -> None:
    """The best 4 levels of a normal distribution: -+1.510, -+0.4528, error 0.1175 (Max 1960, table I)."""
    w = torch.randn(400_000, generator=torch.Generator().manual_seed(3))
    params = dt.LearnedLevels(k=4).fit(w)
    assert params["levels"][0].tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=0.01)
    assert _error(dt.LearnedLevels(k=4), w) / len(w) == pytest.approx(0.1175, rel=0.01)


def test_clicked_weights_are_found_again_exactly_however_many_there_are() -> None:
    """Long groups are summed up in runs first; a run across two values must not blur them."""
    values = torch.tensor([-0.7, -0.1, 0.0, 0.3, 0.31])
    w = values[torch.randint(5, (300_001,), generator=torch.Generator().manual_seed(0))]
    for target in (dt.LearnedLevels(k=5), dt.LearnedLevels(k=8), dt.LearnedLevels(k=5, zero=True)):
        assert torch.equal(target.project(w, target.fit(w)), w)


def test_a_value_too_rare_for_a_run_of_its_own_keeps_its_level() -> None:
    values = torch.linspace(-1, 1, 9)
    w = values[torch.randint(9, (300_000,), generator=torch.Generator().manual_seed(0)) // 2 * 2]
    w[7] = values[3]
    target = dt.LearnedLevels(k=256)
    assert torch.equal(target.project(w, target.fit(w)), w)


def test_runs_change_the_levels_by_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(2, 9001, dtype=torch.float64)
    target = dt.LearnedLevels(k=8, granularity="channel")
    exact = _error(target, w)
    monkeypatch.setattr(line, "_RUNS", 1000)
    monkeypatch.setattr(line, "_PIECE", 700)
    assert _error(target, w) == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize(("k", "far"), [(4, 1000.0), (16, -1000.0), (16, 100.0)])
def test_an_outlier_among_many_numbers_takes_one_level(k: int, far: float) -> None:
    """The mean of a run that the outlier ends must draw no level, and the outlier's own must not be lost."""
    w = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    w[17] = far
    by_hand = _error(dt.LearnedLevels(k=k - 1), w[w != far])  # and a level at the outlier, which has no error
    target = dt.LearnedLevels(k=k)
    params = target.fit(w)
    assert len(params["levels"].unique()) == k
    assert _error(target, w) < 1.01 * by_hand


def test_few_outliers_and_a_gap_take_one_level_each_in_groups_of_unequal_length() -> None:
    """Around -8 and 8 a level of more would save 0.0064 * 100,000, which is less than any outlier costs."""
    centres = torch.tensor([-8.0, 8.0]).repeat_interleave(100_000)
    near = centres + 0.1 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    w = torch.cat([near, torch.tensor([-50.0] * 3 + [70.0] * 2), near[:150_000]])[None]
    target = dt.LearnedLevels(k=4, granularity=dt.Group(size=200_005))
    params = target.fit(w)
    assert params["levels"][0].tolist() == pytest.approx([-50.0, -8.0, 8.0, 70.0], abs=0.01)
    assert float((target.project(w, params) - w).abs().max()) < 0.6  # six sigma, in the shorter group too


@pytest.mark.parametrize("name", ["learned-5-group", "power-3-no-zero"])
def test_placing_in_pieces_is_placing_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(9, 5, 4)
    target = TARGETS[name]
    params = target.fit(w)
    q = target.project(w, params)
    monkeypatch.setattr("detent.targets.forms._PIECE", 33)
    assert torch.equal(target.project(w, params), q)
    assert torch.equal(target.form(w, params).dense(), q)


def test_outliers_and_many_levels_leave_no_level_idle() -> None:
    """Evenly spaced starts leave nearly all levels empty here; they must be put to work."""
    w = torch.cat([torch.randn(500), torch.tensor([1e4, -1e4])])
    target = dt.LearnedLevels(k=16)
    params = target.fit(w)
    assert len(target.project(w, params).unique()) == 16
    assert _error(target, w) < 0.03 * float(w[:500].square().sum())


def test_adjacent_floats_are_told_apart() -> None:
    """The middle of two neighbouring numbers rounds onto one of them; each must still stay itself."""
    one = torch.tensor(1.0)
    up = one.nextafter(torch.tensor(2.0))
    for pair in ([one, up], [up, up.nextafter(torch.tensor(2.0))]):
        w = torch.stack(pair)
        target = dt.LearnedLevels(k=2)
        assert torch.equal(target.project(w, target.fit(w)), w)


def test_half_precision_weights_and_levels_have_numbers_in_common() -> None:
    w = (torch.randn(8, 9) * 30000).clamp(-65000, 65000)
    for dtype, store in itertools.product((torch.float16, torch.bfloat16), ("float16", "bfloat16", "float32")):
        target = dt.LearnedLevels(k=16, param_dtype=store)
        check_target(target, [w.to(dtype), (w * 1e-11).to(dtype)])


def test_a_code_beyond_the_levels_is_refused() -> None:
    w = torch.randn(6)
    target = dt.LearnedLevels(k=3)
    params = target.fit(w)
    form = target.form(w, params)
    values = [
        torch.full((6,), 3) if part.name == "codes" else v for part, v in zip(form.parts, form.values, strict=True)
    ]
    with pytest.raises(ValueError, match="'codes' holds 3, which must be below 3"):
        form.outline.form(values, form.layout, form.dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from the kernel")
@pytest.mark.parametrize(
    ("target", "shape", "dtype"),
    [
        ("dt.LearnedLevels(k=16)", (10_000_000,), torch.float32),
        ("dt.LearnedLevels(k=16)", (20_000_000,), torch.bfloat16),
        ("dt.Ternary()", (10_000_000,), torch.float32),
        ("dt.Ternary()", (20_000_000,), torch.bfloat16),
        ("dt.KernelCodebook(size=4)", (1000, 1000, 3, 3), torch.float32),
        ("dt.VectorCodebook(block=4, size=4)", (1000, 10_000), torch.float32),
        (
            "dt.SparseLevels(sparse=dt.TopK(keep=0.1), survivors=dt.LearnedLevels(k=4), rounds=1)",
            (1000, 10_000),
            torch.float32,
        ),
    ],
)
def test_a_fit_takes_a_few_copies_of_the_weights(target: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sorting with positions, or sums in float64 beside it, would take more than five; gains are in float64.

    Half precision is sorted as float32, which is two copies, and the pieces in float64 weigh twice as much beside it.
    """
    most = 6.5 if "Sparse" in target else 5.0 if "Vector" in target or dtype != torch.float32 else 4.0
    code = (
        "import torch, detent as dt\n"
        # Not ru_maxrss: a new process starts with that of the one that made it, and pytest's hid any growth.
        "peak = lambda: 1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        f"target = {target}\n"
        # A tenth of the weights first, for the buffers that the matrix products keep for pieces of this size.
        f"target.fit(torch.randn({(shape[0] // 10, *shape[1:])}))\n"
        f"w = torch.empty({shape}, dtype={dtype}).normal_()\n"
        "before = peak()\n"
        "target.fit(w)\n"
        "print((peak() - before) / (w.element_size() * w.numel()))\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        # The C library keeps freed blocks for later, as many as it likes: 2.7 copies here were 4.4 on another machine.
        env={
            "PYTHONPATH": str(root / "src"),
            "OMP_NUM_THREADS": "1",
            "PATH": "",
            "MALLOC_MMAP_THRESHOLD_": str(1 << 22),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 22),
        },
    )
    assert float(done.stdout) < most
