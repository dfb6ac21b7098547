"""Mutated files and killed saves: a few thousand of what benchmarks/fuzz.py does in earnest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fuzz import MUTATIONS, labels, lie, mutated, samples, split, values_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_mutated_file_is_refused_or_the_same(tmp_path: Path) -> None:
    """In a process of its own, so that a crash, a hang or an allocation would be seen as one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", "7,0,3000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["grown_bytes"] < 1 << 26
    assert sum(count for *_, count in found["counts"]) == 3000
    refused = {kind for kind, what, _ in found["counts"] if what == "FormatError"}
    assert refused == set(MUTATIONS), "every kind of damage was tried and noticed"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list:
    return samples(tmp_path_factory.mktemp("samples"), seeds=(1,))


def test_mutations_are_repeatable_and_change_something(pool: list) -> None:
    first, again = ([mutated(5, i, pool)[3] for i in range(60)] for _ in range(2))
    assert first == again
    sound = {sample.data for sample in pool}
    assert sum(data not in sound for data in first) > 50


def test_sizes_in_a_header_are_known_for_what_they_are(pool: list) -> None:
    """What the fuzzer lies about: dimensions and lengths, and neither text nor pointers."""
    for sample in pool:
        if not sample.is_container:
            continue
        values = values_of(split(sample.data)[1])
        found = labels(values)
        assert len(found) == len(values)
        sizes = [value for value, label in zip(values, found, strict=True) if label == "size"]
        assert all(isinstance(value, int) for value in sizes)
        for tensor in sample.model.state_dict().values():
            assert set(tensor.shape) <= set(sizes)


def test_lies_are_other_numbers_and_huge_ones_too() -> None:
    import random

    told = {lie(random.Random(i), 5) for i in range(400)}
    assert {4, 6, 12, 0, 2**31, 2**47, 2**64 - 1} <= told
