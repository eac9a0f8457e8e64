"""A free estimator with memory: how far x0-hat is from what DPM-Solver++(2M) extrapolates (arXiv 2211.01095)."""

import math
from dataclasses import dataclass

import kvlock_sampling as kv


@dataclass(frozen=True)
class SolverDisagreement(kv.variance.Estimator):
    """Squared gap, over sigma^2, to the line in log sigma through the two predictions before."""

    default_threshold = 0.005  # calm clips of the embedded model in 30 steps; it falls as the 4th power of the step

    def step(self, state, evaluation):
        sigma, denoised = evaluation.sigma, evaluation.denoised.float()
        before = [p for p in state or () if p[0] > sigma * 1.0001]  # an evaluation at the same sigma replaces the last
        kept = (*before, (sigma, denoised))[-3:]
        if len(before) < 2:
            return kept, None
        (older_sigma, older), (last_sigma, last) = before[-2:]
        ratio = math.log(last_sigma / sigma) / math.log(older_sigma / last_sigma)
        gap = denoised - last - ratio * (last - older)
        return kept, kv.variance.masked_mean(gap**2, evaluation.mask) / sigma**2


estimator = SolverDisagreement()
