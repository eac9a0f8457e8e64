"""A threshold that depends on the noise level:  risk = variance / threshold(sigma)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ..types import EstimatorError


@dataclass(frozen=True)
class ThresholdCurve:
    """A threshold per noise level, interpolated linearly in log sigma and log threshold, constant beyond the ends.

    sigmas: falling noise levels > 0.  values: thresholds > 0 at these levels, in the estimator's own units.
    """

    sigmas: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        good = len(self.sigmas) == len(self.values) > 0
        good = good and all(s > 0 and math.isfinite(s) for s in (*self.sigmas, *self.values))
        if not good or any(b >= a for a, b in itertools.pairwise(self.sigmas)):
            raise EstimatorError(
                f"ThresholdCurve with {len(self.sigmas)} sigmas and {len(self.values)} values; expected as many of "
                "each, all above 0, sigmas falling, e.g. ThresholdCurve((10.0, 1.0, 0.1), (0.001, 0.01, 0.02))."
            )

    def __call__(self, sigma: float) -> float:
        """The threshold at one noise level."""
        levels = np.log(self.sigmas[::-1])
        return float(np.exp(np.interp(math.log(max(sigma, 1e-12)), levels, np.log(self.values[::-1]))))
