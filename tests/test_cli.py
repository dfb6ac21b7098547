"""The command line: its surface is frozen, its answers are checked against the library, its errors are one sentence."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
import typer.main
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from typer.testing import CliRunner, Result

import detent as dt
from detent import cli, cli_work
from detent import demo as demo_module
from detent.cli import app
from detent.compression import skeleton
from detent.data import digits
from detent.demo import Outcome, Settings, demonstrate
from detent.export import Latency, to_onnx
from detent.pack import Checkpoint, Reader, inspect, load, read_header, save
from detent.recipe import Recipe
from detent.report import History, Report, card_of_file, collect_file

LIVES = ["full", "W8", "W6", "W4", "W3", "W2", "pruned"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refused(result: Result, code: int) -> str:
    """The one sentence of a refused call."""
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), "something else than an exit code came out"
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("detent: "), result.stderr
    return lines[0]


# ---------------------------------------------------------------------------------------------------- the surface

# Frozen: a change here is a change for users and belongs into CHANGELOG.md.
SURFACE = {
    "demo": {
        "--method": "psg",
        "--data": None,
        "--out": Path("runs/demo"),
        "--epochs": None,
        "--seed": 0,
        "--device": "cpu",
        "--bits": None,
        "--force": False,
        "--json": False,
    },
    "plan": {
        "model": "required",
        "--recipe -r": "psg-w4",
        "--to": None,
        "--load": False,
        "--example": None,
        "--json": False,
    },
    "compress": {
        "weights": "required",
        "--recipe -r": None,
        "--budget": None,
        "--choices": "step",
        "--places": None,
        "--data": None,
        "--calibrate": None,
        "--out -o": None,
        "--life": "compressed",
        "--coding": None,
        "--model": None,
        "--example": None,
        "--force": False,
        "--json": False,
    },
    "inspect": {"file": "required", "--json": False},
    "unpack": {
        "file": "required",
        "--out -o": None,
        "--life": "compressed",
        "--shard-size": None,
        "--force": False,
        "--json": False,
    },
    "report": {
        "file": "required",
        "--out -o": None,
        "--model": None,
        "--data": None,
        "--bits": "8,6,4,3,2",
        "--history": None,
        "--exported": None,
        "--title": None,
        "--force": False,
        "--json": False,
    },
    "export": {
        "file": "required",
        "--model": "required",
        "--to": "onnx",
        "--out -o": None,
        "--input": None,
        "--batchnorm": None,
        "--activations": None,
        "--method": None,
        "--data": None,
        "--calibrate": None,
        "--input-range": None,
        "--latency": False,
        "--threads": None,
        "--force": False,
        "--json": False,
    },
    "card": {"file": "required", "--markdown": False, "--json": False},
}


def surface(typer_app: typer.Typer) -> dict[str, dict[str, Any]]:
    commands: dict[str, Any] = vars(typer.main.get_command(typer_app))["commands"]
    return {
        name: {
            " ".join(p.opts): "required" if p.required else p.default for p in command.params if "--help" not in p.opts
        }
        for name, command in commands.items()
    }


def test_the_list_of_commands_and_flags_is_frozen() -> None:
    assert surface(app) == SURFACE


def test_a_new_flag_would_be_found() -> None:
    other = typer.Typer()

    @other.callback()
    def root() -> None: ...

    @other.command()
    def inspect(file: Path, verbose: bool = False) -> None: ...

    assert list(surface(other)["inspect"]) == ["file", "--verbose"]


def test_help_and_no_arguments_list_the_commands() -> None:
    for result, codes in (
        (call("--help"), {0}),
        (call(), {0, 2}),
    ):  # typer < 0.16 leaves with 0 where click leaves with 2
        assert result.exit_code in codes
        assert all(name in result.output for name in SURFACE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect",), "Missing argument"),
        (("compress", "x.safetensors", "--nope"), "--nope"),
        (("nothing",), "nothing"),
        (("demo", "--seed", "many"), "--seed"),
        (("export", "x.detent"), "--model"),
    ],
)
def test_what_the_parser_refuses_is_json_too(arguments: tuple[str, ...], words: str) -> None:
    plain, told = call(*arguments), call(*arguments, "--json")
    assert plain.exit_code == told.exit_code == 2
    assert words in plain.stderr and plain.stdout == ""
    assert words in json.loads(told.stdout)["error"] and words in told.stderr
    said = call(arguments[0], "--json", *arguments[1:])
    assert said.exit_code == 2 and set(json.loads(said.stdout)) == {"error"}, "wherever the flag stands"


def test_a_file_called_json_asks_for_none() -> None:
    result = call("inspect", "--", "--json", "--more")
    assert result.exit_code == 2 and result.stdout == ""


def test_the_version_is_the_package_s() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"detent {dt.__version__}\n")


def test_the_work_s_public_names_are_those_the_commands_use() -> None:
    tree = ast.parse(Path(cli.__file__).read_text(encoding="utf-8"))
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "detent.cli_work"]
    assert [alias.name for node in taken for alias in node.names] == cli_work.__all__


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Steps done and to do of every bar that a command shows."""
    bars: dict[str, list[int]] = {}

    def watch(label: str, total: int) -> Any:
        bars[label] = [0, total]
        return lambda: bars[label].__setitem__(0, bars[label][0] + 1)

    monkeypatch.setattr(cli, "_watched", lambda: contextlib.nullcontext(watch))
    return bars


def test_long_work_off_a_terminal_says_a_line_when_a_part_begins(capsys: pytest.CaptureFixture[str]) -> None:
    for long, said in ((False, ""), (True, "SGD [one]: 1,200 steps\nPSG: 3 steps\n")):
        with cli._watched(long=long) as watch:
            for advance in (watch("SGD [one]", 1200), watch("PSG", 3)):
                advance()
        assert capsys.readouterr() == ("", said)


# ---------------------------------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run of two epochs, with its own number of bits."""
    watched: dict[str, list[int]] = {}

    def watch(label: str, total: int) -> Any:
        watched[label] = [0, total]

        def advance() -> None:
            watched[label][0] += 1

        return advance

    found = demonstrate(Settings(out=tmp_path_factory.mktemp("demo") / "deeper", epochs=2), watch)
    assert sorted(list(watched)[4:]) == ["sensitivity", "widths"]
    assert all(done == total > 0 for done, total in watched.values()), watched
    return found


def accuracy(model: nn.Module, train: Any, test: Any) -> float:
    """Written again, for one network and one batch."""
    pixels = train.images.float() / 255
    x = (test.images.float() / 255 - pixels.mean()) / pixels.std()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == test.labels).double().mean())


def test_the_table_has_both_networks_in_all_lives(outcome: Outcome) -> None:
    assert [(row.name, row.range) for row in outcome.rows] == [("SGD", "minmax"), ("SGD", "mse"), ("PSG", "mse")]
    assert all(list(row.cells) == LIVES for row in outcome.rows)
    assert all(0 <= cell.accuracy <= 100 for row in outcome.rows for cell in row.cells.values())
    minmax, mse, _ = outcome.rows
    assert minmax.cells["full"] == mse.cells["full"], "two ranges are not two networks"
    assert minmax.cells["pruned"].accuracy == mse.cells["pruned"].accuracy


def test_the_difference_is_obvious_even_after_two_epochs(outcome: Outcome) -> None:
    """What the demo is for: both learn, and only PSG keeps it on 2 bits."""
    *plain, psg = outcome.rows
    assert all(row.cells["full"].accuracy > 80 for row in outcome.rows)
    assert psg.cells["W2"].accuracy > 40 + max(row.cells["W2"].accuracy for row in plain)


