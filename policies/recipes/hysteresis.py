"""A policy with memory: lock fully once risk is high, release only when it is clearly low again."""

from dataclasses import dataclass

import torch

import kvlock_sampling as kv


@dataclass(frozen=True)
class Hysteresis(kv.Policy):
    """Lock fully once risk exceeds `on`; release only when it falls below `off`."""

    on: float = 1.2
    off: float = 0.8

    def init(self):
        return False  # state: are we locked?

    def step(self, locked, obs):
        locked = torch.where(obs.risk > self.on, True, torch.where(obs.risk < self.off, False, locked))
        return locked, kv.Control(lock=locked.float())


policy = Hysteresis()
