"""Policies around policies:  Windowed (when),  Smoothed (how fast),  Clamped (how much).

The inner policy is stepped at every evaluation, so that its memory is up to date when it takes over.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import SAME_SIGMA, Control, Observation, PolicyError, Scalar
from ..utils.fields import number, pair
from ..utils.precision import working
from .base import Policy, Range, as_policy, elapsed, known_control, stepped


@dataclass(frozen=True)
class PolicyWrapper(Policy):
    """Base of the wrappers: the inner policy with its control changed by `_adjust`.

    Args:
        policy: The inner policy, or a function of an Observation.
    """

    policy: Policy

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))

    def _adjust(self, control: Control, obs: Observation) -> Control:
        return control

    def init(self) -> Any:
        return self.policy.init()

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        state, control = stepped(self.policy, state, obs)
        return state, self._adjust(control, obs)

    def start(self, obs: Observation) -> Control:
        return self._adjust(known_control(self.policy, self.policy.start(obs), "start"), obs)

    uses_risk = property(lambda self: self.policy.uses_risk)
    may_lock = property(lambda self: self.policy.may_lock)


def innermost(policy: Policy) -> Policy:
    """The policy inside its wrappers."""
    return innermost(policy.policy) if isinstance(policy, PolicyWrapper) else policy


@dataclass(frozen=True)
class Windowed(PolicyWrapper):
    """The inner policy within a window of the run; elsewhere no lock, and the requested guidance and compositing.

    Source: KV-Lock (arXiv 2603.09657) acts in the last kappa = 20 steps.

    Args:
        policy: The inner policy, or a function of an Observation.
        last: Active in the last `last` steps of the schedule, >= 1. Needs a known schedule, or `below` as fallback.
        below: Active at sigma <= below, > 0; only the fallback if `last` is given.
        above: Active at sigma >= above, > 0.

    Raises:
        PolicyError: No bound, or a bound out of range; in a run, an unknown schedule that `last` needs.
    """

    last: int | None = None
    below: float | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "last", at_least=1, whole=True, optional=True)
        number(self, "below", "above", above=0.0, optional=True)
        if self.last is None and self.below is None and self.above is None:
            raise PolicyError("no window given. This works: Windowed(policy, last=20), or above=0.1, below=3.3")
        if self.below is not None and self.above is not None and self.below < self.above:
            swapped = f"Windowed(policy, below={self.above:g}, above={self.below:g})"
            raise PolicyError(f"above={self.above:g} > below={self.below:g}: an empty window. This works: {swapped}")

    def _is_open(self, obs: Observation) -> bool:
        if self.above is not None and obs.sigma < self.above * (1 - SAME_SIGMA):
            return False
        if self.last is not None and obs.steps_left is not None:
            return obs.steps_left <= self.last
        if self.below is not None or self.last is None:
            return self.below is None or obs.sigma <= self.below * (1 + SAME_SIGMA)
        raise PolicyError(
            "unknown schedule. Pass sigmas=... to KVLock, use lock.sample or a sampler of kvlock_sampling.samplers"
            f", or give a noise level to fall back on: Windowed(policy, last={self.last}, below=SIGMA)"
        )

    def _adjust(self, control: Control, obs: Observation) -> Control:
        return control if self._is_open(obs) else Control(lock=0.0)


@dataclass(frozen=True)
class Clamped(PolicyWrapper):
    """The inner policy's lock, guidance scale and composite, kept within limits.
    Raises PolicyError for a setting out of range.

    Args:
        policy: The inner policy, or a function of an Observation.
        lock: (lowest, highest) lock, within [0, 1]. (0, 0) schedules guidance alone. Defaults to (0, 1).
        cfg: (lowest, highest) absolute guidance scale. Defaults to None, no limits.
        composite: (lowest, highest) composite weight, within [0, 1], if the policy gives one. Defaults to (0, 1).
    """

    lock: Range = (0.0, 1.0)
    cfg: Range | None = None
    composite: Range = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        pair(self, "lock", at_least=0.0, at_most=1.0)
        pair(self, "composite", at_least=0.0, at_most=1.0)
        if self.cfg is not None:
            pair(self, "cfg")

    def _adjust(self, control: Control, obs: Observation) -> Control:
        lock = obs.lock if control.lock is None else control.lock
        scale = control.cfg_scale
        if self.cfg is not None:
            scale = _clamp(obs.requested_cfg_scale if scale is None else scale, self.cfg)
        weight = None if control.composite is None else _clamp(control.composite, self.composite)
        return Control(_clamp(lock, self.lock), scale, weight)

    may_lock = property(lambda self: self.lock[0] > 0.0 or (self.lock[1] > 0.0 and self.policy.may_lock))


@dataclass(frozen=True)
class Smoothed(PolicyWrapper):
    """An exponential low-pass on lock and guidance:  y += (1 - 2^(-dt / half_life)) * (u - y),  t = -log(sigma).

    It begins at the inner policy's `start`, and `composite` passes. State: (inner state, last noise level and control).
    Raises PolicyError for a setting out of range.

    Args:
        policy: The inner policy, or a function of an Observation.
        half_life: Fall in log sigma after which half of a jump is left, > 0.
    """

    half_life: float

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "half_life", above=0.0)

    def init(self) -> tuple[Any, float | None, Control | None]:
        return self.policy.init(), None, None

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        inner, sigma, before = state
        inner, control = stepped(self.policy, inner, obs)
        before = self.start(obs) if before is None else before
        weight = 1.0 - 2.0 ** (-elapsed(sigma, obs.sigma) / self.half_life)
        lock = _follow(before.lock, control.lock, weight, obs.lock, obs.risk)
        requested = obs.requested_cfg_scale
        cfg_scale = _follow(before.cfg_scale, control.cfg_scale, weight, requested, requested)
        sent = control._replace(
            lock=None if lock is None else lock.to(obs.risk.dtype),
            cfg_scale=None if cfg_scale is None else cfg_scale.to(requested.dtype),
        )
        return (inner, obs.sigma, Control(lock, cfg_scale)), sent


def _follow(before: Scalar | None, now: Scalar | None, weight: float, unset: Tensor, like: Tensor) -> Tensor | None:
    if before is None and now is None:
        return None
    like = working(like)
    given = (unset if value is None else value for value in (before, now))
    # Transposed, so that what is per token follows what is per clip.
    old, new = (torch.as_tensor(value, dtype=like.dtype, device=like.device).t() for value in given)
    return (torch.zeros_like(like).t() + old + weight * (new - old)).t()  # exactly the same value if both are equal


def _clamp(value: Scalar, limits: Range) -> Scalar:
    low, high = limits
    if isinstance(value, Tensor):
        return value.clamp(low, high)
    return min(max(value, low), high) if isinstance(value, int | float) else value  # the lock names what is none
