"""A shelf: one run's view of the levels of one key. It asks the refresh rule, stores levels, and hands them out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .choice import choose
from .clock import Clock, Refresh, check_sigma, same
from .disk import NoRoom
from .errors import KVCacheError, KVCacheWarning
from .file import Kinds, Pair
from .folder import RemovedAtOnce
from .format import Packed, pack
from .incoming import Store, check_room, check_shapes, describe, room_for, shapes_of, sizes_of
from .level import Level
from .place import Mover, is_copied, placed
from .pool import Drawer, Pool, Stored
from .sizes import readable


class Served(NamedTuple):
    """What a run asked of its shelf: distinct noise levels, lookups answered with a level, levels put."""

    requested: int
    served: int
    stored: int


class Shelf:
    """Made by `KVCache.opened(key)`. Not for two threads at once; any number of shelves may be open, on one key too."""

    def __init__(
        self,
        pool: Pool,
        drawer: Drawer,
        *,
        refresh: Refresh,
        interpolate: bool,
        format: str,
        tier: str,
        device: torch.device,
    ) -> None:
        self.device = device
        self._pool, self._drawer, self._folder = pool, drawer, drawer.folder
        self._refresh, self._interpolate, self._format, self._tier = refresh, interpolate, format, tier
        self._movers = (Mover(device), Mover(device))
        self._clock = Clock()
        self._fresh: set[Stored] = set()
        self._pinned: list[Stored] = []
        self._served = self._put = 0
        self._reader = None if self._folder is None else self._folder.disk.opened(self._folder.path)
        self._told: set[str] = set()
        self._open = True

    # -- asking -------------------------------------------------------------------------------------------------------

    def lookup(self, sigma: float) -> Level | None:
        """The level that serves this noise level, or None: run the source pass at `sigma`, then `put`.

        sigma: variance exploding, > 0. See `clock` for the rule. Of the levels that serve the nearest in log sigma is
        taken; where the KV cache interpolates, a point of the line in log sigma through the two levels on either side, both
        within `ratio`, or, beyond the last level, through that one, which must serve, and the one behind it.
        """
        sigma = self._begin(sigma)
        self._clock.ask(sigma)
        with self._pool.lock:
            while True:
                parts = self._choose(sigma)
                broken = [stored for stored, _ in parts if not self._usable(stored)]
                if not broken:
                    break
            if not parts:
                return None
            self._served += 1
            level = self._level(sigma if len(parts) > 1 else parts[0][0].sigma, parts)
            for stored, _ in parts:
                self._fetch_from_disk(stored)
            return level

    def _fetch_from_disk(self, stored: Stored) -> None:
        """Hold what a file has, as far as there is room, where that is nearer to the device than a memory map is."""
        if stored.file is None or not is_copied(self._tier, self.device):
            return
        for layer in self._drawer.layers:
            pair = stored.read(layer)
            if layer not in stored.held and self._pool.reserve(pair[0].nbytes + pair[1].nbytes):
                stored.held[layer] = (self._placed(pair[0]), self._placed(pair[1]))

    def _placed(self, packed: Packed) -> Packed:
        return placed(packed, self._tier, self.device)

    def _choose(self, sigma: float) -> tuple[tuple[Stored, float], ...]:
        at = {stored.sigma: stored for stored in self._drawer.levels}
        weights = choose(
            list(at),
            sigma,
            self._refresh,
            lambda level: self._clock if at[level] in self._fresh else None,
            self._interpolate,
        )
        return tuple((at[level], weight) for level, weight in weights)

    def _usable(self, stored: Stored) -> bool:
        """Read a file's bytes once, before anything is computed with them; a damaged one is no longer a level."""
        if stored.file is None or stored.file.sound():
            return True
        assert self._folder is not None
        self._pool.drop(stored)
        self._drawer.levels.remove(stored)
        self._folder.reject(stored.file.path, "its bytes are not those that were written")
        return False

    # -- storing ------------------------------------------------------------------------------------------------------

    def put(self, sigma: float, store: Store) -> Level:
        """Keep K/V at this noise level, and return them as they will be read: the first edit sees what the second does.

        store: layer -> (key, value), (clips, heads, kept tokens, dim); layers the key does not name are passed over. A
        level that is there already, put by another run or thread, is returned as it is.

        Raises:
            KVCacheError: a layer is missing, shapes differ from the other levels', or there is no room for one level.
        """
        sigma = self._begin(sigma)
        kinds = describe(store, self._drawer.layers, self._format)
        sizes, shapes = sizes_of(kinds), shapes_of(kinds)
        with self._pool.lock:
            check_shapes(shapes, self._drawer.shapes or shapes)
            there = self._there(sigma)
            if there is not None:
                return there
            if self._folder is None:
                check_room(self._pool, sizes, self._format)
            self._drawer.shapes = shapes
        stored = Stored(self._drawer, sigma)
        stored.pins += 1
        try:
            self._keep(stored, store, kinds, sizes)
        except BaseException:
            with self._pool.lock:
                self._pool.drop(stored)
            raise
        finally:
            stored.pins -= 1
        with self._pool.lock:
            self._put += 1
            there = self._there(sigma)  # another thread may have been as quick
            if there is not None:
                self._pool.drop(stored)
                return there
            self._drawer.levels.append(stored)
            self._fresh.add(stored)
            return self._level(sigma, ((stored, 1.0),))

    def _there(self, sigma: float) -> Level | None:
        with self._pool.lock:
            for stored in [s for s in self._drawer.levels if same(s.sigma, sigma)]:
                if self._usable(stored):
                    return self._level(stored.sigma, ((stored, 1.0),))
        return None

    def _keep(
        self,
        stored: Stored,
        store: Store,
        kinds: Mapping[str, Kinds],
        sizes: Mapping[str, int],
    ) -> None:
        """Pack layer by layer: hold what there is room for, and write all of it where there is a folder."""

        def pairs() -> Iterator[tuple[str, Pair]]:
            for layer in self._drawer.layers:
                pair = stored.held.get(layer) or self._pack(stored, layer, store[layer], kinds[layer], sizes[layer])
                yield layer, pair

        failure, full = "", None
        # What this run has used stays on disk as long as the run can go on in memory: of a schedule longer than the
        # disk has room for the next run then finds the first part, where it would find its last levels at its end.
        for pressing in (False, True) if room_for(self._pool, sizes) else (True,):
            try:
                if self._folder is not None and self._reader is not None:
                    stored.file = self._folder.write(stored.sigma, kinds, pairs(), self._reader, pressing=pressing)
                    return
            except NoRoom as error:
                full = error
            except RemovedAtOnce:
                pass  # nobody's fault, and nothing to be told of
            except OSError as error:
                failure = f"{self._folder and self._folder.path} could not be written ({error.strerror or error})"
            for _ in pairs():
                pass
            if len(stored.held) == len(kinds):
                return self._tell(failure, full)
        raise KVCacheError(
            f"{failure or full or 'other runs took the room meanwhile'}; memory has room for {len(stored.held)} of "
            f"{len(kinds)} layers of {readable(sum(sizes.values()))}.\n"
            f"  {'Raise disk=' if full and not failure else 'Free some disk space'}, or raise the budget."
        )

    def _tell(self, failure: str, full: NoRoom | None) -> None:
        """Warn that a level is kept in memory alone: once a run of each reason, it will not change on the way."""
        reason = failure or "limit"
        if reason in self._told or not (failure or full):
            return
        self._told.add(reason)
        if failure:
            warnings.warn(f"{failure}; this level is kept in memory alone.", KVCacheWarning, stacklevel=5)
        else:
            warnings.warn(
                f"{full}. This level, and others of this run that find no room, are kept in memory alone.\n"
                "  Raise the limit, disk=..., or store less: fewer layers=..., a larger every= or ratio=.",
                KVCacheWarning,
                stacklevel=5,
            )

    def _pack(self, stored: Stored, layer: str, tensors: tuple[Tensor, Tensor], kinds: Kinds, size: int) -> Pair:
        hold = self._pool.reserve(size)
        try:
            key, value = (self._placed(pack(x, f)) for x, (f, _, _) in zip(tensors, kinds, strict=True))
        except BaseException:
            if hold:
                self._pool.release(size)
            raise
        if hold:
            stored.held[layer] = (key, value)
        return key, value

    # -- the life of a shelf ------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Another run begins within the block: what was stored so far counts as an earlier run's."""
        self._check_open()
        self._clock, self._fresh, self._told = Clock(), set(), set()
        if self._reader is not None:
            self._reader.restart()

    def close(self) -> None:
        """Let go of the level in use. Called by leaving the block."""
        self._unpin()
        self._open = False
        if self._reader is not None:
            self._reader.close()
        with self._pool.lock:
            self._drawer.readers -= 1
            self._drawer.touched = self._pool.tick()

    @property
    def stats(self) -> Served:
        """What this run asked, so far."""
        return Served(len(self._clock.requested), self._served, self._put)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels that are stored now, from high to low."""
        with self._pool.lock:
            return tuple(sorted((stored.sigma for stored in self._drawer.levels), reverse=True))

    @property
    def directory(self) -> Path | None:
        """The folder of this key's levels, if the KV cache has a directory."""
        return None if self._folder is None else self._folder.path

    def _check_open(self) -> None:
        if not self._open:
            raise KVCacheError("this shelf is closed: ask within its block, with KV cache.opened(key) as shelf: ...")

    def _begin(self, sigma: float) -> float:
        self._check_open()
        sigma = check_sigma(sigma)
        self._unpin()
        with self._pool.lock:
            self._drawer.now = sigma
        return sigma

    def _level(self, sigma: float, parts: tuple[tuple[Stored, float], ...]) -> Level:
        with self._pool.lock:
            for stored, _ in parts:
                stored.pins += 1
                self._pinned.append(stored)
                if stored.file is not None and self._reader is not None:
                    self._reader.use(stored.file.path)
        return Level(sigma, parts, self._movers)

    def _unpin(self) -> None:
        with self._pool.lock:
            for stored in self._pinned:
                stored.pins -= 1
            self._pinned.clear()
        for mover in self._movers:
            mover.forget()
