"""What all places of a network are read together gives what each gives by itself, whatever the network does."""

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actprune import Budget, Pruner, criteria
from actprune.compensation import Mean
from actprune.core.errors import ObservationError
from actprune.models.resnet import CifarResNet
from actprune.pruning import Panel, fused, layout
from actprune.statistics import every_second
from triton_device import DEVICE, needs_triton

pytestmark = needs_triton

EVERY = {
    "entropy": criteria.Entropy,
    "zero_rate": criteria.ZeroRate,
    "variance": criteria.Variance,
    "rademacher": lambda: criteria.Rademacher(estimate="monte_carlo", replicates=4),
}


class Net(nn.Module):
    """Three convolutions and two linear layers, with something odd between them."""

    def __init__(self, odd=""):
        super().__init__()
        self.odd, self.calls = odd, 0
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 4, 1)
        self.d, self.e = nn.Linear(4, 7), nn.Linear(7, 2)

    def forward(self, x):
        self.calls += 1
        x = self.a(x)
        for _ in range(self.calls if self.odd == "writes before" else 0):
            x.add_(0.1)
        y = self.b(x)
        if "writes later" in self.odd and self.calls > 3:
            F.relu_(x)
        if self.odd == "writes in place":
            F.relu_(x)
        elif self.odd == "writes uncounted":
            x.data.mul_(2)
        y = F.relu(y)
        if self.odd == "skips" and self.calls % 3 == 0 or self.odd == "writes later, skips" and self.calls == 4:
            z = y[:, :4]
        elif self.odd == "calls twice":
            z = self.c(y) + self.c(y.flip(2))
        elif self.odd == "by name":
            z = self.c(input=y)
        elif self.odd == "transposed":
            z = self.c(y.to(memory_format=torch.channels_last))
        elif self.odd == "sliced":
            z = self.c(y[..., :-1])
        elif self.odd == "twice at times":
            z = self.c(y)
            if self.calls % 3 == 0:
                self.b(2 * x)
        else:
            z = self.c(y)
        z = z.mean((2, 3))
        return self.e(F.relu(self.d(z)))


def turn(monkeypatch, on):
    """Have places read together, or not, wherever the tests run."""
    from actprune.statistics import kernels

    monkeypatch.setattr(fused, "kernels", lambda device: kernels if on else None)


def observed(model, batches, together, monkeypatch, positions="auto", expected=100_000, mode=torch.inference_mode, ids=None):
    turn(monkeypatch, together)
    if hasattr(model, "calls"):
        model.calls = 0
    pruner = Pruner(model, batches[0][:1], Panel({k: v() for k, v in EVERY.items()}), Budget(params=0.5), compensation=Mean(),
                    positions=positions)  # fmt: skip
    first = 0
    if hasattr(model, "calls"):
        model.calls = 0
    with mode(), pruner.observe(expected) as observation:
        for x in batches:
            numbers = range(first, first + len(x))
            observation.begin_batch(numbers if ids is None else ids(torch.arange(first, first + len(x))))
            model(x)
            first += len(x)
    return pruner, observation


def statistics(observation):
    found = [s for by_key in observation.scores.values() for sites in by_key.values() for s in sites]
    return found + [statistic for _, statistic in observation.folds.values()]


def agree(together, alone):
    """Both observed the same: what is counted exactly, what is summed, in another order perhaps, up to rounding."""
    for one, other in zip(statistics(together), statistics(alone), strict=True):
        for name, state in other.metric_state.items():
            if state.dtype == torch.int64 or name in ("n_samples", "n_values", "zeros", "low", "high"):
                assert torch.equal(getattr(one, name), state), name
        torch.testing.assert_close(one.compute(), other.compute(), rtol=1e-6, atol=1e-6)


def same(model, batches, monkeypatch, places, **settings):
    """As many places are read together, and both ways agree."""
    _, alone = observed(model, batches, False, monkeypatch, **settings)
    _, together = observed(model, batches, True, monkeypatch, **settings)
    assert not alone._fused._together
    assert len(together._fused._together) == places
    agree(together, alone)


