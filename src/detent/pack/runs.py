"""Save and load: a run as one file, a file into a model, and where its bytes are."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detent import sharding
from detent.engine import Run
from detent.pack.atomic import destination
from detent.pack.coding import Coding
from detent.pack.container import Reader, Writer, check_form, unfit
from detent.pack.header import BUFFER, DTYPES, Head, Header, Life, Row
from detent.parameters import canonical_name
from detent.recipe import Recipe
from detent.specs import short

__all__ = ["load", "read_header", "save", "sizes"]


@dataclass(kw_only=True)
class _Held:
    """Distinct parameters and persistent buffers of a model, each under its first canonical name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)

    def names(self, first: str) -> list[str]:
        return [first, *(alias for alias, name in self.aliases.items() if name == first)]


def _held(model: nn.Module) -> _Held:
    """What of a model belongs into a file.

    Raises:
        ValueError: something that a file cannot hold.
    """
    sharding.refuse_flattened(model)
    held, first_name, by_name = _Held(), dict[int, str](), dict[str, Tensor]()
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{path or 'the model'!r} keeps extra state (get_extra_state), which a file cannot hold")
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for own, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is None:
                continue
            name = canonical_name(f"{path}.{own}" if path else own)
            if by_name.setdefault(name, tensor) is not tensor:
                raise ValueError(f"two tensors of the model are both called {name!r} once wrapper names are removed")
            first = first_name.setdefault(id(tensor), name)
            if first != name:
                held.aliases[name] = first
                continue
            reason = unfit(tensor)
            if reason or not name:
                raise ValueError(f"{name!r} {reason or 'has only wrapper names'}, which a file cannot hold")
            held.tensors[name] = tensor
            if own in buffers:
                held.buffers.add(name)
    return held


def save(
    run: Run,
    path: str | os.PathLike[str],
    life: Life = "both",
    *,
    coding: Coding | None = None,
    bits: int | None = None,
    recipe: Recipe | None = None,
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Write a run to one file without pickle, atomically: any failure leaves the file that was there.

    A path that ends in ".safetensors" gives a safetensors file whose entries are the full life, each under its own name
    (the codes stand beside them, bit-packed); any other path gives Detent's own container, which is smaller and is
    written with one tensor in memory at a time. Non-persistent buffers are left out, as in `model.state_dict()`. Under
    FSDP2 every process must call this; the first one writes. With the compressed life alone it warns as `run.finalize`
    does.

    Args:
        run: from `attach` or `compress`.
        path: the file; its folder must exist.
        life: "both", or "compressed" alone, which is as small as its codes.
        coding: how codes become bytes. "entropy" (the default): as small as they go. "bitpacked": at their true width,
            fast to read. "none": whole bytes.
        bits: the compressed life that `run.compressed(bits=...)` shows.
        recipe: the compressed life that `run.compressed(recipe=...)` shows.
        notes: plain JSON data to keep with the file (who, which data, which accuracy).

    Returns:
        Bytes written.

    Raises:
        ValueError: no run, no path, an unknown life or coding, notes that are not JSON, a tensor that a file cannot
            hold, both bits and recipe.
        RuntimeError: inside `run.compressed()`.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, detent as dt
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])
        >>> run = dt.compress(nn.Linear(64, 64), recipe)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save(run, f"{folder}/model.detent", life="compressed")
        ...     twin = nn.Linear(64, 64)
        ...     header = load(f"{folder}/model.detent", twin, life="compressed")
        >>> with run.compressed():
        ...     torch.equal(twin.weight, run.model.weight)
        True
        >>> size < 64 * 64 * 4 / 8 + 64 * 4 + 128
        True
    """
    if not isinstance(run, Run):
        raise ValueError(f"save(run=...): must be what attach or compress gave, not {type(run).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"save(path={path!r}): must be the path of a file")
    coding = check_form(path, life, coding)
    if run._inside:
        raise RuntimeError("save inside run.compressed(): leave the compressed life first, the file needs both")
    destination(path)  # what is wrong with it shall be said before anything is fitted
    if life == "compressed":
        run._warn_early('save(life="compressed")')
    held = _held(run.model)
    run._settle()  # may drop statistics of other weights
    found = run.statistics(bits=bits, recipe=recipe)
    own = any(getattr(m, "running_mean", None) is not None for m in run.model.modules())
    batchnorm = found.source if found else ("own" if own else "none")
    writer = Writer(path, life, coding=coding, batchnorm=batchnorm, notes=notes)
    tensors = _tensors(run, held, life, bits, recipe)
    if any(sharding._is_sharded(p) for p in run.model.parameters()):
        return _on_first_rank(lambda: _write(writer, tensors, held.aliases), tensors)
    return _write(writer, tensors, held.aliases)


def _tensors(
    run: Run, held: _Held, life: Life, bits: int | None, recipe: Recipe | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every tensor of a run as `Writer.add` wants it, one at a time; a collective under sharding."""
    encoders = run.encoders(bits=bits, recipe=recipe)
    plan = run.standing if recipe is None else recipe.without_mechanisms().resolve(run.model)
    second = run.statistics(bits=bits, recipe=recipe) or {}
    claims = {claim.name: claim for claim in plan.claims}
    for name, tensor in held.tensors.items():
        encode = encoders.get(name)
        arguments: dict[str, Any] = {"encoded": encode() if encode else None, "second": second.get(name)}
        if name in held.buffers:
            arguments["reason"] = BUFFER
        elif encode:
            rule = plan.rule_of(claims[name])
            arguments["mechanism"] = short(rule.mechanism) if rule.mechanism else ""
        else:
            claim = claims.get(name)  # none: a module that came after the recipe was resolved
            arguments["reason"] = "came after the recipe was resolved" if claim is None else claim.reason
        arguments["value"] = sharding.whole(tensor) if life == "both" or not encode else None
        yield name, arguments


