"""A zoo of tiny nets, one mechanism each, with the widths that must be cuttable.

``ZOO[name]`` is a ``Net``: how to build it, what it takes, and the sorted sizes of its unlocked groups, derived by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Net:
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    sizes: list[int]
    """Sorted sizes of the groups that may be cut."""
    products: bool = False
    """Units leave the full-size net only if what produces them is zeroed too: two activations meet in a matrix product, or
    a norm without weights mixes channels."""


ZOO: dict[str, Net] = {}


def image(channels=3, size=8):
    return lambda: torch.randn(2, channels, size, size)


def tokens(n=6, width=8):
    return lambda: torch.randn(2, n, width)


def net(sizes, example=None, products=False):
    def register(cls):
        ZOO[cls.__name__] = Net(cls, example or image(), sorted(sizes), products)
        return cls

    return register


class Head(nn.Module):
    """Global average pool and classifier."""

    def __init__(self, width, classes=4):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x.mean(dim=tuple(range(2, x.dim()))))


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def stack(name, sizes, layers, example=None, products=False):
    ZOO[name] = Net(lambda: nn.Sequential(*layers()), example or image(), sorted(sizes), products)


# ------------------------------------------------------------------------------------------------ layers in a row
stack(
    "ConvBn",
    [8, 6],
    lambda: [conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), Head(6)],
)
stack("BnWithoutAffine", [8, 6], lambda: [conv(3, 8), nn.BatchNorm2d(8, affine=False), nn.GELU(), conv(8, 6), Head(6)])
stack("BnWithoutStatistics", [8], lambda: [conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), Head(8)])
stack(
    "PreActivation",
    [8, 6],
    lambda: [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU6(), Head(6)],
)
stack("Grouped", [8, 4], lambda: [conv(3, 8), conv(8, 8, 1), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), Head(12)])
stack("GroupedThenGrouped", [2], lambda: [conv(3, 8), conv(8, 12, groups=4), nn.SiLU(), conv(12, 6, groups=2), Head(6)])
stack(
    "Depthwise",
    [8, 6],
    lambda: [conv(3, 8), conv(8, 8, groups=8), nn.Hardswish(), conv(8, 6, 1), conv(6, 6, groups=6), Head(6)],
)
stack("DepthMultiplier", [4], lambda: [conv(3, 4), conv(4, 12, groups=4), nn.ReLU(), Head(12)])
stack("Transposed", [8, 6], lambda: [conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), Head(6)])
stack(
    "TransposedGrouped",
    [4],
    lambda: [conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU(), Head(12)],
)
stack(
    "Flatten",
    [6, 5, 7],
    lambda: [
        conv(3, 6),
        nn.ReLU(),
        conv(6, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(80, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    ],
)
stack("PReLU", [8, 6], lambda: [conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), Head(6)])
stack("GroupNorm", [4, 6], lambda: [conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 6), nn.GroupNorm(1, 6), Head(6)])
stack(
    "GroupNormWithoutAffine",
    [4],
    lambda: [conv(3, 8), nn.GroupNorm(2, 8, affine=False), nn.ReLU(), Head(8)],
    products=True,
)
stack(
    "InstanceNorm",
    [8, 6],
    lambda: [
        conv(3, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        conv(8, 6),
        nn.InstanceNorm2d(6),
        nn.ReLU(),
        Head(6),
    ],
)
stack(
    "LayerNorm",
    [8, 6],
    lambda: [
        nn.Linear(5, 8),
        nn.LayerNorm(8),
        nn.ReLU(),
        nn.Linear(8, 6),
        nn.LayerNorm(6, elementwise_affine=False),
        nn.Tanh(),
        nn.Linear(6, 4),
    ],
    lambda: torch.randn(3, 5),
    products=True,
)
stack("LayerNormOverMaps", [6], lambda: [conv(3, 6), nn.LayerNorm([6, 8, 8]), nn.ReLU(), Head(6)])
stack(
    "RMSNorm",
    [8],
    lambda: [nn.Linear(5, 8), nn.RMSNorm(8, eps=1e-5), nn.SiLU(), nn.Linear(8, 4)],
    lambda: torch.randn(3, 5),
)
stack(
    "Conv1d",
    [6, 5, 7],
    lambda: [
        nn.Conv1d(3, 6, 3),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.ConvTranspose1d(6, 5, 2, 2),
        nn.ReLU(),
        nn.Conv1d(5, 7, 1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(7, 4),
    ],
    lambda: torch.randn(2, 3, 10),
)
stack(
    "Conv3d",
    [4, 5],
    lambda: [
        nn.Conv3d(2, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Conv3d(4, 5, 1),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    ],
    lambda: torch.randn(2, 2, 4, 4, 4),
)
stack(
    "WeightNorm",
    [8, 6],
    lambda: [
        nn.utils.parametrizations.weight_norm(conv(3, 8)),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(conv(8, 6)),
        nn.ReLU(),
        Head(6),
    ],
)
stack("PixelShuffle", [8, 3], lambda: [conv(3, 8), nn.ReLU(), conv(8, 12), nn.PixelShuffle(2), nn.ReLU(), Head(3)])
stack("PixelUnshuffle", [3], lambda: [conv(3, 3), nn.PixelUnshuffle(2), nn.ReLU(), Head(12)])
stack(
    "Upsample",
    [8, 6, 5],
    lambda: [
        conv(3, 8),
        nn.Upsample(scale_factor=2),
        conv(8, 6),
        nn.Upsample(size=(9, 9), mode="bilinear"),
        conv(6, 5),
        nn.ReflectionPad2d(1),
        Head(5),
    ],
)
stack(
    "Dropout",
    [8, 6],
    lambda: [conv(3, 8), nn.Dropout2d(0.5), nn.ReLU(inplace=True), conv(8, 6), nn.Dropout(0.3), Head(6)],
)
stack("LocalResponse", [6, 8], lambda: [conv(3, 8), nn.ReLU(), conv(8, 6), nn.Softplus(), nn.AvgPool2d(2), Head(6)])
stack(
    "NamedTwice",
    [7],
    lambda: [nn.Flatten(), nn.Linear(12, 7), nn.LeakyReLU(0.1), nn.Linear(7, 4)],
    lambda: torch.randn(2, 3, 2, 2),
)


# ------------------------------------------------------------------------------------------------ convolutional nets
@net([8, 6])
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(3, 8), conv(8, 6, bias=False), conv(6, 8, bias=False)
        self.bn1, self.bn2, self.head = nn.BatchNorm2d(6), nn.BatchNorm2d(8), Head(8)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.bn2(self.two(F.relu(self.bn1(self.one(x)))))
        y += x
        return self.head(F.relu_(y))


class _OptionA(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(3, 8), conv(8, 10, stride=2), conv(10, 12)
        self.bn, self.head = nn.BatchNorm2d(12), Head(12)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.bn(self.two(F.relu(self.one(x))))
        return self.head(F.relu(y + self.shortcut(x[:, :, ::2, ::2])))


@net([8, 10, 4])
class PadAttribute(_OptionA):
    """Option A whose padding a module keeps: what meets the padding can leave as well."""

    def __init__(self):
        super().__init__()
        self.pad = (0, 0, 0, 0, 2, 2)

    def shortcut(self, x):
        return F.pad(x, self.pad)


@net([8, 10])
class PadConstant(_OptionA):
    """Option A with a constant in the code: channels that meet the padding stay."""

    def __init__(self):
        super().__init__()
        self.shortcut = lambda x: F.pad(x, (0, 0, 0, 0, 2, 2))


@net([4, 5, 6])
class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 5), conv(9, 6)
        self.bn, self.head = nn.BatchNorm2d(9), Head(15)

    def forward(self, x):
        one = self.a(x)
        two = self.b(F.relu(one))
        both = torch.cat([one, two], 1)
        return self.head(torch.cat([both, self.c(F.relu(self.bn(both)))], 1))


@net([5, 6])
class ConcatInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 5), conv(8, 6), Head(6)

    def forward(self, x):
        return self.head(F.relu(self.b(torch.cat([x, F.relu(self.a(x))], 1))))


@net([4, 6])
class Shuffle(nn.Module):
    """ShuffleNet v2's unit: chunk, one branch, concat, shuffle by view and transpose."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(3, 8), conv(4, 4, 1), conv(4, 4, groups=4)
        self.last, self.bn, self.head = conv(8, 6), nn.BatchNorm2d(4), Head(6)

    def forward(self, x):
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([left, self.bn(self.two(F.relu(self.one(right))))], 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(F.relu(self.last(x)))


@net([8, 3, 6])
class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down, self.up = conv(3, 8), conv(8, 3, 1), conv(3, 8, 1)
        self.last, self.head = conv(8, 6), Head(6)

    def forward(self, x):
        x = F.relu(self.stem(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.relu(self.last(x * gate)))


@net([8, 3])
class SqueezeExciteExpand(nn.Module):
    """The variant with linear layers, ``view(b, c, 1, 1)`` and ``expand_as``."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv(3, 8), nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8), nn.Sigmoid())
        self.head = Head(8)

    def forward(self, x):
        x = F.relu(self.stem(x))
        b, c, _, _ = x.size()
        gate = self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return self.head(x * gate.expand_as(x))


@net([4, 5, 6])
class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4, 1), conv(3, 5), conv(12, 6)
        self.head = Head(6)

    def forward(self, x):
        branches = [self.a(x), self.b(x), F.max_pool2d(x, 3, 1, 1)]
        return self.head(F.relu(self.c(torch.cat(branches, 1))))


@net([8])
class SharedTwice(nn.Module):
    """One module called twice: its inputs are its outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.bn, self.head = conv(3, 8), conv(8, 8), nn.BatchNorm2d(8), Head(8)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.bn(self.shared(x)))
        return self.head(x)


@net([8, 6])
class SharedOnTwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared, self.head = conv(3, 8), conv(3, 8, 1), conv(8, 6), Head(6)

    def forward(self, x):
        return self.head(F.relu(self.shared(F.relu(self.a(x)))) - self.shared(torch.tanh(self.b(x))))


@net([6, 8])
class NhwcFlatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc, self.out = conv(3, 6), nn.Linear(6 * 16, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.a(x)), 2).permute(0, 2, 3, 1)
        return self.out(F.relu(self.fc(x.flatten(1))))


