"""Divergence: what the edit changes, and how firmly: its clean prediction against the source's at the same noise.

    delta_i = x0hat_i - x0hat_source_i           at noise level sigma_i, the source noised by the run's own noise
    w_i = exp(-log(sigma_i / sigma) / memory)    W = sum_i w_i,   W2 = sum_i w_i^2
    m = sum_i w_i delta_i / W                    effect = mean of m^2
    v = sum_i w_i (delta_i - m)^2 / (W - W2/W)   var = mean of v, unbiased for independent delta_i
elementwise, then the mean over masked elements or each token, divided by
    unit = mean of delta_i^2 inside the mask + variance of x0hat_source_i
the size of the edit and of the clip, so that no threshold depends on a model's latents. A change that stays along the
trajectory is an effect of the edit, one that comes and goes is not: effect / var is its signal-to-noise ratio. Range
>= 0, dimensionless. Source of the weighted sums: West 1979, Updating mean and variance estimates.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d

from ..types import SAME_SIGMA, Evaluation
from ..utils.fields import number
from ..utils.precision import working
from .base import Estimator, Patch, check_patch, masked_mean, on_grid


@dataclass(frozen=True)
class Divergence(Estimator):
    """Mean and variance, along the trajectory, of the edit's x0-hat minus the source's, relative to edit and clip.

    The variance is reported from the second noise level on; `obs.effect` is the squared mean. Where the lock evaluates
    the source, it costs nothing, else one function evaluation. Of a model that does its own guidance, the edit's x0-hat
    is guided, and the source's is a pass under its own prompt. Raises EstimatorError for a setting out of range.

    Args:
        memory: Fall in log sigma after which a prediction counts 1/e, > 0; inf counts all alike. Defaults to 1.
        patch: Latents per token along (time, height, width), to measure every token. Defaults to None, per clip.
    """

    memory: float = 1.0
    patch: Patch | None = None

    default_threshold = 0.001
    needs_source = True

    def __post_init__(self) -> None:
        check_patch(self)
        if not (isinstance(self.memory, float) and self.memory == math.inf):
            number(self, "memory", above=0.0)

    def init(self) -> tuple[Any, ...]:
        return ()  # then, for this noise level and the one before: sigma, W, W2, m, the pooled squares, the effect

    def step(self, state: tuple[Any, ...], evaluation: Evaluation) -> tuple[tuple[Any, ...], Tensor | None]:
        assert evaluation.source is not None  # a lock without a source is refused
        sigma, mask = evaluation.sigma, evaluation.mask
        source = working(evaluation.source.detach())
        delta = working(evaluation.denoised.detach()) - source
        unit = masked_mean(delta.square(), mask) + source.flatten(1).var(1, correction=0)
        unit = unit.clamp_min(1e-12).view(-1, *[1] * (self.patch is not None))
        if self.patch is not None:
            delta, mask = _background_of_tokens(delta, mask, self.patch), None
        # The prediction replaces one at nearly the same sigma, and those below.
        if not (above := tuple(entry for entry in state if entry[0] > sigma * (1 + SAME_SIGMA))):
            return ((sigma, 1.0, 1.0, delta, 0.0, self._pooled(delta, mask) / unit),), None
        before, weight, squares, mean, spread, _ = above[-1]
        decay = math.exp(-math.log(before / sigma) / self.memory)
        old = decay * weight
        new = 1 + old
        change = delta - mean
        moved = self._pooled(change, mask)
        # M2 / (W - W2 / W), divided through by the decay, which may be tiny on a coarse schedule.
        variance = (spread * new + moved * weight) / (2 * weight + decay * (weight**2 - squares))
        mean = mean + change / new
        effect = self._pooled(mean, mask) / unit
        entry = sigma, new, 1 + decay**2 * squares, mean, decay * spread + moved * (old / new), effect
        return (above[-1], entry), variance / unit

    def _pooled(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """The mean square, (batch,) over the mask, or (batch, tokens) over channels."""
        return masked_mean(values.square(), mask) if self.patch is None else values.square().mean(1).flatten(1)

    def effect(self, state: tuple[Any, ...]) -> Tensor | None:
        return state[-1][-1] if state else None


def _background_of_tokens(values: Tensor, mask: Tensor | None, patch: Patch) -> Tensor:
    """The mean over what is not edited of each token and its neighbours, (batch, channels, t, h, w) in tokens."""
    kept = torch.ones_like(values) if mask is None else (1 - working(mask)).expand_as(values)
    (values, size), kept = on_grid(values, patch), on_grid(kept, patch)[0][:, :1]

    def around(cells: Tensor) -> Tensor:
        means = avg_pool3d(cells, size)
        return avg_pool2d(means.flatten(1, 2), 3, stride=1, padding=1, count_include_pad=False).view_as(means)

    share = around(kept)
    return torch.where(share > 0, around(values * kept) / share.clamp_min(1e-12), around(values))
