"""Estimators of how uncertain the model is about its clean prediction. One estimator a file, formula on top.

TrajectoryVariance is free. RenoiseVariance, PosteriorVariance and DropoutVariance evaluate the model again.
"""

from .base import Estimator, masked_mean
from .dropout import DropoutVariance
from .posterior import PosteriorVariance
from .relative import Relative
from .renoise import RenoiseVariance
from .thresholds import ThresholdCurve
from .trajectory import TrajectoryVariance
from .wrappers import Combined, EstimatorWrapper, Sparse

__all__ = [
    "Combined",
    "DropoutVariance",
    "Estimator",
    "EstimatorWrapper",
    "PosteriorVariance",
    "Relative",
    "RenoiseVariance",
    "Sparse",
    "ThresholdCurve",
    "TrajectoryVariance",
    "masked_mean",
]
