"""What is claimed, along which axis: the census of a model, presets by structure, axes known, assumed and said."""

from __future__ import annotations

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
        "GptOss": {
            "intermediate_size": 40,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**common, **sizes, **more)
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
    frozen: set[str] = set()
    small = {n for n, p in model.named_parameters() if p.dim() < 2 or n.endswith(("_bias", "cls_token"))}
    assert left == small | frozen
    assert bool(plan.left()) == bool(frozen)


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
        (Stack, "mats", 1, (0,)),
    ],
)
def test_axes_are_those_of_the_module(make: Any, name: str, axis: int, batch: tuple[int, ...]) -> None:
    layout = layouts(make())[name]
    assert (layout.channel_dim, layout.batch_axes) == (axis, batch)


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
    scale = run.encoded()["mats"].params["scale"]
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
        recipe = dt.Recipe([dt.Rule(match="weight", target=ROWS, mechanism=dt.PSG())])
        dt.attach(layer, optimizer, recipe, total_steps=3)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(turned.weight.t(), plain.weight, rtol=1e-5, atol=1e-7)
