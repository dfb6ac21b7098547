"""Folders for transformers: what is loaded from them is our compressed life, bit for bit."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import detent as dt
from detent.export.hf import HfReport, check_compressed_tensors, to_compressed_tensors
from detent.grouping import Group

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

LINEAR = r"_proj\.weight$"


def llama(tie: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of 0.2 million weights; sides that no 32-bit word divides evenly at 8 or 4 bits."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie,
    )  # fmt: skip
    # Not .to(dtype), which would round the rotary frequencies too; loading does not.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def ids() -> Tensor:
    return torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(ids()).logits


def load(folder: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **kwargs).eval()


def grid(bits: int, granularity: Any, **kwargs: Any) -> dt.Recipe:
    return dt.Recipe([dt.Rule(match=LINEAR, target=dt.Uniform(bits=bits, granularity=granularity, **kwargs))])


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """The format's letters: element i of a row is at bit i * bits of its little-endian words, plus 2^(bits-1)."""
    rows = []
    for row in words.tolist():
        number = 0
        for place, word in enumerate(row):
            number |= (word & 0xFFFFFFFF) << (32 * place)
        rows.append([((number >> (i * bits)) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(columns)])
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["channel", Group(size=32), "tensor"], ids=["channel", "group", "tensor"])
def test_logits_are_those_of_our_compressed_life_bitwise(bits: int, granularity: Any, tmp_path: Path) -> None:
    model = llama()
    run = dt.compress(model, grid(bits, granularity))
    report = to_compressed_tensors(run, tmp_path)
    with run.compressed():
        ours = logits(model)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), ours)
    assert not torch.equal(logits(model), ours)
    # The weights too, once the loader has unpacked them.
    for name, encoded in run.encoded().items():
        assert torch.equal(loaded.get_parameter(name), encoded.decode()), name
    assert report.ignored == ("lm_head",)
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales_in_the_file_are_ours_untouched(bits: int, tmp_path: Path) -> None:
    run = dt.compress(llama(), grid(bits, Group(size=16)))
    report = to_compressed_tensors(run, tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    for name, encoded in run.encoded().items():
        stem = name.removesuffix("weight")
        rows, columns = encoded.form.layout.shape
        assert name not in file
        assert file[f"{stem}weight_shape"].tolist() == [rows, columns]
        assert torch.equal(file[f"{stem}weight_scale"].reshape(-1), encoded.form.named["scale"])
        codes = encoded.form.named["codes"].reshape(rows, columns).long() - (2 ** (bits - 1) - 1)
        assert torch.equal(unpacked(file[f"{stem}weight_packed"], bits, columns), codes)
        assert int(codes.min()) >= -(2 ** (bits - 1)) + 1  # restricted: the lowest integer stays unused
    # 4 or 8 bits a weight, 32 for every 16 of them, and the shape.
    weights = sum(e.form.layout.numel for e in run.encoded().values())
    assert report.packed_bytes == weights * bits // 8 + weights // 16 * 4 + 16 * len(report.packed)


def test_mixed_widths_and_layers_left_alone(tmp_path: Path) -> None:
    rules = [
        dt.Rule(match=r"layers\.0\.mlp", target=dt.Uniform(bits=8, granularity="channel")),
        dt.Rule(match=r"layers\.1\.mlp\.(gate|up)", target=dt.Uniform(bits=4, granularity=Group(size=32))),
        dt.Rule(match=r"layers\.1\.mlp\.down", target=dt.Uniform(bits=4, granularity="channel")),
    ]
    model = llama()
    run = dt.compress(model, dt.Recipe(rules))
    report = to_compressed_tensors(run, tmp_path)
    with run.compressed():
        ours = logits(model)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), ours)
    assert len(report.ignored) == 8 + 1  # four projections of two attentions, and the head
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization_config"] == report.config
    assert len(report.config["config_groups"]) == 3
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)


def test_another_width_of_the_same_run(tmp_path: Path) -> None:
    model = llama()
    run = dt.compress(model, grid(4, "channel"))
    to_compressed_tensors(run, tmp_path, bits=8)
    with run.compressed(bits=8):
        ours = logits(model)
    assert torch.equal(logits(load(tmp_path)), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_narrow_dtypes_multiply_as_we_do(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype=dtype)
    run = dt.compress(model, grid(4, Group(size=32), param_dtype=str(dtype).removeprefix("torch.")))
    to_compressed_tensors(run, tmp_path)
    with run.compressed():
        ours = logits(model)
    loaded = load(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), ours)
    for name, encoded in run.encoded().items():
        assert torch.equal(loaded.get_parameter(name), encoded.decode()), name


