"""Measurements behind every number in the docs: one script, one record in ``records/``, one table (``tables.py``)."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["PICTURES", "RECORDS", "ROOT", "recording"]

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
PICTURES = ROOT / "docs" / "pictures"


@contextmanager
def recording(
    name: str,
    *,
    question: str,
    seeds: Sequence[int],
    config: Mapping[str, Any],
    notes: str = "",
    out: Path | None = None,
    script: str = "",
) -> Iterator[dict[str, Any]]:
    """Measures the block and writes ``records/NAME.json`` with what the block put into the dict it gets.

    Commit and dirtiness are those at the start, when the code was loaded; dirty means that a file this process loaded
    as code differs from the commit. (Changed pages and other records change no number.)

    Args:
        name: of the record and, with "_" for "-", of the script in this folder.
        question: the sentence the numbers answer.
        seeds: every seed behind the results.
        config: the experiment, as plain data.
        notes: caveats.
        out: another file to write.
        script: in this folder, where the record is not called after it.
    """
    from detent.report.record import Record, environment  # here, so that the tables can be made without torch

    script = script or name.replace("-", "_")
    command = shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]])
    before, load = environment(ROOT), os.getloadavg()[0]
    changed = before["dirty_files"]
    assert changed is not None, "records are made in a git checkout"
    results: dict[str, Any] = {}
    record = Record(name=name, question=question, command=command, seeds=seeds, config=config, notes=notes)
    with record:
        yield results
    path = out or RECORDS / f"{name}.json"
    written = record.write(path, results)
    loaded = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
    dirty = [name for name in changed if str(ROOT / name) in loaded]
    where = {"commit": before["commit"], "dirty": bool(dirty), "dirty_files": dirty}
    written["environment"] |= where | {"load_average": [load, os.getloadavg()[0]]}
    path.write_text(json.dumps(written, indent=1, sort_keys=True, allow_nan=False) + "\n")
