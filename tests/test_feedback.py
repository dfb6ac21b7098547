"""Places in the metric of the inputs: against the papers' slow form, and what is promised of every target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import TARGETS
from torch import Tensor

import detent as dt
from detent.feedback import Prior, choose_places

CODEWORDS = {"kernels": (8, 4, 2, 2), "vectors": (8, 16), "vectors-global": (8, 16)}  # weights that choose together


def fitted(target: dt.Target, w: Tensor) -> dt.Params:
    return target.fit_model([w], [dt.Layout(shape=tuple(w.shape))], [None])[0]


ALONE = {name: target for name, target in TARGETS.items() if name not in CODEWORDS}
LEVELS = {
    "tensor": dt.Uniform(bits=3),
    "channel": dt.Uniform(bits=3, granularity="channel", param_dtype="float16"),
    "group": dt.Uniform(bits=2, granularity=dt.Group(size=5), range="minmax"),
    "dead zone": dt.UniformStep(step=0.4, rounding=0.3),
    "learned": dt.LearnedLevels(k=4, granularity="channel"),
    "powers": dt.PowerOfTwo(bits=3),
    "signs": dt.Binary(granularity="channel"),
    "halves": dt.Round(dtype="bfloat16"),
}


def weights(rows: int = 6, inputs: int = 13, seed: int = 0) -> Tensor:
    """In float64, so that the reference meets no tie that rounding decides."""
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(inputs: int = 13, parts: int = 1, seed: int = 1) -> Tensor:
    """Of inputs that hang together."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(parts, 4, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(parts, 60, 4, generator=draw, dtype=torch.float64) @ mixed
    x += 0.3 * torch.randn(parts, 60, inputs, generator=draw, dtype=torch.float64)
    return x.mT @ x


def quantizer(target: dt.Target, params: dt.Params, w: Tensor) -> Any:
    """The reference's `quant`: one weight in its place of the tensor, all others as they were."""

    def quant(x: float, i: int, p: int) -> float:
        whole = w.clone()
        whole[i, p] = x
        return float(target.project(whole, params)[i, p])

    return quant


def orders(h: Tensor, by_diagonal: bool) -> list[int]:
    return np.argsort(-h.diagonal().numpy(), kind="stable").tolist() if by_diagonal else list(range(len(h)))


@pytest.mark.parametrize("by_diagonal", [True, False])
@pytest.mark.parametrize("name", LEVELS)
def test_places_are_those_of_obq(name: str, by_diagonal: bool) -> None:
    target, w, h = LEVELS[name], weights(), moments()
    params = target.fit(w)
    expected = reference.obq(
        w.numpy(), reference.damped(h[0].numpy(), 0.01), quantizer(target, params, w), orders(h[0], by_diagonal)
    )
    found = choose_places(w, target, params, h, by_diagonal=by_diagonal, block=4)
    rows = error(w, torch.from_numpy(expected), h[0]) < error(w, target.project(w, params), h[0])
    assert bool(rows.any()), "a test of rows that all stay plain shows nothing"
    torch.testing.assert_close(found.places[rows], torch.from_numpy(expected)[rows], rtol=1e-12, atol=1e-12)
    assert torch.equal(found.places[~rows], target.project(w, params)[~rows])


