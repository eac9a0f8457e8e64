"""Sizes in bytes: read as people write them, and written as people read them."""

from __future__ import annotations

import re
from typing import Any

from .errors import KVCacheError

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}}
_UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}


def parse_bytes(size: Any, name: str = "budget") -> int | None:
    """Bytes from a number or from text such as "4GB" (10^9) or "4GiB" (2^30); None is no limit.

    name: of the setting, for the error.

    Raises:
        KVCacheError: it cannot be read as a size.
    """
    if size is None:
        return None
    if isinstance(size, (int, float)) and not isinstance(size, bool) and 0 <= size < float("inf"):
        return int(size)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", size, re.I) if isinstance(size, str) else None
    units = {unit.lower(): count for unit, count in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise KVCacheError(
            f'{name}={size!r}; expected bytes, e.g. {name}=4_000_000_000, "4GB" or "512MiB", or None for no limit.'
        )
    return int(float(found[1]) * units[found[2].lower()])


def readable(count: int | float) -> str:
    """Bytes as people write them, e.g. "2.1 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{int(count)} bytes"
