"""Masks, from pixels to tokens:  pixel mask --latent_mask--> latent mask --token_mask--> token mask.

One polarity everywhere: 1 = edit (foreground), 0 = keep (background). `from_keep_mask`, `from_comfy` and
`from_diffusers` bring other people's conventions into it. The normal form is a float tensor (batch, 1, frames, height,
width) in [0, 1]; every function here accepts whatever `as_mask` accepts. Soft values are allowed, and every reduction
is a maximum, so a small region is never lost: a cell that holds any edited pixel is edited.

>>> video = torch.zeros(9, 64, 96)  # frames, height, width
>>> video[:, 16:32, 40:56] = 1  # edit here
>>> latent = latent_mask(video, temporal=4, spatial=8)
>>> latent.shape, token_mask(latent, patch=(1, 2, 2)).sum()
(torch.Size([1, 1, 3, 8, 12]), tensor(6))

Source of the pooling: KV-Lock (arXiv 2603.09657); the causal frame groups are those of the Wan, HunyuanVideo and
CogVideoX VAEs. Morphology (`grow`, `feather`, ...) runs in scipy on the CPU, frame by frame, and returns to the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import adaptive_max_pool3d

from .types import MaskError

MaskLike: TypeAlias = Tensor | np.ndarray
Mask: TypeAlias = Float[Tensor, "batch 1 frames height width"]
LatentMask: TypeAlias = Float[Tensor, "batch 1 latent_frames latent_height latent_width"]

__all__ = [
    "as_mask",
    "check_mask",
    "feather",
    "from_comfy",
    "from_diffusers",
    "from_keep_mask",
    "grow",
    "latent_mask",
    "resize",
    "ring",
    "shrink",
    "snap_to_patches",
    "token_mask",
]


def as_mask(mask: Any, frames: int | None = None) -> Mask:
    """Bring a mask into the normal form (batch, 1, frames, height, width), float, in [0, 1]; 1 = edit.

    Accepted shapes: (H, W), (T, H, W), (batch, T, H, W) and (batch, 1, T, H, W). Accepted values: bool, uint8 in 0..255
    (divided by 255), or floating in [0, 1]; a floating mask keeps its dtype, the others become float32.
    `frames`: repeat a still mask (T = 1) over this many frames; a moving mask must already have them.
    Raises MaskError for any other shape, dtype or value.
    """
    values = _values(as_tensor(mask))
    if values.ndim == 4 and frames is not None and frames > 1 and values.shape[:2] == (frames, 1):
        raise MaskError(
            f"a mask of shape {_shape(values)} with frames={frames} can mean {frames} frames or {frames} clips: "
            "pass mask.transpose(0, 1) for frames, mask[:, None] for clips"
        )
    match values.ndim:
        case 2:
            values = rearrange(values, "h w -> 1 1 1 h w")
        case 3:
            values = rearrange(values, "t h w -> 1 1 t h w")
        case 4:
            values = rearrange(values, "b t h w -> b 1 t h w")
        case 5 if values.shape[1] == 1:
            pass
        case _:
            hint = "; take one channel: mask[:, :1]" if values.ndim == 5 else ""
            expected = "(H, W), (T, H, W), (batch, T, H, W) or (batch, 1, T, H, W)"
            raise MaskError(f"mask has shape {_shape(values)}; expected {expected}{hint}")
    if frames is None or values.shape[2] == frames:
        return values
    if values.shape[2] != 1:
        raise MaskError(
            f"mask has {values.shape[2]} frames; expected {frames}, or 1 (a still). Change it by masks.resize"
        )
    return values.expand(-1, -1, frames, -1, -1)


def check_mask(mask: MaskLike, *, allow_trivial: bool = False) -> Mask:
    """The mask in normal form (see `as_mask`), after making sure that every clip has something to edit and to keep.

    Raises MaskError for what `as_mask` refuses, and for a clip whose mask is 0 or 1 everywhere unless `allow_trivial`.
    """
    values = as_mask(mask)
    if allow_trivial:
        return values
    for index, clip in enumerate(values):
        name = "the mask" if len(values) == 1 else f"the mask of clip {index} (of {len(values)})"
        if not clip.any():
            raise MaskError(
                f"{name} is 0 everywhere: nothing to edit. Paint the region to edit with 1; "
                "to sample without an edit use the model without a lock"
            )
        if (clip == 1).all():
            raise MaskError(
                f"{name} is 1 everywhere: everything is edited, nothing left to lock; is the polarity inverted? "
                "use masks.from_keep_mask. To generate everything use the model without source and mask"
            )
    return values


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


def grow(mask: MaskLike, radius: float) -> Mask:
    """0/1 mask of the cells within `radius` cells (Euclidean, >= 0) of an edited one (value above 0), per frame."""
    return _per_frame(mask, radius, lambda distance: distance <= radius)


def shrink(mask: MaskLike, radius: float) -> Mask:
    """0/1 mask of the cells further than `radius` cells from any kept one: the dual, 1 - grow(1 - mask, radius)."""
    return 1 - grow(1 - as_mask(mask), radius)


def feather(mask: MaskLike, radius: float) -> Mask:
    """Soft mask for pasting pixels: 1 on edited cells, falling to 0 at `radius` cells outside, per frame.

    weight = (1 + cos(pi * min(d / radius, 1))) / 2 at distance d from the nearest edited cell; radius 0: a hard mask.
    """
    if radius == 0:
        return grow(mask, 0)
    return _per_frame(mask, radius, lambda distance: (1 + np.cos(np.pi * np.minimum(distance / radius, 1))) / 2)


def ring(mask: MaskLike, width: float) -> Mask:
    """0/1 mask of the background within `width` cells of the edited region: grow(mask, width) minus the mask."""
    return grow(mask, width) - grow(mask, 0)


def from_keep_mask(mask: MaskLike, frames: int | None = None) -> Mask:
    """From a mask with 1 = keep, e.g. the concat mask of Wan image-to-video. Shapes and values as in `as_mask`."""
    return 1 - as_mask(mask, frames)


def from_comfy(noise_mask: Any, frames: int | None = None, *, threshold: float = 0.0) -> Mask:
    """From ComfyUI's `noise_mask` or MASK (1 = regenerate), hardened to 0/1: edited where above `threshold`.

    As in ComfyUI's `reshape_mask` for video, (N, H, W) and (N, 1, H, W) are N *frames* of one clip; 5-D is taken as it
    is. ComfyUI resizes trilinearly, which leaves soft borders: the default 0 keeps every touched cell (ComfyUI
    regenerates it in part), 0.5 follows the outline.
    """
    values = as_tensor(noise_mask)
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[None, :, 0]
    return _harden(as_mask(values, frames), threshold)


def from_diffusers(mask: Any, frames: int | None = None, *, threshold: float = 0.5) -> Mask:
    """From a diffusers inpainting mask (white = repaint), hardened to 0/1 at `threshold`, as its image processor does.

    `mask`: a PIL image or a list of them, one per frame; an array (H, W), (T, H, W), (H, W, C) or (T, H, W, C) with C
    1, 3 (RGB) or 4 (RGBA), or a list of (H, W) or (H, W, C); or a tensor as in `as_mask`.
    """
    if isinstance(mask, Sequence) and not isinstance(mask, str):
        if not mask:
            raise MaskError("from_diffusers got an empty list; expected one image per frame")
        pages = [_luminance(page) for page in mask]
        if len(sizes := {page.shape for page in pages}) > 1:
            raise MaskError(f"from_diffusers got frames of sizes {sorted(sizes)}; expected one size (height, width)")
        mask = np.stack(pages)
    elif not isinstance(mask, Tensor | str | os.PathLike):
        mask = _luminance(mask)
    return _harden(as_mask(mask, frames), threshold, inclusive=True)


def as_tensor(mask: Any) -> Tensor:
    """The mask as it is, as a tensor. Raises MaskError for a path, or what holds no values."""
    # Torch takes no array that is read-only (from PIL) or has negative strides (flipped): those are copied.
    if isinstance(mask, Tensor):
        return mask
    if isinstance(mask, str | os.PathLike):
        raise MaskError(
            f"mask is the path {os.fspath(mask)!r}; expected its values, 1 = edit, as masks.as_mask reads. Read it:\n"
            f"  mask = kvlock_sampling.video.read_mask({os.fspath(mask)!r}, frames=..., size=(height, width))"
        )
    try:
        return torch.from_numpy(np.require(mask, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise MaskError(f"mask is a {type(mask).__name__}; expected a tensor or array, 1 = edit ({error})") from None


def _values(mask: Tensor) -> Tensor:
    """Check dtype and range; return floating values in [0, 1]."""
    if mask.numel() == 0:
        raise MaskError(f"mask of shape {_shape(mask)} is empty")
    if mask.dtype == torch.bool:
        return mask.float()
    if mask.dtype == torch.uint8:
        if mask.max() == 1:
            raise MaskError(
                "a uint8 mask runs from 0 to 255, but this one's largest value is 1: pass mask.bool() if 1 means edit"
            )
        return mask.float() / 255
    if not mask.dtype.is_floating_point:
        raise MaskError(f"mask has dtype {mask.dtype}; expected bool, uint8 (0..255) or floating: pass mask.bool()")
    low, high = (bound.item() for bound in mask.aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        hint = ": pass mask / 255" if low >= 0 and 1 < high <= 255 else ""
        raise MaskError(f"mask values run from {low:g} to {high:g}; expected [0, 1], 1 = edit, 0 = keep{hint}")
    return mask


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


def _per_frame(mask: MaskLike, radius: float, weight: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Apply `weight` to each cell's distance to the nearest edited cell of its frame; 0 where the frame has none."""
    if not radius >= 0:
        raise MaskError(f"radius is {radius}; expected cells >= 0. Use masks.shrink to go inwards")
    values = as_mask(mask)
    edited = rearrange(values > 0, "b 1 t h w -> (b t) h w").cpu().numpy()
    out = np.zeros(edited.shape, np.float32)
    for page, frame in zip(out, edited, strict=True):
        if frame.any():  # scipy's distance to nothing is not defined
            page[:] = weight(ndimage.distance_transform_edt(~frame))
    return rearrange(torch.from_numpy(out).to(values), "(b t) h w -> b 1 t h w", b=len(values))


def _luminance(page: Any) -> np.ndarray:
    """One image, PIL or array, or an array of frames, as gray values (..., height, width)."""
    if hasattr(page, "convert"):  # PIL, not imported here
        return np.asarray(page.convert("L"))
    array = np.asarray(page)
    if array.ndim >= 3 and array.shape[-1] in (1, 3, 4):
        return array[..., :3].max(axis=-1)  # white is white in every channel; alpha says nothing about repainting
    return array


def _harden(values: Tensor, threshold: float, *, inclusive: bool = False) -> Tensor:
    if not 0 <= threshold <= 1:
        raise MaskError(f"threshold is {threshold}; expected [0, 1]")
    return (values >= threshold if inclusive else values > threshold).to(values.dtype)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
