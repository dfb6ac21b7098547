"""Sparse targets and sparse targets on levels: against the slow references, by brute force, and on real layers."""

from __future__ import annotations

import itertools
import math
import resource
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import detent as dt
from detent.grouping import GranularityLike, granularity_of
from detent.targets import Sparse, composite, largest, patterns, sparse
from detent.testing import check_mechanism, check_pair, check_target

U3 = dt.Uniform(bits=3, range="minmax")


def key_of(layout: dt.Layout) -> tuple[tuple[int, ...], int, int]:
    return layout.shape, layout.channel_dim, layout.conv_groups


@st.composite
def tensors(draw: st.DrawFn, ties: bool | None = None) -> tuple[Tensor, dt.Layout]:
    """A small tensor of any rank, plain or of a transposed convolution; whole numbers tie."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    turned = len(shape) >= 2 and draw(st.booleans())
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if math.prod(shape[:1]) % g == 0])) if turned else 1
    layout = dt.Layout(shape=shape, channel_dim=int(turned), conv_groups=groups)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    whole = draw(st.booleans()) if ties is None else ties
    return ((w * 1.5).round() if whole else w), layout


def places(mask: Tensor) -> set[int]:
    return set(mask.reshape(-1).nonzero().reshape(-1).tolist())


# --- fast == reference -------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(tensors(), st.integers(1, 20), st.integers(1, 20), st.sampled_from(["channels", "columns"]))
def test_nm_is_sorting_in_each_block(sample, n, more, along) -> None:
    w, layout = sample
    target = dt.NM(n=n, m=n + more - 1, along=along)
    params = target.fit(w, layout)
    x = w.numpy()
    blocks = reference.nm_blocks(key_of(layout), target.m, along)
    kept = reference.keep_in_blocks(np.abs(x).reshape(-1), blocks, n)
    assert sorted(at for block in blocks for at in block) == list(range(w.numel()))
    assert places(target.mask(w, params)) == kept
    assert np.array_equal(target.project(w, params).numpy(), reference.zero_but(x, kept))
    assert (
        len(kept)
        == target.pattern(layout).survivors(layout)
        == int(params["count"])
        == sum(min(n, len(block)) for block in blocks)
    )


@settings(max_examples=150)
@given(
    tensors(),
    st.sampled_from(["filter", "channel", "column", "block"]),
    st.floats(0.01, 1.0),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_structured_is_sorting_the_groups(sample, group, keep, block) -> None:
    w, layout = sample
    tile = block if group == "block" else None
    target = dt.Structured(group=group, keep=keep, block=tile)
    params = target.fit(w, layout)
    x = w.numpy()
    groups = reference.structured_groups(key_of(layout), group, tile)
    count = max(1, round(keep * len(groups)))
    assert int(params["groups"]) == count
    kept = reference.keep_groups(x.reshape(-1) ** 2, groups, count)
    assert places(target.mask(w, params)) == kept
    assert np.array_equal(target.project(w, params).numpy(), reference.zero_but(x, kept))


@settings(max_examples=60)
@given(st.lists(tensors(), min_size=1, max_size=4), st.floats(0.01, 1.0), st.sampled_from(["filter", "column"]))
def test_structured_over_a_model_shares_out_by_mean_square(samples, keep, group) -> None:
    target = dt.Structured(group=group, keep=keep, scope="model")
    weights, layouts = [w for w, _ in samples], [layout for _, layout in samples]
    fitted = target.fit_model(weights, layouts, [None] * len(weights))
    rows = []
    for index, (w, layout) in enumerate(samples):
        flat = w.numpy().reshape(-1)
        for group_of in reference.structured_groups(key_of(layout), group):
            squares = [float(flat[at]) ** 2 for at in group_of]
            rows += [(math.fsum(squares) / len(squares), index)]
    total = max(1, round(keep * len(rows)))
    assert sum(int(params["groups"]) for params in fitted) == total
    best = sorted(range(len(rows)), key=lambda g: -rows[g][0])[:total]
    counts = [sum(rows[g][1] == index for g in best) for index in range(len(weights))]
    margin = sorted((row[0] for row in rows), reverse=True)
    tied = total < len(rows) and math.isclose(margin[total - 1], margin[total], rel_tol=1e-12)
    if not tied:  # a sum of floats may fall to either side of another one that is equal on paper
        assert [int(params["groups"]) for params in fitted] == counts


def test_equal_groups_are_kept_by_position() -> None:
    """Sums of floats in another order differ in the last bit: equal groups must be added up alike wherever they lie."""
    for rows, columns in itertools.product((7, 64, 301), (9, 64, 131)):
        one = torch.randn(rows, 1, generator=torch.Generator().manual_seed(rows))
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            w = one.to(dtype).expand(rows, columns)
            for same, group in ((w, "column"), (w.t(), "filter"), (w.contiguous(), "column")):
                target = dt.Structured(group=group, keep=5)  # type: ignore[arg-type]
                mask = target.mask(same, target.fit(same))
                kept = mask.any(0 if group == "column" else 1)
                assert places(kept) == set(range(5)), (rows, columns, dtype, group)


def test_ranking_by_pieces_is_ranking_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w = (torch.randn(37, 60) * 2).round()
    for m in (4, 20):
        target = dt.NM(n=2, m=m)
        whole = target.project(w, target.fit(w))
        monkeypatch.setattr(sparse, "_PIECE", 50)
        monkeypatch.setattr(largest, "_PIECE", 50)
        assert torch.equal(target.project(w, target.fit(w)), whole)
        monkeypatch.undo()


def test_squares_of_extreme_weights_still_rank() -> None:
    """A square of 1e-200 is zero and of 1e200 infinite, and the larger row must be kept all the same."""
    for size in (1e-300, 1e-200, 1.0, 1e200, 1e300):
        w = torch.tensor([[1.0, 2.0], [2.0, 2.0], [1.0, 1.0]], dtype=torch.float64) * size
        target = dt.Structured(group="filter", keep=1)
        assert places(target.mask(w, target.fit(w)).any(1)) == {1}


# --- what the groups mean on real layers -------------------------------------------------------------------------


def masked(layer: nn.Module, target: dt.Target) -> tuple[nn.Module, dt.Layout]:
    plan = dt.Recipe([dt.Rule(match="weight", target=target)]).resolve(layer)
    layout = plan.claimed[0].layout
    weight: Any = layer.weight
    with torch.no_grad():
        weight.copy_(target.project(weight, target.fit(weight, layout)))
    return layer, layout


LAYERS = {
    "linear": lambda: (nn.Linear(6, 8, bias=False), (5, 6)),
    "conv": lambda: (nn.Conv2d(6, 8, 3, bias=False), (5, 6, 4, 4)),
    "conv of 2 groups": lambda: (nn.Conv2d(6, 8, 3, bias=False, groups=2), (5, 6, 4, 4)),
    "transposed": lambda: (nn.ConvTranspose2d(6, 8, 3, bias=False), (5, 6, 4, 4)),
    "transposed of 2 groups": lambda: (nn.ConvTranspose2d(6, 8, 3, bias=False, groups=2), (5, 6, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dropped_filter_is_a_silent_output(kind: str) -> None:
    layer, shape = LAYERS[kind]()
    masked(layer, dt.Structured(group="filter", keep=3))
    out = layer(torch.randn(shape))
    silent = [not bool(out[:, channel].any()) for channel in range(8)]
    assert sum(silent) == 5


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dropped_channel_is_an_unread_input(kind: str) -> None:
    layer, shape = LAYERS[kind]()
    groups = 2 if "groups" in kind else 1
    masked(layer, dt.Structured(group="channel", keep=2))
    x = torch.randn(shape)
    out, read = layer(x), []
    for channel in range(6):
        other = x.clone()
        other[:, channel] += 1.0
        read.append(not torch.equal(layer(other), out))
    assert sum(read) == 2 * groups
    assert read[: 6 // groups] * groups == read, "in a layer of groups a channel is one input of each of them"


def test_two_of_four_is_the_hardwares_order() -> None:
    """2:4 hardware reads a convolution as (out, kernel, in): two of every four inputs at one kernel position."""
    conv = nn.Conv2d(10, 6, 3, bias=False)
    original = conv.weight.detach().clone()
    masked(conv, dt.NM(n=2, m=4))
    runs = conv.weight.detach().permute(0, 2, 3, 1)
    full, last = runs[..., :8].reshape(-1, 4), runs[..., 8:].reshape(-1, 2)
    assert bool(((full != 0).sum(1) == 2).all()) and bool((last != 0).all())
    sizes = original.permute(0, 2, 3, 1)[..., :8].reshape(-1, 4).abs()
    assert torch.equal(full.abs().sum(1), sizes.topk(2, dim=1).values.sum(1))
    columns = nn.Conv2d(10, 6, 3, bias=False)
    masked(columns, dt.NM(n=2, m=4, along="columns"))
    gemm = columns.weight.detach().reshape(6, 90)
    assert bool(((gemm[:, :88].reshape(-1, 4) != 0).sum(1) == 2).all()) and bool((gemm[:, 88:] != 0).all())


def test_a_depthwise_convolution_has_nothing_to_leave_out() -> None:
    conv = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    masked(conv, dt.NM(n=1, m=4))
    assert bool((conv.weight != 0).all())
    masked(conv, dt.NM(n=1, m=4, along="columns"))
    assert int((conv.weight != 0).sum()) == 8 * 3  # of 9 positions: 1 of 4, 1 of 4, and the one left


# --- what an earlier pruning left --------------------------------------------------------------------------------


def test_keeping_what_is_not_zero() -> None:
    w = torch.randn(6, 7)
    w[w.abs() < 0.5] = 0.0
    target = dt.TopK(keep="nonzero")
    params = target.fit(w)
    assert int(params["count"]) == int((w != 0).sum()) and 0 < int(params["count"]) < w.numel()
    assert torch.equal(target.project(w, params), w)
    assert torch.equal(target.free(w, params), w != 0)
    moved = torch.where(w != 0, w * 3 + w.sign(), torch.full_like(w, 1e-3))  # a step touched the rest
    assert torch.equal(target.project(moved, params) != 0, w != 0)
    empty = target.fit(torch.zeros(3, 3))
    assert int(empty["count"]) == 0 and not bool(target.project(torch.ones(3, 3), empty).any())
    layouts = [params.layout, dt.Layout(shape=(2, 7))]
    spread = dt.TopK(keep="nonzero", scope="model").fit_model([w, w[:2]], layouts, [None, None])
    assert [int(p["count"]) for p in spread] == [int((w != 0).sum()), int((w[:2] != 0).sum())]


def test_retraining_what_is_not_zero_keeps_the_pattern() -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 9)
    masked(model, dt.TopK(keep=0.2))
    pattern = model.weight.detach() != 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = dt.Rule(match="weight", target=dt.TopK(keep="nonzero"), mechanism=dt.HardProjection(every=1), fit_until=1)
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=20)
    before = model.weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
    run.finalize()
    assert torch.equal(model.weight.detach() != 0, pattern) and not torch.equal(model.weight, before)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize(
    "mechanism",
    [
        dt.STE(),
        dt.ADMM(every=0.1, until=0.5),
        dt.HardProjection(every=5),
        dt.BinaryRelax(),
        dt.Penalty(strength=0.1),
        dt.PSG(gain=8.0, toward=dt.Zero()),
    ],
    ids=lambda mechanism: type(mechanism).__name__,
)
def test_what_is_not_zero_is_counted_once(mechanism: dt.Mechanism, levels: bool, scope: Any) -> None:
    """Nothing holds the zeros between fits: counted again from weights that have moved, it was all of them."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16, bias=False)
    masked(model, dt.TopK(keep=51))
    target: dt.Target = dt.TopK(keep="nonzero", scope=scope)
    if levels:
        target = dt.SparseLevels(sparse=target, survivors=dt.Uniform(bits=4, zero=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rule = dt.Rule(match="weight", target=target, mechanism=mechanism)
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=120)
    for step in range(120):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).sub(1).square().mean().backward()
        optimizer.step()
        if step == 60:
            with run.compressed():
                assert int((model.weight != 0).sum()) == 51
    run.finalize()
    assert int((model.weight != 0).sum()) == 51


