"""Estimators that evaluate the model again, and the random draws they do it with.

Draws are seeded per measurement, so that a rewound run repeats itself, and are the same for every clip of a batch, so
that a clip alone agrees with the clip in a batch. They are drawn in float32 on the latents' own device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..types import EstimatorError
from .base import Estimator


@dataclass(frozen=True)
class ProbingEstimator(Estimator):
    """Base of the estimators that evaluate the model again. The state counts measurements and seeds the next draw.

    Args:
        passes: Evaluations per clip and measurement.
        seed: Seed of the draws.
    """

    passes: int = 1
    seed: int = 0

    default_threshold = 0.01
    """What calm clips of the embedded model stay below from sigma 1.5 down, in latent units squared."""

    least_passes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.passes < self.least_passes:
            raise EstimatorError(
                f"passes={self.passes}; {type(self).__name__} needs {self.least_passes} or more. "
                f"Try passes={max(type(self).passes, self.least_passes)}."
            )

    @property
    def cost(self) -> float:  # type: ignore[override]
        return float(self.passes)

    def init(self) -> Any:
        return 0


def generator(seed: int, count: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator for draw number `count` of a seed."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + count) % 2**63)


def draw(kind: Literal["normal", "signs"], passes: int, like: Tensor, seed: int, count: int) -> Tensor:
    """Draw unit noise or +1 and -1 (Rademacher) for `passes` copies of `like`: (passes * batch, ...), float32.

    `count` is the number of measurements made before.
    """
    shape = (passes, 1, *like.shape[1:])
    values = torch.randn(shape, generator=generator(seed, count, like.device), device=like.device, dtype=torch.float32)
    values = values if kind == "normal" else torch.where(values < 0, -1.0, 1.0)
    return values.expand(passes, *like.shape).reshape(passes * len(like), *like.shape[1:])


def copies(values: Tensor, passes: int) -> Tensor:
    """Repeat (batch, ...) `passes` times: (passes * batch, ...)."""
    return values.repeat(passes, *[1] * (values.ndim - 1))
