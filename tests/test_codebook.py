"""Codebooks: K-means, kernels and blocks, learning them, and files that hold a shared one once."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import stranger
import torch
import torch.nn.functional as F
from test_files import leftovers, rewrite, scrambled, snapshot
from torch import Tensor, nn

import detent as dt
from detent import pack
from detent.mechanisms import codebook as learning
from detent.targets import codebook as books
from detent.testing import check_target

LAYER = dt.KernelCodebook(size=4)
GLOBAL = dt.KernelCodebook(size=5, book="global", zero=True)
FLOATS = dt.KernelCodebook(size=6, codebook_bits=None)

VGG16 = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256)] + [(512, 512)] * 5
RESNET18 = [(64, 64)] * 4 + [(128, 64)] + [(128, 128)] * 3 + [(256, 128)] + [(256, 256)] * 3 + [(512, 256)]
RESNET18 += [(512, 512)] * 3
RESNET18_OTHER = [(64, 3, 7, 7), (128, 64, 1, 1), (256, 128, 1, 1), (512, 256, 1, 1)]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x, y = batch(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def recipe(target: dt.Target, mechanism: dt.Mechanism | None = None) -> dt.Recipe:
    return dt.Recipe([dt.Rule(match="@kernels", target=target, mechanism=mechanism)])


# --- the target --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [LAYER, GLOBAL, FLOATS, dt.KernelCodebook(size=1), dt.KernelCodebook(size=300)])
def test_laws_on_awkward_kernels(target: dt.KernelCodebook) -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 6, 3, 3).clamp(-2, 2)
    samples = [torch.randn(8, 6, 3, 3).to(t) for t in (torch.float64, torch.float16, torch.bfloat16)]
    samples += [torch.zeros(4, 5, 3, 3), torch.full((4, 5, 3, 3), -0.0), torch.full((4, 5, 3, 3), 0.3)]
    samples += [wide * 1e-42, wide * 1.5e38, (wide * 3e4).half(), (wide * 1e-6).half(), (wide * 1.6e38).bfloat16()]
    samples += [wide.to(memory_format=torch.channels_last), wide[:, :1], wide[:1, :1], wide[0], wide[..., None, :]]
    check_target(target, samples)


@pytest.mark.parametrize("book_bits", [6, None])
def test_projection_is_the_nearest_codeword(book_bits: int | None) -> None:
    w = torch.randn(9, 7, 3, 3, dtype=torch.float64)
    target = dt.KernelCodebook(size=13, codebook_bits=book_bits)
    params = target.fit(w)
    book = target.codebook(params).double().numpy()
    index, far = reference.nearest_codewords(w.reshape(-1, 9).numpy(), book)
    q = target.project(w, params)
    assert target.assign(w, params).tolist() == index
    assert np.array_equal(q.reshape(-1, 9).numpy(), book[index])
    assert float((q - w).square().sum()) == pytest.approx(far.sum())
    distance = target.distance(q - w, params).reshape(-1, 9)
    assert np.allclose(distance.numpy(), np.sqrt(far / 9)[:, None].repeat(9, 1))
    assert float(target.typical(params)) == pytest.approx(np.sqrt(far / 9).mean(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("times", [1.0, 1e-4, 1e4])
def test_the_fast_way_to_the_nearest_codeword_is_the_exact_one(dtype: torch.dtype, times: float) -> None:
    """Ties and neighbours that a matrix product cannot tell apart included."""
    book = torch.randn(40, 9, dtype=torch.float64).mul(times).to(dtype)
    book[20:30] = torch.nextafter(book[:10].float(), torch.tensor(9e9)).to(dtype)  # twins, one rounding away
    halfway = ((book[:10].double() + book[10:20].double()) / 2).to(dtype)
    far = torch.randn(200, 9).mul(1e3 * times).to(dtype)
    rows = torch.cat([book, halfway, torch.randn(500, 9).mul(times).to(dtype), far, torch.zeros(3, 9, dtype=dtype)])
    target = dt.KernelCodebook(size=40, codebook_bits=None, param_dtype="float32")
    layout = dt.Layout(shape=(len(rows), 1, 3, 3))
    params = dt.Params(tensors={"book": book}, layout=layout)
    exact = (rows.double()[:, None] - book.double()).square().sum(-1).sqrt().argmin(1)
    found = target.assign(rows.reshape(-1, 1, 3, 3), params)
    gap = [(rows.double() - book.double()[index]).square().sum(1) for index in (found, exact)]
    assert torch.allclose(gap[0], gap[1], rtol=1e-12, atol=0), "not a nearest one"
    lonely = (rows.double()[:, None] - book.double()).square().sum(-1).topk(2, largest=False).values
    clear = lonely[:, 0] < 0.999 * lonely[:, 1]
    assert torch.equal(found[clear], exact[clear])
    sure = books._nearest_for_sure(rows, book)
    assert bool((sure[0] == exact)[~sure[1]].all()) and bool(sure[1][:10].all()), "twins were called sure"
    clear[:10] = clear[20:30] = False  # on one twin, beside the other
    assert int(clear.sum()) > 300 and not bool(sure[1][clear].any()), "what is clear needs no second look"


def test_a_later_fit_goes_on_from_the_codewords_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(32, 32, 3, 3)
    target = dt.KernelCodebook(size=32, codebook_bits=None)
    before = target.fit(w)
    moved = w + 0.01 * torch.randn_like(w)
    starts = []
    spread = books._spread
    monkeypatch.setattr(books, "_spread", lambda *a: starts.append(1) or spread(*a))
    warm = target.fit(moved, previous=before)
    assert not starts
    gaps = [float((target.project(moved, p) - moved).square().sum()) for p in (warm, before)]
    assert gaps[0] < gaps[1]
    near = torch.cdist(warm["book"], before["book"]).amin(1)
    assert float(near.amax()) < 0.5 * float(torch.cdist(before["book"], before["book"]).fill_diagonal_(9).min())
    anew = dt.KernelCodebook(size=32, codebook_bits=None, warm_start=False)
    assert torch.equal(anew.fit(moved, previous=before)["book"], target.fit(moved)["book"]) and len(starts) == 4


def test_a_warm_start_fills_up_what_was_missing() -> None:
    """Few distinct kernels gave a short codebook; when training has made more of them, it grows."""
    few = torch.randn(5, 3, 3)
    w = few[torch.randint(0, 5, (30, 20))]
    for zero in (False, True):
        target = dt.KernelCodebook(size=16, codebook_bits=None, zero=zero)
        before = target.fit(w)
        assert len(before["book"]) == 5 + zero
        after = target.fit(torch.randn(30, 20, 3, 3), previous=before)
        assert len(after["book"]) == 16 and (not zero or not bool(after["book"][0].any()))
    halves = dt.KernelCodebook(size=4, codebook_bits=None)
    assert len(halves.fit(w, previous=dt.KernelCodebook(size=8, codebook_bits=None).fit(w))["book"]) == 4


def test_k_means_finds_planted_kernels_and_is_repeatable() -> None:
    centres = torch.randn(12, 9) * 3
    w = (centres[torch.randint(0, 12, (40 * 20,))] + 1e-3 * torch.randn(800, 9)).reshape(40, 20, 3, 3)
    target = dt.KernelCodebook(size=12, codebook_bits=None)
    book = target.codebook(target.fit(w))
    assert float((book[:, None] - centres).square().sum(-1).min(0).values.sqrt().amax()) < 1e-2
    assert torch.equal(book, target.codebook(target.fit(w.clone())))
    noise = torch.randn(40, 20, 3, 3)
    other = dt.KernelCodebook(size=12, codebook_bits=None, seed=1)
    assert not torch.equal(target.fit(noise)["book"], other.fit(noise)["book"])


def test_k_means_is_a_fixed_point_and_more_codewords_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(40, 30, 3, 3)
    errors = []
    for size in (1, 2, 8, 32, 128):
        target = dt.KernelCodebook(size=size, codebook_bits=None, iterations=300)
        params = target.fit(w)
        index, units = target.assign(w, params), w.reshape(-1, 9)
        assert len(target.codebook(params)) == size == len(index.unique()), "a codeword without members"
        means = torch.stack([units[index == j].mean(0) for j in range(size)])
        assert float((means - target.codebook(params)).abs().amax()) < 0.1
        errors.append(float((target.project(w, params) - w).square().sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]
    assert torch.allclose(dt.KernelCodebook(size=1, codebook_bits=None).fit(w)["book"][0], w.reshape(-1, 9).mean(0))
    before = dt.KernelCodebook(size=8).fit(w)["book"]
    monkeypatch.setattr(books, "_CHUNK", 64)
    assert torch.allclose(dt.KernelCodebook(size=8).fit(w)["book"], before), "pieces change nothing but roundings"


def test_an_empty_cluster_is_repaired() -> None:
    x = torch.cat([torch.zeros(50, 3), torch.eye(3) * 5, -torch.eye(3) * 5])
    stuck = torch.cat([torch.zeros(1, 3), torch.full((6, 3), 1e3)])  # six centres that nothing is near
    centres, error = books._lloyd(x, stuck, 50, False)
    assert error == 0.0 and len(books._nearest(x, centres)[0].unique()) == 7


def test_a_sample_is_enough() -> None:
    w = torch.randn(64, 64, 3, 3)
    errors = [
        float((t.project(w, t.fit(w)) - w).square().mean())
        for t in (dt.KernelCodebook(size=16), dt.KernelCodebook(size=16, sample=20, restarts=1))
    ]
    assert errors[1] < 1.05 * errors[0]


def test_fewer_distinct_kernels_than_codewords() -> None:
    few = torch.randn(5, 3, 3)
    w = few[torch.randint(0, 5, (30, 20))]
    target = dt.KernelCodebook(size=64, codebook_bits=None)
    params = target.fit(w)
    assert len(target.codebook(params)) == 5 and torch.equal(target.project(w, params), w)
    assert [p.width for p in target.form(w, params).parts if p.name == "codes"] == [3]
    zero = dt.KernelCodebook(size=5, codebook_bits=None, zero=True).fit(w)
    assert len(zero["book"]) == 5 and not bool(zero["book"][0].any())
    assert len(dt.KernelCodebook(size=6, codebook_bits=None, zero=True).fit(w)["book"]) == 6


def test_a_zero_codeword_prunes_kernels() -> None:
    w = torch.randn(16, 16, 3, 3) * torch.randint(0, 2, (16, 16, 1, 1))
    target = dt.KernelCodebook(size=8, zero=True)
    params = target.fit(w)
    assert not bool(target.codebook(params)[0].any())
    q = target.project(w, params)
    assert bool((q.reshape(-1, 9)[~w.reshape(-1, 9).any(1)] == 0).all())


def test_the_codebook_is_of_six_bits_with_one_scale() -> None:
    w = torch.randn(20, 20, 3, 3)
    for target, most in ((dt.KernelCodebook(size=16), 31), (dt.KernelCodebook(size=16, codebook_bits=3), 3)):
        params = target.fit(w)
        levels = (target.codebook(params) / params["scale"]).round()
        assert params["scale"].numel() == 1 and torch.equal(levels * params["scale"], target.codebook(params))
        assert float(levels.abs().amax()) <= most
        parts = {part.name: part for part in target.form(w, params).parts}
        assert parts["codes"].width == 4 and parts["codes"].count == 400
        assert parts["book"].width == target.codebook_bits and parts["book"].count == 16 * 9


@pytest.mark.parametrize(("units", "size"), [(3, 1), (4, 1), (31, 4), (32, 8), (100, 16), (127, 16), (128, 32)])
def test_too_few_kernels_reduce_the_codebook(units: int, size: int) -> None:
    w = torch.randn(units, 1, 3, 3)
    params = dt.KernelCodebook(size=32).fit(w)
    assert len(params["book"]) == size
    shape = (units, 1, 3, 3)
    refuse = dt.KernelCodebook(size=32, few="refuse").accepts(shape, torch.float32, dt.Layout(shape=shape))
    assert (refuse is None) == (units >= 128)
    together = dt.KernelCodebook(size=32, few="refuse", book="global")
    assert together.accepts(shape, torch.float32, dt.Layout(shape=shape)) is None
    if units < 128:
        with pytest.raises(ValueError, match=f"at least 128 units to choose from, there are {units}"):
            together.fit(w)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, units, 3, bias=False))
    (row,) = dt.Recipe([dt.Rule(match="weight", target=dt.KernelCodebook(size=32))]).resolve(model).rows()
    assert row["note"] == ("" if units >= 128 else f"{size} codewords for its {units} units")
    shared = dt.Recipe([dt.Rule(match="weight", target=dt.KernelCodebook(size=32, book="global"))])
    (row,) = shared.resolve(model).rows()
    assert row["note"] == ("" if units >= 128 else f"{size} codewords for all {units} units of 3x3")
    model = torch.nn.Sequential(*model, torch.nn.Conv2d(1, 128, 3, bias=False), torch.nn.Conv2d(1, 8, 5, bias=False))
    rows = shared.resolve(model).rows()
    assert [row["note"] for row in rows] == ["", "", "2 codewords for all 8 units of 5x5"]
    assert len(dt.KernelCodebook(size=32, book="global").fit(torch.randn(8, 1, 5, 5))["book"]) == 2


def test_nothing_but_kernels_is_taken() -> None:
    def reason(target: dt.Target, *shape: int, channel_dim: int = 0) -> str:
        return target.accepts(shape, torch.float32, dt.Layout(shape=shape, channel_dim=channel_dim)) or ""

    blocks = dt.VectorCodebook(block=4, size=4)
    assert "2-D weight has no kernels" in reason(LAYER, 8, 8)
    assert "larger than 1x1" in reason(LAYER, 8, 8, 1, 1)
    assert reason(LAYER, 8, 8, 3) == reason(LAYER, 8, 8, 2, 2, 2) == reason(LAYER, 8, 4, 3, 3, channel_dim=1) == ""
    assert "1-D weight has no inputs" in reason(blocks, 8)
    assert "needs 1x1 kernels, not 3x3" in reason(blocks, 8, 8, 3, 3)
    assert "does not divide the 6 inputs" in reason(blocks, 8, 6)
    assert "transposed" in reason(blocks, 8, 8, 1, 1, channel_dim=1)
    assert reason(blocks, 8, 8) == reason(blocks, 8, 8, 1, 1) == ""


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(4, 8, 3, groups=2), nn.Conv1d(4, 8, 5)]
)
def test_grouped_and_transposed_convolutions(layer: nn.Module, tmp_path: Path) -> None:
    run = dt.compress(layer, recipe(dt.KernelCodebook(size=3)))
    assert dt.save(run, tmp_path / "f") > 0
    run.finalize()
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    assert len(weight.reshape(-1, math.prod(weight.shape[2:])).unique(dim=0)) == 3


def test_a_global_codebook_is_one_for_each_kernel_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 5), nn.Conv2d(8, 8, (1, 9)))
    run = dt.compress(model, recipe(dt.KernelCodebook(size=6, book="global")))
    books_of = {name: e.form.named["book"] for name, e in run.encoded().items()}
    assert torch.equal(books_of["0.weight"], books_of["1.weight"])
    assert not torch.equal(books_of["0.weight"], books_of["3.weight"]) and len(books_of["2.weight"]) == 6 * 25
    run.finalize()
    both = torch.cat([model[i].weight.detach().reshape(-1, 9) for i in (0, 1)])  # type: ignore[union-attr]
    assert len(both.unique(dim=0)) == 6


# --- bits --------------------------------------------------------------------------------------------------------


def test_the_published_averages_follow_from_imagenet_shapes() -> None:
    """As in the notes: VGG-16's 1.05 lies between 512 codewords and 1024; ResNet-18's 1.62 is 1024, the rest at 32."""
    vgg = [(*pair, 3, 3) for pair in VGG16]
    resnet = [RESNET18_OTHER[0], *((*pair, 3, 3) for pair in RESNET18), *RESNET18_OTHER[1:]]
    found = {k: reference.kq_bits(vgg, k, shared=False) for k in (512, 1024)}
    assert found[512] < 1.05 < found[1024]
    assert reference.kq_bits(vgg, 512, shared=True) < 1.02
    assert reference.kq_bits(resnet, 1024, shared=True) == pytest.approx(1.62, abs=0.005)
    for shapes, size, book in ((vgg, 512, "layer"), (vgg, 512, "global"), (resnet, 1024, "global")):
        kernels = [s for i, s in enumerate(shapes) if i and s[2] > 1]
        other = sum(math.prod(s) for i, s in enumerate(shapes) if not (i and s[2] > 1))
        planned = dt.KernelCodebook(size=size, book=book).planned_bits(kernels) + 32 * other  # type: ignore[arg-type]
        books_held = len(kernels) if book == "layer" else 1
        total = sum(math.prod(s) for s in shapes)
        formula = reference.kq_bits(shapes, size, shared=book == "global") * total
        assert planned == pytest.approx(formula + 32 * books_held), "the formula, and a scale a codebook"


@pytest.mark.parametrize("target", [LAYER, FLOATS, GLOBAL])
def test_the_plan_costs_what_the_file_holds(target: dt.KernelCodebook, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 16, 3, bias=False))
    run = dt.compress(model, recipe(target))
    dt.save(run, tmp_path / "f", "compressed", coding="bitpacked")
    found = pack.sizes(tmp_path / "f")
    assert 8 * (found["codes"] + found["params"]) == target.planned_bits([(8, 8, 3, 3), (16, 8, 3, 3)])


@pytest.mark.parametrize("name", ["kq", "kq-layer"])
def test_presets_take_any_cnn(name: str) -> None:
    models = pytest.importorskip("papers.models")
    for make in (models.resnet32, models.VGG16, models.resnet18):
        with torch.device("meta"):
            plan = dt.Recipe.preset(name).resolve(make())
        kinds = {claim.name: type(plan.rule_of(claim).target).__name__ for claim in plan.claimed}
        shapes = {claim.name: claim.layout.shape for claim in plan.claimed}
        first = next(iter(kinds))
        for weight, kind in kinds.items():
            kernel = math.prod(shapes[weight][2:]) > 1 and weight != first
            assert kind == ("KernelCodebook" if kernel else "Uniform"), weight
        assert all(
            n.endswith("bias") or len(c.layout.shape) < 2 for c in plan.claims if not c.claimed for n in [c.name]
        )


def test_presets_take_a_cnn_of_one_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    for name in ("kq", "kq-layer"):
        run = dt.compress(model, dt.Recipe.preset(name))
        kinds = [type(run.plan.rule_of(claim).target).__name__ for claim in run.plan.claimed]
        assert kinds == ["Uniform", "Uniform"] and "KernelCodebook" not in str(run.plan)


# --- learning ----------------------------------------------------------------------------------------------------


class RealCodebook(nn.Module):
    """The same network with a codebook that is a parameter: every kernel is looked up."""

    def __init__(self, model: nn.Sequential, tables: list[Tensor], index: list[Tensor], reduce: str) -> None:
        super().__init__()
        self.books = nn.ParameterList([nn.Parameter(t.clone()) for t in tables])
        self.index, self.shapes = index, [model[i].weight.shape for i in (0, 2)]
        self.without: tuple[int, ...] = ()  # layers whose weights get no gradient
        self.biases = nn.ParameterList([nn.Parameter(model[i].bias.detach().clone()) for i in (0, 2)])  # type: ignore[union-attr]
        self.head = nn.Linear(6, 3, dtype=tables[0].dtype)
        self.head.load_state_dict(model[5].state_dict())
        for j, book in enumerate(self.books):
            mine = index if len(tables) == 1 else [index[j]]
            members = torch.bincount(torch.cat(mine), minlength=len(book))
            if reduce == "mean":
                book.register_hook(lambda g, members=members: g / members.clamp_min(1)[:, None])

    def weight(self, layer: int) -> Tensor:
        return self.books[min(layer, len(self.books) - 1)][self.index[layer]].reshape(self.shapes[layer])

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(2):
            weight = self.weight(layer).detach() if layer in self.without else self.weight(layer)
            x = torch.tanh(F.conv2d(x, weight, self.biases[layer]))
        return self.head(x.flatten(1))


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("book", ["layer", "global"])
def test_it_is_a_real_codebook_parameter(make: Callable[..., Any], reduce: Any, book: Any) -> None:
    model = net(torch.float64)
    twin = net(torch.float64)
    target = dt.KernelCodebook(size=4, book=book, codebook_bits=None)
    optimizer = make(model.parameters())
    run = dt.attach(model, optimizer, recipe(target, dt.CodebookLearning(reduce=reduce, ste_from=None)), total_steps=40)
    fits = {entry.name: entry.params for entry in run._entries if entry.params}
    index = [target.assign(twin[i].weight, fits[f"{i}.weight"]) for i in (0, 2)]  # type: ignore[arg-type,union-attr]
    tables = [target.codebook(fits[f"{i}.weight"]).double() for i in (0, 2)]
    real = RealCodebook(twin, tables if book == "layer" else tables[:1], index, reduce)
    start = real.weight(1).detach().clone()
    train(model, optimizer, range(40))
    train(real, make(real.parameters()), range(40))
    for layer, place in enumerate((0, 2)):
        weight: Tensor = model[place].weight.detach()  # type: ignore[assignment,union-attr]
        assert float((weight - real.weight(layer).detach()).abs().amax()) <= 1e-12 * float(weight.abs().amax())
    assert float((real.weight(1).detach() - start).abs().amax()) > 0.01, "nothing moved, so nothing was compared"


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_it_is_one_even_where_a_layer_gets_no_gradient(make: Callable[..., Any], reduce: Any) -> None:
    """Layers that are dropped, or thaw late: the codebook goes on with the gradient of the others."""
    model, twin = net(torch.float64), net(torch.float64)
    target = dt.KernelCodebook(size=4, book="global", codebook_bits=None)
    optimizer = make(model.parameters())
    run = dt.attach(model, optimizer, recipe(target, dt.CodebookLearning(reduce=reduce, ste_from=None)), total_steps=20)
    fits = {entry.name: entry.params for entry in run._entries if entry.params}
    index = [target.assign(twin[i].weight, fits[f"{i}.weight"]) for i in (0, 2)]  # type: ignore[arg-type,union-attr]
    real = RealCodebook(twin, [target.codebook(fits["0.weight"]).double()], index, reduce)
    other = make(real.parameters())
    start = real.weight(1).detach().clone()
    for step in range(20):
        real.without = {0: (1,), 5: (0,), 6: (0,), 7: (0,), 8: (0, 1), 9: (1,)}.get(step, ())
        x, y = batch(step, torch.float64)
        for module, each in ((model, optimizer), (real, other)):
            each.zero_grad()
            F.mse_loss(module(x), y).backward()
        for layer in real.without:
            model[2 * layer].weight.grad = None  # type: ignore[union-attr]
        if len(real.without) == 2:
            assert real.books[0].grad is None
        optimizer.step()
        other.step()
    for layer, place in enumerate((0, 2)):
        weight: Tensor = model[place].weight.detach()  # type: ignore[assignment,union-attr]
        assert float((weight - real.weight(layer).detach()).abs().amax()) <= 1e-12 * float(weight.abs().amax())
    assert float((real.weight(1).detach() - start).abs().amax()) > 0.01, "nothing moved, so nothing was compared"


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_gradient_of_a_codeword_is_the_references(reduce: Any) -> None:
    model = nn.Conv2d(3, 8, 3, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    target = dt.KernelCodebook(size=4, codebook_bits=None)
    run = dt.attach(model, optimizer, recipe(target, dt.CodebookLearning(reduce=reduce, ste_from=None)), total_steps=9)
    state = run.state_dict()["weights"]["weight"]["state"]
    index, start = state["index"].tolist(), state["codewords"].numpy()
    gradients = np.random.default_rng(0).normal(size=(6, 24, 9))
    slow = reference.with_codebook(
        start, [index], [[g] for g in gradients], reduce, lambda book, g: reference.SGD(0.05).step(book, g)
    )
    for g, expected in zip(gradients, slow, strict=True):
        model.weight.grad = torch.from_numpy(g.reshape(8, 3, 3, 3).copy())
        optimizer.step()
        assert np.allclose(model.weight.detach().reshape(-1, 9).numpy(), expected[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", [LAYER, GLOBAL, dt.KernelCodebook(size=5, book="global", codebook_bits=None)])
def test_the_last_part_sees_the_stored_codebook(target: dt.KernelCodebook) -> None:
    model = net()
    optimizer = sgd(model.parameters())
    run = dt.attach(model, optimizer, recipe(target, dt.CodebookLearning(ste_from=0.5)), total_steps=20)
    apart = []
    for step in range(20):
        apart.append(sum(row["error"] for row in run.measure()))
        train(model, optimizer, range(step, step + 1))
    if target.codebook_bits is not None:
        assert min(apart[1:10]) > 0, "before, the unrounded codebook is trained"
    assert max(apart[10:]) == 0.0 == sum(row["error"] for row in run.measure())
    latent = run.state_dict()["weights"]["0.weight"]["state"]["codewords"]
    full = snapshot(model)
    run.finalize()
    assert snapshot(model) == full
    shown = model[0].weight.detach().reshape(-1, 9).unique(dim=0)  # type: ignore[union-attr]
    if target.codebook_bits is not None:
        assert not any(bool((row == shown).all(1).any()) for row in latent if bool(row.any()))
    if target.zero:
        assert not bool(latent[0].any()), "the zero codeword stays"


def test_re_assignment_follows_the_original_weights() -> None:
    def ending(every: int | None) -> tuple[Tensor, Tensor]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        mechanism = dt.CodebookLearning(ste_from=None, reassign_every=every, reassign_until=0.9)
        run = dt.attach(model, optimizer, recipe(GLOBAL, mechanism), total_steps=12)
        train(model, optimizer, range(11))
        state = run.state_dict()["weights"]["2.weight"]["state"]
        original = net()[2].weight.detach()  # type: ignore[union-attr]
        if every:
            assert torch.equal(state["original"], original)
            assert set(mechanism.memory) == {"index", "codewords", "original"}
        return state["index"], state["codewords"]

    kept, _ = ending(None)
    moved, _ = ending(5)
    assert kept.shape == moved.shape and bool((kept != moved).any())


def test_a_resumed_run_under_a_re_assignment_is_bitwise() -> None:
    def start() -> tuple[nn.Module, Any, dt.Run]:
        model = net()
        optimizer = adamw(model.parameters())
        mechanism = dt.CodebookLearning(reassign_every=3, reassign_until=0.6)
        return model, optimizer, dt.attach(model, optimizer, recipe(GLOBAL, mechanism), total_steps=16)

    model, optimizer, _ = start()
    train(model, optimizer, range(5))
    kept = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, kept)
    train(model, optimizer, range(5, 16))
    again, other, _ = start()
    kept.seek(0)
    saved = torch.load(kept, weights_only=True)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(again, other, range(5, 16))
    assert snapshot(again) == snapshot(model)


def test_momentum_from_before_is_averaged() -> None:
    model = net()
    optimizer = sgd(model.parameters())
    train(model, optimizer, range(3))
    dt.attach(model, optimizer, recipe(LAYER, dt.CodebookLearning(ste_from=None)), total_steps=5)
    before = optimizer.state[model[0].weight]["momentum_buffer"].clone()  # type: ignore[union-attr]
    train(model, optimizer, range(3, 8))
    assert len(before.reshape(-1, 9).unique(dim=0)) == 16
    assert len(optimizer.state[model[0].weight]["momentum_buffer"].reshape(-1, 9).unique(dim=0)) <= 4  # type: ignore[union-attr]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimizer_that_mixes_weights_is_refused() -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    rule = dt.Rule(match="weight", target=dt.VectorCodebook(block=2, size=4), mechanism=dt.CodebookLearning())
    dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=5)
    model(torch.randn(4, 8)).square().sum().backward()
    with pytest.raises(RuntimeError, match="weights that share a codeword apart.*not Muon"):
        optimizer.step()


@pytest.mark.parametrize("odd", [{"lr": 0.01}, {"weight_decay": 0.5}])
def test_unequal_groups_are_refused_for_a_shared_codebook(odd: dict[str, float]) -> None:
    model = net()
    rest = [p for i, p in enumerate(model.parameters()) if i]
    optimizer = torch.optim.SGD([{"params": [model[0].weight], **odd}, {"params": rest}], lr=0.1)
    dt.attach(model, optimizer, recipe(GLOBAL, dt.CodebookLearning()), total_steps=5)
    with pytest.raises(RuntimeError, match="same rate and weight decay for all weights of a codebook"):
        train(model, optimizer, range(1))


def test_a_shared_codebook_in_two_optimizers_is_refused() -> None:
    model = net()
    pair = [sgd(model[0].parameters()), sgd([*model[2].parameters(), *model[5].parameters()])]
    with pytest.raises(ValueError, match="sit in two optimizers.*CodebookLearning moves them all in one step"):
        dt.attach(model, pair, recipe(GLOBAL, dt.CodebookLearning()), total_steps=5)


def test_a_sharded_weight_is_refused() -> None:
    params = LAYER.fit(torch.randn(8, 4, 3, 3)).local(0, 4)
    with pytest.raises(ValueError, match="'w' is sharded, and CodebookLearning ties weights across all rows"):
        learning._refuse_shards(SimpleNamespace(name="w", params=params))  # type: ignore[arg-type]


def test_other_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="trains the codewords of a codebook, and Uniform has none"):
        dt.Rule(match="w", target=dt.Uniform(bits=4), mechanism=dt.CodebookLearning())


def test_psg_moves_a_kernel_as_one() -> None:
    w = torch.randn(8, 4, 3, 3)
    params = LAYER.fit(w)
    scale = dt.PSG(gain=8.0, eps=0.0).scale(w, LAYER, params).reshape(-1, 9)
    assert bool((scale == scale[:, :1]).all()) and len(scale[:, 0].unique()) > 10


# --- files -------------------------------------------------------------------------------------------------------


def shared_file(path: Path, target: dt.Target = GLOBAL) -> tuple[nn.Module, dt.Run]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 5), nn.BatchNorm2d(8))
    run = dt.compress(model, recipe(target))
    dt.save(run, path, coding="bitpacked")
    return model, run


@pytest.mark.parametrize("bits", [6, None])
@pytest.mark.parametrize("life", ["both", "compressed"])
def test_a_shared_codebook_is_stored_once(tmp_path: Path, bits: int | None, life: Any) -> None:
    target = dt.KernelCodebook(size=6, book="global", codebook_bits=bits)
    model, run = shared_file(tmp_path / "f", target)
    dt.save(run, tmp_path / "f", life, coding="bitpacked")
    head, _, _ = stranger.split((tmp_path / "f").read_bytes())
    mine = [form for row in head["rows"] if (form := head["forms"][row])["kind"] == 2]
    assert [form["shared"] for form in mine] == [1, 1, 2]
    blobs = {blob["name"]: [piece[0] for piece in blob["pieces"]] for blob in stranger.order(head) if not blob["bare"]}
    assert [blobs[f"{i}.weight"] for i in (0, 1, 2)] == [["codes"]] * 3
    assert blobs["shared 0"] == blobs["shared 1"] == (["scale", "book"] if bits else ["book"])
    with run.compressed():
        wanted = snapshot(model)
    twin = scrambled(model)
    dt.load(tmp_path / "f", twin, "compressed")
    assert snapshot(twin) == wanted
    found = pack.sizes(tmp_path / "f")
    index = sum(8 * -(-3 * n // 8) for n in (32, 64, 64))
    book = sum(8 * -(-6 * d * 6 // 8) + 32 if bits else 6 * d * 32 for d in (9, 25))
    assert 8 * (found["codes"] + found["params"]) == index + book
    header = pack.read_header(tmp_path / "f")
    assert header.tensors["0.weight"]["bits_per_weight"] == 8 * (1 + 12) / (32 * 9), "without what it shares"


def test_damage_to_a_shared_codebook_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    model, _ = shared_file(path)
    data = path.read_bytes()
    for at in range(8, 8 + 1 + 4 + 34):  # the coding, the scale and the book of the 3x3 kernels
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        torch.manual_seed(1)
        twin = scrambled(model)
        before = snapshot(twin)
        with pytest.raises(dt.FormatError, match=r"shared\[0\].*damaged"):
            dt.load(path, twin, "compressed")
        assert snapshot(twin) == before
    assert not leftovers(tmp_path)


def _change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(head: dict[str, Any]) -> None:
        place: Any = head
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _change("forms", 0, "shared", to=0),
        _change("forms", 0, "shared", to=2),
        _change("forms", 0, "shared", to=3),
        _change("forms", 2, "shared", to=1),
        _change("forms", 0, "numbers", 3, to=5),
        _change("forms", 0, "numbers", 3, to=0),
        _change("forms", 0, "numbers", 3, to=9),
        _change("forms", 0, "numbers", 4, to=4),
        _change("forms", 0, "numbers", 5, to=7),
        _change("forms", 0, "numbers", 6, to=0),
        _change("forms", 0, "numbers", 2, to=1),
        _change("forms", 0, "numbers", 1, to=1),
    ],
)
def test_a_wrong_header_of_a_shared_codebook_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    model, _ = shared_file(tmp_path / "f")
    rewrite(tmp_path / "f", lambda head: None)
    dt.load(tmp_path / "f", model, "compressed")  # the rewriting itself is sound
    rewrite(tmp_path / "f", lambda head: change(head) and None)
    before = snapshot(model)
    with pytest.raises(dt.FormatError) as caught:
        dt.load(tmp_path / "f", model, "compressed")
    assert "\n" not in str(caught.value) and snapshot(model) == before


def test_codes_beyond_the_codebook_are_refused() -> None:
    w = torch.randn(8, 4, 3, 3)
    target = dt.KernelCodebook(size=5)
    params = target.fit(w)
    form = target.form(w, params)
    for name, value in (("codes", 7), ("book", 63)):
        values = [torch.full_like(v, value) if key == name else v for key, v in form.named.items()]
        with pytest.raises(ValueError, match=f"'{name}' holds {value}"):
            form.outline.form(values, form.layout, form.dtype)


# --- levels as a codebook ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_learned_levels_of_survivors_move_by_the_mean_of_their_gradients(granularity: Any) -> None:
    """Deep Compression's trained quantization: pruned, clustered, and the shared values learned (arXiv 1510.00149)."""
    torch.manual_seed(5)
    layer = nn.Linear(12, 3, bias=False)
    target = dt.SparseLevels(sparse=dt.TopK(keep=18), survivors=dt.LearnedLevels(k=3, granularity=granularity))
    rule = dt.Rule(match="weight", target=target, mechanism=dt.CodebookLearning(ste_from=None))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    run = dt.attach(layer, optimizer, dt.Recipe([rule]), total_steps=3)
    for _ in range(3):
        before = layer.weight.detach().clone()
        gradient = torch.randn(3, 12)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        expected = before.clone()
        rows = [slice(None)] if granularity == "tensor" else [slice(i, i + 1) for i in range(3)]
        for part in rows:
            for level in before[part].unique():
                mine = before[part] == level
                if level:  # zeros are pruned, and stay
                    expected[part][mine] -= 0.5 * gradient[part][mine].mean()
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert int((layer.weight != 0).sum()) == 18
    run.finalize()
    assert all(row["error"] == 0 for row in run.measure())


