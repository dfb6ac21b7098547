"""Recipes: who wins, what is passed over, names through wrappers and ties, presets, YAML, and the printed plan."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import MECHANISMS, PAIRS, TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import detent as dt
from detent.parameters import canonical_name
from detent.specs import from_spec, to_spec

PRESETS = [
    *(f"psg-w{bits}" for bits in (8, 6, 4, 3, 2)),
    "psg-prune90",
    *(f"psg-paper-w{bits}" for bits in (8, 6, 4, 3, 2)),
]
U4 = dt.Uniform(bits=4)


def small_net() -> nn.Module:
    """Convolution, normalisation, transposed convolution, embedding-free: what a small image net has."""
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, 8, 3, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(8))
    net.add_module("conv2", nn.Conv2d(8, 8, 3, groups=2))
    net.add_module("norm", nn.GroupNorm(2, 8))
    net.add_module("fc", nn.Linear(8, 5))
    return net


def becomes(plan: dt.Plan) -> dict[str, str]:
    return {row["parameter"]: row["becomes"] for row in plan.rows()}


def note(plan: dt.Plan, name: str) -> str:
    return next(row["note"] for row in plan.rows() if row["parameter"] == name)


# --- who wins ----------------------------------------------------------------------------------------------------


def test_the_first_match_wins() -> None:
    plan = dt.Recipe(
        [
            dt.Rule(match="^conv1", target=dt.Uniform(bits=8)),
            dt.Rule(match="^fc", keep=True),
            dt.Rule(match="weight$", target=dt.Uniform(bits=2)),
        ]
    ).resolve(small_net())
    assert becomes(plan) == {
        "conv1.weight": "Uniform(bits=8)",
        "bn1.weight": "full precision",
        "bn1.bias": "full precision",
        "conv2.weight": "Uniform(bits=2)",
        "conv2.bias": "full precision",
        "norm.weight": "full precision",
        "norm.bias": "full precision",
        "fc.weight": "full precision",
        "fc.bias": "full precision",
    }
    assert note(plan, "fc.weight") == "kept by rule 1 (match='^fc')"
    assert note(plan, "conv2.bias") == "no rule matches"


_NAMES = [name for name, _ in small_net().named_parameters()]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sets(st.sampled_from(_NAMES), min_size=1), st.booleans()), min_size=1, max_size=4))
def test_every_weight_is_decided_once_by_the_first_rule_that_may(rules) -> None:
    """Against a plain loop over rules; a rule left with nothing must be an error that names it."""
    claimable = {"conv1.weight", "conv2.weight", "fc.weight"}
    recipe = dt.Recipe(
        [
            dt.Rule(match=f"^({'|'.join(map(re.escape, sorted(names)))})$", keep=keep, target=None if keep else U4)
            for names, keep in rules
        ]
    )
    expected: dict[str, int] = {}
    for name in _NAMES:
        for i, (names, keep) in enumerate(rules):
            if name in names and (keep or name in claimable):
                expected[name] = i
                break
    idle = [i for i in range(len(rules)) if i not in expected.values()]
    if idle:
        with pytest.raises(ValueError, match=f"rule {idle[0]} "):
            recipe.resolve(small_net())
        return
    plan = recipe.resolve(small_net())
    assert [claim.name for claim in plan.claims] == _NAMES
    for claim in plan.claims:
        by = expected.get(claim.name)
        assert claim.rule == (None if by is None or rules[by][1] else by)
        assert claim.claimed != bool(claim.reason)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([dt.Rule(match="convl", target=U4)], "(match='convl') matches no parameter of this model; the nearest name"),
        ([dt.Rule(match="weight", target=U4), dt.Rule(match="fc", target=U4)], "rule 1 (match='fc') only matches"),
        ([dt.Rule(match="bn1", target=U4)], "claimed by earlier rules (2 matched)"),
        ([dt.Rule(match="weight", target=U4), dt.Rule(match="@last", keep=True)], "rule 1 (match='@last') only"),
    ],
)
def test_a_rule_that_claims_nothing_is_an_error(rules, says) -> None:
    with pytest.raises(ValueError) as caught:
        dt.Recipe(rules).resolve(small_net())
    assert says in str(caught.value)


def test_a_keep_rule_may_name_what_is_passed_over_anyway() -> None:
    plan = dt.Recipe([dt.Rule(match="bn1", keep=True), dt.Rule(match="weight", target=U4)]).resolve(small_net())
    assert note(plan, "bn1.weight") == "kept by rule 0 (match='bn1')"


def test_a_target_that_refuses_a_tensor_names_it() -> None:
    with pytest.raises(ValueError, match=r"'fc.weight' claimed by rule 0 .*asks for more weights than the 40"):
        dt.Recipe([dt.Rule(match="fc", target=dt.TopK(keep=100))]).resolve(small_net())
    whole = nn.Module()
    whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match="'weight' claimed by rule 0 .*this one is torch.int32"):
        dt.Recipe([dt.Rule(match="weight", target=U4)]).resolve(whole)


# --- passed over -------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Every kind of parameter a rule passes over, and one claimable weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.ln = nn.LayerNorm(6)
        self.rms = nn.RMSNorm(6)
        self.inorm = nn.InstanceNorm1d(6, affine=True)
        self.gain = nn.Parameter(torch.ones(6))
        self.temperature = nn.Parameter(torch.ones(()))
        self.rnn = nn.LSTM(4, 3)


def test_norms_biases_and_vectors_are_passed_over() -> None:
    plan = dt.Recipe([dt.Rule(match="", target=U4)]).resolve(Odd())
    assert [claim.name for claim in plan.claimed] == ["fc.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    reasons = {claim.name: claim.reason for claim in plan.claims if not claim.claimed}
    assert reasons["fc.bias"] == reasons["rnn.bias_ih_l0"] == "passed over: bias; name it in include= to claim it"
    for name in ("ln.weight", "rms.weight", "inorm.weight"):
        assert reasons[name].startswith("passed over: normalisation weight")
    assert reasons["gain"].startswith("passed over: 1-D parameter")
    assert reasons["temperature"].startswith("passed over: 0-D parameter")


def test_include_claims_what_it_names() -> None:
    plan = dt.Recipe([dt.Rule(match="", target=U4, include=r"^(fc\.bias|ln\.weight|gain)$")]).resolve(Odd())
    assert {"fc.bias", "ln.weight", "gain"} < {claim.name for claim in plan.claimed}
    assert "rms.weight" not in {claim.name for claim in plan.claimed}
    run = dt.compress(Odd(), dt.Recipe([dt.Rule(match=r"fc\.bias", target=U4, include="bias")]))
    assert [row["name"] for row in run.measure()] == ["fc.bias"]


def test_a_recipe_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot open no-such\.yaml: No such file"):
        dt.Recipe.from_yaml("no-such.yaml")


def test_an_include_that_names_nothing_is_refused() -> None:
    rule = dt.Rule(match="", target=U4, include="bais")
    with pytest.raises(
        ValueError, match=r"rule 0 \(include='bais'\) names no parameter of this model; the nearest name is"
    ):
        dt.Recipe([rule]).resolve(Odd())
    dt.Recipe([replace(rule, optional=True)]).resolve(Odd())


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_of_a_weight_norm_the_direction_is_the_weight(old: bool) -> None:
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    gain, direction = ("weight_g", "weight_v") if old else [f"parametrizations.weight.original{i}" for i in (0, 1)]
    model = nn.Sequential(norm(nn.Conv1d(4, 16, 3)), norm(nn.ConvTranspose1d(16, 8, 3), dim=1), nn.Flatten())
    plan = dt.Recipe([dt.Rule(match="weight", target=U4)]).resolve(model)
    assert [claim.name for claim in plan.claimed] == [f"0.{direction}", f"1.{direction}"]
    reasons = {claim.name: claim.reason for claim in plan.claims}
    assert reasons[f"0.{gain}"].startswith("passed over: gain of a weight normalisation")
    assert [claim.layout.channel_dim for claim in plan.claimed] == [0, 1]
    preset = dt.Recipe.preset("psg-w3").resolve(model)
    ends = {claim.name: preset.rule_of(claim).target for claim in preset.claimed}
    assert ends == {f"{i}.{direction}": dt.Uniform(bits=8) for i in (0, 1)}


# --- names -------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.again = self.body
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_claimed_once() -> None:
    plan = dt.Recipe([dt.Rule(match="weight", target=U4)]).resolve(Tied())
    assert [(claim.name, claim.aliases) for claim in plan.claimed] == [
        ("embed.weight", ("head.weight",)),
        ("body.weight", ("again.weight",)),
    ]
    assert note(plan, "embed.weight") == "tied: head.weight"


@pytest.mark.parametrize("name", ["head", "again"])
def test_an_alias_is_as_good_a_name(name: str) -> None:
    model = Tied()
    plan = dt.Recipe([dt.Rule(match=rf"^{name}\.weight$", target=U4)]).resolve(model)
    (claim,) = plan.claimed
    assert f"{name}.weight" in claim.aliases
    run = dt.compress(model, plan.recipe)
    run.finalize()
    assert len(model.head.weight.unique()) <= 15 or name != "head"
    assert model.head.weight is model.embed.weight


class Wrapper(nn.Module):
    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_names_are_canonical_through_wrappers(name: str) -> None:
    recipe = dt.Recipe([dt.Rule(match=r"^fc\.weight$", target=U4), dt.Rule(match="@first", target=U4)])
    bare = [claim.name for claim in recipe.resolve(small_net()).claims]
    wrapped = Wrapper(name, small_net())
    assert [claim.name for claim in recipe.resolve(wrapped).claims] == bare
    inside = small_net()
    inside.fc = Wrapper(name, inside.fc)  # type: ignore[assignment]
    assert [claim.name for claim in recipe.resolve(inside).claims] == bare
    if name == "_fsdp_wrapped_module":  # names are understood, flattened weights are not
        with pytest.raises(ValueError, match="FSDP1"):
            dt.compress(wrapped, recipe)
        return
    run = dt.compress(Wrapper("module", wrapped), recipe)
    assert sorted(run.encoded()) == ["conv1.weight", "fc.weight"]


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["module", "_orig_mod", "fc", "weight", "0", "modules"]), min_size=1, max_size=6))
def test_canonical_names(parts) -> None:
    name = canonical_name(".".join(parts))
    assert canonical_name(name) == name
    assert [part for part in parts if part not in ("module", "_orig_mod")] == [part for part in name.split(".") if part]


def test_first_and_last_are_the_ends_that_a_rule_may_claim() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    recipe = dt.Recipe(
        [
            dt.Rule(match="@first", target=dt.Uniform(bits=8)),
            dt.Rule(match="@last", target=dt.Uniform(bits=6)),
            dt.Rule(match="weight", target=U4),
        ]
    )
    plan = recipe.resolve(model)
    found = {claim.name: plan.rule_of(claim).target for claim in plan.claimed}
    assert found == {"1.weight": dt.Uniform(bits=8), "2.weight": U4, "3.weight": dt.Uniform(bits=6)}


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "channel_dim", "groups", "channels"),
    [
        (nn.Linear(4, 6), 0, 1, 6),
        (nn.Conv1d(4, 6, 3), 0, 1, 6),
        (nn.Conv2d(4, 6, 3, groups=2), 0, 1, 6),
        (nn.ConvTranspose1d(4, 6, 3), 1, 1, 6),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), 1, 2, 6),
        (nn.ConvTranspose3d(4, 8, 2, groups=4), 1, 4, 8),
        (nn.Embedding(10, 4), 0, 1, 10),
        (nn.Bilinear(3, 4, 5), 0, 1, 5),
    ],
)
def test_layouts_know_their_output_channels(module, channel_dim, groups, channels) -> None:
    (claim,) = dt.Recipe([dt.Rule(match="weight", target=U4)]).resolve(module).claimed
    layout = claim.layout
    assert (layout.channel_dim, layout.conv_groups, layout.channels) == (channel_dim, groups, channels)
    assert layout.shape == tuple(module.weight.shape) and claim.dtype == module.weight.dtype


def test_a_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = small_net()
    plan = dt.Recipe.preset("psg-w4").resolve(model)
    assert str(plan) == str(dt.Recipe.preset("psg-w4").resolve(small_net()))
    assert all(p.is_meta for p in model.parameters())


def test_parametrized_weights_are_found_under_their_own_name() -> None:
    """weight_norm keeps a magnitude and a direction; a rule that asks for the weight must not claim either silently."""
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    plan = dt.Recipe([dt.Rule(match="original1", target=U4)]).resolve(layer)
    assert [claim.name for claim in plan.claimed] == ["parametrizations.weight.original1"]


# --- the printed plan --------------------------------------------------------------------------------------------


def test_a_plan_lists_what_stays_full_precision_and_why() -> None:
    pulled = dt.Rule(match="weight", target=U4, mechanism=dt.PSG(gain=3.0))
    recipe = dt.Recipe([dt.Rule(match="^fc", keep=True), pulled])
    text = str(recipe.resolve(small_net()))
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "shape", "becomes", "pulled", "by", "note"]
    assert lines[-1] == "scales, levels and masks: fitted once"
    assert len(lines) == 1 + 9 + 2 and all(line == line.rstrip() for line in lines)
    by_name = {line.split()[0]: line for line in lines[1:-2]}
    assert "Uniform(bits=4)" in by_name["conv1.weight"] and "PSG(gain=3.0)" in by_name["conv1.weight"]
    assert by_name["fc.weight"].endswith("kept by rule 0 (match='^fc')")
    assert by_name["bn1.weight"].endswith("passed over: normalisation weight; name it in include= to claim it")
    assert "full precision" in by_name["bn1.bias"]
    claimed = 8 * 3 * 9 + 8 * 4 * 9
    total = sum(p.numel() for p in small_net().parameters())
    assert lines[-2] == f"{claimed} of {total} weights claimed ({100 * claimed / total:.1f} %)"


# --- presets -----------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("net", [small_net, mlp])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_and_attach(name, net) -> None:
    recipe = dt.Recipe.preset(name)
    model = net()
    plan = recipe.resolve(model)
    weights = {n for n, p in model.named_parameters() if p.dim() > 1}
    claimed = {claim.name for claim in plan.claimed}
    linear = {f"{n}.bias" for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None}
    biases = linear if "paper" in name else set()
    assert claimed == weights | biases
    run = dt.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe, total_steps=10)
    with run.compressed():
        assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("uniform-w5", "'uniform-w8', 'uniform-w6', 'uniform-w4', 'uniform-w3' or 'uniform-w2'"),
        ("admm-prune-50x", "'admm-prune-10x', 'admm-prune-70x' or 'admm-prune-246x'"),
        ("PSG-W3", "'psg-w3'"),
        ("KQ-Layr", "'kq-layer'"),
    ],
)
def test_a_preset_that_is_not_there_names_those_it_may_have_meant(name: str, meant: str) -> None:
    with pytest.raises(ValueError) as caught:
        dt.Recipe.preset(name)
    assert f"unknown; did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_paper_presets_claim_linear_biases(bits: int) -> None:
    """Of every linear layer, be it an end or between, and of nothing else."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), *(nn.Linear(4, 4) for _ in range(3)))
    plan = dt.Recipe.preset(f"psg-paper-w{bits}").resolve(net)
    found = {claim.name: plan.rule_of(claim).target for claim in plan.claimed if claim.name.endswith("bias")}
    widths = {"3.bias": bits, "4.bias": bits, "5.bias": 8 if bits <= 3 else bits}
    assert found == {name: dt.Uniform(bits=width, range="ema") for name, width in widths.items()}


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_presets_keep_the_ends_wider(bits: int) -> None:
    assert _widths(f"psg-w{bits}", mlp()) == {"0.weight": 8, "2.weight": bits, "4.weight": 8}
    paper = _widths(f"psg-paper-w{bits}", mlp())
    ends = 8 if bits <= 3 else bits
    layers = {"0": ends, "2": bits, "4": ends}  # a bias has the width of its layer
    assert paper == {f"{layer}.{kind}": width for layer, width in layers.items() for kind in ("weight", "bias")}


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("name", [*PRESETS, "kq", "admm-prune-10x", "admm-binary", "md-ternary", "uniform-w4"])
def test_presets_find_the_weights_of_recurrent_layers(name: str, layer: Any) -> None:
    options: dict[str, Any] = {"proj_size": 4} if layer is nn.LSTM else {}
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(20, 8),
            "conv": nn.Conv2d(3, 8, 3),  # what the presets of kernels are about
            "rnn": layer(8, 8, num_layers=2, bidirectional=True, **options),
            "cell": nn.LSTMCell(8, 8),
            "fc": nn.Linear(8, 3),
        }
    )
    claimed = {claim.name for claim in dt.Recipe.preset(name).resolve(model).claimed}
    weights = {n for n, p in model.named_parameters() if p.dim() > 1}
    assert any(name.endswith("_l1_reverse") for name in weights)
    assert claimed - {"fc.bias"} == weights


