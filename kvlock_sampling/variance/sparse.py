"""Sparse: another estimator, but only now and then. A probe at four noise levels of a 50-step run costs 4%.

measure at an evaluation with  above <= sigma <= below  if
    sigmas:  it is the first at or below one of these noise levels, or
    every:   it is the 1st, (n+1)-th, (2n+1)-th ... new noise level inside [above, below].
Elsewhere there is no measurement, None: the lock then holds its last control (or put `Held` around it).
Cost: the inner estimator's, where it measures. Range: the inner estimator's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..types import EstimatorError, Evaluation
from .trajectory import SAME_SIGMA
from .wrappers import Wrapper


class SparseState(NamedTuple):
    """The inner state, the noise level of the last evaluation, and the new levels seen inside the window."""

    inner: Any
    sigma: float = math.inf
    levels: int = 0


@dataclass(frozen=True)
class Sparse(Wrapper):
    """The inner estimator at chosen noise levels only. It sees nothing of the other evaluations.

    sigmas: noise levels > 0; each is measured once, at the first evaluation at or below it.
    every: every n-th new noise level, >= 1. Not together with sigmas.
    below, above: only at above <= sigma <= below; alone they mean every evaluation in that window.

    An evaluation repeated at one noise level (heun's corrector and next predictor) is repeated here too: the lock
    replaces the first one, so a probe's share of all evaluations stays the same.

    Raises:
        EstimatorError: nothing is chosen, or settings out of range.
    """

    sigmas: tuple[float, ...] = ()
    every: int | None = None
    below: float | None = None
    above: float | None = None

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
                f"below={self.below:g}, above={self.above:g} is an empty window: it is open while "
                f"above <= sigma <= below.\n  Try below={self.above:g}, above={self.below:g}."
            )

    def init(self) -> SparseState:
        """Nothing seen yet."""
        return SparseState(self.estimator.init())

    def step(self, state: SparseState, evaluation: Evaluation) -> tuple[SparseState, Tensor | None]:
        """Pass the evaluation on if its turn has come; otherwise None, and the inner state stays as it is."""
        sigma, new = evaluation.sigma, evaluation.sigma < state.sigma * (1 - SAME_SIGMA)
        is_open = (self.above is None or sigma >= self.above) and (self.below is None or sigma <= self.below)
        if self.sigmas:
            due = any(sigma <= s * (1 + SAME_SIGMA) < state.sigma for s in self.sigmas)
        else:
            due = new and state.levels % (self.every or 1) == 0
        inner, variance = state.inner, None
        if is_open and due:
            inner, variance = self.estimator.step(inner, evaluation)
        return SparseState(inner, sigma, state.levels + (new and is_open)), variance
