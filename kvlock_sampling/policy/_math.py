"""Arithmetic that several policies share: their clock, their precision, one guidance scale per clip, ranges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import Observation
from ._checks import Range


def elapsed(previous: float | None, sigma: float) -> float:
    """Time on every policy's clock, -log(sigma): how far sigma fell since `previous`; 0 at first, never < 0."""
    return 0.0 if previous is None else max(0.0, math.log(previous / sigma))


def working(value: Tensor) -> Tensor:
    """At least float32: memory kept in half precision would lose small steps."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def worst(value: Tensor) -> Tensor:
    """(batch, tokens) -> (batch,): guidance has one scale per clip, and its worst token speaks for the clip."""
    return value.amax(dim=tuple(range(1, value.ndim))) if value.ndim > 1 else value


def between(limits: Range, fraction: Tensor) -> Tensor:
    """limits[0] at fraction 0, limits[1] at fraction 1, never outside; `limits` may fall. Keeps shape and dtype."""
    low, high = limits
    return (low + (high - low) * fraction).clamp(min(limits), max(limits))


def scaled_cfg(obs: Observation, limits: Range, fraction: Tensor | float) -> Tensor:
    """The caller's guidance scale times `between(limits, fraction)`, (batch,); of tokens the largest fraction counts.

    With limits (1, 1) it is the caller's own tensor, the same object: how the lock knows that nothing was scheduled.
    """
    if limits == (1.0, 1.0):
        return obs.cfg_scale
    fraction = torch.as_tensor(fraction, device=obs.cfg_scale.device)
    return obs.cfg_scale * between(limits, worst(fraction)).to(obs.cfg_scale.dtype)
