"""Dead units in the architectures that people have: the outputs stay, and nothing dead is left without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detent.export.slim import fold_dead_units, slim
from detent.export.trace import LAYERS
from detent.export.units import Units

IMAGE, TOKENS = (2, 3, 16, 16), (2, 6, 16)


def conv_norm(inputs: int, outputs: int, stride: int = 1, groups: int = 1, act: Any = nn.ReLU6) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class UNet(nn.Module):
    """Skips by concatenation; up by interpolation or a transposed convolution, padded to the skip's size."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down1, self.down2 = conv_norm(3, 8), conv_norm(8, 12)
        self.pool = nn.MaxPool2d(2)
        self.up: nn.Module = nn.ConvTranspose2d(12, 6, 2, 2) if transposed else nn.Upsample(scale_factor=2)
        self.merge, self.head = conv_norm(8 + (6 if transposed else 12), 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        x = self.up(self.down2(self.pool(skip)))
        rows, columns = skip.size()[2] - x.size()[2], skip.size()[3] - x.size()[3]
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.head(self.merge(torch.cat([skip, x], dim=1)))


class Bottleneck(nn.Module):
    """ResNet's, with a projection on the shortcut, then MobileNetV2's inverted one with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.a, self.b, self.short = conv_norm(8, 6), conv_norm(6, 12), nn.Conv2d(8, 12, 1)
        self.wide, self.deep = conv_norm(12, 24), conv_norm(24, 24, groups=24, act=nn.Hardswish)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.narrow, self.head = nn.Conv2d(24, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.b(self.a(x)) + self.short(x), inplace=True)
        y = self.deep(self.wide(x))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.narrow(y)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class PaddedShortcut(nn.Module):
    """ResNet's shortcut A: strided, with channels of zeros around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = conv_norm(3, 8), conv_norm(8, 16, stride=2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.a(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(x.mean([2, 3]))


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 24, 3, padding=1)
        self.up, self.c = nn.PixelShuffle(2), nn.Conv2d(6, 4, 3, padding=1)
        self.down, self.d = nn.PixelUnshuffle(2), nn.Conv2d(16, 3, 1)
        self.act = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.down(torch.tanh(self.c(self.up(self.b(self.act(self.a(x))))))))


class Style(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.pad, self.a, self.na = nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5), norm(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), norm(8)
        self.c = nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.na(self.a(self.pad(x))), 0.2)
        x = x + self.nb(self.b(x))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.tanh(self.c(F.pad(x, (1, 1, 1, 1), mode="replicate")))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.t1, self.t2 = nn.Linear(6, 10), nn.Linear(10, 6)
        self.c1, self.c2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(self.n2(x))))
        return self.head(x.mean(1))


