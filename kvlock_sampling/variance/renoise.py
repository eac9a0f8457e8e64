"""Renoise variance: how far the clean prediction moves when it is noised again and predicted again.

    var = mean_k |D(x0hat + sigma e_k, sigma) - x0hat|^2,  e_k fresh unit noise, the same sigma, k = 1..passes
Around the passes' own mean instead of x0hat it is the sample variance of stochastic passes. Range >= 0, latent units
squared. Cost: `passes` evaluations. Source: denoising score matching as a local dimension, arXiv 2605.05026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..types import EstimatorError, Evaluation
from ..utils.precision import working
from ._noise import ProbingEstimator, copies, draw
from .base import Patch, check_patch, pooled


@dataclass(frozen=True)
class RenoiseVariance(ProbingEstimator):
    """Variance over stochastic passes, in latent units squared. Raises EstimatorError for a setting out of range.

    Args:
        passes: Fresh noises per measurement, >= 1, evaluated as one batch. Defaults to 2.
        seed: Seed of the noise. Defaults to 0.
        around: "prediction" measures from x0-hat: one pass is enough, and a consistent bias counts. "mean" is the
            sample variance of at least two passes. Defaults to "prediction".
        region_only: Whether the noise goes inside the mask only. The model then sees the sampler's own latents outside,
            so only the doubt about the edit counts. Defaults to False.
        patch: Latents per token along (time, height, width), to measure every token, (batch, tokens). Defaults to None,
            one value per clip.
    """

    passes: int = 2
    around: Literal["prediction", "mean"] = "prediction"
    region_only: bool = False
    patch: Patch | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patch(self)
        if self.around not in ("prediction", "mean"):
            raise EstimatorError(f'around={self.around!r}; expected "prediction" or "mean".')
        if self.around == "mean" and self.passes < 2:
            raise EstimatorError(f'passes={self.passes} with around="mean"; a spread needs 2 passes or more.')

    def step(self, state: int, evaluation: Evaluation) -> tuple[int, Tensor | None]:
        denoised, sigma, mask = evaluation.denoised.detach(), evaluation.sigma, evaluation.mask
        noise = draw("normal", self.passes, denoised, self.seed, state).to(denoised.dtype)
        again = copies(denoised, self.passes) + sigma * noise
        if self.region_only and mask is not None:
            inside = torch.broadcast_to(mask, denoised.shape).to(denoised.dtype)
            again = torch.lerp(copies(evaluation.x.detach(), self.passes), again, copies(inside, self.passes))
        spread = working(evaluation.probe(again, sigma)).unflatten(0, (self.passes, len(denoised)))
        if self.around == "mean":
            squares = spread.var(dim=0, correction=1)
        else:
            squares = (spread - working(denoised)).square().mean(0)
        return state + 1, pooled(squares, mask, self.patch)
