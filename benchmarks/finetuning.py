"""Training after the cut, the same for both sides of the compensation benchmark.

The recipe that adapted the networks to the JPEG copy: SGD with Nesterov momentum 0.9, weight decay 5e-4, batches of 128,
one cycle up to 0.02 and down, random flips and shifts by at most 4 pixels. The seed decides order and augmentation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 128
PEAK = 0.02
SHIFT = 4


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, seed: int) -> nn.Module:
    """Train in place on normalised images x (N, C, H, W) with classes y (N,)."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(y) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=generator).to(y.device)
        for rows in order[: len(y) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(augmented(x[rows], generator)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def augmented(x: Tensor, generator: torch.Generator, *, shift: int = SHIFT, flip: bool = True, fill: float = 0.0) -> Tensor:
    """Every image mirrored or not, and shifted; what moves in has the value ``fill``: 0 is the mean colour."""
    n, _, height, width = x.shape
    drawn = {"generator": generator, "device": generator.device}
    if flip:
        mirrored = torch.rand(n, **drawn).to(x.device) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
    padded = F.pad(x, [shift] * 4, value=fill)
    down, right = torch.randint(0, 2 * shift + 1, (2, n), **drawn).to(x.device)
    rows = down.view(-1, 1, 1) + torch.arange(height, device=x.device).view(1, -1, 1)
    columns = right.view(-1, 1, 1) + torch.arange(width, device=x.device)
    return padded[torch.arange(n, device=x.device).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2).contiguous()
