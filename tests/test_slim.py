"""Dead units: what is folded and removed, what has to stay, and that the outputs are the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from elsewhere import Elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import detent as dt
from detent.demo import LeNet5
from detent.export.slim import Folded, LayerSize, Slimmed, fold_dead_units, slim


def close(found: Folded, model: nn.Module, twin: nn.Module, *x: Tensor) -> None:
    """The twin gives what the model gives, on inputs that `found` has not seen."""
    with torch.no_grad():
        a, b = model.eval()(*x), twin.eval()(*x)
    assert found.difference <= found.bound
    assert float((a - b).abs().max()) <= 1e-5 * max(float(a.abs().max()), 1.0)


def shapes(found: Folded) -> dict[str, tuple[int, int]]:
    return {row.name: row.after for row in found.layers}


def zero(tensor: Any, *where: Any, value: float = 0.0) -> None:
    with torch.no_grad():
        tensor[where] = value


def alive(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> nn.Module:
    """BatchNorm with statistics and weights that are not those of a fresh one."""
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
    return norm


# --- by hand ------------------------------------------------------------------------------------------------------


def test_a_unit_nothing_uses_goes_with_all_that_feeds_only_it() -> None:
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    zero(model[4].weight, slice(None), 1)  # unit 1 of the second layer is unused ...
    zero(model[2].weight, 0, 2)  # ... and then nothing is left that uses unit 2 of the first
    zero(model[2].weight, 2, 2)
    found = slim(model, torch.randn(3, 5))
    assert shapes(found) == {"0": (5, 3), "2": (3, 2), "4": (2, 2)}
    close(found, model, found.model, torch.randn(16, 5))
    assert found.left == ()


def test_the_constant_of_a_unit_without_inputs_goes_through_batchnorm_activation_and_pooling() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(2, 4, 3), alive(nn.BatchNorm2d(4)), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2)
    )
    zero(model[0].weight, 1)
    k = (model[0].bias[1] - model[1].running_mean[1]) / torch.sqrt(model[1].running_var[1] + model[1].eps)
    k = torch.relu(k * model[1].weight[1] + model[1].bias[1])
    bias = model[5].bias + k * model[5].weight[:, 1].sum((1, 2))
    found = slim(model, torch.randn(1, 2, 14, 14))
    assert shapes(found) == {"0": (2, 3), "5": (3, 3)}
    assert found.model[1].num_features == 3  # type: ignore[index]
    torch.testing.assert_close(found.model[5].bias, bias)  # type: ignore[index]
    close(found, model, found.model, torch.randn(4, 2, 14, 14))


def test_flattened_channels_go_with_all_their_features() -> None:
    model = LeNet5()
    zero(model.conv2.weight, slice(3, 7))
    zero(model.fc1.weight, slice(None), slice(10 * 16, 12 * 16))
    zero(model.fc2.weight, slice(None), slice(100, 150))
    found = slim(model, torch.randn(2, 1, 28, 28))
    assert shapes(found) == {"conv1": (1, 20), "conv2": (20, 44), "fc1": (704, 450), "fc2": (450, 10)}
    close(found, model, found.model, torch.randn(8, 1, 28, 28))
    saved = 4 * 501 + 2 * 501  # rows of conv2 with their biases
    saved += 500 * 6 * 16 + 50 * (704 + 1) + 10 * 50  # columns of fc1, rows of fc1, columns of fc2
    assert found.parameters == (431_080, 431_080 - saved)


def test_a_channel_of_which_one_feature_is_used_stays() -> None:
    model: Any = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    zero(model[2].weight, slice(None), slice(0, 3))
    found = slim(model, torch.randn(1, 1, 6))
    assert shapes(found) == {"0": (1, 2), "2": (8, 2)}
    zero(model[2].weight, slice(None), 3)
    assert shapes(slim(model, torch.randn(1, 1, 6))) == {"0": (1, 1), "2": (4, 2)}


def test_zero_padding_keeps_a_constant_that_is_not_zero_and_says_so() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1))
    zero(model[0].weight, slice(0, 2))
    zero(model[0].bias, 0, value=0.7)
    zero(model[0].bias, 1, value=-0.7)  # ReLU makes it 0, which padding cannot tell apart
    found = slim(model, torch.randn(1, 1, 8, 8))
    assert shapes(found) == {"0": (1, 2), "2": (2, 2)}
    assert found.left == ("0: 1 unit (0) stays: 2 pads with zeros, so at the borders it is no constant",)
    close(found, model, found.model, torch.randn(4, 1, 8, 8))
    for mode in ("replicate", "reflect", "circular"):
        model[2].padding_mode = mode
        found = slim(model, torch.randn(1, 1, 8, 8))
        assert shapes(found) == {"0": (1, 1), "2": (1, 2)}
        close(found, model, found.model, torch.randn(4, 1, 8, 8))


def test_average_pooling_over_padding_makes_no_constant() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(3, padding=1), nn.Flatten(), nn.Linear(18, 2))
    zero(model[0].weight, 0)
    x = torch.randn(2, 1, 7, 7)
    found = slim(model, x)
    assert shapes(found)["0"] == (1, 2)
    close(found, model, found.model, x)
    model[1].count_include_pad = False
    found = slim(model, x)
    assert shapes(found)["0"] == (1, 1)
    close(found, model, found.model, x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.a(x) + self.b(x)))


def test_channels_that_are_added_go_only_together() -> None:
    model = Residual()
    zero(model.a.weight, slice(0, 2))
    zero(model.a.bias, slice(0, 2))
    zero(model.b.weight, 1)
    zero(model.b.bias, 1, value=0.5)
    found = slim(model, torch.randn(1, 1, 5, 5))
    assert shapes(found) == {"stem": (1, 4), "a": (4, 3), "b": (4, 3), "head": (3, 2)}
    close(found, model, found.model, torch.randn(4, 1, 5, 5))


def test_a_constant_added_to_a_channel_that_lives_stays_and_says_so() -> None:
    model = Residual()
    zero(model.a.weight, 0)
    zero(model.a.bias, 0, value=0.5)
    found = slim(model, torch.randn(1, 1, 5, 5))
    assert shapes(found)["a"] == (4, 4)
    assert len(found.left) == 1
    assert found.left[0].startswith("a: 1 unit (0) stays: it is added to a channel that lives")
    close(found, model, found.model, torch.randn(4, 1, 5, 5))


def test_an_unused_sum_frees_both_branches() -> None:
    model = Residual()
    zero(model.head.weight, slice(None), 2)
    found = slim(model, torch.randn(1, 1, 5, 5))
    assert shapes(found) == {"stem": (1, 4), "a": (4, 3), "b": (4, 3), "head": (3, 2)}
    close(found, model, found.model, torch.randn(4, 1, 5, 5))


def test_depthwise_convolutions_follow_and_groups_go_as_a_whole() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6), alive(nn.BatchNorm2d(12)), nn.Conv2d(12, 8, 1),
        nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    zero(model[0].weight, 0)  # constant inputs of the depthwise channels 0 and 1
    zero(model[4].weight, slice(None), slice(2, 4))  # nothing uses 2 and 3, so nothing uses channel 1 of the first
    zero(model[4].weight, slice(None), 4)  # of the pair 4 and 5 one is used: it stays
    zero(model[6].weight, slice(None), slice(0, 3))  # three of the four channels of a group
    found = slim(model, torch.randn(1, 1, 6, 6))
    assert shapes(found) == {"0": (1, 4), "2": (4, 8), "4": (8, 8), "5": (8, 8), "6": (8, 3)}
    assert found.model[2].groups == 4  # type: ignore[index]
    close(found, model, found.model, torch.randn(4, 1, 6, 6))
    assert any(sentence.startswith("5: 3 units (0, 1, 2) stay") for sentence in found.left)
    zero(model[6].weight, slice(None), 3)
    found = slim(model, torch.randn(1, 1, 6, 6))
    assert shapes(found) == {"0": (1, 4), "2": (4, 8), "4": (8, 4), "5": (4, 4), "6": (4, 3)}
    close(found, model, found.model, torch.randn(4, 1, 6, 6))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 2, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), self.b(x)], dim=1).mean((2, 3))
        return self.head(x.view(x.size(0), -1))


def test_concatenation_mean_and_view() -> None:
    model = Concatenated()
    zero(model.a.weight, 1)
    zero(model.head.weight, slice(None), 4)
    found = slim(model, torch.randn(2, 1, 4, 4))
    assert shapes(found) == {"a": (1, 2), "b": (1, 1), "head": (3, 2)}
    close(found, model, found.model, torch.randn(4, 1, 4, 4))


def test_a_batchnorm_weight_of_zero_makes_a_constant() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), alive(nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 2, 1))
    zero(model[1].weight, 2)
    zero(model[1].bias, 2, value=0.3)
    found = slim(model, torch.randn(1, 1, 6, 6))
    assert shapes(found) == {"0": (1, 3), "3": (3, 2)}
    close(found, model, found.model, torch.randn(4, 1, 6, 6))


def test_a_constant_goes_into_the_next_batchnorm_where_there_is_no_bias() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False), alive(nn.BatchNorm2d(3)), nn.Conv2d(3, 2, 1)
    )
    zero(model[0].weight, 1)
    zero(model[0].bias, 1, value=0.8)
    before = copy.deepcopy(model)
    found = fold_dead_units(model, torch.randn(1, 1, 6, 6))
    assert model[2].bias is None
    assert not model[2].weight[:, 1].any() and not model[0].bias[1]
    close(found, before, model, torch.randn(4, 1, 6, 6))


def test_without_any_bias_folding_leaves_it_and_removing_makes_one() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 3, bias=False), nn.ReLU())
    zero(model[0].weight, 1)
    removed = slim(model, torch.randn(1, 1, 6, 6))
    assert shapes(removed) == {"0": (1, 2), "1": (2, 2)}
    assert removed.model[1].bias is not None  # type: ignore[index]
    close(removed, model, removed.model, torch.randn(4, 1, 6, 6))
    kept = copy.deepcopy(model)
    found = fold_dead_units(model, torch.randn(1, 1, 6, 6))
    assert found.left == ("0: 1 unit (1) stays: 1 has no bias that could take it",)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True))


def test_what_is_not_understood_keeps_its_channels_and_is_named() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Softmax(dim=1), nn.Linear(5, 2))
    zero(model[0].weight, 0)
    zero(model[4].weight, slice(None), 3)
    found = slim(model, torch.randn(2, 3))
    assert shapes(found) == {"0": (3, 4), "2": (4, 5), "4": (5, 2)}
    assert "0: 1 unit (0) stays: '1' (LayerNorm) normalises over all of them" in found.left
    assert "4: 1 input (3) stays unread: it comes from '3' (Softmax), which is not understood" in found.left
    close(found, model, found.model, torch.randn(4, 3))


@pytest.mark.parametrize("act", [nn.Identity(), nn.ReLU()])
def test_batchnorm_of_the_batch_is_not_understood(act: nn.Module) -> None:
    """Without running statistics what a channel gives depends on the others of the batch, even a constant one."""
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 6), act, norm, nn.Linear(6, 2)).eval()
    zero(model[0].weight, 2)
    zero(model[0].bias, 2, value=1.0)
    zero(norm.weight, 4)
    twin, x = copy.deepcopy(model), torch.randn(5, 4)
    found = slim(model, x)
    close(found, found.model, twin, x)
    assert shapes(found) == {"0": (4, 6), "3": (6, 2)}
    assert any(
        why.startswith("0: 1 unit (2)") and "'2' (BatchNorm1d), which is not understood" in why for why in found.left
    )
    assert fold_dead_units(model, x).weights[0] == fold_dead_units(model, x).weights[1]


def test_a_model_on_an_accelerator() -> None:
    """Every mask and constant lies beside the weights that it meets."""

    def make() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(2)
        model = Block()
        zero(model.first.weight, 1)
        zero(model.norm.bias, 1, value=-1.0)  # behind a Relu it is 0, and so is the product
        zero(model.second.weight, 2)
        zero(model.second.bias, 2, value=0.5)
        zero(model.fc.weight, slice(None), slice(3 * 16, None))  # nothing uses the last channel
        return model.eval(), torch.randn(4, 1, 8, 8)

    model, x = make()
    expected, folded = slim(model, x), fold_dead_units(model, x)
    assert expected.parameters[1] < expected.parameters[0] and folded.weights[1] < folded.weights[0]
    model, x = make()
    with Elsewhere(model) as elsewhere:
        elsewhere.mark(x)
        found, again = slim(model, x), fold_dead_units(model, x)
        assert all(elsewhere.is_there(p) for p in (*found.model.parameters(), *model.parameters()) if p.numel())
    assert (found.layers, found.left) == (expected.layers, expected.left)
    assert (again.layers, again.left) == (folded.layers, folded.left)


class Block(nn.Module):
    """A product, a sum, a concatenation and a flattening, so that every kind of node sees a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(1, 4, 3)
        self.norm, self.third = nn.BatchNorm2d(4), nn.Conv2d(8, 4, 3)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.norm(self.first(x))), torch.relu(self.second(x))
        return self.fc(torch.flatten(self.third(torch.cat([a * b, a + b], 1)), 1))


