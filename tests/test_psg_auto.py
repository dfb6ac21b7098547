"""The script that shows PSG with nothing said: a tiny run of it, its arithmetic, and what it may not look at."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import detent as dt
from papers.psg import auto

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install detent[demo]")


@pytest.fixture(autouse=True)
def _keep_torch_settings() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_a_tiny_run_writes_a_record_and_a_second_one_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tuple(s for s in auto.TASKS["digits"].settings if s.optimizer == "AdamW")
    monkeypatch.setitem(auto.TASKS, "digits", dataclasses.replace(auto.TASKS["digits"], settings=few))
    app = typer.Typer()
    app.command()(auto.main)
    asked = ["digits", "--seed", "0", "--steps", "6", "--out", str(tmp_path / "out"), "--records", str(tmp_path)]
    assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0
    record = json.loads((tmp_path / "psg-auto-digits.json").read_text())
    rows = record["results"]["rows"]
    assert len(rows) == len(few) * (3 + 3 + 1) == len(record["results"]["summary"])
    assert all(0 <= row[life]["accuracy"] <= 100 for row in rows for life in ("full", "data_free"))
    monkeypatch.setattr(auto, "train_one", lambda *_: pytest.fail("trained again"))
    assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0


def test_what_is_measured_on_is_never_trained_on() -> None:
    task = auto.TASKS["digits"]
    examples = auto.Examples.of(task, 1, None, Path())
    mine, rest = (part[0].flatten(1) for part in (examples.train, examples.held_out))
    assert (len(mine), len(rest)) == (task.train, task.held_out)
    assert not bool((torch.cdist(mine.double(), rest.double()) == 0).all(1).any())
    known = {tuple(row) for row in mine.tolist()}
    for x, _ in examples.batches(task, 1, 20):
        assert all(tuple(row) in known for row in x.flatten(1).tolist())


def test_text_is_cut_into_what_comes_next() -> None:
    text = torch.arange(300)
    examples = auto.Examples(train=(text[:200], text[:200]), held_out=(text[200:], text[200:]), length=8)
    task = dataclasses.replace(auto.TASKS["chars"], batch=4)
    for x, y in examples.batches(task, 0, 50):
        assert x.shape == y.shape == (4, 8) and torch.equal(x + 1, y) and int(y.max()) < 200

    class Next(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x + 1, 300).float() * 100

    assert examples.measure(Next())["accuracy"] == 100


def _row(variant: str, seed: int, full: float, free: float, diverged: bool = False) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": "s", "variant": variant, "bits": 3, "seed": seed, "diverged": diverged}
    if not diverged:
        row |= {name: {"accuracy": value, "loss": 0.0} for name, value in (("full", full), ("data_free", free))}
    return row


def test_differences_are_paired_and_what_diverged_is_counted() -> None:
    rows = [_row("plain", seed, 90.0 + seed, 70.0) for seed in (0, 1)] + [_row("plain", 2, 0, 0, diverged=True)]
    rows += [_row("auto", 0, 89.0, 88.5), _row("auto", 1, 0, 0, diverged=True), _row("auto", 2, 80.0, 80.0)]
    entry = next(e for e in auto.summarise_rows(rows) if e["variant"] == "auto")
    assert (entry["seeds"], entry["diverged"]) == ([0, 1], 1)
    assert entry["accuracy"]["full_minus_plain"]["values"] == [-1.0]
    assert entry["accuracy"]["data_free_minus_full"]["values"] == [-0.5]


def test_the_one_in_question_is_the_default_and_the_old_one_is_spelt_out() -> None:
    assert auto.mechanism_of("auto") == dt.PSG() and auto.mechanism_of("plain") is None
    old = auto.mechanism_of("gain 8")
    assert isinstance(old, dt.PSG) and (old.gain, old.strength, old.start, old.clip_start) == (8.0, 1.0, 0.0, 0.0)
