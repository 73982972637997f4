"""The whole pipeline, and one clear exception for everything that cannot be."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from actprune import Budget, Pruner, Selection, SurgeryRecord, apply_record, criteria, prune, trace
from actprune.core.errors import BudgetError, ConfigError, ObservationError, SurgeryError, TraceError
from actprune.core.plan import Plan
from actprune.core.record import record_of
from masked import counted, difference, masked, outputs
from zoo import ZOO, build

CUTTABLE = [name for name in ZOO if ZOO[name].sizes]


@pytest.mark.parametrize("name", CUTTABLE)
def test_half_of_what_can_leave_leaves(name):
    """Zero configuration on every net: forward and backward work, budget met, model equal to its masked reference."""
    model, example = build(name)
    model.eval()
    graph = trace(model, example)
    least = graph.cost.evaluate("params", graph.removed({g.name: range(g.size // 2, g.size) for g in graph.unlocked}))
    budget = Budget(params=least / graph.params)
    reference = copy.deepcopy(model)
    record = prune(model, example, criterion=criteria.Magnitude(), budget=budget, selection=Selection(max_ratio=0.8))
    params, macs = counted(model, example)
    assert params <= least
    assert (record.steps[0]["params_after"], record.steps[0]["macs_after"]) == (params, macs)
    assert record is record_of(model)
    twin = masked(reference, Plan(record.removed, {}, {}, 0, 0, 0, 0))
    assert difference(outputs(model, example), outputs(twin, example)) < 2e-5
    assert not model.training


def images(n=12):
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8), torch.arange(n) % 4


class Stream(IterableDataset):
    """Nobody knows how long it is."""

    def __iter__(self):
        return zip(*images(), strict=True)


@pytest.mark.parametrize(
    "data",
    [
        lambda: list(images()[0].split(4)),
        lambda: DataLoader(TensorDataset(*images()), batch_size=5),
        lambda: ((x, y) for x, y in zip(images()[0].split(4), images()[1].split(4), strict=True)),
        lambda: [[images()[0], images()[1]]],
        lambda: [(images()[0],)],
        lambda: DataLoader(Stream(), batch_size=5),
    ],
    ids=["tensors", "loader", "generator", "list pairs", "tuples of one", "loader of a stream"],
)
def test_kinds_of_data(data):
    model, example = build("ConvBn")
    record = prune(model, example, data(), criterion=criteria.Entropy(), budget=Budget(params=0.5))
    assert record.steps[0]["params_after"] <= 0.5 * record.steps[0]["params_before"]
    assert model.training


@pytest.mark.parametrize("name", ["TwoInputs", "Dicts", "ListOfImages", "ConvBn"])
@pytest.mark.parametrize("with_targets", [False, True])
def test_data_of_every_kind_of_example(name, with_targets):
    model, example = build(name)
    targets = torch.zeros(2)
    if name == "ListOfImages":
        targets = [{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(1, 4)}]
    data = [(example, targets), (example, targets)] if with_targets else [example, example]
    prune(model, example, data, criterion=criteria.Entropy(), budget=Budget(params=0.7))
    assert outputs(model, example)


@pytest.mark.parametrize("name", CUTTABLE)
def test_entropy_and_mean_on_every_net(name):
    """Every group is observed and scored, every consumer of a cut one compensated."""
    model, example = build(name)
    model.eval()
    before = outputs(model, example)
    graph = trace(model, example)
    budget = Budget(params=graph.cost.evaluate("params", graph.removed({g.name: [0] for g in graph.unlocked})) / graph.params)
    record = prune(model, example, [example], criterion=criteria.Entropy(), budget=budget)
    assert record.steps[0]["groups"]
    after = outputs(model, example)
    assert all(a.shape == b.shape and torch.isfinite(b).all() for a, b in zip(before, after, strict=True))


def test_macs_budget():
    model, example = build("Residual")
    before = counted(model, example)[1]
    prune(model, example, criterion=criteria.Random(), budget=Budget(macs=0.5))
    assert counted(model, example)[1] <= 0.5 * before


def test_the_seed_decides_and_the_global_generator_does_not():
    def removed(seed, noise):
        model, example = build("ConvBn")
        torch.manual_seed(noise)
        return prune(model, example, criterion=criteria.Random(), budget=Budget(params=0.5), seed=seed).removed

    assert removed(1, 5) == removed(1, 6)
    assert removed(1, 5) != removed(2, 5)


def test_positions_decide_how_much_of_a_map_is_seen():
    """The second unit speaks in a corner alone, and louder than the first over the whole map: two positions miss it."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 3, 1))
    nn.init.dirac_(model[0].weight)
    x = torch.zeros(1, 2, 32, 32)
    x[:, 0], x[:, 1, -1, -1] = 0.1, 100.0

    def gone(**options):
        record = prune(copy.deepcopy(model), x, [x], criterion=criteria.RMS(), budget=Budget(units=0.5), **options)
        return record.removed["0.weight"][0]

    assert gone(positions=None) == gone() == [0]  # one sample: all of it
    assert gone(positions=2) == [1]
    with pytest.raises(ConfigError, match="positions=0 must be"):
        gone(positions=0)


def test_optimizers_go_on():
    model, example = build("ConvBn")
    optimizer = torch.optim.AdamW(model.parameters())
    model(example).sum().backward()
    optimizer.step()
    prune(model, example, criterion=criteria.Magnitude(), budget=Budget(params=0.5), optimizers=[optimizer])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    model(example).sum().backward()
    optimizer.step()