def test_a_layer_keeps_one_channel() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    zero(model[2].weight, slice(None))
    found = slim(model, torch.randn(2, 3))
    assert shapes(found) == {"0": (3, 1), "2": (1, 2)}
    assert "0: 1 unit (0) stays: a layer keeps one channel at least" in found.left
    assert "2: 1 input (0) stays unread: a layer keeps one channel at least" in found.left
    close(found, model, found.model, torch.randn(4, 3))


def test_shared_layers_and_parameters_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(torch.relu(self.a(x))) + F.linear(x, self.b.weight) + self.b(x))

    model = Twice()
    zero(model.a.weight, 0)
    zero(model.b.weight, 1)
    zero(model.c.weight, slice(None), 2)
    found = slim(model, torch.randn(2, 3))
    assert shapes(found) == {"a": (3, 3), "b": (3, 3), "c": (3, 2)}
    close(found, model, found.model, torch.randn(4, 3))


def test_in_place_activations_of_a_value_that_others_read_stay_untouched() -> None:
    class Mutating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = F.relu(x, inplace=True)
            return self.b(x + y)

    model = Mutating()
    zero(model.a.weight, 0)
    zero(model.a.bias, 0, value=-1.0)
    found = slim(model, torch.randn(2, 3))
    close(found, model, found.model, torch.randn(4, 3))


