"""Guidance gap: how much the prompt still changes the prediction, relative to the prediction without it.

    var = |c - u|^2 / |u|^2   over the masked elements,  c and u the conditional and unconditional predictions
of the velocity v = eps - D, of the noise eps = (x - D) / sigma, or of the clean latents D. The square of MAMBO-G's
ratio r_t (arXiv 2508.03442, `MagnitudeAwareGuidance` in diffusers), which is taken on the model's own output.
Range >= 0, dimensionless. Cost: none where the unconditional prediction was evaluated anyway; elsewhere nothing is
measured. A policy that lowers cfg_scale to exactly 1 for every clip saves that prediction and so blinds this estimator:
its last word then holds for the rest of the run. Keep the scale above, `Clamped(policy, cfg=(1.05, 20.0))`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..types import EstimatorError, Evaluation
from ..utils.precision import working
from .base import Estimator, Patch, check_patch, pooled


@dataclass(frozen=True)
class GuidanceGap(Estimator):
    """Squared relative distance between the conditional and the unconditional prediction.

    of: what to compare. "velocity" is what flow models predict: it damps neither end of the schedule. "noise" is what
        older models predict: near 0 at high noise. "latents" is x0-hat itself: it depends on the latents' offset.
    patch: latents per token along (time, height, width): measure every token, (batch, tokens). None: one per clip.

    Raises:
        EstimatorError: settings out of range.
    """

    of: Literal["velocity", "noise", "latents"] = "velocity"
    patch: Patch | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", check_patch(self.patch))
        if self.of not in ("velocity", "noise", "latents"):
            raise EstimatorError(f'of={self.of!r}; expected "velocity", "noise" or "latents".')

    @property
    def default_threshold(self) -> float:  # type: ignore[override]
        """What calm clips of the embedded model reach."""
        return 0.01

    def step(self, state: None, evaluation: Evaluation) -> tuple[None, Tensor | None]:
        """Compare the two predictions. Variance: (batch,), or None without an unconditional one."""
        if evaluation.uncond is None:
            return None, None
        size = uncond = working(evaluation.uncond.detach())
        gap = working(evaluation.denoised.detach()) - uncond
        if self.of != "latents":
            size, gap = (working(evaluation.x.detach()) - uncond) / evaluation.sigma, -gap / evaluation.sigma
        if self.of == "velocity":
            size, gap = size - uncond, gap * (1 + evaluation.sigma)
        power = pooled(size.square(), evaluation.mask, self.patch)
        return None, pooled(gap.square(), evaluation.mask, self.patch) / power.clamp_min(1e-12)
