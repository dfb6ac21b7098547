"""The demos of the other three systems: the same small network, and what each idea buys on it."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from detent.activations import Activation
from detent.budget import allocate
from detent.compression import compress
from detent.demo import Bench, Cell, Settings, Watch, pyplot, threads
from detent.engine import Run
from detent.export import to_onnx
from detent.export.latency import alternating
from detent.export.onnx import session
from detent.mechanisms import ADMM, STE, CodebookLearning, Masked, Mechanism, MirrorDescent
from detent.pack import save
from detent.quantizers import LearnedStep
from detent.recipe import Recipe, Rule, Stage
from detent.targets import Binary, KernelCodebook, Target, Ternary, TopK, Uniform

__all__ = ["METHODS", "Comparison", "Line", "Method", "compare"]

Method = Literal["admm", "md", "kq", "budget", "int8"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: a way of compressing, and what came of it in each column.

    Attributes:
        name: how the network was trained and compressed.
        cells: by column; a column that means nothing for it is left out.
    """

    name: str
    cells: dict[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything a demo found out.

    Attributes:
        method: which system.
        title: what the table shows.
        columns: in order.
        lines: the table.
        setup: data, network and training, alike for all networks.
        notes: what a reader must know to judge the table.
        files: what was written, by what it is.
        seconds: wall time, with reading the data.
    """

    method: str
    title: str
    columns: list[str]
    lines: list[Line]
    setup: dict[str, Any]
    notes: list[str]
    files: dict[str, str]
    seconds: float


@dataclass(kw_only=True)
class _Found:
    """What one demo hands back to `compare`."""

    title: str
    columns: list[str]
    lines: list[Line]
    notes: list[str]
    run: Run  # whose compressed life goes into model.detent
    draw: Callable[[Path], None]


def compare(method: Method, settings: Settings, watch: Watch) -> Comparison:
    """Train and measure for one system, and leave model.detent, weights.png and result.json in `settings.out`.

    No epoch or network is chosen by the test split: the last epoch counts. The picture of mirror descent follows it
    along, after every epoch.

    Args:
        method: "admm" (progressive pruning), "md" (mirror descent to one and two bits), "kq" (kernel codebooks) or
            "budget" (accuracy by bytes of the file), "int8" (weights and activations of few bits).
        settings: what to do; `bits` belongs to PSG's demo alone.
        watch: called with a label and a number of steps when a training starts; what it returns is called each step.

    Raises:
        ValueError: an unknown method, `bits`, a data folder that holds no image set, or images of a shape the demo has
            no network for.
        ImportError: an extra that is not installed.
        OSError: the output folder cannot be written.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of psg, {', '.join(METHODS)}")
    if settings.bits is not None:
        raise ValueError(f"bits={settings.bits}: is for method 'psg'; {method!r} has its own columns")
    began = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, watch)
    files = {name: str(settings.out / name) for name in ("model.detent", "weights.png", "result.json")}
    with threads(bench.task.one_thread):
        found = METHODS[method](bench)
        notes = bench.notes() | {"made by": f"detent demo --method {method}"}
        save(found.run, Path(files["model.detent"]), "compressed", notes=notes)
        found.draw(Path(files["weights.png"]))
        files |= bench.report(found.run, f"{type(found.run.model).__name__}, detent demo --method {method}")
        setup = bench.setup(found.run.model)
    outcome = Comparison(
        method=method,
        title=found.title,
        columns=found.columns,
        lines=found.lines,
        setup={k: setup[k] for k in _SETUP},
        notes=found.notes,
        files=files,
        seconds=time.perf_counter() - began,
    )
    Path(files["result.json"]).write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
    return outcome


_SETUP = (
    *("data", "train_images", "test_images", "network", "parameters", "batchnorm"),
    *("epochs", "batch_size", "seed", "device", "threads"),
)


