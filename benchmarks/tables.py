"""The tables in the docs, made from the records: `python -m benchmarks.tables` rewrites them, `--check` only checks.

A page holds `<!-- table:NAME -->` and `<!-- /table -->`; what stands between them belongs to this script.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
BLOCK = re.compile(r"<!-- table:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /table -->", re.DOTALL)
NOTHING = "*No record yet.*\n"
WIDTHS = (8, 6, 4, 3, 2)
_WIDE = ("sgd", "clip-w3", "clip-w2", "paper-w4", "paper-w3", "paper-w2", "psg-w4", "psg-w3", "psg-w2")
_CHANNEL = ("clip-w3-channel", "clip-w2-channel", "psg-w4-channel", "psg-w3-channel", "psg-w2-channel")
RIVALS = (*_WIDE, *_CHANNEL, "sgd-prune90", "psg-prune90")

Make = Callable[[Path], str]
TABLES: dict[str, Make] = {}


def table(name: str) -> Callable[[Make], Make]:
    """Registers a function of the records' folder as the block `name`."""

    def register(make: Make) -> Make:
        TABLES[name] = make
        return make

    return register


# --- reading and writing ----------------------------------------------------------------------------------------


def read(records: Path, name: str) -> dict[str, Any] | None:
    """A record, or None if there is none."""
    path = records / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every column but the first is aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origin(record: dict[str, Any], name: str) -> str:
    """One line on where the numbers above it come from."""
    where = record["environment"]
    commit = (where["commit"] or "no commit")[:9] + (" with uncommitted changes" if where["dirty"] else "")
    seeds = ", ".join(map(str, record["seeds"]))
    hardware = where["hardware"]
    machine = ", ".join(hardware["gpu"]) or f"{hardware['cpu']}, {hardware['threads']} threads"
    load, cores = max(where.get("load_average", [0.0])), hardware["cores"]
    busy = f"; load average {load:.1f} on {cores} cores" if load > cores else ""
    torch = where["versions"].get("torch", "unknown")
    command = record["command"]
    return f"\nRecord `{name}`: `{command}`; commit {commit}; seeds {seeds}; torch {torch}; {machine}{busy}.\n"


def simple(name: str) -> Callable[[Callable[[dict[str, Any]], str]], Make]:
    """Registers a table made from the one record `name`, under that name with "-" for "_"."""

    def register(body: Callable[[dict[str, Any]], str]) -> Make:
        def make(records: Path) -> str:
            record = read(records, name)
            return NOTHING if record is None else body(record) + origin(record, name)

        return table(name.replace("_", "-"))(make)

    return register


def spread(found: dict[str, Any], digits: int) -> str:
    """Mean, and standard deviation where there are several seeds."""
    text = f"{found['mean']:.{digits}f}"
    return text if found["std"] is None else f"{text} ± {found['std']:.{digits}f}"


# --- one function a record --------------------------------------------------------------------------------------


@simple("psg_noise")
def psg_noise(record: dict[str, Any]) -> str:
    """Mean distance to the grid at the last step, by lr / cell; and the count behind form="auto"."""
    results = record["results"]
    ratios = [f"{r:g}" for r in record["config"]["ratios"]]
    rows = []
    for row in results["rows"]:
        mark = str(row["steps"][-1])
        name = f"{row['optimizer']}, {'no PSG' if row['form'] == 'none' else row['form'] + ' form'}"
        eps = "" if row["eps"] is None else f"{row['eps']:g}"
        rows.append([name, eps, f"{row['steps'][-1]:,}", *(spread(row["ratios"][r][mark], 3) for r in ratios)])
        rows[-1].append(f"{100 * row['outside']:.0f} %")
    text = "Mean distance to the grid in cells (0.25 is uniform: nothing clicked), by learning rate / cell.\n\n"
    text += markdown(["optimizer", "eps", "steps", *ratios, "left the grid, at most"], rows)
    counts = results["verdict"]["closer"]
    same = results["verdict"]["equal_within_cells"]
    text += f"\nIn how many of the settings above each form ends closer to the grid (equal: within {same:g} cells).\n\n"
    forms = ("gradient", "update", "equal")
    return text + markdown(["optimizer", *forms], [[name, *(str(c[f]) for f in forms)] for name, c in counts.items()])


@table("psg-noise-check")
def psg_noise_check(records: Path) -> str:
    """The notes' rows and ours."""
    record = read(records, "psg_noise")
    if record is None:
        return NOTHING
    rows = []
    marks: list[str] = []
    for row in record["results"]["check"]:
        marks = list(row["found"])
        ours = [f"{row['found'][m]['mean']:.3f}" for m in marks]
        by_hand = [f"{x:.3f}" for x in row.get("by_hand", [])] or ["–"]
        noted = [f"{x:.3f}" for x in row["noted"]]
        name = f"{row['name']} ({row['optimizer']})"
        rows.append([name, " / ".join(noted), " / ".join(ours), " / ".join(by_hand)])
    steps = " / ".join(f"{int(m):,}" for m in marks)
    text = f"Mean distance to the grid in cells after {steps} steps; step of the grid 1, rate 0.05, paper's units.\n\n"
    text += markdown(["scale", "noted", "library", "last, by a loop without the library"], rows)
    return text + origin(record, "psg_noise")


@simple("strength_zero")
def strength_zero(record: dict[str, Any]) -> str:
    """Tensors that differ from the base optimizer's."""
    rows = []
    for row in record["results"]["rows"]:
        differing = row["differing"]
        cells = [str(differing[k]) for k in ("base_again", "strength_zero", "not_started", "strength_one")]
        rows.append([f"{row['optimizer']}, {row['implementation']}, {row['form']} form", str(row["tensors"]), *cells])
    steps = record["config"]["steps"]
    text = f"Tensors (weights, buffers, optimizer state, gradients) that differ in any bit after {steps} steps.\n\n"
    head = ["optimizer", "tensors", "base again", "strength 0", "not started", "strength 1 (must differ)"]
    return text + markdown(head, rows)


# --- ADMM --------------------------------------------------------------------------------------------------------


@simple("admm_quadratic")
def admm_quadratic(record: dict[str, Any]) -> str:
    """How often each variant finds the brute-force optimum, by kind of set."""
    config = record["config"]
    kinds = list(dict.fromkeys(row["kind"] for row in record["results"]["small"]))
    rows: dict[str, list[str]] = {}
    for row in record["results"]["small"]:
        cells = rows.setdefault(row["variant"], [])
        cells += [f"{row['optimum']['mean']:.0f}", f"{row['above']['mean']:.0f}", f"{row['distance']['mean']:.2g}"]
    text = (
        f"{config['problems']} problems a seed and kind, {config['steps']} steps. Optimum: % of problems whose "
        "brute-force optimum was found; above: mean % of the loss above it; left: % |w - q| / |w| before the last "
        "projection.\n\n"
    )
    head = ["variant", *(f"{kind}: {what}" for kind in kinds for what in ("optimum", "above", "left"))]
    return text + markdown(head, [[name, *cells] for name, cells in rows.items()])


@table("admm-forms")
def admm_forms(records: Path) -> str:
    """Where the two forms of the pull end under SGD and under Adam."""
    record = read(records, "admm_quadratic")
    if record is None:
        return NOTHING
    rows = [
        [f"{row['optimizer']}, {row['form']}", spread(row["end"], 3), f"{row['optimum']:.3f}"]
        for row in record["results"]["forms"]
    ]
    return markdown(["optimizer and form", "ends at", "optimum of loss and penalty"], rows)


@table("admm-lenet")
def admm_lenet(records: Path) -> str:
    """LeNet-5 on MNIST, every job that has a record; test accuracies, last epoch."""
    return _admm_lenet(records, held_out=False)


@table("admm-lenet-rivals")
def admm_lenet_rivals(records: Path) -> str:
    """The same, trained without a held-out part of the images: the jobs that the curves come from."""
    return _admm_lenet(records, held_out=True)