def data(n=4, size=8, each=6):
    torch.manual_seed(1)
    return [torch.randn(each, 3, size, size).to(DEVICE) for _ in range(n)]


@pytest.mark.parametrize(
    ("odd", "places"),
    [
        ("", 4),
        ("by name", 4),
        ("writes in place", 3),
        ("writes uncounted", 3),
        ("writes before", 4),
        ("skips", 4),
        ("calls twice", 3),
        ("transposed", 3),
        ("sliced", 3),
        ("twice at times", 4),
    ],
)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_odd_networks(odd, places, mode, monkeypatch):
    torch.manual_seed(0)
    same(Net(odd).eval().to(DEVICE), data(7), monkeypatch, places, mode=mode)


@pytest.mark.parametrize(("positions", "expected"), [("auto", 100_000), ("auto", 5_000), (3, None), (64, None)])
def test_a_residual_network_whose_channels_are_padded(positions, expected, monkeypatch):
    torch.manual_seed(0)
    same(CifarResNet(8).eval().to(DEVICE), data(3, 16), monkeypatch, 7, positions=positions, expected=expected)


def test_maps_that_are_read_whole_are_read_alone(monkeypatch):
    same(Net().eval().to(DEVICE), data(), monkeypatch, 0, positions=None)


def test_batches_of_other_sizes_and_repeated_samples(monkeypatch):
    torch.manual_seed(0)
    batches = [*data(3), *data(1, each=4), *data(1, each=9), *data(1, 10), *data(2)]

    def ids(numbers):
        return torch.where(numbers % 13 == 12, -1, numbers)

    same(Net().eval().to(DEVICE), batches, monkeypatch, 4)
    same(Net().eval().to(DEVICE), batches, monkeypatch, 4, ids=ids)
    same(Net().double().eval().to(DEVICE), [x.double() for x in batches], monkeypatch, 4)


def test_what_was_got_ready_before_places_were_read_together_is_not_taken_later(monkeypatch):
    torch.manual_seed(0)
    model = Net().eval().to(DEVICE)
    batches = [*data(1), *data(2, size=10), *data(2), *data(1, size=10)]

    class Plain(torch.Tensor):
        """Is not read together with others, as it might show other than what lies in its memory."""

    def at_first(module, args):
        return (args[0].as_subclass(Plain),) if model.calls == 1 and len(args[0]) == 6 else None

    for layer in (model.b, model.c, model.d, model.e):
        layer.register_forward_pre_hook(at_first)
        layer.register_forward_hook(lambda *args: args[2].as_subclass(torch.Tensor))
    _, alone = observed(model, batches, False, monkeypatch, positions=3, mode=torch.no_grad)
    _, together = observed(model, batches, True, monkeypatch, positions=3, mode=torch.no_grad)
    assert together._fused._together
    agree(together, alone)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_a_place_was_given_is_written_to_in_the_next_batch(mode, monkeypatch):
    """It is read by then."""

    class Decays(Net):
        last = None

        def forward(self, x):
            x = F.relu(self.a(x))
            x, self.last = x if self.last is None or len(self.last) != len(x) else x + self.last.mul_(0.5), x
            return self.e(F.relu(self.d(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))))

    torch.manual_seed(0)
    batches, found = data(12), []
    for together in (True, False):
        torch.manual_seed(0)
        found.append(observed(Decays().eval().to(DEVICE), batches, together, monkeypatch, mode=mode)[1])
    assert len(found[0]._fused._together) == 4
    agree(*found)


def test_what_is_wrapped_while_it_is_heard_hears_nothing_afterwards(monkeypatch):
    turn(monkeypatch, True)
    torch.manual_seed(0)
    model, batches = Net().eval().to(DEVICE), data(4)
    pruner = Pruner(model, batches[0], criteria.Variance(), Budget(params=0.5))
    with torch.inference_mode(), pruner.observe(100) as observation:
        for number, x in enumerate(batches):
            observation.begin_batch(torch.arange(6 * number, 6 * number + 6))
            model(x)
            if number == 2:
                forward = model.b.forward
                model.b.forward = lambda x, forward=forward: forward(x)
    model(batches[0])
    assert {statistic.n_samples.item() for statistic in statistics(observation)} == {24}


