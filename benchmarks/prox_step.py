"""Time of one proximal step against torch's AdamW (foreach), on the parameters of ResNet-56 for CIFAR.

    python benchmarks/prox_step.py [--repeats 30] [--threads 1] [--device cpu]

Steps of all optimizers are interleaved, so that what else the machine does weighs on each alike; prints medians and
the ratio. With one thread on a CPU the time is that of the thread, without what other processes take. The bar is 2.5.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from actprune.sparsity import ProxAdamW, RowGroup
from actprune.sparsity.groups import Piece


def resnet56_parameters(device: str) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
    """Parameters with gradients, and (convolution, norm scale, norm shift) by their place in the list."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = []
    layers = []
    width_before = 3
    for width in (16,) * 19 + (32,) * 18 + (64,) * 18:
        layers.append((len(shapes), len(shapes) + 1, len(shapes) + 2))
        shapes += [(width, width_before, 3, 3), (width,), (width,)]
        width_before = width
    shapes += [(10, 64), (10,)]
    params = []
    for shape in shapes:
        param = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.05).to(device))
        param.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device)
        params.append(param)
    return params, layers


def filter_groups(params: list[Tensor], layers: list[tuple[int, int, int]]) -> list[RowGroup]:
    """Units as surgery sees them: a filter with its norm's scale and shift."""
    return [
        RowGroup(f"conv{i}", tuple(Piece(params[j], 0, torch.arange(len(params[j])).unsqueeze(1)) for j in layer))
        for i, layer in enumerate(layers)
    ]


def build(name: str, device: str, lam: float) -> torch.optim.Optimizer:
    params, layers = resnet56_parameters(device)
    if name == "AdamW":
        return torch.optim.AdamW(params, lr=1e-3, foreach=True)
    penalty = "group_mcp" if "mcp" in name else "group_lasso"
    groups = filter_groups(params, layers) if "units" in name else None
    return ProxAdamW(params, lr=1e-3, penalty=penalty, lam=lam, gamma=2e3, groups=groups, foreach=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lam", type=float, default=1e-5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    alone = options.device == "cpu" and options.threads == 1
    now = time.thread_time if alone else time.perf_counter
    names = ["AdamW", "group_lasso, input channels", "group_lasso, units", "group_mcp, input channels"]
    optimizers = {name: build(name, options.device, options.lam) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(options.repeats + 3):
        for name, optimizer in optimizers.items():
            begin = now()
            optimizer.step()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if repeat >= 3:
                seconds[name].append(now() - begin)

    base = statistics.median(seconds["AdamW"])
    print(f"{'optimizer':<32}{'ms per step':>12}{'ratio':>8}")
    for name in names:
        median = statistics.median(seconds[name])
        print(f"{name:<32}{median * 1e3:>12.2f}{median / base:>8.2f}")


if __name__ == "__main__":
    main()
