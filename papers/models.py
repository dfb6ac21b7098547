"""The small networks of the papers, with the parameter names of the published checkpoints.

A factory's keyword arguments are what an experiment's ``model_args`` may hold.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from detent.demo import LeNet5

__all__ = [
    "VGG16",
    "LeNet5",
    "LeNet300",
    "MLPerfTinyResNet8",
    "ResNet",
    "SmallConvNet",
    "load_checkpoint",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
]


class LeNet300(nn.Sequential):
    """An MLP; with its defaults LeNet-300-100 of the pruning papers (266,200 weights).

    Example:
        >>> LeNet300(inputs=64, hidden=(32,))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, inputs: int = 784, hidden: Sequence[int] = (300, 100), classes: int = 10) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        widths = [inputs, *hidden]
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), start=1):
            self.add_module(f"fc{i}", nn.Linear(fan_in, fan_out))
            self.add_module(f"relu{i}", nn.ReLU())
        self.add_module(f"fc{len(widths)}", nn.Linear(widths[-1], classes))


class SmallConvNet(nn.Sequential):
    """Three convolutions with BatchNorm and a linear head, for scikit-learn's 8x8 digits.

    Example:
        >>> SmallConvNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int = 1, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        fan_in = channels
        for i, fan_out in enumerate((width, 2 * width, 4 * width), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(fan_in, fan_out, 3, stride=1 if i == 1 else 2, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(fan_out))
            self.add_module(f"relu{i}", nn.ReLU())
            fan_in = fan_out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(fan_in, classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: identity, "A" (subsample, zero-pad channels) or "B" (1x1 conv + BN)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.stride = stride
        self.extra = fan_out - fan_in
        self.downsample: nn.Module | None = None
        if shortcut == "B" and (stride != 1 or self.extra):
            self.downsample = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False), nn.BatchNorm2d(fan_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride != 1 or self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(x + y)


class ResNet(nn.Module):
    """A basic-block ResNet with a 3x3 stem (He et al., arXiv 1512.03385): depth 6n+2 for three stages of n blocks.

    Args:
        blocks: blocks a stage.
        widths: channels a stage; every stage but the first starts with stride 2.
        classes: outputs.
        shortcut: "A" (no parameters) or "B" (``downsample.0`` 1x1 convolution, ``downsample.1`` BatchNorm).
        head: name of the linear layer, as the checkpoint has it.

    Raises:
        ValueError: for another shortcut, or lengths that differ.

    Example:
        >>> ResNet(blocks=(1, 1, 1), classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int] = (16, 32, 64),
        classes: int = 10,
        shortcut: str = "B",
        head: str = "fc",
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"ResNet(shortcut={shortcut!r}): need 'A' or 'B'")
        if len(blocks) != len(widths):
            raise ValueError(f"ResNet(blocks={blocks}, widths={widths}): need one width a stage")
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.num_stages = len(widths)
        fan_in = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            layer = nn.Sequential()
            for i in range(count):
                layer.append(BasicBlock(fan_in, width, 2 if stage > 1 and i == 0 else 1, shortcut))
                fan_in = width
            self.add_module(f"layer{stage}", layer)
        self.head = head
        self.add_module(head, nn.Linear(fan_in, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return getattr(self, self.head)(x.mean((2, 3)))


def resnet8(classes: int = 10, shortcut: str = "B", head: str = "fc") -> ResNet:
    """ResNet-8 for 32x32 images."""
    return ResNet((1, 1, 1), classes=classes, shortcut=shortcut, head=head)


def resnet20(classes: int = 10, shortcut: str = "A", head: str = "linear") -> ResNet:
    """ResNet-20; the defaults fit ``cifar10_resnet20.safetensors``."""
    return ResNet((3, 3, 3), classes=classes, shortcut=shortcut, head=head)


def resnet32(classes: int = 100, shortcut: str = "B", head: str = "fc") -> ResNet:
    """ResNet-32; the defaults fit ``cifar100_resnet32_sgd*.safetensors``."""
    return ResNet((5, 5, 5), classes=classes, shortcut=shortcut, head=head)


def resnet18(classes: int = 10, shortcut: str = "B", head: str = "fc") -> ResNet:
    """ResNet-18 with the 3x3 stem used for 32x32 images."""
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), classes=classes, shortcut=shortcut, head=head)


