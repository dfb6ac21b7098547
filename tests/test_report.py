"""The report: its numbers against numbers computed here, its page in a real browser."""

from __future__ import annotations

import copy
import functools
import html.parser
import http.server
import json
import math
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import TARGETS
from torch import Tensor, nn

import detent as dt
from detent import report as reports
from detent.pack.shown import symmetry
from detent.report import History, Report, collect, collect_file, page, run_of_file, write_html
from detent.report.page import comparison, figures, render, summary


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.flatten = nn.Flatten()
        self.middle = nn.Linear(128, 32)
        self.act = nn.ReLU()
        self.out = nn.Linear(32, 4)


RECIPE = dt.Recipe(
    [
        dt.Rule(match="conv", target=dt.Uniform(bits=3, granularity="channel"), mechanism=dt.PSG(gain=8.0)),
        dt.Rule(match="middle.weight", target=dt.TopK(keep=0.25), mechanism=dt.PSG(gain=8.0, toward=dt.Zero())),
        dt.Rule(match="out.weight", target=dt.Uniform(bits=8), mechanism=dt.PSG(gain=8.0), pinned=True),
    ]
)


def images(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(200) % 4
    x = torch.randn(200, 1, 8, 8, generator=generator) + (y.float() - 1.5)[:, None, None, None]
    return x, y


@torch.no_grad()
def scores(model: nn.Module, seed: int = 1) -> dict[str, float]:
    x, y = images(seed)
    model.eval()
    out = model(x)
    return {"accuracy": 100 * float((out.argmax(1) == y).double().mean()), "loss": float(F.cross_entropy(out, y))}


@pytest.fixture(scope="module")
def trained() -> tuple[dt.Run, History]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = dt.attach(model, optimizer, RECIPE, total_steps=30)
    history = History(run)
    x, y = images(0)
    for epoch in range(3):
        model.train()
        for i in range(0, 200, 20):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i : i + 20]), y[i : i + 20]).backward()
            optimizer.step()
        history.log(epoch=epoch)
    return run, history


@pytest.fixture(scope="module")
def report(trained: tuple[dt.Run, History]) -> Report:
    run, history = trained
    return collect(
        run,
        evaluate=scores,
        sensitivity=lambda model: {"loss": scores(model, 0)["loss"]},
        history=history,
        bits=(8, 4, 2),
        exports=[
            reports.Export(format="ONNX, INT4 weights", bytes=900, latency_ms={"1": 0.25}, reference_ms={"1": 0.2})
        ],
        notes={"data": "made up <b>here</b>", "epochs": 3},
        title="A net & more",
        evaluated_on="200 made-up images",
        sensitivity_on="200 others",
    )


# ------------------------------------------------------------------------------------------------------- the numbers


def test_layers_are_what_the_two_lives_say(trained: tuple[dt.Run, History], report: Report) -> None:
    run, _ = trained
    named = dict(run.model.named_parameters())
    with run.compressed():
        q = {name: p.detach().clone() for name, p in named.items()}
    assert [layer.name for layer in report.layers] == ["conv.weight", "middle.weight", "out.weight"]
    for layer in report.layers:
        w, places = named[layer.name].detach().double().flatten(), q[layer.name].double().flatten()
        assert layer.error == pytest.approx(float(((w - places) ** 2).sum() / (w**2).sum()))
        moved = [abs(a - b) for a, b in zip(sorted(w.tolist()), sorted(places.tolist()), strict=True)]
        assert layer.wasserstein == pytest.approx(sum(moved) / len(moved))
        assert layer.zeros == pytest.approx(sum(v == 0 for v in places.tolist()) / len(places))
        assert layer.weights == len(w) and layer.shape == tuple(named[layer.name].shape)
    conv, middle, out = report.layers
    assert (conv.weights, middle.zeros) == (72, 0.75)
    assert conv.distance is not None and 0 <= conv.distance <= 0.5 and middle.distance is None
    assert conv.bits == (8 * math.ceil(72 * 3 / 8) + 32 * 8 + 8) / 72, "codes, one scale a channel, a byte of coding"
    assert out.bits == (8 * 128 + 32 + 8) / 128
    assert all(layer.entropy <= layer.bits and layer.coded_bits > 0 for layer in report.layers)


