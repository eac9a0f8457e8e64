"""Relative: the edit's variance in units of the background's, so that a run calibrates itself.

    var = mean of the inner variance over the edited region / quantile of it over the background's tokens
Compositing holds the background to the source, so it moves as a calm prediction does in this run, at this noise level.
Longer steps, another deterministic solver and another scale of the latents cancel; renewed noise cancels only in part,
and the content of the two regions not at all (benchmarks/transfer.py). Dimensionless, range >= 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import EstimatorError, Evaluation
from ..utils.fields import number
from ..utils.precision import working
from .base import pooled
from .wrappers import EstimatorWrapper


@dataclass(frozen=True)
class Relative(EstimatorWrapper):
    """An inner estimator's variance inside the mask over its quantile outside, per clip.

    Args:
        estimator: An estimator that measures every token: Relative(TrajectoryVariance(patch=(1, 2, 2))).
        quantile: Quantile in [0, 1] of the tokens entirely in the background; 0.5 compares with the typical token.
            Defaults to 0.96, because the edit is content, and most tokens of a background are flat.

    Raises:
        EstimatorError: An inner estimator that does not measure tokens; in a run, a clip without a background token.
    """

    quantile: float = 0.96

    default_threshold = 4.5
    """What 95% of calm measurements of the embedded model stay below, at the default quantile."""
    needs_background = True
    patch = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator.patch is None:
            raise EstimatorError(
                f"Relative needs a value for every token, and {self.estimator!r} gives one value per clip. Name the "
                "model's patch: Relative(TrajectoryVariance(window=None, span=8.0, normalise=True, patch=(1, 2, 2)))."
            )
        number(self, "quantile", at_least=0.0, at_most=1.0)

    def init(self) -> tuple[Any, Tensor | None, Tensor | None]:
        return self.estimator.init(), None, None

    def step(self, state: Any, evaluation: Evaluation) -> tuple[Any, Tensor | None]:
        inner, edited, reference = state
        edited = self._edited(evaluation) if edited is None else edited
        inner, variance = self.estimator.step(inner, evaluation)
        if variance is None:
            return (inner, edited, reference), None
        if variance.shape != edited.shape:
            raise EstimatorError(
                f"{self.estimator!r} returned a variance of shape {tuple(variance.shape)}; Relative expected one per "
                f"token, {tuple(edited.shape)}."
            )
        background = torch.where(edited > 0, torch.nan, variance)
        # The clamp keeps risk finite over flat content, whose variance may be exactly 0 in float16.
        reference = background.nanquantile(self.quantile, dim=1).clamp_min(1e-12)
        return (state := (inner, edited, reference)), self._inside(variance, state)

    def effect(self, state: Any) -> Tensor | None:
        found = self.estimator.effect(state[0])
        return None if found is None or state[2] is None else self._inside(found, state)

    @staticmethod
    def _inside(values: Tensor, state: Any) -> Tensor:
        """The mean over the edited region, in units of the background's variance."""
        _, edited, reference = state
        return (values * edited).sum(1) / edited.sum(1).clamp_min(1e-12) / reference

    def _edited(self, evaluation: Evaluation) -> Tensor:
        """The edited fraction of every token. Computed once per run, because the check reads from the device."""
        if evaluation.mask is None:
            raise EstimatorError(
                "Relative expected a background, and there is no mask. Give KVLock(..., mask=...), or the estimator by "
                f"itself: estimator={self.estimator!r}."
            )
        mask = torch.broadcast_to(working(evaluation.mask), evaluation.denoised.shape)
        edited = pooled(mask, None, self.estimator.patch)
        if full := (edited > 0).all(1).nonzero().flatten().tolist():
            clips = ", ".join(map(str, full))
            raise EstimatorError(
                f"the mask of clip {clips} touches every one of {edited.shape[1]} tokens; expected some background. "
                f"Shrink the mask, or take the estimator by itself: estimator={self.estimator!r}."
            )
        return edited
