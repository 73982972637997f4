"""From the command line to units that can be removed."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from actprune import trace
from actprune.sparsity import GroupLasso, ProxAdamW, ProxSGD, unit_groups, zero_units

CONF = Path(__file__).parents[2] / "conf"


def build(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose(config_name=None, overrides=list(overrides)).optimizer)


@pytest.mark.parametrize("name", ["prox_sgd", "prox_adam", "prox_adamw"])
@pytest.mark.parametrize("penalty", ["group_lasso", "group_mcp", "null"])
def test_configs(name, penalty):
    model = nn.Linear(3, 2)
    partial = build(f"+optimizer={name}", f"optimizer.penalty={penalty}", "optimizer.lam=0.125")
    optimizer = partial(model.parameters())
    group = optimizer.param_groups[0]
    assert group["penalty"] == (None if penalty == "null" else penalty)
    assert group["lam"] == 0.125
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rate = group["lr"] / (1 - group["momentum"]) if isinstance(optimizer, ProxSGD) else group["lr"] / group["eps"]
    assert group["gamma"] > rate  # exact for every unit as delivered


def test_a_unit_that_became_zero_changes_nothing_when_it_leaves():
    torch.manual_seed(0)
    convs = (nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, bias=False))
    model = nn.Sequential(*convs, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    x = torch.randn(64, 2, 6, 6)
    y = (x[:, 0].mean((1, 2)) > 0).long()
    groups = unit_groups(model, trace(model, x[:2]))
    optimizer = ProxAdamW(model.parameters(), lr=0.01, penalty=GroupLasso(0.001), groups=groups)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    zero = zero_units(groups)
    assert set(zero) == {"0", "3"}
    assert all(0 < mask.sum() < len(mask) for mask in zero.values())
    model.eval()
    before = model(x)
    assert (before.argmax(1) == y).float().mean() > 0.9
    with torch.no_grad():  # the readers' side of the units goes too
        model[3].weight[:, zero["0"]] = 0
        model[8].weight[:, zero["3"]] = 0
    assert torch.equal(model(x), before)
