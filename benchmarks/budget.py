"""Accuracy by bytes of the whole file: nearest places, error feedback with and without inputs, the standard codec.

    python -m benchmarks.budget --data-dir ../shared [--network resnet8]

Places are chosen with training images, without labels; nothing is selected on test images. Every file is read back
before it is measured. NNCodec is measured where the variable NNCODEC_PYTHON names a Python that has it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from detent.data import Batches, load_images
from papers.models import MLPerfTinyResNet8, load_checkpoint, resnet20, resnet32

QPS = (-10, -12, -14, -16, -18, -20, -22, -24)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A trained network and what is measured of it.

    Args:
        words: what it is.
        checkpoint: its file below checkpoints/.
        data: its images below data/.
        look: mean and standard deviation of its inputs.
        augmented: how the images that places are chosen with are augmented: as in its training.
        widths: fixed ones, a scale a channel.
        budgets: with one step; `None`: the sizes of the fixed widths.
        by_width: budgets for a width a tensor.
        fed: budgets for places chosen with inputs, by the number of images.
        seeds: of those images.
    """

    words: str
    checkpoint: str
    data: str
    look: dict[str, Any]
    augmented: dict[str, Any]
    widths: tuple[int, ...] = (4, 3, 2)
    budgets: tuple[str, ...] | None = None
    by_width: tuple[str, ...] = ()
    fed: dict[int, tuple[str, ...] | None]
    seeds: tuple[int, ...] = (0,)