@net([6, 12])
class ConvNext(nn.Module):
    """Channels last inside the block, a layer norm over channels, layer scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.dw = conv(3, 6), conv(6, 6, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale, self.head = nn.Parameter(torch.rand(6)), Head(6)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


@net([6, 5])
class WeightStandardised(nn.Module):
    """A convolution whose weight is computed: divided by its norm over what it sums."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        self.gain = nn.Parameter(torch.rand(5, 1, 1, 1) + 0.5)

    def forward(self, x):
        x = F.relu(self.a(x))
        w = self.b.weight
        w = self.gain * w * torch.rsqrt(w.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-6)
        return self.head(F.relu(F.conv2d(x, w, self.b.bias, padding=1)))


stack(
    "WeightNormLinear",
    [8, 6],
    lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.ReLU(), Scaled(8, 6), nn.ReLU(), nn.Linear(6, 4)],
    lambda: torch.randn(3, 5),
)


class Scaled(nn.Linear):
    """A linear layer whose weight is computed before use."""

    def forward(self, x):
        return F.linear(x, self.weight * 2.0, self.bias)


@net([4])
class GluChunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = conv(3, 8), Head(4)

    def forward(self, x):
        value, gate = self.a(x).chunk(2, dim=1)
        return self.head(value * torch.sigmoid(gate))


