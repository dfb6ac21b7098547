"""The page: one self-contained HTML file with inline SVG, light and dark, and the JSON twin beside it."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detent.pack.atomic import destination, replace_file
from detent.report.numbers import Layer, Report, Watch, silent

__all__ = ["comparison", "render", "summary", "write_html"]

# Drawn in colours that no palette has, then replaced by the page's own variables, which follow light and dark.
_COLOURS = {
    "#010203": "var(--ink)",
    "#020304": "var(--muted)",
    "#030405": "var(--line)",
    "#040506": "var(--before)",
    "#050607": "var(--after)",
    "#060708": "var(--accent)",
}
_INK, _MUTED, _LINE, _BEFORE, _AFTER, _ACCENT = _COLOURS
_WIDE = 4.6  # inches; at 72 points an inch about the width of a phone, so that text keeps its size there
_MOST_PICTURES = 60


def write_html(
    report: Report,
    path: str | os.PathLike[str],
    *,
    json_path: str | os.PathLike[str] | None = None,
    watch: Watch = silent,
) -> int:
    """Write a report as one HTML file that needs no network, and its JSON twin with the same numbers.

    Args:
        report: from `collect`, or `Report.from_json`.
        path: the page; replaced at once or not at all.
        json_path: the twin; by default the page's name with .json.
        watch: told when drawing starts and at every picture.

    Returns:
        Bytes of the page.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
        OSError: a file cannot be written.
        ValueError: a page and a twin of the same name.

    Example:
        >>> import tempfile, detent as dt, torch
        >>> from detent.report import collect
        >>> run = dt.compress(torch.nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = write_html(collect(run), f"{folder}/report.html")
        ...     sorted(os.listdir(folder))
        ['report.html', 'report.json']
    """
    page = Path(path)
    twin = page.with_suffix(".json") if json_path is None else Path(json_path)
    if twin == page:
        raise ValueError(f"write_html(path={os.fspath(path)!r}): the page and its JSON twin need two names")
    data = render(report, twin.name, watch).encode()
    replace_file(destination(twin), report.to_json().encode())
    replace_file(destination(page), data)
    return len(data)


def render(report: Report, twin: str = "", watch: Watch = silent) -> str:
    """The page as text; `twin` is the name of the JSON file beside it.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401  asked for here, so that what is missing is said before anything is drawn
    except ImportError as error:
        raise ImportError(f"a report needs jinja2 and matplotlib; install detent[report] ({error})") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figures": figures, "percent": lambda value: f"{100 * value:.1f}"}
    largest = sorted(report.layers, key=lambda layer: -layer.weights)[:_MOST_PICTURES]
    pictured = [layer for layer in report.layers if layer in largest]
    with _styled():
        advance = watch("drawing", len(pictured))
        layers = []
        for layer in pictured:
            layers.append((layer, _drawn(functools.partial(_draw_layer, layer), 1.75, 0.03)))
            advance()
        history = _drawn(functools.partial(_draw_history, report), 2.9) if report.history else ""
        widths = _drawn(functools.partial(_draw_widths, report), 2.9) if report.widths else ""
    return environment.get_template("page.html").render(
        report=report,
        twin=twin,
        layers=layers,
        history=history,
        widths=widths,
        left_out=len(report.layers) - len(pictured),
        summary=summary(report),
        unfit="; ".join(f"{label}: {why}" for label, why in report.unfit.items()),
        rows=comparison(report),
        most={
            name: max((abs(getattr(layer, name) or 0.0) for layer in report.layers), default=0.0) or 1.0
            for name in ("bits", "sensitivity", "error")
        },
    )


# --- words and numbers --------------------------------------------------------------------------------------------


def figures(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, thousands parted; nothing for None.

    Example:
        >>> figures(1234567), figures(0.000123456), figures(12.3456), figures(None)
        ('1,234,567', '0.000123', '12.3', '')
    """
    if value is None:
        return ""
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def summary(report: Report) -> str:
    """One sentence: how much smaller, and what it costs.

    Example:
        >>> import detent as dt, torch
        >>> from detent.report import collect
        >>> run = dt.compress(torch.nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
        >>> summary(collect(run)).split(" instead")[1]
        ' of 288 bytes (2.0 times smaller).'
    """
    smallest = min(parts["file"] for parts in report.sizes.parts.values())
    text = f"The compressed life takes {smallest:,} bytes"
    factor = report.sizes.raw / smallest
    smaller = f" ({factor:.1f} times smaller)" if factor >= 1.05 else ""
    text += f" instead of {report.sizes.raw:,} bytes{smaller}"
    if {"full", "compressed"} <= report.scores.keys():
        before, after = report.scores["full"], report.scores["compressed"]
        parts = [f"{name} {_score(name, after[name])} instead of {_score(name, before[name])}" for name in before]
        text += f", {', '.join(parts)}"
    elif report.scores.get("compressed"):  # of a file that holds no other life
        text += f", {', '.join(f'{name} {_score(name, at)}' for name, at in report.scores['compressed'].items())}"
    return text + "."


def comparison(report: Report) -> list[tuple[str, str, str]]:
    """The table of both lives: (what, before, after)."""
    sizes, rows = report.sizes, []
    for name in dict.fromkeys(name for scores in report.scores.values() for name in scores):
        cells = [report.scores.get(life, {}).get(name) for life in ("full", "compressed")]
        rows.append((name, *("" if value is None else _score(name, value) for value in cells)))
    rows.append(("in memory", _bytes(sizes.raw), ""))
    if sizes.both is not None:
        rows.append(("file with both lives", "", _bytes(sizes.both)))
    for coding, parts in sizes.parts.items():
        after = f"{_bytes(parts['file'])} ({sizes.raw / parts['file']:.1f}×)"
        rows.append((f"file, {_CODINGS[coding]}", "", after))
    for coding, parts in sizes.parts.items():
        bits = f"{report.bits_per_weight(coding):.2f}"
        if parts["index"]:
            bits += f"; without index {report.bits_per_weight(coding, index=False):.2f}"
        rows.append((f"bits a weight, {_CODINGS[coding]}", f"{report.full_bits:.2f}", bits))
    for export in report.exports:
        rows.append((f"{export.format}: file", "", _bytes(export.bytes)))
        for batch, after in export.latency_ms.items():
            before = export.reference_ms.get(batch)
            cells = ["" if ms is None else f"{figures(ms)} ms" for ms in (before, after)]
            rows.append((f"{export.format}: latency, batch {batch}", *cells))
        if export.difference is not None:
            rows.append((f"{export.format}: largest difference from PyTorch", "", figures(export.difference)))
    return rows


_CODINGS = {"entropy": "entropy coded", "bitpacked": "bit-packed"}


def _score(name: str, value: float) -> str:
    return f"{value:.2f} %" if "accuracy" in name else figures(value, 4)


def _bytes(size: int | None) -> str:
    return "" if size is None else f"{size:,} bytes"


# --- pictures -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's own font
        "svg.hashsalt": "detent",  # the same numbers give the same page
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
        "grid.color": _LINE,
        "hatch.linewidth": 1.2,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(style):
        yield


_IDS = re.compile(r' id="(?:figure|axes|patch|text|line2d|legend|matplotlib\.axis|[xy]tick|[A-Za-z]*Collection)_\d+"')
_FONT = re.compile(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*")
_METADATA = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)


_ATTRIBUTE = re.compile(r'="[^"]*"')
_LONG = re.compile(r"-?\d+\.\d\d+")


def _shortened(found: re.Match[str]) -> str:
    return f"{float(found[0]):.1f}".removesuffix(".0")


def _drawn(draw: Callable[[Any], None], height: float, margin: float = 0.15) -> str:
    """A picture as inline SVG in the page's colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDE, height))
    # Fixed edges: to have them computed would take longer than the drawing.
    draw(
        figure.add_axes(
            (margin, 0.3 / height, 0.97 - margin, 1 - 0.36 / height)
            if margin < 0.1
            else (margin, 0.48 / height, 0.97 - margin, 1 - 0.6 / height)
        )
    )
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = _METADATA.sub("", svg[svg.index("<svg") :])
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'aria-hidden="true"', svg, count=1)
    svg = _FONT.sub(lambda found: f"font-size: {found[2]}px" + (f"; font-weight: {found[1]}" if found[1] else ""), svg)
    # Coordinates to a tenth of a point; what is text stays as it is.
    svg = _ATTRIBUTE.sub(lambda found: _LONG.sub(_shortened, found[0]), _IDS.sub("", svg))
    for drawn, shown in _COLOURS.items():
        svg = svg.replace(drawn, shown)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _draw_layer(layer: Layer, axes: Any) -> None:
    """Before above the line, after below it, each to its own height; the levels as dotted lines."""
    shown = layer.histogram
    assert shown is not None
    edges = [shown.low + (shown.high - shown.low) * i / len(shown.compressed) for i in range(len(shown.compressed) + 1)]
    for level in shown.levels if len(shown.levels) <= 33 else ():
        axes.axvline(level, color=_LINE, linestyle=":", linewidth=0.9, zorder=0)
    for shares, sign, colour, name in ((shown.full, 1, _BEFORE, "before"), (shown.compressed, -1, _AFTER, "after")):
        if not shares:
            continue
        top = max(shares) or 1.0
        heights = [sign * math.sqrt(share / top) for share in shares]  # or a spike at zero would hide all survivors
        hatch = {} if sign > 0 else {"hatch": "/////"}
        axes.stairs(heights, edges, fill=sign > 0, color=colour, linewidth=0.8, **hatch)
        axes.text(
            0.01, 0.97 if sign > 0 else 0.03, f"{name}, top {figures(100 * top, 2)} %", fontsize=8, color=_MUTED,
            transform=axes.transAxes, ha="left", va="top" if sign > 0 else "bottom",
        )  # fmt: skip
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set(xlim=(shown.low, shown.high), ylim=(-1.3, 1.3 if shown.full else 0), yticks=[])
    axes.spines["left"].set_visible(False)
    if shown.unit == "steps" and max(shown.high, 0) <= 9:
        axes.set_xticks(range(-math.floor(shown.high), math.floor(shown.high) + 1))


def _draw_history(report: Report, axes: Any) -> None:
    """The error of every tensor thin, their mean thick, over steps."""
    steps = [moment.step for moment in report.history]
    for name in report.history[-1].layers:
        values = [moment.layers.get(name) or math.nan for moment in report.history]
        axes.plot(steps, values, color=_BEFORE, linewidth=0.7, alpha=0.7)
    mean = [moment.error or math.nan for moment in report.history]
    axes.plot(steps, mean, color=_AFTER, linewidth=2.2, marker="o", markersize=3, label="mean over weights")
    axes.plot([], [], color=_BEFORE, linewidth=0.7, label="each tensor")
    positive = [v for v in mean if v > 0]
    axes.set(xlabel="step of training", ylabel="|w - q|² / |w|²", yscale="log" if positive else "linear")
    axes.grid(axis="y", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


def score_of(report: Report) -> str:
    """The score that the curve over widths shows: the accuracy where there is one."""
    names = list(report.widths[0].scores)
    return next((name for name in names if "accuracy" in name), names[0])


def _joined(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Points too close for a label each share one: those within a twentieth of the height and an eighth of the size."""
    span = max(y for _, y, _ in points) - min(y for _, y, _ in points) or 1.0
    found: list[tuple[float, float, str]] = []
    for x, y, label in points:
        near = next((p for p in found if abs(p[1] - y) < span / 20 and abs(p[0] - x) < x / 8), None)
        if near is None:
            found.append((x, y, label))
        else:
            found[found.index(near)] = (near[0], near[1], f"{near[2]}, {label}")
    return found


def _draw_widths(report: Report, axes: Any) -> None:
    """Score against bytes, one labelled point a width."""
    name = score_of(report)
    points = [(min(width.bytes.values()) / 1000, width.scores[name], width.label) for width in report.widths]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=_AFTER, marker="o", linewidth=1.6)
    for x, y, label in _joined(points):
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8, color=_INK)
    if "full" in report.scores:
        x, y = report.sizes.raw / 1000, report.scores["full"][name]
        axes.plot([x], [y], color=_BEFORE, marker="s", markersize=7, linestyle="none")
        axes.annotate("full", (x, y), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8, color=_INK)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    axes.margins(0.12, 0.2)
    axes.set(xlabel="size, kilobytes", ylabel="accuracy, %" if "accuracy" in name else name)
    axes.grid(linewidth=0.6)
