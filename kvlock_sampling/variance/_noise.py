"""Estimators that evaluate the model again, and the random draws they do it with.

Draws are seeded per measurement, so that a rewound run repeats itself, and are the same for every clip of a batch.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..types import EstimatorError
from ..utils.fields import check_seed, number
from .base import Estimator, check_patch


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
    cost = property(lambda self: float(self.passes))

    def __post_init__(self) -> None:
        number(self, "passes", at_least=self.least_passes, whole=True)
        check_seed(self.seed, EstimatorError)
        check_patch(self)

    def init(self) -> Any:
        return 0


def generator(seed: int, count: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed((seed * 1_000_003 + count) % 2**63)


def draw(kind: Literal["normal", "signs"], passes: int, like: Tensor, seed: int, count: int) -> Tensor:
    """Draw unit noise or +1 and -1 for `passes` copies of `like`: (passes * batch, ...), float32, on its device."""
    shape = (passes, 1, *like.shape[1:])
    values = torch.randn(shape, generator=generator(seed, count, like.device), device=like.device, dtype=torch.float32)
    values = values if kind == "normal" else torch.where(values < 0, -1.0, 1.0)
    return values.expand(passes, *like.shape).reshape(passes * len(like), *like.shape[1:])


def copies(values: Tensor, passes: int) -> Tensor:
    return values.repeat(passes, *[1] * (values.ndim - 1))
