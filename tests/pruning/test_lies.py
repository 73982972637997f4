"""However what is read lies in memory, and however it is heard, statistics see the same."""

import contextlib

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, criteria
from actprune.compensation import Mean
from actprune.core.operands import watch_operands
from actprune.pruning.lies import lies
from actprune.pruning.reads import Reads
from zoo import ZOO, build


def batches_of(example, sizes):
    for n, seed in zip(sizes, range(len(sizes)), strict=True):
        torch.manual_seed(seed)
        yield torch.randn(n, *example.shape[1:])


def observed(model, example, positions, sizes, left_out=()):
    pruner = Pruner(model, example, criteria.Entropy(), Budget(params=0.999), compensation=Mean(), positions=positions)
    with torch.no_grad(), pruner.observe() as observation:
        for number, x in enumerate(batches_of(example, sizes)):
            ids = torch.arange(len(x)) + 10 * number
            ids[[k for k in left_out if k < len(ids)] if number == 2 else []] = -1
            observation.begin_batch(ids)
            model(x)
    counts = {
        (name, k): site.compute() for name, by_key in observation.scores.items() for k, site in enumerate(by_key["histogram"])
    }
    means = {number: statistic.compute() for number, (_, statistic) in observation.folds.items()}
    return counts, means


def is_image(example):
    return isinstance(example, torch.Tensor) and example.is_floating_point()


@contextlib.contextmanager
def operator_by_operator(model, watchers, _is_on):
    with watch_operands(model, watchers):
        yield lambda: None


@pytest.mark.parametrize("name", [name for name in ZOO if is_image(ZOO[name].example())])
def test_what_is_got_ready_is_read_as_what_is_not(name, monkeypatch):
    """Batches of one size, of others and of one sample, and rows that do not count, over all nets of the zoo."""
    model, example = build(name)
    model.eval()
    sizes = (6, 6, 6, 4, 1, 1, 6)
    ready = observed(model, example, 3, sizes, left_out=(1, 3))
    monkeypatch.setattr(Reads, "takes", lambda self, x: False)
    monkeypatch.setattr("actprune.pruning.observe.hear_operands", operator_by_operator)
    other = observed(model, example, 3, sizes, left_out=(1, 3))
    torch.testing.assert_close(ready, other, rtol=1e-6, atol=1e-7)


class Halves(nn.Module):
    """A layer reads half of the channels of another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        first, second = self.a(x).relu().chunk(2, 1)
        return self.head(self.b(first * second.sigmoid() + first).relu().mean((2, 3)) + self.b(first).mean((2, 3)))


@pytest.mark.parametrize("sizes", [(1, 4), (1, 6, 6), (6, 1, 6), (1, 1, 8)])
def test_one_sample_tells_nothing_of_how_many_lie(sizes, monkeypatch):
    torch.manual_seed(0)
    model, example = Halves().eval(), torch.randn(2, 3, 8, 8)
    ready = observed(model, example, 2, sizes)
    monkeypatch.setattr(Reads, "takes", lambda self, x: False)
    torch.testing.assert_close(ready, observed(model, example, 2, sizes), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "share"),
    [("ConvBn", 0.4), ("Mixer", 0.2), ("EncoderLayer", 0.2), ("NhwcFlatten", 0.2)],
)
def test_most_places_are_ready_for_a_batch_like_the_one_before(name, share, monkeypatch):
    model, example = build(name)
    took = []
    takes = Reads.takes
    monkeypatch.setattr(Reads, "takes", lambda self, x: took.append(takes(self, x)) or took[-1])
    observed(model.eval(), example, 2, (6, 6, 6))
    assert sum(took) >= share * len(took)


LAYOUTS = {
    "images": lambda x: (x, x),
    "channels last": lambda x: (x.contiguous(memory_format=torch.channels_last),) * 2,
    "tokens": lambda x: (t := x.flatten(2).transpose(1, 2).contiguous(), t.transpose(1, 2)),
    "steps first": lambda x: (t := x.flatten(2).permute(2, 0, 1).contiguous(), t.permute(1, 2, 0)),
    "every second image": lambda x: (t := x.repeat(2, 1, 1, 1)[::2], t),
    "a part of the channels": lambda x: (t := torch.cat((x, x), 1)[:, 2:7], t),
    "numbers": lambda x: (t := x.flatten(1), t),
    "repeated samples": lambda x: (t := x[:1].expand_as(x), t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_find_every_element_where_it_lies(layout):
    torch.manual_seed(0)
    read, x = LAYOUTS[layout](torch.randn(4, 5, 3, 2))
    lie = lies(read, x)
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    assert torch.equal(lie.maps(read), flat)
    n, c, p = (torch.arange(k) for k in flat.shape)
    sample, channel, position = lie.steps
    at = n.view(-1, 1, 1) * sample + c.view(1, -1, 1) * channel + p * position
    assert torch.equal(lie.flat(read)[at], flat)
    assert not lie.is_all or torch.equal(torch.take(read, at), flat)
    if lie.in_rows:
        first = n.view(-1, 1) * sample + p * position
        assert torch.equal(lie.rows(read)[first], flat.transpose(1, 2))
    assert lie.is_all == (layout in {"images", "numbers"})
    assert lie.in_rows == (layout in {"channels last", "tokens", "steps first"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_number_of_samples_is_expected_where_it_would_lie_alike(layout):
    more, fewer, one = torch.randn(4, 5, 3, 2), torch.randn(3, 5, 3, 2), torch.randn(1, 5, 3, 2)
    other = lies(*LAYOUTS[layout](more)).of(3)
    of_one = lies(*LAYOUTS[layout](one)).of(3)
    assert of_one is None or other is None or of_one.stride != other.stride or of_one.is_all == other.is_all
    if layout in {"images", "channels last", "tokens", "numbers", "a part of the channels", "every second image"}:
        assert other == lies(*LAYOUTS[layout](fewer))
    else:
        assert other is None


def test_what_is_no_view_or_uneven_does_not_lie_anywhere():
    x = torch.randn(4, 5, 6, 6)
    assert lies(x, x.abs()) is None
    assert lies(x, x.double()) is None
    assert lies(x[..., :3], x[..., :3]) is None
    assert lies(x[:0], x[:0]) is None
    assert lies(x.as_subclass(type("Other", (torch.Tensor,), {})), x) is None
    one = torch.randn(1, 5, 1, 1).expand(4, 5, 6, 6)
    assert lies(one, one) is None
