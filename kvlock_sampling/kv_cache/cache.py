"""The KV cache: the source's keys and values kept over steps, seeds, prompts and runs.

    kv_cache = kv.KVCache("kv-cache", budget="4GB")
    lock = kv.KVLock(model, source=clip, mask=mask, noise="fixed", kv_cache=kv_cache)

A *level* holds the K/V of every layer at one noise level. A *cache entry* holds the levels of one model, clip, noise,
mask, prompt and network. KV-Edit (arXiv 2502.17363) keeps K/V over an inversion.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..attention import AttentionLayers
from ..masks.tokens import Selection
from ..types import AttentionError, KVCacheError, KVCacheWarning
from ..utils.host import HostReads
from ..utils.warn import warn
from . import disk
from .fingerprint import content_fingerprint, mark, model_fingerprint
from .memory import MemoryTier, parse_bytes, readable, room_on
from .quantize import Level, PackedLevel, level_bytes, on_host, pack, packed_bytes
from .refresh import Refresh, add_request

KeyValues = Mapping[str, tuple[Tensor, Tensor]]


class KVCache:
    """Settings, and the levels held in memory. One cache serves any number of runs, clips and threads.

    Args:
        directory: Also keep every level in this folder, where later edits of the clip, in any process, find it.
        budget: Bytes of K/V in memory, a number or text such as "4GB" or "512MiB"; None is no limit. The least
            recently used levels make room for new ones. A level stays on the model's device if a fifth of that is free
            beside it, else it goes to the host. Files are read through a memory map and do not count.
        format: "int8" stores one byte per number (0.4% off, see `quantize`); None stores K/V unchanged.
        every: Evaluations per source pass, >= 1, in the run that fills the cache; None is no limit. See `refresh`.
        ratio: A level serves noise levels within this ratio, >= 1; None is no limit. Two serve by a line in log sigma.

    Raises:
        KVCacheError: A setting is outside its range, or the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        budget: str | int | float | None = "4GB",
        format: str | None = "int8",
        every: int | None = 3,
        ratio: float | None = 1.5,
    ) -> None:
        self.refresh = Refresh(every, ratio)
        if format not in ("int8", None):
            raise KVCacheError(f'format={format!r}; expected "int8", or None to keep K/V unchanged.')
        self.format = format
        self.budget = parse_bytes(budget)
        if directory is None and self.budget == 0:
            raise KVCacheError('budget=0 leaves no room; pass a directory to keep K/V on disk alone, or budget="4GB".')
        self.memory = MemoryTier(self.budget)
        self.directory = None if directory is None else disk.checked(directory)
        self._warned: set[str] = set()
        self.open = WeakValueDictionary[Any, CacheEntry]()

    @property
    def used(self) -> int:
        """The bytes held in memory now."""
        return self.memory.used

    def warn_once(self, reason: str, text: str) -> None:
        """Warn, the first time for this reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            warn(text, KVCacheWarning)

    def __deepcopy__(self, memo: Any) -> "KVCache":
        """Return the cache itself: a copy of a lock shares its cache."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings, without the levels in memory."""
        settings = {"budget": self.budget, "format": self.format, **vars(self.refresh)}
        return partial(KVCache, self.directory, **settings), ()

    def __repr__(self) -> str:
        where = "memory" if self.directory is None else repr(str(self.directory))
        budget = "no limit" if self.budget is None else readable(self.budget)
        return f"KVCache({where}, format={self.format!r}, {readable(self.used)} of {budget} used)"


