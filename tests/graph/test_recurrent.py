"""Recurrent layers: hidden units leave in all layers and directions, inputs with what produces them."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import actprune
import actprune.compensation
import actprune.criteria
from actprune import trace
from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from masked import counted, difference, masked, outputs, random_units


class Last(nn.Module):
    """Words, a recurrent layer, its output over time, its last states, a head that reads both."""

    def __init__(self, kind, hidden=5, **options):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(11, 6), kind(6, hidden, batch_first=True, **options)
        directions = 1 + self.rnn.bidirectional
        width = options.get("proj_size") or hidden
        self.norm, self.head = nn.LayerNorm(directions * width), nn.Linear((directions + 1) * width, 3)

    def forward(self, words):
        y, state = self.rnn(self.embed(words))
        h = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([self.norm(y).relu().mean(1), h[-1]], 1))


class Packed(nn.Module):
    """Sequences of different lengths, steps first."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(4, 6), kind(6, 5, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x):
        packed = pack_padded_sequence(self.embed(x).tanh(), torch.tensor([2, 4]), enforce_sorted=False)
        y, lengths = pad_packed_sequence(self.rnn(packed)[0])
        return self.head(y.sum(0) / lengths[:, None])


class Decoder(nn.Module):
    """The encoder's last state starts a decoder; a width in an attribute makes another state."""

    def __init__(self):
        super().__init__()
        self.hidden = 7
        self.encoder, self.bridge = nn.GRU(4, 5), nn.Linear(5, 7)
        self.decoder, self.head = nn.LSTM(5, 7), nn.Linear(7, 4)

    def forward(self, x):
        y, h = self.encoder(x)
        cells = torch.zeros(1, x.shape[1], self.hidden, dtype=x.dtype)
        return self.head(self.decoder(y, (self.bridge(h).tanh(), cells))[0])


class Cell(nn.Module):
    """Steps by hand; the first state is the cell's own, or of a width in an attribute."""

    def __init__(self, kind, given):
        super().__init__()
        self.embed, self.cell, self.head, self.width, self.given = nn.Linear(4, 6), kind(6, 5), nn.Linear(5, 3), 5, given

    def forward(self, x):
        start = torch.zeros(x.shape[1], self.width, dtype=x.dtype)
        state = None if not self.given else (start, start) if isinstance(self.cell, nn.LSTMCell) else start
        for step in self.embed(x):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Learned(nn.Module):
    """Learned first states, no batch, a layer that runs again on what it made: its inputs are its units."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(2, 1, 6))
        self.stem, self.rnn, self.head = nn.Linear(4, 6), nn.RNN(6, 6, num_layers=2, nonlinearity="relu"), nn.Linear(6, 3)

    def forward(self, x):
        y, h = self.rnn(self.stem(x), self.start.expand(-1, x.shape[1], -1).contiguous())
        y = torch.stack([self.rnn(row, h[:, 0])[0] for row in y.unbind(1)])
        return self.head(y.mean(1))


class Grid(nn.Module):
    """Along rows and along columns, merged: directions side by side, as in Sequencer."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)
        self.rows, self.columns = (nn.LSTM(8, 4, bidirectional=True, batch_first=True) for _ in range(2))
        self.merge = nn.Linear(16, 8)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        across = self.rows(x.reshape(-1, w, c))[0].view(b, h, w, -1)
        down = self.columns(x.permute(0, 2, 1, 3).reshape(-1, h, c))[0].view(b, w, h, -1).permute(0, 2, 1, 3)
        return self.head((x + self.merge(torch.cat([across, down], -1))).mean((1, 2)))


WORDS = torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(0))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