def test_little_memory(monkeypatch):
    torch.manual_seed(0)
    model, batches = Net().eval().to(DEVICE), data(9)
    _, whole = observed(model, batches, True, monkeypatch)
    per_row = whole._fused._layout.per_row
    monkeypatch.setattr(layout, "WAITING", 4 * per_row * 14)  # two batches of 6, not three
    same(model, batches, monkeypatch, 4)
    monkeypatch.setattr(layout, "WAITING", 4 * per_row * 5)  # not even one
    same(model, batches, monkeypatch, 0)


def test_activations_that_do_not_stay_until_the_end_of_the_batch(monkeypatch):
    torch.manual_seed(0)
    batches, model = data(4), Net().eval().to(DEVICE)
    monkeypatch.setattr(fused, "_memory", lambda device: 1 << 18)  # 8 KiB are kept: one map of 6 channels is 9 KiB
    monkeypatch.setattr(layout, "WAITING", 1 << 12)
    same(model, batches, monkeypatch, 4)
    _, observation = observed(model, batches, True, monkeypatch)
    assert len(observation._fused._chunks) > 1
    for odd in ("skips", "twice at times"):
        same(Net(odd).eval().to(DEVICE), data(7), monkeypatch, 4)
    monkeypatch.setattr(fused, "_memory", lambda device: 1 << 19)
    monkeypatch.setattr(layout, "WAITING", 1 << 14)
    monkeypatch.setattr(layout, "_SHARE", 4)
    same(Net("twice at times").double().eval().to(DEVICE), [x.double() for x in data(10)], monkeypatch, 4)


@pytest.mark.parametrize("memory", [1 << 18, 1 << 30])
def test_of_other_maps_and_of_more_samples_nothing_is_kept(memory, monkeypatch):
    """Each batch is as large as the memory for one, and is over when the next one begins."""
    monkeypatch.setattr(fused, "_memory", lambda device: memory)
    monkeypatch.setattr(layout, "_SHARE", 32)
    monkeypatch.setattr(layout, "WAITING", 1 << 22)
    turn(monkeypatch, True)
    torch.manual_seed(0)
    model, kept = Net().eval().to(DEVICE), []
    batches = [*data(1, each=1), *data(1, each=1), *data(1, each=1, size=9), *data(1, each=20)]
    pruner = Pruner(model, batches[0], criteria.Variance(), Budget(params=0.5))
    with torch.inference_mode(), pruner.observe(100) as observation:
        for number, x in enumerate(batches):
            observation.begin_batch(torch.arange(1000 * number, 1000 * number + len(x)))
            model(x)
            kept.append(sum(len(place.seen) for chunk in observation._fused._chunks for place in chunk.places))
    assert kept[1] > 0 == kept[2]
    assert (kept[3] == 0) == (memory == 1 << 18)


def test_a_write_is_found_out_where_the_first_samples_are_not_read(monkeypatch):
    torch.manual_seed(0)
    model, batches, found = Net("writes in place").eval().to(DEVICE), data(9, each=1), []
    assert 3 not in every_second(torch.arange(9), seed=0)
    for together in (True, False):
        turn(monkeypatch, together)
        pruner = Pruner(model, batches[0], criteria.Variance(), Budget(params=0.5), compensation=None)
        with torch.inference_mode(), pruner.observe(100_000) as observation:
            for number, x in enumerate(batches, 3):
                observation.begin_batch(torch.tensor([number]))
                model(x)
        found.append(observation)
    assert found[0]._fused._together
    agree(*found)


