"""Training goes on after surgery as if the full-size model were trained on with the removed slices held at zero."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from actprune import trace
from actprune.core.errors import SurgeryError
from actprune.pruning.plans import draft
from actprune.surgery import cut
from masked import random_units


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 5, 3), nn.PReLU(5), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 2))
        self.scale = nn.Parameter(torch.rand(1, 7))

    def forward(self, x):
        return self.head[2](self.head[1](self.head[0](self.body(x))) * self.scale)


ELEMENTWISE = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, 0.05, fused=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=True),
    "rmsprop foreach": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True, foreach=True),
    "adagrad foreach": lambda p: torch.optim.Adagrad(p, 0.05, foreach=True),
    "nadam foreach": lambda p: torch.optim.NAdam(p, 0.01, foreach=True),
    "radam foreach": lambda p: torch.optim.RAdam(p, 0.01, foreach=True),
    "adadelta foreach": lambda p: torch.optim.Adadelta(p, 1.0, foreach=True),
    "adamax foreach": lambda p: torch.optim.Adamax(p, 0.01, foreach=True),
    "rprop foreach": lambda p: torch.optim.Rprop(p, 0.01, foreach=True),
    "asgd foreach": lambda p: torch.optim.ASGD(p, 0.01, foreach=True),
}

CAPTURABLE = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adadelta", "ASGD")
OTHERWISE = {"Adafactor", "LBFGS", "Muon", "SparseAdam"}  # not elementwise: tests of their own below


def test_every_optimizer_of_torch_is_here():
    classes = {
        name for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }  # fmt: skip
    weights = [nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))]
    assert {type(make(weights)).__name__ for make in ELEMENTWISE.values()} == classes - OTHERWISE


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 6, 6, generator=generator).double(), torch.randn(8, 2, generator=generator).double()


def step(model, optimizer, seed):
    x, y = (tensor.to(model.scale.device) for tensor in batch(seed))

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def started(make, steps=3, device="cpu"):
    torch.manual_seed(0)
    model = Small().double().to(device)
    optimizer = make([{"params": model.body.parameters(), "lr": 0.02}, {"params": [*model.head.parameters(), model.scale]}])
    for i in range(steps):
        step(model, optimizer, i)
    return model, optimizer


def plan_for(model, seed=3):
    graph = trace(model, batch(0)[0].to(model.scale.device))
    return draft(model, graph, random_units(graph, seed))


def zero_(model, plan):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, dims in plan.removed.items():
            for dim, positions in dims.items():
                tensors[name].index_fill_(dim, torch.tensor(positions, device=tensors[name].device), 0)


def kept(tensor, dims):
    for dim, gone in dims.items():
        tensor = tensor.index_select(dim, torch.tensor([i for i in range(tensor.shape[dim]) if i not in gone]))
    return tensor


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_training_goes_on_as_the_masked_run_does(name):
    model, optimizer = started(ELEMENTWISE[name])
    full, full_optimizer = copy.deepcopy((model, optimizer))
    plan = plan_for(model)
    assert sum(plan.groups.values()) > 3
    cut(model, plan, batch(0)[0], [optimizer])
    zero_(full, plan)
    for i in range(4):
        assert step(model, optimizer, 10 + i) == pytest.approx(step(full, full_optimizer, 10 + i), rel=1e-9)
        zero_(full, plan)
    reference = dict(full.named_parameters())
    for key, parameter in model.named_parameters():
        expected = kept(reference[key], plan.removed.get(key, {}))
        torch.testing.assert_close(parameter, expected, rtol=1e-8, atol=1e-10)
    assert not torch.equal(model.scale, kept(started(ELEMENTWISE[name])[0].scale, plan.removed["scale"]))  # it did learn


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")
@pytest.mark.parametrize("name", CAPTURABLE)
def test_capturable_optimizers_go_on_as_the_masked_run_does(name):
    def make(groups):
        groups = [{**group, "params": [*group["params"]]} for group in groups]
        return getattr(torch.optim, name)(groups, 0.01, capturable=True)

    model, optimizer = started(make, device="cuda")
    full, full_optimizer = copy.deepcopy((model, optimizer))
    plan = plan_for(model)
    cut(model, plan, torch.randn(8, 3, 6, 6, dtype=torch.float64, device="cuda"), [optimizer])
    zero_(full, plan)
    for i in range(4):
        assert step(model, optimizer, 10 + i) == pytest.approx(step(full, full_optimizer, 10 + i), rel=1e-9)
        zero_(full, plan)
    assert all(p.is_cuda for p in model.parameters())


def test_adafactor_moments_are_cut_where_they_are_full():
    model, optimizer = started(lambda p: torch.optim.Adafactor(p, 0.05))
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    plan = plan_for(model)
    cut(model, plan, batch(0)[0], [optimizer])
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            was = before[name][key]
            dims = {d: gone for d, gone in plan.removed.get(name, {}).items() if was.dim() > d and was.shape[d] > 1}
            torch.testing.assert_close(value, kept(was, dims), rtol=0, atol=0)
    losses = [step(model, optimizer, 5) for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_takes_the_steps_of_the_masked_run():
    """Orthogonalisation of a matrix with rows and columns at zero is that of the rest; its rate follows the shape."""

    def rows(rate, shape):
        return rate * max(1, shape[0] / shape[1]) ** 0.5

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12, bias=False), nn.Tanh(), nn.Linear(12, 9, bias=False), nn.Tanh(), nn.Linear(9, 2, bias=False)
    )
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.01)
    x, y = torch.randn(16, 6), torch.randn(16, 2)

    def one(net, opt):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()

    for _ in range(3):
        one(model, optimizer)
    full, full_optimizer = copy.deepcopy((model, optimizer))
    graph = trace(model, x)
    plan = draft(model, graph, {"0": [1, 4, 5], "2": [0, 8]})
    cut(model, plan, x, [optimizer])
    zero_(full, plan)
    for name, parameter in model.named_parameters():
        buffer = full_optimizer.state[dict(full.named_parameters())[name]]["momentum_buffer"]
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], kept(buffer, plan.removed.get(name, {})))
    for group, other in ((optimizer.param_groups[0], full_optimizer.param_groups[0]),):
        group["weight_decay"] = other["weight_decay"] = 0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    full_before = {n: p.detach().clone() for n, p in full.named_parameters()}
    for value in full_optimizer.state.values():  # what left has no momentum either
        value["momentum_buffer"].zero_()
    for value in optimizer.state.values():
        value["momentum_buffer"].zero_()
    one(model, optimizer)
    one(full, full_optimizer)
    for name, parameter in model.named_parameters():
        ours = (parameter - before[name]) / rows(1.0, parameter.shape)
        whole = dict(full.named_parameters())[name]
        theirs = kept((whole - full_before[name]) / rows(1.0, whole.shape), plan.removed.get(name, {}))
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.005)  # it works in bfloat16


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_gets_no_bias_from_compensation():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    plan = draft(model, trace(model, torch.randn(2, 6)), {"0": [1]})
    plan = dataclasses.replace(plan, new_biases={"2": torch.ones(2)})
    with pytest.raises(SurgeryError, match="Muon takes matrices only; pass compensation=None"):
        cut(model, plan, torch.randn(2, 6), [optimizer])
    assert model[0].weight.shape == (8, 6)
    assert model[2].bias is None


def test_sparse_gradients_are_cut_too():
    """SparseAdam after surgery takes the steps of the masked run; a gradient that waits is cut like the embedding."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(10, 6, sparse=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.words(x).tanh().mean(1))

    torch.manual_seed(0)
    model = Words().double()
    make = lambda net: (torch.optim.SparseAdam(net.words.parameters(), 0.05), torch.optim.SGD(net.head.parameters(), 0.05))  # noqa: E731
    x, y = torch.randint(0, 10, (8, 4)), torch.randn(8, 2).double()

    def one(net, optimizers, step=True):
        loss = (net(x) - y).square().mean()
        loss.backward()
        for optimizer in optimizers if step else ():
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    optimizers = make(model)
    for _ in range(3):
        one(model, optimizers)
    one(model, optimizers, step=False)  # a gradient waits
    full = copy.deepcopy(model)
    for ours, theirs in zip(full.parameters(), model.parameters(), strict=True):
        ours.grad = theirs.grad.clone()
    full_optimizers = make(full)
    for ours, theirs in zip(full_optimizers, optimizers, strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    graph = trace(model, x)
    (group,) = graph.unlocked
    plan = draft(model, graph, {group.name: [0, 3]})
    cut(model, plan, (x,), optimizers)
    assert model.words.weight.shape == model.words.weight.grad.shape == (10, 4)
    zero_(full, plan)
    for _ in range(3):
        assert one(model, optimizers) == pytest.approx(one(full, full_optimizers), rel=1e-9)
        zero_(full, plan)


def test_lbfgs_starts_its_history_again():
    torch.manual_seed(0)
    model = Small().double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, history_size=5, max_iter=3)
    step(model, optimizer, 0)
    plan = plan_for(model)
    del plan.removed["body.0.weight"]  # the first parameter, which holds the history, need not change itself
    for name in ("body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var"):
        del plan.removed[name]
    del plan.removed["body.3.weight"][1]
    cut(model, plan, batch(0)[0], [optimizer])
    fresh = copy.deepcopy(model)
    fresh_optimizer = torch.optim.LBFGS(fresh.parameters(), lr=0.1, history_size=5, max_iter=3)
    for i in range(3):
        assert step(model, optimizer, i) == step(fresh, fresh_optimizer, i)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_groups_keep_their_options_order_and_scheduler():
    model, optimizer = started(ELEMENTWISE["momentum"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    names = [[n for p in g["params"] for n, q in model.named_parameters() if q is p] for g in optimizer.param_groups]
    groups = list(optimizer.param_groups)
    cut(model, plan_for(model), batch(0)[0], [optimizer])
    assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
    assert names == [[n for p in g["params"] for n, q in model.named_parameters() if q is p] for g in groups]
    step(model, optimizer, 1)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.025]
    assert set(optimizer.state) == set(model.parameters())


def test_two_optimizers_and_one_that_was_never_stepped():
    torch.manual_seed(0)
    model = Small().double()
    body = torch.optim.Adam(model.body.parameters())
    rest = torch.optim.SGD([*model.head.parameters(), model.scale], 0.1, momentum=0.9)
    cut(model, plan_for(model), batch(0)[0], [body, rest])
    assert not body.state
    for optimizer in (body, rest):
        step(model, optimizer, 1)
    held = [p for o in (body, rest) for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}


def test_the_state_dict_of_an_optimizer_loads_into_a_fresh_one_for_the_cut_model():
    model, optimizer = started(ELEMENTWISE["adam"])
    cut(model, plan_for(model), batch(0)[0], [optimizer])
    twin = copy.deepcopy(model)
    again = ELEMENTWISE["adam"]([{"params": twin.body.parameters()}, {"params": [*twin.head.parameters(), twin.scale]}])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(model, optimizer, 9) == step(twin, again, 9)
    assert step(model, optimizer, 10) == step(twin, again, 10)


class Odd(torch.optim.SGD):
    """Keeps a projection of every matrix."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["projection"] = torch.zeros(3, p.numel())
        return loss


def test_state_of_another_shape_is_refused_before_anything_is_cut():
    model, optimizer = started(lambda p: Odd(p, 0.1))
    shapes = [p.shape for p in model.parameters()]
    held = [p for g in optimizer.param_groups for p in g["params"]]
    with pytest.raises(SurgeryError, match=r"Odd keeps 'projection' of shape \(3, .*which rows leave is unknown"):
        cut(model, plan_for(model), batch(0)[0], [optimizer])
    assert shapes == [p.shape for p in model.parameters()]
    assert all(a is b for a, b in zip(held, (p for g in optimizer.param_groups for p in g["params"]), strict=True))
