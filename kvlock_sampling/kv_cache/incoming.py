"""K/V that are about to be stored: checked, and measured before anything is packed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import BankError
from .file import Kinds
from .format import format_for, layout, nbytes
from .pool import Pool
from .sizes import readable

Store = Mapping[str, tuple[Tensor, Tensor]]


def describe(store: Store, sites: Sequence[str], format: str) -> dict[str, Kinds]:
    """Format, dtype and shape of the key and value of each site.

    Raises:
        BankError: a site is missing, or its K/V are not floating tensors.
    """
    missing = [site for site in sites if site not in store]
    if missing:
        raise BankError(
            f"put was given no K/V of {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}; it had "
            f"{', '.join(list(store)[:4]) or 'none'}.\n"
            "  Did the source pass skip layers, say under a step cache? Name those that fire: BankKey(sites=...)."
        )
    return {site: tuple((format_for(x, format), x.dtype, tuple(x.shape)) for x in store[site]) for site in sites}


def shapes_of(kinds: Mapping[str, Kinds]) -> dict[str, Any]:
    """Shapes of the key and value of each site."""
    return {site: tuple(shape for _, _, shape in sides) for site, sides in kinds.items()}


def sizes_of(kinds: Mapping[str, Kinds]) -> dict[str, int]:
    """Bytes of each site, once stored."""
    return {site: sum(nbytes(layout(s, d, f)) for f, d, s in sides) for site, sides in kinds.items()}


def check_shapes(shapes: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Levels of one key are of the same shapes. Raises BankError."""
    wrong = next((site for site in shapes if shapes[site] != known[site]), None)
    if wrong is not None:
        raise BankError(
            f"K/V of site {wrong!r} have shapes {shapes[wrong]}; other levels of this key have {known[wrong]}.\n"
            "  Another batch, crop or mask is another key: open a shelf with its own BankKey."
        )


def room_for(pool: Pool, sizes: Mapping[str, int]) -> bool:
    """Whether a level fits whole into memory beside those in use."""
    return pool.budget is None or sum(sizes.values()) <= pool.budget - pool.in_use()


def check_room(pool: Pool, sizes: Mapping[str, int], format: str) -> None:
    """Without a disk a level must fit whole into memory. Raises BankError, with the numbers."""
    if pool.budget is None or room_for(pool, sizes):
        return
    total, used = sum(sizes.values()), pool.in_use()
    held = f", of which {readable(used)} are in use by other runs" if used else ""
    raise BankError(
        f"one level needs {readable(total)} ({len(sizes)} sites as {format}); the budget is "
        f"{readable(pool.budget)}{held}.\n"
        f'  Raise it: Bank(budget="{math.ceil(total / 1e8) / 10:g}GB"); keep less: format="int8", layers=...; '
        'or let the rest go to disk: directory="kv-bank".'
    )
