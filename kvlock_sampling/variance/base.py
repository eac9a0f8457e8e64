"""The contract of an estimator: `init() -> state`, `step(state, evaluation) -> (state, variance or None)`.

Settings are frozen, state is a value: rewinding a run is restoring an old state. `step` is given evaluations at
falling sigma; whoever drives it (the lock does) restores an earlier state when a sampler goes back up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..precision import working
from ..types import Evaluation


class Estimator(ABC):
    """Base of all estimators. Subclasses are frozen dataclasses."""

    cost: float = 0.0
    """Extra evaluations of the model per clip and measurement."""

    default_threshold: float = 1.0
    """The variance that counts as risk 1 when the user names no threshold."""

    def init(self) -> Any:
        """The state before the first evaluation."""
        return None

    @abstractmethod
    def step(self, state: Any, evaluation: Evaluation) -> tuple[Any, Tensor | None]:
        """Take in one evaluation. Returns the new state and the variance, (batch,), or None while it is unknown."""


def masked_mean(values: Float[Tensor, "batch *axes"], mask: Tensor | None) -> Float[Tensor, "batch"]:
    """Mean per clip, in float32 or better, weighted by a mask broadcastable to `values` (None: all)."""
    values = working(values)
    if mask is None:
        return values.flatten(1).mean(1)
    weight = torch.broadcast_to(mask, values.shape).to(values.dtype).flatten(1)
    return (values.flatten(1) * weight).sum(1) / weight.sum(1).clamp_min(1e-12)
