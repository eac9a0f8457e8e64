"""A larger, smaller or softer region, by each cell's distance to the nearest edited cell (value above 0) of its frame.

Runs in scipy on the CPU and returns to the mask's device. Every function takes
- mask: as in `as_mask`;
- radius: in cells, Euclidean, >= 0; a negative radius raises MaskError.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from scipy import ndimage
from torch import Tensor

from ..types import MaskError
from .form import Mask, MaskLike, as_mask


def grow(mask: MaskLike, radius: float) -> Mask:
    """1 on cells within `radius` of an edited cell, else 0."""
    return _per_frame(mask, radius, lambda distance: distance <= radius)


def shrink(mask: MaskLike, radius: float) -> Mask:
    """1 on cells further than `radius` from every kept cell, else 0: 1 - grow(1 - mask, radius)."""
    return 1 - grow(1 - as_mask(mask), radius)


def feather(mask: MaskLike, radius: float) -> Mask:
    """A soft mask for pasting pixels: 1 on edited cells, falling as a cosine to 0 at `radius` outside; 0 is hard."""
    if radius == 0:
        return grow(mask, 0)
    return _per_frame(mask, radius, lambda distance: (1 + np.cos(np.pi * np.minimum(distance / radius, 1))) / 2)


def _per_frame(mask: MaskLike, radius: float, weight: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    if not radius >= 0:
        raise MaskError(f"radius is {radius}; expected cells >= 0. Use masks.shrink to go inwards")
    values = as_mask(mask)
    edited = rearrange(values > 0, "b 1 t h w -> (b t) h w").cpu().numpy()
    out = np.zeros(edited.shape, np.float32)
    for page, frame in zip(out, edited, strict=True):
        if frame.any():  # scipy's distance to nothing is not defined
            page[:] = weight(ndimage.distance_transform_edt(~frame))
    return rearrange(torch.from_numpy(out).to(values), "(b t) h w -> b 1 t h w", b=len(values))
