"""The same mask at another resolution: latents, tokens, any size. Every cell takes the maximum of what it covers.

Source of the pooling: KV-Lock (arXiv 2603.09657); the causal frame groups are those of the Wan, HunyuanVideo and
CogVideoX VAEs.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool3d

from ..types import MaskError
from .form import Mask, MaskLike, as_mask

LatentMask: TypeAlias = Float[Tensor, "batch 1 latent_frames latent_height latent_width"]


def latent_mask(mask: MaskLike, *, temporal: int = 4, spatial: int | tuple[int, int] = 8) -> LatentMask:
    """Pixel mask -> latent mask, for a VAE with causal temporal compression. Maximum over each cell.

    Latent frame 0 sees pixel frame 0; latent frame t >= 1 sees pixel frames 1 + (t-1) * temporal .. t * temporal.
    `spatial` is the VAE's factor, an int or (height, width). Result: (batch, 1, 1 + (T-1) / temporal, H / sh, W / sw).
    Raises MaskError when frames or size do not fit, and says which do.
    """
    values = as_mask(mask)
    spatial = (spatial, spatial) if isinstance(spatial, int) else spatial
    if min(temporal, *spatial) < 1:
        raise MaskError(
            f"temporal={temporal}, spatial={spatial}: compression factors are integers >= 1, e.g. temporal=4, spatial=8"
        )
    frames = values.shape[2]
    if (frames - 1) % temporal:
        below = frames - (frames - 1) % temporal
        raise MaskError(
            f"{frames} frames do not fit temporal={temporal}: a causal VAE takes 1 + {temporal}k frames, "
            f"here {below} or {below + temporal}. Trim the clip with mask[:, :, :{below}], or use masks.resize"
        )
    first, rest = values[:, :, :1], values[:, :, 1:]
    if frames > 1:
        rest = reduce(rest, "b c (t s) h w -> b c t h w", "max", s=temporal)
    return _pool(torch.cat([first, rest], dim=2), (1, *spatial), "spatial")


def token_mask(latent_mask: MaskLike, patch: tuple[int, int, int] = (1, 2, 2)) -> Bool[Tensor, "batch tokens"]:
    """Latent mask -> one bool per video token, True = edit, flattened time, height, width (row-major).

    `patch` is the transformer's patch (time, height, width), e.g. (1, 2, 2) for Wan. A token is edited when any cell of
    its patch is above 0. Raises MaskError when the patch does not divide the mask.
    """
    return rearrange(_pool(as_mask(latent_mask), patch, "patch") > 0, "b 1 t h w -> b (t h w)")


def snap_to_patches(latent_mask: MaskLike, patch: tuple[int, int, int] = (1, 2, 2)) -> LatentMask:
    """The latent mask grown to whole patches, same shape, so that compositing and locking agree on every cell.

    Each patch takes its maximum, so `token_mask` stays as it is. Raises MaskError when the patch does not divide.
    """
    pooled = _pool(as_mask(latent_mask), patch, "patch")
    return repeat(pooled, "b c t h w -> b c (t p) (h q) (w r)", p=patch[0], q=patch[1], r=patch[2])


def resize(mask: MaskLike, frames: int, height: int, width: int) -> Mask:
    """The mask at another size, any-hit: a new cell takes the maximum of all old cells that it overlaps.

    Enlarging by a whole factor is nearest-neighbour; shrinking never drops a region, however small. Frames are spread
    evenly: for the causal grouping of a video VAE use `latent_mask`. Raises MaskError for sizes below 1.
    """
    if min(frames, height, width) < 1:
        raise MaskError(f"frames={frames}, height={height}, width={width}: a mask's size is at least 1 each way")
    return adaptive_max_pool3d(as_mask(mask), (frames, height, width))


def _pool(values: Tensor, size: tuple[int, int, int], name: str) -> Tensor:
    """Max-pool with kernel = stride = size over (frames, height, width)."""
    shape = tuple(values.shape[2:])
    if len(size) != 3 or min(size) < 1:
        raise MaskError(f"{name}={size}: expected three integers >= 1 (time, height, width), e.g. (1, 2, 2)")
    if any(n % s for n, s in zip(shape, size, strict=True)):
        down = tuple(max(n // s, 1) * s for n, s in zip(shape, size, strict=True))
        up = tuple(-(-n // s) * s for n, s in zip(shape, size, strict=True))
        raise MaskError(
            f"{name}={size} does not divide the mask's (frames, height, width) = {shape}: "
            f"resize with masks.resize(mask, {', '.join(map(str, down))}), or pad the clip and the mask to {up}"
        )
    return reduce(values, "b c (t p) (h q) (w r) -> b c t h w", "max", p=size[0], q=size[1], r=size[2])
