"""The normal form of a mask, (batch, 1, frames, height, width) in [0, 1], 1 = edit, and masks of other tools in it."""

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..types import MaskError
from ..utils.fields import check_number

MaskLike: TypeAlias = Tensor | np.ndarray
Mask: TypeAlias = Float[Tensor, "batch 1 frames height width"]


def as_mask(mask: Any, frames: int | None = None) -> Mask:
    """Bring a mask, 1 = edit, into the normal form.

    Args:
        mask: (H, W), (T, H, W), (batch, T, H, W) or (batch, 1, T, H, W); bool, uint8 (edit >= 128) or float in [0, 1].
        frames: Repeat a still mask (T = 1) over this many frames; a moving mask must have them already.

    Returns:
        (batch, 1, frames, height, width) in [0, 1]; the dtype of a floating mask, else float32.

    Raises:
        MaskError: Another shape, dtype or value.
    """
    values = _values(as_tensor(mask))
    shape = tuple(values.shape)
    if len(shape) == 4 and frames is not None and frames > 1 and shape[:2] == (frames, 1):
        raise MaskError(
            f"a mask of shape {shape} with frames={frames} can mean {frames} frames or {frames} clips: "
            "pass mask.transpose(0, 1) for frames, mask[:, None] for clips"
        )
    if len(shape) not in (2, 3, 4, 5) or (len(shape) == 5 and shape[1] != 1):
        hint = "" if len(shape) != 5 else "; take mask.transpose(1, 2)" if shape[2] == 1 else "; take mask[:, :1]"
        raise MaskError(f"mask has shape {shape}; expected (H, W), (T, H, W) or (batch[, 1], T, H, W){hint}")
    clips, time = shape[0] if len(shape) > 3 else 1, 1 if len(shape) == 2 else shape[-3]
    values = values.reshape(clips, 1, time, *shape[-2:])
    if frames is None or time == check_number("frames", frames, MaskError, at_least=1, whole=True):
        return values
    if time != 1:
        hint = "Try mask[..., 0] or masks.from_diffusers(mask)" if shape[-1] in (1, 3, 4) else "Use masks.resize"
        raise MaskError(f"mask has {time} frames; expected {frames}, or 1 (a still); its shape is {shape}. {hint}")
    return values.expand(-1, -1, frames, -1, -1)


def check_mask(mask: MaskLike) -> Mask:
    """Check that every clip has something above 0.1 to edit and something to keep, and return it in the normal form.

    Args:
        mask: As in `as_mask`.

    Raises:
        MaskError: The mask is 0 or 1 everywhere in some clip, or `as_mask` refuses it.
    """
    values = torch.threshold(as_mask(mask), 0.1, 0.0)  # less is noise
    for index, clip in enumerate(values):
        name = "the mask" if len(values) == 1 else f"the mask of clip {index} (of {len(values)})"
        if not clip.any():
            raise MaskError(f"{name} is 0 everywhere: nothing to edit. Paint the region to edit with 1")
        if (clip == 1).all():
            raise MaskError(f"{name} is 1 everywhere: nothing kept; is the polarity inverted? use masks.from_keep_mask")
    return values


def from_keep_mask(mask: MaskLike, frames: int | None = None) -> Mask:
    """From a mask with 1 = keep, e.g. the concat mask of Wan image-to-video. Arguments are those of `as_mask`."""
    return 1 - as_mask(mask, frames)


def from_comfy(noise_mask: Any, frames: int | None = None) -> Mask:
    """From ComfyUI's `noise_mask` or MASK, 1 = regenerate, to the normal form: 1 where it regenerates a tenth or more.

    Args:
        noise_mask: (N, H, W) or (N, 1, H, W) with N *frames* of one clip; or (batch, 1, T, H, W).
        frames: As in `as_mask`.

    Raises:
        MaskError: `as_mask` refuses the mask.
    """
    values = as_tensor(noise_mask)
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[None, :, 0]
    values = as_mask(values, frames)
    return (values >= 0.1).to(values.dtype)  # less is noise, such as that of a JPEG


def from_diffusers(mask: Any, frames: int | None = None) -> Mask:
    """From a diffusers inpainting mask, white = repaint, to the normal form: 1 where a channel is 0.5 or more.

    Args:
        mask: A PIL image or array (H, W), (T, H, W), (H, W, C) or (T, H, W, C), C = 1, 3 (RGB) or 4 (RGBA); a list of
            images or arrays, one per frame; or a tensor as in `as_mask`.
        frames: As in `as_mask`.

    Raises:
        MaskError: `as_mask` refuses the mask, or frames differ in size.
    """
    if isinstance(mask, Sequence) and not isinstance(mask, str):
        if not mask:
            raise MaskError("from_diffusers got an empty list; expected one image per frame")
        pages = [_brightest(page) for page in mask]
        if len(sizes := {page.shape for page in pages}) > 1:
            raise MaskError(f"from_diffusers got frames of sizes {sorted(sizes)}; expected one size (height, width)")
        mask = np.stack(pages)
    elif not isinstance(mask, Tensor | str | os.PathLike):
        mask = _brightest(mask)
    values = as_mask(mask, frames)
    return (values >= 0.5).to(values.dtype)


def _brightest(page: Any) -> np.ndarray:
    if hasattr(page, "convert") and page.mode not in ("1", "F") and page.mode[0] != "I":  # PIL, not imported here
        page = page.convert("RGB")
    array = np.asarray(page)
    if array.ndim >= 3 and array.shape[-1] in (1, 3, 4):
        return array[..., :3].max(axis=-1)  # white is white in every channel; alpha says nothing about repainting
    return array * np.uint8(255) if array.dtype == bool else array  # a list may hold pages of bytes too


def as_tensor(mask: Any) -> Tensor:
    def shown(page: Any) -> Any:  # PIL's indices say nothing about brightness, nor does its axis of channels
        return _brightest(page) if hasattr(page, "convert") else page

    if isinstance(mask, Tensor):
        return mask.detach()
    if isinstance(mask, str | os.PathLike):
        name = os.fspath(mask)
        raise MaskError(
            f"mask is the path {name!r}; expected its values, 1 = edit. Read it:\n"
            f"  mask = kvlock_sampling.video.read_mask({name!r}, frames=..., size=(height, width))"
        )
    mask = [shown(page) for page in mask] if isinstance(mask, list | tuple) else shown(mask)
    try:
        # Torch takes no array that is read-only (from PIL) or has negative strides (flipped), so these are copied.
        return torch.from_numpy(np.require(mask, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise MaskError(f"mask is a {type(mask).__name__}; expected a tensor or array, 1 = edit ({error})") from None


def _values(mask: Tensor) -> Tensor:
    if mask.numel() == 0:
        raise MaskError(f"mask of shape {tuple(mask.shape)} is empty")
    if mask.dtype == torch.bool:
        return mask.float()
    if mask.dtype == torch.uint8:
        if 0 < (largest := int(mask.max())) < 128:
            raise MaskError(f"a uint8 mask runs to 255, but this one's largest value is {largest}: pass mask > 0")
        return (mask >= 128).float()  # so that noise and a background of 1 do not count; a soft mask is floating
    if not mask.dtype.is_floating_point:
        raise MaskError(f"mask has dtype {mask.dtype}; expected bool, uint8 (0..255) or floating: pass mask > 0")
    low, high = (bound.item() for bound in mask.aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        hint = ": pass mask / 255" if low >= 0 and 1 < high <= 255 else ""
        raise MaskError(f"mask values run from {low:g} to {high:g}; expected [0, 1], 1 = edit, 0 = keep{hint}")
    return mask