def _everywhere(target: Target, mechanism: Mechanism | None = None) -> Recipe:
    return Recipe([Rule(match=r"weight$", target=target, mechanism=mechanism)])


def _full(bench: Bench, model: nn.Module) -> Cell:
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return Cell(accuracy=bench.accuracy(model), bytes=size)


def _kept(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# --- progressive ADMM ---------------------------------------------------------------------------------------------

_KEEPS = (0.10, 0.05, 0.02)
_SHOWN_KEEP = 0.05
_STEPS_OF_PRUNING = 4


def _pruned_to(keep: float) -> TopK:
    return TopK(keep=keep, scope="model")


def _rule(keep: float, mechanism: Mechanism) -> Rule:
    return Rule(match=r"weight$", target=_pruned_to(keep), mechanism=mechanism)


def _one_shot(keep: float) -> Recipe:
    return Recipe([_rule(keep, Masked())])


def _iterative(keep: float) -> Recipe:
    shares = [keep ** ((i + 1) / _STEPS_OF_PRUNING) for i in range(_STEPS_OF_PRUNING)]
    return Recipe(stages=[Stage(share=1 / _STEPS_OF_PRUNING, rules=[_rule(each, Masked())]) for each in shares])


def _progressive(keep: float) -> Recipe:
    # The paper's two steps: an easier rate first, then the survivors again.
    return Recipe(
        stages=[
            Stage(name="first", share=0.5, rules=[_rule(2 * keep, ADMM(rho=0.01, growth=1.2, every=0.1, until=0.8))]),
            Stage(name="second", share=0.5, rules=[_rule(keep, ADMM(rho=0.01, growth=1.2, every=0.1, until=0.5))]),
        ]
    )


def _admm(bench: Bench) -> _Found:
    decay, epochs = bench.task.decay, max(1, round(0.5 * bench.epochs))
    dense, _ = bench.train("dense", None, decay)
    start = _kept(dense)
    lines = [Line(name="dense", cells={"dense": _full(bench, dense)})]
    ways = {"one shot": _one_shot, "in four steps": _iterative, "progressive ADMM": _progressive}
    history: list[tuple[float, list[Tensor]]] = []
    shown: Run | None = None
    for name, recipe_of in ways.items():
        cells = {}
        for keep in _KEEPS:
            is_shown = name == "progressive ADMM" and keep == _SHOWN_KEEP

            def look(epoch: int, model: nn.Module, run: Run | None, wanted: bool = is_shown) -> None:
                if wanted and run is not None:
                    history.append((_distance(run), [p.detach().clone() for p in _weights(model)]))

            label = f"{name}, keep {100 * keep:g} %"
            _, run = bench.train(label, recipe_of(keep), decay, epochs=epochs, start=start, look=look)
            assert run is not None
            cells[f"{100 * keep:g} %"] = bench.cell(run)
            shown = run if is_shown else shown
        lines.append(Line(name=f"pruned {name}" if "ADMM" not in name else name, cells=cells))
    assert shown is not None
    notes = [
        "All weights of convolutions and the linear layer, the first and the last too, one budget for the network. "
        f"Same dense start, and {epochs} further epochs for every cell; zeros never come back.",
        "one shot: the smallest go at once, the rest trains on. In four steps: a share at a time, training between. "
        "Progressive ADMM: weights are pulled apart by a penalty before any is cut, in two stages.",
    ]
    first = [p.detach() for name, p in dense.named_parameters() if name.endswith("weight") and p.dim() > 1]
    draw = functools.partial(_draw_admm, first, history, shown)
    columns = ["dense", *(f"{100 * keep:g} %" for keep in _KEEPS)]
    title = "Accuracy in % by share of weights that are left"
    return _Found(title=title, columns=columns, lines=lines, notes=notes, run=shown, draw=draw)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith("weight") and p.dim() > 1]


