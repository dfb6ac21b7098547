"""A file goes into a model whatever wraps it, ties its tensors or names them; what does not is told by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent as dt
from detent import pack
from detent.pack.loading import names_in_model

RECIPE = dt.Recipe([dt.Rule(match=r"weight$", target=dt.Uniform(bits=4))])


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


class Lit(nn.Module):
    """As a LightningModule holds its network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class Distilled(nn.Module):
    """As one that holds something else besides."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.student = net
        self.scale = nn.Parameter(torch.ones(1))


def under_peft(net: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(net, peft.LoraConfig(target_modules=["head"], r=2))


def like_peft(net: Any) -> nn.Module:
    """The names that peft makes: `base_model.model.` before all of them, and `base_layer` in adapted ones."""
    inner = nn.Module()
    for name, child in net.named_children():
        inner.add_module(name, child)
    adapted = nn.Module()
    adapted.base_layer = net.head
    adapted.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
    inner.head = adapted
    return nn.ModuleDict({"base_model": nn.ModuleDict({"model": inner})})


def averaged(net: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(net)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net,
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,  # type: ignore[dict-item]
    "compile in a module": lambda net: Lit(torch.compile(net)),  # type: ignore[arg-type]
    "Lightning": Lit,
    "two deep": lambda net: nn.ModuleDict({"model": Lit(net)}),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inner", WRAPPERS)
def test_common_wrappers_need_no_help(tmp_path: Path, outer: str, inner: str) -> None:
    net, twin = Net(), Net()
    dt.save(dt.compress(WRAPPERS[outer](net), RECIPE), tmp_path / "f")
    found = dt.load(tmp_path / "f", WRAPPERS[inner](twin))
    assert all(torch.equal(a, twin.state_dict()[name]) for name, a in net.state_dict().items())
    assert (found.missing, found.unexpected, found.mismatched) == ((), (), ())
    assert len(found.renamed) in (0, len(net.state_dict()))


def test_a_base_model_goes_under_adapters_and_tells_what_it_did_not_have(tmp_path: Path) -> None:
    net, twin = Net(), Net()
    dt.save(dt.compress(net, RECIPE), tmp_path / "f")
    wrapped = like_peft(twin)
    lora = "base_model.model.head.lora_A.default.weight"
    with pytest.raises(ValueError, match=f"'{lora}' is in the model and not in the file; strict=False"):
        dt.load(tmp_path / "f", wrapped)
    found = dt.load(tmp_path / "f", wrapped, strict=False)
    assert all(torch.equal(a, twin.state_dict()[name]) for name, a in net.state_dict().items())
    assert (found.missing, found.unexpected) == ((lora,), ())
    assert found.renamed["head.weight"] == "base_model.model.head.base_layer.weight"
    # And back: the file of an adapted model holds more than its base.
    dt.save(dt.compress(wrapped, RECIPE), tmp_path / "g")
    with pytest.raises(ValueError, match=f"'{lora}' is in the file and not in the model"):
        dt.load(tmp_path / "g", Net())
    assert dt.load(tmp_path / "g", Net(), strict=False).unexpected == (lora,)


def test_peft_itself_has_those_names(tmp_path: Path) -> None:
    net, twin = Net(), Net()
    dt.save(dt.compress(net, RECIPE), tmp_path / "f")
    found = dt.load(tmp_path / "f", under_peft(twin), strict=False)
    assert torch.equal(twin.head.base_layer.weight, net.head.weight)  # type: ignore[arg-type, union-attr]
    assert all("lora_" in name for name in found.missing) and found.missing


def test_what_is_held_besides_is_missing(tmp_path: Path) -> None:
    net, twin = Net(), Net()
    dt.save(dt.compress(net, RECIPE), tmp_path / "f")
    with pytest.raises(ValueError, match="'scale' is in the model and not in the file"):
        dt.load(tmp_path / "f", Distilled(twin))
    assert dt.load(tmp_path / "f", Distilled(twin), strict=False).missing == ("scale",)
    assert torch.equal(twin.head.weight, net.head.weight)


def test_another_head(tmp_path: Path) -> None:
    net, twin = Net(3), Net(5)
    dt.save(dt.compress(net, RECIPE), tmp_path / "f")
    before = twin.head.weight.clone()
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(5, 4\) in the model and \(3, 4\) in the file"):
        dt.load(tmp_path / "f", twin)
    found = dt.load(tmp_path / "f", twin, strict=False)
    assert found.mismatched == ("head.weight", "head.bias") and (found.missing, found.unexpected) == ((), ())
    assert torch.equal(twin.head.weight, before) and torch.equal(
        twin.body.get_parameter("0.weight"), net.body.get_parameter("0.weight")
    )
    twin.top = twin.head
    del twin.head
    found = dt.load(tmp_path / "f", twin, strict=False)
    assert found.missing == ("top.weight", "top.bias") and found.unexpected == ("head.weight", "head.bias")
    with pytest.raises(ValueError, match="rename={'head.weight': 'top.weight'}"):
        dt.load(tmp_path / "f", twin)


@pytest.mark.parametrize(
    "rename",
    [
        {"body.": "trunk.", "head.": "top."},
        {"body": "trunk", "head.weight": "top.weight", "head.bias": "top.bias"},
        lambda name: name.replace("body", "trunk").replace("head", "top"),
        lambda name: "module." + name.replace("body", "trunk").replace("head", "top"),  # wrappers do not matter
    ],
)
def test_names_are_renamed_as_told(tmp_path: Path, rename: Any) -> None:
    net, twin = Net(), Net()
    twin.trunk, twin.top = twin.body, twin.head
    del twin.body, twin.head
    dt.save(dt.compress(net, RECIPE), tmp_path / "f")
    found = dt.load(tmp_path / "f", twin, rename=rename)
    assert found.renamed["body.2.bias"] == "trunk.2.bias" and len(found.renamed) == 6
    assert torch.equal(twin.trunk[2].weight, net.body[2].weight) and torch.equal(twin.top.bias, net.head.bias)  # type: ignore[index, union-attr, arg-type]


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ({"body.0": "body.2"}, "'body.0.weight' and 'body.2.weight' both become 'body.2.weight'"),
        (lambda name: 3, "gives 3 for 'body.0.weight'"),
        ("body", "must be a mapping of prefixes, or a function"),
        ({"": "x."}, "'body.0.weight', 'body.0.bias', 'body.2.weight' .and 8 more. are in the model and not"),
        (lambda name: None if "head" in name else name, "'head.weight', 'head.bias' are in the model"),
    ],
)
def test_a_wrong_renaming_is_refused(tmp_path: Path, rename: Any, words: str) -> None:
    dt.save(dt.compress(Net(), RECIPE), tmp_path / "f")
    with pytest.raises(ValueError, match=words):
        dt.load(tmp_path / "f", Net(), rename=rename)


def test_nothing_at_all_is_no_load(tmp_path: Path) -> None:
    dt.save(dt.compress(Net(), RECIPE), tmp_path / "f")
    with pytest.raises(ValueError, match="'9.weight', '9.bias' are in the model"):
        dt.load(tmp_path / "f", nn.ModuleDict({"9": nn.Linear(9, 9)}), strict=False)
    with pytest.raises(ValueError, match="nothing would be loaded: 'head.weight' and all others have another shape"):
        dt.load(tmp_path / "f", nn.ModuleDict({"head": nn.Linear(9, 9)}), strict=False)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["encoder.0.w", "decoder.0.w"], ["0.w"]),  # either prefix would do
        (["a.x.w", "b.y.w", "c.z.w"], ["x.w", "y.w", "z.w"]),  # no prefix takes more than one
        (["net.a", "net.b", "net.c", "net.d"], ["a", "q", "r", "s"]),  # one of four is chance
        (["a.w", "net.a.w"], ["a.w"]),  # names that meet as they are stay
    ],
)
def test_what_is_ambiguous_is_left_as_it_is(theirs: list[str], ours: list[str]) -> None:
    assert names_in_model(theirs, ours, None) == {name: name for name in theirs}


class Tied(nn.Module):
    def __init__(self, tie: bool = True, head: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        if head:
            self.lm_head = nn.Linear(4, 6, bias=False)
        if tie and head:
            self.lm_head.weight = self.embed.weight


def stored(path: Path, net: nn.Module, names: set[str]) -> None:
    """A file with these of a model's tensors, none of them tied, as of a state dict that its library wrote."""
    with pack.Writer(path) as writer:
        for name, value in net.state_dict().items():
            if name in names:
                writer.add(name, value, reason="as it is")