@net([4, 5])
class GluFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(4, 10), nn.Linear(5, 4)

    def forward(self, x):
        x = F.glu(self.a(x), dim=-1)
        y = self.b(x)
        half = y.shape[-1] // 2
        return self.out(y[..., :half] * torch.tanh(y[..., half:]))


ZOO["GluFunctional"] = Net(GluFunctional, tokens(4, 3), [4, 5])


@net([3, 5])
class MaxOut(nn.Module):
    """A view that puts the constant factor last: it is the pieces of a channel, for their extreme is taken."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(3, 5), Head(5)

    def forward(self, x):
        x = self.a(x)
        b, c, h, w = x.shape
        return self.head(F.relu(self.b(x.view(b, c // 2, 2, h, w).amax(2))))


@net([5])
class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = conv(3, 5), Head(10)

    def forward(self, x):
        return self.head(F.relu(self.a(x)).repeat(1, 2, 1, 1))


@net([6, 5])
class Flipped(nn.Module):
    """Flipped channels added to the channels: unit i leaves with unit n - 1 - i; flipped alone: an array operation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)).flip(1))))


@net([6, 5])
class Stacked(nn.Module):
    """Two branches stacked along a new dimension and summed, as selective kernels do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(3, 6, 1), conv(6, 5), Head(5)

    def forward(self, x):
        x = torch.stack([self.a(x), self.b(x)], dim=1)
        return self.head(F.relu(self.c((x * torch.softmax(x.mean((3, 4), keepdim=True), dim=1)).sum(1))))


@net([8, 6])
class Buffers(nn.Module):
    """Buffers per channel, one of them not persistent, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), Head(6)
        self.register_buffer("shift", torch.randn(8, 1, 1))
        self.register_buffer("scale", torch.rand(1, 6, 1, 1) + 0.5, persistent=False)
        self.register_buffer("unused", torch.randn(8))

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x) + self.shift)) * self.scale))


