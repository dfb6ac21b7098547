"""The command line: its flags, its tables and its errors. What the commands do is in `cli_work` and the library.

Exit codes: 0 it worked, 1 it failed, 2 the call or its input is wrong, 130 it was interrupted. What a person must know
is one sentence on standard error; `--json` puts the result, or {"error": ...}, on standard output and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console as _RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import detent
from detent.budget import compress_to_budget
from detent.cli_work import (
    OnnxOptions,
    budget_of,
    bytes_in,
    code_of,
    example_of,
    export_file,
    import_own,
    model_of,
    places_of,
    recipe_of,
    refuse_images,
    refuse_overwriting,
    report_of,
    visible,
    widths_in,
)
from detent.compression import compress_state_dict, skeleton
from detent.demo import KEEP, WIDTHS, Outcome, Settings, demonstrate
from detent.demos import METHODS, Comparison, compare, table_of
from detent.export import check_compressed_tensors
from detent.pack import CODINGS, Checkpoint, Inspection, Reader
from detent.pack import inspect as measured
from detent.pack import unpack as write_plain
from detent.pack.atomic import destination
from detent.plan import near_dead_said
from detent.report import card_of_file, write_html
from detent.report.page import figures, summary

__all__ = ["app"]

# Click's, which newer releases of typer bring along under a name of their own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Console(_RichConsole):
    """A terminal to which nothing of a file goes raw: control characters in names and notes are shown, not sent."""

    def render(self, *given: Any, **more: Any) -> Iterator[Segment]:
        """The pieces that are written; what rich itself sends to the terminal is marked as control."""
        for text, style, control in super().render(*given, **more):
            yield Segment(text if control else visible(text), style, control)


class _Commands(TyperGroup):
    """The commands; what their parser refuses is told as JSON too where that was asked for."""

    _as_json = False

    def main(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        self._as_json = "--json" in given[: given.index("--") if "--" in given else None]
        return super().main(args, *rest, **more)

    def make_context(self, *given: Any, **more: Any) -> Any:
        with self._told():
            return super().make_context(*given, **more)

    def invoke(self, ctx: Any) -> Any:
        with self._told():  # a command parses its own arguments only when it is called
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except _UsageError as error:
            if self._as_json:
                _print_json({"error": error.format_message()})  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="detent",
    cls=_Commands,
    help="Train PyTorch networks whose weights click into cheap places: one checkpoint, two lives.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Force = Annotated[bool, typer.Option("--force", help="Write over files whose names were not given; never an input.")]
Example = Annotated[
    str | None,
    typer.Option(
        help="With a factory: what its model takes, so that first and last go by execution. The shape of one input, "
        'e.g. 1,3,32,32, or a factory "package.module:function" of a tensor, a tuple or a dict of arguments.'
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"detent {detent.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import a module first: yours, with targets and mechanisms."),
    ] = None,
) -> None:
    """Train PyTorch networks whose weights click into cheap places: one checkpoint, two lives."""
    with _answer(as_json=False):
        for module in imports or ():
            import_own(module)


@contextlib.contextmanager
def _answer(as_json: bool) -> Iterator[None]:
    """Turn what a user can mend into one sentence and an exit code; a bug keeps its traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        _fail(error, 2, as_json)
    except (RuntimeError, OSError, ImportError) as error:
        _fail(error, 1, as_json)
    except KeyboardInterrupt:
        _fail(RuntimeError("interrupted; what was there before is untouched"), 130, as_json)


def _fail(error: Exception, code: int, as_json: bool) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename and not error.filename2:
        text = f"cannot open {error.filename}: {error.strerror}"  # Python's own words start with [Errno 2]
    message = " ".join(text.split()) or type(error).__name__
    Console(stderr=True, soft_wrap=True).print(Text(f"detent: {message}"))
    if as_json:
        _print_json({"error": message})
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


