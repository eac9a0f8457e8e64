"""Constant policy:  lock = lock,  cfg_scale = cfg_scale,  composite = composite.  Nothing is measured.

Range: lock and composite in [0, 1]. Lock 0 is "off". Lock 1 takes background keys and values from the source at every
step, as KV-Edit does (Zhu et al. 2025, arXiv 2502.17363).
"""

from dataclasses import dataclass
from typing import Any

from ..types import Control, Observation
from ..utils.fields import number
from .base import Policy


@dataclass(frozen=True)
class Constant(Policy):
    """The same control at every evaluation, including the first. Raises PolicyError for a setting out of range.

    Args:
        lock: Fusion ratio in [0, 1]. Defaults to 0, which never locks.
        cfg_scale: Absolute guidance scale. Defaults to None, the requested scale.
        composite: Weight of the source in the background, in [0, 1]. Defaults to None, the lock's option.
    """

    lock: float = 0.0
    cfg_scale: float | None = None
    composite: float | None = None

    uses_risk = False

    def __post_init__(self) -> None:
        number(self, "lock", at_least=0.0, at_most=1.0)
        number(self, "cfg_scale", optional=True)
        number(self, "composite", at_least=0.0, at_most=1.0, optional=True)

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        return state, Control(self.lock, self.cfg_scale, self.composite)

    may_lock = property(lambda self: self.lock > 0.0)
