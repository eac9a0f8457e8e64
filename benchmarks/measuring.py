"""What benchmarks of time and memory share."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, as the memory pools of GPUs do.

    glibc gives blocks over 32 MB back to the system at once, and every page of the next one is fetched and cleared
    again. Three rows of this benchmark are over that size and two are not: without any lock they would take 1.65 times
    as long instead of 1.5. In a script of your own: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 python ...
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(-4, 0)  # M_MMAP_MAX
            mallopt(-1, -1)  # M_TRIM_THRESHOLD


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long it takes."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: torch.device, held: Iterable[Any]) -> int:
    """Most bytes alive at once beyond those of the tensors in `held`, which were there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(leaf for leaf in tree_leaves(list(held)) if isinstance(leaf, Tensor)) as live:
        run()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive: those made inside, until their storage is freed. Keeps the peak."""

    def __init__(self, there_before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in there_before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known and size:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
