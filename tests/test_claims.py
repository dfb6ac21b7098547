"""What is claimed, along which axis: the census of a model, presets by structure, axes known, assumed and said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import detent as dt
from detent.grouping import Layout

transformers = pytest.importorskip("transformers")

U4 = dt.Uniform(bits=4)
ROWS = dt.Uniform(bits=4, granularity="channel")


# --- tiny models, from configs ------------------------------------------------------------------------------------


def language_model(kind: str, **more: Any) -> nn.Module:
    """A tiny causal language model of transformers with random weights."""
    torch.manual_seed(0)
    common = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
    sizes = {
        "Llama": {"intermediate_size": 48},
        "Mixtral": {"intermediate_size": 40, "num_local_experts": 3, "num_experts_per_tok": 2},
        "Qwen2Moe": {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 3,
            "num_experts_per_tok": 2,
        },
        "Llama4": {"intermediate_size": 48, "num_local_experts": 3, "head_dim": 16, "interleave_moe_layer_step": 1},
        "GptOss": {
            "intermediate_size": 40,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    }[kind]
    name = {"Llama4": "Llama4TextConfig"}.get(kind, f"{kind}Config")
    config = getattr(transformers, name)(**common, **sizes, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=96, num_labels=3, **sizes))


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))


def whisper() -> nn.Module:
    torch.manual_seed(0)
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    config = transformers.WhisperConfig(
        vocab_size=96,
        num_mel_bins=8,
        d_model=32,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        **layers,
        **heads,
    )
    return transformers.WhisperForConditionalGeneration(config)


def xlnet() -> nn.Module:
    torch.manual_seed(0)
    return transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4, d_inner=48)
    )


def gemma3_projector() -> nn.Module:
    module = transformers.models.gemma3.modeling_gemma3.Gemma3MultiModalProjector
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return module(transformers.Gemma3Config(text_config=text, vision_config=vision))


MODELS = {
    "llama": lambda: language_model("Llama"),
    "llama tied": lambda: language_model("Llama", tie_word_embeddings=True),
    "mixtral": lambda: language_model("Mixtral"),
    "qwen2-moe": lambda: language_model("Qwen2Moe"),
    "gpt-oss": lambda: language_model("GptOss"),
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "whisper": whisper,
}


def layouts(model: nn.Module, match: str = "@weights") -> dict[str, Layout]:
    plan = dt.Recipe([dt.Rule(match=match, target=U4)]).resolve(model)
    return {claim.name: claim.layout for claim in plan.claimed}


# --- presets by structure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["psg-w4", "uniform-w4"])
def test_presets_claim_every_weight_of_a_transformer(name: str, preset: str) -> None:
    model = MODELS[name]()
    recipe = dt.Recipe.preset(preset)
    plan = recipe.resolve(model)
    claimed = {claim.name for claim in plan.claimed}
    left = {claim.name for claim in plan.claims} - claimed
    # Whisper's positions are sines that nobody trains.
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad} if preset == "psg-w4" else set()
    small = {n for n, p in model.named_parameters() if p.dim() < 2 or n.endswith(("_bias", "cls_token"))}
    assert left == small | frozen
    much = sum(p.numel() for n, p in model.named_parameters() if n in frozen) > 0.03 * sum(
        c.layout.numel for c in plan.claims
    )
    assert bool(plan.left()) == much


def test_two_axes_do_not_make_a_weight_of_a_bias() -> None:
    model = language_model("GptOss")
    plan = dt.Recipe([dt.Rule(match="mlp", target=U4)]).resolve(model)
    reasons = {claim.name.rpartition(".")[2]: claim.reason for claim in plan.claims if "experts" in claim.name}
    assert reasons["gate_up_proj"] == reasons["down_proj"] == ""
    assert reasons["gate_up_proj_bias"] == reasons["down_proj_bias"]
    assert reasons["down_proj_bias"].startswith("passed over: bias")


class Odd(nn.Module):
    """Parameters of two axes and more that are no weights, beside some that are, whatever they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.kernel = nn.Parameter(torch.randn(8, 6))
        self.head_bias = nn.Parameter(torch.randn(2, 8))
        self.planes = nn.LayerNorm([4, 8])
        self.gain = nn.Parameter(torch.randn(1, 8, 1, 1))


