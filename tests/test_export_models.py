"""ONNX of models as people have them: other lengths, wrappers, flags, outputs that are no tensors, weight norm."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim.swa_utils import AveragedModel

import detent as dt
from detent.export import Activations, to_onnx
from detent.export.calling import bind
from detent.export.onnx import _checked, _Example

ort = pytest.importorskip("onnxruntime", minversion="1.31")

W8 = dt.Recipe([dt.Rule(match=r"(weight|original1)$", target=dt.Uniform(bits=8, granularity="channel"))])


def run_ort(path: Path, *feeds: Tensor) -> list[Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    running = ort.InferenceSession(path.read_bytes(), options)
    names = [entry.name for entry in running.get_inputs()]
    return [torch.from_numpy(y) for y in running.run(None, dict(zip(names, (x.numpy() for x in feeds), strict=True)))]


def sizes(path: Path) -> list[list[Any]]:
    inputs = onnx.load(path).graph.input
    return [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in inputs]


# ------------------------------------------------------------------------------------------------- axes of any size


class Lengths(nn.Module):
    """Two inputs of one length, which may decide what is computed."""

    def __init__(self, fixes: bool = False) -> None:
        super().__init__()
        self.conv, self.fixes = nn.Conv1d(4, 6, 3, padding=1), fixes

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = self.conv(x) * gate[:, None]
        return x + 1 if self.fixes and x.shape[2] == 10 else x


def test_named_axes_take_any_size(tmp_path: Path) -> None:
    run, x = dt.compress(Lengths(), W8), torch.randn(2, 4, 10)
    dynamic = {"x": {-1: "time"}, "gate": {1: "time"}}
    to_onnx(run, tmp_path / "m.onnx", (x, x[:, 0]), dynamic=dynamic)
    assert sizes(tmp_path / "m.onnx") == [["batch", 4, "time"], ["batch", "time"]]
    longer = torch.randn(5, 4, 23)
    with run.compressed(), torch.no_grad():
        expected = run.model.eval()(longer, longer[:, 0])
    torch.testing.assert_close(run_ort(tmp_path / "m.onnx", longer, longer[:, 0])[0], expected)


def test_an_axis_that_is_fixed_is_named(tmp_path: Path) -> None:
    run, x = dt.compress(Lengths(fixes=True), W8), torch.randn(2, 4, 10)
    dynamic = {"x": {2: "time"}, "gate": {1: "time"}}
    with pytest.raises(ValueError, match="at 11 of 'time' instead of 10, so that axis is not dynamic"):
        to_onnx(run, tmp_path / "m.onnx", (x, x[:, 0]), dynamic=dynamic)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("dynamic", "text"),
    [
        ({"y": {0: "n"}}, "there is no input 'y'; the inputs are 'x', 'gate'"),
        ({"x": {3: "time"}}, "'x' has 3 axes, and no axis 3"),
        ({"x": {2: ""}}, "axis 2 of 'x' needs a name"),
        ({"x": {1: "n", 2: "n"}}, "axis 2 of 'x' has 10 and another axis called 'n' has 4"),
        ({"x": [2]}, "must be like"),
    ],
)
def test_wrong_names_of_axes_are_told(dynamic: Any, text: str) -> None:
    x = torch.randn(2, 4, 10)
    with pytest.raises(ValueError, match=re.escape(text)):
        _Example.of(bind(Lengths(), (x, x[:, 0])), dynamic, True)


def test_a_second_size_is_one_that_the_model_takes() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[1] // 4, 4)

    net, call = Halves(), bind(Halves(), torch.randn(2, 8))
    (word, other, outputs), (_, batch, _) = _Example.of(call, {"x": {1: "time"}}, True).others(net)
    assert batch.sizes() == {"batch": 3, "time": 8}
    assert word == "time" and other.sizes() == {"batch": 2, "time": 16} and outputs[0].shape == (2, 4, 4)
    with pytest.raises(ValueError, match=r"the model itself takes no other size of 'time' than 4 .*leave 'time' out"):
        _Example.of(bind(nn.Linear(4, 2), torch.randn(2, 4)), {"input": {1: "time"}}, True).others(nn.Linear(4, 2))


# ---------------------------------------------------------------------------------------------------- what is called


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel])
def test_wrapped_models_are_seen_through(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), wrap(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3))))
    run, x = dt.compress(wrap(net), W8), torch.randn(2, 3, 8, 8)
    report = to_onnx(run, tmp_path / "m.onnx", x)
    assert {row.name for row in report.tensors if row.form == "INT8"} == {"0.weight", "1.1.weight"}
    with run.compressed(), torch.no_grad():
        torch.testing.assert_close(run_ort(tmp_path / "m.onnx", x)[0], run.model(x))


class Odd(nn.Module):
    """Whatever signatures and results there are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, *xs: Tensor, shift: Tensor | None = None, double: bool = False) -> dict[str, Any]:
        x = sum(xs, x) if shift is None else x + shift
        y = self.fc(2 * x if double else x)
        return {"y": y, "rows": y.shape[0], "name": "logits", "state": [None, object(), (y.abs(),)]}


