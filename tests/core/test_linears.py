"""What ``F.linear`` is given is heard as operators would be watched, from the second forward on without watching them."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from actprune.core.linears import hear_operands
from actprune.core.operands import watch_operands


class Notes(nn.Module):
    """Notes how many forwards ran while a mode saw their operators."""

    def __init__(self):
        super().__init__()
        self.by_operator = 0

    def note(self):
        self.by_operator += _get_current_dispatch_mode() is not None


class Bare(Notes):
    """Two parameters, one of them twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        self.note()
        return F.linear(F.linear(F.linear(x, self.a).relu(), weight=self.a), self.b)


class Packed(Notes):
    """Rows and columns of one parameter, attention in between."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        self.note()
        q, k, v = (F.linear(x, part) for part in self.into.split(4))
        return F.linear(F.scaled_dot_product_attention(q, k, v), self.out[:, 2:6])


class Attends(Notes):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, **options)
        self.inner.register_forward_pre_hook(lambda *_: self.note())
        self.other = nn.Parameter(torch.randn(2, 5, options.get("kdim", 6)))

    def forward(self, x):
        return self.inner(x, self.other, self.other)[0] if self.inner.kdim != 6 else self.inner(x, x, x)[0]


def rows(x):
    return x.detach().reshape(-1, x.shape[-1]).clone()


def heard_by(watch, model, path, places, inputs, context=torch.no_grad):
    seen = {place: [] for place in places}
    watchers = {path: {place: [lambda x, place=place: seen[place].append(rows(x))] for place in places}}
    with watch(model, watchers):
        for x in inputs:
            with context():
                model(x)
    return seen


CASES = {
    "bare": (Bare, "", [(0, 0), (1, 0), (2, 0)], 1),
    "the second of two calls": (Bare, "", [(1, 0)], 1),
    "packed": (Packed, "", [(0, 0), (5, 0)], 1),
    "a product with a weight": (Packed, "", [(0, 0), (5, 1)], 4),
    "in attention": (Packed, "", [(0, 0), (3, 0)], 4),
    "multi-head": (partial(Attends, batch_first=True), "inner", [(0, 0), (3, 0)], 1),
    "multi-head, steps first": (Attends, "inner", [(3, 0)], 1),
    "multi-head, widths of their own": (partial(Attends, kdim=4, vdim=4), "inner", [(0, 0), (1, 0), (2, 0), (5, 0)], 1),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("case", CASES)
def test_every_forward_is_heard_as_operators_are_watched(case, context):
    torch.manual_seed(0)
    make, path, places, watched = CASES[case]
    model, inputs = make().eval(), [torch.randn(n, 2, 6) for n in (3, 3, 1, 4)]
    if case.endswith("own"):
        inputs = [torch.randn(n, 5, 6) for n in (3, 3, 1, 4)]
    expected = heard_by(watch_operands, model, path, places, inputs, context)
    model.by_operator = 0
    plain = F.linear
    heard = heard_by(hear_operands, model, path, places, inputs, context)
    assert all(len(each) == 4 for each in heard.values())
    torch.testing.assert_close(heard, expected, rtol=1e-5, atol=1e-6)
    assert model.by_operator == watched
    assert F.linear is plain
    assert torch.equal(model(inputs[0]), model(inputs[0]))


def test_weights_may_be_moved_and_replaced():
    model, inputs = Bare(), [torch.randn(3, 6) for _ in range(4)]
    heard = []

    def listen(x):
        heard.append(x)
        if len(heard) == 2:
            model.a.data = model.a.data.clone()
        if len(heard) == 3:
            model.b, model.a = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 6))

    with torch.no_grad(), hear_operands(model, {"": {(0, 0): [listen], (2, 0): [lambda x: None]}}):
        for x in inputs:
            model(x)
    assert all(a is b for a, b in zip(heard, inputs, strict=True))
    assert model.by_operator == 1


def test_weights_that_are_made_in_the_forward_are_heard_operator_by_operator():
    class Masked(Bare):
        def forward(self, x):
            self.note()
            return F.linear(x, self.b * (self.b > 0))

    model, x = Masked(), torch.randn(3, 6)
    heard = heard_by(hear_operands, model, "", [(0, 0)], [x, 2 * x, 3 * x])
    torch.testing.assert_close(heard[0, 0], [x, 2 * x, 3 * x])
    assert model.by_operator == 3


def test_a_forward_that_fails_is_not_the_last_and_one_that_differs_is_told(caplog):
    """Failed ones before and after the calls are known; then one leaves a call out, and all are looked at from there on."""

    class Turns(Bare):
        does = "all"

        def forward(self, x):
            self.note()
            y = F.linear(x, self.a)
            if self.does == "fail":
                raise ValueError("no")
            return y if self.does == "half" else F.linear(y.relu(), self.b)

    model, x, heard = Turns(), torch.randn(3, 6), []
    plan = ["fail 1", "all 2", "all 2", "fail 2", "all 2", "half 2", "all 3", "half 4", "all 5"]
    with torch.no_grad(), hear_operands(model, {"": {(0, 0): [lambda x: None], (1, 0): [heard.append]}}):
        for turn in plan:
            assert not caplog.records or turn in plan[6:]
            model.does, by_operator = turn.split()
            if model.does == "fail":
                with pytest.raises(ValueError, match="no"):
                    model(x)
            else:
                model(x)
            assert model.by_operator == int(by_operator)
    assert len(heard) == 5
    assert _get_current_dispatch_mode() is None
    (record,) = caplog.records
    assert record.getMessage().startswith("the model: it multiplies by other weights than in its first forward")


@pytest.mark.parametrize("watch", [hear_operands, watch_operands])
@pytest.mark.parametrize("where", ["", "child"])
def test_an_interrupted_forward_leaves_no_mode_behind(watch, where):
    class Outer(Bare):
        def __init__(self):
            super().__init__()
            self.child = Bare()
            self.child.forward = self.inner

        def inner(self, x):
            if where:
                raise KeyboardInterrupt
            return x

        def forward(self, x):
            y = self.child(F.linear(x, self.a))
            raise KeyboardInterrupt(str(y.shape))

    model, x = Outer(), torch.randn(3, 6)
    places = {(0, 0): [lambda x: None]}
    with pytest.raises(KeyboardInterrupt), watch(model, {"": places, "child": places}):
        model(x)
    assert _get_current_dispatch_mode() is None
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failure_inside_a_handler_of_another_is_told_from_it():
    class Tries(Bare):
        def forward(self, x):
            self.note()
            return F.linear(x, self.a)

    model, x, heard = Tries(), torch.randn(3, 6), []
    with torch.no_grad(), hear_operands(model, {"": {(0, 0): [heard.append]}}):
        try:
            raise ValueError
        except ValueError:
            model(x)
        model(x)
    assert len(heard) == 2
    assert model.by_operator == 1


class Plain(torch.Tensor):
    """A subclass that leaves everything as it is."""


class Compares(torch.Tensor):
    """Asks which function it is, as quantised weights do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out + 1 if func is F.linear else out


