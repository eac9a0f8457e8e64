"""When a stored level still serves: the refresh rule. Its clock is sigma, not the number of calls.

A level stored at sigma_s in this run serves a request at sigma while both hold:
  ratio:  max(sigma / sigma_s, sigma_s / sigma) <= ratio;
  every:  fewer than `every` noise levels were asked for from sigma_s (not counted) to sigma (counted).
Either may be None. The second is the step-count form, "a source pass every n evaluations". It counts the distinct noise
levels *between* the two, not the calls since: Heun asks twice at a level, churn goes up again, an adaptive step is
rejected and taken back, a sampler is run twice in one block, and none of these makes K/V at a noise level any older.
A level that an earlier run left behind is held to `ratio` alone: there, what it stands for is what it was stored at.

So a run that stored its levels under this rule finds one for every request when it is run again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .errors import KVCacheError

SAME = 1e-4
"""Noise levels that differ by less than this, relatively, are one: samplers compute them in float32."""


def same(a: float, b: float) -> bool:
    """Whether two noise levels are one."""
    return abs(a - b) <= SAME * max(a, b)


def check_sigma(sigma: float) -> float:
    """A noise level as a float.

    Raises:
        KVCacheError: not a finite number > 0. At sigma 0 nothing is locked, so nothing is stored.
    """
    level = float(sigma)
    if not (level > 0 and math.isfinite(level)):
        raise KVCacheError(f"sigma={level}; a KV cache keeps K/V at finite noise levels > 0.")
    return level


@dataclass(frozen=True)
class Refresh:
    """The rule's settings. every: >= 1, evaluations per source pass. ratio: >= 1, dimensionless."""

    every: int | None = 3
    ratio: float | None = 1.5

    def __post_init__(self) -> None:
        every, ratio = self.every, self.ratio
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise KVCacheError(f"every={every!r}; expected a whole number >= 1, e.g. 3, or None for no such limit.")
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if ratio is not None and not (number and 1 <= ratio < math.inf):
            raise KVCacheError(f"ratio={ratio!r}; expected a number >= 1, e.g. 1.5, or None for no such limit.")
        if every is None and ratio is None:
            raise KVCacheError(
                "every=None and ratio=None would serve one level to a whole run; name at least one, e.g. ratio=1.5."
            )

    def near(self, stored: float, sigma: float) -> bool:
        """The first condition. The tolerance is `SAME`, so that a ratio of 1 serves the level itself."""
        return self.ratio is None or max(stored / sigma, sigma / stored) <= self.ratio * (1 + SAME)

    def reaches(self, stored: float, sigma: float) -> bool:
        """Whether a level may be the farther of two that K/V are extrapolated from: within ratio^2, or a ratio of 4."""
        return max(stored / sigma, sigma / stored) <= (4.0 if self.ratio is None else self.ratio**2) * (1 + SAME)

    def serves(self, stored: float, sigma: float, clock: Clock | None) -> bool:
        """Both conditions. `clock` is that of the run which stored the level, None for an earlier run's."""
        if not self.near(stored, sigma):
            return False
        return self.every is None or clock is None or clock.between(stored, sigma) < self.every


@dataclass
class Clock:
    """The distinct noise levels that one run has asked for."""

    requested: list[float] = field(default_factory=list)

    def ask(self, sigma: float) -> bool:
        """Note a request. Returns whether it is at a new noise level."""
        if any(same(sigma, old) for old in self.requested):
            return False
        self.requested.append(sigma)
        return True

    def between(self, stored: float, sigma: float) -> int:
        """Noise levels asked for from `stored`, not counted, to `sigma`, counted."""
        low, high = min(stored, sigma), max(stored, sigma)
        inside = (s for s in self.requested if low < s < high or same(s, sigma))
        return sum(not same(s, stored) for s in inside)


def distance(a: float, b: float) -> float:
    """Between two noise levels, in natural logarithms."""
    return abs(math.log(a / b))


def expected_levels(sigmas: Iterable[float], *, every: int | None = 3, ratio: float | None = 1.5) -> int:
    """How many levels a run over this falling schedule stores, starting with nothing; a final 0 is passed over."""
    rule, clock, stored = Refresh(every, ratio), Clock(), list[float]()
    for sigma in (float(s) for s in sigmas):
        if sigma > 0:
            clock.ask(sigma)
            if not any(rule.serves(level, sigma, clock) for level in stored):
                stored.append(sigma)
    return len(stored)


def neighbours(levels: Sequence[float], sigma: float) -> tuple[float | None, float | None]:
    """The nearest level at or below, and the nearest above; None where there is none."""
    below = [s for s in levels if s <= sigma]
    above = [s for s in levels if s > sigma]
    return max(below, default=None), min(above, default=None)
