"""Calibration: what of each layer is seen, what a run then is, and what nobody may notice of it."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import detent as dt
from detent.feedback import Prior, choose_places
from detent.inputs import Seen, Watch, Weight, calm
from detent.pack import read_header
from detent.parameters import census
from detent.report.files import run_of_file

GRID = dt.Uniform(bits=3, granularity="channel")
W = dt.Recipe([dt.Rule(match="@weights", target=GRID)])


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Inputs that hang together along axis 1 (and are no images of their neighbours)."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(shape[1], 2, generator=draw) @ torch.randn(2, shape[1], generator=draw)
    x = torch.randn(*shape, generator=draw)
    return torch.einsum("ij,nj...->ni...", mixed, x) + 0.3 * x


def watched(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[dict[str, Seen], Any]:
    """What is seen of each weight in a pass, and what the model answers."""
    named = dict(model.named_parameters())
    weights = [Weight(name=p.name, tensor=named[p.name], layout=p.layout) for p in census(model) if p.is_weight]
    with calm(model), Watch(weights, wanted=[w.name for w in weights]) as watch:
        answer = model(*args, **kwargs)
    return watch.seen, answer


def moment(seen: Seen) -> Tensor:
    return torch.stack([seen.moments[row] for row in sorted(seen.moments)])


def fits(run: dt.Run) -> dict[str, dt.Params]:
    """What the grid is fitted to, before and after calibration."""
    named = dict(run.model.named_parameters())
    return {claim.name: GRID.fit(named[claim.name], claim.layout) for claim in run.plan.claimed}


# --- what is seen -------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"groups": 2, "dilation": 2, "padding": 2},
    {"groups": 4},
    {"padding": "same", "padding_mode": "circular"},
]
TRANSPOSED = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"groups": 2, "dilation": 2, "padding": 3},
    {"groups": 4, "stride": 3, "padding": 2},
]
LAYERS = [
    *itertools.product((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONVOLUTIONS),
    *itertools.product((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), TRANSPOSED),
]


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_convolutions_are_their_explicit_matrices(kind: Any, options: dict[str, Any]) -> None:
    """X is what the layer makes of kernels of a single one: in float64 its moment is seen to the last digits."""
    axes = int(kind.__name__[-2])
    layer = kind(4, 8, (3, 2, 2)[:axes], bias=False, **options).double()
    x = torch.randn(2, 4, *(6, 7, 5)[:axes], dtype=torch.float64)
    seen = watched(layer, x)[0]["weight"]
    layout = next(census(layer)).layout
    columns = layout.numel // layout.channels
    rows = []
    for column in range(columns):
        ones = torch.zeros(layout.channels, columns, dtype=torch.float64)
        ones[:, column] = 1.0
        with torch.no_grad():
            layer.weight.copy_(layout.from_channels(ones))
            rows.append(layer(x).transpose(0, 1).reshape(layout.channels, -1))
    explicit = torch.stack(rows, dim=1)  # (channels, columns, positions)
    groups = options.get("groups", 1)
    assert seen.rows == layout.channels // groups and len(seen.moments) == groups
    assert set(seen.counts.values()) == {explicit.shape[2]}
    for channel in range(layout.channels):
        mine = seen.moments[channel // seen.rows * seen.rows]
        torch.testing.assert_close(mine, explicit[channel] @ explicit[channel].T, rtol=1e-12, atol=1e-12)


class Functional(nn.Module):
    """A weight used in ways that no module of torch does; `way` says which."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        shape = {"stack": (3, 5, 4), "turned stack": (3, 4, 5)}.get(way, (5, 4))
        self.w = nn.Parameter(torch.randn(shape))  # three axes called weight would be a convolution

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "stack":
            return torch.bmm(x.expand(3, -1, -1), self.w.transpose(1, 2))
        if self.way == "turned stack":
            return torch.stack([x @ self.w[i] for i in range(3)])
        if self.way == "weight first":
            return (self.w @ x.t()).t()
        if self.way == "in parts":
            return torch.cat([nn.functional.linear(x, part) for part in self.w.split(1)], dim=1)
        if self.way == "unequal parts":
            return torch.cat([nn.functional.linear(x, part) for part in self.w.split([2, 3])], dim=1)
        if self.way == "some inputs":
            return nn.functional.linear(x[:, :2], self.w[:, :2])
        if self.way == "turned":
            return x[:, :4] @ self.w[:4].clone().t() + x @ self.w[:4]
        if self.way == "also itself":
            return nn.functional.linear(x, self.w) + self.w.sum()
        if self.way == "a copy":
            return nn.functional.linear(x, self.w.half().float())
        raise AssertionError(self.way)


