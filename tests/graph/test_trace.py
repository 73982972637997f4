"""Tracing leaves no trace, takes every kind of example, and says why something is locked."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from actprune import trace
from actprune.core.errors import TraceError
from zoo import ZOO, build


class Busy(nn.Module):
    """Draws numbers, writes buffers and attributes, mixes training and evaluation mode."""

    def __init__(self, fail=False):
        super().__init__()
        self.conv, self.bn, self.frozen, self.drop = (
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.BatchNorm2d(6),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(6, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("cache", None)
        self.fail, self.calls = fail, 0
        self.frozen.eval()
        self.conv.weight.requires_grad_(False)

    def forward(self, x):
        self.steps += 1
        self.calls += 1
        self.cache = torch.ones(len(x))
        x = self.frozen(self.bn(self.conv(x))) + torch.rand(())
        x = self.head(self.drop(F.relu(x)).mean((2, 3)))
        # a batch norm in training mode although the model was put into evaluation mode
        F.batch_norm(x.detach(), self.bn.running_mean[:2], self.bn.running_var[:2], training=True)
        if self.fail:
            raise ValueError("out of cheese")
        return x


def state_of(model):
    """Everything that must be as it was: values, identity, flags, hooks, generators, global modes."""
    hooks = [
        [len(getattr(m, name)) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")]
        for m in model.modules()
    ]
    module = nn.modules.module
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "values": {n: t.detach().clone() for n, t in tensors.items()},
        "identity": {n: id(t) for n, t in tensors.items()},
        "buffers": [list(m._buffers) + [b is None for b in m._buffers.values()] for m in model.modules()],
        "grad": {n: (t.requires_grad, t.grad) for n, t in tensors.items()},
        "training": [m.training for m in model.modules()],
        "attributes": {n: {k: v for k, v in vars(m).items() if not k.startswith("_")} for n, m in model.named_modules()},
        "hooks": hooks,
        "global_hooks": (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)),
        "rng": torch.get_rng_state(),
        "grad_mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "sdpa": (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same(before, after):
    for key in before:
        assert same(before[key], after[key]), key


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("fail", [False, True])
def test_tracing_leaves_no_trace(mode, fail):
    modes = {
        "plain": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    model = Busy(fail)
    with modes[mode]:
        x = torch.randn(2, 3, 6, 6)
        before = state_of(model)
        if fail:
            with pytest.raises(TraceError, match=r"failed on the example inputs of shape \(2, 3, 6, 6\).*out of cheese"):
                trace(model, x)
        else:
            assert [g.size for g in trace(model, x).unlocked] == []  # running_mean[:2] names channels
        assert_same(before, state_of(model))


def test_a_model_built_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 2))
        x = torch.randn(2, 3, 6, 6)
    assert [g.size for g in trace(model, x).unlocked] == [6]


def test_training_mode_does_not_change_the_graph():
    model, example = build("Dropout")
    trained = str(trace(model.train(), example))
    assert trained == str(trace(model.eval(), example))


def test_inputs_with_gradients_and_grad_of_the_model_stay():
    model, example = build("ConvBn")
    example.requires_grad_()
    model(example).sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    of_input = example.grad.clone()
    trace(model, example)
    assert all(torch.equal(before[n], p.grad) for n, p in model.named_parameters())
    assert torch.equal(of_input, example.grad)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x, scale=None):
        x = torch.cat(x) if isinstance(x, list) else x
        return self.b(torch.relu(self.a(x)) * (1.0 if scale is None else scale))


@pytest.mark.parametrize(
    "example",
    [
        torch.randn(3, 5),
        (torch.randn(3, 5), torch.tensor(2.0)),
        (torch.randn(3, 5),),
        {"x": torch.randn(3, 5), "scale": torch.tensor(2.0)},
        [torch.randn(1, 5), torch.randn(2, 5)],
        lambda model: model(torch.randn(3, 5), scale=2.0),
    ],
    ids=["tensor", "tuple", "tuple of one", "dict", "list", "callable"],
)
def test_every_kind_of_example(example):
    graph = trace(Two(), example)
    assert [(g.name, g.size) for g in graph.unlocked] == [("a", 6)]
    assert graph.macs == 3 * (5 * 6 + 6 * 2)


@pytest.mark.parametrize(
    ("example", "match"),
    [
        (torch.randn(3, 4), r"of shape \(3, 4\) and dtype torch.float32.*RuntimeError"),
        (torch.randint(0, 9, (3, 5)), "dtype torch.int64"),
        ((torch.randn(3, 5), 1.0, 2.0), "takes from 2 to 3 positional arguments"),
        ({"y": torch.randn(3, 5)}, "unexpected keyword argument 'y'"),
        (lambda model: model.nonsense, "has no attribute 'nonsense'"),
        ("a string", "callable|takes the model"),
        (None, "callable|takes the model"),
    ],
)
def test_examples_that_do_not_fit_are_a_trace_error(example, match):
    with pytest.raises(TraceError, match=match):
        trace(Two(), example)


def test_uninitialised_parameters_are_a_trace_error():
    with pytest.raises(TraceError, match="not initialised; run the model once"):
        trace(nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 3))


# -------------------------------------------------------------------------------------------------------------- locks
def test_outputs_are_locked_and_inputs_are_no_units():
    graph = trace(Two(), torch.randn(3, 5))
    assert graph.group("b").locked.startswith("reaches the model's output")
    assert all(g.size != 5 or g.locked for g in graph.groups)


@dataclass
class Answer:
    logits: torch.Tensor
    features: list


class Outputs(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(5, 6), nn.Linear(6, 2), wrap

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.wrap(self.b(y), y)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z, y: (z, y),
        lambda z, y: {"z": z, "more": {"y": [y]}},
        lambda z, y: Answer(z, [y]),
    ],
    ids=["tuple", "nested dict", "dataclass"],
)
def test_units_in_any_output_are_locked(wrap):
    graph = trace(Outputs(wrap), torch.randn(3, 5))
    assert not graph.unlocked
    assert graph.group("a").locked.startswith("reaches the model's output")


@torch.library.custom_op("actprune_tests::mirror", mutates_args=())
def mirror(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).clone()


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.c(torch.relu(self.b(mirror(torch.relu(self.a(x))))))


def test_an_operator_without_a_rule_locks_what_it_touches_and_is_reported():
    graph = trace(Unknown(), torch.randn(3, 5))
    assert [(g.name, g.size) for g in graph.unlocked] == [("b", 7)]
    assert "no rule for" in graph.group("a").locked
    assert "mirror" in graph.group("a").locked
    assert [("mirror" in name, count) for name, count in graph.unknown.items()] == [(True, 1)]
    assert "mirror" in str(graph)


@pytest.mark.parametrize("name", ["ConvBn", "Conv3d", "Transposed", "Grouped", "WeightNorm"])
def test_kernel_positions_are_no_groups(name):
    model, example = build(name)
    for group in trace(model, example).groups:
        assert all(dim < 2 for _, dim in group.members), group


@pytest.mark.parametrize("name", ["ChannelAttentionConv", "ChosenChannels", "PadConstant"])
def test_locks_name_operator_and_module(name):
    model, example = build(name)
    words = {"ChannelAttentionConv": "convol", "ChosenChannels": "index", "PadConstant": "meets a fixed width"}
    graph = trace(model, example)
    assert any(words[name] in g.locked for g in graph.groups if g.locked), str(graph)


@pytest.mark.parametrize("name", ZOO)
def test_groups_partition_what_they_cut(name):
    """No position belongs to two units, every unlocked group has consumers, names are unique."""
    model, example = build(name)
    graph = trace(model, example)
    taken = set()
    for group in graph.groups:
        assert len(group.classes) == group.size
        for (tensor, dim), positions in group.members.items():
            assert positions.shape[0] == group.size
            for p in positions.ravel().tolist():
                assert (tensor, dim, p) not in taken
                taken.add((tensor, dim, p))
    names = [g.name for g in graph.groups]
    assert len(set(names)) == len(names)
    assert all(g.sites for g in graph.unlocked), [g for g in graph.unlocked if not g.sites]


class SharedKeys(nn.Module):
    """Keys and values of one head, expanded to all; scores are keys times queries, so the expanded factor comes first."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(6, 3)
        self.out, self.head = nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.num_heads, 3).transpose(1, 2)
        k, v = (f(x).view(b, 1, t, 3).expand(b, self.num_heads, t, 3) for f in (self.k, self.v))
        shares = (k @ q.transpose(-1, -2)).softmax(-2)
        y = (shares.transpose(-1, -2) @ v).transpose(1, 2).reshape(b, t, self.num_heads * 3)
        return self.head(self.out(y).relu().mean(1))