def _distance(run: Run) -> float:
    """|w - project(w)| / |w| over all claimed weights."""
    rows = run.measure()
    energy = {name: float(p.detach().double().square().sum()) for name, p in run.model.named_parameters()}
    total = sum(energy[row["name"]] for row in rows)
    return (sum(row["error"] * energy[row["name"]] for row in rows) / total) ** 0.5


def _draw_admm(dense: list[Tensor], history: list[tuple[float, list[Tensor]]], run: Run, path: Path) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), dpi=130, layout="constrained")
    last = max(i for i, (gap, _) in enumerate(history) if gap > 0)
    edges = torch.linspace(-5, 0.5, 67)
    for tensors, color, label in (
        (dense, "tab:orange", "dense"),
        (history[last][1], "tab:blue", "ADMM, before the cut"),
    ):
        size = torch.cat([t.reshape(-1).abs() for t in tensors])
        size = size[size > 0].log10().clamp(-5, 0.5)
        share = torch.histc(size, len(edges) - 1, -5, 0.5) / sum(t.numel() for t in tensors) * 100
        left.stairs(share.numpy(), edges.numpy(), fill=True, alpha=0.55, color=color, label=label)
    left.set(xlabel="size of a weight, power of ten", ylabel="% of all weights")
    left.set_title("ADMM parts the weights that go from those that stay")
    left.legend(frameon=False)
    right.plot(range(len(history)), [100 * gap for gap, _ in history], "o-", color="tab:blue")
    right.set(xlabel="epoch", ylabel="% of the weights' norm that the cut would take", ylim=(0, None))
    right.set_title(f"Keeping {100 * _SHOWN_KEEP:g} %: the cut costs less and less")
    figure.savefig(path)
    plt.close(figure)


# --- mirror descent -----------------------------------------------------------------------------------------------

_RATE = 1e-2  # of Adam
_MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def _md(bench: Bench) -> _Found:
    adam = torch.optim.Adam
    dense, _ = bench.train("full precision", None, bench.task.decay)
    sets: dict[str, Target] = {"1 bit": Binary(), "3 levels": Ternary()}
    mechanisms: dict[str, Callable[[Target], Mechanism]] = {
        "straight-through": lambda target: STE(),
        "mirror descent": lambda target: MirrorDescent(map="tanh" if isinstance(target, Binary) else "softmax"),
    }
    rounded = {name: bench.cell(compress(dense, _everywhere(target))) for name, target in sets.items()}
    lines = [Line(name="SGD, then rounded", cells={"full precision": _full(bench, dense), **rounded})]
    history: list[tuple[float, float, Tensor]] = []
    shown: Run | None = None
    for name, mechanism_of in mechanisms.items():
        cells = {}
        for column, target in sets.items():
            is_shown = name == "mirror descent" and column == "1 bit"

            def look(epoch: int, model: nn.Module, run: Run | None, wanted: bool = is_shown) -> None:
                if wanted and run is not None:
                    with run.compressed():
                        hard = bench.accuracy(model)
                    largest = max(_weights(model), key=lambda p: p.numel()).detach()
                    history.append((bench.accuracy(model), hard, largest / largest.abs().amax()))

            recipe = _everywhere(target, mechanism_of(target))
            _, run = bench.train(f"{name}, {column}", recipe, 0.0, rate=_RATE, make=adam, look=look)
            assert run is not None
            cells[column] = bench.cell(run)
            shown = run if is_shown else shown
        lines.append(Line(name=name, cells=cells))
    assert shown is not None
    notes = [
        "Every convolution and linear weight, first and last layer too; 1 bit: -a or a, 3 levels: -a, 0, a, one "
        "number a for a tensor.",
        f"{bench.epochs} epochs from the same random start. Full precision by SGD; the others by Adam at {_RATE:g} "
        "without weight decay, chosen on held-out training images for both alike.",
    ]
    columns = ["full precision", *sets]
    draw = functools.partial(_draw_md, history)
    title = "Accuracy in % of networks whose weights have one bit, or three levels"
    return _Found(title=title, columns=columns, lines=lines, notes=notes, run=shown, draw=draw)


