"""A record of states keyed by sigma: the clock of a run is the noise level, not the number of calls.

Samplers evaluate a model one to three times per step, at intermediate noise levels, adaptively with rejections, with
churn, or backwards. Three rules cover all of it: an evaluation at (nearly) the sigma of the last entry replaces it, a
lower one appends, and a higher one first drops every entry below it. Whatever comes next continues from the state
that is then on top, so rewinding is restoring a value.
"""

from __future__ import annotations

from typing import Generic, TypeVar

State = TypeVar("State")


class Timeline(Generic[State]):
    """States at falling sigmas. Only the newest `depth` are kept: samplers step back by a step or two, not by a run."""

    def __init__(self, *, depth: int = 16, same: float = 1e-4) -> None:
        self.depth, self.same = depth, same
        self._entries: list[tuple[float, State]] = []

    def rewind(self, sigma: float) -> State | None:
        """Drop what an evaluation at `sigma` replaces or undoes; return the state it continues from, if any."""
        while self._entries and self._entries[-1][0] <= sigma * (1 + self.same):
            self._entries.pop()
        return self._entries[-1][1] if self._entries else None

    @property
    def last(self) -> State | None:
        """The newest state, from which the next evaluation most likely continues."""
        return self._entries[-1][1] if self._entries else None

    def append(self, sigma: float, state: State) -> None:
        """Add the state reached at `sigma`, which must be below all kept ones (call `rewind` first)."""
        self._entries.append((sigma, state))
        del self._entries[: -self.depth]

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The kept noise levels, falling."""
        return tuple(s for s, _ in self._entries)
