"""Release: keep the source where the edit changes nothing firmly, and let go where it does.

    sigma > below:   composite = 1,                    lock = lock, or 0 if not early
    sigma <= below:  composite = 0 if effect > max(1, snr * risk) else 1,
                     lock = lock * min(1, firm / effect), or 0 if not early and nothing of the clip is released
`effect` is the squared mean of the edit's change over the trajectory, and `risk` its variance (`Divergence`), in units
of the threshold. So a hallucination, which comes and goes, is composited and locked, and an effect, which stays, is let
go, token by token. What is let go keeps the lock, its hold on the background's context, and loses it only as the edit
insists. Range: lock and composite in [0, 1]. Source: KV-Lock (arXiv 2603.09657) for locking by variance.
"""

from dataclasses import dataclass
from typing import Any

from ..types import Control, Observation
from ..utils.fields import flag, number
from .base import Policy


@dataclass(frozen=True)
class ReleaseBelow(Policy):
    """Composited at sigma > below, then free under the same lock. Nothing is measured.
    Raises PolicyError for a setting out of range.

    Args:
        below: Noise level > 0 from which on the background is free. Defaults to 3.
        lock: Fusion ratio in [0, 1], throughout. Defaults to 0.5.
    """

    below: float = 3.0
    lock: float = 0.5

    uses_risk = False

    def __post_init__(self) -> None:
        number(self, "below", above=0.0)
        number(self, "lock", at_least=0.0, at_most=1.0)

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        return state, Control(self.lock, composite=1.0 if obs.sigma > self.below else 0.0)

    may_lock = property(lambda self: self.lock > 0.0)


@dataclass(frozen=True)
class Release(Policy):
    """Composited and locked, except where the edit's own change is firm. It needs an estimator that measures `effect`.
    Raises PolicyError for a setting out of range.

    Args:
        below: Noise level > 0 from which on anything may be released. Defaults to 3.
        lock: Fusion ratio in [0, 1] of what is kept. Defaults to 0.75.
        firm: Effect >= 1, in thresholds, at which the lock begins to weaken. Defaults to 4.
        snr: Effect over risk, >= 0, above which a change is firm: its signal-to-noise ratio. Defaults to 4.
        early: Whether to lock from the first evaluation on, or while a clip has released tokens. Defaults to True.
    """

    below: float = 3.0
    lock: float = 0.75
    firm: float = 4.0
    snr: float = 4.0
    early: bool = True

    def __post_init__(self) -> None:
        number(self, "below", above=0.0)
        number(self, "lock", at_least=0.0, at_most=1.0)
        number(self, "firm", at_least=1.0)
        number(self, "snr", at_least=0.0)
        flag(self, "early")

    def start(self, obs: Observation) -> Control:
        return Control(self.lock * self.early, composite=1.0)

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        if obs.sigma > self.below:
            return state, self.start(obs)
        lock = self.lock * (self.firm / obs.effect).clamp(max=1.0)
        released = (obs.effect > 1.0) & (obs.effect > self.snr * obs.risk)
        if not self.early:
            lock = lock * (released.any(-1, keepdim=True) if released.ndim > 1 else released)
        return state, Control(lock, composite=(~released).to(obs.effect.dtype))

    may_lock = property(lambda self: self.lock > 0.0)