@contextlib.contextmanager
def _watched(long: bool = False) -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Bars on standard error: call what this gives with a label and a number of steps, what that gives at each.

    Off a terminal nothing is shown, except of `long` work: a line when each of its parts begins.
    """
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    with contextlib.ExitStack() as shown:

        def watch(label: str, total: int) -> Callable[[], None]:
            if progress.disable and long:
                console.print(Text(f"{label}: {total:,} steps"), soft_wrap=True)
            elif not progress.tasks:  # only now: what is refused before the work starts should leave no empty bar
                shown.enter_context(progress)
            task = progress.add_task(label, total=total)
            return lambda: progress.advance(task)

        yield watch


# --- demo ---------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="psg, admm, md, kq, budget or int8: what to show.")] = "psg",
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
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a small network with one of the systems and without, and show what is left of each when compressed."""
    with _answer(as_json):
        if method not in ("psg", *METHODS):
            raise ValueError(f"--method {method}: must be one of psg, {', '.join(METHODS)}")
        made = ("model.detent", "weights.png", "result.json", "report.html", "report.json")
        refuse_overwriting(unnamed=[out / name for name in made], inputs=[data], force=force)
        settings = Settings(data=data, out=out, epochs=epochs, seed=seed, device=device, bits=bits)
        with _watched(long=True) as watch:
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
    table.add_row("kilobytes, PSG", "", *(f"{outcome.rows[-1].cells[life].bytes / 1000:.1f}" for life in lives))
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
    model: Annotated[
        str,
        typer.Argument(help='A factory "package.module:function", which is run; or a state dict, as for compress.'),
    ],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A preset, or a .yaml file.")] = "psg-w4",
    to: Annotated[
        str | None, typer.Option(help="compressed-tensors: also say what that export would refuse; wants a factory.")
    ] = None,
    load: Annotated[
        bool,
        typer.Option(help="With --to: also write and load it in a temporary folder, for what transformers refuses."),
    ] = False,
    example: Example = None,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe would do to every parameter of a model, and why some stay in full precision."""
    with _answer(as_json):
        is_state = Path(model).exists() or (":" not in model and bool(Path(model).suffix))
        if to not in (None, "compressed-tensors"):
            raise ValueError(f"--to {to}: must be compressed-tensors")
        if load and not to:
            raise ValueError("--load: goes with --to compressed-tensors")
        if to and is_state:
            raise ValueError(f"--to {to}: a file does not say which layers are linear; give a factory")
        if example and is_state:
            raise ValueError(f"--example {example}: a file cannot be run; give a factory")
        with contextlib.ExitStack() as stack:
            weights = stack.enter_context(Checkpoint(model)) if is_state else None
            net = model_of(model) if weights is None else skeleton(weights)
            resolved = recipe_of(recipe).resolve(net, example=example_of(example))
            checked = check_compressed_tensors(net, resolved, load=load) if to else None
            dead = resolved.near_dead(
                net.named_parameters() if weights is None else ((name, weights.tensor(name)) for name in weights)
            )
        outputs = sum(c.layout.channels for c in resolved.claims if c.is_weight and len(c.layout.shape) > 1)
        if as_json:
            near = {"outputs": outputs, "near_dead": sum(count for count, _ in dead.values()), "by_name": dead}
            more = {"export": dataclasses.asdict(checked)} if checked else {}
            _print_json({"recipe": recipe, "parameters": resolved.rows(), "near_dead": near, **more})
            return
        for said in (str(resolved), near_dead_said(dead, outputs), str(checked or "")):
            if said:
                Console(soft_wrap=True).print(Text(said))


# --- compress -----------------------------------------------------------------------------------------------------


@app.command()
def compress(
    weights: Annotated[
        Path, typer.Argument(help="A .safetensors state dict, a folder of its shards, or the .index.json of them.")
    ],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A preset, or a .yaml file; else uniform-w4.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes of the whole file instead of a recipe: 84kB, 1.5MB, 20x smaller, '3.2 bits' a weight."
        ),
    ] = None,
    choices: Annotated[
        str, typer.Option(help="With --budget: step (least error), or widths of 2 to 8 bits a tensor (for hardware).")
    ] = "step",
    places: Annotated[
        str | None,
        typer.Option(help="nearest, or prior: errors cancel within kernels and channels. Else prior if --budget."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="With --budget and --model: 'digits', or a folder of Parquet images; some choose the places."
        ),
    ] = None,
    calibrate: Annotated[int | None, typer.Option(help="How many of them; else 256, or all if fewer.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write; else WEIGHTS.detent.")] = None,
    life: Annotated[str, typer.Option(help="compressed: as small as its codes; both: the weights as they are too.")] = (
        "compressed"
    ),
    coding: Annotated[
        str | None,
        typer.Option(
            help="entropy: as small as it goes; bitpacked: fast to read; none: whole bytes. "
            "Else entropy, and bitpacked where --out ends in .safetensors."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help='A factory "package.module:function", whose code is run; else shapes and names must do.'),
    ] = None,
    example: Example = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Round the weights of a state dict to the places of a recipe, or whatever fits a budget, without training."""
    with _answer(as_json):
        if life not in ("compressed", "both"):
            raise ValueError(f"--life {life}: must be compressed or both")
        if coding not in (None, *CODINGS):
            raise ValueError(f"--coding {coding}: must be one of {', '.join(CODINGS)}")
        if example and model is None:
            raise ValueError(f"--example {example}: goes with --model, which is run on it")
        if example and budget:
            raise ValueError(f"--example {example} beside --budget {budget}: a budget knows no first or last layer")
        with Checkpoint(weights) as opened, _watched() as watch:  # first: another kind of file is at fault before all
            default = None if out else _beside(weights)
            inputs = [*opened.files, None if recipe is None else Path(recipe), code_of(model), code_of(example)]
            refuse_overwriting(named=[out], unnamed=[default], inputs=inputs, force=force)
            chosen_by, words = places_of(budget, places=places, data=data, calibrate=calibrate, model=model)
            said: dict[str, Any] = {"data": "none", "epochs": 0, "calibration": words}
            said["made by"] = f"detent compress {weights.name or weights.resolve().name}"
            if model is None:
                order = "of names and their numbers, as a state dict has none"
                said["order"] = f"{order}: which weight is really first or last is not known"
            net, place = None if model is None else model_of(model), out or _beside(weights)
            if net is not None:
                refuse_images(net, chosen_by, data)
            if budget is not None:
                done = watch("finding what fits", 1)
                wanted = budget_of(budget, recipe=recipe, choices=choices, life=life)
                found = compress_to_budget(
                    opened, place, budget, choices=wanted, calibration=chosen_by, coding=coding, model=net, notes=said
                )
                done()
            else:
                chosen = recipe_of(recipe or "uniform-w4")
                found = compress_state_dict(
                    opened,
                    place,
                    chosen,
                    life=life,
                    calibration="prior" if chosen_by == "prior" else None,
                    coding=coding,
                    model=net,
                    example=example_of(example),
                    notes=said,
                    watch=watch,
                )
            made = dataclasses.asdict(found)
        if as_json:
            _print_json(made)
            return
        console = Console(soft_wrap=True)
        than = "with both lives" if life == "both" else _than(made["raw_bytes"], made["bytes"])
        raw = f"the tensors of {weights}: {made['raw_bytes']:,} bytes"
        console.print(Text(f"{made['file']}: {made['bytes']:,} bytes, {than}; {raw}"))
        console.print(
            f"{made['compressed_weights']:,} of {made['weights']:,} weights compressed, {made['nominal_bits']:.2f} "
            f"bits each, {made['bits_per_weight']:.2f} as written; squared error {made['error']:.3g} of their squares"
        )
        for sentence in made["notes"]:
            console.print(Text(sentence))


