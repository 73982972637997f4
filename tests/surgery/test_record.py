"""The surgery record: original positions over several steps, replay on a fresh model, files."""

import copy
import json

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, SurgeryRecord, apply_record, criteria, load_pruned, prune, save_pruned, trace
from actprune.compensation import Mean
from actprune.core.errors import ConfigError, SurgeryError
from actprune.core.plan import Plan
from actprune.core.record import record_of
from actprune.pruning.plans import draft
from actprune.surgery import cut
from masked import difference, outputs, random_units
from zoo import ZOO, build, scatter_

CUTTABLE = [name for name in ZOO if ZOO[name].sizes]


def steps(model, example, n=3):
    """Several random steps through the pipeline's own bookkeeping."""
    pruner = Pruner(model, example, criteria.Random(), Budget(params=0.999), compensation=None)
    for seed in range(n):
        units = {name: u for name, u in random_units(pruner.graph, seed, most=2).items() if u}
        if units:
            pruner.execute(draft(model, pruner.graph, units))
    return pruner


@pytest.mark.parametrize("name", CUTTABLE)
def test_steps_compose_to_original_positions(name):
    """Every element carries its own original index: what is left says what was removed."""
    model, example = build(name)
    shapes = {n: t.shape for n, t in [*model.named_parameters(), *model.named_buffers()]}
    pruner = steps(model, example)
    record = pruner.record
    indexed = ZOO[name].build()
    with torch.no_grad():
        for t in [*indexed.parameters(), *indexed.buffers()]:
            if t.is_floating_point():
                t.copy_(torch.arange(t.numel()).view(t.shape))
    ids = {n: t.detach().clone() for n, t in [*indexed.named_parameters(), *indexed.named_buffers()]}
    # the same steps on the model that carries indices
    twin = Pruner(indexed, example, criteria.Random(), Budget(params=0.999), compensation=None)
    for seed in range(3):
        units = {k: u for k, u in random_units(twin.graph, seed, most=2).items() if u}
        if units:
            twin.execute(draft(indexed, twin.graph, units))
    assert twin.record.removed == record.removed
    for n, t in [*indexed.named_parameters(), *indexed.named_buffers()]:
        expected = ids[n]
        for dim, gone in record.removed.get(n, {}).items():
            assert gone == sorted(set(gone))
            keep = torch.tensor([i for i in range(expected.shape[dim]) if i not in gone])
            expected = expected.index_select(dim, keep)
        assert torch.equal(t.detach(), expected), n
    assert {n: list(shapes[n]) for n in record.removed} == record.shapes
    assert all(len(gone) < record.shapes[n][dim] for n, dims in record.removed.items() for dim, gone in dims.items())
    for group, (before, now) in record.widths.items():
        assert before - now == sum(step["groups"].get(group, 0) for step in record.steps)
        assert now >= 1
    assert record.steps[-1]["params_after"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_fresh_model_takes_shape_attributes_and_outputs(name, tmp_path):
    model, example = build(name)
    steps(model, example)
    fresh, _ = build(name, seed=9)
    assert apply_record(fresh, record_of(model)) is fresh
    for (path, a), b in zip(model.named_modules(), fresh.modules(), strict=True):
        for key, value in vars(a).items():
            if isinstance(value, (int, float, tuple, list, str)) and key != "training":
                assert getattr(b, key) == value, (path, key)
                assert type(getattr(b, key)) is type(value), (path, key)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    fresh.load_state_dict(model.state_dict())
    buffers = dict(model.named_buffers())
    for n, b in fresh.named_buffers():
        if n not in model.state_dict():
            b.copy_(buffers[n])
    assert difference(outputs(fresh, example), outputs(model, example)) == 0
    assert record_of(fresh).to_dict() == record_of(model).to_dict()

    loaded = load_pruned(build(name, seed=8)[0], save_pruned(model, tmp_path / "pruned.pt"))
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    outputs(loaded, example)


@pytest.mark.parametrize("name", CUTTABLE)
def test_records_are_plain_json(name):
    model, example = build(name)
    steps(model, example)
    state = record_of(model).to_dict()

    def plain(value):
        if isinstance(value, dict):
            return all(type(k) is str and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return type(value) in (int, float, str, bool, type(None))

    assert plain(state)
    again = SurgeryRecord.from_dict(json.loads(json.dumps(state)))
    assert again.removed == record_of(model).removed
    fresh = apply_record(build(name)[0], again)
    assert all(
        torch.equal(torch.tensor(a.shape), torch.tensor(b.shape))
        for a, b in zip(fresh.parameters(), model.parameters(), strict=True)
    )
    outputs(fresh, example)


def test_a_record_taken_from_a_model_is_a_copy():
    model, example = build("ConvBn")
    steps(model, example, 1)
    state = record_of(model).to_dict()
    kept = copy.deepcopy(state)
    next(iter(state["removed"].values()))["0"].append(99)
    state["steps"].append({})
    assert record_of(model).to_dict() == kept


def test_the_record_travels_with_copies_but_not_into_the_state_dict():
    model, example = build("ConvBn")
    keys = set(model.state_dict())
    steps(model, example, 1)
    assert record_of(copy.deepcopy(model)).to_dict() == record_of(model).to_dict()
    assert set(model.state_dict()) == keys


def biased():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 3, bias=False),
    )
    scatter_(net)
    return net


