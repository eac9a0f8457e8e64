"""Fusion of keys and values, as pure math:  K_mix = m K + (1 - m) (lock K_src + (1 - lock) K),  V likewise.

Source: KV-Lock (arXiv 2603.09657); m = 1 marks edited (foreground) tokens, which never change.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def fusion_ratio(
    lock: Float[Tensor, "batch"] | Float[Tensor, "batch tokens"],
    background: Bool[Tensor, "batch tokens"] | Float[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """How much of the source each token takes, in [0, 1].

    Args:
        lock: Fusion ratio in [0, 1], per clip or per token.
        background: 1 for background tokens, 0 for edited tokens, in between for a softer lock near the edit.
    """
    return (lock.unsqueeze(1) if lock.ndim == 1 else lock) * background


def fuse(
    edit: Float[Tensor, "rows *heads tokens dim"],
    source: Float[Tensor, "batch *heads tokens dim"],
    ratio: Float[Tensor, "batch tokens"],
) -> Float[Tensor, "rows *heads tokens dim"]:
    """Blend keys (or values) token by token; the result is shaped like `edit`.

    Args:
        edit: The edit's own keys or values. Rows are chunks of the batch, e.g. two branches, which share one source.
        source: The source's keys or values.
        ratio: In [0, 1]: 0 keeps the edit's own bits, 1 takes the source's bits.
    """
    # torch.lerp counts from the nearer end, so it rounds neither.
    return torch.lerp(edit.unflatten(0, (-1, len(ratio))), source.to(edit), _weight(ratio, edit)).flatten(0, 1)


def fuse_rows(own: Tensor, source: Tensor, ratio: Tensor, video: slice, edit_rows: int) -> Tensor:
    """`fuse` the first `edit_rows` rows at the positions `video` of a sequence. The rest is unchanged."""
    if edit_rows == own.shape[0] and own.shape[-2] == ratio.shape[1]:
        return fuse(own, source, ratio)
    mixed = own.clone()
    # In place, but not `torch.lerp(out=)`, which has no derivative.
    mixed[:edit_rows, ..., video, :].unflatten(0, (-1, len(ratio))).lerp_(source.to(own), _weight(ratio, own))
    return mixed


def join_kept(own: Tensor, source: Tensor, ratio: Tensor, selection: Any, start: int) -> Tensor:
    """Insert the source's kept tokens behind the computed ones, and fuse those that take some of the source.

    `own` is (rows, ..., length, dim) with the `selection`'s computed tokens from `start` on, `source` (batch, ...,
    stored, dim). Returns (rows, ..., length + kept, dim): text before, computed tokens, kept tokens, text after.
    """
    kept, end = len(selection.kept), start + len(selection.computed)
    out = own.new_empty(*own.shape[:-2], own.shape[-2] + kept, own.shape[-1])
    if own.ndim == 4 and own.stride(1) < own.stride(2):  # the heads of a token lie together: so diffusers wants it back
        out = out.new_empty(out.transpose(1, 2).shape).transpose(1, 2)
    out[..., :end, :] = own[..., :end, :]
    out[..., end + kept :, :] = own[..., end:, :]
    out[..., end : end + kept, :].unflatten(0, (-1, len(ratio))).copy_(source[..., :kept, :])
    if len(selection.mixed):
        where = selection.mixed + start
        mixed_ratio = ratio[:, selection.computed[selection.mixed]]
        out[..., where, :] = fuse(own[..., where, :], source[..., kept:, :], mixed_ratio)
    return out


def _weight(ratio: Tensor, edit: Tensor) -> Tensor:
    batch, tokens = ratio.shape
    return ratio.to(edit).view(batch, *([1] * (edit.ndim - 3)), tokens, 1)