def test_presets_claim_the_direction_of_a_normalised_weight_and_leave_its_size_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it outdated; models that have it are not gone
        old = nn.utils.weight_norm(nn.Linear(8, 8))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), old, new, nn.Linear(8, 8), nn.Linear(8, 3))
    plan = dt.Recipe.preset("psg-w4").resolve(model)
    directions = {"1.weight_v", "2.parametrizations.weight.original1"}
    assert {claim.name for claim in plan.claimed} == {"0.weight", *directions, "3.weight", "4.weight"}


def _widths(name: str, model: nn.Module) -> dict[str, int]:
    plan = dt.Recipe.preset(name).resolve(model)
    targets = {claim.name: plan.rule_of(claim).target for claim in plan.claimed}
    return {name: target.bits for name, target in targets.items() if isinstance(target, dt.Uniform)}


def test_the_pruning_preset_keeps_a_tenth_of_the_model() -> None:
    model = mlp()
    run = dt.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), dt.Recipe.preset("psg-prune90"), total_steps=5)
    total = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight"))
    with run.compressed():
        kept = sum(int((p != 0).sum()) for n, p in model.named_parameters() if n.endswith("weight"))
    assert kept == round(total * 0.1)


# --- YAML --------------------------------------------------------------------------------------------------------


def test_fields_of_a_preset_may_be_changed() -> None:
    late = dt.Recipe.preset("psg-w3", start=0.3, gain=6.0)
    assert {(rule.mechanism.start, rule.mechanism.gain) for rule in late.rules} == {(0.3, 6.0)}  # type: ignore[union-attr]
    assert dt.Recipe.preset("psg-w3", start=None) == dt.Recipe.preset("psg-w3")
    staged = dt.Recipe.preset("admm-prune-70x", rho=0.5)
    assert [rule.mechanism.rho for stage in staged.stages for rule in stage.rules] == [0.5] * len(staged.rules)  # type: ignore[union-attr]
    mixed = dt.Recipe.preset("kq", reduce="sum")  # its 8-bit layers have another mechanism, without that field
    assert [getattr(rule.mechanism, "reduce", None) for rule in mixed.rules] == [None, "sum", None]
    with pytest.raises(ValueError, match=r"strat=...\): none .*; did you mean 'start'\?; they have .*gain, "):
        dt.Recipe.preset("psg-w3", strat=0.3)
    for name, field in (("uniform-w4", "start"), ("psg-w3", "fit_every")):
        with pytest.raises(ValueError, match=rf"'{name}', {field}=...\): none"):
            dt.Recipe.preset(name, **{field: 3})
    with pytest.raises(ValueError, match="PSG"):
        dt.Recipe.preset("psg-w3", gain=-1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name: str, tmp_path: Path) -> None:
    recipe = dt.Recipe.preset(name)
    text = recipe.to_yaml()
    assert dt.Recipe.from_yaml(text) == recipe
    assert dt.Recipe.from_yaml(text).to_yaml() == text
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert dt.Recipe.from_yaml(path) == dt.Recipe.from_yaml(str(path)) == recipe


