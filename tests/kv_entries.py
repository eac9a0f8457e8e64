"""Cache entries and K/V for the tests of the KV cache: cheap, and made from the noise level alone."""

from __future__ import annotations

import torch

from kvlock_sampling.kv_cache import CacheEntry, KVCache, content_fingerprint

LAYERS = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
SHAPE = (2, 2, 6, 8)  # clips, heads, kept tokens, dim
LEVEL_BYTES = len(LAYERS) * 2 * 2 * 2 * 6 * 8 * 4  # keys and values in float32


class Settled(CacheEntry):
    """An entry that waits after each level until it is where it is kept."""

    def put(self, sigma, keys):
        level = super().put(sigma, keys)
        self.settle()
        return level


def entry(
    kv_cache: KVCache, clip: str = "clip", layers: tuple[str, ...] = LAYERS, kind: type[CacheEntry] = Settled
) -> CacheEntry:
    """The entry of a clip, as a new run opens it."""
    return kind(kv_cache, content_fingerprint({"clip": clip, "format": kv_cache.format}), layers)


def source_pass(sigma: float, *, shape: tuple[int, ...] = SHAPE, layers: tuple[str, ...] = LAYERS) -> dict:
    """K/V of a source pass at sigma: random, and the same whenever they are computed."""
    keys = {}
    for i, layer in enumerate(layers):
        g = torch.Generator().manual_seed(int(sigma * 1e6) * 31 + i)
        keys[layer] = (torch.randn(shape, generator=g), torch.randn(shape, generator=g) * sigma)
    return keys


def run(entry: CacheEntry, sigmas, **options) -> list[float]:
    """Look each noise level up, put where nothing serves. Returns where the source pass ran."""
    passes = []
    for sigma in sigmas:
        if entry.lookup(sigma) is None:
            entry.put(sigma, source_pass(sigma, **options))
            passes.append(sigma)
    return passes


def served(entry: CacheEntry, sigma: float) -> tuple[float, ...]:
    """Look a noise level up, and return the stored noise levels that serve it."""
    level = entry.lookup(sigma)
    chosen = entry._cache.refresh.choose(entry.sigmas, sigma, entry._requested, entry._fresh)
    assert (level is None) == (not chosen)
    return tuple(s for s, _ in chosen)


def contents(keys) -> list[torch.Tensor]:
    """Every key and value, copied."""
    return [x.clone() for pair in keys.values() for x in pair]


def equal(a, b) -> bool:
    """Whether two mappings hold the same bits."""
    a, b = contents(a), contents(b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