@pytest.mark.parametrize("batch", [0, 2])
def test_of_a_batch_that_breaks_off_nothing_is_kept(batch, monkeypatch):
    turn(monkeypatch, True)
    torch.manual_seed(0)
    model, batches, held, kept = Net().eval().to(DEVICE), data(3), [], []
    pruner = Pruner(model, batches[0][:1], criteria.Variance(), Budget(params=0.5))
    model.c.register_forward_pre_hook(lambda module, args: held.append(weakref.ref(args[0])))

    def observe():
        with torch.inference_mode(), pruner.observe(100) as observation:
            kept.append(observation)
            for number, x in enumerate(batches):
                observation.begin_batch(torch.arange(6 * number, 6 * number + 6))
                model(x)
                if number == batch:
                    assert held[-1]() is not None
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe()
    assert held[-1]() is None


def test_recorded_in_two_parts(monkeypatch):
    turn(monkeypatch, True)
    monkeypatch.setattr(fused.Fused, "_apart", lambda *args: pytest.fail("the places' ears are others"))
    torch.manual_seed(0)
    model, batches = Net().eval().to(DEVICE), data(4)
    pruner = Pruner(model, batches[0][:1], criteria.Variance(), Budget(params=0.5))
    observation = pruner.observation(100)
    for part in (0, 2):
        with torch.inference_mode(), observation.recording():
            for number in (part, part + 1):
                observation.begin_batch(torch.arange(6 * number, 6 * number + 6))
                model(batches[number])
    assert {statistic.n_samples.item() for statistic in statistics(observation)} == {24}


@pytest.mark.parametrize("together", [True, False])
def test_room_is_held_while_recording_and_no_longer(together, monkeypatch):
    """An observation refers to itself: it stays until the garbage collector comes."""
    turn(monkeypatch, together)
    made = []

    def holding(observation):
        room = observation._fused._layout.out if together else next(iter(observation._updates.arena._rooms.values()))
        made.append(weakref.ref(room))
        return room.numel()

    torch.manual_seed(0)
    model, batches = Net().eval(), [x.cpu() if not together else x for x in data(3)]
    model.to(batches[0].device)
    pruner = Pruner(model, batches[0][:1], criteria.Variance(), Budget(params=0.5))
    observation = pruner.observation(100)
    with torch.no_grad(), observation.recording():
        for number, x in enumerate(batches):
            observation.begin_batch(range(6 * number, 6 * number + 6))
            model(x)
        observation.begin_batch(range(0))
        assert holding(observation)
    assert made[0]() is None
    assert {statistic.n_samples.item() for statistic in statistics(observation)} == {18}


def test_samples_by_other_integers_and_batches_without_any(monkeypatch):
    torch.manual_seed(0)
    model, batches = Net().eval().to(DEVICE), [*data(3), *data(1, each=0), *data(2)]
    _, wide = observed(model, batches, False, monkeypatch)
    for together in (True, False):
        agree(observed(model, batches, together, monkeypatch, ids=torch.Tensor.int)[1], wide)


def test_the_batch_of_a_nan_is_named(monkeypatch):
    batches = data(6)
    batches[4][2, 1, 3, 3] = float("nan")
    torch.manual_seed(0)
    pruner, observation = observed(Net().eval().to(DEVICE), batches, True, monkeypatch, expected=100)
    with pytest.raises(ObservationError, match="first in batch 4"):
        pruner.scores(observation)


def test_scores_may_be_asked_for_between_batches_and_the_model_be_run(monkeypatch):
    torch.manual_seed(0)
    model, batches = Net().eval().to(DEVICE), data(4)
    found = []
    for together in (True, False):
        turn(monkeypatch, together)
        pruner = Pruner(model, batches[0][:1], criteria.Variance(), Budget(params=0.5), positions=2)
        with torch.no_grad(), pruner.observe() as observation:
            for number, x in enumerate(batches):
                observation.begin_batch(torch.arange(6 * number, 6 * number + 6))
                model(x)
                if number == 2:
                    with observation.paused():
                        model(x * 100)
                _ = observation.scores
                model(x + 1)  # counts as more of the same samples
        found.append(observation)
    agree(*found)


