"""Estimators around estimators:  Sparse (when),  Combined (several as one).

Sparse measures at an evaluation with  above <= sigma <= below  if
    sigmas:  it is the first at or below one of these noise levels, or
    every:   it is the 1st, (n+1)-th, (2n+1)-th ... new noise level inside [above, below].
A probe at four noise levels of a 50-step run costs 4%.

Combined compares in units of risk, each variance divided by its own threshold:
    max:     max_i var_i / threshold_i
    mean:    sum_i w_i var_i / threshold_i / sum_i w_i
so a result of 1 is at the threshold. An estimator that returns None at an evaluation is left out there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..types import SAME_SIGMA, EstimatorError, Evaluation
from .base import Estimator, Patch


def check_inner(outer: Estimator, inner: Any) -> None:
    """Raise EstimatorError if `inner` is not an estimator."""
    if not isinstance(inner, Estimator):
        kind = type(outer).__name__
        raise EstimatorError(f"{kind} was given {inner!r}; expected an estimator, e.g. {kind}(RenoiseVariance()).")


@dataclass(frozen=True)
class EstimatorWrapper(Estimator):
    """Base of an estimator around another one; cost, threshold, background and patch are those of the inner one.

    Args:
        estimator: The inner estimator.
    """

    estimator: Estimator

    def __post_init__(self) -> None:
        check_inner(self, self.estimator)

    @property
    def cost(self) -> float:  # type: ignore[override]
        return self.estimator.cost

    @property
    def default_threshold(self) -> float:  # type: ignore[override]
        return self.estimator.default_threshold

    @property
    def needs_background(self) -> bool:  # type: ignore[override]
        return self.estimator.needs_background

    @property
    def patch(self) -> Patch | None:  # type: ignore[override]
        return self.estimator.patch

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        return dataclasses.replace(self, estimator=self.estimator.bound(modules))


@dataclass(frozen=True)
class Sparse(EstimatorWrapper):
    """The inner estimator at chosen noise levels only. It does not see the other evaluations.

    An evaluation repeated at one noise level (heun's corrector and next predictor) is repeated here too, because the
    lock replaces the first one. The state is the inner state, the last noise level, the number of new levels in the
    window, and the variance to hold.

    Args:
        estimator: The inner estimator.
        sigmas: Noise levels > 0; each is measured once, at the first evaluation at or below it.
        every: Measure at every n-th new noise level, >= 1. Not together with sigmas.
        below: Measure at sigma <= below only. Alone: at every evaluation there.
        above: Measure at sigma >= above only, likewise.
        hold: Whether the last variance is returned in between, so that the policy steps at every evaluation. Without it
            None is returned, and the lock holds its last control. Defaults to False.
    """

    sigmas: tuple[float, ...] = ()
    every: int | None = None
    below: float | None = None
    above: float | None = None
    hold: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.sigmas,) if isinstance(self.sigmas, (int, float)) else self.sigmas
        object.__setattr__(self, "sigmas", tuple(float(s) for s in given))
        if not self.sigmas and self.every is None and self.below is None and self.above is None:
            raise EstimatorError("Sparse: no noise levels chosen. Try Sparse(estimator, sigmas=(1.0, 0.3)) or every=5.")
        if self.sigmas and self.every is not None:
            raise EstimatorError("Sparse takes sigmas=... or every=..., not both.")
        if not all(s > 0 for s in self.sigmas):
            raise EstimatorError(f"sigmas={self.sigmas}; expected noise levels > 0.")
        if self.every is not None and not (isinstance(self.every, int) and self.every >= 1):
            raise EstimatorError(f"every={self.every}; expected a whole number of noise levels, 1 or more.")
        if self.below is not None and self.above is not None and self.below < self.above:
            raise EstimatorError(
                f"below={self.below:g}, above={self.above:g} is an empty window; expected above <= below. "
                f"Try below={self.above:g}, above={self.below:g}."
            )

    def init(self) -> tuple[Any, float, int, Tensor | None]:
        return self.estimator.init(), math.inf, 0, None

    def step(self, state: Any, evaluation: Evaluation) -> tuple[Any, Tensor | None]:
        inner, last, levels, held = state
        sigma, new = evaluation.sigma, evaluation.sigma < last * (1 - SAME_SIGMA)
        is_open = (self.above is None or sigma >= self.above) and (self.below is None or sigma <= self.below)
        if self.sigmas:
            due = any(sigma <= s * (1 + SAME_SIGMA) < last for s in self.sigmas)
        else:
            due = new and levels % (self.every or 1) == 0
        inner, variance = self.estimator.step(inner, evaluation) if is_open and due else (inner, None)
        variance = held if variance is None and self.hold else variance
        return (inner, sigma, levels + (new and is_open), variance if self.hold else None), variance


@dataclass(frozen=True)
class Combined(Estimator):
    """Several estimators as one, in units of risk: `Combined((TrajectoryVariance(), RenoiseVariance()))`.

    Args:
        estimators: At least one.
        how: "max" for the largest risk, "mean" for the weighted mean. Defaults to "max".
        weights: For "mean", one weight > 0 for each estimator, of any sum. Defaults to None, equal weights.
        thresholds: One threshold > 0 for each estimator. Defaults to None, their default thresholds.
    """

    estimators: tuple[Estimator, ...]
    how: Literal["max", "mean"] = "max"
    weights: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.estimators, Estimator) or not tuple(self.estimators):
            raise EstimatorError("Combined needs several estimators: Combined((a, b)).")
        object.__setattr__(self, "estimators", tuple(self.estimators))
        for estimator in self.estimators:
            check_inner(self, estimator)
        if len(patches := {e.patch for e in self.estimators if e.patch is not None}) > 1:
            raise EstimatorError(
                f"Combined has patches {', '.join(map(str, sorted(patches)))}; expected the same patch for all."
            )
        if self.how not in ("max", "mean") or (self.how == "max" and self.weights is not None):
            raise EstimatorError(f'how={self.how!r}, weights={self.weights}; expected "max", or "mean" with weights.')
        for name in ("weights", "thresholds"):
            given = getattr(self, name)
            if given is not None and not (len(given) == len(self.estimators) and all(v > 0 for v in given)):
                count = len(self.estimators)
                raise EstimatorError(f"{name}={given}: expected a number above 0 for each of {count} estimators.")
            object.__setattr__(self, name, None if given is None else tuple(map(float, given)))

    @property
    def cost(self) -> float:  # type: ignore[override]
        return sum(e.cost for e in self.estimators)

    @property
    def needs_background(self) -> bool:  # type: ignore[override]
        return any(e.needs_background for e in self.estimators)

    @property
    def patch(self) -> Patch | None:  # type: ignore[override]
        return next((e.patch for e in self.estimators if e.patch is not None), None)

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        modules = tuple(modules)
        return dataclasses.replace(self, estimators=tuple(e.bound(modules) for e in self.estimators))

    def init(self) -> tuple[Any, ...]:
        return tuple(e.init() for e in self.estimators)

    def step(self, state: tuple[Any, ...], evaluation: Evaluation) -> tuple[tuple[Any, ...], Tensor | None]:
        pairs = [e.step(s, evaluation) for e, s in zip(self.estimators, state, strict=True)]
        limits = self.thresholds or tuple(e.default_threshold for e in self.estimators)
        risks = {i: v / limits[i] for i, (_, v) in enumerate(pairs) if v is not None}
        states = tuple(s for s, _ in pairs)
        if not risks:
            return states, None
        if any(r.ndim > 1 for r in risks.values()):
            risks = {i: r if r.ndim > 1 else r[:, None] for i, r in risks.items()}
        stacked = torch.stack(torch.broadcast_tensors(*risks.values()))
        if self.how == "max":
            return states, stacked.amax(0)
        weights = stacked.new_tensor([1.0 if self.weights is None else self.weights[i] for i in risks])
        return states, torch.tensordot(weights / weights.sum(), stacked, dims=1)
