"""From latents to tokens: the grid of tokens, and which tokens of a clip can come from the source."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..types import AttentionError

Grid = tuple[int, int, int]


def token_grid(latent_shape: Sequence[int], patch: Grid) -> Grid:
    """The number of tokens along (time, height, width), for `patch` latents per token; packed latents are one row."""
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


def on_latents(values: Tensor, latent_shape: Sequence[int], patch: Grid | None) -> Tensor:
    """Values of clips, (batch,), or of tokens, (batch, tokens), broadcastable to latents of this shape."""
    if values.ndim < 2 or patch is None or len(latent_shape) == 3:
        return values.reshape(-1, *values.shape[1:], *[1] * (len(latent_shape) - max(1, values.ndim)))
    cells = values.view(len(values), 1, *token_grid(latent_shape, patch))
    for axis, size in enumerate(patch, start=2):
        cells = cells.repeat_interleave(size, axis)
    return cells[:, :, 0] if len(latent_shape) == 4 else cells


@dataclass(frozen=True)
class Selection:
    """Which tokens of a video can come from the source: those that every clip of the batch locks in full."""

    weight: Tensor  # the fraction of the lock that each token takes, (batch, tokens)

    @cached_property
    def kept(self) -> Tensor:
        """Positions of tokens whose K/V are the source's if the lock is 1."""
        return (self.weight >= 1).all(0).nonzero().flatten()

    @cached_property
    def computed(self) -> Tensor:
        """Positions of all other tokens, which are computed at any lock."""
        return (self.weight < 1).any(0).nonzero().flatten()

    @cached_property
    def mixed(self) -> Tensor:
        """The computed tokens that take some of the source in some clip, as indices into `computed`."""
        return (self.weight[:, self.computed] > 0).any(0).nonzero().flatten()

    @cached_property
    def stored(self) -> Tensor:
        """Positions of tokens whose source K/V are needed: the kept ones, then the mixed ones."""
        return torch.cat([self.kept, self.computed[self.mixed]])

    @property
    def fraction(self) -> float:
        """The fraction of the tokens that is computed at full lock."""
        return len(self.computed) / self.weight.shape[1]
