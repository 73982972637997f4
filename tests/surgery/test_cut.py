"""Surgery: what is kept of every tensor, and that a cut that fails leaves no trace."""

import copy
import dataclasses
import importlib

import pytest
import torch
from torch import nn

from actprune import trace
from actprune.core.errors import SurgeryError
from actprune.core.plan import Plan
from actprune.pruning.plans import draft
from actprune.surgery import cut, rehearsed
from masked import difference, masked, outputs, random_units
from zoo import build


def planned(name, seed=1, dtype=torch.float32):
    model, example = build(name, seed, dtype)
    graph = trace(model, example)
    return model, example, draft(model, graph, random_units(graph, seed))


def snapshot(model, optimizers=()):
    """Objects and values of everything surgery may touch."""
    holders = {n: (list(m._parameters.items()), list(m._buffers.items())) for n, m in model.named_modules()}
    return {
        "objects": {n: [[(k, id(v)) for k, v in part] for part in parts] for n, parts in holders.items()},
        "values": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "attributes": {n: {k: v for k, v in vars(m).items() if not k.startswith("_")} for n, m in model.named_modules()},
        "classes": [type(m) for m in model.modules()],
        "grads": {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()},
        "groups": [[(id(g), [id(p) for p in g["params"]]) for g in o.param_groups] for o in optimizers],
        "state": [
            {
                id(p): {k: (id(v), v.clone()) if isinstance(v, torch.Tensor) else v for k, v in s.items()}
                for p, s in o.state.items()
            }
            for o in optimizers
        ],
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def trained(model, example):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(example).square().sum().backward()
        optimizer.step()
    return optimizer


# ------------------------------------------------------------------------------------------------ what is kept
def test_flags_dtype_grad_attributes_and_buffers_are_kept():
    model, example, plan = planned("Frozen")
    model(example).sum().backward()
    model.a.weight.note = "mine"
    before = copy.deepcopy(model)
    grads = {n: p.grad for n, p in model.named_parameters()}
    cut(model, plan, example)
    old = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == old[name].requires_grad
        assert parameter.dtype == old[name].dtype
        assert parameter.is_leaf
        assert parameter.is_contiguous()
        assert (parameter.grad is None) == (grads[name] is None)
        expected = old[name].detach()
        gradient = grads[name]
        for dim, gone in plan.removed.get(name, {}).items():
            keep = torch.tensor([i for i in range(expected.shape[dim]) if i not in gone])
            expected = expected.index_select(dim, keep)
            gradient = None if gradient is None else gradient.index_select(dim, keep)
        assert torch.equal(parameter, expected)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert model.a.weight.note == "mine"
    assert not model.a.weight.requires_grad
    assert model.unused.weight.shape == (5, 5)


def test_gradient_hooks_are_kept_and_can_still_be_removed():
    model, example, plan = planned("Residual")
    seen = {}
    handles = [p.register_hook(lambda g, n=n: seen.update({n: g.shape})) for n, p in model.named_parameters()]
    handles += [p.register_post_accumulate_grad_hook(lambda p: seen.update({p: p.grad.shape})) for p in model.parameters()]
    cut(model, plan, example)
    model(example).sum().backward()
    expected = {n: p.shape for n, p in model.named_parameters()} | {p: p.shape for p in model.parameters()}
    assert seen == expected
    for handle in handles:
        handle.remove()
    seen.clear()
    model(example).sum().backward()
    assert seen == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype):
    model, example, plan = planned("Residual", dtype=dtype)
    cut(model, plan, example)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_persistence_of_buffers_is_kept():
    model, example, plan = planned("Buffers")
    keys = set(model.state_dict())
    cut(model, plan, example)
    assert set(model.state_dict()) == keys
    assert "scale" not in keys
    assert model.scale.shape[1] == model.b.out_channels
    assert model.unused.shape == (8,)


def test_tied_weights_stay_tied():
    model, example, plan = planned("TiedEmbedding")
    cut(model, plan, example)
    assert model.decoder.weight is model.embed.weight
    assert model.decoder.in_features == model.embed.embedding_dim == model.embed.weight.shape[1] < 6
    model, example, plan = planned("TiedLinear")
    cut(model, plan, example)
    assert model.one.weight is model.two.weight
    assert model.one.bias is model.two.bias
    assert model.two.out_features == model.one.out_features == model.one.weight.shape[0]


def test_one_module_under_two_names_is_cut_once():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 6)
            self.also_a, self.b = self.a, nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.relu(self.also_a(x)))

    model, x = Alias(), torch.randn(2, 5)
    graph = trace(model, x)
    plan = draft(model, graph, {graph.unlocked[0].name: [1, 4]})
    reference = outputs(masked(model, plan), x)
    cut(model, plan, x)
    assert model.a is model.also_a
    assert model.a.out_features == 4
    assert difference(outputs(model, x), reference) < 1e-6


@pytest.mark.parametrize(
    ("name", "module", "values"),
    [
        ("Grouped", "3", {"groups": 3, "in_channels": 6, "out_channels": 9}),
        ("TransposedGrouped", "2", {"groups": 3, "in_channels": 6, "out_channels": 9}),
        ("LayerNorm", "1", {"normalized_shape": (7,)}),
        ("LayerNorm", "4", {"normalized_shape": (5,)}),
        ("RMSNorm", "1", {"normalized_shape": (7,)}),
        ("GroupNorm", "1", {"num_channels": 6, "num_groups": 2}),
        ("InstanceNorm", "3", {"num_features": 5}),
        ("InstanceNorm", "1", {"num_features": 7}),
        ("BnWithoutAffine", "1", {"num_features": 7}),
        ("BnWithoutStatistics", "1", {"num_features": 7}),
        ("PReLU", "1", {"num_parameters": 7}),
        ("AttentionPacked", "attention", {"num_heads": 3}),
        ("PadAttribute", "", {"pad": (0, 0, 0, 0, 1, 2)}),
    ],
)
def test_attributes_of_layers_follow(name, module, values):
    model, example = build(name)
    graph = trace(model, example)
    cut(model, draft(model, graph, {g.name: [0] for g in graph.unlocked}), example)
    layer = model.get_submodule(module)
    assert {k: getattr(layer, k) for k in values} == values
    assert all(type(getattr(layer, k)) is type(v) for k, v in values.items())


