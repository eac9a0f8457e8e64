"""Thresholds from measurement: curves, quantiles with intervals, cuts on labelled runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvlock_sampling.types import EstimatorError
from kvlock_sampling.variance.calibration import ThresholdCurve, reference_bands, roc_cut, threshold_curve


def test_a_curve_is_a_power_law_between_its_points_and_flat_beyond():
    curve = ThresholdCurve((10.0, 1.0, 0.1), (1.0, 0.1, 0.4))
    for sigma, value in ((10.0, 1.0), (1.0, 0.1), (0.1, 0.4), (100.0, 1.0), (0.001, 0.4)):
        assert curve(sigma) == pytest.approx(value)
    assert curve(math.sqrt(10.0)) == pytest.approx(math.sqrt(0.1))
    for bad in (((1.0, 2.0), (1.0, 1.0)), ((1.0,), (1.0, 2.0)), ((), ()), ((1.0,), (0.0,))):
        with pytest.raises(EstimatorError, match="sigmas falling"):
            ThresholdCurve(*bad)


def test_bands_recover_a_known_quantile_within_their_interval():
    """Log-normal variance proportional to sigma: the true quantile of every band is known."""
    rng = np.random.default_rng(0)
    sigma = np.exp(rng.uniform(math.log(0.05), math.log(20), 40_000))
    variance = 0.01 * sigma * np.exp(rng.normal(0, 0.5, len(sigma)))
    bands = reference_bands(zip(sigma, variance, strict=True), quantile=0.9, bands=40)
    assert len(bands) == 40
    assert [b.sigma for b in bands] == sorted((b.sigma for b in bands), reverse=True)
    covered = 0
    for band in bands:
        true = 0.01 * band.sigma * math.exp(0.5 * 1.2816)
        covered += band.low <= true <= band.high
        assert band.low <= band.quantile <= band.high
        assert band.quantile == pytest.approx(true, rel=0.12)
    assert covered >= 33  # 95% intervals, 40 bands; the bands' own width costs a little
    assert threshold_curve(bands)(1.0) == pytest.approx(0.01 * math.exp(0.5 * 1.2816), rel=0.1)


def test_too_few_measurements_are_refused():
    with pytest.raises(EstimatorError, match="0 usable measurements"):
        reference_bands([(1.0, float("nan"))] * 30)


def test_a_cut_on_labelled_runs():
    scores = [0.1, 0.2, 0.3, 0.4, 0.8, 0.9]
    cut = roc_cut(scores, [False, False, False, True, True, True])
    assert cut == (0.4, 1.0, 0.0, 1.0)
    mixed = [False, True, False, False, True, True]
    assert roc_cut(scores, mixed).threshold == 0.8
    generous = roc_cut(scores, mixed, max_false_alarms=0.7)
    assert (generous.threshold, generous.true_positive_rate) == (0.2, 1.0)
    with pytest.raises(EstimatorError, match="needs both kinds"):
        roc_cut(scores, [True] * 6)


def test_ties_are_cut_together():
    cut = roc_cut([1.0, 1.0, 1.0, 0.0], [True, False, True, False])
    assert cut.true_positive_rate == 1.0
    assert cut.false_positive_rate == 0.5
