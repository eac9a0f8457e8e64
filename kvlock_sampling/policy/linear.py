"""Linear policy:  lock = clamp(gain * risk, 0, 1),  cfg_scale = w0 * clamp(gain * risk, 0, cfg_max).

Range: lock in [0, 1], cfg_scale in [0, cfg_max * w0]. Source: KV-Lock (arXiv 2603.09657) with risk = variance / tau,
gain = 1 and cfg_max = 2. KVLock's `cfg_floor` of 1 keeps a calm model from the unconditional prediction.
"""

from dataclasses import dataclass
from typing import Any

from ..types import Control, Observation
from ..utils.fields import number
from .base import Policy, worst


@dataclass(frozen=True)
class Linear(Policy):
    """The paper's rule: lock and guidance rise in proportion to risk. Raises PolicyError for a setting out of range.

    Args:
        gain: Lock per unit of risk, > 0. Defaults to 1, which locks fully at the threshold.
        cfg_max: Largest multiple of the requested scale, >= 0. None leaves guidance as requested. Defaults to 2.
    """

    gain: float = 1.0
    cfg_max: float | None = 2.0

    def __post_init__(self) -> None:
        number(self, "gain", above=0.0)
        number(self, "cfg_max", at_least=0.0, optional=True)

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        drive, scale = self.gain * obs.risk, None
        if self.cfg_max is not None:
            requested = obs.requested_cfg_scale
            scale = requested * worst(drive).clamp(0.0, self.cfg_max).to(requested.dtype)
        return state, Control(drive.clamp(0.0, 1.0), scale)
