"""Threshold policy:  locked once risk > on, free again once risk < off.

lock = `locked` or `free`; cfg_scale = w0 * cfg_alarm or w0 * cfg_calm. Range: lock in [0, 1], cfg_scale / w0 >= 0.
The gap between `on` and `off` keeps a noisy signal from switching at every step: a Schmitt trigger (Schmitt 1938).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Control, Observation, PolicyError
from ..utils.fields import number
from .base import Policy, scaled_cfg


@dataclass(frozen=True)
class Threshold(Policy):
    """All or nothing, with hysteresis.

    Its state is bool, shaped like `obs.risk`: which clips are locked. Raises PolicyError for a setting out of range.

    Args:
        on: Risk > 0 above which a clip (or token) locks. Defaults to 1, the calibrated threshold.
        off: Risk in [0, on] below which it is free again. Defaults to 0.7.
        locked: Lock while locked, in [0, 1]. Defaults to 1.
        free: Lock while free, in [0, 1]. Defaults to 0.
        cfg_calm: Multiple of the requested guidance scale while free, >= 0. Defaults to 1.
        cfg_alarm: Multiple of the requested guidance scale while any token of a clip is locked, >= 0. Defaults to 1.
    """

    on: float = 1.0
    off: float = 0.7
    locked: float = 1.0
    free: float = 0.0
    cfg_calm: float = 1.0
    cfg_alarm: float = 1.0

    def __post_init__(self) -> None:
        number(self, "on", above=0.0)
        number(self, "off", "cfg_calm", "cfg_alarm", at_least=0.0)
        number(self, "locked", "free", at_least=0.0, at_most=1.0)
        if self.off > self.on:
            works = f"Threshold(on={self.on:g}, off={0.7 * self.on:g})"
            raise PolicyError(f"on={self.on:g}, off={self.off:g}: off must be below on. This works: {works}")

    def step(self, state: Tensor | None, obs: Observation) -> tuple[Tensor, Control]:
        calm = obs.risk < self.off
        alarm = obs.risk > self.on
        held = alarm if state is None else alarm | (state & ~calm)
        lock = torch.full_like(obs.risk, self.free).masked_fill(held, self.locked)
        alarmed = held.to(obs.requested_cfg_scale.dtype)
        return held, Control(lock, scaled_cfg(obs, (self.cfg_calm, self.cfg_alarm), alarmed))

    may_lock = property(lambda self: max(self.locked, self.free) > 0.0)
