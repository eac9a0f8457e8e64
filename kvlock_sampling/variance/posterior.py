"""Posterior variance: how sharply x determines x0, by the model itself.

    Cov[x0 | x] = sigma^2 dD/dx                                     (Tweedie, second order)
    var = sigma^2 * mean_k v_k' (dD/dx) v_k / number of masked elements,   v_k = +-1 on the mask, 0 elsewhere
the mean posterior variance of a masked element, unbiased by Hutchinson's identity E[v' J v] = trace J.
Range >= 0, latent units squared. Sources: Manor & Michaeli, arXiv 2309.13598; Hutchinson 1990.

Finite differences are one-sided, (D(x + h v) - D(x)) / h, because D(x) is known. Their first-order error
v' D''[v, v] h / 2 is odd in v, so random signs average it away.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..types import EstimatorError, Evaluation, KVLockError
from ..utils.fields import number
from ..utils.precision import working
from ._noise import ProbingEstimator, copies, draw

STEP = 2.0**-3
"""Default step of finite differences in units of sigma, between eps^(1/2) and eps^(1/3) of bfloat16."""

GRID_STEPS = 2
"""The least step in roundings, eps * |x|, of the latents' dtype: a smaller one could round away."""


@dataclass(frozen=True)
class PosteriorVariance(ProbingEstimator):
    """Mean posterior variance of the masked elements, in latent units squared.

    Negative estimates, which come from rounding or from a Jacobian that is no covariance, are reported as 0.

    Args:
        passes: Random directions per measurement, >= 1, evaluated as one batch. One is enough for a video, the default.
        seed: Seed of the directions. Defaults to 0.
        method: "forward" differentiates exactly, in about twice the time. "finite" takes differences; a model that
            detaches on its way needs it. "auto", the default, tries forward mode once per run, then differences.
        step_size: Step of finite differences in units of sigma, > 0. Defaults to 1/8, for bfloat16; 0.01 suits float32.

    Raises:
        EstimatorError: A setting without effect; in a run, a model that `method` cannot differentiate.
    """

    method: Literal["auto", "finite", "forward"] = "auto"
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("auto", "finite", "forward"):
            raise EstimatorError(f'method={self.method!r}; expected "auto", "finite" or "forward".')
        number(self, "step_size", above=0.0, optional=True)
        if self.step_size is not None and self.method == "forward":
            raise EstimatorError(
                'step_size is for finite differences, and method="forward" takes none. Try method="finite".'
            )

    def init(self) -> tuple[int, bool]:
        return 0, False

    def step(self, state: tuple[int, bool], evaluation: Evaluation) -> tuple[tuple[int, bool], Tensor | None]:
        measured, finite = state
        x, mask = evaluation.x.detach(), evaluation.mask
        v = draw("signs", self.passes, x, self.seed, measured)
        if mask is not None:
            # With the square root a soft mask weighs the trace as it weighs a mean.
            v = v * copies(torch.broadcast_to(working(mask).sqrt(), x.shape), self.passes)
        quadratic, finite = None, finite or self.method == "finite"
        if not finite:
            quadratic = self._forward(evaluation, copies(x, self.passes), v)
            if quadratic is None and self.method == "forward":
                raise EstimatorError(
                    "the model cannot be differentiated in forward mode: an operation lacks it, or inference_mode is "
                    'on. Try PosteriorVariance(method="finite").'
                )
            finite = quadratic is None
        if quadratic is None:
            quadratic = self._finite(evaluation, copies(x, self.passes), v)
        trace = quadratic.unflatten(0, (self.passes, len(x))).mean(0).flatten(1).sum(1)
        weight = torch.ones_like(x) if mask is None else torch.broadcast_to(mask, x.shape)
        variance = evaluation.sigma**2 * trace / working(weight).flatten(1).sum(1).clamp_min(1e-12)
        return (measured + 1, finite), variance.clamp_min(0.0)

    @staticmethod
    def _forward(evaluation: Evaluation, x: Tensor, v: Tensor) -> Tensor | None:
        """v_i (J v)_i by forward-mode differentiation, or None if an operation lacks it."""
        try:
            with forward_ad.dual_level():
                out = evaluation.probe(forward_ad.make_dual(x, v.to(x.dtype)), evaluation.sigma)
                tangent = forward_ad.unpack_dual(out).tangent
        except (KVLockError, torch.OutOfMemoryError):
            raise
        except (NotImplementedError, RuntimeError):
            return None
        return None if tangent is None else v * working(tangent)

    def _finite(self, evaluation: Evaluation, x: Tensor, v: Tensor) -> Tensor:
        """The same by one-sided differences, divided by the displacement that is left after rounding."""
        step = evaluation.sigma * (STEP if self.step_size is None else self.step_size)
        steps = (working(x).abs() * (GRID_STEPS * torch.finfo(x.dtype).eps)).clamp_min(step)
        moved = (working(x) + steps * v).to(x.dtype)
        change = working(evaluation.probe(moved, evaluation.sigma))
        change = change - copies(working(evaluation.denoised.detach()), self.passes)
        displacement = working(moved) - working(x)
        return torch.where(displacement == 0, 0.0, v.square() * change / displacement)