def test_pruning_twice_counts_from_the_original():
    model, example = build("ConvBn")
    original = sum(p.numel() for p in model.parameters())
    prune(model, example, criterion=criteria.Magnitude(), budget=Budget(params=0.7))
    record = prune(model, example, criterion=criteria.Magnitude(), budget=Budget(params=0.4))
    assert sum(p.numel() for p in model.parameters()) <= 0.4 * original
    assert len(record.steps) == 2
    fresh = apply_record(build("ConvBn", 3)[0], SurgeryRecord.from_dict(record.to_dict()))
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    # already there: nothing happens
    assert len(prune(model, example, criterion=criteria.Magnitude(), budget=Budget(params=0.9)).steps) == 2


def test_several_steps_reach_the_budget_and_every_one_its_share():
    model, example = build("Residual")
    pruner = Pruner(model, example, criteria.Magnitude(), Budget(params=0.4), compensation=None)
    for due in (0.3, 0.6, 1.0):
        pruner.execute(pruner.plan(None, due))
        assert pruner.params == sum(p.numel() for p in model.parameters()) <= pruner.target(due)
        assert (pruner.params, pruner.macs) == counted(model, example)
    assert [s["params_after"] for s in pruner.record.steps] == sorted(
        (s["params_after"] for s in pruner.record.steps), reverse=True
    )


def test_a_whole_model_can_be_saved_and_copied_after_pruning():
    model, example = build("AttentionPacked")
    prune(model, example, criterion=criteria.Random(), budget=Budget(params=0.7))
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, example)[0], outputs(model, example)[0])
    model.cls.data.zero_()
    assert not torch.equal(outputs(twin, example)[0], outputs(model, example)[0])
    torch.save(model.state_dict(), io.BytesIO())


class HardCoded(nn.Module):
    """A view with numbers in the code: only the rehearsal can know."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6 * 16, 5)
        self.d = nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x)))).view(-1, 96)
        return self.d(F.relu(self.c(x)))


def test_hard_coded_sizes_are_found_by_rehearsal_and_locked_with_the_reason():
    model, example = HardCoded(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, example, criteria.Random(), Budget(params=0.8), compensation=None)
    assert {g.name for g in pruner.graph.unlocked} == {"a", "c"}
    assert "the model fails once it is cut" in pruner.graph.group("b").locked
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    pruner.execute(pruner.plan(None))
    assert pruner.graph.group("b").locked
    model(example).sum().backward()


class Halves(nn.Module):
    """Two slices by number: a width of another parity or size does not fit."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(6, 10), nn.Linear(5, 4)

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        return self.out(y[..., :5] * torch.tanh(y[..., 5:]))


def test_slices_by_number_are_locked_by_rehearsal():
    model, example = Halves(), torch.randn(2, 3)
    pruner = Pruner(model, example, criteria.Random(), Budget(params=0.8), compensation=None)
    assert {g.name for g in pruner.graph.unlocked} == {"a"}


# ------------------------------------------------------------------------------------------------ bad input
@pytest.fixture
def net():
    return build("ConvBn")


def unharmed(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not record_of(model)


def bad(model, example, error, match, data=None, criterion=None, **options):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    training = [m.training for m in model.modules()]
    options.setdefault("budget", Budget(params=0.5))
    with pytest.raises(error, match=match):
        prune(model, example, data, criterion=criterion or criteria.Entropy(), **options)
    assert unharmed(model, before)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert training == [m.training for m in model.modules()]


def test_no_data(net):
    bad(*net, ObservationError, "Entropy scores activations: pass data=")


def test_empty_and_exhausted_data(net):
    bad(*net, ObservationError, "yielded 0 batches, at least 1", data=[])
    used = iter([net[1]])
    next(used)
    bad(*net, ObservationError, "a generator can be used only once", data=used)


def test_data_that_do_not_fit(net):
    bad(*net, TraceError, "failed on a batch of data.*data must yield what the model takes", data=[torch.randn(2, 4, 8, 8)])
    bad(*net, TraceError, "failed on a batch of data", data=[{"wrong": net[1]}])


def test_examples_that_do_not_fit(net):
    bad(net[0], torch.randn(2, 4, 8, 8), TraceError, r"failed on the example inputs of shape \(2, 4, 8, 8\)", data=[net[1]])


def test_activations_that_are_not_finite(net):
    bad(*net, ObservationError, "NaN or Inf", data=[net[1], net[1] * float("nan")])


def test_budgets_that_cannot_be(net):
    bad(*net, BudgetError, "smallest reachable", criterion=criteria.Random(), budget=Budget(params=0.01))
    bad(nn.Linear(3, 2), torch.randn(2, 3), BudgetError, "no group whose units may leave", criterion=criteria.Random())
    bad(nn.ReLU(), torch.randn(2, 3), BudgetError, "no layers found", criterion=criteria.Random())
    for share in (0, -0.5, 1.5, "half", True, float("nan")):
        with pytest.raises(ConfigError, match=r"must be a share left in \(0, 1\]"):
            Budget(params=share)
    for both in ({}, {"params": 0.5, "macs": 0.5}):
        with pytest.raises(ConfigError, match="exactly one of params, macs and units"):
            Budget(**both)


def test_a_model_that_breaks_at_another_width_than_the_rehearsed_one_is_put_back(net):
    class Prime(nn.Module):
        """Runs with every width that is rehearsed, not with 4; of a computed width nobody is told what it is compared with."""

        def __init__(self):
            super().__init__()
            self.wide, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = torch.relu(self.wide(x))
            if 2 * y.shape[1] == 8:
                raise ValueError("four is right out")
            return self.head(y)

    bad(
        Prime(), torch.randn(2, 5), SurgeryError, "four is right out.*put back", criterion=criteria.Random(),
        budget=Budget(params=0.7),
    )  # fmt: skip