def test_adopted_weights_are_counted_afresh() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16, bias=False)
    masked(model, dt.TopK(keep=51))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for mechanism in (dt.STE(), dt.PSG(gain=8.0, toward=dt.Zero()), dt.ADMM(every=0.1)):
        rule = dt.Rule(match="weight", target=dt.TopK(keep="nonzero"), mechanism=mechanism)
        run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=20)
        with torch.no_grad():
            model.weight.copy_(torch.eye(16))
        run.rebind(adopt=True)
        with run.compressed():
            assert int((model.weight != 0).sum()) == 16
        run.detach()


def test_fewer_survivors_than_asked_for(tmp_path: Path) -> None:
    """Weights that are zero stay so; only blocks, which are written by the number of their pattern, are filled up."""
    w = torch.tensor([[3.0, 0.0, 0.0, -1.0], [0.0, 0.0, 2.0, 0.0]])
    for few in (dt.TopK(keep=5), dt.TopK(keep=8), dt.Structured(group="column", keep=4)):
        target = dt.SparseLevels(sparse=few, survivors=dt.Binary(granularity="channel"))
        params = target.fit(w)
        q = target.project(w, params)
        if isinstance(few, dt.Structured):
            assert ((q == 0).all(0)).tolist() == [False, True, False, False]
        else:
            assert q.tolist() == [[2.0, 0.0, 0.0, -2.0], [0.0, 0.0, 2.0, 0.0]], "levels of survivors alone"
        assert torch.equal(target.form(w, params).dense(), q) and torch.equal(target.project(q, params), q)
        model = nn.Linear(4, 2, bias=False)
        model.weight.data.copy_(w)
        dt.save(dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=target)])), tmp_path / "x", "compressed")
        other = nn.Linear(4, 2, bias=False)
        dt.load(tmp_path / "x", other, "compressed")
        assert torch.equal(other.weight, q)
    target = dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=dt.Binary(granularity="channel"))
    assert ((target.project(w, target.fit(w)) != 0).sum(1) == 2).all()


