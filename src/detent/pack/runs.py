"""Save: a run as one file; what a file says of itself, and where its bytes are."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from detent import sharding
from detent.amounts import Budget, budget_bytes
from detent.batchnorm import statistics_of
from detent.contents import Contents, contents_of, refuse_unsavable
from detent.engine import Run
from detent.pack.atomic import destination
from detent.pack.coding import Coding
from detent.pack.container import Reader, Writer, check_form
from detent.pack.header import BUFFER, Life
from detent.pack.shown import Header
from detent.recipe import Recipe
from detent.roundings import stored
from detent.specs import short
from detent.targets.parts import Part

__all__ = ["read_header", "save", "sizes"]


def save(
    run: Run,
    path: str | os.PathLike[str],
    life: Life = "both",
    *,
    coding: Coding | None = None,
    bits: int | None = None,
    recipe: Recipe | None = None,
    notes: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
) -> int:
    """Write a run to one file without pickle, atomically: any failure leaves the file that was there.

    A path that ends in ".safetensors" gives a safetensors file whose entries are the full life, each under its own name
    (the codes stand beside them, bit-packed); any other path gives Detent's own container, which is smaller and is
    written with one tensor in memory at a time. Non-persistent buffers are left out, as in `model.state_dict()`. Under
    FSDP2 every process must call this; the first one writes. It warns as `run.finalize` does if the recipe has not come
    to its end.

    Args:
        run: from `attach` or `compress`.
        path: the file; its folder must exist.
        life: "both", or "compressed" alone, which is as small as its codes.
        coding: how codes become bytes. "entropy" (the default): as small as they go. "bitpacked": at their true width,
            fast to read. "none": whole bytes.
        bits: the compressed life that `run.compressed(bits=...)` shows.
        recipe: the compressed life that `run.compressed(recipe=...)` shows.
        notes: plain JSON data to keep with the file (who, which data, which accuracy).
        budget: the most bytes that the file may have, as for `allocate`: a larger one is not written. BatchNorm's
            statistics of the compressed life are then rounded to 16 bits (`run.round_statistics`), as the card says.

    Returns:
        Bytes written.

    Raises:
        ValueError: no run, no path, an unknown life or coding, notes that are not JSON, a tensor that a file cannot
            hold, both bits and recipe, a file beyond its budget (and by how much).
        RuntimeError: inside `run.compressed()`, or while another thread works on the same model.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch, detent as dt
        >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])
        >>> run = dt.compress(torch.nn.Linear(64, 64), recipe)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save(run, f"{folder}/model.detent", life="compressed")
        ...     twin = torch.nn.Linear(64, 64)
        ...     header = dt.load(f"{folder}/model.detent", twin, life="compressed")
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
    most = None if budget is None else budget_bytes(budget, run.model, "save")
    with run._one_thread("detent.save"):
        if run._inside:
            raise RuntimeError("save inside run.compressed(): leave the compressed life first, the file needs both")
        is_sharded = any(sharding._is_sharded(p) for p in run.model.parameters())
        if not is_sharded:  # what is wrong with it shall be said before anything is fitted
            destination(path)
        run.activations.refuse_unready("save")
        run._warn_early(f'save(life="{life}")')
        held = contents_of(run.model).without(run.leave_out)
        refuse_unsavable(held, "save", unready=False)
        run._settle()  # may drop statistics of other weights
        if most is not None:
            _shorten_statistics(run, bits, recipe)
        found = run.statistics(bits=bits, recipe=recipe)
        own = any(getattr(m, "running_mean", None) is not None for m in run.model.modules())
        batchnorm = found.source if found else ("own" if own else "none")
        tensors = _tensors(run, held, life, bits, recipe)

        def write() -> int:
            # Made here: of several processes only the one that writes looks at the path, which others may not have.
            rounded = stored(run.activations.places)
            writer = Writer(path, life, coding=coding, batchnorm=batchnorm, notes=notes, activations=rounded, most=most)
            return _write(writer, tensors, held.aliases)

        size = _on_first_rank(write, tensors) if is_sharded else write()
        run._say_losses("save", bits, recipe)
        return size


def _shorten_statistics(run: Run, bits: int | None, recipe: Recipe | None) -> None:
    """Give the compressed life BatchNorm statistics of 16 bits, unless it has them."""
    found = run.statistics(bits=bits, recipe=recipe)
    values = statistics_of(run.model) if found is None else found
    if not values or (found is not None and "rounded" in found.source):
        return
    largest = max(float(value.abs().max()) for value in values.values() if value.numel())
    short = "float16" if largest <= torch.finfo(torch.float16).max else "bfloat16"
    run.round_statistics(short, bits=bits, recipe=recipe)


def _tensors(
    run: Run, held: Contents, life: Life, bits: int | None, recipe: Recipe | None
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
        except BaseException as error:  # whatever it is, the others must hear of it, or they wait for ever
            outcome = [error]
    # All take part in gathering every tensor, also those after a failure; what others refuse the first refuses too.
    with contextlib.suppress(OSError, ValueError):
        for _ in tensors:
            pass
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a file says about itself; no tensor is read.

    Raises:
        FormatError: the header is damaged or of another version, or the file is not one of ours.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, torch, detent as dt
        >>> run = dt.compress(torch.nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(run, f"{folder}/model.detent")
        ...     read_header(f"{folder}/model.detent").plan[0]["becomes"]
        'Uniform(bits=3)'
    """
    with Reader(path) as file:
        return file.header


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
        >>> import tempfile, torch, detent as dt
        >>> run = dt.compress(torch.nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     total = save(run, f"{folder}/model.detent", life="compressed", coding="bitpacked")
        ...     found = sizes(f"{folder}/model.detent")
        >>> found["file"] == total, found["codes"], found["params"], found["rest"], found["nominal_bits"]
        (True, 24, 4, 32, 192)
    """
    with Reader(path) as file:
        size, head = file.size, file._head
        found = {"codes": 0, "params": 0, "rest": 0, "full": 0}
        nominal = 0
        coded = {row.compressed: _numbers(row.code.parts) for row in head.rows.values() if row.code is not None}
        coded |= {row.blob: _numbers(row.parts) for row in head.shared}
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


def _numbers(parts: Sequence[Part]) -> int:
    """How many parts hold fitted numbers; they come first."""
    return sum(part.role == "numbers" for part in parts)
