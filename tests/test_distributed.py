"""Promises across processes: DDP is one process, FSDP2 fits the same numbers on every rank to the same weights.

Each test starts its processes once and looks at many things in them; what a rank finds comes back through a file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import detent as dt

pytestmark = pytest.mark.distributed

STEPS = 8
RULES: dict[str, dt.Recipe] = {
    # Channel scales of a tensor cut by rows, first and last layer by their own rules.
    "psg": dt.Recipe(
        [
            dt.Rule(
                match="@first",
                target=dt.Uniform(bits=3, granularity="channel"),
                mechanism=dt.PSG(gain=8.0, clip_norm=0.5),
            ),
            dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=dt.PSG(gain=8.0, clip_norm=0.5), fit_every=3),
        ]
    ),
    # A gain is that of the whole tensor.
    "psg-auto": dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=dt.PSG(start=2))]),
    "ste": dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3, range="ema"), mechanism=dt.STE())]),
    "prune": dt.Recipe(
        [
            dt.Rule(
                match="weight", target=dt.TopK(keep=0.3, scope="model"), mechanism=dt.HardProjection(every=2, start=2)
            )
        ]
    ),
    "psg-prune": dt.Recipe(
        [
            dt.Rule(
                match="weight",
                target=dt.TopK(keep=0.3, scope="model"),
                mechanism=dt.PSG(gain=8.0, toward=dt.Zero()),
                fit_every=2,
            )
        ]
    ),
    # z and the dual are pieces of a whole that the fit sees together; the mapping at step 5 is model-wide.
    "admm-prune": dt.Recipe(
        [
            dt.Rule(
                match="weight",
                target=dt.TopK(keep=0.3, scope="model"),
                mechanism=dt.ADMM(rho=0.1, growth=1.5, every=2, until=5),
            )
        ]
    ),
    # Grids of activations are found on what all processes see, and learn from the mean of their gradients.
    "activations": dt.Recipe(
        [dt.Rule(match="weight", target=dt.Uniform(bits=3), mechanism=dt.STE())],
        activations=[
            dt.Activation(match="@first", quantizer=dt.RunningRange(bits=4, momentum=0.5)),
            dt.Activation(quantizer=dt.LearnedStep(bits=4, rate=0.02)),
        ],
    ),
    # How much each weight matters is gathered in pieces, and its least value is a share of that of the whole.
    "fisher": dt.Recipe(
        [
            dt.Rule(
                match="weight",
                target=dt.TopK(keep=0.3, scope="model"),
                mechanism=dt.Masked(start=7, metric="fisher"),
            )
        ]
    ),
    "freeze": dt.Recipe(
        [dt.Rule(match="weight", target=dt.Binary(granularity="channel"), mechanism=dt.ADMM(rho=0.1, every=2, until=4))]
    ),
    "mirror": dt.Recipe(
        [dt.Rule(match="weight", target=dt.Ternary(), mechanism=dt.MirrorDescent(map="softmax", scale_aware="tensor"))]
    ),
    "stages": dt.Recipe(
        stages=[
            dt.Stage(
                share=0.5, rules=[dt.Rule(match="weight", target=dt.NM(n=2, m=3), mechanism=dt.HardProjection(every=2))]
            ),
            dt.Stage(
                share=0.5,
                rules=[
                    dt.Rule(
                        match="[24].weight",
                        target=dt.SparseLevels(sparse=dt.TopK(keep="nonzero"), survivors=dt.Uniform(bits=3)),
                        mechanism=dt.STE(),
                    )
                ],
            ),
        ]
    ),
}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    # Seven and two rows: uneven over two and three ranks, and on three ranks one holds none of the last weight.
    # In float64 the order of a sum is seen in the last digits only, and the comparison with one process is sharp.
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(12, 6, generator=generator).double(), torch.randn(12, 2, generator=generator).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        inputs, wanted = (part.chunk(world)[rank] for part in batch(step))
        optimizer.zero_grad()
        (model(inputs) - wanted).square().mean().backward()
        optimizer.step()


def gathered(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()  # type: ignore[operator]


def ending(run: dt.Run, model: nn.Module, rank: int, world: int) -> dict[str, Any]:
    """What a training leaves behind: weights, fitted numbers, both lives' outputs; all ranks must call it."""
    model.eval()
    inputs = batch(99)[0]
    with torch.no_grad():
        full = model(inputs)
        with run.compressed():
            small = model(inputs)
            weights = {name: gathered(p) for name, p in named(model).items()}
        with run.compressed(bits=2 if _has_bits(run) else None):
            two = model(inputs)
        back = model(inputs)
    codes = run.encoded()
    return {
        "clock": run.clock,
        "weights": {name: gathered(p) for name, p in named(model).items()},
        "params": {f"{n}.{k}": t.clone() for n, e in codes.items() for k, t in e.form.named.items()},
        "decoded": {name: encoded.decode() for name, encoded in codes.items()},
        "shown": {name: weights[name] for name in codes},
        "outputs": {"full": full, "small": small, "two": two, "back": back},
        "distances": [row["error"] for row in run.measure()],
    }


