"""Units that no longer do anything: folded into the next bias, and removed from the model for good."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from detent.claimed import Entry
from detent.engine import Run
from detent.export.calling import Call, Inputs, bind, unwrapped
from detent.export.channels import ChannelGraph
from detent.export.trace import LAYERS
from detent.export.units import Units
from detent.lives import Lives

__all__ = ["Folded", "LayerSize", "Slimmed", "fold_dead_units", "slim"]

# --- what is reported ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """One convolution or linear layer, before and after.

    Args:
        name: of the module.
        before: (inputs, outputs) it had: channels or features.
        after: (inputs, outputs) it has.
        weights: its non-zero weights (before, after).
        unused: outputs that nothing used any more.
        constant: inputs that were constant and went into a bias.

    Example:
        >>> LayerSize(name="fc", before=(4, 2), after=(3, 2), weights=(8, 6), unused=0, constant=1).after
        (3, 2)
    """

    name: str
    before: tuple[int, int]
    after: tuple[int, int]
    weights: tuple[int, int]
    unused: int
    constant: int


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What folding or removal did.

    Args:
        layers: one row a convolution or linear layer.
        left: what could have gone but had to stay, in words, with its layer.
        difference: largest |output after - output before| on the example input.
        scale: largest |output before| there.
        bound: what `difference` was checked against.

    Example:
        >>> Folded(layers=(), left=(), difference=0.0, scale=1.0, bound=1e-4).weights
        (0, 0)
    """

    layers: tuple[LayerSize, ...]
    left: tuple[str, ...]
    difference: float
    scale: float
    bound: float

    @property
    def weights(self) -> tuple[int, int]:
        """Non-zero weights of all these layers (before, after)."""
        return sum(row.weights[0] for row in self.layers), sum(row.weights[1] for row in self.layers)

    def _said(self) -> str:
        before, after = self.weights
        stayed = f", {len(self.left)} things had to stay" if self.left else ""
        return (
            f"{len(self.layers)} layers, {after:,} of {before:,} non-zero weights left{stayed}; "
            f"difference {self.difference:.3g} (allowed {self.bound:.3g})"
        )

    def __repr__(self) -> str:
        """In a line; a big model's layers are kilobytes."""
        return f"<{type(self).__name__}: {self._said()}>"


@dataclass(frozen=True, kw_only=True)
class Slimmed(Folded):
    """A smaller model, and what it saves.

    Args:
        model: the smaller model, in eval mode; a copy, of the same classes.
        parameters: numbers in it (before, after).
        macs: multiply-accumulates of convolutions and matrix products for the example input (before, after), as
            torch's own counter sees them.

    Example:
        >>> row = dict(layers=(), left=(), difference=0.0, scale=1.0, bound=1e-4)
        >>> Slimmed(model=nn.ReLU(), parameters=(10, 5), macs=(100, 25), **row).macs
        (100, 25)
    """

    model: nn.Module
    parameters: tuple[int, int]
    macs: tuple[int, int]

    def __repr__(self) -> str:
        """In a line; the layers of both models are kilobytes."""
        pairs = (("parameters", self.parameters), ("multiply-accumulates", self.macs))
        smaller = ", ".join(f"{after:,} of {before:,} {what}" for what, (before, after) in pairs)
        return f"<{type(self).__name__}: {smaller}; {self._said()}>"


# --- the whole ----------------------------------------------------------------------------------------------------


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval() and None
    finally:
        for module, mode in modes.items():
            module.training = mode


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    return [t.detach().double() for t in tree_leaves(call(model)) if isinstance(t, Tensor)]


def _share(tolerance: float, field: str) -> float:
    if not 0 <= tolerance < 1:
        raise ValueError(f"{field}(tolerance={tolerance}): must be at least 0 and below 1")
    return float(tolerance)