@pytest.mark.parametrize("kept", [{"embed.weight"}, {"lm_head.weight"}, {"embed.weight", "lm_head.weight"}])
def test_a_tied_tensor_may_stand_under_any_of_its_names(tmp_path: Path, kept: set[str]) -> None:
    net, twin = Tied(), Tied()
    stored(tmp_path / "f", net, kept | {"inner.weight", "inner.bias"})
    found = dt.load(tmp_path / "f", twin)
    assert twin.lm_head.weight is twin.embed.weight and torch.equal(twin.embed.weight, net.embed.weight)
    assert (found.missing, found.unexpected) == ((), ())


def test_tied_in_the_model_and_two_in_the_file(tmp_path: Path) -> None:
    net, twin = Tied(tie=False), Tied()
    stored(tmp_path / "f", net, set(net.state_dict()))
    with pytest.raises(ValueError, match="'embed.weight' is one tied tensor in the model and two in the file"):
        dt.load(tmp_path / "f", twin)
    with torch.no_grad():
        net.lm_head.weight.copy_(net.embed.weight)  # two that are equal are as good as one
    stored(tmp_path / "f", net, set(net.state_dict()))
    dt.load(tmp_path / "f", twin)
    assert torch.equal(twin.embed.weight, net.embed.weight)


def test_a_further_name_that_the_model_lacks_loses_nothing(tmp_path: Path) -> None:
    net, base = Tied(), Tied(head=False)
    dt.save(dt.compress(net, RECIPE), tmp_path / "f")
    assert dt.load(tmp_path / "f", base).unexpected == ()
    assert torch.equal(base.embed.weight, net.embed.weight)


def test_an_untied_model_misses_what_its_file_lacks_until_told(tmp_path: Path) -> None:
    net, twin = Tied(), Tied(tie=False)
    stored(tmp_path / "f", net, {"embed.weight", "inner.weight", "inner.bias"})
    with pytest.raises(ValueError, match="'lm_head.weight' is in the model and not in the file"):
        dt.load(tmp_path / "f", twin)


def test_fused_experts_are_explained(tmp_path: Path) -> None:
    """transformers writes one tensor an expert and holds one of all; a file of the former is sent to its loader."""
    theirs, ours = nn.Module(), nn.Module()
    theirs.experts = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)])
    ours.experts = nn.Module()
    ours.experts.fused = nn.Parameter(torch.zeros(2, 3, 3))
    dt.save(dt.compress(theirs, RECIPE), tmp_path / "f")
    with pytest.raises(ValueError, match=r"'experts.fused' is in the model .*unpack this file .*from_pretrained"):
        dt.load(tmp_path / "f", ours)
