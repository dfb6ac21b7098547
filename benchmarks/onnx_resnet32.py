"""One ResNet-32 as `.detent` and as ONNX: bytes, the same predictions in ONNX Runtime, 8-bit activations, latency.

python -m benchmarks.onnx_resnet32 --data-dir ../shared
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

import detent as dt
from benchmarks import ROOT, recording
from detent.data import load_images
from detent.export import Activations, OnnxReport, to_onnx
from detent.export.latency import alternating
from detent.export.onnx import session
from papers.models import load_checkpoint, resnet32

CHECKPOINT = "checkpoints/cifar100_resnet32_sgd150.safetensors"
MEAN, STD = (0.50705882, 0.48666667, 0.44078431), (0.26745098, 0.25647059, 0.27607843)
CALIBRATE, RECALIBRATE = 512, 2048  # training images: for ranges of activations, for BatchNorm
PIECE = 250
ROUNDS = {1: 40, 64: 7}


def kernels512() -> dt.Recipe:
    """3 x 3 kernels out of one codebook of 512; first, last and 1 x 1 weights at 8 bits."""
    rest = dt.Uniform(bits=8)
    book = dt.KernelCodebook(size=512, book="global")
    return dt.Recipe(
        [
            dt.Rule(match="@first", target=rest),
            dt.Rule(match="@last", target=rest),
            dt.Rule(match="@kernels", target=book),
            dt.Rule(match=r"weight$", target=rest),
        ]
    )


def normalised(images: Tensor) -> Tensor:
    """Images as the checkpoint was trained on."""
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


class Images:
    """What is measured on: part of the test images, and some training images that choose ranges."""

    def __init__(self, data_dir: Path, limit: int | None) -> None:
        cache = ROOT / "runs" / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        folder = data_dir / "data" / "cifar100"
        test = load_images(folder, "test", "fine_label", cache=cache / "cifar100-test.safetensors")
        train = load_images(folder, "train", "fine_label", cache=cache / "cifar100-train.safetensors")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:RECALIBRATE]
        self.test, self.labels = test.images[:limit], test.labels[:limit].numpy()
        self.train = normalised(train.images[order]).split(128)
        self.calibration = self.train[: CALIBRATE // 128]

    def pieces(self) -> list[Tensor]:
        """The test images, piece by piece."""
        return list(self.test.split(PIECE))

    def top1(self, logits: np.ndarray) -> float:
        """Per cent of right answers."""
        return 100 * float((logits.argmax(1) == self.labels).mean())


def by_torch(model: nn.Module, images: Images) -> np.ndarray:
    """Logits of a model as it stands."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(normalised(piece)) for piece in images.pieces()]).numpy()


def by_ort(path: Path, images: Images, *, optimize: bool) -> np.ndarray:
    """Logits of a file."""
    running = session(str(path), optimize=optimize)
    name = running.get_inputs()[0].name
    parts = [np.asarray(running.run(None, {name: normalised(piece).numpy()})[0]) for piece in images.pieces()]
    return np.concatenate(parts)


def compared(ours: np.ndarray, theirs: np.ndarray, images: Images) -> dict[str, float]:
    """Accuracy, answers that differ, and the largest difference of a logit."""
    return {
        "top1": images.top1(theirs),
        "differing": int((ours.argmax(1) != theirs.argmax(1)).sum()),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(ours).max()),
    }


def told(report: OnnxReport) -> dict[str, Any]:
    """What a report says, without the tensors one by one."""
    forms = sorted({row.form for row in report.tensors if row.target})
    kernels = {kind: n for kind, n in report.kernels.items() if kind.startswith(("Q", "Conv", "Gemm", "Fused"))}
    return {"bytes": report.nbytes, "opset": report.opset, "forms": forms, "kernels": kernels, "notes": report.notes}


def weights_only(name: str, run: dt.Run, images: Images, folder: Path, folded: bool) -> dict[str, Any]:
    """Bytes and predictions of one life whose activations stay floats."""
    example = images.train[0][:2]
    row: dict[str, Any] = {"name": name, "detent_bytes": dt.save(run, folder / f"{name}.detent", life="compressed")}
    row["onnx"] = told(to_onnx(run, folder / f"{name}.onnx", example))
    row["onnx_folded"] = told(to_onnx(run, folder / f"{name}-folded.onnx", example, fold_batchnorm=True))
    with run.compressed():
        ours = by_torch(run.model, images)
    row["torch"] = {"top1": images.top1(ours)}
    row["off"] = compared(ours, by_ort(folder / f"{name}.onnx", images, optimize=False), images)
    row["on"] = compared(ours, by_ort(folder / f"{name}.onnx", images, optimize=True), images)
    if folded:
        row["folded_on"] = compared(ours, by_ort(folder / f"{name}-folded.onnx", images, optimize=True), images)
    return row


def rounded(name: str, run: dt.Run, settings: Activations, images: Images, folder: Path) -> dict[str, Any]:
    """Bytes and accuracy with rounded activations."""
    path = folder / f"{name}.onnx"
    calibration = None if settings.method == "batchnorm" else list(images.calibration)
    report = to_onnx(run, path, images.train[0][:2], activations=settings, calibration=calibration)
    row = {"name": name, "method": settings.method, "bits": settings.bits, "onnx": told(report)}
    row["on"] = {"top1": images.top1(by_ort(path, images, optimize=True))}
    return row


