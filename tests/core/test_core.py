"""Budget, files, calling, watching, records: what every room leans on."""

import os

import pytest
import torch
from torch import nn

from actprune import Budget
from actprune.core.calling import call, device_of, undisturbed
from actprune.core.errors import ActPruneError, BudgetError, ConfigError, DataError, ObservationError, SurgeryError, TraceError
from actprune.core.files import atomic_path
from actprune.core.hooks import watch_inputs
from actprune.core.operands import watch_operands
from actprune.core.plan import Plan
from actprune.core.record import SurgeryRecord
from actprune.core.stack import module_stack


# ------------------------------------------------------------------------------------------------ budget
def test_budget_falls_linearly_from_one_to_its_share():
    budget = Budget(params=0.4)
    assert [budget.due(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.7, 0.4])
    assert (budget.unit, budget.share) == ("params", 0.4)
    assert (Budget(macs=1).unit, Budget(macs=1).share) == ("macs", 1)


def test_errors_can_be_caught_as_ours_and_as_pythons():
    for ours, python in (
        (ConfigError, ValueError),
        (BudgetError, ValueError),
        (TraceError, RuntimeError),
        (DataError, RuntimeError),
    ):
        assert issubclass(ours, ActPruneError)
        assert issubclass(ours, python)
    assert issubclass(ObservationError, ActPruneError)
    assert issubclass(SurgeryError, ActPruneError)


# ------------------------------------------------------------------------------------------------ files
def test_a_file_is_whole_or_the_old_one(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("one")
        assert temporary.suffix == ".txt"
        assert temporary.parent == target.parent
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        _write_half(temporary)
    assert target.read_text() == "one"
    assert os.listdir(target.parent) == ["a.txt"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _write_half(path):
    path.write_text("half")
    raise KeyboardInterrupt


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------------------------ calling
class Echo(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, *args, **kwargs):
        return args, kwargs


def test_examples_are_passed_as_the_user_would():
    x, y = torch.ones(2), torch.zeros(3)
    assert call(Echo(), x)[0][0] is x
    assert [a is b for a, b in zip(call(Echo(), (x, y))[0], (x, y), strict=True)] == [True, True]
    assert call(Echo(), {"a": x, "b": [y]}) == ((), {"a": x, "b": [y]})
    ((images,), _) = call(Echo(), [x, y])
    assert images[0] is x
    assert call(Echo(), lambda model: model(1, k=2)) == ((1,), {"k": 2})
    assert call(Echo(), (x, None, "name"))[0][1:] == (None, "name")


def test_the_callers_containers_are_not_touched():
    x = torch.ones(2)
    example = {"a": [x], "b": {"c": x}}
    call(Echo(), example)
    assert example["a"][0] is x
    assert example["b"]["c"] is x


def test_undisturbed_is_evaluation_without_gradients_inside():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[1].eval()
    model[0].train()
    with torch.autocast("cpu", dtype=torch.bfloat16), undisturbed(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        assert model(torch.ones(1, 2)).dtype == torch.float32
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_scripted_parts_are_in_the_mode_they_were_in(training):
    scripted = torch.jit.script(nn.Sequential(nn.Dropout(0.5), nn.ReLU()))
    model = nn.Sequential(nn.Linear(2, 2), scripted).train(training)
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training == training for module in model.modules())


# ------------------------------------------------------------------------------------------------ watching
class Own(nn.Module):
    """Two contractions of its own, a child between them, and a child that runs one inside."""

    def __init__(self, fail=False):
        super().__init__()
        self.first, self.second, self.child, self.fail = torch.randn(4, 3), torch.randn(2, 5), nn.Linear(3, 5), fail

    def forward(self, x):
        x = self.child(x @ self.first)
        if self.fail:
            raise ValueError("no")
        return self.second @ x.mT


def test_operands_are_counted_outside_children():
    model, x, seen = Own(), torch.randn(6, 4), {}
    watch = {
        "": {(0, 0): [lambda t: seen.update(a=t)], (1, 1): [lambda t: seen.update(b=t)], (2, 0): [lambda t: seen.update(c=t)]}
    }
    with watch_operands(model, watch):
        model(x)
    assert torch.equal(seen["a"], x)
    assert torch.equal(seen["b"], model.child(x @ model.first).mT)
    assert "c" not in seen
    seen.clear()
    model(x)
    assert not seen


@pytest.mark.parametrize("held", ["in a list", "deeper", "elsewhere", "by itself"])
def test_operands_are_counted_outside_whatever_else_runs(held):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = Own()
            if held == "in a list":
                self.own.child = nn.ModuleList([self.own.child])
                self.own.forward = self.listed
            elif held == "elsewhere":
                self.child = self.own.child
                del self.own.child
                object.__setattr__(self.own, "child", self.child)
            elif held == "by itself":
                self.inner, self.own.depth = self.own.child, 1
                self.own.child = None
                self.own.forward = self.twice
            else:
                self.own.child = nn.Sequential(self.own.child)

        def listed(self, x):
            return self.own.second @ self.own.child[0](x @ self.own.first).mT

        def twice(self, x):
            y = x @ self.own.first
            if self.own.depth:
                self.own.depth = 0
                self.own(2 * x)
                self.own.depth = 1
            return self.own.second @ self.inner(y).mT

        def forward(self, x):
            return self.own(x)

    model, x, seen = Net(), torch.randn(6, 4), []
    with watch_operands(model, {"own": {(0, 0): [seen.append], (1, 1): [seen.append]}}):
        model(x)
    shapes = [tuple(t.shape) for t in seen]
    assert shapes == ([(6, 4), (6, 4), (5, 6), (5, 6)] if held == "by itself" else [(6, 4), (5, 6)])


def test_every_call_counts_from_zero_also_after_a_failure():
    model, x, seen = Own(fail=True), torch.randn(6, 4), []
    with watch_operands(model, {"": {(0, 0): [seen.append]}}):
        with pytest.raises(ValueError, match="no"):
            model(x)
        model.fail = False
        model(x)
        model(x)
    assert len(seen) == 3
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_inputs_by_position_and_by_keyword():
    model, seen = nn.Sequential(nn.Linear(2, 2)), []
    x = torch.randn(1, 2)
    with watch_inputs(model, {"0": seen.append}):
        model(x)
        model[0](input=x)
    model(x)
    assert len(seen) == 2
    assert seen[1] is x


def test_the_stack_names_the_module_that_failed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(3, 2)))
    with module_stack(model) as stack:
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 2))
        assert [frame.path for frame in stack][-1] == "1.0"