def test_signatures_are_bound_and_other_outputs_left_out_in_words(tmp_path: Path) -> None:
    run = dt.compress(Odd(), W8)
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    report = to_onnx(run, tmp_path / "m.onnx", {"x": a, "shift": b, "double": True})
    assert report.notes == (
        "output['rows'] is left out: it is no tensor but 2 (int)",
        "output['name'] is left out: it is no tensor but 'logits' (str)",
        "output['state'][1] is left out: it is no tensor but an object (object)",
        "double=True is fixed in the graph",
    )
    with run.compressed(), torch.no_grad():
        expected = run.model(a, shift=b, double=True)
    theirs = run_ort(tmp_path / "m.onnx", a, b)
    torch.testing.assert_close(theirs, [expected["y"], expected["state"][2][0]])
    to_onnx(run, tmp_path / "several.onnx", (a, b, a))
    with run.compressed(), torch.no_grad():
        torch.testing.assert_close(run_ort(tmp_path / "several.onnx", a, b, a)[0], run.model(a, b, a)["y"])


def test_a_mapping_may_be_the_only_argument(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.fc(batch["x"]) + batch["others"][0]

    run = dt.compress(Net(), W8)
    batch = {"x": torch.randn(2, 4), "others": [torch.randn(3)]}
    to_onnx(run, tmp_path / "m.onnx", (batch,))
    with run.compressed(), torch.no_grad():
        torch.testing.assert_close(run_ort(tmp_path / "m.onnx", batch["x"], batch["others"][0])[0], run.model(batch))


def test_a_model_that_returns_no_tensor_is_refused(tmp_path: Path) -> None:
    class Result:
        pass

    class Net(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            super().forward(input)
            return Result()

    run = dt.compress(Net(4, 4), W8)
    with pytest.raises(ValueError, match=r"Net returns no tensor \(Result\)"):
        to_onnx(run, tmp_path / "m.onnx", torch.randn(2, 4))


# -------------------------------------------------------------------------------------------------------- weight norm


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, old_weight_norm], ids=["parametrized", "old"])
def test_weight_norm_goes_into_the_scales(norm: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its old weight norm
        net = nn.Sequential(norm(nn.Conv1d(6, 8, 3, padding=1)), nn.ReLU(), norm(nn.Conv1d(8, 4, 1)), nn.ReLU())
        net.append(norm(nn.Linear(10, 3)))
    match = "original1|weight_v"
    grid = dt.Uniform(bits=8, granularity="channel")
    run = dt.compress(net, dt.Recipe([dt.Rule(match=match, include=match, target=grid)]))
    x = torch.randn(2, 6, 10)
    report = to_onnx(run, tmp_path / "m.onnx", x)
    assert not {"ReduceL2", "ReduceSum", "Sqrt", "Div", "Mul"} & report.kernels.keys() and report.notes == ()
    # g * v / |v|, by hand: the codes are ours, and the scale of a channel is g / |codes|.
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    name, encoded = next(iter(run.encoded().items()))
    codes = encoded.form.named["codes"].double().reshape(8, -1) - 127
    gain = dict(net.named_parameters())[name.replace("original1", "original0").replace("weight_v", "weight_g")]
    scale = gain.detach().double().reshape(-1) / codes.norm(dim=1)
    kept = next(n for n in held if n.endswith(".codes") and held[n].shape == (8, 6, 3)).removesuffix(".codes")
    assert np.array_equal(held[f"{kept}.codes"].reshape(8, -1), codes.numpy())
    np.testing.assert_allclose(held[f"{kept}.scale"], scale.numpy(), rtol=1e-6)
    rounded = to_onnx(run, tmp_path / "r.onnx", x, activations=Activations(), calibration=[x])
    assert rounded.kernels["QLinearConv"] == 2


def test_weight_norm_along_the_inputs_stays_and_is_named(tmp_path: Path) -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.ConvTranspose1d(4, 3, 4)))  # dim=0: its inputs
    report = to_onnx(dt.compress(net, W8), tmp_path / "m.onnx", torch.randn(2, 4, 6))
    assert any("original1' is rescaled at every run" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
def test_an_orthogonal_parametrization_is_refused_with_what_to_do(kind: str, tmp_path: Path) -> None:
    net: Any = nn.Sequential(nn.Linear(6, 8), parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map=kind))
    with pytest.raises(ValueError, match=r"'1' is parametrized .*\(orthogonal\): call .*remove_parametrizations"):
        to_onnx(dt.compress(net, dt.Recipe.preset("uniform-w4")), tmp_path / "m.onnx", torch.randn(2, 6))
    assert not list(tmp_path.iterdir())
    nn.utils.parametrize.remove_parametrizations(net[1], "weight")
    report = to_onnx(dt.compress(net, dt.Recipe.preset("uniform-w4")), tmp_path / "m.onnx", torch.randn(2, 6))
    assert {row.name: row.form for row in report.tensors if row.target} == {"0.weight": "INT4", "1.weight": "INT4"}