# --- bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", range(1, 9))
def test_patterns_are_numbered_without_a_gap(m: int) -> None:
    for n in range(1, m + 1):
        masks = torch.tensor([[i in kept for i in range(m)] for kept in itertools.combinations(range(m), n)])
        layout = dt.Layout(shape=tuple(masks.shape))
        blocks = patterns.Blocks(n=n, m=m)
        values = blocks.values(masks, layout)
        if n < m:
            assert sorted(values[0].tolist()) == list(range(math.comb(m, n)))
            assert blocks.parts(layout)[0].width == math.ceil(math.log2(math.comb(m, n)))
        assert torch.equal(blocks.mask(values, layout), masks)


@pytest.mark.parametrize(
    ("n", "m", "widths"), [(8, 32, [16, 8]), (25, 32, [16, 6]), (17, 40, [16, 16, 5]), (50, 100, [1])]
)
def test_long_patterns_take_several_streams_or_a_bitmap(n: int, m: int, widths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(50, m, generator=generator).argsort(dim=1) < n
    blocks, layout = patterns.Blocks(n=n, m=m), dt.Layout(shape=(50, m))
    values = blocks.values(masks, layout)
    assert [part.width for part in blocks.parts(layout)] == widths and len(values) == len(widths)
    assert sum(widths) == (math.comb(m, n) - 1).bit_length() or widths == [1]
    assert torch.equal(blocks.mask(values, layout), masks)


def test_patterns_are_numbered_by_their_last_place_first() -> None:
    """The combinatorial number system, counted out: files of any release mean the same pattern."""
    m, n = 9, 3
    by_last = sorted(itertools.combinations(range(m), n), key=lambda kept: kept[::-1])
    masks = torch.tensor([[i in kept for i in range(m)] for kept in by_last])
    layout = dt.Layout(shape=tuple(masks.shape))
    assert patterns.Blocks(n=n, m=m).values(masks, layout)[0].tolist() == list(range(math.comb(m, n)))
    # Of the rarer kind: six of nine are numbered by the three that are not there.
    assert patterns.Blocks(n=m - n, m=m).values(~masks, layout)[0].tolist() == list(range(math.comb(m, n)))


@pytest.mark.parametrize(
    "target",
    [
        dt.NM(n=1, m=2**31),
        dt.NM(n=3, m=500_000),
        dt.NM(n=2, m=2**31, along="columns"),
        dt.Uniform(bits=2, granularity=dt.Group(size=2**62)),
        dt.LearnedLevels(k=256, granularity=dt.Group(size=10**400)),
        dt.Structured(group="block", keep=0.5, block=(10**400, 2**62)),
        dt.TopK(keep=0.5),
        dt.VectorCodebook(block=1, size=65536, sample=10**400),
    ],
    ids=repr,
)
def test_a_field_takes_no_more_than_the_tensor(target: dt.Target) -> None:
    """Blocks, groups and codebooks longer than a line are as long as the line, in memory and in time."""
    w = torch.randn(30, 90, generator=torch.Generator().manual_seed(0))
    tracemalloc.start()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    params = target.fit(w)
    form = target.form(w, params)
    back = form.outline.form(form.values, form.layout, form.dtype)
    assert torch.equal(back.dense(), target.project(w, params))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 10
    assert taken < 1 << 25 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB


def test_a_group_longer_than_its_channel_is_the_channel() -> None:
    w = torch.randn(5, 7, 3)
    long, whole = (dt.Uniform(bits=3, granularity=g) for g in (dt.Group(size=2**40), dt.Channel()))
    assert torch.equal(long.fit(w)["scale"], whole.fit(w)["scale"])
    assert torch.equal(long.project(w, long.fit(w)), whole.project(w, whole.fit(w)))


def test_two_of_four_costs_three_bits_a_block() -> None:
    w = torch.randn(10, 18)  # in each row four blocks of 4 and a last one of 2, which is kept whole and costs no bits
    target = dt.NM(n=2, m=4)
    params = target.fit(w)
    form = target.form(w, params)
    assert 8 * form.nbytes == 10 * 4 * 3 + 10 * (4 * 2 + 2) * 32
    assert [(p.name, p.width, p.count) for p in form.parts] == [("positions", 3, 40), ("values", 32, 100)]
    short = dt.NM(n=1, m=4)  # 1 of 4: 2 bits; 1 of the last 2: 1 bit
    assert 8 * short.form(w, short.fit(w)).nbytes == 10 * 4 * 2 + 16 + 10 * 5 * 32


def test_the_price_of_groups_and_of_survivors_on_levels() -> None:
    w = torch.randn(8, 6, 3, 3)
    filters = dt.Structured(group="filter", keep=3)
    assert 8 * filters.form(w, filters.fit(w)).nbytes == 8 + 3 * 54 * 32
    both = dt.SparseLevels(sparse=filters, survivors=dt.Uniform(bits=3))
    assert 8 * both.form(w, both.fit(w)).nbytes == 8 + 8 * math.ceil(3 * 54 * 3 / 8) + 32
    two = dt.SparseLevels(sparse=dt.NM(n=2, m=6), survivors=dt.Uniform(bits=4, granularity="channel"))
    assert 8 * two.form(w, two.fit(w)).nbytes == 72 * 4 + 72 * 2 * 4 + 8 * 32


def test_the_price_is_of_the_tiles_that_are_kept() -> None:
    """Tiles at the edges are smaller: where those are kept, fewer weights survive, and a file says how many."""
    target: Any
    for target in (
        dt.Structured(group="block", keep=0.4, block=(3, 4)),
        dt.SparseLevels(sparse=dt.Structured(group="block", keep=0.4, block=(3, 4)), survivors=U3),
    ):
        w = torch.randn(7, 9)
        params = target.fit(w)
        for edge in (False, True):
            other = w.clone()
            other[6, :] *= 100.0 if edge else 1e-3
            form, q = target.form(other, params), target.project(other, params)
            *_, (part, codes) = zip(form.parts, form.values, strict=True)
            assert part.is_listed and codes.numel() == int((q != 0).sum() if part.width == 32 else form.mask.sum())
            assert torch.equal(form.outline.form(form.values, form.layout, form.dtype).dense(), q)


def test_a_number_of_no_pattern_is_told() -> None:
    target = dt.NM(n=2, m=4)
    w = torch.randn(2, 8)
    params = target.fit(w)
    form = target.form(w, params)
    bad = torch.tensor([0, 7, 1, 2])  # 6 patterns: 0 to 5
    with pytest.raises(ValueError, match="'positions' holds 7, which must be below 6"):
        form.outline.form((bad, *form.values[1:]), form.layout, form.dtype)
    with pytest.raises(ValueError, match="a number of no pattern of 2 in 4"):
        patterns.Blocks(n=2, m=4).mask((bad,), form.layout)


# --- sparse and on levels: exact, by brute force -----------------------------------------------------------------


def patterns_of(target: Sparse, layout: dt.Layout, count: int) -> list[set[int]]:
    """Every allowed pattern with all its places used."""
    key = key_of(layout)
    if isinstance(target, dt.TopK):
        return [set(kept) for kept in itertools.combinations(range(layout.numel), count)]
    if isinstance(target, dt.NM):
        blocks = reference.nm_blocks(key, target.m, target.along)
        choices = [list(itertools.combinations(block, min(target.n, len(block)))) for block in blocks]
        return [{at for part in parts for at in part} for parts in itertools.product(*choices)]
    assert isinstance(target, dt.Structured)
    groups = reference.structured_groups(key, target.group, target.block)
    return [{at for group in kept for at in group} for kept in itertools.combinations(groups, count)]


SPARSE: dict[str, tuple[Sparse, tuple[int, ...]]] = {
    "top-k": (dt.TopK(keep=3), (2, 4)),
    "2 of 3": (dt.NM(n=2, m=3), (1, 5)),
    "rows": (dt.Structured(group="filter", keep=2), (4, 2)),
    "columns": (dt.Structured(group="column", keep=1), (3, 3)),
    "tiles": (dt.Structured(group="block", keep=2, block=(2, 1)), (3, 2)),
}
LEVELS: dict[str, dt.Target] = {
    "ternary grid": dt.Uniform(bits=2),
    "grid a row": dt.Uniform(bits=3, range="minmax", granularity="channel"),
    "ternary grid a row": dt.Uniform(bits=2, granularity="channel"),
    "without zero": dt.Binary(),
    "without zero, a row": dt.Binary(granularity="channel"),
    "powers without zero": dt.PowerOfTwo(bits=2, zero=False, granularity="channel"),
    "learned": dt.LearnedLevels(k=3),
}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", SPARSE)
def test_the_joint_projection_is_the_nearest_of_all(kind: str, levels: str) -> None:
    """All patterns times all ways of putting survivors on levels: none is nearer. Ties, zeros and other weights too."""
    few, shape = SPARSE[kind]
    target = dt.SparseLevels(sparse=few, survivors=LEVELS[levels])
    assert target.is_exact
    layout = dt.Layout(shape=shape)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        params = target.fit(w if seed % 3 else w * 2, layout)
        if seed % 2:
            w = (w * 2).round() / 2
        listed = _listed(target.survivors, params, w)
        count = int(params.tensors.get("pattern.count", params.tensors.get("pattern.groups", torch.tensor(0))))
        least = reference.nearest_on_levels(w.numpy(), listed, patterns_of(few, layout, count))
        q = target.project(w, params)
        assert float((w - q).square().sum()) == pytest.approx(least, rel=1e-9, abs=1e-12)
        assert torch.equal(target.form(w, params).dense(), q)


def _listed(survivors: dt.Target, params: dt.Params, w: Tensor) -> list[list[float]]:
    """Values each weight may take if kept: from the definitions, or as the target lists them."""
    if isinstance(survivors, (dt.Uniform, dt.Binary)):
        n = reference.most(survivors.bits) if isinstance(survivors, dt.Uniform) else 1
        steps = torch.tensor([i for i in range(-n, n + 1) if i or isinstance(survivors, dt.Uniform)])
        values = (
            granularity_of(survivors.granularity).expand(params["scale"].double(), params.layout)[..., None] * steps
        )
    else:
        listed = survivors.levels(params)
        assert listed is not None
        values = listed
    return values.broadcast_to((*w.shape, values.shape[-1])).reshape(w.numel(), -1).tolist()


@settings(max_examples=40)
@given(tensors(), st.floats(0.05, 1.0), st.sampled_from([dt.Uniform(bits=3), dt.Binary()]))
def test_on_one_mirrored_set_of_levels_the_largest_gain_is_the_largest_weight(sample, keep, survivors) -> None:
    """The slope of w^2 - (w - q)^2 is 2q and it has no jumps, so it grows with |w| where all weights share +-q."""
    w, layout = sample
    few = dt.TopK(keep=keep)
    both = dt.SparseLevels(sparse=few, survivors=survivors)
    params = both.fit(w, layout)
    kept = few.mask(w, few.fit(w, layout)) & (w != 0)  # what is zero has been pruned
    apart = torch.where(kept, survivors.project(w, params), 0.0)
    error, other = ((w - q).square().sum() for q in (both.project(w, params), apart))
    assert float(error) == pytest.approx(float(other), rel=1e-12, abs=1e-12)


def test_the_largest_weight_is_not_always_the_largest_gain() -> None:
    """Where levels end at 0.3 a weight of 2 gains little; a smaller one on a grid that suits it stays instead."""
    target = dt.SparseLevels(
        sparse=dt.TopK(keep=1), survivors=dt.Uniform(bits=3, range="minmax", granularity="channel")
    )
    fitted = target.fit(torch.tensor([[3.0, 0.0], [3.0, 0.0]]))
    scale = torch.tensor([0.1, 1.0])  # the first row ends at 0.3, the second has 1, 2, 3
    params = dt.Params(tensors={**fitted.tensors, "scale": scale}, layout=fitted.layout)
    w = torch.tensor([[2.0, 0.0], [1.1, 0.0]])  # gains: 4 - 1.7^2 = 1.11 and 1.21 - 0.01 = 1.2
    assert target.project(w, params).tolist() == [[0.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("levels", ["ternary grid a row", "without zero, a row"])
def test_turns_never_add_error_and_often_take_some(levels: str) -> None:
    better = 0
    for seed in range(20):
        w = torch.randn(12, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        errors = []
        for rounds in (1, 2, 4, 8):
            target = dt.SparseLevels(sparse=dt.TopK(keep=0.3), survivors=LEVELS[levels], rounds=rounds)
            errors.append(float((w - target.project(w, target.fit(w))).square().sum()))
        assert all(b <= a for a, b in itertools.pairwise(errors))
        better += errors[-1] < errors[0]
    assert better >= 5
    # By turns is never worse than pruning first and fitting levels to all weights with the zeros among them.
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    pruned = dt.TopK(keep=0.2).project(w, dt.TopK(keep=0.2).fit(w))
    plain = dt.Binary()
    biased = torch.where(pruned != 0, plain.project(pruned, plain.fit(pruned)), 0.0)
    joint = dt.SparseLevels(sparse=dt.TopK(keep=0.2), survivors=plain)
    assert float((w - joint.project(w, joint.fit(w))).square().sum()) < 0.5 * float((w - biased).square().sum())


@pytest.mark.parametrize("granularity", ["tensor", "channel", dt.Group(size=4)])
def test_levels_are_fitted_to_survivors_alone(granularity: GranularityLike) -> None:
    """A row without a survivor has no level; every other one has the mean |w| of its survivors, however many."""
    w = torch.randn(9, 10, dtype=torch.float64)
    w[4] *= 1e-3
    target = dt.SparseLevels(sparse=dt.TopK(keep=0.3), survivors=dt.Binary(granularity=granularity), rounds=1)
    params = target.fit(w)
    mask = dt.TopK(keep=0.3).mask(w, dt.TopK(keep=0.3).fit(w))
    groups = granularity_of(granularity)
    marks = groups.expand(torch.arange(float(groups.count(params.layout))), params.layout).broadcast_to(w.shape)
    seen = set()
    for group, alpha in enumerate(params["scale"].tolist()):
        mine = w[(marks == group) & mask].abs()
        seen.add(len(mine))
        assert alpha == pytest.approx(float(mine.mean()) if len(mine) else 0.0, rel=1e-6)
    assert granularity == "tensor" or (0 in seen and len(seen) > 3), "ragged groups were meant to be tried"


def test_running_ranges_go_on_under_a_pattern() -> None:
    both = dt.SparseLevels(sparse=dt.TopK(keep=0.5), survivors=dt.Uniform(bits=4, range="ema"), rounds=1)
    first = torch.tensor([[1.0, -2.0], [0.1, 0.2]])
    params = both.fit(first)
    params = both.fit(first * 2, previous=params)
    assert float(params["low"]) == pytest.approx(0.9 * -2.0 + 0.1 * -4.0)
    assert float(params["high"]) == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", dt.Group(size=3)])
@pytest.mark.parametrize("kind", ["top-k", "2 of 3", "rows", "tiles"])
def test_levels_without_zero_keep_the_laws(kind: str, granularity: GranularityLike) -> None:
    few = {"top-k": dt.TopK(keep=0.3, scope="model")}.get(kind, SPARSE[kind][0])
    few = dt.Structured(group="filter", keep=0.5) if kind == "rows" else few
    few = dt.Structured(group="block", keep=0.5, block=(2, 3)) if kind == "tiles" else few
    target = dt.SparseLevels(sparse=few, survivors=dt.Binary(granularity=granularity))
    check_target(target)
    w = torch.randn(5, 8)
    q = target.project(w, target.fit(w))
    assert int((q != 0).sum()) == int(target.sparse.mask(w, target.sparse.fit(w)).sum()), "every survivor has a level"


@pytest.mark.parametrize(
    "survivors",
    [
        dt.Binary(scale=None),
        dt.Ternary(granularity="channel"),
        dt.PowerOfTwo(bits=3, zero=False),
        dt.PowerOfTwo(bits=3, zero=False, granularity="channel"),
        dt.LearnedLevels(k=4),
        dt.LearnedLevels(k=5, granularity=dt.Group(size=6), param_dtype="float16"),
        dt.LearnedLevels(k=4, zero=True, granularity="channel"),
        dt.Uniform(bits=3, zero=False, range="alternate", granularity="channel"),
    ],
    ids=repr,
)
def test_any_levels_keep_the_laws_under_a_pattern(survivors: dt.Target) -> None:
    check_target(dt.SparseLevels(sparse=dt.TopK(keep=0.4), survivors=survivors))


def test_levels_without_zero_train() -> None:
    for survivors in (dt.Binary(), dt.Binary(granularity="channel")):
        target = dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=survivors)
        for mechanism in (dt.PSG(gain=8.0), dt.STE(), dt.HardProjection(every=3)):
            check_pair(target, mechanism)
    check_mechanism(dt.STE(), dt.SparseLevels(sparse=dt.TopK(keep=0.4), survivors=dt.Binary(granularity="channel")))


# --- in use ------------------------------------------------------------------------------------------------------


def test_survivors_at_another_width() -> None:
    """`compressed(bits=...)` reaches the levels through the pattern; the pattern's rule stays."""
    model = nn.Linear(20, 10)
    both = dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=dt.Uniform(bits=4))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=both)]))
    errors = []
    for bits in (2, 4, 8):
        with run.compressed(bits=bits):
            w = model.weight.detach().clone()
        assert bool(((w.reshape(-1, 4) != 0).sum(1) <= 2).all()) and len(w.unique()) <= 2**bits - 1
        errors.append(float((w - model.weight.detach()).square().sum()))
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ValueError, match="has no bit-width to change"):
        fixed = dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=dt.Binary())
        fixed.at_bits(model.weight, fixed.fit(model.weight), 3)