def test_odd_parameters_are_told_apart_by_structure() -> None:
    assert set(layouts(Odd())) == {"positions", "kernel"}
    plan = dt.Recipe.preset("uniform-w4").resolve(Odd())
    assert {claim.name for claim in plan.claimed} == {"positions", "kernel"}
    notes = {row["parameter"]: row["note"] for row in plan.rows()}
    assert notes["positions"].startswith("1 stacked on axis 0, channels on axis 1 (5 each), inputs on axis 2 (8)")
    assert "assumed; axis= and batch_axes= say otherwise" in notes["positions"] and "assumed" in notes["kernel"]


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
def test_presets_claim_reparametrized_weights() -> None:
    def conv() -> nn.Conv2d:
        return nn.Conv2d(4, 4, 3)

    spectral = nn.Sequential(spectral_norm(conv()), spectral_norm(conv()))
    assert set(layouts(spectral)) == {"0.weight_orig", "1.weight_orig"}
    lstm = nn.LSTM(4, 4)
    weight_norm(lstm, "weight_hh_l0")
    assert set(layouts(lstm)) == {"weight_ih_l0", "weight_hh_l0_v"}
    new = nn.Sequential(nn.utils.parametrizations.spectral_norm(conv()), nn.utils.parametrizations.orthogonal(conv()))
    assert set(layouts(new)) == {f"{i}.parametrizations.weight.original" for i in (0, 1)}


def test_a_pruning_mask_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    plan = dt.Recipe.preset("uniform-w4").resolve(model)
    notes = {row["parameter"]: row["note"] for row in plan.rows()}
    assert (
        "'weight_mask' is multiplied with it: make it permanent (torch.nn.utils.prune.remove)" in notes["0.weight_orig"]
    )
    assert not notes["1.weight"]
    prune.remove(model[0], "weight")
    assert "mask" not in str(dt.Recipe.preset("uniform-w4").resolve(model))


# --- axes ---------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """A stack of matrices in a module that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mats = nn.Parameter(torch.randn(3, 4, 5))


@pytest.mark.parametrize(
    ("make", "name", "axis", "batch"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", 0, ()),
        (lambda: nn.MultiheadAttention(8, 2, kdim=4), "k_proj_weight", 0, ()),
        (lambda: nn.LSTM(4, 5), "weight_hh_l0", 0, ()),
        (lambda: nn.GRUCell(4, 5), "weight_ih", 0, ()),
        (lambda: nn.EmbeddingBag(6, 4), "weight", 0, ()),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), "weight", 0, ()),
        (lambda: nn.ConvTranspose2d(4, 6, 2), "weight", 1, ()),
        (gpt2, "transformer.h.0.mlp.c_fc.weight", 1, ()),
        (gpt2, "transformer.h.0.attn.c_proj.weight", 1, ()),
        (MODELS["mixtral"], "model.layers.0.mlp.experts.gate_up_proj", 1, (0,)),
        (MODELS["qwen2-moe"], "model.layers.0.mlp.experts.down_proj", 1, (0,)),
        (MODELS["gpt-oss"], "model.layers.0.mlp.experts.gate_up_proj", 2, (0,)),
        (MODELS["gpt-oss"], "model.layers.0.mlp.experts.down_proj", 2, (0,)),
        (lambda: language_model("Llama4"), "model.layers.0.feed_forward.experts.down_proj", 2, (0,)),
        (xlnet, "transformer.layer.0.rel_attn.q", 2, (1,)),
        (xlnet, "transformer.layer.0.rel_attn.o", 0, ()),
        (gemma3_projector, "mm_input_projection_weight", 1, ()),
        (Stack, "mats", 1, (0,)),
    ],
)
def test_axes_are_those_of_the_module(make: Any, name: str, axis: int, batch: tuple[int, ...]) -> None:
    layout = layouts(make())[name]
    assert (layout.channel_dim, layout.batch_axes) == (axis, batch)


@pytest.mark.filterwarnings("ignore:calibrate")
@pytest.mark.parametrize("make", [lambda: language_model("Llama4"), MODELS["gpt-oss"], MODELS["mixtral"], gpt2])
def test_axes_are_those_that_the_model_multiplies_along(make: Any) -> None:
    run = dt.compress(make(), dt.Recipe([dt.Rule(match="@weights", target=ROWS)]))
    batch = {"input_ids": torch.arange(16).reshape(2, 8)}
    found = dt.calibrate(run, [batch], order="parallel", correct=False)
    assert set(found.left.values()) == {"used by embedding"} and len(found.tensors) > 3


