"""What a KV cache will need, before anything runs: bytes per level, in all, and how much of it the budget holds.

Exact for the stored tensors: the same arithmetic counts them. Wan 2.1 1.3B at 480 x 832 x 81 (30 layers of 12 heads of
128, 21 x 30 x 52 tokens, 70% background) needs 2.1 GB per level as int8, 4.2 GB as bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import KVCacheError
from .format import FORMATS, VERBATIM, check_format, layout, nbytes
from .sizes import parse_bytes, readable


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes. Print it.

    layers, clips, heads, dim: of the model. kept: background tokens of `tokens`. levels: noise levels that a run
    stores. format: as in `KVCache`. budget: memory, None is no limit. dtype: of the model's K/V. directory: whether there
    is one; disk: what it may hold, None is no limit.
    """

    layers: int
    clips: int
    heads: int
    dim: int
    tokens: int
    kept: int
    levels: int
    format: str
    budget: int | None
    dtype: torch.dtype
    directory: bool = False
    disk: int | None = None

    def per_level_as(self, format: str | None) -> int:
        """Bytes of one level in another format."""
        shape = (self.clips, self.heads, self.kept, self.dim)
        return 2 * self.layers * nbytes(layout(shape, self.dtype, check_format(format)))

    @property
    def per_level(self) -> int:
        """Bytes of one level."""
        return self.per_level_as(self.format)

    @property
    def total(self) -> int:
        """Bytes of every level a run stores: what a directory takes on disk, beside headers of some kB each."""
        return self.levels * self.per_level

    @property
    def in_memory(self) -> int:
        """Levels that the budget holds at once."""
        return self._fitting(self.per_level)

    @property
    def on_disk(self) -> int:
        """Levels that the directory holds after a run, where those of others may all go; 0 without a directory."""
        if not self.directory:
            return 0
        return self.levels if self.disk is None or not self.per_level else min(self.levels, self.disk // self.per_level)

    def _fitting(self, per_level: int) -> int:
        return self.levels if self.budget is None or not per_level else min(self.levels, self.budget // per_level)

    @property
    def verdict(self) -> str:
        """What this means for a run, in a sentence or two."""
        if self.directory and self.on_disk < self.levels:
            return self._too_much_for_the_disk()
        held = self.in_memory
        if self.directory and held == self.levels:
            return "Everything fits in memory, and on disk: the next edit of this clip needs no source pass."
        if self.directory:
            return (
                f"{held} of {self.levels} levels fit in memory, all of them on disk, {readable(self.total)}: the next "
                "edit of this clip needs no source pass."
            )
        beyond = (
            "for the next edit of this clip without a source pass give the KV cache a directory "
            '(kv_cache=KVCache("DIR"), --kv-cache DIR).'
        )
        if held == self.levels:
            # An object in memory: another KVCache, and so another process, starts empty.
            return f"Everything fits in memory, for this run and others with this KVCache; beyond them, {beyond}"
        if held:
            enough = "enough for one run" if held > 1 else "enough for one run, but two serve it better (interpolate)"
            return f"{held} of {self.levels} levels fit in memory: {enough}; {beyond}"
        smaller = next((f for f in ("bf16", "int8") if self._fitting(self.per_level_as(f))), None)
        advice = f'format="{smaller}"' if smaller else "fewer layers=..."
        return f"Not one level fits in memory: raise the budget, use {advice}, or give the KV cache a directory."

    def _too_much_for_the_disk(self) -> str:
        assert self.disk is not None
        what = f"All levels take {readable(self.total)}, and disk={readable(self.disk)} is the limit"
        enough = readable(1.005 * self.total)  # headers as well, and what three digits round away
        cure = f"Raise it to {enough}, or store less: fewer layers=..., a larger every= or ratio=."
        if not self.on_disk and not self.in_memory:
            return f"{what}: not one fits, neither there nor in memory. {cure}"
        rest = "the rest are kept in memory" if self.in_memory else "later ones take the place of earlier ones"
        return f"{what}: {self.on_disk} of {self.levels} stay there, {rest}. {cure}"

    def __str__(self) -> str:
        budget = "no limit" if self.budget is None else readable(self.budget)
        disk = "" if self.disk is None else f", disk limit {readable(self.disk)}"
        clips = f", {self.clips} clips" if self.clips != 1 else ""
        lines = [
            f"{self.layers} layers x {self.heads} heads x {self.dim}, {self.kept} of {self.tokens} tokens are "
            f"background{clips}; {self.levels} levels; memory budget {budget}{disk}",
            f"  {'format':<10}{'per level':>12}{'all levels':>12}{'in memory':>11}",
        ]
        for name in (VERBATIM, *FORMATS):
            size = self.per_level_as(name)
            mark = ">" if name == self.format else " "
            lines.append(
                f"{mark} {name:<10}{readable(size):>12}{readable(size * self.levels):>12}"
                f"{f'{self._fitting(size)} of {self.levels}':>11}"
            )
        return "\n".join([*lines, self.verdict])


def plan_for(
    sites_count: int,
    heads: int,
    dim: int,
    tokens: int,
    background_fraction: float,
    levels: int,
    format: str | None = "int8",
    budget: str | int | float | None = "4GB",
    *,
    clips: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    directory: bool = False,
    disk: str | int | float | None = None,
) -> Plan:
    """Plan a KV cache from counts alone.

    tokens: video tokens per clip. background_fraction: how many of them are kept, in [0, 1]; tokens are rounded up.
    levels: noise levels stored, e.g. `expected_levels(sigmas, every=3, ratio=1.5)`. directory, disk: whether there is
    a directory, and what it may hold, as in `KVCache`.

    Raises:
        KVCacheError: a count below 1, a fraction outside [0, 1], no such format, or a budget that is no size.
    """
    counts = {
        "sites_count": sites_count,
        "heads": heads,
        "dim": dim,
        "tokens": tokens,
        "levels": levels,
        "clips": clips,
    }
    wrong = next(
        (name for name, count in counts.items() if isinstance(count, bool) or count != int(count) or count < 1), None
    )
    if wrong is not None:
        raise KVCacheError(f"{wrong}={counts[wrong]!r}; expected a whole number >= 1.")
    if not 0 <= background_fraction <= 1:
        raise KVCacheError(
            f"background_fraction={background_fraction!r}; expected a share of the tokens in [0, 1], e.g. 0.7."
        )
    # A product such as 0.7 * 10 is 7.000000000000001: rounded before it is rounded up.
    kept = math.ceil(round(tokens * background_fraction, 6))
    return Plan(
        sites_count,
        clips,
        heads,
        dim,
        tokens,
        kept,
        levels,
        check_format(format),
        parse_bytes(budget),
        dtype,
        directory,
        parse_bytes(disk, "disk"),
    )