def test_after_training_and_finalizing(tmp_path: Path) -> None:
    model = llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rule = dt.Rule(match=LINEAR, target=dt.Uniform(bits=4, granularity=Group(size=32)), mechanism=dt.PSG(gain=8.0))
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
    to_compressed_tensors(run, tmp_path / "before")
    run.finalize()
    to_compressed_tensors(run, tmp_path / "after")
    ours = logits(model.eval())
    assert torch.equal(logits(load(tmp_path / "before")), ours)
    assert torch.equal(logits(load(tmp_path / "after")), ours)


def test_a_tied_head_that_is_not_claimed_is_kept(tmp_path: Path) -> None:
    model = llama(tie=True)
    run = dt.compress(model, grid(4, "channel"))
    to_compressed_tensors(run, tmp_path)
    with run.compressed():
        ours = logits(model)
    assert torch.equal(logits(load(tmp_path)), ours)


def test_a_wrapped_layer_is_written_once_and_packed(tmp_path: Path) -> None:
    """torch.compile puts `_orig_mod` into names, which once let plain weights through beside the packed ones."""
    model, twin = llama(), llama()
    twin.load_state_dict(model.state_dict())
    to_compressed_tensors(dt.compress(model, grid(4, "channel")), tmp_path / "plain")
    # Not called, so nothing is compiled; a whole block, and one linear layer of another.
    twin.model.layers[0].mlp = torch.compile(twin.model.layers[0].mlp, backend="eager")
    twin.model.layers[1].mlp.down_proj = torch.compile(twin.model.layers[1].mlp.down_proj, backend="eager")
    assert any("_orig_mod" in name for name in twin.state_dict())
    report = to_compressed_tensors(dt.compress(twin, grid(4, "channel")), tmp_path / "wrapped")
    for folder in ("plain", "wrapped"):
        assert not (tmp_path / folder / "model.safetensors.index.json").exists()
    held = [load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "wrapped")]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(value, held[1][name]) for name, value in held[0].items())
    assert len(report.packed) == 14 and report.ignored == ("lm_head",)


def test_writing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    to_compressed_tensors(dt.compress(model, grid(4, "channel")), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "quantization_config" not in model.config.to_dict()


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "target", "why"),
    [
        (LINEAR, dt.Uniform(bits=3), "loaders know 4 and 8 bits, and this has 3"),
        (LINEAR, dt.Uniform(bits=4, zero=False), "symmetric grids with a zero"),
        (LINEAR, dt.VectorCodebook(size=4, block=4), "symmetric grids with a zero"),
        (LINEAR, dt.TopK(keep=0.5), "symmetric grids with a zero"),
        (r"down_proj\.weight$", dt.Uniform(bits=4, granularity=Group(size=64)), "groups of 64 do not divide its 160"),
        (r"embed_tokens", dt.Uniform(bits=4), "weights of linear layers only, and this is the weight of a Embedding"),
    ],
    ids=["3 bits", "no zero", "codebook", "sparse", "groups", "embedding"],
)
def test_what_does_not_fit_is_named(match: str, target: dt.Target, why: str, tmp_path: Path) -> None:
    run = dt.compress(llama(), dt.Recipe([dt.Rule(match=match, target=target)]))
    with pytest.raises(ValueError, match=why) as error:
        to_compressed_tensors(run, tmp_path / "folder")
    assert any(repr(claim.name) in str(error.value) for claim in run.plan.claimed)
    assert not (tmp_path / "folder").exists()


def test_scales_that_a_loader_would_round_are_refused(tmp_path: Path) -> None:
    run = dt.compress(llama(dtype=torch.bfloat16), grid(4, "channel"))
    with pytest.raises(ValueError, match='use Uniform\\(param_dtype="bfloat16"\\)'):
        to_compressed_tensors(run, tmp_path)


def test_a_tied_parameter_that_is_claimed_is_refused(tmp_path: Path) -> None:
    class Tied(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            layers = self.model.layers
            layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight

    run = dt.compress(Tied(llama().config), grid(4, "channel"))
    with pytest.raises(ValueError, match="tied to model.layers.1.mlp.gate_proj.weight"):
        to_compressed_tensors(run, tmp_path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Sequential is no transformers model"):
        to_compressed_tensors(
            dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])), tmp_path
        )


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dt.compress(llama(), grid(4, "channel"))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ImportError, match=r"pip install 'detent\[hf\]'"):
        to_compressed_tensors(run, tmp_path)


