"""Forms: what a projected tensor is, whatever target it lies on. Files store forms, exports translate them."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from detent.grouping import Channel, Granularity, GranularityLike, Group, Layout, PerTensor, granularity_of
from detent.targets.parts import FLOATS, Part, Take, compute_dtype, scale_ends
from detent.targets.patterns import Mask, Pattern, pattern_of

__all__ = [
    "Codewords",
    "Floats",
    "Form",
    "Grid",
    "Levels",
    "Outline",
    "Sparse",
    "grid_cell",
    "in_pieces",
    "looked_up",
    "outline_of",
]

_MOST_CODES = 1 << 16  # levels, or codewords
_MOST_POWERS = 16  # a side, so that the largest is below 2^16
_LONGEST = 1 << 31  # weights of a group, or of a codeword
_PIECE = 1 << 21  # weights placed at a time where a group's levels have to be looked up weight by weight


class _Codec(NamedTuple):
    """How a field of a form stands in a file: as whole numbers."""

    write: Callable[[Any], tuple[int, ...]]
    read: Callable[[Take], Any]


def _codec(low: int, high: int, values: Sequence[Any] | None = None) -> _Codec:
    """A number of a range, or one of some values by its place."""
    if values is None:
        return _Codec(lambda number: (int(number),), lambda take: take(low, high))
    return _Codec(lambda value: (values.index(value),), lambda take: values[take(low, high)])


def _granularity_number(groups: Granularity) -> tuple[int]:
    return (1 + groups.size if isinstance(groups, Group) else int(isinstance(groups, Channel)),)


def _granularity(take: Take) -> Granularity:
    number = take(0, _LONGEST)
    return (PerTensor(), Channel())[number] if number < 2 else Group(size=number - 1)


_GRANULARITY = _Codec(_granularity_number, _granularity)
_FLAG = _codec(0, 1, (False, True))
_FLOAT = _codec(0, len(FLOATS) - 1, FLOATS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Form(abc.ABC):
    """What a projected tensor is: numbers from which it is rebuilt to the bit. There are five kinds, and no others.

    Args:
        layout: of the weight.
        dtype: of the weight.
    """

    layout: Layout
    dtype: torch.dtype

    codecs: ClassVar[Mapping[str, _Codec]]

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """The projected tensor; zeros are +0.0."""

    @property
    @abc.abstractmethod
    def values(self) -> tuple[Tensor, ...]:
        """The runs of numbers, one for each of `parts`."""

    @property
    @abc.abstractmethod
    def fields(self) -> dict[str, Any]:
        """What a reader must know besides the values, as `Outline` takes it."""

    @classmethod
    def taken(cls, take: Take) -> dict[str, Any]:
        """Fields, from whole numbers in a file."""
        return {name: codec.read(take) for name, codec in cls.codecs.items()}

    @staticmethod
    @abc.abstractmethod
    def parts_of(fields: Mapping[str, Any], layout: Layout, dtype: torch.dtype) -> tuple[Part, ...]:
        """What the runs of numbers are."""

    @staticmethod
    @abc.abstractmethod
    def made(fields: Mapping[str, Any], values: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Form:
        """The form, from its runs of numbers by name."""

    def scaled(self, factors: Tensor) -> Form | None:
        """The same codes with each output channel times a factor, numbers in float32; `None` if no form is that."""
        return None

    @property
    def cell(self) -> Tensor | None:
        """Width of the cells of an even grid, > 0, broadcasting against the weight; `None` where there are none."""
        return None

    @functools.cached_property
    def outline(self) -> Outline:
        """All but values, layout and dtype."""
        return Outline(type(self), self.fields)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the runs of numbers are."""
        return self.outline.parts(self.layout, self.dtype)

    @property
    def named(self) -> dict[str, Tensor]:
        """The runs of numbers by name."""
        return {part.name: values for part, values in zip(self.parts, self.values, strict=True)}

    @property
    def nbytes(self) -> int:
        """Bytes on disk at true width, without what several tensors may share."""
        return sum(p.nbytes(v) for p, v in zip(self.parts, self.values, strict=True) if not p.is_shared)

    @property
    def shared_nbytes(self) -> int:
        """Bytes on disk at true width of what several tensors may share: the codebook of a rule."""
        return sum(p.nbytes(v) for p, v in zip(self.parts, self.values, strict=True) if p.is_shared)

    def to(self, device: torch.device | str) -> Form:
        """The same form on another device."""
        device = torch.device(device)
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return replace(self, **{name: v.to(device) for name, v in given.items() if isinstance(v, Tensor | Form)})

    def check(self) -> None:
        """Raise where a field or a value is none that a file may hold.

        Raises:
            ValueError: with the first thing that is wrong.
        """
        outline_of(self.outline.numbers)
        for part, values in zip(self.parts, self.values, strict=True):
            part.check(values)