def test_bytes_are_those_of_real_files(outcome: Outcome) -> None:
    model = demo_module.DigitsNet(10)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    whole = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    rest = whole - 4 * weights
    for row in outcome.rows:
        assert whole <= row.cells["full"].bytes <= whole + 6000
        for bits in (8, 6, 4, 3, 2):
            nominal = weights * bits / 8 + rest
            assert nominal / 4 <= row.cells[f"W{bits}"].bytes <= nominal + 600, "at most the nominal bits, coded fewer"
        kept = round(0.1 * weights)
        assert 3 * kept <= row.cells["pruned"].bytes <= weights / 8 + 4 * kept + rest + 600


def test_the_file_holds_both_lives_with_their_accuracies(outcome: Outcome) -> None:
    train, test = digits("train"), digits("test")
    for life, key in (("full", "full"), ("compressed", "W2")):
        model = demo_module.DigitsNet(10)
        load(outcome.files["model.detent"], model, life)  # type: ignore[arg-type]
        assert accuracy(model, train, test) == pytest.approx(outcome.rows[-1].cells[key].accuracy)
        levels = [len(p.unique()) for p in model.parameters() if p.dim() > 1]
        assert (max(levels) <= 3) == (life == "compressed"), levels


def test_the_picture_is_a_png_that_shows_something(outcome: Outcome) -> None:
    picture = np.asarray(Image.open(outcome.files["weights.png"]).convert("L"))
    assert min(picture.shape) > 600
    assert 0.02 < float((picture < 128).mean()) < 0.5


def test_the_result_file_is_the_outcome(outcome: Outcome) -> None:
    assert json.loads(Path(outcome.files["result.json"]).read_text()) == dataclasses.asdict(outcome)


def test_networks_differ_in_nothing_but_the_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    """PSG of strength 0 is bitwise the plain network: same start, same batches, same length. No test image is read."""
    bench = demo_module.Bench(Settings(epochs=1, seed=3), lambda label, total: lambda: None)
    del bench.test_set
    plain, none = bench.train("plain", None, 5e-4)
    still, run = bench.train("still", demo_module._grid(2, dt.PSG(strength=0.0)), 5e-4)
    pulled, _ = bench.train("pulled", demo_module._grid(2, dt.PSG()), 5e-4)
    assert none is None and run is not None
    for (name, a), b, c in zip(
        plain.state_dict().items(), still.state_dict().values(), pulled.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
        assert name.endswith("num_batches_tracked") or not torch.equal(a, c), name


def test_the_table_says_what_a_reader_must_know(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "demonstrate", lambda settings, watch: outcome)
    result = call("demo")
    assert result.exit_code == 0, result.output
    for row in outcome.rows:
        assert " ".join(f"{row.cells[life].accuracy:.1f}" for life in LIVES) in " ".join(
            result.stdout.replace("│", " ").split()
        )
    for words in ("first and last layer too", "BatchNorm is not re-estimated", "minmax", "mse", "one checkpoint",
                  "trained for 2 bits", "Two further networks", "Settings were tuned for PSG"):  # fmt: skip
        assert words in result.stdout, words
    assert all(file in result.stdout for file in outcome.files.values())


def test_the_demo_as_json_is_nothing_but_json(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    def spy(settings: Settings, watch: Any) -> Outcome:
        seen.append(settings)
        watch("one of them", 3)()
        return outcome

    monkeypatch.setattr(cli, "demonstrate", spy)
    result = call("demo", "--json", "--out", "x", "--epochs", 4, "--seed", 5, "--bits", 6, "--data", "here")
    assert json.loads(result.stdout) == dataclasses.asdict(outcome)
    assert seen == [Settings(data=Path("here"), out=Path("x"), epochs=4, seed=5, device="cpu", bits=6)]


def parquet(folder: Path, side: int, channels: int, count: int) -> Path:
    rng = np.random.default_rng(0)
    for split, size in (("train", count), ("test", 20)):
        pixels = rng.integers(0, 256, (size, side, side, channels), dtype=np.uint8)
        rows = []
        for image in pixels:
            file = io.BytesIO()
            Image.fromarray(image.squeeze()).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        table = pa.table({"image": pa.array(rows), "label": pa.array(np.arange(size) % 4)})
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("side", "channels", "network"), [(28, 1, "LeNet5"), (32, 3, "ResNet8")])
def test_other_image_sets_get_their_network(tmp_path: Path, side: int, channels: int, network: str) -> None:
    folder = parquet(tmp_path / "images", side, channels, 128)
    result = call("demo", "--data", folder, "--out", tmp_path / "out", "--epochs", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["setup"]["network"] == network and found["setup"]["test_images"] == 20
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model.detent", "report.html", "report.json", "result.json", "weights.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--bits", 5), "bits=5: must be one of 8, 6, 4, 3, 2"),
        (("--epochs", 0), "epochs=0"),
        (("--seed", -1), "seed=-1"),
        (("--device", "tpu"), "device='tpu'"),
        (("--data", "no/such/folder"), "no such folder"),
    ],
)
def test_a_wrong_demo_is_refused_in_one_sentence(tmp_path: Path, flags: tuple[object, ...], words: str) -> None:
    assert words in refused(call("demo", "--out", tmp_path, *flags), 2)


def test_images_without_a_network_are_refused(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "images", 16, 3, 4)
    message = refused(call("demo", "--data", folder, "--out", tmp_path / "out"), 2)
    assert "16x16 with 3 channels" in message and "28x28 grey" in message


def test_a_failure_is_1_and_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(settings: Settings, watch: Any) -> Outcome:
        raise RuntimeError("the disk\nis full")

    def breaks(settings: Settings, watch: Any) -> Outcome:
        raise KeyError("nobody expected this")

    monkeypatch.setattr(cli, "demonstrate", fails)
    assert refused(call("demo"), 1) == "detent: the disk is full"
    assert json.loads(call("demo", "--json").stdout) == {"error": "the disk is full"}
    monkeypatch.setattr(cli, "demonstrate", breaks)
    assert isinstance(call("demo").exception, KeyError)


# ---------------------------------------------------------------------------------------------------------- the plan


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.middle = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)


def make_net() -> nn.Module:
    return Net()


def make_nothing() -> str:
    return "a string"


def make_trouble(needed: int) -> nn.Module:
    raise AssertionError(needed)


HERE = __name__


def test_the_plan_of_a_factory_is_the_recipe_resolved() -> None:
    expected = Recipe.preset("psg-w3").resolve(Net())
    assert call("plan", f"{HERE}:make_net", "--recipe", "psg-w3").stdout == f"{expected}\n"
    rows = json.loads(call("plan", f"{HERE}:Net", "-r", "psg-w3", "--json").stdout)["parameters"]
    assert rows == [{**row, "shape": list(row["shape"])} for row in expected.rows()]


def test_the_plan_of_a_state_dict_is_that_of_the_model(tmp_path: Path) -> None:
    save_file(Net().half().state_dict(), tmp_path / "net.safetensors")
    expected = {row["parameter"]: row["becomes"] for row in Recipe.preset("psg-w4").resolve(Net()).rows()}
    rows = json.loads(call("plan", tmp_path / "net.safetensors", "--json").stdout)["parameters"]
    assert {row["parameter"]: row["becomes"] for row in rows if row["parameter"] in expected} == expected
    assert {row["parameter"] for row in rows} == set(expected), "running statistics are no parameters"


def make_near_dead() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.conv.weight[:3] *= 1e-9
        net.middle.weight[2] = 0.0
    return net


