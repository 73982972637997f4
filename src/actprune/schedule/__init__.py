"""How much of the reduction is due when: pure functions of progress."""

from actprune.schedule.curves import CURVES, cubic, linear, one_shot
from actprune.schedule.schedule import Schedule

__all__ = ["CURVES", "Schedule", "cubic", "linear", "one_shot"]
