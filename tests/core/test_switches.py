"""Two threads inside at once: what holds for the whole process is put back by the last one out, whoever came first."""

import threading

import pytest
import torch
from torch import nn
from torch.utils import _python_dispatch

from actprune import Budget, criteria, prune
from actprune.core.calling import undisturbed
from actprune.core.hooks import uncompiled
from actprune.core.switches import Switch
from processes import apart
from zoo import build


def overlapping(first, second):
    """Enter in one order in two threads and leave in the same: the one that came first leaves first."""
    inside, outside = threading.Event(), threading.Event()

    def early():
        with first:
            assert inside.wait(10)
        outside.set()

    def late():
        with second:
            inside.set()
            assert outside.wait(10)

    threads = [threading.Thread(target=early)]
    threads[0].start()
    threads.append(threading.Thread(target=late))
    threads[1].start()
    for thread in threads:
        thread.join()


def switches():
    sdp = torch.backends.cuda
    found = [torch.backends.mha.get_fastpath_enabled(), sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled()]
    return [*found, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("use", ["undisturbed", "uncompiled"])
@apart
def test_the_last_thread_out_puts_back(use):
    compiled = []

    def counting(graph, _inputs):
        compiled.append(1)
        return graph

    model, other = nn.Dropout(), nn.Linear(2, 2)
    before = switches()
    if use == "undisturbed":
        overlapping(undisturbed(model), undisturbed(other))
    else:
        overlapping(uncompiled(), uncompiled())
    assert switches() == before
    if use == "undisturbed" and not hasattr(_python_dispatch, "is_in_any_mode_without_ignore_compile_internals"):
        return  # older PyTorch takes the first thread's mode for one that stays, and compiles nothing any more
    torch.compile(nn.Linear(2, 2), backend=counting)(torch.randn(1, 2))
    assert compiled


def test_a_block_that_raises_counts_as_left():
    state = []

    class Turned:
        def __enter__(self):
            state.append("on")

        def __exit__(self, *_error):
            state.append("off")

    switch = Switch(Turned)
    with pytest.raises(KeyError), switch.turned(), switch.turned():
        raise KeyError
    assert state == ["on", "off"]


def test_two_prunings_at_once_are_those_of_one_after_the_other():
    def one():
        model, example = build("ConvBn")
        return model, example

    reference, example = one()
    removed = prune(reference, example, [example], criterion=criteria.Entropy(), budget=Budget(params=0.5)).removed
    models, before = [one()[0] for _ in range(2)], switches()
    found = {}

    def work(number):
        record = prune(models[number], example, [example], criterion=criteria.Entropy(), budget=Budget(params=0.5))
        found[number] = record.removed

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: removed, 1: removed}
    assert switches() == before
    for model in models:
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True))