def test_near_dead_units_are_counted_by_plan_and_inspect(tmp_path: Path) -> None:
    net = make_near_dead()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    words = (
        "4 of 12 outputs of layers (33.3 %) have no weight above 1e-06 of their tensor's largest (conv.weight 3 of 4, "
    )
    words += "middle.weight 1 of 6): they do nothing"
    for model in (f"{HERE}:make_near_dead", tmp_path / "net.safetensors"):
        assert words in call("plan", model).stdout
        near = json.loads(call("plan", model, "--json").stdout)["near_dead"]
        assert near == {"outputs": 12, "near_dead": 4, "by_name": {"conv.weight": [3, 4], "middle.weight": [1, 6]}}
    run = dt.compress(net, Recipe.preset("uniform-w8"))
    for life in ("both", "compressed"):
        save(run, tmp_path / "net.detent", life)
        assert words in call("inspect", tmp_path / "net.detent").stdout
        rows = {row["name"]: row for row in inspect(tmp_path / "net.detent").rows}
        assert (rows["conv.weight"]["near_dead"], rows["conv.weight"]["outputs"]) == (3, 4)
        assert rows["out.weight"]["near_dead"] == rows["norm.weight"]["outputs"] == 0
    assert "have no weight above" not in call("plan", f"{HERE}:make_net").stdout
    both = call("plan", f"{HERE}:make_near_dead", "-r", "uniform-w8", "--to", "compressed-tensors").stdout
    assert words in both and "refused: conv.weight: it holds weights of linear layers only" in both
    assert "--load: goes with --to compressed-tensors" in refused(call("plan", f"{HERE}:make_near_dead", "--load"), 2)


class HeadFirst(nn.Module):
    """Registered in another order than it runs in, with a table of whole numbers before all."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.table = nn.Linear(8, 3), nn.Embedding(9, 6)
        self.middle, self.first = nn.Linear(8, 8), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.is_floating_point() else self.table(x)
        return self.head(self.middle(self.first(x).relu()).relu())


TOKENS = (torch.tensor([[1, 2, 3]]),)


def make_tokens_by_name() -> dict[str, torch.Tensor]:
    return {"x": TOKENS[0]}


@pytest.mark.parametrize(
    ("example", "ends"),
    [
        (None, ["first.weight", "head.weight"]),  # the first registered is "first", the last is "last"
        ("2,6", ["first.weight", "head.weight"]),
        ("TOKENS", ["head.weight", "table.weight"]),
        ("make_tokens_by_name", ["head.weight", "table.weight"]),
    ],
)
def test_first_and_last_go_by_execution_where_an_example_is_given(
    tmp_path: Path, example: str | None, ends: list[str]
) -> None:
    flags = [] if example is None else ["--example", example if "," in example else f"{HERE}:{example}"]
    said = call("plan", f"{HERE}:HeadFirst", "-r", "psg-w3", *flags)
    assert said.exit_code == 0, said.output
    rows = json.loads(call("plan", f"{HERE}:HeadFirst", "-r", "psg-w3", *flags, "--json").stdout)["parameters"]
    assert sorted(row["parameter"] for row in rows if "bits=8" in row["becomes"]) == ends
    assert ("by order of registration" in said.stdout) == (example is None)
    save_file(HeadFirst().state_dict(), tmp_path / "head.safetensors")
    out = tmp_path / "head.detent"
    made = call("compress", tmp_path / "head.safetensors", "-r", "psg-w3", "--model", f"{HERE}:HeadFirst", *flags)
    assert made.exit_code == 0, made.output
    assert sorted(row["name"] for row in inspect(out).rows if "bits=8" in row["becomes"]) == ends


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rules:\n- {match: middle.weight, target: {kind: Uniform, bits: 5}}\n")
    rows = json.loads(call("plan", f"{HERE}:Net", "-r", file, "--json").stdout)["parameters"]
    assert [row["parameter"] for row in rows if row["becomes"] == "Uniform(bits=5)"] == ["middle.weight"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((f"{HERE}:Net", "-r", "psg-w5"), "did you mean"),
        ((f"{HERE}:Net", "-r", "no-such.yaml"), "detent: cannot open no-such.yaml: No such file or directory"),
        (("just-a-word",), "package.module:function"),
        (("no.such.module:make",), "no.such.module"),
        ((f"{HERE}:absent",), "absent"),
        ((f"{HERE}:make_nothing",), "not str"),
        ((f"{HERE}:make_trouble",), "the factory raised TypeError"),
        (("no-such.safetensors",), "detent: cannot open no-such.safetensors: No such file or directory"),
        ((f"{HERE}:Net", "--example", "3x8x8"), "--example 3x8x8: must be sizes with commas between them"),
        ((f"{HERE}:Net", "--example", f"{HERE}:absent"), f"--example {HERE}:absent: cannot find the factory"),
        ((f"{HERE}:Net", "--example", f"{HERE}:make_nothing"), "example=str: must be a tensor"),
        ((f"{HERE}:HeadFirst", "--example", "2,5"), "the model raised RuntimeError on it"),
        (("no-such.safetensors", "--example", "1,3,8,8"), "--example 1,3,8,8: a file cannot be run; give a factory"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(call("plan", *arguments), 2)
    assert words.removeprefix("detent: ") in json.loads(call("plan", *arguments, "--json").stdout)["error"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("match: a, target: {kind: Unifrom, bits: 5}", "rules[0].target: unknown kind 'Unifrom'; did you mean"),
        ("match: a, keeep: true", "did you mean 'keep'?"),
        ("match: a, target: {kind: Uniform, bits: 99}", "bits=99"),
    ],
)
def test_what_is_wrong_in_a_recipe_file_names_the_file(tmp_path: Path, rule: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"rules:\n- {{{rule}}}\n")
    sentence = refused(call("plan", f"{HERE}:Net", "-r", file), 2)
    assert sentence.startswith(f"detent: {file}: ") and words in sentence


def test_only_what_fits_is_offered_for_an_unknown_kind(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"

    def known(rule: str) -> set[str]:
        file.write_text(f"rules:\n- {{match: a, {rule}}}\n")
        return set(refused(call("plan", f"{HERE}:Net", "-r", file), 2).split("known: ")[1].split(", "))

    targets, pulls = known("target: {kind: Q}"), known("target: {kind: Binary}, mechanism: {kind: Q}")
    paces = known("target: {kind: Binary}, mechanism: {kind: PSG, strength: {kind: Q}}")
    assert {"Uniform", "TopK", "KernelCodebook"} <= targets and {"PSG", "ADMM"} <= pulls and "Cosine" in paces
    assert not targets & pulls and not targets & paces and not pulls & paces
    assert not [name for name in targets | pulls | paces if name.startswith("_")]


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    assert "not a safetensors state dict" in refused(call("plan", tmp_path / "bad.safetensors"), 2)
    save_file({"a": torch.zeros(2, 2), "a.b": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    said = call("plan", tmp_path / "odd.safetensors")
    assert said.exit_code == 0 and "8 of 8 weights claimed" in said.output, said.output
    done = call("compress", tmp_path / "odd.safetensors", "-r", "uniform-w4", "-o", tmp_path / "odd.detent")
    assert done.exit_code == 0, done.output
    assert sorted(read_header(tmp_path / "odd.detent").tensors) == ["a", "a.b"]


def test_the_skeleton_of_a_state_dict_reads_no_tensor(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` itself then reads them one at a time, to count units that do nothing."""
    with Checkpoint(weights) as opened:
        expected = str(Recipe.preset("psg-w4").resolve(skeleton(opened)))

    def read(self: Any, name: str) -> Any:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", read)
    with Checkpoint(weights) as opened:
        assert str(Recipe.preset("psg-w4").resolve(skeleton(opened))) == expected != ""


