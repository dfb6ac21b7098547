"""Save and load: bit-packed codes and raw tensors in one safetensors file, written atomically, read with suspicion."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import safetensors.torch
import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from detent import sharding
from detent.engine import Run
from detent.lives import Encoded
from detent.pack.atomic import destination, replace_file
from detent.pack.bits import bytes_of, pack_bits, tensor_of, unpack_bits
from detent.pack.header import (
    BLOB,
    BUFFER,
    CLAIMED,
    CODE_OF,
    DTYPES,
    REESTIMATED,
    VERSION,
    CodedRow,
    FormatError,
    Head,
    Header,
    Life,
    SharedRow,
    digest,
    layout_of,
    raw_bytes,
    shown,
    stream_bytes,
    stream_width,
)
from detent.recipe import Recipe, canonical_name, short, to_spec
from detent.targets import Codes, Params, Stream, Target

__all__ = ["load", "read_header", "save", "sizes"]

_LONGEST_HEADER = 1 << 24  # a hundred thousand tensors; more is an attack on the reader's memory


# --- what a model holds -------------------------------------------------------------------------------------------


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
            reason = _unfit(tensor)
            if reason or not name:
                raise ValueError(f"{name!r} {reason or 'has only wrapper names'}, which a file cannot hold")
            held.tensors[name] = tensor
            if own in buffers:
                held.buffers.add(name)
    return held


def _unfit(tensor: Tensor) -> str:
    """Why a file cannot hold a tensor, or nothing."""
    if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        return "is not initialised yet"
    if tensor.is_meta:
        return "lies on the meta device and has no data"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is not a dense tensor ({tensor.layout})"
    if tensor.dtype not in CODE_OF:
        return f"is {tensor.dtype}"
    return ""


# --- writing ------------------------------------------------------------------------------------------------------


def save(
    run: Run,
    path: str | os.PathLike[str],
    life: Life = "both",
    *,
    bits: int | None = None,
    recipe: Recipe | None = None,
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Write a run to one safetensors file without pickle, atomically: any failure leaves the file that was there.

    Non-persistent buffers are left out, as in `model.state_dict()`. In a file with both lives every tensor of the full
    life is an ordinary safetensors entry under its own name, so any safetensors reader loads it. Memory: one copy of
    the file. Under FSDP2 every process must call this; the first one writes.

    Args:
        run: from `attach` or `compress`.
        path: the file; its folder must exist.
        life: "both", or "compressed" alone, which is as small as its codes.
        bits: the compressed life that `run.compressed(bits=...)` shows.
        recipe: the compressed life that `run.compressed(recipe=...)` shows.
        notes: plain JSON data to keep with the file (who, which data, which accuracy).

    Returns:
        Bytes written.

    Raises:
        ValueError: an unknown life, notes that are not JSON, a tensor that a file cannot hold, both bits and recipe.
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
        >>> size < 64 * 64 * 4 / 8 + 64 * 4 + 1000
        True
    """
    if life not in ("both", "compressed"):
        raise ValueError(f'save(life={life!r}): must be "both" or "compressed"')
    if run._inside:
        raise RuntimeError("save inside run.compressed(): leave the compressed life first, the file needs both")
    if sys.byteorder != "little":
        raise ValueError("save: files are little-endian and this machine is not")
    where = destination(path)
    kept = _checked_notes(notes)
    sharded = any(sharding._is_sharded(p) for p in run.model.parameters())
    content = _content(run, life, bits, recipe, kept)
    if sharded:
        return _on_first_rank(lambda: _write(where, content))
    return _write(where, content)


def _checked_notes(notes: Mapping[str, Any] | None) -> dict[str, JsonValue]:
    plain = dict(notes or {})
    adapter = pydantic.TypeAdapter(dict[str, JsonValue])
    try:
        text = json.dumps(plain, allow_nan=False)
        back = adapter.validate_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save(notes=...): not plain JSON data: {_first_line(error)}") from None
    if back != plain:
        raise ValueError("save(notes=...): must be plain JSON data with text keys and lists, or it comes back changed")
    return back


