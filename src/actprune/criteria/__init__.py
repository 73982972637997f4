"""From statistics and weights to one score per unit, higher = keep; one idea per file."""

from actprune.criteria.combine import combine, score_sites
from actprune.criteria.entropy import Entropy, StateEntropy
from actprune.criteria.fpgm import FPGM
from actprune.criteria.hrank import HRank
from actprune.criteria.magnitude import Magnitude
from actprune.criteria.moments import RMS, MeanActivation, Variance
from actprune.criteria.rademacher import Rademacher
from actprune.criteria.random import Random
from actprune.criteria.reconstruction import Reconstruction
from actprune.criteria.zero_rate import ZeroRate

__all__ = [
    "FPGM",
    "RMS",
    "Entropy",
    "HRank",
    "Magnitude",
    "MeanActivation",
    "Rademacher",
    "Random",
    "Reconstruction",
    "StateEntropy",
    "Variance",
    "ZeroRate",
    "combine",
    "score_sites",
]