def test_levels_may_pass_each_other_while_they_learn() -> None:
    target = dt.LearnedLevels(k=2)
    w = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    params = target.fit(w)
    index = target.assign(w, params)
    crossed = target.with_codebook(params, target.codebook(params).flip(0), torch.float32)
    assert torch.equal(target.codebook(crossed)[index, 0], -w), "each weight goes with its own level"
    assert torch.equal(target.codebook(crossed)[target.assign(w, crossed), 0], w)
    assert torch.equal(target.project(w, crossed), w)


def test_a_held_zero_stays_although_an_earlier_stage_left_momentum() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(16, 8, bias=False)
    shared = dt.LearnedLevels(k=4, zero=True)
    pruned = dt.Rule(match="weight", target=dt.TopK(keep=40), mechanism=dt.Masked(start=0.5))
    learned = dt.Rule(
        match="weight",
        target=dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=shared),
        mechanism=dt.CodebookLearning(),
    )
    recipe = dt.Recipe(stages=[dt.Stage(rules=[pruned], share=0.5), dt.Stage(rules=[learned], share=0.5)])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    run = dt.attach(layer, optimizer, recipe, total_steps=20)
    for step in range(20):
        x, goal = torch.randn(32, 16), torch.randn(32, 8)
        optimizer.zero_grad()
        F.mse_loss(layer(x), goal).backward()
        optimizer.step()
        if step >= 9:
            assert int((layer.weight != 0).sum()) <= 40
    run.finalize()
    assert len(layer.weight.unique()) <= 4 and all(row["error"] == 0 for row in run.measure())


