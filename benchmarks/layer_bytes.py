"""One 1024 x 1024 layer at 2 bits: bytes on disk against two peers, a general compressor and the entropy bound.

pip install --target DIR --no-deps torchao==0.18.0      (and another folder for optimum-quanto==0.2.7)
python -m benchmarks.layer_bytes --torchao DIR --quanto DIR
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

import detent as dt
from benchmarks import recording
from detent.pack import CODINGS, pack_bits, sizes

SIDE, BITS, GROUP = 1024, 2, 32

# Each runs in a process of its own, with the peer's folder first on its path; they print the bytes of their file.
TORCHAO = """
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    model = torch.nn.Sequential(torch.nn.Linear({side}, {side}, bias=False))
    model.load_state_dict(torch.load({weights!r}, weights_only=True))
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerGroup({group})))
    torch.save(model.state_dict(), {file!r})
"""
QUANTO = """
    import torch
    from optimum.quanto import freeze, qint2, quantize
    from safetensors.torch import save_file
    model = torch.nn.Sequential(torch.nn.Linear({side}, {side}, bias=False))
    model.load_state_dict(torch.load({weights!r}, weights_only=True))
    quantize(model, weights=qint2)
    freeze(model)
    save_file(model.state_dict(), {file!r})
"""


def peer(script: str, packages: Path, folder: Path, weights: Path, distribution: str) -> dict[str, Any]:
    """Bytes of a peer's file of the same layer, and its version."""
    file = folder / f"{distribution}.bin"
    code = textwrap.dedent(script).format(side=SIDE, group=GROUP, weights=str(weights), file=str(file))
    ahead = f"import sys; sys.path.insert(0, {str(packages)!r})\n"
    told = f"\nimport importlib.metadata\nprint(importlib.metadata.version({distribution!r}))\n"
    done = subprocess.run([sys.executable, "-c", ahead + code + told], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{distribution} failed: {done.stderr.strip().splitlines()[-1]}")
    return {"bytes": file.stat().st_size, "version": done.stdout.split()[-1]}


def entropy_bytes(codes: np.ndarray) -> float:
    """Zero-order entropy."""
    share = np.bincount(codes) / codes.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) * codes.size / 8


def ours(model: nn.Module, granularity: Any, folder: Path) -> dict[str, Any]:
    """Bytes of our files of the layer, and of its codes alone by other means."""
    import zstandard

    target = dt.Uniform(bits=BITS, granularity=granularity, param_dtype="float16")
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=target)]))
    plain = run.encoded()["0.weight"].form.named["codes"].numpy().astype(np.uint8)
    packed = pack_bits(plain, BITS)
    found: dict[str, Any] = {}
    for coding in CODINGS:
        path = folder / f"{coding}.detent"
        found[coding] = dt.save(run, path, life="compressed", coding=coding)
        found["params"] = sizes(path)["params"]
        twin = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False))
        dt.load(path, twin, "compressed")
        with run.compressed():
            if not torch.equal(*(net.get_parameter("0.weight") for net in (twin, model))):
                raise RuntimeError(f"coding={coding!r} does not give back the weights bit for bit")
    compressor = zstandard.ZstdCompressor(level=19)
    found["codes_zstd19_of_bytes"] = len(compressor.compress(plain.tobytes()))
    found["codes_zstd19_of_bits"] = len(compressor.compress(packed))
    found["codes_entropy"] = entropy_bytes(plain)
    return found


def main(
    torchao: Annotated[Path, typer.Option(help="folder with torchao")],
    quanto: Annotated[Path, typer.Option(help="folder with optimum-quanto and what it needs")],
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Writes the layer with everyone and the record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False))
    nn.init.normal_(model.get_parameter("0.weight"), std=0.02)
    with recording(
        "layer_bytes",
        question="How many bytes does one 1024 x 1024 layer take at 2 bits, with us and with others?",
        seeds=[0],
        config={"shape": [SIDE, SIDE], "bits": BITS, "weights": "normal, std 0.02", "torchao_group": GROUP},
        notes="Others' grids and scales are their own: torchao one scale for 32 weights and one byte a code, quanto "
        "its default group of 128. Ours is given with one scale for the tensor, and with one for 32 weights, in "
        "float16. The entropy bound and zstd -19 are of our codes alone, without scales.",
        out=out,
    ) as results:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            weights = folder / "weights.pt"
            buffer = io.BytesIO()
            torch.save(model.state_dict(), buffer)
            weights.write_bytes(buffer.getvalue())
            results["float32_bytes"] = 4 * SIDE * SIDE
            results["torchao"] = peer(TORCHAO, torchao, folder, weights, "torchao")
            results["quanto"] = peer(QUANTO, quanto, folder, weights, "optimum-quanto")
            results["tensor"] = ours(model, "tensor", folder)
            results["group"] = ours(model, dt.Group(size=GROUP), folder)
        print(results)


if __name__ == "__main__":
    typer.run(main)
