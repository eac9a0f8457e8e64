"""Sigmoid policy:  s = 1 / (1 + exp(-(log risk - log centre) / width)),  lock = lo + (hi - lo) * s.

cfg_scale = w0 * (c_lo + (c_hi - c_lo) * s). Range: s in [0, 1] for every risk in [0, inf]. The logistic curve in log
risk is the Hill curve risk^n / (centre^n + risk^n) with n = 1 / width (Hill 1910). Variance errs by factors, so a
policy that acts on its logarithm treats "twice too high" and "twice too low" alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..types import Control, Observation
from ._checks import Range, number, pair
from ._math import between, scaled_cfg, working
from .base import Policy


@dataclass(frozen=True)
class Sigmoid(Policy):
    """A soft threshold without memory.

    centre: risk > 0 at which the curve is half way. 1 = at the calibrated threshold.
    width: > 0, in units of log risk: from 27% to 73% of the way takes a factor exp(2 * width) of risk.
    lock_range: lock (at risk 0, at risk inf), within [0, 1].
    cfg_range: multiple of the caller's guidance scale (at risk 0, at risk inf), >= 0; may fall. (1, 1) leaves it alone.
    Raises PolicyError for settings out of range.
    """

    centre: float = 1.0
    width: float = 0.5
    lock_range: Range = (0.0, 1.0)
    cfg_range: Range = (1.0, 1.0)

    def __post_init__(self) -> None:
        number(self, "centre", above=0.0)
        number(self, "width", above=0.0)
        pair(self, "lock_range", at_least=0.0, at_most=1.0)
        pair(self, "cfg_range", at_least=0.0, rising=False)

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        distance = (working(obs.risk).log() - math.log(self.centre)) / self.width
        # Not torch.sigmoid: on CPU its last bit depends on where in a batch a value stands.
        s = 1.0 / (1.0 + (-distance).exp())
        lock = between(self.lock_range, s).to(obs.risk.dtype)
        return state, Control(lock, scaled_cfg(obs, self.cfg_range, s))

    def start(self, obs: Observation) -> Control:
        """The calm end of both ranges."""
        return Control(self.lock_range[0], scaled_cfg(obs, self.cfg_range, 0.0))

    @property
    def never_locks(self) -> bool:
        return self.lock_range[1] == 0.0
