"""What forwards of one batch have in common is computed once, and nothing else changes."""

from collections import Counter

import pytest
import torch
from torch import nn

from actprune import trace
from actprune.core.calling import call, undisturbed
from actprune.pruning.prefix import prefixed
from actprune.pruning.replacement import Replacement
from zoo import ZOO, build

SEEN = Counter()
"""Forwards of each layer, where nothing is put back."""


class Counted(nn.Linear):
    """Counts its forwards."""

    @property
    def calls(self):
        return SEEN[self]

    def forward(self, x):
        SEEN[self] += 1
        return super().forward(x)


class Chain(nn.Module):
    def __init__(self, join=lambda x, y: x + y):
        super().__init__()
        self.block = nn.Sequential(Counted(4, 4), nn.ReLU(inplace=True), Counted(4, 4))
        self.middle, self.last, self.join = Counted(4, 4), Counted(4, 2), join

    def forward(self, x):
        y = self.middle(self.block(x))
        return self.last(torch.tanh(self.join(y, x)))

    def calls(self):
        return [self.block[0].calls, self.block[2].calls, self.middle.calls, self.last.calls]


def shorter_forwards(model, x, first, n=3):
    with undisturbed(model), prefixed(model, first, lambda: model(x)) as (plain, forward):
        return plain, [forward() for _ in range(n)]


def test_what_comes_before_is_computed_once():
    model, x = Chain(), torch.randn(3, 4)
    plain, others = shorter_forwards(model, x, ["last"])
    assert all(torch.equal(other, plain) for other in others)
    assert model.calls() == [1, 1, 1, 5]  # the plain one, the check and three
    assert "forward" not in vars(model.middle)


def test_what_is_written_to_later_is_computed_again():
    model, x = Chain(lambda y, x: y.add_(x)), torch.randn(3, 4)
    plain, others = shorter_forwards(model, x, ["last"])
    assert torch.equal(plain, model(x))
    assert all(torch.equal(other, plain) for other in others)
    assert model.calls() == [2, 2, 6, 6]  # with the one call above


def test_a_module_that_runs_before_and_after():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.between = Counted(4, 4), Counted(4, 4)

        def forward(self, x):
            return self.shared(self.between(self.shared(x)) * 2)

    model, x = Twice(), torch.randn(3, 4)
    plain, others = shorter_forwards(model, x, ["between"])
    assert all(torch.equal(other, plain) for other in others)
    assert model.shared.calls == 2 + 4


@pytest.mark.parametrize("kind", ["draws", "remembers"])
def test_a_model_that_does_not_repeat_itself_is_computed_whole(kind):
    class Fickle(Chain):
        seen = 0

        def forward(self, x):
            self.seen += 1
            noise = torch.rand_like(x) if kind == "draws" else float(self.seen)
            return self.last(self.middle(x) + noise)

    model, x = Fickle(), torch.randn(3, 4)
    shorter_forwards(model, x, ["last"])
    assert model.middle.calls == 4  # the plain one and three; the check was handed the first


def test_the_callers_own_forward_and_containers_survive():
    class Pair(nn.Module):
        def forward(self, x):
            return {"x": x.exp()}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.last = Pair(), nn.Linear(4, 2)

        def forward(self, x):
            said = self.pair(x)
            return self.last(said.pop("x"))  # takes it out of the dictionary

    model, x = Net(), torch.randn(3, 4)
    own = model.pair.forward
    model.pair.forward = own
    plain, others = shorter_forwards(model, x, ["last"])
    assert all(torch.equal(other, plain) for other in others)
    assert vars(model.pair)["forward"] is own


def test_an_error_inside_leaves_nothing_behind():
    model, x = Chain(), torch.randn(3, 4)
    with pytest.raises(ZeroDivisionError), undisturbed(model), prefixed(model, ["last"], lambda: model(x)):
        raise ZeroDivisionError
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_replacing_units_gives_the_same_with_and_without(name):
    model, x = build(name)
    graph = trace(model, x)
    replacement = Replacement(model, graph)
    groups = [group for group in graph.unlocked if group.sites]
    with undisturbed(model):
        with replacement.observing():
            call(model, x)
        with replacement.replacing():
            for group in groups[:3]:
                units = {group.name: range(0, group.size, 2)}
                replacement.choose(units)
                whole = call(model, x)
                replacement.choose({})
                with prefixed(model, replacement.reads(group.name), lambda: call(model, x)) as (_, forward):
                    replacement.choose(units)
                    torch.testing.assert_close(forward(), whole, rtol=0, atol=0)
                replacement.choose({})
