"""Which stored levels answer a request, and with what weights: the nearest one, or a line through two.

K/V of a clip under one noise are smooth in log sigma. On K/V of the embedded model, between levels that are a ratio of
1.2 to 1.4 apart, the line through both neighbours is off by 0.5-1% (K) and 1-2.5% (V) where the nearest level is off by
3.5-6% and 8-13%; the line through the last two, carried on beyond the last, is off by 1-2% and 2-5%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .clock import Clock, Refresh, distance, neighbours, same

Weights = tuple[tuple[float, float], ...]
"""Stored noise levels and their weights, which sum to 1: none, one or two."""


def choose(
    levels: Sequence[float],
    sigma: float,
    rule: Refresh,
    clock_of: Callable[[float], Clock | None],
    interpolate: bool,
) -> Weights:
    """Answer a request at `sigma` from `levels`; empty where none serves.

    clock_of: the clock that a level is held to: that of this run if it stored the level, else None.
    """
    nearest = _nearest(levels, sigma, rule, clock_of)
    if not interpolate or (nearest and same(nearest[0][0], sigma)):
        return nearest
    low, high = neighbours(levels, sigma)
    if low is not None and high is not None and rule.near(low, sigma) and rule.near(high, sigma):
        weight = math.log(sigma / low) / math.log(high / low)
        return (low, 1 - weight), (high, weight)
    return _beyond(levels, nearest[0][0], sigma, rule) if nearest else ()


def _nearest(
    levels: Sequence[float], sigma: float, rule: Refresh, clock_of: Callable[[float], Clock | None]
) -> Weights:
    # Of two as far the noisier: it came first.
    for stored in sorted(levels, key=lambda level: (distance(level, sigma), -level)):
        if same(stored, sigma) or rule.serves(stored, sigma, clock_of(stored)):
            return ((stored, 1.0),)
    return ()


def _beyond(levels: Sequence[float], last: float, sigma: float, rule: Refresh) -> Weights:
    """The line through the last level and the one behind it, as seen from `sigma`."""
    behind = min(
        (s for s in levels if (s - last) * (last - sigma) > 0 and rule.reaches(s, sigma)),
        key=lambda s: distance(s, last),
        default=None,
    )
    if behind is None:
        return ((last, 1.0),)
    # As far beyond the last level as the two are apart, at most: two close levels tell little of what is far away.
    weight = min(math.log(sigma / behind) / math.log(last / behind), 2.0)
    return (behind, 1 - weight), (last, weight)
