"""The route of one evaluation: how the source's K/V reach the edit. Decided once, from this evaluation alone."""

from __future__ import annotations

from enum import Enum

WORTH_NARROWING = 0.9
"""If more than this fraction of the tokens must be computed, gathering them costs more than it saves."""


class Route(Enum):
    """How the source's K/V reach the edit in one evaluation.

    UNLOCKED: not at all. LOCKSTEP: the source rides as more rows of the edit's call. INTERLEAVED: likewise, and each
    block runs on the source's rows, then on the edited tokens alone. SOURCE_PASS: from a pass of the source just before.
    CACHED: from the K/V cache, which a source pass fills where it has nothing for this noise level.
    """

    UNLOCKED = "unlocked"
    LOCKSTEP = "lockstep"
    INTERLEAVED = "interleaved"
    SOURCE_PASS = "source pass"
    CACHED = "cached"


def choose_route(
    *,
    locked: bool,
    narrow: bool,
    cached: bool,
    one_call: bool,
    interleaves: bool,
    probes: bool,
) -> Route:
    """The route of one evaluation, from this evaluation alone.

    Args:
        locked: The lock is above 0 somewhere.
        narrow: The edit runs on the edited tokens alone.
        cached: The lock has a K/V cache.
        one_call: Source and edit can be rows of one call.
        interleaves: The model's blocks can be called one after the other for source and edit.
        probes: The estimator evaluates the model again, and then needs the source's K/V again.
    """
    if not locked:
        return Route.UNLOCKED
    if cached:
        return Route.CACHED
    if not one_call:
        return Route.SOURCE_PASS
    if not narrow:
        return Route.LOCKSTEP
    return Route.INTERLEAVED if interleaves and not probes else Route.SOURCE_PASS