_TARGETS = [
    dt.Uniform(bits=4),
    ROWS,
    dt.Uniform(bits=3, granularity=dt.Group(size=4)),
    dt.Ternary(granularity="channel"),
    dt.LearnedLevels(k=4, granularity="channel"),
    dt.NM(n=2, m=4),
    dt.Structured(group="filter", keep=0.5),
    dt.Structured(group="column", keep=0.5),
    dt.Structured(group="block", block=(2, 4), keep=0.5),
    dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=ROWS),
]


def _one(target: dt.Target, w: Tensor) -> Tensor:
    """A matrix (outputs, inputs) through a plain linear layer."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    with dt.compress(layer, dt.Recipe([dt.Rule(match="weight", target=target)])).compressed():
        return layer.weight.detach().clone()


@pytest.mark.parametrize("target", _TARGETS, ids=repr)
def test_a_matrix_of_inputs_times_outputs_is_as_its_linear_twin(target: dt.Target, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(12, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 12) * torch.logspace(-1, 1, 12))
    run = dt.compress(layer, dt.Recipe([dt.Rule(match="weight", target=target)]))
    with run.compressed():
        w = layer.weight.detach().clone()
    assert torch.equal(w, _one(target, layer.weight.detach().t()).t())
    dt.save(run, tmp_path / "f", "compressed")
    twin = transformers.pytorch_utils.Conv1D(12, 8)
    dt.load(tmp_path / "f", twin, life="compressed")
    assert torch.equal(twin.weight, w)


@pytest.mark.parametrize("target", [t for t in _TARGETS if not getattr(t, "keep", None) and t != dt.Uniform(bits=4)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_is_as_its_matrices_one_by_one(target: dt.Target, turned: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stack()
    shape = (3, 8, 12) if turned else (3, 12, 8)
    model.mats = nn.Parameter(torch.randn(shape))
    rule = dt.Rule(match="mats", target=target, axis=2 if turned else 1, batch_axes=[0])
    run = dt.compress(model, dt.Recipe([rule]))
    with run.compressed():
        found = model.mats.detach().clone()
    for got, w in zip(found, model.mats.detach(), strict=True):
        assert torch.equal(got, _one(target, w.t()).t() if turned else _one(target, w))
    dt.save(run, tmp_path / "f", "compressed")
    twin = Stack()
    twin.mats = nn.Parameter(torch.empty(shape))
    dt.load(tmp_path / "f", twin, life="compressed")
    assert torch.equal(twin.mats, found)


@pytest.mark.parametrize("granularity", [dt.PerTensor(), dt.Channel(), dt.Group(size=3)])
@pytest.mark.parametrize(
    ("axis", "groups", "batch"),
    [(0, 1, ()), (1, 1, ()), (1, 2, ()), (2, 1, ()), (1, 1, (0,)), (2, 1, (0,)), (0, 1, (2,))],
)
def test_rows_of_a_shard_have_their_own_numbers(granularity: Any, axis: int, groups: int, batch: Any) -> None:
    layout = Layout(shape=(4, 6, 8), channel_dim=axis, conv_groups=groups, batch_axes=batch)
    marks = torch.arange(granularity.count(layout), dtype=torch.float64)
    whole = granularity.expand(marks, layout).broadcast_to(layout.shape)
    assert torch.equal(granularity.sizes(layout), torch.bincount(whole.reshape(-1).long()))
    for first, past in ((0, 1), (1, 4), (4, 4)):
        here = granularity.expand(marks, layout.local(first, past)).broadcast_to((past - first, 6, 8))
        assert torch.equal(here, whole[first:past])


def test_columns_of_a_stack_are_those_of_its_matrices() -> None:
    model = Stack()
    with torch.no_grad():
        model.mats.fill_(1.0)
        model.mats[1, :, 2] = model.mats[2, :, 4] = 0.1
    run = dt.compress(model, dt.Recipe([dt.Rule(match="mats", target=dt.Structured(group="column", keep=13))]))
    with run.compressed():
        gone = (model.mats == 0).all(dim=1)
    assert gone.nonzero().tolist() == [[1, 2], [2, 4]]


def test_a_rule_says_the_axes() -> None:
    model = Stack()
    rule = dt.Rule(match="mats", target=ROWS, axis=0, batch_axes=[2])
    recipe = dt.Recipe([rule])
    assert dt.Recipe.from_yaml(recipe.to_yaml()) == recipe
    run = dt.compress(model, recipe)
    scale = run.encoded()["mats"].form.named["scale"]
    largest = model.mats.detach().abs().amax(dim=1)  # (3, 5): a stack of 5, 3 channels each
    assert scale.shape == (15,) and bool((scale.reshape(5, 3).t() * 7 <= largest * 1.01).all())
    assert "5 stacked on axis 2, channels on axis 0 (3 each), inputs on axis 1 (4)" in str(run.plan)
    assert "assumed" not in str(run.plan)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"axis": 3}, "axis=3, batch_axes=None does not fit its shape (3, 4, 5)"),
        ({"axis": -1}, "Rule(axis=-1): must be a whole number from 0 to 15"),
        ({"batch_axes": [0, 0]}, "must be distinct whole numbers"),
        ({"axis": 1, "batch_axes": [1]}, "an axis is one or the other"),
    ],
)
def test_axes_that_cannot_be_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        dt.Recipe([dt.Rule(match="mats", target=U4, **fields)]).resolve(Stack())
    assert says in str(caught.value)


def test_known_axes_are_not_overruled() -> None:
    with pytest.raises(ValueError, match="axis=1, batch_axes=None, but the outputs of Linear are on axis 0"):
        dt.Recipe([dt.Rule(match="weight", target=U4, axis=1)]).resolve(nn.Linear(3, 4))


class Own(nn.Module):
    """A module nobody knows that keeps (inputs, outputs) and calls it `weight`."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None