def test_calls_with_subclasses_are_looked_at_and_count_alike():
    class First(Bare):
        def forward(self, x):
            self.note()
            y = F.linear(x.as_subclass(Plain), self.a).as_subclass(torch.Tensor)
            return F.linear(y, self.a)

    model, x = First(), torch.randn(3, 6)
    expected = F.linear(x, model.a).detach()
    heard = heard_by(hear_operands, model, "", [(1, 0)], [x, x, x])[1, 0]
    torch.testing.assert_close(heard, [expected] * 3)


def test_who_compares_functions_with_linear_finds_it():
    class Asks(Bare):
        def forward(self, x):
            return F.linear(x.as_subclass(Compares), self.a).as_subclass(torch.Tensor)

    model, x = Asks(), torch.randn(3, 6)
    plain = model(x)
    with hear_operands(model, {"": {(0, 0): [lambda x: None]}}):
        torch.testing.assert_close(model(x), plain)
        torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("transform", ["inside", "gradients", "ensemble"])
def test_transforms_of_functions_run_as_before(transform):
    class Net(Bare):
        def forward(self, x):
            self.note()
            if transform == "inside":
                return torch.vmap(lambda row: F.linear(row.unsqueeze(0), self.a))(x)
            return F.linear(x, self.a)

    def run():
        if transform == "gradients":
            return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())({"a": model.a.detach()})
        if transform == "ensemble":
            many = {"a": torch.stack((model.a, 2 * model.a)).detach()}
            return torch.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(many)
        return model(x)

    model, x = Net(), torch.randn(3, 6)
    plain = run()
    with hear_operands(model, {"": {(0, 0): [lambda x: None]}}):
        model(x)
        torch.testing.assert_close(run(), plain)
        torch.testing.assert_close(run(), plain)