def _beside(weights: Path) -> Path:
    """Where the file of a state dict goes if nobody says: beside it, a folder's beside the folder."""
    where = weights.resolve() if weights.name in ("", "..") else weights
    name = where.name if where.is_dir() else where.name.removesuffix(".index.json").removesuffix(".safetensors")
    return where.with_name(f"{name}.detent")


def _than(before: int, after: int) -> str:
    """How much smaller something became, if it did."""
    if after == before:
        return "as large as before"
    if after > before:
        return f"larger than before: {after / before:.2f} times as many bytes"
    return f"{before / after:.1f} times smaller"


# --- inspect ------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .detent file.")],
    as_json: AsJson = False,
) -> None:
    """Show what a file holds: what every tensor became, the bytes it takes, and how far its two lives are apart."""
    with _answer(as_json):
        with Reader(file) as opened, _watched() as watch:
            header = opened.header
            found = measured(opened, advance=watch("measuring", len(header.tensors)))
        if as_json:
            _print_json({"rows": found.rows, "total": found.total, **dataclasses.asdict(header)})
            return
        total = found.total
        console = Console(soft_wrap=True)
        # Numbers that are folded into narrow columns are of no use; a narrow terminal wraps whole lines instead.
        console = Console(soft_wrap=True, width=max(console.width, 160))
        console.print(
            Text(
                f"{file}: format {header.version}, written by Detent {header.writer}, lives: {header.life}, "
                f"{total['file']:,} bytes"
            )
        )
        console.print(_tensors_table(found))
        console.print(_bytes_table(total))
        card = header.card
        bits = {"coded weight": total["bits_per_weight"], "convolution weight": total["bits_per_conv_weight"]}
        console.print(
            f"{card['compressed_weights']:,} of {card['weights']:,} parameters compressed; "
            + ", ".join(f"{value:.3f} bits a {name}" for name, value in bits.items() if value is not None)
            + f"; BatchNorm statistics: {card['batchnorm']}"
        )
        dead = {row["name"]: (row["near_dead"], row["outputs"]) for row in found.rows if row["near_dead"]}
        if said := near_dead_said(dead, total["all"]["outputs"]):
            console.print(Text(said))
        for reason, names in card["full_precision"].items():
            console.print(Text(f"In full precision ({reason}): {', '.join(names)}"))
        for row in card["activations"]:
            console.print(Text(f"What goes into {row['module'] or 'the model'}: {row['said']}"))
        for key, value in card["notes"].items():
            console.print(Text(f"{key}: {value}"))


