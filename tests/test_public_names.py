"""What a criterion of one's own is written with is public."""

import actprune
from actprune.core import views


def test_everything_that_is_named_exists():
    for name in actprune.__all__:
        assert getattr(actprune, name) is not None


def test_what_a_criterion_is_made_of():
    assert actprune.Criterion is views.Criterion
    assert actprune.GroupView is views.GroupView
    assert actprune.Statistic is views.Statistic
    assert {"Criterion", "GroupView", "Statistic"} <= set(actprune.__all__)