def test_linear_layers_over_sequences() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.LayerNorm(4))
    zero(model[0].weight, slice(2, 5))
    zero(model[2].weight, slice(None), 7)
    found = slim(model, torch.randn(2, 6, 4))
    assert shapes(found) == {"0": (4, 4), "2": (4, 4)}
    close(found, model, found.model, torch.randn(3, 5, 4))


def test_papers_networks_lose_what_filter_pruning_left_of_them() -> None:
    from papers.models import MLPerfTinyResNet8, SmallConvNet, resnet8, resnet20

    for model, side in ((SmallConvNet(), 8), (resnet8(), 32), (resnet20(), 32), (MLPerfTinyResNet8(), 32)):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                alive(module)
        channels = 1 if isinstance(model, SmallConvNet) else 3
        rule = dt.Rule(match=r"conv.*weight$", target=dt.Structured(group="filter", keep=0.5))
        run = dt.compress(model, dt.Recipe([rule]))
        run.finalize()
        for module in model.modules():  # a filter that is pruned loses its BatchNorm bias in filter pruning
            if isinstance(module, nn.BatchNorm2d):
                zero(module.bias, slice(None))
                zero(module.running_mean, slice(None))
        found = slim(model, torch.randn(2, channels, side, side))
        close(found, model, found.model, torch.randn(2, channels, side, side))
        assert found.parameters[1] < 0.75 * found.parameters[0], type(model)
        assert found.macs[1] < found.macs[0]