@pytest.mark.parametrize("memory", [1 << 30, 3 << 17])  # of the second one, 12 KiB are kept: what b and c are given
@pytest.mark.parametrize("odd", ["writes later", "writes later, skips"])
def test_a_write_that_begins_later_costs_its_place_one_batch(odd, memory, monkeypatch, caplog):
    """Without inference mode, where PyTorch counts writes."""
    monkeypatch.setattr(fused, "_memory", lambda device: memory)
    monkeypatch.setattr(layout, "_SHARE", 1)
    torch.manual_seed(0)
    model, batches = Net(odd).eval().to(DEVICE), data(6)
    _, together = observed(model, batches, True, monkeypatch, mode=torch.no_grad)
    assert caplog.text.count("b: what it reads is written to in place afterwards, in batch 3 and not in the first one") == 1
    assert not together._fused._together
    _, alone = observed(model, batches, False, monkeypatch, mode=torch.no_grad)
    turn(monkeypatch, False)
    pruner = Pruner(model, batches[0][:1], Panel({k: v() for k, v in EVERY.items()}), Budget(params=0.5), compensation=Mean())
    model.calls = 0
    with torch.no_grad(), pruner.observe(100_000) as without:
        for number, x in enumerate(batches):
            if number != 3:
                without.begin_batch(torch.arange(6 * number, 6 * number + 6))
                model(x)
    for name, by_key in together.scores.items():
        expected = without if name == "a" else alone
        for key, sites in by_key.items():
            for one, other in zip(sites, expected.scores[name][key], strict=True):
                assert one.n_samples == other.n_samples
                torch.testing.assert_close(one.compute(), other.compute(), rtol=1e-6, atol=1e-6)


def test_modes_may_change_between_batches(monkeypatch):
    """What is read may be counted in one batch and not in the next one, at one place and not at another."""
    torch.manual_seed(0)
    model, batches, found = Net().eval().to(DEVICE), data(4), []
    usual = torch.randn(6, 6, 8, 8).to(DEVICE)
    for together in (True, False):
        turn(monkeypatch, together)
        pruner = Pruner(model, batches[0][:1], criteria.Variance(), Budget(params=0.5))
        handle = model.b.register_forward_pre_hook(lambda *_: (usual + 0 if torch.is_grad_enabled() else usual,))
        with pruner.observe(100_000) as observation:
            for number, mode in enumerate((torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode)):
                observation.begin_batch(torch.arange(6 * number, 6 * number + 6))
                with mode():
                    model(batches[number])
        handle.remove()
        found.append(observation)
    assert len(found[0]._fused._together) == 4
    agree(*found)


@pytest.mark.parametrize("is_written", [False, True])
def test_what_was_made_outside_inference_mode_comes_later(is_written, monkeypatch):
    torch.manual_seed(0)
    model, batches, found = Net().eval().to(DEVICE), data(4), []
    usual = torch.randn(6, 5, 8, 8).to(DEVICE)
    for _ in range(is_written):
        usual.add_(1)
    for together in (True, False):
        turn(monkeypatch, together)
        model.calls = 0
        pruner = Pruner(model, batches[0][:1], criteria.Variance(), Budget(params=0.5), compensation=None)
        handle = model.c.register_forward_pre_hook(lambda *_: (usual,) if model.calls == 3 else None)
        with torch.inference_mode(), pruner.observe(100) as observation:
            model.calls = 0
            for number, x in enumerate(batches):
                observation.begin_batch(range(6 * number, 6 * number + 6))
                model(x)
        handle.remove()
        found.append(observation)
    assert len(found[0]._fused._together) == 4
    assert {statistic.n_samples.item() for statistic in statistics(found[0])} == {24}
    agree(*found)