def error(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    """Squared error of each output."""
    return (((q - w) @ h) * (q - w)).sum(dim=1)


def keep_largest(k: int) -> Any:
    def choose(gain: np.ndarray) -> np.ndarray:
        mask = np.zeros(gain.size, dtype=bool)
        mask[np.argsort(-gain.reshape(-1), kind="stable")[:k]] = True
        return mask.reshape(gain.shape)

    return choose


def keep_two_of_four(gain: np.ndarray) -> np.ndarray:
    rank = np.argsort(np.argsort(-gain.reshape(-1, 4), axis=1, kind="stable"), axis=1)
    return (rank < 2).reshape(gain.shape)


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("pattern", ["count", "blocks", "levels"])
def test_patterns_are_those_of_sparsegpt(pattern: str, block: int) -> None:
    w, h = weights(8, 20), moments(20)
    target: dt.Target = dt.TopK(keep=100)
    choose, extra = keep_largest(100), {}
    if pattern == "blocks":
        target, choose = dt.NM(n=2, m=4), keep_two_of_four
    if pattern == "levels":
        target = dt.SparseLevels(sparse=dt.TopK(keep=100), survivors=dt.Uniform(bits=4, granularity="channel"))
    params = target.fit(w)
    if pattern == "levels":
        levels, own = target.choice(params).levels  # type: ignore[union-attr, misc]
        extra["quant"] = quantizer(levels, own, w)
    h_damped = reference.damped(h[0].numpy(), 0.01)
    expected = reference.pruned_obs(w.numpy(), h_damped, orders(h[0], True), block, choose, **extra)
    found = choose_places(w, target, params, h, block=block)
    torch.testing.assert_close(found.places, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    assert found.error < 0.7 * found.plain


def test_looking_again_changes_what_is_kept() -> None:
    """Otherwise the blocks of the test above would show nothing."""
    w, h, target = weights(inputs=12), moments(inputs=12), dt.TopK(keep=30)
    kept = [choose_places(w, target, target.fit(w), h, block=block).places != 0 for block in (3, 128)]
    assert not torch.equal(*kept) and int(kept[0].sum()) == int(kept[1].sum()) == 30


@pytest.mark.parametrize("name", ALONE)
def test_never_worse_than_plain_rounding_and_always_on_places(name: str) -> None:
    target = ALONE[name]
    for seed in range(3):
        w = weights(8, 16, seed).float()
        params = fitted(target, w)
        h = moments(16, parts=2, seed=seed)
        found = choose_places(w, target, params, h, block=5)
        assert torch.equal(target.project(found.places, params), found.places), "places that move"
        assert torch.equal(target.form(found.places, params).dense(), found.places)
        plain, rounded = error_by_parts(w, target.project(w, params), h), error_by_parts(w, found.places, h)
        assert found.error <= found.plain
        assert (found.plain, found.error) == pytest.approx((plain, rounded), rel=1e-9)
        assert found.energy == pytest.approx(error_by_parts(w, torch.zeros_like(w), h))


def error_by_parts(w: Tensor, q: Tensor, h: Tensor) -> float:
    gap = (q.double() - w.double()).reshape(len(h), -1, w.shape[1])
    return float(((gap @ h) * gap).sum())


@pytest.mark.parametrize("name", ALONE)
def test_inputs_that_say_nothing_leave_plain_rounding(name: str) -> None:
    """H a multiple of the identity: no weight can repair another. Nor where no input came at all."""
    target, w = ALONE[name], weights(8, 16).float()
    params = fitted(target, w)
    for h in (3.0 * torch.eye(16, dtype=torch.float64)[None], torch.zeros(4, 16, 16, dtype=torch.float64)):
        assert torch.equal(choose_places(w, target, params, h, block=5).places, target.project(w, params))


def test_parts_are_as_they_are_apart() -> None:
    w, h, target = weights(8), moments(parts=4), dt.Uniform(bits=2, granularity="channel")
    whole = choose_places(w, target, target.fit(w), h)
    for i in range(4):
        mine = w[2 * i : 2 * i + 2]
        assert torch.equal(
            choose_places(mine, target, target.fit(mine), h[i : i + 1]).places, whole.places[2 * i :][:2]
        )


def test_axes_are_those_of_the_layout() -> None:
    """An (inputs, outputs) matrix and a stack of experts hold what the rows and columns of a plain one hold."""
    w, h, target = weights(8), moments(parts=2), dt.Uniform(bits=2, granularity=dt.Group(size=5))
    plain = choose_places(w, target, target.fit(w), h).places
    turned = dt.Layout(shape=(2, 13, 4), channel_dim=2, batch_axes=(0,))
    stack = turned.from_channels(w)
    assert stack.shape == (2, 13, 4)
    assert torch.equal(turned.by_channel(choose_places(stack, target, target.fit(stack, turned), h).places), plain)


def test_an_input_that_is_always_zero_rounds_plainly() -> None:
    w, h, target = weights(), moments(), dt.Uniform(bits=2)
    h[:, 3] = h[:, :, 3] = 0.0
    params = target.fit(w)
    found = choose_places(w, target, params, h)
    assert found.error < found.plain
    assert torch.equal(found.places[:, 3], target.project(w, params)[:, 3])


@pytest.mark.parametrize("target", [dt.Uniform(bits=3), dt.LearnedLevels(k=5, zero=True), dt.TopK(keep=0.3)], ids=repr)
def test_what_was_pruned_stays_zero(target: dt.Target) -> None:
    w, h = weights(), moments()
    gone = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    w[gone] = 0.0
    found = choose_places(w, target, target.fit(w), h)
    assert not bool(found.places[gone].any())
    assert bool((found.places[~gone] != target.project(w, target.fit(w))[~gone]).any())


def test_held_weights_stay_zero() -> None:
    w, h, target = weights(), moments(), dt.Uniform(bits=4)
    held = torch.zeros_like(w, dtype=torch.bool)
    held[:, ::2] = True
    w = w.masked_fill(held, 1e-3)
    assert not bool(choose_places(w, target, target.fit(w), h, held=held).places[held].any())


def test_outputs_to_aim_at() -> None:
    """The walk starts where the damped least-squares problem ends, and errors are those of the outputs themselves."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(13, 200, generator=draw, dtype=torch.float64)
    x[7:] += x[:6]
    before = x + 0.3 * torch.randn(13, 200, generator=draw, dtype=torch.float64)  # what the full-precision model has
    w, target = weights(), dt.Uniform(bits=3, granularity="channel")
    params, aimed, h = target.fit(w), w @ before, (x @ x.T)[None]
    found = choose_places(w, target, params, h, cross=aimed @ x.T, energy=float(aimed.square().sum()))
    assert found.energy == pytest.approx(float(aimed.square().sum()))
    assert found.error == pytest.approx(float((aimed - found.places @ x).square().sum()), rel=1e-9)
    assert found.plain == pytest.approx(float((aimed - target.project(w, params) @ x).square().sum()), rel=1e-9)
    assert found.error < float((aimed - choose_places(w, target, params, h).places @ x).square().sum())
    # |T - V X|^2 + lambda |V - W|^2 is least at V
    damped = reference.damped(h[0].numpy(), 0.01)
    level = torch.from_numpy(damped)[0, 0] - h[0, 0, 0]
    start = (aimed @ x.T + level * w) @ torch.from_numpy(np.linalg.inv(damped))
    expected = reference.obq(start.numpy(), damped, quantizer(target, params, w), orders(h[0], True))
    better = (aimed - torch.from_numpy(expected) @ x).square().sum(1) < (
        aimed - target.project(w, params) @ x
    ).square().sum(1)
    assert int(better.sum()) >= 4
    torch.testing.assert_close(found.places[better], torch.from_numpy(expected)[better])
    # Aiming at what W gives changes nothing.
    same = choose_places(w, target, params, h, cross=w @ h[0], energy=float((w @ x).square().sum()))
    assert torch.equal(same.places, choose_places(w, target, params, h).places)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    w, h = weights().to(dtype), moments()
    for target in (dt.Uniform(bits=8, granularity="channel"), dt.TopK(keep=0.5)):
        params = target.fit(w)
        found = choose_places(w, target, params, h)
        assert found.places.dtype == dtype and found.error < found.plain
        assert torch.equal(target.project(found.places, params), found.places)


def test_a_metric_without_an_inverse_is_refused() -> None:
    w, target = weights(), dt.Uniform(bits=3)
    h = -torch.eye(13, dtype=torch.float64)[None]
    h[0, 0, 0] = 1.0
    with pytest.raises(ValueError, match=r"damping=0.01: the inputs depend on one another so far"):
        choose_places(w, target, target.fit(w), h)


@pytest.mark.parametrize("name", CODEWORDS)
def test_codewords_choose_together(name: str) -> None:
    w = torch.randn(CODEWORDS[name])
    assert TARGETS[name].choice(fitted(TARGETS[name], w)) is None


# --- without inputs -----------------------------------------------------------------------------------------------


def prior_moment(prior: Prior, inputs: int) -> Tensor:
    near = torch.block_diag(*[torch.ones(prior.kernel, prior.kernel, dtype=torch.float64)] * (inputs // prior.kernel))
    return (torch.eye(inputs, dtype=torch.float64) + prior.near * near + prior.far)[None]


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("kernel", [1, 3, 9, 27])
@pytest.mark.parametrize("target", [dt.UniformStep(step=0.7), dt.NM(n=1, m=3), dt.TopK(keep=0.5)], ids=repr)
def test_a_prior_is_its_moment_written_out(target: dt.Target, kernel: int, block: int) -> None:
    w, prior = weights(inputs=54), Prior(kernel=kernel, near=1.5, far=0.2)
    params = target.fit(w)
    found = choose_places(w, target, params, prior, block=block)
    blocks = -(-block // kernel) * kernel  # a prior looks again between kernels
    expected = choose_places(w, target, params, prior_moment(prior, 54), damping=1e-13, block=blocks)
    torch.testing.assert_close(found.places, expected.places, rtol=1e-9, atol=1e-9)
    assert (found.plain, found.error, found.energy) == pytest.approx(
        (expected.plain, expected.error, expected.energy), rel=1e-9
    )
    assert found.error < found.plain * (1.0 if kernel == 1 else 0.8)


def test_a_prior_of_nothing_rounds_plainly() -> None:
    w, target = weights(), dt.Uniform(bits=3)
    params = target.fit(w)
    assert torch.equal(choose_places(w, target, params, Prior(near=0.0, far=0.0)).places, target.project(w, params))
