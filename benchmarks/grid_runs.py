"""Runs on the 2D grid and how to read them: recorded evaluations, estimators on them, how well a score detects."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from grid import Grid, GridDenoiser
from scipy import stats
from torch import Tensor

import kvlock_sampling as kv
from kvlock_sampling import samplers
from kvlock_sampling.types import Evaluation
from kvlock_sampling.variance import Estimator, PosteriorVariance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "policies" / "recipes"))

from solver_disagreement import SolverDisagreement

SIGMA_MAX = 8.2
BAND = 0.138 / 0.0316  # the noise levels of the last 10 of 1000 training steps, as a ratio


class Probe(NamedTuple):
    """An estimator and where it is read: at the last evaluation, or at the first one at or below `at`."""

    estimator: Estimator
    at: float | None = None


PROBES: dict[str, Probe] = {
    "trajectory, last 10 (paper)": Probe(kv.TrajectoryVariance(window=10)),
    "trajectory, sigma window": Probe(kv.TrajectoryVariance(window=None, span=BAND)),
    "trajectory, sigma window, / sigma^2": Probe(kv.TrajectoryVariance(window=None, span=BAND, normalise=True)),
    "trajectory, all, / sigma^2": Probe(kv.TrajectoryVariance(window=None, normalise=True)),
    **{
        f"renoise x{passes} at {at}": Probe(kv.variance.RenoiseVariance(passes=passes), at)
        for passes, at in ((1, 0.05), (1, 0.1), (1, 0.2), (2, 0.06), (2, 0.1), (4, 0.1), (32, 0.1))
    },
    **{
        f"posterior x{probes} at {at}": Probe(PosteriorVariance(passes=probes), at)
        for probes, at in ((1, 0.04), (1, 0.06), (1, 0.1), (2, 0.06), (1, 0.2))
    },
    "solver disagreement, last": Probe(SolverDisagreement()),
}


class Record(torch.nn.Module):
    """Notes every evaluation of a denoiser."""

    def __init__(self, model: GridDenoiser) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[float, Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = self.model(x, sigma)
        self.calls.append((float(sigma[0]), x, denoised))
        return denoised


def read(probe: Probe, calls: list[tuple[float, Tensor, Tensor]], model: GridDenoiser) -> tuple[Tensor, int]:
    """The variance per sample that an estimator reports on a recorded run, and how many evaluations it took."""
    state, variance, rows = probe.estimator.init(), None, model.rows

    def again(x: Tensor, sigma: float) -> Tensor:
        return model(x, torch.full((len(x),), sigma))

    for sigma, x, denoised in calls:
        if probe.at is not None and sigma > probe.at:
            continue
        state, variance = probe.estimator.step(state, Evaluation(sigma, x, denoised, None, again))
        if probe.at is not None:
            break
    assert variance is not None
    return variance, (model.rows - rows) // len(calls[0][1])


def auroc(reading: np.ndarray, bad: np.ndarray) -> float:
    """The chance that a bad sample reads higher than another; NaN if all or none are bad."""
    if bad.all() or not bad.any():
        return float("nan")
    return float(stats.mannwhitneyu(reading[bad], reading[~bad]).statistic / bad.sum() / (~bad).sum())


def detection(score: Tensor, bad: Tensor) -> dict[str, float]:
    """How well a score separates hallucinated samples (bad) from the rest."""
    s, b = score.double().numpy(), bad.numpy()
    positives, negatives = s[b], s[~b]
    if len(positives) < 5:
        return {"auroc": float("nan"), "recall_at_96_retention": float("nan"), "specificity_at_95_recall": float("nan")}
    order = np.argsort(-s)
    hits = b[order].cumsum()
    precision = hits / np.arange(1, len(s) + 1)
    pooled = np.sqrt((np.log(positives + 1e-12).var() + np.log(negatives + 1e-12).var()) / 2)
    return {
        "auroc": auroc(s, b),
        "auprc": float((precision * b[order]).sum() / b.sum()),
        "recall_at_96_retention": float((positives > np.quantile(negatives, 0.96)).mean()),
        "specificity_at_95_recall": float((negatives < np.quantile(positives, 0.05)).mean()),
        "cohens_d_of_log": float((np.log(positives + 1e-12).mean() - np.log(negatives + 1e-12).mean()) / pooled),
    }


def run(model: GridDenoiser, sampler: str, sigmas: Tensor, count: int, seed: int) -> tuple[Tensor, Record]:
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(10_000 + seed)) * sigmas[0]
    record = Record(model)
    return samplers.run(sampler, record, x, sigmas, seed=seed), record


def karras(steps: int, grid: Grid) -> Tensor:
    """Down to 1.79 standard deviations of a mode: 0.0316 on the standard grid."""
    return samplers.get_sigmas_karras(steps, 1.79 * grid.mode_std, SIGMA_MAX)
