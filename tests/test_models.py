"""The networks are the published ones: weight counts by hand, names of the checkpoints, stated accuracies."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from detent.data import Batches, ImageSet, load_images
from papers import models
from papers.train import evaluate

CIFAR100: dict[str, Any] = {
    "mean": [129.3 / 255, 124.1 / 255, 112.4 / 255],
    "std": [68.2 / 255, 65.4 / 255, 70.4 / 255],
}
IMAGENET: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
RAW: dict[str, Any] = {"mean": [0.0], "std": [1 / 255]}
# accuracies measured independently, stated in shared/data/README.md
CHECKPOINTS = [
    ("cifar100_resnet32_sgd150", models.resnet32, "cifar100", CIFAR100, 69.96),
    ("cifar100_resnet32_sgd82", models.resnet32, "cifar100", CIFAR100, 69.63),
    ("cifar10_resnet20", models.resnet20, "cifar10", IMAGENET, 91.73),
    ("cifar10_resnet8_mlperftiny", models.MLPerfTinyResNet8, "cifar10", RAW, 87.19),
]


@functools.cache
def _test_split(folder: Path) -> ImageSet:
    """Decoded once for the two networks that share it."""
    return load_images(folder, "test")


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_weight_counts() -> None:
    assert weights(models.LeNet5()) == 20 * 25 + 50 * 20 * 25 + 500 * 800 + 10 * 500 == 430_500
    assert weights(models.LeNet300()) == 784 * 300 + 300 * 100 + 100 * 10
    stages = [16 * 16 * 9 * 2 * n for n in (3, 5)]
    # a stage of n blocks at width w: 2n convolutions of 9 w^2, the first of which comes from w / 2
    wider = [9 * (2 * n * w * w - w * w // 2) for n in (3, 5) for w in (32, 64)]
    assert weights(models.resnet20(classes=10)) == 3 * 16 * 9 + stages[0] + wider[0] + wider[1] + 640
    shortcuts = 16 * 32 + 32 * 64
    assert weights(models.resnet32(classes=100)) == 3 * 16 * 9 + stages[1] + wider[2] + wider[3] + 6400 + shortcuts


@pytest.mark.parametrize(
    ("model", "channels", "side"),
    [
        (models.resnet8(), 3, 32),
        (models.resnet18(classes=7), 3, 32),
        (models.VGG16(classes=7, hidden=(32,)), 3, 32),
        (models.SmallConvNet(), 1, 8),
        (models.LeNet5(), 1, 28),
    ],
)
def test_forward_and_backward(model: nn.Module, channels: int, side: int) -> None:
    out = model(torch.randn(2, channels, side, side))
    assert out.shape in {(2, 10), (2, 7)}
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_first_and_last_weight_are_stem_and_head() -> None:
    for model in (models.resnet20(), models.resnet32(), models.MLPerfTinyResNet8(), models.VGG16()):
        names = [n for n, p in model.named_parameters() if p.ndim > 1]
        assert names[0] in {"conv1.weight", "conv2d.weight", "features.0.weight"}
        assert names[-1] in {"linear.weight", "fc.weight", "dense.weight", "classifier.0.weight"}


def test_shortcut_a_subsamples_and_pads_channels_with_zeros() -> None:
    block = models.BasicBlock(4, 8, 2, "A").eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for c in range(4):
        expected[:, c + 2] = x[:, c, [0, 2, 4]][:, :, [0, 2, 4]]
    assert torch.equal(block(x), expected)


def test_strided_convolutions_of_mlperf_pad_right_and_bottom() -> None:
    model = models.MLPerfTinyResNet8()
    x = torch.rand(1, 16, 6, 6)
    wide = F.pad(x, (0, 1, 0, 1))
    layer = model.get_submodule("conv2d_3")
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    patches = torch.stack([wide[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] for i in range(3) for j in range(3)])
    expected = torch.einsum("pcij,ocij->op", patches, layer.weight) + layer.bias[:, None]
    assert torch.allclose(model._conv(x, "_3", same=False).view(32, 9), expected, atol=1e-5)


def test_loading_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model = models.resnet8()
    state = {k: v.contiguous() for k, v in models.resnet8().state_dict().items()}
    save_file(state, tmp_path / "fits.safetensors")
    models.load_checkpoint(model, tmp_path / "fits.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for name, change in {
        "absent": {k: v for k, v in state.items() if k != "fc.bias"},
        "unknown": state | {"fc.scale": torch.ones(1)},
        "shape": state | {"fc.bias": torch.ones(11)},
    }.items():
        save_file(change, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"fc\."):
            models.load_checkpoint(model, tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(("file", "factory"), [(c[0], c[1]) for c in CHECKPOINTS])
def test_names_and_shapes_are_those_of_the_checkpoint(shared: Path, file: str, factory: type[nn.Module]) -> None:
    with safe_open(shared / "checkpoints" / f"{file}.safetensors", "pt") as reader:
        stored = {k: tuple(reader.get_slice(k).get_shape()) for k in reader.keys()}  # noqa: SIM118  no __iter__
    own = {k: tuple(v.shape) for k, v in factory().state_dict().items()}
    assert {k: v for k, v in own.items() if k in stored or not k.endswith("num_batches_tracked")} == stored


@pytest.mark.slow
@pytest.mark.parametrize(("file", "factory", "folder", "scale", "accuracy"), CHECKPOINTS)
def test_stated_accuracy(
    shared: Path, file: str, factory: type[nn.Module], folder: str, scale: dict[str, Any], accuracy: float
) -> None:
    model = factory()
    models.load_checkpoint(model, shared / "checkpoints" / f"{file}.safetensors")
    test = _test_split(shared / "data" / folder)
    torch.set_num_threads(2)
    batches = Batches(test.images, test.labels, 500, channels_last=True, **scale)
    got = evaluate(model.to(memory_format=torch.channels_last), batches)  # pyright: ignore[reportCallIssue]
    # one image is 0.01: the number of right answers is the stated one
    assert round(got["accuracy"] * 100) == round(accuracy * 100)
