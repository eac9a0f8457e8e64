"""A larger or softer region, by each cell's distance to the nearest edited cell (value above 0) of its frame.

Runs in scipy on the CPU and returns to the mask's device. Every function takes
- mask: as in `as_mask`;
- radius: in cells, Euclidean, >= 0; a negative radius raises MaskError.
"""

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from scipy import ndimage
from torch import Tensor

from ..types import MaskError
from ..utils.fields import check_number
from .form import Mask, MaskLike, as_mask


def grow(mask: MaskLike, radius: float) -> Mask:
    """1 on cells within `radius` of an edited cell, else 0. A smaller region is 1 - grow(1 - mask, radius)."""
    return _per_frame(mask, radius, lambda distance: distance <= radius)


def feather(mask: MaskLike, radius: float) -> Mask:
    """A soft mask for pasting pixels: 1 on edited cells, falling as a cosine to 0 at `radius` outside; 0 is hard."""
    if check_number("radius", radius, MaskError, at_least=0.0) == 0:
        return grow(mask, 0)
    return _per_frame(mask, radius, lambda distance: (1 + np.cos(np.pi * np.minimum(distance / radius, 1))) / 2)


def dilate(mask: MaskLike, radius: float) -> Mask:
    """`feather` around regions of any value: the largest of  value + falling cosine - 1  around each cell."""
    if radius == 0:
        return as_mask(mask)
    y, x = np.mgrid[-int(radius) : int(radius) + 1, -int(radius) : int(radius) + 1]
    distance = np.minimum(np.hypot(y, x) / radius, 1)
    near = {"footprint": distance < 1, "structure": (np.cos(np.pi * distance) - 1) / 2}
    return _frames(mask, radius, lambda frame: ndimage.grey_dilation(frame, mode="nearest", **near))


def _per_frame(mask: MaskLike, radius: float, weight: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    return _frames(mask, radius, lambda frame: weight(ndimage.distance_transform_edt(frame <= 0)))


def _frames(mask: MaskLike, radius: float, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    check_number("radius", radius, MaskError, " Inwards: 1 - masks.grow(1 - mask, radius).", at_least=0.0)
    values = as_mask(mask)
    pages = rearrange(values, "b 1 t h w -> (b t) h w").float().cpu().numpy()
    out = np.zeros(pages.shape, np.float32)
    for page, frame in zip(out, pages, strict=True):
        if frame.any():  # scipy's distance to nothing is not defined
            page[:] = change(frame)
    return rearrange(torch.from_numpy(out).to(values), "(b t) h w -> b 1 t h w", b=len(values))