# --- in general ---------------------------------------------------------------------------------------------------


def random_net(draw: Callable[[Any], Any]) -> tuple[nn.Sequential, Tensor]:
    """Convolutions, BatchNorm, activations, pooling, a head; whole rows and columns of which are zero."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    width, layers = 1, []
    for _ in range(draw(st.integers(1, 3))):
        depthwise = width > 1 and draw(st.booleans())
        after = width if depthwise else draw(st.integers(2, 5))
        bias = draw(st.booleans())
        padding = draw(st.sampled_from([0, 0, 1]))
        layers.append(nn.Conv2d(width, after, 3, padding=padding, bias=bias, groups=width if depthwise else 1))
        width = after
        if draw(st.booleans()):
            layers.append(alive(nn.BatchNorm2d(width)))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.Identity(), nn.MaxPool2d(2, 1), nn.Hardswish()])))
    flat = draw(st.booleans())
    layers += [nn.AdaptiveAvgPool2d(1 + flat), nn.Flatten(), nn.Linear(width * (1 + 3 * flat), 6), nn.ReLU()]
    layers.append(nn.Linear(6, 2))
    model: Any = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            w = module.weight
            for axis in (0, 1):
                zeros = torch.rand(w.shape[axis]) < draw(st.sampled_from([0.0, 0.3, 0.7]))
                with torch.no_grad():
                    w.transpose(0, axis)[zeros] = 0.0
            if module.bias is not None and draw(st.booleans()):
                zero(module.bias, torch.rand(len(w)) < 0.5)
    return model.eval(), torch.randn(3, 1, 11, 11)


@given(data=st.data())
@settings(max_examples=60)
def test_random_networks_give_the_same_and_nothing_dead_is_left(data: st.DataObject) -> None:
    model, x = random_net(data.draw)
    found = slim(model, x)
    close(found, model, found.model, torch.randn(5, 1, 11, 11))
    again = slim(found.model, x)
    assert again.parameters[0] == again.parameters[1] == found.parameters[1]  # nothing more can go
    folded = copy.deepcopy(model)
    report = fold_dead_units(folded, x)
    close(report, model, folded, torch.randn(5, 1, 11, 11))
    assert report.weights[1] <= report.weights[0]
    # A unit that stays though nothing uses it, or though it is constant, is said to stay.
    named = {sentence.partition(":")[0] for sentence in found.left}
    for name, module in found.model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in named and name != str(len(model) - 1):
            empty = (module.weight.reshape(len(module.weight), -1) == 0).all(dim=1)
            assert not empty.any() or module.weight.shape[0] == 1, (name, found.left)


def test_the_same_channels_are_removed_as_torch_pruning_would_remove() -> None:
    """An independent dependency graph, told which channels to take, ends at the same shapes."""
    tp = pytest.importorskip("torch_pruning")
    model: Any = nn.Sequential(
        nn.Conv2d(1, 6, 3), alive(nn.BatchNorm2d(6)), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.Flatten(),
        nn.Linear(5 * 9, 7), nn.ReLU(), nn.Linear(7, 2),
    )  # fmt: skip
    dead = {0: [1, 4], 4: [0], 6: [2, 3, 6]}
    for layer, channels in dead.items():
        zero(model[layer + {0: 4, 4: 2, 6: 2}[layer]].weight, slice(None), expand(channels, 9 if layer == 4 else 1))
    x = torch.randn(2, 1, 12, 12)
    found = slim(model, x)
    theirs = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
    for layer, channels in dead.items():
        prune = tp.prune_conv_out_channels if layer < 6 else tp.prune_linear_out_channels
        graph.get_pruning_group(theirs[layer], prune, idxs=channels).prune()
    ours, others = dict(found.model.state_dict()), dict(theirs.state_dict())
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in others.items()}
    for name, value in ours.items():
        torch.testing.assert_close(value, others[name], msg=name)


def expand(channels: list[int], run: int) -> list[int]:
    return [c * run + i for c in channels for i in range(run)]


# --- runs ---------------------------------------------------------------------------------------------------------


def pruned(target: dt.Target, keep_biases: bool = True) -> tuple[dt.Run, nn.Module, Tensor]:
    """A LeNet-5 that a target has thinned out, finalized."""
    model = LeNet5()
    if not keep_biases:
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                zero(p, slice(None))
    run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=target)]))
    run.finalize()
    return run, copy.deepcopy(model), torch.randn(8, 1, 28, 28)


@pytest.mark.parametrize(
    "target",
    [
        dt.TopK(keep=2000, scope="model"),
        dt.SparseLevels(sparse=dt.TopK(keep=2000, scope="model"), survivors=dt.Uniform(bits=3)),
        dt.SparseLevels(sparse=dt.TopK(keep=2000, scope="model"), survivors=dt.Uniform(bits=3, zero=False)),
        dt.SparseLevels(sparse=dt.TopK(keep=0.01), survivors=dt.Uniform(bits=4, zero=False, granularity="channel")),
        dt.Structured(group="filter", keep=0.3),
    ],
    ids=["topk", "levels", "levels without zero", "levels by channel", "filters"],
)
def test_a_finalized_run_stays_in_its_targets_and_its_file_holds_fewer_weights(
    target: dt.Target, tmp_path: Path
) -> None:
    run, before, x = pruned(target)
    size = dt.save(run, tmp_path / "a.detent", "compressed")
    found = fold_dead_units(run, x)
    assert found.weights[1] < found.weights[0]
    model = run.model
    close(found, before, model, torch.randn(8, 1, 28, 28))
    for name, encoded in run.encoded().items():
        w = model.get_parameter(name)
        assert torch.equal(encoded.decode(), w), name
        assert not torch.signbit(w[w == 0]).any()
    assert max(row["error"] for row in run.measure()) == 0.0
    # Whole filters are written, so there only rows that empty altogether make the file smaller.
    smaller = dt.save(run, tmp_path / "b.detent", "compressed")
    assert smaller <= size if isinstance(target, dt.Structured) else smaller < size
    twin = LeNet5()
    dt.load(tmp_path / "b.detent", twin, "compressed")
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_weights_that_have_no_zero_to_go_to_stay_as_they_are() -> None:
    rules = [
        dt.Rule(match=r"conv.\.weight", target=dt.Binary()),
        dt.Rule(match="weight", target=dt.TopK(keep=0.002)),
    ]
    model = LeNet5()
    run = dt.compress(model, dt.Recipe(rules))
    run.finalize()
    before = copy.deepcopy(model)
    found = fold_dead_units(run, torch.randn(2, 1, 28, 28))
    assert torch.equal(model.conv2.weight, before.conv2.weight)
    assert found.weights[1] < found.weights[0]
    assert any(sentence.startswith("conv2") and "no zero" in sentence for sentence in found.left)
    close(found, before, model, torch.randn(8, 1, 28, 28))


def test_a_run_after_training_with_admm_can_be_folded() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rule = dt.Rule(match="weight", target=dt.TopK(keep=0.15), mechanism=dt.ADMM(rho=0.1, every=0.2, until=0.8))
    run = dt.attach(model, optimizer, dt.Recipe([rule]), total_steps=20)
    with pytest.raises(ValueError, match="finalize"):
        fold_dead_units(run, torch.randn(2, 6))
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
    run.finalize()
    before = copy.deepcopy(model)
    found = fold_dead_units(run, torch.randn(2, 6))
    assert found.weights[1] < found.weights[0]
    close(found, before, model, torch.randn(8, 6))
    assert all(torch.equal(e.decode(), model.get_parameter(name)) for name, e in run.encoded().items())


def test_slim_of_a_run_is_its_compressed_life_and_leaves_the_model_alone() -> None:
    model = LeNet5()
    before = copy.deepcopy(model)
    rule = dt.Rule(match=r"conv2.weight", target=dt.Structured(group="filter", keep=10))
    run = dt.compress(model, dt.Recipe([rule]))
    found = slim(run, torch.randn(2, 1, 28, 28))
    assert shapes(found)["conv2"] == (20, 10)
    assert model.training and not found.model.training
    with run.compressed():
        close(found, model, found.model, torch.randn(8, 1, 28, 28))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


# --- refusals -----------------------------------------------------------------------------------------------------


def test_modes_come_back_and_the_model_is_the_same_object() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[1].eval()
    fold_dead_units(model, torch.randn(2, 3))
    assert [m.training for m in model] == [True, False, True, True]


def test_what_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input if input.sum() > 0 else super().forward(input)

    with pytest.raises(ValueError, match="torch.fx cannot trace this Branching"):
        slim(Branching(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="example_input"):
        slim(nn.Linear(2, 2), "x")


_HELD: list[nn.Linear] = []


@fx.wrap
def by_the_back_door(x: Tensor) -> Tensor:
    """Reads a layer's bias where no graph can see it."""
    return x + _HELD[0].bias.sum()


