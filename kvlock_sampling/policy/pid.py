"""PID policy:  u = bias + kp * e + ki * integral(e dt) + kd * de/dt,  e = log(risk / target),  t = -log(sigma).

lock = clamp(u, lock_range), cfg_scale = w0 * (c_lo + (c_hi - c_lo) * clamp(u, 0, 1)). Risk is first clamped to
RISK_RANGE, so |log risk| <= 6.9 and neither 0 nor infinity harms. Sources: Astrom & Murray, "Feedback Systems", chapter
on PID control (filtered derivative of the measurement, anti-windup); acting on the log of an error with set-point 1 as
the step-size controllers of k-diffusion and diffrax do, whose gains for noisy signals (0.1, 0.3, 0) are the defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Control, Observation, PolicyError
from ._checks import Range, number, pair
from ._math import elapsed, scaled_cfg, working
from .base import Policy

RISK_RANGE: Range = (1e-3, 1e3)


class PIDState(NamedTuple):
    """What a PID remembers, as tensors like `obs.risk`. Before the first step the state is None.

    sigma: noise level of the last step. level: log risk there. integral: ki * integral(e dt), in units of u.
    slope: filtered d(level)/dt. output: u as it was sent.
    """

    sigma: float
    level: Tensor
    integral: Tensor
    slope: Tensor
    output: Tensor


@dataclass(frozen=True)
class PID(Policy):
    """Holds risk at `target` by locking more while it is above and less while it is below.

    target: risk > 0 to hold. 1 = at the calibrated threshold.
    kp, ki, kd: lock per unit of log(risk / target), of its integral over -log sigma, of its slope over -log sigma.
        Positive gains lock more where risk is high; with all gains 0 this is `Constant(lock=bias)`, bit for bit.
    lock_range: limits of the lock, within [0, 1].
    cfg_range: multiple of the caller's guidance scale (at u = 0, at u = 1), >= 0; may fall. (1, 1) leaves it alone.
    bias: u at zero error, and the lock before the first measurement; within lock_range.
    filter_width: > 0, time constant of the derivative filter, in units of log sigma (a 40-step run spans about 8);
        it matters where kd is not 0.
    slew: > 0, the most that u may move per unit of log sigma, beginning at the bias; None = no limit.
    Raises PolicyError for settings out of range.
    """

    target: float = 1.0
    kp: float = 0.1
    ki: float = 0.3
    kd: float = 0.0
    lock_range: Range = (0.0, 1.0)
    cfg_range: Range = (1.0, 1.0)
    bias: float = 0.0
    filter_width: float = 0.3
    slew: float | None = None

    def __post_init__(self) -> None:
        number(self, "target", above=0.0)
        for name in ("kp", "ki", "kd"):
            number(self, name)
        pair(self, "lock_range", at_least=0.0, at_most=1.0)
        pair(self, "cfg_range", at_least=0.0, rising=False)
        number(self, "bias", at_least=0.0, at_most=1.0)
        number(self, "filter_width", above=0.0)
        number(self, "slew", above=0.0, optional=True)
        if not self.limits[0] <= self.bias <= self.limits[1]:
            raise PolicyError(
                f"PID(bias={self.bias:g}, lock_range={self.lock_range}): bias must lie within lock_range. "
                f"This works: PID(bias={self.lock_range[0]:g}, lock_range={self.lock_range})"
            )

    @property
    def limits(self) -> Range:
        """Where u saturates: at the lock's limits, or at (0, 1) where u also drives guidance."""
        return self.lock_range if self.cfg_range[0] == self.cfg_range[1] else (0.0, 1.0)

    def step(self, state: PIDState | None, obs: Observation) -> tuple[PIDState, Control]:
        low, high = self.limits
        level = working(obs.risk).clamp(*RISK_RANGE).log()
        zero = torch.zeros_like(level)
        last = state or PIDState(obs.sigma, level, integral=zero, slope=zero, output=zero + self.bias)
        dt = elapsed(last.sigma, obs.sigma)
        error, last_error = level - math.log(self.target), last.level - math.log(self.target)

        # On the measurement and through a low-pass, so a first step or a jump gives no kick; exact for any dt.
        slope = last.slope
        if dt > 0.0:
            share = -math.expm1(-dt / self.filter_width)
            slope = slope + share * ((level - last.level) / dt - slope)
        rest = self.bias + self.kp * error + self.kd * slope

        # Trapezoid in log sigma, half by half: 20 and 50 steps give the same integral. It grows only as far as u is not
        # yet at a limit (no windup), and alone it holds u at a limit but not beyond: when the error turns, u leaves.
        integral = last.integral
        for part in (last_error, error):
            grown = integral + self.ki * dt / 2 * part
            grown = grown.clamp(torch.minimum(integral, low - rest), torch.maximum(integral, high - rest))
            integral = grown.clamp(low - self.bias, high - self.bias)

        wanted = (rest + integral).clamp(low, high)
        if self.slew is not None:
            wanted = last.output + (wanted - last.output).clamp(-self.slew * dt, self.slew * dt)
        lock = wanted.clamp(*self.lock_range).to(obs.risk.dtype)
        new = PIDState(obs.sigma, level, integral, slope, wanted)
        return new, Control(lock, scaled_cfg(obs, self.cfg_range, wanted))

    def start(self, obs: Observation) -> Control:
        """The bias: u at zero error."""
        lock = min(max(self.bias, self.lock_range[0]), self.lock_range[1])
        return Control(lock, scaled_cfg(obs, self.cfg_range, self.bias))

    @property
    def never_locks(self) -> bool:
        return self.lock_range[1] == 0.0 or self.kp == self.ki == self.kd == self.bias == 0.0
