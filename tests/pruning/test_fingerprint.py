"""What an analysis is made from: the same again is the same, anything else is not."""

import functools
import json
import logging
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from actprune import criteria
from actprune.compensation import LeastSquares
from actprune.pruning import Removals
from actprune.pruning.fingerprint import fingerprint, spelled
from paths import ROOT

FACTOR = 1.0


def judge(outputs, targets, factor=1.0, *, shift=0.0):
    return torch.zeros(len(targets), 2) * factor + shift


class Judge:
    def __init__(self, factor):
        self.factor, self.log, self.lock = factor, logging.getLogger("judge"), threading.Lock()

    def __call__(self, outputs, targets):
        return judge(outputs, targets, self.factor)

    def by_method(self, outputs, targets):
        return self(outputs, targets)


class Loss(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.register_buffer("weight", torch.ones(2), persistent=False)

    def forward(self, outputs, targets):
        return judge(outputs, targets, self.factor)


def closed(factor):
    return lambda outputs, targets: judge(outputs, targets, factor)


def with_default(factor):
    return lambda outputs, targets, factor=factor: judge(outputs, targets, factor)


def with_keyword(factor):
    return lambda outputs, targets, *, factor=factor: judge(outputs, targets, factor)


def nested(factor):
    def one(outputs, targets):
        def other():
            return two(outputs, targets)

        return other()

    def two(outputs, targets):
        return judge(outputs, targets, factor) if len(targets) else one(outputs, targets)

    return one


def reading_a_global(factor, value="outputs * FACTOR"):
    scope = {"FACTOR": factor}
    exec(f"def judge(outputs, targets): return {value}", scope)
    return scope["judge"]


def with_attribute(factor):
    made = closed(1.0)
    made.factor = factor
    return made


MAKERS = {
    "closure": closed,
    "default": with_default,
    "keyword": with_keyword,
    "partial": lambda factor: functools.partial(judge, factor=factor),
    "positional partial": lambda factor: functools.partial(lambda f, o, t: judge(o, t, f), factor),
    "object": Judge,
    "method": lambda factor: Judge(factor).by_method,
    "module": Loss,
    "functions in functions": nested,
    "global": reading_a_global,
    "global in a function inside": lambda factor: reading_a_global(factor, "(lambda: [outputs * FACTOR for _ in outputs])()"),
    "attribute": with_attribute,
    "closed tensor": lambda factor: closed(torch.full((2000,), factor)),
    "closed array": lambda factor: closed(np.full(2000, factor)),
    "closed array of objects": lambda factor: closed(np.array([[factor], "a"], dtype=object)),
    "closed containers": lambda factor: closed({"a": [{factor, 2.0}, (1, factor)]}),
    "closed scalar": lambda factor: closed(np.int64(factor)),
    "closed dtype": lambda factor: closed(torch.float32 if factor == 1 else torch.float64),
    "closed half, complex and sparse tensors": lambda factor: closed(
        [torch.full((2,), factor, dtype=torch.bfloat16), torch.eye(2).mul(factor).to_sparse(), torch.tensor(1j * factor)]
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_judge_is_known_by_all_that_it_depends_on(kind):
    make = MAKERS[kind]
    assert spelled(make(1.0)) == spelled(make(1.0))
    assert spelled(make(1.0)) != spelled(make(100.0))


def test_another_code_is_another_judge():
    assert spelled(lambda o, t: o + 1.5) != spelled(lambda o, t: o + 2.5)
    assert spelled(lambda o, t: o.sum()) != spelled(lambda o, t: o.mean())
    assert spelled(lambda o, t: (lambda: 1)()) != spelled(lambda o, t: (lambda: 2)())


def test_another_code_is_another_criterion():
    def one(change):
        class Own(criteria.Random):
            score = change

        return spelled(Own())

    assert one(lambda self, view: view.size) == one(lambda self, view: view.size)
    assert one(lambda self, view: view.size) != one(lambda self, view: view.seed)
    assert spelled(criteria.RMS()) == spelled(criteria.RMS())


def test_what_has_no_value_is_known_by_its_type():
    assert spelled(closed(threading.Lock())) == spelled(closed(threading.Lock()))
    assert spelled(closed(logging.getLogger("a"))) == spelled(closed(logging.getLogger("b")))
    assert " at 0x" not in spelled([Judge(1.0), closed(object()), torch.relu, len])


def test_what_holds_itself_ends():
    one = [1]
    one.append(one)
    assert spelled(one) == "list(1, <0>)"


def everything():
    made = [make(1.0) for make in MAKERS.values()]
    return [spelled(one) for one in (*made, {"a", "b", "c", ("d", 1)}, LeastSquares(), criteria.Rademacher())]


def test_it_is_the_same_in_another_process():
    path = [str(ROOT), *sys.path]
    script = f"import sys; sys.path[:] = {path}; import json, {__name__} as here; print(json.dumps(here.everything()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == everything()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.tau, self.mode, self.stride = nn.Linear(3, 2), 1.0, "sum", (1, 2)
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.cache = []

    def forward(self, x):
        return self.layer(x) * self.tau


def made(model, example=None, **changed):
    torch.manual_seed(0)
    settings = {
        "criteria": {"rms": criteria.RMS(), "entropy": criteria.Entropy()},
        "settings": Removals(),
        "data": [(torch.ones(2, 3), torch.ones(2))],
        "judge": judge,
        "compensation": LeastSquares(),
        **changed,
    }
    return fingerprint(model, torch.zeros(1, 3) if example is None else example, **settings)


def network():
    torch.manual_seed(0)
    return Scaled()


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("tau", 5.0, "modules"),
        ("mode", "mean", "modules"),
        ("stride", (2, 2), "modules"),
        ("tau", None, "modules"),
        ("table", torch.ones(2), "weights"),
    ],
)
def test_plain_attributes_and_all_buffers_of_modules_count(name, value, what):
    before, model = made(network()), network()
    setattr(model, name, value)
    after = made(model)
    assert [key for key in before if before[key] != after[key]] == [what]


def test_training_mode_and_what_modules_gather_do_not_count():
    model = network()
    before = made(model)
    model.eval()
    model.cache.append(1)
    assert made(model) == before


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"example": torch.zeros(1, 4)}, "example inputs"),
        ({"example": torch.zeros(1, 3, dtype=torch.float64)}, "example inputs"),
        ({"example": {"x": torch.zeros(1, 3), "n": 2}}, "example inputs"),
        ({"criteria": {"rms": criteria.RMS(), "entropy": criteria.Entropy(bins=8)}}, "criteria"),
        ({"compensation": LeastSquares(ridge=0.1)}, "compensation"),
        ({"compensation": None}, "compensation"),
        ({"data": [(np.ones(5000), torch.ones(2))]}, "data"),
    ],
)
def test_what_differs_is_named(changed, what):
    before, after = made(network()), made(network(), **changed)
    assert [key for key in before if before[key] != after[key]] == [what]
    assert made(network(), example=torch.ones(1, 3)) == before


def test_long_arrays_count_in_full():
    x = np.ones(5000)
    x[2500] = 2
    assert made(network(), data=[x]) != made(network(), data=[np.ones(5000)])
