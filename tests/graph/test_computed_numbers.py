"""Numbers that code computes from a width change with it, and no shape tells: a scale of attention, a mean by hand."""

import pytest
import torch
from torch import nn

from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import check_cuts, difference, outputs


class Head(nn.Module):
    """One head, its scale computed by a function of the module, of its input, and of its queries."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.width = scale, 12
        self.key, self.query, self.value = (nn.Linear(12, 4, bias=False) for _ in range(3))

    def forward(self, x):
        q, k = self.query(x), self.key(x)
        return (q @ k.transpose(-2, -1) * self.scale(self, x, q)).softmax(-1) @ self.value(x)


class Heads(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.embed, self.heads = nn.Linear(5, 12), nn.ModuleList(Head(scale) for _ in range(3))
        self.proj, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.out(x + self.proj(torch.cat([head(x) for head in self.heads], -1)))


SCALES = {
    "of the input": (lambda m, x, q: x.shape[-1] ** -0.5, False),
    "a tensor of it": (lambda m, x, q: 1 / torch.sqrt(torch.tensor(float(x.shape[-1]))), False),
    "filled with it": (lambda m, x, q: torch.full((), x.shape[-1] ** -0.5), False),
    "of the module": (lambda m, x, q: m.width**-0.5, True),
    "of the head": (lambda m, x, q: q.shape[-1] ** -0.5, True),
    "none once it is another": (lambda m, x, q: 0.3 if x.shape[-1] == 12 else float("nan"), False),
    "of the data": (lambda m, x, q: 1 / (1 + x.abs().max().item()), True),
}


@pytest.mark.parametrize("case", SCALES)
def test_a_width_stays_that_a_number_is_computed_from(case):
    torch.manual_seed(0)
    scale, cuttable = SCALES[case]
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    graph, _ = rehearse(Heads(scale).double(), x)
    assert (graph.group("embed").locked is None) == cuttable, str(graph)
    if not cuttable:
        assert "a number that follows a width" in graph.group("embed").locked
    assert len(graph.unlocked) == 3 + cuttable  # the values of every head, whatever the scale
    check_cuts(lambda: Heads(scale), graph, x)


class ByHand(nn.Module):
    """Norms written by hand: a sum, or a vector's length, divided by how many there are."""

    def __init__(self, norm):
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(5, 12), nn.Linear(12, 3), norm

    def forward(self, x):
        x = self.inner(x)
        return self.outer(self.norm(x))


def standardised(x):
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / (centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()


NORMS = {
    "quotient": (lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) / x.shape[-1]), True),
    "factor": (lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) * (1 / x.shape[-1])), True),
    "length": (lambda x: x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5), True),
    "variance": (standardised, True),
    "of something else": (lambda x: x / (x.square().sum(-2, keepdim=True) / x.shape[-1]), False),
    "no count": (lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) / x.shape[-1] ** 3), False),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_mean_by_hand_is_one_over_the_channels_that_stay(name):
    norm, cuttable = NORMS[name]
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    model = ByHand(norm).double()
    graph, _ = rehearse(model, x)
    assert [group.size for group in graph.unlocked] == [12] * cuttable, str(graph)
    if cuttable:
        stays = [0, 1, 4, 5, 6, 8, 9]
        gone = [i for i in range(12) if i not in stays]
        with torch.no_grad():
            expected = norm(model.inner(x)[:, stays]) @ model.outer.weight[:, stays].T + model.outer.bias
        cut(model, draft(model, graph, {"inner": gone}), x)
        assert difference(outputs(model, x), [expected]) < 1e-11


