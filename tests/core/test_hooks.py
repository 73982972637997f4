"""What forwards are given is heard, and nothing of that stays."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.profiler import profile

from actprune.core.hooks import listening, watch_inputs
from actprune.core.layers import runs_torch_forward
from actprune.core.operands import watch_operands


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(input=self.a(x)) + self.a.forward(x)


def test_every_call_is_heard_in_order_whatever_it_is_called_like():
    model, x, heard = Calls(), torch.randn(2, 3), []
    plain = model(x)
    with listening(model, {name: lambda x, name=name: heard.append((name, x)) for name in ("a", "b")}) as ears:
        torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
        assert [name for name, _ in heard] == ["a", "b", "a"]
        assert heard[0][1] is x
        ears["a"].watcher = lambda x: None
        model(x)
        assert [name for name, _ in heard] == ["a", "b", "a", "b"]
        assert runs_torch_forward(model.a)
        assert inspect.signature(model.a.forward) == inspect.signature(nn.Linear(1, 1).forward)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_was_patched_before_is_called_and_comes_back():
    model, x = Calls(), torch.randn(2, 3)
    patched = model.a.forward = lambda x: x + 1
    with listening(model, {"a": lambda x: None}):
        torch.testing.assert_close(model.a(x), x + 1)
    assert model.a.forward is patched
    with pytest.raises(TypeError), listening(model, {"a": lambda x: None}):
        model.a(None)
    assert model.a.forward is patched


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_themselves_and_are_not_heard(again):
    model, x, heard = Calls(), torch.randn(2, 3), []
    with listening(model, {"a": heard.append, "b": heard.append}):
        twin = again(model)
        with torch.no_grad():
            twin.a.weight.zero_()
            twin.a.bias.zero_()
        torch.testing.assert_close(twin.a(x), torch.zeros(2, 3))
        torch.testing.assert_close(twin(x), twin.b(torch.zeros(2, 3)))
        assert not heard
        model(x)
        assert len(heard) == 3


def test_packed_sequences_are_heard_as_they_are():
    model, heard = nn.ModuleDict({"lstm": nn.LSTM(3, 2)}), []
    packed = pack_sequence([torch.ones(2, 3), torch.ones(1, 3)])
    with listening(model, {"lstm": heard.append}):
        model["lstm"](packed)
    assert heard == [packed]


def test_listeners_may_leave_in_any_order():
    model, x, heard = Calls(), torch.randn(2, 3), []
    first, second, third = (listening(model, {"a": lambda x, name=name: heard.append(name)}) for name in "123")
    for listener in (first, second, third):
        listener.__enter__()
    for leaves, stay in ((second, ["3", "1"]), (first, ["3"]), (third, [])):
        leaves.__exit__(None, None, None)
        heard.clear()
        model.a(x)
        assert heard == stay
    assert "forward" not in vars(model.a)


def test_a_forward_that_is_patched_meanwhile_stays_and_is_not_heard_afterwards():
    model, x, heard = Calls(), torch.randn(2, 3), []
    plain = model.a(x)
    with listening(model, {"a": heard.append, "b": heard.append}):
        inner = model.a.forward
        model.a.forward = lambda x: 2 * inner(x)
        del model.b.forward
        torch.testing.assert_close(model.a(x), 2 * plain)
        assert len(heard) == 1
    torch.testing.assert_close(model.a(x), 2 * plain)
    assert len(heard) == 1
    assert "forward" not in vars(model.b)


def test_what_a_copy_runs_is_not_heard_as_the_original():
    model, x, heard = Calls(), torch.randn(2, 3), []
    with watch_inputs(model, {"a": heard.append}), watch_operands(model, {"b": {(0, 1): [heard.append]}}):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        outputs = [twin(x) for twin in copies]
        assert not heard
        torch.testing.assert_close(outputs, [model(x)] * 2)
        assert len(heard) == 2


class Attends(nn.Module):
    """Products of its own before, in and behind fused attention."""

    def __init__(self):
        super().__init__()
        self.into = nn.Parameter(torch.randn(3, 8, 8))
        self.out = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        q, k, v = (F.linear(x, weight).unflatten(-1, (2, 4)).transpose(1, 2) for weight in self.into)
        return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), self.out)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_attention_stays_fused_unless_one_of_its_products_is_watched(mode):
    """Behind it counting goes on as if it had been taken apart: queries, keys and values are 0 to 2, attention 3 and 4."""
    torch.manual_seed(0)
    model, x = Attends(), torch.randn(2, 5, 8)
    q, k, v = (F.linear(x, weight).unflatten(-1, (2, 4)).transpose(1, 2) for weight in model.into)
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def run(*places):
        heard = {place: [] for place in places}
        with mode(), watch_operands(model, {"": {place: [heard[place].append] for place in places}}), profile() as ran:
            out = model(x)
        torch.testing.assert_close(out, model(x))
        fused = any("_scaled_dot_product_flash" in event.key for event in ran.key_averages())
        return fused, [seen[0].detach() for seen in heard.values()]

    fused, (into, behind) = run((0, 0), (5, 0))
    assert fused
    torch.testing.assert_close(into.view_as(x), x)
    torch.testing.assert_close(behind.view(2, 5, 8), heads.transpose(1, 2).flatten(2))
    _, (values, behind) = run((4, 1), (5, 0))
    torch.testing.assert_close(values.view_as(v), v)
    torch.testing.assert_close(behind.view(2, 5, 8), heads.transpose(1, 2).flatten(2))