def test_every_case_survives_yaml() -> None:
    rules = [
        dt.Rule(
            match=f"^{i}$",
            target=TARGETS[target],
            mechanism=MECHANISMS[mechanism],
            pinned=i % 2 == 0,
            include="bias$" if i % 3 == 0 else None,
            # A mechanism that says itself when it fits refuses to be told.
            fit_every=None if "fit_every" in MECHANISMS[mechanism].cadence(TARGETS[target]).own else i + 1,
            # A mechanism that maps right after its own last fit refuses another end of it.
            fit_until=None
            if (own := MECHANISMS[mechanism].cadence(TARGETS[target])).after or "fit_until" in own.own
            else 0.5
            if i % 2
            else i,
        )
        for i, (target, mechanism) in enumerate(PAIRS)
    ]
    recipe = dt.Recipe([*rules, dt.Rule(match="@last", keep=True)])
    back = dt.Recipe.from_yaml(recipe.to_yaml())
    assert back == recipe
    for mine, theirs in zip(recipe.rules, back.rules, strict=True):
        assert type(mine.fit_until) is type(theirs.fit_until), "step 1 and the fraction 1.0 are different moments"


@pytest.mark.parametrize("ramp", [dt.Linear, dt.Cosine])
def test_a_ramp_to_step_1_is_not_one_over_the_whole_training(ramp: Any) -> None:
    short, long = ramp(first=0.0, last=1.0, end=1), ramp(first=0.0, last=1.0, end=1.0)
    for eps in (short, long):
        rule = dt.Rule(match="weight$", target=dt.Uniform(bits=4), mechanism=dt.PSG(eps=eps))
        back = dt.Recipe.from_yaml(dt.Recipe([rule]).to_yaml()).rules[0].mechanism
        assert isinstance(back, dt.PSG) and isinstance(back.eps, ramp)
        again: Any = back.eps
        assert again(5, 10) == eps(5, 10) and type(again.end) is type(eps.end)
    assert short(5, 10) != long(5, 10), "the test shows nothing"


