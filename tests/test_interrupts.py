"""An exception at any line of the engine: a sample of what benchmarks/interrupts.py does at every line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.interrupts import ACTS, MECHANISMS, bench, broken, broken_at, everywhere


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["STE", "PSG", "ADMM fisher", "stages"])
def test_what_is_broken_off_leaves_the_old_state_or_the_new_one(name: str) -> None:
    acts = [act for act in ACTS if ACTS[act].sparse == 1]
    counts, wrong = everywhere([name], acts, stride=137)
    assert wrong == []
    assert counts["step"].get("old") and counts["step"].get("new"), "both halves were broken off"


def test_latents_and_statistics_that_are_broken_off_go_back() -> None:
    counts, wrong = everywhere(["STE"], ["latents", "recalibrate", "skipped step"], stride=23)
    assert wrong == [] and counts["latents"]["same"] > 10


@pytest.mark.parametrize("name", ["STE", "PSG gradient"])
def test_a_calibration_that_is_broken_off_leaves_the_one_before(name: str) -> None:
    mechanism, target = MECHANISMS[name]

    def make() -> Any:
        return bench(mechanism, target, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))

    it, act = make(), ACTS["calibrate again"]
    act.before(it)
    with broken_at(10**9) as lines:
        act.act(it)
    # What is found is taken over at the very end; before that a few places will do.
    places = [*range(5, lines[0], lines[0] // 8), *range(lines[0] - 60, lines[0], 2)]
    found = [broken(make, "calibrate again", place) for place in places]
    assert [each for each in found if each[0] != "same"] == []  # a calibration moves no weight


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_broken_off_more_closely(name: str) -> None:
    counts, wrong = everywhere([name], stride=41)
    assert wrong == [] and sum(sum(each.values()) for each in counts.values()) > 50
