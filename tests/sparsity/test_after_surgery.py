"""Proximal optimizers go on after a cut as on the full network with the removed units held at zero."""

import copy

import pytest
import torch
from torch import nn

import actprune
from actprune import Budget, Pruner, trace
from actprune.criteria import ZeroUnits
from actprune.pruning import Selection
from actprune.sparsity import GroupLasso, GroupMCP, Piece, ProxAdam, ProxAdamW, ProxSGD, RowGroup, unit_groups, zero_units
from actprune.training.deciding import regroup

ALL = Budget(params=0.001)
ONE_STAYS = Selection(max_ratio=0.99)


def network():
    torch.manual_seed(0)
    convs = (nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
    return nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).double()


X = torch.randn(64, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
Y = (X[:, 0].mean((1, 2)) > 0).long()


def train(model, optimizer, steps, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        after()


def silence(model, units):
    """Some units become exactly zero, with all that they own."""
    for group in unit_groups(model, trace(model, X[:2])):
        with torch.no_grad():
            for piece in group.pieces:
                where = piece.where(torch.device("cpu"))
                chosen = torch.zeros(group.size, dtype=torch.bool)
                chosen[units[group.name]] = True
                shape = torch.broadcast_shapes(*(index.shape for index in where))
                mask = chosen.view(-1, *[1] * (len(shape) - 1)).expand(shape)
                piece.param[where] = torch.where(mask, 0.0, piece.param[where])


OPTIMIZERS = {
    "sgd": lambda params, groups: ProxSGD(params, lr=0.05, momentum=0.9, penalty=GroupLasso(0.002), groups=groups),
    "adam": lambda params, groups: ProxAdam(params, lr=0.005, amsgrad=True, penalty=GroupLasso(5e-5), groups=groups),
    "adamw": lambda params, groups: ProxAdamW(params, lr=0.005, penalty=GroupLasso(5e-5), groups=groups, exact_threshold=True),
    "mcp": lambda params, groups: ProxAdamW(params, lr=0.005, penalty=GroupMCP(5e-5, 5e4), groups=groups),
}


def kept_groups(model, kept):
    """By hand: the same units without what has left, so that sqrt(n) counts what is there."""
    first, second = (torch.tensor(kept[name]) for name in ("0", "3"))
    conv, norm, after, head = model[0], model[1], model[3], model[7]
    return [
        RowGroup("0", tuple(Piece(p, 0, first[:, None]) for p in (conv.weight, norm.weight, norm.bias))),
        RowGroup(
            "3",
            (
                Piece(after.weight, 0, second[:, None], ((1, first),)),
                Piece(after.bias, 0, second[:, None]),
                Piece(head.weight, 1, second[:, None]),
            ),
        ),
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("library", [True, False])
def test_the_next_steps_equal_the_masked_reference(kind, library):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters(), unit_groups(model, trace(model, X[:2])))
    train(model, optimizer, 5)
    gone = {"0": [1, 2, 6], "3": [0, 4]}
    silence(model, gone)
    twin, reference = copy.deepcopy((model, optimizer))
    pruner = Pruner(model, X[:2], ZeroUnits(), ALL, ONE_STAYS, compensation=None)
    pruner.execute(pruner.plan(None), [optimizer])
    if library:
        optimizer.regroup(unit_groups(model, pruner.graph))
    else:
        regroup([optimizer], {"": pruner})
    assert {name: after for name, _, after in pruner.widths()} == {"0": 5, "3": 4}

    kept = {"0": [0, 3, 4, 5, 7], "3": [1, 2, 3, 5]}
    reference.regroup(kept_groups(twin, kept))

    def mask():
        with torch.no_grad():
            for p in (twin[0].weight, twin[1].weight, twin[1].bias):
                p[gone["0"]] = 0
            twin[3].weight[:, gone["0"]] = 0
            twin[3].weight[gone["3"]] = 0
            twin[3].bias[gone["3"]] = 0
            twin[7].weight[:, gone["3"]] = 0

    mask()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    train(model, optimizer, 6)
    train(twin, reference, 6, mask)
    first, second = kept["0"], kept["3"]
    expected = [twin[0].weight[first], twin[1].weight[first], twin[1].bias[first]]
    expected += [twin[3].weight[second][:, first], twin[3].bias[second], twin[7].weight[:, second], twin[7].bias]
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(before, torch.cat([p.detach().flatten() for p in model.parameters()]), rtol=1e-3)
    assert optimizer.penalty_value() == pytest.approx(reference.penalty_value(), rel=1e-9)


def test_units_that_became_zero_leave_and_no_output_changes():
    model = network().float()
    x = X.float()
    groups = unit_groups(model, trace(model, x[:2]))
    optimizer = ProxAdamW(model.parameters(), lr=0.01, penalty=GroupLasso(1e-4), groups=groups)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), Y).backward()
        optimizer.step()
    zero = {name: int(mask.sum()) for name, mask in zero_units(groups).items()}
    assert all(0 < zero[name] < size for name, size in (("0", 8), ("3", 6)))
    expected = model.eval()(x)
    record = actprune.prune(
        model, x[:2], criterion=ZeroUnits(), budget=ALL, selection=ONE_STAYS, compensation=None, optimizers=[optimizer]
    )
    assert {name: before - after for name, (before, after) in record.widths.items()} == zero
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert not any(mask.any() for mask in zero_units(unit_groups(model, trace(model, x[:2]))).values())


def test_units_of_other_modules_and_the_papers_own_choice_stay():
    model, other = network(), nn.Linear(3, 4).double()
    parameters = [*model.parameters(), other.weight]
    others = RowGroup("other", (Piece(other.weight, 0, torch.arange(4)[:, None]),))
    chosen = ProxSGD(parameters, penalty=GroupLasso(0.1), groups=[*unit_groups(model, trace(model, X[:2])), others])
    plain = ProxSGD(parameters, penalty=GroupLasso(0.1))
    half = ProxSGD([model[3].weight], penalty=GroupLasso(0.1), groups=[])
    silence(model, {"0": [1], "3": [0, 4]})
    pruner = Pruner(model, X[:2], ZeroUnits(), ALL, ONE_STAYS, compensation=None)
    pruner.execute(pruner.plan(None), [chosen, plain, half])
    pruner.criterion = actprune.criteria.Random()
    regroup([chosen, plain, half, torch.optim.SGD(model.parameters())], {"": pruner})
    assert [(g.name, g.size) for g in chosen.groups] == [("0", 7), ("3", 4), ("other", 4)]
    assert [(g.name, len(g.pieces)) for g in half.groups] == [("3", 1)]
    assert plain.groups is None
    pruner.criterion = ZeroUnits()
    regroup([plain], {"": pruner})
    assert [(g.name, g.size) for g in plain.groups] == [("0", 7), ("3", 4)]
