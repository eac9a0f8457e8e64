"""Relative: the edit's variance in units of the background's, so that a run calibrates itself.

    var = mean of the inner variance over the edited region / quantile of it over the background's tokens
Compositing holds the background to the source, so nothing can go wrong there: how much the prediction still moves in
the background is what a calm prediction does in this run, under this sampler and schedule, at this noise level. Longer
steps, another deterministic solver and another scale of the latents move both regions alike and cancel; the content of
the two regions does not, and renewed noise only in part (benchmarks/transfer.py). Dimensionless, range >= 0. Cost: the
inner estimator's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import EstimatorError, Evaluation
from ..utils.precision import working
from .base import Patch, pooled
from .wrappers import EstimatorWrapper


@dataclass(frozen=True)
class Relative(EstimatorWrapper):
    """An inner estimator's variance inside the mask over its quantile outside, per clip.

    The reference is as good as the background: without compositing it is only the rest of the clip. The state is the
    inner state, and the edited fraction of every token, None before the first evaluation.

    Args:
        estimator: An estimator that measures every token: Relative(TrajectoryVariance(patch=(1, 2, 2))).
        quantile: Quantile of the background's tokens, in [0, 1]. It is high because the edit is content and most of a
            background is not: under renewed noise flat tokens move far more than without, and tokens with content come
            closest to keeping in step. 0.5 compares with the typical token. Tokens that the mask's edge crosses are no
            reference. Defaults to 0.96.
        local: Whether every token has its own ratio, (batch, tokens), instead of one value per clip. Defaults to False.

    Raises:
        EstimatorError: An inner estimator that does not measure tokens; in a run, a clip without a background token.
    """

    quantile: float = 0.96
    local: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator.patch is None:
            raise EstimatorError(
                f"Relative needs a value for every token, and {self.estimator!r} gives one value per clip.\n"
                "  Name the model's patch: Relative(TrajectoryVariance(window=None, span=8.0, normalise=True, "
                "patch=(1, 2, 2)))."
            )
        if not 0 <= self.quantile <= 1:
            raise EstimatorError(f"quantile={self.quantile}; expected a fraction in [0, 1]. Try quantile=0.96.")

    @property
    def default_threshold(self) -> float:  # type: ignore[override]
        return 4.5  # what 95% of calm measurements of the embedded model stay below, at the default quantile

    @property
    def needs_background(self) -> bool:  # type: ignore[override]
        return True

    @property
    def patch(self) -> Patch | None:  # type: ignore[override]
        return self.estimator.patch if self.local else None

    def init(self) -> tuple[Any, Tensor | None]:
        return self.estimator.init(), None

    def step(self, state: tuple[Any, Tensor | None], evaluation: Evaluation) -> tuple[Any, Tensor | None]:
        inner, edited = state
        edited = self._edited(evaluation) if edited is None else edited
        inner, variance = self.estimator.step(inner, evaluation)
        if variance is None:
            return (inner, edited), None
        if variance.shape != edited.shape:
            raise EstimatorError(
                f"{self.estimator!r} returned a variance of shape {tuple(variance.shape)}; Relative expected one for "
                f"every token of its patch, {tuple(edited.shape)}."
            )
        background = torch.where(edited > 0, torch.nan, variance)
        # The clamp keeps risk finite over flat content, whose variance may be exactly 0 in float16.
        reference = background.nanquantile(self.quantile, dim=1, keepdim=True).clamp_min(1e-12)
        if not self.local:
            variance = (variance * edited).sum(1, keepdim=True) / edited.sum(1, keepdim=True).clamp_min(1e-12)
        ratio = variance / reference
        return (inner, edited), ratio if self.local else ratio.squeeze(1)

    def _edited(self, evaluation: Evaluation) -> Tensor:
        """The edited fraction of every token. Computed once per run, because the check reads from the device."""
        if evaluation.mask is None:
            raise EstimatorError(
                "Relative measures the edit in units of the background, and there is no mask, so no background.\n"
                f"  Give KVLock(..., mask=...), or the estimator by itself: estimator={self.estimator!r}."
            )
        mask = torch.broadcast_to(working(evaluation.mask), evaluation.denoised.shape)
        edited = pooled(mask, None, self.estimator.patch)
        full = (edited > 0).all(1).nonzero().flatten().tolist()
        if full:
            raise EstimatorError(
                f"the mask of clip {', '.join(map(str, full))} touches every one of {edited.shape[1]} tokens; Relative "
                "expected some background to compare with.\n"
                f"  Shrink the mask, or take the estimator by itself: estimator={self.estimator!r}."
            )
        return edited