def test_histograms_hold_every_weight_and_levels_are_the_grid(report: Report) -> None:
    for layer in report.layers:
        shown = layer.histogram
        assert shown is not None and len(shown.full) == len(shown.compressed) and len(shown.full) % 2 == 1
        assert sum(shown.compressed) == pytest.approx(1, abs=1e-4)
        assert sum(shown.full) == pytest.approx(1 - shown.outside, abs=1e-4)
    conv, middle, out = (layer.histogram for layer in report.layers)
    assert conv is not None and middle is not None and out is not None
    assert conv.unit == "steps" and set(conv.levels) <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert middle.unit == "value" and middle.levels == (), "survivors may be anywhere"
    middle_bin = len(middle.compressed) // 2
    assert middle.compressed[middle_bin] >= 0.75, "zero lies in the middle of the middle bin"
    # A level of the grid never falls on the edge between two bins.
    width = (conv.high - conv.low) / len(conv.full)
    for level in conv.levels:
        place = (level - conv.low) / width
        assert abs(place - math.floor(place) - 0.5) < 1e-3


def test_scores_and_widths_are_those_of_the_lives(trained: tuple[dt.Run, History], report: Report) -> None:
    run, _ = trained
    assert report.scores["full"] == scores(run.model)
    with run.compressed():
        assert report.scores["compressed"] == scores(run.model)
    assert [width.label for width in report.widths] == ["W8", "W4", "W2"]
    for width in report.widths:
        with run.compressed(bits=width.bits):
            assert width.scores == scores(run.model)
    sizes = [min(width.bytes.values()) for width in report.widths]
    assert sizes == sorted(sizes, reverse=True)


def test_sensitivity_is_the_loss_of_one_compressed_tensor(trained: tuple[dt.Run, History], report: Report) -> None:
    run, _ = trained
    with run.compressed():
        q = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    base = scores(run.model, 0)["loss"]
    for layer in report.layers:
        alone = copy.deepcopy(run.model)
        with torch.no_grad():
            alone.get_parameter(layer.name).copy_(q[layer.name])
        assert layer.sensitivity == pytest.approx(scores(alone, 0)["loss"] - base, abs=1e-7)
    assert any(layer.sensitivity != 0 for layer in report.layers)


def test_bytes_are_those_of_files(trained: tuple[dt.Run, History], report: Report, tmp_path: Path) -> None:
    run, _ = trained
    notes = {"data": "made up <b>here</b>", "epochs": 3}
    for coding, parts in report.sizes.parts.items():
        size = dt.save(run, tmp_path / "x.detent", "compressed", notes=notes, coding=coding)  # type: ignore[arg-type]
        assert size == parts["file"] == parts["header"] + parts["coded"] + parts["rest"]
    assert report.sizes.parts["entropy"]["file"] < report.sizes.parts["bitpacked"]["file"]
    assert report.sizes.raw == sum(t.numel() * t.element_size() for t in run.model.state_dict().values())
    weights = 72 + 128 * 32 + 128
    kept = 1024
    nominal = 72 * 3 / 8 + 128 + kept * 4 + 128 * 32 / 8  # codes of the grids, survivors, one bit a place
    fitted = 4 * (8 + 1)
    assert report.compressed_weights == weights
    blobs = 3  # a byte each says how it is coded
    assert report.bits_per_weight("bitpacked") == pytest.approx(8 * (nominal + fitted + blobs) / weights)
    without = report.bits_per_weight("bitpacked", index=False)
    assert without == pytest.approx(8 * (nominal + fitted + blobs - 128 * 32 / 8) / weights)
    assert report.bits_per_weight() < report.bits_per_weight("bitpacked")
    assert report.full_bits == 32


