"""Units that are replaced by their means: against forwards written by hand, and against cuts whose means were folded."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import Budget, Pruner, criteria, trace
from actprune.compensation import Mean
from actprune.core.calling import call
from actprune.core.errors import ObservationError
from actprune.pruning.plans import compensated, draft
from actprune.pruning.replacement import Replacement
from zoo import build


def replaced(model, x, units, data=None):
    """Output with the units at the means over ``data``."""
    replacement = Replacement(model.eval(), trace(model, x))
    with torch.no_grad():
        with replacement.observing():
            call(model, x if data is None else data)
        with replacement.replacing():
            replacement.choose(units)
            return call(model, x)


class Residual(nn.Module):
    """A stream that is read twice, and a branch of padded convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.b, self.head = nn.Conv2d(5, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        stream = F.relu(self.stem(x))
        stream = stream + self.b(F.relu(self.a(stream)))
        return self.head(F.relu(stream).mean((2, 3)))

    def by_hand(self, x, stream_units, inner_units):
        stream = F.relu(self.stem(x))
        read = mean_of(stream, stream_units)
        inner = mean_of(F.relu(self.a(read)), inner_units, F.relu(self.a(stream)))
        first = stream + self.b(inner)
        pooled = F.relu(first).mean((2, 3))
        whole = F.relu(stream + self.b(F.relu(self.a(stream)))).mean((2, 3))
        return self.head(mean_of(pooled, stream_units, whole))


def mean_of(x, units, observed=None):
    """The units at their means over what was observed; ``observed`` where that is not what stands there now."""
    observed = x if observed is None else observed
    x = x.clone()
    for unit in units:
        x[:, unit] = observed[:, unit].double().mean().float()
    return x


@pytest.mark.parametrize(("stream", "inner"), [([], []), ([2], []), ([], [0, 4]), ([5, 1], [3])])
def test_every_reader_gets_the_mean(stream, inner):
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 3, 6, 6)
    ours = replaced(model, x, {"stem": stream, "a": inner})
    torch.testing.assert_close(ours, model.by_hand(x, stream, inner).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Mlp", "Flatten"])
def test_it_is_what_a_cut_with_means_folded_computes(name):
    """Without padding a constant times weights is a bias: nothing of the graph's sites is used for the cut itself."""
    if name == "Mlp":
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(6, 5)
    else:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5), nn.ReLU(), nn.Linear(5, 3))
        x = torch.randn(4, 2, 6, 6)
    graph = trace(model, x)
    units = {group.name: range(0, group.size, 3) for group in graph.unlocked}
    for name, gone in units.items():
        alone = {name: gone}
        ours = replaced(model, x, alone)
        twin = copy.deepcopy(model)
        pruner = Pruner(twin, x, criteria.Magnitude(), Budget(params=0.999), compensation=Mean())
        with pruner.observe() as observation, torch.no_grad():
            observation.begin_batch(torch.arange(len(x)))
            call(twin, x)
        plan = draft(twin, pruner.graph, alone)
        pruner.execute(compensated(plan, twin, pruner.graph, alone, observation, Mean()))
        torch.testing.assert_close(ours, call(twin, x).detach(), rtol=1e-4, atol=1e-5)


def test_operands_of_bare_contractions():
    model, x = build("BareParameters")
    one = mean_of(F.relu(F.linear(x, model.w1, model.b1)), [1, 4])
    two = torch.tanh(one @ model.w2)
    whole = torch.tanh(F.relu(F.linear(x, model.w1, model.b1)) @ model.w2)
    two = mean_of(two, [0], whole)
    by_hand = model.out(F.silu(torch.tanh(two @ model.w3.T) @ model.w4))
    names = {g.size: g.name for g in trace(model, x).unlocked}
    torch.testing.assert_close(replaced(model, x, {names[7]: [1, 4], names[6]: [0]}), by_hand.detach(), rtol=1e-5, atol=1e-6)


def test_nothing_chosen_changes_nothing_and_nothing_stays_behind():
    model, x = build("BareParameters")
    graph = trace(model, x)
    replacement = Replacement(model, graph)
    plain = model(x)
    with replacement.observing():
        model(x)
    with replacement.replacing():
        assert torch.equal(model(x), plain)
        replacement.choose({graph.unlocked[0].name: [0]})
        assert not torch.equal(model(x), plain)
        replacement.choose({})
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_means_are_over_all_batches():
    torch.manual_seed(1)
    model, x = Residual().eval(), torch.randn(6, 3, 6, 6)
    replacement = Replacement(model, trace(model, x))
    with torch.no_grad():
        with replacement.observing():
            for part in x.split([1, 3, 2]):
                model(part)
        with replacement.replacing():
            replacement.choose({"a": [1, 2]})
            ours = model(x)
    torch.testing.assert_close(ours, model.by_hand(x, [], [1, 2]).detach(), rtol=1e-5, atol=1e-6)


def test_means_have_to_be_observed():
    model, x = build("ConvBn")
    replacement = Replacement(model, trace(model, x))
    with replacement.replacing(), pytest.raises(ObservationError, match="saw 0 samples"):
        replacement.choose({"0": [1]})
