"""What a model multiplies its weights with: seen below modules, at the products and convolutions themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detent.grouping import Layout
from detent.undoing import undone, without_gradients

__all__ = ["Aim", "Enough", "Seen", "Watch", "Weight", "calm"]

_PIECE = 1 << 24  # numbers of unfolded inputs held at a time


class Enough(Exception):
    """What was wanted of a forward pass has been seen."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight to look out for: its name, what the model computes with, and its layout."""

    name: str
    tensor: Tensor
    layout: Layout


@dataclass(kw_only=True)
class Seen:
    """The inputs of one weight.

    The rows of `Layout.by_channel` fall into equal runs, its parts; each has inputs of its own: groups of a
    convolution, experts, the thirds of an attention's projection.

    Attributes:
        rows: rows of a part; 0 until it was used.
        counts: how many inputs came to each part, by its first row.
        sums: their sums, by first row, in float64, where they are wanted.
        outputs: sums of the outputs and of their squares, (2, rows) by first row, in float64, where they are wanted.
        moments: X X' by first row, in float64, where they are wanted.
        crosses: T X' by first row, in float64, where outputs T are aimed at.
        energy: |T|^2.
        follower: the normalisation that takes the outputs as they are; empty for none, or for several.
        otherwise: what keeps it from being understood; empty for nothing.
    """

    rows: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    moments: dict[int, Tensor] = field(default_factory=dict)
    crosses: dict[int, Tensor] = field(default_factory=dict)
    energy: float = 0.0
    follower: str | None = None
    otherwise: str = ""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """Outputs to aim at, other than those that the weights would give with the inputs as they are.

        T = W (X + share (X' - X)),   X' the inputs of the full-precision model

    Args:
        matrices: W by name, as `Layout.by_channel`, float32 or float64.
        share: in [0, 1].
    """

    matrices: Mapping[str, Tensor]
    share: float


