"""Sparse: an estimator around another one, which chooses when to measure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..types import SAME_SIGMA, EstimatorError, Evaluation
from ..utils.fields import flag, levels, number
from .base import Estimator


def sparsely(estimator: Estimator) -> Estimator:
    """What is measured, however sparsely."""
    return sparsely(estimator.estimator) if isinstance(estimator, Sparse) else estimator


@dataclass(frozen=True)
class Sparse(Estimator):
    """The inner estimator at chosen noise levels only. It does not see the other evaluations.

    An evaluation repeated at one noise level (heun's corrector and next predictor) is repeated here too. The state is
    (inner state, last noise level, number of new levels, held variance).

    Args:
        estimator: The inner estimator.
        sigmas: Noise levels > 0; each is measured once, at the first evaluation at or below it.
        every: Measure at every n-th new noise level, the first included, >= 1. Not together with sigmas.
        hold: Whether to return the last variance in between, instead of None: the policy then steps. Defaults to False.
    """

    estimator: Estimator
    sigmas: tuple[float, ...] = ()
    every: int | None = None
    hold: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator):
            raise EstimatorError(
                f"Sparse was given {self.estimator!r}; expected an estimator, e.g. Sparse(RenoiseVariance(), every=5)."
            )
        for name in ("cost", "default_threshold", "needs_source", "needs_uncond", "patch"):
            object.__setattr__(self, name, getattr(self.estimator, name))
        levels(self, "sigmas")
        if bool(self.sigmas) == (self.every is not None):
            raise EstimatorError("Sparse takes noise levels, sigmas=(1.0, 0.3), or every=5; expected one of them.")
        number(self, "every", at_least=1, whole=True, optional=True)
        flag(self, "hold")

    def init(self) -> tuple[Any, float, int, Tensor | None]:
        return self.estimator.init(), math.inf, 0, None

    def step(self, state: Any, evaluation: Evaluation) -> tuple[Any, Tensor | None]:
        inner, last, levels, held = state
        sigma, new = evaluation.sigma, evaluation.sigma < last * (1 - SAME_SIGMA)
        inner, variance = self.estimator.step(inner, evaluation) if self._now(state, sigma) else (inner, None)
        variance = held if variance is None and self.hold else variance
        return (inner, sigma, levels + new, variance if self.hold else None), variance

    def _now(self, state: Any, sigma: float) -> bool:
        _, last, levels, _ = state
        if self.every:
            return sigma < last * (1 - SAME_SIGMA) and levels % self.every == 0
        return any(sigma <= s * (1 + SAME_SIGMA) < last for s in self.sigmas)

    def due(self, state: Any, sigma: float) -> bool:
        return self._now(state, sigma) and self.estimator.due(state[0], sigma)

    def on_tokens(self, patch: tuple[int, int, int]) -> Estimator:
        return replace(self, estimator=self.estimator.on_tokens(patch))

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        return replace(self, estimator=self.estimator.bound(modules))

    def effect(self, state: Any) -> Tensor | None:
        return self.estimator.effect(state[0])