@pytest.mark.parametrize(
    ("sizes", "bias", "axis", "assumed"),
    [((6, 4), False, 0, True), ((6, 4), True, 1, False), ((4, 4), True, 0, True), ((4, 4), False, 0, True)],
)
def test_axes_that_nothing_tells_are_said_to_be_assumed(sizes: Any, bias: bool, axis: int, assumed: bool) -> None:
    model = Own(sizes[0], sizes[1], bias)
    plan = dt.Recipe([dt.Rule(match="@weights", target=ROWS)]).resolve(model)
    (claim,) = plan.claimed
    assert claim.layout.channel_dim == axis and ("(assumed; axis=" in claim.note) == assumed
    said = dt.Recipe([dt.Rule(match="@weights", target=ROWS, axis=1)]).resolve(model)
    assert said.claimed[0].layout.channel_dim == 1 and "assumed" not in said.claimed[0].note


class TurnedLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.weight = nn.Parameter(torch.randn(inputs, outputs))


class TurnedEmbedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.weight = nn.Parameter(torch.randn(4, 6))


class TurnedConv(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(6, 4, 3)
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))


class PlainLinear(nn.Linear):
    """A subclass that changes nothing of the weight."""


@pytest.mark.parametrize(
    ("make", "axis", "assumed"),
    [
        (lambda: TurnedLinear(6, 4), 1, False),
        (lambda: TurnedLinear(6, 4, bias=False), 0, True),
        (TurnedEmbedding, 0, True),
        (TurnedConv, 0, True),
        (lambda: PlainLinear(6, 4), 0, False),
        (lambda: TurnedLinear(4, 4), 0, False),
    ],
)
def test_a_subclass_is_known_as_far_as_its_shape_is_that_of_its_class(make: Any, axis: int, assumed: bool) -> None:
    (claim,) = dt.Recipe([dt.Rule(match="weight", target=ROWS)]).resolve(make()).claimed
    assert claim.layout.channel_dim == axis and ("assumed" in claim.note) == assumed
    (claim,) = dt.Recipe([dt.Rule(match="weight", target=ROWS, axis=1)]).resolve(make()).claimed
    assert claim.layout.channel_dim == 1 and "assumed" not in claim.note


def test_training_moves_a_turned_weight_as_its_twin() -> None:
    """PSG on (inputs, outputs) takes the very steps that it takes on the transposed matrix."""
    torch.manual_seed(0)
    turned, plain = transformers.pytorch_utils.Conv1D(6, 4), nn.Linear(4, 6)
    with torch.no_grad():
        plain.weight.copy_(turned.weight.t())
        plain.bias.copy_(turned.bias)
    x = torch.randn(3, 4)
    for layer in (turned, plain):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        recipe = dt.Recipe([dt.Rule(match="weight", target=ROWS, mechanism=dt.PSG(gain=8.0))])
        dt.attach(layer, optimizer, recipe, total_steps=3)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(turned.weight.t(), plain.weight, rtol=1e-5, atol=1e-7)


# --- frozen parameters --------------------------------------------------------------------------------------------

PULLED = dt.Rule(match="weight", target=U4, mechanism=dt.PSG(gain=8.0))


def frozen_backbone() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    return net


