"""A KV cache's settings, checked once at its door: what cannot be meant is refused, with the call that can."""

from __future__ import annotations

import difflib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import KVCacheError

TIERS = ("host", "device")


def check_tier(tier: Any) -> str:
    """ "host" or "device". Raises KVCacheError."""
    if isinstance(tier, str) and tier in TIERS:
        return tier
    near = difflib.get_close_matches(str(tier), TIERS, n=1)
    raise KVCacheError(f"tier={tier!r}; expected {' or '.join(map(repr, TIERS))}, e.g. tier={(near or TIERS)[0]!r}.")


def check_flag(name: str, value: Any) -> bool:
    """True or False: of a number nobody knows whether it was meant for another setting. Raises KVCacheError."""
    if isinstance(value, bool):
        return value
    raise KVCacheError(f"{name}={value!r}; expected True or False, e.g. {name}=True.")


def check_layers(layers: Any) -> tuple[int, ...] | slice | None:
    """Indices, a slice, or None for all; whether the model has them is known where a lock is made.

    Raises:
        KVCacheError: something else, or no layer.
    """
    if layers is None:
        return None
    if isinstance(layers, slice):
        if all(end is None or _is_index(end) for end in (layers.start, layers.stop, layers.step)) and layers.step != 0:
            return layers
    else:
        listed = [layers] if _is_index(layers) else layers
        indices = tuple(listed) if isinstance(listed, Iterable) and not isinstance(listed, (str, bytes)) else ()
        if indices and all(_is_index(i) for i in indices):
            return indices
        layers = indices or layers  # a generator tells nothing
    raise KVCacheError(
        f"layers={layers!r}; expected at least one index, or a slice, e.g. layers=range(8, 16), layers=[0, -1], "
        "layers=slice(None, 10), or None for all of them."
    )


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """Make the directory and write to it once: better found now than after the first source pass.

    Raises:
        KVCacheError: no path, or it cannot be made or written to.
    """
    if not isinstance(directory, (str, os.PathLike)) or isinstance(os.fspath(directory), bytes):
        raise KVCacheError(
            f"directory={directory!r}; expected a path, e.g. KVCache('kv-bank'), or None for memory alone."
        )
    if not os.fspath(directory).strip():
        raise KVCacheError(
            f"directory={os.fspath(directory)!r} names no folder; expected one, e.g. KVCache('kv-bank'), or None for "
            "memory alone.\n  The folder you are in is KVCache('.')."
        )
    path = Path(directory).expanduser()
    probe = path / f".probe.{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise KVCacheError(
            f"directory={os.fspath(directory)!r} cannot be written to: {error.strerror or error}.\n"
            "  Pass a folder of your own, e.g. KVCache(directory='kv-bank'), or none to keep K/V in memory."
        ) from error
    return path
