"""Gains from recordings:  kp, ki, kd = argmin  integral |e| dt + OVERSHOOT * overshoot + MOVEMENT * sum |d lock|.

e = log(risk / target), t = -log(sigma); all three in units of log risk or of lock, over simulated runs against the
plant that the recordings show (`plant.py`), from above and from below the target, in few and in many steps at once, so
that the gains suit both. Search: scipy's Nelder-Mead from pole placement, for e' = b * u the gains kp = 2 w / |b| and
ki = w^2 / |b| give the critically damped loop of bandwidth w (Astrom & Murray, "Feedback Systems", chapter on PID
control). Where the recordings do not show that locking moves risk, nothing is tuned: no gain would help.

    runs = [trace.rows() for trace in traces]        # at different constant locks: PID(kp=0, ki=0, kd=0, bias=...)
    tuned = tune_pid(runs)
    print(tuned.verdict)
    lock = kv.KVLock(model, source=clip, mask=mask, policy=tuned.policy)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from plant import Plant, Response, Rows, fit_plant, simulate
from scipy import optimize

from kvlock_sampling.policy import PID
from kvlock_sampling.policy.pid import RISK_RANGE
from kvlock_sampling.types import PolicyError

__all__ = ["Plant", "Response", "Tuned", "cost", "fit_plant", "simulate", "tune_pid"]

OVERSHOOT = 5.0
"""What risk beyond the target costs, per unit of log risk."""

MOVEMENT = 0.3
"""What a lock costs that moves, per unit of lock: real measurements are noisy, and every gain passes the noise on."""

STEP = 3.0
"""Simulated runs start this many times above and below the target, and where the recorded ones did."""

COUNTS = (12, 40)
"""Steps of the simulated runs. 12 for the long ones: the longest step of a 20-step schedule is about twice its mean."""

LIMITS = ((-7.0, math.log(3.0)), (-7.0, math.log(3.0)), (0.0, 0.3))
"""Of log |kp|, log |ki| and kd / kp. A lock that goes from 0 to 1 within a third of log risk is a switch already."""


class Tuned(NamedTuple):
    """What came out.

    policy: `base` with the best gains, or `base` itself where nothing was found that helps. plant: what was fitted.
    before, after: mean cost of a simulated run with `base` and with `policy`.
    controllable: False where the interval of the response contains 0. verdict: all this in words.
    """

    policy: PID
    plant: Plant
    before: float
    after: float
    controllable: bool
    verdict: str


def tune_pid(
    records: Iterable[Rows],
    *,
    base: PID | None = None,
    pieces: int = 4,
    confidence: float = 0.95,
    maxfev: int = 150,
) -> Tuned:
    """The PID that holds risk best on the plant behind recorded runs.

    records: each the rows of one trace, `trace.rows()`; see `fit_plant` for what to record, and for pieces, confidence.
    base: settings that stay (target, lock_range, bias, ...), and gains to compare with; None = PID().
    maxfev: simulations that the search may take, about 10 ms each.
    Raises PolicyError where the recordings cannot tell, or without room to lock.
    """
    base = PID() if base is None else base
    if base.lock_range[0] == base.lock_range[1]:
        raise PolicyError(f"lock_range={base.lock_range} leaves nothing to control. This works: lock_range=(0.0, 1.0)")
    runs = [list(run) for run in records]
    plant = fit_plant(runs, pieces=pieces, confidence=confidence)
    levels = sorted({float(row["sigma"]) for run in runs for row in run}, reverse=True)
    schedules = [_resampled(levels, count) for count in COUNTS]
    before = cost(base, plant, schedules)
    said = f"A full lock changes log risk by {plant.response:+.3g} per unit of log sigma"
    said += f" ({confidence:.0%} interval {plant.low:+.3g} to {plant.high:+.3g})"
    if not plant.controllable:
        said += ": it may do nothing. No gain helps, so they stay as given. Record more clips, or locks further apart."
        return Tuned(base, plant, before, before, False, said)
    policy = _search(base, plant, schedules, maxfev)
    after = cost(policy, plant, schedules)
    policy, after = (policy, after) if after < before else (base, before)
    said += f". Cost {before:.3g} with the gains given, {after:.3g} with kp={policy.kp:g}, ki={policy.ki:g}, "
    said += f"kd={policy.kd:g}." + _weakness(plant, base)
    return Tuned(policy, plant, before, after, True, said)


def cost(policy: PID, plant: Plant, schedules: Iterable[Iterable[float]]) -> float:
    """Mean over simulated runs of the integral of |e|, plus what overshoot and movement cost."""
    starts = [policy.target * STEP, policy.target / STEP, plant.start]
    runs = []
    for sigmas in schedules:
        run = simulate(policy, plant, sigmas, start=starts)
        error = run.risk.clamp(*RISK_RANGE).log() - math.log(policy.target)
        size = torch.trapezoid(error.abs(), -run.sigmas.log(), dim=0)
        beyond = (-error[0].sign() * error).amax(0).clamp_min(0.0)
        runs.append(size + OVERSHOOT * beyond + MOVEMENT * run.lock.diff(dim=0).abs().sum(0))
    return float(torch.stack(runs).mean())


def _search(base: PID, plant: Plant, schedules: list[list[float]], maxfev: int) -> PID:
    """Nelder-Mead over (log kp, log ki, kd / kp); a lock that raises risk has gains below 0."""
    sign = math.copysign(1.0, -plant.response)

    def policy(gains: np.ndarray) -> PID:
        kp, ki, share = float(np.exp(gains[0])), float(np.exp(gains[1])), float(gains[2])
        rounded = [float(f"{sign * gain:.3g}") for gain in (kp, ki, kp * share)]
        return dataclasses.replace(base, kp=rounded[0], ki=rounded[1], kd=rounded[2])

    strength = abs(plant.response)
    # w = 1: settled in some 4 of log sigma, half of a run.
    begin = np.array([math.log(2.0 / strength), math.log(1.0 / strength), 0.02])
    simplex = begin + np.vstack([np.zeros(3), np.diag([0.7, 0.7, 0.1])])
    low, high = np.array(LIMITS).T
    found = optimize.minimize(
        lambda gains: cost(policy(gains), plant, schedules),
        begin.clip(low, high),
        method="Nelder-Mead",
        bounds=LIMITS,
        options={"maxfev": maxfev, "initial_simplex": simplex.clip(low, high), "xatol": 0.01, "fatol": 1e-3},
    )
    return policy(found.x)


def _weakness(plant: Plant, base: PID) -> str:
    """A warning where no lock within its range keeps risk from drifting off."""
    rates = [[a + plant.response * lock for lock in base.lock_range] for a in plant.drift]
    lost = [r for r in rates if min(r) > 0 or max(r) < 0]
    if not lost:
        return ""
    return f" In {len(lost)} of {len(rates)} stretches of noise no lock within {base.lock_range} can hold a level."


def _resampled(levels: list[float], count: int) -> list[float]:
    """`count` noise levels spaced as the recorded ones are."""
    places = np.linspace(0, len(levels) - 1, count)
    return np.exp(np.interp(places, np.arange(len(levels)), np.log(levels))).tolist()
