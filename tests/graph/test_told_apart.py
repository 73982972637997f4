"""``if x.shape != y.shape: x = self.proj(x)``: where a cut made both as wide, the projection would not run."""

import copy

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, load_pruned, prune, save_pruned, trace
from actprune.core.errors import BudgetError, SurgeryError
from actprune.criteria import Random
from actprune.pruning.plans import draft
from actprune.pruning.select import Selection, select
from actprune.pruning.verify import rehearse
from masked import check_cuts, difference, masked, outputs


class Residual(nn.Module):
    def __init__(self, before, after, differs):
        super().__init__()
        self.differs, self.width = differs, after
        self.inner, self.outer = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.norm, self.proj = nn.BatchNorm2d(after), nn.Conv2d(before, after, 1)

    def forward(self, x):
        y = self.outer(self.norm(self.inner(x)).relu())
        return (self.proj(x) if self.differs(self, x, y) else x).add(y).relu()


class Network(nn.Module):
    def __init__(self, differs, widths=(6, 9, 12, 15)):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, widths[0], 1), nn.Linear(widths[-1], 4)
        self.blocks = nn.Sequential(*(Residual(a, b, differs) for a, b in zip(widths, widths[1:], strict=False)))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def taken(m, x, y):
    (_, a, *_), b = x.shape, y.size(dim=1)
    return a != b


ASKED = {
    "shapes": lambda m, x, y: x.shape != y.shape,
    "widths": lambda m, x, y: x.shape[1] != y.shape[1],
    "sizes": lambda m, x, y: x.size() != y.size(),
    "a size": lambda m, x, y: x.size(1) != y.size(-3),
    "parts of shapes": lambda m, x, y: tuple(x.shape)[1:] != y.shape[1:],
    "variables": taken,
    "a parameter": lambda m, x, y: x.shape[1] != m.proj.weight.shape[0],
    "an attribute": lambda m, x, y: x.shape[1] != m.width,
    "among others": lambda m, x, y: x.shape[1] not in (y.shape[1], 1),
    "beside a width that follows": lambda m, x, y: x.shape[1] != y.view(-1, m.width, *y.shape[2:]).shape[1],
}
X = torch.rand(2, 3, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("case", ASKED)
def test_all_widths_leave_and_cut_equals_masked(case):
    torch.manual_seed(0)
    graph, _ = rehearse(Network(ASKED[case]).double().eval(), X)
    assert sorted(g.size for g in graph.unlocked) == [6, 9, 9, 12, 12, 15, 15], str(graph)
    check_cuts(lambda: Network(ASKED[case]).eval(), graph, X, seeds=6)


@pytest.mark.parametrize("case", ASKED)
def test_a_cut_that_makes_them_equal_is_refused(case):
    graph, _ = rehearse(Network(ASKED[case]).double().eval(), X)
    equal = {"stem": range(3), "blocks.0.outer": range(6)}
    if case == "an attribute":  # nothing needs it, so it stays, and what matters is whether the stem is as wide
        assert draft(Network(ASKED[case]), graph, equal).groups == {"stem": 3, "blocks.0.outer": 6}
        return
    with pytest.raises(SurgeryError, match=r"two widths that blocks\.0 finds different would both be 3"):
        draft(Network(ASKED[case]), graph, equal)


@pytest.mark.parametrize(("target", "round_to"), [(n, 1) for n in range(20, 70, 5)] + [(n, 3) for n in range(30, 70, 5)])
def test_a_selection_keeps_them_different_and_meets_its_budget(target, round_to):
    """Scores by which all widths would become alike."""
    graph, _ = rehearse(Network(ASKED["shapes"]).double().eval(), X)
    scores = {g.name: torch.arange(g.size, 0, -1).double() for g in graph.unlocked}
    originals = {g.name: g.size for g in graph.unlocked}
    chosen = select(graph, scores, "units", target, Selection(normalise="none", round_to=round_to), originals)
    left = {name: size - len(chosen.get(name, ())) for name, size in originals.items()}
    stream = [left["stem"], *(left[f"blocks.{i}.outer"] for i in range(3))]
    assert all(a != b for a, b in zip(stream, stream[1:], strict=False)), stream
    assert target - 6 * round_to <= sum(left.values()) <= target
    assert all(left[name] in (size, *range(0, size, round_to)) for name, size in originals.items())


def test_a_budget_that_needs_them_equal_is_refused():
    graph, _ = rehearse(Network(ASKED["shapes"]).double().eval(), X)
    scores = {g.name: torch.arange(g.size, 0, -1).double() for g in graph.unlocked}
    with pytest.raises(BudgetError, match="widths that have to stay different"):
        select(graph, scores, "units", 21, Selection(round_to=3), {g.name: g.size for g in graph.unlocked})


def test_a_pruned_network_is_pruned_again_and_loads(tmp_path):
    torch.manual_seed(0)
    model = Network(ASKED["shapes"]).double().eval()
    for share in (0.6, 0.4):
        pruner = Pruner(model, X, Random(), Budget(params=share), compensation=None)
        plan = pruner.plan(None)
        reference = outputs(masked(model, plan), X)
        pruner.execute(plan)
        assert difference(outputs(model, X), reference) < 1e-11
    save_pruned(model, tmp_path / "pruned.pt")
    loaded = load_pruned(Network(ASKED["shapes"]).double(), tmp_path / "pruned.pt").eval()
    assert difference(outputs(loaded, X), outputs(model, X)) == 0


def test_what_the_code_keeps_of_a_shape_is_plain_afterwards():
    class Keeps(nn.Linear):
        kept: list = []

        def forward(self, x):
            y = super().forward(x)
            self.kept += [y.shape, y.shape[-1], copy.deepcopy(y.shape[-1]), y.shape[-1] + 1]
            return y

    model = nn.Sequential(Keeps(3, 5), nn.ReLU(), nn.Linear(5, 2))
    graph = trace(model, torch.rand(2, 3))
    shape, width, copied, more = Keeps.kept
    assert type(copied) is type(more) is int
    assert (shape, width, copied, more) == (torch.Size([2, 5]), 5, 5, 6)
    assert (width != 4, hash(width), {5: "five"}[width]) == (True, hash(5), "five")
    assert graph.apart == ()


class Spread(nn.Module):
    """A norm by hand, as in the annotated transformer."""

    def __init__(self, spread, width=4):
        super().__init__()
        self.spread = spread
        self.inner, self.outer = nn.Linear(3, width), nn.Linear(width, 2)
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x):
        h = self.inner(x)
        return self.outer(self.weight * (h - h.mean(-1, keepdim=True)) / (self.spread(h) + 1e-3) + self.bias)