@pytest.mark.parametrize("seed", [0, 1])
def test_what_admm_shows_lies_where_it_pulls(seed: int) -> None:
    """z and the compressed life are fitted apart; K-means that started over would find quite another codebook."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = dt.KernelCodebook(size=32, book="global")
    rule = dt.Rule(match="weight", target=target, mechanism=dt.ADMM(rho=0.1, every=10, until=None))
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=100)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(8, 8, 8, 8)).square().mean().backward()
        optimizer.step()
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    far = sum(row["primal"] ** 2 for row in dt.residuals(run).values()) ** 0.5
    with run.compressed():
        after = {name: value.detach().clone() for name, value in model.named_parameters()}
    gap = sum(float((after[n] - before[n]).square().sum()) for n in names) ** 0.5
    anew = target.fit_model(
        [before[n] for n in names], [dt.Layout(shape=tuple(before[n].shape)) for n in names], [None] * 2
    )
    cold = sum(
        float((target.project(before[n], p) - before[n]).square().sum()) for n, p in zip(names, anew, strict=True)
    )
    assert gap < 1.02 * far < 1.02 * cold**0.5, (gap, far, cold**0.5)


# --- where floats end, and where work does ------------------------------------------------------------------------


def test_a_fit_under_autocast_is_the_fit_outside() -> None:
    """K-means multiplied its matrices in bfloat16, and found other codewords."""
    w = torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    target = dt.KernelCodebook(size=32)
    outside, q = target.fit(w), target.project(w, target.fit(w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = target.fit(w)
        warm = target.fit(w * 1.01, previous=inside)
        assert torch.equal(target.project(w, inside), q)
    assert all(torch.equal(value, inside[name]) for name, value in outside.tensors.items())
    assert torch.equal(warm["book"], target.fit(w * 1.01, previous=outside)["book"])


@pytest.mark.parametrize("bits", [6, None])
@pytest.mark.parametrize("size", [2.0**1023, 1e200, 1e-312])
def test_weights_at_the_ends_of_float64_have_a_codebook_and_a_unit(size: float, bits: int | None) -> None:
    """2.0**power raised OverflowError: below in a warm start, above in any fit; and the unit was infinite."""
    w = torch.randn(8, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9) * size
    target = dt.KernelCodebook(size=4, codebook_bits=bits)
    params = target.fit(w, previous=target.fit(w))
    assert 0 < float(target.typical(params)) < math.inf
    far = target.distance(target.project(w, params) - w, params)
    assert bool(torch.isfinite(far).all()) and bool((far >= 0).all())
    assert torch.equal(target.project(target.project(w, params), params), target.project(w, params))


@pytest.mark.parametrize(
    "target",
    [
        dt.TopK(keep=9),
        dt.TopK(keep=0.5),
        dt.NM(n=1, m=4),
        dt.Structured(group="filter", keep=0.5),
        dt.Zero(),
        dt.SparseLevels(sparse=dt.TopK(keep=0.5), survivors=dt.Binary()),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1e200, 1e307])
def test_the_unit_of_huge_weights_is_finite(target: dt.Target, size: float) -> None:
    w = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * size
    unit = target.typical(target.fit(w))
    assert bool((unit > 0).all()) and bool((unit > 1e37).all()) and bool(torch.isfinite(unit).all())


def test_k_means_stops_where_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Centres that stay empty were moved to where they are, in every iteration to the last."""
    seen: list[int] = []
    nearest = books._nearest
    monkeypatch.setattr(books, "_nearest", lambda x, centres: (seen.append(len(x)), nearest(x, centres))[1])
    w = torch.randn(128, 128, 3, 3, generator=torch.Generator().manual_seed(1))
    kernels = w.reshape(-1, 9)
    kernels[torch.rand(len(kernels), generator=torch.Generator().manual_seed(2)) < 0.97] = 0.25
    target = dt.KernelCodebook(size=64, sample=4)
    params = target.fit(w)
    assert 2 <= len(seen) <= 12
    seen.clear()
    target.fit(w, previous=params)
    assert 2 <= len(seen) <= 12