def held(model: nn.Module) -> Tensor:
    """The weight of the frozen layer."""
    return next(model.parameters())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for i in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("recipe", [dt.Recipe([PULLED]), dt.Recipe.preset("psg-w4"), dt.Recipe.preset("psg-prune90")])
def test_frozen_weights_are_passed_over_with_the_reason(recipe: dt.Recipe) -> None:
    model = frozen_backbone()
    run = dt.attach(model, sgd(model), recipe, total_steps=4)
    reasons = {claim.name: claim.reason for claim in run.plan.claims}
    assert reasons["0.weight"].startswith("passed over: frozen, so nothing can pull it")
    assert [claim.name for claim in run.plan.claimed] == ["2.weight", "4.weight"]
    assert "0.weight (" in run.plan.left()
    assert len(dt.compress(model, recipe).plan.claimed) == 3, "without training nothing is frozen"


def test_a_rule_that_finds_frozen_weights_alone_says_both_ways_out() -> None:
    model = frozen_backbone()
    rule = dt.Rule(match="^0", target=U4, mechanism=dt.HardProjection())
    with pytest.raises(ValueError) as caught:
        dt.attach(model, sgd(model), dt.Recipe([rule, PULLED]), total_steps=4)
    said = str(caught.value)
    assert "'0.weight' is frozen" in said and "leave out mechanism=" in said and "unfreeze it" in said


def test_a_frozen_weight_has_a_target_without_a_mechanism(tmp_path: Path) -> None:
    model = frozen_backbone()
    kept = held(model).detach().clone()
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, dt.Recipe([dt.Rule(match="^0", target=ROWS), PULLED]), total_steps=4)
    params = run.encoded()["0.weight"].form.named["scale"]
    train(model, optimizer, 4)
    assert torch.equal(held(model), kept) and torch.equal(run.encoded()["0.weight"].form.named["scale"], params)
    with run.compressed():
        shown = held(model).detach().clone()
    assert torch.equal(shown, _one(ROWS, kept))
    assert len(shown[0].unique()) <= 15 and torch.equal(held(model), kept)
    dt.save(run, tmp_path / "f", "compressed")
    twin = frozen_backbone()
    dt.load(tmp_path / "f", twin, life="compressed")
    assert torch.equal(held(twin), shown)
    resumed = frozen_backbone()
    again = sgd(resumed)
    other = dt.attach(resumed, again, dt.Recipe([dt.Rule(match="^0", target=ROWS), PULLED]), total_steps=4)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    with other.compressed():
        assert torch.equal(held(resumed), shown)
    run.finalize()
    assert torch.equal(held(model), shown)


def test_what_is_fitted_to_a_frozen_weight_follows_it() -> None:
    """A checkpoint that is loaded after attach brings another backbone: nothing else remembers the old one."""
    model = frozen_backbone()
    run = dt.attach(model, sgd(model), dt.Recipe([dt.Rule(match="^0", target=ROWS), PULLED]), total_steps=4)
    scale = run.encoded()["0.weight"].form.named["scale"]
    with torch.no_grad():
        held(model).mul_(2)
    assert torch.equal(run.encoded()["0.weight"].form.named["scale"], 2 * scale)


def test_a_trained_weight_needs_a_mechanism() -> None:
    model = frozen_backbone()
    with pytest.raises(ValueError, match=r"rule 0 \(match='weight'\) has no mechanism, and '2.weight' is trained"):
        dt.attach(model, sgd(model), dt.Recipe([dt.Rule(match="weight", target=U4)]), total_steps=4)


# --- first and last -----------------------------------------------------------------------------------------------

ENDS = dt.Recipe([dt.Rule(match=end, target=dt.Uniform(bits=8)) for end in ("@first", "@last")])


class HeadFirst(nn.Module):
    """What runs last is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.down = nn.Linear(3, 4)
        self.mid = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.down(x)))


class Detector(nn.Module):
    """Two heads on one body, a second input that joins late, and features shown on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.mid = nn.Conv2d(4, 4, 3)
        self.side = nn.Linear(5, 4)
        self.boxes = nn.Conv2d(4, 2, 1)
        self.classes = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        features = self.mid(self.body(x).relu()) + self.side(y)[:, :, None, None]
        return {"boxes": self.boxes(features), "more": [self.classes(features)], "features": features}


def ends(plan: dt.Plan) -> tuple[set[str], set[str]]:
    first, last = plan.ends.partition(" (by")[0].split("; ")
    return set(first.removeprefix("first: ").split(", ")), set(last.removeprefix("last: ").split(", "))


