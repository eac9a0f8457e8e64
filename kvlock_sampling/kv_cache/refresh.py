"""When a kept level still serves, and which levels are interpolated. The clock is sigma, not the number of calls.

A level stored at sigma_s in this run serves a request at sigma while both conditions hold:
    ratio:  max(sigma / sigma_s, sigma_s / sigma) <= ratio;
    every:  fewer than `every` noise levels were requested from sigma_s (not counted) to sigma (counted).
`every` counts the distinct noise levels *between* the two, so that calls which Heun, churn or a rejected step repeat do
not count. A level of an earlier run is held to `ratio` alone, if there is one, so a repeated run needs no source pass.
"""

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from ..types import SAME_SIGMA, KVCacheError
from ..utils.fields import check_number

same = partial(math.isclose, rel_tol=SAME_SIGMA)


@dataclass(frozen=True)
class Refresh:
    """The settings of the refresh rule; see `KVCache`. Raises KVCacheError for a setting outside its range."""

    every: int | None = 3
    ratio: float | None = 1.5

    def __post_init__(self) -> None:
        for name, usual in (("every", 3), ("ratio", 1.5)):
            if (limit := getattr(self, name)) is not None:
                hint = f" The default is {usual}; None is no limit."
                check_number(name, limit, KVCacheError, hint, at_least=1, whole=isinstance(usual, int))
        if self.every is None and self.ratio is None:
            raise KVCacheError("every=None and ratio=None serve one level to all; set at least one, e.g. ratio=1.5.")

    def choose(
        self, levels: Iterable[float], sigma: float, requested: Sequence[float], fresh: Container[float]
    ) -> tuple[tuple[float, float], ...]:
        """Choose the stored levels that serve a request, with weights that sum to 1; none if the source pass must run.

        `requested` are the distinct noise levels that this run requested, with `sigma`; `fresh` those that it stored.
        """
        levels = sorted(levels, key=lambda s: _distance(s, sigma))
        fresh = levels if self.ratio is None else fresh
        nearest = next((s for s in levels if self._serves(s, sigma, requested if s in fresh else ())), None)
        if nearest is not None and same(nearest, sigma):
            return ((nearest, 1.0),)
        low = next((s for s in levels if s <= sigma), None)
        high = next((s for s in levels if s > sigma), None)
        if low is not None and high is not None and all(_within(self.ratio, s, sigma) for s in (low, high)):
            weight = math.log(sigma / low) / math.log(high / low)
            return (low, 1 - weight), (high, weight)
        if nearest is None:
            return ()
        reach = 4.0 if self.ratio is None else self.ratio**2
        beyond = [s for s in levels if (s - nearest) * (nearest - sigma) > 0 and _within(reach, s, sigma)]
        if (behind := min(beyond, key=lambda s: _distance(s, nearest), default=None)) is None:
            return ((nearest, 1.0),)
        # At most as far beyond the last level as the two are apart: two close levels say little about a far one.
        weight = min(math.log(sigma / behind) / math.log(nearest / behind), 2.0)
        return (behind, 1 - weight), (nearest, weight)

    def expected_levels(self, sigmas: Iterable[float]) -> int:
        """Return how many levels a run over these noise levels stores if it starts with none. Zeros are skipped."""
        requested, stored = list[float](), list[float]()
        for sigma in (float(s) for s in sigmas):
            if sigma > 0:
                add_request(requested, sigma)
                if not self.choose(stored, sigma, requested, stored):
                    stored.append(sigma)
        return len(stored)

    def _serves(self, level: float, sigma: float, requested: Sequence[float]) -> bool:
        low, high = min(level, sigma), max(level, sigma)
        between = sum((low < s < high or same(s, sigma)) and not same(s, level) for s in requested)
        return same(level, sigma) or (between < (self.every or math.inf) and _within(self.ratio, level, sigma))


def add_request(requested: list[float], sigma: float) -> None:
    if not any(same(sigma, old) for old in requested):
        requested.append(sigma)


def _within(ratio: float | None, a: float, b: float) -> bool:
    return ratio is None or max(a / b, b / a) <= ratio * (1 + SAME_SIGMA)


def _distance(a: float, b: float) -> float:
    return abs(math.log(a / b))
