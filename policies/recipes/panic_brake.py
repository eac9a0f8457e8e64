"""A policy on the slope of risk: less guidance while risk rises quickly."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

import kvlock_sampling as kv


class Last(NamedTuple):
    sigma: float
    risk: torch.Tensor


@dataclass(frozen=True)
class PanicBrake(kv.Policy):
    """cfg_scale = 1 + (requested - 1) * exp(-strength * rise);  rise = d(log risk) / d(-log sigma), at least 0."""

    strength: float = 0.5

    def step(self, last, obs):
        risk = obs.risk.clamp(1e-3, 1e3)
        rise = torch.zeros_like(obs.requested_cfg_scale)
        if last is not None and last.sigma > obs.sigma:  # no time passes between two calls at one sigma
            slope = (risk / last.risk).log() / math.log(last.sigma / obs.sigma)
            rise = slope.clamp(min=0)
        cfg_scale = 1 + (obs.requested_cfg_scale - 1) * (-self.strength * rise).exp()
        return Last(obs.sigma, risk), kv.Control(lock=obs.risk.clamp(0, 1), cfg_scale=cfg_scale)


policy = PanicBrake()
