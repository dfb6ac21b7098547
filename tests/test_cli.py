"""The command line: its surface is frozen, its answers are checked against the library, its errors are one sentence."""

from __future__ import annotations

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
from detent import cli
from detent import demo as demo_module
from detent.cli import app
from detent.data import digits
from detent.demo import Outcome, Settings, demonstrate
from detent.pack import inspect, load, read_header, save
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
        "--json": False,
    },
    "plan": {"model": "required", "--recipe -r": "psg-w4", "--json": False},
    "compress": {
        "weights": "required",
        "--recipe -r": "uniform-w4",
        "--out -o": None,
        "--life": "compressed",
        "--coding": "entropy",
        "--model": None,
        "--json": False,
    },
    "inspect": {"file": "required", "--json": False},
    "unpack": {"file": "required", "--out -o": None, "--life": "compressed", "--json": False},
    "report": {
        "file": "required",
        "--out -o": None,
        "--model": None,
        "--data": None,
        "--bits": "8,6,4,3,2",
        "--history": None,
        "--exported": None,
        "--title": None,
        "--json": False,
    },
    "export": {
        "file": "required",
        "--model": "required",
        "--to": "onnx",
        "--out -o": None,
        "--input": None,
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
    assert list(watched)[4:] == ["sensitivity", "widths"] and len(watched) == 6
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


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rules:\n- {match: middle.weight, target: {kind: Uniform, bits: 5}}\n")
    rows = json.loads(call("plan", f"{HERE}:Net", "-r", file, "--json").stdout)["parameters"]
    assert [row["parameter"] for row in rows if row["becomes"] == "Uniform(bits=5)"] == ["middle.weight"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((f"{HERE}:Net", "-r", "psg-w5"), "did you mean"),
        ((f"{HERE}:Net", "-r", "no-such.yaml"), "no-such.yaml"),
        (("just-a-word",), "package.module:function"),
        (("no.such.module:make",), "no.such.module"),
        ((f"{HERE}:absent",), "absent"),
        ((f"{HERE}:make_nothing",), "not str"),
        ((f"{HERE}:make_trouble",), "the factory raised TypeError"),
        (("no-such.safetensors",), "no-such.safetensors"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(call("plan", *arguments), 2)
    assert words in json.loads(call("plan", *arguments, "--json").stdout)["error"]


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    assert "not a safetensors state dict" in refused(call("plan", tmp_path / "bad.safetensors"), 2)
    save_file({"a": torch.zeros(2, 2), "a.b": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    assert "not a safetensors state dict" in refused(call("plan", tmp_path / "odd.safetensors"), 2)


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


def test_compress_says_what_it_guessed(weights: Path) -> None:
    stdout = call("compress", weights, "-r", "psg-w4").stdout
    assert "1 tensors of more than two axes are taken as convolutions" in stdout
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.safetensors",), "absent.safetensors"),
        (("NET", "-r", "uniform-w5"), "did you mean"),
        (("NET", "-r", "admm-prune-10x"), "stages follow one another"),
        (("NET", "--life", "full"), 'must be "both" or "compressed"'),
        (("NET", "--coding", "zip"), "coding='zip'"),
        (("NET", "-o", "NET"), "is the state dict itself"),
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
    assert "Uniform(bits=4)" in result.stdout and "passed over" in result.stdout


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
    assert 'must be "full" or "compressed"' in refused(call("unpack", file, "--life", "both"), 2)
    assert "is the file itself" in refused(call("unpack", file, "-o", file), 2)
    alone = file.with_name("alone.detent")
    save(dt.compress(Net(), Recipe.preset("psg-w4")), alone, "compressed")
    assert "holds only the compressed life" in refused(call("unpack", alone, "--life", "full"), 2)


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
        (("--exported", "absent.json"), "absent.json"),
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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--input 1,3,32,32"),
        (("--input", "1,x"), "--input 1,x"),
        (("--input", "0,3"), "--input 0,3"),
        (("--to", "tflite"), "must be onnx or compressed-tensors"),
        (("--to", "compressed-tensors", "--input", "1,3"), "for nothing else"),
        (("--to", "compressed-tensors"), "is no transformers model"),
    ],
)
def test_a_wrong_export_is_refused_in_one_sentence(file: Path, flags: tuple[str, ...], words: str) -> None:
    pytest.importorskip("transformers")
    assert words in refused(call("export", file, "--model", f"{HERE}:Net", *flags), 2)


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
