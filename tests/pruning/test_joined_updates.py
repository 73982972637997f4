"""Updates are joined where that changes nothing, and only there."""

import torch
from torch import nn

from actprune import Budget, Pruner
from actprune.compensation import LeastSquares, Mean
from actprune.criteria import Reconstruction
from actprune.pruning.updates import Updates
from actprune.statistics import Histogram


def test_reconstruction_sees_variances_over_positions_with_either_compensation():
    """Unit 0 varies inside its maps and not between them; unit 1 hardly varies at all and has to leave."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        model[1].weight.fill_(1.0)
    x = torch.randn(64, 2, 16, 16)
    x[:, 0] -= x[:, 0].mean((1, 2), keepdim=True)
    x[:, 1] = 0.1 * torch.randn(64, 1, 1)
    for compensation in (Mean(), LeastSquares()):
        pruner = Pruner(model, x[:1], Reconstruction(), Budget(params=0.9), compensation=compensation)
        with pruner.observe() as observation, torch.no_grad():
            observation.begin_batch(torch.arange(64))
            model(x)
        assert pruner.plan(observation).removed["0.weight"] == {0: [1]}


def test_statistics_with_other_settings_are_not_joined():
    torch.manual_seed(0)
    made = [Histogram(4, bins=8), Histogram(4, bins=8, zero_bin=False), Histogram(4, bins=8), Histogram(4, bins=16)]
    alone = [Histogram(4, bins=8), Histogram(4, bins=8, zero_bin=False), Histogram(4, bins=8), Histogram(4, bins=16)]
    updates = Updates()
    for _ in range(3):
        ids = torch.arange(6)
        for one, other in zip(made, alone, strict=True):
            x = torch.randn(6, 4, 5).relu()
            updates.add("histogram", lambda n: Histogram(n, bins=8), one, x, ids)
            other.update(x, ids)
        updates.flush()
    for one, other in zip(made, alone, strict=True):
        torch.testing.assert_close(one.compute(), other.compute(), rtol=0, atol=0)


def test_a_statistic_that_is_read_twice_in_a_batch_counts_twice():
    torch.manual_seed(0)
    made, alone, updates = [Histogram(3, bins=8) for _ in range(3)], [Histogram(3, bins=8) for _ in range(3)], Updates()
    for batch in range(3):
        ids = torch.arange(4) + 4 * batch
        for number in (0, 1, 1, 2):
            x = torch.randn(4, 3, 2)
            updates.add("histogram", lambda n: Histogram(n, bins=8), made[number], x, ids)
            alone[number].update(x, ids)
        updates.flush()
    for one, other in zip(made, alone, strict=True):
        torch.testing.assert_close(one.compute(), other.compute(), rtol=0, atol=0)
