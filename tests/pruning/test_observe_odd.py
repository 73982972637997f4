"""What is observed where layers read in odd ways: other kernels under inference mode, packed sequences, steps first."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from actprune import Budget, Pruner, Selection, criteria, prune
from actprune.compensation import LeastSquares, Mean
from actprune.core.errors import ObservationError
from actprune.core.labels import is_class_vector
from actprune.core.views import Criterion, Statistic
from actprune.statistics import ClassHistogram, Density
from zoo import ZOO, build


def observed(model, batches, mode, criterion=criteria.Variance):
    pruner = Pruner(model, batches[0][:2], criterion(), Budget(params=0.9), compensation=Mean(), positions=None)
    with pruner.observe() as observation, mode():
        start = 0
        for x in batches:
            observation.begin_batch(torch.arange(start, start + len(x)))
            model(x)
            start += len(x)
    folds = [statistic.compute() for _, statistic in observation.folds.values()]
    return pruner.scores(observation), folds


@pytest.mark.parametrize("name", [name for name in ZOO if isinstance(ZOO[name].example(), Tensor)])
def test_inference_mode_changes_nothing(name):
    """There a linear layer runs as a product of another rank."""
    model, example = build(name, dtype=torch.float64)
    model.eval()
    if not example.is_floating_point() or not Pruner(model, example, criteria.Random(), Budget(params=1.0)).graph.unlocked:
        pytest.skip("the case is about networks that read numbers and can be cut")
    torch.manual_seed(1)
    batches = [torch.randn(6, *example.shape[1:], dtype=torch.float64) for _ in range(2)]
    try:
        expected = observed(model, batches, torch.no_grad)
    except ObservationError:
        pytest.skip("a group of this network is read nowhere that can be observed")
    scores, folds = observed(model, batches, torch.inference_mode)
    for group, values in expected[0].items():
        torch.testing.assert_close(scores[group], values)
    for one, other in zip(folds, expected[1], strict=True):
        torch.testing.assert_close(one, other)


class OwnLoop(nn.LSTM):
    """Hidden states are read step by step, by code that PyTorch did not write."""

    def forward(self, x):
        h, seen = x.new_zeros(len(x), self.hidden_size), []
        for step in x.unbind(1):
            h = torch.tanh(F.linear(step, self.weight_ih_l0) + F.linear(h, self.weight_hh_l0)).chunk(4, -1)[0]
            seen.append(h)
        return torch.stack(seen, 1)


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.loop, self.head = nn.Linear(3, 6), OwnLoop(6, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.loop(self.embed(x).relu())[:, -1])


def test_a_recurrent_layer_with_a_loop_of_its_own_is_watched_inside():
    torch.manual_seed(0)
    model, x = Steps().eval(), torch.randn(40, 3, 3)
    pruner = Pruner(model, x[:2], criteria.Variance(), Budget(params=0.9), compensation=Mean(), positions=None)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(40))
        model(x)
    read = defaultdict(list)
    for number, (_, statistic) in observation.folds.items():
        read[pruner.graph.consumers[number].weight].append(statistic.compute()[:, 0])
    with torch.no_grad():
        inputs, hidden = model.embed(x).relu(), model.loop(model.embed(x).relu())
    torch.testing.assert_close(read["head.weight"][0].float(), hidden[:, -1].mean(0), rtol=1e-4, atol=1e-6)
    for number, means in enumerate(read["loop.weight_ih_l0"]):
        torch.testing.assert_close(means.float(), inputs[:, number].mean(0), rtol=1e-4, atol=1e-6)
    for means in read["loop.weight_hh_l0"]:
        assert min((means.float() - h).abs().max() for h in (torch.zeros(6), *hidden.mean(0))) < 1e-6


NORMS = [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm]


@pytest.mark.parametrize("normed", NORMS)
def test_products_that_compute_a_weight_are_no_sites(normed):
    """They run before the layer itself, in a hook or in a module of their own."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), normed(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
        torch.randn(64, 4),
    )
    model(x)
    scores, _ = observed(model.eval(), [x], torch.no_grad)
    read = model[0](x).relu()
    expected = [read.var(0, correction=0), model[2](read).relu().var(0, correction=0)]
    for said, values in zip(scores.values(), expected, strict=True):
        torch.testing.assert_close(said.float(), values.detach())


