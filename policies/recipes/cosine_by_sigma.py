"""A schedule without measurement: full lock at high noise, released along a cosine in log sigma."""

import math

import kvlock_sampling as kv

FULL, FREE = 10.0, 0.1  # noise levels at which the release begins and ends


@kv.stateless(uses_risk=False)
def cosine_by_sigma(obs):
    progress = math.log(FULL / obs.sigma) / math.log(FULL / FREE)
    lock = 0.5 + 0.5 * math.cos(math.pi * min(max(progress, 0.0), 1.0))
    return kv.Control(lock=lock)


policy = cosine_by_sigma