@pytest.mark.parametrize("samples", [1, 2])
def test_one_sample_shows_the_groups_that_several_show(samples):
    graph = trace(SharedKeys(), torch.randn(samples, 5, 6))
    assert [(g.name, g.size) for g in graph.unlocked] == [("q", 4), ("out", 6)]


def test_a_squeeze_in_place_drops_what_had_extent_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

        def forward(self, x):
            y = self.a(x).mean((2, 3), keepdim=True)
            y.squeeze_()
            return self.b(y)

    assert [g.size for g in trace(Net(), torch.randn(2, 3, 4, 4)).unlocked] == [6]


def test_tracing_twice_gives_the_same_graph_also_for_a_copy():
    model, example = build("AttentionPacked")
    first = trace(model, example)
    assert str(first) == str(trace(model, example)) == str(trace(copy.deepcopy(model), example))


def test_lists_that_a_module_keeps_need_not_be_shapes():
    """A detector keeps its anchors as a list of tensors; words, numbers with a point and nothing are kept too."""

    class Keeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)
            self.anchors, self.names, self.scales = [torch.rand(3, 2), torch.rand(3, 2)], ("a", None), [1.0, 6.0]

        def forward(self, x):  # (N, 2, 4)
            return self.outer(self.inner(x).reshape(-1, 6)).sum() + sum(anchor.sum() for anchor in self.anchors)

    (group,) = trace(Keeper(), torch.rand(3, 2, 4)).unlocked
    assert (group.name, group.size) == ("inner", 6)


