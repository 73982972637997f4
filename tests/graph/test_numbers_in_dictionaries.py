"""Numbers in dictionaries: settings, and lengths that are spelt out once more, ready to use, as in layers of einops."""

import copy
import pickle

import pytest
import torch
from torch import nn

import actprune
from actprune import Budget, Pruner
from actprune.criteria import Random
from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import rehearsed
from actprune.training.resume import Shapes
from masked import check_cuts, exact


class Split(nn.Module):
    """(n, t, k h d) -> k of (n, h, t, d)."""

    def __init__(self, pattern, **lengths):
        super().__init__()
        self.pattern, self.lengths = pattern, lengths
        self._ready = tuple(lengths.items())

    def __getstate__(self):
        return {"pattern": self.pattern, "lengths": self.lengths}

    def __setstate__(self, state):
        self.__init__(state["pattern"], **state["lengths"])

    def forward(self, x):
        (_, parts), (_, heads) = self._ready
        return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


class Attention(nn.Module):
    def __init__(self, width=12, heads=3, dim=4):
        super().__init__()
        self.split = Split("n t (k h d) -> k n h t d", k=3, h=heads)
        self.inner, self.qkv, self.out = nn.Linear(5, width), nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, 2)

    def forward(self, x):
        q, k, v = self.split(self.qkv(self.inner(x)))
        return self.out(((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


X = torch.randn(2, 7, 5, dtype=torch.float64)


def pruned():
    torch.manual_seed(0)
    model = Attention().double().eval()
    pruner = Pruner(model, X, Random(), Budget(params=0.7), compensation=None)
    shapes = Shapes.of(model)
    pruner.execute(draft(model, pruner.graph, {"qkv": [1], "inner": [0, 5]}))
    return model, pruner, shapes


def test_heads_leave_and_cut_equals_masked():
    graph = exact(Attention, X)
    assert sorted(group.size for group in graph.unlocked) == [3, 12], str(graph)


class Scaled(Split):
    """What is set after it was made is no length."""

    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


class Configured(nn.Module):
    """The number of heads in a dictionary of settings that others share."""

    def __init__(self, config):
        super().__init__()
        self.config, self.qkv, self.out = config, nn.Linear(5, 36), nn.Linear(12, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.config["n_head"], -1)).permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_what_else_a_layer_holds_stays():
    def build():
        model = Attention().eval()
        model.split = Scaled("n t (k h d) -> k n h t d", k=3, h=3)
        model.split.scale = torch.tensor(2.0)
        return model

    torch.manual_seed(0)
    graph, _ = rehearse(build().double(), X)
    assert graph.group("qkv").locked is None
    model = build().double()
    with rehearsed(model, draft(model, graph, {"qkv": [2]})):
        assert (model.split.lengths["h"], model.split.scale) == (2, 2.0)


def test_settings_that_others_share_are_copied():
    shared = {"n_head": 3, "name": "small"}
    torch.manual_seed(0)
    model = Configured(shared).double().eval()
    graph, _ = rehearse(model, X)
    check_cuts(lambda: Configured(dict(shared)).eval(), graph, X, 3)
    (group,) = graph.unlocked
    with rehearsed(model, draft(model, graph, {group.name: [0]})):
        assert (model.config, shared) == ({"n_head": 2, "name": "small"}, {"n_head": 3, "name": "small"})
    assert model.config is shared


class Counted(nn.Module):
    """The same with an integer."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, x):
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class Twice(nn.Module):
    """Two blocks split by one layer."""

    def __init__(self, split):
        super().__init__()
        self.a, self.b, self.last = Attention(), Attention(), nn.Linear(4, 2)
        self.a.split = self.b.split = split

    def forward(self, x):
        return self.last(torch.cat([self.a(x), self.b(x)], -1))


@pytest.mark.parametrize("split", [lambda: Split("n t (k h d) -> k n h t d", k=3, h=3), lambda: Counted(3)])
def test_one_layer_of_two_blocks_keeps_one_number(split):
    graph = exact(lambda: Twice(split()), X)
    (heads,) = (group for group in graph.unlocked if group.size == 3)
    assert {"a.qkv.weight", "b.qkv.weight"} <= {tensor for tensor, _ in heads.members}


def test_what_is_ready_follows_what_it_was_made_from():
    model, _, _ = pruned()
    assert (model.split.lengths, model.split._ready) == ({"k": 3, "h": 2}, (("k", 3), ("h", 2)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_say_the_same(copied):
    model, _, _ = pruned()
    assert torch.equal(copied(model)(X), model(X))


def test_a_fresh_one_takes_the_pruned_shape(tmp_path):
    model, pruner, _ = pruned()
    actprune.save_pruned(model, tmp_path / "pruned.pt")
    same = actprune.load_pruned(Attention().double().eval(), tmp_path / "pruned.pt")
    assert torch.equal(same(X), model(X))
    assert actprune.apply_record(Attention().double(), pruner.record).split.lengths == model.split.lengths


def test_original_shapes_come_back():
    model, pruner, shapes = pruned()
    shapes.restore(model, pruner.record)
    assert (model.split.lengths, model.split._ready) == ({"k": 3, "h": 3}, (("k", 3), ("h", 3)))
    assert model(X).shape == (2, 7, 2)


def test_a_cut_that_is_taken_back_leaves_the_layer_as_it_was():
    model = Attention().double().eval()
    before = vars(model.split).copy()
    rehearse(model, X)
    assert vars(model.split) == before
