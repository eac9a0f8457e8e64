"""The smallest policy, a function: the lock is the risk, and guidance stays as requested."""

import kvlock_sampling as kv


@kv.stateless
def fade(obs):
    return kv.Control(lock=obs.risk.clamp(0, 1))


policy = fade
