"""Hugging Face folders in the format compressed-tensors (pack-quantized), which transformers and vLLM load."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.compression import compress
from detent.export.calling import unwrap
from detent.grouping import Group, Layout
from detent.lives import Lives
from detent.pack.atomic import destination, replace_file
from detent.parameters import canonical_name
from detent.plan import Plan
from detent.recipe import Recipe, Rule
from detent.specs import and_more, short
from detent.targets import Target
from detent.targets.forms import Grid, Outline

__all__ = ["HfCheck", "HfReport", "check_compressed_tensors", "to_compressed_tensors"]

_NEEDED = "compressed-tensors files need transformers and compressed-tensors: pip install 'detent[hf]'"
_BITS = (4, 8)
# Layers that vLLM makes one of, by the names that its models give them.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))


_ROUNDED = "the recipe rounds activations, and what is written here has weights alone; leave out its activations="


@dataclass(frozen=True, kw_only=True)
class HfReport:
    """What a folder holds.

    Args:
        bytes: of all weight files together.
        packed: bytes of codes and scales of each packed parameter, by name.
        ignored: linear layers that stay as they are.
        config: what stands under `quantization_config` in config.json.
        notes: what a loader that fuses layers would not take: queries, keys and values in several formats.

    Example:
        >>> HfReport(bytes=10, packed={"a.weight": 8}, ignored=("b",)).packed_bytes
        8
    """

    bytes: int
    packed: Mapping[str, int]
    ignored: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and scales of all packed parameters."""
        return sum(self.packed.values())

    def __repr__(self) -> str:
        """In a line; a big model's names are kilobytes."""
        packed = f"{len(self.packed)} weights packed in {self.packed_bytes:,} bytes"
        notes = f"; {len(self.notes)} notes" if self.notes else ""
        return f"<HfReport: {self.bytes:,} bytes; {packed}; {len(self.ignored)} linear layers left as they are{notes}>"


@dataclass(frozen=True, kw_only=True)
class HfCheck:
    """Whether what a recipe makes of a model can be written, asked before training.

    Args:
        packed: names of the parameters that would be packed.
        refused: why a parameter, or the model (""), cannot be written.
        notes: what would be written and is worth knowing, as in `HfReport`.

    Example:
        >>> HfCheck(packed=(), refused={"fc.weight": "loaders know 4 and 8 bits, and this has 3"}).fits
        False
    """

    packed: tuple[str, ...]
    refused: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing is refused."""
        return not self.refused

    def __str__(self) -> str:
        said = [f"{name}: {why}" if name else why for name, why in self.refused.items()]
        head = f"compressed-tensors: {len(self.packed)} weights fit, {len(said)} things do not"
        return "\n".join([head, *(f"  refused: {line}" for line in said), *(f"  note: {line}" for line in self.notes)])


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


def check_compressed_tensors(model: nn.Module, recipe: Recipe | Plan, *, load: bool = False) -> HfCheck:
    """Whether `to_compressed_tensors` could write what a recipe makes of a model, for the reasons that it would give.

    Args:
        model: not trained yet; only its structure counts.
        recipe: a recipe, or the plan that it makes of this model.
        load: if nothing else is refused, write the model as it is into a temporary folder and load that: transformers
            does not take everything that the format holds (T5, models with fused experts). Takes as long, as much
            memory and as much disk as the export.

    Example:
        >>> import detent as dt
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))])
        >>> for reason in check_compressed_tensors(nn.Linear(4, 4), recipe).refused.values():
        ...     print(reason)
        Linear is no transformers model, so no config.json can be written for it
        loaders know 4 and 8 bits, and this has 3
    """
    model = unwrap(model)
    plan = recipe.resolve(model) if isinstance(recipe, Recipe) else recipe
    layers = _layers(model)
    why = _no_transformers(model) or (_ROUNDED if plan.inputs else "")
    refused = {"": why} if why else {}
    schemes: dict[str, _Scheme] = {}
    for claim in plan.claimed:
        target = plan.rule_of(claim).target
        assert target is not None
        outline = _outline(target, claim.layout, claim.dtype)
        why = _reason(short(target), outline, claim.layout, claim.dtype, layers, claim.name, claim.aliases)
        if why:
            refused[claim.name] = why
        else:
            assert outline is not None
            schemes[claim.name.rpartition(".")[0]] = _scheme(outline)
    packed = tuple(claim.name for claim in plan.claimed if claim.name not in refused)
    if load and not refused:
        refused = _refused_by_loader(model, plan)
    return HfCheck(packed=packed, refused=refused, notes=_fused_notes(schemes, layers))


def _refused_by_loader(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Why transformers does not load what would be written, if it does not."""
    rules = [Rule(match=f"^{re.escape(claim.name)}$", target=plan.rule_of(claim).target) for claim in plan.claimed]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a recipe that nobody wrote
        try:
            to_compressed_tensors(compress(model, Recipe(rules)), folder)
        except ValueError as error:
            return {"": str(error).removeprefix(f"{folder}: ")}
    return {}