@net([8, 6])
class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.head = conv(3, 8), nn.BatchNorm2d(8), conv(8, 6), Head(6)
        self.a.requires_grad_(False)
        self.bn.weight.requires_grad_(False)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.bn(self.a(x))))))


@net([6, 5], lambda: {"picture": torch.randn(2, 3, 8, 8), "options": {"scale": torch.tensor(0.5)}})
class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, picture, options):
        x = F.relu(self.a(picture)) * options["scale"]
        return {"logits": self.head(F.relu(self.b(x))), "aux": [picture.mean(dim=(1, 2, 3))]}


@net([6, 5, 7])
class ListOfImages(nn.Module):
    """Takes a list of images of different sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(6, 5), conv(5, 7), Head(7)

    def forward(self, images):
        maps = [F.relu(self.b(F.relu(self.a(x[None])))) for x in images]
        return torch.cat([self.head(F.relu(self.c(m))) for m in maps])


ZOO["ListOfImages"] = Net(ListOfImages, lambda: [torch.randn(3, 8, 8), torch.randn(3, 6, 7)], [5, 6, 7])


@net([8, 5])
class InPlace(nn.Module):
    """Slices of a buffer written in place, additions in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 5), Head(5)

    def forward(self, x):
        y = self.a(x)
        y.mul_(2.0).clamp_(min=-1)
        y[:, :, 2:4] += 1.0
        y[:, :, :, 0] = 0.0
        return self.head(F.relu_(self.b(y)))


# ------------------------------------------------------------------------------------------------ linear nets
@net([7, 6, 5, 8], lambda: torch.randn(3, 5))
class BareParameters(nn.Module):
    """Parameters used by functional calls and operators."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7))
        self.w2, self.w3, self.w4 = (nn.Parameter(torch.randn(*s)) for s in ((7, 6), (5, 6), (5, 8)))
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(F.linear(x, self.w1, self.b1))
        x = torch.tanh(x @ self.w2)
        x = torch.tanh(torch.einsum("bi,oi->bo", x, self.w3))
        return self.out(F.silu(torch.matmul(x, self.w4)))


@net([6], lambda: torch.randint(0, 9, (2, 5)))
class TiedEmbedding(nn.Module):
    """The decoder's weight is the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(9, 6), nn.Parameter(torch.randn(1, 5, 6))
        self.mix, self.decoder = nn.Linear(6, 6), nn.Linear(6, 9)
        self.decoder.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x) + self.position
        return self.decoder(x + F.gelu(self.mix(x)))


@net([6, 8], lambda: torch.randn(3, 5))
class TiedLinear(nn.Module):
    """Two layers share weight and bias."""

    def __init__(self):
        super().__init__()
        self.inp, self.one, self.two, self.back, self.out = (
            nn.Linear(5, 6),
            nn.Linear(6, 8),
            nn.Linear(6, 8),
            nn.Linear(8, 6),
            nn.Linear(8, 4),
        )
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, x):
        x = F.relu(self.inp(x))
        x = x + self.back(F.relu(self.one(x)))
        return self.out(torch.tanh(self.two(x)))


