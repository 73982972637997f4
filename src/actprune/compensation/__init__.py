"""Fold what removed units contributed into what stays; one idea per file."""

from actprune.compensation.base import Compensation, Fold, Layer
from actprune.compensation.least_squares import LeastSquares
from actprune.compensation.mean import Mean
from actprune.compensation.recalibrate import recalibrate

__all__ = ["Compensation", "Fold", "Layer", "LeastSquares", "Mean", "recalibrate"]
