"""Write a file tensor by tensor, read it at random."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import JsonValue
from torch import Tensor

from detent.contents import unfit
from detent.lives import Encoded
from detent.pack.atomic import Replacement, destination, replace_file
from detent.pack.bits import array_of, bytes_of, tensor_of
from detent.pack.checkpoint import INDEX, shard_name
from detent.pack.coding import CODINGS, Coding, Piece, Spec, decode_tensor, encode_tensor
from detent.pack.frames import (
    DetentFrame,
    Frame,
    SafetensorsFrame,
    by_alignment,
    open_frame,
    refuse_frame_name,
    safetensors_header,
)
from detent.pack.header import (
    BUFFER,
    CODE_OF,
    DTYPES,
    NARROWER,
    Blob,
    Code,
    CodedForm,
    Columns,
    FormatError,
    Life,
    RawForm,
    Row,
    checksum,
    first_line,
    plain_bytes,
    raw_spec,
    read_head,
    specs_of,
    write_head,
)
from detent.pack.shown import Header, shown
from detent.specs import target_of, to_spec
from detent.targets import Form, Target
from detent.targets.parts import Part

__all__ = ["Reader", "Writer", "check_form", "opened", "unpack"]


# --- writing, tensor by tensor ------------------------------------------------------------------------------------


class Writer:
    """A file that grows tensor by tensor; leaving the block without an error puts it in place, all at once.

    One tensor is held at a time (all of them in the safetensors form, whose header stands first).

    Args:
        path: the file; its folder must exist. A path that ends in ".safetensors" gives the safetensors form.
        life: "both", or "compressed" alone.
        coding: "entropy", "bitpacked" or "none": how codes become bytes. The safetensors form packs bits.
        batchnorm: where the running statistics of the compressed life come from: "none", "own", "re-estimated",
            "corrected", the latter three also with ", rounded to" and float16, bfloat16, float8_e4m3fn or float8_e5m2.
        notes: plain JSON data to keep with the file.
        activations: how inputs of modules are rounded in the compressed life, a row each.
        most: bytes that the file may have; of a larger one nothing is left. `None` for any number.

    Raises:
        ValueError: an unknown life or coding, notes that are not JSON, a tensor that a file cannot hold, a file of more
            than `most` bytes.
        OSError: the file cannot be written; what was there before is untouched.

    Example:
        >>> import tempfile, detent as dt
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with dt.pack.Writer(f"{folder}/f.detent", "compressed") as writer:
        ...         writer.add("bias", torch.tensor([0.5, -1.0]), reason="I said so")
        ...     with dt.pack.Reader(f"{folder}/f.detent") as reader:
        ...         reader.names, reader.tensor("bias"), reader.header.card["full_precision"]
        (['bias'], tensor([ 0.5000, -1.0000]), {'I said so': ['bias']})
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        life: Life = "both",
        *,
        coding: Coding | None = None,
        batchnorm: str = "none",
        notes: Mapping[str, Any] | None = None,
        activations: Sequence[Mapping[str, Any]] = (),
        most: int | None = None,
    ) -> None:
        self._most = most
        self._coding: Coding = check_form(path, life, coding)
        self._is_safetensors = _is_safetensors(path)
        kept = _checked_notes(notes)
        self._columns = Columns(
            writer=sys.modules["detent"].__version__,  # imports go one way, and the version is said in one place
            life=life,
            batchnorm=batchnorm,
            notes=json.dumps(kept, separators=(",", ":"), ensure_ascii=False) if kept else "",
            activations=json.dumps({"inputs": [*activations]}, separators=(",", ":")) if activations else "",
        )
        self._held: dict[Any, int] = {}
        self._file = Replacement(destination(path))
        self._frame: Frame | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole file, once the block is left."""
        return self._file.size

    def __enter__(self) -> Writer:
        self._file.__enter__()
        self._frame = SafetensorsFrame(self._file) if self._is_safetensors else DetentFrame(self._file)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Left with the error, if there is one, so that the temporary file goes.
        with self._file_block(kind):
            if kind is None:
                self._finish()
                self._refuse_more()
        self._frame = None

    @contextlib.contextmanager
    def _file_block(self, kind: type[BaseException] | None) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._file.__exit__(type(error))
            raise
        self._file.__exit__(kind)

    def add(
        self,
        name: str,
        value: Tensor | None,
        *,
        encoded: Encoded | None = None,
        second: Tensor | None = None,
        reason: str = "",
        mechanism: str = "",
    ) -> None:
        """Write one tensor.

        Args:
            name: its name; a dotted path.
            value: its values in the full life; in a file without that life, `None` if there are codes.
            encoded: its codes, if it has any.
            second: other values of the same shape and dtype for the compressed life (BatchNorm statistics).
            reason: why it is stored as it is: "buffer", or why a parameter is in full precision.
            mechanism: how training pulled it to its target, as text.

        Raises:
            ValueError: a name that stands twice or cannot be a name, or a tensor that a file cannot hold.
            OSError: the file cannot be written.
        """
        assert self._frame is not None, "a Writer is used in a with block"
        columns = self._columns
        taken = name in columns.names or any(name == alias for alias, _ in columns.aliases)
        if not name or name.startswith(".") or "\n" in name or taken:
            raise ValueError(f"{name!r} stands twice, is empty, starts with a dot or holds a line break")
        if self._is_safetensors:
            refuse_frame_name(name)
        if (encoded is None and value is None) or (columns.life == "both" and value is None):
            raise ValueError(f"{name!r} has neither values nor codes for the file's lives")
        kinds = {(tuple(t.shape), t.dtype) for t in (value, second) if t is not None}
        kinds |= {(encoded.form.layout.shape, encoded.form.dtype)} if encoded is not None else set()
        if len(kinds) > 1:
            raise ValueError(f"{name!r} has another shape or dtype in its other life: {sorted(map(str, kinds))}")
        for tensor in (value, second):
            if tensor is not None and (why := unfit(tensor)):
                raise ValueError(f"{name!r} {why.reason}, which a file cannot hold: {why.remedy}")
        if columns.life == "compressed" and second is not None:
            value, second = second, None
        whole = value if columns.life == "both" else None
        if encoded is not None:
            self._add_coded(name, encoded, mechanism)
            kind = CODE_OF[encoded.form.dtype]
        else:
            assert value is not None
            bytewise = reason == BUFFER and "float8" in columns.batchnorm  # only who asked for 8 bits gets them
            kind = CODE_OF[value.dtype] if whole is not None and self._is_safetensors else narrowest(value, bytewise)
            own = second if whole is not None else value
            form = RawForm(reason, CODE_OF[value.dtype], kind, None if second is None else narrowest(second, bytewise))
            columns.add_row(name, value.shape, form)
            if own is not None:
                piece = _raw_piece(own, form.second or kind)
                self._add_blob([piece], raw_spec(str(piece.kind), own.shape), own.shape)
        if whole is not None:
            data = bytes_of(whole.to(DTYPES[kind]))
            columns.checks.append(checksum(data))
            self._frame.bare(name, kind, whole.shape, data)

    def alias(self, alias: str, name: str) -> None:
        """Give a tensor that has been added a further name."""
        if alias in self._columns.names:
            raise ValueError(f"{alias!r} is a tensor itself")
        self._columns.aliases.append((alias, self._columns.names[name]))

    def _add_coded(self, name: str, item: Encoded, mechanism: str) -> None:
        columns, form = self._columns, item.form
        spec = (json.dumps(to_spec(item.target), separators=(",", ":"), allow_nan=False), mechanism)
        if spec not in columns.targets:
            columns.targets.append(spec)
        parts, values = form.parts, form.values
        try:
            form.check()
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be written as {type(form).__name__}: {error}") from None
        pairs = list(zip(parts, values, strict=True))
        shared = self._shared([pair for pair in pairs if pair[0].is_shared])
        own = [pair for pair in pairs if not pair[0].is_shared]
        columns.counts += [values.numel() for part, values in own if part.is_listed][:1]
        target, layout = columns.targets.index(spec), form.layout
        numbers = form.outline.numbers
        coded = CodedForm(CODE_OF[form.dtype], target, layout.axes_code, layout.conv_groups, shared, numbers)
        columns.add_row(name, layout.shape, coded)
        self._add_blob(*_written(own), layout.shape)

    def _shared(self, pairs: list[tuple[Part, Tensor]]) -> int | None:
        """Where the numbers stand that several tensors have in common: written once, compared by their bytes."""
        if not pairs:
            return None
        pieces, specs = _written(pairs)
        key = (specs, tuple(piece.values.tobytes() for piece in pieces))
        if key not in self._held:
            self._held[key] = len(self._held)
            self._add_blob(pieces, specs, ())
        return self._held[key]

    def _add_blob(self, pieces: Sequence[Piece], specs: Sequence[Spec], shape: Sequence[int]) -> None:
        assert self._frame is not None
        data = encode_tensor(pieces, shape=tuple(shape), coding=self._coding)
        self._columns.add_blob(len(data), plain_bytes(specs), checksum(data))
        self._frame.blob(data)

    def _refuse_more(self) -> None:
        if self._most is not None and self.size > self._most:
            both = self._columns.life == "both"
            way = 'life="compressed" takes less' if both else "detent.allocate finds a recipe whose file fits"
            raise ValueError(
                f"save(budget=...): the file would be {self.size:,} bytes, {self.size - self._most:,} more than the "
                f"{self._most:,} allowed; nothing was written; {way}"
            )

    def _finish(self) -> None:
        assert self._frame is not None
        try:
            header = write_head(self._columns)
            read_head(header, self._file.size + len(header))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"save: nothing was written, because nobody could read it: {first_line(error)}") from None
        self._frame.finish(header)


def _raw_piece(tensor: Tensor, kind: str | None = None, name: str = "") -> Piece:
    kind = kind or CODE_OF[tensor.dtype]
    return Piece(name, kind, array_of(tensor.detach().to(DTYPES[kind])))


def _written(pairs: Sequence[tuple[Part, Tensor]]) -> tuple[list[Piece], tuple[Spec, ...]]:
    """Numbers of a form as pieces of a blob, and what a reader knows of them; the ones of a mask are not counted."""
    counted = [replace(part, count=values.numel()) if part.is_listed else part for part, values in pairs]
    specs = specs_of(counted)
    values = [array_of(values.detach()) for _, values in pairs]
    return [Piece(spec.name, spec.kind, own) for spec, own in zip(specs, values, strict=True)], specs


def narrowest(tensor: Tensor, bytewise: bool = False) -> str:
    """The shortest dtype that holds every number of a tensor to the bit; floats of 8 bits only with `bytewise`."""
    own = CODE_OF[tensor.dtype]
    few = tensor.detach().reshape(-1)[:256]
    for code in NARROWER[own]:
        if code == own:
            break
        if code.startswith("F8") and not bytewise:
            continue
        if all(
            torch.equal(_bits(part.to(DTYPES[code]).to(part.dtype)), _bits(part)) for part in (few, tensor.detach())
        ):
            return code
    return own


def _bits(tensor: Tensor) -> Tensor:
    """Equal if and only if the numbers are the same to the bit, NaN and -0.0 included."""
    integers = {4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.dtype.itemsize]) if tensor.is_floating_point() else tensor


def check_form(path: str | os.PathLike[str], life: Life, coding: Coding | None) -> Coding:
    """The coding that a path and a wish ask for.

    Raises:
        ValueError: an unknown life or coding.
    """
    if life not in ("both", "compressed"):
        raise ValueError(f'save(life={life!r}): must be "both" or "compressed"')
    if coding is not None and coding not in CODINGS:
        raise ValueError(f"save(coding={coding!r}): must be one of {', '.join(map(repr, CODINGS))}")
    if sys.byteorder != "little":
        raise ValueError("save: files are little-endian and this machine is not")
    return coding or ("bitpacked" if _is_safetensors(path) else "entropy")


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).endswith(".safetensors")


def _checked_notes(notes: Mapping[str, Any] | None) -> dict[str, JsonValue]:
    plain = dict(notes or {})
    adapter = pydantic.TypeAdapter(dict[str, JsonValue])
    try:
        text = json.dumps(plain, allow_nan=False)
        back = adapter.validate_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save(notes=...): not plain JSON data: {first_line(error)}") from None
    if back != plain:
        raise ValueError("save(notes=...): must be plain JSON data with text keys and lists, or it comes back changed")
    return back


# --- reading, tensor by tensor ------------------------------------------------------------------------------------


class Reader:
    """A file of either form, opened: its header is checked at once, a tensor when it is asked for.

    The file is mapped into memory: opening costs its header, and a tensor its own size.

    Args:
        path: a file that `save` or a `Writer` wrote.

    Attributes:
        header: what the file says about itself.
        names: the tensors in the order in which they lie in the file.
        aliases: further names of tied tensors, and the name under which each is stored.

    Raises:
        FormatError: the file is damaged, of another version or not one of ours.
        OSError: it cannot be opened.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(torch.nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Binary())]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent")
        ...     with Reader(f"{folder}/model.detent") as reader:
        ...         reader.names, reader.tensor("weight").unique().numel(), reader.tensor("weight", "full").shape
        (['weight', 'bias'], 2, torch.Size([8, 8]))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._opened = open_frame(path)
        self._head = self._opened.head
        self._shared: dict[int, dict[str, Tensor]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._opened.close()

    @property
    def path(self) -> str:
        """The path that was opened, as it was given."""
        return self._opened.path

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._opened.size

    @functools.cached_property
    def header(self) -> Header:
        """What the file says about itself."""
        return shown(self._head)

    @property
    def names(self) -> list[str]:
        """The tensors in the order in which they lie in the file."""
        return list(self._head.rows)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tied tensors, and the name under which each is stored."""
        return self._head.aliases

    @property
    def coded(self) -> list[str]:
        """The tensors that are stored as codes, in the order in which they lie in the file."""
        return [name for name, row in self._head.rows.items() if row.code is not None]

    @functools.cached_property
    def _targets(self) -> list[Target]:
        return [target_of(spec) for spec, _ in self._head.specs]

    def tensor(self, name: str, life: Literal["full", "compressed"] = "compressed") -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            FormatError: it is damaged.
            ValueError: an unknown name or life, or one that the file does not hold.
        """
        self.check_life(life)
        return self.value(self._row(name), life)

    def encoded(self, name: str) -> Encoded:
        """What one tensor is, and the target it lies on: `Held` where this process does not know that.

        Raises:
            FormatError: it is damaged.
            ValueError: an unknown name, or a tensor without codes.
        """
        row = self._row(name)
        if row.code is None:
            raise ValueError(f"{self._opened.path} holds {name!r} as it is, not as codes")
        return Encoded(target=self._targets[row.code.target], form=self._form(name, row, row.code))

    def _row(self, name: str) -> Row:
        row = self._head.rows.get(self._head.aliases.get(name, name))
        if row is None:
            raise ValueError(f"{self._opened.path} holds no tensor {name!r}")
        return row

    def check_life(self, life: str) -> None:
        """Refuse a life that the file does not hold.

        Raises:
            ValueError: in a sentence that says what to do.
        """
        if life not in ("full", "compressed"):
            raise ValueError(f'load(life={life!r}): must be "full" or "compressed"')
        if life == "full" and self._head.life == "compressed":
            raise ValueError(
                f"{self._opened.path} holds only the compressed life; ask for life='compressed', or save it with "
                "life='both'"
            )

    def value(self, row: Row, life: Literal["full", "compressed"], view: bool = False) -> Tensor:
        """A tensor of the header; as a view of the file, if wished and if it stands there as it is."""
        index, blob = self._blob(row, life)
        if row.code is not None and not blob.bare:
            return self._form(blob.owner, row, row.code).dense()
        kind = DTYPES[str(blob.specs[0].kind)]
        if not blob.bare:
            return tensor_of(self.pieces(index)[0], kind, row.shape).to(DTYPES[row.dtype])
        data = np.frombuffer(self._opened.blob(index), dtype=np.uint8)
        if view and self.is_there(row, life):
            return torch.from_numpy(np.asarray(_Unlocked(data))).view(kind).reshape(row.shape)
        return tensor_of(data, kind, row.shape).to(DTYPES[row.dtype])

    def is_there(self, row: Row, life: Literal["full", "compressed"]) -> bool:
        """Whether the file holds the tensor as it is, so that `value` can be a view of it."""
        _, blob = self._blob(row, life)
        return blob.bare and math.prod(row.shape) > 0 and DTYPES[str(blob.specs[0].kind)] == DTYPES[row.dtype]

    def _blob(self, row: Row, life: Literal["full", "compressed"]) -> tuple[int, Blob]:
        index = row.compressed if life == "compressed" else row.full
        assert index is not None
        return index, self._head.blobs[index]

    def pieces(self, index: int) -> list[np.ndarray]:
        """What a blob that is not bare holds.

        Raises:
            FormatError: it is damaged.
        """
        blob = self._head.blobs[index]
        try:
            found = decode_tensor(self._opened.blob(index), blob.specs, shape=blob.shape)
            self._opened.release(index)  # mapped pages count as memory, and nobody reads them twice
            return found
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{self._opened.path}: {blob.owner!r} is damaged: {first_line(error)}") from None

    def _common(self, code: Code) -> dict[str, Tensor]:
        """Numbers that a tensor has in common with others."""
        if code.shared is None:
            return {}
        if code.shared not in self._shared:
            row = self._head.shared[code.shared]
            self._shared[code.shared] = _as_tensors(row.parts, self.pieces(row.blob))
        return self._shared[code.shared]

    def _form(self, name: str, row: Row, code: Code) -> Form:
        named = _as_tensors(code.parts, self.pieces(row.compressed)) | self._common(code)
        dtype = DTYPES[row.dtype]
        try:
            values = [named[part.name] for part in code.outline.parts(code.layout, dtype)]
            return code.outline.form(values, code.layout, dtype)
        except ValueError as error:
            raise FormatError(f"{self._opened.path}: {name!r} cannot be decoded: {first_line(error)}") from None


@contextlib.contextmanager
def opened(file: str | os.PathLike[str] | Reader) -> Iterator[Reader]:
    """A file by its path, or one that is open already, which then stays open.

    What is done with one file opens it once: between two openings its path may become another file.
    """
    if isinstance(file, Reader):
        yield file
        return
    with Reader(file) as reader:
        yield reader


class _Unlocked:
    """Read-only memory that does not say so: torch has no read-only tensors, and warns; nobody here writes to it."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data  # keeps the file mapped
        self.__array_interface__ = data.__array_interface__ | {"data": (data.ctypes.data, False)}


def _as_tensors(parts: Sequence[Part], pieces: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """The pieces of a blob as a form takes them."""
    found = {}
    for part, values in zip(parts, pieces, strict=True):
        if not isinstance(part.kind, int):
            found[part.name] = tensor_of(values, part.kind, (values.size,))
            continue
        # A view of a mapped file cannot be written to, which torch warns of.
        narrow = values.dtype == np.uint8
        own = values if narrow and values.flags.writeable else values.astype(np.uint8 if narrow else np.int32)
        found[part.name] = torch.from_numpy(own)
    return found


def unpack(
    path: str | os.PathLike[str] | Reader,
    out: str | os.PathLike[str],
    life: Literal["full", "compressed"] = "compressed",
    *,
    shard_bytes: int | None = None,
    advance: Callable[[], object] = lambda: None,
) -> int:
    """Write one life of a file as plain safetensors, for every other tool; the model's code is not needed.

    Rounded activations of the compressed life are no tensors: a warning says that they are left behind.

    Tensor by tensor: memory for the largest one. Tied tensors stand under each of their names.

    Args:
        path: a file that `save` wrote, or a `Reader` of it.
        out: the safetensors file; its folder must exist.
        life: "full" or "compressed".
        shard_bytes: makes `out` a folder of shards of at most so many bytes of tensors (a larger tensor has one of its
            own) and their index, as transformers writes and reads them; made if it is not there.
        advance: called after each tensor; not after its further names.

    Returns:
        Bytes written.

    Raises:
        FormatError: the file is damaged, of another version or not one of ours.
        ValueError: an unknown life, or one that the file does not hold.
        OSError: a file cannot be opened or written.

    Example:
        >>> import safetensors.torch, tempfile, detent as dt
        >>> run = dt.compress(torch.nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Binary())]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent")
        ...     _ = dt.unpack(f"{folder}/model.detent", f"{folder}/model.safetensors", "compressed")
        ...     plain = safetensors.torch.load_file(f"{folder}/model.safetensors")
        >>> with run.compressed():
        ...     torch.equal(plain["weight"], run.model.weight)
        True
    """
    with opened(path) as file:
        file.check_life(life)
        if life == "compressed" and file._head.activations:
            inputs = f"{len(file._head.activations)} modules"
            warnings.warn(
                f"{file.path}: the compressed life also rounds what goes into {inputs}, which a state dict cannot "
                "say; detent.load puts it on a model",
                stacklevel=2,
            )
        rows = {**file._head.rows, **{alias: file._head.rows[name] for alias, name in file.aliases.items()}}
        if shard_bytes is None:
            return _write_plain(file, rows, list(rows), destination(out), life, advance)
        if shard_bytes < 1:
            raise ValueError(f"unpack(shard_bytes={shard_bytes}): must be 1 or more")
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        parts = _shards(rows, shard_bytes)
        told, size = {}, 0
        for number, names in enumerate(parts, 1):
            shard = shard_name("model", number, len(parts))
            size += _write_plain(file, rows, names, destination(folder / shard), life, advance)
            told |= dict.fromkeys(names, shard)
        # The index comes last: a folder whose index is there is whole.
        index = {"metadata": {"total_size": sum(map(_bytes_of_row, rows.values()))}, "weight_map": told}
        text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        replace_file(destination(folder / f"model{INDEX}"), text)
        return size + len(text)


def _bytes_of_row(row: Row) -> int:
    return math.prod(row.shape) * DTYPES[row.dtype].itemsize


def _shards(rows: Mapping[str, Row], most: int) -> list[list[str]]:
    """Names in runs of at most so many bytes."""
    found, size = [list[str]()], 0
    for name, row in rows.items():
        size += _bytes_of_row(row)
        if found[-1] and size > most:
            found.append([])
            size = _bytes_of_row(row)
        found[-1].append(name)
    return found


def _write_plain(
    file: Reader,
    rows: Mapping[str, Row],
    names: Sequence[str],
    where: Path,
    life: Literal["full", "compressed"],
    advance: Callable[[], object],
) -> int:
    """Write these tensors of a life as one safetensors file."""
    names = sorted(names, key=lambda name: by_alignment(name, rows[name].dtype))
    entries = [(name, rows[name].dtype, rows[name].shape) for name in names]
    with Replacement(where) as plain:
        plain.write(safetensors_header(entries, {"format": "pt"}))
        for name in names:
            plain.write(bytes_of(file.value(rows[name], life, view=True)))
            if name not in file.aliases:
                advance()
    return plain.size