class Secretive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return by_the_back_door(self.b(self.a(x)))


def test_an_output_that_moved_is_an_error_and_the_model_is_as_it_was() -> None:
    model = Secretive()
    _HELD[:] = [model.a]
    zero(model.a.bias, 0, value=3.0)
    zero(model.b.weight, slice(None), 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="moved the output"):
        fold_dead_units(model, torch.randn(2, 2))
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(before, model.parameters()))


def test_what_came_out_shows_itself_in_a_line() -> None:
    rows = [
        LayerSize(name=f"layer{i}", before=(40, 40), after=(20, 20), weights=(1600, 400), unused=20, constant=0)
        for i in range(90)
    ]
    done: dict[str, Any] = {"layers": tuple(rows), "left": ("a", "b"), "difference": 1e-7, "scale": 1, "bound": 1e-4}
    folded = repr(Folded(**done))
    slimmed = repr(Slimmed(model=nn.Linear(9, 9), parameters=(144000, 36000), macs=(5000, 1000), **done))
    for text in (folded, slimmed):
        assert len(text) < 300
        for words in ("90 layers", "36,000 of 144,000 non-zero weights left", "2 things", "1e-07 (allowed 0.0001)"):
            assert words in text, (words, text)
    assert "36,000 of 144,000 parameters, 1,000 of 5,000 multiply-accumulates" in slimmed


