"""What check_layers needs of latents, patches and modules, and where a token must stand in a layer's sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..attention import AttentionLayers
from ..attention.context import KeyValue
from ..types import AttentionError
from ..utils.modules import reachable_modules

Place = tuple[int, int, int]


class Seen(NamedTuple):
    """One attention call of a layer. Keys and values are (rows, ..., length, dim).

    Attributes:
        layer: Name of the layer.
        clips: The clip that each row belongs to.
        start: Position of the first video token.
        ratio: The fusion ratio, (rows, tokens).
        own: The call's keys and values.
        used: The keys and values that attention used.
    """

    layer: str
    clips: list[int]
    start: int
    ratio: Tensor
    own: KeyValue
    used: KeyValue


def moved(x: Tensor, places: Sequence[Place], patch: Place) -> Tensor:
    """The latents with one token of every clip changed a lot."""
    changed = x.clone()
    for clip, place in zip(changed, places, strict=True):
        part = token(clip, place, patch)
        signs = torch.where(torch.arange(part.numel()) % 2 > 0, 1.0, -1.0).view(part.shape)
        part += 4 * part.std().clamp(min=1) * signs.to(part)
    return changed


class Hit(NamedTuple):
    """One row of one layer, of which one token was changed: where it should have moved, and where it did most."""

    layer: str
    row: int
    place: Place
    wanted: int
    where: int | None
    length: int
    start: int
    tokens: int


def hit(before: Seen, after: Seen, row: int, place: Place, grid: Place, factor: Place) -> Hit:
    """Which of a row's keys and values moved most when the token at `place` was changed; None: none of them moved.

    factor: how much larger this layer's tokens are than those of the grid.
    """
    rows, columns = grid[1] // factor[1], grid[2] // factor[2]
    t, h, w = (i // f for i, f in zip(place, factor, strict=True))
    squares = [(b[row].float() - a[row].float()).square() for a, b in zip(before.own, after.own, strict=True)]
    change = torch.stack([part.sum(-1).flatten(0, -2).sum(0) for part in squares]).sum(0)
    where = int(change.argmax()) if change.any() else None
    wanted = before.start + (t * rows + h) * columns + w
    return Hit(before.layer, row, place, wanted, where, len(change), before.start, before.ratio.shape[1])


def check_hits(hits: Sequence[Hit], grid: Place) -> None:
    """Of one layer. Its own token moves most before anything is mixed, and nearly always thereafter: in a network with
    tokens elsewhere it hardly ever does, so half of the tries tells one from the other.

    Raises:
        AttentionError: most of them missed.
    """
    missed = [h for h in hits if h.where != h.wanted]
    if 2 * len(missed) < len(hits):
        return
    first = missed[0]
    if first.where is None:
        raise AttentionError(
            f"layer {first.layer!r}: its keys and values do not change with the video.\n"
            "  This is cross-attention, a refiner of text, or attention over a reference. Leave it out: a layer "
            "attends over the video's own tokens."
        )
    behind = first.length - first.start - first.tokens
    if first.start and all(h.where == h.wanted - h.start for h in missed):
        hint = 'The video comes first: declare text="last", or layers.with_extra(after=...).'
    elif behind and all(h.where == h.wanted + behind for h in missed):
        hint = 'The video comes last: declare text="first", or layers.with_extra(before=...).'
    else:
        hint = (
            "Either patch= is not the network's, or its tokens are in another order than time, height, width, or the "
            "rows of its batch are in another order than they came."
        )
    raise AttentionError(
        f"layer {first.layer!r}: changing the token (time, height, width) = {first.place} of {grid} moves position "
        f"{first.where} of {first.length} most; expected {first.wanted}: the video's {first.tokens} tokens begin at "
        f"{first.start}. So it was {len(missed)} times of {len(hits)}.\n  {hint}"
    )


def two_masks(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """1 = edit. In every clip some of the largest tokens are edited and some kept, and not the same."""
    sizes = {5: patch, 4: patch[1:], 3: (1,)}.get(x.ndim, (1,))
    counts = [size // p for size, p in zip(x.shape[2:] if x.ndim > 3 else x.shape[1:2], sizes, strict=True)]
    axis = max(range(len(counts)), key=lambda i: counts[i])
    if counts[axis] < 2:
        raise AttentionError(
            f"x of shape {tuple(x.shape)} has {math.prod(counts)} token of {patch} latents, the largest a layer has; "
            "expected two or more along some axis, so that one can be edited and one kept."
        )
    mask = torch.zeros_like(x[:, :1] if x.ndim > 3 else x[..., :1])
    where = mask.movedim((2 if x.ndim > 3 else 1) + axis, -1)
    half = counts[axis] // 2 * sizes[axis]
    where[0::2, ..., :half] = 1
    where[1::2, ..., -sizes[axis] :] = 1
    return mask


def coarsest(layers: AttentionLayers) -> tuple[int, int, int]:
    patches = [layers.patch, *(layer.patch for layer in layers.layers if layer.patch is not None)]
    t, h, w = (max(sizes) for sizes in zip(*patches, strict=True))
    return t, h, w


def token(clip: Tensor, place: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """One token's latents, a view into one clip's."""
    if clip.ndim == 2:
        return clip[place[2]]
    axes = list(zip(place, patch, strict=True))[-(clip.ndim - 1) :]
    return clip[(slice(None), *(slice(i * p, (i + 1) * p) for i, p in axes))]


def module_state(model: Any) -> dict[str, Any]:
    """What hooks and wrappers change on modules."""
    return {
        f"{type(module).__name__} {index}": (
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            id(module.__dict__.get("forward")),
        )
        for index, module in enumerate(dict.fromkeys(reachable_modules(model)))
    }


def in_precision(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another precision, through dicts and sequences."""
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