def test_pieces_of_long_blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece had 2^20 rows over codewords, whatever a row held: the whole tensor in float64, for one codeword."""
    seen: list[int] = []
    sure = books._nearest_for_sure
    monkeypatch.setattr(books, "_nearest_for_sure", lambda x, e: (seen.append(x.numel()), sure(x, e))[1])
    monkeypatch.setattr(books, "_CHUNK", 1 << 10)
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    target = dt.VectorCodebook(block=128, size=2)
    q = target.project(w, (params := target.fit(w)))
    assert seen and max(seen) <= 1 << 10
    monkeypatch.setattr(books, "_CHUNK", 1 << 20)
    assert torch.equal(target.project(w, params), q)


def test_a_codebook_over_two_optimizers_is_refused_at_once() -> None:
    """Also that of a later stage, which used to be found there."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    book = dt.VectorCodebook(block=2, size=4, book="global")
    learned = dt.Rule(match="weight", target=book, mechanism=dt.CodebookLearning())
    pulled = dt.Rule(match="weight", target=book, mechanism=dt.Penalty(strength=0.1))
    staged = dt.Recipe(stages=[dt.Stage(share=0.5, rules=[pulled]), dt.Stage(share=0.5, rules=[learned])])
    for recipe in (dt.Recipe([learned]), staged):
        with pytest.raises(ValueError, match="sit in two optimizers.*CodebookLearning moves them all in one step"):
            dt.attach(model, optimizers, recipe, total_steps=4)
    own = [dt.Rule(match=f"^{i}.weight", target=book, mechanism=dt.CodebookLearning()) for i in (0, 1)]
    dt.attach(model, optimizers, dt.Recipe(own), total_steps=4)
