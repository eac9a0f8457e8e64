"""Solver disagreement: how far the new clean prediction is from what a multistep solver expected it to be.

With l = -log sigma, h_k = l_k - l_(k-1), and D_k the clean prediction at l_k:
    order 1:  e = D_k - D_(k-1)                                       a step of Euler or DDIM holds D
    order 2:  e = D_k - D_(k-1) - h_k / h_(k-1) (D_(k-1) - D_(k-2))   a step of DPM-Solver++(2M) extends it linearly
    var = mean |e|^2, divided by sigma_k^2 if normalised
Range >= 0. Cost: none. For a smooth trajectory it falls as h^2 (order 1) or h^4 (order 2): a threshold belongs to a
number of steps. Sources: the two-order gap of k-diffusion's `sample_dpm_adaptive`; the extrapolation of DPM-Solver++
(2M), arXiv 2211.01095.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ..types import EstimatorError, Evaluation
from ..utils.precision import working
from .base import Estimator, Patch, check_patch, pooled
from .trajectory import SAME_SIGMA


class Prediction(NamedTuple):
    """One clean prediction, (batch, ...), and its noise level."""

    sigma: float
    denoised: Tensor


@dataclass(frozen=True)
class SolverDisagreement(Estimator):
    """Squared gap between x0-hat and its extrapolation from the predictions before.

    order: 1 compares with the prediction before, 2 with the line through the two before; known from the (order+1)-th
        evaluation on.
    normalise: True = over sigma squared, dimensionless; False = latent units squared.
    patch: latents per token along (time, height, width): measure every token, (batch, tokens). None: one per clip.

    Raises:
        EstimatorError: settings out of range.
    """

    order: Literal[1, 2] = 2
    normalise: bool = True
    patch: Patch | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", check_patch(self.patch))
        if self.order not in (1, 2):
            raise EstimatorError(f"order={self.order}; expected 1 (the prediction before) or 2 (a line through two).")

    @property
    def default_threshold(self) -> float:  # type: ignore[override]
        """What calm clips of the embedded model reach in 30 steps of dpmpp_2m, at the end of the run."""
        return 0.02 if self.normalise else 5e-4

    def init(self) -> tuple[Prediction, ...]:
        """No predictions yet; later the last `order` of them."""
        return ()

    def step(
        self, state: tuple[Prediction, ...], evaluation: Evaluation
    ) -> tuple[tuple[Prediction, ...], Tensor | None]:
        """Compare, then append; an entry at nearly the same sigma is replaced. Variance: (batch,) or per token."""
        sigma, denoised = evaluation.sigma, evaluation.denoised.detach()
        before = tuple(p for p in state if p.sigma > sigma * (1 + SAME_SIGMA))
        kept = (*before, Prediction(sigma, denoised))[-self.order - 1 :]
        if len(before) < self.order:
            return kept, None
        last = before[-1]
        gap = working(denoised) - working(last.denoised)
        if self.order == 2:
            older = before[-2]
            ratio = math.log(last.sigma / sigma) / math.log(older.sigma / last.sigma)
            gap = gap - ratio * (working(last.denoised) - working(older.denoised))
        variance = pooled(gap.square(), evaluation.mask, self.patch)
        return kept, variance / sigma**2 if self.normalise else variance
