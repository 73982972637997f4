"""Observation: statistics receive what the consumer reads, hooks live inside the block only."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actprune import Budget, Pruner, criteria
from actprune.core.errors import ObservationError
from actprune.core.views import Criterion
from actprune.statistics import Density, enough, every_second, sample_positions
from processes import apart
from zoo import Attention, build


class Recorder:
    """A statistic that keeps what it is given."""

    needs_labels, differentiates, means_do, takes_maps = False, None, False, False

    whole_maps = True

    def __init__(self, n_units):
        self.n_units, self.seen, self.ids = n_units, [], []

    def update(self, x, sample_ids):
        assert x.shape[1] == self.n_units
        assert x.dim() == 3
        assert sample_ids.shape == x.shape[:1]
        assert not x.requires_grad
        self.seen.append(x.clone())
        self.ids += sample_ids.tolist()

    def check(self):
        pass


class Recording(Criterion):
    def statistics(self):
        return {"all": Recorder}

    def score(self, view):
        return torch.arange(view.size, dtype=torch.float64)


def record(model, *batches, compensation=None):
    """Group name -> list over sites of (activations (N, U, P), ids)."""
    model.eval()
    pruner = Pruner(model, batches[0], Recording(), Budget(params=0.999), compensation=compensation)
    with pruner.observe() as observation:
        for batch in batches:
            n = len(batch[0] if isinstance(batch, tuple) else batch)
            observation.begin_batch(torch.arange(observation.n_samples, observation.n_samples + n))
            model(*batch) if isinstance(batch, tuple) else model(batch)
    return {name: by_key["all"] for name, by_key in observation.scores.items()}


def only(recorders):
    assert len(recorders) == 1
    return torch.cat(recorders[0].seen)


def same(ours, reference):
    torch.testing.assert_close(ours, reference.detach(), rtol=1e-6, atol=1e-6)


def test_after_norm_and_activation():
    model, x = build("ConvBn")
    seen = record(model, x, x + 1)
    both = torch.cat([x, x + 1])
    same(only(seen["0"]), model[:3](both).flatten(2))
    same(only(seen["3"]), model[3:5](model[:3](both)).mean((2, 3))[..., None])
    assert seen["0"][0].ids == [0, 1, 2, 3]


def test_flatten_gives_every_unit_its_positions():
    model, x = build("Flatten")
    seen = record(model, x)
    same(only(seen["2"]), model[:4](x).flatten(2))
    same(only(seen["5"]), model[:7](x)[..., None])


def test_channels_last_and_permuted_positions():
    model, x = build("NhwcFlatten")
    maps = F.avg_pool2d(F.relu(model.a(x)), 2)
    same(only(record(model, x)["a"]).sort(2).values, maps.flatten(2).sort(2).values)


def test_gates_are_seen_as_their_product():
    model, x = build("GluChunk")
    value, gate = model.a(x).chunk(2, 1)
    same(only(record(model, x)["a"]), (value * gate.sigmoid()).mean((2, 3))[..., None])


def test_every_reader_is_a_site_in_order_of_execution():
    model, x = build("Dense")
    one = model.a(x)
    two = model.b(F.relu(one))
    normed = F.relu(model.eval().bn(torch.cat([one, two], 1)))
    first, second, third = record(model, x)["a"]
    same(first.seen[0], F.relu(one).flatten(2))
    same(second.seen[0], normed[:, :4].flatten(2))
    same(third.seen[0], one.mean((2, 3))[..., None])


def test_tokens_are_positions():
    model, x = build("Mixer")
    model.eval()
    embedded = model.embed(x)
    seen = record(model, x)
    y = model.norm1(embedded).transpose(1, 2)
    # token mixing: its hidden width is read channel by channel, (N, 12, 5) -> units in the last dimension
    same(only(seen["tokens.0"]), model.tokens[:2](y).transpose(1, 2))


@pytest.mark.parametrize("kind", ["packed", "chunked", "separate"])
def test_heads_are_read_by_the_projection(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = Attention(6, 3, 2, kind), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.attention(x)))

    model, x = Net(), torch.randn(2, 5, 6)
    read = []
    handle = model.attention.proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(x)
    handle.remove()
    heads = record(model, x)["attention.qkv" if kind != "separate" else "attention.q"]
    expected = read[0].unflatten(2, (3, 2)).permute(0, 2, 3, 1).flatten(2)  # (N, heads, width * tokens)
    same(only(heads), expected)


def test_bare_parameters_and_operators():
    model, x = build("BareParameters")
    one = F.relu(F.linear(x, model.w1, model.b1))
    two = torch.tanh(one @ model.w2)
    three = torch.tanh(two @ model.w3.T)
    four = F.silu(three @ model.w4)
    seen = record(model, x)
    found = sorted((only(r) for r in seen.values()), key=lambda t: t.shape[1])
    for ours, expected in zip(found, (three, two, one, four), strict=True):
        same(ours, expected[..., None])


class Mixed(nn.Module):
    """Contractions of its own between those of its children, one of them by keyword."""

    def __init__(self):
        super().__init__()
        self.a, self.w, self.b, self.c = nn.Linear(5, 6), nn.Parameter(torch.randn(7, 6)), nn.Linear(7, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.a(input=x))
        x = torch.relu(F.linear(x, self.w))
        return self.c(input=torch.relu(self.b(x)))


def test_own_contractions_between_those_of_children():
    model, x = Mixed(), torch.randn(3, 5)
    seen = record(model, x)
    a = torch.relu(model.a(x))
    w = torch.relu(a @ model.w.T)
    same(only(seen["a"]), a[..., None])
    same(only(seen["w"]), w[..., None])
    same(only(seen["b"]), torch.relu(model.b(w))[..., None])


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.attention(x, x, x, need_weights=need_weights)[0]))

    model, x = Net(), torch.randn(3, 5, 8)
    seen = record(model, x)
    m = model.attention
    q, k, v = (t.view(3, 5, 4, 2).transpose(1, 2) for t in F.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, tokens, width)
    (heads,) = (r for r in seen.values() if r[0].n_units == 4)
    ours = only(heads)
    same(ours.sort(2).values, y.flatten(2).sort(2).values)


def test_a_module_that_runs_twice_is_seen_twice():
    model, x = build("SharedTwice")
    model.eval()
    first = model.stem(x)
    second = F.relu(model.bn(model.shared(first)))
    site = record(model, x)["stem"][0]
    assert len(site.seen) == 2
    same(site.seen[0], first.flatten(2))
    same(site.seen[1], second.flatten(2))


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules()]


@pytest.mark.parametrize("name", ["ConvBn", "BareParameters", "AttentionManual"])
def test_hooks_live_inside_the_block_only(name):
    model, example = build(name)
    pruner = Pruner(model, example, criteria.Entropy(), Budget(params=0.9))
    before = hooks_of(model)
    with pruner.observe():
        assert sum(hooks_of(model)) > sum(before)
    assert hooks_of(model) == before
    with pytest.raises(TypeError), pruner.observe():
        model(None)
    assert hooks_of(model) == before
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_forward_that_fails_inside_leaves_no_mode_behind():
    model, example = build("BareParameters")
    pruner = Pruner(model, example, criteria.Entropy(), Budget(params=0.9))
    with pytest.raises(RuntimeError), pruner.observe():
        model(torch.randn(3, 4))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    model(example)


def test_what_was_not_observed_inside_is_not_counted():
    model, example = build("ConvBn")
    pruner = Pruner(model, example, Recording(), Budget(params=0.9), compensation=None)
    with pruner.observe() as observation:
        pass
    model(example)
    assert observation.scores["0"]["all"][0].seen == []


class Sampling(Recorder):
    """The same, content with a few positions."""

    whole_maps = False


class Both(Recording):
    def statistics(self):
        return {"few": Sampling, "all": Recorder, "more": Sampling}


def record_both(model, x, positions, ids):
    pruner = Pruner(model.eval(), x, Both(), Budget(params=0.999), compensation=None, positions=positions)
    with pruner.observe() as observation:
        for part, numbers in zip(x.split(3), ids.split(3), strict=True):
            observation.begin_batch(numbers)
            model(part)
    return observation.scores


def test_statistics_see_the_drawn_positions_of_every_sample():
    model, _ = build("ConvBn")
    torch.manual_seed(0)
    x, ids = torch.randn(5, 3, 8, 8), torch.tensor([4, 17, 2, 300, 9])
    seen = record_both(model, x, 5, ids)["0"]
    maps = model[:3](x).flatten(2)
    drawn = sample_positions(ids, 64, 5, seed=0)
    expected = torch.stack([maps[n][:, drawn[n]] for n in range(5)])
    same(only(seen["few"]), expected)
    same(only(seen["more"]), expected)
    same(only(seen["all"]), maps)


def test_units_of_several_channels_and_units_that_are_some_of_the_channels():
    model, x = build("Flatten")
    seen = record_both(model, x, 3, torch.arange(len(x)))
    flat = model[:4](x).flatten(2)
    drawn = sample_positions(torch.arange(len(x)), flat.shape[2], 3, seed=0)
    same(only(seen["2"]["few"]), torch.stack([flat[n][:, drawn[n]] for n in range(len(x))]))
    model, x = build("Dense")
    normed = F.relu(model.eval().bn(torch.cat([model.a(x), model.b(F.relu(model.a(x)))], 1)))
    second = record_both(model, x, 4, torch.arange(len(x)))["a"]["few"][1]
    maps = normed[:, :4].flatten(2)
    drawn = sample_positions(torch.arange(len(x)), maps.shape[2], 4, seed=0)
    same(torch.cat(second.seen), torch.stack([maps[n][:, drawn[n]] for n in range(len(x))]))


@pytest.mark.parametrize("positions", [None, 64, 1000])
def test_small_maps_are_seen_whole_and_sampling_can_be_off(positions):
    model, _ = build("ConvBn")
    x = torch.randn(4, 3, 8, 8)
    seen = record_both(model, x, positions, torch.arange(4))
    for key in ("few", "all"):
        same(only(seen["0"][key]), model[:3](x).flatten(2))


@pytest.mark.parametrize(
    ("samples", "density"),
    [
        (450, Density(64)),
        (2047, Density(16)),
        (2049, Density(16)),
        (5000, Density(2, halved=True)),
        (10**6, Density(2, halved=True)),
        (None, Density(8)),
    ],
)
def test_more_samples_need_fewer_positions(samples, density):
    assert enough(samples) == density
    if samples is not None:
        read = samples / 2 if density.halved else samples
        assert read * density.positions > (3 << 13) / (2**0.5 if density.positions > 2 else 6)
    model, _ = build("ConvBn")
    pruner = Pruner(model.eval(), torch.randn(2, 3, 8, 8), criteria.Entropy(), Budget(params=0.6), compensation=None)
    with pruner.observe(samples) as observation:
        observation.begin_batch(torch.arange(20))
        model(torch.randn(20, 3, 8, 8))
    (statistic,) = observation.scores["0"]["histogram"]
    n = len(every_second(torch.arange(20), seed=0)) if density.halved else 20
    assert statistic.counts.sum(1).tolist() == [n * min(64, density.positions)] * statistic.n_units


class Mean(Recorder):
    """The mean of every map."""

    whole_maps, means_do = False, True


class Halved(Recording):
    def statistics(self):
        return {"few": Sampling, "all": Recorder, "mean": Mean}


def test_of_many_samples_every_second_one_is_read_where_positions_are_drawn():
    model, _ = build("ConvBn")
    model.eval()
    torch.manual_seed(0)
    x, ids = torch.randn(40, 3, 8, 8), torch.randperm(1000)[:40]
    maps = model[:3](x).flatten(2)
    seen = []
    for size in (40, 7, 1):
        pruner = Pruner(model, x[:1], Halved(), Budget(params=0.999), compensation=None)
        with pruner.observe(5000) as observation, torch.no_grad():
            for part in torch.arange(40).split(size):
                observation.begin_batch(ids[part])
                model(x[part])
        seen.append(observation.scores["0"])
    rows = every_second(ids, seed=0)
    assert 8 < len(rows) < 32
    drawn = sample_positions(ids, 64, 2, seed=0)
    expected = torch.stack([maps[n][:, drawn[n]] for n in rows.tolist()])
    for one in seen:
        same(only(one["few"]), expected)
        assert one["few"][0].ids == ids[rows].tolist()
        same(only(one["all"]), maps)
        same(only(one["mean"]), maps.mean(2, keepdim=True))


@pytest.mark.parametrize("name", ["ConvBn", "AttentionPacked", "Flatten"])
def test_sampled_scores_do_not_depend_on_batches_or_order(name):
    model, example = build(name)
    model.eval()
    torch.manual_seed(3)
    data, ids = torch.randn(12, *example.shape[1:]), torch.randperm(100)[:12]
    scores = []
    for order, size in ((torch.arange(12), 12), (torch.randperm(12), 5)):
        pruner = Pruner(model, example, criteria.Entropy(), Budget(params=0.6), positions=3)
        with pruner.observe() as observation, torch.no_grad():
            for part in order.split(size):
                observation.begin_batch(ids[part])
                model(data[part])
        scores.append(pruner.scores(observation))
    for group, values in scores[0].items():
        torch.testing.assert_close(scores[1][group], values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_site_and_batch(bad):
    model, example = build("ConvBn")
    model.eval()
    pruner = Pruner(model, example, criteria.Entropy(), Budget(params=0.9))
    with pruner.observe() as observation, torch.no_grad():
        for i in range(3):
            x = torch.randn(2, 3, 8, 8)
            if i == 1:
                x[0, 0] = bad
            observation.begin_batch(torch.arange(2 * i, 2 * i + 2))
            model(x)
    with pytest.raises(ObservationError, match=r"group '0' as read by '3'.*NaN or Inf.*batch 1"):
        pruner.plan(observation)


def test_nothing_observed_is_an_error():
    model, example = build("ConvBn")
    pruner = Pruner(model, example, criteria.Entropy(), Budget(params=0.9))
    with pruner.observe() as observation:
        pass
    with pytest.raises(ObservationError, match="saw 0 samples"):
        pruner.plan(observation)
    with pytest.raises(ObservationError, match="observe validation batches first"):
        pruner.plan(None)


@pytest.mark.parametrize("criterion", [criteria.Entropy(), criteria.Entropy(pool="gap"), criteria.Rademacher()])
@pytest.mark.parametrize("name", ["ConvBn", "AttentionPacked", "BareParameters"])
def test_the_result_does_not_depend_on_the_batches(name, criterion):
    model, example = build(name)
    model.eval()
    torch.manual_seed(3)
    data = torch.randn(24, *example.shape[1:])
    scores, plans = [], []
    for size in (24, 5, 1):
        pruner = Pruner(model, example, criterion, Budget(params=0.6))
        with pruner.observe() as observation, torch.no_grad():
            for start in range(0, 24, size):
                batch = data[start : start + size]
                observation.begin_batch(torch.arange(start, start + len(batch)))
                model(batch)
        scores.append(pruner.scores(observation))
        plans.append(pruner.plan(observation))
    for other in scores[1:]:
        for group, values in scores[0].items():
            torch.testing.assert_close(other[group], values, rtol=1e-3, atol=1e-6)
    for other in plans[1:]:
        for tensor, shift in plans[0].shifts.items():
            torch.testing.assert_close(other.shifts[tensor], shift, rtol=1e-5, atol=1e-7)


def test_observing_under_inference_mode_and_in_training_mode():
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        model, example = build("ConvBn")
        pruner = Pruner(model, example, criteria.Entropy(), Budget(params=0.7))
        with mode, pruner.observe() as observation:
            observation.begin_batch(torch.arange(2))
            model(example)
        plan = pruner.plan(observation)
        pruner.execute(plan)
        model(example).sum().backward()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 5, 6), [0, 1, 2, 3]),  # samples first
        ((8, 5, 6), [0, 0, 1, 1, 2, 2, 3, 3]),  # two windows per sample
        ((1, 4, 6), [0, 1, 2, 3]),  # a batched product of one batch
        ((7, 4, 6), [0, 1, 2, 3]),  # sequence first
    ],
)
def test_rows_are_given_to_the_sample_they_belong_to(shape, expected):
    """The activation is the number of its sample."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(1, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model = Net()
    with torch.no_grad():
        model.a.weight.fill_(1)
        model.a.bias.zero_()
    rows = torch.tensor(expected, dtype=torch.float32)
    x = rows.view(-1, 1, 1).expand(-1, shape[1], 1) if len(rows) == shape[0] else rows.view(1, -1, 1).expand(shape[0], -1, 1)
    pruner = Pruner(model, x, Recording(), Budget(params=0.99), compensation=None)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(4))
        model(x)
    (site,) = observation.scores["a"]["all"]
    (seen,) = site.seen
    assert site.ids == [0, 1, 2, 3]
    assert torch.equal(seen, torch.arange(4.0).view(4, 1, 1).expand_as(seen))
    assert seen[:, 0].numel() == x.numel()


