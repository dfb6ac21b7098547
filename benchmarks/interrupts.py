"""An exception at every line of the engine: what is left is the old state or the new one, and training goes on.

python -m benchmarks.interrupts
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer
from torch import Tensor, nn

import detent as dt

OURS = str(Path(dt.__file__).parent)
STEPS = 6
STAGED = dt.Recipe(
    stages=[
        dt.Stage(share=0.5, rules=[dt.Rule(match="weight", target=dt.TopK(keep=0.5), mechanism=dt.Masked(start=1))]),
        dt.Stage(
            share=0.5,
            rules=[
                dt.Rule(
                    match="weight",
                    target=dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=dt.Uniform(bits=4)),
                    mechanism=dt.STE(),
                )
            ],
        ),
    ]
)


class Interrupt(BaseException):
    """What Ctrl-C raises, but ours."""


@contextmanager
def broken_at(place: int) -> Iterator[list[int]]:
    """Raise at the `place`-th line of ours that is run inside; the list says how many were."""
    count = [0]

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            count[0] += 1
            if count[0] == place:
                name = Path(frame.f_code.co_filename).name
                raise Interrupt(f"{name}:{frame.f_lineno} in {frame.f_code.co_name}")
        return local

    def calls(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        yield count
    finally:
        sys.settrace(before)


@dataclass(kw_only=True)
class Bench:
    """A small network in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: dt.Recipe
    run: dt.Run | None = None
    folder: tempfile.TemporaryDirectory[str] | None = None

    def attach(self) -> None:
        self.run = dt.attach(self.model, self.optimizer, self.recipe, total_steps=STEPS)

    def step(self, tick: int) -> None:
        self.gradient(tick)
        self.optimizer.step()

    def gradient(self, tick: int) -> None:
        generator = torch.Generator().manual_seed(tick)
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 6, generator=generator)).square().mean().backward()

    def weights(self) -> list[Tensor]:
        return [value.detach().clone() for value in self.model.state_dict().values()]

    def everything(self) -> Any:
        """The model, what the run and the optimizer would save, and what calibration chose."""
        saved = None if self.run is None else copy.deepcopy(self.optimizer.state_dict())
        chosen = None if self.run is None else [entry.chosen for entry in self.run._entries]
        found = None if self.run is None else [self.run.calibration, dict(self.run._statistics)]
        modes = [module.training for module in self.model.modules()]
        return [*self.weights(), saved, chosen, found, modes]


