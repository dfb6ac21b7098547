"""What a file cannot hold is refused before training, by name, with a way out; and that is tried on every way in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stranger
import torch
from torch import Tensor, nn

import detent as dt
from detent import pack
from detent.contents import contents_of

RECIPE = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4), mechanism=dt.PSG(gain=8.0))])


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))


class ExtraState(Net):
    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class OwnTensor(Net):
    """Writes a tensor into its state dict that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(3.0)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "table"] = self.table


class Renamed(Net):
    """Writes what it has anyway under an older name too."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "old.weight"] = self[0].get_parameter("weight").detach()


class Parts(Net):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "parts"] = (torch.ones(2), None)


def hooked() -> nn.Module:
    net = Net()
    net.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "seen": torch.ones(1)}))
    return net


def packed() -> nn.Module:
    """torch's own dynamic quantization: its weights are packed objects."""
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4)).eval()
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})


def buffered(value: Tensor) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Net()
        net.register_buffer("odd", value)
        return net

    return build


def nested() -> nn.Module:
    with warnings.catch_warnings():  # torch's own of a prototype
        warnings.simplefilter("ignore")
        return buffered(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))()


# What is lost, its name in state_dict(), and a word of the way out.
LOST: list[tuple[str, Callable[[], nn.Module], str, str]] = [
    ("extra state", ExtraState, "_extra_state", "register_buffer"),
    ("own tensor", OwnTensor, "table", "register_buffer"),
    ("own tuple", Parts, "parts", "register_buffer"),
    ("hook", hooked, "seen", "register_buffer"),
    ("complex128", buffered(torch.ones(2, dtype=torch.complex128)), "odd", "persistent=False"),
    ("e8m0", buffered(torch.ones(2).to(torch.float8_e4m3fnuz)), "odd", "persistent=False"),
    ("sparse", buffered(torch.eye(2).to_sparse()), "odd", "persistent=False"),
    ("nested", nested, "odd", "persistent=False"),
    ("expanded", buffered(torch.randn(1, 4).expand(3, 4)), "odd", r"\.contiguous\(\)"),
]


@pytest.mark.parametrize(("build", "name", "way"), [case[1:] for case in LOST], ids=[case[0] for case in LOST])
def test_what_a_file_cannot_hold_is_refused_before_training(
    tmp_path: Path, build: Callable[[], nn.Module], name: str, way: str
) -> None:
    net = build()
    assert name in net.state_dict()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = [p.clone() for p in net.parameters()]
    for who, act in (
        ("attach", lambda **more: dt.attach(net, optimizer, RECIPE, 3, **more)),
        ("compress", lambda **more: dt.compress(net, RECIPE, **more)),
    ):
        with pytest.raises(ValueError, match=rf"^{who}: '{name}' .*, which a file cannot hold: .*{way}") as caught:
            act()
        # The sentence names an argument; given as it stands there, all goes well.
        argument = str(caught.value).split("leave_out='")[1].split("'")[0]
        run = act(leave_out=argument)
        path = tmp_path / f"{who}.detent"
        dt.save(run, path)
        run.detach()
        assert name not in pack.read_header(path).tensors
        with pytest.raises(ValueError, match=f"'{name}' is in the model and not in the file"):
            dt.load(path, net)
        assert dt.load(path, net, strict=False).missing == (name,)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not optimizer._optimizer_step_pre_hooks


def test_an_expanded_buffer_that_repeats_nothing_is_saved_and_loaded(tmp_path: Path) -> None:
    """The position_ids of transformers' models; and, with the way out taken, a buffer that did repeat its memory."""
    for value in (torch.arange(5).expand(1, -1), torch.randn(1, 4).expand(3, 4).contiguous()):
        net = buffered(value)()
        dt.save(dt.compress(net, RECIPE), tmp_path / "f.detent")
        twin = buffered(torch.zeros_like(value))()
        dt.load(tmp_path / "f.detent", twin)
        assert torch.equal(twin.get_buffer("odd"), value)