class CountedGroups(nn.Module):
    """As many groups as eights of channels: a cut would normalise others together."""

    def __init__(self):
        super().__init__()
        self.inner, self.other, self.outer = nn.Conv1d(5, 32, 1), nn.Conv1d(32, 6, 1), nn.Conv1d(6, 3, 1)

    def forward(self, x):
        x = self.inner(x)
        return self.outer(self.other(torch.nn.functional.group_norm(x, x.shape[1] // 8)))


def test_groups_that_are_counted_from_a_width_keep_it():
    graph, _ = rehearse(CountedGroups(), torch.randn(2, 5, 4))
    assert [group.size for group in graph.unlocked] == [6], str(graph)
    assert "a number that follows a width" in graph.group("inner").locked


class Moved(nn.Module):
    """Positions are moved by a number, or met at a distance, that is computed from a width."""

    def __init__(self, move):
        super().__init__()
        self.inner, self.other, self.outer = nn.Conv1d(5, 12, 1), nn.Conv1d(12, 6, 3), nn.Conv1d(6, 3, 1)
        self.move = move

    def forward(self, x):
        x = self.inner(x)
        return self.outer(self.move(self, x))


def written(x, k):
    x = x.clone()
    x[..., k:] = 0
    return x


MOVES = {
    "start": lambda m, x: m.other(x)[..., x.shape[1] // 4 : x.shape[1] // 4 + 3],
    "stop": lambda m, x: m.other(x)[..., : x.shape[1] // 3],
    "from the end": lambda m, x: m.other(x)[..., -(x.shape[1] // 3) :],
    "narrow": lambda m, x: m.other(x).narrow(2, x.shape[1] - 10, 2),
    "narrow_copy": lambda m, x: torch.narrow_copy(m.other(x), 2, x.shape[1] // 4, 2),
    "split": lambda m, x: m.other(x).split(x.shape[1] // 4, 2)[0],
    "chunk": lambda m, x: m.other(x).chunk(x.shape[1] // 4, 2)[0],
    "sizes": lambda m, x: m.other(x).split([x.shape[1] // 4, 7 - x.shape[1] // 4], 2)[1],
    "listed": lambda m, x: m.other(x)[..., [0, x.shape[1] // 4]],
    "counted": lambda m, x: m.other(x)[..., torch.arange(x.shape[1] // 4)],
    "written": lambda m, x: written(m.other(x), x.shape[1] // 4),
    "padding": lambda m, x: nn.functional.pad(m.other(x), (x.shape[1] // 4, 0)),
    "reflection": lambda m, x: nn.functional.pad(m.other(x), (x.shape[1] // 4, 0), mode="reflect"),
    "pooling": lambda m, x: nn.functional.avg_pool1d(m.other(x), x.shape[1] // 3),
    "largest": lambda m, x: nn.functional.max_pool1d(m.other(x), x.shape[1] // 3),
    "adaptive": lambda m, x: nn.functional.adaptive_avg_pool1d(m.other(x), x.shape[1] // 3),
    "resized": lambda m, x: nn.functional.interpolate(m.other(x), size=x.shape[1] // 3),
    "windows": lambda m, x: m.other(x).unfold(2, x.shape[1] // 4, 1).mean(-1),
    "repeated": lambda m, x: m.other(x).repeat(1, 1, x.shape[1] // 4),
    "shift": lambda m, x: m.other(x.roll(x.shape[1] // 3, -1)),
    "dilation": lambda m, x: nn.functional.conv1d(x, m.other.weight, dilation=x.shape[1] // 4, padding=x.shape[1] // 4),
}


@pytest.mark.parametrize("name", MOVES)
def test_how_far_positions_move_keeps_the_width(name):
    torch.manual_seed(0)
    graph, _ = rehearse(Moved(MOVES[name]), torch.randn(2, 5, 9))
    assert [group.size for group in graph.unlocked] == [6] * (name != "narrow_copy"), str(graph)  # which no rule knows
    assert "that follows a width" in graph.group("inner").locked


class Chosen(nn.Module):
    """Data say how many positions are picked, in a function's call and by what it is given: a cut may change that."""

    def __init__(self):
        super().__init__()
        self.inner, self.other, self.outer = nn.Linear(5, 12), Half(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.inner(x).relu()
        said = x.sum(-1)
        likely = x[said > said.mean()]
        best = likely[likely.sum(-1).topk(min(5, len(likely)))[1]]
        return self.outer(self.other(likely)).mean(0) + self.outer(self.other(best)).mean(0)


class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x[: len(x) // 2]).relu()


class Sent(nn.Module):
    """Samples are sent to experts, those without any left out: a cut may send as many to another one."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 12), nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12)) for _ in range(4))

    def forward(self, x):
        x = self.inner(x).relu()
        to, y = (40 * x.sum(-1)).long() % 4, torch.zeros_like(x)
        for expert in torch.bincount(to, minlength=4).nonzero().flatten().tolist():
            y[to == expert] = self.experts[expert](x[to == expert])
        return self.outer(y)


@pytest.mark.parametrize("seed", range(4))
def test_what_data_decide_keeps_no_width(seed):
    torch.manual_seed(seed)
    graph, _ = rehearse(Chosen(), torch.randn(4, 9, 5))
    assert [group.size for group in graph.unlocked] == [12, 6], str(graph)
    graph, _ = rehearse(Sent(), torch.randn(5, 5))
    assert "that follows a width" not in str(graph)
    assert {group.size for group in graph.unlocked} == {8, 12}, str(graph)


class Window(nn.Module):
    """A window over what is cut, its size kept by the module."""

    def __init__(self, start, size):
        super().__init__()
        self.inner, self.size, self.start = nn.Linear(5, 16), size, start
        self.outer = nn.Linear(size, 3)

    def forward(self, x):
        x = self.inner(x)
        start = self.start(x.shape[1])
        return self.outer(x[:, start : start + self.size])


WINDOWS = {
    "a quarter": (lambda n: n // 4, 4, 4),
    "a half": (lambda n: n // 2, 8, 8),
    "four of the last eight": (lambda n: n - 8, 4, None),
    "the last eight": (lambda n: n - 8, 8, None),
    "from the end": (lambda n: -8, 4, None),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_over_what_is_cut_begins_behind_as_many_as_stay_or_keeps_the_width(name):
    start, size, units = WINDOWS[name]
    x = torch.randn(4, 5, dtype=torch.float64)
    graph, _ = rehearse(Window(start, size).double(), x)
    assert [group.size for group in graph.unlocked] == [units] * (units is not None), str(graph)
    if units is None:
        assert "slice is given" in graph.group("inner").locked
        return
    check_cuts(lambda: Window(start, size), graph, x)