def test_what_nobody_detected_is_concatenated_and_indexed():
    class Finder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            scores = self.outer(self.inner(x).relu())
            found = [row[row > 1e9] for row in scores]  # one empty tensor per sample
            return scores, torch.cat(found)[torch.cat(found) > 0]

    (group,) = trace(Finder(), torch.rand(3, 4)).unlocked
    assert (group.name, group.size) == ("inner", 6)


def test_a_batch_norm_that_sees_no_sample_is_cut_with_its_layer():
    """Without samples PyTorch multiplies by ``weight[0]`` instead: the head of a detector that found nothing."""

    class Finder(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)
            self.c, self.d = nn.Conv2d(6, 2, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            f = self.a(x).relu()
            found = f if self.training else f[f.mean((1, 2, 3)) > 1e9]
            return self.d(f), self.c(self.bn(self.b(found)).relu())

    graph = trace(Finder(), torch.randn(2, 3, 8, 8))
    tensors = {name for name, _ in graph.group("b").members}
    assert tensors == {"b.weight", "c.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}
    assert graph.group("b").locked is None


def test_what_belongs_to_a_metric_says_to_which():
    class Judged(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.judges = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), nn.ModuleDict({"last": MeanMetric()})
            self.judges["last"].features = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

        def forward(self, x):
            return self.net(x) + self.judges["last"].features(x)

    locked = {group.size: group.locked for group in trace(Judged(), torch.randn(2, 3)).groups}
    assert locked[5] == "belongs to the metric judges.last"
    assert locked[8] is None