@pytest.mark.parametrize(("way", "parts"), [("stack", 3), ("turned stack", 3), ("weight first", 1), ("in parts", 5)])
def test_products_are_seen_whoever_makes_them(way: str, parts: int) -> None:
    x = inputs(20, 4)
    model = Functional(way)
    plan = dt.Recipe([dt.Rule(match="@weights", target=GRID, axis=2 if way == "turned stack" else None)])
    (claim,) = plan.resolve(model).claimed
    weight = next(model.parameters())
    with calm(model), Watch([Weight(name="w", tensor=weight, layout=claim.layout)], wanted=["w"]) as watch:
        model(x)
    seen = watch.seen["w"]
    assert not seen.otherwise and len(seen.moments) == parts and set(seen.counts.values()) == {20}
    for mine in seen.moments.values():
        torch.testing.assert_close(mine, (x.T @ x).double())
    report = dt.calibrate(dt.compress(model, plan), [x])
    assert [row.name for row in report.tensors] == [claim.name] and report.tensors[0].error < report.tensors[0].plain


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("unequal parts", "used 3 and 2 rows at a time"),
        ("some inputs", "used with 2 of its 4 inputs"),
        ("turned", "used by clone"),
        ("also itself", "used by sum"),
        ("a copy", "used by to_copy"),
    ],
)
def test_what_cannot_be_seen_keeps_plain_rounding_and_is_named(way: str, why: str) -> None:
    x = inputs(20, 4)
    model = nn.Sequential(nn.Linear(4, 4), Functional(way), nn.LazyLinear(2))
    model(x)
    run = dt.compress(model, W)
    with pytest.warns(UserWarning, match=rf"1 of 3 tensors keep plain rounding: '1.w' \({why}\)"):
        report = dt.calibrate(run, [x])
    assert dict(report.left) == {"1.w": why} and "1.w: plain rounding" in str(report)
    assert [row.name for row in report.tensors] == ["0.weight", "2.weight"]
    own = model.get_parameter("1.w").detach()
    assert torch.equal(run.encoded()["1.w"].decode(), GRID.project(own, fits(run)["1.w"]))


