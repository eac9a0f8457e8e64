"""Several estimators as one:  `Max`,  `Mean`,  `Weighted`.

They are compared in units of risk, each divided by its own threshold:
    Max:       max_i var_i / threshold_i
    Mean:      mean_i var_i / threshold_i
    Weighted:  sum_i w_i var_i / threshold_i / sum_i w_i
so a result of 1 is at the threshold, and `default_threshold` is 1. Range >= 0. Cost: the sum of the parts'.
An estimator that pauses is left out while it does; `Max((TrajectoryVariance(), Held(Sparse(probe))))` keeps its word.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..types import EstimatorError, Evaluation
from .base import Estimator
from .wrappers import check_inner


@dataclass(frozen=True)
class Several(Estimator):
    """What Max, Mean and Weighted share.

    estimators: at least one. thresholds: one per estimator, > 0; None: each one's `default_threshold`.

    Raises:
        EstimatorError: settings that cannot be meant.
    """

    estimators: tuple[Estimator, ...]
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.estimators, Estimator) or not tuple(self.estimators):
            raise EstimatorError(f"{type(self).__name__} needs several estimators: {type(self).__name__}((a, b)).")
        object.__setattr__(self, "estimators", tuple(self.estimators))
        for estimator in self.estimators:
            check_inner(self, estimator)
        self._numbers("thresholds")

    def _numbers(self, name: str) -> None:
        """Check a field with one positive number per estimator, or None."""
        given = getattr(self, name)
        if given is None:
            return
        object.__setattr__(self, name, tuple(float(v) for v in given))
        if len(given) != len(self.estimators) or not all(v > 0 for v in given):
            raise EstimatorError(f"{name}={given}: expected a number above 0 for each of {len(self.estimators)} parts.")

    @property
    def cost(self) -> float:  # type: ignore[override]
        """Extra evaluations per clip, where all parts measure."""
        return sum(e.cost for e in self.estimators)

    @property
    def needs_background(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(e.needs_background for e in self.estimators)

    @property
    def reads_background(self) -> bool:
        """Whether any part does."""
        return any(e.reads_background for e in self.estimators)

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        """The same over the parts, bound."""
        modules = tuple(modules)
        return dataclasses.replace(self, estimators=tuple(e.bound(modules) for e in self.estimators))

    def init(self) -> tuple[Any, ...]:
        """State: one of each part."""
        return tuple(e.init() for e in self.estimators)

    def step(self, state: tuple[Any, ...], evaluation: Evaluation) -> tuple[tuple[Any, ...], Tensor | None]:
        """Risk over all parts that measured: (batch,), or (batch, tokens) if any is local."""
        pairs = [e.step(s, evaluation) for e, s in zip(self.estimators, state, strict=True)]
        limits = self.thresholds or tuple(e.default_threshold for e in self.estimators)
        risks = {i: v / limits[i] for i, (_, v) in enumerate(pairs) if v is not None}
        if not risks:
            return tuple(s for s, _ in pairs), None
        if any(r.ndim > 1 for r in risks.values()):
            risks = {i: r if r.ndim > 1 else r[:, None] for i, r in risks.items()}
        stacked = torch.stack(torch.broadcast_tensors(*risks.values()))
        return tuple(s for s, _ in pairs), self._combined(stacked, list(risks))

    @abstractmethod
    def _combined(self, risks: Tensor, which: list[int]) -> Tensor:
        """One risk from those of the estimators `which`, (parts, batch, ...)."""


@dataclass(frozen=True)
class Max(Several):
    """The largest risk of several estimators: alarm if any of them does. Settings as in `Several`."""

    def _combined(self, risks: Tensor, which: list[int]) -> Tensor:
        return risks.amax(0)


@dataclass(frozen=True)
class Weighted(Several):
    """The weighted mean risk of several estimators.

    weights: one per estimator, > 0, of any sum; None: equal. Other settings as in `Several`.
    """

    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers("weights")

    def _combined(self, risks: Tensor, which: list[int]) -> Tensor:
        if self.weights is None:
            return risks.mean(0)
        shares = risks.new_tensor([self.weights[i] for i in which])
        return torch.tensordot(shares / shares.sum(), risks, dims=1)


@dataclass(frozen=True)
class Mean(Several):
    """The mean risk of several estimators. Settings as in `Several`."""

    def _combined(self, risks: Tensor, which: list[int]) -> Tensor:
        return risks.mean(0)
