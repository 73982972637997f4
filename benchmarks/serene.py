"""What SeReNe's decay adds to a training step: sensitivity and decay against forward, backward and AdamW alone.

    python benchmarks/serene.py [--models lenet300,lenet5,resnet20] [--batch 64] [--repeats 30] [--threads 1]

Full sensitivity takes one backward pass over the activations for every output (10 here), the lower bound one, the local one
none. Steps of all modes are interleaved, so that what else the machine does weighs on each alike; prints medians and ratios to
the plain step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actprune import trace
from actprune.models.lenet import LeNet5
from actprune.models.mlp import MLP
from actprune.models.resnet import CifarResNet
from actprune.sparsity import InsensitivityDecay
from actprune.sparsity.preactivations import MODES

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "lenet300": (lambda: MLP(10, 1, 28, hidden=(300, 100)), (1, 28, 28)),
    "lenet5": (lambda: LeNet5(10, 1, 28), (1, 28, 28)),
    "resnet20": (lambda: CifarResNet(20), (3, 32, 32)),
}


class Mode:
    """One network with its optimizer, and the decay after each step or none."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, mode: str | None) -> None:
        self.model, self.x, self.y = model.train(), x, y
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.decay = None if mode is None else InsensitivityDecay(model, trace(model, x[:1]), 1e-4, mode)

    def step(self) -> float:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        with nullcontext() if self.decay is None else self.decay.watching():
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        if self.decay is not None:
            self.decay.step()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="lenet300,lenet5,resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'network':<12}{'sensitivity':<14}{'ms per step':>12}{'ratio':>8}")
    for name in options.models.split(","):
        make, shape = MODELS[name]
        model, x, y = make(), torch.randn(options.batch, *shape), torch.randint(0, 10, (options.batch,))
        modes = {mode or "none": Mode(copy.deepcopy(model), x, y, mode) for mode in (None, *MODES)}
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        for repeat in range(options.repeats + 2):
            for mode, steps in modes.items():
                taken = steps.step()
                if repeat >= 2:
                    seconds[mode].append(taken)
        base = statistics.median(seconds["none"])
        for mode, taken in seconds.items():
            median = statistics.median(taken)
            print(f"{name:<12}{mode:<14}{median * 1e3:>12.2f}{median / base:>8.2f}")


if __name__ == "__main__":
    main()
