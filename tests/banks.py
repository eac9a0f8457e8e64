"""Keys and K/V for the tests of the kv_cache: cheap, and told by the noise level they stand for."""

from __future__ import annotations

import torch

from kvlock_sampling.kv_cache import KVCacheKey

SITES = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
SHAPE = (2, 2, 6, 8)  # clips, heads, kept tokens, dim
SITE_BYTES = 2 * 2 * 2 * 6 * 8 * 4  # key and value in float32
LEVEL_BYTES = len(SITES) * SITE_BYTES


def key(clip: str = "clip", layers: tuple[str, ...] = SITES) -> KVCacheKey:
    return KVCacheKey(model="model", clip=clip, noise="noise", tokens="tokens", layers=layers)


def store(sigma: float, *, shape: tuple[int, ...] = SHAPE, layers: tuple[str, ...] = SITES) -> dict:
    """K/V of a source pass at sigma: random, and the same whenever they are computed."""
    kv = {}
    for i, layer in enumerate(layers):
        g = torch.Generator().manual_seed(int(sigma * 1e6) * 31 + i)
        kv[layer] = (torch.randn(shape, generator=g), torch.randn(shape, generator=g) * sigma)
    return kv


def run(shelf, sigmas, **kwargs) -> list[float]:
    """Ask for each noise level, put where nothing serves. Returns where the source pass ran."""
    passes = []
    for sigma in sigmas:
        if shelf.lookup(sigma) is None:
            shelf.put(sigma, store(sigma, **kwargs))
            passes.append(sigma)
    return passes


def contents(level) -> list[torch.Tensor]:
    """Everything a level holds, copied."""
    return [x.clone() for layer in level.layers for x in level.get(layer)]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
