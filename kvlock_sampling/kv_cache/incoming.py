"""K/V that are about to be stored: checked, and measured before anything is packed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import KVCacheError
from .file import Kinds
from .format import format_for, layout, nbytes
from .pool import Pool
from .sizes import readable

Store = Mapping[str, tuple[Tensor, Tensor]]


def describe(store: Store, layers: Sequence[str], format: str) -> dict[str, Kinds]:
    """Format, dtype and shape of the key and value of each layer.

    Raises:
        KVCacheError: a layer is missing, or its K/V are not floating tensors.
    """
    missing = [layer for layer in layers if layer not in store]
    if missing:
        raise KVCacheError(
            f"put was given no K/V of {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}; it had "
            f"{', '.join(list(store)[:4]) or 'none'}.\n"
            "  Did the source pass skip layers, say under a step cache? Name those that fire: KVCacheKey(layers=...)."
        )
    return {layer: tuple((format_for(x, format), x.dtype, tuple(x.shape)) for x in store[layer]) for layer in layers}


def shapes_of(kinds: Mapping[str, Kinds]) -> dict[str, Any]:
    """Shapes of the key and value of each layer."""
    return {layer: tuple(shape for _, _, shape in sides) for layer, sides in kinds.items()}


def sizes_of(kinds: Mapping[str, Kinds]) -> dict[str, int]:
    """Bytes of each layer, once stored."""
    return {layer: sum(nbytes(layout(s, d, f)) for f, d, s in sides) for layer, sides in kinds.items()}


def check_shapes(shapes: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Levels of one key are of the same shapes. Raises KVCacheError."""
    wrong = next((layer for layer in shapes if shapes[layer] != known[layer]), None)
    if wrong is not None:
        raise KVCacheError(
            f"K/V of layer {wrong!r} have shapes {shapes[wrong]}; other levels of this key have {known[wrong]}.\n"
            "  Another batch, crop or mask is another key: open a shelf with its own KVCacheKey."
        )


def room_for(pool: Pool, sizes: Mapping[str, int]) -> bool:
    """Whether a level fits whole into memory beside those in use."""
    return pool.budget is None or sum(sizes.values()) <= pool.budget - pool.in_use()


def check_room(pool: Pool, sizes: Mapping[str, int], format: str) -> None:
    """Without a disk a level must fit whole into memory. Raises KVCacheError, with the numbers."""
    if pool.budget is None or room_for(pool, sizes):
        return
    total, used = sum(sizes.values()), pool.in_use()
    held = f", of which {readable(used)} are in use by other runs" if used else ""
    raise KVCacheError(
        f"one level needs {readable(total)} ({len(sizes)} layers as {format}); the budget is "
        f"{readable(pool.budget)}{held}.\n"
        f'  Raise it: KVCache(budget="{math.ceil(total / 1e8) / 10:g}GB"); keep less: format="int8", layers=...; '
        'or let the rest go to disk: directory="kv-bank".'
    )
