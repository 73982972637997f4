import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actprune.statistics import Activity, ClassHistogram, Histogram, Moments, all_reduce, merge_shards
from actprune.statistics.reduce import align, pack, pack_scales, unpack

WORKER = Path(__file__).with_name("gloo_worker.py")


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("gloo_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_gloo_ranks_are_one_process(worker, tmp_path):
    """Rank 0 is this process, rank 1 another."""
    outs = [tmp_path / "rank0.pt", tmp_path / "rank1.pt"]
    store = str(tmp_path / "store")
    other = subprocess.Popen(
        [sys.executable, str(WORKER), "1", "2", store, str(outs[1])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        worker.main(0, 2, store, str(outs[0]))
        errors = other.communicate(timeout=60)[1]
    finally:
        other.kill()
    assert other.returncode == 0, errors
    alone = worker.build()
    worker.feed(alone, *worker.data(), batch=7)
    for out in outs:
        saved = torch.load(out, weights_only=True)
        assert len(saved["spoken"]) == 2
        assert "MAX" in saved["spoken"][0]
        assert "SUM" in saved["spoken"][1]
        merged = worker.build()
        for statistic, states in zip(merged, saved["states"], strict=True):
            for name, state in states.items():
                getattr(statistic, name).copy_(state)
        for one, two in zip(alone, merged, strict=True):
            assert one.n_samples == two.n_samples == 41
            if isinstance(one, (Histogram, ClassHistogram, Activity)):
                assert torch.equal(one.compute(), two.compute())
            else:
                torch.testing.assert_close(two.compute(), one.compute(), rtol=1e-9, atol=0)


def test_pack_and_unpack_are_inverse():
    def build():
        return [Histogram(3, bins=4), Moments(3), Activity(3)]

    x = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(0))
    source, target = build(), build()
    for statistic in source:
        statistic.update(x, torch.arange(8))
    align(target, pack_scales(source))
    unpack(target, pack(source))
    for one, two in zip(source, target, strict=True):
        assert torch.equal(one.compute(), two.compute())


def test_counts_stay_exact_in_the_flat_buffer():
    statistics = [[Activity(1)], [Activity(1)]]
    for (statistic,), count in zip(statistics, (2**52 + 1, 2**51 + 1), strict=True):
        statistic.zeros.fill_(count)
    assert int(merge_shards(statistics)[0].zeros) == 2**52 + 2**51 + 2
    histograms = [[Histogram(1, bins=2)], [Histogram(1, bins=2)]]
    for (statistic,) in histograms:
        statistic.update(torch.ones(1, 1, 1), torch.tensor([0]))
        statistic.counts[statistic.counts > 0] = 2**52 + 1
    assert int(merge_shards(histograms)[0].counts.sum()) == 2**53 + 2


def test_nothing_to_reduce_needs_no_process_group():
    all_reduce([])
