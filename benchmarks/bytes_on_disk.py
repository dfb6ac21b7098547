"""Where the bytes of a compressed ResNet-32 are, in every coding, beside what its nominal width promises.

python -m benchmarks.bytes_on_disk --data-dir ../shared
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import nn

import detent as dt
from benchmarks import recording
from detent.pack import CODINGS, Coding, inspect, sizes
from papers.models import load_checkpoint, resnet32

CHECKPOINT = "checkpoints/cifar100_resnet32_sgd150.safetensors"
PRESETS = ("psg-w8", "psg-w6", "psg-w4", "psg-w3", "psg-w2", "psg-prune90")


def network(data_dir: Path | None) -> tuple[nn.Module, str]:
    """ResNet-32 with the released weights if they are there, and where its weights come from."""
    torch.manual_seed(0)
    model = resnet32()
    path = None if data_dir is None else data_dir / CHECKPOINT
    if path is None:
        return model, "random initialisation"
    load_checkpoint(model, path)
    return model, CHECKPOINT


def rest_bytes(model: nn.Module, claimed: set[str]) -> dict[str, int]:
    """Bytes of the tensors no rule claims: BatchNorm (weights and statistics), other parameters."""
    norms = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for own in module.state_dict()
    }
    found = {"batchnorm": 0, "other": 0}
    for name, value in model.state_dict().items():
        if name not in claimed:
            found["batchnorm" if name in norms else "other"] += value.numel() * value.element_size()
    return found


def measure(model: nn.Module, preset: str, folder: Path) -> dict[str, Any]:
    """Write the compressed life in every coding, account for every byte, and read it back bitwise."""
    run = dt.compress(model, dt.Recipe.preset(preset))
    claimed = [claim.name for claim in run.plan.claimed]
    path = folder / f"{preset}.detent"
    files = {coding: written(run, path, coding) for coding in CODINGS}
    coded = inspect(path).total["coded"]
    dt.save(run, path, "compressed", coding="bitpacked")
    return {
        "preset": preset,
        "files": files,
        "sizes": sizes(path),
        "rest": rest_bytes(model, set(claimed)),
        "entropy_bytes": coded["entropy_bits"] / 8,
        "priced_bytes": sum(e.form.nbytes for e in run.encoded().values()),
        "file_both_lives": dt.save(run, folder / f"{preset}-both.detent", life="both"),
        "file_safetensors": dt.save(run, folder / f"{preset}.safetensors", life="compressed"),
    }


def written(run: dt.Run, path: Path, coding: Coding) -> dict[str, int]:
    """Bytes of the compressed life in one coding: the whole file, and those of its coded tensors."""
    size = dt.save(run, path, "compressed", coding=coding)
    found = sizes(path)
    if not path.stat().st_size == size == found["file"]:
        raise RuntimeError(f"{path}: save says {size} bytes, sizes {found['file']}, the disk {path.stat().st_size}")
    twin = resnet32()
    dt.load(path, twin, "compressed")
    with run.compressed():
        ours, theirs = run.model.state_dict(), twin.state_dict()
        if not all(torch.equal(ours[name], theirs[name]) for name in ours):
            raise RuntimeError(f"{path}: what is read back is not what was measured")
    return {"file": size, "coded": inspect(path).total["coded"]["bytes"], "header": found["header"]}


def main(
    data_dir: Annotated[Path | None, typer.Option(help="folder with checkpoints/", envvar="DETENT_SHARED")] = None,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Packs ResNet-32 with every preset and writes the record."""
    torch.set_num_threads(1)
    model, source = network(data_dir)
    with recording(
        "bytes_on_disk",
        question="How many bytes does the compressed life of ResNet-32 take in every coding, and where are they?",
        seeds=[0],
        config={"model": "resnet32, CIFAR-100", "weights": source, "presets": list(PRESETS), "threads": 1},
        notes="First and last weight are at 8 bits, BatchNorm and biases at full precision. Every file was read back, "
        "bitwise. Parts are those of the bit-packed file; entropy is the zero-order entropy of the codes.",
        out=out,
    ) as results:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(model.state_dict(), folder / "plain.safetensors")
            results["plain_safetensors_bytes"] = (folder / "plain.safetensors").stat().st_size
            results["rows"] = [measure(model, preset, folder) for preset in PRESETS]
        for row in results["rows"]:
            print(row)


if __name__ == "__main__":
    typer.run(main)