class Watch(TorchDispatchMode):
    """Looks at every operation while it is entered.

    Args:
        weights: what to look out for.
        wanted: names of those whose moments are to be added up.
        sums: add up the inputs of those themselves, too.
        outputs: add up what these matrices, by name of a weight, make of its inputs: rows of `Layout.by_channel`.
        norms: running means, by name, whose normalisation may take the outputs of a weight.
        until: name of a weight before whose first use the pass is broken off with `Enough`.
        keep: keep the inputs of those that are wanted instead, in `kept`.
        aim: outputs to aim at. A use that has no partner in the full-precision model (experts that are given other
            tokens) is taken as it is.

    Attributes:
        seen: what was seen, by name.
        kept: uses of what is wanted, by name; empty it after each batch.
        uses: names of the weights in the order of their use, each with a number that is the same for uses one after
            another that take the same tensor.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> weight = Weight(name="weight", tensor=layer.weight, layout=Layout(shape=(2, 3)))
        >>> with torch.no_grad(), Watch([weight], wanted={"weight"}) as watch:
        ...     _ = layer(torch.eye(3))
        >>> watch.seen["weight"].moments[0]
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        *,
        wanted: Collection[str] = (),
        sums: bool = False,
        outputs: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor] | None = None,
        until: str | None = None,
        keep: bool = False,
        aim: Aim | None = None,
    ) -> None:
        super().__init__()
        self.kept: dict[str, list[tuple[_Use, int]]] = {}
        self._partners: Mapping[str, list[tuple[_Use, int]]] = {}
        self._keep, self._aim = keep, aim
        self._met: dict[str, int] = {}
        self.seen = {weight.name: Seen() for weight in weights}
        self.uses: list[tuple[str, int]] = []
        self._wanted, self._sums, self._until = wanted, sums, until
        self._outputs = outputs or {}
        self._weights: dict[int, list[Weight]] = {}  # several may lie in one piece of memory
        for weight in weights:
            self._weights.setdefault(_memory(weight.tensor), []).append(weight)
        self._norms = {_memory(mean): name for name, mean in (norms or {}).items()}
        self._input: tuple[object, ...] = ()
        self._inputs = 0
        self._output: tuple[str, Any] = ("", None)  # the last product, held so that its memory is not given to others

    def begin(self, partners: Mapping[str, list[tuple[_Use, int]]]) -> None:
        """A batch begins, whose uses in the full-precision model were these: `kept` of a watch that kept them."""
        self._partners, self._met = partners, {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        mine = [weight for t in given for weight in (self._weight(t),) if weight is not None]
        if not mine:
            out = func(*args, **(kwargs or {}))
            self._look_for_norm(given)
            return out
        product = _PRODUCTS.get(func.overloadpacket) if hasattr(func, "overloadpacket") else None
        used = list(product(args, kwargs or {})) if product is not None else []
        uses = [(weight, use) for use in used for weight in (self._weight(use.w),) if weight is not None]
        if any(weight.name == self._until for weight, _ in uses):
            raise Enough
        out = func(*args, **(kwargs or {}))
        made = {_memory(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        for weight in mine:
            known = any(weight is other for other, _ in uses)
            if not known and not made & {_memory(weight.tensor)}:  # a view of it is no use of it
                self._cannot(weight, f"used by {_plain(func)}")
        for weight, use in uses:
            self._use(weight, use)
        if len(uses) == 1 and isinstance(out, Tensor):
            self._output = (uses[0][0].name, out.untyped_storage())
        return out

    def _weight(self, t: Tensor) -> Weight | None:
        """The weight that a tensor is a view of, or all of."""
        for weight in self._weights.get(_memory(t), ()):
            first = weight.tensor.storage_offset()
            if first <= t.storage_offset() < first + weight.tensor.numel():
                return weight
        return None

    def _cannot(self, weight: Weight, why: str) -> None:
        self.seen[weight.name].otherwise = self.seen[weight.name].otherwise or why

    def _use(self, weight: Weight, use: _Use) -> None:
        x = use.x
        version = _version(x)
        key = (_memory(x), x.storage_offset(), tuple(x.shape), x.stride(), version)
        if self._input[1:] != key:
            self._inputs += 1
            self._input = (x.untyped_storage(), *key)  # held, so that nothing else comes to lie there
        self.uses.append((weight.name, self._inputs))
        seen = self.seen[weight.name]
        first, rows, why = use.rows_of(weight)
        if not why and seen.rows not in (0, rows):
            why = f"used {rows} and {seen.rows} rows at a time"
        if not why and any(row % rows for row in first):
            why = "used in rows that overlap"
        if why:
            self._cannot(weight, why)
            return
        seen.rows = rows
        wanted = weight.name in self._wanted
        whole = len(first) * rows == weight.layout.channels and not use.is_routed
        if wanted and self._keep:
            self.kept.setdefault(weight.name, []).append((use, version if whole else -1))
            return
        partner = self._partner(weight.name, use, whole=whole) if wanted and self._aim is not None else use
        matrix = self._outputs.get(weight.name)
        for number, row in enumerate(first if (wanted or matrix is not None) and len(x) else ()):
            for piece, other in zip(use.inputs(number), partner.inputs(number), strict=True):
                if matrix is not None:
                    _add_outputs(seen, row, _wide(piece), matrix[row : row + rows])
                if wanted:
                    self._add(seen, row, _wide(piece))
                if wanted and self._aim is not None:
                    aimed = self._aim.matrices[weight.name][row : row + rows]
                    _add_aim(seen, row, _wide(piece), _wide(other), aimed, self._aim.share)

    def _partner(self, name: str, use: _Use, *, whole: bool) -> _Use:
        """The same use in the full-precision model, if it can be told; else the use itself."""
        number = self._met[name] = self._met.get(name, -1) + 1
        known = self._partners.get(name, [])
        if not whole or number >= len(known):
            return use
        other, version = known[number]
        return other if other.x.shape == use.x.shape and _version(other.x) == version else use

    def _add(self, seen: Seen, row: int, x: Tensor) -> None:
        """Some inputs of one part, (images, inputs, positions)."""
        seen.counts[row] = seen.counts.get(row, 0) + len(x) * x.shape[2]
        if self._sums:
            _add_to(seen.sums, row, x.sum(dim=2).sum(dim=0, dtype=torch.float64))
        square = x.new_zeros(x.shape[1], x.shape[1])
        for image in x:
            square.addmm_(image, image.t())
        _add_to(seen.moments, row, square.double())

    def _look_for_norm(self, given: list[Tensor]) -> None:
        if not self._norms or len(given) < 2:
            return
        name = next((self._norms[_memory(t)] for t in given[1:] if _memory(t) in self._norms), None)
        last, storage = self._output
        if name is None or storage is None or _memory(given[0]) != storage.data_ptr():
            return
        seen = self.seen[last]
        seen.follower = name if seen.follower in (None, name) else ""


@contextmanager
def calm(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, uncompiled and with its attention written out, so that each product can be seen."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    # Nothing is compiled that has not loaded the compiler, which takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()

    def back() -> None:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode

    with undone(back):
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with without_gradients(), eager:
            yield


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _wide(x: Tensor) -> Tensor:
    """In a dtype that adds up well, where there is float64."""
    x = x.cpu() if x.device.type == "mps" else x
    return x if x.dtype == torch.float64 else x.float()


def _add_outputs(seen: Seen, row: int, x: Tensor, matrix: Tensor) -> None:
    """What a matrix makes of some inputs of one part."""
    made = matrix.to(x) @ x
    seen.counts[row] = seen.counts.get(row, 0) + len(x) * x.shape[2]
    sums = torch.stack([made.sum(dim=2), made.square().sum(dim=2)])
    _add_to(seen.outputs, row, sums.sum(dim=1, dtype=torch.float64))


def _add_aim(seen: Seen, row: int, x: Tensor, full: Tensor, matrix: Tensor, share: float) -> None:
    """The outputs to aim at with some inputs of one part."""
    aimed = matrix.to(x) @ (x if full is x else torch.lerp(x, full, share))
    cross = x.new_zeros(aimed.shape[1], x.shape[1])
    for outputs, image in zip(aimed, x, strict=True):
        cross.addmm_(outputs, image.t())
    _add_to(seen.crosses, row, cross.double())
    seen.energy += float(aimed.square_().sum(dim=2).sum(dtype=torch.float64))


def _add_to(sums: dict[int, Tensor], row: int, more: Tensor) -> None:
    sums[row] = sums[row].add_(more) if row in sums else more


def _plain(func: Any) -> str:
    """The name of an operation in a sentence."""
    return str(func).removeprefix("aten.").partition(".")[0].strip("_")


# --- products -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Use:
    """A weight, or a view of it, in a product.

    Args:
        x: the tensor that it is multiplied with.
        w: the weight in it.
        rows_of: of a weight, the first rows of `Layout.by_channel` that it is used with, how many rows each part has,
            and why that cannot be told.
        inputs: of the part of that number, its inputs in pieces, (images, inputs, positions).
        is_routed: whether which inputs come to which part hangs on the inputs.
    """

    x: Tensor
    w: Tensor
    rows_of: Callable[[Weight], tuple[list[int], int, str]]
    inputs: Callable[[int], Iterator[Tensor]]
    is_routed: bool = False


def _matrices(x: Tensor, w: Tensor, parts: Sequence[Tensor] | None = None) -> _Use:
    """`x @ w`, x (n, inputs) and w (inputs, outputs), or stacks of both; `parts` are the inputs of each matrix."""
    stack = w if w.dim() == 3 else w[None]
    runs = list(x if x.dim() == 3 else x[None]) if parts is None else parts

    def inputs(number: int) -> Iterator[Tensor]:
        for rows in runs[number].split(max(1, _PIECE // max(runs[number].shape[1], 1))):
            yield rows.t()[None]

    routed = parts is not None
    return _Use(x=x, w=w, rows_of=lambda weight: _rows(weight, stack), inputs=inputs, is_routed=routed)


def _rows(weight: Weight, w: Tensor) -> tuple[list[int], int, str]:
    """Where the columns of a stack of matrices (inputs, outputs) lie among the rows of `Layout.by_channel`."""
    layout, own = weight.layout, weight.tensor
    none: list[int] = []
    if layout.kernel > 1 or layout.conv_groups > 1 or not layout.input_axes:
        return none, 0, "a kernel used as a matrix"
    axis = layout.input_axes[0]
    inputs, step = layout.shape[axis], own.stride()
    stack, given, outputs = w.shape
    channels = layout.shape[layout.channel_dim]
    if given != inputs:
        return none, 0, f"used with {given} of its {inputs} inputs"
    strides = {1: step[axis], 2: step[layout.channel_dim]}
    if stack > 1:
        strides[0] = step[layout.batch_axes[-1]] if layout.batch_axes else -1
    if any(w.shape[i] > 1 and w.stride(i) != stride for i, stride in strides.items()):
        return none, 0, "used along other axes than its layout says"
    at, left = [0] * len(step), int(w.storage_offset()) - int(own.storage_offset())
    for i in sorted(range(len(step)), key=lambda i: -step[i]):
        at[i], left = divmod(left, int(step[i])) if own.shape[i] > 1 else (0, left)
    row = 0
    for i in (*layout.batch_axes, layout.channel_dim):
        row = row * layout.shape[i] + at[i]
    if (
        left
        or at[axis]
        or at[layout.channel_dim] + outputs > channels
        or row + (stack - 1) * channels >= layout.channels
    ):
        return none, 0, "used with a part of its inputs"
    return [row + i * channels for i in range(stack)], outputs, ""


def _both(x: Tensor, w: Tensor) -> list[_Use]:
    """A product in which either factor may be the weight."""
    return [_matrices(x, w), _matrices(w.transpose(-1, -2), x.transpose(-1, -2))]


def _grouped(x: Tensor, w: Tensor, offsets: Tensor | None) -> list[_Use]:
    """Rows of x in runs, each with a matrix of its own."""
    if offsets is None or x.dim() != 2 or w.dim() != 3:
        return []
    ends = offsets.tolist()
    runs = [x[first:past] for first, past in zip([0, *ends[:-1]], ends, strict=True)]
    return [_matrices(x, w, runs)]


def _linear(x: Tensor, w: Tensor) -> list[_Use]:
    return [_matrices(x.reshape(-1, x.shape[-1]), w.t())]


def _convolution(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[_Use]:
    kernel = w.shape[2:]
    axes = len(kernel)
    stride, padding, dilation, output_padding = (
        list(each) * axes if len(each) == 1 else list(each) for each in (stride, padding, dilation, output_padding)
    )

    def rows_of(weight: Weight) -> tuple[list[int], int, str]:
        layout = weight.layout
        whole = w.shape == layout.shape and w.storage_offset() == weight.tensor.storage_offset()
        expected = (int(transposed), groups if transposed else 1, ())
        if not whole or (layout.channel_dim, layout.conv_groups, layout.batch_axes) != expected:
            return [], 0, "used along other axes than its layout says"
        rows = layout.channels // groups
        return [rows * i for i in range(groups)], rows, ""

    def windows(images: Tensor) -> Tensor:
        """(images, channels, kernel positions.., output positions..)."""
        if not transposed:
            pads = [(p, p) for p in padding]
            return _windows(_padded(images, pads), kernel, stride, dilation)
        spread = _spread(images, stride)
        sides = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        pads = [(side, side + more) for side, more in zip(sides, output_padding, strict=True)]
        # An output meets the kernel the other way round.
        return _windows(_padded(spread, pads), kernel, [1] * axes, dilation).flip([*range(2, 2 + axes)])

    def inputs(number: int) -> Iterator[Tensor]:
        channels = x.shape[1] // groups
        mine = x[:, number * channels : (number + 1) * channels]
        grown = kernel.numel() if not transposed else kernel.numel() * torch.Size(stride).numel()
        for images in mine.split(max(1, _PIECE // max(mine[0].numel() * grown, 1))):
            yield windows(images).reshape(len(images), channels * kernel.numel(), -1)

    return [_Use(x=x, w=w, rows_of=rows_of, inputs=inputs)]


def _padded(x: Tensor, sides: list[tuple[int, int]]) -> Tensor:
    """Zeros at both ends of the last axes; a negative number cuts off."""
    flat = [n for side in reversed(sides) for n in side]
    return torch.nn.functional.pad(x, flat) if any(flat) else x


def _spread(x: Tensor, stride: list[int]) -> Tensor:
    """The same numbers with zeros between neighbours."""
    lengths = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros((*x.shape[:2], *lengths))
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return wide


def _windows(x: Tensor, kernel: Sequence[int], stride: list[int], dilation: list[int]) -> Tensor:
    """A view (images, channels, kernel positions.., output positions..)."""
    x = x.contiguous()
    steps = x.stride()[2:]
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    within = [step * d for step, d in zip(steps, dilation, strict=True)]
    between = [step * s for step, s in zip(steps, stride, strict=True)]
    return x.as_strided((*x.shape[:2], *kernel, *out), (*x.stride()[:2], *within, *between))


_aten = torch.ops.aten
_PRODUCTS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], list[_Use]]] = {
    _aten.mm: lambda args, kwargs: _both(args[0], args[1]),
    _aten.addmm: lambda args, kwargs: _both(args[1], args[2]),
    _aten.bmm: lambda args, kwargs: _both(args[0], args[1]),
    _aten.baddbmm: lambda args, kwargs: _both(args[1], args[2]),
    _aten.linear: lambda args, kwargs: _linear(args[0], args[1]),
    _aten.convolution: lambda args, kwargs: _convolution(*args),
    _aten._grouped_mm: lambda args, kwargs: _grouped(
        args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs")
    ),
}