def _has_bits(run: dt.Run) -> bool:
    return any(rule.target is not None and rule.target.has_bits for rule in run.plan.recipe.rules)


def named(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def alone(rules: str, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = STEPS) -> dict[str, Any]:
    model = net()
    optimizer = make(model)
    run = dt.attach(model, optimizer, RULES[rules], total_steps=STEPS)
    train(model, optimizer, range(steps))
    return ending(run, model, 0, 1)


# ------------------------------------------------------------------------------------------------ starting processes


def _child(rank: int, world: int, folder: str, job: Callable[[int, int, Path], Any]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*was not provided|.*barrier.*", category=UserWarning)
    torch.manual_seed(0)
    where = f"file://{os.path.join(folder, 'store')}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    try:
        torch.save(job(rank, world, Path(folder)), os.path.join(folder, f"rank{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(world: int, folder: Path, job: Callable[[int, int, Path], Any]) -> list[Any]:
    """Run a job on several ranks of this machine; what each returns."""
    folder.mkdir(parents=True, exist_ok=True)
    spawn(_child, args=(world, str(folder), job), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def sharded(world: int, **options: Any) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model[0], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


# -------------------------------------------------------------------------------------------------------------- jobs

CASES: dict[str, tuple[str, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "psg-sgd": ("psg", sgd),
    "psg-adamw": ("psg", adamw),
    "psg-auto-sgd": ("psg-auto", sgd),
    "psg-auto-adamw": ("psg-auto", adamw),
    "ste-adamw": ("ste", adamw),
    "prune-sgd": ("prune", sgd),
    "psg-prune-sgd": ("psg-prune", sgd),
    "admm-prune-adamw": ("admm-prune", adamw),
    "fisher-sgd": ("fisher", sgd),
    "activations-sgd": ("activations", sgd),
    "freeze-sgd": ("freeze", sgd),
    "mirror-adamw": ("mirror", adamw),
    "stages-adamw": ("stages", adamw),
}


RESUMED = (
    "psg-adamw",
    "psg-auto-adamw",
    "ste-adamw",
    "prune-sgd",
    "admm-prune-adamw",
    "fisher-sgd",
    "activations-sgd",
    "freeze-sgd",
    "mirror-adamw",
)
# Their two lives are one by the end.
ONE_LIFE = ("ste", "activations", "prune", "admm-prune", "fisher", "freeze", "mirror", "stages")


def ddp_job(rank: int, world: int, folder: Path) -> dict[str, Any]:
    found = {}
    for case, (rules, make) in CASES.items():
        model = nn.parallel.DistributedDataParallel(net())
        optimizer = make(model)
        run = dt.attach(model, optimizer, RULES[rules], total_steps=STEPS)
        train(model, optimizer, range(STEPS), rank, world)
        found[case] = ending(run, model, rank, world)
    return found


def fsdp_job(rank: int, world: int, folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    found: dict[str, Any] = {}
    for case, (rules, make) in CASES.items():
        model = sharded(world)
        optimizer = make(model)
        run = dt.attach(model, optimizer, RULES[rules], total_steps=STEPS)
        train(model, optimizer, range(5), rank, world)
        if case in RESUMED:
            weights, held = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": held, "run": run.state_dict()}
            save(state, checkpoint_id=folder.parent / "saved" / case)
        train(model, optimizer, range(5, STEPS), rank, world)
        found[case] = ending(run, model, rank, world)
    found["refusals"] = refusals(rank, world)
    return found


def refusals(rank: int, world: int) -> dict[str, Any]:
    """A bad gradient in the rows of one rank stops every rank; gradients that are zero on one rank alone stop none."""
    found: dict[str, Any] = {}
    model = sharded(world)
    optimizer = sgd(model)
    run = dt.attach(model, optimizer, RULES["psg"], total_steps=STEPS)
    before = {name: gathered(p) for name, p in named(model).items()}
    model(batch(0)[0]).sum().backward()
    grad: Any = model[0].weight.grad
    if rank == 0:
        grad._local_tensor[0, 0] = torch.nan
    try:
        optimizer.step()
    except RuntimeError as error:
        found["nan"] = str(error)
    found["untouched"] = all(torch.equal(gathered(p), before[name]) for name, p in named(model).items())

    # Plain SGD has no state, so a step is taken for a dummy where every gradient is 0: the ranks must agree on it.
    optimizer.zero_grad()
    model(batch(0)[0]).sum().backward()
    if rank == world - 1:
        for p in model.parameters():
            if p.grad is not None:
                grad = p.grad
                grad._local_tensor.zero_()
    optimizer.step()
    found["clock"] = run.clock

    # Other weights loaded behind our back are noticed on DTensors, too; the same ones are none of anybody's business.
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    try:
        optimizer.step()
    except RuntimeError as error:
        found["written"] = str(error)
    run.detach()
    return found


def resume_job(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Go on at three ranks from what two ranks saved after five steps, attached before the states are loaded or after.

    Attached first: model and optimizer in one call, then the run. Attached last: model, optimizer, attach, run.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    found: dict[str, Any] = {"last": {}}
    for case, last in ((case, last) for case in RESUMED for last in (False, True)):
        rules, make = CASES[case]
        saved = folder.parent / "saved" / case
        model = sharded(world)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        optimizer = make(model)
        run = None if last else dt.attach(model, optimizer, RULES[rules], total_steps=STEPS)
        weights, held = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": held, **({} if run is None else {"run": run.state_dict()})}
        load(state, checkpoint_id=saved)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if run is None:
            run = dt.attach(model, optimizer, RULES[rules], total_steps=STEPS)
            state = {"run": run.state_dict()}
            load(state, checkpoint_id=saved)
        run.load_state_dict(state["run"])
        assert run.clock == 5
        train(model, optimizer, range(5, STEPS), rank, world)
        (found["last"] if last else found)[case] = ending(run, model, rank, world)
    found["refusals"] = refusals(rank, world)
    return found


def both_jobs(rank: int, world: int, folder: Path) -> dict[str, Any]:
    return {"ddp": ddp_job(rank, world, folder), "fsdp": fsdp_job(rank, world, folder)}


# ------------------------------------------------------------------------------------------------------------- tests


def assert_ranks_agree_with_one_process(ranks: list[dict[str, Any]], case: str, tolerance: float) -> None:
    rules, make = CASES[case]
    one = alone(rules, make)
    for found in ranks:
        mine = found[case]
        assert mine["clock"] == STEPS
        for part in ("weights", "params", "decoded", "shown"):
            assert mine[part].keys() == one[part].keys()
            for name, value in mine[part].items():
                # Identical on every rank, bit by bit; as one process up to the order of a sum over the batch.
                assert torch.equal(value, ranks[0][case][part][name]), (case, part, name)
                torch.testing.assert_close(value, one[part][name], rtol=tolerance, atol=tolerance)
        for name, value in mine["decoded"].items():
            assert torch.equal(value, mine["shown"][name]), "the compressed life does not show the codes"
        outputs = mine["outputs"]
        assert torch.equal(outputs["full"], outputs["back"]), "the full life did not come back"
        if rules not in ONE_LIFE:
            gap = (outputs["full"] - outputs["small"]).abs().max()
            assert float(gap) > 1e-3, "stale weights in a no-grad forward"
        for name, value in outputs.items():
            torch.testing.assert_close(value, one["outputs"][name], rtol=tolerance, atol=tolerance)
    if rules.endswith("prune"):
        kept = sum(int((value != 0).sum()) for value in one["decoded"].values())
        assert kept == round(0.3 * (42 + 35 + 10))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, on_ranks(2, folder / "two", both_jobs)


@pytest.fixture(scope="module")
def three(two: tuple[Path, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return on_ranks(3, two[0] / "three", resume_job)


@pytest.mark.parametrize("case", CASES)
def test_ddp_is_one_process(two: tuple[Path, list[dict[str, Any]]], case: str) -> None:
    assert_ranks_agree_with_one_process([found["ddp"] for found in two[1]], case, 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_fsdp_is_one_process(two: tuple[Path, list[dict[str, Any]]], case: str) -> None:
    assert_ranks_agree_with_one_process([found["fsdp"] for found in two[1]], case, 1e-6)


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_of_two_ranks_goes_on_at_three(three: list[dict[str, Any]], case: str) -> None:
    assert_ranks_agree_with_one_process(three, case, 1e-6)


@pytest.mark.parametrize("case", RESUMED)
def test_it_goes_on_where_the_states_are_loaded_before_attach(three: list[dict[str, Any]], case: str) -> None:
    """As frameworks load: the model, the optimizer, then `attach`, then the run; bitwise as in the other order."""
    for found in three:
        early, late = found[case], found["last"][case]
        assert late["clock"] == STEPS
        for part in ("weights", "params", "decoded", "shown", "outputs"):
            assert early[part].keys() == late[part].keys()
            assert [name for name in late[part] if not torch.equal(early[part][name], late[part][name])] == [], part


def test_ranks_refuse_and_skip_together(two: tuple[Path, list[dict[str, Any]]], three: list[dict[str, Any]]) -> None:
    for ranks in ([found["fsdp"] for found in two[1]], three):
        for rank, found in enumerate(ranks):
            said = found["refusals"]
            whose = "the gradient of '0.weight'" if rank == 0 else "a gradient held by another process"
            assert said["nan"] == f"{whose} is not finite at step 0; no weight was changed by this step"
            assert said["untouched"]
            assert said["clock"] == 1
            assert "'0.weight' was written by someone else" in said["written"]