@pytest.mark.parametrize("keep", [1, 1.0, 5, 0.5])
def test_counts_and_fractions_stay_apart(keep) -> None:
    target = dt.TopK(keep=keep)
    back = from_spec(yaml.safe_load(yaml.safe_dump(to_spec(target))))
    assert back == target and type(back.keep) is type(keep)


def test_a_spec_leaves_defaults_out_and_is_plain_data() -> None:
    spec = to_spec(dt.PSG(gain=3.0, eps=dt.Linear(first=0.1, last=0.0), toward=dt.Zero()))
    assert spec == {
        "kind": "PSG",
        "gain": 3.0,
        "eps": {"kind": "Linear", "first": 0.1, "last": 0.0},
        "toward": {"kind": "Zero"},
    }
    assert to_spec(dt.PSG()) == {"kind": "PSG"} and to_spec(0.3) == 0.3 and from_spec(0.3) == 0.3


@pytest.mark.parametrize("kind", sorted({type(t).__name__ for t in [*TARGETS.values(), *MECHANISMS.values()]}))
def test_misspelt_kinds_are_told_the_nearest(kind: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{kind}'"):
        from_spec({"kind": kind[:-1] + "xy"[kind.endswith("x")]} if len(kind) > 3 else {"kind": kind + "x"})


@pytest.mark.parametrize("name", [*TARGETS, *MECHANISMS])
def test_unknown_fields_are_refused(name: str) -> None:
    spec = to_spec((TARGETS | MECHANISMS)[name])
    with pytest.raises(ValueError, match=rf"{spec['kind']} has no field 'colour'"):
        from_spec({**spec, "colour": 3})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "match", "target", "rules", "bits", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(
    _JSON
    | st.builds(lambda entry: {"rules": [entry]}, _JSON)
    | st.builds(
        lambda target: {"rules": [{"match": "a", "target": target}]},
        st.fixed_dictionaries(
            {"kind": st.sampled_from(["Uniform", "TopK", "PSG", "Linear", "Rule", "Zero"])},
            optional={
                "bits": _JSON,
                "keep": _JSON,
                "gain": _JSON,
                "first": _JSON,
                "range": _JSON,
            },
        ),
    )
)
def test_any_data_is_a_recipe_or_a_sentence(data) -> None:
    """Whatever the YAML holds, the answer is a recipe or a ValueError, never another exception."""
    try:
        text = yaml.safe_dump(data)
    except yaml.YAMLError:
        return
    try:
        recipe = dt.Recipe.from_yaml(text + "\n")
    except ValueError as error:
        assert str(error)
        return
    assert dt.Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_rule_may_ask_for_a_weight_decay_and_attach_holds_the_optimizer_to_it():
    """The published 2-bit setting trains without weight decay; an optimizer that has some is refused by name."""
    model, recipe = mlp(), dt.Recipe.preset("psg-paper-w2")
    asked = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    wrong = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    with pytest.raises(
        ValueError, match=r"has weight decay 0\.0001, but its rule .* asks for 0\.0; build the optimizer"
    ):
        dt.attach(model, wrong, recipe, total_steps=10)
    right = torch.optim.SGD(recipe.param_groups(model, lr=0.1, weight_decay=1e-4))
    run = dt.attach(model, right, recipe, total_steps=10)
    plain = {id(p) for group in right.param_groups if group["weight_decay"] for p in group["params"]}
    assert {id(dict(model.named_parameters())[name]) for name in asked if name != "0.bias"}.isdisjoint(plain)
    assert run.clock == 0
    with pytest.raises(ValueError, match=r"weight_decay=-1"):
        dt.Rule(match="w", target=dt.Uniform(bits=4), weight_decay=-1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dt.Rule(match="w", target=dt.Uniform), "must be a Target, Uniform(...), not the class"),  # type: ignore[arg-type]
        (lambda: dt.Rule(match="w", target=U4, mechanism=dt.PSG), "must be a Mechanism, PSG(...), not the class"),  # type: ignore[arg-type]
        (lambda: dt.Rule(match="w", target="psg"), "must be a Target, not 'psg'"),  # type: ignore[arg-type]
        (lambda: dt.Rule(match=3, target=U4), "Rule(match=3): must be a string"),  # type: ignore[arg-type]
        (lambda: dt.Rule(match="w", target=U4, include="@x("), "Rule(include='@x('): names with @ are \"@linear\""),
        (lambda: dt.Rule(match="w", target=U4, fit_every=2.5), "Rule(fit_every=2.5): must be a whole number"),  # type: ignore[arg-type]
        (lambda: dt.PSG(gain="4"), "PSG(gain='4'): must be a finite number > 0"),  # type: ignore[arg-type]
        (lambda: dt.PSG(strength="x"), "PSG(strength='x'): must be a number or a schedule"),  # type: ignore[arg-type]
        (lambda: dt.PSG(eps=None), "PSG(eps=None): must be a number or a schedule"),  # type: ignore[arg-type]
        (lambda: dt.PSG(clip="no"), "PSG(clip='no'): must be True or False"),  # type: ignore[arg-type]
        (lambda: dt.PSG(toward=3), "PSG(toward=3): must be a Target or None"),  # type: ignore[arg-type]
        (lambda: dt.PSG(start=1.5), "PSG.start=1.5: a fraction of training must lie in [0, 1]"),
        (lambda: dt.PSG(clip_start=-1), "PSG.clip_start=-1: a step number must be >= 0"),
        (lambda: dt.Clip(start="late"), "Clip.start='late': must be a step number"),  # type: ignore[arg-type]
        (lambda: dt.PSG.paper(lambda_s=-1), "PSG.paper(lambda_s=-1): must be a number > 0"),
        (lambda: dt.compress(None, dt.Recipe.preset("uniform-w4")), "compress(model=...): must be a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: dt.attach(torch.optim.SGD([torch.zeros(1)]), small_net(), "psg-w4"), "Module, not SGD"),  # type: ignore[arg-type]
        (lambda: dt.attach({}, torch.optim.SGD([torch.zeros(1)]), dt.Recipe.preset("psg-w4")), "Module, not dict"),  # type: ignore[arg-type]
        (lambda: dt.save(small_net(), "x.detent"), "save(run=...): must be what attach or compress gave, not"),  # type: ignore[arg-type]
        (lambda: dt.save(dt.compress(mlp(), dt.Recipe.preset("uniform-w4")), None), "save(path=None): must be"),  # type: ignore[arg-type]
        (lambda: dt.compress(mlp(), dt.Recipe.preset("uniform-w4")).measure(recipe="psg-w4"), "preset('psg-w4')"),  # type: ignore[arg-type]
        (lambda: dt.compress(small_net(), "uniform-w4"), "give detent.Recipe.preset('uniform-w4')"),  # type: ignore[arg-type]
        (lambda: dt.attach(small_net(), torch.optim.SGD([torch.zeros(1)]), "psg-w4"), "preset('psg-w4')"),  # type: ignore[arg-type]
    ],
)
def test_what_has_the_wrong_type_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert says in str(caught.value)


