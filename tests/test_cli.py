"""The command line: its surface is frozen, its answers are checked against the library, its errors are one sentence."""

from __future__ import annotations

import dataclasses
import io
import json
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
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import detent as dt
from detent import cli
from detent import demo as demo_module
from detent.cli import app
from detent.data import digits
from detent.demo import Outcome, Settings, demonstrate
from detent.pack import load, save, sizes
from detent.recipe import Recipe

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
    "inspect": {"file": "required", "--json": False},
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
    assert len(watched) == 4 and all(done == total > 0 for done, total in watched.values()), watched
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
            assert 0 <= row.cells[f"W{bits}"].bytes - weights * bits / 8 - rest <= 6000
        kept = round(0.1 * weights)
        assert 0 <= row.cells["pruned"].bytes - weights / 8 - 4 * kept - rest <= 6000


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
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.detent", "result.json", "weights.png"]


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


def test_inspect_as_json_is_header_and_sizes(file: Path) -> None:
    found = json.loads(call("inspect", file, "--json").stdout)
    assert found["sizes"] == sizes(file) and found["sizes"]["file"] == file.stat().st_size
    assert found["tensors"]["middle.weight"]["becomes"] == "Uniform(bits=4)"
    assert found["card"]["notes"] == {"who": "me [bold]"}


def test_a_damaged_or_absent_file_is_refused_in_one_sentence(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 0xFF
    file.write_bytes(damaged)
    refused(call("inspect", file), 2)
    refused(call("inspect", file.with_name("absent.detent")), 2)
    assert set(json.loads(call("inspect", file, "--json").stdout)) == {"error"}