def _draw_md(history: list[tuple[float, float, Tensor]], path: Path) -> None:
    plt = pyplot()
    figure = plt.figure(figsize=(9.6, 5.4), dpi=130, layout="constrained")
    figure.suptitle("Mirror descent: the weights the network sees harden while it trains", fontsize=11)
    grid = figure.add_gridspec(2, len(_MOMENTS))
    last = len(history) - 1
    for column, moment in enumerate(_MOMENTS):
        epoch = round(moment * last)
        axes = figure.add_subplot(grid[0, column])
        share = torch.histc(history[epoch][2].float(), 41, -1.0, 1.0) / history[epoch][2].numel() * 100
        axes.stairs(share.numpy(), torch.linspace(-1, 1, 42).numpy(), fill=True, color="0.35")
        axes.set(title=f"epoch {epoch}", xlabel="weight / a", ylim=(0, 60))
        axes.set_ylabel("% of the largest layer" if not column else "")
    axes = figure.add_subplot(grid[1, :])
    axes.plot(
        range(last + 1), [soft for soft, _, _ in history], "-", color="tab:blue", label="as the network is trained"
    )
    axes.plot(range(last + 1), [hard for _, hard, _ in history], "--", color="tab:orange", label="rounded to one bit")
    axes.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(0, 101))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)
    plt.close(figure)


# --- kernel codebooks ---------------------------------------------------------------------------------------------

_SIZES = (128, 32, 8)
_SHOWN_SIZE = 32


def _codebook(size: int, mechanism: Mechanism | None) -> Recipe:
    ends = STE() if mechanism is not None else None
    kernels = KernelCodebook(size=size, book="global", codebook_bits=6)
    return Recipe(
        [
            Rule(match="@first", target=Uniform(bits=8), mechanism=ends),
            Rule(match="@kernels", target=kernels, mechanism=mechanism),
            Rule(match=r"weight$", target=Uniform(bits=8), mechanism=ends),
        ]
    )


def _grid(bits: int, mechanism: Mechanism | None) -> Recipe:
    levels: Target = Binary() if bits == 1 else Uniform(bits=bits)
    return Recipe(
        [
            Rule(match="@first", target=Uniform(bits=8), mechanism=mechanism),
            Rule(match="@kernels", target=levels, mechanism=mechanism),
            Rule(match=r"weight$", target=Uniform(bits=8), mechanism=mechanism),
        ]
    )


def _kq(bench: Bench) -> _Found:
    decay, epochs = bench.task.decay, max(1, round(0.4 * bench.epochs))
    dense, _ = bench.train("full precision", None, decay)
    start = _kept(dense)
    ways: dict[str, tuple[Recipe, Recipe]] = {
        **{f"W{bits}": (_grid(bits, None), _grid(bits, STE())) for bits in (2, 1)},
        **{f"{size} kernels": (_codebook(size, None), _codebook(size, CodebookLearning())) for size in _SIZES},
    }
    at_once, learned = {}, {}
    shown: Run | None = None
    widths: dict[str, float] = {}
    for column, (plain, trained) in ways.items():
        run = compress(dense, plain)
        at_once[column] = bench.cell(run)
        widths[column] = _bits(run)
        _, run = bench.train(
            f"learning, {column}", trained, decay, epochs=epochs, start=start, rate=0.1 * bench.task.rate
        )
        assert run is not None
        learned[column] = bench.cell(run)
        shown = run if column == f"{_SHOWN_SIZE} kernels" else shown
    assert shown is not None
    lines = [
        Line(name="at once, no training", cells={"full precision": _full(bench, dense), **at_once}),
        Line(name="learned", cells=learned),
    ]
    price = ", ".join(f"{column} {bits:.2f}" for column, bits in widths.items())
    notes = [
        "W2, W1: each weight on a grid of its own, one step a tensor. Kernels: every kernel of every convolution is "
        "one of so many, shared by the network. In every column the first convolution and what is none have 8 bits.",
        f"Bits a weight without those, index and codebook counted: {price}.",
        f"learned: {epochs} further epochs from the same network, the codewords by their own gradient, the grids by "
        "the straight-through estimator, at the same rate.",
    ]
    columns = ["full precision", *ways]
    title = "Accuracy in % with kernels from a codebook, beside weights on a grid"
    draw = functools.partial(_draw_kq, shown)
    return _Found(title=title, columns=columns, lines=lines, notes=notes, run=shown, draw=draw)


