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

from ..precision import working
from ..types import Evaluation
from .base import Estimator, masked_mean


@dataclass(frozen=True)
class RenoiseVariance(Estimator):
    """Variance over stochastic passes, in latent units squared. Costs `passes` evaluations of the conditional model.

    passes: fresh noises per measurement, evaluated as one batch.
    around: "prediction" measures from x0-hat (one pass is enough, and a consistent bias counts);
        "mean" is the sample variance between passes (at least two).
    seed: of the noise. Every clip of a batch gets the same noise, so that a clip alone and in a batch agree;
        `seeds` gives each clip its own.
    """

    passes: int = 2
    around: Literal["prediction", "mean"] = "prediction"
    seed: int = 0
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.around not in ("prediction", "mean"):
            raise ValueError(f'around={self.around!r}; expected "prediction" or "mean".')
        if self.passes < (2 if self.around == "mean" else 1):
            raise ValueError(f"passes={self.passes} with around={self.around!r}; a spread needs 2 passes or more.")

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
        denoised, sigma = evaluation.denoised.detach(), evaluation.sigma
        noise = self._noise(state, denoised)
        again = evaluation.probe(denoised.repeat(self.passes, *[1] * (denoised.ndim - 1)) + sigma * noise, sigma)
        spread = working(again).unflatten(0, (self.passes, len(denoised)))
        if self.around == "mean":
            squares = spread.var(dim=0, correction=1)
        else:
            squares = (spread - working(denoised)).square().mean(0)
        return state + 1, masked_mean(squares, evaluation.mask)

    def _noise(self, count: int, like: Tensor) -> Tensor:
        clips = len(like)
        seeds = self.seeds if self.seeds is not None else (self.seed,)
        if self.seeds is not None and len(seeds) != clips:
            raise ValueError(f"seeds has {len(seeds)} entries for a batch of {clips} clips; give one per clip.")
        draws = []
        for seed in seeds:
            generator = torch.Generator(like.device).manual_seed((seed * 1_000_003 + count) % 2**63)
            shape = (self.passes, 1, *like.shape[1:])
            draws.append(torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32))
        noise = torch.cat(draws, dim=1).expand(self.passes, clips, *like.shape[1:])
        return noise.reshape(self.passes * clips, *like.shape[1:]).to(like.dtype)
