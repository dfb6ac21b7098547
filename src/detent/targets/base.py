"""What a target is: a set of allowed weights, its nearest point, and its price in bits."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from detent.grouping import Granularity, Layout, PerTensor, granularity_of
from detent.pieces import cut, is_dense, is_large
from detent.schedules import check_types
from detent.targets.forms import Form
from detent.targets.parts import compute_dtype

__all__ = ["Choice", "Lines", "Params", "Scope", "Target", "check_finite", "compute_dtype"]

Scope = Literal["element", "row", "tensor", "model"]
_T = TypeVar("_T")
_FEW, _SMALL = 256, 4  # numbers, or so many for each that the params have: what is remembered


@dataclass(frozen=True, kw_only=True)
class Params:
    """The data-dependent numbers of a target for one tensor, as `fit` found them.

    Args:
        tensors: named numbers (scale, threshold, codebook), for the whole tensor even under sharding.
        layout: the layout they were fitted for.

    Example:
        >>> Params(tensors={"scale": torch.tensor([0.5])}, layout=Layout(shape=(2, 2)))["scale"]
        tensor([0.5000])
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Layout
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def once(self, what: Any, make: Callable[[], _T], at: Any = None) -> _T:
        """What follows from these numbers, remembered unless it is far larger than they are.

        Args:
            what: its name, with what it depends on besides.
            make: finds it: a tensor or several.
            at: what it depends on and changes often; it is remembered for the last of these alone.
        """
        known = self._known.get(what)
        if known is not None and known[0] == at:
            return known[1]
        found = make()
        parts: Sequence[Any] = found if isinstance(found, tuple) else [found]
        size = sum(x.numel() for x in parts if isinstance(x, Tensor))
        if size <= max(_FEW, _SMALL * sum(x.numel() for x in self.tensors.values())):
            self._known[what] = at, found
        return found

    def local(self, first: int, past: int) -> Params:
        """The same numbers, for a process that holds rows `first` to `past - 1`."""
        return replace(self, layout=self.layout.local(first, past))

    def lined(self, granularity: Granularity) -> Params | None:
        """The same numbers for the weights held here seen as a matrix with a row a group; `None` if they do not lie so.

        With one axis where all weights are one group.
        """

        def make() -> Params | None:
            layout = granularity.lined(self.layout)
            return self if layout == self.layout else None if layout is None else replace(self, layout=layout)

        return self.once(("lined", granularity), make)

    def to(self, device: torch.device) -> Params:
        """The same numbers on another device."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How weights choose their places one by one, so that they may be chosen in another metric than |w - q|^2.

    Args:
        pattern: from the gain of keeping each weight, and a mask of those that must stay zero, to the mask of those
            that are kept; gains of inf are kept, of -inf dropped. `None`: all are kept. May write over the gains.
        levels: where a weight that is kept goes: a target of scope "element", and its params. `None`: it may lie
            anywhere.

    Example:
        >>> from detent import Uniform
        >>> grid = Uniform(bits=2)
        >>> grid.choice(grid.fit(torch.ones(2, 3))).levels[0] is grid
        True
    """

    pattern: Callable[[Tensor, Tensor], Tensor] | None = None
    levels: tuple[Target, Params] | None = None


