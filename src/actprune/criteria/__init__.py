"""From statistics and weights to one score per unit, higher = keep; one idea per file."""

from actprune.criteria.batch_norm_scale import BatchNormScale
from actprune.criteria.combine import combine, score_sites
from actprune.criteria.entropy import Entropy, StateEntropy
from actprune.criteria.flap import FLAP
from actprune.criteria.fpgm import FPGM
from actprune.criteria.hrank import HRank
from actprune.criteria.label_information import LabelInformation
from actprune.criteria.magnitude import Magnitude
from actprune.criteria.moments import RMS, MeanActivation, Variance
from actprune.criteria.rademacher import Rademacher
from actprune.criteria.random import Random
from actprune.criteria.reconstruction import Reconstruction
from actprune.criteria.sensitivity import Sensitivity
from actprune.criteria.taylor import Taylor
from actprune.criteria.wanda import Wanda
from actprune.criteria.zero_rate import ZeroRate
from actprune.criteria.zero_units import ZeroUnits

__all__ = [
    "FLAP",
    "FPGM",
    "RMS",
    "BatchNormScale",
    "Entropy",
    "HRank",
    "LabelInformation",
    "Magnitude",
    "MeanActivation",
    "Rademacher",
    "Random",
    "Reconstruction",
    "Sensitivity",
    "StateEntropy",
    "Taylor",
    "Variance",
    "Wanda",
    "ZeroRate",
    "ZeroUnits",
    "combine",
    "score_sites",
]
