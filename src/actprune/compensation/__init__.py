"""Fold what removed units contributed into what stays; one idea per file."""

from actprune.compensation.base import Compensation, Fold, Layer
from actprune.compensation.mean import Mean

__all__ = ["Compensation", "Fold", "Layer", "Mean"]
