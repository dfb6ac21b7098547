"""Several threads at one model: one works, the others are told so, and nothing of the weights or of a file is lost."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent as dt

SECONDS = 60  # for a thread that waits for another one; more is a hang
STEPS = 6
ONLY_ONE = "only one thread at a time may"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


class Training:
    """A training whose optimizer's step may be held up in the middle."""

    def __init__(self, mechanism: dt.Mechanism) -> None:
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.recipe = dt.Recipe([dt.Rule(match="(0|3).weight", target=dt.Uniform(bits=3), mechanism=mechanism)])
        self.run = dt.attach(self.model, self.optimizer, self.recipe, total_steps=STEPS)
        self.amid: Callable[[], Any] = lambda: None
        # After ours: what is called is between both halves of the step.
        self.optimizer.register_step_pre_hook(lambda *_: self.amid() and None)

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.run.clock)
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def inside(work: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Another thread is inside `work`, at the point where that calls its argument, for as long as the block lasts."""
    here, over, failed = threading.Event(), threading.Event(), []

    def hold() -> None:
        here.set()
        assert over.wait(SECONDS)

    def target() -> None:
        try:
            work(hold)
        except BaseException as error:
            failed.append(error)
            here.set()

    thread = threading.Thread(target=target, name="first")
    thread.start()
    try:
        assert here.wait(SECONDS)
        assert not failed, failed
        yield
    finally:
        over.set()
        thread.join(SECONDS)
    assert not thread.is_alive()
    assert not failed, failed


def in_compressed(it: Training, hold: Callable[[], None]) -> None:
    with it.run.compressed():
        hold()


def in_latents(it: Training, hold: Callable[[], None]) -> None:
    with it.run.latents():
        hold()


def in_step(it: Training, hold: Callable[[], None]) -> None:
    it.amid = hold
    it.step()
    it.amid = lambda: None


def in_recalibrate(it: Training, hold: Callable[[], None]) -> None:
    def batches() -> Iterator[Tensor]:
        yield torch.ones(4, 6)
        hold()

    it.run.recalibrate(batches())


def in_load(it: Training, hold: Callable[[], None]) -> None:
    class Slow(dict[str, Any]):
        def items(self) -> Any:
            hold()
            return super().items()

    state = it.run.state_dict()
    it.run.load_state_dict({**state, "weights": Slow(state["weights"])})


HOLDERS = {f.__name__: f for f in (in_compressed, in_latents, in_step, in_recalibrate, in_load)}


def _enter(context: Any) -> None:
    with context:
        raise AssertionError("a second thread came in")


ACTS: dict[str, Callable[[Training, Path], Any]] = {
    "compressed": lambda it, folder: _enter(it.run.compressed()),
    "latents": lambda it, folder: _enter(it.run.latents()),
    "measure": lambda it, folder: it.run.measure(),
    "encoded": lambda it, folder: it.run.encoded(),
    "recalibrate": lambda it, folder: it.run.recalibrate([torch.ones(4, 6)]),
    "round_statistics": lambda it, folder: it.run.round_statistics("bfloat16"),
    "averaged": lambda it, folder: it.run.averaged(network()),
    "rebind": lambda it, folder: it.run.rebind(),
    "finalize": lambda it, folder: it.run.finalize(),
    "skip_step": lambda it, folder: it.run.skip_step(),
    "optimizer.step": lambda it, folder: it.optimizer.step(),
    "state_dict": lambda it, folder: it.run.state_dict(),
    "load_state_dict": lambda it, folder: it.run.load_state_dict(
        {"version": 2, "steps": [0], "awaiting": [""], "total_steps": STEPS, "weights": {}}
    ),
    "optimizer.state_dict": lambda it, folder: it.optimizer.state_dict(),
    "optimizer.load_state_dict": lambda it, folder: it.optimizer.load_state_dict(
        {"state": {}, "param_groups": copy.deepcopy(it.optimizer.state_dict)}
    ),
    "save": lambda it, folder: dt.save(it.run, folder / "model.detent"),
    "compress": lambda it, folder: dt.compress(it.model, it.recipe),
    "attach": lambda it, folder: dt.attach(it.model, torch.optim.SGD(it.model.parameters(), lr=0.1), it.recipe),
}


@pytest.mark.filterwarnings("ignore:.*after .* steps")
@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE()], ids=["psg", "ste"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_second_thread_is_refused_whatever_it_wants_and_the_first_goes_on(
    holder: str, mechanism: dt.Mechanism, tmp_path: Path
) -> None:
    it, alone = Training(mechanism), Training(mechanism)
    for each in (it, alone):
        each.step()
        each.step()
    with inside(lambda hold: HOLDERS[holder](it, hold)):
        for name, act in ACTS.items():
            with pytest.raises(RuntimeError, match=ONLY_ONE):
                act(it, tmp_path)
                pytest.fail(name)
    assert not list(tmp_path.iterdir())
    HOLDERS[holder](alone, lambda: None)
    assert same(it.weights(), alone.weights())
    while it.run.clock < STEPS:  # in the thread that was refused
        it.step()
        alone.step()
    assert same(it.weights(), alone.weights())
    dt.save(it.run, tmp_path / "model.detent")


def test_the_sentence_says_who_and_what_to_do() -> None:
    it = Training(dt.PSG(gain=8.0))
    said = (
        r"detent\.save in thread 'MainThread' while thread 'first' is in optimizer\.step\(\) of the same model: only "
        "one thread at a time may; do it between two steps in the thread that trains, or give each thread a copy"
    )
    with inside(lambda hold: in_step(it, hold)), pytest.raises(RuntimeError, match=said):
        dt.save(it.run, "never.detent")


def test_two_runs_of_one_model_are_one_work() -> None:
    model, recipe = network(), dt.Recipe([dt.Rule(match="(0|3).weight", target=dt.Uniform(bits=2))])
    first, second = dt.compress(model, recipe), dt.compress(model, recipe)
    before = model.get_parameter("0.weight").detach().clone()

    def work(hold: Callable[[], None]) -> None:
        with first.compressed():
            hold()

    with inside(work), pytest.raises(RuntimeError, match=ONLY_ONE):
        second.measure()
    assert torch.equal(model.get_parameter("0.weight"), before)
    assert len(second.measure()) == 2


def test_models_of_their_own_need_not_wait() -> None:
    it, other = Training(dt.STE()), Training(dt.STE())
    with inside(lambda hold: in_step(it, hold)):
        other.step()
        with other.run.compressed():
            pass
    assert (it.run.clock, other.run.clock) == (1, 1)


def test_the_same_thread_may_come_in_again(tmp_path: Path) -> None:
    it = Training(dt.PSG(gain=8.0))
    with it.run.compressed():
        with pytest.raises(RuntimeError, match=r"inside run\.compressed\(\)"):
            it.run.measure()
        with pytest.raises(RuntimeError, match=r"inside run\.compressed\(\)"):
            dt.save(it.run, tmp_path / "model.detent")
    with inside(lambda hold: hold()):
        it.step()


class Broken(Exception):
    pass


def test_a_step_that_raised_in_a_thread_that_is_over_is_undone_by_the_next_one() -> None:
    it, alone = Training(dt.STE()), Training(dt.STE())

    def fail() -> None:
        raise Broken

    def work() -> None:
        it.amid = fail
        with pytest.raises(Broken):
            it.step()
        it.amid = lambda: None

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(SECONDS)
    for each in (it, alone):
        each.step()
    assert it.run.clock == 1
    assert torch.equal(it.model.get_parameter("0.weight"), alone.model.get_parameter("0.weight"))


def test_a_step_that_raised_is_over_once_its_own_thread_goes_on() -> None:
    """It cannot be told from one under way before that: the thread lives, and the weights are between two states."""
    it = Training(dt.PSG(gain=8.0))

    def fail() -> None:
        raise Broken

    def work(hold: Callable[[], None]) -> None:
        it.amid = fail
        with pytest.raises(Broken):
            it.step()
        it.amid = lambda: None
        hold()

    with inside(work), pytest.raises(RuntimeError, match=ONLY_ONE):
        it.run.measure()

    def look(hold: Callable[[], None]) -> None:
        with pytest.raises(Broken):
            it.amid = fail
            it.step()
        it.amid = lambda: None
        it.run.measure()
        hold()

    with inside(look):
        assert len(it.run.measure()) == 2


def switching(test: Callable[[], None]) -> None:
    """Run with threads that change places all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        test()
    finally:
        sys.setswitchinterval(before)


def test_many_threads_in_compressed_keep_the_full_life() -> None:
    it = Training(dt.PSG(gain=8.0))
    it.step()
    before = it.weights()
    start, entered, other = threading.Barrier(4), [0] * 4, []

    def work(i: int) -> None:
        start.wait(SECONDS)
        for _ in range(20):
            try:
                with it.run.compressed():
                    entered[i] += 1
            except RuntimeError as error:
                time.sleep(1e-4)
                if ONLY_ONE not in str(error):
                    other.append(error)

    def crowd() -> None:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)

    switching(crowd)
    assert not other
    assert sum(entered) >= 1
    assert same(it.weights(), before)
    with it.run.compressed():
        assert len(it.model.get_parameter("0.weight").unique()) <= 7


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE()], ids=["psg", "ste"])
def test_a_file_saved_beside_a_training_is_of_one_moment(mechanism: dt.Mechanism, tmp_path: Path) -> None:
    """Each file that is reported as written loads, and its full life is what the weights were after some step."""
    it = Training(mechanism)
    it.model.eval()  # buffers move in the forward pass, which no run sees
    it.step()
    seen, written, other = [it.weights()], [], []
    start, over = threading.Barrier(2), threading.Event()

    def save() -> None:
        start.wait(SECONDS)
        i = 0
        while not over.is_set():
            path = tmp_path / f"{i}.detent"
            try:
                dt.save(it.run, path)
                written.append(path)
            except RuntimeError as error:
                if ONLY_ONE not in str(error):
                    other.append(error)
            time.sleep(1e-3)  # or the training would never come in
            i += 1

    def train() -> None:
        thread = threading.Thread(target=save)
        thread.start()
        start.wait(SECONDS)
        done = 0
        while done < 20:
            try:
                it.step()
            except RuntimeError as error:
                assert ONLY_ONE in str(error)
                time.sleep(1e-3)
                continue
            seen.append(it.weights())
            done += 1
        over.set()
        thread.join(SECONDS)
        assert not thread.is_alive()

    switching(train)
    assert not other
    assert written
    assert it.run.clock == 21
    for path in written:
        twin = network()
        dt.load(path, twin)
        assert any(same(dict(twin.state_dict()), each) for each in seen), path.name
