"""What several policies share: the clock, and one guidance scale per clip."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from ..types import Observation

Range: TypeAlias = tuple[float, float]


def elapsed(previous: float | None, sigma: float) -> float:
    """Time since `previous` on the clock -log(sigma) of every policy, >= 0; 0 at the first step."""
    return 0.0 if previous is None else max(0.0, math.log(previous / sigma))


def worst(value: Tensor) -> Tensor:
    """The largest value of each clip, (batch, tokens) -> (batch,), because guidance has one scale per clip."""
    return value.amax(dim=tuple(range(1, value.ndim))) if value.ndim > 1 else value


def between(limits: Range, fraction: Tensor) -> Tensor:
    """limits[0] at fraction 0, limits[1] at fraction 1, never outside; `limits` may fall. Keeps shape and dtype."""
    low, high = limits
    return (low + (high - low) * fraction).clamp(min(limits), max(limits))


def scaled_cfg(obs: Observation, limits: Range, fraction: Tensor | float) -> Tensor | None:
    """The requested guidance scale times `between(limits, fraction)`, (batch,); None for limits (1, 1)."""
    if limits == (1.0, 1.0):
        return None
    requested = obs.requested_cfg_scale
    fraction = torch.as_tensor(fraction, device=requested.device)
    return requested * between(limits, worst(fraction)).to(requested.dtype)
