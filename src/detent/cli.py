"""The command line: `detent demo`, `detent plan`, `detent inspect`.

Exit codes: 0 it worked, 1 it failed, 2 the call or its input is wrong. What a person must know is one sentence on
standard error; `--json` puts the result, or {"error": ...}, on standard output and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from detent.demo import KEEP, WIDTHS, Outcome, Settings, demonstrate
from detent.demos import METHODS, Comparison, compare, table_of
from detent.pack import read_header, sizes
from detent.recipe import Recipe

__all__ = ["app"]

app = typer.Typer(
    name="detent",
    help="Train PyTorch networks whose weights click into cheap places: one checkpoint, two lives.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")]


@app.callback()
def _root() -> None:
    """Train PyTorch networks whose weights click into cheap places: one checkpoint, two lives."""


@contextlib.contextmanager
def _answer(as_json: bool) -> Iterator[None]:
    """Turn what a user can mend into one sentence and an exit code; a bug keeps its traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        _fail(error, 2, as_json)
    except (RuntimeError, OSError, ImportError) as error:
        _fail(error, 1, as_json)


def _fail(error: Exception, code: int, as_json: bool) -> None:
    message = " ".join(str(error).split()) or type(error).__name__
    Console(stderr=True, soft_wrap=True).print(Text(f"detent: {message}"))
    if as_json:
        _print_json({"error": message})
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


# --- demo ---------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="psg, admm, md or kq: which system to show.")] = "psg",
    data: Annotated[
        Path | None, typer.Option(help="Folder of Parquet images (MNIST, CIFAR); the digits of scikit-learn if absent.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for model.detent, weights.png, result.json.")] = Path("runs/demo"),
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images; else the network's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of initialisation and batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bits: Annotated[
        int | None, typer.Option(help="psg: the width it trains for, 8, 6, 4, 3 or 2; else the network's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small network with one of the systems and without, and show what is left of each when compressed."""
    with _answer(as_json):
        if method not in ("psg", *METHODS):
            raise ValueError(f"--method {method}: must be one of psg, {', '.join(METHODS)}")
        settings = Settings(data=data, out=out, epochs=epochs, seed=seed, device=device, bits=bits)
        columns = (
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=Console(stderr=True))
        with contextlib.ExitStack() as shown:

            def watch(label: str, total: int) -> Callable[[], None]:
                if not progress.tasks:  # only now: what is refused before training should leave no empty bar
                    shown.enter_context(progress)
                task = progress.add_task(label, total=total)
                return lambda: progress.advance(task)

            outcome = demonstrate(settings, watch) if method == "psg" else compare(method, settings, watch)  # type: ignore[arg-type]
        if as_json:
            _print_json(dataclasses.asdict(outcome))
        elif isinstance(outcome, Outcome):
            _show(outcome)
        else:
            _show_comparison(outcome)


def _show(outcome: Outcome) -> None:
    """The table, what a reader must know to judge it, and where the files are."""
    setup, console = outcome.setup, Console()
    lives = ["full", *(f"W{bits}" for bits in WIDTHS), "pruned"]
    table = Table(title=f"Accuracy in % on {setup['test_images']:,} test images, and size of the files")
    table.add_column("trained by")
    table.add_column("range")
    for life in lives:
        table.add_column("pruned*" if life == "pruned" else life, justify="right")
    for row in outcome.rows:
        cells = [f"{row.cells[life].accuracy:.1f}" for life in lives]
        is_last = row is outcome.rows[-1]
        table.add_row(row.name, row.range, *cells, style="bold" if is_last else "", end_section=is_last)
    table.add_row("kilobytes", "", *(f"{outcome.rows[-1].cells[life].bytes / 1000:.1f}" for life in lives))
    console.print(table)
    for line in _notes(outcome):
        console.print(Text(line), soft_wrap=True)


def _show_comparison(outcome: Comparison) -> None:
    """The table of another system, its notes, and where the files are."""
    setup, console = outcome.setup, Console()
    table = Table(title=f"{outcome.title}; {setup['test_images']:,} test images, and size of the files")
    table.add_column("")
    for column in outcome.columns:
        table.add_column(column, justify="right")
    rows = table_of(outcome)
    for row in rows[:-1]:
        table.add_row(*row, style="bold" if row is rows[-2] else "", end_section=row is rows[-2])
    table.add_row(*rows[-1])
    console.print(table)
    norm = " BatchNorm is not re-estimated." if setup["batchnorm"] else ""
    first = f"{setup['network']}, {setup['parameters']:,} parameters, {setup['data']}. The last epoch counts.{norm}"
    for line in (first, *outcome.notes, f"Wrote {', '.join(outcome.files.values())} in {outcome.seconds:.0f} s."):
        console.print(Text(line), soft_wrap=True)


def _notes(outcome: Outcome) -> list[str]:
    setup = outcome.setup
    norm = " BatchNorm is not re-estimated, so no data is used after training." if setup["batchnorm"] else ""
    before = ", ".join(f"{name} {value:.1f} %" for name, value in outcome.pruned_full.items())
    return [
        f"{setup['network']}, {setup['parameters']:,} parameters, {setup['data']}. Same start, batches and "
        f"{setup['epochs']} epochs for all networks; the last epoch counts. "
        "Settings were tuned for PSG, on training images.",
        "W8 to W2: every convolution and linear weight on a grid of so many bits, one step a tensor, first and last "
        f"layer too; all from the one checkpoint of the row.{norm} PSG was trained for {setup['bits']} bits.",
        "range: the step is found from the largest weight (minmax, as in the paper) or by least squared error (mse).",
        f"*{100 - 100 * KEEP:.0f} % of the weights set to zero, one threshold for the network. Two further networks, "
        f"weight decay {setup['weight_decay_pruned']:g} instead of {setup['weight_decay']:g}, PSG towards zero; "
        f"before pruning: {before}.",
        f"Wrote {', '.join(outcome.files.values())} in {outcome.seconds:.0f} s.",
    ]


# --- plan ---------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help='A factory "package.module:function", or a .safetensors state dict.')],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A preset, or a .yaml file.")] = "psg-w4",
    as_json: AsJson = False,
) -> None:
    """Show what a recipe would do to every parameter of a model, and why some stay in full precision."""
    with _answer(as_json):
        is_file = recipe.endswith((".yaml", ".yml"))
        chosen = Recipe.from_yaml(Path(recipe)) if is_file else Recipe.preset(recipe)
        resolved = chosen.resolve(_model_of(model))
        if as_json:
            _print_json({"recipe": recipe, "parameters": resolved.rows()})
        else:
            Console(soft_wrap=True).print(Text(str(resolved)))