def _compare(before: list[Tensor], after: list[Tensor], dtype: torch.dtype, tolerance: float) -> dict[str, float]:
    """How far apart two outputs are.

    Raises:
        RuntimeError: farther than rounding explains.
        ValueError: farther than rounding and the tolerance allow.
    """
    scale = max((float(t.abs().max()) for t in before if t.numel()), default=0.0)
    gap = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True) if a.numel()), default=0.0)
    bound = (1024 * torch.finfo(dtype).eps + tolerance) * max(scale, 1.0)
    if not gap <= bound:
        if tolerance:
            raise ValueError(
                f"tolerance={tolerance:g}: without the units below it the output on the example moves by {gap:g}, more "
                f"than {bound:g}; use a smaller tolerance, or 0 for what is exact"
            )
        raise RuntimeError(
            f"folding dead units moved the output by {gap:g}, which rounding (<= {bound:g}) cannot explain"
        )
    return {"difference": gap, "scale": scale, "bound": bound}


def _nonzero(model: nn.Module) -> dict[str, tuple[tuple[int, int], int]]:
    """((inputs, outputs), non-zero weights) of every convolution (transposed ones too) and linear layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            found[name] = (Units(module).size, int(module.weight.detach().count_nonzero()))
    return found


def _layers(
    before: Mapping[str, tuple[tuple[int, int], int]], model: nn.Module, graph: ChannelGraph
) -> tuple[LayerSize, ...]:
    after = _nonzero(model)
    return tuple(
        LayerSize(
            name=name,
            before=size,
            after=after[name][0],
            weights=(weights, after[name][1]),
            unused=len(graph.unused.get(name, ())),
            constant=len(graph.folded.get(name, ())),
        )
        for name, (size, weights) in before.items()
    )


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)


def fold_dead_units(model: nn.Module | Run, example_input: Inputs, *, tolerance: float = 0.0) -> Folded:
    """Set to zero, in place, whatever cannot reach the output, and put constants into the next bias; shapes stay.

    A file of the same architecture then holds fewer weights. Weights, biases and BatchNorm numbers of units that no
    later weight uses become zero (running variance 1). A unit without incoming weights has the constant output
    f(bias), through BatchNorm in eval mode, activations and pooling; that constant times the weights goes into the
    bias of the next layer (or out of the running mean of its BatchNorm), and the weights become zero. Only where it
    is exact: not where the next layer pads with zeros and the constant is not 0. A sum of branches is handled branch
    by branch. What had to stay is said in `left`.

    With a finalized run, claimed weights stay in their targets: a tensor whose target has no zero where one is needed
    is left as it is. Counts of sparse targets go down to what is left, so that the file follows.

    Near-dead units (all weights a millionth of the layer's largest, as training with weight decay leaves them) still
    take their full width in a file. `tolerance=1e-6` sets them to zero first; do so before `compress`, on the model.

    Args:
        model: a model, or a run after `run.finalize()`, in one process. Wrappers (torch.compile, DataParallel,
            AveragedModel) are seen through.
        example_input: what the model is called with: a tensor, several, or a mapping by name; a few samples.
        tolerance: in [0, 1), as a share. Outputs and inputs of a layer none of whose weights exceeds this share of the
            layer's largest, and gains of norms likewise, become zero; the outputs on the example may then move by this
            share of their largest.

    Raises:
        ValueError: a run that is not finalized; a model that torch.fx cannot trace; the output moved by more than the
            tolerance; the model is then as it was.
        RuntimeError: the output on the example moved by more than rounding; the model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     model[0].weight[0], model[0].bias[0], model[2].weight[0, 1] = 0.0, 2.0, 0.0
        >>> report = fold_dead_units(model, torch.randn(4, 2))
        >>> [row.weights for row in report.layers]      # unit 0 is constant, nothing uses unit 1
        [(4, 2), (2, 1)]
    """
    run = model if isinstance(model, Run) else None
    share = _share(tolerance, "fold_dead_units")
    with unwrapped(model.model if isinstance(model, Run) else model) as net:
        return _fold(net, run, bind(net, example_input, "example_input"), share)


def _fold(net: nn.Module, run: Run | None, call: Call, tolerance: float) -> Folded:
    entries = [] if run is None else _finalized(run)
    kept = {name: value.detach().clone() for name, value in net.state_dict().items()}
    locked: set[str] = set()
    with _in_eval(net):
        before, outputs = _nonzero(net), _outputs(net, call)
        try:
            while True:
                graph = ChannelGraph(net, call, locked)
                if tolerance:
                    graph.clear_near_dead(tolerance)
                graph.fold(new_biases=False)
                fitted = {entry.name: _recounted(entry) for entry in entries}
                bad = {name for name, params in fitted.items() if params is None}
                if not bad:
                    break
                net.load_state_dict(kept)
                locked |= bad
            difference = _compare(outputs, _outputs(net, call), _dtype_of(net), tolerance)
        except BaseException:
            net.load_state_dict(kept)
            if run is not None:
                run._adopt()
            raise
        graph.look()
        report = Folded(layers=_layers(before, net, graph), left=graph.left(), **difference)
    for entry in entries:
        entry.params, entry.settled = fitted[entry.name], True
    if run is not None:
        run._adopt()
    return report


def _finalized(run: Run) -> list[Entry]:
    """The claimed weights of a run whose training is over.

    Raises:
        ValueError: one that does not lie in its target.
    """
    for entry in run._entries:
        w, params = entry.param.detach(), entry.params
        if not run._closed or params is None or not torch.equal(entry.target.project(w, params), w):
            raise ValueError(
                f"{entry.name!r} does not lie in its target: call run.finalize() before folding dead units"
            )
    return run._entries


def _recounted(entry: Entry) -> Any:
    """The params of a claimed weight, with counts for what is left of it; `None` if it left its target."""
    assert entry.params is not None
    w, target = entry.param.detach(), entry.target
    params = target.recounted(w, entry.params)
    return params if torch.equal(target.project(w, params), w) else None


def slim(model: nn.Module | Lives, example_input: Inputs, *, tolerance: float = 0.0) -> Slimmed:
    """A copy of the model without the channels and features that do nothing: structured sparsity made real.

    First everything `fold_dead_units` does (a layer without a bias gets one where a constant needs it), then what
    nothing uses any more is taken out of the shapes: rows, columns, channels of norms, whole groups of GroupNorm and of
    grouped and depthwise convolutions. Channels that are added to one another go only together, so one branch that
    lives keeps the place of the others. Around operations that are not understood, and where a size is written in the
    model's code, all channels stay. Module names and classes stay, so code that uses the model still runs, called as
    the example calls it.

    Args:
        model: a model, or a run, whose compressed life it is then. Wrappers (torch.compile, DataParallel,
            AveragedModel) are taken off.
        example_input: what the model is called with: a tensor, several, or a mapping by name; arguments beyond it keep
            their defaults. Also what multiply-accumulates are counted for.
        tolerance: in [0, 1), as in `fold_dead_units`: units below this share of their layer go too.

    Raises:
        ValueError: a model that torch.fx cannot trace; the output moved by more than the tolerance.
        RuntimeError: the output on the example moved by more than rounding.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> with torch.no_grad():
        ...     model[0].weight[2:] = 0.0
        >>> found = slim(model, torch.randn(1, 1, 8, 8))
        >>> [row.after for row in found.layers], found.parameters
        ([(1, 2), (2, 4)], (372, 96))

    Reference: what coupled channels are, in general: Fang et al., "DepGraph", arXiv 2301.12900.
    """
    share = _share(tolerance, "slim")
    life, whole = (nullcontext(), model) if isinstance(model, nn.Module) else (model.compressed(), model.model)
    with life, unwrapped(whole) as bare:
        net = copy.deepcopy(bare).eval()
    call = bind(net, example_input, "example_input")
    before, outputs = _nonzero(net), _outputs(net, call)
    cost = _cost(net, call)
    graph = ChannelGraph(net, call)
    if share:
        graph.clear_near_dead(share)
    graph.fold(new_biases=True)
    graph.left(zeros=True)
    graph.remove()
    try:
        after_all = _outputs(net, call)
    except Exception as error:
        raise ValueError(
            f"slim: without its dead units {type(net).__name__} does not run, so its code depends on how many there "
            f"were: {error}"
        ) from error
    difference = _compare(outputs, after_all, _dtype_of(net), share)
    after = _cost(net, call)
    return Slimmed(
        model=net,
        layers=_layers(before, net, graph),
        left=graph.unread(),
        parameters=(cost[0], after[0]),
        macs=(cost[1], after[1]),
        **difference,
    )


def _cost(model: nn.Module, call: Call) -> tuple[int, int]:
    """(parameters, multiply-accumulates on the example)."""
    with FlopCounterMode(display=False) as counter:
        call(model)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
