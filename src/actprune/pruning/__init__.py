"""Scores and budget become a plan, a plan becomes a smaller model."""

from actprune.pruning.observe import Observation
from actprune.pruning.pipeline import Pruner, prune
from actprune.pruning.select import Selection

__all__ = ["Observation", "Pruner", "Selection", "prune"]