# ------------------------------------------------------------------------------------------------ record
def plan(positions, **options):
    return Plan({"w": positions}, {"g": len(positions.get(0, []))}, {}, 10, 5, 10, 5, **options)


def test_a_record_composes_by_hand():
    record = SurgeryRecord()
    assert not record
    record.extend(plan({0: [1, 3]}), {"w": (6, 4)}, {"g": 6})
    # what is left is 0 2 4 5: positions 0 and 2 of these are 0 and 4
    record.extend(plan({0: [0, 2], 1: [3]}, new_biases={"m": torch.zeros(2)}), {"w": (4, 4)}, {"g": 4})
    record.extend(plan({1: [0]}, new_biases={"m": torch.zeros(2)}), {"w": (2, 3)}, {"g": 2})
    assert record
    assert record.removed == {"w": {0: [0, 1, 3, 4], 1: [0, 3]}}
    assert record.shapes == {"w": [6, 4]}
    assert record.widths == {"g": [6, 2]}
    assert record.biases == ["m"]
    assert SurgeryRecord.from_dict(record.to_dict()) == record


def test_a_model_is_where_its_parameters_are_else_its_buffers():
    model = nn.Module()
    assert device_of(model) == torch.device("cpu")
    model.register_buffer("held", torch.zeros(1, device="meta"))
    assert device_of(model) == torch.device("meta")
    model.trained = nn.Parameter(torch.zeros(1))
    assert device_of(model) == torch.device("cpu")