def test_a_pending_backward_survives_the_cut():
    model, example, plan = planned("ConvBn")
    loss = model(example).sum()
    old = dict(model.named_parameters())
    cut(model, plan, example)
    loss.backward()
    assert all(p.grad is not None for p in old.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n in plan.removed)


# ------------------------------------------------------------------------------------------------ transaction
class Stubborn(nn.Module):
    """Runs until its width is not what it was."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.bn(self.a(x)))
        if x.shape[1] != 6:
            raise ValueError("six it shall be")
        return self.b(x)


def test_a_failing_forward_puts_everything_back():
    model, x = Stubborn(), torch.randn(4, 5)
    optimizer = trained(model, x)
    plan = draft(model, trace(model, x), {"a": [0, 3]})
    before = snapshot(model, [optimizer])
    with pytest.raises(SurgeryError, match="does not run on the example inputs.*six it shall be.*put back"):
        cut(model, plan, x, [optimizer])
    assert equal(before, snapshot(model, [optimizer]))
    model(x).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("where", ["follow", "add", "replace", "assign"])
def test_an_exception_anywhere_puts_everything_back(monkeypatch, where, at):
    model, example, plan = planned("Residual")
    plan = dataclasses.replace(
        plan,
        shifts={"bn1.bias": torch.ones(6, dtype=torch.float64)},
        new_biases={"one": torch.ones(6, dtype=torch.float64), "two": torch.ones(8, dtype=torch.float64)},
    )
    optimizer = trained(model, example)
    module = {
        "follow": "actprune.surgery.optimizer",
        "add": "actprune.surgery.optimizer",
        "replace": "actprune.surgery.tensors:Holders",
        "assign": "actprune.surgery.cut",
    }[where]
    calls = 0
    name, _, owner = module.partition(":")
    target = getattr(importlib.import_module(name), owner) if owner else importlib.import_module(name)
    original = getattr(target, where)

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls > at:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(target, where, failing)
    before = snapshot(model, [optimizer])
    if where == "add" and at >= 2:
        cut(model, plan, example, [optimizer])
        assert model.one.bias is not None
        return
    with pytest.raises(KeyboardInterrupt):
        cut(model, plan, example, [optimizer])
    assert equal(before, snapshot(model, [optimizer]))


def test_a_rehearsal_leaves_no_trace():
    model, example, plan = planned("Residual")
    before = snapshot(model)
    with rehearsed(model, plan):
        assert model.one.out_channels == 6 - len(plan.removed["one.weight"][0])
    assert equal(before, snapshot(model))
    with pytest.raises(TypeError), rehearsed(model, plan):
        model(None)
    assert equal(before, snapshot(model))


def test_rehearsal_of_an_attention_module_gives_its_class_back():
    model, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), torch.randn(2, 3, 8)
    holder = nn.Sequential(nn.Linear(8, 8), model, nn.Linear(8, 2))
    graph = trace(holder, x)
    before = snapshot(holder)
    with rehearsed(holder, draft(holder, graph, {g.name: [0] for g in graph.unlocked})):
        assert type(model.self_attn) is not nn.MultiheadAttention
    assert equal(before, snapshot(holder))


def empty(**changes):
    return Plan(**{
        "removed": {}, "groups": {}, "attributes": {}, "params_before": 0, "params_after": 0, "macs_before": 0,
        "macs_after": 0, **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (empty(removed={"nowhere.weight": {0: [1]}}), "names 'nowhere.weight', which .* does not have"),
        (empty(removed={"one.weight": {0: [6]}}), "positions up to 6 of dimension 0 of one.weight, which has 6"),
        (empty(removed={"one.weight": {0: list(range(6))}}), "at least one must stay"),
        (empty(removed={"one.weight": {7: [0]}}), "dimension 7 of one.weight, which has 0"),
        (empty(shifts={"bn1.bias": torch.ones(3)}), r"shifts bn1.bias by a tensor of shape \(3,\), it has \(6,\)"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, match):
    model, example = build("Residual")
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=match):
        cut(model, plan, example)
    assert equal(before, snapshot(model))


def test_shifts_and_new_biases_are_cut_like_their_tensors():
    model, example, plan = planned("Residual")
    gone = plan.removed["two.weight"][0]
    values = torch.arange(8, dtype=torch.float64)
    shift = torch.randn(6, 8, 3, 3, dtype=torch.float64)
    before = model.one.weight.detach().clone()
    plan = dataclasses.replace(plan, shifts={"one.weight": shift}, new_biases={"two": values})
    optimizer = torch.optim.SGD([{"params": model.two.parameters(), "lr": 0.5}, {"params": model.one.parameters(), "lr": 0.1}])
    cut(model, plan, example, [optimizer])
    assert model.two.bias.tolist() == [i for i in range(8) if i not in gone]
    assert any(p is model.two.bias for p in optimizer.param_groups[0]["params"])
    expected = (before.double() + shift).float()
    for dim, positions in plan.removed["one.weight"].items():
        expected = expected.index_select(dim, torch.tensor([i for i in range(expected.shape[dim]) if i not in positions]))
    assert torch.equal(model.one.weight, expected)