def test_an_image_without_a_batch_dimension():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    x = torch.randn(3, 8, 8)
    pruner = Pruner(model, x, Recording(), Budget(params=0.8))
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(1))
        model(x)
    same(observation.scores["0"]["all"][0].seen[0].sort(2).values, model[:2](x).flatten(1)[None].sort(2).values)
    pruner.execute(pruner.plan(observation))


@pytest.mark.parametrize("whole", [True, False], ids=["wrapped", "in place"])
@apart
def test_compiled_modules_are_observed_and_pruned(whole):
    """Hooks inside compiled code do not fire, so observation runs eagerly; scores equal those of the plain model."""
    x = torch.randn(8, 5)
    plain = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    twin = copy.deepcopy(plain)
    if whole:
        model = nn.Sequential(torch.compile(twin, backend="eager"))
    else:
        twin.compile(backend="eager")
        model = nn.Sequential(twin)
    model(x)
    found = []
    for network in (model, plain):
        pruner = Pruner(network, x, criteria.Entropy(), Budget(params=0.6))
        with pruner.observe() as observation, torch.no_grad():
            observation.begin_batch(torch.arange(len(x)))
            network(x)
        found.append(next(iter(pruner.scores(observation).values())))
        pruner.execute(pruner.plan(observation))
        assert network(x).shape == (8, 3)
    assert torch.equal(found[0], found[1])
    assert torch.allclose(model(x), plain(x), atol=1e-6)