def test_first_and_last_go_by_execution_where_an_example_is_given() -> None:
    model = HeadFirst()
    plan = ENDS.resolve(model)
    assert ends(plan) == ({"head.weight"}, {"mid.weight"}) and "by order of registration" in str(plan)
    x = torch.randn(2, 3)
    plan = ENDS.resolve(model, example=x)
    assert ends(plan) == ({"down.weight"}, {"head.weight"}) and "by execution of the example" in str(plan)
    assert dt.compress(model, ENDS, example=x).plan.ends == plan.ends
    recipe = dt.Recipe.preset("psg-w3")
    run = dt.attach(model, torch.optim.SGD(model.parameters(), 0.1), recipe, total_steps=3, example=(x,))
    assert {claim.name for claim in run.plan.claimed if run.plan.rule_of(claim).pinned} == {
        "down.weight",
        "head.weight",
    }


def test_several_layers_may_be_first_and_last() -> None:
    model = Detector().train()
    model.body.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = ENDS.resolve(model, example={"x": torch.randn(1, 3, 8, 8), "y": torch.randn(1, 5)})
    heads = {"boxes.weight", "classes.parametrizations.weight.original1"}
    assert ends(plan) == ({"body.weight", "side.weight"}, heads)
    assert model.training and not model.body.weight.requires_grad and model.mid.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


_FIRST_AND_LAST = {
    "llama": ({"model.embed_tokens.weight"}, {"lm_head.weight"}),
    "llama tied": ({"model.embed_tokens.weight"}, {"model.embed_tokens.weight"}),
    "mixtral": ({"model.embed_tokens.weight"}, {"lm_head.weight"}),
    "gpt-oss": ({"model.embed_tokens.weight"}, {"lm_head.weight"}),
    "gpt2": ({"transformer.wte.weight"}, {"transformer.wte.weight"}),
    "bert": ({"bert.embeddings.word_embeddings.weight"}, {"classifier.weight"}),
    "t5": ({"shared.weight"}, {"shared.weight"}),
    "vit": ({"vit.embeddings.patch_embeddings.projection.weight"}, {"classifier.weight"}),
}


@pytest.mark.parametrize("name", _FIRST_AND_LAST)
def test_the_ends_of_a_transformer_are_known_both_ways(name: str) -> None:
    model, ids = MODELS[name](), torch.randint(1, 96, (2, 6))
    example: Any = {"t5": {"input_ids": ids, "decoder_input_ids": ids}, "vit": torch.randn(1, 3, 16, 16)}.get(name, ids)
    assert ends(ENDS.resolve(model)) == ends(ENDS.resolve(model, example=example)) == _FIRST_AND_LAST[name]


