"""An exception at any line of the engine: a sample of what benchmarks/interrupts.py does at every line."""

from __future__ import annotations

import pytest

from benchmarks.interrupts import ACTS, MECHANISMS, everywhere


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["STE", "PSG", "ADMM fisher", "stages"])
def test_what_is_broken_off_leaves_the_old_state_or_the_new_one(name: str) -> None:
    counts, wrong = everywhere([name], [act for act in ACTS if act != "save"], stride=137)
    assert wrong == []
    assert counts["step"].get("old") and counts["step"].get("new"), "both halves were broken off"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_broken_off_more_closely(name: str) -> None:
    counts, wrong = everywhere([name], stride=41)
    assert wrong == [] and sum(sum(each.values()) for each in counts.values()) > 50
