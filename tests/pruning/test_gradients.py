"""Statistics of gradients: against Jacobians and finite differences, under any mode, and without a trace left behind."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import actprune
from actprune import Budget, Pruner, criteria
from actprune.compensation import LeastSquares
from actprune.core.errors import ConfigError, ObservationError, TraceError
from actprune.core.hooks import watch_inputs
from actprune.core.operands import watch_operands
from actprune.core.views import Criterion, Statistic
from actprune.pruning.batches import observe_pairs
from actprune.statistics import output_sensitivity
from zoo import ZOO, build

CLASSES = 5


class Small(nn.Module):
    """Batch norm, dropout, a skip connection, and a gate for every site: (N, U) factors of what is read there."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.drop, self.out = nn.Conv2d(6, 4, 1), nn.Dropout(0.5), nn.Linear(4, CLASSES)

    def forward(self, x, gates=None):
        def gate(name, y):
            return y if gates is None else y * gates[name].reshape(y.shape[0], -1, *[1] * (y.dim() - 2))

        x = F.relu(self.norm(self.a(x)), inplace=True)
        x = x + torch.tanh(self.b(gate("b", x)))
        x = torch.tanh(self.c(gate("c", x))).mean((2, 3))
        return self.out(gate("out", self.drop(x)))


WIDTHS = {"b": 6, "c": 6, "out": 4}


def network(seed=0):
    torch.manual_seed(seed)
    model = Small()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.running_mean.normal_()
    return model


def data(n=23, seed=1, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=generator) + offset, torch.randint(0, CLASSES, (n,), generator=generator)


def gate_gradients(model, x, y):
    """Site -> (N, U): derivative of every sample's cross entropy with respect to its gates, in float64."""
    twin = copy.deepcopy(model).double().eval()
    weights = {name: p.detach() for name, p in [*twin.named_parameters(), *twin.named_buffers()]}

    def one(gates, image, target):
        said = functional_call(twin, weights, (image[None], {k: v[None] for k, v in gates.items()}))
        return F.cross_entropy(said, target[None])

    gates = {name: torch.ones(len(x), width, dtype=torch.float64) for name, width in WIDTHS.items()}
    return vmap(jacrev(one))(gates, x.double(), y)


def scored(criterion, model, pairs, **options):
    pruner = Pruner(model, pairs[0][0][:1], criterion, Budget(params=0.7), compensation=None)
    observation = observe_pairs(pruner, pairs, **options)
    return {
        site.name: statistic.compute()
        for group in pruner.graph.unlocked
        for site, statistic in zip(group.sites, next(iter(observation.scores[group.name].values())), strict=True)
    }


