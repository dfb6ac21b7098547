"""Quantization-aware training by others, as arms of `benchmarks.step_cost`: torchao (QAT, PARQ), brevitas, quanto.

They are no dependency of ours. `python -m benchmarks.step_cost --peers` wants an environment with torch, Detent's own
dependencies, `torchao`, `brevitas` and `optimum-quanto`; what is missing there ends in an error.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import itertools
import warnings
from typing import Any

import torch
from torch import nn

from benchmarks.step_cost import ARMS, Changed, groups_of, llama_arm, take_turns

OURS = (
    "PSG, gradient form",
    "STE, 4 bits",
    "STE, 4 bits a channel",
    "STE, 4 bits, groups of 32",
    "STE, binary",
    "STE, ternary",
    "PARQ, 2 bits",
    "PARQ, 4 bits",
    "PARQ, 4 bits a channel",
    "BinaryRelax, 4 bits",
)


def package(name: str) -> Any:
    """A package that is none of our dependencies, so that no type is known of it."""
    return importlib.import_module(name)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices that our own arms claim."""
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.startswith("b")
    }


def adamw(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The plain optimizer on whatever the model has become."""
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)


def torchao_qat(granularity: object, activations: bool = False) -> Changed:
    """Fake quantization of weights to 4 bits, of inputs to 8 where asked for."""

    def change(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        quantization, qat = package("torchao.quantization"), package("torchao.quantization.qat")
        four_bits = getattr(torch, "int4")  # noqa: B009 - torch has it without saying so
        weights = qat.IntxFakeQuantizeConfig(four_bits, granularity, is_symmetric=True)
        inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if activations else None
        mine = linears(model)
        config = qat.QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
        quantization.quantize_(model, config, filter_fn=lambda layer, name: name in mine)
        return adamw(model)

    return change


def torchao_parq(prox: str, quantizer: str, bits: int, channel: bool = False) -> Changed:
    """PARQ's own optimizer, annealing in the middle of its schedule."""

    def change(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        parq = package("torchao.prototype.parq")
        mine = [layer.weight for layer in linears(model).values()]
        known = {id(p) for p in mine}
        rest = [p for p in model.parameters() if id(p) not in known]
        groups = [{"params": mine, "quant_bits": bits}, {"params": rest}]
        base = torch.optim.AdamW(groups, lr=1e-4, foreach=True)
        maps = {
            "hard": parq.ProxHardQuant,
            "parq": lambda: parq.ProxPARQ(anneal_start=0, anneal_end=100_000),
            "relax": lambda: parq.ProxBinaryRelax(anneal_start=0, anneal_end=100_000),
        }
        made = getattr(parq, quantizer)()
        optimizer = parq.QuantOptimizer(base, made, maps[prox](), quant_per_channel=channel)
        return model, optimizer

    return change


def brevitas_weights(quantizer: str, bits: int, **options: Any) -> Changed:
    """Linear layers of brevitas in place of torch's."""

    def change(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        qnn, quant = package("brevitas.nn"), package("brevitas.quant")
        for name, layer in linears(model).items():
            parent, _, leaf = name.rpartition(".")
            new = qnn.QuantLinear(
                layer.in_features,
                layer.out_features,
                bias=False,
                weight_quant=getattr(quant, quantizer),
                weight_bit_width=bits,
                **{f"weight_{key}": value for key, value in options.items()},
            )
            new.weight.data.copy_(layer.weight.data)
            setattr(model.get_submodule(parent), leaf, new)
        return adamw(model)

    return change


def quanto_weights(kind: str) -> Changed:
    """Weights quantized on the fly by quanto."""

    def change(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        quanto = package("optimum.quanto")
        quanto.quantize(model, weights=getattr(quanto, kind), include=list(linears(model)))
        return adamw(model)

    return change


def peers() -> dict[str, Changed]:
    """Every rival by name; granularities are torchao's own objects."""
    of = package("torchao.quantization.granularity")
    group, channel = of.PerGroup(32), of.PerAxis(0)
    return {
        "torchao QAT, 4 bits, groups of 32": torchao_qat(group),
        "torchao QAT, 4 bits a channel": torchao_qat(channel),
        "torchao QAT, 4 bits, groups of 32, inputs 8 bits": torchao_qat(group, activations=True),
        "torchao PARQ: hard, 4 bits": torchao_parq("hard", "MaxUnifQuantizer", 4),
        "torchao PARQ: PARQ, 2 bits": torchao_parq("parq", "UnifQuantizer", 2),
        "torchao PARQ: PARQ, 4 bits": torchao_parq("parq", "MaxUnifQuantizer", 4),
        "torchao PARQ: PARQ, 4 bits a channel": torchao_parq("parq", "MaxUnifQuantizer", 4, channel=True),
        "torchao PARQ: PARQ, 2 bits, least squares": torchao_parq("parq", "LSBQuantizer", 2),
        "torchao PARQ: BinaryRelax, 4 bits": torchao_parq("relax", "MaxUnifQuantizer", 4),
        "brevitas, 4 bits": brevitas_weights("Int8WeightPerTensorFloat", 4),
        "brevitas, 4 bits a channel": brevitas_weights("Int8WeightPerChannelFloat", 4),
        "brevitas, 4 bits a channel, MSE": brevitas_weights("Int8WeightPerChannelFloatMSE", 4),
        "brevitas, binary": brevitas_weights("SignedBinaryWeightPerTensorConst", 1, scaling_init=0.1),
        "quanto, 4 bits": quanto_weights("qint4"),
        "quanto, 8 bits": quanto_weights("qint8"),
    }


def rows(blocks: int, seed: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Whole training steps of peers and of ours in turns, and the versions of the peers."""
    changes = peers()
    found: dict[str, Any] = {}
    # Ours and theirs alternate, so that most groups hold both.
    both = itertools.zip_longest(changes, OURS)
    names = [name for pair in both for name in pair if name is not None]
    for some in groups_of(names):
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peers
            arms = [llama_arm("plain", seed)]
            arms += [llama_arm(name, seed, None if name in ARMS else changes[name]) for name in some]
            here = take_turns(arms, blocks, 1, warmup=2)
        found |= {name: here[name] for name in some}
        for name in some:
            print(f"  {name}: x {here[name]['ratio']['median']:.3f}", flush=True)
    packages = ("torchao", "brevitas", "optimum-quanto")
    return found, {package: importlib.metadata.version(package) for package in packages}
