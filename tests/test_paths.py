"""What commands read and write: inputs stay, nothing is written over that was not named, shards are one state dict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import detent as dt
from detent import cli, pack
from detent.cli import app
from detent.cli_work import bytes_in, visible
from detent.pack.checkpoint import shard_name

RECIPE = dt.Recipe([dt.Rule(match=r"weight$", target=dt.Uniform(bits=4))])
MYNET = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))\n"


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it: weights, a compressed file, code, a recipe, a history, and other files of his own."""
    monkeypatch.chdir(tmp_path)
    model = net()
    save_file(model.state_dict(), "w.safetensors")
    dt.save(dt.compress(model, RECIPE), "net.detent")
    Path("mynet.py").write_text(MYNET)
    Path("r.yaml").write_text("rules: [{match: weight, target: {kind: Uniform, bits: 4}}]\n")
    Path("h.json").write_text("")
    os.link("net.detent", "linked.html")
    os.symlink("w.safetensors", "soft.detent")
    Path("shards").mkdir()
    Path("shards/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(model.state_dict(), "model-00001-of-00001.safetensors")})
    )
    save_file(model.state_dict(), "shards/model-00001-of-00001.safetensors")
    for name in ("w.detent", "shards.detent", "net.safetensors", "net.html", "net.json", "net.onnx", "config.json"):
        Path(name).write_text("the only copy")
    Path("net").mkdir()
    Path("net/model.safetensors").write_text("the original weights")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/result.json").write_text("the only copy")
    return tmp_path


def everything(where: Path) -> dict[str, bytes]:
    return {str(path.relative_to(where)): path.read_bytes() for path in sorted(where.rglob("*.*")) if path.is_file()}