def test_new_biases_are_in_record_and_file(tmp_path):
    model, x = biased(), torch.randn(8, 3, 6, 6)
    record = prune(model, x, [x], criterion=criteria.Random(), budget=Budget(params=0.6))
    assert set(record.biases) == {"2", "5"}
    loaded = load_pruned(biased(), save_pruned(model, tmp_path / "a" / "pruned.pt"))
    assert torch.equal(outputs(loaded, x)[0], outputs(model, x)[0])
    assert loaded[2].bias.shape == (loaded[2].out_channels,)
    assert record.steps[-1]["params_after"] == sum(p.numel() for p in loaded.parameters())


def test_new_biases_are_cut_again_and_the_file_still_loads(tmp_path):
    """A bias that the first step gave is no tensor of a fresh model; it follows its weight."""
    model, x = biased(), torch.randn(8, 3, 6, 6)
    for share in (0.8, 0.3):
        record = prune(model, x, [x], criterion=criteria.Random(), budget=Budget(params=share), compensation=Mean())
    assert "2" in record.biases
    assert "2" in record.steps[-1]["groups"]
    loaded = load_pruned(biased(), save_pruned(model, tmp_path / "pruned.pt"))
    assert torch.equal(outputs(loaded, x)[0], outputs(model, x)[0])


def test_new_bias_of_the_model_itself():
    """A model that is one layer has no path."""
    model = nn.Linear(4, 3, bias=False)
    plan = Plan({"weight": {1: [0]}}, {}, {}, 0, 0, 0, 0, new_biases={"": torch.ones(3)})
    cut(model, plan, torch.randn(2, 3))
    assert model.bias.tolist() == [1, 1, 1]


def test_an_unpruned_model_saves_and_loads(tmp_path):
    model, example = build("ConvBn")
    fresh = load_pruned(build("ConvBn", 4)[0], save_pruned(model, tmp_path / "pruned.pt"))
    assert torch.equal(outputs(fresh, example)[0], outputs(model, example)[0])


class Counted(nn.Linear):
    """A layer that keeps something in the state dict which is no tensor."""

    steps = 0

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


def test_extra_state_is_saved_and_loaded(tmp_path):
    def build():
        return nn.Sequential(Counted(4, 8), nn.ReLU(), nn.Linear(8, 2))

    model, x = build(), torch.randn(3, 4)
    model[0].steps = 7
    prune(model, x, criterion=criteria.Magnitude(), budget=Budget(units=0.5))
    save_pruned(model, tmp_path / "model.pt")
    loaded = load_pruned(build(), tmp_path / "model.pt")
    assert loaded[0].steps == 7
    assert torch.equal(loaded(x), model(x))


def test_a_loaded_model_is_pruned_further_by_the_original_size(tmp_path):
    model, example = build("ConvBn")
    original = trace(model, example).params
    prune(model, example, criterion=criteria.Random(), budget=Budget(params=0.7))
    loaded = load_pruned(build("ConvBn", 4)[0], save_pruned(model, tmp_path / "pruned.pt"))
    pruner = Pruner(loaded, example, criteria.Random(), Budget(params=0.4), compensation=None)
    assert pruner.params_before == original
    assert {name: before for name, before, _ in pruner.widths()} == {"0": 8, "3": 6}
    pruner.execute(pruner.plan(None))
    assert pruner.params <= 0.4 * original
    assert len(pruner.record.steps) == 2


class WithHead(nn.Module):
    def __init__(self, hidden=6, extra=3, more=False):
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(5, hidden), nn.Linear(hidden, 2), nn.Linear(4, extra)
        if more:
            self.more = nn.Linear(1, 1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.fixture
def saved(tmp_path):
    model, x = WithHead(), torch.randn(2, 5)
    graph = trace(model, x)
    pruner = Pruner(model, x, criteria.Random(), Budget(params=0.99), compensation=None)
    pruner.execute(draft(model, graph, {"a": [1, 2]}))
    return save_pruned(model, tmp_path / "pruned.pt")


def test_load_errors_name_the_cure(saved, tmp_path):
    with pytest.raises(SurgeryError, match=r"a.weight has shape \(7, 5\), the record was made on \(6, 5\)"):
        load_pruned(WithHead(hidden=7), saved)
    with pytest.raises(
        SurgeryError,
        match=r"another architecture than WithHead: 2 tensors differ, extra.weight is \(3, 4\) there and \(4, 4\) here",
    ):
        load_pruned(WithHead(extra=4), saved)
    with pytest.raises(SurgeryError, match=r"2 tensors differ, more.weight is absent there and \(1, 1\) here"):
        load_pruned(WithHead(more=True), saved)
    with pytest.raises(SurgeryError, match="'a.weight', which Linear does not have"):
        load_pruned(nn.Linear(2, 2), saved)
    with pytest.raises(SurgeryError, match="pruned already; apply a record to a fresh model"):
        load_pruned(load_pruned(WithHead(), saved), saved)
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="was not written by save_pruned"):
        load_pruned(WithHead(), tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="was not written by save_pruned"):
        load_pruned(WithHead(), tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError):
        load_pruned(WithHead(), tmp_path / "absent.pt")


def test_a_failed_load_leaves_the_fresh_model_whole(saved):
    for model in (WithHead(hidden=7), WithHead(extra=4)):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(SurgeryError):
            load_pruned(model, saved)
        after = model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert not record_of(model)


def test_files_load_with_weights_only(saved):
    content = torch.load(saved, weights_only=True)
    assert set(content) == {"format", "state_dict", "surgery_record"}


def test_a_dictionary_that_is_no_record_is_refused():
    with pytest.raises(ConfigError, match="not a surgery record: .*removed.* missing"):
        SurgeryRecord.from_dict({"steps": []})


def test_plans_survive_a_file(tmp_path):
    model, example = build("PadAttribute")
    data = [example]
    pruner = Pruner(model, example, criteria.Random(), Budget(params=0.6))
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(2))
        model(data[0])
    plan = pruner.plan(observation)
    torch.save(plan.to_dict(), tmp_path / "plan.pt")
    again = Plan.from_dict(torch.load(tmp_path / "plan.pt", weights_only=True))
    assert again.to_dict().keys() == plan.to_dict().keys()
    twin = copy.deepcopy(model)
    cut(model, plan, example)
    cut(twin, again, example)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


class Cached(nn.Module):
    """Computes a table from its weights in the first call in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self._table = nn.Linear(3, 8), nn.Linear(8, 2), None

    def forward(self, x):
        if self._table is None and not self.training:
            self._table = self.last.weight.detach().tanh()
        weight = self.last.weight.tanh() if self.training else self._table
        return self.first(x).relu() @ weight.t() + self.last.bias


def test_a_table_that_is_not_computed_yet(tmp_path):
    torch.manual_seed(0)
    model, x = Cached().eval(), torch.rand(4, 3)
    model(x)
    prune(model, x, criterion=criteria.Random(), budget=Budget(params=0.6))
    assert model._table.shape == model.last.weight.shape != (2, 8)
    again = load_pruned(Cached(), save_pruned(model, tmp_path / "pruned")).eval()
    assert torch.equal(again(x), model(x))