def test_packed_weights_of_torch_s_own_quantization_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own function deprecated
        net = packed()
    with pytest.raises(ValueError, match=r"^compress: '1\..*' is .*, which a file cannot hold"):
        dt.compress(net, RECIPE)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.complex64], ids=lambda d: str(d).split(".")[1]
)
@pytest.mark.parametrize("coding", ["entropy", "bitpacked", "none"])
@pytest.mark.parametrize("form", ["f.detent", "f.safetensors"])
def test_unsigned_and_complex_buffers_come_back_to_the_bit(tmp_path: Path, dtype: Any, coding: Any, form: str) -> None:
    bits = torch.randint(0, 256, (5, 3, dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = buffered(bits.view(dtype).squeeze(-1))()
    dt.save(dt.compress(net, RECIPE), tmp_path / form, coding=coding)
    lives: Any = ("full", "compressed")
    for life in lives:
        twin: Any = buffered(torch.zeros(5, 3, dtype=dtype))()
        dt.load(tmp_path / form, twin, life)
        assert torch.equal(twin.odd.view(torch.uint8), net.get_buffer("odd").view(torch.uint8))
    dt.unpack(tmp_path / form, tmp_path / "plain.safetensors")
    import safetensors.torch

    plain = safetensors.torch.load_file(tmp_path / "plain.safetensors")["odd"]
    assert plain.dtype == dtype and torch.equal(plain.view(torch.uint8), bits.reshape(5, -1))
    if form == "f.detent" and coding != "entropy":
        (values,) = stranger.blobs((tmp_path / form).read_bytes())["odd", True]
        expected = [int.from_bytes(bytes(row), "little") for row in bits.reshape(15, -1).tolist()]
        assert values == expected


def test_a_conjugate_is_stored_as_its_numbers(tmp_path: Path) -> None:
    net: Any = buffered(torch.tensor([1 + 2j, 3 - 4j]).conj())()
    dt.save(dt.compress(net, RECIPE), tmp_path / "f")
    twin: Any = buffered(torch.zeros(2, dtype=torch.complex64))()
    dt.load(tmp_path / "f", twin)
    assert twin.odd.tolist() == [1 - 2j, 3 + 4j]


def test_what_the_state_dict_has_twice_is_not_lost() -> None:
    assert contents_of(Renamed()).lost == {}


def test_asking_the_state_dict_copies_nothing() -> None:
    net = Net()
    found = contents_of(net)
    assert [tensor.data_ptr() for tensor in found.tensors.values()] == [p.data_ptr() for p in net.parameters()]
    with torch.device("meta"):
        assert list(contents_of(Net()).tensors) == list(found.tensors)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nowhere", "finds nothing in the state dict"),
        (r"0\.weight", "finds '0.weight', which a rule of the recipe claims"),
        ("(", "not a regular expression"),
    ],
)
def test_a_pattern_that_leaves_out_what_it_should_not_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dt.compress(Net(), RECIPE, leave_out=["bias", pattern])


def test_a_buffer_may_be_left_out(tmp_path: Path) -> None:
    net = buffered(torch.zeros(1000))()
    run = dt.compress(net, RECIPE, leave_out="^odd$")
    assert dt.save(run, tmp_path / "f") < 1000
    assert dt.load(tmp_path / "f", net, strict=False).missing == ("odd",)


def test_offloaded_weights_are_named_with_what_to_do(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = Net()
    dt.save(dt.compress(net, RECIPE), tmp_path / "f")
    run = dt.compress(net, RECIPE)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    accelerate.cpu_offload(net, execution_device="cpu")
    words = r"'0.weight' lies on the meta device and has no data: .*remove_hook_from_submodules\(model\)"
    for who, act in (
        ("save", lambda: dt.save(run, tmp_path / "g")),
        ("load", lambda: dt.load(tmp_path / "f", net)),
    ):
        with pytest.raises(ValueError, match=f"^{who}: {words}"):
            act()
    accelerate.hooks.remove_hook_from_submodules(net)
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    dt.load(tmp_path / "f", net)
