"""Scores and budget become a plan, a plan becomes a smaller model; and what groups of units contribute."""

from actprune.pruning.agreement import EFFECT, Agreement, agreement
from actprune.pruning.influence import RANDOM, GroupInfluence, Influence, Removal, Removals, analyze
from actprune.pruning.observe import Observation
from actprune.pruning.one_step import prune
from actprune.pruning.panel import Panel
from actprune.pruning.pipeline import Pruner
from actprune.pruning.post_training import PostTraining, prune_trained
from actprune.pruning.select import Selection

__all__ = [
    "EFFECT",
    "RANDOM",
    "Agreement",
    "GroupInfluence",
    "Influence",
    "Observation",
    "Panel",
    "PostTraining",
    "Pruner",
    "Removal",
    "Removals",
    "Selection",
    "agreement",
    "analyze",
    "prune",
    "prune_trained",
]
