"""Random small networks: blocks drawn from a list of mechanisms, on a stream of random width."""

import random

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Stem, a few random blocks, a random end."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        width = 2 * draw.randint(2, 5)
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=draw.random() < 0.5)
        blocks = []
        for _ in range(draw.randint(2, 5)):
            block = draw.choice(BLOCKS)(width, draw)
            blocks.append(block)
            width = block.width
        self.blocks = nn.ModuleList(blocks)
        self.twice = draw.choice([None, *(i for i, b in enumerate(blocks) if b.keeps)])
        self.end = draw.choice(ENDS)(width, draw)

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.twice:
                x = torch.tanh(block(x))
        return self.end(x)


def norm(width, draw):
    kinds = [nn.BatchNorm2d(width), nn.InstanceNorm2d(width, affine=True), nn.Identity(), nn.GroupNorm(1, width)]
    if width % 2 == 0:
        kinds.append(nn.GroupNorm(2, width))
    return draw.choice(kinds)


def act(draw):
    return draw.choice([nn.ReLU(), nn.GELU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.Hardswish(), nn.SiLU()])


class Block(nn.Module):
    """``width``: channels out; ``keeps``: as many as in, so that it can run twice."""

    keeps = True

    def __init__(self, width, draw):
        super().__init__()
        self.width = width
        self.make(width, draw)

    def make(self, width, draw):
        raise NotImplementedError


class Plain(Block):
    keeps = False

    def make(self, width, draw):
        self.width = 2 * draw.randint(2, 6)
        self.conv = nn.Conv2d(width, self.width, draw.choice([1, 3]), padding=0 if draw.random() < 0.2 else 1)
        self.norm, self.act = norm(self.width, draw), act(draw)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Residual(Block):
    def make(self, width, draw):
        hidden = draw.randint(2, 7)
        self.one, self.two = nn.Conv2d(width, hidden, 3, padding=1, bias=False), nn.Conv2d(hidden, width, 1)
        self.norm, self.act, self.out = norm(hidden, draw), act(draw), norm(width, draw)

    def forward(self, x):
        return x + self.out(self.two(self.act(self.norm(self.one(x)))))


class Dense(Block):
    keeps = False

    def make(self, width, draw):
        grow = 2 * draw.randint(1, 3)
        self.width = width + grow
        self.norm, self.act, self.conv = norm(width, draw), act(draw), nn.Conv2d(width, grow, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.conv(self.act(self.norm(x)))], 1)


class Split(Block):
    """Chunk, work on one half, put together, shuffle."""

    def make(self, width, draw):
        if width % 2:
            self.half, self.conv = 0, nn.Conv2d(width, width, 1)
            return
        self.half = width // 2
        self.conv = nn.Conv2d(self.half, self.half, 3, padding=1)
        self.shuffle = draw.random() < 0.6

    def forward(self, x):
        if not self.half:
            return self.conv(x)
        one, two = x.chunk(2, 1)
        x = torch.cat([one, torch.relu(self.conv(two))], 1)
        if self.shuffle:
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return x


class Grouped(Block):
    keeps = False

    def make(self, width, draw):
        groups = draw.choice([g for g in (1, 2, 3, 4, 5) if width % g == 0])
        self.width = 2 * groups * draw.randint(1, 2)
        self.before = nn.Conv2d(width, width, 1)
        self.conv, self.act = nn.Conv2d(width, self.width, 3, padding=1, groups=groups), act(draw)
        self.after = nn.Conv2d(self.width, self.width, 1)

    def forward(self, x):
        return self.after(self.act(self.conv(self.before(x))))


class Depthwise(Block):
    def make(self, width, draw):
        hidden = draw.randint(2, 8)
        self.up, self.down = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.dw, self.norm, self.act = (
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            norm(hidden, draw),
            act(draw),
        )

    def forward(self, x):
        return self.down(self.act(self.norm(self.dw(self.up(x))))) + x


class SqueezeExcite(Block):
    def make(self, width, draw):
        hidden = draw.randint(2, 4)
        self.down, self.up, self.linear = nn.Linear(width, hidden), nn.Linear(hidden, width), draw.random() < 0.5

    def forward(self, x):
        b, c, _, _ = x.shape
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * (gate.view(b, c, 1, 1).expand_as(x) if self.linear else gate[:, :, None, None])


class Gate(Block):
    def make(self, width, draw):
        hidden = draw.randint(2, 5)
        self.up, self.down, self.kind = nn.Conv2d(width, 2 * hidden, 1), nn.Conv2d(hidden, width, 1), draw.randint(0, 2)

    def forward(self, x):
        y = self.up(x)
        if self.kind == 0:
            y = F.glu(y, 1)
        else:
            a, b = y.chunk(2, 1) if self.kind == 1 else (y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :])
            y = F.silu(a) * b
        return self.down(y)


class Attention(Block):
    """Self attention over positions, pre-norm, heads by attribute."""

    def make(self, width, draw):
        self.num_heads, self.kind = draw.choice([1, 2, 3]), draw.randint(0, 2)
        inner = self.num_heads * draw.randint(2, 3)
        self.norm = draw.choice([nn.LayerNorm, nn.RMSNorm, nn.Identity])(width)
        self.qkv, self.proj = nn.Linear(width, 3 * inner), nn.Linear(inner, width)

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.norm(x.flatten(2).transpose(1, 2))
        n = h * w
        if self.kind == 0:
            q, k, v = self.qkv(y).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (t.reshape(b, n, self.num_heads, -1).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        by_hand = self.kind == 2
        y = (q @ k.mT).softmax(-1) @ v if by_hand else F.scaled_dot_product_attention(q, k, v, scale=1.0)
        y = self.proj(y.transpose(1, 2).reshape(b, n, -1))
        return x + y.transpose(1, 2).reshape(b, c, h, w)


class Bare(Block):
    """Bare parameters: scale, shift, and a matrix used by an operator."""

    def make(self, width, draw):
        self.scale, self.shift = nn.Parameter(torch.rand(width, 1, 1) + 0.5), nn.Parameter(torch.randn(1, width, 1, 1))
        self.matrix = nn.Parameter(torch.randn(width, width) / 3)

    def forward(self, x):
        y = (x * self.scale + self.shift).permute(0, 2, 3, 1) @ self.matrix
        return torch.tanh(y).permute(0, 3, 1, 2)


class Resample(Block):
    def make(self, width, draw):
        self.kind = draw.randint(0, 2)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)

    def forward(self, x):
        x = F.avg_pool2d(x, 2, ceil_mode=True)
        if self.kind == 0:
            return F.interpolate(x, scale_factor=2)
        return self.up(x) if self.kind == 1 else F.pad(x, (1, 0, 1, 1))


BLOCKS = [Plain, Residual, Dense, Split, Grouped, Depthwise, SqueezeExcite, Gate, Attention, Bare, Resample]


class PoolEnd(nn.Module):
    def __init__(self, width, draw):
        super().__init__()
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class FlattenEnd(nn.Module):
    def __init__(self, width, draw):
        super().__init__()
        self.last = draw.random() < 0.5
        hidden = draw.randint(2, 6)
        self.fc, self.out = nn.Linear(4 * width, hidden), nn.Linear(hidden, 4)

    def forward(self, x):
        x = F.adaptive_max_pool2d(x, 2)
        x = x.permute(0, 2, 3, 1) if self.last else x
        return self.out(torch.relu(self.fc(x.flatten(1))))


ENDS = [PoolEnd, FlattenEnd]
