"""Optimizers that other packages write: wrapped ones, moments without a dimension, state that cannot be cut."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import trace
from actprune.core.errors import SurgeryError
from actprune.pruning.plans import draft
from actprune.surgery import cut, with_wrapped


class Lookahead(torch.optim.Optimizer):
    """As timm has it: the groups are the base optimizer's, which keeps its own state."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base, self.param_groups = base, base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            parameter.copy_(slow.lerp_(parameter, 0.5))


def started(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = make(model)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=generator).double(), torch.randn(8, 3, generator=generator).double()
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()


def plan_of(model):
    graph = trace(model, torch.zeros(1, 6, dtype=torch.float64))
    return draft(model, graph, {graph.unlocked[0].name: [1, 4, 5]})


def held(model, optimizer, place):
    weight = model[place].weight
    return weight, optimizer.state[weight]["slow"]


KEPT = [0, 2, 3, 6, 7]


def test_a_wrapped_optimizer_goes_on_as_the_masked_run_does():
    model, optimizer = started(lambda m: Lookahead(torch.optim.Adam(m.parameters(), 0.01)))
    masked, masked_optimizer = started(lambda m: Lookahead(torch.optim.Adam(m.parameters(), 0.01)))
    cut(model, plan_of(model), optimizers=[optimizer])
    gone = torch.ones(8, dtype=torch.bool)
    gone[KEPT] = False
    for _ in range(4):
        with torch.no_grad():
            for first, second in zip(*(held(masked, masked_optimizer, place) for place in (0, 2)), strict=True):
                first[gone] = second[:, gone] = 0
        step(masked, masked_optimizer)
        step(model, optimizer)
    torch.testing.assert_close(model[0].weight, masked[0].weight[KEPT], rtol=0, atol=1e-9)
    torch.testing.assert_close(model[2].weight, masked[2].weight[:, KEPT], rtol=0, atol=1e-9)
    assert set(optimizer.base.state) == set(model.parameters())


def test_a_new_bias_is_trained_once_and_has_a_name():
    model, optimizer = started(lambda m: Lookahead(torch.optim.Adam(m.named_parameters(), 0.01)))
    plan = plan_of(model)
    plan.new_biases["0"] = torch.zeros(8, dtype=torch.float64)
    cut(model, plan, optimizers=[optimizer])
    (group,) = optimizer.param_groups
    named = dict(model.named_parameters())
    assert group["param_names"] == ["0.weight", "2.weight", "2.bias", "0.bias"]
    assert [id(p) for p in group["params"]] == [id(named[name]) for name in group["param_names"]]


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_moments_of_transformers_adafactor_lack_a_dimension(momentum):
    optimization = pytest.importorskip("transformers.optimization")
    options = {"lr": 0.01, "relative_step": False, "scale_parameter": False, "beta1": momentum}
    model, optimizer = started(lambda m: optimization.Adafactor(m.parameters(), **options))
    before = [dict(optimizer.state[p]) for p in model.parameters()]
    cut(model, plan_of(model), optimizers=[optimizer])
    first, second, _ = (optimizer.state[p] for p in model.parameters())
    assert torch.equal(first["exp_avg_sq_row"], before[0]["exp_avg_sq_row"][KEPT])
    assert torch.equal(first["exp_avg_sq_col"], before[0]["exp_avg_sq_col"])
    assert torch.equal(second["exp_avg_sq_row"], before[1]["exp_avg_sq_row"])
    assert torch.equal(second["exp_avg_sq_col"], before[1]["exp_avg_sq_col"][KEPT])
    if momentum:
        assert torch.equal(first["exp_avg"], before[0]["exp_avg"][KEPT])
    step(model, optimizer)


def preconditioners(optimizer, parameter):
    optimizer.state[parameter]["Q"] = [torch.eye(8), torch.eye(6)]  # PSGD


def factored_by_size(optimizer, parameter):
    optimizer.param_groups[0]["min_dim_size_to_factor"] = 6  # timm's Adafactor: both dimensions, as long as they are wide
    optimizer.state[parameter]["exp_avg_sq_r"] = torch.zeros(1, 6)


@pytest.mark.parametrize("spoil", [preconditioners, factored_by_size])
def test_state_that_cannot_be_cut_is_refused_and_nothing_changed(spoil):
    model, optimizer = started(lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9))
    spoil(optimizer, model[0].weight)
    before = list(model.parameters())
    with pytest.raises(SurgeryError, match="which rows leave is unknown"):
        cut(model, plan_of(model), optimizers=[optimizer])
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_an_optimizer_that_knows_what_wraps_it_is_found_once():
    base = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    outer = Lookahead(base)
    base.outer = outer
    assert with_wrapped([base, outer]) == [base, outer]
    assert with_wrapped([outer]) == [outer, base]
