"""Networks with complex weights: magnitudes are observed, both parts of a weight count, and neither is lost."""

import pytest
import torch
from torch import nn

import actprune
from actprune import criteria
from actprune.compensation import LeastSquares, Mean
from actprune.pruning.replacement import Replacement


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: channels are mixed by a complex matrix per frequency."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 8, 1), nn.Conv1d(6, 3, 1)
        self.mixes = nn.Parameter(torch.randn(8, 6, 5, dtype=torch.cfloat) / 3)

    def forward(self, x):
        modes = torch.fft.rfft(self.first(x))[..., :5]
        return self.last(torch.fft.irfft(torch.einsum("bix,iox->box", modes, self.mixes), n=x.shape[-1]))


@pytest.mark.parametrize("compensation", [None, Mean(), LeastSquares()], ids=["none", "mean", "least squares"])
def test_complex_weights_that_stay_are_what_they_were(compensation, caplog):
    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.rand(64, 2, 16)
    before, mixes = model(x).detach(), model.mixes.detach().clone()
    pruner = actprune.Pruner(model, x[:1], criteria.Variance(), actprune.Budget(params=0.7), compensation=compensation)
    with torch.no_grad(), pruner.observe(64) as observation:
        for number, batch in enumerate(x.split(32)):
            observation.begin_batch(torch.arange(32 * number, 32 * number + 32))
            model(batch)
    pruner.execute(pruner.plan(observation))
    removed = pruner.record.removed["mixes"]
    for dim, gone in removed.items():
        stays = torch.tensor([k for k in range(mixes.shape[dim]) if k not in gone])
        mixes = mixes.index_select(dim, stays)
    assert torch.equal(model.mixes, mixes)
    assert mixes.imag.abs().min() > 0
    assert model(x).shape == before.shape
    assert compensation is None or "nothing is folded into complex weights" in caplog.text


def test_magnitudes_are_observed():
    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.rand(64, 2, 16)
    pruner = actprune.Pruner(
        model, x[:1], criteria.MeanActivation(), actprune.Budget(params=0.7), compensation=None, positions=None
    )
    with torch.no_grad(), pruner.observe(64) as observation:
        observation.begin_batch(torch.arange(64))
        model(x)
        means = torch.fft.rfft(model.first(x))[..., :5].abs().mean((0, 2)).double()
    scores = pruner.scores(observation)
    name = next(group.name for group in pruner.graph.unlocked if group.size == 8)
    assert torch.allclose(scores[name], means, rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_both_parts_of_a_weight_count(p):
    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.rand(4, 2, 16)
    with torch.no_grad():
        model.mixes.real.zero_()
    pruner = actprune.Pruner(model, x, criteria.Magnitude(p), actprune.Budget(params=0.7), compensation=None)
    scores = pruner.scores(pruner.observation())
    name = next(group.name for group in pruner.graph.unlocked if group.size == 8)
    own = torch.cat([model.first.weight.flatten(1), model.first.bias[:, None], model.mixes.imag.flatten(1)], 1).double()
    assert torch.allclose(scores[name], torch.linalg.vector_norm(own, ord=p, dim=1))


class Phases(nn.Module):
    """Every sample and position of a channel is the same complex number."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(1, 6, dtype=torch.cfloat), nn.Linear(6, 2, dtype=torch.cfloat)

    def forward(self, x):
        return torch.view_as_real(self.last(self.first(torch.ones_like(x, dtype=torch.cfloat))))


def test_what_stands_in_for_a_unit_is_its_complex_mean():
    torch.manual_seed(0)
    model, x = Phases().eval(), torch.rand(5, 1)
    graph = actprune.trace(model, x)
    (group,) = graph.unlocked
    replacement = Replacement(model, graph)
    with torch.no_grad():
        with replacement.observing():
            whole = model(x)
        with replacement.replacing():
            replacement.choose({group.name: range(group.size)})
            torch.testing.assert_close(model(x), whole)


def test_complex_layers_are_not_refitted(caplog):
    model = nn.Sequential(nn.Linear(4, 12, dtype=torch.cfloat), nn.Tanh(), nn.Linear(12, 3, dtype=torch.cfloat)).eval()
    x = torch.randn(64, 4, dtype=torch.cfloat)
    last = model[2].weight.detach().clone()
    actprune.prune(model, x, data=x.split(16), criterion=criteria.Magnitude(), budget=actprune.Budget(units=0.5))
    assert model[2].in_features == 6
    assert all(any(torch.equal(column, whole) for whole in last.T) for column in model[2].weight.detach().T)
    assert "cannot be refitted: 0.weight, 2.weight" in caplog.text
