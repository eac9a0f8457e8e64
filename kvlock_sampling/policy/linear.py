"""Linear policy:  lock = clamp(gain * risk, 0, 1),  cfg_scale = w0 * clamp(gain * risk, 0, b).

Range: lock in [0, 1], cfg_scale in [0, b * w0]. Source: KV-Lock (arXiv 2603.09657) with risk = variance / tau, gain = 1
and b = 2. A calm model (risk near 0) so gets a scale near 0, which is the unconditional prediction; the floor of 1 that
the lock puts under cfg_scale by default is what prevents that, and the `paper` preset is what asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..types import Control, Observation, PolicyError
from ._checks import flag, number
from ._math import worst
from .base import Policy


@dataclass(frozen=True)
class Linear(Policy):
    """The paper's rule: lock and guidance rise in proportion to risk.

    gain: > 0, lock per unit of risk. 1 locks fully at the threshold, 0.5 at twice the threshold.
    cfg_max: b >= 0, the largest multiple of the caller's guidance scale.
    schedule_cfg: False leaves guidance as the caller asked, and cfg_max unset.
    Raises PolicyError for settings out of range, and for a cfg_max that nothing would reach.
    """

    gain: float = 1.0
    cfg_max: float = 2.0
    schedule_cfg: bool = True

    def __post_init__(self) -> None:
        number(self, "gain", above=0.0)
        number(self, "cfg_max", at_least=0.0)
        flag(self, "schedule_cfg")
        if not self.schedule_cfg and self.cfg_max != Linear.cfg_max:
            raise PolicyError(
                f"Linear(cfg_max={self.cfg_max:g}, schedule_cfg=False): guidance is not scheduled, so nothing would be "
                f"limited. This works: Linear(gain={self.gain:g}, schedule_cfg=False)"
            )

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        drive = self.gain * obs.risk
        lock = drive.clamp(0.0, 1.0)
        if not self.schedule_cfg:
            return state, Control(lock, obs.cfg_scale)
        return state, Control(lock, obs.cfg_scale * worst(drive).clamp(0.0, self.cfg_max).to(obs.cfg_scale.dtype))
