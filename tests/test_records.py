"""Records and the tables made from them: complete, from a real commit, fresh, and the only place numbers come from."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import pairs, psg_noise, step_cost, strength_zero, tables, warp
from detent.report.record import portable, summarise, write_record

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "benchmarks" / "records").glob("*.json"))
each_record = pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- records


def faults(record: dict[str, Any], name: str) -> list[str]:
    """What a record lacks."""
    found = []
    kinds = {"name": str, "question": str, "command": str, "seeds": list, "config": dict, "results": dict, "notes": str}
    for field, kind in {**kinds, "cost": dict, "environment": dict}.items():
        if not isinstance(record.get(field), kind):
            found.append(f"{field} is no {kind.__name__}")
    if found:
        return found
    where, cost = record["environment"], record["cost"]
    hardware = where.get("hardware") or {}
    checks = {
        "name is not the file's": record["name"] == name,
        "question asks nothing": record["question"].endswith("?"),
        "no seeds": bool(record["seeds"]) and all(isinstance(s, int) for s in record["seeds"]),
        "no results": bool(record["results"]),
        "no seconds": cost.get("seconds", cost.get("cpu_seconds", 0)) > 0,
        # Rows gathered from cached runs have no one process whose peak could be told; such a record says so.
        "no peak memory": cost.get("peak_memory_bytes", {}).get("process", 0) > 0
        or "Peak memory was not measured" in record.get("notes", ""),
        "no commit": bool(re.fullmatch(r"[0-9a-f]{40}", str(where.get("commit")))),
        "dirty or not?": isinstance(where.get("dirty"), bool),
        "no date": bool(where.get("date")),
        "no hardware": bool(hardware.get("cpu")) and hardware.get("cores", 0) > 0 and hardware.get("threads", 0) > 0,
        "no versions": {"python", "torch"} <= set(where.get("versions") or {}),
    }
    return [fault for fault, fine in checks.items() if not fine]


def script_of(command: str) -> Path | None:
    """The file that a record's command runs."""
    words = shlex.split(command)
    if words and Path(words[0]).name == "detent":
        return ROOT / "src" / "detent" / "cli.py"
    if "-m" not in words[:-1]:
        return None
    return ROOT / (words[words.index("-m") + 1].replace(".", "/") + ".py")


def test_there_are_records() -> None:
    assert RECORDS


@each_record
def test_record_is_complete(path: Path) -> None:
    assert faults(read(path), path.stem) == []


@each_record
def test_record_names_a_script_that_exists(path: Path) -> None:
    script = script_of(read(path)["command"])
    assert script is not None
    assert script.exists()


@each_record
def test_commit_of_a_record_is_real(path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    commit = read(path)["environment"]["commit"]
    done = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0


@each_record
def test_a_dirty_record_lists_what_differed(path: Path) -> None:
    where = read(path)["environment"]
    if "dirty_files" in where:
        assert where["dirty"] == bool(where["dirty_files"])


# A folder of one machine; `../shared` and `runs/` are anyone's.
MACHINE = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|mnt|Users|scratch)/")


