"""Levels in memory: least recently used eviction within one byte budget."""

import re
import threading
from collections import OrderedDict
from typing import Any

import torch

from ..types import KVCacheError
from ..utils.fields import within
from .quantize import PackedLevel, level_bytes

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}


class MemoryTier:
    """Levels by cache entry and noise level. The bytes `used` never exceed `budget`; None is no limit."""

    def __init__(self, budget: int | None) -> None:
        self.budget, self.used = float("inf") if budget is None else budget, 0
        self._levels: OrderedDict[tuple[str, float], PackedLevel] = OrderedDict()
        self._lock = threading.RLock()

    def sigmas(self, entry: str) -> set[float]:
        with self._lock:
            return {sigma for name, sigma in self._levels if name == entry}

    def get(self, entry: str, sigma: float) -> PackedLevel | None:
        """Return a level and mark it as used last; None if it is not held."""
        with self._lock:
            if (level := self._levels.get((entry, sigma))) is not None:
                self._levels.move_to_end((entry, sigma))
            return level

    def make_room(self, size: int) -> bool:
        """Evict levels until `size` more bytes fit. Returns False, and evicts nothing, if they exceed the budget."""
        with self._lock:
            if size > self.budget:
                return False
            while self.used + size > self.budget:
                _, level = self._levels.popitem(last=False)
                self.used -= level_bytes(level)
            return True

    def put(self, entry: str, sigma: float, level: PackedLevel) -> bool:
        """Hold a level in place of an older one. Returns False if it exceeds the whole budget."""
        with self._lock:
            self.used -= level_bytes(self._levels.pop((entry, sigma), {}))
            if not self.make_room(level_bytes(level)):
                return False
            self._levels[entry, sigma] = level
            self.used += level_bytes(level)
            return True


def room_on(device: torch.device, size: int) -> bool:
    """Whether `size` more bytes leave a fifth of a device free; on the host the budget alone decides."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - size > total / 5


def parse_bytes(size: Any) -> int | None:
    """Read a size: a number of bytes, text such as "4GB" (10^9) or "4GiB" (2^30), or None for no limit."""
    if size is None:
        return None
    if (count := within(size, at_least=0.0)) is not None:
        return int(count)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", size, re.I) if isinstance(size, str) else None
    if found is None or found[2].lower() not in _UNITS:
        raise KVCacheError(f'budget={size!r}; expected bytes, e.g. 4_000_000_000 or "512MiB", or None for no limit.')
    return int(float(found[1]) * _UNITS[found[2].lower()])


def readable(count: float) -> str:
    """Write a number of bytes with a unit, e.g. "2.1 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{int(count)} bytes"
