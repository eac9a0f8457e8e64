"""The memory tier: what is held, counted to the byte, and who has to go when there is no room.

Held bytes are those of the stored tensors. What a layer gets back for one attention call, and the one layer that is on
its way to the device, belong to the evaluation and not to the KV cache.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from .clock import distance
from .errors import KVCacheError
from .file import LevelFile, Pair
from .folder import Folder


class Stored:
    """One level: the layers held in memory, and the file that has all of them. At least one of the two is whole."""

    def __init__(self, drawer: Drawer, sigma: float, file: LevelFile | None = None) -> None:
        self.drawer, self.sigma, self.file = drawer, sigma, file
        self.held: dict[str, Pair] = {}
        self.pins = 0

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(key.nbytes + value.nbytes for key, value in self.held.values())

    def read(self, layer: str) -> Pair:
        """Keys and values as stored, from memory or mapped from the file."""
        pair = self.held.get(layer)
        if pair is not None:
            return pair
        if self.file is None:
            raise KVCacheError(
                f"the level at sigma {self.sigma:.4g} has been dropped to keep the budget.\n"
                "  A level is there until the next lookup or put of its shelf; ask with shelf.lookup(sigma) each time."
            )
        return self.file.read(layer)


class Drawer:
    """Every level of one key, and who is at it. Guarded by the pool's lock."""

    def __init__(self, layers: tuple[str, ...], folder: Folder | None) -> None:
        self.layers, self.folder = layers, folder
        files = [] if folder is None else folder.levels()
        self.levels = [Stored(self, file.sigma, file) for file in files]
        self.shapes: Any = files[0].shapes if files else None
        self.readers = 0
        self.now: float | None = None
        self.touched = 0


class Pool:
    """Counts bytes. `used` and `peak` never exceed `budget`."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.used = 0
        self.peak = 0
        self.lock = threading.RLock()
        self.drawers: dict[str, Drawer] = {}
        self._ticks = 0

    def tick(self) -> int:
        """A number that grows: for "least recently used"."""
        self._ticks += 1
        return self._ticks

    def reserve(self, count: int) -> bool:
        """Count `count` more bytes, giving up levels where that is needed. False, and nothing changed, if it cannot be.

        Levels in use are never given up. First go those of keys that nobody has open, least recently used first, then
        those farthest in log sigma from where their run is now. What has a file is only forgotten, and read again.
        """
        with self.lock:
            if self.budget is not None and self.used + count > self.budget:
                able = [s for s in self._levels() if s.held and not s.pins]
                if self.used - sum(s.nbytes for s in able) + count > self.budget:
                    return False
                for stored in sorted(able, key=_worth):
                    if self.used + count <= self.budget:
                        break
                    self.drop(stored)
            self.used += count
            self.peak = max(self.peak, self.used)
            return True

    def release(self, count: int) -> None:
        """Count `count` bytes less."""
        with self.lock:
            self.used -= count

    def drop(self, stored: Stored) -> None:
        """Give up what a level holds in memory; without a file the level is gone."""
        with self.lock:
            self.used -= stored.nbytes
            stored.held.clear()
            if stored.file is None and stored in stored.drawer.levels:
                stored.drawer.levels.remove(stored)

    def forget(self, removed: set[Path]) -> None:
        """These files are no more: levels that are whole in memory stay, the others are gone. Maps in use stay too."""
        with self.lock:
            for stored in self._levels():
                if stored.file is not None and stored.file.path in removed and not stored.pins:
                    self._lose_file(stored)

    def look_again(self, drawer: Drawer) -> None:
        """A drawer is opened again after a while: files may have been removed by other processes or KV caches."""
        with self.lock:
            for stored in list(drawer.levels):
                if stored.file is not None and not stored.pins and not stored.file.path.exists():
                    self._lose_file(stored)

    def _lose_file(self, stored: Stored) -> None:
        stored.file = None
        if len(stored.held) < len(stored.drawer.layers):
            self.drop(stored)

    def in_use(self) -> int:
        """Bytes of levels that are in use and cannot be given up."""
        with self.lock:
            return sum(s.nbytes for s in self._levels() if s.pins)

    def clear(self) -> None:
        """Give up everything that nobody is using."""
        with self.lock:
            for stored in self._levels():
                if not stored.pins:
                    self.drop(stored)
            self.drawers = {name: d for name, d in self.drawers.items() if d.readers}

    def _levels(self) -> list[Stored]:
        return [stored for drawer in self.drawers.values() for stored in drawer.levels]


def _worth(stored: Stored) -> tuple[bool, float]:
    """What is given up first sorts first."""
    drawer = stored.drawer
    if not drawer.readers or drawer.now is None:
        return False, drawer.touched
    return True, -distance(stored.sigma, drawer.now)
