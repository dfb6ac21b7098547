"""Record B: the SqueezeNet that Deep Compression pruned and clustered, stored losslessly.

python -m benchmarks.squeezenet --data-dir ../shared
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from detent.pack import sizes
from detent.pack.coding import Piece, encode_tensor

CHECKPOINT = "checkpoints/imagenet_squeezenet1_0_deepcompressed.safetensors"
AUTHORS_BYTES = 675_763  # compressed_SqueezeNet.net of github.com/songhan/SqueezeNet-Deep-Compression, Huffman-coded
AT_MOST_BYTES = 545_000
LEVELS = 256


def network(tensors: dict[str, Tensor]) -> nn.Module:
    """A tree of modules that holds these tensors under their names; "/" becomes "."."""
    root = nn.Module()
    for name, tensor in tensors.items():
        module = root
        *path, own = name.replace("/", ".").split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(own, nn.Parameter(tensor.clone()))
    return root


def same_bits(ours: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether every tensor is there, bit for bit."""
    state = ours.state_dict()
    named = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    return state.keys() == named.keys() and all(
        torch.equal(state[name].view(torch.int32), tensor.view(torch.int32)) for name, tensor in named.items()
    )


def entropy_bytes(values: np.ndarray) -> float:
    """Zero-order entropy."""
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum()) * values.size / 8


def row(name: str, tensor: Tensor) -> dict[str, Any]:
    """What one weight takes by parts: codes against their entropy, levels against their float32."""
    levels, codes = np.unique(tensor.numpy().reshape(-1), return_inverse=True)
    shape = tuple(tensor.shape)
    return {
        "name": name,
        "shape": list(shape),
        "nonzero": float(np.count_nonzero(levels[codes]) / codes.size),
        "levels": int(levels.size),
        "entropy_bytes": entropy_bytes(codes),
        "codes_bytes": len(encode_tensor([Piece("codes", 8, codes.reshape(-1).astype(np.uint8))], shape=shape)),
        "levels_bytes": len(encode_tensor([Piece("levels", "F32", levels)], shape=shape)),
    }


def measure(tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Write the file, read it back bitwise, account for its parts."""
    weights = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1}
    recipe = dt.Recipe([dt.Rule(match=r"\.weight$", target=dt.LearnedLevels(k=LEVELS))])
    path = folder / "squeezenet.detent"
    run = dt.compress(network(tensors), recipe)
    started = time.process_time()
    written = dt.save(run, path, life="compressed")
    saved = time.process_time()
    found = sizes(path)
    twin = network({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()})
    ready = time.process_time()
    dt.load(path, twin, "compressed")
    loaded = time.process_time()
    if not path.stat().st_size == written == found["file"]:
        raise RuntimeError(f"save says {written} bytes, sizes {found['file']}, the disk {path.stat().st_size}")
    rows = [row(name, tensor) for name, tensor in weights.items()]
    biases = sum(4 * tensor.numel() for name, tensor in tensors.items() if name not in weights)
    return {
        "file_bytes": written,
        "read_back_bitwise": same_bits(twin, tensors),
        "authors_bytes": AUTHORS_BYTES,
        "at_most_bytes": AT_MOST_BYTES,
        "float32_bytes": sum(4 * tensor.numel() for tensor in tensors.values()),
        "bitpacked_bytes": dt.save(run, folder / "bitpacked.detent", life="compressed", coding="bitpacked"),
        "entropy_of_weights_bytes": sum(r["entropy_bytes"] for r in rows),
        "levels_float32_bytes": sum(4 * r["levels"] for r in rows),
        "biases_float32_bytes": biases,
        "codes_bytes": sum(r["codes_bytes"] for r in rows),
        "levels_bytes": sum(r["levels_bytes"] for r in rows),
        "biases_bytes": found["rest"],
        "header_bytes": found["header"],
        "save_cpu_seconds": saved - started,
        "load_cpu_seconds": loaded - ready,
        "rows": rows,
    }


def main(
    data_dir: Annotated[Path, typer.Option(help="folder with checkpoints/", envvar="DETENT_SHARED")],
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Stores the checkpoint losslessly and writes the record."""
    torch.set_num_threads(1)
    tensors = load_file(data_dir / CHECKPOINT)
    with recording(
        "squeezenet",
        question="How small does the file of Deep Compression's SqueezeNet get without changing a bit of its weights?",
        seeds=[0],
        config={"weights": CHECKPOINT, "target": f"LearnedLevels(k={LEVELS})", "threads": 1},
        notes="Nothing is fitted: every tensor has at most 256 values, which the target meets exactly. Codes and "
        "levels by part are blobs of their own, so a few bytes more than within the file. Nothing is drawn at random. "
        "Zero-order entropy counts no tables, so it is below what any coder of it can reach.",
        out=out,
    ) as results:
        with tempfile.TemporaryDirectory() as name:
            results |= measure(tensors, Path(name))
        if not results["read_back_bitwise"]:
            raise RuntimeError("the file does not give back the weights bit for bit")
        print({key: value for key, value in results.items() if key != "rows"})


if __name__ == "__main__":
    typer.run(main)