class Outline(NamedTuple):
    """A form without its values, layout and dtype: what many tensors of a file have in common."""

    kind: type[Form]
    fields: Mapping[str, Any]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The kind and its fields as whole numbers, for files."""
        own = (number for name, codec in self.kind.codecs.items() for number in codec.write(self.fields[name]))
        return (_KINDS.index(self.kind), *own)

    def parts(self, layout: Layout, dtype: torch.dtype) -> tuple[Part, ...]:
        """What the runs of numbers are.

        Raises:
            ValueError: a layout that no such form has.
        """
        return self.kind.parts_of(self.fields, layout, dtype)

    def form(self, values: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Form:
        """The form, from its runs of numbers.

        Raises:
            ValueError: values that no such form has.
        """
        named = {}
        for part, run in zip(self.parts(layout, dtype), values, strict=True):
            part.check(run)
            named[part.name] = run
        return self.kind.made(self.fields, named, layout, dtype)


@functools.lru_cache(maxsize=256)
def outline_of(numbers: tuple[int, ...]) -> Outline:
    """The inverse of `Outline.numbers`.

    Raises:
        ValueError: numbers that stand for no form.

    Example:
        >>> outline_of((0, 0, 1, 3, 1, 0)).fields["n"]
        3
    """
    left = iter(numbers)

    def take(low: int, high: int) -> int:
        number = next(left, -1)
        if not low <= number <= high:
            raise ValueError(f"the numbers {numbers} of a form: {number} is none of {low} to {high}")
        return number

    found = _outline(take)
    if next(left, None) is not None:
        raise ValueError("a form has more numbers than its kind")
    return found


def _outline(take: Take) -> Outline:
    kind = _KINDS[take(0, len(_KINDS) - 1)]
    return Outline(kind, kind.taken(take))


# --- scalars ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid(Form):
    """Whole numbers times a scale a group: 0, +-1 .. +-n, or 0, +-1, +-2, +-4 .. with `powers`.

        weight = integer * scale

    Args:
        codes: places of the integers among all of them in ascending order, in the shape of the weight; uint8 or int32.
        scale: float32, float16, bfloat16 or float64, >= 0, one a group; `None`: 1.
        granularity: weights that share a scale.
        n: positive integers that there are, 1 to 32767 (16 powers); 0: all weights are 0.
        zero: whether 0 is one of the integers.
        powers: whether the integers are powers of two.

    Example:
        >>> codes = torch.tensor([[0, 1, 2]], dtype=torch.uint8)
        >>> grid = Grid(layout=Layout(shape=(1, 3)), dtype=torch.float32, codes=codes, scale=torch.tensor([0.5]), n=1)
        >>> grid.dense(), grid.nbytes
        (tensor([[-0.5000,  0.0000,  0.5000]]), 5)
    """

    codes: Tensor
    scale: Tensor | None
    granularity: GranularityLike = "tensor"
    n: int
    zero: bool = True
    powers: bool = False

    codecs: ClassVar[Mapping[str, _Codec]] = {
        "granularity": _GRANULARITY,
        "store": _codec(0, len(FLOATS), (None, *FLOATS)),
        "n": _codec(0, _MOST_CODES // 2 - 1),
        "zero": _FLAG,
        "powers": _FLAG,
    }

    @property
    def steps(self) -> Tensor:
        """The integers in ascending order, int32."""
        return _steps(self.n, self.zero, self.powers)

    @property
    def integers(self) -> Tensor:
        """The integers, int32, in the shape of the weight."""
        if self.powers:
            return self.steps.to(self.codes.device)[self.codes.long()]
        found = self.codes.to(torch.int32) - self.n
        return found if self.zero else found.add_(found >= 0)

    def dense(self) -> Tensor:
        compute = compute_dtype(self.dtype)
        if self.powers:
            integers = self.integers.to(compute)
        else:
            integers = self.codes.to(compute).sub_(self.n)
            if not self.zero:
                integers.add_((integers >= 0).to(compute))
        if self.scale is not None:
            step = self.scale.to(integers.device, compute)
            integers.mul_(granularity_of(self.granularity).expand(step, self.layout))
        return integers.add_(0.0).to(self.dtype)

    @property
    def cell(self) -> Tensor | None:
        if self.powers or not self.n:
            return None
        groups = granularity_of(self.granularity)
        scale = self.scale if self.scale is not None else torch.ones(groups.count(self.layout))
        return groups.expand(grid_cell(scale.float(), self.n, self.zero), self.layout)

    @property
    def values(self) -> tuple[Tensor, ...]:
        codes = (self.codes.reshape(-1),) if 2 * self.n + self.zero > 1 else ()
        return codes if self.scale is None else (self.scale, *codes)

    @property
    def fields(self) -> dict[str, Any]:
        store = None if self.scale is None else self.scale.dtype
        own = {"n": self.n, "zero": self.zero, "powers": self.powers}
        return {"granularity": _groups(self.granularity, self.layout), "store": store, **own}

    @staticmethod
    def parts_of(fields: Mapping[str, Any], layout: Layout, dtype: torch.dtype) -> tuple[Part, ...]:
        n, store, parts = fields["n"], fields["store"], []
        if (not n and (not fields["zero"] or store)) or (fields["powers"] and n > _MOST_POWERS):
            raise ValueError(f"a grid of {n} positive integers{' that are powers' * fields['powers']}")
        if store is not None:
            high = scale_ends(store, dtype, 1 << n - 1 if fields["powers"] else n)[1]
            count = fields["granularity"].count(layout)
            parts.append(Part(name="scale", role="numbers", kind=store, count=count, low=0.0, high=high))
        return (*parts, *_index(2 * n + fields["zero"], layout.numel))

    @staticmethod
    def made(fields: Mapping[str, Any], values: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Form:
        own = {name: fields[name] for name in ("granularity", "n", "zero", "powers")}
        codes = _placed(values.get("codes"), layout)
        return Grid(layout=layout, dtype=dtype, codes=codes, scale=values.get("scale"), **own)

    def scaled(self, factors: Tensor) -> Grid:
        groups = granularity_of(self.granularity)
        scale = torch.ones(groups.count(self.layout)) if self.scale is None else self.scale
        scale, groups = _by_channel(scale.double(), groups, self.layout)
        scale = (scale * factors.double().abs().reshape(-1, *(1,) * (scale.dim() - 1))).reshape(-1).float()
        turned = Channel().expand(factors < 0, self.layout).broadcast_to(self.codes.shape)
        codes = torch.where(turned, 2 * self.n + self.zero - 1 - self.codes.int(), self.codes.int())
        return replace(self, codes=codes, scale=scale, granularity=groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class Levels(Form):
    """Entries of a table of levels, one table a group.

    Args:
        codes: which level each weight has, in the shape of the weight; uint8 or int32.
        table: the levels, shape (groups, levels); floats that are numbers of the weight's dtype.
        granularity: weights that share a row of the table.

    Example:
        >>> codes = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
        >>> table = torch.tensor([[-0.25, 1.5]])
        >>> Levels(layout=Layout(shape=(1, 3)), dtype=torch.float32, codes=codes, table=table).dense()
        tensor([[-0.2500,  1.5000,  1.5000]])
    """

    codes: Tensor
    table: Tensor
    granularity: GranularityLike = "tensor"

    codecs: ClassVar[Mapping[str, _Codec]] = {
        "granularity": _GRANULARITY,
        "store": _FLOAT,
        "levels": _codec(1, _MOST_CODES),
    }

    def dense(self) -> Tensor:
        table = self.table.to(self.codes.device, self.dtype)
        return looked_up(self.codes, table, granularity_of(self.granularity), self.layout)

    @property
    def values(self) -> tuple[Tensor, ...]:
        return (self.table.reshape(-1), *((self.codes.reshape(-1),) if self.table.shape[1] > 1 else ()))

    @property
    def fields(self) -> dict[str, Any]:
        groups = _groups(self.granularity, self.layout)
        return {"granularity": groups, "store": self.table.dtype, "levels": self.table.shape[1]}

    @staticmethod
    def parts_of(fields: Mapping[str, Any], layout: Layout, dtype: torch.dtype) -> tuple[Part, ...]:
        count, store = fields["granularity"].count(layout) * fields["levels"], fields["store"]
        table = Part(name="levels", role="numbers", kind=store, count=count, within=dtype)
        return (table, *_index(fields["levels"], layout.numel))

    @staticmethod
    def made(fields: Mapping[str, Any], values: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Form:
        table, codes = values["levels"].reshape(-1, fields["levels"]), _placed(values.get("codes"), layout)
        return Levels(layout=layout, dtype=dtype, codes=codes, table=table, granularity=fields["granularity"])

    def scaled(self, factors: Tensor) -> Levels:
        table, groups = _by_channel(self.table.double(), granularity_of(self.granularity), self.layout)
        table = (table * factors.double()[:, None, None]).reshape(-1, self.table.shape[1]).float() + 0.0
        return replace(self, table=table, granularity=groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class Floats(Form):
    """Numbers of a float, of the weight's own dtype or a shorter one.

    Args:
        value: the numbers, in the shape of the weight.

    Example:
        >>> value = torch.tensor([0.1], dtype=torch.float16)
        >>> Floats(layout=Layout(shape=(1,)), dtype=torch.float32, value=value).nbytes
        2
    """

    value: Tensor

    codecs: ClassVar[Mapping[str, _Codec]] = {"store": _FLOAT}

    def dense(self) -> Tensor:
        return self.value.to(self.dtype, copy=True)

    @property
    def values(self) -> tuple[Tensor, ...]:
        return (self.value.reshape(-1),)

    @property
    def fields(self) -> dict[str, Any]:
        return {"store": self.value.dtype}

    @staticmethod
    def parts_of(fields: Mapping[str, Any], layout: Layout, dtype: torch.dtype) -> tuple[Part, ...]:
        store = fields["store"]
        within = None if store == dtype else dtype
        return (Part(name="values", role="codes", kind=store, count=layout.numel, within=within),)

    @staticmethod
    def made(fields: Mapping[str, Any], values: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Form:
        return Floats(layout=layout, dtype=dtype, value=values["values"].reshape(layout.shape))


# --- codewords ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Codewords(Form):
    """Rows of a codebook, one for each unit: a run of weights in row-major order.

    Args:
        index: which codeword each unit is, 1-D.
        book: the codewords, shape (how many, weights of a unit): floats, or codes of whole numbers -n .. n with
            n = 2^(width - 1) - 1, counted from 0.
        scale: of whole numbers, one a group.
        granularity: weights that share a scale.
        width: bits of the whole numbers, 2 to 8; `None` for floats.
        is_shared: the codebook may be common to several tensors, which a file then stores once.

    Example:
        >>> book = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
        >>> index = torch.tensor([1, 0])
        >>> Codewords(layout=Layout(shape=(2, 2)), dtype=torch.float32, index=index, book=book).dense()
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """

    index: Tensor
    book: Tensor
    scale: Tensor | None = None
    granularity: GranularityLike = "tensor"
    width: int | None = None
    is_shared: bool = False

    codecs: ClassVar[Mapping[str, _Codec]] = {
        "granularity": _GRANULARITY,
        "store": _FLOAT,
        "width": _codec(0, 8, (None, 1, 2, 3, 4, 5, 6, 7, 8)),
        "size": _codec(1, _MOST_CODES),
        "length": _codec(1, _LONGEST),
        "is_shared": _FLAG,
    }

    @property
    def integers(self) -> Tensor:
        """The codebook as whole numbers, int32."""
        assert self.width is not None
        return self.book.to(torch.int32) - (2 ** (self.width - 1) - 1)

    @property
    def steps(self) -> Tensor:
        """The scale, so that it broadcasts against the weight."""
        assert self.scale is not None
        return granularity_of(self.granularity).expand(self.scale, self.layout)

    @property
    def entries(self) -> Tensor:
        """The codewords in the dtype of the weight; whole numbers times the only scale there is."""
        if self.scale is not None:
            compute = compute_dtype(self.dtype)
            return self.integers.to(compute).mul_(self.scale.to(compute)).add_(0.0).to(self.dtype)
        most = torch.finfo(self.dtype).max
        return self.book.double().clamp(-most, most).to(self.dtype) + 0.0

    def dense(self) -> Tensor:
        index = self.index.long()
        if self.scale is None or isinstance(granularity_of(self.granularity), PerTensor):
            return self.entries[index].reshape(self.layout.held)
        compute = compute_dtype(self.dtype)
        units = self.integers.to(compute)[index].reshape(self.layout.held)
        return units.mul_(self.steps.to(compute)).add_(0.0).to(self.dtype)

    @property
    def values(self) -> tuple[Tensor, ...]:
        index, book = ((self.index.reshape(-1),) if len(self.book) > 1 else ()), self.book.reshape(-1)
        return (*((book,) if self.scale is None else (self.scale,)), *index, *(() if self.scale is None else (book,)))

    @property
    def fields(self) -> dict[str, Any]:
        size, length = self.book.shape
        store = self.book.dtype if self.scale is None else self.scale.dtype
        own = {"width": self.width, "size": size, "length": length, "is_shared": self.is_shared}
        return {"granularity": _groups(self.granularity, self.layout), "store": store, **own}

    @staticmethod
    def parts_of(fields: Mapping[str, Any], layout: Layout, dtype: torch.dtype) -> tuple[Part, ...]:
        width, size, length, store = (fields[name] for name in ("width", "size", "length", "store"))
        shared = fields["is_shared"]
        if width == 1:
            raise ValueError("a codebook of whole numbers of 1 bit")
        if layout.numel % length:
            raise ValueError(f"codewords of {length} do not divide {layout.numel} weights")
        index = _index(size, layout.numel // length)
        if width is None:
            book = Part(name="book", role="numbers", kind=store, count=size * length, is_shared=shared)
            return (book, *index)
        n, count = 2 ** (width - 1) - 1, fields["granularity"].count(layout)
        high = scale_ends(store, dtype, n)[1]
        scale = Part(name="scale", role="numbers", kind=store, count=count, low=-high, high=high, is_shared=shared)
        book = Part(name="book", role="codes", kind=width, count=size * length, below=2 * n + 1, is_shared=shared)
        return (scale, *index, book)

    @staticmethod
    def made(fields: Mapping[str, Any], values: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Form:
        book = values["book"].reshape(-1, fields["length"])
        units = layout.numel // fields["length"]
        index = values.get("codes", torch.zeros(units, dtype=torch.uint8))
        own = {name: fields[name] for name in ("granularity", "width", "is_shared")}
        return Codewords(layout=layout, dtype=dtype, index=index, book=book, scale=values.get("scale"), **own)

    def scaled(self, factors: Tensor) -> Codewords | None:
        if self.scale is None:
            return None
        scale, groups = _by_channel(self.scale.double(), granularity_of(self.granularity), self.layout)
        scale = (scale * factors.double().reshape(-1, *(1,) * (scale.dim() - 1))).reshape(-1).float()
        return replace(self, scale=scale, granularity=groups)


# --- few weights --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparse(Form):
    """Few weights, and all others zero.

    Args:
        mask: the survivors, in the shape of the weight.
        inside: what the survivors are: a `Grid`, `Levels` or `Floats` of the whole weight, whose codes matter where the
            mask is set.
        pattern: how the mask is written.

    Example:
        >>> layout = Layout(shape=(4,))
        >>> inside = Floats(layout=layout, dtype=torch.float32, value=torch.tensor([0.5, 9.0, -1.0, 9.0]))
        >>> mask = torch.tensor([True, False, True, False])
        >>> form = Sparse(layout=layout, dtype=torch.float32, mask=mask, inside=inside)
        >>> form.dense(), form.nbytes    # two float32, and four bits in a byte
        (tensor([ 0.5000,  0.0000, -1.0000,  0.0000]), 9)
    """

    mask: Tensor
    inside: Form
    pattern: Pattern = field(default_factory=Mask)

    codecs: ClassVar[Mapping[str, _Codec]] = {
        "pattern": _Codec(lambda pattern: (pattern.number, *pattern.numbers()), pattern_of),
        "inside": _Codec(lambda inside: inside.numbers, lambda take: _outline(take)),
    }

    def __post_init__(self) -> None:
        if not isinstance(self.inside, Grid | Levels | Floats):
            raise ValueError(f"survivors cannot be {type(self.inside).__name__}: must be Grid, Levels or Floats")

    def dense(self) -> Tensor:
        return self.inside.dense().masked_fill_(~self.mask, 0.0)  # which is nobody else's

    @property
    def values(self) -> tuple[Tensor, ...]:
        flat = self.mask.reshape(-1)
        inside = list(zip(self.inside.parts, self.inside.values, strict=True))
        numbers = [values for part, values in inside if part.role == "numbers"]
        codes = [values[flat] for part, values in inside if part.role != "numbers"]
        return (*numbers, *self.pattern.values(self.mask, self.layout), *codes)

    @property
    def fields(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "inside": self.inside.outline}

    @staticmethod
    def parts_of(fields: Mapping[str, Any], layout: Layout, dtype: torch.dtype) -> tuple[Part, ...]:
        if not issubclass(fields["inside"].kind, Grid | Levels | Floats):
            raise ValueError(f"survivors cannot be {fields['inside'].kind.__name__}")
        inside = fields["inside"].parts(layout, dtype)
        survivors = fields["pattern"].survivors(layout)
        count = survivors if isinstance(survivors, int) else None
        codes = [replace(p, count=count, is_listed=survivors == "listed") for p in inside if p.role != "numbers"]
        return (*(p for p in inside if p.role == "numbers"), *fields["pattern"].parts(layout), *codes)

    @staticmethod
    def made(fields: Mapping[str, Any], values: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Form:
        pattern, inside = fields["pattern"], fields["inside"]
        mask = pattern.mask([values[part.name] for part in pattern.parts(layout)], layout)
        flat, whole = mask.reshape(-1), dict(values)
        for part in inside.parts(layout, dtype):
            if part.role == "numbers":
                continue
            own, count = values[part.name], int(torch.count_nonzero(flat))
            if own.numel() != count:
                raise ValueError(f"{own.numel()} values for {count} survivors")
            whole[part.name] = own.new_zeros(flat.shape)
            whole[part.name][flat] = own
        held = inside.kind.made(inside.fields, whole, layout, dtype)
        return Sparse(layout=layout, dtype=dtype, mask=mask, inside=held, pattern=pattern)

    def scaled(self, factors: Tensor) -> Sparse | None:
        inside = self.inside.scaled(factors)
        return None if inside is None else replace(self, inside=inside)


_KINDS: tuple[type[Form], ...] = (Grid, Levels, Codewords, Floats, Sparse)


# --- small things -------------------------------------------------------------------------------------------------


def in_pieces(x: Tensor, groups: Granularity, layout: Layout) -> Iterable[tuple[Tensor, Tensor]]:
    """Pieces of a tensor, each with the group of every weight."""
    marks = torch.arange(groups.count(layout), dtype=torch.int32, device=x.device)
    group = groups.expand(marks, layout).broadcast_to(x.shape)
    if x.numel() <= _PIECE or x.dim() < 2:
        return [(x, group)]
    rows = max(1, _PIECE * x.shape[0] // x.numel())
    return zip(x.split(rows), group.split(rows), strict=True)


def looked_up(places: Tensor, table: Tensor, groups: Granularity, layout: Layout) -> Tensor:
    """The entry of each weight's group at its place."""
    if len(table) == 1:
        return table[0].index_select(0, places.reshape(-1).int()).reshape(places.shape)
    flat, k = table.reshape(-1), table.shape[1]
    parts = [
        flat.index_select(0, (group * k + place).reshape(-1)).reshape(place.shape)
        for place, group in in_pieces(places, groups, layout)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def grid_cell(scale: Tensor, n: int, zero: bool) -> Tensor:
    """Width of the cells of each group; 1 where the scale is 0, for a group of zeros needs a width to divide by."""
    # Without zero the middle cell is twice as wide; where n is 1 there is no other.
    width = scale if zero or n > 1 else 2 * scale.clamp(max=torch.finfo(torch.float32).max / 2)
    return torch.where(scale > 0, width, 1.0)


@functools.lru_cache(maxsize=64)
def _steps(n: int, zero: bool, powers: bool) -> Tensor:
    up = 1 << torch.arange(n) if powers else torch.arange(1, n + 1)
    return torch.cat([-up.flip(0), up.new_zeros(int(zero)), up]).int()


def _index(size: int, count: int) -> tuple[Part, ...]:
    """Codes below a size; none where there is only one."""
    width = (size - 1).bit_length()
    return (Part(name="codes", role="codes", kind=width, count=count, below=size),) if width else ()


def _placed(codes: Tensor | None, layout: Layout) -> Tensor:
    return torch.zeros(layout.shape, dtype=torch.uint8) if codes is None else codes.reshape(layout.shape)


def _by_channel(numbers: Tensor, groups: Granularity, layout: Layout) -> tuple[Tensor, Granularity]:
    """Numbers of groups, one or several a channel: shape (channels or 1, groups of a channel, ...)."""
    runs = groups.count(layout) // layout.channels if not isinstance(groups, PerTensor) else 0
    whole = numbers.reshape(-1, max(runs, 1), *numbers.shape[1:])
    return whole, groups if runs else Channel()


def _groups(value: GranularityLike, layout: Layout) -> Granularity:
    """A granularity, with groups no longer than a channel."""
    groups = granularity_of(value)
    if isinstance(groups, Group):
        return Group(size=max(1, min(groups.size, layout.numel // max(layout.channels, 1))))
    return groups
