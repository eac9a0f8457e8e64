"""Other people's masks: kept regions in white, ComfyUI's and diffusers' shapes, pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..types import MaskError
from .form import Mask, MaskLike, as_mask, as_tensor


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
