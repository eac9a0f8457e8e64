"""Thresholds: the variance at risk 1, as a function of the noise level, measured on calm runs.

threshold(sigma) = q-quantile of the variance of reference runs near sigma,   risk = variance / threshold(sigma)
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..types import EstimatorError
from ..utils.fields import check_number, levels, within
from .trajectory import TrajectoryVariance


@dataclass(frozen=True)
class ThresholdCurve:
    """A threshold per noise level, interpolated linearly in log sigma and log threshold, constant beyond the ends.

    Args:
        sigmas: Falling noise levels > 0.
        values: Thresholds > 0 at these levels, in the estimator's units.

    Raises:
        EstimatorError: Unequal lengths, values out of range, or sigmas that do not fall.
    """

    sigmas: tuple[float, ...]
    values: tuple[float, ...]

    _error = EstimatorError

    def __post_init__(self) -> None:
        levels(self, "sigmas")
        levels(self, "values")
        if not 0 < len(self.sigmas) == len(self.values) or any(b >= a for a, b in itertools.pairwise(self.sigmas)):
            raise EstimatorError(
                f"ThresholdCurve with {len(self.sigmas)} sigmas and {len(self.values)} values; expected as many of "
                "each, sigmas falling: ThresholdCurve((10.0, 1.0, 0.1), (0.001, 0.01, 0.02))."
            )

    def __call__(self, sigma: float) -> float:
        levels = np.log(self.sigmas[::-1])
        return float(np.exp(np.interp(math.log(max(sigma, 1e-12)), levels, np.log(self.values[::-1]))))


DEFAULT_ESTIMATOR = TrajectoryVariance(window=None, span=8.0, normalise=True, integral=True)
"""Free, and its scale does not depend on the number of steps of a deterministic sampler."""

DEFAULT_THRESHOLD = ThresholdCurve(
    sigmas=(25.9, 15.0, 9.23, 5.83, 3.67, 2.21, 1.37, 0.84, 0.491, 0.312, 0.201, 0.0973),
    values=(3.71e-5, 1.96e-4, 6.21e-4, 0.0012, 0.00227, 0.00429, 0.00647, 0.0101, 0.0164, 0.0228, 0.0367, 0.0844),
)
"""What 95% of calm measurements of the embedded model stay below, by `kvlock calibrate --clips 128`."""


def threshold_at(threshold: float | Callable[[float], float], sigma: float) -> float:
    """Return the threshold at a noise level. Raises EstimatorError if a function returns none."""
    if not callable(threshold):
        return threshold
    if (limit := within(given := threshold(sigma), above=0.0)) is None:
        raise EstimatorError(
            f"threshold({sigma:.4g}) returned {given!r}; expected a variance > 0, a finite number, at every noise "
            "level: threshold=lambda sigma: 0.01."
        )
    return limit


class Band(NamedTuple):
    """Noise levels: their geometric mean, the threshold, its 95% interval (up to inf for few clips), and clips."""

    sigma: float
    quantile: float
    low: float
    high: float
    clips: int


def reference_bands(
    measurements: Iterable[tuple[int, float, float]], *, quantile: float = 0.95, bands: int = 12
) -> list[Band]:
    """Return quantiles of variance in bands of equal width in log sigma, from high noise to low, without empty bands.

    A band's measurements of one clip hang together, so the clip is what counts: with n clips of weight 1 / (n + 1), and
    as much weight at infinity, another clip's measurement stays below with a probability of at least `quantile`, over
    draws of all n + 1. Source: Lee, Barber and Willett 2023, Distribution-free inference with hierarchical data.

    `measurements` are (clip, sigma, variance) of calm runs; non-finite ones are dropped. `quantile` is in (0, 1).
    Raises EstimatorError for fewer than 20 usable measurements, or a setting out of range.
    """
    from scipy import stats  # slow to import, and only calibration needs it

    check_number("quantile", quantile, EstimatorError, above=0.0, below=1.0)
    check_number("bands", bands, EstimatorError, at_least=1, whole=True)
    usable = [(c, s, v) for c, s, v in measurements if s > 0 and math.isfinite(v) and v >= 0]
    points = np.array(usable, dtype=np.float64)
    if len(points) < 20 or not points[:, 2].any():
        raise EstimatorError(
            f"{len(points)} usable measurements; expected 20 or more. Use more clips or steps, and a policy that "
            "measures (uses_risk)."
        )
    logs = np.log(points[:, 1])
    band = np.digitize(logs, np.linspace(logs.min(), logs.max() + 1e-9, bands + 1))
    found = []
    for number in np.unique(band):
        inside = points[band == number]
        inside = inside[np.argsort(inside[:, 2])]
        _, clip, counts = np.unique(inside[:, 0], return_inverse=True, return_counts=True)
        clips = len(counts)
        reached = (1 / counts[clip] / (clips + 1)).cumsum()
        ends = [quantile, *(np.add(stats.binom.ppf((0.025, 0.975), clips, quantile), (0, 1)) / (clips + 1))]
        level, low, high = (np.append(inside[:, 2], np.inf)[np.searchsorted(reached, end - 1e-9)] for end in ends)
        level = max(min(level, inside[-1, 2]), points[points[:, 2] > 0, 2].min())  # 0 is no threshold
        middle = float(np.exp(np.log(inside[:, 1]).mean()))
        found.append(Band(middle, float(level), float(low), float(max(high, level)), clips))
    return sorted(found, key=lambda b: -b.sigma)


def clips_needed(quantile: float) -> int:
    """The fewest clips whose largest measurement holds a promise of this quantile for other clips."""
    return math.ceil(quantile / (1 - quantile) - 1e-9)


def alarm_range(clips: int, quantile: float) -> tuple[float, float]:
    """The share of other clips' measurements above the threshold, in 95 of 100 calibrations on this many clips."""
    from scipy import stats

    below = min(clips, math.ceil((clips + 1) * quantile - 1e-9))
    low, high = stats.beta.ppf((0.025, 0.975), clips + 1 - below, below)
    return float(low), float(high)
