"""Observation over batches, processes and precisions: every sample counts once, processes speak once, in full precision."""

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, criteria
from actprune.compensation import LeastSquares, Mean
from actprune.core.errors import ObservationError
from actprune.pruning import Panel
from actprune.statistics import Histogram
from zoo import build

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["ConvBn", "AttentionPacked", "Flatten"])
def test_samples_that_another_batch_has_are_not_counted(name):
    """What a sampler repeats has the number -1: criterion, labels and compensation see the others only."""
    model, example = build(name)
    model.eval()
    torch.manual_seed(0)
    x, labels = torch.randn(5, *example.shape[1:]), torch.arange(5) % 3
    panel = {"entropy": criteria.Entropy(bins=8), "labels": criteria.LabelInformation(classes=3), "rms": criteria.RMS()}
    found = []
    for batches in (
        [(x[:3], [7, 8, 9], labels[:3]), (x[3:], [10, 11], labels[3:])],
        [
            (x[[3, 0, 1, 2]], [-1, 7, 8, 9], labels[[2, 0, 1, 2]]),
            (x[[3, 4, 0]], [10, 11, -1], labels[[3, 4, 1]]),
            (x[:2], [-1, -1], labels[:2]),
        ],
    ):
        pruner = Pruner(model, example, Panel(panel), Budget(params=0.9), compensation=Mean(), positions=3)
        with pruner.observe() as observation, torch.no_grad():
            for part, ids, classes in batches:
                observation.begin_batch(torch.tensor(ids), classes)
                model(part)
        assert observation.n_samples == 5
        found.append(observation._statistics())
    for once, again in zip(*found, strict=True):
        assert again.n_samples == once.n_samples
        torch.testing.assert_close(again.compute(), once.compute(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("criterion", "compensation", "spoken"),
    [
        (criteria.ZeroRate(), None, ["SUM"]),
        (criteria.Entropy(), None, ["MAX", "SUM"]),
        (Panel({"entropy": criteria.Entropy(), "rms": criteria.RMS(), "zeros": criteria.ZeroRate()}), Mean(), ["MAX", "SUM"]),
        (criteria.Magnitude(), None, []),
    ],
)
def test_processes_speak_once_per_step(criterion, compensation, spoken, monkeypatch):
    """One sum for all groups, sites and statistics; before it one maximum, where ranges or references must be alike."""
    model, example = build("AttentionPacked")
    pruner = Pruner(model.eval(), example, criterion, Budget(params=0.9), compensation=compensation)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(len(example)))
        model(example)
    said = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op, group=None: said.append(op))
    observation.reduce()
    names = {torch.distributed.ReduceOp.SUM: "SUM", torch.distributed.ReduceOp.MAX: "MAX"}
    assert [names[op] for op in said] == spoken


@pytest.mark.parametrize("criterion", [criteria.Entropy(), criteria.RMS(), criteria.Variance(), criteria.ZeroRate()])
def test_bfloat16_and_autocast(criterion):
    """Activations in half precision are counted in full: the same as statistics of what the layer really read."""
    model, example = build("ConvBn")
    model.eval()
    torch.manual_seed(0)
    x, read = torch.randn(6, *example.shape[1:]), []
    pruner = Pruner(model, example, criterion, Budget(params=0.9), compensation=None, positions=None)
    handle = model[3].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with pruner.observe() as observation, torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        observation.begin_batch(torch.arange(6))
        model(x)
    handle.remove()
    assert read[0].dtype == torch.bfloat16
    ((key, (statistic,)),) = observation.scores["0"].items()
    expected = criterion.statistics()[key](statistic.n_units)
    expected.update(read[0].flatten(2).float(), torch.arange(6))
    assert torch.equal(statistic.compute(), expected.compute())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["ConvBn", "AttentionPacked", "Flatten"])
def test_a_gpu_waits_for_nothing_and_sees_the_same(name):
    """After the first batch, which brings states to the device, nothing is read back and nothing waited for."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, example = build(name)
    torch.manual_seed(0)
    x = torch.randn(12, *example.shape[1:])
    panel = {"entropy": criteria.Entropy(), "rms": criteria.RMS(), "zeros": criteria.ZeroRate()}
    panel["rademacher"] = criteria.Rademacher(estimate="monte_carlo")
    found = []
    for device in ("cpu", "cuda"):
        model.eval().to(device)
        batches = x.to(device).split(4)
        pruner = Pruner(model, batches[0], Panel(panel), Budget(params=0.9), compensation=Mean(), positions=3)
        try:
            with pruner.observe() as observation, torch.inference_mode():
                for number, batch in enumerate(batches):
                    observation.begin_batch(range(4 * number, 4 * number + 4))
                    if number:
                        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
                    model(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(observation._statistics())
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_gpu.device.type == "cuda"
        if not isinstance(on_gpu, Histogram):  # a value on the edge of a bin may round to either side
            torch.testing.assert_close(on_gpu.compute().cpu(), on_cpu.compute(), rtol=1e-3, atol=1e-4)


def test_ranks_are_merged_where_the_network_is_though_one_of_them_saw_nothing(monkeypatch):
    """Its statistics are on the CPU, of which the processes of GPUs know nothing."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    observation = Pruner(model, torch.randn(2, 3), criteria.Entropy(), Budget(params=0.9), compensation=Mean()).observation()
    model.to("meta")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    met = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op, group=None: met.append(tensor.device.type))
    monkeypatch.setattr("actprune.statistics.reduce.align", lambda *_: None)  # no numbers come back from there
    monkeypatch.setattr("actprune.statistics.reduce.unpack", lambda *_: None)
    observation.reduce()
    assert met == ["meta", "meta"]


@pytest.mark.parametrize("compensation", [Mean(), LeastSquares()])
def test_a_layer_that_runs_twice_names_the_batch_that_was_not_finite(compensation):
    model, example = build("SharedTwice")
    pruner = Pruner(model.eval(), example, criteria.Magnitude(), Budget(params=0.9), compensation=compensation)
    with pruner.observe() as observation, torch.no_grad():
        for batch in range(4):
            observation.begin_batch(range(2 * batch, 2 * batch + 2))
            model(torch.full_like(example, torch.nan) if batch == 2 else torch.randn_like(example))
    with pytest.raises(ObservationError, match="first in batch 2"):
        pruner.plan(observation)
