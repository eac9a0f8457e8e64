"""Policies around policies:  Windowed (when),  Smoothed (how fast),  Clamped (how much).

Wrap instead of subclass: `Smoothed(PID(target=1.0), half_life=0.3)`, `Windowed(Linear(), last=20)`. Each takes a
policy or a plain function, and asks for a measurement only if what it wraps does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..types import Control, Observation, PolicyError, Scalar
from ._checks import Range, count, number, pair
from ._math import elapsed, scaled_cfg, working
from .base import Policy, as_policy


@dataclass(frozen=True)
class Wrapper(Policy):
    """A policy that passes on another one's control after `adjust`. State: the inner policy's own.

    outermost: True for a wrapper that says more than a policy can, as a Preset does; inside another none would hear it.
    """

    policy: Policy

    outermost: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))
        if isinstance(self.policy, Wrapper) and self.policy.outermost:
            kind, inner = type(self).__name__, type(self.policy).__name__
            raise PolicyError(
                f"{kind} around a {inner} would lose what the {inner} says about measuring; expected a bare policy.\n"
                f"  This works: dataclasses.replace(preset, policy={kind}(preset.policy, ...))"
            )

    def adjust(self, control: Control, obs: Observation) -> Control:
        """What becomes of the inner control, at the start and at every step. Unchanged here."""
        return control

    def init(self) -> Any:
        return self.policy.init()

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        state, control = self.policy.step(state, obs)
        return state, self.adjust(control, obs)

    def start(self, obs: Observation) -> Control:
        return self.adjust(self.policy.start(obs), obs)

    @property
    def uses_risk(self) -> bool:  # type: ignore[override]  # a class attribute everywhere else
        return self.policy.uses_risk

    @property
    def never_locks(self) -> bool:
        return self.policy.never_locks


@dataclass(frozen=True)
class Windowed(Wrapper):
    """The inner policy within a stretch of the run, `outside` elsewhere. Source: the last kappa = 20 steps of KV-Lock.

    last: active in the last so many steps of the schedule. Needs to know it; `below` is the fallback where it is not.
    below: active at sigma <= below (alone, or as the fallback of `last`). above: active at sigma >= above only.
    outside: lock, and *multiple of the caller's* cfg_scale, elsewhere; also a (lock, cfg_scale) pair or a dict.
    The inner policy is stepped outside too, so that its memory is warm when the window opens. As ever, the lock asked
    for at one evaluation acts on the next.
    Raises PolicyError without any bound, for bounds out of range, and in a run whose schedule is needed but unknown.
    """

    last: int | None = None
    below: float | None = None
    above: float | None = None
    outside: Control = Control(lock=0.0, cfg_scale=1.0)  # noqa: RUF009  # a NamedTuple of floats, immutable

    def __post_init__(self) -> None:
        super().__post_init__()
        count(self, "last", optional=True)
        number(self, "below", above=0.0, optional=True)
        number(self, "above", above=0.0, optional=True)
        object.__setattr__(self, "outside", _outside(self.outside))
        if self.last is None and self.below is None and self.above is None:
            raise PolicyError(
                f"Windowed({self.policy!r}): no window given. "
                "This works: Windowed(policy, last=20), or in noise levels Windowed(policy, below=3.3, above=0.1)"
            )
        if self.below is not None and self.above is not None and self.below < self.above:
            raise PolicyError(
                f"Windowed(below={self.below:g}, above={self.above:g}) is an empty window: it is active while "
                f"below >= sigma >= above. This works: Windowed(policy, below={self.above:g}, above={self.below:g})"
            )

    def is_open(self, obs: Observation) -> bool:
        """Whether the inner policy rules at this evaluation."""
        if self.above is not None and obs.sigma < self.above:
            return False
        if self.last is not None and obs.steps_left is not None:
            return obs.steps_left <= self.last
        if self.below is not None:
            return obs.sigma <= self.below
        if self.last is None:
            return True
        raise PolicyError(
            f"Windowed(last={self.last}) must know how many steps are left, but the schedule is unknown.\n"
            "  Any of these tells it: pass sigmas=... to KVLock, use lock.sample(sampler, x, sigmas), or call the "
            "sampler through kvlock_sampling.samplers.\n"
            f"  Or give a noise level to fall back on: Windowed(policy, last={self.last}, below=SIGMA)"
        )

    def adjust(self, control: Control, obs: Observation) -> Control:
        if self.is_open(obs):
            return control
        scale = float(self.outside.cfg_scale)
        return Control(self.outside.lock, scaled_cfg(obs, (scale, scale), 0.0))

    @property
    def never_locks(self) -> bool:
        return self.policy.never_locks and float(self.outside.lock) == 0.0


@dataclass(frozen=True)
class Clamped(Wrapper):
    """The inner control kept within limits.

    lock: (lowest, highest) lock, within [0, 1]. (0, 0) schedules guidance alone; (0, 1) is for a policy of your own
        that overshoots.
    cfg: (lowest, highest) guidance scale, absolute; None = no limits. Raises PolicyError for limits out of range.
    """

    lock: Range = (0.0, 1.0)
    cfg: Range | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        pair(self, "lock", at_least=0.0, at_most=1.0)
        pair(self, "cfg", optional=True)

    def adjust(self, control: Control, obs: Observation) -> Control:
        cfg_scale = control.cfg_scale if self.cfg is None else _clamp(control.cfg_scale, self.cfg)
        return Control(_clamp(control.lock, self.lock), cfg_scale)

    @property
    def never_locks(self) -> bool:
        return self.lock[1] == 0.0 or (self.lock[0] == 0.0 and self.policy.never_locks)


class SmoothedState(NamedTuple):
    """The inner state, the noise level of the last step, and what was sent then, at least float32.

    `cfg_scale` stays None for as long as the inner policy just passes on the caller's.
    """

    inner: Any
    sigma: float | None = None
    lock: Tensor | None = None
    cfg_scale: Tensor | None = None


@dataclass(frozen=True)
class Smoothed(Wrapper):
    """Follows the inner control exponentially:  y += (1 - 2^(-dt / half_life)) * (u - y),  t = -log(sigma).

    half_life: > 0, in units of log sigma: when sigma has fallen by a factor exp(half_life), half of a jump remains.
    It begins at the inner policy's `start`, so nothing ever jumps, and gives almost the same curve in 20 steps as 50.
    Raises PolicyError for half_life <= 0.
    """

    half_life: float

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "half_life", above=0.0)

    def init(self) -> SmoothedState:
        return SmoothedState(self.policy.init())

    def step(self, state: SmoothedState, obs: Observation) -> tuple[SmoothedState, Control]:
        inner, control = self.policy.step(state.inner, obs)
        weight = 1.0 - 2.0 ** (-elapsed(state.sigma, obs.sigma) / self.half_life)
        before = self.policy.start(obs)
        if state.lock is not None:
            before = Control(state.lock, obs.cfg_scale if state.cfg_scale is None else state.cfg_scale)
        lock = _follow(before.lock, control.lock, weight, obs.risk)
        if before.cfg_scale is control.cfg_scale is obs.cfg_scale:
            return SmoothedState(inner, obs.sigma, lock), Control(lock.to(obs.risk.dtype), obs.cfg_scale)
        cfg_scale = _follow(before.cfg_scale, control.cfg_scale, weight, obs.cfg_scale)
        sent = Control(lock.to(obs.risk.dtype), cfg_scale.to(obs.cfg_scale.dtype))
        return SmoothedState(inner, obs.sigma, lock, cfg_scale), sent


def _follow(before: Scalar, now: Scalar, weight: float, like: Tensor) -> Tensor:
    old, new = _spread(before, like), _spread(now, like)
    return old + weight * (new - old)  # equal ones stay exactly what they are


def _spread(value: Scalar, like: Tensor) -> Tensor:
    """A float, (batch,) or (batch, tokens) value as a tensor shaped like `like`, at least float32."""
    if not isinstance(value, Tensor):
        return torch.full_like(working(like), value)
    return working(value if value.ndim == like.ndim else value[:, None].expand_as(like))


def _clamp(value: Scalar, limits: Range) -> Scalar:
    low, high = limits
    return value.clamp(low, high) if isinstance(value, Tensor) else min(max(value, low), high)


def _outside(value: Any) -> Control:
    try:
        lock, scale = map(float, Control(**value) if isinstance(value, Mapping) else value)
    except (TypeError, ValueError):
        lock, scale = -1.0, -1.0
    if not (0.0 <= lock <= 1.0 and 0.0 <= scale < float("inf")):
        raise PolicyError(
            f"Windowed(outside={value!r}): expected a lock in [0, 1] and a multiple >= 0 of the caller's cfg_scale. "
            "This works: Windowed(policy, last=20, outside=Control(lock=0.0, cfg_scale=1.0))"
        )
    return Control(lock, scale)