class Attention(nn.Module):
    """The width of a head may be read from the tensor (`split="free"`) or from the input's width."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self.split, self.heads = split, 4
        self.n1, self.n2 = nn.LayerNorm(16), nn.RMSNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        y = self.n1(x)
        width = -1 if self.split == "free" else c // self.heads
        q, k, v = (f(y).view(b, t, self.heads, width).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.split == "by hand":
            weights = torch.softmax(q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5, dim=-1)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.scale * self.o(y.transpose(1, 2).flatten(2))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Encoder(nn.Module):
    """PyTorch's own attention, tokens from an embedding, a learned position, a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 16), nn.Parameter(torch.randn(1, 7, 16))
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.attention, self.norm = nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(tokens.shape[0], -1, -1), self.token(tokens)], dim=1) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return self.head(x[:, 0])


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.last, self.head = nn.BatchNorm2d(20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        x = F.relu(self.last(torch.cat(parts, 1)))
        return self.head(F.avg_pool2d(x, x.size()[2:]).view(x.size(0), -1))


class ConvNeXt(nn.Module):
    """LayerNorm and linear layers with channels last, scaled by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma, self.head = nn.Parameter(torch.randn(8)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.b(F.gelu(self.a(self.norm(self.deep(x).permute(0, 2, 3, 1)))))
        return self.head(x + (self.gamma * y).permute(0, 3, 1, 2))


class Gated(nn.Module):
    """GLU, chunk, split by the tensor's own width, attention over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.glu = nn.GLU(dim=1)
        self.where, self.d = nn.Conv2d(12, 1, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.glu(self.a(x))
        x, y = self.b(x).chunk(2, dim=1)
        x = self.c(torch.tanh(x) * torch.sigmoid(y))
        x = x * torch.sigmoid(self.where(x))
        one, two = torch.split(x, x.shape[1] // 2, dim=1)
        return self.d(one - two)


class Written(nn.Module):
    """Sizes in the code: nothing can go, but constants still can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.c, self.d = nn.Linear(4 * 12 * 12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))).view(-1, 4 * 12 * 12))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b = nn.Linear(16, 12), nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.lstm(F.relu(self.a(x)))[0])


def layer(kind: Any = nn.TransformerEncoderLayer, **more: Any) -> Any:
    return kind(16, 4, 24, batch_first=True, **more)


class Torchs(nn.Module):
    """torch's own transformer modules, whose code asks its inputs for sizes: alone, stacked, or with a mask."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.head = how, nn.Linear(16, 3)
        self.inside: nn.Module = {
            "stacked": lambda: nn.TransformerEncoder(
                layer(norm_first=True, activation="gelu"), 2, nn.LayerNorm(16), enable_nested_tensor=False
            ),
            "alone": layer,
            "masked": layer,
            "both": lambda: nn.Transformer(16, 4, 1, 1, 24, batch_first=True),
            "decoder": lambda: nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 1),
        }[how]()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "masked":
            return self.head(self.inside(x, src_mask=torch.ones(6, 6).triu(1) == 1))
        return self.head(self.inside(x, x + 1) if self.how in ("both", "decoder") else self.inside(src=x))


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ELU(), nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=4),
            nn.Sigmoid(), nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(6),
            nn.ZeroPad2d((1, 0, 0, 1)), nn.Conv2d(6, 3, 1), nn.Tanh(),
        )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet, upsample": (lambda: UNet(False), IMAGE),
    "unet, transposed": (lambda: UNet(True), (2, 3, 14, 15)),
    "resnet and mobilenet": (Bottleneck, IMAGE),
    "padded shortcut": (PaddedShortcut, IMAGE),
    "super-resolution": (SuperResolution, IMAGE),
    "style, instance norm": (lambda: Style(lambda c: nn.InstanceNorm2d(c, affine=True)), IMAGE),
    "style, instance norm without weights": (lambda: Style(nn.InstanceNorm2d), IMAGE),
    "style, group norm": (lambda: Style(lambda c: nn.GroupNorm(4, c)), IMAGE),
    "style, group norm of one": (lambda: Style(lambda c: nn.GroupNorm(1, c)), IMAGE),
    "mixer": (Mixer, TOKENS),
    "attention, free": (lambda: Attention("free"), TOKENS),
    "attention, sized": (lambda: Attention("sized"), TOKENS),
    "attention, by hand": (lambda: Attention("by hand"), TOKENS),
    "dense": (Dense, IMAGE),
    "convnext": (ConvNeXt, IMAGE),
    "gated": (Gated, IMAGE),
    "written sizes": (Written, IMAGE),
    "recurrent": (Recurrent, TOKENS),
    "generator": (Generator, IMAGE),
    "encoder": (Encoder, TOKENS[:2]),
    "torch's stack": (lambda: Torchs("stacked"), TOKENS),
    "torch's layer": (lambda: Torchs("alone"), TOKENS),
    "torch's layer itself": (layer, TOKENS),
    "torch's layer, masked": (lambda: Torchs("masked"), TOKENS),
    "torch's transformer": (lambda: Torchs("both"), TOKENS),
    "torch's decoder": (lambda: Torchs("decoder"), TOKENS),
}


