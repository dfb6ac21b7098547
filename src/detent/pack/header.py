"""The header of a file: what it declares, and how that is written, read and checked."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from detent.contents import DTYPES
from detent.grouping import Layout
from detent.pack.coding import Spec
from detent.pack.dictionary import DICTIONARY
from detent.quantizers import from_row
from detent.specs import check_size
from detent.targets.forms import Outline, outline_of
from detent.targets.parts import FLOATS, Part

__all__ = [
    "BUFFER",
    "CLAIMED",
    "CODE_OF",
    "DTYPES",
    "LONGEST",
    "NARROWER",
    "VERSION",
    "Blob",
    "Code",
    "CodedForm",
    "Columns",
    "FormatError",
    "Head",
    "Life",
    "RawForm",
    "Row",
    "checksum",
    "first_line",
    "plain_bytes",
    "raw_spec",
    "read_head",
    "specs_of",
    "write_head",
]

VERSION = 2
BUFFER, CLAIMED = "buffer", "claimed"
LONGEST = 1 << 26  # bytes of a header as it stands in the file, and unpacked: a million tensors

Life = Literal["both", "compressed"]
CODE_OF = {dtype: code for code, dtype in DTYPES.items()}

_CODES = tuple(DTYPES)  # a dtype is written as its place in this list
_LIVES: tuple[Life, ...] = ("compressed", "both")
_STATISTICS = re.compile(
    r"none|(own|re-estimated|corrected)(, rounded to (float16|bfloat16|float8_e4m3fn|float8_e5m2))?"
)
_LEAST_UNPACKED, _MOST_PACKING = 1 << 20, 32  # a header may unpack to so many bytes, and so many times its length more
_LEAST_DECLARED, _MOST_DECLARED = 1 << 30, 1 << 16  # all tensors of a file together, likewise
_LEAST_MEMORY, _MOST_MEMORY = 1 << 27, 64  # and take so many bytes of memory, and so many times the file's length
_A_NUMBER, _A_TEXT, _A_CHARACTER, _A_JSON, _A_TENSOR = 32, 64, 2, 32, 1 << 10  # bytes of memory, about
_MOST_A_WEIGHT = 256  # numbers of one part for each weight of its tensor
_RANK, _LENGTH = 64, 1 << 48
_RAW, _TWICE, _CODED = 0, 1, 2  # kinds of forms

NARROWER: dict[str, tuple[str, ...]] = {code: (code,) for code in DTYPES} | {
    "F64": ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"),
    "F32": ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32"),
    "I64": ("U8", "I8", "I16", "I32", "I64"),
    "I32": ("U8", "I8", "I16", "I32"),
    "I16": ("U8", "I8", "I16"),
}

_T = TypeVar("_T")


class FormatError(ValueError):
    """A file that is damaged, is not one of ours, or is of a version this release cannot read."""


# --- what a header declares ---------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """Numbers that several coded tensors have in common (a global codebook), and their blob."""

    parts: tuple[Part, ...]
    blob: int


class Code(NamedTuple):
    """What a tensor is; `target` and `shared` point into the lists of `Head`, `parts` are those of its own blob."""

    target: int
    layout: Layout
    outline: Outline
    parts: tuple[Part, ...]
    shared: int | None


class Blob(NamedTuple):
    """A run of bytes. A bare one is the numbers themselves, any other is what `coding.encode_tensor` gives."""

    owner: str
    bare: bool
    specs: tuple[Spec, ...]
    shape: tuple[int, ...]
    length: int
    check: int


class Row(NamedTuple):
    """One tensor.

    `why`: why it is stored as it is (a buffer, or why a parameter is in full precision), `CLAIMED` if it has codes.
    `compressed` and `full` point into `Head.blobs`; they are one where the lives do not differ. `full` is `None` in a
    file without the full life.
    """

    dtype: str
    shape: tuple[int, ...]
    why: str
    code: Code | None
    compressed: int
    full: int | None


@dataclass(frozen=True, kw_only=True)
class Head:
    """The whole header, as in docs/format.md, checked."""

    writer: str
    life: Life
    batchnorm: str
    specs: tuple[tuple[Mapping[str, Any], str], ...]
    shared: tuple[Shared, ...]
    rows: Mapping[str, Row]
    aliases: Mapping[str, str]
    blobs: tuple[Blob, ...]
    notes: Mapping[str, Any]
    activations: tuple[Mapping[str, Any], ...]


def specs_of(parts: Sequence[Part]) -> tuple[Spec, ...]:
    """Parts of a form as pieces of a blob."""
    return tuple(Spec(p.name, p.kind if isinstance(p.kind, int) else CODE_OF[p.kind], p.count) for p in parts)


def raw_spec(dtype: str, shape: Sequence[int]) -> tuple[Spec, ...]:
    """A tensor stored as it is as the only piece of a blob."""
    return (Spec("", dtype, math.prod(shape)),)


def plain_bytes(specs: Sequence[Spec]) -> int | None:
    """Bytes that bit-packing takes: the length of a blob that is written as 0. `None` if only the blob can tell."""
    total = 1 if specs else 0
    for spec in specs:
        if spec.count is None:
            return None
        width = spec.kind if isinstance(spec.kind, int) else 8 * DTYPES[spec.kind].itemsize
        total += -(-spec.count * width // 8)
    return total


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def checksum(data: Any) -> int:
    """CRC-32 of a run of bytes.

    It finds every damage of at most 32 neighbouring bits and misses any other once in 2^32. It guards against
    accidents: whoever can change a file on purpose can change its checksums too.
    """
    return zlib.crc32(data)


# --- writing ------------------------------------------------------------------------------------------------------


class RawForm(NamedTuple):
    """What many tensors that are stored as they are have in common."""

    why: str
    dtype: str
    raw: str
    second: str | None


class CodedForm(NamedTuple):
    """What many coded tensors have in common."""

    dtype: str
    target: int
    axis: int  # of the channels, and of what is stacked: `Layout.axes_code`
    groups: int
    shared: int | None
    numbers: tuple[int, ...]  # `Outline.numbers`


@dataclass(kw_only=True)
class Columns:
    """A header as it grows while tensors are written."""

    writer: str
    life: Life
    batchnorm: str = "none"
    notes: str = ""
    activations: str = ""
    targets: list[tuple[str, str]] = field(default_factory=list)
    forms: dict[RawForm | CodedForm, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    aliases: list[tuple[str, int]] = field(default_factory=list)

    def add_row(self, name: str, shape: Sequence[int], form: RawForm | CodedForm) -> None:
        """Declare a tensor; its blobs follow."""
        self.names[name] = len(self.names)
        self.rows.append(self.forms.setdefault(form, len(self.forms)))
        self.shapes.append(tuple(shape))

    def add_blob(self, length: int, plain: int | None, check: int) -> None:
        """Declare a blob of the compressed life."""
        self.lengths.append(0 if length == plain else length)
        self.checks.append(check)


def write_head(columns: Columns) -> bytes:
    """The header as it stands in a file.

    Raises:
        ValueError: what no reader would take.
    """
    import msgpack

    try:
        pack = msgpack.Packer().pack
        plain = b"".join(map(pack, _flat(columns)))
    except (OverflowError, UnicodeEncodeError) as error:
        raise ValueError(str(error)) from None
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    packed = packer.compress(plain) + packer.flush()
    return packed + b"".join(check.to_bytes(4, "little") for check in columns.checks)


def _flat(c: Columns) -> Iterator[int | str]:
    """The values of a header, one after another."""
    why = list(dict.fromkeys(form.why for form in c.forms if isinstance(form, RawForm)))
    yield from (c.writer, _LIVES.index(c.life), c.batchnorm)
    yield len(c.targets)
    for target in c.targets:
        yield from target
    yield len(why)
    yield from why
    yield len(c.forms)
    for form in c.forms:
        if isinstance(form, RawForm):
            yield from (_RAW if form.second is None else _TWICE, why.index(form.why))
            yield from (_CODES.index(code) for code in form[1:] if code is not None)
        else:
            yield from (_CODED, _CODES.index(form.dtype), form.target, form.axis, form.groups)
            yield 0 if form.shared is None else form.shared + 1
            yield len(form.numbers)
            yield from form.numbers
    yield "\n".join(c.names)
    yield from c.rows
    for shape in c.shapes:
        yield len(shape)
        yield from shape
    yield from c.counts
    yield from c.lengths
    yield len(c.aliases)
    for alias in c.aliases:
        yield from alias
    yield c.notes
    if c.activations:  # last, so that a file without them is as it was before there were any
        yield c.activations


# --- reading ------------------------------------------------------------------------------------------------------


class _Values:
    """The values of a header, taken one after another, each checked.

    What becomes of a value takes more memory than the value: each is charged with that, and the file's length says how
    much there may be in all.
    """

    def __init__(self, plain: bytes, most: int) -> None:
        import msgpack

        # Numbers and text are all there is: nothing that nests, so nothing that reserves more than it takes.
        limits = {f"max_{kind}_len": 0 for kind in ("bin", "array", "map", "ext")}
        self._unpacker = msgpack.Unpacker(max_str_len=len(plain), max_buffer_size=len(plain) or 1, **limits)
        self._unpacker.feed(plain)
        self._size, self._left = len(plain), most

    def number(self, below: int, what: str) -> int:
        value = self._next(what)
        if type(value) is not int or not 0 <= value < below:
            raise ValueError(f"{what} is {value!r}: must be a number from 0 to {below - 1}")
        self.charge(_A_NUMBER)
        return value

    def text(self, what: str) -> str:
        value = self._next(what)
        if type(value) is not str:
            raise ValueError(f"{what} is {value!r}: must be text")
        self.charge(_A_TEXT + _A_CHARACTER * len(value))
        return value

    def charge(self, size: int) -> None:
        """Count bytes of memory."""
        self._left -= size
        if self._left < 0:
            raise ValueError("it declares more than a file of this length may")

    def many(self, what: str, read: Callable[[], _T]) -> tuple[_T, ...]:
        """A count, and so many of something; each takes a byte at least."""
        left = self._size - self._unpacker.tell()
        return tuple(read() for _ in range(self.number(left + 1, f"the number of {what}")))

    def shape(self) -> tuple[int, ...]:
        return tuple(self.number(_LENGTH, "a dimension") for _ in range(self.number(_RANK + 1, "a rank")))

    @property
    def is_over(self) -> bool:
        return self._unpacker.tell() == self._size

    def end(self) -> None:
        if self._unpacker.tell() != self._size:
            raise ValueError(f"it has {self._size - self._unpacker.tell()} bytes too many")

    def _next(self, what: str) -> int | str:
        value = next(self._unpacker, None)
        if value is None:
            raise ValueError(f"it ends before {what}")
        return value


def _inflate(unpacker: Any, data: bytes, most: int) -> bytes:
    try:
        return unpacker.decompress(data, most)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def read_head(data: bytes, size: int) -> Head:
    """A header from a file of so many bytes.

    Raises:
        ValueError: anything that is not as it must be.
        RecursionError: JSON that nests without end.
    """
    if len(data) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} bytes")
    unpacker = zlib.decompressobj(-15, DICTIONARY)
    plain = _inflate(unpacker, data, min(LONGEST, _LEAST_UNPACKED + _MOST_PACKING * len(data)))
    if not unpacker.eof:
        raise ValueError("it is cut short or unpacks to too much")
    checks = unpacker.unused_data
    if len(checks) % 4:
        raise ValueError(f"its checksums take {len(checks)} bytes")
    values = _Values(plain, _LEAST_MEMORY + _MOST_MEMORY * size)
    head = _parsed(values, [int.from_bytes(checks[i : i + 4], "little") for i in range(0, len(checks), 4)])
    _check_declared(head, size)
    return head


def _parsed(v: _Values, checks: list[int]) -> Head:
    writer, life, batchnorm = v.text("the writer"), _LIVES[v.number(2, "the life")], v.text("the kind of statistics")
    if not _STATISTICS.fullmatch(batchnorm):
        raise ValueError(f"{batchnorm!r} is no kind of BatchNorm statistics")
    told = v.many("targets", lambda: (v.text("a target"), v.text("a mechanism")))
    v.charge(sum(_A_JSON * len(text) for text, _ in told))
    why = v.many("reasons", lambda: v.text("a reason"))
    forms = v.many("forms", lambda: _form(v, why))
    names = _names(v.text("the names"), v)
    mine = [forms[v.number(len(forms), "a form")] for _ in names]
    shapes = [v.shape() for _ in names]
    made = _Blobs(v, len(told))
    rows = {name: made.row(name, form, shape, life) for name, form, shape in zip(names, mine, shapes, strict=True)}
    if len(made.blobs) != len(checks):
        raise ValueError(f"{len(checks)} checksums for {len(made.blobs)} blobs")
    blobs = tuple(blob._replace(length=made.length(blob), check=c) for blob, c in zip(made.blobs, checks, strict=True))
    aliases = v.many("aliases", lambda: (v.text("an alias"), v.number(len(names), "what an alias stands for")))
    further = {alias for alias, _ in aliases}
    if len(further) != len(aliases) or further & rows.keys() or not all(map(_is_name, further)):
        raise ValueError("an alias stands twice, is a tensor itself or is no name")
    notes = v.text("the notes")
    v.charge(_A_JSON * len(notes))
    activations = "" if v.is_over else v.text("the activations")
    v.charge(_A_JSON * len(activations))
    v.end()
    return Head(
        writer=writer,
        life=life,
        batchnorm=batchnorm,
        specs=tuple((_spec(text), mechanism) for text, mechanism in told),
        shared=tuple(made.shared),
        rows=rows,
        aliases={alias: names[i] for alias, i in aliases},
        blobs=blobs,
        notes=_json(notes) if notes else {},
        activations=_activations(activations),
    )


def _activations(text: str) -> tuple[Mapping[str, Any], ...]:
    given = _json(text) if text else {"inputs": []}
    rows = given.get("inputs")
    if set(given) != {"inputs"} or not isinstance(rows, list) or (text and not rows):
        raise ValueError("no list of rounded activations")
    names = [from_row(row)[0] for row in rows]
    if len(set(names)) != len(names):
        raise ValueError("the inputs of a module are rounded twice")
    return tuple(rows)


def _json(text: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    value = json.loads(text, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError("JSON that is not an object")
    return value


def _spec(text: str) -> dict[str, Any]:
    spec = _json(text)
    check_size(spec, "a target")
    return spec


def _is_name(name: str) -> bool:
    return bool(name) and name[0] != "." and "\n" not in name


def _names(text: str, v: _Values) -> list[str]:
    v.charge(_A_TENSOR * (text.count("\n") + 1))
    names = text.split("\n") if text else []
    if len(set(names)) != len(names) or not all(map(_is_name, names)):
        raise ValueError("a name stands twice, is empty or starts with a dot")
    return names


def _dtype(v: _Values) -> str:
    return _CODES[v.number(len(_CODES), "a dtype")]


def _form(v: _Values, why: Sequence[str]) -> RawForm | CodedForm:
    kind = v.number(3, "a form's kind")
    if kind == _CODED:
        dtype, target = _dtype(v), v.number(_LENGTH, "a target's number")
        axis, groups, shared = (
            v.number(_LENGTH, "an axis"),
            v.number(_LENGTH, "groups"),
            v.number(_LENGTH, "a shared piece"),
        )
        numbers = v.many("numbers of a form", lambda: v.number(_LENGTH, "a number of a form"))
        return CodedForm(dtype, target, axis, groups, shared - 1 if shared else None, numbers)
    reason, dtype, raw = why[v.number(len(why), "a reason's number")], _dtype(v), _dtype(v)
    second = _dtype(v) if kind == _TWICE else None
    for stored in (raw, second or raw):
        if stored not in NARROWER[dtype]:
            raise ValueError(f"{dtype} is stored as {stored}")
    return RawForm(reason, dtype, raw, second)


class _Blobs:
    """The blobs of a header in the order in which they lie in the file, and rows that point at them."""

    def __init__(self, v: _Values, targets: int) -> None:
        self._v, self._targets = v, targets
        self.shared: list[Shared] = []
        self.blobs: list[Blob] = []

    def row(self, name: str, form: RawForm | CodedForm, shape: tuple[int, ...], life: Life) -> Row:
        """One tensor."""
        if isinstance(form, RawForm):
            if form.second is not None and life == "compressed":
                raise ValueError(f"{name!r} has numbers for another life, which the file does not hold")
            code, raw, why = None, raw_spec(form.raw, shape), form.why
            own = raw if life == "compressed" else (raw_spec(form.second, shape) if form.second else None)
        else:
            code, raw, why = self._code(name, form, shape), raw_spec(form.dtype, shape), CLAIMED
            own = specs_of(code.parts)
        if own is not None:
            self._add(name, own, shape)
        compressed = full = len(self.blobs) - 1
        if life == "both":
            size = math.prod(shape) * DTYPES[str(raw[0].kind)].itemsize
            self.blobs.append(Blob(name, True, raw, shape, size, 0))
            full = len(self.blobs) - 1
            compressed = full if own is None else compressed
        return Row(form.dtype, shape, why, code, compressed, full if life == "both" else None)

    def _add(self, name: str, specs: tuple[Spec, ...], shape: tuple[int, ...]) -> None:
        self.blobs.append(Blob(name, False, specs, shape, 0, 0))

    def length(self, blob: Blob) -> int:
        """The length of a blob; to be asked in their order."""
        if blob.bare:
            return blob.length
        told = self._v.number(_LENGTH, f"the length of {blob.owner!r}")
        length = told or plain_bytes(blob.specs)
        if length is None:
            raise ValueError(f"{blob.owner!r} has no length")
        return length

    def _code(self, name: str, form: CodedForm, shape: tuple[int, ...]) -> Code:
        if form.target >= self._targets:
            raise ValueError(f"{name!r} points at target {form.target} of {self._targets}")
        layout, dtype = Layout.of_code(form.axis, shape, form.groups), DTYPES[form.dtype]
        if layout is None or not layout.numel or dtype not in FLOATS:
            raise ValueError(f"{name!r} is {form.dtype} with the impossible layout {form.axis, form.groups} of {shape}")
        try:
            outline = outline_of(form.numbers)
            parts = outline.parts(layout, dtype)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        common, own = tuple(p for p in parts if p.is_shared), [p for p in parts if not p.is_shared]
        self._share(name, form.shared, common)
        if any(part.is_listed for part in own):
            count = self._v.number(layout.numel + 1, "how many survive")
            own = [replace(part, count=count) if part.is_listed else part for part in own]
        if any((part.count or 0) > _MOST_A_WEIGHT * layout.numel for part in own):
            raise ValueError(f"{name!r}: more numbers than {layout.numel} weights may have")
        return Code(form.target, layout, outline, tuple(own), form.shared)

    def _share(self, name: str, index: int | None, parts: tuple[Part, ...]) -> None:
        """Compare what a tensor shares with what is there, or add it as the next there is."""
        if bool(parts) != (index is not None):
            raise ValueError(f"{name!r} shares what is its own, or the other way round")
        if index is None:
            return
        if index == len(self.shared):
            self.shared.append(Shared(parts, len(self.blobs)))
            self._add(f"shared[{index}]", specs_of(parts), ())
        if index >= len(self.shared) or specs_of(self.shared[index].parts) != specs_of(parts):
            raise ValueError(f"{name!r} shares shared[{index}], which is none of its own or does not come next")


def _check_declared(head: Head, size: int) -> None:
    """A file can be small because its tensors are all alike, but not without end."""
    total = sum(math.prod(row.shape) * DTYPES[row.dtype].itemsize for row in head.rows.values())
    for blob in head.blobs:
        total += sum((spec.count or 0) * (2 if isinstance(spec.kind, int) else 8) for spec in blob.specs)
    if total > _LEAST_DECLARED + _MOST_DECLARED * size:
        raise ValueError(f"tensors of {total} bytes are more than a file of {size} bytes can hold")
