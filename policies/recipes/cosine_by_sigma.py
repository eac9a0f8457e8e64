"""A schedule alone, nothing measured: full lock at high noise, fading out along a cosine in log sigma."""

import math

import kvlock_sampling as kv

FULL, FREE = 10.0, 0.1  # sigma at which the fade begins and ends


@kv.stateless(uses_risk=False)
def cosine_by_sigma(obs):
    way = math.log(FULL / obs.sigma) / math.log(FULL / FREE)
    lock = 0.5 + 0.5 * math.cos(math.pi * min(max(way, 0.0), 1.0))
    return kv.Control(lock=lock, cfg_scale=obs.cfg_scale)


policy = cosine_by_sigma