class Projected(nn.Module):
    def __init__(self, projection: int, layers: int, both: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, layers, batch_first=True, bidirectional=both, proj_size=projection)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("layers", "both", "check"), [(1, False, True), (1, False, False), (2, True, True)])
def test_an_lstm_with_a_projection_is_refused(layers: int, both: bool, check: bool, tmp_path: Path) -> None:
    """PyTorch's exporter writes a graph without the projection, which no runtime runs, or none that is valid."""
    x = torch.randn(2, 5, 6)
    run = dt.compress(Projected(4, layers, both), dt.Recipe.preset("uniform-w4"))
    with pytest.raises(ValueError, match="'rnn' is an LSTM with proj_size=4, which ONNX's LSTM has not"):
        to_onnx(run, tmp_path / "m.onnx", x, check=check)
    assert not list(tmp_path.iterdir())
    plain = dt.compress(Projected(0, layers, both), dt.Recipe.preset("uniform-w4"))
    assert {row.form for row in to_onnx(plain, tmp_path / "m.onnx", x).tensors if row.target} == {"INT4"}


def test_a_graph_that_is_no_onnx_is_called_so() -> None:
    net = nn.Linear(2, 2)
    example = _Example.of(bind(net, torch.zeros(1, 2)), None, False)
    with pytest.raises(ValueError, match="the graph is no valid ONNX: .*; nothing was written"):
        _checked(b"", net, example, 1e-5, False)


# ------------------------------------------------------------------------------------------------------- transformers


def tiny(name: str) -> Any:
    tf = pytest.importorskip("transformers")
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    if name == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**small, intermediate_size=64, num_key_value_heads=1))
    if name == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    if name == "mixtral":
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
        return tf.MixtralForCausalLM(tf.MixtralConfig(**small, **experts, intermediate_size=64, num_key_value_heads=1))
    if name == "bert":
        return tf.BertForSequenceClassification(tf.BertConfig(**small, intermediate_size=64, num_labels=3))
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


MODELS = {
    "llama": {"input_ids": {1: "length"}},
    "gpt2": {"input_ids": {1: "length"}},
    "bert": {"input_ids": {1: "length"}, "attention_mask": {1: "length"}},
    "t5": {"input_ids": {1: "length"}, "decoder_input_ids": {1: "made"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_at_another_length(name: str, tmp_path: Path) -> None:
    model = tiny(name).eval()
    run = dt.compress(model, dt.Recipe.preset("uniform-w4"))

    def inputs(rows: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(length))
        return {key: torch.ones_like(ids) if key == "attention_mask" else ids for key in MODELS[name]}

    report = to_onnx(run, tmp_path / "m.onnx", inputs(2, 16), dynamic=MODELS[name])
    assert any("Cache" in note for note in report.notes) == (name != "bert")
    other = inputs(3, 21)
    with run.compressed(), torch.no_grad():
        expected = model(**other).logits
    theirs = run_ort(tmp_path / "m.onnx", *other.values())[0]
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_rounded_activations_of_transposed_layers_and_experts(name: str, tmp_path: Path) -> None:
    """transformers' Conv1D, (in, out), runs in integers; experts are picked from a stack, and no kernel does that."""
    model = tiny(name).eval()
    if name == "mixtral":
        model.set_experts_implementation("batched_mm")
    run = dt.compress(model, dt.Recipe.preset("uniform-w8"))
    ids = {"input_ids": torch.randint(1, 96, (2, 16), generator=torch.Generator().manual_seed(0))}
    report = to_onnx(run, tmp_path / "m.onnx", ids, activations=Activations(), calibration=[ids])
    floats = " ".join(note for note in report.notes if "computed in float" in note)
    named = {claim.name for claim in run.plan.claimed if repr(claim.name) in floats}
    if name == "gpt2":
        layers = {
            f"transformer.h.0.{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
        assert report.kernels["QGemm"] == 4 and not named & layers
    else:
        experts = {f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")}
        assert named == experts | {"model.embed_tokens.weight"} and "because they are looked up" in floats
        assert report.kernels["MatMulIntegerToFloat"] + report.kernels["QGemm"] == 6  # q, k, v, o, router, head
    with run.compressed(), torch.no_grad():
        expected = model(**ids).logits
    theirs = run_ort(tmp_path / "m.onnx", ids["input_ids"])[0]
    assert float((theirs - expected).norm() / expected.norm()) < 0.05
