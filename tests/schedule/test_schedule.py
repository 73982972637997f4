import pytest

from actprune.core.errors import ConfigError
from actprune.schedule import CURVES, Schedule, cubic, linear, one_shot


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_curves_rise_from_zero_to_one(curve):
    values = [curve(p / 100) for p in range(101)]
    assert values[0] == 0
    assert values[-1] == 1
    assert all(a <= b for a, b in zip(values, values[1:], strict=False))


def test_curves_at_known_points():
    assert linear(0.25) == 0.25
    assert cubic(0.5) == 0.875
    assert cubic(0.2) == pytest.approx(0.488)
    assert one_shot(1e-9) == 1


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("max_epochs", [*range(2, 41), 100, 182, 200, 300])
def test_defaults_leave_training_after_every_step_and_recovery_at_the_end(curve, max_epochs):
    schedule = Schedule(curve)
    epochs = schedule.epochs(max_epochs)
    assert epochs == sorted(set(epochs))
    assert epochs[0] >= 0
    assert epochs[-1] <= max_epochs - 2
    assert len(epochs) == 1 or epochs[-1] + 1 <= 0.6 * max_epochs
    if max_epochs >= 10:
        assert 0.1 <= (epochs[0] + 1) / max_epochs <= 0.3
        assert len(epochs) == (1 if curve == "one_shot" else 5)
    owed = [schedule.due(epoch, max_epochs) for epoch in range(max_epochs)]
    assert [epoch for epoch, fraction in enumerate(owed) if fraction is not None] == epochs
    due = [fraction for fraction in owed if fraction is not None]
    assert due == sorted(due)
    assert due[0] > 0
    assert due[-1] == 1


def test_explicit_steps_are_kept():
    schedule = Schedule("linear", start=3, interval=4, steps=5)
    assert schedule.epochs(21) == [3, 7, 11, 15, 19]
    assert [schedule.due(epoch, 21) for epoch in (3, 7, 11, 15, 19)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule.due(4, 21) is None
    assert Schedule(steps=8).epochs(10) == list(range(1, 9))
    assert Schedule(start=0, interval=1, steps=5).epochs(10) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("schedule", "max_epochs", "message"),
    [
        (Schedule(start=3, interval=4, steps=5), 20, r"steps=5 every interval=4 epochs from epoch 3 end at epoch 19"),
        (Schedule(steps=5), 5, r"end at epoch 4, but the last may be at 3 with max_epochs=5"),
        (Schedule(start=9), 10, r"start=9 must be at most 8"),
        (Schedule(), 1, r"max_epochs=1 leaves no epoch"),
    ],
)
def test_what_does_not_fit_is_refused(schedule, max_epochs, message):
    with pytest.raises(ConfigError, match=message):
        schedule.epochs(max_epochs)
    with pytest.raises(ConfigError, match=message):
        schedule.due(0, max_epochs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curve": "quartic"}, "curve='quartic' is not known; choose one of one_shot, linear, cubic"),
        ({"start": -1}, "start=-1 must be a whole number >= 0"),
        ({"interval": 0}, "interval=0 must be a whole number >= 1"),
        ({"steps": 0}, "steps=0 must be a whole number >= 1"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"steps": True}, "steps=True must be a whole number"),
        ({"curve": "one_shot", "steps": 3}, "has 1 step, got steps=3"),
    ],
)
def test_nonsense_is_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**options)