@pytest.mark.parametrize("numbers", [
    lambda n: range(-2, len(n) - 2), lambda n: range(0, len(n) << 40, 1 << 40), lambda n: range(2 * len(n), 0, -2),
    lambda n: range((1 << 62) + 1, (1 << 62) + 1 + len(n)), lambda n: range(len(n)),
    lambda n: range(8, 8 + len(n)) if n[0] else range(8, 3),
], ids=["repeated", "far apart", "downwards", "large", "again", "none of the first batch"])  # fmt: skip
def test_samples_by_any_range(numbers, monkeypatch):
    torch.manual_seed(0)
    model, batches = Net().eval().to(DEVICE), data(3)
    _, listed = observed(model, batches, False, monkeypatch, ids=lambda n: torch.tensor(numbers(n)))
    agree(observed(model, batches, True, monkeypatch, ids=numbers)[1], listed)


def test_addresses_are_sent_once(monkeypatch):
    torch.manual_seed(0)
    there = observed(Net().eval().to(DEVICE), data(), True, monkeypatch)[1]._fused._layout
    sent = there._heads([7, 9], None)
    assert there._heads([7, 9], None) is sent
    for other in range(3 * layout._SENT):
        assert there._heads([7, other], None).tolist() == [7, other]
    assert len(there._sent) <= layout._SENT
    assert there._heads([7, 9], None).tolist() == [7, 9]
    assert there._heads([7, 9], torch.tensor([3, 1])).tolist() == [7, 9, 3, 1]


class Doubled(torch.Tensor):
    """Shows twice what lies in its memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(2 * x.as_subclass(torch.Tensor) if isinstance(x, cls) else x for x in args), **(kwargs or {}))


def test_what_a_subclass_shows_later_is_read_by_itself(monkeypatch):
    torch.manual_seed(0)
    model, batches = Net().eval().to(DEVICE), data(4)

    def odd(module, args):
        return (args[0].as_subclass(Doubled),) if model.calls == 3 else None

    model.b.register_forward_pre_hook(odd)
    same(model, batches, monkeypatch, 4, mode=torch.no_grad)


@pytest.mark.parametrize("memory", [1 << 18, 1 << 30])
def test_a_first_batch_that_breaks_off_is_forgotten(memory, monkeypatch):
    """Of places that had been read by then, it counts; the next one is the first."""
    torch.manual_seed(0)
    monkeypatch.setattr(fused, "_memory", lambda device: memory)
    monkeypatch.setattr(layout, "_SHARE", 32)
    model, batches, found = Net().eval().to(DEVICE), data(4), []

    def breaks_off(module, args):
        raise KeyboardInterrupt

    for together, starts in ((True, (0, 1)), (False, (0, 1)), (False, (1,))):
        turn(monkeypatch, together)
        pruner = Pruner(model, batches[0][:1], criteria.Variance(), Budget(params=0.5))
        observation, handle = pruner.observation(100_000), model.e.register_forward_pre_hook(breaks_off)
        for start in starts:
            if start:
                handle.remove()
            with contextlib.suppress(KeyboardInterrupt), observation.recording():
                for number in range(start, 4):
                    observation.begin_batch(torch.arange(6 * number, 6 * number + 6))
                    model(batches[number])
            _ = observation.scores
        found.append(observation)
    assert len(found[0]._fused._together) == sum(len(chunk.places) for chunk in found[0]._fused._chunks) == 4
    was_read = []
    for one, with_it, without in zip(*map(statistics, found), strict=True):
        is_counted = bool(one.n_samples == with_it.n_samples)
        torch.testing.assert_close(one.compute(), (with_it if is_counted else without).compute(), rtol=1e-6, atol=1e-6)
        if with_it.n_samples != without.n_samples:  # not so for e
            was_read.append(is_counted)
    assert any(was_read) == (memory == 1 << 18)
    assert not all(was_read)


def test_kernels_that_do_not_compile_are_done_without(monkeypatch, caplog):
    from actprune.statistics import kernels

    def fails(device):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels, "try_out", fails)
    caplog.set_level("INFO")
    fused.kernels.cache_clear()
    assert fused.kernels(torch.device("cuda", 7)) is None
    assert "places are read one by one, which takes longer: RuntimeError: no compiler" in caplog.text
    assert fused.kernels(torch.device("cpu")) is None


def test_kernels_are_tried_out():
    from actprune.statistics import kernels

    kernels.try_out(DEVICE)
