from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from actprune import trace
from actprune.core.errors import ConfigError
from actprune.sparsity import Piece, RowGroup, input_groups, unit_groups, zero_units
from actprune.sparsity.blocks import Blocks, check


def members(**claims):
    """``members(a=({("w", 0): [[0], [1]]}, None))`` -> something with ``groups`` and no consumers."""
    groups = [
        SimpleNamespace(name=name, locked=locked, members={key: np.array(p) for key, p in positions.items()})
        for name, (positions, locked) in claims.items()
    ]
    return SimpleNamespace(groups=groups, consumers=())


def owners(model, groups):
    """Brute force from ``Piece``'s fields: parameter name -> {element: (group, unit)}."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in groups:
        for piece in group.pieces:
            allowed = {dim: set(positions.tolist()) for dim, positions in piece.within}
            for unit, positions in enumerate(piece.positions.tolist()):
                for element in np.ndindex(*piece.param.shape):
                    inside = element[piece.dim] in positions
                    if inside and all(element[dim] in chosen for dim, chosen in allowed.items()):
                        slot = found.setdefault(names[id(piece.param)], {})
                        assert element not in slot
                        slot[element] = (group.name, unit)
    return found


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, bias=True)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 4, 3, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.second(torch.relu(self.norm(self.first(x))))
        return self.head(x.mean((2, 3)))


def test_input_groups_are_the_papers():
    conv, linear, norm = nn.Conv2d(6, 4, 3), nn.Linear(5, 7), nn.BatchNorm1d(3)
    groups = input_groups([conv.weight, conv.bias, linear.weight, norm.weight])
    assert [(g.size, g.row_length) for g in groups] == [(6, 4 * 9), (5, 7)]
    with torch.no_grad():
        conv.weight[:, 2] = 0
        conv.weight[1] = 0
    assert groups[0].zeros().tolist() == [False, False, True, False, False, False]


def test_a_lone_input_channel_leaves_the_filters_as_units():
    depthwise, grey = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(1, 8, 5)
    assert [(g.size, g.row_length) for g in input_groups([depthwise.weight, grey.weight])] == [(6, 9), (8, 25)]


def test_unit_groups_of_a_traced_model():
    model = TwoLayers()
    groups = unit_groups(model, trace(model, torch.randn(2, 2, 8, 8)))
    assert {g.name: (g.size, g.row_length) for g in groups} == {
        "first": (
            3,
            2 * 9 + 1 + 2,
        ),  # a filter, its bias, its norm's scale and shift; its readers belong to what they produce
        "second": (4, 3 * 9 + 5),  # a filter, and the columns of the head, whose own outputs may not leave
    }
    found = owners(model, groups)
    assert found["second.weight"][(2, 1, 0, 0)] == ("second", 2)
    assert found["head.weight"][(4, 3)] == ("second", 3)
    assert "head.bias" not in found
    assert all(len(found[name]) == p.numel() for name, p in model.named_parameters() if name in found)


def test_every_element_has_one_owner_in_a_residual_stream():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 4)
            self.square, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = x + self.outer(torch.relu(self.inner(x)))
            return self.head(x + self.square(x))

    model = Stream()
    groups = unit_groups(model, trace(model, torch.randn(2, 3)))
    found = owners(model, groups)
    assert found["square.weight"][(1, 3)] == (groups[0].name, 1)  # both dims are of the stream: the produced unit owns
    assert {g.name: g.row_length for g in groups} == {"stem": 3 + 1 + 6 + 1 + 4 + 1 + 2, "inner": 4 + 1}


def test_what_is_partly_locked_goes_to_the_reader():
    model = nn.Linear(4, 3, bias=False)
    units = members(made=({("weight", 0): [[0], [2]]}, None), read=({("weight", 1): [[0], [1], [3]]}, None))
    found = owners(model, unit_groups(model, units))["weight"]
    assert {found[(0, i)] for i in range(4)} == {("made", 0)}
    assert {found[(2, i)] for i in range(4)} == {("made", 1)}
    assert [found.get((1, i)) for i in range(4)] == [("read", 0), ("read", 1), None, ("read", 2)]


def test_reading_dim_comes_from_the_graph():
    model = nn.Linear(4, 4, bias=False)  # used as x @ weight: rows are read
    units = members(made=({("weight", 1): [[0], [1], [2], [3]]}, None), read=({("weight", 0): [[0], [1], [2], [3]]}, None))
    units.consumers = (SimpleNamespace(weight="weight", reads_dim=0),)
    (group,) = unit_groups(model, units)
    assert group.name == "made"


def test_locked_groups_buffers_and_frozen_parameters_own_nothing():
    model = TwoLayers()
    model.first.bias.requires_grad_(False)
    claims = {
        ("first.weight", 0): [[0], [1], [2]],
        ("first.bias", 0): [[0], [1], [2]],
        ("norm.running_mean", 0): [[0], [1], [2]],
    }
    units = members(a=(claims, None), b=({("second.weight", 0): [[0], [1], [2], [3]]}, "its outputs are read outside"))
    (group,) = unit_groups(model, units)
    assert group.name == "a"
    assert [piece.param is model.first.weight for piece in group.pieces] == [True]


def test_tied_parameters_count_once():
    model = nn.Module()
    model.one, model.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model.two.weight = model.one.weight
    positions = [[0], [1], [2]]
    (group,) = unit_groups(model, members(a=({("one.weight", 0): positions, ("two.weight", 0): positions}, None)))
    assert group.row_length == 3


def test_zero_units_needs_every_piece_to_be_zero():
    model = TwoLayers()
    groups = unit_groups(model, trace(model, torch.randn(2, 2, 8, 8)))
    with torch.no_grad():
        for p in (model.first.weight, model.first.bias, model.norm.weight):
            p[1] = 0
        model.norm.bias[1] = 0.5
        assert not zero_units(groups)["first"].any()
        model.norm.bias[1] = 0
    assert zero_units(groups)["first"].tolist() == [False, True, False]


def scattered():
    """Whole and gathered pieces, several dims, several pieces per unit, elements that nobody owns, a middle dim."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(4, 3, 2)), nn.Parameter(torch.randn(4, 3, 2))
    c, d = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))
    middle = torch.arange(3).unsqueeze(1)
    groups = (
        RowGroup("ab", (Piece(a, 1, middle), Piece(d, 0, torch.tensor([[4], [0], [2]])))),
        RowGroup("b", (Piece(b, 1, middle),)),
        RowGroup("c", (Piece(c, 0, torch.tensor([[0, 5], [2, 1]]), ((1, torch.tensor([0, 3])),)),)),
    )
    rows = [torch.cat([a[:, u].flatten(), d[[4, 0, 2][u]].view(1)]) for u in range(3)]
    rows += [b[:, u].flatten() for u in range(3)]
    rows += [c[[0, 5]][:, [0, 3]].flatten(), c[[2, 1]][:, [0, 3]].flatten()]
    return groups, (a, b, c, d), rows


