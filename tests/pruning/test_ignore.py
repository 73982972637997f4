"""Modules whose outputs stay as wide as they are: by name, by pattern, with all that they are added to."""

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, Selection, criteria, prune
from actprune.core.errors import ConfigError
from actprune.pruning.ignoring import for_each


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(8, 10, 1), nn.BatchNorm2d(10), nn.Conv2d(10, 8, 1)

    def forward(self, x):
        return x + self.b(self.norm(self.a(x)).relu())


class Net(nn.Module):
    """A residual stream with two blocks, a layer of its own and a head of two."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 1), nn.Sequential(Block(), Block())
        self.neck, self.head = nn.Linear(8, 12), nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 2))

    def forward(self, x):
        return self.head(self.neck(self.blocks(self.stem(x).relu()).mean((2, 3))).relu())


X = torch.randn(4, 3, 5, 5)
WHOLE = {"stem": 8, "blocks.0.a": 10, "blocks.1.a": 10, "neck": 12, "head.0": 9}
CASES = {
    "nothing": ([], set()),
    "a layer": (["neck"], {"neck"}),
    "what reads only": (["head"], {"head.0"}),
    "what holds others": (["blocks"], {"stem", "blocks.0.a", "blocks.1.a"}),
    "a norm": (["blocks.*.norm"], {"blocks.0.a", "blocks.1.a"}),
    "one of a stream": (["blocks.1.b"], {"stem"}),
    "patterns": (("blocks.0.*", "hea?"), {"stem", "blocks.0.a", "head.0"}),
    "what cannot be cut": (["head.2", "head.1"], set()),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_of_named_modules_stay(case):
    ignore, stay = CASES[case]
    model = Net()
    prune(model, X, criterion=criteria.Magnitude(), budget=Budget(units=0.8), selection=Selection(ignore=ignore))
    pruner = Pruner(Net(), X, criteria.Magnitude(), Budget(units=0.8), Selection(ignore=ignore), compensation=None)
    assert {name for name, _, _ in pruner.widths()} == WHOLE.keys() - stay
    assert all("is ignored, as ignore=" in pruner.graph.group(name).locked for name in stay)
    pruner.execute(pruner.plan(None))
    widths = {"stem": model.stem.out_channels, "neck": model.neck.out_features, "head.0": model.head[0].out_features}
    widths |= {f"blocks.{i}.a": model.blocks[i].a.out_channels for i in range(2)}
    assert all(widths[name] == WHOLE[name] for name in stay)
    assert {name for name, _, _ in pruner.widths()} == WHOLE.keys() - stay
    assert any(widths[name] < WHOLE[name] for name in WHOLE.keys() - stay)


def test_a_name_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"ignore='nek' matches no module of Net; there are neck.*'layer4.\*'"):
        prune(Net(), X, criterion=criteria.Magnitude(), budget=Budget(units=0.8), selection=Selection(ignore=["nek"]))
    for wrong in ("head", [""], [3]):
        with pytest.raises(ConfigError, match="must be a list of names of modules"):
            Selection(ignore=wrong)


def test_each_of_several_networks_ignores_what_it_has():
    models = [Net(), Block()]
    first, second = for_each(Selection(ignore=["a*", "neck", "nowhere"], round_to=2), models)
    assert first.ignore == ("neck", "nowhere")
    assert second.ignore == ("a*", "nowhere")
    assert first.round_to == second.round_to == 2