def test_the_run_is_as_it_was(trained: tuple[dt.Run, History]) -> None:
    """Bitwise, buffers too, and nobody's write is noticed: training goes on."""
    run, _ = trained
    before = copy.deepcopy(run.model.state_dict())
    modes = [m.training for m in run.model.modules()]
    collect(run, evaluate=lambda m: {"loss": 1.0}, sensitivity=lambda m: {"loss": 1.0})
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert modes == [m.training for m in run.model.modules()]
    assert run.measure(), "nobody's write was noticed"
    fresh = Net()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    mine = dt.attach(fresh, optimizer, RECIPE, total_steps=2)
    for _ in range(2):
        collect(mine, sensitivity=lambda m: {"loss": float(m.get_parameter("conv.weight").sum())})
        optimizer.zero_grad()
        fresh(images(0)[0]).square().mean().backward()
        optimizer.step()


def test_a_failing_evaluation_leaves_the_weights(trained: tuple[dt.Run, History]) -> None:
    run, _ = trained
    before, calls = copy.deepcopy(run.model.state_dict()), []

    def third(model: nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("no more")
        return {"loss": 0.0}

    with pytest.raises(KeyError):
        collect(run, sensitivity=third)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"evaluate": lambda m: {}}, "must give scores"),
        ({"evaluate": lambda m: 3.0}, "must give scores"),
        ({"evaluate": lambda m: {"loss": math.nan}}, "loss=nan: must be finite"),
        ({"sensitivity": lambda m: {"accuracy": 1.0}}, "must give a 'loss'"),
        ({"notes": {"a": {1, 2}}}, "not plain JSON"),
    ],
)
def test_wrong_scores_are_refused(trained: tuple[dt.Run, History], given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        collect(trained[0], **given)


def test_what_is_not_passed_is_said_and_not_invented() -> None:
    bare = collect(dt.compress(Net(), RECIPE))
    assert set(bare.absent) == {"scores", "sensitivity", "widths", "history", "exports"}
    assert bare.scores == {} and bare.widths == () and all(layer.sensitivity is None for layer in bare.layers)
    page = render(bare)
    for words in ("nothing was evaluated", "Nobody followed the training", "No sensitivity is shown", "No latency"):
        assert words in page, words
    assert "accuracy" not in dict.fromkeys(name for name, _, _ in comparison(bare))


def test_widths_need_a_width() -> None:
    run = dt.compress(Net(), dt.Recipe([dt.Rule(match=r"(conv|middle|out).weight", target=dt.Binary())]))
    assert collect(run, evaluate=lambda m: {"loss": 0.0}).widths == ()


@functools.cache
def _file_net() -> type[nn.Module]:
    class Small(nn.Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.relu = nn.ReLU()
            self.flatten = nn.Flatten()
            self.out = nn.Linear(8 * 64, 4)

    return Small


def test_the_report_of_a_file_uses_its_own_statistics(tmp_path: Path) -> None:
    """Re-estimated BatchNorm belongs to the trained width: a file's curve is the run's, there and everywhere."""
    torch.manual_seed(0)
    model = _file_net()()
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    run.recalibrate(images(3)[0].split(50))
    path = tmp_path / "x.detent"
    dt.save(run, path)
    of_run = collect(run, evaluate=scores, bits=(4, 3))
    of_file = collect_file(path, model=_file_net()(), evaluate=scores, bits=(4, 3))
    assert of_file.widths == of_run.widths and of_file.scores == of_run.scores
    assert of_file.widths[0].scores == of_file.scores["compressed"]
    again = run_of_file(path, _file_net()())
    found, known = again.statistics(), run.statistics()
    assert found is not None and known is not None and found.source == known.source == "re-estimated"
    assert all(torch.equal(value, known[name]) for name, value in found.items())
    alone = tmp_path / "alone.detent"
    dt.save(run, alone, "compressed")
    copied = tmp_path / "copied.detent"
    dt.save(run_of_file(alone, _file_net()(), "compressed"), copied, "compressed")
    assert copied.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize("name", TARGETS)
def test_a_run_of_a_file_is_the_file_whatever_a_fresh_fit_would_find(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights have moved since the fit, as in a training whose fit is frozen."""
    target = TARGETS[name]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Linear(4, 6))
    kind = r"0\.weight" if isinstance(target, dt.KernelCodebook) else r"1\.weight"
    kind = r"\.weight" if target.fits_together and not isinstance(target, dt.VectorCodebook) else kind
    run = dt.compress(model, dt.Recipe([dt.Rule(match=kind, target=target)]))
    with torch.no_grad():
        for entry in run._entries:
            entry.param.data.add_(torch.randn_like(entry.param), alpha=0.1)
    run._adopt()  # as after a step
    dt.save(run, tmp_path / "x.detent")
    expected = {name: item.decode() for name, item in run.encoded().items()}
    twin = copy.deepcopy(model)
    with monkeypatch.context() as context:
        forms = [item.form for item in run.encoded().values()]
        if target.leaves_free or any(part.role == "numbers" for form in forms for part in form.parts):
            context.setattr(type(target), "fit", None)  # nothing is fitted
        again = run_of_file(tmp_path / "x.detent", twin)
    assert all(torch.equal(item.decode(), expected[name]) for name, item in again.encoded().items())
    for mine, old in zip(again._entries, run._entries, strict=True):
        assert mine.params is not None and old.params is not None
        assert mine.target == old.target
        typical = mine.target.typical(mine.params)
        assert bool((typical > 0).all()) and typical.shape == old.target.typical(old.params).shape
        w = mine.param.detach()
        assert torch.equal(mine.target.project(w, mine.params), old.target.project(w, old.params))


def test_a_width_is_found_once(trained: tuple[dt.Run, History], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained
    calls: list[int] = []
    real = dt.Uniform.at_bits

    def counted(self: dt.Uniform, w: Tensor, params: Any, bits: int) -> Any:
        calls.append(bits)
        return real(self, w, params, bits)

    monkeypatch.setattr(dt.Uniform, "at_bits", counted)
    collect(run, evaluate=scores, bits=(4, 2))
    assert calls == [4, 2], "one convolution that is not pinned"


def test_widths_that_a_target_cannot_take_are_left_out_and_said(tmp_path: Path) -> None:
    rules = [
        dt.Rule(match="middle.weight", target=dt.PowerOfTwo(bits=4)),
        dt.Rule(match="out", target=dt.Uniform(bits=8)),
    ]
    run = dt.compress(Net(), dt.Recipe(rules))
    found = collect(run, evaluate=scores)
    assert [width.label for width in found.widths] == ["W4", "W3", "W2"] and sorted(found.unfit) == ["W6", "W8"]
    page = render(found)
    assert "Not shown: W8: PowerOfTwo(bits=4) can be 2, 3, 4, 5 bits wide" in page
    none = collect(run, evaluate=scores, bits=(8,))
    assert none.widths == () and "No curve is shown: W8: PowerOfTwo(bits=4)" in render(none)
    assert Report.from_json(none.to_json()) == none
    dt.save(run, tmp_path / "x.detent")
    assert collect_file(tmp_path / "x.detent", model=Net(), evaluate=scores).unfit == found.unfit
    for target in TARGETS.values():
        assert bool(target.widths) == target.has_bits
        w = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        for width in target.widths:
            changed, _ = target.at_bits(w, target.fit(w), width)
            assert getattr(changed, "bits", None) == width


def test_what_a_file_without_a_full_life_cannot_show_is_said_truly(tmp_path: Path) -> None:
    run = dt.compress(Net(), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    dt.save(run, tmp_path / "x.detent", "compressed")
    found = collect_file(tmp_path / "x.detent", model=Net(), evaluate=scores, sensitivity=scores)
    assert "compressed" in found.scores and found.widths == ()
    page = render(found)
    assert "no target here has a bit-width" not in page
    assert "No curve is shown: other widths are found from the full life, which the file does not hold" in page
    assert "No sensitivity is shown: it is a change against the full life, which the file does not hold" in page
    for section in ("widths", "sensitivity"):
        assert found.absent[section].startswith("a file with both lives") and "--model" not in found.absent[section]
    (score, value), *_ = found.scores["compressed"].items()
    assert f", {score} {value:.4g}" in summary(found) or f", {score} {value:.2f}" in summary(found)


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.last.weight = self.first.weight

    run = dt.compress(Tied(), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
    dt.save(run, tmp_path / "x.detent")
    assert collect(run).sizes.raw == collect_file(tmp_path / "x.detent").sizes.raw == 20 * 8 * 4


def test_a_report_survives_json(report: Report) -> None:
    text = report.to_json()
    assert Report.from_json(text) == report
    assert "NaN" not in text and "Infinity" not in text
    with pytest.raises(ValueError, match="not a report: title"):
        Report.from_json(text.replace('"title"', '"titel"'))
    with pytest.raises(ValueError, match="not a report"):
        Report.from_json("[]")


# ------------------------------------------------------------------------------------------------- history and card


def test_history_is_the_mean_of_measure_and_reads_back(tmp_path: Path) -> None:
    model = Net()
    run = dt.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), RECIPE, total_steps=9)
    history = History(run, tmp_path / "h.jsonl")
    moment = history.log(accuracy=50.0)
    rows = run.measure()
    total = sum(row["weights"] for row in rows)
    assert moment.error == pytest.approx(sum(row["error"] * row["weights"] for row in rows) / total)
    grids = [row for row in rows if not math.isnan(row["distance"])]
    assert 0 < len(grids) < len(rows)
    mean = sum(row["distance"] * row["weights"] for row in grids) / sum(row["weights"] for row in grids)
    assert moment.distance == pytest.approx(mean)
    history.log()
    assert History.read(tmp_path / "h.jsonl") == history.moments
    (tmp_path / "h.jsonl").write_text(moment.model_dump_json() + "\n{}\n")
    with pytest.raises(ValueError, match="line 2 is not a line of History"):
        History.read(tmp_path / "h.jsonl")


def test_a_training_that_diverged_has_gaps_and_still_a_report(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = dt.attach(model, optimizer, RECIPE, total_steps=9)
    history = History(run, tmp_path / "h.jsonl")
    history.log(loss=1.0)
    kept = model.out.weight.data[0, 0].clone()
    model.out.weight.data[0, 0] = math.nan
    run._adopt()  # as after a step
    assert history.log(loss=math.nan).scores == {"loss": None}
    model.out.weight.data[0, 0] = kept
    run._adopt()
    history.log(loss=math.inf)
    assert history.moments[1].error is None and history.moments[1].layers["out.weight"] is None
    assert history.moments[1].layers["conv.weight"] is not None
    moments = History.read(tmp_path / "h.jsonl")
    assert moments == history.moments
    found = collect(run, history=moments)
    assert Report.from_json(found.to_json()) == found
    page = render(found)
    assert "Gaps: there the weights were not finite" in page
    assert "Gaps" not in render(found.model_copy(update={"history": (moments[0], moments[2])}))
    with pytest.raises(ValueError, match="finite"):
        reports.Export(format="ONNX", bytes=1, latency_ms={"1": math.nan})


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (dt.Uniform(bits=4), "symmetric, with a zero"),
        (dt.Uniform(bits=4, granularity="channel"), "symmetric, with a zero"),
        (dt.Binary(), "symmetric, without a zero"),
        (dt.Ternary(), "symmetric, with a zero"),
        (dt.PowerOfTwo(bits=4), "symmetric, with a zero"),
        (dt.LearnedLevels(k=5), "not symmetric"),
        (dt.TopK(keep=0.1), "survivors stay in full precision"),
        (
            dt.SparseLevels(sparse=dt.TopK(keep=0.1), survivors=dt.Binary()),
            "survivors symmetric, without a zero; zero between",
        ),
        (
            dt.SparseLevels(sparse=dt.TopK(keep=0.1), survivors=dt.LearnedLevels(k=5)),
            "survivors not symmetric (levels of a table); zero between",
        ),
        (dt.KernelCodebook(size=4), "codewords"),
        (dt.VectorCodebook(size=4, block=2), "codewords"),
    ],
)
def test_symmetry_is_seen_from_the_levels(target: dt.Target, words: str) -> None:
    w = torch.linspace(-1.0, 2.0, 64).square().sub(0.5).reshape(2, 2, 4, 4)
    w = w if target.accepts(w.shape, w.dtype, dt.Layout(shape=tuple(w.shape))) is None else w.reshape(8, 8)
    assert symmetry(target.form(w, target.fit(w)).outline).startswith(words)


def test_the_card_says_what_is_compressed_and_what_is_not(report: Report) -> None:
    card = report.card
    assert card.compressed_weights == report.compressed_weights == sum(kind.weights for kind in card.targets)
    assert card.weights == sum(p.numel() for p in Net().parameters())
    assert card.first == f"conv.weight: {report.layers[0].becomes}" and card.last.startswith("out.weight: ")
    assert card.batchnorm == "own" and card.notes["epochs"] == 3
    left = {name for names in card.full_precision.values() for name in names}
    assert left == {"norm.weight", "norm.bias", "middle.bias", "out.bias"}
    text, table = card.text(), card.markdown()
    for words in (
        "one fit a channel",
        "symmetric",
        "training data: made up",
        "epochs: 3",
        "calibration data: not stated",
    ):
        assert words in text
    assert table.count("\n| ") == len(card.rows()) + 1 and "| epochs | 3 |" in table


# ---------------------------------------------------------------------------------------------------------- the page


class _Page(html.parser.HTMLParser):
    """What a page refers to, whether its tags are closed, and its ids."""

    empty = ("meta", "link", "br", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]
        if tag not in self.empty:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.empty:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.empty:
            assert self.open.pop() == tag, (tag, self.open)


def test_the_page_refers_to_nothing_outside(report: Report) -> None:
    page = render(report, "twin.json")
    found = _Page(page)
    outside = [link for link in found.links if not link.startswith(("#", "data:"))]
    assert outside == ["twin.json"], outside
    assert "script" not in found.tags and "img" not in found.tags and found.tags.count("svg") == 5
    assert set(re.findall(r"https?://[^\s\"']+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert re.findall(r"url\((?!#)", page) == []
    assert len(page) < 150_000


def test_the_page_shows_the_numbers_and_escapes_text(report: Report, tmp_path: Path) -> None:
    size = write_html(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert size == (tmp_path / "r.html").stat().st_size
    assert Report.from_json((tmp_path / "r.json").read_text()) == report
    for layer in report.layers:
        assert layer.name in page and figures(layer.error) in page and figures(layer.sensitivity) in page
    for width in report.widths:
        assert f"{min(width.bytes.values()):,}" in page
    assert "<b>here</b>" not in page and "made up &lt;b&gt;here" in page and "A net &amp; more" in page
    assert "0.250 ms" in page and "200 made-up images" in page


def test_text_in_pictures_is_not_rounded(report: Report) -> None:
    """Coordinates are shortened, tick labels are not: 98.25 must not read 98.2."""
    with page._styled():
        drawn = page._drawn(lambda axes: axes.set(yticks=[98.25, 98.125], yticklabels=["98.25", "98.125"]), 2.0)
    assert ">98.25<" in drawn and ">98.125<" in drawn
    assert re.findall(r'="[^"]*\d\.\d\d[^"]*"', drawn) == []


def test_a_page_is_the_same_each_time(report: Report) -> None:
    assert render(report) == render(Report.from_json(report.to_json()))


def test_page_and_twin_need_two_names(report: Report, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two names"):
        write_html(report, tmp_path / "r.json")
    write_html(report, tmp_path / "r.html", json_path=tmp_path / "numbers.json")
    assert json.loads((tmp_path / "numbers.json").read_text())["title"] == "A net & more"


def test_figures_have_significant_digits() -> None:
    assert [figures(v) for v in (0.0, 12, 123.456, 0.012345, -4.5e-7, 99999.4)] == [
        "0", "12", "123", "0.0123", "-4.50e-07", "99,999",
    ]  # fmt: skip


def test_the_summary_is_one_true_sentence(report: Report) -> None:
    text, smallest = summary(report), report.sizes.parts["entropy"]["file"]
    assert f"{smallest:,} bytes instead of {report.sizes.raw:,} bytes" in text
    assert f"accuracy {report.scores['compressed']['accuracy']:.2f} % instead of" in text


def test_many_tensors_are_not_all_drawn_but_all_told(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.report.page._MOST_PICTURES", 3)
    layer = report.layers[0]
    many = tuple(layer.model_copy(update={"name": f"l{i}", "weights": 1000 - i}) for i in range(13))
    page = render(report.model_copy(update={"layers": many, "history": (), "widths": ()}))
    assert page.count("<figure") == 3 and "the other 10 are in the table" in page
    assert all(f"l{i}<" in page for i in range(13))


# ---------------------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="session")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium on this machine, and `make test` could not install one: the page is not looked at")


class _Proxy(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_POST = do_CONNECT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


def browse(chromium: str, url: str, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """(the document as the browser has it, what it asked the network for), without the browser's own questions."""
    handler = type("Handler", (_Proxy,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        command = [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
            f"--proxy-server=http://127.0.0.1:{server.server_port}", "--proxy-bypass-list=<-loopback>",
            "--virtual-time-budget=2000", *flags, "--dump-dom", url,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        finally:
            server.shutdown()
            thread.join()
    own = re.compile(r"^(?:http://)?[\w.-]*\.google(?:apis)?\.com[:/]")
    return done.stdout, [path for path in handler.asked if not own.match(path)]


# Lays the page out at several widths and writes what it finds into the title.
_LOOK = """<!doctype html><title>none</title><body><script>
const page = %s, found = {};
function lightness(colour) {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => {
    v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [x, y] = [lightness(a), lightness(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
}
let left = 2;
for (const width of [1280, 390]) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const doc = frame.contentDocument, view = frame.contentWindow, body = doc.body;
    const paper = view.getComputedStyle(body).backgroundColor;
    const words = [...doc.querySelectorAll("h1,h2,h3,p,th,td,small,figcaption,footer,svg text")];
    const worst = Math.min(...words.map(e => {
      const s = view.getComputedStyle(e);
      return contrast(e.namespaceURI.endsWith("svg") ? s.fill : s.color, paper); }));
    const sizes = [...doc.querySelectorAll("svg")].map(e => {
      const t = e.querySelector("text"), scale = e.getBoundingClientRect().width / e.viewBox.baseVal.width;
      return t ? parseFloat(view.getComputedStyle(t).fontSize) * scale : 99; });
    found[width] = {
      wide: doc.documentElement.scrollWidth, paper, worst, smallest: Math.min(...sizes), words: words.length,
      scrolling: [...doc.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
      columns: view.getComputedStyle(doc.querySelector(".pictures")).gridTemplateColumns.split(" ").length,
      dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    };
    if (--left === 0) document.title = JSON.stringify(found);
  };
  document.body.append(frame);
  frame.srcdoc = page;
}
</script>"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_on_a_desk_and_on_a_phone(
    chromium: str, report: Report, tmp_path: Path, scheme: str
) -> None:
    look = tmp_path / "look.html"
    look.write_text(_LOOK % json.dumps(render(report, "r.json")).replace("</", "<\\/"), encoding="utf-8")
    flag = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    dom, asked = browse(chromium, look.as_uri(), tmp_path, flag)
    assert asked == []
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    found = json.loads(title[1].replace("&quot;", '"'))
    desk, phone = found["1280"], found["390"]
    for view, width in ((desk, 1280), (phone, 390)):
        assert view["wide"] <= width, "the page scrolls sideways"
        assert view["worst"] >= 4.5, "WCAG AA for text"
        assert view["smallest"] >= 7.5 and view["words"] > 100
        assert view["dark"] == (scheme == "dark")
    assert desk["columns"] >= 3 and phone["columns"] == 1
    assert 1 <= phone["scrolling"] <= 2, "the widest tables scroll in boxes of their own, the others fit"
    light = sum(int(v) for v in re.findall(r"\d+", desk["paper"])[:3]) > 384
    assert light == (scheme == "light")


def test_the_page_asks_the_network_for_nothing(chromium: str, report: Report, tmp_path: Path) -> None:
    write_html(report, tmp_path / "r.html")
    dom, asked = browse(chromium, (tmp_path / "r.html").as_uri(), tmp_path)
    assert asked == [] and "Layer by layer" in dom
    (tmp_path / "bad.html").write_text('<img src="http://example.org/a.png">')
    _, asked = browse(chromium, (tmp_path / "bad.html").as_uri(), tmp_path)
    assert asked == ["http://example.org/a.png"], "the check would find one"