def to_compressed_tensors(
    run: Lives, folder: str | os.PathLike[str], *, bits: int | None = None, check: bool = True
) -> HfReport:
    """Write the compressed life of a Hugging Face model so that `from_pretrained(folder)` loads it, codes untouched.

    Linear weights on a `Uniform` grid of 4 or 8 bits become `weight_packed` (codes in 32-bit words), `weight_scale`
    and `weight_shape`; all else is written as it is. Nothing is quantized again: codes and scales are those of
    `run.encoded()`, so the loader computes `code * scale`, which is our weight bit for bit. One scale a tensor is
    written once a channel, as loaders know channels and groups only. The tokenizer is not written.

    Args:
        run: on a transformers model.
        folder: made if it is not there; config.json and the weight files in it are written over.
        bits: the width of this life, as in `run.compressed(bits=...)`.
        check: load the folder with `from_pretrained` and compare every weight and buffer with this life, bitwise; a
            second copy of the model is in memory meanwhile.

    Returns:
        Bytes, and what was packed and what was not.

    Raises:
        ValueError: a model that is no transformers model; a claimed parameter that the format cannot hold, by name
            and reason: no linear layer, another target or width, a group that does not divide the inputs, scales
            that the dtype of the weights would round, a parameter that is tied (`check_compressed_tensors` tells all
            of them before training, with `load=True` also what only transformers finds); with `check`, a folder from
            which another model is loaded, which is left there.
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
    model: Any = unwrap(run.model)
    if why := _no_transformers(model) or (_ROUNDED if run.activations else ""):
        raise ValueError(f"to_compressed_tensors: {why}")
    claims = {claim.name: claim for claim in run.standing.claims}
    layers = _layers(model)
    schemes: dict[str, _Scheme] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    codes = run.encoded(bits=bits)
    for name, encoded in codes.items():
        module = name.rpartition(".")[0]
        form, told = encoded.form, short(encoded.target)
        reason = _reason(told, form.outline, form.layout, form.dtype, layers, name, claims[name].aliases)
        if reason:
            raise ValueError(f"{name!r} cannot be written in the format pack-quantized: {reason}")
        assert isinstance(form, Grid)
        schemes[module], parts = _packed(form)
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
        held = {name: value.detach().clone() for name, value in plain.items()} if check else {}
    path = where / "config.json"
    whole = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": config}
    replace_file(destination(path), (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode())
    if check:
        _check_loaded(type(model), where, model.dtype, held)
    return HfReport(
        bytes=sum(file.stat().st_size for file in where.glob("*.safetensors")),
        packed={n: sum(t.numel() * t.element_size() for t in parts.values()) for n, parts in tensors.items()},
        ignored=ignored,
        config=config,
        notes=_fused_notes(schemes, layers),
    )


def _check_loaded(kind: Any, folder: Path, dtype: torch.dtype, held: Mapping[str, Tensor]) -> None:
    """Load a folder as a user would and compare it with what was to be written.

    Raises:
        ValueError: something is missing, left over or different.
    """
    from compressed_tensors.compressors import decompress_module

    levels = [(logger, logger.level) for logger in map(logging.getLogger, ("transformers", "compressed_tensors"))]
    with warnings.catch_warnings(), _no_bars():
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        try:
            loaded = kind.from_pretrained(folder, local_files_only=True, dtype=dtype)
            for module in loaded.modules():
                if hasattr(module, "weight_packed"):
                    decompress_module(module)
        except Exception as error:  # whatever a loader may raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder}: transformers cannot load what was written: {why}") from error
        finally:
            for logger, level in levels:
                logger.setLevel(level)
    theirs = {canonical_name(name): value for name, value in loaded.state_dict().items()}
    for name, value in held.items():
        other = theirs.get(name)
        if other is None or other.dtype != value.dtype or not torch.equal(other.to(value.device), value):
            why = "is not loaded" if other is None else "is loaded with other values"
            raise ValueError(f"{folder}: {name!r} {why}; do not use this folder")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _no_transformers(model: nn.Module) -> str | None:
    """Why a model has no config.json, or `None`."""
    if isinstance(model, _transformers()):
        return None
    return f"{type(model).__name__} is no transformers model, so no config.json can be written for it"


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {canonical_name(name): module for name, module in model.named_modules()}


def _fused_notes(schemes: Mapping[str, _Scheme], layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Layers that vLLM makes one of, and that have several formats here."""
    alike: dict[str, list[str]] = {}
    for name in layers:
        parent = name.rpartition(".")[0]
        for together in _FUSED:
            mine = [f"{parent}.{own}" for own in together if f"{parent}.{own}" in layers]
            if name == (mine or [""])[0] and len({schemes.get(each) for each in mine}) > 1:
                said = ", ".join(f"{own.rpartition('.')[2]} {_said(schemes.get(own))}" for own in mine)
                alike.setdefault(said, []).append(parent)
    end = "vLLM fuses these layers and wants one format for them (transformers does not)"
    return tuple(f"{parents[0]}{and_more(parents)}: {said}; {end}" for said, parents in alike.items())


