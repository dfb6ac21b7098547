"""A stranger's target and mechanism, word for word as docs/extending.md has them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import detent as dt
from detent import pack
from detent.report import collect_file, run_of_file
from detent.specs import from_spec, to_spec
from detent.targets import Held

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules of the page."""
    folder = tmp_path_factory.mktemp("elsewhere")
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", page, re.DOTALL))
    assert set(blocks) == {"loggrid.py", "drift.py", "check.py", "recipe.yaml"}
    for name, text in blocks.items():
        (folder / name).write_text(text)
    return folder


def process(folder: Path, *command: str, fails: bool = False) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_both_keep_the_laws(folder: Path) -> None:
    process(folder, "check.py")


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    """A file of the stranger's target, and what its author saw."""
    code = """
import torch, drift, loggrid, detent as dt
from safetensors.torch import save_file
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
recipe = dt.Recipe.from_yaml(open("recipe.yaml").read())
assert dt.Recipe.from_yaml(recipe.to_yaml()).to_yaml() == recipe.to_yaml() and "loggrid:LogGrid" in recipe.to_yaml()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = dt.attach(model, optimizer, recipe, total_steps=5)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
dt.save(run, "x.detent")
save_file(dict(model.state_dict()), "full.safetensors")
with run.compressed():
    save_file({name: p.detach().clone() for name, p in model.state_dict().items()}, "compressed.safetensors")
"""
    process(folder, "-c", code)
    return folder / "x.detent"


def twin() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))


@pytest.mark.parametrize("life", ["full", "compressed"])
def test_its_file_opens_where_it_was_never_heard_of(written: Path, life: str) -> None:
    assert "loggrid" not in sys.modules
    wanted, model = load_file(written.with_name(f"{life}.safetensors")), twin()
    dt.load(written, model, life)  # type: ignore[arg-type]
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    dt.unpack(written, written.with_name("plain.safetensors"), life)  # type: ignore[arg-type]
    plain = load_file(written.with_name("plain.safetensors"))
    assert all(torch.equal(plain[name], value) for name, value in wanted.items())


def test_its_file_is_inspected_reported_and_exported_like_ours(written: Path) -> None:
    row = next(row for row in pack.inspect(written).rows if row["name"] == "0.weight")
    assert row["becomes"] == "LogGrid(count=3)" and row["nominal_bits"] == 3 * 16 * 12 and row["error"] > 0
    header = pack.read_header(written)
    assert header.plan[0]["mechanism"] == "Drift(rate=0.2)"
    assert header.card["compressed"][0]["granularity"] == "channel"
    report = collect_file(written)
    assert report.layers[0].becomes == "LogGrid(count=3)"
    model = twin()
    run = run_of_file(written, model)
    assert all(isinstance(item.target, Held) for item in run.encoded().values())
    wanted = load_file(written.with_name("compressed.safetensors"))
    with run.compressed():
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no rule of this recipe has an unpinned target with a bit-width"):
        run.encoded(bits=2)
    dt.save(run, written.with_name("again.detent"))
    again = pack.read_header(written.with_name("again.detent"))
    assert again.tensors["0.weight"]["becomes"] == "LogGrid(count=3)"


def test_it_is_a_table_in_onnx(written: Path) -> None:
    pytest.importorskip("onnxruntime")
    from detent.export import to_onnx

    run = run_of_file(written, twin())
    rows = {row.name: row for row in to_onnx(run, written.with_name("x.onnx"), torch.randn(2, 16)).tensors}
    assert rows["0.weight"].form == "table UINT4" and rows["0.weight"].target == "LogGrid(count=3)"


def test_the_command_line_imports_only_what_it_is_told_to(folder: Path) -> None:
    save_file({"fc.weight": torch.randn(8, 8)}, folder / "w.safetensors")
    compress = ["compress", "w.safetensors", "-r", "recipe.yaml", "-o", "w.detent"]
    said = process(folder, "-m", "detent", *compress, fails=True)
    assert "unknown kind 'loggrid:LogGrid'" in said and "detent --import loggrid" in said
    process(folder, "-m", "detent", "--import", "loggrid", "--import", "drift", *compress)
    rows = json.loads(process(folder, "-m", "detent", "inspect", "w.detent", "--json"))
    assert "LogGrid(count=3)" in json.dumps(rows)
    assert "No module named 'nothere'" in process(folder, "-m", "detent", "--import", "nothere", *compress, fails=True)


def test_a_cell_that_runs_again_replaces_its_class_and_namesakes_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "notebook", types.ModuleType("notebook"))
    cell = """
from dataclasses import dataclass
import detent as dt
@dataclass(frozen=True, kw_only=True)
class Uniform(dt.Schedule):
    speed: float = {default}
    def __call__(self, step, total_steps=None):
        return self.speed
"""
    first: dict[str, object] = {"__name__": "notebook"}
    exec(cell.format(default=1.0), first)
    second: dict[str, object] = {"__name__": "notebook"}
    exec(cell.format(default=2.0), second)
    old, new = first["Uniform"], second["Uniform"]
    assert to_spec(new()) == {"kind": "notebook:Uniform"}  # type: ignore[operator]
    assert type(from_spec({"kind": "notebook:Uniform"})) is new is not old
    assert from_spec({"kind": "Uniform", "bits": 3}) == dt.Uniform(bits=3), "a namesake is not taken for ours"