def test_a_state_dict_of_numbers_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2), "n": torch.zeros(3).to(torch.float8_e4m3fnuz)}, tmp_path / "odd.safetensors")
    assert "'n' is of no known dtype" in refused(call("plan", tmp_path / "odd.safetensors"), 2)


def test_a_plan_leaves_sys_path_with_the_current_folder_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_here.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rules: [{match: weight, keep: true}]\n")
    assert call("plan", "only_here:net", "-r", recipe).exit_code == 0
    sys.modules.pop("only_here")


# ---------------------------------------------------------------------------------------------------- post-training


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "net.safetensors"
    save_file(Net().state_dict(), path)
    return path


@pytest.mark.parametrize("coding", ["entropy", "bitpacked", "none"])
@pytest.mark.parametrize("recipe", ["uniform-w4", "psg-w3", "psg-prune90", "md-binary", "kq-mine"])
def test_compress_needs_no_code_and_does_what_the_library_does(
    tmp_path: Path, weights: Path, recipe: str, coding: str
) -> None:
    """Bitwise what dt.compress makes of the model."""
    if recipe == "kq-mine":
        recipe = str(tmp_path / "kq.yaml")
        Path(recipe).write_text(
            "rules:\n- {match: '@kernels', target: {kind: KernelCodebook, size: 4, book: global}}\n"
            "- {match: weight$, target: {kind: Uniform, bits: 6, granularity: channel}}\n"
        )
    result = call("compress", weights, "-r", recipe, "-o", tmp_path / "x.detent", "--coding", coding, "--json")
    assert result.exit_code == 0, result.output
    said, model, twin = json.loads(result.stdout), Net(), Net()
    model.load_state_dict(load_file(weights))
    # A state dict is read in the order of its names; this network's is the same for what is claimed.
    chosen = Recipe.from_yaml(recipe) if recipe.endswith("yaml") else Recipe.preset(recipe)
    run = dt.compress(model, chosen)
    load(tmp_path / "x.detent", twin, "compressed")
    with run.compressed():
        for name, value in model.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name
    rows = run.measure()
    energy = {name: float(p.detach().double().square().sum()) for name, p in model.named_parameters()}
    total = sum(energy[row["name"]] for row in rows)
    assert said["error"] == pytest.approx(sum(row["error"] * energy[row["name"]] for row in rows) / total)
    assert said["compressed_weights"] == sum(row["weights"] for row in rows)
    assert said["weights"] == sum(p.numel() for p in model.parameters())
    assert said["bytes"] == (tmp_path / "x.detent").stat().st_size
    assert said["raw_bytes"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_a_file_without_training_does_not_claim_one(weights: Path) -> None:
    result = call("compress", weights, "-r", "psg-w4")
    assert result.exit_code == 0 and "PSG() of the recipe did nothing" in result.stdout
    file = weights.with_suffix(".detent")
    assert {row["mechanism"] for row in read_header(file).plan} == {""}
    card = call("card", file).stdout
    assert "put there without training" in card and "epochs: 0" in card and "calibration data: none" in card


@pytest.mark.parametrize("model", [None, f"{HERE}:Net"])
@pytest.mark.parametrize("choices", ["step", "widths"])
def test_compress_to_a_budget(tmp_path: Path, weights: Path, choices: str, model: str | None) -> None:
    """The file is no larger than the budget, and what the library gives for it; BatchNorm's statistics are short."""
    more = [] if model is None else ["--model", model]
    least = call("compress", weights, "--budget", "250 B", "--choices", choices, "-o", tmp_path / "no.detent", *more)
    assert (
        least.exit_code == 2 and " too few; the smallest file" in least.stderr and not (tmp_path / "no.detent").exists()
    )
    out = tmp_path / "x.detent"
    result = call("compress", weights, "--budget", "1 kB", "--choices", choices, "-o", out, "--json", *more)
    assert result.exit_code == 0, result.output
    said, twin = json.loads(result.stdout), Net()
    assert said["bytes"] == out.stat().st_size <= 1000 and said["compressed_weights"] > 0.9 * said["weights"]
    load(out, twin, "compressed")
    own, energy, lost = load_file(weights), 0.0, 0.0
    for name, value in twin.named_parameters():
        energy += float(own[name].double().square().sum())
        lost += float((value.detach().double() - own[name].double()).square().sum())
    assert said["error"] == pytest.approx(lost / energy)


@pytest.mark.parametrize("model", [None, f"{HERE}:Net"])
def test_places_of_a_recipe_by_a_prior(tmp_path: Path, weights: Path, model: str | None) -> None:
    out, more = tmp_path / "x.detent", [] if model is None else ["--model", model]
    result = call("compress", weights, "-r", "uniform-w3", "--places", "prior", "-o", out, *more)
    assert result.exit_code == 0, result.output
    assert read_header(out).card["notes"]["calibration"] == "none; places by a prior of inputs"
    net, twin = Net(), Net()
    net.load_state_dict(load_file(weights))
    load(out, twin, "compressed")
    nearest = dt.compress(net, Recipe.preset("uniform-w3"))
    run = dt.compress(net, Recipe.preset("uniform-w3"), calibration="prior")
    with nearest.compressed():
        assert not all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())
    with run.compressed():
        assert all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match='must be "prior" or None'):
        dt.compress_state_dict(weights, out, Recipe.preset("uniform-w3"), calibration=[torch.ones(1)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "note", "card"),
    [
        (["--places", "nearest"], None, "none"),
        ([], "Places were chosen without data, by a prior", "none; places by a prior of inputs"),
        (["--data", "digits", "--calibrate", "64"], "Places of 3 tensors were chosen with the inputs given",
         "places by 64 training images of digits, pixels scaled by the training split's mean and deviation"),
    ],
)  # fmt: skip
def test_what_places_within_a_budget_are_chosen_with(
    tmp_path: Path, more: list[str], note: str | None, card: str
) -> None:
    torch.manual_seed(0)
    net, out = make_digits_net(), tmp_path / "x.detent"
    save_model(net, str(tmp_path / "net.safetensors"))
    arguments = ["--budget", "1 kB", "--model", f"{HERE}:make_digits_net", "-o", out, "--json", *more]
    result = call("compress", tmp_path / "net.safetensors", *arguments)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["bytes"] == out.stat().st_size <= 1000
    assert [text for text in said["notes"] if note and text.startswith(note)] == said["notes"]
    assert read_header(out).card["notes"]["calibration"] == card
    options: dict[str, Any] = {
        "places": "nearest" if "nearest" in more else None,
        "data": None,
        "calibrate": None,
        "model": "net:net",
    }
    if "--data" in more:
        options |= {"data": "digits", "calibrate": 64}
    calibration, _ = cli_work.places_of("1 kB", **options)
    own = {"calibration": calibration, "model": make_digits_net(), "notes": read_header(out).card["notes"]}
    dt.compress_to_budget(tmp_path / "net.safetensors", tmp_path / "own.detent", "1 kB", **own)
    assert (tmp_path / "own.detent").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "2 kB", "-r", "uniform-w4"], "give one of the two"),
        (["--budget", "2 kB", "--life", "both"], "no part of a budget"),
        (["--budget", "2 kB", "--choices", "bits"], "must be step or widths"),
        (["--budget", "2 kB", "--model", f"{HERE}:Net", "--example", "1,3,8,8"], "knows no first or last layer"),
        (["--budget", "2 K"], "must be a number of bytes"),
        (["--places", "any"], "--places any: must be nearest or prior"),
        (["-r", "uniform-w4", "--data", "digits"], "--data digits: goes with --budget"),
        (["--budget", "2 kB", "--data", "digits"], "goes with --model"),
        (["--budget", "2 kB", "--calibrate", "9"], "--calibrate 9: goes with --data"),
        (["--budget", "2 kB", "--data", "digits", "--places", "nearest"], "give one of the two"),
        (["--budget", "2 kB", "--data", "digits", "--model", f"{HERE}:Net"], "does not take images of 1x8x8"),
        (["--budget", "2 kB", "--data", "digits", "--calibrate", "0", "--model", f"{HERE}:Net"], "must be 1 to"),
    ],
)
def test_a_wrong_budget_is_refused(weights: Path, arguments: list[str], says: str) -> None:
    result = call("compress", weights, *arguments)
    assert result.exit_code == 2 and says in " ".join(result.stderr.split())