class WithTokens(nn.Module):
    """Parameters of the model's own come before, and after, those of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 6, 4))
        self.conv = nn.Conv2d(3, 4, 3)
        self.body = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 2)
        self.mask_token = nn.Parameter(torch.randn(2, 3, 3, 3))


def test_first_last_and_kernels_are_those_of_layers() -> None:
    grid = dt.Uniform(bits=8)
    rules = [
        dt.Rule(match="@first", target=grid),
        dt.Rule(match="@last", target=dt.Uniform(bits=7), include="@linear"),
        dt.Rule(match="@kernels", target=dt.KernelCodebook(size=4)),
    ]
    plan = dt.Recipe(rules).resolve(WithTokens())
    assert {c.name: c.rule for c in plan.claimed} == {"conv.weight": 0, "body.weight": 2, "fc.weight": 1, "fc.bias": 1}


def test_include_knows_a_tied_parameter_by_all_its_names() -> None:
    model = nn.ModuleDict({"enc": nn.Linear(4, 4), "dec": nn.Linear(4, 4)})
    model["dec"].bias = model["enc"].bias
    for name in ("enc.bias", "dec.bias"):
        rule = dt.Rule(match="dec", include=f"^{name}$", target=dt.Uniform(bits=4), mechanism=dt.PSG())
        claimed = [claim.name for claim in dt.Recipe([rule]).resolve(model).claimed]
        assert sorted(claimed) == ["dec.weight", "enc.bias"]
