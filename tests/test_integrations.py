"""Promises about other people's training loops: Lightning's Trainer and accelerate's wrappers, three lines each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent as dt

# What accelerate and Lightning say of themselves and of this machine; not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(4)]


def recipe(mechanism: dt.Mechanism) -> dt.Recipe:
    return dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3, range="minmax"), mechanism=mechanism)])


def plain(mechanism: dt.Mechanism, steps: int, accumulate: int = 1, **options: Any) -> tuple[dict[str, Tensor], dt.Run]:
    """The same training in a loop written by hand."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = dt.attach(model, optimizer, recipe(mechanism), total_steps=8)
    parts = options.get("batches", data()) * 8
    for step in range(steps):
        optimizer.zero_grad()
        for x, y in parts[step * accumulate : (step + 1) * accumulate]:
            ((model(x) - y).square().mean() / accumulate).backward()
        if options.get("clip"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, run


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# ------------------------------------------------------------------------------------------------------ accelerate


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE()], ids=["psg", "ste"])
def test_accelerate(mechanism: dt.Mechanism) -> None:
    """Attached through accelerate's wrapper, with its gradient accumulation: equal to the loop by hand."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = net(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = dt.attach(model, optimizer, recipe(mechanism), total_steps=8)
    for x, y in data():
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert run.clock == 2
    wanted, _ = plain(mechanism, steps=2, accumulate=2)
    assert_same(accelerator.unwrap_model(model).state_dict(), wanted)
    assert "detent" in optimizer.state_dict()
    run.before_step(optimizer)  # the wrapper names the optimizer here, too
    run.after_step(optimizer)
    assert run.clock == 3


# ------------------------------------------------------------------------------------------------------- Lightning


def lightning_module(mechanism: dt.Mechanism) -> Any:
    import lightning

    class Trained(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.run: dt.Run | None = None

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, y = batch
            return (self.net(x) - y).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            self.run = dt.attach(self, optimizer, recipe(mechanism), total_steps=8)
            return optimizer

    return Trained()


def fit(module: Any, steps: int, folder: Path, ckpt_path: str | None = None, **options: Any) -> Any:
    import lightning

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    # One batch an epoch: where in an epoch Lightning goes on after a resume is not what is tested.
    loader: Any = torch.utils.data.DataLoader(data()[:1], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("mechanism", [dt.PSG(gain=8.0), dt.STE()], ids=["psg", "ste"])
def test_lightning_trains_and_resumes_bitwise(mechanism: dt.Mechanism, tmp_path: Path) -> None:
    """Lightning always passes a closure; its checkpoint carries our state inside the optimizer's."""
    pytest.importorskip("lightning")
    module = lightning_module(mechanism)
    trainer = fit(module, 4, tmp_path)
    assert module.run.clock == 4
    wanted, _ = plain(mechanism, steps=4, batches=data()[:1])
    assert_same(module.net.state_dict(), wanted)

    path = tmp_path / "epoch.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["optimizer_states"][0]["detent"]["step"] == 4
    resumed = lightning_module(mechanism)
    fit(resumed, 7, tmp_path, ckpt_path=str(path))
    assert resumed.run.clock == 7
    wanted, run = plain(mechanism, steps=7, batches=data()[:1])
    assert_same(resumed.net.state_dict(), wanted)
    codes = {name: encoded.decode() for name, encoded in run.encoded().items()}
    assert_same({n.removeprefix("net."): e.decode() for n, e in resumed.run.encoded().items()}, codes)


def test_lightning_clips_before_we_scale(tmp_path: Path) -> None:
    """Its clipping runs inside the closure's evaluation, so before our pre-hook goes on."""
    pytest.importorskip("lightning")
    module = lightning_module(dt.PSG(gain=8.0))
    fit(module, 2, tmp_path, gradient_clip_val=0.1)
    wanted, _ = plain(dt.PSG(gain=8.0), steps=2, clip=0.1, batches=data()[:1])
    assert_same(module.net.state_dict(), wanted)


def averaging_module(mechanism: dt.Mechanism) -> tuple[Any, list[dict[str, Tensor]]]:
    """A module that looks at the compressed life of the average in every validation, and what it saw."""
    module, seen = lightning_module(mechanism), []

    def validation_step(batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        averaged = module.run.averaged()
        with averaged.compressed():
            seen.append({name: value.detach().clone() for name, value in module.net.state_dict().items()})

    module.validation_step = validation_step
    return module, seen


def averaging_fit(module: Any, steps: int, folder: Path, **options: Any) -> Any:
    """Seven steps with Lightning's own callback, shown the latents as docs/resuming.md says."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

    class Shown(WeightAveraging):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            with pl_module.run.latents():
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    callback = Shown(use_buffers=True)
    kept = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        callbacks=[callback, kept],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    loader: Any = torch.utils.data.DataLoader(data()[:1], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader, **options)


def averaged_by_hand(mechanism: dt.Mechanism, steps: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The same in a loop of one's own: the compressed life of the average after every step, and the last average."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    run = dt.attach(model, optimizer, recipe(mechanism), total_steps=8)
    seen, (x, y) = [], data()[0]
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        with run.latents():
            average.update_parameters(model)
        with run.averaged(average).compressed():
            seen.append({name: value.detach().clone() for name, value in average.module.state_dict().items()})
    return seen, {name: value.detach().clone() for name, value in average.module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("mechanism", [dt.PSG(), dt.STE(), dt.PartialFreeze(every=2)], ids=["psg", "ste", "freeze"])
def test_lightning_averages_and_resumes_bitwise(mechanism: dt.Mechanism, tmp_path: Path) -> None:
    """Its callback swaps the average in through `.data` in validation, puts the weights back, and ends with it."""
    pytest.importorskip("lightning")
    wanted, average = averaged_by_hand(mechanism, 7)
    module, seen = averaging_module(mechanism)
    averaging_fit(module, 7, tmp_path)
    assert module.run.clock == 7 and len(seen) == 7
    for mine, theirs in zip(seen, wanted, strict=True):
        assert_same(mine, theirs)
    assert_same(module.net.state_dict(), average)
    with pytest.raises(RuntimeError, match="was written by someone else"):
        module.run.encoded()  # Lightning has left the average in the model, and this run is of the weights
    with module.run.averaged().compressed():
        assert_same(module.net.state_dict(), wanted[-1])

    resumed, seen = averaging_module(mechanism)
    averaging_fit(resumed, 7, tmp_path, ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert resumed.run.clock == 7
    assert_same(resumed.net.state_dict(), average)
    assert_same(seen[-1], wanted[-1])