def _said(scheme: _Scheme | None) -> str:
    if scheme is None:
        return "unpacked"
    return f"{scheme.bits} bits" + (f" in groups of {scheme.group_size}" if scheme.group_size else "")


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


def _outline(target: Target, layout: Layout, dtype: torch.dtype) -> Outline | None:
    """What the forms of a target are, tried on two channels of weights; `None` if it takes none like these."""
    probe = torch.linspace(-1.0, 1.0, 2 * (layout.numel // layout.channels)).reshape(2, -1).to(dtype)
    try:
        return target.form(probe, target.fit(probe)).outline
    except ValueError:
        return None


def _reason(
    target: str,
    outline: Outline | None,
    layout: Layout,
    dtype: torch.dtype,
    layers: Mapping[str, nn.Module],
    name: str,
    aliases: tuple[str, ...],
) -> str | None:
    """Why a claimed parameter does not fit, or `None`; nothing here depends on its values."""
    path, _, own = name.rpartition(".")
    module = layers.get(path)
    if not isinstance(module, nn.Linear) or own != "weight":
        return f"it holds weights of linear layers only, and this is the {own} of a {type(module).__name__}"
    if aliases:
        return f"it is tied to {', '.join(aliases)}, which loaders would tie to the packed codes"
    fields = outline.fields if outline is not None and outline.kind is Grid else {}
    if not fields or not fields["zero"] or fields["powers"]:
        return f"it holds symmetric grids with a zero, Uniform(bits=4 or 8), and this lies on {target}"
    bits = (2 * fields["n"]).bit_length()
    if bits not in _BITS or fields["n"] != 2 ** (bits - 1) - 1:
        return f"loaders know 4 and 8 bits, and this has {bits}"
    if not layout.is_row_major:
        return "it keeps one scale a row, and the channels of this weight run along another axis"
    groups, scale = fields["granularity"], fields["store"] or dtype
    inputs = layout.shape[1]
    if isinstance(groups, Group) and inputs % groups.size:
        return f"groups of {groups.size} do not divide its {inputs} inputs"
    if torch.promote_types(scale, dtype) != dtype:
        word = str(dtype).removeprefix("torch.")
        return (
            f"its scales are {str(scale).removeprefix('torch.')} and its weights {word}, in which loaders "
            f'multiply: use Uniform(param_dtype="{word}")'
        )
    return None


def _scheme(outline: Outline) -> _Scheme:
    groups = outline.fields["granularity"]
    return _Scheme((2 * outline.fields["n"]).bit_length(), groups.size if isinstance(groups, Group) else None)


def _packed(form: Grid) -> tuple[_Scheme, dict[str, Tensor]]:
    """The scheme of a parameter, and its codes and scales as the format names and shapes them, without their prefix."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    scheme, (rows, columns) = _scheme(form.outline), form.layout.shape
    # Our integers count from -(2^(bits-1) - 1), the format's from -2^(bits-1), which stays unused.
    integers = form.integers.to(torch.int8)
    scale = (torch.ones(1) if form.scale is None else form.scale).to(form.dtype)
    scale = scale.expand(rows) if scale.numel() == 1 else scale
    return scheme, {
        "weight_packed": pack_to_int32(integers.reshape(rows, columns), scheme.bits),
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
