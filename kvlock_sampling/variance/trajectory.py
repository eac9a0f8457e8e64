"""Trajectory variance: how much the clean prediction still moves, at no extra evaluation.

Paper form (KV-Lock, arXiv 2603.09657; Aithal et al., arXiv 2406.09358):
    var = 1 / (W - 1) * sum_i (x0hat_i - mean)^2  over the last W predictions, then the mean over masked elements.
Normalised form: sum over the window of |x0hat_k - x0hat_(k-1)|^2 / sigma_k^2.
Integral form: sum of |x0hat_k - x0hat_(k-1)|^2 / (sigma_k sigma_(k-1) h_k) with h_k = log(sigma_(k-1) / sigma_k), which
converges to the integral of |d x0hat / d log sigma|^2 / sigma^2 over log sigma, to second order in h.

Under a deterministic sampler of n steps the plain sum falls as 1/n, and the integral does not depend on n. Under a
stochastic sampler moves grow as sqrt(h), and the plain sum does not depend on n. Cost: none. Range >= 0.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import SAME_SIGMA, EstimatorError, Evaluation
from ..utils.fields import flag, number
from ..utils.precision import working
from .base import Estimator, Patch, check_patch, pooled


class Entry(NamedTuple):
    """A noise level, the prediction (None once only its move is needed), and the normalised move to it."""

    sigma: float
    denoised: Tensor | None
    move: Tensor | None


@dataclass(frozen=True)
class TrajectoryVariance(Estimator):
    """Variance of x0-hat along the trajectory. Raises EstimatorError for a setting out of range.

    Args:
        window: Number of predictions at different sigmas to keep, >= 2; None for no limit. Defaults to 10.
        span: Keep predictions at sigmas up to `span` > 1 times the present one, and always the one before; the same
            window for any number of steps and any sampler. Defaults to None, no limit.
        normalise: True for the normalised form, dimensionless; False, the default, for the paper's.
        integral: With `normalise`, the integral form: for deterministic samplers. Defaults to False.
        patch: Latents per token along (time, height, width), to measure every token. Defaults to None, per clip.
    """

    window: int | None = 10
    span: float | None = None
    normalise: bool = False
    integral: bool = False
    patch: Patch | None = None

    def __post_init__(self) -> None:
        check_patch(self)
        number(self, "window", at_least=2, whole=True, optional=True)
        number(self, "span", above=1.0, optional=True)
        flag(self, "normalise", "integral")
        if self.window is None and self.span is None and not self.normalise:
            raise EstimatorError("the paper's variance needs a window. Try window=10, span=8.0, or normalise=True.")
        if self.integral and not self.normalise:
            raise EstimatorError("integral=True is a form of the normalised sum. Try normalise=True, integral=True.")

    # Calm clips of the embedded model; the paper's.
    default_threshold = property(lambda self: 0.02 if self.normalise else 0.01)

    def init(self) -> tuple[Entry, ...]:
        return ()

    def step(self, state: tuple[Entry, ...], evaluation: Evaluation) -> tuple[tuple[Entry, ...], Tensor | None]:
        sigma, denoised = evaluation.sigma, evaluation.denoised.detach()
        # The prediction replaces an entry at nearly the same sigma, and those below.
        kept = [e for e in state if e.sigma > sigma * (1 + SAME_SIGMA)]
        move = None
        if kept and self.normalise:
            above, before = kept[-1].sigma, kept[-1].denoised
            assert before is not None
            scale = sigma * above * math.log(above / sigma) if self.integral else sigma**2
            move = pooled((working(denoised) - working(before)).square(), evaluation.mask, self.patch) / scale
            # Of older predictions only the moves are needed, so a long window costs no memory.
            kept[:-1] = [e._replace(denoised=None) for e in kept[:-1]]
        kept.append(Entry(sigma, denoised, move))
        if self.span is not None:
            inside = [e for e in kept if e.sigma <= sigma * self.span * (1 + SAME_SIGMA)]
            kept = inside if len(inside) > 1 else kept[-2:]  # on a coarse schedule one step may span more
        if self.window is not None:
            kept = kept[-self.window :]
        if len(kept) < 2:
            return tuple(kept), None
        if self.normalise:
            return tuple(kept), torch.stack([e.move for e in kept[1:] if e.move is not None]).sum(0)
        predictions = torch.stack([working(e.denoised) for e in kept if e.denoised is not None])
        return tuple(kept), pooled(predictions.var(dim=0, correction=1), evaluation.mask, self.patch)
