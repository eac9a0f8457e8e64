"""Estimators of how uncertain the model is about its clean prediction. One estimator a file, formula on top.

TrajectoryVariance is free, and Divergence wherever the source is evaluated. The others evaluate the model again.
"""

from .base import Estimator, masked_mean
from .divergence import Divergence
from .dropout import DropoutVariance
from .posterior import PosteriorVariance
from .renoise import RenoiseVariance
from .sparse import Sparse
from .thresholds import ThresholdCurve
from .trajectory import TrajectoryVariance

__all__ = [
    "Divergence",
    "DropoutVariance",
    "Estimator",
    "PosteriorVariance",
    "RenoiseVariance",
    "Sparse",
    "ThresholdCurve",
    "TrajectoryVariance",
    "masked_mean",
]