def _tensors_table(found: Inspection) -> Table:
    """One row a coded tensor, and their sum; what is stored as it is in one row."""
    table = Table(title="Coded tensors")
    table.add_column("tensor", overflow="fold")
    table.add_column("becomes", overflow="fold")
    for head in ("weights", "kept %", "nominal", "entropy", "bytes", "index %", "bits/weight", "error", "Wasserstein"):
        table.add_column(head, justify="right")

    def numbers(row: Mapping[str, Any]) -> list[str]:
        weights, kept = row["weights"], row["kept"]
        cells = [f"{weights:,}", f"{100 * kept / weights:.1f}" if weights else ""]
        cells += [f"{row[key] / weights:.3f}" if weights else "" for key in ("nominal_bits", "entropy_bits")]
        cells += [f"{row['bytes']:,}", f"{100 * row['index_share']:.1f}"]
        cells.append("" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}")
        return [*cells, *(figures(row.get(key)) for key in ("error", "wasserstein"))]

    coded = [row for row in found.rows if row["coded"]]
    for row in coded:
        table.add_row(Text(row["name"]), Text(row["becomes"]), *numbers(row), end_section=row is coded[-1])
    total = found.total
    distances = {key: total[key] for key in ("error", "wasserstein")}
    table.add_row("all coded", "", *numbers({**total["coded"], **distances}))
    table.add_row("stored as they are", "", *numbers(total["raw"]))
    return table


def _bytes_table(total: Mapping[str, Any]) -> Table:
    """Where the bytes of a file are."""
    parts = {
        "full life": total["full"],
        "codes and fitted numbers (scales)": total["coded"]["bytes"],
        "header and checksums": total["header"],
    }
    parts["compressed life, stored as it is"] = total["file"] - sum(parts.values())
    table = Table(title="Bytes")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for name, size in parts.items():
        table.add_row(name, f"{size:,}")
    table.add_section()
    table.add_row("whole file", f"{total['file']:,}")
    return table