def make(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    build, shape = MODELS[name]
    model = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)):
                for own, p in (*module.named_parameters(), *module.named_buffers()):
                    if p.is_floating_point():
                        p.uniform_(0.5, 2.0) if own != "bias" else p.normal_()
    return model, lambda: torch.randint(0, 11, shape) if len(shape) == 2 else torch.randn(shape)


def thin(model: nn.Module, share: float, biases: float) -> None:
    """Random outputs and inputs of every layer without weights, random biases zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LAYERS):
                units = Units(module)
                inputs, outputs = units.size
                if module.weight.requires_grad:
                    units.clear(rows=torch.rand(outputs) < share, columns=torch.rand(inputs) < share)
                if module.bias is not None:
                    module.bias[torch.rand(len(module.bias)) < biases] = 0.0


def dead(model: nn.Module) -> set[str]:
    """Layers with an output or an input that has no weight."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            units = Units(module)
            if not (units.rows().all() and units.columns().all()):
                found.add(name)
    return found


def named(left: tuple[str, ...]) -> set[str]:
    return {line.partition(":")[0].removesuffix(".weight") for line in left}


def close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).detach().abs().max()) <= 2e-5 * max(float(a.abs().max()), 1.0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_stay_and_what_stays_dead_is_named(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model, sample = make(name)
    thin(model, (0.2, 0.5, 0.8)[seed], (0.5, 0.9, 0.0)[seed])
    found = slim(model, sample())
    x = sample()
    with torch.no_grad():
        close(model(x), found.model(x))
    assert dead(found.model) <= named(found.left), found.left
    again = slim(found.model, sample())
    # Where all is dead, a group of a convolution that is left alone may shrink once more.
    assert again.parameters[0] == again.parameters[1] or not found.weights[1], again
    fold_dead_units(model, sample())
    with torch.no_grad():
        close(model(x), found.model(x))


# By hand: which inputs of which layers lose their weights, and what sizes (inputs, outputs) that leaves.
REMOVED: list[tuple[str, dict[str, list[int]], dict[str, tuple[int, int]]]] = [
    (
        "unet, upsample",
        {"merge.0": [0, 1, 8, 9, 10], "down2.0": [0, 1]},
        {"merge.0": (15, 8), "down2.0": (6, 9), "down1.0": (3, 6)},
    ),
    ("unet, transposed", {"merge.0": [12, 13], "up": [0, 1, 2]}, {"merge.0": (12, 8), "up": (9, 4), "down2.0": (8, 9)}),
    (
        "resnet and mobilenet",
        {"narrow": [0, 5], "squeeze": [0, 5], "excite": [2], "b.0": [1]},
        {
            "wide.0": (12, 22),
            "deep.0": (22, 22),
            "narrow": (22, 12),
            "squeeze": (22, 5),
            "excite": (5, 22),
            "a.0": (8, 5),
            "b.0": (5, 12),
        },
    ),
    # Channel 0 of the sum is one of zeros that the padding makes; channel 5 is channel 1 of the stem.
    ("padded shortcut", {"head": [0, 5], "a.0": [1]}, {"head": (15, 4), "a.0": (7, 15), "stem.0": (3, 7)}),
    (
        "super-resolution",
        {"c": [2], "d": [4, 5, 6, 7], "b": [3]},
        {"a": (3, 7), "b": (7, 20), "c": (5, 3), "d": (12, 3)},
    ),
    ("style, instance norm", {"b": [1], "c": [1]}, {"a": (3, 7), "b": (7, 7), "c": (7, 3)}),
    ("style, group norm", {"b": [2, 3], "c": [2, 3]}, {"a": (3, 6), "b": (6, 6), "c": (6, 3)}),
    ("style, group norm", {"b": [2], "c": [2]}, {}),
    ("style, group norm of one", {"b": [2], "c": [2]}, {}),
    (
        "mixer",
        {"t2": [0, 1, 2], "c2": [5]},
        {"t1": (6, 7), "t2": (7, 6), "c1": (16, 23), "c2": (23, 16)},
    ),
    # Feature 1 of each of four heads.
    (
        "attention, free",
        {"o": [1, 5, 9, 13], "down": [0, 1]},
        {"v": (16, 12), "o": (12, 16), "gate": (16, 22), "up": (16, 22), "down": (22, 16)},
    ),
    ("attention, free", {"o": [1, 5, 9]}, {}),
    ("attention, sized", {"o": [1, 5, 9, 13]}, {}),
    ("attention, by hand", {"o": [1, 5, 9, 13], "down": [0]}, {"gate": (16, 23), "up": (16, 23), "down": (23, 16)}),
    (
        "dense",
        {"convs.0": [2], "convs.1": [2, 9], "convs.2": [2, 9], "head": [2, 9]},
        {"stem": (3, 7), "convs.0": (7, 3), "convs.1": (10, 4), "convs.2": (14, 4), "head": (18, 4)},
    ),
    ("convnext", {"b": [0, 1, 2], "head": [1]}, {"a": (8, 29), "b": (29, 8)}),
    (
        "gated",
        {"d": [2], "where": [2, 8], "c": [3], "b": [5]},
        {"a": (3, 14), "b": (7, 14), "c": (7, 10), "where": (10, 1), "d": (5, 3)},
    ),
    ("written sizes", {"c": list(range(144, 288)), "d": [3]}, {"c": (576, 9), "d": (9, 3)}),
    ("generator", {"5": [0, 1], "8": [2]}, {"0": (3, 6), "3": (6, 6), "5": (6, 5), "8": (5, 3)}),
    ("encoder", {"down": [0, 7]}, {"up": (16, 30), "down": (30, 16)}),
    (
        "torch's stack",
        {"inside.layers.0.linear2": [0, 7], "inside.layers.1.linear2": [3], "head": [5]},
        {
            "inside.layers.0.linear1": (16, 22),
            "inside.layers.0.linear2": (22, 16),
            "inside.layers.1.linear1": (16, 23),
            "inside.layers.1.linear2": (23, 16),
        },
    ),
    ("torch's layer itself", {"linear2": [0, 7]}, {"linear1": (16, 22), "linear2": (22, 16)}),
    ("torch's layer, masked", {"inside.linear2": [0, 7]}, {}),
    (
        "torch's transformer",
        {"inside.encoder.layers.0.linear2": [0], "inside.decoder.layers.0.linear2": [1, 2]},
        {
            "inside.encoder.layers.0.linear1": (16, 23),
            "inside.encoder.layers.0.linear2": (23, 16),
            "inside.decoder.layers.0.linear1": (16, 22),
            "inside.decoder.layers.0.linear2": (22, 16),
        },
    ),
]


@pytest.mark.parametrize(("name", "unread", "expected"), REMOVED, ids=[f"{row[0]} {len(row[2])}" for row in REMOVED])
def test_what_goes_by_hand(name: str, unread: dict[str, list[int]], expected: dict[str, tuple[int, int]]) -> None:
    torch.manual_seed(5)
    model, sample = make(name)
    for layer, inputs in unread.items():
        units = Units(model.get_submodule(layer))
        with torch.no_grad():
            units.clear(columns=torch.isin(torch.arange(units.size[0]), torch.tensor(inputs)))
    found, x = slim(model, sample()), sample()
    before, after = (
        {n: Units(m).size for n, m in net.named_modules() if isinstance(m, LAYERS)} for net in (model, found.model)
    )
    assert {layer: size for layer, size in after.items() if size != before[layer]} == expected
    with torch.no_grad():
        close(model(x), found.model(x))
    for layer in dead(found.model):
        assert layer in named(found.left), found.left
