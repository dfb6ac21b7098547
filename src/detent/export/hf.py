"""Hugging Face folders in the format compressed-tensors (pack-quantized), which transformers and vLLM load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.grouping import Channel, Group, PerTensor, granularity_of
from detent.lives import Encoded, Lives
from detent.pack.atomic import destination, replace_file
from detent.parameters import canonical_name
from detent.targets import Uniform

__all__ = ["HfReport", "to_compressed_tensors"]

_NEEDED = "compressed-tensors files need transformers and compressed-tensors: pip install 'detent[hf]'"
_BITS = (4, 8)


@dataclass(frozen=True, kw_only=True)
class HfReport:
    """What a folder holds.

    Args:
        bytes: of all weight files together.
        packed: bytes of codes and scales of each packed parameter, by name.
        ignored: linear layers that stay as they are.
        config: what stands under `quantization_config` in config.json.

    Example:
        >>> HfReport(bytes=10, packed={"a.weight": 8}, ignored=("b",)).packed_bytes
        8
    """

    bytes: int
    packed: Mapping[str, int]
    ignored: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and scales of all packed parameters."""
        return sum(self.packed.values())

    def __repr__(self) -> str:
        """In a line; a big model's names are kilobytes."""
        packed = f"{len(self.packed)} weights packed in {self.packed_bytes:,} bytes"
        return f"<HfReport: {self.bytes:,} bytes; {packed}; {len(self.ignored)} linear layers left as they are>"


@dataclass(frozen=True)
class _Scheme:
    """What layers of one config group have in common."""

    bits: int
    group_size: int | None

    @property
    def weights(self) -> dict[str, Any]:
        strategy = {"strategy": "channel"} if self.group_size is None else {"strategy": "group"}
        size = {} if self.group_size is None else {"group_size": self.group_size}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, **strategy, **size}


