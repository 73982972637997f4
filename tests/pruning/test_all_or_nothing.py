"""What fails or is interrupted after the cut takes the cut back: tensors, attributes, optimizer state, record."""

import copy

import pytest
import torch

from actprune import Budget, criteria, prune
from actprune.compensation import LeastSquares, recalibrate
from actprune.core.record import record_of
from actprune.pruning import finishing, one_step, pipeline, prune_trained
from zoo import build

OPTIONS = {"criterion": criteria.Entropy(), "budget": Budget(params=0.5)}


def trained():
    model, example = build("ConvBn")
    optimizer = torch.optim.AdamW(model.parameters())
    model(example).sum().backward()
    optimizer.step()
    return model, example, optimizer


def assert_as_it_was(model, twin, optimizer, state):
    """Against a copy from before: every module's attributes, every tensor, and what the optimizer steps."""
    for a, b in zip(model.modules(), twin.modules(), strict=True):
        plain = (int, float, bool, str, tuple)
        assert {k: v for k, v in vars(a).items() if isinstance(v, plain)} == {
            k: v for k, v in vars(b).items() if isinstance(v, plain)
        }
        assert not {**a._forward_hooks, **a._forward_pre_hooks}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(moments(optimizer), state, strict=True))
    assert not record_of(model)
    assert "_surgery_record" not in vars(model)


def moments(optimizer):
    return [optimizer.state[p]["exp_avg"].clone() for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["interrupt", "error"])
@pytest.mark.parametrize("where", ["after the refit", "in the last trace"])
def test_prune_takes_the_cut_back(monkeypatch, error, where):
    model, example, optimizer = trained()
    twin, state = copy.deepcopy(model), moments(optimizer)

    def fail(*_args):
        raise error

    if where == "after the refit":  # recalibration has written to all norms by then
        monkeypatch.setattr(finishing, "recalibrate", lambda model, batches: (recalibrate(model, batches), fail()))
    else:
        monkeypatch.setattr(pipeline.Pruner, "_traced", fail)
    how = LeastSquares(recalibrate=True)
    with pytest.raises(type(error)):
        prune(model, example, [example], compensation=how, optimizers=[optimizer], **OPTIONS)
    assert_as_it_was(model, twin, optimizer, state)
    monkeypatch.undo()
    assert one_step.prune(model, example, [example], compensation=how, optimizers=[optimizer], **OPTIONS).steps
    model(example).sum().backward()
    optimizer.step()


def test_an_evaluation_that_fails_at_last_takes_the_cut_back():
    model, example, optimizer = trained()
    twin, state, calls = copy.deepcopy(model), moments(optimizer), []

    def evaluate(_model):
        calls.append(1)
        return 1 / (3 - len(calls))

    with pytest.raises(ZeroDivisionError):
        prune_trained(model, example, [example], evaluate=evaluate, **OPTIONS)
    assert len(calls) == 3
    assert_as_it_was(model, twin, optimizer, state)


def test_batches_of_different_sizes_are_not_joined_and_that_is_said(caplog):
    """Images of two sizes: no sequential refit, and the cut stands with what was folded once."""
    model, _ = build("Residual")
    small, large = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 12, 12)
    prune(model, small, [small, large], **OPTIONS)
    assert "all of one size and of any number: no sequential refit" in caplog.text
    with torch.no_grad():
        assert torch.isfinite(model.eval()(large)).all()


def test_a_model_of_one_batch_size_loses_the_refit_and_the_latency_alone(caplog):
    class Fixed(torch.nn.Module):
        """Takes batches of 4 only."""

        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).reshape(4, -1))

    model, x = Fixed(), torch.randn(4, 6)
    done = prune_trained(model, x, [x], evaluate=lambda _: 1.0, **OPTIONS)
    assert done.params[1] < done.params[0]
    assert done.latency == {}
    assert "no latency with 64 samples" in caplog.text
    assert "of any number: no sequential refit" in caplog.text
