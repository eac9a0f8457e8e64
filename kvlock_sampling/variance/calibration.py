"""Thresholds that come from measurement: what calm runs reach at each noise level, and where failures begin.

    threshold(sigma) = q-quantile of the variance of reference runs near sigma,   risk = variance / threshold(sigma)
A fixed threshold (the paper's 0.01) depends on the latents' scale, the number of steps and where the window lies. A
curve over sigma does not. Where failures are labelled, the cut is chosen on the ROC curve instead of a quantile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ..types import EstimatorError
from .thresholds import ThresholdCurve


class Band(NamedTuple):
    """What reference runs reached in one stretch of noise levels. `low` and `high` bound the quantile's estimate."""

    sigma: float
    quantile: float
    low: float
    high: float
    measurements: int


def reference_bands(
    measurements: Iterable[tuple[float, float]],
    *,
    quantile: float = 0.95,
    bands: int = 12,
    confidence: float = 0.95,
) -> list[Band]:
    """Quantiles of variance over noise level, with distribution-free confidence intervals.

    measurements: (sigma, variance) of calm runs, e.g. from `Trace.rows()`; non-finite ones are dropped.
    bands: stretches of equal width in log sigma; empty ones are left out.
    The interval comes from the order statistics (scipy.stats.quantile_test): no shape is assumed.

    Raises:
        EstimatorError: fewer than 20 usable measurements.
    """
    points = np.array([(s, v) for s, v in measurements if s > 0 and math.isfinite(v) and v > 0], dtype=np.float64)
    if len(points) < 20:
        raise EstimatorError(
            f"{len(points)} usable measurements; a curve needs 20 or more. Use more clips or more steps, and a policy "
            "that measures (uses_risk)."
        )
    logs = np.log(points[:, 0])
    edges = np.linspace(logs.min(), logs.max() + 1e-9, bands + 1)
    found = []
    for low_edge, high_edge in itertools.pairwise(edges):
        inside = points[(logs >= low_edge) & (logs < high_edge)]
        if not len(inside):
            continue
        values = inside[:, 1]
        test = stats.quantile_test(values, q=float(np.quantile(values, quantile)), p=quantile)
        interval = test.confidence_interval(confidence)
        level = float(np.exp(np.log(inside[:, 0]).mean()))
        low = float(interval.low) if math.isfinite(interval.low) else float(values.min())
        high = float(interval.high) if math.isfinite(interval.high) else float(values.max())
        found.append(Band(level, float(np.quantile(values, quantile)), low, high, len(values)))
    return sorted(found, key=lambda b: -b.sigma)


def threshold_curve(bands: Sequence[Band]) -> ThresholdCurve:
    """The bands' quantiles as a curve."""
    return ThresholdCurve(tuple(b.sigma for b in bands), tuple(b.quantile for b in bands))


class Cut(NamedTuple):
    """A threshold chosen on labelled runs, and what it reaches on them."""

    threshold: float
    true_positive_rate: float
    false_positive_rate: float
    auroc: float


def roc_cut(scores: Sequence[float], failed: Sequence[bool], *, max_false_alarms: float | None = None) -> Cut:
    """Choose a threshold where failures are known: the largest TPR - FPR (Youden), or the most failures caught at no
    more than `max_false_alarms`.

    Raises:
        EstimatorError: only one of the two classes is there.
    """
    score, bad = np.asarray(scores, dtype=np.float64), np.asarray(failed, dtype=bool)
    if not bad.any() or bad.all():
        raise EstimatorError(f"{int(bad.sum())} of {len(bad)} runs failed; a ROC curve needs both kinds.")
    order = np.argsort(-score, kind="stable")
    score, bad = score[order], bad[order]
    last = np.append(score[1:] != score[:-1], True)  # ties are cut together
    tpr, fpr = (bad.cumsum() / bad.sum())[last], ((~bad).cumsum() / (~bad).sum())[last]
    cuts = score[last]
    if max_false_alarms is None:
        best = int(np.argmax(tpr - fpr))
    else:
        allowed = np.flatnonzero(fpr <= max_false_alarms)
        best = int(allowed[-1]) if len(allowed) else 0
    u = stats.mannwhitneyu(score[bad], score[~bad]).statistic / (bad.sum() * (~bad).sum())
    return Cut(float(cuts[best]), float(tpr[best]), float(fpr[best]), float(u))
