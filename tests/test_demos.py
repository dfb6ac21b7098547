"""The demos of ADMM, mirror descent and kernel codebooks: their tables are what they say, their files load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import detent as dt
from detent import cli, demos
from detent.demo import DigitsNet, Settings
from detent.demos import METHODS, Comparison, compare
from detent.pack import read_header

COLUMNS = {
    "admm": ["dense", "20 %"],
    "md": ["full precision", "1 bit", "3 levels"],
    "kq": ["full precision", "W2", "W1", "16 kernels"],
    "budget": ["full precision", "3.5 kB", "8.8 kB"],
    "int8": ["full precision", "W8A8", "W2A2"],
}
LINES = {
    "admm": ["dense", "pruned one shot", "pruned in four steps", "progressive ADMM"],
    "md": ["SGD, then rounded", "straight-through", "mirror descent"],
    "kq": ["at once, no training", "learned"],
    "budget": ["trained as ever", "a width a tensor", "one step", "one step, trained"],
    "int8": ["trained as ever", "calibrated", "trained"],
}


@pytest.fixture(scope="module", params=METHODS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """One run of four epochs with a column of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demos, "_KEEPS", (0.2,))
        patch.setattr(demos, "_SHOWN_KEEP", 0.2)
        patch.setattr(demos, "_SIZES", (16,))
        patch.setattr(demos, "_SHOWN_SIZE", 16)
        patch.setattr(demos, "_BITS", (1.0, 3.0))
        patch.setattr(demos, "_WIDTHS", (8, 2))
        advanced: dict[str, int] = {}

        def watch(label: str, total: int) -> Any:
            advanced[label] = -total
            return lambda: advanced.update({label: advanced[label] + 1})

        found = compare(request.param, Settings(out=tmp_path_factory.mktemp(request.param), epochs=4), watch)
        assert len(advanced) >= (3 if request.param in ("budget", "int8") else 4) and not any(advanced.values()), (
            advanced
        )
        return found


def test_the_table_has_its_lines_and_columns(outcome: Comparison) -> None:
    assert outcome.columns == COLUMNS[outcome.method]
    assert [line.name for line in outcome.lines] == LINES[outcome.method]
    cells = [cell for line in outcome.lines for cell in line.cells.values()]
    assert all(0 <= cell.accuracy <= 100 and cell.bytes > 0 for cell in cells)
    assert all(set(line.cells) <= set(outcome.columns) for line in outcome.lines)
    whole = outcome.lines[0].cells[outcome.columns[0]]
    assert whole.accuracy > 80  # the network does learn
    assert all(cell.bytes < whole.bytes / 3 for line in outcome.lines for cell in list(line.cells.values())[1:])


def test_what_is_saved_is_what_the_method_promises(outcome: Comparison) -> None:
    model = DigitsNet(10)
    dt.load(outcome.files["model.detent"], model, "compressed")
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    if outcome.method == "admm":
        assert sum(int((w != 0).sum()) for w in weights) == round(0.2 * sum(w.numel() for w in weights))
    elif outcome.method == "md":
        assert all(len(w.unique()) == 2 and w.unique().sum() == 0 for w in weights)
    elif outcome.method == "budget":
        assert Path(outcome.files["model.detent"]).stat().st_size < 3500 + 700  # the card's notes are no part of it
        steps = {float(w[w > 0].min()) for w in weights}
        assert len(steps) == 1 or all(abs(s / min(steps) - round(s / min(steps))) < 1e-5 for s in steps)
    elif outcome.method == "int8":
        told = read_header(outcome.files["model.detent"]).card["activations"]
        assert {row["bits"] for row in told} == {8} and len(told) == len(weights)
        assert (Path(outcome.files["model.detent"]).parent / "model.onnx").exists()
        said = next(note for note in outcome.notes if note.startswith("model.onnx"))
        assert "256 of 256" in said or "255 of 256" in said, said
    else:
        inner = [w for w in weights if w.dim() == 4][1:]
        kernels = {tuple(kernel.tolist()) for w in inner for kernel in w.reshape(-1, 9)}
        assert 2 <= len(kernels) <= 16


def test_the_picture_shows_something_and_the_result_is_the_outcome(outcome: Comparison) -> None:
    picture = np.asarray(Image.open(outcome.files["weights.png"]).convert("L"))
    assert min(picture.shape) > 400
    assert 0.005 < float((picture < 160).mean()) < 0.6
    assert json.loads(Path(outcome.files["result.json"]).read_text()) == dataclasses.asdict(outcome)


def test_the_command_shows_every_number(outcome: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "compare", lambda method, settings, watch: outcome)
    result = CliRunner().invoke(cli.app, ["demo", "--method", outcome.method], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.replace("│", " ").split())
    for line in outcome.lines:
        mine = [f"{line.cells[c].accuracy:.1f}" for c in outcome.columns if c in line.cells]
        assert f"{line.name} {' '.join(mine)}" in flat
    assert all(file in result.stdout for file in outcome.files.values())
    as_json = CliRunner().invoke(cli.app, ["demo", "--method", outcome.method, "--json"])
    assert json.loads(as_json.stdout) == dataclasses.asdict(outcome)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--method", "sgd"), "--method sgd: must be one of psg, admm, md, kq"),
        (("--method", "kq", "--bits", "3"), "bits=3: is for method 'psg'"),
    ],
)
def test_a_wrong_method_is_one_sentence(tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path), *flags])
    assert result.exit_code == 2
    assert says in result.stderr and len(result.stderr.splitlines()) == 1
