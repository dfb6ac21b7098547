"""What every test gets: fixed seeds, one torch thread, global state put back, the shared data folder."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SEED = 20210516

# No deadline: a loaded machine is not a bug. CI draws the same examples every time, so that a failure is the change's.
hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
    # Small tensors gain nothing from threads, and a sum whose order hangs on the machine's cores is no golden value.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker("shared")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("distributed") and not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds before every test, and torch's global switches as they were after it."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  a library under test may still draw from numpy's global generator
    torch.manual_seed(SEED)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    # Only where a test moved them: setting a device slows every later factory call, and the other imports inductor.
    if torch.get_default_device() != device:
        torch.set_default_device(None if device == torch.device("cpu") else device)
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if now != (deterministic, warn_only):
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and checkpoints; tests that ask for it skip where there is none."""
    named = os.environ.get("DETENT_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if folder.is_dir():
        return folder
    if named:
        raise ValueError(f"DETENT_SHARED={named!r}: no such folder; unset it to skip the tests that need shared data")
    pytest.skip(f"no shared data at {folder}: set DETENT_SHARED to the folder that has it")
