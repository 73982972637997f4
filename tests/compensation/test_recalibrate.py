"""Batch-norm recalibration: running statistics become cumulative averages over the batches given."""

import pytest
import torch
from torch import nn

from actprune.compensation import recalibrate
from actprune.core.errors import ObservationError


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
    )


def batches(n=3):
    return [torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(n)]


def test_statistics_are_averages_of_the_batches_by_hand():
    model, data = network(), batches()
    assert recalibrate(model, data) == 2
    inputs = [model[0](x).detach() for x in data]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in inputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var((0, 2, 3)) for y in inputs]).mean(0))
    assert model[1].num_batches_tracked == 3


def test_modes_momenta_parameters_and_gradients_stay():
    model = network()
    model[1].momentum, model[1].training = 0.3, False
    modes = [m.training for m in model.modules()]
    before = [p.clone() for p in model.parameters()]
    recalibrate(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.3, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_so_the_result_is_determined():
    first, second = network(), network()
    for model, seed in ((first, 1), (second, 2)):
        torch.manual_seed(seed)
        recalibrate(model, batches())
    assert torch.equal(first[5].running_mean, second[5].running_mean)


def test_no_batches_raise_and_change_nothing():
    model = network()
    recalibrate(model, batches())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(ObservationError, match="recalibration was given 0 batches, at least 1 is needed"):
        recalibrate(model, [])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_batch_that_fails_leaves_the_statistics_as_they_were():
    model = network()
    recalibrate(model, batches())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(RuntimeError):
        recalibrate(model, [torch.randn(8, 2, 3, 3), torch.randn(8, 5, 3, 3)])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_failure_restores_modes_and_momenta():
    model = network()
    with pytest.raises(RuntimeError):
        recalibrate(model, [torch.zeros(2, 5, 3, 3)])
    assert model[1].momentum == 0.1
    assert model[1].training


def test_without_batch_norms_nothing_is_read():
    def never():
        raise AssertionError("read")
        yield

    assert recalibrate(nn.Linear(2, 2), never()) == 0