class Words(nn.Module):
    """What keeps plain rounding: a lookup, a tied head, a recurrent kernel, a bilinear form, a codebook, an idler."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.recurrent = nn.LSTM(4, 4)
        self.both = nn.Bilinear(4, 4, 4)
        self.codes = nn.Linear(4, 4)
        self.seen = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.recurrent(self.table(x))[0]
        return self.head(self.seen(self.codes(self.both(x, x))))


def test_every_reason_is_said() -> None:
    recipe = dt.Recipe([dt.Rule(match="codes", target=dt.VectorCodebook(block=2, size=4)), *W.rules])
    run = dt.compress(Words(), recipe)
    with pytest.warns(UserWarning, match="6 of 7 tensors keep plain rounding.* and 1 more"):
        report = dt.calibrate(run, [torch.arange(8).reshape(4, 2)])
    assert [row.name for row in report.tensors] == ["seen.weight"]
    assert report.left["table.weight"] == "used by embedding"
    assert report.left["recurrent.weight_ih_l0"] == "used by mkldnn_rnn_layer"
    assert report.left["both.weight"] == "used by trilinear"
    assert report.left["codes.weight"] == "VectorCodebook(size=4, block=2) moves weights together"
    assert report.left["idle.weight"] == "no batch used it"


def test_attention_is_seen() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = inputs(6, 8).reshape(2, 3, 8)
    seen, _ = watched(attention, x, x, x)
    torch.testing.assert_close(
        moment(seen["in_proj_weight"]), (x.reshape(-1, 8).T @ x.reshape(-1, 8)).double()[None], rtol=1e-4, atol=1e-4
    )
    seen, _ = watched(attention, x, 2 * x, 3 * x)  # a third for each of query, keys and values
    thirds = moment(seen["in_proj_weight"])
    torch.testing.assert_close(thirds[1:], torch.stack([4 * thirds[0], 9 * thirds[0]]), rtol=1e-4, atol=1e-4)
    assert seen["out_proj.weight"].counts == {0: 6}
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()  # a fast path of its own in eval mode
    report = dt.compress(layer, W, calibration=[x]).calibration
    assert report is not None and not report.left and len(report.tensors) == 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_compiled_model_is_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = inputs(20, 4)
    plain = dt.compress(copy.deepcopy(model), W, calibration=[x]).encoded()
    compiled = dt.compress(torch.compile(model, backend="eager"), W, calibration=[x]).encoded()  # type: ignore[arg-type]
    assert all(torch.equal(plain[name].decode(), compiled[name].decode()) for name in ("0.weight", "2.weight"))


def experts(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "Mixtral":
        config = transformers.MixtralConfig(**sizes, **heads)
        return transformers.MixtralForCausalLM(config)
    config = transformers.GptOssConfig(**sizes, **heads, head_dim=4, layer_types=["full_attention"] * 2)
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_of_transformers_are_seen_in_both_their_forms(kind: str) -> None:
    model = experts(kind)
    tokens = torch.randint(0, 32, (4, 16))
    found = {}
    for form in ("eager", "grouped_mm"):
        model.set_experts_implementation(form)  # type: ignore[operator]
        seen, _ = watched(model, tokens)
        found[form] = {name: each for name, each in seen.items() if "experts" in name}
        assert all(not each.otherwise and each.rows for each in found[form].values())
    assert len(found["eager"]) == 4
    for name, each in found["eager"].items():
        other = found["grouped_mm"][name]
        assert each.counts == other.counts and sum(each.counts.values()) == 2 * 64
        torch.testing.assert_close(moment(each), moment(other), rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="embed_tokens"):
        report = dt.calibrate(dt.compress(model, W), [tokens], drift=0.5)
    assert {row.name for row in report.tensors} >= set(found["eager"])


def test_conv1d_of_transformers_is_seen() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2))
    with pytest.warns(UserWarning, match="transformer.wte.weight"):
        report = dt.compress(model, W, calibration=[torch.randint(0, 32, (4, 16))]).calibration
    assert report is not None
    names = [row.name.removeprefix("transformer.h.0.") for row in report.tensors]
    assert names == ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]


# --- what a run then is -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions of several kinds with normalisation, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm2(self.deep(torch.relu(self.norm(self.stem(x))))))
        return self.head(torch.relu(self.up(x)).mean(dim=(2, 3)))


@pytest.fixture
def net() -> Net:
    net = Net()
    for _ in range(20):
        net(inputs(32, 3, 6, 6, seed=7))
    return net.eval()


BIASES = dt.Rule(match="bias$", include="bias$", target=dt.Round())


def far(run: dt.Run, x: Tensor) -> float:
    """How far the two lives' answers are apart."""
    with torch.no_grad():
        full = run.model(x)
        with run.compressed():
            return float((run.model(x) - full).square().sum())