def _write(writer: Writer, tensors: Iterator[tuple[str, dict[str, Any]]], aliases: Mapping[str, str]) -> int:
    with writer:
        for name, arguments in tensors:
            writer.add(name, **arguments)
        for alias, name in aliases.items():
            writer.alias(alias, name)
    return writer.size


def _on_first_rank(write: Callable[[], int], tensors: Iterator[Any]) -> int:
    """Let one process write and the others hear how it went, so that none goes on after a failure."""
    import torch.distributed as dist

    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [write()]
        except (OSError, ValueError) as error:
            outcome = [error]
    # All take part in gathering every tensor, also those after a failure; what others refuse the first refuses too.
    with contextlib.suppress(OSError, ValueError):
        for _ in tensors:
            pass
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a file says about itself; no tensor is read.

    Raises:
        FormatError: the header is damaged or of another version, or the file is not one of ours.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(run, f"{folder}/model.detent")
        ...     read_header(f"{folder}/model.detent").plan[0]["becomes"]
        'Uniform(bits=3)'
    """
    with Reader(path) as file:
        return file.header


def load(path: str | os.PathLike[str], model: nn.Module, life: Literal["full", "compressed"] = "full") -> Header:
    """Put one life of a file into a model: everything is checked and decoded before the first weight is written.

    The tensors of that life are checked against their checksums, those of the other one are not read. The model must
    have the same parameters and persistent buffers in the same dtypes, wrapped (DDP, compile, FSDP2) or not.

    Args:
        path: a file that `save` wrote.
        model: built by the same code.
        life: "full" or "compressed".

    Returns:
        What the file says about itself.

    Raises:
        FormatError: the file is damaged, of another version or not one of ours.
        ValueError: an unknown life, one that the file does not hold, or a model it does not fit.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(run, f"{folder}/model.detent")
        ...     twin = nn.Linear(8, 8)
        ...     _ = load(f"{folder}/model.detent", twin)
        >>> torch.equal(twin.weight, run.model.weight)
        True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"load(model=...): must be a torch.nn.Module, not {type(model).__name__}")
    with Reader(path) as file:
        file.check_life(life)
        held = _held(model)
        sources = _match(path, held, file._head)
        rows = {name: file._head.rows[name] for name in dict.fromkeys(sources.values())}
        room = _room([row for row in rows.values() if not file.is_there(row, life)])
        values = {}
        for name, row in rows.items():
            value = file.value(row, life, view=True)
            values[name] = value if file.is_there(row, life) else next(room).copy_(value)
        sharding.reshard(model)
        copies = []
        for name, tensor in held.tensors.items():
            part = sharding.from_whole(values[sources[name]], tensor, name)
            copies.append((sharding.local(tensor), part))
        with torch.no_grad():
            for place, value in copies:
                place.copy_(value)
        sharding.reshard(model)
        return file.header


