"""The one table of samples: targets, mechanisms, pairs with their skips, and errors with a piece of their sentence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import detent as dt
from detent.mechanisms import SoftmaxMap
from detent.mechanisms.latent import level_count

# Every target with sample arguments. A new target or a new branch of one gets a row here and nothing else.
TARGETS: dict[str, dt.Target] = {
    "uniform-2": dt.Uniform(bits=2),
    "uniform-3-minmax": dt.Uniform(bits=3, range="minmax"),
    "uniform-4": dt.Uniform(bits=4),
    "uniform-4-channel-half": dt.Uniform(bits=4, granularity="channel", param_dtype="float16"),
    "uniform-4-group": dt.Uniform(bits=4, granularity=dt.Group(size=4), range="minmax", param_dtype="bfloat16"),
    "uniform-5-channel-ema": dt.Uniform(bits=5, granularity="channel", range="ema"),
    "uniform-8-ema": dt.Uniform(bits=8, range="ema"),
    "uniform-3-alternate": dt.Uniform(bits=3, granularity="channel", range="alternate"),
    "uniform-3-interval": dt.Uniform(bits=3, range="interval"),
    "uniform-2-no-zero": dt.Uniform(bits=2, range="alternate", zero=False),
    "step": dt.UniformStep(step=0.06),
    "step-rate": dt.UniformStep(rate=2.0, rounding=0.35, bits=6),
    "step-channel-half": dt.UniformStep(rate=3.0, granularity="channel", param_dtype="float16"),
    "step-model": dt.UniformStep(rate=1.5, over="model", bits=10),
    "binary": dt.Binary(),
    "binary-unscaled": dt.Binary(scale=None),
    "binary-channel-half": dt.Binary(granularity="channel", param_dtype="float16"),
    "ternary": dt.Ternary(),
    "ternary-unscaled": dt.Ternary(scale=None),
    "ternary-channel-alternate": dt.Ternary(scale="alternate", granularity="channel"),
    "power-4": dt.PowerOfTwo(bits=4),
    "power-3-no-zero": dt.PowerOfTwo(bits=3, granularity="channel", range="max", zero=False),
    "learned-4": dt.LearnedLevels(k=4),
    "learned-5-group": dt.LearnedLevels(k=5, zero=True, granularity=dt.Group(size=4), param_dtype="bfloat16"),
    "round-half": dt.Round(),
    "round-brain": dt.Round(dtype="bfloat16"),
    "zero": dt.Zero(),
    "zero-channel": dt.Zero(granularity=dt.Channel()),
    "topk-tenth": dt.TopK(keep=0.1),
    "topk-most": dt.TopK(keep=0.7),
    "topk-all": dt.TopK(keep=1.0),
    "topk-five": dt.TopK(keep=5),
    "topk-model": dt.TopK(keep=0.25, scope="model"),
    "topk-lamp": dt.TopK(keep=0.25, scope="model", share="lamp"),
    "topk-nonzero": dt.TopK(keep="nonzero"),
    "nm-2-4": dt.NM(n=2, m=4),
    "kernels": dt.KernelCodebook(size=4),
    "vectors": dt.VectorCodebook(block=2, size=4, param_dtype="float16"),
    "vectors-global": dt.VectorCodebook(block=2, size=6, book="global", codebook_bits=None, zero=True),
    "nm-3-20-columns": dt.NM(n=3, m=20, along="columns"),
    "structured-filter": dt.Structured(group="filter", keep=0.5),
    "structured-column-model": dt.Structured(group="column", keep=0.5, scope="model"),
    "structured-block": dt.Structured(group="block", keep=0.4, block=(2, 3)),
    "sparse-levels": dt.SparseLevels(sparse=dt.TopK(keep=0.3), survivors=dt.Uniform(bits=3)),
    "sparse-levels-nm": dt.SparseLevels(
        sparse=dt.NM(n=2, m=4), survivors=dt.Uniform(bits=4, granularity="channel", param_dtype="float16")
    ),
    "sparse-levels-model": dt.SparseLevels(
        sparse=dt.TopK(keep=0.3, scope="model"), survivors=dt.Binary(granularity="channel")
    ),
    "sparse-levels-block": dt.SparseLevels(
        sparse=dt.Structured(group="block", keep=0.5, block=(2, 3)), survivors=dt.LearnedLevels(k=4)
    ),
}

# Every mechanism with sample arguments, short enough to act within a dozen steps.
MECHANISMS: dict[str, dt.Mechanism] = {
    "psg": dt.PSG(gain=8.0),
    "psg-auto": dt.PSG(start=2),
    "psg-gradient": dt.PSG(form="gradient", gain=2.0, eps=0.1, clip_norm=1.0, clip_start=2),
    "psg-update": dt.PSG(form="update", gain=0.5, strength=0.4, clip=False),
    "psg-late": dt.PSG(gain=8.0, start=4, strength=dt.Linear(first=0.0, last=1.0, begin=4, end=9)),
    "psg-paper": dt.PSG.paper(lambda_s=20.0, eps=0.01),
    "psg-toward-zero": dt.PSG(gain=8.0, toward=dt.Zero(granularity="channel")),
    "ste": dt.STE(),
    "ste-late": dt.STE(start=0.4),
    "hard": dt.HardProjection(every=3),
    "hard-free": dt.HardProjection(every=4, masks=False, start=2),
    "clip": dt.Clip(start=0.2),
    "ste-clipped": dt.STE(clip_latent=0.3),
    "mirror": dt.MirrorDescent(),
    "mirror-softmax": dt.MirrorDescent(
        map="softmax", scale_aware="channel", beta=dt.Growth(factor=2.0, every=2, last=1e3), start=2
    ),
    "mirror-inverse": dt.MirrorDescent(map=SoftmaxMap(), init="inverse", hard_start=0.75),
    "mirror-primal": dt.MirrorDescent(form="primal", beta=2.0),
    "mirror-relax": dt.MirrorDescent(map="relax"),
    "gd-tanh": dt.GDTanh(units="weight"),
    "pmf": dt.PMF(beta=dt.Exponential(first=1.0, last=100.0)),
    "binary-relax": dt.BinaryRelax(hard_start=0.75),
    "parq": dt.PARQ(start=0.25, clip_latent=2.0),
    "codebook": dt.CodebookLearning(),
    "codebook-sum": dt.CodebookLearning(reduce="sum", ste_from=None, reassign_every=2, reassign_until=0.7),
    "admm": dt.ADMM(rho=0.5, every=2),
    "admm-balanced": dt.ADMM(rho=0.05, every=0.1, until=0.7, balance=True, per_level=True, freeze_every=1),
    "admm-decoupled": dt.ADMM(rho=0.1, every=3, start=3, until=None, rho_max=0.12, form="decoupled"),
    "admm-fisher": dt.ADMM(rho=0.5, every=2, until=0.6, metric="fisher"),
    "masked": dt.Masked(start=4),
    "masked-fisher": dt.Masked(start=4, metric="fisher"),
    "freeze": dt.PartialFreeze(start=0.3, rounds=(0.3, 0.8, 1.0)),
    "penalty": dt.Penalty(strength=dt.Linear(first=0.0, last=0.5), norm="l1"),
    "proximal": dt.Proximal(strength=0.5, every=2),
}

# Pairs a mechanism refuses, with a piece of the sentence it says so in.
REFUSED: dict[tuple[str, str], str] = {
    (target, "clip"): "Clip keeps weights inside a range"
    for target in TARGETS
    if target.startswith(("zero", "topk", "nm", "structured", "kernels", "vectors"))
}
for _name, _target in TARGETS.items():
    if type(_target).free is dt.Target.free:
        REFUSED[_name, "masked"] = REFUSED[_name, "masked-fisher"] = "leaves no weight free; use PartialFreeze"
        REFUSED[_name, "admm-fisher"] = "is not a set of few free weights"
    else:
        REFUSED[_name, "freeze"] = "have none to go to; use Masked"
    for _mechanism in ("codebook", "codebook-sum"):
        if not _target.has_codebook:
            REFUSED[_name, _mechanism] = "CodebookLearning trains the codewords of a codebook"
    _count = level_count(_target)
    for _mechanism in ("mirror", "mirror-softmax", "mirror-inverse", "mirror-primal", "gd-tanh", "pmf", "parq"):
        if _count is None:
            REFUSED[_name, _mechanism] = "lets each weight choose among listed levels"
        elif _count < 2:
            REFUSED[_name, _mechanism] = "needs two levels at least"
    if _count is not None and _count > 2:
        REFUSED[_name, "mirror-primal"] = "a weight forgets it by rounding; use form='dual'"

# Pairs left out although nothing refuses them, with the reason.
SKIPPED: dict[tuple[str, str], str] = {}

PAIRS: list[tuple[str, str]] = [
    pair for pair in itertools.product(TARGETS, MECHANISMS) if pair not in REFUSED and pair not in SKIPPED
]

# Pairs that go through the long check of a mechanism: every mechanism, and every target but its mere variants.
LONG_PAIRS: list[tuple[str, str]] = [
    ("uniform-4", "psg"),
    ("uniform-4-channel-half", "psg-gradient"),
    ("uniform-4-group", "psg-auto"),
    ("topk-model", "psg-auto"),
    ("uniform-4-group", "psg-update"),
    ("uniform-5-channel-ema", "psg-late"),
    ("uniform-8-ema", "psg-paper"),
    ("topk-model", "psg-toward-zero"),
    ("zero", "psg-update"),
    ("round-half", "ste"),
    ("uniform-3-minmax", "ste"),
    ("topk-most", "ste-late"),
    ("topk-five", "hard"),
    ("nm-2-4", "hard"),
    ("kernels", "psg"),
    ("vectors", "ste"),
    ("vectors", "codebook"),
    ("vectors-global", "codebook-sum"),
    ("kernels", "codebook"),
    ("structured-filter", "psg-toward-zero"),
    ("structured-block", "hard"),
    ("sparse-levels-nm", "psg-update"),
    ("sparse-levels-model", "ste"),
    ("topk-model", "hard"),
    ("uniform-2", "hard-free"),
    ("uniform-4", "clip"),
    ("binary-channel-half", "psg"),
    ("binary-unscaled", "ste"),
    ("binary", "ste-clipped"),
    ("binary-unscaled", "mirror"),
    ("ternary-unscaled", "mirror"),
    ("binary-channel-half", "mirror-softmax"),
    ("learned-4", "mirror-inverse"),
    ("binary", "mirror-primal"),
    ("topk-most", "mirror-relax"),
    ("ternary", "gd-tanh"),
    ("power-3-no-zero", "pmf"),
    ("topk-five", "binary-relax"),
    ("learned-5-group", "parq"),
    ("ternary", "admm"),
    ("power-3-no-zero", "hard-free"),
    ("learned-5-group", "psg-update"),
    ("learned-4", "ste-late"),
    ("uniform-2-no-zero", "admm"),
    ("uniform-3-minmax", "admm"),
    ("topk-five", "admm"),
    ("topk-model", "admm-balanced"),
    ("uniform-2", "admm-balanced"),
    ("uniform-4-channel-half", "admm-decoupled"),
    ("topk-most", "masked"),
    ("topk-model", "admm-fisher"),
    ("topk-five", "masked-fisher"),
    ("uniform-4-group", "freeze"),
    ("uniform-4", "penalty"),
    ("topk-model", "proximal"),
]


@dataclass(frozen=True, kw_only=True)
class ErrorCase:
    """Something a user may do wrong, and a piece of the sentence that must tell them."""

    make: Callable[[], Any]
    says: str


def _resolve(*rules: dt.Rule) -> dt.Plan:
    return dt.Recipe(rules).resolve(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))


def _yaml(rule: str) -> dt.Recipe:
    return dt.Recipe.from_yaml(f"rules:\n- {rule}")


_U4 = dt.Uniform(bits=4)

# What grows tenfold with each line: a billion values in a kilobyte.
ALIASES = "a0: &a0 [a]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
MERGES = "a0: &a0 {a: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))

ERRORS: dict[str, ErrorCase] = {
    "bits too few": ErrorCase(make=lambda: dt.Uniform(bits=1), says="Uniform(bits=1)"),
    "bits too many": ErrorCase(make=lambda: dt.Uniform(bits=9), says="Uniform(bits=9)"),
    "no such range": ErrorCase(make=lambda: dt.Uniform(bits=4, range="max"), says='"mse", "alternate" or "interval"'),  # type: ignore[arg-type]
    "no rounds": ErrorCase(
        make=lambda: dt.Uniform(bits=4, rounds=0), says="Uniform(rounds=0): must be a whole number >= 1"
    ),
    "no such scale of a binary": ErrorCase(make=lambda: dt.Binary(scale="max"), says='must be "mean" or None'),  # type: ignore[arg-type]
    "no such param dtype of a binary": ErrorCase(
        make=lambda: dt.Binary(param_dtype="float64"),  # type: ignore[arg-type]
        says="Binary(param_dtype='float64')",
    ),
    "no such granularity of a binary": ErrorCase(
        make=lambda: dt.Binary(granularity="row"),  # type: ignore[arg-type]
        says="Binary.granularity='row'",
    ),
    "no such scale of a ternary": ErrorCase(
        make=lambda: dt.Ternary(scale="mean"),  # type: ignore[arg-type]
        says='must be "exact", "alternate" or None',
    ),
    "no such param dtype of a ternary": ErrorCase(
        make=lambda: dt.Ternary(param_dtype="half"),  # type: ignore[arg-type]
        says="Ternary(param_dtype='half')",
    ),
    "powers of one bit": ErrorCase(make=lambda: dt.PowerOfTwo(bits=1), says="PowerOfTwo(bits=1)"),
    "powers of six bits": ErrorCase(make=lambda: dt.PowerOfTwo(bits=6), says="a whole number from 2 to 5"),
    "no such range of powers": ErrorCase(
        make=lambda: dt.PowerOfTwo(bits=3, range="minmax"),  # type: ignore[arg-type]
        says='must be "max" or "mse"',
    ),
    "one learned level": ErrorCase(make=lambda: dt.LearnedLevels(k=1), says="LearnedLevels(k=1)"),
    "too many learned levels": ErrorCase(make=lambda: dt.LearnedLevels(k=257), says="a whole number from 2 to 256"),
    "no such param dtype of levels": ErrorCase(
        make=lambda: dt.LearnedLevels(k=4, param_dtype="int8"),  # type: ignore[arg-type]
        says="LearnedLevels(param_dtype='int8')",
    ),
    "no such granularity": ErrorCase(
        make=lambda: dt.Uniform(bits=4, granularity="row"),  # type: ignore[arg-type]
        says='must be "tensor", "channel" or Group',
    ),
    "no such param dtype": ErrorCase(
        make=lambda: dt.Uniform(bits=4, param_dtype="int8"),  # type: ignore[arg-type]
        says="Uniform(param_dtype='int8')",
    ),
    "a group of none": ErrorCase(make=lambda: dt.Group(size=0), says="size=0"),
    "keep nothing": ErrorCase(make=lambda: dt.TopK(keep=0.0), says="TopK(keep=0.0): a fraction must lie in (0, 1]"),
    "keep what is no word": ErrorCase(
        make=lambda: dt.TopK(keep="all"),  # type: ignore[arg-type]
        says="TopK(keep='all'): must be a fraction in (0, 1], a count >= 1 or \"nonzero\"",
    ),
    "keep more than all": ErrorCase(make=lambda: dt.TopK(keep=1.5), says="a fraction must lie in (0, 1]"),
    "keep a count of none": ErrorCase(make=lambda: dt.TopK(keep=0), says="a count must be an int >= 1"),
    "keep a bool": ErrorCase(make=lambda: dt.TopK(keep=True), says="a count must be an int >= 1"),
    "keep a word": ErrorCase(make=lambda: dt.TopK(keep="zeros"), says="TopK(keep='zeros'): must be a fraction"),  # type: ignore[arg-type]
    "no codewords": ErrorCase(make=lambda: dt.KernelCodebook(size=0), says="KernelCodebook(size=0)"),
    "only a zero codeword": ErrorCase(make=lambda: dt.KernelCodebook(size=1, zero=True), says="from 2 to 65536"),
    "too many codewords": ErrorCase(make=lambda: dt.KernelCodebook(size=65537), says="from 1 to 65536"),
    "no such book": ErrorCase(
        make=lambda: dt.KernelCodebook(size=4, book="model"),  # type: ignore[arg-type]
        says='KernelCodebook(book=\'model\'): must be "layer" or "global"',
    ),
    "a codebook of one bit": ErrorCase(
        make=lambda: dt.KernelCodebook(size=4, codebook_bits=1), says="must be 2 to 8, or None for floats"
    ),
    "no such way with few": ErrorCase(
        make=lambda: dt.KernelCodebook(size=4, few="keep"),  # type: ignore[arg-type]
        says='must be "reduce" or "refuse"',
    ),
    "no such param dtype of a codebook": ErrorCase(
        make=lambda: dt.KernelCodebook(size=4, param_dtype="int8"),  # type: ignore[arg-type]
        says="KernelCodebook(param_dtype='int8')",
    ),
    "no such float": ErrorCase(make=lambda: dt.Round(dtype="float8"), says="Round(dtype='float8'): must be one of"),  # type: ignore[arg-type]
    "a negative seed": ErrorCase(make=lambda: dt.KernelCodebook(size=4, seed=-1), says="KernelCodebook(seed=-1)"),
    "no restarts": ErrorCase(make=lambda: dt.KernelCodebook(size=4, restarts=0), says="restarts=0"),
    "a warm start of 1": ErrorCase(
        make=lambda: dt.KernelCodebook(size=4, warm_start=1),  # type: ignore[arg-type]
        says="KernelCodebook(warm_start=1): must be True or False",
    ),
    "blocks of none": ErrorCase(make=lambda: dt.VectorCodebook(block=0, size=4), says="VectorCodebook(block=0)"),
    "no such reduction": ErrorCase(
        make=lambda: dt.CodebookLearning(reduce="max"),  # type: ignore[arg-type]
        says='must be "mean" or "sum"',
    ),
    "a codebook that is learned and fitted": ErrorCase(
        make=lambda: dt.Rule(
            match="a", target=dt.KernelCodebook(size=4), mechanism=dt.CodebookLearning(), fit_until=0.5
        ),
        says="fit_until=0.5): CodebookLearning says itself when its target is fitted; leave it out",
    ),
    "a codebook that is learned and fitted every so often": ErrorCase(
        make=lambda: dt.Rule(match="a", target=dt.KernelCodebook(size=4), mechanism=dt.CodebookLearning(), fit_every=9),
        says="fit_every=9): CodebookLearning says itself when its target is fitted; leave it out",
    ),
    "re-assign never": ErrorCase(make=lambda: dt.CodebookLearning(reassign_every=0), says="must be >= 1 step or None"),
    "kernels of a matrix": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="0.weight", target=dt.KernelCodebook(size=4))),
        says="a 2-D weight has no kernels; use VectorCodebook",
    ),
    "blocks with a remainder": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="0.weight", target=dt.VectorCodebook(block=3, size=4))),
        says="does not divide the 4 inputs",
    ),
    "too few units": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="0.weight", target=dt.VectorCodebook(block=2, size=4, few="refuse"))),
        says="VectorCodebook(size=4) needs at least 16 units to choose from, there are 6",
    ),
    "a block of none": ErrorCase(make=lambda: dt.NM(n=1, m=0), says="NM(m=0): a block holds"),
    "a block beyond all": ErrorCase(
        make=lambda: dt.NM(n=1, m=10**400), says="a block holds a whole number of weights, 1 "
    ),
    "more of a block than all": ErrorCase(make=lambda: dt.NM(n=5, m=4), says="NM(n=5, m=4): n must be"),
    "no such order of inputs": ErrorCase(
        make=lambda: dt.NM(n=2, m=4, along="rows"),  # type: ignore[arg-type]
        says='must be "channels" or "columns"',
    ),
    "no such groups": ErrorCase(
        make=lambda: dt.Structured(group="row", keep=0.5),  # type: ignore[arg-type]
        says='must be "filter", "channel", "column" or "block"',
    ),
    "keep no groups": ErrorCase(make=lambda: dt.Structured(group="filter", keep=0), says="Structured(keep=0): a count"),
    "a fraction of groups above 1": ErrorCase(
        make=lambda: dt.Structured(group="filter", keep=1.5), says="Structured(keep=1.5): a fraction must lie in (0, 1]"
    ),
    "no such scope of groups": ErrorCase(
        make=lambda: dt.Structured(group="filter", keep=0.5, scope="layer"),  # type: ignore[arg-type]
        says="Structured(scope='layer')",
    ),
    "tiles without a size": ErrorCase(
        make=lambda: dt.Structured(group="block", keep=0.5), says="tiles need both, others no block"
    ),
    "rows with a size": ErrorCase(
        make=lambda: dt.Structured(group="filter", keep=0.5, block=(2, 2)), says="tiles need both, others no block"
    ),
    "a tile of none": ErrorCase(
        make=lambda: dt.Structured(group="block", keep=0.5, block=(2, 0)), says="must be a pair (rows, columns)"
    ),
    "more rows than there are": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="2.weight", target=dt.Structured(group="filter", keep=3))),
        says="asks for more groups (filter) than the 2 there are",
    ),
    "levels as a pattern": ErrorCase(
        make=lambda: dt.SparseLevels(sparse=_U4, survivors=_U4),  # type: ignore[arg-type]
        says="must be a sparse target such as TopK",
    ),
    "a pattern as levels": ErrorCase(
        make=lambda: dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=dt.TopK(keep=0.5)),
        says="must be a target that takes weights one at a time",
    ),
    "no turns": ErrorCase(
        make=lambda: dt.SparseLevels(sparse=dt.NM(n=2, m=4), survivors=_U4, rounds=0), says="SparseLevels(rounds=0)"
    ),
    "yaml: a word to keep": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: TopK, keep: zeros}}"), says="rules[0].target: TopK.keep"
    ),
    "yaml: a field deep in a pattern": ErrorCase(
        make=lambda: _yaml(
            "{match: a, target: {kind: SparseLevels, sparse: {kind: NM, n: 2, k: 4}, survivors: {kind: Zero}}}"
        ),
        says="rules[0].target.sparse: NM has no field 'k'",
    ),
    "no such scope": ErrorCase(
        make=lambda: dt.TopK(keep=0.1, scope="layer"),  # type: ignore[arg-type]
        says='must be "tensor" or "model"',
    ),
    "strength too large": ErrorCase(
        make=lambda: dt.PSG(gain=8.0, strength=1.5), says="PSG(strength=1.5): must lie in [0, 1]"
    ),
    "gain not positive": ErrorCase(make=lambda: dt.PSG(gain=0.0), says="PSG(gain=0.0): must be a finite number > 0"),
    "gain not finite": ErrorCase(make=lambda: dt.PSG(gain=float("inf")), says="finite number > 0"),
    "eps negative": ErrorCase(
        make=lambda: dt.PSG(gain=8.0, eps=-0.1), says="PSG(eps=-0.1): must be a finite number >= 0"
    ),
    "clip_norm not positive": ErrorCase(
        make=lambda: dt.PSG(gain=8.0, clip_norm=0.0), says="PSG(clip_norm=0.0): must be a number > 0"
    ),
    "no such form": ErrorCase(make=lambda: dt.PSG(gain=8.0, form="grad"), says='"auto", "gradient" or "update"'),  # type: ignore[arg-type]
    "no such units": ErrorCase(make=lambda: dt.PSG(gain=8.0, units="metre"), says='must be "cell" or "weight"'),  # type: ignore[arg-type]
    "project never": ErrorCase(
        make=lambda: dt.HardProjection(every=0), says="HardProjection(every=0): must be a whole number >= 1"
    ),
    "ramp to nowhere": ErrorCase(make=lambda: dt.Linear(first=0.0, last=float("nan")), says="Linear(last=nan)"),
    "exponential from zero": ErrorCase(make=lambda: dt.Exponential(first=0.0, last=1.0), says="both must be > 0"),
    "latent limit not positive": ErrorCase(make=lambda: dt.STE(clip_latent=0.0), says="STE(clip_latent=0.0): must be"),
    "beta of zero": ErrorCase(
        make=lambda: dt.MirrorDescent(beta=0.0), says="MirrorDescent(beta=0.0): must be a number or a"
    ),
    "beta down to below zero": ErrorCase(
        make=lambda: dt.GDTanh(beta=dt.Linear(first=1.0, last=-1.0)), says="must be a number or a schedule, > 0"
    ),
    "no such map": ErrorCase(make=lambda: dt.MirrorDescent(map="sign"), says='"relax" or a MirrorMap'),  # type: ignore[arg-type]
    "no such mirror form": ErrorCase(
        make=lambda: dt.MirrorDescent(form="both"),  # type: ignore[arg-type]
        says='must be "dual" or "primal"',
    ),
    "no such init": ErrorCase(
        make=lambda: dt.MirrorDescent(init="zero"),  # type: ignore[arg-type]
        says='must be "weights" or "inverse"',
    ),
    "no such units of beta": ErrorCase(
        make=lambda: dt.GDTanh(units="metre"),  # type: ignore[arg-type]
        says='must be "cell" or "weight"',
    ),
    "no such Jacobian": ErrorCase(make=lambda: dt.PMF(jacobian="own"), says='must be "true" or "paper"'),  # type: ignore[arg-type]
    "relax the other way round": ErrorCase(
        make=lambda: dt.MirrorDescent(map="relax", form="primal"), says="relax has no inverse"
    ),
    "inverse of an unknown size": ErrorCase(
        make=lambda: dt.MirrorDescent(init="inverse", scale_aware="tensor"), says="not known before the latent"
    ),
    "primal with a latent's options": ErrorCase(
        make=lambda: dt.MirrorDescent(form="primal", hard_start=0.5), says="belong to the dual form"
    ),
    "scale of no such groups": ErrorCase(
        make=lambda: dt.PMF(scale_aware="row"),  # type: ignore[arg-type]
        says='must be "tensor", "channel" or Group',
    ),
    "slope of no slope": ErrorCase(make=lambda: dt.PARQ(inverse_slope=1.5), says="must lie in [0, 1]"),
    "growth that shrinks": ErrorCase(make=lambda: dt.Growth(factor=0.9, every=10), says="Growth(factor=0.9): must be"),
    "growth at no step": ErrorCase(make=lambda: dt.Growth(factor=1.1, every=0), says="Growth(every=0): must be >= 1"),
    "growth past its cap": ErrorCase(
        make=lambda: dt.Growth(factor=1.1, every=10, first=2.0, last=1.0), says="need 0 < first <= last"
    ),
    "sigmoid of no steepness": ErrorCase(
        make=lambda: dt.Sigmoid(first=1.0, last=0.0, steepness=0.0), says="Sigmoid(steepness=0.0): must lie in (0, 500]"
    ),
    "not a regex": ErrorCase(make=lambda: dt.Rule(match="(", keep=True), says="not a regular expression"),
    "include not a regex": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, include="["), says="Rule(include='['): not a regular expression"
    ),
    "no such @": ErrorCase(make=lambda: dt.Rule(match="@middle", keep=True), says='"@first" and "@last"'),
    "neither target nor keep": ErrorCase(make=lambda: dt.Rule(match="a"), says="give either target= or keep=True"),
    "both target and keep": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, keep=True), says="give either target= or keep=True"
    ),
    "mechanism without target": ErrorCase(
        make=lambda: dt.Rule(match="a", keep=True, mechanism=dt.PSG(gain=8.0)), says="a mechanism needs a target"
    ),
    "fit never": ErrorCase(make=lambda: dt.Rule(match="a", target=_U4, fit_every=0), says="Rule(fit_every=0)"),
    "fit until after the end": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, fit_until=1.5), says="must lie in [0, 1]"
    ),
    "a weight decay in words": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, weight_decay="0"),  # type: ignore[arg-type]
        says="Rule(weight_decay='0'): must be a number >= 0, or None",
    ),
    "fit until a word": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, fit_until="0.3"),  # type: ignore[arg-type]
        says="Rule.fit_until='0.3': must be a step number (int) or a fraction of training (float)",
    ),
    "fit always": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, fit_every=True), says="Rule(fit_every=True): must be a whole number"
    ),
    "keep a yes": ErrorCase(
        make=lambda: dt.Rule(match="a", keep="yes"),  # type: ignore[arg-type]
        says="Rule(keep='yes'): must be True or False",
    ),
    "pinned by a number": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, pinned=1),  # type: ignore[arg-type]
        says="Rule(pinned=1): must be True or False",
    ),
    "optional by a word": ErrorCase(
        make=lambda: dt.Rule(match="a", target=_U4, optional="no"),  # type: ignore[arg-type]
        says="Rule(optional='no'): must be True or False",
    ),
    "one rule for a list": ErrorCase(
        make=lambda: dt.Recipe(dt.Rule(match="a", keep=True)),  # type: ignore[arg-type]
        says="Recipe(rules=Rule(match='a'",
    ),
    "a name for rules": ErrorCase(make=lambda: dt.Recipe("psg-w4"), says="Recipe(rules='psg-w4'): must be a list"),  # type: ignore[arg-type]
    "one stage for a list": ErrorCase(
        make=lambda: dt.Recipe(stages=dt.Stage(rules=[dt.Rule(match="a", keep=True)], share=1.0)),  # type: ignore[arg-type]
        says="must be a list",
    ),
    "a preset by number": ErrorCase(make=lambda: dt.Recipe.preset(4), says="Recipe.preset(4): unknown"),  # type: ignore[arg-type]
    "no YAML": ErrorCase(make=lambda: dt.Recipe.from_yaml(None), says="Recipe.from_yaml(None): must be YAML text"),  # type: ignore[arg-type]
    "a key twice in a rule": ErrorCase(
        make=lambda: _yaml("{match: weight, match: bias, keep: true}"),
        says="recipe: line 2: the key 'match' stands twice in one mapping",
    ),
    "a key twice in a target": ErrorCase(
        make=lambda: _yaml("{match: weight, target: {kind: Uniform, bits: 4, bits: 3}}"),
        says="the key 'bits' stands twice in one mapping",
    ),
    "resolve nothing": ErrorCase(
        make=lambda: dt.Recipe([dt.Rule(match="a", keep=True)]).resolve(None),  # type: ignore[arg-type]
        says="Recipe.resolve(model=...): must be a torch.nn.Module, not NoneType",
    ),
    "an embedding that is renormalised": ErrorCase(
        make=lambda: dt.Recipe([dt.Rule(match="weight", target=_U4)]).resolve(nn.Embedding(8, 4, max_norm=0.5)),
        says="'weight' claimed by rule 0 (match='weight'): the forward pass of Embedding(max_norm=0.5) writes",
    ),
    "no rules": ErrorCase(make=lambda: dt.Recipe([]), says="give at least one Rule"),
    "not a rule": ErrorCase(make=lambda: dt.Recipe([_U4]), says="every entry must be a Rule, not Uniform"),  # type: ignore[list-item]
    "rounds in words": ErrorCase(make=lambda: dt.Uniform(bits=4, rounds="x"), says="Uniform(rounds='x')"),  # type: ignore[arg-type]
    "a list of granularities": ErrorCase(
        make=lambda: dt.Uniform(bits=4, granularity=["channel"]),  # type: ignore[arg-type]
        says="granularity=['channel']: must be",
    ),
    "a group of text": ErrorCase(make=lambda: dt.Group(size="3"), says="Group(size='3')"),  # type: ignore[arg-type]
    "half a weight a group": ErrorCase(make=lambda: dt.Group(size=2.5), says="Group(size=2.5)"),  # type: ignore[arg-type]
    "every step and a half": ErrorCase(
        make=lambda: dt.HardProjection(every=1.5),  # type: ignore[arg-type]
        says="HardProjection(every=1.5): must be a whole number",
    ),
    "masks in words": ErrorCase(
        make=lambda: dt.HardProjection(masks="no"),  # type: ignore[arg-type]
        says="HardProjection(masks='no'): must be True or False",
    ),
    "a ramp from a word": ErrorCase(
        make=lambda: dt.Linear(first="a", last=1.0),  # type: ignore[arg-type]
        says="Linear(first='a'): must be a finite number",
    ),
    "a ramp that begins in words": ErrorCase(
        make=lambda: dt.Linear(first=0.0, last=1.0, begin="a"),  # type: ignore[arg-type]
        says="Linear.begin='a'",
    ),
    "a ramp backwards": ErrorCase(
        make=lambda: dt.Cosine(first=0.0, last=1.0, begin=0.8, end=0.2),
        says="Cosine(begin=0.8, end=0.2): must not end before it begins",
    ),
    "a start in words": ErrorCase(
        make=lambda: dt.Rule(match="w", target=dt.Uniform(bits=4), mechanism=dt.STE(start="x")),  # type: ignore[arg-type]
        says="STE.start='x'",
    ),
    "no such preset": ErrorCase(make=lambda: dt.Recipe.preset("psgw4"), says="did you mean 'psg-w4'?"),
    "rule matches nothing": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="0.wieght", target=_U4)), says="the nearest name is '0.weight'"
    ),
    "rule shadowed": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="weight", target=_U4), dt.Rule(match=r"^0\.weight", keep=True)),
        says="rule 1 (match='^0\\\\.weight') only matches parameters that are passed over or claimed by earlier rules",
    ),
    "rule only matches passed-over": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="bias", target=_U4)), says="rule 0 (match='bias') only matches parameters"
    ),
    "count larger than the tensor": ErrorCase(
        make=lambda: _resolve(dt.Rule(match="2.weight", target=dt.TopK(keep=99))),
        says="'2.weight' claimed by rule 0 (match='2.weight'): TopK(keep=99) asks for more weights than the 6",
    ),
    "yaml: not yaml": ErrorCase(make=lambda: dt.Recipe.from_yaml("rules: [\n"), says="recipe: not YAML"),
    "yaml: a list": ErrorCase(make=lambda: dt.Recipe.from_yaml("- a\n- b"), says="the one key 'rules'"),
    "yaml: another key": ErrorCase(make=lambda: dt.Recipe.from_yaml("rules: []\nmore: 1"), says="the one key 'rules'"),
    "yaml: a rule that is a word": ErrorCase(make=lambda: _yaml("weight"), says="rules[0]: must be a mapping, not str"),
    "yaml: unknown rule key": ErrorCase(
        make=lambda: _yaml("{match: a, keeep: true}"), says="rules[0]: Rule has no field 'keeep'; did you mean 'keep'?"
    ),
    "yaml: unknown kind": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Unifrom, bits: 4}}"),
        says="rules[0].target: unknown kind 'Unifrom'; did you mean 'Uniform'?",
    ),
    "yaml: no kind": ErrorCase(
        make=lambda: _yaml("{match: a, target: {bits: 4}}"), says="rules[0].target: no kind is given; known: Binary"
    ),
    "yaml: unknown field": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bit: 4}}"),
        says="rules[0].target: Uniform has no field 'bit'; did you mean 'bits'?",
    ),
    "yaml: field missing": ErrorCase(make=lambda: _yaml("{match: a, target: {kind: Uniform}}"), says="Uniform.bits"),
    "yaml: value of the wrong type": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bits: four}}"), says="rules[0].target: Uniform.bits"
    ),
    "yaml: value out of range": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bits: 40}}"), says="rules[0].target: Uniform(bits=40)"
    ),
    "yaml: a word for a number or a schedule": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bits: 4}, mechanism: {kind: PSG, start: soon}}"),
        says="rules[0].mechanism: PSG.start: cannot be 'soon'",
    ),
    "yaml: word not in the list": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bits: 4, range: max}}"), says="Uniform.range"
    ),
    "yaml: a mechanism as target": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: PSG}}"),
        says="rules[0].target: must be a Target, not PSG",
    ),
    "yaml: aliases ten wide and nine deep": ErrorCase(
        make=lambda: dt.Recipe.from_yaml(ALIASES + "rules: *a9"), says="recipe: holds more than 65536 values"
    ),
    "yaml: merges ten wide and nine deep": ErrorCase(
        make=lambda: dt.Recipe.from_yaml(MERGES + "rules: [*a9]"), says="recipe: holds more than 65536 values"
    ),
    "yaml: a list of itself": ErrorCase(
        make=lambda: dt.Recipe.from_yaml("rules: &a [*a]"), says="recipe: nests deeper than 32"
    ),
    "yaml: a target of itself": ErrorCase(
        make=lambda: _yaml("{match: a, target: &a {kind: SparseLevels, sparse: *a, survivors: *a}}"),
        says="recipe: nests deeper than 32",
    ),
    "yaml: forty deep": ErrorCase(
        make=lambda: dt.Recipe.from_yaml("rules: " + "[" * 40 + "]" * 40), says="recipe: nests deeper than 32"
    ),
    "yaml: five thousand deep": ErrorCase(
        make=lambda: dt.Recipe.from_yaml("rules: " + "[" * 5000), says="recipe: not YAML"
    ),
    "yaml: too long": ErrorCase(
        make=lambda: dt.Recipe.from_yaml("rules: []\n#" + " " * 2**18), says="recipe: longer than 262144 characters"
    ),
    "yaml: a number of many digits": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Uniform, bits: " + "9" * 5000 + "}}"), says="recipe: not YAML"
    ),
    "yaml: a number beyond floats": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: TopK, keep: 0.5}, weight_decay: 1" + "0" * 400 + "}"),
        says="weight_decay",
    ),
    "yaml: a day that is none": ErrorCase(
        make=lambda: _yaml("{match: a, fit_every: 2001-99-99}"), says="recipe: not YAML"
    ),
    "yaml: a list as a key": ErrorCase(make=lambda: _yaml("{? [a] : b}"), says="recipe: not YAML"),
    "a repetition beyond counting": ErrorCase(
        make=lambda: dt.Rule(match="a{1,4294967295}", keep=True), says="not a regular expression"
    ),
    "a thousand brackets": ErrorCase(
        make=lambda: dt.Rule(match="(" * 5000 + ")" * 5000, keep=True), says="not a regular expression"
    ),
    "a name with @ that is none": ErrorCase(
        make=lambda: dt.Rule(match="@frist", keep=True), says="did you mean '@first'"
    ),
    "yaml: a number as text": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: TopK, keep: '0.1'}}"),
        says="rules[0].target: TopK.keep: must not be the text '0.1'; leave out its quotes",
    ),
    "a typo in a later stage": ErrorCase(
        make=lambda: dt.Recipe(
            stages=[
                dt.Stage(rules=[dt.Rule(match=each, target=dt.Zero(), mechanism=dt.STE())], share=0.5)
                for each in ("weight$", "wieght$")
            ]
        ).resolve(nn.Linear(2, 2)),
        says="stages[1].rules[0] (match='wieght$') matches no parameter",
    ),
    "yaml: a target as mechanism": ErrorCase(
        make=lambda: _yaml("{match: a, mechanism: {kind: Zero}}"), says="rules[0].mechanism: must be a Mechanism, not"
    ),
    "a preset's target is not to be changed": ErrorCase(
        make=lambda: dt.Recipe.preset("psg-w3", bits=4), says="has that field, and its targets are as they are: choose"
    ),
    "a preset's mechanism keeps its constants": ErrorCase(
        make=lambda: dt.Recipe.preset("psg-w3", keeps_full_life=True), says="keeps_full_life=...): none of its mech"
    ),
    "yaml: unknown field deep down": ErrorCase(
        make=lambda: _yaml("{match: a, target: {kind: Zero}, mechanism: {kind: PSG, eps: {kind: Linear, frist: 1}}}"),
        says="rules[0].mechanism.eps: Linear has no field 'frist'; did you mean 'first'?",
    ),
}
