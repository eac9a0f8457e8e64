"""PID policy:  u = bias + kp * e + ki * integral(e dt) + kd * de/dt,  e = log(risk / target),  t = -log(sigma).

lock = clamp(u, lock_range), cfg_scale = w0 * (c_lo + (c_hi - c_lo) * clamp(u, 0, 1)). First risk / target is clamped
to RISK_RANGE. Source: Astrom & Murray, "Feedback Systems", chapter on PID control (filtered derivative of the
measurement, anti-windup). The gains for noisy signals of diffrax's step-size controller are the defaults.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..types import Control, Observation, PolicyError
from ..utils.fields import number, pair
from ..utils.precision import working
from .base import Policy, Range, elapsed, scaled_cfg

RISK_RANGE: Range = (1e-3, 1e3)


@dataclass(frozen=True)
class PID(Policy):
    """Hold risk at `target`: lock more while it is above, less while it is below.

    Its state is (sigma, e, ki * integral(e dt), filtered slope of e, u) of the last step.
    Raises PolicyError for a setting out of range.

    Args:
        target: Risk > 0 to hold. Defaults to 1, the calibrated threshold.
        kp: Lock per unit of log(risk / target). Defaults to 0.1. A positive gain locks more at higher risk.
        ki: Lock per unit of the integral of log(risk / target) over -log sigma. Defaults to 0.3.
        kd: Lock per unit of the slope of log risk over -log sigma. Defaults to 0.
        lock_range: Limits of the lock, within [0, 1]. Defaults to (0, 1).
        cfg_range: Multiple of the requested guidance scale (at u = 0, at u = 1), >= 0; may fall. Defaults to (1, 1).
        bias: u at zero error, and the lock before the first measurement, within lock_range. Defaults to 0.
        filter_width: Time constant of the derivative's low-pass in log sigma, > 0. Defaults to 0.3.
        slew: Largest change of u per unit of log sigma, > 0, starting at the bias. Defaults to None, no limit.
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
        number(self, "target", "filter_width", above=0.0)
        number(self, "kp", "ki", "kd")
        pair(self, "lock_range", at_least=0.0, at_most=1.0)
        pair(self, "cfg_range", at_least=0.0, rising=False)
        number(self, "bias", at_least=0.0, at_most=1.0)
        number(self, "slew", above=0.0, optional=True)
        if not self.limits[0] <= self.bias <= self.limits[1]:
            raise PolicyError(f"bias={self.bias:g}: bias must lie within lock_range. PID(bias={self.limits[0]:g}, ...)")

    @property
    def limits(self) -> Range:
        """The range of u. It is (0, 1) if u also drives guidance."""
        return self.lock_range if self.cfg_range[0] == self.cfg_range[1] else (0.0, 1.0)

    def step(self, state: tuple[Any, ...] | None, obs: Observation) -> tuple[tuple[Any, ...], Control]:
        low, high = self.limits
        error = (working(obs.risk) / self.target).clamp(*RISK_RANGE).log()
        zero = torch.zeros_like(error)
        sigma, last_error, integral, slope, output = state or (obs.sigma, error, zero, zero, zero + self.bias)
        dt = elapsed(sigma, obs.sigma)
        # The derivative acts on the low-passed measurement, so a first step or a jump gives no kick. Exact for any dt.
        if dt > 0.0:
            slope = slope - math.expm1(-dt / self.filter_width) * ((error - last_error) / dt - slope)
        rest = self.bias + self.kp * error + self.kd * slope

        # The trapezoid rule in log sigma, half by half, gives the same integral in 20 and in 50 steps. The integral
        # stops growing where u reaches a limit (no windup), so u leaves the limit as soon as the error changes sign.
        for part in (last_error, error):
            grown = integral + self.ki * dt / 2 * part
            grown = grown.clamp(torch.minimum(integral, low - rest), torch.maximum(integral, high - rest))
            integral = grown.clamp(low - self.bias, high - self.bias)

        wanted = (rest + integral).clamp(low, high)
        if self.slew is not None:
            wanted = output + (wanted - output).clamp(-self.slew * dt, self.slew * dt)
        lock = wanted.clamp(*self.lock_range).to(obs.risk.dtype)
        return (obs.sigma, error, integral, slope, wanted), Control(lock, scaled_cfg(obs, self.cfg_range, wanted))

    def start(self, obs: Observation) -> Control:
        lock = min(max(self.bias, self.lock_range[0]), self.lock_range[1])
        return Control(lock, scaled_cfg(obs, self.cfg_range, self.bias))

    may_lock = property(lambda self: self.lock_range[1] > 0.0)
