"""The smallest policy, a function: the lock is the risk, guidance is what the caller asked for."""

import kvlock_sampling as kv


@kv.stateless
def fade(obs):
    return kv.Control(lock=obs.risk.clamp(0, 1), cfg_scale=obs.cfg_scale)


policy = fade
