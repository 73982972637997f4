"""Scores and budget become a plan, a plan becomes a smaller model."""

from actprune.pruning.observe import Observation
from actprune.pruning.pipeline import Pruner, prune
from actprune.pruning.post_training import PostTraining, prune_trained
from actprune.pruning.select import Selection

__all__ = ["Observation", "PostTraining", "Pruner", "Selection", "prune", "prune_trained"]