NETWORKS = {
    "resnet20": Network(
        words="the released ResNet-20 on CIFAR-10",
        checkpoint="cifar10_resnet20",
        data="cifar10",
        look={"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        augmented={"crop": 4, "padding": "zero", "flip": True},
        budgets=("50 kB", "60 kB", "70 kB", "84 kB", "98 kB", "128 kB"),
        by_width=("98 kB",),
        fed={256: ("50 kB", "70 kB", "84 kB"), 512: ("50 kB", "70 kB")},
    ),
    "resnet8": Network(
        words="ResNet-8 of MLPerf Tiny on CIFAR-10",
        checkpoint="cifar10_resnet8_mlperftiny",
        data="cifar10",
        look={"std": [1 / 255]},
        augmented={"flip": True},
        budgets=("25 kB", "30 kB", "40 kB"),
        fed={256: ("25 kB", "30 kB", "40 kB"), 1024: ("30 kB", "40 kB")},
    ),
    "resnet32": Network(
        words="ResNet-32 on CIFAR-100, the checkpoint of PSG's authors",
        checkpoint="cifar100_resnet32_sgd150",
        data="cifar100",
        look={"mean": [129.3 / 255, 124.1 / 255, 112.4 / 255], "std": [68.2 / 255, 65.4 / 255, 70.4 / 255]},
        augmented={"crop": 4, "padding": "zero", "flip": True},
        fed={256: None},
    ),
}


def net(name: str) -> nn.Module:
    """The network before its weights are read."""
    made = {"resnet20": resnet20, "resnet8": MLPerfTinyResNet8, "resnet32": resnet32}[name]()
    return made.eval().to(memory_format=torch.channels_last)


class Bench:
    """One network, its images, and how files are made and measured."""

    def __init__(self, name: str, data_dir: Path, cache: Path | None) -> None:
        self.name, self.network = name, NETWORKS[name]
        self.state = data_dir / "checkpoints" / f"{self.network.checkpoint}.safetensors"
        images = partial(load_images, data_dir / "data" / self.network.data, grey=False)
        kept = {s: None if cache is None else cache / f"{self.network.data}-{s}.safetensors" for s in ("train", "test")}
        self._test = images("test", cache=kept["test"])
        self._train = images("train", cache=kept["train"])

    def model(self) -> nn.Module:
        """The trained network."""
        model = net(self.name)
        load_checkpoint(model, self.state)
        return model

    def inputs(self, count: int, seed: int) -> list[Tensor]:
        """Training images without labels."""
        chosen = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(seed))[:count]
        images, labels = self._train.images[chosen], self._train.labels[chosen]
        batches = Batches(images, labels, 128, seed=seed, **self.network.look, **self.network.augmented)
        return [x for x, _ in batches]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent right of all test images."""
        batches = Batches(self._test.images, self._test.labels, 500, **self.network.look)
        right = sum(int((model(x.to(memory_format=torch.channels_last)).argmax(1) == y).sum()) for x, y in batches)
        return 100 * right / len(self._test)

    def fixed(self, bits: int) -> dict[str, Any]:
        """One width for all weights, a scale a channel."""
        rule = dt.Rule(match="@weights", target=dt.Uniform(bits=bits, granularity="channel"))
        return self._measured(lambda path: dt.save(dt.compress(self.model(), dt.Recipe([rule])), path, "compressed"))

    def within(self, budget: dt.Budget, choices: Any, places: Any) -> dict[str, Any]:
        """A file of at most so many bytes."""
        options = {"choices": choices, "calibration": places, "model": net(self.name)}
        return {
            "budget": budget,
            **self._measured(partial(dt.compress_to_budget, self.state, budget=budget, **options)),
        }

    def _measured(self, write: Callable[[Path], object]) -> dict[str, Any]:
        """Bytes and accuracy of a file, read back into a network of its own."""
        with tempfile.TemporaryDirectory() as folder:
            path, start = Path(folder) / "model.detent", time.process_time()
            write(path)
            seconds, size, twin = time.process_time() - start, path.stat().st_size, net(self.name)
            dt.load(path, twin, life="compressed")
        return {"bytes": size, "accuracy": self.accuracy(twin), "seconds": seconds}

    def codec(self, python: str) -> list[dict[str, Any]]:
        """The standard codec at every quantization parameter."""
        found = []
        with tempfile.TemporaryDirectory() as folder:
            script = Path(__file__).with_name("budget_nncodec.py")
            arguments = [python, str(script), str(self.state), folder, *map(str, QPS)]
            subprocess.run(arguments, check=True, capture_output=True)
            for qp in QPS:
                twin = net(self.name)
                load_checkpoint(twin, Path(folder) / f"{qp}.safetensors")
                told = json.loads((Path(folder) / f"{qp}.json").read_text())
                found.append({"qp": qp, **told, "accuracy": self.accuracy(twin)})
        return found


def rows_of(bench: Bench) -> list[dict[str, Any]]:
    """Every file of ours."""
    network, rows = bench.network, []

    def add(places: str, choices: str, row: dict[str, Any], **more: Any) -> None:
        rows.append({"places": places, "choices": choices, **more, **row})
        print(rows[-1], flush=True)

    for bits in network.widths:
        add("nearest", f"{bits} bits", bench.fixed(bits))
    budgets: tuple[dt.Budget, ...] = network.budgets or tuple(row["bytes"] for row in rows)
    for choices, some in (("step", budgets), ("widths", network.by_width)):
        for budget in some:
            add("nearest", choices, bench.within(budget, choices, None))
            add("prior", choices, bench.within(budget, choices, "prior"))
    for count, some in network.fed.items():
        for seed in network.seeds:
            inputs = bench.inputs(count, seed)
            for budget in some or budgets:
                add("inputs", "step", bench.within(budget, "step", inputs), images=count, seed=seed)
    return rows


def main(
    data_dir: Annotated[Path, typer.Option(help="the folder with checkpoints/ and data/", envvar="DETENT_SHARED")],
    network: Annotated[str, typer.Option(help=", ".join(NETWORKS))] = "resnet20",
    nncodec: Annotated[str | None, typer.Option(envvar="NNCODEC_PYTHON", help="a Python that has NNCodec")] = None,
    cache: Annotated[Path | None, typer.Option(envvar="DETENT_CACHE", help="keeps the decoded images")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Measure every file and write the record."""
    torch.set_num_threads(1)
    bench = Bench(network, data_dir, cache)
    with recording(
        "budget" if network == "resnet20" else f"budget-{network}",
        question=f"How accurate is {bench.network.words} in so many bytes, without training?",
        seeds=list(bench.network.seeds),
        config={
            "network": asdict(bench.network),
            "file": "whole: weights, biases, BatchNorm, header",
            "precision": "float32",
            "threads": 1,
        },
        notes="Accuracy (%) on all 10,000 test images, once a file; nothing is selected on them. With a budget, "
        "BatchNorm's statistics and all biases are on 16 bits. Places by inputs: with training images, augmented as in "
        "training, without labels. Seconds of the processor, all files written in the search included; of NNCodec, "
        "encoding alone.",
        out=out,
        script="budget",
    ) as results:
        results["float"] = {"bytes": bench.state.stat().st_size, "accuracy": bench.accuracy(bench.model())}
        results["rows"] = rows_of(bench)
        if nncodec:
            results["nncodec"] = bench.codec(nncodec)
            results["versions"] = {"nncodec": "2.1.3"}


if __name__ == "__main__":
    typer.run(main)
