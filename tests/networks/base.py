"""Shared parts of the small random networks: calls, weights, conditioning, and the description of a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]
Cond = dict[str, Tensor]

CHANNELS = 4
"""Channels of the latents."""

TEXT = 8
"""Width of the text embedding."""

LENGTH = 5
"""Text tokens. In families with text masks only three tokens of the second clip are valid."""


class Family(NamedTuple):
    """How to build one network and call it.

    Attributes:
        build: Builds the network with the library's initialisation.
        call: `call(network, z, time, cond) -> prediction`, shaped like z; time is (rows,), in [0, 1].
        latents: Maps a token grid to the shape of one clip's latents, without the batch.
        cond: Maps a generator, the number of clips and the grid to the conditioning, one row per clip.
        extra: Maps a grid to the numbers of tokens (before, after) that are neither video nor text.
    """

    build: Callable[[], nn.Module]
    call: Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    latents: Callable[[Grid], tuple[int, ...]]
    cond: Callable[[torch.Generator, int, Grid], Cond]
    extra: Callable[[Grid], tuple[int, int]] = lambda grid: (0, 0)


class Called(nn.Module):
    """A network behind the call of a flow model: `called(z, time, cond) -> velocity`."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def expert(self, time: Tensor) -> nn.Module:
        """The expert at this time; the lock calls this."""
        return self.network.at(time) if isinstance(self.network, Experts) else self.network

    def forward(self, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.call(self.network, z, time, cond)


class Experts(nn.Module):
    """Two experts: `transformer` at times from `boundary` upward, `transformer_2` below."""

    boundary = 0.5

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = build(), build()

    def at(self, time: Tensor) -> nn.Module:
        """The expert at this time."""
        return self.transformer if float(time.max()) >= self.boundary else self.transformer_2


def enliven(network: nn.Module, seed: int) -> nn.Module:
    """Draw random weights large enough that every part affects the output.

    Freshly initialised networks hardly react to text, time or attention: modulations, gates and outputs start at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(1.2 * parameter[0].numel() ** -0.5 * noise)
            else:
                parameter.add_(0.1 * noise)
                if name.endswith("bias"):
                    parameter.copy_(0.1 * noise)
    return network.eval().requires_grad_(False)


def build(kind: str, **settings: Any) -> nn.Module:
    """Build a network of diffusers by its class name."""
    import diffusers

    return getattr(diffusers, kind)(**settings)


def halved(grid: Grid) -> tuple[int, ...]:
    """Latents of a video in patches of 1 x 2 x 2."""
    return CHANNELS, grid[0], 2 * grid[1], 2 * grid[2]


def whole(grid: Grid) -> tuple[int, ...]:
    """Latents of a video in patches of 1 x 1 x 1."""
    return CHANNELS, *grid


def text(generator: torch.Generator, clips: int, length: int = LENGTH, width: int = TEXT) -> Tensor:
    """Text embeddings, (clips, length, width)."""
    return torch.randn(clips, length, width, generator=generator)


def valid(clips: int, length: int = LENGTH) -> Tensor:
    """Text masks, (clips, length), bool: every second clip's text is shorter by two tokens."""
    counts = torch.tensor([length - 2 * (clip % 2) for clip in range(clips)])
    return torch.arange(length) < counts[:, None]


def plain(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    """Text without a mask."""
    return {"text": text(generator, clips)}


def masked(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    """Text and its mask."""
    return {"text": text(generator, clips), "valid": valid(clips)}


def pooled(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    """Text, its mask, and a pooled vector."""
    return {**masked(generator, clips, grid), "pooled": torch.randn(clips, TEXT, generator=generator)}


def packed(z: Tensor, patch: int = 1) -> Tensor:
    """Tokens (rows, tokens, channels * patch^2) of latents (rows, channels, [time,] height, width)."""
    if patch == 1:
        return z.flatten(2).transpose(1, 2)
    rows, channels, height, width = z.shape
    z = z.view(rows, channels, height // patch, patch, width // patch, patch)
    return z.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch * patch)


def unpacked(tokens: Tensor, like: Tensor, patch: int = 1) -> Tensor:
    """The inverse of `packed`."""
    if patch == 1:
        return tokens.transpose(1, 2).reshape(like.shape)
    rows, channels, height, width = like.shape
    tokens = tokens.view(rows, height // patch, width // patch, channels, patch, patch)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def positions(height: int, width: int, index: int = 0, axes: int = 3) -> Tensor:
    """Ids of a picture's tokens for rotary embedding, (tokens, axes): index of the picture, row, column, zeros."""
    ids = torch.zeros(height, width, axes)
    ids[..., 0], ids[..., 1], ids[..., 2] = index, torch.arange(height)[:, None], torch.arange(width)
    return ids.view(-1, axes)