def places(run: dt.Run) -> dict[str, Tensor]:
    with run.compressed():
        return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def test_the_full_life_stays_and_the_compressed_one_is_the_chosen_places(net: Net, tmp_path: Path) -> None:
    x = inputs(32, 3, 6, 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    run = dt.compress(net, W)
    plain, nearest = far(run, x), places(run)
    report = dt.calibrate(run, [x[:16], x[16:]])
    assert far(run, x) < plain / 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert report is run.calibration and not net.training
    chosen = places(run)
    for name, item in run.encoded().items():
        assert not torch.equal(chosen[name], nearest[name])
        assert torch.equal(chosen[name], item.decode())
        assert torch.equal(item.target.project(chosen[name], fits(run)[name]), chosen[name]), "places that move"
    rows = {row["name"]: row for row in run.measure()}
    gap = (before["stem.weight"] - chosen["stem.weight"]).square().sum() / before["stem.weight"].square().sum()
    assert rows["stem.weight"]["error"] == pytest.approx(float(gap), rel=1e-5)
    dt.save(run, tmp_path / "both.detent")
    dt.save(run, tmp_path / "small.detent", life="compressed")
    with run.compressed():
        here = {name: value.clone() for name, value in net.state_dict().items()}
    for file in ("both.detent", "small.detent"):
        twin = Net()
        dt.load(tmp_path / file, twin, life="compressed")
        assert all(torch.equal(value, here[name]) for name, value in twin.state_dict().items())
    again = run_of_file(tmp_path / "both.detent", Net())
    assert all(torch.equal(value, chosen[name]) for name, value in places(again).items())
    run.finalize()
    assert all(torch.equal(value, here[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, chosen[name]) for name, value in places(run).items())


def test_other_widths_and_recipes_are_rounded_plainly(net: Net) -> None:
    x = inputs(32, 3, 6, 6)
    run, twin = dt.compress(net, W, calibration=[x]), dt.compress(copy.deepcopy(net), W)
    other = dt.Recipe([dt.Rule(match="@weights", target=dt.Ternary())])
    widths: list[dict[str, Any]] = [{"bits": 4}, {"bits": 2}, {"recipe": other}]
    for options in widths:
        for name, item in twin.encoded(**options).items():
            assert torch.equal(run.encoded(**options)[name].decode(), item.decode())
    for name, item in run.encoded(bits=3).items():  # the width it has is the life it has
        assert torch.equal(item.decode(), places(run)[name])
    assert not torch.equal(run.encoded()["head.weight"].decode(), twin.encoded()["head.weight"].decode())


MASKS = [
    dt.TopK(keep=0.4),
    dt.TopK(keep=0.4, scope="model"),
    dt.NM(n=2, m=4, along="columns"),
    dt.Structured(group="column", keep=0.5),
    dt.SparseLevels(sparse=dt.NM(n=2, m=4, along="columns"), survivors=dt.Uniform(bits=4, granularity="channel")),
    dt.SparseLevels(sparse=dt.TopK(keep=0.4), survivors=dt.LearnedLevels(k=8)),
]


@pytest.mark.parametrize("target", MASKS, ids=repr)
def test_masks(net: Net, target: dt.Target) -> None:
    x = inputs(32, 3, 6, 6)
    run = dt.compress(net, dt.Recipe([dt.Rule(match="@weights", target=target)]))
    plain, kept = far(run, x), {name: int(torch.count_nonzero(p)) for name, p in places(run).items()}
    report = dt.calibrate(run, [x])
    assert far(run, x) < plain and sum(row.error < row.plain for row in report.tensors) >= 3
    for name, p in places(run).items():
        assert int(torch.count_nonzero(p)) <= kept[name]
        if name in run.encoded():
            assert torch.equal(run.encoded()[name].decode(), p)


def test_each_layer_sees_what_the_compressed_ones_before_it_make(net: Net) -> None:
    """By hand, layer by layer; with `order="parallel"` what the full-precision model makes."""
    x = inputs(32, 3, 6, 6)
    orders: list[Literal["sequential", "parallel"]] = ["sequential", "parallel"]
    for order in orders:
        run = dt.compress(copy.deepcopy(net), W)
        dt.calibrate(run, [x[:20], x[20:]], order=order, drift=0.0, correct=False)
        found, params = places(run), fits(run)
        seen = Net()
        seen.load_state_dict(net.state_dict())
        for name in ("stem.weight", "deep.weight", "up.weight", "head.weight"):
            weight = seen.get_parameter(name)
            expected = choose_places(weight.detach(), GRID, params[name], moment(watched(seen, x)[0][name])).places
            assert torch.equal(expected, found[name]), (order, name)
            if order == "sequential":
                with torch.no_grad():
                    weight.copy_(expected)


def test_weights_that_cannot_be_seen_are_compressed_for_those_behind_them(net: Net) -> None:
    x = inputs(32, 3, 6, 6)
    recipe = dt.Recipe([dt.Rule(match="stem.weight", target=dt.KernelCodebook(size=4)), *W.rules])
    run = dt.compress(net, recipe)
    with pytest.warns(UserWarning, match="stem.weight"):
        dt.calibrate(run, [x], drift=0.0, correct=False)
    seen = copy.deepcopy(net)
    with torch.no_grad():
        seen.stem.weight.copy_(run.encoded()["stem.weight"].decode())
    item = run.encoded()["deep.weight"]
    expected = choose_places(
        net.deep.weight.detach(), GRID, fits(run)["deep.weight"], moment(watched(seen, x)[0]["deep.weight"])
    )
    assert torch.equal(item.decode(), expected.places)


def test_drift_is_made_up_for() -> None:
    """The second layer aims at outputs of the full-precision model, and its error is measured against them."""
    coarse = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=2, granularity="channel"))])
    errors = {0.0: 0.0, 0.5: 0.0, 1.0: 0.0}
    for seed in range(5):
        x = inputs(200, 16, seed=seed)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False)).requires_grad_(False)
        run, before = dt.compress(model, coarse), model(x)
        for drift in errors:
            row = dt.calibrate(run, [x[:120], x[120:]], drift=drift).tensors[1]
            with run.compressed():
                now, answers = model[1](model[0](x)), model(x)
            aimed = drift * before + (1 - drift) * model[2](now)
            assert row.error == pytest.approx(float((aimed - answers).square().sum() / aimed.square().sum()), rel=1e-3)
            assert row.error < row.plain
            errors[drift] += float((before - answers).square().sum() / before.square().sum())
    assert errors[1.0] < errors[0.5] < errors[0.0], errors