def close(actual, expected, rtol=2e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


# --- against independent references ---


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_taylor_is_the_squared_gate_gradient_of_each_samples_loss(offset):
    model, (x, y) = network(), data(offset=offset)
    if offset:
        model.norm.running_mean.copy_((model.a.weight.sum((1, 2, 3)) * offset).detach())
        model.a.padding = (0, 0)
    expected = gate_gradients(model, x, y)
    actual = scored(criteria.Taylor(), model, batches(x, y, 8))
    assert actual.keys() == WIDTHS.keys()
    for name, gradient in expected.items():
        # float32 inputs of 10^4 keep three digits of what varies
        close(actual[name], gradient.square().mean(0), rtol=2e-2 if offset else 2e-5)


def sensitivity_reference(model, x, mode):
    """Derivatives with respect to the activations themselves: what the consumer reads, entry by entry."""
    twin = copy.deepcopy(model).double().eval()
    read = {}
    for name in WIDTHS:
        twin.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    twin(x.double())
    for name in WIDTHS:
        twin.get_submodule(name)._forward_pre_hooks.clear()
    result = {}
    for name, at in read.items():
        shape = at[0].shape

        def outputs(value, image, name=name, shape=shape):
            handle = twin.get_submodule(name).register_forward_pre_hook(lambda *_: value.reshape(1, *shape))
            try:
                return twin(image[None])[0]
            finally:
                handle.remove()

        rows = []
        for image, value in zip(x.double(), at.detach(), strict=True):
            rows.append(torch.autograd.functional.jacobian(lambda v, i=image: outputs(v, i), value.flatten()))
        jacobian = torch.stack(rows).unflatten(2, shape).flatten(3) if len(shape) > 1 else torch.stack(rows)[..., None]
        sized = jacobian.abs().sum(1) if mode == "full" else jacobian.sum(1).abs()  # (N, U, P)
        result[name] = sized.mean((0, 2)) / CLASSES
    return result


@pytest.mark.parametrize("mode", ["full", "lower_bound"])
def test_sensitivity_is_the_mean_absolute_jacobian(mode):
    model, (x, y) = network(), data(5)
    actual = scored(criteria.Sensitivity(mode), model, batches(x, y, 2))
    for name, expected in sensitivity_reference(model, x, mode).items():
        close(actual[name], expected)


def test_the_lower_bound_is_one():
    model, (x, y) = network(), data()
    full = scored(criteria.Sensitivity(), model, batches(x, y, 8))
    lower = scored(criteria.Sensitivity("lower_bound"), model, batches(x, y, 8))
    for name, bound in lower.items():
        assert (bound <= full[name] * (1 + 1e-6)).all()
        assert (bound < full[name]).any()


class Contributions(Statistic):
    """Sum over samples and positions of what gradients are made of."""

    differentiates = "loss"
    whole_maps = True

    def __init__(self, n_units):
        super().__init__()
        self.n_units, self.total, self.n_samples = n_units, torch.zeros(n_units, dtype=torch.float64), torch.ones(())

    def update(self, x, sample_ids, labels=None):
        assert x.dtype == torch.float32
        assert not x.requires_grad
        self.total += x.double().sum((0, 2))

    def compute(self):
        return self.total


class Contributing(Criterion):
    def statistics(self):
        return {"all": Contributions}

    def score(self, view):
        return torch.arange(view.size, dtype=torch.float64)


def some_loss(said):
    """A smooth number that depends on everything the network says."""
    parts = [x for x in tree_leaves(said) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return sum((x.double() * torch.linspace(-1, 1.3, x.numel(), dtype=torch.float64).view_as(x)).sin().sum() for x in parts)


def scaled(site, unit, factor, x, dim):
    x = x.clone()
    x.movedim(dim, 0)[torch.from_numpy(site.positions[unit])] *= factor
    return x


def moved_loss(model, example, site, unit, factor):
    """The loss when a unit is scaled where one site reads it, by replacing the operand itself."""
    watcher = lambda x: scaled(site, unit, factor, x, site.dim)  # noqa: E731
    if site.ordinal is None:
        context = watch_inputs(model, {site.module: watcher})
    else:
        context = watch_operands(model, {site.module: {(site.ordinal, site.operand): [watcher]}})
    with torch.no_grad(), context:
        return some_loss(actprune.core.calling.call(model, example)).item()


# attention with packed weights runs other products when gradients are on; see test_attention_of_torch
@pytest.mark.parametrize("name", ZOO)
def test_contributions_are_finite_differences_in_every_net_of_the_zoo(name):
    model, example = build(name, dtype=torch.float64)
    model.eval()
    pruner = Pruner(model, example, Contributing(), Budget(params=0.999), compensation=None)
    sampled = random.Random(0)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(1))  # one "sample": the loss as it is
        observation.differentiate(loss=lambda: some_loss(actprune.core.calling.call(model, example)))
    checked = 0
    for group in pruner.graph.unlocked:
        for site, statistic in zip(group.sites, observation.scores[group.name]["all"], strict=True):
            for unit in sampled.sample(range(group.size), min(2, group.size)):
                step = 1e-5
                sides = [moved_loss(model, example, site, unit, 1 + sign * step) for sign in (1, -1)]
                expected = (sides[0] - sides[1]) / (2 * step)
                scale = float(statistic.total.abs().max()) + abs(expected) + 1e-3
                assert statistic.total[unit].item() == pytest.approx(expected, abs=1e-4 * scale), (group, site.name, unit)
                checked += 1
    assert checked


# --- what does not matter ---


@pytest.mark.parametrize("criterion", [criteria.Taylor(), criteria.Sensitivity(), criteria.LabelInformation(classes=CLASSES)])
def test_batch_size_and_order_do_not_matter(criterion):
    model, (x, y) = network(), data()
    whole = scored(criterion, model, [(x, y)])
    for pairs in (batches(x, y, 1), batches(x, y, 9), batches(x, y, 9)[::-1]):
        for name, value in scored(criterion, model, pairs).items():
            close(value, whole[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_the_callers_mode_does_not_matter(mode, training):
    model, (x, y) = network(), data()
    expected = scored(criteria.Taylor(), model, batches(x, y, 8))
    model.train(training)
    with mode():
        pairs = batches(x * 1, y * 1, 8)  # made here: inference tensors under inference mode
        actual = scored(criteria.Taylor(), model, pairs)
    for name, value in actual.items():
        assert torch.equal(value, expected[name])
    assert model.training is training


def test_a_hand_written_loop_under_inference_mode_is_told_what_to_do():
    model, (x, y) = network(), data(4)
    pruner = Pruner(model, x[:1], criteria.Taylor(), Budget(params=0.7), compensation=None)
    with torch.inference_mode(), pruner.observe() as observation:
        made_here = x * 1
        observation.begin_batch(torch.arange(4))
        with pytest.raises(ObservationError, match=r"made under torch.inference_mode.*clone\(\) it outside"):
            observation.differentiate(loss=lambda: F.cross_entropy(model(made_here), y))
        observation.differentiate(loss=lambda: F.cross_entropy(model(x), y))
    pruner.plan(observation)


def test_frozen_networks_have_gradients_too():
    model, (x, y) = network(), data()
    expected = scored(criteria.Taylor(), model, batches(x, y, 8))
    model.requires_grad_(False)
    for name, value in scored(criteria.Taylor(), model, batches(x, y, 8)).items():
        close(value, expected[name])
    assert not any(p.requires_grad for p in model.parameters())


def test_nothing_is_left_behind():
    class Restless(Small):
        """Counts its calls, draws, and writes to a buffer."""

        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, x, gates=None):
            self.calls += 1
            self.seen += 1
            return super().forward(x + 0 * torch.rand(()), gates)

    torch.manual_seed(0)
    model, (x, y) = Restless().train(), data()
    model.a.weight.grad = torch.full_like(model.a.weight, 7)
    model.b.eval()
    pruner = Pruner(model, x[:1], criteria.Taylor(), Budget(params=0.7), compensation=None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    modes, hooks = [m.training for m in model.modules()], [len(m._forward_pre_hooks) for m in model.modules()]
    calls, state, numpy_state = model.calls, torch.get_rng_state(), np.random.get_state()[1].copy()
    with pruner.observe() as observation:
        observation.begin_batch(torch.arange(len(x)))
        observation.differentiate(loss=lambda: F.cross_entropy(model(x), y))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert identities == {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    assert (model.a.weight.grad == 7).all()
    assert all(p.grad is None for name, p in model.named_parameters() if name != "a.weight")
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.calls == calls
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert observation.n_samples == len(x)


def test_what_is_watched_without_gradients_sees_the_batch_once():
    """Compensation and other statistics must not count the second run."""
    model, (x, y) = network(), data()

    class Both(criteria.Taylor):
        def statistics(self):
            return {**super().statistics(), **criteria.RMS().statistics()}

    pruner = Pruner(model, x[:1], Both(), Budget(params=0.7), compensation=LeastSquares())
    observation = observe_pairs(pruner, batches(x, y, 8))
    assert all(s.n_samples == len(x) for keys in observation.scores.values() for sites in keys.values() for s in sites)
    assert all(statistic.n_values == len(x) * statistic_positions(layer) for layer, statistic in observation.folds.values())


def test_several_kinds_in_one_observation_are_what_each_is_alone():
    model, (x, y) = network(), data()
    alone = [criteria.Taylor(), criteria.Sensitivity(), criteria.Sensitivity("lower_bound"), criteria.LabelInformation(5)]

    class All(Criterion):
        def statistics(self):
            return {f"{number}": next(iter(c.statistics().values())) for number, c in enumerate(alone)}

        def score(self, view):
            return torch.arange(view.size, dtype=torch.float64)

    pruner = Pruner(model, x[:1], All(), Budget(params=0.7), compensation=None)
    observation = observe_pairs(pruner, batches(x, y, 8))
    assert observation.differentiates == {"loss", "outputs", "output_sum"}
    assert observation.needs_labels
    for number, criterion in enumerate(alone):
        expected = scored(criterion, model, batches(x, y, 8))
        for group in pruner.graph.unlocked:
            for site, statistic in zip(group.sites, observation.scores[group.name][str(number)], strict=True):
                assert torch.equal(statistic.compute(), expected[site.name])


def test_rows_that_are_no_samples_have_no_label():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    pruner = Pruner(model, torch.randn(1, 4), criteria.LabelInformation(classes=3), Budget(params=0.9), compensation=None)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(5), torch.arange(5) % 3)
        with pytest.raises(
            ObservationError, match="group '0' as read by '2': no dimension of what it reads counts the 5 samples"
        ):
            model(torch.randn(8, 4))


def statistic_positions(layer):
    return 16 if layer.weight.dim() > 2 else 1


@pytest.mark.parametrize("how", ["autocast", "model"])
@pytest.mark.parametrize("criterion", [criteria.Taylor(), criteria.Sensitivity()])
def test_bfloat16_activations(how, criterion):
    model, (x, y) = network(), data()
    expected = scored(criterion, model, batches(x, y, 8))
    if how == "model":
        model.bfloat16()
        actual = scored(criterion, model, batches(x.bfloat16(), y, 8))
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            model(x)  # fills autocast's cache with casts that have no graph
            actual = scored(criterion, model, batches(x, y, 8))
            assert torch.is_autocast_enabled("cpu")
    for name, value in actual.items():
        assert value.dtype == torch.float64
        close(value, expected[name], rtol=0.15)


# --- mechanisms ---


@pytest.mark.parametrize("frozen", [True, False])
def test_attention_of_torch(frozen):
    """Heads are read inside the module, by one product of its own; gradients through a float64 twin written by hand."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.attention, self.out = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, CLASSES)

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.out(torch.tanh(self.attention(x, x, x, need_weights=False)[0]).mean(1))

    torch.manual_seed(0)
    model = Net().eval()
    model.requires_grad_(not frozen)
    tokens, y = torch.randint(0, 11, (7, 5)), torch.randint(0, CLASSES, (7,))
    pruner = Pruner(model, tokens[:1], criteria.Taylor(), Budget(params=0.95), compensation=None)
    observation = observe_pairs(pruner, [(tokens[:3], y[:3]), (tokens[3:], y[3:])])
    ((group, by_key),) = [(g, observation.scores[g.name]) for g in pruner.graph.unlocked if g.size == 4]
    twin, m = copy.deepcopy(model).double(), copy.deepcopy(model.attention).double()

    def loss(gates, row, target):
        x = twin.embed(row[None])
        q, k, v = (t.view(1, 5, 4, 2).transpose(1, 2) for t in F.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1))
        heads = (q @ k.transpose(2, 3) / math.sqrt(2)).softmax(3) @ v * gates.view(1, 4, 1, 1)
        said = F.linear(heads.transpose(1, 2).reshape(1, 5, 8), m.out_proj.weight, m.out_proj.bias)
        return F.cross_entropy(twin.out(torch.tanh(said).mean(1)), target[None])

    gradients = [
        torch.autograd.functional.jacobian(lambda g, r=r, t=t: loss(g, r, t), torch.ones(4, dtype=torch.float64))
        for r, t in zip(tokens, y, strict=True)
    ]
    (statistic,) = by_key["taylor"]
    close(statistic.compute(), torch.stack(gradients).square().mean(0), rtol=1e-4)


class Transposed(nn.Module):
    """Weights on the left, one of them transposed on the way: with gradients the product runs the other way round."""

    def __init__(self, square):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.w = nn.Parameter(torch.randn(5, 5 if square else 7))
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh((self.w.T @ torch.tanh(self.a(x))).mean(1)))


@pytest.mark.parametrize("square", [True, False])
def test_a_weight_on_the_left_is_not_taken_for_the_activation(square):
    torch.manual_seed(0)
    model, x, y = Transposed(square), torch.randn(4, 5, 6), torch.randint(0, CLASSES, (4,))
    pruner = Pruner(model, x[:1], criteria.Taylor(), Budget(params=0.99), compensation=None)
    with pruner.observe() as observation:
        observation.begin_batch(torch.arange(4))
        observation.differentiate(loss=lambda: F.cross_entropy(model(x), y))
    for group in pruner.graph.unlocked:
        for site, statistic in zip(group.sites, observation.scores[group.name]["taylor"], strict=True):
            assert statistic.n_samples == 4, site.name


def test_what_is_overwritten_later_has_the_gradient_of_what_was_read():
    """The view through which a consumer reads changes its history when the tensor is written to; its own edge does not."""

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            x = self.a(x)
            said = self.b(x)
            return self.c(said + x.mul_(2)) if self.later else self.c(said + x * 2)

    torch.manual_seed(0)
    model = Later()
    model.b.requires_grad_(False)  # so that autograd has no reason to keep what it read
    x = torch.randn(3, 4)
    found = []
    for model.later in (False, True):
        pruner = Pruner(model, x, criteria.Sensitivity(), Budget(params=0.99), compensation=None)
        with pruner.observe() as observation:
            observation.begin_batch(torch.arange(3))
            observation.differentiate(outputs=lambda: model(x))
        found.append([s.compute() for by in observation.scores.values() for s in by["sensitivity"]])
    for plain, overwritten in zip(*found, strict=True):
        assert (plain > 0).all()
        assert torch.equal(plain, overwritten)


def test_a_module_that_is_overwritten_in_place_after_it_was_read_is_an_error():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            x = torch.relu(self.a(x))
            said = self.b(x)
            x.detach().add_(1)
            return said

    model = Overwrites()
    model.b.requires_grad_(False)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    pruner = Pruner(model, x, criteria.Taylor(), Budget(params=0.9), compensation=None)
    with pruner.observe() as observation:
        observation.begin_batch(torch.arange(3))
        with pytest.raises(ObservationError, match="what 'b' reads is overwritten in place after it was read"):
            observation.differentiate(loss=lambda: F.cross_entropy(model(x), y))


def test_the_pure_function_serves_pre_activations_and_keeps_the_graph():
    """What SeReNe asks of it: sensitivity to pre-activations, in the same pass that trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(8, 4)
    p = model[0](x)
    y = model[2](model[1](p))
    (found,) = output_sensitivity(y, [p], retain_graph=True)
    expected = (p > 0).float().unsqueeze(2) * model[2].weight.T.abs()
    close(found, expected.detach().mean(2))
    (lower,) = output_sensitivity(y, [p], "lower_bound", retain_graph=True)
    close(lower, ((p > 0).float() * model[2].weight.sum(0).abs() / 3).detach())
    assert all(w.grad is None for w in model.parameters())
    y.sum().backward()
    apart = torch.randn(2, requires_grad=True)
    assert torch.equal(output_sensitivity(model(x), [apart])[0], torch.zeros(2))
    with pytest.raises(ConfigError, match="mode='local' is not known"):
        output_sensitivity(y, [p], "local")
    with pytest.raises(ObservationError, match="do not depend on any activation"):
        output_sensitivity(y.detach(), [p])
    with pytest.raises(ObservationError, match="one backward pass for each of 40000 outputs, at most 32768; set mode='lower_b"):
        output_sensitivity(torch.zeros(1, 40000, requires_grad=True) * 1, [p])


# --- the library's own loop ---


def options(**more):
    return {"budget": Budget(params=0.7), "compensation": None, **more}


def test_prune_takes_pairs_and_a_loss():
    (x, y) = data()
    plain, given = network(), network()
    first = actprune.prune(plain, x[:1], batches(x, y, 8), criterion=criteria.Taylor(), **options())
    double = lambda said, targets: F.cross_entropy(said, targets)  # noqa: E731
    second = actprune.prune(given, x[:1], batches(x, y, 8), criterion=criteria.Taylor(), loss=double, **options())
    assert first.removed == second.removed
    regression = [(a, torch.randn(len(a), CLASSES)) for a in x.split(8)]
    actprune.prune(
        network(), x[:1], regression, criterion=criteria.Taylor(), loss=lambda s, t: (s - t).square().mean(), **options()
    )


class Output(dict):
    """As transformers returns it: a mapping with attributes."""

    __getattr__ = dict.__getitem__


class Tokens(nn.Module):
    """As transformers has it: keyword arguments, a loss where labels are given."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(13, 8), nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = torch.relu(self.a(self.embed(input_ids)))
        weights = attention_mask.float() / attention_mask.sum(1, keepdim=True)
        logits = self.b((x * weights[..., None]).sum(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output(loss=loss, logits=logits)


def token_batches(keys):
    generator = torch.Generator().manual_seed(2)
    made = []
    for n in (6, 6, 3):
        lengths = torch.randint(1, 9, (n, 1), generator=generator)
        batch = {
            "input_ids": torch.randint(0, 13, (n, 8), generator=generator),
            "attention_mask": (torch.arange(8) < lengths).long(),
            "labels": torch.randint(0, CLASSES, (n,), generator=generator),
        }
        made.append({key: batch[key] for key in keys})
    return made


EVERY = [
    criteria.Taylor(),
    criteria.Sensitivity(),
    criteria.Sensitivity("lower_bound"),
    criteria.LabelInformation(classes=CLASSES),
    criteria.FLAP(),
    criteria.Wanda(),
]


@pytest.mark.parametrize("fed", [True, False], ids=["labels fed", "labels kept"])
@pytest.mark.parametrize("criterion", EVERY, ids=lambda c: type(c).__name__)
def test_mappings_as_transformers_yields_them(criterion, fed):
    """Whether the model computes the loss itself or the default does: the same scores."""
    pairs = token_batches(("input_ids", "attention_mask", "labels"))
    example = {key: pairs[0][key] for key in ("input_ids", "attention_mask", *(["labels"] if fed else []))}
    torch.manual_seed(3)
    model = Tokens()
    record = actprune.prune(model, example, pairs, criterion=criterion, **options())
    assert record.widths["a"][1] < 12
    torch.manual_seed(3)
    other = {key: pairs[0][key] for key in ("input_ids", "attention_mask", *([] if fed else ["labels"]))}
    twin = actprune.prune(Tokens(), other, pairs, criterion=criterion, **options())
    assert record.removed == twin.removed


@pytest.mark.parametrize("finish", [True, False])
def test_with_compensation_and_measured(finish):
    model, (x, y) = network(), data(64)
    done = actprune.pruning.prune_trained(
        model,
        x[:1],
        batches(x, y, 16),
        criterion=criteria.Taylor(),
        budget=Budget(params=0.7),
        evaluate=lambda net: (net(x).argmax(1) == y).float().mean().item(),
        compensation=LeastSquares(refit="sequential" if finish else "once"),
    )
    assert done.params[1] <= 0.7 * done.params[0]


def broken(kind):
    x, y = data(8)
    return {
        "no targets": (criteria.Taylor(), [x], {}, ConfigError, "got no targets: pass loss="),
        "targets that are no classes": (
            criteria.Taylor(),
            [(x, x)],
            {},
            ConfigError,
            r"float32 targets of shape .* pass loss=",
        ),
        "float classes": (criteria.Taylor(), [(x, y.float())], {}, ConfigError, "float32 targets of shape"),
        "loss per sample": (
            criteria.Taylor(),
            [(x, y)],
            {"loss": lambda said, t: F.cross_entropy(said, t, reduction="none")},
            ObservationError,
            r"the loss must be one number with a gradient, the mean over the batch; got a tensor of shape \(8,\)",
        ),
        "loss without graph": (
            criteria.Taylor(),
            [(x, y)],
            {"loss": lambda said, t: F.cross_entropy(said.detach(), t)},
            ObservationError,
            r"shape \(\) without a gradient",
        ),
        "loss that is no tensor": (criteria.Taylor(), [(x, y)], {"loss": lambda *_: 0.5}, ObservationError, "got float"),
        "loss of something else": (
            criteria.Taylor(),
            [(x, y)],
            {"loss": lambda *_: torch.ones((), requires_grad=True) * 2},
            ObservationError,
            "the loss does not depend on any activation that the criterion observes",
        ),
        "loss that fails": (criteria.Taylor(), [(x, y)], {"loss": lambda *_: int("x")}, TraceError, "invalid literal"),
        "no labels": (
            criteria.LabelInformation(classes=CLASSES),
            [x],
            {},
            ObservationError,
            r"needs the class of each of 8 samples as a vector of integers, got none; data must yield \(inputs, labels\)",
        ),
        "labels that are none": (criteria.LabelInformation(classes=CLASSES), [(x, x)], {}, ObservationError, "got none"),
        "too few classes": (criteria.LabelInformation(classes=2), [(x, y)], {}, ObservationError, "set classes= to the number"),
        "no data": (criteria.Taylor(), None, {}, ObservationError, "Taylor scores activations: pass data="),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["no targets", "targets that are no classes", "float classes", "loss per sample", "loss without graph"]
    + ["loss that is no tensor", "loss of something else", "loss that fails", "no labels", "labels that are none"]
    + ["too few classes", "no data"],
)
def test_what_is_missing_is_said(kind):
    criterion, pairs, more, error, message = broken(kind)
    with pytest.raises(error, match=message):
        actprune.prune(network(), data(1)[0], pairs, criterion=criterion, **options(**more))


def test_a_loop_that_forgets_the_gradients_is_told():
    model, (x, _) = network(), data(4)
    pruner = Pruner(model, x[:1], criteria.Taylor(), Budget(params=0.7), compensation=None)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(4))
        model(x)
        with pytest.raises(ObservationError, match=r"differentiates loss: give differentiate\(\) a function"):
            observation.differentiate(outputs=lambda: model(x))
    with pytest.raises(ObservationError, match=r"saw 0 samples.*call differentiate\(\) after every batch"):
        pruner.plan(observation)


def test_outputs_must_belong_to_samples():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Flatten(0))
    with pytest.raises(ObservationError, match=r"the network returned \(15,\); one output must .* begin with the 5 samples"):
        actprune.prune(model, torch.randn(5, 4), [torch.randn(5, 4)], criterion=criteria.Sensitivity(), **options())


# --- groups that a criterion cannot score ---


def half_normed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    nn.init.uniform_(model[1].weight)
    return model


def test_groups_without_batch_norm_stay_whole(caplog):
    model = half_normed()
    gammas = model[1].weight.detach().clone()
    record = actprune.prune(model, torch.randn(2, 8), criterion=criteria.BatchNormScale(), budget=Budget(params=0.6))
    assert list(record.widths) == ["0"]
    assert model[3].out_features == 20
    assert torch.equal(model[1].weight, gammas[gammas.argsort()[20 - record.widths["0"][1] :].sort().values])
    assert "BatchNormScale scores 1 of 2 groups: the others go through no batch norm" in caplog.text
    assert "these stay whole: 3" in caplog.text


def test_the_budget_counts_what_stays_whole():
    with pytest.raises(actprune.core.errors.BudgetError, match=r"and so do 1 groups that the criterion does not score \(3\)"):
        actprune.Pruner(half_normed(), torch.randn(2, 8), criterion=criteria.BatchNormScale(), budget=Budget(params=0.2))


def test_no_group_at_all_is_an_error():
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    with pytest.raises(
        ObservationError, match=r"BatchNormScale scores none of 1 groups: .*choose another criterion.*groups: 0"
    ):
        actprune.Pruner(model, torch.randn(2, 8), criterion=criteria.BatchNormScale(), budget=Budget(params=0.6))