ONNX = ("--model", "mynet:make", "--input", "1,4")
TENSORS = ("--model", "mynet:make", "--to", "compressed-tensors")
REFUSED: list[tuple[tuple[str, ...], str]] = [
    # An input, by its name, by a link, or as another input than the first.
    (("compress", "w.safetensors", "-o", "w.safetensors"), "would write over w.safetensors"),
    (("compress", "w.safetensors", "-o", "soft.detent"), "would write over w.safetensors"),
    (("compress", "w.safetensors", "-r", "r.yaml", "-o", "r.yaml"), "would write over r.yaml"),
    (("compress", "w.safetensors", "--model", "mynet:make", "-o", "mynet.py"), "would write over mynet.py"),
    (("compress", "shards", "-o", "shards/model-00001-of-00001.safetensors"), "would write over shards/model-00001"),
    (("compress", "shards", "-o", "shards/model.safetensors.index.json"), "would write over shards/model.saf"),
    (("unpack", "net.detent", "-o", "net.detent"), "would write over net.detent"),
    (("report", "net.detent", "-o", "net.detent"), "would write over net.detent"),
    (("report", "net.detent", "-o", "linked.html"), "would write over net.detent"),
    (("report", "net.detent", "--history", "h.json", "-o", "h.html"), "h.json: would write over h.json"),
    (("report", "net.detent", "--exported", "h.json", "-o", "h.json"), "would write over h.json"),
    (("export", "net.detent", *ONNX, "-o", "net.detent"), "would write over net.detent"),
    (("export", "net.detent", *ONNX, "-o", "mynet.py"), "would write over mynet.py"),
]
STANDING: list[tuple[tuple[str, ...], str]] = [
    # What stands under a name that the user did not give.
    (("compress", "w.safetensors"), "w.detent is there already"),
    (("compress", "shards"), "shards.detent is there already"),
    (("compress", "shards/model.safetensors.index.json"), "shards/model.detent is there already"),
    (("unpack", "net.detent"), "net.safetensors is there already"),
    (("unpack", "net.detent", "--shard-size", "1kB"), "net is a folder with files in it"),
    (("unpack", "net.detent", "--shard-size", "1kB", "-o", "shards"), "shards is a folder with files in it"),
    (("report", "net.detent"), "net.html is there already"),
    (("report", "net.detent", "-o", "config.html"), "config.json is there already"),
    (("export", "net.detent", *ONNX), "net.onnx is there already"),
    (("export", "net.detent", *TENSORS), "net is a folder with files in it"),
    (("export", "net.detent", *TENSORS, "-o", "shards"), "shards is a folder with files in it"),
    (("demo",), "runs/demo/result.json is there already"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda value: " ".join(value)[:60])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_no_command_writes_over_what_it_reads(
    folder: Path, arguments: tuple[str, ...], words: str, force: tuple[str, ...]
) -> None:
    before = everything(folder)
    result = call(*arguments, *force)
    assert result.exit_code == 2 and words in result.stderr, (result.output, result.exception)
    assert everything(folder) == before


@pytest.mark.parametrize(("arguments", "words"), STANDING, ids=lambda value: " ".join(value)[:60])
def test_no_command_writes_over_what_stands_under_a_name_that_nobody_gave(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    if "shards/model" in words:
        Path("shards/model.detent").write_text("the only copy")
    before = everything(folder)
    result = call(*arguments)
    assert result.exit_code == 2 and words in result.stderr, (result.output, result.exception)
    assert "--force" in result.stderr
    assert everything(folder) == before


def test_the_table_is_of_every_command_that_writes() -> None:
    writing = {arguments[0] for arguments, _ in STANDING}
    assert writing == {"demo", "compress", "unpack", "report", "export"}
    assert writing | {"plan", "inspect", "card"} == {command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "arguments",
    [("compress", "w.safetensors"), ("unpack", "net.detent"), ("report", "net.detent", "-o", "config.html")],
)
def test_force_writes_over_outputs(folder: Path, arguments: tuple[str, ...]) -> None:
    result = call(*arguments, "--force")
    assert result.exit_code == 0, result.output


def test_what_is_named_is_replaced(folder: Path) -> None:
    Path("there.detent").write_text("an older one")
    assert call("compress", "w.safetensors", "-o", "there.detent").exit_code == 0
    assert pack.read_header("there.detent").life == "compressed"


# --- sharded checkpoints ------------------------------------------------------------------------------------------


def sharded(where: Path, state: dict[str, Any], shards: int = 3) -> Path:
    """A folder as transformers writes it."""
    where.mkdir()
    told = {}
    for i in range(shards):
        mine = {name: state[name].contiguous() for name in list(state)[i::shards]}
        file = shard_name("model", i + 1, shards)
        save_file(mine, where / file, metadata={"format": "pt"})
        told |= dict.fromkeys(mine, file)
    (where / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": told}))
    (where / "config.json").write_text("{}")
    return where


def test_shards_give_the_file_of_the_whole(tmp_path: Path) -> None:
    state = net().state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    where = sharded(tmp_path / "llama", state)
    recipe = dt.Recipe.preset("uniform-w4")
    dt.compress_state_dict(tmp_path / "whole.safetensors", tmp_path / "a.detent", recipe)
    for i, source in enumerate((where, where / "model.safetensors.index.json")):
        made = dt.compress_state_dict(source, tmp_path / f"b{i}.detent", recipe)
        assert (tmp_path / f"b{i}.detent").read_bytes() == (tmp_path / "a.detent").read_bytes()
        assert made.raw_bytes == sum(t.numel() * 4 for t in state.values())
    result = call("compress", where)
    assert result.exit_code == 0 and (tmp_path / "llama.detent").exists(), result.output
    plans = [call("plan", path, "-r", "uniform-w4").stdout for path in (where, tmp_path / "whole.safetensors")]
    assert plans[0] == plans[1] != ""


def test_shards_come_out_as_they_went_in(tmp_path: Path) -> None:
    state = net().state_dict()
    where = sharded(tmp_path / "llama", state)
    dt.compress_state_dict(where, tmp_path / "a.detent", RECIPE, life="both")
    result = call("unpack", tmp_path / "a.detent", "--life", "full", "--shard-size", "60B", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{i}-of-0000{len(files)}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 1 and index["metadata"]["total_size"] == sum(t.numel() * 4 for t in state.values())
    for file in files:
        part = load_file(tmp_path / "out" / file)
        assert all(
            torch.equal(value, state[name]) and index["weight_map"][name] == file for name, value in part.items()
        )
        assert len(part) == 1 or sum(t.numel() * 4 for t in part.values()) <= 60
    with pack.Checkpoint(tmp_path / "out") as back:
        assert all(torch.equal(back.tensor(name), value) for name, value in state.items())
        assert sorted(state) == list(back)


def spoil(path: str, change: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda where: change(where / path)


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def act(where: Path) -> None:
        path = where / "model.safetensors.index.json"
        told = json.loads(path.read_text())
        path.write_text(json.dumps({"weight_map": change(told["weight_map"])}))

    return act


@pytest.mark.parametrize(
    ("spoiled", "asked", "words"),
    [
        (None, "model-00002-of-00003.safetensors", "is one shard of 3; give the folder, "),
        (spoil("model.safetensors.index.json", Path.unlink), "", "holds shards and no index"),
        (spoil("model-00002-of-00003.safetensors", Path.unlink), "", "cannot open .*model-00002-of-00003.safetensors"),
        (index(lambda told: told | {"more": "model-00001-of-00003.safetensors"}), "", "does not hold 'more'"),
        (index(lambda told: dict(list(told.items())[1:])), "", "which model.safetensors.index.json does not say"),
        (
            index(lambda told: told | {"more": "../w.safetensors"}),
            "",
            "names '../w.safetensors', which is no file",
        ),
        (index(lambda told: {}), "", "is no index of shards"),
        (spoil("model.safetensors.index.json", lambda p: p.write_text("[")), "", "is no index of shards"),
    ],
)
def test_wrong_shards_are_named(tmp_path: Path, spoiled: Any, asked: str, words: str) -> None:
    where = sharded(tmp_path / "llama", net().state_dict())
    if spoiled:
        spoiled(where)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        dt.compress_state_dict(where / asked, tmp_path / "a.detent", RECIPE)
    assert call("compress", where / asked).exit_code == 2
    assert not (tmp_path / "a.detent").exists()


def test_a_folder_may_hold_one_file_or_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no .safetensors state dict"):
        pack.Checkpoint(tmp_path)
    torch.save(net().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, which is never opened here"):
        pack.Checkpoint(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
    with pytest.raises(ValueError, match="is the index of pickles"):
        pack.Checkpoint(index)
    save_file(net().state_dict(), tmp_path / "other.safetensors")
    pack.Checkpoint(tmp_path).close()
    save_file(net().state_dict(), tmp_path / "third.safetensors")
    with pytest.raises(ValueError, match="holds other.safetensors, third.safetensors; name one of them"):
        pack.Checkpoint(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_pickles_are_told_what_to_become(tmp_path: Path, legacy: bool, whole: bool) -> None:
    path = tmp_path / "net.pt"
    torch.save(net() if whole else net().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    for command in ("compress", "plan", "inspect", "unpack", "card", "report"):
        result = call(command, path)
        assert result.exit_code == 2 and "safetensors.torch.save_model(model, path)" in result.stderr, command
    with pytest.raises(dt.FormatError, match="what torch.save writes"):
        dt.load(path, net())


def test_a_tied_state_dict_without_a_model_loads_into_the_tied_model(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    one, two = Tied(), Tied()
    save_file({"embed.weight": one.embed.weight.detach()}, tmp_path / "w.safetensors")  # as transformers writes it
    assert call("compress", tmp_path / "w.safetensors", "-r", "uniform-w4").exit_code == 0
    dt.load(tmp_path / "w.detent", two, "compressed")
    with dt.compress(one, dt.Recipe.preset("uniform-w4")).compressed():
        assert torch.equal(two.embed.weight, one.embed.weight)


@pytest.mark.parametrize("prefix", ["model", "state_dict", "type.half"])  # modules have methods of such names
def test_a_state_dict_under_a_prefix_fits_its_model(tmp_path: Path, prefix: str) -> None:
    save_file({f"{prefix}.{name}": value for name, value in net().state_dict().items()}, tmp_path / "w.safetensors")
    with torch.device("meta"):
        model = net()
    dt.compress_state_dict(tmp_path / "w.safetensors", tmp_path / "f", RECIPE, model=model)
    dt.load(tmp_path / "f", net(), "compressed")
    assert call("compress", tmp_path / "w.safetensors", "-r", "uniform-w4").exit_code == 0
    dt.load(tmp_path / "w.detent", net(), "compressed")


# --- the terminal, the shell --------------------------------------------------------------------------------------


def test_nothing_of_a_file_reaches_a_terminal_raw(tmp_path: Path) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\x9b\u202e"
    model = nn.Module()
    model.add_module("a" + evil.replace(".", ""), nn.Linear(3, 3))
    dt.save(dt.compress(model, RECIPE), tmp_path / "f.detent", notes={"who": evil, "data": evil})
    for command in (("inspect",), ("card",), ("card", "--markdown"), ("unpack",), ("report",)):
        result = call(*command, tmp_path / "f.detent")
        assert result.exit_code == 0, result.output
        assert not set(result.stdout + result.stderr) & set("\x1b\x07\x9b\u202e"), command
    assert "\\x1b[2J" in call("card", tmp_path / "f.detent").stdout
    assert "\x1b" not in call("inspect", tmp_path / "no\x1b[2J").stderr
    assert visible("a\nb\tc") == "a\nb\\tc"


def test_an_interrupt_exits_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "card_of_file", stop)
    result = call("card", tmp_path / "f", "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["error"].startswith("interrupted")


def test_the_current_folder_stands_in_for_no_package(folder: Path) -> None:
    Path("msgpack.py").write_text("raise SystemExit('ran')\n")
    code = "import sys; sys.path[0] = '/nowhere'; from detent.cli import app; app()"
    command = [sys.executable, "-c", code, "export", "net.detent", *ONNX, "-o", "x.onnx", "--latency", "--threads", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(dt.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "ran" not in done.stdout + done.stderr and "--threads 0" in done.stderr
    probe = "import sys; from detent.cli_work import model_of; model_of('mynet:make'); print(sys.path[-1])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", probe], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.stdout.strip() == str(folder), done.stderr


def test_python_dash_m_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "detent", "--version"], capture_output=True, text=True, timeout=300)
    assert done.stdout == f"detent {dt.__version__}\n", done.stderr


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("100kB", 10**5), ("1M", 10**6), ("7", 7)])
def test_sizes_of_shards(text: str, size: int) -> None:
    assert bytes_in(text) == size
    with pytest.raises(ValueError, match="must be a size as 5GB"):
        bytes_in(text + "x")