def written() -> list[Path]:
    """Everything a reader sees: the pages, the records, the scripts that make them, the library."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *RECORDS]
    for folder in ("src", "papers", "benchmarks"):
        pages += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".md", ".yaml", ".html"}]
    return pages


def test_no_page_names_a_folder_of_one_machine() -> None:
    pages = written()
    assert len(pages) > 200
    assert [str(p.relative_to(ROOT)) for p in pages if MACHINE.search(p.read_text(encoding="utf-8"))] == []


def test_a_folder_of_one_machine_is_found() -> None:
    # Joined here, so that this file does not name one itself.
    for folder in ("work", "tmp", "home", "root", "Users"):
        assert MACHINE.search(f"`python -m papers.train --out /{folder}/runs`")
    assert not MACHINE.search("`python -m papers.train --data-dir ../shared/data --out runs/home/x`, lr/cell, w/tmp/3")


def test_a_records_command_is_anyones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    interpreter = tmp_path / ".venv" / "bin" / "python3.11"
    shared = tmp_path.parent / "shared"
    command = shlex.join([str(interpreter), "-m", "papers.train", f"--out={tmp_path / 'runs'}", str(shared), "a b"])
    assert portable(command) == "python -m papers.train --out=runs ../shared 'a b'"
    given = {"name": "n", "question": "q?", "seeds": [0], "config": {}, "results": {"a": 1}}
    assert write_record(tmp_path / "n.json", command=command, **given)["command"] == portable(command)


def test_faults_are_found(tmp_path: Path) -> None:
    good = write_record(
        tmp_path / "n.json",
        name="n",
        question="q?",
        command="python -m benchmarks.warp",
        seeds=[0],
        config={},
        results={"a": 1},
        cost={"seconds": 1.0, "peak_memory_bytes": {"process": 1}},
    )
    good["environment"] |= {"commit": "0" * 40, "dirty": False}
    assert faults(good, "n") == []
    assert faults(good, "m") == ["name is not the file's"]
    assert faults(good | {"seeds": []}, "n") == ["no seeds"]
    assert faults({k: v for k, v in good.items() if k != "command"}, "n") == ["command is no str"]
    assert faults(good | {"environment": good["environment"] | {"commit": None}}, "n") == ["no commit"]
    assert faults(good | {"environment": good["environment"] | {"hardware": {}}}, "n") == ["no hardware"]
    script = script_of("python -m benchmarks.no_such")
    assert script is not None
    assert not script.exists()
    assert script_of("python x.py") is None


# -------------------------------------------------------------------------------------------------------- tables


def test_every_table_in_the_docs_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_stands_in_a_page() -> None:
    used = {m["name"] for page in tables.pages(ROOT) for m in tables.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert used == set(tables.TABLES)


def test_every_record_has_a_table() -> None:
    shown = {
        "psg_noise",
        "strength_zero",
        "warp",
        "bytes_on_disk",
        "step_cost",
        "step_cost-before",
        "step_cost-peers",
        "cadence",
        "budget",
        "budget-resnet8",
        "budget-resnet32",
        "budget-trained-45kb",
        "activations-w4a4",
        "activations-w2a2",
        "demo-psg",
        "admm_quadratic",
        "fuzz",
        "resume",
    }
    shown |= {"demo_times", "slim", "hf_llama", "integer", "onnx_resnet32", "training_memory"}
    shown |= {"squeezenet", "lenet_bytes", "layer_bytes", "coding_speed", "mask_models"}
    shown |= {
        "md_equalities",
        "md-digits",
        "md-digits-scale",
        "md-resnet18",
        "md-resnet8",
        "md-resnet8-long",
        "md-resnet8-scale",
        "md-resnet8-seeds",
        "md-digits-ternary",
        "md-digits-ternary-scale",
        "pairs",
        "combination",
        "psg-gain",
    }
    families = ("step_cost-", "psg-cifar100-", "psg-defaults-", "psg-auto-", "admm-lenet-", "kq-cifar100-")
    assert [p.stem for p in RECORDS if p.stem not in shown and not p.stem.startswith(families)] == []


def test_a_stale_table_is_told_and_rewritten(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "sub" / "page.md"
    page.parent.mkdir(parents=True)
    page.write_text("before\n<!-- table:warp -->\n| typed | 1.0 |\n<!-- /table -->\nafter\n")
    assert tables.main(["--check"], tmp_path) == 1
    assert "typed" in page.read_text()
    assert tables.main([], tmp_path) == 0
    assert page.read_text() == f"before\n<!-- table:warp -->\n{tables.NOTHING}<!-- /table -->\nafter\n"
    assert tables.main(["--check"], tmp_path) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:no-such -->\n<!-- /table -->\n", "unknown"),
        ("<!-- table:warp -->\nand no end\n", "without its"),
    ],
)
def test_a_bad_block_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tables.fresh(text, tmp_path)


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_without_records_a_table_says_so(name: str, tmp_path: Path) -> None:
    assert tables.TABLES[name](tmp_path) == tables.NOTHING


def typed_tables(text: str) -> list[str]:
    """Lines of tables outside the blocks that hold what looks measured: a decimal, a percentage, a factor, a size."""
    rows = [line for line in tables.BLOCK.sub("", text).splitlines() if line.lstrip().startswith("|")]
    return [row for row in rows if re.search(r"\d\.\d|\d ?%|\d ?x\b|\d ?(ms|kB|MB|s)\b", row)]


def test_no_measured_number_is_typed_into_the_readme() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    assert typed_tables(readme.read_text(encoding="utf-8")) == []


def test_typed_numbers_are_found() -> None:
    assert typed_tables("| PSG | 69.5 |\n") == ["| PSG | 69.5 |"]
    assert typed_tables("| file | 262 kB |\n| all | 1.2x |\n| x | 90 % |\n") != []
    assert typed_tables("<!-- table:warp -->\n| PSG | 69.5 |\n<!-- /table -->\n| W4 | `Uniform(bits=4)` |\n") == []


def grid(bits: int) -> dict[str, Any]:
    return {"rules": [{"target": {"kind": "Uniform", "bits": bits}}]}


def cifar_record(
    folder: Path, rival: str, recipe: dict[str, Any] | None, lives: dict[str, float], **further: Any
) -> None:
    """A record as papers.train writes it, with one accuracy a life and BatchNorm 1 point better, over two seeds."""
    summary = {"full.accuracy": summarise([70.0, 71.0])}
    for life, accuracy in lives.items():
        start = f"compressed.{life}"
        summary[f"{start}.data_free.accuracy"] = summarise([accuracy, accuracy])
        summary[f"{start}.batchnorm.accuracy"] = summarise([accuracy + 1, accuracy + 1])
        summary[f"{start}.weights.error"] = summarise([0.001 * accuracy, 0.001 * accuracy])
        summary[f"{start}.weights.wasserstein"] = summarise([0.0001 * accuracy, 0.0001 * accuracy])
    write_record(
        folder / f"psg-cifar100-{rival}.json",
        name=f"psg-cifar100-{rival}",
        question="?",
        command="python -m papers.psg.cifar100",
        seeds=[1, 2],
        config={"recipe": recipe, "evaluate_recipe": grid(4), "epochs": 3},
        results={"seeds": [], "summary": summary, **further},
    )


def test_table_of_the_papers_experiment(tmp_path: Path) -> None:
    cifar_record(tmp_path, "psg-w3", grid(3), {"recipe": 60.0, "8": 64.0})
    cifar_record(tmp_path, "sgd", None, {"recipe": 50.0, "3": 10.0, "minmax-w4": 5.0})
    tries = {"0.002": {"full": 65.0, "compressed": 30.5}, "0.005": {"full": 64.0, "compressed": 39.25}}
    tuned = {"decay": 0.005, "epochs": 1, "held_out": tries}
    sparse = {"rules": [{"target": {"kind": "TopK", "keep": 0.1}}]}
    cifar_record(tmp_path, "psg-prune90", sparse, {"recipe": 40.0}, tuned=tuned)
    lines = tables.TABLES["psg-cifar100"](tmp_path).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    chosen = [line for line in lines if "held out" in line]
    assert len(chosen) == 1
    assert chosen[0].startswith("`psg-prune90`: decay 0.005, the best after 1 epoch")
    assert chosen[0].endswith("0.002: 30.5, 0.005: 39.2.")
    spread = f"70.50 ± {summarise([70.0, 71.0])['std']:.2f}"
    zero = " ± 0.00"
    gap = ["–", "–"]
    assert rows == [
        # full, then data-free and re-estimated at 8, 6, 4, 3, 2 bits; a life of the record's own width is "recipe"
        ["`sgd`", spread, *gap, *gap, f"50.00{zero}", f"51.00{zero}", f"10.00{zero}", f"11.00{zero}", *gap],
        ["`psg-w3`", spread, f"64.00{zero}", f"65.00{zero}", *gap, *gap, f"60.00{zero}", f"61.00{zero}", *gap],
        ["`psg-prune90`", spread, *gap, *gap, *gap, *gap, *gap],
    ]
    weights = tables.TABLES["psg-cifar100-weights"](tmp_path)
    assert "0.05000 ± 0.00000" in weights
    assert "0.00500 ± 0.00000" in weights
    pruned = [line for line in tables.TABLES["psg-cifar100-pruned"](tmp_path).splitlines() if line.startswith("| `")]
    assert [("`sgd`" in line, "minmax-w4" in line, "10 % largest" in line) for line in pruned] == [
        (True, True, False),
        (False, False, True),
    ]


# ------------------------------------------------------------------------------------- what is measured, in small


def test_strength_zero_in_small() -> None:
    row = strength_zero.compare("Muon with AdamW", "foreach", "update", seed=0, steps=4)
    differing = dict(row["differing"])
    assert differing.pop("strength_one") > 0
    assert set(differing.values()) == {0}


def test_steps_and_warp_in_small() -> None:
    for form in ("paper", "gradient", "update"):
        gap, moved = warp._step_gap(form, 4, seed=7)
        assert gap < 1e-9 < moved
    for name, target, psg in warp.mechanisms():
        gaps = warp._order_gaps(target, psg, seed=7)
        assert np.polyfit(np.log(warp.RATES), np.log(gaps), 1)[0] == pytest.approx(2, abs=0.01), name


def test_noise_in_small() -> None:
    def distance(form: str | None) -> float:
        mechanism = None if form is None else psg_noise.dt.PSG(gain=1.0, eps=0.0, clip=False, form=form)  # type: ignore[arg-type]
        case = psg_noise.Case(optimizer="AdamW", mechanism=mechanism, lr=0.01, cells=[0.1], seeds=[0], marks=[300])
        return psg_noise.simulate(case)["ratios"]["0.1"]["300"]["mean"]

    assert distance(None) == pytest.approx(0.25, abs=0.015)
    assert distance("update") < 0.1


@pytest.mark.parametrize("optimizer", step_cost.OPTIMIZERS)
@pytest.mark.parametrize("arm", ["PSG, gradient form", "PSG, update form"])
def test_psg_keeps_nothing_between_steps(optimizer: str, arm: str) -> None:
    shape = (2, 1024, 1024)
    plain, ours = (step_cost.kept_by(name, optimizer, shape, seed=0) for name in ("plain", arm))
    # The weight, its gradient, the given gradient it is copied from, and one or two moments, four bytes each.
    assert plain == pytest.approx(16 if "SGD" in optimizer else 20, abs=0.01)
    # Room for the grid's own scale, the clip's limits and a sample of 4,096 weights; nothing that grows with them.
    assert ours - plain < 0.02
    small = (2, 256, 64)
    ours, plain = (step_cost.passing_of(name, optimizer, small, 0) for name in (arm, "plain"))
    # The update form holds what all weights were before the step; the other works in place, on one weight at a time.
    assert ours - plain >= (4 if "update" in arm else 0)


def test_every_mechanism_has_its_cost_measured() -> None:
    measured = {type(mechanism) for _, mechanism in step_cost.ARMS.values()}
    known = {type(mechanism) for mechanism in pairs.MECHANISMS.values()}
    assert {cls.__name__ for cls in known - measured} == {"PartialFreeze"}  # which does nothing between its rounds


def test_ratios_are_those_of_neighbouring_blocks() -> None:
    clock = [0.0]
    arms = [step_cost.Arm(name=name, step=lambda: clock.append(sum(range(20000)))) for name in ("plain", "same")]
    found = step_cost.take_turns(arms, blocks=3, block=2, warmup=1)
    assert found["plain"]["ratio"]["median"] == 1.0
    assert len(clock) == 1 + 2 * 2 * (3 + 1)