def test_each_input_of_whisper_has_a_first_layer() -> None:
    example = {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": torch.randint(1, 96, (1, 6))}
    plan = ENDS.resolve(whisper(), example=example)
    assert ends(plan) == (
        {"model.encoder.conv1.weight", "model.decoder.embed_tokens.weight"},
        {"model.decoder.embed_tokens.weight"},
    )


def test_an_example_that_the_model_does_not_take_is_told() -> None:
    with pytest.raises(ValueError, match="the model raised RuntimeError on it"):
        ENDS.resolve(HeadFirst(), example=torch.randn(2, 5))
    with pytest.raises(ValueError, match="example=int: must be a tensor, a tuple"):
        ENDS.resolve(HeadFirst(), example=3)


def test_a_pass_without_a_graph_falls_back_and_says_so() -> None:
    class Closed(HeadFirst):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    plan = ENDS.resolve(Closed(), example=torch.randn(2, 3))
    assert "by order of registration: the example left no graph" in plan.ends


# --- what is left, and what is left of it -------------------------------------------------------------------------


class Experts(nn.Module):
    """Most of the weights under a name that `weight` does not find."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.experts = nn.ParameterDict({"up0": torch.randn(3, 8, 8), "up1": torch.randn(3, 8, 8)})


def told(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in seen]


def test_what_a_whole_recipe_leaves_is_said_by_name_and_share() -> None:
    model, weights = Experts(), 2 * 16 + 2 * 4 + 2 * 192
    recipe = dt.Recipe([dt.Rule(match="layers.*weight|up0", target=U4, mechanism=dt.PSG(gain=8.0))])
    share = f"experts.up1 ({100 * 192 / weights:.1f} % of the weights; no rule matches)"
    assert str(recipe.resolve(model)).splitlines()[-1] == f"left in full precision: {share}"
    (said,) = told(lambda: dt.compress(model, recipe))
    assert said == f"compress: {share} stay in full precision; a rule with keep=True says that it is meant"
    (said,) = told(lambda: dt.attach(model, torch.optim.SGD(model.parameters(), 0.1), recipe, total_steps=2))
    assert said.startswith(f"attach: {share}")
    meant = dt.Recipe([dt.Rule(match="up1", keep=True), *recipe.rules])
    assert not told(lambda: dt.compress(model, meant)) and "left in full" not in str(meant.resolve(model))


def test_complex_weights_are_left_with_the_reason() -> None:
    """Fourier layers keep most of a model in complex numbers."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_parameter("modes", nn.Parameter(torch.randn(8, 8, dtype=torch.complex64)))
    (said,) = told(lambda: dt.compress(model, dt.Recipe.preset("uniform-w4")))
    assert "modes (68.1 % of the weights; passed over: complex numbers, which lie on no target)" in said


def test_tensors_that_are_alike_are_said_together() -> None:
    model = Experts()
    plan = dt.Recipe([dt.Rule(match="layers.*weight", target=U4)]).resolve(model)
    assert plan.left().startswith("experts.up0 and 1 alike (90.6 % of the weights")
    assert not told(lambda: dt.compress(Experts(), dt.Recipe([dt.Rule(match="layers.0.weight", target=U4)])))


def shallow() -> nn.Sequential:
    """A network whose middle layer has small weights, that the next one makes up for."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for p in net[2].parameters():
            p.mul_(0.01)
    return net


PRUNED = dt.Recipe([dt.Rule(match="weight", target=dt.TopK(keep=0.3, scope="model"))])


def test_a_tensor_without_a_weight_is_said_once_with_what_to_do(tmp_path: Path) -> None:
    runs: list[dt.Run] = []
    (said,) = told(lambda: runs.append(dt.compress(shallow(), PRUNED)))
    assert said == (
        "compress: TopK(keep=0.3, scope='model') leaves no weight of '2.weight'; one threshold over the model does "
        'that where weights are small: use share="lamp" or scope="tensor"'
    )
    assert not told(lambda: dt.save(runs[0], tmp_path / "f", "compressed")) and not told(runs[0].finalize)
    lamp = dt.Recipe([dt.Rule(match="weight", target=dt.TopK(keep=0.3, scope="model", share="lamp"))])
    assert not told(lambda: dt.compress(shallow(), lamp))


def test_an_output_that_hears_nothing_is_said() -> None:
    x = torch.randn(3, 8)
    said = told(lambda: dt.compress(shallow(), PRUNED, example=x))
    assert len(said) == 2 and "does not depend on the input any more" in said[1]
    assert not told(lambda: dt.compress(shallow(), dt.Recipe.preset("uniform-w4"), example=x))
    deaf = shallow()
    with torch.no_grad():
        deaf[4].weight.zero_()  # type: ignore[operator]
    assert not told(lambda: dt.compress(deaf, dt.Recipe([dt.Rule(match="^0.weight", target=U4)]), example=x))


@pytest.mark.parametrize("end", ["finalize", "save", "stage"])
def test_collapse_in_training_is_said_where_it_happens(end: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight.mul_(1e-4)  # type: ignore[operator]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = dt.Rule(match="weight", target=dt.TopK(keep=0.5, scope="model"), mechanism=dt.HardProjection())
    later = dt.Rule(match="0.weight", target=dt.TopK(keep="nonzero"), mechanism=dt.HardProjection())
    stages = [dt.Stage(rules=[rule], share=0.5), dt.Stage(rules=[later], share=0.5)]
    staged = end == "stage"
    run = dt.attach(model, optimizer, dt.Recipe(stages=stages) if staged else dt.Recipe([rule]), total_steps=2)

    def step() -> None:
        model(torch.randn(3, 4)).sum().mul(1e-9).backward()
        optimizer.step()

    said = told(step) if staged else []
    if end != "stage":
        said = told(run.finalize if end == "finalize" else lambda: dt.save(run, tmp_path / "f"))
    assert len(said) == 1 and "leaves no weight of '1.weight'" in said[0], said
    assert said[0].startswith({"stage": "the end of stage 1", "finalize": "finalize()", "save": "save"}[end])


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda: nn.Linear(4, 4), dt.Zero()),
        (lambda: nn.Linear(1, 1), dt.Binary()),
        (lambda: nn.utils.skip_init(nn.Linear, 4, 4), dt.Binary()),
        (lambda: nn.Linear(16, 16), dt.Uniform(bits=2)),
        (lambda: nn.Linear(16, 16), dt.Ternary(granularity="channel")),
    ],
)
def test_what_is_no_loss_is_not_said(make: Any, target: dt.Target) -> None:
    model = make()
    with torch.no_grad():
        if isinstance(target, dt.Binary):
            model.weight.fill_(0.5)
    assert not told(lambda: dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=target)])))


def test_one_level_is_said() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.rand(4, 4) + 0.5)
    (said,) = told(lambda: dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Binary())])))
    assert said.startswith("compress: Binary() leaves one level of 'weight'; use more bits")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "target",
    [ROWS, dt.Uniform(bits=4, granularity=dt.Group(size=4)), dt.LearnedLevels(k=4, granularity="channel")],
    ids=repr,
)
@pytest.mark.parametrize("stacked", [False, True])
def test_turned_weights_export_as_codes(target: dt.Target, stacked: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from detent.export import to_onnx

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mats = nn.Parameter(torch.randn(3, 8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x[:, None, None, :], self.mats)

    torch.manual_seed(0)
    model = Bank() if stacked else transformers.pytorch_utils.Conv1D(12, 8)
    axes: dict[str, Any] = {"axis": 2, "batch_axes": [0]} if stacked else {}
    run = dt.compress(model, dt.Recipe([dt.Rule(match="mats" if stacked else "weight", target=target, **axes)]))
    report = to_onnx(run, tmp_path / "f.onnx", torch.randn(2, 8))  # refuses where the session's answer differs
    assert max(report.difference.values()) < 1e-4
    assert ["float" in each.form for each in report.tensors if each.target] == [False]


class StyleNorm(nn.Module):
    """A linear map in a class that is called a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 256))