def _admm_lenet(records: Path, held_out: bool) -> str:
    rows, commits = [], set()
    for path in sorted(records.glob("admm-lenet-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if ("-holdout" in path.stem) != held_out or "-bf16-" in path.stem:
            continue
        found = record["results"]["summary"]
        cells = [spread(found[key], digits) if key in found else "" for key, digits in _LENET_COLUMNS.items()]
        epochs = str(record["config"]["epochs"])
        rows.append([path.stem.removeprefix("admm-lenet-"), str(len(record["seeds"])), epochs, *cells])
        commits.add((record["environment"]["commit"] or "no commit")[:9])
    if not rows:
        return NOTHING
    head = ["job", "seeds", "epochs", "full", "compressed", "weights kept", "rate", "bytes"]
    return markdown(head, rows) + f"\nRecords `admm-lenet-*`; commits {', '.join(sorted(commits))}.\n"


_LENET_COLUMNS = {"full": 2, "compressed": 2, "kept": 0, "rate": 1, "bytes": 0}


@simple("md_equalities")
def md_equalities(record: dict[str, Any]) -> str:
    """Gaps of paths, then counts of weights that differ in any bit."""
    results, steps = record["results"], record["config"]["steps"]
    text = f"Largest gap between the weights of two paths of {steps} steps, in float64.\n\n"
    pairs = list(dict.fromkeys(row["pair"] for row in results["paths"]))
    gaps = {(row["pair"], row["optimizer"]): f"{row['largest_gap']:.1e}" for row in results["paths"]}
    text += markdown(["pair", "SGD", "Adam"], [[p, gaps[p, "SGD"], gaps[p, "Adam"]] for p in pairs])
    text += "\nWeights that differ in any bit from those of STE, over whole paths.\n\n"
    rows = [
        [f"{row['target']}, {row['mechanism']}, {row['optimizer']}", f"{row['weights']:,}", f"{row['differing']:,}"]
        for row in results["hard_limits"]
    ]
    text += markdown(["target, mechanism, optimizer", "weights", "differing"], rows)
    other = results.get("torchao")
    if other is None:
        return text
    text += f"\nSTE on `Uniform` against torchao {other['version']}'s fake quantization of the same latents.\n\n"
    keys = ("weights", "differing", "of_these_at_a_tie")
    rows = [[str(row["bits"]), *(f"{row[k]:,}" for k in keys)] for row in other["rows"]]
    return text + markdown(["bits", "weights", "differing", "of these half-way between two levels"], rows)


@table("admm-lenet-trials")
def admm_lenet_trials(records: Path) -> str:
    """Ways that were tried on held-out images, in bfloat16."""
    rows, commits = [], set()
    for path in sorted(records.glob("admm-lenet-*-bf16-holdout5000.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        commits.add(record["environment"]["commit"][:9])
        (seed,) = record["results"]["seeds"]
        held = seed["history"][-1]["held_out"]
        lives = held["full"]["accuracy"], seed["test"]["full"]["accuracy"], seed["history"][-1]["accuracy"]
        name = path.stem.removeprefix("admm-lenet-").removesuffix("-bf16-holdout5000")
        rows.append([name, str(seed["history"][-1]["epoch"]), *(f"{value:.2f}" for value in lives)])
    if not rows:
        return NOTHING
    text = "Accuracy (%) after the last epoch, one seed; 55,000 images trained on, in bfloat16 autocast.\n\n"
    head = ["job", "epochs", "5,000 held-out images", "test images", "training images, warped"]
    named = ", ".join(sorted(commits))
    return text + markdown(head, rows) + f"\nRecords `admm-lenet-*-bf16-holdout5000`; commits {named}.\n"


def mirror(record: dict[str, Any]) -> str:
    """Test accuracy of both lives by rival, and its rate."""
    keys = ("full.accuracy", "compressed.recipe.data_free.accuracy", "compressed.recipe.batchnorm.accuracy")
    rows = []
    for rival, found in record["results"]["rivals"].items():
        cells = [spread(found["summary"][key], 2) if key in found["summary"] else "–" for key in keys]
        rows.append([f"`{rival}`", f"{found['lr']:g}", *cells])
    epochs = record["config"]["epochs"]
    text = f"Test accuracy (%) after {epochs} epoch{'s' * (epochs > 1)}, mean and spread over seeds.\n\n"
    head = ["rival", "learning rate", "full", "compressed", "compressed, BatchNorm re-estimated"]
    return text + markdown(head, rows)


_DIGITS = ("md-digits", "md-digits-scale", "md-digits-ternary", "md-digits-ternary-scale")
for _name in (*_DIGITS, "md-resnet8", "md-resnet8-scale", "md-resnet8-seeds", "md-resnet8-long", "md-resnet18"):
    simple(_name)(mirror)


@simple("warp")
def warp(record: dict[str, Any]) -> str:
    """Steps against the reference, the way there and back, the order."""
    results = record["results"]
    steps = record["config"]["steps"]
    forms = {"paper": "paper's units, SGD", "gradient": "gradient form, SGD", "update": "update form, AdamW"}
    text = f"Largest gap between library and reference over {steps} steps in float64, in cells, by width.\n\n"
    by_form = {form: {r["bits"]: r for r in results["steps"] if r["form"] == form} for form in forms}
    bits = record["config"]["bits"]
    text += markdown(
        ["form", *(f"{b} bits" for b in bits)],
        [[forms[f], *(f"{found[b]['largest_gap_cells']:.1e}" for b in bits)] for f, found in by_form.items()],
    )
    text += (
        "\nThe warp there and back, and the order in the learning rate of the gap between a PSG step and a gradient "
    )
    text += "step in the warped space (the theorem says 2).\n\n"
    rows = []
    for trip in results["round_trip"]:
        orders = [f"{r['slope']:.4f} ({r['form']})" for r in results["order"] if r["warp"] == trip["warp"]]
        rising = "yes" if trip["strictly_increasing"] else "no"
        rows.append([trip["warp"], f"{trip['largest_gap']:.1e}", rising, ", ".join(orders)])
    return text + markdown(["warp", "round trip, largest gap", "strictly increasing", "order (form)"], rows)


@simple("bytes_on_disk")
def bytes_on_disk(record: dict[str, Any]) -> str:
    """Bytes by where they are."""
    plain = record["results"]["plain_safetensors_bytes"]
    parts_of, files_of = [], []
    for row in record["results"]["rows"]:
        size, files = row["sizes"], row["files"]
        parts = [size["codes"], size["params"], size["rest"], size["header"]]
        if sum(parts) != size["file"] or size["file"] != files["bitpacked"]["file"]:
            raise ValueError(f"bytes_on_disk: the parts of {row['preset']} do not add up to its file")
        parts_of.append([row["preset"], *(f"{n:,.0f}" for n in (size["nominal_bits"] / 8, *parts, size["file"]))])
        whole = [files[coding]["file"] for coding in ("none", "bitpacked", "entropy")]
        least, coded = row["entropy_bytes"], files["entropy"]["coded"]
        files_of.append(
            [
                row["preset"],
                *(f"{n:,}" for n in (*whole, row["file_safetensors"])),
                f"{8 * whole[-1] / size['weights']:.2f}",
                f"{plain / whole[-1]:.2f}x",
                f"{least:,.0f}",
                f"{coded:,} ({100 * (coded / least - 1):+.1f} %)",
            ]
        )
    head = ["preset", "none", "bit-packed", "entropy", "safetensors form", "bits a weight, all in", "smaller"]
    text = (
        f"Bytes of the compressed life of ResNet-32 ({plain:,} bytes as a plain safetensors file), by coding. The last "
    )
    text += "two columns are of the coded tensors alone: zero-order entropy of their codes (raw numbers as they are), "
    text += "and bytes written with their scales (and how much more that is).\n\n"
    text += markdown([*head, "entropy of the codes", "written"], files_of)
    text += "\nWhere the bytes of the bit-packed file are.\n\n"
    return text + markdown(["preset", "nominal", "codes", "params", "BatchNorm and biases", "header", "file"], parts_of)


@simple("squeezenet")
def squeezenet(record: dict[str, Any]) -> str:
    """The parts of the file against what they were, and every tensor's codes against their entropy."""
    found = record["results"]
    parts = [
        ["codes of the weights", found["entropy_of_weights_bytes"], found["codes_bytes"]],
        ["levels", found["levels_float32_bytes"], found["levels_bytes"]],
        ["biases", found["biases_float32_bytes"], found["biases_bytes"]],
    ]
    rows = [[name, f"{before:,.0f}", f"{after:,}"] for name, before, after in parts]
    rows.append(["header, names, checksums", "", f"{found['header_bytes']:,}"])
    total = sum(before for _, before, _ in parts)
    rows.append(["whole file", f"{total:,.0f}", f"{found['file_bytes']:,}"])
    bits = "bit for bit" if found["read_back_bitwise"] else "NOT bit for bit"
    text = f"The file decodes to the released weights {bits}. The authors' own file, Huffman-coded, has "
    text += f"{found['authors_bytes']:,} bytes; ours bit-packed {found['bitpacked_bytes']:,}. Saving took "
    text += f"{found['save_cpu_seconds']:.0f} and loading {found['load_cpu_seconds']:.0f} seconds of one core.\n\n"
    text += markdown(["part", "zero-order entropy, or float32 (bytes)", "written (bytes)"], rows)
    each = [
        [
            f"`{row['name']}`",
            "x".join(map(str, row["shape"])),
            f"{100 * row['nonzero']:.0f} %",
            f"{row['entropy_bytes']:,.0f}",
            f"{row['codes_bytes']:,} ({100 * (row['codes_bytes'] / row['entropy_bytes'] - 1):+.1f} %)",
            f"{row['levels_bytes']:,}",
        ]
        for row in found["rows"]
    ]
    head = ["weight", "shape", "not zero", "entropy of codes", "codes", "256 levels"]
    return text + "\nBytes of each weight, its codes and its levels coded by themselves.\n\n" + markdown(head, each)


@simple("lenet_bytes")
def lenet_bytes(record: dict[str, Any]) -> str:
    """Every seed's file."""
    rows = [
        [
            str(row["seed"]),
            f"{row['trained']:.2f}",
            f"{row['accuracy']:.2f}",
            f"{sum(row['survivors_folded'].values()):,}",
            f"{row['bytes_bitpacked']:,}",
            f"{row['bytes_entropy']:,}",
            f"{4 * 430_500 / row['bytes_entropy']:.0f}x",
        ]
        for row in record["results"]["rows"]
    ]
    head = ["seed", "trained (%)", "from the file (%)", "weights", "bytes, bitpacked", "bytes, coded", "of float32"]
    return markdown(head, rows)


@simple("layer_bytes")
def layer_bytes(record: dict[str, Any]) -> str:
    """One layer by whom it was written."""
    found = record["results"]
    peers = [[f"{name} {found[name]['version']}", f"{found[name]['bytes']:,}"] for name in ("torchao", "quanto")]
    rows = [["float32", f"{found['float32_bytes']:,}"], *peers]
    for scale, words in (("tensor", "one scale"), ("group", "a scale for 32 weights")):
        ours = found[scale]
        rows += [[f"Detent, {words}, {coding}", f"{ours[coding]:,}"] for coding in ("none", "bitpacked", "entropy")]
        rows.append([f"its codes alone: zero-order entropy, {words}", f"{ours['codes_entropy']:,.0f}"])
        rows.append([f"its codes alone: zstd -19 of the packed bits, {words}", f"{ours['codes_zstd19_of_bits']:,}"])
    return markdown(["file of one 1024 x 1024 layer at 2 bits", "bytes"], rows)


@simple("mask_models")
def mask_models(record: dict[str, Any]) -> str:
    """By how much masks exceed the best ideal gap model, with and without the models of distance."""
    cells: dict[tuple[str, int], dict[float, str]] = {}
    for row in record["results"]["rows"]:
        best = min(row["rivals"].values())
        now, before = (100 * (row[key] / best - 1) for key in ("bytes", "before"))
        many = isinstance(record["config"]["checkpoint"], str) and row["kind"] == record["config"]["checkpoint"]
        key = (row["kind"], 0 if many else row["places"])
        cells.setdefault(key, {})[row["density"]] = f"{row['bytes']:,.0f}: {now:+.1f} ({before:+.1f})"
    densities = record["config"]["densities"]
    rows = [
        [kind, f"{places:,}" if places else "", *(mine.get(density, "") for density in densities)]
        for (kind, places), mine in cells.items()
    ]
    text = "Bytes of a mask: % above the best of six ideal gap models (the same without the models of distance).\n\n"
    return text + markdown(["ones fall", "places", *(f"{100 * density:g} %" for density in densities)], rows)


@simple("coding_speed")
def coding_speed(record: dict[str, Any]) -> str:
    """Megabytes of float32 a second."""
    rows = [
        [
            row["target"],
            row["coding"],
            f"{row['bytes'] / 1e6:.1f}",
            *(f"{row[key]:.0f}" for key in ("save_mb_per_s", "encode_mb_per_s", "load_mb_per_s")),
            f"{row['memory_of_loaded']:.2f}x",
        ]
        for row in record["results"]["rows"]
    ]
    text = f"A model of {record['results']['weights'] / 1e6:.1f} million weights, one core.\n\n"
    what = ["save (MB/s)", "of it coding (MB/s)", "load (MB/s)", "memory to load, of what is loaded"]
    return text + markdown(["target", "coding", "file (MB)", *what], rows)


@simple("demo_times")
def demo_times(record: dict[str, Any]) -> str:
    """Seconds by method."""
    rows = [[f"`--method {method}`", f"{found['seconds']:.0f}"] for method, found in record["results"].items()]
    return markdown(["demo", "seconds"], rows)


@simple("fuzz")
def fuzz(record: dict[str, Any]) -> str:
    """Outcomes by kind of damage, and what killed saves left."""
    results = record["results"]
    outcomes, killed = results["outcomes"], results["killed"]
    columns = ["FormatError", "ValueError", "identical", "another file", "unchanged"]
    if odd := {what for found in outcomes.values() for what in found} - {*columns}:
        raise ValueError(f"fuzz: outcomes that must not be: {sorted(odd)}")
    rows = [[kind, *(f"{found.get(what, 0):,}" for what in columns)] for kind, found in outcomes.items()]
    whole, trials = killed["whole_file"].get("old or new file", 0), killed["trials"]
    slowest, grown = 1e3 * results["slowest_cpu_seconds"], results["most_grown_bytes"] / 1e6
    changed = results["files"] - sum(found.get("unchanged", 0) for found in outcomes.values())
    text = f"{changed:,} mutated files; the slowest took {slowest:.0f} ms of CPU time, and memory grew by at "
    text += f"most {grown:.0f} MB in a process of many thousand.\n\n"
    text += markdown(["damage", *columns], rows)
    text += f"\nKill -9 at random moments of {trials} saves: the name stood for the whole old or the whole new file "
    left = killed["left_a_temporary_file"]
    text += f"{whole} times; {left} times a hidden file was left, and the next save removed it.\n"
    parts = {"meaning": _meaning, "interrupted": _interrupted}  # a record of before they were there has none of them
    return text + "".join(show(results[part]) for part, show in parts.items() if part in results)


def _meaning(part: dict[str, Any]) -> str:
    """Files that are sound in every checksum and mean what their target cannot."""
    columns = ["FormatError", "a member of the set", "cannot be written"]
    if part["wrong"]:
        raise ValueError(f"fuzz: {part['wrong'][0]}")
    rows = [[kind, *(f"{found.get(what, 0):,}" for what in columns)] for kind, found in part["outcomes"].items()]
    text = (
        f"\n{part['files']:,} forged tensors, sound in every checksum, with one thing that is not so; the slowest took "
    )
    return text + f"{1e3 * part['slowest_cpu_seconds']:.0f} ms of CPU time.\n\n" + markdown(["changed", *columns], rows)


def _interrupted(part: dict[str, Any]) -> str:
    """What an exception at a line of the engine leaves."""
    columns = ["old", "new", "same", "moved"]
    if part["wrong"]:
        raise ValueError(f"fuzz: {part['wrong'][0]}")
    rows = [[act, *(f"{found.get(what, 0):,}" for what in columns)] for act, found in part["counts"].items()]
    total = sum(sum(found.values()) for found in part["counts"].values())
    text = (
        f"\n{total:,} exceptions, one at every line of {part['stride']} that {len(part['mechanisms'])} trainings run: "
    )
    text += (
        "the old state was left, the new one, or one that is both (`moved`: between the optimizer's own step and our "
    )
    text += "first line after it); each training then went on to the same end.\n\n"
    return text + markdown(["broken off", *columns], rows)


@simple("resume")
def resume(record: dict[str, Any]) -> str:
    """Whether a resumed run is the unbroken one, by mechanism and way."""
    results = record["results"]
    ways = list(next(iter(results.values())))

    def said(found: dict[str, float]) -> str:
        if not any(found.values()):
            return "bitwise"
        return f"off by {found['first_forward']:.1g}, then {found['end']:.1g}"

    rows = [[name, *(said(found[way]) for way in ways)] for name, found in results.items()]
    return markdown(["mechanism", *ways], rows)


@simple("training_memory")
def training_memory(record: dict[str, Any]) -> str:
    """Multiples of the model."""
    config, results = record["config"], record["results"]
    millions = 9 * config["layers"] * config["width"] ** 2 / 1e6
    text = f"{millions:.1f} million weights of convolutions; in multiples of the model's bytes, beyond the model, its "
    text += "gradients and whatever the process held before.\n\n"
    rows = [[name, *(f"{row[key]:.1f}" for key in ("kept", "attach", "step"))] for name, row in results.items()]
    return text + markdown(["training", "kept between steps", "most while attaching", "most in a step"], rows)


@table("step-cost")
def step_cost(records: Path) -> str:
    """Ratios to the plain optimizer, before the fits and passes were made fast and now."""
    now, before = read(records, "step_cost"), read(records, "step_cost-before")
    if now is None:
        return NOTHING
    results, old = now["results"], {} if before is None else before["results"]

    def cell(of: dict[str, Any], section: str, name: str, key: str = "ratio") -> str:
        row = of.get(section, {}).get(name)
        if row is None:
            return "–"
        if key != "ratio":
            return f"{row[key]:.2f}"
        ratio = row["ratio"]
        digits = 3 if section in ("llama", "resnet20") else 2
        return f"{ratio['median']:.{digits}f} ({ratio['quartile_1']:.{digits}f} to {ratio['quartile_3']:.{digits}f})"

    names = list({name: None for section in ("llama", "resnet20", "optimizer") for name in results.get(section, {})})
    config = now["config"]
    text = "Wall time beside the plain optimizer = 1: median (quartiles) over neighbouring steps.\n\n"
    head = ["mechanism and target", "Llama step, before", "now", "ResNet-20 step, before", "now"]
    rows = []
    for name in names:
        cells = (cell(of, section, name) for section in ("llama", "resnet20") for of in (old, results))
        rows.append([name, *cells])
    text += markdown(head, rows)
    text += f"\nLlama step: {config['llama']}. ResNet-20 step: {config['resnet20']}.\n"
    text += f'\nThe optimizer\'s step alone ({config["optimizer"]}); "with fits": mean CPU time over {config["steps"]} '
    text += (
        "steps, the fits that fall into them included; kept: bytes a weight that the mechanism holds between steps.\n\n"
    )
    head = ["mechanism and target", "before", "now", "with fits, before", "now", "attach (s), before", "now", "kept"]
    rows = []
    for name in results.get("optimizer", {}):
        both = [cell(of, "optimizer", name, key) for key in ("ratio", "mean_ratio") for of in (old, results)]
        attach = [cell(of, "optimizer", name, "attach_cpu_seconds") for of in (old, results)]
        rows.append([name, *both, *attach, cell(results, "optimizer", name, "kept_bytes_per_weight")])
    text += markdown(head, rows)
    text += f"\n{config['small']}: microseconds of CPU that a step adds a tensor, fits included.\n\n"
    rows = []
    for name in results.get("small", {}):
        rows.append([name, *(cell(of, "small", name, "added_us_per_tensor") for of in (old, results))])
    text += markdown(["mechanism and target", "before", "now"], rows)
    ends = "" if before is None else origin(before, "step_cost-before")
    return text + ends + origin(now, "step_cost")


@table("cadence")
def cadence(records: Path) -> str:
    """Accuracy by the steps between fits."""
    record = read(records, "cadence")
    if record is None:
        return NOTHING
    rows = []
    every = list(next(iter(next(iter(record["results"].values())).values())))
    for name, optimizers in record["results"].items():
        for optimizer, found in optimizers.items():
            cells = [f"{found[n]['mean']:.1f} ({found[n]['low']:.1f} to {found[n]['high']:.1f})" for n in every]
            rows.append([name, optimizer, *cells])
    head = ["mechanism and target", "optimizer", *(f"every {n}" if n != "once" else n for n in every)]
    text = (
        f"Percent right on held-out images, mean (range) over {len(record['seeds'])} seeds, by steps between fits.\n\n"
    )
    return text + markdown(head, rows) + origin(record, "cadence")


@table("budget")
def budget(records: Path) -> str:
    """Accuracy by bytes of whole files, without training."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in records.glob("budget*.json")}
    found = {name: record for name, record in found.items() if "rows" in record["results"]}
    if not found:
        return NOTHING
    parts = []
    for name, record in sorted(found.items(), key=lambda item: (item[0] != "budget", item[0])):
        results, words = record["results"], record["config"]["network"]["words"]
        rows = results["rows"]
        budgets = list(dict.fromkeys(row["budget"] for row in rows if "budget" in row))
        columns = {
            "nearest places": ("nearest", "step", None),
            "prior, no data": ("prior", "step", None),
            **{
                f"{count} training images": ("inputs", "step", count)
                for count in dict.fromkeys(row["images"] for row in rows if "images" in row)
            },
            "widths, nearest places": ("nearest", "widths", None),
            "widths, prior": ("prior", "widths", None),
        }
        sized = {(r["budget"], r["places"], r["choices"], r.get("images")): r for r in rows if "budget" in r}
        columns = {head: key for head, key in columns.items() if any((b, *key) in sized for b in budgets)}
        cells = [
            [
                b if isinstance(b, str) else f"{b:,} bytes",
                *(f"{sized[(b, *key)]['accuracy']:.2f}" if (b, *key) in sized else "" for key in columns.values()),
            ]
            for b in budgets
        ]
        text = (
            f"Test accuracy (%) of {words}, at full precision {results['float']['accuracy']:.2f}, in files of at most\n"
        )
        text += "so many bytes, everything counted:\n\n" + markdown(["at most", *columns], cells)
        others = [(f"ours, {r['choices']} a channel", r) for r in rows if "budget" not in r]
        others += [(f"NNCodec {results['versions']['nncodec']}, qp {r['qp']}", r) for r in results.get("nncodec", [])]
        text += "\nWithout a budget:\n\n" + markdown(
            ["file", "bytes", "accuracy"], [[what, f"{r['bytes']:,}", f"{r['accuracy']:.2f}"] for what, r in others]
        )
        seconds = {
            head: [r["seconds"] for r in rows if "budget" in r and (r["places"], r["choices"], r.get("images")) == key]
            for head, key in columns.items()
        }
        spent = "; ".join(f"{head}, {min(s):.0f} to {max(s):.0f}" for head, s in seconds.items())
        parts.append(f"{text}\nSeconds of one thread for a file, the search included: {spent}.\n{origin(record, name)}")
    return "\n".join(parts)


@table("budget-trained")
def budget_trained(records: Path) -> str:
    """Accuracy of networks trained under a budget."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in records.glob("budget-trained-*.json")}
    if not found:
        return NOTHING
    rows = []
    for name, record in sorted(found.items(), key=lambda item: item[1]["results"]["bytes"]):
        results, config = record["results"], record["config"]
        cells = (f"{results['bytes']:,}", f"{results['accuracy']:.2f}", str(config["epochs"]), config["precision"])
        rows.append([f"`{name}`", *cells])
    head = ["record", "bytes of the file", "test accuracy (%)", "epochs", "precision"]
    text = "ResNet-20 on CIFAR-10 from its checkpoint of 91.73 %, straight-through at the rate of the budget.\n\n"
    commits = ", ".join(sorted({record["environment"]["commit"][:9] for record in found.values()}))
    return text + markdown(head, rows) + f"\nRecords `budget-trained-*`; one seed each; commits {commits}.\n"


@table("activations")
def activations(records: Path) -> str:
    """Accuracy with rounded activations, calibrated and trained."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in records.glob("activations-w*.json")}
    if not found:
        return NOTHING
    rows, calibrated = [], {}
    for record in found.values():
        calibrated |= record["results"]["calibrated"]
    for bits, accuracy in sorted(calibrated.items(), key=lambda item: -int(item[0])):
        rows.append([f"W{bits}A{bits}", "calibrated", f"{accuracy:.2f}", "", "", "", ""])
    for name, record in sorted(found.items(), reverse=True):
        results, config, onnx = record["results"], record["config"], record["results"]["onnx"]
        same = f"{onnx['same_answer']:,} of {onnx['images']:,}"
        cells = (f"{results['accuracy']:.2f}", str(config["epochs"]), f"{results['bytes']:,}", config["precision"])
        rows.append([name.removeprefix("activations-").upper(), "trained", *cells, same])
    head = ["width", "", "test accuracy (%)", "epochs", "bytes of the file", "trained in", "same answers in ORT"]
    config = next(iter(found.values()))["config"]
    text = "ResNet-20 on CIFAR-10 from its checkpoint of 91.73 %; first and last layer at "
    text += f"{config['first and last layer']}; calibrated on {config['calibrated on']}; BatchNorm "
    text += f"{config['BatchNorm']}; ORT: ONNX Runtime on test images.\n\n"
    commits = ", ".join(sorted({record["environment"]["commit"][:9] for record in found.values()}))
    return text + markdown(head, rows) + f"\nRecords `activations-*`; one seed each; commits {commits}.\n"


@table("step-peers")
def step_peers(records: Path) -> str:
    """Others beside ours, a whole training step."""
    record = read(records, "step_cost-peers")
    if record is None:
        return NOTHING
    rows = []
    found = record["results"]["peers"]
    for name, row in sorted(found.items(), key=lambda item: item[1]["ratio"]["median"]):
        ratio = row["ratio"]
        rows.append([name, f"{ratio['median']:.3f} ({ratio['quartile_1']:.3f} to {ratio['quartile_3']:.3f})"])
    versions = ", ".join(f"{name} {version}" for name, version in record["results"]["versions"].items())
    text = f"{record['config']['llama']}; plain = 1; {versions}.\n\n"
    return text + markdown(["training step", "wall time: median (quartiles)"], rows) + origin(record, "step_cost-peers")


# --- the experiment of the paper --------------------------------------------------------------------------------


def rivals(records: Path) -> dict[str, dict[str, Any]]:
    """The records of the CIFAR-100 experiment by rival, in the order of RIVALS."""
    prefix = "psg-cifar100-"
    found = {path.stem.removeprefix(prefix): path for path in records.glob(f"{prefix}*.json")}
    order = [r for r in RIVALS if r in found] + sorted(found.keys() - set(RIVALS))
    return {r: json.loads(found[r].read_text(encoding="utf-8")) for r in order}


def own_bits(record: dict[str, Any]) -> int | None:
    """Width of the record's own compressed life, which is called "recipe" in its results."""
    recipe = record["config"]["recipe"] or record["config"]["evaluate_recipe"]
    return recipe["rules"][-1]["target"].get("bits")


def life_of(record: dict[str, Any], bits: int) -> str:
    """Name of the life at a width."""
    return "recipe" if own_bits(record) == bits else str(bits)


def number(record: dict[str, Any], key: str, digits: int) -> str:
    """An entry of the summary, or a dash."""
    found = record["results"]["summary"].get(key)
    return "–" if found is None else spread(found, digits)


def origins(found: dict[str, dict[str, Any]]) -> str:
    """Commits, seeds and machine of several records in one line."""
    places = [r["environment"] for r in found.values()]
    commits = sorted({(p["commit"] or "none")[:9] + ("+" if p["dirty"] else "") for p in places})
    machines = sorted({", ".join(p["hardware"]["gpu"]) or p["hardware"]["cpu"] for p in places})
    seeds = ", ".join(map(str, sorted({s for r in found.values() for s in r["seeds"]})))
    epochs = ", ".join(map(str, sorted({r["config"]["epochs"] for r in found.values()})))
    return (
        f"\nRecords `psg-cifar100-*`: {epochs} epochs; seeds {seeds}; commits "
        f"{', '.join(commits)} (+: uncommitted changes); {', '.join(machines)}.\n"
    )


@table("psg-cifar100")
def psg_cifar100(records: Path) -> str:
    """Test accuracy of every rival in every life."""
    found = rivals(records)
    if not found:
        return NOTHING
    rows = []
    for rival, record in found.items():
        row = [f"`{rival}`", number(record, "full.accuracy", 2)]
        for bits in WIDTHS:
            life = f"compressed.{life_of(record, bits)}"
            row += [number(record, f"{life}.data_free.accuracy", 2), number(record, f"{life}.batchnorm.accuracy", 2)]
        rows.append(row)
    columns = [f"W{bits}{how}" for bits in WIDTHS for how in ("", " BN")]
    text = "Test accuracy (%); W4: rounded to 4 bits without data; BN: BatchNorm re-estimated on training images.\n\n"
    text += markdown(["rival", "full", *columns], rows)
    return text + "".join(choice(rival, record) for rival, record in found.items()) + origins(found)


def choice(rival: str, record: dict[str, Any]) -> str:
    """What was tuned for a rival, and what each try gave."""
    tuned = record["results"].get("tuned")
    if tuned is None:
        return ""
    what = next(key for key in tuned if key not in ("epochs", "held_out"))
    found = sorted((float(value), lives["compressed"]) for value, lives in tuned["held_out"].items())
    tries = ", ".join(f"{value:g}: {accuracy:.1f}" for value, accuracy in found)
    epochs = f"{tuned['epochs']} epoch{'s' if tuned['epochs'] > 1 else ''}"
    return (
        f"\n`{rival}`: {what} {tuned[what]:.3g}, the best after {epochs} on images held out from the "
        f"train split (the checkpoint has seen them); accuracy (%) of the compressed life, data-free: {tries}.\n"
    )


@table("psg-cifar100-weights")
def psg_cifar100_weights(records: Path) -> str:
    """How far the two lives' weights are apart."""
    found = rivals(records)
    if not found:
        return NOTHING
    rows = []
    for rival, record in found.items():
        row = [f"`{rival}`"]
        for bits in WIDTHS:
            life = f"compressed.{life_of(record, bits)}.weights"
            row += [number(record, f"{life}.error", 5), number(record, f"{life}.wasserstein", 5)]
        rows.append(row)
    columns = [f"W{bits} {what}" for bits in WIDTHS for what in ("error", "gap")]
    text = "Means over layers; error: |w - q|² / |w|²; gap: 1-Wasserstein distance of the two lives' weights.\n\n"
    return text + markdown(["rival", *columns], rows) + origins(found)


@table("psg-cifar100-pruned")
def psg_cifar100_pruned(records: Path) -> str:
    """Pruned and min-max lives, where a record has them."""
    found = rivals(records)
    rows = []
    for rival, record in found.items():
        summary = record["results"]["summary"]
        lives = sorted({key.split(".")[1] for key in summary if key.startswith("compressed.")})
        named = [life for life in lives if not life.isdigit() and (life != "recipe" or own_bits(record) is None)]
        for life in named:
            keys = [f"compressed.{life}.{how}.accuracy" for how in ("data_free", "batchnorm")]
            name = "its own: the 10 % largest" if life == "recipe" else life
            rows.append([f"`{rival}`", name, number(record, "full.accuracy", 2), *(number(record, k, 2) for k in keys)])
    if not rows:
        return NOTHING
    text = "Test accuracy (%) of further compressed lives: pruned (share of weights that go), or min-max ranges.\n\n"
    return text + markdown(["rival", "life", "full", "data-free", "BatchNorm re-estimated"], rows) + origins(found)


@table("kq-cifar100-error")
def kq_cifar100_error(records: Path) -> str:
    """Error of K-means alone, by size and scope of the codebook."""
    record = read(records, "kq-cifar100-error")
    if record is None:
        return NOTHING
    schemes: dict[str, dict[int | None, dict[str, Any]]] = {}
    for row in record["results"]["rows"]:
        schemes.setdefault(row["scheme"], {})[row["codebook_bits"]] = row
    lines = []
    for scheme, by_bits in schemes.items():
        stored = by_bits.get(6) or by_bits[None]
        unrounded = f"{by_bits[None]['error']:.3f}" if 6 in by_bits else "–"
        lines.append([scheme, f"{stored['bits_per_weight']:.2f}", f"{stored['error']:.3f}", unrounded])
    text = "|w - q|² / |w|² over all 3 x 3 kernels, without training; min-max: rounding weight by weight.\n\n"
    head = ["scheme", "bits a weight", "error", "error with a float codebook"]
    return text + markdown(head, lines) + origin(record, "kq-cifar100-error")


@table("kq-cifar100")
def kq_cifar100(records: Path) -> str:
    """Test accuracy with trained codebooks, and with weights of about as many bits."""
    found = {path.stem.removeprefix("kq-cifar100-"): path for path in sorted(records.glob("kq-cifar100-*.json"))}
    found.pop("error", None)
    if not found:
        return NOTHING
    rows, last = [], {}
    for rival, path in found.items():
        last = json.loads(path.read_text(encoding="utf-8"))
        bits = last["results"]["bits"]
        keys = ["full.accuracy", "compressed.recipe.data_free.accuracy", "compressed.recipe.batchnorm.accuracy"]
        if bits is None:  # trained as it is, and compressed afterwards with no more training
            rows.append(["`none`", "32", number(last, keys[0], 2), "–", "–"])
            alone = (number(last, f"compressed.kq-512.{how}.accuracy", 2) for how in ("data_free", "batchnorm"))
            same = json.loads(found["kq-512"].read_text(encoding="utf-8"))["results"]["bits"]["total"]
            rows.append(["`none`, then K-means of 512", f"{same:.2f}", number(last, keys[0], 2), *alone])
            continue
        rows.append([f"`{rival}`", f"{bits['total']:.2f}", *(number(last, key, 2) for key in keys)])
    text = "Test accuracy (%); bits a weight over all convolutions; BN: BatchNorm re-estimated on training images.\n\n"
    head = ["rival", "bits a weight", "full", "compressed", "compressed, BN"]
    return text + markdown(head, rows) + f"\nRecords `kq-cifar100-*`: {last['config']['epochs']} epochs.\n"


# --- the front page ---------------------------------------------------------------------------------------------


@table("headlines")
def headlines(records: Path) -> str:
    """At most six results, each beside what a reader would use instead."""
    names = {
        "psg": "psg-cifar100-psg-w2",
        "sgd": "psg-cifar100-sgd",
        "demo": "demo-psg",
        "pruned": "admm-lenet-prune246",
        "dense": "admm-lenet-dense",
        "lenet": "lenet_bytes",
        "squeezenet": "squeezenet",
        "budget": "budget",
    }
    found = {short: read(records, name) for short, name in names.items()}
    if not all(found.values()):
        return NOTHING
    of = {short: record["results"] for short, record in found.items() if record is not None}
    widths, again = {}, {}
    for rival in ("psg", "sgd"):
        record = found[rival] or {}
        lives = ["full", *(f"compressed.{life_of(record, bits)}.data_free" for bits in (4, 3, 2))]
        widths[rival] = " / ".join(number(record, f"{life}.accuracy", 1) for life in lives)
        lives = [f"compressed.{life_of(record, bits)}.batchnorm" for bits in (4, 3, 2)]
        again[rival] = " / ".join(number(record, f"{life}.accuracy", 1) for life in lives)
    cells = [[row["cells"]["W2"]["accuracy"] for row in o["rows"]] for o in of["demo"]["outcomes"]]
    demo = [sum(column) / len(column) for column in zip(*cells, strict=True)]
    accuracy = {
        short: spread(of[short]["summary"][life], 2) for short, life in (("pruned", "compressed"), ("dense", "full"))
    }
    small = of["lenet"]["rows"]
    sizes = " and ".join(f"{row['bytes_entropy']:,}" for row in small)
    goods = " and ".join(f"{row['rounded']:.2f}" for row in small)
    ours = {(row["places"], row.get("images", 256), row.get("budget")): row for row in of["budget"]["rows"]}
    budgets = ("50 kB", "70 kB")
    by_place = {
        places: " / ".join(f"{ours[places, 256, budget]['accuracy']:.1f}" for budget in budgets)
        for places in ("prior", "inputs")
    }
    near = [min(of["budget"]["nncodec"], key=lambda row: abs(row["bytes"] - size)) for size in (50_000, 70_000)]
    codec = " / ".join(f"{row['accuracy']:.1f}" for row in near)
    kilobytes = " / ".join(f"{row['bytes'] / 1000:.1f}" for row in near)
    rows = [
        [
            f"ResNet-32, CIFAR-100, {(found['psg'] or {})['config']['epochs']} epochs from a trained network: "
            "one checkpoint at full / 4 / 3 / 2 bits, rounded without data (%)",
            f"PSG: {widths['psg']}",
            f"SGD: {widths['sgd']}",
        ],
        ["`make demo`: digits at 2 bits (%)", f"PSG: {demo[2]:.1f}", f"SGD: {max(demo[:2]):.1f}"],
        [
            "LeNet-5, MNIST: share of weights left, accuracy (%)",
            f"progressive ADMM: {100 / of['pruned']['summary']['rate']['mean']:.1f} %, {accuracy['pruned']}",
            f"dense: 100 %, {accuracy['dense']}",
        ],
        [
            "LeNet-5, MNIST, whole file: bytes, accuracy (%)",
            f"{sizes}, {goods}",
            f"dense, float32: {4 * small[0]['sizes']['weights']:,}, {accuracy['dense']}",
        ],
        [
            "SqueezeNet of Deep Compression, the same weights bit for bit (bytes)",
            f"{of['squeezenet']['file_bytes']:,}",
            f"the authors' Huffman-coded file: {of['squeezenet']['authors_bytes']:,}",
        ],
        [
            f"ResNet-20, CIFAR-10, in {' / '.join(budgets)} without training, whole file (%)",
            f"without data: {by_place['prior']}; with 256 unlabelled images: {by_place['inputs']}",
            f"NNCodec (ISO/IEC 15938-17): {codec} in {kilobytes} kB",
        ],
    ]
    seeds = {short: len(record["seeds"]) for short, record in found.items() if record is not None}
    notes = (
        f"With BatchNorm re-estimated on training images the first row reads at 4 / 3 / 2 bits: PSG {again['psg']}, "
    )
    notes += f"SGD {again['sgd']}. Seeds a row, from the top: {seeds['psg']}, {seeds['demo']}, {seeds['pruned']}, "
    notes += f"{seeds['lenet']}, 1, 1. "
    notes += f"Records: {', '.join(f'`{name}`' for name in names.values())}.\n"
    return markdown(["what", "Detent", "instead"], rows) + "\n" + notes


@table("demo-psg")
def demo_psg(records: Path) -> str:
    """What `detent demo` shows."""
    record = read(records, "demo-psg")
    if record is None:
        return NOTHING
    outcomes = record["results"]["outcomes"]
    rows = []
    lives = list(outcomes[0]["rows"][0]["cells"])
    for i, first in enumerate(outcomes[0]["rows"]):
        cells = [f"{first['name']}, {first['range']} range"]
        for life in lives:
            values = [o["rows"][i]["cells"][life]["accuracy"] for o in outcomes]
            size = first["cells"][life]["bytes"]
            low, high = min(values), max(values)
            mean = sum(values) / len(values)
            cells.append(f"{mean:.1f} ({low:.1f} to {high:.1f}), {size / 1000:.1f} kB")
        rows.append(cells)
    text = f"Test accuracy (%), mean (range) over {len(outcomes)} seeds, and size of the file that holds this life.\n\n"
    return text + markdown(["trained by", *lives], rows) + origin(record, "demo-psg")


@table("psg-defaults")
def psg_defaults(records: Path) -> str:
    """One factor at a time on held-out training images, a table a task."""
    parts = []
    for path in sorted(records.glob("psg-defaults-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for entry in record["results"]["summary"]:
            lives = [spread(entry[life], 2) for life in ("full", "data_free", "batchnorm")]
            gap = "" if entry["variant"] == "base" else spread(entry["data_free_minus_base"], 2)
            trained = f"{entry['trainings']}" + (f", {entry['diverged']} diverged" if entry["diverged"] else "")
            widths = ", ".join(map(str, entry["widths"]))
            rows.append([entry["variant"], widths, trained, *lives, gap])
        head = ["variant", "bits", "trainings", "full", "data-free", "BatchNorm re-estimated", "data-free minus base"]
        title = f"**{path.stem}**: held-out accuracy (%), mean over widths, then mean and spread over seeds.\n\n"
        parts.append(title + markdown(head, rows) + origin(record, path.stem))
    return "\n".join(parts) or NOTHING


@table("psg-auto")
def psg_auto(records: Path) -> str:
    """What the full life costs and what rounding costs with nothing said, a table a task."""
    parts = []
    for path in sorted(records.glob("psg-auto-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        unit, digits, scale = ("loss", 3, "nats") if path.stem.endswith("chars") else ("accuracy", 1, "points")
        rows = []
        for entry in record["results"]["summary"]:
            seeds = f"{len(entry['seeds'])}" + (f", {entry['diverged']} diverged" if entry["diverged"] else "")
            lives = ("full", "data_free", "full_minus_plain", "data_free_minus_full")
            cells = [spread(entry[unit][life], digits) for life in lives] if unit in entry else ["–"] * len(lives)
            cells[2] = "" if entry["variant"] == "plain" else cells[2]
            rows.append([entry["setting"], entry["variant"], f"W{entry['bits']}", seeds, *cells])
        head = ["setting", "trained", "bits", "seeds", "full", "data-free", "full minus plain", "data-free minus full"]
        title = f"**{path.stem}**: on held-out training examples, {unit} in {'%' if scale == 'points' else scale}.\n\n"
        parts.append(title + markdown(head, rows) + origin(record, path.stem))
    return "\n".join(parts) or NOTHING


@simple("psg-gain")
def psg_gain(record: dict[str, Any]) -> str:
    """Trials of PSG's gain on held-out images, by width."""
    results = record["results"]
    widths = sorted({bits for of in results["held_out"].values() for bits in of}, key=int, reverse=True)
    rows = []
    for gain, of in sorted(results["held_out"].items(), key=lambda item: float(item[0])):
        lives = [f"{of[b][life]:.2f}" if b in of else "–" for b in widths for life in ("full", "compressed")]
        mean = results["mean"].get(gain)
        rows.append([gain, *lives, "–" if mean is None else f"{mean:.2f}"])
    epochs = record["config"]["epochs"]
    text = f"Accuracy (%) after {epochs} epoch{'s' * (epochs > 1)} on {record['config']['holdout']:,} images held out "
    text += "from the train split, which the checkpoint has seen; W3: rounded to 3 bits without data.\n\n"
    columns = [f"trained for W{bits}, {what}" for bits in widths for what in ("full", f"W{bits}")]
    return text + markdown(["gain", *columns, "mean"], rows)


@simple("combination")
def combination(record: dict[str, Any]) -> str:
    """One set at once, or one after the other."""
    config = record["config"]
    names = config["names"]
    rows = []
    for row in record["results"]["rows"]:
        if row["way"] == "dense":
            continue
        kept = spread(row["one set"], 1) if "one set" in row else "–"
        rows.append([names[row["way"]], kept, spread(row["both"], 1), spread(row["bits"], 2)])
    dense = next(row for row in record["results"]["rows"] if row["way"] == "dense")
    start = spread(dense["trained"], 1)
    text = f"Digits, dense network {start} %, {config['epochs']} further epochs for every way.\n\n"
    what = f"in both sets, {config['n']}:{config['m']} and {config['bits']} bits"
    return text + markdown(["way", "in its own set", what, "bits a weight"], rows)


@simple("slim")
def slim(record: dict[str, Any]) -> str:
    """What removal of dead channels saves."""
    rows = []
    for row in record["results"]["rows"]:
        names = [row["network"], f"{row['keep']:.0%}", spread(row["dense"], 1), spread(row["before"], 1)]
        sizes = [f"{before['mean']:,.0f} → {after['mean']:,.0f}" for before, after in (row["parameters"], row["macs"])]
        speed = [spread(row["ratio"][str(batch)], 2) for batch in record["config"]["latency_batches"]]
        rows.append([*names, spread(row["after"], 1), *sizes, *speed])
    head = ["network, groups", "kept", "dense", "before", "after", "parameters", "multiply-accumulates"]
    return markdown([*head, *(f"time, batch {b}" for b in record["config"]["latency_batches"])], rows)


@simple("hf_llama")
def hf_llama(record: dict[str, Any]) -> str:
    """What transformers loads, beside our own life."""
    results = record["results"]
    text = f"{results['parameters']:,} parameters, {results['full_bytes']:,} bytes in float32.\n\n"
    rows = []
    for row in results["rows"]:
        bits = 8 * row["packed_bytes"] / row["packed_weights"]
        same = "bitwise" if row["logits_bitwise"] else f"{row['largest_difference']:.1e}"
        rows.append(
            [row["way"], same, f"{row['loss'][0]:.4f}", f"{row['loss'][1]:.4f}", f"{row['bytes']:,}", f"{bits:.2f}"]
        )
    return text + markdown(["life", "logits equal", "loss, ours", "loaded", "bytes", "bits a packed weight"], rows)


@simple("onnx_resnet32")
def onnx_resnet32(record: dict[str, Any]) -> str:
    """Bytes and predictions of one network in ONNX Runtime."""
    results, images = record["results"], record["config"]["test_images"]
    full = results["full"]
    rows = [["full precision", "–", f"{full['onnx']['bytes']:,}", f"{full['top1']:.2f}", "–", "–", "–"]]
    for row in results["weights"]:
        sizes = [f"{row['detent_bytes']:,}", f"{row['onnx']['bytes']:,}"]
        same = [f"{row[way]['top1']:.2f}, {row[way]['differing']} differ" for way in ("off", "on")]
        gap = max(row[way]["largest_difference"] / row[way]["largest_logit"] for way in ("off", "on"))
        rows.append([row["name"], *sizes, f"{row['torch']['top1']:.2f}", *same, f"{gap:.1e}"])
    head = ["life", ".detent, bytes", ".onnx, bytes", "PyTorch, %", "optimizations off", "on", "largest difference"]
    return f"CIFAR-100, {images:,} test images; the difference is a share of the largest logit.\n\n" + markdown(
        head, rows
    )


@table("onnx-resnet32-activations")
def onnx_resnet32_activations(records: Path) -> str:
    """Rounded activations, and latency."""
    record = read(records, "onnx_resnet32")
    if record is None:
        return NOTHING
    rows = []
    for row in record["results"]["activations"]:
        kernels = ", ".join(f"{n} {kind}" for kind, n in row["onnx"]["kernels"].items() if kind.startswith("QL"))
        rows.append([row["name"], row["method"], f"{row['onnx']['bytes']:,}", f"{row['on']['top1']:.2f}", kernels])
    text = markdown(["life", "ranges", ".onnx, bytes", "ONNX Runtime, %", "integer kernels"], rows) + "\n"
    found: dict[tuple[str, bool], dict[int, float]] = {}
    base: dict[int, float] = {}
    for row in record["results"]["latency"]:
        if row["name"] == "fp32":
            base[row["batch"]] = row["median_ms"]
        found.setdefault((row["name"], row["folded_at_load"]), {})[row["batch"]] = row["ratio"]
    rows = [
        [f"{name.removesuffix('-folded')}{', dequantized at load' if folded else ''}", *(f"{r[b]:.2f}" for b in base)]
        for (name, folded), r in found.items()
    ]
    times = ", ".join(f"{ms:.2f} ms at batch {batch}" for batch, ms in base.items())
    text += f"Time as a multiple of full precision ({times}); medians of one interleaved run, one thread.\n\n"
    return text + markdown(["life", *(f"batch {b}" for b in base)], rows) + origin(record, "onnx_resnet32")


@simple("integer")
def integer(record: dict[str, Any]) -> str:
    """Accuracy of integers alone."""
    head = ["weights, activations", "ranges", "full precision", "float activations", "integers alone", "same answer"]
    rows = []
    for row in record["results"]["digits"]:
        found = [spread(row[key], 1) for key in ("full", "float", "integer", "same_answer")]
        rows.append([f"W{row['weights']}A{row['activations']}, digits", row["method"], *found])
    for row in record["results"]["cifar100"]:
        found = [f"{row[key]:.1f}" for key in ("full", "float", "integer", "same_answer")]
        rows.append([f"W{row['weights']}A{row['activations']}, ResNet-32, CIFAR-100", row["method"], *found])
    return markdown(head, rows)


@simple("calibration")
def calibration(record: dict[str, Any]) -> str:
    """What calibration gives back."""
    results, config = record["results"], record["config"]
    text = f"Test accuracy (%) of ResNet-20, CIFAR-10, all weights; at full precision {results['full']:.2f}.\n\n"
    found = {(row["places"], row["images"], row["bits"]): row for row in results["rows"]}
    rows = []
    for places, images in dict.fromkeys((row["places"], row["images"]) for row in results["rows"]):
        cells = [found[places, images, bits] for bits in config["widths"]]
        for end, key in (("", "own"), (", BatchNorm re-estimated", "re-estimated")):
            rows.append([places + end, f"{images:,}" if images else "none", *(spread(row[key], 2) for row in cells)])
    text += markdown(["places", "images", *(f"W{bits}" for bits in config["widths"])], rows)
    seconds = [row["seconds"]["mean"] for row in results["rows"] if row["images"] == config["calibration_images"][0]]
    text += f"\nCalibrating on {config['calibration_images'][0]} images: {min(seconds):.0f} to {max(seconds):.0f} "
    text += "seconds of one thread. With one step for all weights, and files of at most so many bytes:\n\n"
    budgets = list(dict.fromkeys(row["budget"] for row in results["budgets"]))
    sized = {(row["budget"], row["images"]): f"{row['accuracy']:.2f}" for row in results["budgets"]}
    counts = dict.fromkeys(row["images"] for row in results["budgets"])
    rows = [[f"{n:,}" if n else "none", *(sized[budget, n] for budget in budgets)] for n in counts]
    text += markdown(["images", *budgets], rows)
    text += "\nHow the settings compare on training images that were held out (%):\n\n"
    tried = {
        (row["setting"], row["bits"]): [f"{row[key]:.1f}" for key in ("own", "re-estimated")]
        for row in results["compared"]
    }
    widths = list(dict.fromkeys(row["bits"] for row in results["compared"]))
    head = [f"W{bits}{end}" for bits in widths for end in ("", ", BatchNorm re-estimated")]
    rows = [[name, *(cell for bits in widths for cell in tried[name, bits])] for name in config["settings"]]
    return text + markdown(["setting", *head], rows)


REACHED = 50  # % of ten digits


@simple("pairs")
def pairs(record: dict[str, Any]) -> str:
    """Accuracy of every pair, and why the others are refused."""
    found = {(row["target"], row["mechanism"]): row for row in record["results"]["rows"]}
    targets, mechanisms = list(record["config"]["targets"]), list(record["config"]["mechanisms"])
    reasons: dict[str, int] = {}

    def cell(target: str, mechanism: str) -> str:
        row = found[target, mechanism]
        if "refused" in row:
            reason = row["refused"].split(": ", 1)[-1] if row["refused"].startswith("Rule(") else row["refused"]
            reason = reason.replace(target.split(",")[0], "this target")  # one sentence for all that it is true of
            return f"[{reasons.setdefault(reason, len(reasons) + 1)}]"
        if not (row["distance"] == 0 and row["file_agrees"] and row["codes_agree"]):
            return "**broken**"
        return f"{row['compressed']:.0f}" if row["compressed"] >= REACHED else f"*{row['compressed']:.0f}*"

    rows = [[target, *(cell(target, mechanism) for mechanism in mechanisms)] for target in targets]
    ends = [row["compressed"] >= REACHED for row in found.values() if "refused" not in row]
    text = (
        f"Test accuracy (%) of the compressed life. Of {len(found)} pairs {sum(ends)} end at {REACHED} or above; "
        f"{len(ends) - sum(ends)} (*in italics*) run, and lie in their target, but at these settings and in this time "
        f"learn less; [n]: {len(found) - len(ends)} are refused, see below.\n\n"
    )
    text += markdown(["", *mechanisms], rows)
    return text + "\n" + "".join(f"{number}. {reason}\n" for reason, number in reasons.items())


@table("records")
def index(records: Path) -> str:
    """All records."""
    rows = []
    for path in sorted(records.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        where, cost = record["environment"], record["cost"]
        commit = f"`{(where['commit'] or 'none')[:9]}`" + (" + changes" if where["dirty"] else "")
        memory = cost.get("peak_memory_bytes", {}).get("process")
        seconds = f"{cost['seconds']:,.0f}" if "seconds" in cost else "–"
        link = f"[{path.stem}](../benchmarks/records/{path.name})"
        costs = [str(len(record["seeds"])), seconds, f"{memory / 1e6:,.0f}" if memory else "–"]
        rows.append([link, record["question"], f"`{record['command']}`", commit, *costs])
    if not rows:
        return NOTHING
    return markdown(["record", "question", "command", "commit", "seeds", "seconds", "peak memory (MB)"], rows)


# --- pages ------------------------------------------------------------------------------------------------------


def pages(root: Path) -> list[Path]:
    """README.md, and all pages of docs and papers."""
    readme = root / "README.md"
    return [
        *([readme] if readme.exists() else []),
        *sorted((root / "docs").rglob("*.md")),
        *sorted((root / "papers").rglob("*.md")),
    ]


def fresh(text: str, records: Path) -> str:
    """A page with every block made anew.

    Raises:
        ValueError: a block of an unknown name, or one that never ends.
    """
    starts = len(re.findall(r"<!-- table:", text))
    if starts != len(BLOCK.findall(text)):
        raise ValueError("a <!-- table:NAME --> without its <!-- /table --> on a later line")

    def make(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"<!-- table:{name} -->: unknown; known: {', '.join(sorted(TABLES))}")
        return f"<!-- table:{name} -->\n{TABLES[name](records)}<!-- /table -->"

    return BLOCK.sub(make, text)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Rewrites the pages, or checks them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is stale")
    check = parser.parse_args(argv).check
    stale = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        try:
            new = fresh(text, root / "benchmarks" / "records")
        except ValueError as error:
            raise SystemExit(f"{page.relative_to(root)}: {error}") from None
        if new != text:
            stale.append(page.relative_to(root))
            if not check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page}: {'stale, run python -m benchmarks.tables' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
