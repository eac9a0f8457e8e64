"""The same mask at another resolution, pixels, latents or tokens: every cell takes the maximum of what it covers. And
the grid of tokens, and which tokens of a clip can come from the source.

Sources: KV-Lock (arXiv 2603.09657); the frame groups are those of the Wan, HunyuanVideo and CogVideoX VAEs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import adaptive_max_pool3d

from ..types import AttentionError, MaskError
from ..utils.fields import as_patch, check_number
from .form import Mask, MaskLike, as_mask

Grid = tuple[int, int, int]


def latent_mask(mask: MaskLike, *, temporal: int = 4, spatial: int | tuple[int, int] = 8) -> Mask:
    """The latent mask, (batch, 1, 1 + (T-1) / temporal, H / spatial, W / spatial), of a mask, for a causal video VAE.

    Latent frame 0 covers pixel frame 0; latent frame t >= 1 covers pixel frames 1 + (t-1) * temporal to t * temporal.

    Args:
        mask: As in `as_mask`.
        temporal: The VAE's factor in time, >= 1.
        spatial: The VAE's factor in space, an int or (height, width), >= 1.

    Raises:
        MaskError: Frames or size do not fit the factors.
    """
    values = as_mask(mask)
    check_number("temporal", temporal, MaskError, at_least=1, whole=True)
    factors = spatial if isinstance(spatial, tuple | list) and len(spatial) == 2 else (spatial, spatial)
    height, width = (check_number("spatial", factor, MaskError, at_least=1, whole=True) for factor in factors)
    frames = values.shape[2]
    if rest := (frames - 1) % temporal:
        below = frames - rest
        raise MaskError(
            f"{frames} frames do not fit temporal={temporal}: a causal VAE takes 1 + {temporal}k frames, "
            f"here {below} or {below + temporal}. Trim it: of as_mask(mask), mask[:, :, :{below}]; or masks.resize"
        )
    values = torch.cat([values[:, :, :1].expand(-1, -1, temporal, -1, -1), values[:, :, 1:]], dim=2)
    return _pool(_pool(values, (temporal, 1, 1), "temporal"), (1, height, width), "spatial")


def token_mask(latent_mask: MaskLike, patch: tuple[int, int, int] = (1, 2, 2)) -> Bool[Tensor, "batch tokens"]:
    """Which video tokens, in the order time, height, width, are edited: those with any latent above 0.

    Args:
        latent_mask: As in `as_mask`, at the latents' size.
        patch: The transformer's patch (time, height, width) in latents, e.g. (1, 2, 2) for Wan.

    Raises:
        MaskError: The patch does not divide the mask.
    """
    return rearrange(_pool(as_mask(latent_mask), as_patch(patch, MaskError), "patch") > 0, "b 1 t h w -> b (t h w)")


def resize(mask: MaskLike, frames: int, height: int, width: int) -> Mask:
    """The mask at another size, with frames spread evenly; for the causal frame groups of a VAE use `latent_mask`.

    Args:
        mask: As in `as_mask`.
        frames: The new number of frames, >= 1; `height` and `width` likewise.

    Raises:
        MaskError: A size is below 1.
    """
    given = {"frames": frames, "height": height, "width": width}
    size = [check_number(name, value, MaskError, at_least=1, whole=True) for name, value in given.items()]
    return adaptive_max_pool3d(as_mask(mask), size)


def on_pixels(values: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Values of latents, (batch, 1, t, h, w), on the pixels that each stands for: the inverse of `latent_mask`."""
    t, h, w = values.shape[2:]
    step = (frames - 1) // (t - 1) if t > 1 and (frames - 1) % (t - 1) == 0 else 0
    time = [-(-f // step) if step else f * t // frames for f in range(frames)]  # else frames are spread evenly
    rows, columns = ([i * cells // size for i in range(size)] for cells, size in ((h, height), (w, width)))
    return values[:, :, time][:, :, :, rows][..., columns]


def _pool(values: Tensor, size: tuple[int, int, int], name: str) -> Tensor:
    shape = tuple(values.shape[2:])
    if any(n % s for n, s in zip(shape, size, strict=True)):
        down = tuple(max(n // s, 1) * s for n, s in zip(shape, size, strict=True))
        up = tuple(-(-n // s) * s for n, s in zip(shape, size, strict=True))
        raise MaskError(
            f"{name}={size} does not divide the mask's (frames, height, width) = {shape}: "
            f"resize with masks.resize(mask, {', '.join(map(str, down))}), or pad the clip and the mask to {up}"
        )
    return reduce(values, "b c (t p) (h q) (w r) -> b c t h w", "max", p=size[0], q=size[1], r=size[2])


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
    cells = repeat(cells, "b c t h w -> b c (t p) (h q) (w r)", p=patch[0], q=patch[1], r=patch[2])
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