@pytest.mark.parametrize("kind", ["sparse", "meta", "none", "shared"])
def test_parameters_of_all_kinds(kind):
    class Net(Bare):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(2, 2)
            if kind == "sparse":
                self.child.weight = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
            elif kind == "meta":
                self.child.to("meta")
            elif kind == "shared":
                self.child.weight = self.a

        def forward(self, x):
            self.note()
            weight = self.a
            if kind == "none":
                self.a = None
            out = F.linear(x, weight)
            self.a = weight
            return out

    model, heard = Net(), []
    xs = [torch.randn(3, 6) for _ in range(4)]
    with torch.no_grad(), hear_operands(model, {"": {(0, 0): [heard.append]}}):
        for k, x in enumerate(xs):
            model(x)
            if kind == "shared" and k == 1:
                model.a = nn.Parameter(torch.randn(6, 6))
    assert all(a is b for a, b in zip(heard, xs, strict=kind != "none"))
    assert model.by_operator == (4 if kind == "none" else 1)


def test_recordings_may_end_in_any_order():
    model, x, plain = Bare(), torch.randn(3, 6), F.linear
    heard = [], []
    first, second = (hear_operands(model, {"": {(0, 0): [each.append]}}) for each in heard)
    with torch.no_grad():
        first.__enter__()
        model(x)
        second.__enter__()
        model(x)
        model(x)
        first.__exit__(None, None, None)
        model(x)
        assert F.linear is not plain
        second.__exit__(None, None, None)
        assert F.linear is plain
        model(x)
    assert [len(each) for each in heard] == [3, 3]


def test_what_children_do_with_the_same_weight_is_theirs():
    class Tied(Bare):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(6, 6, bias=False)
            self.child.weight = self.a

        def forward(self, x):
            self.note()
            return F.linear(self.child(2 * x), self.a)

    model, x = Tied(), torch.randn(3, 6)
    heard = heard_by(hear_operands, model, "", [(0, 0)], [x, -x, x])[0, 0]
    torch.testing.assert_close(heard, [F.linear(2 * y, model.a).detach() for y in (x, -x, x)])
    assert model.by_operator == 1


def test_other_threads_are_not_heard():
    class Threads(Bare):
        def forward(self, x):
            self.note()
            other = threading.Thread(target=F.linear, args=(-x, self.a))
            other.start()
            other.join()
            return F.linear(x, self.a)

    model, x = Threads(), torch.randn(3, 6)
    heard = heard_by(hear_operands, model, "", [(0, 0)], [x, x, x])[0, 0]
    torch.testing.assert_close(heard, [x, x, x])


def test_under_autocast_every_forward_is_heard_as_it_was_called():
    model, x = Bare(), torch.randn(3, 6)
    cast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    heard = heard_by(hear_operands, model, "", [(0, 0), (2, 0)], [x, x, x], cast)
    assert [each.dtype for each in heard[0, 0]] == [torch.float32] * 3
    assert [each.dtype for each in heard[2, 0]] == [torch.bfloat16] * 3
    torch.testing.assert_close(heard[0, 0], [x, x, x], rtol=0, atol=0)


def test_who_wraps_linear_meanwhile_keeps_it():
    model, x, heard, plain = Bare(), torch.randn(3, 6), [], F.linear
    try:
        with torch.no_grad(), hear_operands(model, {"": {(0, 0): [heard.append]}}):
            model(x)
            inner = F.linear
            F.linear = lambda *args, **kwargs: 2 * inner(*args, **kwargs)
            model(x)
        assert len(heard) == 2
        assert F.linear is not plain
        torch.testing.assert_close(F.linear(x, model.a), 2 * plain(x, model.a))
        model(x)
        assert len(heard) == 2
    finally:
        F.linear = plain


@pytest.mark.parametrize("watch", [hear_operands, watch_operands])
def test_children_run_without_the_mode_and_modes_of_others_stay(watch):
    class Other(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.child, self.w, self.other = Bare(), nn.Parameter(torch.randn(4, 4)), Other()

        def forward(self, x):
            x = self.child(x)
            with self.other:
                x = self.child(torch.cat((x, x), 1)[:, :6])
            return x @ self.w

    model, x = Outer(), torch.randn(3, 6)
    heard = heard_by(watch, model, "", [(0, 0)], [x, x])[0, 0]
    torch.testing.assert_close(heard[0], heard[1])
    assert heard[0].shape == (3, 4)
    assert model.child.by_operator == 2  # where the other mode is there, too
    assert model.other.count >= 2 * 5
    assert _get_current_dispatch_mode() is None
