"""Held: the last word of an estimator that pauses.  Around `Sparse`, whose other evaluations measure nothing.

    var_k = the inner estimator's, or var_(k-1) while it is silent
Range and cost: the inner estimator's. Without it the lock holds its last *control* through a pause; with it the policy
is asked at every evaluation, so that its clock and its windows go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..types import EstimatorError, Evaluation
from .base import Estimator


@dataclass(frozen=True)
class Wrapper(Estimator):
    """An estimator that changes when or how another one speaks. Cost and threshold are the inner one's."""

    estimator: Estimator

    def __post_init__(self) -> None:
        check_inner(self, self.estimator)

    @property
    def cost(self) -> float:  # type: ignore[override]
        """Extra evaluations per clip and measurement."""
        return self.estimator.cost

    @property
    def default_threshold(self) -> float:  # type: ignore[override]
        """The inner estimator's."""
        return self.estimator.default_threshold

    @property
    def needs_background(self) -> bool:  # type: ignore[override]
        """The inner estimator's."""
        return self.estimator.needs_background

    @property
    def reads_background(self) -> bool:
        """The inner estimator's."""
        return self.estimator.reads_background

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        """The same around the inner estimator, bound."""
        return dataclasses.replace(self, estimator=self.estimator.bound(modules))


@dataclass(frozen=True)
class Held(Wrapper):
    """The inner estimator, its last variance repeated while it pauses."""

    def init(self) -> tuple[Any, Tensor | None]:
        """State: the inner state and the last variance."""
        return self.estimator.init(), None

    def step(
        self, state: tuple[Any, Tensor | None], evaluation: Evaluation
    ) -> tuple[tuple[Any, Tensor | None], Tensor | None]:
        """What the inner estimator says, or said last; None before it first does."""
        inner, variance = self.estimator.step(state[0], evaluation)
        variance = state[1] if variance is None else variance
        return (inner, variance), variance


def check_inner(outer: Estimator, inner: Any) -> None:
    """The door of an estimator around others.

    Raises:
        EstimatorError: `inner` is not an estimator.
    """
    if not isinstance(inner, Estimator):
        kind = type(outer).__name__
        raise EstimatorError(f"{kind} was given {inner!r}; expected an estimator, e.g. {kind}(RenoiseVariance()).")