class CacheEntry:
    """The levels of one model, clip, noise, mask, prompt and network, whose fingerprint is `name`, for one run."""

    def __init__(self, kv_cache: KVCache, name: str, layers: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.name, self.layers = name, tuple(layers)
        self._cache, self._device = kv_cache, torch.device(device)
        self._requested, self._fresh = list[float](), set[float]()
        self._folder = None if kv_cache.directory is None else kv_cache.directory / name[:32]
        self._files: set[float] = set() if self._folder is None else disk.sigmas_in(self._folder)
        self._mapped: dict[float, PackedLevel] = {}
        self._copied: dict[float, tuple[PackedLevel, Future[bool]]] = {}

    @property
    def sigmas(self) -> set[float]:
        """The noise levels that are stored now."""
        return self._files | self._cache.memory.sigmas(self.name) | self._copied.keys()

    def lookup(self, sigma: float) -> Level | None:
        """Return the K/V by layer that serve a noise level, by the rule of `refresh`.

        None means that the source pass must run and its K/V be stored with `put`. A run has checked the noise level.
        """
        add_request(self._requested, sigma)
        while True:
            chosen = self._cache.refresh.choose(self.sigmas, sigma, self._requested, self._fresh)
            parts = [(packed, weight) for level, weight in chosen if (packed := self._read(level)) is not None]
            if len(parts) == len(chosen):  # else a file was damaged, or another thread evicted a level: choose again
                return Level(parts, self._device) if parts else None

    def put(self, sigma: float, keys: KeyValues) -> KeyValues:
        """Store the K/V of a source pass at this noise level, (clips, heads, kept tokens, dim) by layer.

        Returns K/V by layer as later lookups do, or `keys` itself if they are not finite or exceed the budget. Raises
        KVCacheError if a layer is missing, or K/V are not floating tensors.
        """
        format, memory = self._cache.format, self._cache.memory
        if missing := [layer for layer in self.layers if layer not in keys]:
            raise KVCacheError(
                f"put was given no K/V of {', '.join(missing[:4])}; it had {', '.join(list(keys)[:4]) or 'none'}.\n"
                "  Did the source pass skip layers, e.g. under a step cache? Lock others: layers=[...]."
            )
        flat = [x for layer in self.layers for x in keys[layer]]
        size = sum(packed_bytes(x.shape, x.dtype, format) for x in flat)
        if not memory.make_room(size) and self._folder is None:
            self._warn_too_large(size)
            return keys
        place = self._device if room_on(self._device, size) else torch.device("cpu")
        reads = HostReads()
        reads.together(*flat)
        if not all(math.isfinite(sum(reads.range(x))) for x in flat):
            return keys  # a kernel has failed: later runs may take another
        packed = [pack(x, format, reads.range(x)) for x in flat]
        level = dict(zip(self.layers, zip(packed[::2], packed[1::2], strict=True), strict=True))
        self.settle()  # one level at a time, so that no more than one is on its way
        self._fresh.add(sigma)
        if place == self._device and self._folder is None:
            if not memory.put(self.name, sigma, level):
                self._warn_too_large(size)
        else:  # the copies do not hold up the run
            ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
            thread = ThreadPoolExecutor(1, "kv-cache")
            self._copied[sigma] = level, thread.submit(self._store, sigma, level, place, ready)
            thread.shutdown(wait=False)
        return Level([(level, 1.0)], self._device)

    def settle(self) -> None:
        """Wait until what was put is where it is kept."""
        while self._copied:
            sigma, (level, copied) = self._copied.popitem()
            try:
                kept = copied.result()
            except OSError as error:
                self._cache.warn_once("disk", f"{error}. K/V are kept in memory alone.")
                kept = sigma in self._cache.memory.sigmas(self.name)
            if not kept:
                self._warn_too_large(level_bytes(level))

    def _store(self, sigma: float, level: PackedLevel, place: torch.device, ready: Any) -> bool:
        """Keep a level where it belongs; `ready` is when its device has it. Returns whether it is kept anywhere."""
        with torch.cuda.stream(None if ready is None else torch.cuda.Stream(self._device)):
            if ready is not None:
                ready.wait()
            host = on_host(level)
        kept = self._cache.memory.put(self.name, sigma, level if place == self._device else host)
        if self._folder is not None:
            disk.write(self._folder, self.name, sigma, host)
            self._mapped.pop(sigma, None)
            self._files.add(sigma)
        return kept or self._folder is not None

    def _read(self, sigma: float) -> PackedLevel | None:
        level = self._cache.memory.get(self.name, sigma) or self._mapped.get(sigma)
        if level is None and (copied := self._copied.get(sigma)) is not None:
            return copied[0]
        if level is None and self._folder is not None and sigma in self._files:
            if (level := disk.read(self._folder, self.name, sigma, self.layers)) is None:
                self._files.discard(sigma)
            else:
                self._mapped[sigma] = level
        return level

    def _warn_too_large(self, size: int) -> None:
        self._cache.warn_once(
            "budget",
            f"one level needs {readable(size)} and the budget is {readable(self._cache.budget or 0)}: nothing is kept "
            f'in memory.\n  Pass KVCache(budget="{readable(2 * size)}"), format="int8", or a directory.',
        )


class CacheSession:
    """Finds the cache entries of one run of a denoiser, for layers that are not `uncacheable`."""

    def __init__(self, kv_cache: KVCache, model: Any, layers: AttentionLayers) -> None:
        self.kv_cache, self.model, self.layers = kv_cache, model, layers
        self._entries: dict[str, CacheEntry] = {}
        self.close()

    def close(self) -> None:
        """Let go of the entries in use. The cache keeps their levels, and the next entry reads the model again."""
        for entry in self._entries.values():
            entry.settle()
        self._entries.clear()
        self._known: list[tuple[tuple[Any, ...], list[Any], CacheEntry]] = []
        self._model: str | None = None

    def entry(
        self, clip: Tensor, noise: Any, selection: Selection, expert: Any, arguments: Mapping[str, Any]
    ) -> CacheEntry:
        """The entry of a source: latents, its noise, the tokens whose K/V are kept, the network that runs or its
        index, and the arguments of its pass. Raises AttentionError for a network that is none of several, and
        KVCacheError if the model or an argument has no fingerprint.
        """
        parts, spec = tree_flatten((clip, noise, selection.weight, dict(sorted(arguments.items()))))
        where = selection.weight.device
        precision = f"autocast {torch.get_autocast_dtype(where.type)}" if torch.is_autocast_enabled(where.type) else ""
        marks = (expert, *map(mark, parts), spec, precision)
        for known, _, entry in self._known:
            if known == marks:
                return entry  # the same objects, unchanged: their content need not be read again
        if self._model is None:
            self._model = model_fingerprint(self.model, self.layers.networks)
        layers = self._layers_of(expert)
        version = 1  # of the stored form
        content = (version, self.kv_cache.format, self._model, clip, noise, selection.weight, layers, precision)
        name = content_fingerprint({"content": content, "arguments": dict(arguments)})
        # Blocks that are open side by side, as those of a search, are one run.
        entry = CacheEntry(self.kv_cache, name, layers, where)
        self._entries[name] = entry = self.kv_cache.open.setdefault((get_ident(), where, name), entry)
        # The objects are kept with their marks, because an id is unique only while its object lives.
        self._known = [*self._known[-7:], (marks, parts, entry)]
        return entry

    def _layers_of(self, expert: Any) -> list[str]:
        names, networks = [layer.name for layer in self.layers.layers], self.layers.networks
        if len(networks) < 2:
            return names
        if (index := next((i for i, network in enumerate(networks) if expert is network or expert == i), None)) is None:
            raise AttentionError(
                f"this model has {len(networks)} networks, and expert(sigma) returned {expert!r}, which is not one.\n"
                "  Give the denoiser a method expert(sigma) that returns the network that runs, or its index."
            )
        return [name for name in names if name.startswith(f"{index}.")]


def uncacheable(layers: AttentionLayers) -> str | None:
    """Return why the K/V of these layers cannot be kept; None if they can."""
    if layers.watch is not None:
        return (
            "a KV cache keeps K/V under the names of layers, and a watched model has none; declare it:\n"
            "  layers=kv.attention.Architecture('mine', ('package.module:Class',), layers=..., patch=...).find(net)"
        )
    if layers.rows_apart:
        return f"K/V of architecture {layers.architecture!r} cannot be kept in a KV cache; leave kv_cache= away."
    return None
