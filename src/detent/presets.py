"""Ready recipes as plain data: the fields of rules and of stages. `Recipe.preset` makes recipes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from detent.mechanisms import ADMM, PSG, STE, CodebookLearning, MirrorDescent
from detent.targets import Binary, KernelCodebook, Target, Ternary, TopK, Uniform, Zero

__all__ = ["PRESETS", "Preset"]

# {"rules": [fields of a rule, ...]}, or {"stages": [fields of a stage, ...]} whose rules are given so.
Preset: TypeAlias = dict[str, list[dict[str, Any]]]

# By structure, whatever they are called.
_WEIGHTS = "@weights"


def _psg_preset(bits: int) -> Callable[[], Preset]:
    # Cells of 2 bits are wide: with the gain that sets itself too few weights have settled by the end (docs/psg.md).
    psg = PSG() if bits > 2 else PSG(gain=8.0)

    def make() -> Preset:
        ends = [
            {"match": where, "target": Uniform(bits=8), "mechanism": psg, "pinned": True, "optional": True}
            for where in ("@first", "@last")
        ]
        return {"rules": [*ends, {"match": _WEIGHTS, "target": Uniform(bits=bits), "mechanism": psg, "optional": True}]}

    return make


def _paper_preset(bits: int) -> Callable[[], Preset]:
    def make() -> Preset:
        def rule(match: str, width: int, pinned: bool) -> dict[str, Any]:
            return {
                "match": match,
                "target": Uniform(bits=width, range="ema"),
                "mechanism": PSG.paper(lambda_s=150),
                "include": "@linear",
                "pinned": pinned,
                "fit_every": 1,
                "fit_until": 1.0,
                "weight_decay": 0.0 if bits == 2 else None,
            }

        ends = [rule(where, 8, True) for where in ("@first", "@last")] if bits <= 3 else []
        return {"rules": [*ends, rule(_WEIGHTS, bits, False)]}

    return make


def _prune_preset() -> Preset:
    # Towards zero every large weight has a large factor: half the gain of a grid.
    target, mechanism = TopK(keep=0.1, scope="model"), PSG(gain=4.0, toward=Zero())
    return {"rules": [{"match": _WEIGHTS, "target": target, "mechanism": mechanism}]}


def _kq_preset(book: Literal["layer", "global"]) -> Callable[[], Preset]:
    def make() -> Preset:
        def ends(match: str) -> dict[str, Any]:
            grid = Uniform(bits=8, granularity="channel", range="minmax")
            return {"match": match, "target": grid, "mechanism": STE(), "pinned": True, "optional": True}

        target = KernelCodebook(size=512, book=book)
        # A network whose first layer is its only convolution has no other kernels.
        kernels = {"match": "@kernels", "target": target, "mechanism": CodebookLearning(), "optional": True}
        return {"rules": [ends("@first"), kernels, ends(_WEIGHTS)]}

    return make


def _admm_prune_preset(rate: int) -> Callable[[], Preset]:
    def make() -> Preset:
        def stage(kept: float) -> dict[str, Any]:
            target = TopK(keep=1 / kept, scope="model")
            # By |w| alone one threshold over a model empties its layers of small weights.
            pull = ADMM(rho=5e-3, growth=1.5, every=0.1, metric="fisher")
            return {
                "rules": [{"match": _WEIGHTS, "target": target, "mechanism": pull}],
                "share": 0.5,
                "name": f"prune {kept:g}x",
            }

        return {"stages": [stage(rate / 2), stage(rate)]}

    return make


def _admm_binary_preset() -> Preset:
    ends = ("@first", "@last")
    pull = ADMM(every=0.1, growth=2.0, rounds=(0.5, 0.75, 0.9, 1.0))
    # With one layer it is both ends; with two there is nothing between, and the first stage trains as ever.
    body = {"match": _WEIGHTS, "target": Binary(), "mechanism": pull, "optional": True}
    kept = [{"match": end, "keep": True, "optional": True} for end in ends]
    last = [{"match": end, "target": Binary(), "mechanism": pull, "optional": True} for end in ends]
    stages = [
        {"rules": [*kept, body], "share": 0.6, "name": "all but the ends"},
        {"rules": last, "share": 0.4, "name": "ends"},
    ]
    return {"stages": stages}


def _uniform_preset(bits: int) -> Callable[[], Preset]:
    # No ends at 8 bits: a bare state dict does not say which layer is first or last.
    return lambda: {"rules": [{"match": _WEIGHTS, "target": Uniform(bits=bits, granularity="channel")}]}


def _md_preset(target: Target) -> Callable[[], Preset]:
    def make() -> Preset:
        return {"rules": [{"match": _WEIGHTS, "target": target, "mechanism": MirrorDescent()}]}

    return make


PRESETS: dict[str, Callable[[], Preset]] = {
    **{f"psg-w{bits}": _psg_preset(bits) for bits in (8, 6, 4, 3, 2)},
    "psg-prune90": _prune_preset,
    **{f"psg-paper-w{bits}": _paper_preset(bits) for bits in (8, 6, 4, 3, 2)},
    **{f"admm-prune-{rate}x": _admm_prune_preset(rate) for rate in (10, 70, 246)},
    "admm-binary": _admm_binary_preset,
    "md-binary": _md_preset(Binary()),
    "md-ternary": _md_preset(Ternary()),
    "kq": _kq_preset("global"),
    "kq-layer": _kq_preset("layer"),
    **{f"uniform-w{bits}": _uniform_preset(bits) for bits in (8, 6, 4, 3, 2)},
}
