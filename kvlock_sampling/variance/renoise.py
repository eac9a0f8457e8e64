"""Renoise variance: how far the clean prediction moves when it is noised again and predicted again.

    var = mean_k |D(x0hat + sigma e_k, sigma) - x0hat|^2,  e_k fresh unit noise, the same sigma, k = 1..passes
Around its own mean instead of x0hat it is the sample variance of stochastic passes.
Source: denoising score matching as a local dimension, arXiv 2605.05026; SCIENCE 1.3 measures one draw near perfect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..types import EstimatorError, Evaluation
from ..utils.precision import working
from ._noise import check_seeds, copies, draw
from .base import Estimator, Patch, check_patch, pooled


@dataclass(frozen=True)
class RenoiseVariance(Estimator):
    """Variance over stochastic passes, in latent units squared. Costs `passes` evaluations of the conditional model.

    passes: fresh noises per measurement, >= 1, evaluated as one batch.
    around: "prediction" measures from x0-hat (one pass is enough, and a consistent bias counts);
        "mean" is the sample variance between passes (at least two).
    seed: of the noise. Every clip of a batch gets the same noise, so that a clip alone and in a batch agree.
    seeds: in place of `seed`, one for each clip.
    region_only: the noise goes inside the mask only. Outside the model sees the edit's own present latents, as the
        sampler left them, so that what is measured is the foreground's doubt in its given surroundings.
    patch: latents per token along (time, height, width): measure every token, (batch, tokens). None: one per clip.

    Raises:
        EstimatorError: settings out of range, both kinds of seed; in a run, seeds for another number of clips.
    """

    passes: int = 2
    around: Literal["prediction", "mean"] = "prediction"
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    region_only: bool = False
    patch: Patch | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", check_patch(self.patch))
        if self.seeds is not None:
            object.__setattr__(self, "seeds", tuple(self.seeds))
        check_seeds(self.seed, self.seeds)
        if self.around not in ("prediction", "mean"):
            raise EstimatorError(f'around={self.around!r}; expected "prediction" or "mean".')
        if self.passes < (2 if self.around == "mean" else 1):
            raise EstimatorError(f"passes={self.passes} with around={self.around!r}; a spread needs 2 passes or more.")

    @property
    def cost(self) -> float:  # type: ignore[override]
        """Extra evaluations per clip and measurement."""
        return float(self.passes)

    @property
    def default_threshold(self) -> float:  # type: ignore[override]
        """What calm clips of the embedded model reach."""
        return 0.01

    def init(self) -> int:
        """State: how many measurements were made. It seeds the next noise, so that a rewound run repeats itself."""
        return 0

    def step(self, state: int, evaluation: Evaluation) -> tuple[int, Tensor | None]:
        """Noise x0-hat again, predict again, and compare."""
        denoised, sigma, mask = evaluation.denoised.detach(), evaluation.sigma, evaluation.mask
        noise = draw("normal", self.passes, denoised, state, self.seed, self.seeds).to(denoised.dtype)
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
