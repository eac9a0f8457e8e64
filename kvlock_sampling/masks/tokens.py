"""From the shape of latents to the grid of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import AttentionError


def token_grid(latent_shape: Sequence[int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens along (time, height, width).

    Latents are a video (batch, channels, time, height, width), a picture (batch, channels, height, width), or packed
    tokens (batch, tokens, channels), which have been through the patches already and count as one row.

    Raises:
        AttentionError: other axes, or axes that do not divide into patches.
    """
    axes = tuple(int(size) for size in latent_shape)[2:]
    if len(latent_shape) == 3:
        return 1, 1, int(latent_shape[1])
    if len(latent_shape) == 4:
        axes = (patch[0], *axes)
    elif len(latent_shape) != 5:
        raise AttentionError(
            f"latents of shape {tuple(latent_shape)} have {len(latent_shape)} axes; expected 5: (batch, channels, "
            "time, height, width), 4: (batch, channels, height, width), or 3: (batch, tokens, channels)."
        )
    if any(size % p for size, p in zip(axes, patch, strict=True)):
        raise AttentionError(
            f"latents of time, height, width {axes} do not divide into patches of {patch}.\n"
            "  Crop or pad the clip so that each axis is a multiple of its patch size."
        )
    t, h, w = (size // p for size, p in zip(axes, patch, strict=True))
    return t, h, w


def coarser(ratio: Tensor, grid: tuple[int, int, int], factor: tuple[int, int, int]) -> Tensor:
    """A map over tokens, (batch, tokens), on tokens `factor` as large: the least of those that merge into one, so that
    a token with anything edited in it counts as edited.
    """
    cells = ratio.view(len(ratio), 1, *grid)
    return -torch.nn.functional.max_pool3d(-cells, factor).flatten(1)
