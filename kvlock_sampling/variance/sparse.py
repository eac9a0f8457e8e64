"""Sparse: an estimator around another one, which chooses when to measure.

It measures at an evaluation with  above <= sigma <= below  if
    sigmas:  it is the first at or below one of these noise levels, or
    every:   it is the 1st, (n+1)-th, (2n+1)-th ... new noise level inside [above, below].
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..types import SAME_SIGMA, EstimatorError, Evaluation
from ..utils.fields import flag, levels, number
from .base import Estimator


@dataclass(frozen=True)
class Sparse(Estimator):
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

    estimator: Estimator
    sigmas: tuple[float, ...] = ()
    every: int | None = None
    below: float | None = None
    above: float | None = None
    hold: bool = False

    cost = property(attrgetter("estimator.cost"))
    default_threshold = property(attrgetter("estimator.default_threshold"))
    needs_source = property(attrgetter("estimator.needs_source"))
    patch = property(attrgetter("estimator.patch"))

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator):
            raise EstimatorError(
                f"Sparse was given {self.estimator!r}; expected an estimator, e.g. Sparse(RenoiseVariance(), every=5)."
            )
        levels(self, "sigmas")
        if not self.sigmas and self.every is None and self.below is None and self.above is None:
            raise EstimatorError("Sparse: no noise levels chosen. Try Sparse(estimator, sigmas=(1.0, 0.3)) or every=5.")
        if self.sigmas and self.every is not None:
            raise EstimatorError("Sparse takes sigmas=... or every=..., not both.")
        number(self, "every", at_least=1, whole=True, optional=True)
        number(self, "below", above=0.0, optional=True)
        number(self, "above", at_least=0.0, optional=True)
        flag(self, "hold")
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

    def on_tokens(self, patch: tuple[int, int, int]) -> Estimator:
        return dataclasses.replace(self, estimator=self.estimator.on_tokens(patch))

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        return dataclasses.replace(self, estimator=self.estimator.bound(modules))

    def effect(self, state: Any) -> Tensor | None:
        return self.estimator.effect(state[0])