def latency(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Medians of interleaved runs, one thread, in milliseconds, and their ratio to the float network."""
    rows = []
    found: dict[tuple[str, bool], Any] = {}
    for name in names:
        for fold in (False, True):
            if fold and ("-a" in name or name == "fp32"):
                continue  # without quantized operators at all, integers would be simulated
            found[name, fold] = session(str(folder / f"{name}.onnx"), optimize=True, dequantize_at_load=fold)
    for batch, rounds in ROUNDS.items():
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
        feeds = {key: {running.get_inputs()[0].name: x} for key, running in found.items()}
        calls = {key: partial(running.run, None, feeds[key]) for key, running in found.items()}
        times = alternating(calls, rounds)
        base = statistics.median(times["fp32", False])
        for (name, fold), taken in times.items():
            middle = statistics.median(taken)
            row = {"name": name, "batch": batch, "folded_at_load": fold, "rounds": rounds}
            rows.append(row | {"median_ms": middle, "fastest_ms": min(taken), "ratio": middle / base})
    return rows


def runs(data_dir: Path, trained: Path | None, images: Images) -> dict[str, dt.Run]:
    """The lives that are measured, with BatchNorm re-estimated for each."""
    found = {}
    recipes = {f"w{bits}": dt.Recipe.preset(f"psg-w{bits}") for bits in (8, 4, 2)} | {"kernels512": kernels512()}
    for name, recipe in recipes.items():
        model = resnet32()
        load_checkpoint(model, data_dir / CHECKPOINT)
        found[name] = dt.compress(model, recipe)
    if trained is not None:
        model = resnet32()
        model.load_state_dict(load_file(trained))
        found["w2psg"] = dt.compress(model, dt.Recipe.preset("psg-w2"))
    for run in found.values():
        run.recalibrate(images.train)
    return found


def main(
    data_dir: Annotated[Path, typer.Option(help="folder with data/ and checkpoints/", envvar="DETENT_SHARED")],
    trained: Annotated[Path | None, typer.Option(help="a ResNet-32 trained at 2 bits (papers.psg.cifar100)")] = None,
    limit: Annotated[int | None, typer.Option(help="test images, all by default")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Exports, runs and times every life, and writes the record."""
    torch.set_num_threads(1)
    images = Images(data_dir, limit)
    config = {
        "model": "resnet32, CIFAR-100",
        "weights": CHECKPOINT,
        "trained": None if trained is None else "/".join(trained.parts[-3:]),
        "test_images": len(images.labels),
        "calibration_images": CALIBRATE,
        "recalibration_images": RECALIBRATE,
        "onnxruntime": ort.__version__,
        "threads": 1,
    }
    with (
        recording(
            "onnx_resnet32",
            question="Does ONNX Runtime give PyTorch's predictions from weights that stay codes, how large are the "
            "files, and how fast do they run?",
            seeds=[0],
            config=config,
            notes="Post-training except w2psg (three epochs of PSG at 2 bits, papers.psg.cifar100). Ranges and "
            "BatchNorm statistics come from training images. Latencies are of one run on a shared machine.",
            out=out,
        ) as results,
        tempfile.TemporaryDirectory() as name,
    ):
        measure(Path(name), data_dir, trained, images, results)


def measure(folder: Path, data_dir: Path, trained: Path | None, images: Images, results: dict[str, Any]) -> None:
    """All rows, into the record."""
    found = runs(data_dir, trained, images)
    full = resnet32()
    load_checkpoint(full, data_dir / CHECKPOINT)
    report = to_onnx(full, folder / "fp32.onnx", images.train[0][:2], codes={}, fold_batchnorm=True)
    results["full"] = {"top1": images.top1(by_torch(full, images)), "onnx": told(report)}
    print(results["full"], flush=True)
    results["weights"] = []
    for name, run in found.items():
        results["weights"].append(weights_only(name, run, images, folder, folded=name == "w4"))
        print(results["weights"][-1], flush=True)
    plain = Activations()
    free = Activations(method="batchnorm", input_range=(-2.0, 2.1))
    plans = [
        ("w8-a8", "w8", plain),
        ("w8-a8-mse", "w8", Activations(method="mse")),
        ("w8-a8-batchnorm", "w8", free),
        ("w4-a8", "w4", plain),
        ("w4-a4", "w4", Activations(bits=4, method="mse")),
        ("kernels512-a8", "kernels512", plain),
        ("w2psg-a8", "w2psg", plain),
    ]
    results["activations"] = []
    for name, source, settings in plans:
        if source in found:
            results["activations"].append(rounded(name, found[source], settings, images, folder))
            print(results["activations"][-1], flush=True)
    timed = ["fp32", *(f"{name}-folded" for name in found), *(f"{n}-a8" for n in ("w8", "w4", "kernels512"))]
    results["latency"] = latency(folder, timed)
    for row in results["latency"]:
        print(row, flush=True)


if __name__ == "__main__":
    typer.run(main)