@net([5, 12, 16], lambda: torch.randn(2, 6, 8))
class Mixer(nn.Module):
    """Token mixing through a transpose; the stream and both hidden widths."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(8, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.tokens = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6))
        self.channels = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.out(x.mean(1))


class HandRms(nn.Module):
    """Root mean square norm written by hand, as language models do."""

    follows = ""  # the parameter whose rows are the channels; empty: its own weight

    def __init__(self, width):
        super().__init__()
        self.weight, self.gone = nn.Parameter(torch.rand(width) + 0.5), []

    def keep_only(self, gone):
        self.gone = gone

    def forward(self, x):
        n = x.shape[-1] - len(self.gone)
        if self.gone:
            x = x.index_fill(-1, torch.tensor(self.gone), 0)
        return self.weight * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / n + 1e-6)


class Attention(nn.Module):
    """Multi-head self attention; ``kind`` says how heads are made."""

    def __init__(self, width, heads, head_dim, kind, fused=True):
        super().__init__()
        self.num_heads, self.kind, self.fused = heads, kind, fused
        inner = heads * head_dim
        if kind in ("packed", "chunked"):
            self.qkv = nn.Linear(width, 3 * inner)
        else:
            self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.proj = nn.Linear(inner, width)

    def forward(self, x):
        b, n, _ = x.shape
        if self.kind == "packed":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.kind == "chunked":
            q, k, v = (t.view(b, n, self.num_heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        else:
            q, k, v = (f(x).view(b, n, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.7)
        else:
            y = (q @ k.transpose(-2, -1) * 0.7).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class _Transformer(nn.Module):
    kind = "packed"
    norm: Callable[[int], nn.Module] = nn.LayerNorm

    def __init__(self):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(8, 12), type(self).norm(12), type(self).norm(12)
        self.cls = nn.Parameter(torch.randn(1, 1, 12))
        self.attention = Attention(12, 4, 3, self.kind, fused=self.kind != "manual")
        self.mlp = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


@net([12, 4, 10], tokens(), products=True)
class AttentionPacked(_Transformer):
    kind = "packed"


@net([12, 4, 10], tokens(), products=True)
class AttentionChunked(_Transformer):
    kind = "chunked"


@net([12, 4, 10], tokens(), products=True)
class AttentionSeparate(_Transformer):
    kind = "separate"


@net([12, 4, 10], tokens(), products=True)
class AttentionManual(_Transformer):
    kind = "manual"
    norm = HandRms


@net([12, 3], tokens(), products=True)
class AttentionSingle(nn.Module):
    """One head without any reshape: the width of the values can leave, that of the scores sets their scale and stays."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.q, self.k, self.v = nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(12, 3)
        self.out = nn.Linear(3, 4)

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        return self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


@net([6, 8], lambda: (torch.randn(2, 6, 5), torch.randn(2, 6, 5)))
class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, y):
        return self.out(F.relu(self.c(torch.tanh(self.a(x)) * torch.sigmoid(self.b(y)))))


class _HeadsNet(nn.Module):
    """A stream, attention by ``attend``, a head."""

    sizes = (8, 8, 8)

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 2
        self.embed, self.proj, self.head = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 4)
        self.q, self.k, self.v = (nn.Linear(10, n) for n in self.sizes)

    def split(self, x, heads):
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        y = self.attend(x).transpose(1, 2)
        return self.head(x + self.proj(y.reshape(*y.shape[:2], -1)))


@net([10, 2], tokens(), products=True)
class GroupedQueries(_HeadsNet):
    """Two query heads share a key and value head: three leave together."""

    sizes = (8, 4, 4)

    def __init__(self):
        super().__init__()
        self.num_kv_heads = 2

    def attend(self, x):
        q, k, v = self.split(self.q(x), self.num_heads), *(self.split(f(x), self.num_kv_heads) for f in (self.k, self.v))
        shared = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