class MLPerfTinyResNet8(nn.Module):
    """ResNet-8 of MLPerf Tiny, with the names of its Keras file; takes raw pixels 0..255.

    Its convolutions have biases, BatchNorm epsilon is 1e-3, stride-2 convolutions pad right and bottom only, and the
    1x1 shortcuts have no BatchNorm.

    Example:
        >>> MLPerfTinyResNet8()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        shapes = [
            (3, 16, 3),
            (16, 16, 3),
            (16, 16, 3),
            (16, 32, 3),
            (32, 32, 3),
            (16, 32, 1),
            (32, 64, 3),
            (64, 64, 3),
            (32, 64, 1),
        ]
        for i, (fan_in, fan_out, kernel) in enumerate(shapes):
            stride = 2 if i in (3, 5, 6, 8) else 1
            conv = nn.Conv2d(fan_in, fan_out, kernel, stride=stride, padding=1 if kernel == 3 and stride == 1 else 0)
            self.add_module("conv2d" + (f"_{i}" if i else ""), conv)
        for i, width in enumerate((16, 16, 16, 32, 32, 64, 64)):
            self.add_module("batch_normalization" + (f"_{i}" if i else ""), nn.BatchNorm2d(width, eps=1e-3))
        self.dense = nn.Linear(64, classes)

    def _conv_bn(self, x: Tensor, conv: str, norm: str, same: bool = True) -> Tensor:
        return getattr(self, f"batch_normalization{norm}")(self._conv(x, conv, same))

    def _conv(self, x: Tensor, conv: str, same: bool) -> Tensor:
        # TF pads an even side before a strided 3x3 convolution on the right and bottom only
        return getattr(self, f"conv2d{conv}")(x if same else F.pad(x, (0, 1, 0, 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self._conv_bn(x, "", ""))
        y = F.relu(self._conv_bn(x, "_1", "_1"))
        x = F.relu(x + self._conv_bn(y, "_2", "_2"))
        y = F.relu(self._conv_bn(x, "_3", "_3", same=False))
        x = F.relu(self._conv(x, "_5", same=True) + self._conv_bn(y, "_4", "_4"))
        y = F.relu(self._conv_bn(x, "_6", "_5", same=False))
        x = F.relu(self._conv(x, "_8", same=True) + self._conv_bn(y, "_7", "_6"))
        return self.dense(x.mean((2, 3)))


class VGG16(nn.Module):
    """VGG-16 with BatchNorm for 32x32 images (arXiv 1409.1556); ``hidden=(4096, 4096)`` is the head of the PSG code.

    Example:
        >>> VGG16()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, hidden: Sequence[int] = (), dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential()
        fan_in = 3
        for count, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(count):
                self.features.extend(
                    [nn.Conv2d(fan_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                )
                fan_in = width
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Sequential()
        for width in hidden:
            self.classifier.extend([nn.Linear(fan_in, width), nn.ReLU(), nn.Dropout(dropout)])
            fan_in = width
        self.classifier.append(nn.Linear(fan_in, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a ``.safetensors`` state dict into ``model``; only BatchNorm's step counters may be absent.

    Raises:
        ValueError: if names or shapes differ.

    Example:
        >>> load_checkpoint(LeNet5(), "no-such.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: No such file or directory: no-such.safetensors
    """
    state = load_file(path)
    own = model.state_dict()
    absent = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if absent or unknown or shapes:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: absent {absent[:5]}, unknown {unknown[:5]}, "
            f"of another shape {shapes[:5]}"
        )
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked") and name not in state:
                buffer.zero_()
