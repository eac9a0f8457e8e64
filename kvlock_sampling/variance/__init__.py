"""Estimators of how uncertain the model is about its clean prediction. One file each; all behind init/step.

Free: TrajectoryVariance, SolverDisagreement, GuidanceGap. At the cost of evaluations: RenoiseVariance,
PosteriorVariance, DropoutVariance. Around others: Sparse, Held, Relative, Max, Mean, Weighted.
"""

from .base import Estimator, masked_mean
from .combined import Max, Mean, Weighted
from .disagreement import SolverDisagreement
from .dropout import DropoutVariance
from .dropout_hooks import dropout_hooks
from .gap import GuidanceGap
from .posterior import PosteriorVariance
from .relative import Relative
from .renoise import RenoiseVariance
from .sparse import Sparse
from .table import ESTIMATORS, estimator_table, make_estimator
from .trajectory import TrajectoryVariance
from .wrappers import Held

__all__ = [
    "ESTIMATORS",
    "DropoutVariance",
    "Estimator",
    "GuidanceGap",
    "Held",
    "Max",
    "Mean",
    "PosteriorVariance",
    "Relative",
    "RenoiseVariance",
    "SolverDisagreement",
    "Sparse",
    "TrajectoryVariance",
    "Weighted",
    "dropout_hooks",
    "estimator_table",
    "make_estimator",
    "masked_mean",
]