class Named(nn.Module):
    """Most weights in tensors that rules pass over by a word of their name or of their class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.bias_table = nn.Parameter(torch.randn(4, 64, 64))
        self.bias_proj = nn.Parameter(torch.randn(64, 64))
        self.style = StyleNorm()
        self.norm = nn.LayerNorm(64)


@pytest.mark.parametrize("recipe", [dt.Recipe.preset("uniform-w4"), dt.Recipe([dt.Rule(match=".", target=U4)])])
def test_what_is_passed_over_by_its_name_is_left_with_its_reason(recipe: dt.Recipe) -> None:
    model = Named()
    plan = recipe.resolve(model)
    reasons = {claim.name: claim.reason for claim in plan.claims}
    for name, why in (("bias_table", "bias"), ("bias_proj", "bias"), ("style.weight", "normalisation weight")):
        assert reasons[name] == f"passed over: {why}; name it in include= to claim it"
        assert f"{name} (" in plan.left() and f"% of the weights; {reasons[name]})" in plan.left()
    assert "norm.weight" not in plan.left() and "fc" not in plan.left()
    (said,) = told(lambda: dt.compress(model, recipe))
    assert said.startswith("compress: bias_table (")
    kept = dt.Recipe([dt.Rule(match="bias_|style", keep=True), *recipe.rules]).resolve(model)
    assert not kept.left()
    taken = dt.Recipe([dt.Rule(match="@weights", include="bias_|style", target=U4)]).resolve(model)
    assert not taken.left() and {"bias_table", "bias_proj", "style.weight"} <= {c.name for c in taken.claimed}


def test_state_dicts_count_their_layers_by_number(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from detent.compression import compress_state_dict, skeleton
    from detent.pack.checkpoint import Checkpoint

    save_file({f"{i}.weight": torch.randn(4, 4) for i in (0, 3, 7, 12)}, tmp_path / "w.safetensors")
    rules = [dt.Rule(match=end, target=dt.Uniform(bits=8)) for end in ("@first", "@last")]
    recipe = dt.Recipe([*rules, dt.Rule(match="@weights", target=U4)])
    made = compress_state_dict(tmp_path / "w.safetensors", tmp_path / "w.detent", recipe)
    assert any("@first is 0.weight and @last is 12.weight" in note for note in made.notes)
    with Checkpoint(tmp_path / "w.safetensors") as weights:
        plan = recipe.resolve(skeleton(weights))
    assert {claim.name: plan.rule_of(claim).target for claim in plan.claimed} == {
        f"{i}.weight": dt.Uniform(bits=bits) for i, bits in ((0, 8), (3, 4), (7, 4), (12, 8))
    }
