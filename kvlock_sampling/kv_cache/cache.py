"""The kv_cache: source K/V kept across steps, seeds and repeated edits, within a byte budget.

    KV cache = kv.KVCache("kv-bank", budget="4GB", format="int8")
    with KV cache.opened(key, device=x.device) as shelf:      # one run
        level = shelf.lookup(sigma)                       # None: no stored level serves this noise level
        if level is None:
            level = shelf.put(sigma, {layer: (key, value)})
        key, value = level.get(layer)

Keeping the source's K/V instead of computing them beside every evaluation: KV-Edit (arXiv 2502.17363) keeps them over
an inversion; KV-Lock (arXiv 2603.09657) over one step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .clock import Refresh
from .disk import Disk
from .errors import KVCacheError
from .fingerprint import KVCacheKey
from .folder import Folder
from .format import VERBATIM, check_format
from .pool import Drawer, Pool
from .settings import check_directory, check_flag, check_layers, check_tier
from .shelf import Shelf
from .sizes import parse_bytes, readable


class KVCache:
    """Settings, and what is held in memory. One KV cache serves any number of runs, clips and threads.

    directory: also write every level to disk, DIR/<fingerprint>/, and read what is there: the next edit of the same
        clip, in any process, then runs no source pass. None keeps K/V in memory alone.
    budget: bytes held in memory, e.g. "4GB", "512MiB" or a number; None is no limit. Never exceeded: levels far from
        where the run is give way, to disk if there is a directory.
    disk: bytes that all files of the directory may take, of all clips and models together, e.g. "50GB"; None is no
        limit. Never exceeded by what this KV cache writes: before a level is written whole levels are removed, those of
        other clips and models first, least recently used first; never one that a shelf of this process is using. Where
        too little may go the level is kept in memory alone, with a `KVCacheWarning`. Threads, processes and other KV caches
        that share the directory are counted in, also with what they are just writing; only on Windows, and on file
        systems without locks, may processes that begin to write at the same moment exceed it. A KV cache without a limit
        minds nobody's. A directory that holds more already is brought within the limit when a shelf is opened.
    format: "int8" (1 byte, 0.4% off), "fp8" (1 byte, 2.6%), "bf16" (2 bytes, 0.2%), "float32", or None: as they come.
    every: at most so many evaluations per level in a first run; None is no limit. See `clock` for both rules.
    ratio: a level serves noise levels within this ratio; None is no limit.
    interpolate: serve points of the line in log sigma through two levels, between them (a second edit) or beyond the
        last one (a first run, where sigma falls), instead of the nearest level. What the KV cache changes in an edit falls
        to a half in a first run and to a third or less in a second; the room for two levels is used.
    layers: which layers the lock reaches, in the form `AttentionLayers.layers` takes; None is all. Fewer need less room.
    tier: where memory is: "host" (pinned, prefetched, where there is CUDA) or "device".

    Raises:
        KVCacheError: a setting that cannot be meant, or a directory that cannot be written to.
    """

    directory: Path | None

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        budget: str | int | float | None = "4GB",
        disk: str | int | float | None = None,
        format: str | None = "int8",
        every: int | None = 3,
        ratio: float | None = 1.5,
        interpolate: bool = True,
        layers: Iterable[int] | slice | None = None,
        tier: str = "host",
    ) -> None:
        self.tier = check_tier(tier)
        self.refresh = Refresh(every, ratio)
        self.format = check_format(format)
        self.interpolate = check_flag("interpolate", interpolate)
        self.layers = check_layers(layers)
        self._pool = Pool(parse_bytes(budget))
        limit = parse_bytes(disk, "disk")
        if limit is not None and directory is None:
            raise KVCacheError(
                f'disk={disk!r} limits a directory, and none was given; expected e.g. KVCache("kv-bank", disk="50GB").'
            )
        if limit == 0:
            raise KVCacheError(
                f"disk={disk!r} leaves no room for a file; pass no directory to keep K/V in memory alone."
            )
        if directory is None and self.budget == 0:
            raise KVCacheError('budget=0 leaves no room; pass a directory to keep K/V on disk alone, or budget="4GB".')
        self.directory = None if directory is None else check_directory(directory)
        self._disk = None if self.directory is None else Disk(self.directory, limit, self._pool.forget)

    @property
    def budget(self) -> int | None:
        """Bytes that may be held in memory; None is no limit."""
        return self._pool.budget

    @property
    def used(self) -> int:
        """Bytes held in memory now: those of the stored tensors, exactly."""
        return self._pool.used

    @property
    def peak(self) -> int:
        """The most bytes that were ever held in memory."""
        return self._pool.peak

    @property
    def disk(self) -> int | None:
        """Bytes that the directory's files may take; None is no limit, or no directory."""
        return None if self._disk is None else self._disk.limit

    @property
    def disk_used(self) -> int:
        """Bytes that the directory's files take now, of all keys: those of other KV caches and processes as well."""
        return 0 if self._disk is None else self._disk.used

    @contextmanager
    def opened(self, key: KVCacheKey, *, device: torch.device | str = "cpu") -> Iterator[Shelf]:
        """One run's shelf for the K/V of `key`, handed out on `device`. What it stores stays when the block is left.

        Raises:
            KVCacheError: not a key, or the folder of this key holds something else.
        """
        if not isinstance(key, KVCacheKey):
            raise KVCacheError(
                f"opened got a {type(key).__name__}; expected a KVCacheKey, e.g.\n"
                "  KV cache.opened(KVCacheKey.of(model=model, clip=latents, noise=noise, background=tokens, layers=names))"
            )
        shelf = Shelf(
            self._pool,
            self._drawer(key),
            refresh=self.refresh,
            interpolate=self.interpolate,
            format=self.format,
            tier=self.tier,
            device=_indexed(device),
        )
        try:
            yield shelf
        finally:
            shelf.close()

    def _drawer(self, key: KVCacheKey) -> Drawer:
        """The levels of a key, with one more reader. Drawers that hold nothing and have no reader are let go."""
        name = key.fingerprint(self.format)
        with self._pool.lock:
            drawers = self._pool.drawers
            for other in [n for n, d in drawers.items() if n != name and not d.readers and not _holds(d)]:
                del drawers[other]  # what its folder has is found again when it is opened
            if name not in drawers:
                folder = None if self._disk is None else Folder(self._disk, key, self.format)
                drawers[name] = Drawer(key.layers, folder)
            elif not drawers[name].readers:
                self._pool.look_again(drawers[name])
            drawers[name].readers += 1
            return drawers[name]

    def __deepcopy__(self, memo: Any) -> KVCache:
        """Itself: a copy of a lock shares its KV cache."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Settings travel, what is held in memory does not."""
        settings: dict[str, Any] = {
            "budget": self.budget,
            "disk": self.disk,
            "format": None if self.format == VERBATIM else self.format,
            "every": self.refresh.every,
            "ratio": self.refresh.ratio,
            "interpolate": self.interpolate,
            "layers": self.layers,
            "tier": self.tier,
        }
        return functools.partial(KVCache, self.directory, **settings), ()

    def clear(self) -> None:
        """Let go of everything in memory that no open shelf is using. Files stay: delete the directory for that."""
        self._pool.clear()

    def __repr__(self) -> str:
        where = "memory" if self.directory is None else repr(str(self.directory))
        budget = "no limit" if self.budget is None else readable(self.budget)
        disk = "" if self.disk is None else f", at most {readable(self.disk)} on disk"
        return f"KVCache({where}, {self.format}, {readable(self.used)} of {budget} used{disk})"


def _holds(drawer: Drawer) -> bool:
    """Whether letting go of it would lose anything: levels without a file, or parts in memory."""
    return any(stored.held or stored.file is None for stored in drawer.levels)


def _indexed(device: Any) -> torch.device:
    """A device as tensors name theirs: "cuda" is "cuda:0" on them."""
    return torch.empty(0, device=device).device
