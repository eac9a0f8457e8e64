"""Estimators around estimators:  Sparse (when),  Combined (several as one).

Sparse measures at an evaluation with  above <= sigma <= below  if
    sigmas:  it is the first at or below one of these noise levels, or
    every:   it is the 1st, (n+1)-th, (2n+1)-th ... new noise level inside [above, below].

Combined compares in units of risk, each variance divided by its estimator's default threshold, and effects likewise:
    max:     max_i var_i / threshold_i
    mean:    sum_i w_i var_i / threshold_i / sum_i w_i
An estimator that returns None at an evaluation is left out there.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..types import SAME_SIGMA, EstimatorError, Evaluation
from .base import Estimator


def check_inner(outer: Estimator, inner: Any) -> None:
    if not isinstance(inner, Estimator):
        kind = type(outer).__name__
        raise EstimatorError(f"{kind} was given {inner!r}; expected an estimator, e.g. {kind}(RenoiseVariance()).")


@dataclass(frozen=True)
class EstimatorWrapper(Estimator):
    """Base of an estimator around another one, whose class attributes it shares.

    Args:
        estimator: The inner estimator.
    """

    estimator: Estimator

    cost = property(attrgetter("estimator.cost"))
    default_threshold = property(attrgetter("estimator.default_threshold"))
    needs_background = property(attrgetter("estimator.needs_background"))
    needs_source = property(attrgetter("estimator.needs_source"))
    patch = property(attrgetter("estimator.patch"))

    def __post_init__(self) -> None:
        check_inner(self, self.estimator)

    def on_tokens(self, patch: tuple[int, int, int]) -> Estimator:
        return dataclasses.replace(self, estimator=self.estimator.on_tokens(patch))

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        return dataclasses.replace(self, estimator=self.estimator.bound(modules))


@dataclass(frozen=True)
class Sparse(EstimatorWrapper):
    """The inner estimator at chosen noise levels only. It does not see the other evaluations.

    An evaluation repeated at one noise level (heun's corrector and next predictor) is repeated here too. The state is
    (inner state, last noise level, number of new levels in the window, variance to hold).

    Args:
        estimator: The inner estimator.
        sigmas: Noise levels > 0; each is measured once, at the first evaluation at or below it.
        every: Measure at every n-th new noise level, >= 1. Not together with sigmas.
        below: Measure at sigma <= below only; alone, at every new level there. Defaults to no limit.
        above: Measure at sigma >= above only, likewise.
        hold: Whether to return the last variance in between, instead of None: the policy then steps. Defaults to False.
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
            raise EstimatorError(f"empty window; expected above <= below: above={self.below:g}, below={self.above:g}.")

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

    def effect(self, state: Any) -> Tensor | None:
        return self.estimator.effect(state[0])


@dataclass(frozen=True)
class Combined(Estimator):
    """Several estimators as one, in units of risk: `Combined((TrajectoryVariance(), RenoiseVariance()))`.

    Args:
        estimators: At least one.
        how: "max" for the largest risk, "mean" for the weighted mean. Defaults to "max".
        weights: For "mean", one weight > 0 for each estimator, of any sum. Defaults to None, equal weights.
    """

    estimators: tuple[Estimator, ...]
    how: Literal["max", "mean"] = "max"
    weights: tuple[float, ...] | None = None

    cost = property(lambda self: sum(e.cost for e in self.estimators))
    needs_background = property(lambda self: any(e.needs_background for e in self.estimators))
    needs_source = property(lambda self: any(e.needs_source for e in self.estimators))
    patch = property(lambda self: next((e.patch for e in self.estimators if e.patch), None))

    def __post_init__(self) -> None:
        if isinstance(self.estimators, Estimator) or not tuple(self.estimators):
            raise EstimatorError("Combined needs several estimators: Combined((a, b)).")
        object.__setattr__(self, "estimators", tuple(self.estimators))
        for estimator in self.estimators:
            check_inner(self, estimator)
        if len(patches := {e.patch for e in self.estimators if e.patch is not None}) > 1:
            raise EstimatorError(f"Combined has patches {sorted(patches)}; expected the same patch for all.")
        if self.how not in ("max", "mean") or (self.how == "max" and self.weights is not None):
            raise EstimatorError(f'how={self.how!r}, weights={self.weights}; expected "max", or "mean" with weights.')
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))
            if len(self.weights) != (count := len(self.estimators)) or min(self.weights) <= 0:
                raise EstimatorError(f"weights={self.weights}; expected a number > 0 for each of {count} estimators.")

    def on_tokens(self, patch: tuple[int, int, int]) -> Estimator:
        return dataclasses.replace(self, estimators=tuple(e.on_tokens(patch) for e in self.estimators))

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        modules = tuple(modules)
        return dataclasses.replace(self, estimators=tuple(e.bound(modules) for e in self.estimators))

    def init(self) -> tuple[Any, ...]:
        return tuple(e.init() for e in self.estimators)

    def step(self, state: tuple[Any, ...], evaluation: Evaluation) -> tuple[tuple[Any, ...], Tensor | None]:
        pairs = [e.step(s, evaluation) for e, s in zip(self.estimators, state, strict=True)]
        return tuple(s for s, _ in pairs), self._joined([v for _, v in pairs])

    def effect(self, state: tuple[Any, ...]) -> Tensor | None:
        found = self._joined([e.effect(s) for e, s in zip(self.estimators, state, strict=True)])
        return found[:, None] if found is not None and self.patch and found.ndim == 1 else found

    def _joined(self, found: list[Tensor | None]) -> Tensor | None:
        risks = {i: v / self.estimators[i].default_threshold for i, v in enumerate(found) if v is not None}
        if not risks:
            return None
        if any(r.ndim > 1 for r in risks.values()):
            risks = {i: r if r.ndim > 1 else r[:, None] for i, r in risks.items()}
        stacked = torch.stack(torch.broadcast_tensors(*risks.values()))
        if self.how == "max":
            return stacked.amax(0)
        weights = stacked.new_tensor([1.0 if self.weights is None else self.weights[i] for i in risks])
        return torch.tensordot(weights / weights.sum(), stacked, dims=1)