# --- how a model comes, and what it is made of ---------------------------------------------------------------------


def half(model: nn.Module, last: str = "2") -> nn.Module:
    """The first half of a layer's inputs have no weights there."""
    weight = model.get_submodule(last).weight
    zero(weight, slice(None), slice(0, weight.shape[1] // 2))  # type: ignore[index, union-attr]
    return model.eval()


def plain() -> nn.Module:
    return half(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda m: nn.Sequential(nn.DataParallel(m[0]), *m[1:]),
    ],
    ids=["compiled", "DataParallel", "averaged", "inside"],
)
def test_wrappers_are_seen_through(wrap: Callable[[Any], nn.Module]) -> None:
    model, x = plain(), torch.randn(2, 3, 8, 8)
    wrapped = wrap(model)
    run = dt.compress(wrapped, dt.Recipe([dt.Rule(match="weight", target=dt.TopK(keep=0.4))]))
    for each in (wrapped, run):
        found = slim(each, x)
        assert shapes(found) == {"0": (3, 4), "2": (4, 4)}
    close(slim(wrapped, x), model, slim(wrapped, x).model, x)
    assert fold_dead_units(wrapped, x).weights == (8 * 27 + 4 * 4 * 9, 4 * 27 + 4 * 4 * 9)


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor, embed: bool = False, *, mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.a(x))
        if embed:
            return x
        if mask is not None:
            x = x * mask
        return self.b(x)