# --- unpack -------------------------------------------------------------------------------------------------------


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A .detent file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write; else FILE.safetensors.")] = None,
    life: Annotated[str, typer.Option(help="full or compressed.")] = "compressed",
    shard_size: Annotated[
        str | None, typer.Option(help="Make --out a folder of shards with an index, none above this: 5GB, 500MB.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write one life of a file as plain safetensors, which every other tool reads."""
    with _answer(as_json):
        with Reader(file) as opened, _watched() as watch:  # first: another kind of file is at fault before its name is
            if life not in ("full", "compressed"):
                raise ValueError(f"--life {life}: must be full or compressed")
            if life == "full" and opened.header.life == "compressed":
                raise ValueError(
                    f"--life full: {file} holds only the compressed life; give --life compressed, or write the file "
                    "anew with both (detent compress --life both)"
                )
            bound = None if shard_size is None else bytes_in(shard_size)
            plain = out or file.with_suffix("" if bound else ".safetensors")
            # A folder of shards is never named file by file.
            unnamed = [plain] if bound or not out else []
            refuse_overwriting(named=[out], unnamed=unnamed, inputs=[file], force=force)
            size = write_plain(
                opened, plain, life, shard_bytes=bound, advance=watch("unpacking", len(opened.header.tensors))
            )
        if as_json:
            _print_json({"file": str(plain), "life": life, "bytes": size})
        else:
            Console(soft_wrap=True).print(Text(f"Wrote the {life} life to {plain}: {size:,} bytes."))


# --- report -------------------------------------------------------------------------------------------------------


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A .detent file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; its JSON twin goes beside it. Else FILE.html.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help='A factory "package.module:function": with --data also accuracy.')
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="'digits', or a folder of Parquet images; test split scored.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Widths of the curve of size against accuracy.")] = "8,6,4,3,2",
    history: Annotated[Path | None, typer.Option(help="JSON lines that detent.report.History wrote.")] = None,
    exported: Annotated[Path | None, typer.Option(help="What `detent export --json` said.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page; else the file's name.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a page on a file: both lives, histograms, layer by layer, size against accuracy, the quantization card."""
    with _answer(as_json):
        page = out or file.with_suffix(".html")
        if out is not None or not as_json:
            images = None if data == "digits" else data
            refuse_overwriting(
                named=[out],
                unnamed=[None if out else page, page.with_suffix(".json")],
                inputs=[file, history, exported, images, code_of(model)],
                force=force,
            )
            destination(page)  # what is wrong with it shall be said before anything is measured
        with _watched() as watch:
            found = report_of(
                file,
                model=model,
                data=data,
                bits=widths_in(bits),
                history=history,
                exported=exported,
                title=title or "",
                watch=watch,
            )
            size = 0 if as_json and out is None else write_html(found, page, watch=watch)
        if as_json:
            _print_json(found.model_dump(mode="json"))
            return
        console = Console(soft_wrap=True)
        console.print(Text(summary(found)))
        for what, words in found.absent.items():
            console.print(Text(f"Without {what}; pass {words}".replace("`", "")))
        console.print(Text(f"Wrote {page} ({size:,} bytes) and {page.with_suffix('.json')}."))


# --- export -------------------------------------------------------------------------------------------------------


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A .detent file.")],
    model: Annotated[str, typer.Option(help='A factory "package.module:function", whose code is run.')],
    to: Annotated[str, typer.Option(help="onnx or compressed-tensors.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="An .onnx file, or a folder; else FILE.onnx or FILE's name.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--input", help="onnx: shape of one input, e.g. 1,3,32,32; the batch stays free.")
    ] = None,
    batchnorm: Annotated[
        str | None, typer.Option(help="onnx: keep, or fold it into the layers before; rounded activations fold it.")
    ] = None,
    activations: Annotated[int | None, typer.Option(help="onnx: also round activations, to 8 or 4 bits.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Their ranges: minmax, percentile, mse, or batchnorm, which needs no images.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="'digits', or a folder of Parquet images; training images find the ranges.")
    ] = None,
    calibrate: Annotated[int | None, typer.Option(help="How many of them; else 512, or all if fewer.")] = None,
    input_range: Annotated[
        str | None, typer.Option(help="--method batchnorm: smallest and largest input, e.g. -2,2.1.")
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="onnx: measure it in ONNX Runtime against float32, batch 1 and 64.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="--latency: threads within an operator; else 1.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the compressed life in another tool's format: an ONNX file, or a folder that transformers loads."""
    with _answer(as_json):
        options = OnnxOptions(
            shape=shape,
            batchnorm=batchnorm,
            activations=activations,
            method=method,
            data=data,
            calibrate=calibrate,
            input_range=input_range,
            latency=latency,
            threads=threads,
        )
        with _watched() as watch:
            made = export_file(file, model=model, to=to, out=out, options=options, watch=watch, force=force)
        if as_json:
            _print_json(made)
            return
        console = Console(soft_wrap=True)
        console.print(Text(f"Wrote {made['path']}: {made['format']}, {made['bytes']:,} bytes."))
        if made["difference"] is not None:
            cost = "" if activations is None else ", which is what rounded activations cost"
            console.print(f"Largest difference from PyTorch's compressed life: {made['difference']:.3g}{cost}")
        for sentence in made["notes"]:
            console.print(Text(sentence))


# --- card ---------------------------------------------------------------------------------------------------------


@app.command()
def card(
    file: Annotated[Path, typer.Argument(help="A .detent file.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table, for a README.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the quantization card of a file: what is compressed and how, and what is not."""
    with _answer(as_json):
        if markdown and as_json:
            raise ValueError("--markdown and --json: give one of them")
        found = card_of_file(file)
        if as_json:
            _print_json(found.model_dump(mode="json"))
        else:
            text = found.markdown(f"Quantization card of {file.name}") if markdown else found.text() + "\n"
            sys.stdout.write(visible(text))