def _bits(run: Run) -> float:
    """Bits a weight of the layers that are not at 8 bits, with what tensors share counted once."""
    forms = [
        item.form for item in run.encoded().values() if not isinstance(item.target, Uniform) or item.target.bits < 8
    ]
    weights = sum(form.layout.numel for form in forms)
    return 8 * (sum(form.nbytes for form in forms) + forms[0].shared_nbytes) / weights


def _draw_kq(run: Run, path: Path) -> None:
    plt = pyplot()
    coded = {name: item for name, item in run.encoded().items() if isinstance(item.target, KernelCodebook)}
    shape = next(iter(coded.values())).form.layout.shape[2:]  # one kernel size in all networks of the demo
    kernels = torch.cat([item.decode().reshape(-1, math.prod(shape)) for item in coded.values()])
    book, uses = kernels.unique(dim=0, return_counts=True)
    order = uses.argsort(descending=True)
    side = 8
    figure = plt.figure(figsize=(9.6, 4.6), dpi=130, layout="constrained")
    figure.suptitle(
        f"{len(kernels):,} kernels of {len(coded)} layers, and the {len(book)} that they may be", fontsize=11
    )
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    tiles = left.subplots(-(-len(book) // side), side)
    limit = float(book.abs().quantile(0.99))  # one strong codeword must not pale the others
    for axes, index in zip(tiles.reshape(-1), [*order.tolist(), *[None] * (tiles.size - len(book))], strict=True):
        axes.axis("off")
        if index is not None:
            axes.imshow(book[index].reshape(shape).numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
            axes.set_title(f"{int(uses[index])}x", fontsize=7)
    axes = right.subplots()
    axes.bar(range(len(book)), uses[order].numpy(), color="0.35")
    axes.set(xlabel="codeword, by use", ylabel="kernels that are this one")
    figure.savefig(path)
    plt.close(figure)


# --- a budget in bytes --------------------------------------------------------------------------------------------

_BITS = (0.5, 0.75, 1.0, 2.0, 3.0)  # of the file for each parameter of the network: the budgets
_SHOWN_BITS = 1.0


def _budget(bench: Bench) -> _Found:
    decay, epochs = bench.task.decay, max(1, round(0.5 * bench.epochs))
    dense, _ = bench.train("full precision", None, decay)
    start, full = _kept(dense), _full(bench, dense)
    numbers = sum(p.numel() for p in dense.parameters())
    # Whole hundreds of bytes, for everything that is in the file.
    budgets = [100 * round(bits * numbers / 800 + 8) for bits in _BITS]
    columns = {f"{budget / 1000:g} kB": budget for budget in budgets}
    shown_in = list(columns)[_BITS.index(_SHOWN_BITS)]
    lines = {
        "a width a tensor": dict[str, Cell](),
        "one step": dict[str, Cell](),
        "one step, trained": dict[str, Cell](),
    }
    shown: Run | None = None
    for column, budget in columns.items():
        with contextlib.suppress(ValueError):  # 2 bits a weight are the least that widths take
            recipe = allocate(dense, budget, choices="widths")
            lines["a width a tensor"][column] = bench.cell(compress(dense, recipe), budget=budget)
        lines["one step"][column] = bench.cell(compress(dense, allocate(dense, budget)), budget=budget)
        pull = allocate(dense, budget, mechanism=STE())
        rate = 0.3 * bench.task.rate
        _, run = bench.train(f"training for {column}", pull, decay, epochs=epochs, start=start, rate=rate)
        assert run is not None
        last = allocate(run, budget)
        lines["one step, trained"][column] = bench.cell(run, recipe=last, budget=budget)
        if column == shown_in:
            with run.latents():
                trained = copy.deepcopy(run.model)
            shown = compress(trained, last)
    assert shown is not None
    found = [Line(name=name, cells=cells) for name, cells in lines.items()]
    best = max((line.cells[shown_in].accuracy, line.name) for line in found if shown_in in line.cells)
    notes = [
        f"What fits in {shown_in}: {best[1]}, {best[0]:.1f} % right; full precision has {full.accuracy:.1f} % in "
        f"{full.bytes / 1000:.1f} kB.",
        "Bytes of the whole file: codes, biases, normalisation, header. A width a tensor: 2 to 8 bits a weight, as "
        "hardware wants it; the bytes are those that squared error is worth most in. One step: the same step for all "
        "weights, with as many levels as it takes, as entropy coding makes unused levels free. Neither needs data.",
        f"trained: {epochs} further epochs with the rate held by the straight-through estimator.",
    ]
    draw = functools.partial(_draw_budget, full, found)
    title = "Accuracy in % by bytes of the whole file"
    table = [Line(name="trained as ever", cells={"full precision": full}), *found]
    return _Found(title=title, columns=["full precision", *columns], lines=table, notes=notes, run=shown, draw=draw)


def _draw_budget(full: Cell, lines: Sequence[Line], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.4), dpi=130, layout="constrained")
    for line, color in zip(lines, ("tab:orange", "tab:blue", "tab:green"), strict=True):
        cells = sorted(line.cells.values(), key=lambda cell: cell.bytes)
        axes.plot([c.bytes / 1000 for c in cells], [c.accuracy for c in cells], "o-", label=line.name, color=color)
    axes.axhline(full.accuracy, color="0.4", linestyle="--", label=f"full precision, {full.bytes / 1000:.0f} kB")
    axes.set(xlabel="kilobytes of the whole file", ylabel="% right", title="What a byte buys")
    axes.legend(loc="lower right")
    figure.savefig(path)
    plt.close(figure)


# --- integers for weights and activations ---------------------------------------------------------------------------

_WIDTHS = (8, 4, 2)
_ROUNDS = 9  # of timing
_SEEN = 256  # training images that ranges are found on without training


def _both_of(bits: int, mechanism: Mechanism | None) -> Recipe:
    """Weights a channel and inputs of layers of this width; the first and the last layer of 8 bits."""
    ends = [
        Rule(match=end, target=Uniform(bits=8, granularity="channel"), mechanism=mechanism)
        for end in ("@first", "@last")
    ]
    inner = Rule(match="@weights", target=Uniform(bits=bits, granularity="channel"), mechanism=mechanism)
    eight = [Activation(match=end, quantizer=LearnedStep(bits=8)) for end in ("@first", "@last")]
    return Recipe([*ends, inner], activations=[*eight, Activation(quantizer=LearnedStep(bits=bits))])


def _int8(bench: Bench) -> _Found:
    decay, epochs = bench.task.decay, max(1, round(0.5 * bench.epochs))
    dense, _ = bench.train("full precision", None, decay)
    start, full = _kept(dense), _full(bench, dense)
    calibrated, trained = dict[str, Cell](), dict[str, Cell]()
    runs: dict[str, Run] = {}
    for bits in _WIDTHS:
        column = f"W{bits}A{bits}"
        found = compress(dense, _both_of(bits, None))
        found.observe(bench.inputs(_SEEN))
        calibrated[column] = bench.cell(found)
        rate = 0.3 * bench.task.rate
        pull = _both_of(bits, STE())
        _, run = bench.train(f"training at {column}", pull, decay, epochs=epochs, start=start, rate=rate)
        assert run is not None
        trained[column], runs[column] = bench.cell(run), run
    shown = f"W{_WIDTHS[0]}A{_WIDTHS[0]}"
    notes = [
        "W4A4: weights and what goes into layers on 16 integers each; the first and the last layer on 256. Calibrated: "
        f"scales found on {_SEEN} training images. Trained: {epochs} further epochs, scales learned with the weights.",
        "Bytes of the whole file, scales of activations included.",
        _in_onnx(bench, runs[shown], shown),
    ]
    draw = functools.partial(_draw_widths, full, {"calibrated": calibrated, "trained": trained})
    lines = [
        Line(name="trained as ever", cells={"full precision": full}),
        Line(name="calibrated", cells=calibrated),
        Line(name="trained", cells=trained),
    ]
    title = "Accuracy in % with weights and activations as integers"
    columns = ["full precision", *calibrated]
    return _Found(title=title, columns=columns, lines=lines, notes=notes, run=runs[shown], draw=draw)


def _in_onnx(bench: Bench, run: Run, column: str) -> str:
    """Write model.onnx, and say what ONNX Runtime makes of it."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        return "No model.onnx: that needs pip install 'detent[export]'."
    file, x = bench.settings.out / "model.onnx", bench.inputs(256)[0]
    report = to_onnx(run, file, x)
    running = session(str(file), optimize=True)
    feeds = {running.get_inputs()[0].name: x.cpu().numpy()}
    with run.compressed(), torch.no_grad():
        took = alternating({"PyTorch": lambda: run.model(x), "ONNX": lambda: running.run(None, feeds)}, _ROUNDS)
        mine = run.model(x).argmax(1).cpu()
    ms = {name: statistics.median(times) for name, times in took.items()}
    theirs = torch.from_numpy(np.asarray(running.run(None, feeds)[0])).argmax(1)
    same = int((mine == theirs).sum())
    return (
        f"model.onnx ({column}, {report.nbytes / 1000:.1f} kB): ONNX Runtime gives the answer of PyTorch on {same} of "
        f"{len(x)} training images, in {ms['ONNX']:.2f} ms a batch on one thread (PyTorch, simulated: "
        f"{ms['PyTorch']:.2f} ms)."
    )


def _draw_widths(full: Cell, lines: dict[str, dict[str, Cell]], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.4), dpi=130, layout="constrained")
    for (name, cells), color in zip(lines.items(), ("tab:orange", "tab:green"), strict=True):
        axes.plot(list(cells), [cell.accuracy for cell in cells.values()], "o-", label=name, color=color)
    axes.axhline(full.accuracy, color="0.4", linestyle="--", label="full precision")
    axes.set(xlabel="bits of weights and activations", ylabel="% right", title="Integers for both")
    axes.legend(loc="lower left")
    figure.savefig(path)
    plt.close(figure)


METHODS: dict[str, Callable[[Bench], _Found]] = {
    "admm": _admm,
    "md": _md,
    "kq": _kq,
    "budget": _budget,
    "int8": _int8,
}


def table_of(outcome: Comparison) -> list[Sequence[str]]:
    """The cells as text, line by line."""
    rows = []
    for line in outcome.lines:
        cells = [line.cells.get(column) for column in outcome.columns]
        rows.append([line.name, *("" if cell is None else f"{cell.accuracy:.1f}" for cell in cells)])
    last = [next((line.cells[c] for line in reversed(outcome.lines) if c in line.cells), None) for c in outcome.columns]
    rows.append(["kilobytes", *("" if cell is None else f"{cell.bytes / 1000:.1f}" for cell in last)])
    return rows