def test_counts_hold_while_training() -> None:
    """Hard projection onto rows, tiles and blocks: the exact number is there after every projection."""
    for target, count in (
        (dt.Structured(group="filter", keep=3), lambda w: int(w.any(1).sum()) == 3),
        (dt.Structured(group="block", keep=4, block=(2, 3)), lambda w: int((w != 0).sum()) == 24),
        (dt.NM(n=1, m=3), lambda w: bool(((w.reshape(-1, 3) != 0).sum(1) == 1).all())),
    ):
        torch.manual_seed(0)
        model = nn.Linear(6, 8, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        rule = dt.Rule(match="weight", target=target, mechanism=dt.HardProjection(every=4))
        dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=12)
        for step in range(12):
            optimizer.zero_grad()
            (model(torch.randn(16, 6)) - 1).square().mean().backward()
            optimizer.step()
            assert step < 3 or count(model.weight.detach()), (target, step)


def test_every_kind_comes_back_from_a_file(tmp_path: Path) -> None:
    kinds = [
        dt.TopK(keep="nonzero"),
        dt.NM(n=2, m=4),
        dt.NM(n=8, m=32, along="columns"),
        dt.NM(n=50, m=100, along="columns"),
        dt.Structured(group="filter", keep=0.3),
        dt.Structured(group="channel", keep=0.3),
        dt.Structured(group="column", keep=0.3),
        dt.Structured(group="block", keep=0.3, block=(3, 4)),
        dt.Structured(group="column", keep=0.2, scope="model"),
        dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=dt.Uniform(bits=4, granularity="channel")),
        dt.SparseLevels(sparse=dt.TopK(keep=0.1, scope="model"), survivors=dt.Uniform(bits=3)),
        dt.SparseLevels(sparse=dt.Structured(group="block", keep=0.3, block=(3, 4)), survivors=dt.Uniform(bits=8)),
    ]
    for target in kinds:
        layers = [nn.Conv2d(5, 6, 3), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Linear(7, 9), nn.Embedding(11, 5)]
        model = nn.ModuleList(layers).half() if isinstance(target, dt.NM) else nn.ModuleList(layers)
        recipe = dt.Recipe([dt.Rule(match="weight", target=target)])
        assert dt.Recipe.from_yaml(recipe.to_yaml()) == recipe
        run = dt.compress(model, recipe)
        with run.compressed():
            wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
        dt.save(run, tmp_path / "model.detent", "compressed")
        for p in model.parameters():
            p.data.fill_(7.0)
        dt.load(tmp_path / "model.detent", model, "compressed")
        for name, p in model.named_parameters():
            assert torch.equal(p, wanted[name]), (target, name)