@pytest.mark.parametrize("nested", [False, True])
def test_what_reads_a_parameter_without_being_understood_is_named(nested: bool) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(6, 2)
            self.w = nn.Parameter(torch.randn(8, 6))
            with torch.no_grad():
                self.w[:, 2:4] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.einsum("bi,io->bo", torch.relu(self.a(x)), self.w))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = Mixed()

        def forward(self, x: Tensor) -> Tensor:
            return self.m(x)

    (said,) = slim(Outer() if nested else Mixed(), torch.randn(2, 4)).left
    name = "m.w" if nested else "w"
    assert said == f"{name}: 0 of 8 rows and 2 of 6 columns of zeros stay: 'einsum' reads it, which is not understood"


def test_flags_keep_their_defaults_and_inputs_may_be_named() -> None:
    model, x = half(Flagged(), "b"), torch.randn(2, 3, 8, 8)
    assert shapes(slim(model, x)) == {"a": (3, 4), "b": (4, 4)}
    kept = slim(model, {"x": x, "embed": True})  # what is given out stays; the example's call does not reach b
    assert shapes(kept) == {"a": (3, 8), "b": (8, 4)}
    assert kept.left == (
        "b.weight: 0 of 4 rows and 4 of 8 columns of zeros stay: the example's call does not reach it",
    )
    mask = torch.rand(2, 1, 6, 6)
    found = slim(model, {"x": x, "mask": mask})
    assert shapes(found) == {"a": (3, 4), "b": (4, 4)}
    torch.testing.assert_close(found.model(x, mask=mask), model(x, mask=mask))


def test_subclasses_that_compute_the_same_count_and_others_do_not() -> None:
    class Own(nn.Conv2d):
        pass

    class Other(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).flip(1)

    x = torch.randn(2, 3, 8, 8)
    assert shapes(slim(half(nn.Sequential(Own(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))), x)) == {
        "0": (3, 4),
        "2": (4, 4),
    }
    found = slim(half(nn.Sequential(Other(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))), x)
    assert shapes(found) == {"0": (3, 8), "2": (8, 4)} and found.left[0].startswith("2: 4 inputs (0, 1, 2, 3) stay")
    normed = half(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 3))
    )
    assert shapes(slim(normed, x)) == {"0": (3, 8), "2": (8, 4)}
    assert len(slim(normed, x).left) == 1