class Listed(nn.Module):
    """Bare matrices in a forward that also runs layers out of a list, between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.gates = nn.Linear(5, 8), nn.ModuleList([nn.Linear(8, 8)])
        self.inner, self.outer = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(3, 8))

    def read(self, x):
        x = self.stem(x).relu()
        gate = self.gates[0](x).sigmoid()
        return x, F.linear(x, self.inner).relu() * gate * 100

    def forward(self, x):
        return F.linear(self.read(x)[1], self.outer)


def test_bare_matrices_are_watched_where_layers_run_out_of_a_list():
    torch.manual_seed(0)
    model, x = Listed().eval(), torch.randn(64, 5)
    scores, _ = observed(model, [x], torch.no_grad)
    for said, values in zip(scores.values(), model.read(x), strict=True):
        torch.testing.assert_close(said.float(), values.var(0, correction=0).detach(), rtol=1e-4, atol=1e-6)


class Recurrent(nn.Module):
    def __init__(self, batch_first, packed=False):
        super().__init__()
        self.embed, self.gru, self.head = nn.Linear(3, 4), nn.GRU(4, 5, batch_first=batch_first), nn.Linear(5, 2)
        self.lengths = torch.tensor([5, 3, 3, 1]) if packed else None

    def forward(self, x):
        x = self.embed(x).tanh()
        if self.lengths is not None:
            x = pack_padded_sequence(x, self.lengths[: len(x)], batch_first=True)
        return self.head(self.gru(x)[1][0])


class PerClass(criteria.LabelInformation):
    """Keeps what each class's samples were."""

    def statistics(self):
        return {"per_class": Kept}


class Kept(ClassHistogram):
    def __init__(self, n_units):
        super().__init__(n_units, bins=4)
        self.seen = []

    def update(self, x, sample_ids, labels=None, **_):
        assert is_class_vector(labels, len(x))
        self.seen.append((x.clone(), labels.clone()))

    def check(self):
        pass


@pytest.mark.parametrize("steps", [4, 7, 8])
@pytest.mark.parametrize("batch_first", [True, False])
def test_samples_of_recurrent_layers_are_told_from_their_steps(batch_first, steps):
    """Also where there are as many of one as of the other, or a multiple."""
    torch.manual_seed(0)
    model, labels = Recurrent(batch_first).eval(), torch.tensor([0, 1, 2, 3])
    x = torch.randn(4, steps, 3)
    x = x if batch_first else x.movedim(1, 0)
    pruner = Pruner(model, x, PerClass(), Budget(params=0.9), compensation=None, positions=None)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(4), labels)
        model(x)
        expected = model.embed(x).tanh()
    seen, given = _only(observation)
    per_sample = expected if batch_first else expected.movedim(1, 0)
    torch.testing.assert_close(seen.mean(2), per_sample.mean(1))
    assert torch.equal(given, labels)


def _only(observation):
    (statistic,) = observation.scores["embed"]["per_class"]
    (one,) = statistic.seen
    return one


def test_rows_of_packed_sequences_are_no_samples():
    torch.manual_seed(0)
    model, x = Recurrent(True, packed=True).eval(), torch.randn(4, 5, 3)
    labels = torch.tensor([0, 1, 0, 1])
    pruner = Pruner(model, x, criteria.LabelInformation(), Budget(params=0.9), compensation=None)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(4), labels)
        with pytest.raises(ObservationError, match="no dimension of what it reads counts the 4 samples"):
            model(x)