@net([10, 4], tokens(), products=True)
class RelativePositions(_HeadsNet):
    """A table of biases with one column per head, gathered by position."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 4))
        positions = torch.arange(6)
        self.register_buffer("index", positions[:, None] - positions[None] + 5)

    def attend(self, x):
        q, k, v = (self.split(f(x), self.num_heads) for f in (self.q, self.k, self.v))
        bias = self.table[self.index.flatten()].view(6, 6, -1).permute(2, 0, 1)
        return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v


@net([10, 4], tokens(), products=True)
class TalkingHeads(_HeadsNet):
    """A linear layer over heads; queries and keys normalised within a head."""

    def __init__(self):
        super().__init__()
        self.talk, self.norm = nn.Linear(4, 4), nn.LayerNorm(2)

    def attend(self, x):
        q, k, v = (self.split(f(x), self.num_heads) for f in (self.q, self.k, self.v))
        scores = self.norm(q) @ self.norm(k).transpose(-2, -1)
        return self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1) @ v


@net([10, 4], tokens(), products=True)
class PooledKeys(_HeadsNet):
    """Heads stand among the samples while keys and values are convolved along the sequence."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Conv1d(2, 2, 3, stride=2, padding=1, groups=2)

    def attend(self, x):
        q, k, v = (self.split(f(x), self.num_heads) for f in (self.q, self.k, self.v))
        k, v = (self.pool(z.flatten(0, 1).transpose(1, 2)).transpose(1, 2).unflatten(0, (len(x), -1)) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


stack(
    "EncoderLayer",
    [8, 2, 12],
    lambda: [nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 2)],
    tokens(),
    products=True,
)