def test_a_parameter_beside_a_layer_is_cut_with_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale, self.b = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(8, 1, 1)), nn.Conv2d(8, 4, 1)
            self.shift = nn.Parameter(torch.randn(1, 8, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale + self.shift)

    model, x = half(Scaled(), "b"), torch.randn(2, 3, 6, 6)
    found = slim(model, x)
    assert found.model.scale.shape == (4, 1, 1) and found.model.shift.shape == (1, 4, 6, 6)
    close(found, model, found.model, torch.randn(3, 3, 6, 6))
    assert found.left == ()


@pytest.mark.parametrize(
    ("middle", "word"),
    [
        (nn.ChannelShuffle(2), "sizes are written in the code of '1' (ChannelShuffle)"),
        (nn.GroupNorm(1, 8), "'1' (GroupNorm) normalises it together with channels that live"),
        (nn.LocalResponseNorm(3), "it comes from '1' (LocalResponseNorm), which is not understood"),
        (nn.Softmax(dim=1), "it comes from '1' (Softmax), which is not understood"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_inputs_that_must_stay_are_left_with_what_is_between(middle: nn.Module, word: str) -> None:
    model: Any = half(nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.Conv2d(8, 4, 1)))
    found = slim(model, torch.randn(2, 3, 4, 4))
    assert shapes(found) == {"0": (3, 8), "2": (8, 4)}
    assert f"2: 4 inputs (0, 1, 2, 3) stay unread: {word}" in found.left


def test_parts_of_recurrent_layers_and_attention_are_left_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.lstm = nn.Linear(4, 8), nn.LSTM(8, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.lstm(self.a(x))[0]
            return self.attention(x, x, x)[0]

    model = Net().eval()
    zero(model.lstm.weight_ih_l0, slice(None), 1)
    zero(model.attention.out_proj.weight, slice(None), slice(2, 4))
    left = slim(model, torch.randn(2, 3, 4)).left
    assert len(left) == 2
    assert left[0].startswith("lstm.weight_ih_l0: 0 of 32 rows and 1 of 8 columns of zeros stay: 'lstm' (LSTM), which")
    assert left[1].startswith("attention.out_proj.weight: 0 of 8 rows and 2 of 8 columns of zeros stay: ")


def test_what_is_written_over_while_others_read_it_is_no_constant() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x.view(-1, 4).relu_()
            return self.b(x)

    model = Over()
    zero(model.a.weight, 0)
    zero(model.a.bias, 0, value=-1.0)
    found = slim(model, torch.randn(2, 3))
    close(found, model, found.model, torch.randn(4, 3))
    assert shapes(found) == {"a": (3, 4), "b": (4, 2)}
    assert found.left == ("a: 1 unit (0) stays: it is constant, but written over",)


def test_dropout_that_is_on_is_not_taken_for_nothing() -> None:
    class On(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x), 1e-9))

    model = On()
    zero(model.b.weight, slice(None), 1)
    found = slim(model, torch.randn(2, 3))
    assert found.left == ("b: 1 input (1) stays unread: it comes from 'dropout', which is not understood",)


# --- near-dead units -----------------------------------------------------------------------------------------------


def near_dead() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3), alive(nn.BatchNorm2d(8)), nn.ReLU(), nn.Conv2d(8, 8, 3), alive(nn.BatchNorm2d(8)),
        nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    with torch.no_grad():
        model[3].weight[:6] *= 1e-9  # six filters of noise
        model[1].weight[1] = 1e-9  # a gain, so a constant
        model[6].weight[:, 7] *= 1e-9  # what nothing reads
    return model.eval()


def test_near_dead_units_go_with_a_tolerance() -> None:
    model, x = near_dead(), torch.randn(4, 3, 9, 9)
    exact = slim(model, x)
    assert exact.parameters[0] == exact.parameters[1]
    found = slim(model, x, tolerance=1e-6)
    assert shapes(found) == {"0": (3, 7), "3": (7, 1), "6": (1, 4)}
    close(found, model, found.model, torch.randn(4, 3, 9, 9))
    assert found.difference <= found.bound == pytest.approx((1024 * 2**-23 + 1e-6) * max(found.scale, 1))


def test_near_dead_units_become_zero_before_compression_and_the_file_follows(tmp_path: Path) -> None:
    def size(model: nn.Module) -> int:
        recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8, granularity="channel"))])
        return dt.save(dt.compress(model, recipe), tmp_path / "a.detent", life="compressed")

    model, x = near_dead(), torch.randn(4, 3, 9, 9)
    before, untouched = size(copy.deepcopy(model)), copy.deepcopy(model)
    report = fold_dead_units(model, x, tolerance=1e-6)
    assert size(model) < before - 6 * 8 * 9 * 0.8
    close(report, untouched, model, torch.randn(4, 3, 9, 9))


@pytest.mark.parametrize("act", [slim, fold_dead_units])
def test_a_tolerance_that_moves_the_output_is_refused_and_the_model_is_as_it_was(act: Callable[..., Any]) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = 0.05
        model[0].weight[1:] = 1.0
        model[2].weight[:] = torch.tensor([10.0, 1.5, 1.5, 1.5])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="tolerance=0.06: without the units below it the output .* moves by"):
        act(model, torch.full((2, 3), 300.0), tolerance=0.06)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance"):
            act(model, torch.ones(2, 3), tolerance=wrong)