def test_what_was_written_shows_itself_in_a_line() -> None:
    packed = {f"model.layers.{i}.mlp.up_proj.weight": 100 for i in range(90)}
    text = repr(HfReport(bytes=12345, packed=packed, ignored=("lm_head",), config={"much": list(range(900))}))
    assert len(text) < 200
    for words in ("12,345 bytes", "90 weights packed in 9,000 bytes", "1 linear layers left"):
        assert words in text, (words, text)


# --- asked before training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (grid(3, "channel"), torch.float32),
        (grid(4, Group(size=48)), torch.float32),
        (grid(4, "channel"), torch.bfloat16),
        (dt.Recipe([dt.Rule(match=LINEAR, target=dt.TopK(keep=0.5))]), torch.float32),
        (dt.Recipe([dt.Rule(match="embed_tokens", target=dt.Uniform(bits=4))]), torch.float32),
    ],
    ids=["width", "groups", "dtype", "target", "layer"],
)
def test_what_would_be_refused_is_told_before_for_the_same_reason(
    recipe: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = llama(dtype=dtype)
    checked = check_compressed_tensors(model, recipe)
    name, why = next(iter(checked.refused.items()))
    assert not checked.fits and why in str(checked)
    with pytest.raises(ValueError) as error:
        to_compressed_tensors(dt.compress(model, recipe), tmp_path)
    assert repr(name) in str(error.value) and str(error.value).endswith(why)


def test_what_only_a_loader_finds_is_told_before_for_the_same_reason(tmp_path: Path) -> None:
    """transformers reads the weight of T5's last layers, which it has just replaced by codes."""
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    target = dt.Uniform(bits=4, granularity="channel")
    recipe = dt.Recipe([dt.Rule(match=r"\.(q|wo)\.weight$", target=target, mechanism=dt.PSG())])
    assert check_compressed_tensors(model, recipe).fits, "the format would hold it"
    before = [value.clone() for value in model.state_dict().values()]
    checked = check_compressed_tensors(model, recipe, load=True)
    assert not checked.fits and all(map(torch.equal, before, model.state_dict().values()))
    with pytest.raises(ValueError, match="transformers cannot load what was written") as error:
        to_compressed_tensors(dt.compress(model, recipe), tmp_path)
    assert str(error.value).endswith(checked.refused[""])
    assert check_compressed_tensors(llama(), grid(4, "channel"), load=True).fits


def test_what_fits_is_said_and_layers_that_vllm_fuses_are_noted(tmp_path: Path) -> None:
    model = llama()
    fine = check_compressed_tensors(model, grid(4, "channel"))
    assert fine.fits and len(fine.packed) == 14 and fine.notes == ()
    rules = [
        dt.Rule(match=r"q_proj\.weight$", target=dt.Uniform(bits=8, granularity="channel")),
        dt.Rule(match=r"(k|v|gate)_proj\.weight$", target=dt.Uniform(bits=4, granularity="channel")),
    ]
    recipe = dt.Recipe(rules)
    mixed = check_compressed_tensors(model, recipe)
    assert mixed.fits and [note.split(";")[0] for note in mixed.notes] == [
        "model.layers.0.self_attn and 1 more: q_proj 8 bits, k_proj 4 bits, v_proj 4 bits",
        "model.layers.0.mlp and 1 more: gate_proj 4 bits, up_proj unpacked",
    ]
    assert to_compressed_tensors(dt.compress(model, recipe), tmp_path).notes == mixed.notes


@pytest.mark.parametrize("damage", ["scale", "gone"])
def test_a_folder_that_loads_as_something_else_is_refused(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dt.compress(llama(), grid(4, "channel"))
    kind: Any = type(run.model)
    real = kind.save_pretrained

    def damaged(self: Any, where: Any, state_dict: dict[str, Tensor]) -> None:
        name = next(n for n in state_dict if n.endswith("weight_scale" if damage == "scale" else "norm.weight"))
        state = dict(state_dict)
        value = state.pop(name)
        real(self, where, state_dict=state | ({name: value * 2} if damage == "scale" else {}))

    monkeypatch.setattr(kind, "save_pretrained", damaged)
    if damage == "scale":
        with pytest.raises(ValueError, match=r"'model.*_proj.weight' is loaded with other values; do not use"):
            to_compressed_tensors(run, tmp_path)
    else:  # a norm that is not in the file is all ones, as it was: nothing to find
        with torch.no_grad():
            run.model.get_parameter("model.layers.0.input_layernorm.weight").mul_(1.5)
        with pytest.raises(ValueError, match=r"norm.weight' is loaded with other values; do not use"):
            to_compressed_tensors(run, tmp_path)
    assert to_compressed_tensors(run, tmp_path, check=False).bytes > 0
