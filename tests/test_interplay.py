"""What a fresh review of the three systems found: each of these failed before it was mended."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import detent as dt


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def staged(*targets: dt.Target) -> dt.Recipe:
    rules = [dt.Rule(match="weight", target=target, mechanism=dt.STE()) for target in targets]
    return dt.Recipe(stages=[dt.Stage(rules=[rule], share=1 / len(rules)) for rule in rules])


@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_levels_that_find_zero_only_by_chance_are_refused_after_a_pruning(keep: float) -> None:
    """Fitted to the weights at hand one level is 0; fitted later, none was, and the file had lost every zero."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"stages\[1\]: LearnedLevels\(k=8\) has no zero"):
        dt.attach(model, optimizer, staged(dt.TopK(keep=keep), dt.LearnedLevels(k=8)), total_steps=40)


@pytest.mark.parametrize(
    "target",
    [
        dt.LearnedLevels(k=8, zero=True),
        dt.PowerOfTwo(bits=3),
        dt.Ternary(),
        dt.TopK(keep=0.8),
        dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=dt.Binary()),
        dt.SparseLevels(sparse=dt.TopK(keep=0.2), survivors=dt.LearnedLevels(k=4)),
    ],
    ids=str,
)
def test_targets_with_a_zero_of_their_own_are_taken_after_a_pruning(target: dt.Target) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = dt.attach(model, optimizer, staged(dt.TopK(keep=0.3), target), total_steps=8)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(16, 12)).square().mean().backward()
        optimizer.step()
    run.finalize()
    assert int(torch.count_nonzero(model[0].weight)) <= round(0.3 * 12 * 16)


@pytest.mark.parametrize(
    "rule",
    [
        {"target": dt.TopK(keep=0.2), "mechanism": dt.ADMM(every=5, until=20)},
        {"target": dt.TopK(keep=0.2), "mechanism": dt.Masked(start=20)},
        {"target": dt.Binary(), "mechanism": dt.PartialFreeze(start=20)},
    ],
    ids=["admm", "masked", "freeze"],
)
def test_a_rule_cannot_take_away_the_fit_that_a_mapping_waits_for(rule: dict[str, object]) -> None:
    """The mapping at `until` silently never came."""
    with pytest.raises(ValueError, match=r"fit_until=10.*leave it out"):
        dt.Rule(match="weight", fit_until=10, **rule)  # type: ignore[arg-type]


def test_without_a_mapping_the_last_fit_is_still_the_rules_to_say() -> None:
    rule = dt.Rule(match="weight", target=dt.TopK(keep=0.2), mechanism=dt.ADMM(until=None), fit_until=10)
    assert rule.fit_until == 10


def test_statistics_of_the_trained_width_are_found_under_survivors_on_a_grid() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16))
    target = dt.SparseLevels(sparse=dt.TopK(keep=0.5), survivors=dt.Uniform(bits=4))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=target)]))
    run.recalibrate([torch.randn(64, 12)])
    assert run.statistics() is not None and run.statistics(bits=4) is run.statistics()
    assert run.statistics(bits=3) is None


@dataclass(frozen=True, kw_only=True)
class _Parts(dt.Uniform):
    """A third party's target that holds several others."""

    parts: tuple[dt.Target, ...] = ()


def test_targets_in_a_tuple_survive_yaml() -> None:
    rule = dt.Rule(match="weight", target=_Parts(bits=3, parts=(dt.Zero(), dt.Binary(granularity=dt.Group(size=4)))))
    recipe = dt.Recipe([rule])
    assert dt.Recipe.from_yaml(recipe.to_yaml()) == recipe
    with pytest.raises(ValueError, match=r"parts\[1\]: Binary has no field 'granularit'"):
        dt.Recipe.from_yaml(recipe.to_yaml().replace("granularity:", "granularit:"))


def test_a_period_in_fractions_of_an_unknown_training_is_found_at_once() -> None:
    model = net()
    rule = dt.Rule(match="weight", target=dt.TopK(keep=0.2), mechanism=dt.ADMM(until=None, start=5))
    with pytest.raises(ValueError, match=r"ADMM\.every=0\.05 is a fraction of it"):
        dt.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), dt.Recipe([rule]))


def _one_rank(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=20))
    mesh = init_device_mesh("cpu", (2,))
    recipe = staged(dt.TopK(keep=0.5), dt.Uniform(bits=4), dt.Uniform(bits=3))

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, dt.Run]:
        torch.manual_seed(0)
        model: Any = fully_shard(nn.Linear(12, 1), mesh=mesh)  # the second rank holds no row, so no zero either
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, dt.attach(model, optimizer, recipe, total_steps=9)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for i in steps:
            optimizer.zero_grad()
            model(torch.randn(8, 12, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            optimizer.step()

    model, optimizer, run = fresh()
    train(model, optimizer, range(4))
    saved, weights = run.state_dict(), [p.detach().clone() for p in model.parameters()]
    again, other, resumed = fresh()
    with torch.no_grad():
        for p, w in zip(again.parameters(), weights, strict=True):
            p.copy_(w)
    resumed.load_state_dict(saved)
    train(model, optimizer, range(4, 9))
    train(again, other, range(4, 9))
    whole = [[p.full_tensor() for p in m.parameters()] for m in (model, again)]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))
    (Path(folder) / str(rank)).write_text("done")
    dist.destroy_process_group()


def test_a_rank_without_zeros_of_its_own_turns_with_the_others(tmp_path: Path) -> None:
    """After a resume it forgot that the weight was pruned, and asked the others a question at the next turn."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_one_rank, args=(port, str(tmp_path)), nprocs=2, join=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
