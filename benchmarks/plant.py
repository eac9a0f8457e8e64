"""A process model of a locked run:  d log(risk) / dt = a(t) + b * lock,  t = -log(sigma).

a: the drift of risk by itself, constant over stretches of log sigma. b: the effect of a full lock, per unit of log
sigma; b below 0 means that locking lowers risk. `fit_plant` reads both from recorded runs by least squares on the
changes of log risk, with errors that allow for the evaluations of one clip to hang together (one cluster per clip and
run: Liang & Zeger 1986), and `simulate` runs any policy against them. A line through a curved world: risk that answers
the *level* of the lock and not its time, as a windowed measurement may, is only approximated. Range of risk: > 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from kvlock_sampling.policy import as_policy
from kvlock_sampling.run import Timeline
from kvlock_sampling.types import Observation, PolicyError

Rows = Sequence[Mapping[str, Any]]
"""One run, as `Trace.rows()` gives it."""


class Plant(NamedTuple):
    """What a lock does to risk.

    response: b. low, high: its confidence interval.
    sigmas: falling noise levels where the drift changes; drift: a, one more than these, from high noise to low.
    start: risk at the first measurement, the median of the recorded runs.
    """

    response: float
    low: float
    high: float
    sigmas: tuple[float, ...] = ()
    drift: tuple[float, ...] = (0.0,)
    start: float = 1.0

    @property
    def controllable(self) -> bool:
        """Whether the lock is known to move risk at all, and in which direction: the interval of b excludes 0."""
        return self.low > 0.0 or self.high < 0.0

    def drifted(self, sigma: float, to: float) -> float:
        """The integral of a(t) dt from noise level `sigma` down to `to`: exact, whatever the step."""
        pieces = zip(self.drift, _overlaps(self.sigmas, sigma, to), strict=True)
        return sum(a * dt for a, dt in pieces)


class Response(NamedTuple):
    """A simulated run: noise levels as visited, (evaluations,); risk and the lock in force, (evaluations, clips)."""

    sigmas: Tensor
    risk: Tensor
    lock: Tensor


def fit_plant(runs: Iterable[Rows], *, pieces: int = 4, confidence: float = 0.95) -> Plant:
    """The plant behind recorded runs, as far as they tell.

    runs: each the rows of one trace. Needed of a row: clip, sigma, risk, lock. Record with different *constant* locks,
        measured: `PID(kp=0, ki=0, kd=0, bias=0.5)`. Under feedback lock and risk cause one another, and b is biased.
    pieces: stretches of the drift, each with as many measurements. confidence: of the interval of b, in (0, 1).
    Raises PolicyError for fewer than 3 clips, or runs that all lock alike.
    """
    changes, starts = [], []
    for run in runs:
        for clip in sorted({row["clip"] for row in run}):
            path = _path([row for row in run if row["clip"] == clip])
            if len(path) > 1:
                starts.append(path[0][1])
            # The lock in force at the later evaluation is what led to it.
            changes += [(len(starts), a[0], b[0], b[1] - a[1], b[2]) for a, b in itertools.pairwise(path)]
    if len(starts) < 3:
        raise PolicyError(
            f"{len(starts)} clips with two measurements or more; a response with its error needs 3.\n"
            "  Record a few clips under a policy that measures: fit_plant([trace.rows() for trace in traces])."
        )
    clip, above, below, change, lock = map(np.asarray, zip(*changes, strict=True))
    middles = np.sqrt(above * below)
    sigmas = tuple(float(s) for s in np.unique(np.quantile(middles, np.arange(1, pieces) / pieces))[::-1])
    stretches = np.array([_overlaps(sigmas, *pair) for pair in zip(above, below, strict=True)])
    design = np.column_stack([stretches, np.log(above / below) * lock])
    spread = np.linalg.svd(design, compute_uv=False)
    if spread[-1] < 1e-6 * spread[0]:
        raise PolicyError(
            f"every run locked alike ({lock.min():.3g} to {lock.max():.3g}), so drift and response cannot be told "
            "apart.\n  Record runs at two constant locks or more, e.g. PID(kp=0, ki=0, kd=0, bias=0.0) and bias=0.8."
        )
    fitted, error = _least_squares(design, change, clip)
    reach = error * float(stats.t.ppf((1 + confidence) / 2, len(starts) - 1))
    b = float(fitted[-1])
    return Plant(b, b - reach, b + reach, sigmas, tuple(map(float, fitted[:-1])), math.exp(float(np.median(starts))))


def simulate(policy: Any, plant: Plant, sigmas: Any, *, start: float | Sequence[float] | None = None) -> Response:
    """`policy` against `plant` at these noise levels, as a sampler visits them: repeated ones and rewinds as in a run.

    start: risk at the first evaluation, of one clip or several; None = the plant's.
    """
    policy = as_policy(policy)
    level = torch.as_tensor(plant.start if start is None else start, dtype=torch.float64).reshape(-1).log()
    unknown, one = torch.full_like(level, math.nan), torch.ones_like(level)
    timeline: Timeline[tuple[float, Tensor, Any, Tensor]] = Timeline()
    visited, risks, locks = [], [], []
    for sigma in (float(s) for s in sigmas if s > 0):
        before = timeline.rewind(sigma)
        if before is None:
            log_risk, state = level, policy.init()
            lock = _spread(policy.start(Observation(sigma, unknown, unknown, 0 * one, one)).lock, 0 * level)
        else:
            last, log_risk, state, lock = before
            dt = math.log(last / sigma)
            log_risk = log_risk + plant.drifted(last, sigma) + plant.response * lock * dt
        risk = log_risk.exp()
        state, control = policy.step(state, Observation(sigma, risk, risk, lock, one))
        timeline.append(sigma, (sigma, log_risk, state, _spread(control.lock, lock)))
        visited.append(sigma)
        risks.append(risk)
        locks.append(lock)
    return Response(torch.tensor(visited, dtype=torch.float64), torch.stack(risks), torch.stack(locks))


def _spread(lock: float | Tensor | None, before: Tensor) -> Tensor:
    """A lock as one value per clip; None leaves it as it was before."""
    return before if lock is None else torch.as_tensor(lock, dtype=before.dtype).expand_as(before)


def _path(rows: Rows) -> list[tuple[float, float, float]]:
    """(sigma, log risk, lock) of one clip at falling noise levels: what a sampler repeated or took back is dropped."""
    path: list[tuple[float, float, float]] = []
    timeline: Timeline[None] = Timeline(depth=len(rows))
    for row in rows:
        risk = math.nan if row["risk"] is None else float(row["risk"])  # JSON has no NaN
        if risk > 0 and math.isfinite(risk):
            timeline.rewind(row["sigma"])
            del path[len(timeline._entries) :]
            timeline.append(row["sigma"], None)
            path.append((row["sigma"], math.log(risk), row["lock"]))
    return path


def _overlaps(sigmas: Sequence[float], above: float, below: float) -> list[float]:
    """How long, in log sigma, the way from `above` to `below` runs in each stretch."""
    edges = [math.inf, *sigmas, 0.0]
    clipped = [min(max(edge, below), above) for edge in edges]
    return [math.log(high / low) for high, low in itertools.pairwise(clipped)]


def _least_squares(design: Any, target: Any, cluster: Any) -> tuple[Any, float]:
    """Coefficients, and the cluster-robust standard error of the last."""
    bread = np.linalg.inv(design.T @ design)
    fitted = bread @ (design.T @ target)
    residual = target - design @ fitted
    names = np.unique(cluster)
    scores = np.stack([design[cluster == name].T @ residual[cluster == name] for name in names])
    count = len(target) - design.shape[1]
    small = len(names) / (len(names) - 1) * (len(target) - 1) / max(count, 1)
    covariance = small * bread @ scores.T @ scores @ bread
    return fitted, math.sqrt(max(covariance[-1, -1], 0.0))
