"""The normal form of a mask: (batch, 1, frames, height, width), floating, in [0, 1], 1 = edit; the rest is refused."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..types import MaskError

MaskLike: TypeAlias = Tensor | np.ndarray
Mask: TypeAlias = Float[Tensor, "batch 1 frames height width"]


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


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
