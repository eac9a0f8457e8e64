"""Threshold policy:  locked once risk > on, free again only once risk < off.

lock = `locked` or `free`; cfg_scale = w0 * cfg_alarm or w0 * cfg_calm. Range: lock in [0, 1], cfg_scale / w0 >= 0.
The gap between `on` and `off` keeps a noisy signal from switching at every step: a Schmitt trigger (Schmitt 1938,
"A thermionic trigger", J. Sci. Instrum. 15).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Control, Observation, PolicyError
from ._checks import number
from ._math import scaled_cfg
from .base import Policy


@dataclass(frozen=True)
class Threshold(Policy):
    """All or nothing, with hysteresis. State: who is locked, a bool tensor like `obs.risk`; None = nobody yet.

    on: risk > 0 above which a clip (or token) locks. 1 = at the calibrated threshold.
    off: risk in [0, on] below which it lets go.
    locked, free: the two locks, in [0, 1].
    cfg_calm, cfg_alarm: the two multiples of the caller's guidance scale, >= 0. A clip is alarmed if any token is.
    Raises PolicyError for settings out of range, or `off` above `on`.
    """

    on: float = 1.0
    off: float = 0.7
    locked: float = 1.0
    free: float = 0.0
    cfg_calm: float = 1.0
    cfg_alarm: float = 1.0

    def __post_init__(self) -> None:
        number(self, "on", above=0.0)
        number(self, "off", at_least=0.0)
        for name in ("locked", "free"):
            number(self, name, at_least=0.0, at_most=1.0)
        for name in ("cfg_calm", "cfg_alarm"):
            number(self, name, at_least=0.0)
        if self.off > self.on:
            raise PolicyError(
                f"Threshold(on={self.on:g}, off={self.off:g}): off must be below on, or a clip would lock and let go "
                f"at once. This works: Threshold(on={self.on:g}, off={0.7 * self.on:g})"
            )

    def step(self, state: Tensor | None, obs: Observation) -> tuple[Tensor, Control]:
        calm = obs.risk < self.off
        alarm = obs.risk > self.on
        held = alarm if state is None else alarm | (state & ~calm)
        lock = torch.full_like(obs.risk, self.free).masked_fill(held, self.locked)
        return held, Control(lock, scaled_cfg(obs, (self.cfg_calm, self.cfg_alarm), held.to(obs.cfg_scale.dtype)))

    def start(self, obs: Observation) -> Control:
        """Free and calm: nothing has been measured that could alarm."""
        return Control(self.free, scaled_cfg(obs, (self.cfg_calm, self.cfg_alarm), 0.0))

    @property
    def never_locks(self) -> bool:
        return self.locked == self.free == 0.0
