"""Sigmoid policy:  s = 1 / (1 + exp(-(log risk - log centre) / width)),  lock = lo + (hi - lo) * s.

cfg_scale = w0 * (c_lo + (c_hi - c_lo) * s). Range: s in [0, 1] for every risk in [0, inf]. The logistic curve in log
risk is the Hill curve risk^n / (centre^n + risk^n) with n = 1 / width (Hill 1910).
"""

import math
from dataclasses import dataclass
from typing import Any

from ..types import Control, Observation
from ..utils.fields import number, pair
from ..utils.precision import working
from .base import Policy, Range, between, scaled_cfg


@dataclass(frozen=True)
class Sigmoid(Policy):
    """A soft threshold without memory. Raises PolicyError for a setting out of range.

    Args:
        centre: Risk > 0 at which the curve is half way. Defaults to 1, the calibrated threshold.
        width: Width in log risk, > 0: from 27% to 73% of the way risk rises by exp(2 * width). Defaults to 0.5.
        lock_range: Lock (at risk 0, at risk inf), within [0, 1]. Defaults to (0, 1).
        cfg_range: Multiple of the requested guidance scale (at risk 0, at risk inf), >= 0. Defaults to (1, 1).
    """

    centre: float = 1.0
    width: float = 0.5
    lock_range: Range = (0.0, 1.0)
    cfg_range: Range = (1.0, 1.0)

    def __post_init__(self) -> None:
        number(self, "centre", "width", above=0.0)
        pair(self, "lock_range", at_least=0.0, at_most=1.0)
        pair(self, "cfg_range", at_least=0.0, rising=False)

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        distance = (working(obs.risk).log() - math.log(self.centre)) / self.width
        # torch.sigmoid would not do: on CPU its last bit depends on the position of a value in its batch.
        s = 1.0 / (1.0 + (-distance).exp())
        return state, Control(between(self.lock_range, s).to(obs.risk.dtype), scaled_cfg(obs, self.cfg_range, s))

    may_lock = property(lambda self: self.lock_range[1] > 0.0)
