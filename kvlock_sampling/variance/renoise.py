"""Renoise variance: how far the clean prediction moves when it is noised again and predicted again.

    var = mean_k |D(x0hat + sigma e_k, sigma) - x0hat|^2,  e_k fresh unit noise, the same sigma, k = 1..passes
Range >= 0, latent units squared. Source: denoising score matching as a local dimension, arXiv 2605.05026.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Evaluation
from ..utils.precision import working
from .base import Patch, ProbingEstimator, draw, pooled


@dataclass(frozen=True)
class RenoiseVariance(ProbingEstimator):
    """Mean squared distance of stochastic passes from x0-hat, in latent units squared.

    Args:
        passes: Fresh noises per measurement, >= 1, evaluated as one batch. Defaults to 2.
        seed: Seed of the noise. Defaults to 0.
        patch: Latents per token along (time, height, width), to measure every token. Defaults to None, per clip.
    """

    passes: int = 2
    patch: Patch | None = None

    def step(self, state: int, evaluation: Evaluation) -> tuple[int, Tensor | None]:
        denoised, sigma = evaluation.denoised.detach(), evaluation.sigma
        noise = draw("normal", self.passes, denoised, self.seed, state).to(denoised.dtype)
        again = evaluation.probe(torch.cat([denoised] * self.passes) + sigma * noise, sigma)
        squares = (working(again).unflatten(0, (self.passes, len(denoised))) - working(denoised)).square().mean(0)
        return state + 1, pooled(squares, evaluation.mask, self.patch)
