"""Policies around policies:  Windowed (when),  LockAbove (early),  Smoothed (how fast),  Clamped (how much).

A wrapper takes a policy or a plain function: `Smoothed(PID(target=1.0), half_life=0.3)`. It measures only if the inner
policy does. The inner policy is stepped at every evaluation, so that its memory is up to date when it takes over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import Control, Observation, PolicyError, Scalar
from ..utils.precision import working
from ._checks import Range, number, pair, reject
from ._math import elapsed
from .base import Policy, as_policy


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
        state, control = self.policy.step(state, obs)
        return state, self._adjust(control, obs)

    def start(self, obs: Observation) -> Control:
        return self._adjust(self.policy.start(obs), obs)

    @property
    def uses_risk(self) -> bool:  # type: ignore[override]
        return self.policy.uses_risk

    @property
    def may_lock(self) -> bool:  # type: ignore[override]
        return self.policy.may_lock


@dataclass(frozen=True)
class Windowed(PolicyWrapper):
    """The inner policy within a window of the run; no lock and the requested guidance elsewhere.

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
        whole = isinstance(self.last, int) and not isinstance(self.last, bool)
        if self.last is not None and not (whole and self.last >= 1):
            reject(self, "last", "a whole number >= 1", 20)
        number(self, "below", above=0.0, optional=True)
        number(self, "above", above=0.0, optional=True)
        if self.last is None and self.below is None and self.above is None:
            raise PolicyError(
                f"Windowed({self.policy!r}): no window given. This works: Windowed(policy, last=20), or in noise "
                "levels Windowed(policy, below=3.3, above=0.1)"
            )
        if self.below is not None and self.above is not None and self.below < self.above:
            raise PolicyError(
                f"Windowed(below={self.below:g}, above={self.above:g}) is an empty window; expected below >= above. "
                f"This works: Windowed(policy, below={self.above:g}, above={self.below:g})"
            )

    def _is_open(self, obs: Observation) -> bool:
        if self.above is not None and obs.sigma < self.above:
            return False
        if self.last is not None and obs.steps_left is not None:
            return obs.steps_left <= self.last
        if self.below is not None:
            return obs.sigma <= self.below
        if self.last is None:
            return True
        raise PolicyError(
            f"Windowed(last={self.last}) must know how many steps are left, but the schedule is unknown.\n  Pass "
            "sigmas=... to KVLock, use lock.sample(sampler, x, sigmas) or a sampler of kvlock_sampling.samplers,\n"
            f"  or give a noise level to fall back on: Windowed(policy, last={self.last}, below=SIGMA)"
        )

    def _adjust(self, control: Control, obs: Observation) -> Control:
        return control if self._is_open(obs) else Control(lock=0.0)


@dataclass(frozen=True)
class LockAbove(PolicyWrapper):
    """A lock at high noise whatever the risk; below, the inner policy alone. Guidance is always the inner policy's.

    The layout of a clip is decided at high noise, before there is a measurement, so the lock holds from the first
    evaluation on. The first evaluation below `above` is still locked, because a lock acts on the next evaluation.
    Source: Follow-Your-Shape (arXiv 2508.08134) takes all keys and values from the source in the first 2 steps; its
    background was best at 2 steps, worse at 0 and at 4. Raises PolicyError for a setting out of range.

    Args:
        policy: The inner policy, or a function of an Observation.
        above: Noise level > 0. At this sigma and higher the lock is at least `lock`.
        lock: The least lock there, in [0, 1]. Defaults to 1.
    """

    above: float
    lock: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "above", above=0.0)
        number(self, "lock", at_least=0.0, at_most=1.0)

    def _adjust(self, control: Control, obs: Observation) -> Control:
        if obs.sigma < self.above:
            return control
        return control._replace(lock=_clamp(_lock(control, obs), (self.lock, math.inf)))

    @property
    def may_lock(self) -> bool:  # type: ignore[override]
        return self.lock > 0.0 or self.policy.may_lock


@dataclass(frozen=True)
class Clamped(PolicyWrapper):
    """The inner policy's lock and guidance scale, kept within limits. Raises PolicyError for a setting out of range.

    Args:
        policy: The inner policy, or a function of an Observation.
        lock: (lowest, highest) lock, within [0, 1]. (0, 0) schedules guidance alone. Defaults to (0, 1), which limits a
            policy that returns more.
        cfg: (lowest, highest) absolute guidance scale. Defaults to None, no limits.
    """

    lock: Range = (0.0, 1.0)
    cfg: Range | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        pair(self, "lock", at_least=0.0, at_most=1.0)
        if self.cfg is not None:
            pair(self, "cfg")

    def _adjust(self, control: Control, obs: Observation) -> Control:
        control = control._replace(lock=_clamp(_lock(control, obs), self.lock))
        if self.cfg is None:
            return control
        scale = obs.requested_cfg_scale if control.cfg_scale is None else control.cfg_scale
        return control._replace(cfg_scale=_clamp(scale, self.cfg))

    @property
    def may_lock(self) -> bool:  # type: ignore[override]
        return self.lock[0] > 0.0 or (self.lock[1] > 0.0 and self.policy.may_lock)


@dataclass(frozen=True)
class Smoothed(PolicyWrapper):
    """An exponential low-pass on lock and guidance:  y += (1 - 2^(-dt / half_life)) * (u - y),  t = -log(sigma).

    It begins at the inner policy's `start`, so the first value does not jump, and its curve is almost the same in 20
    steps as in 50. The inner policy's `composite` passes unchanged. Its state is the inner state, and the noise level
    and the control of the last step, None before one. Raises PolicyError for a setting out of range.

    Args:
        policy: The inner policy, or a function of an Observation.
        half_life: Half-life in log sigma, > 0: after sigma has fallen by a factor exp(half_life), half of a jump is
            left.
    """

    half_life: float

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "half_life", above=0.0)

    def init(self) -> tuple[Any, float | None, Control | None]:
        return self.policy.init(), None, None

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        inner, sigma, before = state
        inner, control = self.policy.step(inner, obs)
        before = self.policy.start(obs) if before is None else before
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
    """One step of the low-pass, at least float32. `unset` is the value of an actuator that was left as it is."""
    if before is None and now is None:
        return None
    old, new = (_spread(unset if value is None else value, like) for value in (before, now))
    return old + weight * (new - old)  # exactly the same value if both are equal


def _spread(value: Scalar, like: Tensor) -> Tensor:
    """A float, (batch,) or (batch, tokens) value as a tensor shaped like `like`, at least float32."""
    if not isinstance(value, Tensor):
        return torch.full_like(working(like), value)
    return working(value if value.ndim == like.ndim else value[:, None].expand_as(like))


def _clamp(value: Scalar, limits: Range) -> Scalar:
    low, high = limits
    return value.clamp(low, high) if isinstance(value, Tensor) else min(max(value, low), high)


def _lock(control: Control, obs: Observation) -> Scalar:
    """The lock that a control asks for: its own, or the one in force."""
    return obs.lock if control.lock is None else control.lock