def test_what_is_got_ready_and_what_is_not_read_alike(monkeypatch):
    """Batches of other sizes, images of another size, another memory layout, gradients: what is expected, or not."""
    model, _ = build("ConvBn")
    model.eval()
    torch.manual_seed(0)
    batches = [torch.randn(n, 3, size, size) for n, size in ((6, 8), (6, 8), (4, 8), (6, 6), (6, 8), (5, 8))]
    batches.append(torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    found = []
    for ready in (True, False):
        if not ready:
            monkeypatch.setattr("actprune.pruning.reads.Reads.takes", lambda self, x: False)
        pruner = Pruner(model, batches[0], criteria.Entropy(), Budget(params=0.6), compensation=None, positions=3)
        with pruner.observe() as observation:
            for number, x in enumerate(batches):
                observation.begin_batch(torch.arange(len(x)) + 10 * number)
                with torch.set_grad_enabled(number % 2 == 0):
                    model(x)
                if number == 3:
                    assert observation.scores
        (statistic,) = observation.scores["0"]["histogram"]
        found.append(statistic)
    assert torch.equal(found[0].compute(), found[1].compute())
    assert found[0].n_samples == sum(map(len, batches))


def test_a_loop_that_forgets_to_name_its_batches_is_told():
    model, example = build("ConvBn")
    pruner = Pruner(model.eval(), example, criteria.Entropy(), Budget(params=0.9))
    with torch.no_grad(), pruner.observe() as observation:
        model(example)
    with pytest.raises(ObservationError, match=r"ran on samples that nobody named; call observation.begin_batch\(sample_ids\)"):
        pruner.scores(observation)
