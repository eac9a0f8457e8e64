"""Full lock while the layout forms, then only as much as risk needs, and never more again."""

from dataclasses import dataclass

import torch

import kvlock_sampling as kv


@dataclass(frozen=True)
class EarlyThenRelease(kv.Policy):
    """Lock fully at sigma > `until`; below it follow risk, but only downwards."""

    until: float = 5.0

    def step(self, lock, obs):
        lock = torch.ones_like(obs.risk) if lock is None else lock
        if obs.sigma <= self.until:
            lock = torch.minimum(lock, obs.risk.clamp(0, 1))
        return lock, kv.Control(lock=lock)

    def start(self, obs):
        return kv.Control(lock=1.0)  # before the first measurement


policy = EarlyThenRelease()