class Target(abc.ABC):
    """A set of allowed weights: where a tensor may end.

    Final subclasses are frozen keyword-only dataclasses without tensors. With `params = fit(w)` held:

    * `project(project(w)) == project(w)` bitwise, and never returns -0.0;
    * `form(w).dense() == project(w)` bitwise, and it takes `form(w).nbytes` on disk;
    * `relax(w, beta)` tends to `project(w)` as beta grows.

    Class attributes:
        is_exact: `project` is the nearest point of the set (given the params), not a heuristic.
        scope: what `project` of one weight depends on: only itself and the params ("element"), its own row of axis 0
            (a block, a kernel: "row"), or the whole tensor ("tensor"). "model" means that `fit` looks at all tensors
            of the rule at once (`fits_together`), and `project` at the whole tensor.
        has_bits: the target has a bit-width that `at_bits` can change.
        has_codebook: weights take codewords (`assign`, `codebook`, `with_codebook`) that training may move.
        prunes: zero is where pruned weights lie, not one level among others.
        is_one_point: the set holds one tensor alone, whatever the weights are.

    Example:
        >>> from detent import Uniform
        >>> w = torch.tensor([[0.9, -0.2], [0.35, 0.0]])
        >>> grid = Uniform(bits=3, range="minmax")
        >>> grid.project(w, grid.fit(w))
        tensor([[ 0.9000, -0.3000],
                [ 0.3000,  0.0000]])
    """

    is_exact: ClassVar[bool]
    has_bits: ClassVar[bool] = False
    has_codebook: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
    is_one_point: ClassVar[bool] = False
    # Lets a recipe file be checked field by field although fields may hold abstract types.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        check_types(self)  # a class with ranges of its own checks those first, and says them

    @property
    @abc.abstractmethod
    def scope(self) -> Scope:
        """What the projection of one weight depends on."""

    @property
    def fits_together(self) -> bool:
        """Whether `fit_model` must see all tensors of the rule at once."""
        return self.scope == "model"

    @property
    def against_collapse(self) -> str:
        """What to do where it leaves one value of a tensor: the end of a sentence."""
        return "use more bits, a finer granularity, or keep it in full precision (a rule with keep=True)"

    @property
    def widths(self) -> Sequence[int]:
        """The bit-widths that `at_bits` takes, ascending; none where `has_bits` is false."""
        return range(2, 9) if self.has_bits else ()

    def accepts(self, shape: Sequence[int], dtype: torch.dtype, layout: Layout) -> str | None:
        """Why a tensor of this shape and dtype cannot take this target, or `None` if it can."""
        if not dtype.is_floating_point:
            return f"{type(self).__name__} needs real floating-point weights, this one is {dtype}"
        if torch.finfo(dtype).bits < 16:
            return f"{type(self).__name__} needs weights of 16 bits or more, this one is {dtype}; convert it first"
        if math.prod(shape) == 0:
            return f"{type(self).__name__} needs at least one weight, this one has shape {tuple(shape)}"
        return None

    def remarks(self, layouts: Sequence[Layout]) -> list[str | None]:
        """What each tensor of a rule gets instead of what the target's own fields say, for the plan; mostly `None`."""
        return [None] * len(layouts)

    @abc.abstractmethod
    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        """Find the params of a whole tensor.

        Args:
            w: the whole tensor, any floating dtype and strides.
            layout: its layout; by default output channels on axis 0.
            previous: the last params of the same tensor, for running estimates and warm starts.

        Raises:
            ValueError: NaN or infinite weights.
        """

    def fit_model(
        self, weights: Sequence[Tensor], layouts: Sequence[Layout], previous: Sequence[Params | None]
    ) -> list[Params]:
        """Find the params of all tensors of a rule at once; by default one by one."""
        return [self.fit(w, layout, old) for w, layout, old in zip(weights, layouts, previous, strict=True)]

    def carried(self, params: Params) -> Params | None:
        """What of the last params every later fit must be given as `previous`, even one that starts afresh."""
        return None

    def unweighed(self, params: Params, w: Tensor, weighed: Tensor) -> Params:
        """Params that were fitted to weights in another metric, with what they say of sizes taken from the weights."""
        return params

    @abc.abstractmethod
    def form(self, w: Tensor, params: Params) -> Form:
        """What the projection of a tensor is, in the layout of the params: what a file stores and an export translates.

        Weights are finite here: `fit` refuses others, and so does whoever writes.
        """

    def project(self, w: Tensor, params: Params) -> Tensor:
        """The nearest point of the set, as a new tensor of the same shape and dtype; by default that of `form`.

        Training calls it in every step: a target of its own says it faster, to the bit.
        """
        return self.form(w, params).dense() if w.numel() else w.detach().clone()  # a process may hold no row

    def project_into(self, w: Tensor, params: Params, out: Tensor) -> None:
        """Write the nearest point of the set to another tensor of the same shape and dtype."""
        out.copy_(self.project(w, params))

    def lined(self, params: Params) -> Params | None:
        """The params for the weights held here seen as a matrix, a run of whose rows is projected by `params.local`.

        A large tensor is then worked on a piece at a time. `None` where that cannot be.
        """
        return None

    def choice(self, params: Params) -> Choice | None:
        """How weights choose their places one by one, or `None` where several of them choose together (a codeword)."""
        return Choice(levels=(self, params)) if self.scope == "element" else None

    def by_column(self, params: Params) -> tuple[Target, Callable[[Tensor], Params]]:
        """For a target of scope "element": how to place one weight of each channel alone, as a matrix (channels, 1).

        Returns:
            The target for that, and what gives its params from the column of `Layout.by_channel` that the weight of
            each channel lies in, shape (channels,). By default the params are taken to have a row a group of the field
            `granularity`, if there is one.
        """
        groups, layout = granularity_of(getattr(self, "granularity", "tensor")), params.layout
        alone = replace(params, layout=Layout(shape=(layout.channels, 1)))
        if isinstance(groups, PerTensor):
            return self, lambda columns: alone
        count, by_channel = groups.count(layout), self

        def picked(columns: Tensor) -> Params:
            mine = groups.at(columns, layout)
            tensors = {name: t[mine] if t.dim() and len(t) == count else t for name, t in params.tensors.items()}
            return replace(alone, tensors=tensors)

        return replace(by_channel, granularity="channel"), picked  # type: ignore[call-arg, type-var]

    def relax(self, w: Tensor, params: Params, beta: float) -> Tensor:
        """A smooth stand-in that sharpens with beta: `(w + beta project(w)) / (1 + beta)`.

        Args:
            w: weights.
            params: fitted params.
            beta: sharpness, >= 0; `inf` gives `project(w)`.

        Reference: Yin et al., "BinaryRelax", arXiv 1801.06313, eq. 2.4.
        """
        if beta < 0:
            raise ValueError(f"beta={beta}: must be >= 0")
        q = self.project(w, params)
        return q if math.isinf(beta) else torch.lerp(w, q, beta / (1.0 + beta), out=q)

    def relax_into(self, w: Tensor, params: Params, beta: float, out: Tensor) -> None:
        """Write `relax(w, params, beta)` to another tensor of the same shape and dtype."""
        if type(self).relax is not Target.relax or math.isinf(beta) or beta < 0:
            out.copy_(self.relax(w, params, beta))
        else:
            self.project_into(w, params, out)
            torch.lerp(w, out, beta / (1.0 + beta), out=out)

    def restored(self, w: Tensor, form: Form) -> Params:
        """All params of a tensor that was read from a file; by default those of a fit.

        Where these do not project the weights to what the file holds, that is what the tensor stays.

        Args:
            w: the whole tensor, in its full life or projected.
            form: what `form` gave.
        """
        return self.fit(w, form.layout)

    def recounted(self, w: Tensor, params: Params) -> Params:
        """The params with counts for what is left of a weight of the set, more of which has become zero."""
        return params

    @abc.abstractmethod
    def typical(self, params: Params) -> Tensor:
        """A typical distance from w to project(w), > 0, that broadcasts against w: the unit PSG measures in."""

    def cell(self, params: Params) -> Tensor | None:
        """Width of the cells of a grid, broadcasting against w; `None` where the set has no cells."""
        return None

    def spacing(self, params: Params) -> Tensor | None:
        """Distance of neighbouring levels that are evenly spaced about 0, broadcasting against w; `None` for others.

        A group whose only level is 0 has spacing 0.
        """
        return None

    def limits(self, params: Params) -> Tensor | None:
        """Largest allowed |w| of a bounded set, broadcasting against w; `None` if the set is unbounded."""
        return None

    def levels(self, params: Params) -> Tensor | None:
        """The allowed values of a finite set of scalars, ascending on the last axis; other axes broadcast against w.

        `None` where values cannot be listed one weight at a time (sparse sets, codebooks).
        """
        return None

    def assign(self, w: Tensor, params: Params) -> Tensor:
        """Which codeword each unit of w takes: a 1-D index into the rows of `codebook`.

        A unit is a run of weights of w in row-major order (a kernel, a block, one weight), as long as a codeword.
        """
        raise ValueError(f"{type(self).__name__} has no codebook")

    def codebook(self, params: Params) -> Tensor:
        """The codewords, shape (how many, weights of a unit), in the order that `assign` counts in."""
        raise ValueError(f"{type(self).__name__} has no codebook")

    def with_codebook(self, params: Params, codewords: Tensor, dtype: torch.dtype) -> Params:
        """The same params with other codewords in the same order, rounded to what is stored, for weights of a dtype."""
        raise ValueError(f"{type(self).__name__} has no codebook")

    def held_codewords(self, params: Params) -> Tensor | None:
        """Mask of the codewords that may not move (a zero that prunes), or `None`."""
        return None

    def family(self, params: Params) -> tuple[str, int] | None:
        """Where several tensors of a rule share one codebook: its name among them, and the units of all of them."""
        return None

    def distance(self, gap: Tensor, params: Params) -> Tensor:
        """How far each weight is from its place, >= 0, from `gap = project(w) - w`; may write over gap.

        |gap| where weights move alone; where they move together (a kernel), the same number for all of them.
        """
        return gap.abs_()

    @property
    def leaves_free(self) -> bool:
        """Whether some weights of the set may take any real value: the survivors of a sparse set."""
        return type(self).free is not Target.free

    def free(self, w: Tensor, params: Params) -> Tensor | None:
        """Mask of weights that may take any real value where they are (survivors of a sparse set), or `None`."""
        return None

    def at_bits(self, w: Tensor, params: Params, bits: int) -> tuple[Target, Params]:
        """The same kind of target at another width, for weights trained towards this one.

        Raises:
            ValueError: the target has no bit-width.
        """
        raise ValueError(f"bits={bits}: {type(self).__name__} has no bit-width to change")


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Weights held here, and tensors like them, so that a large one is worked on a piece at a time.

    Attributes:
        params: the params that hold for `tensors`.
        tensors: views of them, or they themselves.
        apart: whether `pieces` cuts them.
    """

    params: Params
    tensors: Sequence[Tensor]
    apart: bool

    @classmethod
    def of(cls, target: Target, params: Params, *tensors: Tensor) -> Lines:
        """A weight, and tensors like it, to be cut if that is worth it and the target can."""
        first = tensors[0]
        if not is_large(first) or (lined := target.lined(params)) is None:
            return cls(params=params, tensors=tensors, apart=False)
        if not all(t.shape == first.shape and t.stride() == first.stride() for t in tensors):
            return cls(params=params, tensors=tensors, apart=False)
        shape = lined.layout.shape
        if len(shape) == 1 and is_dense(first):
            return cls(params=lined, tensors=[t.as_strided((t.numel(),), (1,)) for t in tensors], apart=True)
        if len(shape) == 2 and first.is_contiguous():
            return cls(params=lined, tensors=[t.view(-1, shape[1]) for t in tensors], apart=True)
        return cls(params=params, tensors=tensors, apart=False)

    def cut(self, *others: Any) -> Iterator[tuple[Any, ...]]:
        """Matching pieces of the tensors and of others.

        Args:
            others: tensors that broadcast against `tensors`; anything else is the same for every piece.
        """
        return cut(*self.tensors, *others) if self.apart else iter([(*self.tensors, *others)])

    def pieces(self, *others: Any) -> Iterator[tuple[Any, ...]]:
        """The same, each piece with the params that hold for it before it."""
        if not self.apart:
            yield self.params, *self.tensors, *others
            return
        layout = self.params.layout
        at = layout.rows[0] if layout.rows else 0
        for first, *piece in cut(*self.tensors, *others, by_rows=True):
            past = at + first.shape[0]
            yield self.params if len(layout.shape) == 1 else self.params.local(at, past), first, *piece
            at = past


def check_finite(w: Tensor) -> None:
    """Raise if a weight is NaN or infinite, or if there is none.

    Raises:
        ValueError: with the number of bad weights.
    """
    if w.numel() == 0:
        raise ValueError(f"a fit needs at least one weight, this one has shape {tuple(w.shape)}")
    low, high = torch.aminmax(w.detach())  # both are NaN if a weight is; far faster than to ask every one of them
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = w.numel() - int(torch.count_nonzero(torch.isfinite(w)))  # a sum would count in a copy of 8 bytes a weight
        raise ValueError(f"{bad} of {w.numel()} weights are NaN or infinite, so nothing can be fitted to them")