def to_compressed_tensors(run: Lives, folder: str | os.PathLike[str], *, bits: int | None = None) -> HfReport:
    """Write the compressed life of a Hugging Face model so that `from_pretrained(folder)` loads it, codes untouched.

    Linear weights on a `Uniform` grid of 4 or 8 bits become `weight_packed` (codes in 32-bit words), `weight_scale`
    and `weight_shape`; all else is written as it is. Nothing is quantized again: codes and scales are those of
    `run.encoded()`, so the loader computes `code * scale`, which is our weight bit for bit. One scale a tensor is
    written once a channel, as loaders know channels and groups only. The tokenizer is not written.

    Args:
        run: on a transformers model.
        folder: made if it is not there; config.json and the weight files in it are written over.
        bits: the width of this life, as in `run.compressed(bits=...)`.

    Returns:
        Bytes, and what was packed and what was not.

    Raises:
        ValueError: a model that is no transformers model; a claimed parameter that the format cannot hold, by name
            and reason: no linear layer, another target or width, a group that does not divide the inputs, scales
            that the dtype of the weights would round, a parameter that is tied.
        ImportError: transformers or compressed-tensors are not installed.

    Example:
        >>> import detent as dt
        >>> model = nn.Linear(4, 4)
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
        >>> to_compressed_tensors(run, "folder")
        Traceback (most recent call last):
        ...
        ValueError: to_compressed_tensors: Linear is no transformers model, so no config.json can be written for it
    """
    pretrained = _transformers()
    model: Any = run.model
    if not isinstance(model, pretrained):
        raise ValueError(
            f"to_compressed_tensors: {type(model).__name__} is no transformers model, so no config.json can be written "
            "for it"
        )
    claims = {claim.name: claim for claim in run.standing.claims}
    layers = {canonical_name(name): module for name, module in model.named_modules()}
    schemes: dict[str, _Scheme] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, encoded in run.encoded(bits=bits).items():
        module, _, own = name.rpartition(".")
        reason = _reason(encoded, layers.get(module), own, claims[name].aliases)
        if reason:
            raise ValueError(f"{name!r} cannot be written in the format pack-quantized: {reason}")
        schemes[module], parts = _packed(encoded)
        tensors[name] = {f"{module}.{part}": value for part, value in parts.items()}
    ignored = tuple(n for n, m in layers.items() if isinstance(m, nn.Linear) and n not in schemes)
    config = _config(schemes, ignored)
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    with run.compressed(bits=bits):
        plain = {canonical_name(name): value for name, value in model.state_dict().items()}
        state = {name: value for name, value in plain.items() if name not in tensors}
        for parts in tensors.values():
            state |= parts
        model.save_pretrained(where, state_dict=state)
    path = where / "config.json"
    whole = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": config}
    replace_file(destination(path), (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode())
    return HfReport(
        bytes=sum(file.stat().st_size for file in where.glob("*.safetensors")),
        packed={n: sum(t.numel() * t.element_size() for t in parts.values()) for n, parts in tensors.items()},
        ignored=ignored,
        config=config,
    )


def _transformers() -> Any:
    """The class of transformers' models.

    Raises:
        ImportError: one of the packages is missing.
    """
    try:
        import compressed_tensors  # noqa: F401
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    return PreTrainedModel


def _reason(encoded: Encoded, module: nn.Module | None, own: str, aliases: tuple[str, ...]) -> str | None:
    """Why a claimed parameter does not fit, or `None`."""
    target = encoded.target
    if not isinstance(module, nn.Linear) or own != "weight":
        return f"it holds weights of linear layers only, and this is the {own} of a {type(module).__name__}"
    if aliases:
        return f"it is tied to {', '.join(aliases)}, which loaders would tie to the packed codes"
    if not isinstance(target, Uniform) or not target.zero:
        return f"it holds symmetric grids with a zero, Uniform(bits=4 or 8), and this lies on {target}"
    if target.bits not in _BITS:
        return f"loaders know 4 and 8 bits, and this has {target.bits}"
    if not encoded.params.layout.is_row_major:
        return "it keeps one scale a row, and the channels of this weight run along another axis"
    groups = granularity_of(target.granularity)
    inputs = encoded.params.layout.shape[1]
    if isinstance(groups, Group) and inputs % groups.size:
        return f"groups of {groups.size} do not divide its {inputs} inputs"
    scale = encoded.params["scale"]
    if not torch.equal(scale.to(encoded.dtype).double(), scale.double()):
        name = str(encoded.dtype).removeprefix("torch.")
        return (
            f"its scales are {str(scale.dtype).removeprefix('torch.')} and its weights {name}, in which loaders "
            f'multiply: use Uniform(param_dtype="{name}")'
        )
    return None


def _packed(encoded: Encoded) -> tuple[_Scheme, dict[str, Tensor]]:
    """The scheme of a parameter, and its codes and scales as the format names and shapes them, without their prefix."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    target, layout = encoded.target, encoded.params.layout
    assert isinstance(target, Uniform)
    rows, columns = layout.shape
    # Our codes count from -n = -(2^(bits-1) - 1), the format's integers from -2^(bits-1), which stays unused.
    integers = (encoded.codes["codes"].to(torch.int16) - (2 ** (target.bits - 1) - 1)).to(torch.int8)
    groups = granularity_of(target.granularity)
    size = groups.size if isinstance(groups, Group) else None
    assert isinstance(groups, (Group, Channel, PerTensor))
    scale = encoded.params["scale"].to(encoded.dtype)
    scale = scale.expand(rows) if isinstance(groups, PerTensor) else scale
    return _Scheme(target.bits, size), {
        "weight_packed": pack_to_int32(integers.reshape(rows, columns), target.bits),
        "weight_scale": scale.reshape(rows, -1).contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _config(schemes: Mapping[str, _Scheme], ignored: tuple[str, ...]) -> dict[str, Any]:
    """The quantization_config, checked by the classes that will read it."""
    from compressed_tensors.quantization import QuantizationConfig

    by_scheme: dict[_Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {}
    for i, (scheme, names) in enumerate(by_scheme.items()):
        # With one scheme the usual short form; with several each layer by its name.
        targets = ["Linear"] if len(by_scheme) == 1 else [f"re:^{re.escape(name)}$" for name in names]
        groups[f"group_{i}"] = {"targets": targets, "weights": scheme.weights, "format": "pack-quantized"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
    }
    return json.loads(QuantizationConfig.model_validate(config).model_dump_json(exclude_none=True))