def bench(mechanism: dt.Mechanism | None, target: dt.Target, make: Callable[..., torch.optim.Optimizer]) -> Bench:
    """A network of two layers and a BatchNorm, always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    rules = [dt.Rule(match="(0|3).weight", target=target, mechanism=mechanism)]
    model.eval()  # a forward pass that is made again must not move statistics
    recipe = STAGED if mechanism is None else dt.Recipe(rules)
    return Bench(model=model, optimizer=make(model.parameters()), recipe=recipe)


def same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors are bitwise one."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


Make = Callable[[], Bench]


@dataclass(frozen=True, kw_only=True)
class Act:
    """Something that may be broken off: what comes before, itself, and what of it happens again afterwards.

    One of very many lines, most of them of the same loops, is broken off at each `sparse`-th of the others' places.
    """

    before: Callable[[Bench], None]
    act: Callable[[Bench], None]
    again: Callable[[Bench], None]
    sparse: int = 1


def _trained(steps: int) -> Callable[[Bench], None]:
    def prepare(it: Bench) -> None:
        it.attach()
        for tick in range(steps):
            it.step(tick)
        it.gradient(steps)

    return prepare


def _look(it: Bench) -> None:
    assert it.run is not None
    with it.run.compressed():
        it.model(torch.ones(2, 6))


def _save(it: Bench) -> None:
    assert it.run is not None
    with tempfile.TemporaryDirectory() as folder:
        dt.save(it.run, f"{folder}/model.detent")


def _resume(it: Bench) -> None:
    it.optimizer.load_state_dict(copy.deepcopy(it.optimizer.state_dict()))


def _finalize(it: Bench) -> None:
    assert it.run is not None
    it.run.finalize()


def _calibrate(it: Bench) -> None:
    assert it.run is not None
    dt.calibrate(it.run, [torch.randn(16, 6, generator=torch.Generator().manual_seed(9))])


def _calibrated(it: Bench) -> None:
    _trained(2)(it)
    assert it.run is not None
    dt.calibrate(it.run, [torch.randn(16, 6, generator=torch.Generator().manual_seed(8))])


def _latents(it: Bench) -> None:
    assert it.run is not None
    with it.run.latents():
        it.model(torch.ones(2, 6))


def _recalibrate(it: Bench) -> None:
    assert it.run is not None
    it.run.recalibrate([torch.randn(16, 6, generator=torch.Generator().manual_seed(9))])


def _skip(it: Bench) -> None:
    assert it.run is not None
    it.run.skip_step()


def _filed(it: Bench) -> None:
    other = copy.deepcopy(it.model)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(0.5)
    run = dt.compress(other, dt.Recipe([dt.Rule(match="(0|3).weight", target=dt.Uniform(bits=4))]))
    it.folder = tempfile.TemporaryDirectory()
    dt.save(run, f"{it.folder.name}/model.detent")


def _open(it: Bench) -> None:
    assert it.folder is not None
    dt.load(f"{it.folder.name}/model.detent", it.model, life="compressed")


def _nothing(it: Bench) -> None:
    pass


def _step_at(tick: int) -> Act:
    def again(it: Bench) -> None:
        it.step(tick)

    return Act(before=_trained(tick), act=lambda it: it.optimizer.step(), again=again)


ACTS: dict[str, Act] = {
    "attach": Act(before=_nothing, act=Bench.attach, again=Bench.attach),
    "first step": _step_at(0),
    "step": _step_at(1),
    "step with the turn of a stage": _step_at(2),
    "compressed": Act(before=_trained(2), act=_look, again=_look),
    "save": Act(before=_trained(2), act=_save, again=_save, sparse=8),
    "load": Act(before=_trained(2), act=_resume, again=_resume),
    "latents": Act(before=_trained(2), act=_latents, again=_latents),
    "recalibrate": Act(before=_trained(2), act=_recalibrate, again=_recalibrate),
    "skipped step": Act(before=_trained(1), act=_skip, again=_skip),
    "open a file": Act(before=_filed, act=_open, again=_open, sparse=40),
    "calibrate": Act(before=_trained(2), act=_calibrate, again=_calibrate, sparse=40),
    "calibrate again": Act(before=_calibrated, act=_calibrate, again=_calibrate, sparse=40),
    "finalize": Act(before=_trained(STEPS), act=_finalize, again=_finalize),
}


MECHANISMS: dict[str, tuple[dt.Mechanism | None, dt.Target]] = {
    "PSG": (dt.PSG(gain=8.0, form="update"), dt.Uniform(bits=3, range="ema")),
    "PSG gradient": (dt.PSG(gain=8.0, form="gradient"), dt.Uniform(bits=3)),
    "STE": (dt.STE(), dt.Uniform(bits=3, range="ema")),
    "STE late": (dt.STE(start=1), dt.Uniform(bits=3)),
    "MirrorDescent": (dt.MirrorDescent(), dt.Ternary()),
    "MirrorDescent primal": (dt.MirrorDescent(form="primal", beta=2.0), dt.Binary()),
    "ADMM": (dt.ADMM(rho=0.5, every=1, until=4), dt.TopK(keep=0.5)),
    "ADMM fisher": (dt.ADMM(rho=0.5, every=1, until=4, metric="fisher"), dt.TopK(keep=0.5)),
    "ADMM decoupled": (dt.ADMM(rho=0.5, every=2, until=None, form="decoupled"), dt.Uniform(bits=3)),
    "HardProjection": (dt.HardProjection(every=2), dt.TopK(keep=0.5)),
    "PartialFreeze": (dt.PartialFreeze(start=1, rounds=(0.5, 1.0)), dt.Uniform(bits=3)),
    "Proximal": (dt.Proximal(strength=0.5), dt.Uniform(bits=3)),
    "CodebookLearning": (dt.CodebookLearning(), dt.VectorCodebook(block=2, size=4)),
    "stages": (None, dt.Zero()),
}


# Lines between torch's step and the one that says it is over.
_NOT_BEGUN = ("in <lambda>", "in _after", "in _end_step", "in land")


def broken(make: Make, name: str, place: int) -> tuple[str, str]:
    """Break an act off at a line of ours, and say what is left, and where it was.

    Returns:
        "old", "new", "same" (no difference), "past" where it has fewer lines; "moved": the optimizer's step was over
        and ours had not begun, which nobody can tell from an optimizer that raised; or "WRONG" and why.
    """
    act = ACTS[name]
    old, new, it = make(), make(), make()
    for each in (old, new, it):
        act.before(each)
    where = ""
    with broken_at(place):
        try:
            act.act(it)
        except Interrupt as error:
            where = str(error)
    if not where:
        return "past", where
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        return "WRONG: gradients are off", where
    act.act(new)
    left = it.weights()
    is_old, is_new = same(left, old.weights()), same(left, new.weights())
    begun = not where.endswith(_NOT_BEGUN) or same(_moments(it), _moments(old))
    if not begun and not same(it.everything(), new.everything()):
        return "moved", where
    if not is_old and not is_new:
        return "WRONG weights", where
    state = it.everything()
    if not is_new or not same(state, new.everything()):
        if not same(state, old.everything()):
            return "WRONG state", where
        act.again(it)
        if not same(it.everything(), new.everything()):
            return "WRONG again", where
    if it.run is not None and new.run is not None and not new.run._closed:
        for tick in range(new.run.clock, STEPS):
            for each in (new, it):
                each.step(tick)
    if not same(it.everything(), new.everything()):
        return "WRONG end", where
    return "same" if is_old and is_new else "new" if is_new else "old", where


def _moments(it: Bench) -> list[Tensor]:
    return [value for held in it.optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]


def everywhere(names: Iterable[str] = MECHANISMS, acts: Iterable[str] = ACTS, stride: int = 1) -> tuple[Any, list[str]]:
    """Break every act off at every `stride`-th line: counts by act, and what went wrong."""
    counts: dict[str, Counter[str]] = {act: Counter() for act in acts}
    wrong: list[str] = []
    for name in names:
        mechanism, target = MECHANISMS[name]
        make = partial(bench, mechanism, target, partial(torch.optim.SGD, lr=0.1, momentum=0.9))
        for act in counts:
            place = 1 + zlib.crc32(f"{name} {act}".encode()) % stride
            while (found := broken(make, act, place))[0] != "past":
                counts[act][found[0].split()[0]] += 1
                if "WRONG" in found[0]:
                    wrong.append(f"{name}, {act}, line {place}: {found[0]}, {found[1]}")
                place += stride * ACTS[act].sparse
    return {act: dict(counted) for act, counted in counts.items()}, wrong


def main(stride: int = 1, only: str = "", act: str = "") -> None:
    """Break everything off everywhere; fails if anything went wrong."""
    warnings.simplefilter("ignore")
    counts, wrong = everywhere([only] if only else MECHANISMS, [act] if act else ACTS, stride=stride)
    print(json.dumps({"counts": counts, "wrong": wrong}, indent=1))
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