@pytest.mark.parametrize("criterion", [lambda: criteria.LabelInformation(pool="positions"), criteria.Entropy])
def test_the_batch_of_a_nan_is_named_where_some_batches_are_not_read(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
    sizes = [1] * 8 + [6]
    pruner = Pruner(model, torch.randn(2, 3, 8, 8), criterion(), Budget(params=0.9), compensation=None)
    with pruner.observe(5000) as observation, torch.no_grad():
        assert observation._sampling._density == Density(2, halved=True)
        for number, n in enumerate(sizes):
            observation.begin_batch(torch.arange(n) + 10 * number, torch.zeros(n, dtype=torch.int64))
            x = torch.randn(n, 3, 8, 8)
            model(x * torch.nan if number == 8 else x)
    with pytest.raises(ObservationError, match="first in batch 8"):
        observation.check(pruner.graph)


class SometimesSkipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.skips = False

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(x if self.skips else x + self.b(x).relu())


def test_the_batch_of_a_nan_is_named_where_a_branch_was_skipped():
    torch.manual_seed(0)
    model = SometimesSkipped().eval()
    pruner = Pruner(model, torch.randn(2, 3), criteria.Entropy(), Budget(params=0.9), compensation=Mean())
    with pruner.observe() as observation, torch.no_grad():
        for number in range(7):
            observation.begin_batch(torch.arange(4) + 4 * number)
            model.skips = number == 2
            x = torch.randn(4, 3)
            model(x * torch.nan if number == 5 else x)
            assert observation.scores
            assert observation.folds
    statistics = observation._statistics()
    assert {s.first_nonfinite.min().item() for s in statistics} == {5.0}


def test_the_maps_that_were_read_last_decide_over_borders():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    pruner = Pruner(model.eval(), torch.randn(2, 3, 16, 16), criteria.Entropy(), Budget(params=0.9), compensation=Mean())
    with pruner.observe() as observation, torch.no_grad():
        for number, size in enumerate((16, 16, 4, 16, 16)):
            observation.begin_batch(torch.arange(2) + 2 * number)
            model(torch.randn(2, 3, size, size))
            layer = next(layer for layer, _ in observation.folds.values() if layer.name == "1")
            assert layer.space == (size, size)


class Encoder(nn.Module):
    """PyTorch runs each of its layers as one kernel in evaluation, and nests batches of which a mask leaves out steps."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x, padded=None):
        return self.head(self.encoder(x, src_key_padding_mask=padded).mean(1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("compensation", [Mean(), LeastSquares()])
def test_layers_whose_forwards_pytorch_passes_over_are_observed(compensation, padded):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(6, 5, 8)
    inputs = {"x": x, "padded": torch.arange(5).expand(6, 5) > torch.arange(6).unsqueeze(1)} if padded else x
    own = [f"encoder.layers.{number}.self_attn" for number in range(2)]  # else operands of attention are watched, with hooks
    wanted = {"selection": Selection(ignore=own), "compensation": compensation}
    record = prune(model, inputs, [inputs], criterion=criteria.Variance(), budget=Budget(units=0.5), **wanted)
    assert record.widths["encoder.layers.0.linear1"][1] < 12
    assert torch.backends.mha.get_fastpath_enabled()


class Totals(Statistic):
    """No more than the contract asks for."""

    def __init__(self, n_units):
        super().__init__()
        self.n_units = n_units
        self.add_state("n_samples", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(n_units, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x, sample_ids, labels=None):
        self.n_samples += len(x)
        self.total += x.sum((0, 2), dtype=torch.float64)

    def compute(self):
        return self.total / self.n_samples


def test_a_statistic_needs_nothing_but_what_the_contract_asks_for():
    class Average(Criterion):
        def statistics(self):
            return {"totals": Totals}

        def score(self, view):
            return view.statistics["totals"][0].compute()

    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), list(torch.randn(6, 3).split(4))
    scores, _ = observed(model, batches, torch.no_grad, Average)
    torch.testing.assert_close(scores["0"], model[:2](torch.cat(batches)).detach().double().mean(0))
