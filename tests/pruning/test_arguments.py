"""What people hand the library calls by mistake: one message with the cure, and nothing has changed."""

import pytest
import torch
from torch import nn

from actprune import Budget, Pruner, Selection, criteria, prune, trace
from actprune.compensation import Mean
from actprune.core.errors import ConfigError, ObservationError, SurgeryError, TraceError
from actprune.core.record import record_of
from actprune.pruning import prune_trained
from zoo import build

ENTROPY, HALF = criteria.Entropy(), Budget(params=0.5)


def unharmed(model, call, error, match):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(error, match=match):
        call()
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert not record_of(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"criterion": criteria.Entropy}, r"is no Criterion; pass an instance, e\.g\."),
        ({"budget": 0.5}, r"budget=0\.5 is no Budget; pass e\.g\. budget=actprune\.Budget\(params=0\.4\)"),
        ({"selection": {"round_to": 8}}, "is no Selection; pass e.g. selection=actprune.Selection"),
        ({"compensation": "mean"}, "compensation='mean' is no Compensation; pass an instance"),
        ({"compensation": Mean}, "is no Compensation; pass an instance"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"optimizers": ["adam"]}, "optimizers holds 'adam'"),
    ],
)
def test_arguments_of_another_kind(settings, match):
    model, example = build("ConvBn")
    given = {"criterion": ENTROPY, "budget": HALF, **settings}
    unharmed(model, lambda: prune(model, example, [example], **given), ConfigError, match)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"round_to": 1.5}, "round_to=1.5 must be at least 1, a whole number"),
        ({"round_to": "8"}, "round_to='8' must be"),
        ({"round_to": True}, "round_to=True must be"),
        ({"max_ratio": None}, "max_ratio=None must be in"),
        ({"max_ratio": float("nan")}, "max_ratio=nan must be in"),
    ],
)
def test_selections_of_another_kind(setting, match):
    with pytest.raises(ConfigError, match=match):
        Selection(**setting)


def test_data_that_would_be_read_row_by_row():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    example = torch.randn(4, 6)
    rows = torch.utils.data.TensorDataset(example, torch.zeros(4).long())
    given = {"criterion": ENTROPY, "budget": HALF}
    trained = {**given, "evaluate": lambda _: 0.0}
    for data, match in [
        (torch.randn(20, 6), r"one tensor of shape \(20, 6\), .*data=\[tensor\] or data=tensor.split"),
        (rows, r"yields \(6,\), one sample of the example's \(4, 6\); batch them"),
        ({"x": example}, "data is of type dict; pass an iterable of batches"),
        (5, "data is of type int; pass an iterable of batches"),
    ]:
        unharmed(model, lambda data=data: prune(model, example, data, **given), ObservationError, match)
        unharmed(model, lambda data=data: prune_trained(model, example, data, **trained), ObservationError, match)


def test_models_and_examples_that_hold_nothing():
    model, example = build("ConvBn")
    unharmed(model, lambda: Pruner(model, example[:0], ENTROPY, HALF), TraceError, r"hold no sample; pass at least 1")
    with pytest.raises(TraceError, match=r"is no torch.nn.Module; pass the model first"):
        Pruner(example, model, ENTROPY, HALF)
    with pytest.raises(TraceError, match="is on the meta device and holds no values"):
        Pruner(model.to("meta"), example, ENTROPY, HALF)


def test_errors_of_any_kind_in_the_model_are_told():
    """An index out of range is no RuntimeError, and is the batch's fault all the same."""
    model, example = (
        nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2)),
        torch.ones(2, 4),
    )
    call = lambda: prune(model, example.long(), [9 * example.long()], criterion=ENTROPY, budget=HALF)  # noqa: E731
    unharmed(model, call, TraceError, "failed on a batch of data: IndexError")


def test_one_optimizer_needs_no_list():
    model, example = build("ConvBn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prune(model, example, criterion=criteria.Magnitude(), budget=HALF, optimizers=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("due", [1.5, -0.1, float("nan")])
def test_shares_due_outside_of_their_range(due):
    model, example = build("ConvBn")
    pruner = Pruner(model, example, criteria.Magnitude(), HALF, compensation=None)
    unharmed(model, lambda: pruner.plan(None, due), ConfigError, "must be the share of the whole reduction")


def test_a_pruner_of_a_model_that_was_cut_by_somebody_else():
    model, example = build("ConvBn")
    pruner = Pruner(model, example, criteria.Magnitude(), HALF, compensation=None)
    plan = pruner.plan(None)
    prune(model, example, criterion=criteria.Magnitude(), budget=Budget(params=0.8))
    for call in (lambda: pruner.plan(None), lambda: pruner.execute(plan)):
        with pytest.raises(SurgeryError, match="when this pruner traced the model; make a new Pruner"):
            call()
    assert len(record_of(model).steps) == 1


def test_an_observation_from_before_the_last_cut():
    model, example = build("ConvBn")
    pruner = Pruner(model, example, ENTROPY, HALF)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(range(len(example)))
        model(example)
    pruner.execute(pruner.plan(observation, 0.5))
    with pytest.raises(ObservationError, match="the model was cut since: observe it again"):
        pruner.plan(observation)


def test_an_optimizer_of_another_model_is_told(caplog):
    model, example = build("ConvBn")
    other = torch.optim.SGD(build("ConvBn")[0].parameters(), lr=0.1)
    prune(model, example, criterion=criteria.Magnitude(), budget=HALF, optimizers=[other])
    assert "SGD trains no parameter of Sequential, so it does not follow the cut" in caplog.text


@pytest.mark.parametrize("samples", [1, 2, 6])
def test_macs_are_a_share_of_the_original_whatever_example_later_steps_have(samples):
    """The same budget is met by the first step already, and a lower one means the same share of the same call."""
    model, example = build("ConvBn")
    other = torch.randn(samples, *example.shape[1:])
    before = trace(model, other).macs
    prune(model, example, criterion=criteria.Magnitude(), budget=Budget(macs=0.6))
    assert len(prune(model, other, criterion=criteria.Magnitude(), budget=Budget(macs=0.6)).steps) == 1
    pruner = Pruner(model, other, criteria.Magnitude(), Budget(macs=0.3), compensation=None)
    assert pruner.macs_before == before
    pruner.execute(pruner.plan(None))
    assert 0.1 * before < trace(model, other).macs <= 0.3 * before
    assert Pruner(model, example, criteria.Magnitude(), Budget(macs=0.3)).macs_before == trace(build("ConvBn")[0], example).macs
