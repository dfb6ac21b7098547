"""What exports trace: wrappers come off and go back on, example inputs are bound by the signature of `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from detent.export.calling import bind, unwrap, unwrapped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor, *others: Tensor, flag: bool = True, **rest: Any) -> Tensor:
        x = self.inner(x) if flag else x
        return sum([*others, *rest.values()], x)


def compiled(model: nn.Module) -> nn.Module:
    found = torch.compile(model, backend="eager")
    assert isinstance(found, nn.Module)
    return found


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "two": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_come_off_and_go_back_on(name: str) -> None:
    wrap = WRAPPERS[name]
    outer = wrap(nn.Sequential(wrap(nn.Linear(2, 2)), nn.ReLU()))
    inside = unwrap(outer)
    assert type(inside) is nn.Sequential
    before = inside[0]
    inside.compile(backend="eager")
    with unwrapped(outer) as plain:
        assert plain is inside and type(inside[0]) is nn.Linear and plain._compiled_call_impl is None
    assert inside[0] is before and inside._compiled_call_impl is not None


def test_a_model_without_wrappers_is_itself() -> None:
    net = nn.Linear(2, 2)
    assert unwrap(net) is net


def test_hooks_of_a_wrapper_are_not_lost_in_silence() -> None:
    outer = nn.DataParallel(nn.Linear(2, 2))
    outer.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match="DataParallel around the model has forward hooks"):
        unwrap(outer)


def test_inputs_are_bound_by_name() -> None:
    a, b, c, d = (torch.full((1, 3), float(i)) for i in range(4))
    call = bind(Net(), (a, b, c))
    assert list(call.arguments) == ["x", "others"] and call.arguments["others"] == (b, c)
    assert call.constants == {"flag": True} and call.tensors == (a, b, c)
    assert call.names == ("x", "others[0]", "others[1]")
    call = bind(Net(), {"x": a, "flag": False, "more": d})
    assert call.arguments == {"x": a, "flag": False, "rest": {"more": d}}
    assert call.constants == {"flag": False} and torch.equal(call(Net()), a + d)
    assert call.names == ("x", "more")
    assert bind(Net(), {"more": d, "x": a}).names == ("x", "more")  # in the order of the signature
    doubled = call.mapped(lambda x: 2 * x)
    assert torch.equal(doubled.arguments["x"], 2 * a) and torch.equal(doubled(Net()), 2 * (a + d))


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), "give tensors, not nothing"),
        ("x", "give tensors, not str"),
        (3, "give tensors, not int"),
        ({"x": object()}, "give tensors, not object"),
        ({"flag": True}, "give tensors, not bool"),
        (
            {"others": torch.ones(1), "flag": True},
            r"Net.forward\(.* cannot be called so: missing a required argument: 'x'",
        ),
    ],
)
def test_what_cannot_be_bound_is_told(inputs: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bind(Net(), inputs)


def test_a_class_without_forward_is_told() -> None:
    class Shell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"Shell has no forward of its own.*parts: net"):
        bind(Shell(), torch.ones(1, 2))


def test_a_lightning_module_without_forward_is_told() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Shell(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"Shell has no forward of its own.*parts: net"):
        bind(Shell(), torch.ones(1, 2))