def test_blocks_reduce_over_exactly_the_units_elements():
    groups, _, rows = scattered()
    blocks = Blocks(groups)
    parts = blocks.read([p.detach() for p in blocks.params])
    for how in ("sum", "amax", "amin"):
        expected = torch.stack([getattr(row.detach(), how)(0) for row in rows])
        torch.testing.assert_close(blocks.reduce(parts, how), expected)
    assert blocks.weights.square().round().tolist() == [len(row) for row in rows]


def test_blocks_spread_and_write_back():
    groups, params, _ = scattered()
    before = [p.detach().clone() for p in params]
    blocks = Blocks(groups)
    factors = torch.arange(8.0) + 2
    with torch.no_grad():
        blocks.write_([x * f for x, f in zip(blocks.read(blocks.params), blocks.spread(factors), strict=True)])
    a, b, c, d = (p.detach() for p in params)
    torch.testing.assert_close(a, before[0] * factors[:3, None])
    torch.testing.assert_close(b, before[1] * factors[3:6, None])
    expected = before[2].clone()
    expected[[0, 5], 0] *= factors[6]
    expected[[0, 5], 3] *= factors[6]
    expected[[1, 2], 0] *= factors[7]
    expected[[1, 2], 3] *= factors[7]
    torch.testing.assert_close(c, expected)
    torch.testing.assert_close(d, before[3] * torch.tensor([3.0, 1, 4, 1, 2]))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_blocks_of_any_layout_and_dtype(layout, dtype):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, 3, 3).to(dtype).to(memory_format=layout)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    blocks = Blocks(input_groups(params))
    parts = blocks.read(blocks.params)
    assert parts[0].dtype == torch.promote_types(dtype, torch.float32)
    sums = torch.cat([p.detach().to(parts[0].dtype).sum((0, 2, 3)) for p in params])
    torch.testing.assert_close(blocks.reduce([x.detach() for x in parts], "sum"), sums)
    with torch.no_grad():
        blocks.write_([2 * x for x in parts])
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p.detach(), 2 * old)
        assert p.is_contiguous(memory_format=layout)


def test_blocks_refuse_overlap_and_stale_positions():
    weight = nn.Parameter(torch.randn(3, 4))
    rows, columns = Piece(weight, 0, torch.arange(3)[:, None]), Piece(weight, 1, torch.tensor([[1], [2]]))
    with pytest.raises(ConfigError, match="6 elements belong to two units"):
        check([RowGroup("rows", (rows,)), RowGroup("columns", (columns,))])
    with pytest.raises(ConfigError, match="4 elements belong to two units"):
        check([RowGroup("twice", (Piece(weight, 0, torch.tensor([[1], [1]])),))])
    with pytest.raises(ConfigError, match=r"old: position 3 exceeds dim 0 .*\(3, 4\)"):
        check([RowGroup("old", (Piece(weight, 0, torch.arange(4)[:, None]),))])
    far = RowGroup("far", (rows, Piece(torch.empty(3, device="meta"), 0, torch.arange(3)[:, None])))
    with pytest.raises(ConfigError, match=r"group far lies on 2 devices \(cpu, meta\)"):
        check([far])


def test_scratch_is_reused_and_disjoint():
    blocks = Blocks(input_groups([nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))]))
    for _ in range(3):
        blocks.reset()
        x = blocks.read([torch.ones(4, 3), torch.ones(4, 3)])
        one, other = blocks.scratch(x), blocks.scratch(x)
        one[0].fill_(2)
        other[0].fill_(3)
        assert (x[0].unique().item(), one[0].unique().item(), other[0].unique().item()) == (1, 2, 3)
        places = [t.data_ptr() for t in (x[0], one[0], other[0])]
    blocks.reset()
    assert blocks.read([torch.ones(4, 3), torch.ones(4, 3)])[0].data_ptr() == places[0]
