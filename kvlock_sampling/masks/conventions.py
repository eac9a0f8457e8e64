"""Masks of other tools: kept regions in white, ComfyUI's and diffusers' shapes, pictures."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..types import MaskError
from .form import Mask, MaskLike, as_mask, as_tensor


def from_keep_mask(mask: MaskLike, frames: int | None = None) -> Mask:
    """From a mask with 1 = keep, e.g. the concat mask of Wan image-to-video. Arguments are those of `as_mask`."""
    return 1 - as_mask(mask, frames)


def from_comfy(noise_mask: Any, frames: int | None = None) -> Mask:
    """From ComfyUI's `noise_mask` or MASK, 1 = regenerate, to the normal form: 1 where it regenerates in part.

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
    return (values > 0).to(values.dtype)


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
    return array
