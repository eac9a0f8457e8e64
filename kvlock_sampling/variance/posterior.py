"""Posterior variance: how sharply x determines x0, by the model itself.

    Cov[x0 | x] = sigma^2 dD/dx                                     (Tweedie, second order)
    var = sigma^2 * mean_k v_k' (dD/dx) v_k / number of masked elements,   v_k = +-1 on the mask, 0 elsewhere
the mean posterior variance of a masked element, unbiased by Hutchinson's identity E[v' J v] = trace J.
Range >= 0, latent units squared. Sources: Manor & Michaeli, arXiv 2309.13598; Hutchinson 1990.

The derivative is a one-sided difference, (D(x + h v) - D(x)) / h, because D(x) is known. Its first-order error
v' D''[v, v] h / 2 is odd in v, so random signs average it away.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Evaluation
from ..utils.fields import number
from ..utils.precision import working
from .base import ProbingEstimator, draw


@dataclass(frozen=True)
class PosteriorVariance(ProbingEstimator):
    """Mean posterior variance of the masked elements, in latent units squared.

    Negative estimates, which come from rounding or from a Jacobian that is no covariance, are reported as 0.
    Raises EstimatorError for a setting out of range.

    Args:
        passes: Random directions per measurement, >= 1, evaluated as one batch. One is enough for a video, the default.
        seed: Seed of the directions. Defaults to 0.
        step_size: Step of finite differences in units of sigma, > 0. Defaults to 1/8, for bfloat16; 0.01 suits float32.
    """

    step_size: float = 2.0**-3  # between eps^(1/2) and eps^(1/3) of bfloat16

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "step_size", above=0.0)

    def step(self, state: int, evaluation: Evaluation) -> tuple[int, Tensor | None]:
        x, mask, sigma = evaluation.x.detach(), evaluation.mask, evaluation.sigma
        weight = torch.ones_like(working(x)) if mask is None else working(mask).broadcast_to(x.shape)
        # With the square root a soft mask weighs the trace as it weighs a mean.
        v = draw("signs", self.passes, x, self.seed, state).unflatten(0, (self.passes, -1)) * weight.sqrt()
        # At least two roundings, eps * |x|, of the latents' dtype: a smaller step could round away.
        steps = (working(x).abs() * (2 * torch.finfo(x.dtype).eps)).clamp_min(sigma * self.step_size)
        moved = (working(x) + steps * v).to(x.dtype)
        again = working(evaluation.probe(moved.flatten(0, 1), sigma)).unflatten(0, (self.passes, -1))
        # v_i (J v)_i by one-sided differences, divided by the displacement that is left after rounding.
        change, displacement = again - working(evaluation.denoised.detach()), working(moved) - working(x)
        trace = torch.where(displacement == 0, 0.0, v.square() * change / displacement).mean(0).flatten(1).sum(1)
        return state + 1, (sigma**2 * trace / weight.flatten(1).sum(1).clamp_min(1e-12)).clamp_min(0.0)