def test_compress_says_what_it_guessed(weights: Path) -> None:
    stdout = call("compress", weights, "-r", "psg-w4").stdout
    assert "1 tensor of more than two axes is taken as convolutions" in stdout
    assert "2 tensors of two axes are taken as linear" in stdout
    assert "@first is conv.weight and @last is out.weight" in stdout
    stdout = call("compress", weights, "-r", "psg-w4", "--model", f"{HERE}:Net").stdout
    assert "taken as" not in stdout and "alphabetical" not in stdout


def test_compress_keeps_the_full_life_if_asked(tmp_path: Path, weights: Path) -> None:
    assert call("compress", weights, "--life", "both", "-o", tmp_path / "x.detent").exit_code == 0
    twin = Net()
    load(tmp_path / "x.detent", twin, "full")
    assert all(torch.equal(value, load_file(weights)[name]) for name, value in twin.state_dict().items())


def test_a_model_knows_what_a_state_dict_does_not(tmp_path: Path) -> None:
    """Which axis of a transposed convolution holds the output channels, and which tensors are tied."""
    torch.manual_seed(0)
    model = Odd()
    save_model(model, str(tmp_path / "odd.safetensors"))
    result = call("compress", tmp_path / "odd.safetensors", "--model", f"{HERE}:Odd", "--json")
    assert result.exit_code == 0, result.output
    twin = Odd()
    load(tmp_path / "odd.detent", twin, "compressed")
    run = dt.compress(model, Recipe.preset("uniform-w4"))
    with run.compressed():
        assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    assert json.loads(result.stdout)["raw_bytes"] == 4 * (4 * 6 * 9 + 6 + 36)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight


class Tied(nn.Module):
    """Embedding and head are one tensor, and so are two norms' statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.wte.weight
        self.one, self.two = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.two.running_mean = self.one.running_mean


@pytest.mark.parametrize("kept", [("wte.weight",), ("lm_head.weight",), ("wte.weight", "lm_head.weight")])
def test_a_tied_tensor_may_stand_under_any_of_its_names(tmp_path: Path, kept: tuple[str, ...]) -> None:
    torch.manual_seed(3)
    model = Tied()
    model.one.running_mean.normal_()  # type: ignore[union-attr]
    state = {n: t.clone() for n, t in model.state_dict().items() if not n.endswith("weight") or "." in n}
    for name in {"wte.weight", "lm_head.weight"} - set(kept):
        del state[name]
    del state["one.running_mean"]
    save_file(state, tmp_path / "gpt.safetensors")
    assert call("compress", tmp_path / "gpt.safetensors", "--model", f"{HERE}:Tied").exit_code == 0
    twin = Tied()
    load(tmp_path / "gpt.detent", twin, "compressed")
    with dt.compress(model, Recipe.preset("uniform-w4")).compressed():
        assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    assert twin.wte.weight.unique().numel() < 12 * 8, "compressed"


def test_a_state_dict_that_contradicts_its_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "gpt.safetensors"

    def refusal(**changed: torch.Tensor) -> str:
        state = {n: t.clone() for n, t in Tied().state_dict().items()}
        save_file(state | {name.replace("__", "."): t for name, t in changed.items()}, file)
        return refused(call("compress", file, "--model", f"{HERE}:Tied"), 2)

    sentence = refusal(lm_head__weight=torch.zeros(12, 8))
    assert "'wte.weight' and 'lm_head.weight' are one tied tensor in the model and differ" in sentence
    assert "'one.running_var' has shape (9,) in the state dict and (8,)" in refusal(one__running_var=torch.ones(9))
    assert "'wte.weight' has shape (8, 8) in the state dict" in refusal(wte__weight=torch.ones(8, 8))
    assert "it has 'more'" in refusal(more=torch.ones(8))
    assert not file.with_suffix(".detent").exists()


def test_names_that_a_wrapper_left_are_those_of_the_network(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Net()
    state = {f"module.{name}": t for name, t in model.state_dict().items()}
    save_file(state, tmp_path / "ddp.safetensors")
    for more in ((), ("--model", f"{HERE}:Net")):
        out = tmp_path / "ddp.detent"
        said = json.loads(call("compress", tmp_path / "ddp.safetensors", "-o", out, *more, "--json").stdout)
        assert said["compressed_weights"] == 4 * 27 + 24 + 12
        load(out, Net(), "compressed")
    save_file(state | {"conv.bias": torch.zeros(4)}, tmp_path / "ddp.safetensors")
    assert "ddp.detent is there already" in refused(call("compress", tmp_path / "ddp.safetensors"), 2)
    sentence = refused(call("compress", tmp_path / "ddp.safetensors", "-o", out, "--model", f"{HERE}:Net"), 2)
    assert "are one name once wrapper names are removed" in sentence


def test_the_coding_is_that_of_the_form_unless_asked_for(tmp_path: Path) -> None:
    """docs/format.md, section 7: the safetensors form is bit-packed unless another coding is asked for."""
    save_file({"weight": torch.randn(64, 64)}, tmp_path / "net.safetensors")
    for name, given, coding in (("a.safetensors", None, "bitpacked"), ("b.detent", None, "entropy"),
                                ("c.safetensors", "entropy", "entropy"), ("d.detent", "none", "none")):  # fmt: skip
        flags = () if given is None else ("--coding", given)
        assert call("compress", tmp_path / "net.safetensors", "-o", tmp_path / name, *flags).exit_code == 0
        with Reader(tmp_path / name) as file:
            first = bytes(file._opened.blob(file._head.rows["weight"].compressed))[0]
        assert ("none", "bitpacked", "entropy")[min(first, 2)] == coding, name


def test_a_file_that_grew_is_not_called_smaller(tmp_path: Path, weights: Path) -> None:
    assert re.search(r"bytes, \d\.\d times smaller; ", call("compress", weights).stdout)
    tiny = tmp_path / "tiny.safetensors"
    save_file({"weight": torch.randn(2, 2)}, tiny)
    said = call("compress", tiny).stdout
    size = (tmp_path / "tiny.detent").stat().st_size
    assert f"larger than before: {size / 16:.2f} times as many bytes; " in said and "smaller" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.safetensors",), "cannot open absent.safetensors: No such file"),
        (("DETENT",), "is a Detent file, not a state dict; detent unpack makes a state dict of it"),
        (("FORM",), "is a Detent file, not a state dict"),
        (("NET", "-r", "uniform-w5"), "did you mean"),
        (("NET", "-r", "admm-prune-10x"), "stages follow one another"),
        (("NET", "--life", "full"), "--life full: must be compressed or both"),
        (("NET", "--coding", "zip"), "--coding zip: must be one of entropy, bitpacked, none"),
        (("NET", "-o", "NET"), "would write over"),
        (("NET", "--example", "1,3,8,8"), "--example 1,3,8,8: goes with --model"),
        (("NET", "--model", f"{HERE}:Odd"), "does not fit the model"),
        (("BAD",), "not a safetensors state dict"),
        (("NAN",), "'out.weight'"),
    ],
)
def test_a_wrong_compress_is_refused_in_one_sentence(
    tmp_path: Path, weights: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    state = load_file(weights)
    state["out.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    places = {"NET": weights, "BAD": tmp_path / "bad.safetensors", "NAN": tmp_path / "nan.safetensors"}
    for name, ours in (("DETENT", "ours.detent"), ("FORM", "ours.safetensors")):
        places[name] = tmp_path / ours
        save(dt.compress(Net(), Recipe.preset("uniform-w4")), tmp_path / ours)
    given = [places.get(argument, argument) for argument in arguments]
    assert words in refused(call("compress", *given), 2)
    assert not (tmp_path / "net.detent").exists() and not (tmp_path / "nan.detent").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "nothing half-written stays"


# ------------------------------------------------------------------------------------------------------- inspection


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    run = dt.compress(Net(), Recipe.preset("psg-w4"))
    path = tmp_path / "net.detent"
    save(run, path, notes={"who": "me [bold]"})
    return path


def test_inspect_says_where_the_bytes_are_and_what_became_of_each_parameter(file: Path) -> None:
    result = call("inspect", file)
    assert result.exit_code == 0, result.output
    assert f"{file.stat().st_size:,}" in result.stdout
    assert "who: me [bold]" in result.stdout, "text of a file is no markup"
    for name, _ in Net().named_parameters():
        assert name in result.stdout
    assert "Uniform(bits=4)" in result.stdout and "In full precision (no rule matches): conv.bias" in result.stdout


def test_inspect_as_json_is_the_library_s_numbers(file: Path) -> None:
    found = json.loads(call("inspect", file, "--json").stdout)
    expected = inspect(file)
    assert found["total"] == expected.total and found["total"]["file"] == file.stat().st_size
    assert found["rows"] == [{**row, "shape": list(row["shape"])} for row in expected.rows]
    assert found["tensors"]["middle.weight"]["becomes"] == "Uniform(bits=4)"
    assert found["card"]["notes"] == {"who": "me [bold]"}


def test_the_parts_of_a_file_add_up(file: Path) -> None:
    """The table of bytes: every part is shown, and their sum is the file."""
    table = call("inspect", file).stdout.split("Bytes\n")[1]
    numbers = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) │\n", table)]
    assert len(numbers) == 5 and sum(numbers[:4]) == numbers[4] == file.stat().st_size


def test_a_damaged_or_absent_file_is_refused_in_one_sentence(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 0xFF
    file.write_bytes(damaged)
    refused(call("inspect", file), 2)
    refused(call("inspect", file.with_name("absent.detent")), 2)
    assert set(json.loads(call("inspect", file, "--json").stdout)) == {"error"}
    file.write_bytes(damaged[:-20])
    for command in ("inspect", "card", "unpack", "report"):
        assert "damaged" in refused(call(command, file), 2)
    assert sorted(p.suffix for p in file.parent.iterdir()) == [".detent"], "a refused call leaves nothing behind"


def test_what_is_no_file_of_ours_is_called_so(tmp_path: Path) -> None:
    code = tmp_path / "mynet.py"
    code.write_text("import torch\n\n\ndef make():\n    return torch.nn.Linear(2, 2)\n")
    for command in ("inspect", "unpack", "card", "report"):
        sentence = refused(call(command, code), 2)
        assert sentence == f"detent: {code}: is damaged or neither a Detent nor a safetensors file"
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    sentence = refused(call("inspect", tmp_path / "a.safetensors"), 2)
    assert "is a safetensors file without a Detent header" in sentence
    assert "`detent compress` makes a Detent file of it, safetensors.torch.load_file reads it" in sentence


def test_reading_a_whole_file_shows_how_far_it_is(file: Path, watched: dict[str, list[int]]) -> None:
    tensors = len(Net().state_dict())
    assert call("inspect", file).exit_code == call("unpack", file).exit_code == 0
    assert watched == {"measuring": [tensors, tensors], "unpacking": [tensors, tensors]}


# ------------------------------------------------------------------------------------------- unpack, card, report


@pytest.mark.parametrize("life", ["full", "compressed"])
def test_unpack_gives_a_life_to_every_other_tool(file: Path, life: str) -> None:
    model = Net()
    load(file, model, life)  # type: ignore[arg-type]
    result = call("unpack", file, "--life", life, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    plain = load_file(said["file"])
    assert said["bytes"] == Path(said["file"]).stat().st_size
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_a_wrong_unpack_is_refused(file: Path) -> None:
    assert "--life both: must be full or compressed" in refused(call("unpack", file, "--life", "both"), 2)
    plain = file.with_suffix(".safetensors")
    save_file({"a": torch.ones(2)}, plain)
    assert "is a safetensors file without a Detent header" in refused(call("unpack", plain), 2)
    assert "would write over" in refused(call("unpack", file, "-o", file), 2)
    before = plain.read_bytes()
    assert f"{plain.name} is there already; give another name" in refused(call("unpack", file), 2)
    assert plain.read_bytes() == before
    alone = file.with_name("alone.detent")
    save(dt.compress(Net(), Recipe.preset("psg-w4")), alone, "compressed")
    sentence = refused(call("unpack", alone, "--life", "full"), 2)
    assert "holds only the compressed life; give --life compressed" in sentence
    assert "detent compress --life both" in sentence and "life=" not in sentence


def test_the_card_in_three_forms(file: Path) -> None:
    card = card_of_file(file)
    assert call("card", file).stdout == card.text() + "\n"
    assert call("card", file, "--markdown").stdout == card.markdown("Quantization card of net.detent")
    assert json.loads(call("card", file, "--json").stdout) == card.model_dump(mode="json")
    assert "give one of them" in refused(call("card", file, "--json", "--markdown"), 2)


def test_a_report_of_a_file_alone(file: Path) -> None:
    result = call("report", file)
    assert result.exit_code == 0, result.output
    page, twin = file.with_suffix(".html"), file.with_suffix(".json")
    assert str(page) in result.stdout and f"{page.stat().st_size:,} bytes" in result.stdout
    found = Report.from_json(twin.read_text())
    assert found == collect_file(file)
    for what in found.absent:
        assert f"Without {what}" in result.stdout
    assert json.loads(call("report", file, "--json").stdout) == json.loads(twin.read_text())


def test_a_report_as_json_alone_writes_nothing(file: Path) -> None:
    before = sorted(file.parent.iterdir())
    assert json.loads(call("report", file, "--json", "--title", "mine").stdout)["title"] == "mine"
    assert sorted(file.parent.iterdir()) == before
    call("report", file, "--json", "-o", file.with_name("x.html"))
    assert {p.name for p in file.parent.iterdir()} == {"net.detent", "x.html", "x.json"}


def make_digits_net() -> nn.Module:
    torch.manual_seed(5)
    return demo_module.DigitsNet(10, widths=(4, 8))


def test_a_report_with_model_and_data_has_scores(tmp_path: Path) -> None:
    model = make_digits_net()
    run = dt.compress(model, Recipe.preset("psg-w3"))
    file, exported, history = tmp_path / "d.detent", tmp_path / "e.json", tmp_path / "h.jsonl"
    save(run, file)
    History(run, history).log(accuracy=9.0)
    exported.write_text(
        json.dumps({"path": "x.onnx", "format": "ONNX", "bytes": 77, "difference": 1e-6, "notes": ["a", "b"]})
    )
    result = call("report", file, "--model", f"{HERE}:make_digits_net", "--data", "digits", "--bits", "4,3", "--json",
                  "--history", history, "--exported", exported)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = Report.from_json(result.stdout)
    train, test = digits("train"), digits("test")
    assert found.scores["full"]["accuracy"] == pytest.approx(accuracy(model, train, test))
    with run.compressed():
        assert found.scores["compressed"]["accuracy"] == pytest.approx(accuracy(model, train, test))
    assert [width.label for width in found.widths] == ["W4", "W3"]
    assert "test split of digits" in found.evaluated_on and "training images" in found.sensitivity_on
    assert all(layer.sensitivity is not None for layer in found.layers)
    assert found.exports[0].bytes == 77 and found.exports[0].notes == "a b"
    assert found.history[0].scores == {"accuracy": 9.0} and found.absent == {}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "digits"), "go together"),
        (("--model", f"{HERE}:Net"), "go together"),
        (("--model", f"{HERE}:Net", "--data", "nowhere"), "'digits', or a folder"),
        (("--model", f"{HERE}:Net", "--data", "digits"), "does not take images of 1x8x8"),
        (("--model", f"{HERE}:Odd", "--data", "digits"), "does not fit this model"),
        (("--bits", "4;3"), "--bits 4;3"),
        (("--bits", "9"), "widths must be 2 to 8"),
        (("--history", "FILE"), "is not a line of History"),
        (("--exported", "FILE"), "is not what detent export --json says"),
        (("--exported", "absent.json"), "detent: cannot open absent.json: No such file or directory"),
        (("--history", "absent.jsonl"), "detent: cannot open absent.jsonl: No such file or directory"),
        (("-o", "no/such/folder/x.html"), "no/such/folder"),
    ],
)
def test_a_wrong_report_is_refused_in_one_sentence(file: Path, flags: tuple[str, ...], words: str) -> None:
    (file.parent / "odd.json").write_text("[1]")
    given = [file.parent / "odd.json" if flag == "FILE" else flag for flag in flags]
    assert words in refused(call("report", file, *given), 2)


# ------------------------------------------------------------------------------------------------------------ export


def make_flat() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))


def test_export_to_onnx_runs_and_says_how_near_it_is(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make_flat()
    run = dt.compress(model, Recipe.preset("uniform-w4"))
    save(run, tmp_path / "f.detent", "compressed")
    result = call("export", tmp_path / "f.detent", "--model", f"{HERE}:make_flat", "--input", "1,3,4", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    said = json.loads(result.stdout)
    assert said["path"] == str(tmp_path / "f.onnx") and said["bytes"] == (tmp_path / "f.onnx").stat().st_size
    assert "INT4" in said["format"] and said["difference"] < 1e-5
    session = onnxruntime.InferenceSession(said["path"], providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 4)
    with run.compressed(), torch.no_grad():
        expected = model(x)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5), "the batch is free"


DIGITS = ("--model", f"{HERE}:make_digits_net", "--input", "1,1,8,8")


@pytest.fixture
def digits_file(tmp_path: Path) -> Path:
    path = tmp_path / "d.detent"
    save(dt.compress(make_digits_net(), Recipe.preset("uniform-w4")), path, "compressed")
    return path


def constants(path: str) -> dict[str, np.ndarray]:
    """Every tensor that an ONNX file holds."""
    onnx = pytest.importorskip("onnx")
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_export_rounds_activations_over_training_images(digits_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    asked: list[str] = []
    monkeypatch.setattr(cli_work, "digits", lambda split: asked.append(split) or digits(split))
    train = digits("train")
    found = {}
    for bits, method in ((8, "minmax"), (4, "mse")):
        flags = ("--activations", bits, "--method", method, "--data", "digits", "--calibrate", len(train))
        result = call("export", digits_file, *DIGITS, *flags, "--json", "--force")  # the second over the first
        assert result.exit_code == 0, (result.output, result.exception)
        said = found[bits] = json.loads(result.stdout)
        assert f"activations in {bits} bits" in said["format"]
        assert f"{method} over {len(train):,} training images of digits" in said["notes"][0]
        assert "QLinearConv" in said["kernels"], "integer kernels"
        if bits == 8:  # the range of the input, worked out again
            pixels = train.images.float() / 255
            x = (pixels - pixels.mean()) / pixels.std()
            scale = next(v for name, v in constants(said["path"]).items() if name.endswith("input.rounded.scale"))
            assert float(scale) == pytest.approx(float(x.max() - x.min()) / 255)
    assert asked == ["train", "train"], "no test image is looked at"
    assert not any("simulated" in note for note in found[8]["notes"])
    assert any(note.startswith("simulated: activations of 4 bits") for note in found[4]["notes"])
    assert 0 < 4 * found[8]["difference"] < found[4]["difference"], "16 times the step"


def test_export_rounds_activations_without_data(digits_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.delattr(cli_work, "digits")
    flags = ("--activations", 8, "--method", "batchnorm", "--input-range", "-2,3.1")
    result = call("export", digits_file, *DIGITS, *flags)
    assert result.exit_code == 0, (result.output, result.exception)
    assert (
        "from BatchNorm, without data; the difference is that on uniform random inputs from -2 to 3.1" in result.stdout
    )
    numbers = constants(str(digits_file.with_suffix(".onnx")))
    scale = next(v for name, v in numbers.items() if name.endswith("input.rounded.scale"))
    assert float(scale) == pytest.approx(5.1 / 255)


def test_export_folds_batchnorm_and_times_the_file_for_a_report(
    digits_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timed by numbers of our own here: what is compared with what, what is said of it, and that a report shows it."""
    ort = pytest.importorskip("onnxruntime")
    x = torch.randn(3, 1, 8, 8)
    model = make_digits_net().eval()
    with dt.compress(model, Recipe.preset("uniform-w4")).compressed(), torch.no_grad():
        expected = model(x)

    def timed(path: Path, plain: Path, shape: list[int], **how: Any) -> list[Latency]:
        for file, integers in ((path, True), (plain, False)):
            running = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
            (out,) = running.run(None, {running.get_inputs()[0].name: x.numpy()})
            assert torch.allclose(torch.from_numpy(out), expected, atol=1e-5)
            assert any(str(v.dtype) == "int4" for v in constants(str(file)).values()) == integers
            assert not any("running_mean" in name for name in constants(str(file))), "BatchNorm is folded in both"
        assert shape == [1, 8, 8] and how["batches"] == (1, 64) and how["threads"] == 2 and how["at_load"]
        slow = Latency(batch=1, ms=0.3, reference_ms=0.2, ratio=1.4, quartiles=(1.3, 1.6), at_load_ms=0.21)
        return [slow, dataclasses.replace(slow, batch=64, ms=8.0, reference_ms=9.0, ratio=0.8, quartiles=(0.7, 0.9))]

    monkeypatch.setattr(cli_work, "onnx_latency", timed)
    result = call("export", digits_file, *DIGITS, "--batchnorm", "fold", "--latency", "--threads", 2, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    said = json.loads(result.stdout)
    assert said["latency_ms"] == {"1": 0.3, "64": 8.0} and said["reference_ms"] == {"1": 0.2, "64": 9.0}
    assert [row["ratio"] for row in said["latency"]] == [1.4, 0.8] and said["threads"] == 2
    notes = " ".join(said["notes"])
    for words in ("2 threads", "1.40 times as long: slower", "0.80 times as long: faster", "at load: batch 1 0.210 ms"):
        assert words in notes, notes
    twin = digits_file.with_suffix(".said.json")
    twin.write_text(result.stdout)
    page = digits_file.with_suffix(".html")
    assert call("report", digits_file, "--exported", twin, "-o", page).exit_code == 0
    (export,) = Report.from_json(page.with_suffix(".json").read_text()).exports
    assert export.latency_ms == said["latency_ms"] and export.reference_ms == said["reference_ms"]
    text = page.read_text()
    assert "latency, batch 64" in text and "9.00 ms" in text and "0.80 times as long" in text


def make_llama() -> Any:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_export_for_transformers_loads_with_our_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model = make_llama()
    grid = dt.Uniform(bits=4, granularity="channel")
    run = dt.compress(model, Recipe([dt.Rule(match=r"_proj\.weight$", target=grid)]))
    save(run, tmp_path / "llama.detent", "compressed")
    result = call(
        "export", tmp_path / "llama.detent", "--model", f"{HERE}:make_llama", "--to", "compressed-tensors", "--json"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    said = json.loads(result.stdout)
    folder = tmp_path / "llama"
    assert said["path"] == str(folder) and len(said["packed"]) == 7
    assert said["bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert said["notes"] == ["Left as they are: lm_head."]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        full = model(ids).logits
        with run.compressed():
            ours = model(ids).logits
        assert torch.equal(loaded(ids).logits, ours) and not torch.equal(full, ours)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batchnorm", "drop"), "must be keep or fold"),
        (("--data", "digits"), "--data: go with --activations 8"),
        (("--method", "mse", "--calibrate", "9"), "--method, --calibrate: go with --activations 8"),
        (("--input-range", "0,1"), "--input-range: go with --activations 8"),
        (("--activations", "8"), "--method minmax: needs --data"),
        (
            ("--activations", "8", "--method", "best", "--data", "digits"),
            "must be minmax, percentile, mse or batchnorm",
        ),
        (("--activations", "9", "--data", "digits"), "--activations 9: must be 2 to 8"),
        (("--activations", "8", "--data", "digits", "--batchnorm", "keep"), "--batchnorm keep: rounded activations"),
        (("--activations", "8", "--data", "digits", "--input-range", "0,1"), "goes with --method batchnorm only"),
        (("--activations", "8", "--data", "digits", "--calibrate", "0"), "--calibrate 0: must be 1 to "),
        (("--activations", "8", "--data", "digits", "--calibrate", "99999"), "--calibrate 99999: must be 1 to "),
        (("--activations", "8", "--data", "digits"), "the images of digits are 1x8x8"),
        (("--activations", "8", "--data", "nowhere"), "'digits', or a folder"),
        (("--activations", "8", "--method", "batchnorm"), "needs --input-range"),
        (("--activations", "8", "--method", "batchnorm", "--data", "digits"), "takes no images"),
        (("--activations", "8", "--method", "batchnorm", "--input-range", "2,-2"), "--input-range 2,-2: must be"),
        (("--activations", "8", "--method", "batchnorm", "--input-range", "1"), "--input-range 1: must be"),
        (("--threads", "2"), "--threads 2: must be 1 or more, and goes with --latency"),
        (("--latency", "--threads", "0"), "--threads 0: must be 1 or more"),
    ],
)
def test_wrong_flags_of_an_onnx_export_are_refused_in_one_sentence(
    file: Path, flags: tuple[str, ...], words: str
) -> None:
    assert words in refused(call("export", file, "--model", f"{HERE}:Net", "--input", "1,3,9,9", *flags), 2)
    assert not file.with_suffix(".onnx").exists()


def test_advice_for_python_alone_is_called_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(*_: Any, **__: Any) -> None:
        raise ValueError("the graph fixes the batch at 2; export with dynamic_batch=False, or mend the model")

    monkeypatch.setattr(cli_work, "to_onnx", fixed)
    monkeypatch.setattr(cli_work, "_try", lambda *_: None)
    sentence = refused(call("export", file, "--model", f"{HERE}:Net", "--input", "1,3,9,9"), 2)
    assert "no option for that: in Python, detent.export.to_onnx(..., dynamic_batch=False)" in sentence


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--input is missing: onnx needs the shape of one input, e.g. --input 1,3,32,32"),
        (("--input", "1,3"), "--input 1,3: the model does not take one input of floating-point numbers"),
        (("--input", "1,x"), "--input 1,x"),
        (("--input", "0,3"), "--input 0,3"),
        (("--to", "tflite"), "must be onnx or compressed-tensors"),
        (("--to", "compressed-tensors", "--input", "1,3"), "--input goes with onnx only"),
        (("--to", "compressed-tensors"), "is no transformers model"),
        (("--to", "compressed-tensors", "--latency", "--activations", "8"), "--activations, --latency go with onnx"),
    ],
)
def test_a_wrong_export_is_refused_in_one_sentence(file: Path, flags: tuple[str, ...], words: str) -> None:
    pytest.importorskip("transformers")
    assert words in refused(call("export", file, "--model", f"{HERE}:Net", *flags), 2)


