"""Fusion of keys and values, as pure math:  K_mix = m K + (1 - m) (lock K_src + (1 - lock) K),  V likewise.

Source: KV-Lock (arXiv 2603.09657); m = 1 marks edited (foreground) tokens, which are never touched.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def fusion_ratio(
    lock: Float[Tensor, "batch"] | Float[Tensor, "batch tokens"],
    background: Bool[Tensor, "batch tokens"] | Float[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """How much of the source each token takes: `lock` where the token is background, 0 where it is edited.

    `background` may also be a weight in [0, 1], for a softer lock near the edit.
    """
    if lock.ndim == 1:
        lock = lock.unsqueeze(1)
    return lock * background


def fuse(
    edit: Float[Tensor, "batch *heads tokens dim"],
    source: Float[Tensor, "batch *heads tokens dim"],
    ratio: Float[Tensor, "batch tokens"],
) -> Float[Tensor, "batch *heads tokens dim"]:
    """Blend keys (or values) token-wise.

    `ratio` is dimensionless in [0, 1]: 0 keeps the edit's own, 1 takes the source's, both exactly, bit for bit
    (`torch.lerp` counts from the nearer end, so neither end is rounded).
    """
    return torch.lerp(edit, source, _weight(ratio, edit))


def fuse_chunks(
    edit: Float[Tensor, "rows *heads tokens dim"],
    source: Float[Tensor, "batch *heads tokens dim"],
    ratio: Float[Tensor, "batch tokens"],
) -> Float[Tensor, "rows *heads tokens dim"]:
    """`fuse` where the edit's rows are several chunks of the batch, e.g. two branches, and share one source."""
    chunks = edit.unflatten(0, (-1, len(ratio)))
    return torch.lerp(chunks, source, _weight(ratio, edit)).flatten(0, 1)


def fuse_chunks_(
    edit: Float[Tensor, "rows *heads tokens dim"],
    source: Float[Tensor, "batch *heads tokens dim"],
    ratio: Float[Tensor, "batch tokens"],
) -> None:
    """The same in place. (Not `torch.lerp(out=)`, which knows no derivatives.)"""
    edit.unflatten(0, (-1, len(ratio))).lerp_(source, _weight(ratio, edit))


def _weight(ratio: Tensor, edit: Tensor) -> Tensor:
    batch, tokens = ratio.shape
    return ratio.to(edit.dtype).view(batch, *([1] * (edit.ndim - 3)), tokens, 1)
