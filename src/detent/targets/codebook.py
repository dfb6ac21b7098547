"""Targets whose values are codewords: kernels of a convolution, or blocks of inputs, out of a codebook."""

from __future__ import annotations

import abc
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detent.grouping import Layout
from detent.schedules import is_whole
from detent.targets.base import Codes, Params, Scope, Stream, Target, check_finite, compute_dtype
from detent.targets.declared import Declared, Pieces
from detent.targets.levels import PARAM_DTYPES, Uniform

__all__ = ["KernelCodebook", "VectorCodebook"]

_CHUNK = 1 << 20  # distances held at a time: 8 MiB, whatever the number of kernels and codewords
_STALLED = 1e-4  # K-means stops when an iteration takes less than this share off the error
_FEWEST = 4  # kernels a codeword, so that a codebook costs less than it saves
_SLACK = 4  # times the rounding of a distance by matrix products: nearer than that, exact differences decide


@dataclass(frozen=True, kw_only=True)
class _Codebook(Target):
    """What kernels and blocks have in common: units of `length` weights, consecutive in row-major order."""

    size: int
    book: Literal["layer", "global"] = "layer"
    codebook_bits: int | None = 6
    zero: bool = False
    few: Literal["reduce", "refuse"] = "reduce"
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    seed: int = 0
    restarts: int = 2
    iterations: int = 50
    sample: int = 256
    warm_start: bool = True

    is_exact: ClassVar[bool] = True
    has_codebook: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        least = 2 if self.zero else 1
        if not is_whole(self.size, least, 2**16):
            raise ValueError(f"{name}(size={self.size!r}): must be a whole number from {least} to 65536")
        if self.book not in ("layer", "global"):
            raise ValueError(f'{name}(book={self.book!r}): must be "layer" or "global"')
        if self.codebook_bits is not None and not is_whole(self.codebook_bits, 2, 8):
            raise ValueError(f"{name}(codebook_bits={self.codebook_bits!r}): must be 2 to 8, or None for floats")
        if self.few not in ("reduce", "refuse"):
            raise ValueError(f'{name}(few={self.few!r}): must be "reduce" or "refuse"')
        if not isinstance(self.param_dtype, str) or self.param_dtype not in PARAM_DTYPES:
            raise ValueError(f"{name}(param_dtype={self.param_dtype!r}): must be one of {sorted(PARAM_DTYPES)}")
        if not is_whole(self.seed, 0, 2**63 - 1):
            raise ValueError(f"{name}(seed={self.seed!r}): must be a whole number from 0 to 2**63 - 1")
        for field in ("restarts", "iterations", "sample"):
            if not is_whole(getattr(self, field)):
                raise ValueError(f"{name}({field}={getattr(self, field)!r}): must be a whole number >= 1")
        super().__post_init__()

    @property
    def scope(self) -> Scope:
        return "row"

    @property
    def fits_together(self) -> bool:
        return self.book == "global"

    @property
    def stored(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("book",) if self.codebook_bits is None else ("scale",)

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("book", "scale") if self.book == "global" else ()

    @abc.abstractmethod
    def _length(self, shape: Sequence[int]) -> int:
        """Weights of a unit."""

    @abc.abstractmethod
    def _kind(self, shape: Sequence[int]) -> str:
        """What units of two tensors must have in common to share a codebook."""

    @abc.abstractmethod
    def _unfit(self, shape: Sequence[int], layout: Layout) -> str | None:
        """Why a weight has no units, or `None`."""

    def accepts(self, shape: Sequence[int], dtype: torch.dtype, layout: Layout) -> str | None:
        reason = Target.accepts(self, shape, dtype, layout) or self._unfit(shape, layout)
        if reason is None and self.few == "refuse" and self.book == "layer":
            return self._too_few(math.prod(shape) // self._length(shape))
        return reason

    def remarks(self, layouts: Sequence[Layout]) -> list[str | None]:
        own = [math.prod(layout.shape) // self._length(layout.shape) for layout in layouts]
        if self.book == "layer":
            return [self._remark(units, f"its {units} units") for units in own]
        kinds = [self._kind(layout.shape) for layout in layouts]
        units: Counter[str] = Counter()
        for kind, each in zip(kinds, own, strict=True):
            units[kind] += each
        return [self._remark(units[kind], f"all {units[kind]} units of {kind}") for kind in kinds]

    def _remark(self, units: int, whose: str) -> str | None:
        codewords = self._codewords(units)
        return None if codewords == self.size else f"{codewords} codewords for {whose}"

    def _too_few(self, units: int) -> str | None:
        if units >= _FEWEST * self.size:
            return None
        least = _FEWEST * self.size
        return f"{type(self).__name__}(size={self.size}) needs at least {least} units to choose from, there are {units}"

    def _codewords(self, units: int) -> int:
        """The size, or where there are fewer than 4 units a codeword the largest power of two that leaves 4."""
        if units >= _FEWEST * self.size:
            return self.size
        return min(self.size, max(2 if self.zero else 1, 2 ** int(math.log2(max(units // _FEWEST, 1)))))

    # --- fitting --------------------------------------------------------------------------------------------------

    def fit(self, w: Tensor, layout: Layout | None = None, previous: Params | None = None) -> Params:
        return self.fit_model([w], [layout or Layout(shape=tuple(w.shape))], [previous])[0]

    def fit_model(
        self, weights: Sequence[Tensor], layouts: Sequence[Layout], previous: Sequence[Params | None]
    ) -> list[Params]:
        families: dict[object, list[int]] = {}
        for i, (w, layout) in enumerate(zip(weights, layouts, strict=True)):
            check_finite(w)
            if (reason := self._unfit(layout.shape, layout)) is not None:
                raise ValueError(reason)
            families.setdefault(i if self.book == "layer" else (self._kind(layout.shape), w.dtype), []).append(i)
        found: dict[int, Params] = {}
        for members in families.values():
            length = self._length(layouts[members[0]].shape)
            dtype = weights[members[0]].dtype
            parts = [weights[i].detach().reshape(-1, length) for i in members]
            if self.few == "refuse" and (reason := self._too_few(sum(map(len, parts)))):
                raise ValueError(reason)
            numbers = self._stored(self._learn(parts, dtype, self._before(previous, members)), dtype, sort=True)
            numbers["units"] = torch.tensor(sum(map(len, parts)))
            for i in members:
                mine = {name: t.to(weights[i].device) for name, t in numbers.items()}
                params = Params(tensors=mine, layout=layouts[i])
                found[i] = replace(params, tensors={**mine, "typical": self._gap(weights[i], params)})
        return [found[i] for i in range(len(weights))]

    def _before(self, previous: Sequence[Params | None], members: list[int]) -> Tensor | None:
        """The codebook that these weights had at the last fit, if all had the same."""
        if not self.warm_start:
            return None
        books = [None if (old := previous[i]) is None else self.codebook(old) for i in members]
        first = books[0]
        same = first is not None and all(book is not None and torch.equal(book, first.to(book)) for book in books)
        return first if same else None

    def _learn(self, parts: list[Tensor], dtype: torch.dtype, before: Tensor | None = None) -> Tensor:
        """The codewords of some units, in float64. On the CPU, so that every device finds the same ones."""
        with torch.autocast("cpu", enabled=False):  # a fit inside the user's autocast is the fit outside
            return self._learned(parts, dtype, before)

    def _learned(self, parts: list[Tensor], dtype: torch.dtype, before: Tensor | None) -> Tensor:
        x = torch.cat([part.to("cpu", compute_dtype(dtype)) for part in parts])
        # Scaled by a power of two, so that no square over- or underflows and nothing is rounded.
        power = int(torch.frexp(x.abs().amax()).exponent)
        x = _times_two_to(x, -power).add_(0.0)
        size = self._codewords(len(x))
        codewords = _distinct(x, size)
        if codewords is None or (self.zero and int((codewords != 0).any(1).sum()) == size):
            start = None
            if before is not None and before.shape[1] == x.shape[1] and len(before) <= size:  # else of another target
                start = _times_two_to(before.to("cpu", torch.float64, copy=True), -power).to(x.dtype)
            codewords = _k_means(x, size, self, start)
        return _times_two_to(codewords.double(), power)

    def _stored(self, codewords: Tensor, dtype: torch.dtype, *, sort: bool) -> dict[str, Tensor]:
        """The numbers kept of some codewords, rounded to what a file holds; sorted ones lose their duplicates."""
        codewords = _within(codewords, dtype)
        if self.codebook_bits is None:
            store = PARAM_DTYPES[self.param_dtype]
            numbers = {"book": _within(codewords, store).to(store).add_(0.0)}
        else:
            grid = self._grid()
            fitted = grid.fit(codewords.to(dtype))
            numbers = {"book": grid.project(codewords.to(dtype), fitted), "scale": fitted["scale"]}
        if sort:
            book = torch.unique(numbers["book"], dim=0)
            if self.zero:
                book = torch.cat([torch.zeros_like(book[:1]), book[(book != 0).any(1)]])
            numbers["book"] = book
        return numbers

    def _grid(self) -> Uniform:
        assert self.codebook_bits is not None
        return Uniform(bits=self.codebook_bits, range="mse", param_dtype=self.param_dtype)

    def _gap(self, w: Tensor, params: Params) -> Tensor:
        """Mean over the units of the RMS distance to their codewords; 1 if all are there (any positive number)."""
        length = self._length(params.layout.shape)
        pairs = (x.reshape(-1, length).split(max(1, _CHUNK // length)) for x in (self.project(w, params), w.detach()))
        # In pieces: in float64 the whole would take twice the weight, and its squares as much again.
        far = [_rms(q.double().sub_(x))[:, 0] for q, x in zip(*pairs, strict=True)]
        mean = torch.cat(far).mean()
        smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        return torch.where(mean > 0, mean, 1.0).clamp(smallest, largest).float()

    # --- projecting -----------------------------------------------------------------------------------------------

    def _entries(self, params: Params, dtype: torch.dtype) -> Tensor:
        """The codewords as weights of a dtype; never -0.0."""
        return _within(params["book"], dtype).to(dtype) + 0.0

    def assign(self, w: Tensor, params: Params) -> Tensor:
        units = w.detach().reshape(-1, self._length(params.layout.shape))
        entries = self._entries(params, w.dtype)
        step = max(1, _CHUNK // max(entries.shape))
        index = torch.empty(len(units), dtype=torch.long, device=w.device)
        for first in range(0, len(units), step):
            some = units[first : first + step]
            found, doubtful = _nearest_for_sure(some, entries)
            # Differences, not a matrix product, and in float64: a weight that is a codeword is at distance 0 from it
            # and from no other, so that projecting twice is projecting once.
            if len(rows := doubtful.nonzero()[:, 0]):
                far = torch.cdist(some[rows].double(), entries.double(), compute_mode="donot_use_mm_for_euclid_dist")
                found[rows] = far.argmin(1)
            index[first : first + step] = found
        return index

    def project(self, w: Tensor, params: Params) -> Tensor:
        return self._entries(params, w.dtype)[self.assign(w, params)].reshape(w.shape)

    def codebook(self, params: Params) -> Tensor:
        return params["book"]

    def with_codebook(self, params: Params, codewords: Tensor, dtype: torch.dtype) -> Params:
        numbers = self._stored(codewords.double(), dtype, sort=False)
        return replace(params, tensors={**params.tensors, **numbers})

    def held_codewords(self, params: Params) -> Tensor | None:
        return torch.arange(len(params["book"]), device=params["book"].device) == 0 if self.zero else None

    def family(self, params: Params) -> tuple[str, int] | None:
        return (self._kind(params.layout.shape), int(params["units"])) if self.book == "global" else None

    def distance(self, gap: Tensor, params: Params) -> Tensor:
        units = gap.double().reshape(-1, self._length(params.layout.shape))
        return _rms(units).expand(units.shape).reshape(gap.shape).to(gap.dtype)

    def typical(self, params: Params) -> Tensor:
        return params["typical"]

    # --- storing --------------------------------------------------------------------------------------------------

    def encode(self, w: Tensor, params: Params) -> Codes:
        check_finite(w)
        book, streams = params["book"], []
        if len(book) > 1:
            index = self.assign(w, params).to(torch.int32)
            streams.append(Stream(name="codes", values=index, width=_width(len(book))))
        if self.codebook_bits is not None:
            whole = Params(tensors={"scale": params["scale"]}, layout=Layout(shape=tuple(book.shape)))
            levels = self._grid().encode(book, whole)["codes"]
            streams.append(Stream(name="book", values=levels, width=self.codebook_bits))
        return Codes(streams=tuple(streams))

    def decode(self, codes: Codes, params: Params, dtype: torch.dtype) -> Tensor:
        shape = params.layout.shape
        book = self._written_book(codes, params, dtype)
        if self.zero and bool(book[0].any()):
            raise ValueError("a codebook whose first codeword is not zero")
        entries = self._entries(Params(tensors={"book": book}, layout=params.layout), dtype)
        units = math.prod(shape) // self._length(shape)
        several = len(entries) > 1
        index = codes["codes"].long() if several else torch.zeros(units, dtype=torch.long, device=book.device)
        return entries[index].reshape(shape)

    def declared(self, layout: Layout, dtype: torch.dtype, held: Mapping[str, int]) -> Pieces:
        length = self._length(layout.shape)
        units = layout.numel // length
        # A count that happens to be that of the ones in one-bit codes is written as such: there are two codewords then.
        written = held.get("book", 0) or (2 * length if "codes" in held else 0)
        codewords, most = written // length, self._codewords(units) if self.book == "layer" else self.size
        if not 1 <= codewords <= most:
            raise ValueError(f"a codebook of {codewords} codewords, where 1 to {most} may be")
        shape, index = (
            (codewords, length),
            Declared(name="codes", kind=_width(codewords), shape=(units,), below=codewords),
        )
        codes = (index,) if codewords > 1 else ()
        if self.codebook_bits is None:
            return Pieces((Declared(name="book", kind=PARAM_DTYPES[self.param_dtype], shape=shape),), codes)
        grid = self._grid().declared(Layout(shape=shape), dtype, {})
        return Pieces(grid.params, (*codes, replace(grid.streams[0], name="book")))

    def _written_book(self, codes: Codes, params: Params, dtype: torch.dtype) -> Tensor:
        """The codewords, from what is stored."""
        if self.codebook_bits is None:
            return params["book"]
        levels, length = codes["book"], self._length(params.layout.shape)
        if levels.numel() % length or int(levels.max()) > 2**self.codebook_bits - 2:
            raise ValueError(f"the codebook is none of {self.codebook_bits} bits and {length} weights a codeword")
        alone = Codes(streams=(Stream(name="codes", values=levels, width=self.codebook_bits),))
        layout = Layout(shape=(levels.numel() // length, length))
        return self._grid().decode(alone, Params(tensors={"scale": params["scale"]}, layout=layout), dtype)

    def restored(self, w: Tensor, params: Params, codes: Codes) -> Params:
        # How many units share a global codebook is not told by one of them; only training asks.
        book = self._written_book(codes, params, w.dtype).to(w.device)
        found = replace(params, tensors={**params.tensors, "book": book})
        return replace(found, tensors={**found.tensors, "typical": self._gap(w, found)})

    def bits_on_disk(self, params: Params) -> int:
        codewords, length = params["book"].shape
        own = _index_bits(params.layout.numel // length, codewords)
        return own if self.book == "global" else own + self._book_bits(codewords, length)

    def _book_bits(self, codewords: int, length: int) -> int:
        """Bits of a codebook: integers, padded to whole bytes, and their scale; or floats."""
        width = torch.finfo(PARAM_DTYPES[self.param_dtype]).bits
        if self.codebook_bits is None:
            return codewords * length * width
        return 8 * -(-codewords * length * self.codebook_bits // 8) + width

    def planned_bits(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bits of all weights of a rule before anything is fitted: indices, and codebooks none of which is cut.

        Example:
            >>> KernelCodebook(size=512, book="global").planned_bits([(64, 64, 3, 3)]) / (64 * 64 * 9)
            1.7508680555555556
        """
        families: dict[object, list[int]] = {}
        for i, shape in enumerate(shapes):
            families.setdefault(i if self.book == "layer" else self._kind(shape), []).append(i)
        total = 0
        for members in families.values():
            length = self._length(shapes[members[0]])
            counts = [math.prod(shapes[i]) // length for i in members]
            codewords = self._codewords(sum(counts))
            total += sum(_index_bits(n, codewords) for n in counts) + self._book_bits(codewords, length)
        return total


@dataclass(frozen=True, kw_only=True)
class KernelCodebook(_Codebook):
    """Every k x k kernel of a convolution is one of `size` learned kernels: `project(w) = codebook[nearest]`.

        nearest = argmin_j |kernel - codebook_j|^2

    A kernel is the spatial part of one (output, input) pair. The codebook is found by seeded K-means and rounded (to
    `codebook_bits`) before anything is projected. Stored are one index of ceil(log2 size) bits a kernel, the codebook,
    and its scale: about 1 bit a weight for 3 x 3 kernels and 512 codewords. Transposed and grouped convolutions work.

    Args:
        size: codewords, 1 to 65536; need not be a power of two. Fewer distinct kernels than that (after `few`) give as
            many codewords, and no error beyond the rounding.
        book: "layer" gives every weight a codebook of its own; "global" gives all weights of the rule one codebook for
            each kernel size (and dtype), stored once.
        codebook_bits: width of the codebook's own numbers, 2 to 8: a symmetric uniform grid with one scale (6: levels
            -31 .. 31), by least squared error; `None` for floats of `param_dtype`.
        zero: codeword 0 is all zeros, one of the `size`: kernels can be pruned.
        few: what to do with fewer than 4 * size kernels. "reduce": take the largest power of two that leaves 4 kernels
            a codeword; "refuse": say so.
        param_dtype: what the scale (or a float codebook) is rounded to and stored as.
        seed: of K-means++, >= 0. The same weights and seed give the same codebook on one machine.
        restarts: times K-means starts over, >= 1; the best one counts.
        iterations: of K-means, at most, >= 1.
        sample: kernels a codeword that K-means looks at, at most, >= 1; of more, that many are drawn at random, and two
            last iterations see all.
        warm_start: a later fit in the same training goes on from the codewords of the one before, which takes a few
            iterations; `False`: K-means starts over each time, with `restarts`.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> w = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        >>> kernels = KernelCodebook(size=4)
        >>> params = kernels.fit(w)
        >>> len(kernels.project(w, params).reshape(-1, 9).unique(dim=0))
        4
        >>> kernels.bits_on_disk(params)      # 32 indices of 2 bits, 4 x 9 numbers of 6 bits, one float32 scale
        312

    Reference: Yu et al., "Kernel Quantization for Efficient Network Compression", arXiv 2003.05148. How the codebook
    is found and rounded is ours: the paper's abstract leaves it open.
    """

    def _length(self, shape: Sequence[int]) -> int:
        return math.prod(shape[2:])

    def _kind(self, shape: Sequence[int]) -> str:
        return "x".join(map(str, shape[2:]))

    def _unfit(self, shape: Sequence[int], layout: Layout) -> str | None:
        if len(shape) < 3:
            return f"KernelCodebook needs a convolution, and a {len(shape)}-D weight has no kernels; use VectorCodebook"
        if layout.batch_axes or layout.channel_dim > 1:
            return "KernelCodebook needs a convolution, and this weight is a stack of matrices; use VectorCodebook"
        if math.prod(shape[2:]) == 1:
            return f"KernelCodebook needs kernels larger than {self._kind(shape)}; use VectorCodebook or Uniform"
        return None


@dataclass(frozen=True, kw_only=True)
class VectorCodebook(_Codebook):
    """Blocks of consecutive inputs are codewords: `KernelCodebook` for linear weights and 1 x 1 convolutions.

        nearest = argmin_j |block - codebook_j|^2

    Each row of the weight (an output channel) is cut into blocks of `block` inputs. A row that cannot be cut without a
    remainder is refused.

    Args:
        block: inputs a block, >= 1; must divide the inputs of the weight.
        size: as for `KernelCodebook`.
        book: as for `KernelCodebook`.
        codebook_bits: as for `KernelCodebook`.
        zero: as for `KernelCodebook`.
        few: as for `KernelCodebook`.
        param_dtype: as for `KernelCodebook`.
        seed: as for `KernelCodebook`.
        restarts: as for `KernelCodebook`.
        iterations: as for `KernelCodebook`.
        sample: as for `KernelCodebook`.
        warm_start: as for `KernelCodebook`.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> w = torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 1.0, 2.0]])
        >>> blocks = VectorCodebook(block=2, size=1, codebook_bits=None)
        >>> blocks.project(w, blocks.fit(w))
        tensor([[1.5000, 2.5000, 1.5000, 2.5000],
                [1.5000, 2.5000, 1.5000, 2.5000]])

    Reference: Stock et al., "And the Bit Goes Down: Revisiting the Quantization of Neural Networks", arXiv 1907.05686.
    """

    block: int

    def __post_init__(self) -> None:
        if not is_whole(self.block):
            raise ValueError(f"VectorCodebook(block={self.block!r}): must be a whole number >= 1")
        super().__post_init__()

    def _length(self, shape: Sequence[int]) -> int:
        return self.block

    def _kind(self, shape: Sequence[int]) -> str:
        return str(self.block)

    def _unfit(self, shape: Sequence[int], layout: Layout) -> str | None:
        if len(shape) < 2:
            return f"VectorCodebook needs a matrix or a 1x1 convolution, and a {len(shape)}-D weight has no inputs"
        if layout.kernel > 1:
            return f"VectorCodebook needs 1x1 kernels, not {'x'.join(map(str, shape[2:]))}; use KernelCodebook"
        if not layout.is_row_major:
            return (
                "VectorCodebook needs inputs that lie side by side, which those of a transposed convolution or of an "
                "(inputs, outputs) matrix do not"
            )
        inputs = math.prod(shape[axis] for axis in layout.input_axes)
        if inputs % self.block:
            return f"VectorCodebook(block={self.block}) does not divide the {inputs} inputs of this weight"
        return None


# --- small things -------------------------------------------------------------------------------------------------


def _width(codewords: int) -> int:
    """Bits of an index: ceil(log2 codewords)."""
    return (codewords - 1).bit_length()


def _index_bits(units: int, codewords: int) -> int:
    return 8 * -(-units * _width(codewords) // 8)


def _times_two_to(x: Tensor, power: int) -> Tensor:
    """x times a power of two, in place; in two halves, since the factor may itself be beyond the floats."""
    return x.mul_(2.0 ** (power // 2)).mul_(2.0 ** (power - power // 2))


def _rms(units: Tensor) -> Tensor:
    """Root mean square of each row, in float64; also where the squares are larger than a float can be."""
    found = units.square().mean(1, keepdim=True).sqrt_()
    if bool(found.isfinite().all()):
        return found
    most = units.abs().amax(1, keepdim=True).clamp_min(1.0)
    return torch.where(found.isfinite(), found, (units / most).square_().mean(1, keepdim=True).sqrt_().mul_(most))


def _within(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamped to what a dtype can hold, so that a rounding up does not become infinity; float64."""
    most = torch.finfo(dtype).max
    return x.double().clamp(-most, most)


# --- K-means ------------------------------------------------------------------------------------------------------


def _distinct(x: Tensor, most: int) -> Tensor | None:
    """The distinct rows in ascending order, or `None` if there are more than `most`."""
    known, step = x[:0], max(4 * most, 1 << 14)
    for first in range(0, len(x), step):
        known = torch.unique(torch.cat([known, x[first : first + step]]), dim=0)
        if len(known) > most:
            return None
    return known


def _k_means(x: Tensor, size: int, target: _Codebook, start: Tensor | None = None) -> Tensor:
    """The best of several restarts, or what a start leads to; of many rows, all are seen only at the end."""
    generator = torch.Generator().manual_seed(target.seed)
    most = target.sample * size
    part = x if len(x) <= most else x[torch.randperm(len(x), generator=generator)[:most]]
    if start is not None:  # codewords that are missing are copies, which nothing is nearest to: empty clusters
        full = torch.cat([start, start[-1:].expand(size - len(start), -1)])
        best = _lloyd(part, full, target.iterations, target.zero)[0]
        return best if part is x else _lloyd(x, best, 2, target.zero)[0]
    best, least = x[:0], math.inf
    for _ in range(target.restarts):
        centres, error = _lloyd(part, _spread(part, size, target.zero, generator), target.iterations, target.zero)
        if error < least:
            best, least = centres, error
    return best if part is x else _lloyd(x, best, 2, target.zero)[0]


def _spread(x: Tensor, size: int, zero: bool, generator: torch.Generator) -> Tensor:
    """K-means++: each next centre is a row drawn with the square of its distance to the centres so far."""
    centres = x.new_zeros(size, x.shape[1])
    nearest = x.square().sum(1) if zero else x.new_ones(len(x))
    for k in range(1 if zero else 0, size):
        mass = nearest.cumsum(0, dtype=torch.float64)
        at = torch.rand(1, generator=generator, dtype=torch.float64) * mass[-1]
        row = x[int(torch.searchsorted(mass, at, right=True).clamp_max(len(x) - 1))]
        centres[k] = row
        far = (x - row).square_().sum(1)
        nearest = far if k == 0 else torch.minimum(nearest, far)
    return centres


def _lloyd(x: Tensor, centres: Tensor, iterations: int, zero: bool) -> tuple[Tensor, float]:
    """Centres to the means of their rows and back; a centre without rows goes to the row farthest from its own.

    Returns:
        The centres, and the squared error of the last assignment.
    """
    before, error = math.inf, math.inf
    for _ in range(iterations):
        index, far = _nearest(x, centres)
        error = float(far.sum(dtype=torch.float64))
        counts = torch.bincount(index, minlength=len(centres))
        # One column at a time: the sums of a whole copy in float64 would take twice the memory of the weights.
        sums = torch.stack([torch.bincount(index, column.double(), len(centres)) for column in x.unbind(1)], dim=1)
        moved = (sums / counts.clamp_min(1)[:, None]).to(x.dtype)
        empty = counts == 0
        if zero:
            moved[0], empty[0] = 0.0, False
        if bool(empty.any()):
            moved[empty] = x[far.topk(int(empty.sum())).indices]
            if torch.equal(moved, centres):  # too few distinct rows for all centres: it would go on like this
                break
        elif error >= before * (1 - _STALLED):
            break
        centres, before = moved, error
    return centres, error


def _nearest_for_sure(x: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest entry by matrix products, and the rows where their roundings leave it open."""
    # In float64, which no setting of the user's lets a matrix product round further (TF32, bfloat16).
    x, entries = x.double(), entries.double()
    sizes = entries.square().sum(1)
    scores = torch.addmm(sizes, x, entries.t(), alpha=-2)
    index = _argmin(scores)
    least = scores.gather(1, index[:, None])[:, 0]
    # |c|^2 - 2 x c is a sum of 2 n products, each at most (|x| + |c|)^2 together: Higham's bound for any order of sums.
    reach = x.square().sum(1).sqrt_().add_(sizes.amax().sqrt()).square_()
    bound = least + reach * (_SLACK * (2 * x.shape[1] + 4) * torch.finfo(x.dtype).eps)
    second = scores.scatter_(1, index[:, None], math.inf).amin(1)
    # Numbers too small to be squared, and sums too large for a float, leave it open too; so does a NaN.
    return index, ~((second > bound) & (reach > torch.finfo(x.dtype).tiny * 1e8) & bound.isfinite())


def _argmin(scores: Tensor) -> Tensor:
    """The place of the least number of each row, the first of equal ones; NumPy compares several at once."""
    return torch.from_numpy(scores.numpy().argmin(axis=1)) if scores.device.type == "cpu" else scores.argmin(dim=1)


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centre of every row and the squared distance to it, by matrix products: fast, not exact."""
    index = torch.empty(len(x), dtype=torch.long)
    far = torch.empty(len(x), dtype=x.dtype)
    sizes, step = centres.square().sum(1), max(1, _CHUNK // len(centres))
    for first in range(0, len(x), step):
        some = x[first : first + step]
        scores = torch.addmm(sizes, some, centres.t(), alpha=-2)
        index[first : first + step] = at = _argmin(scores)
        score = scores.gather(1, at[:, None])[:, 0]
        far[first : first + step] = score.add_(some.square().sum(1)).clamp_min_(0.0)
    return index, far
