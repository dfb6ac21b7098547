"""Records: one measured result with its provenance, as JSON."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

__all__ = ["Record", "environment", "summarise", "write_record"]

PACKAGES = ("torch", "numpy", "safetensors", "pyarrow", "pillow", "scikit-learn")


def environment(repository: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """What a number depends on besides the code's arguments: commit, hardware, versions, date.

    Args:
        repository: folder whose git commit is stated; None for the current folder.

    Returns:
        A dict ready for JSON: ``commit`` (None outside git), ``dirty`` and ``dirty_files`` (what differs from the
        commit), ``date`` (UTC), ``hardware``, ``versions``.

    Example:
        >>> sorted(environment())
        ['commit', 'date', 'dirty', 'dirty_files', 'hardware', 'versions']
    """
    commit = _git(repository, "rev-parse", "HEAD")
    status = _git(repository, "status", "--porcelain", "--untracked-files=all")
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "commit": commit,
        "dirty": None if status is None else bool(status),
        "dirty_files": None if status is None else sorted(line[3:] for line in status.splitlines()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": _hardware(),
        "versions": versions,
    }


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value), number and the values themselves.

    Raises:
        ValueError: for no values.

    Example:
        >>> summarise([1.0, 3.0])
        {'mean': 2.0, 'std': 1.4142135623730951, 'n': 2, 'values': [1.0, 3.0]}
    """
    if not values:
        raise ValueError("summarise(values=[]): need one value at least")
    numbers = [float(v) for v in values]
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "std": std, "n": len(numbers), "values": numbers}


class Record:
    """Measures wall seconds and peak memory of a ``with`` block, then writes the record.

    Peak memory is that of the whole process so far (`process_peak`) and of the block on the GPU.

    Args:
        name: what the record is called, e.g. ``"cifar100-resnet32-psg-w4"``.
        question: the sentence the numbers answer.
        command: the command line that made it; None for this process's own.
        seeds: every seed behind the results.
        config: the experiment, as plain data.
        notes: caveats.

    Example:
        >>> with Record(name="sum", question="Does addition work?", seeds=[0]) as record:
        ...     total = 1 + 1
        >>> record.seconds >= 0
        True
    """

    def __init__(
        self,
        *,
        name: str,
        question: str,
        command: str | None = None,
        seeds: Sequence[int] = (),
        config: Mapping[str, Any] | None = None,
        notes: str = "",
    ) -> None:
        self.name, self.question, self.notes = name, question, notes
        self.command = shlex.join(sys.orig_argv) if command is None else command
        self.seeds, self.config = list(seeds), dict(config or {})
        self.seconds = 0.0
        self.peak_memory: dict[str, int] = {}

    def __enter__(self) -> Record:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_memory = _peak_memory()

    def write(self, path: str | os.PathLike[str], results: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the record with ``results`` and returns what was written.

        Raises:
            ValueError: if ``results`` hold what JSON cannot.
        """
        cost = {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory}
        return write_record(
            path,
            name=self.name,
            question=self.question,
            command=self.command,
            seeds=self.seeds,
            config=self.config,
            results=results,
            notes=self.notes,
            cost=cost,
        )


def write_record(
    path: str | os.PathLike[str],
    *,
    name: str,
    question: str,
    command: str,
    seeds: Sequence[int],
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    notes: str = "",
    cost: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes one record as JSON (sorted keys, indent 1; the file is replaced at once or not at all).

    NaN and infinity, which JSON lacks, are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``.

    Args:
        path: file to write; its folder is made.
        name: what the record is called.
        question: the sentence the numbers answer.
        command: the command line that made it; written as anyone would run it, see `portable`.
        seeds: every seed behind the results.
        config: the experiment, as plain data.
        results: the numbers, as plain data.
        notes: caveats.
        cost: seconds and memory.

    Returns:
        What was written.

    Raises:
        ValueError: if a value is not plain data.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "r.json")
        >>> _ = write_record(path, name="n", question="q?", command="c", seeds=[0], config={}, results={"a": 1})
        >>> json.loads(Path(path).read_text())["results"]
        {'a': 1}
    """
    record = _plain(
        {
            "name": name,
            "question": question,
            "command": portable(command),
            "seeds": list(seeds),
            "config": config,
            "results": results,
            "notes": notes,
            "cost": cost or {},
            "environment": environment(),
        },
        "record",
    )
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    passing = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    passing.write_text(json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")
    passing.replace(file)
    return record


def portable(command: str) -> str:
    """Write a command as anyone would run it from the repository's root: no folder of one machine in it.

    The interpreter becomes ``python``, absolute paths become relative to the current folder.

    Example:
        >>> portable(f"{sys.executable} -m papers.train --out {os.path.abspath('runs/a')} --data-dir=../shared")
        'python -m papers.train --out runs/a --data-dir=../shared'
    """
    words = shlex.split(command)
    if words and Path(words[0]).name.startswith("python"):
        words[0] = "python"
    for i, word in enumerate(words):
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if os.path.isabs(value):
            words[i] = option + equals + os.path.relpath(value)
    return shlex.join(words)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}: a record holds numbers, strings, lists and dicts only")


def _git(repository: str | os.PathLike[str] | None, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None  # a line of `git status` may begin with a space


def _hardware() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": sorted(f for f in flags if f == "avx2" or f.startswith(("avx512", "amx"))),
        "memory_bytes": pages,
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
    }


def process_peak() -> int:
    """The most memory this process has held so far, in bytes.

    Example:
        >>> process_peak() > 1_000_000
        True
    """
    # Not ru_maxrss where it can be helped: a new process starts with that of the one that made it.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # in KiB on Linux and in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_memory() -> dict[str, int]:
    peak = {"process": process_peak()}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak
