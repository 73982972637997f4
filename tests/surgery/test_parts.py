"""A part of a model that is pruned by itself, before or after the whole: one file, one record."""

import copy

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, apply_record, criteria, load_pruned, prune, save_pruned
from actprune.compensation import Mean
from actprune.core.errors import SurgeryError
from actprune.core.record import SurgeryRecord, parts_of, record_of


class Whole(nn.Module):
    """A part of three layers, which has a part itself, and layers around it; one without a bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 6)
        inner = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10, bias=False), nn.ReLU())
        self.part = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), inner, nn.Linear(10, 7))
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.part(self.stem(x).relu()).relu())


ORDERS = [
    ["part"],
    ["part", "whole"],
    ["whole", "part"],
    ["part.4", "part"],
    ["part", "part.4"],
    ["part.4", "part", "whole"],
    ["part", "whole", "part", "part.4", "whole"],
]


def pruned(model, order):
    torch.manual_seed(1)
    for i, path in enumerate(order):
        module = model if path == "whole" else model.get_submodule(path)
        x = torch.randn(64, next(m.in_features for m in module.modules() if isinstance(m, nn.Linear)))
        record = record_of(module)
        left = Budget(units=0.9 - 0.2 * len(record.steps))
        prune(module, x[:2], [x], criterion=criteria.Random(), budget=left, compensation=Mean(), seed=i)
    return model


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_the_file_of_the_whole_loads(order, tmp_path):
    torch.manual_seed(0)
    model = pruned(Whole(), order)
    path = save_pruned(model, tmp_path / "pruned.pt")
    fresh = load_pruned(Whole(), path)
    x = torch.randn(16, 5)
    assert torch.equal(fresh(x), model(x))
    assert sum(p.numel() for p in fresh.parameters()) < sum(p.numel() for p in Whole().parameters())
    assert torch.equal(load_pruned(Whole(), save_pruned(fresh, tmp_path / "without_suffix"))(x), model(x))
    assert not parts_of(fresh)


@pytest.mark.parametrize("order", [["part", "whole"], ["part.4", "part", "whole"], ["part.4", "whole"]], ids="-".join)
def test_a_record_goes_on_where_parts_are_pruned_already(order):
    torch.manual_seed(0)
    model = pruned(Whole(), order[:-1])
    early = copy.deepcopy(model)
    x = torch.randn(64, 5)
    record = prune(model, x[:2], [x], criterion=criteria.Random(), budget=Budget(units=0.7), compensation=Mean())
    apply_record(early, SurgeryRecord.from_dict(record.to_dict()))
    assert {n: p.shape for n, p in early.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    early.load_state_dict(model.state_dict())
    assert torch.equal(early(x), model(x))
    assert not parts_of(early)


def test_a_part_that_was_pruned_otherwise_is_refused():
    torch.manual_seed(0)
    record = pruned(Whole(), ["part", "whole"])._surgery_record
    other = Whole()
    prune(other.part, torch.randn(2, 6), criterion=criteria.Random(), budget=Budget(units=0.5), seed=3)
    before = {name: p.shape for name, p in other.named_parameters()}
    with pytest.raises(SurgeryError, match="the record was made on"):
        apply_record(other, record)
    assert {name: p.shape for name, p in other.named_parameters()} == before


def test_a_cut_of_the_whole_that_is_taken_back_leaves_the_part_its_record():
    torch.manual_seed(0)
    model = pruned(Whole(), ["part"])
    before = record_of(model.part).to_dict()
    pruner = Pruner(model, torch.randn(2, 5), criteria.Random(), Budget(units=0.7), compensation=None)
    changes = pruner.execute(pruner.plan(None))
    assert record_of(model)
    changes.roll_back()
    assert record_of(model.part).to_dict() == before
    assert not record_of(model)