def test_a_model_of_tokens_is_sent_to_the_library(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run = dt.compress(make_tokens(), Recipe.preset("uniform-w4"))
    save(run, tmp_path / "t.detent", "compressed")
    flags = ("--model", f"{HERE}:make_tokens", "--input", "1,5")
    sentence = refused(call("export", tmp_path / "t.detent", *flags), 2)
    assert "--input 1,5: " in sentence and "for tokens (whole numbers)" in sentence and "to_onnx" in sentence
    # What the sentence says to do instead works.
    model = make_tokens()
    load(tmp_path / "t.detent", model, "compressed")
    inputs = torch.zeros(1, 5, dtype=torch.long)
    assert to_onnx(model, tmp_path / "t.onnx", inputs, codes=tmp_path / "t.detent").nbytes > 0


def make_tokens() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)).eval()


# ------------------------------------------------------------------------------------------------------------- docs

DOC = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def test_the_examples_of_the_page_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example of docs/cli.md, in its order: the same words, and numbers as near as other machines are."""
    pytest.importorskip("onnxruntime")
    text = DOC.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "mynet.py").write_text(code)
    importlib.import_module("mynet")  # writes its weights
    blocks = re.findall(r"```console\n\$ detent (.*?)\n(.*?)```", text, flags=re.DOTALL)
    assert {line.split()[0] for line, _ in blocks} == set(SURFACE) - {"demo"}, "every command has an example"
    for line, shown in blocks:
        result = CliRunner().invoke(app, line.split())
        words, _, code = shown.partition("$ echo $?\n")
        assert result.exit_code == int(code or 0), (line, result.output, result.exception)
        said = "\n".join(part.rstrip() for part in (result.stdout + result.stderr).rstrip().splitlines()) + "\n"
        assert squeezed(said) == squeezed(words), line
        for found, written in zip(_NUMBER.findall(said), _NUMBER.findall(words), strict=True):
            a, b = (float(number.replace(",", "")) for number in (found, written))
            assert a == pytest.approx(b, rel=0.1, abs=1e-6), (line, found, written)
    sys.modules.pop("mynet")


def squeezed(text: str) -> list[str]:
    """The words of an output: numbers are one sign, and a table may be wider."""
    return re.sub(r"[─━┄]+", "─", _NUMBER.sub("#", text)).split()


def test_the_page_names_every_option() -> None:
    text = DOC.read_text(encoding="utf-8")
    for command, flags in SURFACE.items():
        section = text.split(f"\n## {command}\n")[1].split("\n## ")[0]
        for flag in flags:
            long = flag.split()[0]
            assert not long.startswith("--") or long == "--json" or long in section, (command, long)