def test_experts_that_are_given_other_tokens_are_taken_as_they_are() -> None:
    """Which tokens come to an expert changes with the layers before: there is nothing to compare."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.experts = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            mine = x[:, 0] > 0
            return torch.cat([nn.functional.linear(x[m], self.experts[i]) for i, m in enumerate((mine, ~mine))])

    model, x = Routed(), inputs(100, 4)
    run = dt.compress(model, W)
    found = [dt.calibrate(run, [x], drift=drift).tensors for drift in (0.0, 1.0)]
    assert [row.inputs for row in found[0]] == [100, 100]
    assert [row.error for row in found[0]] == pytest.approx([row.error for row in found[1]], rel=1e-5)


def test_grouped_convolutions_are_their_groups_apart() -> None:
    x = inputs(16, 8, 6, 6)
    together = nn.Conv2d(8, 6, 3, groups=2)
    apart = [nn.Conv2d(4, 3, 3) for _ in range(2)]
    with torch.no_grad():
        for i, conv in enumerate(apart):
            conv.weight.copy_(together.weight[3 * i : 3 * i + 3])
    whole = places(dt.compress(together, W, calibration=[x]))["weight"]
    for i, conv in enumerate(apart):
        mine = places(dt.compress(conv, W, calibration=[x[:, 4 * i : 4 * i + 4]]))["weight"]
        assert torch.equal(mine, whole[3 * i : 3 * i + 3])


def test_a_tied_weight_sees_both_its_layers_and_a_pass_does_not_end_between_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[4].weight = model[0].weight
    x = inputs(20, 4)
    report = dt.compress(model, W, calibration=[x]).calibration
    assert report is not None and [(row.name, row.inputs) for row in report.tensors] == [
        ("0.weight", 40),
        ("2.weight", 20),
    ]


def test_passes_end_where_nothing_more_is_wanted() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    calls = [0] * 6
    for i, layer in enumerate(model):

        def count(*_: Any, i: int = i) -> None:
            calls[i] += 1

        layer.register_forward_hook(count)
    dt.compress(model, W, calibration=[inputs(20, 4)])
    # One look, then for each layer a pass, and where layers before it are compressed another: the last layer's alone
    # come to the end.
    assert calls == [12, 11, 9, 7, 5, 3]


def test_layers_that_take_one_tensor_are_calibrated_together() -> None:
    attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return sum(attention[name](x) for name in "abc")  # type: ignore[return-value]

    run = dt.compress(attention, W)
    dt.calibrate(run, [inputs(20, 4)], forward=forward)
    assert len(calls) == 2  # one look, and one pass: nothing was compressed before them


# --- correction ---------------------------------------------------------------------------------------------------


def outputs(net: Net, name: str, x: Tensor) -> Tensor:
    """A module's outputs, (channels, positions)."""
    kept: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda *found: kept.append(found[-1]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return kept[0].transpose(0, 1).reshape(kept[0].shape[1], -1).double()


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_corrected_outputs_keep_their_mean_and_spread(net: Net, order: Any) -> None:
    x = inputs(64, 3, 6, 6)
    coarse = dt.Uniform(bits=2, granularity="channel")
    run = dt.compress(net, dt.Recipe([BIASES, dt.Rule(match="@weights", target=coarse)]))
    before = {name: outputs(net, name, x) for name in ("norm", "norm2", "up", "head")}
    report = dt.calibrate(run, [x[:20], x[20:]], order=order)
    assert report.corrected == ("norm", "norm2", "up.bias", "head.bias") and not report.uncorrected
    statistics = run.statistics()
    assert statistics is not None and statistics.source == "corrected"
    with run.compressed():
        after = {name: outputs(net, name, x) for name in before}
    for name, old in before.items():
        if order == "parallel" and name != "norm":
            continue  # there the inputs are others than those that were seen
        mean = (old.mean(dim=1) - after[name].mean(dim=1)).abs().max()
        assert mean < 1e-4 * old.std() + (2e-3 if "norm" not in name else 0), name  # biases have 16 bits
        if "norm" in name:
            torch.testing.assert_close(after[name].std(dim=1), old.std(dim=1), rtol=1e-3, atol=1e-3)
    raw = dt.compress(copy.deepcopy(net), run.plan.recipe)
    dt.calibrate(raw, [x[:20], x[20:]], order=order, correct=False)
    assert raw.statistics() is None and far(run, x) < far(raw, x)


def test_what_is_not_corrected_is_named(net: Net) -> None:
    report = dt.compress(net, W, calibration=[inputs(32, 3, 6, 6)]).calibration
    assert report is not None and report.corrected == ("norm", "norm2")
    why = "no BatchNorm follows it, and the recipe claims no bias of it: name it in include="
    assert dict(report.uncorrected) == {"up.weight": why, "head.weight": why}
    assert "outputs corrected in norm2" in str(report) and f"up.weight: outputs not corrected ({why})" in str(report)


def test_a_shared_norm_is_corrected_for_one_layer(net: Net) -> None:
    net.norm2 = net.norm
    report = dt.compress(net, W, calibration=[inputs(32, 3, 6, 6)]).calibration
    assert report is not None and report.corrected == ("norm",)
    assert report.uncorrected["deep.weight"] == "its BatchNorm takes another layer too"


def test_corrected_statistics_are_in_the_file_and_recalibrating_replaces_them(net: Net, tmp_path: Path) -> None:
    x = inputs(32, 3, 6, 6)
    run = dt.compress(net, W, calibration=[x])
    dt.save(run, tmp_path / "net.detent")
    header = read_header(tmp_path / "net.detent")
    assert header.card["batchnorm"] == "corrected"
    again = run_of_file(tmp_path / "net.detent", Net())
    found, known = again.statistics(), run.statistics()
    assert found is not None and known is not None and found.source == "corrected"
    assert all(torch.equal(found[name], value) for name, value in known.items())
    run.round_statistics("float16")
    dt.save(run, tmp_path / "short.detent")
    assert read_header(tmp_path / "short.detent").card["batchnorm"] == "corrected, rounded to float16"
    chosen = places(run)
    run.recalibrate([x])
    assert run.statistics().source == "re-estimated"  # type: ignore[union-attr]
    assert run.calibration is not None and torch.equal(places(run)["head.weight"], chosen["head.weight"])
    dt.calibrate(run, [x], correct=False)  # other places: those statistics are of no use any more
    assert run.statistics() is None


# --- trained runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mechanism", [dt.PSG(gain=8.0), dt.STE(), dt.PSG(gain=8.0, toward=dt.Zero()), dt.ADMM(every=2)], ids=repr
)
def test_places_are_of_the_weights_of_the_moment(mechanism: dt.Mechanism) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recipe = dt.Recipe([dt.Rule(match="weight", target=GRID, mechanism=mechanism)])
    run, x = dt.attach(model, optimizer, recipe, total_steps=20), inputs(64, 8)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(5):
        step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nearest = places(run)
    dt.calibrate(run, [x])
    chosen = places(run)
    assert any(not torch.equal(chosen[name], nearest[name]) for name in chosen)
    assert all(torch.equal(places(run)[name], chosen[name]) for name in chosen), "asking twice changes the answer"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    twin = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    twin.load_state_dict(model.state_dict())
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    step()
    assert run.calibration is None
    after = places(run)
    # Training goes on as if nobody had calibrated.
    other = torch.optim.SGD(twin.parameters(), lr=0.01)
    plain = dt.attach(twin, other, recipe, total_steps=20)
    other.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    twin(x).square().mean().backward()
    other.step()
    assert all(torch.equal(value, after[name]) for name, value in places(plain).items())