@net([12, 6, 10, 3], tokens(), products=True)
class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` with widths of its own for keys and values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 10)
        self.attention = nn.MultiheadAttention(12, 3, kdim=6, vdim=10, batch_first=True)
        self.out = nn.Linear(12, 2)

    def forward(self, x):
        a, b, c = (torch.tanh(f(x)) for f in (self.a, self.b, self.c))
        return self.out(a + self.attention(a, b, c)[0])


@net([3, 5, 4])
class SplitBySizes(nn.Module):
    """Unequal parts whose sizes a module keeps."""

    def __init__(self):
        super().__init__()
        self.sizes = [3, 5]
        self.a, self.b, self.c, self.head = conv(3, 8), conv(3, 4), conv(5, 4), Head(4)

    def forward(self, x):
        one, two = F.relu(self.a(x)).split(self.sizes, 1)
        return self.head(F.relu(self.b(one) + self.c(two)))


class BoundByChance(nn.Module):
    """An integer that counts nothing equals the bound of a slice."""

    def __init__(self):
        super().__init__()
        self.temperature = 4
        self.a, self.b, self.head = nn.Linear(5, 10), nn.Linear(5, 4), nn.Linear(10, 3)

    def forward(self, x):
        y, z = self.b(x), self.a(x)
        k = y.shape[1]
        return self.head(torch.cat([z[:, :k] + y, z[:, k:]], 1).relu()) / self.temperature


ZOO["BoundByChance"] = Net(BoundByChance, lambda: torch.randn(2, 5), [4, 6])


@net([2, 3, 6])
class DualPath(nn.Module):
    """The first channels are added, the others are joined; an integer says how many come first."""

    def __init__(self):
        super().__init__()
        self.n_added = 6
        self.a, self.b, self.head = conv(3, 8), conv(8, 9), Head(11)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.b(x)
        added = x[:, : self.n_added] + y[:, : self.n_added]
        return self.head(torch.cat([added, x[:, self.n_added :], y[:, self.n_added :]], 1).relu())


class KeysWithoutBias(nn.Module):
    """Swin v2 as torchvision has it: the thirds of a packed bias, by bounds that no attribute keeps; a mask of 12 x 12."""

    def __init__(self):
        super().__init__()
        self.n_heads = 3
        self.qkv, self.proj, self.head = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):  # (N, 12, 6)
        length = self.qkv.bias.numel() // 3
        bias = self.qkv.bias.clone()
        bias[length : 2 * length].zero_()
        b, t, c = x.shape
        q, k, v = F.linear(x, self.qkv.weight, bias).reshape(b, t, 3, self.n_heads, c // 3).permute(2, 0, 3, 1, 4)
        mask = x.new_zeros(12, 12)
        mask[3:6, :3] = -1.0
        y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) + mask).softmax(-1) @ v
        return self.head(self.proj(y.transpose(1, 2).reshape(b, t, -1)).relu().mean(1))


ZOO["KeysWithoutBias"] = Net(KeysWithoutBias, tokens(12, 6), [3, 6])


class TwoHeadsByEinsum(nn.Module):
    """Where one of two heads is left, einsum moves the dimension of extent 1 elsewhere."""

    def __init__(self):
        super().__init__()
        self.n_heads, self.head_dim = 2, 4
        self.qkv, self.merge, self.head = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):  # (N, T, 6)
        b, t, _ = x.shape
        q, k, v = (z.reshape(b, t, self.n_heads, self.head_dim).permute(0, 2, 1, 3) for z in self.qkv(x).chunk(3, -1))
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k).softmax(-1)
        y = torch.einsum("b h i j, b h j d -> b h i d", scores, v)
        return self.head(self.merge(y.permute(0, 2, 1, 3).reshape(b, t, -1)).relu().mean(1))


ZOO["TwoHeadsByEinsum"] = Net(TwoHeadsByEinsum, tokens(7, 6), [2, 6])


@net([6])
class SqueezedInPlace(nn.Module):
    """Dimensions that a tensor is robbed of, one by one and several at once."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = conv(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x).relu().mean((2, 3), keepdim=True)
        one, two = (y[:, None].clone() for _ in range(2))  # (N, 1, 6, 1, 1)
        one.squeeze_(-1).squeeze_(1).squeeze_(-1)
        two.squeeze_((1, -1, -2))
        return self.fc(one * two)


@net([2, 2, 5])
class Res2Net(nn.Module):
    """Parts of a fixed width, each added to what came of the one before."""

    def __init__(self):
        super().__init__()
        self.width = 2
        self.a, self.b, self.head = conv(3, 8), conv(8, 5), Head(5)
        self.convs = nn.ModuleList(conv(2, 2) for _ in range(3))

    def forward(self, x):
        parts = torch.split(F.relu(self.a(x)), self.width, 1)
        out = []
        for i, layer in enumerate(self.convs):
            y = parts[0] if i == 0 else out[-1] + parts[i]
            out.append(F.relu(layer(y)))
        return self.head(F.relu(self.b(torch.cat([*out, parts[3]], 1))))


@net([3, 5])
class Palindrome(nn.Module):
    """Channels plus the same channels in reverse order: unit i leaves with unit n - 1 - i."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(F.relu(self.b(x + x.flip(1))))


@net([4, 5])
class PartlyUpdated(nn.Module):
    """Half of the channels written in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(3, 4), conv(8, 5), Head(5)

    def forward(self, x):
        y = self.a(x)
        y[:, : y.shape[1] // 2] += self.b(x)
        return self.head(F.relu(self.c(y)))


@net([4, 5])
class Unfolded(nn.Module):
    """Patches as rows of a matrix."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), nn.Linear(36, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(F.relu(self.b(F.unfold(F.relu(self.a(x)), 3).transpose(1, 2))).mean(1))


@net([6, 5])
class BestTokens(nn.Module):
    """Positions chosen by a score, gathered over all channels."""

    def __init__(self):
        super().__init__()
        self.a, self.score, self.b, self.out = nn.Linear(8, 6), nn.Linear(6, 1), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.a(x))
        best = self.score(x).topk(3, dim=1).indices
        return self.out(F.relu(self.b(x.gather(1, best.expand(-1, -1, x.shape[-1])))).mean(1))


ZOO["BestTokens"] = Net(BestTokens, tokens(), [5, 6])


# ------------------------------------------------------------------------------------------------ what must stay whole
# what is removed would have had a share
stack("SoftmaxOverChannels", [5], lambda: [conv(3, 6), nn.Softmax(1), conv(6, 5), nn.ReLU(), Head(5)])


@net([5])
class ChannelAttentionConv(nn.Module):
    """ECA: a convolution along the channels fixes their order and number."""

    def __init__(self):
        super().__init__()
        self.a, self.eca, self.b, self.head = conv(3, 8), nn.Conv1d(1, 1, 3, padding=1), conv(8, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        gate = self.eca(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return self.head(F.relu(self.b(x * gate[:, :, None, None])))


@net([5])
class ChosenChannels(nn.Module):
    """Channels picked by number."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(4, 5), Head(5)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x))[:, [0, 3, 5, 6]])))


def build(name, seed=0, dtype=torch.float32):
    """A net of the zoo and its example: weights drawn, every norm's parameters and statistics not trivial."""
    torch.manual_seed(seed)
    entry = ZOO[name]
    model = entry.build()
    scatter_(model)
    model.to(dtype).train()
    example = entry.example()
    to = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    return model, torch.utils._pytree.tree_map(to, example)


def scatter_(model):
    """Give norms parameters and running statistics that differ from channel to channel."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    if getattr(module, "bias", None) is not None:
                        module.bias.normal_(std=0.3)
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 1.5)