def _room(rows: Sequence[Row]) -> Iterator[Tensor]:
    """Empty tensors for these rows, in one piece of memory.

    Taken one by one they would end up between a decoder's working memory and keep that from being given back: up to
    twice the model.
    """
    sizes = [DTYPES[row.dtype].itemsize * math.prod(row.shape) for row in rows]
    starts = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]
    whole = torch.empty(starts[-1], dtype=torch.uint8)
    for row, start, size in zip(rows, starts, sizes, strict=False):
        yield whole[start : start + size].view(DTYPES[row.dtype]).reshape(row.shape)


def _match(path: str | os.PathLike[str], held: _Held, head: Head) -> dict[str, str]:
    """Name in the file of every tensor of the model.

    Raises:
        ValueError: the first one that is missing, unexpected, tied otherwise, or of another shape or dtype.
    """
    stored = {name: (row.dtype, row.shape) for name, row in head.rows.items()}
    lookup = {**{name: name for name in stored}, **head.aliases}
    sources = {}

    def refuse(why: str) -> None:
        raise ValueError(f"{path} does not fit this model, which was left as it is: {why}")

    for first, tensor in held.tensors.items():
        names = held.names(first)
        found = [lookup[name] for name in names if name in lookup]
        if len(found) < len(names):
            missing = next(name for name in names if name not in lookup)
            refuse(f"{missing!r} is in the model and not in the file")
        if len(set(found)) > 1:
            refuse(f"{names[0]!r} and {names[1]!r} are one tied tensor in the model and two in the file")
        code, shape = stored[found[0]]
        if tuple(tensor.shape) != shape:
            refuse(f"{first!r} has shape {tuple(tensor.shape)} in the model and {shape} in the file")
        if tensor.dtype != DTYPES[code]:
            refuse(f"{first!r} is {tensor.dtype} in the model and {DTYPES[code]} in the file; convert the model first")
        if tensor.is_inference() or any(n > 1 and step == 0 for n, step in zip(shape, tensor.stride(), strict=True)):
            refuse(f"{first!r} cannot be written (an inference tensor, or one that repeats its memory)")
        sources[first] = found[0]
    known = {*held.tensors, *held.aliases}
    for name in lookup:
        if name not in known:
            refuse(f"{name!r} is in the file and not in the model")
    return sources


def sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Where the bytes of a file are.

    Returns:
        `file` = `header` + `codes` + `params` + `rest` + `full`, all in bytes: everything that is no tensor data;
        codes with their padding; fitted numbers; tensors of the compressed life stored as they are; tensors of the
        full life. In entropy-coded files fitted numbers count at full width, and codes as what is left of their
        tensor's bytes. Further `weights`, how many are coded; `nominal_bits`, their codes at true width without
        padding; and `overhead`, what header, params and padding add: `file - full - rest - nominal_bits // 8`.

    Raises:
        FormatError: the header is damaged or of another version, or the file is not one of ours.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     total = save(run, f"{folder}/model.detent", life="compressed", coding="bitpacked")
        ...     found = sizes(f"{folder}/model.detent")
        >>> found["file"] == total, found["codes"], found["params"], found["rest"], found["nominal_bits"]
        (True, 24, 4, 32, 192)
    """
    with Reader(path) as file:
        size, head = file._opened.size, file._head
        found = {"codes": 0, "params": 0, "rest": 0, "full": 0}
        nominal = 0
        coded = {row.compressed: len(row.code.params) for row in head.rows.values() if row.code is not None}
        coded |= {row.blob: len(row.params) for row in head.shared}
        for i, blob in enumerate(head.blobs):
            if i not in coded:
                found["full" if blob.bare else "rest"] += blob.length - (not blob.bare)
                continue
            params = sum(spec.width * (spec.count or 0) // 8 for spec in blob.specs[: coded[i]])
            codes = blob.specs[coded[i] :]
            rest = blob.length - bool(blob.specs)
            found["params"] += min(params, rest)
            found["codes"] += max(rest - params, 0)
            counts = [spec.count for spec in codes]
            if None in counts:
                counts = [values.size for values in file.pieces(i)[coded[i] :]]
            nominal += sum(spec.width * (count or 0) for spec, count in zip(codes, counts, strict=True))
    return {
        "file": size,
        "header": size - sum(found.values()),
        **found,
        "weights": sum(math.prod(row.shape) for row in head.rows.values() if row.code is not None),
        "nominal_bits": nominal,
        "overhead": size - found["full"] - found["rest"] - nominal // 8,
    }