UNBIASED = {
    "std": lambda h: h.std(-1, keepdim=True),
    "var": lambda h: torch.var(h, -1, keepdim=True).sqrt(),
    "unbiased": lambda h: h.std(dim=-1, unbiased=True, keepdim=True),
    "corrected": lambda h: torch.std(h, dim=-1, correction=1, keepdim=True),
    "with the mean": lambda h: torch.std_mean(h, dim=-1, keepdim=True)[0],
}
BIASED = {
    "biased": lambda h: h.std(dim=-1, unbiased=False, keepdim=True),
    "not corrected": lambda h: torch.var(h, dim=-1, correction=0, keepdim=True),
    "over samples too": lambda h: h.std(),
    "over samples": lambda h: h.std(0, keepdim=True),
}
ROWS = torch.rand(5, 3, dtype=torch.float64)


@pytest.mark.parametrize("case", UNBIASED)
def test_of_an_unbiased_variance_two_units_stay(case):
    """That of one value is not a number."""
    torch.manual_seed(0)
    graph, _ = rehearse(Spread(UNBIASED[case]).double().eval(), ROWS)
    (group,) = graph.unlocked
    assert draft(Spread(UNBIASED[case]), graph, {group.name: [0, 2]}).groups == {group.name: 2}
    with pytest.raises(SurgeryError, match="would both be 1, .* an unbiased variance of one value"):
        draft(Spread(UNBIASED[case]), graph, {group.name: [0, 2, 3]})
    model = Spread(UNBIASED[case]).double().eval()
    prune(model, ROWS, criterion=Random(), budget=Budget(units=0.5))
    assert model.inner.out_features == 2
    assert outputs(model, ROWS)[0].isfinite().all()
    with pytest.raises(BudgetError, match="widths that have to stay different"):
        prune(model, ROWS, criterion=Random(), budget=Budget(units=0.25))


@pytest.mark.parametrize("case", BIASED)
def test_of_others_one_may(case):
    graph, _ = rehearse(Spread(BIASED[case]).double().eval(), ROWS)
    (group,) = graph.unlocked
    assert draft(Spread(BIASED[case]), graph, {group.name: [0, 2, 3]}).groups == {group.name: 3}
