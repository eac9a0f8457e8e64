"""What every small random network shares: the call around it, its weights, and its place in a table of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]
Cond = dict[str, Tensor]

CHANNELS = 4
"""Of the latents."""

TEXT = 8
"""Width of the text."""

LENGTH = 5
"""Tokens of the text; of the second clip's only three are valid, where a family has masks."""


class Family(NamedTuple):
    """How to make one network and to call it.

    build: makes it, with the library's own initialisation.
    call: `call(network, z, time, cond) -> prediction` like z; time is (rows,), in [0, 1].
    latents: from a grid of tokens to the latents of one clip, without the batch's axis.
    cond: from a generator, the number of clips and the grid to the conditioning, one row per clip.
    extra: from a grid to the tokens (before, after) that are neither video nor text.
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
        """The network in charge, which a lock asks for."""
        return self.network.at(time) if isinstance(self.network, Experts) else self.network

    def forward(self, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.call(self.network, z, time, cond)


class Experts(nn.Module):
    """Two networks that share a run: `transformer` at high noise, from `boundary` on, `transformer_2` below."""

    boundary = 0.5

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = build(), build()

    def at(self, time: Tensor) -> nn.Module:
        """The network in charge."""
        return self.transformer if float(time.max()) >= self.boundary else self.transformer_2


def enliven(network: nn.Module, seed: int) -> nn.Module:
    """Random weights of a size at which everything counts.

    Fresh networks hardly react to text, time and attention: modulations, gates and outputs begin at zero.
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
    """A network of diffusers."""
    import diffusers

    return getattr(diffusers, kind)(**settings)


def halved(grid: Grid) -> tuple[int, ...]:
    """Latents of a video in patches of 1 x 2 x 2."""
    return CHANNELS, grid[0], 2 * grid[1], 2 * grid[2]


def whole(grid: Grid) -> tuple[int, ...]:
    """Latents of a video that are tokens already."""
    return CHANNELS, *grid


def text(generator: torch.Generator, clips: int, length: int = LENGTH, width: int = TEXT) -> Tensor:
    """A text's embedding, (clips, length, width)."""
    return torch.randn(clips, length, width, generator=generator)


def valid(clips: int, length: int = LENGTH) -> Tensor:
    """A text's mask, (clips, length), bool: every second clip's text is shorter by two."""
    counts = torch.tensor([length - 2 * (clip % 2) for clip in range(clips)])
    return torch.arange(length) < counts[:, None]


def plain(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    """Text alone."""
    return {"text": text(generator, clips)}


def masked(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    """Text and its mask."""
    return {"text": text(generator, clips), "valid": valid(clips)}


def pooled(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    """Text, its mask, and one vector for all of it."""
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