@pytest.mark.parametrize("keep", [2, 5, 9, 14])
def test_lamp_shares_a_count_out_as_its_definition_says(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    weights = [torch.randn(2, 4, generator=generator), 0.01 * torch.randn(3, 3, generator=generator)]
    scores = []
    for index, w in enumerate(weights):
        values = w.reshape(-1).double().square().tolist()
        scores += [(v / sum(u for u in values if u >= v), index) for v in values]
    chosen = [index for _, index in sorted(scores, reverse=True)[:keep]]
    target = dt.TopK(keep=keep, scope="model", share="lamp")
    fitted = target.fit_model(weights, [dt.Layout(shape=tuple(w.shape)) for w in weights], [None, None])
    assert [int(params["count"]) for params in fitted] == [chosen.count(0), chosen.count(1)]
    assert chosen.count(1) >= 1  # by magnitude alone the small tensor would be emptied
    plain = dt.TopK(keep=keep, scope="model")
    alone = plain.fit_model(weights, [dt.Layout(shape=tuple(w.shape)) for w in weights], [None, None])
    assert keep > 8 or int(alone[1]["count"]) == 0


def test_lamp_of_three_weights_is_its_equation() -> None:
    score = dt.TopK(keep=2, scope="model", share="lamp")._score(torch.tensor([1.0, 2.0, 3.0]))
    assert score.tolist() == pytest.approx([1 / 14, 4 / 13, 1.0])


def test_lamp_of_ties_and_zeros_keeps_the_count() -> None:
    weights = [torch.tensor([0.0, 1.0, 1.0, -1.0]), torch.zeros(3), torch.tensor([2.0, 0.0])]
    for keep in range(1, 10):
        target = dt.TopK(keep=keep, scope="model", share="lamp")
        fitted = target.fit_model(weights, [dt.Layout(shape=tuple(w.shape)) for w in weights], [None] * 3)
        assert sum(int(params["count"]) for params in fitted) == keep


def test_gains_and_ranks_in_pieces_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also among gains that only float64 tells apart, where float32 ranks first."""
    near = 1.0 + torch.randint(9, (40, 25), generator=torch.Generator().manual_seed(0)) * 1e-12
    gains = {"near": near, "plain": torch.randn(40, 25, dtype=torch.float64), "beyond float32": near * 1e200}
    gains["some are out"] = near.masked_fill(near > 1 + 5e-12, -torch.inf)
    weights = [torch.randn(40, 25), torch.randn(6, 10, 3, 3).to(memory_format=torch.channels_last), torch.tensor(2.0)]
    few = (dt.TopK(keep=0.3), dt.TopK(keep=0.3, scope="model", share="lamp"), dt.NM(n=2, m=4))
    targets = [*few, *(dt.SparseLevels(sparse=one, survivors=dt.LearnedLevels(k=3)) for one in few)]

    def found() -> list[Tensor]:
        fitted = [(t, w, t.fit_model([w], [dt.Layout(shape=w.shape)], [None])[0]) for t in targets for w in weights]
        return [t.project(w, params) for t, w, params in fitted]

    plain = found()
    monkeypatch.setattr(sparse, "_PIECE", 64)
    monkeypatch.setattr(largest, "_PIECE", 64)
    monkeypatch.setattr(composite, "_PIECE", 37)
    assert all(map(torch.equal, found(), plain))
    for name, gain in gains.items():
        order = np.argsort(-gain.numpy().reshape(-1), kind="stable")
        for count in (1, 300, 999):
            kept = {int(at) for at in order[:count] if gain.reshape(-1)[at] > -math.inf}
            assert places(largest.largest(gain, count)) == kept, (name, count)
