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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import EstimatorError, Evaluation
from ..utils.precision import working
from .base import Estimator, Patch, pooled
from .wrappers import EstimatorWrapper


class RelativeState(NamedTuple):
    """The inner state and, from the first evaluation on, the edited fraction of every token, (batch, tokens)."""

    inner: Any
    edited: Tensor | None = None


@dataclass(frozen=True)
class Relative(EstimatorWrapper):
    """An inner estimator's variance inside the mask over its quantile outside, per clip.

    The reference is as good as the background: without compositing, or with a background that was never right, it is
    only the rest of the clip.

    Args:
        estimator: An estimator that measures every token: Relative(TrajectoryVariance(patch=(1, 2, 2))).
        quantile: Quantile of the background's tokens, in [0, 1]. It is high because the edit is content and most of a
            background is not: under renewed noise flat tokens move far more than without, and tokens with content come
            closest to keeping in step. 0.5 compares with the typical token. Tokens that the mask's edge crosses are no
            reference. Defaults to 0.96.
        local: Whether every token has its own ratio, (batch, tokens), instead of one value per clip. Defaults to False.

    Raises:
        EstimatorError: An inner estimator that does not measure tokens, or a quantile out of range; in a run, a clip
            without a background token.
    """

    quantile: float = 0.96
    local: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        patch_of(self.estimator)
        if not 0 <= self.quantile <= 1:
            raise EstimatorError(f"quantile={self.quantile}; expected a fraction in [0, 1]. Try quantile=0.96.")

    @property
    def default_threshold(self) -> float:  # type: ignore[override]
        """What 95% of calm measurements of the embedded model stay below, at the default quantile."""
        return 4.5

    @property
    def needs_background(self) -> bool:  # type: ignore[override]
        return True

    def init(self) -> RelativeState:
        """Return the inner estimator's state; the mask is not known yet."""
        return RelativeState(self.estimator.init())

    def step(self, state: RelativeState, evaluation: Evaluation) -> tuple[RelativeState, Tensor | None]:
        """Divide the inner variance by that of its own background."""
        edited = state.edited
        if edited is None:
            edited = self._edited(evaluation)
        inner, variance = self.estimator.step(state.inner, evaluation)
        if variance is None:
            return RelativeState(inner, edited), None
        if variance.shape != edited.shape:
            raise EstimatorError(
                f"{self.estimator!r} returned a variance of shape {tuple(variance.shape)}; Relative expected one for "
                f"every token of its patch, {tuple(edited.shape)}."
            )
        background = torch.where(edited > 0, torch.nan, variance)
        # The clamp keeps risk finite over flat content, whose variance may be exactly 0 in float16.
        reference = background.nanquantile(self.quantile, dim=1, keepdim=True).clamp_min(1e-12)
        if self.local:
            return RelativeState(inner, edited), variance / reference
        region = (variance * edited).sum(1) / edited.sum(1).clamp_min(1e-12)
        return RelativeState(inner, edited), region / reference.squeeze(1)

    def _edited(self, evaluation: Evaluation) -> Tensor:
        """The edited fraction of every token. Computed once per run, because the check reads from the device."""
        if evaluation.mask is None:
            raise EstimatorError(
                "Relative measures the edit in units of the background, and there is no mask, so no background.\n"
                f"  Give KVLock(..., mask=...), or the estimator by itself: estimator={self.estimator!r}."
            )
        mask = torch.broadcast_to(working(evaluation.mask), evaluation.denoised.shape)
        edited = pooled(mask, None, patch_of(self.estimator))
        full = (edited > 0).all(1).nonzero().flatten().tolist()
        if full:
            raise EstimatorError(
                f"the mask of clip {', '.join(map(str, full))} touches every one of {edited.shape[1]} tokens; Relative "
                "expected some background to compare with.\n"
                f"  Shrink the mask, or take the estimator by itself: estimator={self.estimator!r}."
            )
        return edited


def patch_of(estimator: Estimator) -> Patch:
    """Return the one patch of an estimator and those inside it, or raise EstimatorError."""
    inside = [estimator]
    found = set()
    while inside:
        part = inside.pop()
        if getattr(part, "patch", None) is not None:
            found.add(part.patch)  # type: ignore[attr-defined]
        inside += [part.estimator] if isinstance(part, EstimatorWrapper) else list(getattr(part, "estimators", ()))
    if len(found) != 1:
        what = "gives one value per clip" if not found else f"has patches {', '.join(map(str, sorted(found)))}"
        raise EstimatorError(
            f"Relative needs a value for every token, and {estimator!r} {what}.\n"
            "  Name the model's patch: Relative(TrajectoryVariance(window=None, span=8.0, normalise=True, "
            "patch=(1, 2, 2)))."
        )
    return found.pop()
