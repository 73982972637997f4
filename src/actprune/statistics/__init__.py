"""Streaming, mergeable statistics of a unit's activations; one idea per file.

``accumulate`` never reads back from the device; every non-linear function is applied once, after the merge.
"""

from actprune.statistics.activity import Activity
from actprune.statistics.base import Accumulator
from actprune.statistics.class_histogram import ClassHistogram
from actprune.statistics.gram import Gram
from actprune.statistics.histogram import Histogram
from actprune.statistics.moments import Moments
from actprune.statistics.positions import (
    EVERYTHING,
    Density,
    at_positions,
    check_positions,
    enough,
    every_second,
    position_bits,
    sample_positions,
)
from actprune.statistics.rademacher import LinearRademacher
from actprune.statistics.rank import MapRank
from actprune.statistics.reduce import all_reduce, merge_shards
from actprune.statistics.sensitivity import Sensitivity, output_sensitivity
from actprune.statistics.taylor import GateTaylor

__all__ = [
    "EVERYTHING",
    "Accumulator",
    "Activity",
    "ClassHistogram",
    "Density",
    "GateTaylor",
    "Gram",
    "Histogram",
    "LinearRademacher",
    "MapRank",
    "Moments",
    "Sensitivity",
    "all_reduce",
    "at_positions",
    "merge_shards",
    "output_sensitivity",
    "check_positions",
    "enough",
    "every_second",
    "position_bits",
    "sample_positions",
]