def test_zeros_of_an_earlier_stage_stay() -> None:
    model = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    prune = dt.Stage(share=0.5, rules=[dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.Masked())])
    round_ = dt.Stage(share=0.5, rules=[dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.STE())])
    run, x = dt.attach(model, optimizer, dt.Recipe(stages=[prune, round_]), total_steps=8), inputs(64, 16)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    gone = run.state_dict()["weights"]["weight"]["zeros"]
    assert int(gone.sum()) == 64
    dt.calibrate(run, [x])
    assert not bool(places(run)["weight"][gone].any())


def test_weights_that_are_written_drop_the_places() -> None:
    model, x = nn.Linear(8, 4), inputs(64, 8)
    run = dt.compress(model, W, calibration=[x])
    with torch.no_grad():
        model.weight.mul_(-1.0)  # the numbers that were fitted still fit
    assert torch.equal(places(run)["weight"], dt.compress(model, W).encoded()["weight"].decode())
    assert run.calibration is None
    dt.calibrate(run, [x])
    with torch.no_grad():
        model.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="rebind"):
        run.encoded()
    run.rebind(adopt=True)
    assert run.calibration is None
    assert torch.equal(places(run)["weight"], dt.compress(model, W).encoded()["weight"].decode())


# --- what may go wrong --------------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """Raises in a pass of its choice."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.left = at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("at", range(1, 9))
def test_broken_off_the_model_is_as_before(at: int) -> None:
    model, x = Fragile(at), [inputs(20, 4), inputs(20, 4, seed=1)]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = dt.compress(model, W)
    nearest = places(run)
    with pytest.raises(KeyboardInterrupt):
        dt.calibrate(run, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    assert run.calibration is None and run.statistics() is None
    assert all(torch.equal(value, nearest[name]) for name, value in places(run).items())
    assert dt.calibrate(run, x).tensors and all(module.training for module in model.modules())


ERRORS: dict[str, tuple[Callable[[dt.Run, Tensor], Any], str]] = {
    "no batches": (lambda run, x: dt.calibrate(run, []), "calibrate: the loader gave no batches"),
    "no feed": (lambda run, x: dt.calibrate(run, ["text"]), "calibrate: cannot feed a str to the model"),
    "nan": (lambda run, x: dt.calibrate(run, [x * torch.nan]), "the inputs of 'weight' are NaN or infinite"),
    "order": (lambda run, x: dt.calibrate(run, [x], order="random"), "calibrate(order='random')"),  # type: ignore[arg-type]
    "drift": (lambda run, x: dt.calibrate(run, [x], drift=1.5), "calibrate(drift=1.5): must be a number from 0 to 1"),
    "damping": (lambda run, x: dt.calibrate(run, [x], damping=0.0), "calibrate(damping=0.0): must be a finite number"),
    "a name": (lambda run, x: dt.calibrate(run, "data"), "calibrate('data'): must be batches of inputs, or \"prior\""),
    "prior and forward": (lambda run, x: dt.calibrate(run, "prior", forward=print), '"prior" without forward='),
    "prior and order": (lambda run, x: dt.calibrate(run, "prior", drift=1.0), "takes no switch but block="),
    "block": (lambda run, x: dt.calibrate(run, [x], block=0), "calibrate(block=0): must be a whole number >= 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name: str) -> None:
    act, says = ERRORS[name]
    run = dt.compress(nn.Linear(4, 2), W)
    with pytest.raises(ValueError) as caught:
        act(run, inputs(20, 4))
    assert says in str(caught.value)


def test_not_inside_a_compressed_life() -> None:
    run = dt.compress(nn.Linear(4, 2), W)
    with run.compressed(), pytest.raises(RuntimeError, match="calibrate inside run.compressed"):
        dt.calibrate(run, [inputs(20, 4)])
    # Nor may the model's own forward pass ask for one.
    with pytest.raises(RuntimeError, match=r"inside run.compressed\(\)"):
        dt.calibrate(run, [inputs(20, 4)], forward=lambda x: run.encoded())


def test_batches_are_read_once_and_fed_as_they_come(net: Net) -> None:
    x = inputs(32, 3, 6, 6)
    loader = iter([(x[:16], torch.zeros(16)), {"x": x[16:]}])
    found = places(dt.compress(net, W, calibration=loader))
    plain = places(dt.compress(net, W, calibration=[x[:16], x[16:]]))
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


# --- without inputs -----------------------------------------------------------------------------------------------


def test_a_prior_in_place_of_inputs(net: Net, tmp_path: Path) -> None:
    run = dt.compress(net, W)
    nearest = places(run)
    report = dt.calibrate(run, "prior")
    assert run.calibration is report and run.statistics() is None and not report.left
    assert {row.name: row.inputs for row in report.tensors} == dict.fromkeys(run.encoded(), 0)
    chosen, named, grids = places(run), dict(net.named_parameters()), fits(run)
    kernels = {"stem.weight": 9, "deep.weight": 9, "up.weight": 4, "head.weight": 1}
    for claim in run.plan.claimed:
        prior = Prior(kernel=kernels[claim.name])
        expected = choose_places(named[claim.name].detach(), GRID, grids[claim.name], prior).places
        assert torch.equal(chosen[claim.name], expected)
    for layer in ("stem", "up"):  # what it is for: errors that are the same everywhere
        kernel = named[f"{layer}.weight"].detach()
        gap = [(w[f"{layer}.weight"] - kernel).sum(dim=(2, 3)).square().sum() for w in (chosen, nearest)]
        assert gap[0] < gap[1] / 2
    assert "prior" in str(report).splitlines()[1]
    again = dt.compress(net, W, calibration="prior")
    assert all(torch.equal(value, chosen[name]) for name, value in places(again).items())
    dt.save(run, tmp_path / "small.detent", life="compressed")
    twin = Net()
    dt.load(tmp_path / "small.detent", twin, life="compressed")
    assert all(torch.equal(value, chosen[name]) for name, value in twin.named_parameters())


def test_what_a_prior_leaves_is_in_the_report_and_no_warning() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.LSTM(6, 6), nn.Linear(6, 9))
    model[3].weight = model[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = dt.calibrate(dt.compress(model, W), "prior")
    assert report.left == {"0.weight": "a table that is looked up"}
    assert [row.name for row in report.tensors] == ["1.weight", "2.weight_ih_l0", "2.weight_hh_l0"]
