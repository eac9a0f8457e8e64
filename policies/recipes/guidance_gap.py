"""A free estimator: how much the prompt still changes the prediction. Source: MAMBO-G, arXiv 2508.03442."""

from dataclasses import dataclass

import kvlock_sampling as kv


@dataclass(frozen=True)
class GuidanceGap(kv.variance.Estimator):
    """|c - u|^2 / |u|^2 over the mask, of the conditional and unconditional velocity v = (x - D) / sigma - D."""

    default_threshold = 0.06  # what calm clips of the embedded model reach
    needs_uncond = True

    def step(self, state, evaluation):
        if evaluation.uncond is None:  # no unconditional prompt
            return state, None
        x, sigma, mean = evaluation.x.float(), evaluation.sigma, kv.variance.masked_mean
        cond, uncond = evaluation.denoised.float(), evaluation.uncond.float()
        gap = (cond - uncond) * (1 + 1 / sigma)
        size = (x - uncond) / sigma - uncond
        return state, mean(gap**2, evaluation.mask) / mean(size**2, evaluation.mask).clamp_min(1e-12)


estimator = GuidanceGap()