@dataclass(kw_only=True)
class _Content:
    """What will be written."""

    entries: dict[str, Tensor]
    metadata: dict[str, str]


def _content(run: Run, life: Life, bits: int | None, recipe: Recipe | None, notes: dict[str, JsonValue]) -> _Content:
    held = _held(run.model)
    encoded = run.encoded(bits=bits, recipe=recipe)
    plan = run.standing if recipe is None else recipe.resolve(run.model)
    found = run.statistics(bits=bits, recipe=recipe)
    reasons = {claim.name: claim.reason or CLAIMED for claim in plan.claims}
    pulled_by = {
        claim.name: short(rule.mechanism) if (rule := plan.rule_of(claim)).mechanism else "" for claim in plan.claimed
    }
    writer = _Writer()
    for name, item in encoded.items():
        writer.add_coded(name, item, held.tensors[name].dtype, pulled_by[name])
    second = dict(found or {})
    for name, tensor in held.tensors.items():
        if life == "both":
            value = sharding.whole(tensor)
            writer.full[name] = _raw_row(value, writer.why_index(BUFFER if name in held.buffers else reasons[name]))
            writer.entries[name] = value
            if name in second:
                writer.add_rest(name, second[name], REESTIMATED)
        elif name not in encoded:
            value = second[name] if name in second else sharding.whole(tensor)
            writer.add_rest(name, value, BUFFER if name in held.buffers else reasons[name])
    own = any(getattr(m, "running_mean", None) is not None for m in run.model.modules())
    batchnorm = "re-estimated" if found else ("own" if own else "none")
    return writer.finish(life, batchnorm, held.aliases, notes)


def _raw_row(value: Tensor, why: int) -> tuple[str, tuple[int, ...], str, int]:
    return CODE_OF[value.dtype], tuple(value.shape), digest(bytes_of(value)), why


@dataclass(kw_only=True)
class _Pieces:
    """Rows of some params and streams, and their bytes."""

    params: list[Any] = field(default_factory=list)
    streams: list[Any] = field(default_factory=list)
    numbers: list[bytes] = field(default_factory=list)
    codes: list[bytes] = field(default_factory=list)

    @property
    def data(self) -> list[bytes]:
        return self.numbers + self.codes