NETS = {
    "lstm": (lambda: Last(nn.LSTM), WORDS, [5, 6]),
    "lstm, deep": (lambda: Last(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.2), WORDS, [5, 6]),
    # so wide that it never becomes as narrow as its projection, which PyTorch does not run
    "lstm, projected": (lambda: Last(nn.LSTM, 16, num_layers=2, proj_size=3, bidirectional=True), WORDS, [3, 6, 16]),
    "gru": (lambda: Last(nn.GRU, bias=False), WORDS, [5, 6]),
    "gru, deep": (lambda: Last(nn.GRU, num_layers=2, bidirectional=True), WORDS, [5, 6]),
    "rnn": (lambda: Last(nn.RNN), WORDS, [5, 6]),
    "packed lstm": (lambda: Packed(nn.LSTM), drawn(4, 2, 4), [5, 6]),
    "packed gru": (lambda: Packed(nn.GRU), drawn(4, 2, 4), [5, 6]),
    "decoder": (Decoder, drawn(5, 2, 4), [5, 7]),
    "learned": (Learned, drawn(5, 2, 4), [6]),
    "grid": (Grid, drawn(2, 3, 4, 5), [4, 4, 8]),
    "lstm cell": (lambda: Cell(nn.LSTMCell, given=True), drawn(3, 2, 4), [5, 6]),
    "gru cell": (lambda: Cell(nn.GRUCell, given=False), drawn(3, 2, 4), [5, 6]),
    "rnn cell": (lambda: Cell(nn.RNNCell, given=False), drawn(3, 2, 4), [5, 6]),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", NETS)
def test_hidden_units_and_inputs_are_cut_exactly(name):
    make, example, sizes = NETS[name]
    for seed, dtype in enumerate((torch.float64, torch.float32, torch.float64)):
        torch.manual_seed(seed)
        model = make().to(dtype)
        x = example.to(dtype) if example.is_floating_point() else example
        graph, _ = rehearse(model, x)
        assert sorted(g.size for g in graph.unlocked) == sizes, str(graph)
        assert not graph.unknown
        plan = draft(model, graph, random_units(graph, seed + 1))
        references = [masked(model, plan), masked(model, plan, consumers_only=True)]
        before = outputs(model, x)
        assert counted(model, x) == (graph.params, graph.macs)
        cut(model, plan, x)
        ours = outputs(model, x)
        for reference in references:
            assert difference(ours, outputs(reference, x)) < (1e-11 if dtype == torch.float64 else 1e-5), (seed, plan.removed)
        assert not plan.removed or difference(ours, before) > 1e-3
        assert counted(model, x) == (plan.params_after, plan.macs_after)
        after = trace(model, x)
        assert (after.params, after.macs) == (plan.params_after, plan.macs_after)
        model.train()(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_fixed_first_state_fixes_the_width():
    model = nn.GRU(4, 5)
    graph = trace(model, (torch.randn(3, 2, 4), torch.randn(1, 2, 5)))
    assert not graph.unlocked


class Constant(nn.Module):
    """Half of what the layer is given never changes."""

    def __init__(self):
        super().__init__()
        self.stem, self.rnn = nn.Linear(4, 6), nn.GRU(6, 5, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)
        with torch.no_grad():
            self.stem.weight[::2] = 0

    def forward(self, x):
        return self.head(self.rnn(self.stem(x).relu())[0].mean(1))


def test_constant_inputs_are_folded_into_both_directions():
    torch.manual_seed(0)
    model, x = Constant().double(), drawn(8, 5, 4).double()
    before = outputs(model, x)
    criterion, budget = actprune.criteria.Variance(), actprune.Budget(params=0.85)
    actprune.prune(model, x, [x], criterion=criterion, budget=budget, compensation=actprune.compensation.Mean())
    assert model.rnn.input_size < 6
    assert model.rnn.hidden_size == 5
    assert difference(outputs(model, x), before) < 1e-10


def test_what_packed_sequences_hold_is_observed():
    torch.manual_seed(0)
    model, x = Packed(nn.LSTM), drawn(4, 2, 4)
    criterion, budget = actprune.criteria.Variance(), actprune.Budget(params=0.7)
    actprune.prune(model, x, [x], criterion=criterion, budget=budget, compensation=actprune.compensation.Mean())
    assert sum(p.numel() for p in model.parameters()) <= 0.7 * sum(p.numel() for p in Packed(nn.LSTM).parameters())
    model(x)