def _model_of(source: str) -> nn.Module:
    if source.endswith(".safetensors"):
        return _skeleton(Path(source))
    module_name, colon, function = source.partition(":")
    if not (module_name and colon and function):
        raise ValueError(f'model={source!r}: give a factory as "package.module:function", or a .safetensors file')
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory: Any = importlib.import_module(module_name)
        for part in function.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model={source!r}: cannot find the factory: {error}") from None
    try:
        made = factory() if callable(factory) else factory
    except Exception as error:  # whatever a user's own code may raise
        raise ValueError(f"model={source!r}: the factory raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"model={source!r}: must give a torch.nn.Module, not {type(made).__name__}")
    return made


def _skeleton(path: Path) -> nn.Module:
    """A module with the names, shapes and dtypes of a state dict, on the meta device: no weight is read.

    A state dict does not say which convolutions are transposed or which 2-D tensors are buffers; BatchNorm's running
    statistics are known by their names.
    """
    root = nn.Module()
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is not iterable
                _hang(root, name, file.get_tensor(name).to("meta"))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a safetensors state dict: {error}") from None
    return root


def _hang(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor at its dotted name below the root."""
    *folders, own = name.split(".")
    here = root
    for folder in folders:
        child = here._modules.get(folder)
        if child is None:
            child = nn.Module()
            here.add_module(folder, child)
        here = child
    if own in ("running_mean", "running_var", "num_batches_tracked") or not value.is_floating_point():
        here.register_buffer(own, value)
    else:
        here.register_parameter(own, nn.Parameter(value))


# --- inspect ------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .detent file.")],
    as_json: AsJson = False,
) -> None:
    """Show what a file holds: where its bytes are, what became of every parameter, and its card."""
    with _answer(as_json):
        header, found = read_header(file), sizes(file)
        if as_json:
            _print_json({"sizes": found, **dataclasses.asdict(header)})
            return
        console = Console(soft_wrap=True)
        console.print(Text(f"{file}: format {header.version}, written by Detent {header.writer}, lives: {header.life}"))
        console.print(_bytes_table(found))
        table = Table(title="Compressed parameters")
        for head in ("parameter", "shape", "becomes", "pulled by"):
            table.add_column(head, overflow="fold")
        for head in ("bits", "bytes"):
            table.add_column(head, justify="right")
        for row in header.plan:
            tensor = header.tensors[row["parameter"]]
            if "bits_per_weight" in tensor:
                cells = (row["parameter"], "x".join(map(str, tensor["shape"])), tensor["becomes"], row["mechanism"])
                table.add_row(*map(Text, cells), f"{tensor['bits_per_weight']:.2f}", f"{tensor['bytes']:,}")
        console.print(table)
        card = header.card
        console.print(
            f"{card['compressed_weights']:,} of {card['weights']:,} weights compressed; BatchNorm statistics: "
            f"{card['batchnorm']}"
        )
        for reason, names in card["full_precision"].items():
            console.print(Text(f"In full precision ({reason}): {', '.join(names)}"))
        for key, value in card["notes"].items():
            console.print(Text(f"{key}: {value}"))


def _bytes_table(found: dict[str, int]) -> Table:
    """Where the bytes of a file are."""
    what = {
        "full": "full life",
        "codes": "codes",
        "params": "fitted numbers (scales)",
        "rest": "compressed life, stored as it is",
        "header": "header",
        "file": "whole file",
    }
    table = Table(title="Bytes")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for key, name in what.items():
        table.add_row(name, f"{found[key]:,}", end_section=key == "header")
    return table