@dataclass(kw_only=True)
class _Writer:
    """Rows of the header and the bytes they speak of, as they come in."""

    entries: dict[str, Tensor] = field(default_factory=dict)
    targets: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    shared: list[Any] = field(default_factory=list)
    held: list[_Pieces] = field(default_factory=list)
    why: list[str] = field(default_factory=list)
    coded: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)
    blob_shared: list[bytes] = field(default_factory=list)
    blob_coded: list[bytes] = field(default_factory=list)
    blob_rest: list[bytes] = field(default_factory=list)

    def why_index(self, reason: str) -> int:
        if reason not in self.why:
            self.why.append(reason)
        return self.why.index(reason)

    def add_rest(self, name: str, value: Tensor, reason: str) -> None:
        self.rest[name] = _raw_row(value, self.why_index(reason))
        self.blob_rest.append(bytes_of(value).tobytes())

    def add_coded(self, name: str, item: Encoded, dtype: torch.dtype, mechanism: str) -> None:
        kind = (to_spec(item.target), mechanism)
        if kind not in self.targets:
            self.targets.append(kind)
        own, common = _Pieces(), _Pieces()
        for number in item.target.stored:
            value = item.params[number]
            data = bytes_of(value).tobytes()
            part = common if number in item.target.shared else own
            part.params.append((number, CODE_OF[value.dtype], tuple(value.shape), digest(data)))
            part.numbers.append(data)
        for stream in item.codes.streams:
            real = stream.values.is_floating_point()
            if real:
                assert stream.width == 8 * stream.values.dtype.itemsize, (name, stream)
                data = bytes_of(stream.values).tobytes()
            else:
                data = pack_bits(stream.values.cpu().numpy(), stream.width)
            width = CODE_OF[stream.values.dtype] if real else stream.width
            part = common if stream.name in item.target.shared else own
            part.streams.append((stream.name, width, stream.values.numel(), digest(data)))
            part.codes.append(data)
        layout = item.params.layout
        place = (layout.channel_dim, layout.conv_groups)
        self.blob_coded += own.data
        where = self._shared_index(common)
        kind_index = self.targets.index(kind)
        self.coded[name] = (kind_index, CODE_OF[dtype], layout.shape, place, own.params, own.streams, where)

    def _shared_index(self, common: _Pieces) -> int | None:
        """Where the pieces stand that several tensors have in common: written once, compared by their bytes."""
        if not common.data:
            return None
        for i, held in enumerate(self.held):
            if (held.params, held.streams, held.data) == (common.params, common.streams, common.data):
                return i
        self.held.append(common)
        self.shared.append((common.params, common.streams))
        self.blob_shared += common.data
        return len(self.held) - 1

    def finish(self, life: Life, batchnorm: str, aliases: dict[str, str], notes: dict[str, JsonValue]) -> _Content:
        head = {
            "writer": sys.modules["detent"].__version__,  # imports go one way, and the version is said in one place
            "life": life,
            "batchnorm": batchnorm,
            "targets": self.targets,
            "why": self.why,
            "aliases": aliases,
            "shared": self.shared,
            "coded": self.coded,
            "rest": self.rest,
            "full": self.full,
            "notes": notes,
        }
        # Names repeat so much that this takes a header to a quarter; it was 9 % of a 2-bit ResNet-32.
        plain = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
        text = base64.b64encode(zlib.compress(plain, 9)).decode()
        try:
            _parse(text)
        except ValueError as error:
            raise ValueError(f"save: nothing was written, because nobody could read it: {_first_line(error)}") from None
        entries = dict(self.entries)
        blob = b"".join([*self.blob_shared, *self.blob_coded, *self.blob_rest])
        if blob:
            entries[BLOB] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        metadata = {"detent": str(VERSION), "sha256": _sha256(text), "header": text}
        if life == "both":
            metadata["format"] = "pt"  # transformers refuses a safetensors file without it
        return _Content(entries=entries, metadata=metadata)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _on_first_rank(write: Callable[[], int]) -> int:
    """Let one process write and the others hear how it went, so that none goes on after a failure."""
    import torch.distributed as dist

    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [write()]
        except (OSError, ValueError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _write(where: Path, content: _Content) -> int:
    entries, seen = {}, set()
    for name, tensor in content.entries.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses two entries in one memory; distinct tensors of a model may share it.
        pointer = plain.untyped_storage().data_ptr()
        entries[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    data = safetensors.torch.save(entries, content.metadata)
    replace_file(where, data)
    return len(data)


# --- reading ------------------------------------------------------------------------------------------------------


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
    with _opened(path) as file:
        return shown(file.head)


def sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Where the bytes of a file are.

    Returns:
        `file` = `header` + `codes` + `params` + `rest` + `full`, all in bytes: everything that is no tensor data;
        codes with their padding; fitted numbers; tensors of the compressed life stored as they are; tensors of the
        full life. Further `weights`, how many are coded; `nominal_bits`, their codes without padding; and `overhead`,
        what header, params and padding add: `file - full - rest - nominal_bits / 8`, rounded up.

    Raises:
        FormatError: the header is damaged or of another version, or the file is not one of ours.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     total = save(run, f"{folder}/model.detent", life="compressed")
        ...     found = sizes(f"{folder}/model.detent")
        >>> found["file"] == total, found["codes"], found["params"], found["rest"], found["nominal_bits"]
        (True, 24, 4, 32, 192)
    """
    with _opened(path) as file:
        head = file.head
        pieces = (*head.shared, *head.coded.values())
        streams = [stream for row in pieces for stream in row.streams]
        found = {
            "codes": sum(map(stream_bytes, streams)),
            "params": sum(raw_bytes(number) for row in pieces for number in row.params),
            "rest": sum(map(raw_bytes, head.rest.values())),
            "full": sum(map(raw_bytes, head.full.values())),
        }
        nominal = sum(stream.numel * stream_width(stream) for stream in streams)
        return {
            "file": file.size,
            "header": file.size - sum(found.values()),
            **found,
            "weights": sum(math.prod(row.shape) for row in head.coded.values()),
            "nominal_bits": nominal,
            "overhead": file.size - found["full"] - found["rest"] - nominal // 8,
        }


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
    if life not in ("full", "compressed"):
        raise ValueError(f'load(life={life!r}): must be "full" or "compressed"')
    if not isinstance(model, nn.Module):
        raise ValueError(f"load(model=...): must be a torch.nn.Module, not {type(model).__name__}")
    with _opened(path) as file:
        if life == "full" and file.head.life == "compressed":
            raise ValueError(
                f"{path} holds only the compressed life; load it with life='compressed', or save it with life='both'"
            )
        held = _held(model)
        sources = _match(path, held, file.head)
        values = file.full() if life == "full" else file.compressed()
        sharding.reshard(model)
        copies = []
        for name, tensor in held.tensors.items():
            part = sharding.from_whole(values[sources[name]], tensor, name)
            copies.append((sharding.local(tensor), part))
        with torch.no_grad():
            for place, value in copies:
                place.copy_(value)
        sharding.reshard(model)
        return shown(file.head)


def _match(path: str | os.PathLike[str], held: _Held, head: Head) -> dict[str, str]:
    """Name in the file of every tensor of the model.

    Raises:
        ValueError: the first one that is missing, unexpected, tied otherwise, or of another shape or dtype.
    """
    stored = head.names()
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


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'header'}: {first['msg']}"
    return (str(error) or type(error).__name__).splitlines()[0]


def _parse(text: str) -> Head:
    packed = base64.b64decode(text, validate=True)
    unpacker = zlib.decompressobj()
    plain = unpacker.decompress(packed, _LONGEST_HEADER)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"it is cut short or longer than {_LONGEST_HEADER} bytes")
    head = Head.model_validate_json(plain)
    head.check()
    return head


@dataclass(kw_only=True)
class _Opened:
    """An open file whose header is sound and agrees with what safetensors found."""

    path: str
    size: int
    handle: Any
    head: Head

    def full(self) -> dict[str, Tensor]:
        found = {}
        for name, row in self.head.full.items():
            found[name] = self.handle.get_tensor(name)
            self._verify(name, bytes_of(found[name]), row.digest)
        return found

    def compressed(self) -> dict[str, Tensor]:
        """Every tensor of the compressed life: codes first, then the raw rest, then what both lives share."""
        head = self.head
        blob = self.handle.get_tensor(BLOB).numpy() if head.blob_bytes() else np.empty(0, dtype=np.uint8)
        at = 0

        def take(name: str, size: int, expected: str) -> np.ndarray:
            nonlocal at
            piece = blob[at : at + size]
            at += size
            self._verify(name, piece, expected)
            return piece

        def read(name: str, row: SharedRow | CodedRow) -> tuple[dict[str, Tensor], tuple[Stream, ...]]:
            numbers = {
                number.name: tensor_of(
                    take(f"{name}:{number.name}", raw_bytes(number), number.digest), DTYPES[number.dtype], number.shape
                )
                for number in row.params
            }
            streams = []
            for stream in row.streams:
                data = take(f"{name}:{stream.name}", stream_bytes(stream), stream.digest)
                if isinstance(stream.kind, int):
                    plain = unpack_bits(data, stream.numel, stream.kind)
                    values = torch.from_numpy(plain if plain.dtype == np.uint8 else plain.astype(np.int32))
                else:
                    values = tensor_of(data, DTYPES[stream.kind], (stream.numel,))
                streams.append(Stream(name=stream.name, values=values, width=stream_width(stream)))
            return numbers, tuple(streams)

        targets = head.build_targets()
        shared = [read(f"shared[{i}]", row) for i, row in enumerate(head.shared)]
        found: dict[str, Tensor] = {}
        for name, row in head.coded.items():
            numbers, streams = read(name, row)
            if row.shared is not None:
                numbers, streams = numbers | shared[row.shared][0], (*streams, *shared[row.shared][1])
            params = Params(tensors=numbers, layout=layout_of(row))
            found[name] = self._decode(name, row, targets[row.target], params, Codes(streams=streams))
        for name, raw in head.rest.items():
            found[name] = tensor_of(take(name, raw_bytes(raw), raw.digest), DTYPES[raw.dtype], raw.shape)
        for name, raw in head.full.items():
            if name not in found:
                found[name] = self.handle.get_tensor(name)
                self._verify(name, bytes_of(found[name]), raw.digest)
        return found

    def _verify(self, name: str, data: np.ndarray, expected: str) -> None:
        if digest(np.ascontiguousarray(data)) != expected:
            raise FormatError(f"{self.path}: {name!r} is damaged: its bytes do not have the checksum in the header")

    def _decode(self, name: str, row: CodedRow, target: Target, params: Params, codes: Codes) -> Tensor:
        try:
            value = target.decode(codes, params, DTYPES[row.dtype])
        # Whatever a target makes of codes that it did not write itself: the file is at fault.
        except Exception as error:
            raise FormatError(f"{self.path}: {name!r} cannot be decoded: {_first_line(error)}") from error
        if tuple(value.shape) != row.shape or value.dtype != DTYPES[row.dtype]:
            raise FormatError(f"{self.path}: {name!r} decodes to {value.dtype} {tuple(value.shape)}, not as declared")
        return value


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_Opened]:
    """Open a file and check all that it declares against its size, before any tensor is made.

    Raises:
        FormatError: anything wrong with it.
        OSError: it cannot be opened.
    """
    shown_path = os.fspath(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise type(error)(f"cannot open {shown_path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise FormatError(f"{shown_path}: is {kind}, not a Detent file")
    if status.st_size == 0:
        raise FormatError(f"{shown_path}: is empty, not a Detent file")
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        why = _first_line(error).removeprefix("Error while deserializing header: ")
        raise FormatError(f"{shown_path}: is damaged or not a safetensors file: {why}") from None
    except OSError as error:
        raise type(error)(f"cannot open {shown_path}: {error.strerror or error}") from None
    with handle as file:
        head = _read_head(shown_path, file.metadata() or {})
        try:
            _check_entries(file, head)
        except (SafetensorError, ValueError) as error:
            raise FormatError(f"{shown_path}: header and contents disagree: {_first_line(error)}") from None
        opened = _Opened(path=shown_path, size=status.st_size, handle=file, head=head)
        try:
            yield opened
        except SafetensorError as error:
            raise FormatError(f"{shown_path}: is damaged: {_first_line(error)}") from None


def _read_head(path: str, metadata: Mapping[str, str]) -> Head:
    version, text = metadata.get("detent"), metadata.get("header")
    if version is None:
        raise FormatError(f"{path}: is a safetensors file without a Detent header")
    if version != str(VERSION):
        newer = version.isascii() and version.isdigit()
        what = f"has format version {version}; this release reads {VERSION}" if newer else "has no valid format version"
        raise FormatError(f"{path}: {what}")
    if text is None or metadata.get("sha256") != _sha256(text):
        raise FormatError(f"{path}: the header is damaged: it does not have the checksum beside it")
    try:
        return _parse(text)
    except (ValueError, RecursionError, zlib.error) as error:
        raise FormatError(f"{path}: the header is not valid: {_first_line(error)}") from None


def _check_entries(file: Any, head: Head) -> None:
    expected = {name: (row.dtype, row.shape) for name, row in head.full.items()}
    if head.blob_bytes():
        expected[BLOB] = ("U8", (head.blob_bytes(),))
    actual = set(file.keys())
    if odd := actual ^ expected.keys():
        name = min(odd)
        raise ValueError(f"{name!r} is {'not declared' if name in actual else 'missing'}")
    for name, (code, shape) in expected.items():
        entry = file.get_slice(name)
        if entry.get_dtype() != code or tuple(entry.get_shape()) != shape:
            raise ValueError(f"{name!r} is not of the declared dtype and shape")
